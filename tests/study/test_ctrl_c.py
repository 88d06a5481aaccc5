"Ctrl-C while jobs run in worker processes: each stops after its step, and the same call resumes it."
import json
import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = '''
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with SIGINT ignored
from copd_nb.engine.config import Config
from copd_nb.schedule.paradigms import expert, mixed_rlvr
from copd_nb.study.jobs import Job
from copd_nb.study.workers import do_all

if __name__ == "__main__":
    tiny = Config(prompts=2, group_size=2, max_new_tokens=3, probe_every=0, eval_every=0, checkpoint_every=10_000,
                  device="cpu")
    plans = expert("text", 5_000), mixed_rlvr(["text", "image"], 5_000), expert("image", 5_000)
    try: do_all([(Job(p, tiny, prompts=2, samples=1), []) for p in plans], sys.argv[1], workers=2)
    except KeyboardInterrupt: sys.exit("interrupted")
'''


@pytest.mark.skipif(os.name != "posix", reason="signals of a process group")
@pytest.mark.parametrize("send", [  # a terminal tells the whole group, `kill` the parent alone
    os.killpg, pytest.param(os.kill, marks=pytest.mark.slow)])
def test_workers_stop_after_their_step(tmp_path, send):
    script, store = tmp_path / "script.py", tmp_path / "store"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, start_new_session=True) as process:
        until = time.monotonic() + 240
        while sum(f.stat().st_size > 0 for f in store.glob("*/events.jsonl")) < 2 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.2)
        send(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 1 and err.strip().splitlines()[-1] == "interrupted", err
    assert "the same command resumes them" in out and "Traceback" not in err
    begun = list(store.glob("*/manifest.json"))
    assert len(begun) == 2  # the third job was not begun
    for file in begun:
        assert json.loads(file.read_text())["status"] == "stopped" and list(file.parent.glob("checkpoints/*"))

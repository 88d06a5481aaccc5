"How far runs are, from the ends of their logs."
import io
import json
import time
from contextlib import redirect_stderr

import pytest

from copd_nb.engine.counting import counted, last_step


def log(folder, *steps, more=""):
    folder.mkdir(exist_ok=True)
    with open(folder / "events.jsonl", "a") as file:
        for step in steps: file.write(json.dumps(dict(kind="train", global_step=step, text=more)) + "\n")
    return folder


def test_the_last_step_of_a_long_log_and_of_damaged_ends(tmp_path):
    run = log(tmp_path / "run", *range(1, 400), more="x" * 500)
    assert last_step(run) == 399
    with open(run / "events.jsonl", "a") as file: file.write('[1]\nnull\n\ufffd\n{"kind": "note"}\n{"global_step": 40')
    assert last_step(run) == 399
    (run / "events.jsonl").write_text("")
    assert last_step(run) == last_step(tmp_path / "none") == 0


def test_the_bar_moves_with_steps_and_its_rate_leaves_out_earlier_ones(tmp_path):
    a, b = log(tmp_path / "a", 1, 2, 3), tmp_path / "b"
    with redirect_stderr(said := io.StringIO()), counted({a: 4, b: 6}, 2, every=0.01) as count:
        assert count.bar.initial == count.bar.n == 3
        log(b, 1, 2)
        for _ in range(500):
            if count.bar.n == 5: break
            time.sleep(0.01)
        assert count.bar.n == 5, "nothing was updated: the thread sees the log"
        log(a, 4, 5)  # more than its schedule: counted as whole
        count.update()
        assert count.bar.n == 6
    assert "1/2 runs:  60%" in said.getvalue()


def test_the_bar_ends_with_an_error_and_is_silent_if_asked(tmp_path):
    with redirect_stderr(said := io.StringIO()):
        with pytest.raises(KeyError), counted({tmp_path: 1}, 1, every=0.01): raise KeyError
        with counted({tmp_path: 1}, 1, progress=False) as count: count.update()
    assert said.getvalue().count("\n") == 1

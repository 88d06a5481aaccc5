"The package as people install it: a wheel from a source archive, without this folder beside it."
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.integration
PROGRAM = """
import copd_nb, sys
from copd_nb.analysis.calibration import read_pairs
from copd_nb.analysis.paper import paper_summary
from copd_nb.report.command import main
from copd_nb.study.experiment import read_experiment
assert copd_nb.__file__.startswith(sys.argv[1]), copd_nb.__file__
policy = copd_nb.minis_base()
assert copd_nb.minis_branch("text").adapter and len(read_pairs()) and len(paper_summary("two_branch"))
assert read_experiment("minis", "quick").steps
schedule = copd_nb.copd(["text", "image"], cycles=1, s_rl=1, s_opd=1)
config = copd_nb.Config(prompts=2, opd_prompts=2, group_size=2, probe_every=0, eval_every=0, device="cpu")
run = copd_nb.train(schedule, copd_nb.minis(("text", "image")), policy, config, "run", progress=False)
assert run.finished
sys.exit(main(["compare", "minis", "--preset", "nonsense"]) - 2)
"""


def test_a_wheel_has_all_that_it_needs(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists(): shutil.copy(ROOT / name, tmp_path / "source" / name)
    quiet = dict(check=True, capture_output=True, text=True)
    made_from = tmp_path / "source"
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], cwd=made_from, **quiet)
    source, = tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    tmp_path, source], cwd=tmp_path, **quiet)
    wheel, = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "installed")
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "docs/", "bench/"))]
    reports = {n.rpartition("/")[2] for n in names if n.startswith("copd_nb/assets/reports/")}
    assert reports == {p.name for p in (ROOT / "nbs" / "reports").glob("*.ipynb")}
    environment = os.environ | dict(PYTHONPATH=str(tmp_path / "installed"))
    made = subprocess.run([sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "installed")], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]

"Set before torch loads: spinning OpenMP threads make a shared machine crawl. A busy machine fails no property."
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import contextmanager  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

os.fsync = lambda handle: None  # no test cuts the power: what a killed process wrote is there
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


LONG = ("test_studies", "test_engine", "test_reports", "test_cluster", "test_browser", "test_docs", "test_control",
        "test_reliability", "test_gaps", "test_executors", "test_explore", "test_jobs", "test_live", "test_freeze",
        "test_untrusted", "test_experiment_commands", "test_experiment_report", "test_live_charts", "test_syncing",
        "test_whose", "test_watching", "test_examples", "test_portable", "test_callbacks", "test_sharded", "test_wheel")


def pytest_collection_modifyitems(items):
    "Files that take minutes begin first, so that two processes end together."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def dies_after(monkeypatch):
    "Blocks in which the engine dies like a killed process after some steps."
    from copd_nb.engine import phase as phase_module

    @contextmanager
    def block(steps: int):
        real, count = phase_module.train_step, iter(range(steps))

        def dying(*args):
            if next(count, None) is None: raise KeyboardInterrupt
            return real(*args)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(phase_module, "train_step", dying)
            yield
    return block


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The documentation site, built once for all processes; a broken link or a file from the network ends the build."
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "docs"
    with FileLock(f"{folder}.lock"):
        if not (built := folder.with_suffix(".built")).exists():
            command = [sys.executable, Path(__file__).parents[1] / "docs" / "build.py", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            built.touch()
    return folder / "site"


@pytest.fixture(scope="module")
def one_thread():
    "Workers of a cluster have one thread; sums in another order would be other numbers."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

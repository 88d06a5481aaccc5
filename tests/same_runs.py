"Two small capabilities, a small configuration, and the comparison of two runs, for tests of executors."
import pandas as pd

from copd_nb.engine.config import Config
from copd_nb.policy.core import weights_hash

TINY = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=10, probe_every=20, eval_every=20,
              probe_prompts=2, eval_prompts=2, eval_samples=1,
              learning_rate=1e-4, warmup=2, checkpoint_every=20, device="cpu")
PAIR = ["text", "image"]


def events(run) -> pd.DataFrame:
    rows = run.events
    rows = rows[rows.kind != "restart"].drop(columns="seconds").dropna(axis=1, how="all").reset_index(drop=True)
    return rows[sorted(rows.columns)]


def same(a, b):
    "Two runs have the same events and the same weights, bit for bit."
    pd.testing.assert_frame_equal(events(a), events(b), check_exact=True)
    assert {p.name for p in (a.path / "branches").iterdir()} == {p.name for p in (b.path / "branches").iterdir()}
    for name in (path.name for path in (a.path / "branches").iterdir()):
        assert weights_hash(a.branch(name)) == weights_hash(b.branch(name))
    assert weights_hash(a.result) == weights_hash(b.result)

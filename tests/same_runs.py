"Two small capabilities, a small configuration, and the comparison of two runs, for tests of executors."
from dataclasses import replace
from functools import cache

import pandas as pd

from copd_nb.engine.config import Config
from copd_nb.policy.core import Policy, weights_hash
from copd_nb.policy.toys import minis, tiny_policy

TINY = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=10, probe_every=20, eval_every=20,
              probe_prompts=2, eval_prompts=2, eval_samples=1,
              learning_rate=1e-4, warmup=2, checkpoint_every=20, device="cpu")
PAIR = ["text", "image"]


def by_letters(completions, examples):
    "A reward that differs between the completions of any model; what is paid has nothing to do with what is asked."
    return [(1 + (sum(map(ord, c)) + len(e.prompt)) % 7) / 7 for c, e in zip(completions, examples)]


@cache
def small_suite():
    "Prompts of text and of pictures, paid by letters."
    return {n: replace(c, reward=by_letters) for n, c in minis(tuple(PAIR)).items()}


def small_base(**sizes) -> Policy:
    "A random model of two layers that ends half of its completions early."
    made = tiny_policy(**dict(layers=2, vision_depth=2) | sizes)
    made.model.generation_config.eos_token_id = [made.tokenizer.eos_token_id, *range(20, 50)]
    return Policy(made.model, made.processor, "base")


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

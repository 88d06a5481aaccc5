"Scores over temperature: the same draws as the usual evaluation, any batch, and refusals."
import pandas as pd
import pytest

from copd_nb.engine.evaluation import evaluate
from copd_nb.engine.temperatures import evaluate_at, temperature_file
from copd_nb.policy.toys import minis, minis_base


@pytest.fixture(scope="module")
def parts(): return minis(), minis_base()


def test_every_temperature_is_that_of_evaluate(parts):
    suite, base = parts
    rows = evaluate_at(base, suite, (1.3, 0.5), prompts=12, samples=3)
    assert list(rows.temperature.unique()) == [0.5, 1.3] and "greedy" not in rows
    for heat, own in rows.groupby("temperature"):
        usual = evaluate(base, suite, 12, 3, temperature=heat).drop(columns="greedy")
        own = own.drop(columns="temperature").sort_values(["capability", "example"], ignore_index=True)
        usual = usual.sort_values(["capability", "example"], ignore_index=True)
        pd.testing.assert_frame_equal(own, usual, check_exact=False, rtol=1e-4, atol=1e-5)


def test_a_prefill_serves_all_temperatures_of_each_batch(parts):
    suite, base = {"text": parts[0]["text"]}, parts[1]
    one = evaluate_at(base, suite, (0.5,), prompts=10, samples=1, batch=4)
    two = evaluate_at(base, suite, (0.25, 0.5), prompts=10, samples=1, batch=4)
    assert two[two.temperature == 0.5].sampled.tolist() == one.sampled.tolist() and len(one) == 10


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan")])
def test_only_temperatures_above_zero(parts, wrong):
    with pytest.raises(ValueError, match="needs a number above 0"): evaluate_at(parts[1], parts[0], (0.5, wrong))


def test_files_are_named_by_what_was_asked(parts):
    asked = [(64, 4, 16, 0.5), (64, 4, 16, 0.25), (64, 2, 16, 0.5), (64, 4, 8, 0.5), (None, 4, 16, 0.5)]
    assert len({temperature_file("run", parts[0]["text"], *a) for a in asked}) == len(asked)

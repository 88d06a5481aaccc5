"pass@k by enumeration, determinism, common random numbers, and the table's columns."
import itertools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.capability import Capability
from copd_nb.engine.evaluation import evaluate, pass_at_k, summary
from copd_nb.policy.toys import minis_base, image, text, video
from copd_nb.data.rewards import Exact
from copd_nb.signals.rollouts import Request, generator
from copd_nb.signals.sampling import sample, sample_many

SUITE = dict(text=text(24), image=image(8, 24), video=video(8, 24))
COLUMNS = ["capability", "example", "greedy", "sampled", "correct", "samples", "entropy", "length"]


@pytest.fixture(scope="module")
def shipped(): return minis_base()


@pytest.fixture(scope="module")
def rows(shipped): return evaluate(shipped, SUITE, samples=3, max_new_tokens=12)


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_enumeration(nck):
    n, c, k = nck
    picks = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, picks)) / len(picks), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"): pass_at_k(n, c, k)


def test_columns_and_rows(rows):
    assert list(rows.columns) == COLUMNS and len(rows) == 72
    for name, capability in SUITE.items():
        assert rows[rows.capability == name].example.tolist() == [e.id for e in capability.test]
    assert set(rows.greedy) <= {0.0, 1.0} and (rows.samples == 3).all()
    assert (rows.sampled * 3 - rows.correct).abs().max() < 1e-9
    assert 0 < rows.greedy.mean() < 1 and 0 < rows.sampled.mean() < 1


def test_evaluate_is_deterministic_and_leaves_the_global_stream_alone(shipped, rows):
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    again = evaluate(shipped, list(SUITE.values()), samples=3, max_new_tokens=12)
    assert torch.equal(state, torch.random.get_rng_state())
    pd.testing.assert_frame_equal(again, rows)


def test_another_seed_draws_others_and_leaves_the_greedy_scores(shipped, rows):
    other = evaluate(shipped, SUITE, samples=3, max_new_tokens=12, seed=1)
    assert (other.greedy == rows.greedy).all() and (other.correct != rows.correct).any()


def test_a_capability_is_judged_the_same_alone(shipped, rows):
    alone = evaluate(shipped, [SUITE["image"]], samples=3, max_new_tokens=12)
    pd.testing.assert_frame_equal(alone, rows[rows.capability == "image"].reset_index(drop=True))


@pytest.mark.parametrize("batch", [1, 7, 24])
def test_batch_size_does_not_change_greedy_scores(batch, shipped, rows):
    out = evaluate(shipped, SUITE, samples=0, max_new_tokens=12, batch=batch)
    assert out.greedy.tolist() == rows.greedy.tolist() and out.sampled.isna().all() and (out.correct == 0).all()


def test_greedy_scores_are_those_of_greedy_decoding(shipped, rows):
    test = SUITE["video"].test
    texts = sample(shipped, shipped.encode(test), 1, 12, greedy=True).texts
    assert rows[rows.capability == "video"].greedy.tolist() == Exact()(texts, test)


def test_unfinished_completions_count_as_wrong(shipped):
    assert (evaluate(shipped, SUITE, samples=1, max_new_tokens=1)[["greedy", "sampled"]] == 0).all(axis=None)


def test_the_first_prompts_and_partial_scores(shipped):
    half = Capability("half", SUITE["text"].train, SUITE["text"].test, lambda completions,
                      examples: [.5] * len(completions))
    out = evaluate(shipped, [half], prompts=5, samples=2, max_new_tokens=12)
    assert out.example.tolist() == [e.id for e in half.test[:5]] and set(out.greedy) <= {0, .5}
    assert (out.correct == 0).all()


def test_gradients_are_off(shipped):
    class Watched(Exact):
        def __call__(self, completions, examples):
            assert not torch.is_grad_enabled()
            return super().__call__(completions, examples)
    evaluate(shipped, [Capability("w", SUITE["text"].train, SUITE["text"].test, Watched())], prompts=2, samples=1,
             max_new_tokens=2)


def test_summary():
    rows = pd.DataFrame(dict(capability=["b", "b", "a"], example=["1", "2", "3"], greedy=[1.0, 0, 1], sampled=[.5, 0,
                                                                                                               1.0],
                             correct=[2, 0, 4], samples=[4] * 3))
    table = summary(rows, k=2)
    assert list(table.index) == ["b", "a", "mean"] and list(table.columns) == ["greedy", "sampled", "pass@2"]
    assert table.loc["b"].tolist() == pytest.approx([.5, .25, (1 - 1 / 6) / 2]) and table.loc["a"].tolist() == [1, 1, 1]
    assert table.loc["mean"].tolist() == pytest.approx([.75, .625, (5 / 12 + 1) / 2])  # capabilities weigh the same
    assert list(summary(rows).columns) == ["greedy", "sampled"]


def test_two_capabilities_of_one_name_are_refused(shipped):
    with pytest.raises(ValueError, match="twice"): evaluate(shipped, [SUITE["text"], SUITE["text"]])


def test_greedy_only_has_no_sampled_numbers(shipped):
    out = evaluate(shipped, [SUITE["text"]], prompts=2, samples=0, max_new_tokens=2)
    assert all(math.isnan(x) for x in out.sampled) and list(out.columns) == COLUMNS


def test_entropy_and_length_are_those_of_the_sampled_completions(shipped):
    asked = SUITE["text"].test[:3]
    found = evaluate(shipped, [SUITE["text"]], prompts=3, samples=2, max_new_tokens=6, temperature=0.7)
    key = generator(shipped.device, 0, "evaluate", "text", 0)
    [out] = sample_many(shipped, [Request(shipped.encode(asked), 3, key, greedy=1)], 6, 0.7)
    for i, row in enumerate(found.itertuples()):
        tokens = [(out.logp[k, t].item()) for k in (3 * i + 1, 3 * i + 2) for t in range(int(out.lengths[k]))]
        assert row.entropy == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5) and row.length == len(tokens) / 2
    greedy = evaluate(shipped, [SUITE["text"]], prompts=2, samples=0, max_new_tokens=2)
    assert greedy.entropy.isna().all() and greedy.length.isna().all()

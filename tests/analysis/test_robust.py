"""Interquartile means, probability of improvement and the table of all pairs of copd_nb.robust."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from copd_nb.analysis.robust import (
    comparison_sentence, comparison_sentences, comparisons, family_sentence, improvement_interval,
    interquartile_mean, iqm_interval, probability_of_improvement, robust_coverage, robust_table, seed_means,
    synthetic_runs)


def runs(seeds=5, k=2, key=0): return 0.5 + 0.02 * np.random.default_rng(key).standard_normal((seeds, k))


def test_interquartile_mean_agrees_with_scipy_and_by_hand():
    assert interquartile_mean([0, 1, 2, 100]) == 1.5 and interquartile_mean([[3.0]]) == 3
    x = runs(7, 3)
    assert interquartile_mean(x) == pytest.approx(stats.trim_mean(x.ravel(), 0.25))
    with pytest.raises(ValueError, match="at least one"): interquartile_mean([])


def test_iqm_interval_is_seeded_and_says_nothing_about_one_seed():
    x = runs(9)
    i = iqm_interval(x)
    assert i == iqm_interval(x) != iqm_interval(x, seed=1) and i.low < i.mean < i.high
    assert (i.seeds, i.examples) == (9, 0)
    one = iqm_interval(x[:1])
    assert one.mean == pytest.approx(x[0].mean()) and np.isnan([one.low, one.high]).all()


def test_iqm_of_equal_runs_has_no_width_and_joint_seeds_keep_correlation():
    assert iqm_interval(np.tile([0.4, 0.6], (4, 1))).width == 0
    lucky = np.repeat(runs(5, 1), 2, 1)  # a seed is equally lucky on both capabilities
    assert iqm_interval(lucky, joint=True).width > 1.2 * iqm_interval(lucky, joint=False).width


@pytest.mark.parametrize("kind, seeds, correlation, joint", [("iqm", 3, 0.0, True), ("iqm", 5, 0.7, True),
                                                             ("iqm", 10, 0.0, False), ("iqm", 3, 0.0, False),
                                                             ("improvement", 5, 0.0, False),
                                                             ("improvement", 10, 0.0, False),
                                                             ("improvement", 5, 0.7, True)])
def test_coverage(kind, seeds, correlation, joint):
    held = robust_coverage(kind, seeds, 3, correlation, joint, repeats=600, key=3)
    assert held > 0.92  # nominal 0.95, noise of 600 repetitions ± 0.018
    assert held < 0.98 or kind == "improvement" and joint


def test_plain_bootstrap_would_fail_the_coverage_check(monkeypatch):
    monkeypatch.setattr("copd_nb.analysis.robust._stretch", lambda *_: 1.0)
    assert robust_coverage("iqm", 3, 3, repeats=300) < 0.9


def test_correlated_capabilities_as_if_independent_would_fail_the_coverage_check():
    assert robust_coverage("iqm", 5, 6, 0.7, joint=False, repeats=300) < 0.9


def test_probability_of_improvement_counts_pairs():
    a, b = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]])
    by_hand = np.mean([[np.mean([(x > y) + 0.5 * (x == y) for x in a[:, k] for y in b[:, k]])] for k in range(2)])
    assert probability_of_improvement(a, b) == pytest.approx(by_hand)
    assert probability_of_improvement(a, b) + probability_of_improvement(b, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="capabilities differ"): probability_of_improvement(a, b[:, :1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_score_interval_holds_the_estimate_mirrors_and_stays_in_bounds(m, n, k, key):
    rng = np.random.default_rng(key)
    a, b = rng.integers(0, 4, (m, k)) / 4, rng.integers(0, 4, (n, k)) / 4
    i, j = improvement_interval(a, b), improvement_interval(b, a)
    assert 0 <= i.low <= i.mean <= i.high <= 1 and i.width > 0
    assert (i.low, i.high) == pytest.approx((1 - j.high, 1 - j.low), abs=1e-6)
    assert improvement_interval(a, b, joint=False).width <= i.width + 1e-9


def test_score_interval_solves_its_equation():
    i = improvement_interval(runs(4, 1), runs(6, 1, key=1))
    def spread(t): return t * (1 - t) * (1 + 4 * ((1 - t) / (2 - t) + t / (1 + t))) / 24
    for end in (i.low, i.high):
        assert abs(i.mean - end) == pytest.approx(stats.norm.ppf(0.975) * spread(end) ** 0.5, abs=1e-6)


def test_comparisons_agree_with_scipy_and_holm_by_hand():
    x = {name: runs(6, 2, key) + shift for key, (name, shift) in enumerate(dict(a=0.05, b=0.01, c=0.0).items())}
    table = comparisons(x)
    assert list(zip(table.a, table.b)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in table.itertuples():
        found = stats.ttest_rel(x[row.a].mean(1), x[row.b].mean(1))
        assert (row.t, row.p) == pytest.approx((found.statistic, found.pvalue))
        assert row.difference == pytest.approx((x[row.a] - x[row.b]).mean())
    p = np.sort(table.p)
    assert np.sort(table.p_holm) == pytest.approx(np.minimum(1, np.maximum.accumulate(p * [3, 2, 1])))
    assert list(comparisons(x, "c").a) == ["a", "b"] and (comparisons(x, "c").b == "c").all()


def test_comparisons_of_one_seed_and_of_nothing():
    table = comparisons({"a": runs(1), "b": runs(1, key=1)})
    assert table[["t", "p", "p_holm", "d", "mdd"]].isna().all(axis=None) and table.improvement.notna().all()
    assert "one seed can't be tested" in comparison_sentence(next(table.itertuples()))
    assert comparisons({"a": runs()}).empty and comparison_sentences(comparisons({"a": runs()})) == []
    same = comparisons({"a": runs(), "b": runs()}).iloc[0]
    assert (same.p, same.mdd, same.improvement) == (1, 0, 0.5)


def test_sentences_say_no_more_than_the_test():
    rng = np.random.default_rng(0)
    table = comparisons({"a": synthetic_runs(rng, 5, [0.6, 0.6], 0.005),
                         "b": synthetic_runs(rng, 5, [0.5, 0.5], 0.005)})
    up, down = comparison_sentences(table)[0], comparison_sentences(comparisons({"a": -runs() * 0 + 0.3 + runs() / 50,
                                                                                 "b": runs(key=1)}))[0]
    assert up.startswith("a is higher than b: +") and down.startswith("a is lower than b: −")
    none = comparison_sentences(comparisons({"a": runs(3), "b": runs(3, key=4)}))[0]
    assert none.startswith("No difference between a and b detected")
    assert "minimum detectable difference at 80 % power" in none


def test_bad_tables_raise():
    with pytest.raises(ValueError, match="shape"): iqm_interval([0.5, 0.6])
    with pytest.raises(ValueError, match="NaN"): iqm_interval([[0.5, np.nan]])
    with pytest.raises(ValueError, match="shapes differ"): comparisons({"a": runs(3), "b": runs(4)})
    with pytest.raises(ValueError, match="no 'z'"): comparisons({"a": runs()}, "z")


def test_seed_means_and_table():
    scores = {"x": np.array([[1.0, 0.0], [1.0, 1.0]]), "y": np.zeros((2, 5))}
    assert seed_means(scores).tolist() == [[0.5, 0.0], [1.0, 0.0]]
    table = robust_table({"a": runs() - 0.1, "b": runs()}, "a")
    assert list(table.arm) == ["b", "a"] and table.worst[0] == pytest.approx(100 * runs().min())
    assert table.difference[0] == pytest.approx(10) and np.isnan(table.p_holm[1])
    assert "p_holm" not in robust_table({"a": runs()}) and np.isnan(robust_table({"a": runs(1)}).low[0])


def test_sentence_of_a_family():
    assert "one training seed" in family_sentence(comparisons({"a": runs(1), "b": runs(1)}))
    assert "nothing" in family_sentence(comparisons({"a": runs()}))
    said = family_sentence(comparisons({"a": runs() + 0.2 + runs(key=5) / 50, "b": runs(), "c": runs(key=2)}, "b"))
    assert said.startswith("1 of 2 paired comparisons is significant after Holm correction (5 seeds): a above b. ")
    assert "Minimum detectable difference at 80 % power: " in said

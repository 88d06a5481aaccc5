"""Intervals, tests, sentences and curves of copd_nb.stats."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as scipy_stats

from copd_nb.analysis.curves import at_budget, band, common_budget, line_fit
from copd_nb.analysis.intervals import (
    Interval, cluster_intervals, coverage, crossed_bootstrap, macro_difference, macro_interval, paired_difference,
    small_sample_factor)
from copd_nb.analysis.ratios import ratio_interval
from copd_nb.analysis.tests import effect_size, holm, minimum_detectable_difference, p_text, paired_test, verdict


def scores(seeds=3, examples=200, key=0):
    return (np.random.default_rng(key).random((seeds, examples)) < 0.6).astype(float)


def test_interval_shows_percent_and_contains_its_ends():
    i = Interval(-0.004, -0.0123, 0.015, 3, 100)
    assert str(i) == "−0.4 [−1.2, 1.5]" and i.percent(2) == "−0.40 [−1.23, 1.50]"
    assert i.contains(0.015) and i.contains(-0.0123) and not i.contains(0.0151) and i.width == pytest.approx(0.0273)
    with pytest.raises(AttributeError): i.mean = 0


def test_bootstrap_is_seeded_and_counts_what_it_rests_on():
    table = scores(5, 1024)
    i = crossed_bootstrap(table)
    assert i == crossed_bootstrap(table) != crossed_bootstrap(table, seed=1)
    assert (i.seeds, i.examples, i.level) == (5, 1024, 0.95)
    assert i.mean == pytest.approx(table.mean()) and i.contains(i.mean)
    assert crossed_bootstrap(table, level=0.5).width < i.width


def test_seed_part_matches_the_t_interval_when_examples_do_not_vary():
    means = np.array([0.50, 0.53, 0.49, 0.52, 0.51, 0.54, 0.47, 0.50])
    i = crossed_bootstrap(np.repeat(means[:, None], 50, axis=1), draws=20_000)
    low, high = scipy_stats.t.interval(0.95, 7, means.mean(), scipy_stats.sem(means))
    assert i.low == pytest.approx(low, abs=0.003) and i.high == pytest.approx(high, abs=0.003)


def test_one_seed_matches_the_interval_over_examples():
    table = scores(1, 300)
    i = crossed_bootstrap(table, draws=20_000)
    low, high = scipy_stats.t.interval(0.95, 299, table.mean(), scipy_stats.sem(table[0]))
    assert i.seeds == 1 and i.low == pytest.approx(low, abs=0.005) and i.high == pytest.approx(high, abs=0.005)


def test_small_sample_factor():
    assert small_sample_factor(1) == 0
    assert small_sample_factor(3) == pytest.approx(4.302653 / 1.959964 * 1.5**0.5, rel=1e-5)
    assert small_sample_factor(1000) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("seeds, sds", [
    (3, (0.03, 0.4, 0.3)), (5, (0.03, 0.4, 0.3)), (3, (0.01, 0.1, 0.4)), (5, (0.01, 0.1, 0.4)), (1, (0, 0.4, 0.3)),
])
def test_coverage(seeds, sds):
    assert coverage(seeds, 60, *sds, repeats=500, draws=300, key=5) > 0.92  # nominal 0.95, noise of 500 repeats ± 0.02


def test_plain_bootstrap_would_fail_the_coverage_check(monkeypatch):
    monkeypatch.setattr("copd_nb.analysis.intervals.small_sample_factor", lambda n, level=0.95: 1.0)
    assert coverage(3, 60, 0.1, 0.1, 0.1, repeats=300, draws=200) < 0.9


def test_paired_difference_is_antisymmetric_and_narrower():
    a = scores(3, 400)
    b = np.where(np.random.default_rng(3).random(a.shape) < 0.05, 0.0, a)
    d, e = paired_difference(a, b), paired_difference(b, a)
    assert d.mean == pytest.approx(-e.mean) and d.low == pytest.approx(-e.high, abs=0.005)
    assert d.low > 0 and d.width < crossed_bootstrap(a).width
    same = paired_difference(a, a)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_bad_scores_raise():
    with pytest.raises(ValueError, match="shapes differ"): paired_difference(scores(3), scores(2))
    with pytest.raises(ValueError, match=r"\[0, 1\]"): crossed_bootstrap(scores() * 100)
    with pytest.raises(ValueError, match="NaN"): crossed_bootstrap([[0.5, np.nan]])
    with pytest.raises(ValueError, match="shape"): crossed_bootstrap([0.5, 0.7])
    with pytest.raises(ValueError, match="shape"): crossed_bootstrap([[0.5]])
    with pytest.raises(ValueError, match="level"): crossed_bootstrap(scores(), level=95)
    with pytest.raises(ValueError, match="same seeds"): macro_interval([scores(3), scores(2)])
    with pytest.raises(ValueError, match="capabilities differ"): macro_difference({"a": scores()}, {"b": scores()})
    with pytest.raises(ValueError, match="no capability"): macro_interval({})
    with pytest.raises(ValueError, match="both sides"): macro_difference({"a": scores()}, [scores()])


def test_macro_weighs_capabilities_equally_and_matches_them_by_name():
    a, b = {"x": np.ones((2, 10)), "y": np.zeros((2, 1000))}, {"y": np.zeros((2, 1000)), "x": np.zeros((2, 10))}
    assert macro_interval(a).mean == 0.5 and macro_interval(a).examples == 1010
    assert macro_difference(a, b).mean == 0.5
    assert macro_interval(list(a.values())) == macro_interval(a)


def test_macro_resamples_seeds_jointly():
    good, bad = np.repeat([[0.6], [0.5], [0.4]], 50, 1), np.repeat([[0.4], [0.5], [0.6]], 50, 1)
    assert macro_interval([good, bad]).width == pytest.approx(0, abs=1e-9)  # seed effects cancel within a seed
    assert macro_interval([good, good]).width > 0.2


def test_paired_test_agrees_with_scipy():
    a, b = np.random.default_rng(0).normal(0.5, 0.1, (2, 6))
    ours, theirs = paired_test(a, b), scipy_stats.ttest_rel(a, b)
    assert ours.t == pytest.approx(theirs.statistic) and ours.p == pytest.approx(theirs.pvalue) and ours.seeds == 6
    assert ours.d == pytest.approx((a - b).mean() / (a - b).std(ddof=1)) == effect_size(a, b)
    assert paired_test([0.5, 0.5], [0.5, 0.5]).p == 1
    assert effect_size([1.0, 2.0], [0.0, 1.0]) == np.inf and paired_test([1.0, 2.0], [0.0, 1.0]).p == 0
    with pytest.raises(ValueError, match="≥ 2 seeds"): paired_test([1.0], [2.0])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([0.02]).tolist() == [0.02]
    with pytest.raises(ValueError, match="p values"): holm([0.5, np.nan])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p):
    p, adjusted = np.array(p), holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(p * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("p,text", [
    (1.0, "1"), (0.0341, "0.034"), (0.001, "0.001"), (0.00099, "< 0.001"), (0.0, "< 0.001"), (np.nan, "–")])
def test_p_values_are_never_shown_as_zero(p, text): assert p_text(p) == text


def test_minimum_detectable_difference_has_the_power_it_promises():
    size = minimum_detectable_difference(2.0, 4)
    draws = np.random.default_rng(0).normal(size, 2.0, (20_000, 4))
    assert (scipy_stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)
    assert minimum_detectable_difference(1, 3) > minimum_detectable_difference(1, 5)
    for bad in [dict(sd=0, seeds=3), dict(sd=1, seeds=1), dict(sd=1, seeds=3, power=1)]:
        with pytest.raises(ValueError): minimum_detectable_difference(**bad)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_power_agrees_with_the_noncentral_t(seeds):
    from copd_nb.analysis.tests import _power
    critical, center = scipy_stats.t.ppf(0.975, seeds - 1), 1.2 * seeds**0.5
    exact = scipy_stats.nct.sf(critical, seeds - 1, center) + scipy_stats.nct.cdf(-critical, seeds - 1, center)
    assert _power(1.2, 1.0, seeds, 0.95) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("ends, said", [
    ((0.012, 0.003, 0.021), "CoPD is higher than mixed by 1.2 points [0.3, 2.1]."),
    ((-0.012, -0.021, -0.003), "CoPD is lower than mixed by 1.2 points [0.3, 2.1]."),
    ((0.003, -0.009, 0.015),
     "No difference between CoPD and mixed detected at this budget (0.3 points [−0.9, 1.5])."),
    ((0.0, 0.0, 0.0), "No difference between CoPD and mixed detected at this budget (0.0 points [0.0, 0.0])."),
    ((0.01, 0.0, 0.02), "No difference between CoPD and mixed detected at this budget (1.0 points [0.0, 2.0])."),
])
def test_verdict(ends, said):
    assert verdict(Interval(*ends, 3, 100), "CoPD", "mixed") == said
    alone = verdict(Interval(*ends, 1, 100), "CoPD", "mixed")
    assert alone.startswith(said) and alone.endswith("examples only, not training seeds.")


def test_verdict_in_another_unit_is_not_scaled():
    assert "2.0 nats [1.0, 3.0]" in verdict(Interval(2, 1, 3, 3, 100), "a", "b", unit="nats")


def test_at_budget_interpolates_and_never_extrapolates():
    curve = pd.DataFrame({"tokens": [30, 10, 20], "accuracy": [0.5, 0.3, np.nan]})
    assert at_budget(curve, 20, "tokens") == pytest.approx(0.4) and at_budget(curve, 30, "tokens") == 0.5
    assert np.isnan(at_budget(curve, 9.9, "tokens")) and np.isnan(at_budget(curve, 30.1, "tokens"))
    assert np.isnan(at_budget(curve.assign(accuracy=np.nan), 20, "tokens"))
    with pytest.raises(ValueError, match="flops"): at_budget(curve, 1, "flops")
    with pytest.raises(ValueError, match="repeats"): at_budget(pd.concat([curve, curve]), 20, "tokens")


def test_common_budget():
    assert common_budget([pd.DataFrame({"t": [1, 9]}), pd.DataFrame({"t": [5, 2]})], "t") == 5
    with pytest.raises(ValueError, match="no curve"): common_budget([], "t")


def test_band():
    df = pd.DataFrame({"t": [0, 2, 4, 0, 4], "y": [0, 2, 4, 2, 6], "seed": [0, 0, 0, 1, 1]})
    out = band(df, "t", "y")
    assert out["t"].tolist() == [0, 2, 4] and out["mean"].tolist() == [1, 3, 5]
    assert out["min"].tolist() == [0, 2, 4] and out["max"].tolist() == [2, 4, 6]
    assert (out["high"] - out["mean"]).iloc[0] == pytest.approx(scipy_stats.t.ppf(0.975, 1))
    alone = band(df[df.seed == 0], "t", "y")
    assert alone["low"].isna().all() and (alone["units"] == 1).all()
    assert band(pd.concat([df, pd.DataFrame({"t": [8], "y": [9], "seed": [0]})]), "t", "y")["t"].max() == 4
    with pytest.raises(ValueError, match="seed"): band(df.drop(columns="seed"), "t", "y")


def test_line_fit_agrees_with_scipy_and_a_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 2 * x + rng.normal(size=12)
    line, found = line_fit(x, y), scipy_stats.linregress(x, y)
    assert (line.slope, line.intercept, line.r) == pytest.approx((found.slope, found.intercept, found.rvalue))
    at, low, high = line.at(np.array([0.0]))  # the band at 0 is the interval of the intercept
    assert at[0] == pytest.approx(found.intercept)
    assert (high - low)[0] / 2 == pytest.approx(scipy_stats.t.ppf(0.975, 10) * found.intercept_stderr)
    interval = scipy_stats.pearsonr(x, y).confidence_interval()
    assert (line.r_low, line.r_high) == pytest.approx((interval.low, interval.high))


def test_line_fit_of_few_or_bad_points():
    assert line_fit([0, 1], [0, 1]).slope == 1 and np.isnan(line_fit([0, 1], [0, 1]).at(np.array([0.5]))[1]).all()
    assert np.isnan(line_fit([0, 1, 2], [0, 1, 3]).r_low) and line_fit([0, 1, np.nan, 2], [0, 1, 5, 2]).points == 3
    for x in ([], [1], [1, 1, 1], [np.nan, 1]):
        with pytest.raises(ValueError, match="two different x"): line_fit(x, [1.0] * len(x))
    with pytest.raises(ValueError): line_fit([1, 2], [1])


def test_line_fit_band_covers():
    "The band holds the true line in about 95 % of repetitions."
    rng, x = np.random.default_rng(1), np.linspace(0, 1, 8)
    inside = 0
    for _ in range(400):
        _, low, high = line_fit(x, 1 + 2 * x + rng.normal(0, 0.5, 8)).at(np.array([0.3]))
        inside += low[0] <= 1.6 <= high[0]
    assert 0.92 <= inside / 400 <= 0.98


def test_ratio_of_tables_is_the_quotient_of_means_with_fieller_ends():
    rng = np.random.default_rng(0)
    bottom = (rng.random((4, 500)) < 0.5).astype(float)
    top = bottom * (rng.random((4, 500)) < 0.4)
    r = ratio_interval(top, bottom)
    assert r.value == pytest.approx(top.mean() / bottom.mean()) and r.low < r.value < r.high
    assert (r.seeds, r.examples, r.reason) == (4, 500, "")
    assert r == ratio_interval(top, bottom) and str(r) == f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
    both = ratio_interval([top, top[:, :100]], [bottom, bottom[:, :100]])
    assert both.value == pytest.approx((top.mean() + top[:, :100].mean()) / (bottom.mean() + bottom[:, :100].mean()))
    assert both.examples == 600


def test_ratio_of_seed_means_equals_fieller_by_hand():
    top, bottom = np.array([0.06, 0.07, 0.05, 0.08]), np.array([0.12, 0.10, 0.13, 0.11])
    r = ratio_interval(top, bottom)
    q = scipy_stats.t.ppf(0.975, 3)
    grid = np.linspace(-1, 3, 400_001)  # an interval is the set of quotients that the t test does not refuse
    d = top[:, None] - grid * bottom[:, None]
    kept = grid[np.abs(d.mean(0)) <= q * d.std(0, ddof=1) / 2]
    assert r.low == pytest.approx(kept[0], abs=2e-5) and r.high == pytest.approx(kept[-1], abs=2e-5)


def test_ratio_is_undefined_where_the_denominator_may_be_zero():
    rng = np.random.default_rng(1)
    noise = rng.choice([-1.0, 0.0, 1.0], (3, 300))
    for r in (ratio_interval(noise, noise - noise.mean()), ratio_interval(np.array([0.1, 0.2]), np.array([0.1, -0.1])),
              ratio_interval(np.ones((2, 5)), np.zeros((2, 5)))):
        assert r.value is r.low is r.high is None and "holds 0" in r.reason and str(r).startswith("undefined: ")
    assert "one seed mean" in ratio_interval(np.array([0.1]), np.array([0.2])).reason
    assert ratio_interval(np.full((2, 5), 0.2), np.full((2, 5), 0.4)).value == pytest.approx(0.5)  # no spread at all
    with pytest.raises(ValueError, match="shapes differ"): ratio_interval(np.ones((2, 5)), np.ones((2, 6)))
    with pytest.raises(ValueError, match="NaN"): ratio_interval(np.array([0.1, np.nan]), np.ones(2))


def test_ratio_interval_covers():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        bottom = 0.3 + 0.02 * rng.standard_normal((3, 1)) + 0.5 * rng.standard_normal(200)
        hits += (r := ratio_interval(0.6 * bottom + 0.02 * rng.standard_normal((3, 1)), bottom,
                                     draws=400)).low <= 0.6 <= r.high
    assert hits >= 180


def test_cluster_interval_of_one_value_each_is_the_examples_interval():
    table = scores(1, 300)
    i = crossed_bootstrap(table)
    assert np.allclose(cluster_intervals(table.T, np.ones((300, 1)))[:, 0], (i.mean, i.low, i.high), atol=1e-12)


def test_cluster_intervals_weigh_by_counts_and_take_all_columns_with_the_same_draws():
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 20, (80, 1))
    totals = counts * rng.normal(5, 1, (80, 1))
    found = cluster_intervals(np.hstack([totals, 2 * totals]), np.hstack([counts, counts]))
    assert found[0, 0] == pytest.approx(totals.sum() / counts.sum()) and np.allclose(found[:, 1], 2 * found[:, 0])
    draws = [(w := rng.multinomial(80, np.full(80, 1 / 80))) @ totals[:, 0] / (w @ counts[:, 0]) for _ in range(4000)]
    assert np.allclose(found[1:, 0], np.quantile(draws, [0.025, 0.975]), atol=0.03)


def test_cluster_intervals_say_nothing_about_nothing():
    one = cluster_intervals([[6.0, 0.0, 1.0], [0.0, 0.0, 2.0]], [[3, 0, 1], [0, 0, 1]])
    assert one[0, 0] == 2 and np.isnan(one[1:, 0]).all() and np.isnan(one[:, 1]).all() and np.isfinite(one[:, 2]).all()

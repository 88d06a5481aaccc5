"Random effects over cells: published values, coverage, and what is refused."
import numpy as np
import pytest
from scipy import stats

from copd_nb.analysis.over_cells import (
    best_shares, by_suite, cells_table, lead_over_cells, moderated, over_cells, spread_over_cells)

# BCG trials (Colditz and others 1994): log risk ratios and their variances, as in Viechtbauer (2010), table 1
BCG = [(4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619), (33, 5036, 47, 5761),
       (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892), (29, 7470, 45, 7232), (17, 1699, 65, 1600),
       (186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825)]


def _log_ratios():
    values = [np.log(a / (a + b)) - np.log(c / (c + d)) for a, b, c, d in BCG]
    return values, [1 / a - 1 / (a + b) + 1 / c - 1 / (c + d) for a, b, c, d in BCG]


def test_bcg_trials_have_the_published_values():
    found = over_cells(*_log_ratios())
    assert found.mean == pytest.approx(-0.7150, abs=5e-4)  # metafor, method "PM"
    assert found.between ** 2 == pytest.approx(0.3181, abs=5e-4)
    assert found.differ == pytest.approx(stats.chi2.sf(152.2330, 12), rel=1e-3)  # Q, there


def test_equal_variances_give_the_t_interval():
    "With one variance everywhere all weights are equal, and Hartung's and Knapp's interval is the t interval."
    values = [1.0, 2.5, -0.3, 4.0, 1.1]
    found = over_cells(values, [0.01] * 5)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


@pytest.mark.parametrize("between, loose", [(0.0, 0.0), (2.0, 0.0), (0.0, 0.7), (1.0, 0.7)])
def test_intervals_cover(between, loose):
    "Ten cells of five seeds, alike or with spreads of their own (log-normal)."
    rng, inside, new = np.random.default_rng(1), 0, 0
    for _ in range(400):
        truth, spread = rng.normal(1.0, between, 10), 2 * np.exp(rng.normal(0, loose, 10))
        runs = truth[:, None] + rng.normal(0, 1, (10, 5)) * spread[:, None]
        found = lead_over_cells({i: dict(a=x, b=np.zeros(5)) for i, x in enumerate(runs)}, "a", "b")
        inside += found.low <= 1.0 <= found.high
        new += found.new_low <= rng.normal(1.0, between) <= found.new_high
    assert 0.92 <= inside / 400 <= 0.985
    assert new / 400 >= 0.91


def test_weights_from_few_seeds_need_moderation():
    "Cells alike, weighted by what five seeds say of each: the interval holds the truth less often than it claims."
    rng, raw, moderate = np.random.default_rng(1), 0, 0
    for _ in range(400):
        runs = rng.normal(1.0, 2.0, (10, 5))
        low, high = (getattr(over_cells(runs.mean(1), runs.var(1, ddof=1) / 5), end) for end in ("low", "high"))
        found = lead_over_cells({i: dict(a=x, b=np.zeros(5)) for i, x in enumerate(runs)}, "a", "b")
        raw, moderate = raw + (low <= 1 <= high), moderate + (found.low <= 1 <= found.high)
    assert raw / 400 < 0.92 < moderate / 400


def test_moderated_variances():
    "Alike ones become one; ones that differ by orders of magnitude stay; Smyth's numbers come back."
    rng = np.random.default_rng(3)
    alike = moderated(4 * rng.chisquare(4, 50) / 4, 4)
    assert np.ptp(np.log(alike)) < 0.5 and 3 < alike.mean() < 5
    apart = np.array([1e-6, 1.0, 1e6])
    assert np.allclose(np.log(moderated(apart, 50)), np.log(apart), atol=0.1)
    true = 2.0 * 8 / rng.chisquare(8, 20_000)
    seen = true * rng.chisquare(4, 20_000) / 4
    half = np.polyfit(seen, moderated(seen, 4), 1)
    assert half[0] == pytest.approx(4 / 12, abs=0.02) and half[1] == pytest.approx(2.0 * 8 / 12, abs=0.06)


def test_variances_of_fewer_seeds_are_moderated_more():
    rng = np.random.default_rng(3)
    s = np.exp(rng.normal(0, 0.7, 40)) * rng.chisquare(4, 40) / 4
    assert np.allclose(moderated(s, np.full(40, 4)), moderated(s, 4))
    s[:2] = 8.0
    few, many = moderated(s, [2, 20, *[4] * 38])[:2]
    assert few < many < 8


def test_spreads_are_told_apart_and_a_collapse_shows():
    rng = np.random.default_rng(2)
    scores = {i: dict(a=rng.normal(80, 1, 5), b=rng.normal(80, 1, 5)) for i in range(20)}
    assert spread_over_cells(scores, "a", "b").low < 1 < spread_over_cells(scores, "a", "b").high
    for i in range(0, 20, 2): scores[i]["a"][0] = 20.0
    found = cells_table(scores, "b")
    assert found.spread_low[0] > 1.5 and found.worst[0] < -55


def test_equal_runs_are_not_known_exactly():
    scores = {"one": dict(a=[50.0, 51.0], b=[49.0, 50.0]), "two": dict(a=[60.0, 61.0], b=[60.0, 61.0])}
    found = lead_over_cells(scores, "a", "b")
    assert found.low < 0 < found.high and np.isfinite(found.p)


def test_one_and_two_cells():
    alone = over_cells([2.0], [0.25])
    assert (alone.low, alone.high) == pytest.approx((2 - 1.96 * 0.5, 2 + 1.96 * 0.5), abs=1e-3)
    assert np.isnan(alone.new_low) and "new cell" not in str(alone)
    assert np.isnan(over_cells([2.0, 1.0], [0.25, 0.25]).new_high)


@pytest.mark.parametrize("values, variances", [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([np.nan], [1.0])])
def test_bad_values_are_refused(values, variances):
    with pytest.raises(ValueError, match="variances|positive"): over_cells(values, variances)


def test_cells_need_the_same_seeds():
    with pytest.raises(ValueError, match="cell 'x': a, b need the same two or more seeds"):
        lead_over_cells({"x": dict(a=[1.0, 2.0], b=[1.0])}, "a", "b")
    with pytest.raises(ValueError, match="no cell has a and c"):
        lead_over_cells({"x": dict(a=[1.0, 2.0], b=[1.0, 2.0])}, "a", "c")


def test_few_cells_have_no_shorter_interval_than_their_seeds_give():
    one = over_cells([2.0], [0.2], freedom=4)
    assert one.high - one.mean == pytest.approx(stats.t.ppf(0.975, 4) * 0.2 ** 0.5)
    alike = over_cells([3.0, 3.1, 2.9], [1.25] * 3)
    assert alike.high - alike.mean == pytest.approx(stats.t.ppf(0.975, 2) * (1.25 / 3) ** 0.5)
    scores = dict(x=dict(a=[80.0, 82.0, 81.0], b=[79.0, 79.0, 82.0]))
    found, expected = lead_over_cells(scores, "a", "b"), stats.ttest_1samp([1.0, 3.0, -1.0], 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_equal_cells_seldom_seem_to_differ():
    rng, found = np.random.default_rng(4), 0
    for _ in range(400): found += over_cells(rng.normal(1, 0.5, 8), [0.25] * 8).differ < 0.05
    assert 0.02 < found / 400 < 0.09 and np.isnan(over_cells([1.0], [0.25]).differ)


def test_cells_of_one_suite_are_too_sure_together_and_right_as_one():
    "Fourteen cells of eight suites that share two thirds of the variance between cells; no lead at all."
    rng, alone, together = np.random.default_rng(5), 0, 0
    suites = [0] * 4 + [1] * 3 + [2] * 2 + [3, 4, 5, 6, 7]
    for _ in range(500):
        shared = rng.normal(0, 1.5 * (2 / 3) ** 0.5, 8)
        scores = {f"{i}": dict(a=shared[g] + rng.normal(0, 1.5 / 3 ** 0.5) + rng.normal(0, 2.5, 5), b=np.zeros(5))
                  for i, g in enumerate(suites)}
        alone += lead_over_cells(scores, "a", "b").p < 0.05
        made = by_suite(scores, {f"{i}": f"{g}" for i, g in enumerate(suites)})
        together += lead_over_cells(made, "a", "b").p < 0.05
    assert alone / 500 > 0.08 > 0.075 > together / 500


def test_suites_are_means_of_their_cells():
    scores = {"x": dict(a=[1.0, 3.0], b=[0.0, 0.0]), "y": dict(a=[3.0, 3.0]), "z": dict(a=[5.0, 5.0], b=[1.0, 1.0])}
    made = by_suite(scores, dict(x="s", y="s", z="t"))
    assert {k: sorted(v) for k, v in made.items()} == dict(s=["a"], t=["a", "b"]) and made["s"]["a"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="cell 'z' has no suite"): by_suite(scores, dict(x="s", y="s"))


def test_cells_of_a_suite_with_fewer_seeds_have_the_first_in_common():
    scores = {"small": dict(a=[1.0, 2.0, 9.0], b=[0.0, 0.0, 0.0]), "large": dict(a=[3.0, 4.0], b=[1.0, 1.0])}
    found = by_suite(scores, dict.fromkeys(scores, "one"))["one"]
    assert found["a"].tolist() == [2.0, 3.0] and found["b"].tolist() == [0.5, 0.5]


def test_who_is_best_is_as_sure_as_a_t_test():
    "With two paradigms the share is one minus the one-sided p of the paired t test."
    a, b = np.array([71.0, 74.0, 69.5, 73.0, 72.0]), np.array([70.0, 72.5, 70.0, 71.0, 71.5])
    found = best_shares({"x": dict(a=a, b=b)}, draws=100_000).loc["x"]
    assert found.a == pytest.approx(100 * (1 - stats.ttest_rel(a, b, alternative="greater").pvalue), abs=0.5)
    assert best_shares({"x": dict(a=a, b=a.copy())}).loc["x"].tolist() == [50, 50]
    with pytest.raises(ValueError, match="need the same two or more seeds"): best_shares({"x": dict(a=a, b=b[:4])})

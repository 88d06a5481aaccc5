"The typical run: Yuen's interval by hand and against the t interval, and its coverage where runs collapse."
import numpy as np
import pytest
from scipy import stats

from copd_nb.analysis.typical import collapse_coverage, share_interval, typical_interval, typical_p


def test_three_seeds_give_the_t_interval():
    x = np.array([1.0, 2.5, 0.4])
    ends = stats.ttest_1samp(x, 0).confidence_interval()
    assert (typical_interval(x).low, typical_interval(x).high) == pytest.approx((ends.low, ends.high))
    assert typical_p(x, 0.3) == pytest.approx(stats.ttest_1samp(x, 0.3).pvalue)


def test_ten_seeds_by_hand():
    x = np.array([-12, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 9.0])
    kept = np.array([0.6, 0.6, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.1, 1.1])
    error = kept.std(ddof=1) * np.sqrt(9) / np.sqrt(6 * 5)
    found = typical_interval(x[::-1])
    assert found.mean == pytest.approx(x[2:8].mean())
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 5) * error)
    assert typical_p(x) == pytest.approx(2 * stats.t.sf(found.mean / error, 5))


def test_the_trimmed_mean_is_that_of_scipy_for_any_number_of_seeds():
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        x = rng.standard_cauchy(n)
        assert typical_interval(x).mean == pytest.approx(stats.trim_mean(x, 0.2 + 1e-12))


def test_the_interval_and_the_test_agree():
    rng = np.random.default_rng(1)
    for n in (3, 5, 8, 10):
        for x in rng.normal(0.5, 1, (40, n)):
            i = typical_interval(x)
            assert (i.low > 0 or i.high < 0) == (typical_p(x) < 0.05)


def test_edges():
    one = typical_interval([0.3])
    assert one.mean == 0.3 and np.isnan(one.low) and np.isnan(typical_p([0.3]))
    assert typical_p([1.0, 1.0, 1.0]) == 0 and typical_p([1.0, 1.0, 1.0], 1.0) == 1
    for wrong in ([], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="differences hold NaN|one difference for each seed"): typical_p(wrong)
    with pytest.raises(ValueError, match="4 of 3 runs"): share_interval(4, 3)


def test_one_collapsed_run_in_five_leaves_the_typical_run_covered_and_the_mean_not():
    found = collapse_coverage(drops=(0, 10), repeats=1500, methods=("t", "trimmed"))
    found = found.set_index(["method", "drop", "seeds"])
    assert found["median"]["trimmed"].between(0.925, 0.985).all()  # nominal 0.95, at 3, 5 and 10 seeds
    assert found["mean"]["t"][10].max() < 0.91 and found["mean"]["t"][0].min() > 0.93
    assert found["median"]["t"][10, 10] < 0.925 and found["width"]["trimmed"][10, 10] < found["width"]["t"][10, 10] / 2

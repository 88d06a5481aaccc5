"""Regressions within clusters against statsmodels, scipy and first principles"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from copd_nb.analysis.clusters import bootstrap_fit, mixed_fit, robust_fit, slopes_by_cluster

ASKED = ("after", ["before", "distance"])


def synthetic(key, clusters=12, rows=6):
    "The table of the notebook."
    rng = np.random.default_rng(key)
    teacher = np.repeat(np.arange(clusters), rows)
    distance, before = rng.standard_normal((2, clusters * rows))
    level, bend = 5 * rng.standard_normal(clusters), -2.0 + rng.standard_normal(clusters)
    after = 50 + level[teacher] + 3 * before + bend[teacher] * distance + 2 * rng.standard_normal(clusters * rows)
    return pd.DataFrame(dict(teacher=teacher, before=before, distance=distance, after=after))


# statsmodels 0.15.0: mixedlm("after ~ before + distance", groups=teacher).fit(reml=True), and OLS on deviations from
# the means of clusters with cov_type="cluster"; the second table lacks its first seven rows, so clusters differ in size
@pytest.mark.parametrize("key, drop, fixed, errors, sds, within, robust", [
    (0, 0, (47.79555, 2.981317, -2.330557), (1.29978, 0.287451, 0.306681), (4.418582, 2.105592),
     (2.9863249, -2.3599821), (0.24075333, 0.32169643)),
    (3, 7, (49.01707, 2.684156, -1.550662), (1.11741, 0.274811, 0.287702), (3.590895, 2.200975),
     (2.7077071, -1.5822316), (0.17503704, 0.46461045))])
def test_as_statsmodels(key, drop, fixed, errors, sds, within, robust):
    table = synthetic(key)[drop:]
    mixed, found = mixed_fit(table, *ASKED), robust_fit(table, *ASKED)
    assert mixed.effects.value.to_numpy() == pytest.approx(fixed, rel=1e-4)
    assert mixed.effects.error.to_numpy() == pytest.approx(errors, rel=2e-3)
    assert (mixed.between, mixed.residual) == pytest.approx(sds, rel=2e-3)
    assert found.value.to_numpy() == pytest.approx(within, rel=1e-6)
    assert found.error.to_numpy() == pytest.approx(robust, rel=1e-6)


def test_a_cluster_effect_is_an_intercept():
    "Dummies for clusters, and residuals of two regressions, give the same coefficients and correlations."
    table = synthetic(1)
    dummies = pd.get_dummies(table.teacher).to_numpy(float)
    x = np.column_stack([table[["before", "distance"]], dummies])
    b = np.linalg.lstsq(x, table.after, rcond=None)[0][:2]
    found = bootstrap_fit(table, *ASKED, draws=50)
    assert found.value.to_numpy() == pytest.approx(b) == robust_fit(table, *ASKED).value.to_numpy()
    other = np.column_stack([table[["before"]], dummies])
    residuals = [v - other @ np.linalg.lstsq(other, v, rcond=None)[0] for v in (table.after, table.distance)]
    assert found.partial[1] == pytest.approx(stats.pearsonr(*residuals)[0])
    moved = table.assign(after=table.after + 100 * table.teacher)  # whatever distinguishes clusters
    assert robust_fit(moved, *ASKED).low.to_numpy() == pytest.approx(robust_fit(table, *ASKED).low.to_numpy())


def test_a_mixed_model_without_differences_between_clusters_is_least_squares():
    table = synthetic(2)
    rng = np.random.default_rng(0)
    table["after"] = 2 * table.before + rng.permutation(table.groupby("teacher").cumcount() - 2.5)
    table["after"] -= table.after.groupby(table.teacher).transform("mean")
    x = np.column_stack([np.ones(len(table)), table[["before", "distance"]]])
    mixed = mixed_fit(table, *ASKED)
    assert mixed.between == 0
    assert mixed.effects.value.to_numpy() == pytest.approx(np.linalg.lstsq(x, table.after, rcond=None)[0])


def test_the_bootstrap_draws_clusters_not_rows():
    table = synthetic(4)
    twice = pd.concat([table, table])  # the same rows again, in the same clusters, tell nothing new
    one, two = (bootstrap_fit(t, *ASKED) for t in (table, twice))
    pd.testing.assert_frame_equal(one, two)
    wide = one.high - one.low
    new = pd.concat([table, table.assign(teacher=table.teacher + 100)])
    assert (bootstrap_fit(new, *ASKED).eval("high - low") < 0.8 * wide).all()
    assert one.equals(bootstrap_fit(table, *ASKED)) and not one.equals(bootstrap_fit(table, *ASKED, seed=1))
    assert (one.partial.abs() <= 1).all() and (one.partial_low <= one.partial).all()


def test_slopes_of_clusters():
    table = synthetic(5)
    short = pd.concat([table, table[:3].assign(teacher="short")])
    alone = slopes_by_cluster(short, *ASKED)
    assert list(alone.teacher) == list(range(12)) and (alone["rows"] == 6).all()
    line = slopes_by_cluster(table, "after", ["distance"])
    own = table[table.teacher == 3]
    assert line.distance[3] == pytest.approx(stats.linregress(own.distance, own.after).slope)


@pytest.mark.parametrize("of", [robust_fit, mixed_fit, bootstrap_fit])
def test_tables_that_cannot_tell(of):
    table = synthetic(6)
    with pytest.raises(ValueError, match=r"table lacks columns \['reach'\]"): of(table, "after", ["reach"])
    with pytest.raises(ValueError, match="missing or infinite"): of(table.assign(before=np.nan), *ASKED)
    with pytest.raises(ValueError, match="'teacher' has 1 cluster"): of(table[:6], *ASKED)
    with pytest.raises(ValueError, match="don't vary enough within 12 clusters"):
        of(table.assign(before=table.teacher), *ASKED)
    with pytest.raises(ValueError, match="to tell them apart"): of(table.assign(before=2 * table.distance), *ASKED)

"Correlations over pairs that share students and teachers, and ratios on a log scale."
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from copd_nb.analysis.pairs import mean_ratio, partial_by_blocks, pilot_findings


def pairs(effect, blocks=6, shared=1.0, seed=0):
    "Each student of a block learns from both teachers; students have luck that both rows share."
    rng, rows = np.random.default_rng(seed), []
    for block in range(blocks):
        for student in range(6):
            luck = shared * rng.normal()
            for teacher in range(2):
                before, overlap = rng.normal(size=2)
                rows.append(dict(block=block, teacher=f"{block} {teacher}", before_greedy=before, overlap_1=overlap,
                                 after_greedy=before + effect * overlap + luck + 0.5 * rng.normal()))
    return pd.DataFrame(rows)


def test_the_value_is_the_partial_correlation_within_teachers():
    table = pairs(0.8)
    found = partial_by_blocks(table, "after_greedy", "overlap_1", ["before_greedy"])
    within = table.drop(columns="block").groupby("teacher").transform(lambda x: x - x.mean())
    rest = [within[c] - np.polyval(np.polyfit(within.before_greedy, within[c], 1), within.before_greedy)
            for c in ("after_greedy", "overlap_1")]
    assert found["value"] == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-6) and found["groups"] == 6
    assert found["low"] < found["value"] < found["high"] and found["p"] < 0.05


def test_intervals_without_an_effect_hold_zero_about_as_often_as_promised():
    hits = [f["low"] <= 0 <= f["high"] for s in range(200)
            for f in [partial_by_blocks(pairs(0.0, seed=s), "after_greedy", "overlap_1", ["before_greedy"])]]
    assert np.mean(hits) > 0.9


def test_split_and_few_blocks_are_refused():
    with pytest.raises(ValueError, match="three or more"): partial_by_blocks(
        pairs(1.0, blocks=2), "after_greedy", "overlap_1", ["before_greedy"])
    with pytest.raises(ValueError, match="several values of 'block'"): partial_by_blocks(
        pairs(1.0).assign(block=lambda t: np.arange(len(t)) % 3), "after_greedy", "overlap_1", ["before_greedy"])
    with pytest.raises(ValueError, match="overlap_7"): partial_by_blocks(
        pairs(1.0), "after_greedy", "overlap_7", ["before_greedy"])


def test_a_ratio_and_its_inverse_say_the_same():
    x = [2.0, 3.5, 1.5, 2.2]
    a, b = mean_ratio(x), mean_ratio([1 / v for v in x])
    assert a["value"] == pytest.approx(1 / b["value"]) and a["low"] == pytest.approx(1 / b["high"])
    assert a["p"] == pytest.approx(b["p"]) == pytest.approx(stats.ttest_1samp(np.log(x), 0).pvalue)
    for wrong in ([2.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="two or more ratios above 0"): mean_ratio(wrong)


def test_records_without_the_tables_or_without_differences_have_no_findings():
    assert pilot_findings({}) == {} == pilot_findings(dict(students=[dict(block="a")], drift=[]))
    alike = [dict(pair="a", seed=s, global_step=g, symmetric_kl=0.0) for s in (0, 1) for g in (1, 2)]
    assert pilot_findings(dict(students=pairs(1.0).assign(overlap_1=1.0), drift=alike)) == {}

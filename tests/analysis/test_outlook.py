"Will distillation help this pair? Features, costs, calibration, verdicts."
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from copd_nb.analysis.calibration import FEATURES, PAIR_COLUMNS, calibrate, error_of_new_suite, read_pairs
from copd_nb.analysis.outlook import alternatives, judge_pair, preflight, step_signal
from copd_nb.data.capability import Example
from copd_nb.engine.config import Config
from copd_nb.policy.core import Policy
from copd_nb.policy.toys import tiny_policy
from copd_nb.report.command import main

CONFIG = Config(prompts=6, opd_prompts=4, group_size=2, max_new_tokens=4, device="cpu")
EXAMPLES = [Example(f"{a}+{b}=", str(a + b), "sums") for a in range(4) for b in range(3)]


def tiny(seed, **sizes):
    made = tiny_policy(seed, **dict(hidden=32, layers=2, vision_hidden=16, vision_depth=1) | sizes)
    return Policy(made.model, made.processor, f"tiny {seed}")


def invented(suites=4, pairs=32, slope=20.0):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.uniform(-1, 1, size=(pairs, len(FEATURES))), columns=[*FEATURES])
    return table.assign(suite=[f"s{i % suites}" for i in range(pairs)], student="a", teacher="b", capability="c",
                        gain=slope * table.headroom + rng.normal(size=pairs))


def test_shipped_pairs_are_read_and_too_few_are_no_calibration():
    assert list(read_pairs().columns) == [*PAIR_COLUMNS]
    assert calibrate(invented(suites=2)) is None and calibrate(invented(suites=3)) is not None


def test_left_out_error_is_of_suites_that_were_not_seen():
    "By hand: each suite from a fit on the others; and a suite with another law is not predicted."
    pairs = invented()
    found = calibrate(pairs, features=FEATURES)
    for name, part in found.left_out.groupby("suite", sort=False):
        others = pairs[pairs.suite != name]
        z = (others[[*FEATURES]] - others[[*FEATURES]].mean()) / others[[*FEATURES]].std(ddof=0)
        w = np.linalg.solve(z.T @ z + np.eye(5), z.T @ (others.gain - others.gain.mean()))
        own = pairs[pairs.suite == name]
        z = (own[[*FEATURES]] - others[[*FEATURES]].mean()) / others[[*FEATURES]].std(ddof=0)
        assert part.predicted.to_numpy() == pytest.approx((others.gain.mean() + z @ w).to_numpy())
    by_suite = ((found.left_out.gain - found.left_out.predicted) ** 2).groupby(found.left_out.suite).mean()
    assert found.error == pytest.approx(math.sqrt(by_suite.mean())) and found.useful
    assert not calibrate(invented(slope=0.0)).useful
    odd = pairs.assign(gain=np.where(pairs.suite == "s0", -pairs.gain, pairs.gain))
    assert calibrate(odd).error > 3 * found.error


def test_the_spread_of_a_new_suite_and_how_often_intervals_hold():
    "By hand for two suites of two; then intervals of 300 calibrations against pairs of a suite that none has seen."
    spread, freedom = error_of_new_suite(pd.Series([1.0, 3.0, -2.0, -4.0]), pd.Series(list("aabb")))
    between, within = (2 * 2 ** 2 + 2 * 3 ** 2) / 2, (2 + 2) / 2  # means 2 and −3
    parts = between / 2, within / 2
    assert spread == pytest.approx(math.sqrt(sum(parts)))
    assert freedom == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2))
    assert error_of_new_suite(pd.Series([1.0, -1.0, 1.0, -1.0]), pd.Series(list("aabb"))) == (1.0, 4.0)  # suites alike
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        table = invented(7, 70, slope=0.0).drop(columns="gain")
        table[[*FEATURES]] = rng.uniform(-1, 1, size=(70, len(FEATURES)))
        shift = dict(zip(table.suite.unique(), rng.normal(scale=2, size=7)))
        gain = 20 * table.headroom + table.suite.map(shift) + rng.normal(scale=3, size=70)
        known, new = table.suite != "s6", table[table.suite == "s6"].iloc[0]
        value, low, high = calibrate(table.assign(gain=gain)[known]).forecast(new[[*FEATURES]].to_dict())
        held += low < gain[new.name] < high
    assert 0.9 < held / 300 < 0.99


def test_forecasts_do_not_go_beyond_what_was_trained():
    fitted, middle = calibrate(invented()), dict.fromkeys(FEATURES, 0.0)
    assert fitted.beyond(middle) is None and fitted.beyond(middle | dict(headroom=1.3)) is None
    said = judge_pair(middle | dict(headroom=4.0), fitted)
    assert said.startswith("can't tell: headroom of 4 is beyond the trained pairs, -")


def test_constant_features_do_not_break_a_fit():
    value, low, high = calibrate(invented().assign(coherence=0.0)).forecast(dict.fromkeys(FEATURES, 0.5))
    assert low < value < high and math.isfinite(value)


@pytest.mark.parametrize("change, message", [(lambda t: t.drop(columns="gain"), "lacks the column gain"),
                                             (lambda t: t.assign(headroom="high"), "row 2, headroom: 'high'"),
                                             (lambda t: t.assign(gain=math.inf), "row 2, gain: 'inf'")])
def test_tables_that_can_not_be_read(change, message, tmp_path):
    change(invented()).to_csv(tmp_path / "pairs.csv", index=False)
    with pytest.raises(ValueError, match=f"pairs.csv.*{message}"): read_pairs(tmp_path / "pairs.csv")


def test_verdicts():
    fitted, middle = calibrate(invented()), dict.fromkeys(FEATURES, 0.5)
    said = {name: judge_pair(middle | change, c) for name, change, c in (
        ("none", {}, None), ("yes", dict(headroom=1.0), fitted), ("no", dict(headroom=-1.0), fitted),
        ("near", dict(headroom=0.02), fitted), ("missing", dict(headroom=None), fitted),
        ("useless", {}, calibrate(invented(slope=0.0))))}
    assert said["none"].startswith("can't tell: not calibrated")
    assert said["yes"].startswith("yes: 1") and said["no"].startswith("no: −")
    assert said["near"].startswith("can't tell: ") and "headroom could not be measured" in said["missing"]
    assert "no better than the mean" in said["useless"]
    assert all("error on a suite left out" in s for name, s in said.items() if name != "none")


def test_costs_are_those_of_the_price_of_a_schedule():
    student, teacher = tiny(0), tiny(1)
    found = alternatives(student, teacher, EXAMPLES, 3.0, CONFIG, steps=10, prompts=12).set_index("alternative")
    tokens = 10 * 4 * 2 * 3
    assert found.tokens["OPD"] == 3 * tokens and found.tokens["mixed RLVR"] == 2 * 10 * 6 * 2 * 3
    assert found.tokens["semi-OPD"] == pytest.approx(tokens * (1 + 2 * 12 / 40))
    assert found.flops["semi-OPD"] < found.flops["OPD"] and found.tokens["merging"] == 0 < found.flops["merging"]
    larger = alternatives(student, tiny(1, layers=4), EXAMPLES, 3.0, CONFIG, steps=10).set_index("alternative")
    assert math.isnan(larger.flops["merging"]) and larger.flops["OPD"] > found.flops["OPD"]
    assert larger.flops["mixed RLVR"] == found.flops["mixed RLVR"]


def test_a_pair_and_the_command(tmp_path, capsys, monkeypatch):
    student, teacher = tiny(0), tiny(1)
    before = [p.detach().clone() for p in student.parameters()]
    found = preflight(student, teacher, EXAMPLES, CONFIG, batches=3)
    assert all((p == q).all() for p, q in zip(before, student.parameters()))
    assert set(found.measured.metric) == {"overlap@1", "overlap@3", "symmetric_kl", "moved", "norm_squared",
                                          "noise_squared", "coherence", "headroom"}
    assert all(v is not None for v in found.features("sums").values())
    assert f"from {len(read_pairs())} pairs" in found.verdicts["sums"]
    unknown = preflight(student, teacher, EXAMPLES, CONFIG, batches=3, pairs=read_pairs()[:0])
    assert unknown.verdicts["sums"].startswith("can't tell: not calibrated")
    fitted = preflight(student, teacher, EXAMPLES, CONFIG, batches=3, pairs=invented())
    assert "error on a suite left out" in fitted.verdicts["sums"]
    open_ended = [replace(e, answer="") for e in EXAMPLES]
    without = preflight(student, teacher, open_ended, CONFIG, batches=3)
    assert without.features("sums")["headroom"] is None and "no answers" in without.gains["sums"]
    with pytest.raises(ValueError, match="12 prompts: at least 13"): preflight(student, teacher, EXAMPLES, batches=13)
    for name, policy in (("a", student), ("b", teacher)): policy.save(tmp_path / name)
    rows = [dict(prompt=e.prompt, answer=e.answer, capability="sums") for e in EXAMPLES]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["preflight", str(tmp_path / "a"), str(tmp_path / "b"), "--prompts", str(tmp_path / "p.jsonl"),
             "--batches", "3", "-c", "max_new_tokens", "4", "-c", "group_size", "2"]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "sums: will distillation help? can't tell" in said and "semi-OPD" in said and "coherence" in said
    assert main([*words[:4], str(tmp_path / "none.jsonl")]) == 2
    assert main([*words, "-c", "group_sizes", "2"]) == 2
    monkeypatch.setattr("copd_nb.analysis.outlook.preflight", lambda *given: f"{given[3].max_new_tokens} tokens")
    for more, length in ([], 64), (["-c", "max_new_tokens", "512"], 512):  # not the embedded suite's 10
        capsys.readouterr()
        assert main([*words[:5], *more]) == 0 and capsys.readouterr().out == f"{length} tokens\n"


def test_a_step_between_twins_has_no_signal():
    "A teacher equal to the student: δ is 0, and so is every gradient."
    student = tiny(0)
    found = step_signal(student, student.clone("twin"), EXAMPLES, CONFIG, batches=3).set_index("metric")
    assert abs(found.value["norm_squared"]) < 1e-9 and found.value["noise_squared"] < 1e-9
    with pytest.raises(ValueError, match="12 prompts give no 13 batches"):
        step_signal(student, student.clone("twin"), EXAMPLES, CONFIG, batches=13)

"The page of claims: evidence from records by seed, one correction, every verdict, and files of others."
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from copd_nb.analysis.criticism import CONFOUNDED, sources
from copd_nb.analysis.collapses import collapses, collapses_markdown
from copd_nb.analysis.deciding import decided_by_all, decided_by_one, within
from copd_nb.analysis.evidence import Evidence, evidence_of
from copd_nb.analysis.others import read_others, schema_text
from copd_nb.analysis.page import (
    MARKS, between_marks, claims_page, claims_rows, counts_sentence, detectable_at, kind_of, seeds_needed)
from copd_nb.analysis.recorded import runs_of
from copd_nb.analysis.tests import minimum_detectable_difference
from copd_nb.analysis.typical import typical_p
from copd_nb.engine.history import engine_now, engine_of
from copd_nb.report.command import main
from copd_nb.report.overview import write_index

DOCS = Path(__file__).parents[2] / "docs"
ROWS = ["expert", "mixed", {"mixed": dict(prompts=96, steps=80)}, "opd", {"mopd": dict(start="base")}, "merged",
        {"local": dict(period=5)}, "copd", {"placebo_copd": dict(label="placebo")}, {"semi_opd": dict(label="semi")}]


def evidence(claim="copd_over_mopd", p=0.5, value=1.0, **more):
    values = dict(where="here", low=value - 1, high=value + 1, sd=1.0, seeds=10, source="a record")
    return Evidence(claim, value=value, p=p, **values | more)


def record(lead=0.0, seeds=10, noise=0.4, names=("text", "image"), collapse=0, **more):
    "A record of an experiment in which CoPD leads every other row."
    labels = ["base", *(f"{c} expert" for c in names), "mixed RLVR", "mixed RLVR, 96 prompts", "MOPD", "merged experts",
              *((f"OPD {a}→{b}" for a in names for b in names if a != b) if len(names) == 2 else ()),
              "averaged every 5", "CoPD", "placebo", "semi"]
    rng, rows = np.random.default_rng(0), []
    for label in labels:
        level = 60 - 10 * (label == "base") + lead * (label == "CoPD")
        values = level + noise * rng.standard_normal((len(names), seeds))
        if label == "mixed RLVR" and collapse: values[:, :collapse] -= 30
        rows += [dict(paradigm=label, capability=c, seed=s, accuracy=values[i, s]) for i, c in enumerate(names)
                 for s in range(seeds)]
    asked = dict(settings={"all": list(names)}, steps=80, seeds=list(range(seeds)),
                 paradigms=[r for r in ROWS if r != {"local": dict(period=5)}])
    return dict(report="experiment", parameters=asked, per_seed={"all/greedy": rows}, claims={}, engine=engine_now(),
                environment={}) | more


def page_of(*records): return claims_page(e for r in records for e in evidence_of(r, "a record"))


def verdicts(page): return page[page.main].set_index("id").verdict.map(kind_of)


def test_a_clear_lead_holds_everywhere_it_was_measured():
    found = verdicts(page_of(record(4.0)))
    assert set(found[["copd_over_mixed_two", "copd_over_static_opd", "copd_over_mopd", "copd_over_merged",
                      "copd_over_own_expert", "copd_over_mixed_critical_path", "copd_over_placebo",
                      "copd_over_semi"]]) == {"holds"}
    assert found["copd_over_mixed_three"] == "not run" == found["budget_not_conflict"]
    behind = verdicts(page_of(record(-4.0)))
    assert behind["copd_over_mopd"] == behind["copd_over_own_expert"] == "does not hold"


def test_the_p_of_a_plan_stands_beside_that_of_the_page():
    made = record(1.0)
    made["parameters"]["primary"] = dict(metric="greedy", matters=1.5)
    made["planned"] = [dict(setting="all", a=a, b=b, p_holm=p) for a, b, p in (
        ("CoPD", "merged experts", 0.0123), ("semi", "MOPD", 0.5), ("placebo", "CoPD", 0.0004), ("CoPD", "MOPD", None))]
    page = page_of(made).set_index("id")
    named = page.p_plan.dropna()
    assert dict(named) == dict(copd_over_merged=0.0123, copd_over_placebo=0.0004)  # whichever way round
    shown = {r["claim"]: r["p (Holm)"] for r in claims_rows(page.reset_index())}
    assert shown[page.claim["copd_over_merged"]].endswith(" (plan: 0.012)")
    assert shown[page.claim["copd_over_placebo"]].endswith(" (plan: < 0.001)")
    assert "plan" not in shown[page.claim["copd_over_semi"]] and "plan" not in shown[page.claim["semi_over_live"]]
    without = page_of(record(1.0)).set_index("id")
    assert without.p_plan.isna().all() and page.p_holm.equals(without.p_holm)
    made["parameters"]["primary"] = dict(metric="sampled")
    assert page_of(made).p_plan.isna().all()


def test_paradigms_within_a_bound_are_within_it():
    found = verdicts(page_of(record()))
    assert found["within_1_4"] == "holds" == found["m2rl_interference"]  # no worse by what matters
    apart = record()
    for row in apart["per_seed"]["all/greedy"]: row["accuracy"] += 5 * (row["paradigm"] == "MOPD")
    assert verdicts(page_of(apart))["within_1_4"] == "does not hold"


def spent(text): return [dict(paradigm="mixed RLVR", capability=c, share=s)
                         for c, s in (("text", text), ("image", 1 - text))]


def test_a_balanced_mixture_is_known_by_the_tokens_that_it_generated():
    assert "budget_not_conflict" not in {e.claim for e in evidence_of(record(token_shares=dict(all=spent(0.6))), "r")}
    found = page_of(record(token_shares=dict(all=spent(0.51)))).set_index("id").loc["budget_not_conflict"]
    assert kind_of(found.verdict) == "holds" and found.low > -1.5 and found.against.endswith("expert")


def test_a_mixture_by_shares_is_no_baseline_of_the_paper():
    uneven = record(4.0)
    uneven["parameters"]["paradigms"].append({"mixed": dict(shares=dict(text=3, image=1), label="uneven")})
    rows = uneven["per_seed"]["all/greedy"]
    rows += [row | dict(paradigm="uneven", accuracy=row["accuracy"] + 20) for row in rows
             if row["paradigm"] == "mixed RLVR"]
    assert {r.label for _, r in runs_of(uneven)[0].rows} >= {"uneven", "mixed RLVR"}
    assert verdicts(page_of(uneven))["copd_over_mixed_two"] == "holds"


PARTS = {"no text": dict(topology=dict(text=["image"])), "no images": dict(topology=dict(image=["text"])),
         "2 : 3": dict(s_rl=8, s_opd=12), "4 : 1": dict(s_rl=16, s_opd=4), "stronger": dict(beta=10.0),
         "no text, 2 : 3": dict(s_rl=8, s_opd=12, topology=dict(text=["image"])),
         "uneven": dict(shares=dict(text=5, image=1))}


def with_parts(**points):
    "A record with rows of CoPD that are changed in one or two ways, and so many points above the first."
    made, rng = record(), np.random.default_rng(1)
    made["parameters"]["paradigms"] += [{"copd": values | dict(label=label)} for label, values in PARTS.items()]
    rows = made["per_seed"]["all/greedy"]
    rows += [row | dict(paradigm=label, accuracy=row["accuracy"] + points.get(label, 0.0) + 0.4 * rng.standard_normal())
             for label in PARTS for row in [r for r in rows if r["paradigm"] == "CoPD"]]
    return made


def test_a_part_of_copd_is_needed_if_it_is_worse_without_it():
    found = page_of(with_parts(**{"no text": -5, "stronger": 20, "no text, 2 : 3": 20})).set_index("id")
    assert kind_of(found.verdict["ablation_without_first_opd"]) == "holds"
    assert found.against["ablation_without_first_opd"] == "no text"
    assert kind_of(found.verdict["ablation_without_second_opd"]) != "holds"
    assert verdicts(page_of(record()))["ablation_without_first_opd"] == "not run"
    three = record(names=("text", "image", "video"))
    assert not [e for e in evidence_of(three, "r") if e.claim.startswith("ablation")]


def test_a_ratio_is_best_only_if_it_is_above_every_other():
    best = page_of(with_parts(**{"2 : 3": -5, "4 : 1": -3, "stronger": 20, "uneven": 20})).set_index("id")
    assert kind_of(best.verdict["ratio_best"]) == "holds" and best.value["ratio_best"] == pytest.approx(3, abs=0.5)
    level = page_of(with_parts(**{"2 : 3": -5})).set_index("id")
    assert kind_of(level.verdict["ratio_best"]) != "holds" and level.against["ratio_best"] == "4 : 1"
    assert kind_of(verdicts(page_of(with_parts(**{"4 : 1": 5})))["ratio_best"]) == "does not hold"


def test_a_plan_about_another_row_of_copd_says_nothing_of_the_ratio():
    made = with_parts(**{"2 : 3": -5, "4 : 1": 2})
    asked, rows = made["parameters"], made["per_seed"]["all/greedy"]
    asked["primary"], made["planned"] = dict(matters=1.5), [dict(setting="all", a="CoPD", b="4 : 1", p_holm=0.03)]
    assert page_of(made).set_index("id").p_plan["ratio_best"] == 0.03
    asked["paradigms"][asked["paradigms"].index("copd")] = {"copd": dict(s_rl=10, s_opd=10)}
    asked["paradigms"].append({"copd": dict(label="3 : 2")})
    rows += [r | dict(paradigm="3 : 2", accuracy=r["accuracy"] + 1) for r in rows if r["paradigm"] == "CoPD"]
    page = page_of(made).set_index("id")
    assert page.against["ratio_best"] == "4 : 1" and np.isnan(page.p_plan["ratio_best"])


def test_a_branch_alone_is_compared_with_the_merge_of_its_own_runs():
    made = record()
    copd = [r for r in made["per_seed"]["all/greedy"] if r["paradigm"] == "CoPD"]
    worse = [r | dict(branch="text", accuracy=r["accuracy"] - 5 - 0.1 * r["seed"]) for r in copd]
    mean = [dict(paradigm="CoPD", branch="text", capability="mean", seed=s, accuracy=0.0) for s in range(10)]
    made["branches"] = {"all/greedy": worse + mean}
    found = page_of(made).set_index("id")
    assert kind_of(found.verdict["merged_over_first_branch"]) == "holds"
    assert found.value["merged_over_first_branch"] == pytest.approx(5.45)
    assert found.verdict["merged_over_second_branch"] == "not run"
    hub = record(names=("text", "image", "video")) | dict(branches=made["branches"])
    assert not [e for e in evidence_of(hub, "r") if e.claim.startswith("merged_over")]  # its spokes never see all


def test_collapsed_runs_of_another_row_settle_nothing():
    "With two of ten runs collapsed the mean is 6 points behind; the typical run isn't."
    found = page_of(record(collapse=2)).set_index("id").loc["copd_over_mixed_two"]
    assert kind_of(found.verdict) != "holds" and abs(found.value) < 1 and found.sd > 10


def test_one_correction_over_all_claims():
    found = page_of(record(1.0, seeds=5, noise=1.0))
    tested = found[found.p_holm.notna()]
    order = tested.sort_values("p")
    expected = np.minimum(np.maximum.accumulate(order.p.to_numpy() * np.arange(len(order), 0, -1)), 1)
    assert len(tested) > 10 and tested.main.all() and order.p_holm.to_numpy() == pytest.approx(expected)


def test_another_measurement_costs_no_claim_its_power():
    "A row with fewer seeds changes nothing for others, and is corrected as if it decided."
    others = [evidence(c, p) for c, p in (("copd_over_merged", 0.001), ("copd_over_semi", 0.03))]
    alone = claims_page([evidence("copd_over_mopd", 0.02, seeds=3), *others])
    both = claims_page([evidence("copd_over_mopd", 0.2, seeds=20), evidence("copd_over_mopd", 0.02, seeds=3), *others])
    main, more = (both[both.record.notna() & (both.main == m)].set_index("id") for m in (True, False))
    assert dict(main.p_holm) == pytest.approx(dict(copd_over_mopd=0.2, copd_over_merged=0.003, copd_over_semi=0.06))
    assert dict(more.p_holm) == pytest.approx(dict(copd_over_mopd=0.04))
    assert more.p_holm["copd_over_mopd"] == alone.set_index("id").p_holm["copd_over_mopd"]
    assert more.mde["copd_over_mopd"] == alone.set_index("id").mde["copd_over_mopd"]


def test_of_equally_many_seeds_the_row_with_most_branches_decides():
    two, three = (evidence(p=p, branches=k, source=str(k)) for p, k in ((1e-9, 2), (0.5, 3)))
    for order in ([two, three], [three, two]):
        assert claims_page(order).query("main and id == 'copd_over_mopd'").record.tolist() == ["3"]
    more = evidence(p=0.3, seeds=11, branches=2, source="more seeds")
    unclear = evidence(p=0.3, seeds=12, branches=3, source="confounded", confound="a reason")
    page = claims_page([two, three, more, unclear])
    assert page.query("main and id == 'copd_over_mopd'").record.tolist() == ["more seeds"]


def test_small_differences_are_corrected_among_themselves_and_all_of_them_must_be_small():
    rng = np.random.default_rng(0)
    near, noise = 0.1 + rng.normal(0, 0.3, 10), rng.normal(0, 0.5, 10)
    far = 1.45 + noise - noise.mean()
    assert decided_by_all(dict(a=near))["p_smaller"] < 1e-3 < 0.1 < decided_by_all(dict(a=near, b=far))["p_smaller"]
    several = [evidence(c, 0.5, p_smaller=0.02) for c in ("copd_over_mopd", "copd_over_merged", "copd_over_semi")]
    assert set(verdicts(claims_page(several[:1]))[["copd_over_mopd"]]) == {"smaller than"}
    assert "smaller than" not in set(verdicts(claims_page(several)))


def curves(ends, seeds=10):
    "Learning curves that rise with their tokens, up to an end of each row."
    at = [dict(total_steps=t, critical_steps=t, accuracy=50.0 + t) for t in (10.0, 20.0, 30.0)]
    return {"all/greedy": [x | dict(paradigm=label, seed=s, tokens=x["total_steps"] * end)
                           for label, end in ends.items() for s in range(seeds) for x in at]}


@pytest.mark.parametrize("ends, early", [((2.0, 1.0), "CoPD"), ((1.0, 2.0), "mixed RLVR"), ((1.0, 1.06), "mixed RLVR"),
                                         ((1.0, 1.04), None)])
def test_a_run_that_is_read_in_mid_schedule_is_confounded(ends, early):
    made = record(4.0, curves=curves(dict(zip(("CoPD", "mixed RLVR"), ends))))
    found = page_of(made).set_index("id").loc["copd_over_mixed_equal_tokens"]
    if early: assert found.verdict.startswith(f"confounded: {early} is read before its end")
    else: assert found.verdict == "holds" and found.value == pytest.approx(4, abs=0.5)


def test_a_row_of_as_many_tokens_answers_for_equal_tokens():
    "A longer run of mixed RLVR ends where CoPD does: both ends are compared, and no other claim changes."
    made = record(curves=curves({"CoPD": 2.0, "mixed RLVR": 1.0, "longer": 2.02}))
    made["planned"] = [dict(setting="all", a="CoPD", b=b, p_holm=0.011) for b in ("mixed RLVR", "longer")]
    before = {e.claim: e for e in evidence_of(made, "r")}
    assert np.isnan(before["copd_over_mixed_equal_tokens"].p_plan)  # planned were the ends, not the curves
    made["parameters"]["paradigms"].append({"mixed": dict(steps=240, label="longer")})
    rows = made["per_seed"]["all/greedy"]
    rows += [r | dict(paradigm="longer", accuracy=r["accuracy"] + 5) for r in rows if r["paradigm"] == "CoPD"]
    after = {e.claim: e for e in evidence_of(made, "r")}
    found = after.pop("copd_over_mixed_equal_tokens")
    assert found.against == "longer" and found.value == pytest.approx(-5) and not found.confound
    assert found.p_plan == 0.011
    assert all(str(after[claim]) == str(e) for claim, e in before.items() if claim in after)


def test_the_power_of_the_typical_run_is_that_of_its_test():
    rng = np.random.default_rng(1)
    for seeds, level in ((5, 0.05), (10, 0.05), (10, 0.002)):
        shift = detectable_at(1.0, seeds, level, trimmed=True)
        found = np.mean([typical_p(x) < level for x in shift + rng.standard_normal((3000, seeds))])
        assert found == pytest.approx(0.8, abs=0.03)
    assert detectable_at(2.0, 10, 0.05, trimmed=True) > detectable_at(2.0, 10, 0.05) > 0
    assert seeds_needed(1.0, 1.5, 0.002, trimmed=True) > seeds_needed(1.0, 1.5, 0.002)


def test_every_verdict():
    every = [evidence("copd_over_mopd", 1e-6), evidence("copd_over_merged", 1e-6, -1.0),
             evidence("copd_over_placebo", 0.4, 1.0, sd=0.5), evidence("copd_over_semi", 0.4, 1.0, sd=3.0),
             evidence("overlap_predicts_gain", 1e-9), evidence("drift_kl_rises", 1e-9, 9.0, older=True),
             evidence("m2rl_cheaper", np.nan, 1.6, exact=True), evidence("copd_over_averaged", 0.4, sd=100.0),
             evidence("copd_over_mixed_two", 0.4, 0.1, sd=3.0, p_smaller=0.001)]
    page = claims_page(every)
    found = page[page.main].set_index("id").verdict
    assert found["copd_over_mopd"] == "holds" == found["m2rl_cheaper"]
    assert found["copd_over_merged"] == "does not hold" and found["copd_over_placebo"] == "not detected"
    assert found["copd_over_mixed_two"] == "smaller than 1.5 points"
    needed = seeds_needed(3.0, 1.5, 0.05 / 6)
    assert found["copd_over_semi"] == f"beyond reach here ({needed} seeds needed)" and 30 < needed < 80
    assert found["copd_over_averaged"] == "beyond reach here (more than 1000 seeds needed)"
    assert found["overlap_predicts_gain"].startswith("confounded: all students")
    assert found["drift_kl_rises"] == "older engine" and page.p_holm.notna().sum() == 6
    assert ("34 claims: 2 hold, 1 does not hold, 1 smaller than what matters, 1 not detected, 1 confounded, 2 beyond "
            "reach here, 1 older engine") in counts_sentence(page)


def test_a_finding_with_controls_is_tested():
    free = evidence("overlap_predicts_gain", 1e-6, controls="headroom crossed with distance")
    assert verdicts(claims_page([free]))["overlap_predicts_gain"] == "holds"
    assert set(CONFOUNDED) <= {c.id for claims in sources().values() for c in claims}


def test_records_of_an_older_engine_settle_nothing_and_give_way():
    old = record(4.0, engine=1)
    assert verdicts(page_of(old))["copd_over_mopd"] == "older engine"
    both = page_of(old, record(seeds=3)).query("id == 'copd_over_mopd'")
    assert len(both) == 1 and both.seeds.item() == 3
    dated = dict(environment=dict(started="2026-11-24T12:00:00+00:00"))
    assert engine_of(dated) == 1 and engine_of(dict(environment={})) == 1
    assert engine_of(dict(environment=dict(started="2026-11-29T00:00:00+00:00"))) == 2


def test_findings_without_scores_by_seed_give_sd_and_p_from_their_interval():
    x = np.array([0.5, 1.2, 0.9, 1.4])
    ends = stats.ttest_1samp(x, 0).confidence_interval()
    found = dict(value=float(x.mean()), low=ends.low, high=ends.high, seeds=4, unit="overlap lost", verdict="holds",
                 sentence="It does.")
    one = dict(report="pilot", parameters={}, environment={}, engine=engine_now(),
               claims={"drift_overlap_falls": found, "a question of its own": found})
    [e] = evidence_of(one, "pilot")
    assert e.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue) and e.sd == pytest.approx(x.std(ddof=1))


def test_the_weakest_and_the_strongest_decide():
    rng = np.random.default_rng(0)
    ahead, near, behind = (m + rng.normal(0, 0.5, 10) for m in (3, 0.6, -3))
    assert decided_by_all(dict(a=ahead, b=near))["p"] == max(typical_p(ahead), typical_p(near))
    lost = decided_by_all(dict(a=ahead, b=behind))
    assert lost["against"] == "b" and lost["p"] == pytest.approx(2 * typical_p(behind)) and lost["value"] < 0
    won = decided_by_one(dict(a=ahead, b=behind))
    assert won["against"] == "a" and won["value"] > 2 and won["p"] == pytest.approx(2 * typical_p(ahead))
    assert within(dict(a=near), 1.4)["p"] == pytest.approx(stats.t.sf((1.4 - np.sort(near)[2:8].mean()) / (
        np.clip(np.sort(near), np.sort(near)[2], np.sort(near)[7]).std(ddof=1) * np.sqrt(9 / 30)), 5))


def test_power_is_that_of_the_tests():
    for n in (3, 5, 10):
        assert detectable_at(2.0, n, 0.05) == pytest.approx(minimum_detectable_difference(2.0, n), rel=2e-3)
    n = seeds_needed(1.5, 1.5, 0.05)
    assert detectable_at(1.5, n, 0.05) <= 1.5 < detectable_at(1.5, n - 1, 0.05)


def test_code_of_ones_own_is_not_imported():
    own = record(4.0)
    own["parameters"]["paradigms"] = ["copd", "no_such_module:rows"]
    assert runs_of(own) and not evidence_of(own, "own")


def test_the_published_index_is_what_the_records_give(tmp_path):
    "Made anew with `copd index docs/reports`."
    made = write_index(DOCS / "reports", tmp_path / "index.html").read_text(encoding="utf-8")
    published = (DOCS / "reports" / "index.html").read_text(encoding="utf-8")
    here = re.compile('(href|src)="(?!data:)[^"]*"')  # links begin at the page
    assert here.sub("", made) == here.sub("", published) and "does not hold" in made


def test_the_published_page_is_what_the_records_give(tmp_path, capsys):
    "Made anew with `copd claims --out docs/claims.md`."
    text = (DOCS / "claims.md").read_text(encoding="utf-8")
    (tmp_path / "claims.md").write_text(text, encoding="utf-8")
    assert main(["claims", str(DOCS / "reports"), "--out", str(tmp_path / "claims.md")]) == 0
    made = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert made == text and made.count("\n| CoPD ") > 8 and "ended below the base" in made
    titles = [line for line in made.splitlines() if line.startswith("### ")]
    assert titles[0] == "### The paper: CoPD" and titles[-1] == "### Asked here" and "### arXiv 2610.11247" in titles
    assert main(["claims", str(DOCS / "reports"), "--with", str(DOCS / "claims-example.yaml")]) == 0
    assert "Example group, 2026" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one .* are needed"): between_marks(MARKS[0], "page")


def test_runs_below_the_base_are_counted():
    found = collapses(dict(new=record(collapse=2), old=record(collapse=2, engine=1))).set_index("paradigm")
    assert found.below["mixed RLVR"] == 2 and found.runs["mixed RLVR"] == 10 and found.high["mixed RLVR"] > 50
    assert "text expert" not in found.index and set(found.record) == {"new"}
    assert "mixed RLVR | 2 of 10" in collapses_markdown(found.reset_index())
    assert collapses_markdown(collapses({})) == "No record has scores by seed."


def test_the_published_schema_is_that_of_the_code():
    assert (DOCS / "claims.schema.json").read_text(encoding="utf-8") == schema_text()


ENTRY = dict(claim="copd_over_mopd", unit="points", where="text", differences=[1.0, 2.0])
PLAIN = dict(claim="copd_over_mopd", unit="points", where="text", estimate=1.0, low=0.5, high=2.0, seeds=3)


@pytest.mark.parametrize("entry, message", [
    (ENTRY | dict(claim="nothing"), "results.0.claim: 'nothing' is not allowed: copd_over_mixed_two"),
    (ENTRY | dict(unit="times"), "unit is 'times': copd_over_mopd is in 'points'"),
    (ENTRY | dict(unit="per cent"), "results.0.unit: 'per cent' is not allowed: coherence lost, correlation"),
    (ENTRY | dict(differences=["a", 1]), "results.0.differences.0: 'a' is not allowed: a number is needed"),
    (ENTRY | dict(estimate=1.0), "estimate follows from differences"),
    ({k: v for k, v in PLAIN.items() if k != "high"}, "high missing: differences by seed, or estimate, low, high"),
    (PLAIN | dict(low=1.5), "low 1.5 ≤ estimate 1 ≤ high 2 is needed"),
    (PLAIN | dict(seeds=0), "results.0.seeds: 0 is less than the minimum of 1"),
    (ENTRY | dict(sedes=3), "results.0: .*sedes"),
    ({k: v for k, v in ENTRY.items() if k != "where"}, "results.0: .*where")])
def test_faults_in_a_file_of_others_are_named(tmp_path, capsys, entry, message):
    file = tmp_path / "others.json"
    file.write_text(json.dumps(dict(schema="copd_nb.claims/1", source="me", results=[entry]), indent=1))
    with pytest.raises(ValueError, match=message): read_others(file)
    assert main(["claims", str(DOCS / "reports"), "--with", str(file)]) == 2 and "line" in capsys.readouterr().err


def test_both_forms_of_an_entry_are_read(tmp_path):
    file = tmp_path / "others.json"
    file.write_text(json.dumps(dict(schema="copd_nb.claims/1", source="me", results=[ENTRY, PLAIN])))
    first, second = read_others(file).itertuples()
    assert first.value == 1.5 and first.seeds == 2 and second.low == 0.5 and np.isnan(second.sd)

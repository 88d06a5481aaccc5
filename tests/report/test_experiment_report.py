"The report of an experiment: one's own files, labels and rows, without curves, probes, experts or CoPD."
import json
import random
import re

import pandas as pd
import pytest

from copd_nb.policy.skills import text_policy
from copd_nb.analysis.records import read_results
from copd_nb.report.driver import run_report

pytestmark = pytest.mark.integration

HOSTILE = "<img src=x onerror=alert(1)>"
SMALL = """
steps: 2
config: {prompts: 2, opd_prompts: 1, group_size: 2, max_new_tokens: 3, probe_every: 0, eval_every: 0, device: cpu}
evaluation: {prompts: 4, samples: 2, k: [2, 8], temperatures: [0.5, 1]}
"""
OWN = """
title: "%s"
model: {path: model, lora: 2}
capabilities:
  math: {file: math.jsonl, columns: {prompt: q, answer: a}, reward: numeric, held_out: 6}
  sort: {file: sort.jsonl, columns: {prompt: q, answer: a}, reward: exact, held_out: 6}
paradigms:
  - expert: {label: alone}
  - mixed
  - copd: {beta: 0.1, s_rl: 1, s_opd: 1, label: gentle}
  - copd: {s_rl: 1, s_opd: 1, label: strong}
primary: {metric: sampled, matters: 2, compare: [[gentle, mixed RLVR], [strong, gentle]]}
seeds: [0, 1]
""" % HOSTILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two files of data and a tiny model."
    path, draw = tmp_path_factory.mktemp("own"), random.Random(0)
    text_policy(hidden=32, layers=1).save(path / "model")
    words = ["".join(draw.sample("abcdefgh", 4)) for _ in range(40)]
    rows = dict(math=[dict(q=f"{a}+{b}= {HOSTILE}", a=str(a + b)) for a in range(6) for b in range(6)],
                sort=[dict(q=f"sort {w}", a="".join(sorted(w))) for w in dict.fromkeys(words)])
    for name, lines in rows.items(): (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (path / "own.yaml").write_text(OWN + SMALL)
    return path


def made(folder, file, **parameters):
    "The record and the page of a report."
    files = run_report("experiment", dict(file=str(folder / file), store=str(folder / "store"), workers=1) | parameters,
                       folder / f"out-{file}", progress=False)
    return read_results(files["results"]), files["html"].read_text()


def test_two_files_of_ones_own_with_labels_lora_and_no_curves(folder):
    record, page = made(folder, "own.yaml")
    labels = {"base", "alone: math expert", "alone: sort expert", "mixed RLVR", "gentle", "strong"}
    assert {r["paradigm"] for r in record["tables"]["all/sampled"]} == labels
    runs = {(r["paradigm"], r["capability"], r["seed"]) for r in record["per_seed"]["all/greedy"]}
    assert runs == {(l, c, s) for l in labels for c in ("math", "sort", "mean") for s in (0, 1)}
    assert {"copd_over_mixed/all/gentle/sampled", "copd_over_own_expert/all/gentle/greedy",
            "mixed_seesaw/all/mixed RLVR/greedy"} <= set(record["claims"])
    assert not [claim for claim in record["claims"] if "/strong/" in claim]  # of CoPD's rows the first is meant
    assert {(r["paradigm"], r["branch"], r["seed"]) for r in record["branches"]["all/greedy"]} == {
        ("gentle", b, s) for b in ("math", "sort") for s in (0, 1)}
    assert [(r["a"], r["b"], r["seeds"]) for r in record["planned"]] == [
        ("gentle", "mixed RLVR", 2), ("strong", "gentle", 2)] and record["parameters"]["primary"]["matters"] == 2
    assert record["headline"].startswith("- Named as primary: sampled accuracy of the last weights, one Holm")
    assert all("the paper" not in f["sentence"] and f["text"] for f in record["claims"].values())
    assert set(record["gaps"]) == {"all/greedy", "all/sampled"} and set(record["pass_at_k"]) == {"all/pass@2"}
    assert not record["equal_budgets"] and record["work"]["runs"] == 10 == record["work"]["trained"]
    assert {r["model"] for r in record["completions"]["all"] if r["capability"] == "math"} == labels - {
        "alone: sort expert"}
    assert record["distances"] == {"all": []}
    assert "No learning curves" in page and "No probes" in page and "Nothing was tuned" in page
    assert "Trial run" not in page and "None of the settings is the paper" in page
    assert {(r["paradigm"], r["temperature"], r["seed"]) for r in record["over_temperature"]["all/last weights"]} == {
        (l, t, s) for l in labels for t in (0, 0.5, 1) for s in (0, 1)}
    assert {r["paradigm"] for r in record["equal_entropy"]["all/last weights"]} == {"mixed RLVR", "strong"}
    assert record["version"] == 2 and record["engine"] >= 2 and len(record["described_per_seed"]["all"]) == 48
    assert "at equal entropy" in page
    assert not re.search(r"<img src=x|<script", page) and "&lt;img src=x" in page  # prompts and title are text


def test_what_was_trained_is_loaded(folder):
    "The same file again, and one with a single row: nothing is trained, and one model has nobody to lead."
    with pytest.raises(ValueError, match="primary: compare: there is no unified model 'gentle': mixed RLVR"):
        made(folder, "own.yaml", paradigms=["mixed"], seeds=[0])
    record, page = made(folder, "own.yaml", paradigms=["mixed"], seeds=[0], primary={})
    assert record["work"]["loaded"] == 1 and not record["work"]["trained"]
    assert "mixed RLVR is the only unified model" in page and "One training seed" in page
    assert not record["claims"] and not record["gaps"] and not record["over_runs"]
    assert "No claim can be measured" in page and "No expert of every capability" in page


def test_several_settings_without_copd_and_a_trial(folder):
    "Curves of merged experts, probes, two settings that are not the paper's, experts alone in one of them."
    (folder / "odd.yaml").write_text("suite: minis\ntogether: {pair: [image, video], all: [video, text, image]}\n"
                                     "paradigms: [expert, merged, opd]\ntuned: {seeds: [9], trials: 3}\n" + SMALL)
    config = dict(eval_every=1, eval_prompts=2, eval_samples=1, probe_every=1, probe_prompts=2)
    record, page = made(folder, "odd.yaml", preset="quick", steps=3, config=config)
    assert set(record["tables"]) == {f"{s}/{m}" for s in ("pair", "all") for m in ("greedy", "sampled")}
    assert set(record["equal_budgets"]) == set(record["tables"]) and record["parameters"]["steps"] == 3
    assert not record["equal_budgets"]["all/greedy"]  # one unified model
    assert {(r["paradigm"], r["reference"]) for r in record["equal_budgets"]["pair/greedy"]} <= {
        (label, "OPD image→video") for label in ("OPD video→image", "merged experts")} | {
        (label, "merged experts") for label in ("OPD image→video", "OPD video→image")}
    spent = pd.DataFrame(record["token_shares"]["all"]).groupby("paradigm").share.sum()
    assert set(spent.index) == {"merged experts", *(f"{c} expert" for c in ("video", "text", "image"))}
    assert spent.tolist() == pytest.approx([1] * 4)
    assert {(r["paradigm"], r["capability"]) for r in record["elsewhere"]["pair/greedy"]} == {
        (label, "text") for label in ("image expert", "video expert", "merged experts", *(
            f"OPD {a}→{b}" for a, b in (("image", "video"), ("video", "image"))))}
    assert "all/greedy" not in record["elsewhere"] and "text was not trained; points above the base" in page
    began = {r["accuracy"] for r in record["elsewhere_per_seed"]["pair/greedy"] if r["paradigm"] == "base"}
    after = {r["paradigm"]: r["accuracy"] for r in record["elsewhere_per_seed"]["pair/greedy"]}
    for r in record["elsewhere"]["pair/greedy"]:
        assert r["value"] == pytest.approx(after[r["paradigm"]] - min(began))
    apart = {r["paradigm"]: r for r in record["distances"]["pair"]}  # static OPD alone has a teacher
    assert set(apart) == {"OPD video→image", "OPD image→video"} and record["distances"]["all"] == []
    assert all(0 < r["lowest_overlap"] <= 1 and r["highest_kl"] >= 0 for r in apart.values())
    assert "Trial run (preset quick): 1 seed, 3 steps a capability" in page and "seeds 9; trials 3" in page
    assert record["limits"][0].startswith("Trial run") and record["headline"].startswith("**Trial run")


@pytest.mark.parametrize("given, message", [
    (dict(file="nowhere.yaml"), "there is no experiment nowhere.yaml"),
    (dict(seeds=[100]), "tuning needs others"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (dict(config=dict(learning_rat=1)), "learning_rat"), (dict(steps=10), "take 20 steps")))])
def test_what_an_experiment_cannot_be_is_said(tmp_path, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_report("experiment", given, tmp_path, progress=False)

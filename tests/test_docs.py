"The documentation site builds offline, its links lead somewhere, and what it says of the log is what a run logs."
import ast
import importlib.util
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from copd_nb.engine import update as update_module
from copd_nb.engine import streams as streams_module
from copd_nb.analysis.claims import CLAIMS
from copd_nb.schedule.control import divergence_band
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.local import synced
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.policy.toys import image, text, tiny_policy
from copd_nb.analysis.records import read_results
from copd_nb.report.overview import STUDIES
from copd_nb.data.rewards import Failed
from copd_nb.data.verifiers import REWARDS, named_reward

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
# published, but no studies: one seed of a real model, rewards without training
OTHER_REPORTS = {"real", "checkpoints", "audit"}
NEEDED = dict(format=dict(pattern=".*"), length=dict(budget=9))  # options without which a reward isn't made
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


def test_the_index_and_every_notebook_have_a_page(site):
    assert "copd_nb" in (site / "index.html").read_text()
    notebooks = [n for place in docs.NOTEBOOKS for n in ROOT.glob(place)]
    assert len(notebooks) > 100
    for notebook in notebooks: assert (site / notebook.relative_to(ROOT).with_suffix(".html")).exists()
    modules = sorted(m.__name__ for mine in docs.modules().values() for m in mine)
    files = (ROOT / "copd_nb").glob("[a-z]*/[a-z]*.py")
    assert modules == sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files)
    assert len(list((site / "api").glob("*.html"))) == len(modules) + 1


def test_the_api_has_signatures_parameters_and_shapes(site):
    page = re.sub(r"<[^>]+>", "", (site / "api" / "objectives.html").read_text())
    assert "clipped_surrogate(logp: Tensor" in page and "(B,) one reward a completion" in page


def test_formulas_need_no_script_and_code_keeps_its_dollars(site):
    page = next((site / "nbs").glob("*/*_objectives.html")).read_text()
    assert page.count("<math") > 20 and "katex" not in page.lower()
    assert docs.with_mathml("costs `$5` and $x$").startswith("costs `$5` and <math")
    assert docs.with_mathml("$5 and $6") == "$5 and $6"


def test_paradigm_pages_have_usage_metrics_details_results_and_a_drawing(site):
    for page in (ROOT / "docs" / "paradigms").glob("*.md"):
        if page.stem == "index": continue
        shown = (site / "paradigms" / f"{page.stem}.html").read_text()
        assert all(f">{part}" in shown for part in ("Usage", "What is logged", "Details",
                                                    "Results")) and "<svg" in shown, page.stem
        found = "95 % intervals" in shown or "report</a>" in shown or "no published comparison" in shown
        assert "<!-- " not in page.read_text() or found


def test_the_pages_have_every_claim_and_every_report(site):
    shown = re.sub(r"<[^>]+>", "", (site / "claims.html").read_text())
    published = sorted(f.parent for f in (ROOT / "docs" / "reports").glob("*/results.json"))
    names = {read_results(f / "results.json")["report"] for f in published}
    assert {"experiment", "pilot", "dynamics"} <= names <= set(STUDIES) | OTHER_REPORTS
    told = docs.measured()
    assert all((f"`{name}`" in told) == (name not in names) for name in STUDIES), "published, or said to be missing"
    assert all(c.text in shown.replace("&#39;", "'").replace("&#x27;", "'").replace("’", "'")
               for c in CLAIMS)
    for f in published:
        assert (site / "reports" / f.name / f"{read_results(f / 'results.json')['report']}.html").exists()


def test_published_reports_are_standard_runs_over_seeds():
    "At least three seeds, and pages that need nothing from elsewhere."
    for folder in (f.parent for f in (ROOT / "docs" / "reports").glob("*/results.json")):
        record = read_results(folder / "results.json")
        if record["report"] in OTHER_REPORTS: continue
        preset, seeds = (record["parameters"][name] for name in ("preset", "seeds"))
        of_a_file = record["report"] == "experiment" and record["parameters"]["file"].endswith(".yaml")
        assert preset == (None if of_a_file else "standard") and len(seeds) >= 3
    assert not docs.loads_from_elsewhere(ROOT / "docs" / "reports")
    assert sum(f.stat().st_size for f in (ROOT / "docs" / "reports").rglob("*")) < 16_000_000


def test_the_page_on_results_says_what_the_committed_reports_say():
    text = docs.MEASURED.read_text()
    assert docs.with_measured(text) == text
    with pytest.raises(ValueError, match="needs one"): docs.with_measured("no marks")


def test_the_readme_is_short_and_begins_with_a_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 800 and text.index("![") < 500


def test_results_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no report"): docs.filled("<!-- studies unknown -->")
    with pytest.raises(ValueError, match="has a row of"): docs.filled("<!-- results a paradigm that was not run -->")
    with pytest.raises(KeyError): docs.filled("<!-- drawing unknown -->")


def test_a_broken_link_ends_the_build(tmp_path):
    (tmp_path / "_smalldocs.yml").write_text("project:\n  type: website\n")
    (tmp_path / "index.md").write_text("# Title\n\n[there](nowhere.md)\n")
    with pytest.raises(SystemExit, match="nowhere.md"):
        docs.smalldocs("render", "--quiet", "--strict", ".", within=tmp_path)


def test_what_a_page_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<script src="https://cdn.example/x.js"></script>')
    (tmp_path / "b.css").write_text("@import url(https://fonts.example/css2?family=A;display=swap);body{}")
    (tmp_path / "c.html").write_text('<a href="https://example.org">a link is no load</a>')
    assert [f.split(":")[0] for f in docs.loads_from_elsewhere(tmp_path)] == ["a.html", "b.css"]


def every_other_fails(completions, examples):
    return [Failed("no score") if i % 2 else 0.0 for i, _ in enumerate(completions)]


def all_goes_wrong(monkeypatch):
    "Let memory run out in the first rollouts, and the loss of the first stream be NaN."
    sampled, gradient, first = streams_module.sample_many, update_module.stream_gradient, dict(memory=True, loss=True)
    def short(*args):
        if first.pop("memory", False): raise torch.OutOfMemoryError("no memory left")
        return sampled(*args)
    def spoilt(*args):
        found, loss = gradient(*args)
        return found, math.nan if first.pop("loss", False) else loss
    monkeypatch.setattr(streams_module, "sample_many", short)
    monkeypatch.setattr(update_module, "stream_gradient", spoilt)


def test_the_page_on_metrics_names_what_is_logged(tmp_path, monkeypatch):
    all_goes_wrong(monkeypatch)
    page = (ROOT / "docs" / "metrics.md").read_text()
    config = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, probe_every=1, probe_prompts=2,
                    probe_k=(10, 5), eval_every=1, eval_prompts=2, eval_samples=1, device="cpu",
                    signals_every=1, warn=dict(window=1, unfinished=0.0))  # a random model ends hardly any completion
    run = train(synced(copd(["text", "image"], cycles=2, s_rl=1, s_opd=1, control=divergence_band(0.1, 0.2))),
                [replace(text(8), reward=every_other_fails), image(8, 8)], tiny_policy(), config, tmp_path / "run",
                progress=False)
    common, *parts = re.split(r"^## kind `(\w+)`", page, flags=re.M)
    assert set(parts[::2]) == set(run.events["kind"]) | {"restart"}  # which takes a cluster
    for kind, said in zip(parts[::2], parts[1::2]):
        logged = set(run.events[run.events["kind"] == kind].dropna(axis=1, how="all").columns)
        named = set(re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in said.splitlines()
                                                     if line.startswith("|")) + common))
        named |= {"overlap@5"} if kind == "probe" else set()
        assert logged <= named, f"{kind}: not on the page: {logged - named}"
        seen = set(run.events[run.events["kind"] == kind].columns) | {"events.jsonl", "run.events"}
        borrowed = {"rollouts", "weight_mean", "weight_clipped", "weight_clip", "reward_term", "teacher_term",
                    "gate_open", 'gate="verified"'}  # test_whose logs them
        borrowed |= {"sampler_difference", "sampler_difference_max", "sampler_kl", "train",
                     'sampler_level="sequence"'}  # test_mismatch does
        assert named - seen <= borrowed | {"teacher", "delta_clipped_share", "micro_prompts",
                                           "micro_tokens"}, f"{kind}: not logged: {named - seen}"


def test_the_page_on_rewards_lists_each_with_the_options_that_it_takes():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", (ROOT / "docs" / "rewards.md").read_text(), flags=re.M)
    assert sorted(name for name, _ in rows) == sorted(REWARDS)
    for name, told in rows:
        taken = {p.name: p.default for p in inspect.signature(REWARDS[name]).parameters.values()}
        listed = {o.partition("=")[0]: o.partition("=")[2] for o in re.findall("`(.+?)`", told)}
        assert list(listed) == list(taken)
        needed = {o for o, v in taken.items() if v is inspect.Parameter.empty}
        assert set(re.findall(r"`(\w+)` \(needed\)", told)) == needed
        given = {o: v for o, v in listed.items() if v}
        assert not given or str(named_reward({"name": name} | given | NEEDED.get(name, {}))) == str(
            named_reward({"name": name} | NEEDED.get(name, {})))


def test_the_examples_of_the_api_run(tmp_path, monkeypatch):
    "Each ends in an expression whose value shows something; they are the packages, in their order."

    monkeypatch.chdir(tmp_path)
    assert list(docs.STOREYS) == list(docs.PACKAGES)
    for name, code in docs.STOREYS.items():
        *body, last = ast.parse(code).body
        assert isinstance(last, ast.Expr), name
        exec(compile(ast.Module(body, []), name, "exec"), names := {})
        value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        assert value is not None and len(str(value)) > 2, name


def test_the_site_is_searched_without_a_server_and_has_a_gallery(site):
    found = (site / "search.js").read_text()
    program = (site / "site_libs" / "smalldocs.js").read_text()
    assert found.startswith("window.smalldocsIndex = [{") and "search.js" in program
    assert (site / "gallery.html").read_text().count("<img") > 40 and (site / "start.html").exists()
    api = (site / "api" / "index.html").read_text()
    assert api.count("<pre") >= len(docs.PACKAGES) and api.count(">examples</a>") > 100


def test_published_pages_are_light_and_titled_by_their_question():
    for entry in docs.entries(docs.REPORTS):
        [page] = entry.own(f"{entry.name}.html")
        text = page.read_text(encoding="utf-8")
        assert page.stat().st_size < 1_500_000 and 'class="verdict"' in text and 'class="contents"' in text
        assert entry.title.rstrip().endswith("?") or entry.name == "pilot", entry.title

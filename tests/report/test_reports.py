"Reports: parameters are checked, a smoke run leaves notebook, HTML and results."
import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from copd_nb.analysis.claims import CLAIMS
from copd_nb.analysis.criticism import sources
from copd_nb.analysis.findings import finding
from copd_nb.analysis.records import read_results, write_results
from copd_nb.report.command import main, parser
from copd_nb.report.driver import _tidy, run_all, run_report
from copd_nb.report.overview import STUDIES, entries, publish, studies, write_index
from copd_nb.report.parameters import check_parameters, notebook_of, parameters_of, report_names

pytestmark = pytest.mark.integration


def test_reports_are_found_and_have_parameters():
    assert {"experiment", "sweep", "warmstart"} <= set(report_names())
    assert {"file", "preset", "capabilities", "seeds"} <= set(parameters_of("experiment"))


def test_unknown_parameter_lists_the_known_ones(capsys):
    with pytest.raises(ValueError, match=r"no parameters \['presets'\].*'preset'"):
        check_parameters("experiment", dict(presets="quick"))
    assert main(["report", "experiment", "-p", "presets", "quick"]) == 2
    error = capsys.readouterr().err
    assert "presets" in error and "'preset'" in error and "Traceback" not in error


def test_unknown_report_lists_the_known_ones(capsys):
    with pytest.raises(ValueError, match="unknown report 'experimment'.*experiment"): notebook_of("experimment")
    assert main(["report", "../experiment"]) == 2


def test_help_and_lists(capsys, tmp_path):
    assert main(["--help"]) == 0 and "  report  " in capsys.readouterr().out
    with pytest.raises(SystemExit) as end: main(["report", "--help"])
    assert end.value.code == 0 and "-p PARAMETER VALUE" in capsys.readouterr().out
    assert main(["reprot"]) == 2 and "unknown command 'reprot' (did you mean 'report'?)" in capsys.readouterr().err
    assert main(["reports"]) == 0 and "-p preset" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    asked = dict(preset="smoke", store=str(folder / "store"), workers=1)  # other tests of reports have processes
    return run_report("experiment", asked, folder / "out", progress=False)


def test_smoke_run_of_the_shipped_experiment(smoke):
    results = read_results(smoke["results"])
    assert results["parameters"]["preset"] == "smoke" and set(results["verdicts"]) == set(results["tables"])
    measured = {"copd_over_mixed_two", "copd_over_mixed_three", "copd_over_static_opd", "copd_over_mopd",
                "copd_over_merged", "copd_over_own_expert", "hub_three_branches", "mixed_seesaw"}
    assert set(results["claims"]) == measured | {f"{c}/greedy" for c in measured}
    parts = {"ablation_without_first_opd", "ablation_without_second_opd", "merged_over_first_branch",
             "merged_over_second_branch", "ratio_best", "copd_over_mixed_equal_tokens",
             "copd_over_mixed_critical_path"}  # decided from the record, `analysis.evidence`
    assert {c.id for c in CLAIMS if c.report == "experiment"} == measured | parts
    two = next(r for r in results["verdicts"]["two_branch/sampled"] if r["other"] == "mixed RLVR")
    assert [results["claims"]["copd_over_mixed_two"][k]
            for k in ("value", "low", "high")] == pytest.approx([two[k] for k in ("difference", "low", "high")])
    assert set(results["tables"]) == {f"{s}/{m}" for s in ("two_branch", "three_branch") for m in ("greedy", "sampled")}
    labels = {r["paradigm"] for r in results["tables"]["three_branch/sampled"]}
    assert {"base", "text expert", "image expert", "video expert", "mixed RLVR", "MOPD", "MOPD from text",
            "merged experts", "CoPD"} == labels
    assert {"OPD text→image", "OPD image→text"} <= {r["paradigm"] for r in results["tables"]["two_branch/greedy"]}
    for table in results["tables"].values():
        for row in table: assert row["low"] <= row["mean"] <= row["high"]
    totals = {r["paradigm"]: r["total_steps"] for r in results["costs"]["three_branch"]}
    assert {v for k, v in totals.items() if not k.endswith("expert")} == {12}


def test_prices_agree_with_what_was_spent(smoke):
    results = json.loads(smoke["results"].read_text())
    prices = {r["schedule"]: r for r in results["prices"]["three_branch"]}
    for row in results["costs"]["three_branch"]:
        price = prices[row["paradigm"]]
        assert row["total_steps"] == price["total_steps"] and row["critical_steps"] == price["critical_steps"]
        spent = row["generated"] + row["scored"] + row["trained"]
        assert 0.7 < spent / price["tokens"] < 1.4 and 0.7 < row["flops"] / price["flops"] < 1.4


@pytest.mark.slow
def test_every_paradigm_of_the_axes_has_a_row_whose_price_is_what_was_spent(tmp_path):
    "Syncs, merging by drift, others' completions, a teacher beside a reward, a larger batch: one report."
    drifting = dict(rule="drift", settings=dict(target=1e-4))
    wanted = [dict(local=dict(period=2)), dict(local=dict(period=2, control=drifting, label="by drift")), "semi_opd",
              "codistill_grpo", "camopd", dict(reward_and_teacher=dict(gate="verified")),
              dict(synced_copd=dict(s_rl=1, s_opd=1)), "mixed", dict(mixed=dict(prompts=8, steps=4))]
    made = run_report("experiment", dict(preset="smoke", paradigms=wanted, store=str(tmp_path / "store")),
                      tmp_path / "out", progress=False)
    results = json.loads(made["results"].read_text())
    prices = {(k, r["schedule"]): r for k, rows in results["prices"].items() for r in rows}
    costs = {(k, r["paradigm"]): r for k, rows in results["costs"].items() for r in rows}
    two = {label for setting, label in costs if setting == "two_branch"}
    assert two == {"local RLVR, H 2", "by drift", "semi-opd", "codistill-grpo", "camopd", "reward-and-teacher",
                   "copd-synced", "mixed RLVR", "mixed RLVR, 8 prompts"}
    for key, row in costs.items():
        spent = row["generated"] + row["scored"] + row["trained"]
        assert 0.7 < spent / prices[key]["tokens"] < 1.4 and 0.7 < row["flops"] / prices[key]["flops"] < 1.4, key


def test_html_is_whole_and_needs_no_network(smoke):
    page = smoke["html"].read_text()
    assert 'aria-label="The answer"' in page and "Trial run (preset smoke)" in page
    parts = ("<h1", 'class="verdict"', 'class="first"', 'class="contents"', ">Accuracy</h2>", ">How it was done</h2>",
             "<summary>Parameters", "<summary>Code")
    order = [page.index(part) for part in parts]
    assert order == sorted(order) and "Which paradigm is best at sums" in page[:page.index("class=\"verdict\"")]
    assert smoke["html"].stat().st_size < 1_500_000
    assert "No description has been provided" not in page and not re.search(r"<img(?![^>]*alt=)", page)
    assert page.count("data:image/png") > 10 and "data:image/svg" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', page)


def test_progress_bars_leave_no_trace_and_other_widgets_stay(tmp_path):
    bar, view = "  0%|          | 0/60 [00:00<?, ?it/s]", "application/vnd.jupyter.widget-view+json"
    output = lambda text, **more: nbformat.v4.new_output("display_data", {"text/plain": text} | more)
    shown = [output(bar, **{view: {"model_id": "a"}}), output("Slider()", **{view: {"model_id": "b"}}),
             output("50%|so it says"), nbformat.v4.new_output("stream", name="stderr", text=bar),
             nbformat.v4.new_output("stream", name="stdout", text=bar)]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=shown)]),
                   tmp_path / "a.ipynb")
    _tidy(tmp_path / "a.ipynb")
    kept = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells[0].outputs
    assert [o.get("name") or o.data["text/plain"] for o in kept] == ["Slider()", "50%|so it says", "stdout"]


def test_unknown_preset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no preset 'fast': quick, smoke, standard, full"):
        run_report("experiment", dict(preset="fast"), tmp_path, progress=False)


HOSTILE = '<script>alert("x")</script><img src=https://example.org/x.png onerror=alert(1)>'


def made(folder, report, headline="Found *it*.", claims=None, preset="quick", limits=("It is made up.",), page=True,
         **parameters):
    "A report folder without a run."
    out = folder / f"{re.sub(r'[^a-z]', '', report)}-{preset}"
    record = write_results(out, report, dict(preset=preset, seeds=[0, 1], **parameters), headline,
                           dict(main=pd.DataFrame(dict(a=[1.0]))), ["It is."], list(limits), claims)
    if page and "/" not in report: (out / f"{report}.html").write_text("<p>page</p>")
    return record


class Page(HTMLParser):
    "Elements with their attributes, and the text."
    def __init__(self, source):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(source)
    def handle_starttag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data
    def hrefs(self): return [a["href"] for tag, a in self.elements if tag == "a"]


def test_the_index_shows_every_report_and_all_claims(tmp_path):
    made(tmp_path, "pilot", "# Big\n\n| a | b |\n|---|---|\n| 1 | 2 |",
         dict(overlap_predicts_gain=finding("overlap_predicts_gain", 0.5, 0.1, 0.8, 2)))
    made(tmp_path, "experiment", claims={"copd_over_mopd": finding("copd_over_mopd", 1.0, -1.0, 3.0, 1, "sampled"),
                                         "copd_over_mopd/greedy": finding("copd_over_mopd", 1.0, 0.5, 3.0, 2,
                                         "greedy")})
    page = Page(write_index(tmp_path).read_text())
    assert [e.name for e in entries(tmp_path)] == ["experiment", "pilot"]  # as studies are ordered
    assert {"experiment-quick/experiment.html", "experiment-quick/results.json",
            "pilot-quick/pilot.html"} <= set(page.hrefs())
    for href in page.hrefs(): assert href.startswith("#") or (tmp_path / href).is_file()
    # the title of the report's notebook
    assert "Every paradigm, one budget" in page.text and "preset quick · seeds 0, 1 · 20" in page.text
    every = [c for claims in sources().values() for c in claims]
    for c in every: assert c.text in page.text
    measured = set(re.findall(r"(\d+) × ([a-z ]+?)(?=\d|\n|$)", page.text))
    assert sum(int(n) for n, _ in measured) == len(every) and ("1", "holds") not in measured
    # a headline that is a table has its sentences beside it
    assert "It is made up." in page.text and "It is." in page.text
    assert not any(tag in ("script", "img", "link", "iframe") for tag, _ in page.elements)


def test_hostile_names_stay_text(tmp_path):
    found = finding("copd_over_mopd", 1.0, -1.0, 3.0, 2, HOSTILE)
    made(tmp_path, "x", HOSTILE + "\n\n![p](https://example.org/p.png) [l](javascript:alert(1))",
         {"copd_over_mopd": found, HOSTILE: found}, preset="q", limits=[HOSTILE], page=False)
    record = json.loads((tmp_path / "x-q" / "results.json").read_text())
    record |= dict(report=HOSTILE, environment=dict(started=HOSTILE, commit=HOSTILE, versions=dict(copd_nb=HOSTILE)),
                   parameters=dict(preset=HOSTILE, seeds=[HOSTILE]))
    (tmp_path / "x-q" / "results.json").write_text(json.dumps(record))
    (tmp_path / 'a"><b>').mkdir()
    (tmp_path / 'a"><b>' / "results.json").write_text("{}")
    source = write_index(tmp_path).read_text()
    page = Page(source)
    assert {tag for tag, _ in page.elements} <= set("html head meta title style body main h1 h2 p nav a bdi section "
                                                    "span table thead tbody tr th td article ul li details summary div "
                                                    "strong em".split())
    assert not any(name.startswith("on") for _, attributes in page.elements
                   for name in attributes) and "javascript:" not in "".join(page.hrefs())
    assert HOSTILE in page.text and "can't be read: not a results record" in page.text
    assert "default-src 'none'" in source and not re.search(r"url\(|@import", source)


def test_reports_under_their_former_name_stay_in_their_place(tmp_path):
    for report in ("pilot", "comparison"): made(tmp_path, report)
    (tmp_path / "comparison-quick" / "comparison.html").write_text("<title>One &lt;b&gt;</title><p>page</p>")
    assert [(e.name, e.title) for e in entries(tmp_path)][0] == ("comparison", "One <b>")
    assert "One &lt;b&gt;" in write_index(tmp_path).read_text()


def test_an_index_elsewhere_links_back(tmp_path):
    made(tmp_path / "reports", "experiment")
    report = tmp_path / "reports" / "experiment-quick" / "experiment.html"
    before = report.read_text()
    page = write_index(tmp_path / "reports", tmp_path / "site" / "all.html")
    assert "../reports/experiment-quick/experiment.html" in Page(page.read_text()).hrefs()
    assert report.read_text() == before  # nobody asked for another page


def test_the_title_is_that_of_the_executed_notebook(tmp_path):
    made(tmp_path, "experiment")
    cells = [nbformat.v4.new_markdown_cell("intro\n\n# My <own> title\n\n> sub")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "experiment-quick" / "experiment.ipynb")
    assert entries(tmp_path)[0].title == "My <own> title" and "My &lt;own&gt; title" in write_index(
        tmp_path).read_text()


def test_no_reports_is_an_error(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 2 and "no report in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_publishing_copies_pages_and_records(tmp_path, capsys):
    source, target = tmp_path / "runs", tmp_path / "docs"
    made(source, "experiment")
    (source / "experiment-quick" / "experiment.ipynb").write_text('{"cells": []}')
    (source / "experiment-quick" / "gap.parquet").write_text("large")
    assert main(["index", str(source), "--publish", str(target)]) == 0 and "index.html" in capsys.readouterr().out
    made(tmp_path / "later", "pilot")
    publish(tmp_path / "later", target)  # what is there already stays
    files = {f.relative_to(target).as_posix() for f in target.rglob("*") if f.is_file()}
    assert files == {"index.html", *(f"{r}-quick/{f}" for r in ("experiment", "pilot")
                                     for f in (f"{r}.html", "results.json"))}
    for href in Page((target / "index.html").read_text()).hrefs():
        assert href.startswith("#") or (target / href).is_file()


def embedded(picture) -> str:
    "A picture as pages hold it."
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_publishing_makes_pictures_smaller_and_changes_nothing_that_is_seen(tmp_path):
    "Figures of few colours are equal; see-through ones, tiny ones and what is no picture stay as they are."
    figure, axes = plt.subplots()
    axes.plot([1, 3, 2])
    figure.savefig(out := io.BytesIO(), format="png")
    plt.close(figure)
    chart = Image.open(out).convert("RGBA")
    kept = [embedded(Image.new("RGBA", (9, 9), (0, 80, 160, 90))), "data:image/png;base64,AAAA",
            "data:image/png;base64,A"]
    source, target = tmp_path / "runs", tmp_path / "docs"
    made(source, "pilot")
    page = source / "pilot-quick" / "pilot.html"
    page.write_text(" ".join(f'<img src="{p}">' for p in (embedded(chart), *kept)))
    publish(source, target)
    html = (target / "pilot-quick" / "pilot.html").read_text()
    first, *others = re.findall('src="([^"]*)"', html)
    assert others == kept and len(first) < 0.7 * len(embedded(chart))
    again = Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))).convert("RGB")
    apart = np.abs(np.asarray(again, int) - np.asarray(chart.convert("RGB"), int))
    assert again.size == chart.size and apart.max() <= 24 and apart.mean() < 0.2
    publish(target, tmp_path / "twice")
    assert (tmp_path / "twice" / "pilot-quick" / "pilot.html").read_text() == html


def test_publishing_has_a_limit_and_leaves_all_as_it_was(tmp_path):
    source, target = tmp_path / "runs", tmp_path / "docs"
    for report, size in (("experiment", 300_000), ("pilot", 900_000)):
        made(source, report)
        (source / f"{report}-quick" / f"{report}.html").write_text("x" * size)
    with pytest.raises(ValueError, match=r"1\.2 MB are too much to publish \(at most 1\.0\): the largest are "
                                         r"pilot-quick/pilot\.html \(0\.9 MB\), experiment-quick/experiment\.html "
                                         r"\(0\.3 MB\)"):
        publish(source, target, limit=1_000_000)
    assert not target.exists() and publish(source, target, limit=1_300_000).is_file()
    (source / "pilot-quick" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="pilot-quick: not a results record"): publish(source, target)


FAKE = """
from copd_nb.analysis.records import write_results
import pandas as pd
write_results(out_dir, {name!r}, dict(preset=preset, seeds=[0]), "ran with " + str({extra}), dict(), [], ["made up"])
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    "A checkout with tiny studies: one is fine, one fails, one isn't a study."
    folder = tmp_path / "nbs" / "reports"
    folder.mkdir(parents=True)
    bodies = dict(pilot=("size = 1", FAKE.format(name="pilot", extra="size")),
                  experiment=("wide = 1", "raise RuntimeError('no base\\nat all')"),
                  tuning=("deep = 1", "raise ValueError('never run')"))
    for name, (parameter, body) in bodies.items():
        cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\n> fake"),
                 nbformat.v4.new_code_cell(f'preset = "quick"\nout_dir = ""\n{parameter}',
                                           metadata=dict(tags=["parameters"])),
                 nbformat.v4.new_code_cell(body)]
        nb = nbformat.v4.new_notebook(cells=cells,
                                      metadata=dict(kernelspec=dict(name="python3", display_name="python3",
                                      language="python"), language_info=dict(name="python")))
        nbformat.write(nb, folder / f"{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return tmp_path


def test_all_studies_run_and_one_failure_stops_none(fakes, capsys):
    assert studies() == ["experiment", "pilot"]
    made(fakes / "runs" / "reports", "experiment", preset="tiny")
    assert main(["report", "all", "-p", "preset", "tiny", "-p", "size", "7"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "copd: report experiment failed: RuntimeError: no base" and "Traceback" not in err
    assert re.search(r"experiment +failed +\d+ s\n", out) and re.search(r"pilot +done +\d+ s\n",
            out) and "runs/reports/index.html" in out
    assert read_results("runs/reports/pilot-tiny/results.json")["headline"] == "ran with 7"
    # an older result doesn't stand for a failed run
    assert not Path("runs/reports/experiment-tiny/results.json").exists()
    assert read_results("runs/reports/experiment-tiny/earlier/results.json")["headline"] == "Found *it*."
    index = Path("runs/reports/index.html").read_text()
    assert "ran with 7" in index and "experiment-tiny" not in index


def test_a_parameter_that_no_study_knows_is_an_error_before_anything_runs(fakes, capsys):
    for words in (["deep", "3"], ["sizes", "7"], ["out_dir", "x"]):
        assert main(["report", "all", "-p", *words]) == 2
        error = f"no study has the parameters ['{words[0]}']: known to some are ['preset', 'size', 'wide']"
        assert error in capsys.readouterr().err
    assert not (fakes / "runs").exists()


def test_where_all_is_well_nothing_is_told(fakes):
    (fakes / "nbs" / "reports" / "experiment.ipynb").unlink()
    assert run_all(dict(preset="tiny"), fakes / "out",
                   progress=False) == {} and (fakes / "out" / "index.html").is_file()


def test_claims_are_measured_by_studies():
    assert len(set(STUDIES)) == len(STUDIES) and studies() == [s for s in STUDIES if s in report_names()]
    assert {c.report for c in CLAIMS} <= set(STUDIES)


def test_check_prints_all_problems_and_a_summary(tmp_path, capsys):
    data, test = tmp_path / "data.jsonl", tmp_path / "test.jsonl"
    data.write_text('{"question": "2+3=", "answer": "5"}\n{"question": 7, "answer": "x"}\n{')
    test.write_text('{"question": "2+3= ", "answer": "5"}')
    assert main(["check", str(data), "--column", "prompt=question"]) == 1
    out = capsys.readouterr().out
    assert "'question' is 7" in out and "is not JSON" in out and out.splitlines()[-1] == "2 problems in 2 rows"
    assert main(["check", str(test), "--column", "prompt=question", "--reward",
                 "numeric"]) == 0 and "no problems found in test.jsonl" in capsys.readouterr().out
    assert main(["check", str(test), "--column", "prompt=question", "--test",
                 str(test)]) == 1 and "is held out in row 1 of test.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["none.jsonl"], "there is no data file none.jsonl"),
    (["{data}", "--reward", "exakt"], "there is no reward 'exakt'"),
    (["{data}", "--column", "question"], "NAME=COLUMN is needed"),
    (["{data}", "--column", "where=x"], "names are prompt, answer"),
    (["{data}", "--recipe", "gsm"], "there is no recipe 'gsm': aime-2024"),
    (["{data}", "--model", "none"], "there is no checkpoint in none")])
def test_check_refuses_what_is_misspelt(tmp_path, capsys, words, message):
    (tmp_path / "data.jsonl").write_text('{"prompt": "2+3=", "answer": "5"}')
    assert main(["check", *(w.format(data=tmp_path / "data.jsonl") for w in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_check_knows_recipes(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "2+3=", "answer": "It is 5.\\n#### 5"}\n{"question": "3+3=", "answer": "6"}')
    assert main(["check", str(data), "--recipe", "gsm8k"]) == 1
    assert "holds no answer" in (out := capsys.readouterr().out) and "1 problems in 1 rows" in out
    assert main(["check", str(data), "--recipe", "gsm8k", "--column", "images=a,b", "--reward",
                 "exact"]) == 1 and "'a'" in capsys.readouterr().out


def test_copd_fetch_refuses_unknown_names(capsys):
    assert main(["fetch", "gpt"]) == 2 and "no model 'gpt' to fetch: smollm2" in capsys.readouterr().err


HEAVY = {"torch", "transformers", "pandas", "papermill", "matplotlib", "datasets", "ray"}


def imported_by(code):
    "Top-level modules that a fresh Python has loaded after some code."
    lines = [code, "import sys", "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_importing_the_package_and_asking_for_help_load_nothing_heavy():
    assert not HEAVY & imported_by("import copd_nb")
    assert not HEAVY & imported_by("from copd_nb.report.command import main\nmain(['--help'])")
    assert "torch" in imported_by("from copd_nb import Policy")  # the test would see it


OURS = """from copd_nb import copd, minis, minis_base

def plan(s_rl=1): return copd(["text", "image"], cycles=1, s_rl=s_rl, s_opd=1)

def suite(): return minis(("text", "image")), minis_base()

class Slow:
    calls = 0
    def __call__(self, *args, **options):
        from copd_nb.signals.sampling import sample_many
        Slow.calls += 1
        return sample_many(*args, **options)
"""
SMALL = ["prompts", "2", "opd_prompts", "2", "group_size", "2", "max_new_tokens", "3", "probe_every", "0", "eval_every",
         "0",
         "device", "cpu"]


def test_train_takes_a_schedule_a_suite_and_a_sampler_of_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "our_parts.py").write_text(OURS)
    config = [word for name, value in zip(SMALL[::2], SMALL[1::2]) for word in ("-c", name, value)]
    words = ["train", "our_parts:plan", "-p", "s_rl", "2", "--suite", "our_parts:suite", "--sampler", "our_parts:Slow"]
    assert main([*words, "--out", "mine", *config]) == 0
    assert "finished" in capsys.readouterr().out and sys.modules["our_parts"].Slow.calls
    for wrong in (["train", "our_parts:nothing"], ["train", "nowhere:plan"], ["train", "our_parts:SMALL"],
                  ["train", "copd", "--suite", "our_parts:plan2"],
                  ["train", "our_parts:plan", "--learner", "our_parts:plan"],
                  ["train", "our_parts:plan", "--sampler", "unknown"]):
        assert main([*wrong, "--out", "other"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("copd: ") and len(error.splitlines()) == 1, error
    assert not (tmp_path / "other").exists()


def test_one_parser_knows_every_command():
    asked = parser().parse_args(["report", "checkpoints", "-p", "samples", "2", "-p", "seed", "3"])
    assert (asked.command, asked.name, asked.p) == ("report", "checkpoints", [["samples", "2"], ["seed", "3"]])
    with pytest.raises(SystemExit): parser().parse_args(["reprot"])

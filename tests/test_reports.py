"Reports: parameters are checked, a smoke run leaves notebook, HTML and results."
import json
import re

import pytest

from copd_nb.reports import check_parameters, main, notebook_of, parameters_of, report_names, run_report


def test_reports_are_found_and_have_parameters():
    assert {"comparison", "sweep", "warmstart"} <= set(report_names())
    assert {"preset", "capabilities", "seeds"} <= set(parameters_of("comparison"))


def test_unknown_parameter_lists_the_known_ones(capsys):
    with pytest.raises(ValueError, match=r"no parameters \['presets'\].*'preset'"): check_parameters("comparison", dict(presets="quick"))
    assert main(["report", "comparison", "-p", "presets", "quick"]) == 2
    error = capsys.readouterr().err
    assert "presets" in error and "'preset'" in error and "Traceback" not in error


def test_unknown_report_lists_the_known_ones(capsys):
    with pytest.raises(ValueError, match="unknown report 'comparisson'.*comparison"): notebook_of("comparisson")
    assert main(["report", "../comparison"]) == 2


def test_help_and_lists(capsys, tmp_path):
    with pytest.raises(SystemExit) as end: main(["--help"])
    assert end.value.code == 0 and "report" in capsys.readouterr().out
    assert main(["reports"]) == 0 and "-p preset" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    return run_report("comparison", dict(preset="smoke", store=str(folder / "store")), folder / "out", progress=False)


def test_smoke_run_of_the_comparison(smoke):
    results = json.loads(smoke["results"].read_text())
    assert results["schema"] == "copd_nb.results/1" and results["parameters"]["preset"] == "smoke"
    assert set(results["tables"]) == {f"{s}/{m}" for s in ("two_branch", "three_branch") for m in ("greedy", "sampled")}
    labels = {r["paradigm"] for r in results["tables"]["three_branch/sampled"]}
    assert {"base", "text expert", "image expert", "video expert", "mixed RLVR", "MOPD", "MOPD from text", "merged experts", "CoPD"} == labels
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


def test_html_is_whole_and_needs_no_network(smoke):
    page = smoke["html"].read_text()
    assert "Does CoPD win?" in page and page.count("data:image/png") > 10 and "<svg" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', page)


def test_unknown_preset_is_an_error(tmp_path):
    with pytest.raises(Exception, match="unknown preset 'fast'"): run_report("comparison", dict(preset="fast"), tmp_path, progress=False)

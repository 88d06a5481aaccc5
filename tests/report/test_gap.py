"`copd gap`: base models, answers, one section a pair, and refusals before anything is loaded."
import json
import os
import re
import subprocess
import sys
import time

import pandas as pd
import pytest

from copd_nb.analysis.headroom import answer_scores, headroom
from copd_nb.analysis.records import read_results
from copd_nb.data.files import read_examples
from copd_nb.policy.core import Policy
from copd_nb.policy.skills import text_policy
from copd_nb.report.checks import _check_place, _template
from copd_nb.report.command import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Three base models without chat template and padding token, and prompts, half of them with answers."
    folder = tmp_path_factory.mktemp("gap")
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        policy = text_policy(32, 1, seed=seed)
        policy.processor.chat_template = policy.processor.pad_token = None
        policy.save(folder / name)
    rows = [dict(prompt=f"{i}+{i}=", answer=str(2 * i), capability="sums") for i in range(6)]
    rows += [dict(prompt=f"say <b>{i}</b>", capability="open") for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def gap(models, *words):
    names = [str(models / w) if w in ("one", "two", "three", "nothere") else w for w in words]
    return main(["gap", *names, "--prompts", str(models / "prompts.jsonl")])


BASE = ("--chat-template", "plain", "--pad-token", "<eos>")


@pytest.fixture(scope="module")
def page(models):
    eos = text_policy(32, 1).tokenizer.eos_token
    code = gap(models, "one", "two", "three", *BASE[:3], eos, "--max-new-tokens", "4", "--k", "3", "--samples", "2",
               "--reward", "format?pattern=.", "--out", str(models / "out"))
    assert code == 0
    return (models / "out" / "checkpoints.html").read_text(), read_results(models / "out" / "results.json")


@pytest.mark.integration
def test_the_page_begins_with_the_answer(page):
    html, record = page
    assert html.index("something to gain?") < html.index("Pair by pair") < html.index("Weights")
    rows = record["tables"]["answer"]
    assert [(r["student ← teacher"], r["prompts"]) for r in rows] == [
        (pair, kind) for pair in ("one ← two", "one ← three", "two ← three") for kind in ("sums (6)", "open (4)")]
    assert all(r["something to gain?"].startswith("not known") == r["prompts"].startswith("open") for r in rows)
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", r["overlap@3"]) for r in rows)
    assert len(record["shown"]) == 6 and all("something to gain?" in s for s in record["shown"])
    assert "&lt;b&gt;" in html and "<b>1</b>" not in html


@pytest.mark.integration
def test_the_figures_are_those_of_the_analysis(page, models):
    _, record = page
    tokens = pd.read_parquet(models / "out" / "gap.parquet")
    part = tokens[(tokens.a == "one") & (tokens.b == "two") & (tokens.owner == "a") & (tokens.capability == "sums")]
    step = {r["metric"]: r["value"] for r in record["tables"]["step"]
            if (r["a"], r["b"], r["owner"], r["capability"]) == ("one", "two", "a", "sums")}
    assert step["abs_delta"] == pytest.approx(part.delta.abs().mean())
    assert step["moved"] == pytest.approx((part.delta.abs() > 0.01).mean())
    eos = text_policy(32, 1).tokenizer.eos_token
    loaded = {n: Policy.load(models / n, n, chat_template="plain", pad_token=eos) for n in ("one", "two")}
    scores = answer_scores(loaded, read_examples(models / "prompts.jsonl"), {"sums": "format?pattern=."}, 2,
                           max_new_tokens=4)
    expected = headroom(scores, "one", "two").iloc[0]
    stated, = record["tables"]["headroom/one/two"]
    assert (stated["student"], stated["teacher"]) == pytest.approx((expected.student, expected.teacher))
    assert stated["value"] == pytest.approx(expected.value) and stated["examples"] == 6


@pytest.mark.integration
def test_one_section_a_pair_and_no_weights_beside_themselves(page):
    html, record = page
    titles = re.findall(r"<h2[^>]*>(Student .*?)</h2>", html)
    assert titles == [f"Student {a}, teacher {b}" for a, b in (("one", "two"), ("one", "three"), ("two", "three"))]
    heads = re.findall(r"<h3[^>]*>(.*?)</h3>", html)
    assert heads.count("Where they differ most") == 3 and heads.count("two minus one") == 1
    assert "Cosine of the directions" not in heads and "<th>norm of b<" not in html  # one difference, one direction


def refused(capsys, code):
    said = capsys.readouterr().err.split("copd: ")[-1].strip()
    assert code == 2 and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("words, message", [
    (("one", "nothere"), "there is no checkpoint '.*nothere': a folder, a GGUF file or a hub name"),
    (("one", "two"), "one has no chat template: --chat-template plain"),
    (("one", "two", "--chat-template", "plain"), "has no padding token: --pad-token gives one, for instance .*'.+'"),
    (("one", "two", "--chat-template", "none.jinja"), "--chat-template 'none.jinja' is no file"),
    (("one", "two", *BASE, "--reward", "nope"), "there is no reward 'nope'"),
    (("one",), "at least two checkpoints")])
def test_refusals(words, message, models, capsys):
    begun = time.monotonic()
    assert re.search(message, refused(capsys, gap(models, *words)))
    assert time.monotonic() - begun < 2


def test_refusals_load_no_torch(models):
    code = ("import sys; from copd_nb.report.command import main; "
            f"status = main(['gap', '{models}/one', 'models/nothere', '--prompts', '{models}/prompts.jsonl']); "
            "assert status == 2 and 'torch' not in sys.modules, status")
    (models / "models").mkdir(exist_ok=True)
    ran = subprocess.run([sys.executable, "-c", code], cwd=models, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0 and "there is no checkpoint 'models/nothere'" in ran.stderr, ran.stderr


def test_names_of_a_hub_are_no_missing_folders(models, monkeypatch):
    monkeypatch.chdir(models)
    for name in ("gpt2", "org/model-1.5B", "one"): _check_place(name)
    for name in ("./one/x", "../x", "/none", "a/b/c", "one/x", "x.y/", "~/x"):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"): _check_place(name)


def test_templates_are_a_word_a_file_or_a_text(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert _template("plain") == "plain" and _template(None) is None
    assert _template(str(tmp_path / "t.jinja")) == _template("{{ messages }}") == "{{ messages }}"


@pytest.mark.integration
def test_a_reward_without_answers_is_refused(models, capsys):
    (models / "open.jsonl").write_text(json.dumps(dict(prompt="say")))
    eos = text_policy(32, 1).tokenizer.eos_token
    code = main(["gap", str(models / "one"), str(models / "two"), "--prompts", str(models / "open.jsonl"),
                 *BASE[:3], eos, "--reward", "exact", "--out", str(models / "refused")])
    assert "no row of open.jsonl has an answer" in refused(capsys, code)

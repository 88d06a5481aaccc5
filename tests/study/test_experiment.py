"An experiment: what its file may say, what is refused and where, what it becomes."
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from copd_nb.data.names import imported
from copd_nb.engine.config import Config
from copd_nb.report.command import main
from copd_nb.schedule.local import synced_copd
from copd_nb.schedule.rows import Choice
from copd_nb.study import checking, experiment
from copd_nb.study.checking import data_faults, own_code
from copd_nb.study.drafting import OPEN, draft
from copd_nb.study.experiment import QUICK, Experiment, read_experiment, rows_of, settings_of
from copd_nb.study.variants import placebo_copd

TEXT = """\
model: models/mine
capabilities:
  math: {file: math.jsonl, reward: numeric, columns: {prompt: question}}
  sort: {file: sort.jsonl, reward: exact, columns: {prompt: question}}
paradigms: [expert, mixed, copd: {s_rl: 6, s_opd: 4}]
config: {prompts: 4, learning_rate: 1e-4}
steps: 20
"""


def lines(path, rows): path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def file(tmp_path):
    lines(tmp_path / "math.jsonl", [dict(question=f"{a}+{b}=", answer=a + b) for a in range(8) for b in range(8)])
    sort = [dict(question=f"sort {a}{b}", answer="".join(sorted(a + b))) for a in "xyzt" for b in "abcd"]
    lines(tmp_path / "sort.jsonl", sort)
    (tmp_path / "mine.yaml").write_text(TEXT)
    return tmp_path / "mine.yaml"


def test_a_file_becomes_an_experiment(file):
    exp = read_experiment(file)
    assert exp.title == "mine" and exp.steps == 20 and exp.seeds == (0, 1, 2) and exp.folder == file.parent
    assert exp.config == Config(prompts=4, learning_rate=1e-4) and exp.evaluation["prompts"] == 128
    assert {n: s.capabilities for n, s in settings_of(exp).items()} == dict(all=("math", "sort"))
    assert [p.label for p in rows_of(exp)["all"]] == ["math expert", "sort expert", "mixed RLVR", "CoPD"]


def test_a_question_is_kept_and_is_no_part_of_a_configuration(file):
    plain = read_experiment(file)
    file.write_text("question: Does sorting cost arithmetic?\n" + TEXT)
    asked = read_experiment(file)
    assert plain.question is None and asked.question == "Does sorting cost arithmetic?"
    assert asked.config == plain.config and rows_of(asked) == rows_of(plain)
    file.write_text("question: [1]\n" + TEXT)
    with pytest.raises(ValueError, match="question"): read_experiment(file)


def test_presets_replace_parts_and_cycles_fit(file):
    file.write_text(TEXT + "presets: {tiny: {steps: 3, config: {prompts: 2}, seeds: [5]}}\n")
    tiny, quick = read_experiment(file, "tiny"), read_experiment(file, "quick")
    assert (tiny.steps, tiny.seeds, tiny.config.prompts, tiny.config.learning_rate) == (3, (5,), 2, 1e-4)
    assert rows_of(tiny)["all"][-1].schedule.total_steps == 6
    assert quick.steps == QUICK["steps"] and rows_of(quick)["all"][-1].schedule.total_steps == 2 * quick.steps
    with pytest.raises(ValueError, match="no preset 'tinny': quick, tiny"): read_experiment(file, "tinny")


@pytest.mark.parametrize("row, fits", [
    ("placebo_copd", True), ("placebo_copd: {s_rl: 6, s_opd: 4}", True), ("synced_copd: {s_rl: 2, s_opd: 2}", True),
    ("synced_copd", False), ("merged", False)])
def test_every_row_with_cycles_fits_a_short_trial(file, row, fits):
    "Five steps are one cycle in a row's own proportion; rows whose cycles fit, or that have none, stay as they are."
    file.write_text(TEXT.replace("copd: {s_rl: 6, s_opd: 4}", row))
    listed, quick = (read_experiment(file, preset) for preset in (None, "quick"))
    assert (quick.paradigms[-1] != listed.paradigms[-1]) == fits
    assert rows_of(quick)["all"][-1].schedule.total_steps == 2 * QUICK["steps"]


@pytest.mark.parametrize("old, new, line, words", [
    ("model:", "modle:", 1, "did you mean 'model'"), ("reward: numeric", "reward: numerik", 3, "no reward 'numerik'"),
    ("file: math.jsonl, reward: numeric", "file: math.jsonl", 3, "a reward is needed"),
    ("file: math.jsonl", "task: algebraa", 3, "no task 'algebraa'"),
    ("{prompt: question}", "{promt: question}", 3, "did you mean"),
    ("file: math.jsonl, ", "", 3, "one of file and task"), ("s_rl: 6", "s_rll: 6", 5, "did you mean 's_rl'"),
    ("mixed", "mixt", 5, "no paradigm 'mixt'"), ("prompts: 4", "prompts: four", 6, "a whole number"),
    ("1e-4", "-1", 6, "must be positive"), ("1e-4", "high", 6, "a number is needed"),
    ("steps: 20", "steps: 15", 5, "take 10"),
    ("steps: 20", "seeds: [1, 1]", 7, "listed twice"), ("  math:", "  ma/th:", 3, "not allowed"),
    ("steps: 20", "together: {pair: [math, srot]}", 7, "no capability 'srot'"),
    ("steps: 20", "together: {pair: [math]}", 7, "at least two"),
    ("steps: 20", "evaluation: {untrained: [math]}", 7, "without together every capability is trained"),
    ("steps: 20", "evaluation: {untrained: [srot]}", 7, "no capability 'srot'"),
    ("steps: 20", "together: {pair: [math, sort]}\nevaluation: {untrained: [sort]}", 8, "'sort' is trained by"),
    ("steps: 20", "suite: minis", 1, "either suite"),
    ("steps: 20", "tuning: {seeds: [1]}", 7, "tuning needs others"),
    ("model: models/mine", "model: {path: m, dtype: bfloat16}", 1, "would round small updates away"),
    ("steps: 20", "presets: {p: {paradigms: [nope]}}", 7, "no paradigm 'nope'")])
def test_every_mistake_has_its_line(file, old, new, line, words):
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    file.write_text(text)
    with pytest.raises(ValueError, match=f"line {line}: .*{words}") as found: read_experiment(file)
    assert str(file) in str(found.value)


def test_the_same_mistakes_in_python():
    with pytest.raises(ValueError, match="capabilities.math: a reward is needed"):
        Experiment(model="m", capabilities={"math": {"file": "x.jsonl"}}, steps=20)
    with pytest.raises(ValueError, match="either suite, or model"): Experiment(steps=20)
    with pytest.raises(ValueError, match="take 20 steps"): Experiment(suite="minis", steps=10)
    with pytest.raises(ValueError, match="'high'"): Experiment(suite="minis", config=dict(learning_rate="high"))
    with pytest.raises(FileNotFoundError, match="no experiment nowhere.yaml: copd init"):
        read_experiment("nowhere.yaml")


def test_reading_imports_neither_torch_nor_code_of_the_file(file):
    code = "open('imported', 'w').write('x')\ndef score(completions, examples): return []\n"
    (file.parent / "mine.py").write_text(code)
    file.write_text(TEXT.replace("reward: exact", "reward: mine:score").replace("mixed", "mine:turns"))
    script = ("import sys; from copd_nb.study.experiment import read_experiment; "
              "from copd_nb.study.checking import data_faults, own_code; e = read_experiment('mine.yaml'); "
              "assert data_faults(e).empty; print(list(own_code(e).name), list(own_code(e).place), "
              "[f for f in own_code(e).file], 'torch' in sys.modules or 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['mine:score', 'mine:turns'] ['capabilities.sort.reward', 'paradigms.1'")
    assert "mine.py" in done.stdout and done.stdout.rstrip().endswith("False")
    assert not (file.parent / "imported").exists()


@pytest.mark.parametrize("reward", [
    "mine:score", "mine:score?x=1", '{"name": "mine:score"}', '{"name": "sum", "parts": [[1, "mine:score"]]}',
    'sum?parts=[[1,"mine:score"]]', dict(name="mine:score"), dict(name="sum", parts=[[1, "exact"], [1, "mine:score"]])])
def test_no_way_to_write_a_reward_runs_code_before_it_may(file, monkeypatch, capsys, reward):
    "A reference may hide in JSON inside of a text: it is listed, and imported with --run-code only."
    monkeypatch.chdir(file.parent)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    code = "open('imported', 'w')\ndef score(completions, examples, x=0): return [0.0] * len(completions)\n"
    (file.parent / "mine.py").write_text(code)
    file.write_text(TEXT.replace("reward: exact", f"reward: {json.dumps(reward)}"))
    assert main(["check", "mine.yaml"]) == 0 and "mine:score" in capsys.readouterr().out
    assert not (file.parent / "imported").exists() and "mine" not in sys.modules
    assert main(["check", "mine.yaml", "--run-code", "--prompts", "0"]) == 0
    assert (file.parent / "imported").exists()
    monkeypatch.delitem(sys.modules, "mine")


@pytest.mark.parametrize("name, maker", [
    ("copd", Choice), ("placebo_copd", placebo_copd), ("synced_copd", synced_copd)])
def test_cycles_of_a_row_are_its_function_s(name, maker):
    "A trial is shortened from the defaults that the row has."
    known = inspect.signature(maker).parameters
    assert experiment._CYCLES[name] == tuple(known[k].default for k in ("s_rl", "s_opd"))


def test_a_check_shows_the_weight_of_distillation(file, monkeypatch, capsys):
    "Names alone have different ones, which nobody should have to know."
    monkeypatch.chdir(file.parent)
    file.write_text(TEXT.replace("[expert, mixed, copd: {s_rl: 6, s_opd: 4}]", "[mixed, copd, placebo_copd]"))
    assert main(["check", "mine.yaml", "--prompts", "0"]) == 0
    said = [line.split("the other")[1] for line in capsys.readouterr().out.splitlines() if "after the other" in line]
    assert said == ["", ", β 1", ", β 0.1"]


def test_a_paradigm_that_hides_is_not_imported_either(file, monkeypatch, capsys):
    "What the list misses meets the closed door."
    monkeypatch.chdir(file.parent)
    (file.parent / "hidden.py").write_text("open('imported', 'w')\n")
    monkeypatch.setattr(checking, "own_code", lambda experiment: pd.DataFrame(columns=["place", "name", "file"]))
    file.write_text(TEXT.replace("mixed", "hidden:turns"))
    assert main(["check", "mine.yaml"]) == 2 and "none is imported here" in capsys.readouterr().err
    assert not (file.parent / "imported").exists()


def test_code_in_every_place_is_listed(file):
    file.write_text(TEXT.replace("reward: numeric", "reward: {name: sum, parts: [[1, 'a.b:c'], [1, exact]]}")
                    .replace("s_rl: 6", "estimator: my_est:E, s_rl: 6"))
    assert set(own_code(read_experiment(file)).name) == {"a.b:c", "my_est:E"}


def test_faults_of_the_data_name_the_capability(file):
    assert data_faults(read_experiment(file)).empty
    with open(file.parent / "math.jsonl", "a") as f: f.write('{"question": "1+1=", "answer": "two"}\n')
    found = data_faults(read_experiment(file))
    assert list(found.capability.unique()) == ["math"] and found.problem.str.contains("two").any()
    (file.parent / "sort.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="capabilities.sort.file: there is no file"):
        data_faults(read_experiment(file))


def test_a_draft_can_be_read_and_says_what_is_open(file, tmp_path):
    text, guesses = draft([tmp_path / "math.jsonl", tmp_path / "sort.jsonl"], "models/mine", file)
    file.write_text(text)
    exp = read_experiment(file)
    assert list(exp.capabilities) == ["math", "sort"] and exp.capabilities["math"]["file"] == "math.jsonl"
    assert exp.capabilities["math"]["reward"].startswith("numeric") and exp.model["lora"] == 16
    essays = [dict(question=f"Write about {i}", answer="word " * 80 + str(i)) for i in range(20)]
    lines(tmp_path / "essay.jsonl", essays)
    text, guesses = draft([tmp_path / "math.jsonl", tmp_path / "essay.jsonl"], None, file)
    assert guesses[1].open == ["reward"] and text.count(OPEN) == 2
    file.write_text(text)
    with pytest.raises(ValueError, match=f"no reward '{OPEN}'"): read_experiment(file)
    with pytest.raises(ValueError, match="two capabilities"): draft([tmp_path / "math.jsonl"])
    with pytest.raises(FileNotFoundError, match="no file .*gone"): draft([tmp_path / "math.jsonl", tmp_path / "gone"])
    text, _ = draft([tmp_path / "math.jsonl", tmp_path / "math.jsonl"], "m", file)
    file.write_text(text)
    assert list(read_experiment(file).capabilities) == ["math", "math-2"]


def test_the_shipped_experiment_and_the_examples_are_valid():
    for preset in (None, "smoke", "quick", "standard", "full"):
        exp = read_experiment("minis", preset)
        assert len(rows_of(exp)) == 2
        assert not set(exp.seeds) & set(exp.tuning["seeds"])
    folder = Path(imported("copd_nb:__file__")).parents[1] / "examples"
    assert len(list(folder.glob("*.yaml"))) >= 3
    for path in folder.glob("*.yaml"): assert rows_of(read_experiment(path))

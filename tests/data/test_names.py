"Objects by name: built-in, by reference, or the object itself; errors name the reference and where it was looked for."
import json
import sys
from functools import partial

import pytest

from copd_nb.analysis.audits import audit
from copd_nb.data.capability import Capability, Example
from copd_nb.data.files import capability_from
from copd_nb.data.names import OwnCode, imported, later, named, nearest, with_options, without_own_code
from copd_nb.data.recipes import from_recipe
from copd_nb.data.rewards import Exact, LengthPenalty
from copd_nb.data.tasks import task
from copd_nb.data.verifiers import named_reward
from copd_nb.data.faults import problems

MODULE = '''
def half(completions, examples): return [0.5] * len(completions)
def near(completions, examples, by=1):
    return [float(abs(int(c) - int(e.answer)) <= by) for c, e in zip(completions, examples)]
class Long:
    def __init__(self, than=3): self.than = than
    def __call__(self, completions, examples): return [float(len(c) > self.than) for c in completions]
long = Long(1)
class Mute:
    pass
number = 3
def one_argument(completions): return []
def tiny(size=2):
    from copd_nb.data.capability import Capability, Example
    made = [Example(str(i), str(i), "tiny") for i in range(size + 1)]
    return Capability("tiny", made[:size], made[size:], half)
'''
PAIR = [Example("1+1=", "2", "sums"), Example("4+4=", "8", "sums")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with a module of one's own."
    (tmp_path / "mine_of_names.py").write_text(MODULE)
    (tmp_path / "broken_of_names.py").write_text("def f(:")
    (tmp_path / "needing_of_names.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.endswith("_of_names")]: del sys.modules[name]


def test_the_working_directory_counts_and_comes_last(here):
    (here / "json.py").write_text("loads = 3")
    assert imported("mine_of_names:number") == 3 and imported("json:loads") is json.loads
    assert imported("copd_nb.data.rewards:Exact.__call__") is Exact.__call__


@pytest.mark.parametrize("reference, said", [
    ("no_such_module:f", "reward 'no_such_module:f': no module no_such_module in .*{here}.* or among the installed"),
    ("copd_nb.nothing:f", "no module copd_nb.nothing in .*{here}"), ("mine_of_names:nothing", "no nothing; .*{here}"),
    ("mine_of_names:Long.nothing", "mine_of_names has no Long.nothing"),
    ("broken_of_names:f", "failed with SyntaxError"),
    ("needing_of_names:f", "needs a missing module: .*no_such_package"), ("mine_of_names", "write package.module:name"),
    (":f", "write package.module:name"), ("mine_of_names:", "write package.module:name"),
    ("..:f", "importing .. failed"),
    ("math:nothing", "math has no nothing; the module was found in ")])
def test_what_can_not_be_imported_is_named(here, reference, said):
    with pytest.raises(ValueError, match=said.format(here=here.name)): imported(reference, "reward")


def test_three_ways_to_name_an_object():
    builtin = {"root": "math:sqrt", "text": str}
    assert named("root", builtin, "function")(9) == 3 and named("text", builtin, "function") is str
    assert named(abs, builtin, "function") is abs
    assert named("math:pi", {}, "number", float) == pytest.approx(3.14, abs=.01)
    with pytest.raises(ValueError, match=r"no function 'rot' \(did you mean 'root'\?\): one of root, text, or package"):
        named("rot", builtin, "function")
    with pytest.raises(ValueError, match="number 'math:sqrt' is a builtin_function_or_method: expected float or int"):
        named("math:sqrt", {}, "number", (float, int))
    with pytest.raises(TypeError, match="function 3 is a int: expected something callable"):
        named(3, builtin, "function")


@pytest.mark.parametrize("text, found", [
    ("skills", ("skills", {})), ("skills?names=add,mirror&noise=0.2", ("skills", dict(names="add,mirror", noise=.2))),
    ("a.b:c?x=[1]&y=", ("a.b:c", dict(x=[1], y=""))), ("t?s=%26", ("t", dict(s="&")))])
def test_options(text, found): assert with_options(text) == found


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="'t\\?x': bad query field: 'x'"): with_options("t?x")


def test_methods_of_later_modules():
    class Number(float):
        root, half, size = later("math:sqrt"), later("operator:neg", "property"), later("math:isqrt", "static")
    assert Number(9).root() == 3 and Number(9).half == -9 and Number.size(17) == Number(2).size(17) == 4


# rewards

def test_rewards_by_reference(here):
    assert named_reward("mine_of_names:half")(["a"], PAIR[:1]) == [.5]
    assert named_reward("mine_of_names:near?by=2")(["4", "5"], PAIR) == [1, 0]
    assert named_reward("mine_of_names:long")(["ab"], PAIR[:1]) == [1]
    assert named_reward("mine_of_names:Long?than=1")(["ab"], PAIR[:1]) == [1] == named_reward(
        {"name": "mine_of_names:Long", "than": 1})(["ab"], PAIR[:1])
    assert named_reward("mine_of_names:Long")(["ab"], PAIR[:1]) == [0]
    assert named_reward("copd_nb.data.rewards:LengthPenalty?budget=2") == LengthPenalty(2)
    mixed = named_reward({"name": "sum", "parts": [[1, "exact"], [1, "mine_of_names:half"]]})
    assert mixed(["2"], PAIR[:1]) == [1.5]
    assert named_reward(Exact("")) == Exact("")


@pytest.mark.parametrize("name, said", [
    ("mine_of_names:number", "reward 'mine_of_names:number' is 3: a function"), ("mine_of_names:Mute", "is <.*Mute"),
    ("mine_of_names:one_argument", "is <function one_argument.*: a function \\(completions, examples\\)"),
    ("mine_of_names:near?of=1", "unexpected keyword argument 'of'"), ("mine_of_names:number?x=1", "number"),
    ("mine_of_names:Long?x=1", "'mine_of_names:Long': .*unexpected keyword argument 'x'"),
    ("no_such_module:f?x=1", "no module no_such_module"), (3, "the reward is 3: a function"),
    (len, "the reward is <built")])
def test_rewards_of_the_wrong_kind_are_named(here, name, said):
    with pytest.raises(ValueError, match=said): named_reward(name)


def test_options_of_a_reward_are_part_of_the_fingerprint(here):
    def prints(*names): return {Capability("sums", PAIR[:1], PAIR[1:], named_reward(n)).fingerprint for n in names}
    assert len(prints("mine_of_names:near?by=1", "mine_of_names:near?by=2", "mine_of_names:near")) == 3
    assert len(prints("mine_of_names:near?by=1", partial(imported("mine_of_names:near"), by=1))) == 1


def test_rewards_by_reference_wherever_a_file_is_read(here):
    rows = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(30)] + [dict(prompt="x+1=", answer="x")]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    (here / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = capability_from(here / "rows.jsonl", "sums", "mine_of_names:near?by=3")
    assert made.reward(["9"], [Example("", "6", "sums")]) == [1]
    with pytest.raises(ValueError, match="row 31 of bad.jsonl: the reward raises ValueError"):
        capability_from(here / "bad.jsonl", "sums", "mine_of_names:near")
    found = problems(here / "bad.jsonl", reward="mine_of_names:near")
    assert found.row.tolist() == [31] and "raises ValueError" in found.problem[0]
    with pytest.raises(ValueError, match="no module no_such_module"):
        problems(here / "bad.jsonl", reward="no_such_module:f")
    gsm = [dict(question=f"{i} and 1?", answer=f"#### {i + 1}") for i in range(30)]
    (here / "gsm.jsonl").write_text("\n".join(map(json.dumps, gsm)))
    assert from_recipe("gsm8k", here / "gsm.jsonl",
                       reward="mine_of_names:half").reward is imported("mine_of_names:half")
    assert audit("mine_of_names:half", PAIR, form="{answer}").rates().rate.tolist() == [0, 1, 1]


def test_tasks_by_reference(here):
    assert len(task("mine_of_names:tiny", size=3).train) == 3 and task(imported("mine_of_names:tiny")).name == "tiny"
    with pytest.raises(ValueError, match=r"no arguments \['of'\]: allowed are size"): task("mine_of_names:tiny", of=1)
    with pytest.raises(ValueError, match="gave a Long: a Capability is needed"): task("mine_of_names:Long")


def test_inside_the_block_only_code_of_the_package_is_imported():
    with without_own_code() as refused:
        for reference in ("json:loads", "os:system", "copd_nb.data.names:os.system", "nothing_like_this:f"):
            with pytest.raises(OwnCode, match="none is imported here"): imported(reference, "reward")
        assert imported("copd_nb.data.names:nearest") is nearest
        assert refused == ["json:loads", "os:system", "copd_nb.data.names:os.system", "nothing_like_this:f"]
    assert imported("json:loads") is json.loads

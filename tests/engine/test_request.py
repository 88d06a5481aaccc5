"Schedules, suites, samplers and learners by name: built in, from the working directory, or as objects."
import pytest

from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.config import LEARNERS, Config
from copd_nb.engine.request import part_from, placed, schedule_from, suite_from
from copd_nb.engine.training import train
from copd_nb.engine.update import Learner
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import expert, mixed_rlvr
from copd_nb.signals import replay

PAIR = ["text", "image"]
SMALL = Config(prompts=2, group_size=2, max_new_tokens=2, probe_every=0, eval_every=0, device="cpu")
MODULE = '''
from copd_nb.engine.update import Learner
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.schedule.paradigms import mixed_rlvr
from copd_nb.signals.sampling import sample_many

PLAN = mixed_rlvr(["text", "image"], steps=1)
CALLS = []

def plan(names, steps=1): return mixed_rlvr(names, steps=steps)

def suite(): return minis(("text", "image")), tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)

def sampler(*args, **options):
    CALLS.append("sampler")
    return sample_many(*args, **options)

class MyLearner(Learner):
    def optimizer_step(self, *args):
        CALLS.append("learner")
        return super().optimizer_step(*args)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A module in the working directory; its name."
    (tmp_path / f"mine_{tmp_path.name.replace('-', '_')}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return f"mine_{tmp_path.name.replace('-', '_')}"


@pytest.mark.parametrize("value, expected", [
    ("copd?cycles=2&s_rl=3&s_opd=1", copd(PAIR, cycles=2, s_rl=3, s_opd=1)),
    ("mixed_rlvr?steps=4", mixed_rlvr(PAIR, steps=4)),
    ("expert?steps=2", expert("text", 2)),
    ("copd_nb.schedule.paradigms:mixed_rlvr?steps=4", mixed_rlvr(PAIR, steps=4)),
    (copd(PAIR, cycles=1, s_rl=1, s_opd=1), copd(PAIR, cycles=1, s_rl=1, s_opd=1)),
    (lambda names: mixed_rlvr(names, steps=2), mixed_rlvr(PAIR, steps=2))])
def test_a_schedule_by_name_by_reference_or_as_an_object(value, expected):
    assert schedule_from(value, PAIR) == expected


def test_a_schedule_from_the_working_directory(module):
    assert schedule_from(f"{module}:PLAN", PAIR) == schedule_from(f"{module}:plan", PAIR) == mixed_rlvr(PAIR, steps=1)
    assert schedule_from(f"{module}:plan?steps=3", PAIR) == mixed_rlvr(PAIR, steps=3)


@pytest.mark.parametrize("value, kind, said", [
    ("coped", ValueError, r"schedule 'coped' \(did you mean 'copd'\?\): one of copd, expert"),
    ("copd?cycle=2", ValueError, r"unknown parameter of copd 'cycle' \(did you mean 'cycles'\?\): cycles, "),
    ("copd?cycles=two", ValueError, "copd cycles='two': must be a whole number"),
    ("no_such:plan", ValueError, "no module no_such in "), ("json:nothing", ValueError, "json has no nothing"),
    ("json:decoder", TypeError, "is a module: expected Schedule"),
    ("os:getcwd", TypeError, "is a str: expected Schedule"),
    (3, TypeError, "is a int: expected Schedule")])
def test_a_wrong_name_is_an_error_that_names_it_and_what_is_expected(value, kind, said):
    with pytest.raises(kind, match=said): schedule_from(value, PAIR)


def test_a_learner_or_sampler_is_an_object_a_class_or_a_name(module):
    own = Learner()
    assert part_from(own, LEARNERS, "learner", "optimizer") is own and part_from(None, LEARNERS, "learner", "x") is None
    assert type(part_from(f"{module}:MyLearner", LEARNERS, "learner", "optimizer")).__name__ == "MyLearner"
    with pytest.raises(TypeError, match="learner 'json:loads' is a function: it has no optimizer"):
        part_from("json:loads", LEARNERS, "learner", "optimizer")
    with pytest.raises(ValueError, match="learner 'mine': one of trl, or package.module:name"):
        part_from("mine", LEARNERS, "learner", "optimizer")


def test_a_suite_gives_capabilities_and_base(module):
    capabilities, base = suite_from(f"{module}:suite", None)
    assert list(capabilities) == PAIR and suite_from(capabilities, base)[1] is base
    assert suite_from(minis(("text",)), f"{module}:suite")[1] is base
    with pytest.raises(ValueError, match="give a policy, or a suite by name"): suite_from(minis(("text",)), None)


def test_everything_by_name_trains_what_objects_train(module, tmp_path):
    by_name = train(f"{module}:PLAN", f"{module}:suite", config=SMALL, out=tmp_path / "named", progress=False,
                    sampler=f"{module}:sampler", learner=f"{module}:MyLearner")
    small = tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
    plain = train(mixed_rlvr(PAIR, steps=1), minis(("text", "image")), small, SMALL, tmp_path / "plain", progress=False)
    columns = ["branch", "capability", "loss", "reward", "gradient_norm"]
    assert by_name.events[columns].equals(plain.events[columns])
    hashes = {run.manifest["content_hash"] for run in (by_name, plain)}
    assert by_name.manifest["learner"] == "MyLearner" and len(hashes) == 2
    assert set(__import__(module).CALLS) == {"sampler", "learner"}


def test_graphs_are_a_wish_that_is_met_or_refused(tmp_path, monkeypatch):
    "A run that asks for them decodes so, evaluations included, and learns the same; what can't is refused."
    with pytest.raises(ValueError, match="graphs=True: needs packed rows"): Config(graphs=True, pack=False)
    policy, suite, called = tiny_policy(), minis(("text",)), []
    real = replay.replayed
    monkeypatch.setattr(replay, "replayed", lambda *args: (called.append(1), real(*args))[1])
    sizes = dict(prompts=4, group_size=4, max_new_tokens=6, probe_every=0, eval_every=1, eval_prompts=4, device="cpu")
    runs = [train(expert("text", 1), suite, policy, Config(**sizes, graphs=g), tmp_path / str(g), progress=False)
            for g in (False, True)]
    assert len(called) >= 2 and runs[0].manifest["content_hash"] != runs[1].manifest["content_hash"]
    for a, b in zip(*(r.result.parameters() for r in runs)): assert (a - b).abs().max() < 1e-5
    config = Config(**sizes, graphs=True)
    assert placed("base", policy, config, accelerator_for(config)).graphs and not policy.graphs
    policy.packs = False
    with pytest.raises(ValueError, match="config graphs=True: 'base' can't decode in fixed shapes: it runs padded"):
        placed("base", policy, config, accelerator_for(config))
    replay.release()

"A finished job is found by what it was made of: changed data, rewards, bases and own code retrain what they touch."
import json
import sys
from dataclasses import replace

import pytest

from copd_nb.engine import phase as phase_module
from copd_nb.engine.config import Config
from copd_nb.engine.runs import request_stop
from copd_nb.policy import suites
from copd_nb.policy.suites import load_suite
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.paradigms import expert, mixed_rlvr
from copd_nb.study import jobs as jobs_module
from copd_nb.study.grid import Scale, Study, job_plan
from copd_nb.study.jobs import Job, base_scores, differences, run_of, scores_of
from copd_nb.study.reuse import reuse_table
from copd_nb.study.workers import do_all

MODULES = dict(
    mysuite='''
import json
from pathlib import Path
from copd_nb.data.capability import Capability, Example
from copd_nb.data.rewards import Exact
from copd_nb.policy.core import Policy
from copd_nb.policy.toys import tiny_policy
from myreward import near
HERE = Path(__file__).parent

def capability(name, reward):
    rows = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    made = [Example(r["prompt"], r["answer"], name) for r in rows]
    return Capability(name, made[:8], made[8:], reward)

def suite():
    base = tiny_policy(int((HERE / "seed").read_text()), hidden=16, layers=1, vision_hidden=16, vision_depth=1)
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, *range(20, 60)]
    base = Policy(base.model, base.processor, "base")  # ends about half of its completions
    return [capability("math", near), capability("sort", Exact())], base
''',
    myreward='''
from myhelper import score
def near(completions, examples): return [score(c, e) for c, e in zip(completions, examples)]
''',
    myhelper="def score(c, e): return (1 + (sum(map(ord, c)) + len(e.prompt)) % 7) / 7\n",
    myopd='''
from copd_nb.signals.estimators import Sampled
class Skewed(Sampled):
    def advantages(self, *given): return 0.5 * super().advantages(*given)
skewed = Skewed()
''')
TINY = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, probe_every=0, eval_every=0, device="cpu")
PLANS = dict(math=expert("math", 1), sort=expert("sort", 1), mixed=mixed_rlvr(["math", "sort"], 1),
             copd=copd(["math", "sort"], cycles=1, s_rl=1, s_opd=1, estimator="myopd:skewed"))


class Place:
    "A folder with a suite and code of one's own, and what a store of it does."
    def __init__(self, path, monkeypatch):
        self.path, self.store, self.done = path, path / "store", []
        for name, text in MODULES.items(): (path / f"{name}.py").write_text(text)
        rows = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a in range(4) for b in range(3)]
        self.rows = dict(math=rows, sort=[dict(r, prompt=r["prompt"] * 2) for r in rows])
        for name in self.rows: self.write(name)
        (path / "seed").write_text("0")
        monkeypatch.syspath_prepend(str(path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        train, evaluate = jobs_module.train, jobs_module.evaluate
        def noted(schedule, capabilities, base, config, out, *args, **more):
            if not out.exists(): self.done.append(schedule.name)
            return train(schedule, capabilities, base, config, out, *args, **more)
        def judged(policy, capabilities, *args, **options):
            self.done.append((policy.name, *capabilities))
            return evaluate(policy, capabilities, *args, **options)
        monkeypatch.setattr(jobs_module, "train", noted)
        monkeypatch.setattr(jobs_module, "evaluate", judged)

    def write(self, name): (self.path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, self.rows[name])))

    def edit(self, module, old, new):
        file = self.path / f"{module}.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    def fresh(self):
        "As in a new process: no module and no suite is loaded."
        for name in MODULES: sys.modules.pop(name, None)
        suites._by_name.cache_clear()

    def jobs(self, **options):
        return {name: Job(plan, TINY, "mysuite:suite", 2, 1, **options) for name, plan in PLANS.items()}

    def run(self, capsys):
        "Do all jobs; names of trained schedules, of judged models with capabilities, and what was printed."
        self.fresh()
        self.done.clear()
        capsys.readouterr()
        jobs = self.jobs()
        do_all([(j, []) for j in jobs.values()], self.store, workers=1)
        trained, judged = ({x for x in self.done if isinstance(x, str) == word} for word in (True, False))
        return trained, judged, capsys.readouterr().out


NAMES = {name: plan.name for name, plan in PLANS.items()}
EVERY = set(NAMES.values())


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    made = Place(tmp_path, monkeypatch)
    trained, judged, said = made.run(capsys)
    assert trained == EVERY and not said and {model for model, *_ in judged} == {"result", "math", "sort", "mixed"}
    yield made
    made.fresh()



def test_what_changes_retrains_what_it_touches(place, capsys):
    everything = place.run(capsys)
    assert everything == (set(), set(), "")  # nothing has changed

    place.edit("myreward", "def near", "# a comment changes nothing\ndef near")
    assert place.run(capsys) == (set(), set(), "")

    place.edit("myopd", "0.5 *", "0.4 *")  # only CoPD distils with it
    trained, judged, said = place.run(capsys)
    assert trained == {NAMES["copd"]} and {m for m, *_ in judged} == {"result", "math", "sort"}
    assert said.splitlines()[1:] == ["  own code myopd:skewed: differs"]
    assert said.splitlines()[0].endswith("the run is trained anew, as finished ones were made of other things:")

    place.rows["math"][0]["answer"] = "7"  # a training prompt: the expert on sorting and all its scores stay
    place.write("math")
    trained, judged, said = place.run(capsys)
    assert trained == EVERY - {NAMES["sort"]}
    assert said.splitlines()[1:] == ["  data of math: training prompts differ"]
    assert judged == {(model, "math", "sort") for model in ("math", "mixed", "result", "sort")}  # sort: CoPD's branch

    place.edit("myhelper", "% 7) / 7", "% 5) / 5")  # a module that the reward's module imports
    trained, judged, said = place.run(capsys)
    assert trained == EVERY - {NAMES["sort"]} and said.splitlines()[1] == "  reward of math: differs"
    assert "a finished run is judged anew on math: " in said.splitlines()[2] and len(said.splitlines()) == 3
    assert ("sort", "math") in judged  # the expert on sorting is judged anew on mathematics alone
    assert all(c in (["math", "sort"], ["math"]) for _, *c in judged)

    (place.path / "seed").write_text("1")
    trained, judged, said = place.run(capsys)
    assert trained == EVERY and said.splitlines()[1:] == ["  base: weights differ"]

    (place.path / "seed").write_text("0")
    assert place.run(capsys) == (set(), set(), "")  # as before: all of it is still there


def test_the_base_is_judged_once_a_store(place):
    job = place.jobs()["mixed"]
    first = base_scores(job, place.store)
    place.done.clear()
    assert base_scores(replace(job, schedule=PLANS["sort"]), place.store).equals(first) and not place.done
    place.edit("myhelper", "% 7) / 7", "% 5) / 5")
    place.fresh()
    again = base_scores(place.jobs()["mixed"], place.store)
    assert place.done == [("base", "math")] and not again.equals(first)
    assert again[again.capability == "sort"].equals(first[first.capability == "sort"])


def test_a_table_of_what_would_be_reused(place):
    place.fresh()
    jobs = {(name, 0): job for name, job in place.jobs().items()}
    assert set(reuse_table(jobs, place.store).state) == {"finished"}
    faster = {key: replace(job, config=replace(TINY, learning_rate=0.5)) for key, job in jobs.items()}
    table = reuse_table(faster, place.store)
    assert set(table.state) == {"to train"}
    assert set(table.differs) == {f"config learning_rate: 0.5, was {TINY.learning_rate}"}
    more = {key: replace(job, prompts=4) for key, job in jobs.items()}
    assert set(reuse_table(more, place.store).state) == {"trained, to be judged"}
    longer = replace(jobs["mixed", 0], schedule=mixed_rlvr(["math", "sort"], 2))
    assert [str(d) for d in differences(longer, place.store)] == ["schedule: differs"]


def test_an_interrupted_job_is_told_with_its_step(place, monkeypatch):
    place.fresh()
    job = Job(mixed_rlvr(["math", "sort"], 4), TINY, "mysuite:suite", 2, 1)
    step = phase_module.train_step
    def stopping(training, *args):
        request_stop(training.run.path)
        return step(training, *args)
    with monkeypatch.context() as changed:
        changed.setattr(phase_module, "train_step", stopping)
        with pytest.raises(ValueError, match="was asked to stop; the same command resumes it"):
            do_all([(job, [])], place.store, workers=1)
    found = reuse_table({("mixed", 0): job}, place.store)  # the first step was in the store of experts
    assert list(found.state) == ["interrupted at step 2 of 4"]
    do_all([(job, [])], place.store, workers=1)
    assert list(reuse_table({("mixed", 0): job}, place.store).state) == ["finished"]


def test_a_suite_saved_anew_under_its_old_name_is_another(tmp_path, monkeypatch, capsys):
    "field/own/stale_store: another reward and another base in a file of the same name; reports showed the old rows."
    first = '''
from copd_nb.data.capability import Capability, Example
from copd_nb.data.verifiers import named_reward
from copd_nb.policy.toys import tiny_policy

def suite(seed=0):
    sums = [Example(f"{a}+{b}=", str(a + b), "math") for a in range(4) for b in range(4)]
    sort = [Example(f"{a}>{b}", "x", "sort") for a in range(4) for b in range(4)]
    base = tiny_policy(SEED, hidden=16, layers=1, vision_hidden=16, vision_depth=1)
    return [Capability("math", sums[:12], sums[12:], named_reward("REWARD")),
            Capability("sort", sort[:12], sort[12:], named_reward("exact"))], base
'''
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for seed, reward in ((0, "numeric?form=whole"), (1, "exact")):
        (tmp_path / "tinysuite.py").write_text(first.replace("SEED", str(seed)).replace("REWARD", reward))
        sys.modules.pop("tinysuite", None)
        suites._by_name.cache_clear()
        study = Study("tinysuite:suite", Scale((0,), prompts=4, samples=1, config=TINY), tmp_path / "store", 1)
        found.append((study.run({"mixed": PLANS["mixed"], "expert on math": PLANS["math"]}), capsys.readouterr().out))
    (old, nothing), (new, said) = found
    assert "trained anew" not in nothing
    for line in ("base: weights differ", "reward of math: differs"): assert said.count(line) == 1
    for key in old.jobs:
        assert old.runs[key].path != new.runs[key].path
        assert new.runs[key].manifest["base"] != old.runs[key].manifest["base"]
    assert not new.base_scores.equals(old.base_scores)


def test_capabilities_and_base_as_objects(place, capsys):
    place.fresh()
    pair, named = load_suite("mysuite:suite"), place.jobs()["mixed"]
    job = replace(named, suite=pair, config=replace(TINY, seed=1))
    plan = job_plan([job, replace(job, schedule=PLANS["sort"])])
    capsys.readouterr()
    do_all(plan, place.store, workers=2)
    said = capsys.readouterr().out
    assert said.count("capabilities given as objects stay in this process") == 1
    assert run_of(job, place.store).finished and len(scores_of(run_of(job, place.store), job)) == 4
    assert replace(named, suite=pair).name == named.name


def test_a_job_whose_data_changed_after_it_was_named_is_refused(place):
    place.fresh()
    job = place.jobs()["mixed"]
    assert job.name
    place.rows["math"][0]["answer"] = "9"
    place.write("math")
    place.fresh()
    with pytest.raises(ValueError, match="changed after the job was made"): jobs_module.do(job, place.store)


def test_an_unknown_capability_is_named_before_anything_is_trained(place):
    with pytest.raises(ValueError, match="unknown capability 'audio'"):
        do_all([(Job(expert("audio", 1), TINY, "mysuite:suite"), [])], place.store, workers=1)

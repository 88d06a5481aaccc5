"Syncs in the engine: its two limits, resume, other places, adapters, moments."
from dataclasses import replace

import pytest
import torch
from same_runs import PAIR, TINY, events, same, small_base, small_suite

from copd_nb.data.capability import Capability, Example
from copd_nb.engine import phase as phase_module
from copd_nb.engine import syncing as syncing_module
from copd_nb.engine.config import Config
from copd_nb.engine.executors import Cluster
from copd_nb.engine.runs import request_stop
from copd_nb.engine.state import model_shape
from copd_nb.engine.syncing import mean_moments, outer_step
from copd_nb.engine.training import train
from copd_nb.policy.core import weights_hash
from copd_nb.policy.lora_branches import lora
from copd_nb.scale import cluster as cluster_module
from copd_nb.schedule.controllers import realised
from copd_nb.schedule.core import Schedule, Sync
from copd_nb.schedule.costs import Workload
from copd_nb.schedule.drift import drift
from copd_nb.schedule.parts import OPD, RL, Merge, Phase, Update
from copd_nb.schedule.paradigms import merged_experts, mixed_rlvr
from copd_nb.schedule.local import local_rlvr, synced_copd
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample_many

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = replace(TINY, probe_every=0, eval_every=0, checkpoint_every=1)


@pytest.fixture(scope="module")
def start(): return small_base()


@pytest.fixture(scope="module")
def suite(): return small_suite()


@pytest.fixture
def apart(monkeypatch):
    "Branches that share nothing, without Ray."
    pytest.importorskip("ray")
    from test_executors import Apart
    made = []

    def executor(*args):
        made.append(Apart(*args))
        return made[-1]
    monkeypatch.setattr(cluster_module, "RayExecutor", executor)
    return made


def go(schedule, suite, start, config, out, **how):
    return train(schedule, suite, start, config, out, progress=False, **how)


def flat(policy): return torch.cat([p.detach().double().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("how", [{}, dict(method="ties", density=0.5), dict(weights=[1, 3])], ids=str)
def test_the_longest_period_is_merged_experts(how, suite, start, tmp_path):
    "H = n: the same weights, bit for bit, with AdamW as it is."
    for period in (2, 5):
        local = go(local_rlvr(PAIR, 2, period, **how), suite, start, QUIET, tmp_path / f"local{period}")
        merged = go(merged_experts(PAIR, 2, **how), suite, start, QUIET, tmp_path / f"merged{period}")
        assert weights_hash(local.result) == weights_hash(merged.result)
        for name in PAIR: assert weights_hash(local.branch(name)) == weights_hash(merged.branch(name))


def test_a_plain_sync_at_the_end_is_the_merge(suite, start, tmp_path):
    "A sync whose merge is the result changes nothing in it."
    plain = local_rlvr(PAIR, 2, 2)
    ended = replace(plain, phases=(*plain.phases, Sync(PAIR)))
    runs = [go(s, suite, start, QUIET, tmp_path / str(i)) for i, s in enumerate((plain, ended))]
    assert weights_hash(runs[0].result) == weights_hash(runs[1].result) == weights_hash(runs[1].branch("text"))


class ByPrompt:
    "Completions that depend on the policy, the prompt and the step, whoever asks for them, and with whom."
    def __init__(self): self.asked = {}

    def __call__(self, policy, requests, *rest):
        return [self.one(policy, request, *rest) for request in requests]

    def one(self, policy, request, *rest):
        found = []
        for example in request.prompts.examples:
            n = self.asked[example.id] = self.asked.get(example.id, 0) + 1
            source = generator(policy.device, 0, example.id, "prompt", n)
            found.append(sample_many(policy, [replace(request, prompts=policy.encode([example]), source=source)],
                                     *rest)[0])
        return joined(policy, request, found)


def joined(policy, request, outs):
    "The rollouts of single prompts as those of all."
    width = max(o.ids.shape[1] for o in outs)
    def wide(x): return torch.nn.functional.pad(x, (0, width - x.shape[1]))
    def every(name): return torch.cat([wide(getattr(o, name)) for o in outs])
    ids = every("ids")
    changes = {n: every(n) for n in ("mask", "logp", "entropy") if getattr(outs[0], n) is not None}
    changes["finished"] = torch.cat([o.finished for o in outs])
    return replace(outs[0], prompts=request.prompts, ids=ids, texts=[t for o in outs for t in o.texts], start=None,
                   decoded=sum(o.decoded for o in outs), **changes)


def by_letters(completions, examples):
    return [(1 + (sum(map(ord, c)) + len(e.prompt)) % 7) / 7 for c, e in zip(completions, examples)]


SUMS = [Capability(n, [Example(f"{a}{sign}{b}=", str(a), n) for a in range(6) for b in range(6)],
                   [Example(f"{a}{sign}9=", str(a), n) for a in range(6)], by_letters)
        for n, sign in (("plus", "+"), ("minus", "-"))]
PLAIN = Config(prompts=4, group_size=4, max_new_tokens=6, probe_every=0, eval_every=0, checkpoint_every=50,
               optimizer="sgd", learning_rate=0.5, warmup=2, max_grad_norm=1e9, reduction="sequence", device="cpu",
               weight_decay=0.01)
NAMES = ["plus", "minus"]


def both(start, folder, steps=3, weights=None, **changes):
    "How far local RLVR with H = 1 is from mixed RLVR with twice the prompts, as a share of the way that it went."
    config = replace(PLAIN, **changes)
    local = go(local_rlvr(NAMES, steps, 1, weights=weights), SUMS, start, config, folder / "local", sampler=ByPrompt())
    mixed = go(mixed_rlvr(NAMES, steps), SUMS, start, replace(config, prompts=2 * config.prompts), folder / "mixed",
               sampler=ByPrompt())
    a, b, origin = flat(local.result), flat(mixed.result), flat(start)
    assert (b - origin).norm() > 1e-3, "nothing was learnt"
    return ((a - b).norm() / (b - origin).norm()).item(), local, mixed


@pytest.mark.parametrize("reduction", ["sequence", "constant"])
def test_the_shortest_period_is_mixed_rlvr(reduction, start, tmp_path):
    "H = 1 with plain SGD: the same weights after several steps, up to the last digits of fp32."
    apart, local, mixed = both(start, tmp_path, reduction=reduction)
    assert apart < 1e-4
    def lengths(run): return run.events.query("kind == 'train'").groupby("capability").length.apply(list).to_dict()
    assert lengths(local) == lengths(mixed)


def test_a_step_by_tokens_needs_weights_by_tokens(start, tmp_path):
    "With one denominator for all tokens the average is weighted by each branch's tokens."
    apart, local, _ = both(start, tmp_path / "equal", 1, reduction="token")
    rows = local.events.query("kind == 'train'").set_index("branch")
    tokens = [float(rows.length[n]) for n in NAMES]
    assert tokens[0] != tokens[1] and apart > 1e-3
    assert both(start, tmp_path / "weighted", 1, tokens, reduction="token")[0] < 1e-4


@pytest.mark.parametrize("changes", [dict(max_grad_norm=0.05), dict(optimizer="adamw", learning_rate=1e-3),
                                     dict(epochs=2)], ids=str)
def test_what_the_equality_needs(changes, start, tmp_path):
    "A clipped norm, Adam's own scale, and a batch used twice each break it."
    assert both(start, tmp_path, 1, **changes)[0] > 1e-3


OUTER = local_rlvr(PAIR, 5, 2, moments="average", outer_lr=0.7, outer_momentum=0.9)
COPD = Schedule("mine", dict(text="base", image="base", both=Merge(PAIR)), [
    Phase("I", 1, [Update(n, [RL(n)]) for n in PAIR], 1), Sync(PAIR, moments="keep", cycle=1),
    Phase("II", 1, [Update("text", [RL("text"), OPD("image", "image", 0.5)]), Update("image", [RL("image")])], 2),
    Sync(PAIR, "dare", density=0.5, cycle=2),
    Phase("III", 1, [Update("both", [OPD("text", "text"), OPD("image", "base")])], 3)], "both")
ADAPTERS = local_rlvr(PAIR, 3, 1, outer_lr=0.7, outer_momentum=0.5)
DRIFT = local_rlvr(PAIR, 8, 2, control=drift(target=1e-5))
SCALED = synced_copd(PAIR, 24, 2, 1, control=drift(target=1e-5, beta="scale"))
CASES = dict(outer=OUTER, mine=COPD, adapters=ADAPTERS, drift=DRIFT, scaled=SCALED)


def base_of(name, start): return lora(start.clone("base"), 2) if name == "adapters" else start


class Killed(BaseException): "A process that ends."


def killed(work, after):
    "Work that ends its process the nth time it is called; half done or not."
    count = iter(range(after))

    def broken(*args):
        if next(count, None) is None: raise Killed
        return work(*args)
    return broken


KILLS = [("meet", 0), ("_go_on", 0), ("_go_on", 1), ("log_rows", 0), ("checkpoint", 0), ("checkpoint", 1), ("meet", 0),
         ("_go_on", 1), ("log_rows", 0), ("train_step", 0)]  # work, how often it ends well before


def tiered(*quick): return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in CASES]


@pytest.mark.parametrize("name", tiered("adapters"))
def test_a_run_killed_anywhere_is_the_run_that_was_not(name, suite, start, tmp_path, monkeypatch):
    "Killed again and again, in steps and in the middle of syncs."
    base, config = base_of(name, start), replace(TINY, probe_every=1, eval_every=2, checkpoint_every=1)
    whole = go(CASES[name], suite, base, config, tmp_path / "whole")
    for work, after in KILLS:
        module = phase_module if work == "train_step" else syncing_module
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, work, killed(getattr(module, work), after))
            go(CASES[name], suite, base, config, tmp_path / "parts")
    run = go(CASES[name], suite, base, config, tmp_path / "parts")
    assert run.finished
    same(whole, run)


def test_a_run_stops_at_a_sync_and_goes_on(suite, start, tmp_path, monkeypatch):
    "Asked to stop while branches meet: the sync is done, and not done again."
    whole, done = go(OUTER, suite, start, QUIET, tmp_path / "whole"), []
    real = syncing_module.meet

    def asking(training, *rest):
        done.append(rest)
        request_stop(training.run.path)
        return real(training, *rest)
    monkeypatch.setattr(syncing_module, "meet", asking)
    ends = [go(OUTER, suite, start, QUIET, tmp_path / "parts").status for _ in range(4)]
    assert ends == ["stopped", "stopped", "stopped", "finished"] and len(done) == 3
    same(whole, go(OUTER, suite, start, QUIET, tmp_path / "parts"))


@pytest.mark.parametrize("name", tiered("mine"))
def test_branches_apart_meet_as_they_do_together(name, suite, start, tmp_path, apart):
    "Bit for bit, with weights in pieces; only pickled values go from branch to branch."
    base = base_of(name, start)
    here = go(CASES[name], suite, base, TINY, tmp_path / "here")
    same(here, go(CASES[name], suite, base, TINY, tmp_path / "apart", cluster=Cluster(shard_bytes=200_000)))
    assert "meet" in {work.strip("_") for work, _ in apart[0].sent}


def test_the_period_follows_the_drift(suite, start, tmp_path):
    "Branches that are always too far apart meet more often, with the same steps in all; decisions are in the log."
    run = go(DRIFT, suite, start, replace(QUIET, probe_every=1), tmp_path / "run")
    rows, apart = run.events.query("kind == 'control'"), run.events.query("kind == 'probe' and b == 'image'")
    assert list(rows.setting) == ["period"] * len(rows) and (rows.measured > rows.target).all()
    lengths = [p.steps for p in run.schedule.phases if isinstance(p, Phase)]
    assert sum(lengths) == 8 and lengths[0] == 2 and set(lengths[1:]) == {1}
    assert run.schedule == realised(DRIFT, run.events.to_dict("records")) and (apart.symmetric_kl > 0).any()


def test_the_log_tells_how_far_branches_were(suite, start, tmp_path):
    "Distance before the sync, and the outer step; the price has the weights that moved."
    run = go(local_rlvr(PAIR, 4, 2, outer_lr=0.5), suite, start, QUIET, tmp_path / "run")
    rows = run.events.query("kind == 'sync'")
    assert list(rows.branch) == PAIR * 2 and list(rows.phase_index) == [1, 1, 3, 3]
    assert list(rows.global_step) == [2, 2, 4, 4]
    assert (rows.distance > 0).all() and (rows.drift >= rows.distance * 0.99).all()
    moved = (flat(run.result) - flat(start)).norm().item()
    assert 0 < moved <= rows.drop_duplicates("phase_index").outer_step.sum() * (1 + 1e-6)
    first = rows[rows.phase_index == 1].iloc[0]
    assert first.outer_step < first.drift  # half of the mean of both ways
    price = run.schedule.price(workload(start))
    assert rows.moved.sum() == price.moved.sum()


def workload(start):
    return Workload(4, 2, 4, dict.fromkeys(PAIR, 10), dict.fromkeys(PAIR, 5), model_shape(start))


def test_rounds_are_measured_as_one_phase(suite, start, tmp_path):
    "Short rounds are not evaluated at each of their ends."
    config = replace(TINY, probe_every=2, eval_every=3)
    run = go(local_rlvr(PAIR, 5, 1), suite, start, config, tmp_path / "run")
    assert sorted(set(run.events.query("kind == 'eval'").global_step)) == [3, 5]
    assert sorted(set(run.events.query("kind == 'probe'").global_step)) == [0, 2, 4, 5]


@pytest.mark.parametrize("moments", ["reset", "keep", "average"])
def test_moments(moments, suite, start, tmp_path, monkeypatch):
    "Dropped, each its own, or their mean."
    seen, real = [], syncing_module.meet

    def looking(training, sync, index):
        def steps(n): return {k: v.clone() for k, v in syncing_module._moments_of(training, n).get("all", {}).items()}
        before = {n: steps(n) for n in PAIR}
        rows = real(training, sync, index)
        seen.append((before, {n: steps(n) for n in PAIR}))
        return rows
    monkeypatch.setattr(syncing_module, "meet", looking)
    go(local_rlvr(PAIR, 4, 2, moments=moments), suite, start, QUIET, tmp_path / "run")
    before, after = seen[0]
    if moments == "reset": assert not after["text"] and not after["image"]
    if moments == "keep":
        assert all(torch.equal(after[n][k], x) for n in PAIR for k, x in before[n].items())
        assert any(not torch.equal(after["text"][k], x) for k, x in after["image"].items() if k in after["text"])
    if moments == "average":
        assert after["text"].keys() == after["image"].keys()
        assert all(torch.equal(after["text"][k], x) for k, x in after["image"].items())
        key = next(k for k in before["text"] if k.endswith("exp_avg") and k in before["image"])
        assert torch.allclose(after["text"][key], (before["text"][key] + before["image"][key]) / 2)


def test_the_mean_of_moments_counts_what_a_branch_has_not_seen_as_zero():
    one, two = {"all": {"0/step": torch.tensor(4.0), "0/exp_avg": torch.tensor([2.0])}}, {"all": {}}
    three = {"all": {"0/step": torch.tensor(2.0), "0/exp_avg": torch.tensor([4.0])}}
    found = mean_moments([0.5, 0.5], [one, two])["all"]
    assert found["0/step"] == 4 and found["0/exp_avg"] == 1
    found = mean_moments([0.25, 0.75], [one, three])["all"]
    assert found["0/step"] == 2.5 and found["0/exp_avg"] == 3.5


def test_an_outer_step_of_rate_one_is_the_merge():
    origin, mean = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).unbind()
    new, momentum = outer_step(origin, mean, None, Sync(PAIR))
    assert torch.equal(new, mean) and torch.allclose(momentum, origin - mean)


AVERAGED = local_rlvr(PAIR, 4, 2, moments="average")
REFUSED = {
    "average without moments": (AVERAGED, dict(optimizer="sgd"), "plain SGD has no moments"),
    "average what is dropped": (AVERAGED, dict(optimizer_state="reset"), "has no effect"),
    "kinds": (Schedule("s", PAIR, [Phase("a", 1, [Update("text", [RL("text")]),
                                                 Update("image", [OPD("image", "base")])]),
                                   Sync(PAIR, moments="average"),
                                   Phase("b", 1, [Update("text", [RL("text")])])], "text"),
              dict(optimizer_state="separate"), "of the same kinds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_moments_that_cannot_be_averaged_are_refused(name, suite, start, tmp_path):
    schedule, changes, told = REFUSED[name]
    with pytest.raises(ValueError, match=told):
        go(schedule, suite, start, replace(QUIET, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("events*"))


def test_what_adapters_and_starts_cannot_do_is_refused(suite, start, tmp_path):
    small = lora(start.clone("base"), 2)
    for how, told in ((dict(method="ties"), "LoRA branches"), (dict(moments="average"), "other matrices")):
        with pytest.raises(ValueError, match=told):
            go(local_rlvr(PAIR, 4, 2, **how), suite, small, QUIET, tmp_path / "run")
    with pytest.raises(ValueError, match="starts from a policy of its own"):
        go(OUTER, suite, start, QUIET, tmp_path / "run", starts=dict(text=start.clone()))


def test_policies_of_ones_own_can_be_averaged(suite, start, tmp_path):
    "A branch with another start: no common point is known at its first sync, and plain averaging needs none."
    moved = start.clone("moved")
    with torch.no_grad(): next(iter(moved.parameters())).add_(0.01)
    run = go(local_rlvr(PAIR, 3, 1), suite, start, QUIET, tmp_path / "run", starts=dict(text=moved))
    rows = run.events.query("kind == 'sync'")
    assert rows.outer_step.isna().tolist() == [True, True, False, False]


def test_an_expert_after_a_sync_is_none(suite, start, tmp_path):
    "A branch that was put together with others is not taken from the store of experts."
    text, image = (Phase(f"expert {n}", 1, [Update(n, [RL(n)])]) for n in PAIR)
    phases = [text, Sync(PAIR), image]
    schedule = Schedule("soup", PAIR, phases, Merge(PAIR))
    go(merged_experts(PAIR, 1), suite, start, QUIET, tmp_path / "experts", experts=tmp_path / "store")
    runs = [go(schedule, suite, start, QUIET, tmp_path / str(i), experts=store)
            for i, store in enumerate((None, tmp_path / "store"))]
    assert weights_hash(runs[0].result) == weights_hash(runs[1].result)
    assert list(events(runs[0]).kind) == list(events(runs[1]).kind)

"A branch on two processes: the rollouts, losses and checkpoints of one."
import copy
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing

from copd_nb.engine import memory as memory_module
from copd_nb.engine import resume as resume_module
from copd_nb.engine import step as step_module
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.request import placed
from copd_nb.data.capability import Capability
from copd_nb.engine.config import Config, Limits
from copd_nb.engine.passes import portions
from copd_nb.engine.state import Training
from copd_nb.engine.step import train_step
from copd_nb.engine.evaluation import evaluate
from copd_nb.policy.toys import image, text, tiny_policy
from copd_nb.policy.core import Policy, weights_hash
from copd_nb.policy.groups import Group
from copd_nb.policy.lora_branches import lora
from copd_nb.scale.sharding import ShardedPolicy, join_group, shard
from copd_nb.signals.compare import probe_pairs
from copd_nb.signals.rollouts import Rollouts
from copd_nb.signals.sampling import sample_many
from copd_nb.engine.checkpoints import load_checkpoint, save_checkpoint
from copd_nb.engine.runs import Run
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, SFT, Phase, Update

pytestmark = pytest.mark.integration

SMALL = dict(hidden=32, layers=2, vision_hidden=16, vision_depth=1)
TINY = Config(prompts=3, opd_prompts=3, group_size=3, max_new_tokens=6, probe_every=0, eval_every=0, learning_rate=1e-4,
              warmup=2, reward_seconds=None, device="cpu")
CASES = {  # estimator and configuration of three steps
    "sampled": TINY,
    "topk": replace(TINY, micro_tokens=24, sampler_level="sequence", sampler_cap=1.5),
    "reverse": replace(TINY, micro_prompts=2, recompute=True, rollout_rows=4, optimizer_state="separate"),
    "jsd": replace(TINY, prompts=1, opd_prompts=1, epochs=2, pack=False),  # the second process has no row
}
ANOTHER = dict(topk=0.8, reverse=0.9)  # cases with a sampler that isn't the trainer: its temperature
SECONDS = 100  # that one process waits for the other


def tiny(seed: int = 0) -> Policy:
    "A small model that ends soon: many tokens end a completion."
    policy = tiny_policy(seed, **SMALL)
    policy.eos = [*policy.eos, *range(20, 45)]
    return policy


def odd(completions, examples): return [sum(ord(c) % 2 for c in done) / 6 for done in completions]


def suite() -> dict[str, Capability]:
    return {c.name: Capability(c.name, c.train[:24], c.test[:4], odd) for c in (text(8), image(32, 8))}


def sampler_of(case: str):
    "A sampler at a temperature of its own, which reports its true log-probabilities; None for the engine's."
    def sampler(policy, requests, length, temperature, *options):
        outs = sample_many(policy, requests, length, ANOTHER[case], *options)
        return [replace(out, start=None) for out in outs]
    return sampler if case in ANOTHER else None


def begin(group: Group, folder: Path, case: str) -> tuple[Training, Phase]:
    "A training before its first step: two branches, one of which teaches the other, and learns itself in one case."
    config = CASES[case]
    updates = [Update("a", (RL("text"), RL("image"), OPD("image", "b", 1.0, case))),
               Update("b", (SFT("text"), RL("image")))]
    schedule = Schedule("pair", dict(a="base", b="base"),
                        [Phase("both", 3, updates if case == "sampled" else updates[:1])], "a")
    (folder / "events.jsonl").touch()
    run, accelerator = Run.__new__(Run), accelerator_for(config)
    run.path = folder
    base, other = (placed(name, tiny(seed), config, accelerator, group) for seed, name in enumerate(("base", "other")))
    return Training(schedule, suite(), base, config, accelerator, run, starts=dict(b=other),
                    sampler=sampler_of(case)), schedule.phases[0]


def packed(training: Training) -> dict: return dict(resume_module.packed(training, training.begun))


def numbers(batch) -> dict:
    out = batch.rollouts
    return dict(ids=out.ids, texts=out.texts, finished=out.finished, rewards=batch.rewards, sampled=out.logp,
                logp=batch.logp, old=batch.old_logp, entropy=batch.entropy, taught=batch.teacher and batch.teacher.logp,
                theirs=batch.sampler_logp)


def trained(group: Group, folder: Path, case: str) -> dict:
    "Three steps: rows of the log, what batches held, and the state in the end."
    training, phase = begin(group, folder, case)
    batches, real = [], step_module.learn

    def noted(training, name, found, *args):
        rows = real(training, name, found, *args)
        batches.extend(found)
        return rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "learn", noted)
        rows = [row for step in range(3) for row in train_step(training, phase, step, signals=True)]
    signals, rows = ([r for r in rows if (r.get("kind") == "signal") == kind] for kind in (True, False))
    tensors, counters = packed(training), {n: resume_module.counters(training, n)[0] for n in training.begun}
    if group.rank == 0 and case == "sampled":
        save_checkpoint(folder / f"on{group.size}", tensors, dict(branches=counters))
    return dict(rows=rows, signals=signals, batches=[numbers(b) for b in batches], tensors=tensors)


def resumed(group: Group, folder: Path, path: Path) -> dict:
    "The state after loading a checkpoint, and what the next step gives."
    training, phase = begin(group, folder, "sampled")
    tensors, state = load_checkpoint(path)
    resume_module.unpack(training, tensors, state["branches"])
    return dict(tensors=copy.deepcopy(packed(training)), rows=train_step(training, phase, 0))


def measured(group: Group, policy: Policy) -> dict:
    "Evaluation and probe of a policy and a changed copy."
    other = policy.with_state({k: v * 1.05 for k, v in policy.state_dict().items()}, "other")
    scores = evaluate(policy, suite(), samples=1, max_new_tokens=6)
    probes = probe_pairs(dict(a=policy, b=other), [("a", "b", "image")], suite(), prompts=3, max_new_tokens=6)
    return dict(scores=scores.to_dict("list"), probes=probes)


def alone(folder: Path) -> dict:
    runs = {name: trained(Group(), folder, name) for name in CASES}
    return runs | dict(resumed=resumed(Group(), folder, folder / "on1"), measured=measured(Group(), tiny()))


def fails(group: Group) -> str:
    def wrong(): raise ValueError("no such verifier")
    try: group.first(wrong)
    except (RuntimeError, ValueError) as error: return str(error)


def described(policy: ShardedPolicy, folder: Path) -> dict:
    whole, part = sum(p.nbytes for p in tiny().parameters()), sum(p.to_local().nbytes for p in policy.parameters())
    saved = Policy.load(policy.save(folder / "saved"))
    other = policy.with_state({k: v + 1 for k, v in policy.state_dict().items()})
    with pytest.raises(ValueError, match="it must have exactly the weights of its model"): policy.load_state({})
    return dict(part=part / whole, hashes=[weights_hash(p) for p in (tiny(), policy, policy.clone(), saved)],
                changed=weights_hash(other), kinds=[type(p).__name__ for p in (policy, policy.clone(), other)])


def of_two(rank: int, folder: Path) -> dict:
    "What each of two processes finds; one that waits for the other for too long fails."
    group = join_group(rank, 2, f"file://{folder}/meet", timeout=SECONDS)
    policy = shard(tiny(), group)
    found = {case: trained(group, folder, case) for case in CASES}
    found |= dict(resumed=resumed(group, folder, folder / "on1"), measured=measured(group, policy),
                  described=described(policy, folder), error=fails(group))
    torch.distributed.destroy_process_group()
    return found


def second(rank: int, folder: Path):
    "The other process."
    torch.set_num_threads(1)
    torch.save(of_two(1, folder), folder / "second.pt")


def two(folder: Path) -> list[dict]:
    "Both processes' findings: this one is the first."
    other = multiprocessing.start_processes(second, (folder,), 1, join=False, start_method="spawn")
    try: first = of_two(0, folder)
    finally: other.join(timeout=SECONDS)
    return [first, torch.load(folder / "second.pt", weights_only=False)]


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path: yield Path(path)


@pytest.fixture(scope="module")
def runs(folder): return alone(folder), *two(folder)


def furthest(a: dict, b: dict) -> float:
    return max((a[stem][name].float() - b[stem][name].float()).abs().max().item() for stem in a for name in a[stem])


def untimed(rows): return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(runs, case):
    one, first, second = (run[case] for run in runs)
    for a, b in zip(one["batches"], first["batches"], strict=True):
        assert torch.equal(a["ids"], b["ids"]) and a["texts"] == b["texts"]
        assert torch.equal(a["finished"], b["finished"])
        for key in ("rewards", "sampled", "logp", "old", "entropy", "taught", "theirs"):
            assert (a[key] is None) == (b[key] is None) and (
                a[key] is None or torch.allclose(a[key], b[key], atol=1e-4)), key
    for a, b in zip(one["rows"], first["rows"], strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert math.isclose(a["total_gradient_norm"], b["total_gradient_norm"], rel_tol=1e-3)
        for k in ("sampler_kl", "weight_mean", "weight_clipped"):
            assert (k in a) == (k in b) and a.get(k, 0) == pytest.approx(b.get(k, 0), abs=1e-4), k
    for a, b in zip(one["signals"], first["signals"], strict=True):
        assert all(a[k] == b[k] for k in ("what", "stream", "capability"))
        for k in ("norm", "norm_squared", "noise_squared", "floor", "cosine"):
            assert b.get(k, 0) == pytest.approx(a.get(k, 0), rel=1e-2, abs=1e-2, nan_ok=True), k
    assert all(row["total_gradient_norm"] > 1e-3 for row in one["rows"])
    assert any(abs(row["loss"]) > 1e-3 for row in one["rows"] if row["stream"] == "rl")
    assert any(row.get("sampler_kl", 0) > 1e-4 for row in one["rows"]) == (case in ANOTHER)
    assert any(row.get("weight_mean", 1) != 1 for row in one["rows"]) == (case in ANOTHER)
    assert furthest(one["tensors"], first["tensors"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_both_processes_hold_the_same(runs, case):
    _, first, second = (run[case] for run in runs)
    assert untimed(first["rows"]) == untimed(second["rows"])
    assert str(untimed(first["signals"])) == str(untimed(second["signals"]))  # NaN as text is equal to itself
    assert furthest(first["tensors"], second["tensors"]) == 0
    assert all(torch.equal(x, b[k]) for a, b in zip(first["batches"], second["batches"]) for k, x in a.items()
               if isinstance(x, torch.Tensor))


def test_a_checkpoint_of_one_process_goes_on_in_two(runs):
    one, first, second = runs
    for run in (one, first, second): assert furthest(run["resumed"]["tensors"], one["sampled"]["tensors"]) == 0
    for a, b in zip(one["resumed"]["rows"], first["resumed"]["rows"], strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_a_checkpoint_of_two_processes_goes_on_in_one(runs, folder):
    one, first, _ = runs
    found = resumed(Group(), folder, folder / "on2")
    assert furthest(found["tensors"], first["sampled"]["tensors"]) == 0
    for a, b in zip(found["rows"], one["resumed"]["rows"], strict=True): assert abs(a["loss"] - b["loss"]) < 1e-4


def test_each_process_holds_half(runs):
    parts = [run["described"]["part"] for run in runs[1:]]
    assert math.isclose(sum(parts), 1) and all(abs(p - 0.5) < 0.01 for p in parts)


def test_a_sharded_policy_is_the_policy(runs):
    for run in runs[1:]:
        assert len(set(run["described"]["hashes"])) == 1
        assert run["described"]["changed"] not in run["described"]["hashes"]
        assert run["described"]["kinds"] == ["ShardedPolicy"] * 3


def test_evaluations_and_probes_are_those_of_one_process(runs):
    one, first, second = (run["measured"] for run in runs)
    assert one["scores"] == first["scores"] == second["scores"] and first["probes"] == second["probes"]
    for a, b in zip(one["probes"], first["probes"], strict=True):
        for key, value in a.items(): assert value == pytest.approx(b[key], abs=1e-5)


def test_an_error_of_the_first_process_ends_both(runs):
    assert runs[1]["error"] == "no such verifier" and "first process of the group failed" in runs[2]["error"]


@pytest.mark.parametrize("seed", range(10))
def test_all_processes_run_passes_of_one_kind(seed):
    rng = random.Random(seed)
    prompts, group, size = rng.randint(1, 9), rng.randint(1, 3), rng.randint(2, 4)
    policy = tiny()
    encoded = policy.encode([rng.choice(c.train) for c in rng.choices(list(suite().values()), k=prompts)])
    lengths = torch.tensor([rng.choice([1, 1, 4, 6]) for _ in range(prompts * group)])
    mask = (torch.arange(6) < lengths[:, None]).float()
    out = Rollouts(encoded, group, torch.zeros(mask.shape, dtype=torch.long), mask, lengths > 0, [""] * len(lengths))
    rows = torch.tensor(sorted(rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))))
    config = replace(TINY, micro_prompts=rng.choice([None, 1, 2]), micro_tokens=rng.choice([None, 6, 13]))
    plans = [portions(config, out, rows, size)[rank] for rank in range(size)]
    pictures = out.prompts.patches.repeat_interleave(group) > 0
    kinds = [[[(len(p) > 0, bool(pictures[p].any()), bool((lengths[p] > 1).any())) for p in chunk] for chunk in plan]
             for plan in plans]
    assert all(k == kinds[0] for k in kinds) and all(p[0] for chunk in kinds[0] for p in chunk)
    own = [row for rank, plan in enumerate(plans) for chunk in plan for p in chunk for row in p.tolist()
           if Group(rank, size).owns(torch.tensor(row // group))]
    assert sorted(own) == rows.tolist()


def test_a_group_of_one_changes_nothing():
    policy = tiny()
    assert shard(policy, Group()) is policy and policy.group.size == 1
    x = torch.ones(2)
    assert Group().total(x) is x and Group().share(3).tolist() == [0, 1, 2]


def test_a_group_does_not_lower_its_limits():
    training = SimpleNamespace(base=SimpleNamespace(group=Group(0, 2)), limits=Limits(), notes=[])

    def attempt():
        with memory_module.Attempt(training, "gradients", dict(micro_tokens=8), {}): raise MemoryError
    with pytest.raises(MemoryError): attempt()
    assert training.limits == Limits() and not training.notes
    training.base.group = Group()
    attempt()
    assert training.limits.micro_tokens == 4 and training.notes[0]["part"] == "gradients"



def test_a_lora_policy_is_not_spread():
    with pytest.raises(ValueError, match="LoRA policy"): shard(lora(tiny(), 2), Group(0, 2))

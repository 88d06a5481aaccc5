"A graphics card gives the numbers of the processor, within float32: `make test-cuda`; `-s` prints differences."
from dataclasses import replace

import pytest
import torch

from copd_nb.engine import step as step_module
from copd_nb.engine.accelerator import accelerator_for, machine
from copd_nb.engine.request import placed
from copd_nb.schedule.paradigms import merged_experts, mixed_rlvr, mopd, static_opd
from copd_nb.scale.trl import TrlLearner
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.passes import collect, hear, teacher_scores
from copd_nb.engine.batches import Batch
from copd_nb.engine.state import Training, model_shape
from copd_nb.engine.step import train_step
from copd_nb.engine.training import train
from copd_nb.engine.update import gradients_of
from copd_nb.analysis.token_gap import behavior_gap
from copd_nb.schedule.merging import METHODS, merge
from copd_nb.policy.toys import minis_base, minis, tiny_policy
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import lora
from copd_nb.scale.sharding import ShardedPolicy, join_group
from copd_nb.study.loading import slow_precision
from copd_nb.study.memory import memory_plan
from copd_nb.signals import replay
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample
from copd_nb.engine.runs import Run
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, SFT, Phase, Update

if not torch.cuda.is_available(): pytest.skip("no CUDA device", allow_module_level=True)

TINY = Config(prompts=4, opd_prompts=4, group_size=4, max_new_tokens=10, probe_every=2, probe_prompts=4, eval_every=3,
              eval_prompts=8, eval_samples=1, learning_rate=1e-4, warmup=2)
NAMES = ("text", "image", "video")
PAIR = ["text", "image"]
COPD = copd(PAIR, cycles=2, s_rl=2, s_opd=2, beta=0.5)
CPU = dict(device="cpu")


@pytest.fixture(autouse=True)
def plain_float32():
    "No TF32, which convolutions use where nobody says otherwise: the patches of a picture then have three digits."
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def start(): return minis_base()


@pytest.fixture(scope="module")
def suite(): return minis(NAMES)


def on_card(policy): return policy.clone().to("cuda")
def flat(gradient): return torch.cat([g.detach().flatten().cpu() for g in gradient if g is not None])
def weights(policy): return flat(policy.parameters())
def off(a, b): return ((a - b).norm() / (b.norm() or 1)).item()


def stirred(policy, seed=0, size=0.02):
    "A copy with noise on its weights, the same on every device."
    policy, source = policy.clone(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters(): p.add_((torch.randn(p.shape, generator=source) * size).to(p.device))
    return policy


def test_what_the_card_is(tmp_path):
    said = machine(accelerator_for(TINY))
    assert said["device"] == torch.cuda.get_device_name()
    assert (slow_precision(replace(TINY, precision="bf16")) is None) == said["native_bf16"]
    assert machine(accelerator_for(replace(TINY, device="cpu")))["device"] == "cpu"


# Forward passes

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packs, tokens, tf32", [(True, 8, False), (False, 8, False), (True, 70, False),
                                                 (False, 70, False), (True, 8, True)])
def test_log_probabilities(name, packs, tokens, tf32, start, suite):
    torch.backends.cudnn.allow_tf32 = tf32
    policy, card = start.clone(), on_card(start)
    policy.packs = card.packs = packs
    ids = torch.randint(20, 60, (12, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = (p.completion_logits(p.encode(suite[name].test[:4]),
                                                      ids.to(p.device)).float().log_softmax(-1) for p in (policy, card))
    worst = (a - b.cpu()).abs().max().item()
    print(f"log-probabilities of {name}, {tokens} tokens, {'packed' if packs else 'padded'}{', TF32' if tf32 else ''}: "
          f"{worst:.1e} nats apart")
    assert b.is_cuda and worst < (5e-2 if tf32 else 1e-3)


def test_sampled_log_probabilities_are_those_of_a_forward_pass(start, suite):
    card = on_card(start)
    prompts = card.encode([e for n in NAMES for e in suite[n].test[:4]])
    out = sample(card, prompts, 4, 12, source=generator(card.device, "test"))
    with torch.no_grad(): logits = card.completion_logits(prompts, out.ids)
    logp = logits.float().log_softmax(-1).gather(-1, out.ids[..., None])[..., 0]
    assert ((out.logp - logp) * out.mask).abs().max() < 2e-3
    again = sample(card, prompts, 4, 12, source=generator(card.device, "test"))
    assert torch.equal(out.ids, again.ids)


@pytest.mark.parametrize("kind", ["full", "adapters", "adapters, bf16", "recomputed"])
def test_graphs_repeat_what_they_recorded(kind, start, suite, monkeypatch):
    "Rollouts whose positions are CUDA graphs: the tokens of the same steps run anew, with new weights and fewer rows."
    card, replays = on_card(lora(start.clone(), 4) if "adapters" in kind else start), []
    if kind == "recomputed": card.recompute()
    prompts = card.encode([e for n in NAMES for e in suite[n].test[:4]])
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), real(graph))[1])
    lengths = torch.arange(1, 97, device="cuda") % 40 + 1  # the table shrinks

    def rolled(repeat):
        monkeypatch.setitem(replay.REPEATS, "cuda", repeat)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled="bf16" in kind):
            return sample(card, prompts, 8, 40, source=generator(card.device, "test"), lengths=lengths)
    for seed in range(3):
        card.graphs, before = True, len(replays)
        graphs, eager = rolled(replay.Captured), rolled(replay.Eager)
        assert torch.equal(graphs.ids, eager.ids) and (graphs.logp - eager.logp).abs().max() < 1e-4
        assert len(replays) - before > (20 if not seed else 38)  # but for those that warm up
        with torch.no_grad():
            logits = card.completion_logits(prompts, graphs.ids)
            for p in card.parameters(): p.add_(0.01 * torch.randn_like(p))
        logp = logits.float().log_softmax(-1).gather(-1, graphs.ids[..., None])[..., 0]
        off = ((graphs.logp - logp) * graphs.mask).abs()
        print(f"graphs, {kind}: {off.max():.1e} nats from a scoring pass, {len(replays) - before} replays, as the "
              f"steps themselves to {(graphs.logp - eager.logp).abs().max():.0e}")
        assert off.mean() < 0.05 if "bf16" in kind else off.max() < 2e-3
    replay.release()


def test_gap_between_two_policies(start, suite):
    other, examples = stirred(start), suite["image"].test[:6]
    given = dict(completions=["12", "3", "7+8:15", "9", "4", "11"], k=(5, 10))
    here, there = behavior_gap(start, other, examples, **given), behavior_gap(on_card(start), on_card(other), examples,
                                                                              **given)
    for column in here.select_dtypes("number"): assert (here[column] - there[column]).abs().max() < 5e-3, column


# Gradients: the rollouts of the processor, learned from on both

ESTIMATORS = ["sampled", "topk", "reverse", "forward", "jsd", "low_probability"]
CHANGES = [dict(pack=False), dict(micro_prompts=2, micro_tokens=24), dict(recompute=True, micro_prompts=2),
           dict(shared_prompt=False), dict(max_new_tokens=64), dict(reduction="sequence")]


def training_of(schedule, policy, suite, config, folder) -> Training:
    "A training before its first step."
    run, accelerator = Run.__new__(Run), accelerator_for(config)
    run.path = folder
    (folder / "events.jsonl").touch()
    return Training(schedule, suite, placed("base", policy, config, accelerator), config, accelerator, run)


def begun(policy, suite, config, folder, estimator="sampled") -> Training:
    "Two branches that are apart, before their first step."
    updates = [Update("a", (RL("image"), OPD("video", "b", 1.0, estimator), SFT("text"))), Update("b", (RL("text"),))]
    training = training_of(Schedule("pair", dict(a="base", b="base"), [Phase("both", 1, updates)], "a"), policy, suite,
                           config, folder)
    for seed, name in enumerate("ab"): training.branch(name).policy = stirred(training.branch(name).policy, seed)
    return training


def drawn(training) -> list[Batch]:
    "The batches of a step of branch a, with advantages that are not flat."
    batches = collect(training, training.schedule.phases[0].updates[0], 0)
    for batch in batches:
        if isinstance(batch.signals[0], RL): batch.advantages = torch.randn(len(batch.rollouts.ids),
                                                                            generator=torch.Generator().manual_seed(0))
    return batches


def moved(training, batch) -> Batch:
    "The same rollouts for a training on the card, whose own teacher scores them."
    out = batch.rollouts
    tensors = {n: getattr(out, n).cuda() for n in ("ids", "mask", "finished", "logp", "entropy", "top_ids")
               if getattr(out, n) is not None}
    there = Batch(batch.signals, replace(out, start=None,
                                         prompts=training.branch("a").policy.encode(out.prompts.examples), **tensors))
    if batch.advantages is not None: there.advantages = batch.advantages.cuda()
    if isinstance(batch.signals[0], OPD) and batch.taught: hear(there, teacher_scores(training, batch.signals[0],
                                                                                      there.rollouts))
    return there


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("estimator, changes", [(e, {}) for e in ESTIMATORS] + [("sampled", c) for c in CHANGES],
                         ids=str)
def test_losses_and_gradients(estimator, changes, adapters, start, suite, tmp_path):
    here, there = (begun(lora(start.clone(), rank=4) if adapters else start, suite, replace(TINY, **changes, **at),
                         tmp_path, estimator) for at in (CPU, {}))
    batches = drawn(here)
    card = [moved(there, b) for b in batches]
    (ours, losses), (found, lost) = gradients_of(here, "a", batches), gradients_of(there, "a", card)
    for stream in ours:
        apart = off(flat(found[stream]), flat(ours[stream]))
        print(f"gradient of {stream}, {estimator} {changes}{' adapters' if adapters else ''}: {apart:.1e}; loss "
              f"{abs(lost[stream] - losses[stream]):.1e}")
        assert apart < 1e-4 and abs(lost[stream] - losses[stream]) < 1e-5
    for a, b in zip(batches, card): assert (a.logp - b.logp.cpu()).abs().max() < 2e-3


def test_bf16_points_where_fp32_does(start, suite, tmp_path):
    plain, half = (begun(start, suite, replace(TINY, precision=p), tmp_path) for p in ("fp32", "bf16"))
    batches = [moved(plain, b) for b in drawn(begun(start, suite, replace(TINY, **CPU), tmp_path))]
    exact, _ = gradients_of(plain, "a", batches)
    half.accelerator = accelerator_for(half.config)
    found, _ = gradients_of(half, "a", [moved(half, b) for b in batches])
    for stream in exact:
        a, b = flat(exact[stream]), flat(found[stream])
        print(f"bf16, {stream}: cosine {torch.cosine_similarity(a, b, 0):.4f}")
        assert torch.cosine_similarity(a, b, 0) > 0.95 and not torch.equal(a, b)


# Runs

def rows(run): return run.events.drop(columns="seconds")


@pytest.mark.parametrize("schedule", [COPD, mixed_rlvr(PAIR, 3), mopd(PAIR, 2, 2), static_opd("text", "image", 2, 2),
                                      merged_experts(PAIR, 2)], ids=lambda s: s.name)
def test_every_paradigm_runs(schedule, start, suite, tmp_path):
    run = train(schedule, suite, start, TINY, tmp_path / "run", progress=False)
    assert run.finished and run.manifest["machine"]["device"] == torch.cuda.get_device_name()
    assert run.manifest["peak_memory"] > 0
    assert start.device.type == "cpu" and torch.isfinite(weights(run.result)).all()
    known = run.events[["reward", "loss", "gradient_norm", "overlap", "seconds"]].dropna(how="all")
    assert len(known) > 6


@pytest.mark.parametrize("kind", ["full", "adapters", "adapters on bf16"])
def test_interrupted_and_resumed_equals_uninterrupted(kind, start, suite, tmp_path, dies_after):
    policy = start if kind == "full" else lora(start, 4)
    if kind == "adapters on bf16":
        half = start.clone()
        half.model.bfloat16()
        policy = lora(half, 4)
    config = replace(TINY, precision="bf16" if "bf16" in kind else "fp32")
    whole = train(COPD, suite, policy, config, tmp_path / "whole", progress=False)
    with dies_after(5): train(COPD, suite, policy, config, tmp_path / "cut", progress=False)
    resumed = train(COPD, suite, policy, config, tmp_path / "cut", progress=False)
    a, b = rows(whole), rows(resumed)
    assert len(a) == len(b) and a[["kind", "global_step", "branch", "stream"]].equals(b[["kind", "global_step",
                                                                                         "branch", "stream"]])
    apart = {c: float((a[c] - b[c]).abs().max()) for c in ("reward", "loss", "gradient_norm", "overlap")}
    print(f"resumed, {kind}: weights {off(weights(resumed.result), weights(whole.result)):.1e}, columns {apart}")
    assert torch.equal(weights(resumed.result), weights(whole.result)) and a.equals(b)


def test_a_run_of_the_card_is_read_without_one(start, suite, tmp_path):
    run = train(merged_experts(PAIR, 1), suite, start, TINY, tmp_path / "run", progress=False)
    assert run.result.device.type == "cpu" and run.branch("text").device.type == "cpu"
    again = train(merged_experts(PAIR, 1), suite, start, TINY, tmp_path / "run", progress=False)
    assert torch.equal(weights(again.result), weights(run.result))


@pytest.mark.parametrize("method", METHODS)
def test_merging(method, start):
    parts, more = [stirred(start, s) for s in (0, 1)], {} if method in ("linear", "slerp") else dict(base=start)
    here = merge(parts, method, **more)
    there = merge([on_card(p) for p in parts], method, **{k: on_card(v) for k, v in more.items()})
    assert off(weights(there), weights(here)) < 1e-6


def test_trl_learns_the_same(start, suite, tmp_path):
    pytest.importorskip("trl")
    schedule, two = copd(PAIR, cycles=1, s_rl=1, s_opd=1, beta=0.5), {n: suite[n] for n in PAIR}
    own, other = (train(schedule, two, start, replace(TINY, probe_every=0, eval_every=0, warmup=0), tmp_path / name,
                        progress=False, learner=learner) for name, learner in (("own", None), ("trl", TrlLearner())))
    first, second = (run.events[run.events.global_step == 1] for run in (own, other))
    print(f"TRL: losses {(first.loss - second.loss).abs().max():.1e}, gradient norms "
          f"{((first.gradient_norm - second.gradient_norm) / first.gradient_norm).abs().max():.1e}")
    assert (first.reward == second.reward).all() and (first.loss - second.loss).abs().max() < 1e-4
    assert ((first.gradient_norm - second.gradient_norm).abs() / first.gradient_norm).max() < 1e-3


# Memory

BIG = dict(hidden=512, layers=8)  # 26 M weights
WIDE = Config(prompts=32, opd_prompts=32, group_size=16, max_new_tokens=64, probe_every=0, eval_every=0,
              skip_flat=False, learning_rate=1e-4, keep_prefill=False)


def wide(config, suite, folder, policy=None):
    "Peak of one RL step of a branch in GiB, without what was held before, and the training."
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    schedule = Schedule("one", dict(a="base"), [Phase("rl", 1, [Update("a", (RL("text"),))])], "a")
    training = training_of(schedule, policy or tiny_policy(**BIG), suite, config, folder)
    train_step(training, schedule.phases[0], 0)
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30, training


def test_recompute_gives_the_same_for_less(suite, tmp_path):
    (full, a), (less, b) = (wide(replace(WIDE, recompute=r), suite, tmp_path) for r in (False, True))
    apart = off(weights(b.branch("a").policy), weights(a.branch("a").policy))
    print(f"recompute: {less:.2f} GiB instead of {full:.2f}; weights {apart:.1e}")
    assert less < 0.6 * full and off(weights(b.branch("a").policy), weights(a.branch("a").policy)) < 1e-4


def test_half_as_much_at_once_when_the_card_is_full(suite, tmp_path):
    whole, a = wide(WIDE, suite, tmp_path)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.5 * whole * 2 ** 30) / total)
    try: short, b = wide(WIDE, suite, tmp_path)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    noted = [n for n in b.notes if n["kind"] == "memory"]
    print(f"memory: {whole:.2f} GiB; with half of it {short:.2f} after "
          f"{[(n['part'], n['micro_prompts'], n['micro_tokens'], n['rollout_rows']) for n in noted]}")
    assert any("update" == n["part"] and "out of memory" in n["reason"] for n in noted) and short < 0.6 * whole
    assert off(weights(b.branch("a").policy), weights(a.branch("a").policy)) < 1e-4


@pytest.mark.parametrize("kind", ["full", "micro", "recompute", "bf16", "adapters", "adapters, recomputed"])
def test_the_memory_plan_holds(kind, suite, tmp_path):
    config = replace(WIDE, **dict(full={}, micro=dict(micro_tokens=4096, micro_prompts=8, rollout_rows=64),
                                  recompute=dict(recompute=True), bf16=dict(precision="bf16"), adapters={}).get(kind,
                                                                                                                dict(recompute=True)))
    policy = lora(tiny_policy(**BIG), 16) if "adapters" in kind else None
    peak, training = wide(config, suite, tmp_path, policy)
    text = training.base.model.config.get_text_config()
    size = sum(p.numel() for p in training.branch("a").policy.parameters()) if "adapters" in kind else None
    plan = memory_plan(text, model_shape(training.base), training.schedule, config, size,
                       prompt=12).set_index("item")["GiB"]
    print(f"plan, {kind}: {plan['sum']:.2f} GiB, measured {peak:.2f}: {peak / plan['sum']:.2f}")
    assert 0.4 < peak / plan["sum"] < 1.2


def test_nothing_is_left_behind(start, suite, tmp_path, monkeypatch):
    held, real = [], step_module.train_step

    def noted(*args):
        found = real(*args)
        held.append(torch.cuda.memory_allocated())
        return found
    monkeypatch.setattr(step_module, "train_step", noted)
    train(copd(PAIR, cycles=1, s_rl=1, s_opd=12, beta=0.5), suite, start, TINY, tmp_path / "run", progress=False)
    print("held in MiB after each step:", [round(h / 2 ** 20, 2) for h in held])
    assert held[-1] <= held[3] + 2 ** 18


# A branch on devices

def test_a_sharded_policy_of_one_card(start, suite, tmp_path):
    "FSDP2 over NCCL, with one process: what more would add is only talk."
    group = join_group(0, 1, f"file://{tmp_path}/meet", "cuda")
    try:
        card, ids = on_card(start), torch.randint(20, 60, (4, 6), generator=torch.Generator().manual_seed(0)).cuda()
        sharded = ShardedPolicy.of(card.clone(), group)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(card.state_dict().values(),
                                                                 sharded.state_dict().values()))
        found = []
        for policy in (card, sharded, sharded.clone()):
            policy.zero_grad()
            with policy.learning(): policy.completion_logits(policy.encode(suite["image"].test[:4]),
                                                             ids).float().log_softmax(-1)[..., 30].sum().backward()
            found.append(flat([p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                               for p in policy.parameters() if p.grad is not None]))
        assert off(found[1], found[0]) < 1e-5 and off(found[2], found[0]) < 1e-5
    finally: torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}], ids=str)
def test_loaded_onto_the_card(device_map, start, suite, tmp_path):
    path = start.save(tmp_path / "saved")
    policy = Policy.load(path, device_map=device_map)
    assert policy.device.type == "cuda" and policy.to("cuda") is policy
    ids = torch.randint(20, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = (p.completion_logits(p.encode(suite["image"].test[:2]), ids.to(p.device)).cpu()
                                  for p in (start, policy))
    assert (a - b).abs().max() < 5e-3
    run = train(COPD, suite, lora(policy, 2), TINY, tmp_path / "run", progress=False)
    assert run.finished

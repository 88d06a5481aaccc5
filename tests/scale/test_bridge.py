"TRL's trainer as a learner: losses, gradients and steps of the engine, a model that is left as it was, clear refusals."
import copy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from copd_nb.engine import resume as resume_module
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine import phase as phase_module
from copd_nb.engine import update as update_module
from copd_nb.scale import trl as trl_module
from copd_nb.scale.trl import TrlLearner, _share
from copd_nb.scale.trl_model import OURS, lent, settings_of
from copd_nb.data.capability import Capability
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.passes import collect
from copd_nb.engine.state import Training
from copd_nb.engine.training import train
from copd_nb.engine.update import gradients_of, optimizer_step
from copd_nb.policy.toys import minis_base, image, minis, text, tiny_policy, video
from copd_nb.signals.objectives import clip_share
from copd_nb.signals.sampling import sample_many
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.processors import character_tokenizer
from copd_nb.engine.runs import Run
from copd_nb.schedule.parts import OPD, RL, SFT

pytest.importorskip("trl")
SMALL = dict(hidden=24, layers=1, vision_hidden=16, vision_depth=1)
CONFIG = Config(prompts=3, opd_prompts=2, group_size=3, max_new_tokens=4, learning_rate=1e-3, warmup=1, device="cpu")
SUMS = text(8)
SUITES = {"text": {"text": SUMS, "more": Capability("more", SUMS.train[::-1], SUMS.test, SUMS.reward)},
          "image": {"text": SUMS, "image": image(16, 4)}}


def language_model(kind="qwen3", **more):
    "A tiny text model whose head has eight rows that belong to no token."
    tokenizer = character_tokenizer()
    sizes = dict(vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                 pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False) | more
    config, model = dict(qwen3=(Qwen3Config, Qwen3ForCausalLM), llama=(LlamaConfig, LlamaForCausalLM))[kind]
    torch.manual_seed(0)
    return Policy(model(config(**sizes)), tokenizer, kind)


POLICIES = {"qwen3": (language_model, "text"), "llama": (lambda: language_model("llama", attention_bias=True), "text"),
            "vision": (lambda: tiny_policy(**SMALL), "image"),
            "adapters": (lambda: lora(tiny_policy(**SMALL), rank=2), "image")}


def begin(kind, config, folder, size=0.03) -> Training:
    "Two branches that are apart, before their first step."
    make, suite = POLICIES[kind]
    run, source, names = Run.__new__(Run), torch.Generator().manual_seed(1), list(SUITES[suite])
    run.path = folder
    (folder / "events.jsonl").touch()
    training = Training(copd(names, cycles=1, s_rl=1, s_opd=1, beta=0.5), SUITES[suite], make(), config,
                        accelerator_for(config), run)
    with torch.no_grad():
        for name in names:
            for p in training.branch(name).policy.parameters(): p.add_(torch.randn(p.shape, generator=source) * size)
    return training


def scored(training, name, step=0):
    "The batches of a step in which branches teach; advantages are drawn, with a flat group among them."
    update = next(u for u in training.schedule.phases[-1].updates if u.branch == name)
    batches, source = collect(training, update, step), torch.Generator().manual_seed(step)
    for batch in batches:
        if not isinstance(batch.signals[0], RL): continue
        batch.advantages = torch.randn(len(batch.rollouts.ids), generator=source)
        batch.advantages[:training.config.group_size] = 0
    return batches


def own(training, name): return {id(p) for p in training.branch(name).policy.parameters()}
def flat(gradient): return torch.cat([g.flatten() for g in gradient if g is not None])
def weights(training, name): return flat(training.branch(name).policy.parameters()).detach().clone()
def near(a, b, size=1e-4): return (a - b).norm() <= size * max(1, b.norm())


def check(training, name, learner, batches):
    "Gradients of copies of the batches with both; returns those of the learner."
    ours, theirs = ([copy.copy(b) for b in batches] for _ in range(2))
    (g, l), (h, m) = gradients_of(training, name, ours), learner.gradients(training, name, theirs)
    assert list(g) == list(h) and {s.split(":")[0] for s in g} == {"rl", "opd"}
    for stream in g:
        assert [x is None for x in g[stream]] == [x is None for x in h[stream]] and flat(g[stream]).norm() > 1e-4
        assert near(flat(h[stream]), flat(g[stream])) and abs(l[stream] - m[stream]) < 1e-4
    for a, b in zip(ours, theirs):
        for field in ("logp", "old_logp", "entropy"): assert torch.allclose(getattr(a, field), getattr(b, field),
                                                                            atol=1e-4), field
        assert b.real > 0 and b.seconds > 0
    assert all(p.grad is None for p in training.branch(name).policy.parameters())
    return theirs, h


CHANGES = [dict(), dict(reduction="sequence", temperature=0.7), dict(reduction="constant", micro_tokens=12,
                                                                     micro_prompts=1, delta_clip=0.05,
                                                                     advantage_scale="none"), dict(skip_flat=False)]


CASES = [("qwen3", "text", c) for c in CHANGES] + [("vision", "text", CHANGES[1]), ("vision", "image", CHANGES[2]),
                                                   ("llama", "more", CHANGES[1]), ("adapters", "image", CHANGES[0])]

@pytest.mark.parametrize("kind, name, changes", CASES)
def test_one_rl_and_one_opd_step_give_the_engines_loss_and_gradient(kind, name, changes, tmp_path):
    training = begin(kind, replace(CONFIG, **changes), tmp_path)
    check(training, name, TrlLearner(), scored(training, name))


def test_the_control_without_a_teacher_has_gradients_too(tmp_path):
    training = begin("qwen3", CONFIG, tmp_path)
    batches = scored(training, "text")
    for batch in batches:
        if isinstance(batch.signals[0], OPD): batch.signals = (replace(batch.signals[0], estimator="low_probability"),)
    check(training, "text", TrlLearner(), batches)


@pytest.mark.parametrize("level, mode", [("token", "truncate"), ("sequence", "mask")])
def test_another_samplers_weights_are_the_engines(level, mode, tmp_path):
    "A sampler at another temperature: TRL's loss takes its weights with the advantages, in a second update, too."
    def hot(policy, requests, length, temperature, *options):
        return [replace(out, start=None) for out in sample_many(policy, requests, length, 1.3, *options)]
    training = begin("qwen3", replace(CONFIG, sampler_level=level, sampler_correction=mode, sampler_cap=1.2), tmp_path)
    training.sampler = hot
    learner, batches = TrlLearner(), scored(training, "text")
    again, _ = check(training, "text", learner, batches)
    check(training, "text", learner, again)
    for batch in batches:
        plain = replace(batch, old_logp=None, sampler_logp=None)
        (a, _), (b, _) = (learner.gradients(training, "text", [x]) for x in (plain, batch))
        a, b = flat(a[batch.stream]), flat(b[batch.stream])
        assert (a - b).norm() > 0.01 * b.norm()


def test_later_epochs_clip_as_the_engine_does(tmp_path):
    training, learner = begin("qwen3", replace(CONFIG, clip_low=0.01, clip_high=0.012), tmp_path), TrlLearner()
    batches, found = check(training, "text", learner, scored(training, "text"))
    learner.optimizer_step(training, "text", found, 0.1)
    again, _ = check(training, "text", learner, batches)
    rl = next(b for b in again if b.stream == "rl")
    assert 0 < clip_share(rl.logp, rl.old_logp, rl.advantages, rl.rollouts.mask, 0.01, 0.012) < 1


@pytest.mark.parametrize("kind, decay", [("qwen3", 0.1), ("adapters", 0.0)])
def test_two_steps_end_where_the_engine_does(kind, decay, tmp_path):
    "Weight decay included: it acts on norms, too, as in the engine."
    losses, ends, norms, starts = [], [], [], []
    for gradients, step in ((gradients_of, optimizer_step), ((learner := TrlLearner()).gradients,
                                                             learner.optimizer_step)):
        training = begin(kind, replace(CONFIG, weight_decay=decay, learning_rate=1e-4), tmp_path)
        starts.append(weights(training, "text"))
        for n in range(2):
            found, lost = gradients(training, "text", scored(training, "text", n))
            losses.append(lost)
            norms.append(step(training, "text", found, 1.0))
        ends.append(weights(training, "text"))
        assert training.branch("text").updates == 2
    assert torch.equal(*starts) and (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - starts[0]).norm()
    for a, b in zip(losses[:2], losses[2:]): assert all(abs(a[s] - b[s]) < 1e-4 for s in a)
    for a, b in zip(norms[:2], norms[2:]): assert a == pytest.approx(b, rel=1e-3)


def moments(training) -> dict: return resume_module._pack(training, "text").get("text~all", {})


def test_equal_gradients_take_equal_steps_and_moments_travel(tmp_path):
    training, learner = begin("qwen3", replace(CONFIG, weight_decay=0.1), tmp_path), TrlLearner()
    gradients, _ = gradients_of(training, "text", scored(training, "text"))
    files = {stem.split("~")[1]: {k: v.clone() for k, v in named.items()} for stem,
             named in resume_module._pack(training, "text").items()}
    counters, _ = resume_module.counters(training, "text")
    def begun(learner, **more):
        training.learner = learner
        resume_module._restore(training, "text", files | more, counters)
        for _ in range(2 - bool(more)): learner.optimizer_step(training, "text", gradients, 1.0)
        return weights(training, "text")
    assert torch.equal(begun(update_module.Learner()), begun(learner))
    kept = copy.deepcopy(moments(training))
    begun(update_module.Learner())
    assert set(kept) == set(moments(training))  # a run may change learners
    ahead = begun(learner, all=kept)
    assert float(moments(training)["0/step"]) == 3 and not torch.equal(ahead, begun(learner))


def test_fresh_moments_at_a_phase_if_asked_for(tmp_path):
    training, learner = begin("qwen3", replace(CONFIG, optimizer_state="reset"), tmp_path), TrlLearner()
    gradients, _ = learner.gradients(training, "text", scored(training, "text"))
    learner.optimizer_step(training, "text", gradients, 1.0)
    phase_module._fresh(training, "text")
    assert moments(training) == {}
    learner.optimizer_step(training, "text", gradients, 1.0)
    assert float(moments(training)["0/step"]) == 1


def test_a_whole_run_through_trl(tmp_path):
    "The same schedule, engine and log; losses and rewards of the first step as the built-in learner's, to 1e-4."
    suite, start = minis(("text", "image")), minis_base()
    config = Config(prompts=4, opd_prompts=4, group_size=4, probe_every=0, eval_every=0, device="cpu", warmup=0)
    schedule = copd(["text", "image"], cycles=1, s_rl=1, s_opd=1, beta=0.5)
    own, lent = (train(schedule, suite, start, config, tmp_path / name, progress=False, learner=learner) for name,
                 learner in (("own", None), ("trl", TrlLearner())))
    assert lent.manifest["learner"] == "TrlLearner" and "learner" not in own.manifest
    assert own.manifest["content_hash"] != lent.manifest["content_hash"]
    first, second = (run.events[run.events.global_step == 1] for run in (own, lent))
    assert (first.reward == second.reward).all() and (first.loss - second.loss).abs().max() < 1e-4
    assert ((first.gradient_norm - second.gradient_norm).abs() / first.gradient_norm).max() < 1e-4
    assert len(own.events) == len(lent.events)


@pytest.mark.parametrize("kind", ["llama", "adapters"])
def test_the_model_is_left_as_it_was(kind, tmp_path):
    training, learner = begin(kind, CONFIG, tmp_path), TrlLearner()
    policy, batches = training.branch("text").policy, scored(training, "text")
    head = policy.model.get_output_embeddings()
    before, random, bias = weights(training, "text"), torch.random.get_rng_state(), head.bias
    prompts = policy.encode(SUMS.test[:2])
    logits = policy.completion_logits(prompts, torch.full((2, 3), 30))
    learner.gradients(training, "text", batches)
    assert torch.equal(before, weights(training, "text")) and torch.equal(random, torch.random.get_rng_state())
    assert "forward" not in vars(policy.model) and not policy.model.training
    assert head.bias is bias and "bias" in head._parameters
    assert torch.equal(logits, policy.completion_logits(prompts, torch.full((2, 3), 30)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl"]
    with pytest.raises(KeyError), lent(policy): raise KeyError
    assert "forward" not in vars(policy.model) and head.bias is bias


def test_precision_and_device_stay_those_of_the_run(tmp_path):
    for precision in ("bf16", "fp32"):
        training = begin("qwen3", replace(CONFIG, precision=precision), tmp_path)
        batches, learner = scored(training, "text"), TrlLearner()
        gradients, losses = learner.gradients(training, "text", batches)
        ours, expected = gradients_of(training, "text", [replace(b, old_logp=None) for b in batches])
        of_trainer = learner.trainer(training, "text").accelerator
        assert of_trainer.mixed_precision == ("bf16" if training.accelerator.bf16 else "no")
        assert of_trainer.device == training.accelerator.device == torch.device("cpu")
        assert all(near(flat(gradients[s]), flat(ours[s]), 0.2 if precision == "bf16" else 1e-4)
                   and abs(losses[s] - expected[s]) < 0.05 for s in ours)


def test_a_trainer_a_branch_and_a_new_one_for_another_policy(tmp_path):
    training, learner = begin("adapters", CONFIG, tmp_path), TrlLearner(adam_epsilon=1e-7)
    a, b = (learner.trainer(training, name) for name in ("text", "image"))
    assert a is not b and a.model is b.model and learner.trainer(training, "text") is a and a.args.adam_epsilon == 1e-7
    for name in ("text", "image"): assert {id(p) for g in learner.optimizer(training, name).param_groups
                                           for p in g["params"]} == own(training, name)
    training.branches["text"].policy = training.branch("text").policy.clone()
    assert learner.trainer(training, "text") is not a


def test_trl_decides_nothing_about_the_objective(tmp_path):
    training = begin("qwen3", replace(CONFIG, clip_low=0.1, temperature=0.9, betas=(0.8, 0.9)), tmp_path)
    args = TrlLearner().trainer(training, "text").args
    for name, value in OURS.items(): assert getattr(args, name) == ([] if name == "report_to" else value), name
    assert (args.epsilon, args.epsilon_high, args.temperature, args.adam_beta1, args.adam_beta2) == (0.1, 0.28, 0.9,
                                                                                                     0.8, 0.9)
    assert settings_of(replace(CONFIG, precision="bf16"))["bf16"] and not args.bf16 and args.use_cpu


def refused(match, work):
    with pytest.raises(ValueError, match=match): work()


def test_what_trl_can_not_express_is_refused(tmp_path):
    training, learner = begin("vision", CONFIG, tmp_path), TrlLearner()
    batch = next(b for b in scored(training, "text") if isinstance(b.signals[0], OPD))
    for signal in (OPD("image", "image", estimator="reverse"), OPD("image", "image", estimator="topk"), SFT("text")):
        refused("allowed are RL and OPD with an estimator by advantages, such as 'sampled'",
                lambda: learner.gradients(training, "text", [replace(batch, signals=(signal,))]))
    seen = video(4, 4).test[:1]
    film = replace(batch, rollouts=replace(batch.rollouts, prompts=training.base.encode(seen)))
    refused(f"prompt {seen[0].id} of stream .* has a video", lambda: learner.gradients(training, "text", [film]))
    refused(r"options \['beta', 'use_vllm'\]", lambda: TrlLearner(beta=0.1, use_vllm=True))
    training.config = replace(CONFIG, optimizer_state="separate")
    refused("allowed are 'keep' and 'reset'", lambda: TrlLearner().gradients(training, "text", [batch]))
    training.config = replace(CONFIG, optimizer="sgd")
    refused("optimizer='sgd': .* allowed is 'adamw'", lambda: TrlLearner().gradients(training, "text", [batch]))


def test_models_that_trl_would_compute_otherwise_are_refused(tmp_path):
    training, tokenizer = begin("qwen3", CONFIG, tmp_path), character_tokenizer()
    policy = training.branch("text").policy
    policy.model.config.final_logit_softcapping = 30.0
    refused("soft-capped logits and 9 banned ids", lambda: TrlLearner().trainer(training, "text"))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                     eos_token_id=tokenizer.eos_token_id))
    training.branch("text").policy = Policy(gpt, tokenizer, "gpt")
    refused("'gpt' has no rotary positions", lambda: TrlLearner().trainer(training, "text"))


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    training, deepspeed = begin("qwen3", CONFIG, tmp_path), SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(trl_module, "_configured", lambda config: deepspeed)
    refused("shard the model with FSDP2", lambda: TrlLearner().trainer(training, "text"))


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_row_of_a_pass_belongs_to_one_process(n, rows):
    shares = [_share(SimpleNamespace(num_processes=n, process_index=i), torch.arange(10, 10 + rows)) for i in range(n)]
    assert len({len(mine) for mine, _ in shares}) == 1 and all(len(mine) == len(weights) for mine, weights in shares)
    assert sorted(int(r) for mine, weights in shares for r in mine[weights > 0]) == list(range(10, 10 + rows))


@pytest.mark.slow
def test_two_processes_give_the_engines_loss_and_gradient():
    "Whole models and one sharded by FSDP2, over gloo; the script asserts."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(port), Path(__file__).parents[1].joinpath("two_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("agrees") == 8, done.stdout + done.stderr[-3000:]


def test_without_trl_the_module_stands_and_its_use_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install copd_nb\[trl\]"): TrlLearner()

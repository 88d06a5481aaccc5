"""`VllmSampler` with a real vLLM on the processor: `make test-vllm`; `-s` prints how far numbers are apart.

Log-probabilities that vLLM reports are compared with those of a pass of the policy over the same tokens, in fp32. They
were at most 1e-5 nats apart; weights that are not the policy's, or pictures that are not the prompt's, put them
0.1 nats apart and more."""
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from same_runs import PAIR, TINY, same

from copd_nb.engine import request
from copd_nb.engine.evaluation import evaluate
from copd_nb.engine.training import train
from copd_nb.policy.lora_branches import lora
from copd_nb.policy.toys import minis, minis_base
from copd_nb.scale.vllm import VllmSampler
from copd_nb.schedule.copd_schedules import copd
from copd_nb.signals.rollouts import Request, completion_mask, generator
from copd_nb.signals.sampling import sample
from copd_nb.study.experiment import Experiment

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")]
OPTIONS = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2 ** 28, max_model_len=256)
KINDS = ("text", "image", "video")
CLOSE = 5e-5  # nats


@pytest.fixture(scope="module")
def base(): return minis_base()


@pytest.fixture(scope="module")
def suite(): return minis(KINDS)


@pytest.fixture(scope="module")
def sampler(base):
    "The shipped base's own folder names a processor that vLLM doesn't know."
    return VllmSampler(base.origin, **OPTIONS)


@pytest.fixture(scope="module")
def examples(suite): return [suite[kind].test[i] for kind in KINDS for i in range(3)]


def ask(sampler, policy, examples, *key, group=4, temperature=1.0, length=16, **more):
    request = Request(policy.encode(examples), group, generator("cpu", 0, *key), **more)
    return sampler(policy, [request], length, temperature)[0]


def apart(policy, out, temperature=1.0):
    "Largest difference of a sampler's log-probs to the policy's own, nats."
    with torch.no_grad(): own = policy.completion_logits(out.prompts, out.ids, temperature).log_softmax(-1)
    worst = float(((own.gather(-1, out.ids[..., None])[..., 0] - out.logp) * out.mask).abs().max())
    print(f"{policy.name}, {sorted({e.capability for e in out.examples})}: {worst:.1e} nats apart")
    return worst


def stirred(policy, part="", size=0.02, seed=3):
    "A copy with noise on the parameters whose names hold `part`."
    branch, source = policy.clone(f"stirred {part}"), torch.Generator().manual_seed(seed)
    chosen = [p for n, p in branch.named_parameters() if part in n]
    assert chosen
    with torch.no_grad():
        for p in chosen: p.add_(torch.randn(p.shape, generator=source) * size)
    return branch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_policy(kind, temperature, sampler, base, suite):
    out = ask(sampler, base, suite[kind].test[:6], kind, group=8, temperature=temperature)
    assert apart(base, out, temperature) < CLOSE and (out.logp <= 0).all()
    mask, finished = completion_mask(out.ids, base.eos)
    assert torch.equal(out.mask, mask) and torch.equal(out.finished, finished) and finished.any()
    assert not torch.isin(out.ids[mask.bool()], base.banned).any()


@pytest.mark.parametrize("part", ["", "visual", "embed_tokens", "layers.1."])
def test_weights_that_have_changed_arrive(part, sampler, base, examples):
    "Everything, the vision tower (whose features of known pictures are stale), the tied head, one layer; and back."
    before = ask(sampler, base, examples, "same")
    changed = stirred(base, part)
    out, sent = ask(sampler, changed, examples, "same"), sampler.syncs
    assert apart(changed, out) < CLOSE and apart(base, out) > 0.05
    after = ask(sampler, base, examples, "same")
    assert sampler.syncs == sent + 1 and torch.equal(before.ids, after.ids) and torch.equal(before.logp, after.logp)


def test_a_lora_branch_arrives_multiplied_out(sampler, base, examples):
    branch = stirred(lora(base, rank=4, vision=True), size=0.1)
    out = ask(sampler, branch, examples, "lora")
    assert apart(branch, out) < CLOSE and apart(base, out) > 0.05


def test_seeds_decide_the_rows(sampler, base, examples):
    first, other = (ask(sampler, base, examples, key) for key in "ab")
    again = ask(sampler, base, examples, "a")
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logp, again.logp) and first.texts != other.texts
    half = ask(sampler, base, examples[:3], "a")
    assert half.texts == first.texts[:12]  # other rows beside them change nothing


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_greedy_rows_are_those_of_the_built_in_sampler(temperature, sampler, base, examples):
    "Tokens, and log-probabilities at the temperature that was asked for."
    out = ask(sampler, base, examples, "greedy", greedy=1, temperature=temperature)
    own = sample(base, out.prompts, 1, 16, temperature, greedy=True)
    assert out.texts[::4] == own.texts and apart(base, out, temperature) < CLOSE
    width = own.ids.shape[1]
    assert float(((own.logp - out.logp[::4, :width]) * own.mask).abs().max()) < CLOSE


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_most_likely_ids(k, sampler, base, examples):
    "More than the 20 that vLLM allows unless it is told otherwise."
    out = ask(sampler, base, examples, "top", top_k=k, temperature=0.8)
    own, rows = base.completion_logits(out.prompts, out.ids, 0.8).topk(k), out.mask.bool()
    differ = own.indices[rows] != out.top_ids[rows]
    assert out.top_ids.shape == (*out.ids.shape, k) and differ.float().mean() < 0.01  # equals may change places


def test_a_text_model_with_a_head_of_its_own(examples):
    "Llama, untied, from no folder: config and tokenizer are the policy's."
    from transformers import LlamaConfig, LlamaForCausalLM

    from copd_nb.policy.core import Policy
    tokenizer = minis_base().tokenizer
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=32, max_position_embeddings=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes,
                                             eos_token_id=tokenizer.eos_token_id, initializer_range=0.2))
    policy, sampler = Policy(model, tokenizer, "llama"), VllmSampler(**OPTIONS)
    for one in (policy, stirred(policy, "lm_head", 0.2), policy):
        assert apart(one, ask(sampler, one, examples[:3], "llama")) < CLOSE
    assert sampler.syncs == 3


def test_a_processor_has_no_sleep_mode():
    with pytest.raises(ValueError, match="sleep=True gives memory of a graphics card back"): VllmSampler(sleep=True)


def test_a_run_is_trained_and_resumed(sampler, base, suite, tmp_path, dies_after):
    "Each call is on the weights of its step, and a killed run that goes on, in another engine, is the unbroken one."
    worst, judged = [], []

    class Watched:
        "The sampler, with the largest difference of each call, and of those of evaluations apart."
        evaluates = True

        def __init__(self, own): self.own = own
        def __call__(self, policy, requests, length, temperature, *rest):
            found = self.own(policy, requests, length, temperature, *rest)
            (judged if requests[0].greedy else worst).extend(apart(policy, out, temperature) for out in found)
            return found

    config = replace(TINY, probe_every=2, eval_every=3, checkpoint_every=1, temperature=0.9)
    schedule, pair = copd(PAIR, cycles=2, s_rl=2, s_opd=1, beta=0.5), {name: suite[name] for name in PAIR}
    options, before = dict(progress=False, sampler=Watched(sampler)), sampler.syncs
    whole = train(schedule, pair, base, config, tmp_path / "whole", **options)
    print(f"{len(worst)} requests, weights sent {sampler.syncs - before} times")
    assert max(worst + judged) < CLOSE and len(worst) == 16 and judged and sampler.syncs - before >= 8
    assert whole.finished and whole.events.reward.notna().any()
    options = dict(progress=False, sampler=VllmSampler(**OPTIONS))
    with dies_after(5): train(schedule, pair, base, config, tmp_path / "broken", **options)
    same(whole, train(schedule, pair, base, config, tmp_path / "broken", **options))


def test_an_experiment_names_it(base, tmp_path):
    "It samples in training and in evaluations, and one engine serves two runs."
    asked = Experiment(suite="minis", together=dict(two=PAIR), paradigms=("mixed",), steps=2, seeds=(0, 1),
                       config=replace(TINY, eval_every=2), evaluation=dict(prompts=6, samples=2),
                       run=dict(store=str(tmp_path / "store"), sampler=dict(vllm=OPTIONS)))
    (study, arms), = asked.studies().values()
    outcome = study.run(arms)
    (_, sampler), = request._REUSED.items()
    assert sampler.syncs >= 7  # two runs of two steps and a result, and the base
    for run in outcome.runs.values(): assert run.manifest["sampler"] == "VllmSampler" and "eval" in set(run.events.kind)
    run, scores = outcome.runs["mixed RLVR", 1], outcome.scores["mixed RLVR", 1]
    own = evaluate(run.result, minis(KINDS), 6, 2, TINY.max_new_tokens)
    found = scores[scores.model == "result"].merge(own, on=["capability", "example"], suffixes=("", "_own"))
    print(f"greedy scores that differ: {(found.greedy != found.greedy_own).sum()} of {len(found)}")
    assert len(found) == 18 and (found.greedy == found.greedy_own).mean() > 0.9


def test_lora_branches_are_trained(sampler, base, suite, tmp_path):
    pair, options = {name: suite[name] for name in PAIR}, dict(progress=False, sampler=sampler)
    run = train(copd(PAIR, cycles=1, s_rl=2, s_opd=1), pair, lora(base, rank=4), TINY, tmp_path / "lora", **options)
    assert run.finished and apart(run.result, ask(sampler, run.result, suite["image"].test[:4], "end")) < CLOSE

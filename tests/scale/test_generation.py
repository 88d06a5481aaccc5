"""Sampling with vLLM: the policy's distribution, rows that end as ours do, weights sent once per change.

A fake of a library is not the library. It stays because vLLM wants versions of its own and starts in half a minute.
`make test-vllm` (test_vllm_real.py) has the real one, built for processors; what surprised us there the fake does, too.
Cards, and with them the way of weights as handles and sleep, are only here."""
import sys
from dataclasses import replace

import fake_vllm
import pandas as pd
import pytest
import torch

from copd_nb.engine.accelerator import accelerator_for
from copd_nb.schedule.paradigms import expert
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.batches import Batch
from copd_nb.engine.state import Training
from copd_nb.engine.training import train
from copd_nb.engine.update import gradients_of
from copd_nb.scale.vllm import VllmSampler, row_seeds
from copd_nb.scale import vllm_weights
from copd_nb.scale.vllm_weights import (
    named_weights, save_for_vllm, unknown_processors, way_for, weights_file, weights_fingerprint)
from copd_nb.policy.toys import minis_base, image, minis, text, tiny_policy, video
from copd_nb.signals.objectives import grpo_advantages
from copd_nb.policy.lora_branches import lora
from copd_nb.signals.rollouts import Request, completion_mask, generator
from copd_nb.signals.sampling import sample, sample_many
from copd_nb.engine.runs import Run
from copd_nb.schedule.parts import RL

SMALL = dict(hidden=24, layers=1, vision_hidden=16, vision_depth=1)
EXAMPLES = [text(8).test[0], image(8, 8).test[0], video(8, 8).test[0], text(8).test[1]]


@pytest.fixture(scope="module")
def tiny(): return tiny_policy(**SMALL)


@pytest.fixture(params=[False, True], ids=["processor", "card"])
def sampler(request, monkeypatch):
    fake_vllm.install(monkeypatch, lambda: tiny_policy(seed=7, **SMALL), card=request.param)
    return VllmSampler("models/tiny", gpu_memory_utilization=0.5)


def request(policy, examples=EXAMPLES, group=2, *key, **more):
    return Request(policy.encode(examples), group, generator("cpu", 0, *key), **more)


def own_logp(policy, out, temperature=1.0):
    logits = policy.completion_logits(out.prompts, out.ids, temperature)
    return logits.log_softmax(-1).gather(-1, out.ids[..., None])[..., 0] * out.mask


def stirred(policy, seed=3, size=0.02):
    branch, source = policy.clone("stirred"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in branch.parameters(): p.add_(torch.randn(p.shape, generator=source) * size)
    return branch


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_are_of_the_policy_and_log_probs_its_own(temperature, sampler, tiny):
    "Text, image, video and text again, with weights that the engine did not start with."
    out, = sampler(tiny, [request(tiny)], 5, temperature)
    assert out.ids.shape == out.mask.shape == out.logp.shape and len(out.ids) == len(out.texts) == 8
    assert out.start is None and out.entropy is None
    assert torch.allclose(out.logp, own_logp(tiny, out, temperature), atol=1e-4)
    assert not torch.isin(out.ids * out.mask.long() + tiny.eos[0] * (1 - out.mask.long()), tiny.banned).any()
    assert out.decoded == int((out.lengths - 1).sum())
    assert [e.capability for e in out.examples[::2]] == ["text", "image", "video", "text"]


def test_rows_end_like_those_of_the_built_in_sampler(sampler, tiny):
    "With the end token made likely: some rows end, some do not."
    likely = stirred(tiny, size=0)
    with torch.no_grad(): likely.model.get_output_embeddings().weight[likely.eos[0]] *= 3
    out, = sampler(likely, [request(likely, EXAMPLES[:1] * 4, 6, "ends")], 8, 1.0)
    mask, finished = completion_mask(out.ids, likely.eos)
    assert torch.equal(out.mask, mask) and torch.equal(out.finished, finished) and 0 < finished.sum() < len(finished)
    for ids, length, done, words in zip(out.ids.tolist(), out.lengths.long().tolist(), finished.tolist(), out.texts):
        assert (ids[length - 1] in likely.eos) == done and (done or length == 8)
        assert words == likely.tokenizer.decode(ids[:length - done], skip_special_tokens=False)
        assert set(ids[length:]) <= {likely.eos[0]}


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_greedy_rows_are_those_of_the_built_in_sampler(rows, sampler, tiny):
    asked = request(tiny, EXAMPLES, 2, "greedy", greedy=1)
    theirs, ours = sampler(tiny, [asked], 6, 0.7, True, rows)[0], sample(tiny, asked.prompts, 1, 6, 0.7, greedy=True)
    assert torch.allclose(theirs.logp, own_logp(tiny, theirs, 0.7), atol=1e-4)  # vLLM's are at temperature 1
    width = min(theirs.ids.shape[1], ours.ids.shape[1])
    assert torch.equal(theirs.mask[::2, :width], ours.mask[:, :width])
    assert torch.equal(theirs.ids[::2, :width], ours.ids[:, :width])
    assert sampler.llm.params[0].temperature == 0 and sampler.llm.params[0].seed is None
    assert sampler.llm.params[1].temperature == 0.7


def test_seeds_have_the_address_of_the_request(sampler, tiny):
    a, again, other = (sampler(tiny, [request(tiny, EXAMPLES[:1], 4, key)], 6, 1.0)[0] for key in ("a", "a", "b"))
    assert torch.equal(a.ids, again.ids) and not torch.equal(a.ids, other.ids)
    both = sampler(tiny, [request(tiny, EXAMPLES[1:2], 2, "c"), request(tiny, EXAMPLES[:1], 4, "a")], 6, 1.0)
    assert torch.equal(both[1].ids, a.ids) and len(both[0].ids) == 2  # company changes nothing
    assert row_seeds(request(tiny, EXAMPLES[:2], 3, "a", greedy=3)) == [None] * 6
    before = torch.random.get_rng_state()
    sampler(tiny, [request(tiny, EXAMPLES[:1], 2, "a")], 3, 1.0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_each_row_asks_of_vllm(sampler, tiny):
    sampler(tiny, [request(tiny)], 3, 0.9)
    assert sampler.llm.model == "models/tiny" and sampler.llm.options == dict(gpu_memory_utilization=0.5)
    for p in sampler.llm.params:
        assert (p.max_tokens, p.stop_token_ids, p.ignore_eos, p.temperature) == (3, tiny.eos, True, 0.9)
        assert (p.logprobs, p.detokenize) == (0, False)
        assert set(p.logit_bias) == set(tiny.banned.tolist()) and set(p.logit_bias.values()) == {-1e9}
    assert len({p.seed for p in sampler.llm.params}) == 8
    pictures = [sorted(p.get("multi_modal_data", ())) for p in sampler.llm.asked[::2]]
    assert pictures == [[], ["image"], ["video"], []] and "prompt_token_ids" not in sampler.llm.asked[2]


@pytest.mark.parametrize("k", [3, 25])
def test_the_most_likely_ids_where_a_teacher_needs_them(k, sampler, tiny):
    "More than the 20 that vLLM allows unless it is told otherwise."
    out, plain = sampler(tiny, [request(tiny, EXAMPLES[:2], 2, "k", top_k=k), request(tiny, EXAMPLES[:2], 2, "k")], 4,
                         0.8)
    own = tiny.completion_logits(out.prompts, out.ids, 0.8).topk(k).indices
    assert torch.equal(out.top_ids[out.mask.bool()], own[out.mask.bool()]) and out.top_ids.shape == (*out.ids.shape, k)
    assert plain.top_ids is None and torch.equal(plain.ids, out.ids)


def test_weights_are_sent_once_a_change(sampler, tiny):
    branch, asked = tiny.clone("branch"), request(tiny, EXAMPLES[:1], 2, "x")
    def syncs(policy):
        sampler(policy, [asked], 3, 1.0)
        return sampler.syncs
    assert [syncs(branch) for _ in range(2)] == [1, 1] and syncs(branch.clone("equal")) == 1
    optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-5, fused=True)
    for p in branch.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()  # which `_version` doesn't count
    assert [syncs(branch) for _ in range(2)] == [2, 2] and syncs(tiny) == 3 and syncs(branch) == 4
    branch.load_state(tiny.state_dict())
    assert syncs(branch) == 5 and syncs(tiny) == 5
    begun = [("init", dict(packed=True))] if fake_vllm.Platform.card else []
    assert [c for c in sampler.llm.calls if c not in ("reset", "generate")] == begun + ["update"] * 5
    assert sampler.llm.calls.count("reset") == sampler.llm.calls.count("generate") == 9
    assert all(torch.equal(a, b) for a, b in zip(sampler.llm.policy.parameters(), tiny.parameters()))


@pytest.mark.parametrize("place", [0, 5, -1])
def test_the_fingerprint_sees_a_single_number_change(place, tiny):
    other = tiny.clone()
    with torch.no_grad(): other.parameters()[place].flatten()[0].nextafter_(torch.tensor(9.0))
    assert weights_fingerprint(tiny.clone()) == weights_fingerprint(tiny) != weights_fingerprint(other)


def test_adapters_are_multiplied_out(sampler, tiny):
    branch = stirred(lora(tiny, rank=2), size=0.1)
    out, = sampler(branch, [request(branch, EXAMPLES[:2], 2, "lora")], 5, 1.0)
    assert torch.allclose(out.logp, own_logp(branch, out), atol=1e-4)
    assert not torch.allclose(out.logp, own_logp(tiny, out), atol=1e-3)
    names = [n for n, _ in named_weights(branch)]
    assert names == [n for n, _ in named_weights(tiny)] and not any("lora" in n for n in names)
    sampler(branch, [request(branch, EXAMPLES[:1], 1, "lora")], 2, 1.0)
    assert sampler.syncs == 1


@pytest.mark.parametrize("part", ["visual", "embed_tokens", "layers.0."])
def test_whatever_weight_has_changed_the_engine_computes_with_it(part, sampler, tiny):
    "Features of pictures that it has seen, and the packed copy of the tied head, are those of the new weights."
    branch = tiny.clone("branch")
    chosen = [p for n, p in branch.named_parameters() if part in n]
    with torch.no_grad():
        for p in chosen: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    for policy, other in ((tiny, branch), (branch, tiny), (tiny, branch)):
        out, = sampler(policy, [request(policy, EXAMPLES, 1, "changed")], 3, 1.0)
        assert torch.allclose(out.logp, own_logp(policy, out), atol=1e-4)
        assert not torch.allclose(out.logp, own_logp(other, out), atol=1e-3)


def test_a_folder_that_vllm_can_not_read_is_saved_anew(monkeypatch, tiny, tmp_path):
    "The shipped base names a processor of ours; a policy from nowhere has no folder."
    fake_vllm.install(monkeypatch, lambda: tiny_policy(seed=7, **SMALL))
    shipped, good = minis_base().origin, save_for_vllm(tiny, tmp_path / "good")
    assert unknown_processors(shipped) == ["OfflineQwen3VLProcessor", "PatchVideoProcessor"]
    assert unknown_processors(good) == [] == unknown_processors("nobody/nothing")
    for given, taken in ((shipped, False), (None, False), (good, True), ("nobody/nothing", True)):
        sampler = VllmSampler(given)
        assert sampler(tiny, [request(tiny, EXAMPLES[:2], 1, "x")], 2, 1.0)[0].logp.isfinite().all()
        assert (sampler.llm.model == str(given)) == taken
    with pytest.raises(ValueError, match="unrecognised processor"): fake_vllm.check_folder(shipped)


@pytest.mark.parametrize("room", [True, False])
def test_the_file_of_weights_is_in_memory_where_there_is_room(room, tiny, tmp_path, monkeypatch):
    memory = tmp_path / "memory"
    if room: memory.mkdir()
    monkeypatch.setattr(vllm_weights, "_SHARED", memory)
    with weights_file(tiny) as file: assert (memory in file.parents) == room and file.stat().st_size > 1000
    assert not file.parent.exists()


def test_weights_are_handles_only_where_both_sides_are_on_a_card(tiny):
    assert [way_for(tiny, on_card).__name__ for on_card in (False, True)] == ["_File", "_File"]
    class OnCard: device = torch.device("cuda", 0)
    assert [way_for(OnCard(), on_card).__name__ for on_card in (False, True)] == ["_File", "_Handles"]


def test_a_sleeping_engine_gets_its_weights_each_time(monkeypatch, tiny):
    fake_vllm.install(monkeypatch, lambda: tiny_policy(seed=7, **SMALL), card=True)
    sampler = VllmSampler("models/tiny", sleep=True)
    first, again = (sampler(tiny, [request(tiny, EXAMPLES[:2], 2, "s")], 4, 1.0)[0] for _ in range(2))
    assert torch.equal(first.ids, again.ids) and sampler.syncs == 2
    begun = ["update", "reset", "generate", "sleep"]
    assert sampler.llm.calls[1:] == begun + [("wake", "weights"), "update", ("wake", "kv_cache"), "reset", "generate",
                                             "sleep"]
    fake_vllm.install(monkeypatch, lambda: tiny_policy(seed=7, **SMALL))
    with pytest.raises(ValueError, match="sleep=True gives memory of a graphics card back"): VllmSampler(sleep=True)


@pytest.mark.parametrize("skip", [True, False])
def test_the_update_takes_the_learners_own_log_probs(skip, sampler, tiny, tmp_path):
    "What vLLM says about its samples changes nothing in loss and gradient."
    config = Config(group_size=3, max_new_tokens=5, skip_flat=skip, device="cpu")
    run = Run.__new__(Run)
    run.path = tmp_path
    training = Training(expert("text", 1), {"text": text(8)}, tiny.clone("base"), config, accelerator_for(config), run)
    out, = sampler(training.branch("text").policy, [request(tiny, [EXAMPLES[0], EXAMPLES[3]], 3, "rl")], 5, 1.0)
    advantages = grpo_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1]), 3)  # the second group is flat
    def weighed(**said):
        batch = Batch((RL("text"),), replace(out, **said), advantages=advantages)
        gradients, losses = gradients_of(training, "text", [batch])
        return batch, losses["rl"], torch.cat([g.flatten() for g in gradients["rl"] if g is not None])
    batch, loss, gradient = weighed()
    for said in (dict(logp=None), dict(logp=out.logp - 0.3)):
        other, *numbers = weighed(**said)
        assert numbers[0] == loss and torch.equal(numbers[1], gradient)
        assert torch.equal(other.old_logp[:3], batch.old_logp[:3])
    # rows that are left out keep what the sampler said
    assert torch.allclose(other.old_logp[3:], out.logp[3:] - 0.3 * skip, atol=1e-4)
    assert torch.allclose(batch.old_logp, own_logp(tiny, out), atol=1e-4) and torch.equal(batch.old_logp, batch.logp)


def test_all_streams_go_to_the_engine_at_once(sampler, tiny):
    asked = [request(tiny, EXAMPLES[:1], 2, "one"), request(tiny, EXAMPLES[1:3], 3, "two")]
    ours, theirs = (s(tiny, asked, 4, 1.0, True, None) for s in (sample_many, sampler))
    mine, other = ([(len(o.ids), o.group_size, o.prompts) for o in outs] for outs in (ours, theirs))
    assert mine == other
    assert sampler.llm.calls.count("generate") == 1


def test_a_row_that_was_cut_is_refused(sampler, tiny, monkeypatch):
    real = fake_vllm.LLM.row
    monkeypatch.setattr(fake_vllm.LLM, "row",
                        lambda self, prompt, params: real(self, prompt, replace(params, max_tokens=2)))
    with pytest.raises(RuntimeError, match=r"after 2 of 30 tokens without an end token \(length\)"):
        sampler(tiny, [request(tiny, EXAMPLES[:1], 6, "cut")], 30, 1.0)


def test_another_prompt_is_refused(sampler, tiny, monkeypatch):
    "As if vLLM's processor had expanded a picture to one mark more."
    real = fake_vllm.LLM.processed
    twice = ("input_ids", "mm_token_type_ids")
    def longer(self, prompt):
        return {k: torch.cat([v[:, :1], v], 1) if k in twice else v for k, v in real(self, prompt).items()}
    monkeypatch.setattr(fake_vllm.LLM, "processed", longer)
    with pytest.raises(RuntimeError, match="both must use one checkpoint's processor"):
        sampler(tiny, [request(tiny, EXAMPLES[1:2], 1, "other")], 2, 1.0)


def test_what_can_not_work_is_refused(sampler, tiny, monkeypatch):
    with pytest.raises(ValueError, match="only the built-in sampler"):
        sampler(tiny, [request(tiny, EXAMPLES[:1], 2, "x", lengths=torch.tensor([2, 3]))], 4, 1.0)
    with pytest.raises(ValueError, match=r"options \['load_format'\]"): VllmSampler("models/tiny", load_format="auto")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install copd_nb\[vllm\]"): VllmSampler("models/tiny")


def test_a_run_with_a_sampler_of_ones_own(tmp_path):
    "It makes every rollout of the training; without its log-probs and entropies the log has the learner's."
    asked = []

    def silent(policy, requests, *options):
        asked.append(torch.is_grad_enabled())
        return [replace(out, logp=None, entropy=None, start=None) for out in sample_many(policy, requests, *options)]
    suite, start = minis(("text", "image")), minis_base()
    config = Config(prompts=4, opd_prompts=4, group_size=4, probe_every=0, eval_every=0, device="cpu",
                    sampler_correction="none")  # which needs the sampler's log-probs
    schedule = copd(["text", "image"], cycles=1, s_rl=1, s_opd=1, beta=0.5)
    own, other = (train(schedule, suite, start, config, tmp_path / name, progress=False, sampler=sampler)
                  for name, sampler in (("own", None), ("silent", silent)))
    a, b = (run.events.select_dtypes("number").drop(columns="seconds") for run in (own, other))
    assert len(asked) == 4 and not any(asked) and other.manifest["sampler"] == "function"
    pd.testing.assert_frame_equal(a.drop(columns=["entropy", "padding", "clip_share"]),
                                  b.drop(columns=["entropy", "padding", "clip_share"]), rtol=1e-3, atol=1e-5)
    assert b.entropy.notna().all() and (b.entropy > 0).all()

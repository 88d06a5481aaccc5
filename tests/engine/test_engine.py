"The engine: what a step means, what a resume gives, what is refused."
import json
import math
from dataclasses import fields, replace
from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_runs import PAIR, small_base, small_suite

from copd_nb.engine import config as config_module
from copd_nb.engine import phase as phase_module
from copd_nb.engine import step as step_module
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.engine.manifest import manifest_of
from copd_nb.schedule.paradigms import expert, merged_experts, mixed_rlvr, mopd, static_opd
from copd_nb.data.capability import Capability
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import CORRECTION, Config, config_from
from copd_nb.engine.measure import probe_list
from copd_nb.engine.passes import by_length, collect
from copd_nb.engine.state import Training
from copd_nb.engine.step import learn, train_step
from copd_nb.engine.training import train
from copd_nb.engine.update import gradients_of, stream_gradient
from copd_nb.study.jobs import Job
from copd_nb.policy.toys import minis, minis_base, video
from copd_nb.signals.objectives import grpo_advantages
from copd_nb.policy.core import Policy
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run, latest_checkpoint, request_stop, stop_requested
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, RL, SFT, Phase, Update

TINY = Config(prompts=4, opd_prompts=2, group_size=4, max_new_tokens=10, probe_every=0, eval_every=0, probe_prompts=4,
              eval_prompts=8,
              learning_rate=1e-4, warmup=2, checkpoint_every=20, device="cpu")
COPD = copd(PAIR, cycles=2, s_rl=2, s_opd=2, beta=0.5)


@pytest.fixture(scope="module")
def start(): return small_base()


@pytest.fixture(scope="module")
def suite(): return small_suite()


@pytest.fixture(scope="module")
def shipped(): return minis(tuple(PAIR)) | {"video": video(32, 16)}, minis_base()


def begin(schedule, suite, start, config, tmp_path) -> Training:
    "A training that stands before its first step."
    (tmp_path / "events.jsonl").touch()
    run = Run.__new__(Run)
    run.path = tmp_path
    return Training(schedule, suite, start.clone("base"), config, accelerator_for(config), run)


def weights(policy) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def events(run) -> pd.DataFrame: return run.events.drop(columns=["seconds"])


def same(a: pd.DataFrame, b: pd.DataFrame): pd.testing.assert_frame_equal(a, b, check_exact=True)


CUT = [(4, COPD, "keep"), (4, COPD, "reset"), (4, COPD, "separate"), (4, mopd(PAIR, 3, 3), "keep"),
       (4, merged_experts(PAIR, 3), "keep"), (1, COPD, "keep"), (5, COPD, "keep")]
CUT = [pytest.param(*cut, id=f"{cut[0]}-{cut[1].name}-{cut[2]}", marks=[pytest.mark.slow] * (i in (1, 3, 6)))
       for i, cut in enumerate(CUT)]


@pytest.fixture(scope="module")
def uninterrupted(suite, start, tmp_path_factory):
    "Runs that nothing interrupts, each made once."
    @cache
    def whole(schedule, config): return train(schedule, suite, start, config, tmp_path_factory.mktemp("whole") / "run",
                                              progress=False)
    return whole


@pytest.mark.parametrize("steps, schedule, state", CUT)
def test_interrupted_and_resumed_equals_uninterrupted(steps, schedule, state, suite, start, uninterrupted, tmp_path,
                                                      dies_after):
    config = replace(TINY, checkpoint_every=1 if steps == 4 else 2, optimizer_state=state, probe_every=2,
                     probe_prompts=2)
    whole = uninterrupted(schedule, replace(config, checkpoint_every=20))
    with dies_after(steps): train(schedule, suite, start, config, tmp_path / "cut", progress=False)
    assert not Run(tmp_path / "cut").finished
    resumed = train(schedule, suite, start, config, tmp_path / "cut", progress=False)
    same(events(whole), events(resumed))
    assert torch.equal(weights(whole.result), weights(resumed.result))


def test_same_seed_same_run_other_seed_other_run(suite, start, tmp_path):
    a, b, c = (train(expert("text", 2), suite, start, replace(TINY, seed=s), tmp_path / n, progress=False) for n,
               s in (("a", 0), ("b", 0), ("c", 1)))
    same(events(a), events(b))
    assert torch.equal(weights(a.result), weights(b.result)) and not torch.equal(weights(a.result), weights(c.result))


def test_base_is_left_unchanged(suite, start, tmp_path):
    before = weights(start)
    train(COPD, suite, start, TINY, tmp_path / "run", progress=False)
    assert torch.equal(before, weights(start)) and all(p.grad is None for p in start.model.parameters())


def test_measuring_does_not_change_training(suite, start, uninterrupted, tmp_path):
    quiet = uninterrupted(COPD, TINY)
    watched = train(COPD, suite, start, replace(TINY, probe_every=1, eval_every=1), tmp_path / "watched",
                    progress=False)
    assert torch.equal(weights(quiet.result), weights(watched.result))


@pytest.mark.parametrize("schedule", [mopd(PAIR, 3, 2), merged_experts(PAIR, 3), static_opd("text", "image", 3, 2)],
                         ids=lambda s: s.name)
def test_shared_experts_are_exact(schedule, suite, start, tmp_path):
    "A run that takes its experts from other runs, shorter ones among them, is the run that trains them itself."
    config = replace(TINY, probe_every=2, probe_prompts=2, eval_every=2)
    alone = train(schedule, suite, start, config, tmp_path / "alone", progress=False)
    train(expert("text", 3), suite, start, config, tmp_path / "text", experts=tmp_path / "experts", progress=False)
    train(expert("image", 2), suite, start, config, tmp_path / "image", experts=tmp_path / "experts", progress=False)
    shared = train(schedule, suite, start, config, tmp_path / "shared", experts=tmp_path / "experts", progress=False)
    assert torch.equal(weights(alone.result), weights(shared.result))
    keys = ["kind", "phase_index", "step", "branch", "capability", "owner", "model"]
    order = [k for k in keys if k in events(alone)]

    def at_end(e):
        "Rows in one order, without those at the end of the 2-step image expert."
        kept = e[~((e.kind != "train") & (e.step == 1) & (e.phase_index == 1))]
        return kept.sort_values(order).reset_index(drop=True)
    a, b = at_end(events(alone)), at_end(events(shared))
    same(a, b[a.columns])


def test_experts_in_the_store_are_not_trained_again(suite, start, tmp_path, monkeypatch):
    train(expert("text", 3), suite, start, TINY, tmp_path / "text", experts=tmp_path / "experts", progress=False)
    monkeypatch.setattr(phase_module, "train_step", lambda *a: pytest.fail("trained again"))
    again = train(Schedule("renamed", ["text"], expert("text", 3).phases, "text"), suite, start, TINY,
                  tmp_path / "again",
                  experts=tmp_path / "experts", progress=False)
    assert (again.events.kind == "train").sum() == 3


def step_once(order, updates, suite, start, tmp_path):
    schedule = Schedule("s", PAIR, [Phase("p", 1, [Update(a, [RL(a), OPD(b, b, 1.0)]) for a, b in order])], "text")
    training = begin(schedule, suite, start, replace(TINY, updates=updates, learning_rate=1e-2, warmup=1), tmp_path)
    for name in PAIR:  # two branches that differ, as after Phase I
        with torch.no_grad(): next(training.branch(name).policy.model.parameters()).mul_(1.5 if name == "text" else 0.8)
    train_step(training, schedule.phases[0], 0)
    return torch.cat([weights(training.policy(n)) for n in PAIR])


def test_updates_of_a_step_are_simultaneous(suite, start, tmp_path):
    orders = [("text", "image"), ("image", "text")], [("image", "text"), ("text", "image")]
    a, b = (step_once(o, "simultaneous", suite, start, tmp_path) for o in orders)
    assert torch.equal(a, b)
    c, d = (step_once(o, "sequential", suite, start, tmp_path) for o in orders)
    assert not torch.equal(c, d) and not torch.equal(a, c)


def test_teacher_equal_to_student_gives_no_gradient(suite, start, tmp_path):
    for estimator in ("sampled", "reverse", "forward", "jsd", "topk"):
        schedule = Schedule("s", ["text"], [Phase("p", 1, [Update("text", [OPD("text", "base", 1.0, estimator)])])],
                            "text")
        training = begin(schedule, suite, start, TINY, tmp_path)
        row = train_step(training, schedule.phases[0], 0)[0]
        assert abs(row["loss"]) < 1e-6 and row["gradient_norm"] < 2e-5, estimator


@pytest.mark.parametrize("signals", [[RL("text"), RL("image")], [OPD("image", "base", 1.0)],
                                     [OPD("image", "base", 1.0, "reverse")], [SFT("text")]])
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(signals, reduction, suite, start, tmp_path):
    schedule = Schedule("s", ["a"], [Phase("p", 1, [Update("a", signals)])], "a")
    gradients, losses = [], []
    for size in (None, 1, 3):
        training = begin(schedule, suite, start, replace(TINY, micro_prompts=size, reduction=reduction), tmp_path)
        with torch.no_grad():  # so that the base is another policy
            next(training.branch("a").policy.model.parameters()).mul_(1.3)
        batch, = collect(training, schedule.phases[0].updates[0], 0)
        gradient, loss = stream_gradient(training, training.policy("a"), batch)
        gradients.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p,
                                    g in zip(training.policy("a").model.parameters(), gradient)]))
        losses.append(loss)
    assert gradients[0].norm() > 1e-3
    for g, l in zip(gradients[1:], losses[1:]):
        assert (g - gradients[0]).norm() / gradients[0].norm() < 1e-3 and abs(l - losses[0]) < 1e-5


SWITCHES = dict(plain=dict(shared_prompt=False), fresh_prefill=dict(keep_prefill=False),
                dead_rows=dict(drop_finished=False), flat_groups=dict(skip_flat=False), padded=dict(pack=False),
                tokens=dict(micro_tokens=12), prompts_and_tokens=dict(micro_prompts=2, micro_tokens=7),
                graphs=dict(graphs=True), in_turns=dict(rollout_rows=9), recomputed=dict(recompute=True),
                all_for_memory=dict(recompute=True, rollout_rows=4, micro_prompts=3, micro_tokens=16),
                everything_off=dict(shared_prompt=False, keep_prefill=False, drop_finished=False, skip_flat=False,
                                    pack=False))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("signals", [[RL("text"), RL("image"), RL("video")],
                                     [RL("video"), OPD("text", "base", .5), OPD("image", "base", .5, "jsd")]])
def test_every_switch_changes_the_work_and_not_the_result(switch, signals, shipped, tmp_path):
    suite, start = shipped  # with its own rewards: groups without an advantage, and completions that end
    schedule = Schedule("s", ["a"], [Phase("p", 1, [Update("a", signals)])], "a")
    found = []
    for options in ({}, SWITCHES[switch]):
        training = begin(schedule, suite, start, replace(TINY, prompts=6, group_size=4, max_new_tokens=8, **options),
                         tmp_path)
        training.base.packs, training.base.graphs = training.config.pack, training.config.graphs
        if training.config.recompute: training.base.recompute()
        with torch.no_grad(): training.branch("a").policy.model.lm_head.weight.mul_(1.2)
        batches = collect(training, schedule.phases[0].updates[0], 0)
        gradients, losses = gradients_of(training, "a", batches)
        flat = {s: torch.cat([torch.zeros_like(p).flatten() if x is None else x.flatten() for p,
                              x in zip(training.policy("a").model.parameters(), g)])
                for s, g in gradients.items()}
        found.append((flat, losses, [b.rollouts.texts for b in batches], [b.logp for b in batches], [b.padded
                                                                                                     for b in batches]))
    (g, loss, texts, logp, padded), (other_g, other_loss, other_texts, other_logp, other_padded) = found
    assert texts == other_texts
    for a, b in zip(logp, other_logp): assert torch.allclose(a, b, atol=2e-5)
    for s in g:
        assert g[s].norm() > 1e-4 and (g[s] - other_g[s]).norm() < 1e-4 * g[s].norm()
        assert abs(loss[s] - other_loss[s]) < 1e-5
    assert not any(padded)
    assert any(other_padded) == (switch in ("dead_rows", "padded", "graphs", "everything_off"))


def test_flat_groups_are_not_run(suite, start, tmp_path, monkeypatch):
    schedule = Schedule("s", ["a"], [Phase("p", 1, [Update("a", [RL("text")])])], "a")
    training = begin(schedule, suite, start, replace(TINY, prompts=6, group_size=4), tmp_path)
    batch, = collect(training, schedule.phases[0].updates[0], 0)
    batch.rewards = torch.tensor([1., 0, 0, 1] + [1.] * 12 + [0., 1, 0, 0] + [0.] * 4)
    batch.advantages = grpo_advantages(batch.rewards, 4)
    run, real = [], Policy.completion_hidden
    monkeypatch.setattr(Policy, "completion_hidden", lambda self, prompts, ids, *a: (run.append(len(ids)),
                                                                                     real(self, prompts, ids, *a))[1])
    stream_gradient(training, training.policy("a"), batch)
    assert run == [8] and (batch.logp[4:16] == batch.rollouts.logp[4:16]).all()
    batch.old_logp, batch.advantages, run[:] = None, torch.zeros(24), []
    gradient, loss = stream_gradient(training, training.policy("a"), batch)
    assert run == [24] and loss == 0 and any(g is not None for g in gradient) and not any(g.any() for g in gradient
                                                                                          if g is not None)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_micro_batches_by_length(lengths, budget):
    lengths = torch.tensor(lengths)
    parts = by_length(lengths, budget)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts: assert len(part) == 1 or len(part) * int(lengths[part].max()) <= budget
    ordered = lengths[torch.cat(parts)].tolist()
    assert ordered == sorted(ordered, reverse=True)  # neighbours are about equally long


def test_kept_prefill_gives_the_same_gradient(suite, start, tmp_path):
    schedule = expert("image", 1)
    a, b = (weights(train(schedule, suite, start, replace(TINY, keep_prefill=k), tmp_path / str(k),
                          progress=False).result) for k in (True, False))
    assert (a - b).abs().max() < 1e-5


def test_streams_have_their_own_denominators(suite, start, tmp_path):
    "The gradient of an update is the sum of what each stream gives alone."
    update = Update("text", [RL("text"), OPD("image", "base", 1.0)])
    norms = []
    for signals in (update.signals, update.signals[:1], update.signals[1:]):
        training = begin(Schedule("s", ["text"], [Phase("p", 1, [Update("text", signals)])], "text"), suite, start,
                         TINY, tmp_path)
        with torch.no_grad(): next(training.branch("text").policy.model.parameters()).mul_(1.3)
        batches = collect(training, Update("text", signals), 0)
        norms.append({b.stream: stream_gradient(training, training.policy("text"), b)[0] for b in batches})
    for stream, gradient in norms[0].items():
        alone = norms[1 if stream == "rl" else 2][stream]
        assert all((g is None) == (h is None) and (g is None or torch.equal(g, h)) for g, h in zip(gradient, alone))


def test_hub_routing(start, tmp_path):
    suite = minis()
    run = train(copd(list(suite), 1, 1, 1, topology="hub"), suite, start, TINY, tmp_path / "run", progress=False)
    rows = run.events.query("kind == 'train' and stream != 'rl'")
    assert set(zip(rows.branch, rows.capability, rows.teacher)) == {
        ("text", "image", "image"), ("text", "video", "video"), ("image", "text", "text"), ("video", "text", "text")}


def test_routing_goes_by_name(suite, start, tmp_path, monkeypatch):
    "The teacher of the signal scores the prompts of the signal's capability."
    seen, real = [], step_module.teacher_scores

    def teacher_scores(training, signal, out):
        seen.append((signal, {e.capability for e in out.examples}))
        return real(training, signal, out)
    monkeypatch.setattr(step_module, "teacher_scores", teacher_scores)
    train(copd(PAIR, 1, 1, 1), suite, start, TINY, tmp_path / "run", progress=False)
    assert len(seen) == 2 and all(capabilities == {s.capability} for s, capabilities in seen)


def test_linked_branches_see_the_same_prompts(suite, start, tmp_path):
    "Branch k's OPD on capability j and branch j's RL run through the same stream of prompts."
    schedule = copd(PAIR, 1, 1, 2)
    training = begin(schedule, suite, start, replace(TINY, opd_prompts=4), tmp_path)
    batches = {u.branch: collect(training, u, 0) for u in schedule.phases[1].updates}
    ids = {(n, b.signals[0].capability, b.stream == "rl"): [e.id for e in b.rollouts.prompts.examples] for n,
           bs in batches.items() for b in bs}
    assert ids["text", "text", True] == ids["image", "text", False]
    assert ids["image", "image", True] == ids["text", "image", False]


def test_a_mixture_has_the_prompts_that_its_shares_say(suite, start, tmp_path):
    uneven = mixed_rlvr(PAIR, 2, shares=dict(zip(PAIR, (3, 1))))
    run = train(uneven, suite, start, replace(TINY, prompts=6), tmp_path / "run", progress=False)
    rows = run.events.query("kind == 'train'").pivot_table(index="global_step", columns="capability", values="prompts")
    assert rows[list(PAIR)].to_numpy().tolist() == [[5, 1], [4, 2]]


def test_mixed_prompts_are_dealt_in_turn(suite, start, tmp_path):
    run = train(mixed_rlvr(PAIR, 2), suite, start, replace(TINY, prompts=5), tmp_path / "run", progress=False)
    assert run.events.pivot(index="step", columns="capability", values="prompts").sum().tolist() == [5, 5]
    assert (run.events.groupby("step").updates.max() == 1).all()


def test_student_starts_as_a_copy_of_the_expert(suite, start, tmp_path):
    run = train(static_opd("text", "image", 2, 1, lr=1e-9), suite, start, TINY, tmp_path / "run", progress=False)
    assert (weights(run.result) - weights(run.branch("image"))).abs().max() < 1e-6
    assert not torch.equal(weights(run.branch("image")), weights(start))


def test_supervised_loss_falls(suite, start, tmp_path):
    schedule = Schedule("sft", ["warm"], [Phase("p", 8, [Update("warm", [SFT("text")])])], "warm")
    losses = train(schedule, suite, start, replace(TINY, prompts=8, learning_rate=1e-3), tmp_path / "run",
                   progress=False).events.loss
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()


def test_optimizer_state_modes(suite, start, tmp_path):
    results = {}
    for mode in ("keep", "reset", "separate"):
        results[mode] = weights(train(COPD, suite, start, replace(TINY, optimizer_state=mode), tmp_path / mode,
                                      progress=False).result)
    assert not torch.equal(results["keep"], results["reset"]) and not torch.equal(results["keep"], results["separate"])


def test_costs_are_the_measured_tokens(uninterrupted):
    rows = uninterrupted(COPD, TINY).events
    opd = rows.stream != "rl"
    assert (rows.generated == rows.trained).all() and (rows.scored[opd] == rows.generated[opd]).all()
    assert (rows.scored[~opd] == 0).all()
    assert (rows.generated == (rows.length * rows.prompts * TINY.group_size).round()).all()
    assert (rows.flops > 0).all() and (rows.updates == 1).all()


def test_several_epochs_clip(suite, start, tmp_path):
    one = train(expert("text", 3), suite, start, replace(TINY, learning_rate=1e-3), tmp_path / "one",
                progress=False).events
    many = train(expert("text", 3), suite, start, replace(TINY, learning_rate=1e-3, epochs=4), tmp_path / "many",
                 progress=False).events
    assert (one.clip_share == 0).all() and many.clip_share.max() > 0 and (many.updates == 4).all()


def test_bf16_trains(suite, start, tmp_path):
    run = train(copd(PAIR, 1, 1, 1), suite, start, replace(TINY, precision="bf16"), tmp_path / "run", progress=False)
    assert run.events.loss.notna().all() and all(p.dtype == torch.float32 for p in run.result.model.parameters())


def test_probes_and_evaluations_are_logged(suite, start, tmp_path):
    run = train(COPD, suite, start, replace(TINY, probe_every=2, eval_every=2), tmp_path / "run", progress=False)
    probes, evals = run.events.query("kind == 'probe'"), run.events.query("kind == 'eval'")
    pairs = {("text", "base", "text"), ("image", "base", "image"), ("text", "image", "image"), ("image", "text",
                                                                                                "text")}
    assert set(zip(probes.a, probes.b, probes.capability)) == pairs
    assert all({a, b} == set(g.owner) for (a, b), g in probes.groupby(["a", "b"]))
    assert set(evals.model) == {"result"} and set(evals.capability) == {"text", "image", "mean"}
    assert sorted(evals.global_step.unique()) == [2, 4, 6, 8]


def test_static_opd_is_probed_before_it_begins(suite, start, tmp_path):
    run = train(static_opd("text", "image", 2, 2), suite, start, replace(TINY, probe_every=2), tmp_path / "run",
                progress=False)
    first = run.events.query("kind == 'probe' and phase == 'OPD' and step == -1")
    assert ("student", "text", "text") in set(zip(first.a, first.b, first.capability)) and set(first.global_step) == {4}


def test_probe_list_of_co_training_has_links_in_both_phases():
    for phase in COPD.phases: assert ("text", "image", "image") in probe_list(COPD, phase)
    assert probe_list(expert("text", 1), expert("text", 1).phases[0]) == [("text", "base", "text")]


def test_parameters_without_gradient_stay(suite, start, tmp_path):
    "Text alone leaves the vision tower where it was."
    run = train(expert("text", 2), suite, start, TINY, tmp_path / "run", progress=False)
    for (name, p), q in zip(run.result.model.named_parameters(), start.model.parameters()):
        if "visual" in name: assert torch.equal(p, q)


# What bad input gets. Nothing may be written before it is refused.

@pytest.mark.parametrize("change, words", [
    (dict(group_size=1), ["group_size=1", "at least 2"]), (dict(max_new_tokens=600), ["context", "512"]),
    (dict(probe_k=1000, probe_every=1), ["probe_k", "vocabulary"])])
def test_config_that_cannot_work(change, words, suite, start, tmp_path):
    with pytest.raises(ValueError) as error: train(COPD, suite, start, replace(TINY, **change), tmp_path / "run",
                                                   progress=False)
    assert all(w in str(error.value) for w in words) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [dict(prompts=0), dict(learning_rate=-1), dict(precision="fp8"),
                                    dict(updates="now"), dict(unknown=1)])
def test_config_values_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values))): config_from(values)


def test_unknown_capability_is_named(suite, start, tmp_path):
    with pytest.raises(ValueError, match="'video'.*'text', 'image'"): train(expert("video", 1), suite, start, TINY,
                                                                            tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reward, words", [
    (lambda c, e: 1 / 0, "ZeroDivisionError"), (lambda c, e: [math.nan] * len(c), "nan"), (lambda c, e: [1.0],
                                                                                           "1 scores for 16")])
def test_reward_that_misbehaves_stops_before_the_update(reward, words, suite, start, tmp_path):
    bad = dict(suite, text=Capability("text", suite["text"].train, suite["text"].test, reward))
    with pytest.raises(ValueError, match=f"'text'.*{words}"): train(expert("text", 2), bad, start, TINY,
                                                                    tmp_path / "run", progress=False)
    assert EventLog(tmp_path / "run" / "events.jsonl").rows() == []


def test_other_config_in_the_same_folder_is_refused(suite, start, tmp_path):
    first = train(expert("text", 1), suite, start, TINY, tmp_path / "run", progress=False)
    before = (first.path / "events.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        train(expert("text", 1), suite, start, replace(TINY, seed=1), tmp_path / "run", progress=False)
    assert (first.path / "events.jsonl").read_bytes() == before and Run(first.path).finished


def test_finished_run_is_loaded(suite, start, tmp_path, monkeypatch):
    train(expert("text", 1), suite, start, TINY, tmp_path / "run", progress=False)
    monkeypatch.setattr(phase_module, "train_step", lambda *a: pytest.fail("trained again"))
    assert train(expert("text", 1), suite, start, TINY, tmp_path / "run", progress=False).finished


def test_corrupt_checkpoint_is_named_and_kept(suite, start, tmp_path, dies_after):
    with dies_after(3): train(expert("text", 4), suite, start, replace(TINY, checkpoint_every=2), tmp_path / "run",
                              progress=False)
    path = latest_checkpoint(Run(tmp_path / "run"))
    file = path / "text~weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="text~weights.safetensors is missing or damaged"):
        train(expert("text", 4), suite, start, replace(TINY, checkpoint_every=2), tmp_path / "run", progress=False)
    assert file.exists() and (tmp_path / "run" / "events.jsonl").stat().st_size > 0


def test_gradient_that_is_not_finite_is_named(suite, start, tmp_path):
    training = begin(expert("text", 1), suite, start, replace(TINY, skip_limit=0), tmp_path)
    batches = collect(training, expert("text", 1).phases[0].updates[0], 0)
    batches[0].advantages = torch.full_like(batches[0].advantages, math.inf)
    with pytest.raises(FloatingPointError, match="'text'"): learn(training, "text", batches, 1.0)


def test_manifest_says_what_was_run(suite, start, tmp_path):
    run = train(expert("text", 1), suite, start, TINY, tmp_path / "run", progress=False)
    m = json.loads((run.path / "manifest.json").read_text())
    assert m["status"] == "finished" and m["config"]["seed"] == 0
    assert m["versions"]["torch"] == torch.__version__ and m["threads"] == torch.get_num_threads()
    assert run.schedule == expert("text", 1)


def asked_to_stop(monkeypatch, path, steps: int):
    "Ask a run to stop while its n-th step is computed."
    real, count = phase_module.train_step, iter(range(steps - 1))

    def asking(*args):
        if next(count, None) is None: request_stop(path)
        return real(*args)
    monkeypatch.setattr(phase_module, "train_step", asking)


@pytest.mark.parametrize("steps", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8))],
                         ids=["first step", "end of a phase", "next phase", "last step"])
def test_a_stopped_run_goes_on_to_the_same_numbers(steps, suite, start, uninterrupted, tmp_path, monkeypatch):
    config = replace(TINY, probe_every=2, eval_every=4)
    straight = uninterrupted(COPD, config)
    with monkeypatch.context() as m:
        asked_to_stop(m, tmp_path / "run", steps)
        run = train(COPD, suite, start, config, tmp_path / "run", progress=False)
    assert run.manifest["status"] == "stopped" and not run.finished and stop_requested(run.path)
    assert run.events.query("kind == 'train'").global_step.max() == steps
    with pytest.raises(KeyError, match="not finished"): run.result
    again = train(COPD, suite, start, config, tmp_path / "run", progress=False)
    assert again.finished and not stop_requested(run.path)
    same(events(again), events(straight))
    assert torch.equal(weights(again.result), weights(straight.result))


def test_a_stop_that_was_asked_for_earlier_is_forgotten(suite, start, tmp_path):
    config = replace(TINY, checkpoint_every=1)
    schedule = expert("text", 2)
    run = train(schedule, suite, start, config, tmp_path / "run", progress=False)
    request_stop(run.path)
    assert train(schedule, suite, start, config, tmp_path / "run", progress=False).finished


def test_several_probe_sizes_are_logged_and_survive_the_manifest(suite, start, tmp_path):
    config = replace(TINY, probe_every=1, probe_k=[10, 1])
    assert config.probe_k == (10, 1)
    run = train(expert("text", 1), suite, start, config, tmp_path / "run", progress=False)
    probes = run.events.query("kind == 'probe'")
    assert probes[["overlap", "overlap@1"]].notna().all().all()
    assert config_from(run.manifest["config"]) == config
    assert train(expert("text", 1), suite, start, config, tmp_path / "run", progress=False).finished
    with pytest.raises(ValueError, match="probe_k"):
        train(expert("text", 1), suite, start, replace(config, probe_k=(1, 10_000)), tmp_path / "x", progress=False)


def altered(name, value):
    "Another allowed value of a config field."
    if name in config_module._CHOICES: return next(c for c in config_module._CHOICES[name] if c != value)
    if isinstance(value, bool): return not value
    if name == "warn": return None
    if isinstance(value, tuple): return (0.8, 0.95)
    if value is None: return "cpu" if name == "device" else 1
    return 0.5 if name in config_module._SHARES else value * 2 + 1


def test_every_field_of_a_config_but_those_on_checkpoints_and_monitors_makes_another_run(suite, start):
    config = Config()
    def identity(config, **parts): return manifest_of(COPD, suite, start, config, {}, **parts)["content_hash"]
    def name(config): return Job(COPD, config).name
    more = dict(rate_floor=dict(rate="cosine"))  # a floor needs a rate that falls
    changed = {f.name: replace(config, **{f.name: altered(f.name, getattr(config, f.name))}, **more.get(f.name, {}))
               for f in fields(config)}
    hashes, names = {f: identity(c) for f, c in changed.items()}, {f: name(c) for f, c in changed.items()}
    assert hashes.pop("checkpoint_every") == hashes.pop("warn") == identity(config) == identity(replace(config))
    assert names.pop("checkpoint_every") == names.pop("warn") == name(config)
    for field in CORRECTION:  # another sampler's, and nothing to the engine's own
        assert (hashes.pop(field), names.pop(field)) == (identity(config), name(config))
    other = [identity(c, sampler=print) for c in (config, *map(changed.get, CORRECTION))]
    assert len({*other, identity(config)}) == len(CORRECTION) + 2
    assert len({*hashes.values(), identity(config)}) == len(hashes) + 1
    assert len({*names.values(), name(config)}) == len(names) + 1 and name(config) == name(replace(config))
    assert identity(replace(config, probe_k=10)) != identity(replace(config, probe_k=(10, 5)))
    others = [replace(COPD, phases=COPD.phases[:2]), replace(COPD, result="text"), copd(PAIR, cycles=2, s_rl=2,
                                                                                        s_opd=2, beta=0.25)]
    manifests = {manifest_of(s, suite, start, config, {})["content_hash"] for s in (COPD, *others)}
    assert len(manifests) == len({Job(s, config).name for s in (COPD, *others)}) == 4
    renamed = manifest_of(replace(COPD, name="other"), suite, start, config, {})
    assert identity(config) == renamed["content_hash"]  # the display name is no content

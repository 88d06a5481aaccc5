"Monitors: what they measure, when they warn and when not, and that a resumed run warns as an uninterrupted one."
import json
import math
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.view import plots
from copd_nb.schedule.paradigms import expert, merged_experts
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config, config_from
from copd_nb.engine.step import reward_row
from copd_nb.engine.training import train
from copd_nb.view.monitor import MonitorState
from copd_nb.policy.toys import image, text, tiny_policy
from copd_nb.engine.monitors import MONITORS, Thresholds, Watch, thresholds_from
from copd_nb.engine.symptoms import repetition, said, sameness
from copd_nb.analysis.results import incidents, monitor_sentences, never_rewarded, warned
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import Run
from copd_nb.scale.trackers import scalars

W = Thresholds().window


# What is measured.

def slow_repetition(row, n):
    "By the definition, n-gram by n-gram."
    grams = [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]
    return sum(g in grams[:i] for i, g in enumerate(grams)) / len(grams) if grams else 0.0


rows_of_ids = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=5)

def padded(rows, more=0, fill=0):
    "Ids and mask of rows of unequal length, with further columns of padding."
    width = max(map(len, rows)) + more
    return (torch.tensor([r + [fill] * (width - len(r)) for r in rows]),
            torch.tensor([[1.0] * len(r) + [0.0] * (width - len(r)) for r in rows]))


@settings(deadline=None, max_examples=60)
@given(rows_of_ids, st.integers(1, 5))
def test_repetition_is_what_its_definition_says(rows, n):
    found = repetition(*padded(rows), n)
    assert 0 <= found <= 1 and found == pytest.approx(sum(slow_repetition(r, n) for r in rows) / len(rows), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(rows_of_ids, st.integers(1, 5), st.integers(0, 6), st.integers(0, 100_000), st.randoms())
def test_repetition_knows_neither_padding_nor_order_nor_names_of_tokens(rows, n, more, fill, rng):
    found, names = repetition(*padded(rows), n), rng.sample(range(200_000), 4)
    other = [[names[i] for i in r] for r in rng.sample(rows, len(rows))]
    assert repetition(*padded(other, more, fill), n) == pytest.approx(found, abs=1e-6)


def test_repetition_of_long_completions_and_of_none():
    same, new = torch.full((2, 3000), 7), torch.arange(6000).view(2, 3000) * 25
    assert repetition(same, torch.ones(2, 3000)) == pytest.approx(1 - 1 / 2997)
    assert repetition(new, torch.ones(2, 3000)) == 0
    assert repetition(torch.zeros(0, 5).long(), torch.zeros(0, 5)) == 0 == repetition(torch.zeros(2, 3).long(),
                                                                                      torch.ones(2, 3))
    with pytest.raises(ValueError, match="n=0"): repetition(same, torch.ones(2, 3000), 0)


@given(st.lists(st.sampled_from(["1", "It is 1.", "2", "none", " none ", "a b", ""]), min_size=1, max_size=12),
       st.randoms())
def test_sameness_is_the_largest_share_in_any_order(texts, rng):
    found = sameness(texts)
    assert 1 / len(texts) <= found <= 1 and found == sameness(rng.sample(texts, len(texts)))
    assert found * len(texts) == pytest.approx(max(sum(said(a) == said(b) for b in texts) for a in texts))


def test_an_answer_is_the_last_number_or_else_the_text():
    assert said("3 + 4 = 7.") == "7" and said(" yes\n") == "yes" and said("x1 is none") == "x1 is none"
    assert sameness([]) == 0 and sameness(f"{w} has 1" for w in "abc") == 1


def test_the_spread_of_rewards_is_exactly_zero_where_all_are_equal():
    "A mean of equal numbers in fp32 is not always that number."
    assert reward_row(torch.full((24,), 0.1), 8) == dict(reward=pytest.approx(0.1), reward_std=0.0, flat_groups=1.0)
    assert reward_row(torch.tensor([0.3]), 1)["reward_std"] == 0
    mixed = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert reward_row(mixed, 2) == dict(reward=0.5, reward_std=pytest.approx(mixed.std().item()),
                                        flat_groups=pytest.approx(2 / 3))


# When a monitor warns.

def rows(n=10, branch="a", stream="rl", capability="c", **values):
    "n equal train rows."
    return [dict(kind="train", branch=branch, stream=stream, capability=capability, prompts=8, **values)
            for _ in range(n)]


def evaluation(accuracy, model="a", capability="c"): return [dict(kind="eval", model=model, capability=capability,
                                                                  greedy=0.0, sampled=accuracy)]


FIRES = dict(
    nothing_right=("reward", rows(reward=0.0, reward_std=0.0), "constant"),
    everything_right=("reward", rows(reward=0.4, reward_std=0.3) + rows(5, reward=1.0, reward_std=0.0), "constant"),
    longer=("length", rows(length=10.0) + rows(length=21.0), "length_factor"),
    shorter=("length", rows(length=10.0) + rows(length=4.9), "length_factor"),
    cut_off=("length", rows(finished=0.4), "unfinished"),
    collapsed=("entropy", rows(entropy=0.6, reward=0.1) + rows(entropy=0.05, reward=0.8), "entropy_share"),
    repeating=("repetition", rows(repetition=0.05) + rows(repetition=0.4), "repetition"),
    one_answer=("hacking", rows(sameness=0.2, reward=0.1) + rows(sameness=0.97, reward=0.89), "sameness"),
    not_followed=("hacking", rows(reward=0.2) + evaluation(0.2) + rows(reward=0.7) + evaluation(0.21), "gain"),
    result_not_followed=("hacking", rows(reward=0.2) + evaluation(0.2, "result") + rows(reward=0.7) + evaluation(
        0.1, "result"), "gain"),
    another_temperature=("sampler", rows(sampler_kl=0.0137, weight_clipped=0.01), "sampler_kl"),
    weights_cut=("sampler", rows(sampler_kl=0.009, weight_clipped=0.11), "sampler_cut"))

@pytest.mark.parametrize("name", FIRES)
def test_a_monitor_warns_once_and_says_what_and_where(name):
    monitor, events, bound = FIRES[name]
    found = Watch().see(events)
    assert [(w["kind"], w["monitor"], w["branch"], w["stream"], w["capability"]) for w in found] == [("warning",
                                                                                                      monitor, "a",
                                                                                                      "rl", "c")]
    assert math.isfinite(found[0]["value"]) and math.isfinite(found[0]["bound"]) and found[0]["message"].endswith(".")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", FIRES)
def test_a_bound_of_none_switches_its_rule_off(name):
    _, events, bound = FIRES[name]
    assert Watch(Thresholds(**{bound: None})).see(events) == []


def test_only_another_sampler_is_warned_of():
    "bf16 weights stay silent, and so do others' completions, whose weights may be cut as often as they like."
    assert Watch().see(rows(sampler_kl=9e-4, weight_clipped=0.0) + rows(stream="rl:b", weight_clipped=0.9)) == []
    spike = rows(7, sampler_kl=1e-4, weight_clipped=0.0) + rows(3, sampler_kl=5.0, weight_clipped=1.0)
    assert Watch().see(spike + rows(5, sampler_kl=1e-4, weight_clipped=0.0)) == []


def test_updates_without_any_reward_are_warned_of_after_fifteen_and_a_bound_of_ones_own():
    dead, solved = rows(20, reward=0.0, reward_std=0.0), rows(20, reward=1.0, reward_std=0.0)
    found = [(w["monitor"], w["value"]) for w in Watch().see(dead)]
    assert found == [("reward", 5), ("no_reward", 15)]
    assert [w["monitor"] for w in Watch().see(solved)] == ["reward"] == [w["monitor"] for w in Watch().see(dead[:14])]
    assert [w["value"] for w in Watch(Thresholds(no_reward=2, constant=None)).see(dead)] == [2]
    assert Watch(Thresholds(no_reward=None, constant=None)).see(dead) == []
    almost = (rows(14, reward=0.0, reward_std=0.0) + rows(1, reward=0.01, reward_std=0.1)) * 3
    assert "no_reward" not in {w["monitor"] for w in Watch().see(almost)}


def test_a_stream_that_never_earned_is_named_with_its_number_of_updates():
    dead, paid = rows(3, reward=0.0, reward_std=0.0), rows(3, branch="b", reward=0.1, reward_std=0.2)
    found, = never_rewarded(dead + paid + rows(5, branch="d", stream="opd:c:b", length=3.0))
    assert found.startswith("No completion of branch a has earned a reward of c in 3 updates: read some completions")
    assert not never_rewarded(dead + rows(1, reward=1.0, reward_std=0.0)) and not never_rewarded(rows(9, reward=0.0))


def test_no_reward_is_printed_while_a_run_trains(start, tmp_path, capsys):
    nothing = replace(text(8), reward=lambda completions, examples: [0.0] * len(completions))
    config = replace(TINY, eval_every=0, warn=dict(no_reward=2))
    run = train(expert("text", 3), [nothing], start, config, tmp_path / "run", progress=False)
    printed = capsys.readouterr().err
    assert printed.count("warning: branch text, text: No completion of the last 2 updates earned a reward: ") == 1
    assert [r["step"] for r in EventLog(run.path / "events.jsonl").rows() if r.get("monitor") == "no_reward"] == [1]
    assert any("branch text has earned" in line for line in warned([run]))


SILENT = dict(
    too_few_alike=rows(4, reward=0.0, reward_std=0.0),
    alike_within_but_not_between=[r for i in range(12) for r in rows(1, reward=float(i % 3), reward_std=0.0)],
    alike_on_average_only=rows(reward=0.5, reward_std=0.5),
    a_signal_in_between=(rows(4, reward=0.0, reward_std=0.0) + rows(1, reward=0.1, reward_std=0.2)) * 4,
    log_of_before=rows(20, reward=0.0),
    a_little_longer=rows(length=10.0) + rows(length=19.0),
    mostly_finished=rows(finished=0.6),
    still_exploring=rows(entropy=0.6, reward=0.1) + rows(entropy=0.2, reward=0.8),
    low_from_the_start=rows(entropy=0.05, reward=0.5) + rows(entropy=0.04, reward=0.6),
    solved=rows(entropy=0.6, reward=0.1) + rows(entropy=0.01, reward=0.99),
    entropy_without_reward=rows(entropy=0.6, stream="opd:c:b") + rows(entropy=0.01, stream="opd:c:b"),
    repeats_as_ever=rows(repetition=0.5) + rows(repetition=0.55),
    same_but_unrewarded=rows(sameness=1.0, reward=0.1),
    one_prompt=[r | dict(prompts=1) for r in rows(20, sameness=1.0, reward=0.9)],
    followed=rows(reward=0.2) + evaluation(0.2) + rows(reward=0.7) + evaluation(0.6),
    other_capability=rows(reward=0.2) + evaluation(0.2) + rows(reward=0.7) + evaluation(0.2, capability="d"),
    other_branch=rows(reward=0.2) + evaluation(0.2, "b") + rows(reward=0.7) + evaluation(0.2, "b"),
    an_evaluation_after_others_have_learned=(
        rows(reward=0.2) + evaluation(0.2, "result") + rows(reward=0.7) + evaluation(0.7, "result")
        + rows(stream="opd:c:b", length=3.0) + evaluation(0.1, "result")),
    references=rows(stream="sft", length=10.0) + rows(stream="sft", length=90.0),
    too_few=rows(W - 1, finished=0.0),
    one_wild_value=rows(length=10.0) + rows(1, length=900.0) + rows(length=10.0))

@pytest.mark.parametrize("name", SILENT)
def test_a_healthy_curve_is_left_alone(name): assert Watch().see(SILENT[name]) == []


def test_branches_streams_and_capabilities_are_kept_apart():
    "Each alternates between two values that would be drift in one stream."
    for key, (one, other) in dict(branch=("a", "b"), stream=("rl", "opd:c:b"), capability=("c", "d")).items():
        mixed = [r for pair in zip(rows(30, length=10.0, **{key: one}), rows(30, length=90.0, **{key: other}))
                 for r in pair]
        assert Watch().see(mixed) == []


@pytest.mark.parametrize("back, warnings", [(3, 1), (6, 1), (7, 2), (40, 2)])
def test_a_second_warning_needs_a_window_inside(back, warnings):
    "The median of eight is inside from the fourth value inside to the fourth outside again: for back + 1 rows."
    out = rows(24, length=30.0)
    assert W == 8 and len(Watch().see(rows(W, length=10.0) + out + rows(back, length=10.0) + out)) == warnings


JUNK = [None, math.nan, math.inf, -math.inf, "?", [], {}]
number = st.one_of(st.floats(0, 1), st.sampled_from(JUNK))
train_row = st.fixed_dictionaries(dict(kind=st.just("train"), branch=st.sampled_from("ab"),
                                       stream=st.sampled_from(["rl", "opd:c:b", "sft"]),
                                       capability=st.sampled_from("cd")),
                                  optional=dict(reward=number, reward_std=number, length=number, finished=number,
                                                entropy=number, repetition=number, sameness=number,
                                                sampler_kl=number, weight_clipped=number,
                                                prompts=st.sampled_from([1, 2, None])))
eval_row = st.fixed_dictionaries(dict(kind=st.just("eval"), model=st.sampled_from(["a", "b", "result"]),
                                      capability=st.sampled_from(["c", "d", "mean"])), optional=dict(sampled=number,
                                                                                                     greedy=number))
other_row = st.sampled_from([dict(kind="probe", a="a", b="b"), dict(kind="failure", branch="a", stream="rl",
                                                                    capability="c"), dict(kind="control", branch="a"),
                                                                    dict(kind="warning", monitor="length")])
events_of_any_kind = st.lists(st.one_of(train_row, train_row, train_row, eval_row, other_row), max_size=60)
EAGER = Thresholds(window=2, length_factor=1.2, unfinished=0.3, entropy_share=0.9, entropy_nats=0.9, repetition=0.2,
                   sameness=0.4, same_reward=0.2, gain=0.05)


@settings(deadline=None, max_examples=80)
@given(events_of_any_kind, st.integers(0, 60))
def test_one_go_row_by_row_and_rebuilt_in_the_middle_are_the_same(events, cut):
    whole, single, before, after = Watch(EAGER).see(events), Watch(EAGER), Watch(EAGER), Watch(EAGER)
    assert [w for row in events for w in single.see([row])] == whole
    said_before = before.see(events[:cut])
    after.see(events[:cut] + said_before)  # a log holds the warnings, too
    assert said_before + after.see(events[cut:]) == whole and all(w["monitor"] in MONITORS for w in whole)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(train_row, eval_row), max_size=40))
def test_a_log_and_its_table_give_the_warnings_of_the_rows(events):
    "JSON turns what is not finite into null, pandas makes NaN of what is missing."
    events = [{k: v for k, v in row.items() if not isinstance(v, (str, list, dict)) or k in (
        "kind", "branch", "stream", "capability", "model")} for row in events]
    whole = Watch(EAGER).see(events)
    assert Watch(EAGER).see([{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                             for row in events]) == whole
    assert Watch(EAGER).see(pd.DataFrame(events).to_dict("records")) == whole


# Thresholds.

def test_thresholds_survive_a_manifest():
    config = Config(warn=dict(window=4, sameness=None))
    assert config.warn == (("window", 4), ("sameness", None)) and hash(config)
    kept = json.loads(json.dumps({f.name: getattr(config, f.name) for f in fields(Config)}))
    assert config_from(kept) == config and thresholds_from(config.warn) == Thresholds(window=4, sameness=None)
    assert Config(warn=dict(window=W)) == Config() and Config(warn=None).warn is None


@pytest.mark.parametrize("warn, words", [(dict(windows=3), "unknown threshold .*windows.*window"),
                                         (dict(window=0), "window=0"), (dict(length_factor=1.0), "length_factor=1.0"),
                                         (False, "a list or an object"), ("window", "a list or an object"),
                                         ([3], "name → bound"),
                                         (dict(constant="5"), "constant=.5.: must be a whole number")])
def test_thresholds_that_make_no_sense_are_refused(warn, words):
    with pytest.raises(ValueError, match=words): Config(warn=warn)


# In the engine.

TINY = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, probe_every=0, eval_every=2, eval_prompts=2,
              eval_samples=1, checkpoint_every=1, device="cpu",
              warn=dict(window=1, unfinished=0.0,
                        length_factor=1.01))  # of a random model: there is always something to say
SCHEDULE = copd(["text", "image"], cycles=1, s_rl=3, s_opd=1)


@pytest.fixture(scope="module")
def start(): return tiny_policy()


@pytest.fixture(scope="module")
def suite(): return [text(8), image(8, 8)]


@pytest.fixture(scope="module")
def whole(suite, start, tmp_path_factory): return train(SCHEDULE, suite, start, TINY,
                                                        tmp_path_factory.mktemp("monitors") / "whole", progress=False)


def logged(run, *without):
    "All rows of a log but for what the clock says, and for some kinds."
    return [{k: v for k, v in row.items() if k != "seconds"} for row in EventLog(run.path / "events.jsonl").rows()
            if row["kind"] not in without]


def test_a_run_logs_its_warnings_after_the_rows_they_follow_from(whole):
    warnings, train_rows = whole.events.query("kind == 'warning'"), whole.events.query("kind == 'train'")
    assert len(warnings) and set(warnings.global_step) <= set(train_rows.global_step)
    assert train_rows[["repetition", "sameness"]].stack().between(0, 1).all()
    place = ("phase", "phase_index", "cycle", "step", "global_step")
    assert Watch(thresholds_from(TINY.warn)).see(logged(whole)) == [{k: v for k, v in r.items() if k not in place}
                                                                    for r in logged(whole) if r["kind"] == "warning"]


def test_an_interrupted_run_warns_at_the_same_steps(whole, suite, start, tmp_path, dies_after):
    with dies_after(2): train(SCHEDULE, suite, start, TINY, tmp_path / "cut", progress=False)
    resumed = train(SCHEDULE, suite, start, TINY, tmp_path / "cut", progress=False)
    assert logged(resumed) == logged(whole)


def test_experts_from_a_store_bring_their_warnings(suite, start, tmp_path):
    schedule = merged_experts(["text", "image"], 2)
    alone = train(schedule, suite, start, TINY, tmp_path / "alone", progress=False)
    for name in ("first", "second"): shared = train(schedule, suite, start, TINY, tmp_path / name,
                                                    experts=tmp_path / "experts", progress=False)
    assert logged(shared) == logged(alone) != logged(alone, "warning")


def test_monitors_change_nothing_about_a_training(whole, suite, start, tmp_path):
    quiet = train(SCHEDULE, suite, start, replace(TINY, warn=None), tmp_path / "quiet", progress=False)
    assert quiet.manifest["content_hash"] == whole.manifest["content_hash"]
    assert all(torch.equal(p, q) for p, q in zip(quiet.result.model.parameters(), whole.result.model.parameters()))
    assert logged(quiet) == logged(whole, "warning") != logged(whole)
    again = train(SCHEDULE, suite, start, replace(TINY, warn=()), whole.path, progress=False)
    assert logged(again) == logged(whole)  # loaded, not refused


# Where warnings are shown.

def run_with(tmp_path, *warnings, warn=()):
    "A run folder whose log holds these warnings."
    (tmp_path / "manifest.json").write_text(json.dumps(dict(config=dict(warn=warn, seed=0), status="stopped",
                                                            content_hash="none", schedule=SCHEDULE.to_dict())))
    log = EventLog(tmp_path / "events.jsonl")
    log.append([r | dict(global_step=1, phase="p", seconds=1.0) for r in rows(1, reward=0.1, length=3.0)])
    log.append([dict(kind="warning", global_step=9 + i, branch="a", stream="rl", capability="c", value=1.0, bound=0.5,
                     **w) for i, w in enumerate(warnings)])
    return Run(tmp_path)


def test_reports_tell_how_often_which_monitor_warned(tmp_path):
    for name in "abc": (tmp_path / name).mkdir()
    silent, loud = run_with(tmp_path / "a"), run_with(tmp_path / "b", dict(monitor="length", message="Long."),
                                                      dict(monitor="length", message="Longer."),
                                                      dict(monitor="hacking", message="One answer."))
    assert warned([silent]) == [] and warned([]) == []
    assert warned([silent, loud,
                   loud]) == ["Monitors warned in 1 of 2 runs (warnings: length 2, hacking 1); the logs say where."]
    EventLog(loud.path / "events.jsonl").append([dict(kind="skipped", reason="NaN"), dict(kind="memory",
                                                                                          part="update"),
                                                                                          dict(kind="memory",
                                                                                               part="update")])
    assert incidents([silent]) == [] and incidents([silent, loud, loud]) == [
        "In 2 runs, updates left out because loss or gradient was not finite: 1; "
        "times that memory ran out and less was computed at once: 2."]
    assert warned([loud])[1:] == incidents([loud])
    told = monitor_sentences(loud)
    assert len(told) == len(MONITORS) and told[3] == "Monitor entropy: no warning."
    assert told[2] == "Monitor length, branch a, c, step 9: Long. 2 warnings in all."
    assert monitor_sentences(run_with(tmp_path / "c", warn=None)) == ["No monitor watched this run."]


def test_a_table_and_marks_on_the_curves(tmp_path):
    events = run_with(tmp_path, dict(monitor="length", message="Long."), dict(monitor="hacking",
                                                                              message="One answer.")).events
    assert plots.warnings_table(events).to_dict("records") == [
        dict(step=9, monitor="length", branch="a", capability="c", message="Long."),
        dict(step=10, monitor="hacking", branch="a", capability="c", message="One answer.")]
    assert plots.warnings_table(events[events.kind == "train"]).empty
    for metric, step in (("reward", 10), ("length", 9)): assert [x.get_xdata()[0]
                                                                 for x in plots.training_curves(events, metric).lines
                                                                 if x.get_linestyle() == ":"] == [step]


def test_the_run_monitor_shows_the_latest_warnings_escaped(tmp_path):
    run_with(tmp_path, *(dict(monitor="length", message=f"<b>no. {i}</b> " + "x" * 200 + "!") for i in range(7)))
    state = MonitorState(tmp_path)
    state.tail.read()
    shown = state.html()
    assert "<b>no." not in shown and "no. 1&" not in shown
    assert all(part in shown for part in ("&lt;b&gt;no. 6", "no. 2&", "x!", "7 warnings"))


def test_trackers_get_value_and_bound():
    row = dict(kind="warning", global_step=3, monitor="length", branch="a", stream="rl", capability="c", value=9.0,
               bound=4.0, message="Long.")
    assert scalars(row) == {"warning/length/a/rl/c/value": 9.0, "warning/length/a/rl/c/bound": 4.0}

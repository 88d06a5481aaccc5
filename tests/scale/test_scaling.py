"The simulator of many devices: small cases worked out by hand, and what must hold for every schedule."
import itertools
import math
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.schedule.paradigms import expert, mixed_rlvr, mopd
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.costs import ModelShape, Workload
from copd_nb.engine.config import Config
from copd_nb.engine.executors import stopwatch, timed
from copd_nb.policy.toys import minis, tiny_policy
from copd_nb.signals.estimators import Estimator
from copd_nb.scale.calls import DRIVER, Call, Costs, calls_of, costs_from, spread, step_calls
from copd_nb.scale.forecast import ENOUGH, forecast, sweep
from copd_nb.scale.measuring import assumed, fitted, measure
from copd_nb.scale.places import Link, Network, Place, alone, load_of, placed
from copd_nb.scale.simulate import critical_calls, critical_stages, gantt, simulate

CONFIG = Config(prompts=10, opd_prompts=10, group_size=8)
KINDS = {"rollouts": ("rl", "opd"), "teacher scores": ("sampled", "topk", "reverse"),
         "gradients": ("rl", "sampled", "topk", "reverse")}
ZERO = {"update/stream": 0.0, "record": 0.0, "record/signal": 0.0}


def costs(names, rollouts=0.1, scores=0.05, gradients=0.1, update=0.2, **of):
    "Seconds a prompt; `of` has factors of single capabilities."
    stages = {"rollouts": rollouts, "teacher scores": scores, "gradients": gradients}
    seconds = {f"{s}/{k}/{c}": v * of.get(c, 1) for s, v in stages.items() for k in KINDS[s] for c in names}
    return Costs(seconds | ZERO | {"rollouts": 0.0, "update": update}, dict.fromkeys(names, 5.0), weights=1e6,
                 hidden=16, vocabulary=100)


def names(k): return [f"c{i}" for i in range(k)]
def exchange(k, topology="pairwise", estimator="sampled"):
    return copd(names(k), cycles=1, topology=topology, estimator=estimator).phases[1]
def each(phase): return [Place(u.branch, (u.branch,)) for u in phase.updates]


def steps(phase, money, places=None, network=Network(), stale=False):
    return simulate(calls_of(phase, CONFIG, money, ENOUGH[stale], stale), places or each(phase), network)


def test_one_branch_takes_the_sum_of_its_stages():
    phase = expert("c0", 5).phases[0]
    assert math.isclose(steps(phase, costs(["c0"])).step_seconds, 1.0 + 1.0 + 0.2)
    assert [c.stage for c in step_calls(phase, CONFIG, costs(["c0"]))] == ["rollouts", "gradients", "update", "record"]


def test_two_branches_without_exchange_wait_only_for_the_slower_one():
    phase = copd(["c0", "c1"], cycles=1).phases[0]
    found = steps(phase, costs(["c0", "c1"], c1=2))
    assert math.isclose(found.step_seconds, 2 * (1.0 + 1.0) + 0.2)
    assert math.isclose(found.idle()["c0"], 2.0 / 4.2) and found.idle()["c1"] < 1e-9
    assert found.messages.query("receiver not in ['driver'] and sender != 'driver'").empty


def test_two_equal_branches_that_teach_each_other_never_wait():
    found = steps(exchange(2), costs(names(2)))
    assert math.isclose(found.step_seconds, 2.0 + 0.5 + 2.0 + 0.2) and found.idle().max() < 1e-9
    assert math.isclose(steps(exchange(2), costs(names(2)), [Place("one", ("c0", "c1"))]).step_seconds, 2 * 4.7)


def test_a_hub_of_three_makes_its_spokes_wait():
    "Hub: three batches to sample and to learn, two to answer; spokes: two and one."
    found = steps(exchange(3, "hub"), costs(names(3)))
    assert math.isclose(found.step_seconds, 3.0 + 2 * 0.5 + 3.0 + 0.2)
    assert math.isclose(found.idle()["c1"], 1 - (2.0 + 0.5 + 2.0 + 0.2) / 7.2) and found.idle()["c0"] < 1e-9


def test_a_slow_teacher_is_what_its_pupil_waits_for():
    "The pupil's weighing can't begin before the teacher has sampled for itself and answered."
    found = steps(exchange(2), costs(names(2), c1=3))
    waits = found.spans["0/gradients/c0"]
    assert math.isclose(waits[0],
                        found.spans["0/teacher scores/c0/opd:c1:c1"][1]) and waits[2].startswith("0/teacher scores/c0")
    assert {"rollouts", "teacher scores", "gradients", "update"} >= set(critical_stages(found).index)


def test_latency_is_spent_four_times_a_step():
    "Question, reply, rows to the driver, and the driver's word."
    free, far = (steps(exchange(2), costs(names(2)), network=Network(Link(latency))).step_seconds
                 for latency in (0, 0.25))
    assert math.isclose(far - free, 4 * 0.25)


def test_a_message_takes_its_bytes_over_the_bandwidth_and_the_way_in_is_shared():
    calls = [Call("a", "x", "rollouts", 1.0), Call("b", "y", "rollouts", 1.0),
             Call("c", "z", "teacher scores", 1.0, (("a", 100.0), ("b", 100.0)))]
    places = [Place(w, (w,)) for w in "xyz"]
    assert math.isclose(simulate(calls, places, Network(Link(0.5, 50.0))).seconds, 1 + 2 + 2 + 0.5 + 1)
    assert math.isclose(simulate(calls, [Place("all", ("x", "y", "z"))], Network(Link(0.5, 50.0))).seconds, 3)


def test_between_sites_the_other_link_counts():
    calls = [Call("a", "x", "rollouts", 1.0), Call("b", "y", "teacher scores", 1.0, (("a", 100.0),))]
    network = Network(Link(0.0, 100.0), Link(1.0, 10.0))
    assert simulate(calls, [Place("x", ("x",)), Place("y", ("y",))], network).seconds == 3
    assert simulate(calls, [Place("x", ("x",), site="here"), Place("y", ("y",), site="there")], network).seconds == 13


def test_a_group_of_devices_is_faster_by_what_its_doublings_keep():
    assert Place("g", ("c0",), 8, 0.5).speed == 1 and Place("g", ("c0",), 4, 0.9).speed == pytest.approx(4 * 0.81)
    phase = expert("c0", 5).phases[0]
    assert math.isclose(steps(phase, costs(["c0"]), [Place("g", ("c0",), 2)]).step_seconds, 2.2 / 2)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("topology", ["pairwise", "hub"])
def test_pairwise_sends_k_times_k_minus_1_and_a_hub_twice_k_minus_1(k, topology):
    between = steps(exchange(k, topology), costs(names(k))).messages.query("sender != 'driver' and receiver != "
                                                                           "'driver' and step == 0")
    links = k * (k - 1) if topology == "pairwise" else 2 * (k - 1)
    tokens = CONFIG.opd_prompts * CONFIG.group_size * 5
    assert len(between) == 2 * links and between["bytes"].sum() == links * tokens * (4 + 4)


def test_what_an_estimator_sends():
    tokens, sizes = CONFIG.opd_prompts * CONFIG.group_size * 5, {}
    for e in ("sampled", "topk", "reverse"):
        signal = exchange(2, estimator=e).updates[0].opd[0]
        sizes[e] = costs(names(2)).question(signal, CONFIG), costs(names(2)).reply(signal, CONFIG)
    assert sizes["sampled"] == (4 * tokens, 4 * tokens) and sizes["reverse"] == (4 * tokens,
            4 * (tokens + 16 * (tokens + 100)))
    assert sizes["topk"] == (4 * 17 * tokens, 4 * 18 * tokens)


def test_the_base_is_everywhere_and_frozen_teachers_have_workers():
    phase = mopd(["c0", "c1"], 3, 4).phases[-1]
    calls = step_calls(phase, CONFIG, costs(names(2)))
    assert {c.worker for c in calls if c.stage == "teacher scores"} == {"c0",
                                                                "c1"} and {c.worker for c in calls if c.stage
                                                                == "update"} == {"student"}
    asks_base = replace(phase, updates=[replace(u, signals=[replace(s, teacher="base") for s in u.signals])
                                        for u in phase.updates])
    assert {c.worker for c in step_calls(asks_base, CONFIG, costs(names(2)))} == {"student", DRIVER}


def test_prompts_of_mixed_rl_are_dealt_like_the_engine_deals_them():
    works = [dict(c.work) for c in calls_of(mixed_rlvr(names(3), 3).phases[0], CONFIG, None, 3) if c.stage
             == "rollouts"]
    assert [[w[f"rollouts/rl/{n}"] for n in names(3)] for w in works] == [[4, 3, 3], [3, 4, 3], [3, 3, 4]]


@st.composite
def settings_of(draw):
    "A phase, costs, places and a network, all drawn."
    k, topology = draw(st.integers(2, 4)), draw(st.sampled_from(["pairwise", "hub"]))
    second = st.floats(0.01, 2)
    money = costs(names(k), *(draw(second) for _ in range(4)), **{n: draw(st.floats(0.2, 4)) for n in names(k)})
    phase = exchange(k, topology, draw(st.sampled_from(["sampled", "topk", "reverse"])))
    network = Network(Link(draw(st.sampled_from([0, 0.01, 0.5])), draw(st.sampled_from([math.inf, 1e5, 1e3]))))
    return phase, money, network, draw(st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(settings_of())
def test_work_is_conserved_and_no_step_is_shorter_than_what_it_needs(drawn):
    phase, money, network, devices = drawn
    calls = calls_of(phase, CONFIG, money, 3)
    load = load_of(step_calls(phase, CONFIG, money))
    found = simulate(calls, placed(load, devices), network)
    speed = {w: p.speed for p in found.places for w in p.workers}
    assert math.isclose(found.busy().sum(), sum(s / speed[b] for b, s in load.items()))
    assert found.step_seconds >= found.busy().max() - 1e-9
    chains = [sum(c.seconds for c in step_calls(phase, CONFIG, money) if c.worker == u.branch and c.stage
                  != "teacher scores")
              / speed[u.branch] for u in phase.updates]
    assert found.step_seconds >= max(chains) - 1e-9
    for p in found.places:  # one call at a time, in the order of submission for each worker
        spans = sorted(found.spans[c.name][:2] for c in calls if c.worker in p.workers)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:]))
    for w in speed:
        begins = [found.spans[c.name][0] for c in calls if c.worker == w]
        assert begins == sorted(begins)


@settings(max_examples=20, deadline=None)
@given(settings_of())
def test_one_step_behind_is_never_slower_with_a_device_a_branch(drawn):
    phase, money, network, _ = drawn
    waiting, ahead = (steps(phase, money, network=network, stale=s) for s in (False, True))
    assert waiting.busy().max() - 1e-9 <= ahead.step_seconds <= waiting.step_seconds + 1e-9


@settings(max_examples=20, deadline=None, derandomize=True)
@given(settings_of(), st.floats(1.1, 100))
def test_more_bandwidth_is_hardly_ever_slower_with_a_device_a_branch(drawn, factor):
    "A message that comes sooner may change the order in which a device serves its calls (Graham's anomaly)."
    phase, money, network, _ = drawn
    faster = Network(replace(network.inside, bandwidth=network.inside.bandwidth * factor))
    assert steps(phase, money, network=faster).step_seconds <= 1.01 * steps(
        phase, money, network=network).step_seconds


@settings(max_examples=20, deadline=None)
@given(settings_of())
def test_one_process_takes_the_sum_of_all_work_and_sends_nothing(drawn):
    phase, money, network, _ = drawn
    found = simulate(calls_of(phase, CONFIG, money, 2), [Place("local", (*names(4), DRIVER))], network)
    assert math.isclose(found.step_seconds,
                        sum(c.seconds for c in step_calls(phase, CONFIG, money))) and found.messages.empty


def test_one_step_behind_hides_the_way_to_the_teacher():
    slow = Network(Link(latency=0.3))
    waiting, ahead = (steps(exchange(2), costs(names(2)), network=slow, stale=s) for s in (False, True))
    assert math.isclose(waiting.step_seconds, 4.7 + 4 * 0.3) and math.isclose(ahead.step_seconds, 4.7)
    first = [c.name for c in step_calls(exchange(2), CONFIG, costs(names(2)), 1, stale=True) if c.worker == "c0"]
    assert first == ["1/rollouts/c0", "1/gradients/c0", "1/teacher scores/c1/opd:c0:c0", "1/update/c0"]


def test_the_critical_path_runs_from_the_start_to_the_end_without_a_gap():
    found = steps(exchange(3, "hub"), costs(names(3)), network=Network(Link(0.1, 1e4)))
    path = critical_calls(found)
    assert found.spans[path[0]][0] == 0 and math.isclose(found.spans[path[-1]][1],
                                                         found.seconds) and math.isclose(critical_stages(found).sum(),
                                                         1)


def test_what_can_not_be_simulated_is_said():
    a, b = Call("a", "x", "rollouts", 1.0, (("b", 0.0),)), Call("b", "y", "rollouts", 1.0, (("a", 0.0),))
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([a, b], [Place("x", ("x",)), Place("y", ("y",))])
    with pytest.raises(ValueError, match=r"without a place: \['y'\]"):
        simulate([replace(b, needs=())], [Place("x", ("x",))])
    with pytest.raises(ValueError, match=r"two places: \['x'\]"): simulate([], [Place("p", ("x",)), Place("q", ("x",))])
    with pytest.raises(KeyError, match="no cost for 'rollouts/rl/c9'"):
        step_calls(expert("c9", 1).phases[0], CONFIG, costs(["c0"]))
    with pytest.raises(ValueError, match="devices must be 1 or more"): placed(dict(a=1.0), 0)
    with pytest.raises(ValueError, match="bandwidth positive"): Link(0, 0)


def test_heavy_branches_get_devices_first():
    assert [set(p.workers) for p in placed(dict(a=5, b=3, c=3, d=1), 2)] == [{"a", "d"}, {"b", "c"}]
    assert {p.name: p.devices for p in placed(dict(hub=8, x=2, y=2), 6)} == dict(hub=4, x=1, y=1)
    assert len({p.site for p in placed(dict(a=1, b=1), apart=True)}) == 2


def test_new_capabilities_cost_what_they_resemble():
    wide = spread(costs(["c0", "c1"], c1=3), ["d0", "d1", "d2"])
    assert wide.seconds["rollouts/rl/d1"] == 3 * wide.seconds["rollouts/rl/d2"] and wide.tokens[
        "d2"] == 5 and "rollouts/rl/c0" in wide.seconds
    assert costs_from(asdict(wide)) == wide


def test_a_forecast_adds_what_happens_between_steps():
    schedule, config = copd(names(2), cycles=2, s_rl=6, s_opd=3), replace(CONFIG, probe_every=2, eval_every=4,
            checkpoint_every=5, eval_prompts=10, probe_prompts=10)
    more = {f"{k}/{c}": v for k, v in dict(probe=0.01, evaluate=0.1).items()
            for c in names(2)} | dict(checkpoint=0.5, merge=2.0)
    money = replace(costs(names(2)), seconds=costs(names(2)).seconds | more, start=7.0)
    found = forecast(schedule, config, money, placed(dict(c0=1, c1=1)))
    rows = found.table.set_index("what")
    assert dict(rows["times"]) == {"cycle 1 · I RLVR": 6, "probe": 10, "evaluate": 6, "checkpoint": 6,
                                   "cycle 1 · II OPD": 3, "cycle 2 · I RLVR": 6, "cycle 2 · II OPD": 3, "merge": 1,
                                   "start": 1}
    assert math.isclose(rows.loc["evaluate", "seconds"],
                        2 * 10 * 0.1) and math.isclose(rows.loc["checkpoint", "seconds"], 1.0)
    assert rows.loc["checkpoint", "bytes"] == 2 * 3 * 4 * 1e6 and rows.loc["merge", "bytes"] == 4e6
    bare = forecast(schedule, config, money, placed(dict(c0=1, c1=1)), between=False)
    assert math.isclose(bare.seconds, 12 * 2.2 + 6 * 4.7) and math.isclose(found.seconds,
            bare.seconds + rows.drop(index=[i for i in rows.index if "cycle" in i])["total"].sum())
    assert "Costs:" in found._repr_html_() and "9.7" not in steps(exchange(2), costs(names(2)))._repr_html_()


def test_assumed_costs_say_so_and_follow_the_flops():
    load = Workload(4, 4, 8, dict(c0=100.0), dict(c0=50.0), ModelShape(10 ** 9, 0, 10, 1000, vocabulary=1000))
    found = assumed(load, 1e14, {"rollouts": 0.1, "teacher scores": 0.5, "gradients": 0.5}, 1e12, "a device")
    assert math.isclose(found.seconds["rollouts/rl/c0"],
                        5 * found.seconds["teacher scores/topk/c0"]) and "nothing measured" in found.origin
    flops = load.rl_cost("c0", 1).flops
    assert math.isclose((0.1 * found.seconds["rollouts/rl/c0"] + 0.5 * found.seconds["gradients/rl/c0"]) * 1e14, flops)
    with pytest.raises(ValueError, match="shares in"):
        assumed(load, 1e14, {"rollouts": 2.0, "teacher scores": 0.5, "gradients": 0.5}, 1e12, "a device")


def test_a_sweep_keeps_what_it_was_asked():
    found = sweep(dict(k=k, phase=exchange(k), config=CONFIG, costs=costs(names(k)), stale=s) for k in (2, 3)
                  for s in (False, True))
    assert list(found["k"]) == [2, 2, 3, 3] and found["step_seconds"].notna().all() and (found["idle"] < 1e-6).all()


def test_the_drawing_has_a_bar_for_each_call_and_a_legend():
    ax = gantt(steps(exchange(2), costs(names(2))))
    assert len(ax.patches) == 3 * 8 and [t.get_text()
                                         for t in ax.get_legend().get_texts()] == ["rollouts", "teacher scores",
                                         "gradients",
                                         "update"] and ax.get_xlabel() == "time (s)"
    plt.close(ax.figure)


TINY = Config(prompts=4, opd_prompts=2, group_size=2, max_new_tokens=4, device="cpu", warn=None)


def test_measured_stages_add_up_to_measured_steps_and_give_costs():
    base = tiny_policy(hidden=32, layers=1)
    reads = itertools.count()
    table = measure(copd(["text", "image"], cycles=1, s_rl=2, s_opd=2), minis(("text", "image")), base, TINY,
                    clock=lambda: float(next(reads)))
    by = table.assign(part=table["stage"] != "step").groupby(["phase", "step", "part"])["seconds"].sum().unstack()
    assert len(by) == 2 and (by[True] - by[False]).abs().max() < 1e-9 and (table["seconds"] >= 0).all()
    assert table[table["phase"].str.contains("II")].groupby("stage")["call"].count()["teacher scores"] == 2
    found = fitted([table], base)
    assert found.hidden == 32 and set(found.tokens) == {"text",
                                                        "image"} and found.price((("teacher scores/sampled/text", 2),
                                                        )) > 0
    local = copd(["text", "image"], cycles=1)
    inside = table[~table["stage"].isin(["step", "rest"])].groupby("phase")["seconds"].sum()
    assert [simulate(calls_of(p, TINY, found, 2), alone(local)).step_seconds
            for p in local.phases] == pytest.approx(list(inside[[p.title for p in local.phases]]))
    assert list(inside) == [7, 9]  # each call reads the clock at its start and its end: one second a call


def test_a_fit_finds_the_costs_that_made_the_measurements():
    "Pairs are enough to know what three branches cost."
    true = replace(costs(names(3), c1=2, c2=3), seconds=costs(names(3), c1=2, c2=3).seconds
                   | {"rollouts": 0.4, "record": 0.1, "record/signal": 0.01, "rest": 0.05})
    def table(pair):
        rows = [dict(phase=p.title, step=1, stage=c.stage, call=c.name, work=c.work, seconds=c.seconds)
                for p in copd(pair, cycles=1).phases for c in step_calls(p, CONFIG, true)]
        made = pd.DataFrame(rows)
        made.attrs["tokens"] = dict.fromkeys(pair, 5.0)
        return made
    found = fitted([table(["c0", "c1"]), table(["c0", "c2"])], tiny_policy(hidden=32, layers=1))
    wide = exchange(3)
    one = [Place("local", (*names(3), DRIVER))]
    seconds = {k: true.seconds[k] for k in true.seconds}
    assert math.isclose(steps(wide, found, one).step_seconds,
                        steps(wide, replace(true, seconds=seconds), one).step_seconds, rel_tol=1e-6)


def test_an_engine_that_makes_other_calls_than_planned_is_noticed(monkeypatch):
    def two(phase, config, costs, step): return [Call(name, "text", "rollouts", 0.0) for name in "ab"]
    monkeypatch.setattr("copd_nb.scale.measuring.step_calls", two)
    with pytest.raises(ValueError, match="the plan has 2 calls a step and the engine made 1"):
        measure(expert("text", 2), minis(("text",)), tiny_policy(hidden=32, layers=1), TINY)


def test_time_inside_another_watched_function_counts_once():
    now = iter([0.0, 1.0, 3.0, 6.0])
    with stopwatch(lambda: next(now)) as notes, timed("outer"):
        with timed("inner"): pass
    assert notes == [("inner", 3.0, 2.0), ("outer", 6.0, 4.0)]


OLD = dict(seconds={"roll": 0.0, "roll/rl/text": 1.0, "answer/topk/text": 2.0, "weigh/rl/text": 3.0,
                    "learn/stream": 4.0,
                    "rows/signal": 5.0, "rest": 6.0, "probe/text": 7.0},
           tokens=dict(text=5.0), weights=1e6, hidden=16, vocabulary=100)


def test_costs_of_version_0_1_are_read_by_the_stages_names_of_today():
    found = costs_from(OLD)
    assert list(found.seconds) == ["rollouts", "rollouts/rl/text", "teacher scores/topk/text", "gradients/rl/text",
                                   "update/stream", "record/signal", "rest", "probe/text"]
    assert list(found.seconds.values()) == list(OLD["seconds"].values())


class Loud(Estimator):
    "An estimator of a user: three numbers for each token, and two ids of the learner's."
    def numbers(self, config, hidden): return 3
    def top_ids(self, config): return 2


def test_the_estimator_decides_what_travels():
    signal = replace(exchange(2).updates[0].opd[0], estimator=Loud())
    money, tokens = costs(names(2)), CONFIG.opd_prompts * CONFIG.group_size * 5.0
    assert money.reply(signal, CONFIG) == 4 * 3 * tokens and money.question(signal, CONFIG) == 4 * 3 * tokens

"""Figures and tables of copd_nb.plots."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from copd_nb.view import plots

SCORES = pd.DataFrame([dict(paradigm=p, capability=c, mean=m, low=m - 1, high=m + 1) for p, row in
                       dict(base=(40, 50), expert=(48, 55), copd=(47, 58), mopd=(39, 52)).items() for c,
                       m in zip(("text", "image"), row)])
CURVES = pd.DataFrame([dict(paradigm=p, seed=s, tokens=t, accuracy=50 + s + t / 100)
                       for p, end in (("copd", 300), ("mopd", 200)) for s in (0, 1)
                       for t in range(0, end + 1, 100)])
PROBES = pd.DataFrame([dict(global_step=t, pair=p, capability="text", value=0.9 + s / 100, phase_index=t > 4,
                            phase="II OPD" if t > 4 else "I RLVR", seed=s)
                       for t in range(1, 9) for p in ("a – b", "a – c") for s in (0, 1)]).astype({"phase_index": int})
TRAIN = pd.DataFrame([dict(kind="train", global_step=t, branch=b, stream=s, reward=t / 10 if s == "rl" else None,
                           gradient_norm=1.0)
                      for t in range(1, 5) for b in ("text", "image") for s in ("rl", "opd:text")])
STUDENTS = pd.DataFrame(dict(overlap=[0.7, 0.8, 0.9, 0.95], gain=[1.0, 3.5, 4.0, 6.0], low=[0.0, 2.5, 3.0, 5.0],
                             high=[2.0, 4.5, 5.0, 7.0]))
EFFECTS = pd.DataFrame([dict(trained=i, measured=j, value=v, low=v - 1, high=v + 1) for (i, j), v in
                        {("text", "text"): 5.0, ("text", "image"): -2.0, ("image", "text"): -0.5,
                         ("image", "image"): 6.0}.items()])
POSITIONS = pd.DataFrame([dict(position=t, line=c, value=1 - t / 20, low=0.9 - t / 20, high=1.0) for t in range(5)
                          for c in ("text", "image")])
SPENT = pd.DataFrame(dict(paradigm=["a", "b", "c", "d"], tokens=[1e5, 2e5, 2e5, 3e5],
                          accuracy=[50.0, 55.0, 54.0, 52.0])).assign(low=lambda t: t.accuracy - 1,
                          high=lambda t: t.accuracy + 2)
COSTS = pd.DataFrame(dict(paradigm=["copd", "mopd"], generated=[1e6, 2e6], scored=[5e5, 0], trained=[1e6, 2e6]))
DECISIONS = pd.DataFrame([dict(kind="control", cycle=n, branch=b, setting="beta", old=o, new=w, seed=s)
                          for s in (0, 1) for b, values in (("text", (0.1, 0.2, 0.8)), ("image", (0.1, 0.1, 0.05)))
                          for n, (o, w) in enumerate(zip(values, values[1:]), 1)])

GAPS = pd.DataFrame([dict(paradigm=p, capability=c, value=v + i, low=v + i - 1, high=v + i + 1)
                     for p, v in (("base", 20.0), ("mixed", 4.0), ("CoPD", 2.0))
                     for i, c in enumerate(("text", "image"))])

LEADS = pd.DataFrame([dict(cell=c, paradigm=p, seed=s, accuracy=50 + at + lead + s)
                      for at, c in enumerate(("related", "separate"))
                      for p, lead in (("mixed", 0), ("CoPD", 2 * at - 1), ("MOPD", 3)) for s in range(3)])

CASES = dict(intervals=(plots.intervals, (SCORES,), "low", ("(%)", "paradigm")),
             capability_gap=(plots.capability_gap, (GAPS,), "high", ("points", "capability")),
             dynamics=(plots.dynamics, (PROBES, "overlap"), "phase", ("updates", "share")),
             learning=(plots.learning_curves, (CURVES, "tokens"), "seed", ("tokens", "(%)")),
             training=(plots.training_curves, (TRAIN, "reward"), "branch", ("updates", "reward")),
             control=(plots.control_decisions, (DECISIONS,), "new", ("cycle", "β")),
             costs=(plots.costs, (COSTS,), "scored", ("tokens", "paradigm")),
             dumbbells=(plots.dumbbells, (SCORES,), "low", ("(%)", "capability")),
             overlap_gain=(plots.overlap_gain, (STUDENTS,), "gain", ("overlap", "points")),
             effect_map=(plots.effect_map, (EFFECTS,), "value", ("measured", "trained")),
             by_position=(plots.by_position, (POSITIONS,), "low", ("tokens", "overlap")),
             leads_by_cell=(plots.leads_by_cell, (LEADS, "mixed"), "seed", ("points above mixed", "")),
             pareto=(plots.pareto, (SPENT,), "high", ("tokens", "(%)")))


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")  # other tests of this process may have left some
    yield
    plt.close("all")


@pytest.mark.parametrize("name", CASES)
def test_plots_return_their_axes_label_units_and_leave_settings_alone(name):
    plot, args, column, (xlabel, ylabel) = CASES[name]
    before, ax = dict(matplotlib.rcParams), plt.subplots()[1]
    assert plot(*args, ax=ax) is ax
    assert xlabel in ax.get_xlabel() and ylabel in ax.get_ylabel()
    assert dict(matplotlib.rcParams) == before
    assert len(plt.get_fignums()) == 1 and plot(*args) is not ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", CASES)
def test_missing_columns_are_named(name):
    plot, args, column, _ = CASES[name]
    with pytest.raises(ValueError, match=rf"lacks columns \['{column}'\]"):
        plot(args[0].drop(columns=column), *args[1:])


def test_inputs_are_not_changed():
    for plot, args, *_ in CASES.values():
        copy = args[0].copy()
        plot(*args)
        pd.testing.assert_frame_equal(args[0], copy)


def test_palette_is_stable_and_distinct():
    assert plots.palette(["mopd", "x", "copd"])["copd"] == plots.palette(["CoPD"])["CoPD"]
    names = ["copd", "mixed_rlvr", "mopd", "merged_experts", "static_opd", "expert", "base", "mine"]
    assert list(plots.palette(names)) == names and len(set(plots.palette(names).values())) == 8


def test_table_marks_best_and_worst_by_shape():
    html, md = plots.accuracy_table(SCORES)._repr_html_(), plots.accuracy_markdown(SCORES)
    for best in ("48.0 [47.0, 49.0] ▲", "58.0 [57.0, 59.0] ▲"): assert f"<b>{best}</b>" in html and f"**{best}**" in md
    for worst in ("39.0 [38.0, 40.0] ▼", "50.0 [49.0, 51.0] ▼"):
        assert f"<td>{worst}</td>" in html and f"| {worst} |" in md
    assert html.count("▲") == 3 and md.count("▲") == md.count("▼") == 2  # one more in the caption


def test_table_edges():
    extra = pd.DataFrame([dict(paradigm="<b>", capability="mean", mean=44.0, low=np.nan, high=np.nan)])
    table = plots.accuracy_table(pd.concat([extra, SCORES]))
    assert list(table.cells.columns)[-1] == "mean" and table.cells.loc["<b>", "mean"] == "44.0"
    assert table.cells.loc["copd", "mean"] == "–"
    assert "&lt;b&gt;" in table._repr_html_()
    with pytest.raises(ValueError, match="one row"): plots.accuracy_table(pd.concat([SCORES, SCORES]))
    with pytest.raises(ValueError, match="lacks columns"): plots.accuracy_markdown(SCORES.drop(columns="low"))


def test_capability_gap_leads_from_the_base_to_each_paradigm():
    ax = plots.capability_gap(GAPS)
    points = [line.get_xdata() for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert {round(float(x[0]), 6) for x in points} == {2, 3, 4, 5, 20, 21}  # both paradigms, and the base twice
    assert ax.get_xlabel().startswith("capability gap: expert minus paradigm")
    with pytest.raises(ValueError, match="lack the paradigm 'base'"):
        plots.capability_gap(GAPS[GAPS.paradigm != "base"])


def test_dynamics_shades_opd_only_and_names_phases():
    ax = plots.dynamics(PROBES, "symmetric_kl")
    assert [t.get_text() for t in ax.texts] == ["RLVR", "OPD"] and "nats" in ax.get_ylabel()
    (span,) = [path for c in ax.collections if c.get_zorder() == 0 for path in c.get_paths()]
    assert span.get_extents().intervalx.tolist() == pytest.approx([4, 8])
    assert "min–max\nof 2 seeds" in ax.get_legend().get_title().get_text()
    assert "one seed" in plots.dynamics(PROBES[PROBES.seed == 0].drop(columns="seed"),
                                        "overlap").get_legend().get_title().get_text()


def test_a_run_without_probes_has_no_rows_and_an_empty_picture():
    "`Config(probe_every=0)`: the log has no columns a and b."
    events = pd.DataFrame([dict(kind="train", global_step=1, branch="a", reward=0.5, seed=0)])
    rows = plots.probe_rows(events)
    assert rows.empty and rows[rows.b != "base"].empty and {"a", "b"} <= set(rows)
    values = plots.probe_values(events, "overlap")
    assert values.empty and "seed" in values
    assert "probe_every = 0" in plots.dynamics(values, "overlap").texts[0].get_text()
    with pytest.raises(ValueError, match="lacks columns .'kind'"): plots.probe_rows(events.drop(columns="kind"))


def test_probe_values_average_owners_and_join_both_directions():
    rows = pd.DataFrame([dict(kind="probe", a=a, b=b, owner=o, capability="text", global_step=1, phase_index=0,
                              phase="I RLVR", overlap=v)
                         for a, b, o, v in [("t", "i", "t", 0.8), ("t", "i", "i", 0.9), ("i", "t", "i", 0.7)]]
                        + [dict(kind="train", global_step=1)])
    out = plots.probe_values(rows, "overlap")
    assert len(out) == 1 and out["value"][0] == pytest.approx(0.8) and out["pair"][0] == "i – t"
    assert plots.dynamics(out, "overlap").lines


def test_learning_curves_mark_the_common_budget():
    ax = plots.learning_curves(CURVES, "tokens")
    assert 200 in [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert len(ax.collections) == 2  # a band for each paradigm


def test_training_curves_split_streams_and_refuse_empty_metrics():
    assert len(plots.training_curves(TRAIN,
                                     "gradient_norm").lines) == 4 and len(plots.training_curves(TRAIN,
                                     "reward").lines) == 2
    with pytest.raises(ValueError, match="no train row"): plots.training_curves(TRAIN.assign(reward=np.nan), "reward")


def test_costs_stack_and_refuse_repeats():
    ax = plots.costs(COSTS)
    assert max(p.get_x() + p.get_width() for p in ax.patches) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="one row"): plots.costs(pd.concat([COSTS, COSTS]))


def bars(ax): return [c for c in ax.containers if hasattr(c, "has_xerr")]


def test_dumbbells_show_all_three_with_intervals():
    ax = plots.dumbbells(SCORES)
    points = {(round(float(c.lines[0].get_xdata()[0]), 6), float(c.lines[0].get_ydata()[0])) for c in bars(ax)}
    assert len(bars(ax)) == 4 * 3 and all(c.has_xerr for c in bars(ax))
    assert points == {(x, y) for y, row in enumerate([(50, 58, 55), (50, 52, 55), (40, 47, 48), (40, 39, 48)])
                      for x in row}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["image  copd", "image  mopd", "text  copd", "text  mopd"]
    assert sorted(t.get_text() for t in ax.get_legend().get_texts()) == ["base", "copd", "expert", "mopd"]
    with pytest.raises(ValueError, match=r"lack \[\('expert', 'image'\)"):
        plots.dumbbells(SCORES[(SCORES.paradigm != "expert") | (SCORES.capability == "text")])


def test_overlap_gain_draws_the_fit_of_its_points():
    ax = plots.overlap_gain(STUDENTS)
    slope, intercept = np.polyfit(STUDENTS.overlap, STUDENTS.gain, 1)
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_ydata(), intercept + slope * line.get_xdata())
    r = np.corrcoef(STUDENTS.overlap, STUDENTS.gain)[0, 1]
    assert f"r = {r:.2f} [" in ax.get_title() and f"R² = {r ** 2:.2f}" in ax.get_title(
        ) and "4 students" in ax.get_title()
    assert len(plots.overlap_gain(STUDENTS.assign(group=["a", "a", "b", "b"])).get_legend().get_texts()) == 4
    assert plots.overlap_gain(STUDENTS[["overlap", "gain"]]).lines
    assert "r = −" in plots.overlap_gain(STUDENTS[["overlap",
                                                   "gain"]].assign(gain=lambda t: -t.gain)).get_title(
        ) and "-" not in ax.get_title()
    with pytest.raises(ValueError, match="two different x"): plots.overlap_gain(STUDENTS.assign(overlap=0.8))


def test_large_counts_are_shown_with_their_unit():
    table = pd.DataFrame(dict(arm="a", k=[2, 3], value=[2e5, 4e5]))
    assert plots.by_count(table, "k", "tokens").yaxis.get_major_formatter()(3e5) == "300k"
    assert plots.by_count(table.assign(value=table.value / 1e5), "k", "links").yaxis.get_major_formatter()(3) != "3k"


def test_effect_map_writes_every_number_and_doubts_those_around_zero():
    ax = plots.effect_map(EFFECTS)
    texts = [t.get_text() for t in ax.texts]
    assert "−2\n−3 to −1" in texts and "(−0.5)\n−1.5 to +0.5" in texts and len(texts) == 4
    at = {t.get_position(): t.get_text().split("\n")[0] for t in ax.texts}
    assert at[1, 0] == "−2" and at[0, 1] == "(−0.5)"  # row trained, column measured
    low, high = ax.images[0].get_clim()
    assert low == -high == -6
    assert "–" in [t.get_text() for t in plots.effect_map(EFFECTS.assign(value=[np.nan, 1, 2, 3])).texts]
    assert plots.effect_map(EFFECTS.assign(value=0.0)).images and "+5" in [t.get_text()
            for t in plots.effect_map(EFFECTS[["trained", "measured", "value"]]).texts]
    with pytest.raises(ValueError, match="one row"): plots.effect_map(pd.concat([EFFECTS, EFFECTS]))


def test_by_position_has_a_line_and_a_band_each():
    ax = plots.by_position(POSITIONS, "symmetric_kl")
    assert len(ax.lines) == len(ax.collections) == 2 and "nats" in ax.get_ylabel()
    assert len(plots.by_position(POSITIONS[POSITIONS.line
                                           == "text"].drop(columns="line").iloc[::-1]).lines[0].get_xdata()) == 5


def test_pareto_front_is_what_nothing_beats():
    assert list(plots.pareto_front(SPENT).paradigm) == ["a", "b"]
    assert list(plots.pareto_front(SPENT.iloc[::-1]).paradigm) == ["a", "b"]
    assert list(plots.pareto_front(SPENT.assign(accuracy=[1, 2, 3, 4])).accuracy) == [1, 3, 4]
    ax = plots.pareto(SPENT)
    assert len(bars(ax)) == 4 and list(ax.lines[0].get_xdata()) == [1e5, 2e5]


def test_legends_name_everything_once():
    names = [t.get_text() for t in plots.dumbbells(SCORES).get_legend().get_texts()]
    assert len(names) == len(set(names))


def test_control_decisions_start_where_the_plan_did():
    ax = plots.control_decisions(DECISIONS[DECISIONS["seed"] == 0])
    drawn = {line.get_label(): (list(line.get_xdata()), [round(float(y), 9) for y in line.get_ydata()])
             for line in ax.get_lines()}
    assert drawn == {"text": ([1, 2, 3], [0.1, 0.2, 0.8]),
                     "image": ([1, 2, 3], [0.1, 0.1, 0.05])} and ax.get_yscale() == "log"


def test_decisions_on_steps_have_a_line_a_setting_and_a_plain_axis():
    rows = pd.DataFrame([dict(kind="control", cycle=n, branch="all", setting=s, old=o, new=o + d) for n in (2, 3) for s,
                         o, d in (("s_rl", 14 - n, -1), ("s_opd", 6 + n, 1))])
    ax = plots.control_decisions(rows)
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert drawn == {"all · s_rl": [12, 11, 10],
                     "all · s_opd": [8, 9, 10]} and ax.get_yscale() == "linear" and "steps" in ax.get_ylabel()
    with pytest.raises(ValueError, match="axes of their own"): plots.control_decisions(pd.concat([rows, DECISIONS]))
    with pytest.raises(ValueError, match="no control row"): plots.control_decisions(DECISIONS.assign(kind="train"))


def test_leads_by_cell_are_differences_of_the_same_seed():
    noisy = LEADS.assign(accuracy=LEADS.accuracy + 5 * LEADS.seed ** 2)  # hard seeds are hard for all
    over = pd.DataFrame(dict(paradigm=["MOPD", "CoPD"], lead=[3.0, 0.0], low=[2.0, -4.0], high=[4.0, 4.0]))
    ax = plots.leads_by_cell(noisy.sample(frac=1, random_state=0).sort_values("cell", kind="stable"), "mixed", over)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["related", "separate", "over all cells"]
    marks = {}
    for line in ax.lines:
        if line.get_label() in ("CoPD", "MOPD"): marks.setdefault(line.get_label(), []).extend(line.get_xdata())
    assert marks == dict(CoPD=[-1.0, 1.0], MOPD=[3.0, 3.0])
    means = {c.lines[0].get_xdata()[0] for c in ax.containers}
    assert means == {3.0, 0.0} and ax.get_ylim()[0] > ax.get_ylim()[1]


@pytest.mark.parametrize("reference, kept", [
    ("experts", slice(None)), ("mixed", LEADS.paradigm.ne("mixed") | LEADS.seed.gt(0))])
def test_leads_by_cell_need_the_reference_everywhere(reference, kept):
    with pytest.raises(ValueError, match=f"paradigm '{reference}'"): plots.leads_by_cell(LEADS[kept], reference)

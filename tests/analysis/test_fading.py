"Signals pooled over steps: the truth within noise, order and scale don't matter, too few rows are named."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.analysis.fading import coherence_lost, norm_left, signal_windows
from copd_nb.signals.coherence import gradient_signal


def row(step, parts, counts=(4, 4), stream="opd:text:text", **more):
    about = dict(kind="signal", what="gradient", branch="student", stream=stream, capability="text", global_step=step)
    return about | dict(prompts=sum(counts)) | gradient_signal(torch.as_tensor(parts), counts) | more


def steps(n, seed=0, size=30, **more):
    rng = np.random.default_rng(seed)
    return [row(t, rng.standard_normal((2, size)) + 3 * (n - t) / n, **more) for t in range(n)]


def test_no_noise_is_full_coherence_and_noise_alone_is_none():
    alike = np.ones((2, 5))
    assert np.allclose(signal_windows(pd.DataFrame([row(t, alike) for t in range(4)]), windows=2).coherence, 1)
    assert np.allclose(signal_windows(pd.DataFrame([row(t, alike) for t in range(4)]), windows=2).norm_squared, 5)
    noise = np.random.default_rng(0).standard_normal((900, 2, 50))
    found = signal_windows(pd.DataFrame([row(t, x) for t, x in enumerate(noise)]), windows=3)
    assert (found.coherence.abs() < 0.02).all()


def test_counts_of_unequal_halves_and_prompts_weigh_the_noise():
    "By hand: sums of estimates before the division, the spread being that of one prompt."
    rng = np.random.default_rng(1)
    counts = (4, 4), (3, 2), (8, 8), (1, 2)
    rows = [row(t, rng.standard_normal((2, 9)) + 1, n) for t, n in enumerate(counts)]
    norm = sum(r["norm_squared"] for r in rows[:2])
    spread = sum(r["noise_squared"] * r["prompts"] for r in rows[:2])
    assert signal_windows(pd.DataFrame(rows), windows=2).coherence[0] == pytest.approx(norm / (norm + spread))


@given(st.integers(6, 30), st.floats(1e-3, 1e3))
def test_order_and_scale_change_nothing(n, scale):
    table = pd.DataFrame(steps(n))
    shuffled = table.sample(frac=1, random_state=n)
    scaled = table.assign(norm_squared=scale * table.norm_squared, noise_squared=scale * table.noise_squared)
    for other in (shuffled, scaled):
        assert np.allclose(signal_windows(other).coherence, signal_windows(table).coherence)


def test_a_fading_signal_loses_coherence_in_each_run():
    runs = pd.concat([pd.DataFrame(steps(30, seed)).assign(seed=seed) for seed in (3, 5)])
    other = runs.assign(stream="opd:image:image", capability="image")
    found = coherence_lost(signal_windows(pd.concat([runs, other])))
    assert list(found.index) == [3, 5] and (found > 0.2).all()
    left = norm_left(signal_windows(pd.concat([runs, other])))
    assert list(left.index) == [3, 5] and (left < 0.6).all()
    one = signal_windows(runs[runs.seed == 3])
    assert found[3] == pytest.approx(one.coherence[0] - one.coherence[2])


def test_other_streams_rows_without_halves_and_conflicts_are_left_out():
    table = pd.DataFrame([*steps(6), *steps(6, stream="rl"), dict(kind="signal", what="conflict", global_step=0),
                          dict(kind="train", global_step=1),
                          row(9, np.ones((2, 3)), stream="opd:image:image", norm_squared=np.nan)])
    assert set(signal_windows(table).stream) == {"opd:text:text"} and set(signal_windows(table, "rl").stream) == {"rl"}


def test_too_few_rows_are_named():
    with pytest.raises(ValueError, match="set Config.signals_every"):
        signal_windows(pd.DataFrame(steps(4, stream="rl")))
    with pytest.raises(ValueError, match="3 windows of 2 watched steps of student, opd:text:text, text"):
        signal_windows(pd.DataFrame(steps(2)))
    with pytest.raises(ValueError, match="at least two windows"): signal_windows(pd.DataFrame(steps(9)), windows=1)
    with pytest.raises(ValueError, match="global_step"): signal_windows(pd.DataFrame(dict(kind=["signal"])))


def test_a_norm_that_noise_hides_is_none():
    table = signal_windows(pd.DataFrame(steps(30)))
    assert np.isfinite(norm_left(table)[0]) and np.isnan(norm_left(table.assign(norm_squared=[1.0, 1.0, -1e-9]))[0])
    assert norm_left(table.assign(norm_squared=[4.0, -1.0, 1.0]))[0] == 0.5

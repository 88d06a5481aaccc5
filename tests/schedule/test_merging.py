"Merging against hand-made examples and slow loops, and properties that every method must have."

import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from copd_nb.schedule.merging import METHODS, NEEDS_BASE, merge


class TinyPolicy:
    "The two methods that merge expects of a policy."

    def __init__(self, state):
        self.state = state

    def dense_state(self):
        return self.state

    def with_state(self, state):
        return TinyPolicy(state)


def states(count, seed=0, dtype=torch.float32):
    "State dicts with a matrix, a vector, a number and a counter."
    g = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (4, 5), "vector": (7,), "number": ()}
    return [
        {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()} | {"counter": torch.tensor(3)}
        for _ in range(count)
    ]


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def close(a, b, atol=1e-6):
    return list(a) == list(b) and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identical_branches_merge_to_themselves(method, dtype):
    base, branch = states(2, dtype=dtype)
    for count in (2,) if method == "slerp" else (2, 3, 7):
        merged = merge([branch] * count, method, base=base)
        if dtype != torch.float64:
            assert same(merged, branch)  # bit for bit: the arithmetic is wider than the tensors
        for key, x in branch.items():  # float64 has nothing wider: b + (x − b) rounds at the size of its terms
            assert ((merged[key] - x).abs() <= 4e-16 * (x.abs() + base[key].abs())).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(4)), st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_order_does_not_matter(seed, order, weights):
    base, *models = states(5, seed)
    for method in ("linear", "task_arithmetic", "ties"):
        merged = merge(models, method, weights, base)
        shuffled = merge([models[i] for i in order], method, [weights[i] for i in order], base)
        assert close(merged, shuffled)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.data())
def test_a_linear_merge_lies_between_its_branches_and_ties_between_them_and_the_base(seed, count, data):
    weights = data.draw(st.lists(st.floats(0, 5), min_size=count, max_size=count).filter(lambda w: sum(w) > 1e-3))
    base, *models = states(count + 1, seed)
    merged, elected = (
        merge(models, "linear", weights),
        merge(models, "ties", weights, base, data.draw(st.floats(0.05, 1))),
    )
    used = [m for m, w in zip(models, weights) if w]
    for key in ("matrix", "vector", "number"):
        column, around = torch.stack([m[key] for m in used]), torch.stack([m[key] for m in (*used, base)])
        assert (column.amin(0) <= merged[key]).all() and (merged[key] <= column.amax(0)).all()
        assert (around.amin(0) <= elected[key]).all() and (elected[key] <= around.amax(0)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(1e-3, 1e3),
    st.sampled_from(METHODS),
    st.floats(0.05, 1),
)
@example(0, 2.3e-308, 1e-3, "ties", 0.5)  # a weight that is smaller than what floats keep exactly
def test_weights_count_by_their_ratio_and_a_merge_with_itself_changes_nothing(seed, t, size, method, density):
    base, a, b = states(3, seed)
    again = merge([a, a], method, [1 - t, t] if method != "dare" else None, base, 1.0, seed)
    assert close(again, a)
    if method not in ("task_arithmetic", "dare"):
        assert close(
            merge([a, b], method, [1 - t, t], base, density),
            merge([a, b], method, [(1 - t) * size, t * size], base, density),
            1e-5,
        )
    if method == "slerp":
        assert close(merge([a, b], method, [1 - t, t]), merge([b, a], method, [t, 1 - t]))


def test_linear_against_a_loop_and_by_scale():
    models, weights = states(3), [1.0, 2.0, 5.0]
    merged = merge(models, weights=weights)
    for key in ("matrix", "vector"):
        flat = [m[key].flatten().tolist() for m in models]
        expected = [math.fsum(w * x for w, x in zip(weights, column)) / 8 for column in zip(*flat)]
        assert merged[key].flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert close(merged, merge(models, weights=[w * 10 for w in weights]))
    assert same(merge(models, weights=[0, 1, 0]), models[1])


def test_bfloat16_is_accumulated_in_float64():
    values = [1.0] + [2**-9] * 7  # running sums in bfloat16 would stay at 1
    models = [{"w": torch.tensor([v], dtype=torch.bfloat16)} for v in values]
    merged = merge(models, "task_arithmetic", [1.0] * 8, {"w": torch.zeros(1)})["w"]
    assert merged.dtype == torch.bfloat16 and merged.item() == torch.tensor(1 + 7 * 2**-9).bfloat16().item() > 1


def test_task_arithmetic_takes_weights_as_they_are():
    base, a, b = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0))
    assert merge([a, b], "task_arithmetic", base=base)["w"].item() == 3  # 1 + (1 + 3) / 2
    assert merge([a, b], "task_arithmetic", [1, 1], base)["w"].item() == 5
    assert merge([a, b], "task_arithmetic", [2, 0.5], base)["w"].item() == 4.5


def test_ties_by_hand():
    base = {"w": torch.tensor([10.0, 0, 0, 0, 0, 0])}
    a = {"w": torch.tensor([14.0, -3, 0.1, 2, 0, 0.2])}  # task vector 4, −3, 0.1, 2, 0, 0.2
    b = {"w": torch.tensor([8.0, -5, 3, 0.1, 0.2, 0])}  # −2, −5, 3, 0.1, 0.2, 0
    half = merge([a, b], "ties", base=base, density=0.5)["w"]  # keeps 4, −3, 2 and −2, −5, 3
    assert torch.allclose(half, torch.tensor([14.0, -4, 3, 2, 0, 0]))
    whole = merge([a, b], "ties", base=base)["w"]
    assert torch.allclose(whole, torch.tensor([14.0, -4, 1.55, 1.05, 0.2, 0.2]))
    weighted = merge([a, b], "ties", [1, 3], base, density=0.5)["w"]  # the sign of entry 0 flips: 4 − 3·2 < 0
    assert torch.allclose(weighted, torch.tensor([8.0, -4.5, 3, 2, 0, 0]))
    assert torch.allclose(weighted, merge([a, b], "ties", [0.25, 0.75], base, density=0.5)["w"])


def test_ties_cancel_and_trim_exactly():
    base = {"w": torch.zeros(4)}
    merged = merge([{"w": torch.tensor([1.0, 1, 1, 1])}, {"w": torch.tensor([-1.0, 1, 1, 1])}], "ties", base=base)
    assert merged["w"].tolist() == [0, 1, 1, 1]  # an exact tie elects nobody
    kept = merge([{"w": torch.ones(4)}] * 2, "ties", base=base, density=0.5)["w"]
    assert kept.tolist() == [1, 1, 0, 0]  # equal magnitudes: exactly the share, the earlier ones
    assert merge([{"w": torch.ones(4)}] * 2, "ties", base=base, density=0.01)["w"].tolist() == [1, 0, 0, 0]


def slow_ties(base, models, weights, density):
    deltas = [[x - y for x, y in zip(m, base)] for m in models]
    count = max(1, round(density * len(base)))
    for d in deltas:
        kept = set(sorted(range(len(d)), key=lambda i: (-abs(d[i]), i))[:count])
        d[:] = [x if i in kept else 0.0 for i, x in enumerate(d)]
    out = []
    for i, b in enumerate(base):
        total = sum(w * d[i] for w, d in zip(weights, deltas))
        agree = [(w, d[i]) for w, d in zip(weights, deltas) if d[i] * total > 0]
        out.append(b + (sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0))
    return out


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1), st.lists(st.floats(0.1, 3), min_size=3, max_size=3))
def test_ties_against_a_loop(seed, density, weights):
    base, *models = states(4, seed, torch.float64)
    merged = merge(models, "ties", weights, base, density)
    for key in ("matrix", "vector"):
        flat = [m[key].flatten().tolist() for m in (base, *models)]
        assert merged[key].flatten().tolist() == pytest.approx(slow_ties(flat[0], flat[1:], weights, density), abs=1e-9)


def test_dare_is_unbiased_with_the_right_variance():
    base, a, b = states(3)
    exact = merge([a, b], "task_arithmetic", [1, 0.5], base)["matrix"]
    draws = torch.stack([merge([a, b], "dare", [1, 0.5], base, density=0.4, seed=s)["matrix"] for s in range(1500)])
    deviation = (
        ((a["matrix"] - base["matrix"]).square() + 0.25 * (b["matrix"] - base["matrix"]).square()).mul(0.6 / 0.4).sqrt()
    )
    assert ((draws.mean(0) - exact).abs() <= 4.5 * deviation / math.sqrt(1500)).all()
    assert torch.allclose(draws.std(0), deviation, rtol=0.12)


def test_dare_drops_rescales_and_is_seeded():
    base, branch = {"w": torch.zeros(1000)}, {"w": torch.ones(1000)}
    merged = merge([branch, branch], "dare", [1, 0], base, density=0.25, seed=1)["w"]
    assert set(merged.tolist()) == {0.0, 4.0} and 0.2 < (merged > 0).float().mean() < 0.3
    both = merge([branch, branch], "dare", [1, 1], base, density=0.25, seed=1)["w"]
    assert set(both.tolist()) == {0.0, 4.0, 8.0}  # each branch draws its own
    again, other = (merge([branch, branch], "dare", [1, 0], base, density=0.25, seed=s)["w"] for s in (1, 2))
    assert torch.equal(merged, again) and not torch.equal(merged, other)


def test_a_merge_leaves_the_global_random_state_and_its_inputs_alone():
    base, *models = states(3)
    copies = [{k: v.clone() for k, v in m.items()} for m in (base, *models)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for method in METHODS:
        merged = merge(models, method, base=base, density=0.5)
        for x in merged.values():
            x.add_(1)  # the result shares no memory with the inputs
    assert torch.equal(torch.get_rng_state(), before)
    assert all(same(a, b) for a, b in zip(copies, (base, *models)))


def test_slerp_keeps_norms_and_walks_the_arc():
    for seed in range(20):
        a, b = torch.nn.functional.normalize(torch.randn(2, 30, generator=torch.Generator().manual_seed(seed)), dim=1)
        angle = torch.acos((a * b).sum())
        for t in (0.1, 0.5, 0.75):
            merged = merge([{"w": a}, {"w": b}], "slerp", [1 - t, t])["w"]
            assert merged.norm().item() == pytest.approx(1, abs=1e-6)
            assert torch.acos((a * merged).sum()).item() == pytest.approx(t * angle.item(), abs=1e-4)


@pytest.mark.parametrize("angle", [0.001, 0.02, 0.5, 2.0, 3.1])
def test_slerp_turns_by_its_share_of_the_angle(angle):
    def point(x):
        return torch.tensor([math.cos(x), math.sin(x)], dtype=torch.float64)

    for t in (0.25, 0.5):
        merged = merge([{"w": 2 * point(0)}, {"w": 2 * point(angle)}], "slerp", [1 - t, t])["w"]
        assert torch.allclose(merged, 2 * point(t * angle), rtol=0, atol=1e-8)


def test_slerp_ends_and_nearly_colinear_tensors():
    a, b = states(2)
    assert close(merge([a, b], "slerp", [1, 0]), a) and close(merge([a, b], "slerp", [0, 3]), b)
    for other in (2 * a["vector"], -a["vector"], 0 * a["vector"], a["vector"] * (1 + 1e-7)):
        merged = merge([{"w": a["vector"]}, {"w": other}], "slerp", [0.3, 0.7])["w"]
        assert torch.allclose(merged, 0.3 * a["vector"] + 0.7 * other)
    assert merge([a, b], "slerp")["number"].item() == pytest.approx((a["number"] + b["number"]).item() / 2)


def test_density_one_makes_methods_agree():
    base, *models = states(4)
    weights = [0.5, 0.3, 0.2]
    arithmetic = merge(models, "task_arithmetic", weights, base)
    assert same(merge(models, "dare", weights, base), arithmetic)
    assert close(merge(models, "linear", weights), arithmetic)  # as the weights sum to 1
    aligned = [{"w": base["vector"] + i * torch.ones(7)} for i in (1, 2, 3)]  # nobody disagrees, nothing is trimmed
    assert close(merge(aligned, "ties", weights, {"w": base["vector"]}), merge(aligned, "linear", weights))


def test_policies_state_dicts_and_their_mixtures():
    base, a, b = states(3)
    plain = merge([a, b])
    policy = merge([TinyPolicy(a), TinyPolicy(b)])
    assert isinstance(policy, TinyPolicy) and same(policy.state, plain)
    assert isinstance(merge([TinyPolicy(a), b]), TinyPolicy) and isinstance(merge([a, TinyPolicy(b)]), dict)
    assert same(merge([a, b], "ties", base=TinyPolicy(base)), merge([a, b], "ties", base=base))
    module = torch.nn.Linear(2, 2)
    merged = merge([module.state_dict(), module.state_dict()])
    assert same(merged, dict(module.state_dict())) and not any(x.requires_grad for x in merged.values())


def test_tied_weights_stay_tied():
    def tied(seed):
        w = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        return {"embedding": w, "head": w, "other": w.clone()}

    merged = merge([tied(1), tied(2)], "dare", base=tied(0), density=0.5)
    assert merged["embedding"].data_ptr() == merged["head"].data_ptr()
    assert torch.equal(merged["embedding"], merged["head"]) and not torch.equal(merged["embedding"], merged["other"])
    half = tied(1) | {"head": torch.zeros(50)}  # tied in one of the two only: no longer one tensor
    merged = merge([half, tied(2)])
    assert torch.allclose(merged["head"], tied(2)["head"] / 2) and not torch.equal(merged["head"], merged["embedding"])


def test_whole_numbers_must_be_equal():
    a, b = states(2)
    assert merge([a, b])["counter"].item() == 3
    with pytest.raises(ValueError, match="counter"):
        merge([a, b | {"counter": torch.tensor(4)}])


def test_request_errors():
    base, a, b = states(3)
    with pytest.raises(ValueError, match="linear, task_arithmetic, ties, dare, slerp"):
        merge([a, b], "average")
    for models in ([], [a]):
        with pytest.raises(ValueError, match="at least 2"):
            merge(models)
    with pytest.raises(ValueError, match="exactly 2"):
        merge([a, b, a], "slerp")
    for method in NEEDS_BASE:
        with pytest.raises(ValueError, match="needs base"):
            merge([a, b], method)
    for density in (0, -0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match="density"):
            merge([a, b], "ties", base=base, density=density)
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        merge([a, b], weights=[1, 2, 3])
    for weights in ([0, 0], [-1, 2], [math.nan, 1], [math.inf, 1]):
        with pytest.raises(ValueError, match="weights are"):
            merge([a, b], weights=weights)


def test_key_and_shape_errors_name_the_first_key():
    base, a, b = states(3)
    with pytest.raises(ValueError, match="'matrix' is missing"):
        merge([a, {k: v for k, v in b.items() if k == "counter"}])
    with pytest.raises(ValueError, match="'extra' is missing"):
        merge([a, b | {"extra": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"'matrix' has shapes \(4, 5\), \(5, 4\)"):
        merge([a, b | {"matrix": torch.zeros(5, 4)}])
    with pytest.raises(ValueError, match="'vector' has shapes"):
        merge([a, b], "ties", base=base | {"vector": torch.zeros(1)})


# peft as an oracle, on task vectors. It elects signs without weights, does not normalise weights, rounds the number of
# entries to keep down, and gives an exact tie of signs to the positive side.

peft = pytest.importorskip("peft.utils.merge_utils")


def task_vectors(count, seed, size=(6, 10)):
    "Random task vectors as state dicts, and a base of zeros."
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.zeros(size)}, [{"w": torch.randn(size, generator=g)} for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.sampled_from([0.05, 0.1, 0.35, 0.5, 0.9]))
def test_ties_with_equal_weights_is_that_of_peft(seed, count, density):
    base, models = task_vectors(count, seed)
    expected = peft.ties([m["w"] for m in models], torch.ones(count), density)
    for weights in (None, [2.0] * count):
        assert torch.allclose(merge(models, "ties", weights, base, density)["w"], expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0.1, 3), min_size=2, max_size=4), st.sampled_from([0.1, 0.5]))
def test_ties_with_weights_is_that_of_peft_where_the_signs_agree(seed, weights, density):
    base, models = task_vectors(len(weights), seed)
    models = [{"w": m["w"].abs()} for m in models]  # one sign: no election, so only the normalisation differs
    trimmed = torch.stack([peft.prune(m["w"], density, "magnitude") for m in models])
    voters = (torch.tensor(weights).view(-1, 1, 1) * (trimmed != 0)).sum(0)
    theirs = peft.ties([m["w"] for m in models], torch.tensor(weights), density) * (trimmed != 0).sum(0).clamp(min=1)
    expected = torch.where(voters > 0, theirs / voters.clamp(min=1e-9), 0)
    assert torch.allclose(merge(models, "ties", weights, base, density)["w"], expected, atol=1e-5)


def test_where_ties_differs_from_peft_on_purpose():
    base = {"w": torch.zeros(1)}

    def ours(values, weights=None):
        return merge([{"w": torch.tensor([v])} for v in values], "ties", weights, base)["w"].item()

    def theirs(values, weights):
        return peft.ties([torch.tensor([v]) for v in values], torch.tensor(weights), 1.0).item()

    assert ours([1.0, -2.0], [3.0, 1.0]) == 1.0 and theirs([1.0, -2.0], [3.0, 1.0]) == -2.0  # a weighted election
    assert ours([1.0, -1.0]) == 0.0 and theirs([1.0, -1.0], [1.0, 1.0]) == 1.0  # a tie of signs


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_dare_is_that_of_peft_in_its_values_and_in_the_mean(density):
    "The draws differ: ours come from a generator of its own."
    base, models = task_vectors(2, 0, (4, 5))
    weights, vectors = [0.7, 1.5], [m["w"] for m in models]
    generator = torch.Generator().manual_seed(0)
    ours = torch.stack([merge(models, "dare", weights, base, density, generator)["w"] for _ in range(3000)])
    torch.manual_seed(0)
    theirs = torch.stack([peft.dare_linear(vectors, torch.tensor(weights), density) for _ in range(3000)])
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=0.35) and torch.allclose(
        ours.std(0), theirs.std(0), rtol=0.12
    )
    for i, j in ((0, 0), (3, 2)):
        possible = [set(x[:, i, j].mul(1e4).round().tolist()) for x in (ours, theirs)]
        assert len(possible[0]) == 4 and max(abs(a - b) for a, b in zip(*map(sorted, possible))) <= 1


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 2.0]])
def test_task_arithmetic_is_that_of_peft(weights):
    base, models = task_vectors(2, 1)
    expected = peft.task_arithmetic([m["w"] for m in models], torch.tensor(weights))
    assert torch.allclose(merge(models, "task_arithmetic", weights, base)["w"], expected, atol=1e-6)

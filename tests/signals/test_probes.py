"Probes against a slow per-token reference."

import math

import pytest
import torch

from copd_nb.policy.toys import minis_base, image, text, tiny_policy, video
from copd_nb.policy.head import Head
from copd_nb.signals.compare import compare_states, probe_pairs
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample, sample_many

SUITE = dict(text=text(6), image=image(8, 6), video=video(8, 6))
NUMBERS = {
    "overlap",
    "overlap_mass",
    "symmetric_kl",
    "jsd",
    "kl_ab",
    "kl_ba",
    "entropy_a",
    "entropy_b",
    "overlap_sequence",
    "tokens",
}
K = 10


def nudged(policy, name, amount=0.03):
    new, g = policy.clone(name), generator("cpu", name)
    with torch.no_grad():
        for p in new.model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * amount * p.abs().mean())
    return new


@pytest.fixture(scope="module")
def policies():
    shipped = minis_base()
    return dict(a=shipped, b=nudged(shipped, "b", 0.3), c=nudged(shipped, "c", 0.3), copy=shipped.clone("copy"))


@pytest.fixture(scope="module")
def rows(policies):
    return probe_pairs(policies, [("a", "b", n) for n in SUITE], SUITE, prompts=6, max_new_tokens=8)


def slow(a, b, mask, k=K):
    "The same numbers, one token after the other in float64."
    tokens, sequences = [], []
    for row in range(len(mask)):
        mine = []
        for t in range(mask.shape[1]):
            if not mask[row, t]:
                continue
            p, q = (x[row, t].double().softmax(-1).tolist() for x in (a, b))
            top_p, top_q = (set(sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]) for x in (p, q))
            shared = top_p & top_q
            ab, ba = (sum(x * math.log(x / y) for x, y in zip(u, v) if x > 0) for u, v in ((p, q), (q, p)))
            h = [-sum(x * math.log(x) for x in u if x > 0) for u in (p, q)]
            mass = (sum(p[i] for i in shared) + sum(q[i] for i in shared)) / 2
            jsd = (
                sum(sum(x * math.log(2 * x / (x + y)) for x, y in zip(u, v) if x > 0) for u, v in ((p, q), (q, p))) / 2
            )
            mine.append(
                dict(
                    overlap=len(shared) / k,
                    overlap_mass=mass,
                    jsd=jsd,
                    symmetric_kl=ab + ba,
                    kl_ab=ab,
                    kl_ba=ba,
                    entropy_a=h[0],
                    entropy_b=h[1],
                )
            )
        tokens += mine
        sequences.append(sum(x["overlap"] for x in mine) / len(mine))
    means = {n: sum(x[n] for x in tokens) / len(tokens) for n in tokens[0]}
    return dict(means, overlap_sequence=sum(sequences) / len(sequences), tokens=len(tokens))


def close(a, b, tolerance=1e-6):
    return a.keys() == b.keys() and all(abs(a[n] - b[n]) <= tolerance * max(1, abs(b[n])) for n in b)


def numbers(row):
    return {n: row[n] for n in NUMBERS}


def compare(a, b, mask, k):
    "The comparison of states that are the logits themselves."
    head, keep = Head(torch.eye(a.shape[-1]), None, torch.tensor([], dtype=torch.long)), mask.bool()
    return compare_states(head, a[keep], head, b[keep], mask, k)


def test_comparison_equals_a_slow_loop():
    g = generator("cpu", 0)
    a, b = torch.randn(3, 5, 30, generator=g), torch.randn(3, 5, 30, generator=g)
    a[..., :3] = b[..., :3] = -1e9
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0.0]])
    for k in (1, 4, 10):
        assert close(compare(a, b, mask, k), slow(a, b, mask, k))


def test_probe_rows_equal_a_slow_reference(policies, rows):
    for row in rows:
        a, b, owner = (policies[row[x]] for x in ("a", "b", "owner"))
        prompts = owner.encode(SUITE[row["capability"]].test[:6])
        with torch.no_grad():
            out = sample(owner, prompts, 1, 8, source=generator("cpu", "probe", row["capability"]))
            expected = slow(a.completion_logits(prompts, out.ids), b.completion_logits(prompts, out.ids), out.mask)
        assert close(numbers(row), expected)


def test_both_owners_of_every_pair(rows):
    assert [(r["a"], r["b"], r["capability"], r["owner"]) for r in rows] == [
        ("a", "b", n, o) for n in SUITE for o in "ab"
    ]
    assert all(set(r) == NUMBERS | {"a", "b", "capability", "owner"} for r in rows)
    assert any(numbers(x) != numbers(y) for x, y in zip(rows[::2], rows[1::2]))
    assert all(r["overlap"] < 1 and r["symmetric_kl"] > 1e-4 for r in rows)


def test_swapping_a_and_b_swaps_the_directions_only(policies, rows):
    swapped = probe_pairs(policies, [("b", "a", n) for n in SUITE], SUITE, prompts=6, max_new_tokens=8)
    turned = {"kl_ab": "kl_ba", "kl_ba": "kl_ab", "entropy_a": "entropy_b", "entropy_b": "entropy_a"}
    found = {(r["capability"], r["owner"]): r for r in swapped}
    for r in rows:
        assert close(
            {turned.get(n, n): x for n, x in numbers(r).items()}, numbers(found[r["capability"], r["owner"]]), 1e-6
        )  # fp32: sums in another order


def test_equal_policies_do_not_differ(policies):
    for r in probe_pairs(
        policies, [("a", "copy", n) for n in SUITE] + [("a", "a", "text")], SUITE, prompts=4, max_new_tokens=8
    ):
        assert r["overlap"] == r["overlap_sequence"] == 1 and abs(r["symmetric_kl"]) < 1e-6 and abs(r["kl_ab"]) < 1e-6
        assert r["entropy_a"] == pytest.approx(r["entropy_b"], abs=1e-6)


def test_a_pair_is_measured_the_same_beside_others(policies, rows):
    many = probe_pairs(
        policies,
        (p for p in [("b", "c", "text"), ("a", "c", "text"), ("a", "b", "text"), ("a", "c", "video")]),
        SUITE,
        prompts=6,
        max_new_tokens=8,
    )
    assert many[4:6] == rows[:2] and len(many) == 8


def test_every_policy_rolls_out_and_scores_once(policies, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "copd_nb.signals.compare.sample_many",
        lambda policy, *a, **k: calls.append(policy.name) or sample_many(policy, *a, **k),
    )
    probe_pairs(
        policies, [("a", "b", "text"), ("a", "c", "text"), ("b", "c", "text")], SUITE, prompts=2, max_new_tokens=3
    )
    assert sorted(calls) == ["b", "base", "c"]


def test_the_global_stream_and_the_graph_are_left_alone(policies):
    state = torch.random.get_rng_state()
    probe_pairs(policies, [("a", "b", "image")], SUITE, prompts=2, max_new_tokens=3)
    assert torch.equal(state, torch.random.get_rng_state()) and all(
        p.grad is None for p in policies["a"].model.parameters()
    )


def test_different_vocabularies_are_refused():
    sizes = dict(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
    one, two = tiny_policy(**sizes), tiny_policy(**sizes)
    two.name = "other"
    two.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="'tiny' and 'other' have different vocabularies"):
        probe_pairs(dict(x=one, y=two), [("x", "y", "text")], SUITE, prompts=2)


def test_several_sizes_of_the_top_k_sets(policies):
    pair, sizes = [("a", "b", "text")], (10, 1, 5)
    together = probe_pairs(policies, pair, SUITE, prompts=6, max_new_tokens=8, k=sizes)
    for k in sizes:
        alone = probe_pairs(policies, pair, SUITE, prompts=6, max_new_tokens=8, k=k)
        for one, all_sizes in zip(alone, together):
            assert all_sizes["overlap" if k == 10 else f"overlap@{k}"] == one["overlap"]
            if k == 10:
                assert one.items() <= all_sizes.items()
    assert set(together[0]) - set(probe_pairs(policies, pair, SUITE, prompts=6, max_new_tokens=8)[0]) == {
        "overlap@1",
        "overlap@5",
    }
    with pytest.raises(ValueError, match="k is empty"):
        probe_pairs(policies, pair, SUITE, prompts=2, k=())

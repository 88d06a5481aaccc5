"Masks against a slow loop, decoding against an argmax chain, and draws with an address."

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.policy.toys import minis_base, image, text, tiny_policy, video
from copd_nb.policy.groups import Group
from copd_nb.policy.prompts import Prefill
from copd_nb.policy.head import BANNED_LOGIT
from copd_nb.signals.rollouts import Request, completion_mask, generator
from copd_nb.signals.sampling import _invert, sample, sample_many

MIXED = [video(8, 4).test[0], text(8).test[0], image(8, 4).test[0], text(8).test[1]]


@pytest.fixture(scope="module")
def shipped():
    return minis_base()


@pytest.fixture(scope="module")
def tiny():
    return tiny_policy(hidden=48, layers=2, vision_hidden=32, vision_depth=2)


@pytest.fixture(scope="module")
def prompts(shipped):
    return shipped.encode(MIXED)


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 4), min_size=t, max_size=t), min_size=1, max_size=5)
    ),
    st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
)
def test_mask_equals_a_slow_loop(rows, eos):
    mask, finished = completion_mask(torch.tensor(rows), eos)
    for row, m, f in zip(rows, mask.tolist(), finished.tolist()):
        expected, ended = [], False
        for token in row:
            expected.append(float(not ended))
            ended |= token in eos
        assert m == expected and f == ended


def test_addresses():
    def draw(*key):
        return tuple(torch.rand(4, generator=generator("cpu", *key)).tolist())

    keys = [
        (),
        (0,),
        (1,),
        ("0",),
        (0, "text"),
        ("text", 0),
        (0, "text", 1),
        (0, "text1"),
        (0, "tex", "t"),
        (0.0,),
        ((0, "text"),),
    ]
    assert len({draw(*k) for k in keys}) == len(keys) and draw(0, "text") == draw(0, "text")


def test_an_address_is_pinned():
    "Resumed runs must draw what the uninterrupted ones would have drawn, in another process and in a later version."
    assert generator("cpu", 0, "text", "text", 3).initial_seed() == 9103427582180561434


def test_generators_ignore_and_leave_the_global_stream():
    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), torch.rand(3, generator=generator("cpu", "a"))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one, torch.rand(3, generator=generator("cpu", "a")))


def test_same_address_same_rollouts_other_address_other_rollouts(shipped, prompts):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, two, other = (
        sample(shipped, prompts, 4, 8, source=generator("cpu", *k)) for k in ((0, "a"), (0, "a"), (1, "a"))
    )
    assert torch.equal(one.ids, two.ids) and one.texts == two.texts and one.texts != other.texts
    assert torch.equal(state, torch.random.get_rng_state())
    groups = [tuple(one.texts[i : i + 4]) for i in range(0, 16, 4)]
    assert any(len(set(g)) > 1 for g in groups)  # rows of a group are drawn apart


def test_greedy_equals_a_chain_of_argmaxes_of_full_rows(shipped, prompts):
    out = sample(shipped, prompts, 2, 10, greedy=True)
    for i, example in enumerate(MIXED):
        batch, chain = shipped.encode([example]), []
        while len(chain) < 10 and not (chain and chain[-1] in shipped.eos):
            ids = torch.tensor([chain + [8]])  # the last token is not looked at: its logits are those behind the chain
            chain.append(int(shipped.completion_logits(batch, ids)[0, -1].argmax()))
        for row in (2 * i, 2 * i + 1):
            assert out.ids[row][out.mask[row].bool()].tolist() == chain
            assert out.finished[row] == (chain[-1] in shipped.eos) and out.lengths[row] == len(chain)


def test_rows_of_a_prompt_are_neighbours(shipped, prompts):
    out = sample(shipped, prompts, 3, 12, source=generator("cpu", 0))
    assert [e.id for e in out.examples] == [e.id for e in MIXED for _ in range(3)] and len(out.texts) == len(
        out.ids
    ) == len(out.mask) == 12
    greedy = sample(shipped, prompts, 3, 12, greedy=True)
    assert [greedy.texts[i] for i in range(0, 12, 3)] == [t for t, _ in itertools.groupby(greedy.texts)]
    assert all(
        sum(t.endswith(e.answer) for t, e in zip(greedy.texts[i : i + 3], greedy.examples[i : i + 3])) in (0, 3)
        for i in range(0, 12, 3)
    )


def test_texts_are_the_masked_ids_without_the_end_token(shipped, prompts):
    out = sample(shipped, prompts, 4, 12, source=generator("cpu", 1))
    assert out.finished.any()
    for ids, mask, finished, decoded in zip(out.ids, out.mask.bool(), out.finished, out.texts):
        kept = ids[mask].tolist()
        assert (kept[-1] in shipped.eos) == bool(finished) and not set(kept[:-1]) & set(shipped.eos)
        assert decoded == shipped.tokenizer.decode(kept[:-1] if finished else kept)


class Scripted:
    "A policy whose next-token distribution depends on the last token only."

    def __init__(self, tiny, table, eos):
        self.tiny, self.table, self.eos, self.end = tiny, table, eos, eos[0]
        self.tokenizer, self.calls, self.fed = tiny.tokenizer, 0, 0

    device, group, graphs = torch.device("cpu"), Group(), False

    def prefill(self, prompts):
        return Prefill(self.tiny.prefill(prompts).keys, self.table[-1].expand(len(prompts), -1))

    def head(self, temperature):
        return lambda state: state / temperature

    def decoder(self, keys, owner, position, length):
        return self

    def keep(self, alive):
        pass

    def next(self, tokens):
        self.calls += 1
        self.fed += len(tokens)
        return self.table[tokens]


def certain(tiny, chain, eos):
    "A table that makes `chain` certain: chain[0] first, then each token's successor."
    table = torch.full((tiny.width + 1, tiny.width), BANNED_LOGIT)
    for last, token in zip([tiny.width, *chain], chain):
        table[last, token] = 0
    return Scripted(tiny, table, eos)


@torch.no_grad()
def test_end_tokens_stop_a_row_and_all_rows_stop_the_loop(tiny):
    prompts = tiny.encode(MIXED[1:2])
    policy = certain(tiny, [20, 21, 2, 22], [2])
    out = sample(policy, prompts, 2, 9)
    assert out.ids.tolist() == [[20, 21, 2]] * 2 and out.finished.all() and out.mask.sum() == 6 and policy.calls == 2
    second = sample(certain(tiny, [20, 21, 30, 22], [2, 30]), prompts, 2, 9)
    assert second.ids.tolist() == [[20, 21, 30]] * 2 and second.finished.all()


@torch.no_grad()
def test_length_limits(tiny):
    prompts, chain = tiny.encode(MIXED[1:2]), [20, 21, 22, 23, 2]
    for limit in range(1, 7):
        policy = certain(tiny, chain, [2])
        out = sample(policy, prompts, 3, limit)
        assert out.ids.tolist() == [chain[:limit]] * 3 and out.finished.tolist() == [limit >= 5] * 3
        assert (
            out.mask.sum() == 3 * min(limit, 5) and policy.calls == min(limit, 5) - 1
        )  # no pass for a token that is not drawn


@torch.no_grad()
def test_rows_that_end_at_different_times(tiny):
    table = torch.full((tiny.width + 1, tiny.width), BANNED_LOGIT)
    table[:, [20, 2]] = 0  # a fair coin between going on and ending
    out = sample(Scripted(tiny, table, [2]), tiny.encode(MIXED[1:2]), 64, 6, source=generator("cpu", 0))
    lengths = out.lengths.long().tolist()
    assert set(lengths) >= {1, 2, 3} and max(lengths) == out.ids.shape[1]
    for row, n, finished in zip(out.ids.tolist(), lengths, out.finished.tolist()):
        assert row[:n] == [20] * (n - finished) + [2] * finished


@torch.no_grad()
def test_rows_that_have_ended_are_not_fed(tiny):
    table = torch.full((tiny.width + 1, tiny.width), BANNED_LOGIT)
    table[:, [20, 2]] = 0
    one, all_rows = Scripted(tiny, table, [2]), Scripted(tiny, table, [2])
    out = sample(one, tiny.encode(MIXED[1:2]), 64, 6, source=generator("cpu", 0))
    kept = sample(all_rows, tiny.encode(MIXED[1:2]), 64, 6, source=generator("cpu", 0), drop_finished=False)
    assert (
        torch.equal(out.ids * out.mask, kept.ids * kept.mask)
        and out.texts == kept.texts
        and torch.equal(out.logp, kept.logp)
    )
    assert one.fed == out.decoded == (out.lengths - 1).sum() and all_rows.fed == kept.decoded == 64 * (
        out.ids.shape[1] - 1
    )


@torch.no_grad()
def test_temperature_sharpens_the_draws(tiny):
    table = torch.full((tiny.width + 1, tiny.width), BANNED_LOGIT)
    table[:, 20], table[:, 21] = 1.0, 0.0
    prompts = tiny.encode(MIXED[1:2])
    for t in (0.5, 1, 2):
        out = sample(Scripted(tiny, table, [2]), prompts, 4000, 1, t, source=generator("cpu", 0))
        assert (out.ids == 20).float().mean().item() == pytest.approx(torch.tensor(1 / t).sigmoid().item(), abs=0.03)


def test_draws_follow_the_policy(tiny):
    prompts = tiny.encode(MIXED[1:2])
    with torch.no_grad():
        p = tiny.head()(tiny.prefill(prompts).hidden).softmax(-1)[0]
    with torch.no_grad():
        ids = sample(tiny, prompts, 8000, 1, source=generator("cpu", 0)).ids[:, 0]
    assert (ids.bincount(minlength=len(p)) / 8000 - p).abs().max() < 0.012


def test_several_requests_give_what_each_gives_alone(shipped):
    def request(examples, group, key, greedy=0):
        return Request(shipped.encode(examples), group, generator("cpu", key), greedy)

    def every():
        return [request(MIXED[:1], 3, "video"), request(MIXED[1:], 2, "rest", 1), request(MIXED[1:2] * 4, 1, "more")]

    with torch.no_grad():
        together, alone = sample_many(shipped, every(), 9), [sample_many(shipped, [r], 9)[0] for r in every()]
    for a, b in zip(together, alone):
        assert (
            a.texts == b.texts and torch.equal(a.ids, b.ids) and torch.equal(a.mask, b.mask) and a.decoded == b.decoded
        )
        assert torch.allclose(a.logp, b.logp, atol=1e-5) and torch.allclose(a.entropy, b.entropy, atol=1e-5)


def test_greedy_rows_come_first_in_every_group(shipped, prompts):
    with torch.no_grad():
        (out,) = sample_many(shipped, [Request(prompts, 3, generator("cpu", 0), greedy=1)], 10)
        greedy, drawn = (
            sample(shipped, prompts, 1, 10, greedy=True),
            sample(shipped, prompts, 2, 10, source=generator("cpu", 0)),
        )
    assert out.texts[::3] == greedy.texts and [t for i, t in enumerate(out.texts) if i % 3] == drawn.texts


def test_noted_numbers_equal_scoring(shipped, prompts):
    with torch.no_grad():
        out = sample(shipped, prompts, 4, 10, source=generator("cpu", 2))
        log_probs = shipped.completion_logits(prompts, out.ids).log_softmax(-1)
    assert torch.allclose(out.logp, log_probs.gather(-1, out.ids[..., None])[..., 0] * out.mask, atol=1e-4)
    assert torch.allclose(out.entropy, -(log_probs.exp() * log_probs).sum(-1) * out.mask, atol=1e-4)


def test_forced_lengths(shipped, prompts):
    lengths = torch.tensor([1, 9, 4, 4, 2, 7, 9, 3])
    with torch.no_grad():
        out = sample(shipped, prompts, 2, 9, source=generator("cpu", 0), lengths=lengths)
    assert torch.equal(out.lengths.long(), lengths) and out.finished.all()


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True, width=32))
def test_inverting_never_gives_an_id_without_probability(width, seed, u):
    g = generator("cpu", seed)
    logits = torch.randn(1, width, generator=g) * 5
    banned = torch.rand(width, generator=g) < 0.5
    banned[int(torch.randint(width, (), generator=g))] = False
    logits[:, banned] = BANNED_LOGIT
    for number in (u, 0.0, 1 - 2**-24):
        chosen = int(_invert(logits, torch.tensor([number])))
        assert logits[0, chosen] > BANNED_LOGIT
    cumulative = logits.double().softmax(-1).cumsum(-1)[0]
    chosen = int(_invert(logits, torch.tensor([u])))
    assert (cumulative[chosen - 1] if chosen else 0) <= u + 1e-5 and u <= cumulative[chosen] + 1e-5


def test_the_kept_prefill_carries_a_graph_only_with_gradients_on(tiny):
    prompts = tiny.encode(MIXED)
    out = sample(tiny, prompts, 2, 3, source=generator("cpu", 0))
    assert out.start.hidden.requires_grad and not out.ids.requires_grad
    scored = tiny.completion_logits(prompts, out.ids, start=out.start)
    assert torch.equal(scored, tiny.completion_logits(prompts, out.ids)) and scored.requires_grad
    with torch.no_grad():
        assert not sample(tiny, prompts, 2, 3, source=generator("cpu", 0)).start.hidden.requires_grad


@pytest.mark.parametrize(
    "bad", [dict(group_size=0), dict(max_new_tokens=0), dict(temperature=0.0), dict(temperature=-1.0)]
)
def test_senseless_settings_are_refused(tiny, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}(=.*must be positive| is .*must be > 0)"):
        sample(tiny, tiny.encode(MIXED[1:2]), **bad)


def test_html_is_escaped(tiny):
    policy = certain(tiny, tiny.tokenizer("<b>").input_ids + [2], [2])
    with torch.no_grad():
        html = sample(policy, tiny.encode(MIXED[1:2]), 1, 8)._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html and "unfinished" not in html


def test_logits_that_are_not_finite_give_ids_of_the_vocabulary_and_a_number_that_shows_it(tiny):
    broken = tiny.clone("broken")
    with torch.no_grad():
        next(p for n, p in broken.model.named_parameters() if n.endswith("language_model.norm.weight")).fill_(
            float("nan")
        )
    out = sample(broken, broken.encode(MIXED), 2, 3, source=generator("cpu", 0))
    assert (out.ids < broken.width).all() and out.logp[:, 0].isnan().all()


def test_policies_in_double_precision(tiny):
    wide = tiny.clone("wide")
    wide.model.double()
    one, other = (sample(p, p.encode(MIXED), 2, 3, source=generator("cpu", 0)) for p in (tiny, wide))
    assert (
        other.logp.dtype == torch.float32
        and torch.allclose(one.logp, other.logp, atol=1e-4)
        and torch.equal(one.ids, other.ids)
    )

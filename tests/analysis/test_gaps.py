"Gaps against slow references; what is undefined says so; what can't be compared is refused."
import copy
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from copd_nb.analysis import gradients as gradients_module
from copd_nb.analysis import same_tokens as same_tokens_module
from copd_nb.analysis import token_gap as token_gap_module
from copd_nb.analysis import transfer as transfer_module
from copd_nb.engine import update as update_module
from copd_nb.schedule.parts import RL
from copd_nb.schedule.paradigms import expert, mixed_rlvr, mopd, static_opd
from copd_nb.data.capability import Capability
from copd_nb.schedule.copd_schedules import copd
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.analysis.absorption_ratio import absorption, absorption_links, absorption_table, link_scores
from copd_nb.analysis.capability_gap import (
    capability_gap, change_elsewhere, headroom_recovery, oracle, retained_share, seesaw, unified_form)
from copd_nb.analysis.gradients import gradient_conflict, layer_of, random_projection
from copd_nb.analysis.stores import distinct_names, load_policies, store_scores
from copd_nb.analysis.same_tokens import same_format
from copd_nb.analysis.token_gap import behavior_gap, gap_metrics, summarize_gap
from copd_nb.analysis.transfer import transfer_matrix
from copd_nb.analysis.weights import interpolation_path, task_vectors
from copd_nb.engine.evaluation import evaluate
from copd_nb.study.jobs import Job, do
from copd_nb.schedule.merging import merge
from copd_nb.policy.toys import minis_base, image, text, tiny_policy, video
from copd_nb.policy.head import Head
from copd_nb.report.command import main, parser
from copd_nb.analysis.results import score_arrays
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample

SUITE = dict(text=text(8), image=image(64, 8), video=video(64, 8))
MIXED = [e for c in SUITE.values() for e in c.test[:3]]
SMALL = dict(hidden=48, layers=2, vision_hidden=32, vision_depth=1)
TINY = Config(prompts=8, group_size=6, max_new_tokens=10, device="cpu", learning_rate=1e-5)


def nudged(policy, name, amount=.3):
    new, g = policy.clone(name), generator("cpu", name)
    with torch.no_grad():
        for p in new.model.parameters(): p.add_(torch.randn(p.shape, generator=g) * amount * p.abs().mean())
    return new


@pytest.fixture(scope="module")
def a(): return minis_base()


@pytest.fixture(scope="module")
def b(a): return nudged(a, "b")


@pytest.fixture(scope="module")
def tokens(a, b): return behavior_gap(a, b, MIXED, (1, 4, 10), max_new_tokens=8, samples=2, batch=4)


# ---- the behavioural gap

def slow(p, q, token, ks):
    "All numbers of one token from two lists of log-probabilities, in Python's floats."
    def kl(u, v): return sum(math.exp(x) * (x - y) for x, y in zip(u, v))
    def h(u): return -sum(math.exp(x) * x for x in u)
    mix = [math.log((math.exp(x) + math.exp(y)) / 2) if x > -700 else -1e9 for x, y in zip(p, q)]
    found = dict(kl_ab=kl(p, q), kl_ba=kl(q, p), symmetric_kl=kl(p, q) + kl(q, p), jsd=(kl(p, mix) + kl(q, mix)) / 2,
                 entropy_a=h(p), entropy_b=h(q), entropy_gap=h(q) - h(p),
                 logp_a=p[token], logp_b=q[token], delta=q[token] - p[token])
    for k in ks:
        top_p, top_q = (set(sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]) for x in (p, q))
        shared, mass = top_p & top_q, sum(math.exp(p[i]) for i in top_p & top_q)
        found |= {f"overlap@{k}": len(shared) / k, f"overlap_mass_a@{k}": mass,
                  f"overlap_mass_b@{k}": sum(math.exp(q[i]) for i in shared),
                  f"overlap_advantage@{k}": sum(math.exp(p[i]) * (q[i] - p[i]) for i in shared) / mass if shared
                  else math.nan}
    return found


def plain_logits(policy, example, ids):
    "(T, V) logits in front of some ids by transformers' own forward pass, one row, no cache, no packing."
    prompts = policy.encode([example])
    whole = torch.cat([prompts.ids, torch.tensor([ids])], 1)
    more = prompts.next_position + torch.arange(len(ids))
    positions = torch.cat([prompts.positions, more.expand(*prompts.positions.shape[:-1], -1)], -1)
    with torch.no_grad():
        logits = policy.model(input_ids=whole, position_ids=positions, attention_mask=torch.ones_like(whole),
                              **prompts.vision).logits
    logits = logits[0, prompts.ids.shape[1] - 1:-1].double()
    return logits.index_fill(-1, policy.banned, -1e9)


def test_every_number_of_every_token_equals_a_slow_reference(a, b):
    "Models in fp64 and plain forward passes; text, image and video; 1e-6."
    a, b = (p.clone(p.name) for p in (a, b))
    for p in (a, b):
        p.model.double()
        p.packs = False  # packed attention adds up in fp32
    examples = [c.test[0] for c in SUITE.values()]
    tokens = behavior_gap(a, b, examples, (1, 4, 10), max_new_tokens=6)
    for (owner, example), rows in tokens.groupby(["owner", "example"]):
        ids = rows.token.tolist()
        one = next(e for e in examples if e.id == example)
        for t, (p, q) in enumerate(zip(*(plain_logits(x, one, ids).log_softmax(-1).tolist() for x in (a, b)))):
            expected, found = slow(p, q, ids[t], (1, 4, 10)), rows.iloc[t]
            assert set(expected) == set(gap_metrics(tokens))
            for name, value in expected.items():
                assert (math.isnan(value) and math.isnan(found[name])) or abs(found[name] - value) < 1e-6, (owner, name,
                                                                                                            t)


@pytest.mark.parametrize("double", [False, True])
def test_fp32_models_against_the_slow_reference_on_the_same_states(a, b, double):
    "Compared in fp64, tokens agree to 1e-6; in fp32 means do, and tokens to 1e-5."
    found = behavior_gap(a, b, MIXED[:3], (1, 4, 10), owners="a", max_new_tokens=8, double=double, batch=1)
    expected = []
    for e in MIXED[:3]:
        ids = torch.tensor([found[found.example == e.id].token.tolist()])
        with torch.no_grad():
            def log_probs(x, e=e, ids=ids):
                logits = x.completion_hidden(x.encode([e]), ids).double() @ x.head().weight.double().T
                return logits.index_fill(-1, x.banned, -1e9).log_softmax(-1).tolist()
            p, q = log_probs(a), log_probs(b)
        expected += [slow(*pq, token, (1, 4, 10)) for *pq, token in zip(p, q, ids[0].tolist())]
    expected = pd.DataFrame(expected)
    for name in gap_metrics(found):
        assert np.allclose(found[name], expected[name], rtol=1e-6 if double else 1e-5, atol=1e-6 if double else 1e-5,
                           equal_nan=True), name
        assert found[name].mean() == pytest.approx(expected[name].mean(), rel=1e-6, abs=1e-6), name


def test_rows_say_where_they_stand(a, tokens):
    assert list(tokens.columns[:9]) == list(token_gap_module.KEYS)
    assert set(tokens.owner) == {"a", "b"} and set(tokens["row"]) == {0, 1}
    assert [tuple(x) for x in tokens[["a", "b"]].drop_duplicates().to_numpy()] == [("base", "b")]
    for (_, example, row), part in tokens.groupby(["owner", "example", "row"]):
        assert part.position.tolist() == list(range(len(part))) and part.capability.nunique() == 1
        assert "".join(part.text) == a.tokenizer.decode(part.token.tolist())
        assert part.token.iloc[-1] in a.eos or len(part) == 8
    assert set(tokens.example) == {e.id for e in MIXED}


def test_trajectories_are_those_of_their_owner(a, b, tokens):
    "A sampled token's log-probability under its owner is what sampling saw; draws are addressed by the example."
    out = sample(a, a.encode(MIXED[:1]), 2, 8, source=generator("cpu", 0, "gap", MIXED[0].id))
    mine = tokens[(tokens.owner == "a") & (tokens.example == MIXED[0].id)]
    assert mine.token.tolist() == out.ids[out.mask.bool()].tolist()
    assert np.allclose(mine.logp_a, out.logp[out.mask.bool()], atol=1e-5)
    assert not tokens[tokens.owner == "a"].token.tolist() == tokens[tokens.owner == "b"].token.tolist()


def test_batches_order_and_owners_change_nothing(a, b, tokens):
    again = behavior_gap(a, b, MIXED[::-1], (1, 4, 10), max_new_tokens=8, samples=2, batch=100)
    keys = ["owner", "example", "row", "position"]
    for x in (again, behavior_gap(a, b, MIXED, (1, 4, 10), owners="b", max_new_tokens=8, samples=2, batch=1)):
        both = tokens.merge(x, on=keys)
        assert len(both) == len(x) and (both.token_x == both.token_y).all()
        for m in gap_metrics(tokens): assert np.allclose(both[f"{m}_x"], both[f"{m}_y"], atol=2e-5, equal_nan=True)
    assert not behavior_gap(a, b, MIXED, seed=1,
                            max_new_tokens=8).token.tolist() == tokens[tokens["row"] == 0].token.tolist()


def test_swapping_the_policies_swaps_the_sides(a, b, tokens):
    swapped = behavior_gap(b, a, MIXED, (1, 4, 10), max_new_tokens=8,
                           samples=2).assign(owner=lambda t: t.owner.map(dict(a="b", b="a")))
    both = tokens.merge(swapped, on=["owner", "example", "row", "position"])
    assert len(both) == len(tokens)
    for x, y, sign in [("kl_ab", "kl_ba", 1), ("logp_a", "logp_b", 1), ("delta", "delta", -1),
                       ("entropy_gap", "entropy_gap", -1), ("overlap_mass_a@4", "overlap_mass_b@4", 1)]:
        assert np.allclose(both[f"{x}_x"], sign * both[f"{y}_y"], atol=2e-5)


def test_a_policy_and_its_copy_do_not_differ(a):
    same = behavior_gap(a, a.clone("copy"), MIXED, max_new_tokens=8)
    assert (same.overlap == 1).all()
    assert same[["symmetric_kl", "kl_ab", "jsd", "delta", "overlap_advantage", "entropy_gap"]].abs().max().max() < 1e-5
    mine, other = (same[same.owner == o].token.tolist() for o in "ab")
    assert mine == other


def test_one_k_has_plain_names_and_temperature_counts(a, b):
    warm = behavior_gap(a, b, MIXED[:2], 5, max_new_tokens=4, temperature=2.0, completions=["1:2", "3"])
    cold = behavior_gap(a, b, MIXED[:2], 5, max_new_tokens=4, completions=["1:2", "3"])
    assert {"overlap", "overlap_mass_a", "overlap_mass_b", "overlap_advantage"} <= set(warm)
    assert (warm.entropy_a > cold.entropy_a).all()


def test_given_completions(a, b):
    found = behavior_gap(a, b, MIXED[:3], completions=["7,15:85", "", [a.tokenizer.convert_tokens_to_ids("4")]])
    assert set(found.owner) == {"given"} and found.groupby("example", sort=False).size().tolist() == [8, 1, 1]
    assert "".join(found.text[:7]) == "7,15:85" and found.token[8] == a.eos[0] and found.text[9] == "4"


BAD = [(dict(completions=["1", [], "2"]), f"example {MIXED[1].id} is empty"),
       (dict(completions=["1"]), "1 completions for 3 examples"),
       (dict(completions=["1", [10 ** 6], "2"]), "holds id 1000000"),
       (dict(completions=["1", "<|image_pad|>", "2"]), "'<|image_pad|>'.*no policy here may write"),
       (dict(owners="teacher"), "owners='teacher'"), (dict(level="word"), "level='word'"),
       (dict(temperature=0), "temperature=0"), (dict(samples=0), "samples=0"),
       (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(k=0), "k is 0"), (dict(k=10 ** 6), "k is 1000000"),
       (dict(k=()), "k is empty"),
       (dict(max_new_tokens=10 ** 6), "more than the context of 'base'")]


@pytest.mark.parametrize("options, message", BAD, ids=[m for _, m in BAD])
def test_requests_that_make_no_sense(a, b, options, message):
    with pytest.raises(ValueError, match=re.escape(message) if ".*" not in message else message):
        behavior_gap(a, b, MIXED[:3], **options)


def test_no_examples_and_twice_the_same(a, b):
    with pytest.raises(ValueError, match="no examples"): behavior_gap(a, b, [])
    with pytest.raises(ValueError, match=f"{MIXED[0].id} is given twice"):
        behavior_gap(a, b, [MIXED[0], MIXED[1], MIXED[0]])


def test_other_vocabularies_are_refused_by_the_names_of_tokens():
    one, two = tiny_policy(**SMALL), tiny_policy(**SMALL)
    two.name = "other"
    two.tokenizer.add_tokens(["newtoken"])
    with pytest.raises(ValueError, match="'tiny' and 'other' have different vocabularies, 1 tokens differ: 'newtoken'"):
        behavior_gap(one, two, MIXED[:1])


@pytest.mark.parametrize("owners, wrong", [("a", "b"), ("b", "b"), ("a", "a"), ("both", "a")])
def test_logits_that_are_not_finite_name_the_policy_and_the_example(a, b, owners, wrong):
    pair = {n: p.clone(n) for n, p in dict(a=a, b=b).items()}
    with torch.no_grad():
        next(p for n, p in pair[wrong].model.named_parameters()
             if n.endswith("language_model.norm.weight")).fill_(math.nan)
    with pytest.raises(ValueError,
                       match=f"logits of '{wrong}' are not finite: example {MIXED[0].id}, completion 0, position 0"):
        behavior_gap(pair["a"], pair["b"], MIXED[:2], owners=owners, max_new_tokens=4)


def test_one_token_that_is_not_finite_is_found(a, b, monkeypatch):
    "NaN in the middle of a completion: the position is named."
    real = same_tokens_module._states
    def broken(policy, owner, out):
        hidden = real(policy, owner, out)
        return hidden.index_fill(0, torch.tensor([2]), math.nan) if policy.name == "b" else hidden
    monkeypatch.setattr(same_tokens_module, "_states", broken)
    with pytest.raises(ValueError, match="logits of 'b' are not finite: .* completion 0, position 2"):
        behavior_gap(a, b, MIXED[:1], owners="a", completions=["12345"])


def test_no_shared_token_has_no_advantage_and_everything_else(a, b):
    class Turned(type(a)):
        def head(self, temperature=1.0): return replace(super().head(temperature), scale=-1.0)
    inverse = copy.copy(a)
    inverse.__class__, inverse.name = Turned, "inverse"
    found = behavior_gap(a, inverse, MIXED[:3], (1, 10), completions=["1:2", "2:3", "5"])
    assert (found["overlap@1"] == 0).all() and found["overlap_advantage@1"].isna().all()
    assert found.drop(columns=["overlap_advantage@1", "overlap_advantage@10"]).notna().all().all()
    row = summarize_gap(found, "all").set_index("metric").loc["overlap_advantage@1"]
    assert row.tokens == 0 and math.isnan(row.value)
    rest = summarize_gap(found, "all").query("metric != 'overlap_advantage@1' and metric != 'overlap_advantage@10'")
    assert rest.notna().all().all()


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.5), (torch.float64, 1e-4)])
def test_policies_of_different_types(a, b, tokens, dtype, atol):
    other = b.clone("b")
    other.model.to(dtype)
    texts = ["7,15:85"] * 3
    pairs = (a, b), (a, other), (other, a)
    plain, mixed, swapped = (behavior_gap(*pair, MIXED[:3], completions=texts) for pair in pairs)
    assert np.isfinite(mixed[gap_metrics(mixed)].to_numpy()).all()
    assert np.allclose(mixed.logp_b, plain.logp_b, atol=atol)
    assert np.allclose(mixed.logp_a, plain.logp_a, atol=1e-5)
    assert np.allclose(swapped.kl_ab, mixed.kl_ba, atol=1e-4)
    sampled = behavior_gap(other, a, MIXED[:3], max_new_tokens=4)
    assert np.isfinite(sampled[gap_metrics(sampled)].to_numpy()).all()


def test_banned_ids_are_those_of_both(a, b):
    "An id that one policy may write and the other may not has no part in the comparison, and is never sampled."
    free = b.clone("free")
    extra = a.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    free.banned = torch.tensor([i for i in free.banned.tolist() if i != extra])
    strict, loose = (behavior_gap(a, p, MIXED[:4], max_new_tokens=6) for p in (b, free))
    assert np.allclose(strict.symmetric_kl, loose.symmetric_kl)
    assert extra not in loose.token.tolist() and (loose.symmetric_kl < 1e3).all()
    assert extra not in free.banned.tolist()


def test_another_chat_format_is_scored_on_the_owners_ids(a, b):
    other = b.clone("other")
    other.processor, other.tokenizer = copy.deepcopy(b.processor), copy.deepcopy(b.tokenizer)
    other.processor.tokenizer = other.tokenizer
    other.processor.chat_template = other.tokenizer.chat_template = b.tokenizer.chat_template.replace("assistant",
                                                                                                      "user")
    other._encoded = type(b._encoded)()
    texts = ["1:2"] * 3
    assert same_format(a, b, MIXED) and not same_format(a, other, MIXED)
    found = behavior_gap(a, other, MIXED[::3], completions=texts)
    with torch.no_grad():
        expected = b.completion_logits(a.encode(MIXED[:1]), torch.tensor([found.token[:4].tolist()]))[0].log_softmax(-1)
    assert np.allclose(found.logp_b[:4], expected.gather(-1, torch.tensor(found.token[:4])[:, None])[:, 0], atol=1e-5)
    assert len(behavior_gap(a, other, MIXED[::3], max_new_tokens=3)) > 3


def test_the_global_stream_and_the_policies_are_left_alone(a, b):
    state, banned = torch.random.get_rng_state(), a.banned.clone()
    behavior_gap(a, b, MIXED[:2], max_new_tokens=3)
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(banned, a.banned)
    assert all(p.grad is None for p in a.model.parameters())


def test_the_vocabulary_is_never_there_for_all_tokens(a, b, monkeypatch):
    seen = []
    monkeypatch.setattr(Head, "finish", (lambda real: lambda self,
                                         raw: seen.append(raw.numel()) or real(self, raw))(Head.finish))
    behavior_gap(a, b, MIXED[:3], completions=["1234567"] * 3, chunk=5 * a.width)
    assert max(seen) == 5 * a.width and len(seen) >= 2 * 5


# ---- aggregation

def test_means_of_every_level_by_hand(tokens):
    for (owner, capability), part in tokens.groupby(["owner", "capability"]):
        rows = summarize_gap(tokens,
                             "capability").query("owner == @owner and capability == @capability").set_index("metric")
        for m in ("overlap@4", "symmetric_kl", "delta", "overlap_advantage@1"):
            values = part[["example", "row", m]].dropna()
            assert rows.value[m] == pytest.approx(values[m].mean()) and rows.tokens[m] == len(values)
            assert rows.sequence_value[m] == pytest.approx(values.groupby(["example", "row"])[m].mean().mean())
            assert rows.low[m] <= rows.value[m] <= rows.high[m]
            assert rows.sequence_low[m] <= rows.sequence_value[m] <= rows.sequence_high[m]
        assert (rows.completions == 6).all() and (rows.examples == 3).all()
    whole = summarize_gap(tokens, "all").query("owner == 'b'").set_index("metric")
    assert whole.value["jsd"] == pytest.approx(tokens[tokens.owner == "b"].jsd.mean()) and (whole.examples == 9).all()
    one = summarize_gap(tokens, "example").query("owner == 'a' and metric == 'kl_ab'").set_index("example")
    mine = tokens[(tokens.owner == "a") & (tokens.example == MIXED[2].id)]
    assert len(one) == 9 and one.value[MIXED[2].id] == pytest.approx(mine.kl_ab.mean())
    assert one.tokens[MIXED[2].id] == len(mine)
    assert one.sequence_value[MIXED[2].id] == pytest.approx(mine.groupby("row").kl_ab.mean().mean())


def test_positions_fall_into_buckets_that_double(tokens):
    rows = summarize_gap(tokens, "position").query("metric == 'symmetric_kl' and owner == 'a' and capability == 'text'")
    assert rows[["position", "last"]].to_numpy().tolist() == [[0, 0], [1, 1], [2, 3], [4, 7]]
    part = tokens[(tokens.owner == "a") & (tokens.capability == "text") & tokens.position.between(2, 3)]
    assert rows.value.iloc[2] == pytest.approx(part.symmetric_kl.mean())
    assert rows.tokens.sum() == ((tokens.owner == "a") & (tokens.capability == "text")).sum()


def test_levels_through_behavior_gap_and_what_they_refuse(a, b, tokens):
    table = behavior_gap(a, b, MIXED, (1, 4, 10), max_new_tokens=8, samples=2, level="capability")
    pd.testing.assert_frame_equal(table, summarize_gap(tokens), check_exact=False, atol=1e-4)
    with pytest.raises(ValueError, match="level='word'"): summarize_gap(tokens, "word")
    with pytest.raises(ValueError, match="no tokens"): summarize_gap(tokens.iloc[:0])
    alone = summarize_gap(tokens[tokens.example == MIXED[0].id])
    assert alone.value.drop(alone.index[alone.tokens == 0]).notna().all() and alone.low.isna().all()
    assert (alone.examples == 1).all()


def test_intervals_stay_where_the_number_can_be(tokens):
    rows = summarize_gap(tokens[tokens.capability == "image"])
    share = rows[rows.metric.str.match(r"overlap(_mass_[ab])?@")]
    assert share[["low", "high"]].stack().between(0, 1).all()
    assert (rows[rows.metric.isin(["symmetric_kl", "jsd", "entropy_a"])].low >= 0).all()
    assert (rows[rows.metric == "logp_a"].high <= 0).all()


# ---- checkpoints by name

def test_names_of_checkpoints():
    assert distinct_names(["a/x", "a/y"]) == dict(x="a/x", y="a/y")
    assert distinct_names(["r/a/result", "r/b/result"]) == {"a/result": "r/a/result", "b/result": "r/b/result"}
    for twice in (["a", "a"], ["a/b", "a/b/"]):
        with pytest.raises(ValueError, match="must differ"): distinct_names(twice)


def test_checkpoints_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="at least two checkpoints"): load_policies(["one"])
    with pytest.raises(ValueError, match="dtype='int8'"): load_policies(["one", "two"], "int8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="checkpoint '.*empty' can't be loaded: the folder has no config.json$"):
        load_policies([str(tmp_path / "empty"), str(tmp_path / "none")])
    tiny_policy().save(tmp_path / "empty" / "checkpoint-1")
    with pytest.raises(ValueError, match="no config.json; '.*checkpoint-1' has one"):
        load_policies([str(tmp_path / "empty"), str(tmp_path / "none")])


# ---- from score tables

def table(mean, key, seeds=8, examples=400):
    return (np.random.default_rng(key).random((seeds, examples)) < mean).astype(float)


@pytest.fixture(scope="module")
def arrays():
    def row(t, i): return dict(text=table(t, 1), image=table(i, 2))
    return {"base": row(.4, .5), "text expert": row(.6, .44), "image expert": row(.42, .7), "copd": row(.55, .64),
            "mixed": row(.58, .68)}


def test_capability_gap_and_retained_share(arrays):
    found, kept = (f(arrays, ["copd"], ["text", "image"]).set_index("capability")
                   for f in (capability_gap, retained_share))
    for c in ("text", "image"):
        best, got = arrays[f"{c} expert"][c].mean(), arrays["copd"][c].mean()
        assert found.value[c] == pytest.approx(100 * (best - got))
        assert found.low[c] <= found.value[c] <= found.high[c] and found.low[c] > 0
        assert kept.value[c] == pytest.approx(got / best) and kept.low[c] < kept.value[c] < kept.high[c] < 1
    assert found.value["mean"] == pytest.approx(found.value[["text", "image"]].mean()) and (found.seeds == 8).all()


def test_change_elsewhere_is_paired_and_keeps_the_order(arrays):
    table = change_elsewhere(arrays, ["image expert", "text expert"], ["text", "image"])
    assert list(zip(table.paradigm, table.capability)) == [
        (f"{k} expert", c) for k in ("image", "text") for c in ("text", "image")]
    for r in table.itertuples():
        own, base = (np.asarray(arrays[label][r.capability]) for label in (r.paradigm, "base"))
        assert r.value == pytest.approx(100 * (own - base).mean()) and r.low <= r.value <= r.high
    assert change_elsewhere(arrays, ["text expert"], []).empty
    with pytest.raises(KeyError, match="was not judged on"): change_elsewhere(arrays, ["text expert"], ["video"])


def test_seesaw_has_trained_in_rows_and_measured_in_columns(arrays):
    grid = seesaw(arrays, ["text", "image"]).pivot(index="trained", columns="measured", values="value")
    change = arrays["text expert"]["image"].mean() - arrays["base"]["image"].mean()
    assert grid.loc["text", "image"] == pytest.approx(100 * change)
    assert grid.loc["text", "image"] < 0 < grid.loc["text", "text"]


def test_headroom_against_the_routed_oracle(arrays):
    assert oracle(arrays, ["text", "image"]) == dict(text="text expert", image="image expert")
    better = dict(arrays, **{"image expert": dict(text=table(.9, 1), image=arrays["image expert"]["image"])})
    assert oracle(better, ["text", "image"])["text"] == "image expert"
    found = headroom_recovery(arrays, ["copd", "text expert"], ["text", "image"]).set_index(["paradigm", "capability"])
    lead = arrays["text expert"]["text"].mean() - arrays["base"]["text"].mean()
    assert found.value["copd",
                       "text"] == pytest.approx((arrays["copd"]["text"].mean() - arrays["base"]["text"].mean()) / lead)
    assert found.value["text expert", "text"] == pytest.approx(1) and found.value["text expert", "image"] < 0
    nothing = headroom_recovery(dict(arrays, base={c: arrays[f"{c} expert"][c] for c in ("text", "image")}), ["copd"],
                                ["text", "image"])
    assert nothing.value.isna().all() and nothing.reason.str.contains("holds 0").all()


def test_unknown_labels_and_capabilities_list_the_known_ones(arrays):
    with pytest.raises(KeyError, match="no scores of 'mopd'.*'copd'"): capability_gap(arrays, ["mopd"], ["text"])
    with pytest.raises(KeyError, match="not judged on"):
        retained_share(dict(arrays, copd=dict(text=table(.5, 1))), ["copd"], ["text", "image"])


def test_absorption_of_tables_means_and_one_base_for_all_seeds():
    before, after, teacher = (table(m, 5) for m in (.3, .45, .6))
    eta = absorption(before, after, teacher)
    assert eta.value == pytest.approx((after.mean() - before.mean()) / (teacher.mean() - before.mean()))
    assert eta.low < eta.value < eta.high
    shared, start = absorption(before[:1], after, teacher), before[:1].mean()
    assert shared.value == pytest.approx((after.mean() - start) / (teacher.mean() - start))
    seeds = absorption(before.mean(1), after.mean(1), teacher.mean(1))
    assert seeds.value == pytest.approx(eta.value) and seeds.examples == 0
    assert absorption([.3], [.4, .45, .42], [.5, .5, .6]).seeds == 3
    assert absorption([before, before], [after, after], [teacher, teacher]).value == pytest.approx(eta.value)
    for wrong in ((before[:2], after, teacher), (before, after[:, :3], teacher), (before.mean(1), after, teacher),
                  (3, 4, 5)):
        with pytest.raises(ValueError, match="same seeds and examples"): absorption(*wrong)


def test_absorption_is_undefined_without_a_lead():
    noise = np.random.default_rng(0)
    before, teacher = ((noise.random((3, 200)) < .5).astype(float) for _ in range(2))
    eta = absorption(before, table(.6, 9, 3, 200), teacher)
    assert eta.value is None and "holds 0" in eta.reason
    assert absorption(before, before, before).value is None and absorption([.4], [.5], [.6]).value is None


def test_links_of_every_paradigm():
    pair = ["text", "image"]
    assert absorption_links(static_opd("text", "image", 2, 1)) == [dict(student="student", teacher="text",
                                                                        capability="text", before="image")]
    assert [l["before"] for l in absorption_links(mopd(pair, 2, 1))] == ["base", "base"]
    both = absorption_links(copd(pair, cycles=3))
    assert both == [dict(student="text", teacher="image", capability="image", before="base"),
                    dict(student="image", teacher="text", capability="text", before="base")]
    assert absorption_links(mixed_rlvr(pair, 2)) == []


def test_unified_form_recovers_what_made_the_points():
    "Gains X of three capabilities; one paradigm keeps 70 %, another loses four points."
    rng, names = np.random.default_rng(0), ["p", "q", "r"]
    start = {c: (rng.random((4, 3000)) < .3).astype(float) for c in names}
    def risen(gains):
        return {c: np.where((rng.random(start[c].shape) < g / .7) & (start[c] == 0), 1.0, start[c]) for c,
                g in zip(names, gains)}
    x = (.1, .2, .3)
    arrays = {"base": start, "kept": risen([.7 * g for g in x]), "mixed": risen([g - .04 for g in x])}
    best = risen(x)
    arrays |= {f"{c} expert": {c: best[c]} for c in names}
    found = unified_form(arrays, ["kept", "mixed"], names).set_index("paradigm")
    assert found.eta["kept"] == pytest.approx(.7, abs=.03) and found.eta_low["kept"] < .7 < found.eta_high["kept"]
    assert found.phi["mixed"] == pytest.approx(4, abs=.7) and found.phi_low["mixed"] < 4 < found.phi_high["mixed"]
    assert found.a["kept"] == pytest.approx(.7, abs=.06)
    assert found.a["mixed"] == pytest.approx(1, abs=.06)
    assert found.b["mixed"] == pytest.approx(-4, abs=1.2)
    assert (found.points == 12).all() and (found.seeds == 4).all() and (found.a_low < found.a).all()
    assert (found.a < found.a_high).all()
    few = unified_form({l: {c: v[:1] for c, v in t.items() if c != "r"} for l, t in arrays.items() if l != "r expert"},
                       ["kept"], ["p", "q"]).iloc[0]
    assert few.a is None and "at least three" in few.line_reason and few.eta is not None


# ---- from real runs

RUN = Config(prompts=4, opd_prompts=4, group_size=4, max_new_tokens=8, probe_every=0, eval_every=0, device="cpu",
             learning_rate=1e-4, warmup=1)
SUITE_NAME = "minis"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    schedules = [expert("text", 2), expert("image", 2), mixed_rlvr(["text", "image"], 2), mopd(["text", "image"], 1, 1),
                 expert("video", 1)]
    for s in schedules: do(Job(s, RUN, SUITE_NAME, 6, 2), folder)
    return folder


def test_scores_of_a_store_become_the_unified_form(store, a):
    scores = store_scores(store, ["text", "image"], 6, 2)
    assert set(scores) == {("text expert", 0), ("image expert", 0), ("mixed", 0), ("mopd", 0)}
    suite = dict(text=text(), image=image())
    began = evaluate(a, suite, 6, 2, RUN.max_new_tokens)
    arrays = score_arrays(scores | {("base", 0): began})
    assert all(t.shape == (1, 6) for l in arrays.values() for t in l.values())
    form = unified_form(arrays, ["mopd", "mixed"], ["text", "image"])
    assert form.phi.notna().all() and (form.eta.notna() | (form.eta_reason != "")).all()
    assert form.line_reason.str.contains("at least three").all()


def test_a_store_without_such_runs_and_with_two_of_them(store, tmp_path):
    for names, prompts in ((["speech", "audio"], 6), (["text", "image"], 7)):
        with pytest.raises(ValueError, match=f"was judged on {prompts} prompts with 2 samples"):
            store_scores(store, names, prompts, 2)
    with pytest.raises(ValueError, match="no run in"): store_scores(tmp_path / "nowhere", ["text"], 6, 2)
    do(Job(mixed_rlvr(["text", "image"], 1), RUN, SUITE_NAME, 6, 2), store)
    with pytest.raises(ValueError, match=r"are both \('mixed', 0\): pass the run folders"):
        store_scores(store, ["text", "image"], 6, 2)
    named = [p.parent for p in store.glob("*/manifest.json") if not p.parent.name.startswith("mixed")]
    assert ("mixed", 0) not in store_scores(named, ["text", "image"], 6, 2)


def test_absorption_of_a_run(store, a, tmp_path):
    suite = dict(text=text(16), image=image(64, 16))
    run = train(static_opd("text", "image", 1, 1), suite, a, RUN, tmp_path / "run", progress=False)
    scores = link_scores(run, a, suite, prompts=8, samples=2, max_new_tokens=8)
    assert set(scores.role) == {"before", "after", "teacher"}
    assert (scores.capability == "text").all() and (scores.seed == 0).all() and len(scores) == 24
    before = evaluate(run.branch("image"), [suite["text"]], 8, 2, 8).sampled
    assert scores[scores.role == "before"].score.tolist() == before.tolist()
    eta = absorption_table(scores).iloc[0]
    assert (eta.student, eta.teacher, eta.capability) == ("student", "text", "text")
    assert (eta.value is None) == bool(eta.reason)
    with pytest.raises(ValueError, match="every seed needs"):
        absorption_table(pd.concat([scores, scores[:3].assign(seed=1)]))
    alone = train(expert("text", 1), suite, a, RUN, tmp_path / "alone", progress=False)
    with pytest.raises(ValueError, match="no distillation"): link_scores(alone, a, suite)


# ---- gradients

def flat(gradient, policy):
    "A gradient as one fp64 vector in the order of the parameters."
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for p,
                      g in zip(policy.model.parameters(), gradient)])


@pytest.fixture(scope="module")
def kept(a):
    "The gradients that `gradient_conflict` takes, noted on the way."
    noted, real = [], gradients_module.gradients_of
    def noting(training, name, batches):
        found = real(training, name, batches)
        noted.append((name, flat(found[0]["rl"], a), [e.id for e in batches[0].rollouts.examples]))
        return found
    patch = pytest.MonkeyPatch()
    patch.setattr(gradients_module, "gradients_of", noting)
    table = gradient_conflict(a, SUITE, TINY, batches=3)
    patch.undo()
    return noted, table


def test_conflict_equals_plain_arithmetic_on_the_gradients(kept):
    noted, table = kept
    g = {c: torch.stack([v for n, v, _ in noted if n.startswith(c)]) for c in SUITE}
    cosine = lambda x, y: float(x @ y / x.norm() / y.norm())
    rows = table[table.layer == "all"].set_index(["capability", "other"])
    for i, j in (("text", "image"), ("image", "video"), ("text", "video")):
        row, pairs = rows.loc[i, j], [(x, y) for x in g[i] for y in g[j]]
        assert row.cosine == pytest.approx(np.mean([cosine(x, y) for x, y in pairs]), abs=1e-5)
        assert row.opposite == pytest.approx(np.mean([((x * y < 0).sum() / (x * y != 0).sum()).item() for x,
                                                      y in pairs]), abs=2e-3)
        assert row.cosine_of_means == pytest.approx(cosine(g[i].mean(0), g[j].mean(0)), abs=1e-5)
        assert row.pcgrad == pytest.approx(max(0, -row.cosine_of_means))
        assert row.floor == pytest.approx((rows.cosine[i, i] + rows.cosine[j, j]) / 2)
        assert row.norm == pytest.approx(float(g[i].mean(0).norm()), rel=1e-5)
        removed = g[i].mean(0) @ g[j].mean(0) / g[j].mean(0).norm() ** 2 * g[j].mean(0)
        if row.cosine_of_means < 0:
            assert row.pcgrad == pytest.approx(float(removed.norm() / g[i].mean(0).norm()), rel=1e-4)
        both_floors = rows.cosine[i, i], rows.cosine[j, j]
        if min(both_floors) <= 0: assert math.isnan(row.corrected)
        else: assert row.corrected == pytest.approx(row.cosine / math.sqrt(np.prod(both_floors)))
    for c in SUITE:
        assert rows.cosine[c,
                           c] == pytest.approx(np.mean([cosine(g[c][x], g[c][y]) for x, y in ((0, 1), (0, 2), (1, 2))]),
                                               abs=1e-5)


def test_batches_of_a_capability_share_no_prompt(kept):
    noted, _ = kept
    for c in SUITE:
        ids = [set(i) for n, _, i in noted if n.startswith(c)]
        assert len(ids) == 3 and not ids[0] & ids[1] and not ids[1] & ids[2]


def test_layers_add_up_and_untouched_ones_have_no_row(kept):
    _, table = kept
    squares = table[table.capability == table.other].assign(square=lambda t: t.norm ** 2)
    for c, part in squares.groupby("capability"):
        assert part[part.layer != "all"].square.sum() == pytest.approx(part[part.layer == "all"].square.item(),
                                                                       rel=1e-6)
    assert not table[(table.capability == "text") & table.layer.str.startswith("visual")].shape[0]
    assert table[(table.capability == "image") & (table.other == "video")].layer.str.startswith("visual").any()
    assert (table.low <= table.cosine).all() and (table.cosine <= table.high).all()
    assert table.cosine.between(-1, 1).all()


def test_projected_gradients_tell_the_same(a, kept):
    _, exact = kept
    both = exact.merge(gradient_conflict(a, SUITE, TINY, batches=3, project=2048), on=["capability", "other", "layer"])
    assert len(both) == len(exact)
    assert (both.cosine_x - both.cosine_y).abs().max() < 4 / math.sqrt(2048)
    assert (both.opposite_x - both.opposite_y).abs().max() < .06
    assert (both.norm_x / both.norm_y - 1).abs().max() < .2 and (both.cosine_x != both.cosine_y).any()


def test_the_policy_is_not_changed_and_its_training_is_the_engines(a):
    weights = [p.detach().clone() for p in a.model.parameters()]
    gradient_conflict(a, dict(text=SUITE["text"]), TINY, batches=2)
    assert all(torch.equal(x, y) for x, y in zip(weights, a.model.parameters()))
    assert all(p.grad is None for p in a.model.parameters())


def test_two_batches_have_a_floor_without_certainty(a):
    table = gradient_conflict(a, [SUITE["text"]], TINY, batches=2)
    assert (table.low == -1).all() and (table.high == 1).all() and table.corrected.isna().all()


def test_conflicts_that_cannot_be_measured(a):
    for options, message in ((dict(batches=1), "batches=1"), (dict(project=0), "project=0")):
        with pytest.raises(ValueError, match=message): gradient_conflict(a, SUITE, TINY, **options)
    hopeless = Capability("hopeless", SUITE["text"].train[:40], SUITE["text"].test, lambda completions,
                          examples: [0.0] * len(completions))
    with pytest.raises(ValueError, match="'hopeless'.*no gradient"): gradient_conflict(a, [hopeless], TINY)


def test_random_projection_keeps_inner_products_and_is_linear():
    g = generator("cpu", "vectors")
    x, y = torch.randn(2, 3000, generator=g) + .3
    inner = np.array([float(random_projection(x, 512, s) @ random_projection(y, 512, s)) for s in range(200)])
    assert abs(inner.mean() - float(x @ y)) < 3 * inner.std() / math.sqrt(200)
    assert inner.std() < 1.3 * float(x.norm() * y.norm()) * math.sqrt(2 / 512)
    assert torch.allclose(random_projection(x + 2 * y, 64, "k", 1),
                          random_projection(x, 64, "k", 1) + 2 * random_projection(y, 64, "k", 1), atol=1e-3)
    assert torch.equal(random_projection(x, 64, 1, chunk=100), random_projection(x, 64, 1, chunk=100))
    assert not torch.equal(random_projection(x, 64, 1), random_projection(x, 64, 2))
    assert random_projection(x.bfloat16(), 8, 1).dtype == torch.float32


def test_layers_of_parameter_names():
    assert [layer_of(n) for n in ("model.language_model.layers.11.self_attn.q_proj.weight",
                                  "model.layers.0.mlp.up_proj.weight", "model.visual.blocks.2.norm1.bias",
                                  "lm_head.weight",
                                  "model.embed_tokens.weight", "weight")] == [
        "language_model.layers.11", "layers.0", "visual.blocks.2", "lm_head", "embed_tokens", "weight"]


def test_transfer_is_first_order_for_small_steps(a):
    "The drop of the loss on j after a step on i is what the gradient of j says about the way taken."
    pair = {n: SUITE[n] for n in ("text", "image")}
    config = replace(TINY, learning_rate=1e-6)
    found = transfer_matrix(a, pair, config, repeats=1, prompts=4,
                            samples=1).query("metric == 'loss_drop'").set_index(["trained", "measured"]).value
    training = gradients_module._measuring(a, pair, config)
    for i in pair:
        learner = transfer_module._stepped(training, a, i, 0, 1)
        step = torch.cat([(x - y).detach().flatten().double() for x,
                          y in zip(learner.model.parameters(), a.model.parameters())])
        for j in pair:
            [batch] = gradients_module._batches(training, a, f"judge-{j}-0", RL(j), config.prompts)
            expected = -float(flat(update_module.stream_gradient(training, a, batch)[0], a) @ step)
            assert found[i, j] == pytest.approx(expected, rel=.05, abs=6e-6)  # log-probabilities are fp32
            assert abs(expected) > 6e-5 or i == j == "text"
    assert step.abs().max() > 0


def test_transfer_table(a):
    pair = [SUITE["text"], SUITE["image"]]
    state = [p.detach().clone() for p in a.model.parameters()]
    found = transfer_matrix(a, pair, TINY, steps=2, repeats=2, prompts=4, samples=2)
    assert found.groupby("metric").size().to_dict() == dict(loss_drop=4, reward=4)
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert all(torch.equal(x, y) for x, y in zip(state, a.model.parameters()))
    pd.testing.assert_frame_equal(found, transfer_matrix(a, pair, TINY, steps=2, repeats=2, prompts=4, samples=2))
    for options in (dict(steps=0), dict(repeats=0), dict(samples=0)):
        with pytest.raises(ValueError, match="must be at least 1"): transfer_matrix(a, pair, TINY, **options)


# ---- weights

def test_task_vectors_equal_plain_arithmetic(a, b):
    c = nudged(a, "c", .1)
    table = task_vectors(dict(b=b, c=c), a).set_index(["layer", "a", "b"])
    start, one, two = (torch.cat([p.detach().flatten().double() for p in x.model.parameters()]) for x in (a, b, c))
    u, v = one - start, two - start
    row = table.loc["all", "b", "c"]
    assert row.cosine == pytest.approx(float(u @ v / u.norm() / v.norm()), abs=1e-9)
    assert row.norm_a == pytest.approx(float(u.norm()))
    assert row.relative_b == pytest.approx(float(v.norm() / start.norm()))
    layers = table.drop("all", level="layer").xs(("b", "b"), level=("a", "b"))
    assert (layers.norm_a ** 2).sum() == pytest.approx(float(u @ u))
    assert (table.xs(("c", "c"), level=("a", "b")).cosine - 1).abs().max() < 1e-9


def test_task_vectors_that_do_not_exist(a):
    still = task_vectors(dict(same=a.clone("same")), a)
    assert (still.norm_a == 0).all() and still.cosine.isna().all()
    with pytest.raises(ValueError, match="'tiny' is no branch of 'base': parameter"):
        task_vectors(dict(tiny=tiny_policy(**SMALL)), a)
    with pytest.raises(ValueError, match="at least one"): task_vectors({}, a)


def test_interpolation_path_evaluates_the_merges(a, b):
    suite = dict(text=SUITE["text"], image=SUITE["image"])
    path = interpolation_path(a, b, suite, points=3, samples=0, max_new_tokens=8)
    assert path.t.tolist() == [0, 0, .5, .5, 1, 1] and (path.low <= path.value).all()
    assert (path.value <= path.high).all()
    middle = evaluate(merge([a, b]), suite, samples=0, max_new_tokens=8)
    for c in suite:
        at = path[path.capability == c].set_index("t")
        assert at.value[.5] == pytest.approx(100 * middle[middle.capability == c].greedy.mean())
        assert at.lift[.5] == pytest.approx(at.value[.5] - (at.value[0] + at.value[1]) / 2) and abs(at.lift[0]) < 1e-9
    for options, message in ((dict(points=1), "points=1"), (dict(metric="best"), "unknown metric 'best'")):
        with pytest.raises(ValueError, match=message): interpolation_path(a, b, suite, **options)


# ---- the command

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Two tiny policies, one of another vocabulary, and prompts of all kinds."
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("one", 0), ("two", 1)): tiny_policy(seed, **SMALL).save(folder / name / "result")
    other = tiny_policy(**SMALL)
    other.tokenizer.add_tokens(["newtoken"])
    other.save(folder / "other")
    scan, film = SUITE["image"].test[0].images[0], SUITE["video"].test[0].videos[0]
    Image.fromarray(scan).save(folder / "scan.png")
    np.save(folder / "film.npy", film)
    rows = [dict(prompt="1+1=", answer="2", capability="text"),
            dict(prompt="<script>alert(1)</script>\u202e\u0007", capability="text"),
            dict(prompt="sum?", images=["scan.png"], capability="image"),
            dict(prompt="diff?", videos=["film.npy"], capability="video")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def gap(folder, *words, prompts="prompts.jsonl"):
    return main(["gap", *(str(folder / w) if not w.startswith("-") and not w.isdigit() else w for w in words),
                 "--prompts", str(folder / prompts)])


@pytest.fixture(scope="module")
def report(checkpoints):
    code = gap(checkpoints, "one/result", "two/result", "--out", "out", "--max-new-tokens", "5", "--k", "3", "10",
               "--samples", "2")
    return code, checkpoints / "out"


def test_copd_gap_leaves_html_and_tokens(report):
    code, out = report
    assert code == 0
    assert {p.name for p in out.iterdir()} == {"checkpoints.ipynb", "checkpoints.html", "results.json", "gap.parquet"}
    tokens, results = pd.read_parquet(out / "gap.parquet"), json.loads((out / "results.json").read_text())
    assert set(tokens.capability) == {"text", "image", "video"} and set(tokens.owner) == {"a", "b"}
    assert {"overlap@3", "overlap@10", "delta"} <= set(tokens)
    assert set(tokens.a) == {"one/result"} and set(tokens.b) == {"two/result"} and set(tokens["row"]) == {0, 1}
    assert results["schema"] == "copd_nb.results/1" and results["headline"] and len(results["shown"]) == 3
    stated = {(r["owner"], r["capability"], r["metric"]): r["value"] for r in results["tables"]["capability"]}
    for (owner, capability), part in tokens.groupby(["owner", "capability"]):
        assert stated[owner, capability, "symmetric_kl"] == pytest.approx(part.symmetric_kl.mean())


def test_the_page_is_whole_escaped_and_needs_no_network(report):
    page = (report[1] / "checkpoints.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and page.count("data:image/png") >= 2
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?://', page)
    assert "\x07" not in page or "<bdi>" in page


def refused(capsys, code):
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error.split("copd: ")[-1]
    return error.split("copd: ")[-1]


def test_copd_gap_refuses_another_vocabulary_by_its_tokens(checkpoints, capsys):
    said = refused(capsys, gap(checkpoints, "one/result", "other", "--out", "refused"))
    assert "different vocabularies, 1 tokens differ: 'newtoken'" in said and len(said.strip().splitlines()) == 1


def test_copd_gap_refuses_bad_files_and_too_few_checkpoints(checkpoints, capsys):
    assert "at least two checkpoints" in refused(capsys, gap(checkpoints, "one/result"))
    assert "no file of prompts" in refused(capsys, gap(checkpoints, "one/result", "two/result", prompts="none.jsonl"))
    (checkpoints / "stray.jsonl").write_text(json.dumps(dict(prompt="a", images=["../../etc/passwd"])))
    said = refused(capsys, gap(checkpoints, "one/result", "two/result", "--out", "refused", prompts="stray.jsonl"))
    assert "row 1 of stray.jsonl" in said and "outside of the data file's folder" in said
    with pytest.raises(SystemExit): parser().parse_args(["gap", "a", "b"])


def test_conflict_of_a_teacher_is_that_of_its_gradients(a):
    "OPD gradients of batches beside GRPO's, and a teacher of a capability that is not there."
    teacher = nudged(a, "teacher")
    table = gradient_conflict(a, dict(text=SUITE["text"]), TINY, batches=2, teachers=dict(text=teacher))
    rows = table[table.layer == "all"].set_index(["kind", "other_kind"])
    assert list(rows.index) == [("rl", "rl"), ("rl", "opd"), ("opd", "opd")]
    alone = gradient_conflict(a, dict(text=SUITE["text"]), TINY, batches=2)
    assert rows.cosine["rl", "rl"] == pytest.approx(alone[alone.layer == "all"].cosine.iloc[0], abs=1e-9)
    assert rows.floor["rl", "opd"] == pytest.approx((rows.cosine["rl", "rl"] + rows.cosine["opd", "opd"]) / 2)
    with pytest.raises(ValueError, match="txt"): gradient_conflict(a, [SUITE["text"]], TINY, teachers=dict(txt=teacher))

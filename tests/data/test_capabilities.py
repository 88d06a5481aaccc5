"Examples, splits and the stream of training prompts."
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.capability import Capability, Example, by_name, check_name
from copd_nb.data.rewards import Exact, Weighted

IMAGE = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
VIDEO = np.stack([IMAGE, 255 - IMAGE])
EXAMPLE = Example("q", "a", "c", images=(IMAGE,), videos=(VIDEO,), trace="t")


def capability(size=7, name="c", reward=Exact()):
    every = [Example(f"q{i}", str(i), name) for i in range(size + 2)]
    return Capability(name, every[:size], every[size:], reward)


def ids(examples): return [e.id for e in examples]


CHANGES = [
    dict(prompt="q "), dict(answer="b"), dict(images=()), dict(images=(IMAGE, IMAGE)),
    dict(images=(IMAGE ^ (IMAGE == 7),)),
    dict(images=(IMAGE.reshape(8, 32, 3),)), dict(videos=()), dict(videos=(VIDEO[::-1].copy(),)),
    dict(videos=(IMAGE[None],), images=(VIDEO[0],)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(c))
def test_id_changes_with_everything_the_model_sees_and_the_answer(change):
    assert replace(EXAMPLE, **change).id != EXAMPLE.id


def test_id_ignores_the_trace_the_capability_and_array_identity():
    same = replace(EXAMPLE, trace="other", capability="d", images=(IMAGE.copy(),), videos=(np.asfortranarray(VIDEO),))
    assert same.id == EXAMPLE.id


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=2, max_size=2, unique=True))
def test_prompt_and_answer_never_run_into_each_other(pair):
    (p, a), (q, b) = pair
    assert Example(p, a, "c").id != Example(q, b, "c").id


def test_id_is_the_same_in_another_process():
    code = "from copd_nb.data.capability import Example; print(Example('q', 'a', 'c').id)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": "77"})
    assert out.stdout.strip() == Example("q", "a", "c").id


def test_example_html_is_escaped_and_needs_no_network():
    html = replace(EXAMPLE, prompt="<script>x</script>", trace="<b>")._repr_html_()
    assert "<script" not in html and "<b>" not in html and "http" not in html and html.count("<img") == 3


def test_overlapping_splits_are_refused_by_content():
    a, b = Example("1+1=", "2", "sums"), Example("2+2=", "4", "sums")
    with pytest.raises(ValueError, match=f"'sums'.*1 prompts are in train and test.*{a.id}"):
        Capability("sums", [a, b], [Example("1+1=", "2", "other name", trace="another trace")], Exact())
    Capability("sums", [a], [b], Exact())


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_split_is_refused(split):
    splits = dict(train=[Example("1", "1", "c")], test=[Example("2", "2", "c")]) | {split: []}
    with pytest.raises(ValueError, match=f"'c' has no {split} prompts"): Capability("c", reward=Exact(), **splits)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", " a", "a b", "-a", "_a", "a\n", "ä", "a\0"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(ValueError, match="branch name"): check_name(name, "branch")
    with pytest.raises(ValueError, match="capability name"): capability(name=name)


@pytest.mark.parametrize("name", ["text", "0", "a-b_c.d", "A" * 80])
def test_ordinary_names_are_kept(name): assert check_name(name, "branch") == capability(name=name).name == name


@settings(deadline=None)
@given(seed=st.integers(0, 10**9), size=st.integers(1, 12), epoch=st.integers(0, 50))
def test_every_epoch_is_a_permutation(seed, size, epoch):
    c = capability(size)
    assert Counter(ids(c.draw(seed, epoch * size, size))) == Counter(ids(c.train))


@settings(deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 9), asks=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)),
                                                                      max_size=8))
def test_the_stream_is_a_function_of_the_position(seed, size, asks):
    whole, c = ids(capability(size).draw(seed, 0, 90)), capability(size)
    for start, n in asks: assert ids(c.draw(seed, start, n)) == whole[start:start + n]


def test_streams_differ_between_epochs_seeds_and_names():
    c = capability(12)
    orders = [[e.answer for e in x] for x in (c.draw(0, 0, 12), c.draw(0, 12, 12), c.draw(1, 0, 12),
                                              capability(12, "d").draw(0, 0, 12))]
    assert len({tuple(o) for o in orders}) == 4


def test_orders_are_pinned():
    "A change here changes the prompts of every run ever made."
    assert [e.answer for e in capability(7).draw(3, 5, 6)] == ["0", "6", "5", "6", "0", "1"]


def test_drawing_never_touches_held_out_prompts():
    c = capability(5)
    assert not set(ids(c.draw(0, 0, 100))) & set(ids(c.test))


def test_by_name():
    a, b = capability(name="a"), capability(name="b")
    assert by_name([a, b]) == {"a": a, "b": b} == by_name({"x": a, "y": b}) and list(by_name((b, a))) == ["b", "a"]
    with pytest.raises(ValueError, match=r"twice: \['a'\]"): by_name([a, b, capability(name="a")])
    with pytest.raises(ValueError, match="twice"): by_name({"a": a, "b": a})


def first(completions, examples): return [1.0 for _ in completions]
def second(completions, examples): return [2.0 for _ in completions]


def test_fingerprint_changes_with_name_prompts_order_and_reward():
    c = capability()
    others = [
        capability(name="d"), capability(8), capability(reward=Exact("#")), capability(reward=first),
        capability(reward=second),
        replace(c, train=c.train[::-1]), replace(c, test=c.test[:1]),
        replace(c, train=[replace(c.train[0], answer="x"), *c.train[1:]]),
    ]
    prints = [x.fingerprint for x in (c, *others)]
    assert len(set(prints)) == len(prints) and capability().fingerprint == c.fingerprint
    assert replace(c, train=[replace(e, trace="t") for e in c.train]).fingerprint == c.fingerprint


def test_fingerprint_of_plain_functions_survives_a_new_process(tmp_path):
    "A function's repr holds a memory address, which would make every resumed run another run."
    head = "from copd_nb.data.capability import Capability, Example\nfrom copd_nb.data.rewards import Exact, Weighted\n"
    tail = ("a, b = Example('1', '1', 'c'), Example('2', '2', 'c')\n"
            "print(Capability('c', [a], [b], reward).fingerprint, Capability('c', [a], [b], Weighted(((1, reward), (2, "
            "Exact())))).fingerprint)")
    def prints(junk, word):
        body = ("def reward(completions, examples):\n"
                f"    return [float((lambda x: x in {{'a', '{word}'}})(c)) for c in completions]\n")
        (tmp_path / "mine.py").write_text(head + junk + body + tail)
        return subprocess.run([sys.executable, tmp_path / "mine.py"], capture_output=True, text=True,
                              check=True).stdout.split()
    one, two, other = prints("", "b"), prints("junk = [lambda: i for i in range(50_000)]\n", "b"), prints("", "c")
    assert one == two and one[0] != one[1] and other[0] != one[0]


def test_fingerprint_sees_inside_a_sum_of_rewards():
    assert capability(reward=Weighted(((1, Exact()),
                                       ))).fingerprint != capability(reward=Weighted(((2, Exact()),))).fingerprint


def test_representations_are_short():
    "A notebook stores them: a capability of 8,000 prompts must not write its prompts out."
    from copd_nb.policy.toys import image
    suite = image(64, 16)
    assert len(repr(suite)) < 100 and len(repr(suite.test[0])) < 100


def test_a_reward_is_shown_without_its_place_in_memory():
    def mine(completions, examples): return [0.0] * len(completions)
    shown = Capability("shown", [Example("1", "1", "shown")], [Example("2", "2", "shown")], mine)._repr_html_()
    assert "reward mine" in shown and "0x" not in shown

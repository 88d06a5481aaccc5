"Text skills: answers, splits, noise, bases."
import pytest
import torch

from copd_nb.policy.suites import load_suite
from copd_nb.study.workers import prepare
from copd_nb.data.rewards import Exact, Noisy
from copd_nb.data.scoring import score
from copd_nb.policy.skills import SKILLS, skill, text_policy
from copd_nb.study.bases import base_for, suite, warm_start

TINY = dict(hidden=16, layers=1)


@pytest.mark.parametrize("name", SKILLS)
def test_reference_completions_are_right_and_short(name):
    capability = skill(name)
    examples = [*capability.train[:200], *capability.test[:50]]
    texts = [e.trace + e.answer for e in examples]
    assert score(capability, texts, examples, [True] * len(texts)) == [1.0] * len(texts)
    assert max(map(len, texts)) <= 9  # and the end token: ten
    assert not {e.id for e in capability.train} & {e.id for e in capability.test} and len(capability.test) >= 200


def test_answers_by_another_route():
    for e in skill("add").test: assert int(e.answer) == eval(e.prompt.rstrip("="))
    for e in skill("multiply").test: assert int(e.answer) == eval(e.prompt.rstrip("="))
    for e in skill("subtract").test: assert int(e.answer) == eval(e.prompt.rstrip("="))
    for e in skill("remainder").test: assert int(e.answer) == eval(e.prompt.rstrip("="))
    for e in skill("mirror").test: assert int(e.answer[::-1]) == eval(e.prompt.rstrip("=").replace("~", "+"))
    for e in skill("backwards").test: assert int(e.answer[::-1]) == eval(e.prompt.rstrip("="))
    assert [e.prompt for e in skill("add").test] == [e.prompt for e in skill("backwards").test]
    for e in skill("digits").test: assert int(e.answer) == sum(map(int, e.prompt.rstrip("?")))
    for e in skill("sort").test:
        assert sorted(e.answer) == sorted(e.prompt.rstrip(">")) and list(e.answer) == sorted(e.answer, reverse=True)


def test_noise_spares_held_out_prompts_and_is_the_same_every_time():
    noisy, clean = skill("add", noise=0.3), skill("add")
    train, test = noisy.train[:1000], noisy.test
    right = [e.trace + e.answer for e in train]
    first = score(noisy, right, train, [True] * 1000)
    assert first == score(noisy, right, train, [True] * 1000) and 0.64 < sum(first) / 1000 < 0.76
    wrong = score(noisy, ["0,0:0"] * 1000, train, [True] * 1000)
    assert 0.24 < sum(wrong) / 1000 < 0.36  # wrong answers are rewarded as often
    answers, finished = [e.answer for e in test], [True] * len(test)
    assert score(noisy, answers, test, finished) == score(clean, answers, test, finished)
    assert noisy.fingerprint != clean.fingerprint


def test_noise_rate_must_be_a_share():
    with pytest.raises(ValueError, match="noise rate=1.5"): Noisy(Exact(), 1.5)
    assert Noisy(Exact(mark=""), 1.0)(["2"], skill("add").train[:1]) == [1.0]


def test_unknown_skills_and_arguments_are_named():
    with pytest.raises(ValueError, match="unknown skill 'juggle': add, subtract"): skill("juggle")
    with pytest.raises(ValueError, match="it takes \\['names', 'warm', 'noise'"): load_suite("skills?nmaes=add")
    with pytest.raises(ValueError, match="no module copd_nb.nothing in .* or among"):
        load_suite("copd_nb.nothing:suite")


def test_suites_by_name_by_function_and_as_a_pair(tmp_path, monkeypatch):
    capabilities, base = load_suite("minis")
    old, same = load_suite("copd_nb.minis:suite")  # as version 0.1 wrote it
    assert list(old) == ["text", "image", "video"] == list(capabilities) and same.name == base.name
    pair = [capabilities["text"]], base
    assert load_suite(pair) == load_suite(lambda: pair) == ({"text": capabilities["text"]}, base)
    (tmp_path / "mine_of_skills.py").write_text(
        "from copd_nb.policy.skills import skill, text_policy\n"
        "def suite(name='add'): return [skill(name, held_out=4)], text_policy(16, 1, 2)\n"
        "def bare(): return [skill('add', held_out=4)]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(load_suite("mine_of_skills:suite?name=mirror")[0]) == ["mirror"]
    with pytest.raises(ValueError, match="it takes \\['name'\\]"): load_suite("mine_of_skills:suite?names=add")
    with pytest.raises(ValueError, match="suite 'mine_of_skills:bare' is .*: a pair of capabilities and a base"):
        load_suite("mine_of_skills:bare")
    with pytest.raises(ValueError, match="the suite is 3: a pair"): load_suite(3)
    with pytest.raises(ValueError, match="no suite 'minnis' .did you mean 'minis'"):
        load_suite("minnis")


def test_a_base_is_trained_once_and_depends_on_what_it_is_named_after(tmp_path):
    one = base_for(["add"], 2, tmp_path, rows=4, **TINY)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    two = base_for(["add"], 2, tmp_path, rows=4, **TINY)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values()))
    assert one.name == "base"
    base_for(["add"], 3, tmp_path, rows=4, **TINY)
    assert len([p for p in tmp_path.iterdir() if (p / "manifest.json").exists()]) == 2
    slow = base_for(["add"], 2, tmp_path, rows=4, rate=1e-5, **TINY)
    start = text_policy(seed=0, **TINY).state_dict()
    def moved(policy): return max((x - start[k]).abs().max() for k, x in policy.state_dict().items())
    assert 0 < moved(slow) < 0.1 * moved(one)  # Adam's steps are as long as its rate


def test_threads_are_given_back_after_a_warm_start(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        base_for(["sort"], 2, tmp_path, rows=4, **TINY)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)


def test_suites_are_prepared_in_processes_of_their_own(tmp_path):
    suites = [f"skills?names={n}&warm=2&hidden=16&layers=1&folder={tmp_path}" for n in ("add,again", "add,mirror")]
    prepare(suites, workers=2)
    assert len([p for p in tmp_path.iterdir() if (p / "manifest.json").exists()]) == 2
    capabilities, base = suite("add,mirror", 2, folder=str(tmp_path), **TINY)
    assert list(capabilities) == ["add", "mirror"] and base.name == "base"


def test_shapes_and_seeds_of_the_model():
    assert text_policy(16, 1, 2).model.config.num_key_value_heads == 1
    a, b, c = (text_policy(16, 1, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert warm_start(["add"], 2).total_steps == 2

"Token view: numbers against a slow reference, hostile text, page size, colours, devices and dtypes, clear refusals."
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.view import token_pages as token_pages_module
from copd_nb.view import token_views as token_views_module
from copd_nb.data.capability import Example
from copd_nb.policy.toys import image, text, tiny_policy, video
from copd_nb.signals.rollouts import Rollouts
from copd_nb.signals.sampling import sample
from copd_nb.view.token_data import METRICS, PAGE, ROWS, Choice, Completion, TokenView, visible
from copd_nb.view.token_pages import FRAMES, contrast, html_of, picture, pictures
from copd_nb.view.token_views import token_view

PROMPTS = [*text(8).test[:2], *image(8, 8).test[:1], *video(8, 8).test[:1]]
K = 4


@pytest.fixture(scope="module")
def pair(): return tiny_policy(), tiny_policy(seed=1)


@pytest.fixture(scope="module")
def view(pair): return token_view(*pair, PROMPTS, max_new_tokens=6, k=K)


def made(texts, values=0.5, row_of=lambda t: t):
    "A view of completions without policies."
    def one(words):
        top = [[Choice(i, f"c{i}", 0.5) for i in range(2)] for _ in words]
        return Completion(Example("p", "a", "text"), True, list(range(len(words))), list(words),
                          {m: [values] * len(words) for m in METRICS}, top, top)
    return TokenView("s", "t", "given", 1.0, 2, [one(t) for t in texts])


class Page(HTMLParser):
    "Elements and text of a page; a script's or an unknown element shows up here as it would in a browser."
    def __init__(self, source):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes): self.elements.append((tag, dict(attributes)))
    def handle_data(self, data): self.words.append(data)

    @property
    def tags(self): return {tag for tag, _ in self.elements}


ALLOWED = {"form", "style", "h4", "bdi", "p", "small", "label", "select", "option", "div", "span", "input", "table",
           "caption", "thead", "tbody", "tr", "th", "td", "img", "code"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_equal_a_slow_reference_in_fp64(pair, temperature):
    student, teacher = pair
    view = token_view(student, teacher, PROMPTS, samples=2, max_new_tokens=6, k=K, temperature=temperature)
    assert len(view.completions) == 8
    for c in view.completions:
        ids = torch.tensor([c.ids])
        s, t = (p.completion_logits(p.encode([c.example]), ids, temperature)[0].detach().double().log_softmax(-1)
                for p in pair)
        for i, token in enumerate(c.ids):
            a, b = s[i], t[i]
            top_a, top_b = ({int(j) for j in x.topk(K).indices} for x in (a, b))
            m = torch.logaddexp(a, b) - math.log(2)
            expected = dict(delta=b[token] - a[token], symmetric_kl=((a.exp() - b.exp()) * (a - b)).sum(),
                            reverse_kl=(a.exp() * (a - b)).sum(),
                            forward_kl=(b.exp() * (b - a)).sum(),
                            jsd=((a.exp() * (a - m)).sum() + (b.exp() * (b - m)).sum()) / 2,
                            overlap=len(top_a & top_b) / K, entropy_student=-(a.exp() * a).sum(),
                            entropy_teacher=-(b.exp() * b).sum())
            for metric, value in expected.items():
                assert c.values[metric][i] == pytest.approx(float(value), abs=2e-5), metric
            for top, p in ((c.student_top, a), (c.teacher_top, b)):
                assert [x.p for x in top[i]] == pytest.approx(p.exp().topk(K).values.tolist(), abs=1e-5)
                for x in top[i]: assert x.p == pytest.approx(p[x.id].exp().item(), abs=1e-5)


def test_a_policy_against_itself_shows_nothing(pair):
    view = token_view(pair[0], pair[0].clone("twin"), PROMPTS, max_new_tokens=6)
    for c in view.completions:
        assert max(map(abs, c.values["delta"])) < 1e-5 and set(c.values["overlap"]) == {1.0}
        assert max(c.values["symmetric_kl"]) < 1e-6


def test_frame_is_tidy(view):
    assert len(view.frame) == view.tokens and set(METRICS) <= set(view.frame.columns)
    assert "".join(view.frame[view.frame.completion == 0].text) == "".join(view.completions[0].texts)
    assert not view.frame[list(METRICS)].isna().any().any()


def test_owner_and_given_rollouts(pair):
    student, teacher = pair
    mine, theirs = (token_view(student, teacher, PROMPTS[:2], max_new_tokens=6, owner=o)
                    for o in ("student", "teacher"))
    assert mine.owner == "student" and theirs.owner == "teacher" and [c.ids
            for c in mine.completions] != [c.ids for c in theirs.completions]
    out = sample(teacher, teacher.encode(PROMPTS[:2]), 2, 5, greedy=True)
    given = token_view(student, teacher, PROMPTS[:2], out)
    assert given.owner == "given" and [c.ids for c in given.completions] == [r[:n] for r,
            n in zip(out.ids.tolist(), out.lengths.int().tolist())]


def test_given_texts_end_with_the_end_token(pair):
    view = token_view(*pair, PROMPTS[:2], ["85", ""])
    end = pair[0].eos[0]
    assert [c.ids[-1] for c in view.completions] == [end,
                                                     end] and len(view.completions[1]) == 1 and view.completions[
        0].texts[:2] == ["8", "5"]
    with pytest.raises(ValueError, match="1 completions for 2 examples"): token_view(*pair, PROMPTS[:2], ["85"])
    with pytest.raises(ValueError, match="more than the context"): token_view(*pair, PROMPTS[:1], ["9" * 600])


def test_rows_without_tokens_are_said_to_be_empty(pair):
    out = sample(pair[0], pair[0].encode(PROMPTS[:2]), 1, 5)
    masked = Rollouts(out.prompts, 1, out.ids, out.mask * torch.tensor([[0.0], [1.0]]), out.finished, out.texts)
    view = token_view(*pair, PROMPTS[:2], masked)
    assert [len(c) == 0 for c in view.completions] == [True, False] and "no tokens" in html_of(view)
    none = Rollouts(out.prompts, 1, out.ids, out.mask * 0, out.finished, out.texts)
    empty = token_view(*pair, PROMPTS[:2], none)
    assert empty.tokens == 0 and html_of(empty).count("no tokens") == 2 and len(empty.frame) == 0


def test_nan_is_refused_with_policy_and_place(pair):
    broken = pair[1].clone("broken")
    with torch.no_grad(): broken.model.get_output_embeddings().weight[50] = float("nan")
    with pytest.raises(ValueError, match="policy 'broken' gives no finite probabilities at .* token 0 of completion 0"):
        token_view(pair[0], broken, PROMPTS[:1], ["12"])


def test_other_dtypes_work(pair):
    student, teacher = pair
    half = teacher.clone("half")
    half.model.to(torch.bfloat16)
    exact, rounded = (token_view(student, t, PROMPTS[:2], ["7,15:85", "1"], k=K) for t in (teacher, half))
    for a, b in zip(exact.completions, rounded.completions):
        assert b.values["delta"] == pytest.approx(a.values["delta"], abs=0.05)


def test_unknown_names_list_the_known_ones(pair, view):
    with pytest.raises(ValueError, match="unknown token metric 'kl'.*symmetric_kl"): view.at(metric="kl")
    with pytest.raises(ValueError, match="completions 0 to 3"): view.at(row=4)
    with pytest.raises(ValueError, match="start 99"): view.at(start=99)
    with pytest.raises(ValueError, match="'student' or 'teacher'"): token_view(*pair, PROMPTS[:1], owner="me")
    with pytest.raises(ValueError, match="no examples"): token_view(*pair, [])


def test_different_vocabularies_name_tokens(pair):
    other = tiny_policy()
    other.tokenizer = type("Words", (), dict(get_vocab=lambda self: {"zebra": 0}))()
    with pytest.raises(ValueError, match="tokens differ"): token_view(pair[0], other, PROMPTS[:1])


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u202egnp.exe", "\x00\x07\x1b[31m",
           "\u200b\u2066", "\ud800", "&lt;", "']]><!--", '"><b>', "\r\n\t ", "שלום",
           "--></style>", "👩‍👩‍👧", "a" * 10_000]


def test_hostile_text_is_shown_escaped():
    e = Example("\n".join(HOSTILE), HOSTILE[0], "<i>cap</i>")
    top = [[Choice(i, w, 0.1) for i, w in enumerate(HOSTILE)] for _ in HOSTILE]
    c = Completion(e, True, list(range(len(HOSTILE))), HOSTILE, {m: [0.1] * len(HOSTILE) for m in METRICS}, top, top)
    source = html_of(TokenView('<svg onload="x">', "</form>", "given", 1.0, len(HOSTILE), [c]))
    page = Page(source)
    assert page.tags <= ALLOWED, page.tags - ALLOWED
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    body = re.sub(r"<style>.*?</style>", "", source, flags=re.S)
    assert not [ch for ch in body if ch in "\x00\x07\x1b\u202e\u2066\u200b\ud800" or (ord(ch) < 32 and ch != "\n")]
    source.encode("utf-8")
    assert "\\u202e" in body and "␛[31m" in body and len(body) < 200_000
    assert body.count("<bdi>") >= len(HOSTILE) * (1 + len(HOSTILE))


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_visible_text_has_no_invisible_characters(text):
    assert all(c.isprintable() or c == " " or ord(c) > 127 for c in visible(text))
    assert len(visible(text)) <= 10 * 60 + 1
    if text.isascii() and text.isprintable() and text.strip(): assert visible(text) == text


def test_twenty_thousand_tokens_are_paged_with_the_remainder_stated():
    view = made([["x"] * 20_000, ["y"] * 10])
    source = html_of(view)
    page = Page(source)
    assert sum(tag == "input" for tag,
               _ in page.elements) == PAGE and len(page.elements) < 40 * PAGE and len(source) < 1_000_000
    assert "19,744 more tokens" in source and "256 of 20,010 tokens" in source and "view.at(row=0, start=256)" in source
    last = view.at(start=19_900)
    assert "tokens before 19,900 are not shown" in html_of(last) and [(i, len(r)) for i,
            r in last.page()] == [(0, 100), (1, 10)]


def test_many_completions_are_paged():
    view = made([["x"]] * 100)
    assert len(view.page()) == ROWS and "16 of 100 completions" in html_of(
        view) and "view.at(row=16)" in html_of(view)
    assert [i for i, _ in view.at(row=96).page()] == [96, 97, 98, 99]


def test_pages_need_nothing_from_elsewhere(view, tmp_path):
    source = view.save(tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    for _, attributes in page.elements:
        for name in ("src", "href", "action"): assert attributes.get(name, "data:").startswith("data:")
    assert "default-src 'none'" in source and not any(text in source for text in ("@import", "url(", "<script"))
    assert page.tags <= ALLOWED | {"html", "head", "body", "meta", "title"}
    # the page around the card is dark where the card is
    assert dict(page.elements)["html"]["style"] == "color-scheme:light dark"


def test_pictures_stand_beside_the_prompt(view):
    source = html_of(view)
    pictured = [a for tag, a in Page(source).elements if tag == "img"]
    assert [a["alt"] for a in pictured] == ["image 1", *(f"video 1, frame {t} of 6" for t in range(1, 7))]
    assert all(a["src"].startswith("data:image/png;base64,") for a in pictured)


def test_long_videos_and_large_images_are_cut_down():
    large, small, long = (np.zeros(shape, np.uint8) for shape in ((900, 600, 3), (8, 8, 3), (300, 16, 16, 3)))
    e = Example("?", "1", "video", images=(large, small), videos=(long,))
    shown = pictures(e)
    assert shown.count("<img") == 2 + FRAMES and len(shown) < 40_000
    assert "12 of 300 frames" in shown and "frame 300 of 300" in shown
    assert picture(small[..., 0], "grey").startswith("<img")


def test_every_token_has_its_number_for_every_metric(view):
    labels = [a for tag, a in Page(html_of(view)).elements if tag == "small" and "data-delta" in a]
    assert len(labels) == view.tokens
    assert all(re.fullmatch(r"[+−]?\d+(\.\d+)?", a[f"data-{m}"]) for a in labels for m in METRICS)


def test_the_chosen_metric_is_selected_and_the_strongest_token_is_open(view):
    for metric in METRICS:
        place = view.at(metric=metric)
        elements = Page(html_of(place)).elements
        assert [a["value"] for tag, a in elements if tag == "option" and "selected" in a] == [metric]
        opened = [i for i, (_, a) in enumerate((t, a) for t, a in elements if t == "input") if "checked" in a]
        sizes = [abs(place.shade(metric, v)) for c in view.completions for v in c.values[metric]]
        assert len(opened) == 1 and sizes[opened[0]] == max(sizes)


def test_shades_are_bounded_and_signed():
    view = made([["x"] * 30])
    assert view.limits["delta"] == 0.5 and view.limits["overlap"] == 1.0
    assert view.shade("delta", -9) == -1 and view.shade("delta",
                                                        0.25) == 0.5 and view.shade("overlap",
                                                        1.0) == 0 and view.shade("jsd", 0.25) == 0.5
    assert made([["x"]], values=0.0).limits["delta"] == 1.0 and made([[]]).limits["delta"] == 1.0


@pytest.mark.parametrize("value, shown", [(0.123, "+0.12"), (-0.0001, "0.00"), (-3.0, "−3.00"), (0.0, "0.00")])
def test_numbers_have_the_decimals_of_their_scale(value, shown):
    view = made([["x"] * 30])
    assert token_pages_module.number(view, "delta",
                                     value) == shown and token_pages_module.number(view, "overlap", 0.5) == "0.50"


def test_colours_leave_the_text_readable():
    for theme in (0, 1):
        for name, pair in token_pages_module.POLES.items():
            for share in np.linspace(0, 1, 11):
                paper = token_pages_module.PAPER[theme]
                parts = [(int(paper[i:i + 2], 16), int(pair[theme][i:i + 2], 16)) for i in (1, 3, 5)]
                mixed = "#" + "".join(f"{round(a * (1 - share) + b * share):02x}" for a, b in parts)
                assert contrast(mixed, token_pages_module.INK[theme]) >= 4.5, (name, theme, share)


def test_ids_without_a_token_have_a_name(pair):
    text_of = token_views_module._decoder(pair[0])
    assert "no token" in text_of(10_000) and text_of(pair[0].eos[0]) == "<|im_end|>"

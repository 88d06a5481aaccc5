"Charts and tokens as one uses them: pointer, keyboard, downloads, names for screen readers, both themes, two widths."
import csv
import re

import nbformat
import pytest

from conftest import SHOTS, brightness, use_theme

from copd_nb.view.charts import probe_panel
from copd_nb.view.story import shipped_run

pytestmark = pytest.mark.browser

CELLS = ("""from pathlib import Path
from copd_nb import GapExplorer, RunBrowser, RunMonitor, ScheduleDesigner, TokenInspector, minis
from copd_nb.policy.pair import minis_branch
from copd_nb.view.story import RunStory, shipped_run
from copd_nb.view.token_views import token_view
run = shipped_run(Path("charts") / "shipped")
monitor = RunMonitor(run.path)
monitor.controls["more"].value = ("overlap",)
monitor""", "gaps = GapExplorer(run)\ngaps", """import json
for i in range(40):  # the same run under other names
    other = shipped_run(Path("charts") / f"run-{i:02}")
    scale = 1 - i / 60
    rows = [json.loads(line) for line in (other.path / "events.jsonl").read_text().splitlines()]
    rows = [r | dict(reward=scale * r["reward"]) if r.get("reward") else r for r in rows]
    (other.path / "events.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
    other.note(config=other.manifest["config"] | dict(seed=i % 2, learning_rate=1e-5 * (1 + i // 2)))
runs = RunBrowser("charts")
runs""", """suite = minis(("text", "image"))
view = token_view(minis_branch("text"), minis_branch("image"), [*suite["text"].test[:30], *suite["image"].test[:20]],
                  max_new_tokens=12, k=5)
TokenInspector(view)""", "RunStory(run)", "ScheduleDesigner(['text', 'image'])")
NAMES = ("monitor", "gaps", "runs", "tokens", "story", "designer")
UNNAMED = """root => [...root.querySelectorAll("button, input, select, canvas[tabindex], .noUi-handle")]
  .filter(e => e.offsetParent && !(e.getAttribute("aria-label") || e.textContent.trim() || e.title
    || [...(e.labels ?? [])].some(l => l.textContent.trim())))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def page(lab, chromium):
    "One JupyterLab page with every widget over the shipped run."
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS],
                                            metadata=dict(kernelspec=kernel)), lab.folder / "charts.ipynb")
    context = chromium.new_context(viewport=dict(width=1400, height=1000), accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.elsewhere = []
    page.on("request", lambda r: page.elsewhere.append(r.url) if not re.match(
        r"(https?|wss?)://127\.0\.0\.1[:/]|(data|blob):", r.url) else None)
    lab.run_all(lab.open(page, "charts.ipynb"))
    page.wait_for_function("n => document.querySelectorAll('.copd-live').length === n", arg=len(NAMES))
    page.locator(".copd-chart .legend button").first.wait_for()
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield page
    context.close()


def tool(page, name):
    view = page.locator(".copd-live").nth(NAMES.index(name))
    view.scroll_into_view_if_needed()
    return view


def test_a_chart_answers_pointer_and_keyboard(page):
    view = tool(page, "gaps")
    canvas, said, legend = view.locator(".box > canvas"), view.locator(".said"), view.locator(".legend button")
    canvas.focus()
    page.keyboard.press("Home")
    assert "step 0" in said.inner_text() and "image – text: 1" in said.inner_text()
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("step 4")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    tip = view.locator(".tip")
    tip.wait_for()
    assert re.search(r"step \d+", tip.inner_text()) and tip.inner_text().count(":") == 3
    legend.nth(0).click()
    assert legend.nth(0).get_attribute("aria-pressed") == "false" and "base – text" not in canvas.get_attribute(
        "aria-label")
    legend.nth(0).press("Enter")
    assert legend.nth(0).get_attribute("aria-pressed") == "true"
    page.mouse.move(box["x"] + 200, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 80, steps=4)
    page.mouse.up()
    canvas.focus()
    page.keyboard.press("Home")
    first = int(re.search(r"step (\d+)", said.inner_text())[1])
    assert first > 20, "zoomed by the pointer"
    page.keyboard.press("Escape")
    page.keyboard.press("Home")
    assert "step 0" in said.inner_text()
    raw = said.inner_text()
    for _ in range(40): page.keyboard.press("ArrowRight")
    raw = said.inner_text()
    smoothing = view.get_by_label("smoothing")
    smoothing.focus()
    for _ in range(90): page.keyboard.press("ArrowRight")
    canvas.focus()
    page.keyboard.press("Home")
    for _ in range(40): page.keyboard.press("ArrowRight")
    assert said.inner_text().split(",")[0] == raw.split(",")[0] and said.inner_text() != raw
    view.get_by_label("log axis").check()
    smoothing.fill("0")


def test_downloads_hold_what_was_logged(page, tmp_path):
    view = tool(page, "gaps")
    with page.expect_download() as found: view.get_by_role("button", name="save the values as CSV").click()
    found.value.save_as(tmp_path / "probes.csv")
    rows = list(csv.DictReader(open(tmp_path / "probes.csv")))
    table = probe_panel(shipped_run(tmp_path / "run").events, "overlap", "overlap").table
    wanted = {(r.line, float(r.x)): r.y for r in table.itertuples()}
    assert {(r["line"], float(r["step"])): float(r["value"]) for r in rows} == wanted
    with page.expect_download() as found: view.get_by_role("button", name="save the picture as PNG").click()
    found.value.save_as(tmp_path / "probes.png")
    assert (tmp_path / "probes.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "probes.png").stat().st_size > 9000


def test_every_control_has_a_name(page):
    for name in NAMES: assert tool(page, name).evaluate(UNNAMED) == [], name


def test_arrow_keys_walk_through_tokens_and_the_prompt_comes_first(page):
    view = tool(page, "tokens")
    text = view.inner_text()
    assert text.index("student text, teacher image") < text.index("reference answer") < text.index("token ")
    buttons = view.locator(".copd-strip button")
    buttons.nth(0).focus()
    page.keyboard.press("ArrowRight")
    view.get_by_text("token 2 of").wait_for()
    page.keyboard.press("End")
    view.get_by_text(f"token {buttons.count()} of").wait_for()
    assert "Jensen" in buttons.nth(1).get_attribute("title")
    begin = page.evaluate("performance.now()")
    view.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("End")
    view.get_by_text("completion 49").wait_for()
    assert page.evaluate("performance.now()") - begin < 3000


def test_runs_are_sorted_and_no_two_lines_look_alike(page):
    view = tool(page, "runs")
    view.locator("select").filter(has_text="last").select_option("last")
    view.locator(".widget-checkbox input").check()
    view.locator("tbody tr", has_text="shipped").first.wait_for()
    page.wait_for_function("""e => [...e.querySelectorAll("tbody tr")].map(r => +r.cells[5].innerText)
      .every((v, i, all) => !i || v <= all[i - 1])""", arg=view.element_handle())
    swatches = view.locator(".legend canvas").evaluate_all("es => es.map(e => e.toDataURL())")
    assert len(swatches) == len(set(swatches)) == 21
    view.get_by_role("button", name="refresh").click()
    view.get_by_text("41 of 41 runs").wait_for()


@pytest.mark.parametrize("width", [1400, 900])
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_pictures_of_every_widget(page, theme, width):
    page.set_viewport_size(dict(width=width, height=1000))
    use_theme(page, theme)
    for name in NAMES:
        view = tool(page, name)
        view.screenshot(path=SHOTS / f"{name}-{theme.lower()}-{width}.png")
        assert (brightness(view) < 110) == (theme == "Dark"), f"{name}: a dark page has no white picture"
        assert view.evaluate("e => e.scrollWidth - e.clientWidth") <= 1, name
        for paper in view.locator(".copd").evaluate_all("es => es.map(e => getComputedStyle(e).backgroundColor)"):
            assert (paper == "rgb(255, 255, 255)") == (theme == "Light"), (name, paper)
    assert page.elsewhere == []

"Widgets in a real JupyterLab (keyboard, clicks, the kernel's answer) and saved pages (no network, dark mode, zoom)."
import os
import re
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT, SHOTS, use_theme

from copd_nb.engine.runs import request_stop

pytestmark = pytest.mark.browser

LIVE = ".jp-OutputArea-output:has(> .widget-vbox)"  # a live view, not its static frame
CONTRAST = """elements => elements.map(e => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const ctx = canvas.getContext('2d', {willReadFrequently: true});
  const rgb = color => {
    ctx.fillStyle = color;
    ctx.fillRect(0, 0, 1, 1);
    return [...ctx.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = color => rgb(color).map(v => linear(v / 255))
    .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle(e), a = light(style.color), b = light(style.backgroundColor);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})"""


def widget(page, *words):
    "The live view whose controls hold these labels."
    found = page.locator(LIVE)
    for word in words: found = found.filter(has_text=word)
    found.first.scroll_into_view_if_needed()
    cards = found.first.locator(".copd").evaluate_all("es => es.map(e => e.getBoundingClientRect().right - "
                                                      "e.closest('.widget-vbox').getBoundingClientRect().right)")
    assert max(cards) <= 1, "what does not fit is cut off instead of scrolled"
    return found.first


def slide(view, label, key):
    "Move a slider by keyboard."
    handle = view.locator(".widget-slider",
                          has=view.page.locator(f".widget-label:text-is('{label}')")).locator(".noUi-handle")
    handle.focus()
    view.page.keyboard.press(key)


def menu(view, label):
    "The list with this label."
    return view.locator(".widget-dropdown",
                        has=view.page.locator(f".widget-label:text-is('{label}')")).locator("select")


def test_schedule_designer(lab, open_page):
    notebook = nbformat.read(ROOT / "nbs" / "tutorials" / "202_schedule.ipynb", as_version=4)
    end = next(i for i, cell in enumerate(notebook.cells) if "ScheduleDesigner([" in cell.source)
    notebook.cells = notebook.cells[:end + 1]  # what follows trains a study
    nbformat.write(notebook, lab.folder / "designer.ipynb")
    page = lab.open(open_page(), "designer.ipynb")
    lab.run_all(page)
    view = widget(page, "topology", "s_rl")
    assert "s_rl=12" in view.inner_text() and view.locator("svg").count() == 1
    slide(view, "s_rl", "ArrowRight")
    view.get_by_text("s_rl=13").wait_for()
    menu(view, "topology").select_option("hub")
    view.get_by_text("topology='hub'").wait_for()
    view.screenshot(path=SHOTS / "schedule-designer.png")
    assert page.elsewhere == []


def test_gap_explorer_and_token_inspector(lab, open_page):
    page = lab.open(open_page(), "102_dynamics.ipynb")
    lab.run_all(page)
    view = widget(page, "metric", "pair")
    canvas = view.locator(".box > canvas")
    chart = canvas.get_attribute("aria-label")
    last = int(re.search(r"step (\d+): one seed", view.inner_text())[1])
    slide(view, "step", "ArrowLeft")
    view.get_by_text(f"step {last - 4}: one seed").wait_for()  # probed every four steps
    menu(view, "k").select_option("1")
    view.get_by_text("k = 1,").wait_for()
    page.wait_for_function("([e, before]) => e.getAttribute('aria-label') !== before",
                           arg=[canvas.element_handle(), chart])
    view.screenshot(path=SHOTS / "gap-explorer.png")

    tokens = widget(page, "colour shows")
    buttons = tokens.locator(".copd-strip button")
    before = tokens.locator("caption").inner_text()
    other = 0 if not before.startswith("token 1 ") else 2
    buttons.nth(other).click()
    tokens.get_by_text(f"token {other + 1} of").wait_for()
    assert tokens.locator("table tbody tr").count() == 6  # both distributions, side by side
    assert buttons.nth(other).evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    buttons.nth(1).focus()
    page.keyboard.press("Enter")
    tokens.get_by_text("token 2 of").wait_for()
    menu(tokens, "colour shows").select_option(label="top-k overlap")
    tokens.get_by_text("no id in common").wait_for()
    slide(tokens, "completion", "End")
    tokens.locator("img").first.wait_for()  # the last prompt is an image
    assert min(buttons.evaluate_all(CONTRAST)) >= 4.5
    tokens.screenshot(path=SHOTS / "token-inspector.png")
    use_theme(page, "Dark")
    assert min(buttons.evaluate_all(CONTRAST)) >= 4.5
    tokens.screenshot(path=SHOTS / "token-inspector-dark.png")
    widget(page, "metric", "pair").screenshot(path=SHOTS / "gap-explorer-dark.png")
    use_theme(page, "Light")
    assert page.elsewhere == []


def test_run_monitor_and_browser(lab, open_page):
    page = lab.open(open_page(height=1300), "101_first_run.ipynb")
    lab.run_all(page)
    view = widget(page, "stop")
    view.get_by_text("copd: finished").wait_for()
    assert view.get_by_text("step 3 of 3").count() == 1
    menu(view, "metric").select_option("overlap")
    view.locator("canvas[aria-label*='top-k overlap']").wait_for()
    long = widget(page, "shipped: finished")
    long.locator(".box > canvas").focus()
    for key in ("Home", *["ArrowRight"] * 60): page.keyboard.press(key)
    long.screenshot(path=SHOTS / "run-monitor.png")
    runs = widget(page, "budget")
    menu(runs, "schedule").select_option("copd")
    runs.get_by_text("2 of 3 runs").wait_for()
    menu(runs, "schedule").select_option("any")
    runs.get_by_text("3 of 3 runs").wait_for()
    runs.screenshot(path=SHOTS / "run-browser.png")
    assert page.elsewhere == []


LONG = """from pathlib import Path
from copd_nb.schedule.paradigms import expert
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.view.monitor import RunMonitor
from copd_nb.policy.toys import minis_base, text
start, folder = minis_base(), Path("long")
config = Config(prompts=4, group_size=4, probe_every=0, eval_every=0, device="cpu")
def go(): return train(expert("text", 10_000), [text(64)], start, config, folder, progress=False)
monitor = RunMonitor(folder, go, every=0.3)
monitor"""


def test_a_run_is_watched_stopped_and_resumed(lab, open_page):
    "First while a cell of the same kernel trains and another process asks to stop, then by the buttons."
    cells = [nbformat.v4.new_code_cell(c) for c in (LONG, "run = go()")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells,
                                            metadata=dict(kernelspec=dict(name="python3", display_name="python3",
                                            language="python"))), lab.folder / "long.ipynb")
    page = lab.open(open_page(), "long.ipynb")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    view = page.locator(LIVE)
    view.get_by_text(re.compile(r"step [1-9]\d* of 10000")).wait_for()
    first = int(re.search(r"step (\d+) of", view.inner_text())[1])
    page.wait_for_function(f"() => +(document.body.innerText.match(/step (\\d+) of 10000/)?.[1]) > {first}")
    request_stop(lab.folder / "long")
    view.get_by_text("long: stopped").wait_for()
    done = int(re.search(r"step (\d+) of", view.inner_text())[1])
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    view.get_by_role("button", name="resume").click()
    page.wait_for_function(f"() => +(document.body.innerText.match(/step (\\d+) of 10000/)?.[1]) > {done}")
    view.get_by_role("button", name="stop").click()
    view.get_by_text("long: stopped").wait_for()
    assert int(re.search(r"step (\d+) of", view.inner_text())[1]) > done and page.elsewhere == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "The committed tutorial with widgets as a saved HTML page, and a token view as a page of its own."
    folder = tmp_path_factory.mktemp("saved")
    code = ("import sys\nfrom pathlib import Path\nfrom shutil import copy\nfrom copd_nb.report.driver import "
            "_to_html\n"
            "for name in ('102_dynamics', '202_schedule'): _to_html(Path(copy(f'nbs/tutorials/{name}.ipynb', "
            "sys.argv[1])))\n"
            "from copd_nb.policy.toys import image, text, tiny_policy\nfrom copd_nb.view.token_views import "
            "token_view\n"
            "prompts = [*text(8).test[:2], *image(8, 8).test[:1]]\n"
            "view = token_view(tiny_policy(), tiny_policy(seed=1), prompts, ['<script>document.title=1</script>', "
            "'a<b>b', '7'], k=5)\n"
            "view.save(Path(sys.argv[1]) / 'tokens.html')\n")
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT, env=os.environ
                   | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE"), timeout=120)
    return folder


def fits(page):
    "Whether nothing sticks out to the right of the page."
    return page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth + 1")


@pytest.mark.parametrize("look", ["light", "dark", "zoom"])
def test_a_saved_token_page_answers_without_script_and_network(saved, open_page, look):
    page = open_page(640, 450, scale=2) if look == "zoom" else open_page(scheme=look)
    page.goto(f"file://{saved}/tokens.html")
    assert page.title() == "Tokens of tiny and tiny" and page.locator(".t").count() > 30
    assert min(page.locator(".t").evaluate_all(CONTRAST)) >= 4.5 and min(page.locator(".copd").evaluate_all(
        CONTRAST)) >= 7
    assert fits(page) and float(page.locator(".t").first.evaluate(
        "e => parseFloat(getComputedStyle(e).fontSize)")) >= 13
    page.locator(".t").nth(3).click()
    assert page.locator(".d:visible").count() == 1 and page.locator(".d:visible").get_by_text("token 4 of").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator(".d:visible").get_by_text("token 5 of").is_visible()
    before = page.locator(".t").evaluate_all("es => es.map(e => getComputedStyle(e).backgroundColor).join()")
    page.locator("select").select_option("entropy_student")
    assert page.locator(".t").evaluate_all("es => es.map(e => getComputedStyle(e).backgroundColor).join()") != before
    assert page.locator(".scale:visible").count() == 1 and "undecided" in page.locator(".scale:visible").inner_text()
    page.locator("select").focus()
    page.screenshot(path=SHOTS / f"tokens-{look}.png", full_page=True)
    assert page.elsewhere == []


@pytest.mark.parametrize("look", ["light", "dark", "zoom"])
@pytest.mark.parametrize("name", ["102_dynamics", "202_schedule"])
def test_a_saved_notebook_shows_its_static_frames(saved, open_page, name, look):
    page = open_page(640, 450, scale=2) if look == "zoom" else open_page(scheme=look)
    page.goto(f"file://{saved}/{name}.html")
    frames = page.locator(".copd")
    assert page.get_by_text("Static picture").count() == (2 if name == "102_dynamics" else 1)  # beside each a picture
    assert frames.first.is_visible() and page.locator("img").count() >= 1
    assert all(w > 0 for w in page.locator("img").evaluate_all("es => es.map(e => e.naturalWidth)"))
    assert "Error displaying" not in page.inner_text("body")
    # the legend of the chosen metric alone
    assert page.locator(".scale:visible").count() == (1 if name == "102_dynamics" else 0)
    assert {e for e in page.locator(".copd tbody td:not(.n)").evaluate_all("es => es.map(e => "
                                                                           "getComputedStyle(e).textAlign)")} == {
        "left"}
    if look == "zoom":
        assert all(page.locator(".copd").evaluate_all("es => es.map(e => e.getBoundingClientRect().right <= innerWidth "
                                                      "+ 1)"))
    page.screenshot(path=SHOTS / f"{name}-{look}.png", full_page=True)
    assert page.elsewhere == []

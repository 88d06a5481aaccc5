"Notebooks with widgets that were run, saved, closed and opened again, or shown by a host that strips their HTML."
import re
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup

from conftest import ROOT, SHOTS, brightness, use_theme

from copd_nb.report.driver import _body
from copd_nb.view.saved import WIDGET

pytestmark = pytest.mark.browser

PLACES = """from pathlib import Path
import json
from copd_nb import GapExplorer, RunBrowser, RunMonitor, ScheduleDesigner, TokenInspector, copd, minis
from copd_nb.policy.pair import minis_branch
from copd_nb.view.story import RunStory, shipped_run
from copd_nb.view.token_views import token_view
run = shipped_run(Path("store") / "shipped")"""
CELLS = (PLACES, "monitor = RunMonitor(run.path)\nmonitor", "monitor.controls['metric'].value = 'overlap'",
         "GapExplorer(run)", "RunBrowser(run.path.parent)", "ScheduleDesigner(['text', 'image'])", "RunStory(run)",
         "suite = minis(('text', 'image'))\nview = token_view(minis_branch('text'), minis_branch('image'), "
         "[*suite['text'].test[:2], *suite['image'].test[:1]], max_new_tokens=10, k=5)",
         "inspector = TokenInspector(view)\ninspector")
WIDE = "es => es.filter(e => e.offsetParent && e.naturalWidth > 300).length"
TOOLS = ("RunMonitor", "GapExplorer", "RunBrowser", "ScheduleDesigner", "RunStory", "TokenInspector")


@pytest.fixture(scope="module")
def saved(lab, chromium):
    "A notebook with every widget, run, changed and saved in JupyterLab, and its kernel shut down."
    kernel = dict(name="python3", display_name="python3", language="python")
    cells = [nbformat.v4.new_code_cell(c) for c in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), lab.folder / "saved.ipynb")
    context = chromium.new_context(viewport=dict(width=1400, height=1000))
    page = context.new_page()
    page.set_default_timeout(120_000)
    lab.run_all(lab.open(page, "saved.ipynb"))
    page.wait_for_function("n => document.querySelectorAll('.copd-live').length === n", arg=len(TOOLS))
    assert page.locator(".copd-still:visible").count() == 0, "beside a live view its picture is hidden"
    assert page.locator(".jp-RenderedImage:visible").count() == 0
    page.evaluate("""async () => {
      await window.jupyterapp.commands.execute('docmanager:save');
      await window.jupyterapp.shell.currentWidget.sessionContext.shutdown();
    }""")
    context.close()
    return lab.folder / "saved.ipynb"


def pictures(path):
    notebook = nbformat.read(path, as_version=4)
    return [o["data"]["image/png"] for c in notebook.cells for o in c.get("outputs", ())
            if "image/png" in o.get("data", {})]


def test_a_reopened_notebook_shows_the_last_picture_of_every_widget(lab, saved, open_page):
    page = open_page(1400, 1000)
    page.goto(f"{lab.url}/lab/tree/{saved.name}?token={lab.token}&reset")
    page.locator(".copd-still").first.wait_for()
    page.wait_for_timeout(2000)
    text = page.locator(".jp-Notebook").inner_text()
    assert "model not found" not in text and "Loading widget" not in text and "Error displaying" not in text
    assert page.locator(".copd-live").count() == 0 and page.locator(".copd-still:visible").count() == len(TOOLS)
    assert page.locator(".jp-RenderedImage img:visible").count() == len(TOOLS)
    assert "metric overlap" in text, "the picture is of the last state, not of the first"
    page.locator(".jp-RenderedImage").first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "reopened.png")
    use_theme(page, "Dark")
    page.screenshot(path=SHOTS / "reopened-dark.png")
    assert all(brightness(picture) < 110 for picture in page.locator(".jp-RenderedImage img:visible").all())
    use_theme(page, "Light")
    assert page.elsewhere == []


def test_a_clone_that_nobody_trusts_yet_shows_pictures(lab, saved, open_page):
    "JupyterLab cleans the HTML of a notebook whose signature it doesn't know: no inline SVG, no style."
    strange = nbformat.read(saved, as_version=4)
    strange.cells[0].source += "  # from elsewhere"
    nbformat.write(strange, lab.folder / "strange.ipynb")
    shutil.copy(ROOT / "nbs" / "index.ipynb", lab.folder / "hero.ipynb")
    for name, least in (("strange", len(TOOLS)), ("hero", 1)):
        page = open_page(1400, 1000)
        page.goto(f"{lab.url}/lab/tree/{name}.ipynb?token={lab.token}&reset")
        page.locator(".jp-OutputArea img").first.wait_for()
        page.wait_for_timeout(2000)
        shown = page.locator(".jp-OutputArea img:visible").evaluate_all(WIDE)
        text = page.locator(".jp-Notebook").inner_text()
        assert shown >= least and "own signal" not in text, "the words of a drawing are in the drawing"
        assert "model not found" not in text and "Loading widget" not in text and page.elsewhere == []
        page.screenshot(path=SHOTS / f"untrusted-{name}.png")


def stripped(html: str) -> str:
    "A page without styles, ids, classes, scripts and inline SVG."
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup(["style", "script", "svg", "link"]): tag.decompose()
    for tag in soup(True): tag.attrs = {k: v for k, v in tag.attrs.items() if k in ("src", "alt", "href", "colspan")}
    return str(soup)


@pytest.mark.parametrize("strip", [False, True], ids=["nbconvert", "stripped"])
def test_a_page_of_it_shows_every_widget(saved, open_page, tmp_path, strip):
    page, html = open_page(1200, 900), f"<!doctype html><body>{_body(nbformat.read(saved, as_version=4))}</body>"
    (tmp_path / "page.html").write_text(stripped(html) if strip else html, encoding="utf-8")
    page.goto(f"file://{tmp_path}/page.html")
    shown = page.locator("img").evaluate_all(WIDE)
    text = page.inner_text("body")
    assert shown == len(TOOLS) and "Error displaying" not in text and "application/vnd" not in text
    assert text.count("Static picture") == len(TOOLS) and "step 300 of 300" in text and "token 1 of" in text
    page.screenshot(path=SHOTS / f"saved-{'stripped' if strip else 'nbconvert'}.png", full_page=True)
    assert page.elsewhere == []


def test_pictures_are_small(saved):
    found = pictures(saved)
    assert len(found) == len(TOOLS) and max(map(len, found)) < 60_000
    assert WIDGET in saved.read_text() and not re.search("data:image/png[^\"]{60000}", saved.read_text())

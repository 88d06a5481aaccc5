"The site and the published reports from file://: they fit three widths, can be searched, and are dark where asked."
import pytest

from conftest import ROOT

pytestmark = pytest.mark.browser

REPORTS = sorted((ROOT / "docs" / "reports").glob("*/*.html"))
PAGES = ("index.html", "start.html", "paradigms/copd.html", "api/index.html", "gallery.html", "measured.html")
OUTSIDE = """() => [...document.querySelectorAll('main svg[role=img], main table, main img')].filter(e => {
  let box = e;
  const scrolls = box => ['auto', 'scroll'].includes(getComputedStyle(box).overflowX);
  while (box.tagName != 'MAIN' && !scrolls(box)) box = box.parentElement;
  return (box.tagName == 'MAIN' ? e : box).getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 80))"""
BROKEN = """() => [...document.querySelectorAll('main a[href^="#"]')].map(a => decodeURIComponent(a.hash.slice(1)))
  .filter(id => !document.getElementById(id))"""
SCROLLS = "() => document.documentElement.scrollWidth - innerWidth"


@pytest.mark.parametrize("width", [1400, 900, 400])
def test_pages_of_the_site_fit(site, open_page, width):
    page = open_page(width=width)
    for name in PAGES:
        page.goto(f"file://{site / name}")
        assert page.evaluate(SCROLLS) <= 0 and page.evaluate(OUTSIDE) == [], name
        padding = "es => es.map(e => parseFloat(getComputedStyle(e).paddingLeft))"
        assert all(p >= 6 for p in page.locator("main td").evaluate_all(padding)), name
    assert page.elsewhere == []


def test_the_search_works_without_a_server(site, open_page):
    page = open_page(width=1400)
    page.goto(f"file://{site / 'paradigms/copd.html'}")
    box = page.locator(".smalldocs-search input").first
    box.fill("seesaw")
    found = page.locator(".smalldocs-search-results.show .search-result")
    found.first.wait_for()
    assert "seesaw" in found.first.inner_text().lower() and found.count() > 2
    found.first.click()
    page.wait_for_url("**/*.html*")
    assert "seesaw" in page.locator("main").inner_text().lower()


def test_the_gallery_shows_figures_that_lead_somewhere(site, open_page):
    page = open_page(width=1400)
    page.goto(f"file://{site / 'gallery.html'}")
    page.locator("main .gallery img").evaluate_all("es => es.forEach(e => { e.loading = 'eager' })")
    page.wait_for_function("() => [...document.querySelectorAll('main .gallery img')].every(i => i.complete)")
    assert all(page.locator("main .gallery img").evaluate_all("es => es.map(e => e.naturalWidth > 0 && e.alt != '')"))
    links = page.locator("main .gallery a").evaluate_all("es => es.map(e => e.getAttribute('href'))")
    assert len(links) > 40 and all((site / link).is_file() for link in links)


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 400)])
def test_published_reports_answer_first_and_fit(open_page, scheme, width):
    page = open_page(width=width, scheme=scheme)
    for report in REPORTS:
        page.goto(f"file://{report}")
        assert page.evaluate(SCROLLS) <= 0 and page.evaluate(OUTSIDE) == [] and page.evaluate(BROKEN) == [], report
        tops = [page.locator(part).first.bounding_box()["y"] for part in ("h1", ".verdict", ".contents", "main h2")]
        assert tops == sorted(tops) and tops[1] < 450, report
        assert all(page.locator("img").evaluate_all("es => es.map(e => e.alt.length > 5 && !e.alt.startsWith('No '))"))
        back = page.locator(".back a").get_attribute("href")
        assert (report.parent / back).resolve() == (ROOT / "docs" / "reports" / "index.html")
        light = page.evaluate("() => getComputedStyle(document.body).backgroundColor == 'rgb(255, 255, 255)'")
        assert light == (scheme == "light")
        wide = page.locator("main .wide").evaluate_all("es => es.filter(e => e.scrollWidth > e.clientWidth + 1).length")
        assert width < 1200 or wide == 0, report
    assert page.elsewhere == []

"Report pages: what is moved, what stays, and what comes from elsewhere."
import pandas as pd
from bs4 import BeautifulSoup

from copd_nb.view.article import article
from copd_nb.view.report_page import asked, found, page_of, renewed, with_way_back
from copd_nb.view.tidy_tables import tidy_table

HOSTILE = '<script>alert("x")</script><img src=https://example.org/x.png>'
CELL = "<div class='cell'><div class='rendered_html'>{}</div></div>"


def record(**changes):
    return dict(report="experiment", headline="It *leads*.", shown=["It leads."], environment={},
                parameters=dict(title="mine", seeds=[0])) | changes


def body(*sections):
    return CELL.format("<h1>Title</h1>") + "".join(CELL.format(f"<h2>{t}</h2>{text}") for t, text in sections)


def tidied(html):
    soup = BeautifulSoup(html, "html.parser")
    tidy_table(soup, soup.table)
    return [[c.get_text() for c in row.find_all(["th", "td"])] for row in soup.find_all("tr")]


def test_nothing_that_is_read_is_lost_or_doubled():
    made = article(body(("Arms", "<p>first</p>"), ("Accuracy", "<p>two</p><img src='data:,'><p>three</p>"),
                        ("In words", "<ul><li>four</li></ul>")), "<p>answer</p>")
    text = BeautifulSoup(made, "html.parser").get_text(" ")
    assert all(text.count(word) == 1 for word in ("first", "two", "three", "four", "answer"))
    assert text.index("answer") < text.index("two") < text.index("four") < text.index("first")
    assert made.count("<img") == 1 and made.index("<img") < made.index("two")


def test_a_section_with_the_answer_becomes_the_box_and_keeps_its_table():
    made = article(body(("The answer", "<p>A leads.</p><table><tr><td>1</td></tr></table><img src='data:,'>"),
                        ("Accuracy", "<p>why</p>")), "<p>never shown</p>")
    assert "never shown" not in made and made.count("<p>A leads.</p>") == 1
    assert made.index("A leads.") < made.index("<img") < made.index("<table") < made.index("why")


def test_methods_are_folded_and_limits_are_not():
    made = article(body(("Why", "<p>reason</p>"), ("Methods", "<p>plan</p>"), ("Limits", "<p>one</p>")))
    page = BeautifulSoup(made, "html.parser")
    assert page.find(string="plan").find_parent("details") and not page.find(string="one").find_parent("details")
    assert [a.get_text() for a in page.select("nav.contents a")] == ["Why", "Limits", "How it was done"]


def test_reports_without_figures_sections_or_cells():
    assert "answer" in article(CELL.format("<h1>T</h1>"), "answer") and "figure" not in article(body(("A", "<p>b</p>")))
    assert "<h1>" in article("") and page_of("", "Title").count("<title>Title</title>") == 1


def test_a_repeated_layout_changes_nothing_and_other_pages_stay():
    page = page_of(body(("Accuracy", "<p>two</p>")), "Title", record())
    assert renewed(page, record()) == page == renewed(renewed(page)) and renewed("<p>page</p>") == "<p>page</p>"
    linked = with_way_back(page, '../in"dex.html')
    assert linked.count("All reports") == 1 == with_way_back(linked, "x.html").count("All reports")
    assert "in&quot;dex" in linked and renewed(linked) == linked


def test_hostile_records_stay_text():
    page = page_of(body(("Accuracy", "<p>two</p>")), HOSTILE, record(
        headline=HOSTILE + "\n\n![p](https://example.org/p.png)", environment=dict(commit=HOSTILE, versions=HOSTILE),
        parameters=dict(question=HOSTILE, title=HOSTILE, preset=HOSTILE, seeds=[HOSTILE])))
    assert "<script" not in page and "src=https" not in page.replace("&lt;img src=https", "") and "p.png" not in page


def test_questions_and_answers_of_records():
    assert asked(record()) is None and asked(record(parameters={})) is None and asked({}) is None
    of_one = record(parameters=dict(capabilities=["a"]))
    assert asked(of_one) == "Which paradigm is best at a, at the same number of steps?"
    assert asked(record(parameters=dict(question=7))) is None
    table = "**x, %**\n\n| a |\n|---|\n| 1 |"
    assert found(record(headline=f"One.\n\n{table}\n\n{table}\n\nTwo.")) == "One.\n\nTwo."
    assert found(record(headline=table, shown=["a", "b", "c"]), 2) == "- a\n- b"


def test_tables_of_every_form():
    def row(*cells): return "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    rows = row("a", 0.5, 0.25, 0.751234) + row("b", 1, "nan", "nan")
    head = "<thead><tr><th>arm</th><th>mean</th><th>low</th><th>high</th></tr></thead>"
    found = tidied(f"<table>{head}<tbody>{rows}</tbody></table>")
    assert found == [["arm", "mean"], ["a", "0.5 [0.25, 0.751]"], ["b", "1"]]
    spans = "<table><thead><tr><th colspan=2>x_low</th></tr></thead><tr><td>1.23456</td><td>2</td></tr></table>"
    assert tidied(spans) == [["x low"], ["1.23", "2"]]
    assert tidied("<table><tr><td>1</td></tr></table>") == [["1"]] and tidied("<table></table>") == []
    head = "<tr><th></th><th>a</th></tr>"
    numbered = f"<table><thead>{head}</thead><tr><th>0</th><td>x</td></tr><tr><th>1</th><td>y</td></tr></table>"
    assert tidied(numbered) == [["a"], ["x"], ["y"]]
    second = "<tr><th>arm</th><th></th></tr>"
    named = tidied(f"<table><thead>{head}{second}</thead><tr><th>1</th><td>x</td></tr></table>")
    assert named == [["arm", "a"], ["1", "x"]]
    counted = pd.DataFrame(dict(arm=["CoPD"], gain=[1.5], low=[1.25], high=[1.75])).to_html()
    assert tidied(counted) == [["arm", "gain"], ["CoPD", "1.5 [1.25, 1.75]"]]  # and not the number of the row
    low = "<table><thead><tr><th>low</th><th>high</th></tr></thead><tr><td>1</td><td>2</td></tr></table>"
    assert tidied(low) == [["low", "high"], ["1", "2"]]


def test_an_answer_that_begins_with_a_table_or_a_figure():
    table = "<style>#T {color: red}</style><table><tr><td>1</td></tr></table><p>words</p><img src='data:,'>"
    made = article(body(("The answer", table), ("Accuracy", "<p>why</p>")), "<p>said</p>")
    box = BeautifulSoup(made, "html.parser").select_one(".verdict")
    assert box.table and box.style and "said" not in made and "words" not in box.get_text()
    made = article(body(("The finding", "<img src='data:,'><p>words</p>")), "<p>said</p>")
    assert BeautifulSoup(made, "html.parser").select_one(".verdict").get_text() == "said" and made.count("<img") == 1


def test_equal_parts_stay_apart():
    same = "<p>same</p><img src='data:,'>"
    made = article(body(("Accuracy", same + same), ("Costs", same)), "<p>same</p>")
    assert made.count("<img") == 3 and made.count("<p>same</p>") == 4
    first, costs = made.index("<img"), made.index('id="Costs"')
    assert first < made.index('class="contents"') and made[costs:].count("<img") == 1

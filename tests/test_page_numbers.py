"The numbers of the README's findings and of the six answers are those of the published records."
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # it imports the file beside it
import beside  # noqa: E402
import check_numbers as numbers  # noqa: E402


@pytest.fixture(params=list(numbers.PAGES))
def page(request): return request.param, (ROOT / request.param).read_text()


def test_every_number_has_a_record(page): assert numbers.faults(*page) == []


def test_a_changed_number_and_one_without_a_record_are_found(page):
    name, text = page
    for number in set(re.findall(r"\d\.\d \[", numbers.PAGES[name][1](text))):
        assert any("the records give" in f for f in numbers.faults(name, text.replace(number, f"7{number}")))
    phrase = "end 14.3 points"
    assert phrase in text
    assert [f for f in numbers.faults(name, text.replace(phrase, f"almost 4.7 of them {phrase}"))
            if "no record for 4.7" in f]


def test_a_lead_reads_the_same_either_way_round():
    one, other = (numbers.lead("experiment-coevolution", *pair, "three/planned")
                  for pair in (("CoPD", "MOPD"), ("MOPD", "CoPD")))
    assert (one.value, one.low, one.high) == (-other.value, -other.high, -other.low)
    with pytest.raises(ValueError, match="MOPD and text expert are not compared"):
        numbers.lead("experiment-coevolution", "MOPD", "text expert", "three/planned")


def test_how_numbers_are_written():
    found = numbers.Measured("a record", -1.26, -2.04, 0.04, 0.0004)
    assert f"{found}" == "−1.3 [−2.0, 0.0]" and f"{-found:points}" == "1.3 points [0.0, 2.0]"
    assert (f"{found:p}", f"{found:mean}", f"{found:ends}") == ("p < 0.001", "−1.3", "−2.0 to 0.0")
    assert f"{found:bounds}" == "[−2.0, 0.0]"


TABLES = [p for p in sorted(beside.PARADIGMS.glob("*.md")) if "CoPD minus it" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", TABLES, ids=lambda p: p.stem)
def test_tables_of_the_paradigms_are_those_of_their_records(page):
    text = page.read_text(encoding="utf-8")
    assert beside.refilled(text) == text
    changed = re.sub(r"(\| \d)\d(\.\d \[)", r"\1?\2", text)  # no number is left as it was
    assert changed != text and beside.refilled(changed) == text


def test_a_row_that_a_record_lacks_is_named():
    with pytest.raises(ValueError, match="experiment-coevolution has no row 'ring', but base, "):
        beside.row("experiment-coevolution", "three", "ring")

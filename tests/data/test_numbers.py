"Numbers as people write them: every spelling reads back exactly; what is ambiguous is none, and neither are its parts."
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_nb.data.capability import Example
from copd_nb.data.numbers import numbers_in, plain_number, plain_numbers, read_number
from copd_nb.data.answers import Boxed, LastNumber, Tagged
from copd_nb.data.rewards import Numeric
from copd_nb.data.verifiers import check_answer, named_reward

MINUS = ("-", "−", "﹣", "－", "‑", "–")
GAPS = (",", "\u00a0", "\u2009", "\u202f", "{,}", r"\,", r"\!", r",\!", r"{\,}", "~", "'", "’")
SCRIPTS = ("0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "๐๑๒๓๔๕๖๗๘๙")
whole, gaps, minus = st.integers(0, 10 ** 15), st.sampled_from(GAPS), st.sampled_from(MINUS)


def grouped(n: int, gap: str) -> str: return f"{n:,}".replace(",", gap)


def lakhs(n: int) -> str:
    "Groups of two above the last three digits."
    head, tail = divmod(n, 1000)
    return f"{re.sub(r'(?<=[0-9])(?=(?:[0-9][0-9])+$)', ',', str(head))},{tail:03}" if head else str(tail)


@given(whole, gaps, minus)
def test_whole_numbers_read_back(n, gap, sign):
    for text in (str(n), f"+{n}", f"00{n}", f"{n}.00", grouped(n, gap), lakhs(n)): assert read_number(text) == n
    for text in (f"{n}",
        f" {grouped(n, gap)}\n"): assert read_number(text.replace(text.strip(), sign + text.strip())) == -n
    assert read_number(f"\u200e{sign}{n}") == -n
    assert read_number(f"${n}$") == read_number(rf"\({grouped(n, gap)}\)") == n


@given(st.decimals(-10 ** 9, 10 ** 9, allow_nan=False, places=6), gaps, minus)
def test_decimals_read_back(d, gap, sign):
    text = f"{d:,f}".replace("-", sign).replace(",", gap)
    assert read_number(text) == Fraction(d) and read_number(plain_number(text)) == Fraction(d)
    assert read_number(f"{d:e}") == read_number(rf"{d:f} \times 10^{{0}}") == Fraction(d)


@given(whole, st.sampled_from(SCRIPTS[1:]))
def test_digits_of_any_one_script(n, digits):
    other = str(n).translate(str.maketrans(SCRIPTS[0], digits))
    assert read_number(other) == n and plain_number(other) == str(n)
    assert read_number(f"1{other}") is read_number(f"{other}1") is None, "two scripts"


@given(st.integers(0, 9999), st.integers(1, 9999), st.integers(1, 99), minus)
def test_fractions_read_back(over, under, n, sign):
    value = Fraction(over, under)
    for text in (f"{over}/{under}", f"{over} / {under}", f"{over}⁄{under}", rf"\frac{{{over}}}{{{under}}}",
        rf"\dfrac {{ {over} }} {{ {under} }}", f"{over}.0/{under}"):
        assert read_number(text) == value and read_number(sign + text) == -value
    if 0 < over < under <= 99:
        assert read_number(f"{n} {over}/{under}") == read_number(rf"{n}\frac{{{over}}}{{{under}}}") == n + value
        assert read_number(f"{sign}{n} {over}/{under}") == -n - value
    if over >= under and over < 100: assert read_number(f"{n} {over}/{under}") is None


@given(st.integers(-999, 999), st.integers(-50, 50))
def test_powers_of_ten_read_back(n, power):
    value = n * Fraction(10) ** power
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    for text in (f"{n}e{power}", f"{n}E{power:+d}", f"{n}×10^{power}", f"{n} x 10**{power}",
        rf"{n} \cdot 10^{{{power}}}", f"{n}·10{raised}"): assert read_number(text) == value
    assert read_number(f"10^{power}") == read_number(f"10{raised}") == Fraction(10) ** power


@pytest.mark.parametrize("text, value",
    [("½", "1/2"), ("2½", "5/2"), ("3 ½", "7/2"), (r"\text{13}", "13"), (r"$\mathbf{-2}$", "-2"), (r"\[ 5 \]", "5"),
    ("−¾", "-3/4"), ("⅓", "1/3"), (r"\frac12", "1/2"), (r"\tfrac{-3}{4}", "-3/4"),
    (r"-\frac{3}{-4}", "3/4"), ("5.", "5"), (".5", "1/2"),
                                         ("٣٫٥", "7/2"), ("1٬234", "1234"), ("٣", "3"), ("- 3", "-3"), ("-0", "0"),
                                         ("6/3", "2"), ("1,234/2", "617"), ("1e-07", "1/10000000"), ("$ 3 $", "3")])
def test_single_spellings(text, value): assert read_number(text) == Fraction(value)


@pytest.mark.parametrize("number, value", [("5", "5"), ("-1,234", "-1234"), ("0.5", "1/2"), ("3/4", "3/4"),
                                           (r"\frac{3}{4}", "3/4")])
@pytest.mark.parametrize("around", ["{}.", "**{}**", "__{}__", "*{}*", "`{}`", "**{}.**", "**{}**.", "$**{}**$",
                                    "**${}$**", "***{}***"])
def test_emphasis_and_a_full_stop_are_no_part_of_a_number(around, number, value):
    assert read_number(around.replace("{}", number)) == Fraction(value)


@pytest.mark.parametrize("text", ["**5", "5**", "**5*", "5..", "** 5 **", "**5** **6**", "*5*6*", "**1,2**", "``",
                                  "****", "**.**", "."])
def test_emphasis_that_is_none_makes_no_number(text): assert read_number(text) is None


NONE = ["", " ", "-", ".", "1,2", "3,5", "12,34", "1,2,3", "1,2345", "1234,567", "0,125", "1.234,56", "1.234.567",
    "1,234.567,8", "1 000", "1 000 000", "1_0", "1_000", "1,234\u00a0567", "1\u00a0234,5",
        "12\u00a034", "nan", "inf", "-Infinity", "1e", "e5", "0x1F", "1:30", "12:00", "2024-05-01", "05/01/2024",
        "1/2/3", "3/0", "0/0", r"\frac{3}{0}", r"\frac{1}{2}5", r"\frac123", r"\frac{a}{2}", "3/x",
        "1.2.3", "x2", "H2O", "2x", "2π", r"2\pi", r"\sqrt{2}", "2^{10}", "2^10", "5²", "10-3", "2–3", "2—3", "1..5",
        "±3", r"\pm 3", "3±0.5", "--3", "+-3", "—3", "(3)", "3 4", "3 5/4", "1 234/500",
        "½½", "1½2", "3½/2", "50%", "50 %", "50\\%", "½%", "$18", "18 dollars", "5 km", "5km", "5k", "5 million",
        "2nd", "five", "1\n2", "1e999999999", "1e-999999999", "9" * 5000, "1e1001", "10^" + "9" * 400]


@pytest.mark.parametrize("text", NONE, ids=lambda t: t[:20])
def test_other_texts_are_no_number(text):
    assert read_number(text) is None and plain_number(text) is None
    for answer in ("1", "2", "3", "12", "50", "56", "234", "1000", "1234"):
        assert Numeric("")([text], [Example("q", answer, "c")]) == [0]


lists = st.tuples(st.integers(1, 10 ** 6), st.sampled_from(",_;:"), st.integers(0, 10 ** 6))
ambiguous = lists.map(lambda t: f"{t[0]}{t[1]}{t[2]}").filter(lambda t: not re.fullmatch(r"\d{1,3},\d{3}", t))
parts = st.tuples(st.integers(1, 999), st.integers(0, 999), st.integers(0, 99))
european = parts.map(lambda t: f"{t[0]}.{t[1]:03},{t[2]:02}")


@given(ambiguous | european)
def test_what_can_be_read_in_two_ways_is_none_and_has_no_part(text):
    assert read_number(text) is None and LastNumber()(f"It is {text}.") == text
    found = check_answer("numeric", text)
    assert found.startswith(f"the reference answer {text!r} is no number, or could be read in two ways")


@pytest.mark.parametrize("strip, text, value", [
    ("$", "$18", 18), ("$", r"\$18", 18), ("$", "-$18", -18), ("$", "$-18", -18),
    ("$", "$1,234.50", Fraction(2469, 2)), ("$", "18", 18), ("$", "18 $", 18), ("$", "€18", None), ("%", "50%", 50),
    ("%", r"50\%", 50),
    ("%", "50 ％", 50), ("$,%", "50%", 50), ("dollars, km", "18 dollars", 18), ("dollars,km", "5km", 5),
    ("km", r"5\text{ km}", 5), ("km", r"5\,\mathrm{km}", None), ("km", "5 kilometres", None), ("k", "5km", None),
    ("€", "1.234,56 €", None),
    ("$", r"$\$18$", 18), ("km", r"$5\text{ km}$", 5), ("$", "$-$18", None), ("$", "-$-18", None), ("m,km", "5 km", 5),
    ("km/h, m²", "5 km/h", 5),
    ("km/h, m²", "5 m²", 5), ("m^2", "5m²", 5), ("", "$18", None), (" , ", "18", 18),
])
def test_units_are_ignored_where_they_are_named(strip, text, value): assert read_number(text, strip) == value


@pytest.mark.parametrize("strip", ["0", "e3", "-", "km,1", ".", "^2"])
def test_units_that_could_be_part_of_a_number_are_refused(strip):
    for act in (lambda: Numeric(strip=strip), lambda: read_number("x", strip),
        lambda: named_reward(dict(name="numeric", strip=strip))):
        with pytest.raises(ValueError, match="could be a part of a number"): act()


def test_strip_is_an_option_of_numeric():
    reward, example = named_reward("numeric?strip=$,%25"), [Example("q", "$1,250", "c")]
    for text in ("so $1,250 in all", "it is 1250%", "1250 km/h"): assert reward([text], example) == [1]
    assert named_reward("numeric?form=tag:answer&strip=km")(["<answer>5 km</answer>"], [Example("q", "5", "c")]) == [1]
    assert check_answer("numeric?strip=$", "$3") is None and "`strip` names units" in check_answer("numeric", "$3")


@pytest.mark.parametrize("text, number", [
    ("so it is −3", "-3"), ("(−7)", "-7"), ("it is –3.", "-3"), ("−$18 left", "-18"), (r"$-\$5$", "-5"),
    ("y = - 3", "-3"), ("- 3 apples", "3"), ("10−3", "3"), ("10 - 3", "3"), ("x=-7", "-7"), ("从−3", "-3"),
    ("1\u00a0000\u00a0000 people", "1000000"), (r"it is 1\,234", "1234"), ("10,50,000 rupees", "1050000"),
    ("3/4 of it", "3/4"), ("3 / 4", "3/4"), ("2½ cups", "5/2"), (r"$x=-\frac{3}{4}$.", "-3/4"), ("3×10⁵ K", "300000"),
    ("72 clips, altogether", "72"), ("共72个", "72"), ("__42__", "42"), ("**42**", "42"), ("_42_", "42"),
    ("5 litres of H2O", "5"), ("12 m^2", "12"), ("12 cm²", "12"), ("$18/hour", "18"), ("30°", "30"),
    (r"30^\circ", "30"), ("7!", "7"), ("v1.2", None), ("COVID-19", None),
    ("1.234,56", None), ("1 000 000", None), ("1:30", None), ("12:00", None), ("on 2024-05-01", None),
    ("05/01/2024", None), ("192.168.0.1", None), ("1/2/3", None), ("50%", None), ("50 percent", None),
    ("5 million", None), ("5万", None),
    ("2–3", None), ("3 ± 0.5", None), (r"\pm 3", None), ("minus 3", None), ("Negative 3", None), ("= -(3)", None),
    (r"2\pi", None), ("π/4", None), ("x/4", None), (r"\frac{\pi}{4}", None), (r"\sqrt{2}", None), (r"3\sqrt2", None),
    ("√2", None), ("2^{10}", None), ("x^2", None),
    ("a_{n-1}", None), ("x2", None), ("0x55", None), ("2nd", None), ("5k", None), ("5'11", None), ("7...42", None),
    ("[1,2,3]", None), ("(2,-3)", None), ("5/x", None), ("1e999999999", None), ("7-1/2", None), ("5m^2", None),
])
def test_the_last_number_of_a_text(text, number):
    last = LastNumber()(text)
    assert (None if last is None else read_number(last)) == (None if number is None else Fraction(number))


APART = ("$18", "18 dollars", "5 km", "10-3", "3 4", "1½2", "½½", "1e")  # hold a number in prose
tokens = st.sampled_from([t for t in NONE if re.match(r"[\d$][^\n]*$", t) and len(t) < 100 and t not in APART])
words = st.lists(st.sampled_from(["so", "is", "total", "7", "(see", "note)", "x2", "a", "the", "3/4"]),
    max_size=120).map(" ".join)


@settings(deadline=None)
@given(words, tokens, st.sampled_from(["", ".", " apples", ", then", "\n", ")", "!"]))
def test_no_part_of_what_is_written_like_a_number_is_one(before, token, after):
    text = f"{before}\nThe answer is {token}{after}"
    assert LastNumber()(text) == numbers_in(text)[-1] and read_number(LastNumber()(text)) is None


NASTY = st.lists(st.sampled_from([*"1 0.,:;/-−–—+±%$({[)]}^_'ex½²٣万\u00a0\u202f×*·~…=!\n", "23", "000", "is ", "x2.",
    "minus ", "million", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\,", "{,}", r"\pi", "10^", r"\boxed{", "word. "]),
    max_size=60).map("".join)


@settings(deadline=None, max_examples=300)
@given(NASTY, st.integers(0, 150))
def test_the_last_number_is_found_without_reading_all(text, n):
    text = "so then 7 apples " * n + text
    found = numbers_in(text)
    assert LastNumber()(text) == (found[-1] if found else None)
    for number in found:
        if (value := read_number(number)) is not None: assert read_number(plain_number(number)) == value


@given(st.integers(-10 ** 6, 10 ** 6), st.integers(1, 10 ** 4))
def test_numbers_are_compared_exactly(n, under):
    example = [Example("q", f"{n}/{under}", "c")]
    assert Numeric("")([str(Fraction(n, under))], example) == [1] and Numeric("")([f"{n}.000001/{under}"],
        example) == [0]
    assert Numeric("")([f"{n * 10 ** 20 + 1}"], [Example("q", str(n * 10 ** 20), "c")]) == [0]


@pytest.mark.parametrize("reference, good, bad", [
    ("1000", "1010", "1011"), ("1000", "990", "989"), ("-1000", "-1010", "1000"), ("0.5", "0.505", "0.506"),
    ("1e-13", "1.01e-13", "0"), ("1e-13", "9.9e-14", "2e-13"), ("0", "0.0", "1e-300"), ("1/3", "0.336", "0.337"),
])
def test_a_tolerance_is_a_share_of_the_reference(reference, good, bad):
    example = [Example("q", reference, "c")]
    assert Numeric("", .01)([good, bad], example * 2) == [1, 0]


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_tolerances_that_make_no_sense(tolerance):
    with pytest.raises(ValueError, match="tolerance=.*share of the reference"): Numeric(tolerance=tolerance)


def test_long_numbers_take_no_time():
    for text in ("9" * 10 ** 6, "1," * 10 ** 5, "1e" + "9" * 10 ** 5, "{" * 10 ** 5 + "1", "1-" * 10 ** 5,
        r"\frac{" * 10 ** 5 + "1", "1 000 " * 10 ** 5, "x^{" * 10 ** 5 + "1", "-" * 10 ** 5 + "1"):
        assert read_number(text) is None and read_number(LastNumber()(text) or "") in (None, 1)


@given(st.text(max_size=40))
def test_no_text_makes_a_reader_raise(text):
    value = read_number(text)
    assert value is None or isinstance(value, Fraction)
    assert all(isinstance(n, str) for n in numbers_in(text)) and isinstance(plain_numbers(text), str)
    for form in (Boxed(), Tagged(), LastNumber()): assert form(text) is None or isinstance(form(text), str)


def test_texts_in_plain_numbers():
    assert plain_numbers(r"−1\,234.5, ２, ½ and 1\u00a0000".replace(r"\u00a0",
        "\u00a0")) == r"-1234.5, 2, \frac{1}{2} and 1000"
    assert plain_numbers(r"\{1,234\}, 1.234,56 and 12\,34") == r"\{1,234\}, 1.234,56 and 12\,34"

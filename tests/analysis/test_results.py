"From scores and events to tables."
import re

import numpy as np
import pandas as pd
import pytest

from copd_nb.analysis.capability_gap import capability_gap
from copd_nb.analysis.results import (
    compare, leader_of, leader_sentence, main_table, score_arrays)
from copd_nb.analysis.tests import t_interval


def rows(values, capability="text", start=0):
    return pd.DataFrame([dict(example=f"{capability}{i + start}", capability=capability, greedy=v, sampled=v / 2) for i,
                         v in enumerate(values)])


def both(text, image): return pd.concat([rows(text), rows(image, "image")], ignore_index=True)


SCORES = {("CoPD", 0): both([1, 1, 0], [1, 0]), ("CoPD", 1): both([1, 0, 0], [1, 1]),
          ("text expert", 0): both([1, 1, 1], [0, 0]),
          ("text expert", 1): both([1, 1, 1], [0, 0]), ("image expert", 0): both([0, 0, 0], [1, 1]),
          ("image expert", 1): both([0, 0, 0], [1, 1])}


def test_arrays_are_seed_by_example_in_one_order():
    shuffled = {k: v.sample(frac=1, random_state=i) for i, (k, v) in enumerate(SCORES.items())}
    arrays = score_arrays(shuffled, "greedy")
    assert arrays["CoPD"]["text"].tolist() == [[1, 1, 0], [1, 0, 0]] and arrays["CoPD"]["image"].shape == (2, 2)
    assert np.allclose(score_arrays(SCORES)["CoPD"]["text"], arrays["CoPD"]["text"] / 2)


def test_missing_seed_other_examples_unknown_metric_are_errors():
    with pytest.raises(ValueError, match="every label needs every seed"):
        score_arrays({k: v for k, v in SCORES.items() if k != ("CoPD", 1)})
    with pytest.raises(ValueError, match="other examples"):
        score_arrays(SCORES | {("CoPD", 1): both([1, 1, 0], [1, 0]).assign(example=list("abcde"))})
    with pytest.raises(ValueError, match="unknown metric 'f1'"): score_arrays(SCORES, "f1")


def test_main_table_means():
    table = main_table(score_arrays(SCORES, "greedy"), ["text", "image"]).set_index(["paradigm", "capability"])["mean"]
    assert table["CoPD", "text"] == pytest.approx(50)
    assert table["CoPD", "image"] == pytest.approx(75)
    assert table["CoPD", "mean"] == pytest.approx(62.5)


def test_gap_is_to_the_capability_s_own_expert():
    gaps = capability_gap(score_arrays(SCORES, "greedy"), ["CoPD"], ["text", "image"]).set_index("capability").value
    assert gaps["text"] == pytest.approx(50) and gaps["image"] == pytest.approx(25)  # positive is missing


def test_compare_is_paired_and_says_so():
    found = compare(score_arrays(SCORES, "greedy"), "CoPD", ["text expert"], ["text", "image"]).iloc[0]
    assert found.difference == pytest.approx(12.5) and found.low <= found.difference <= found.high
    assert "CoPD" in found.sentence


def scored(**shares):
    "Three seeds of 400 examples; one draw for all labels, so that differences are paired."
    luck = np.random.default_rng(0).random((3, 400))
    return {label: dict(text=(luck < share).astype(float)) for label, share in shares.items()}


def test_ties_have_no_winner():
    rows = {f"row {i}": dict(a=np.repeat([[1.0] * 9 + [0.0] * 7], 2, axis=0)) for i in range(10)}
    assert leader_of(rows, ["a"]) == "No winner: all 10 rows have 56.25 %."
    low = dict(low=dict(a=np.zeros((2, 16))))
    two = {label: rows[label] for label in ("row 0", "row 1")}
    assert leader_of(two | low, ["a"]).startswith("No winner: row 0 and row 1 tie at 56.25 % [")


@pytest.mark.parametrize("rows, said", [
    (dict(b=0.3, a=0.62), r"^a leads with 60\.6 % \[\d+\.\d, \d+\.\d\], clearly above b\.$"),
    (dict(b=0.3, a=0.62, c=0.1), r"^a leads with .*, clearly above the other 2\.$"),
    (dict(b=0.3, a=0.62, c=0.61), r"^a leads with .*; not distinguishable from it: c\.$"),
    (dict(a=0.62, c=0.61), r"^No winner: the highest mean is that of a, 60\.6 % .* can be told from it\.$"),
    (dict(a=0.62), "^a has 60.6 % .*nothing to compare it with")])
def test_a_leader_is_named_with_its_interval_and_with_those_it_cannot_be_told_from(rows, said):
    assert re.search(said, leader_of(scored(**rows), ["text"]))


def test_a_leader_without_an_interval_is_none():
    values = dict(a=[0.9], b=[0.1])
    known = {l: t_interval(v) for l, v in values.items()}
    def difference(a, b): return t_interval([x - y for x, y in zip(values[a], values[b])])
    assert "No winner: the highest mean is that of a, 90.0 % (no interval)" in leader_sentence(known, difference)
    with pytest.raises(ValueError, match="no row to compare"): leader_sentence({}, difference)

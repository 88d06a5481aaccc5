"Headroom: rewards that are guessed, figures that agree with their definitions, verdicts at the edges."
import math

import numpy as np
import pandas as pd
import pytest

from copd_nb.analysis.headroom import answer_scores, guessed_rewards, headroom, step_sizes, verdict
from copd_nb.data.capability import Example
from copd_nb.policy.skills import text_policy


def tokens_of(deltas, prompts=4):
    "Rows of a token table with given δ."
    size = len(deltas)
    return pd.DataFrame(dict(a="a", b="b", owner="a", capability="c", example=[str(i % prompts) for i in range(size)],
                             row=0, position=range(size), token=0, text="", delta=np.array(deltas, dtype=float)))


def test_shares_of_a_step():
    found = step_sizes(tokens_of([0, 0.005, -0.02, 0.24, 0.26, -0.22, -0.23, 3])).set_index("metric")
    assert found.value["abs_delta"] == pytest.approx((0.005 + 0.02 + 0.24 + 0.26 + 0.22 + 0.23 + 3) / 8)
    assert found.value["moved"] == pytest.approx(6 / 8)
    assert found.value["beyond_clip"] == pytest.approx(3 / 8)  # beyond log 1.28 = 0.247 and log 0.8 = −0.223
    wide = step_sizes(tokens_of([0.5, -0.5, 0.1]), clip_low=0.5, clip_high=1).set_index("metric")
    assert wide.value["beyond_clip"] == 0 and math.log(0.5) < -0.5


def test_shares_stay_below_one():
    found = step_sizes(tokens_of([1, 2, 3, -4])).set_index("metric")
    assert found.value["moved"] == found.high["moved"] == 1


def test_guesses():
    made = guessed_rewards([Example("a", "1,000", "n"), Example("b", "3/4", "n"), Example("c", "x", "m"),
                            Example("d", "2", "m"), Example("e", "", "o")])
    assert made == dict(n="numeric", m="exact")


def scores_of(student, teacher):
    rows = [dict(model=m, capability="c", example=str(i), greedy=x, sampled=x)
            for m, xs in (("s", student), ("t", teacher)) for i, x in enumerate(xs)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("student, teacher, said", [
    ([0] * 12, [1] * 12, "yes"), ([1] * 12, [0] * 12, "no: "), ([0] * 12, [0] * 12, "not shown: neither"),
    ([1, 0] * 6, [0, 1] * 6, "not shown: these prompts")])
def test_verdicts(student, teacher, said):
    room = headroom(scores_of(student, teacher), "s", "t").iloc[0]
    assert verdict(room).startswith(said)
    assert room.value == pytest.approx(100 * (np.mean(teacher) - np.mean(student))) and room.examples == 12


def test_prompts_without_answers_are_left_out_and_bad_answers_refused():
    policy = text_policy(32, 1)
    examples = [Example("1+1=", "2", "sums"), Example("2+2=", "4", "sums"), Example("hm", "", "open")]
    found = answer_scores({"a": policy, "b": policy}, examples, guessed_rewards(examples), 1, max_new_tokens=2)
    assert len(found) == 4 and set(found.capability) == {"sums"} and set(found.model) == {"a", "b"}
    with pytest.raises(ValueError, match="capability 'sums': the reference answer 'two' is no number"):
        answer_scores({"a": policy}, [Example("1+1=", "two", "sums")], {"sums": "numeric"})

"Prices against token-by-token loops, and the arithmetic of costs."

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_nb.schedule.costs import Cost, ModelShape, Workload, human

SHAPE = ModelShape(parameters=1000, embedding=300, layers=3, hidden=8, vision_parameters=50, vocabulary=20)
WORKLOAD = Workload(
    prompts=5,
    opd_prompts=4,
    group_size=3,
    shape=SHAPE,
    prompt_tokens={"text": 7, "image": 11},
    completion_tokens={"text": 4, "image": 6},
    patches={"image": 9},
)


def token_flops(position: int, head: bool) -> int:
    "One forward token at a 0-based position, from the parts: weights, scores, weighted sum."
    weights = SHAPE.parameters if head else SHAPE.parameters - SHAPE.vocabulary * SHAPE.hidden
    return 2 * weights + SHAPE.layers * 2 * (2 * SHAPE.hidden * (position + 1))


def group_flops(capability: str) -> tuple[int, int]:
    "Forward FLOPs of a prompt and of a completion after it, token by token."
    prompt, completion = WORKLOAD.prompt_tokens[capability], WORKLOAD.completion_tokens[capability]
    patches = WORKLOAD.patches.get(capability, 0)
    prefill = sum(token_flops(i, head=False) for i in range(prompt)) + 2 * SHAPE.vision_parameters * patches
    return prefill, sum(token_flops(prompt + i, head=True) for i in range(completion))


@pytest.mark.parametrize("capability", ["text", "image"])
def test_rl_flops_equal_a_loop_over_tokens(capability):
    prefill, completion = group_flops(capability)
    expected = 5 * (3 * prefill + 3 * (completion + 3 * completion))  # prefill with gradient, G = 3: sample, train
    assert WORKLOAD.rl_cost(capability, 5).flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("capability", ["text", "image"])
def test_opd_adds_one_teacher_prefill_and_one_scoring_pass(capability):
    prefill, completion = group_flops(capability)
    extra = WORKLOAD.opd_cost(capability, 5).flops - WORKLOAD.rl_cost(capability, 5).flops
    assert extra == pytest.approx(5 * (prefill + 3 * completion), rel=1e-12)


def test_token_counts_by_hand():
    rl, opd = WORKLOAD.rl_cost("image", 5), WORKLOAD.opd_cost("image", 4)
    assert (rl.prompts, rl.prompt_tokens, rl.generated, rl.scored, rl.trained) == (5, 55, 90, 0, 90)
    assert (opd.prompts, opd.prompt_tokens, opd.generated, opd.scored, opd.trained) == (4, 88, 72, 72, 72)
    assert rl.tokens == 180 and opd.tokens == 216 and rl.updates == opd.updates == rl.seconds == 0


def test_supervised_cost_is_one_training_pass_without_sampling():
    sft, (prefill, completion) = WORKLOAD.sft_cost("image", 5), group_flops("image")
    assert (sft.prompts, sft.prompt_tokens, sft.generated, sft.scored, sft.trained, sft.tokens) == (5, 55, 0, 0, 30, 30)
    assert sft.flops == pytest.approx(5 * 3 * (prefill + completion), rel=1e-12)


def test_signal_costs_are_linear_in_prompts():
    for price in (WORKLOAD.rl_cost, WORKLOAD.opd_cost, WORKLOAD.sft_cost):
        whole, parts = price("text", 7), price("text", 3) + price("text", 4)
        assert (
            whole.flops == pytest.approx(parts.flops)
            and whole.tokens == parts.tokens
            and whole.prompts == parts.prompts
        )


def test_unknown_capability_names_what_is_known():
    with pytest.raises(KeyError, match=r"'video'.*\['image', 'text'\]"):
        WORKLOAD.rl_cost("video", 1)


def test_attention_width_replaces_hidden_in_attention_only():
    wide = ModelShape(1000, 0, layers=3, hidden=8, vocabulary=20, attention=16)
    assert wide.forward_flops(1, 10) == 2000 + 4 * 3 * 16 * 10
    assert wide.forward_flops(1, 0, head=False) == 2 * (1000 - 20 * 8)


def test_size_counts_every_stored_weight():
    assert SHAPE.size == 1000 + 300 + 50


counts = st.integers(0, 10**9)
costs = st.builds(Cost, counts, counts, counts, counts, counts, counts, counts, counts)


@given(costs, costs, st.integers(0, 50))
def test_costs_form_a_vector_space(a, b, times):
    assert a + b == b + a and a + Cost() == a
    assert (a + b) * times == a * times + b * times
    assert a * 3 == sum([a, a, a], Cost()) and (a + b).tokens == a.tokens + b.tokens


def test_cost_shows_all_its_fields():
    shown = Cost(updates=3, seconds=1.5, generated=2_000_000)._repr_html_()
    for cell in ("<th>prompt tokens</th>", "<td>3</td>", "<td>1.5</td>", "<td>2 M</td>", "<th>tokens</th>"):
        assert cell in shown


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (999, "999"), (1000, "1 k"), (999_999, "1 M"), (-2500, "-2.5 k"), (3.1e21, "3.1 Z")]
)
def test_human(value, text):
    assert human(value) == text


def test_schedules_import_without_pandas_and_torch():
    code = "import sys, copd_nb.schedule.paradigms; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"

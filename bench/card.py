"""A step of `examples/qwen3-vl-4b.yaml` on one graphics card: full size, random weights, short completions.

`python bench/card.py` prints JSON: seconds and tokens of a step of each phase, the card's arithmetic, and the peak of
memory beside the plan's. `--decoding` is short: milliseconds of a position of 16, 64 and 256 rows with the usual
decoder and with CUDA graphs (`Config.graphs`), what each launches, and how far its log-probabilities are from a scoring
pass. A GRPO step of 0.34 M weights with and without graphs, and TRL's: `bench/run.py --only 1 --device cuda`.
"""
import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from copd_nb.engine.state import Training, model_shape
from copd_nb.engine.step import train_step
from copd_nb.engine.accelerator import accelerator_for, machine
from copd_nb.policy.toys import minis
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import lora
from copd_nb.study.experiment import read_experiment, rows_of
from copd_nb.study.memory import lora_size, memory_plan
from copd_nb.study.rehearsal import share_of_digits
from copd_nb.study.sources import qwen3_vl_4b
from copd_nb.policy.processors import small_processor
from copd_nb.signals.replay import release
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample
from copd_nb.engine.runs import create_run

EXAMPLE = Path(__file__).parents[1] / "examples" / "qwen3-vl-4b.yaml"
PIXELS = 8  # a pixel of a mini's picture becomes a square of so many


def random_model(side: int) -> Policy:
    "Qwen3-VL-4B with random bf16 weights and the character tokenizer; its completions don't end."
    processor, config = small_processor(16, (side, side)), qwen3_vl_4b()
    ids = processor.tokenizer.convert_tokens_to_ids
    for mark in ("vision_start", "vision_end"): setattr(config, f"{mark}_token_id", ids(f"<|{mark}|>"))
    config.image_token_id, config.video_token_id, config.text_config.pad_token_id = (ids("<|image_pad|>"),
            ids("<|video_pad|>"), processor.tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device("cuda"): model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id,
                                               pad_token_id=processor.tokenizer.pad_token_id)
    policy = Policy(model, processor, "random")
    policy.eos = [ids("<|image_pad|>")]  # never sampled
    return policy


def enlarged(example):
    "An example whose films are of an everyday size."
    return replace(example, videos=tuple(v.repeat(PIXELS, 1).repeat(PIXELS, 2) for v in example.videos))


def suite() -> dict:
    "The minis, judged by the share of digits."
    return {n: replace(c, train=[enlarged(e) for e in c.train[:64]], test=[enlarged(e) for e in c.test[:4]],
                       reward=share_of_digits) for n, c in minis().items()}


def begin(policy: Policy, config, schedule, capabilities) -> Training:
    run = create_run(Path(tempfile.mkdtemp()) / "run", dict(content_hash="bench"))
    return Training(schedule, capabilities, policy, config, accelerator_for(config), run)


def timed(work) -> tuple:
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


def step(training: Training, phase, n: int) -> dict:
    "What a step of a phase took."
    torch.cuda.reset_peak_memory_stats()
    rows, seconds = timed(lambda: train_step(training, phase, n))
    flops = sum(r["flops"] for r in rows)
    return dict(seconds=round(seconds, 2), streams=len(rows), generated=sum(r["generated"] for r in rows),
                tflops=round(flops / seconds / 1e12, 1), peak=round(torch.cuda.max_memory_allocated() / 2 ** 30, 1),
                limits=[training.config.micro_prompts, training.config.micro_tokens, training.config.rollout_rows],
                notes=[n["kind"] for n in training.notes])


def decoding(training: Training, rows: int, tokens: int, graphs: bool = False) -> dict:
    "Sampling alone, of one prompt a row's group; the second time, with graphs when they are recorded."
    policy, one = training.base, training.capabilities["text"]
    prompts, policy.graphs = policy.encode(one.train[:rows // 8]), graphs
    def rolled(): return sample(policy, prompts, 8, tokens, source=generator(policy.device, "bench"))
    try:
        with torch.no_grad(), training.accelerator.autocast():
            _, first = timed(rolled)
            torch.cuda.reset_peak_memory_stats()
            out, seconds = timed(rolled)
            off = (out.logp - scored(policy, prompts, out.ids) * out.mask).abs().mean().item() if rows <= 64 else None
            started = launches(rolled) / tokens
    finally: policy.graphs = False
    return dict(rows=rows, tokens=tokens, graphs=graphs, tokens_a_second=round(rows * tokens / seconds),
                milliseconds_a_position=round(1000 * seconds / tokens, 2), first_seconds=round(first, 2),
                launches_a_position=round(started), mean_difference_from_scoring=off and round(off, 5),
                peak=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2))


def scored(policy: Policy, prompts, ids: torch.Tensor) -> torch.Tensor:
    "Log-probabilities of completions, by a pass over them."
    logp = policy.completion_logits(prompts, ids).float().log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0]


def launches(work) -> int:
    "Calls of the driver that start a kernel, a copy or a graph."
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if "Launch" in e.key or e.key.startswith("cudaMemcpy"))


def measure(side: int, prompts: int, tokens: int, steps: int, only_decoding: bool):
    chosen = read_experiment(EXAMPLE)
    rank = chosen.model["lora"]
    config = replace(chosen.config, prompts=prompts, opd_prompts=prompts, max_new_tokens=tokens, micro_prompts=prompts,
                     rollout_rows=prompts * chosen.config.group_size, probe_every=0, eval_every=0)
    planned = next(p.schedule for p in rows_of(chosen)["three_branch"] if p.family == "copd")
    schedule = replace(planned, phases=[replace(p, steps=2) for p in planned.phases if p.cycle == 1])
    plain, seconds = timed(lambda: random_model(side))
    say("model", dict(machine(accelerator_for(config)), torch=torch.__version__,
                      weights=sum(p.numel() for p in plain.model.parameters()), seconds=round(seconds, 1),
                      held=round(torch.cuda.memory_allocated() / 2 ** 30, 2)))
    policy = lora(plain, rank)
    if config.recompute: policy.recompute()
    training = begin(policy, config, schedule, suite())
    for rows in (16, 64, 256):
        for graphs in (False, True): say("decoding", decoding(training, rows, 32, graphs))
    release()
    if only_decoding: return
    size = lora_size(plain.model, rank)
    plan = memory_plan(plain.model.config.get_text_config(), model_shape(plain), schedule, config, size,
                       prompt=side * side // 1024, weight_bytes=2)
    say("plan", dict(zip(plan["item"], plan["GiB"].round(2))))
    for index, phase in enumerate(schedule.phases):
        for n in range(steps): say(f"phase {index}", step(training, phase, n))


def say(what: str, found: dict): print(json.dumps(dict(what=what, **found)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="pixels of a side of a picture")
    parser.add_argument("--prompts", type=int, default=8, help="of a stream in a step, with 8 completions each")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--steps", type=int, default=2, help="of each phase")
    parser.add_argument("--decoding", action="store_true", help="nothing but sampling, with and without CUDA graphs")
    given = parser.parse_args()
    measure(given.side, given.prompts, given.tokens, given.steps, given.decoding)

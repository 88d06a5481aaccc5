"""The models and prompts that both sides read: `python bench/materials.py FOLDER NAME…`."""
import json
import sys
from pathlib import Path

import numpy as np
import torch

from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.policy.toys import minis_base, minis
from copd_nb.policy.core import Policy
from copd_nb.policy.processors import character_tokenizer
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import SFT, Phase, Update
from copd_nb.policy.skills import text_policy

FETCHED = Path(__file__).parents[1] / "models" / "smollm2"  # from `copd fetch smollm2`
PROMPTS = 2048  # written for TRL, in the order in which the engine draws them with seed 0


def small(seed: int = 0) -> Policy:
    "0.34 M parameters."
    return text_policy(96, 3, 4, seed)


def large() -> Policy:
    "25 M parameters."
    return text_policy(512, 8, 8)


def warm(folder: Path, steps: int = 240) -> Policy:
    "`small` after some steps on reference answers: most completions end, some are right."
    rise = steps * 2 // 3
    update = [Update("warm", [SFT("text")])]
    schedule = Schedule("warm", ["warm"], [Phase("rise", rise, update), Phase("fall", steps - rise, update, lr=0.2)],
                        "warm")
    config = Config(prompts=64, learning_rate=3e-3, probe_every=0, eval_every=0, checkpoint_every=steps)
    return train(schedule, minis(("text",)), small(), config, folder / "warm-run", progress=False).result


MODELS = {"small": lambda folder: small(), "teacher": lambda folder: small(1), "large": lambda folder: large(),
          "warm": warm,
          "mini": lambda folder: minis_base(),
          "smollm2": lambda folder: Policy.load(FETCHED),
          "smollm2-teacher": lambda folder: stirred(Policy.load(FETCHED)),
          "tiny": lambda folder: text_policy(128, 2, 4),  # with heads of a size that vLLM has on processors
          "tiny-teacher": lambda folder: stirred(text_policy(128, 2, 4))}


def stirred(policy: Policy, size: float = 0.01) -> Policy:
    "A policy with noise on its weights: a teacher that differs from it."
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters(): p.add_(torch.randn(p.shape, generator=source) * size * p.std())
    return policy


def write_tokens(folder: Path, name: str, model: str):
    "The first prompts as a model's own policy reads them, as text and as token ids."
    examples = minis(("text",))["text"].draw(0, 0, 64)
    encoded = MODELS[model](folder).encode(examples)
    ids = [row[m].tolist() for row, m in zip(encoded.ids, encoded.mask.bool())]
    (folder / f"{name}.json").write_text(json.dumps(dict(prompts=[e.prompt for e in examples], ids=ids)))


def write_prompts(folder: Path, capability: str):
    "Prompts as JSON, in the chat format and as they are; pictures, all of one size, as one array beside it."
    examples = minis((capability,))[capability].draw(0, 0, PROMPTS)
    chat = lambda e: character_tokenizer().apply_chat_template([{"role": "user", "content": e.prompt}],
                                                               add_generation_prompt=True, tokenize=False)
    rows = [dict(prompt=e.prompt, chat=chat(e), answer=e.answer) for e in examples]
    (folder / f"{capability}.json").write_text(json.dumps(rows))
    if pictures := [p for e in examples for p in e.images + e.videos]:
        np.save(folder / f"{capability}.npy", np.stack(pictures))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if name in MODELS: MODELS[name](target).save(target / name)
        elif name.endswith("-tokens"): write_tokens(target, name, name.removesuffix("-tokens"))
        else: write_prompts(target, name)

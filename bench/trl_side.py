"""Worker: training steps of TRL. Runs in the environment of trl-requirements.txt and reads what materials.py wrote."""
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from rewards import digit_share
from serve import Server, device, finish, versions
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3VLForConditionalGeneration, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from copd_nb.policy.processors import load_processor

PLAIN = dict(use_cpu=device() == "cpu", bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
             eval_strategy="no",
             logging_strategy="no", disable_tqdm=True, max_steps=10 ** 6, lr_scheduler_type="constant",
             shuffle_dataset=False,
             temperature=1.0, top_k=0)


class Paced(TrainerCallback):
    "Holds the trainer until a repetition is asked for; its time ends with the optimizer step."
    def __init__(self, server: Server): self.server, self.counts = server, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.server.say(threads=torch.get_num_threads(), versions=versions("torch", "transformers", "trl"),
                        parameters=model.num_parameters())
        self._next()

    def on_step_end(self, args, state, control, **kwargs):
        finish()
        self.server.say(seconds=time.perf_counter() - self.began, **self.counts)
        self._next()

    def _next(self):
        self.server.wait()
        self.counts.clear()
        self.began = time.perf_counter()

    def watch(self, vision: torch.nn.Module):
        "Count the passes of a vision tower that could give it a gradient."
        def seen(*_):
            self.counts["trained_vision_passes"] = self.counts.get("trained_vision_passes", 0) + torch.is_grad_enabled()
        vision.register_forward_pre_hook(seen)


def load(model: Path):
    "Model and processor of a checkpoint."
    if json.loads((model / "config.json").read_text())["model_type"] == "qwen3_vl":
        return Qwen3VLForConditionalGeneration.from_pretrained(model), load_processor(model, "qwen3_vl")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False), tokenizer


def dataset(folder: Path, capability: str) -> Dataset:
    "Prompts for TRL: strings without pictures, else messages; images in a column of their own, videos in the message."
    every = json.loads((folder / f"{capability}.json").read_text())
    if capability == "text": return Dataset.from_list([dict(prompt=r["chat"], answer=r["answer"]) for r in every])
    pictures = np.load(folder / f"{capability}.npy")
    ask = lambda content: [{"role": "user", "content": content}]
    if capability == "image":
        return Dataset.from_list([dict(prompt=ask(r["prompt"]), answer=r["answer"], image=Image.fromarray(p))
                                  for r, p in zip(every, pictures)])
    asked = lambda i: ask([dict(type="video", video=pictures[i]), dict(type="text", text=every[i]["prompt"])])
    numbered = Dataset.from_list([dict(number=i, answer=r["answer"]) for i, r in enumerate(every)])
    return numbered.with_transform(lambda rows: dict(prompt=[asked(i) for i in rows["number"]], answer=rows["answer"]))


def rewarded(name: str, end: int, pace: Paced):
    "A reward function; like the engine's it gives 0 to completions without an end token. Counts tokens on the way."
    exact = lambda text, answer: float(text.rpartition(":")[2].strip() == answer)
    judge = dict(exact=exact, digits=lambda text, answer: digit_share(text))[name]

    def judged(completions, completion_ids, answer, **kwargs) -> list[float]:
        pace.counts["tokens"] = sum(map(len, completion_ids))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [judge(t, a) * (ids[-1] == end) for t, a, ids in zip(texts, answer, completion_ids)]
    return judged


def grpo(server: Server, folder: Path, out: str, model: str, capability: str, reward: str, prompts: int,
         group_size: int, max_new_tokens: int, learning_rate: float, rank: int | None = None,
         precision: str | None = None, parts: int = 1) -> GRPOTrainer:
    "GRPO with the token-normalised loss and clipping of the engine's default: TRL calls it dapo."
    policy, processor = load(folder / model)
    tokenizer, pace = getattr(processor, "tokenizer", processor), Paced(server)
    if tokenizer is not processor: pace.watch(policy.model.visual)
    settings = PLAIN | dict(bf16=precision == "bf16")
    if precision: settings["generation_kwargs"] = dict(min_new_tokens=max_new_tokens)  # completions of one length
    settings = GRPOConfig(out, **settings, learning_rate=learning_rate, num_generations=group_size,
                          per_device_train_batch_size=prompts * group_size // parts, gradient_accumulation_steps=parts,
                          max_completion_length=max_new_tokens, beta=0.0, loss_type="dapo", epsilon=0.2,
                          epsilon_high=0.28)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None
    return GRPOTrainer(policy, rewarded(reward, tokenizer.eos_token_id, pace), settings, dataset(folder, capability),
                       processing_class=processor, callbacks=[pace], peft_config=adapter)


def opd(server: Server, folder: Path, out: str, model: str, teacher: str, capability: str, prompts: int,
        group_size: int,
        max_new_tokens: int, learning_rate: float, exact: bool = False, parts: int = 1) -> DistillationTrainer:
    "On-policy distillation with the whole-vocabulary reverse KL; without groups, so prompts are repeated."
    (policy, tokenizer), (frozen, _) = load(folder / model), load(folder / teacher)
    more = dict(generation_kwargs=dict(min_new_tokens=max_new_tokens)) if exact else {}
    settings = DistillationConfig(out, **PLAIN | more, learning_rate=learning_rate, beta=1.0,
                                  per_device_train_batch_size=prompts * group_size // parts,
                                  gradient_accumulation_steps=parts, max_completion_length=max_new_tokens)
    each = dataset(folder, capability)
    repeated = each.select([i for i in range(len(each)) for _ in range(group_size)])
    return DistillationTrainer(policy, frozen, settings, repeated, processing_class=tokenizer,
                               callbacks=[Paced(server)])


def main(job: str, folder: str, **task):
    "Train until the requests end."
    server, make = Server(), dict(grpo=grpo, opd=opd)[job]
    with tempfile.TemporaryDirectory() as out: make(server, Path(folder), out, **task).train()


if __name__ == "__main__": main(**json.loads(sys.argv[1]))

"What `GapCallback` costs in TRL's trainers, and that losses and weights stay the same: `python bench/gap_callback.py`."
import contextlib
import io
import tempfile
import time

import copd_nb  # sets the threads' waiting before torch loads
import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from copd_nb.data.capability import Example
from copd_nb.policy.processors import character_tokenizer

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(1, 9) for b in range(1, 9)]
EVERY, STEPS = 10, 30


def model(seed: int) -> LlamaForCausalLM:
    "4.8 million parameters with dropout in the attention."
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, attention_dropout=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def digits(completions, **_): return [float(sum(c.isdigit() for c in text)) for text in completions]


def trained(kind: str, watched: bool, folder: str):
    "A trainer after its training, and the seconds it took."
    tokenizer, teacher = character_tokenizer(), model(1)
    shared = dict(output_dir=folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-4, seed=3,
                  use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1)
    rows = Dataset.from_list([dict(prompt=q) | (dict(completion=a) if kind == "SFTTrainer" else {}) for q, a in SUMS])
    if kind == "SFTTrainer":
        trainer = trl.SFTTrainer(model(0), trl.SFTConfig(**shared), train_dataset=rows, processing_class=tokenizer)
    else:
        args = trl.GRPOConfig(**shared, num_generations=8, max_completion_length=16)
        trainer = trl.GRPOTrainer(model(0), digits, args, train_dataset=rows, processing_class=tokenizer)
    if watched:
        prompts = [Example(q, a, "sums") for q, a in SUMS[:16]]
        trainer.add_callback(copd_nb.GapCallback(trainer, prompts, (teacher, tokenizer), every=EVERY, reward="exact",
                                                 max_new_tokens=16, chat_template="plain"))
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): trainer.train()
    return trainer, time.perf_counter() - began


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print("| trainer | losses equal | weights equal | a step, s | a call, s | share of the time |")
    print("|---|---|---|---|---|---|")
    for kind in ("SFTTrainer", "GRPOTrainer"):
        with tempfile.TemporaryDirectory() as folder:
            (one, seconds), (other, _) = trained(kind, False, folder), trained(kind, True, folder)
        losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (one, other)]
        states = (t.model.state_dict().values() for t in (one, other))
        calls = [row for row in other.state.log_history if "gap/share" in row]
        took, share = ([row[f"gap/{name}"] for row in calls] for name in ("seconds", "share"))
        print(f"| {kind} | {losses[0] == losses[1]} | {all(map(torch.equal, *states))} | {seconds / STEPS:.2f} | "
              f"{min(took):.2f} to {max(took):.2f} | {min(share):.0%} to {max(share):.0%} |")

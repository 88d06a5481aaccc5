"""Completions of exactly one length: from the engine's own sampler, and from vLLM."""
from dataclasses import replace

import torch

from copd_nb.engine import streams
from copd_nb.policy.core import Policy
from copd_nb.scale import vllm
from copd_nb.signals.rollouts import Request, Rollouts
from copd_nb.signals.sampling import sample_many


def force(length: int):
    "From now on the engine's own sampler ends every row with its `length`-th token."
    def forced(policy: Policy, requests: list[Request], *options) -> list[Rollouts]:
        rows = lambda r: torch.full((len(r.prompts) * r.group_size,), length)
        return sample_many(policy, [replace(r, lengths=rows(r)) for r in requests], *options)
    streams.sample_many = forced


def vllm_options(precision: str | None, room: int) -> dict:
    "Options of `vllm.LLM` on a processor; the cache has room for 64 rows of 256 tokens of SmolLM2 and their prompts."
    return dict(dtype="bfloat16" if precision == "bf16" else "float32", enforce_eager=True, max_model_len=room,
                kv_cache_memory_bytes=2 ** 30)


def vllm_sampler(length: int, precision: str | None) -> vllm.VllmSampler:
    "A `VllmSampler` none of whose rows ends before its `length`-th token."
    plain = vllm._params

    def forced(*asked) -> list:
        params = plain(*asked)
        for row in params: row.min_tokens = length
        return params
    vllm._params = forced
    return vllm.VllmSampler(**vllm_options(precision, length + 64))

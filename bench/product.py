"""Worker: the machine's matrix-product rate in fp32 or bf16, by the fastest library that PyTorch has here."""
import json
import sys
import time

import torch
from serve import Server

from copd_nb.policy.products import product


def fastest(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tries: int = 5) -> float:
    "Seconds of the fastest of some products, of PyTorch's own and of oneDNN where the engine takes it."
    def once(multiply) -> float:
        began = time.perf_counter()
        multiply()
        return time.perf_counter() - began
    ways = lambda: torch.mm(a, b, out=out), lambda: product(a, b.t())
    return min(once(way) for _ in range(tries) for way in ways)


def main(size: int, precision: str = "fp32"):
    "Products of two (size, size) matrices."
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    Server().serve(lambda: dict(seconds=fastest(a, b, out), flops=2 * size ** 3), threads=torch.get_num_threads())


if __name__ == "__main__": main(**json.loads(sys.argv[1]))

"Run by two processes: the gradients of `TrlLearner` in two processes are those of the engine in one."
import copy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "scale"))
from test_bridge import CONFIG, begin, flat, near, scored  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from copd_nb.scale.trl import TrlLearner  # noqa: E402
from copd_nb.engine.update import gradients_of  # noqa: E402


def sharded(policy):
    mesh = init_device_mesh("cpu", (2,))
    for part in (*policy.model.model.layers, policy.model): fully_shard(part, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in policy.parameters())


def agrees(kind, name, shard, changes, folder):
    "Compare both on the same rollouts."
    training = begin(kind, replace(CONFIG, **changes), folder)
    batches, learner = scored(training, name), TrlLearner()
    ours, theirs = ([copy.copy(b) for b in batches] for _ in range(2))
    gradients, losses = gradients_of(training, name, ours)
    if shard: sharded(training.branch(name).policy)
    found, lost = learner.gradients(training, name, theirs)
    assert learner.trainer(training, name).accelerator.num_processes == 2 and list(found) == list(gradients)
    for stream, gradient in gradients.items():
        whole = flat([g.full_tensor() if isinstance(g, DTensor) else g for g in found[stream]])
        assert near(whole, flat(gradient)) and abs(lost[stream] - losses[stream]) < 1e-4
    for a, b in zip(ours, theirs):
        for field in ("logp", "old_logp", "entropy"): assert torch.allclose(getattr(a, field), getattr(b, field),
                                                                            atol=1e-4)
    if dist.get_rank() == 0: print(kind, "sharded" if shard else "whole", "agrees", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind, name, shard in (("qwen3", "text", False), ("qwen3", "text", True), ("vision", "image", False),
                              ("adapters", "text", False)):
        for changes in (dict(), dict(micro_tokens=4, reduction="sequence")):
            with tempfile.TemporaryDirectory() as folder: agrees(kind, name, shard, changes, Path(folder))
    dist.destroy_process_group()

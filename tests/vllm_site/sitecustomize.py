"""Every process of `make test-vllm` loads this. The usual torchvision is built for CUDA; beside a torch for processors
its library can't be loaded and its import fails, for want of two operators that no test calls. They are declared before
it loads. Where its library can be loaded nothing is done."""
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def loads(folder):
    "Whether the library in a folder of torchvision can be loaded."
    import torch
    for file in Path(folder).glob("_C*.so"):
        try: torch.ops.load_library(str(file))
        except OSError: return False
    return True


class Operators:
    "A finder that finds nothing: it declares what torchvision lacks when somebody looks for it."
    def find_spec(self, name, path=None, target=None):
        torch = sys.modules.get("torch")
        if name != "torchvision" or torch and not hasattr(torch, "ops"): return None  # torch is being imported
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(name, path)
        if found is not None and not loads(found.submodule_search_locations[0]): self.declare()
        return None

    def declare(self):
        import torch
        self.library = library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torchvision._declared"] = self  # a library's operators go with it


sys.meta_path.insert(0, Operators())

"""The few calls of vLLM that `VllmSampler` makes; a tiny policy samples. Names and signatures are those of 0.30.

It has the properties of the real one that made the sampler fail when it first met it: dummy weights fill buffers, a
tied head multiplies by a packed copy of its weights where there is no card, pictures are encoded once whatever becomes
of the weights, greedy rows are reported at temperature 1, more than 20 log-probabilities are refused, the engine has no
sleep mode and no CUDA memory to share without a card, and a folder must name processors that transformers has."""
import json
import sys
from collections import namedtuple
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers
from torch import nn

from copd_nb.scale import vllm, vllm_weights

ParamMeta = namedtuple("ParamMeta", "name dtype shape")
Logprob = namedtuple("Logprob", "logprob rank")


@dataclass
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    logit_bias: dict | None = None
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class WeightTransferConfig:
    backend: str


@dataclass(kw_only=True)
class IPCTrainerInitInfo:
    rank: int
    packed: bool = False


class WeightSource: "Base class of a transfer's source."


class WeightTransferTrainerFactory:
    @staticmethod
    def trainer_init(init_info, *, client, source):
        if current_platform.is_cpu(): raise RuntimeError("no CUDA GPUs are available")
        client.init_weight_transfer_engine(dict(packed=init_info.packed))
        return Transfer(client, source)


class Transfer:
    "Sends in two chunks, and fails if the source's metadata and tensors disagree."
    def __init__(self, client, source): self.client, self.source = client, source

    def send_weights(self):
        pairs, said = list(self.source), self.source.metadata()
        assert [(n, x.dtype, tuple(x.shape)) for n, x in pairs] == [tuple(m) for m in said]
        self.client.start_weight_update()
        for chunk in (pairs[:3], pairs[3:]):
            self.client.update_weights(dict(names=[n for n, _ in chunk], tensors=[x.clone() for _, x in chunk]))
        self.client.finish_weight_update()


class Platform:
    card = False
    def is_cpu(self): return not self.card


current_platform, LOADERS = Platform(), {}


def register_model_loader(name):
    def kept(loader):
        LOADERS[name] = loader
        return loader
    return kept


@register_model_loader("dummy")
class DummyModelLoader:
    "Small random numbers in all that a model holds."
    @torch.no_grad()
    def load_weights(self, model, model_config):
        source = torch.Generator().manual_seed(0)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point(): tensor.copy_(torch.randn(tensor.shape, generator=source) * 1e-3)


class ParallelLMHead(nn.Linear):
    "An output head. Where there is no card it multiplies by a copy of its weights, made when they were loaded."
    @property
    def quant_method(self): return self
    def process_weights_after_loading(self, head): head.packed = head.weight.detach().clone()
    def forward(self, x): return nn.functional.linear(x, self.packed if current_platform.is_cpu() else self.weight)


class Encoder:
    "A vision tower that remembers what it made of pictures it has seen."
    def __init__(self, tower):
        self.run, self.known = tower.forward, {}
        tower.forward = self

    def __call__(self, pixels, grid_thw, **more):
        key = pixels.numpy().tobytes(), grid_thw.numpy().tobytes()
        if key not in self.known: self.known[key] = self.run(pixels, grid_thw=grid_thw, **more)
        return type(self.known[key])(**self.known[key])  # the caller writes into it


class Worker:
    "Holds the model; an extension's methods are added to it."
    def __init__(self, model):
        self.model, self.device = model, torch.device("cuda" if current_platform.card else "cpu")
        self.model.lm_head.__class__ = ParallelLMHead
        self.encoders = [Encoder(part) for name, part in model.named_modules() if name.endswith("visual")]

    def get_model(self): return self.model

    @torch.no_grad()
    def load(self, pairs):
        "Copy in weights; layers that get some are processed, a tied head gets none."
        own = self.model.state_dict()
        for name, tensor in pairs:
            own[name].copy_(tensor)
            if name == "lm_head.weight": self.model.lm_head.process_weights_after_loading(self.model.lm_head)

    def reload_weights(self, weights_iterator): self.load(weights_iterator)


def check_folder(folder):
    "Like vLLM, fail for a folder that names a processor which transformers doesn't have."
    for file in Path(folder).glob("*processor_config.json"):
        said = json.loads(file.read_text())
        for part in (said, *(v for v in said.values() if isinstance(v, dict))):
            for name in (part.get("processor_class"), part.get("video_processor_type")):
                if name and not hasattr(transformers, name): raise ValueError(f"unrecognised processor {name}")


class LLM:
    "An engine with random weights until it is sent others; records its calls."
    make = None  # () → Policy, set by a test

    def __init__(self, model, load_format="auto", logprobs_mode="raw_logprobs", weight_transfer_config=None,
                 enable_sleep_mode=False, max_logprobs=20, worker_extension_cls="", **options):
        assert logprobs_mode == "processed_logprobs"
        if weight_transfer_config is not None: assert weight_transfer_config.backend == "ipc"
        if enable_sleep_mode and current_platform.is_cpu(): raise ValueError("Sleep mode is not supported on cpu")
        check_folder(model)
        self.model, self.options, self.sleeps, self.most = model, options, enable_sleep_mode, max_logprobs
        self.policy, self.calls, self.updating, self.asleep = type(self).make(), [], False, set()
        place, _, name = worker_extension_cls.rpartition(".")
        extension = (getattr(import_module(place), name),) if name else ()
        self.worker, self.llm_engine = type("Extended", (Worker, *extension), {})(self.policy.model), self
        LOADERS[load_format]().load_weights(self.policy.model, None)
        self.policy.model.lm_head.process_weights_after_loading(self.policy.model.lm_head)
        self.stale = False  # keys of old weights in the prefix cache

    def collective_rpc(self, method, args=()):
        assert method in dir(self.worker) and "weights" not in self.asleep
        found, self.stale = getattr(self.worker, method)(*args), True
        self.calls.append("update")
        return [found]

    def init_weight_transfer_engine(self, request): self.calls.append(("init", request["init_info"]))

    def start_weight_update(self):
        assert not self.updating and "weights" not in self.asleep
        self.updating = True

    def update_weights(self, request):
        assert self.updating
        info = request["update_info"]
        self.worker.load(zip(info["names"], info["tensors"], strict=True))

    def finish_weight_update(self):
        self.updating, self.stale = False, True
        self.calls.append("update")

    def reset_encoder_cache(self):
        for encoder in self.worker.encoders: encoder.known.clear()

    def reset_prefix_cache(self):
        self.stale = False
        self.calls.append("reset")

    def sleep(self, level=1):
        assert self.sleeps and level == 2
        self.asleep = {"weights", "kv_cache"}
        self.calls.append("sleep")
        with torch.no_grad():
            for p in self.policy.parameters(): p.zero_()

    def wake_up(self, tags):
        assert self.asleep >= set(tags)
        self.asleep -= set(tags)
        self.calls.append(("wake", *tags))

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert not self.asleep and not self.updating and not self.stale and len(prompts) == len(sampling_params)
        if 0 <= self.most < max(p.logprobs for p in sampling_params):
            raise ValueError(f"more sample logprobs than max allowed: {self.most}")
        self.calls.append("generate")
        self.asked, self.params = prompts, sampling_params
        return [self.row(p, s) for p, s in zip(prompts, sampling_params)]

    def processed(self, prompt):
        "Ids and tensors of a prompt: given ids as they are, text with its pictures through the checkpoint's processor."
        if "prompt_token_ids" in prompt: return dict(input_ids=torch.tensor([prompt["prompt_token_ids"]]))
        data, visual = prompt["multi_modal_data"], {}
        if "image" in data: visual["images"] = data["image"]
        if "video" in data:
            visual["videos"] = [frames for frames, _ in data["video"]]
            times = [{k: v for k, v in said.items() if k != "do_sample_frames"} for _, said in data["video"]]
            visual |= dict(video_metadata=times, do_sample_frames=data["video"][0][1]["do_sample_frames"])
        return dict(self.policy.processor(text=[prompt["prompt"]], return_tensors="pt", **visual))

    @torch.no_grad()
    def row(self, prompt, params):
        given, tokens, said = self.processed(prompt), [], []
        ids = given.pop("input_ids")
        kinds = given.pop("mm_token_type_ids", torch.zeros_like(ids))
        given.pop("attention_mask", None)
        source = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        for _ in range(params.max_tokens):
            seen = torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], 1)
            where = torch.cat([kinds, torch.zeros(1, len(tokens), dtype=kinds.dtype)], 1)
            logits = self.policy.model(input_ids=seen, attention_mask=torch.ones_like(seen), mm_token_type_ids=where,
                                       use_cache=False, **given).logits[0, -1].float()
            for i, value in (params.logit_bias or {}).items(): logits[i] += value
            logp = (logits / (params.temperature or 1.0)).log_softmax(-1)
            token = int(logp.argmax() if params.temperature == 0 else logp.exp().multinomial(1, generator=source))
            tokens.append(token)
            order = logp.argsort(descending=True).tolist()
            said.append(
                {i: Logprob(logp[i].item(), order.index(i) + 1)
                 for i in dict.fromkeys([token, *order[:params.logprobs]])})
            if token in params.stop_token_ids: break
        out = SimpleNamespace(token_ids=tokens, logprobs=said,
                              finish_reason="stop" if tokens[-1] in params.stop_token_ids else "length")
        return SimpleNamespace(prompt_token_ids=ids[0].tolist(), outputs=[out])


def modules() -> dict:
    "The entries of `sys.modules` where vLLM is installed."
    def module(name, **names):
        made = ModuleType(name)
        vars(made).update(names)
        return made
    transfer = dict(ParamMeta=ParamMeta, WeightSource=WeightSource,
                    WeightTransferTrainerFactory=WeightTransferTrainerFactory)
    loaders = dict(register_model_loader=register_model_loader)
    return {"vllm": module("vllm", LLM=LLM, SamplingParams=SamplingParams),
            "vllm.platforms": module("vllm.platforms", current_platform=current_platform),
            "vllm.model_executor": module("vllm.model_executor"),
            "vllm.model_executor.model_loader": module("vllm.model_executor.model_loader", **loaders),
            "vllm.model_executor.model_loader.dummy_loader": module(
                "vllm.model_executor.model_loader.dummy_loader", DummyModelLoader=DummyModelLoader),
            "vllm.config": module("vllm.config", WeightTransferConfig=WeightTransferConfig),
            "vllm.distributed": module("vllm.distributed"),
            "vllm.distributed.weight_transfer": module("vllm.distributed.weight_transfer", **transfer),
            "vllm.distributed.weight_transfer.ipc_engine": module(
                "vllm.distributed.weight_transfer.ipc_engine", IPCTrainerInitInfo=IPCTrainerInitInfo)}


def install(monkeypatch, make, card=False):
    """Put the fake in the place of vLLM; its engines begin with the policy that `make` gives. With `card` weights go
    as handles, although policies here are on the processor."""
    for name, made in modules().items(): monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(LLM, "make", staticmethod(make))
    monkeypatch.setattr(Platform, "card", card)
    if card: monkeypatch.setattr(vllm, "way_for", lambda policy, on_card: vllm_weights._Handles)

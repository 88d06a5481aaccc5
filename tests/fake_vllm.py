"The few calls of vLLM that `VllmSampler` makes, as in its documentation (0.29 to 0.32); a tiny policy samples."
import sys
from collections import namedtuple
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch

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


class LLM:
    "An engine with random weights until it is sent others; records its calls."
    make = None  # () → Policy, set by a test

    def __init__(self, model, load_format="auto", logprobs_mode="raw_logprobs", weight_transfer_config=None,
                 enable_sleep_mode=False, **options):
        assert load_format == "dummy" and logprobs_mode == "processed_logprobs"
        assert weight_transfer_config.backend == "ipc"
        self.model, self.options, self.sleeps = model, options, enable_sleep_mode
        self.policy, self.calls, self.updating, self.asleep = type(self).make(), [], False, set()

    def init_weight_transfer_engine(self, request): self.calls.append(("init", request["init_info"]))

    def start_weight_update(self):
        assert not self.updating and "weights" not in self.asleep
        self.updating = True

    @torch.no_grad()
    def update_weights(self, request):
        assert self.updating
        own = self.policy.model.state_dict()
        for name, tensor in zip(request["update_info"]["names"], request["update_info"]["tensors"], strict=True):
            own[name].copy_(tensor)

    def finish_weight_update(self):
        self.updating = False
        self.calls.append("update")

    def reset_prefix_cache(self): self.calls.append("reset")

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
        assert not self.asleep and not self.updating and len(prompts) == len(sampling_params)
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
    return {"vllm": module("vllm", LLM=LLM, SamplingParams=SamplingParams),
            "vllm.config": module("vllm.config", WeightTransferConfig=WeightTransferConfig),
            "vllm.distributed": module("vllm.distributed"),
            "vllm.distributed.weight_transfer": module("vllm.distributed.weight_transfer", **transfer),
            "vllm.distributed.weight_transfer.ipc_engine": module(
                "vllm.distributed.weight_transfer.ipc_engine", IPCTrainerInitInfo=IPCTrainerInitInfo)}


def install(monkeypatch, make):
    "Put the fake in the place of vLLM; its engines begin with the policy that `make` gives."
    for name, made in modules().items(): monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(LLM, "make", staticmethod(make))

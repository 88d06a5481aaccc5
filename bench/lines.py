"""What is compared with what."""
from dataclasses import dataclass, replace

from contest import Case, Side

# every idea off but skip_flat, which has a case of its own
PLAIN = dict(shared_prompt=False, drop_finished=False, pack=False, keep_prefill=False)
SMALL, LARGE = "0.34 M", "25 M"


@dataclass(frozen=True)
class Preset:
    "Sizes of the work."
    prompts: int = 32
    group_size: int = 8
    large: str = "large"  # the model of the lines about 25 M parameters
    product: int = 2048  # side of the matrices whose product is the peak
    vocabulary: int = 151_936
    hidden: int = 1024
    rows: int = 8  # of 2,048 tokens that are scored
    naive_rows: int = 4  # of them where every logit exists: 15 GiB at the peak
    gap_rows: int = 64  # completions of 512 tokens that two policies are compared on
    gap_naive_rows: int = 24  # of them where every logit of both exists
    gap_vocabulary: int = 49_152
    branches: tuple = (2, 3, 4, 6)
    lengths: tuple = (16, 32, 64, 128, 256)
    copies: tuple = (2, 3, 4)  # branches as LoRA adapters and as full copies
    layers: int = 30  # of their model: SmolLM2-135M
    real: str = "smollm2"  # the pretrained model
    real_teacher: str = "smollm2-teacher"
    real_lengths: tuple = (64, 256)
    real_batches: tuple = ((8, 8), (16, 4))  # prompts and completions of each
    report: tuple = ("--preset", "quick")  # of `copd compare minis`

PRESETS = dict(full=Preset(), smoke=Preset(4, 4, "small", 256, 1000, 32, 2, 1, 4, 2, 1000, (2, 3), (16, 32, 64), (2,),
                                           2, "tiny", "tiny-teacher", (8,), ((2, 2),), ("--quick",)))


@dataclass(frozen=True)
class Lines:
    "All cases of a preset."
    preset: Preset
    folder: str  # of the models and prompts
    device: str = "cpu"  # where models are trained

    @property
    def batch(self) -> dict:
        return dict(prompts=self.preset.prompts, group_size=self.preset.group_size, learning_rate=4e-5)

    def ours(self, name: str, job: str, **task) -> Side:
        "A side of copd_nb that trains; flat groups are trained like all others unless the task says something else."
        return Side(name, "ours", dict(job=job, folder=self.folder, **self.batch) | dict(skip_flat=False) | task)

    def trl(self, name: str, job: str, **task) -> Side:
        return Side(name, "trl_side", dict(job=job, folder=self.folder, **self.batch) | task, place="trl")

    def peak(self, precision: str = "fp32") -> Side:
        "The yardstick of what is possible."
        more = {} if precision == "fp32" else dict(precision=precision)
        return Side("matrix product", "product", dict(size=self.preset.product) | more, compared=False)

    def text(self) -> list[Case]:
        "Line 1: text, small model; and the same as it would be trained."
        def case(title, model, reward, limit, aim, **flags):
            task = dict(model=model, capability="text", reward=reward, max_new_tokens=limit)
            sides = self.ours("copd_nb", "grpo", **task, **flags), self.trl("TRL", "grpo", **task)
            if self.device == "cuda": sides = *sides, self.ours("graphs", "grpo", **task, **flags, graphs=True)
            return Case(1, f"{title}, {self.preset.prompts} × {self.preset.group_size} × {limit}", sides, 15, aim=aim)
        return [case(f"GRPO step, text, {SMALL}", "small", "digits", 8, dict(TRL=2.0)),
                case("as shipped: warm-started, exact reward, flat groups skipped", "warm", "exact", 10, {},
                     skip_flat=True)]

    def large(self) -> list[Case]:
        "Line 2: text, large model, with the peak of the machine beside it."
        task = dict(model=self.preset.large, capability="text", reward="digits", max_new_tokens=8)
        sides = self.ours("copd_nb", "grpo", **task), self.trl("TRL", "grpo", **task), self.peak()
        return [Case(2, f"GRPO step, text, {LARGE}", sides, 7, warmup=1, aim=dict(TRL=1.5), peak_aim=0.55)]

    def pictures(self) -> list[Case]:
        "Line 3: image and video, the shipped base."
        def case(name, aim, other, note=""):
            task = dict(model="mini", capability=name, reward="exact", max_new_tokens=10)
            sides = (self.ours("copd_nb", "grpo", **task),
                     self.ours("own prompts", "grpo", **task, shared_prompt=False),
                     self.ours("plain", "grpo", **task, **PLAIN), self.trl(other, "grpo", **task))
            return Case(3, f"GRPO step, {name}, 1.3 M Qwen3-VL", sides, 9, aim={"plain": aim, other: 3.0}, note=note)
        blind = ("TRL shows the video to `generate` but not to its training pass (`trained_vision_passes` is 0 in "
                 "results.json): "
                 "it does less work than copd_nb")
        return [case("image", 3.0, "TRL"), case("video", 5.0, "TRL, blind training pass", blind)]

    def distillation(self) -> list[Case]:
        "Line 4: on-policy distillation."
        task, half = dict(model="small", teacher="teacher", capability="text",
                          max_new_tokens=8), self.preset.prompts // 2
        ours = lambda name, estimator: self.ours(f"copd_nb, {name}", "opd", **task, opd_prompts=half,
                                                 estimator=estimator)
        sides = ours("reverse KL", "reverse"), ours("sampled", "sampled"), self.trl("TRL, reverse KL", "opd", **task,
                prompts=half)
        return [Case(4, f"OPD step, text, {SMALL}, teacher of the same size", sides, 15, aim={"TRL, reverse KL": 2.0})]

    def scoring(self) -> list[Case]:
        "Line 5: chunked against naive output head; time and memory."
        p = self.preset

        def case(rows, backward, *ways):
            task = dict(job="scores", rows=rows, tokens=2048, vocabulary=p.vocabulary, hidden=p.hidden,
                        backward=backward)
            what = "score and differentiate" if backward else "score"
            title = f"{what} {rows} × 2,048 tokens, vocabulary {p.vocabulary:,}"
            aim = {} if backward else dict(naive=1 / 1.2)
            return Case(5, title, tuple(Side(way, "ours", task | dict(way=way)) for way in ways), 2, warmup=0, aim=aim)
        return [case(p.naive_rows, False, "chunked", "naive"), case(1, True, "chunked", "naive"),
                case(p.rows, False, "chunked")]

    def finished(self) -> list[Case]:
        "Line 6: rows that end early."
        task = dict(model="small", shortest=8, longest=128)
        stay = dict(task, drop_finished=False)
        sides = (self.ours("copd_nb", "forced", **task), self.ours("finished rows stay", "forced", **stay),
                 self.ours("they stay, padding is trained", "forced", **stay, pack=False))
        aim = {"they stay, padding is trained": 2.0}
        return [Case(6, f"GRPO step, text, {SMALL}, completions of 8 to 128 tokens", sides, 5, warmup=1, aim=aim)]

    def growth(self) -> list[Case]:
        "Line 7: more branches, longer completions."
        def branches(topology):
            task = dict(model="small", topology=topology, opd_prompts=self.preset.prompts // 2, max_new_tokens=8)
            sides = tuple(self.ours(f"K = {k}", "growth", **task, branches=k) for k in self.preset.branches)
            return Case(7, f"CoPD Phase II step, {topology}", sides, 5, warmup=1, fit="signals")
        lengths = tuple(self.ours(f"{n} tokens", "forced", model="small", shortest=n, longest=n)
                        for n in self.preset.lengths)
        return [branches("pairwise"), branches("hub"), Case(7, "GRPO step, completion length", lengths, 3, warmup=1,
                                                            fit="tokens")]

    def cold(self) -> list[Case]:
        "Line 8: fresh processes."
        empty = Side("empty program", "command", dict(words=["python", "-c", "pass"]), compared=False)
        commands = {"import copd_nb": (["python", "-c", "import copd_nb"], 1.0),
                    "copd --help": (["copd", "--help"], 0.5),
                    "import copd_nb.engine": (["python", "-c", "import copd_nb.engine"], None)}
        return [Case(8, f"{name}, cold", (Side(name, "command", dict(words=words)), empty), 7, warmup=1, within=within)
                for name, (words, within) in commands.items()]

    def gaps(self) -> list[Case]:
        "Line 9: the behavioural gap of two policies; time and memory."
        p = self.preset

        def case(rows, *ways):
            task = dict(job="gap", rows=rows, tokens=512, vocabulary=p.gap_vocabulary, hidden=576)
            title = f"behavioural gap on {rows} × 512 tokens, vocabulary {p.gap_vocabulary:,}"
            return Case(9, title, tuple(Side(way, "ours", task | dict(way=way)) for way in ways), 2, warmup=0)
        return [case(p.gap_naive_rows, "behavior_gap", "naive"), case(p.gap_rows, "behavior_gap")]

    def adapters(self) -> list[Case]:
        "Line 10: K branches as LoRA adapters on one base, and as full copies; memory and time."
        def case(k):
            task = dict(branches=k, layers=self.preset.layers, hidden=576, vocabulary=self.preset.gap_vocabulary,
                        prompts=4, opd_prompts=2, group_size=4, max_new_tokens=8)
            sides = tuple(self.ours(way, "branches", **task, way=way) for way in ("LoRA", "full copies"))
            return Case(10, f"CoPD Phase II step, pairwise, K = {k}, 135 M parameters", sides, 2, warmup=1)
        return [case(k) for k in self.preset.copies]

    def pretrained(self) -> list[Case]:
        "Line 11: a pretrained model, completions of one length, full copies and LoRA, fp32 and bf16."
        batch = dict(model=self.preset.real, prompts=8, group_size=8)

        def case(limit, rank, precision):
            parts = 4 if limit <= 64 else 8  # of an update, so that all sides together fit into 24 GiB
            task = dict(batch, shortest=limit, longest=limit, rank=rank, micro_prompts=8 // parts)
            theirs = dict(batch, capability="text", reward="digits", max_new_tokens=limit, rank=rank,
                          precision=precision, parts=parts)
            sides = [self.ours("copd_nb", "forced", **task, precision=precision), self.trl("TRL", "grpo", **theirs)]
            if precision == "bf16": sides.insert(1, self.ours("copd_nb, fp32", "forced", **task))
            how = f"{f'LoRA of rank {rank}' if rank else 'full copy'}, {precision}"
            return Case(11, f"GRPO step, {self.preset.real}, 8 × 8 × {limit}, {how}", (*sides, self.peak(precision)), 3,
                        warmup=1, peak_aim=0.75 if precision == "fp32" else None, rate=True,
                        aim={"TRL": 2.5} if precision == "fp32" else {"copd_nb, fp32": 1.8})

        def sampled(limit, precision):
            parts = 4 if limit <= 64 else 8  # of an update: vLLM holds a copy of the weights and a cache beside it
            task = dict(batch, max_new_tokens=limit, micro_prompts=8 // parts, precision=precision)
            theirs = self.ours("copd_nb with VllmSampler", "exact", **task, sampler="vllm")
            sides = self.ours("copd_nb", "exact", **task), replace(theirs, place="vllm"), self.peak(precision)
            return Case(11, f"GRPO step with VllmSampler, {self.preset.real}, 8 × 8 × {limit}, full copy, {precision}",
                        sides, 2, warmup=1, rate=True)
        return [case(limit, rank, precision) for limit in self.preset.real_lengths
                for rank, precision in ((None, "fp32"), (16, "fp32"), (None, "bf16"))] + [
                    sampled(limit, precision) for limit in self.preset.real_lengths for precision in ("fp32", "bf16")]

    def sampling(self) -> list[Case]:
        "Line 12: sampling alone, the same prompts as token ids, completions of one length."
        limit = self.preset.real_lengths[0]

        def case(prompts, group_size, precision):
            task = dict(folder=self.folder, model=self.preset.real, tokens=f"{self.preset.real}-tokens",
                        prompts=prompts, group_size=group_size, length=limit, precision=precision)
            sides = tuple(Side(name, "sampling", task | dict(way=way), place=place) for name, way, place in (
                ("copd_nb", "copd_nb", "own"), ("transformers", "transformers", "own"), ("vLLM", "vllm", "vllm")))
            aim = dict.fromkeys(("transformers", "vLLM"), 2.0 if precision == "fp32" else 1.5)
            return Case(12, f"sampling, {self.preset.real}, {prompts} × {group_size} × {limit}, {precision}",
                        (*sides, self.peak(precision)), 3, warmup=1, aim=aim, rate=True)
        return [case(*batch, precision) for batch in self.preset.real_batches for precision in ("fp32", "bf16")]

    def taught(self) -> list[Case]:
        "Line 13: on-policy distillation of a pretrained model from a teacher of its size."
        limit, sizes = self.preset.real_lengths[0], dict(group_size=8)
        task = dict(sizes, model=self.preset.real, teacher=self.preset.real_teacher, capability="text",
                    max_new_tokens=limit)
        ours = self.ours("copd_nb, reverse KL", "opd", **task, opd_prompts=8, estimator="reverse", micro_prompts=2,
                         exact=True)
        theirs = self.trl("TRL, reverse KL", "opd", **task | dict(prompts=8), exact=True, parts=4)
        return [Case(13, f"OPD step, {self.preset.real}, teacher of its size, 8 × 8 × {limit}, fp32",
                     (ours, theirs, self.peak()), 3, warmup=1, aim={"TRL, reverse KL": 2.0}, rate=True)]

    def report(self) -> list[Case]:
        "Line 14: `make report`, from nothing to the page."
        words = ["copd", "compare", "minis", *self.preset.report, "--store", "{new}/runs", "--out", "{new}/report"]
        return [Case(14, f"make report: copd compare minis {' '.join(self.preset.report)}",
                     (Side("copd compare", "command", dict(words=words)),), 1, warmup=0, within=300)]

    def cases(self) -> list[Case]:
        "Every line, in order."
        parts = (self.text, self.large, self.pictures, self.distillation, self.scoring, self.finished, self.growth,
                 self.cold, self.gaps, self.adapters, self.pretrained, self.sampling, self.taught, self.report)
        return [case for part in parts for case in part()]

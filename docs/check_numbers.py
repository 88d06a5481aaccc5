"""Every number of the README's findings and the six answers, from the records: `python docs/check_numbers.py`"""
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from copd_nb.analysis.deciding import MATTERS
from from_records import (  # beside this file
    AGAIN, BALANCE, CO, Counted, DYNAMICS, FALLING, LONG, MAP, Measured, PARTS, SMOL, UNEVEN, again, ahead_of, against,
    below_base, between, chance, co, conflicting, distance, ends, found, gradients, in_balance, in_cell,
    in_large, kl_change, lead, level, live, longer, missing, of_claim, of_uneven, over, over_seeds, part,
    pass_at_4, pilot, pilot_said, price, ratios, record, rises, spread, steps_in_a_row, told, typical, uneven,
    verdicts, within_form)

ROOT = Path(__file__).parents[1]
FINDINGS = re.compile(r"What we found.*?(?=\n## )", re.S)  # of the README
NUMERAL = re.compile(r"(?<![\w.])−?\d[\d,]*(?:\.\d+)?(?![\w-])")
NAMES = re.compile(r"\]\([^)]*\)|`[^`]*`|SmolLM2-135M|[Tt]op-10|95 %|^#+ \d\.", re.M)  # hold no measured numbers


def readme() -> Iterator[tuple[str, tuple]]:
    "Phrases of the README's findings, and the numbers in them."
    matters = Counted(CO, record(CO)["parameters"]["primary"]["matters"])
    yield ("CoPD ends {:points} below when greedy, {} when sampled, and with ten seeds {} below where mixed RLVR may",
           (again("mixed RLVR", "CoPD"), again("mixed RLVR", "CoPD", "sampled"), longer()))
    yield "stand after correction over all [{} claims]", (verdicts()["all"],)
    yield ("within {:g} points with a period of 20 steps ({}) or 5", (matters, co("averaged every 20", "CoPD")))
    yield "Over [{} cells of a map]", (Counted(MAP, len(record(MAP)["cells"])),)
    yield "averaging ends {:points} above CoPD when greedy", (over("averaged every 5", "more/minus CoPD"),)
    yield ("Live teachers add less than {:g} points** over teachers that never learn: {} when greedy, {} when "
           "sampled (twenty seeds); with two capabilities nothing that can be seen ({})", (
               matters, *(again("CoPD", "CoPD, taught by the base", key) for key in ("planned", "sampled")),
               part("CoPD", "CoPD, taught by the base", "sampled")))
    yield "CoPD is {} ahead of experts that are merged once", (co("CoPD", "merged experts"),)
    yield ("end {:mean} points lower after distillation (95 % interval {:ends}; {} teachers, {} pairs",
           (distance(), distance(), pilot("teachers"), pilot("pairs")))


def answers() -> Iterator[tuple[str, tuple]]:
    "Phrases of the six answers, and the numbers in them."
    matters = Counted(CO, record(CO)["parameters"]["primary"]["matters"])
    yield "0.1 to 1.3 M parameters; nobody has shown any of it at 4 B", ()
    yield "in {} of {} runs of a map", (below_base("mixed RLVR"), below_base("mixed RLVR", part="of"))
    yield "every 5 to 20 steps", ()
    yield ("(every 5 steps: {:points} better with three capabilities, {} with two)", (
        typical(CO, "averaged every 5", "merged experts", "three"),
        typical(PARTS, "averaged every 5", "merged experts", "two_branch")))
    yield "the same within {:g} points, for more tokens", (matters,)
    yield ("({:points} better with three capabilities, {} with two)", (
        typical(CO, "MOPD from text", "MOPD", "three"), typical(PARTS, "MOPD from text", "MOPD", "two_branch")))
    yield "(power 3, floor 0.1)", ()
    yield ("ended {:points} above equal steps and repaired a wrong split, over {:.0f} consecutive steps instead of "
           "{:.0f}", (uneven("steps by steep headroom", "CoPD"), *map(steps_in_a_row, (
               "steps by steep headroom", "CoPD"))))
    yield "before you believe {:g} points", (matters,)
    mixed, base = co("mixed RLVR", "CoPD"), again("CoPD", "CoPD, taught by the base")
    mixed_of_two = part("mixed RLVR", "CoPD")
    yield ("ends {:points} below mixed RLVR ({:p}), {} above experts that are merged once, and within {:g} points of",
           (mixed, mixed, co("CoPD", "merged experts"), matters))
    yield "averaged every 20 steps", ()
    yield "scores {:.1f} times the tokens of mixed RLVR. Mixed RLVR with 96 prompts a step", (price(),)
    repeated = {k: again(k, "CoPD") for k in ("mixed RLVR", "mixed RLVR, 96 prompts")}
    yield ("repeat it: {:points} below mixed RLVR ({:p}), {} below mixed RLVR of as many consecutive updates ({:p}), "
           "and equal within {:g} points to CoPD whose teachers are the base",
           (*(m for m in repeated.values() for _ in range(2)), matters))
    yield ("and is {:points} ahead, {} with the new seeds. Mixed RLVR",
           (co("mixed RLVR, 96 prompts", "CoPD"), repeated["mixed RLVR, 96 prompts"]))
    yield ("may process as many tokens as CoPD, teachers' included, is {:points} ahead ({:p}", (longer(), longer()))
    yield ("read at a third of its steps, is {} behind",
           (-against(CO, "mixed RLVR", "equal_budgets", "three/greedy", budget="critical_steps"),))
    yield ("At equal entropy mixed RLVR is {:points} ahead, sampled at temperature 1 even {}",
           (against(CO, "mixed RLVR", "equal_entropy", "three/last weights", where="range"),
            co("mixed RLVR", "CoPD", "sampled")))
    yield ("At temperatures 0, 0.5 and 1 it has {:.1f}, {:.1f} and {:.1f} %, CoPD {:.1f}, {:.1f} and {:.1f}",
           tuple(level(k, at) for k in ("mixed RLVR", "CoPD") for at in (0, 0.5, 1)))
    yield "pass@4 is {:.1f} and {:.1f}", (pass_at_4("mixed RLVR"), pass_at_4("CoPD"))
    yield "Live teachers add less than {:g} points. With", (matters,)
    yield ("ends {:points} above the same schedule taught by the base: over seeds more than nothing ({:p})",
           (base, base))
    yield "The first ten seeds had {}.", (co("CoPD", "CoPD, taught by the base"),)
    yield ("Sampled they add {}, at equal entropy {};", (
        again("CoPD", "CoPD, taught by the base", "sampled"),
        -against(AGAIN, "CoPD, taught by the base", "equal_entropy", "three/last weights", where="range")))
    yield ("with two capabilities nothing that can be seen, {} and {}", (
        part("CoPD", "CoPD, taught by the base", "sampled"),
        -against(PARTS, "CoPD, taught by the base", "equal_entropy", "two_branch/last weights", where="range")))
    yield ("Over MOPD CoPD is {} ahead, over MOPD that begins at the text expert {}",
           (co("CoPD", "MOPD"), co("CoPD", "MOPD from text")))
    yield ("Averaging every 5 steps, with no teacher, is {} above CoPD, less than the {:g} that matter",
           (co("averaged every 5", "CoPD"), matters))
    yield ("SD over seeds is {:.1f} points for mixed RLVR and {:.1f} for CoPD, the worst of ten ends at {:.1f} and "
           "{:.1f} %", tuple(over_seeds(k, how) for how in ("std", "min") for k in ("mixed RLVR", "CoPD")))
    yield ("it ends {:points} above the experts on their own capabilities, CoPD {} below them",
           (-missing("mixed RLVR"), missing("CoPD")))
    yield ("experts still rose by {:.1f} to {:.1f} points, sampled, in the last quarter of their steps", rises())
    yield "mixed RLVR with 96 prompts was the highest of its grid", ()
    yield "With two capabilities it ends {:points} below mixed RLVR ({:p})", (mixed_of_two, mixed_of_two)
    yield "each less than {:g} by its own interval", (
        Counted(PARTS, record(PARTS)["parameters"]["primary"]["matters"]),)
    yield ("Without OPD of text CoPD loses {:points}, without OPD of images {}, with the base as teacher {}",
           (part("CoPD", "without OPD of text"), part("CoPD", "without OPD of images"),
            part("CoPD", "CoPD, taught by the base")))
    yield "from 4 : 1 to 1 : 4, are {:.1f} points below to {:.1f} above the paper's 3 : 2", ratios()
    yield "Without any OPD it loses {:points}", (part("CoPD", "merged experts"),)
    yield ("worth {:points} over the branch of images, and nothing over that of text ({}, both",
           (of_claim("merged_over_second_branch", PARTS), of_claim("merged_over_first_branch", PARTS)))
    yield ("{:points} over MOPD, {} and {} over static OPD", tuple(
        part("CoPD", other) for other in ("MOPD", "OPD text→image", "OPD image→text")))
    yield "begins at the text expert is undecided, {}", (part("CoPD", "MOPD from text"),)
    yield ("critical path (64 prompts) is its equal when greedy ({:points}) and {} ahead when sampled",
           (part("CoPD", "mixed RLVR, 64 prompts"), part("mixed RLVR, 64 prompts", "CoPD", "sampled")))
    yield "({:g} nats of JSD a token", (pilot_said(r"JSD \(([0-9.]+) nats"),)
    yield ("end {:points} lower after {} steps of distillation, at equal accuracy before; all {} teachers agree",
           (distance(), pilot("steps"), pilot("agree")))
    form = within_form()
    yield "it is as much, {:mean}, but far less certain {:bounds}", (form, form)
    yield "all teachers are at least {:.1f} points above", (pilot_said(r"smallest lead is ([0-9.]+)"),)
    closer = found(DYNAMICS, "copd_closer_than_static")
    yield "static OPD does ({:mean} nats a token {:bounds};", (closer, closer)
    up, down = kl_change(False), -kl_change(True)
    yield ("rises by {:mean} nats a token {:bounds} in a phase of RLVR and falls by {} in a phase of OPD",
           (up, up, down))
    yield "are {:points} better than those of the frozen initial student", (live(),)
    yield "({:points} for the frozen one)", (of_claim("semi_over_live"),)
    yield "falls to {} of what it was", (told(DYNAMICS, "the norm of its gradient falls to", 2),)
    yield "between the phases, it ends at {}", (told(DYNAMICS, "in CoPD the norm ends at", 2),)
    yield ("falls by {} and was not seen to recover ({})",
           (found(DYNAMICS, "overlap_falls_in_rl"), found(DYNAMICS, "overlap_recovers_in_opd")))
    cells = Counted(MAP, len(record(MAP)["cells"]))
    yield "In {} cells of eight suites, five seeds each", (cells,)
    yield ("averaged every 5 steps it is {:points}, MOPD {}, CoPD {}, experts merged once {}.",
           (over("averaged every 5"), over("MOPD"), over("CoPD"), over("merged experts")))
    yield "averaged every 5 steps", ()
    yield ("below it, by {:points} to {}",
           (-over("averaged every 5", "over_cells/sampled"), -over("MOPD", "over_cells/sampled")))
    yield ("ends {:points} above CoPD, and {} if the cells of a suite count as one",
           (over("averaged every 5", "more/minus CoPD"), over("averaged every 5", "more/minus CoPD", "suite_")))
    yield "(p < 0.001 for each paradigm)", ()
    yield "leads over mixed RLVR have a standard deviation of {:.1f} to {:.1f}", between()
    yield "where the plan assumed 1.5", ()
    yield "Whether that reaches the {:g} points that matter", (Counted("the claims", MATTERS["points"]),)
    new = over("CoPD", start="new_")
    yield ("anything from {:.1f} points below to {:.1f} above",
           (Counted(new.source, -new.low), Counted(new.source, new.high)))
    beside = {r["paradigm"]: r["between"] for r in record(MAP)["tables"]["more/minus CoPD"]}
    if f"{beside['MOPD']:.1f}" != f"{beside['merged experts']:.1f}": raise ValueError(f"{MAP}: other spreads")
    yield "by {:.1f} points for averaging, {:.1f} for MOPD and for merged experts", tuple(
        Counted(f"{MAP}: more", beside[k]) for k in ("averaged every 5", "MOPD"))
    yield ("is {:mean} times that of mixed RLVR for averaging {:bounds} and for CoPD {:bounds}, {} for MOPD, {} for "
           "merged experts", tuple(spread(k) for k in (
               "averaged every 5", "averaged every 5", "CoPD", "MOPD", "merged experts")))
    yield ("With {} steps a branch mixed RLVR is {:points} above averaging and {} above CoPD", (Counted(
        MAP, record(MAP)["cells"][LONG]["made"]["cell"]["steps"]), *(-in_cell(LONG, k) for k in (
            "averaged every 5", "CoPD"))))
    yield ("above MOPD ({}) and merged experts ({}) it is",
           tuple(-in_cell(LONG, k) for k in ("MOPD", "merged experts")))
    yield "nominally above mixed RLVR (CoPD {:points})", (in_cell("small model", "CoPD"),)
    yield ("In {} of all {} runs it ends below its base when greedy (averaging {}, merged experts {}, CoPD {}, "
           "MOPD {}), {} of them in four cells", (
               below_base("mixed RLVR"), below_base("mixed RLVR", part="of"), *map(below_base, (
                   "averaged every 5", "merged experts", "CoPD", "MOPD")), below_base("mixed RLVR", cells=FALLING)))
    yield ("Where {:.0f} % of the prompts have two answers, so that no model can exceed {:.0f} % on average, the "
           "cosine is {:.2f} (upper end {:.2f}, noise floor {:.2f})",
           tuple(gradients("contradicting 100 %", part) for part in ("share", "ceiling", "cosine", "upper", "floor")))
    verified = sum(r["conflict"] == "verified" for r in record(MAP)["tables"]["checked"])
    yield "verified to be negative in {} of {} cells", (Counted(f"{MAP}: checked", verified), cells)
    cosines = {r["share"]: r["cosine"] for r in record("regimes-conflict")["tables"]["checked"]}
    yield ("where the cosine is {:mean} and {:mean} ([study]", tuple(Measured(
        "regimes-conflict: checked", cosines[k], *[float("nan")] * 2, digits=2) for k in sorted(cosines)))
    asked = {r["cell"]: r["share"] for r in record("regimes-conflict")["tables"]["checked"]}
    yield "where {:.0f} % of the questions", (Counted("regimes-conflict: checked", asked[
        "learned, contradicting 75 %"]),)
    yield "where {:.0f} % do, no method rises", (Counted("regimes-conflict: checked", asked[
        "learned, contradicting 100 %"]),)
    during = {r["cell"]: r["during"] for r in record("regimes-conflict")["tables"]["checked"]}
    yield "trains the logged cosines average {:mean} and {:mean}", tuple(Measured(
        "regimes-conflict: checked", during[f"learned, contradicting {k} %"], *[float("nan")] * 2, digits=2)
        for k in (75, 100))
    yield ("want two answers CoPD ends {:points} below it when greedy, MOPD {}, merged experts {} and averaging {};",
           tuple(conflicting(k, 75) for k in ("CoPD", "MOPD", "merged experts", "averaged every 5")))
    yield "CoPD ends {} below and averaging is equal within {:g} points", (
        conflicting("CoPD", 100), Counted("the claims", MATTERS["points"]))
    yield "A model of 25 M parameters shows the same (one pair of skills, three seeds, 40 steps a branch", ()
    yield ("by {:points} for averaging to {} for MOPD",
           (-in_large("averaged every 5", "sampled"), -in_large("MOPD", "sampled")))
    yield ("MOPD ends {:points} below it; merged experts ({}), CoPD ({}) and averaging ({}) are undecided",
           (-in_large("MOPD"), *map(in_large, ("merged experts", "CoPD", "averaged every 5"))))
    yield "Three seeds find leads of 13 points or more", ()
    early = {r["measure"]: r for r in record(MAP)["tables"]["predictors"]}
    best = min(early.values(), key=lambda r: r["error"])
    if best["measure"] != "floor": raise ValueError(f"{MAP}: another measurement is the best")
    yield ("of {} measurements at step 12 the best, the noise floor of the cosine, forecasts CoPD's lead in a suite "
           "that was left out with an error of {:.1f} points, the mean of the other suites with {:.1f} (p {} for",
           (Counted(f"{MAP}: predictors", len(early)), Counted(f"{MAP}: predictors", best["error"]),
            Counted(f"{MAP}: predictors", best["of_the_mean"]), chance()))
    yield "of {} experts {} is flat at the end of its steps, {} still rise", (ends(""), ends("flat"), ends("rising"))
    yield "0.1 to 0.5 M parameters", ()
    equal, adding = "CoPD", "steps 5 : 1"
    yield ("(sorting from {:.0f} % in the base to {:.0f} % with CoPD, adding from {:.0f} to {:.0f})",
           tuple(of_uneven(k, skill) for skill in ("sort", "add") for k in ("base", "CoPD")))
    yield "{} planned pairs, greedy", (Counted(f"{UNEVEN}: planned", len(record(UNEVEN)["planned"])),)
    matters = Counted(f"{UNEVEN}: plan", record(UNEVEN)["parameters"]["primary"]["matters"])
    yield "whether by the {:g} points that matter is open. A", (matters,)
    wrong, hot = uneven(equal, "steps 1 : 5"), uneven(equal, "β 100")
    yield ("ends {:points} below equal steps ({:p}), equal steps {} below five sixths for adding ({:p}), β 100 is {} "
           "below β 0.1 ({:p})", tuple(m for m in (wrong, uneven(adding, equal), hot) for _ in range(2)))
    yield ("With β 0.001 ({} below) and with averaging once instead of every 20 steps ({} below)",
           (uneven(equal, "β 0.001"), uneven("averaged every 20", "averaged once")))
    steep, repaired = "steps by steep headroom", "steep headroom from 1 : 5"
    saved, above = uneven(repaired, "steps 1 : 5"), uneven(steep, equal)
    yield ("ends {:points} above that split ({:p}) and {} above equal steps (not planned)",
           (saved, saved, uneven(repaired, equal, "greedy")))
    yield ("ends {} above them ({:p}), and equal within {:g} points to the fixed split for adding ({})",
           (above, above, matters, uneven(steep, adding)))
    yield "equal within {:g} to equal steps ({})", (matters, uneven("steps by headroom", equal))
    yield ("{:.0f} consecutive steps, and {:.0f} with the fixed split, instead of {:.0f}",
           tuple(map(steps_in_a_row, (steep, adding, equal))))
    yield ("steep headroom is not told apart from equal steps ({})",
           (against(UNEVEN, steep, "equal_budgets", "pair/greedy", budget="critical_steps"),))
    yield "β: neither controller saves β 100", ()
    share, at = "gradient share from β {}".format, "equal within {:g} to"
    yield ("ends {:points} below its start, which is undecided, and {} below β 0.1 ({:p})", (
        uneven("β 100", share(100)), *[uneven(equal, share(100))] * 2))
    yield f"{at} its start ({{}})", (matters, uneven("band from β 100", "β 100"))
    yield ("From β 0.001 the share ends equal within {:g} to β 0.1 ({}), but isn't settled above its start ({})",
           (matters, uneven(share(0.001), equal), uneven(share(0.001), "β 0.001")))
    yield f"{at} averaging every 20 steps ({{}})", (matters, uneven("averaged by drift", "averaged every 20"))
    yield "0.3 M parameters", ()
    yield ("is the highest with {:.1f} %, {:points} above steep headroom",
           (of_uneven("mixed RLVR"), ahead_of(UNEVEN, steep, "pair/greedy")))
    base, once = (in_balance(k) for k in ("base", "averaged once"))
    bar = base.mean() - 10
    yield ("{} of {} runs end more than ten points below the base, which has {:.0f} %, at {:.0f} to {:.0f} %",
           tuple(Counted(f"{BALANCE}: per_seed", x) for x in (
               sum(once < bar), len(once), base.mean(), once.min(), once[once < bar].max())))
    yield ("not even {:points} between it and averaging every 20 steps, in the typical run",
           (typical(BALANCE, "averaged every 20", "averaged once", "pair"),))
    yield "CoPD ends {:points} above MOPD", (lead(SMOL, "CoPD", "MOPD", "all/greedy"),)
    yield ("Against mixed RLVR ({}) and merged experts ({}) nothing was detected",
           (lead(SMOL, "CoPD", "mixed RLVR", "all/greedy"), lead(SMOL, "CoPD", "merged experts", "all/greedy")))
    yield "With SmolLM2's 49,152 they don't", ()
    yield "overlap is near 1 by construction", ()
    yield ("the top-10 overlap is {}", (told(
        "checkpoints-smollm2", "teacher sums: on the student's trajectories the top-10 overlap is", 3),))
    of = verdicts()
    yield ("Of {} claims {} hold and {} don't**; in {} the difference is smaller than the {:g} points that matter, "
           "{} are beyond the power of our experiments, {} are not detected and {} is confounded",
           (of["all"], of["holds"], of["does not hold"], of["smaller than"], Counted("the claims", MATTERS["points"]),
            *(of[k] for k in ("beyond reach here", "not detected", "confounded"))))


PAGES: dict[str, tuple[Callable, Callable]] = {  # page → its phrases, and the part of it that has only such numbers
    "README.md": (readme, lambda text: FINDINGS.search(text)[0]), "docs/answers.md": (answers, lambda text: text)}


def faults(page: str, text: str) -> list[str]:
    "Phrases that the records don't give, and numbers that no phrase accounts for."
    phrases, part = PAGES[page]
    said, rest = [words.format(*values) for words, values in phrases()], part(text)
    for phrase in said: rest = rest.replace(phrase, " ")
    rest = NAMES.sub(" ", rest)
    return [f"{page}: the records give: {p}" for p in said if p not in text] + [
        f"{page}: no record for {n[0]}: …{rest[max(0, n.start() - 40):n.end() + 20]!r}" for n in NUMERAL.finditer(rest)]


if __name__ == "__main__":
    wrong = []
    for page, (phrases, _) in PAGES.items():
        print(page)
        for words, values in phrases():
            print(f"  {words.format(*values)}  <- {', '.join(dict.fromkeys(v.source for v in values)) or 'the setup'}")
        wrong += faults(page, (ROOT / page).read_text(encoding="utf-8"))
    print(*(wrong or ["every number agrees with its record"]), sep="\n")
    sys.exit(bool(wrong))

"""The documentation site: `python docs/build.py [FOLDER]` (`make docs`: _docs/site). Nothing is downloaded."""
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pandas as pd
from latex2mathml.converter import convert

import copd_nb
from copd_nb.analysis.page import claims_of, counts_sentence
from copd_nb.analysis.planned import planned_sentences
from copd_nb.report.driver import inert
from copd_nb.report.overview import STUDIES, Entry, entries
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.local import local_rlvr, synced
from copd_nb.schedule.neighbours import camopd, codistill_grpo, reward_and_teacher, semi_opd
from copd_nb.schedule.paradigms import expert, merged_experts, mixed_rlvr, mopd, static_opd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # for the parts beside this file

from site_parts import add_style, gallery, search_from_files  # noqa: E402
from speed import speed  # noqa: E402
from storeys import STOREYS  # noqa: E402

PAGES, REPORTS = ROOT / "docs", ROOT / "docs" / "reports"
MEASURED, BEGIN, END = (PAGES / "measured.md", "<!-- made by `python docs/build.py measured` -->",
                        "<!-- end of what is made -->")
FAST = "<!-- made from bench/results.json -->"
NOTEBOOKS = "nbs/[0-9]_*/[0-9]*.ipynb", "nbs/tutorials/*.ipynb", "nbs/explain/*.ipynb"
PACKAGES = dict(
    data="what is learnt", policy="who learns", signals="what one step learns from",
    schedule="who learns from which signal, when", engine="running a schedule",
    analysis="what happened, and how sure it is",
    study="many runs", view="figures and widgets", report="reports and the command",
    scale="several machines, other engines")  # title of each, as in the navigation
PAIR, THREE = ("text", "image"), ("text", "image", "video")
DRAWINGS: dict[str, Schedule] = {
    "expert": expert("text", 80), "mixed": mixed_rlvr(PAIR, 160), "opd": static_opd("text", "image", 48, 64),
    "mopd": mopd(PAIR, 48, 64), "merged": merged_experts(PAIR, 80),
    "copd": copd(PAIR, cycles=2), "hub": copd(THREE, cycles=1, topology="hub", hub="text"),
    "student": copd(PAIR, cycles=1, topology="student"),
    "local": local_rlvr(PAIR, 80, 5), "synced": synced(copd(PAIR, 4, 3, 2)),
    "semi": semi_opd(PAIR, 48, 64), "codistill": codistill_grpo(["text"], 80, lead=20),
    "camopd": camopd("text", "image", 48, 64),
    "joint": reward_and_teacher(PAIR, 48, 64, residual="bounded", gate="verified")}
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)((?:[^$\n]|\n(?!\n))+?)(?<!\s)\$(?!\d)", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)
DIRECTIVE = re.compile(r"<!-- (drawing|results|studies|headline) (.+?) -->")
UPWARDS = re.compile(r"\]\(\.\./(?=bench/|nbs/|examples/README|CONTRIBUTING)")  # lies beside on the site
WEB_FONT = re.compile(r"@import\s+url\([\"\']?https://fonts[^)]*\);?")
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)[^>]*?\ssrc=\"(https?:|//)|"
    r"<link(?=[^>]*rel=\"(?:stylesheet|icon|preload|modulepreload)\")[^>]*?href=\"(https?:|//)|@import\s+(?:url\()?[\"']?(?:https?:|//)")


def with_mathml(text: str) -> str:
    "Markdown with its TeX formulas as MathML, which browsers draw without a script; code stays."
    def math(match: re.Match) -> str:
        return " ".join(convert(match[1] or match[2], display="block" if match[1] else "inline").split("\n"))
    return "".join(part if i % 2 else FORMULA.sub(math, part) for i, part in enumerate(CODE.split(text)))


def harmless(value):
    "A record with all its texts inert."
    if isinstance(value, str): return inert(value)
    if isinstance(value, dict): return {inert(k): harmless(v) for k, v in value.items()}
    return [harmless(v) for v in value] if isinstance(value, list) else value


@cache
def _published(folder: Path) -> list[Entry]:
    return [Entry(e.folder, harmless(e.record), e.fault) for e in entries(folder)]


def published() -> list[Entry]:
    "Published reports, their records inert; each folder is read once."
    return _published(REPORTS)


def setting(key: str) -> str:
    "A setting and measure of the comparison in words."
    return key.replace("_branch", " branches").replace("/", ", ")


def number(row: dict) -> str: return f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def table(rows: list[dict], names: list[str]) -> list[str]:
    "Accuracy of some paradigms, one column a capability."
    columns = list(dict.fromkeys(r["capability"] for r in rows))
    found = {(r["paradigm"], r["capability"]): number(r) for r in rows}
    lines = [f"| {name} | " + " | ".join(found[name, c] for c in columns) + " |" for name in names
             if (name, columns[0]) in found]
    return [f"| accuracy, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *lines]


def results(names: list[str]) -> str:
    "The published experiment with most seeds that has some paradigms: tables, and sentences with intervals."
    records = sorted((e.record for e in published() if e.name == "experiment"),
                     key=lambda r: len(r["parameters"]["seeds"]), reverse=True)
    def has(rows): return any(r["paradigm"] in names for r in rows)
    content = next((r for r in records if any(map(has, r["tables"].values()))), None)
    if content is None: raise ValueError(f"no published experiment has a row of {names}")
    parts, title = [], content["parameters"]["title"]
    for key, rows in content["tables"].items():
        if not has(rows): continue
        shown = table(rows, ["base", *names])
        said = [f"- {v['sentence'].rstrip('.')}." for v in content["verdicts"][key] if {v["paradigm"], v["other"]}
                & set(names)]
        parts += [f"**{setting(key)}**", "", *shown, "", *said, ""]
    seeds = len(content["parameters"]["seeds"])
    return "\n".join([*parts, f"{seeds} seeds, 95 % intervals over seeds and prompts; `copd compare "
                              f"examples/{title}.yaml`, commit {content['environment']['commit']}."])


def chosen(names: str) -> list[Entry]:
    "Published reports by name, or all."
    found = [e for e in published() if names == "all" or e.name in names.split(", ")]
    if not found: raise ValueError(f"docs/reports has no report {names}")
    return found


def studies(names: str, root: str) -> str:
    "A section for each published report: question, findings, limits; `root` leads from the page to the site's root."
    def section(e: Entry) -> str:
        lines = [f"### {inert(e.title)}", f"{e.about} · [the report]({root}reports/{e.folder.name}/{e.name}.html)",
                 "\n".join(f"- {x}" for x in e.record["shown"]), "Limits:",
                 "\n".join(f"- {x}" for x in e.record["limits"])]
        return "\n\n".join(lines)
    return "\n\n".join(map(section, chosen(names)))


def headline(names: str) -> str:
    "The headlines of published reports, with the commit that made them."
    return "\n\n".join(f"{e.record['headline']}\n\n`copd report {e.name}`, commit {e.record['environment']['commit']}."
                       for e in chosen(names))


def leader(rows: list[dict]) -> str:
    "The unified model whose lead over every other one has an interval above 0, or nothing."
    first, *others = rows
    return first["paradigm"] if others and all(r["lead_low"] > 0 for r in others) else ""


def means(tables: dict[str, list[dict]], leaders: dict[str, list[dict]]) -> list[str]:
    "Mean accuracy of every paradigm, one column a setting and measure; a leader is bold."
    found = {(r["paradigm"], key): r for key, rows in tables.items() for r in rows if r["capability"] == "mean"}
    # sorting keeps the order within
    names = sorted({name: None for name, _ in found}, key=lambda name: (name != "base", not name.endswith(" expert")))
    best = {key: leader(leaders.get(key, [{}])) for key in tables}

    def cell(name, key):
        row = found.get((name, key))
        return "–" if row is None else f"**{number(row)}**" if name == best[key] else number(row)
    lines = [f"| {name} | " + " | ".join(cell(name, key) for key in tables) + " |" for name in names]
    return ["| mean accuracy, % | " + " | ".join(map(setting, tables)) + " |", "|---" * (len(tables) + 1) + "|", *lines]


BESIDE = ("mixed RLVR", "MOPD", "merged experts", "averaged")  # what CoPD is compared with in short


def compared(content: dict) -> list[str]:
    "What an experiment planned and decided, and the sentences on CoPD and its nearest neighbours."
    asked = {"metric": "greedy", "matters": None} | content["parameters"].get("primary", {})
    decided = planned_sentences(pd.DataFrame(content.get("planned", [])), asked["metric"], asked["matters"])

    def near(v: dict) -> bool:
        pair = {v["paradigm"], v["other"]}
        return "CoPD" in pair and any(name.startswith(BESIDE) for name in pair - {"CoPD"})
    left = {key: rows for key, rows in content["verdicts"].items() if not (decided and key.endswith(asked["metric"]))}
    return [f"- {s}" for s in decided] + [f"- {setting(key)}: {v['sentence'].rstrip('.')}." for key, rows in
                                          left.items() for v in rows if near(v)]


def experiment(entry: Entry) -> list[str]:
    "What an experiment found: means, and CoPD beside its neighbours."
    content, given = entry.record, entry.record["parameters"]
    made = (f"{len(given['seeds'])} training seeds, {given['steps']} steps a capability, 95 % intervals over seeds and "
            f"examples; commit {content['environment']['commit']}.")
    return ["", f"## {inert(entry.title)}", "", *means(content["tables"], content.get("leaders", {})), "",
            f"{made} [The report](reports/{entry.folder.name}/{entry.name}.html)", "", *compared(content)]


def measured() -> str:
    "The page on results: each experiment's means and verdicts, a sentence a study, the claims."
    found = published()
    now = [e for e in found if e.name == "experiment" and not e.older]
    def line(e: Entry) -> str:
        told = e.record["headline"] if e.brief else ""
        return f"- [{inert(e.title)}](reports/{e.folder.name}/{e.name}.html) {told}".rstrip()
    studies = [line(e) for e in found if e.name in STUDIES and e.name != "experiment" and not e.older]
    old = [line(e) for e in found if e.older and e.name in STUDIES]
    missing = ", ".join(f"`{name}`" for name in STUDIES if name not in {e.name for e in found})
    parts = [x for e in now for x in experiment(e)]
    if studies: parts += ["", "## Studies", "", *studies]
    said = "Rewards read numbers in another way then. These settle nothing, until they are made again."
    if old: parts += ["", "## Of an older engine", "", said, "", *old]
    if missing: parts += ["", f"Not run with the engine as it is: {missing} (`copd report NAME -p preset standard`)."]
    claims = counts_sentence(claims_of({e.folder.name: e.record for e in found}))
    return "\n".join([*parts, "", "## The claims", "", f"{claims} [The table](claims.md)"]).strip()


def with_measured(text: str) -> str:
    "The page on results with its tables made anew; ValueError if the marks are missing."
    for begin, make in {BEGIN: measured, FAST: speed}.items():
        before, found, rest = text.partition(begin)
        if not found or begin in rest or END not in rest:
            raise ValueError(f"{MEASURED.name} needs one {begin} and {END} behind it")
        text = f"{before}{begin}\n{make()}\n{END}{rest.partition(END)[2]}"
    return text


def filled(text: str, root: str = "") -> str:
    "A page with its drawings and results; `root` leads from it to the site's root."
    def made(match: re.Match) -> str:
        if match[1] == "drawing": return f'<div style="overflow-x:auto">{DRAWINGS[match[2]].svg()}</div>'
        return dict(results=lambda names: results(names.split(", ")), headline=headline,
                    studies=lambda names: studies(names, root))[match[1]](match[2])
    return DIRECTIVE.sub(made, text)


def copy_page(source: Path, target: Path):
    "A Markdown page, filled and without TeX."
    target.parent.mkdir(parents=True, exist_ok=True)
    root = "../" * (len(source.relative_to(PAGES).parts) - 1) if source.is_relative_to(PAGES) else ""
    target.write_text(with_mathml(filled(source.read_text(encoding="utf-8"), root)), encoding="utf-8")


def copy_notebook(source: Path, target: Path):
    "A notebook without TeX, and without the lines that are meant for nbdev."
    notebook = json.loads(source.read_text(encoding="utf-8"))
    notebook["cells"] = [c for c in notebook["cells"]
                         if not "".join(c["source"]).startswith(("#| default_exp", "#| hide"))]
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        cell["source"] = with_mathml(text) if cell["cell_type"] == "markdown" else re.sub(r"\A(#\|.*\n)+", "", text)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def stage(source: Path):
    "All sources of the site."
    shutil.rmtree(source, ignore_errors=True)
    for page in (*PAGES.rglob("*.md"), *ROOT.glob("bench/*.md"), ROOT / "CONTRIBUTING.md"):
        copy_page(page, source / page.relative_to(PAGES if page.is_relative_to(PAGES) else ROOT))
    for page, name in (("README.md", "index.md"), ("examples/README.md", "examples.md")):
        copy_page(ROOT / page, source / name)
    (source / "bench" / "README.md").rename(source / "bench" / "method.md")  # a README is no page of a site
    for page in source.rglob("*.md"):
        text = page.read_text(encoding="utf-8").replace("bench/README.md", "bench/method.md").replace("](docs/", "](")
        if page.parent == source: text = UPWARDS.sub("](", text).replace("](../docs/", "](")
        text = text.replace("](examples/README.md", "](examples.md")
        page.write_text(text, encoding="utf-8")
    for notebook in (n for place in NOTEBOOKS for n in ROOT.glob(place)):
        copy_notebook(notebook, source / notebook.relative_to(ROOT))
    (source / "gallery.md").write_text(gallery(figures(), source), encoding="utf-8")
    for folder, files in dict(img=PAGES.glob("img/*.*"), bench=ROOT.glob("bench/*.json")).items():
        (source / folder).mkdir(parents=True, exist_ok=True)
        for file in files: shutil.copy(file, source / folder)
    shutil.copytree(REPORTS, source / "reports", ignore=shutil.ignore_patterns("*.md"), dirs_exist_ok=True)
    shutil.copy(PAGES / "_smalldocs.yml", source)


def figures() -> dict[str, list[tuple[Path, str]]]:
    "Notebooks whose figures the gallery shows, by subject, with their addresses."
    places = {"Tutorials": "nbs/tutorials/*.ipynb", "Explained": "nbs/explain/*.ipynb"} | {
        f"{name.capitalize()}: {PACKAGES[name]}": f"nbs/?_{name}/*.ipynb" for name in
        ("view", "signals", "schedule", "engine", "analysis", "study", "scale")}
    return {heading: [(n, n.relative_to(ROOT).with_suffix(".html").as_posix()) for n in sorted(ROOT.glob(place))]
            for heading, place in places.items()}


def modules() -> dict[str, list]:
    "Package → its public modules, in the order of imports."
    every = [importlib.import_module(m.name) for m in pkgutil.walk_packages(copd_nb.__path__, "copd_nb.")
             if not m.ispkg and "._" not in m.name]
    return {name: [m for m in every if m.__name__.split(".")[1] == name] for name in PACKAGES}


def list_modules(source: Path):
    "The first page of the API: every module and its subject. smalldocs makes the other pages."
    found, lines = modules(), ["# API", "", "Every public function and class, with its parameters, made from the code. "
                               "The packages are in the order of their imports: each uses only those before it."]
    short = [m.__name__.rpartition(".")[2] for mine in found.values() for m in mine]
    for name, mine in found.items():
        lines += ["", f"## {name}: {PACKAGES[name]}", "", "```python", STOREYS[name], "```", ""]
        for m in mine:
            stem = m.__name__.rpartition(".")[2]
            page = stem if short.count(stem) == 1 else m.__name__  # as smalldocs names pages
            notebook = next(ROOT.glob(f"nbs/?_{name}/[0-9]*_{stem}.ipynb")).relative_to(ROOT).as_posix()
            lines.append(f"- [{m.__name__}]({page}.qmd): {m.__doc__.strip()} ([examples](../{notebook}))")
    (source / "api").mkdir()
    (source / "api" / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def smalldocs(*words: str, within: Path):
    "Run smalldocs; a fault it finds ends the build."
    done = subprocess.run([sys.executable, "-m", "smalldocs.cli", *words], cwd=within, capture_output=True, text=True)
    if done.returncode: sys.exit(f"smalldocs {' '.join(words)}:\n{done.stdout}{done.stderr}")


def drop_web_fonts(site: Path):
    "Remove the fonts that a theme would fetch from its style; the system's are used."
    for style in site.rglob("*.css"):
        style.write_text(WEB_FONT.sub("", style.read_text(encoding="utf-8")), encoding="utf-8")


def loads_from_elsewhere(site: Path) -> list[str]:
    "Pages and styles that would load a file from the network."
    files = sorted(p for p in site.rglob("*") if p.suffix in (".html", ".css"))
    return [f"{page.relative_to(site)}: {found[0]}" for page in files
            if (found := ELSEWHERE.search(page.read_text(encoding="utf-8")))]


def build(target: Path = ROOT / "_docs") -> Path:
    "Make the site in a folder; ends with a message if a link leads nowhere or a page would need the network."
    source, site = target / "source", target / "site"
    stage(source)
    list_modules(source)
    smalldocs("render", "--quiet", "--strict", ".", within=source)
    drop_web_fonts(site)
    shutil.copytree(source / "img" / "gallery", site / "img" / "gallery", dirs_exist_ok=True)  # named in HTML alone
    search_from_files(site)
    add_style(site)
    if found := loads_from_elsewhere(site): sys.exit("needs the network: " + "; ".join(found))
    if not (site / "index.html").exists(): sys.exit("the site has no index.html")
    return site / "index.html"


if __name__ == "__main__":
    if sys.argv[1:] == ["measured"]:
        MEASURED.write_text(with_measured(MEASURED.read_text(encoding="utf-8")), encoding="utf-8")
    else: print(build(*map(Path, sys.argv[1:])))

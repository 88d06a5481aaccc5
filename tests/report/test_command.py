"The command: refusals come before anything heavy, Ctrl-C and a closed pipe end quietly."
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from copd_nb.report import command
from copd_nb.report.command import COMMANDS, EXAMPLES, completed, main, parser, spelled_out

REFUSED = {
    "trian copd": r"unknown command 'trian' \(did you mean 'train'\?\): train, ",
    "train coppd": r"unknown paradigm 'coppd' \(did you mean 'copd'\?\): copd, ",
    "train none.json": "there is no file of a schedule 'none.json'",
    "train copd": r"copd needs a value for capabilities \(two or more distinct names",
    "train copd -p cycels 2": r"unknown parameter of copd 'cycels' \(did you mean 'cycles'\?\)",
    "train expert text image --steps 2": "'image' is one word too many: expert takes capability",
    "train plan.json text": "'text' is one word too many: plan.json is a whole schedule",
    "train coppd text": r"unknown paradigm 'coppd' \(did you mean 'copd'\?\): copd, ",
    "train copd text image --cycels 2": r"unknown parameter of copd 'cycels' \(did you mean 'cycles'\?\)",
    "train copd text": "at least 2 distinct names",
    "train copd -p capabilities math": r"must be a list of texts, such as '\[\"math\"\]'",
    'train copd -p capabilities ["a","b"] -p cycles two': r"copd cycles='two': must be a whole number",
    'train copd -p capabilities ["a","b"] -c lerning_rate 1': r"'lerning_rate' \(did you mean 'learning_rate'\?\)",
    'train copd -p capabilities ["a","b"] -c learning_rate high': "config learning_rate='high': must be a number",
    'train copd -p capabilities ["a","b"] -c prompts true': "config prompts=True: must be a whole number",
    'train copd -p capabilities ["a","b"] -c warn {"windw":3}': r"unknown threshold 'windw' \(did you mean 'window'",
    'train copd -p capabilities ["a","b"] --suite nosuch:suite': "suite 'nosuch:suite': no module nosuch in ",
    'train copd -p capabilities ["a","b"] --suite mine.py:suite': "named without .py: write mine:suite",
    'train copd -p capabilities ["a","b"] --sampler nosuch:mine': "'nosuch:mine': no module nosuch in ",
    'train copd -p capabilities ["a","b"] --start c ./x': r"unknown branch 'c': a, b",
    'train copd -p capabilities ["a","b"] --start a ./nothere': "there is no model './nothere'",
    'train copd -p capabilities ["text","foto"]': r"unknown capability 'foto'; allowed: \['text', 'image', 'video'\]",
    'train copd -p capabilities ["text","image"] --out full': "run folder full is not empty and holds no run",
    "train minis coppd": "the experiment has no paradigm 'coppd': expert, ",
    "train mine.yaml copd": "there is no model 'none'",
    "train lost.yaml copd": "capabilities.b.file: there is no file c.jsonl",
    "check lost.yaml": "capabilities.b.file: there is no file c.jsonl",
    "check none.jsonl": "there is no data file none.jsonl",
    "runs none.yaml": "there is no experiment none.yaml",
    "report dynamcs": r"unknown report 'dynamcs' \(did you mean 'dynamics'\?\): dynamics, ",
    "report dynamics -p prest quick": r"no parameters \['prest'\] \(did you mean 'preset'\?\)",
    "report dynamics -p preset quik": r"unknown preset 'quik' \(did you mean 'quick'\?\): quick, ",
    "report dynamics -p names add": r"a list, each text is needed, such as '\[\"add\"\]'",
    "report checkpoints -p policies [\"./a\",\"./b\"]": r"there is no model './a'",
}


MINE = """
model: ./none
capabilities:
  a: {file: a.jsonl, reward: exact}
  b: {file: b.jsonl, reward: exact}
"""


def materials(folder: Path):
    "A folder that is no run, and experiments without a model or a data file."
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    (folder / "mine.yaml").write_text(MINE)
    (folder / "lost.yaml").write_text(MINE.replace("b.jsonl", "c.jsonl"))
    for name in "ab":
        rows = [f'{{"prompt": "{name} {i}", "answer": "{i}"}}\n' for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(rows))


@pytest.mark.parametrize("short, long", [
    ("train copd text image --cycles 4 --s-rl=3", "train copd text image -p cycles 4 -p s_rl 3"),
    ("train copd text --out x --quick -c prompts 4", "train copd text --out x --quick -c prompts 4"),
    ("report dynamics --preset quick --out here", "report dynamics -p preset quick --out here"),
    ("gap a b --cycles 4", "gap a b --cycles 4"), ("train copd --cycles", "train copd --cycles")])
def test_options_that_a_command_lacks_are_parameters(short, long):
    name, *words = short.split()
    assert [name, *command.spelled_out(command.COMMANDS[name], words)] == long.split()


def run(code: str, **options):
    "A Python process with these lines."
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **options)


def test_refusals_are_one_sentence_and_need_no_torch(tmp_path):
    materials(tmp_path)
    code = f"""
        import contextlib, io, sys, time
        from copd_nb.report.command import main
        for words in {list(REFUSED)!r}:
            began, told = time.process_time(), io.StringIO()
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
                status = main(words.split())
            print(status, words, round(time.process_time() - began, 2), told.getvalue().strip(), sep="\\t")
        print("torch" in sys.modules)
        """
    done = run(code, cwd=tmp_path)
    assert not done.returncode, done.stderr
    *rows, torch = done.stdout.splitlines()
    assert torch == "False" and len(rows) == len(REFUSED)
    for row in rows:
        status, words, seconds, told = row.split("\t")
        assert status == "2" and float(seconds) < 1.5 and re.match("copd: .*" + REFUSED[words], told), row


def test_parameters_of_one_letter_are_short_flags():
    asked = parser().parse_args(["train", "copd", "-p", "cycles", "2", "-c", "seed", "1", "-p", "beta", "0.5"])
    assert asked.p == [["cycles", "2"], ["beta", "0.5"]] and asked.c == [["seed", "1"]]


KEPT = dict(train="what was trained is kept, and the same command resumes it: "
                  "copd train copd -p capabilities '[\"a\"]'\n",
            report="finished runs are kept, and the same command resumes: copd report dynamics\n",
            runs="\ncopd: interrupted\n")

@pytest.mark.parametrize("words", [["train", "copd", "-p", "capabilities", '["a"]'], ["report", "dynamics"], ["runs"]])
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, words):
    def stopped(given): raise KeyboardInterrupt
    monkeypatch.setattr(command, "_run", stopped)
    before = signal.getsignal(signal.SIGINT)
    assert main(words) == 130 and capsys.readouterr().err.endswith(KEPT[words[0]])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_in_a_process_of_its_own_leaves_one_sentence_however_often_it_is_pressed(tmp_path):
    code = """
        import sys, time, threading
        from copd_nb.report import command
        def slow(words):
            print("begun", flush=True)
            try: time.sleep(30)
            finally: print("a traceback of some other process", file=sys.stderr)
        command._run = slow
        sys.argv = ["copd", "runs"]
        sys.exit(command.main())
        """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "begun\n"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told.strip() == "copd: interrupted"


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipe")
def test_a_reader_that_leaves_early_ends_the_command_quietly(tmp_path):
    code = """
        import sys
        from copd_nb.report import command
        def long(words):
            for i in range(100_000): print("line", i)
        command._run = long
        sys.argv = ["copd", "runs"]
        sys.exit(command.main())
        """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 141 and process.stderr.read() == ""


def test_a_suite_in_the_working_directory_is_found_by_an_installed_script(tmp_path):
    "The script of a package has its own folder on sys.path, and not the working directory."
    (tmp_path / "suite_here.py").write_text("def suite(): raise ValueError('it was called')\n")
    code = f"""
        import sys
        sys.path[:] = [{str(Path(command.__file__).parents[2])!r}, *(p for p in sys.path if p not in ("", "."))]
        from copd_nb.report.command import main
        sys.exit(main(["train", "copd", "-p", "capabilities", '["a", "b"]', "--suite", "suite_here:suite"]))
        """
    done = run(code, cwd=tmp_path)
    assert done.returncode == 2 and "it was called" in done.stderr, done.stderr


def test_every_command_has_examples_that_its_parser_takes(capsys):
    assert set(EXAMPLES) == set(COMMANDS)
    for name, lines in EXAMPLES.items():
        with pytest.raises(SystemExit): main([name, "--help"])
        assert all(line in capsys.readouterr().out for line in lines[:1])
        for line in lines:
            if line.startswith("eval"): continue
            words = shlex.split(line.partition(" >")[0])
            assert words[0] == name and parser().parse_args([name, *spelled_out(COMMANDS[name], words[1:])])


def completed_by_bash(*words):
    "What bash offers behind some words."
    listed = " ".join(shlex.quote(w) for w in ("copd", *words))
    asked = f"COMP_WORDS=({listed})\nCOMP_CWORD={len(words)}\n_copd\n"
    script = completed("bash") + "\n" + asked + """printf '%s\\n' "${COMPREPLY[@]}\""""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_names_and_options():
    assert completed_by_bash("pre") == ["preflight"] and set(completed_by_bash("")) == set(COMMANDS)
    assert completed_by_bash("report", "dyn") == ["dynamics"] and "--quick" in completed_by_bash("compare", "--")
    assert completed_by_bash("train", "mop") == ["mopd"] and completed_by_bash("completion", "z") == ["zsh"]
    assert completed_by_bash("unknown", "x") == []


IN_ZSH = """\
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "autoload -U compinit; source $1; copd() { print -r - \\\"<\\$*>\\\"; }"
for typed whole in "${@[2,-1]}"; do
  zpty -w -n shell "copd $typed"$'\\t\\r'
  zpty -r shell seen "*<$whole>*"
done"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed: `make setup` installs it where it may")
def test_zsh_completes_the_same(tmp_path):
    "A real zsh in a terminal; what isn't completed is waited for in vain."
    (tmp_path / "copd.zsh").write_text(completed("zsh"))
    asked = ["pre", "preflight", "report dyn", "report dynamics", "compare --see", "compare --seeds"]
    subprocess.run(["zsh", "-f", "-c", IN_ZSH, "zsh", tmp_path / "copd.zsh", *asked], check=True, timeout=120)


def test_colours_are_for_terminals(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["reprot"]) == 2 and "\033" not in capsys.readouterr().err
    for stream in (sys.stdout, sys.stderr): monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert main(["reprot"]) == 2 and capsys.readouterr().err.startswith("\033[31mcopd:\033[0m")
    assert main(["--help"]) == 0 and "\033[1mExperiment\033[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["--help"]) == 0 and "\033" not in capsys.readouterr().out

"Every reader of files returns a value or a clear error: on all inputs that ever broke one, and on a million new ones."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzer import CORPUS, READERS, Breach, attempt, corpus, main, place_for

INPUTS = 1_000  # times the shares, which add up to a thousand
SEED = 1


@pytest.mark.parametrize("name", READERS)
def test_no_input_of_the_corpus_breaks_its_reader(name, tmp_path):
    folder = place_for(name, tmp_path)
    said = {p.name: attempt(name, p.read_bytes(), folder) for p in corpus(name)}
    seeds = {n: s for n, s in said.items() if n.startswith("seed")}
    assert seeds and set(seeds.values()) == {"accepted"}, seeds


def test_the_corpus_is_small_and_belongs_to_readers():
    files = [p for p in CORPUS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 300_000
    assert {p.relative_to(CORPUS).parts[0] for p in files} <= set(READERS)
    assert sum(r.share for r in READERS.values()) == 1000


def test_a_reader_that_breaks_the_contract_is_noticed(tmp_path, monkeypatch):
    "Other exceptions, errors that don't name the file, and a reader that doesn't come back."
    monkeypatch.setattr("fuzzer.SECONDS", .05)
    def nameless(path): raise ValueError("something is wrong")
    def endless(path):
        while True: pass
    for read, said in ((lambda path: {}["a"], "KeyError"), (nameless, "doesn't name the file"), (endless, "Hang")):
        monkeypatch.setitem(READERS, "record", READERS["record"]._replace(read=read))
        with pytest.raises(Breach, match=said): attempt("record", b"{}", tmp_path)


def kill(path):
    if b"NaN" in path.read_bytes(): os._exit(9)


def test_what_kills_a_reader_is_kept(tmp_path, monkeypatch, capfd):
    shutil.copytree(CORPUS / "record", tmp_path / "record")
    monkeypatch.setattr("fuzzer.CORPUS", tmp_path)
    monkeypatch.setitem(READERS, "record", READERS["record"]._replace(read=kill))
    before = set(corpus("record"))
    main("100", "1", "record")
    (found,) = set(corpus("record")) - before
    assert b"NaN" in found.read_bytes() and f"{found}: its process died" in capfd.readouterr().err


@pytest.mark.slow
def test_a_million_damaged_files_break_no_reader():
    "What broke a reader lies in the corpus afterwards, and is named here."
    done = subprocess.run([sys.executable, Path(__file__).with_name("fuzzer.py"), str(INPUTS), str(SEED), *READERS],
                          capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for f in found:
        print("{reader}: {inputs:,} inputs, {accepted:,} accepted, {behaviours:,} kinds of answers, {lines} lines of "
              "the package reached, {seconds} s".format(**f))
    broken = [line for line in done.stderr.splitlines() if str(CORPUS) in line]
    assert done.returncode == 0 and not broken, "\n".join(broken or [done.stderr[-3000:]])
    assert {f["reader"] for f in found} == set(READERS) and all(f["accepted"]
                                                                for f in found) and sum(f["inputs"]
                                                                    for f in found) >= 1_000_000

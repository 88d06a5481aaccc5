"Every reader of files returns a value or says what is wrong with the file: on all inputs that ever broke one, and on a million new ones."
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzer import CORPUS, READERS, Breach, attempt, corpus, place_for

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


@pytest.mark.slow
def test_a_million_damaged_files_break_no_reader():
    "One process a reader: a crash or a lack of memory is a breach, too. What broke one lies in the corpus afterwards."
    total = 0
    for name, reader in READERS.items():
        done = subprocess.run([sys.executable, Path(__file__).with_name("fuzzer.py"), name, str(reader.share * INPUTS), str(SEED)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr.count(str(CORPUS)), f"{name}: status {done.returncode}\n{done.stderr[-3000:]}"
        found = json.loads(done.stdout.splitlines()[-1])
        print("{reader}: {inputs:,} inputs, {accepted:,} accepted, {behaviours} kinds of answers, {lines} lines of the package reached, {seconds} s".format(**found))
        assert found["accepted"] and found["behaviours"] > 1
        total += found["inputs"]
    assert total >= 1_000_000

"Run folders: whole or absent files, checkpoints, a log that survives a torn line, locks, identities."
import hashlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import copd_nb
from copd_nb.engine import environment as environment_module
from copd_nb.policy.toys import tiny_policy
from copd_nb.policy.core import weights_hash
from copd_nb.engine.checkpoints import load_checkpoint, save_checkpoint
from copd_nb.engine.log import EventLog
from copd_nb.engine.runs import (
    Run, content_hash, create_run, is_written, latest_checkpoint, list_runs, request_stop, stop_requested,
    withdraw_stop)
from copd_nb.engine.environment import environment
from copd_nb.engine.storage import locked, new_folder, write_json, write_text
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import RL, Phase, Update

SCHEDULE = Schedule("expert-text", {"text": "base"}, [Phase("expert", 2, [Update("text", [RL("text")])])], "text")
TENSORS = {"text": {"w": torch.randn(3, 4), "b": torch.randn(2, dtype=torch.bfloat16)},
           "optimizer-text": {"0": torch.arange(5)}}


def manifest(seed=0): return dict(schedule=SCHEDULE.to_dict(), config=dict(seed=seed),
                                  content_hash=content_hash(SCHEDULE.to_dict(), seed))


def content(folder): return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder(tmp_path, error):
    with new_folder(tmp_path / "f") as folder: write_text(folder / "old", "old")
    with pytest.raises(error):
        with new_folder(tmp_path / "f") as folder:
            write_text(folder / "new", "half")
            raise error
    assert content(tmp_path / "f") == {"old": "old"}
    with new_folder(tmp_path / "f") as folder: write_text(folder / "other",
                                                          "whole")  # leftovers do not disturb the next writer
    assert content(tmp_path / "f") == {"other": "whole"} and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_exception_leaves_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError):
        with new_folder(tmp_path / "f"): raise RuntimeError
    assert not (tmp_path / "f").exists()


def test_a_crash_while_the_old_content_is_removed_leaves_the_new_one_whole(tmp_path, monkeypatch):
    with new_folder(tmp_path / "f") as folder: write_text(folder / "old", "old")
    def crash(path, ignore_errors=False):
        if (path / "old").exists():
            raise OSError("the machine stops here")
    monkeypatch.setattr("copd_nb.engine.storage.shutil.rmtree", crash)
    with pytest.raises(OSError, match="stops here"):
        with new_folder(tmp_path / "f") as folder: write_text(folder / "new", "new")
    assert content(tmp_path / "f") == {"new": "new"}
    monkeypatch.undo()
    with new_folder(tmp_path / "f") as folder: write_text(folder / "next", "next")
    assert content(tmp_path / "f") == {"next": "next"} and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failing_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "f", "é")
    with pytest.raises(UnicodeEncodeError): write_text(tmp_path / "f", "half\ud800")
    with pytest.raises(TypeError): write_json(tmp_path / "f", object())
    assert (tmp_path / "f").read_text(encoding="utf-8") == "é"


def test_checkpoint_round_trip(tmp_path):
    state = {"step": 3, "nested": {"a": [1, 2.5, None, "é"]}}
    save_checkpoint(tmp_path / "000003", TENSORS, state)
    tensors, found = load_checkpoint(tmp_path / "000003")
    assert found == state and tensors.keys() == TENSORS.keys()
    for stem, named in TENSORS.items():
        assert named.keys() == tensors[stem].keys()
        assert all(torch.equal(named[k], tensors[stem][k]) and named[k].dtype == tensors[stem][k].dtype for k in named)


def test_checkpoints_take_shared_transposed_and_tracked_tensors(tmp_path):
    w = torch.randn(3, 4, requires_grad=True)
    save_checkpoint(tmp_path / "c", {"m": {"w": w, "same": w, "turned": w.T}}, {})
    assert torch.equal(load_checkpoint(tmp_path / "c")[0]["m"]["turned"], w.T)


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path):
    save_checkpoint(tmp_path / "c", TENSORS, {"step": 1})
    with pytest.raises(TypeError): save_checkpoint(tmp_path / "c", TENSORS, {"step": object()})
    assert load_checkpoint(tmp_path / "c")[1] == {"step": 1}


@pytest.mark.parametrize("name", ["text.safetensors", "optimizer-text.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "one bit"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, damage):
    save_checkpoint(tmp_path / "c", TENSORS, {})
    path, data = tmp_path / "c" / name, (tmp_path / "c" / name).read_bytes()
    if damage == "missing": path.unlink()
    else: path.write_bytes({"empty": b"", "short": data[:-1], "one bit": data[:-1] + bytes([data[-1] ^ 1])}[damage])
    with pytest.raises(ValueError,
                       match=f"{name} is missing or damaged.*remove {tmp_path / 'c'}"): load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("damage", [None, "", "{", "[1"])
def test_a_damaged_state_is_an_error_that_names_it(tmp_path, damage):
    save_checkpoint(tmp_path / "c", TENSORS, {})
    if damage is None: (tmp_path / "c" / "state.json").unlink()
    else: (tmp_path / "c" / "state.json").write_text(damage)
    with pytest.raises(ValueError,
                       match=f"{tmp_path / 'c'} has no readable state.json"): load_checkpoint(tmp_path / "c")


def test_a_state_in_which_a_number_has_changed_is_an_error_and_an_older_one_has_no_seal(tmp_path):
    save_checkpoint(tmp_path / "c", TENSORS, {"step": 12, "by": {1: 0.1, 10: (True, None)}})
    file = tmp_path / "c" / "state.json"
    assert load_checkpoint(tmp_path / "c")[1] == {"step": 12, "by": {"1": 0.1, "10": [True, None]}}
    file.write_text(file.read_text().replace('"step": 12', '"step": 13'))
    with pytest.raises(ValueError, match=f"{file} is damaged.*remove {tmp_path / 'c'}"): load_checkpoint(tmp_path / "c")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}))
    assert load_checkpoint(tmp_path / "c")[1]["step"] == 13


ROWS = [{"kind": "train", "step": 0, "reward": .5}, {"kind": "train", "step": 1, "text": 'é\n"}'}, {"kind": "eval",
                                                                                                    "step": 2}]


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(ROWS[:1])
    start = log.size
    log.append(ROWS[1:2])
    data = log.path.read_bytes()
    for end in range(start, len(data) + 1):
        log.path.write_bytes(data[:end])
        assert log.rows() == ROWS[:1 + (end == len(data))]
        log.truncate(start)
        log.append(ROWS[2:])  # and a resumed run goes on behind whole rows
        assert log.rows() == [ROWS[0], ROWS[2]]


texts, numbers = st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(-2 ** 53, 2 ** 53)
values = st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | texts
log_rows = st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), values, max_size=4),
                    max_size=6)


@settings(max_examples=40)
@given(log_rows, log_rows, log_rows, st.data())
def test_a_log_cut_anywhere_after_a_checkpoint_goes_on_with_whole_rows(tmp_path_factory, kept, lost, new, data):
    log = EventLog(tmp_path_factory.mktemp("log") / "events.jsonl")
    log.append(kept)
    mark = log.size  # what a checkpoint notes
    log.append(lost)
    written = log.path.read_bytes()
    cut = data.draw(st.integers(mark, len(written)))
    log.path.write_bytes(written[:cut])
    assert log.rows() == [*kept, *lost][:written[:cut].count(b"\n")]  # what a reader sees meanwhile
    log.truncate(mark)
    log.append(new)
    assert log.rows() == [*kept, *new] and log.path.read_bytes()[:mark] == written[:mark]


def test_damage_inside_the_log_is_an_error(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append(ROWS)
    lines = log.path.read_text().split("\n")
    log.path.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(ValueError, match="events.jsonl holds a line that is not JSON"): log.rows()


def test_log_size_truncation_and_absence(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    assert log.rows() == [] and log.size == 0
    log.truncate(0)
    log.append([])
    log.append(ROWS)
    assert log.size == log.path.stat().st_size and log.rows() == ROWS
    log.truncate(log.size + 100)  # never grows
    assert log.rows() == ROWS
    log.truncate(0)
    assert log.rows() == [] and log.size == 0


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.append([dict(a=math.nan, b=math.inf, c=-math.inf, d=1.5, e=None, f=True)])
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()
    assert log.rows() == [dict(a=None, b=None, c=None, d=1.5, e=None, f=True)]


HOLD = """
import sys
from pathlib import Path
from copd_nb.engine.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_against_a_second_process_until_it_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=f"{tmp_path / 'run'} is being written by another process"):
            with locked(tmp_path / "run"): pass
        with locked(tmp_path / "another"): pass
        other.kill()  # the lock needs no clean exit
        other.wait()
        with locked(tmp_path / "run", wait=True): pass


def test_create_run_opens_new_same_and_refuses_different_and_dirty(tmp_path):
    run = create_run(tmp_path / "r", manifest())
    assert run.manifest["status"] == "running" and not run.finished and run.schedule == SCHEDULE
    assert {"versions", "threads", "commit", "started"} <= run.manifest.keys()
    (run.path / "events.jsonl").write_text('{"step": 1}\n')
    again = create_run(tmp_path / "r", manifest())
    assert again.manifest == run.manifest and again.events.step.tolist() == [1]
    before = (run.path / "manifest.json").read_bytes()
    old, new = manifest()["content_hash"], manifest(1)["content_hash"]
    with pytest.raises(ValueError, match=f"holds another run .content {old}, asked for {new}"):
        create_run(tmp_path / "r", manifest(1))
    assert (run.path / "manifest.json").read_bytes() == before
    (tmp_path / "dirty").mkdir()
    (tmp_path / "dirty" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="dirty is not empty and holds no run"): create_run(tmp_path / "dirty",
                                                                                            manifest())
    assert content(tmp_path / "dirty") == {"thesis.txt": "mine"}


def test_a_locked_or_empty_folder_is_new(tmp_path):
    with locked(tmp_path / "r"): assert create_run(tmp_path / "r", manifest()).manifest["status"] == "running"
    (tmp_path / "empty").mkdir()
    create_run(tmp_path / "empty", manifest())
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".manifest.json.new").write_text("{")  # in its first write
    assert create_run(tmp_path / "killed", manifest()).manifest["status"] == "running"
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["manifest.json"]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"): Run(tmp_path)


def test_branches_and_results_of_an_unfinished_run(tmp_path):
    run = create_run(tmp_path / "r", manifest())
    for ask in (lambda: run.branch("text"), lambda: run.result):
        with pytest.raises(KeyError, match="'r|r has no final branch.*not finished"): ask()
    assert "interrupted" in repr(run) and "expert" in run._repr_html_() and run.events.empty


def test_finished_branches_load(tmp_path):
    policy = tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
    run = create_run(tmp_path / "r", manifest())
    policy.save(run.path / "branches" / "text")
    write_json(run.path / "manifest.json", dict(run.manifest, status="finished"))
    assert run.finished and weights_hash(run.branch("text")) == weights_hash(run.result) == weights_hash(policy)
    with pytest.raises(KeyError, match=r"no final branch 'image': \['text'\]"): run.branch("image")


def test_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    run = create_run(tmp_path / "r", manifest())
    assert latest_checkpoint(run) is None
    for step in (9, 10, 2): save_checkpoint(run.path / "checkpoints" / f"{step:06d}", {}, {})
    with pytest.raises(RuntimeError):
        with new_folder(run.path / "checkpoints" / "000011"): raise RuntimeError
    assert latest_checkpoint(run).name == "000010"


def test_weights_hash_changes_with_one_bit_a_name_and_the_vocabulary():
    policy = tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
    first = weights_hash(policy)
    assert weights_hash(policy.clone("other")) == first
    for name in list(policy.state_dict())[::7]:
        clone = policy.clone()
        flat = clone.state_dict()[name].view(-1).view(torch.int32)
        flat[-1] ^= 1
        assert weights_hash(clone) != first, name
        flat[-1] ^= 1
        assert weights_hash(clone) == first
    half = policy.clone()
    half.model.to(torch.bfloat16)
    assert weights_hash(half) != first
    other = tiny_policy(hidden=48, layers=1, vision_hidden=32, vision_depth=1)
    assert weights_hash(other) == first
    other.tokenizer.add_tokens(["new"])
    assert weights_hash(other) != first


def test_content_hash():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1}) and len(content_hash()) == 16
    assert len({content_hash(x) for x in (1, "1", 1.0, [1], None, True)} | {content_hash(), content_hash(1, 1),
                                                                            content_hash([1, 1])}) == 9


content_values = st.recursive(values, lambda inner: st.lists(inner,
                                                             max_size=3) | st.dictionaries(st.text("abc", max_size=3),
                                                                                           inner, max_size=4),
                                                                                           max_leaves=10)


def turned(value):
    "The same content with the keys of every mapping in the opposite order."
    if isinstance(value, dict): return {k: turned(v) for k, v in reversed(value.items())}
    return [turned(v) for v in value] if isinstance(value, list) else value


@settings(max_examples=50)
@given(content_values, content_values)
def test_content_has_one_hash_in_any_order_of_keys_and_another_if_anything_differs(one, other):
    assert content_hash(one) == content_hash(turned(one)) == content_hash(json.loads(json.dumps(one)))
    assert (content_hash(one) == content_hash(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other,
                                                                                                        sort_keys=True))
    assert content_hash(one, other) != content_hash([one, other]) and len(content_hash(one)) == 16


def test_list_runs(tmp_path):
    columns = ["path", "schedule", "status", "seed", "content_hash"]
    assert list(list_runs(tmp_path / "nothing").columns) == columns and list_runs(tmp_path).empty
    for seed in (1, 0): create_run(tmp_path / f"run-{seed}", manifest(seed))
    (tmp_path / "else").mkdir()
    write_json(tmp_path / "run-1" / "manifest.json", dict(Run(tmp_path / "run-1").manifest, status="finished"))
    found = list_runs(tmp_path)
    assert list(found.columns) == columns and found.seed.tolist() == [0,
                                                                      1] and found.status.tolist() == ["interrupted",
                                                                                                       "finished"]
    assert found.path.tolist() == [str(tmp_path / f"run-{s}") for s in (0, 1)]
    assert found.content_hash.tolist() == [manifest(s)["content_hash"] for s in (0, 1)]
    assert set(found.schedule) == {"expert-text"}


def test_a_run_may_be_moved(tmp_path):
    run = create_run(tmp_path / "a", manifest())
    shutil.move(run.path, tmp_path / "b")
    assert Run(tmp_path / "b").schedule == SCHEDULE and str(tmp_path) not in json.dumps(Run(tmp_path / "b").manifest)


def test_a_request_to_stop_is_made_seen_and_withdrawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"): request_stop(tmp_path / "nothing")
    run = create_run(tmp_path / "run", manifest())
    assert not stop_requested(run.path)
    request_stop(run.path)
    request_stop(run.path)
    assert stop_requested(run.path)
    withdraw_stop(run.path)
    withdraw_stop(run.path)
    assert not stop_requested(run.path)


def test_a_held_lock_is_seen_and_not_disturbed(tmp_path):
    assert not is_written(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert is_written(tmp_path / "run") and is_written(tmp_path / "run")
        with pytest.raises(RuntimeError, match="another process"):
            with locked(tmp_path / "run"): pass
    assert not is_written(tmp_path / "run")
    with locked(tmp_path / "run"): pass


DAMAGE = ["", "{", "[]", "null", "\x00", '{"a":' * 5000, b"\xff\xfe", "{}", {"status": 1}, {"config": []},
          {"config": {"seed": "0"}}, {"config": {"seed": 0.5}}, {"schedule": "copd"}, {"schedule": {"name": 3}},
          {"content_hash": None},
          {"realised": 1}, {"peak_memory": "2"}]


def damage(folder, how):
    "Write a damaged manifest: text, bytes, or a whole one with other values."
    whole = dict(manifest(), status="running")
    (folder / "manifest.json").write_bytes(how if isinstance(how, bytes) else (json.dumps(whole | how)
                                                                               if isinstance(how, dict)
                                                                               else how).encode())


@pytest.mark.parametrize("how", DAMAGE, ids=lambda how: str(how)[:30])
def test_a_damaged_manifest_is_an_error_that_names_it_and_the_other_runs_are_listed(tmp_path, how):
    for name in ("a", "b"): create_run(tmp_path / name, manifest())
    damage(tmp_path / "a", how)
    for ask in (lambda r: r.manifest, lambda r: r.finished, lambda r: r.schedule, lambda r: r.result, repr,
                lambda r: create_run(r.path, manifest())):
        with pytest.raises(ValueError, match=str(tmp_path / "a" / "manifest.json")): ask(Run(tmp_path / "a"))
    found = list_runs(tmp_path)
    assert found.status.tolist() == ["damaged", "interrupted"] and found.seed.iloc[1] == 0
    assert found.schedule.isna().tolist() == [True, False]
    assert str(tmp_path / "a") in found.to_string(index=False, max_colwidth=None)


def test_a_schedule_that_cant_run_is_an_error_that_names_the_manifest(tmp_path):
    run = create_run(tmp_path / "r", manifest())
    for key, change in (("schedule", {"branches": []}), ("schedule", {"schema": "copd_nb.schedule/2"}), 
                        ("realised", {"phases": [{"name": "a"}]}), ("realised", {"result": "image"})):
        write_json(run.path / "manifest.json", dict(manifest(), status="running") | {key: SCHEDULE.to_dict() | change})
        with pytest.raises(ValueError, match=f"{run.path / 'manifest.json'}: "): run.schedule


def test_a_configuration_may_hold_infinity(tmp_path):
    given = manifest()
    given["config"]["max_grad_norm"] = math.inf
    assert create_run(tmp_path / "r", given).manifest["config"]["max_grad_norm"] == math.inf


@pytest.mark.parametrize("line, said", [(b"1", "is no object, line 2: 1"), (b"[" * 5000, "not JSON, line 2: .*nested"),
                                        (b'"\xff"', "not JSON, line 2: 'utf-8'"), 
                                        (b"9" * 5000, "not JSON, line 2: Exceeds"), (b"", "not JSON, line 2")])
def test_a_damaged_row_is_named_by_its_line(tmp_path, line, said):
    (tmp_path / "events.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError,
                       match=f"events.jsonl holds a line that .*{said}"): EventLog(tmp_path / "events.jsonl").rows()


def test_half_of_a_surrogate_pair_is_read_as_a_question_mark(tmp_path):
    run = create_run(tmp_path / "r", manifest())
    EventLog(run.path / "events.jsonl").append([dict(text="a\ud800b 😀", n=0.1)])
    assert EventLog(run.path / "events.jsonl").rows() == [dict(text="a?b 😀",
                                                               n=0.1)] and run.events.text.tolist() == ["a?b 😀"]


def test_a_last_line_that_is_torn_in_a_letter_is_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_bytes('{"a": "x"}\n{"a": "é'.encode()[:-1])
    assert EventLog(tmp_path / "events.jsonl").rows() == [{"a": "x"}]


@pytest.mark.parametrize("name", ["../text.safetensors", "/etc/passwd", "a/b.safetensors", "text.pt", "",
                                  "x" * 300 + ".safetensors", "\x00.safetensors"])
def test_a_checkpoint_reads_no_file_outside_of_its_folder(tmp_path, name):
    save_checkpoint(tmp_path / "c", TENSORS, {})
    (tmp_path / "c" / "state.json").write_text(json.dumps(dict(files={name: "0"})))
    with pytest.raises(ValueError, match="no readable state.json"): load_checkpoint(tmp_path / "c")


def test_a_file_of_tensors_that_was_damaged_before_it_was_signed(tmp_path):
    save_checkpoint(tmp_path / "c", TENSORS, {})
    data = b"\xff" * 40
    (tmp_path / "c" / "text.safetensors").write_bytes(data)
    files = {"text.safetensors": hashlib.sha256(data).hexdigest()}
    (tmp_path / "c" / "state.json").write_text(json.dumps(dict(files=files)))
    with pytest.raises(ValueError, match=f"{tmp_path / 'c'}/.* is no safetensors file"): load_checkpoint(tmp_path / "c")


def test_a_run_of_a_source_tree_that_is_not_installed_notes_its_version(monkeypatch):
    "On a machine that has the sources on its path only, there is no metadata of this package."
    real = environment_module.version
    def known(name):
        if name == "copd_nb": raise LookupError(name)
        return real(name)
    monkeypatch.setattr(environment_module, "version", known)
    found = environment()["versions"]
    assert found["copd_nb"] == copd_nb.__version__ and found["torch"] == torch.__version__

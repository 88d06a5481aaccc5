"Runs on a real Ray cluster on this machine: the same events, whatever is killed, stalls or goes away."
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from same_runs import PAIR, TINY, same

from copd_nb.engine import executors as executors_module
from copd_nb.scale import cluster as cluster_module
from copd_nb.scale import connection as connection_module
from copd_nb.schedule.copd_schedules import copd
from copd_nb.schedule.live import follow
from copd_nb.schedule.drift import drift
from copd_nb.schedule.local import local_rlvr, synced_copd
from copd_nb.schedule.neighbours import codistill_grpo
from copd_nb.engine.executors import Cluster, Lost, NoPlace
from copd_nb.scale.cluster import RayExecutor
from copd_nb.scale.connection import connect, ray_address
from copd_nb.engine.training import train
from copd_nb.study.jobs import Job, run_of, scores_of
from copd_nb.study.workers import do_all
from copd_nb.policy.toys import minis_base, minis
from copd_nb.policy.core import Policy, weights_hash
from copd_nb.scale.sharding import join_group
from copd_nb.report.command import main
from copd_nb.engine.runs import Run

ray = pytest.importorskip("ray")
from ray import cloudpickle  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.integration]
SMALL = replace(TINY, probe_every=2, eval_every=2, checkpoint_every=1, signals_every=2)
COPD = copd(PAIR, cycles=2, s_rl=1, s_opd=2, beta=0.5)


@pytest.fixture(scope="module")
def start(): return minis_base()


@pytest.fixture(scope="module")
def suite(): return minis(tuple(PAIR))


@pytest.fixture(scope="module")
def alone(suite, start, one_thread, tmp_path_factory):
    "The run as one process does it."
    return train(COPD, suite, start, SMALL, tmp_path_factory.mktemp("alone") / "run", progress=False)


@pytest.fixture(scope="module")
def two_processors():
    "Ray on this machine, as if it had two processors."
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def three_processors():
    "Another Ray, as if this machine had three."
    ray.shutdown()
    ray.init("local", num_cpus=3, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def die(work):
    "A piece of work of the same name that ends its process."
    def broken(*_): os._exit(1)
    broken.__name__ = work.__name__
    return broken


def stall(work):
    "A piece of work of the same name that never ends."
    def broken(*_): time.sleep(3600)
    broken.__name__ = work.__name__
    return broken


class Breaking(RayExecutor):
    "Pieces of work that break, each once: (work, how often it was sent before) → fault(work), sent instead."
    plan: dict = {}
    count: dict = {}

    def at(self, name, work, *args, parts=None):
        key = work.__name__, Breaking.count.setdefault(work.__name__, 0)
        Breaking.count[work.__name__] += 1
        fault = Breaking.plan.pop(key, None)
        return super().at(name, fault(work) if fault else work, *args, parts=parts)


@pytest.fixture
def breaking(monkeypatch):
    "Sets what breaks."
    monkeypatch.setattr(cluster_module, "RayExecutor", Breaking)

    def plan(faults):
        Breaking.plan, Breaking.count = dict(faults), {}
    yield plan
    assert not Breaking.plan, f"never happened: {Breaking.plan}"


def restarts(run) -> list[str]:
    if "restart" not in set(run.events.kind): return []
    return list(run.events.query("kind == 'restart'").reason)


@pytest.mark.slow
def test_workers_give_the_events_of_one_process_though_one_is_killed(suite, start, alone, tmp_path, two_processors,
                                                                     breaking):
    "Two workers, a teacher killed while it scores: the same events and weights, bit for bit, and a row about it."
    breaking({("teacher_scores", 3): die})
    run = train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster="ray")
    same(alone, run)
    told, = restarts(run)  # what was waited for: the scores, or what the same worker still held
    assert re.match(r"\w+ of '(text|image)': ", told)
    assert run.manifest["workers"] == {n: dict(cpus=1, gpus=0, ranks=1) for n in PAIR}


def test_followers_and_averages_live_on_workers(suite, start, tmp_path, two_processors, breaking):
    "Snapshots, moving averages and a rate that falls; a teacher is killed while it scores: bit for bit the same."
    schedule = follow(copd(PAIR, cycles=1, s_rl=1, s_opd=2, beta=0.5), every=2)
    config = replace(SMALL, rate="cosine", average=0.5)
    here = train(schedule, suite, start, config, tmp_path / "here", progress=False)
    breaking({("teacher_scores", 3): die})
    there = train(schedule, suite, start, config, tmp_path / "there", progress=False, cluster="ray")
    same(here, there)
    told, = restarts(there)  # what was waited for: the scores, or what the same worker still held
    assert re.match(r"\w+ of '(text|image)': ", told)
    assert there.manifest["workers"] == {n: dict(cpus=1, gpus=0, ranks=1) for n in PAIR}
    for name in ("result", *PAIR): assert weights_hash(here.average(name)) == weights_hash(there.average(name))


def test_what_is_missing_is_said_before_anything_is_trained(suite, start, tmp_path, two_processors):
    "A graphics card for each branch where there is none."
    with pytest.raises(NoPlace, match="2 workers have no place: 2 GPU are needed, the cluster has 0"):
        train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster=Cluster(gpus=1, place_seconds=2))
    assert Run(tmp_path / "run").status == "failed" and not Run(tmp_path / "run").events.size


def test_jobs_go_as_tasks(tmp_path, two_processors):
    "Runs of a report on the cluster: the numbers of one process; an error of a job is that error."
    tiny = replace(TINY, probe_every=0, eval_every=0)
    jobs = [Job(copd(PAIR, cycles=1, s_rl=1, s_opd=1), replace(tiny, seed=s), prompts=4, samples=1) for s in (0, 1)]
    do_all([(jobs[0], []), (jobs[1], [jobs[0]])], tmp_path / "cluster", workers="ray")
    do_all([(jobs[1], [])], tmp_path / "here", workers=1)
    same(run_of(jobs[1], tmp_path / "here"), run_of(jobs[1], tmp_path / "cluster"))
    assert scores_of(run_of(jobs[1], tmp_path / "here"),
                     jobs[1]).equals(scores_of(run_of(jobs[1], tmp_path / "cluster"), jobs[1]))
    with pytest.raises(ValueError,
                       match="has no nothing"): do_all([(replace(jobs[0], suite="copd_nb.policy.toys:nothing"), [])],
                                                        tmp_path / "cluster", workers="ray")


PIECES = dict(rollouts="rolling out", teacher_scores="scoring", gradients="gradients", update="the update",
              _probe="a probe", _score="an evaluation", _pack="a checkpoint", _piece="weights for a merge")


@pytest.mark.slow
def test_a_worker_killed_in_any_piece_of_work(suite, start, alone, tmp_path, two_processors, breaking):
    "A run in which every piece of work is once the last of its worker; every step is logged once, nothing differs."
    breaking({(work, number): die for work, number in dict(rollouts=2, teacher_scores=2, gradients=6, update=8,
                                                           _probe=60, _score=1, _pack=9, _piece=4).items()})
    began = time.perf_counter()
    run = train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster=Cluster(restarts=8))
    same(alone, run)
    for reason in restarts(run): print(reason)
    print(f"{time.perf_counter() - began:.0f} s in all")
    trained = run.events.query("kind == 'train'")
    assert not trained.duplicated(["global_step", "branch", "stream"]).any()


@pytest.mark.slow
def test_a_stalled_teacher_is_replaced(suite, start, alone, tmp_path, two_processors, breaking):
    "A worker that answers no more is given up after `call_seconds`."
    breaking({("teacher_scores", 2): stall})
    run = train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster=Cluster(call_seconds=25))
    same(alone, run)
    assert len(restarts(run)) == 1 and "has not ended after 25 s" in restarts(run)[0]


@pytest.mark.slow
def test_a_run_that_gets_nowhere_gives_up(suite, start, tmp_path, two_processors, breaking):
    "As many losses as are allowed without a checkpoint in between, and one more; the next call goes on."
    breaking({("rollouts", 2 * n): die for n in range(3)})
    with pytest.raises(Lost, match="rollouts of"): train(COPD, suite, start, SMALL, tmp_path / "run", progress=False,
                                                     cluster=Cluster(restarts=2))
    assert Run(tmp_path / "run").status == "failed"
    assert train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster="ray").finished


@pytest.mark.slow
def test_an_error_of_the_work_is_no_loss(suite, start, tmp_path, two_processors):
    "A reward that raises ends the run with its own error, at once."
    def broken(completions, examples): raise ZeroDivisionError("a reward divides by zero")
    odd = {n: replace(c, reward=broken) if n == "image" else c for n, c in suite.items()}
    with pytest.raises(Exception, match="divides by zero") as caught:
        train(COPD, odd, start, replace(SMALL, failed_reward=None), tmp_path / "run", progress=False, cluster="ray")
    assert not isinstance(caught.value, Lost) and Run(tmp_path / "run").status == "failed"


@pytest.fixture
def two_nodes():
    "Two Ray nodes on this machine; the second one can be taken away."
    from ray.cluster_utils import Cluster as Nodes
    if ray.is_initialized(): ray.shutdown()
    nodes = Nodes(initialize_head=True, head_node_args=dict(num_cpus=1))
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes, second
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
def test_a_node_that_is_removed(suite, start, alone, tmp_path, two_nodes, breaking):
    "With another node to go to the run goes on; without one it says what is missing, and goes on when it is there."
    nodes, second = two_nodes
    spread = Cluster(address=nodes.address, strategy="SPREAD", place_seconds=20)

    def moved(work):
        nodes.remove_node(second)
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        return work

    def removed(work):
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        return work
    breaking({("teacher_scores", 2): moved})
    run = train(COPD, suite, start, SMALL, tmp_path / "run", progress=False, cluster=spread)
    same(alone, run)
    print(restarts(run))
    breaking({("teacher_scores", 2): removed})
    with pytest.raises(NoPlace, match="2 CPU are needed, the cluster has 1") as caught:
        train(COPD, suite, start, SMALL, tmp_path / "again", progress=False, cluster=spread)
    print(caught.value)
    nodes.add_node(num_cpus=1)
    same(alone, train(COPD, suite, start, SMALL, tmp_path / "again", progress=False, cluster=spread))


WORDS = ["train", "copd", "-p", "capabilities", json.dumps(PAIR), "-p", "cycles", "1", "-p", "s_rl", "2", "-p",
         "s_opd", "2", "-c", "prompts", "4", "-c", "opd_prompts", "2",
         "-c", "group_size", "4", "-c", "eval_prompts", "4", "-c", "probe_prompts", "2"]
ALONE = dict(os.environ, OMP_NUM_THREADS="1", RAY_ADDRESS="local")
BIN = Path(sys.executable).parent


def living(process: psutil.Process) -> bool:
    "Whether a process runs; one that has ended and waits to be taken note of does not."
    try: return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def steps_done(process: subprocess.Popen, folder: Path, rows: int = 3):
    "Wait until a run that a process makes has logged some rows of steps."
    while not (log := folder / "events.jsonl").exists() or log.read_bytes().count(b'"train"') < rows:
        assert process.poll() is None
        time.sleep(0.2)


def copd_command(folder, *more): return subprocess.run([BIN / "copd", *WORDS, *more], env=ALONE, capture_output=True,
                                                       text=True, cwd=folder)


@pytest.mark.slow
def test_the_process_that_trains_is_killed(tmp_path):
    "Its workers end with it, and the same call goes on."
    ray.shutdown()
    first = subprocess.Popen([BIN / "copd", *WORDS, "--cluster", "ray", "--out", "apart"], env=ALONE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    steps_done(first, tmp_path / "apart")
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    deadline = time.monotonic() + 120  # the branches end at once, spare workers of Ray after a minute
    while time.monotonic() < deadline and any(living(w) for w in workers): time.sleep(0.5)
    assert workers and not any(map(living, workers))
    assert copd_command(tmp_path, "--cluster", "ray", "--out", "apart").returncode == 0
    assert copd_command(tmp_path, "--out", "here").returncode == 0
    same(Run(tmp_path / "here"), Run(tmp_path / "apart"))


HEAD, CLIENT = "127.0.0.1:26379", "ray://127.0.0.1:24071"


@pytest.fixture
def head(monkeypatch):
    "A cluster as `ray start` makes it, with a folder of its own, which is what its processes are known by."
    ray.shutdown()
    monkeypatch.setitem(ALONE, "RAY_AUTH_MODE", "disabled")  # a machine need not have a token
    with tempfile.TemporaryDirectory(prefix="ray",
                                     ignore_cleanup_errors=True) as folder:  # paths of sockets must be short
        subprocess.run([BIN / "ray", "start", "--head", "--num-cpus=2", "--port=26379",
                        "--ray-client-server-port=24071", "--include-dashboard=false"],
                       env=dict(ALONE, RAY_TMPDIR=folder), stdout=subprocess.DEVNULL, check=True)
        while socket.socket().connect_ex(("127.0.0.1", 24071)): time.sleep(0.5)
        yield folder
        end(folder)


def end(folder: str):
    "Kill the processes of a cluster."
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == folder: process.kill()


@pytest.mark.slow
def test_the_command_line_joins_a_cluster_through_its_client(tmp_path, head):
    "`copd train --cluster ray://…` gives what `copd train` gives."
    apart = copd_command(tmp_path, "--cluster", CLIENT, "--out", "apart")
    assert apart.returncode == 0, apart.stderr
    assert copd_command(tmp_path, "--out", "here").returncode == 0
    same(Run(tmp_path / "here"), Run(tmp_path / "apart"))


@pytest.mark.slow
@pytest.mark.parametrize("address", [HEAD, CLIENT])
def test_a_cluster_goes_away(tmp_path, head, address):
    "The run ends, and nobody waits in silence; the same call goes on elsewhere, here in one process."
    run = subprocess.Popen([BIN / "copd", *WORDS, "--cluster", address, "--out", "apart"], env=ALONE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    steps_done(run, tmp_path / "apart")
    end(head)
    said = run.communicate(timeout=120)[1]
    assert run.returncode, "it ended well"
    if address == CLIENT:  # without the client it is Ray that ends the process
        assert run.returncode == 2, said
        assert "copd: the Ray cluster is gone" in said
        assert Run(tmp_path / "apart").manifest["status"] == "failed"
    assert copd_command(tmp_path, "--out", "apart").returncode == 0
    assert copd_command(tmp_path, "--out", "here").returncode == 0
    same(Run(tmp_path / "here"), Run(tmp_path / "apart"))


def test_an_address_where_nobody_answers(tmp_path, capsys):
    "One line and status 2, at once; nobody is waited for."
    ray.shutdown()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "head:port"):
        assert main([*WORDS, "--cluster", address, "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.startswith(f"copd: no Ray cluster answers at {address}: ")


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_client_tries_again(monkeypatch, failures):
    "The server that Ray starts for a client may die at its start; three times in a row is an error."
    tried = []

    def init(**words):
        tried.append(words["address"])
        if len(tried) <= failures: raise ConnectionAbortedError("no server")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else `connect` may set it for the tests that follow
    monkeypatch.setattr(connection_module, "ray_package", lambda: SimpleNamespace(init=init,
                                                                                  is_initialized=lambda: False,
                                                                                  util=ray.util))
    with socket.create_server(("127.0.0.1",
                               0)) as server, pytest.raises(ConnectionAbortedError) if failures == 3 else nullcontext():
        connect(Cluster(address=f"ray://127.0.0.1:{server.getsockname()[1]}"))
    assert len(tried) == min(failures + 1, 3)


def test_a_client_that_gave_up_is_a_cluster_that_is_gone():
    "A handle of Ray's client asks the cluster when it is hashed; where the client has given up, the run is lost."
    class Handle:
        def __hash__(self): raise ConnectionError("Failed to reconnect within the reconnection grace period (30s)")
    executor = RayExecutor.__new__(RayExecutor)
    executor.calls, executor.cluster = [executors_module.Call("text", "pack", Handle())], Cluster()
    with pytest.raises(Lost, match="the Ray cluster is gone"): executor.settle()


def test_a_note_of_a_cluster_that_is_gone(tmp_path, monkeypatch):
    "What `ray start` has left behind is believed only while somebody listens there; what is named goes first."
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    with pytest.warns(UserWarning, match="127.0.0.1:1 that does not answer"): assert ray_address(Cluster()) == "local"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", listening := f"127.0.0.1:{server.getsockname()[1]}")
        assert ray_address(Cluster()) == listening
    with pytest.raises(ConnectionError, match=listening): ray_address(Cluster())
    assert ray_address(Cluster(address="local")) == "local"


def joined(place, executor):
    "The state of a worker that is one of several: its group."
    rank, size, address = place
    return join_group(rank, size, f"tcp://{address}", timeout=200)


def added(group) -> float: return group.total(torch.tensor(group.rank + 1.0)).item()


def one_raises(group):
    if group.rank: raise ValueError("no such thing")
    group.total(torch.ones(1))


def one_dies(group):
    if group.rank: os._exit(1)
    group.total(torch.ones(1))


@pytest.mark.slow
def test_a_worker_that_fails_lets_go_of_the_others(three_processors):
    "Whoever waits for it gets an error at once; what is raised is what went wrong, and a lost worker is a lost worker."
    executor, began = RayExecutor(Cluster(ranks=2), joined, (), {"text": ()}), time.monotonic()
    assert executor.get(executor.at("text", added)) == 3
    with pytest.raises(ValueError, match="no such thing"): executor.get(executor.at("text", one_raises))
    executor.again()
    with pytest.raises(Lost, match="one_dies"): executor.get(executor.at("text", one_dies))
    executor.close()
    assert time.monotonic() - began < 150


@pytest.mark.slow
def test_a_branch_in_two_workers_gives_the_run_of_one(suite, start, alone, tmp_path, three_processors):
    "Three workers, two of which hold one branch: the rows of one process, rounding aside."
    run = train(COPD, suite, start, SMALL, tmp_path / "run", progress=False,
                cluster=dict(special={"text": dict(ranks=2)}))
    pd.testing.assert_frame_equal(alone.events.drop(columns=["seconds"]), run.events.drop(columns=["seconds"]),
                                  atol=1e-4, rtol=1e-3)
    for a, b in zip(Policy.load(alone.path / "result").parameters(),
                    Policy.load(run.path / "result").parameters()): assert torch.allclose(a, b, atol=1e-5)
    assert run.manifest["workers"]["text"]["ranks"] == 2


@pytest.mark.slow
def test_branches_in_workers_meet_as_in_one_process(suite, start, tmp_path, two_processors, breaking):
    "A sync with an outer step and averaged moments; a worker killed while branches go on, and again while they meet."
    schedule = local_rlvr(PAIR, 4, 2, moments="average", outer_lr=0.7, outer_momentum=0.9)
    here = train(schedule, suite, start, TINY, tmp_path / "here", progress=False)
    breaking({("_go_on", 1): die, ("_meet", 2): die})
    there = train(schedule, suite, start, TINY, tmp_path / "there", progress=False,
                  cluster=Cluster(shard_bytes=200_000))
    assert len(restarts(there)) == 2
    same(here, there)


@pytest.mark.parametrize("schedule, piece", [
    pytest.param(codistill_grpo(["text"], 2, beta=0.3, lead=1), "rollouts", marks=pytest.mark.slow),
    pytest.param(synced_copd(PAIR, 12, 1, 1, control=drift(target=1e-5, beta="scale")), "gradients",
                 marks=pytest.mark.slow)], ids=lambda x: str(x)[:8])
def test_lent_completions_drift_and_live_signals_in_workers(schedule, piece, suite, start, tmp_path, two_processors,
                                                            breaking):
    "One branch learns from the other's completions; branches meet by drift; a worker killed on the way."
    config = replace(SMALL, signals_every=1, probe_every=1)
    here = train(schedule, suite, start, config, tmp_path / "here", progress=False)
    breaking({(piece, 4): die})
    there = train(schedule, suite, start, config, tmp_path / "there", progress=False, cluster="ray")
    same(here, there)
    assert len(restarts(there)) == 1 and "signal" in set(there.events.kind)

"""Processes and signals: a loader process that dies, Ctrl-C, torchrun's others, a broken clock."""

import errno
import gc
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import dataloader

import pretrain
import reproduce
from experiments import paper, stages
from images import batches, convert, downloads, views
from plumbing import checkpoints, command_line, log, processes, signals, weights

FORK = multiprocessing.get_context("fork")


class Program:
    """A function run as a program in a forked process, with its stderr in a file."""

    def __init__(self, path, function, *args, **environment):
        self.path = path
        args = function, args, environment
        self.process = FORK.Process(target=self.run, args=args, daemon=True)
        self.process.start()

    def run(self, function, args, environment):
        os.environ.update(environment)
        sys.stderr = open(self.path, "w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        with command_line.one_line_errors(stoppable=True):
            Path(f"{self.path}.ready").touch()  # from here on signals are caught
            function(*args)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """(exit status, lines of stderr); the process is killed if it is not about to end."""
        self.process.join(20)
        self.process.kill()
        return self.process.exitcode, self.path.read_text().splitlines()


def wait_until(condition):
    """Wait until condition() holds, at most 20 seconds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -------------------------------------------------------- loader processes


ITERATOR = dataloader._MultiProcessingDataLoaderIter


class Deadly(views.Samples):
    """Samples whose second batch kills its loader process."""

    def __getitem__(self, keys):
        if keys == [1]:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return keys


def test_killed_loader_process_is_an_error_of_the_loop_alone(monkeypatch):
    """Nothing is raised while the loop does something else; then one line names --workers."""
    monkeypatch.setattr(ITERATOR._try_get_data, "__defaults__", (0.2,))  # not every 5 seconds
    seen = []
    with pytest.raises(ValueError, match="a loader process was killed, .*: use fewer --workers"):
        for batch in batches.loader(Deadly([], True, 0), [[0], [1], [2]], 1):
            time.sleep(0.4)  # a save, say
            seen.append(batch)
    assert seen == [[0]]
    wait_until(lambda: not multiprocessing.active_children())


def test_errors_of_a_dataset_in_a_loader_process_stay_what_they_are():
    """A defect, KeyError and FileNotFoundError are not taken for a killed process.

    torch's iterator ends with the error, not when the garbage collector finds it.
    """
    gc.collect()

    class Broken(views.Samples):
        def __getitem__(self, keys):
            raise keys[0]

    for error in (RuntimeError("exited unexpectedly"), FileNotFoundError("gone"), KeyError("k")):
        for count in (0, 1, 2):
            with pytest.raises(type(error)) as caught:
                list(batches.loader(Broken([], True, 0), [[error]], count))
            iterators = [each for each in gc.get_objects() if type(each) is ITERATOR]
            assert caught.value  # it lives, and with it the frames in which it was raised
            assert count == 0 or not iterators
    wait_until(lambda: not multiprocessing.active_children())  # else the program would wait


def test_only_what_the_file_raised_is_a_disk_error(tmp_path, monkeypatch):
    """An OSError that torch hides is named; another RuntimeError is no error of the disk."""
    model = torch.nn.Linear(1, 1)
    model.config = processes.Process()
    monkeypatch.setattr(checkpoints, "asdict", lambda config: {})

    def save(error):
        monkeypatch.setattr(torch, "save", error)
        checkpoints.save(tmp_path, "toy", type("Args", (), {})(), 1, model, model, model)

    def export(error):
        monkeypatch.setattr(torch, "save", error)
        weights.write(tmp_path / "a.pth", {"weight": torch.zeros(1)})

    def full(state, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")

    def broken(state, file):
        raise RuntimeError("not of the file")

    for write in (save, export):
        with pytest.raises(ValueError, match=r"\(No space left on device\): make room"):
            write(full)
        with pytest.raises(RuntimeError, match="not of the file"):
            write(broken)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------- signals


def sleep_after(number):
    """Get a signal, then sleep."""
    os.kill(os.getpid(), number)
    Path(os.environ["READY"]).touch()
    time.sleep(20)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigint_ends_it_in_one_line(first, tmp_path):
    """After SIGTERM or SIGINT, in the midst of a step: status 130."""
    ready = tmp_path / "ready"
    program = Program(tmp_path / "said", sleep_after, first, READY=str(ready))
    wait_until(ready.exists)
    program.signal(signal.SIGINT)
    status, said = program.end()
    assert status == 130 and len(said) == 1 and "ended by a second signal" in said[0]


def test_waiting_for_anothers_download_ends_on_a_signal(tmp_path):
    """SIGTERM and SIGINT: status 75 and one line; what the other has fetched stays."""
    (tmp_path / "a.part").write_bytes(b"so far")
    with open(tmp_path / "a.part", "rb") as file, downloads.exclusive(file):
        for number in (signal.SIGTERM, signal.SIGINT):
            (tmp_path / "said.ready").unlink(missing_ok=True)
            args = "a.gz", "http://127.0.0.1:9/a.gz", [tmp_path], None
            program = Program(tmp_path / "said", downloads.fetch, *args)
            wait_until(Path(f"{program.path}.ready").exists)
            program.signal(number)
            status, said = program.end()
            assert status == signals.STOPPED and len(said) == 1
            assert "waited for another process" in said[0]
    assert (tmp_path / "a.part").read_bytes() == b"so far"


STAGE = """  # in place of a script: it needs some time to save
import pathlib, signal, sys, time

out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()

def stop(*_):
    (out / "saving").touch()
    time.sleep({seconds})
    (out / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
(out / "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("seconds, presses", [(0.5, 1), (60, 2)], ids=["once", "twice"])
def test_reproduce_waits_for_its_stage_to_save(seconds, presses, tmp_path, monkeypatch):
    """SIGINT to reproduce.py alone: it waits, one line, status 75; a second one waits no more."""
    (tmp_path / "train_tokenizer.py").write_text(STAGE.format(seconds=seconds))
    monkeypatch.setattr(stages, "HERE", tmp_path)
    experiment = {"summary": lambda runner: runner.stage("t", "train_tokenizer.py")}
    monkeypatch.setattr(paper, "EXPERIMENTS", experiment)
    program = Program(tmp_path / "said", reproduce.main, ["--out", str(tmp_path / "out")])
    for sign in ("ready", "saving")[:presses]:
        wait_until(lambda: list(tmp_path.glob(f"out/*/{sign}")))
        program.signal(signal.SIGINT)
    status, said = program.end()
    assert status == signals.STOPPED and len(said) == 1
    assert said[0].endswith("stopped; continue with --resume")
    assert len(list(tmp_path.glob("out/*/saved"))) == (presses == 1)


# -------------------------------------------------------- freed memory


def new_pages():
    """How many pages 20 tensors of 64 MB, one after another, have to ask the system for."""
    for number in range(25):
        if number == 5:  # once the allocator has settled
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def new_pages_before_and_after_setup():
    before = new_pages()
    processes.setup("cpu", "off")
    return before, new_pages()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_unless_glibc_is_told_otherwise(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, after = pool.submit(new_pages_before_and_after_setup).result()
    assert 10 * after < before
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert not processes.keep_freed_memory()


# -------------------------------------------------------- torchrun's processes


def fail_alone(error):
    """Three processes of which the last fails while the others wait for its numbers."""
    process = processes.setup("cpu", "off")
    processes.all_sum(torch.ones(1))  # all are connected: gloo itself prints if that fails
    if process.rank == 2:
        raise error
    processes.all_sum(torch.ones(1))


def ends_of_three(folder, error):
    """[(exit status, stderr) of each process], the last of which raises `error`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "3"}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    programs = [
        Program(folder / f"said{rank}", fail_alone, error, RANK=str(rank), **address)
        for rank in range(3)
    ]
    return [program.end() for program in programs]


def test_bad_input_of_one_process_ends_all_in_one_line_each(tmp_path):
    """The others say which process failed and why."""
    *others, last = ends_of_three(tmp_path, ValueError("b.png is not a readable image"))
    assert last[0] == 2 and last[1][0].endswith("error: b.png is not a readable image")
    for status, said in others:
        assert status == 2 and len(said) == 1
        assert said[0].endswith(
            "error: another process failed: process 2: b.png is not a readable image"
        )


def test_defect_of_one_process_is_shown_once(tmp_path):
    """Its own traceback stays; the others need one line."""
    *others, (status, said) = ends_of_three(tmp_path, TypeError("a defect"))
    assert status == 1 and said[0].startswith("Process ") and "Traceback" in said[1]
    assert said[-1] == "TypeError: a defect"
    for status, said in others:
        assert status == 2 and len(said) == 1 and "process 2: TypeError('a defect')" in said[0]


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    """No test waits ten minutes for a process."""
    monkeypatch.setattr(processes, "WAITING", timedelta(seconds=20))


def meeting(store, ranks, world=3):
    """What `meet` returned or raised in each of these ranks, which start at the same time."""

    def one(rank):
        try:
            return processes.meet(store, rank, world)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, ranks))


def test_each_start_has_a_name_of_its_own():
    """Three processes agree; after a restart they agree on another, though the store is the old."""
    store = dist.HashStore()
    names = [meeting(store, range(3)) for _ in range(3)]
    assert all(len(set(start)) == 1 for start in names) and len({start[0] for start in names}) == 3


def test_a_start_waits_for_those_that_come_again(monkeypatch):
    """Tokens of dead processes do not count: two of three give up in one line that names the third.

    When all three come, they meet.
    """
    store = dist.HashStore()
    meeting(store, range(3))
    with monkeypatch.context() as short:
        short.setattr(processes, "WAITING", timedelta(seconds=0.3))
        first, second = meeting(store, [0, 1])
    assert first.startswith("process 0 waited 0:00:00.300000 for process 2: is torchrun running")
    assert second.startswith("process 1 waited")
    assert len(set(meeting(store, [2, 0, 1]))) == 1


def test_an_error_before_the_start_ends_the_wait(monkeypatch):
    """A process that fails before it meets the others, a node without the checkpoint, say."""
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 2, 3)]))
    processes.announce("no checkpoint")
    assert meeting(store, [0]) == ["another process failed: process 2: no checkpoint"]


def test_a_node_without_the_checkpoint_says_from_where_to_copy_it(tmp_path, monkeypatch, capsys):
    """--resume on the second of two nodes, whose folder is empty: one line names the first."""
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    with pytest.raises(SystemExit):
        pretrain.main(["--resume", "--out", str(tmp_path)])
    assert "on this node: copy it from node-a, or share --out" in capsys.readouterr().err


# -------------------------------------------------------- the clock


@pytest.mark.parametrize("step", [0.0, -3600.0], ids=["stands still", "goes back"])
def test_a_broken_clock_harms_nothing(step, tmp_path, monkeypatch, capsys):
    """Progress of training, conversion and reproduce with a wall clock that does not advance."""
    now = [1e9]

    def wall():
        now[0] += step
        return now[0]

    monkeypatch.setattr(time, "time", wall)
    if step == 0:
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, wall)
    written = log.Log(tmp_path, 10)
    written.step(5, 8, loss=1.0)
    assert log.read_metrics(tmp_path)[0]["seconds"] >= 0
    shown = convert.Progress("train", 9)
    shown.last -= 10
    shown.show(4)
    estimate = log.Estimate(100)
    for _ in range(20):
        estimate.begin()
        estimate.end()
    progress = stages.Progress({}, 1)
    stage = progress.begin("tokenizer", "train_tokenizer.py", tmp_path / "a.log", True, False)
    assert stage.elapsed(time.monotonic()) >= 0 and progress.seconds_left() > 0
    assert "-" not in capsys.readouterr().out

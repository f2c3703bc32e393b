"""Kill, stop, starve and damage training runs, and check that no bit of the result changes.

    python -m experiments.torture                 # all experiments, nine minutes on two cores
    python -m experiments.torture kill damage     # some of them

Exit status 1 if one of them fails. docs/interruptions.md lists what is promised.

Every experiment trains a small model twice, without interference and with it, and compares the
weights. A run is a forked process, so that it can be killed like any other, or several processes
under torchrun. CPU, float32, one thread.
"""

import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments import HERE, short_runs
from experiments.short_runs import MODULES, NOISE, SCRIPTS, different_weights
from plumbing import checkpoints, command_line, noise, schedules, signals

FORK = multiprocessing.get_context("fork")
STEPS = 40
LENGTH = {  # ten times as long as in short_runs: STEPS steps
    "tokenizer": ["--steps", "40", "--warmup-steps", "4"],
    "beit": ["--epochs", "10", "--warmup-epochs", "1"],
    "cls": ["--epochs", "10", "--warmup-epochs", "1"],
    "seg": ["--steps", "40", "--warmup-steps", "4"],
}


class Bench:
    """A folder with a tiny data set and an uninterrupted run of each script to compare with."""

    def __init__(self, folder):
        self.folder, self.arrays = folder, short_runs.make_arrays(folder / "tiny.npz")
        for stage in SCRIPTS:
            status = self.run(stage, folder / stage)
            assert status == 0, f"the uninterrupted {stage} run failed: {self.said(stage)}"

    def flags(self, stage):
        """Flags of a run of 40 steps with all randomness switched on, saving after every step."""
        flags = short_runs.script_flags(stage, self.arrays, self.folder)
        return [*flags, *NOISE[stage], *LENGTH[stage], "--save-every", "1"]

    def start(self, stage, out, *more, hook=None):
        """Start a run in a forked process, which first calls hook(); resume what is in `out`."""
        saved = any((out / name).exists() for name in checkpoints.CHECKPOINTS)
        resume = ["--resume"] if saved else []
        argv = [*self.flags(stage), *more, *resume, "--out", str(out)]
        process = FORK.Process(target=child, args=(stage, argv, self.said_file(stage), hook))
        process.start()
        return process

    def run(self, stage, out, *more, hook=None):
        """Run to the end; return the exit status."""
        process = self.start(stage, out, *more, hook=hook)
        process.join()
        return process.exitcode

    def said_file(self, stage):
        """Where the script's processes write their stderr."""
        return self.folder / f"{stage}.txt"

    def said(self, stage):
        """What the script's last process wrote to stderr."""
        return self.said_file(stage).read_text()

    def same(self, stage, out):
        """Does `out` hold the weights of the uninterrupted run, bit for bit?"""
        return not different_weights(self.folder / stage, out)


def child(stage, argv, said_file, hook):
    """What a forked process runs: the script's `if __name__ == "__main__"`."""
    sys.argv = [SCRIPTS[stage][0]]
    with open(said_file, "w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if hook:
        hook()
    with command_line.one_line_errors(stoppable=True):
        MODULES[stage].main(argv)


def at_call(module, name, number, act):
    """Return a hook that makes the `number`-th call of module.name call act() first."""

    def hook():
        original, calls = getattr(module, name), []

        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                act()
            return original(*args, **kwargs)

        setattr(module, name, wrapper)

    return hook


def terminate():
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


# -------------------------------------------------------- experiments: yield (case, did it hold)


def kill(bench):
    """kill -9 at 20 moments of each script's run, five of them while it writes a checkpoint."""
    for stage in SCRIPTS:
        rng, out = random.Random(stage), bench.folder / f"kill-{stage}"
        kills = writing = 0
        while kills < 20:
            (out / "checkpoint.tmp").unlink(missing_ok=True)
            process = bench.start(stage, out)
            if kills % 4 == 3:  # as soon as there is a half-written file
                while not (out / "checkpoint.tmp").exists() and process.is_alive():
                    pass
                writing += process.is_alive()
            else:
                time.sleep(rng.uniform(0, 0.5))
            finished = not process.is_alive()
            process.kill()
            process.join()
            if not finished:
                kills += 1
                continue
            if not bench.same(stage, out):
                break
            for path in out.iterdir():  # too late to kill it: start a new run for the other kills
                path.unlink()
        held = bench.run(stage, out) == 0 and bench.same(stage, out)
        yield f"{stage}: {kills} kills, {writing} during a write", held


def workers(bench):
    """1 and 4 loader processes, compared with none."""
    for stage in SCRIPTS:
        for count in (1, 4):
            out = bench.folder / f"workers-{stage}-{count}"
            status = bench.run(stage, out, "--workers", str(count))
            yield f"{stage}: {count} workers", status == 0 and bench.same(stage, out)


def torchrun(stage, flags, out, count=2):
    """Weights after a run under torchrun with `count` processes."""
    script = SCRIPTS[stage][0]
    done = short_runs.torchrun(script, *flags, "--out", str(out), processes=count)
    assert done.returncode == 0, done.stderr
    return short_runs.weights(out)


def process_counts(bench):
    """1, 2 and 4 processes with one global batch, and 2 that resume a run of 1.

    After 20 steps their weights differ by at most 1e-6.
    """
    for stage in SCRIPTS:
        more = ["--steps", "20"] if "--steps" in LENGTH[stage] else ["--epochs", "5"]
        more += ["--lr", "1e-4", "--save-every", "100"]
        if stage == "tokenizer":
            # Normalised logits cancel some biases, so their gradients are rounding errors, which
            # AdamW turns into whole steps.
            more.append("--no-normalise-logits")
        flags, folder = [*bench.flags(stage), *more], bench.folder
        expected = torchrun(stage, flags, folder / f"processes-{stage}-1", 1)
        two, four = folder / f"processes-{stage}-2", folder / f"processes-{stage}-4"
        found = {
            "2 processes": torchrun(stage, [*flags, "--accumulate", "2"], two, 2),
            "4 processes": torchrun(stage, flags, four, 4),
        }
        out = folder / f"processes-{stage}-resumed"
        hook = at_call(signals, "stop_asked", 10, terminate)
        assert bench.run(stage, out, *more, hook=hook) == signals.STOPPED, bench.said(stage)
        found["1 process, then 2"] = torchrun(stage, [*flags, "--resume"], out)
        for name, weights in found.items():
            gap = max((weights[key] - expected[key]).abs().max().item() for key in expected)
            yield f"{stage}: {name}, largest difference {gap:.1e}", gap <= 1e-6


def stop(bench):
    """SIGTERM during a step, an evaluation and data loading: status 75, then the same end."""
    for stage in SCRIPTS:
        late = ["--save-every", "1000"]  # so that only the signal makes a checkpoint
        places = {
            "a step": at_call(schedules, "set_lr", 7, terminate),
            "the last evaluation": at_call(MODULES[stage], "evaluate", 1, terminate),
            "data loading": at_call(noise, "sample_rng", 100, terminate),
        }
        for place, hook in places.items():
            out = bench.folder / f"stop-{stage}-{place}"
            status = bench.run(stage, out, *late, hook=hook)
            saved = checkpoints.load(out / "checkpoint.pt", MODULES[stage].KIND)["step"]
            held = status == signals.STOPPED and saved > 0 and bench.said(stage).count("\n") == 1
            held = held and bench.run(stage, out, *late) == 0 and bench.same(stage, out)
            yield f"{stage}: during {place}", held


def job_of_two(bench, stage, out, interrupt=None):
    """Exit status of a job of two processes under torchrun that restarts failed processes.

    interrupt(job) is called when about ten steps are done. A job resumes what is in `out`.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node=2", "--max-restarts=2"]
    flags = [*bench.flags(stage), "--save-every", "10", "--out", str(out)]
    flags += ["--resume"] if out.exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(bench.said_file(stage), "w") as file:
        command = [*launcher, SCRIPTS[stage][0], *flags]
        job = subprocess.Popen(command, cwd=HERE, env=environment, stdout=file, stderr=file)
    if interrupt:
        while not (out / "previous.pt").exists() and job.poll() is None:
            time.sleep(0.01)
        interrupt(job)
    return job.wait(timeout=300)


def children(process):
    """The process numbers of what a process has started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in found.split()]


def kill_process(job, number):
    """kill -9 one process of a job under torchrun; number 0 has the lock."""
    os.kill(children(job)[number], signal.SIGKILL)


def restart(bench):
    """Under torchrun --max-restarts=2: kill -9 one of two processes, and SIGTERM to torchrun.

    After the kill the job recovers and ends with the same bits. After SIGTERM every process stops
    with a checkpoint, and the job that is started again ends with the same bits.
    """
    for stage in SCRIPTS:
        names = "calm", "killed", "stopped"
        calm, killed, stopped = (bench.folder / f"restart-{stage}-{name}" for name in names)
        assert job_of_two(bench, stage, calm) == 0, bench.said(stage)
        number = 0 if stage in ("beit", "seg") else -1
        status = job_of_two(bench, stage, killed, lambda job: kill_process(job, number))
        held = status == 0 and not different_weights(calm, killed)
        yield f"{stage}: a process killed, status {status}", held
        job_of_two(bench, stage, stopped, lambda job: job.terminate())
        orderly = bench.said(stage).count("stopped by a signal") == 2
        again = job_of_two(bench, stage, stopped)
        yield f"{stage}: SIGTERM", orderly and again == 0 and not different_weights(calm, stopped)


def node(bench, number, port, out, *flags, launch=()):
    """Start pretrain.py on one of two nodes: a launcher with two processes.

    launch: further flags of torchrun. What they say is appended to the file node<number>.txt.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    launcher += [f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    command = [*launcher, *launch, SCRIPTS["beit"][0], *flags, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(bench.folder / f"node{number}.txt", "a") as file:
        return subprocess.Popen(command, cwd=HERE, env=environment, stdout=file, stderr=file)


def kill_node(launcher):
    """kill -9 a launcher and its processes at once, as if the machine had lost its power."""
    for number in (launcher.pid, *children(launcher)):
        os.kill(number, signal.SIGKILL)
    launcher.wait()


def free_port():
    """A port that no program on this machine uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nodes(bench):
    """Two launchers of two processes with --nnodes=2 against one of four; a node dies or is late.

    Both are on this machine. Only the first node has a folder OUT, except where they share it.
    """
    flags = [*bench.flags("beit"), "--epochs", "5", "--lr", "1e-4", "--save-every", "5"]
    expected = torchrun("beit", flags, bench.folder / "nodes-one", 4)

    def gap(out):
        found = short_runs.weights(out)
        return max((found[name] - expected[name]).abs().max().item() for name in expected)

    first, second = bench.folder / "nodes-first", bench.folder / "nodes-second"
    port = free_port()
    both = [node(bench, 0, port, first, *flags), node(bench, 1, port, second, *flags)]
    held = [launcher.wait(300) for launcher in both] == [0, 0] and gap(first) <= 1e-6
    yield f"largest difference {gap(first):.1e}, one folder", held and not second.exists()

    port = free_port()
    both = [node(bench, 0, port, first, "--resume"), node(bench, 1, port, second, "--resume")]
    held = [launcher.wait(300) for launcher in both] == [1, 1]  # torchrun's own status
    said = [(bench.folder / f"node{number}.txt").read_text() for number in (0, 1)]
    held = held and "another process failed" in said[0] and "copy it from 127.0.0.1" in said[1]
    yield "--resume without the checkpoint on the second node", held

    out, port = bench.folder / "nodes-killed", free_port()
    both = [node(bench, i, port, out, *flags, launch=["--max-restarts=3"]) for i in (0, 1)]
    while not (out / "previous.pt").exists() and both[0].poll() is None:
        time.sleep(0.01)
    kill_node(both[1])
    both[1] = node(bench, 1, port, out, *flags, launch=["--max-restarts=3"])
    held = [launcher.wait(300) for launcher in both] == [0, 0] and gap(out) <= 1e-6
    yield f"the second killed and started again, largest difference {gap(out):.1e}", held

    alone = node(bench, 1, free_port(), out, *flags, launch=["--rdzv-conf=timeout=3"])
    held = alone.wait(60) == 1 and "timed out" in (bench.folder / "node1.txt").read_text()
    yield "the first node never comes: torchrun gives up after its timeout", held


def full_disk(bench):
    """The disk fills during a save: one line; the last checkpoint stays, and --resume works."""
    for stage in SCRIPTS:
        out = bench.folder / f"full-{stage}"
        size = (bench.folder / stage / "checkpoint.pt").stat().st_size // 2

        def fill():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead of killing
        status = bench.run(stage, out, hook=at_call(checkpoints, "save", 9, fill))
        said = bench.said(stage).strip()
        held = status == 2 and said.count("\n") == 0 and "cannot write" in said
        saved = checkpoints.load(out / "checkpoint.pt", MODULES[stage].KIND)["step"]
        held = held and saved == 7 and bench.run(stage, out) == 0 and bench.same(stage, out)
        yield f"{stage}: {said.split(': ', 2)[-1][:60]}", held


def damaged(content, case, rng):
    """The bytes of a file, cut off in odd cases; in even ones one or eight bits are flipped."""
    content = bytearray(content)
    if case % 2:
        return content[: rng.randrange(len(content))]
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def damage(bench):
    """50 damaged checkpoints: the run resumes from the one before, or refuses in one line.

    It never ends with other weights or with a traceback.
    """
    stage, rng = "cls", random.Random(0)
    half = bench.folder / "damage"
    bench.run(stage, half, hook=at_call(signals, "stop_asked", STEPS // 2, terminate))
    whole = {name: (half / name).read_bytes() for name in checkpoints.CHECKPOINTS}
    ends = {"newest": 0, "older": 0, "refused": 0}
    held = True
    for case in range(50):
        both = case % 5 == 4  # otherwise only the newest is damaged
        for name in checkpoints.CHECKPOINTS[: 2 if both else 1]:
            (half / name).write_bytes(damaged(whole[name], case, rng))
        status, said = bench.run(stage, half), bench.said(stage).strip()
        if status == 2:
            held, end = held and said.count("\n") == 0 and both, "refused"
        else:
            held = held and status == 0 and bench.same(stage, half) and "Traceback" not in said
            end = "older" if "previous.pt" in said else "newest"
        ends[end] += 1
        for name in checkpoints.CHECKPOINTS:
            (half / name).write_bytes(whole[name])
    yield f"{stage}: " + ", ".join(f"{end} {count}" for end, count in ends.items()), held


def locked(bench):
    """A second run in an --out that is in use is refused, and the message names the process."""
    out = bench.folder / "locked"
    first = bench.start("cls", out, hook=at_call(signals, "stop_asked", 5, lambda: time.sleep(8)))
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.005)
    status, said = bench.run("cls", out), bench.said("cls")
    named = f"in use by process {first.pid} on" in said
    first.join()
    yield f"cls: {said.strip()[-60:]}", status == 2 and named and bench.same("cls", out)


EXPERIMENTS = {
    "kill": kill,
    "workers": workers,
    "processes": process_counts,
    "stop": stop,
    "restart": restart,
    "nodes": nodes,
    "full_disk": full_disk,
    "damage": damage,
    "locked": locked,
}


def main(argv=None):
    parser = command_line.Parser(__doc__)
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("names", nargs="*", help=f"experiments to run: {names}; default: all")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {', '.join(unknown)}")
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in args.names or EXPERIMENTS:
            print(f"{name}: {EXPERIMENTS[name].__doc__.splitlines()[0]}", flush=True)
            start = time.monotonic()
            for case, held in EXPERIMENTS[name](bench):
                failed += not held
                verdict, seconds = "held" if held else "FAILED", time.monotonic() - start
                print(f"    {verdict}  {case}  ({seconds:.0f} s)", flush=True)
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""Stop it anywhere, lose nothing: kill, stop, starve and damage the four training scripts and compare the final bits.

    python torture.py                      # everything, about nine minutes on two cores; exit status 1 if one fails
    python torture.py kill damage          # some of it

Every experiment trains a small model to the end without interference, then again with it, and compares the weights.
What is promised stands in README.md, *When a run is stopped*. A run is a forked process of its own, so that it can be
killed like any other, or several processes under torchrun. CPU, float32, one thread.
"""

import argparse
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
import test_beit
import training
from test_beit import COMMON, HERE, MODULES, NOISE, SCRIPTS, weights

FORK = multiprocessing.get_context("fork")
LENGTH = {  # the same runs as in test_beit.py, longer
    "tokenizer": ["--steps", "40", "--warmup-steps", "4"],
    "beit": ["--epochs", "10", "--warmup-epochs", "1"],
    "cls": ["--epochs", "10", "--warmup-epochs", "1"],
    "seg": ["--steps", "40", "--warmup-steps", "4"],
}
STEPS = 40


class Bench:
    """A folder with a small data set, and for each script an uninterrupted run to compare with."""

    def __init__(self, folder):
        self.folder, self.arrays = folder, test_beit.make_arrays(folder / "tiny.npz")
        for stage in SCRIPTS:
            assert self.run(stage, folder / stage) == 0, f"the uninterrupted {stage} run failed: {self.said(stage)}"

    def flags(self, stage):
        """A run of 40 steps with everything random switched on, saving after every one."""
        flags = [*SCRIPTS[stage][1:], *COMMON, *NOISE[stage], *LENGTH[stage], "--data", self.arrays]
        flags += ["--save-every", "1"]
        if stage == "beit":
            flags += ["--tokenizer", str(self.folder / "tokenizer" / "checkpoint.pt")]
        if stage in ("cls", "seg"):
            flags += ["--init", str(self.folder / "beit" / "checkpoint.pt")]
        return flags

    def start(self, stage, out, *more, hook=None):
        """Start a run in a forked process; it resumes what is in `out`. hook() is called in it before."""
        resume = ["--resume"] if any((out / name).exists() for name in training.CHECKPOINTS) else []
        argv = [*self.flags(stage), *more, *resume, "--out", str(out)]
        process = FORK.Process(target=child, args=(stage, argv, hook))
        process.start()
        return process

    def run(self, stage, out, *more, hook=None):
        """The exit status of a whole run."""
        process = self.start(stage, out, *more, hook=hook)
        process.join()
        return process.exitcode

    def said(self, stage):
        """What the script's last process wrote to stderr."""
        return said_file(stage).read_text()

    def same(self, stage, out):
        """Does `out` hold the weights of the uninterrupted run, bit for bit?"""
        ours, theirs = weights(self.folder / stage), weights(out)
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def said_file(stage):
    return Path(tempfile.gettempdir()) / f"torture-{os.getuid()}-{stage}.txt"


def child(stage, argv, hook):
    """What a forked process does: the script's `if __name__ == "__main__"`."""
    sys.argv = [SCRIPTS[stage][0]]
    with open(said_file(stage), "w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if hook:
        hook()
    with training.one_line_errors(stoppable=True):
        MODULES[stage].main(argv)


# ---------------------------------------------------------------- the experiments: each yields (case, did it hold)


def kill(bench):
    """kill -9 at 20 moments of each script's run, five of them while a checkpoint is being written."""
    for stage in SCRIPTS:
        rng, out = random.Random(stage), bench.folder / f"kill-{stage}"
        kills = writing = 0
        while kills < 20:
            (out / "checkpoint.tmp").unlink(missing_ok=True)
            process = bench.start(stage, out)
            if kills % 4 == 3:  # as soon as a half-written file is seen
                while not (out / "checkpoint.tmp").exists() and process.is_alive():
                    pass
                writing += process.is_alive()
            else:
                time.sleep(rng.uniform(0, 0.5))
            finished = not process.is_alive()
            process.kill()
            process.join()
            if finished:  # too late: the rest of the kills need a run that goes on, so begin it anew
                if not bench.same(stage, out):
                    break
                for path in out.iterdir():
                    path.unlink()
            else:
                kills += 1
        status = bench.run(stage, out)
        yield f"{stage}: {kills} kills, {writing} during a write", status == 0 and bench.same(stage, out)


def workers(bench):
    """0, 1 and 4 loader processes."""
    for stage in SCRIPTS:
        for count in (1, 4):
            out = bench.folder / f"workers-{stage}-{count}"
            status = bench.run(stage, out, "--workers", str(count))
            yield f"{stage}: {count} workers", status == 0 and bench.same(stage, out)


def processes(bench):
    """1, 2 and 4 processes over the same global batch, and 2 that resume the half of one: weights within 1e-6 after
    20 steps."""
    for stage in SCRIPTS:
        more = ["--steps", "20"] if "--steps" in LENGTH[stage] else ["--epochs", "5"]
        more += ["--lr", "1e-4", "--save-every", "100"]
        if stage == "tokenizer":  # else it has biases without an effect, which AdamW moves by their rounding errors
            more.append("--no-normalise-logits")
        flags, found = [*bench.flags(stage), *more], {}
        for count in (1, 2, 4):
            out = bench.folder / f"processes-{stage}-{count}"
            passes = ["--accumulate", "2"] if count == 2 else []
            done = test_beit.torchrun(SCRIPTS[stage][0], *flags, *passes, "--out", str(out), processes=count)
            assert done.returncode == 0, done.stderr
            found[f"{count} processes"] = weights(out)
        out = bench.folder / f"processes-{stage}-resumed"
        assert bench.run(stage, out, *more, hook=at_call(training, "stop_asked", 10, terminate)) == training.STOPPED
        done = test_beit.torchrun(SCRIPTS[stage][0], *flags, "--resume", "--out", str(out))
        assert done.returncode == 0, done.stderr
        found["1 process, then 2"] = weights(out)
        one = found.pop("1 processes")
        for name, theirs in found.items():
            gap = max((theirs[key] - one[key]).abs().max().item() for key in one)
            yield f"{stage}: {name}, largest difference {gap:.1e}", gap <= 1e-6


def at_call(module, name, number, act):
    """A hook: the `number`-th call of module.name first does `act`."""

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
    os.kill(os.getpid(), signal.SIGTERM)


def stop(bench):
    """SIGTERM during a step, during evaluation and during data loading: status 75, a checkpoint, the same end."""
    for stage in SCRIPTS:
        late = ["--save-every", "1000"]  # the signal makes the checkpoint, nothing else
        places = {
            "a step": at_call(training, "all_sum", 7, terminate),
            "the last evaluation": at_call(MODULES[stage], "evaluate", 1, terminate),
            "data loading": at_call(data, "sample_rng", 100, terminate),
        }
        for place, hook in places.items():
            out = bench.folder / f"stop-{stage}-{place}"
            status = bench.run(stage, out, *late, hook=hook)
            saved = training.load_checkpoint(out / "checkpoint.pt", MODULES[stage].KIND)["step"]
            held = status == training.STOPPED and saved > 0 and bench.said(stage).count("\n") == 1
            yield f"{stage}: during {place}", held and bench.run(stage, out, *late) == 0 and bench.same(stage, out)


def interrupted_job(bench, stage, out, act):
    """Exit status of `torchrun --nproc_per_node=2 --max-restarts=2` in which, after ten steps, `act` is done to it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    flags = [*bench.flags(stage), "--save-every", "10", "--out", str(out)]
    flags += ["--resume"] if out.exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(said_file(stage), "w") as file:
        command = [*launcher, SCRIPTS[stage][0], *flags]
        job = subprocess.Popen(command, cwd=HERE, env=environment, stdout=file, stderr=file)
    while act and not (out / "previous.pt").exists() and job.poll() is None:
        time.sleep(0.01)
    if act:
        act(job)
    return job.wait(timeout=300)


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def restart(bench):
    """A process killed under torchrun --nproc_per_node=2 --max-restarts=2: the job ends by itself, the same bits.
    SIGTERM to torchrun: every process stops with a checkpoint, and the job started again ends with the same bits."""

    def kill_child(job):
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[0 if stage in ("beit", "seg") else -1]), signal.SIGKILL)  # the first one has the lock

    for stage in SCRIPTS:
        calm, killed, stopped = (bench.folder / f"restart-{stage}-{name}" for name in ("calm", "killed", "stopped"))
        assert interrupted_job(bench, stage, calm, None) == 0, bench.said(stage)
        status = interrupted_job(bench, stage, killed, kill_child)
        yield f"{stage}: a process killed, status {status}", status == 0 and same_weights(calm, killed)
        interrupted_job(bench, stage, stopped, lambda job: job.terminate())
        orderly = bench.said(stage).count("stopped by a signal") == 2
        again = interrupted_job(bench, stage, stopped, None)
        yield f"{stage}: SIGTERM", orderly and again == 0 and same_weights(calm, stopped)


def full_disk(bench):
    """A disk that fills while a checkpoint is written: one line, the last one stays, and it goes on from there."""
    for stage in SCRIPTS:
        out, size = bench.folder / f"full-{stage}", (bench.folder / stage / "checkpoint.pt").stat().st_size
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead of killing
        status = bench.run(stage, out, hook=at_call(training, "save_checkpoint", 9, limit))
        said = bench.said(stage).strip()
        held = status == 2 and said.count("\n") == 0 and "cannot write" in said
        held = held and training.load_checkpoint(out / "checkpoint.pt", MODULES[stage].KIND)["step"] == 7
        yield f"{stage}: {said.split(': ', 2)[-1][:60]}", held and bench.run(stage, out) == 0 and bench.same(stage, out)


def damage(bench):
    """50 damaged checkpoints: an older whole one or a refusal in one line, never a wrong end, never a traceback."""
    stage, rng = "cls", random.Random(0)
    half = bench.folder / "damage"
    bench.run(stage, half, hook=at_call(training, "stop_asked", STEPS // 2, terminate))
    whole = {name: (half / name).read_bytes() for name in training.CHECKPOINTS}
    ends = {"newest": 0, "older": 0, "refused": 0}
    held = True
    for case in range(50):
        for name in training.CHECKPOINTS if case % 5 == 4 else training.CHECKPOINTS[:1]:  # both, or the newest
            content = bytearray(whole[name])
            if case % 2:
                content = content[: rng.randrange(len(content))]
            else:
                for _ in range(rng.choice((1, 1, 8))):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (half / name).write_bytes(content)
        status, said = bench.run(stage, half), bench.said(stage).strip()
        if status == 2:
            held, end = held and said.count("\n") == 0 and case % 5 == 4, "refused"
        else:
            held = held and status == 0 and bench.same(stage, half) and "Traceback" not in said
            end = "older" if "going on from previous.pt" in said else "newest"
        ends[end] += 1
        for name in training.CHECKPOINTS:
            (half / name).write_bytes(whole[name])
    yield f"{stage}: " + ", ".join(f"{end} {count}" for end, count in ends.items()), held


def locked(bench):
    """A second start in an --out that is in use is refused and names the process."""
    out = bench.folder / "locked"
    first = bench.start("cls", out, hook=at_call(training, "stop_asked", 5, lambda: time.sleep(8)))
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.005)
    status, said = bench.run("cls", out), bench.said("cls")
    named = f"in use by process {first.pid} on" in said
    first.join()
    yield f"cls: {said.strip()[-60:]}", status == 2 and named and bench.same("cls", out)


EXPERIMENTS = {f.__name__: f for f in (kill, workers, processes, stop, restart, full_disk, damage, locked)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(EXPERIMENTS)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {', '.join(unknown)}")
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in args.names or EXPERIMENTS:
            print(f"{name}: {EXPERIMENTS[name].__doc__}", flush=True)
            start = time.time()
            for case, held in EXPERIMENTS[name](bench):
                failed += not held
                print(f"    {'held' if held else 'FAILED'}  {case}  ({time.time() - start:.0f} s)", flush=True)
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

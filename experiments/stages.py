"""Runs the stages of an experiment as processes and shows their progress.

A stage is one of the four scripts with its flags. Its name ends in a digest of its settings and of
those of the stages that it starts from, so with --resume a stage runs again only if one of these
has changed.
"""

import collections
import hashlib
import heapq
import importlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import HERE, tables
from experiments.machine import machine
from images import masked, sets, sources
from plumbing import checkpoints, command_line, log, outputs, signals

# script: the summary's stage whose record stands for stages without one, and the seconds on two CPU
# cores if that has none either
LIKE = {
    "train_tokenizer.py": ("tokenizer", 60.0),
    "pretrain.py": ("beit-0", 200.0),
    "finetune_cls.py": ("cls100-beit-0-0", 25.0),
    "finetune_seg.py": ("seg-beit-0-0", 15.0),
}
DRAWN = "shapes"  # the data set that no file holds
TRUSTED = 0.1  # share of a running stage's steps from which its speed counts in the estimate


def base_name(name):
    """A stage's name without the digest of its settings."""
    return re.sub(r"-[0-9a-f]{8}$", "", name)


def task(name):
    """The task in a fine-tuning stage's name, such as cls100 of x2-cls100-beit-0-1, or None."""
    found = re.search(r"(?:^|-)(cls\w+?|seg)-", name)
    return found and found[1]


def without_seed(name):
    """A stage's name without its last number, which for most is a seed."""
    return re.sub(r"-\d+$", "", base_name(name))


def recorded_seconds(recipe):
    """{stage's name without digest: seconds} from docs/results/RECIPE.json; empty without it.

    Only of stages that ran in one go on the machine of the last tables, not on a faster one.
    """
    path = HERE / "docs" / "results" / f"{recipe}.json"
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    usual = {
        name: stage
        for name, stage in saved["stages"].items()
        if not stage["resumed"] and stage.get("machine", saved["machine"]) == saved["machine"]
    }
    return {base_name(name): stage["seconds"] for name, stage in usual.items()}


def last_step(path, start=0):
    """(step, steps) from the last line of a script's log that has them, None without one.

    Only what was written after the first `start` bytes is read, and of that the end.
    """
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - 4096))
        found = re.findall(rb"step (\d+)/(\d+)", file.read())
    return tuple(map(int, found[-1])) if found else None


def makespan(seconds, workers):
    """Seconds until tasks of these lengths have ended; each starts when a worker is free."""
    free = [0.0] * workers
    for task in seconds:
        heapq.heapreplace(free, free[0] + task)
    return max(free)


@dataclass
class Stage:
    """A stage of the plan: how far it is and how long it takes."""

    name: str
    script: str
    log: Path
    alone: bool  # no other stage runs beside it
    length: float = 1.0  # its epochs, as a share of the recipe's
    recorded: float | None = None  # seconds in docs/results
    started: float | None = None
    seconds: float | None = None  # once it has ended
    log_start: int = 0  # size of its log when it started
    resumed_at: float = 0.0  # share of the steps that an earlier process had done

    def begin(self, resumed):
        """Note that its process starts now, and how much is left of it if it is resumed."""
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        step, steps = last_step(self.log) or (0, 1)
        self.resumed_at = min(step / steps, 0.99) if resumed else 0.0
        self.started = time.monotonic()

    @property
    def running(self):
        """Has it started but not ended?"""
        return self.started is not None and self.seconds is None

    def share(self):
        """Share of its steps (of those left when it was resumed) that are done, from its log."""
        if self.seconds is not None:
            return 1.0
        step, steps = self.running and last_step(self.log, self.log_start) or (0, 1)
        return min(max(step / steps - self.resumed_at, 0.0) / (1 - self.resumed_at), 1.0)

    def elapsed(self, now):
        """Seconds it has run."""
        return self.seconds if self.seconds is not None else now - self.started

    def left(self, expected, now):
        """Seconds left: first what is `expected`, then more and more by its own speed."""
        if self.seconds is not None:
            return 0.0
        if self.started is None:
            return expected
        share, elapsed = self.share(), now - self.started
        if not share:
            return max(expected - elapsed, expected / 20)
        return (1 - share) * (elapsed + (1 - share) * expected)


class Progress:
    """The stages of a plan, an estimate of the time left, and the line that shows both.

    On a terminal one line is updated while stages run, below a line for each stage that has
    ended. Elsewhere each stage has a line when it starts and one when it ends.
    """

    def __init__(self, recorded, jobs):
        """recorded: {stage's name without digest: seconds}. jobs: stages side by side."""
        self.recorded, self.jobs = recorded, jobs
        self.groups = []  # one after another; the stages of a group run side by side
        self.rates = collections.defaultdict(list)  # {(script, task): seconds / length}, finished
        self.start, self.lock = time.monotonic(), threading.RLock()
        self.terminal, self.ended = sys.stdout.isatty(), threading.Event()

    @property
    def stages(self):
        """All stages of the plan in order."""
        return [stage for group in self.groups for stage in group]

    def find(self, name):
        """The stage, or one that differs only in its digest and has not started; None without.

        The plan cannot know a learning rate that is still to be chosen: the digest then changes.
        """
        waiting = (stage for stage in self.stages if stage.started is None)
        like = (stage for stage in waiting if base_name(stage.name) == base_name(name))
        return next((s for s in self.stages if s.name == name), next(like, None))

    def add(self, name, script, log_path, alone, length=1.0):
        """Add a stage to the plan, alone in a group of its own; others join the last group."""
        if alone or not self.groups:
            self.groups.append([])
        recorded = self.recorded.get(base_name(name))
        stage = Stage(name, script, log_path, alone, length, recorded)
        self.groups[-1].append(stage)
        return stage

    def begin(self, name, script, log_path, alone, resumed):
        """A stage starts. Returns it."""
        with self.lock:
            stage = self.find(name) or self.add(name, script, log_path, alone)
            stage.name, stage.log = name, log_path
            stage.begin(resumed)
            if not self.terminal:
                print(f"{self.head()}  {name} starts", flush=True)
        return stage

    def report(self, stage, record):
        """Print the line of a stage that has ended with these numbers."""
        with self.lock:
            seconds, numbers = f"{stage.seconds:.0f} s", log.numbers(record, 4)
            log.note(f"{self.head()}  {stage.name}  {seconds}  {numbers}")

    def drop(self, name):
        """A stage of the plan turns out to be finished already, from an earlier run."""
        with self.lock:
            stage = self.find(name)
            if stage and stage.started is None:
                self.groups = [[s for s in group if s is not stage] for group in self.groups]

    def counts(self):
        """(stages that have ended, all stages)."""
        return sum(stage.seconds is not None for stage in self.stages), len(self.stages)

    def known(self, stage):
        """Seconds recorded of it or its other seeds; else by its length and others of its task."""
        if stage.recorded is not None:
            return stage.recorded
        name, kind = without_seed(stage.name), (stage.script, task(stage.name))
        if seeds := [s for other, s in self.recorded.items() if without_seed(other) == name]:
            return statistics.mean(seeds)
        same = [s for s in self.stages if s.recorded and (s.script, task(s.name)) == kind]
        rates = self.rates[kind] + [s.recorded / s.length for s in same]
        like, seconds = LIKE[stage.script]
        rate = statistics.mean(rates) if rates else self.recorded.get(like, seconds)
        return stage.length * rate

    def expected(self, name):
        """Seconds that the stage of this name is expected to take; 0 if it is not in the plan."""
        stage = self.find(name)
        return self.known(stage) if stage else 0.0

    def ratio(self, alone, now):
        """Measured over recorded seconds, of stages that run alone or of those side by side.

        Stages of the other kind count if none of this kind has run; 1 if none has run at all.
        Resumed stages do not count: much of their time is spent on starting.
        """
        started = [s for s in self.stages if s.started is not None and not s.resumed_at]
        tried = [s for s in started if s.share() >= TRUSTED]
        tried = [s for s in tried if s.alone == alone] or tried
        recorded = sum(self.known(s) * s.share() for s in tried)
        return sum(s.elapsed(now) for s in tried) / recorded if recorded else 1.0

    def seconds_left(self):
        """Estimate of the seconds until every stage of the plan has ended."""
        now = time.monotonic()
        ratios = {alone: self.ratio(alone, now) for alone in (True, False)}
        total = 0.0
        for group in self.groups:
            order = sorted(group, key=lambda s: (s.started is None, -self.known(s)))
            expected = [(s, self.known(s) * ratios[s.alone] * (1 - s.resumed_at)) for s in order]
            total += makespan([stage.left(seconds, now) for stage, seconds in expected], self.jobs)
        return total

    def head(self):
        """'4m11s  [3/16]  about 2 min left': elapsed time, stages that have ended, estimate."""
        elapsed, (ended, total) = int(time.monotonic() - self.start), self.counts()
        left = f"about {log.duration(self.seconds_left())} left" if ended < total else "stages done"
        return f"{elapsed // 60:3d}m{elapsed % 60:02d}s  [{ended}/{total}]  {left}"

    def line(self, width):
        """The updating line, up to `width` characters: the head, then running stages' steps."""
        head, running = self.head(), [stage for stage in self.stages if stage.running]
        if not running:
            return f"{head}  between stages"[:width]
        shown = running[: max(1, (width - len(head)) // 24)]
        room = (width - len(head)) // len(shown) - 2
        parts = [head]
        for stage in shown:
            step = last_step(stage.log, stage.log_start)
            step = f"step {step[0]}/{step[1]}" if step else "starting"
            name, most = base_name(stage.name), max(room - len(step) - 1, 1)
            parts.append(f"{name if len(name) <= most else name[: most - 1] + '…'} {step}")
        parts += [f"+{len(running) - len(shown)}"] if len(running) > len(shown) else []
        return "  ".join(parts)[:width]

    def show(self):
        """Update the line twice a second until `close`."""
        while not self.ended.wait(0.5):
            with self.lock:
                if self.ended.is_set():  # while it waited for the lock
                    return
                log.update(self.line(shutil.get_terminal_size().columns - 1))

    def open(self):
        """Say how much there is to do, and start to update the line if there is a terminal."""
        total, self.start = len(self.stages), time.monotonic()
        if total:
            print(f"{total} stages to run, about {log.duration(self.seconds_left())}", flush=True)
        if self.terminal:
            threading.Thread(target=self.show, daemon=True).start()

    def close(self):
        """Stop updating the line and clear it."""
        with self.lock:
            if self.terminal and not self.ended.is_set():
                log.update("")
            self.ended.set()


class Result(dict):
    """What a stage reported, {name: number}, and its checkpoint."""

    def __missing__(self, name):
        stage = Path(self["checkpoint"]).parent
        raise ValueError(f"{stage}.json has no {name}: remove it to run the stage")


class Runner:
    """Runs stages as processes, up to `jobs` side by side, and returns what they reported.

    Use it as a context manager: at the end, running stages are asked to save and stop. While
    `planning`, nothing runs: an unfinished stage is added to `progress` and reports zeros.
    """

    def __init__(self, out, recipe, settings, data_dir=None, jobs=1):
        """settings: of the experiments, see paper.settings. data_dir: the scripts' --data-dir."""
        self.out = Path(out) if Path(out).name else Path.cwd()  # of "."
        self.recipe, self.settings = recipe, settings
        self.data_dir, self.jobs, self.planning = data_dir, jobs, False
        self.progress = Progress(recorded_seconds(recipe), jobs)
        self.processes, self.stopped, self.lock = [], False, threading.Lock()

    def __enter__(self):
        self.check_started()
        self.progress.open()
        return self

    def __exit__(self, *_):
        self.stop()
        self.progress.close()

    def check_started(self):
        """Check that OUT was started with this recipe and this data; note both in results.json.

        Raises ValueError naming what differs. A stage with other settings is another stage.
        """
        saved = tables.read_results(self.out)
        now = {"recipe": self.recipe, **json.loads(json.dumps(self.fingerprints()))}
        then = {"recipe": saved.get("recipe", self.recipe), **saved.get("data", {})}
        for name, value in now.items():
            if then.get(name, value) != value:
                raise ValueError(
                    f"--resume: {name} changed since {self.out} was started: "
                    f"{str(then[name])[:80]} then, {str(value)[:80]} now: choose another --out"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = now.pop("recipe")
        data = {name: value for name, value in (then | now).items() if name != "recipe"}
        tables.write_results(self.out, saved | {"recipe": recipe, "data": data})

    def fingerprints(self):
        """{"WHAT of SET SPLIT": value} of the data sets that are read from files."""
        found = {}
        scenes = self.settings["scenes"]
        outputs.check_outside(self.out, scenes)
        # Scenes first: decoding the photographs may take a while.
        for name in dict.fromkeys([scenes, self.settings["data"]]):
            if name in (DRAWN, None):
                continue
            for split in ("train", "test"):
                source = sets.open_source(name, split, self.data_dir)
                source.read([0])  # image files need Pillow: fail now, not in hours
                if name == scenes:
                    masked.checked(source)  # raises ValueError if masks are missing or unusable
                for what, value in sources.fingerprint(source).items():
                    found[f"{what} of {name} {split}"] = value
        return found

    def plan(self, experiments):
        """Call the experiments without running anything, to know which stages there are."""
        self.planning = True
        for experiment in experiments:
            experiment(self)
        self.planning = False

    def stage(self, name, script, *flags, threads=0):
        """Run `script` into OUT/name-digest unless that is finished.

        threads: for the CPU; 0: the default, for a stage that runs alone. Returns the script's
        final record and "checkpoint", its path. Raises ValueError if the script fails.
        """
        flags = ["--recipe", self.recipe, *map(str, flags)]
        digest = self.digest(script, flags)
        known = [path.stem for path in self.out.glob(f"*-{digest}.json")]
        known += (s.name for s in self.progress.stages if s.name.endswith(f"-{digest}"))
        name = known[0] if known else f"{name}-{digest}"  # two experiments may share a stage
        done, checkpoint = self.out / f"{name}.json", str(self.out / name / "checkpoint.pt")
        length = self.length(script, flags)
        if done.exists():
            self.progress.drop(name)
        elif self.planning:
            if all(stage.name != name for stage in self.progress.stages):
                log_path = self.out / f"{name}.log"
                self.progress.add(name, script, log_path, not threads, length)
            return collections.defaultdict(float, checkpoint=checkpoint)
        else:
            self.run(name, script, flags, threads)
        finished = tables.read_stage(done)
        if not finished["resumed"]:
            self.progress.rates[script, task(name)].append(finished["seconds"] / length)
        return Result(finished["result"], checkpoint=checkpoint)

    def column(self, script):
        """A script's settings in the recipe: {name: value}."""
        recipes = importlib.import_module(script.removesuffix(".py")).RECIPES
        return command_line.column(recipes, self.recipe)

    def length(self, script, flags):
        """A stage's epochs as a share of the recipe's; of several --epochs the last counts."""
        given = [value for flag, value in zip(flags, flags[1:]) if flag == "--epochs"]
        return float(given[-1]) / self.column(script)["epochs"] if given else 1.0

    def digest(self, script, flags):
        """Eight letters for all settings: the recipe, and flags with the stages they name."""
        names = [
            flag.removeprefix(str(self.out)) if flag.startswith(f"{self.out}{os.sep}") else flag
            for flag in flags
        ]
        text = json.dumps([script, names, self.column(script)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run(self, name, script, flags, threads):
        """Run a stage and, once it has ended well, write OUT/name.json."""
        folder = self.out / name
        resumed = any((folder / file).exists() for file in checkpoints.CHECKPOINTS)
        log_path = self.out / f"{name}.log"
        stage = self.progress.begin(name, script, log_path, not threads, resumed)
        record = self.execute(name, script, flags, threads, resumed)
        stage.seconds = round(time.monotonic() - stage.started, 1)
        done = {"command": shlex.join([script, *flags]), "seconds": stage.seconds}
        done |= {"resumed": resumed, "threads": threads, "result": record}
        done |= {"machine": machine(), "torch": str(torch.__version__)}
        with outputs.again(self.out / f"{name}.json") as new:
            new.write_text(json.dumps(done) + "\n")
        self.progress.report(stage, record)

    def execute(self, name, script, flags, threads, resumed):
        """Run a stage's process and return the script's final record."""
        folder, output = self.out / name, self.out / f"{name}.log"
        command = [sys.executable, str(HERE / script), *flags, "--out", str(folder)]
        command += ["--data-dir", self.data_dir] if self.data_dir else []
        command += ["--resume"] if resumed else []
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with ThreadPoolExecutor(1) as starter:  # a thread, because Ctrl-C interrupts this one
            process = starter.submit(self.start, command, output, environment).result()
        if status := process.wait():
            tail = "".join(output.read_text(errors="replace").strip().splitlines()[-1:])
            if status == signals.STOPPED:
                raise signals.Stopped(f"{name}: {tail.partition(': ')[2]}")
            raise ValueError(f"stage {name} ended with status {status}: {tail} ({output})")
        final = log.read_metrics(folder)[-1]
        return {key: value for key, value in final.items() if key != "final"}

    def start(self, command, output, environment):
        """Start a stage's process, unless `stop` was called; output: its log. Returns it."""
        with self.lock:
            if self.stopped:
                raise ValueError(f"{output.stem} was not started: another stage failed")
            for path in (self.out / "commands.txt", output):
                log.check_regular(path)
            with open(self.out / "commands.txt", "a") as file:
                file.write(shlex.join(command[1:]) + "\n")
            with open(output, "a") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment
                )
            self.processes.append(process)
        return process

    def stages(self, calls):
        """Run independent stages side by side: {key: (name, script, *flags)} -> {key: record}.

        The longest start first, so that none runs alone at the end. Each has one thread if there
        are several jobs. Raises what the first failing stage raises.
        """
        threads = 1 if self.jobs > 1 else 0
        if self.planning:
            self.progress.groups.append([])
            return {key: self.stage(*call, threads=threads) for key, call in calls.items()}
        pool = ThreadPoolExecutor(self.jobs)
        longest_first = sorted(calls, key=lambda key: -self.progress.expected(calls[key][0]))
        try:
            futures = {
                key: pool.submit(self.stage, *calls[key], threads=threads) for key in longest_first
            }
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what the stage raised
            return {key: futures[key].result() for key in calls}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def stop(self):
        """Start no more stages; ask the running ones to save and stop, and wait until they have.

        Ctrl-C while it waits kills them.
        """
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()
        try:
            for process in self.processes:
                process.wait()
        except KeyboardInterrupt:
            for process in self.processes:
                process.kill()
            raise

"""The log of a run: OUT/metrics.jsonl, one JSON record per line, and progress on stdout."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from plumbing import outputs


def is_first():
    """Is this the first of torchrun's processes, or the only one?"""
    return os.environ.get("RANK", "0") == "0"


def note(text):
    """Print a line that stays, in the first process only; a terminal's updating line makes room."""
    if is_first():
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)


def first_of(values, most):
    """'ant, bee, ...' of a list, for a message."""
    return ", ".join(map(str, values[:most])) + ", ..." * (len(values) > most)


def update(line):
    """Replace a terminal's updating line, cut to its width: one that wraps could not be cleared."""
    width = shutil.get_terminal_size().columns - 1
    print(f"\r\033[K{line[:width]}", end="", flush=True)


class Log:
    """Writes records to OUT/metrics.jsonl and progress to stdout, in the first process only.

    On a terminal, progress is one line that updates in place; elsewhere each report is a new line.
    out: the folder, or None to write no records. steps: the run's last step. first_step: the step
    that the run resumed from; records of later steps are dropped, because they will be made again.
    """

    def __init__(self, out, steps, first_step=0):
        self.steps = steps
        self.path = out / "metrics.jsonl" if out and is_first() else None
        self.start, self.first_step = time.monotonic(), first_step
        if self.path and self.path.exists():
            kept = [m for m in read_metrics(out) if m.get("step", math.inf) <= first_step]
            with outputs.again(self.path) as new:
                new.write_text("".join(to_json(record) + "\n" for record in kept))
        self.terminal = sys.stdout.isatty()

    def write(self, **record):
        """Append one record to metrics.jsonl."""
        if self.path:
            with open(self.path, "a") as file:
                file.write(to_json(record) + "\n")

    def step(self, step, images, **values):
        """Record and show `values` after `step` steps of `images` images each.

        Adds images per second and seconds since the start to the record, and the time left to the
        line on stdout.
        """
        if not self.path:
            return
        elapsed = max(time.monotonic() - self.start, 1e-9)
        done = step - self.first_step
        rate, left = images * done / elapsed, elapsed / done * (self.steps - step)
        speed = {"images_per_second": round(rate, 1), "seconds": round(elapsed, 1)}
        self.write(step=step, **values, **speed)
        minutes, seconds = divmod(round(left), 60)
        time_left = f"{minutes}m{seconds:02}s left"
        line = f"step {step}/{self.steps}  {time_left}  {rate:.0f} images/s  {numbers(values, 4)}"
        if self.terminal:
            update(line)
        else:
            print(line, flush=True)

    def evaluation(self, step, **values):
        """Record and print an evaluation within the run, after `step` steps."""
        self.write(step=step, **values)
        note(f"step {step:,}  held out: {numbers(values, 4)}")

    def final(self, **values):
        """Record and print the script's result; its record, the file's last, has final=True.

        Raises ValueError naming a value that is not finite: that is not a result.
        """
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"the result is not finite, {name} is {value}: look for wrong images, labels "
                    "or masks in the data, or evaluate with --amp off"
                )
        self.write(final=True, **values)
        note(numbers(values, 5))


class Estimate:
    """How long a run of `steps` steps takes: prints one line with the estimate once it is known.

    `begin` and `end` enclose each step with its data; evaluations and checkpoints lie outside. The
    first steps, which compile and fill the loader's queue, do not count.
    """

    WARM_UP, STEPS, SECONDS = 5, 10, 10  # steps that do not count; the least that must

    def __init__(self, steps):
        self.steps, self.done, self.seconds, self.since, self.said = steps, 0, 0.0, 0.0, False

    def begin(self):
        """A step begins, with its data."""
        self.since = time.perf_counter()

    def end(self):
        """A step is over: print the estimate if there is one and steps are left."""
        self.done += 1
        counted = self.done - self.WARM_UP
        if self.said or counted <= 0:
            return
        self.seconds += time.perf_counter() - self.since
        if counted >= self.STEPS and self.seconds >= self.SECONDS and self.done < self.steps:
            rate, self.said = counted / self.seconds, True
            time_needed = duration(self.steps / rate)
            note(f"{rate:.3g} steps/s: about {time_needed} for {self.steps:,} steps, "
                 "evaluations not counted")  # fmt: skip


def numbers(values, digits):
    """'loss 1.234  lr 0.001': {name: value} as text. Lists and dicts are left to the records."""
    shown = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return "  ".join(f"{name} {value:.{digits}g}" for name, value in shown.items())


def duration(seconds):
    """Seconds as text for an estimate, rounded up: '40 s', '3 min', '2 h 10 min', '4 d 7 h'."""
    if seconds < 55:
        return f"{max(5, 5 * math.ceil(seconds / 5))} s"
    minutes, hours = math.ceil(seconds / 60), math.ceil(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if hours <= 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def means(records):
    """{name: mean} of records with the same names, such as those of accumulation passes."""
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def to_json(record):
    """A record as JSON, which has no NaN and no infinity: null in their place."""
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None
              for k, v in record.items()}  # fmt: skip
    return json.dumps(finite, allow_nan=False)


def from_json(text, name, constant=None):
    """What a text in JSON, or its bytes, holds. NaN, infinity and 1e999 are not JSON.

    constant: what to make of the words NaN, Infinity and -Infinity: a function. Raises ValueError
    naming `name` if it is anything else.
    """

    def number(digits):
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return value if set(digits) & set(".eE") else int(digits)

    try:
        return json.loads(text, parse_int=number, parse_float=number,
                          parse_constant=constant or number)  # fmt: skip
    except RecursionError as error:
        raise ValueError(f"{name}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name}: it is not JSON as these scripts write it: {error}") from error


def check_regular(path):
    """Raise ValueError if there is something at `path` that is not a regular file.

    Opening a pipe would wait for ever.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a regular file: remove it")


def content(path):
    """The bytes of a file. Raises ValueError unless it is a regular one."""
    check_regular(path)
    return Path(path).read_bytes()


def read_json(path, wanted):
    """The dict in a JSON file. wanted: {name: type or types} that it must have.

    Raises ValueError naming the file if it is damaged or holds anything else.
    """
    found = from_json(content(path), path)
    for name, kind in wanted.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise ValueError(f"{path}: {name} is missing or not what these scripts write")
    return found


def read_metrics(out):
    """All records of OUT/metrics.jsonl, except an unfinished last line of a killed process.

    A record is a dict with a number of steps, or with `final`; a value that was not finite is None,
    also where an earlier version wrote NaN. Raises ValueError naming the first line that is
    anything else.
    """
    path, records = Path(out) / "metrics.jsonl", []
    lines = content(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        name = f"{path}, line {number}"
        record = from_json(line, name, constant=lambda word: None)
        if not is_record(record):
            raise ValueError(f"{name}: not a record written by these scripts: remove that line")
        records.append(record)
    return records


def is_record(record):
    """Is it a dict of numbers, with a step of at least 0 or final=True? Only `iou` is a dict."""
    if not isinstance(record, dict):
        return False
    step, final = record.get("step"), record.get("final") is True
    right = type(step) is int and step >= 0 if "step" in record else final
    values = (value for name, value in record.items() if name not in ("final", "iou"))
    return right and all(value is None or type(value) in (int, float) for value in values)

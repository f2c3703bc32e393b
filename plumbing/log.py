"""The log of a run: OUT/metrics.jsonl, one JSON record per line, and progress on stdout."""

import json
import math
import os
import sys
import time
from pathlib import Path


class Log:
    """Writes records to OUT/metrics.jsonl and progress to stdout, in the first process only.

    On a terminal, progress is one line that updates in place; elsewhere each report is a new line.
    out: the folder, or None to write no records. steps: the run's last step. first_step: the step
    that the run resumed from; records of later steps are dropped, because they will be made again.
    """

    def __init__(self, out, rank, steps, first_step=0):
        self.steps, self.rank = steps, rank
        self.path = out / "metrics.jsonl" if out else None
        self.start, self.first_step = time.time(), first_step
        if rank == 0 and self.path and self.path.exists():
            kept = [m for m in read_metrics(out) if m.get("step", math.inf) <= first_step]
            temporary = out / "metrics.tmp"
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(temporary, self.path)
        self.terminal = sys.stdout.isatty()

    def write(self, **record):
        """Append one record to metrics.jsonl."""
        if self.rank == 0 and self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def step(self, step, images, **values):
        """Record and show `values` after `step` steps of `images` images each.

        Adds images per second and seconds since the start to the record, and the time left to the
        line on stdout.
        """
        if self.rank or not self.path:
            return
        elapsed = time.time() - self.start
        done = step - self.first_step
        rate, left = images * done / elapsed, elapsed / done * (self.steps - step)
        speed = {"images_per_second": round(rate, 1), "seconds": round(elapsed, 1)}
        self.write(step=step, **values, **speed)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        time_left = f"{left // 60:.0f}m{left % 60:02.0f}s left"
        line = f"step {step}/{self.steps}  {text}  {rate:.0f} images/s  {time_left}"
        if self.terminal:
            print(f"\r\033[K{line}", end="", flush=True)
        else:
            print(line, flush=True)

    def say(self, text):
        """Print a line that stays on the terminal."""
        if self.rank == 0:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def final(self, **values):
        """Record and print the script's result; its record, the file's last, has final=True."""
        self.write(final=True, **values)
        self.say("  ".join(f"{name} {value:.5g}" for name, value in values.items()))


def read_metrics(out):
    """All records of OUT/metrics.jsonl, except an unfinished last line of a killed process."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]

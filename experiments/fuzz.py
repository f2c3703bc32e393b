"""Damage everything that comes from outside, run the programs on it, and look for findings.

    python -m experiments.fuzz --minutes 20 --seed 1       # for 20 minutes
    python -m experiments.fuzz --seed 1 --case 17          # one case again; its files are kept

A case is a command with something wrong in its flags, arrays, images, checkpoints, weights or logs,
made from a seed and a number. Each knows whether it is certainly nonsense (must end with status 2),
certainly harmless (0), or could be either. A finding is a traceback, a hang, another exit status,
nonsense that is accepted, more than one line of error, a lost, changed or left file, a program that
was started, code that ran, or NaN in a log. Exit status 1 if there is one. tests/test_fuzz.py runs
hundreds of these cases in process.
"""

import collections
import json
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from experiments import HERE
from experiments.fuzz_bench import (
    ACCEPT, FRESH, MEMORY, PROGRAMS, REFUSE, SECONDS, Bench, Result,
)  # fmt: skip
from experiments.mutations import KINDS
from plumbing import command_line
from plumbing.signals import STOPPED

# -------------------------------------------------------- one case, and what is wrong with it


def snapshot(root):
    """{path: what would change if the file did} of everything below a folder."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            what = state.st_mtime_ns, state.st_ino
            if stat.S_ISREG(state.st_mode) and "case-" in path:  # may be written again, the same
                what = zlib.crc32(Path(path).read_bytes())
            found[os.path.relpath(path, root)] = state.st_mode, state.st_size, what
    return found


NOTICE = re.compile(r"\s*$|skipped: |.*: continuing from ")  # said on stderr, and no errors


def judge(bench, case, result, before):
    """[(kind of finding, details)] of a case that has run; before: a snapshot."""
    found, after = [], snapshot(bench.folder)
    lines = [line for line in result.stderr.splitlines() if not NOTICE.match(line)]
    status = result.status
    if status is None:
        found.append(("hang", "it did not end in time"))
    elif "Traceback (most recent call last)" in result.stderr:
        found.append(("traceback", lines[-1]))
    elif status not in (0, 2, STOPPED):
        found.append(("exit status", f"status {status}"))
    elif status == 0 and case.expect == REFUSE:
        found.append(("nonsense accepted", "status 0"))
    elif status == 2 and case.expect == ACCEPT:
        found.append(("good input refused", lines[-1] if lines else ""))
    elif status == 2 and len(lines) != 1:
        found.append(("not one line", f"{len(lines)} lines of error"))
    if (bench.folder / "ran").exists():
        found.append(("code ran", "a pickle was executed"))
        (bench.folder / "ran").rmdir()
    if (bench.folder / "started").exists():
        found.append(("program started", (bench.folder / "started").read_text().split()[0]))
        (bench.folder / "started").unlink()
    mine = case.out and status != 2  # what is refused must change nothing
    for path, state in before.items():
        if (mine and path.startswith(case.out)) or os.path.basename(path) in ("lock", "started"):
            continue
        log = path.endswith(("commands.txt", ".log")) or stat.S_ISLNK(state[0])
        if after.get(path) != state and not (log and case.program == "reproduce"):
            found.append(("file lost" if path not in after else "file changed", path))
    for path in sorted(after.keys() - before.keys() - {"ran", "started"}):
        if not (case.out and path.startswith(case.out)):
            found.append(("file left", path))
    if case.out and status == 0 and not case.own_nan:
        log = bench.folder / case.out / "metrics.jsonl"
        if log.is_file() and re.search(r"\b(NaN|-?Infinity)\b", log.read_text(errors="replace")):
            found.append(("NaN in a log", str(log.relative_to(bench.folder))))
    return found


def make_case(bench, seed, number, kinds):
    """(kind, Case) of a number, in the fresh folder case-NUMBER."""
    rng, folder = random.Random(f"{seed} {number}"), f"case-{number}"
    kind = kinds[number % len(kinds)]
    if (bench.folder / folder).exists():
        shutil.rmtree(bench.folder / folder)
    (bench.folder / folder).mkdir()
    return kind, KINDS[kind](bench, rng, folder)


def run_case(bench, case):
    """Run a case: (Result, findings). Its folder stays."""
    before = snapshot(bench.folder)
    result = bench.run(case.program, case.flags, case)
    return result, judge(bench, case, result, before)


def usable_kinds(bench):
    """The kinds of cases that can be made here."""
    return [kind for kind in KINDS if bench.has_pillow or kind not in ("images", "masks")]


# -------------------------------------------------------- the long run


class Forks:
    """Runs commands through experiments/fuzz_server.py; see Bench for `run`."""

    def __init__(self, folder):
        self.folder = folder
        self.said = folder.parent / "said"
        self.said.mkdir()
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "COLUMNS": "100",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        server = [sys.executable, "-P", str(HERE / "experiments" / "fuzz_server.py"), str(HERE)]
        self.server = subprocess.Popen(
            server, cwd=folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def command(self, program, flags):
        """The command line that does the same by hand."""
        return ["python", "-m", PROGRAMS[program], *flags]

    def run(self, program, flags, case=None):
        """Run a program with the limits of a case; return its Result."""
        request = {
            "program": PROGRAMS[program],
            "flags": flags,
            "stdout": str(self.said / "stdout"),
            "stderr": str(self.said / "stderr"),
            "environment": case.environment if case else {},
            "seconds": SECONDS,
            "memory": MEMORY,
            "file_size": case.file_size if case else None,
        }
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        said = [(self.said / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Result(status, *said)

    def run_fresh(self, program, flags, case):
        """The same in an interpreter of its own, without limits unless the case needs one."""
        command = [sys.executable, *self.command(program, flags)[1:]]
        environment = self.environment | {"PYTHONPATH": str(HERE)}
        if case.environment or case.file_size:
            return self.run(program, flags, case)
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Result(None, "", "")
        said = [text.decode(errors="replace") for text in (done.stdout, done.stderr)]
        return Result(done.returncode, *said)


def show(forks, seed, number, kind, case, result, findings):
    """Print a finding so that it can be understood and run again."""
    for name, details in findings:
        print(f"FINDING {name}: {details[:200]}")
    print(f"  seed {seed}, case {number}, {kind}: {case.what[:200]!r}; it {case.expect}")
    command = shlex.join(forks.command(case.program, case.flags))
    print("  " + ascii(command[:2000])[1:-1])
    print(f"  status {result.status}")
    for line in result.stderr.splitlines()[-4:]:
        print("  | " + line[:300])
    sys.stdout.flush()


def report(tried, found):
    """Print a table: cases and findings by kind of case."""
    names = sorted({name for counts in found.values() for name in counts})
    print("\n| kind | cases | refused | accepted | findings |")
    print("| --- | --- | --- | --- | --- |")
    for kind, counts in tried.items():
        shown = ", ".join(f"{name} {found[kind][name]}" for name in names if found[kind][name])
        row = [kind, counts.total(), counts[2], counts[0], shown or "0"]
        print(f"| {' | '.join(map(str, row))} |")
    total, findings = (sum(c.total() for c in part.values()) for part in (tried, found))
    print(f"{total} cases, {findings} findings")


def main(argv=None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=5, help="how long")
    add("--seed", type=int, default=0, help="of the cases")
    add("--case", type=int, help="only this case; its files are kept")
    add("--kinds", nargs="+", choices=list(KINDS), help="only these kinds (other case numbers)")
    args = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "bench").mkdir()
    try:
        forks = Forks(root / "bench")
        bench = Bench(root / "bench", forks.run)
        bench.build()
        shutil.copytree(bench.good, root / "good")
        kinds = args.kinds or usable_kinds(bench)
        tried, found = collections.defaultdict(collections.Counter), {}
        end, number = time.monotonic() + 60 * args.minutes, args.case or 0
        while number == args.case or (args.case is None and time.monotonic() < end):
            bench.run = forks.run_fresh if number % FRESH == FRESH - 1 else forks.run
            kind, case = make_case(bench, args.seed, number, kinds)
            result, findings = run_case(bench, case)
            tried[kind][result.status] += 1
            counts = found.setdefault(kind, collections.Counter())
            counts.update(name for name, _ in findings)
            if any(name.startswith("file ") for name, _ in findings):
                shutil.rmtree(bench.good)  # a later case must not find what this one spoiled
                shutil.copytree(root / "good", bench.good)
            if findings or args.case is not None:
                show(forks, args.seed, number, kind, case, result, findings)
            if args.case is None:
                shutil.rmtree(bench.folder / f"case-{number}")
            number += 1
        report(tried, found)
        forks.server.stdin.close()
    finally:
        if args.case is None:
            shutil.rmtree(root, ignore_errors=True)
        else:
            print(f"the files are in {root / 'bench'}")
    return 1 if any(counts.total() for counts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

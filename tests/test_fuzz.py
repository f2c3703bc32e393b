"""Hundreds of damaged inputs through the scripts' own entry points: see experiments/fuzz.py.

The same cases as in its long run, in this process, so without limits of memory and file sizes.
"""

import contextlib
import importlib
import io
import os
import shutil
import signal
import sys
import traceback

import pytest

from experiments import fuzz, fuzz_bench, mutations
from plumbing import checkpoints, command_line

SEED = 0
CASES = {  # of each kind; those that would train are mostly left out
    "flags": 60,
    "arrays": 40,
    "images": 30,
    "masks": 12,
    "checkpoints": 20,
    "weights": 40,
    "logs": 20,
    "outputs": 20,
}
CPU, WALL = 15, 120  # seconds that no case may take: computing, and waiting on a busy machine


class Hang(BaseException):
    """Raised in a command that takes too long. Not an Exception: nothing may catch it."""


def stop(*_):
    raise Hang


def in_process(program, flags, case=None):
    """Run a program's main() as its `if __name__ == "__main__"` does: see fuzz_bench.Bench."""
    module = fuzz_bench.PROGRAMS[program]
    main = importlib.import_module(module).main
    status, out, err = 0, io.StringIO(), io.StringIO()
    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, *timers)}
    for (number, timer), seconds in zip(timers.items(), (CPU, WALL)):
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module])
            for name, value in (case.environment if case else {}).items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                with command_line.one_line_errors():
                    main(flags)
    except SystemExit as stopped:
        status = stopped.code or 0
    except Hang:
        status = None
    except Exception:
        status = 1
        err.write(traceback.format_exc())
    finally:
        for timer in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        while checkpoints.LOCKS:
            checkpoints.LOCKS.pop().close()
    return fuzz_bench.Result(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder of good files, which is also the working directory."""
    folder, before = tmp_path_factory.mktemp("fuzz"), os.getcwd()
    bench = fuzz_bench.Bench(folder, in_process)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
        os.chdir(folder)
        bench.build()
        yield bench
        os.chdir(before)


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_damage_is_refused_in_one_line_or_harmless(kind, bench):
    """No traceback, hang or lost file; nonsense is refused, what is harmless is accepted."""
    if kind not in fuzz.usable_kinds(bench):
        pytest.skip("needs Pillow")
    found = []
    for number in range(CASES[kind]):
        _, case = fuzz.make_case(bench, SEED, number, [kind])
        shutil.rmtree(bench.folder / f"case-{number - 1}", ignore_errors=True)
        slow = case.expect != fuzz_bench.REFUSE and number % 6  # it trains, most of the time
        if slow or case.file_size:
            continue
        result, findings = fuzz.run_case(bench, case)
        if findings:
            found.append((number, findings, case.what, case.program, case.flags, result.stderr))
    assert not found, "\n".join(map(ascii, found))


def test_findings_are_found(bench):
    """What the judge must see: each wrong ending of a command, and a harmless one."""
    case = fuzz_bench.Case("cls", [], "", fuzz_bench.REFUSE, "new")
    marks = {"ran": "code ran", "started": "program started", "good/tiny.npz": "file changed"}
    endings = {
        None: "hang", 1: "exit status", -11: "exit status", 0: "nonsense accepted",
        2: "not one line",
    }  # fmt: skip
    for status, kind in endings.items():
        before = fuzz.snapshot(bench.folder)
        result = fuzz_bench.Result(status, "", "a\nb\n")
        assert [name for name, _ in fuzz.judge(bench, case, result, before)] == [kind]
    good = fuzz_bench.Result(2, "", "error: one line\n")
    assert fuzz.judge(bench, case, good, fuzz.snapshot(bench.folder)) == []
    for name, kind in marks.items():
        before = fuzz.snapshot(bench.folder)
        if name == "ran":
            (bench.folder / name).mkdir()
        else:
            with open(bench.folder / name, "a") as file:
                file.write("gs")
        assert [found for found, _ in fuzz.judge(bench, case, good, before)] == [kind]

"""SIGTERM and SIGINT: finish the step, save, and exit with status 75."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

STOPPED = 75  # exit status of a run that saved and stopped on a signal: "try again" in sysexits.h
INTERRUPTED = 128 + signal.SIGINT  # exit status of a program that stopped without saving


class Stopped(BaseException):
    """SIGTERM or SIGINT was received, and nothing is lost.

    Not an Exception, because libraries that catch every Exception must let it pass.
    """


received = []  # the signals so far
interruptible = []  # what a signal interrupts at once, in words


def stop_asked():
    """Has this process received SIGTERM or SIGINT?"""
    return bool(received)


@contextlib.contextmanager
def at_once(what):
    """Within it, a signal raises Stopped at once. what: in words, `during a download`."""
    interruptible.append(what)
    try:
        if received:
            raise Stopped(f"stopped by a signal {what}")
        yield
    finally:
        interruptible.remove(what)


def handle(number, frame):
    """Handler of SIGTERM and SIGINT: the loop finishes its step. A second SIGINT ends it now."""
    if received and number == signal.SIGINT:
        end_now()
    received.append(number)
    if interruptible:
        raise Stopped(f"stopped by a signal {interruptible[-1]}")


def kill_children():
    """Kill the loader processes.

    They ignore SIGTERM, and after an error they may not be told to end, or wait for a lock of one
    that was killed: a program that waits for them when it ends would never end.
    """
    for process in multiprocessing.active_children():
        process.kill()


def end_now():
    """End this process and its loader processes with one line, wherever the program is.

    An exception could come to light as a traceback, or be swallowed by a destructor.
    """
    kill_children()
    os.write(2, f"{Path(sys.argv[0]).name}: ended by a second signal, without saving\n".encode())
    os._exit(INTERRUPTED)


def catch():
    """Handle SIGTERM and SIGINT from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def ignore():
    """Ignore SIGTERM and SIGINT from now on: in a loader process, or in a program that ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

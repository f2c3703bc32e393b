"""SIGTERM and SIGINT: finish the step, save, and exit with status 75."""

import signal

import torch
import torch.distributed as dist

from plumbing import processes

STOPPED = 75  # exit status of a run that saved and stopped on a signal: "try again" in sysexits.h


class Stopped(Exception):
    """SIGTERM or SIGINT was received, and nothing is lost."""


received = []  # the signals so far


def stop_asked(device):
    """Has any process received SIGTERM or SIGINT? All processes get the same answer."""
    if not dist.is_initialized():
        return bool(received)
    return bool(processes.all_sum(torch.tensor(len(received), device=device)))


def stop_before(when):
    """Raise Stopped if this process received a signal before its run had begun; when: in words."""
    if received:
        raise Stopped(f"stopped by a signal {when}")


def handle(number, frame):
    """Handler of SIGTERM and SIGINT: the loop finishes its step. A second SIGINT interrupts now."""
    if received and number == signal.SIGINT:
        raise KeyboardInterrupt
    received.append(number)


def catch():
    """Handle SIGTERM and SIGINT from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)

"""A run's output folder and its checkpoints: locking, saving, resuming and loading.

OUT/checkpoint.pt is the newest checkpoint and whole at every instant; OUT/previous.pt is the one
before it. A checkpoint is a dict: kind ("tokenizer", "pretraining", ...), config (the fields of the
model's configuration), model (state dict), step, optimizer, scaler, arguments (the command line),
torch (its version), and what a script adds, such as normalise or classes.
"""

import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing import outputs, weights

CHECKPOINTS = "checkpoint.pt", "previous.pt"  # the newest, and the one before it

# Files that a run which ended before its first step may leave in its output folder.
LEFT_BY_A_FALSE_START = {"lock", "checkpoint.tmp", "checkpoint.pt"}

# Settings that may differ when a run is resumed. Only two change more than rounding: `accumulate`
# the batch statistics of standardised logits, `device` the noise.
FREE_TO_CHANGE = {
    "resume",
    "out",
    "data_dir",
    "workers",
    "log_every",
    "save_every",
    "accumulate",
    "device",
    "recompute",
    "benchmark",
}

LOCKS = []  # open lock files: closing one would release its lock
DAMAGED = set()  # paths of checkpoints that cannot be read: save() keeps none as previous.pt


# -------------------------------------------------------- the output folder


def open_output(args, rank):
    """Create, check and lock the folder --out; return its path, or None with --benchmark.

    The first process does the work (see claim_output). All processes get its answer: args.resume,
    or its ValueError.
    """
    if args.benchmark:
        return None
    message = None
    if rank == 0:
        try:
            claim_output(args)
        except (ValueError, OSError) as error:
            message = str(error)
    answer = [message, args.resume]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    message, args.resume = answer
    if message:
        raise ValueError(message)
    return Path(args.out)


def claim_output(args):
    """Create the folder --out and lock it.

    If torchrun (--max-restarts) restarted this run after a process died, sets args.resume to
    whether there is a checkpoint to resume from. Raises ValueError if the folder is not empty and
    --resume is not given, if there is no checkpoint and it is given, or if it cannot be made there.
    """
    out = Path(args.out)
    if out.is_dir():
        found = {path.name for path in out.iterdir()}
    else:
        found = {"a file"} if out.exists() else set()
    has_checkpoint = not found.isdisjoint(CHECKPOINTS)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and read_lock(out).get("launcher") == os.getppid():
        args.resume = has_checkpoint
    if args.resume and not has_checkpoint:
        raise ValueError(f"--resume: there is no {CHECKPOINTS[0]} in {out}")
    if not args.resume and not is_false_start(out, found):
        raise ValueError(
            f"--out {out} is not an empty folder: choose a new one, or --resume to continue it"
        )
    if not args.resume:
        outputs.check_outside(out, args.data)
    with outputs.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)


def is_false_start(out, found):
    """True if a run ended here before its first step, so that overwriting it loses nothing."""
    if found - LEFT_BY_A_FALSE_START:
        return False
    if CHECKPOINTS[0] not in found:
        return True
    try:
        return weights.read(out / CHECKPOINTS[0])["step"] == 0
    except (ValueError, KeyError, TypeError):  # not a checkpoint of ours, or damaged
        return False


def lock(out):
    """Lock OUT/lock for this process and write who holds it into the file.

    The lock is released when the process exits, even if it crashes. Raises ValueError naming the
    process that holds the lock. Does nothing on Windows, or on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(out / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = read_lock(out)
        raise ValueError(
            f"--out {out} is in use by process {owner.get('pid', '?')} on "
            f"{owner.get('host', '?')}: stop that process first, or choose another folder"
        ) from error
    except OSError:  # a file system without locks
        pass
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "launcher": os.getppid()}
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()
    LOCKS.append(file)


def read_lock(out):
    """The process that holds, or last held, OUT/lock: {"pid", "host", "launcher"}.

    Empty if there is no lock file, or if its process died while writing it.
    """
    try:
        return json.loads((out / "lock").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


# -------------------------------------------------------- saving and resuming


def save(out, kind, args, step, model, optimizer, scaler, more=None):
    """Write OUT/checkpoint.pt after `step` steps: everything that --resume needs.

    more: a dict of further entries. Does nothing if out is None (--benchmark).

    The checkpoint goes to a temporary file first and takes its name once it is on the disk, so
    checkpoint.pt is whole at every instant. The old one becomes previous.pt. Raises ValueError,
    leaving both as they are, if the disk is full or a weight is not finite; and at step 0 if there
    is no room for the next checkpoint.
    """
    if out is None:
        return
    newest, temporary = out / CHECKPOINTS[0], out / "checkpoint.tmp"
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} is not finite after step {step}: lower --lr; "
                f"{newest} is the last good checkpoint"
            )
    state = {"kind": kind, "config": asdict(model.config), "model": model.state_dict()}
    state |= more or {}
    state |= {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state |= {"arguments": vars(args), "torch": str(torch.__version__)}
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch turns an OSError of the file into RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise ValueError(
            f"cannot write the checkpoint of step {step} to {out} ({reason}): make room; "
            "the checkpoint before it is unchanged"
        ) from error
    if newest.exists() and newest not in DAMAGED:
        keep_as_previous(out)
    os.replace(temporary, newest)
    DAMAGED.discard(newest)
    if step == 0:  # the next one stands beside it, and also has AdamW's two moments
        moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        outputs.check_room(newest, newest.stat().st_size + moments)


def keep_as_previous(out):
    """Give OUT/checkpoint.pt the name previous.pt too, so that it outlives its replacement."""
    newest, previous = (out / name for name in CHECKPOINTS)
    spare = out / "previous.tmp"
    spare.unlink(missing_ok=True)
    try:
        os.link(newest, spare)  # a second name: checkpoint.pt is never missing
    except OSError:  # a file system without links
        os.rename(newest, spare)
    os.replace(spare, previous)


def resume(out, kind, args, model, optimizer, scaler, extra):
    """Load OUT's newest whole checkpoint into model, optimizer and scaler; return the checkpoint.

    extra: see check_unchanged. If checkpoint.pt is damaged, says so on stderr and takes
    previous.pt. Raises ValueError if neither is whole, or naming a setting that differs from the
    interrupted run's, except those in FREE_TO_CHANGE, or what of its data has changed.
    """
    damage = []
    for name in CHECKPOINTS:
        try:
            state = load(out / name, kind)
            break
        except ValueError as error:
            damage.append(str(error))
            DAMAGED.add(out / name)
    else:
        raise ValueError(f"--resume: {'; '.join(damage)}")
    if damage and not (dist.is_initialized() and dist.get_rank()):
        print(f"{damage[0]}: continuing from {name}, step {state['step']}", file=sys.stderr)
    for name, value in vars(args).items():
        old = state["arguments"].get(name)
        if name not in FREE_TO_CHANGE and old != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {flag} is {value}, but {out} was started with {old}")
    check_unchanged(out, state, extra)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state


def check_unchanged(out, saved, extra):
    """Check that a run is resumed on what it was started with.

    saved: its checkpoint; extra: what the checkpoint would hold if it were started now. Raises
    ValueError naming what of its training data or its tokenizer has changed.
    """
    before, now = saved.get("data", {}), extra["data"]
    for name, value in now.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"--resume: the {name} of the training data changed since {out} was started: "
                f"{str(before[name])[:80]} then, {str(value)[:80]} now"
            )
    if saved.get("predicts", extra.get("predicts")) != extra.get("predicts"):
        raise ValueError(f"--resume: {out} was started with another tokenizer of the same path")


def arguments(out):
    """The command line, {flag: value}, of the run in the folder OUT; None without a checkpoint."""
    found = (arguments_of(Path(out) / name) for name in CHECKPOINTS)
    return next((saved for saved in found if saved), None)


def arguments_of(path):
    """The command line, {flag: value}, in a checkpoint; {} if it is absent, damaged or foreign."""
    try:
        return dict(weights.read(path)["arguments"])
    except (ValueError, KeyError, TypeError):  # whoever loads it says what is wrong
        return {}


# -------------------------------------------------------- loading


def load(path, *kinds):
    """Read a checkpoint of these scripts.

    Raises ValueError unless it is whole and its kind is one of `kinds`.
    """
    return check_kind(path, weights.read(path), *kinds)


def check_kind(path, state, *kinds):
    """Return `state`, the content of the file `path`.

    Raises ValueError unless it is a checkpoint of these scripts and its kind is one of `kinds`.
    """
    missing = {"kind", "config", "model"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of these scripts: it has no {', '.join(sorted(missing))}"
        )
    if state["kind"] not in kinds:
        raise ValueError(
            f"{path} is a {state['kind']} checkpoint; this needs one of: {', '.join(kinds)}"
        )
    return state

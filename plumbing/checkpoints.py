"""A run's output folder and its checkpoints: locking, saving, resuming and loading.

OUT/checkpoint.pt is the newest checkpoint and whole at every instant; OUT/previous.pt is the one
before it. A checkpoint is a dict: kind ("tokenizer", "pretraining", ...), config (the fields of the
model's configuration), model (state dict), step, optimizer, scaler, arguments (the command line),
torch (its version), and what a script adds, such as normalise or classes.
"""

import atexit
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing import entries, log, outputs, processes, weights

CHECKPOINTS = "checkpoint.pt", "previous.pt"  # the newest, and the one before it

# Files that a run which ended before its first step may leave in its output folder.
LEFT_BY_A_FALSE_START = {"lock", "checkpoint.tmp", "checkpoint.pt"}

# Settings that may differ when a run is resumed. Only `accumulate` changes more than rounding: the
# batch statistics of standardised logits.
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

# Flags whose path may differ: the checkpoint has a digest of what is there, see check_unchanged.
BY_CONTENT = {"data": "data", "tokenizer": "predicts", "init": "init"}  # flag: the entry

LOCKS = []  # open lock files: closing one would release its lock
DAMAGED = set()  # paths of checkpoints that cannot be read: save() keeps none as previous.pt


# -------------------------------------------------------- the output folder


def open_output(args):
    """Create, check and lock the folder --out; return its path, or None with --benchmark.

    The first process does the work (see claim_output). All processes get its answer: args.resume,
    or its ValueError.
    """
    if args.benchmark:
        return None
    args.resume = in_first(lambda: claim_output(args))
    return Path(args.out)


def in_first(work):
    """The value of work() in the first process, or its error as a ValueError, in all processes."""
    message, value = None, None
    if log.is_first():
        try:
            value = work()
        except (ValueError, OSError) as error:
            message = str(error)
    message, value = processes.of_first((message, value))
    if message:
        raise ValueError(message)
    return value


def claim_output(args):
    """Create the folder --out and lock it; return args.resume.

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
        raise ValueError(nothing_in(out))
    if not args.resume and not is_false_start(out, found):
        raise ValueError(
            f"--out {out} is not an empty folder: choose a new one, or --resume to continue it"
        )
    if not args.resume:
        outputs.check_outside(out, args.data)
    with outputs.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
    return args.resume


def nothing_in(out):
    """What is wrong if a run is resumed and the folder OUT has no checkpoint; what to do."""
    text = f"--resume: there is no {CHECKPOINTS[0]} in {out}"
    if os.environ.get("GROUP_RANK", "0") == "0":  # torchrun's number of the node
        return text
    writer = os.environ.get("MASTER_ADDR")
    return f"{text} on this node: copy it from {writer}, or share --out between the nodes"


def is_false_start(out, found):
    """True if a run ended here before its first step, so that overwriting it loses nothing."""
    if found - LEFT_BY_A_FALSE_START:
        return False
    if CHECKPOINTS[0] not in found:
        return True
    try:
        return load(out / CHECKPOINTS[0], *entries.KINDS)["step"] == 0
    except ValueError:  # not a checkpoint of ours, or damaged
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
    if (out / "lock").exists() and not (out / "lock").is_file():  # opening a pipe would wait
        raise ValueError(f"--out {out}: lock is not a file: choose another folder")
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


@atexit.register
def release_locks():
    """Close the lock files as the process ends."""
    for file in LOCKS:
        file.close()


def read_lock(out):
    """The process that holds, or last held, OUT/lock: {"pid", "host", "launcher"}.

    Empty if there is no lock file, if its process died while writing it, or if something else has
    written it: it only serves a message and a restart.
    """
    try:
        owner = log.from_json((out / "lock").read_text(), "lock")
    except (OSError, ValueError):
        return {}
    right = isinstance(owner, dict) and type(owner.get("host")) is str
    return owner if right and all(type(owner.get(n)) is int for n in ("pid", "launcher")) else {}


# -------------------------------------------------------- saving and resuming


def save(out, kind, args, step, model, optimizer, scaler, more=None):
    """Write OUT/checkpoint.pt after `step` steps: everything that --resume needs.

    more: a dict of further entries.

    The checkpoint goes to a temporary file first and takes its name once it is on the disk, so
    checkpoint.pt is whole at every instant. The old one becomes previous.pt, except at step 0,
    where it is a false start's. Raises ValueError, leaving both as they are, if the disk is full or
    a weight is not finite; and at step 0 if there is no room for the next checkpoint.
    """
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
        temporary.unlink(missing_ok=True)  # it may be a link or a pipe
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = outputs.disk_error(error)
        if cause is None:
            raise
        raise ValueError(
            f"cannot write the checkpoint of step {step} to {out} ({cause.strerror}): make room; "
            "the checkpoint before it is unchanged"
        ) from error
    if step and newest.exists() and newest not in DAMAGED:  # at 0 it is a false start's
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


def resume(out, kind, args, model, optimizer, scaler, extra, steps):
    """Load OUT's newest whole checkpoint into model, optimizer and scaler; return the checkpoint.

    extra: further entries, see check_unchanged; modules among them are loaded, too. steps: the
    run's last step. If checkpoint.pt is damaged, says so on stderr and takes previous.pt. Raises
    ValueError if neither is whole, if an entry is not what these scripts write or does not fit the
    model, or naming a setting that differs from the interrupted run's, except those in
    FREE_TO_CHANGE and moved files, or data that changed.
    """
    if not any((out / name).exists() for name in CHECKPOINTS):  # on another node than the first
        raise ValueError(nothing_in(out))
    path, state, damage = newest_whole(out, kind)
    first = processes.of_first(state["step"])
    if state["step"] != first:
        raise ValueError(
            f"--resume: {path} is of step {state['step']} on this node, and of {first} on that of "
            "process 0: copy its file, or share --out between the nodes"
        )
    if damage and log.is_first():
        print(f"{damage}: continuing from {path.name}, step {state['step']}", file=sys.stderr)
    moved = {flag for flag, entry in BY_CONTENT.items() if entry in state and entry in extra}
    for name, value in vars(args).items():
        old = state["arguments"].get(name)
        if name not in FREE_TO_CHANGE | moved and old != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {flag} is {value}, but {out} was started with {old}")
    check_unchanged(out, args, state, extra)
    config = asdict(model.config)
    entries.check_config(path, state["config"], {name: type(v) for name, v in config.items()})
    if other := [name for name in config if state["config"][name] != config[name]]:
        raise ValueError(f"{path} does not fit: config: {other[0]} is not {config[other[0]]}")
    if state["step"] > steps:
        raise ValueError(f"{path}: step is {state['step']}, but the run has {steps} steps")
    modules = {k: v for k, v in {"model": model, **extra}.items() if hasattr(v, "state_dict")}
    for name, module in modules.items():
        shapes = weights.shapes_of(module.state_dict())
        weights.check_shapes(path, state.get(name, {}), shapes, name)
    entries.check_optimizer(path, state["optimizer"], optimizer, state["step"])
    entries.check_scaler(path, state["scaler"], scaler)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state


def newest_whole(out, *kinds):
    """(path, content, what is wrong with the newer one or None) of OUT's newest whole checkpoint.

    The first process chooses it, so that all resume from the same one. Raises ValueError if neither
    is whole, or if one cannot be read or is whole but was not written by these scripts.
    """
    found = {}

    def choose():
        damage = []
        for name in CHECKPOINTS:
            try:
                found[name] = load(out / name, *kinds)
                return name, damage[0] if damage else None
            except weights.Damaged as error:
                damage.append(str(error))
                DAMAGED.add(out / name)
        raise ValueError(f"--resume: {'; '.join(damage)}")

    name, damage = in_first(choose)
    return out / name, found[name] if found else load(out / name, *kinds), damage


def check_unchanged(out, args, saved, extra):
    """Check that a run is resumed on what it was started with.

    saved: its checkpoint; extra: the entries that the checkpoint would hold beside the model's if
    it were started now. Raises ValueError naming what of its data, its tokenizer, --init or its
    other entries has changed.
    """
    now = extra["data"]
    before = saved.get("data", now)  # of earlier versions, whose checkpoints have none
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            then, today = (str(found.get(name))[:80] for found in (before, now))
            raise ValueError(
                f"--resume: the {name} of the training data changed since {out} was started: "
                f"{then} then, {today} now in --data {args.data}"
            )
    if saved.get("predicts", extra.get("predicts")) != extra.get("predicts"):
        raise ValueError(
            f"--resume: {out} was started with another tokenizer than --tokenizer {args.tokenizer}:"
            " give it the old one"
        )
    if extra.get("init") not in (None, saved.get("init", extra.get("init"))):
        raise ValueError(
            f"--resume: {out} was started with another file than this --init {args.init}: move it "
            "away, or give --init the old file"
        )
    for name in ("normalise", "classes", "layer", "decoder_dim"):
        if name in extra and saved.get(name) != extra[name]:
            raise ValueError(f"--resume: the {name} in {out} is not that of the flags and data")


def init_digest(args):
    """A digest of the file or folder --init; None without one."""
    path = Path((args.init or "").removeprefix("dalle:"))
    return weights.file_digest(path) if args.init and path.exists() else None


def start_of(args):
    """The file of weights to start from: --init, or None.

    With --resume, which takes everything from the checkpoint in --out, that checkpoint stands in
    for a file that is gone.
    """
    if not (args.init and args.resume and args.out) or args.init == "random":
        return args.init
    if in_first(Path(args.init.removeprefix("dalle:")).exists):  # all load the same file
        return args.init
    path, _, _ = newest_whole(Path(args.out), *entries.KINDS)
    log.note(f"--init {args.init} is gone, and --resume needs only {path}")
    return str(path)


def arguments(out, parser):
    """The command line, {flag: value}, of the run in the folder OUT; None without a checkpoint.

    parser: that of the command line. Raises ValueError naming a flag that is needed but missing.
    """
    found = (arguments_of(Path(out) / name, parser) for name in CHECKPOINTS)
    saved = next((saved for saved in found if saved), None)
    for action in parser._actions if saved else ():
        if action.required and saved.get(action.dest) is None and saved.keys() <= flags_of(parser):
            raise ValueError(f"--resume: the checkpoint in {out} has no value for --{action.dest}")
    return saved


def flags_of(parser):
    """The names of a parser's flags, as they stand in a checkpoint's arguments."""
    return {action.dest for action in parser._actions}


def arguments_of(path, parser, names=None):
    """The command line, {flag: value}, in a checkpoint; {} if it is damaged or published weights.

    parser: that of the command line; names: of the flags that are wanted; None: all. Raises
    ValueError naming a flag whose value it cannot have.
    """
    try:
        state = weights.read(path)
    except weights.Damaged:  # whoever loads it says what is wrong
        return {}
    if not isinstance(state, dict) or "kind" not in state:
        return {}
    saved = entries.check(path, state, *entries.KINDS)["arguments"]
    saved = {name: value for name, value in saved.items() if names is None or name in names}
    if names or saved.keys() <= flags_of(parser):  # a run of another script is refused as such
        entries.check_flags(path, saved, parser)
    return saved


# -------------------------------------------------------- loading


def load(path, *kinds):
    """Read a checkpoint of these scripts.

    Raises weights.Damaged if it is not whole, and ValueError unless its kind is one of `kinds` and
    its entries are what these scripts write.
    """
    return entries.check(path, weights.read(path), *kinds)

"""What the four training scripts share and the paper does not name.

Command lines from recipe tables, torchrun set-up, mixed precision, learning-rate schedules, checkpoints,
logs and PNG pictures. No component of the paper and no training loop is in here.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import struct
import sys
import time
import zipfile
import zlib
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

COLUMNS = ("demo", "fashion", "base", "large")


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with exit status 2, and which takes no abbreviated options."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def recipe_parser(description, recipes):
    """A parser with one flag per row of a recipe table {name: (demo, fashion, base, large, help)}.

    The flag's type is that of the row's values; float if any of them is. None means "must be given".
    """
    parser = Parser(description)
    group = parser.add_argument_group("recipe", "default: the column that --recipe names")
    parser.add_argument("--recipe", default="demo", help=f"column of the recipe table: {', '.join(COLUMNS)}")
    for name, (*values, help_text) in recipes.items():
        kinds = {type(v) for v in values if v is not None}
        flag = "--" + name.replace("_", "-")
        shown = f"{help_text} [{', '.join(str(v) for v in values)}]".replace("%", "%%")
        if kinds == {bool}:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown)
        else:
            kind = float if float in kinds else kinds.pop()
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=shown)
    group = parser.add_argument_group("run")
    group.add_argument("--data-dir", help="where the data set's own files are, or are downloaded to")
    group.add_argument("--eval-split", default="val", choices=("val", "test"), help="val to choose, test to report")
    group.add_argument("--out", help="new folder for checkpoint.pt, metrics.jsonl and pictures")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    group.add_argument("--seed", type=int, default=0, help="of initialisation, order, crops, masks and noise")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="autocast precision")
    group.add_argument("--accumulate", type=int, default=1, help="split each process's batch into so many passes")
    group.add_argument("--workers", type=int, default=0, help="loader processes; raise it to decode image files")
    group.add_argument("--compile", action="store_true", help="torch.compile the model: slow start, faster steps")
    group.add_argument("--benchmark", type=int, metavar="STEPS", help="time so many steps and stop; writes nothing")
    group.add_argument("--log-every", type=int, default=20, help="steps between lines of the log")
    return parser


# what a number of a recipe may be, beyond finite and not negative
POSITIVE = {"image_size", "token_size", "vocab_size", "hidden", "groups", "blocks_per_group", "code_dim", "decoder_dim"}
POSITIVE |= {"min_crop", "eval_crop", "min_scale", "max_scale", "tau", "layer_decay"}
SHARES = {"min_crop", "eval_crop", "jitter", "erasing", "smoothing", "layer_decay"}  # at most 1
BELOW_ONE = {"drop_path", "beta2", "ema"}


def check_number(parser, name, value):
    """Exit with status 2, naming the flag, if a number of a recipe is out of its range."""
    wanted = [
        ("a finite number, 0 or more", 0 <= value < math.inf),
        ("above 0", value > 0 or name not in POSITIVE),
        ("at most 1", value <= 1 or name not in SHARES),
        ("below 1", value < 1 or name not in BELOW_ONE),
    ]
    for what, right in wanted:
        if not right:
            parser.error(f"--{name.replace('_', '-')} {value} must be {what}")


def parse_recipe(parser, recipes, argv=None):
    """Parse, then fill what was not given from the recipe's column. Exits with status 2 on bad input."""
    args = parser.parse_args(argv)
    if args.recipe not in COLUMNS:
        parser.error(f"unknown recipe {args.recipe!r}: choose one of {', '.join(COLUMNS)}")
    if args.out is None and not getattr(args, "eval", False) and args.benchmark is None:
        parser.error("--out is needed: a new folder for what the run makes")
    if args.benchmark and (args.out or args.resume or getattr(args, "eval", False)):
        parser.error("--benchmark writes, resumes and evaluates nothing: leave out --out, --resume and --eval")
    for name in ("steps", "batch_size", "accumulate", "eval_images", "save_every", "log_every", "benchmark"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name, row in recipes.items():
        if getattr(args, name) is None:
            setattr(args, name, row[COLUMNS.index(args.recipe)])
        if getattr(args, name) is None:
            parser.error(f"recipe {args.recipe!r} needs --{name.replace('_', '-')}: {row[-1]}")
        if isinstance(getattr(args, name), (int, float)):
            check_number(parser, name, getattr(args, name))
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} must be from 0 to 2**63 - 1")
    if getattr(args, "warmup_steps", 0) >= getattr(args, "steps", 1):
        parser.error(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}")
    if args.benchmark:
        args.save_every = args.log_every = sys.maxsize
    return args


STOPPED = 75  # exit status of a run that saved and stopped because it was asked to: "try again" in sysexits.h


class Stopped(Exception):
    """SIGTERM or SIGINT came; the checkpoint is written."""


signals = []  # those that came


def stop_asked(device):
    """Has any process been sent SIGTERM or SIGINT? The same answer in all of them."""
    return bool(all_sum(torch.tensor(len(signals), device=device))) if dist.is_initialized() else bool(signals)


def note_signal(number, frame):
    """Handler of SIGTERM and SIGINT: the loop ends its step first. A second SIGINT interrupts at once."""
    if signals and number == signal.SIGINT:
        raise KeyboardInterrupt
    signals.append(number)


@contextlib.contextmanager
def one_line_errors(stoppable=False):
    """Report bad input (ValueError, OSError) in one line with exit status 2; `python -X dev` shows where.

    stoppable: note SIGTERM and SIGINT for stop_asked(); a loop that ends with Stopped has exit status 75. An error
    that came through a loader process carries that process's traceback; its last line is the error.
    """
    status = 0
    for number in (signal.SIGTERM, signal.SIGINT) if stoppable else ():
        signal.signal(number, note_signal)
    try:
        yield
    except Stopped as stopped:
        print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        status = STOPPED
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        line = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: ")
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        status = 2
    finally:
        joined = dist.is_initialized()
        if joined:
            dist.destroy_process_group()
    if joined:
        # DDP's reducer keeps gloo's threads alive, and one that lets go of its last tensor while the interpreter is
        # being taken down aborts the process ("terminate called without an active exception"). Do not take it down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# ---------------------------------------------------------------- processes, devices, precision


def setup(device):
    """Join torchrun's process group if there is one; return (device, rank, number of processes).

    gloo on CPUs, nccl on GPUs. Raises ValueError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU: use --device cpu")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun's store may outlive a restart (--max-restarts), and then holds the addresses of the processes
            # that died (pytorch issue 167288). On one node, where all processes count alike, each start gets names of
            # its own; torchrun of several nodes counts restarts for each node.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        # A process that waits longer than this for the others gives up: nothing hangs for ever.
        waiting = timedelta(minutes=10)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=waiting)
        return device, dist.get_rank(), dist.get_world_size()
    return device, 0, 1


def rank_batch(batch_size, accumulate, world):
    """Images per process and step, given the paper's global batch. Raises ValueError if it does not divide."""
    if batch_size % (world * accumulate):
        raise ValueError(
            f"batch size {batch_size} does not divide into {world} processes x {accumulate} accumulation passes"
        )
    return batch_size // world


def precision(amp, device):
    """(autocast context factory, GradScaler) for --amp; both do nothing where they are not needed.

    auto is bf16 where the device computes in it: GPUs since Ampere, CPUs with AVX512-BF16 or AMX.
    """
    if amp == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        amp = "bf16" if fast else "off"
    dtype = {"off": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=amp != "off"), scaler


def compiled(part, device):
    """torch.compile. On CPUs what is made of several tensors and used more than once is stored: the compiler would
    otherwise look the shared relative bias up again in every block."""
    return torch.compile(part, options={"realize_reads_threshold": 1} if device.type == "cpu" else None)


def wrap(model, device, compile_model):
    """What the loop calls: the model, compiled and in DistributedDataParallel as asked."""
    wrapped = compiled(model, device) if compile_model else model
    if dist.is_initialized():
        ids = [device.index] if device.type == "cuda" else None
        # Buffers are statistics of the global batch, equal in all processes already.
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped, device_ids=ids, broadcast_buffers=False)
    return wrapped


def sync_only_if(model, last):
    """Gradients of accumulation passes stay local until the `last` one: DDP's all-reduce runs once a step."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else model.no_sync()


def all_sum(tensor):
    """Sum over all processes, in place; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class FiniteSteps:
    """Lets a step pass if its gradient is finite; counts those skipped and ends the run after LIMIT in a row."""

    LIMIT = 10  # fp16's loss scale may need a few at the start

    def __init__(self, out):
        self.out, self.total, self.in_a_row = out, 0, 0

    def allow(self, norm, step, lr):
        """norm: of the gradient, the same in all processes. Raises ValueError after LIMIT steps in a row."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.in_a_row == self.LIMIT:
            raise ValueError(
                f"the gradient was not finite in {self.LIMIT} steps in a row, the last one step {step} at learning "
                f"rate {lr:.3g}: lower --lr; {CHECKPOINTS[0]} in {self.out} is the last good checkpoint"
            )
        return False

    def trouble(self):
        """{"skipped_steps": how many} for the log; empty if there were none."""
        return {"skipped_steps": self.total} if self.total else {}


def seed_for(*key):
    """A 63-bit seed from any numbers: randomness that depends on (seed, step, ...), not on history."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def sample_noise(distribution, shape, count, seed, step, rank, device):
    """Noise for this process's `count` samples of a step: float32 (count, *shape), "uniform" or "exponential".

    Each sample's is a function of (seed, step, place in the global batch): however the batch is dealt to processes and
    passes, and wherever a run was resumed, it gets the same (on one kind of device).
    """
    noise = torch.empty(count, *shape, device=device)
    for place, row in enumerate(noise, start=rank * count):
        key = seed_for(seed, step, place)
        if device.type == "cpu":  # numpy's exponential is five times faster than torch's
            rng = np.random.Generator(np.random.SFC64(key))
            draw = rng.random if distribution == "uniform" else rng.standard_exponential
            draw(dtype=np.float32, out=row.numpy())
        else:
            generator = torch.Generator(device).manual_seed(key)
            draw = row.uniform_ if distribution == "uniform" else row.exponential_
            draw(generator=generator)
    return noise


def depth_noise(config, count, seed, step, rank, device):
    """Stochastic depth's uniform numbers for Beit.forward: (count, L, 2); zeros, which nobody reads, without it."""
    shape = config.depth, 2
    if config.drop_path == 0:
        return torch.zeros(count, *shape, device=device)
    return sample_noise("uniform", shape, count, seed, step, rank, torch.device("cpu")).to(device, non_blocking=True)


# ---------------------------------------------------------------- schedules: pure functions of the step


def cosine(step, steps, start, end):
    """From `start` at step 0 to `end` at `steps`, along half a cosine; `end` after that."""
    return end + (start - end) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) / 2


def ramp(step, steps, end):
    """Linear from 0 at step 0 to `end` at `steps`; `end` after that."""
    return end * min(step / steps, 1) if steps > 0 else end


def warmup_cosine(step, steps, warmup, peak, final):
    """Learning rate: linear to `peak` over `warmup` steps, then half a cosine to `final` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, final)


def warmup_linear(step, steps, warmup, peak):
    """Learning rate: linear to `peak` over `warmup` steps, then linear to 0 (segmentation)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(steps - step, 0) / (steps - warmup)


def duration(args, steps_per_epoch):
    """(steps, warm-up steps) of --epochs and --warmup-epochs. Raises ValueError if warm-up leaves no time."""
    steps, warmup = round(args.epochs * steps_per_epoch), round(args.warmup_epochs * steps_per_epoch)
    if steps < 1 or warmup >= steps:
        raise ValueError(
            f"--epochs {args.epochs} gives {steps} steps, --warmup-epochs {args.warmup_epochs} {warmup} of them: "
            "raise the first or lower the second"
        )
    return steps, warmup


def set_lr(optimizer, lr):
    """Give every group its layer's share of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# ---------------------------------------------------------------- --benchmark: where a step's time goes


def matmul_rate(device, autocast, repeats=9):
    """FLOP/s of large matrix products on the device in autocast's precision, the median of `repeats`."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device)
    seconds = []
    with autocast():
        a = a @ a  # now in that precision
        for _ in range(repeats):
            synchronise(device)
            start = time.perf_counter()
            torch.mm(a, a)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


def synchronise(device):
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU, or the most that the process had on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # getrusage counts the program that started this one as well
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Times the parts of a training step for --benchmark. Otherwise it gives out the loader's batches, nothing else.

    The loop marks the end of each part. PHASES: the same batch again and again, which is in memory, then new ones.
    """

    PHASES, WARM_UP = ("data in memory", "real data"), 3

    def __init__(self, steps, device):
        self.steps, self.device = steps, device
        self.seconds = {phase: [] for phase in self.PHASES}  # of each step: {part: seconds}
        self.now, self.record, self.flop = 0.0, collections.defaultdict(float), 0

    def batches(self, loader):
        """The batches to train on: with --benchmark WARM_UP times the first, then `steps` for each phase."""
        if not self.steps:
            yield from loader
            return
        ahead = 2 * loader.num_workers  # batches that loader processes have ready by the time they are asked for
        loader = iter(loader)
        first = next(loader)
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            yield first
        self.flop = counter.get_total_flops()
        yield from itertools.repeat(first, self.WARM_UP - 1)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for phase, source in zip(self.PHASES, (itertools.repeat(first), itertools.islice(loader, ahead, None))):
            self.now = time.perf_counter()
            for _ in range(self.steps):
                self.record = collections.defaultdict(float)
                if (batch := next(source, None)) is None:
                    raise ValueError(f"--benchmark {self.steps} takes more steps than the run has: lower it")
                yield batch
                self.seconds[phase].append(self.record)

    def mark(self, part):
        """A part of the step ends here; several of one name in a step are added up."""
        if self.steps:
            synchronise(self.device)
            before, self.now = self.now, time.perf_counter()
            self.record[part] += self.now - before

    def report(self, images, autocast, rank):
        """Print images/s, milliseconds by part, the share of the matrix-product rate, and the peak memory."""
        memory = peak_memory(self.device) / 2**30
        rate = matmul_rate(self.device, autocast)
        if rank:
            return
        with autocast():
            on = torch.is_autocast_enabled(self.device.type)
            dtype = torch.get_autocast_dtype(self.device.type) if on else torch.float32
        where = f"{torch.get_num_threads()} threads" if self.device.type == "cpu" else torch.cuda.get_device_name()
        processes = dist.get_world_size() if dist.is_initialized() else 1
        print(f"{processes} x {where}, {str(dtype).removeprefix('torch.')}, {images} images a step")
        print(f"means of {self.steps} steps after {self.WARM_UP}, in milliseconds")
        for phase, steps in self.seconds.items():
            step = statistics.mean(sum(record.values()) for record in steps)
            parts = (f"{p} {1e3 * statistics.mean(record[p] for record in steps):.1f}" for p in steps[0])
            print(f"{phase}: {images / step:.1f} images/s, step {1e3 * step:.1f}: {', '.join(parts)}")
            speed = self.flop / step
            print(f"    {speed / 1e9:.0f} GFLOP/s, {speed / rate:.0%} of {rate / 1e9:.0f}, the matrix products' rate")
        print(f"peak memory {memory:.2f} GiB in each process")


# ---------------------------------------------------------------- output folder, checkpoints


LEFT_BY_A_FALSE_START = {"lock", "checkpoint.tmp"}  # by a run that was killed before its first checkpoint
LOCKS = []  # open lock files: closing one would give the lock back


def read_lock(out):
    """Who has, or had, OUT/lock: {"pid", "host", "launcher"}; empty if nobody, or if it died while writing that."""
    try:
        return json.loads((out / "lock").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def lock(out):
    """Take OUT/lock, which the system gives back when this process ends, however it ends; note this process in it.

    Raises ValueError naming the process that has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no locks
        return
    file = open(out / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = read_lock(out)
        raise ValueError(
            f"--out {out} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}: "
            "stop that first, or choose another folder"
        ) from error
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "launcher": os.getppid()}))
    file.flush()
    LOCKS.append(file)


def claim_output(args):
    """Make OUT and lock it; refuse a non-empty one without --resume, and --resume without a checkpoint in it.

    Sets args.resume if torchrun (--max-restarts) has started this same run again after a process had died.
    """
    out = Path(args.out)
    there = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    whole = there & set(CHECKPOINTS)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and read_lock(out).get("launcher") == os.getppid():
        args.resume = bool(whole)
    if args.resume and not whole:
        raise ValueError(f"--resume: there is no checkpoint.pt in {out}")
    if not args.resume and there - LEFT_BY_A_FALSE_START:
        raise ValueError(f"--out {out} is not an empty folder: choose a new one, or --resume to continue it")
    out.mkdir(parents=True, exist_ok=True)
    lock(out)


def open_output(args, rank):
    """The folder OUT, made, locked and checked by the first process (see claim_output); all raise its ValueError.

    None with --benchmark: nothing is to be written.
    """
    if args.benchmark:
        return None
    verdict = [None, args.resume]
    if rank == 0:
        try:
            claim_output(args)
            verdict = [None, args.resume]
        except (ValueError, OSError) as error:
            verdict = [str(error), None]
    if dist.is_initialized():
        dist.broadcast_object_list(verdict)
    message, args.resume = verdict
    if message:
        raise ValueError(message)
    return Path(args.out)


CHECKPOINTS = "checkpoint.pt", "previous.pt"  # the newest, and the one before
DAMAGED = set()  # paths of those that could not be read: never to be kept in a whole one's place


def save_checkpoint(out, kind, args, step, model, optimizer, scaler, **more):
    """Write OUT/checkpoint.pt: configuration, weights and all that --resume needs, after `step` steps.

    To a temporary file first, which is on the disk before it takes the name; the one before it stays as previous.pt.
    So at every instant checkpoint.pt is whole. Raises ValueError, leaving both as they are, if the disk is full or a
    weight is not finite. Without OUT (--benchmark) it does nothing.
    """
    if out is None:
        return
    newest, previous, temporary = (out / name for name in (*CHECKPOINTS, "checkpoint.tmp"))
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite after step {step}: lower --lr; {newest} is the last good one")
    state = {"kind": kind, "config": asdict(model.config), "model": model.state_dict(), **more}
    state |= {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    state |= {"arguments": vars(args), "torch": str(torch.__version__)}
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer reports what the file's write raised
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise ValueError(
            f"cannot write the checkpoint of step {step} to {out} ({reason}): make room; the one before stays"
        ) from error
    if newest.exists() and newest not in DAMAGED:
        spare = out / "previous.tmp"
        spare.unlink(missing_ok=True)
        try:
            os.link(newest, spare)  # a second name for it, so that it has the first until the new one takes that
        except OSError:  # a file system without links
            os.rename(newest, spare)
        os.replace(spare, previous)
    os.replace(temporary, newest)
    DAMAGED.discard(newest)


FREE_TO_CHANGE = {
    "resume", "out", "data_dir", "workers", "log_every", "save_every", "accumulate", "device", "recompute", "benchmark",
}  # fmt: skip


def save_or_stop(save, step, steps, save_every, device):
    """Save every `save_every` steps and after the last one; on SIGTERM or SIGINT save now and raise Stopped."""
    stop = stop_asked(device)
    if stop or step % save_every == 0 or step == steps:
        save(step)
    if stop:
        if dist.is_initialized():
            dist.barrier()  # nobody leaves, and has the others ended, while the first process writes
        raise Stopped(f"stopped by a signal after step {step} of {steps}: --resume goes on from what is saved")


def resume_checkpoint(out, kind, args, model, optimizer, scaler):
    """Load OUT's newest whole checkpoint into model, optimizer and scaler; return the checkpoint.

    Raises ValueError if none is whole, or naming a setting that differs from the interrupted run's, except those that
    change no result but for rounding.
    """
    damage = []
    for name in CHECKPOINTS:
        try:
            state = load_checkpoint(out / name, kind)
            break
        except ValueError as error:
            damage.append(str(error))
            DAMAGED.add(out / name)
    else:
        raise ValueError(f"--resume: {'; '.join(damage)}")
    if damage and not (dist.is_initialized() and dist.get_rank()):
        print(f"{damage[0]}: going on from {name}, step {state['step']}", file=sys.stderr)
    for name, value in vars(args).items():
        if name not in FREE_TO_CHANGE and state["arguments"].get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {flag} is {value}, but {out} was begun with {state['arguments'].get(name)}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state


def read_file(path):
    """What a .pt, .pth or .safetensors file holds, read without running code in it. Raises ValueError naming it.

    A .pt file is a zip archive with a checksum for each tensor; torch.load does not look at them, so this does.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        read = safetensors_for(path).load_file
    else:
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {damaged} differs")
        return read(path)
    except Exception as error:  # half a dozen kinds for damaged and foreign files, and for code in a pickle
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is not a whole file of weights: {reason}") from error


def write_file(path, state):
    """Write a state dict to a new file: .safetensors, or .pt or .pth under the key `model`, as published weights are.

    Raises ValueError if the file is there already or its folder is not.
    """
    if Path(path).exists() or not Path(path).parent.is_dir():
        raise ValueError(f"{path} exists already or its folder does not: choose a new name in a folder that is there")
    if Path(path).suffix == ".safetensors":
        safetensors_for(path).save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"model": state}, path)


def safetensors_for(path):
    """The optional package safetensors. Raises ValueError saying what to install if it is absent."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{path} needs the optional package safetensors: pip install safetensors") from error
    return safetensors.torch


def load_checkpoint(path, *kinds):
    """One of our checkpoints. Raises ValueError unless it is whole and its kind is in `kinds`."""
    return check_kind(path, read_file(path), *kinds)


def check_kind(path, state, *kinds):
    """`state` itself. Raises ValueError unless it is a whole checkpoint of these scripts, of one of `kinds`."""
    missing = {"kind", "config", "model"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of these scripts: it has no {', '.join(sorted(missing))}")
    if state["kind"] not in kinds:
        raise ValueError(f"{path} is a {state['kind']} checkpoint; this needs one of: {', '.join(kinds)}")
    return state


# ---------------------------------------------------------------- log


class Log:
    """OUT/metrics.jsonl, and progress on stdout: one line that updates on a terminal, plain lines elsewhere."""

    def __init__(self, out, rank, steps, first_step=0):
        self.steps, self.rank = steps, rank
        self.path = out / "metrics.jsonl" if out else None
        self.start, self.first_step = time.time(), first_step
        if rank == 0 and self.path and self.path.exists():  # resumed: forget what came after the checkpoint
            kept = [m for m in read_metrics(out) if m.get("step", math.inf) <= first_step]
            (out / "metrics.tmp").write_text("".join(json.dumps(m) + "\n" for m in kept))
            os.replace(out / "metrics.tmp", self.path)
        self.terminal = sys.stdout.isatty()

    def write(self, **record):
        """One JSON object on a line of its own."""
        if self.rank == 0 and self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def step(self, step, images, **values):
        """Log `values` after `step` steps, with images a second since the start and the time left."""
        if self.rank or not self.path:
            return
        elapsed = time.time() - self.start
        done = step - self.first_step
        rate, left = images * done / elapsed, elapsed / done * (self.steps - step)
        self.write(step=step, **values, images_per_second=round(rate, 1), seconds=round(elapsed, 1))
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        line = f"step {step}/{self.steps}  {text}  {rate:.0f} images/s  {left // 60:.0f}m{left % 60:02.0f}s left"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def say(self, text):
        """A line that stays."""
        if self.rank == 0:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def final(self, **values):
        """The script's result: the last line of metrics.jsonl, and on stdout."""
        self.write(final=True, **values)
        self.say("  ".join(f"{k} {v:.5g}" for k, v in values.items()))


def read_metrics(out):
    """All records of OUT/metrics.jsonl, without a last line that a killed process left unfinished."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------- pictures


def write_png(path, pixels):
    """Write uint8 (H, W, 3) as a PNG: signature, header, zlib-compressed rows with filter byte 0, end."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def picture(path, rows, side=96, gap=2):
    """A PNG of rows of images, float tensors (B, 3, H, W) in [0, 1], each enlarged to about `side` pixels."""
    scale = max(1, round(side / rows[0].shape[-1]))
    lines = []
    for row in rows:
        row = (row.float().clamp(0, 1) * 255).round().byte().cpu().numpy().transpose(0, 2, 3, 1)
        row = row.repeat(scale, axis=1).repeat(scale, axis=2)
        row = np.pad(row, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(row), axis=1))
    write_png(path, np.concatenate(lines, axis=0))


def curve(path, values, width=640, height=240, margin=8):
    """A PNG line plot of `values` over their index; grey lines mark the range's quarters."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    values = np.asarray(values, np.float64)
    for quarter in range(5):
        canvas[margin + round(quarter / 4 * (height - 2 * margin - 1)), margin:-margin] = 220
    if len(values) > 1:
        low, high = values.min(), values.max()
        x = np.linspace(0, len(values) - 1, width - 2 * margin)
        y = (high - np.interp(x, np.arange(len(values)), values)) / max(high - low, 1e-12)
        rows = margin + np.round(y * (height - 2 * margin - 1)).astype(int)
        for column, (row, before) in enumerate(zip(rows, np.concatenate([rows[:1], rows[:-1]])), start=margin):
            canvas[min(row, before) : max(row, before) + 2, column] = (31, 119, 180)
    write_png(path, canvas)

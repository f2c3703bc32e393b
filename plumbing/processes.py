"""torchrun's processes, mixed precision, DistributedDataParallel, and memory kept for reuse."""

import contextlib
import ctypes
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plumbing import signals

stores = []  # of torchrun's processes, once this process has met them
FAILED = "failed"  # where the first process to fail leaves its message there
WAITING = timedelta(minutes=10)  # a process that waits longer for the others gives up


@dataclass(frozen=True)
class Process:
    """One process of a run: its device, its rank among `world` processes, and its precision."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world: int = 1
    autocast: Callable = contextlib.nullcontext  # with process.autocast(): ...
    scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu", enabled=False)  # for fp16


def setup(device, amp, compile_model=False):
    """Join torchrun's process group if there is one; return this Process.

    device: auto, cpu or cuda; amp: auto, off, bf16 or fp16. gloo on CPUs, nccl on GPUs. Turns
    TF32 off. Raises ValueError for a device that this machine does not have, and if a model is to
    be compiled for a CPU without a C++ compiler.
    """
    device = find_device(device)
    keep_freed_memory()  # with a GPU too: the loader's processes need it
    if compile_model and device.type == "cpu" and not shutil.which(compiler()):
        raise ValueError(f"--compile needs a C++ compiler, and {compiler()} is not there: install "
                         "it, set CXX to another, or leave out --compile")  # fmt: skip
    # cuDNN's default, TF32, has 11 significant bits: Encoder.exact's tokens would differ by device.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rank, world = join(device) if "RANK" in os.environ else (0, 1)
    return Process(device, rank, world, *precision(amp, device))


def keep_freed_memory():
    """Let the C library keep freed memory for the next step; returns whether it does.

    glibc would return large tensors to the system and ask for them again at every step, which costs
    a small model up to a third of its time. Its own variables, MALLOC_*, have the last word; other
    C libraries stay as they are.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never) and M_TOP_PAD, bytes to ask for at once
    settings = {-4: 0, -1: -1, -2: 512 << 20}
    return all(ctypes.CDLL(None).mallopt(name, value) for name, value in settings.items())


def compiler():
    """The C++ compiler that torch.compile runs for CPUs."""
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


def find_device(name):
    """The torch.device of --device; under torchrun each process gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is none of auto, cpu, cuda")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU: use --device cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count > torch.cuda.device_count():  # all raise this: nobody waits for one that is missing
        raise ValueError(
            f"{count} processes on this node have {torch.cuda.device_count()} GPUs: start one for "
            "each GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(device):
    """Join torchrun's process group: (rank, number of processes)."""
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart (--max-restarts) and then holds the addresses of dead
    # processes (pytorch issue 167288), so each start has a part of the store to itself.
    store = dist.PrefixStore(meet(store, rank, world), store)
    stores.append(store)  # before they connect, which fails if one of them has failed
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAITING)
    return dist.get_rank(), dist.get_world_size()


def meet(store, rank, world):
    """Wait for the other processes; return a name for this start that no earlier start had.

    On several nodes each torchrun counts restarts for itself, and some nodes may be new. So every
    process leaves a token; the first process proposes the list of all tokens, again and again, and
    begins when all have seen the same list. A list without one's own token is of an earlier start.
    Raises ValueError if a process fails before, or if one does not come in time.
    """

    def found(key):
        return store.get(key).decode() if store.check([key]) else ""

    mine, pause, end = secrets.token_hex(8), 0.01, time.monotonic() + WAITING.total_seconds()
    store.set(f"here {rank}", mine)
    while mine not in (begun := found("begun")):
        here = [found(f"here {r}") for r in range(1 if rank else world)]
        if said := next((said for said in here if said.startswith(FAILED)), None):
            raise ValueError(f"another process {said}")
        if rank == 0:
            plan = " ".join(here)
            store.set("plan", plan)
            late = [str(r) for r in range(1, world) if not here[r] or found(f"seen {r}") != plan]
            if not late:
                store.set("begun", plan)
        elif mine in (plan := found("plan")):
            store.set(f"seen {rank}", plan)
        if time.monotonic() > end:
            who = f"of its {world} processes" if rank else f"for process {', '.join(late)}"
            raise ValueError(
                f"process {rank} waited {WAITING} {who}: is torchrun running on every node?"
            )
        with signals.at_once("while it waited for the other processes"):
            time.sleep(pause)
        pause = min(1.0, 1.2 * pause)
    return begun.split()[0]


def announce(message):
    """Tell the other processes why this one ends, so that they can say it; the first one counts."""
    with contextlib.suppress(RuntimeError):  # the store may have ended
        if stores:
            stores[0].compare_set(FAILED, "", f"process {os.environ['RANK']}: {message}")
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # they may wait in `meet`
            store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
            store.set(f"here {rank}", f"{FAILED}: process {rank}: {message}")


def failure_elsewhere(error):
    """Why another process ended, if that made a collective operation here raise `error`.

    None if the error is of this process.
    """
    if not stores or "/gloo/" not in str(error):
        return None
    with contextlib.suppress(RuntimeError):
        if stores[0].check([FAILED]):
            return f"another process failed: {stores[0].get(FAILED).decode()}"
    return "another process died; torchrun says how"


def computes_in_bf16(device):
    """Whether a device needs no emulation: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision(amp, device):
    """(autocast context factory, GradScaler) for --amp; both do nothing where they are not needed.

    auto is bf16 where the device computes in it, else off.
    """
    if amp == "auto":
        amp = "bf16" if computes_in_bf16(device) else "off"
    dtype = {"off": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=amp != "off"), scaler


def rank_batch(batch_size, accumulate, world):
    """Images per process and step, of the global batch --batch-size.

    Raises ValueError if the batch does not divide into processes and accumulation passes.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"batch size {batch_size} does not divide into {world} processes x {accumulate} "
            "accumulation passes"
        )
    return batch_size // world


def compiled(part, device):
    """torch.compile(part).

    On CPUs a tensor that several operations read is stored: the compiler would otherwise look up
    the shared relative bias again in every block.
    """
    return torch.compile(
        part, options={"realize_reads_threshold": 1} if device.type == "cpu" else None
    )


def wrap(model, process, compile_model):
    """The model as the loop calls it: compiled and in DistributedDataParallel as needed."""
    wrapped = compiled(model, process.device) if compile_model else model
    if dist.is_initialized():
        ids = [process.device.index] if process.device.type == "cuda" else None
        # Buffers are statistics of the global batch, so all processes have the same already.
        wrapped = DistributedDataParallel(
            wrapped, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    return wrapped


def of_first(value):
    """The first process's value, a small object, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_sum(tensor):
    """Sum over all processes, in place; with one process the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    """Mean over all processes, in place; with one process the tensor itself."""
    return all_sum(tensor).div_(dist.get_world_size()) if dist.is_initialized() else tensor


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, for use in a loss: gradients are summed too."""

    @staticmethod
    def forward(context, values):
        return all_sum(values.clone())

    @staticmethod
    def backward(context, gradient):
        return all_sum(gradient.clone())


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation without scale and shift, over the batches of all processes together.

    torch's SyncBatchNorm does this on GPUs only.
    """

    def __init__(self, channels):
        super().__init__(channels, affine=False)

    def forward(self, x):
        """(B, C, h, w) -> the same, each channel with mean 0 and variance 1."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)

        def mean_over_all(values):
            return SumOverProcesses.apply(values.mean((0, 2, 3))) / dist.get_world_size()

        mean = mean_over_all(x)
        centred = x - mean[:, None, None]
        variance = mean_over_all(centred.square())
        with torch.no_grad():
            n = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt()[:, None, None]

"""--benchmark: where the time of a training step goes, measured from outside the loop by hooks."""

import collections
import itertools
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from plumbing.log import duration


def matmul_rate(device, autocast, repeats=9):
    """FLOP/s of large matrix products in autocast's precision: the median of `repeats`."""
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
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Bytes: the peak of all tensors on a GPU; on a CPU the peak of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the program that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Times the parts of a step: data, tokenizer, forward with loss, backward, optimiser.

    Without --benchmark (steps=None) it passes on the loader's batches and does nothing else.
    PHASES: first the same batch in memory again and again, then new ones from the loader.
    """

    PHASES, WARM_UP = ("data in memory", "real data"), 3

    def __init__(self, steps, process):
        self.steps, self.process = steps, process
        self.seconds = {phase: [] for phase in self.PHASES}  # of each step: {part: seconds}
        self.part, self.since, self.record = "data", 0.0, collections.defaultdict(float)
        self.flop = 0

    def watch(self, model, optimizer, first_layer=None):
        """Register hooks: a timed part starts when the model, tokenizer or optimiser is called.

        first_layer: the tokenizer's; its tokens() does not call the encoder's forward. Data is all
        the rest: loader, crops, masks, noise.
        """
        if not self.steps:
            return
        if first_layer is not None:
            first_layer.register_forward_pre_hook(lambda *_: self.begin("tokenizer"))
        model.register_forward_pre_hook(lambda *_: self.begin("forward"))

        def hook_gradient(module, inputs, output):
            # The gradient reaches the output when the loss's own backward is done.
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda gradient: self.begin("backward"))

        model.register_forward_hook(hook_gradient)
        optimizer.register_step_pre_hook(lambda *_: self.begin("optimiser"))
        optimizer.register_step_post_hook(lambda *_: self.begin("data"))

    def begin(self, part):
        """The running part ends here and `part` begins; times of one part in a step add up."""
        synchronise(self.process.device)
        now = time.perf_counter()
        self.record[self.part] += now - self.since
        self.part, self.since = part, now

    def batches(self, loader):
        """The batches to train on: with --benchmark WARM_UP times the first, then `steps` a phase.

        Raises ValueError if the run has fewer batches than that.
        """
        if not self.steps:
            yield from loader
            return
        ahead = 2 * loader.num_workers  # batches that loader processes prepare in advance
        if len(loader) < (least := 1 + ahead + self.steps):
            raise ValueError(
                f"--benchmark {self.steps} needs a run of {least} steps, and this has "
                f"{len(loader)}: lower it, or lengthen the run"
            )
        loader = iter(loader)
        first = next(loader)
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            yield first
        self.flop = counter.get_total_flops()
        yield from itertools.repeat(first, self.WARM_UP - 1)
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)
        new = itertools.islice(loader, ahead, None)
        for phase, source in zip(self.PHASES, (itertools.repeat(first), new)):
            for _ in range(self.steps):
                self.begin("data")
                self.record = collections.defaultdict(float)
                yield next(source)
                self.begin("data")
                self.seconds[phase].append(self.record)

    def report(self, images, total):
        """Print images/s, milliseconds by part, share of the matrix-product rate, peak memory.

        The last line says how long the whole run takes, with its data but without evaluations.
        images: per step, of all processes; total: the run's steps.
        """
        process = self.process
        memory = peak_memory(process.device) / 2**30
        rate = matmul_rate(process.device, process.autocast)
        if process.rank:
            return
        print(f"{process.world} x {self.machine()}, {images} images per step")
        print(f"means of {self.steps} steps after {self.WARM_UP}, in milliseconds")
        for phase, steps in self.seconds.items():
            step = statistics.mean(sum(record.values()) for record in steps)
            parts = (f"{p} {1e3 * statistics.mean(r[p] for r in steps):.1f}" for p in steps[0])
            print(f"{phase}: {images / step:.1f} images/s, step {1e3 * step:.1f}: "
                  f"{', '.join(parts)}")  # fmt: skip
            speed = self.flop / step
            print(f"    {speed / 1e9:.0f} GFLOP/s, {speed / rate:.0%} of the {rate / 1e9:.0f} "
                  "GFLOP/s of large matrix products")  # fmt: skip
        print(f"peak memory {memory:.2f} GiB in each process")
        world = f"{process.world} process{'es' if process.world > 1 else ''}"
        print(f"this run: {total:,} steps, about {duration(total * step)} on {world}")

    def machine(self):
        """Device and precision: 'CPU with 2 threads, bfloat16'."""
        kind = self.process.device.type
        with self.process.autocast():
            on = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if on else torch.float32
        cpu = kind == "cpu"
        count = torch.get_num_threads()
        threads = f"CPU with {count} thread{'s' if count > 1 else ''}"
        where = threads if cpu else torch.cuda.get_device_name()
        return f"{where}, {str(dtype).removeprefix('torch.')}"

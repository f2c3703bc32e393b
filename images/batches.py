"""Batches: which samples each process gets at each step, and the ranges of their pixels."""

import os
import signal
import threading
import traceback

import torch
from torch.utils.data import DataLoader, Sampler

from images import sources
from plumbing import signals

NORMALISE = {  # mean and std of R, G, B
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
AHEAD = 4  # loader processes that crop arrays for a GPU: `photos` on an H100 waits without them


def steps_per_epoch(size, batch_size):
    """Number of whole global batches in an epoch of `size` images.

    Raises ValueError if there is not even one.
    """
    if size < batch_size:
        raise ValueError(
            f"{size} training images are fewer than the batch size {batch_size}: lower --batch-size"
        )
    return size // batch_size


class StepBatches(Sampler):
    """This process's keys (epoch, index) for each step in range(first, last).

    Each epoch is shuffled by seed + epoch and cut into global batches; an incomplete last one is
    dropped. Each process takes a contiguous part of a global batch, `batch` keys. So a step has the
    same samples in the same places for any number of processes, wherever the run was resumed.
    """

    def __init__(self, size, batch, rank, world, seed, first, last):
        self.steps_per_epoch = steps_per_epoch(size, batch * world)
        self.batch, self.start, self.stride = batch, batch * rank, batch * world
        self.size, self.seed, self.first, self.last = size, seed, first, last

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        step = self.first
        while step < self.last:
            epoch, within = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            for b in range(within, min(self.steps_per_epoch, within + self.last - step)):
                start = b * self.stride + self.start
                yield [(epoch, index) for index in order[start : start + self.batch]]
                step += 1


def train_batches(dataset, run):
    """A loader of this process's batches for the steps that a plumbing.run.Run still has to do."""
    args, process = run.args, run.process
    sampler = StepBatches(
        len(dataset), run.batch_size, process.rank, process.world, args.seed, run.first, run.total
    )
    pin_memory = process.device.type == "cuda"
    return loader(dataset, sampler, args.workers, pin_memory)


def spread(total, limit):
    """min(total, limit) indices below `total`, increasing and spread evenly."""
    return range(total) if limit >= total else [i * total // limit for i in range(limit)]


def eval_batches(dataset, args, process):
    """Yield this process's share of --eval-images samples, each once and in order.

    The samples are spread evenly over the set, because its first may all be of one class. Batches
    are as large as an accumulation pass, or one image each if images differ in size. The epoch in
    their keys is -1. Raises Stopped if a signal came; with several processes, which wait for each
    other's sums, evaluation finishes first.
    """
    batch = max(1, args.batch_size // process.world // args.accumulate) if dataset.one_size else 1
    indices = spread(len(dataset), args.eval_images)[process.rank :: process.world]
    keys = [(-1, index) for index in indices]
    parts = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    for loaded in loader(dataset, parts, args.workers):
        if signals.received and process.world == 1:
            raise signals.Stopped("stopped by a signal during evaluation, which changes nothing")
        yield loaded


def loader(dataset, keys, workers, pin_memory=False):
    """A DataLoader for a dataset whose __getitem__ makes a whole batch from a list of keys.

    workers: number of loader processes; None: this process's share of the cores if `dataset.source`
    decodes image files; for arrays none or, if pin_memory says that they go to a GPU, up to AHEAD,
    since one alone is slower than none. The batches do not depend on it.
    """
    if workers is None:
        workers = share_of_cores()
        if not isinstance(dataset.source, sources.Files):
            workers = min(workers, AHEAD) if pin_memory and workers > 1 else 0
    return Loader(
        dataset,
        batch_size=None,  # a "sample" of its sampler is a whole batch
        sampler=keys,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )


class Loader(DataLoader):
    """A DataLoader that raises ValueError in its loop if one of its processes was killed.

    torch's handler of SIGCHLD raises RuntimeError wherever the program is, even in a save, so it
    is removed. Without it, the loop notices within five seconds: torch checks on its processes,
    or the pixels cannot be fetched from the one that was killed.
    """

    def __iter__(self):
        made = None
        try:
            made = super().__iter__()
            in_main = threading.current_thread() is threading.main_thread()
            if self.num_workers and in_main and hasattr(signal, "SIGCHLD"):  # not on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from made
        except Exception as error:
            if not self.num_workers:
                raise
            signals.kill_children()
            # The error's frames hold torch's iterator. The garbage collector might close its pipes
            # first, and the iterator would then close them a second time: free it now.
            traceback.clear_frames(error.__traceback__)
            made = None
            if not lost_a_process(error):
                raise
            raise ValueError(
                "a loader process was killed, perhaps because the memory was full: "
                "use fewer --workers, or in a conversion fewer cores (taskset -c 0 python ...)"
            ) from error


def lost_a_process(error):
    """Does an error in the loop of a DataLoader mean that one of its processes has died?"""
    if "in DataLoader worker process" in str(error):  # the dataset raised it there
        return False
    fetching = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
    return fetching or isinstance(error, RuntimeError) and "exited unexpectedly" in str(error)


def share_of_cores():
    """CPU cores for each of torchrun's processes on this machine, at least 1."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on Windows and macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def ignore_signals(worker):
    """Make a loader process ignore SIGTERM and SIGINT.

    Both may be sent to the whole process group, but only the main process should act on them: it
    still needs the batches of its loader to finish its step.
    """
    signals.ignore()


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [0, 1] on the device, the range that the tokenizer takes."""
    return images.to(device, non_blocking=True).float().div_(255)


def standardise(images, normalise):
    """Images (B, 3, H, W) in [0, 1] -> (images - mean) / std, the range that the backbone takes.

    normalise: a key of NORMALISE.
    """
    mean, std = mean_and_std(normalise, images.device)
    return (images - mean) / std


def unstandardise(images, normalise):
    """The inverse of standardise."""
    mean, std = mean_and_std(normalise, images.device)
    return images * std + mean


def mean_and_std(normalise, device):
    """The mean and std named by `normalise`, each (3, 1, 1)."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in NORMALISE[normalise]]

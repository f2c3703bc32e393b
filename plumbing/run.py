"""One training run around its loop: everything about it that is the same in the four scripts.

It opens --out, resumes, saves, logs, evaluates and stops. It is not a trainer: each script's loop,
`for step, batch in run.steps(...)`, contains the forward pass, the loss and the optimiser's step.
"""

import contextlib
import math
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing import checkpoints, entries, outputs, pictures, processes, signals
from plumbing.clock import Clock
from plumbing.log import Estimate, Log, note

FEW = 20  # images to evaluate on


class Run:
    """A run of `steps` steps. Constructing it opens --out, then resumes or saves step 0.

    args: the command line; kind: the checkpoints' kind; model, optimizer: as they are saved;
    extra: further entries of a checkpoint, {name: value}; modules are saved as state dicts.
    train_set, held_out: the data sets. The first must not change between a run and its --resume.
    Raises ValueError if the batch does not divide, if --out is in use or not empty, or if --resume
    finds no whole checkpoint, other settings or other data.
    """

    def __init__(self, args, kind, process, model, optimizer, steps, extra, train_set, held_out):
        self.batch_size = processes.rank_batch(args.batch_size, args.accumulate, process.world)
        self.args, self.kind, self.process, self.total = args, kind, process, steps
        self.saved = model, optimizer, process.scaler
        self.extra = {**extra, "data": train_set.fingerprint()}
        if digest := checkpoints.init_digest(args):
            self.extra["init"] = digest
        self.held_out, self.warn = held_out, None
        self.out = checkpoints.open_output(args)
        self.first = 0  # the first step to do
        if args.resume:
            state = checkpoints.resume(self.out, kind, args, *self.saved, self.extra, steps)
            self.first = state["step"]
            if "init" in state:  # also where the file itself is gone
                self.extra["init"] = state["init"]
        else:
            self.save(0)  # an --out that cannot be written to fails now
        self.model = processes.wrap(model, process, args.compile)  # what the loop calls
        self.clock = Clock(args.benchmark, process)
        self.log = Log(self.out, steps, self.first)
        self.latest, self.finite = {}, FiniteSteps(self.out, self.first, steps)
        self.signals = None  # how many signals all processes of torchrun had as this step began

    def save(self, step):
        """Write the checkpoint after `step` steps."""
        if self.process.rank or self.out is None:
            return
        extra = {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in self.extra.items()
        }
        checkpoints.save(self.out, self.kind, self.args, step, *self.saved, extra)

    def steps(self, loader, evaluate, draw=None, warn=None):
        """Yield (step, batch); after each step log, save, stop and evaluate as the flags say.

        evaluate: a function without arguments that returns {name: number}, for segmentation also a
        dict `iou`. draw(OUT) writes pictures. warn(numbers) returns what is wrong with an
        evaluation, or None; said once.
        """
        self.warn = warn
        if not self.args.benchmark:
            self.introduce(loader.dataset)
        estimate = Estimate(0 if self.args.benchmark else self.total - self.first)
        estimate.begin()
        for step, batch in enumerate(self.clock.batches(loader), start=self.first):
            yield step, batch
            estimate.end()
            self.after(step + 1, loader.dataset, evaluate, draw)
            estimate.begin()

    def introduce(self, train_set):
        """Say in two lines what runs where, or that nothing is left to do."""
        args, model, world = self.args, self.saved[0], self.process.world
        if self.first == self.total:
            note(
                f"finished after {self.total} steps: evaluating again; to train further start a "
                f"new run with --init {self.out / checkpoints.CHECKPOINTS[0]}"
            )
            return
        where = "1 process on" if world == 1 else f"{world} processes, each on"
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = f"{count_text(count)} parameters"
        size += f", {count_text(trained)} of them trained" if trained < count else ""
        note(f"{where} {self.clock.machine()}; {size}; {grid_text(model.config, args.image_size)}")
        held_out = len(self.held_out)
        images = f"evaluating on {self.evaluated():,} of {held_out:,}"
        epochs = self.total * args.batch_size / len(train_set)
        steps = f"{self.total:,} steps of {args.batch_size:,} images ({epochs:.3g} epochs)"
        steps += f", {self.first:,} of them done" if self.first else ""
        note(f"training on {len(train_set):,} images, {images}; {steps}")
        if self.evaluated() < FEW:
            note(f"so few images say little in evaluation: use {FEW} or more")

    def evaluated(self):
        """The number of images in each evaluation."""
        return min(len(self.held_out), self.args.eval_images)

    def all_sum(self, count):
        """Sum of a whole number over all processes, a tensor without dimensions.

        The same exchange tells every process whether one of them has received a signal.
        """
        if dist.is_initialized():
            both = torch.stack((count, count.new_full((), len(signals.received))))
            count, self.signals = processes.all_sum(both)
        return count

    def passes(self, *tensors):
        """Yield the tensors in --accumulate parts, one for each pass.

        Gradients stay in their process until the last pass: DDP's all-reduce runs once a step.
        """
        if self.signals is None:  # a script that has nothing to sum
            self.all_sum(torch.zeros((), dtype=torch.int64, device=self.process.device))
        count = self.args.accumulate
        for number, parts in enumerate(zip(*(t.chunk(count) for t in tensors)), start=1):
            local = number < count and dist.is_initialized()
            with self.model.no_sync() if local else contextlib.nullcontext():
                yield parts

    def allows(self, step, norm, lr):
        """True unless the gradient's norm, a tensor, is not finite; see FiniteSteps.allow.

        Here a step waits for its device; copying a batch waits at most for the step before.
        """
        if self.signals is not None:
            self.signals = self.signals.item()
        return self.finite.allow(norm.item(), step, lr)

    def report(self, loss, **values):
        """Set what to log of this step: loss and other numbers; tensors are of this process."""
        self.latest = {"loss": loss, **values}

    def after(self, done, dataset, evaluate, draw):
        """Log, save, stop and evaluate after a step; `done`: steps so far."""
        args = self.args
        if done % args.log_every == 0 or done == self.total:
            tensors = {k: v for k, v in self.latest.items() if torch.is_tensor(v)}
            latest = self.latest | {k: processes.all_mean(v) for k, v in tensors.items()}
            values = {name: float(value) for name, value in latest.items()}
            problems = dataset.problems() | self.finite.problems()
            self.log.step(done, args.batch_size, **values, **problems)
        self.save_or_stop(done)
        if done % args.save_every == 0 and done < self.total:
            values = evaluate()
            self.log.evaluation(done, **values)
            self.show(done, values, draw)

    def show(self, done, values, draw):
        """After an evaluation draw the pictures again; warn once if it is bad.

        A warning waits for the second half; few images, whose tokens differ little, give none.
        """
        enough = 2 * done >= self.total and self.evaluated() >= FEW
        warning = self.warn(values) if self.warn and enough else None
        if warning:
            note(f"warning: {warning}")
            self.warn = None
        if self.process.rank == 0:
            if draw:
                draw(self.out)
            pictures.loss_curve(self.out)

    def save_or_stop(self, done):
        """Save every --save-every steps and after the last; on a signal save now and stop.

        Raises signals.Stopped.
        """
        stop = self.signals if dist.is_initialized() else signals.stop_asked()
        self.signals = None
        if stop or done % self.args.save_every == 0 or done == self.total:
            self.save(done)
        if stop:
            if dist.is_initialized():
                dist.barrier()  # if one process exits early, torchrun kills the one still writing
            then = "" if self.args.benchmark else ": continue with --resume"
            raise signals.Stopped(f"stopped by a signal after step {done} of {self.total}{then}")

    def finish(self, evaluate, draw=None):
        """The final evaluation, the last record of the log, and pictures: draw(OUT)."""
        if self.args.benchmark:
            self.clock.report(self.args.batch_size, self.total)
            return
        values = evaluate()
        self.log.final(**values)
        self.show(self.total, values, draw)


def count_text(count):
    """'86.4 million', or '7,690' below a million."""
    return f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count:,}"


def grid_text(config, image_size):
    """'24 x 24 pixels, 36 patches': of a model with a grid of patches or with a downsampling."""
    cells, name = getattr(config, "grid", None), "patches"
    if cells is None:
        cells, name = image_size // config.downsampling, "tokens"
    return f"{image_size} x {image_size} pixels, {cells**2:,} {name}"


def evaluate_only(args, process, held_out, measure, draw=None):
    """--eval: print the numbers of measure() and draw(OUT) the pictures, if there is an --out.

    Raises ValueError, before anything is measured, if --out is not an empty folder, or given for a
    classifier, which draws no pictures.
    """
    if args.out and not draw:
        raise ValueError(f"--eval draws no pictures of a classifier: leave out --out {args.out}")
    out = Path(args.out) if args.out else None
    if out:  # every process checks, so that all of them stop
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"--out {out} is not an empty folder: choose a new one")
        outputs.check_outside(out, args.data)
        out.mkdir(parents=True, exist_ok=True)
    images = f"{min(len(held_out), args.eval_images):,} of {len(held_out):,} images"
    note(f"evaluating on {images} of {args.data}, {args.image_size} x {args.image_size} pixels")
    Log(None, 0).final(**measure())
    if out and process.rank == 0:
        draw(out)


class FiniteSteps:
    """Skips and counts steps whose gradient is not finite; entries.SKIPPED in a row end the run.

    At the last step fewer are enough: a tenth of the run, and at least two. If only that step is
    left to do, first = last - 1, it must not be skipped.
    """

    def __init__(self, out, first, last):
        self.out, self.skipped, self.in_a_row, self.last = out, 0, 0, last
        self.late = min(entries.SKIPPED, last - first, max(2, last // 10))

    def allow(self, norm, step, lr):
        """norm: of the gradient, the same in all processes. Raises ValueError after many skips."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= (self.late if step == self.last - 1 else entries.SKIPPED):
            good = ""
            if self.out:
                good = f"; {self.out}/{checkpoints.CHECKPOINTS[0]} is the last good checkpoint"
            raise ValueError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, the last of them "
                f"step {step + 1} at learning rate {lr:.3g}: lower --lr{good}"
            )
        return False

    def problems(self):
        """{"skipped_steps": count} for the log; empty if there were none."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

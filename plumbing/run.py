"""One training run around its loop: everything about it that is the same in the four scripts.

It opens --out, resumes, saves, logs, evaluates and stops. It is no trainer: the forward pass, the
loss and the optimisation step stand in each script's `for step, batch in run.steps(...)`.
"""

import math

import torch.distributed as dist

from plumbing import checkpoints, pictures, processes, signals
from plumbing.clock import Clock
from plumbing.log import Log


class Run:
    """A run of `steps` steps. Constructing it opens --out, then resumes or saves step 0.

    args: the command line; kind: of its checkpoints; model, optimizer: as they are saved;
    extra: what else a checkpoint holds, {name: value}, with the state dict of a module in it.
    Raises ValueError if the batch does not divide, if --out is in use or not empty, or if --resume
    finds no whole checkpoint or other settings.
    """

    def __init__(self, args, kind, process, model, optimizer, steps, extra):
        self.batch_size = processes.rank_batch(args.batch_size, args.accumulate, process.world)
        self.args, self.kind, self.process, self.total = args, kind, process, steps
        self.saved, self.extra = (model, optimizer, process.scaler), extra
        self.out = checkpoints.open_output(args, process.rank)
        self.resumed, self.first = None, 0  # the checkpoint that it resumes, the first step to do
        if args.resume:
            self.resumed = checkpoints.resume(self.out, kind, args, *self.saved)
            self.first = self.resumed["step"]
        else:
            self.save(0)  # an --out that cannot be written to fails now
        self.model = processes.wrap(model, process, args.compile)  # what the loop calls
        self.clock = Clock(args.benchmark, process)
        self.log = Log(self.out, process.rank, steps, self.first)
        self.latest, self.finite = {}, FiniteSteps(self.out)

    def save(self, step):
        """Write the checkpoint after `step` steps."""
        if self.process.rank or self.out is None:
            return
        extra = {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in self.extra.items()
        }
        checkpoints.save(self.out, self.kind, self.args, step, *self.saved, extra)

    def steps(self, loader, evaluate):
        """Yield (step, batch); after each step log, save, stop and evaluate as the flags say.

        evaluate: a function without arguments that returns {name: number}.
        """
        for step, batch in enumerate(self.clock.batches(loader), start=self.first):
            yield step, batch
            self.after(step + 1, loader.dataset, evaluate)

    def passes(self, *tensors):
        """processes.passes of the run's model: the tensors in --accumulate parts."""
        return processes.passes(self.model, self.args.accumulate, *tensors)

    def allows(self, step, norm, lr):
        """May the optimiser take this step? Not if the gradient's norm is not finite."""
        return self.finite.allow(norm, step, lr)

    def report(self, loss, **values):
        """What to log of this step: the loss of this process, and any other numbers."""
        self.latest = {"loss": loss, **values}

    def after(self, done, dataset, evaluate):
        """What happens between two steps; `done`: steps so far."""
        args = self.args
        if done % args.log_every == 0 or done == self.total:
            loss = processes.all_mean(self.latest["loss"])
            values = {name: float(v) for name, v in (self.latest | {"loss": loss}).items()}
            problems = dataset.problems() | self.finite.problems()
            self.log.step(done, args.batch_size, **values, **problems)
        self.save_or_stop(done)
        if done % args.save_every == 0 and done < self.total:
            self.log.write(step=done, **evaluate())

    def save_or_stop(self, done):
        """Save every --save-every steps and after the last; on a signal save now and stop.

        Raises signals.Stopped.
        """
        stop = signals.stop_asked(self.process.device)
        if stop or done % self.args.save_every == 0 or done == self.total:
            self.save(done)
        if stop:
            if dist.is_initialized():
                dist.barrier()  # a process that exits earlier would end the one that still writes
            raise signals.Stopped(
                f"stopped by a signal after step {done} of {self.total}: continue with --resume"
            )

    def finish(self, evaluate, draw=None):
        """The final evaluation, the last record of the log, and pictures: draw(OUT)."""
        if self.args.benchmark:
            self.clock.report(self.args.batch_size)
            return
        self.log.final(**evaluate())
        if self.process.rank == 0:
            if draw:
                draw(self.out)
            pictures.loss_curve(self.out)


class FiniteSteps:
    """Skips and counts steps whose gradient is not finite; LIMIT in a row end the run."""

    LIMIT = 10  # fp16's loss scale may need a few at the start

    def __init__(self, out):
        self.out, self.skipped, self.in_a_row = out, 0, 0

    def allow(self, norm, step, lr):
        """norm: of the gradient, the same in all processes. Raises ValueError after LIMIT skips."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == self.LIMIT:
            raise ValueError(
                f"the gradient was not finite in {self.LIMIT} steps in a row, the last one step "
                f"{step} at learning rate {lr:.3g}: lower --lr; {checkpoints.CHECKPOINTS[0]} in "
                f"{self.out} is the last good checkpoint"
            )
        return False

    def problems(self):
        """{"skipped_steps": count} for the log; empty if there were none."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

"""Schedules: pure functions of the step, and the number of steps."""

import math


def cosine(step, steps, start, end):
    """From `start` at step 0 to `end` at `steps`, along half a cosine; `end` after that."""
    share = min(step / steps, 1) if steps > 0 else 1
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def ramp(step, steps, end):
    """Linear from 0 at step 0 to `end` at `steps`; `end` after that."""
    return end * min(step / steps, 1) if steps > 0 else end


def warmup_cosine(step, steps, warmup, peak, final):
    """Learning rate: linear to `peak` in `warmup` steps, then half a cosine to `final`.

    Step 0 has peak / warmup; the authors' warm-up starts at 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, final)


def warmup_linear(step, steps, warmup, peak, from_start=False):
    """Learning rate: linear warm-up, and a linear decay from `peak` to 0 at `steps`.

    The decay counts from the end of the warm-up, or from step 0, which is how the authors' code
    does it for segmentation: there warm-up is a factor on the decaying rate.
    """
    first = 0 if from_start else warmup
    lr = peak * max(steps - step, 0) / (steps - first) if step >= first else peak
    return lr * (step + 1) / warmup if step < warmup else lr


def set_lr(optimizer, lr):
    """Give every parameter group its layer's share of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def step_counts(args, steps_per_epoch):
    """(steps, warm-up steps) of --epochs and --warmup-epochs.

    Raises ValueError if warm-up leaves no step after it.
    """
    steps = round(args.epochs * steps_per_epoch)
    warmup = round(args.warmup_epochs * steps_per_epoch)
    if steps < 1 or warmup >= steps:
        raise ValueError(
            f"--epochs {args.epochs} gives {steps} steps, of which --warmup-epochs "
            f"{args.warmup_epochs} takes {warmup}: raise the first or lower the second"
        )
    return steps, warmup

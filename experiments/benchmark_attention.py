"""Ways to compute the attention of `base` with its learned relative bias: time, memory, error.

    python -m experiments.benchmark --attention                   # 8 images per step
    python -m experiments.benchmark --attention --images 64       # on a GPU

The attentions of all blocks share one bias table, as in pre-training. Each way has the same q, k, v
and makes one step in turn. Plain products and SDPA are beit.py's own code.
"""

import itertools
import statistics
import time
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import beit
from experiments.machine import default_precision
from plumbing import clock, processes

WARM_UP = 2  # steps of each before those that count
COLUMNS = ("forward + backward", "forward", "memory", "value", "q, k, v", "bias table")


class Inputs(NamedTuple):
    """What every way gets."""

    layers: list  # for each block q, k and v as Linear lays them out, (B, N+1, 3, heads, D/heads)
    table: torch.Tensor  # of the relative bias, float32 (rows, heads)
    index: torch.Tensor  # its row for each pair, int64 (N+1, N+1)
    gradients: list  # with respect to each block's result, (B, N+1, D)


def inputs(config, images, device, dtype):
    """Random Inputs of a BeitConfig; table, q, k and v want gradients."""
    index, heads = beit.relative_position_index(config.grid).to(device), config.heads
    size, like = (images, len(index)), {"device": device, "dtype": dtype}
    layers = [
        torch.randn(*size, 3, heads, config.dim // heads, **like).requires_grad_()
        for _ in range(config.depth)
    ]
    table = torch.randn(beit.relative_table(config).shape, device=device).requires_grad_()
    return Inputs(layers, table, index, [torch.randn(*size, config.dim, **like) for _ in layers])


def without_gradients(data):
    """The same Inputs, which want no gradients."""
    layers = [x.detach() for x in data.layers]
    return data._replace(layers=layers, table=data.table.detach())


# -------------------------------------------------------- the ways


class Attention(beit.Attention):
    """beit.py's attention of given projections: attend(x (B, N+1, 3, heads, D/heads), bias)."""

    def __init__(self):
        nn.Module.__init__(self)

    def project(self, x):
        """-> q, k, v, each (B, heads, N+1, D/heads), with beit.py's layout in memory."""
        return x.permute(2, 0, 3, 1, 4).unbind(0)


def with_bias(attend, sdpa_on):
    """A way that looks up the bias once; sdpa_on: in place of beit.SDPA_ON."""

    def way(layers, table, index):
        bias = beit.relative_bias(table, index)
        with mock.patch.object(beit, "SDPA_ON", sdpa_on):
            return [attend(x, bias) for x in layers]

    return way


def with_table(flex, project):
    """A way that looks up the bias in FlexAttention's kernel, once for each pair and block."""

    def way(layers, table, index):
        def score_mod(score, image, head, row, column):
            return score + table[index[row, column], head]

        found = [flex(*project(x), score_mod=score_mod) for x in layers]
        return [out.transpose(1, 2).flatten(2) for out in found]

    return way


def ways(device):
    """({name: way}, names of the compiled ones).

    A way is a function (layers, table, index) -> results of the blocks, each (B, N+1, D).
    """
    attention = Attention()
    flex = torch.compile(flex_attention, dynamic=False)
    plain = {
        "plain products": with_bias(attention.attend, ()),
        "SDPA, the bias as its mask": with_bias(attention.attend, (device.type,)),
    }
    compiled = {
        "plain products, compiled": with_bias(processes.compiled(attention.attend, device), ()),
        "FlexAttention, compiled": with_table(flex, attention.project),
    }
    return plain | compiled, compiled.keys()


# -------------------------------------------------------- one step


class Step(NamedTuple):
    """One step of a way."""

    forward: float  # seconds
    both: float  # seconds of forward and backward
    memory: int  # bytes on a GPU beyond the inputs, at the peak; 0 on a CPU
    results: tuple  # lists of tensors: values; gradients of q, k and v; gradient of the table


def step(way, data, autocast):
    """Make one Step of a way; without backward where the Inputs want no gradients."""
    device, backward = data.table.device, data.table.requires_grad
    for tensor in (*data.layers, data.table):
        tensor.grad = None
    if cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    clock.synchronise(device)
    start = time.perf_counter()
    with autocast():
        out = way(data.layers, data.table, data.index)
    clock.synchronise(device)
    forward = time.perf_counter() - start
    if backward:
        torch.autograd.backward(out, data.gradients)
    clock.synchronise(device)
    both = time.perf_counter() - start
    memory = clock.peak_memory(device) - before if cuda else 0
    results = [x.detach() for x in out], [x.grad for x in data.layers], [data.table.grad]
    return Step(forward, both, memory, results if backward else results[:1])


def exact(data):
    """A Step's results in float64, by the plain products; block by block, to save memory."""
    table, out, layers = data.table.detach().double().requires_grad_(), [], []
    attend = with_bias(Attention().attend, ())
    for x, gradient in zip(data.layers, data.gradients, strict=True):
        layers.append(x.detach().double().requires_grad_())
        out += attend(layers[-1:], table, data.index)
        out[-1].backward(gradient.double())
        out[-1] = out[-1].detach()
    return out, [x.grad for x in layers], [table.grad]


def errors(found, expected):
    """For each list of tensors the largest |difference|, over the largest |value| of its tensor."""
    return [
        max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*pair, strict=True))
        for pair in zip(found, expected)
    ]


def refusal(call):
    """None if call() succeeds, else what torch says, in one line.

    Only for calls into torch's compiler, which raises many kinds of exceptions.
    """
    try:
        call()
    except Exception as error:
        return str(error).strip().partition("\n")[0][:200] or repr(error)
    return None


# -------------------------------------------------------- the comparison


def possible(device, data, autocast):
    """Try the compiled ways; print what torch refuses.

    Returns {name: arguments for `step`}, which want no gradients where only those are refused.
    """
    found, compiled = ways(device)
    found = {name: (way, data, autocast) for name, way in found.items()}
    for name in compiled:
        if said := refusal(lambda: step(*found[name])):
            forward = found[name][0], without_gradients(data), autocast
            if fails := refusal(lambda: step(*forward)):
                del found[name]
                print(f"  {name}: left out, torch says: {fails}")
            else:
                found[name] = forward
                print(f"  {name}: forward only, torch says: {said}")
    return found


def row(steps, wrong):
    """A way's cells under COLUMNS, from its Steps and its results' errors."""
    forward = 1e3 * statistics.median(step.forward for step in steps)
    both = 1e3 * statistics.median(step.both for step in steps)
    memory = max(step.memory for step in steps)
    return [
        f"{both:.1f} ms" if len(wrong) > 1 else "",
        f"{forward:.1f} ms",
        f"{memory / 2**30:.2f} GiB" if memory else "",
        *(f"{value:.1e}" for value in wrong),
    ]


def compare(config, images, device, repeats):
    """Print a row for each way, in the precision that --amp auto picks."""
    amp, _ = default_precision(device)
    autocast, _ = processes.precision("auto", device)
    data = inputs(config, images, device, {"bf16": torch.bfloat16, "float32": torch.float32}[amp])
    N, heads = config.grid**2, config.heads
    print(f"\nattention of {config.depth} blocks, {N + 1} tokens, {heads} heads of "
          f"{config.dim // heads}, {amp}; errors: largest difference from float64 over largest "
          "value, of values and of gradients")  # fmt: skip
    calls, expected = possible(device, data, autocast), exact(data)
    wrong = {name: errors(step(*call).results, expected) for name, call in calls.items()}
    del expected
    steps = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(WARM_UP + repeats), calls.items()):
        steps[name].append(step(*call)._replace(results=()))  # in turn; results are large
    rows = {"": COLUMNS} | {name: row(steps[name][WARM_UP:], wrong[name]) for name in calls}
    for name, cells in rows.items():
        padded = (f"{cell:>{max(len(column), 9)}s}" for cell, column in zip(cells, COLUMNS))
        print("  ".join([f"  {name:26s}", *padded]), flush=True)

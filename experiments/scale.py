"""What a run of `base` and `large` costs on 1 to 512 GPUs: the tables of docs/scale.md.

    python -m experiments.scale                print them
    python -m experiments.scale --document     write them into docs/scale.md

Everything is computed from experiments/costs.py and from the numbers in ASSUMED; nothing is run.
`python -m experiments.scale_check` measures on a CPU what can be measured there.
"""

import functools
import math
import re

from experiments import HERE, costs, tables
from plumbing import command_line, schedules

IMAGES = 1_281_167  # of ImageNet-1K
GPUS, LARGER, NODE = (1, 8, 16, 64), (64, 512), 8  # NODE: GPUs that share a machine
H100, A100, SHARE = 989e12, 312e12, 0.19  # FLOP/s in bf16 without sparsity; share of it
CARD, ROOM = 80e9, 72e9  # bytes of a GPU; those that tensors may take
NVLINK, ETHERNET = 450e9, 12.5e9  # bytes/s in each direction: of a GPU, of a node
LOADED = {"tokenizer": 540, "pretraining": 205, "classification": 330, "segmentation": 22}
JPEG = 110e3  # bytes
ASSUMED = [
    ["H100 SXM, bf16 matrix products", f"{H100 / 1e12:.0f} TFLOP/s", "published"],
    ["A100 SXM, bf16 matrix products", f"{A100 / 1e12:.0f} TFLOP/s", "published"],
    ["share of that in a step of pre-training", f"{100 * SHARE:.0f} %", "measured: base, H100"],
    ["memory of a GPU", f"{CARD / 1e9:.0f} GB", "published"],
    ["what tensors may take of it", f"{ROOM / 1e9:.0f} GB", "assumed"],
    ["NVLink of an H100, in each direction", f"{NVLINK / 1e9:.0f} GB/s", "published"],
    [f"Ethernet of a node of {NODE} GPUs", f"100 Gb/s = {ETHERNET / 1e9} GB/s", "assumed"],
    ["training images of ImageNet-1K", f"{IMAGES:,}", "published"],
    ["size of one of its files", f"{JPEG / 1e3:.0f} kB", "assumed"],
    *([f"images/s of a loader process, {stage}", f"{rate}", "measured"]
      for stage, rate in LOADED.items()),
]  # fmt: skip


@functools.cache
def all_costs():
    """{row's name: what costs.cost returns, with "stage", "batch" and "steps"}."""
    found = {}
    for recipe in ("base", "large"):
        for stage in costs.STAGES:
            if (stage, recipe) == ("tokenizer", "large"):
                continue  # the same as base's
            args = costs.settings(stage, recipe)
            steps = getattr(args, "steps", None)
            steps = steps or schedules.step_counts(args, IMAGES // args.batch_size)[0]
            name = stage if stage == "tokenizer" else f"{stage}, {recipe}"
            found[name] = {"stage": stage, "batch": args.batch_size, "steps": steps}
            found[name] |= costs.cost(stage, recipe)
    return found


def percent(part, whole):
    """'12 %'; empty for nothing."""
    return f"{100 * part / whole:.0f} %" if part else ""


def operations_table():
    """Operations and memory of each stage, whatever the number of GPUs."""
    columns = ["", "million parameters", "GFLOP per image", "frozen tokenizer's share",
               "more with `--recompute`", "weights, GB", "gradients, GB", "AdamW, GB",
               "activations per image, MB", "with `--recompute`, MB"]  # fmt: skip
    rows = []
    for name, cost in all_costs().items():
        held, flop = cost["held"], cost["flop"]
        shares = [percent(cost[part], flop) for part in ("tokenizer", "again")]
        parts = [f"{held[part] / 1e9:.2f}" for part in ("weights", "gradients", "moments")]
        kept = (cost["plain"], cost["recompute"])
        kept = ["" if bytes_ is None else f"{bytes_[0] / 1e6:,.0f}" for bytes_ in kept]
        count = f"{held['gradients'] / 4e6:.1f}"
        rows.append([name, count, f"{flop / 1e9:,.0f}", *shares, *parts, *kept])
    return {"columns": columns, "rows": rows}


def fit(cost, kind, gpus):
    """'57 GB in 4 passes': the fewest passes, a power of 2, whose peak is within ROOM."""
    if cost["batch"] % gpus:
        return "does not divide"
    images = cost["batch"] // gpus
    for passes in (2**k for k in range(images.bit_length())):
        most = costs.peak(cost["held"], images / passes, cost[kind], gpus > 1 or passes > 1)
        if images % passes == 0 and most <= ROOM:
            return f"{most / 1e9:.0f} GB" + (f" in {passes} passes" if passes > 1 else "")
    return "does not fit"


def memory_table():
    """Memory of each GPU, with the passes of --accumulate that it needs."""
    columns = ["", "images per step", "1 GPU", *(f"{gpus} GPUs" for gpus in GPUS[1:])]
    rows = []
    for name, cost in all_costs().items():
        for kind, flag in (("plain", ""), ("recompute", ", `--recompute`")):
            if cost[kind] is not None:
                cells = [fit(cost, kind, gpus) for gpus in GPUS]
                rows.append([name + flag, f"{cost['batch']:,}", *cells])
    return {"columns": columns, "rows": rows}


def step(cost, gpus):
    """Of a step on H100s: seconds, bytes that each GPU sends (ring all-reduce), images/s."""
    seconds = cost["flop"] * cost["batch"] / gpus / (SHARE * H100)
    return seconds, 2 * (gpus - 1) / gpus * cost["held"]["gradients"], cost["batch"] / seconds


def time_table():
    """Time, traffic, loading and hours of each stage on each number of GPUs."""
    columns = ["", "GPUs", "step, ms", "sent by each, GB", "over NVLink", "over 100 Gb/s",
               "images/s", "loader processes", "hours", "with traffic", "on A100s"]  # fmt: skip
    rows = []
    for name, cost in all_costs().items():
        for gpus in (gpus for gpus in GPUS if cost["batch"] % gpus == 0):
            seconds, sent, rate = step(cost, gpus)
            links = [sent / NVLINK, sent / ETHERNET]
            traffic = [f"{1e3 * t:.1f} ms, {percent(t, t + seconds)}" if t else "" for t in links]
            each = seconds, seconds + links[gpus > NODE], seconds * H100 / A100
            hours = [cost["steps"] * s / 3600 for s in each]
            processes = math.ceil(rate / LOADED[cost["stage"]])
            rows.append([name, gpus, f"{1e3 * seconds:,.1f}", f"{sent / 1e9:.2f}", *traffic,
                         f"{rate:,.0f}", f"{processes:,}", *(f"{h:,.1f}" for h in hours)])
    return {"columns": columns, "rows": rows}  # fmt: skip


def limits_table():
    """What a step on 64 GPUs, and on 64 nodes, demands of everything but the GPUs."""
    columns = ["", "GPUs", "images of each", "step, ms", "traffic, ms", "loader processes per node",
               "files read, GB/s", "checkpoint, GB"]  # fmt: skip
    rows = []
    for name, cost in all_costs().items():
        for gpus in (gpus for gpus in LARGER if cost["batch"] % gpus == 0):
            seconds, sent, rate = step(cost, gpus)
            processes = math.ceil(rate / LOADED[cost["stage"]] * NODE / gpus)
            rows.append([name, gpus, cost["batch"] // gpus, f"{1e3 * seconds:.1f}",
                         f"{1e3 * sent / ETHERNET:.0f}", f"{processes:,}",
                         f"{rate * JPEG / 1e9:,.0f}", f"{cost['checkpoint'] / 1e9:.1f}"])
    return {"columns": columns, "rows": rows}  # fmt: skip


def fill(text):
    """docs/scale.md with its tables, each between `<!-- NAME -->` and `<!-- end -->`."""
    made = {
        "assumptions": {"columns": ["what", "value", "source"], "rows": ASSUMED},
        "one image": operations_table(),
        "memory of a GPU": memory_table(),
        "time": time_table(),
        "limits": limits_table(),
    }

    def table(match):
        return f"{match[1]}{tables.markdown(made[match[2]])}\n"

    return re.sub(r"(<!-- (?!end)([\w ]+) -->\n).*?(?=<!-- end -->)", table, text, flags=re.DOTALL)


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("--document", action="store_true", help="write docs/scale.md's tables")
    args, document = parser.parse_args(argv), HERE / "docs" / "scale.md"
    made = fill(document.read_text())
    if args.document:
        document.write_text(made)
        return
    print("\n\n".join(re.findall(r"<!-- (?!end)[\w ]+ -->\n(.*?)\n<!-- end -->", made, re.DOTALL)))


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

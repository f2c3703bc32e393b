"""Measure on this CPU what docs/scale.md computes: a step's peak memory, and loaders' rates.

    python -m experiments.scale_check            # 5 minutes on two cores; the rates need Pillow

Each step runs in a process of its own. Memory is its peak minus what was in use before the
model was made; glibc is told to return freed memory at once, so that the peak is that of the
tensors. Rates are images per second of one core's own time, so that other work on the machine does
not count, from JPEG files of 500 x 375 pixels, through the scripts' own data sets.
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import pretrain
from beit import parameter_groups
from experiments import benchmark, costs, tables
from experiments.machine import machine
from experiments.oracles import import_oracle
from images import labelled, masked, sources, views
from plumbing import clock, command_line, processes

STEPS = [  # (stage, recipe, images, precision, recompute)
    ("pretraining", "base", 8, "off", False),
    ("pretraining", "base", 8, "bf16", False),
    ("pretraining", "base", 8, "bf16", True),
    ("classification", "base", 8, "bf16", False),
    ("segmentation", "base", 1, "bf16", False),
    ("tokenizer", "base", 1, "bf16", False),
]
CPU = torch.device("cpu")
IMAGES = 32  # whose loading is timed


def measured(stage, recipe, images, amp, recompute):
    """Bytes that a model and a step add to this process at their peak."""
    autocast, _ = processes.precision(amp, CPU)
    clock.matmul_rate(CPU, autocast, repeats=1)  # the libraries' own memory
    before = clock.peak_memory(CPU)
    model = costs.build(stage, recipe)
    model.recompute = recompute
    groups = model.parameters() if stage == "tokenizer" else parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, fused=True)
    for parameter in model.parameters():  # a step with gradients of 0 makes AdamW's moments
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with autocast():
        loss = costs.loss_of(stage, recipe, model, images)
    loss.backward()
    optimizer.step()
    return clock.peak_memory(CPU) - before


def computed(stage, recipe, images, amp, recompute):
    """The same by costs.py: attention's plain products, as on CPUs, and no other weights."""
    with torch.device("meta"):
        held = costs.fixed(stage, recipe, costs.build(stage, recipe))
    held["weights"] = held["gradients"]  # without a frozen tokenizer or averaged weights
    kept = costs.activations(stage, recipe, gpu=False, amp=amp != "off")
    kept = kept["recompute" if recompute else "plain"]
    return costs.peak(held, images, kept, keeps_gradients=False)


def in_new_process(call, arguments):
    """call(*arguments) in a process that has done nothing else and returns freed memory."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # its C library reads this at start
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def memory():
    """Print a table of STEPS, row by row: computed and measured."""
    print("| step | images | precision | computed, GB | measured, GB | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for step in STEPS:
        found, expected = in_new_process(measured, step), computed(*step)
        stage, recipe, images, amp, recompute = step
        what = f"{stage}, {recipe}" + (", `--recompute`" if recompute else "")
        difference = f"{100 * (expected / found - 1):+.0f} %"
        precision = "float32" if amp == "off" else amp
        print(f"| {what} | {images} | {precision} | {expected / 1e9:.2f} | {found / 1e9:.2f} | "
              f"{difference} |", flush=True)  # fmt: skip


def data_sets(folder, count):
    """{stage: its training set for `base`} of `count` JPEG files in a folder."""
    paths, image = benchmark.jpeg_files(folder, count), import_oracle("PIL.Image")
    masks = [path.with_suffix(".png") for path in paths]
    for path in masks:
        image.fromarray(np.zeros((375, 500), np.uint8)).save(path)
    labels = np.arange(count) % 2
    source = sources.Files("files", paths, labels, masks, ["a", "b"], ["a", "b"])
    args = {stage: costs.settings(stage, "base") for stage in costs.STAGES}
    a = args["tokenizer"]
    two_views = [(224, "bicubic"), (112, "lanczos")]
    return {
        "tokenizer": views.Crops(source, [(256, "bicubic")], True, 0, a.min_crop, a.flip),
        "pretraining": pretrain.MaskedViews(args["pretraining"], source, two_views, 14, True),
        "classification": labelled.LabelledViews(args["classification"], source, 2, True),
        "segmentation": masked.MaskedImages(args["segmentation"], source, 2, "half", True),
    }


def rates():
    """A table of each stage's images per second of one core's time: the fastest of three."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, benchmark.single_thread():
        for stage, data in data_sets(Path(folder), IMAGES).items():
            seconds = []
            for epoch in range(3):
                start = time.process_time()
                data[[(epoch, index) for index in range(IMAGES)]]
                seconds.append(time.process_time() - start)
            rows.append([stage, f"{IMAGES / min(seconds):.0f}"])
    return {"columns": ["stage", "images/s of one core"], "rows": rows}


def main(argv=None):
    command_line.Parser(__doc__).parse_args(argv)
    print(f"{machine()}, torch {torch.__version__}\n\n{tables.markdown(rates())}", flush=True)
    print()
    memory()


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

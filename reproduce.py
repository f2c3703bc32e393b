"""The paper's tables 1, 3 and 4 and figure 2 at small scale, and a summary of the whole paper in one command.

    python reproduce.py                                          # summary: drawn shapes, minutes on two cores
    python reproduce.py --recipe fashion                         # summary: real images, 25 minutes on two cores
    python reproduce.py --recipe fashion --table 1 3 4 --grid14 --figure 2       # hours
    python reproduce.py --readme                                 # fill README.md's tables from results/*.json

Every stage is one of the scripts, run as a reader would run it; its command is in OUT/commands.txt, its output in
OUT/STAGE.log, its checkpoint, numbers and pictures in OUT/STAGE/. STAGE ends in a digest of all its settings and of
those of the stages that it starts from: with --resume a stage is repeated only if one of them has changed.
Learning rates are chosen on the validation split (from the values in RECIPES; where there is one, it was chosen so
before), everything reported is measured on the test split. OUT/results.json holds the tables, each value, each stage's
time and the machine; README.md's copies of it are in results/RECIPE.json.
"""

import collections
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import finetune_seg
import pretrain
import training
import visualize_attention

HERE = Path(__file__).resolve().parent
# glibc hands freed memory back to the system and asks for it again at every step, which costs up to a third of a
# small model's time on CPUs; other C libraries ignore these.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(12 << 30),
    "MALLOC_TOP_PAD_": str(512 << 20),
}
# 75 of 14 x 14 patches masked in blocks of 16 or more, as in the paper; 1.7 times as many patches as `fashion` sees
GRID14 = ("--image-size", 56, "--token-size", 56, "--mask-ratio", 75 / 196, "--min-block", 16)
GRID14 += ("--batch-size", 64, "--epochs", 12.5, "--warmup-epochs", 0.8)
RECIPES = {
    # name: (demo, fashion, help)
    "data": ("shapes", "fashion-mnist", "images to pre-train on and to classify"),
    "scenes": ("shapes", "fashion-scenes", "images with masks, to segment"),
    "seeds": (3, 3, "fine-tuning runs per row, each with labelled images of its own"),
    "labels": ((100,), (100, 10), "labels per class to fine-tune the classifier with"),
    "cls_epochs": ((15.0,), (10.0, 100.0), "passes over them, for equal steps"),
    "cls_batch": (40, 50, "images per step of the classifier"),
    "cls_lr": ((1e-3,), (1e-3, 2e-3), "learning rates to choose from, for pre-trained weights"),
    "cls_lr_random": ((5e-4,), (2.5e-4, 5e-4, 1e-3), "and for random weights"),
    "seg_images": (800, 200, "images with masks to fine-tune the segmenter with"),
    "seg_lr": ((1.6e-2,), (8e-3,), "likewise for segmentation, pre-trained"),
    "seg_lr_random": ((4e-3, 8e-3), (2e-3, 4e-3, 8e-3), "and random"),
    "longer": (0, 4, "random weights also get so many times the steps; 0: not"),
    # the tables only
    "pretraining_seeds": (2, 2, "pre-training runs of BEiT and of pixels, the two contrasts that matter most"),
    "probe_lr": ((4e-3, 1.6e-2), (4e-3, 1.6e-2), "learning rates of the linear probe to choose from"),
    "all_epochs": (3.0, 1.0, "passes over the whole training set, where all labels are used"),
    "all_lr": ((1e-3, 2e-3), (1e-3, 2e-3), "learning rates to choose from there, pre-trained or probe"),
    "all_lr_random": ((5e-4, 1e-3, 2e-3), (5e-4, 1e-3, 2e-3), "and random"),
    "larger": (32, 40, "pixels of the higher resolution"),
    "larger_epochs": (0.1, 0.1, "share of the classifier's epochs spent there"),
    "small_model": ("mini", "mini", "the second model size"),
    "reference_images": (500, 500, "images whose reference patches figure 2 is measured on"),
    # table 4's rows about masking on the paper's own grid, 14 x 14 patches; shapes have no such images
    "grid14_pretrain": (None, GRID14, "flags of pretrain.py, on the scenes"),
    "grid14_segment": (None, ("--image-size", 56, "--batch-size", 16), "flags of finetune_seg.py: whole scenes"),
    "grid14_seg_lr": (None, (4e-3, 8e-3), "learning rates to choose from there"),
    "grid14_seeds": (None, 2, "pre-training runs of each row"),
}
COLUMNS = ("demo", "fashion")


# ---------------------------------------------------------------- stages


class Runner:
    """Runs stages as processes, up to `jobs` side by side, and remembers what they reported.

    While `planning` nothing runs: a stage that is not finished is counted in `missing` and reports zeros.
    """

    def __init__(self, out, recipe, seeds=None, data_dir=None, jobs=1):
        self.out, self.recipe, self.data_dir, self.jobs = Path(out), recipe, data_dir, jobs
        self.settings = {name: row[COLUMNS.index(recipe)] for name, row in RECIPES.items()}
        self.settings["seeds"] = seeds or self.settings["seeds"]
        self.planning, self.planned, self.total = False, set(), 0
        self.missing = collections.Counter()  # {script: stages to run}
        self.seconds = collections.defaultdict(list)  # {script: machine seconds of each stage that ran}
        self.processes, self.stopped, self.lock = [], False, threading.Lock()
        self.start = time.time()

    def plan(self, experiments):
        """Go through the experiments without running anything, to know how much there is to do."""
        self.planning = True
        for experiment in experiments:
            experiment(self)
        self.planning, self.total = False, self.missing.total()

    def stage(self, name, script, *flags, threads=0):
        """The final record and `checkpoint` of `script`, run into OUT/name-digest unless that digest is finished."""
        flags = ["--recipe", self.recipe, *map(str, flags)]
        digest = self.digest(script, flags)
        name = next((path.stem for path in self.out.glob(f"*-{digest}.json")), f"{name}-{digest}")
        done = self.out / f"{name}.json"
        if not done.exists():
            if self.planning:
                self.missing[script] += name not in self.planned
                self.planned.add(name)
                return collections.defaultdict(float, checkpoint=str(self.out / name / "checkpoint.pt"))
            self.run(name, script, flags, threads)
        return json.loads(done.read_text())["result"] | {"checkpoint": str(self.out / name / "checkpoint.pt")}

    def digest(self, script, flags):
        """Eight letters for all settings: the recipe and the flags, which name the stages that it starts from."""
        recipes = importlib.import_module(script.removesuffix(".py")).RECIPES
        column = {name: row[training.COLUMNS.index(self.recipe)] for name, row in recipes.items()}
        text = json.dumps([script, [flag.removeprefix(str(self.out)) for flag in flags], column])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run(self, name, script, flags, threads):
        """Run one stage as a process; write OUT/name.json when it has ended well."""
        folder, log = self.out / name, self.out / f"{name}.log"
        command = [sys.executable, str(HERE / script), *flags, "--out", str(folder)]
        command += ["--data-dir", self.data_dir] if self.data_dir else []
        command += ["--resume"] if any((folder / name).exists() for name in training.CHECKPOINTS) else []
        environment = {**MALLOC, **os.environ} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        with open(self.out / "commands.txt", "a") as file:
            file.write(shlex.join(command[1:]) + "\n")
        started = time.time()
        with open(log, "a") as file, self.lock:
            if self.stopped:
                raise ValueError(f"stage {name} was not begun: another one failed")
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.processes.append(process)
        if status := process.wait():
            tail = log.read_text().strip().splitlines()[-1:]
            raise ValueError(f"stage {name} ended with status {status}: {' '.join(tail)} ({log})")
        seconds = round(time.time() - started, 1)
        record = {k: v for k, v in training.read_metrics(folder)[-1].items() if k != "final"}
        done = {"command": shlex.join([script, *flags]), "seconds": seconds, "resumed": "--resume" in command}
        (self.out / f"{name}.tmp").write_text(json.dumps(done | {"threads": threads, "result": record}) + "\n")
        os.replace(self.out / f"{name}.tmp", self.out / f"{name}.json")
        with self.lock:
            self.seconds[script].append(seconds / (self.jobs if threads else 1))
            self.missing[script] -= 1
        self.report(name, seconds, record)

    def report(self, name, seconds, record):
        """One line for a stage that has ended: which of how many, the time since the start and the time left."""
        elapsed, known = int(time.time() - self.start), {s: statistics.mean(t) for s, t in self.seconds.items()}
        seconds_left = sum(count * known.get(script, 0) for script, count in self.missing.items())
        at_least = "about" if set(+self.missing) <= set(known) else "more than"
        left = f"{at_least} {math.ceil(seconds_left / 60)} min left"
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in record.items())
        count = f"[{self.total - self.missing.total()}/{self.total}]"
        clock = f"{elapsed // 60:3d}m{elapsed % 60:02d}s"
        print(f"{clock} {count}  {left}  {name}  {seconds:.0f} s  {numbers}", flush=True)

    def stages(self, calls):
        """Run independent stages side by side, one thread each: {key: (name, script, *flags)} -> {key: record}."""
        threads = 1 if self.jobs > 1 else 0
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = {key: pool.submit(self.stage, *call, threads=threads) for key, call in calls.items()}
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what the stage raised
            return {key: future.result() for key, future in futures.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def stop(self):
        """Begin no further stage, and ask those that run to save and stop: they go on from there with --resume."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def tokenizer_stage(runner, name="tokenizer", *flags):
    """Stage 1."""
    return runner.stage(name, "train_tokenizer.py", "--data", runner.settings["data"], "--eval-split", "test", *flags)


def beit_call(runner, row, tokenizer, *flags, seed=0, images="data"):
    """Stage 2 for runner.stages: (name, script, *flags). tokenizer: its record, or None with pixels as the target."""
    source = ("--tokenizer", tokenizer["checkpoint"]) if tokenizer else ()
    common = ("--data", runner.settings[images], "--eval-split", "test", "--seed", seed)
    return f"{slug(row)}-{seed}", "pretrain.py", *common, *source, *flags


def slug(text):
    """A row's name as part of a folder's."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def contrast(runner, name, script, metric, rows, flags):
    """Fine-tune every row and measure on the test split: {row: {"lr", "values", "checkpoints"}}.

    rows: {row: (what --init takes, one for each pre-training seed; learning rates to choose from on val, or the row
    whose choice to take; further flags)}. values: one list over the fine-tuning seeds for each pre-training seed.
    """
    rates, calls, searching = {}, {}, ("--seed", 100)
    for row, (inits, lrs, more) in rows.items():
        search = {
            lr: (f"search-{name}-{slug(row)}-{lr:g}", script, "--init", inits[0], *flags, *more, "--lr", lr, *searching)
            for lr in (lrs if len(lrs) > 1 and not isinstance(lrs, str) else ())
        }
        found = runner.stages(search)
        best = max(found, key=lambda lr: found[lr][metric], default=lrs[0])
        rates[row] = rates[lrs] if isinstance(lrs, str) else best
    for row, (inits, _, more) in rows.items():
        for number, init in enumerate(inits):
            for seed in range(runner.settings["seeds"]):
                chosen = ("--lr", rates[row], "--seed", seed, "--eval-split", "test")
                calls[row, number, seed] = (
                    f"{name}-{slug(row)}-{number}-{seed}", script, "--init", init, *flags, *more, *chosen
                )
    records = runner.stages(calls)
    result = {}
    for row, (inits, *_) in rows.items():
        of_row = [[records[row, n, seed] for seed in range(runner.settings["seeds"])] for n in range(len(inits))]
        result[row] = {"lr": rates[row], "values": [[record[metric] for record in run] for run in of_row]}
        result[row]["checkpoints"] = [[record["checkpoint"] for record in run] for run in of_row]
    return result


def classify(runner, labels, rows, prefix=""):
    """contrast() of classifiers with `labels` per class; 0: all."""
    s = runner.settings
    flags = ["--data", s["data"], "--labels-per-class", labels]
    if labels:
        epochs = s["cls_epochs"][s["labels"].index(labels)]
        flags += ["--batch-size", s["cls_batch"]]
    else:
        epochs = s["all_epochs"]
    flags += ["--epochs", epochs, "--warmup-epochs", epochs / 10]
    return contrast(runner, f"{prefix}cls{labels or 'all'}", "finetune_cls.py", "top1", rows, flags)


def segment(runner, rows, prefix=""):
    """contrast() of segmenters."""
    flags = ("--data", runner.settings["scenes"], "--train-images", runner.settings["seg_images"])
    return contrast(runner, f"{prefix}seg", "finetune_seg.py", "miou", rows, flags)


# ---------------------------------------------------------------- baselines without a network


def logistic_regression(train, val, test, penalties=(1e-4, 1e-3, 1e-2, 1e-1)):
    """Test accuracy in percent of multinomial logistic regression on raw pixels; `val` chooses the L2 penalty."""

    def pixels(source):
        x = torch.from_numpy(np.array(source.images)).flatten(1).float() / 255  # grey images: one channel
        return x, torch.from_numpy(source.labels)

    def fit(x, y, penalty):
        weight = torch.zeros(x.shape[1] + 1, len(train.classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight[1:] + weight[0], y) + penalty * weight[1:].pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach()

    def accuracy(weight, x, y):
        return 100 * ((x @ weight[1:] + weight[0]).argmax(1) == y).float().mean().item()

    fits = [fit(*pixels(train), penalty) for penalty in penalties]
    best = max(fits, key=lambda weight: accuracy(weight, *pixels(val)))
    return accuracy(best, *pixels(test))


def raw_pixels(runner, labels):
    """Logistic regression's row for each seed's labelled images; labels 0: all of them, once."""
    if runner.planning:
        return {"values": [[0.0]]}
    splits = {s: data.open_source(runner.settings["data"], s, runner.data_dir) for s in data.SPLITS}
    seeds = range(runner.settings["seeds"]) if labels else (0,)
    subsets = [data.balanced_subset(splits["train"], labels, seed) if labels else splits["train"] for seed in seeds]
    return {"values": [[logistic_regression(subset, splits["val"], splits["test"]) for subset in subsets]]}


def commonest_class(runner):
    """mIoU in percent of always saying the commonest class of a pixel, on the images that segmenters are tested on."""
    if runner.planning:
        return 0.0
    test = data.open_source(runner.settings["scenes"], "test", runner.data_dir)
    count = finetune_seg.RECIPES["eval_images"][training.COLUMNS.index(runner.recipe)]
    masks = torch.from_numpy(np.array(test.masks[:count]))
    classes = len(test.mask_classes)
    commonest = masks[masks != data.IGNORE].flatten().bincount(minlength=classes).argmax()
    return finetune_seg.mean_iou(finetune_seg.confusion_matrix(masks, commonest.expand_as(masks), classes))[0]


# ---------------------------------------------------------------- the experiments: functions of a runner


def summary(runner):
    """The whole paper once: tokenizer, pre-training, and fine-tuning from it against random weights."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    name, *call = beit_call(runner, "BEiT", tokenizer)
    beit = runner.stage(name, *call)
    accuracy, commonest = (f"{100 * beit[name]:.1f} %" for name in ("mim_accuracy", "commonest_token"))
    codes = f"{tokenizer['codebook_used']} codes used, perplexity {tokenizer['codebook_perplexity']:.0f}"
    rows = [
        ["tokenizer", f"reconstruction MSE {tokenizer['reconstruction_mse']:.4f}, {codes}"],
        ["pre-training", f"masked-token accuracy {accuracy} (commonest {commonest}), loss {beit['mim_loss']:.2f}"],
        ["eq. 3, nats per image", f"log p(x|z) {beit['stage1_nats']:.0f}, log p(z|x~) {beit['stage2_nats']:.1f}"],
    ]
    for labels, epochs in zip(s["labels"], s["cls_epochs"]):
        starts = {"BEiT": ([beit["checkpoint"]], s["cls_lr"], ()), "from scratch": scratch(s)}
        if s["longer"]:
            more = ("--layer-decay", 1, "--epochs", epochs * s["longer"])
            starts[f"from scratch, {s['longer']} times the steps"] = (["random"], "from scratch", more)
        found = classify(runner, labels, starts)
        found["logistic regression on raw pixels"] = raw_pixels(runner, labels)
        rows += [[f"top-1, {labels} labels per class, {row}", result(found[row])] for row in found]
    starts = {"BEiT": ([beit["checkpoint"]], s["seg_lr"], ()), "random weights": scratch_segmenter(s)}
    found = segment(runner, starts) | {"commonest class everywhere": commonest_class(runner)}
    rows += [[f"mIoU, {row}", result(value)] for row, value in found.items()]
    return {"title": "Summary", "columns": ["", "result on test images"], "rows": rows}


def scratch(s, lrs="cls_lr_random"):
    """The row of contrast() that trains a classifier from random weights."""
    return ["random"], s[lrs], ("--layer-decay", 1)


def scratch_segmenter(s):
    """The same for a segmenter; 0.75 did better than 0.5 and 1 on the drawn shapes."""
    return ["random"], s["seg_lr_random"], ("--layer-decay", 0.75)


def table1(runner):
    """Table 1: top-1 from scratch and from BEiT, at a higher resolution, of two sizes; and the linear probe."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    small = ("--model", s["small_model"])
    calls = {n: beit_call(runner, "BEiT", tokenizer, seed=n) for n in range(s["pretraining_seeds"])}
    calls["small"] = beit_call(runner, f"BEiT {s['small_model']}", tokenizer, *small)
    records = runner.stages(calls)
    tiny, mini = [records[n]["checkpoint"] for n in range(s["pretraining_seeds"])], [records["small"]["checkpoint"]]
    columns = {}
    for labels in (*s["labels"], 0):
        lrs, lrs_random = ("cls_lr", "cls_lr_random") if labels else ("all_lr", "all_lr_random")
        rows = {
            "from scratch": scratch(s, lrs_random),
            "BEiT": (tiny if labels else tiny[:1], s[lrs], ()),
            "BEiT, linear probe": (tiny[:1], s["probe_lr"], ("--linear-probe", "--layer-decay", 1)),
        }
        if labels:
            rows["from scratch, smaller model"] = (["random"], s[lrs_random], ("--layer-decay", 1, *small))
            rows["BEiT, smaller model"] = (mini, s[lrs], ())
        found = classify(runner, labels, rows)
        found["BEiT, higher resolution"] = higher_resolution(runner, labels, found["BEiT"])
        found["logistic regression on raw pixels"] = raw_pixels(runner, labels)
        columns[f"{labels} labels per class" if labels else "all labels"] = found
    paper = {"BEiT": "85.2 (BEiT-L)", "BEiT, higher resolution": "86.3 (BEiT-L, 384 px)"}
    paper |= {"from scratch, smaller model": "81.8 (DeiT-B)", "BEiT, smaller model": "83.2 (BEiT-B)"}
    few = columns[f"{s['labels'][0]} labels per class"]
    rows = [[row, *(result(found.get(row)) for found in columns.values()), paper.get(row)] for row in few]
    return {"title": "Table 1: classification, top-1", "columns": ["", *columns, "paper, ImageNet"], "rows": rows}


def higher_resolution(runner, labels, classifiers):
    """BEiT's classifiers, each trained a little longer on larger images with interpolated positions."""
    s = runner.settings
    epochs = s["larger_epochs"] * (s["cls_epochs"][s["labels"].index(labels)] if labels else s["all_epochs"])
    flags = ["--data", s["data"], "--labels-per-class", labels, "--image-size", s["larger"], "--epochs", epochs]
    flags += ["--batch-size", s["cls_batch"]] if labels else []
    flags += ["--warmup-epochs", 0, "--eval-split", "test", "--lr", classifiers["lr"] / 10]
    name = f"cls{labels or 'all'}-larger"
    calls = {
        (n, seed): (f"{name}-{n}-{seed}", "finetune_cls.py", "--init", init, "--seed", seed, *flags)
        for n, inits in enumerate(classifiers["checkpoints"])
        for seed, init in enumerate(inits)
    }
    records = runner.stages(calls)
    runs = range(len(classifiers["checkpoints"]))
    return {"values": [[records[n, seed]["top1"] for seed in range(s["seeds"])] for n in runs], "lr": flags[-1]}


def table3(runner):
    """Table 3: mIoU from random weights, supervised classification, BEiT, and BEiT fine-tuned on classification."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    calls = {n: beit_call(runner, "BEiT", tokenizer, seed=n) for n in range(s["pretraining_seeds"])}
    beit = [record["checkpoint"] for record in runner.stages(calls).values()]
    all_labels = {"from scratch": scratch(s, "all_lr_random"), "BEiT": (beit[:1], s["all_lr"], ())}
    classifiers = {row: found["checkpoints"] for row, found in classify(runner, 0, all_labels).items()}
    rows = {
        "random weights": scratch_segmenter(s),
        "supervised classification": ([classifiers["from scratch"][0][0]], (*s["seg_lr_random"], *s["seg_lr"]), ()),
        "BEiT": (beit, s["seg_lr"], ()),
        "BEiT, intermediate fine-tuning": ([runs[0] for runs in classifiers["BEiT"]], s["seg_lr"], ()),
    }
    found = segment(runner, rows) | {"commonest class everywhere": commonest_class(runner)}
    paper = {"supervised classification": "45.3", "BEiT": "45.6", "BEiT, intermediate fine-tuning": "47.7"}
    rows = [[row, result(value), paper.get(row)] for row, value in found.items()]
    return {"title": "Table 3: segmentation, mIoU", "columns": ["", "scenes", "paper, ADE20K"], "rows": rows}


ABLATIONS = {
    # row of table 4: (flags of pretrain.py, the paper's ImageNet top-1, ADE20K mIoU)
    "BEiT": ((), "82.86", "44.65"),
    "- blockwise masking": (("--masking", "random"), "82.77", "42.93"),
    "- visual tokens": (("--target", "pixels"), "81.04", "41.38"),
    "- visual tokens - blockwise masking": (("--target", "pixels", "--masking", "random"), "80.50", "37.09"),
    "+ recover 100 %": (("--recover", "all"), "82.59", "40.93"),
    "- masking + recover 100 %": (("--masking", "none", "--recover", "all"), "81.67", "36.73"),
    "pretrain longer": ((), "83.19", "45.58"),  # 800 epochs in place of 300
    "pretrain 4 times as long": ((), None, None),
    "- visual tokens, normalised pixels": (("--target", "normalised-pixels"), None, None),
    "VQ-VAE tokenizer": ((), None, None),
}
LONGER = {"pretrain longer": 8 / 3, "pretrain 4 times as long": 4}  # times the epochs: 800 / 300, and more than that
TWICE = ("BEiT", "- visual tokens")  # rows with several pre-training seeds
MASKING = ("BEiT", "- blockwise masking", "+ recover 100 %", "- masking + recover 100 %")  # rows of table 4 on 14 x 14


def downstream(runner, records, seg_lrs, seg_flags=(), prefix=""):
    """Classify and segment from pre-training's records {(row, seed): record}, at the learning rates chosen for BEiT.

    prefix: of the stages' names.
    """
    s, inits = runner.settings, collections.defaultdict(list)
    for (row, _), record in records.items():
        inits[row].append(record["checkpoint"])
    others = {row: checkpoints for row, checkpoints in inits.items() if row != "BEiT"}
    rows = {"BEiT": (inits["BEiT"], s["cls_lr"], ())} | {row: (init, "BEiT", ()) for row, init in others.items()}
    cls = classify(runner, s["labels"][0], rows, prefix)
    rows = {row: (init, lrs, seg_flags) for row, (init, lrs, _) in rows.items()}
    return cls, segment(runner, rows | {"BEiT": (inits["BEiT"], seg_lrs, seg_flags)}, prefix)


def masked_accuracy(row, record):
    """Percent of the masked tokens that are predicted right, None where other things are to be predicted."""
    masked_only = "mim_accuracy" in record and "--recover" not in ABLATIONS[row][0]
    return 100 * record["mim_accuracy"] if masked_only else None


def table4(runner):
    """Table 4: what each choice of pre-training is worth, in classification and in segmentation."""
    s = runner.settings
    tokenizers = {row: tokenizer_stage(runner) for row in ABLATIONS if "visual tokens" not in row}
    tokenizers["VQ-VAE tokenizer"] = tokenizer_stage(runner, "tokenizer-vq", "--quantizer", "vq")
    column = training.COLUMNS.index(runner.recipe)
    epochs = {f"--{n.replace('_', '-')}": pretrain.RECIPES[n][column] for n in ("epochs", "warmup_epochs")}
    calls = {}
    for row, (flags, *_) in ABLATIONS.items():
        if row in LONGER:
            flags = [part for flag, n in epochs.items() for part in (flag, round(n * LONGER[row], 2))]
        for seed in range(s["pretraining_seeds"] if row in TWICE else 1):
            calls[row, seed] = beit_call(runner, row, tokenizers.get(row), *flags, seed=seed)
    records = runner.stages(calls)
    cls, seg = downstream(runner, records, s["seg_lr"])
    columns = ["", f"top-1, {s['labels'][0]} labels per class", "mIoU, scenes", "token MSE", "masked accuracy, %"]
    table = []
    for row, (_, imagenet, ade20k) in ABLATIONS.items():
        mse = f"{tokenizers[row]['reconstruction_mse']:.4f}" if row in tokenizers else None
        accuracy = masked_accuracy(row, records[row, 0])
        table.append([row, result(cls[row]), result(seg[row]), mse, accuracy, imagenet, ade20k])
    title = "Table 4: ablations, all fine-tuned at the learning rate chosen for BEiT"
    return {"title": title, "columns": [*columns, "paper, ImageNet", "paper, ADE20K"], "rows": table}


def grid14(runner):
    """Table 4's rows about masking on the paper's grid: pre-trained on scenes, fine-tuned on scenes to segment them.

    To classify single garments, 7 x 7 patches of the same scale, positions are interpolated.
    """
    s, tokenizer = runner.settings, tokenizer_stage(runner)
    calls = {
        (row, seed): beit_call(
            runner, f"14x14 {row}", tokenizer, *s["grid14_pretrain"], *ABLATIONS[row][0], seed=seed, images="scenes"
        )
        for seed in range(s["grid14_seeds"])
        for row in MASKING
    }
    records = runner.stages(calls)
    cls, seg = downstream(runner, records, s["grid14_seg_lr"], s["grid14_segment"], "14x14-")
    columns = ["", f"top-1 on 7 x 7, {s['labels'][0]} labels per class", "mIoU, scenes", "masked accuracy, %"]
    table = [
        [row, result(cls[row]), result(seg[row]), masked_accuracy(row, records[row, 0]), *ABLATIONS[row][1:]]
        for row in MASKING
    ]
    title = "Table 4's rows about masking, pre-trained on 14 x 14 patches"
    return {"title": title, "columns": [*columns, "paper, ImageNet", "paper, ADE20K"], "rows": table}


def figure2(runner):
    """Figure 2: attention maps, pre-trained above random weights, and how well attention separates objects."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    calls = {n: beit_call(runner, "BEiT", tokenizer, seed=n) for n in range(s["pretraining_seeds"])}
    checkpoints = [record["checkpoint"] for record in runner.stages(calls).values()]
    if runner.planning:
        return {}
    source = data.open_source(s["scenes"], "test", runner.data_dir)
    found = collections.defaultdict(list)
    for seed, checkpoint in enumerate(checkpoints):
        models, statistics_ = visualize_attention.load_models(checkpoint, seed)
        for name, percent in visualize_attention.separation(models, statistics_, source, s["reference_images"]).items():
            found[name].append(percent)
    where = ["--data-dir", runner.data_dir] if runner.data_dir else []
    picture = ["--data", s["data"], "--split", "test", *where, "--out", str(runner.out / "figure2.png")]
    visualize_attention.main([checkpoints[0], "0", "1", "2", "3", *picture])
    rows = [[name, result({"values": [values]})] for name, values in found.items()]
    columns = ["ranking of the other patches", "average precision, %"]
    return {"title": "Figure 2: attention separates objects", "columns": columns, "rows": rows}


EXPERIMENTS = {"summary": summary, "table 1": table1, "table 3": table3, "table 4": table4}
EXPERIMENTS |= {"grid 14": grid14, "figure 2": figure2}


# ---------------------------------------------------------------- what the paper claims, and what came out

CLAIMS = [
    # (claim, experiment, column, the row that should win, the row that should lose)
    ("BEiT beats training from scratch, few labels", "table 1", 1, "BEiT", "from scratch"),
    ("BEiT beats training from scratch, all labels", "table 1", -2, "BEiT", "from scratch"),
    ("Higher resolution helps", "table 1", 1, "BEiT, higher resolution", "BEiT"),
    ("The larger model is better", "table 1", 1, "BEiT", "BEiT, smaller model"),
    ("BEiT beats supervised pre-training in segmentation", "table 3", 1, "BEiT", "supervised classification"),
    ("BEiT beats random weights in segmentation", "table 3", 1, "BEiT", "random weights"),
    ("Intermediate fine-tuning helps segmentation", "table 3", 1, "BEiT, intermediate fine-tuning", "BEiT"),
    ("Visual tokens beat pixels, classification", "table 4", 1, "BEiT", "- visual tokens"),
    ("Visual tokens beat pixels, segmentation", "table 4", 2, "BEiT", "- visual tokens"),
    ("Blockwise beats random masking, classification", "table 4", 1, "BEiT", "- blockwise masking"),
    ("Blockwise beats random masking, segmentation", "table 4", 2, "BEiT", "- blockwise masking"),
    ("Recovering masked tokens alone beats 100 %, classification", "table 4", 1, "BEiT", "+ recover 100 %"),
    ("Recovering masked tokens alone beats 100 %, segmentation", "table 4", 2, "BEiT", "+ recover 100 %"),
    ("Masking beats none, classification", "table 4", 1, "BEiT", "- masking + recover 100 %"),
    ("Masking beats none, segmentation", "table 4", 2, "BEiT", "- masking + recover 100 %"),
    ("Blockwise beats random masking, classification, 14x14", "grid 14", 1, "BEiT", "- blockwise masking"),
    ("Blockwise beats random masking, segmentation, 14x14", "grid 14", 2, "BEiT", "- blockwise masking"),
    ("Recovering masked tokens alone beats 100 %, classification, 14x14", "grid 14", 1, "BEiT", "+ recover 100 %"),
    ("Recovering masked tokens alone beats 100 %, segmentation, 14x14", "grid 14", 2, "BEiT", "+ recover 100 %"),
    ("Masking beats none, classification, 14x14", "grid 14", 1, "BEiT", "- masking + recover 100 %"),
    ("Masking beats none, segmentation, 14x14", "grid 14", 2, "BEiT", "- masking + recover 100 %"),
    ("Pre-training longer helps, classification", "table 4", 1, "pretrain longer", "BEiT"),
    ("Pre-training longer helps, segmentation", "table 4", 2, "pretrain longer", "BEiT"),
    ("Attention separates objects: more than random weights'", "figure 2", 1, "pre-trained", "random weights"),
    ("Attention separates objects: more than nearness", "figure 2", 1, "pre-trained", "nearness"),
]


def verdicts(tables):
    """A table of CLAIMS. holds: the difference is above twice the pooled standard deviation; does not hold: below
    minus that; undecided: between, or without a spread."""
    rows = []
    for claim, experiment, column, winner, loser in CLAIMS:
        if experiment not in tables:
            continue
        cells = {row[0]: row[column] for row in tables[experiment]["rows"]}
        a, b = ([v for run in cells[row]["values"] for v in run] for row in (winner, loser))
        difference = statistics.mean(a) - statistics.mean(b)
        margin = math.inf
        if min(len(a), len(b)) > 1:
            margin = 2 * math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
        verdict = "undecided" if abs(difference) <= margin else "holds" if difference > 0 else "does not hold"
        numbers = f"{spread(cells[winner])} against {spread(cells[loser])}"
        rows.append([claim, verdict, numbers])
    return {"title": "The paper's claims", "columns": ["claim", "at this scale", "numbers"], "rows": rows}


# ---------------------------------------------------------------- tables as text


def result(found):
    """What a cell of a table keeps of contrast()'s result, or a number."""
    return {key: found[key] for key in ("values", "lr") if key in found} if isinstance(found, dict) else found


def spread(cell):
    """'mean ± standard deviation' over all runs of a cell."""
    values = [value for run in cell["values"] for value in run]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def cell_text(cell):
    """The spread of a cell and the learning rate chosen for it, or what it is."""
    if isinstance(cell, dict):
        return spread(cell) + (f" (lr {cell['lr']:g})" if "lr" in cell else "")
    return "" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def markdown(table):
    """A table as lines of Markdown, its columns aligned."""
    lines = [table["columns"], *([cell_text(cell).replace("|", r"\|") for cell in row] for row in table["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines)


MARKER = re.compile(r"(<!-- (results/\w+\.json): ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill_readme(text):
    """README text with every table between `<!-- results/RECIPE.json: EXPERIMENT -->` and `<!-- end -->` made anew."""

    def table(match):
        start, path, experiment, _, end = match.groups()
        return f"{start}{markdown(json.loads((HERE / path).read_text())['tables'][experiment])}\n{end}"

    return MARKER.sub(table, text)


def machine():
    """The processor's name and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def save_results(runner, tables):
    """Add the tables to OUT/results.json, with each finished stage's seconds, the claims and the machine."""
    path = runner.out / "results.json"
    saved = json.loads(path.read_text()) if path.exists() else {"tables": {}, "stages": {}}
    finished = {p.stem: json.loads(p.read_text()) for p in sorted(runner.out.glob("*.json")) if p != path}
    stages = {name: {key: done[key] for key in ("seconds", "threads", "resumed")} for name, done in finished.items()}
    saved |= {"recipe": runner.recipe, "machine": machine(), "torch": str(torch.__version__)}
    saved["stages"] |= stages
    saved["tables"] |= tables
    if (claims := verdicts(saved["tables"]))["rows"]:
        saved["tables"]["claims"] = claims
    path.with_suffix(".tmp").write_text(json.dumps(saved, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    return saved


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("--recipe", default="demo", choices=COLUMNS, help="what to run")
    parser.add_argument("--table", type=int, nargs="+", default=[], choices=(1, 3, 4), help="the paper's tables to run")
    parser.add_argument("--figure", type=int, nargs="+", default=[], choices=(2,), help="and its figure")
    parser.add_argument("--grid14", action="store_true", help="and table 4's rows about masking on 14 x 14 patches")
    parser.add_argument("--seeds", type=int, help="fine-tuning runs per row; default: the recipe's")
    parser.add_argument("--out", help="new folder for everything that is made; default: runs/RECIPE")
    parser.add_argument("--resume", action="store_true", help="keep the finished stages in --out, run the rest")
    parser.add_argument("--data-dir", help="where the data set's own files are, or are downloaded to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--readme", action="store_true", help="fill README.md from results/*.json and stop")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if args.grid14 and args.recipe == "demo":
        parser.error("--grid14 needs images of 56 x 56 pixels: --recipe fashion has them, drawn shapes are smaller")
    if args.readme:
        (HERE / "README.md").write_text(fill_readme((HERE / "README.md").read_text()))
        return
    out = Path(args.out or f"runs/{args.recipe}")
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise ValueError(f"{out} is not empty: choose another --out, or --resume to keep its finished stages")
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, args.recipe, args.seeds, args.data_dir, args.jobs)
    names = [f"table {n}" for n in args.table] + ["grid 14"] * args.grid14 + [f"figure {n}" for n in args.figure]
    names = names or ["summary"]
    runner.plan([EXPERIMENTS[name] for name in names])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in names:
            tables = save_results(runner, {name: EXPERIMENTS[name](runner)})["tables"]
    except KeyboardInterrupt:
        raise training.Stopped("stopped: --resume goes on") from None
    finally:
        runner.stop()
    for name in [*names, "claims"] if names != ["summary"] else names:
        print(f"\n{tables[name]['title']}\n{markdown(tables[name])}")
    print(f"\n{(time.time() - runner.start) / 60:.1f} minutes; pictures: {out}/*/*.png; numbers: {out}/results.json")


if __name__ == "__main__":
    with training.one_line_errors():
        main()

"""The paper's tables 1, 3 and 4 and figure 2 at small scale, and a summary of the whole paper.

Not in the paper: table 4's rows on 14 x 14 patches and by budget, other masks and tokenizers. Each
experiment is a function of a stages.Runner that returns a table (see tables.py). Learning rates
are those of RECIPES; of several, the best on the validation split, with a separate seed. The rows
of table 4 and of the experiments beside it take BEiT's. All results are on the test split.
"""

import collections
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments import attention, baselines, costs, features
from experiments.tables import all_values, run_cell, save_results
from images import sets
from plumbing import command_line, log, outputs, pictures

# 75 of 14 x 14 patches masked in blocks of 16 or more, as in the paper. In all, 1.7 times as many
# patches as in the `fashion` recipe.
GRID14 = ("--image-size", 56, "--token-size", 56, "--mask-ratio", 75 / 196, "--min-block", 16)
GRID14 += ("--batch-size", 64, "--epochs", 12.5, "--warmup-epochs", 0.8)
GRID14_SEGMENT = ("--image-size", 56, "--batch-size", 16)

COLUMNS = command_line.COLUMNS[:3]
SCENES = "shapes", "fashion-scenes"  # named data sets with masks
RECIPES = {
    # name: (demo, fashion, photos, help)
    "data": ("shapes", "fashion-mnist", "imagenette", "images for pre-training and classification"),
    "scenes": ("shapes", "fashion-scenes", None, "images with masks, for segmentation"),
    "seeds": (3, 3, 3, "fine-tuning runs per row; each draws its own images, if not all"),
    "labels": ((100,), (100, 10), (100,), "labels per class for fine-tuning the classifier"),
    "cls_epochs": ((15.0,), (10.0, 100.0), (20.0,), "epochs for each of `labels`"),
    "cls_batch": (40, 50, 50, "batch size of the classifier"),
    "cls_lr": ((1e-3,), (1e-3, 2e-3), (2e-3,), "learning rates of pre-trained classifiers"),
    "cls_lr_random": ((5e-4,), *((2.5e-4, 5e-4, 1e-3),) * 2, "learning rates from scratch"),
    "seg_images": (200, 200, 0, "images with masks for fine-tuning the segmenter"),
    "seg_lr": ((1.6e-2,), (8e-3,), (1.6e-2,), "learning rates of pre-trained segmenters"),
    "seg_lr_random": ((8e-3,), (2e-3, 4e-3, 8e-3), (4e-3,), "from random weights"),
    "longer": (0, 4, 4, "also train from scratch for this many times the steps; 0: do not"),
    "all_labels": (False, False, True, "summary: also fine-tune with all labels"),
    "all_epochs": (3.0, 1.0, 3.0, "epochs with the labels of the whole training set"),
    "all_lr": (*((1e-3, 2e-3),) * 2, (2e-3,), "learning rates of BEiT there"),
    "all_lr_random": (*((5e-4, 1e-3, 2e-3),) * 2, (5e-4,), "from scratch there"),
    # the tables only
    "pretraining_seeds": (2, 2, 2, "pre-training runs of the rows BEiT and pixels"),
    "probe_lr": (*((4e-3, 1.6e-2),) * 3, "learning rates of the linear probe"),
    "larger": (32, 40, 128, "the higher resolution, in pixels"),
    "larger_epochs": (0.1, 0.1, 0.1, "epochs at it, as a share of the classifier's"),
    "small_model": ("mini", "mini", "mini8", "the smaller model"),
    "reference_images": (500, 500, 1000, "images with reference patches for figure 2"),
    # table 4's rows about masking and targets at several budgets
    "budgets": (None, (1, 2, 4, 8), (1 / 8, 1 / 4, 1 / 2, 1, 2), "factors on pretrain.py's epochs"),
    "budget_seeds": (None, 2, 2, "pre-training runs of BEiT, random, no masking, at `seeds_at`"),
    "seeds_at": (None, (8,), (1, 2), "the factors with several pre-training runs"),
    "masks_budget": (None, None, 1 / 4, "factor on pretrain.py's epochs for other masks"),
    # other tokenizers, which the paper does not compare
    "vocabularies": (None, None, (256, 2048), "other sizes of the vocabulary"),
    "tokenizers_budget": (None, None, 1 / 4, "factor on pretrain.py's epochs there"),
    # the rows of table 4 about masking on the paper's own grid; drawn shapes are too small for it
    "grid14_pretrain": (None, GRID14, None, "flags of pretrain.py, on the scenes"),
    "grid14_classify": (None, ("--image-size", 28), None, "flags of finetune_cls.py: garments"),
    "grid14_segment": (None, GRID14_SEGMENT, None, "flags of finetune_seg.py: whole scenes"),
    "grid14_seg_lr": (None, (4e-3, 8e-3), None, "learning rates of segmenters there"),
    "grid14_seeds": (None, 2, None, "pre-training runs of each row"),
}


def settings(recipe, seeds=None, scenes=None):
    """The column of RECIPES: {name: value}.

    seeds: fine-tuning runs per row, if not its own; scenes: images with masks, likewise.
    """
    column = command_line.column(RECIPES, recipe)
    return column | ({"seeds": seeds} if seeds else {}) | ({"scenes": scenes} if scenes else {})


# -------------------------------------------------------- stages that experiments share


def slug(text):
    """A row's name as part of a stage's name."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def tokenizer_call(runner, name="tokenizer", *flags):
    """Stage 1 for runner.stages: (name, script, *flags)."""
    common = ("--data", runner.settings["data"], "--eval-split", "test")
    return name, "train_tokenizer.py", *common, *flags


def tokenizer_stage(runner, name="tokenizer", *flags):
    """Run stage 1 and return its record."""
    return runner.stage(*tokenizer_call(runner, name, *flags))


def beit_call(runner, row, tokenizer, *flags, seed=0, images="data"):
    """Stage 2 for runner.stages: (name, script, *flags).

    tokenizer: its record, or None with pixels as the target. images: the setting with the data.
    """
    source = ("--tokenizer", tokenizer["checkpoint"]) if tokenizer else ()
    common = ("--data", runner.settings[images], "--eval-split", "test", "--seed", seed)
    return f"{slug(row)}-{seed}", "pretrain.py", *common, *source, *flags


class Start(NamedTuple):
    """What a row of fine-tuning runs starts from."""

    inits: list  # values of --init, one for each pre-training seed
    lrs: tuple | str  # learning rates to choose from, or the row whose choice to use
    flags: tuple = ()  # further flags of the script


def choose_lr(runner, name, script, metric, row, start, flags):
    """The learning rate of a row that is best on the validation split, with seed 100."""
    if len(start.lrs) == 1:
        return start.lrs[0]
    common = (script, "--init", start.inits[0], *flags, *start.flags)
    calls = {
        lr: (f"search-{name}-{slug(row)}-{lr:g}", *common, "--lr", lr, "--seed", 100)
        for lr in start.lrs
    }
    found = runner.stages(calls)
    return max(found, key=lambda lr: found[lr][metric])


def fine_tune(runner, name, script, metric, starts, flags):
    """Fine-tune from every start and measure on the test split.

    starts: {row: Start}. Returns {row: {"lr", "values", "checkpoints"}}; values and checkpoints
    are lists over the pre-training seeds of lists over the fine-tuning seeds.
    """
    rates, calls, seeds = {}, {}, range(runner.settings["seeds"])
    for row, start in starts.items():
        if isinstance(start.lrs, str):
            rates[row] = rates[start.lrs]
        else:
            rates[row] = choose_lr(runner, name, script, metric, row, start, flags)
    for row, start in starts.items():
        for number, init in enumerate(start.inits):
            common = (script, "--init", init, *flags, *start.flags, "--lr", rates[row])
            for seed in seeds:
                stage = f"{name}-{slug(row)}-{number}-{seed}"
                calls[row, number, seed] = stage, *common, "--seed", seed, "--eval-split", "test"
    records, found = runner.stages(calls), {}
    for row, start in starts.items():
        numbers = range(len(start.inits))
        runs = [[records[row, number, seed] for seed in seeds] for number in numbers]
        found[row] = {"lr": rates[row], "values": [[r[metric] for r in run] for run in runs]}
        found[row]["checkpoints"] = [[record["checkpoint"] for record in run] for run in runs]
    return found


def classify(runner, labels, starts, prefix=""):
    """fine_tune() of classifiers with this many labels per class; 0: all. Values are top-1.

    prefix: of the stages' names.
    """
    s = runner.settings
    flags = ["--data", s["data"], "--labels-per-class", labels]
    epochs = s["all_epochs"]
    if labels:
        epochs = s["cls_epochs"][s["labels"].index(labels)]
        flags += ["--batch-size", s["cls_batch"]]
    flags += ["--epochs", epochs, "--warmup-epochs", epochs / 10]
    name = f"{prefix}cls{labels or 'all'}"
    return fine_tune(runner, name, "finetune_cls.py", "top1", starts, flags)


def segment(runner, starts, prefix=""):
    """fine_tune() of segmenters. Values are mIoU. prefix: of the stages' names."""
    s = runner.settings
    flags = ("--data", s["scenes"], "--train-images", s["seg_images"])
    return fine_tune(runner, f"{prefix}seg", "finetune_seg.py", "miou", starts, flags)


def rates_for(labels):
    """The settings with a classifier's learning rates: (pre-trained, from scratch)."""
    return ("cls_lr", "cls_lr_random") if labels else ("all_lr", "all_lr_random")


def scratch(s, lrs):
    """Start a classifier from random weights. s: the settings."""
    return Start(["random"], s[lrs], ("--layer-decay", 1))


def scratch_segmenter(s):
    """Start a segmenter from random weights. 0.75 beat 0.5 and 1 on the drawn shapes."""
    return Start(["random"], s["seg_lr_random"], ("--layer-decay", 0.75))


# -------------------------------------------------------- the experiments


def summary(runner):
    """The whole paper once: tokenizer, pre-training, fine-tuning against random weights."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    beit = runner.stage(*beit_call(runner, "BEiT", tokenizer))
    accuracy, commonest = (f"{100 * beit[n]:.1f} %" for n in ("mim_accuracy", "commonest_token"))
    codes = f"{tokenizer['codebook_used']}, {tokenizer['codebook_perplexity']:.0f}"
    terms = f"{beit['stage1_nats']:.0f}, {beit['stage2_nats']:.1f}"
    rows = [
        ["tokenizer: reconstruction MSE", f"{tokenizer['reconstruction_mse']:.4f}"],
        ["tokenizer: codes used, perplexity", codes],
        ["pre-training: masked tokens right", f"{accuracy} (commonest {commonest})"],
        ["pre-training: loss, nats per token", f"{beit['mim_loss']:.2f}"],
        ["eq. 3, nats per image: log p(x|z), log p(z|x~)", terms],
    ]
    for labels in (*s["labels"], 0) if s["all_labels"] else s["labels"]:
        lrs, lrs_random = rates_for(labels)
        starts = {"BEiT": Start([beit["checkpoint"]], s[lrs])}
        starts["from scratch"] = scratch(s, lrs_random)
        if s["longer"] and labels:
            epochs = s["cls_epochs"][s["labels"].index(labels)] * s["longer"]
            flags = ("--layer-decay", 1, "--epochs", epochs)
            row = f"from scratch, {s['longer']} times the steps"
            starts[row] = Start(["random"], "from scratch", flags)
        found = classify(runner, labels, starts)
        found["logistic regression on raw pixels"] = baselines.raw_pixels(runner, labels)
        how_many = f"{labels} labels per class" if labels else "all labels"
        rows += [[f"top-1, {how_many}, {row}", run_cell(cell)] for row, cell in found.items()]
    table = {"title": "Summary", "columns": ["", runner.recipe], "rows": rows}
    if not s["scenes"]:
        return table
    starts = {
        "BEiT": Start([beit["checkpoint"]], s["seg_lr"]),
        "random weights": scratch_segmenter(s),
    }
    found = segment(runner, starts)
    found["commonest class everywhere"] = baselines.commonest_class(runner)
    rows += [[f"mIoU, {row}", run_cell(cell)] for row, cell in found.items()]
    return table


def pretrained(runner, tokenizer, *more):
    """Checkpoints of BEiT, one for each of `pretraining_seeds`, and of `more` calls."""
    seeds = range(runner.settings["pretraining_seeds"])
    calls = [*(beit_call(runner, "BEiT", tokenizer, seed=seed) for seed in seeds), *more]
    return [record["checkpoint"] for record in runner.stages(dict(enumerate(calls))).values()]


def table1(runner):
    """Table 1: top-1 from scratch and from BEiT, at a higher resolution, of two model sizes.

    Ours adds the linear probe.
    """
    s = runner.settings
    tokenizer, small = tokenizer_stage(runner), ("--model", s["small_model"])
    smaller = beit_call(runner, f"BEiT {s['small_model']}", tokenizer, *small)
    *tiny, mini = pretrained(runner, tokenizer, smaller)
    columns = {}
    for labels in (*s["labels"], 0):
        lrs, lrs_random = rates_for(labels)
        starts = {
            "from scratch": scratch(s, lrs_random),
            "BEiT": Start(tiny if labels else tiny[:1], s[lrs]),
            "BEiT, linear probe": Start(tiny[:1], s["probe_lr"], ("--linear-probe",)),
        }
        if labels:
            flags = ("--layer-decay", 1, *small)
            starts["from scratch, smaller model"] = Start(["random"], s[lrs_random], flags)
            starts["BEiT, smaller model"] = Start([mini], s[lrs])
        found = classify(runner, labels, starts)
        found["BEiT, higher resolution"] = higher_resolution(runner, labels, found["BEiT"])
        found["logistic regression on raw pixels"] = baselines.raw_pixels(runner, labels)
        columns[f"{labels} labels per class" if labels else "all labels"] = found
    paper = {"BEiT": "85.2 (BEiT-L)", "BEiT, higher resolution": "86.3 (BEiT-L, 384 px)"}
    paper["from scratch, smaller model"] = "81.8 (DeiT-B)"
    paper["BEiT, smaller model"] = "83.2 (BEiT-B)"
    rows = [
        [row, *(run_cell(found.get(row)) for found in columns.values()), paper.get(row)]
        for row in columns[f"{s['labels'][0]} labels per class"]
    ]
    columns = ["", *columns, "paper, ImageNet"]
    return {"title": "Table 1: classification, top-1", "columns": columns, "rows": rows}


def higher_resolution(runner, labels, classifiers):
    """Train BEiT's classifiers a little longer on larger images, with interpolated positions.

    classifiers: a row that fine_tune() returned. Returns {"values", "lr"} likewise.
    """
    s = runner.settings
    epochs = s["cls_epochs"][s["labels"].index(labels)] if labels else s["all_epochs"]
    epochs *= s["larger_epochs"]
    flags = ["--data", s["data"], "--labels-per-class", labels]
    flags += ["--image-size", s["larger"], "--epochs", epochs]
    flags += ["--batch-size", s["cls_batch"]] if labels else []
    lr = classifiers["lr"] / 10
    flags += ["--warmup-epochs", 0, "--eval-split", "test", "--lr", lr]
    name = f"cls{labels or 'all'}-larger"
    calls = {
        (n, seed): (f"{name}-{n}-{seed}", "finetune_cls.py", "--init", init, "--seed", seed, *flags)
        for n, inits in enumerate(classifiers["checkpoints"])
        for seed, init in enumerate(inits)
    }
    records, runs = runner.stages(calls), range(len(classifiers["checkpoints"]))
    return {
        "values": [[records[n, seed]["top1"] for seed in range(s["seeds"])] for n in runs],
        "lr": lr,
    }


def table3(runner):
    """Table 3: mIoU from random weights, from supervised classification and from BEiT.

    The last row fine-tunes BEiT on classification first (section 2.6).
    """
    s = runner.settings
    beit = pretrained(runner, tokenizer_stage(runner))
    starts = {"from scratch": scratch(s, "all_lr_random"), "BEiT": Start(beit[:1], s["all_lr"])}
    found = classify(runner, 0, starts)
    supervised = [found["from scratch"]["checkpoints"][0][0]]
    intermediate = [run[0] for run in found["BEiT"]["checkpoints"]]
    starts = {
        "random weights": scratch_segmenter(s),
        "supervised classification": Start(supervised, (*s["seg_lr_random"], *s["seg_lr"])),
        "BEiT": Start(beit, s["seg_lr"]),
        "BEiT, intermediate fine-tuning": Start(intermediate, s["seg_lr"]),
    }
    found = segment(runner, starts)
    found["commonest class everywhere"] = baselines.commonest_class(runner)
    paper = {"supervised classification": "45.3", "BEiT": "45.6"}
    paper["BEiT, intermediate fine-tuning"] = "47.7"
    rows = [[row, run_cell(cell), paper.get(row)] for row, cell in found.items()]
    columns = ["", "scenes", "paper, ADE20K"]
    return {"title": "Table 3: segmentation, mIoU", "columns": columns, "rows": rows}


ABLATIONS = {
    # row of table 4: (flags of pretrain.py, the paper's ImageNet top-1, ADE20K mIoU)
    "BEiT": ((), "82.86", "44.65"),
    "- blockwise masking": (("--masking", "random"), "82.77", "42.93"),
    "- visual tokens": (("--target", "pixels"), "81.04", "41.38"),
    "- visual tokens - blockwise masking": (
        ("--target", "pixels", "--masking", "random"),
        "80.50",
        "37.09",
    ),
    "+ recover 100 %": (("--recover", "all"), "82.59", "40.93"),
    "- masking + recover 100 %": (("--masking", "none", "--recover", "all"), "81.67", "36.73"),
    "pretrain longer": ((), "83.19", "45.58"),  # 800 epochs in place of 300
    "pretrain 4 times as long": ((), None, None),
    "- visual tokens, normalised pixels": (("--target", "normalised-pixels"), None, None),
    "VQ-VAE tokenizer": ((), None, None),
}
# factor on the epochs: 800 / 300 as in the paper, and one more
LONGER = {"pretrain longer": 8 / 3, "pretrain 4 times as long": 4}
TWICE = ("BEiT", "- visual tokens")  # rows with several pre-training seeds
# rows about masking, repeated on 14 x 14 patches
MASKING = ("BEiT", "- blockwise masking", "+ recover 100 %", "- masking + recover 100 %")


def downstream(runner, records, seg_lrs, cls_flags=(), seg_flags=(), prefix=""):
    """Classify and segment from pre-trained models, at the learning rates chosen for BEiT.

    records: {(row, pre-training seed): record}. prefix: of the stages' names. Returns what
    classify() and segment() return, the second empty without images with masks.
    """
    s, inits = runner.settings, collections.defaultdict(list)
    for (row, _), record in records.items():
        inits[row].append(record["checkpoint"])
    beit, other = inits.pop("BEiT"), list(inits.items())
    starts = {"BEiT": Start(beit, s["cls_lr"], cls_flags)}
    starts |= {row: Start(init, "BEiT", cls_flags) for row, init in other}
    cls = classify(runner, s["labels"][0], starts, prefix)
    if not s["scenes"]:
        return cls, {}
    starts = {"BEiT": Start(beit, seg_lrs, seg_flags)}
    starts |= {row: Start(init, "BEiT", seg_flags) for row, init in other}
    return cls, segment(runner, starts, prefix)


def masked_accuracy(row, record):
    """Percent of the masked tokens predicted right; None if not only these are predicted."""
    masked_only = "mim_accuracy" in record and "--recover" not in ABLATIONS[row][0]
    return 100 * record["mim_accuracy"] if masked_only else None


def longer_flags(recipe, factor):
    """Flags of pretrain.py for `factor` times the recipe's epochs and warm-up."""
    s = costs.settings("pretraining", recipe)
    epochs, warmup = (round(value * factor, 2) for value in (s.epochs, s.warmup_epochs))
    return ["--epochs", epochs, "--warmup-epochs", warmup]


def table4(runner):
    """Table 4: the effect of each choice in pre-training on classification and segmentation."""
    s = runner.settings
    tokenizer = tokenizer_stage(runner)
    tokenizers = {row: tokenizer for row in ABLATIONS if "visual tokens" not in row}
    vq = tokenizer_stage(runner, "tokenizer-vq", "--quantizer", "vq")
    tokenizers["VQ-VAE tokenizer"] = vq
    calls = {}
    for row, (flags, *_) in ABLATIONS.items():
        if row in LONGER:
            flags = longer_flags(runner.recipe, LONGER[row])
        for seed in range(s["pretraining_seeds"] if row in TWICE else 1):
            calls[row, seed] = beit_call(runner, row, tokenizers.get(row), *flags, seed=seed)
    records = runner.stages(calls)
    cls, seg = downstream(runner, records, s["seg_lr"])
    rows = []
    for row, (_, imagenet, ade20k) in ABLATIONS.items():
        mse = f"{tokenizers[row]['reconstruction_mse']:.4f}" if row in tokenizers else None
        accuracy = masked_accuracy(row, records[row, 0])
        ours = [run_cell(cls[row]), run_cell(seg.get(row)), mse, accuracy]
        rows.append([row, *ours, imagenet, ade20k])
    columns = ["", f"top-1, {s['labels'][0]} labels per class", "mIoU, scenes"]
    columns += ["token MSE", "masked tokens right, %", "paper, ImageNet", "paper, ADE20K"]
    title = "Table 4: ablations, all fine-tuned at the learning rate chosen for BEiT"
    return {"title": title, "columns": columns, "rows": rows}


def grid14(runner):
    """Table 4's rows about masking on the paper's grid: pre-training and segmentation on scenes.

    Classifiers see single garments, 7 x 7 patches of the same scale: positions are interpolated.
    """
    s, tokenizer, calls = runner.settings, tokenizer_stage(runner), {}
    for seed in range(s["grid14_seeds"]):
        for row in MASKING:
            name, flags = f"14x14 {row}", (*s["grid14_pretrain"], *ABLATIONS[row][0])
            calls[row, seed] = beit_call(
                runner, name, tokenizer, *flags, seed=seed, images="scenes"
            )
    records = runner.stages(calls)
    flags = s["grid14_classify"], s["grid14_segment"]
    cls, seg = downstream(runner, records, s["grid14_seg_lr"], *flags, prefix="14x14-")
    rows = []
    for row in MASKING:
        accuracy = masked_accuracy(row, records[row, 0])
        rows.append([row, run_cell(cls[row]), run_cell(seg[row]), accuracy, *ABLATIONS[row][1:]])
    columns = ["", f"top-1 on 7 x 7, {s['labels'][0]} labels per class", "mIoU, scenes"]
    columns += ["masked tokens right, %", "paper, ImageNet", "paper, ADE20K"]
    title = "Table 4's rows about masking, pre-trained on 14 x 14 patches"
    return {"title": title, "columns": columns, "rows": rows}


BUDGET_ROWS = (*MASKING, "- visual tokens")
SEVERAL = ("BEiT", "- blockwise masking", "- masking + recover 100 %")  # with `budget_seeds`


def budgets(runner):
    """Table 4's rows about masking and pixels after shares or multiples of the recipe's epochs.

    Each budget is a run of its own, with a whole cosine. After each, OUT/results.json and the
    curves OUT/budgets-MEASURE.svg have all so far.
    """
    s, tokenizer = runner.settings, tokenizer_stage(runner)
    measures, epochs = {"top-1": {}, "k-NN": {}, "mIoU": {}}, []
    for factor in s["budgets"]:
        records = runner.stages(budget_calls(runner, tokenizer, factor))
        cls, seg = downstream(runner, records, s["seg_lr"], prefix=f"x{factor:g}-")
        for row in BUDGET_ROWS:
            neighbours = [[knn(runner, r)] for (of, _), r in records.items() if of == row]
            cells = cls[row], {"values": neighbours}, seg.get(row)
            for found, cell in zip(measures.values(), cells):
                found.setdefault(row, []).append(run_cell(cell))
        epochs.append(longer_flags(runner.recipe, factor)[1])
        rows = [
            [f"{row}, {measure}", *cells]
            for measure, found in measures.items()
            for row, cells in found.items()
            if None not in cells
        ]
        columns = ["", *(f"{value:g} epochs" for value in epochs)]
        table = {"title": "Table 4's rows by budget", "columns": columns, "rows": rows}
        if not runner.planning:
            draw_budgets(runner, epochs, measures)
            save_results(runner, {"budgets": table})
    return table


def budget_calls(runner, tokenizer, factor):
    """Pre-training at a budget: {(row, seed): call}. Several seeds only at `seeds_at`."""
    s, calls = runner.settings, {}
    flags = longer_flags(runner.recipe, factor) if factor != 1 else ()  # 1: the summary's runs
    for row in BUDGET_ROWS:
        several = row in SEVERAL and factor in s["seeds_at"]
        source = None if "visual tokens" in row else tokenizer
        name = row if factor == 1 else f"{row} x{factor:g}"
        for seed in range(s["budget_seeds"] if several else 1):
            calls[row, seed] = beit_call(
                runner, name, source, *ABLATIONS[row][0], *flags, seed=seed
            )
    return calls


def draw_budgets(runner, epochs, measures):
    """OUT/budgets-MEASURE.svg for {measure: {row: cells}}: a curve for each row over the epochs."""
    labels = runner.settings["labels"][0]
    more = {"top-1": f", {labels} labels per class", "k-NN": " of the last layer", "mIoU": ""}
    for measure, found in measures.items():
        lines = {
            row: [(x, statistics.mean(all_values(cell))) for x, cell in zip(epochs, cells) if cell]
            for row, cells in found.items()
        }
        title = f"{measure}{more[measure]}, by epochs of pre-training"
        if any(lines.values()):
            picture = pictures.svg_curve(lines, title, "epochs", f"{measure}, %", width=860)
            with outputs.again(runner.out / f"budgets-{slug(measure)}.svg") as new:
                new.write_text(picture)


def tokenizers(runner):
    """Not in the paper: VQ instead of Gumbel-softmax, and other sizes of the vocabulary.

    The row BEiT has the recipe's tokenizer. Pre-training takes a part of the recipe's epochs.
    """
    s = runner.settings
    calls = {"BEiT": tokenizer_call(runner)}
    calls["VQ-VAE tokenizer"] = tokenizer_call(runner, "tokenizer-vq", "--quantizer", "vq")
    for size in s["vocabularies"]:
        calls[f"vocabulary of {size}"] = tokenizer_call(
            runner, f"tokenizer-{size}", "--vocab-size", size
        )
    found = runner.stages(calls)
    epochs, calls = longer_flags(runner.recipe, s["tokenizers_budget"]), {}
    for row, tokenizer in found.items():
        calls[row, 0] = beit_call(runner, f"tokens of {row}", tokenizer, *epochs)
    records = runner.stages(calls)
    cls, seg = downstream(runner, records, s["seg_lr"], prefix="tokens-")
    rows = []
    for row, tokenizer in found.items():
        mse, beit = f"{tokenizer['reconstruction_mse']:.4f}", records[row, 0]
        codes = f"{tokenizer['codebook_used']}, {tokenizer['codebook_perplexity']:.0f}"
        right = [f"{100 * beit[name]:.1f}" for name in ("mim_accuracy", "commonest_token")]
        miou = [run_cell(seg[row])] if seg else []
        rows.append([row, mse, codes, *right, run_cell(cls[row]), knn(runner, beit), *miou])
    columns = ["", "token MSE", "codes used, perplexity", "masked tokens right, %", "commonest, %"]
    columns += [f"top-1, {s['labels'][0]} labels per class", "k-NN"]
    columns += ["mIoU, scenes"] * bool(seg)
    title = f"Other tokenizers, {epochs[1]:g} epochs of pre-training"
    return {"title": title, "columns": columns, "rows": rows}


MASKS = {  # row: flags of pretrain.py
    "BEiT": (),
    "30 % masked, not 38": ("--mask-ratio", 0.3),
    "blocks from 9 patches, not 16": ("--min-block", 9),
    "blocks from 4 patches": ("--min-block", 4),
    "- blockwise masking": ABLATIONS["- blockwise masking"][0],
    "BEiT, width 64, not 128": ("--model", "mini8"),
    "- blockwise masking, width 64": ("--model", "mini8", "--masking", "random"),
    "BEiT, width 192": ("--model", "small8"),
    "- blockwise masking, width 192": ("--model", "small8", "--masking", "random"),
}


def masks(runner):
    """Not in the paper: what lies between BEiT and random masking, and both in other widths.

    Pre-training takes a part of the recipe's epochs, one of `budgets`.
    """
    s, tokenizer, calls = runner.settings, tokenizer_stage(runner), {}
    factor = s["masks_budget"]
    epochs = longer_flags(runner.recipe, factor)
    for row, flags in MASKS.items():
        calls[row, 0] = beit_call(runner, f"{row} x{factor:g}", tokenizer, *flags, *epochs)
    records = runner.stages(calls)
    cls, seg = downstream(runner, records, s["seg_lr"], prefix=f"x{factor:g}-")
    rows = []
    for row in MASKS:
        right, neighbours = 100 * records[row, 0]["mim_accuracy"], knn(runner, records[row, 0])
        miou = [run_cell(seg[row])] if seg else []
        rows.append([row, right, run_cell(cls[row]), neighbours, *miou])
    columns = ["", "masked tokens right, %", f"top-1, {s['labels'][0]} labels per class"]
    columns += ["k-NN"] + ["mIoU, scenes"] * bool(seg)
    title = f"Other masks and widths, {epochs[1]:g} epochs of pre-training"
    return {"title": title, "columns": columns, "rows": rows}


def knn(runner, record):
    """k-NN accuracy in percent of the last layer of a stage's checkpoint, kept in its folder."""
    kept = Path(record["checkpoint"]).with_name("knn.json")
    if runner.planning:
        return 0.0
    if not kept.exists():
        model, _, normalise = features.load_model(record["checkpoint"], "auto")
        parts = {
            split: sets.open_source(runner.settings["data"], split, runner.data_dir)
            for split in ("train", "test")
        }
        percent = features.knn_accuracies(model, normalise, parts)
        with outputs.again(kept) as new:
            new.write_text(json.dumps({"layers": percent}))
    return log.read_json(kept, {"layers": list})["layers"][-1]


def figure2(runner):
    """Figure 2: attention maps (OUT/figure2.png), and how well attention separates objects."""
    s = runner.settings
    checkpoints = pretrained(runner, tokenizer_stage(runner))
    if runner.planning:
        return {}
    scenes = [sets.open_source(s["scenes"], split, runner.data_dir) for split in ("test", "val")]
    cells, notes = {}, collections.defaultdict(list)
    for seed, checkpoint in enumerate(checkpoints):
        models, normalise = attention.load_models(checkpoint, seed)
        found = attention.measure(models, normalise, *scenes, s["reference_images"])
        for name, percent, note in found:
            if name in attention.WITHOUT_NETWORK:
                cells[name] = percent  # the same for all models
            else:
                cells.setdefault(name, {"values": [[]]})["values"][0].append(percent)
            notes[name] += [note] if note else []
    flags = ["--data", s["scenes"], "--split", "test", "--out", str(runner.out / "figure2.png")]
    flags += ["--data-dir", runner.data_dir] if runner.data_dir else []
    (runner.out / "figure2.png").unlink(missing_ok=True)  # of the run that this one resumes
    attention.main([checkpoints[0], *flags])
    rows = [[name, cell, "; ".join(notes[name])] for name, cell in cells.items()]
    columns = ["ranking of the other patches", "average precision, %", "best head of each run"]
    return {"title": "Figure 2: attention separates objects", "columns": columns, "rows": rows}


EXPERIMENTS = {"summary": summary, "table 1": table1, "table 3": table3, "table 4": table4}
EXPERIMENTS |= {"grid 14": grid14, "figure 2": figure2}
EXPERIMENTS |= {"tokenizers": tokenizers, "budgets": budgets, "masks": masks}

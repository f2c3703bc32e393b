"""The whole paper in one command: tokenizer, pre-training, classification, segmentation, against random weights.

    python reproduce.py                                          # demo: drawn shapes, minutes on two cores
    python reproduce.py --recipe fashion                         # real images, 26 minutes on two cores

Every stage is one of the scripts, run as a reader would run it; its command is in OUT/commands.txt, its output in
OUT/STAGE.log, its checkpoint, numbers and pictures in OUT/STAGE/. Learning rates are chosen on the validation
split, everything reported is measured on the test split. --resume keeps the stages that are finished.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import training

HERE = Path(__file__).resolve().parent
# glibc hands freed memory back to the system and asks for it again at every step, which costs up to a third of a
# small model's time on CPUs; other C libraries ignore these.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(12 << 30),
    "MALLOC_TOP_PAD_": str(512 << 20),
}
RECIPES = {
    # name: (demo, fashion, help)
    "data": ("shapes", "fashion-mnist", "images to pre-train on and to classify"),
    "scenes": ("shapes", "fashion-scenes", "images with masks, to segment"),
    "labels": ((100,), (100, 10), "labels per class to fine-tune the classifier with"),
    "cls_epochs": ((15.0,), (10.0, 100.0), "passes over them, for equal steps"),
    "cls_batch": (40, 50, "images per step of the classifier"),
    "seg_images": (800, 200, "images with masks to fine-tune the segmenter with"),
    "seeds": (1, 3, "fine-tuning runs per row, each with labelled images of its own"),
    "cls_lr": ((1e-3,), (1e-3, 2e-3), "learning rates to choose from, for pre-trained weights"),
    "cls_lr_random": ((5e-4,), (2.5e-4, 5e-4, 1e-3, 2e-3), "and for random weights"),
    "seg_lr": ((1.6e-2,), (2e-3, 4e-3), "likewise for segmentation, pre-trained"),
    "seg_lr_random": ((8e-3,), (2e-3, 4e-3, 8e-3), "and random"),
    "longer": (0, 4, "random weights also get so many times the steps; 0: not"),
}
COLUMNS = ("demo", "fashion")


class Runner:
    """Runs stages as processes, up to `jobs` side by side, and remembers what they reported."""

    def __init__(self, out, common, jobs):
        self.out, self.common, self.jobs, self.start = out, common, jobs, time.time()

    def stage(self, name, script, *flags, threads=0):
        """Run `script` with flags into OUT/name unless that is finished; return its final record."""
        folder = self.out / name
        metrics = folder / "metrics.jsonl"
        record = (training.read_metrics(folder) or [{}])[-1] if metrics.exists() else {}
        if not record.get("final"):
            command = [sys.executable, str(HERE / script), *map(str, flags), *self.common, "--out", str(folder)]
            if (folder / "checkpoint.pt").exists():
                command.append("--resume")
            environment = {**MALLOC, **os.environ} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
            with open(self.out / "commands.txt", "a") as file:
                file.write(shlex.join(command[1:]) + "\n")
            started = time.time()
            with open(self.out / f"{name}.log", "a") as log:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
            if status:
                tail = (self.out / f"{name}.log").read_text().strip().splitlines()[-1:]
                raise ValueError(f"stage {name} ended with status {status}: {' '.join(tail)} ({self.out / name}.log)")
            record = training.read_metrics(folder)[-1]
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "final")
            elapsed = time.time() - self.start
            took = f"{elapsed // 60:3.0f}m{elapsed % 60:02.0f}s  {name:28s} {time.time() - started:4.0f} s"
            print(f"{took}  {numbers}", flush=True)
        return record

    def stages(self, calls):
        """Run independent stages side by side, one thread each: {key: (name, script, *flags)} -> {key: record}."""
        threads = 1 if self.jobs > 1 else 0
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {key: pool.submit(self.stage, *call, threads=threads) for key, call in calls.items()}
            return {key: future.result() for key, future in futures.items()}


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


def choose(runner, name, script, metric, lrs, flags):
    """The learning rate with the best `metric` on the validation split, one run each with a seed of its own."""
    if len(lrs) == 1:
        return lrs[0]
    calls = {lr: (f"{name}-lr{lr:g}", script, *flags, "--lr", lr, "--seed", 100) for lr in lrs}
    records = runner.stages(calls)
    return max(records, key=lambda lr: records[lr][metric])


def contrast(runner, name, script, metric, inits, flags, seeds, longer=()):
    """Fine-tune from each init over `seeds` seeds, on the test split: {row: (learning rate, [metric of each seed])}.

    inits: {row: (what --init takes, learning rates to choose from, further flags)}. longer: flags that make
    random weights' training longer, for a row of its own.
    """
    rates = {
        row: choose(runner, f"search-{name}-{row}", script, metric, lrs, ("--init", init, *flags, *more))
        for row, (init, lrs, more) in inits.items()
    }
    calls = {}
    for row, (init, _, more) in inits.items():
        for seed in range(seeds):
            common = (script, "--init", init, *flags, *more, "--lr", rates[row], "--seed", seed, "--eval-split", "test")
            calls[row, seed] = (f"{name}-{row}-{seed}", *common)
            if row == "random" and longer:
                calls["random, longer", seed] = (f"{name}-{row}-long-{seed}", *common, *longer)
    rows = {}
    for (row, _), record in runner.stages(calls).items():
        rate = rates.get(row, rates["random"])
        rows.setdefault(row, (rate, []))[1].append(record[metric])
    return rows


def spread(values):
    """'mean ± standard deviation' of a list, or the one value."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def reproduce(runner, settings, recipe, data_dir):
    """Run all stages; return {row of the table: what came out}."""
    common = ["--recipe", recipe]
    flags = ("--data", settings["data"], "--eval-split", "test")
    tokenizer = runner.stage("tokenizer", "train_tokenizer.py", *common, *flags)
    tokenizer_path, beit_path = (runner.out / name / "checkpoint.pt" for name in ("tokenizer", "beit"))
    beit = runner.stage("beit", "pretrain.py", *common, *flags, "--tokenizer", tokenizer_path)
    results = {"tokenizer": tokenizer, "pretraining": beit, "classification": {}, "logistic regression": {}}
    for labels, epochs in zip(settings["labels"], settings["cls_epochs"]):
        flags = (*common, "--data", settings["data"], "--labels-per-class", labels, "--epochs", epochs)
        flags += ("--warmup-epochs", epochs / 10, "--batch-size", settings["cls_batch"])
        inits = {
            "BEiT": (beit_path, settings["cls_lr"], ()),
            "random": ("random", settings["cls_lr_random"], ("--layer-decay", 1)),
        }
        longer = ("--epochs", epochs * settings["longer"]) if settings["longer"] else ()
        results["classification"][labels] = contrast(
            runner, f"cls{labels}", "finetune_cls.py", "top1", inits, flags, settings["seeds"], longer
        )
        splits = {split: data.open_source(settings["data"], split, data_dir) for split in data.SPLITS}
        results["logistic regression"][labels] = [
            logistic_regression(data.balanced_subset(splits["train"], labels, seed), splits["val"], splits["test"])
            for seed in range(settings["seeds"])
        ]
    flags = (*common, "--data", settings["scenes"], "--train-images", settings["seg_images"])
    inits = {
        "BEiT": (beit_path, settings["seg_lr"], ()),
        "random": ("random", settings["seg_lr_random"], ()),
    }
    results["segmentation"] = contrast(runner, "seg", "finetune_seg.py", "miou", inits, flags, settings["seeds"])
    return results


def table(results):
    """The results as lines of text."""
    t, b = results["tokenizer"], results["pretraining"]
    lines = [
        f"{'tokenizer':44s} reconstruction MSE {t['reconstruction_mse']:.4f}, {t['codebook_used']} codes used, "
        f"perplexity {t['codebook_perplexity']:.0f}",
        f"{'pre-training':44s} masked-token accuracy {100 * b['mim_accuracy']:.1f} % "
        f"(commonest token {100 * b['commonest_token']:.1f} %), loss {b['mim_loss']:.2f}",
        f"{'eq. 3, nats per image':44s} log p(x|z) {b['stage1_nats']:.0f}, log p(z|x~) {b['stage2_nats']:.1f}",
    ]
    for labels, rows in results["classification"].items():
        for row, (lr, values) in rows.items():
            lines.append(f"{f'top-1, {labels} labels per class, {row}':44s} {spread(values)}   (lr {lr:g})")
        pixels = spread(results["logistic regression"][labels])
        lines.append(f"{f'top-1, {labels} labels per class, raw pixels':44s} {pixels}")
    for row, (lr, values) in results["segmentation"].items():
        lines.append(f"{f'mIoU, {row}':44s} {spread(values)}   (lr {lr:g})")
    return "\n".join(lines)


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("--recipe", default="demo", choices=COLUMNS, help="what to run")
    parser.add_argument("--out", help="new folder for everything that is made; default: runs/RECIPE")
    parser.add_argument("--resume", action="store_true", help="keep the finished stages in --out, run the rest")
    parser.add_argument("--data-dir", help="where the data set's own files are, or are downloaded to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="fine-tuning runs side by side")
    args = parser.parse_args(argv)
    out = Path(args.out or f"runs/{args.recipe}")
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise ValueError(f"{out} is not empty: choose another --out, or --resume to keep its finished stages")
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: row[COLUMNS.index(args.recipe)] for name, row in RECIPES.items()}
    start = time.time()
    runner = Runner(out, ["--data-dir", args.data_dir] if args.data_dir else [], args.jobs)
    results = reproduce(runner, settings, args.recipe, args.data_dir)
    text = table(results)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    minutes = (time.time() - start) / 60
    print(f"\n{text}\n\n{minutes:.1f} minutes; pictures: {out}/*/*.png")


if __name__ == "__main__":
    with training.one_line_errors():
        main()

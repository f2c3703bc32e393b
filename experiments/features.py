"""Features of images: the mean patch output of every layer, l = 1, ..., L. e_[S] is left out.

    f^l = avg({h_i^l}, i = 1..N)                  section 2.6 classifies images by f^L

    python -m experiments.features runs/beit/checkpoint.pt --data shapes --out F.npz
    python -m experiments.features runs/beit/checkpoint.pt --data PHOTOS --split train --out F.npz
    python -m experiments.features WEIGHTS.pth --data IMAGENET --images 50000 --out F.npz

CHECKPOINT is a checkpoint.pt of pretrain.py, finetune_cls.py or finetune_seg.py, or published BEiT
weights. Images are seen as finetune_cls.py evaluates them in the small recipes: the centred square,
whole unless --eval-crop says otherwise, at the checkpoint's size. Without --split, the images are
those of train and of --eval-split. F.npz then holds

    features   float32 (n, L, D); features[:, l - 1] is f^l
    splits     (n,), the split of each image
    labels     int64 (n,), and classes, their names: only if the images have class labels
    files      (n,), paths of image files; for arrays `indices` (n,), places within the split
    config     the model's configuration and the settings of this command, as JSON

With labels and two splits, prints the k-NN accuracy of every layer: the k = 20 images of train with
the largest cosine similarity vote with equal weight; among classes with as many votes, the one with
the larger sum of similarities wins.

Runs in one process. Features stay in memory: 4 L D bytes for each image, 37 kB for `base`.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from beit import Beit, BeitConfig, load_backbone
from images import batches, sets, sources, views
from plumbing import command_line, entries, log, outputs, processes, published, signals

K = 20  # neighbours that vote
PAIRS = 2**26  # similarities computed at a time, which take a quarter of a gigabyte


# -------------------------------------------------------- features


@torch.no_grad()
def layer_means(model, x):
    """The mean patch output of every layer, in one pass: (B, 3, H, W) -> float32 (B, L, D)."""
    H, means = model.embed(x), []
    for block, bias, _ in model.layers():
        H = block(H, bias)
        means.append(H[:, 1:].float().mean(dim=1))  # e_[S] is row 0
    return torch.stack(means, dim=1)


def extract(model, source, args, normalise, process, features):
    """Fill `features`, float32 (n, L, D), with those of a source's evenly spread --images N.

    Raises ValueError if a feature is not finite.
    """
    crops = views.Crops(
        source, [(model.config.image_size, "bicubic")], train=False, centre=args.eval_crop
    )
    done = 0
    for (images,) in batches.eval_batches(crops, args, process):
        x = batches.standardise(batches.to_float(images, process.device), normalise)
        with process.autocast():
            means = layer_means(model, x)
        if not means.isfinite().all():
            raise ValueError(f"{source.name}: features are not finite: try --amp off")
        features[done : done + len(x)] = means.cpu().numpy()
        done += len(x)
        if sys.stdout.isatty():
            log.update(f"{source.name}: {done}/{len(features)} images")


def load_model(path, normalise):
    """(Beit, its kind of checkpoint, name of the pixel mean and std) of a file of weights."""
    found = published.load_pretrained(path, *entries.TRAINED, normalise=normalise)
    model = Beit(BeitConfig(**found["config"])).eval()
    load_backbone(model, found["model"])
    return model, found["kind"], found["normalise"]


# -------------------------------------------------------- k nearest neighbours


def majority(similarity, labels, classes):
    """The commonest label of each row; among several, that with the larger summed similarity.

    similarity, labels: (B, k); classes: their number. Returns int64 (B,).
    """
    zeros = similarity.new_zeros(len(similarity), classes)
    votes = zeros.scatter_add(1, labels, torch.ones_like(similarity))
    sums = zeros.scatter_add(1, labels, similarity)
    return sums.masked_fill(votes < votes.amax(dim=1, keepdim=True), -torch.inf).argmax(dim=1)


def nearest_classes(known, labels, unknown, k=K):
    """Classes of `unknown` (m, D), by vote of each one's k nearest of `known` (n, D): int64 (m,).

    Nearest: largest cosine similarity. labels: int64 (n,), of `known`. If n < k, all vote. Raises
    Stopped if a signal came.
    """
    known, classes = F.normalize(known, dim=1), int(labels.max()) + 1
    found = []
    for rows in unknown.split(max(1, PAIRS // len(known))):
        if signals.received:
            raise signals.Stopped("stopped by a signal: the features are saved, k-NN is not done")
        similarity, nearest = (F.normalize(rows, dim=1) @ known.T).topk(min(k, len(known)))
        found.append(majority(similarity, labels[nearest], classes))
    return torch.cat(found)


def accuracies(train, held_out, device):
    """k-NN accuracy in percent of every layer, l = 1, ..., L.

    train, held_out: (features float32 (n, L, D), labels int64 (n,)) as arrays.
    """
    (known, labels), (unknown, truth) = train, held_out
    labels, truth = (torch.tensor(values, device=device) for values in (labels, truth))
    percent = []
    for layer in range(known.shape[1]):
        a, b = (torch.from_numpy(f[:, layer]).to(device) for f in (known, unknown))
        hits = nearest_classes(a, labels, b) == truth
        percent.append(100 * hits.double().mean().item())
    return percent


def print_table(percent, train_labels, truth, split):
    """Print the accuracy of every layer, the first best one marked, and that of one class."""
    k, commonest = min(K, len(train_labels)), np.bincount(train_labels).argmax()
    print(
        f"k-NN accuracy in percent: {len(truth)} images of {split} by the {k} nearest of "
        f"{len(train_labels)} images of train (cosine similarity, majority vote)"
    )
    best = int(np.argmax(percent))
    for layer, value in enumerate(percent):
        print(f"layer {layer + 1:2d}  {value:5.1f}{'  best' if layer == best else ''}")
    print(f"train's commonest class everywhere  {100 * (truth == commonest).mean():.1f}")


def reason_against_knn(parts, labels):
    """Why there can be no k-NN accuracy, as a sentence; None if there can.

    parts: {split: source}; labels: {split: labels of its chosen images}, empty if there are none.
    """
    if not labels:
        name = next(source.name for source in parts.values() if source.labels is None)
        return f"{name} has no class labels: features only"
    if len(parts) == 1:
        return "features of one split only: leave out --split for k-NN accuracy"
    if (labels["train"] == labels["train"][0]).all():
        return f"all images of {parts['train'].name} are of one class: no k-NN accuracy"
    return None


def knn_accuracies(model, normalise, parts):
    """k-NN accuracy in percent of every layer: {split: source} of train and one more, all images.

    The model's evaluation views, in float32.
    """
    args = SimpleNamespace(eval_images=sys.maxsize, eval_crop=1.0, batch_size=64, accumulate=1,
                           workers=None)  # fmt: skip
    found = []
    for source in parts.values():
        rows = np.empty((len(source), model.config.depth, model.config.dim), np.float32)
        extract(model, source, args, normalise, processes.Process(), rows)
        found.append((rows, source.labels))
    return accuracies(*found, torch.device("cpu"))


# -------------------------------------------------------- the command


def parse(argv):
    """The command line. Exits with status 2 on bad input."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint.pt, or published BEiT weights")
    add("--data", required=True, help="data set: a name or a path (docs/data.md)")
    add("--data-dir", help="folder with the data set's own files, or where to download them to")
    add("--out", required=True, help="new .npz file")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--split", choices=sources.SPLITS, help="only this split, without k-NN")
    help_text = "split that k-NN classifies by the images of train"
    either.add_argument("--eval-split", default="val", choices=("val", "test"), help=help_text)
    help_text = "at most this many images of each split, evenly spread; default: all"
    images = {"dest": "eval_images", "default": sys.maxsize}
    command_line.add_number(parser, "--images", int, "[1, 1e9]", help_text, **images)
    help_text = "share of the short side to see; 0.875 is the paper's below 384 pixels"
    command_line.add_number(parser, "--eval-crop", float, "[0.1, 1]", help_text, default=1.0)
    command_line.add_normalise_flag(parser)
    add("--device", default="auto", help="auto, cpu or cuda")
    help_text = "autocast precision; auto is bf16 where the hardware has it, else off"
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help=help_text)
    batch = "images per pass"
    command_line.add_number(parser, "--batch-size", int, "[1, 1e6]", batch, default=64)
    help_text = "loader processes; auto: one per core for image files, none for arrays"
    add("--workers", type=command_line.workers, default="auto", help=help_text)
    parser.set_defaults(accumulate=1)  # eval_batches divides the batch by it
    return parser.parse_args(argv)


def check_run(args):
    """Raise ValueError if --out cannot be a new file, or if there are several processes."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        raise ValueError(f"features run in one process, not {count}: start them without torchrun")
    outputs.check_new(args.out, args.data, (".npz",))


def open_parts(args):
    """{split: source} of --split, or of train and --eval-split with the same class numbers."""
    splits = [args.split] if args.split else ["train", args.eval_split]
    try:
        parts = {split: sets.open_source(args.data, split, args.data_dir) for split in splits}
    except sources.NoSplit as error:
        raise ValueError(f"{error}; --split SPLIT takes the images of one split only") from error
    first, *others = parts.values()
    for source in others:
        if source.labels is not None and first.labels is not None:
            sources.check_names(source.classes, first.classes, source)
    return parts


def labels_of(parts, chosen):
    """{split: int64 labels of its chosen images}; empty if a split has none.

    chosen: {split: indices}.
    """
    if any(source.labels is None for source in parts.values()):
        return {}
    return {split: source.labels[chosen[split]] for split, source in parts.items()}


def describe(parts, chosen, labels):
    """What F.npz says about the images beside their features: {name: array}."""
    found = {"splits": np.repeat(list(parts), [len(indices) for indices in chosen.values()])}
    if labels:
        found["labels"] = np.concatenate(list(labels.values()))
        found["classes"] = np.array(next(iter(parts.values())).classes, dtype=str)
    if all(isinstance(source, sources.Files) for source in parts.values()):
        found["files"] = np.array(
            [str(source.paths[i]) for split, source in parts.items() for i in chosen[split]]
        )
    else:
        found["indices"] = np.concatenate(list(chosen.values()))
    return found


def save(out, arrays):
    """Write a new .npz file, which appears when it is complete."""
    with outputs.new(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def main(argv=None):
    """Write F.npz and print the table of k-NN accuracies."""
    args = parse(argv)
    check_run(args)
    process, parts = processes.setup(args.device, args.amp), open_parts(args)
    model, kind, normalise = load_model(args.checkpoint, args.normalise)
    model.to(process.device)
    config, start = model.config, time.monotonic()
    chosen = {
        split: np.array(batches.spread(len(source), args.eval_images))
        for split, source in parts.items()
    }
    labels = labels_of(parts, chosen)
    log.note(
        f"{kind} checkpoint, {config.depth} layers of {config.dim} features; "
        f"centred squares of {config.image_size}x{config.image_size} pixels, mean and std "
        f"{normalise!r}; {', '.join(f'{len(c)} images of {split}' for split, c in chosen.items())}"
    )
    # One array for all splits, and a view of each one's rows: the features are large.
    total = sum(map(len, chosen.values()))
    outputs.check_room(args.out, 4 * total * config.depth * config.dim)
    features = np.empty((total, config.depth, config.dim), np.float32)
    ends = np.cumsum([len(indices) for indices in chosen.values()])
    rows = dict(zip(parts, np.split(features, ends[:-1])))
    for split, source in parts.items():
        extract(model, source, args, normalise, process, rows[split])
    settings = {name: getattr(args, name) for name in ("checkpoint", "data", "eval_crop", "amp")}
    settings = asdict(config) | settings | {"kind": kind, "normalise": normalise}
    arrays = {"features": features, **describe(parts, chosen, labels)}
    save(args.out, arrays | {"config": json.dumps(settings)})
    log.note(f"{args.out}: features {features.shape} in {time.monotonic() - start:.0f} s")
    reason = reason_against_knn(parts, labels)
    if reason:
        log.note(reason)
        return
    train, held_out = ((rows[split], labels[split]) for split in parts)
    percent = accuracies(train, held_out, process.device)
    print_table(percent, labels["train"], labels[args.eval_split], args.eval_split)


if __name__ == "__main__":
    with command_line.one_line_errors(stoppable=True, full="lower --batch-size or --images"):
        main()

"""Views with class labels for classification (section 2.6), and mixtures of them (appendix)."""

import math

import torch

from images import augment, sets, sources, views
from plumbing import log, noise


class LabelledViews(views.Crops):
    """A batch of keys (epoch, index) gives uint8 images (B, 3, S, S) and int64 labels (B,).

    Training: random crop and flip, then RandAugment and random erasing. Evaluation: the centred
    square; below 384 pixels its side is --eval-crop of the short side, from 384 on all of it. args:
    the flags of finetune_cls. normalise: a key of batches.NORMALISE, whose mean fills what
    RandAugment's warps leave empty. Raises ValueError if the source has no labels or one class, or
    a label is not below `classes`.
    """

    def __init__(self, args, source, classes, train, normalise="half"):
        if source.labels is None:
            raise ValueError(f"{source.name}: it has no class labels")
        if classes < 2:
            raise ValueError(
                f"{source.name}: its images are of one class ({', '.join(source.classes)}): a "
                "classifier needs two"
            )
        largest = source.labels.max()
        if largest >= classes:
            raise ValueError(
                f"{source.name}: label {largest} is out of range for {classes} classes"
            )
        super().__init__(
            source,
            [(args.image_size, "bicubic")],
            train,
            args.seed,
            args.min_crop,
            args.flip,
            centre=1.0 if args.image_size >= 384 else args.eval_crop,
            labels=True,
        )
        self.randaugment, self.erasing = args.randaugment, args.erasing
        self.fill = augment.mean_colour(normalise)

    def __getitem__(self, keys):
        images, labels = super().__getitem__(keys)
        if self.train and (self.randaugment or self.erasing):
            for index, key in enumerate(keys):
                rng = noise.sample_rng(self.seed, *key, "augment")
                if self.randaugment:
                    images[index] = augment.randaugment(
                        images[index], self.randaugment, rng, self.fill
                    )
                if rng.random() < self.erasing:
                    augment.erase(images[index], rng)
        return [images, labels]


def mix(x, targets, mixup, cutmix, rng):
    """Mixup or cutmix of each image with its neighbour: x (B, 3, H, W), targets (B, C).

    lambda ~ Beta(alpha, alpha), one for the step, is the image's own share: of every pixel (mixup),
    or of the area, outside a pasted box (cutmix; recomputed after the box is cut at the border).
    Neighbours are 0 and 1, 2 and 3, ...; with an odd number of images in each process, the pairs
    differ from those of one process.
    """
    if not mixup and not cutmix:
        return x, targets
    # An odd last image is its own neighbour.
    neighbour = (torch.arange(len(x), device=x.device) ^ 1).clamp_max(len(x) - 1)
    if cutmix and (not mixup or rng.random() < 0.5):
        share = rng.betavariate(cutmix, cutmix)
        H, W = x.shape[-2:]
        h, w = H * math.sqrt(1 - share), W * math.sqrt(1 - share)
        cy, cx = rng.random() * H, rng.random() * W
        top, bottom = max(round(cy - h / 2), 0), min(round(cy + h / 2), H)
        left, right = max(round(cx - w / 2), 0), min(round(cx + w / 2), W)
        share = 1 - (bottom - top) * (right - left) / (H * W)
        pasted, x = x[neighbour, :, top:bottom, left:right], x.clone()
        x[:, :, top:bottom, left:right] = pasted
    else:
        share = rng.betavariate(mixup, mixup)
        x = share * x + (1 - share) * x[neighbour]
    return x, share * targets + (1 - share) * targets[neighbour]


def open_sets(args, normalise):
    """(training set, held-out set, class names) of --data, for the flags of finetune_cls."""
    source = sets.open_source(args.data, "train", args.data_dir)
    held_out = sets.open_source(args.data, args.eval_split, args.data_dir)
    classes = source.classes
    train_set = LabelledViews(args, source, len(classes), True, normalise)
    if args.labels_per_class:
        train_set.source = sources.balanced_subset(source, args.labels_per_class, args.seed)
        log.note(f"training on {len(train_set):,} of {len(source):,} images (--labels-per-class)")
    sources.check_names(held_out.classes, classes, held_out)
    held_out_set = LabelledViews(args, held_out, len(classes), False, normalise)
    return train_set, held_out_set, classes


def open_held_out(args, normalise, names, count):
    """The held-out set of --data for a classifier of `count` classes.

    names: of its classes, or None (published weights): then the data must have `count` classes.
    Raises ValueError if the data has other classes.
    """
    held_out = sets.open_source(args.data, args.eval_split, args.data_dir)
    names = names or held_out.classes
    if len(names) != count or len(held_out.classes) > count:
        raise ValueError(
            f"{args.init} was trained on {count} classes, {args.data} has {len(held_out.classes)}"
        )
    held_out_set = LabelledViews(args, held_out, count, False, normalise)
    sources.check_names(held_out.classes, names, held_out)
    return held_out_set

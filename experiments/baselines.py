"""Baselines without a network: logistic regression on pixels, and one class for every pixel."""

import numpy as np
import torch
import torch.nn.functional as F

import finetune_seg
from experiments import costs
from images import batches, masked, sets, sources

PENALTIES = 1e-4, 1e-3, 1e-2, 1e-1
LARGEST = 32  # pixels along a side for logistic regression; larger images are resized


def logistic_regression(train, val, test):
    """Test accuracy in percent of multinomial logistic regression on raw pixels.

    train, val, test: sources with class labels. The L2 penalty of PENALTIES is chosen on `val`.
    """

    def pixels(source):
        images = torch.from_numpy(np.array(source.images)).float() / 255
        if images.shape[1] > LARGEST:  # photographs
            images = images.permute(0, 3, 1, 2)
            images = F.interpolate(images, (LARGEST, LARGEST), mode="bicubic", antialias=True)
        return images.flatten(1), torch.tensor(source.labels)  # grey images: one channel

    def fit(x, y, penalty):
        """Weights (pixels + 1, classes) for pixels x (n, pixels), labels y (n,); row 0: biases."""
        weight = torch.zeros(x.shape[1] + 1, len(train.classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = x @ weight[1:] + weight[0]
            loss = F.cross_entropy(logits, y) + penalty * weight[1:].pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach()

    def accuracy(weight, x, y):
        return 100 * ((x @ weight[1:] + weight[0]).argmax(1) == y).float().mean().item()

    known, held_out = pixels(train), pixels(val)
    fits = [fit(*known, penalty) for penalty in PENALTIES]
    best = max(fits, key=lambda weight: accuracy(weight, *held_out))
    return accuracy(best, *pixels(test))


def raw_pixels(runner, labels):
    """Logistic regression on each seed's labelled images: {"values": [accuracies in percent]}.

    labels: per class; 0: all of them, fitted once.
    """
    if runner.planning:
        return {"values": [[0.0]]}
    data, data_dir = runner.settings["data"], runner.data_dir
    train, val, test = (sets.open_source(data, split, data_dir) for split in sources.SPLITS)
    subsets = [train]
    if labels:
        seeds = range(runner.settings["seeds"])
        subsets = [sources.balanced_subset(train, labels, seed) for seed in seeds]
    return {"values": [[logistic_regression(subset, val, test) for subset in subsets]]}


def commonest_class(runner):
    """mIoU in percent of predicting the commonest class of the test images for every pixel.

    Measured on the same test images as the segmenters, resized in the same way.
    """
    if runner.planning:
        return 0.0
    test = sets.open_source(runner.settings["scenes"], "test", runner.data_dir)
    args, classes = costs.settings("segmentation", runner.recipe), len(test.mask_classes)
    seen = masked.MaskedImages(args, test, classes, "half", train=False)
    shown = batches.spread(len(test), args.eval_images)
    masks = (seen[[(-1, index)]][1] for index in shown)
    counts = sum(m[m != sources.IGNORE].bincount(minlength=classes) for m in masks)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    matrix[:, counts.argmax()] = counts  # row: true class; column: the class that is predicted
    return finetune_seg.mean_iou(matrix)[0]

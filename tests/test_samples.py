"""What a batch holds: the order of samples, subsets, pixel ranges, crops, flips and scales."""

import random

import numpy as np
import pytest
import torch

import finetune_cls
import finetune_seg
from images import augment, batches, labelled, masked, named, sources, views
from plumbing import command_line

# -------------------------------------------------------- order and subsets


def orders(seed, size=40, epochs=2):
    """The indices of each epoch, in batches of 8."""
    sampler = batches.StepBatches(size, 8, 0, 1, seed, 0, 5 * epochs)
    keys = [key for batch in sampler for key in batch]
    return [[index for of, index in keys if of == epoch] for epoch in range(epochs)]


def test_each_epoch_is_another_permutation():
    """Every image once an epoch, in an order that depends on epoch and seed."""
    first, second = orders(0)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != sorted(first) and first != second and first != orders(5)[0]


def test_balanced_subset_draws_by_the_seed():
    """The same number of different images of each class, others with another seed."""
    images, labels = np.zeros((60, 4, 4, 3), np.uint8), np.arange(60) % 3
    source = sources.Arrays("sixty", images, labels, classes=["a", "b", "c"])
    source.numbers = np.arange(60)
    found = [sources.balanced_subset(source, 10, seed) for seed in (0, 0, 1)]
    for subset in found:
        assert np.bincount(subset.labels).tolist() == [10, 10, 10]
        assert len(set(subset.numbers)) == 30 and (subset.numbers % 3 == subset.labels).all()
    chosen = [subset.numbers.tolist() for subset in found]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] != list(range(30))


def test_random_subset_draws_by_the_seed():
    """Different images, others with another seed."""
    source = sources.Arrays("sixty", np.zeros((60, 4, 4, 3), np.uint8))
    source.numbers = np.arange(60)
    chosen = [sources.random_subset(source, 20, seed).numbers.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] != list(range(20))
    assert all(len(set(numbers)) == 20 for numbers in chosen)


def test_splits_of_garments(monkeypatch):
    """train and val are the first 55,000 and the last 5,000 of one file; test is the other."""
    files = {"train": np.zeros((60_000, 28, 28), np.uint8), "t10k": np.ones((10, 28, 28), np.uint8)}
    files["train"][55_000:] = 2
    labels = {"train": np.arange(60_000) % 10, "t10k": np.arange(10)}
    found = {f"{n}-images-idx3-ubyte": a for n, a in files.items()}
    found |= {f"{n}-labels-idx1-ubyte": a for n, a in labels.items()}
    monkeypatch.setattr(named, "read_idx", lambda name, data_dir: found[name])
    for split, count, value in (("train", 55_000, 0), ("val", 5000, 2), ("test", 10, 1)):
        source = named.fashion_mnist(split)
        assert len(source) == len(source.labels) == count and set(source.images.flat) == {value}
    assert named.fashion_mnist("val").labels[:3].tolist() == [0, 1, 2]


def test_scenes_of_garments_by_hand(monkeypatch):
    """Garments that are a bright square in a dim margin: one in each quarter, masked by class."""
    garment = np.full((28, 28), 10, np.uint8)
    garment[8:20, 10:22] = 200
    source = sources.Arrays("four", np.stack([garment] * 4), np.array([3] * 4))
    monkeypatch.setattr(named, "fashion_mnist", lambda split, data_dir: source)
    monkeypatch.setitem(named.SCENES_COUNT, "val", 5)
    scenes = named.fashion_scenes("val")
    images, masks = np.asarray(scenes.images), np.asarray(scenes.masks)
    assert set(np.unique(images)) == {0, 200} and set(np.unique(masks)) == {0, 4}
    assert ((masks == 4) == (images.reshape(masks.shape[0], 56, 56, -1)[..., 0] == 200)).all()
    assert ((masks == 4).sum((1, 2)) == 4 * 144).all()
    assert not (masks[0] == masks[1]).all()


# -------------------------------------------------------- pixels


def test_standardise_by_hand():
    """(x - mean) / std of each channel, with the published means; and back."""
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    half, imagenet = (batches.standardise(x, name).flatten() for name in ("half", "imagenet"))
    assert torch.allclose(half, torch.tensor([-1.0, 0, 1]))
    expected = [-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert torch.allclose(imagenet, torch.tensor(expected))
    for name, y in (("half", half), ("imagenet", imagenet)):
        assert torch.allclose(batches.unstandardise(y.view(1, 3, 1, 1), name), x, atol=1e-6)


def test_colour_jitter_by_hand():
    """Brightness, then contrast about the mean grey, then saturation about each pixel's grey."""
    x = torch.rand(1, 3, 4, 5) * 0.4 + 0.2
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    bright = 1.2 * x
    grey = (weights * bright).sum(1, keepdim=True)
    contrast = grey.mean() + 0.9 * (bright - grey.mean())
    grey = (weights * contrast).sum(1, keepdim=True)
    expected = grey + 1.3 * (contrast - grey)
    found = augment.colour_jitter(x, torch.tensor([[1.2, 0.9, 1.3]]))
    assert torch.allclose(found, expected, atol=1e-5)


# -------------------------------------------------------- crops and flips of one image


def numbered(height, width):
    """An image source of one picture, (1, H, W, 3): red is its row, green its column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)[None]


def test_crops_have_the_areas_and_shapes_of_the_paper():
    """2,000 boxes: area shares up to 0.2 and 1, sides from 3:4 to 4:3, all over the image."""
    source = sources.Arrays("one", numbered(100, 160))
    crops = views.Crops(source, [(24, "bicubic")], True, 0, 0.2, True, 0.4)
    drawn = [crops.draw((epoch, 0), 100, 160) for epoch in range(2000)]
    boxes = np.array([box for box, _, _ in drawn], dtype=float)
    top, left, height, width = boxes.T
    share, aspect = height * width / 16_000, width / height
    assert 0.19 < share.min() < 0.22 and share.max() > 0.75
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37
    assert top.min() == left.min() == 0
    assert (top + height).max() == 100 and (left + width).max() == 160
    assert 0.45 < np.mean([flip for _, flip, _ in drawn]) < 0.55
    factors = np.array([factors for _, _, factors in drawn])  # (2000, 3)
    assert factors.min() < 0.62 and factors.max() > 1.38 and 0.6 <= factors.min()
    assert factors.max() <= 1.4 and abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.1


def test_a_flip_mirrors_left_and_right():
    """A square image that fills the view: as it is or mirrored, and never without --flip."""
    source = sources.Arrays("one", numbered(24, 24))
    for flip, count in ((True, 2), (False, 1)):
        crops = views.Crops(source, [(24, "bicubic")], True, 0, 1.0, flip)
        found = {tuple(crops[[(epoch, 0)]][0][0, 1, 0].tolist()) for epoch in range(30)}
        assert len(found) == count and tuple(range(24)) in found
        rows = {tuple(crops[[(epoch, 0)]][0][0, 0, :, 0].tolist()) for epoch in range(30)}
        assert rows == {tuple(range(24))}


# -------------------------------------------------------- segmentation


def seg_arguments(*flags):
    """finetune_seg's arguments without any augmentation, and with these flags."""
    parser = command_line.recipe_parser("", finetune_seg.RECIPES)
    command_line.add_init_flags(parser)
    common = ["--init", "random", "--image-size", "8", "--no-flip", "--out", "out", *flags]
    return command_line.parse_recipe(parser, finetune_seg.RECIPES, common)


def seg_samples(source, count, *flags, classes=2):
    """(images, masks) of `count` epochs of a source of one image, in training."""
    samples = masked.MaskedImages(seg_arguments(*flags), source, classes, "half", True)
    return [torch.cat(parts) for parts in zip(*(samples[[(epoch, 0)]] for epoch in range(count)))]


def test_segmentation_flips_left_and_right_or_not():
    """The image's columns of one row and its mask, with and without --flip."""
    mask = (np.arange(64).reshape(1, 8, 8) % 2).astype(np.uint8)
    source = sources.Arrays("one", numbered(8, 8), masks=mask, mask_classes=["a", "b"])
    for flags, count in ((["--flip"], 2), ([], 1)):
        images, masks = seg_samples(source, 20, *flags)
        assert len(images[:, 1, 0].unique(dim=0)) == count
        assert torch.equal(images[:, 0, :, 0], torch.arange(8).expand(20, 8))
        assert torch.equal(masks, images[:, 1] % 2)


def test_segmentation_crops_lie_all_over_the_image():
    """Corners of 300 crops of 8 x 8 from 12 x 20 pixels."""
    mask = (np.arange(240).reshape(1, 12, 20) % 2).astype(np.uint8)
    source = sources.Arrays("one", numbered(12, 20), masks=mask, mask_classes=["a", "b"])
    images, _ = seg_samples(source, 300)
    assert images[:, 0, 0, 0].unique().tolist() == list(range(5))
    assert images[:, 1, 0, 0].unique().tolist() == list(range(13))


def test_segmentation_crops_avoid_a_single_class():
    """A half image of class 1: hardly a crop has more than 75 % of it; ignored pixels count not."""
    mask = np.zeros((1, 8, 64), np.uint8)
    mask[..., 32:] = 1
    for ignored in (False, True):
        if ignored:  # now most pixels of every crop are ignored
            mask[:, 2:] = sources.IGNORE
        source = sources.Arrays("one", numbered(8, 64), masks=mask, mask_classes=["a", "b"])
        _, masks = seg_samples(source, 100)
        both = [len(set(m.unique().tolist()) - {sources.IGNORE}) == 2 for m in masks]
        assert sum(both) > 45  # about 60 are expected; of crops drawn once, 12


def test_segmentation_scales_in_training_only(monkeypatch):
    """Sizes that images are resized to, with factors from 0.5 to 2."""
    sizes = []
    monkeypatch.setattr(masked, "resize", lambda i, m, *size: (sizes.append(size), (i, m))[1])
    mask = (np.arange(256).reshape(1, 16, 16) % 2).astype(np.uint8)
    source = sources.Arrays("one", numbered(16, 16), masks=mask, mask_classes=["a", "b"])
    seg_samples(source, 100, "--min-scale", "0.5", "--max-scale", "2")
    heights = [height for height, _ in sizes]
    assert 8 <= min(heights) < 11 and 29 < max(heights) <= 32 and len(set(heights)) > 12
    sizes.clear()
    args = seg_arguments("--min-scale", "0.5", "--max-scale", "2")
    held_out = masked.MaskedImages(args, source, 2, "half", False)
    assert held_out[[(-1, 0)]][0].shape == (1, 3, 16, 16) and sizes == [(16, 16)]


def test_segmentation_resizes_with_antialiasing_and_masks_by_nearest_pixel():
    """Parts of a chessboard: the image becomes grey, the mask takes the pixel in the middle.

    Of nine in four parts that is 1.125, 3.375, ... from the left, so bilinear values are others.
    """
    image = torch.zeros(1, 3, 9, 9)
    image[..., ::2, ::2] = image[..., 1::2, 1::2] = 200.0
    mask = (torch.arange(81.0) ** 2 % 7).view(1, 1, 9, 9)
    small, few = masked.resize(image, mask, 4, 4)
    assert (small - 100).abs().max() < 25
    assert torch.equal(few[0, 0], mask[0, 0, 1::2, 1::2])


def test_segmentation_varies_colours_in_the_range_of_pixels():
    """--photometric changes grey levels, which stay in 0..255 and near the image's."""
    mask = (np.arange(64).reshape(1, 8, 8) % 2).astype(np.uint8)
    image = np.full((1, 8, 8, 3), 120, np.uint8)
    source = sources.Arrays("one", image, masks=mask, mask_classes=["a", "b"])
    images, masks = seg_samples(source, 60, "--photometric")
    levels = images.float().mean((2, 3))
    assert len(levels.unique(dim=0)) > 20 and 40 < levels.mean() < 200 and (levels > 20).all()
    assert torch.equal(masks, torch.from_numpy(mask).expand(60, 8, 8))


def test_colours_of_background_and_ignored_pixels():
    """Class 0 is black and IGNORE white, other classes neither."""
    found = masked.colours(torch.tensor([[[0, sources.IGNORE, 1, 2]]]))[0, :, 0]  # (3, 4)
    assert torch.equal(found[:, :2], torch.tensor([[0.0, 1], [0, 1], [0, 1]]))
    assert len(found.T.unique(dim=0)) == 4


def test_centre_of_a_tall_image():
    """The centred square of 5 x 9 numbered pixels."""
    image = torch.arange(45).view(1, 9, 5)
    assert torch.equal(masked.centre(image, 3)[0, :, 0], image[0, 3:6, 1])


# -------------------------------------------------------- classification


def cls_arguments(*flags):
    """finetune_cls's arguments with these flags."""
    parser = command_line.recipe_parser("", finetune_cls.RECIPES)
    command_line.add_init_flags(parser)
    common = ["--init", "random", "--image-size", "24", "--no-flip", "--out", "out", *flags]
    return command_line.parse_recipe(parser, finetune_cls.RECIPES, common)


def test_evaluation_takes_the_whole_square_from_384_pixels_on():
    """A grey image with a white border, which the crop of 224/256 leaves out below 384."""
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    image[:, 3:-3, 3:-3] = 100
    source = sources.Arrays("bordered", image, np.zeros(1, np.int64), classes=["a", "b"])
    for size, whole in ((380, False), (384, True)):
        args = cls_arguments("--image-size", str(size), "--eval-crop", "0.875")
        pixels, _ = labelled.LabelledViews(args, source, 2, False)[[(-1, 0)]]
        assert pixels.shape == (1, 3, size, size) and (pixels[0, 0, 0, 0] > 200) == whole


def test_a_label_beyond_the_classes_is_refused():
    """Two classes have the labels 0 and 1."""
    source = sources.Arrays("three", np.zeros((3, 24, 24, 3), np.uint8), np.arange(3))
    with pytest.raises(ValueError, match="label 2 is out of range for 2 classes"):
        labelled.LabelledViews(cls_arguments(), source, 2, True)


def flat_source(value=120):
    """Two images of one grey level."""
    images = np.full((2, 24, 24, 3), value, np.uint8)
    return sources.Arrays("two", images, np.array([0, 1]), classes=["a", "b"])


def test_erasing_has_its_probability_and_its_shapes():
    """Random erasing of 400 images: about a quarter of them, in rectangles all over the image."""
    args = cls_arguments("--erasing", "0.25")
    samples = labelled.LabelledViews(args, flat_source(), 2, True, "half")
    changed = []
    for epoch in range(400):
        images, _ = samples[[(epoch, 0)]]
        changed.append((images[0] != 120).any(0))
    erased = [c for c in changed if c.any()]
    assert 70 < len(erased) < 130
    rows, columns = zip(*((c.any(1).sum().item(), c.any(0).sum().item()) for c in erased))
    share = np.array([c.float().mean().item() for c in erased])
    assert share.min() < 0.06 and 0.25 < share.max() < 0.4
    assert any(r > 1.5 * c for r, c in zip(rows, columns))
    assert any(c > 1.5 * r for r, c in zip(rows, columns))
    corners = {tuple(c.nonzero()[0].tolist()) for c in erased}
    assert len(corners) > 20


def test_nothing_is_augmented_in_evaluation():
    """Every augmentation switched on: held-out images are as they are."""
    args = cls_arguments("--erasing", "1", "--randaugment", "9", "--flip")
    samples = labelled.LabelledViews(args, flat_source(), 2, False, "half")
    images, labels = samples[[(-1, 0), (-1, 1)]]
    assert (images == 120).all() and labels.tolist() == [0, 1]


def test_images_of_a_batch_are_augmented_each_by_its_own_key():
    """Two equal images in one batch differ after erasing; the first is the same alone."""
    args = cls_arguments("--erasing", "1")
    samples = labelled.LabelledViews(args, flat_source(), 2, True, "half")
    images, _ = samples[[(0, 0), (0, 1)]]
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[:1], samples[[(0, 0)]][0])


def test_mixup_follows_alpha_and_takes_turns_with_cutmix():
    """Shares near a half or near 0 and 1 as Beta(alpha, alpha) has them; each kind half the time.

    Image n has the value n everywhere, so cutmix leaves whole numbers and mixup does not.
    """

    def shares(alpha):
        x, draws = torch.rand(2, 3, 8, 8), map(random.Random, range(100))
        mixed = (labelled.mix(x, torch.eye(2), alpha, 0, rng) for rng in draws)
        return np.array([targets[0, 0].item() for _, targets in mixed])

    assert np.abs(shares(1000) - 0.5).max() < 0.1
    assert np.abs(shares(0.01) - 0.5).mean() > 0.45
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    mixed = (labelled.mix(x, torch.eye(2), 1, 1, random.Random(seed))[0] for seed in range(400))
    assert 160 < sum(torch.equal(values, values.round()) for values in mixed) < 240

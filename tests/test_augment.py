"""RandAugment against Pillow, photometric distortion against colorsys, padding and size."""

import argparse
import colorsys
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from images import augment, batches, labelled, masked, sources


def photo(seed, height, width):
    """A smooth random uint8 image (3, H, W) that reaches 0 and 255, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 5, 6, generator=generator)
    x = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    x = 128 + 60 * x + 8 * torch.randn(x.shape, generator=generator)
    return x.round().clamp(0, 255).byte()


def photos():
    """Images of several shapes: photos, one half black, one with a channel of one value."""
    images = [
        photo(seed, *size) for seed, size in enumerate([(48, 48), (37, 61), (64, 40), (9, 9)])
    ]
    half_black = photo(5, 48, 48)
    half_black[:, :24] = 0
    flat = photo(6, 30, 30)
    flat[1] = 77
    return [*images, half_black, flat]


# -------------------------------------------------------- RandAugment without Pillow


def equalised_channel(values):
    """Histogram equalisation of a list of values as Pillow documents it, one value at a time."""
    counts = [values.count(level) for level in range(256)]
    used = [count for count in counts if count]
    step = (len(values) - used[-1]) // 255
    if len(used) == 1 or step == 0:
        return values
    table, n = [], step // 2
    for count in counts:
        table.append(min(n // step, 255))
        n += count
    return [table[value] for value in values]


def test_equalise_against_a_histogram_loop():
    """equalise against a plain Python loop over the histogram of each channel: equal."""
    for image in photos():
        ours = augment.equalise(image)
        for channel, found in zip(image, ours):
            assert found.flatten().tolist() == equalised_channel(channel.flatten().tolist())
    half_black = torch.zeros(3, 40, 40, dtype=torch.uint8)
    half_black[:, 20:] = 200
    assert set(augment.equalise(half_black).unique().tolist()) == {0, 255}


def test_warps_against_exact_moves():
    """Moves by whole pixels and quarter turns against slices and rot90; both ends of a shear."""
    x = photo(0, 40, 40)
    fill = (1, 2, 3)
    outside = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40)
    left = torch.cat((x[:, :, 10:], outside[:, :, :10]), 2)
    assert torch.equal(augment.shift(x, 0.25, 0, fill), left)
    down = torch.cat((outside[:, :10], x[:, :-10]), 1)
    assert torch.equal(augment.shift(x, 0, -0.25, fill), down)
    for turns in (0, 1, 2, 3):
        turned = augment.rotate(x, 90 * turns, fill).int()
        assert (turned - torch.rot90(x, turns, (1, 2)).int()).abs().max() <= 1
    # Row y moves by (y + 1/2) / 4 pixels: by half a pixel at y = 3/2, not at all at the top edge.
    sheared = augment.shear(x, 0.25, 0, fill)
    assert torch.equal(sheared[:, 39, -9:], outside[:, 0, :9])
    assert not torch.equal(sheared[:, 0, -1:], outside[:, 0, :1])
    assert (sheared[:, 0].float() - x[:, 0].float()).abs().mean() < 8


def test_randaugment_operations_keep_the_range_and_do_something():
    """Every operation keeps shape and type and changes a noise image; a seed fixes randaugment."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(20, 200, (3, 24, 24), dtype=torch.uint8, generator=generator)
    before = image.clone()
    fill = augment.mean_colour("half")
    for operation in augment.OPERATIONS:
        for strength in (0.0, 0.5, 1.0):
            for sign in (-1, 1):
                y = operation(image, strength, sign, fill)
                assert y.shape == image.shape and y.dtype == torch.uint8
        assert not torch.equal(operation(image, 0.7, 1, fill), image)
    again = [augment.randaugment(image, 9, random.Random(s), fill) for s in (1, 1)]
    assert torch.equal(*again) and torch.equal(image, before)


def test_randaugment_draws_two_operations_and_their_strength(monkeypatch):
    """Each of two draws is applied in half of 2,000 cases, in one of two signs, as strong as said.

    At magnitude 10 half of the strengths would be above 1, and are 1.
    """
    applied = []

    def watched(image, strength, sign, fill):
        applied.append((strength, sign))
        return image

    monkeypatch.setattr(augment, "OPERATIONS", [watched])
    for magnitude, expected in ((9, 0.9), (10, 0.98)):
        applied.clear()
        for seed in range(2000):
            augment.randaugment(None, magnitude, random.Random(seed), (0, 0, 0))
        strengths, signs = np.array(applied).T
        assert 1800 < len(applied) < 2200 and abs(signs.mean()) < 0.1
        assert strengths.mean() == pytest.approx(expected, abs=0.005)
        assert 0.02 < strengths.std() < 0.06 and strengths.max() <= 1


def test_erased_rectangles_are_noise_in_every_channel():
    """Of a black image: the erased values spread over 0..255, each channel with its own."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    augment.erase(image, random.Random(0))
    values = image[:, (image > 0).any(0)].float()  # (3, erased)
    assert values.shape[1] > 20 and (values.std(1) > 60).all()
    assert (values.mean(1) - 127.5).abs().max() < 40
    assert len(values.unique(dim=0)) == 3


def test_fill_is_the_rounded_mean():
    """The colour of empty places: timm's values for both names, and what a full shift leaves."""
    assert augment.mean_colour("half") == (128, 128, 128)
    assert augment.mean_colour("imagenet") == (124, 116, 104)
    flags = {"image_size": 12, "seed": 0, "min_crop": 1.0, "flip": False, "eval_crop": 1.0}
    args = argparse.Namespace(**flags, randaugment=9, erasing=0.0)
    images = np.zeros((60, 12, 12, 3), np.uint8)
    source = sources.Arrays("black", images, labels=np.arange(60) % 2)
    for name in ("half", "imagenet"):
        dataset = labelled.LabelledViews(args, source, 2, True, name)
        pixels, _ = dataset[[(0, i) for i in range(60)]]
        assert [*augment.mean_colour(name)] in pixels.movedim(1, -1).reshape(-1, 3).tolist()


# -------------------------------------------------------- RandAugment against Pillow

BICUBIC = 3  # Pillow's number of the filter


def pillow_operations(fill):
    """OPERATIONS by Pillow, called as timm's "increasing" operations call it: (image, m, s)."""
    ops = pytest.importorskip("PIL.ImageOps")
    enhance = pytest.importorskip("PIL.ImageEnhance")

    def affine(image, *matrix):
        return image.transform(image.size, 0, matrix, BICUBIC, fillcolor=fill)

    def solarise_add(image, amount):
        return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * 3)

    def enhanced(kind):
        return lambda x, m, s: kind(x).enhance(max(0.1, 1 + 0.9 * m * s))

    return [
        lambda x, m, s: ops.autocontrast(x),
        lambda x, m, s: ops.equalize(x),
        lambda x, m, s: ops.invert(x),
        lambda x, m, s: x.rotate(30 * m * s, BICUBIC, fillcolor=fill),
        lambda x, m, s: ops.posterize(x, max(1, 4 - int(m * 4))),
        lambda x, m, s: ops.solarize(x, 256 - min(256, int(m * 256))),
        lambda x, m, s: solarise_add(x, min(128, int(m * 110))),
        enhanced(enhance.Color),
        enhanced(enhance.Contrast),
        enhanced(enhance.Brightness),
        enhanced(enhance.Sharpness),
        lambda x, m, s: affine(x, 1, 0.3 * m * s, 0, 0, 1, 0),
        lambda x, m, s: affine(x, 1, 0, 0, 0.3 * m * s, 1, 0),
        lambda x, m, s: affine(x, 1, 0, 0.45 * m * s * x.size[0], 0, 1, 0),
        lambda x, m, s: affine(x, 1, 0, 0, 0, 1, 0.45 * m * s * x.size[1]),
    ]


@pytest.mark.parametrize("index", range(len(augment.OPERATIONS)))
def test_operations_are_pillows(index):
    """Each operation against Pillow's, at several strengths and both signs: within 1 of 255."""
    fromarray = pytest.importorskip("PIL.Image").fromarray
    fill = (124, 116, 104)
    theirs = pillow_operations(fill)[index]
    for image in photos():
        picture = fromarray(image.permute(1, 2, 0).numpy())
        for strength in (0, 0.37, 0.9, 0.96):
            for sign in (-1, 1):
                ours = augment.OPERATIONS[index](image, strength, sign, fill)
                expected = np.asarray(theirs(picture, strength, sign), np.int16)
                difference = np.abs(ours.permute(1, 2, 0).numpy() - expected)
                assert difference.max() <= 1 and difference.mean() < 0.02


# -------------------------------------------------------- photometric distortion


def by_colorsys(image, function):
    """function(h, s, v) -> (h, s, v) for each pixel of a float RGB array (H, W, 3) in [0, 1]."""
    pixels = (function(*colorsys.rgb_to_hsv(*pixel)) for pixel in image.reshape(-1, 3).tolist())
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in pixels]).reshape(image.shape)


def reference(image, rng, convert=lambda x: x, hue_steps=None):
    """mmseg's distortion of a float array (H, W, 3) in [0, 1], with colorsys and these draws.

    convert: how values are stored after each step. hue_steps: number of hues that are told apart.
    """

    def coin():
        return rng.random() < 0.5

    def scaled(image):
        return convert(np.clip(image * rng.uniform(0.5, 1.5), 0, 1)) if coin() else image

    def stored(h, s, v):
        if hue_steps is None:
            return h, s, v
        return round(h * hue_steps) / hue_steps, round(s * 255) / 255, v

    if coin():
        image = convert(np.clip(image + rng.uniform(-32, 32) / 255, 0, 1))
    early = coin()
    if early:
        image = scaled(image)
    if coin():
        factor = rng.uniform(0.5, 1.5)

        def saturate(*hsv):
            h, s, v = stored(*hsv)
            return h, float(convert(min(1, s * factor))), v

        image = by_colorsys(image, saturate)
    if coin():
        turn = rng.uniform(-18, 18) / 180
        image = by_colorsys(image, lambda *hsv: stored((hsv[0] + turn) % 1, *hsv[1:]))
    return image if early else scaled(image)


def test_hsv_is_colorsys():
    """rgb_to_hsv and hsv_to_rgb against colorsys: random colours, greys, primaries; round trip."""
    levels = [0, 0.25, 0.5, 1]
    colours = [(r, g, b) for r in levels for g in levels for b in levels]
    generator = torch.Generator().manual_seed(0)
    colours = torch.cat((torch.tensor(colours), torch.rand(200, 3, generator=generator)))
    rgb = colours.t()[..., None]  # (3, n, 1)
    hsv = augment.rgb_to_hsv(rgb)
    expected = torch.tensor([colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()])
    assert torch.allclose(hsv, expected.t()[..., None], atol=1e-6)
    assert torch.allclose(augment.hsv_to_rgb(hsv), rgb, atol=1e-6)
    turned = hsv + torch.tensor([0.7, 0, 0]).view(3, 1, 1)
    expected = [colorsys.hsv_to_rgb(*pixel) for pixel in turned[..., 0].t().tolist()]
    assert torch.allclose(
        augment.hsv_to_rgb(turned), torch.tensor(expected).t()[..., None], atol=1e-6
    )


def test_photometric_against_colorsys():
    """photometric against numpy and colorsys with the same draws; stacked images alike."""
    image = photo(0, 10, 12) / 255
    pixels = image.permute(1, 2, 0).double().numpy()
    grey = torch.full((3, 10, 12), 0.4)
    for seed in range(60):
        ours = augment.photometric(torch.stack((image, grey)), random.Random(seed))
        expected = reference(pixels, random.Random(seed))
        assert np.abs(ours[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5
        assert (ours[1] - ours[1, 0, 0, 0]).abs().max() < 1e-6  # grey stays grey


def test_photometric_against_eight_bits():
    """The same with mmseg's storage: uint8 truncated after each step, hues 2 degrees apart.

    The mean change of an image agrees to 5 %, and single results differ by rounding.
    """
    image = photo(0, 10, 12)
    pixels = image.permute(1, 2, 0).double().numpy() / 255
    changes = []
    for seed in range(100):
        ours = augment.photometric(image / 255, random.Random(seed)).permute(1, 2, 0).numpy()
        stored = reference(
            pixels, random.Random(seed), lambda x: np.floor(x * 255 + 1e-6) / 255, hue_steps=180
        )
        assert np.abs(ours - stored).mean() < 1.5 / 255
        changes.append([np.abs(result - pixels).mean() for result in (ours, stored)])
    ours, stored = np.mean(changes, 0)
    assert 0.95 < ours / stored < 1.05


def test_photometric_steps_are_coins(monkeypatch):
    """How often each step happens, and contrast before the colours, in 4,000 draws: a half."""
    calls = []
    for name in ("add_brightness", "scale_contrast", "scale_saturation", "shift_hue"):

        def note(images, amount, name=name):
            calls.append((name, amount))
            return images

        monkeypatch.setattr(augment, name, note)
    rng, early, late = random.Random(0), 0, 0
    for _ in range(4000):
        start = len(calls)
        augment.photometric(torch.zeros(3, 1, 1), rng)
        names = [name for name, _ in calls[start:]]
        if "scale_contrast" in names and "shift_hue" in names:
            before = names.index("scale_contrast") < names.index("shift_hue")
            early, late = early + before, late + (not before)
    assert 0.4 < early / (early + late) < 0.6
    ranges = {
        "add_brightness": (-32 / 255, 32 / 255),
        "scale_contrast": (0.5, 1.5),
        "scale_saturation": (0.5, 1.5),
        "shift_hue": (-18 / 180, 18 / 180),
    }
    for name, (low, high) in ranges.items():
        amounts = [amount for called, amount in calls if called == name]
        assert 1850 < len(amounts) < 2150
        assert low <= min(amounts) < low + 0.01 and high - 0.01 < max(amounts) <= high


# -------------------------------------------------------- segmentation data

FLAGS = {"seed": 0, "min_scale": 1.0, "max_scale": 1.0, "short_side": 0, "long_side": 0}
FLAGS |= {"image_size": 16, "flip": True, "photometric": False}


def masked_images(images, normalise="half", train=True, **flags):
    """MaskedImages of uint8 images (B, H, W, 3), masked by their red channel's four classes."""
    assert flags.keys() <= FLAGS.keys()
    source = sources.Arrays("arrays", images, masks=images[..., 0] % 4)
    args = argparse.Namespace(**(FLAGS | flags))
    return masked.MaskedImages(args, source, 4, normalise, train)


@pytest.mark.parametrize("normalise", batches.NORMALISE)
@pytest.mark.parametrize("train", (False, True))
def test_padding_is_the_standardised_zero(normalise, train):
    """Padding, standardised, against 0: within 0.01, untouched by photometric distortion.

    It is at the right and the bottom, where the mask is IGNORE; the picture itself is not padded.
    """
    images = np.random.default_rng(0).integers(0, 256, (4, 10, 13, 3), np.uint8)
    dataset = masked_images(images, normalise, train, photometric=True)
    pixels, masks = dataset[[(0, i) for i in range(4)]]
    assert pixels.shape == (4, 3, 16, 16) and pixels.dtype == torch.uint8
    padded = masks == sources.IGNORE
    assert padded[:, 10:].all() and padded[:, :, 13:].all() and not padded[:, :10, :13].any()
    x = batches.standardise(batches.to_float(pixels, "cpu"), normalise)
    assert x.movedim(1, -1)[padded].abs().max() < 0.01


def test_large_images_are_not_padded():
    """In evaluation, an image larger than the crop against the one in the source: equal."""
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 3), np.uint8)
    pixels, masks = masked_images(images, train=False)[[(-1, 0)]]
    assert np.array_equal(pixels[0].permute(1, 2, 0), images[0])
    assert np.array_equal(masks[0], images[0, ..., 0] % 4)


def mmseg_size(height, width, ratio, scale=(2048, 512)):
    """mmseg's Resize with keep_ratio: its random scale, then mmcv's rescale_size."""
    long_edge, short_edge = (int(side * ratio) for side in scale)
    factor = min(long_edge / max(height, width), short_edge / min(height, width))
    return int(height * float(factor) + 0.5), int(width * float(factor) + 0.5)


def test_scale_is_mmsegs():
    """new_size against mmseg's rule on random shapes, worked examples, and no short side."""
    rng = random.Random(0)
    for _ in range(500):
        height, width, ratio = rng.randint(60, 3000), rng.randint(60, 3000), rng.uniform(0.5, 2)
        expected = mmseg_size(height, width, ratio)
        assert masked.new_size(height, width, ratio, 512, 2048) == expected
    assert masked.new_size(512, 683, 1, 512, 2048) == (512, 683)
    assert masked.new_size(2000, 400, 1, 512, 2048) == (2048, 410)  # the long side decides
    assert masked.new_size(2000, 400, 1, 512, 0) == (2560, 512)
    assert masked.new_size(2000, 400, 0.5, 512, 2048) == (1024, 205)
    assert masked.new_size(21, 33, 1.25, 0, 2048) == (round(21 * 1.25), round(33 * 1.25))
    assert masked.new_size(24, 24, 0.01, 0, 0) == (1, 1)
    assert masked.new_size(2, 10_000, 1, 512, 2048) == (1, 2048)


def test_long_images_are_limited():
    """A 4 x 40 image at short side 8 and long side 16: 2 x 16 (1.6 rounded), padded to 16 x 16."""
    images = np.full((1, 4, 40, 3), 200, np.uint8)
    dataset = masked_images(images, train=False, short_side=8, long_side=16)
    pixels, masks = dataset[[(-1, 0)]]
    assert pixels.shape == (1, 3, 16, 16)
    assert (masks != sources.IGNORE).sum() == 2 * 16 and (pixels[0, 0] == 200).sum() == 2 * 16

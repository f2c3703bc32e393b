"""Views of images (section 2.5): one random crop, flip and colour jitter, resized once per view.

In pre-training the patches and the tokenizer see the same crop at two sizes (224 and 112 pixels in
the released code), so position i of both grids shows the same part of the image.
"""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from images import augment, batches, photos, sources
from plumbing import noise


def random_box(rng, height, width, min_area):
    """A random resized crop as (top, left, height, width) in pixels.

    Its area is min_area to 1 of the image's, its aspect ratio log-uniform in 3/4 to 4/3. Where ten
    draws do not fit, as in panoramas, it is the centre at 3:4 or 4:3, as in torchvision. With
    min_area 1 it is the largest square at a random place, so that no picture is squashed.
    """
    if min_area >= 1:
        side = min(height, width)
        top = rng.randint(0, height - side) if height > side else 0
        return top, rng.randint(0, width - side) if width > side else 0, side, side
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # 3:4 to 4:3
    return (height - h) // 2, (width - w) // 2, h, w


def centre_view(images, size, kernel, share=1.0, reduced=None):
    """The evaluation view, as torchvision makes it: uint8 (B, 3, H, W) -> (B, 3, size, size).

    The short side is resized to size / share pixels, then the centred square is cut out; nothing
    is squashed. share: 224/256 below 384 pixels, as released. reduced: (height, width, scale), the
    whole image's size and by how much `images` are reduced, see photos.Photo.
    """
    height, width, scale = reduced or (*images.shape[-2:], 1)
    short = int(size / share)
    h, w = (int(short * side / min(height, width)) for side in (height, width))
    if scale > 1:
        box = 0, 0, height / scale, width / scale
        images = photos.resize_part(images, box, (h, w), kernel)
    elif (h, w) != (height, width):
        images = F.interpolate(images, (h, w), mode=kernel, antialias=True)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return images[..., top : top + size, left : left + size]


def square_box(height, width):
    """The largest centred square: (top, left, side, side)."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crop_resize(images, boxes, size, kernel):
    """Crop each image to its box and resize it with antialiasing, as Pillow does.

    images: uint8 (B, 3, H, W); boxes: B tuples (top, left, height, width) of whole pixels; kernel:
    "bicubic" or "lanczos". Returns uint8 (B, 3, size, size).
    """
    crops = (
        images[b : b + 1, :, top : top + height, left : left + width]
        for b, (top, left, height, width) in enumerate(boxes)
    )
    return torch.cat([F.interpolate(c, (size, size), mode=kernel, antialias=True) for c in crops])


NAMED = 20  # times that training names an unreadable file; then it only counts them


class Samples(Dataset):
    """A source for training or evaluation. __getitem__ takes a batch of keys (epoch, index).

    In evaluation an unreadable file is an error. In training it is named on stderr (NAMED times in
    all), counted in `skipped` and replaced by the next readable one.
    """

    def __init__(self, source, train, seed):
        self.source, self.train, self.seed = source, train, seed
        self.one_size = True  # can its samples be stacked into a batch in evaluation?
        self.skipped = torch.zeros(1, dtype=torch.int64).share_memory_()  # with loader processes

    def __len__(self):
        return len(self.source)

    def problems(self):
        """{"skipped": number of unreadable files so far} for the log; empty if there were none."""
        skipped = int(self.skipped)
        return {"skipped": skipped} if skipped else {}

    def fingerprint(self):
        """What must not change between a run and its --resume: see sources.fingerprint.

        Raises ValueError if it is of files and Pillow is not installed: before a run starts.
        """
        if isinstance(self.source, sources.Files):
            photos.check_installed(self.source.paths[0])
        return sources.fingerprint(self.source)

    def pictures(self, count):
        """The batch of `count` samples spread evenly over the set, to draw pictures of."""
        return self[[(-1, index) for index in batches.spread(len(self), count)]]

    def read(self, indices, *readers):
        """[reader(indices) for each reader]; in training, unreadable files are replaced."""
        tries = min(100, len(self))
        for offset in range(tries):
            try:
                moved = [(index + offset) % len(self) for index in indices]
                return [reader(moved) for reader in readers]
            except photos.Unreadable as error:  # no other: it would be a defect of ours
                if not self.train:
                    raise photos.Unreadable(
                        f"{error}; only training skips images: repair or remove it (a training run "
                        "that has begun goes on with --resume)"
                    ) from error
                self.skipped += 1
                last = error
                if self.skipped <= NAMED:
                    print(f"skipped: {error}", file=sys.stderr)
                if self.skipped == NAMED:
                    print("skipped: from now on they are only counted", file=sys.stderr)
        raise ValueError(
            f"{self.source.name}: {tries} files in a row cannot be read or used; the last: {last}"
        )


class Crops(Samples):
    """One random crop, flip and colour jitter of each image, resized to one or more views.

    views: list of (size, kernel), see crop_resize. min_crop: smallest share of the area that a crop
    keeps. jitter: brightness, contrast and saturation vary by this factor either way. centre: share
    of the short side for evaluation (train=False), where nothing is random; see centre_view.

    A batch of keys gives a list of uint8 tensors (B, 3, size, size), one per view, followed by the
    labels (B,) if labels=True.
    """

    def __init__(
        self,
        source,
        views,
        train,
        seed=0,
        min_crop=1.0,
        flip=False,
        jitter=0.0,
        centre=1.0,
        labels=False,
    ):
        super().__init__(source, train, seed)
        self.views, self.centre, self.labels = views, centre, labels
        self.min_crop, self.flip, self.jitter = min_crop, flip, jitter

    def draw(self, key, height, width):
        """The random choices for one training sample: (box, flip or not, three colour factors)."""
        rng = noise.sample_rng(self.seed, *key)
        box = random_box(rng, height, width, self.min_crop)
        factors = [1 + self.jitter * (2 * rng.random() - 1) for _ in range(3)]
        return box, self.flip and rng.random() < 0.5, factors

    def crop(self, keys):
        """The views, and labels if wanted, of samples whose images have one size."""
        readers = [functools.partial(self.make_views, keys)]
        if self.labels:
            readers.append(lambda moved: self.source.labels[moved])
        made, *labels = self.read([index for _, index in keys], *readers)
        return [*made, *map(torch.from_numpy, labels)]

    def make_views(self, keys, indices):
        """The views of the images at `indices`, with the random choices of `keys`."""
        reduced = None
        if isinstance(self.source, sources.Arrays):
            images = self.source.read(indices)
        else:
            photo = self.source.open(indices)
            scale = photo.scale(self.spare(keys[0], *photo.size))
            images = photo.pixels(scale)
            reduced = (*photo.size, scale) if scale > 1 else None
        images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, 3, H, W)
        if self.train:
            return self.random_views(images, keys, reduced)
        return [centre_view(images, *view, self.centre, reduced) for view in self.views]

    def spare(self, key, height, width):
        """How far an image may be reduced until a view has more pixels than its crop."""
        largest = max(size for size, _ in self.views)
        if not self.train:
            return min(height, width) / int(largest / self.centre)
        (_, _, *sides), _, _ = self.draw(key, height, width)
        return min(sides) / largest

    def random_views(self, images, keys, reduced):
        """The views for training: flip and colour jitter, then one crop resized to each size.

        reduced: see centre_view. Crops are drawn in the whole image, however it was decoded.
        """
        height, width, scale = reduced or (*images.shape[-2:], 1)
        boxes, flips, factors = zip(*(self.draw(key, height, width) for key in keys))
        if any(flips):
            images = torch.where(torch.tensor(flips)[:, None, None, None], images.flip(3), images)
        if self.jitter:
            planes = images.contiguous() / 255  # in colour planes it is faster
            jittered = augment.colour_jitter(planes, torch.tensor(factors))
            images = (jittered * 255).round().byte()
        if scale > 1:  # files come one at a time
            top, left, *sides = (pixels / scale for pixels in boxes[0])
            if flips[0]:  # the last column, which may be a part of a pixel, is now the first
                left += images.shape[3] - width / scale
            part = top, left, *sides
        views = []
        for size, kernel in self.views:
            if scale > 1:
                views.append(photos.resize_part(images, part, (size, size), kernel))
                continue
            unchanged = (height, width) == (size, size) and set(boxes) == {(0, 0, size, size)}
            views.append(images if unchanged else crop_resize(images, boxes, size, kernel))
        return views

    def __getitem__(self, keys):
        if isinstance(self.source, sources.Arrays):
            return self.crop(keys)
        return [torch.cat(parts) for parts in zip(*(self.crop([key]) for key in keys))]


def centre_square(images, size):
    """The largest centred square of uint8 images (B, H, W, 3), resized: (B, 3, size, size)."""
    height, width = images.shape[1:3]
    boxes = [square_box(height, width)] * len(images)
    return crop_resize(torch.from_numpy(images).permute(0, 3, 1, 2), boxes, size, "bicubic")


def centre_square_mask(mask, size):
    """The same square of a mask (H, W), resized by nearest neighbour: (size, size)."""
    top, left, side, _ = square_box(*mask.shape)
    centres = (np.arange(size) * 2 + 1) * side // (2 * size)
    return mask[top + centres][:, left + centres]

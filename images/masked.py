"""Images with a class for every pixel, for segmentation (section 2.6)."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from images import augment, batches, photos, sets, sources, views
from plumbing import log, noise


class MaskedImages(views.Samples):
    """A batch of keys (epoch, index) gives uint8 images (B, 3, S, S) and masks (B, S, S).

    Training: resize by a random factor, take a random crop of S x S, flip, vary the colours, pad.
    Evaluation: the whole image and its mask, resized as --short-side and --long-side say, padded to
    at least S x S; images of different sizes must come one at a time. args: the flags of
    finetune_seg. normalise: a key of batches.NORMALISE, whose mean is the padding, about 0
    after standardising. Raises ValueError if the source has no masks, or if a value is neither
    below `classes` nor IGNORE in SAMPLED masks; the others are checked when read.
    """

    def __init__(self, args, source, classes, normalise, train):
        if source.masks is None:
            raise ValueError(
                f"{source.name}: it has no masks, which segmentation needs: a folder holds images/ "
                "and annotations/; of the named sets, shapes and fashion-scenes have masks"
            )
        super().__init__(source, train, args.seed)
        self.args, self.classes = args, classes
        self.padding = augment.mean_colour(normalise)
        self.one_size = isinstance(source, sources.Arrays)
        if self.one_size:
            values = set()
            for index in batches.spread(len(source), sources.SAMPLED):
                self.check_mask(source.masks[index], self.mask_name(index))
                values |= set(np.unique(source.masks[index]).tolist())
            if values == {0, sources.IGNORE}:
                raise ValueError(
                    f"{source.name}: the masks hold only 0 and 255, and 255 means ignored: write "
                    "1 in place of 255"
                )
        else:
            source.check()

    def mask_name(self, index):
        """What a message calls the mask at `index`."""
        if not self.one_size:
            return self.source.masks[index]
        return f"{self.source.name}, mask {self.source.numbers[index]}"

    def check_mask(self, mask, name):
        """Raise Unreadable naming the mask if a value is neither a class nor IGNORE."""
        wrong = mask[(mask != sources.IGNORE) & (mask >= self.classes)]
        if len(wrong):
            first = getattr(self.source, "first_class", 0)  # 1: as in ADE20K, where 0 is ignored
            ignored = 0 if first else sources.IGNORE
            raise photos.Unreadable(
                f"{name}: mask value {int(wrong[0]) + first} is out of range for {self.classes} "
                f"classes ({ignored}: ignored)"
            )

    def read_pair(self, indices):
        """The image (1, H, W, 3) and mask (1, H, W) at the one index, both uint8.

        Raises Unreadable naming the mask if their sizes differ or a value is not a class.
        """
        image, mask = self.source.read(indices), self.source.read_masks(indices)
        (index,) = indices
        name = self.mask_name(index)
        if image.shape[1:3] != mask.shape[1:3]:
            height, width = image.shape[1:3]
            raise photos.Unreadable(
                f"{name}: the mask is {mask.shape[2]} pixels wide and {mask.shape[1]} high, its "
                f"image {width} wide and {height} high"
            )
        self.check_mask(mask, name)
        return image, mask

    def load(self, index):
        """Image (1, 3, H, W) in 0..255 and mask (1, 1, H, W) from the source, both as float."""
        [(image, mask)] = self.read([index], self.read_pair)
        image = torch.from_numpy(image).permute(0, 3, 1, 2).float()
        return image, torch.from_numpy(mask)[:, None].float()

    def prepare(self, key):
        """Image (1, 3, S, S) in 0..255 and mask (1, 1, S, S) of one key, both as float.

        In evaluation they are (1, 3, H, W) and (1, 1, H, W) with H, W >= S. Padding comes last, as
        in mmseg, so that no step changes it.
        """
        args = self.args
        rng = noise.sample_rng(args.seed, *key)
        image, mask = self.load(key[1])
        ratio = rng.uniform(args.min_scale, args.max_scale) if self.train else 1
        size = new_size(*image.shape[-2:], ratio, args.short_side, args.long_side)
        image, mask = resize(image, mask, *size)
        if self.train:
            image, mask = random_crop(image, mask, args.image_size, rng)
            if args.flip and rng.random() < 0.5:
                image, mask = image.flip(3), mask.flip(3)
            if args.photometric:
                image = augment.photometric(image / 255, rng) * 255
        return pad(image, mask, args.image_size, self.padding)

    def __getitem__(self, keys):
        images, masks = (torch.cat(parts) for parts in zip(*map(self.prepare, keys)))
        return [images.round().byte(), masks[:, 0].byte()]

    def pictures(self, count):
        """Centre crops (B, 3, S, S) and (B, S, S) of `count` samples spread evenly over the set.

        Images may differ in size.
        """
        size = self.args.image_size
        keys = [(-1, index) for index in batches.spread(len(self), count)]
        samples = [self[[key]] for key in keys]
        crops = ([centre(part, size) for part in parts] for parts in zip(*samples))
        return [torch.cat(parts) for parts in crops]


def checked(source):
    """The source as MaskedImages, for read_pair alone; raises ValueError as MaskedImages does."""
    args = argparse.Namespace(seed=0)
    return MaskedImages(args, source, len(source.mask_classes), "half", train=False)


def new_size(height, width, ratio, short_side, long_side):
    """Height and width to resize an image to, as mmseg's Resize with keep_ratio.

    The largest size of the same shape that keeps the short side to ratio x short_side and the long
    side to ratio x long_side (0: no limit). With short_side 0: ratio times the image's own size.
    Neither is below one pixel.
    """
    if not short_side:
        return max(round(height * ratio), 1), max(round(width * ratio), 1)
    factor = int(short_side * ratio) / min(height, width)
    if long_side:
        factor = min(factor, int(long_side * ratio) / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize(image, mask, height, width):
    """Resize a float image (1, 3, H, W) and its float mask (1, 1, H, W) to height x width.

    The image is interpolated bilinearly with antialiasing, the mask by nearest neighbour.
    """
    if image.shape[-2:] == (height, width):
        return image, mask
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image, F.interpolate(mask, (height, width), mode="nearest-exact")


def pad(image, mask, size, colour):
    """Pad at the right and bottom to at least size x size: image with a colour, mask IGNORE.

    colour: R, G, B in 0..255.
    """
    height, width = mask.shape[-2:]
    padding = 0, max(0, size - width), 0, max(0, size - height)
    padded = F.pad(image, padding)
    colour = torch.tensor(colour, dtype=image.dtype).view(3, 1, 1)
    padded[..., height:, :] = colour
    padded[..., width:] = colour
    return padded, F.pad(mask, padding, value=sources.IGNORE)


def random_crop(image, mask, size, rng):
    """The same random crop of size x size from an image (1, 3, H, W) and its mask (1, 1, H, W).

    A side shorter than `size` is kept whole. At most 75 % of the pixels with a class may have the
    same one; the tenth try is taken anyway.
    """
    height, width = mask.shape[-2:]
    for _ in range(10):
        top, left = rng.randint(0, max(0, height - size)), rng.randint(0, max(0, width - size))
        window = ..., slice(top, top + size), slice(left, left + size)
        crop = mask[window]
        counts = torch.bincount(crop[crop != sources.IGNORE].long())
        varied = len(counts) and counts.max() <= 0.75 * counts.sum()
        if varied or max(height, width) <= size:  # there is only one such crop
            break
    return image[window], crop


def centre(images, size):
    """The centred square of (..., H, W): (..., size, size)."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def colours(masks):
    """A colour for each class: (B, H, W) -> (B, 3, H, W) in [0, 1].

    Class 0 is black, IGNORE is white and the others lie around the hue circle.
    """
    hue = masks.float()[:, None] * 2.4  # the golden angle keeps neighbouring classes apart
    phases = torch.tensor([0.0, 2.1, 4.2], device=masks.device).view(1, 3, 1, 1)
    rgb = 0.55 + 0.45 * torch.cos(hue + phases)
    rgb = torch.where(masks[:, None] == sources.IGNORE, 1.0, rgb)
    return torch.where(masks[:, None] == 0, 0.0, rgb)


def open_sets(args, normalise):
    """(training set, held-out set, class names) of --data, for the flags of finetune_seg."""
    source = sets.open_source(args.data, "train", args.data_dir)
    train_set = MaskedImages(args, source, len(source.mask_classes), normalise, True)
    if args.train_images:
        train_set.source = sources.random_subset(source, args.train_images, args.seed)
        log.note(f"training on {len(train_set):,} of {len(source):,} images (--train-images)")
    if not (train_set.one_size or args.short_side):
        side = args.image_size
        log.note(
            f"images keep their own size, and the model sees {side} x {side} pixels of them: "
            f"--short-side {side} shows it whole images"
        )
    held_out = open_held_out(args, normalise, source.mask_classes)
    return train_set, held_out, source.mask_classes


def open_held_out(args, normalise, classes):
    """The held-out set of --data. Raises ValueError if its classes are not `classes`."""
    held_out = sets.open_source(args.data, args.eval_split, args.data_dir)
    held_out_set = MaskedImages(args, held_out, len(classes), normalise, False)
    sources.check_names(held_out.mask_classes, classes, held_out)
    held_out.mask_classes = list(classes)  # it may lack the last ones, but they can be predicted
    return held_out_set

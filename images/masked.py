"""Images with a class for every pixel, for segmentation (section 2.6)."""

import torch
import torch.nn.functional as F

from images import augment, sources, views
from plumbing import noise


class MaskedImages(views.Samples):
    """A batch of keys (epoch, index) gives uint8 images (B, 3, S, S) and masks (B, S, S).

    Training: resize by a random factor, take a random crop of S x S, flip, vary the colours.
    Evaluation: the whole image, padded to at least S x S; images of different sizes must come one
    at a time. args: the flags of finetune_seg. Raises ValueError if the source has no masks or a
    mask value is neither below `classes` nor IGNORE.
    """

    def __init__(self, args, source, classes, train):
        if source.masks is None:
            raise ValueError(
                f"{source.name}: it has no masks, which segmentation needs; of the named sets, "
                "shapes and fashion-scenes have them"
            )
        super().__init__(source, train, args.seed)
        self.args, self.classes = args, classes
        self.one_size = isinstance(source, sources.Arrays)
        if self.one_size:  # the masks of files are checked when read
            self.check_masks(source.masks)

    def check_masks(self, masks):
        """Raise ValueError if a mask value is neither a class nor IGNORE."""
        for mask in masks:
            wrong = mask[(mask != sources.IGNORE) & (mask >= self.classes)]
            if len(wrong):
                raise ValueError(
                    f"{self.source.name}: mask value {int(wrong[0])} is out of range for "
                    f"{self.classes} classes ({sources.IGNORE}: ignored)"
                )

    def load(self, index):
        """Image (1, 3, H, W) in 0..255 and mask (1, 1, H, W) from the source, both as float."""
        image, mask = self.read([index], self.source.read, self.source.read_masks)
        image = torch.from_numpy(image).permute(0, 3, 1, 2).float()
        mask = torch.from_numpy(mask)[:, None].float()
        if image.shape[-2:] != mask.shape[-2:]:
            raise ValueError(
                f"{self.source.name} {index}: image {image.shape[-2:]} and mask {mask.shape[-2:]} "
                "differ in size"
            )
        return image, mask

    def prepare(self, key):
        """Image (1, 3, S, S) in 0..255 and mask (1, 1, S, S) of one key, both as float.

        In evaluation they are (1, 3, H, W) and (1, 1, H, W) with H, W >= S.
        """
        args = self.args
        rng = noise.sample_rng(args.seed, *key)
        image, mask = self.load(key[1])
        factor = args.short_side / min(image.shape[-2:]) if args.short_side else 1
        if self.train:
            factor *= rng.uniform(args.min_scale, args.max_scale)
        height, width = (round(side * factor) for side in image.shape[-2:])
        image, mask = pad(*resize(image, mask, height, width), args.image_size)
        if not self.train:
            return image, mask
        image, mask = random_crop(image, mask, args.image_size, rng)
        if args.flip and rng.random() < 0.5:
            image, mask = image.flip(3), mask.flip(3)
        if args.photometric:
            factors = [[rng.uniform(1 - s, 1 + s) for s in (0.125, 0.5, 0.5)]]
            image = augment.colour_jitter(image / 255, torch.tensor(factors)) * 255
        return image, mask

    def __getitems__(self, keys):
        images, masks = (torch.cat(parts) for parts in zip(*map(self.prepare, keys)))
        masks = masks[:, 0].byte()
        self.check_masks(masks)
        return [images.round().clamp(0, 255).byte(), masks]


def resize(image, mask, height, width):
    """Resize a float image (1, 3, H, W) and its float mask (1, 1, H, W) to height x width.

    The image is interpolated bilinearly with antialiasing, the mask by nearest neighbour.
    """
    if image.shape[-2:] == (height, width):
        return image, mask
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image, F.interpolate(mask, (height, width), mode="nearest-exact")


def pad(image, mask, size):
    """Pad at the right and bottom to at least size x size: image black, mask IGNORE."""
    right, bottom = max(0, size - image.shape[-1]), max(0, size - image.shape[-2])
    padding = 0, right, 0, bottom
    return F.pad(image, padding), F.pad(mask, padding, value=sources.IGNORE)


def random_crop(image, mask, size, rng):
    """The same random crop of size x size from an image (1, 3, H, W) and its mask (1, 1, H, W).

    At most 75 % of the pixels with a class may have the same one; the tenth try is taken anyway.
    """
    height, width = mask.shape[-2:]
    for _ in range(10):
        top, left = rng.randint(0, height - size), rng.randint(0, width - size)
        window = ..., slice(top, top + size), slice(left, left + size)
        crop = mask[window]
        counts = torch.bincount(crop[crop != sources.IGNORE].long())
        varied = len(counts) and counts.max() <= 0.75 * counts.sum()
        if varied or height == width == size:  # there is only one such crop
            break
    return image[window], crop


def colours(masks):
    """A colour for each class: (B, H, W) -> (B, 3, H, W) in [0, 1].

    Class 0 is black, IGNORE is white and the others lie around the hue circle.
    """
    hue = masks.float()[:, None] * 2.4  # the golden angle keeps neighbouring classes apart
    phases = torch.tensor([0.0, 2.1, 4.2], device=masks.device).view(1, 3, 1, 1)
    rgb = 0.55 + 0.45 * torch.cos(hue + phases)
    rgb = torch.where(masks[:, None] == sources.IGNORE, 1.0, rgb)
    return torch.where(masks[:, None] == 0, 0.0, rgb)

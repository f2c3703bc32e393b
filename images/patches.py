"""Images as patches x^p and back (section 2.1), and masks of patches as masks of pixels."""

import math

import torch.nn.functional as F


def to_patches(x, side):
    """(B, 3, H, W) -> (B, N, 3P²), patches row by row; side: P."""
    return F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)


def to_image(patches, side):
    """The inverse of to_patches for a square image: (B, N, 3P²) -> (B, 3, H, W)."""
    h = w = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (h, w)), side)


def pixel_mask(mask, images):
    """A mask of patches, bool (B, N), as a mask of the images' pixels: (B, 1, H, W)."""
    h = w = math.isqrt(mask.shape[1])
    mask = mask.view(-1, 1, h, w).float()
    return F.interpolate(mask, size=images.shape[-2:], mode="nearest").bool()

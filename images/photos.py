"""Image files: their headers, their pixels, and large JPEGs decoded at a reduced scale.

Everything that needs the optional package Pillow is here.
"""

import contextlib
import functools
import logging
import math
import os
import stat
import warnings

import numpy as np
import torch

from plumbing import log

LARGE = 2**20  # pixels: smaller images are never decoded at a reduced scale
SCALES = 8, 4, 2  # a JPEG can be decoded at 1/8, 1/4 or 1/2
MARGIN = 1.25  # pixels to keep for each of a view: with fewer, views differ by up to 2 of 255
FULL_DEPTH = 16  # bits of a 16-bit image that uses its whole range
# Nothing else is tried, whatever a file is called: for PostScript Pillow would start a program.
FORMATS = "JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong is said in one line
ORIENTATION = 0x0112  # EXIF's number for it; 1: upright


class Unreadable(ValueError):
    """An image or its mask cannot be read or used: training skips it. The message names it."""


@contextlib.contextmanager
def readable(path):
    """Pillow's module Image, to read `path` with. Raises Unreadable if that fails.

    Raises ValueError if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs the optional package Pillow: pip install pillow, or use arrays "
            "(see python -m images.convert --help)"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said in one line
            # A file of a few bytes can claim a hundred million pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield Image
    except Exception as error:  # OSError, SyntaxError, ValueError, Pillow's own bomb error, ...
        raise Unreadable(f"{path} is not a readable image: {error}") from error


def check_installed(path):
    """Raise ValueError if Pillow, which reading `path` needs, is not installed."""
    with readable(path):
        pass


def orientation(image):
    """The EXIF orientation of a Pillow image: 1 (upright, also without EXIF data) to 8."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data in an image that can be read
        return 1


class Photo:
    """An image file. Making one reads only its header; Unreadable names a file that has none.

    size: height and width in pixels, of a JPEG when upright, of the others as stored. depth: bits
    that 16-bit images of its set use; None for an image by itself: 16, or those of its largest
    value if they are at most 12.
    """

    def __init__(self, path, depth=None):
        self.path, self.depth = path, depth
        with readable(path) as pillow:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                raise ValueError("it is not a regular file")
            self.image = pillow.open(path, formats=FORMATS)
            self.is_jpeg = self.image.format in ("JPEG", "MPO")
            # Only a JPEG has its EXIF data in front of its pixels.
            self.orientation = orientation(self.image) if self.is_jpeg else 1
        width, height = self.image.size
        self.size = (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)

    def scale(self, spare):
        """The largest of 8, 4, 2 and 1 to reduce this image by that leaves MARGIN for a view.

        spare: the image's own pixels for each pixel of the view, along the shorter side. The
        scale is 1 unless this is a JPEG of at least LARGE pixels.
        """
        if not self.is_jpeg or math.prod(self.size) < LARGE:
            return 1
        # The last row and column may hold a fraction of a pixel, which must not become the first.
        upright = self.orientation == 1
        exact = [s for s in SCALES if upright or not any(side % s for side in self.size)]
        return next((s for s in exact if MARGIN * s <= spare), 1)

    def load(self, scale=1):
        """Decode the image, upright, as a Pillow image of ceil(size / scale) pixels."""
        with readable(self.path):
            if scale > 1:
                self.image.draft(None, tuple(n // scale for n in self.image.size))
            self.image.load()
            if orientation(self.image) != 1:
                from PIL import ImageOps

                self.image = ImageOps.exif_transpose(self.image)
            if self.image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
        return self.image

    def pixels(self, scale=1):
        """The image as uint8 (1, H, W, 3), reduced by `scale`.

        Palettes, CMYK and so on become RGB; of 16-bit grey the upper 8 of `depth` bits are kept.
        """
        image = self.load(scale)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert() would clip at 255
            grey = np.array(image).astype(np.int64)
            depth = self.depth or self.own_depth(int(grey.max(initial=0)))
            grey >>= max(depth - 8, 0)
            if grey.max(initial=0) > 255:
                say_clipped(depth)
            grey = grey.clip(0, 255).astype(np.uint8)
            return np.repeat(grey[None, ..., None], 3, axis=3)
        with readable(self.path):
            return np.array(image.convert("RGB"))[None]

    def own_depth(self, largest):
        """The depth of an image by itself, whose largest value is this; said if it is not 16."""
        bits = max(largest.bit_length(), 8)
        if bits > 12:
            return FULL_DEPTH
        log.note(f"{self.path}: 16-bit grey with values up to {largest}, read as {bits} bits")
        return bits


@functools.cache  # once in each process
def say_clipped(depth):
    """Say that an image has brighter pixels than its set's first images, which set the range."""
    log.note(
        f"16-bit images have values above {2**depth - 1}, the range of the set's first images: "
        "they become white"
    )


def read_mask(path):
    """The class numbers of an annotation as uint8 (H, W).

    Raises Unreadable naming the file unless it holds one number per pixel, at most 255.
    """
    values = np.asarray(Photo(path).load())
    if values.ndim != 2:
        raise Unreadable(
            f"{path} is a colour image: a mask needs one class number per pixel, as a grey or "
            "palette image"
        )
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        found = f"{values.min()} to {values.max()}"
        raise Unreadable(f"{path}: mask values are {found}: out of range, which is 0 to 255")
    return values.astype(np.uint8)


def resize_part(images, box, size, kernel):
    """Resize a part of each image with antialiasing; its borders may lie within pixels.

    images: uint8 (B, 3, H, W); box: (top, left, height, width) in pixels, fractions allowed; size:
    (h, w); kernel: "bicubic" or "lanczos". Returns uint8 (B, 3, h, w).
    """
    from PIL import Image

    top, left, bottom, right = box[0], box[1], box[0] + box[2], box[1] + box[3]
    y, x = int(top), int(left)  # what lies outside the box must not bleed in
    images = images[..., y : math.ceil(bottom), x : math.ceil(right)].permute(0, 2, 3, 1)
    part = left - x, top - y, min(right - x, images.shape[2]), min(bottom - y, images.shape[1])
    resized = [
        np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling[kernel.upper()], part))
        for image in images.contiguous().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def has_frames(image):
    """Does a file opened by Pillow hold several frames? Not an MPO, whose others are previews."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # of many types, where the second frame is damaged
        return False


@functools.cache  # training and held-out set ask for the same files
def survey(paths):
    """(bits that 16-bit images use, what is special about these files in a sentence or "").

    paths: a tuple of image files. Files that cannot be read are left out, and without Pillow all.
    """
    names = "turned", "large", "colour", "several", "clear"
    deep, largest, counts = 0, 0, dict.fromkeys(names, 0)
    for path in paths:
        try:
            photo = Photo(path)
            image = photo.image
            counts["turned"] += photo.orientation != 1
            counts["large"] += photo.is_jpeg and math.prod(photo.size) >= LARGE
            counts["several"] += has_frames(image)
            counts["clear"] += "A" in image.mode or "transparency" in image.info
            if image.mode.startswith("I"):
                largest = max(largest, int(np.max(photo.load())))
                deep += 1
            elif image.tile and ";16" in str(image.tile[0][3]):
                counts["colour"] += 1
        except ValueError:
            continue
    depth = max(largest.bit_length(), 8) if deep else FULL_DEPTH
    texts = {
        "turned": "JPEGs turned upright by their EXIF orientation",
        "large": "JPEGs of over a megapixel, decoded at 1/2, 1/4 or 1/8 where the view allows it "
        "(in full with masks)",
        "colour": "in colour with 16 bits, of which Pillow reads the upper 8",
        "several": "of several frames, of which the first is read",
        "clear": "with transparency, which is dropped: the colours below it show",
    }
    found = [f"{count} {texts[name]}" for name, count in counts.items() if count]
    if deep:
        found.append(
            f"{deep} in 16-bit grey with values up to {largest}, read as {depth} bits: "
            f"divided by {2 ** max(depth - 8, 0)}"
        )
    return depth, f"of the first {len(paths)} images {'; '.join(found)}" if found else ""

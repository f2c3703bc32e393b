"""The two kinds of data set, Arrays and Files, and subsets of them.

Both have a name, a length, `labels` and `masks` (None if the set has none), the names `classes` and
`mask_classes`, and read(indices) and read_masks(indices).
"""

import copy
import hashlib
import math

import numpy as np

from images import photos
from plumbing import log

IGNORE = 255  # mask value of pixels that count in neither the loss nor mIoU
SPLITS = ("train", "val", "test")
MAX_CLASSES = 65_536


class NoSplit(ValueError):
    """The data set exists but does not have this split."""


class Arrays:
    """Images of one size, in memory or memory-mapped.

    images: uint8 (n, H, W) or (n, H, W, 3). labels: integers (n,) or None. masks: uint8 (n, H, W)
    or None, IGNORE at pixels without a class. classes, mask_classes: names, by default the class
    numbers. Raises ValueError for any other type or shape.
    """

    def __init__(self, name, images, labels=None, masks=None, classes=None, mask_classes=None):
        check_types(name, images, labels, masks)
        self.name, self.images, self.masks = name, images, masks
        self.numbers = np.arange(len(images))  # in the whole set; see subset
        self.labels = None if labels is None else checked_labels(name, labels)
        self.classes = class_names(classes, self.labels)
        self.mask_classes = mask_names(mask_classes, masks)

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        """uint8 images (B, H, W, 3); grey images get three equal channels."""
        images = np.array(self.images[indices])
        return images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)

    def read_masks(self, indices):
        """uint8 masks (B, H, W)."""
        return np.array(self.masks[indices])


def check_types(name, images, labels=None, masks=None):
    """Raise ValueError naming what has a wrong type or shape.

    Each is an array, or anything else with a dtype and a shape, such as the header of a file.
    """
    is_grey, is_rgb = len(images.shape) == 3, images.shape[3:] == (3,)
    if images.dtype != np.uint8 or not (is_grey or is_rgb):
        raise ValueError(
            f"{name}: images are {type_of(images)}; expected uint8 (n, H, W) or (n, H, W, 3)"
        )
    if min(images.shape) < 1:
        raise ValueError(f"{name}: it has no images: {type_of(images)}")
    count = images.shape[0]
    if labels is not None and (
        labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1))  # MedMNIST's
    ):
        raise ValueError(f"{name}: labels are {type_of(labels)}; expected integers ({count},)")
    if masks is not None and (masks.dtype != np.uint8 or masks.shape != images.shape[:3]):
        raise ValueError(
            f"{name}: masks are {type_of(masks)}; expected uint8 {images.shape[:3]}"
        )


def type_of(array):
    """'uint8 (9, 8, 8)' for a message."""
    return f"{array.dtype} {array.shape}"[:100]


def checked_labels(name, labels):
    """Labels (n,) or (n, 1) as int64 (n,). Raises ValueError if one is below 0 or absurdly large.

    The names of classes are made by counting, and a classifier has a row of weights for each.
    """
    if labels.min() < 0:
        raise ValueError(f"{name}: label {labels.min()} is out of range: classes start at 0")
    if labels.max() >= MAX_CLASSES:
        raise ValueError(
            f"{name}: label {labels.max()} is out of range: at most {MAX_CLASSES:,} classes"
        )
    return np.asarray(labels.reshape(-1), np.int64)


def class_names(names, labels):
    """`names` as strings; without names the numbers from 0 to the largest label; else []."""
    if names is None:
        names = [] if labels is None else range(labels.max() + 1)
    return [str(name) for name in names]


def mask_names(names, masks):
    """The same for the classes of masks, in which IGNORE is not a class."""
    if names is None and masks is not None:  # in parts: masks may be a file larger than the memory
        parts = np.array_split(masks, math.ceil(len(masks) / 1024))
        names = range(max(p.max(where=p != IGNORE, initial=0) for p in parts) + 1)
    return [str(name) for name in names or []]


class Files:
    """Image files of any size, decoded one at a time when they are read.

    paths: the images; labels: n integers or None; masks: paths of the annotations or None.
    first_class: mask value of class 0; a value below it is ignored. depth: see photos.Photo.
    mask_check: a function that raises ValueError if the masks cannot be used.
    """

    def __init__(
        self,
        name,
        paths,
        labels=None,
        masks=None,
        classes=(),
        mask_classes=(),
        first_class=0,
        depth=None,
        mask_check=None,
    ):
        self.name, self.paths, self.masks = name, paths, masks
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.classes, self.mask_classes = list(classes), list(mask_classes)
        self.first_class, self.depth, self.mask_check = first_class, depth, mask_check

    def __len__(self):
        return len(self.paths)

    def check(self):
        """Raise ValueError if the masks cannot be used: for whoever uses them."""
        if self.mask_check:
            self.mask_check()

    def open(self, indices):
        """The photos.Photo at the one index. Raises Unreadable naming a file without a header."""
        (index,) = indices
        return photos.Photo(self.paths[index], self.depth)

    def read(self, indices):
        """The image at the one index as uint8 (1, H, W, 3).

        Raises photos.Unreadable naming a file that cannot be decoded.
        """
        return self.open(indices).pixels()

    def read_masks(self, indices):
        """The mask at the one index as uint8 (1, H, W): class numbers from 0, or IGNORE."""
        (index,) = indices
        # ADE20K's 0, "other", wraps round to 255, and its classes 1 to 150 become 0 to 149.
        return photos.read_mask(self.masks[index])[None] - np.uint8(self.first_class)


SAMPLED = 64  # images whose content counts in a fingerprint, spread evenly over the set


def fingerprint(source):
    """{what: value} of a data set by which a change is noticed, quickly even for a large one.

    Number of images, class names, a digest of all labels, and a digest of the content. For files
    that is their names (with their folders' if there are several) and the sizes of SAMPLED images
    and masks; for arrays, their shape and SAMPLED images with masks.
    """
    shown = [i * len(source) // SAMPLED for i in range(SAMPLED)]
    content = hashlib.blake2b(digest_size=8)
    if isinstance(source, Files):
        names = [path.parts[-2:] for path in source.paths]
        if len({name[:-1] for name in names}) == 1:  # the one folder may be moved and renamed
            names = [name[-1:] for name in names]
        for name in names:
            content.update("/".join(name).encode(errors="surrogateescape"))
        listed = [source.paths, source.masks] if source.masks else [source.paths]
        for path in (paths[index] for paths in listed for index in shown):
            content.update(str(path.stat().st_size if path.exists() else None).encode())
    else:
        content.update(str(source.images.shape).encode())
        content.update(np.ascontiguousarray(source.images[shown]).tobytes())
        if source.masks is not None:
            content.update(np.ascontiguousarray(source.masks[shown]).tobytes())
    labels = b"" if source.labels is None else source.labels.tobytes()
    return {
        "number of images": len(source),
        "class names": [*source.classes, *source.mask_classes],
        "labels (digest)": hashlib.blake2b(labels, digest_size=8).hexdigest(),
        "content (digest)": content.hexdigest(),
    }


def check_names(held_out, trained, source):
    """Check that the held-out set numbers its classes as the training set does.

    held_out, trained: lists of class names; the held-out set may lack the last classes. Raises
    ValueError naming `source`, the held-out set, and the first class that differs.
    """
    if held_out != trained[: len(held_out)]:
        c, wrong = next((c, n) for c, n in enumerate(held_out) if trained[c : c + 1] != [n])
        if wrong not in trained:
            known = log.first_of([*map(repr, trained)], 8)
            raise ValueError(
                f"{source.name}: class {wrong!r} is not one of those trained on: {known}"
            )
        missing = [name for name in trained[c : c + 1] if name not in held_out]
        lacks = f": it has no {missing[0]!r}, add images of it" if missing else ""
        raise ValueError(
            f"{source.name}: class {wrong!r} has another number than in training{lacks}"
        )


def balanced_subset(source, per_class, seed):
    """A random subset with `per_class` images of each class.

    Raises ValueError if a class has fewer.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for c, name in enumerate(source.classes):
        of_class = np.flatnonzero(source.labels == c)
        if len(of_class) < per_class:
            raise ValueError(
                f"{source.name}: class {name!r} has {len(of_class)} images, not {per_class}: "
                "lower --labels-per-class (0: all)"
            )
        chosen.append(rng.choice(of_class, per_class, replace=False))
    return subset(source, np.sort(np.concatenate(chosen)))


def random_subset(source, count, seed):
    """A random subset of `count` images. Raises ValueError if the source has fewer."""
    if count > len(source):
        raise ValueError(
            f"{source.name}: it has {len(source)} images, not {count}: "
            "lower --train-images (0: all)"
        )
    chosen = np.random.default_rng(seed).choice(len(source), count, replace=False)
    return subset(source, np.sort(chosen))


def subset(source, indices):
    """A copy of the source with only the images at `indices`."""
    smaller = copy.copy(source)
    for name in ("images", "paths", "labels", "masks", "numbers"):
        values = getattr(source, name, None)
        if values is not None:
            is_array = isinstance(values, np.ndarray)
            chosen = values[indices] if is_array else [values[index] for index in indices]
            setattr(smaller, name, chosen)
    return smaller

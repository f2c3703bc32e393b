"""Folders of image files: their splits, their classes and their masks.

A folder's images may lie at any depth. Names that begin with a dot are ignored.
"""

import collections
import functools
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from images import photos, sources
from plumbing import log

SUFFIXES = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
IMAGE_SPLITS = {"train": ["train"], "val": ["val", "validation"], "test": ["test"]}
MASK_SPLITS = {"train": ["training", "train"], "val": ["validation", "val"], "test": ["test"]}
OTHER_NAMES = {"training": "train", "valid": "val", "dev": "val", "testing": "test"}  # refused
HELD_OUT = 20  # without a folder for it, one image in so many is held out
SURVEYED = 100  # files to look at when a set is opened
ADE_CLASSES = 150

say = functools.cache(log.note)  # once, though training and held-out set are opened one by one


def all_files(folder, above=()):
    """Yield the files below a folder, sorted as paths are. Links back to a folder above are cut."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        is_link_to_folder = entry.is_symlink() and os.path.isdir(entry.path)
        if is_link_to_folder or entry.is_dir(follow_symlinks=False):
            yield from all_files(entry.path, (*above, real))
        else:
            yield Path(entry.path)


def image_files(folder):
    """Yield the image files below a folder, sorted."""
    return (path for path in all_files(folder) if path.suffix.lower() in SUFFIXES)


def listed_images(folder):
    """The image files below a folder, sorted. Prints what else is there.

    Raises ValueError if nothing is left.
    """
    paths, others = [], collections.Counter()
    for path in all_files(folder):
        if path.suffix.lower() in SUFFIXES:
            paths.append(path)
        else:
            others[path.suffix.lower() or "without suffix"] += 1
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    if not paths:
        known = " ".join(SUFFIXES)
        raise ValueError(f"no images in {folder}: found {found or 'no files'}; known: {known}")
    if others:
        say(f"{folder}: {others.total()} files are not of a known image format: {found}")
    return paths


# -------------------------------------------------------- splits


def open_split(root, split, names, make):
    """Files of one split of the images below `root`.

    names: {split: the names that its folder may have}. make(pool, training): the Files of all
    images below `pool`, the folder of the split, of the training set, or, where no split has one,
    `root`; training: the folder of the training set, or `pool` where there is none. Says what lies
    beside the splits' folders. Raises NoSplit if there is no such split, and ValueError for a
    folder whose name other programs give to one.
    """
    given = {}
    for part, name in ((part, name) for part in names for name in names[part]):
        if (root / name).is_dir():
            if part in given:
                raise ValueError(f"{root / name}: keep this folder or {given[part].name}, not both")
            given[part] = root / name
    check_split_names(root, {name for part in names for name in names[part]}, given)
    if given:
        say_left_out(root, tuple(given.values()))
    if split in given and (split != "train" or "val" in given):
        return make(given[split], given.get("train", given[split]))
    if split == "test":
        raise sources.NoSplit(f"{root}: it has no split 'test': make a folder {root / 'test'}")
    if given and "train" not in given:
        known = ", ".join(sorted(folder.name for folder in given.values()))
        raise sources.NoSplit(
            f"{root}: it has no split {split!r} but a folder {known}: put the training images into "
            f"{root / names['train'][0]}"
        )
    pool = given.get("train", root)
    source = make(pool, pool)
    held_out = held_out_by_hash(source.paths, pool)
    say(
        f"{pool}: {held_out.sum()} of {len(source)} images are held out as val, one in {HELD_OUT} "
        f"by a hash of the path, because there is no folder {root / names['val'][0]}"
    )
    part = sources.subset(source, np.flatnonzero(held_out == (split == "val")))
    part.name = f"{pool} {split}"
    return part


def check_split_names(root, names, given):
    """Raise ValueError for a folder such as Train, which most file systems do not find as train.

    Also for one of OTHER_NAMES beside another or beside those in `given`; alone it is a class.
    """
    found = {path: path.name.lower() for path in sorted(root.iterdir()) if path.is_dir()}
    others = [path for path, name in found.items() if name in OTHER_NAMES.keys() - names]
    for path, name in found.items():
        if name in names - {path.name}:
            raise ValueError(f"{path}: rename it to {name}, the name of a split")
        if path in others and (given or len(others) > 1):
            part = OTHER_NAMES[name]
            text = "merge it into" if part in given else "rename it to"
            raise ValueError(f"{path}: {text} {part}, the name of a split")


@functools.cache  # once for all splits
def say_left_out(root, pools):
    """Say which images below `root` are in none of the folders of its splits."""
    others = [path for path in sorted(root.iterdir()) if path not in pools]
    left = [path.name for path in others if path.name[0] != "." and has_images(path)]
    if left:
        used = ", ".join(path.name for path in pools)
        say(f"{root}: the images used are in {used}; left out: {log.first_of(left, 5)}")


def has_images(path):
    """Is it an image file, or a folder with one? One that cannot be read counts as without."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    try:
        return any(image_files(path))
    except OSError:
        return False


def held_out_by_hash(paths, pool):
    """Bool (n,): is each path below `pool` held out? It depends on the path alone.

    Where that leaves none, the path with the lowest hash is held out. Raises ValueError for a
    single image.
    """
    if len(paths) < 2:
        raise ValueError(f"{pool}: it has one image: none is left to evaluate on")
    names = (os.fsencode(path.relative_to(pool).as_posix()) for path in paths)
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
    hashes = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
    return hashes <= max(2**64 // HELD_OUT, int(hashes.min()))


def say_survey(root, surveyed):
    """Say what is special about a set's first files. Returns the bits that 16-bit images use."""
    depth, text = photos.survey(surveyed)
    if text:
        say(f"{root}: {text}")
    return depth


# -------------------------------------------------------- labelled and unlabelled images


def folder_source(root, split):
    """Files of one split below a folder: ROOT/train and so on, or without these all images.

    If all lie in first-level subfolders, these are their classes.
    """

    def make(pool, training):
        paths, labels, classes = labelled_files(pool, explicit=pool != root)
        depth = say_survey(root, tuple(itertools.islice(image_files(training), SURVEYED)))
        return sources.Files(str(pool), paths, labels, classes=classes, depth=depth)

    return open_split(root, split, IMAGE_SPLITS, make)


def labelled_files(pool, explicit):
    """(paths, labels or None, class names) of all images below a folder.

    explicit: it is the folder of a split; then a class without images is an error.
    """
    if explicit:
        check_class_folders(pool)
    paths = listed_images(pool)
    parts = [path.relative_to(pool).parts for path in paths]
    names = [first for first, *rest in parts if rest]
    classes = sorted(set(names))
    if len(names) < len(paths):
        outside = [path.name for path, (_, *rest) in zip(paths, parts) if not rest]
        where = "no subfolders"
        if names:
            where = f"{len(outside)} of them in no subfolder ({log.first_of(outside, 3)})"
        say(f"{pool}: {len(paths)} images without class labels: {where}")
        return paths, None, []
    if not explicit or pool.name in IMAGE_SPLITS["train"]:
        say(f"{pool}: {len(paths)} images; class = subfolder, {named(classes)}")
    numbers = {name: label for label, name in enumerate(classes)}
    return paths, [numbers[name] for name in names], classes


def named(classes):
    """'12 of them: ant, bee, ...', for a message."""
    return f"{len(classes)} of them: {log.first_of(classes, 5)}"


def check_class_folders(pool):
    """Raise ValueError if a folder holds class folders only and one of them has no images."""
    classes = []
    for path in sorted(pool.iterdir()):
        if path.is_dir():
            classes.append(path)
        elif path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            return  # an image beside them: these are not classes
    for folder in classes:
        if not folder.name.startswith(".") and next(image_files(folder), None) is None:
            raise ValueError(f"{folder}: the class folder is empty; fill or remove it")


# -------------------------------------------------------- images with masks


def masked_source(root, split):
    """Files of one split with masks: ROOT/images/<path>.jpg and ROOT/annotations/<path>.png.

    ROOT/classes.txt names the classes 0, 1, ...; without it 0 is ignored and 1 to 150 are the
    classes, as in ADE20K. Raises ValueError for an image without annotation. The values of masks
    are checked by whoever uses them: see sources.Files.check.
    """
    images, classes = root / "images", read_classes(root)
    if classes:
        say(f"{root}: classes 0, 1, ... are the lines of classes.txt, {named(classes)}")

    def mask_of(image):
        return root / "annotations" / image.relative_to(images).with_suffix(".png")

    def make(pool, training):
        """The Files of all images below `pool`: see open_split."""
        paths = listed_images(pool)
        masks = [mask_of(path) for path in paths]
        for mask in masks:
            if not mask.is_file():
                raise ValueError(f"{mask} is missing: every image needs a mask of its name, a PNG")
        surveyed = tuple(itertools.islice(image_files(training), SURVEYED))
        checked = tuple(map(mask_of, surveyed))
        return sources.Files(
            str(pool),
            paths,
            masks=masks,
            mask_classes=classes or [str(c) for c in range(ADE_CLASSES)],
            first_class=0 if classes else 1,
            depth=say_survey(root, surveyed),
            mask_check=functools.partial(check_values, root, checked, classes and len(classes)),
        )

    return open_split(images, split, MASK_SPLITS, make)


def read_classes(root):
    """The lines of ROOT/classes.txt, or None without the file.

    Raises ValueError unless it names two to 255 different classes.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8") from error
    if "" in names:
        raise ValueError(
            f"{path}: line {names.index('') + 1} is blank; it needs one class name a line"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: class {twice!r} is named twice")
    if not 2 <= len(names) <= sources.IGNORE:
        raise ValueError(f"{path}: it names {len(names)} classes; expected 2 to {sources.IGNORE}")
    return names


@functools.cache  # once for both splits
def check_values(root, masks, classes):
    """Check the values of a set's first masks, and say how they are read.

    masks: a tuple of paths. classes: the number in classes.txt, or None for ADE20K's convention.
    Raises ValueError if they cannot be read as class numbers, all of them or by their values.
    """
    values, errors = set(), []
    for mask in masks:
        try:
            values |= set(np.unique(photos.read_mask(mask)).tolist())
        except photos.Unreadable as error:  # a single one is named when it is read
            errors.append(error)
    if errors and not values:
        raise errors[0]
    last = classes - 1 if classes else ADE_CLASSES
    wrong = sorted(v for v in values if v > last and not (classes and v == sources.IGNORE))
    left = values - ({sources.IGNORE} if classes else {0, *wrong})
    file = root / "classes.txt"
    if values and values <= {0, sources.IGNORE} and sources.IGNORE in values:
        raise ValueError(
            f"{root}: the masks hold only 0 and 255, and 255 means ignored: write 1 in place of "
            f"255 (Pillow: mask.point(lambda v: v // 255)), and 'background' and 'object' as the "
            f"two lines of {file}"
        )
    if classes and wrong:
        raise ValueError(
            f"{root}: mask value {wrong[0]} is out of range for the {classes} classes of {file}: "
            f"they are 0 to {last}, and 255 is ignored"
        )
    if classes or not values:
        return
    if len(left) < 2:
        raise ValueError(
            f"{root}: no {file}, and by ADE20K's convention (0 is ignored) the masks' values "
            f"{log.first_of(sorted(values), 8)} leave {len(left)} class: name the classes of 0, 1, "
            f"... in {file}, one a line (for 0/1 masks: background, object)"
        )
    if wrong:
        raise ValueError(
            f"{root}: mask value {wrong[0]} is above ADE20K's {ADE_CLASSES}: name your classes of "
            f"0, 1, ... in {file}, one a line; 255 is ignored"
        )
    say(
        f"{root}: without a classes.txt, masks are read as ADE20K's: 0 is ignored and 1 to "
        f"{ADE_CLASSES} are the classes (found: {log.first_of(sorted(values), 8)})"
    )

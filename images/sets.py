"""What --data and SOURCE can be:

    shapes           drawn here: three shapes on a dark texture, with labels and masks, 24 x 24
    fashion-mnist    28 x 28 grey, with labels; downloaded on first use
    fashion-scenes   four Fashion-MNIST garments on one canvas, with masks, 56 x 56
    cifar10          32 x 32, with labels; downloaded on first use
    FILE.npz         arrays SPLIT_images uint8 (n, H, W) or (n, H, W, 3), SPLIT_labels (n,),
                     SPLIT_masks uint8 (n, H, W), classes and mask_classes (names); only the images
                     are required. SPLIT is train, val or test; mask value 255 is ignored
    FOLDER           the same arrays as SPLIT_images.npy and so on, read by memory-mapping
    FOLDER           ImageNet's layout: train/<class>/<image>, val/<class>/<image>
    FOLDER           ADE20K's layout: images/{training,validation}/<name>.jpg with
                     annotations/{training,validation}/<name>.png, where 0 is ignored

Image files need the optional package Pillow.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from images import named, shapes, sources

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")  # of image files


def open_source(data, split, data_dir=None):
    """The Arrays or Files that --data names; data_dir: see downloads.data_folders.

    Raises NoSplit if the set does not have the split, and ValueError or OSError saying what is
    wrong with it.
    """
    loaders = {
        "shapes": shapes.shapes,
        "fashion-mnist": named.fashion_mnist,
        "fashion-scenes": named.fashion_scenes,
        "cifar10": named.cifar10,
    }
    if data in loaders:
        return loaders[data](split, data_dir)
    path = Path(data)
    try:
        if path.suffix == ".npz" and path.is_file():
            if not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile("it is not a zip archive")
            return arrays_source(path, np.load(path, allow_pickle=False), split)
        if path.is_dir() and (path / f"{split}_images.npy").is_file():
            files = path.glob("*.npy")
            arrays = {f.stem: np.load(f, mmap_mode="r", allow_pickle=False) for f in files}
            return arrays_source(path, arrays, split)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole array file: {error}") from error
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return ade_source(path, split)
    if (path / split).is_dir():
        return folder_source(path / split)
    if path.exists():
        raise sources.NoSplit(
            f"--data {data}: it has no split {split!r} (layouts: python -m images.convert --help)"
        )
    raise ValueError(f"--data {data}: no such file or folder, and not one of {', '.join(loaders)}")


def open_splits(args):
    """(training source, held-out source) of --data, the second from --eval-split."""
    train = open_source(args.data, "train", args.data_dir)
    return train, open_source(args.data, args.eval_split, args.data_dir)


def arrays_source(path, arrays, split):
    """Arrays from {name: array} with the names SPLIT_images, SPLIT_labels and so on."""
    if f"{split}_images" not in arrays:
        raise sources.NoSplit(
            f"{path}: it has no array {split}_images; it has {', '.join(sorted(arrays))}"
        )
    names = f"{split}_images", f"{split}_labels", f"{split}_masks", "classes", "mask_classes"
    found = (arrays[name] if name in arrays else None for name in names)
    return sources.Arrays(f"{path} {split}", *found)


def image_files(folder):
    """The image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def folder_source(folder):
    """Files of one split in ImageNet's layout. Raises ValueError for a class without images."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{folder}: it has no class folders; expected {folder}/<class>/<image>")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            raise ValueError(f"{folder / name}: the class folder is empty; fill or remove it")
        paths += files
        labels += [label] * len(files)
    return sources.Files(str(folder), paths, labels=labels, classes=classes)


def ade_source(path, split):
    """Files of one split in ADE20K's layout. Raises ValueError for an image without annotation."""
    part = {"train": "training", "val": "validation"}.get(split)
    if part is None:
        raise sources.NoSplit(f"{path}: ADE20K's layout has no split {split!r}")
    paths = image_files(path / "images" / part)
    masks = [path / "annotations" / part / f"{image.stem}.png" for image in paths]
    if not paths:
        raise ValueError(f"{path / 'images' / part}: it has no images")
    for mask in masks:
        if not mask.is_file():
            raise ValueError(f"{mask} is missing: every image needs an annotation of its name")
    classes = [str(c) for c in range(150)]
    return sources.Files(f"{path} {part}", paths, masks=masks, mask_classes=classes)

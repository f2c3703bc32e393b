"""What --data and SOURCE can be:

    shapes           drawn here: three shapes on a dark texture, with labels and masks, 24 x 24
    fashion-mnist    28 x 28 grey, with labels; downloaded on first use
    fashion-scenes   four Fashion-MNIST garments on one canvas, with masks, 56 x 56
    cifar10          32 x 32, with labels; downloaded on first use
    imagenette       photographs, 128 x 128, with labels; downloaded and decoded on first use
    FILE.npz         arrays SPLIT_images uint8 (n, H, W) or (n, H, W, 3), SPLIT_labels (n,),
                     SPLIT_masks uint8 (n, H, W), classes and mask_classes (names); only the images
                     are required. SPLIT is train, val or test; mask value 255 is ignored
    FOLDER           the same arrays as SPLIT_images.npy and so on, read by memory-mapping
    FOLDER           images at any depth. Where all lie in first-level subfolders, these are the
                     classes. Splits: train/, val/ and test/, or all of it, see docs/data.md
    FOLDER           images/{training,validation,test}/<name>.jpg with masks annotations/.../
                     <name>.png, whose values are the lines of classes.txt, and 255 is ignored;
                     without classes.txt, as in ADE20K, 0 is ignored and classes start at 1

Image files need the optional package Pillow.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from images import folders, imagenette, named, shapes, sources


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
        "imagenette": imagenette.imagenette,
    }
    if data in loaders:
        return loaders[data](split, data_dir)
    path = Path(data)
    try:
        if path.suffix == ".npz" and path.is_file():
            if not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile("it is not a zip archive")
            return arrays_source(path, np.load(path, allow_pickle=False), split)
        if path.is_dir() and any(path.glob("*_images.npy")):
            files = path.glob("*.npy")
            arrays = {f.stem: np.load(f, mmap_mode="r", allow_pickle=False) for f in files}
            return arrays_source(path, arrays, split)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole array file: {error}") from error
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return folders.masked_source(path, split)
    if path.is_dir():
        return folders.folder_source(path, split)
    if path.exists():
        raise ValueError(f"--data {data}: a file, but neither a .npz file nor a folder")
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

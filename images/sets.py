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

from pathlib import Path

from images import arrays, folders, imagenette, named, shapes


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
    is_archive = path.suffix == ".npz" and path.is_file()
    if is_archive or (path.is_dir() and any(path.glob("*_images.npy"))):
        return arrays.read_split(path, split)
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return folders.masked_source(path, split)
    if path.is_dir():
        return folders.folder_source(path, split)
    if path.exists():
        raise ValueError(f"{data}: a file, but neither a .npz file nor a folder")
    raise ValueError(f"{data}: no such file or folder, and not one of {', '.join(loaders)}")

"""Named data sets: Fashion-MNIST, scenes made of it, and CIFAR-10. Each split is an Arrays."""

import functools
import gzip
import hashlib
import tarfile
import zlib

import numpy as np

from images import downloads, sources

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
FASHION_CLASSES = "top trouser pullover dress coat sandal shirt sneaker bag boot".split()
FASHION_SHA256 = {  # of the uncompressed files: Debian compresses them again
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

SCENE_SIZE, SCENE_JITTER = 56, 4  # pixels
SCENES_COUNT = {"train": 8000, "val": 1000, "test": 1000}


def read_idx(name, data_dir):
    """One of Fashion-MNIST's four IDX files: uint8 images (n, 28, 28) or labels (n,).

    Raises ValueError if the file is damaged or is not the published one.
    """

    def unpack(path):
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a whole gzip file ({error}): delete it and start again"
            ) from error
        downloads.check_digest(path, hashlib.sha256(content).hexdigest(), FASHION_SHA256[name])
        return content

    folders = downloads.data_folders(data_dir, FASHION_FOLDER)
    content = unpack(downloads.fetch(f"{name}.gz", f"{FASHION_URL}{name}.gz", folders, unpack))
    if "images" in name:
        return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(content, np.uint8, offset=8)


def fashion_mnist(split, data_dir=None):
    """Fashion-MNIST: 55,000 training, 5,000 validation and 10,000 test images, 28 x 28 grey.

    Validation images are the last 5,000 of the published training file.
    """
    file = "t10k" if split == "test" else "train"
    part = {"train": slice(0, 55_000), "val": slice(55_000, None), "test": slice(None)}[split]
    images = read_idx(f"{file}-images-idx3-ubyte", data_dir)[part]
    labels = read_idx(f"{file}-labels-idx1-ubyte", data_dir)[part]
    return sources.Arrays(f"fashion-mnist {split}", images, labels, classes=FASHION_CLASSES)


def fashion_scenes(split, data_dir=None):
    """Scenes of four Fashion-MNIST garments of the same split: 56 x 56 grey, with masks.

    Each quarter gets one garment, displaced by up to 4 pixels within the canvas; where garments
    overlap, the later hides the earlier. Mask 0 is background and c + 1 is class c, on the pixels
    of the garment's silhouette. A scene depends only on its split and index.
    """
    garments = fashion_mnist(split, data_dir)
    count, quarters = SCENES_COUNT[split], np.array([(0, 0), (0, 28), (28, 0), (28, 28)])
    images = np.zeros((count, SCENE_SIZE, SCENE_SIZE), np.uint8)
    masks = np.zeros_like(images)
    for scene in range(count):
        rng = np.random.default_rng((sources.SPLITS.index(split), scene))
        corners = quarters + rng.integers(-SCENE_JITTER, SCENE_JITTER + 1, (4, 2))
        corners = corners.clip(0, SCENE_SIZE - 28)
        for (top, left), index in zip(corners, rng.integers(0, len(garments), 4)):
            garment = garments.images[index]
            silhouette = garment > 16
            box = scene, slice(top, top + 28), slice(left, left + 28)
            images[box][silhouette] = garment[silhouette]
            masks[box][silhouette] = garments.labels[index] + 1
    classes = ["background", *FASHION_CLASSES]
    return sources.Arrays(f"fashion-scenes {split}", images, masks=masks, mask_classes=classes)


def cifar10(split, data_dir=None):
    """CIFAR-10, binary version: 45,000 training, 5,000 validation and 10,000 test images, 32 x 32.

    Validation images are the last 5,000 of the published training files.
    """
    check = functools.partial(downloads.check_md5, published=CIFAR_MD5)
    folders = downloads.data_folders(data_dir)
    path = downloads.fetch("cifar-10-binary.tar.gz", CIFAR_URL, folders, check)
    names = ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    with tarfile.open(path) as archive:
        members = (archive.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in names)
        content = b"".join(member.read() for member in members)
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)  # a label and 3 x 32 x 32 pixels
    part = {"train": slice(0, 45_000), "val": slice(45_000, None), "test": slice(None)}[split]
    labels, pixels = records[part, 0], records[part, 1:]
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return sources.Arrays(f"cifar10 {split}", images, labels, classes=CIFAR_CLASSES)

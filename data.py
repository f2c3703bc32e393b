"""Images in, two views out (section 2.5: one crop and flip, resized once for patches, once for tokens).

    --data shapes | fashion-mnist | fashion-scenes | cifar10 | FILE.npz | FOLDER

A FOLDER holds .npy arrays, or images in ImageNet's layout (train/<class>/..., val/<class>/...) or
ADE20K's (images/training, annotations/training, ...). Convert any of them once to arrays that train
without decoding:

    python data.py SOURCE DESTINATION.npz --size 64      # or a new folder, for .npy that are memory-mapped

Whatever is random about a sample is a function of (seed, epoch, index) and of nothing else, so the
number of loader processes and torchrun processes changes no crop. Views leave here as uint8.
"""

import contextlib
import copy
import gzip
import hashlib
import math
import os
import random
import signal
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

import training

IGNORE = 255  # mask value of pixels that neither loss nor mIoU counts
SPLITS = ("train", "val", "test")


# ---------------------------------------------------------------- two kinds of source


class Arrays:
    """Images of one size in memory or memory-mapped.

    images uint8 (n, H, W) or (n, H, W, 3); labels integers (n,) or None; masks uint8 (n, H, W) or None,
    IGNORE where there is no class; classes and mask_classes: their names, numbers if not given. Raises
    ValueError on other types and shapes.
    """

    def __init__(self, name, images, labels=None, masks=None, classes=None, mask_classes=None):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise ValueError(
                f"{name}: images are {images.dtype} {images.shape}; wanted uint8 (n, H, W) or (n, H, W, 3)"
            )
        if len(images) == 0:
            raise ValueError(f"{name}: there are no images in it")
        if labels is not None:
            labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # MedMNIST's are (n, 1)
            if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(f"{name}: labels are {labels.dtype} {labels.shape}; wanted integers ({len(images)},)")
            if labels.min() < 0:
                raise ValueError(f"{name}: label {labels.min()} is out of range: classes start at 0")
        if masks is not None and (masks.dtype != np.uint8 or masks.shape != images.shape[:3]):
            raise ValueError(f"{name}: masks are {masks.dtype} {masks.shape}; wanted uint8 {images.shape[:3]}")
        self.name, self.images, self.masks = name, images, masks
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.classes = class_names(classes, self.labels)
        self.mask_classes = class_names(mask_classes, masks)

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        """uint8 images (B, H, W, 3); grey becomes three equal channels."""
        images = np.array(self.images[indices])
        return images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)

    def read_labels(self, indices):
        """int64 labels (B,)."""
        return self.labels[indices]

    def read_masks(self, indices):
        """uint8 masks (B, H, W)."""
        return np.array(self.masks[indices])


def class_names(given, values):
    """Names as given; else the numbers from 0 to the largest value; none where there are no values."""
    if given is not None:
        return [str(name) for name in given]
    return [] if values is None else [str(c) for c in range(values.max(where=values != IGNORE, initial=0) + 1)]


class Files:
    """Image files of any sizes, decoded when read. Reads one at a time: `read` gives (1, H, W, 3)."""

    def __init__(self, name, paths, labels=None, masks=None, classes=(), mask_classes=()):
        self.name, self.paths, self.masks = name, paths, masks  # masks: paths, as the images
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.classes, self.mask_classes = list(classes), list(mask_classes)

    def __len__(self):
        return len(self.paths)

    def read(self, indices):
        """uint8 image (1, H, W, 3): palettes, CMYK and the like become RGB, 16-bit grey keeps its upper byte.

        Raises ValueError naming a file that cannot be decoded.
        """
        (index,) = indices
        image = decode(self.paths[index])
        if image.mode.startswith("I"):  # convert() would clip at 255
            grey = (np.array(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[None, ..., None], 3, axis=3)
        return np.array(image.convert("RGB"))[None]

    def read_labels(self, indices):
        """int64 label (1,)."""
        return self.labels[indices]

    def read_masks(self, indices):
        """uint8 mask (1, H, W): ADE20K's value 0, "other", is ignored and the 150 classes move down by one."""
        (index,) = indices
        return np.asarray(decode(self.masks[index]))[None] - np.uint8(1)  # 0 wraps round to 255 = IGNORE


def check_names(held_out, trained, source):
    """Raise ValueError unless class c of the held-out set is class c of training (it may lack the last ones)."""
    if held_out != trained[: len(held_out)]:
        wrong = next(name for c, name in enumerate(held_out) if trained[c : c + 1] != [name])
        raise ValueError(f"{source.name}: its class {wrong!r} is not at the same place among the training classes")


def balanced_subset(source, per_class, seed):
    """`per_class` images of each class, drawn by the seed. Raises ValueError if a class has fewer."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c in range(len(source.classes)):
        of_class = np.flatnonzero(source.labels == c)
        if len(of_class) < per_class:
            raise ValueError(f"{source.name}: class {source.classes[c]!r} has {len(of_class)} images, not {per_class}")
        chosen.append(rng.choice(of_class, per_class, replace=False))
    return subset(source, np.sort(np.concatenate(chosen)))


def random_subset(source, count, seed):
    """`count` images, drawn by the seed. Raises ValueError if there are fewer."""
    if count > len(source):
        raise ValueError(f"{source.name}: it has {len(source)} images, not {count}")
    return subset(source, np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False)))


def subset(source, indices):
    """A copy of the source with only the images at `indices`."""
    smaller = copy.copy(source)
    for name in ("images", "paths", "labels", "masks"):
        values = getattr(source, name, None)
        if values is not None:
            chosen = values[indices] if isinstance(values, np.ndarray) else [values[i] for i in indices]
            setattr(smaller, name, chosen)
    return smaller


def decode(path):
    """Open and decode one image file with Pillow. Raises ValueError naming the file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs the optional package Pillow: pip install pillow, or use arrays (data.py)"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file of a hundred million pixels
            image = Image.open(path)
            image.load()  # of an animation the first frame
        return image
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, its own bomb error, ...
        raise ValueError(f"{path} is not a readable image: {error}") from error


class NoSplit(ValueError):
    """The data set is there, but has no such split."""


def open_source(data, split, data_dir=None):
    """The source that --data names. Raises NoSplit, or ValueError saying what is wrong with it."""
    named = {"shapes": shapes, "fashion-mnist": fashion_mnist, "fashion-scenes": fashion_scenes, "cifar10": cifar10}
    if data in named:
        return named[data](split, data_dir)
    path = Path(data)
    try:
        if path.suffix == ".npz" and path.is_file():
            if not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile("it is no zip archive")
            return arrays_source(path, np.load(path, allow_pickle=False), split)
        if path.is_dir() and (path / f"{split}_images.npy").is_file():
            found = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in path.glob("*.npy")}
            return arrays_source(path, found, split)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole array file: {error}") from error
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return ade_source(path, split)
    if (path / split).is_dir():
        return folder_source(path / split)
    if path.exists():
        raise NoSplit(f"--data {data}: no split {split!r} in it (layouts: python data.py --help)")
    raise ValueError(f"--data {data}: no such file or folder, and not one of {', '.join(named)}")


def arrays_source(path, arrays, split):
    """The split's arrays by their names: SPLIT_images, SPLIT_labels, SPLIT_masks, classes, mask_classes."""
    if f"{split}_images" not in arrays:
        raise NoSplit(f"{path}: no array {split}_images; it has {', '.join(sorted(arrays))}")
    names = f"{split}_images", f"{split}_labels", f"{split}_masks", "classes", "mask_classes"
    return Arrays(f"{path} {split}", *(arrays[n] if n in arrays else None for n in names))


def image_files(folder):
    """Image files below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png", ".bmp", ".webp"))


def folder_source(folder):
    """ImageNet's layout: one folder of images per class. Raises ValueError on a class without images."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise ValueError(f"{folder}: no class folders in it; wanted {folder}/<class>/<image>")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            raise ValueError(f"{folder / name}: an empty class folder; put images in it or remove it")
        paths += files
        labels += [label] * len(files)
    return Files(str(folder), paths, labels=labels, classes=classes)


def ade_source(path, split):
    """ADE20K's layout: images/{training,validation}/*.jpg with annotations/{training,validation}/*.png."""
    part = {"train": "training", "val": "validation"}.get(split)
    if part is None:
        raise NoSplit(f"{path}: ADE20K's layout has no split {split!r}")
    paths = image_files(path / "images" / part)
    masks = [path / "annotations" / part / (p.stem + ".png") for p in paths]
    if not paths:
        raise ValueError(f"{path / 'images' / part}: no images in it")
    for mask in masks:
        if not mask.is_file():
            raise ValueError(f"{mask}: missing; every image needs an annotation of the same name")
    return Files(f"{path} {part}", paths, masks=masks, mask_classes=[str(c) for c in range(150)])


# ---------------------------------------------------------------- downloads


def fetch(name, url, folders, check):
    """Path of file `name`: in the first of `folders` that has it, else downloaded into the last one.

    check(path) raises ValueError on wrong content; it sees a download before that gets its name. A download that breaks
    off goes on from there next time; of several processes one downloads.
    """
    for folder in folders:
        if (folder / name).is_file():
            check(folder / name)
            return folder / name
    target = folders[-1] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    with open(partial, "ab") as file, exclusive(file):
        if not target.is_file():  # another process may have fetched it in the meantime
            try:
                file.seek(0, os.SEEK_END)  # where the process before this one broke off
                download(url, file)
                check(partial)
            except OSError as error:
                if file.tell() == 0:
                    partial.unlink(missing_ok=True)
                message = f"cannot download {url} ({error}): fetch it yourself and point --data-dir at it"
                raise ValueError(message) from error
            except ValueError:
                partial.unlink(missing_ok=True)
                raise
            os.replace(partial, target)
    return target


@contextlib.contextmanager
def exclusive(file):
    """Hold an open file's lock, waiting for it, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file gives the lock back


def download(url, file):
    """Append what is still missing of `url` to an open file. Raises OSError if the connection fails or breaks off."""
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the whole file is here
            raise
        return
    with response:
        if start and response.status != 206:  # this server starts again
            file.seek(0)
            start = file.truncate()
        total = start + int(response.headers.get("Content-Length") or 0)
        while block := response.read(1 << 16):
            file.write(block)
            print(f"\r{url}: {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB", end="", file=sys.stderr)
    print(file=sys.stderr)
    file.flush()
    if file.tell() < total:
        raise OSError(f"it broke off after {file.tell()} of {total} bytes; start again to go on from there")


def data_folders(data_dir, *system):
    """Where a data set's files are looked for: --data-dir alone if given, else system folders, then a cache."""
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"--data-dir {data_dir}: no such folder")
        return [Path(data_dir)]
    return [Path(f) for f in system] + [Path.home() / ".cache" / "beit"]


FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_CLASSES = "top trouser pullover dress coat sandal shirt sneaker bag boot".split()
FASHION_SHA256 = {  # of the uncompressed files: Debian compresses them anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(name, data_dir):
    """One of Fashion-MNIST's four IDX files, checked: uint8 (n, 28, 28) or (n,)."""
    folders = data_folders(data_dir, "/usr/share/datasets/fashion-mnist")

    def unpack(path):
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): delete it and start again") from error
        if hashlib.sha256(content).hexdigest() != FASHION_SHA256[name]:
            raise ValueError(f"{path} does not hold the published data (checksum differs): delete it and start again")
        return content

    content = unpack(fetch(name + ".gz", FASHION_URL + name + ".gz", folders, unpack))
    if "images" in name:
        return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.frombuffer(content, np.uint8, offset=8)


def fashion_mnist(split, data_dir):
    """Fashion-MNIST: 55,000 to train on, the last 5,000 of the training file to choose on (val), 10,000 test."""
    part = slice(None) if split == "test" else slice(0, 55_000) if split == "train" else slice(55_000, None)
    kind = "t10k" if split == "test" else "train"
    images = read_idx(f"{kind}-images-idx3-ubyte", data_dir)[part]
    labels = read_idx(f"{kind}-labels-idx1-ubyte", data_dir)[part]
    return Arrays(f"fashion-mnist {split}", images, labels, classes=FASHION_CLASSES)


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar10(split, data_dir):
    """CIFAR-10, binary version: 45,000 to train on, 5,000 to choose on (val), 10,000 test."""

    def check(path):
        if hashlib.md5(path.read_bytes()).hexdigest() != CIFAR_MD5:
            raise ValueError(f"{path} does not hold the published data (checksum differs): delete it and start again")

    path = fetch("cifar-10-binary.tar.gz", CIFAR_URL, data_folders(data_dir), check)
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    with tarfile.open(path) as archive:
        raw = b"".join(archive.extractfile(f"cifar-10-batches-bin/{n}.bin").read() for n in names)
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    part = {"test": records, "train": records[:45_000], "val": records[45_000:]}[split]
    images = part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Arrays(f"cifar10 {split}", np.ascontiguousarray(images), part[:, 0], classes=CIFAR_CLASSES)


# ---------------------------------------------------------------- images drawn here

SHAPE_CLASSES = "disk ring square triangle star cross bar crescent".split()
SHAPES_SIZE = 24
SHAPES_COUNT = {"train": 8000, "val": 1000, "test": 1000}


def shape_distance(kind, u, v):
    """Signed distance (roughly; negative inside) of points (u, v) to a shape of radius about 1 at the origin."""
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    au, av = np.abs(u), np.abs(v)
    if kind == "disk":
        return radius - 0.9
    if kind == "ring":
        return np.abs(radius - 0.75) - 0.22
    if kind == "square":
        return np.maximum(au, av) - 0.8
    if kind == "triangle":
        return np.max([u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, -2 * math.pi / 3)], axis=0) - 0.5
    if kind == "star":
        return radius - (0.7 + 0.33 * np.cos(5 * angle))
    if kind == "cross":
        return np.minimum(np.maximum(au - 1, av - 0.3), np.maximum(au - 0.3, av - 1))
    if kind == "bar":
        return np.maximum(au - 1, av - 0.35)
    return np.maximum(radius - 0.95, 0.75 - np.hypot(u - 0.5, v))  # crescent


def hue(h):
    """Full-brightness colour around the hue circle: (n, 1, 1) in [0, 1] -> (n, 1, 1, 3)."""
    return np.clip(np.abs((h[..., None] * 6 + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1, 0, 1)


def draw_shapes(uniforms, size):
    """Draw images from uniform numbers (n, 40): uint8 images (n, size, size, 3), labels (n,), masks (n, size, size).

    On a dark texture two small shapes, then the large one in front, whose kind is the label. Each is brighter towards
    its middle, so that its inside tells of its outline too, as it does in photographs. Mask 0 is background, c + 1 is
    class c.
    """
    n = len(uniforms)
    u = iter(uniforms.T[:, :, None, None].astype(np.float32))  # each next(u): (n, 1, 1)
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    waves = [np.sin((next(u) - 0.5) * x + (next(u) - 0.5) * y + 6.3 * next(u)) for _ in range(2)]
    images = (0.5 + 0.5 * hue(next(u))) * (0.15 + 0.1 * waves[0] * waves[1])[..., None]
    masks = np.zeros((n, size, size), np.uint8)
    for low, high in ((0.1, 0.15), (0.1, 0.15), (0.32, 0.42)):  # range of radii, in image sides
        kind = np.floor(next(u)[:, 0, 0] * len(SHAPE_CLASSES)).astype(int)
        radius = (low + (high - low) * next(u)) * size
        cx, cy = (radius + (size - 2 * radius) * next(u) for _ in range(2))
        turn = (next(u) - 0.5) * math.pi / 6  # at most 15 degrees either way
        colour = hue(np.floor(next(u) * 6) / 6)
        du, dv = (x - cx) / radius, (y - cy) / radius
        du, dv = du * np.cos(turn) + dv * np.sin(turn), dv * np.cos(turn) - du * np.sin(turn)
        distance = np.empty((n, size, size), np.float32)
        for c, name in enumerate(SHAPE_CLASSES):
            distance[kind == c] = shape_distance(name, du[kind == c], dv[kind == c])
        cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]  # soft edge, one pixel wide
        shade = 0.5 + 0.5 * np.clip(-distance / 0.6, 0, 1)[..., None]
        images = images * (1 - cover) + colour * shade * cover
        masks = np.where(distance < 0, (kind[:, None, None] + 1).astype(np.uint8), masks)
    return (images * 255).round().astype(np.uint8), kind, masks


def shapes(split, data_dir=None):
    """Textured scenes of three shapes of eight kinds; image i of a split is a function of the split and i."""
    count = SHAPES_COUNT[split]
    uniforms = np.stack([np.random.default_rng((SPLITS.index(split), i)).random(40) for i in range(count)])
    parts = [draw_shapes(chunk, SHAPES_SIZE) for chunk in np.array_split(uniforms, max(1, count // 500))]
    images, labels, masks = (np.concatenate(p) for p in zip(*parts))
    return Arrays(f"shapes {split}", images, labels, masks, SHAPE_CLASSES, ["background", *SHAPE_CLASSES])


SCENE_SIZE, SCENE_JITTER = 56, 4
SCENES_COUNT = {"train": 8000, "val": 1000, "test": 1000}


def fashion_scenes(split, data_dir):
    """Four garments of Fashion-MNIST's same split on a 56 x 56 canvas, with the classes of their silhouettes.

    One in each quarter, displaced by up to 4 pixels either way, as far as the canvas goes; where two meet, the later
    hides the earlier one. Mask 0 is background, c + 1 is class c. Scene i is a function of the split and i.
    """
    garments = fashion_mnist(split, data_dir)
    count = SCENES_COUNT[split]
    images = np.zeros((count, SCENE_SIZE, SCENE_SIZE), np.uint8)
    masks = np.zeros_like(images)
    for i in range(count):
        rng = np.random.default_rng((SPLITS.index(split), i))
        corners = np.array([(0, 0), (0, 28), (28, 0), (28, 28)]) + rng.integers(-SCENE_JITTER, SCENE_JITTER + 1, (4, 2))
        for (t, l), g in zip(corners.clip(0, SCENE_SIZE - 28), rng.integers(0, len(garments), 4)):
            garment = garments.images[g]
            seen = garment > 16
            images[i, t : t + 28, l : l + 28][seen] = garment[seen]
            masks[i, t : t + 28, l : l + 28][seen] = garments.labels[g] + 1
    return Arrays(f"fashion-scenes {split}", images, masks=masks, mask_classes=["background", *FASHION_CLASSES])


# ---------------------------------------------------------------- random crop, flip and colour jitter


def sample_rng(*key):
    """The random numbers of one sample: a generator that depends on its key (seed, epoch, index) alone."""
    return random.Random(repr(key))


def random_box(rng, height, width, min_area):
    """Random resized crop: min_area..1 of the area, aspect ratio log-uniform in 3/4..4/3; (top, left, h, w)."""
    if min_area >= 1:
        return 0, 0, height, width
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    side = min(height, width)  # a very long image: its centre
    return (height - side) // 2, (width - side) // 2, side, side


def centre_box(height, width, share):
    """The box that evaluation sees: a centred square of `share` of the short side; the whole image if 1."""
    if share >= 1:
        return 0, 0, height, width
    side = round(share * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side


def crop_resize(images, boxes, size, kernel):
    """The box (top, left, height, width) of each image, resized to size x size as Pillow does, antialiased.

    images uint8 (B, 3, H, W), boxes of whole pixels; kernel: "bicubic" or "lanczos" -> uint8 (B, 3, size, size).
    """
    crops = (images[i : i + 1, :, t : t + h, l : l + w] for i, (t, l, h, w) in enumerate(boxes))
    return torch.cat([F.interpolate(crop, (size, size), mode=kernel, antialias=True) for crop in crops])


def grey(images):
    """Luma: (..., 3, H, W) -> (..., 1, H, W)."""
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def colour_jitter(images, factors):
    """Brightness, contrast and saturation scaled by factors (B, 3), in that order; (B, 3, H, W) in [0, 1]."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    return (grey(images) + (images - grey(images)) * saturation).clamp(0, 1)


class Samples(Dataset):
    """A source to train on or to evaluate. A batch of keys (epoch, index) is fetched with __getitems__.

    An unreadable file is an error in evaluation; in training the next readable one takes its place, it is
    named on stderr and counted in `skipped`.
    """

    def __init__(self, source, train, seed):
        self.source, self.train, self.seed = source, train, seed
        self.skipped = torch.zeros(1, dtype=torch.int64).share_memory_()  # summed over loader processes

    def __len__(self):
        return len(self.source)

    def trouble(self):
        """{"skipped": files that could not be read so far} for the log; empty if all could."""
        skipped = int(self.skipped)
        return {"skipped": skipped} if skipped else {}

    def read(self, indices, *readers):
        """[reader(indices) for each reader], a bad file replaced in training by the next that can be read."""
        for offset in range(100):
            try:
                moved = [(i + offset) % len(self) for i in indices]
                return [reader(moved) for reader in readers]
            except ValueError as error:
                if not self.train:
                    raise
                self.skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
        raise ValueError(f"{self.source.name}: 100 files in a row cannot be read")


class Crops(Samples):
    """One random crop, flip and colour jitter of each image, resized to one or more views.

    views: list of (size, filter name). train=False: the centred square of `centre` of the short side (1: the whole
    image), as it is. A batch of keys gives a list of uint8 tensors (B, 3, size, size), one per view; with labels=True
    then the labels (B,).
    """

    def __init__(
        self, source, views, train, seed=0, min_crop=1.0, flip=False, jitter=0.0, centre=1.0, labels=False
    ):
        super().__init__(source, train, seed)
        self.views, self.centre, self.labels = views, centre, labels
        self.min_crop, self.flip, self.jitter = min_crop, flip, jitter

    def draw(self, key, height, width):
        """What is random about one sample: (box, flip, three colour factors)."""
        if not self.train:
            return centre_box(height, width, self.centre), False, (1.0, 1.0, 1.0)
        rng = sample_rng(self.seed, *key)
        box = random_box(rng, height, width, self.min_crop)
        factors = [1 + self.jitter * (2 * rng.random() - 1) for _ in range(3)]
        return box, self.flip and rng.random() < 0.5, factors

    def crop(self, keys):
        """The views, and labels, of samples whose images are of one size."""
        readers = [self.source.read] + [self.source.read_labels] * self.labels
        images, *labels = self.read([index for _, index in keys], *readers)
        height, width = images.shape[1:3]
        boxes, flips, factors = zip(*(self.draw(key, height, width) for key in keys))
        images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, 3, H, W)
        if any(flips):
            images = torch.where(torch.tensor(flips)[:, None, None, None], images.flip(3), images)
        if self.train and self.jitter:
            images = (colour_jitter(images / 255, torch.tensor(factors)) * 255).round().byte()
        views = []
        for size, kernel in self.views:
            as_it_is = (height, width) == (size, size) and set(boxes) == {(0, 0, size, size)}
            views.append(images if as_it_is else crop_resize(images, boxes, size, kernel))
        return [*views, *map(torch.from_numpy, labels)]

    def __getitems__(self, keys):
        if isinstance(self.source, Arrays):
            return self.crop(keys)
        return [torch.cat(parts) for parts in zip(*(self.crop([key]) for key in keys))]


# ---------------------------------------------------------------- batches


def steps_per_epoch(size, batch_size):
    """Whole global batches in an epoch. Raises ValueError if there is not even one."""
    if size < batch_size:
        raise ValueError(f"{size} training images are fewer than the batch size {batch_size}: lower --batch-size")
    return size // batch_size


class StepBatches(Sampler):
    """This process's keys (epoch, index) for each step in range(first, last): the order is a function of the step.

    An epoch is shuffled by (seed, epoch) and cut into global batches, of which each process takes its part in one
    piece: for any number of processes a step has the same samples in the same places. A last part batch is dropped.
    """

    def __init__(self, size, batch, rank, world, seed, first, last):
        self.steps_per_epoch = steps_per_epoch(size, batch * world)
        self.batch, self.start, self.stride, self.first, self.last = batch, batch * rank, batch * world, first, last
        self.sampler = DistributedSampler(range(size), num_replicas=1, rank=0, seed=seed)

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        step = self.first
        while step < self.last:
            epoch, within = divmod(step, self.steps_per_epoch)
            self.sampler.set_epoch(epoch)
            order = list(self.sampler)
            for b in range(within, min(self.steps_per_epoch, within + self.last - step)):
                start = b * self.stride + self.start
                yield [(epoch, index) for index in order[start : start + self.batch]]
                step += 1


def keep_batch(batch):
    """Collate function: `__getitems__` has made the batch already."""
    return batch


def ignore_signals(worker):
    """A signal to the whole group ends a run by its main process alone, which still needs its loader's batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def train_batches(dataset, batch, rank, world, seed, first, last, workers, device):
    """A loader of this process's batches for steps first..last-1."""
    sampler = StepBatches(len(dataset), batch, rank, world, seed, first, last)
    pin = device.type == "cuda"
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=keep_batch, pin_memory=pin,
        worker_init_fn=ignore_signals,
    )  # fmt: skip


def eval_batches(dataset, batch, limit, rank, world, workers):
    """This process's share of the first `limit` samples, in order, each once; epoch -1 in the keys.

    Raises Stopped if a signal came. Several processes, which then wait for each other's sums, go on to the end.
    """
    keys = [(-1, index) for index in range(rank, min(len(dataset), limit), world)]
    batches = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    for loaded in DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=keep_batch, worker_init_fn=ignore_signals
    ):
        if training.signals and world == 1:
            raise training.Stopped("stopped by a signal during an evaluation, which changes nothing")
        yield loaded


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [0, 1] on the device: the range the tokenizer wants."""
    return images.to(device, non_blocking=True).float().div_(255)


STATISTICS = {  # mean and std of R, G, B
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalise(images, statistics):
    """Images in [0, 1] -> standardised by the named statistics, the range the patches want."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in STATISTICS[statistics])
    return (images - mean) / std


def denormalise(images, statistics):
    """The inverse of normalise."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in STATISTICS[statistics])
    return images * std + mean


# ---------------------------------------------------------------- python data.py: convert once


def centre_square(images, size):
    """The centred square of uint8 images (B, H, W, 3), resized: uint8 (B, 3, size, size)."""
    height, width = images.shape[1:3]
    side = min(height, width)
    box = (height - side) // 2, (width - side) // 2, side, side
    return crop_resize(torch.from_numpy(images).permute(0, 3, 1, 2), [box] * len(images), size, "bicubic")


def centre_square_mask(mask, size):
    """The same square of a mask (H, W), nearest: (size, size)."""
    side = min(mask.shape)
    centres = (np.arange(size) * 2 + 1) * side // (2 * size)
    return mask[(mask.shape[0] - side) // 2 + centres][:, (mask.shape[1] - side) // 2 + centres]


def convert(source, size, split, folder):
    """Write one split as .npy files: images, and labels and masks where the source has them."""
    shape = (len(source), size, size)
    images = np.lib.format.open_memmap(folder / f"{split}_images.npy", "w+", np.uint8, (*shape, 3))
    for i in range(len(source)):
        images[i] = centre_square(source.read([i]), size)[0].permute(1, 2, 0).numpy()
    if source.masks is not None:
        masks = np.lib.format.open_memmap(folder / f"{split}_masks.npy", "w+", np.uint8, shape)
        for i in range(len(source)):
            masks[i] = centre_square_mask(source.read_masks([i])[0], size)
    if source.labels is not None:
        np.save(folder / f"{split}_labels.npy", source.labels)
    print(f"{split}: {len(source)} images")


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("source", help="a name or path, as --data takes")
    parser.add_argument("destination", help="a new .npz file, or a new folder for .npy files")
    parser.add_argument("--size", type=int, required=True, help="pixels along each side")
    parser.add_argument("--data-dir", help="where a named data set's own files are, or are downloaded to")
    args = parser.parse_args(argv)
    destination = Path(args.destination)
    if destination.exists():
        raise ValueError(f"{destination} exists already: choose a new name")
    if args.size < 1:
        raise ValueError(f"--size {args.size} is not a number of pixels")
    train = open_source(args.source, "train", args.data_dir)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:  # nothing half done is left behind
        folder = Path(temporary) / "arrays"
        folder.mkdir()
        np.save(folder / "classes.npy", np.array(train.classes, dtype=str))
        np.save(folder / "mask_classes.npy", np.array(train.mask_classes, dtype=str))
        convert(train, args.size, "train", folder)
        for split in ("val", "test"):
            try:
                source = open_source(args.source, split, args.data_dir)
            except NoSplit:
                print(f"{split}: not in {args.source}")
                continue
            convert(source, args.size, split, folder)
        if destination.suffix == ".npz":
            np.savez(folder / "all.npz", **{p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")})
            folder = folder / "all.npz"
        os.replace(folder, destination)


if __name__ == "__main__":
    with training.one_line_errors():
        main()

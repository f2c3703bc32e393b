"""Imagenette: ten classes of ImageNet photographs, decoded once to arrays beside the archive.

The published archive has 9,469 photographs in `train` and 3,925 in `val`, shorter side 160. Its
`val` is the test split here, and a tenth of its `train`, chosen by a hash of the name, is val.
"""

import contextlib
import functools
import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np

from images import arrays, downloads, folders, sources
from plumbing import log, signals

URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
MD5 = "e793b78cc4c9e9a4ccc0c1155377a412"
PUBLISHED = "imagenette2-160"  # the archive's name, and that of the one folder in it
MEMBERS = re.compile(rf"{PUBLISHED}/(train|val)/n\d{{8}}/\w[\w.-]*\.(JPEG|jpg)", re.ASCII)
CLASSES = {  # WordNet id: name; either may name a class's folder
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
SIZE = 128  # room for random crops of 112 pixels
HELD_OUT = 10  # one training photograph in so many is held out as val


def imagenette(split, data_dir=None):
    """One split: uint8 photographs (n, SIZE, SIZE, 3), memory-mapped, with class labels.

    On first use the arrays are made from the unpacked folder in --data-dir, or from the archive,
    which is found or downloaded. Each photograph becomes its centred square. Raises ValueError if
    that fails, or if the arrays are damaged.
    """
    found = downloads.data_folders(data_dir)
    decoded = found[-1] / f"imagenette-{SIZE}"
    if not decoded.is_dir():
        found[-1].mkdir(parents=True, exist_ok=True)
        lock = decoded.with_suffix(".lock")
        with open(lock, "ab") as file, downloads.exclusive(file):
            if not decoded.is_dir():  # another process may have made them while this one waited
                with signals.at_once("before the photographs of imagenette were decoded"):
                    make_arrays(found, decoded)
        with contextlib.suppress(OSError):  # on Windows it stays while others wait for it
            lock.unlink()  # they will find the arrays
    try:
        source = arrays.read_split(decoded, split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{decoded} is damaged ({error}): delete it and start again") from error
    source.name = f"imagenette {split}"
    return source


def make_arrays(found, decoded):
    """Decode all photographs into the new folder `decoded`; found: see downloads.data_folders.

    The folder gets its name only when it is complete.
    """
    from images import convert  # which can convert this set too, so it imports it

    unfinished = decoded.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        root = unpacked(found[-1]) or unpack(found, unfinished / "photographs")
        log.note(f"imagenette: decoding the photographs of {root} once, into {decoded}")
        result = unfinished / "arrays"
        result.mkdir()
        np.save(result / "classes.npy", np.array([*CLASSES.values()]))
        for split in sources.SPLITS:
            convert.convert_split(photographs(root, split), SIZE, split, result)
        result.rename(decoded)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unpacked(data_dir):
    """The folder with train/ and val/: in --data-dir, or --data-dir itself; None if neither is."""
    for root in (data_dir / PUBLISHED, data_dir):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    return None


def unpack(found, target):
    """Unpack the archive, which is found or downloaded, into a folder; return that of its splits.

    Only regular files in the published places are unpacked. Raises ValueError if the archive is
    not the published one.
    """
    check = functools.partial(downloads.check_md5, published=MD5)
    with tarfile.open(downloads.fetch(f"{PUBLISHED}.tgz", URL, found, check)) as archive:
        for member in archive:
            if member.isfile() and MEMBERS.fullmatch(member.name):
                path = target / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return target / PUBLISHED


def photographs(root, split):
    """The Files of one split, in the order of classes and names, whatever their folders are called.

    Raises ValueError if a class has no folder or no photographs.
    """
    pool = root / ("val" if split == "test" else "train")
    names = {id_: name.lower() for id_, name in CLASSES.items()}
    of_class = {names.get(path.name, path.name.replace("_", " ").lower()): path
                for path in sorted(pool.iterdir())}  # fmt: skip
    paths, labels = [], []
    for label, (id_, name) in enumerate(names.items()):
        if name not in of_class:
            raise ValueError(f"{pool}: Imagenette's class {CLASSES[id_]!r} has no folder, neither "
                             f"{id_} nor {name.replace(' ', '_')}")  # fmt: skip
        listed = sorted(folders.listed_images(of_class[name]), key=lambda path: path.stem)
        chosen = [path for path in listed if split == "test" or held_out(path) == (split == "val")]
        paths += chosen
        labels += [label] * len(chosen)
    return sources.Files(f"{pool} {split}", paths, labels, classes=CLASSES.values())


def held_out(path):
    """Is a training photograph held out? Its name decides, without the suffix and the folder."""
    digest = hashlib.blake2b(Path(path).stem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < 2**64 // HELD_OUT

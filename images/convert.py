"""Convert a data set to arrays once, so that training decodes no image files.

    python -m images.convert SOURCE DESTINATION.npz --size 64     # one file, read into memory
    python -m images.convert SOURCE DESTINATION --size 64         # a folder of .npy, memory-mapped

Each image becomes its largest centred square, resized. The result is a --data of every script.
Image files are decoded on all cores.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from images import batches, masked, photos, sets, sources, views
from plumbing import command_line, outputs

CHUNK = 16  # images that a process converts at a time


class Squares(Dataset):
    """A list of indices writes these images' centred squares, and masks, and gives their number.

    files: paths of the .npy files to write into, {"images": (n, size, size, 3)}, and "masks" if the
    source has them. Loader processes write themselves, because sending pixels takes time.
    """

    def __init__(self, source, size, files):
        self.source, self.size, self.files = source, size, files
        self.samples = masked.checked(source) if "masks" in files else None

    def __getitem__(self, indices):
        arrays = {name: np.load(path, mmap_mode="r+") for name, path in self.files.items()}
        for index in indices:
            try:
                squares = self.squares([index])
            except photos.Unreadable as error:
                raise ValueError(f"{error}: repair or remove it") from error
            for name, pixels in squares.items():
                arrays[name][index] = pixels
        return len(indices)

    def squares(self, index):
        """{name: pixels} of the image at the one index, and of its mask if it has one."""
        if not self.samples:
            return {"images": self.square(index)[0].permute(1, 2, 0).numpy()}
        image, mask = self.samples.read_pair(index)
        square = views.centre_square(image, self.size)[0].permute(1, 2, 0).numpy()
        return {"images": square, "masks": views.centre_square_mask(mask[0], self.size)}

    def square(self, index):
        """The square of the image at the one index: uint8 (1, 3, size, size)."""
        if isinstance(self.source, sources.Arrays):
            return views.centre_square(self.source.read(index), self.size)
        photo = self.source.open(index)
        scale = photo.scale(min(photo.size) / self.size)
        pixels = photo.pixels(scale)
        if scale == 1:
            return views.centre_square(pixels, self.size)
        part = [pixels / scale for pixels in views.square_box(*photo.size)]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return photos.resize_part(images, part, (self.size, self.size), "bicubic")


class Progress:
    """Prints how far a split is: an updating line on a terminal, elsewhere a line now and then."""

    def __init__(self, split, total):
        self.split, self.total = split, total
        self.terminal = sys.stdout.isatty()
        self.before = "\r\033[K" if self.terminal else ""  # erases the line
        self.start = self.last = time.monotonic()

    def show(self, done):
        """Report `done` images, at most every 5 seconds, or 5 times a second on a terminal."""
        now = time.monotonic()
        if done == self.total:
            print(f"{self.before}{self.split}: {done} images", flush=True)
        elif now - self.last >= (0.2 if self.terminal else 5):
            self.last, rate = now, done / max(now - self.start, 1e-9)
            left = (self.total - done) / rate
            line = f"{self.split}: {done}/{self.total}  {rate:.0f} images/s  {left:.0f}s left"
            print(f"{self.before}{line}", end="" if self.terminal else "\n", flush=True)


def split_shapes(source, size):
    """{name: shape} of the uint8 arrays that a split becomes."""
    shapes = {"images": (len(source), size, size, 3)}
    if source.masks is not None:
        shapes["masks"] = len(source), size, size
    return shapes


def make_array(path, shape):
    """Make a .npy file for a uint8 array of this shape, with all its bytes on the disk."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        outputs.reserve(file, file.tell() + math.prod(shape))


def convert_split(source, size, split, folder, workers=None):
    """Write one split as .npy files: images, and labels and masks if the source has them.

    workers: see batches.loader; the files do not depend on it.
    """
    shapes = split_shapes(source, size)
    files = {name: folder / f"{split}_{name}.npy" for name in shapes}
    for name, shape in shapes.items():
        make_array(files[name], shape)
    starts = range(0, len(source), CHUNK)
    chunks = [range(start, min(start + CHUNK, len(source))) for start in starts]
    progress, done = Progress(split, len(source)), 0
    try:
        for count in batches.loader(Squares(source, size, files), chunks, workers):
            done += count
            progress.show(done)
    except OSError as error:  # not of the files written: they have their bytes on the disk
        raise ValueError(f"{source.name} cannot be converted: {error}") from error
    if source.labels is not None:
        np.save(folder / f"{split}_labels.npy", source.labels)


def open_splits(args):
    """{split: source} of the splits that the data set has; `train` must be one of them."""
    found = {"train": sets.open_source(args.source, "train", args.data_dir)}
    for split in ("val", "test"):
        try:
            found[split] = sets.open_source(args.source, split, args.data_dir)
        except sources.NoSplit:
            print(f"{split}: not in {args.source}")
    return found


def names_of(found, kind):
    """The names `classes` or `mask_classes` of all splits: those of `train`, or else the longest.

    Raises ValueError if a split numbers them in another way.
    """
    names = {split: getattr(source, kind) for split, source in found.items()}
    chosen = names["train"] or max(names.values(), key=len)
    for split, source in found.items():
        sources.check_names(names[split], chosen, source)
    return chosen


@contextlib.contextmanager
def parents_of(path):
    """Make the folders above `path`; if then something fails, remove those that it made."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody uses one of them now
            for folder in made:
                folder.rmdir()
        raise


def main(argv=None):
    parser = command_line.Parser(f"{__doc__}\n{sets.__doc__}")
    parser.add_argument("source", help="data set to convert, see above")
    parser.add_argument("destination", help="new .npz file, or new folder for .npy files")
    size = "pixels along each side"
    command_line.add_number(parser, "--size", int, "[1, 65536]", size, required=True)
    parser.add_argument(
        "--data-dir", help="folder with a named set's own files, or where to download them to"
    )
    args = parser.parse_args(argv)
    destination = Path(args.destination)
    is_archive = destination.suffix == ".npz"
    with parents_of(destination):
        outputs.check_new(destination, args.source)
        found = open_splits(args)
        names = {kind: names_of(found, kind) for kind in ("classes", "mask_classes")}
        shapes = [split_shapes(source, args.size) for source in found.values()]
        needed = sum(math.prod(shape) for split in shapes for shape in split.values())
        # An archive is made from the .npy files, beside them.
        outputs.check_room(destination, 2 * needed if is_archive else needed)
        with outputs.new(destination) as result:
            folder = result.with_name("arrays") if is_archive else result
            folder.mkdir()
            for kind, values in names.items():
                np.save(folder / f"{kind}.npy", np.array(values, dtype=str))
            for split, source in found.items():
                convert_split(source, args.size, split, folder)
            if is_archive:
                arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
                np.savez(result, **arrays)


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

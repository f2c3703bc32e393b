"""Convert a data set to arrays once, so that training decodes no image files.

    python -m images.convert SOURCE DESTINATION.npz --size 64     # one file, read into memory
    python -m images.convert SOURCE DESTINATION --size 64         # a folder of .npy, memory-mapped

Each image becomes its largest centred square, resized. The result is a --data of every script.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from images import sets, sources, views
from plumbing import command_line


def convert_split(source, size, split, folder):
    """Write one split as .npy files: images, and labels and masks if the source has them."""
    shape, new_array = (len(source), size, size), np.lib.format.open_memmap
    images = new_array(folder / f"{split}_images.npy", "w+", np.uint8, (*shape, 3))
    for index in range(len(source)):
        square = views.centre_square(source.read([index]), size)[0]
        images[index] = square.permute(1, 2, 0).numpy()
    if source.masks is not None:
        masks = new_array(folder / f"{split}_masks.npy", "w+", np.uint8, shape)
        for index in range(len(source)):
            masks[index] = views.centre_square_mask(source.read_masks([index])[0], size)
    if source.labels is not None:
        np.save(folder / f"{split}_labels.npy", source.labels)
    print(f"{split}: {len(source)} images")


def main(argv=None):
    parser = command_line.Parser(f"{__doc__}\n{sets.__doc__}")
    parser.add_argument("source", help="data set to convert, see above")
    parser.add_argument("destination", help="new .npz file, or new folder for .npy files")
    parser.add_argument("--size", type=int, required=True, help="pixels along each side")
    parser.add_argument(
        "--data-dir", help="folder with a named set's own files, or where to download them to"
    )
    args = parser.parse_args(argv)
    destination = Path(args.destination)
    if destination.exists():
        raise ValueError(f"{destination} exists already: choose a new name")
    if args.size < 1:
        raise ValueError(f"--size {args.size} must be at least 1 pixel")
    train = sets.open_source(args.source, "train", args.data_dir)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # The destination appears only when it is complete.
    with tempfile.TemporaryDirectory(dir=destination.parent) as temporary:
        folder = Path(temporary) / "arrays"
        folder.mkdir()
        np.save(folder / "classes.npy", np.array(train.classes, dtype=str))
        np.save(folder / "mask_classes.npy", np.array(train.mask_classes, dtype=str))
        convert_split(train, args.size, "train", folder)
        for split in ("val", "test"):
            try:
                source = sets.open_source(args.source, split, args.data_dir)
            except sources.NoSplit:
                print(f"{split}: not in {args.source}")
                continue
            convert_split(source, args.size, split, folder)
        result = folder
        if destination.suffix == ".npz":
            result = folder / "all.npz"
            arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
            np.savez(result, **arrays)
        os.replace(result, destination)


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

"""Arrays from outside: an .npz archive, or a folder of .npy files.

One reader for both. Types, shapes and sizes are checked from the headers of the arrays that it
needs, before any of them is read or takes memory. Objects are never unpickled.
"""

import contextlib
import io
import math
import os
import stat
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images import sources
from plumbing import memory, outputs

FIRST = 2**14  # bytes to read: a header is shorter, though it can claim to have gigabytes
NEWER = np.lib.format.read_array_header_2_0  # version 3 differs in the names of fields only
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0}  # by version of the format; else NEWER


@contextlib.contextmanager
def whole(what):
    """Raise ValueError naming `what` for whatever numpy and zipfile raise on damaged files."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as numpy's on headers of Python 2
            yield
    except Exception as error:  # of zipfile, zlib, the header's parser, numpy: of many types
        if memory.exhausted(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} is not a whole array file: {reason}") from error


@dataclass(frozen=True)
class Header:
    """What the header of an array says, and where it ends."""

    shape: tuple
    dtype: np.dtype
    order: str  # C or Fortran
    end: int

    def nbytes(self):
        """Bytes that the array takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Member:
    """One array of a set: the .npy file at `path`, or what `info` names in the archive there."""

    path: Path
    archive: zipfile.ZipFile | None = None
    info: zipfile.ZipInfo | None = None

    def __str__(self):
        return f"{self.path}: {self.info.filename}" if self.info else str(self.path)

    def open(self):
        """A binary file of its content."""
        return self.archive.open(self.info) if self.archive else open(self.path, "rb")

    def header(self):
        """Its Header. Raises ValueError unless its shape fills exactly what follows the header."""
        if self.archive:
            size = self.info.file_size
        else:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise ValueError(f"{self} is not a regular file")
            size = status.st_size
        with whole(self), self.open() as file:
            start = io.BytesIO(file.read(FIRST))
            version = np.lib.format.read_magic(start)
            shape, fortran, dtype = HEADERS.get(version, NEWER)(start)
            header = Header(shape, dtype, "F" if fortran else "C", start.tell())
        if dtype.hasobject:
            raise ValueError(f"{self} holds Python objects, which could run code")
        counts = all(type(n) is int and n >= 0 for n in shape)  # a bool is not a number
        if not counts or header.end + header.nbytes() != size:
            raise ValueError(
                f"{self} is not a whole array file: its header says {sources.type_of(header)}, and "
                f"{size - header.end:,} bytes follow"
            )
        return header

    def read(self, header):
        """The array: a file's is memory-mapped, a member's is read into memory."""
        with whole(self):
            if self.archive is None:
                return np.memmap(
                    self.path, header.dtype, "r", header.end, header.shape, header.order
                )
            with self.open() as file:
                return np.lib.format.read_array(file, allow_pickle=False)


def read_split(path, split):
    """The Arrays of one split from an .npz file or a folder of .npy files.

    Raises NoSplit without SPLIT_images, and ValueError or OSError saying what is wrong.
    """
    if path.is_dir():
        return read_members(path, split, {file.stem: Member(file) for file in path.glob("*.npy")})
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        with whole(path):
            archive = stack.enter_context(zipfile.ZipFile(file))
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        members = {i.filename.removesuffix(".npy"): Member(path, archive, i) for i in infos}
        if len(members) < len(infos):
            raise ValueError(f"{path} is not a whole array file: two arrays have the same name")
        return read_members(path, split, members)


def read_members(path, split, members):
    """The Arrays of one split from {name: Member}."""
    if f"{split}_images" not in members:
        shown = ", ".join(sorted(members)[:20])
        raise sources.NoSplit(f"{path}: it has no array {split}_images; it has {shown}")
    wanted = {part: f"{split}_{part}" for part in ("images", "labels", "masks")}
    wanted |= {part: part for part in ("classes", "mask_classes")}
    found = {part: members[name] for part, name in wanted.items() if name in members}
    headers = {part: member.header() for part, member in found.items()}
    sources.check_types(
        f"{path} {split}", *(headers.get(part) for part in ("images", "labels", "masks"))
    )
    for part, limit in (("classes", sources.MAX_CLASSES), ("mask_classes", sources.IGNORE)):
        if part in headers:
            check_list(f"{path} {part}", headers[part], limit)
    needed = sum(headers[part].nbytes() for part, member in found.items() if member.archive)
    if needed and needed > (there := memory.available(torch.device("cpu"))):
        raise ValueError(
            f"{path}: its arrays take {outputs.in_words(needed)}, and there are "
            f"{outputs.in_words(there)} of memory: a folder of .npy files is memory-mapped instead "
            "of read"
        )
    arrays = {part: member.read(headers[part]) for part, member in found.items()}
    for part in ("classes", "mask_classes"):
        if part in arrays:
            arrays[part] = names_in(found[part], arrays[part])
    return sources.Arrays(f"{path} {split}", **arrays)


def check_list(name, header, limit):
    """Raise ValueError unless the Header is that of a list of at most `limit` class names."""
    if len(header.shape) != 1 or header.dtype.kind not in "USiu" or header.shape[0] > limit:
        raise ValueError(
            f"{name} are {sources.type_of(header)}; expected a list of at most {limit:,} strings "
            "or integers"
        )


def names_in(member, array):
    """A list of class names as strings. Raises ValueError if one is not text."""
    with whole(member):  # numpy takes any four bytes for a character
        values = array.tolist()
        names = [n.decode() if isinstance(n, bytes) else str(n) for n in values]
        "".join(names).encode(errors="surrogateescape")  # a folder's name need not be UTF-8
    return names

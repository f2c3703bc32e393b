"""Files that the programs write: whole or not there at all, and never over somebody else's file.

A file or folder is written under a temporary name beside it, and gets its own name when it is
complete.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path


# Values of --data that come before folders of the same name; images/sets.py opens them.
NAMED = "shapes", "fashion-mnist", "fashion-scenes", "cifar10", "imagenette"


def check_new(path, data=None, suffixes=()):
    """Check, before any work, that a file or folder can be made at `path`.

    data: --data, or None; suffixes: those that the file may have, if not any. Raises ValueError if
    `path` has another, exists, lies in `data`, or its folder does not exist or is read-only.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: choose a new name")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: name a new file that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}: make it, or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: nothing can be written to its folder: choose another one")
    check_outside(path, data)


def check_outside(out, data):
    """Raise ValueError if `out` lies in the folder `data`: pictures there would be its images."""
    out, folder = Path(os.path.realpath(out)), Path(os.path.realpath(data or ""))
    is_folder = data and data not in NAMED and folder.is_dir()
    if is_folder and folder in (out, *out.parents):
        raise ValueError(f"{out} lies inside the data {data}: choose a folder outside it")


def check_room(path, needed):
    """Raise ValueError if the disk of `path`, whose folder must exist, lacks `needed` bytes."""
    with contextlib.suppress(OSError):  # a file system that does not say: the write will
        disk = shutil.disk_usage(Path(path).parent)
        if disk.total and needed > disk.free:
            raise ValueError(
                f"{path} needs {in_words(needed)}, and its disk has {in_words(disk.free)}: make "
                "room, or choose another disk"
            )


def in_words(size):
    """A number of bytes for a message: '3.2 GB', '12 MB', '900 bytes'."""
    for name, unit in (("GB", 1e9), ("MB", 1e6)):
        if size >= unit:
            amount = size / unit
            return f"{amount:.3g} {name}" if amount < 100 else f"{amount:,.0f} {name}"
    return f"{size:,} bytes"


def reserve(file, size):
    """Make an open new file `size` bytes long, all on the disk, so that filling it cannot fail.

    A memory-mapped file with holes would end the process (SIGBUS) where the disk is full. Raises
    OSError if it is.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS and Windows, some file systems
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        zeros = bytes(2**20)
        for start in range(file.tell(), size, len(zeros)):  # after what was written
            file.write(zeros[: size - start])


def disk_error(error):
    """The OSError that `error` is, or that torch hides behind a RuntimeError; None for any other.

    EINVAL, of a seek to where a damaged file points, and an OSError without a number are not errors
    of a disk.
    """
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    on_disk = isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL)
    return cause if on_disk else None


@contextlib.contextmanager
def disk_errors(path):
    """Turn an OSError into a ValueError that names the file or folder to write, `path`."""
    try:
        yield
    except FileExistsError as error:
        raise ValueError(f"{path} exists already: choose a new name") from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ValueError(
            f"cannot write {path} ({reason}): make room, or choose another place"
        ) from error


@contextlib.contextmanager
def new(path):
    """Yields a temporary path at which to write a new file or folder: see the top.

    Raises ValueError if the disk is full or read-only, and then leaves nothing, or if `path` exists
    at the end.
    """
    path = Path(path)
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        temporary = Path(folder) / f"new{path.suffix}"
        yield temporary
        rename_new(temporary, path)


@contextlib.contextmanager
def again(path):
    """Yields PATH.tmp to write a file of the run's own folder that it replaces again and again."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def rename_new(old, new):
    """Rename a file or folder. Raises FileExistsError if `new` exists.

    On a file system without links there is an instant in which a file that appears is lost.
    """
    if not old.is_dir():
        try:
            return os.link(old, new)
        except FileExistsError:
            raise
        except OSError:  # no links here
            pass
    if os.path.lexists(new):
        raise FileExistsError(new)
    os.rename(old, new)

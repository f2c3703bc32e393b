"""Fetch a published file once: check it, keep it, and resume a download that broke off."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from plumbing import signals


def data_folders(data_dir, *system):
    """Folders to look for a data set's files in: --data-dir only, if given.

    Otherwise the `system` folders, then a cache in the home folder, where downloads go. Raises
    ValueError if --data-dir, or without it the home folder, does not exist.
    """
    if data_dir is None:
        try:
            return [*map(Path, system), Path.home() / ".cache" / "beit"]
        except RuntimeError as error:
            raise ValueError("there is no home folder to download to: give --data-dir") from error
    if not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir {data_dir}: no such folder")
    return [Path(data_dir)]


def fetch(name, url, folders, check):
    """Path of the file `name`, from the first of `folders` that has it or downloaded to the last.

    check(path) must raise ValueError for wrong content; a download gets its final name only after
    the check. An interrupted download resumes at the next call. If several processes ask for the
    same file, one downloads it and the others wait. Raises ValueError if the download fails.
    """
    for folder in folders:
        if (folder / name).is_file():
            check(folder / name)
            return folder / name
    target = folders[-1] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    with open(partial, "ab") as file, exclusive(file):
        if not target.is_file():  # another process may have fetched it while this one waited
            try:
                file.seek(0, os.SEEK_END)  # resume after whatever an earlier process wrote
                with signals.at_once("during a download, which the next run resumes"):
                    download(url, file)
                check(partial)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(
                    f"cannot download {url} ({error}): download it yourself and name its folder "
                    "with --data-dir"
                ) from error
            except ValueError as error:
                file.truncate(0)  # not unlinked: others may have it open and wait for the lock
                raise ValueError(
                    f"{url} gave another file than the published one (its checksum differs): start "
                    "again, or name a folder that has it with --data-dir"
                ) from error
            os.replace(partial, target)
    return target


def check_md5(path, published):
    """check_digest() of the file's MD5."""
    with open(path, "rb") as file:
        check_digest(path, hashlib.file_digest(file, "md5").hexdigest(), published)


def check_digest(path, digest, published):
    """Raise ValueError naming the file if its checksum is not the published one."""
    if digest != published:
        raise ValueError(
            f"{path} is not the published file (its checksum differs): delete it and start again"
        )


@contextlib.contextmanager
def exclusive(file):
    """Hold the lock of an open file, waiting for it if necessary.

    There is no lock on Windows, nor on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with signals.at_once("while it waited for another process that fetches the same data"):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file releases the lock


def download(url, file):
    """Append the missing rest of `url` to an open file, with a progress line on stderr.

    Raises OSError if the connection fails or breaks off.
    """
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": the file is already complete
            raise
        return
    with response:
        if start and response.status != 206:  # the server ignores ranges and sends everything
            file.seek(0)
            start = file.truncate()
        total = start + int(response.headers.get("Content-Length") or 0)
        while block := response.read(1 << 16):
            file.write(block)
            progress = f"{file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB"
            print(f"\r{url}: {progress}", end="", file=sys.stderr)
    print(file=sys.stderr)
    file.flush()
    if file.tell() < total:
        raise OSError(
            f"it broke off after {file.tell()} of {total} bytes; run the command again to resume"
        )

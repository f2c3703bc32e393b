"""Files of weights: .pt and .pth as torch writes them, and .safetensors."""

import functools
import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from plumbing import memory, outputs


DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
COUNTS = "num_batches_tracked", "relative_position_index"  # endings of names that hold integers


class Damaged(ValueError):
    """A file that is missing or not whole: an older one may stand in for it."""


def read(path):
    """Read a .pt, .pth or .safetensors file without running any code in it; return what it holds.

    Tensors are on the CPU. Raises ValueError naming the file: Damaged if it is missing or not
    whole, a plain ValueError if it is refused, because it asks for code. A disk that cannot be read
    or memory that is full says nothing about the file: OSError, or the allocator's own error.
    """
    path = Path(path)
    if not path.is_file():
        inside = f": it is a folder, name {path / 'checkpoint.pt'}" if path.is_dir() else ""
        raise Damaged(f"there is no checkpoint {path}{inside}")
    if path.suffix == ".safetensors":
        load = safetensors_for(path).torch.load_file
    else:
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of torch, about files that it then refuses
            return load(path)
    except Exception as error:  # damaged and foreign files raise many types
        if memory.exhausted(error):
            raise
        if failed := outputs.disk_error(error):
            raise OSError(
                f"{path} cannot be read ({failed.strerror}): it may be whole, so try again"
            ) from error
        if refused := forbidden(error):
            raise ValueError(f"{path} is refused: it asks for {refused}") from error
        reason = f": {error}" if type(error) is ValueError else ""
        raise Damaged(f"{path} is not a whole file of weights{reason}") from error


def check_archive(path):
    """Check a .pt file, a zip archive as torch writes it, against its checksums.

    torch.load ignores them. Other files are not checked. Raises ValueError if a checksum differs,
    or if the members together claim more bytes than the file has.
    """
    with open(path, "rb") as file:  # is_zipfile of a path would hide that it cannot be opened
        if not zipfile.is_zipfile(file):
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it is an archive that torch does not write")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} differs")


def forbidden(error):
    """What a pickle asks for that torch's reader of weights refuses; None if it is just damaged."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"{found[1]}, and weights need no code"
    newer = re.search(r"operand 14[79]\b", str(error))  # names of code in pickles of protocol 4
    return "code in a pickle that torch does not write" if newer else None


def check_state(path, state, entry="model"):
    """Check that `state` is a state dict: {name: dense finite tensor}.

    entry: its name in the file `path`, for the message. Raises ValueError naming what is not.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{path}: {entry} is a {type(state).__name__}, not a state dict")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} is not a state dict: a name is a {type(name).__name__}")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is not a state dict: {name[:80]!r} is not a tensor")
        check_tensor(path, f"{entry}: {name[:80]}", value)


def check_tensor(path, name, value):
    """Check that a tensor holds finite floats (or counts), each with memory of its own."""
    dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    if not dense or value.device.type != "cpu":
        raise ValueError(f"{path}: {name} is not a dense tensor")
    if value.dtype not in ((torch.int64,) if name.endswith(COUNTS) else DTYPES):
        raise ValueError(f"{path}: {name} has the type {value.dtype}")
    if value.nbytes > value.untyped_storage().nbytes():  # an expanded tensor claims any size
        raise ValueError(f"{path}: {name} claims {value.nbytes:,} bytes and does not have them")
    if not value.isfinite().all():
        raise ValueError(f"{path}: {name} is not finite")


def check_shapes(path, state, shapes, entry="model"):
    """Check the names and shapes of a state dict. shapes: {name: shape}, all that it must have.

    Raises ValueError naming the first that is missing, left over or of another shape.
    """
    for name in [*shapes, *state]:
        if name not in state:
            raise ValueError(f"{path} does not fit: {entry} has no {name}")
        if name not in shapes:
            raise ValueError(f"{path} does not fit: {entry} has {name[:80]}, which is not known")
        if tuple(state[name].shape) != tuple(shapes[name]):
            found, wanted = tuple(state[name].shape), tuple(shapes[name])
            raise ValueError(f"{path} does not fit: {entry} has {name} {found}, not {wanted}")


def check_built(path, state, build):
    """Check a state dict as check_shapes does against the model of build(), before that has memory.

    The model is built on the device "meta", where a tensor is only a shape.
    """
    with torch.device("meta"):
        shapes = shapes_of(build().state_dict())
    check_shapes(path, state, shapes)


def shapes_of(state):
    """{name: shape} of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


def write(path, state):
    """Write a state dict to a new file.

    A .safetensors file holds the tensors by name. A .pt or .pth file holds the state dict under
    the key `model`, as published weights do. Raises ValueError, and leaves no file, if the file
    exists, its folder does not, or the disk is full.
    """
    path = Path(path)
    outputs.check_new(path)
    outputs.check_room(path, sum(value.nbytes for value in state.values()))
    save = write_safetensors if path.suffix == ".safetensors" else write_torch
    with outputs.new(path) as temporary:
        save(temporary, state)


def write_torch(path, state):
    """Write a state dict as torch does. Raises OSError if the disk is full."""
    try:
        with open(path, "xb") as file:  # of a path, torch would not say what failed
            torch.save({"model": state}, file)
    except RuntimeError as error:
        raise outputs.disk_error(error) or error


def write_safetensors(path, state):
    """Write a state dict as a .safetensors file. Raises OSError if the disk is full."""
    library = safetensors_for(path)
    try:
        library.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    except library.SafetensorError as error:  # its only sign of a full disk
        raise OSError(str(error).strip().splitlines()[0]) from error


def digest(state):
    """Sixteen hexadecimal digits for the names and values of a state dict."""
    content = hashlib.sha256()
    for name, value in sorted(state.items()):
        content.update(name.encode())
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bf16
        content.update(flat.numpy())
    return content.hexdigest()[:16]


def file_digest(path):
    """Sixteen hexadecimal digits for a file of weights, or for DALL-E's two files in a folder.

    A zip archive is known by its members' checksums, so it is not read in full.
    """
    content, path = hashlib.blake2b(digest_size=8), Path(path)
    dalle = path / "decoder.pkl", path / "encoder.pkl"
    for file in dalle if path.is_dir() else [path]:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = [(member.CRC, member.file_size) for member in archive.infolist()]
            content.update(repr(members).encode())
        elif file.is_file():
            with open(file, "rb") as opened:
                content.update(hashlib.file_digest(opened, hashlib.blake2b).digest())
    return content.hexdigest()


def safetensors_for(path):
    """Import the optional package safetensors, which the file `path` needs.

    Raises ValueError with the install command if the package is missing.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            f"{path} needs the optional package safetensors: pip install safetensors"
        ) from error
    return safetensors

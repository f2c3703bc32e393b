"""Files of weights: .pt and .pth as torch writes them, and .safetensors."""

import hashlib
import functools
import zipfile
from pathlib import Path

import torch

from plumbing import outputs


def read(path):
    """Read a .pt, .pth or .safetensors file without running any code in it; return what it holds.

    Tensors are on the CPU. Raises ValueError naming the file if it is missing, damaged or refused.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        load = safetensors_for(path).load_file
    else:
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    try:
        # a .pt file is a zip archive with a checksum for each tensor, which torch.load ignores
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {damaged} differs")
        return load(path)
    except Exception as error:  # damaged and foreign files, and code in a pickle, raise many types
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is not a whole file of weights: {reason}") from error


def write(path, state):
    """Write a state dict to a new file.

    A .safetensors file holds the tensors by name. A .pt or .pth file holds the state dict under
    the key `model`, as published weights do. Raises ValueError, and leaves no file, if the file
    exists, its folder does not, or the disk is full.
    """
    path = Path(path)
    outputs.check_new(path)
    outputs.check_room(path, sum(value.nbytes for value in state.values()))
    if path.suffix == ".safetensors":
        contiguous = {key: value.contiguous() for key, value in state.items()}
        save = functools.partial(safetensors_for(path).save_file, contiguous)
    else:
        save = functools.partial(torch.save, {"model": state})
    with outputs.new(path) as temporary:
        try:
            save(temporary)
        except Exception as error:  # what torch and safetensors make of a full disk
            raise OSError(str(error).strip().splitlines()[0]) from error


def digest(state):
    """Sixteen letters for the names and values of a state dict."""
    content = hashlib.sha256()
    for name, value in sorted(state.items()):
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


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
    return safetensors.torch

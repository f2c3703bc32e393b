"""What several test files need: a tiny data set, and every script run once on it."""

import os

import pytest
import torch

from experiments import short_runs

torch.set_num_threads(1)  # tiny models gain nothing from more


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """Path of a tiny data set, as --data takes it: see short_runs.make_arrays."""
    return short_runs.make_arrays(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="session")
def made(arrays, tmp_path_factory):
    """Every script run once, in order, in this process: the folder of their --out folders."""
    made = tmp_path_factory.mktemp("made")
    for stage, module in short_runs.MODULES.items():
        module.main([*short_runs.script_flags(stage, arrays, made), "--out", str(made / stage)])
    return made


class Hostile:
    """Unpickling it makes a folder: what a checkpoint with code in it could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session")
def hostile():
    """hostile(path): an object that makes the folder `path` when it is unpickled."""
    return Hostile

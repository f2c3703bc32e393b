"""What several test files need: a tiny data set, and every script run once on it."""

import pytest
import torch

from experiments import fuzz_bench, short_runs

torch.set_num_threads(1)  # tiny models gain nothing from more


def pytest_configure(config):
    """The marks that -m can choose."""
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where torch sees none")
    config.addinivalue_line("markers", "slow: skipped unless -m names it")


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none, and slow tests unless -m names them."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none")
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("slow: run it with -m slow")


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


@pytest.fixture(scope="session")
def hostile():
    """hostile(path): an object that makes the folder `path` when it is unpickled."""
    return fuzz_bench.Hostile

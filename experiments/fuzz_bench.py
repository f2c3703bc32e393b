"""What the fuzzer's cases start from: good data and short runs, and what a case is (fuzz.py)."""

import contextlib
import importlib
import io
import os
import re
import sys
import types
import unittest.mock
from dataclasses import dataclass, field

import numpy as np
import torch

from experiments import short_runs

REFUSE, ACCEPT, EITHER = "must be refused", "must be accepted", "may be either"
SECONDS, MEMORY = 60, 8 << 30  # limits of a case
FRESH = 40  # in the long run one case in so many gets an interpreter of its own

PROGRAMS = {
    "tokenizer": "train_tokenizer",
    "beit": "pretrain",
    "cls": "finetune_cls",
    "seg": "finetune_seg",
    "convert": "images.convert",
    "attention": "experiments.attention",
    "published": "plumbing.published",
    "features": "experiments.features",
    "report": "experiments.report",
    "reproduce": "reproduce",
}
STAGES = ["tokenizer", "beit", "cls", "seg"]
DATA = {"--data": "good/tiny.npz"}
LOOK = {"--device": "cpu", "--amp": "off", "--workers": "0"} | DATA
TRAIN = {"--log-every": "1", "--batch-size": "8", "--save-every": "1", "--image-size": "8"} | LOOK
BASE = {  # flags of a short run: one step for each epoch of eight images of 8 x 8 pixels
    "tokenizer": TRAIN
    | {"--vocab-size": "8", "--hidden": "8", "--groups": "2", "--code-dim": "8"}
    | {"--steps": "2", "--warmup-steps": "0"},
    "beit": TRAIN
    | {"--token-size": "4", "--model": "mini", "--mask-ratio": "0.5", "--min-block": "1"}
    | {"--epochs": "2", "--warmup-epochs": "0", "--tokenizer": "good/tokenizer/checkpoint.pt"},
    "cls": TRAIN
    | {"--labels-per-class": "0", "--epochs": "2", "--warmup-epochs": "0"}
    | {"--init": "random", "--model": "mini"},
    "seg": TRAIN
    | {"--train-images": "0", "--decoder-dim": "8", "--steps": "2", "--warmup-steps": "0"}
    | {"--init": "random", "--model": "mini"},
}
STUBS = "gs gswin32c gswin64c convert magick djpeg inkscape xdg-open lzma unzip"


@dataclass
class Case:
    """A command and what is known about it. `out`: the folder or file that it may write."""

    program: str  # a key of PROGRAMS
    flags: list
    what: str  # the damage, in words
    expect: str
    out: str = ""
    file_size: int | None = None  # stands in for a full disk
    environment: dict = field(default_factory=dict)
    own_nan: bool = False  # the damage itself puts NaN into metrics.jsonl


@dataclass
class Result:
    """How a command ended. status: None if it did not end in time."""

    status: int | None
    stdout: str
    stderr: str


class Hostile:
    """Unpickling it makes the folder `ran`: what a file with code in it could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# -------------------------------------------------------- the good files that cases start from


class Bench:
    """A folder with good data and runs in good/. Commands run in it, with relative paths.

    run(program, flags, case=None) -> Result.
    """

    def __init__(self, folder, run):
        self.folder, self.run = folder, run
        self.good = folder / "good"
        self.hostile = Hostile(str(folder / "ran"))
        with contextlib.suppress(ImportError):
            self.pillow = importlib.import_module("PIL.Image")
        self.has_pillow = hasattr(self, "pillow")

    def build(self):
        """Make the files, and run each script once."""
        self.good.mkdir(parents=True)
        arrays = short_runs.tiny_arrays(train=8, val=4, side=8, classes=2)
        np.savez(self.good / "tiny.npz", **arrays)
        self.members = {name: npy(array) for name, array in arrays.items()}
        (self.good / "arrays").mkdir()
        for name, content in self.members.items():
            (self.good / "arrays" / f"{name}.npy").write_bytes(content)
        if self.has_pillow:
            self.make_pictures(arrays)
        (self.folder / "bin").mkdir()
        for name in STUBS.split():
            stub = self.folder / "bin" / name
            stub.write_text(f"#!/bin/sh\necho {name} >> {self.folder}/started\n")
            stub.chmod(0o755)
        for stage in STAGES:
            flags = [*as_list(BASE[stage]), "--out", f"good/{stage}"]
            result = self.run(stage, flags)
            assert result.status == 0, (stage, result)
        self.help = {stage: help_flags(self.run(stage, ["--help"]).stdout) for stage in STAGES}
        state = load(self.good / "beit" / "checkpoint.pt")["model"]
        torch.save({"model": state}, self.good / "weights.pth")
        model = load(self.good / "tokenizer" / "checkpoint.pt")["model"]
        save_dalle(self.good / "dalle", model)
        flags = ["--jobs", "1", "--out", "good/paper"]  # its first stage cannot start: see `logs`
        self.run("reproduce", flags, Case("reproduce", flags, "", EITHER, **NO_STAGES))

    def make_pictures(self, arrays):
        """good/pictures, with two classes, and good/scenes, with masks."""
        for split, folder in (("train", "training"), ("val", "validation")):
            for i, pixels in enumerate(arrays[f"{split}_images"]):
                save = self.pillow.fromarray(pixels).save
                path = self.good / "pictures" / split / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save(path)
                path = self.good / "scenes" / "images" / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save(path)
                path = self.good / "scenes" / "annotations" / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                self.pillow.fromarray(arrays[f"{split}_masks"][i]).save(path)
        (self.good / "scenes" / "classes.txt").write_text("ground\nthing\n")


NO_STAGES = {"environment": {"PYTHONHOME": "/nowhere"}}  # no interpreter starts with it


def npy(array):
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def load(path):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def save_dalle(folder, model):
    """Write a tokenizer's weights as DALL-E's encoder.pkl and decoder.pkl, pickles of objects."""
    folder.mkdir(parents=True)
    for part in ("encoder", "decoder"):
        module = types.ModuleType(f"dall_e.{part}")
        kind = type(part.capitalize(), (), {"__module__": module.__name__})
        setattr(module, kind.__name__, kind)
        root = kind()
        root._parameters, root._modules = {}, {}
        for name, tensor in model.items():
            if not name.startswith(f"{part}."):
                continue
            _, *path, leaf = name.split(".")
            node = root
            for child in path:
                if child not in node._modules:
                    new = node._modules[child] = kind()
                    new._parameters, new._modules = {}, {}
                node = node._modules[child]
            node._parameters[{"weight": "w", "bias": "b"}.get(leaf, leaf)] = tensor
        package = {"dall_e": types.ModuleType("dall_e"), module.__name__: module}
        with unittest.mock.patch.dict(sys.modules, package):
            torch.save(root, folder / f"{part}.pkl")


def help_flags(text):
    """{flag: its metavar, or "" for a switch} from the text of a script's --help."""
    found = re.findall(r"^  (--[a-z0-9-]+)(?:, --no-[a-z0-9-]+)?(?: (\S+))?", text, re.MULTILINE)
    skipped = {"--help", "--compile", "--resume"}  # compiling takes minutes
    return {flag: metavar for flag, metavar in found if flag not in skipped}


def as_list(flags):
    """{"--flag": value} as a command line; a value of None is a switch."""
    return [word for pair in flags.items() for word in pair if word is not None]


def short(stage, changes=()):
    """Flags of one step of a script, with changes."""
    one = {"--steps": "1"} if "--steps" in BASE[stage] else {"--epochs": "1"}
    return BASE[stage] | one | dict(changes)


def train(stage, folder, what, expect, changes=(), **more):
    """The Case of one step of a script."""
    flags = as_list(short(stage, {"--out": f"{folder}/out"} | dict(changes)))
    return Case(stage, flags, what, expect, f"{folder}/out", **more)


def convert(data, folder, what, expect):
    """The Case of images.convert on some data."""
    flags = [data, f"{folder}/new", "--size", "8"]
    return Case("convert", flags, what, expect, f"{folder}/new")

"""Short runs of the four scripts on a tiny data set, for experiments.torture and the tests.

A run of each script in order takes a few seconds on a CPU: four steps of eight images of 16 x 16
pixels. Each script starts from the checkpoint of the script before it.
"""

import os
import subprocess
import sys

import numpy as np
import torch

import finetune_cls
import finetune_seg
import pretrain
import train_tokenizer
from experiments import HERE

MODULES = {
    "tokenizer": train_tokenizer,
    "beit": pretrain,
    "cls": finetune_cls,
    "seg": finetune_seg,
}

COMMON = ["--device", "cpu", "--amp", "off", "--batch-size", "8"]
STEPS, EPOCHS = "--steps 4 --warmup-steps 1", "--epochs 1 --warmup-epochs 0.25"
TOKENIZER = "--vocab-size 16 --hidden 8 --code-dim 8 --tau-steps 2"
SCRIPTS = {  # stage: the script and its flags
    "tokenizer": f"train_tokenizer.py --image-size 16 {TOKENIZER} {STEPS}".split(),
    "beit": f"pretrain.py --image-size 16 --token-size 16 --min-block 2 {EPOCHS}".split(),
    "cls": f"finetune_cls.py --image-size 16 --labels-per-class 0 {EPOCHS}".split(),
    "seg": f"finetune_seg.py --image-size 16 --train-images 0 {STEPS}".split(),
}
NOISE = {  # flags that switch on the randomness that SCRIPTS leaves out
    "tokenizer": "--ema 0.9 --flip --min-crop 0.5".split(),
    "beit": "--drop-path 0.2 --min-crop 0.5 --jitter 0.4".split(),
    "cls": "--drop-path 0.2 --mixup 0.8 --cutmix 1 --randaugment 9 --erasing 0.5".split(),
    "seg": "--drop-path 0.2 --min-scale 1.0 --max-scale 2.0 --photometric".split(),
}
RESULTS = {  # names in each script's final record
    "tokenizer": {"reconstruction_mse", "codebook_perplexity", "codebook_used"},
    "beit": {"mim_loss", "mim_accuracy"},
    "cls": {"top1", "top5"},
    "seg": {"miou", "pixel_accuracy"},
}


def tiny_arrays(train, val, side, classes):
    """{name: array}: a data set of noise of side x side pixels, with labels and masks."""
    rng, content = np.random.default_rng(0), {}
    for split, count in (("train", train), ("val", val)):
        content[f"{split}_images"] = rng.integers(0, 256, (count, side, side, 3), np.uint8)
        content[f"{split}_labels"] = np.arange(count) % classes
        content[f"{split}_masks"] = (content[f"{split}_images"][..., 0] > 128).astype(np.uint8)
    return content


def make_arrays(path):
    """Write a tiny data set to the .npz file `path`, and return the path as --data takes it."""
    np.savez(path, **tiny_arrays(train=32, val=16, side=16, classes=4))
    return str(path)


def script_flags(stage, arrays, made, log=("--log-every", "1")):
    """Flags of a short run of one script, without --out; log: flags of its log.

    arrays: what make_arrays returned. made: the folder that holds the earlier scripts' --out
    folders, named after their stages.
    """
    flags = [*SCRIPTS[stage][1:], *COMMON, *log, "--data", arrays]
    if stage == "beit":
        flags += ["--tokenizer", str(made / "tokenizer" / "checkpoint.pt")]
    if stage in ("cls", "seg"):
        flags += ["--init", str(made / "beit" / "checkpoint.pt")]
    return flags


def torchrun(*command, processes=2):
    """Run a script under torchrun with one thread per process; return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher.append(f"--nproc_per_node={processes}")
    return subprocess.run(
        [*launcher, *command], cwd=HERE, env=environment, capture_output=True, text=True
    )


def weights(folder):
    """{name: tensor} of the float weights, and their moving averages, in a run's --out folder."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    average = {f"average {name}": value for name, value in state.get("average", {}).items()}
    found = state["model"] | average
    return {name: value for name, value in found.items() if value.is_floating_point()}


def different_weights(a, b):
    """Names of the weights that two runs do not share bit for bit; a, b: their --out folders."""
    a, b = weights(a), weights(b)
    shared = a.keys() & b.keys()
    return sorted((a.keys() ^ b.keys()) | {n for n in shared if not torch.equal(a[n], b[n])})

"""Bad input to the scripts: one line, exit status 2, nothing lost.

Each case has one wrong thing in a command that works. {wrong} is the folder of wrong files that
the fixture `wrong` makes, {made} the folder of the fixture `made`.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_tokenizer
from experiments import short_runs
from plumbing import command_line

DATA = {  # case: (script, flags, what the line must say)
    "missing path": ("cls", "--data nowhere", "nowhere: no such file or folder"),
    "empty class folder": ("cls", "--data {wrong}/images", "the class folder is empty"),
    "no split": ("cls", "--eval-split test", "test_images"),
    "array type": ("cls", "--data {wrong}/float.npz", "images are float32"),
    "array shape": ("cls", "--data {wrong}/flat.npz", "(32, 768)"),
    "label range": ("cls", "--data {wrong}/labels.npz", "label -1 is out of range"),
    "held-out label": ("cls", "--data {wrong}/val-labels.npz",
                       "label 4 is out of range for 4 classes"),
    "label count": ("cls", "--data {wrong}/count.npz", "labels are int64 (5,)"),
    "no labels": ("cls", "--data {wrong}/no-labels.npz", "no class labels"),
    "no masks": ("seg", "--data {wrong}/no-masks.npz", "no masks"),
    "mask range": ("seg", "--data {wrong}/val-masks.npz",
                   "mask value 8 is out of range for 2 classes"),
    "pickled array": ("cls", "--data {wrong}/pickled.npz", "allow_pickle=False"),
    "no archive": ("cls", "--data {wrong}/noise.npz", "not a whole array file"),
    "half an archive": ("cls", "--data {wrong}/half.npz", "not a whole array file"),
    "other classes": ("cls", "--data {wrong}/zoo",
                      "class 'bee' has another number than in the training set"),
    "too few labels": ("cls", "--labels-per-class 9", "has 8 images, not 9"),
    "large batch": ("cls", "--batch-size 64", "fewer than the batch size 64"),
}  # fmt: skip

FILES = {
    "wrong kind": ("beit", "--tokenizer {made}/cls/checkpoint.pt",
                   "is a classification checkpoint"),
    "half a checkpoint": ("cls", "--init {wrong}/half.pt", "not a whole file of weights"),
    "code in a checkpoint": ("cls", "--init {wrong}/code.pt",
                             "is refused: it asks for posix.mkdir"),
    "no checkpoint": ("cls", "--init {wrong}/none.pt", "there is no checkpoint"),
    "output not empty": ("cls", "--out {wrong}/full", "not an empty folder"),
    "nothing to resume": ("cls", "--out {wrong}/full --resume", "no checkpoint.pt in"),
    "other settings": ("cls", "--out {made}/cls --resume --seed 9", "--seed is 9, but"),
    "eval of random weights": ("cls", "--eval --init random",
                               "nothing to evaluate in random weights"),
}  # fmt: skip

SETTINGS = {
    "batch not divisible": ("cls", "--accumulate 3", "batch size 8 does not divide"),
    "grids differ": ("beit", "--token-size 8", "2 tokens along 8 pixels but there are 4 patches"),
    "patches do not divide": ("cls", "--image-size 18", "18 is not a multiple of the patch size 4"),
    "tokens do not divide": ("tokenizer", "--image-size 18", "not a multiple of 4"),
    "not a number": ("beit", "--epochs nan", "--epochs nan must be a finite number"),
    "endless": ("beit", "--epochs inf", "--epochs inf must be a finite number"),
    "negative number": ("cls", "--labels-per-class -5",
                        "--labels-per-class -5 must be a finite number, 0 or"),
    "workers": ("cls", "--workers -1", "'-1' is neither auto nor a number of processes"),
    "no pixels": ("seg", "--image-size 0", "--image-size 0 must be above 0"),
    "no codes": ("tokenizer", "--vocab-size 0", "--vocab-size 0 must be above 0"),
    "share above 1": ("cls", "--smoothing 2.0", "--smoothing 2.0 must be at most 1"),
    "nothing kept": ("beit", "--drop-path 1", "--drop-path 1.0 must be below 1"),
    "seed": ("cls", "--seed 99999999999999999999", "--seed 99999999999999999999 must be from 0"),
    "mean and std": ("beit", "--normalise foo", "--normalise 'foo' is none of half, imagenet"),
    "mask ratio": ("beit", "--mask-ratio 1.5", "mask ratio 1.5 is outside (0, 1)"),
    "masking": ("beit", "--masking spiral", "masking 'spiral' is none of"),
    "no masking": ("beit", "--masking none",
                   "--masking none leaves nothing to predict: add --recover all"),
    "min block": ("beit", "--min-block 16", "smallest block 16 is not between 1 and the 6"),
    "target": ("beit", "--target edges", "--target 'edges' is none of tokens, pixels"),
    "tokenizer for pixels": ("beit", "--target pixels",
                             "--target pixels has no use for --tokenizer"),
    "recover": ("beit", "--recover some", "--recover 'some' is none of masked, all"),
    "recipe": ("cls", "--recipe gigantic", "unknown recipe 'gigantic'"),
    "model": ("cls", "--init random --model huge", "model 'huge' is none of"),
    "option": ("cls", "--learning-rate 1", "unrecognized arguments: --learning-rate"),
    "abbreviated option": ("cls", "--epoch 1", "unrecognized arguments: --epoch"),
    "value of an option": ("cls", "--lr fast", "invalid float value: 'fast'"),
    "device": ("cls", "--device tpu", "device 'tpu' is none of"),
    "warm-up": ("cls", "--warmup-epochs 9", "--warmup-epochs 9"),
    "zero steps": ("seg", "--steps 0", "--steps 0 must be at least 1"),
    "long warm-up": ("seg", "--warmup-steps 4", "leaves nothing of --steps 4"),
}  # fmt: skip

CASES = DATA | FILES | SETTINGS


@pytest.fixture(scope="module")
def wrong(arrays, made, hostile, tmp_path_factory):
    """A folder of wrong files."""
    wrong = tmp_path_factory.mktemp("wrong")
    content = dict(np.load(arrays))
    images, labels = content["train_images"], content["train_labels"]
    archives = {
        "float": content | {"train_images": images.astype(np.float32)},
        "flat": content | {"train_images": images.reshape(32, -1)},
        "labels": content | {"train_labels": labels - 1},
        "val-labels": content | {"val_labels": content["val_labels"] + 1},
        "count": content | {"train_labels": labels[:5]},
        "no-labels": {name: array for name, array in content.items() if "labels" not in name},
        "no-masks": {name: array for name, array in content.items() if "masks" not in name},
        "val-masks": content | {"val_masks": content["val_masks"] + np.uint8(7)},
        "pickled": content | {"train_images": np.array([{}] * 32, dtype=object)},
    }
    for name, changed in archives.items():
        np.savez(wrong / f"{name}.npz", **changed)
    (wrong / "half.npz").write_bytes(Path(arrays).read_bytes()[:5000])
    (wrong / "noise.npz").write_bytes(bytes(range(256)))
    (wrong / "images" / "train" / "empty").mkdir(parents=True)
    for name in ("train/ant", "train/bee", "val/bee"):
        (wrong / "zoo" / name).mkdir(parents=True)
        (wrong / "zoo" / name / "1.png").touch()
    (wrong / "half.pt").write_bytes((made / "beit" / "checkpoint.pt").read_bytes()[:20_000])
    state = {"kind": "pretraining", "config": {}, "model": hostile(wrong / "ran")}
    torch.save(state, wrong / "code.pt")
    (wrong / "full").mkdir()
    (wrong / "full" / "precious.txt").write_text("keep me")
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_one_line_and_status_2(
    case, arrays, made, wrong, tmp_path, capsys, monkeypatch
):
    """The line says what is wrong; no code ran, no file was lost, no checkpoint was begun."""
    stage, more, says = CASES[case]
    before = (made / "cls" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", [short_runs.SCRIPTS[stage][0]])
    flags = [*short_runs.script_flags(stage, arrays, made), "--out", str(tmp_path / "new")]
    flags += more.format(wrong=wrong, made=made).split()
    with pytest.raises(SystemExit) as stopped, command_line.one_line_errors():
        short_runs.MODULES[stage].main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1, error
    assert not (tmp_path / "new" / "checkpoint.pt").exists()
    assert not (wrong / "ran").exists()
    assert (wrong / "full" / "precious.txt").read_text() == "keep me"
    assert (made / "cls" / "checkpoint.pt").read_bytes() == before


def test_base_needs_data(capsys):
    """The recipe `base` has no default for --data, and says so."""
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--recipe", "base", "--out", "unused"])
    assert "recipe 'base' needs --data" in capsys.readouterr().err


def test_error_in_a_real_process(tmp_path):
    """The same through the shell: status 2, one line, no traceback."""
    flags = ["--init", "random", "--data", "nowhere", "--out", str(tmp_path / "new")]
    command = [sys.executable, "finetune_cls.py", *flags]
    done = subprocess.run(command, cwd=short_runs.HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr

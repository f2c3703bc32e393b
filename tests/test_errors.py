"""Bad input to the scripts: one line, exit status 2, nothing lost.

Each case has one wrong thing in a command that works. {wrong} is the folder of wrong files that
the fixture `wrong` makes, {made} the folder of the fixture `made`.
"""

import argparse
import bisect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import beit
import dvae
import finetune_seg
import pretrain
import train_tokenizer
from experiments import short_runs
from plumbing import command_line, memory, outputs, signals

DATA = {  # case: (script, flags, what the line must say)
    "missing path": ("cls", "--data nowhere", "nowhere: no such file or folder"),
    "empty class folder": ("cls", "--data {wrong}/images", "the class folder is empty"),
    "no split": ("cls", "--eval-split test", "test_images"),
    "array type": ("cls", "--data {wrong}/float.npz", "images are float32"),
    "array shape": ("cls", "--data {wrong}/flat.npz", "(32, 768)"),
    "label range": ("cls", "--data {wrong}/labels.npz", "label -1 is out of range"),
    "held-out label": ("cls", "--data {wrong}/val-labels.npz",
                       "class '4' is not one of those trained on: '0', '1'"),
    "label count": ("cls", "--data {wrong}/count.npz", "labels are int64 (5,)"),
    "no labels": ("cls", "--data {wrong}/no-labels.npz", "no class labels"),
    "no masks": ("seg", "--data {wrong}/no-masks.npz", "no masks"),
    "mask range": ("seg", "--data {wrong}/val-masks.npz",
                   "mask value 8 is out of range for 2 classes"),
    "pickled array": ("cls", "--data {wrong}/pickled.npz", "Python objects, which could run code"),
    "no archive": ("cls", "--data {wrong}/noise.npz", "not a whole array file"),
    "half an archive": ("cls", "--data {wrong}/half.npz", "not a whole array file"),
    "other classes": ("cls", "--data {wrong}/zoo",
                      "class 'bee' has another number than in training: it has no 'ant'"),
    "new class": ("cls", "--data {wrong}/new", "class 'ape' is not one of those trained on"),
    "too few labels": ("cls", "--labels-per-class 9", "has 8 images, not 9"),
    "large batch": ("cls", "--batch-size 64", "fewer than the batch size 64"),
}  # fmt: skip

FILES = {
    "wrong kind": ("beit", "--tokenizer {made}/cls/checkpoint.pt",
                   "is a classification checkpoint"),
    "half a checkpoint": ("cls", "--init {wrong}/half.pt", "not a whole file of weights"),
    "code in a checkpoint": ("cls", "--init {wrong}/code.pt",
                             "is refused: it asks for posix.mkdir"),
    "a folder": ("cls", "--init {made}/beit", "it is a folder, name {made}/beit/checkpoint.pt"),
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
    "decoder does not divide": ("seg", "--decoder-dim 12", "decoder dim 12 is not a multiple of 8"),
    "tokens do not divide": ("tokenizer", "--image-size 18", "not a multiple of 4"),
    "not a number": ("beit", "--epochs nan", "--epochs: 'nan' is not a number in (0, 1e6]"),
    "endless": ("beit", "--epochs inf", "--epochs: 'inf' is not a number in (0, 1e6]"),
    "negative number": ("cls", "--labels-per-class -5",
                        "--labels-per-class: '-5' is not a whole number in [0, 1e9]"),
    "workers": ("cls", "--workers -1", "--workers: '-1' is neither auto nor in [0, 1024]"),
    "no pixels": ("seg", "--image-size 0", "--image-size: '0' is not a whole number in [1, 65536]"),
    "no codes": ("tokenizer", "--vocab-size 0", "--vocab-size: '0' is not a whole number"),
    "share above 1": ("cls", "--smoothing 2.0", "--smoothing: '2.0' is not a number in [0, 1]"),
    "nothing kept": ("beit", "--drop-path 1", "--drop-path: '1' is not a number in [0, 1)"),
    "seed": ("cls", "--seed 99999999999999999999", "--seed: '99999999999999999999' is not"),
    "mean and std": ("beit", "--normalise foo", "--normalise: 'foo' is not one of half, imagenet"),
    "mask ratio": ("beit", "--mask-ratio 1.5", "--mask-ratio: '1.5' is not a number in (0, 1)"),
    "masking": ("beit", "--masking spiral", "--masking: 'spiral' is not one of blockwise"),
    "no masking": ("beit", "--masking none",
                   "--masking none leaves nothing to predict: add --recover all"),
    "min block": ("beit", "--min-block 16", "min block 16 fits nowhere: 6 of 4x4 to mask"),
    "target": ("beit", "--target edges", "--target: 'edges' is not one of tokens, pixels"),
    "tokenizer for pixels": ("beit", "--target pixels",
                             "--target pixels has no use for --token-size, --tokenizer"),
    "recover": ("beit", "--recover some", "--recover: 'some' is not one of masked, all"),
    "recipe": ("cls", "--recipe gigantic", "--recipe: 'gigantic' is not one of demo, fashion"),
    "model": ("cls", "--init random --model huge", "model 'huge' is none of mini, tiny"),
    "option": ("cls", "--learning-rate 1", "unrecognized arguments: --learning-rate"),
    "abbreviated option": ("cls", "--epoch 1", "unrecognized arguments: --epoch"),
    "value of an option": ("cls", "--lr fast", "--lr: 'fast' is not a number in [0, 100]"),
    "device": ("cls", "--device tpu", "device 'tpu' is none of"),
    "warm-up": ("cls", "--warmup-epochs 9", "--warmup-epochs 9"),
    "zero steps": ("seg", "--steps 0", "--steps: '0' is not a whole number in [1, 1e9]"),
    "long warm-up": ("seg", "--warmup-steps 4", "leaves nothing of --steps 4"),
    "endless in name": ("beit", "--epochs 1e300", "--epochs: '1e300' is not a number in (0, 1e6]"),
    "endless draws": ("cls", "--mixup 1e308", "--mixup: '1e308' is not a number in [0, 1000]"),
    "endless network": ("tokenizer", "--blocks-per-group 500000000", "--blocks-per-group: '5000"),
    "tiny crop": ("cls", "--eval-crop 1e-9", "--eval-crop: '1e-9' is not a number in [0.1, 1]"),
    "scales": ("seg", "--min-scale 3 --max-scale 1", "--min-scale 3.0 is above --max-scale 1.0"),
    "no name": ("beit", "--tokenizer=", "--tokenizer: '' is not a name or a path"),
    "no folder": ("beit", "--out=", "--out: '' is not a name or a path"),
    "no data": ("cls", "--data=", "--data: '' is not a name or a path"),
    "no weights": ("cls", "--init=", "--init: '' is not a name or a path"),
    "empty masks": ("beit", "--mask-ratio 0.93 --min-block 15",
                    "min block 15 hardly ever fits 4x4 patches: choose a smaller one"),
    "mostly empty masks": ("beit", "--mask-ratio 0.93 --min-block 12",
                           "min block 12 hardly ever fits 4x4 patches: choose a smaller one"),
    "equal warm-up": ("cls", "--warmup-epochs 1", "--warmup-epochs 1.0 leaves nothing of --epochs"),
    "processes": ("cls", "--workers 1000000", "--workers: '1000000' is neither auto nor in"),
}  # fmt: skip

UNUSED = {
    "eval and rates": ("cls", "--eval --init {made}/cls/checkpoint.pt",
                       "--eval has no use for --epochs, --image-size, --labels-per-class, --log-"),
    "sizes of weights": ("cls", "--model base", "--init CHECKPOINT has no use for --model"),
    "probe": ("cls", "--linear-probe --mixup 1", "--linear-probe has no use for --mixup"),
    "decay of a probe": ("cls", "--linear-probe --layer-decay 0.5",
                         "--linear-probe has no use for --layer-decay"),
    "recomputed probe": ("cls", "--linear-probe --recompute",
                         "--linear-probe has no use for --recompute"),
    "long side": ("seg", "--long-side 64", "--short-side 0 has no use for --long-side"),
    "no probe": ("cls", "--layer 1", "training without --linear-probe has no use for --layer"),
    "VQ-VAE": ("tokenizer", "--quantizer vq", "--quantizer vq has no use for --tau-steps"),
    "positions": ("beit", "--init {made}/beit/checkpoint.pt --positions shared --layer-scale 1",
                  "--init CHECKPOINT has no use for --layer-scale, --positions"),
}  # fmt: skip

MEMORY = {
    "vocabulary": ("tokenizer", "--vocab-size 1000000 --code-dim 65536", "weights"),
    "width": ("tokenizer", "--hidden 65536", "--hidden"),
    "pixels of the tokenizer": ("tokenizer", "--image-size 65536", "the backward pass"),
    "pixels": ("cls", "--init random --image-size 65536", "--image-size"),
    "batch": ("beit", "--batch-size 1000000", "of memory"),
    "decoder": ("seg", "--decoder-dim 65536", "--decoder-dim"),
}

CASES = DATA | FILES | SETTINGS | UNUSED | MEMORY


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
    for held_out, folder in (("bee", "zoo"), ("ape", "new")):
        for name in ("train/ant", "train/bee", f"val/{held_out}"):
            (wrong / folder / name).mkdir(parents=True)
            (wrong / folder / name / "1.png").touch()
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
    says = says.replace("{made}", str(made))
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


# -------------------------------------------------------- ranges, and flags without use


@pytest.mark.parametrize("stage", short_runs.SCRIPTS)
def test_every_recipe_is_within_its_ranges_and_help_shows_them(stage, capsys):
    """Each column's values against the row's range; the sizes of --model exist in MODELS."""
    module = short_runs.MODULES[stage]
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (*values, span, _) in module.RECIPES.items():
        values = [value for value in values if value is not None]
        assert span.replace("%", "%%") in shown, name
        if not isinstance(values[0], bool):
            kind = float if float in map(type, values) else type(values[0])
            assert [command_line.within(kind, span)(str(value)) for value in values] == values
        if name == "model":
            assert {*values} <= beit.MODELS.keys()


def test_a_range_takes_its_closed_ends_only():
    """Ends, their neighbours, NaN, infinity and other text against what the flag takes."""
    for kind, span, good, bad in (
        (float, "(0, 1]", ["1", "1e-9"], ["0", "-0.0", "1.0000001", "nan", "inf", "-inf", "x", ""]),
        (int, "[0, 10)", ["0", "9"], ["10", "-1", "1.0", "1e0", "9" * 5000]),
        (int, f"[0, {2**63})", ["0", str(2**63 - 1)], [str(2**63), "-1"]),
        (str, "a|b", ["a", "b"], ["", "c", "a|b"]),
        (str, "", ["a|b", " "], [""]),
    ):
        read = command_line.within(kind, span)
        assert [read(text) for text in good] == [kind(text) for text in good]
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError):
                read(text)


def test_values_from_a_checkpoint_are_checked_too(made, tmp_path):
    """--eval takes --eval-crop from --init; edited to 1e-9 it ends in one line."""
    state = torch.load(made / "cls" / "checkpoint.pt", weights_only=True)
    state["arguments"]["eval_crop"] = 1e-9
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(ValueError, match="edited.pt: arguments: eval_crop cannot be 1e-09"):
        short_runs.MODULES["cls"].main(["--eval", "--init", str(tmp_path / "edited.pt")])


def test_benchmark_has_no_use_for_the_logs_flags(arrays, tmp_path, capsys):
    """--benchmark with --save-every and --log-every: refused by name."""
    flags = short_runs.script_flags("tokenizer", arrays, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train_tokenizer.main([*flags, "--save-every", "9", "--benchmark", "1"])
    assert "--benchmark has no use for --log-every, --save-every" in capsys.readouterr().err


def test_compiling_without_a_compiler_is_refused_at_once(arrays, tmp_path, monkeypatch):
    """--compile on a CPU whose C++ compiler is not there: refused before anything is written."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = short_runs.script_flags("tokenizer", arrays, tmp_path)
    with pytest.raises(ValueError, match="--compile needs a C.. compiler, and no-such-compiler"):
        train_tokenizer.main([*flags, "--device", "cpu", "--compile", "--out", str(tmp_path / "t")])
    assert not (tmp_path / "t").exists()


# -------------------------------------------------------- memory


def parsed(module, *flags):
    """The arguments of a script with these flags."""
    parser = command_line.recipe_parser("", module.RECIPES)
    parser.set_defaults(eval=False, recompute=False)
    return command_line.parse_recipe(parser, module.RECIPES, ["--out", "unused", *flags])


def kept_bytes(model, compute):
    """Bytes that autograd keeps for the backward pass of compute(), the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # alive until the storages are counted
    return sum(storage.nbytes() for storage in kept.values()) if result is not None else 0


def weight_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name, size", [("tiny", 48), ("mini", 96)])
@pytest.mark.parametrize("positions", ["absolute", "shared"])
def test_a_backbones_memory_is_never_overestimated(name, size, positions):
    """Weights of models, and what autograd keeps in bf16, against the lower bounds."""
    args = parsed(finetune_seg, "--data", "shapes")
    config = beit.model_config(name, image_size=size, positions=positions)
    model = finetune_seg.BeitForSegmentation(config, 3, args.decoder_dim)
    weights, kept = memory.backbone(config, args, on_gpu=False)
    assert 0.8 * weight_count(model) < weights <= weight_count(model)
    x = torch.zeros(2, 3, size, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = kept_bytes(model, lambda: model(x).float().logsumexp(1).sum())
    assert 0.4 * real < 2 * 2 * kept <= real


@pytest.mark.parametrize("flags", [(), ("--quantizer", "vq"), ("--groups", "4"), ("--hidden", "8")])
def test_a_tokenizers_memory_is_never_overestimated(flags):
    """The same of the dVAE and of VQ-VAE."""
    args = parsed(train_tokenizer, *flags)
    names = dvae.DVAEConfig.__dataclass_fields__
    config = dvae.DVAEConfig(**{name: getattr(args, name) for name in names})
    model = dvae.build(config)
    weights, kept = memory.tokenizer(config, args)
    assert 0.5 * weight_count(model) < weights <= weight_count(model)
    x, side = torch.zeros(32, 3, 24, 24), 24 // config.downsampling
    e = torch.ones(32, side, side, config.vocab_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = kept_bytes(model, lambda: model(x, 0.5, 0.1, e)[0]) + e.nbytes
    assert 0.2 * real < 32 * 2 * kept <= real


def test_a_run_that_fits_exactly_is_not_refused(monkeypatch):
    """The bytes that the line asks for are enough, and one less is not."""
    args, config = parsed(pretrain, "--target", "pixels"), beit.model_config("tiny", image_size=24)
    args.batch_size = 128

    def refusal(there):
        monkeypatch.setattr(memory, "available", lambda device: there)
        try:
            memory.check(args, config)
        except ValueError as error:
            return str(error)
        return ""

    enough = bisect.bisect_left(range(2**40), True, key=lambda there: not refusal(there))
    assert 20 * 2**20 < enough < 2**30 and not refusal(enough)
    message = refusal(enough - 1)
    assert outputs.in_words(enough) in message and "most is for the backward pass" in message
    for flag in ("--batch-size", "--accumulate", "--recompute", "--image-size", "--model"):
        assert flag in message
    args.accumulate, args.eval = 128, False
    memory.check(args, config)


def test_cgroups_limit_the_memory(tmp_path, monkeypatch):
    """Limits of a group and of those above it, of both versions; torchrun's processes share."""
    groups = tmp_path / "cgroup"
    groups.write_text("4:memory:/a/b\n3:cpuset:/\n0::/c\n")
    for place, text in (("memory/a/b/memory.limit_in_bytes", "9000\n"),
                        ("memory/a/memory.limit_in_bytes", "5000\n"),
                        ("c/memory.max", "max\n"), ("memory.max", "7000\n")):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    assert sorted(memory.cgroup_limits(tmp_path, groups)) == [5000, 7000, 9000]
    assert memory.cgroup_limits(tmp_path, tmp_path / "none") == []
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [9000])
    monkeypatch.setattr(memory, "swap", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.available(torch.device("cpu")) == 3000 < math.inf
    monkeypatch.setattr(memory, "swap", lambda: 600)
    assert memory.available(torch.device("cpu")) == 3200


def test_swap_is_read_in_kilobytes(tmp_path):
    """As Linux says it; elsewhere none."""
    (tmp_path / "meminfo").write_text("MemTotal:    8000 kB\nSwapTotal:      2048 kB\n")
    assert memory.swap(tmp_path / "meminfo") == 2**21
    assert memory.swap(tmp_path / "none") == 0


@pytest.mark.parametrize("make", [lambda: np.empty(2**55), lambda: torch.empty(2**55)])
@pytest.mark.parametrize("training", [False, True])
def test_a_failed_allocation_is_one_line(make, training, capsys, monkeypatch):
    """Of numpy and torch, for more memory than there is: status 2; in training flags that help."""
    monkeypatch.setattr(signals, "catch", lambda: None)
    with pytest.raises(SystemExit, match="2"), command_line.one_line_errors(training):
        make()
    error = capsys.readouterr().err
    assert "the memory is full (" in error and error.count("\n") == 1
    assert ("--batch-size" in error) == training


DEFECTS = {
    RuntimeError: lambda x: x @ x[:, 1:],
    TypeError: lambda x: x + None,
    AttributeError: lambda x: x.feature,
    KeyError: lambda x: {}[0],
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_of_the_model_keeps_its_traceback(kind, arrays, made, tmp_path, monkeypatch):
    """A defect planted in the MLP: training ends in its own error, not in a line and status 2."""
    monkeypatch.setattr(beit.MLP, "forward", lambda self, x: DEFECTS[kind](x))
    flags = [*short_runs.script_flags("cls", arrays, made), "--out", str(tmp_path / "cls")]
    with pytest.raises(kind) as raised, command_line.one_line_errors():
        short_runs.MODULES["cls"].main(flags)
    assert any(frame.name == "<lambda>" for frame in raised.traceback)

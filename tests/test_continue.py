"""Starting from weights, looking at them, sizes taken from them, and --resume without flags."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import dvae
import finetune_cls
import finetune_seg
import pretrain
import train_tokenizer
from experiments.short_runs import (
    COMMON, MODULES, SCRIPTS, different_weights, script_flags, weights,
)  # fmt: skip
from images import sources
from plumbing import checkpoints, log, published
from plumbing.run import Run
from plumbing.weights import file_digest


def checkpoint(made, stage):
    return str(made / stage / "checkpoint.pt")


def numbers(text, names):
    """{name: value} of 'name value' pairs in what a script printed."""
    words = text.split()
    return {name: float(words[words.index(name) + 1]) for name in names}


def test_pretraining_continues_from_its_own_checkpoint(arrays, made, tmp_path, capsys):
    """--init with the same tokenizer keeps all: with learning rate 0 the end is the start."""
    flags = [*script_flags("beit", arrays, made), "--init", checkpoint(made, "beit")]
    pretrain.main([*flags, "--lr", "0", "--min-lr", "0", "--out", str(tmp_path / "same")])
    assert "kept its backbone, e_[M], head\n" in capsys.readouterr().out
    old, new = weights(made / "beit"), weights(tmp_path / "same")
    assert all(torch.equal(old[name], new[name]) for name in old)
    start, end = (log.read_metrics(f)[-1]["mim_loss"] for f in (made / "beit", tmp_path / "same"))
    assert start == pytest.approx(end, rel=1e-6)


def test_another_tokenizer_gets_a_new_head(arrays, made, tmp_path, capsys):
    """Same sizes, other codes: the head would predict the wrong tokens, so it is new."""
    flags = script_flags("tokenizer", arrays, made)
    train_tokenizer.main([*flags, "--seed", "5", "--out", str(tmp_path / "other")])
    other = ["--tokenizer", str(tmp_path / "other" / "checkpoint.pt")]
    flags = [*script_flags("beit", arrays, made), *other, "--init", checkpoint(made, "beit")]
    capsys.readouterr()
    pretrain.main([*flags, "--lr", "0", "--min-lr", "0", "--out", str(tmp_path / "beit")])
    assert "kept its backbone, e_[M]; new: head\n" in capsys.readouterr().out
    old, new = weights(made / "beit"), weights(tmp_path / "beit")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"lm_head.weight"} or changed == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize(
    "stage, head, kept",
    [("cls", "head.weight", "fc_norm.weight"), ("seg", "decoder.2.weight", "norm.weight")],
)
def test_other_classes_get_a_new_head(stage, head, kept, arrays, made, tmp_path):
    """As many classes, with other names: the head would name the wrong ones, the norm is kept."""
    state = torch.load(made / stage / "checkpoint.pt", weights_only=True)
    state["classes"] = [f"other {name}" for name in state["classes"]]
    torch.save(state, tmp_path / "other.pt")
    flags = [*script_flags(stage, arrays, made), "--init", str(tmp_path / "other.pt"), "--lr", "0"]
    flags += ["--min-lr", "0"] if stage == "cls" else []
    MODULES[stage].main([*flags, "--out", str(tmp_path / "new")])
    new, old = weights(tmp_path / "new"), state["model"]
    assert not torch.equal(new[head], old[head]) and torch.equal(new[kept], old[kept])


def test_intermediate_fine_tuning_starts_from_the_classifiers_backbone(arrays, made, tmp_path):
    """A segmenter from a classifier, at learning rate 0: all but the classifier's norm and head."""
    flags = [*script_flags("seg", arrays, made), "--init", checkpoint(made, "cls"), "--lr", "0"]
    finetune_seg.main([*flags, "--out", str(tmp_path / "seg")])
    old, new = weights(made / "cls"), weights(tmp_path / "seg")
    kept = [name for name in old if not name.startswith(("fc_norm.", "head."))]
    assert kept and all(torch.equal(old[name], new[name]) for name in kept)


def test_pixel_mean_and_std_are_those_of_the_weights(arrays, made, tmp_path, capsys):
    """--init and --eval keep imagenet's although the recipe demo has half, unless told.

    Weights without arguments are said to have half, although the recipe base has imagenet.
    """
    flags = [*script_flags("beit", arrays, made), "--normalise", "imagenet"]
    pretrain.main([*flags, "--out", str(tmp_path / "source")])
    flags = [*script_flags("beit", arrays, made), "--init", checkpoint(tmp_path, "source")]
    for name, more, expected in (("as", [], "imagenet"), ("told", ["--normalise", "half"], "half")):
        pretrain.main([*flags, *more, "--out", str(tmp_path / name)])
        saved = checkpoints.load(tmp_path / name / "checkpoint.pt", "pretraining")
        assert saved["normalise"] == saved["arguments"]["normalise"] == expected
    flags = [*COMMON, "--data", arrays, "--tokenizer", checkpoint(made, "tokenizer")]
    capsys.readouterr()
    pretrain.main([*flags, "--eval", "--init", checkpoint(tmp_path, "source")])
    final = log.read_metrics(tmp_path / "source")[-1]["mim_loss"]
    assert numbers(capsys.readouterr().out, ["mim_loss"])["mim_loss"] == pytest.approx(final, 1e-4)
    bare = str(tmp_path / "bare.pth")
    published.main([checkpoint(tmp_path, "source"), bare])
    flags = [*script_flags("beit", arrays, made), "--init", bare, "--recipe", "base"]
    pretrain.main([*flags, "--out", str(tmp_path / "bare")])
    saved = checkpoints.load(tmp_path / "bare" / "checkpoint.pt", "pretraining")
    assert saved["normalise"] == "half" and "assuming 0.5" in capsys.readouterr().out


def test_tokenizer_continues_as_it_was_made(arrays, tmp_path, capsys):
    """A VQ-VAE stays one without --quantizer vq, and flags of Gumbel-softmax are refused."""
    common = [*COMMON, "--data", arrays, "--image-size", "16", "--steps", "2"]
    flags = [*common, "--warmup-steps", "0"]
    sizes = ["--quantizer", "vq", "--vocab-size", "16", "--hidden", "8", "--code-dim", "8"]
    train_tokenizer.main([*flags, *sizes, "--out", str(tmp_path / "vq")])
    flags += ["--init", checkpoint(tmp_path, "vq")]
    with pytest.raises(SystemExit, match="2"):
        train_tokenizer.main([*flags, "--beta", "1", "--out", str(tmp_path / "new")])
    assert "--quantizer vq has no use for --beta" in capsys.readouterr().err
    train_tokenizer.main([*flags, "--out", str(tmp_path / "new")])
    saved = checkpoints.load(tmp_path / "new" / "checkpoint.pt", "tokenizer")
    assert saved["config"]["quantizer"] == saved["arguments"]["quantizer"] == "vq"


def test_the_average_of_the_weights_continues_after_skipped_steps(arrays, made, tmp_path):
    """Stopped while every step so far was skipped, as a scaler may do in fp16: the same average."""
    flags = [*script_flags("tokenizer", arrays, made), "--ema", "0.9", "--save-every", "1"]
    flags += ["--steps", "4"]

    class Stop(Exception):
        pass

    def allows(stop_at):
        def skip_two(run, step, norm, lr):
            if step == stop_at:
                raise Stop
            return step > 1

        return mock.patch.object(Run, "allows", skip_two)

    with allows(None):
        train_tokenizer.main([*flags, "--out", str(tmp_path / "whole")])
    with allows(1), pytest.raises(Stop):
        train_tokenizer.main([*flags, "--out", str(tmp_path / "parts")])
    with allows(None):
        train_tokenizer.main(["--resume", "--out", str(tmp_path / "parts")])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_pretraining_from_a_classifier_at_another_size(arrays, made, tmp_path, capsys):
    """A classifier has no e_[M] and no MIM head: both are new, positions are interpolated."""
    flags = [*script_flags("beit", arrays, made), "--init", checkpoint(made, "cls")]
    sizes = ["--image-size", "24", "--token-size", "24"]
    pretrain.main([*flags, *sizes, "--out", str(tmp_path / "beit")])
    assert "kept its backbone; new: e_[M], head\n" in capsys.readouterr().out
    state = checkpoints.load(tmp_path / "beit" / "checkpoint.pt", "pretraining")["model"]
    assert state["pos_embed"].shape == (1, 37, 128)


def test_eval_without_the_head_is_refused(arrays, made, tmp_path):
    """A classifier, and a model that predicts another tokenizer's tokens: no random head."""
    flags = script_flags("tokenizer", arrays, made)
    train_tokenizer.main([*flags, "--seed", "5", "--out", str(tmp_path / "other")])
    sizes = ["--token-size", "16", "--min-block", "2"]
    for tokenizer, stage in ((made / "tokenizer", "cls"), (tmp_path / "other", "beit")):
        flags = [*COMMON, "--data", arrays, "--tokenizer", str(tokenizer / "checkpoint.pt")]
        with pytest.raises(ValueError, match=f"{stage}/checkpoint.pt lacks e_"):
            pretrain.main([*flags, "--eval", "--init", checkpoint(made, stage), *sizes])


def test_head_of_another_layer_is_not_kept(arrays, made, tmp_path):
    """A probe of layer 2 starts a probe of layer 2, not a classifier; and is not exported."""
    flags = [*script_flags("cls", arrays, made), "--lr", "0", "--min-lr", "0"]
    probe = [*flags, "--linear-probe", "--layer", "2"]
    finetune_cls.main([*probe, "--lr", "0.1", "--out", str(tmp_path / "probe")])
    flags[flags.index("--init") + 1] = probe[probe.index("--init") + 1] = checkpoint(
        tmp_path, "probe"
    )
    finetune_cls.main([*probe, "--out", str(tmp_path / "same")])
    finetune_cls.main([*flags, "--out", str(tmp_path / "other")])
    heads = [weights(tmp_path / name)["head.weight"] for name in ("probe", "same", "other")]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    with pytest.raises(ValueError, match="only these scripts can classify layer 2"):
        published.main([checkpoint(tmp_path, "probe"), str(tmp_path / "new.pth")])


def test_eval_of_a_pretrained_model_is_its_final_result(arrays, made, tmp_path, capsys):
    """pretrain.py --eval: the numbers of the run's last record, and pictures in --out."""
    tokenizer = ["--tokenizer", checkpoint(made, "tokenizer")]
    flags = [*COMMON, "--data", arrays, *tokenizer, "--init", checkpoint(made, "beit")]
    pretrain.main([*flags, "--eval", "--out", str(tmp_path / "look")])
    final = log.read_metrics(made / "beit")[-1]
    names = ("mim_loss", "mim_accuracy", "token_entropy", "stage1_nats", "stage2_nats")
    for name, value in numbers(capsys.readouterr().out, names).items():
        assert value == pytest.approx(final[name], rel=1e-4), name
    assert (tmp_path / "look" / "predictions.png").stat().st_size > 100


def test_eval_of_a_tokenizer_is_its_final_result(arrays, made, tmp_path, capsys):
    """train_tokenizer.py --eval: MSE, codes and perplexity again, and reconstructions in --out."""
    flags = ["--eval", "--init", checkpoint(made, "tokenizer"), *COMMON, "--data", arrays]
    train_tokenizer.main([*flags, "--image-size", "16", "--out", str(tmp_path / "look")])
    final = log.read_metrics(made / "tokenizer")[-1]
    names = ("reconstruction_mse", "codebook_used", "codebook_perplexity")
    for name, value in numbers(capsys.readouterr().out, names).items():
        assert value == pytest.approx(final[name], rel=1e-4), name
    assert (tmp_path / "look" / "reconstructions.png").stat().st_size > 100


def test_the_average_of_the_weights_is_used(arrays, made, tmp_path, monkeypatch, capsys):
    """--ema by hand, against what load_tokenizer and --eval take, and the run's own result."""
    seen, report, name = [], Run.report, "decoder.blocks.input.weight"

    def watched(self, loss, **values):
        seen.append(self.saved[0].state_dict()[name].clone())
        report(self, loss, **values)

    monkeypatch.setattr(Run, "report", watched)
    flags = [*script_flags("tokenizer", arrays, made), "--ema", "0.9", "--lr", "0.1"]
    train_tokenizer.main([*flags, "--out", str(tmp_path / "run")])
    average = seen[0]
    for weight in seen[1:]:
        average = 0.9 * average + 0.1 * weight
    path = checkpoint(tmp_path, "run")
    assert torch.allclose(dvae.load_tokenizer(path).state_dict()[name], average, atol=1e-6)
    final = log.read_metrics(tmp_path / "run")[-1]
    capsys.readouterr()
    train_tokenizer.main(["--eval", "--init", path, *COMMON, "--data", arrays])
    assert f"reconstruction_mse {final['reconstruction_mse']:.5g}" in capsys.readouterr().out


def test_segmentation_continues_with_its_decoder(arrays, made, tmp_path):
    """Fine-tuning at learning rate 0 from a segmenter of the same classes: the same weights."""
    flags = [*script_flags("seg", arrays, made), "--init", checkpoint(made, "seg")]
    finetune_seg.main([*flags, "--lr", "0", "--out", str(tmp_path / "same")])
    assert not different_weights(made / "seg", tmp_path / "same")


def test_tokenizer_training_continues(arrays, made, tmp_path, capsys):
    """--init takes weights and configuration from the checkpoint, whatever the networks' flags."""
    flags = [*COMMON, "--data", arrays, "--image-size", "16", "--steps", "2", "--warmup-steps", "1"]
    init = ["--init", checkpoint(made, "tokenizer"), "--lr", "0", "--min-lr", "0"]
    train_tokenizer.main([*flags, *init, "--out", str(tmp_path / "more")])
    assert "its configuration, not the recipe's" in capsys.readouterr().out
    old = checkpoints.load(made / "tokenizer" / "checkpoint.pt", "tokenizer")
    new = checkpoints.load(tmp_path / "more" / "checkpoint.pt", "tokenizer")
    assert new["config"] == old["config"] and new["arguments"]["vocab_size"] == 16
    name = "encoder.blocks.input.weight"
    assert torch.equal(old["model"][name], new["model"][name])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_resume_needs_no_other_flags(stage, arrays, made, tmp_path, capsys):
    """--resume --out OUT alone ends with the bits of the whole run; given flags still count."""
    out, flags = tmp_path / "run", script_flags(stage, arrays, made)
    MODULES[stage].main([*flags, "--out", str(out)])
    whole, path = weights(out), out / "checkpoint.pt"
    (out / "previous.pt").replace(path)  # as if it had stopped before the first step
    checkpoints.LOCKS.clear()
    MODULES[stage].main(["--resume", "--out", str(out)])
    assert all(torch.equal(whole[name], value) for name, value in weights(out).items())
    with pytest.raises(ValueError, match="--seed is 9, but"):
        MODULES[stage].main(["--resume", "--out", str(out), "--seed", "9"])
    capsys.readouterr()
    MODULES[stage].main(["--resume", "--out", str(out)])
    assert f"--init {path}" in capsys.readouterr().out


def test_fine_tuning_takes_the_checkpoints_image_size(arrays, made, tmp_path):
    """Pre-trained at 16 pixels, the demo recipe is for 24: fine-tuned at 16 unless told."""
    for module, stage, more in (
        (finetune_cls, "cls", ["--labels-per-class", "0", "--epochs", "1"]),
        (finetune_seg, "seg", ["--train-images", "0", "--steps", "4", "--warmup-steps", "1"]),
    ):
        more += ["--warmup-epochs", "0"] if stage == "cls" else []
        flags = [*COMMON, "--data", arrays, "--init", checkpoint(made, "beit"), *more]
        module.main([*flags, "--out", str(tmp_path / stage)])
        kinds = "classification", "segmentation"
        found = published.load_pretrained(checkpoint(tmp_path, stage), *kinds)
        assert found["config"]["image_size"] == 16


@pytest.mark.parametrize("stage", ["tokenizer", "beit"])
def test_own_photographs_need_a_size(stage, made, tmp_path, capsys):
    """The small recipes' 24 pixels are for drawings: a folder of pictures must come with a size."""
    (tmp_path / "photos").mkdir()
    flags = ["--tokenizer", checkpoint(made, "tokenizer")] if stage == "beit" else []
    flags += ["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        MODULES[stage].main(flags)
    error = capsys.readouterr().err
    assert "give --recipe photos, or --image-size" in error
    assert ("--token-size" in error) == (stage == "beit")
    assert error.count("\n") == 1


def test_iou_of_each_class_is_in_the_log(made):
    """The final record names every class that occurs; their mean is the mIoU."""
    final = log.read_metrics(made / "seg")[-1]
    assert set(final["iou"]) <= {"0", "1"}
    assert np.mean(list(final["iou"].values())) == pytest.approx(final["miou"], abs=0.01)
    matrix = finetune_seg.confusion_matrix(
        torch.tensor([0, 0, 1, sources.IGNORE]), torch.tensor([0, 1, 1, 0]), 3
    )
    assert finetune_seg.class_iou(matrix)[:2].tolist() == pytest.approx([50, 50])
    assert finetune_seg.class_iou(matrix)[2].isnan()


def test_a_run_is_not_resumed_on_other_data(arrays, made, tmp_path):
    """Images inverted or removed, labels permuted, classes renamed: the line names which."""
    content = dict(np.load(arrays))
    changes = {
        "content": {"train_images": 255 - content["train_images"]},
        "number of images": {
            name: content[name][:-1] for name in ("train_images", "train_labels", "train_masks")
        },
        "labels": {"train_labels": content["train_labels"][::-1]},
        "class names": {"classes": np.array(["a", "b", "c", "d"])},
    }
    data = tmp_path / "set.npz"
    np.savez(data, **content)
    flags = [*script_flags("cls", arrays, made), "--data", str(data)]
    finetune_cls.main([*flags, "--out", str(tmp_path / "run")])
    for name, change in changes.items():
        np.savez(data, **content | change)
        checkpoints.LOCKS.clear()
        with pytest.raises(ValueError, match=f"the {name}.* of the training data changed"):
            finetune_cls.main(["--resume", "--out", str(tmp_path / "run")])
    np.savez(data, **content)
    checkpoints.LOCKS.clear()
    finetune_cls.main(["--resume", "--out", str(tmp_path / "run")])


def test_a_run_is_not_resumed_on_other_masks(arrays, made, tmp_path):
    """The annotations of a folder are replaced under the same names, and put back."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    data, run = tmp_path / "set", tmp_path / "run"
    for part, split in (("images", "train"), ("images", "val"), ("annotations", "train"),
                        ("annotations", "val")):  # fmt: skip
        (data / part / split).mkdir(parents=True)
        for i in range(8):
            shape = (16, 16, 3) if part == "images" else (16, 16)
            pixels = rng.integers(0, 256 if part == "images" else 2, shape, np.uint8)
            image.fromarray(pixels).save(data / part / split / f"{i}.png")
    (data / "classes.txt").write_text("ground\nobject\n")
    flags = [*script_flags("seg", arrays, made), "--data", str(data), "--workers", "0"]
    finetune_seg.main([*flags, "--out", str(run)])
    mask = data / "annotations" / "train" / "3.png"
    before = mask.read_bytes()
    image.new("L", (16, 16), 1).save(mask)
    checkpoints.LOCKS.clear()
    with pytest.raises(ValueError, match="the content .* of the training data changed"):
        finetune_seg.main(["--resume", "--out", str(run)])
    mask.write_bytes(before)
    checkpoints.LOCKS.clear()
    finetune_seg.main(["--resume", "--out", str(run)])


def test_a_run_is_not_resumed_with_another_tokenizer(arrays, made, tmp_path):
    """The file under --tokenizer is replaced by another training's: one line."""
    tokenizer = tmp_path / "tokenizer.pt"
    tokenizer.write_bytes((made / "tokenizer" / "checkpoint.pt").read_bytes())
    flags = [*script_flags("beit", arrays, made), "--tokenizer", str(tokenizer)]
    pretrain.main([*flags, "--out", str(tmp_path / "run")])
    other = script_flags("tokenizer", arrays, made)
    train_tokenizer.main([*other, "--seed", "5", "--out", str(tmp_path / "other")])
    tokenizer.write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    checkpoints.LOCKS.clear()
    with pytest.raises(ValueError, match="another tokenizer than --tokenizer"):
        pretrain.main(["--resume", "--out", str(tmp_path / "run")])


def test_a_run_goes_on_where_its_data_and_tokenizer_have_moved(arrays, made, tmp_path):
    """Both under new paths: the same bits. Other data there: refused."""
    files = {"--data": tmp_path / "a.npz", "--tokenizer": tmp_path / "a.pt"}
    files["--data"].write_bytes(Path(arrays).read_bytes())
    files["--tokenizer"].write_bytes((made / "tokenizer" / "checkpoint.pt").read_bytes())
    out, given = tmp_path / "run", [str(part) for pair in files.items() for part in pair]
    pretrain.main([*script_flags("beit", arrays, made), *given, "--out", str(out)])
    whole, moved = weights(out), []
    (out / "previous.pt").replace(out / "checkpoint.pt")
    for flag, path in files.items():
        moved += [flag, str(path.rename(path.with_stem("b")))]
    other = dict(np.load(moved[1]))
    other["train_images"] = 255 - other["train_images"]
    np.savez(files["--data"], **other)
    checkpoints.LOCKS.clear()
    with pytest.raises(ValueError, match="the content .* of the training data changed"):
        pretrain.main(["--resume", "--out", str(out), *moved, "--data", str(files["--data"])])
    checkpoints.LOCKS.clear()
    pretrain.main(["--resume", "--out", str(out), *moved])
    assert all(torch.equal(whole[name], value) for name, value in weights(out).items())


def test_only_what_counts_is_in_a_digest(tmp_path):
    """Of DALL-E's folder its two files; a folder's name if the images lie in several."""
    (tmp_path / "encoder.pkl").write_bytes(b"weights")
    before = file_digest(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"of a file manager")
    assert file_digest(tmp_path) == before
    (tmp_path / "decoder.pkl").write_bytes(b"weights")
    assert file_digest(tmp_path) != before

    def content(*names):
        files = sources.Files("set", [tmp_path / name for name in names])
        return sources.fingerprint(files)["content (digest)"]

    assert content("old/1.png", "old/2.png") == content("new/1.png", "new/2.png")
    assert content("a/1.png", "b/1.png") != content("a/1.png", "c/1.png")


def test_weights_are_looked_at_as_they_were_trained(arrays, made, capsys):
    """--eval takes sizes and settings of evaluation from --init, not the recipe's 24 pixels."""
    plain = ["--data", arrays, "--device", "cpu", "--amp", "off", "--batch-size", "8"]
    tokenizer = ["--tokenizer", checkpoint(made, "tokenizer")]
    for stage, name in (("tokenizer", "reconstruction_mse"), ("beit", "mim_loss"), ("seg", "miou")):
        more = tokenizer if stage == "beit" else []
        MODULES[stage].main(["--eval", "--init", checkpoint(made, stage), *plain, *more])
        said = capsys.readouterr().out
        assert "16 images of" in said and "16 x 16 pixels" in said
        final = log.read_metrics(made / stage)[-1]
        assert numbers(said, [name])[name] == pytest.approx(final[name], rel=1e-4)


def test_pretraining_continues_at_the_checkpoints_size_unless_told(arrays, made, tmp_path, capsys):
    """Without sizes --init keeps its 16 pixels; other sizes interpolate positions, in a line."""
    tokenizer = ["--tokenizer", checkpoint(made, "tokenizer"), "--min-block", "2"]
    flags = [*COMMON, "--data", arrays, *tokenizer, "--init", checkpoint(made, "beit")]
    flags += ["--epochs", "1", "--warmup-epochs", "0"]
    pretrain.main([*flags, "--out", str(tmp_path / "same")])
    said = capsys.readouterr().out
    assert "16 x 16 pixels, 16 patches" in said and "interpolated" not in said
    sizes = ["--image-size", "24", "--token-size", "24"]
    pretrain.main([*flags, *sizes, "--out", str(tmp_path / "larger")])
    line = "positions are interpolated: the weights are for 16 pixels, not 24\n"
    assert line in capsys.readouterr().out


def test_a_run_of_another_script_is_not_resumed(made, capsys):
    """pretrain.py --resume in a tokenizer's folder: one line that says so, not a missing flag."""
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--resume", "--out", str(made / "tokenizer")])
    error = capsys.readouterr().err
    assert "is a run of another script" in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--resume", "--out", str(made / "cls")])
    error = capsys.readouterr().err
    assert "is a run of another script" in error and error.count("\n") == 1


# -------------------------------------------------------- what a file may hold

DEEP = []
for _ in range(300):
    DEEP = [DEEP]
NAN = torch.full((128,), float("nan"))
EDITS = {  # what the line names: (the script, the place in its checkpoint, the value there)
    "kind": ("cls", ["kind"], "no such kind"),
    "no config": ("cls", ["config"], None),
    "config: the field 'width'": ("cls", ["config", "width"], 3),
    "config: dim": ("cls", ["config", "dim"], 10**6),
    "config: heads": ("beit", ["config", "heads"], True),
    "config: positions": ("seg", ["config", "positions"], "shared"),
    "config: vocab_size": ("tokenizer", ["config", "vocab_size"], 10**9),
    "config: hidden": ("tokenizer", ["config", "hidden"], 10**6),
    "'a' is not a tensor": ("cls", ["model", "a"], DEEP),
    "head.bias is not a dense": ("cls", ["model", "head.bias"], torch.zeros(4).to_sparse()),
    "cls_token claims": ("cls", ["model", "cls_token"], torch.zeros(1).expand(1, 10**9, 128)),
    "head.bias is not finite": ("cls", ["model", "head.bias"], NAN[:4]),
    "head.bias has the type": ("cls", ["model", "head.bias"], torch.zeros(4, dtype=torch.int8)),
    "model has norm.weight": ("beit", ["model", "norm.weight"], torch.zeros(3)),
    "normalise": ("beit", ["normalise"], "quarter"),
    "classes": ("cls", ["classes"], ["a"]),
    "classes is": ("seg", ["classes"], [0, 1]),
    "layer": ("cls", ["layer"], -1),
    "decoder": ("seg", ["decoder_dim"], 10**7),
    "arguments: 'lr' is a list": ("cls", ["arguments", "lr"], DEEP),
    "arguments: eval_crop": ("cls", ["arguments", "eval_crop"], 8.5),
    "step is -1": ("cls", ["step"], -1),
    "step is 10000": ("cls", ["step"], 10_000),
    "its optimizer made 4": ("cls", ["step"], 0),
    "param_groups has other entries": ("cls", ["optimizer", "param_groups", 0, "more"], 1),
    "optimizer: betas": ("cls", ["optimizer", "param_groups", 0, "betas"], (0.9, 2.0)),
    "optimizer has exp_avg ": ("cls", ["optimizer", "state", 0, "exp_avg"], torch.zeros(3)),
    "optimizer: exp_avg is not finite": ("cls", ["optimizer", "state", 2, "exp_avg"], NAN),
    "scaler": ("cls", ["scaler"], {"scale": -1.0}),
    "no entry 'more'": ("cls", ["more"], 1),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_checkpoint_that_no_script_wrote_is_refused_by_name(message, made, tmp_path):
    """One entry is changed, added or, with None, removed: --resume names it and changes nothing."""
    stage, place, value = EDITS[message]
    state = torch.load(made / stage / "checkpoint.pt", weights_only=True)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is None:
        del inner[place[-1]]
    torch.save(state, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        MODULES[stage].main(["--resume", "--out", str(tmp_path)])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    if place[0] not in ("optimizer", "step"):  # which --eval does not need
        flags = ["--eval", "--init", str(tmp_path / "checkpoint.pt"), "--data", "nowhere"]
        flags += ["--tokenizer", checkpoint(made, "tokenizer")] if stage == "beit" else []
        message = "model has encoder" if message == "config: hidden" else message
        with pytest.raises(ValueError, match=re.escape(message)):
            MODULES[stage].main(flags)


def test_hostile_checkpoint_is_refused_not_replaced(made, hostile, tmp_path):
    """A pickle with code under checkpoint.pt: --resume does not continue from previous.pt."""
    torch.save(hostile(tmp_path / "ran"), tmp_path / "checkpoint.pt")
    (tmp_path / "previous.pt").write_bytes((made / "cls" / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="checkpoint.pt is refused: it asks for posix.mkdir"):
        finetune_cls.main(["--resume", "--out", str(tmp_path)])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", ["beit", "cls", "tokenizer"])
def test_resume_does_not_need_init_but_notices_another(stage, arrays, made, tmp_path, capsys):
    """--init is replaced: refused. It is deleted: the run ends with the same bits."""
    init, out = tmp_path / "init.pt", tmp_path / "run"
    source = made / ("tokenizer" if stage == "tokenizer" else "beit") / "checkpoint.pt"
    init.write_bytes(source.read_bytes())
    flags = script_flags(stage, arrays, made)
    if stage == "tokenizer":  # whose sizes are those of --init
        flags = [*COMMON, "--data", arrays, "--image-size", "16", "--steps", "4"]
        flags += ["--warmup-steps", "1", "--save-every", "2"]
    flags = [*flags, "--init", str(init), "--out", str(out)]
    MODULES[stage].main(flags)
    whole = weights(out)
    (out / "previous.pt").replace(out / "checkpoint.pt")
    checkpoints.LOCKS.clear()
    state = torch.load(init, weights_only=True)
    torch.save(state | {"step": 3}, init)
    with pytest.raises(ValueError, match=f"another file than this --init {init}: move it away"):
        MODULES[stage].main(["--resume", "--out", str(out)])
    init.unlink()
    checkpoints.LOCKS.clear()
    MODULES[stage].main(["--resume", "--out", str(out)])
    assert f"--init {init} is gone" in capsys.readouterr().out
    assert all(torch.equal(whole[name], value) for name, value in weights(out).items())
    assert "init" in torch.load(out / "checkpoint.pt", weights_only=True)

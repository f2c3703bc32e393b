"""Features of every layer, k-NN accuracy by a second route, and the command of both."""

import functools
import json
import math
import re
import types
from collections import Counter

import numpy as np
import pytest
import torch

from beit import Beit, BeitConfig, load_backbone
from experiments import features
from images import batches, sets, sources
from images.labelled import LabelledViews
from plumbing import entries, published, signals, weights

FLAGS = ["--device", "cpu", "--amp", "off", "--batch-size", "5", "--workers", "0"]


def run(checkpoint, data, out, *flags):
    """The command in this process, on the CPU in float32: the arrays that it wrote."""
    features.main([str(checkpoint), "--data", str(data), "--out", str(out), *FLAGS, *flags])
    with np.load(out, allow_pickle=False) as found:
        return dict(found)


@pytest.fixture(scope="module")
def checkpoint(made):
    """The checkpoint of a short pre-training run."""
    return made / "beit" / "checkpoint.pt"


def unlabelled(arrays, path):
    """A copy of the tiny set, without labels and masks."""
    with np.load(arrays) as content:
        np.savez(path, **{name: content[name] for name in content if name.endswith("_images")})
    return path


# -------------------------------------------------------- features


@pytest.mark.parametrize("stage", ["beit", "cls", "seg", "published"])
def test_features_are_mean_patch_outputs(stage, made, arrays, tmp_path):
    """Layer L against Beit.forward, the others against Beit.features, image by image.

    For checkpoints of the three kinds and for a bare state dict, as published.
    """
    path = made / ("beit" if stage == "published" else stage) / "checkpoint.pt"
    if stage == "published":
        state = published.load_pretrained(path, "pretraining")["model"]
        # A published file does not tell the number of heads beside E_pos: one for each 64.
        path = tmp_path / "published.pth"
        weights.write(path, state)
    given = published.load_pretrained(path, *entries.TRAINED)
    model = Beit(BeitConfig(**given["config"])).eval()
    load_backbone(model, given["model"])
    found = run(path, arrays, tmp_path / "F.npz", "--split", "val")
    assert found["features"].shape == (16, model.config.depth, model.config.dim)
    assert found["features"].dtype == np.float32
    pixels = torch.from_numpy(np.load(arrays)["val_images"]).permute(0, 3, 1, 2)
    x = batches.standardise(pixels / 255, given["normalise"])
    for index in (0, 7, 15):
        with torch.no_grad():
            last = model(x[index : index + 1])[0, 1:].mean(0)
            layers = range(1, model.config.depth + 1)
            inner = [model.features(x[index : index + 1], layer)[0, 1:].mean(0) for layer in layers]
        torch.testing.assert_close(torch.from_numpy(found["features"][index, -1]), last)
        torch.testing.assert_close(torch.from_numpy(found["features"][index]), torch.stack(inner))


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_layer_means_have_the_relative_bias(positions):
    """Every layer against Beit.features, with tables far from zero; of bf16 outputs in float32."""
    torch.manual_seed(0)
    model = Beit(BeitConfig(8, 2, 16, 3, 2, positions=positions, drop_path=0.0)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = [model.features(x, layer)[:, 1:].mean(1) for layer in (1, 2, 3)]
        torch.testing.assert_close(features.layer_means(model, x), torch.stack(expected, 1))
        assert features.layer_means(model.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_images_are_seen_as_classification_evaluates_them(checkpoint, tmp_path, monkeypatch):
    """Images of another size and shape: what the model is given against LabelledViews."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 30, 3), np.uint8)
    data = tmp_path / "oblong.npz"
    np.savez(data, val_images=pixels, val_labels=np.arange(6))
    seen, layer_means = [], features.layer_means

    def watched(model, x):
        seen.append(x)
        return layer_means(model, x)

    monkeypatch.setattr(features, "layer_means", watched)
    run(checkpoint, data, tmp_path / "F.npz", "--split", "val", "--normalise", "imagenet")
    run(checkpoint, data, tmp_path / "G.npz", "--split", "val", "--eval-crop", "0.8")
    flags = {"image_size": 16, "seed": 0, "min_crop": 1.0, "flip": True}
    flags |= {"randaugment": 0.0, "erasing": 0.0}
    seen = torch.cat(seen).split(6)
    for x, share, normalise in zip(seen, (1.0, 0.8), ("imagenet", "half")):
        args = types.SimpleNamespace(**flags, eval_crop=share)
        view = LabelledViews(args, sets.open_source(str(data), "val"), 6, False)
        images, _ = view[[(-1, index) for index in range(6)]]
        assert torch.equal(x, batches.standardise(images / 255, normalise))


def test_memory_mapped_arrays_and_files_give_the_same_features(checkpoint, arrays, tmp_path):
    """The tiny set as .npz, as a folder of .npy, and as PNG files in ImageNet's layout."""
    image = pytest.importorskip("PIL.Image")
    with np.load(arrays) as content:
        tiny = dict(content)
    (tmp_path / "npy").mkdir()
    for name, values in tiny.items():
        np.save(tmp_path / "npy" / f"{name}.npy", values)
    for split in ("train", "val"):
        for index, pixels in enumerate(tiny[f"{split}_images"]):
            folder = tmp_path / "png" / split / str(tiny[f"{split}_labels"][index])
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels).save(folder / f"{index:03d}.png")
    whole = run(checkpoint, arrays, tmp_path / "A.npz")
    mapped = run(checkpoint, tmp_path / "npy", tmp_path / "B.npz")
    files = run(checkpoint, tmp_path / "png", tmp_path / "C.npz")
    assert np.array_equal(whole["features"], mapped["features"])
    places = np.array([int(name[-7:-4]) for name in files["files"]])
    rows = places + 32 * (files["splits"] == "val")
    np.testing.assert_allclose(files["features"], whole["features"][rows], rtol=1e-4, atol=1e-5)
    assert np.array_equal(files["labels"], whole["labels"][rows])


# -------------------------------------------------------- k nearest neighbours


def brute_force(known, labels, row, k):
    """The class of one row, by sorting Python floats: most votes, then largest summed cosine."""

    def cosine(other):
        products = math.fsum(float(a) * float(b) for a, b in zip(row, other))
        return products / (math.dist(row, row * 0) * math.dist(other, other * 0))

    nearest = sorted(((cosine(o), int(c)) for o, c in zip(known, labels)), reverse=True)[:k]
    votes, sums = Counter(c for _, c in nearest), Counter()
    for similarity, c in nearest:
        sums[c] += similarity
    return max(votes, key=lambda c: (votes[c], sums[c]))


@pytest.mark.parametrize("k", [1, 4, 20, 100])
def test_nearest_classes_against_brute_force(k, monkeypatch):
    """Random rows of different lengths in chunks of 7 of 30; 60 known rows, fewer than k = 100."""
    rng = np.random.default_rng(k)
    known = (rng.normal(size=(60, 6)) * rng.uniform(0.1, 9, (60, 1))).astype(np.float32)
    unknown, labels = rng.normal(size=(30, 6)).astype(np.float32), rng.integers(0, 5, 60)
    monkeypatch.setattr(features, "PAIRS", 7 * 60)
    found = features.nearest_classes(*map(torch.from_numpy, (known, labels, unknown)), k=k)
    assert found.tolist() == [brute_force(known, labels, row, k) for row in unknown]


@pytest.mark.filterwarnings("error")
def test_labels_of_a_file_are_read_only():
    """Labels mapped from a .npy file give no warning of torch's; four images, so all four vote."""
    labels = np.arange(4)
    labels.flags.writeable = False
    layers = np.stack([np.eye(4), np.eye(4)[::-1]], axis=1).astype(np.float32)  # (4, 2, 4)
    straight = np.stack([np.eye(4), np.eye(4)], axis=1).astype(np.float32)
    percent = features.accuracies((straight, labels), (layers, labels), torch.device("cpu"))
    assert percent == [100.0, 0.0]


def test_a_tie_goes_to_the_nearer_class():
    """Two votes each for classes 0 and 2, by hand; class 1 is nearest, but has one vote."""
    similarity = torch.tensor([[0.99, 0.9, 0.8, 0.7, 0.5], [0.9, 0.8, 0.7, 0.6, -0.9]])
    labels = torch.tensor([[1, 2, 0, 0, 2], [0, 2, 2, 0, 0]])
    assert features.majority(similarity, labels, 3).tolist() == [0, 0]
    labels = torch.tensor([[1, 2, 0, 2, 0], [0, 2, 2, 1, 0]])
    assert features.majority(similarity, labels, 3).tolist() == [2, 2]


# -------------------------------------------------------- the command


def test_table_of_every_layer(checkpoint, arrays, tmp_path, capsys):
    """The printed accuracies and the best layer against brute force on the file's own arrays."""
    found = run(checkpoint, arrays, tmp_path / "F.npz")
    text = capsys.readouterr().out
    assert found["splits"].tolist() == ["train"] * 32 + ["val"] * 16
    assert found["labels"].tolist() == [*np.arange(32) % 4, *np.arange(16) % 4]
    assert found["indices"].tolist() == [*range(32), *range(16)]
    assert found["classes"].tolist() == ["0", "1", "2", "3"] and "files" not in found
    config = json.loads(str(found["config"]))
    assert config["image_size"] == 16 and config["checkpoint"] == str(checkpoint)
    assert config["normalise"] == "half" and config["kind"] == "pretraining"
    expected, train = [], found["splits"] == "train"
    for layer in range(config["depth"]):
        values = found["features"][:, layer]
        classes = [brute_force(values[train], found["labels"], row, 20) for row in values[~train]]
        expected.append(100 * np.mean(classes == found["labels"][~train]))
    printed = re.findall(r"^layer +(\d+) +([\d.]+)(  best)?$", text, re.MULTILINE)
    assert [float(value) for _, value, _ in printed] == pytest.approx(expected, abs=0.051)
    assert [bool(mark) for *_, mark in printed].index(True) == np.argmax(expected)
    assert "commonest class everywhere  25.0" in text and "by the 20 nearest of 32 images" in text
    model, _, normalise = features.load_model(checkpoint, "auto")
    parts = {split: sets.open_source(arrays, split) for split in ("train", "val")}
    assert features.knn_accuracies(model, normalise, parts) == pytest.approx(expected)


def test_table_marks_the_first_best_layer_and_compares_with_trains_commonest_class(capsys):
    """Two layers are best; class 1 is the commonest of train, and class 0 of the other images."""
    features.print_table([40.0, 60.0, 60.0], np.array([0, 1, 1]), np.array([0, 0, 0, 1]), "val")
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("best") for line in lines] == [False, False, True, False, False]
    assert lines[-1] == "train's commonest class everywhere  25.0" and "3 nearest of 3" in lines[0]


def test_splits_with_other_classes_are_refused(checkpoint, tmp_path, monkeypatch):
    """The labels of val would mean other classes than those of train."""
    images, labels = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4) % 2
    names = {"train": ["cat", "dog"], "val": ["dog", "cat"]}

    def open_source(data, split, data_dir):
        return sources.Arrays(split, images, labels, classes=names[split])

    monkeypatch.setattr(sets, "open_source", open_source)
    with pytest.raises(ValueError, match="class"):
        run(checkpoint, "pets", tmp_path / "F.npz")
    assert not list(tmp_path.iterdir())


def test_without_labels_there_are_features_only(checkpoint, arrays, tmp_path, capsys):
    """A set without labels, one split, and one class only: a line says why there is no table."""
    bare = run(checkpoint, unlabelled(arrays, tmp_path / "bare.npz"), tmp_path / "F.npz")
    assert "has no class labels: features only" in capsys.readouterr().out
    assert bare["features"].shape[0] == 48 and not {"labels", "classes"} & bare.keys()
    alone = run(checkpoint, arrays, tmp_path / "G.npz", "--split", "train")
    assert "leave out --split" in capsys.readouterr().out
    assert np.array_equal(alone["features"], bare["features"][:32])
    with np.load(arrays) as content:
        one_class = {"train_labels": np.zeros(32, int), "val_labels": np.zeros(16, int)}
        np.savez(tmp_path / "one.npz", **{**content, **one_class})
    run(checkpoint, tmp_path / "one.npz", tmp_path / "H.npz")
    text = capsys.readouterr().out
    assert "of one class: no k-NN" in text and "layer  1" not in text


def test_images_are_evenly_spread(checkpoint, arrays, tmp_path):
    """--images 4 of 32 and of 16: not the first ones; each with its own features and label."""
    whole = run(checkpoint, arrays, tmp_path / "F.npz")
    few = run(checkpoint, arrays, tmp_path / "G.npz", "--images", "4")
    assert few["features"].shape[0] == 8 and few["indices"][3] >= 24 and few["indices"][7] >= 12
    rows = few["indices"] + 32 * (few["splits"] == "val")
    np.testing.assert_allclose(few["features"], whole["features"][rows], rtol=1e-4, atol=1e-5)
    assert np.array_equal(few["labels"], whole["labels"][rows])


def test_refusals(checkpoint, made, arrays, tmp_path, monkeypatch):
    """An existing file, no folder, a tokenizer, a split that is not there, several processes.

    Nothing is left behind, and the existing file is unchanged.
    """
    old = tmp_path / "old.npz"
    old.write_bytes(b"mine")
    with pytest.raises(ValueError, match="old.npz exists already"):
        run(checkpoint, arrays, old)
    with pytest.raises(ValueError, match="there is no folder .*none"):
        run(checkpoint, arrays, tmp_path / "none" / "F.npz")
    with pytest.raises(ValueError, match="F.txt: name a new file that ends in .npz"):
        run(checkpoint, arrays, tmp_path / "F.txt")
    out = tmp_path / "F.npz"
    with pytest.raises(ValueError, match="is a tokenizer checkpoint"):
        run(made / "tokenizer" / "checkpoint.pt", arrays, out)
    with pytest.raises(ValueError, match="test_images.*--split SPLIT"):
        run(checkpoint, arrays, out, "--eval-split", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process, not 2"):
        run(checkpoint, arrays, out)
    assert old.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["old.npz"]


@pytest.mark.parametrize(
    "flags",
    [["--images", "0"], ["--batch-size", "0"], ["--eval-crop", "1.5"], ["--eval-crop", "0"]]
    + [["--split", "val", "--eval-split", "test"], ["--split", "all"], ["--amp", "fp8"]],
)
def test_bad_flags_are_refused_in_one_line(flags, checkpoint, arrays, tmp_path, capsys):
    """Exit status 2 and a line that names the flag."""
    with pytest.raises(SystemExit, match="2"):
        run(checkpoint, arrays, tmp_path / "F.npz", *flags)
    error = capsys.readouterr().err
    assert flags[-2] in error and error.count("\n") == 1


def test_features_that_are_not_finite_are_refused(checkpoint, arrays, tmp_path, monkeypatch):
    """A model whose outputs overflow: an error, and no file."""
    overflow = functools.partial(torch.full_like, fill_value=torch.inf)
    monkeypatch.setattr(features, "layer_means", lambda model, x: overflow(x[:, :, 0]))
    with pytest.raises(ValueError, match="not finite"):
        run(checkpoint, arrays, tmp_path / "F.npz")
    assert not list(tmp_path.iterdir())


def test_room_for_the_features_is_checked_first(checkpoint, arrays, tmp_path, monkeypatch):
    """Four bytes for each of D values of each layer and image."""
    asked = []
    monkeypatch.setattr(features.outputs, "check_room", lambda out, needed: asked.append(needed))
    flags = ["--data", arrays, "--split", "train", "--out", str(tmp_path / "F.npz")]
    features.main([str(checkpoint), *flags, "--device", "cpu"])
    assert asked == [np.load(tmp_path / "F.npz")["features"].nbytes]


def test_a_full_disk_leaves_nothing(checkpoint, arrays, tmp_path, monkeypatch):
    """Writing fails half way: neither F.npz nor the temporary file is there afterwards."""

    def full(file, **content):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="No space"):
        run(checkpoint, arrays, tmp_path / "F.npz")
    assert not list(tmp_path.iterdir())


def test_a_signal_stops_it(checkpoint, arrays, tmp_path, monkeypatch):
    """SIGTERM while features are computed: no file. SIGTERM during k-NN: the file is there."""
    monkeypatch.setattr(signals, "received", [15])
    with pytest.raises(signals.Stopped, match="changes nothing"):
        run(checkpoint, arrays, tmp_path / "F.npz")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(signals, "received", [])
    save = features.save
    monkeypatch.setattr(
        features, "save", lambda *given: (save(*given), signals.received.append(15))
    )
    with pytest.raises(signals.Stopped, match="features are saved"):
        run(checkpoint, arrays, tmp_path / "F.npz")
    assert len(np.load(tmp_path / "F.npz")["features"]) == 48

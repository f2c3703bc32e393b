"""Folders of somebody's own pictures: splits, classes, masks, unusual images, large photographs.

What a program says about a set is a line on stdout; each is checked where it is tested.
"""

import argparse
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from experiments import HERE
from images import batches, convert, folders, labelled, masked, photos, sets, sources, views


@pytest.fixture
def pillow():
    """Pillow's module Image; tests that need it are skipped without Pillow."""
    return pytest.importorskip("PIL.Image")


def touch(folder, *names):
    """Make empty files of these names below a folder, and the folders between."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def opened(folder, split):
    """(names of the files, class names) of a split of a folder."""
    source = sets.open_source(str(folder), split)
    return [path.relative_to(folder).as_posix() for path in source.paths], source.classes


def numbered(count, pattern="{}.jpg"):
    """`count` file names."""
    return [pattern.format(i) for i in range(count)]


# -------------------------------------------------------- splits and classes


def test_images_at_any_depth_without_classes(tmp_path, capsys):
    """Every known suffix counts in any case; dots and other files do not; one line each."""
    names = [f"a/b/{i}{s}" for i, s in enumerate(folders.SUFFIXES)] + ["top.JPG", "c.png/x.TIF"]
    touch(tmp_path, *names, ".hidden.png", ".cache/y.png", "notes.txt", "a/movie.mp4")
    train, classes = opened(tmp_path, "train")
    val, _ = opened(tmp_path, "val")
    assert sorted(train + val) == sorted(names) and classes == [] and len(val) >= 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "2 files are not of a known image format: 1 .mp4, 1 .txt" in said[0]
    assert "12 images without class labels: 1 of them in no subfolder (top.JPG)" in said[1]
    assert f"{len(val)} of 12 images are held out as val" in said[2]


def test_first_level_subfolders_are_classes(tmp_path, capsys):
    """All images in subfolders of the folder itself: classes, at any depth, in both splits."""
    touch(tmp_path, *numbered(60, "cat/{}.png"), *numbered(60, "dog/deep/{}.png"))
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        source = sets.open_source(str(tmp_path), split)
        assert source.classes == ["cat", "dog"]
        for path, label in zip(source.paths, source.labels, strict=True):
            assert path.relative_to(tmp_path).parts[0] == source.classes[label]
    assert "120 images; class = subfolder, 2 of them: cat, dog" in capsys.readouterr().out


def test_a_split_in_capitals_is_not_a_class(tmp_path):
    """Train/ and Val/ would be two classes, and val's pictures would be trained on."""
    touch(tmp_path, "Train/cat/1.png", "Val/cat/2.png")
    with pytest.raises(ValueError, match="Train: rename it to train|Val: rename it to val"):
        sets.open_source(str(tmp_path), "train")


def test_train_without_class_folders_is_unlabelled(tmp_path, capsys):
    """train/ with images beside its subfolders: no labels, which a classifier refuses."""
    touch(tmp_path, "train/1.png", "train/sub/2.png", "val/3.png")
    source = sets.open_source(str(tmp_path), "train")
    assert len(source) == 2 and source.labels is None
    assert "2 images without class labels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no class labels"):
        labelled.LabelledViews(None, source, 0, True)


def test_existing_splits_stay_as_they_are(tmp_path, capsys):
    """train/, val/ and test/ with class folders: all images, in order; a line names the classes."""
    for split in ("train", "validation", "test"):
        touch(tmp_path, f"{split}/b/2.png", f"{split}/b/10.png", f"{split}/a/1.png")
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        names, classes = opened(tmp_path, split)
        assert names == [f"{name}/a/1.png", f"{name}/b/10.png", f"{name}/b/2.png"]
        assert classes == ["a", "b"]
    line = f"{tmp_path}/train: 3 images; class = subfolder, 2 of them: a, b\n"
    assert capsys.readouterr().out == line


def test_held_out_images_depend_on_their_paths_alone(tmp_path):
    """One in twenty of 1000; adding files moves none; with train/ the same ones are held out."""
    touch(tmp_path / "set", *numbered(1000))
    train, val = (set(opened(tmp_path / "set", split)[0]) for split in ("train", "val"))
    assert len(train | val) == 1000 and not train & val and 30 <= len(val) <= 70
    touch(tmp_path / "set", *numbered(1000, "new{}.jpg"))
    more_train, more_val = (set(opened(tmp_path / "set", s)[0]) for s in ("train", "val"))
    assert train < more_train and val < more_val
    touch(tmp_path / "other", *numbered(1000, "train/{}.jpg"))
    assert {f"train/{name}" for name in val} == set(opened(tmp_path / "other", "val")[0])
    assert {f"train/{name}" for name in train} == set(opened(tmp_path / "other", "train")[0])


def test_small_folder_holds_out_one(tmp_path):
    """Ten images of which the hash chooses none: one is held out. A single image is refused."""
    touch(tmp_path, *numbered(10, "{}.png"))
    train, val = (opened(tmp_path, split)[0] for split in ("train", "val"))
    assert len(train) == 9 and len(val) == 1
    touch(tmp_path / "single", "1.png")
    with pytest.raises(ValueError, match="it has one image"):
        sets.open_source(str(tmp_path / "single"), "train")


def test_test_split_needs_a_folder(tmp_path):
    """--eval-split test only where there is a folder; a folder test/ alone is no training set."""
    touch(tmp_path, "train/a/1.png", "train/a/2.png")
    with pytest.raises(sources.NoSplit, match="no split 'test'"):
        sets.open_source(str(tmp_path), "test")
    touch(tmp_path / "odd", "1.png", "test/2.png")
    assert opened(tmp_path / "odd", "test")[0] == ["test/2.png"]
    with pytest.raises(sources.NoSplit, match="put the training images into"):
        sets.open_source(str(tmp_path / "odd"), "train")


def test_what_is_there_instead_of_images_is_said(tmp_path):
    """Nothing left: suffixes are counted and known ones listed. A plain file is no set."""
    touch(tmp_path, "a.txt", "b.txt", "sub/c.mp4", "LICENSE")
    with pytest.raises(ValueError, match=r"found 2 \.txt, .*1 \.mp4.*known: \.jpg \.jpeg"):
        sets.open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match="neither a .npz file nor a folder"):
        sets.open_source(str(tmp_path / "a.txt"), "train")
    touch(tmp_path / "set", "train/cat/1.png", "val/cat/2.png")
    (tmp_path / "set/train/dog").mkdir()
    with pytest.raises(ValueError, match="dog: the class folder is empty"):
        sets.open_source(str(tmp_path / "set"), "train")


def test_other_names_of_splits_are_said(tmp_path):
    """`valid` beside `train` is no silent loss; where there is no split, it may be a class."""
    touch(tmp_path / "a", "train/cat/1.jpg", "train/dog/2.jpg", "valid/cat/3.jpg")
    with pytest.raises(ValueError, match="a/valid: rename it to val, the name of a split"):
        opened(tmp_path / "a", "train")
    touch(tmp_path / "b", "training/cat/1.jpg", "validation/cat/2.jpg")
    with pytest.raises(ValueError, match="b/training: rename it to train"):
        opened(tmp_path / "b", "train")
    touch(tmp_path / "d", "train/1.jpg", "val/2.jpg", "validation/3.jpg")
    with pytest.raises(ValueError, match="d/validation: keep this folder or val, not both"):
        opened(tmp_path / "d", "train")
    touch(tmp_path / "e", "train/1.jpg", "val/2.jpg", "training/3.jpg")
    with pytest.raises(ValueError, match="e/training: merge it into train, the name of a split"):
        opened(tmp_path / "e", "train")
    touch(tmp_path / "c", *numbered(3, "valid/{}.jpg"), *numbered(3, "invalid/{}.jpg"))
    assert opened(tmp_path / "c", "train")[1] == ["invalid", "valid"]
    touch(tmp_path / "f", "Training/cat/1.jpg", "Testing/cat/2.jpg")  # two of them are no classes
    with pytest.raises(ValueError, match="f/Testing: rename it to test, the name of a split"):
        opened(tmp_path / "f", "train")


def test_what_lies_beside_the_splits_is_said(tmp_path, capsys):
    """`train` may be a class beside `bus`: a line names what is left out, once."""
    touch(tmp_path, *numbered(40, "train/{}.jpg"), "bus/1.jpg", "car/2.jpg", "a.JPG", "b.txt")
    touch(tmp_path, "notes/c.txt", ".thumbnails/d.jpg", "locked/e.png")
    (tmp_path / "locked").chmod(0)  # as lost+found is for others than root
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        assert all(name.startswith("train/") for name in opened(tmp_path, split)[0])
    (tmp_path / "locked").chmod(0o755)
    found = re.findall("used are in train; left out: a.JPG, bus, car(.*)", capsys.readouterr().out)
    assert found in ([""], [", locked"])  # for root no folder is locked


def test_links_are_followed_but_not_in_circles(tmp_path):
    """A link to a folder counts as the folder; a link back up ends."""
    touch(tmp_path, "elsewhere/1.png", "set/cat/2.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "dog")
    os.symlink(tmp_path / "set", tmp_path / "set" / "cat" / "up")
    found = [path.name for path in folders.image_files(tmp_path / "set")]
    assert found == ["2.png", "1.png"]


def test_classifier_with_one_class_is_refused(tmp_path):
    """Top-1 would be 100 % of nothing."""
    touch(tmp_path, *numbered(4, "only/{}.png"))
    source = sets.open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"one class \(only\)"):
        labelled.LabelledViews(None, source, len(source.classes), True)


# -------------------------------------------------------- unusual images


def save_all(pillow, folder, arrays):
    """Save {name: pixels} as image files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in arrays.items():
        pillow.fromarray(pixels).save(folder / name)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_range(suffix, pillow, tmp_path, capsys):
    """A 12-bit scan in 16-bit files is divided by 16, in both splits; full range by 256."""
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    save_all(pillow, tmp_path / "set", {f"{i}.{suffix}": ramp // (i + 1) for i in range(6)})
    for split in ("train", "val"):
        source = sets.open_source(str(tmp_path / "set"), split)
        for index, path in enumerate(source.paths):
            expected = ramp // (int(path.stem) + 1) // 16
            assert np.array_equal(source.read([index])[0, ..., 0], expected)
    said = capsys.readouterr().out
    assert (
        said.count("6 in 16-bit grey with values up to 4095, read as 12 bits: divided by 16") == 1
    )
    full = (np.arange(4096) * 16 + 15).astype(np.uint16).reshape(64, 64)
    save_all(pillow, tmp_path / "full", {f"{i}.{suffix}": full for i in range(2)})
    source = sets.open_source(str(tmp_path / "full"), "train")
    assert np.array_equal(source.read([0])[0, ..., 0], full >> 8)


def test_exif_orientation_is_applied(pillow, tmp_path, capsys):
    """A picture stored in each of the eight ways is read upright, and said."""
    turn = pytest.importorskip("PIL.ImageOps").exif_transpose
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 250
    for orientation in range(1, 9):
        exif = pillow.Exif()
        exif[photos.ORIENTATION] = {6: 8, 8: 6}.get(orientation, orientation)
        # Turning an image by the inverse orientation gives how it is stored.
        turned = pillow.fromarray(upright)
        turned.getexif()[photos.ORIENTATION] = exif[photos.ORIENTATION]
        stored = turn(turned)
        exif[photos.ORIENTATION] = orientation
        for suffix in ("jpg", "png"):
            stored.save(tmp_path / f"{orientation}.{suffix}", exif=exif, quality=100)
    for path in tmp_path.iterdir():
        pixels = sources.Files("one", [path]).read([0])[0].astype(int)
        assert pixels.shape == upright.shape and np.abs(pixels - upright).mean() < 3, path.name
    sets.open_source(str(tmp_path), "train")
    assert "7 JPEGs turned upright by their EXIF orientation" in capsys.readouterr().out


def test_damage_after_the_first_frame_of_a_gif(pillow, tmp_path):
    """A file cut anywhere raises nothing; damaged after the first frame, it has only that one."""
    first, second, third = (pillow.new("L", (8, 8), grey) for grey in (0, 100, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second, third])
    whole = (tmp_path / "a.gif").read_bytes()
    said = [photos.survey.__wrapped__((tmp_path / "a.gif",))[1]]
    for size in range(len(whole)):
        (tmp_path / "a.gif").write_bytes(whole[:size])
        said.append(photos.survey.__wrapped__((tmp_path / "a.gif",))[1])
    assert "1 of several frames" in said[0] and said.count("") > len(whole) / 4


def test_floating_point_images_are_refused(pillow, tmp_path):
    """Values from 0 to 1 would all become black."""
    pillow.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="floating-point"):
        sources.Files("one", [tmp_path / "a.tif"]).read([0])


# -------------------------------------------------------- masks


def masked_folder(pillow, folder, values, classes=None, splits=("training", "validation")):
    """A folder of three images and masks for each split; the masks hold `values`."""
    mask = np.resize(np.array(values, np.uint8), (8, 8))
    for split in splits:
        save_all(pillow, folder / "images" / split, {f"{i}.jpg": mask for i in range(3)})
        save_all(pillow, folder / "annotations" / split, {f"{i}.png": mask for i in range(3)})
    if classes is not None:
        (folder / "classes.txt").write_text(classes)
    return str(folder)


def test_own_masks_are_the_lines_of_classes_txt(pillow, tmp_path, capsys):
    """0/1 masks with two names, 255 ignored, three splits; one line names the classes."""
    splits = ("training", "validation", "test")
    folder = masked_folder(pillow, tmp_path, [0, 1, 255], "background\nobject\n", splits)
    for split in sources.SPLITS:
        source = sets.open_source(folder, split)
        assert source.mask_classes == ["background", "object"] and len(source) == 3
        assert set(np.unique(source.read_masks([0]))) == {0, 1, 255}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.endswith("classes.txt, 2 of them: background, object\n")


def test_without_classes_txt_masks_are_ade20k(pillow, tmp_path, capsys):
    """0 is ignored and 1 is class 0, and that is said once."""
    folder = masked_folder(pillow, tmp_path, [0, 1, 2])
    for split in ("train", "val"):
        source = sets.open_source(folder, split)
        source.check()
        assert set(np.unique(source.read_masks([0]))) == {0, 1, 255}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "read as ADE20K's: 0 is ignored" in said


MASKS = {  # case: (values, classes.txt, what the line says)
    "0/1": ([0, 1], None, "classes.txt, one a line (for 0/1 masks: background, object)"),
    "0/255": ([0, 255], None, "write 1 in place of 255"),
    "0/255 with names": ([0, 255], "background\nobject\n", "write 1 in place of 255"),
    "only other": ([0], None, "leave 0 class"),
    "above 150": ([0, 1, 2, 200], None, "mask value 200 is above ADE20K's 150"),
    "too few names": ([0, 1, 2], "background\nobject\n", "mask value 2 is out of range for the 2"),
    "blank line": ([0, 1], "background\n\nobject\n", "line 2 is blank"),
    "blank last line": ([0, 1], "background\nobject\n\n", "line 3 is blank"),
    "name twice": ([0, 1], "cat\ncat\n", "class 'cat' is named twice"),
    "one name": ([0, 1], "object\n", "it names 1 classes; expected 2 to 255"),
}


@pytest.mark.parametrize("classes, value, ignored", [(None, 200, 0), ("one\ntwo\n", 7, 255)])
def test_a_message_about_a_mask_names_its_own_value(classes, value, ignored, pillow, tmp_path):
    """A late mask that was not looked at at the start; in ADE20K's convention 1 is subtracted."""
    folder = masked_folder(pillow, tmp_path, [0, 1, 2] if classes is None else [0, 1], classes)
    source = masked.checked(sets.open_source(folder, "train"))
    late = {"0.png": np.full((8, 8), value, np.uint8)}
    save_all(pillow, tmp_path / "annotations" / "training", late)
    says = f"mask value {value} is out of range for .* classes .{ignored}: ignored"
    with pytest.raises(photos.Unreadable, match=says):
        source.read_pair([0])


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_misread_are_refused(case, pillow, tmp_path):
    """One line says what to write."""
    values, classes, says = MASKS[case]
    folder = masked_folder(pillow, tmp_path, values, classes)
    with pytest.raises(ValueError) as refused:
        sets.open_source(folder, "train").check()
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("values", [[0, 300], [-1, 3]])
def test_mask_values_that_do_not_fit_a_byte_are_refused(values, pillow, tmp_path):
    """Of 16 and 32 bits: they would wrap round to classes. The line has the range found."""
    depth = np.uint16 if min(values) == 0 else np.int32
    pillow.fromarray(np.resize(np.array(values, depth), (4, 4))).save(tmp_path / "a.tif")
    with pytest.raises(photos.Unreadable, match=f"mask values are {values[0]} to {values[1]}: out"):
        photos.read_mask(tmp_path / "a.tif")


def test_an_image_without_a_mask_is_named(tmp_path):
    """Before anything is read."""
    touch(tmp_path, "images/a/1.jpg", "images/a/2.jpg", "annotations/a/1.png")
    with pytest.raises(ValueError, match="annotations/a/2.png is missing: every image needs"):
        sets.open_source(str(tmp_path), "train")


def test_masks_of_0_and_255_in_arrays_are_refused():
    """As in files: every pixel would be of one class or ignored, and the mIoU 100."""
    masks = np.resize(np.array([0, 255], np.uint8), (4, 8, 8))
    source = sources.Arrays("own", np.zeros((4, 8, 8, 3), np.uint8), masks=masks)
    with pytest.raises(ValueError, match="write 1 in place of 255"):
        masked.MaskedImages(argparse.Namespace(seed=0), source, 2, "half", True)


def test_classes_txt_must_be_utf_8(tmp_path):
    """One line that names the file."""
    touch(tmp_path, "images/1.jpg", "annotations/1.png")
    (tmp_path / "classes.txt").write_bytes("Gebäude\nHimmel\n".encode("latin-1"))
    with pytest.raises(ValueError, match="classes.txt is not text in UTF-8"):
        sets.open_source(str(tmp_path), "train")


def test_masks_without_splits_and_in_colour(pillow, tmp_path):
    """images/ and annotations/ without folders of splits are split by hash; RGB masks refused."""
    for part in ("images", "annotations"):
        save_all(pillow, tmp_path / part, {f"{i}.png": np.eye(8, dtype=np.uint8) for i in range(9)})
    (tmp_path / "classes.txt").write_text("background\nobject\n")
    train, val = (sets.open_source(str(tmp_path), split) for split in ("train", "val"))
    assert len(train) == 8 and len(val) == 1
    assert [path.name for path in val.masks] == [path.name for path in val.paths]
    save_all(pillow, tmp_path / "annotations", {"0.png": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(ValueError, match="0.png is a colour image"):
        photos.read_mask(tmp_path / "annotations" / "0.png")


def test_images_of_a_set_with_unusable_masks_can_be_used(pillow, tmp_path):
    """A tokenizer needs no masks: 0/255 masks do not stop it."""
    folder = masked_folder(pillow, tmp_path, [0, 255])
    assert sets.open_source(folder, "train").read([0]).ndim == 4


def test_colour_masks_are_found_at_the_start(pillow, tmp_path):
    """If no mask can be read as class numbers, the first is named before any training."""
    for part, shape in (("images", (8, 8, 3)), ("annotations", (8, 8, 3))):
        pictures = {f"{index}.png": np.zeros(shape, np.uint8) for index in range(9)}
        save_all(pillow, tmp_path / part, pictures)
    (tmp_path / "classes.txt").write_text("background\nobject\n")
    with pytest.raises(ValueError, match="png is a colour image"):
        sets.open_source(str(tmp_path), "train").check()


def test_brighter_16_bit_images_and_transparency_are_said(pillow, tmp_path, capsys):
    """Values above the range of the first images, and colours below transparency: a line each."""
    deep = np.full((8, 8), 60_000, np.uint16)
    save_all(pillow, tmp_path / "deep", {"a.png": deep})
    photos.say_clipped.cache_clear()
    assert (photos.Photo(tmp_path / "deep" / "a.png", depth=12).pixels() == 255).all()
    assert "16-bit images have values above 4095" in capsys.readouterr().out
    twelve = np.full((8, 8), 2048, np.uint16)  # half of the range of 12 bits
    twelve[0] = 4080
    save_all(pillow, tmp_path / "twelve", {"a.png": twelve})
    pixels = sources.Files("one", [tmp_path / "twelve" / "a.png"]).read([0])
    assert pixels[0, 4, 4].tolist() == [128] * 3
    assert "a.png: 16-bit grey with values up to 4080, read as 12 bits" in capsys.readouterr().out
    clear = {f"{index}.png": np.zeros((8, 8, 4), np.uint8) for index in range(3)}
    save_all(pillow, tmp_path / "clear", clear)
    sets.open_source(str(tmp_path / "clear"), "train")
    assert "3 with transparency, which is dropped" in capsys.readouterr().out


# -------------------------------------------------------- samples, workers, conversion


def test_evaluation_is_spread_over_the_set():
    """Ten of 1000 samples: increasing and from all of it; of fewer than the limit, all."""
    assert list(batches.spread(7, 10)) == list(batches.spread(7, 7)) == list(range(7))
    chosen = list(batches.spread(1000, 10))
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and chosen[-1] >= 900
    pixels = np.arange(100, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    crops = views.Crops(sources.Arrays("grey", pixels), [(8, "bicubic")], False)
    assert crops.pictures(4)[0][:, 0, 0, 0].tolist() == [0, 25, 50, 75]
    args = argparse.Namespace(eval_images=5, batch_size=2, accumulate=1, workers=None)
    shares = []
    for rank in (0, 1):
        process = argparse.Namespace(rank=rank, world=2)
        loaded = batches.eval_batches(crops, args, process)
        shares.append([int(image[0, 0, 0]) for (images,) in loaded for image in images])
    assert shares == [[0, 40, 80], [20, 60]]


def test_pictures_of_images_of_different_sizes(pillow, tmp_path):
    """Centre crops of --image-size, from all of the set."""
    shapes = [(20 + i, 30 - i) for i in range(8)]
    for part in ("images/validation", "annotations/validation"):
        arrays = {f"{i}.png": np.full(shape, i, np.uint8) for i, shape in enumerate(shapes)}
        save_all(pillow, tmp_path / part, arrays)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefgh"))
    source = sets.open_source(str(tmp_path), "val")
    args = argparse.Namespace(image_size=16, seed=0, short_side=0, long_side=0)
    images, masks = masked.MaskedImages(args, source, 8, "half", False).pictures(4)
    assert images.shape == (4, 3, 16, 16) and masks[:, 0, 0].tolist() == [0, 2, 4, 6]


def test_workers_auto(pillow, tmp_path, monkeypatch):
    """As many loader processes as a process has cores for files; for arrays none, or a GPU's."""
    save_all(pillow, tmp_path, {f"{i}.png": np.zeros((8, 8), np.uint8) for i in range(4)})
    files = sources.Files("four", sorted(tmp_path.iterdir()))
    arrays = sources.Arrays("four", np.zeros((4, 8, 8), np.uint8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for world, expected, for_gpu in (("1", 6, 4), ("2", 3, 3), ("4", 1, 0), ("8", 1, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        for source, gpu, count in (
            (files, False, expected),
            (files, True, expected),
            (arrays, False, 0),
            (arrays, True, for_gpu),
        ):
            crops = views.Crops(source, [(8, "bicubic")], False)
            assert batches.loader(crops, [[(-1, 0)]], None, gpu).num_workers == count
    assert batches.loader(crops, [[(-1, 0)]], 3).num_workers == 3


def test_conversion_shows_progress_and_does_not_depend_on_workers(pillow, tmp_path, capsys):
    """The files of one process against those of two, byte by byte."""
    rng = np.random.default_rng(0)
    pictures = {f"{i}.png": rng.integers(0, 256, (9, 12, 3), np.uint8) for i in range(40)}
    save_all(pillow, tmp_path / "set", pictures)
    source = sets.open_source(str(tmp_path / "set"), "train")
    written = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        convert.convert_split(source, 6, "train", folder, workers)
        written.append((folder / "train_images.npy").read_bytes())
    assert written[0] == written[1] and f"train: {len(source)} images" in capsys.readouterr().out


def test_converted_photographs_are_their_squares(pillow, tmp_path):
    """Pixels that are a function of their place, and a mask, against the centred square by hand."""
    row, column = np.mgrid[:32, :48]
    pixels = np.stack([5 * column, 7 * row, 0 * row], 2).astype(np.uint8)
    mask = ((row // 3 + column // 5) % 3).astype(np.uint8)
    for split in ("training", "validation"):
        save_all(pillow, tmp_path / "set" / "images" / split, {"a.png": pixels})
        save_all(pillow, tmp_path / "set" / "annotations" / split, {"a.png": mask})
    (tmp_path / "set" / "classes.txt").write_text("background\nzebra\nape\n")
    convert.main([str(tmp_path / "set"), str(tmp_path / "new"), "--size", "8"])
    source = sets.open_source(str(tmp_path / "new"), "train")
    assert source.mask_classes == ["background", "zebra", "ape"] and source.classes == []
    middle = 4 * np.arange(8) + 1.5  # of four pixels
    red, green = np.meshgrid(5 * (8 + middle), 7 * middle)
    found = source.images[0].astype(float)
    assert np.abs(found[1:-1, 1:-1, 0] - red[1:-1, 1:-1]).max() < 2
    assert np.abs(found[1:-1, 1:-1, 1] - green[1:-1, 1:-1]).max() < 2 and not found[..., 2].any()
    assert np.array_equal(source.masks[0], mask[2::4, 10:40:4])
    save_all(pillow, tmp_path / "plain", {"a.png": pixels, "b.png": pixels})  # without masks
    convert.main([str(tmp_path / "plain"), str(tmp_path / "arrays"), "--size", "8"])
    plain = sets.open_source(str(tmp_path / "arrays"), "train")
    assert np.array_equal(plain.images[0], source.images[0])


def test_conversion_of_large_jpegs_is_that_of_their_pixels(large, tmp_path):
    """Decoded at a smaller size against a PNG of the same pixels: at most 2 of 255 apart."""
    made = {}
    for suffix in ("jpg", "png"):
        folder = tmp_path / suffix
        folder.mkdir()
        source = sources.Files(suffix, [large / f"a.{suffix}"])
        convert.convert_split(source, 128, "train", folder, 0)
        made[suffix] = np.load(folder / "train_images.npy").astype(float)
    assert np.abs(made["jpg"] - made["png"]).mean() <= 2
    assert np.abs(made["jpg"][:, :, ::-1] - made["png"]).mean() > 10


def test_conversion_keeps_names_of_classes_that_train_lacks(pillow, tmp_path):
    """A stray picture leaves `train` without labels; val's classes keep their names."""
    grey = np.full((8, 8), 90, np.uint8)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "train"):
        save_all(pillow, tmp_path / "pets" / name, {"a.png": grey})
    convert.main([str(tmp_path / "pets"), str(tmp_path / "new"), "--size", "8"])
    train, val = (sets.open_source(str(tmp_path / "new"), split) for split in ("train", "val"))
    assert train.labels is None and len(train) == 3
    assert val.classes == ["cat", "dog"] and val.labels.tolist() == [0, 1]


@pytest.mark.parametrize("part", ["labels", "masks"])
def test_conversion_of_a_set_whose_test_split_has_more_classes(part, tmp_path):
    """The names are the longest list; a test class that `train` does not have is refused."""
    images = np.zeros((3, 8, 8), np.uint8)
    values = {"labels": np.arange(3), "masks": images + np.arange(3, dtype=np.uint8)[:, None, None]}
    content = {f"{split}_images": images for split in sources.SPLITS}
    content |= {f"val_{part}": values[part] // 2, f"test_{part}": values[part]}
    np.savez(tmp_path / "set.npz", **content)
    convert.main([str(tmp_path / "set.npz"), str(tmp_path / "new"), "--size", "8"])
    test = sets.open_source(str(tmp_path / "new"), "test")
    assert (test.classes if part == "labels" else test.mask_classes) == ["0", "1", "2"]
    np.savez(tmp_path / "set.npz", **content | {f"train_{part}": values[part] // 2})
    with pytest.raises(ValueError, match="test: class '2' is not one of those trained on: '0', '"):
        convert.main([str(tmp_path / "set.npz"), str(tmp_path / "another"), "--size", "8"])


def test_conversion_refuses_what_a_run_would(pillow, tmp_path):
    """A class that is missing in val, and a mask turned against its image; nothing is left."""
    pets, scenes, new = tmp_path / "pets", tmp_path / "scenes", tmp_path / "new"
    grey = np.full((8, 12), 90, np.uint8)
    for name in ("train/cat", "train/dog", "val/dog"):
        save_all(pillow, pets / name, {"a.png": grey})
    with pytest.raises(ValueError, match="'dog' has another number than in training"):
        convert.main([str(pets), str(new), "--size", "8"])
    folder = masked_folder(pillow, scenes, [0, 1], "one\ntwo\n")
    save_all(pillow, scenes / "images" / "training", {"1.jpg": grey})
    with pytest.raises(ValueError, match="the mask is 8 pixels wide and 8 high, its image 12 w"):
        convert.main([folder, str(new), "--size", "8"])
    (pets / "val" / "cat").mkdir()
    (pets / "val" / "cat" / "b.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "images.convert", pets, new, "--size", "8"]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    line = f"{pets}/val/cat/b.png is not a readable image: "
    assert ended.returncode == 2 and ended.stderr.startswith(f"convert.py: error: {line}")
    assert ended.stderr.endswith(": repair or remove it\n") and ended.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pets", "scenes"}


def test_progress_of_a_conversion(capsys, monkeypatch):
    """Elsewhere than on a terminal: a line every five seconds, and the result."""
    clock = types.SimpleNamespace(monotonic=iter([0.0, 1.0, 6.0, 7.0, 8.0]).__next__)
    monkeypatch.setattr(convert, "time", clock)
    progress = convert.Progress("train", 60)
    for done in (16, 32, 48, 60):
        progress.show(done)
    said = capsys.readouterr().out.splitlines()
    assert said == ["train: 32/60  5 images/s  5s left", "train: 60 images"]


# -------------------------------------------------------- large photographs


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A JPEG of 1999 x 1203 pixels with detail of every size, and the same one as a PNG."""
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("large")
    rng, total = np.random.default_rng(0), np.zeros((1203, 1999, 3), np.float32)
    for size in (7, 20, 60, 200, 600):
        noise = pillow.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
        total += np.asarray(noise.resize((1999, 1203), pillow.Resampling.BICUBIC), np.float32) / 5
    image = pillow.fromarray(((total - 128) * 1.5 + 128).clip(0, 255).astype(np.uint8))
    image.save(folder / "a.jpg", quality=95)
    pillow.open(folder / "a.jpg").save(folder / "a.png", compress_level=1)
    return folder


@pytest.mark.parametrize("train", [True, False], ids=["crops", "evaluation"])
def test_large_jpegs_are_reduced_with_the_same_crops(train, large, monkeypatch):
    """Views of reduced decodings against those of the whole image: at most 2 of 255 apart.

    Draws crops and flips of all kinds; the PNG has the JPEG's pixels and is never reduced.
    """
    scales, whole_pixels = [], photos.Photo.pixels

    def pixels(photo, scale=1):
        scales.append(scale)
        return whole_pixels(photo, scale)

    monkeypatch.setattr(photos.Photo, "pixels", pixels)
    sizes = [(64, "bicubic"), (32, "lanczos")]
    made = {}
    for suffix in ("jpg", "png"):
        source = sources.Files(suffix, [large / f"a.{suffix}"])
        crops = views.Crops(source, sizes, train, 1, 0.05, True, centre=0.875)
        made[suffix] = crops[[(epoch, 0) for epoch in range(12 if train else 1)]]
    half = len(scales) // 2
    assert max(scales[:half]) == 8 and set(scales[half:]) == {1}
    for reduced, whole in zip(made["jpg"], made["png"]):
        difference = (reduced.float() - whole.float()).abs().mean((1, 2, 3))
        assert difference.max() <= 2, difference
        assert (reduced.flip(3).float() - whole.float()).abs().mean() > 10  # others are far
    if not train:  # the largest view is 64 of a crop of 0.875 of the short side
        assert crops.spare((-1, 0), 730, 900) == 730 / 73


def test_small_views_of_small_jpegs_are_as_before(pillow, tmp_path):
    """Below a megapixel nothing is reduced, whatever the view."""
    pillow.new("RGB", (1000, 1000)).save(tmp_path / "a.jpg")
    photo = photos.Photo(tmp_path / "a.jpg")
    assert photo.size == (1000, 1000) and photo.scale(100) == 1


def test_reduced_photographs_are_upright(pillow, large, tmp_path, capsys):
    """A turned photograph is reduced only where that leaves whole pixels; the size is upright."""
    exif = pillow.Exif()
    exif[photos.ORIENTATION] = 6
    for name, size in {"odd": (1999, 1203), "even": (1600, 1200)}.items():
        image = pillow.open(large / "a.jpg").resize(size)
        image.save(tmp_path / f"{name}.jpg", exif=exif, quality=95)
    odd, even = (photos.Photo(tmp_path / f"{name}.jpg") for name in ("odd", "even"))
    assert odd.size == (1999, 1203) and odd.scale(100) == 1
    assert even.size == (1600, 1200) and even.scale(100) == 8 and even.scale(9) == 4
    small = even.pixels(4)
    whole = photos.Photo(tmp_path / "even.jpg").pixels()
    assert small.shape == (1, 400, 300, 3)
    blocks = whole.reshape(400, 4, 300, 4, 3).mean((1, 3))
    assert np.abs(blocks - small[0]).mean() <= 2
    sets.open_source(str(tmp_path), "train")
    assert "2 JPEGs of over a megapixel, decoded at 1/2, 1/4 or 1/8" in capsys.readouterr().out


def test_part_of_an_image_resized(pillow):
    """resize_part against crop_resize for a box of whole pixels, and a shifted box between."""
    image = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    part = photos.resize_part(image, (4.0, 6.0, 24.0, 32.0), (12, 12), "bicubic")
    whole = views.crop_resize(image, [(4, 6, 24, 32)], 12, "bicubic")
    assert (part.int() - whole.int()).abs().max() <= 1
    ramp = torch.arange(50, dtype=torch.uint8).expand(1, 3, 40, 50) * 4
    shifted = photos.resize_part(ramp, (4.25, 6.5, 24.5, 32.0), (12, 16), "lanczos")
    centres = (6.5 + (torch.arange(16) + 0.5) * 2 - 0.5) * 4
    assert shifted.shape == (1, 3, 12, 16)
    assert (shifted[0, 0, 5, 2:-2] - centres[2:-2]).abs().max() <= 1

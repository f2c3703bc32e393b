"""Sources, named sets and downloads, views, augmentation, batches and conversion."""

import errno
import functools
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import os
import random
import re
import resource
import struct
import sys
import tarfile
import threading
import types
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune_seg
from images import arrays as array_files
from images import (
    augment,
    batches,
    convert,
    downloads,
    masked,
    named,
    sets,
    shapes,
    sources,
    views,
)
from plumbing import command_line, memory

# -------------------------------------------------------- views and batches


def test_resizing_is_pillows():
    """crop_resize with either filter against Pillow's crop and resize, up to rounding."""
    image = pytest.importorskip("PIL.Image")
    x = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    boxes = [(0, 0, 20, 30), (3, 5, 14, 17)]
    for kernel in ("bicubic", "lanczos"):
        ours = views.crop_resize(x, boxes, 8, kernel)
        for pixels, (top, left, height, width), resized in zip(x, boxes, ours):
            whole = image.fromarray(pixels.permute(1, 2, 0).numpy())
            part = whole.crop((left, top, left + width, top + height))
            theirs = np.asarray(part.resize((8, 8), getattr(image, kernel.upper())), np.int16)
            assert np.abs(resized.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_both_views_show_the_same_crop():
    """The large view, shrunk, against the small one: equal up to the filters' difference."""
    sizes = [(32, "bicubic"), (16, "lanczos")]
    crops = views.Crops(
        shapes.shapes("val"), sizes, True, seed=3, min_crop=0.4, flip=True, jitter=0.4
    )
    large, small = (v.float() for v in crops[[(0, i) for i in range(40)]])
    shrunk = F.interpolate(large, (16, 16), mode="bicubic", antialias=True)
    assert (shrunk - small).abs().mean() < 2.5
    assert (shrunk.flip(0) - small).abs().mean() > 25  # other images are far


def segmenter_arguments(*flags):
    """finetune_seg's arguments with these flags."""
    parser = command_line.recipe_parser("", finetune_seg.RECIPES)
    return command_line.parse_recipe(parser, finetune_seg.RECIPES, ["--out", "unused", *flags])


def test_samples_depend_on_seed_epoch_and_index_alone(arrays):
    """A sample drawn in a batch of eight against the same one alone; others differ in one each."""
    source = sets.open_source(arrays, "train")
    crops = views.Crops(source, [(16, "bicubic")], True, 7, 0.3, True, 0.4)
    (together,) = crops[[(2, i) for i in range(8)]]
    (alone,) = crops[[(2, 5)]]
    assert torch.equal(together[5:6], alone)
    seeds = views.Crops(source, [(16, "bicubic")], True, 8, 0.3, True, 0.4)
    draws = [crops.draw((2, 5), 16, 16), crops.draw((3, 5), 16, 16), crops.draw((2, 6), 16, 16)]
    assert len({str(draw) for draw in [*draws, seeds.draw((2, 5), 16, 16)]}) == 4


def test_samples_with_masks_depend_on_seed_epoch_and_index_alone():
    """One image twice: its crops differ with any of the three, and not otherwise."""
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 40), np.uint8).repeat(2, axis=0)
    source = sources.Arrays("twice", image, masks=image // 64)
    crops = []
    for seed, *key in ((5, 2, 0), (5, 2, 0), (5, 3, 0), (5, 2, 1), (6, 2, 0)):
        args = segmenter_arguments("--image-size", "16", "--seed", str(seed))
        crops.append(masked.MaskedImages(args, source, 4, "half", True)[[tuple(key)]][0])
    assert torch.equal(crops[0], crops[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(crops[1:], 2))


def test_segmentation_crops_keep_image_and_mask_together():
    """Masks equal to the red channel stay equal to it after scaling by 1, crop and flip."""
    images = np.random.default_rng(0).integers(0, 4, (6, 20, 24, 3), np.uint8)
    source = sources.Arrays("six", images, masks=images[..., 0].copy())
    args = segmenter_arguments("--image-size", "16")
    keys = [(epoch, index) for epoch in range(5) for index in range(6)]
    crops, masks = masked.MaskedImages(args, source, 4, "half", True)[keys]
    assert crops.shape == (30, 3, 16, 16) and torch.equal(crops[:, 0], masks)


def test_batches_are_a_function_of_the_step():
    """Keys of a run resumed at step 7, and of two processes together, against one whole run's."""
    whole = list(batches.StepBatches(20, 4, 0, 1, seed=5, first=0, last=12))
    assert list(batches.StepBatches(20, 4, 0, 1, seed=5, first=7, last=12)) == whole[7:]
    halves = (batches.StepBatches(20, 2, rank, 2, seed=5, first=0, last=12) for rank in (0, 1))
    assert [a + b for a, b in zip(*halves)] == whole
    assert sorted(index for batch in whole[:5] for _, index in batch) == list(range(20))


# -------------------------------------------------------- augmentation


def test_erasing_erases_one_rectangle():
    """The changed pixels against the box around them: one rectangle of 1 % to 40 %."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    augment.erase(image, random.Random(0))
    changed = (image != 0).any(0)
    rows, columns = changed.any(1), changed.any(0)
    box = rows.sum() * columns.sum()
    assert 0.01 * 32 * 32 < box < 0.4 * 32 * 32 and changed.sum() > 0.99 * box


# -------------------------------------------------------- named sets


def test_shapes_are_deterministic_and_labelled():
    """Shapes drawn again in a smaller batch are equal; the large shape in front is the class."""
    uniforms = np.stack([np.random.default_rng((0, i)).random(40) for i in range(64)])
    images, labels, masks = shapes.draw_shapes(uniforms, 32)
    again, _, _ = shapes.draw_shapes(uniforms[10:20], 32)
    assert np.array_equal(images[10:20], again)
    assert images.dtype == np.uint8 and set(labels) == set(range(8))
    for label, mask in zip(labels, masks):
        assert np.bincount(mask[mask > 0]).argmax() == label + 1


def test_fashion_files_are_checked(tmp_path, monkeypatch):
    """The published content is read from any gzip file.

    Other content, half a file and a missing folder are refused.
    """
    name = "t10k-labels-idx1-ubyte"
    content = bytes(8) + bytes(range(10))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="checksum differs"):
        named.read_idx(name, str(tmp_path))
    monkeypatch.setitem(named.FASHION_SHA256, name, hashlib.sha256(content).hexdigest())
    assert named.read_idx(name, str(tmp_path)).tolist() == list(range(10))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content)[:-6])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        named.read_idx(name, str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        named.read_idx(name, str(tmp_path / "none"))


def test_cifar_records(tmp_path, monkeypatch):
    """A record made by hand: the class, then 1024 red, green and blue bytes each, row by row."""
    red_row = np.repeat(np.arange(32, dtype=np.uint8), 32)
    record = np.concatenate([[7], red_row, np.full(1024, 100), np.full(1024, 200)]).astype(np.uint8)
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        entry.size = len(record)
        archive.addfile(entry, io.BytesIO(record.tobytes()))
    with pytest.raises(ValueError, match="checksum differs"):
        named.cifar10("test", str(tmp_path))
    monkeypatch.setattr(named, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    source = named.cifar10("test", str(tmp_path))
    assert source.labels.tolist() == [7] and source.images[0, 5, 9].tolist() == [5, 100, 200]


def test_cifar_splits(tmp_path, monkeypatch):
    """Five training files in order, of which the last 5,000 records are val."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number in range(1, 6):
            records = np.zeros((10_000, 3073), np.uint8)
            records[:, 0], records[:, 1] = number, np.arange(10_000) // 100
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{number}.bin")
            entry.size = records.nbytes
            archive.addfile(entry, io.BytesIO(records.tobytes()))
    monkeypatch.setattr(named, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    train, val = (named.cifar10(split, str(tmp_path)) for split in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [0, *[10_000] * 4, 5_000]
    assert np.bincount(val.labels).tolist() == [0] * 5 + [5_000]
    assert train.images[-1, 0, 0, 0] == 49 and val.images[0, 0, 0, 0] == 50


# -------------------------------------------------------- downloads


def check(path):
    """The check of downloads.fetch in the next two tests."""
    if path.read_bytes() != b"the right content":
        raise ValueError(f"{path}: checksum differs")


def test_download_that_fails_keeps_nothing(tmp_path):
    """A missing file and wrong content leave an empty part; the right content only itself.

    The part stays, because another process may have opened it and wait for the lock.
    """
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="cannot download"):
        downloads.fetch("a.gz", (tmp_path / "none.gz").as_uri(), [cache], check)
    (tmp_path / "some.gz").write_bytes(b"other content")
    url = (tmp_path / "some.gz").as_uri()
    with pytest.raises(ValueError, match="checksum differs"):
        downloads.fetch("a.gz", url, [cache], check)
    assert [(path.name, path.stat().st_size) for path in cache.iterdir()] == [("a.part", 0)]
    (tmp_path / "some.gz").write_bytes(b"the right content")
    assert downloads.fetch("a.gz", url, [cache], check) == cache / "a.gz"
    assert [path.name for path in cache.iterdir()] == ["a.gz"]


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without ranges"])
def test_download_that_breaks_off_is_resumed(ranges, tmp_path):
    """A server breaks off after 5 of 17 bytes; the second call asks for the rest only."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = 5 if ranges and self.headers["Range"] == "bytes=5-" else 0
            content = b"the right content"[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:5] if len(asked) == 1 else content)

        def log_message(self, *ignored):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.gz"
        fetch = functools.partial(downloads.fetch, "a.gz", url, [tmp_path], check)
        with pytest.raises(ValueError, match="it broke off after 5 of 17 bytes"):
            fetch()
        assert not (tmp_path / "a.gz").exists()
        assert fetch().read_bytes() == b"the right content"
        server.shutdown()
    assert asked == [None, "bytes=5-"]


@pytest.mark.parametrize("error", [http.client.IncompleteRead(b""), http.client.BadStatusLine("x")])
def test_a_reply_that_is_not_http_is_one_error(error, tmp_path, monkeypatch):
    """A chunk that breaks off, or no reply of HTTP at all: neither is an OSError."""

    def download(url, file):
        raise error

    monkeypatch.setattr(downloads, "download", download)
    with pytest.raises(ValueError, match="cannot download .*: download it yourself"):
        downloads.fetch("a.gz", "http://127.0.0.1/a.gz", [tmp_path], check)


def test_a_file_system_without_locks_and_a_user_without_home(tmp_path, monkeypatch):
    """The first is no reason not to download; the second asks for --data-dir."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "some.gz").write_bytes(b"the right content")
    url, cache = (tmp_path / "some.gz").as_uri(), tmp_path / "cache"
    assert downloads.fetch("a.gz", url, [cache], check) == cache / "a.gz"

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(downloads.Path, "home", nobody)
    with pytest.raises(ValueError, match="no home folder .*: give --data-dir"):
        downloads.data_folders(None)


# -------------------------------------------------------- arrays


def test_grey_becomes_three_equal_channels():
    """Grey arrays (n, H, W) are read as (n, H, W, 3) with equal channels."""
    source = sources.Arrays("grey", np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4))
    images = source.read([0, 1])
    assert images.shape == (2, 4, 4, 3) and (images[..., 0] == images[..., 2]).all()


@pytest.mark.parametrize("destination", ["set.npz", "folder"])
def test_convert_once(arrays, tmp_path, destination):
    """python -m images.convert: images, labels and masks of the result; a folder is mapped.

    At their own size they are those of the data set, of every split.
    """
    convert.main([arrays, str(tmp_path / destination), "--size", "8"])
    source = sets.open_source(str(tmp_path / destination), "train")
    assert source.images.shape == (32, 8, 8, 3)
    assert len(source.labels) == 32 and source.masks.shape == (32, 8, 8)
    assert isinstance(source.images, np.memmap) == (destination == "folder")
    convert.main([arrays, str(tmp_path / f"whole {destination}"), "--size", "16"])
    for split in ("train", "val"):
        old = sets.open_source(arrays, split)
        new = sets.open_source(str(tmp_path / f"whole {destination}"), split)
        for name in ("images", "labels", "masks"):
            assert np.array_equal(getattr(old, name), getattr(new, name))
        assert [old.classes, old.mask_classes] == [new.classes, new.mask_classes]


def test_class_names_that_are_not_utf8(tmp_path, capsys):
    """As file systems allow: such names go through arrays and are printed; damage is refused."""
    names, images = ["caf\udce9", "dog"], np.zeros((2, 4, 4), np.uint8)
    arrays_of = {"train_images": images, "train_labels": np.arange(2), "classes": np.array(names)}
    np.savez(tmp_path / "a.npz", **arrays_of)
    assert sets.open_source(str(tmp_path / "a.npz"), "train").classes == names
    np.savez(tmp_path / "b.npz", **arrays_of | {"classes": np.array(["caf\ud800", "dog"])})
    with pytest.raises(ValueError, match="classes.npy is not a whole array file"):
        sets.open_source(str(tmp_path / "b.npz"), "train")
    with command_line.one_line_errors():
        print(names[0])
    assert capsys.readouterr().out == "caf\\udce9\n"


def test_a_class_name_twice_in_the_held_out_set():
    """As arrays allow, beyond the classes trained on: one line."""
    held_out = sources.Arrays("set val", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="set val: class 'b' has another number than in training"):
        sources.check_names(["a", "b", "b"], ["a", "b"], held_out)


def test_full_memory_is_not_blamed_on_the_file():
    """The error of numpy's allocator goes on as it is."""
    with pytest.raises(MemoryError), array_files.whole("a.npz"):
        np.empty(2**55)


@pytest.mark.parametrize("destination", ["set.npz", "folder"])
def test_conversion_on_a_full_disk_leaves_nothing(arrays, tmp_path, destination, monkeypatch):
    """No file may have more than 4 kB; and a disk that says how little room it has."""
    wanted = [arrays, str(tmp_path / "new" / destination), "--size", "8"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write .* \(File too large\)"):
            convert.main(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    room = types.SimpleNamespace(total=2**40, free=1000)
    monkeypatch.setattr("plumbing.outputs.shutil.disk_usage", lambda path: room)
    with pytest.raises(ValueError, match="make room"):
        convert.main(wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, errno.EOPNOTSUPP])
def test_a_new_array_has_all_its_bytes_on_the_disk(error, tmp_path, monkeypatch):
    """Header and pixels are reserved, also where the file system cannot; none is a hole."""
    fallocate = os.posix_fallocate
    asked = []

    def reserve(file, start, size):
        asked.append(size)
        if error:
            raise OSError(error, "not here")
        fallocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    convert.make_array(tmp_path / "new.npy", (9, 8, 8, 3))
    size = len(npy(np.zeros((9, 8, 8, 3), np.uint8)))
    assert (tmp_path / "new.npy").stat().st_size == size and asked == [size]
    assert not np.load(tmp_path / "new.npy").any()


def test_an_error_of_the_source_is_not_called_one_of_the_disk(arrays, tmp_path, monkeypatch):
    """It names the set that is converted."""

    def read(self, indices):
        raise OSError("Stale file handle")

    monkeypatch.setattr(sources.Arrays, "read", read)
    with pytest.raises(ValueError, match="train cannot be converted: Stale file handle"):
        convert.main([arrays, str(tmp_path / "new"), "--size", "8"])
    assert list(tmp_path.iterdir()) == []


def npy(array=None, header=None, data=b""):
    """The bytes of a .npy file: of an array, or with a header and data that need not agree."""
    file = io.BytesIO()
    if header is None:
        np.save(file, array)
    else:
        text = header if isinstance(header, str) else str(header)
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data)
    return file.getvalue()


PIXELS = np.arange(9 * 8 * 8, dtype=np.uint8).reshape(9, 8, 8)


def of_shape(shape, dtype="|u1"):
    """Data of PIXELS with a header that says `shape`."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    return npy(header=header, data=PIXELS.tobytes())


DAMAGED = {  # case: (name of the array, what it holds, what the message says)
    "empty": ("train_images", b"", "not a whole array file"),
    "no header": ("train_images", bytes(600), "not a whole array file"),
    "half a header": ("train_images", npy(PIXELS)[:60], "not a whole array file"),
    "nested header": ("train_images", npy(header="(" * 900), "not a whole array file"),
    "half": ("train_images", npy(PIXELS)[:300], "172 bytes follow"),
    "one byte more": ("train_images", npy(PIXELS) + b"x", "577 bytes follow"),
    "other format": ("train_images", b"\x93NUMPY\x09" + npy(PIXELS)[7:], "not a whole array file"),
    "negative": ("train_images", of_shape((-9, 8, 8)), "says uint8 (-9, 8, 8)"),
    "boolean": ("train_images", of_shape((True, 8, 72)), "says uint8 (True, 8, 72)"),
    "2^63": ("train_images", of_shape((2**63, 8, 8)), "9223372036854775808, 8, 8), and 576"),
    "480 GB": ("train_images", of_shape((7_500_000_000, 8, 8)), "and 576 bytes follow"),
    "no height": ("train_images", npy(PIXELS[:, :0]), "no images: uint8 (9, 0, 8)"),
    "objects": ("train_images", npy(np.array([{}], object)), "holds Python objects"),
    "fields": ("train_images", npy(np.zeros(9, "u1,f4")), "images are [('f0', 'u1')"),
    "large labels": ("train_labels", npy(np.arange(9) + 2**33), "at most 65,536 classes"),
    "largest label": ("train_labels", npy(np.full(9, 2**64 - 1)), "at most 65,536 classes"),
    "durations": ("train_labels", npy(np.arange(9).astype("m8[s]")), "labels are timedelta64"),
    "one class name": ("classes", npy(np.array("cat")), "a list of at most 65,536 strings"),
    "nested names": ("classes", npy(np.array([["a"], ["b"]])), "a list of at most 65,536 strings"),
    "no text": ("classes", npy(np.array([2**31], "<u4").view("<U1")), "not a whole array file"),
    "mask classes": ("mask_classes", npy(np.arange(256)), "a list of at most 255 strings"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_array_is_refused_by_its_header(case, tmp_path):
    """As a file and in an archive: ValueError in one line that names what is wrong."""
    name, content, says = DAMAGED[case]
    (tmp_path / "set").mkdir()
    whole = {"train_images": npy(PIXELS), "train_labels": npy(np.arange(9))}
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for key, value in {**whole, name: content}.items():
            archive.writestr(f"{key}.npy", value)
            (tmp_path / "set" / f"{key}.npy").write_bytes(value)
    for data in ("set", "set.npz"):
        with pytest.raises(ValueError) as refused:
            sets.open_source(str(tmp_path / data), "train")
        line = str(refused.value)
        assert says in line and str(tmp_path / data) in line and "\n" not in line


def field(signature, offset, form, value):
    """A function that changes a field of every header with this signature in an archive."""

    def change(content):
        for found in re.finditer(re.escape(signature), bytes(content)):
            struct.pack_into(form, content, found.start() + offset, value)

    return change


def spoil(content):
    """Overwrite a part of the first member's compressed bytes."""
    content[200:300:3] = bytes(34)


ARCHIVES = {  # case: (compression, function that damages the archive)
    "cut off": (zipfile.ZIP_STORED, lambda content: content.__delitem__(slice(2000, None))),
    "stored": (zipfile.ZIP_STORED, lambda content: content.__setitem__(400, content[400] ^ 16)),
    "deflated": (zipfile.ZIP_DEFLATED, spoil),
    "lzma": (zipfile.ZIP_LZMA, spoil),
    "encrypted": (zipfile.ZIP_STORED, field(b"PK\1\2", 8, "<H", 1)),
    "unknown method": (zipfile.ZIP_STORED, field(b"PK\1\2", 10, "<H", 99)),
    "unknown version": (zipfile.ZIP_STORED, field(b"PK\1\2", 6, "<H", 99)),
    "other size": (zipfile.ZIP_DEFLATED, field(b"PK\1\2", 24, "<I", 2**32 - 2)),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_archive_is_refused_in_one_line(case, tmp_path):
    """Whatever zipfile makes of it: ValueError that names the file."""
    method, damage = ARCHIVES[case]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 20), np.uint8)
    with zipfile.ZipFile(tmp_path / "set.npz", "w", method) as archive:
        archive.writestr("train_images.npy", npy(pixels))
    content = bytearray((tmp_path / "set.npz").read_bytes())
    damage(content)
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match="set.npz") as refused:
        sets.open_source(str(tmp_path / "set.npz"), "train")
    assert "\n" not in str(refused.value)


def test_arrays_larger_than_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """An archive whose arrays take more than there is; the same arrays in a folder are mapped."""
    np.savez(tmp_path / "set.npz", train_images=PIXELS)
    np.save(tmp_path / "train_images.npy", PIXELS)
    monkeypatch.setattr(memory, "available", lambda device: 500)
    with pytest.raises(ValueError, match="take 576 bytes, and there are 500 bytes of memory"):
        sets.open_source(str(tmp_path / "set.npz"), "train")
    assert len(sets.open_source(str(tmp_path), "train")) == 9


def test_a_pipe_and_a_directory_are_no_arrays(tmp_path):
    """Refused instead of waited for."""
    os.mkfifo(tmp_path / "train_images.npy")
    (tmp_path / "val_images.npy").mkdir()
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="is not a regular file"):
            sets.open_source(str(tmp_path), split)


def test_unusual_arrays_are_read_right(tmp_path):
    """Fortran order, big-endian and MedMNIST's labels, names as bytes; 256 classes without names.

    Mask value 255 is no class, label 255 is one.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (256, 6, 5, 3), np.uint8)
    labels, masks = np.arange(256)[:, None], pixels[..., 0] | 128
    usual = dict(train_images=pixels, train_labels=labels.astype("u1"), train_masks=masks)
    unusual = dict(train_images=np.asfortranarray(pixels), train_labels=labels.astype(">i8"))
    np.savez_compressed(tmp_path / "usual.npz", **usual)
    np.savez(tmp_path / "unusual.npz", classes=np.array([b"ant", b"b\xc3\xa9e"]), **unusual)
    usual, unusual = (
        sets.open_source(str(tmp_path / f"{name}.npz"), "train") for name in ("usual", "unusual")
    )
    for source in (usual, unusual):
        assert np.array_equal(source.read([3, 200]), pixels[[3, 200]])
        assert source.labels.tolist() == list(range(256)) and source.labels.dtype == np.int64
    assert unusual.classes == ["ant", "b\u00e9e"]
    assert len(usual.classes) == 256 and usual.mask_classes[-1] == "254"


# -------------------------------------------------------- image files


def test_image_folder(tmp_path):
    """ImageNet's layout: classes, labels and views; unreadable files are skipped in training."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.full((10 + i, 14, 3), 100 * i, np.uint8)
                image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    source = sets.open_source(str(tmp_path), "train")
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1, 1]
    crops = views.Crops(source, [(8, "bicubic")], True)
    assert crops[[(0, i) for i in range(4)]][0].shape == (4, 3, 8, 8)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"not an image")
    assert crops[[(0, 0)]][0].shape == (1, 3, 8, 8)
    assert crops.problems() == {"skipped": 1}
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    crops = views.Crops(source, [(8, "bicubic")], True, labels=True)
    images, labels = crops[[(0, 1)]]  # the next readable file is the first dog
    assert labels.tolist() == [1] and (images == 0).all()
    with pytest.raises(ValueError, match="0.png is not a readable image"):
        views.Crops(source, [(8, "bicubic")], False)[[(-1, 0)]]


def test_ade_folder(tmp_path):
    """ADE20K's layout: annotation value 0 is ignored, 1 is class 0."""
    image = pytest.importorskip("PIL.Image")
    for part in ("images/training", "annotations/training", "images/validation"):
        (tmp_path / part).mkdir(parents=True)
    image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images/training/a.jpg")
    annotation = np.array([[0, 1], [150, 7]], np.uint8).repeat(2, 0).repeat(2, 1)
    image.fromarray(annotation).save(tmp_path / "annotations/training/a.png")
    source = sets.open_source(str(tmp_path), "train")
    assert len(source.mask_classes) == 150
    assert source.read_masks([0])[0, ::2, ::2].tolist() == [[sources.IGNORE, 0], [149, 6]]


def png(width, height, rows=b""):
    """A PNG that claims this size, whatever pixels it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    return content


BROKEN = {  # file name: function that makes it at its path
    "zero.png": lambda path: path.touch(),
    "text.jpg": lambda path: path.write_text("not an image"),
    "bomb.png": lambda path: path.write_bytes(png(10_000, 10_000)),  # 10**8 pixels in a few bytes
    "huge.png": lambda path: path.write_bytes(png(60_000, 60_000)),  # more than Pillow itself opens
    "short.png": lambda path: path.write_bytes(png(8, 8, random.Random(0).randbytes(200))[:-100]),
    "garbage.png": lambda path: path.write_bytes(png(8, 8, b"too few rows")),
    "loop.png": lambda path: path.symlink_to(path),
    "gone.png": lambda path: path.symlink_to("nowhere.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_is_skipped_counted_and_named(name, tmp_path, capsys):
    """In training the next one takes its place; in evaluation it is an error in one line."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    (tmp_path / "val").mkdir()
    BROKEN[name](folder / name)
    image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / "zz.png")
    source = sets.open_source(str(tmp_path), "train")
    crops = views.Crops(source, [(8, "bicubic")], True)
    assert (crops[[(0, 0)]][0] == 90).all() and crops.problems() == {"skipped": 1}
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1
    with pytest.raises(ValueError, match=f"{name} is not a readable image"):
        views.Crops(source, [(8, "bicubic")], False)[[(-1, 0)]]


def test_many_broken_images_are_named_up_to_a_limit(tmp_path, capsys):
    """The first NAMED are named, the others counted; if all are broken the error names one."""
    for index in range(views.NAMED + 9):
        (tmp_path / f"{index:03}.png").write_bytes(b"no image")
    source = sets.open_source(str(tmp_path), "train")
    pytest.importorskip("PIL")
    crops = views.Crops(source, [(8, "bicubic")], True)
    with pytest.raises(ValueError, match="cannot be read or used; the last: .*png is not a read"):
        crops[[(0, 0)]]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == views.NAMED + 1 and said[-1] == "skipped: from now on they are only counted"
    assert crops.problems() == {"skipped": len(source)}


def test_unusual_images_are_read_right(tmp_path):
    """Pixels read against those written, up to 3 of 255.

    Palette, transparency, CMYK, grey, 16 bits, an animation, and a JPEG named .png.
    """
    image = pytest.importorskip("PIL.Image")
    plain = image.new("RGB", (8, 8), (200, 100, 50))
    plain.quantize(4).save(tmp_path / "palette.png")
    plain.convert("RGBA").save(tmp_path / "alpha.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    plain.save(tmp_path / "jpeg.png", format="jpeg", quality=100)
    black = image.new("RGB", (8, 8))
    plain.save(tmp_path / "moves.webp", save_all=True, append_images=[black], lossless=True)
    image.fromarray(np.full((8, 8), 120, np.uint8)).save(tmp_path / "grey.png")
    image.fromarray(np.full((8, 8), 120 * 257, np.uint16)).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        pixels = sources.Files("one", [path]).read([0])
        expected = (120, 120, 120) if path.name in ("grey.png", "deep.png") else (200, 100, 50)
        assert pixels.shape == (1, 8, 8, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels[0, 4, 4].astype(int) - expected).max() <= 3, path.name


def test_missing_pillow_is_said_clearly(tmp_path, monkeypatch):
    """Without Pillow, reading an image file says what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        sources.Files("one", [tmp_path / "a.png"]).read([0])


# -------------------------------------------------------- files from outside


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    """PostScript named photo.jpg: a stub named gs, first in PATH, is not started; one line."""
    pytest.importorskip("PIL.Image")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("photo.jpg", "photo.png"):
        (tmp_path / name).write_text(script)
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            sources.Files("one", [tmp_path / name]).read([0])
    assert not (tmp_path / "started").exists()


def test_a_pipe_is_no_image(tmp_path):
    """A FIFO named x.png is refused instead of waited for."""
    pytest.importorskip("PIL.Image")
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png is not a readable image: it is not a regular file"):
        sources.Files("one", [tmp_path / "x.png"]).read([0])


def test_a_defect_in_a_view_is_not_an_unreadable_file(monkeypatch, capsys):
    """Its ValueError ends training: nothing is skipped."""
    monkeypatch.setattr(views, "crop_resize", lambda *arguments: np.stack([]))
    source = sources.Arrays("some", np.zeros((3, 8, 8), np.uint8))
    crops = views.Crops(source, [(4, "bicubic")], train=True)
    with pytest.raises(ValueError, match="need at least one array"):
        crops[[(0, 0)]]
    assert crops.problems() == {} and capsys.readouterr().err == ""


def test_an_unreadable_file_in_a_loader_process_is_named_in_one_line(tmp_path, capsys):
    """In evaluation, without the traceback and the name of the exception."""
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_text("no image")
    source = sources.Files("one", [tmp_path / "a.png"])
    crops = views.Crops(source, [(4, "bicubic")], train=False)
    with pytest.raises(SystemExit) as stopped, command_line.one_line_errors():
        list(batches.loader(crops, [[(-1, 0)]], 1))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f": error: {tmp_path}/a.png is not a readable image: cannot identify" in error


@pytest.mark.parametrize("mask", ["colour", "size", "range"])
def test_bad_mask_is_skipped_counted_and_named(mask, tmp_path, capsys):
    """In training the next pair takes its place; in evaluation it is an error in one line."""
    image = pytest.importorskip("PIL.Image")
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("ground\nobject\n")
    for name in ("a", "b"):
        picture = np.full((8, 8, 3), 90, np.uint8)
        image.fromarray(picture).save(tmp_path / "images" / "training" / f"{name}.png")
        good = np.eye(8, dtype=np.uint8)
        image.fromarray(good).save(tmp_path / "annotations" / "training" / f"{name}.png")
    bad = {"colour": np.zeros((8, 8, 3)), "size": np.zeros((8, 9)), "range": np.full((8, 8), 7)}
    bad = image.fromarray(bad[mask].astype(np.uint8))
    bad.save(tmp_path / "annotations" / "training" / "a.png")
    args = segmenter_arguments("--image-size", "8")
    files = [tmp_path / "images" / "training" / f"{name}.png" for name in "ab"]
    masks = [tmp_path / "annotations" / "training" / f"{name}.png" for name in "ab"]
    source = sources.Files("two", files, masks=masks, mask_classes=["ground", "object"])
    train = masked.MaskedImages(args, source, 2, "half", True)
    _, found = train[[(0, 0)]]
    assert found.sum() == 8 and train.problems() == {"skipped": 1}
    said = capsys.readouterr().err
    assert "annotations/training/a.png" in said and said.count("\n") == 1
    held_out = masked.MaskedImages(args, source, 2, "half", False)
    with pytest.raises(ValueError, match="annotations/training/a.png"):
        held_out[[(-1, 0)]]


def test_held_out_masks_may_lack_the_last_class(tmp_path):
    """The held-out set has the training set's names, so that its IoU is reported if predicted."""
    images, masks = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "two.npz", val_images=images, val_masks=masks)
    args = segmenter_arguments("--image-size", "8", "--data", str(tmp_path / "two.npz"))
    held_out = masked.open_held_out(args, "half", ["0", "1"])
    assert held_out.source.mask_classes == ["0", "1"]


def test_bad_mask_of_an_array_is_skipped_counted_and_named(capsys):
    """A wrong mask that the look at some of the masks misses; one that it sees is refused."""
    masks = np.zeros((200, 8, 8), np.uint8)
    masks[1] = 7
    args = segmenter_arguments("--image-size", "8")
    source = sources.Arrays("many", np.zeros((200, 8, 8), np.uint8), masks=masks)
    train = masked.MaskedImages(args, source, 2, "half", True)
    _, found = train[[(0, 1)]]
    assert found.sum() == 0 and train.problems() == {"skipped": 1}
    assert "many, mask 1: mask value 7 is out of range" in capsys.readouterr().err
    with pytest.raises(ValueError, match="many, mask 1: mask value 7"):
        masked.MaskedImages(args, source, 2, "half", False)[[(-1, 1)]]
    part = sources.subset(source, np.array([1, 5, 7]))
    train.source = sources.subset(part, np.array([0, 1]))  # the first is number 1 of the set
    train[[(0, 0)]]
    assert "many, mask 1: mask value 7" in capsys.readouterr().err
    masks[100] = 7
    with pytest.raises(ValueError, match="mask value 7"):
        masked.MaskedImages(args, source, 2, "half", True)

"""Files that programs write: whole or not there, and never over somebody else's."""

import contextlib
import os
import resource
import types

import numpy as np
import pytest
import torch

from experiments import attention, report
from images import sets
from plumbing import outputs, pictures, published, weights


@contextlib.contextmanager
def full_disk():
    """Within it no file may have more than a kilobyte; nor may that of pytest's own output."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


STATE = {"weight": torch.zeros(1000)}


def noise_picture(path):
    """Write a picture that is larger than the full disk."""
    pictures.write_png(path, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


@pytest.mark.parametrize("name", ["new.pth", "new.safetensors", "new.png"])
def test_what_does_not_fit_leaves_nothing(name, tmp_path):
    """Exports and a picture on a full disk: one line, and no file."""
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match=f"cannot write .*{name}") as refused, full_disk():
        if name.endswith("png"):
            noise_picture(tmp_path / name)
        else:
            weights.write(tmp_path / name, STATE)
    assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_a_picture_that_does_not_fit_leaves_the_one_before(tmp_path):
    """A run draws its pictures again and again."""
    noise_picture(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="a.png"), full_disk():
        noise_picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    """With and without links on the file system; a folder too."""

    def no_link(old, new):
        raise PermissionError("no links here")

    path = tmp_path / "new"
    for link in (os.link, no_link):
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(ValueError, match="new exists already"), outputs.new(path) as temporary:
            temporary.write_text("ours")
            path.write_text("theirs")
        assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
        path.unlink()
    with outputs.new(path) as temporary:  # without links
        temporary.write_text("ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="new exists already"), outputs.new(path) as temporary:
        temporary.mkdir()
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_programs_keep_a_file_that_they_did_not_make(made, arrays, tmp_path):
    """A checkpoint given as --out, a dangling link, and a report.html from elsewhere."""
    checkpoint = made / "beit" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to("nowhere")
    for out in (checkpoint, link):
        with pytest.raises(ValueError, match="exists already"):
            attention.main([str(checkpoint), "0", "--data", arrays, "--out", str(out)])
        with pytest.raises(ValueError, match="exists already"):
            published.main([str(checkpoint), str(out)])
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="is not a page of this program"):
        report.check_ours(tmp_path / "report.html")
    assert checkpoint.read_bytes() == before and link.is_symlink()


def test_nothing_is_written_inside_the_data(tmp_path, monkeypatch):
    """The folder itself, below it, and through a link; beside it is fine."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    for out in ("photos", "photos/a/b", "link/a", "photos/../photos/a"):
        with pytest.raises(ValueError, match="lies inside the data photos"):
            outputs.check_outside(out, "photos")
    for out, data in (("photos-2", "photos"), ("a", "photos"), ("photos/a", "shapes"), ("a", None)):
        outputs.check_outside(out, data)
    with pytest.raises(ValueError, match="lies inside the data photos"):
        outputs.check_new("photos/F.npz", "photos", (".npz",))
    (tmp_path / "shapes").mkdir()  # which --data shapes does not mean
    outputs.check_new("shapes/F.npz", "shapes", (".npz",))


def test_named_sets_are_those_that_open():
    """The names that come before folders, against the message that lists them."""
    with pytest.raises(ValueError) as refused:
        sets.open_source("nowhere", "train")
    assert str(refused.value).endswith(f"not one of {', '.join(outputs.NAMED)}")


def test_room_is_checked_before_the_work(tmp_path):
    """A disk has room for a byte, and none for 10**18."""
    outputs.check_room(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="needs 1,000,000,000 GB, and its disk has"):
        outputs.check_room(tmp_path / "a", 10**18)
    sizes = {900: "900 bytes", 12_345_678: "12.3 MB", 123_456_789: "123 MB", 3.25e9: "3.25 GB"}
    assert {size: outputs.in_words(size) for size in sizes} == sizes


def test_weights_are_written_only_if_there_is_room(tmp_path, monkeypatch):
    """Before anything is written, from the size of the tensors; a disk of 0 bytes says nothing."""
    disk = types.SimpleNamespace(total=10**6, free=3999)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(ValueError, match="needs 4,000 bytes, and its disk has 3,999 bytes"):
        weights.write(tmp_path / "a.pt", STATE)
    assert not list(tmp_path.iterdir())
    disk.total = disk.free = 0
    weights.write(tmp_path / "a.pt", STATE)

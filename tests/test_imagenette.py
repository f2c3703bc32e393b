"""--data imagenette with a small archive in place of the published one."""

import hashlib
import http.server
import multiprocessing
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from images import imagenette, sets, sources

FORK = multiprocessing.get_context("fork")
TRAIN, VAL = 4, 2  # photographs of each class


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the archive's, with train/ and val/ and WordNet ids; a colour for each class."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("imagenette") / imagenette.PUBLISHED
    for label, id_ in enumerate(imagenette.CLASSES):
        for split, count in (("train", TRAIN), ("val", VAL)):
            (root / split / id_).mkdir(parents=True)
            for i in range(count):
                photo = image.new("RGB", (24 + i, 20), (25 * label, 128, 200))
                photo.save(root / split / id_ / f"{id_}_{split}{i}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    """The folder as an archive, with a link out of it and a file in a foreign place."""
    path = tmp_path_factory.mktemp("published") / f"{imagenette.PUBLISHED}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, imagenette.PUBLISHED)
        link = tarfile.TarInfo(f"{imagenette.PUBLISHED}/train/n01440764/link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("../n01440764/outside.JPEG"))
        tar.addfile(tarfile.TarInfo(f"{imagenette.PUBLISHED}/train/n01440764/run.py"))
    return path


@pytest.fixture
def bucket(archive, monkeypatch):
    """A local server in place of the bucket, which breaks off once; yields the ranges asked for."""
    content, asked = archive.read_bytes(), []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : 500 if len(asked) == 1 else None])

        def log_message(self, *ignored):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(imagenette, "URL", url)
        monkeypatch.setattr(imagenette, "MD5", hashlib.md5(content).hexdigest())
        yield asked
        server.shutdown()


def split_names(root):
    """{split: names of its photographs without suffix}, and their classes as a check."""
    found = {split: imagenette.photographs(root, split) for split in sources.SPLITS}
    return {s: [(p.stem, c) for p, c in zip(f.paths, f.labels)] for s, f in found.items()}


def test_download_broken_off_resumed_and_decoded(bucket, tmp_path):
    """The second call asks for the rest only; arrays and archive are all that stays."""
    with pytest.raises(ValueError, match="it broke off after 500 of"):
        sets.open_source("imagenette", "test", str(tmp_path))
    source = sets.open_source("imagenette", "test", str(tmp_path))
    assert bucket == [None, "bytes=500-"]
    assert {path.name for path in tmp_path.iterdir()} == {"imagenette-128", "imagenette2-160.tgz"}
    assert isinstance(source.images, np.memmap) and source.images.shape == (VAL * 10, 128, 128, 3)
    assert source.classes == list(imagenette.CLASSES.values())
    colours = source.images[:, 64, 64, 0].astype(int)  # 25 for each class
    assert np.abs(colours - 25 * source.labels).max() < 8
    train, val = (sets.open_source("imagenette", part, str(tmp_path)) for part in ("train", "val"))
    assert len(train) + len(val) == TRAIN * 10 and len(val) > 0


def test_wrong_checksum_is_refused(bucket, tmp_path, monkeypatch):
    """An archive that is not the published one, found or downloaded: its name, and no arrays."""
    monkeypatch.setattr(imagenette, "MD5", "0" * 32)
    bucket.append("as if it had broken off before")
    with pytest.raises(ValueError, match="imagenette2-160.tgz gave another file than"):
        sets.open_source("imagenette", "train", str(tmp_path))
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert left == {"imagenette-128.lock": 0, "imagenette2-160.part": 0}
    (tmp_path / "imagenette2-160.tgz").write_bytes(b"other content")
    with pytest.raises(ValueError, match="imagenette2-160.tgz is not the published file"):
        sets.open_source("imagenette", "train", str(tmp_path))


def test_only_photographs_leave_the_archive(archive, tmp_path, monkeypatch):
    """Links, other files and other places are left in it."""
    monkeypatch.setattr(imagenette, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    root = imagenette.unpack([archive.parent], tmp_path / "photographs")
    found = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert len(found) == (TRAIN + VAL) * 10 and {path.suffix for path in found} == {".JPEG"}
    assert all(root in path.parents for path in found)


def test_class_names_give_the_same_splits(folder, tmp_path):
    """Folders under class names, files as .jpg, and --data-dir itself: the same order and split."""
    for path in folder.glob("*/*/*.JPEG"):
        name = imagenette.CLASSES[path.parent.name].replace(" ", "_")
        copy = tmp_path / path.parent.parent.name / name / f"{path.stem}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    root = imagenette.unpacked(tmp_path)
    assert root == tmp_path and imagenette.unpacked(folder.parent) == folder
    names = split_names(folder)
    assert split_names(root) == names
    assert not set(names["train"]) & set(names["val"]) and len(names["test"]) == VAL * 10
    (root / "val" / "chain_saw").rename(root / "val" / "chainsaw")
    with pytest.raises(ValueError, match="'chain saw' has no folder, neither n03000684 nor chain_"):
        imagenette.photographs(root, "test")


def test_splits_of_photographs_by_their_names(folder):
    """Those of train whose names are held out are val; each class in the order of its names."""
    found = {split: imagenette.photographs(folder, split) for split in sources.SPLITS}
    for split, files in found.items():
        names = [(label, path.stem) for label, path in zip(files.labels, files.paths)]
        assert names == sorted(names)
        if split != "test":
            assert {imagenette.held_out(path) for path in files.paths} == {split == "val"}


def test_a_tenth_of_train_is_held_out():
    """10,000 names of the published form: 900 to 1,100 of them are val."""
    names = (f"n01440764_{i}.JPEG" for i in range(10_000))
    assert 900 < sum(imagenette.held_out(Path(name)) for name in names) < 1100


def test_one_of_two_processes_decodes(folder, tmp_path, capfd):
    """Two that ask at once: one decodes, the other waits, both read the same arrays."""
    (tmp_path / imagenette.PUBLISHED).symlink_to(folder)

    def ask():
        source = sets.open_source("imagenette", "test", str(tmp_path))
        assert len(source) == VAL * 10 and source.images[-1].any()

    both = [FORK.Process(target=ask) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert capfd.readouterr().out.count("decoding the photographs") == 1


def test_damaged_arrays_are_said(folder, tmp_path):
    """A file cut off later: one line that names the folder."""
    (tmp_path / imagenette.PUBLISHED).symlink_to(folder)
    sets.open_source("imagenette", "test", str(tmp_path))
    with open(tmp_path / "imagenette-128" / "test_images.npy", "r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match="imagenette-128 is damaged"):
        sets.open_source("imagenette", "test", str(tmp_path))

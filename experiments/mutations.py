"""The fuzzer's damage, one function for each kind: (bench, rng, folder) -> fuzz_bench.Case."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import torch

from experiments.fuzz_bench import (
    ACCEPT, BASE, DATA, EITHER, LOOK, NO_STAGES, REFUSE, STAGES, Case, as_list, convert, load,
    npy, save_dalle, short, train,
)  # fmt: skip

# -------------------------------------------------------- flags

NO_NUMBERS = ["nan", "inf", "-inf", "-1", "", "abc", "1e999", "1,5", "--1", "½", "0x10", "-0.5"]
NO_NUMBERS += ["1 2", "\udcff", "NaN", "9" * 5000, "None", "True", "-1e-9", "１２３e", "1\n2"]
NO_INTEGERS = ["1.5", "1e3", "1e300", str(10**30), str(-(2**63)), "2.0", "nan"]
SMALL = ["0", "1", "2", "3", "5", "8", "16", "+2", " 4", "1_0", "٣", "-0", "007"]
SMALL_FLOATS = [*SMALL, "0.5", "0.25", "1.0", "1e-9", "1e-300", "5e-324", "-0.0", ".5", "1."]
INTEGERS = {"--seed", "--accumulate", "--workers", "--benchmark", "--log-every", "--layer"}
FLOATS = {"--layer-scale"}
PATHS = {"--data", "--out", "--tokenizer", "--init", "--data-dir"}
NO_FILES = ["", "nowhere", "x" * 300, "x" * 5000, "\udcff", "a\nb", "/dev/null", "/dev/zero"]
NO_FILES += ["/proc/self/mem", "~", "dalle:", "%s{0}", "good/tiny.npz/x", "a\t", "-", "é\u202e"]
NO_FOLDERS = ["", "/dev/null", "/proc/1/x", "good/tiny.npz", "good", "good/tiny.npz/x", "x" * 300]
NO_WORDS = ["", " ", "x", "None", "x" * 5000, "\udcff", "half ", "HALF", "a\nb", "0", "-"]
ABSURD = {  # further values that are certainly nonsense
    "--image-size": ["0", "1000000", str(2**31), str(2**63)],
    "--token-size": ["0", "1000000", str(2**31), str(2**63)],
    "--vocab-size": ["0", str(10**12), str(2**63)],
    "--hidden": ["0", str(10**7), str(2**63)],
    "--code-dim": ["0", str(10**12)],
    "--decoder-dim": ["0", str(10**8), str(10**12)],
    "--groups": ["0", "1", "5", "1000"],
    "--blocks-per-group": ["0", "500000000"],
    "--batch-size": ["0", "9", str(10**9), str(2**63)],
    "--accumulate": ["0", "3", str(10**9)],
    "--workers": ["1000000", "auto1"],
    "--steps": ["0", str(10**18)],
    "--epochs": ["0", "1e-9", "1e300"],
    "--warmup-epochs": ["1", "9", "1e300"],
    "--warmup-steps": ["1", str(10**18)],
    "--eval-images": ["0"],
    "--save-every": ["0"],
    "--log-every": ["0"],
    "--benchmark": ["0"],
    "--min-crop": ["0", "1.5"],
    "--eval-crop": ["0", "1.5", "1e-9"],
    "--min-scale": ["0", "3"],
    "--max-scale": ["0", "0.5", "1e300"],
    "--tau": ["0"],
    "--layer-decay": ["0", "1.5"],
    "--jitter": ["1.5"],
    "--erasing": ["1.5"],
    "--smoothing": ["1.5"],
    "--drop-path": ["1", "1.5"],
    "--beta2": ["1", "1.5"],
    "--ema": ["1", "1.5"],
    "--mask-ratio": ["0", "1.5"],
    "--min-block": ["0", "3", "1000000"],
    "--mixup": ["1e308"],
    "--cutmix": ["1e308"],
    "--seed": [str(2**63), str(2**64)],
    "--device": ["meta", "cpu:x", "cuda:99"],
    "--labels-per-class": ["9", "1000000000"],
    "--train-images": ["9", "1000000000"],
}
CLASH = [  # script, flags that contradict each other
    ("beit", {"--mask-ratio": "0.93", "--min-block": "3"}),
    ("beit", {"--target": "pixels"}),
    ("beit", {"--masking": "none"}),
    ("beit", {"--benchmark": "1", "--resume": None}),
    ("beit", {"--token-size": "8"}),
    ("beit", {"--eval": None}),
    ("seg", {"--min-scale": "3", "--max-scale": "1"}),
    ("seg", {"--eval": None, "--init": "random"}),
    ("seg", {"--eval": None, "--init": "good/seg/checkpoint.pt", "--lr": "1"}),
    ("seg", {"--init": "good/tokenizer/checkpoint.pt"}),
    ("cls", {"--eval": None, "--init": "good/cls/checkpoint.pt", "--lr": "1"}),
    ("cls", {"--layer": "2"}),
    ("cls", {"--linear-probe": None, "--layer": "99"}),
    ("cls", {"--eval": None, "--init": "good/beit/checkpoint.pt"}),
    ("tokenizer", {"--tau": "0", "--quantizer": "gumbel"}),
    ("tokenizer", {"--groups": "4", "--image-size": "12"}),
]


def flag_mutation(rng, flag, metavar, folder):
    """(a value for the flag, what is certain about the command with it)."""
    absurd = ABSURD.get(flag, [])
    if absurd and rng.random() < 0.3:
        return rng.choice(absurd), REFUSE
    if flag in PATHS:
        if flag == "--out":
            if rng.random() < 0.7:
                return rng.choice(NO_FOLDERS), REFUSE
            return f"{folder}/out{rng.choice(['é', ' ', '/a/b', 'x' * 200])}", EITHER
        return rng.choice(NO_FILES), EITHER if flag == "--data-dir" else REFUSE
    integer, number = metavar == "INT" or flag in INTEGERS, metavar == "FLOAT" or flag in FLOATS
    if not (integer or number):
        return rng.choice(NO_WORDS), REFUSE
    if rng.random() < 0.7:
        pool = NO_INTEGERS if integer else ["1e300"]
        value = rng.choice([rng.choice(NO_NUMBERS), rng.choice(pool)])
        return value, EITHER if (flag, value) == ("--clip", "1e300") else REFUSE
    if flag in ("--workers", "--benchmark"):  # more would take long
        return rng.choice(["0", "1"]), EITHER
    return rng.choice(SMALL if integer else SMALL_FLOATS), EITHER


def flags(bench, rng, folder):
    """Boundary values, huge and tiny ones, other types, contradictions, odd command lines."""
    stage = rng.choice(STAGES)
    roll = rng.random()
    if roll < 0.1:
        stage, changes = rng.choice(CLASH)
        return train(stage, folder, f"contradiction {as_list(changes)}", REFUSE, changes)
    if roll < 0.2:
        return odd_command_line(rng, stage, folder)
    known, expect, changes = bench.help[stage], EITHER, {}
    for flag, metavar in rng.sample(sorted(known.items()), rng.choice([1, 1, 1, 2, 3])):
        if not metavar:  # a switch
            changes[flag] = None
            continue
        changes[flag], certain = flag_mutation(rng, flag, metavar, folder)
        expect = REFUSE if certain == REFUSE else expect
    kept = {f: v for f, v in short(stage, {"--out": f"{folder}/out"}).items() if f not in changes}
    words = as_list(kept)
    for flag, value in changes.items():
        words.append(flag if value is None else f"{flag}={value}")
    return Case(stage, words, f"flags {list(changes)}", expect, f"{folder}/out")


def odd_command_line(rng, stage, folder):
    """A command line with the right flags in an odd way, or with a wrong word."""
    case = train(stage, folder, "", ACCEPT)
    pairs = [case.flags[i : i + 2] for i in range(0, len(case.flags), 2)]
    no_data = {"--data": "", "--recipe": "base"}
    edits = {
        "in another order": (ACCEPT, [w for p in rng.sample(pairs, len(pairs)) for w in p]),
        "with =": (ACCEPT, ["=".join(pair) for pair in pairs]),
        "twice": (ACCEPT, case.flags + case.flags),
        "switch on and off": (ACCEPT, [*case.flags, "--flip", "--no-flip"]),
        "unknown flag": (REFUSE, [*case.flags, "--learning-rate", "1"]),
        "abbreviated": (REFUSE, [*case.flags, "--save-ev", "1"]),
        "value missing": (REFUSE, [*case.flags, "--seed"]),
        "extra word": (REFUSE, [*case.flags, rng.choice(["x", "", "@x", "-", "é\udcff", "a\nb"])]),
        "unprintable flag": (REFUSE, [*case.flags, rng.choice(["--\udcff", "--a\nb", "--é=\t"])]),
        "no --data": (REFUSE, train(stage, folder, "", REFUSE, no_data).flags),
    }
    what = rng.choice(sorted(edits))
    case.expect, case.flags = edits[what]
    case.what = f"command line: {what}"
    return case


# -------------------------------------------------------- arrays

SHAPES = """(-8, 8, 8, 3)|(9223372036854775808, 8, 8, 3)|(10000000000, 8, 8, 3)|(8.0, 8, 8, 3)|()|(
('8',)|(8, 0, 8, 3)|(8, 8, 0, 3)|(0, 8, 8, 3)|(8, 8, 8, 4)|(8, 8, 8, 3, 1)|8|None|(9, 8, 8, 3)|[8]
(8, 8, 8, 0)|(2147483648, 2147483648, 8, 3)|(8, 8, 8, -3)|(1e3, 8, 8, 3)|(8, 8, 8, 3|(True, 8, 8, 3)
(4, -8, -8, 6)|(-1,)|((8, 8), (8, 3))""".replace("\n", "|").split("|")
TYPES = """'|O'  '<f4'  '<f8'  '>u2'  '|S1'  '|b1'  '|i1'  [('a','|u1')]  '|V1'  '<M8[s]'  'x'  3
None 'u1,u1' '<U1'  '|S0'  '|V0'  ('|u1',(3,))  '<c16'  [('a','|u1'),('a','|u1')]  ''
'|u1|'""".split()
WRONG_ARRAYS = {  # member: arrays that it cannot be
    "train_images": lambda: [
        np.zeros((8, 8, 8, 3), np.float32), np.zeros((8, 8, 8, 3), bool), np.zeros((8, 192), "u1"),
        np.full((8, 8, 8, 3), "a"), np.full((8, 8, 8, 3), None), np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((8, 0, 8, 3), np.uint8), np.zeros((8, 8, 0, 3), np.uint8), np.array(3),
        np.zeros((8, 3, 8, 8), np.uint8), np.zeros(8, [("a", "u1"), ("b", "f4")]),
    ],
    "train_labels": lambda: [
        np.arange(8) % 2 + 2**33, np.arange(8) - 4, np.arange(8) / 2, np.arange(7) % 2,
        np.zeros((8, 2), int), np.full(8, "a"), np.full(8, None), np.full(8, 2**63, np.uint64),
        np.array(0), np.zeros(0, int), np.zeros(8, bool), np.full(8, 1 + 1j), np.full(8, 10**6),
        np.full(8, -(2**63)), np.zeros(8, "M8[s]"),
    ],
    "val_labels": lambda: [np.arange(4) + 2, np.arange(4) - 1, np.arange(3) % 2, np.zeros(4)],
    "train_masks": lambda: [
        np.zeros((8, 8), np.uint8), np.zeros((7, 8, 8), np.uint8), np.zeros((8, 8, 8), np.int32),
        np.zeros((8, 8, 8, 3), np.uint8), np.zeros((8, 8, 8), bool), np.full((8, 8, 8), "a"),
        np.zeros((8, 4, 4), np.uint8),
    ],
    "val_masks": lambda: [np.full((4, 8, 8), 9, np.uint8), np.zeros((4, 8, 7), np.uint8)],
    "classes": lambda: [
        np.array("a"), np.array(["a", "b"], object), np.array([["a", "b"]]), np.array(["a"]),
        np.array([0.5, np.nan]), np.array(3), np.array([None, None]),
    ],
    "mask_classes": lambda: [np.array("a"), np.array(["a", None], object), np.array(["a"])],
}  # fmt: skip
READER = {"train_images": "tokenizer", "train_labels": "cls", "val_labels": "cls", "classes": "cls"}


def header(rng):
    """(bytes of a .npy file of zeros with an odd header, what is odd, expectation)."""
    descr, order, shape, version, length = "'|u1'", "False", "(8, 8, 8, 3)", b"\1\0", None
    what = rng.choice(["shape", "shape", "type", "type", "order", "version", "length", "text"])
    expect = REFUSE
    if what == "shape":
        shape = rng.choice(SHAPES)
    elif what == "type":
        descr = rng.choice(TYPES)
    elif what == "order":
        order = rng.choice(["True", "1", "None", "'x'", "[]"])
        expect = EITHER
    elif what == "version":
        version, expect = rng.choice([b"\2\0", b"\3\0", b"\0\0", b"\x09\x09", b"\1\1"]), EITHER
    elif what == "length":
        length = rng.choice([0, 1, 10, 60, 65535])
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if what == "text":
        text = rng.choice(
            ["", "{", "[]", "1", "(" * 3000, "{'descr': __import__('os').mkdir('ran')}", "\0" * 99]
            + ["{'shape': (8, 8, 8, 3)}", "é" * 50, "{" * 200, "-" * 5000 + "1", "'" * 1001]
        )
    raw = text.encode()
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    size = (len(raw) if length is None else length) % 65536
    content = b"\x93NUMPY" + version + size.to_bytes(2, "little") + raw + bytes(1536)
    shown = {"shape": shape, "type": descr, "order": order, "text": text[:60]}.get(what, "")
    return content, f"header's {what} {shown}", expect


def archive(members, method=zipfile.ZIP_STORED):
    """A .npz file as bytes. members: {name: bytes of a .npy file}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as zipped:
        for name, content in members.items():
            zipped.writestr(f"{name}.npy", content)
    return bytearray(file.getvalue())


def patch_entry(content, offset, value, size):
    """Overwrite a field of a zip archive's first member; offset: in its local entry."""
    local, central = content.index(b"PK\3\4"), content.index(b"PK\1\2")
    for place in (local + offset, central + offset + 2):
        content[place : place + size] = value.to_bytes(size, "little")
    return content


def zip_damage(rng, members):
    """(bytes of a damaged .npz file, what, expectation)."""
    whole = archive(members)
    damage = {
        "encrypted": (REFUSE, lambda: patch_entry(whole, 6, 1, 2)),
        "method 99": (REFUSE, lambda: patch_entry(whole, 8, rng.choice([1, 6, 9, 93, 99]), 2)),
        "stored called deflated": (REFUSE, lambda: patch_entry(whole, 8, 8, 2)),
        "stored called bz2": (REFUSE, lambda: patch_entry(whole, 8, 12, 2)),
        "stored called lzma": (REFUSE, lambda: patch_entry(whole, 8, 14, 2)),
        "wrong checksum": (REFUSE, lambda: patch_entry(whole, 14, 123, 4)),
        "huge size": (EITHER, lambda: patch_entry(whole, 22, 2**32 - 2, 4)),
        "huge compressed size": (EITHER, lambda: patch_entry(whole, 18, 2**32 - 2, 4)),
        "size 0": (REFUSE, lambda: patch_entry(whole, 22, 0, 4)),
        "truncated": (REFUSE, lambda: whole[: -rng.randint(1, len(whole))]),
        "empty": (REFUSE, lambda: b""),
        "text": (REFUSE, lambda: b"PK not a zip" * 9),
        "garbage in front": (EITHER, lambda: b"x" * rng.randint(1, 99) + whole),
        "garbage behind": (EITHER, lambda: whole + b"x" * rng.randint(1, 99)),
        "deflated": (ACCEPT, lambda: archive(members, zipfile.ZIP_DEFLATED)),
        "bz2": (EITHER, lambda: archive(members, zipfile.ZIP_BZIP2)),
        "lzma": (EITHER, lambda: archive(members, zipfile.ZIP_LZMA)),
        "bytes flipped": (EITHER, lambda: flip(rng, whole)),
        "deflated, bytes flipped": (
            EITHER, lambda: flip(rng, archive(members, zipfile.ZIP_DEFLATED))),
        "lzma, bytes flipped": (EITHER, lambda: flip(rng, archive(members, zipfile.ZIP_LZMA))),
        "pickle": (REFUSE, lambda: pickle.dumps([1])),
        "single array": (REFUSE, lambda: npy(np.zeros(3))),
    }  # fmt: skip
    what = rng.choice(sorted(damage))
    expect, make = damage[what]
    return bytes(make()), what, expect


def flip(rng, content, most=8):
    """Bytes with a few of them changed; one time in four also cut or repeated somewhere."""
    content = bytearray(content)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(content))
        content[place] = rng.choice([content[place] ^ (1 << rng.randrange(8)), 0, 255])
    if rng.random() < 0.25:
        a, b = sorted(rng.choices(range(len(content)), k=2))
        content = content[:a] + rng.choice([b"", content[a:b] * 2]) + content[b:]
    return bytes(content)


def arrays(bench, rng, folder):
    """Headers, types, shapes, values, archives, and what can lie in a folder of .npy files."""
    members, expect = dict(bench.members), EITHER
    stage = rng.choice([*STAGES, "convert"])
    as_folder, kind = rng.random() < 0.4, rng.random()
    content = None
    if kind < 0.35:
        name = rng.choice(sorted(WRONG_ARRAYS))
        array = rng.choice(WRONG_ARRAYS[name]())
        stage = READER.get(name, "seg")
        members[name], what = npy(array), f"{name}: {array.dtype} {array.shape}"
        odd = name in ("classes", "mask_classes") and array.dtype != object and array.ndim == 1
        expect = EITHER if odd else REFUSE
    elif kind < 0.6:
        members["train_images"], what, expect = header(rng)
    elif kind < 0.7:
        name = rng.choice(["train_images", "val_images", "train_labels", "train_masks"])
        stage = {"train_labels": "cls", "train_masks": "seg"}.get(name, stage)
        edits = {
            "missing": None, "empty": b"", "magic only": members[name][:6], "text": b"hello" * 9,
            "inside its header": members[name][:40], "cut": members[name][:-1],
            "hostile": npy(np.array([bench.hostile], object)),
            "pickle": pickle.dumps(bench.hostile),
        }  # fmt: skip
        what = rng.choice(sorted(edits))
        members[name] = edits[what]
        # a converted set may lack the validation split
        expect = EITHER if (stage, name, what) == ("convert", "val_images", "missing") else REFUSE
        what = f"{name}: {what}"
        members = {key: value for key, value in members.items() if value is not None}
    elif kind < 0.9 or not as_folder:
        content, what, expect = zip_damage(rng, members)
        as_folder = False
    else:
        what = rng.choice(["FIFO", "directory", "symlink loop", "dangling link", "device"])
        expect = REFUSE
    data = bench.folder / folder / ("data" if as_folder else "data.npz")
    if not as_folder:
        data.write_bytes(content if content is not None else archive(members))
    else:
        data.mkdir()
        for name, member in members.items():
            (data / f"{name}.npy").write_bytes(member)
        if kind >= 0.9:
            special(data / "train_images.npy", what)
    data = f"{folder}/{data.name}"
    what = f"{'folder of .npy' if as_folder else '.npz'}: {what}"
    if stage == "convert":
        return convert(data, folder, what, expect)
    return train(stage, folder, what, expect, {"--data": data})


def special(path, what):
    """Put something that is no regular file in a file's place."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    make = {
        "FIFO": lambda: os.mkfifo(path),
        "directory": lambda: path.mkdir(),
        "symlink loop": lambda: os.symlink(path.name, path),
        "dangling link": lambda: os.symlink("nowhere", path),
        "device": lambda: os.symlink("/dev/zero", path),
        "empty": lambda: path.write_bytes(b""),
    }
    make[what]()


SPECIAL = ["FIFO", "directory", "symlink loop", "dangling link", "device", "empty"]


# -------------------------------------------------------- images

FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM"}
FORMATS |= {"webp": "WEBP", "jpeg": "JPEG", "pgm": "PPM"}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
FOREIGN = {  # contents that are no image
    "PostScript": POSTSCRIPT,
    "DOS PostScript": b"\xc5\xd0\xd3\xc6\x20\0\0\0\x40\0\0\0" + bytes(20) + POSTSCRIPT,
    "zero bytes": b"",
    "text": b"hello",
    "PDF": b"%PDF-1.4\n1 0 obj\n",
    "huge PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 2 * b"\0\1\x86\xa0" + b"\x08\2\0\0\0-\x1c\x0ev",
    "huge PPM": b"P6 100000 100000 255\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "FLI": bytes(4) + b"\x11\xaf\1\0" + bytes(120),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "XBM": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0};",
}


def images(bench, rng, folder):
    """Files of every format, damaged or foreign, and what else can lie in a folder of pictures."""
    data = bench.folder / folder / "pictures"
    shutil.copytree(bench.good / "pictures", data, symlinks=True)
    paths = sorted(data.glob("train/*/*.png"))
    roll, stage = rng.random(), rng.choice(["tokenizer", "beit", "cls", "convert"])
    if roll < 0.6:
        count = rng.choice([1, 1, 2, len(paths)])
        programs = ["PostScript", "DOS PostScript"]  # what Pillow would start a program for
        name = rng.choice([*sorted(FOREIGN), *programs, *programs]) if roll < 0.3 else None
        suffix = rng.choice(sorted(FORMATS))
        damaged = name or rng.choice(["good", "flipped", "flipped", "cut"])
        for path in rng.sample(paths, count):
            if name:
                content = FOREIGN[name]
            else:
                content = encoded(bench, path, suffix)
                content = flip(rng, content, 20) if damaged == "flipped" else content
                content = content[: rng.randrange(len(content))] if damaged == "cut" else content
            path.unlink()
            path.with_suffix(f".{suffix}").write_bytes(content)
        what = f"{count} of {len(paths)} images: {damaged} as .{suffix}"
        expect = ACCEPT if damaged == "good" else EITHER
        expect = REFUSE if name and count == len(paths) else expect
    else:
        what, expect = odd_entry(rng, data)
    data = f"{folder}/pictures"
    if stage == "convert":
        return convert(data, folder, what, EITHER)
    return train(stage, folder, what, expect, {"--data": data})


def encoded(bench, path, suffix):
    """A picture's bytes in the format of a suffix."""
    image, file = bench.pillow.open(path), io.BytesIO()
    image = image.convert("L") if suffix == "pgm" else image
    frames = {"save_all": True, "append_images": [image.rotate(90)]} if suffix == "gif" else {}
    image.save(file, FORMATS[suffix], **frames)
    return file.getvalue()


def odd_entry(rng, data):
    """Add something odd to a folder of pictures; (what, expectation)."""
    split = rng.choice(["train", "val"])
    target = data / split / "a"
    if rng.random() < 0.4:
        what, name = rng.choice(SPECIAL), rng.choice(["x.png", "x.jpg", ".x.png", "x.txt", "x.gif"])
        special(target / name, what)
        return f"{what} {name} in {split}/a", EITHER
    odd = {
        "a link to the folder above": lambda: os.symlink("..", target / "up"),
        "an empty class folder": lambda: (data / split / "c").mkdir(),
        "a class folder of another split": lambda: shutil.copytree(target, data / "val" / "zz"),
        "no training folder": lambda: shutil.rmtree(data / "train"),
        "no validation folder": lambda: shutil.rmtree(data / "val"),
        "an image beside the classes": lambda: shutil.copy(
            next(target.glob("*.png")), data / split / "x.png"),
        "a name with a newline": lambda: os.rename(
            next(target.glob("*.png")), target / "a\nb.png"),
        "a name that is not UTF-8": lambda: os.rename(
            next(target.glob("*.png")), target / "\udcff\udcfe.png"),
        "a class that is not UTF-8": lambda: os.rename(target, data / split / "\udcff"),
        "a class with a newline": lambda: os.rename(target, data / split / "a\nb"),
        "a hidden class": lambda: os.rename(target, data / split / ".a"),
        "deep folders": lambda: (target / "/".join("abcdefgh" * 20)).mkdir(parents=True),
        "a file in place of the classes": lambda: (
            shutil.rmtree(data / split), (data / split).write_bytes(b"x")),
    }  # fmt: skip
    what = rng.choice(sorted(odd))
    odd[what]()
    return f"{what} ({split})", EITHER


def masks(bench, rng, folder):
    """Masks of another size, type or value, missing ones, and the list of classes."""
    root = bench.folder / folder / "scenes"
    shutil.copytree(bench.good / "scenes", root)
    split = rng.choice(["training", "training", "validation"])
    paths = sorted((root / "annotations" / split).glob("*.png"))
    every = rng.random() < 0.4
    expect = REFUSE if every else EITHER
    chosen = paths if every else rng.sample(paths, 1)
    how = rng.choice("size colour value special foreign flipped missing list".split())
    wrong = {
        "size": np.zeros((4, 5), np.uint8),
        "colour": np.zeros((8, 8, 3), np.uint8),
        "value": np.full((8, 8), 77, np.uint8),
    }
    what, kind = f"{'all' if every else 'one'} of the {split} masks: {how}", rng.choice(SPECIAL)
    for path in chosen if how != "list" else []:
        if how in wrong:
            bench.pillow.fromarray(wrong[how]).save(path)
        elif how == "special":
            special(path, kind)
        elif how == "foreign":
            path.write_bytes(FOREIGN[rng.choice(sorted(FOREIGN))])
        elif how == "flipped":
            path.write_bytes(flip(rng, path.read_bytes(), 20))
        else:
            path.unlink()
    if how in ("missing", "flipped"):
        expect = REFUSE if how == "missing" else EITHER
    if how == "list":
        lists = [b"a\n", b"a\na\n", b"a\n\nb\n", b"\xff\xfe\n\xfd", b""]
        content = rng.choice([*lists, b"\n".join(b"%d" % i for i in range(300))])
        (root / "classes.txt").write_bytes(content)
        what, expect = f"classes.txt {content[:20]}", REFUSE
    return train("seg", folder, what, expect, {"--data": f"{folder}/scenes"})


# -------------------------------------------------------- checkpoints and weights

ODD = [None, True, -1, 2**70, 1e308, float("nan"), float("inf"), "", "x", "x" * 5000, [], {}, (1,)]
ODD += [b"x", {"a": 1}, [[[]]], -0.5]


def deep(levels):
    """A list in a list in a list."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


def odd_tensor(rng, tensor):
    """(a tensor in another one's place, what it is, whether it is nonsense there)."""
    number = tensor.clone() if tensor.is_floating_point() else tensor.float()
    spoiled = number.clone().flatten()
    spoiled[rng.randrange(max(1, spoiled.numel()))] = rng.choice([torch.nan, torch.inf, -torch.inf])
    edits = {
        "not finite": lambda: spoiled.view_as(number),
        "all NaN": lambda: torch.full_like(number, torch.nan),
        "one more dimension": lambda: number[None].repeat(2, *[1] * number.dim()),
        "no values": lambda: torch.zeros(0),
        "a billion values in a file of few bytes": lambda: torch.zeros(1).expand(2**40),
        "float64": lambda: number.double(),
        "float16": lambda: number.half(),
        "integers": lambda: number.nan_to_num().to(torch.int64),
        "complex": lambda: torch.complex(number, number),
        "sparse": lambda: number.to_sparse(),
        "meta": lambda: number.to("meta"),
    }
    what = rng.choice(sorted(edits))
    allowed = what in ("float64", "float16", "integers", "complex", "sparse", "meta")
    return edits[what](), what, not allowed


def edit(rng, state, top=None):
    """Change, delete or add one entry of nested dicts and lists, in place.

    Returns (its path, what was done, True if the value is certainly of no use in its place).
    """
    node, path = state, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = top if top and not path else rng.choice(keys)
        path.append(str(key))
        inside = node[key] if not isinstance(node, tuple) else None
        nested = isinstance(inside, (dict, list)) and len(inside)
        if not nested or (len(path) > 1 and rng.random() < 0.2) or rng.random() < 0.1:
            break
        node = inside
    how = rng.choice(["replace", "replace", "replace", "delete", "add"])
    old, name = node[key], ".".join(path)
    if how == "add" and isinstance(node, dict):
        node[rng.choice(["odd", 7, "", "x" * 500, ("a",)])] = rng.choice([*ODD, deep(300)])
        return name, "an entry more beside it", False
    if how == "delete":
        del node[key]
        return name, "deleted", not name.startswith("config.")  # it may have a default
    if isinstance(old, torch.Tensor) and rng.random() < 0.8:
        node[key], what, nonsense = odd_tensor(rng, old)
        return name, what, nonsense
    value = rng.choice([*ODD, deep(300), torch.zeros(2), torch.full((), torch.nan)])
    same = type(value) is type(old) and not isinstance(value, (torch.Tensor, str, float, int))
    same = same or type(value) is type(old) is bool  # which one is right cannot be known
    node[key] = value
    return name, f"{str(value)[:30]!r} of type {type(value).__name__}", not same


def damage_file(bench, rng, path, source):
    """Write a damaged copy of a file that torch.save made: (what, True if it must be refused)."""
    content, roll = source.read_bytes(), rng.random()
    if roll < 0.35:
        path.write_bytes(flip(rng, content))
        return "bytes flipped", False
    if roll < 0.55:
        path.write_bytes(content[: rng.randrange(len(content))])
        return "truncated", True
    if roll < 0.65:
        path.write_bytes(rng.choice([b"", b"hello", content[:1000] * 3, pickle.dumps({"a": 1})]))
        return "other content", True
    if roll < 0.75:
        special(path, rng.choice(SPECIAL))
        return "no regular file", True
    hostile, entry = bench.hostile, rng.choice(["all", "model", "config", "optimizer", "x"])
    content = hostile
    if entry != "all":
        with contextlib.suppress(Exception):
            content = load(source) | {entry: rng.choice([hostile, {"a": hostile}, [hostile]])}
    how = rng.choice(["zip", "legacy", "raw"])
    if how == "raw":
        path.write_bytes(pickle.dumps(content if entry == "all" else {entry: hostile}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return f"hostile pickle ({how}) as {entry}", True


def consumers(kind, path, folder):
    """[(program, flags)] that read a checkpoint of this kind, or published weights."""
    out, found = f"{folder}/out", []
    start = {
        "tokenizer": [("beit", "--tokenizer"), ("tokenizer", "--init")],
        "beit": [("cls", "--init"), ("seg", "--init"), ("beit", "--init")],
        "cls": [("seg", "--init"), ("cls", "--init")],
        "seg": [("seg", "--init")],
    }
    for stage, flag in start[kind]:
        flags = short(stage, {flag: path, "--out": out})
        if flag == "--init":  # sizes are those of the weights
            for name in ("--model", "--vocab-size", "--hidden", "--groups", "--code-dim"):
                flags.pop(name, None)
        found.append((stage, as_list(flags)))
    if kind in ("cls", "seg"):
        found += 2 * [(kind, ["--eval", *as_list(LOOK), "--init", path])]
    if kind != "tokenizer":
        found.append(("attention", [path, "0", *as_list(DATA), "--out", f"{out}.png"]))
        found.append(("features", [path, *as_list(LOOK), "--out", f"{out}.npz"]))
        found += [("published", [path]), ("published", [path, f"{out}.pth"])]
    return found


NEEDED = re.compile(  # entries that every reader of a checkpoint needs
    r"kind|config|model|config\..*|model\.(blocks|patch_embed|encoder|decoder)\..*"
)
NEEDED_TO_RESUME = re.compile(NEEDED.pattern + r"|model\..*|step|optimizer|optimizer\.state.*")


def checkpoints(bench, rng, folder):
    """Bytes, single entries and hostile pickles in checkpoints, for --init, --eval, --resume..."""
    kind = rng.choice(STAGES)
    source, resumed = bench.good / kind / "checkpoint.pt", rng.random() < 0.4
    run = bench.folder / folder / "run"
    if resumed:  # after the first of two steps
        shutil.copytree(bench.good / kind, run)
        (run / "previous.pt").replace(run / "checkpoint.pt")
        source, path = bench.good / kind / "previous.pt", run / "checkpoint.pt"
    else:
        run.mkdir()
        path = run / "checkpoint.pt"
    if rng.random() < 0.4:
        what, nonsense = damage_file(bench, rng, path, source)
        needed = nonsense
    else:
        state = load(source)
        names = ["kind", "config", "config", "model", "model", *state]
        names += ["optimizer", "optimizer", "step", "arguments"] * resumed
        name, what, nonsense = edit(rng, state, rng.choice(names))
        needed = nonsense and (NEEDED_TO_RESUME if resumed else NEEDED).fullmatch(name)
        if (name, what) == ("kind", "deleted") and not resumed:
            needed = False  # then these are weights as others publish them
        what = f"{name}: {what}"
        try:
            torch.save(state, path)
        except Exception:  # what torch cannot save, nobody can load
            path.write_bytes(b"")
    expect = REFUSE if needed else EITHER
    if resumed:
        flags = as_list(BASE[kind] | {"--out": f"{folder}/run"}) + ["--resume"]
        return Case(kind, flags, f"--resume, {what}", expect, f"{folder}/run")
    program, flags = rng.choice(consumers(kind, f"{folder}/run/checkpoint.pt", folder))
    if program == "published" and expect == REFUSE and ": " in what:
        expect = EITHER  # it shows what is there
    return Case(program, flags, f"{kind}'s checkpoint, {what}", expect, f"{folder}/out")


def weights(bench, rng, folder):
    """Published BEiT weights and DALL-E's files: bytes, entries, hostile pickles, safetensors."""
    roll = rng.random()
    if roll < 0.3:
        return dalle(bench, rng, folder)
    source = bench.good / "weights.pth"
    if roll < 0.5:
        path, content = bench.folder / folder / "new.safetensors", safetensors(rng)
        path.write_bytes(content)
        what, expect = f"safetensors {content[:40]}", REFUSE
    elif roll < 0.65:
        path = bench.folder / folder / "new.pth"
        what, nonsense = damage_file(bench, rng, path, source)
        expect = REFUSE if nonsense else EITHER
    else:
        path, state = bench.folder / folder / "new.pth", load(source)
        name, what, nonsense = edit(rng, state)
        needed = nonsense and NEEDED.fullmatch(name)
        expect, what = REFUSE if needed else EITHER, f"{name}: {what}"
        torch.save(state, path)
    program, flags = rng.choice(consumers("beit", f"{folder}/{path.name}", folder))
    if program == "published" and expect == REFUSE and ": " in what:
        expect = EITHER
    return Case(program, flags, f"published weights, {what}", expect, f"{folder}/out")


def safetensors(rng):
    """Bytes of a .safetensors file that holds no BEiT, or nothing."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        b"", b"{", b"[]", b"null", b"\xff", b"{" * 5000, json.dumps({"a": entry}).encode(),
        json.dumps({"a": entry | {"shape": [-1]}}).encode(),
        json.dumps({"a": entry | {"shape": [2**62]}}).encode(),
        json.dumps({"a": entry | {"data_offsets": [0, 2**62]}}).encode(),
        json.dumps({"a": entry | {"dtype": "X"}}).encode(),
        json.dumps({"__metadata__": 3}).encode(),
    ]  # fmt: skip
    text = rng.choice(headers)
    length = rng.choice([len(text), len(text), 0, 2**63, 2**40])
    return length.to_bytes(8, "little") + text + bytes(8)


def dalle(bench, rng, folder):
    """--tokenizer dalle:FOLDER with something wrong in one of its files."""
    target = bench.folder / folder / "dalle"
    shutil.copytree(bench.good / "dalle", target)
    name = rng.choice(["encoder.pkl", "decoder.pkl"])
    roll, expect = rng.random(), REFUSE
    if roll < 0.5:
        what, nonsense = damage_file(bench, rng, target / name, bench.good / "dalle" / name)
        expect = REFUSE if nonsense else EITHER
    elif roll < 0.55:
        (target / name).unlink()
        what = "missing"
    else:
        model = load(bench.good / "tokenizer" / "checkpoint.pt")["model"]
        mine = [key for key in model if key.startswith(name[:7])]
        key = rng.choice(mine)
        if rng.random() < 0.3:
            del model[key]
            what, nonsense = "deleted", True
        elif rng.random() < 0.3:
            model[key], what, nonsense = rng.choice([3, None, "x", [], {}]), "no tensor", True
        else:
            model[key], what, nonsense = odd_tensor(rng, model[key])
        expect, what = REFUSE if nonsense else EITHER, f"{key}: {what}"
        shutil.rmtree(target)
        save_dalle(target, model)
    changes = {"--tokenizer": f"dalle:{folder}/dalle"}
    return train("beit", folder, f"DALL-E's {name}, {what}", expect, changes)


# -------------------------------------------------------- logs and outputs

LINES = [b"", b"\n", b"x\n", b"\xff\xfe\n", b"[]\n", b"1\n", b"null\n", b'"a"\n', b"{}\n", b"{\n"]
LINES += [b'{"step": "x"}\n', b'{"step": null}\n', b'{"step": NaN}\n', b'{"step": -1}\n', b"\0\n"]
LINES += [b'{"step": 1, "loss": NaN}\n', b'{"step": 1e999}\n', b'{"step": [1]}\n', b"NaN\n"]
LINES += [b"[" * 5000 + b"\n", b'{"a":' * 5000 + b"\n", b'{"step": 1, "loss": "x"}\n', b"9" * 5000]
LINES += [b'{"step": 1, "loss": [[1]]}\n', b'{"step": 1', b'{"step": true, "final": 3}\n', b"true"]


def logs(bench, rng, folder):
    """metrics.jsonl and lock of a run that is resumed; the files of reproduce.py's stages."""
    line = rng.choice(LINES)
    if rng.random() < 0.35:
        return paper_files(bench, rng, folder, line)
    kind, run = rng.choice(STAGES), bench.folder / folder / "run"
    shutil.copytree(bench.good / kind, run)
    (run / "previous.pt").replace(run / "checkpoint.pt")
    name = rng.choice(["metrics.jsonl", "metrics.jsonl", "lock"])
    how = rng.choice(["in front", "behind", "instead", "special"])
    path, old = run / name, (run / name).read_bytes()
    content = {"in front": line + old, "behind": old + line, "instead": line}
    if how == "special":
        how = rng.choice(SPECIAL)
        special(path, how)
    else:
        path.write_bytes(content[how])
    flags = as_list(BASE[kind] | {"--out": f"{folder}/run"}) + ["--resume"]
    what = f"{name}: {how} {line[:30]}"
    return Case(kind, flags, what, EITHER, f"{folder}/run", own_nan=b"NaN" in line)


def paper_files(bench, rng, folder, line):
    """reproduce.py --resume, or the report, with a file that is not what it wrote.

    No stage can run: see NO_STAGES. So whether such a file is refused or made again, status 2.
    """
    target = bench.folder / folder / "paper"
    shutil.copytree(bench.good / "paper", target)
    stage = next(target.glob("tokenizer-*.log")).stem
    odd = [b'{"result": 3}', b'{"result": {}}', b'{"result": {"a": NaN}}', b'{"seconds": "x"}']
    content = rng.choice([line, line, *odd])
    name = rng.choice([f"{stage}.json", f"{stage}.json", f"{stage}.log", "results.json", stage])
    if rng.random() < 0.2:
        content = rng.choice(SPECIAL)
        special(target / name, content)
    else:
        (target / name).write_bytes(content)
    flags = ["--jobs", "1", "--out", f"{folder}/paper", "--resume"]
    program = "reproduce"
    if name == "results.json" and rng.random() < 0.7:
        program, flags = "report", [f"{folder}/paper"]
    what = f"{name}: {content[:30]}"
    return Case(program, flags, what, REFUSE, f"{folder}/paper", own_nan=True, **NO_STAGES)


def outputs(bench, rng, folder):
    """Paths to write to that exist already, lie in the data, cannot be written, or do not fit."""
    data = bench.folder / folder / "arrays"
    shutil.copytree(bench.good / "arrays", data)
    there = bench.folder / folder / "there"
    there.mkdir()
    (there / "precious").write_text("keep me")
    weight, image = "good/cls/checkpoint.pt", as_list(DATA)
    taken = rng.choice([weight, "good/tiny.npz", f"{folder}/there", "/dev/full", "/proc/x", ""])
    writers = {
        "attention": lambda out: [weight, "0", *image, "--out", out],
        "features": lambda out: [weight, *as_list(LOOK), "--out", out],
        "published": lambda out: [weight, out],
        "convert": lambda out: ["good/tiny.npz", out, "--size", "8"],
    }
    name = rng.choice([*writers, *STAGES])
    full = rng.random() < 0.3 and name != "attention"  # its picture of 8 x 8 pixels always fits
    if name in writers:
        suffix = {"attention": ".png", "features": ".npz", "published": ".pth", "convert": ""}[name]
        free = f"{folder}/new{suffix}"
        out = free if full else taken
        case = Case(name, writers[name](out), f"--out {out!r}", REFUSE)
        case.file_size = 500 if full else None
        case.what += ", on a full disk" * full
        if not full and out == "":
            case.expect = EITHER
        return case
    if full:
        return train(name, folder, "a full disk", REFUSE, file_size=20_000)
    inside = f"{folder}/arrays/run"
    out = rng.choice([taken, inside])
    flags = short(name, {"--data": f"{folder}/arrays", "--out": out})
    return Case(name, as_list(flags), f"--out {out!r}", REFUSE, inside if out == inside else "")


KINDS = {
    "flags": flags,
    "arrays": arrays,
    "images": images,
    "masks": masks,
    "checkpoints": checkpoints,
    "weights": weights,
    "logs": logs,
    "outputs": outputs,
}

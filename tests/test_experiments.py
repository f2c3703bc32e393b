"""Attention, stages, plans, claims, the report, and the benchmark against other packages."""

import copy
import functools
import html
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import beit
import pretrain
import reproduce
from experiments import (
    HERE,
    attention,
    baselines,
    benchmark,
    costs,
    features,
    paper,
    report,
    scale,
    scale_check,
    short_runs,
    stages,
    tables,
    verify,
)
from images import sets, sources
from plumbing import processes

# -------------------------------------------------------- figure 2


def test_average_precision_of_a_hand_made_ranking():
    """Two rankings of four items against average precision by hand."""
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]])
    relevant = torch.tensor([[True, True, False, False], [False, False, False, True]])
    found = attention.average_precision(scores, relevant)
    assert found.tolist() == pytest.approx([(1 + 2 / 4) / 2, 1.0])


def test_patches_with_equal_scores_are_in_no_order_of_the_image():
    """In reading order the relevant half would be first, with an average precision of 1, or last.

    The same for all rows and calls.
    """
    relevant = torch.arange(40) < 20
    found = attention.average_precision(torch.zeros(2, 40), torch.stack([relevant, ~relevant]))
    assert 0.4 < found[0] < 0.7 and 0.4 < found[1] < 0.7
    assert torch.equal(found[:1], attention.average_precision(torch.zeros(1, 40), relevant[None]))


CONFIG = beit.BeitConfig(image_size=8, patch_size=2, dim=16, depth=2, heads=2)


def quarters(name, *places):
    """Two images of 8 x 8, in which objects of class 1, 2, ... fill a quarter at (top, left)."""
    masks = np.zeros((2, 8, 8), np.uint8)
    for c, (top, left) in enumerate(places, start=1):
        masks[:, top : top + 4, left : left + 4] = c
    return sources.Arrays(name, np.zeros((2, 8, 8, 3), np.uint8), masks=masks)


def same_class(source):
    """Attention (N+1, N+1) from each patch to all of its class; e_[S] comes first."""
    classes = attention.patch_classes(torch.from_numpy(source.masks), 2)[0]
    return F.pad((classes[:, None] == classes).float(), (1, 0, 1, 0))


def looking(*heads):
    """A model whose last layer has this attention, whatever it sees: a matrix for each head."""
    heads = torch.stack(heads)
    last_attention = functools.partial(lambda heads, x: heads.expand(len(x), -1, -1, -1), heads)
    return types.SimpleNamespace(config=CONFIG, last_attention=last_attention)


def test_attention_that_knows_the_objects_scores_100():
    """separation() of a model that attends to its own object, and of one that attends elsewhere.

    Chance is the mean over all orders of the other 15 patches, 3 of them on the same object. The
    objects are in the corners, so the centre is a bad guess.
    """
    source = quarters("two objects", (0, 0), (4, 4))
    same = same_class(source)
    models = {"knows": looking(-same, 2 * same), "opposite": looking(-same, -same)}
    found = attention.separation(models, "half", source, 2)
    places = torch.tensor(list(itertools.combinations(range(15), 3)))  # equally likely
    hits = F.one_hot(places, 15).sum(1) == 1
    ranks = torch.arange(15, 0, -1.0).expand(len(hits), -1)
    chance = 100 * attention.average_precision(ranks, hits).mean().item()
    assert found["chance"].tolist() == [pytest.approx(chance, rel=1e-5)] and 33 < chance < 34
    assert found["knows"][[0, 2]].tolist() == pytest.approx([100, 100])  # mean over heads, head 1
    assert max(*found["opposite"], found["knows"][1]) < chance
    assert chance < found["centre"] < found["nearness"] < 100


def test_centre_prior_finds_a_centred_object():
    """An object in the middle: the centre prior scores 100, nearness less."""
    source, model = quarters("centred", (2, 2)), looking(*torch.ones(2, 17, 17))
    found = attention.separation({"m": model}, "half", source, 1)
    assert found["centre"].item() == pytest.approx(100) and found["nearness"] < 100


def test_best_head_is_chosen_on_validation_images():
    """Head 0 knows the test images' layout and head 1 that of the validation images: head 1."""
    test, validation = quarters("test", (0, 0), (4, 4)), quarters("val", (0, 4), (4, 0))
    model = looking(same_class(test), same_class(validation))
    rows = attention.measure({"m": model}, "half", test, validation, 2)
    found = {name: (percent, note) for name, percent, note in rows}
    percent, note = found["m, best head"]
    assert note == "head 1, 100.0 on validation images" and percent < 90
    rows = attention.measure({"m": model}, "half", test, test, 2)
    assert rows[1] == ("m, best head", pytest.approx(100), "head 0, chosen on these images")


def test_what_attention_sees_of_an_image():
    """Of larger arrays a crop, of smaller ones the centred square, resized with its mask."""
    images = np.arange(10 * 12, dtype=np.uint8).reshape(1, 10, 12)
    source = sources.Arrays("large", images, masks=images // 64)
    pixels, mask = attention.Seen(source, 8)[0]
    values = (pixels[0] * 255).round().byte()
    assert torch.equal(values // 64, mask) and values[1, 0] - values[0, 0] == 12
    masks = np.zeros((1, 4, 6), np.uint8)
    masks[:, :2, :3], masks[:, :, 5] = 1, 7
    small = sources.Arrays("small", masks * 100, masks=masks)
    pixels, mask = attention.Seen(small, 8)[0]
    assert pixels.shape == (3, 8, 8) and pixels[:, 0, 0].allclose(torch.tensor(100 / 255))
    assert torch.equal(mask == 1, F.pad(torch.ones(4, 4) == 1, (0, 4, 0, 4)))
    whole = "the centred square, resized to"
    square = sources.Arrays("square", masks[:, :, :4], masks=masks[:, :, :4])
    bare = sources.Arrays("bare", images)
    for shown, size, part in [(source, 10, "a random crop of"), (source, 11, whole),
                              (square, 4, whole), (bare, 8, whole)]:  # fmt: skip
        text = attention.view_text(shown, size)
        assert text == f"{shown.name}: of each image {part} {size}x{size} pixels"


def test_figure_2_of_photographs(made, tmp_path, capsys):
    """Files of any size and shape, with masks: a line says what the model sees of them."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(12, 9), (20, 30), (16, 16)]):
        mask = rng.integers(0, 2, size, np.uint8).repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
        for folder, pixels in (("images", mask * 200), ("annotations", mask)):
            path = tmp_path / "set" / folder / "validation" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels).save(path)
    (tmp_path / "set" / "classes.txt").write_text("background\nobject\n")
    flags = [str(made / "beit" / "checkpoint.pt"), "--data", str(tmp_path / "set")]
    attention.main([*flags, "--measure", "9"])
    assert "of each image the centred square, resized to 16x16 pixels" in capsys.readouterr().out
    attention.main([*flags, "--out", str(tmp_path / "photographs.png")])
    content = (tmp_path / "photographs.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (4 * 100, 2 * 3 * 100)  # two rows an image


def test_reference_points_follow_the_mask():
    """Two on the largest object and one on background, far off; also in a mask without either."""
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:4, :3], mask[6:, :2] = 3, 1  # the object fills two patches, and two more by half
    assert attention.mask_points(mask, 2) == [(0, 0), (1, 0), (3, 3)]
    for c in (0, 1, sources.IGNORE):
        points = attention.mask_points(torch.full((8, 8), c, dtype=torch.uint8), 2)
        assert points[:2] == [(1, 0), (3, 0)] and len(points) == 3


def test_figure_2(arrays, made, tmp_path, capsys):
    """The command draws a picture, and measures; a set without masks is an error."""
    picture, checkpoint = tmp_path / "attention.png", str(made / "beit" / "checkpoint.pt")
    flags = ["--data", arrays, "--out", str(picture)]
    attention.main([checkpoint, "3", "4", "--points", "0,0", "3,2", *flags])
    assert picture.stat().st_size > 100
    attention.main([checkpoint, "--measure", "3", "--split", "train"])  # of its own data
    scores = dict(re.findall(r"(.+?) +average precision ([\d.]+)", capsys.readouterr().out))
    heads = "mean over heads", "best head"
    rows = [f"{model}, {of}" for model in ("pre-trained", "random weights") for of in heads]
    assert list(scores) == [*rows, "nearness", "pixels", "centre", "chance"]
    assert all(0 < float(score) <= 100 for score in scores.values())
    folder = str(made / "beit")
    with pytest.raises(ValueError, match=f"{folder}: it is a folder, name {checkpoint}"):
        attention.main([folder, "--out", str(tmp_path / "none.png")])
    unmasked = sources.Arrays("no masks", np.zeros((1, 16, 16), np.uint8))
    models, _ = attention.load_models(checkpoint)
    with pytest.raises(ValueError, match="no masks has no masks"):
        attention.separation(models, "half", unmasked, 1)


def test_figure_2_of_the_paper_has_a_row_for_each_of_its_claims(made, tmp_path, monkeypatch):
    """figure2() with two pre-training runs: its picture, its table and the verdicts."""
    monkeypatch.setattr(paper, "tokenizer_stage", lambda runner: None)
    checkpoint = str(made / "beit" / "checkpoint.pt")
    monkeypatch.setattr(paper, "pretrained", lambda runner, tokenizer: [checkpoint] * 2)
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 20), np.uint8)
    content = {f"{split}_images": images for split in ("val", "test")}
    content |= {f"{split}_masks": images // 128 for split in ("val", "test")}
    np.savez(tmp_path / "scenes.npz", **content)
    settings = {"scenes": str(tmp_path / "scenes.npz"), "reference_images": 2}
    runner = types.SimpleNamespace(settings=settings, planning=False, data_dir=None, out=tmp_path)
    table = paper.figure2(runner)
    assert (tmp_path / "figure2.png").stat().st_size > 100
    best = next(row for row in table["rows"] if row[0] == "pre-trained, best head")
    assert len(best[1]["values"][0]) == 2 and best[2].count("on validation images") == 2
    cells = {name: cell for name, cell, _ in table["rows"]}
    assert len(set(cells["random weights, mean over heads"]["values"][0])) == 2  # a seed each
    numbers = [name for name, cell in cells.items() if isinstance(cell, float)]
    assert sorted(numbers) == sorted(attention.WITHOUT_NETWORK)
    claims = [claim for claim in tables.CLAIMS if claim[1] == "figure 2"]
    assert len(tables.verdicts({"figure 2": table})["rows"]) == len(claims)


# -------------------------------------------------------- stages and plans


def test_reproduce_continues_where_it_was_stopped(arrays, tmp_path):
    """A finished stage is kept, an interrupted one resumed; other settings are another stage."""
    runner = stages.Runner(tmp_path, "demo", paper.settings("demo"))
    flags = short_runs.script_flags("tokenizer", arrays, tmp_path)
    call = ("tokenizer", "train_tokenizer.py", *flags)
    record = runner.stage(*call)
    assert short_runs.RESULTS["tokenizer"] <= record.keys()
    assert runner.stage(*call) == record
    commands = tmp_path / "commands.txt"
    assert commands.read_text().count("train_tokenizer.py") == 1
    folder = Path(record["checkpoint"]).parent
    folder.with_suffix(".json").unlink()
    metrics = folder / "metrics.jsonl"  # without its final record, as if the run had been killed
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert runner.stage(*call) == record
    assert "--resume" in commands.read_text().splitlines()[1]
    message = r"stage tokenizer-\w{8} ended with status 2: .* is not one of"
    with pytest.raises(ValueError, match=message):
        runner.stage(*call, "--quantizer", "none")


def test_learning_rate_is_the_best_on_validation_images():
    """The largest top-1 of three; the runs of the search have their own seed, and no test split."""
    calls = {}

    def run(found):
        calls.update(found)
        return {lr: {"top1": -abs(lr - 2)} for lr in found}

    runner, start = types.SimpleNamespace(stages=run), paper.Start(["random"], (1.0, 2.0, 3.0))
    assert paper.choose_lr(runner, "c", "s.py", "top1", "BEiT", start, ()) == 2
    assert list(calls) == [1, 2, 3]
    assert all("test" not in call and call[-2:] == ("--seed", 100) for call in calls.values())


def test_results_of_a_row_are_of_its_own_runs_on_test_images():
    """Values and checkpoints by pre-training and fine-tuning seed, of a run that names both."""

    def run(calls):
        assert all(name == f"c-beit-{n}-{seed}" for (_, n, seed), (name, *_) in calls.items())
        return {key: {"top1": key[1:], "checkpoint": call} for key, call in calls.items()}

    runner = types.SimpleNamespace(settings={"seeds": 2}, stages=run)
    starts = {"BEiT": paper.Start(["a", "b"], (0.1,))}
    found = paper.fine_tune(runner, "c", "s.py", "top1", starts, ())["BEiT"]
    assert found["values"] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]] and found["lr"] == 0.1
    for init, calls in zip("ab", found["checkpoints"], strict=True):
        for seed, call in enumerate(calls):
            rest = ("s.py", "--init", init, "--lr", 0.1, "--seed", seed, "--eval-split", "test")
            assert call[1:] == rest


def test_stages_run_with_the_settings_of_their_row(tmp_path, monkeypatch):
    """What a stage's name depends on, and the flags of table 4's rows, of budgets, of labels."""
    runner = stages.Runner(tmp_path, "demo", paper.settings("demo"))
    before = runner.digest("pretrain.py", [])
    monkeypatch.setitem(pretrain.RECIPES, "lr", (1.0, *pretrain.RECIPES["lr"][1:]))
    assert runner.digest("pretrain.py", []) != before  # the recipe counts, not only the flags
    column = vars(costs.settings("pretraining", "demo"))
    for row, (flags, *_) in paper.ABLATIONS.items():
        changes = zip(flags[::2], flags[1::2])
        assert all(column[flag.removeprefix("--")] != value for flag, value in changes), row
    s = costs.settings("pretraining", "fashion")
    assert paper.longer_flags("fashion", 2)[1::2] == [2 * s.epochs, 2 * s.warmup_epochs]
    seen, runner = [], types.SimpleNamespace(settings=paper.settings("fashion"))
    monkeypatch.setattr(paper, "fine_tune", lambda *given: seen.append(given[-1]))
    for labels in (100, 10, 0):
        paper.classify(runner, labels, {})
    assert [flags[flags.index("--epochs") + 1] for flags in seen] == [10, 100, 1]


def test_reproduce_is_resumed_only_with_its_own_recipe_and_data(arrays, tmp_path):
    """Another recipe, or other labels under the same path: refused by name; more seeds are not."""
    data = tmp_path / "set.npz"
    content = {name.replace("val", "test"): values for name, values in np.load(arrays).items()}
    np.savez(data, **content)
    settings = paper.settings("demo") | {"data": str(data)}

    def start(settings, recipe="demo"):
        with stages.Runner(tmp_path / "out", recipe, settings):
            pass

    start(settings)
    start(settings | {"seeds": 5})
    with pytest.raises(ValueError, match="recipe changed since .*: demo then, fashion now"):
        start(settings, "fashion")
    np.savez(data, **content | {"test_labels": content["test_labels"][::-1]})
    with pytest.raises(ValueError, match=r"labels \(digest\) of .* test changed since"):
        start(settings)


RESULTS = "[]", '{"tables": 1, "stages": {}}', "NaN", '{"tables": {"a": 1}'


@pytest.mark.parametrize("text", RESULTS)
def test_results_that_no_script_wrote_are_refused(text, tmp_path):
    """results.json and STAGE.json: one line that names the file."""
    for name, reader in (("results.json", tables.read_results), ("a.json", tables.finished_stages)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name) as refused:
            reader(tmp_path)
        assert "\n" not in str(refused.value)


@pytest.fixture
def no_processes(monkeypatch):
    """Stages report at once and run nothing; the same stage has the same numbers.

    Returns a list that gets (stage, script, {flag: value}) of each.
    """
    ran = []

    def execute(self, name, script, flags, threads, resumed):
        ran.append((name, script, dict(itertools.pairwise(flags))))
        rng = random.Random(name)
        numbers = {key: rng.random() for names in short_runs.RESULTS.values() for key in names}
        return numbers | {"commonest_token": 0.1, "stage1_nats": 1.0, "stage2_nats": -1.0}

    monkeypatch.setattr(stages.Runner, "execute", execute)
    monkeypatch.setattr(baselines, "raw_pixels", lambda runner, labels: {"values": [[1.0, 2.0]]})
    return ran


def check_stages(ran):
    """Results are of test images, and rates are searched on others; labels are as many as named."""
    for name, script, flags in ran:
        assert ("--eval-split" in flags) != name.startswith("search-"), name
        assert flags.get("--eval-split", "test") == "test"
        if script == "finetune_cls.py":
            labels = re.search(r"cls(\d+|all)-", name)[1]
            assert flags["--labels-per-class"] == labels.replace("all", "0"), name
        if script == "finetune_seg.py":
            assert flags["--train-images"] == "200", name


def rates(ran, start, script):
    """The learning rates of a script's stages whose names begin with `start`."""
    return {flags["--lr"] for name, of, flags in ran if name.startswith(start) and of == script}


def planned(out, recipe, seeds, experiments):
    """(a Runner that has planned the experiments, the number of stages in its plan)."""
    runner = stages.Runner(out, recipe, paper.settings(recipe, seeds), jobs=2)
    runner.plan(experiments)
    return runner, len(runner.progress.stages)


def test_reproduce_plans_what_it_runs(no_processes, tmp_path):
    """Stages run against stages planned; a second pass plans none; every table has its rows."""
    names = ["summary", "table 1", "table 3", "table 4"]
    experiments = [paper.EXPERIMENTS[name] for name in names]
    runner, total = planned(tmp_path, "demo", 3, experiments)
    assert total > 100
    made = {name: paper.EXPERIMENTS[name](runner) for name in names}
    assert runner.progress.counts() == (total, total)
    assert len(list(tmp_path.glob("*.json"))) == total
    saved = tables.save_results(runner, made)
    assert len(saved["stages"]) == total
    assert planned(tmp_path, "demo", 3, experiments)[1] == 0
    assert [row[0] for row in made["table 4"]["rows"]] == list(paper.ABLATIONS)
    assert len(made["table 4"]["rows"][0][1]["values"]) == 2  # pre-training seeds
    tested = [claim for claim in tables.CLAIMS if claim[1] in made]
    assert len(saved["tables"]["claims"]["rows"]) == len(tested)
    check_stages(no_processes)
    larger = rates(no_processes, "cls100-larger-", "finetune_cls.py")
    assert larger == {str(float(made["table 1"]["rows"][1][1]["lr"]) / 10)}


def test_pictures_that_cannot_be_read_end_it_before_the_first_stage(tmp_path, monkeypatch):
    """Each set's first image is read: otherwise a missing Pillow is found only after hours."""

    def refuse(indices):
        raise ValueError(f"no Pillow for {indices}")

    source = types.SimpleNamespace(read=refuse)
    monkeypatch.setattr(stages.sets, "open_source", lambda *settings: source)
    settings = paper.settings("photos", scenes="objects")
    with pytest.raises(ValueError, match="no Pillow for .0."):
        with stages.Runner(tmp_path / "out", "photos", settings):
            pytest.fail("a stage could start")
    assert not (tmp_path / "out").exists()


def test_grid14_plans_what_it_runs(no_processes, tmp_path):
    """Four rows, each with its pre-training seeds; a verdict on each; not for drawn shapes."""
    runner, total = planned(tmp_path, "fashion", 2, [paper.grid14])
    table = paper.grid14(runner)
    assert runner.progress.counts() == (total, total)
    assert len(list(tmp_path.glob("*.json"))) == total
    seeds = runner.settings["grid14_seeds"]
    assert [row[0] for row in table["rows"]] == list(paper.MASKING)
    for row in table["rows"]:
        for cell in row[1:3]:
            assert len(cell["values"]) == seeds and len(cell["values"][0]) == 2
    claims = tables.save_results(runner, {"grid 14": table})["tables"]["claims"]["rows"]
    assert len(claims) == 2 * (len(paper.MASKING) - 1)
    check_stages(no_processes)
    sizes = {"pretrain.py": "56", "finetune_cls.py": "28", "finetune_seg.py": "56"}
    for name, script, flags in no_processes:
        assert flags.get("--image-size") == sizes.get(script), name
    for task, script in (("cls100", "finetune_cls.py"), ("seg", "finetune_seg.py")):
        assert len(rates(no_processes, f"14x14-{task}-", script)) == 1  # that chosen for BEiT
    with pytest.raises(SystemExit):
        reproduce.main(["--grid14", "--out", str(tmp_path / "demo")])


def test_a_folder_of_something_else_is_not_resumed(tmp_path):
    """--resume in a folder with other files, and --out that is a file: refused, nothing written."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run of reproduce.py"):
        reproduce.main(["--resume", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="is not a folder"):
        reproduce.main(["--resume", "--out", str(tmp_path / "mine.txt")])
    with pytest.raises(SystemExit):
        reproduce.main(["--documents", "--seeds", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_report_and_models_exist_for_every_recipe():
    """Each column of RECIPES has a smaller model that exists, and its report can be written."""
    for recipe, model in zip(paper.COLUMNS, paper.RECIPES["small_model"]):
        assert beit.model_config(model).dim < 128
        data = report.data_of(recipe, {})
        assert f"Data: {' and '.join(data)}." in report.page(recipe, data, {})


def test_budgets_plan_what_they_run(no_processes, tmp_path, monkeypatch):
    """Every row and measure at every budget, several seeds at two; no masks, no mIoU."""
    saved = []
    monkeypatch.setattr(paper, "knn", lambda runner, record: 50.0)
    monkeypatch.setattr(paper, "save_results", lambda runner, made: saved.append(made["budgets"]))
    paper.summary(stages.Runner(tmp_path, "photos", paper.settings("photos", 2)))
    runner, total = planned(tmp_path, "photos", 2, [paper.budgets])
    table = paper.budgets(runner)
    assert runner.progress.counts() == (total, total)
    assert len(list(tmp_path.glob("beit-0-*.json"))) == 1  # the recipe's is the summary's run
    assert not list(tmp_path.glob("x1-cls100-beit-0-*")) and list(tmp_path.glob("x1-cls100-*-1-1*"))
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert list(rows) == [f"{row}, {m}" for m in ("top-1", "k-NN") for row in paper.BUDGET_ROWS]
    seeds = [len(cell["values"]) for cell in rows["BEiT, top-1"]]
    assert seeds == [1, 1, 1, *[runner.settings["budget_seeds"]] * 2]
    results = tables.save_results(runner, {"budgets": table})
    assert all(stage["machine"] and stage["torch"] for stage in results["stages"].values())
    claims = results["tables"]["claims by budget"]
    assert claims["columns"][1:] == table["columns"][1:] and len(claims["rows"]) == 4 * 2
    assert "claims" not in results["tables"]
    assert [len(found["rows"][0]) for found in saved] == [2, 3, 4, 5, 6]  # after each budget
    check_stages(no_processes)
    curves = {path.name for path in tmp_path.glob("*.svg") if "<polyline" in path.read_text()}
    assert curves == {"budgets-top-1.svg", "budgets-k-nn.svg"}


def test_masks_plan_what_they_run(no_processes, tmp_path, monkeypatch):
    """BEiT and random masking are runs of a budget, and not made again."""
    monkeypatch.setattr(paper, "knn", lambda runner, record: 50.0)
    paper.budgets(stages.Runner(tmp_path, "photos", paper.settings("photos", 2)))
    runner, total = planned(tmp_path, "photos", 2, [paper.masks])
    table = paper.masks(runner)
    assert runner.progress.counts() == (total, total) == (21, 21)  # seven rows, two seeds each
    assert [row[0] for row in table["rows"]] == list(paper.MASKS)


@pytest.mark.parametrize("flags", [["--masks"], ["--tokenizers"], ["--table", "4"], []])
def test_reproduce_ends_with_its_tables(flags, no_processes, tmp_path, monkeypatch, capsys):
    """Photographs without masks in a new folder: printed and saved, with or without claims."""
    monkeypatch.setattr(paper, "knn", lambda runner, record: 50.0)
    monkeypatch.setattr(stages.Runner, "fingerprints", lambda self: {})
    out = tmp_path / "new"
    reproduce.main(["--recipe", "photos", "--seeds", "2", "--out", str(out), *flags])
    made = tables.read_results(out)["tables"]
    text = capsys.readouterr().out
    assert all(table["title"] in text for table in made.values())
    rows = made.get("claims", {"rows": []})["rows"]
    assert any("classification" in row[0] for row in rows) == (flags[:1] == ["--table"])
    assert not any("segmentation" in row[0] for row in rows)
    assert (out / "report.html").exists()


def test_logistic_regression_learns_colours():
    """Three classes, each a colour and a little noise: every test image is right."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3

    def source():
        images = np.zeros((30, 40, 40, 3), np.uint8)  # larger than LARGEST: resized
        images[np.arange(30), :, :, labels] = 200
        images += rng.integers(0, 20, images.shape, np.uint8)
        return sources.Arrays("colours", images, labels=labels)

    assert baselines.logistic_regression(source(), source(), source()) == 100


def test_penalty_is_chosen_on_validation_images(monkeypatch):
    """A weak one is right on train and val, a strong one on the test images: it is not taken."""
    monkeypatch.setattr(baselines, "PENALTIES", (10.0, 1e-4))
    grey = np.array([0, 0, 0, 255], np.uint8).repeat(5)  # a strong penalty: always class 0
    images = np.broadcast_to(grey[:, None, None], (20, 4, 4)).copy()
    known = sources.Arrays("known", images, labels=(grey > 0).astype(int))
    test = sources.Arrays("test", images, labels=np.zeros(20, int), classes=["a", "b"])
    assert baselines.logistic_regression(known, known, test) == pytest.approx(75)
    assert baselines.logistic_regression(known, test, test) == pytest.approx(100)


def test_raw_pixels_are_fitted_to_each_seeds_labels(tmp_path, monkeypatch):
    """Other labelled images for each seed, the three splits in their places; all labels: once."""
    rng, content = np.random.default_rng(0), {}
    for split in sources.SPLITS:
        content[f"{split}_images"] = rng.integers(0, 256, (12, 4, 4), np.uint8)
        content[f"{split}_labels"] = np.arange(12) % 2
    np.savez(tmp_path / "set.npz", **content)
    settings = {"data": str(tmp_path / "set.npz"), "seeds": 3}
    runner = types.SimpleNamespace(planning=False, settings=settings, data_dir=None)
    seen = []
    monkeypatch.setattr(baselines, "logistic_regression", lambda *given: seen.append(given) or 1.0)
    assert baselines.raw_pixels(runner, 2) == {"values": [[1.0, 1.0, 1.0]]}
    assert baselines.raw_pixels(runner, 0) == {"values": [[1.0]]}
    assert len({train.images.tobytes() for train, *_ in seen[:3]}) == 3
    assert [len(train) for train, *_ in seen] == [4, 4, 4, 12]
    for _, val, test in seen:
        assert np.array_equal(val.images, content["val_images"])
        assert np.array_equal(test.images, content["test_images"])


def test_neighbours_are_of_the_last_layer_on_test_images(made, arrays, tmp_path):
    """paper.knn() against `features` on the splits train and test; then it is read, not made."""
    content = {name: values for name, values in np.load(arrays).items()}
    content |= {f"test_{part}": content[f"val_{part}"][::-1] for part in ("images", "labels")}
    content["val_labels"] = 3 - content["val_labels"]
    np.savez(tmp_path / "set.npz", **content)
    shutil.copy(made / "beit" / "checkpoint.pt", tmp_path)
    settings = {"data": str(tmp_path / "set.npz")}
    runner = types.SimpleNamespace(planning=False, settings=settings, data_dir=None)
    record = {"checkpoint": str(tmp_path / "checkpoint.pt")}
    model, _, normalise = features.load_model(record["checkpoint"], "auto")
    parts = {s: sets.open_source(settings["data"], s) for s in ("train", "test")}
    layers = features.knn_accuracies(model, normalise, parts)
    assert paper.knn(runner, record) == layers[-1] != layers[0]
    (tmp_path / "set.npz").unlink()
    assert paper.knn(runner, record) == layers[-1]


def test_commonest_class_everywhere(tmp_path):
    """Class 1 has 40 of 64 pixels, which is its IoU; those of the two other classes are 0."""
    masks = np.ones((4, 8, 8), np.uint8)
    masks[:, :2], masks[:, 2:4, :4] = 0, 2
    content = {"test_images": np.zeros((4, 8, 8, 3), np.uint8), "test_masks": masks}
    np.savez(tmp_path / "set.npz", **content)
    settings = {"scenes": str(tmp_path / "set.npz")}
    runner = types.SimpleNamespace(planning=False, settings=settings, data_dir=None, recipe="demo")
    assert baselines.commonest_class(runner) == pytest.approx(100 * 40 / 64 / 3)


def test_tokenizers_plan_what_they_run(no_processes, tmp_path, monkeypatch):
    """A tokenizer, a pre-training run and two classifiers for each of four rows; photos only."""
    monkeypatch.setattr(paper, "knn", lambda runner, record: 50.0)
    runner, total = planned(tmp_path, "photos", 2, [paper.tokenizers])
    table = paper.tokenizers(runner)
    assert runner.progress.counts() == (total, total) == (16, 16)
    rows = ["BEiT", "VQ-VAE tokenizer", "vocabulary of 256", "vocabulary of 2048"]
    assert [row[0] for row in table["rows"]] == rows
    commands = [json.loads(path.read_text())["command"] for path in tmp_path.glob("*.json")]
    assert sum("--vocab-size 2048" in command for command in commands) == 1
    assert sum("--epochs 9.0" in command and "pretrain" in command for command in commands) == 4
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    with pytest.raises(SystemExit):
        reproduce.main(["--tokenizers", "--out", str(tmp_path / "demo")])


def test_estimate_follows_the_stages_that_have_ended(tmp_path):
    """Recorded 100 and 50 seconds: 150 before the first; if it takes 200, then 100 are left."""
    progress = stages.Progress({"tokenizer": 100.0, "beit-0": 50.0}, jobs=1)
    first = progress.add("tokenizer-00000000", "train_tokenizer.py", tmp_path / "a.log", True)
    progress.add("beit-0-00000000", "pretrain.py", tmp_path / "b.log", True)
    assert progress.seconds_left() == pytest.approx(150)
    first.started, first.seconds = time.monotonic() - 200, 200.0
    assert progress.seconds_left() == pytest.approx(100)


def test_estimate_of_a_stage_without_a_record_follows_its_epochs(no_processes, tmp_path):
    """Fashion's 4.4 epochs take 40 seconds: without a record, twice as many take 80."""
    short = "a", "pretrain.py", "--epochs", 2.2
    long = "b", "pretrain.py", "--epochs", 1.0, "--epochs", 8.8  # the last counts
    settings = paper.settings("fashion", 1)
    stages.Runner(tmp_path, "fashion", settings).stage(*short)
    path = next(tmp_path.glob("a-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 20.0}))
    runner = stages.Runner(tmp_path, "fashion", settings)
    runner.plan([lambda runner: [runner.stage(*call) for call in (short, long)]])
    assert runner.progress.seconds_left() == pytest.approx(80)


def test_estimate_of_other_seeds_and_other_tasks(tmp_path):
    """Seed 3 takes the mean of seeds 0 and 1; a learning rate's trial with ten labels 30 s."""
    records = {"cls100-beit-0-0": 90.0, "cls100-beit-0-1": 110.0, "cls10-beit-0-0": 30.0}
    progress = stages.Progress(records, jobs=1)
    for name in records:
        progress.add(f"{name}-00000000", "finetune_cls.py", tmp_path / "a.log", False)
    new = progress.add("cls100-beit-0-3-00000000", "finetune_cls.py", tmp_path / "a.log", False)
    other = progress.add("search-cls10-beit-0.1-00000000", "finetune_cls.py", tmp_path / "a", False)
    assert progress.known(new) == pytest.approx(100) and progress.known(other) == 30


def test_estimate_of_stages_without_any_record(tmp_path):
    """A quarter of the recipe's 400 recorded seconds of pre-training; 25 for a classifier."""
    progress = stages.Progress({"beit-0": 400.0}, jobs=1)
    progress.add("other-00000000", "pretrain.py", tmp_path / "a.log", False, length=1 / 4)
    progress.add("another-00000000", "finetune_cls.py", tmp_path / "b.log", False)
    assert progress.seconds_left() == pytest.approx(125)


def test_records_of_other_machines_and_of_resumed_stages_say_nothing(tmp_path, monkeypatch):
    """One recipe's file with a plain, a resumed and a GPU's stage; none for another recipe."""
    times = {
        "a-00000000": {"seconds": 9.0, "resumed": False},
        "b-00000000": {"seconds": 9.0, "resumed": True},
        "c-00000000": {"seconds": 9.0, "resumed": False, "machine": "GPU"},
    }
    path = tmp_path / "docs" / "results" / "demo.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": "CPU", "stages": times}))
    monkeypatch.setattr(stages, "HERE", tmp_path)
    assert stages.recorded_seconds("demo") == {"a": 9.0}
    assert stages.recorded_seconds("base") == {}


# -------------------------------------------------------- claims and the report


def test_longest_stages_start_first(tmp_path, monkeypatch):
    """By the recorded seconds; the results keep the order of the calls."""
    started = []
    monkeypatch.setattr(stages.Runner, "stage", lambda self, name, **_: started.append(name))
    runner = stages.Runner(tmp_path, "demo", paper.settings("demo", 1), jobs=1)
    runner.progress.recorded = {"short": 1.0, "long": 9.0, "middle": 5.0}
    for name in runner.progress.recorded:
        runner.progress.add(f"{name}-12345678", "finetune_cls.py", tmp_path / name, alone=False)
    calls = {key: (name,) for key, name in enumerate(("short", "long", "middle"))}
    assert list(runner.stages(calls)) == [0, 1, 2]
    assert started == ["long", "middle", "short"]


def test_verdicts_need_twice_the_pooled_deviation(monkeypatch):
    """Differences of means against twice the pooled deviation: 5 > 2 * 1.41, 1.8 < 2 * 1.04.

    A row with a single run has no deviation: undecided, however large the difference.
    """
    claims = [("far", "t", 1, "a", "b"), ("near", "t", 1, "c", "b"), ("less", "t", 1, "b", "a")]
    monkeypatch.setattr(tables, "CLAIMS", claims)
    values = {"a": [[10.0, 12.0]], "b": [[7.0, 5.0]], "c": [[7.5], [8.1]]}
    rows = [[row, {"values": runs}] for row, runs in values.items()]
    table = {"columns": ["", "top-1"], "rows": rows}
    found = {claim: verdict for claim, verdict, _ in tables.verdicts({"t": table})["rows"]}
    assert found == {"far": "holds", "near": "undecided", "less": "does not hold"}
    monkeypatch.setattr(tables, "BUDGET_CLAIMS", [(name, *rows) for name, _, _, *rows in claims])
    for row in table["rows"]:
        row.insert(1, None if row[0] == "c" else row[1])
    table["columns"] = ["", "1 epoch", "2 epochs"]
    by_budget = tables.budget_verdicts(table)
    assert by_budget["columns"] == ["claim", "1 epoch", "2 epochs"]
    assert by_budget["rows"] == [
        ["far", *["holds, +5.0"] * 2],
        ["near", None, "undecided, +1.8"],
        ["less", *["does not hold, -5.0"] * 2],
    ]
    lists = [0.0, 0.0, 5.0, 3.0], [2.0, 4.0]  # variances 6 and 2, with weights 3 and 1
    assert tables.pooled_deviation(*lists) == pytest.approx(math.sqrt(5))
    single = [["a", {"values": [[90.0]]}], ["b", {"values": [[1.0, 1.1]]}]]
    assert tables.verdict({"title": "T", "rows": single}, 1, "a", "b")[0] == "undecided"


def test_tables_side_by_side_keep_the_order_of_rows():
    """Rows of each table stay in order; a row that one table lacks has no cell there."""
    two = [{"title": "T", "columns": ["", name]} for name in "ab"]
    two[0]["rows"] = [["first", 1], ["last", 2]]
    two[1]["rows"] = [["first", 3], ["more", 4], ["last", 5], ["end", 6]]
    rows = [["first", 1, 3], ["more", None, 4], ["last", 2, 5], ["end", None, 6]]
    assert tables.side_by_side(two) == {"title": "T", "columns": ["", "a", "b"], "rows": rows}


def test_report_is_one_page_with_tables_curves_and_pictures(arrays, made, tmp_path):
    """A page of three stages: its tables, curves, pictures and commands; it loads nothing else."""
    names = [("tokenizer", "tokenizer"), ("cls", "cls100-beit-0-0"), ("seg", "seg-beit-0-0")]
    names += [("cls", "x0.25-cls100-beit-0-0"), ("cls", "x1-cls100-recover-100-0-0")]
    for stage, name in [*names, ("seg", "tokens-seg-vq-0-0")]:
        shutil.copytree(made / stage, tmp_path / f"{name}-00000000")
        command = [short_runs.SCRIPTS[stage][0], *short_runs.script_flags(stage, arrays, made)]
        record = {"command": shlex.join(command), "seconds": 1.0, "threads": 1, "resumed": False}
        record["result"] = {}
        (tmp_path / f"{name}-00000000.json").write_text(json.dumps(record))
    table = {"title": "Summary", "columns": ["", "top-1"], "rows": [["<BEiT>", 12.5]]}
    tables.save_results(types.SimpleNamespace(out=tmp_path, recipe="demo"), {"summary": table})
    (tmp_path / "budgets-top-1.svg").write_text("<svg></svg>")
    page = report.write(tmp_path).read_text()
    assert "<td>&lt;BEiT&gt;</td>" in page and "12.5" in page
    assert page.count("<svg") == 6 and page.count('src="data:image/png;base64,') == 3
    assert page.count('src="data:image/svg+xml;base64,') == 1
    svgs = [html.unescape(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL)]
    for title in ("class, 0.25 times the recipe's epochs", "Segmenters, with other tokenizers"):
        assert sum(title in svg for svg in svgs) == 1
    (of_recipe,) = (svg for svg in svgs if "class, the recipe's epochs" in svg)
    assert of_recipe.count("<polyline") == 2  # BEiT's is the summary's run
    assert re.findall(r'src="(?!data:)|<script|<link|@import|url\(', page) == []


def test_report_of_a_folder_without_its_data(made, tmp_path, capsys):
    """Pictures and curves of the newest stage of a name, under its row; no maps, and why."""
    flags = [*short_runs.script_flags("beit", "nowhere.npz", made), "--target", "pixels"]
    for digest in ("11111111", "22222222"):
        name = f"visual-tokens-x0-5-0-{digest}"
        shutil.copytree(made / "beit", tmp_path / name)
        record = {"command": shlex.join(["pretrain.py", *flags]), "seconds": 1.0, "threads": 1}
        record |= {"resumed": False, "result": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        os.utime(tmp_path / f"{name}.json", (int(digest), int(digest)))
    page = html.unescape(report.write(tmp_path).read_text())
    assert page.count("Pre-training: - visual tokens (visual-tokens-x0-5-0)") >= 1
    assert "mean squared error" in page and "nats per token" not in page
    assert "22222222" in page and "11111111" not in page
    assert "no attention maps in the report: nowhere.npz: no such" in capsys.readouterr().out


def test_stage_that_two_experiments_share_is_planned_once(tmp_path):
    """The same script and flags under another name are the same stage, before it has run too."""
    runner = stages.Runner(tmp_path, "demo", paper.settings("demo"), None, 1)
    flags = "finetune_cls.py", "--seed", 3
    runner.plan([lambda r: r.stage("one", *flags), lambda r: r.stage("other", *flags)])
    assert [stage.name[:4] for stage in runner.progress.stages] == ["one-"]


def test_scenes_without_masks_are_refused_before_any_stage(arrays, tmp_path):
    """--scenes with images alone, and a folder inside --scenes as --out."""
    with np.load(arrays) as content:
        images = {name: value for name, value in content.items() if "masks" not in name}
    np.savez(tmp_path / "images.npz", **{n: v for n, v in images.items()},
             test_images=images["val_images"])  # fmt: skip
    settings = paper.settings("photos", None, str(tmp_path / "images.npz")) | {"data": "shapes"}
    with pytest.raises(ValueError, match="has no masks, which segmentation needs"):
        stages.Runner(tmp_path / "out", "photos", settings, None, 1).check_started()
    settings["scenes"] = str(tmp_path)
    with pytest.raises(ValueError, match="lies inside the data"):
        stages.Runner(tmp_path / "out", "photos", settings, None, 1).check_started()


# -------------------------------------------------------- benchmark


def test_benchmark_of_several_takes_turns_on_the_same_batches():
    """The order of the contestants' steps: a and b on each batch in turn, warm-up included."""
    seen = []
    steps = {
        name: functools.partial(lambda name, batch: seen.append((name, batch)), name)
        for name in "ab"
    }
    source = ([number] for number in range(99))
    found = benchmark.side_by_side(steps, source, torch.device("cpu"), repeats=3, warm_up=1)
    assert seen == [(name, number) for number in range(4) for name in "ab"]
    assert found.keys() == steps.keys() and all(seconds >= 0 for seconds in found.values())


@pytest.mark.parametrize("flag", ["--images", "--repeats"])
def test_benchmark_of_nothing_is_refused_before_it_begins(flag, capsys):
    """0 images or repeats: exit status 2 and a line that names the flag."""
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([flag, "0"])
    assert f"{flag} 0" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [True, False])
def test_benchmark_compares_the_defaults_of_the_machine(fast, monkeypatch):
    """Precision of each side's step, with and without bf16 on a machine; bf16 is named emulated."""
    monkeypatch.setattr(processes, "computes_in_bf16", lambda device: fast)
    monkeypatch.setattr(benchmark, "transformers", benchmark.ours)
    monkeypatch.setattr(benchmark, "training_step", lambda _, autocast, *more: autocast)
    cpu, in_bf16 = torch.device("cpu"), []
    found = benchmark.contestants("defaults", CONFIG, cpu)
    for autocast in found.values():
        with autocast():
            in_bf16.append(torch.is_autocast_enabled("cpu"))
    assert in_bf16 == [fast, False]
    assert list(found) == [f"ours, {'bf16' if fast else 'float32'}", "transformers, float32"]
    assert ("emulated" in benchmark.title("bf16", cpu)) != fast
    assert benchmark.title("tokenizer", cpu) == f"tokenizer, {'bf16' if fast else 'float32'}"


class DropPath(nn.Module):
    """Stands for a peer's stochastic depth."""

    def __init__(self, rate):
        super().__init__()
        self.drop_prob = rate


def test_benchmark_refuses_peers_that_drop_otherwise():
    """Our rates pass; other rates, dropout and a model in eval mode do not."""
    config = beit.BeitConfig(depth=3, drop_path=0.1)
    same = nn.Sequential(DropPath(0.05), DropPath(0.1), nn.Dropout(0.0))
    assert benchmark.alike(same, config) is same
    rates = nn.Sequential(DropPath(0.1), DropPath(0.2))
    dropout, evaluated = nn.Sequential(*same, nn.Dropout(0.1)), copy.deepcopy(same).eval()
    for other in (nn.Sequential(), rates, dropout, evaluated):
        with pytest.raises(ValueError, match="drop"):
            benchmark.alike(other, config)


def test_benchmark_decays_what_we_decay():
    """The peers' parameter groups, made for our model, against its own."""
    model = pretrain.BeitForMaskedImageModeling(replace(CONFIG, positions="shared"), 11)
    groups = [group for group in beit.parameter_groups(model, 0.1) if group["weight_decay"]]
    decayed = [parameter for group in groups for parameter in group["params"]]
    found, _ = benchmark.decayed_matrices(model)
    assert {id(p) for p in found["params"]} == {id(p) for p in decayed}


def test_benchmarks_count_of_a_step_is_what_torch_counts():
    """flop_of_step against torch's counter."""
    config, cpu = beit.BeitConfig(dim=48, heads=3, depth=3, drop_path=0.0), torch.device("cpu")
    _, loss = benchmark.ours(config, cpu)
    x, _, mask = next(benchmark.batches(2, config, cpu))
    z = torch.zeros(2, 196, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss(x, mask, z).backward()
    assert int(mask.sum()) == pytest.approx(2 * 196 * benchmark.MASKED, abs=20)
    expected = benchmark.flop_of_step(config, 2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


# -------------------------------------------------------- what a run costs


def test_scale_document_is_what_its_script_makes():
    """docs/scale.md against `python -m experiments.scale`: models or recipes may have changed."""
    text = (HERE / "docs" / "scale.md").read_text()
    assert text.count("<!-- end -->") == 5
    assert scale.fill(text) == text, "run `python -m experiments.scale --document`"


def test_operations_of_a_block_are_those_counted_by_hand():
    """Forward and backward: six for each multiplication; two more with --recompute."""
    with torch.device("meta"):
        models = [costs.build("classification", "base", depth=depth) for depth in (3, 4)]
        three, four = (costs.operations("classification", "base", model) for model in models)
    tokens, D = 197, 768
    multiplications = tokens * 12 * D**2 + 2 * tokens**2 * D
    assert four["trained"] - three["trained"] == 6 * multiplications
    assert four["recompute"] - three["recompute"] == 2 * multiplications


def test_kept_activations_of_a_block_are_those_counted_by_hand():
    """Bytes that a block keeps for each image on a GPU, in bf16, against a sum by hand.

    Of D values for each token: x and x after attention in float32, in bf16 two norms, q, k, v, the
    weighted sums, the two branches, and the MLP's 4 D before and after GELU. And one float32
    for each head. Recomputed: only x.
    """
    tokens, D, heads = 197, 768, 12
    with costs.without_data(), costs.as_on_a_gpu():
        model = costs.build("classification", "base", depth=3)
        for model.recompute in (False, True):
            three, _ = costs.saved("classification", "base", model, amp=True)
            blocks, model.blocks = model.blocks, model.blocks[:2]
            two, _ = costs.saved("classification", "base", model, amp=True)
            model.blocks = blocks
            values = 4 if model.recompute else 2 * 4 + 2 * (2 + 3 + 1 + 2 + 8)
            of_heads = 0 if model.recompute else 4 * heads
            assert three - two == pytest.approx(tokens * (values * D + of_heads), rel=0.002)


def test_peak_counts_what_lives_at_once():
    """Weights, moments, and the larger of activations and gradients; kept gradients come on top."""
    held = {"weights": 10, "gradients": 8, "moments": 16}
    assert costs.peak(held, 4, (3, 1), keeps_gradients=False) == 10 + 16 + 13
    assert costs.peak(held, 4, (3, 1), keeps_gradients=True) == 10 + 16 + 13 + 8
    assert costs.peak(held, 1, (3, 1), keeps_gradients=False) == 10 + 16 + 8


def test_gpus_that_do_not_divide_the_batch_or_hold_one_image_are_named():
    """Cells of the memory table: passes are added until the peak fits."""
    cost = {"batch": 8, "held": {"weights": 0, "gradients": 0, "moments": 0}}
    assert scale.fit(cost | {"plain": (5e9, 0)}, "plain", 1) == "40 GB"
    assert scale.fit(cost | {"plain": (2e10, 0)}, "plain", 1) == "40 GB in 4 passes"
    assert scale.fit(cost | {"plain": (8e10, 0)}, "plain", 1) == "does not fit"
    assert scale.fit(cost | {"plain": (5e9, 0)}, "plain", 3) == "does not divide"


def test_scale_check_measures_what_is_computed(monkeypatch, capsys):
    """A row of one image: the difference of the numbers printed. Computed: 16 bytes a parameter."""
    step = "classification", "base", 1, "off", False
    expected = scale_check.computed(*step)
    assert 1 < expected / (16 * 86e6) < 1.5  # weights, gradients, two moments, and activations
    monkeypatch.setattr(scale_check, "STEPS", [step])
    monkeypatch.setattr(scale_check, "in_new_process", lambda call, step: expected / 1.25)
    scale_check.memory()
    row = f"| 1 | float32 | {expected / 1e9:.2f} | {expected / 1.25e9:.2f} | +25 % |"
    assert row in capsys.readouterr().out


def test_a_difference_that_is_no_number_exceeds_every_bound():
    """verify.gap() of equal tensors, and of one with a NaN."""
    one, broken = torch.ones(2), torch.tensor([1.0, math.nan])
    assert verify.gap(one, one) == 0 and verify.gap(one, broken) == math.inf

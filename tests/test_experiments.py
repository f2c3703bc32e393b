"""Attention, stages, plans, claims, the report, and the benchmark against other packages."""

import functools
import json
import random
import re
import shlex
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import beit
import reproduce
from experiments import attention, baselines, benchmark, paper, report, short_runs, stages, tables
from images import sources

# -------------------------------------------------------- figure 2


def test_average_precision_of_a_hand_made_ranking():
    """Two rankings of four items against average precision by hand."""
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]])
    relevant = torch.tensor([[True, True, False, False], [False, False, False, True]])
    found = attention.average_precision(scores, relevant)
    assert found.tolist() == pytest.approx([(1 + 2 / 4) / 2, 1.0])


def test_attention_that_knows_the_objects_scores_100():
    """separation() of a model that attends to its own object, and of one that attends elsewhere.

    Chance is the share of the other patches that are on the same object: 3 of 15.
    """
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[:, :4, :4], masks[:, 4:, 4:] = 1, 2
    source = sources.Arrays("two objects", np.zeros((2, 8, 8, 3), np.uint8), masks=masks)
    classes = attention.patch_classes(torch.from_numpy(masks[0]), 2)
    same = F.pad((classes[:, None] == classes).float(), (1, 0, 1, 0))  # (N+1, N+1), e_[S] first
    config = beit.BeitConfig(image_size=8, patch_size=2, dim=16, depth=2, heads=2)

    def looking(weights):
        last_attention = functools.partial(lambda weights, x: weights.expand(1, 2, -1, -1), weights)
        return types.SimpleNamespace(config=config, last_attention=last_attention)

    models = {"knows": looking(same), "opposite": looking(-same)}
    found = attention.separation(models, "half", source, 2)
    assert found["knows"] == pytest.approx(100)
    assert found["chance"] == pytest.approx(100 * 3 / 15)
    assert found["opposite"] < found["chance"]


def test_figure_2(arrays, made, tmp_path, capsys):
    """The command draws a picture, and measures; a set without masks is an error."""
    picture, checkpoint = tmp_path / "attention.png", str(made / "beit" / "checkpoint.pt")
    flags = ["--data", arrays, "--points", "0,0", "3,2", "--out", str(picture)]
    attention.main([checkpoint, "3", "4", *flags])
    assert picture.stat().st_size > 100
    attention.main([checkpoint, "--data", arrays, "--measure", "3"])
    scores = dict(re.findall(r"(.+?) +average precision ([\d.]+)", capsys.readouterr().out))
    assert list(scores) == ["pre-trained", "random weights", "nearness", "pixels", "chance"]
    assert all(0 < float(score) <= 100 for score in scores.values())
    unmasked = sources.Arrays("no masks", np.zeros((1, 16, 16), np.uint8))
    models, _ = attention.load_models(checkpoint)
    with pytest.raises(ValueError, match="no masks has no masks"):
        attention.separation(models, "half", unmasked, 1)


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
    message = r"stage tokenizer-\w{8} ended with status 2: .* is neither"
    with pytest.raises(ValueError, match=message):
        runner.stage(*call, "--quantizer", "none")


def test_reproduce_is_resumed_only_with_its_own_settings_and_data(arrays, tmp_path):
    """Another number of seeds, or other images under the same path: refused by name."""
    data = tmp_path / "set.npz"
    content = {name.replace("val", "test"): values for name, values in np.load(arrays).items()}
    np.savez(data, **content)
    settings = paper.settings("demo") | {"data": str(data)}

    def start(settings):
        with stages.Runner(tmp_path / "out", "demo", settings):
            pass

    start(settings)
    start(settings)
    with pytest.raises(ValueError, match="settings: seeds changed since .*: 3 then, 5 now"):
        start(settings | {"seeds": 5})
    np.savez(data, **content | {"test_labels": content["test_labels"][::-1]})
    with pytest.raises(ValueError, match=r"data: labels \(digest\) of .* test changed since"):
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
    """Stages report at once and run nothing; the same stage has the same numbers."""

    def execute(self, name, script, flags, threads, resumed):
        rng = random.Random(name)
        numbers = {key: rng.random() for names in short_runs.RESULTS.values() for key in names}
        return numbers | {"commonest_token": 0.1, "stage1_nats": 1.0, "stage2_nats": -1.0}

    monkeypatch.setattr(stages.Runner, "execute", execute)
    monkeypatch.setattr(baselines, "raw_pixels", lambda runner, labels: {"values": [[1.0, 2.0]]})


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
    tested = [claim for claim in tables.CLAIMS if claim[1] not in ("figure 2", "grid 14")]
    assert len(saved["tables"]["claims"]["rows"]) == len(tested)


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
    with pytest.raises(SystemExit):
        reproduce.main(["--grid14", "--out", str(tmp_path / "demo")])


def test_estimate_follows_the_stages_that_have_ended(tmp_path):
    """Recorded 100 and 50 seconds: 150 before the first; if it takes 200, then 100 are left."""
    progress = stages.Progress({"tokenizer": 100.0, "beit-0": 50.0}, jobs=1)
    first = progress.add("tokenizer-00000000", "train_tokenizer.py", tmp_path / "a.log", True)
    progress.add("beit-0-00000000", "pretrain.py", tmp_path / "b.log", True)
    assert progress.seconds_left() == pytest.approx(150)
    first.started, first.seconds = time.time() - 200, 200.0
    assert progress.seconds_left() == pytest.approx(100)


# -------------------------------------------------------- claims and the report


def test_verdicts_need_twice_the_pooled_deviation(monkeypatch):
    """Differences of means against twice the pooled deviation: 5 > 2 * 1.41, 1.8 < 2 * 1.04."""
    claims = [("far", "t", 1, "a", "b"), ("near", "t", 1, "c", "b"), ("less", "t", 1, "b", "a")]
    monkeypatch.setattr(tables, "CLAIMS", claims)
    values = {"a": [[10.0, 12.0]], "b": [[7.0, 5.0]], "c": [[7.5], [8.1]]}
    rows = [[row, {"values": runs}] for row, runs in values.items()]
    found = {claim: verdict for claim, verdict, _ in tables.verdicts({"t": {"rows": rows}})["rows"]}
    assert found == {"far": "holds", "near": "undecided", "less": "does not hold"}


def test_report_is_one_page_with_tables_curves_and_pictures(arrays, made, tmp_path):
    """A page of three stages: its tables, curves, pictures and commands; it loads nothing else."""
    names = {"tokenizer": "tokenizer", "cls": "cls100-beit-0-0", "seg": "seg-beit-0-0"}
    for stage, name in names.items():
        shutil.copytree(made / stage, tmp_path / f"{name}-00000000")
        command = [short_runs.SCRIPTS[stage][0], *short_runs.script_flags(stage, arrays, made)]
        record = {"command": shlex.join(command), "seconds": 1.0, "threads": 1, "resumed": False}
        record["result"] = {}
        (tmp_path / f"{name}-00000000.json").write_text(json.dumps(record))
    table = {"title": "Summary", "columns": ["", "top-1"], "rows": [["<BEiT>", 12.5]]}
    tables.save_results(types.SimpleNamespace(out=tmp_path, recipe="demo"), {"summary": table})
    page = report.write(tmp_path).read_text()
    assert "<td>&lt;BEiT&gt;</td>" in page and "12.5" in page
    assert page.count("<svg") == 3 and page.count('src="data:image/png;base64,') == 2
    assert re.findall(r'src="(?!data:)|<script|<link|@import|url\(', page) == []


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


def test_benchmarks_count_of_a_step_is_what_torch_counts():
    """flop_of_step against torch's counter, apart from what it counts though we leave it out.

    That is block L's projection and MLP at rows without a prediction, and the gradient of pixels.
    """
    config, cpu = beit.BeitConfig(dim=48, heads=3, depth=3, drop_path=0.0), torch.device("cpu")
    _, loss = benchmark.ours(config, cpu)
    x, _, mask = next(benchmark.batches(2, config, cpu))
    z = torch.zeros(2, 196, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss(x, mask, z).backward()
    tokens, left_out = 2 * 197, 2 * 197 - int(mask.sum())
    expected = benchmark.flop_of_step(config, 2) - 6 * left_out * 9 * 48**2
    expected -= 2 * tokens * 3 * 16**2 * 48
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)

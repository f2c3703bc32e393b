"""The four scripts: alone, resumed, under torchrun, with workers; ablations; --benchmark."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit
import dvae
import finetune_cls
import pretrain
import train_tokenizer
from experiments import short_runs
from images import labelled, sources
from plumbing import checkpoints, clock, command_line, log, noise, processes, run

every_script = pytest.mark.parametrize("stage", short_runs.SCRIPTS)


def logged(out, name="loss"):
    """The values of `name` in the log of a run's --out folder."""
    return [record[name] for record in log.read_metrics(out) if name in record]


@every_script
def test_script_writes_its_result_checkpoint_and_pictures(stage, made):
    """The final record has finite results, each step was logged, and pictures were written."""
    final, results = log.read_metrics(made / stage)[-1], short_runs.RESULTS[stage]
    assert final["final"] is True and results <= final.keys()
    assert all(math.isfinite(final[name]) for name in results)
    assert [m["step"] for m in log.read_metrics(made / stage) if "loss" in m] == [1, 2, 3, 4]
    files = {
        "tokenizer": ["reconstructions.png"],
        "beit": ["predictions.png"],
        "cls": [],
        "seg": ["segmentation.png"],
    }
    for name in (*files[stage], "loss.svg", "checkpoint.pt"):
        assert (made / stage / name).stat().st_size > 100


# -------------------------------------------------------- a step


def loss_by_hand(stage, model, step, batch, args):
    """The loss of a step from its formula; batch: as the loader gives it."""
    images, *more = batch
    x, process = images / 127.5 - 1, processes.Process()
    if stage == "tokenizer":
        tau = [1, 17 / 32, 1 / 16, 1 / 16][step]  # a cosine of two steps
        e = noise.code_noise(model.config, images, 0, step, 0)
        return model(images / 255, tau, 0.01 * min(step / 2, 1), e)[0]
    u = noise.depth_noise(model.config, len(x), 0, step, process)
    if stage == "beit":
        pixels, mask = more[0] / 255, more[1].flatten(1)
        z = dvae.load_tokenizer(args.tokenizer).tokens(pixels).flatten(1)
        return F.cross_entropy(model(x, mask, u=u), z[mask])
    if stage == "cls":
        targets, rng = F.one_hot(more[0], 4).float(), noise.sample_rng(0, step, "mix")
        x, targets = labelled.mix(x, targets, 0.8, 1.0, rng)
        return F.cross_entropy(model(x, u), targets, label_smoothing=0.1)
    return F.cross_entropy(model(x, u), more[0].long(), ignore_index=sources.IGNORE)


@every_script
def test_losses_and_learning_rates_are_those_of_their_formulas(
    stage, arrays, made, tmp_path, monkeypatch
):
    """Each of four steps starts from new random weights, with all noise on.

    In segmentation a quarter of each mask is ignored.
    """
    losses, rates, steps = [], [], run.Run.steps

    def watched(self, *given):
        model, optimizer, _ = self.saved
        assert not self.held_out.train
        for step, batch in steps(self, *given):
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
            if stage == "seg":
                batch[1][:, :4] = sources.IGNORE
            with torch.no_grad():
                losses.append(loss_by_hand(stage, model, step, batch, self.args).item())
            yield step, batch
            rates.append({round(group["lr"] / 0.01, 6) for group in optimizer.param_groups})

    monkeypatch.setattr(run.Run, "steps", watched)
    flags = [*short_runs.script_flags(stage, arrays, made), *short_runs.NOISE[stage]]
    flags += ["--beta-steps", "2"] if stage == "tokenizer" else []
    short_runs.MODULES[stage].main([*flags, "--lr", "0.01", "--out", str(tmp_path / "run")])
    assert logged(tmp_path / "run") == pytest.approx(losses, rel=1e-4)
    low = {"tokenizer": 1e-4, "beit": 1e-5, "cls": 1e-6}.get(stage, 0) / 0.01
    shares = [1, 1, 0.75, 0.25]  # one step of warm-up, then a cosine
    if stage == "seg":
        shares = [1, 1, 2 / 3, 1 / 3]  # a straight line
    decay = {"cls": 0.75, "seg": 0.5}.get(stage, 1)
    for found, share in zip(rates, shares, strict=True):
        share = low + (1 - low) * share
        expected = [share * decay**layer for layer in range(6 if decay < 1 else 1)]
        assert sorted(found, reverse=True) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", ["beit", "cls", "seg"])
def test_clip_decay_and_betas_reach_their_optimiser(stage, arrays, made, tmp_path, monkeypatch):
    """--clip as clip_grad_norm_'s limit, with 0 none; --beta2 and --weight-decay as AdamW's."""
    limits, made_with, clip, adamw = [], [], nn.utils.clip_grad_norm_, torch.optim.AdamW

    def watched_clip(parameters, limit):
        limits.append(limit)
        return clip(parameters, limit)

    def watched_adamw(groups, **settings):
        made_with.append(({group["weight_decay"] for group in groups}, settings["betas"]))
        return adamw(groups, **settings)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(torch.optim, "AdamW", watched_adamw)
    common = short_runs.script_flags(stage, arrays, made)
    flags = ["--clip", "0.5", "--weight-decay", "0.1", "--beta2", "0.9"]
    short_runs.MODULES[stage].main([*common, *flags, "--out", str(tmp_path / "run")])
    assert limits == [0.5] * 4 and made_with == [({0.0, 0.1}, (0.9, 0.9))]
    short_runs.MODULES[stage].main([*common, "--clip", "0", "--out", str(tmp_path / "free")])
    assert limits[4:] == [math.inf] * 4


def test_weight_decay_reaches_the_tokenizers_adamw(arrays, made, tmp_path, monkeypatch):
    """With --weight-decay the tokenizer's optimiser is AdamW, with that decay."""
    made_with, adamw = [], torch.optim.AdamW

    def watched_adamw(parameters, **settings):
        made_with.append(settings["weight_decay"])
        return adamw(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", watched_adamw)
    flags = ["--weight-decay", "0.3", "--out", str(tmp_path / "run")]
    train_tokenizer.main([*short_runs.script_flags("tokenizer", arrays, made), *flags])
    assert made_with == [0.3]


@pytest.mark.parametrize(
    "stage, flags, expected",
    [
        ("seg", "--decay-from-start --lr 0.01", {"lr": [0.01, 0.0075, 0.005, 0.0025]}),
        ("beit", "--lr 0.01 --min-lr 0", {"lr": [0.01, 0.01, 0.0075, 0.0025]}),
        (
            "tokenizer",
            "--tau 0.2 --beta 0.3 --beta-steps 2",
            {"tau": [1, 0.6, 0.2, 0.2], "beta": [0, 0.15, 0.3, 0.3]},
        ),
    ],
    ids=["seg", "beit", "tokenizer"],
)
def test_schedules_are_those_of_the_flags(stage, flags, expected, arrays, made, tmp_path):
    """What the log says of each of four steps, one of them of warm-up, or two of annealing."""
    flags = [*short_runs.script_flags(stage, arrays, made), *flags.split()]
    short_runs.MODULES[stage].main([*flags, "--out", str(tmp_path / "run")])
    for name, values in expected.items():
        assert logged(tmp_path / "run", name) == pytest.approx(values)


@pytest.mark.parametrize("stage", ["beit", "cls", "seg"])
def test_drop_path_and_positions_reach_the_model(stage, arrays, made, tmp_path):
    """The configuration in the checkpoint against the flags; fine-tuning keeps the positions."""
    flags = [*short_runs.script_flags(stage, arrays, made), "--drop-path", "0.3"]
    flags += ["--positions", "shared"] if stage == "beit" else []
    short_runs.MODULES[stage].main([*flags, "--out", str(tmp_path / "run")])
    config = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["config"]
    assert config["drop_path"] == 0.3
    assert config["positions"] == ("shared" if stage == "beit" else "absolute")


# -------------------------------------------------------- resuming and processes


@every_script
def test_resumed_run_ends_with_the_same_bits(stage, arrays, made, tmp_path, monkeypatch):
    """A run stopped after two of four steps and resumed against one that nobody stopped.

    Resuming a run that has finished evaluates again and changes nothing.
    """

    class Stop(Exception):
        pass

    save, main = checkpoints.save, short_runs.MODULES[stage].main

    def save_and_stop(out, kind, args, step, *rest):
        save(out, kind, args, step, *rest)
        if step == 2:
            raise Stop

    flags = [*short_runs.script_flags(stage, arrays, made), *short_runs.NOISE[stage]]
    main([*flags, "--out", str(tmp_path / "whole")])
    flags += ["--save-every", "2", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as stopping:
        stopping.setattr(checkpoints, "save", save_and_stop)
        with pytest.raises(Stop):
            main(flags)
    main([*flags, "--resume"])
    assert not short_runs.different_weights(tmp_path / "whole", tmp_path / "run")
    steps = [m["step"] for m in log.read_metrics(tmp_path / "run") if "loss" in m]
    assert steps == [1, 2, 3, 4]
    main([*flags, "--resume"])
    assert not short_runs.different_weights(tmp_path / "whole", tmp_path / "run")


@every_script
def test_two_processes_equal_one(stage, arrays, made, tmp_path):
    """Two processes with two accumulation passes each against one: four steps, noise and all.

    The learning rate is small, because AdamW turns a gradient that is a rounding error into a
    whole step. Standardised logits give some biases such gradients: see the next test for them.
    """
    flags = [*short_runs.script_flags(stage, arrays, made), *short_runs.NOISE[stage]]
    flags += ["--lr", "1e-4"]
    flags += ["--no-normalise-logits"] if stage == "tokenizer" else []
    one, two = tmp_path / "one", tmp_path / "two"
    short_runs.MODULES[stage].main([*flags, "--out", str(one)])
    script = short_runs.SCRIPTS[stage][0]
    done = short_runs.torchrun(script, *flags, "--out", str(two), "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    for a, b in zip(log.read_metrics(one), log.read_metrics(two), strict=True):
        for name in {"loss", "gradient_norm", "kl", "reconstruction"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    one, two = short_runs.weights(one), short_runs.weights(two)
    assert max((one[name] - two[name]).abs().mean() for name in one) < 1e-6


@pytest.mark.parametrize("more", [(), ("--quantizer", "vq")], ids=["standardised logits", "vq"])
def test_tokenizers_statistics_are_of_all_processes(more, arrays, tmp_path):
    """The loss of two processes at each step against that of one.

    Batch statistics and dead codes are those of the global batch.
    """
    flags = [*short_runs.script_flags("tokenizer", arrays, tmp_path), *more, "--lr", "1e-4"]
    if more:  # VQ-VAE has no temperature
        place = flags.index("--tau-steps")
        del flags[place : place + 2]
    train_tokenizer.main([*flags, "--out", str(tmp_path / "one")])
    done = short_runs.torchrun("train_tokenizer.py", *flags, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "one") == pytest.approx(logged(tmp_path / "two"), rel=1e-4)
    one, two = (short_runs.weights(tmp_path / name) for name in ("one", "two"))
    statistics = [name for name in one if "running" in name]
    assert bool(statistics) == (not more)
    for name in statistics:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5), name


def test_workers_change_nothing(arrays, made, tmp_path):
    """Weights after a run with two loader processes against one without, bit for bit."""
    flags = [*short_runs.script_flags("beit", arrays, made), "--workers", "2"]
    pretrain.main([*flags, "--out", str(tmp_path / "run")])
    assert not short_runs.different_weights(made / "beit", tmp_path / "run")


# -------------------------------------------------------- other modes


@pytest.mark.parametrize(
    "flags",
    [
        ("--target", "pixels"),
        ("--target", "normalised-pixels", "--masking", "random"),
        ("--recover", "all"),
        ("--recover", "all", "--masking", "none"),
    ],
    ids=" ".join,
)
def test_ablations_of_table_4_run(flags, arrays, made, tmp_path):
    """Each runs to a finite loss and a picture; pixels have no accuracy and need no tokenizer.

    The loss of all positions is a mean over them: an untrained model is at ln 16, with 16 codes.
    """
    common = short_runs.script_flags("beit", arrays, made)
    if "--target" in flags:
        for flag in ("--tokenizer", "--token-size"):
            place = common.index(flag)
            del common[place : place + 2]
    pretrain.main([*common, *flags, "--out", str(tmp_path / "run")])
    final = log.read_metrics(tmp_path / "run")[-1]
    assert math.isfinite(final["mim_loss"])
    assert ("mim_accuracy" in final) == ("--target" not in flags)
    if "--recover" in flags:
        assert logged(tmp_path / "run")[0] == pytest.approx(math.log(16), rel=0.05)
        assert final["mim_loss"] == pytest.approx(-final["stage2_nats"] / 16)
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 100


def test_linear_probe_trains_norm_and_head_only(arrays, tmp_path):
    """Weights after --linear-probe against the initial ones: only fc_norm and head differ."""
    flags = ["--data", arrays, "--init", "random", "--image-size", "16", "--batch-size", "8"]
    flags += ["--epochs", "1", "--warmup-epochs", "0", "--labels-per-class", "0"]
    flags += ["--linear-probe", "--device", "cpu", "--out", str(tmp_path / "probe")]
    finetune_cls.main(flags)
    trained = checkpoints.load(tmp_path / "probe" / "checkpoint.pt", "classification")["model"]
    torch.manual_seed(0)
    config = beit.finetuned_config(None, "tiny", 16, 0.0)
    fresh = finetune_cls.BeitForClassification(config, 4).state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_evaluate_only_repeats_the_final_result(arrays, made, capsys):
    """What --eval prints against the final record of the run that made the checkpoint.

    The data are those of the run, and nothing is interpolated, whatever the recipe's size.
    """
    init = ["--eval", "--init", str(made / "cls" / "checkpoint.pt"), "--recipe", "photos"]
    finetune_cls.main([*init, "--device", "cpu", "--amp", "off"])
    final = log.read_metrics(made / "cls")[-1]
    said = capsys.readouterr().out
    assert f"top1 {final['top1']:.5g}" in said
    assert f"images of {arrays}, 16 x 16 pixels" in said and "interpolated" not in said


@every_script
def test_benchmark_times_every_part_and_writes_nothing(
    stage, arrays, made, tmp_path, monkeypatch, capsys
):
    """--benchmark names every part of a step with its time, in both phases, and the memory."""
    monkeypatch.chdir(tmp_path)
    flags = [*short_runs.script_flags(stage, arrays, made, log=()), "--benchmark", "2"]
    short_runs.MODULES[stage].main([*flags, "--accumulate", "2"])
    printed = capsys.readouterr().out
    for phase in clock.Clock.PHASES:
        (line,) = (line for line in printed.splitlines() if line.startswith(phase))
        times = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)(?=,|$)", line)}
        assert set(times) >= {"data", "forward", "backward", "optimiser"}
        assert ("tokenizer" in times) == (stage == "beit")
        assert all(value >= 0 for value in times.values()) and times["backward"] > 0
    assert float(re.search(r"peak memory ([\d.]+) GiB", printed)[1]) > 0.05
    assert re.search(r"\nthis run: \d+ steps, about \d+ \w+ on 1 process\n$", printed)
    with pytest.raises(ValueError, match="--benchmark 4 needs a run of 5 steps, and this has"):
        short_runs.MODULES[stage].main([*flags[:-1], "4"])
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    """A named set stays itself; another folder needs an image size in a small recipe."""
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "cifar10", "pets"):
        (tmp_path / name).mkdir()
        parser = command_line.recipe_parser(pretrain.__doc__, pretrain.RECIPES)
        flags = ["--data", name, "--out", "runs/beit"]
        if name != "pets":
            assert command_line.parse_recipe(parser, pretrain.RECIPES, flags).image_size == 24
        else:
            with pytest.raises(SystemExit):
                command_line.parse_recipe(parser, pretrain.RECIPES, flags)
            assert "made for small drawings" in capsys.readouterr().err

"""Schedules, noise, processes, signals, checkpoints, log, pictures and clock."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import pretrain
from experiments import short_runs
from plumbing import (
    advice,
    checkpoints,
    log,
    noise,
    pictures,
    processes,
    run,
    schedules,
    signals,
    weights,
)
from plumbing.clock import Clock

# -------------------------------------------------------- schedules, noise, compilation


def test_schedules():
    """Learning rates, temperature and KL weight against their values at chosen steps."""
    rates = [schedules.warmup_cosine(s, 100, 10, 1.0, 0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.55)
    assert min(rates[10:]) >= 0.1
    linear = [schedules.warmup_linear(s, 100, 10, 2.0) for s in range(101)]
    assert linear[9] == linear[10] == 2.0 and linear[55] == pytest.approx(1) and linear[100] == 0
    tau = [schedules.cosine(s, 150_000, 1, 1 / 16) for s in (0, 150_000, 200_000)]
    assert tau == [1, 1 / 16, 1 / 16]
    assert [schedules.ramp(s, 5000, 6.6) for s in (0, 2500, 9000)] == [0, 3.3, 6.6]
    assert schedules.ramp(0, 0, 2.0) == schedules.cosine(0, 0, 1.0, 2.0) == 2.0
    epochs = types.SimpleNamespace(epochs=4.4, warmup_epochs=0.3)
    assert schedules.step_counts(epochs, 429) == (1888, 129)  # 1887.6, 128.7


def test_advice_is_given_below_its_limits_only():
    """A perplexity of 8 codes; a loss less than 0.02 below that of the tokens' shares."""
    assert advice.codebook({"codebook_perplexity": 7.9})
    assert not advice.codebook({"codebook_perplexity": 8.1})
    assert advice.masked_tokens({"mim_loss": 2.0, "token_entropy": 2.01})
    assert not advice.masked_tokens({"mim_loss": 1.9, "token_entropy": 2.0})


def test_auto_precision_is_bf16_where_the_cpu_computes_in_it(monkeypatch):
    """--amp auto on a CPU with and without fast bf16."""
    for bf16 in (True, False):
        monkeypatch.setattr(processes, "computes_in_bf16", lambda device: bf16)
        with processes.precision("auto", torch.device("cpu"))[0]():
            assert torch.is_autocast_enabled("cpu") == bf16


def test_noise_is_a_function_of_the_place_in_the_global_batch():
    """Noise of a batch of 8 in one part against the same batch in two and in four parts.

    Another step has other numbers. Each distribution has its mean or variance.
    """

    def draw(count, part, step=3, distribution="exponential"):
        device = torch.device("cpu")
        return noise.sample_noise(distribution, (5, 7), count, 1, step, part, device)

    whole = draw(8, 0)
    assert torch.equal(torch.cat([draw(4, 0), draw(4, 1)]), whole)
    assert torch.equal(torch.cat([draw(2, part) for part in range(4)]), whole)
    assert not torch.equal(draw(8, 0, step=4), whole)
    many = draw(2000, 0)
    assert many.min() >= 0 and many.mean().item() == pytest.approx(1, abs=0.02)
    uniform = draw(2000, 0, distribution="uniform")
    assert 0 <= uniform.min() and uniform.max() < 1
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_is_the_plain_function():
    """processes.compiled accepts its option, and without a compiler computes the same."""
    compiled = processes.compiled(pretrain.recovery_loss, torch.device("cpu"))
    prediction, z = torch.randn(4, 11), torch.randint(11, (4,))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compiled(prediction, z), pretrain.recovery_loss(prediction, z))


# -------------------------------------------------------- signals and checkpoints


def test_second_interrupt_is_not_waited_for(monkeypatch):
    """The first SIGINT asks the loop to stop; the second ends the process at once."""
    monkeypatch.setattr(signals, "received", [])
    monkeypatch.setattr(signals, "end_now", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    signals.handle(signal.SIGINT, None)
    assert signals.stop_asked()
    with pytest.raises(KeyboardInterrupt):
        signals.handle(signal.SIGINT, None)


def test_output_that_is_in_use_is_refused(tmp_path):
    """Locking a folder that another process has locked names that process; a dead one has none."""
    code = (
        "import pathlib, sys; from plumbing import checkpoints\n"
        "checkpoints.lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); input()"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=short_runs.HERE, stdin=pipe, stdout=pipe, text=True
    ) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {owner.pid} on"):
            checkpoints.lock(tmp_path)
        owner.kill()
    checkpoints.lock(tmp_path)
    assert checkpoints.read_lock(tmp_path)["pid"] == os.getpid()


def test_a_flipped_bit_in_a_checkpoint_is_found(made, tmp_path):
    """A checkpoint with one changed bit is refused by its checksum."""
    content = bytearray((made / "cls" / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file of weights: the checksum of .* differs"):
        weights.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read .Input/output error."),
        (MemoryError("17 GiB"), "17 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
        (OSError(errno.EINVAL, "Invalid argument"), None),
        (RuntimeError("unexpected pos"), None),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    error, says, made, tmp_path, monkeypatch
):
    """A disk or allocator that fails ends --resume; what torch says of a bad file does not."""
    for name in checkpoints.CHECKPOINTS:
        (tmp_path / name).write_bytes((made / "cls" / "checkpoint.pt").read_bytes())
    load, calls = torch.load, []

    def fail_once(*args, **more):
        if not calls:
            calls.append(1)
            raise error
        return load(*args, **more)

    monkeypatch.setattr(torch, "load", fail_once)
    monkeypatch.setattr(checkpoints, "DAMAGED", set())
    if says:
        with pytest.raises((OSError, ValueError, MemoryError, RuntimeError), match=says):
            checkpoints.newest_whole(tmp_path, "classification")
        assert not checkpoints.DAMAGED
    else:
        path, _, damage = checkpoints.newest_whole(tmp_path, "classification")
        assert path.name == "previous.pt" and "checkpoint.pt is not a whole file" in damage


def test_all_processes_resume_from_the_one_that_the_first_chose(made, tmp_path, monkeypatch):
    """The second of two, to which checkpoint.pt looks whole: the first says previous.pt."""
    for name in checkpoints.CHECKPOINTS:
        (tmp_path / name).write_bytes((made / "cls" / "checkpoint.pt").read_bytes())

    def broadcast(answer):
        answer[:] = [(None, ("previous.pt", "checkpoint.pt is not whole"))]

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", broadcast)
    path, state, _ = checkpoints.newest_whole(tmp_path, "classification")
    assert path.name == "previous.pt" and state["kind"] == "classification"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Saving names the entry that is not finite, and writes no file."""
    model = nn.ModuleDict({"lm_head": nn.Linear(2, 3)})
    model.lm_head.bias.data[0] = math.inf
    with pytest.raises(ValueError, match="lm_head.bias is not finite after step 7"):
        checkpoints.save(tmp_path, "pretraining", types.SimpleNamespace(), 7, model, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["beit", "cls", "seg"])
def test_step_without_a_finite_gradient_is_skipped(stage, arrays, made, tmp_path, monkeypatch):
    """The third step's gradient is made NaN: weights after it against those before.

    The log counts it.
    """
    norms, clip = [], nn.utils.clip_grad_norm_

    def broken(*args):
        norms.append(clip(*args))
        return torch.tensor(math.nan) if len(norms) == 3 else norms[-1]

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", broken)
    saved, save = {}, checkpoints.save

    def remember(out, kind, args, step, model, *rest):
        saved[step] = {name: value.clone() for name, value in model.state_dict().items()}
        save(out, kind, args, step, model, *rest)

    monkeypatch.setattr(checkpoints, "save", remember)
    flags = [*short_runs.script_flags(stage, arrays, made), "--save-every", "1"]
    short_runs.MODULES[stage].main([*flags, "--out", str(tmp_path / "run")])
    assert all(torch.equal(saved[2][name], saved[3][name]) for name in saved[2])
    assert not all(torch.equal(saved[3][name], saved[4][name]) for name in saved[3])
    records = [m for m in log.read_metrics(tmp_path / "run") if "loss" in m]
    assert [m.get("skipped_steps", 0) for m in records] == [0, 0, 1, 1]


def test_ten_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path):
    """Nine are skipped; the tenth is an error that names the step and its learning rate."""
    finite = run.FiniteSteps(tmp_path, 0, 100)
    assert not any(finite.allow(math.inf, step, 0.1) for step in range(9))
    message = r"10 steps in a row, the last of them step 10 at learning rate 0.1.*last good"
    with pytest.raises(ValueError, match=message):
        finite.allow(math.nan, 9, 0.1)


def test_a_run_whose_last_steps_were_skipped_fails(tmp_path):
    """The last two of twelve steps, or the only step of a resumed run: not the end of training."""
    finite = run.FiniteSteps(tmp_path, 0, 12)
    assert [finite.allow(norm, step, 0.1) for step, norm in ((9, 1.0), (10, math.nan))] == [1, 0]
    with pytest.raises(ValueError, match="not finite in 2 steps in a row, the last of them"):
        finite.allow(math.nan, 11, 0.1)
    with pytest.raises(ValueError, match="not finite in 1 steps"):
        run.FiniteSteps(tmp_path, 11, 12).allow(math.nan, 11, 0.1)


# -------------------------------------------------------- log and pictures


def test_unfinished_last_line_of_the_log_is_left_out(tmp_path):
    """A log whose last line was cut off: reading leaves it out, resuming removes it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert log.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    log.Log(tmp_path, 9, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    "line",
    [
        *(b"[]", b"1", b"garbage", b"\xff\xfe", b'{"step": NaN}', b'{"step": 1e999}', b"{}"),
        *(b'{"step": -1}', b'{"step": true}', b'{"step": 1, "loss": "low"}', b"[" * 100_000),
    ],
    ids=lambda line: line[:20].decode(errors="replace"),
)
def test_line_of_the_log_that_is_no_record_is_refused(line, tmp_path):
    """The message names the file and the line; the same as a lock means that nobody holds it."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: ") as refused:
        log.Log(tmp_path, 9, first_step=1)
    assert "\n" not in str(refused.value)
    (tmp_path / "lock").write_bytes(line)
    assert checkpoints.read_lock(tmp_path) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name on this system")
def test_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    """metrics.jsonl as a pipe that nobody writes to: one line that names it."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl is not a regular file"):
        log.read_metrics(tmp_path)


def test_nan_in_the_log_of_an_earlier_version_is_null(tmp_path):
    """A skipped step's loss: --resume reads it, and writes null in its place."""
    line = '{"step": 1, "loss": %s, "mse": %s}\n'
    (tmp_path / "metrics.jsonl").write_text(line % ("NaN", "-Infinity"))
    log.Log(tmp_path, 9, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == line % ("null", "null")


def test_log_never_holds_nan(tmp_path):
    """A loss that is not finite is null in the log; as the result it is an error."""
    writer = log.Log(tmp_path, 2)
    writer.step(1, 8, loss=math.nan, lr=0.1)
    (record,) = log.read_metrics(tmp_path)
    assert record["loss"] is None and record["lr"] == 0.1
    with pytest.raises(ValueError, match="the result is not finite, miou is nan"):
        writer.final(miou=math.nan)
    assert len(log.read_metrics(tmp_path)) == 1


def test_png_can_be_read(tmp_path):
    """Pixels written by write_png against those that Pillow reads."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    pictures.write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(np.asarray(image.open(tmp_path / "a.png")), pixels)


def test_loss_curve_has_labelled_axes_and_values(tmp_path):
    """loss.svg is XML; it names its axes and shows the last training and held-out loss.

    The loss of a skipped step, which is no number, is left out.
    """
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.25}\n'
        '{"step": 3, "mim_loss": 2.75}\n{"final": true, "mim_loss": 2.5}\n'
    )
    pictures.loss_curve(tmp_path)
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"step", "loss", "training", "held out", "2.25", "2.75"} <= texts
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(line.get("points").split()) for line in lines] == [2, 1]


def test_a_long_legend_takes_several_lines():
    """Four names of 20 letters in 300 pixels: none ends beyond them, and the last line is below."""
    parts, last = pictures.svg_legend(["a" * 20] * 4, ["#000000"] * 4, 40, 300, 41)
    texts = [re.search(r'<text x="([\d.]+)" y="([\d.]+)"', part) for part in parts]
    places = [tuple(map(float, found.groups())) for found in texts if found]
    assert len(set(places)) == 4 and max(y for _, y in places) == last > 41
    assert all(x + 20 * pictures.CHARACTER <= 300 for x, _ in places)


# -------------------------------------------------------- clock


def test_benchmark_counts_what_a_step_multiplies():
    """Clock's operations of a linear layer's step against 2 products of 2 B n m each.

    They are the forward pass and the weight's gradient.
    """
    clock, layer = Clock(1, processes.Process()), nn.Linear(5, 7, bias=False)
    for x in clock.batches(torch.utils.data.DataLoader([torch.randn(3, 5)] * 9, batch_size=None)):
        layer(x).sum().backward()
        clock.begin("all")
    assert clock.flop == 2 * (2 * 3 * 5 * 7)
    assert [len(clock.seconds[phase]) for phase in clock.PHASES] == [1, 1]

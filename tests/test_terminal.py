"""What a run says on the terminal: lines at its start, evaluations, warnings, errors."""

import re
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import train_tokenizer
from experiments import short_runs, stages
from plumbing import command_line, log, processes, signals
from plumbing.run import Run, evaluate_only


@dataclass
class Config:
    """The only thing that a run asks of a model's configuration."""

    grid: int = 3


class Pictures(list):
    """A training or held-out set of 32 samples that loads nothing."""

    def __init__(self, count=32):
        super().__init__([None] * count)

    def problems(self):
        return {}

    def fingerprint(self):
        return {}


class Loader(list):
    """Batches that are all empty."""

    num_workers = 0

    def __init__(self, dataset, steps):
        super().__init__([None] * steps)
        self.dataset = dataset


def make_run(out, steps=6, process=processes.Process(), config=Config(), **settings):
    """A Run of a model of 6 parameters, 4 of them trained; with a batch of 8 for 32 images."""
    args = {"batch_size": 8, "accumulate": 1, "out": str(out), "resume": False, "compile": False}
    args |= {"benchmark": None, "log_every": 1, "save_every": 2, "eval_images": 20}
    args |= {"image_size": 12, "data": "photos", "init": None}
    assert settings.keys() <= args.keys()
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    model.config = config
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = types.SimpleNamespace(**args | settings)
    return Run(args, "tokenizer", process, model, optimizer, steps, {}, Pictures(), Pictures(30))


def train(run, measure=lambda: {"mim_loss": 3.25}, draw=None, warn=None):
    """The steps of a run, in which nothing is computed."""
    for _ in run.steps(Loader(Pictures(), run.total - run.first), measure, draw, warn):
        run.report(torch.tensor(1.0))
    run.finish(measure, draw)


# -------------------------------------------------------- lines


def test_note_is_printed_by_the_first_process_only(capsys, monkeypatch):
    """Output with and without torchrun's RANK; on a terminal the updating line is cleared."""
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log.note(f"from {rank}")
    monkeypatch.delenv("RANK")
    log.note("alone")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.note("terminal")
    assert capsys.readouterr().out == "from 0\nalone\n\r\033[Kterminal\n"


def test_first_lines_say_what_runs_where(tmp_path, capsys):
    """Two lines against the settings of a run; an interrupted run says how many steps are done."""
    train(make_run(tmp_path / "run"))
    first, second = capsys.readouterr().out.splitlines()[:2]
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    assert first == (
        f"1 process on CPU with {threads} thread{plural}, float32; 6 parameters, "
        "4 of them trained; 12 x 12 pixels, 9 patches"
    )
    assert second == (
        "training on 32 images, evaluating on 20 of 30; 6 steps of 8 images (1.5 epochs)"
    )
    steps = Loader(Pictures(), 6)
    for step, _ in (stopped := make_run(tmp_path / "stopped")).steps(steps, dict):
        stopped.report(torch.tensor(1.0))
        if step == 3:  # the checkpoint after two steps is the newest
            break
    train(make_run(tmp_path / "stopped", resume=True))
    assert "(1.5 epochs), 2 of them done" in capsys.readouterr().out


def test_first_lines_of_the_tokenizer_count_its_tokens(arrays, tmp_path, capsys):
    """16 x 16 pixels make 4 x 4 tokens; with --benchmark nothing of this is printed."""
    flags = short_runs.script_flags("tokenizer", arrays, tmp_path)
    train_tokenizer.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "16 x 16 pixels, 16 tokens" in printed and "training on 32 images" in printed
    flags = short_runs.script_flags("tokenizer", arrays, tmp_path, log=())
    train_tokenizer.main([*flags, "--benchmark", "1"])
    printed = capsys.readouterr().out
    assert "training on" not in printed and "tokens" not in printed


def test_a_signal_saves_and_stops_after_the_step(tmp_path, monkeypatch):
    """In the third of six steps: its checkpoint is written, and --resume goes on there."""
    monkeypatch.setattr(signals, "received", [])
    run = make_run(tmp_path)
    with pytest.raises(signals.Stopped, match="after step 3 of 6: continue with --resume"):
        for step, _ in run.steps(Loader(Pictures(), 6), dict):
            run.report(torch.tensor(1.0))
            signals.received += [15] if step == 2 else []
    signals.received.clear()
    assert make_run(tmp_path, resume=True).first == 3


def test_finished_run_says_how_to_train_further(tmp_path, capsys):
    """Resuming a run that has finished: one line with --init, then the numbers again."""
    train(make_run(tmp_path))
    capsys.readouterr()
    train(make_run(tmp_path, resume=True))
    line, numbers = capsys.readouterr().out.splitlines()
    assert line.startswith("finished after 6 steps: evaluating again; to train further start a new")
    assert line.endswith(f"--init {tmp_path / 'checkpoint.pt'}") and numbers == "mim_loss 3.25"


def test_progress_of_a_run_can_be_read_from_what_it_prints(tmp_path, capsys):
    """The last step that stages.last_step finds after each line: no other line looks like one."""
    train(make_run(tmp_path / "run"))
    found, text = [], ""
    for line in capsys.readouterr().out.splitlines():
        text += line + "\n"
        (tmp_path / "log").write_text(text)
        found.append(stages.last_step(tmp_path / "log"))
    assert list(dict.fromkeys(found)) == [None, *((step, 6) for step in range(1, 7))]


def test_updating_line_fits_the_terminal(tmp_path, capsys, monkeypatch):
    """On a terminal of 40 columns a long line is cut, so that the next one can replace it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    log.Log(tmp_path, 9).step(3, 8, loss=1.5, gradient_norm=0.25, learning_rate=0.001)
    printed = capsys.readouterr().out
    assert printed.startswith("\r\033[Kstep 3/9  0m00s left  ") and "\n" not in printed
    assert len(printed) == len("\r\033[K") + 39


def test_time_left_has_no_sixtieth_second(tmp_path, capsys, monkeypatch):
    """119.6 seconds are 2m00s, not 1m60s."""
    clock = types.SimpleNamespace(monotonic=iter([0.0, 59.8]).__next__)
    monkeypatch.setattr(log, "time", clock)
    log.Log(tmp_path, 3).step(1, 8)
    assert "  2m00s left  " in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, text",
    [(1, "5 s"), (41, "45 s"), (61, "2 min"), (7801, "2 h 11 min"), (371_000, "4 d 8 h")],
)
def test_duration_is_rounded_up(seconds, text):
    """Seconds against their text."""
    assert log.duration(seconds) == text


@pytest.mark.parametrize(
    "step, steps, lines",
    [(2.0, 90, ["0.5 steps/s: about 3 min for 90 steps, evaluations not counted"]),
     (0.25, 960, ["4 steps/s: about 4 min for 960 steps, evaluations not counted"]),
     (2.0, 15, []), (0.25, 45, [])],
)  # fmt: skip
def test_estimate_counts_warm_steps_only(step, steps, lines, capsys, monkeypatch):
    """Steps of known lengths, the first of a minute and with an evaluation after each.

    The estimate is printed once, or never if the run ends before 10 steps or 10 seconds.
    """
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    estimate = log.Estimate(steps)
    for done in range(steps):
        estimate.begin()
        now[0] += step if done else 60
        estimate.end()
        now[0] += 7
    assert capsys.readouterr().out.splitlines() == lines


# -------------------------------------------------------- evaluations


def test_evaluations_within_a_run_are_printed_recorded_and_drawn(tmp_path, capsys):
    """Six steps, an evaluation after every second one; lists are recorded but not printed."""
    drawn = []

    def draw(out):
        drawn.append(log.read_metrics(out)[-1])

    train(make_run(tmp_path), lambda: {"mim_loss": 3.25, "iou": [1.0]}, draw)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "held out" in line] == [
        "step 2  held out: mim_loss 3.25",
        "step 4  held out: mim_loss 3.25",
    ]
    assert printed[-1] == "mim_loss 3.25"
    numbers = {"mim_loss": 3.25, "iou": [1.0]}
    assert drawn == [{"step": 2} | numbers, {"step": 4} | numbers, {"final": True} | numbers]
    assert (tmp_path / "loss.svg").exists()


def test_only_the_first_process_draws_and_prints(tmp_path, capsys, monkeypatch):
    """The second of two processes: it evaluates, but prints, records and draws nothing."""
    monkeypatch.setenv("RANK", "1")
    measured, drawn = [], []
    run = make_run(tmp_path, process=processes.Process(rank=1, world=2))
    train(run, lambda: measured.append(1) or {"mim_loss": 1.0}, drawn.append, lambda values: "bad")
    assert len(measured) == 3 and not drawn and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [(0, 1, 2), (1,), (2,), ()], ids=str)
def test_warning_is_printed_once(bad, tmp_path, capsys):
    """warn() sees the evaluations of the run's second half; those in `bad` make it warn."""
    numbers = iter(range(3))
    train(
        make_run(tmp_path),
        lambda: {"number": next(numbers)},
        warn=lambda values: f"number {values['number']}" if values["number"] in bad else None,
    )
    warnings = re.findall("^warning: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert warnings == [f"number {number}" for number in bad if number > 0][:1]


def test_few_held_out_images_are_said_and_give_no_warning(tmp_path, capsys):
    """The entropy of a few images' tokens is low, and a loss above it says nothing."""
    run = make_run(tmp_path, eval_images=19)
    train(run, warn=lambda values: "bad")
    said = capsys.readouterr().out
    assert "so few images say little in evaluation: use 20 or more" in said
    assert "warning" not in said


def test_evaluate_only_prints_the_numbers_and_draws(tmp_path, capsys):
    """--eval with --out: the folder exists before the measurement; without it nothing is drawn."""
    out, drawn = tmp_path / "a" / "look", []
    process, held_out = processes.Process(), Pictures(20)
    args = types.SimpleNamespace(out=str(out), eval_images=5, image_size=12, data="photos")

    def measure():
        return {"folder": out.is_dir(), "top1": 12.3456789}

    assert evaluate_only(args, process, held_out, measure, drawn.append) is None
    first = "evaluating on 5 of 20 images of photos, 12 x 12 pixels\n"
    assert drawn == [out] and capsys.readouterr().out == first + "folder 1  top1 12.346\n"
    with pytest.raises(ValueError, match="draws no pictures of a classifier: leave out --out"):
        evaluate_only(args, process, held_out, measure)
    args.out = None
    evaluate_only(args, process, held_out, measure, drawn.append)
    assert drawn == [out]


@pytest.mark.parametrize("name", ["full", "full/file"])
def test_evaluate_only_refuses_a_folder_that_is_not_empty(name, tmp_path):
    """A folder with a file in it, and a file: nothing is measured, and the file stays."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("keep me")
    args = types.SimpleNamespace(out=str(tmp_path / name), data="photos")
    with pytest.raises(ValueError, match=f"--out .*{name} is not an empty folder"):
        evaluate_only(args, processes.Process(), [], lambda: pytest.fail("measured"), print)
    assert (tmp_path / "full" / "file").read_text() == "keep me"


# -------------------------------------------------------- errors


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    """torch's error of a full GPU: status 2, how much was asked for, and the flags that help."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    monkeypatch.setattr(signals, "catch", lambda: None)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    with pytest.raises(SystemExit) as stopped, command_line.one_line_errors(stoppable=True):
        raise torch.OutOfMemoryError(f"{message}.\nSee the documentation (https://pytorch.org)")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("pretrain.py: error: CUDA out of memory. Tried to allocate 2.00 GiB: ")
    assert all(flag in error for flag in ("--accumulate", "--recompute", "--batch-size"))

"""Command lines: one flag per row of a script's recipe table, and errors in one line."""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing import checkpoints, signals

COLUMNS = ("demo", "fashion", "photos", "base", "large")
RECOMPUTE = (
    "save memory: keep only the input of each block and compute the block again in the backward "
    "pass, which takes about a quarter more time"
)

OUT_OF_MEMORY = (
    "raise --accumulate (the same result in more, smaller passes), add --recompute (not for the "
    "tokenizer), or lower --batch-size"
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, exit status 2 and no abbreviated options."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def recipe_parser(description, recipes):
    """A parser with a flag per row of a recipe table {name: (demo, fashion, photos, ..., help)}.

    The type of a flag is that of the row's values, float if any of them is. None means that the
    recipe has no default for it and the flag must be given.
    """
    parser = Parser(description)
    group = parser.add_argument_group("recipe", "defaults come from the column named by --recipe")
    group.add_argument(
        "--recipe", default="demo", help=f"column of the recipe table: {', '.join(COLUMNS)}"
    )
    for name, (*values, help_text) in recipes.items():
        kinds = {type(v) for v in values if v is not None}
        flag = "--" + name.replace("_", "-")
        shown = f"{help_text} [{', '.join(str(v) for v in values)}]".replace("%", "%%")
        if kinds == {bool}:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown)
        else:
            kind = float if float in kinds else kinds.pop()
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=shown)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_init_flags(parser):
    """The flags of the two fine-tuning scripts."""
    add = parser.add_argument
    add("--init", required=True, help="a checkpoint.pt, published BEiT weights, or random")
    add_normalise_flag(parser)
    add("--eval", action="store_true", help="evaluate --init on --eval-split and stop")
    add("--recompute", action="store_true", help=RECOMPUTE)


def add_normalise_flag(parser):
    """--normalise of every program that loads weights."""
    text = "pixel mean and std; auto: the checkpoint's, half for published weights"
    parser.add_argument(
        "--normalise", default="auto", choices=("auto", "half", "imagenet"), help=text
    )


def add_look_flags(parser, kinds):
    """The flags of the two other scripts to start from weights, or to look at them. kinds: help."""
    add = parser.add_argument
    add("--init", help=f"start from these weights: {kinds}")
    add("--eval", action="store_true",
        help="evaluate --init on --eval-split, draw pictures into --out, and stop")  # fmt: skip


def add_run_flags(group):
    """The flags that every training script has beside its recipe."""
    add = group.add_argument
    add("--data-dir", help="folder with the data set's own files, or where to download them to")
    add("--eval-split", default="val", choices=("val", "test"),
        help="split to evaluate on: val to choose settings, test to report results")  # fmt: skip
    add("--out", help="new folder for checkpoint.pt, metrics.jsonl and pictures")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--seed", type=int, default=0,
        help="seed of the initialisation, sample order, crops, masks and noise")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="autocast precision; auto is bf16 where the hardware has it, else off")  # fmt: skip
    add("--accumulate", type=int, default=1,
        help="split each process's batch into this many passes, to save memory")  # fmt: skip
    add("--workers", type=workers, default="auto",
        help="loader processes; auto: one per core for image files, none for arrays")  # fmt: skip
    add("--compile", action="store_true",
        help="torch.compile the model: slow start, faster steps")  # fmt: skip
    add("--benchmark", type=int, metavar="STEPS",
        help="time this many steps, print where the time goes, stop; writes nothing")  # fmt: skip
    add("--log-every", type=int, default=20, help="steps between lines of the log")


def workers(text):
    """--workers: a number of processes, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of processes")
    return int(text)


SIZES = ("image_size", "token_size")
EVALUATION = (
    "short_side", "long_side", "eval_crop",
    "masking", "mask_ratio", "min_block", "target", "recover",
)  # fmt: skip

# Ranges of recipe numbers, beyond being finite and not negative.
POSITIVE = {
    "image_size", "token_size", "vocab_size", "hidden", "groups", "blocks_per_group", "code_dim",
    "decoder_dim", "min_crop", "eval_crop", "min_scale", "max_scale", "tau", "layer_decay",
}  # fmt: skip
AT_MOST_ONE = {"min_crop", "eval_crop", "jitter", "erasing", "smoothing", "layer_decay"}
BELOW_ONE = {"drop_path", "beta2", "ema"}
COUNTS = (
    "steps", "batch_size", "accumulate", "eval_images", "save_every", "log_every", "benchmark",
)  # fmt: skip


def check_number(parser, name, value):
    """Exit with status 2, naming the flag, if a number of a recipe is out of its range."""
    wanted = [
        ("a finite number, 0 or more", 0 <= value < math.inf),
        ("above 0", value > 0 or name not in POSITIVE),
        ("at most 1", value <= 1 or name not in AT_MOST_ONE),
        ("below 1", value < 1 or name not in BELOW_ONE),
    ]
    for what, right in wanted:
        if not right:
            parser.error(f"--{name.replace('_', '-')} {value} must be {what}")


def parse_recipe(parser, recipes, argv=None, size_of_init=()):
    """Parse the command line and fill in the recipe's column. Exits with status 2 on bad input.

    With --resume, flags that are not given are those of the run in --out. size_of_init: recipes
    whose image size is that of --init unless it is given; for weights without arguments it is None.
    """
    remember_flags(parser, argv, size_of_init or COLUMNS)
    args = parser.parse_args(argv)
    if args.recipe not in COLUMNS:
        parser.error(f"unknown recipe {args.recipe!r}: choose one of {', '.join(COLUMNS)}")
    check_mode(parser, args, getattr(args, "eval", False))
    for name in COUNTS:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.image_size is None:
        check_size(parser, args)
    for name, row in recipes.items():
        if getattr(args, name) is None:
            if name == "image_size" and args.recipe in size_of_init and args.init != "random":
                continue  # weights without arguments: their configuration has it
            setattr(args, name, row[COLUMNS.index(args.recipe)])
        value = getattr(args, name)
        if value is None:
            parser.error(f"recipe {args.recipe!r} needs --{name.replace('_', '-')}: {row[-1]}")
        if isinstance(value, (int, float)):
            check_number(parser, name, value)
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} must be from 0 to 2**63 - 1")
    if getattr(args, "warmup_steps", 0) >= getattr(args, "steps", 1):
        parser.error(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}")
    if args.benchmark:
        args.save_every = args.log_every = sys.maxsize
    return args


def remember_flags(parser, argv, size_of_init):
    """Take flags that are not given from a checkpoint: with --resume all, with --init the sizes.

    size_of_init: recipes whose sizes are those of --init. With --eval, the settings of evaluation
    are those of --init too.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--resume", "--eval"):
        known.add_argument(flag, action="store_true")
    for flag in ("--out", "--init", "--recipe"):
        known.add_argument(flag)
    try:
        given, _ = known.parse_known_args(argv)
    except argparse.ArgumentError:  # the parser itself will say what is wrong
        return
    if given.init and Path(given.init).is_file() and not given.resume:
        names = SIZES if (given.recipe or "demo") in size_of_init else ()
        names += EVALUATION if given.eval else ()
        saved = checkpoints.arguments_of(given.init, parser)
        flags = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: saved[name] for name in flags & saved.keys() & {*names}})
    if not (given.resume and given.out):
        return
    if not any((Path(given.out) / name).exists() for name in checkpoints.CHECKPOINTS):
        parser.error(f"--resume: there is no {checkpoints.CHECKPOINTS[0]} in {given.out}")
    saved = checkpoints.arguments(given.out, parser)
    if saved is not None:
        flags = {action.dest for action in parser._actions}
        if others := sorted(saved.keys() - flags):
            flag = others[0].replace("_", "-")
            parser.error(f"--resume: {given.out} is a run of another script, with a flag --{flag}")
        parser.set_defaults(**{name: saved[name] for name in flags & saved.keys()})
        for action in parser._actions:
            action.required = False


def check_size(parser, args):
    """Exit with status 2 if a small recipe's size would be taken for somebody's photographs."""
    folder = Path(args.data) if args.data else None
    small = args.recipe in ("demo", "fashion") and getattr(args, "init", None) in (None, "random")
    if small and folder and folder.is_dir() and not any(folder.glob("*.npy")):
        more = " and --token-size" if hasattr(args, "token_size") else ""
        parser.error(
            f"--recipe {args.recipe} is made for small drawings: with your own pictures in "
            f"{folder} give --image-size{more}, such as 64"
        )


def check_mode(parser, args, evaluate_only):
    """Exit with status 2 if --out or --init does not suit what is asked for."""
    if evaluate_only and args.init in (None, "random"):
        parser.error("--eval needs --init CHECKPOINT: nothing to evaluate in random weights")
    if args.out is None and not evaluate_only and args.benchmark is None:
        parser.error("--out is needed: a new folder for checkpoints, log and pictures")
    if args.benchmark and (args.out or args.resume or evaluate_only):
        parser.error(
            "--benchmark does not write, resume or evaluate: leave out --out, --resume and --eval"
        )


@contextlib.contextmanager
def one_line_errors(stoppable=False):
    """Report bad input (ValueError, OSError) or a full GPU in one line with exit status 2.

    stoppable: catch SIGTERM and SIGINT; a run that raises signals.Stopped ends with status 75.
    `python -X dev SCRIPT` shows where an error was raised. An error from a loader process carries
    that process's traceback; its last line is the error.
    """
    status = 0
    if stoppable:
        signals.catch()
    try:
        yield
    except signals.Stopped as stopped:
        print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        status = signals.STOPPED
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        line = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ValueError: ")
        if isinstance(error, torch.OutOfMemoryError):  # its first two sentences: what, how much
            line = f"{'. '.join(str(error).split('. ')[:2])}: {OUT_OF_MEMORY}"
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        status = 2
    finally:
        joined = dist.is_initialized()
        if joined:
            dist.destroy_process_group()
    if joined:
        # DDP's reducer keeps gloo's threads alive. One that drops its last tensor while the
        # interpreter shuts down aborts the process ("terminate called without an active
        # exception"), so leave without shutting it down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)

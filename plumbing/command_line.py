"""Command lines: one flag per row of a script's recipe table, and errors in one line."""

import argparse
import contextlib
import math
import os
import re
import sys
from pathlib import Path

import torch.distributed as dist

from plumbing import checkpoints, memory, outputs, processes, signals

COLUMNS = ("demo", "fashion", "photos", "base", "large")
RECOMPUTE = (
    "save memory: keep only the input of each block and compute the block again in the backward "
    "pass, which takes about a quarter more time"
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, exit status 2 and no abbreviated options."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message):
        line = " ".join(message.split())
        processes.announce(line)
        self.exit(2, f"{self.prog}: error: {line} (options: {self.prog} --help)\n")


def within(kind, span=""):
    """The type of a flag: a function that turns its text into a value and refuses all others.

    kind: int, float or str. span: of numbers an interval such as "(0, 1]", without 0 and with 1;
    of text the choices, "a|b|c"; "": every text but the empty one.
    """
    choices = span.split("|")
    if kind is str:
        wanted = f"one of {', '.join(choices)}" if span else "a name or a path"
    else:
        low, high = (float(end) for end in span[1:-1].split(","))
        wanted = f"a {'whole ' if kind is int else ''}number in {span}"

    def allowed(value):
        if kind is str:
            return value in choices if span else value != ""
        above = low <= value if span[0] == "[" else low < value  # False for NaN
        return above and (value <= high if span[-1] == "]" else value < high)

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not {wanted}")
        return value

    return read


text = within(str)  # of a name or a path


def add_number(group, flag, kind, span, help_text, **more):
    """Add a flag with a range, which --help shows. kind, span: see within."""
    shown = {"type": within(kind, span), "metavar": kind.__name__.upper()}
    group.add_argument(flag, help=f"{help_text}; in {span}", **shown, **more)


def recipe_parser(description, recipes):
    """A parser with a flag per row of a recipe table {name: (demo, ..., large, range, help)}.

    The type of a flag is that of the row's values, float if any of them is; range: see within.
    None means that the recipe has no default for it and the flag must be given.
    """
    parser = Parser(description)
    group = parser.add_argument_group("recipe", "defaults come from the column named by --recipe")
    columns = "|".join(COLUMNS)
    group.add_argument(
        "--recipe", default="demo", type=within(str, columns), metavar=columns,
        help="column of the recipe table",
    )  # fmt: skip
    for name, (*values, span, help_text) in recipes.items():
        kinds = {type(v) for v in values if v is not None}
        flag = flag_of(name)
        shown = f"{help_text} [{', '.join(str(v) for v in values)}]".replace("%", "%%")
        if kinds == {bool}:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=shown)
        elif kinds == {str}:
            kind, metavar = within(str, span), span or "NAME"
            group.add_argument(flag, type=kind, metavar=metavar, help=shown)
        else:
            add_number(group, flag, float if float in kinds else int, span, shown)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_init_flags(parser):
    """The flags of the two fine-tuning scripts."""
    add = parser.add_argument
    init = "a checkpoint.pt, published BEiT weights, or random"
    add("--init", required=True, type=text, help=init)
    add_normalise_flag(parser)
    add("--eval", action="store_true", help="evaluate --init on --eval-split and stop")
    add("--recompute", action="store_true", help=RECOMPUTE)


def add_normalise_flag(parser):
    """--normalise of every program that loads weights."""
    text = "pixel mean and std; auto: the checkpoint's, half for published or random weights"
    parser.add_argument(
        "--normalise", default="auto", choices=("auto", "half", "imagenet"), help=text
    )


def add_look_flags(parser, kinds, recompute=False):
    """The flags of the two other scripts to start from weights, or to look at them. kinds: help.

    recompute: whether there is a flag --recompute.
    """
    add = parser.add_argument
    if recompute:
        add("--recompute", action="store_true", help=RECOMPUTE)
    add("--init", type=text, help=f"start from these weights: {kinds}")
    add("--eval", action="store_true",
        help="evaluate --init on --eval-split, draw pictures into --out, and stop")  # fmt: skip


def add_run_flags(group):
    """The flags that every training script has beside its recipe."""
    add = group.add_argument
    add("--data-dir", type=text,
        help="folder with the data set's own files, or where to download them to")  # fmt: skip
    add("--eval-split", default="val", choices=("val", "test"),
        help="split to evaluate on: val to choose settings, test to report results")  # fmt: skip
    add("--out", type=text, help="new folder for checkpoint.pt, metrics.jsonl and pictures")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    seed = "seed of the initialisation, sample order, crops, masks and noise"
    add_number(group, "--seed", int, f"[0, {2**63})", seed, default=0)
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="autocast precision; auto is bf16 where the hardware has it, else off")  # fmt: skip
    accumulate = "split each process's batch into this many passes, to save memory"
    add_number(group, "--accumulate", int, "[1, 1e6]", accumulate, default=1)
    add("--workers", type=workers, default="auto",
        help="loader processes, 0 to 1024; auto: one per core for files; for arrays 0, or up to 4 "
        "to train on a GPU")  # fmt: skip
    add("--compile", action="store_true",
        help="torch.compile the model: slow start, faster steps")  # fmt: skip
    benchmark = "time this many steps, print where the time goes, stop; writes nothing"
    add_number(group, "--benchmark", int, "[1, 1e6]", benchmark)
    add_number(group, "--log-every", int, "[1, 1e9]", "steps between lines of the log", default=20)


def workers(text):
    """--workers: a number of processes, or None for auto."""
    try:
        return None if text == "auto" else within(int, "[0, 1024]")(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is neither auto nor in [0, 1024]")


SIZES = ("image_size", "token_size")
EVALUATION = (
    "short_side", "long_side", "eval_crop",
    "masking", "mask_ratio", "min_block", "target", "recover",
)  # fmt: skip
READ_BY_EVAL = {  # what --eval reads; what it takes from --init is not a flag then
    *SIZES, *EVALUATION, "recipe", "init", "eval", "out", "tokenizer", "normalise", "data",
    "data_dir", "eval_split", "eval_images", "batch_size", "accumulate", "device", "amp", "workers",
}  # fmt: skip


def ignored(args, size_of_init):
    """Yield (reason, names of flags that then have no effect). size_of_init: see parse_recipe."""
    flags = vars(args)
    evaluate, init = flags.get("eval"), flags.get("init")
    if evaluate:
        read = READ_BY_EVAL - ({"image_size"} if size_of_init else set())
        yield "--eval", flags.keys() - read - ({"seed"} if "masking" in flags else set())
    if args.benchmark:
        yield "--benchmark", {"save_every", "log_every", "eval_images"}
    if init not in (None, "random"):
        yield "--init CHECKPOINT", {
            "model", "positions", "layer_scale", "vocab_size", "hidden", "groups",
            "blocks_per_group", "code_dim", "quantizer", "likelihood", "normalise_logits",
        }  # fmt: skip
    if flags.get("linear_probe"):
        yield "--linear-probe", {
            "randaugment", "erasing", "mixup", "cutmix", "drop_path", "layer_decay", "recompute",
        }  # fmt: skip
    elif not evaluate:
        yield "training without --linear-probe", {"layer"}
    if flags.get("short_side") == 0:
        yield "--short-side 0", {"long_side"}
    if flags.get("target", "tokens") != "tokens":
        yield f"--target {args.target}", {"tokenizer", "token_size"}
    if flags.get("quantizer") == "vq":
        yield "--quantizer vq", {"tau", "tau_steps", "beta", "beta_steps", "normalise_logits"}


def parse_recipe(parser, recipes, argv=None, size_of_init=()):
    """Parse the command line and fill in the recipe's column. Exits with status 2 on bad input.

    With --resume, flags that are not given are those of the run in --out. size_of_init: recipes
    whose image size is that of --init unless it is given; for weights without arguments it is None.
    With --init, normalise is None unless it is given.
    """
    remember_flags(parser, argv, size_of_init or COLUMNS)
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # keeps argparse's defaults out
    given = vars(parser.parse_args(argv, unset)).items()
    check_mode(parser, args, getattr(args, "eval", False))
    if args.image_size is None:
        check_size(parser, args)
    values = column(recipes, args.recipe)
    for name, row in recipes.items():
        if getattr(args, name) is None:
            if name == "image_size" and args.recipe in size_of_init and args.init != "random":
                continue  # weights without arguments: their configuration has it
            if name == "normalise" and getattr(args, "init", None) not in (None, "random"):
                continue  # that of the weights
            setattr(args, name, values[name])
        if getattr(args, name) is None:
            parser.error(f"recipe {args.recipe!r} needs {flag_of(name)}: {row[-1]}")
    check_values(parser, args)
    for reason, names in ignored(args, size_of_init):
        if useless := sorted(name for name, value in given if value is not None and name in names):
            flags = ", ".join(map(flag_of, useless))
            parser.error(f"{reason} has no use for {flags}")
    if args.benchmark:
        args.save_every = args.log_every = sys.maxsize
    return args


def column(recipes, recipe):
    """{name: value} of one column of a recipe table."""
    return {name: row[COLUMNS.index(recipe)] for name, row in recipes.items()}


def flag_of(name):
    """The flag of an argument: --image-size of image_size."""
    return "--" + name.replace("_", "-")


def check_values(parser, args):
    """Exit with status 2 if two values disagree."""
    for part, whole in (("warmup_steps", "steps"), ("warmup_epochs", "epochs")):
        if hasattr(args, part) and getattr(args, part) >= getattr(args, whole):
            less, more = (f"{flag_of(name)} {getattr(args, name)}" for name in (part, whole))
            parser.error(f"{less} leaves nothing of {more}")
    if getattr(args, "masking", "") == "none" and args.recover != "all":
        parser.error("--masking none leaves nothing to predict: add --recover all")
    if hasattr(args, "tokenizer") and args.target == "tokens" and args.tokenizer is None:
        parser.error("--target tokens needs --tokenizer")
    if hasattr(args, "min_scale") and args.min_scale > args.max_scale:
        parser.error(f"--min-scale {args.min_scale} is above --max-scale {args.max_scale}")


def remember_flags(parser, argv, size_of_init):
    """Take flags that are not given from a checkpoint: with --resume all, with --init the sizes.

    size_of_init: recipes whose sizes are those of --init. With --eval, the data and the settings of
    evaluation are those of --init too. A tokenizer's quantizer always is.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--resume", "--eval"):
        known.add_argument(flag, action="store_true")
    for flag in ("--out", "--init", "--recipe", "--data", "--data-dir"):
        known.add_argument(flag)
    try:
        given, _ = known.parse_known_args(argv)
    except argparse.ArgumentError:  # the parser itself will say what is wrong
        return
    if given.init and Path(given.init).is_file() and not given.resume:
        names = {"quantizer"} | ({*SIZES} if (given.recipe or "demo") in size_of_init else set())
        names |= {*EVALUATION} if given.eval else set()
        if given.eval and given.data is None:
            names |= {"data"} if given.data_dir else {"data", "data_dir"}
        names &= checkpoints.flags_of(parser)
        parser.set_defaults(**checkpoints.arguments_of(given.init, parser, names))
    if not (given.resume and given.out):
        return
    if not any((Path(given.out) / name).exists() for name in checkpoints.CHECKPOINTS):
        parser.error(checkpoints.nothing_in(given.out))
    saved = checkpoints.arguments(given.out, parser)
    if saved is not None:
        flags = checkpoints.flags_of(parser)
        if others := sorted(saved.keys() - flags):
            flag = flag_of(others[0])
            parser.error(f"--resume: {given.out} is a run of another script, with a flag {flag}")
        parser.set_defaults(**{name: saved[name] for name in flags & saved.keys()})
        for action in parser._actions:
            action.required = False


def check_size(parser, args):
    """Exit with status 2 if a small recipe's size would be used for somebody's own pictures."""
    small = args.recipe in ("demo", "fashion") and getattr(args, "init", None) in (None, "random")
    own = args.data and args.data not in outputs.NAMED
    if small and own and (Path(args.data).is_dir() or Path(args.data).suffix == ".npz"):
        more = " and --token-size" if hasattr(args, "token_size") else ""
        parser.error(
            f"--recipe {args.recipe} is made for small drawings: with your own pictures in "
            f"{args.data} give --recipe photos, or --image-size{more}"
        )


def check_mode(parser, args, evaluate_only):
    """Exit with status 2 if --out or --init does not suit what is asked for."""
    if evaluate_only and args.init in (None, "random"):
        parser.error("--eval needs --init CHECKPOINT: nothing to evaluate in random weights")
    if args.out is None and not evaluate_only and args.benchmark is None:
        what = "the folder of the stopped run" if args.resume else "a new folder for all results"
        parser.error(f"--out is needed: {what}")
    if args.benchmark and (args.out or args.resume or evaluate_only):
        parser.error(
            "--benchmark does not write, resume or evaluate: leave out --out, --resume and --eval"
        )


def ending(error):
    """(exit status, line to print) of a program that ends in `error`; None for a defect of ours.

    An error from a loader process carries that process's traceback; its last line is the error.
    """
    if isinstance(error, signals.Stopped):
        return signals.STOPPED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return signals.INTERRUPTED, "interrupted"
    line = (str(error).strip() or repr(error)).splitlines()[-1]
    line = re.sub(rf"^[\w.]*\b{type(error).__name__}: ", "", line)
    if full := memory.exhausted(error):
        line = full
    elif isinstance(error, RuntimeError):
        line = processes.failure_elsewhere(error)
    elif not isinstance(error, (ValueError, OSError)):
        return None
    return (2, f"error: {line}") if line else None


@contextlib.contextmanager
def one_line_errors(stoppable=False, full=memory.HELP):
    """Report bad input (ValueError, OSError) or full memory in one line with exit status 2.

    stoppable: catch SIGTERM and SIGINT; a run that raises signals.Stopped ends with status 75, and
    its line about full memory ends in `full`, the flags that help. `python -X dev SCRIPT` shows
    where an error was raised.
    """
    status = 0
    if stoppable:
        signals.catch()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    try:
        yield
    except BaseException as error:
        status, line = ending(error) or (1, repr(error))
        if stoppable and memory.exhausted(error):
            line += f": {full}"
        signals.kill_children()
        if not isinstance(error, SystemExit):  # a Parser has announced why
            processes.announce(line.removeprefix("error: "))
        if status == 1 or status == 2 and sys.flags.dev_mode:
            raise
        if status != 2:
            signals.ignore()  # it is ending already
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
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

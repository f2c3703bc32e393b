"""The paper's tables 1, 3 and 4 and figure 2 at small scale, experiments of ours, and a summary.

    python reproduce.py                       # summary on synthetic shapes: minutes on two cores
    python reproduce.py --recipe fashion      # summary on real images: 26 minutes on two CPU cores
    python reproduce.py --recipe fashion --table 1 3 4 --grid14 --figure 2       # hours
    python reproduce.py --recipe photos --budgets       # part of table 4, five times: 21 hours
    python reproduce.py --recipe photos --masks --tokenizers    # other masks, widths, tokenizers
    python reproduce.py ... --resume          # continue a stopped run: the same flags and --resume
    python reproduce.py --documents           # fill the documents' tables from docs/results

Each stage runs one of the scripts. You find in OUT:

    report.html       everything on one page: tables, curves, pictures, settings, commands
    results.json      the tables with every single value, the time of each stage, the machine
    commands.txt      the command of each stage
    STAGE.log         the output of a stage; its checkpoint, numbers and pictures are in STAGE/
    STAGE.json        what a finished stage reported; without it, the stage runs again
    figure2.png, budgets-MEASURE.svg    the figure, and the curves of --budgets

The documents' tables come from the copies of results.json in docs/results/RECIPE.json.
"""

import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from experiments import paper, report, stages, tables
from images import batches
from plumbing import command_line, signals


def parse(argv):
    """The arguments. Exits with status 2 on bad input."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", default="demo", choices=paper.COLUMNS, help="data, models and settings")
    add(
        "--table", type=int, nargs="+", default=[], choices=(1, 3, 4), help="run the paper's tables"
    )
    add("--figure", type=int, nargs="+", default=[], choices=(2,), help="run the paper's figure")
    budgets = "table 4's rows about masking and pixels, at several budgets"
    add("--budgets", action="store_true", help=budgets)
    add("--masks", action="store_true", help="compare other mask ratios, blocks and model widths")
    add("--tokenizers", action="store_true", help="compare BEiT's tokenizer with others")
    add("--grid14", action="store_true", help="run table 4's rows about masking on 14 x 14 patches")
    seeds = "fine-tuning runs per row; default: the recipe's"
    command_line.add_number(parser, "--seeds", int, "[1, 100]", seeds)  # seed 100 is for lr
    add("--out", help="new folder for all results; default: runs/RECIPE")
    add("--resume", action="store_true", help="keep the finished stages in --out, run the others")
    add("--scenes", help="images with masks for segmentation (docs/data.md); default: the recipe's")
    add("--data-dir", help="folder with the data set's original files, downloaded if missing")
    jobs, cores = "stages side by side; default: CPU cores", batches.share_of_cores()
    command_line.add_number(parser, "--jobs", int, "[1, 1024]", jobs, default=cores)
    add("--documents", action="store_true", help="only fill the tables of README.md and docs/*.md")
    args = parser.parse_args(argv)
    if args.documents and len(sys.argv[1:] if argv is None else argv) > 1:
        parser.error("--documents takes no other flag")
    if args.budgets and args.recipe == "demo":
        parser.error("--budgets is for photographs and garments: use --recipe photos or fashion")
    if (args.tokenizers or args.masks) and args.recipe != "photos":
        parser.error("--tokenizers and --masks are for photographs: use --recipe photos")
    if args.grid14 and args.recipe != "fashion":
        parser.error(
            "--grid14 repeats fashion's table 4 on scenes of 56 x 56 pixels: use --recipe fashion"
        )
    if args.recipe == "photos" and not args.scenes and (3 in args.table or args.figure):
        parser.error("table 3 and figure 2 need images with masks: name a folder as --scenes")
    if args.scenes and not Path(args.scenes).exists() and args.scenes not in paper.SCENES:
        parser.error(f"--scenes {args.scenes}: no such file or folder")
    if args.scenes and args.scenes not in paper.SCENES and args.recipe != "photos":
        parser.error(f"--scenes {args.scenes}: your own images need --recipe photos")
    args.out = Path(args.out or f"runs/{args.recipe}")
    return args


def check_folder(out, resume):
    """Raise ValueError if OUT is not empty, except to resume a run of this program."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder: choose a new one")
    if not out.exists() or not any(out.iterdir()):
        return
    if not resume:
        raise ValueError(
            f"{out} is not empty: choose another --out, or --resume to keep its finished stages"
        )
    if not (out / "results.json").exists():
        raise ValueError(f"--resume: {out} holds no run of reproduce.py: choose another --out")


def run(args):
    """Plan the stages, run them, print the tables and write the report."""
    start = time.monotonic()
    names = [f"table {number}" for number in args.table] + ["grid 14"] * args.grid14
    names += ["tokenizers"] * args.tokenizers + ["budgets"] * args.budgets
    names += ["masks"] * args.masks
    names += [f"figure {number}" for number in args.figure]
    names = names or ["summary"]
    check_folder(args.out, args.resume)
    settings = paper.settings(args.recipe, args.seeds, args.scenes)
    if settings["scenes"] is None:
        print("no segmentation: name a folder of images with masks as --scenes (docs/data.md)")
    runner = stages.Runner(args.out, args.recipe, settings, args.data_dir, args.jobs)
    runner.plan([paper.EXPERIMENTS[name] for name in names])
    with runner:
        for name in names:
            table = paper.EXPERIMENTS[name](runner)
            made = tables.save_results(runner, {name: table})["tables"]
    claims = [] if names == ["summary"] else [name for name in tables.CLAIM_TABLES if name in made]
    for name in names + claims:
        print(f"\n{made[name]['title']}\n{tables.markdown(made[name])}")
    page = report.write(args.out, args.data_dir)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{minutes:.1f} minutes. Everything on one page: {page}")


def main(argv=None):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    args = parse(argv)
    if args.documents:
        tables.fill_documents()
        return
    try:
        run(args)
    except KeyboardInterrupt:
        raise signals.Stopped("stopped; continue with --resume") from None


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

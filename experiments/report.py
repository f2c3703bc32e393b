"""report.html: everything that a run of reproduce.py made, on one page that needs nothing else.

    python -m experiments.report runs/demo

Writes the page again for a folder OUT of reproduce.py, with whatever is there: tables, loss
curves, pictures, settings, commands, machine and times. Without OUT/figure2.png, draws attention
maps of the pre-trained model. Pictures are embedded and there are no scripts.
"""

import base64
import collections
import html
import importlib
import os
import re
import shlex
import statistics
import struct
import tempfile
from pathlib import Path

from experiments import attention, paper
from experiments.stages import base_name
from experiments.tables import CLAIM_TABLES, all_values, cell_text, finished_stages, read_results
from plumbing import command_line, log, outputs, pictures

SCRIPTS = {
    "train_tokenizer.py": "tokenizer",
    "pretrain.py": "pre-training",
    "finetune_cls.py": "classification",
    "finetune_seg.py": "segmentation",
}
RANDOM = ("from-scratch", "random-weights")  # rows that start from random weights
PATHS = ("init", "tokenizer")  # flags with a path, which the commands show better
LINES = 6  # of a chart, at most
# what stands before the names of the fine-tuning stages of grid14, tokenizers, budgets and masks
SERIES = r"(14x14-|tokens-|x[\d.]+-)?"
TITLE = "BEiT at small scale"
STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --muted: #59636e; --line: #d8dee4;
  --page: #ffffff; --soft: #f4f6f8; --link: #1f6fb4 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --muted: #9aa5b1;
  --line: #3a424b; --page: #16191d; --soft: #20252b; --link: #7ab8ee } }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; color: var(--text);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0 0 .4rem; font-size: 1.9rem; line-height: 1.2 }
h2 { margin: 3rem 0 .8rem; padding-bottom: .3rem; font-size: 1.35rem;
  border-bottom: 1px solid var(--line) }
h3 { margin: 1.8rem 0 .5rem; font-size: 1.05rem }
p { max-width: 44rem; margin: .6rem 0 }
a { color: var(--link) }
nav a { margin-right: 1.1rem; white-space: nowrap }
.muted, figcaption, small { color: var(--muted) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .9rem .38rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th { font-weight: 600; border-bottom-width: 2px }
td + td, th + th { padding-left: .9rem }
td:first-child { min-width: 10rem }
.number { text-align: right }
td.number { white-space: nowrap }
.number small { display: block }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr));
  gap: 1rem }
svg, img { display: block; max-width: 100%; height: auto; border-radius: 4px }
figure { margin: .8rem 0 1.6rem }
figcaption { max-width: 44rem; margin-top: .45rem; font-size: .92rem }
.small { width: 40rem; image-rendering: pixelated }
details { margin: .6rem 0 }
summary { cursor: pointer }
pre { margin: .6rem 0; padding: .8rem 1rem; max-height: 28rem; overflow: auto;
  background: var(--soft); border-radius: 4px; font: .82rem/1.5 ui-monospace, monospace }
"""

# -------------------------------------------------------- tables


def number(cell):
    """Is a cell of a table a number, or a number with its spread?"""
    if isinstance(cell, str):
        return bool(re.fullmatch(r"-?[\d.]+", cell))
    return isinstance(cell, (int, float, dict))


def table_html(columns, rows):
    """A table with cells as in tables.py; columns of numbers are aligned to the right.

    The tooltip of a cell of runs has their values.
    """
    right = []
    for column in zip(*rows):
        numbers = [number(cell) for cell in column if cell not in (None, "")]
        right.append(' class="number"' if numbers and all(numbers) else "")
    head = (f"<th{kind}>{html.escape(text)}</th>" for text, kind in zip(columns, right))
    lines = ["".join(head)]
    for row in rows:
        line = ""
        for cell, kind in zip(row, right):
            text, tip = html.escape(cell_text(cell)), ""
            if isinstance(cell, dict):
                text = re.sub(r" \((lr .*)\)$", r" <small>\1</small>", text)
                tip = f' title="{", ".join(f"{value:.1f}" for value in all_values(cell))}"'
            line += f"<td{kind}{tip}>{text}</td>"
        lines.append(line)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def results(saved):
    """The tables of results.json."""
    parts = [
        "<p>All results are on test images. Where a row has several learning rates, the one best "
        "on the validation split, with a separate seed, is taken; rows compared with BEiT's own "
        "pre-training take BEiT's. Numbers with ± are mean and standard deviation over all runs of "
        "a row. Each fine-tuning seed draws its own labelled images, unless all are used.</p>"
    ]
    for name in (*paper.EXPERIMENTS, *CLAIM_TABLES):
        if name not in saved["tables"]:
            continue
        table = saved["tables"][name]
        parts.append(f"<h3>{html.escape(table['title'])}</h3>")
        parts.append(table_html(table["columns"], table["rows"]))
    return parts if saved["tables"] else []


def budget_curves(out):
    """The curves that `reproduce.py --budgets` drew."""
    parts = []
    for path in sorted(out.glob("budgets-*.svg")):
        source = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
        text = html.escape(path.stem.replace("-", " "))
        parts.append(f'<figure><img src="{source}" alt="{text}"></figure>')
    return parts


# -------------------------------------------------------- loss curves


def losses(out, name, key="loss"):
    """[(step, value)] of a stage from its metrics; a final evaluation counts for the last step."""
    if not (out / name / "metrics.jsonl").exists():
        return []
    points, step = [], 0
    for record in log.read_metrics(out / name):
        step = record.get("step", step)
        if record.get(key) is not None:
            points.append((step, record[key]))
    return points


def mean_losses(curves):
    """The mean of several curves at the steps that all of them have."""
    values = collections.defaultdict(list)
    for curve in curves:
        for step, value in curve:
            values[step].append(value)
    return [(step, statistics.mean(v)) for step, v in values.items() if len(v) == len(curves)]


def chart(points, title, y_label):
    """A chart of the training loss."""
    return pictures.svg_curve(points, title, "step", y_label, width=500, height=270)


def row_names(saved):
    """{part of a stage's name: the table's row that it stands for}."""
    rows = [row[0] for table in saved["tables"].values() for row in table["rows"]]
    rows += [*paper.ABLATIONS, *paper.MASKS]
    return {paper.slug(row): row for row in rows} | {"beit": "BEiT"}


def fine_tuning_charts(out, stages, names):
    """For each task the mean training loss of its rows: BEiT against random weights if they ran."""
    tasks = collections.defaultdict(lambda: collections.defaultdict(list))
    for name in sorted(stages):
        match = re.fullmatch(SERIES + r"(cls\w+?|seg)-(.+)-\d+-\d+", base_name(name))
        if match and (curve := losses(out, name)):
            series, task, row = match.groups()
            tasks[series, task][row].append(curve)
    for (series, task), rows in tasks.items():
        if series == "x1-":  # the budget of the recipe: BEiT's first run is the summary's
            if more := tasks.get((None, task), {}).get("beit"):
                rows["beit"] += more
    charts = []
    for (series, task), rows in tasks.items():
        fresh = [row for row in rows if row.startswith(RANDOM) and "smaller" not in row]
        shown = ["beit"] * ("beit" in rows)
        others = fresh if fresh and shown else [row for row in rows if row != "beit"]
        title = "Segmenters"
        if task != "seg":
            labels = task.removeprefix("cls")
            labels = "all labels" if labels == "all" else f"{labels} labels per class"
            title = f"Classifiers, {labels}"
        title += series_text(series)
        step = LINES - len(shown)
        for part in range(0, max(len(others), 1), step):
            points = {
                names.get(row, row.replace("-", " ")): mean_losses(rows[row])
                for row in (*shown, *others[part : part + step])
            }
            charts.append(chart(points, title, "training loss, mean"))
    return charts


def series_text(series):
    """What a match of SERIES, or None, adds to a title."""
    if series is None:
        return ""
    if series[0] == "x":
        times = "" if series == "x1-" else f"{series[1:-1]} times "
        return f", {times}the recipe's epochs"
    return ", after 14 x 14 patches" if series == "14x14-" else ", with other tokenizers"


def pretraining_text(name, names):
    """A stage of pre-training by its row and its name: '- visual tokens (visual-tokens-0)'."""
    row = re.sub(r"(-x\d[\d-]*?)?-\d+$", "", name)
    return f"{names[row]} ({name})" if row in names else name


def predicts_tokens(stage):
    """Is the target of a stage of pre-training visual tokens, not pixels?"""
    return flags_of(stage["command"]).get("target", "tokens") == "tokens"


def curves(out, stages, names):
    """Loss curves of all stages but the searches for learning rates."""
    charts = []
    for name, stage in stages.items():
        script, text = stage["command"].split()[0], base_name(name)
        points = losses(out, name)
        if script == "train_tokenizer.py" and points:
            parts = {key: losses(out, name, key) for key in ("loss", "reconstruction")}
            parts = {key: line for key, line in parts.items() if line}
            charts.append(chart(parts, text.replace("-", " ").capitalize(), "training loss"))
        if script == "pretrain.py" and points:
            held_out = losses(out, name, "mim_loss")
            parts = {"training": points} | ({"held out": held_out} if held_out else {})
            label = "nats per token" if predicts_tokens(stage) else "mean squared error"
            charts.append(chart(parts, f"Pre-training: {pretraining_text(text, names)}", label))
    charts += fine_tuning_charts(out, stages, names)
    return ['<div class="charts">', *charts, "</div>"] if charts else []


# -------------------------------------------------------- pictures


def figure(path, caption):
    """A PNG file in the page, with a caption; nothing if there is no such file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    small = ' class="small"' if width < 640 else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    size = f'width="{width}" height="{height}"'
    image = f'<img{small} {size} src="{source}" alt="{html.escape(caption)}">'
    return [f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"]


def draw_attention(out, stages, data_dir, path):
    """Draw attention maps to `path`, of the pre-trained BEiT on test images of its data.

    Draws nothing if no stage has pre-trained.
    """
    trained = [
        name
        for name, stage in stages.items()
        if stage["command"].startswith("pretrain.py") and (out / name / "checkpoint.pt").exists()
    ]
    names = {name: base_name(name) for name in trained}  # first the summary's, then other BEiTs
    trained.sort(key=lambda name: (names[name] != "beit-0", not names[name].startswith("beit")))
    if not trained:
        return
    data = flags_of(stages[trained[0]]["command"])["data"]
    flags = ["--data", data, "--split", "test", "--out", str(path)]
    flags += ["--data-dir", data_dir] if data_dir else []
    attention.main([str(out / trained[0] / "checkpoint.pt"), *flags])


def stage_figure(out, name, stage, names):
    """The picture that a stage made, with its caption: a list of HTML parts."""
    script, text = stage["command"].split()[0], base_name(name)
    if script == "train_tokenizer.py":
        caption = "test images above their reconstructions from visual tokens"
        return figure(out / name / "reconstructions.png", f"Stage {text}: {caption}.")
    if script == "pretrain.py" and text.endswith("-0"):
        decoded = ", decoded from visual tokens" if predicts_tokens(stage) else ""
        caption = "test images, the input with masked patches in grey, the model's predictions"
        caption = f"Stage {pretraining_text(text, names)}: {caption}{decoded}."
        return figure(out / name / "predictions.png", caption)
    match = re.fullmatch(SERIES + "seg-(.+)-0-0", text)
    if script == "finetune_seg.py" and match:
        series, row = match.groups()
        start = names.get(row, row.replace("-", " ")) + series_text(series)
        caption = "test images, the true class of each pixel, the predicted class"
        return figure(out / name / "segmentation.png", f"From {start}: {caption}.")
    return []


def gallery(out, stages, names, data_dir):
    """Reconstructions, predictions, segmentations and attention maps."""
    titles = {
        "train_tokenizer.py": "Reconstructions by the tokenizer",
        "pretrain.py": "Masks and predictions",
        "finetune_seg.py": "Segmentations",
    }
    parts = []
    for script, title in titles.items():
        made = [
            part
            for name, stage in stages.items()
            if stage["command"].startswith(script)
            for part in stage_figure(out, name, stage, names)
        ]
        parts += [f"<h3>{title}</h3>", *made] if made else []
    caption = (
        "Test images with reference patches in red, and where each of these looks (bright): "
        "attention of the last layer, pre-trained above random weights."
    )
    with tempfile.TemporaryDirectory() as folder:
        drawn = out / "figure2.png"
        if not drawn.exists():
            drawn = Path(folder) / "attention.png"
            try:
                draw_attention(out, stages, data_dir, drawn)
            except (ValueError, OSError) as error:  # the data are not on this machine
                log.note(f"no attention maps in the report: {error}")
        maps = figure(drawn, caption)
    return parts + (["<h3>Attention maps (figure 2)</h3>", *maps] if maps else [])


# -------------------------------------------------------- settings, commands, times


def flags_of(command):
    """{"name": value} of a script's command line; a flag without a value is "yes"."""
    found, words = {}, shlex.split(command)[1:]
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            found[word[2:].replace("-", "_")] = "yes" if following.startswith("--") else following
    return found


def value_text(value):
    """A setting as text, the same for 15, 15.0 and '15.0'."""
    if isinstance(value, tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    try:
        return f"{float(value):.6g}"
    except ValueError:
        return str(value)


def sort_key(text):
    """Sorts numbers by value, before other text."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def settings_of(script, recipe, stages):
    """Rows (name, values used, help) of a script's recipe and its other flags."""
    commands = [flags_of(s["command"]) for s in stages.values() if s["command"].startswith(script)]
    recipes = importlib.import_module(script.removesuffix(".py")).RECIPES
    values, rows = command_line.column(recipes, recipe), []
    others = {name: "" for flags in commands for name in flags if name not in (*PATHS, "recipe")}
    for name in recipes | others:
        default = values.get(name, "default")
        used = {value_text(flags.get(name, default)) for flags in commands}
        text = recipes[name][-1] if name in recipes else "a flag, not part of the recipe"
        rows.append([name, ", ".join(sorted(used, key=sort_key)), text])
    return rows


def settings(recipe, stages):
    """The recipe of each script as its stages used it, and of the experiments."""
    parts = [
        "<p>Values that the stages used, several where they differ. The commands below show "
        "which stage used which.</p>"
    ]
    columns = ["setting", "values", "meaning"]
    for script in SCRIPTS:
        if any(stage["command"].startswith(script) for stage in stages.values()):
            table = table_html(columns, settings_of(script, recipe, stages))
            parts.append(f"<details><summary>{script}</summary>{table}</details>")
    column = paper.settings(recipe)
    rows = [
        [name, value_text(column[name]), text]
        for name, (*_, text) in paper.RECIPES.items()
        if column[name] is not None
    ]
    table = table_html(columns, rows)
    title = "the recipe's experiments, without --seeds and --scenes"
    return [*parts, f"<details><summary>{title}</summary>{table}</details>"]


def commands(out):
    """The exact command of each stage."""
    path = out / "commands.txt"
    if not path.exists():
        return []
    lines = (f"python {line}" for line in path.read_text().splitlines())
    return [f"<pre>{html.escape(chr(10).join(lines))}</pre>"]


def seeds(stages):
    """The seeds of each kind of stage, as text."""
    used = collections.defaultdict(set)
    for name, stage in stages.items():
        kind = SCRIPTS[stage["command"].split()[0]]
        kind = "search for learning rates" if name.startswith("search-") else kind
        used[kind].add(int(flags_of(stage["command"]).get("seed", 0)))
    return "; ".join(f"{kind} {', '.join(map(str, sorted(s)))}" for kind, s in used.items())


def times(saved, stages):
    """The machine, the versions, the seeds and the time of each stage."""
    parts = []
    if "machine" in saved:
        parts.append(f"<p>{html.escape(saved['machine'])}; torch {saved['torch']}.</p>")
    if stages:
        rows = [
            [name, s["seconds"], s["threads"] or "all", value_text(s["resumed"]), s.get("machine")]
            for name, s in stages.items()
        ]
        parts += [
            f"<p>Seeds: {html.escape(seeds(stages))}.</p>",
            "<p>Stages with one thread run side by side. The seconds of a resumed stage are those "
            "of its last process.</p>",
            table_html(["stage", "seconds", "CPU threads", "resumed", "machine"], rows),
        ]
    return parts


# -------------------------------------------------------- the page


def page(recipe, data, sections):
    """The whole page. data: names of the data sets; sections: {title: list of HTML parts}.

    Empty sections are left out.
    """
    sections = {title: parts for title, parts in sections.items() if parts}
    links = [f'<a href="#{paper.slug(title)}">{html.escape(title)}</a>' for title in sections]
    body = []
    for title, parts in sections.items():
        heading = f'<h2 id="{paper.slug(title)}">{html.escape(title)}</h2>'
        body += ["<section>", heading, *parts, "</section>"]
    title = f"{TITLE}: recipe {recipe}"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>",
            '<p><a href="https://arxiv.org/abs/2106.08254">BEiT</a> (Bao et al., ICLR 2022) learns '
            "from images without labels: a tokenizer turns each image into visual tokens, and a "
            "vision transformer learns to predict the tokens of masked patches. Then it is "
            "fine-tuned to classify and to segment images, here in comparison with random "
            f"weights. Data: {html.escape(' and '.join(data))}.</p>",
            f"<nav>{''.join(links)}</nav>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def data_of(recipe, stages):
    """Names of the data sets of the stages; without stages those of the recipe."""
    used = [flags_of(stage["command"]).get("data") for stage in stages.values()]
    column = paper.settings(recipe)
    return [*dict.fromkeys(filter(None, used or (column["data"], column["scenes"])))]


def check_ours(path):
    """Raise ValueError if there is something at `path` that is no page of this program."""
    if not os.path.lexists(path):
        return
    if not path.is_file() or TITLE.encode() not in path.read_bytes()[:1000]:
        raise ValueError(f"{path} is not a page of this program: move it away")


def write(out, data_dir=None):
    """Write OUT/report.html from what is in OUT and return its path.

    data_dir: --data-dir of the scripts, for the attention maps. Raises ValueError if OUT has
    neither results nor finished stages, or a report.html from elsewhere.
    """
    out = Path(out)
    saved, stages, order = read_results(out), finished_stages(out), list(SCRIPTS)
    newest = {base_name(name): name for name in stages}  # in the order in which they ended
    stages = {name: stages[name] for name in newest.values()}
    stages = dict(sorted(stages.items(), key=lambda s: order.index(s[1]["command"].split()[0])))
    if not saved["tables"] and not stages:
        raise ValueError(f"{out} has no results: it is not a folder of reproduce.py")
    path = out / "report.html"
    check_ours(path)
    names, recipe = row_names(saved), saved.get("recipe", "demo")
    sections = {
        "Results": results(saved) + budget_curves(out),
        "Loss curves": curves(out, stages, names),
        "Pictures": gallery(out, stages, names, data_dir),
        "Settings": settings(recipe, stages),
        "Commands": commands(out),
        "Machine, seeds and times": times(saved, stages),
    }
    with outputs.again(path) as temporary:
        temporary.write_text(page(recipe, data_of(recipe, stages), sections), encoding="utf-8")
    return path


def main(argv=None):
    """Command line: see the top of this file."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("out", help="folder of a run of reproduce.py")
    parser.add_argument("--data-dir", help="folder with the data set's original files")
    args = parser.parse_args(argv)
    print(write(args.out, args.data_dir))


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()

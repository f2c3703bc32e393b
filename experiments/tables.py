"""Tables: the paper's claims against our results, results.json, and Markdown for the documents.

A table is {"title", "columns", "rows"}. A cell is text, a number, None, or the results of runs:
{"values": [[one per fine-tuning seed] per pre-training seed], "lr": the learning rate chosen}.
"""

import json
import math
import re
import statistics
from pathlib import Path

import torch

from experiments import HERE
from experiments.machine import machine
from plumbing import entries, log, outputs

MASKING_CLAIMS = (  # (claim, the row that should lose)
    ("Blockwise beats random masking", "- blockwise masking"),
    ("Recovering masked tokens alone beats 100 %", "+ recover 100 %"),
    ("Masking beats none", "- masking + recover 100 %"),
)
CLAIMS = [
    # (claim, experiment, column, the row that should win, the row that should lose)
    ("BEiT beats training from scratch, few labels", "table 1", 1, "BEiT", "from scratch"),
    ("BEiT beats training from scratch, all labels", "table 1", -2, "BEiT", "from scratch"),
    ("Higher resolution helps", "table 1", 1, "BEiT, higher resolution", "BEiT"),
    ("The larger model is better", "table 1", 1, "BEiT", "BEiT, smaller model"),
    ("BEiT beats supervised pre-training in segmentation", "table 3", 1,
     "BEiT", "supervised classification"),
    ("BEiT beats random weights in segmentation", "table 3", 1, "BEiT", "random weights"),
    ("Intermediate fine-tuning helps segmentation", "table 3", 1,
     "BEiT, intermediate fine-tuning", "BEiT"),
    ("Visual tokens beat pixels, classification", "table 4", 1, "BEiT", "- visual tokens"),
    ("Visual tokens beat pixels, segmentation", "table 4", 2, "BEiT", "- visual tokens"),
    *(
        (f"{claim}, {task}{grid}", experiment, column, "BEiT", loser)
        for experiment, grid in (("table 4", ""), ("grid 14", ", 14x14"))
        for claim, loser in MASKING_CLAIMS
        for column, task in ((1, "classification"), (2, "segmentation"))
    ),
    ("Pre-training longer helps, classification", "table 4", 1, "pretrain longer", "BEiT"),
    ("Pre-training longer helps, segmentation", "table 4", 2, "pretrain longer", "BEiT"),
    *(
        (f"Attention separates objects: more than {loser}", "figure 2", 1,
         "pre-trained, mean over heads", row)
        for loser, row in (
            ("random weights'", "random weights, mean over heads"),
            ("nearness", "nearness"),
            ("a centre prior", "centre"),
        )
    ),
]
BUDGET_CLAIMS = [  # (claim, the row that should win, the row that should lose)
    (f"{claim}, {measure}", f"BEiT, {measure}", f"{loser}, {measure}")
    for claim, loser in (*MASKING_CLAIMS, ("Visual tokens beat pixels", "- visual tokens"))
    for measure in ("top-1", "k-NN", "mIoU")
]
CLAIM_TABLES = ("claims", "claims by budget")
TIMED = {"seconds": (int, float), "threads": int, "resumed": bool}  # of each stage
WHERE = ("machine", "torch")  # likewise; earlier versions did not note them
MARKER = re.compile(r"(<!-- results of ([\w, ]+): ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def verdicts(tables):
    """A table with a verdict on each of CLAIMS whose rows are in `tables` {experiment: table}."""
    rows = [
        [claim, found[0], found[1]]
        for claim, experiment, *cells in CLAIMS
        if experiment in tables and (found := verdict(tables[experiment], *cells))
    ]
    columns = ["claim", "at this scale", "numbers"]
    return {"title": "The paper's claims", "columns": columns, "rows": rows}


def budget_verdicts(table):
    """A table with a verdict on each of BUDGET_CLAIMS for each column of the budgets' table."""
    columns = ["claim", *table["columns"][1:]]
    rows = []
    for claim, *names in BUDGET_CLAIMS:
        found = [verdict(table, column, *names) for column in range(1, len(columns))]
        if any(found):
            rows.append([claim, *(each and f"{each[0]}, {each[2]:+.1f}" for each in found)])
    title = "The paper's claims by budget, and by how many points BEiT is ahead"
    return {"title": title, "columns": columns, "rows": rows}


def verdict(table, column, winner, loser):
    """(verdict, numbers as text, difference) of two rows in a column; None if one has no results.

    "holds": the difference of the means exceeds twice the pooled standard deviation; "does not
    hold": it is below minus that; "undecided": it is between, or a row has only one run. A row that
    is a number has no runs: the deviation is then the other's.
    """
    cells = {row[0]: row[column] for row in table["rows"]}
    cells = [cells.get(name) for name in (winner, loser)]
    if None in cells:  # no masks, or an earlier version's table
        return None
    if not isinstance(cells[0], dict) or not isinstance(cells[1], (dict, float)):
        raise ValueError(f"{table['title']} in results.json has no runs of {winner} and {loser}")
    runs = [all_values(cell) for cell in cells if isinstance(cell, dict)]
    means = [statistics.mean(all_values(c)) if isinstance(c, dict) else c for c in cells]
    difference = means[0] - means[1]
    margin = 2 * pooled_deviation(*runs) if min(map(len, runs)) > 1 else math.inf
    found = "holds" if difference > 0 else "does not hold"
    if abs(difference) <= margin:
        found = "undecided"
    numbers = [spread(c) if isinstance(c, dict) else cell_text(c) for c in cells]
    return found, " against ".join(numbers), difference


def pooled_deviation(*runs):
    """The pooled standard deviation of lists of values, each of two or more."""
    squares = sum((len(values) - 1) * statistics.variance(values) for values in runs)
    return math.sqrt(squares / sum(len(values) - 1 for values in runs))


def run_cell(found):
    """A cell from a row of fine-tuning runs (without their checkpoints), or from a number."""
    if not isinstance(found, dict):
        return found
    return {key: found[key] for key in ("values", "lr") if key in found}


def all_values(cell):
    """The values of a cell's runs in one list."""
    return [value for run in cell["values"] for value in run]


def spread(cell):
    """'mean ± standard deviation' over all runs of a cell."""
    values = all_values(cell)
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def cell_text(cell):
    """A cell as text: runs as their spread and the learning rate, numbers with one decimal."""
    if isinstance(cell, dict):
        return spread(cell) + (f" (lr {cell['lr']:g})" if "lr" in cell else "")
    if cell is None:
        return ""
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def markdown(table):
    """A table as Markdown with aligned columns."""
    cells = ([cell_text(cell).replace("|", r"\|") for cell in row] for row in table["rows"])
    lines = [table["columns"], *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    padded = ([text.ljust(width) for text, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def side_by_side(tables):
    """Merge tables of two columns with the same title: a line for each name, a column for each."""
    names = []
    for table in tables:
        place = 0  # a row that only this table has comes after the row before it
        for name, _ in table["rows"]:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    cells = [dict(table["rows"]) for table in tables]
    columns = ["", *(table["columns"][1] for table in tables)]
    rows = [[name, *(found.get(name) for found in cells)] for name in names]
    return {"title": tables[0]["title"], "columns": columns, "rows": rows}


def fill_tables(text):
    """The text with its tables filled in from docs/results.

    A table stands between `<!-- results of RECIPE: EXPERIMENT -->` and `<!-- end -->`. Several
    recipes, `RECIPE, RECIPE`, have a column each.
    """

    def fill(match):
        start, recipes, experiment, _, end = match.groups()
        paths = [HERE / "docs" / "results" / f"{recipe}.json" for recipe in recipes.split(", ")]
        found = [json.loads(path.read_text())["tables"][experiment] for path in paths]
        table = side_by_side(found) if len(found) > 1 else found[0]
        return f"{start}{markdown(table)}\n{end}"

    return MARKER.sub(fill, text)


def fill_documents():
    """Fill the tables of README.md and docs/*.md."""
    for path in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))):
        path.write_text(fill_tables(path.read_text()))


def read_results(out):
    """OUT/results.json, empty if there is none: {"tables", "stages", "recipe", ...}.

    Raises ValueError naming the file if it is not what save_results writes.
    """
    path = Path(out) / "results.json"
    if not path.exists():
        return {"tables": {}, "stages": {}}
    saved = log.read_json(path, {"tables": dict, "stages": dict})
    texts = (saved.get(name, "") for name in ("recipe", "machine", "torch"))
    wrong = [name for name, table in saved["tables"].items() if not is_table(table)]
    wrong += [name for name, stage in saved["stages"].items() if not is_timed(stage)]
    right = isinstance(saved.get("data", {}), dict)
    if wrong or not right or not all(isinstance(text, str) for text in texts):
        name = wrong[0] if wrong else "recipe, machine, torch or data"
        raise ValueError(f"{path}: {name} is not as these scripts write it")
    return saved


def is_table(table):
    """Is it a table as described at the top of this file?"""
    if not isinstance(table, dict) or not isinstance(table.get("title"), str):
        return False
    columns, rows = table.get("columns"), table.get("rows")
    right = entries.is_names(columns) and isinstance(rows, list)
    return right and all(
        isinstance(row, list) and len(row) == len(columns) and all(map(is_cell, row))
        for row in rows
    )


def is_cell(cell):
    """Is it text, a number, None, or the results of runs?"""
    if not isinstance(cell, dict):
        return cell is None or isinstance(cell, str) or entries.is_number(cell)
    runs = cell.get("values")
    right = isinstance(runs, list) and entries.is_number(cell.get("lr", 0))
    right = right and all(isinstance(run, list) for run in runs) and any(runs)
    return right and all(entries.is_number(value) for value in all_values(cell))


def is_timed(stage):
    """Does it say how long a stage took, on how many threads, whether it was resumed, and where?"""
    right = isinstance(stage, dict)
    right = right and all(isinstance(stage.get(name), kind) for name, kind in TIMED.items())
    return right and all(isinstance(stage.get(name, ""), str) for name in WHERE)


def read_stage(path):
    """OUT/STAGE.json, {"command", "result"} and TIMED and WHERE.

    Raises ValueError naming the file if it is not what stages.Runner writes.
    """
    stage = log.read_json(path, {"command": str, "result": dict})
    if not is_timed(stage) or not all(map(is_result, stage["result"].values())):
        raise ValueError(f"{path} is not as these scripts write it: remove it to run the stage")
    return stage


def is_result(value):
    """Is it a number of a script's final record, or its `iou`, numbers by name?"""
    values = value.values() if isinstance(value, dict) else [value]
    return all(map(entries.is_number, values))


def finished_stages(out):
    """{name: OUT/name.json} of the finished stages, in the order in which they finished."""
    paths = [path for path in out.glob("*.json") if path.name != "results.json"]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    return {path.stem: read_stage(path) for path in paths}


def save_results(runner, tables):
    """Add `tables` {experiment: table} to OUT/results.json and return all that it then holds.

    It also has the time and machine of each finished stage, the verdicts on the claims and the
    machine of the last call.
    """
    saved, finished = read_results(runner.out), finished_stages(runner.out)
    saved |= {"recipe": runner.recipe, "machine": machine(), "torch": str(torch.__version__)}
    for name, stage in sorted(finished.items()):
        saved["stages"][name] = {key: stage[key] for key in (*TIMED, *WHERE) if key in stage}
    saved["tables"] |= tables
    budgets = saved["tables"].get("budgets", {"columns": [""], "rows": []})
    for name, table in zip(CLAIM_TABLES, (verdicts(saved["tables"]), budget_verdicts(budgets))):
        saved["tables"].pop(name, None)  # an earlier version's
        if table["rows"]:
            saved["tables"][name] = table
    write_results(runner.out, saved)
    return saved


def write_results(out, saved):
    """Write OUT/results.json, which is whole at every instant."""
    with outputs.again(out / "results.json") as new:
        new.write_text(json.dumps(saved, indent=1, allow_nan=False) + "\n")

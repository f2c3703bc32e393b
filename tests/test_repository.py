"""The repository itself: its layout, its imports, the README and the documents."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reproduce
from experiments import (
    HERE,
    attention,
    benchmark,
    features,
    fuzz,
    report,
    scale,
    scale_check,
    short_runs,
    tables,
    torture,
    verify,
)
from images import convert, sources
from plumbing import published

COMPONENTS = {"beit", "dvae", "masking"}
SCRIPTS = {"train_tokenizer", "pretrain", "finetune_cls", "finetune_seg"}
TOP_LEVEL = {f"{name}.py" for name in COMPONENTS | SCRIPTS}
TOP_LEVEL |= {"README.md", "test_beit.py", "reproduce.py"}
TOP_LEVEL |= {"requirements.txt", "LICENSE", ".gitignore"}
TOP_LEVEL |= {"images", "plumbing", "experiments", "tests", "docs", ".ci"}


def repository_files():
    """Paths of the repository's files, relative to its root: git's, or those of the known names."""
    if (HERE / ".git").exists():
        done = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        if done.returncode == 0:
            paths = map(Path, done.stdout.splitlines())
            return [path for path in paths if (HERE / path).exists()]
    paths = [path.relative_to(HERE) for path in HERE.rglob("*") if path.is_file()]
    return [path for path in paths if path.parts[0] in TOP_LEVEL]


FILES = repository_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def read(path):
    """The text of one of the repository's files."""
    return (HERE / path).read_text(encoding="utf-8")


# -------------------------------------------------------- layout


def test_top_level_is_the_papers_files_and_named_rooms():
    """Names at the top level against the list: the paper's files, reproduce.py and the rooms."""
    assert {path.parts[0] for path in FILES} == TOP_LEVEL


def test_files_functions_and_lines_are_short():
    """Lines of the paper's seven files, of each function and of each training loop; columns."""
    paper = [read(f"{name}.py").splitlines() for name in sorted(COMPONENTS | SCRIPTS)]
    assert sum(map(len, paper)) <= 2050
    for path in PYTHON:
        for number, line in enumerate(read(path).splitlines(), start=1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_lines_of_documents_are_short(path):
    """At most 100 columns outside code, tables and pictures."""
    prose = re.sub(r"```.*?```", "", read(path), flags=re.DOTALL).splitlines()
    assert not [line for line in prose if len(line) > 100 and not line.startswith(("|", "!["))]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_training_loop_fits_on_a_screen(script):
    """The one `for ... in run.steps(...)` of each script has at most 25 lines."""
    loops = [
        node
        for node in ast.walk(ast.parse(read(f"{script}.py")))
        if isinstance(node, ast.For) and ast.unparse(node.iter).startswith("run.steps(")
    ]
    assert len(loops) == 1
    assert loops[0].end_lineno - loops[0].lineno + 1 <= 25


def imports(path):
    """{the first part of each module that a Python file imports}, lazy imports too."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
    return found


def allowed_imports(path):
    """What a file may import beside the standard library; optional packages in one file each."""
    lower = {"torch", "numpy", "plumbing"}
    optional = {"plumbing/weights.py": {"safetensors"}, "images/photos.py": {"PIL"}}
    lower |= optional.get(path.as_posix(), set())
    if path.parts[0] == "plumbing":
        return lower
    lower |= {"images"}
    if path.parts[0] == "images":
        return lower
    lower |= COMPONENTS
    if path.stem in COMPONENTS:
        return lower
    if path.stem in SCRIPTS:
        return lower | {path.stem}
    lower |= SCRIPTS | {"experiments"}
    if path.parts[0] == "tests" or path.name == "test_beit.py":
        return lower | {"pytest", "reproduce"}
    return lower


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_imports_run_one_way(path):
    """experiments -> scripts -> components -> images -> plumbing; nothing imports a test."""
    assert imports(path) - sys.stdlib_module_names <= allowed_imports(path)


# -------------------------------------------------------- README and documents


def test_readme_shows_the_way_in():
    """At most 200 lines, with the map from the paper to the code in the first 90."""
    lines = read("README.md").splitlines()
    assert len(lines) <= 200
    assert "## From the paper to the code" in lines[:90]


def test_tables_are_those_of_the_results():
    """Tables in the documents against docs/results; every table there names its machine."""
    markers = 0
    for path in DOCUMENTS:
        text = read(path)
        assert tables.fill_tables(text) == text, path
        for recipes in re.findall(r"<!-- results of ([\w, ]+):", text):
            for recipe in recipes.split(", "):
                assert json.loads(read(f"docs/results/{recipe}.json"))["machine"]
            markers += 1
    assert markers > 0


def anchors(text):
    """The anchors of a Markdown document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_and_pictures_resolve(path):
    """Every relative link leads to a file of the repository, and its anchor to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if re.match(r"[a-z]+:", target):  # http, https, mailto
            continue
        name, _, anchor = target.partition("#")
        linked = (HERE / path.parent / name).resolve() if name else HERE / path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


MODULES = (attention, benchmark, convert, features, fuzz, published, report, scale, scale_check,
           torture, verify)  # fmt: skip
PROGRAMS = {
    **{f"{module.__name__}.py": module for module in short_runs.MODULES.values()},
    "reproduce.py": reproduce,
    **{f"-m {module.__name__}": module for module in MODULES},
}
FOREIGN_FLAGS = {  # of torchrun
    *("--nnodes", "--node_rank", "--master_addr", "--nproc_per_node", "--max-restarts"),
    "--rdzv-conf",
}


def known_flags(program, capsys):
    """The flags that a program's --help names."""
    with pytest.raises(SystemExit):
        PROGRAMS[program].main(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9_-]*", capsys.readouterr().out)) - {"--help"}


def test_flags_and_programs_in_the_documents_exist(capsys):
    """Flags and modules named in the README and docs against what the programs' --help names."""
    flags = FOREIGN_FLAGS | {"--help"}
    for program in PROGRAMS:
        flags |= known_flags(program, capsys)
    for path in DOCUMENTS:
        text = read(path)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) <= flags, path
        modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"venv", "pytest", "pip"}
        assert {f"-m {name}" for name in modules} <= PROGRAMS.keys(), path


def test_readme_names_every_top_level_file():
    """Every script, and every room, is in the README."""
    text = read("README.md")
    for name in TOP_LEVEL - {"LICENSE", ".gitignore", ".ci", "README.md"}:
        assert name in text, name


def commands(text):
    """The commands in a document's code blocks that run one of PROGRAMS: (program, flags)."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for line in blocks.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        for place, word in enumerate(words):
            program = f"-m {words[place + 1]}" if word == "-m" and words[place + 1 :] else word
            if program in PROGRAMS:
                yield program, [word for word in words[place + 1 :] if word.startswith("--")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_commands_in_the_documents_have_their_programs_flags(path, capsys):
    """Each flag in a command of a document against the --help of that very program."""
    for program, flags in commands(read(path)):
        found = {flag.partition("=")[0] for flag in flags}
        assert found <= known_flags(program, capsys) | {"--help"}, program


def test_verdicts_in_the_results_are_those_of_their_tables():
    """The claims of docs/results/*.json against those made again from the tables beside them."""
    for path in (HERE / "docs" / "results").glob("*.json"):
        made = json.loads(path.read_text())["tables"]
        assert tables.verdicts(made)["rows"] == made.get("claims", {"rows": []})["rows"], path
        if "budgets" in made:
            assert tables.budget_verdicts(made["budgets"]) == made["claims by budget"]


# -------------------------------------------------------- In your own code


def python_blocks(text, heading):
    """The Python code blocks of a document under a heading, as far as the next heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_code_to_use_a_model_runs(made, monkeypatch):
    """The code under "In your own code" on checkpoints and an image made here.

    Its results have the shapes that its comments say. The image comes from an array, because
    decoding a file needs Pillow.
    """
    code = "".join(python_blocks(read("docs/your-pictures.md"), "In your own code"))
    assert code.count('"runs/') == 2
    code = code.replace('"runs/', f'"{made}/')
    pixels = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    monkeypatch.setattr(sources.Files, "read", lambda self, indices: pixels)
    found = {}
    exec(compile(code, "your-pictures.md", "exec"), found)
    config = found["config"]
    assert found["x"].shape == (1, 3, config.image_size, config.image_size)
    assert found["features"].shape == (1, config.dim)
    assert found["name"] in ("0", "1", "2", "3")
    assert found["mask"].shape == (1, config.image_size, config.image_size)
    assert found["names"] and set(found["names"]) <= {"0", "1"}

"""The sources: who imports whom, how long they are, and that they say what they do.

python tests/test_imports.py    prints the README's picture of the table
"""

import ast
import configparser
import fnmatch
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Folder or file -> what it imports. It may also import what that imports, and itself;
# nothing else of ours. The README's picture is generated from this table.
IMPORTS = {
    "plot": ("runtime",),
    "train": ("evaluate", "ahead", "config_flag", "stepping", "capsule"),
    "ahead": ("plan", "forecast"),
    "recovery": ("configs",),
    "tools": ("capsule",),
    "forks": ("workdir",),
    # The plan says whether a run can be exported.
    "plan": ("forecast", "interop", "input_pipeline"),
    "capsule": ("workdir", "input_pipeline"),
    "stepping": ("compilation", "observe", "recovery"),
    "observe": ("forecast",),
    "forecast": ("experiment",),
    "evaluate": ("answers", "input_pipeline"),
    "compilation": ("experiment", "input_pipeline"),
    "lm_eval": ("answers",),
    "generate": ("answers",),
    "answers": ("workdir",),
    "packed": ("train",),
    "config_flag": ("forks",),
    "sweep": ("config_flag", "sweeps"),
    "sweeps": ("runtime",),
    # It names the commands that a workdir can go on with.
    "inspection": ("interop",),
    "interop": ("workdir",),
    "workdir": ("experiment", "trained_codecs"),
    "trained_codecs": ("configs",),
    "experiment": ("configs",),
    "input_pipeline": ("data",),
    # Files of configs/sweeps say which runs.
    "configs": ("models", "tasks", "data", "scores", "runtime", "sweeps.values"),
    "models": ("runtime.errors",),
    "tasks": ("runtime.metrics",),
    "data": ("runtime.errors", "runtime.paths", "runtime.files", "runtime.lazy"),
    "scores": (),
    "runtime": (),
}
# One box in the picture: what a user starts, and what only that needs.
PROGRAMS = (
    *("train", "plan", "recovery", "evaluate", "generate", "answers", "lm_eval"),
    *(
        "packed",
        "sweep",
        "plot",
        "inspection",
        "config_flag",
        "forks",
        "capsule",
        "tools",
        "stepping",
        "compilation",
        "ahead",
        "forecast",
        "observe",
    ),
)
# What starts the others, and imports them by name when they are asked for.
DOORS = ("", "__main__", "console")
# Inside a folder a row imports itself and later rows, none before it. What no row
# matches is above all rows: the families of models, and their table.
ROWS = {
    "models": (
        ("models.frontends", "models.heads"),
        ("models.transformer",),
        ("models.blocks*",),
        ("models.attention", "models.cache", "models.feed_forward"),
        ("models.algorithms*",),
        ("models.positions", "models.embedding", "models.layers", "models.logits"),
        ("models.config", "models.mask", "models.matmul", "models.decode"),
        ("models.patterns", "models.repeats", "models.stacking"),
    ),
    "data": (
        ("data.datasets*",),
        ("data.codecs.files",),
        ("data.store",),
        ("data.encoding",),
        ("data.codecs*", "data.sources*", "data.batch"),
        ("data.progress", "data.lines", "data.music"),
    ),
}
# (module, what a function of it imports): why not at the top.
LATE = {
    ("data.sources.files", "triform.data.sources"): "pyarrow costs 0.2 s",
    ("data.sources.formats", "triform.data.sources"): "pyarrow costs 0.2 s",
    ("data.sources.streams", "pyarrow"): "0.2 s, which zstandard alone needs",
    ("data.music", "mido"): "an extra",
    ("data.sources", "triform.data.sources.tfds_source"): "TFDS costs 0.5 s",
    ("data.sources.digits", "sklearn.datasets"): "it costs 2 s",
    ("models.algorithms.flash", "jax.experimental.pallas.ops.tpu"): "TPUs only",
    ("runtime.metrics", "triform.runtime.events"): "tensorboardX costs 0.2 s",
    ("scores.text", "sacrebleu.metrics"): "it costs 40 ms",
    ("scores.text", "sacremoses"): "it costs 0.3 s",
    ("sweeps.page", "matplotlib.figure"): "an extra",
    ("sweeps.search", "optuna"): "an extra",
}
LINES = 500  # of a file
FUNCTION_LINES = 80


def sources() -> dict[str, pathlib.Path]:
    """Module name without 'triform.' -> file, of everything that is installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {}
    for package in setup["options"]["packages"].split():
        parts = package.split(".")[1:]
        for path in ROOT.joinpath(*parts).glob("*.py"):
            name = [] if path.stem == "__init__" else [path.stem]
            found[".".join([*parts, *name])] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Our modules that the import statements under `tree` name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = set()
    for name in names:
        top, _, rest = name.partition(".")
        if top == "triform":
            # 'triform.a.b' is the module a.b or something that the module a defines.
            ours.add(rest if rest in SOURCES else rest.rpartition(".")[0])
    return ours


def functions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """('Class.method', node) of all functions and classes outside functions."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.append((prefix + child.name, child))
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return found


def top(module: str) -> str:
    """The folder or file of the table that a module belongs to."""
    return module.partition(".")[0]


def within(module: str, name: str) -> bool:
    """Is a module the one of that name, or in the folder of that name?"""
    return f"{module}.".startswith(f"{name}.")


def reachable(name: str) -> set[str]:
    """What a row of IMPORTS may import: its own names, and what these may import."""
    found = set(IMPORTS.get(name, ()))
    return found.union(*map(reachable, found))


def row(module: str) -> int:
    """The index of the module's row in its folder's ROWS; -1: above all rows."""
    rows = ROWS.get(top(module), ())
    for number, patterns in enumerate(rows):
        if any(fnmatch.fnmatch(module, pattern) for pattern in patterns):
            return number
    return -1


def picture() -> str:
    """The table as a diagram for the README, without arrows that follow from others."""
    boxes: dict[str, dict[str, None]] = {}
    for name, names in IMPORTS.items():
        box, *others = ("programs" if x in PROGRAMS else top(x) for x in (name, *names))
        boxes.setdefault(box, {}).update(dict.fromkeys(x for x in others if x != box))

    def beyond(box: str) -> set[str]:
        return set(boxes[box]).union(*(beyond(x) for x in boxes[box]))

    arrows = [
        f"    {a} --> {b}\n"
        for a, targets in boxes.items()
        for b in targets
        if not any(b in beyond(x) for x in targets)
    ]
    return "```mermaid\nflowchart TD\n" + "".join(arrows) + "```\n"


def test_every_folder_of_sources_is_a_listed_package():
    folders = {
        path.parent.relative_to(ROOT).parts
        for path in ROOT.glob("*/**/__init__.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "build", "runs"))
    }
    assert folders == {p.relative_to(ROOT).parts[:-1] for p in SOURCES.values()} - {()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_table(module):
    used = imported(TREES[module])
    if module in DOORS:
        assert used <= {*DOORS}
        return
    assert top(module) in IMPORTS, f"{module}: add a row to IMPORTS"
    assert used <= set(SOURCES), f"{module} imports what is not there"
    allowed = reachable(top(module))
    for name in used:
        if top(name) == top(module):
            assert row(module) <= row(name), f"{module} imports {name}, above it"
        else:
            assert any(within(name, other) for other in allowed), (
                f"{module} imports {name}; {top(module)} may import "
                f"{', '.join(sorted(allowed)) or 'nothing of ours'}"
            )


@pytest.mark.parametrize(
    ("start", "end"), [(a, b) for a, names in IMPORTS.items() for b in names]
)
def test_every_arrow_is_an_import(start, end):
    used = [n for m, tree in TREES.items() if top(m) == start for n in imported(tree)]
    assert any(within(name, end) for name in used)


def test_the_readme_shows_the_table():
    assert picture() in (ROOT / "README.md").read_text(), (
        "put the output of python tests/test_imports.py into README.md"
    )


def test_imports_have_no_cycle():
    graph = {name: imported(tree) - {name} for name, tree in TREES.items()}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, "modules that import each other, or depend on such"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_are_at_the_top(module):
    late = set()
    for function in ast.walk(TREES[module]):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    late |= {(module, alias.name) for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    late.add((module, node.module))
    assert late <= set(LATE)


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    assert len(SOURCES[module].read_text().splitlines()) <= LINES
    for name, node in functions(TREES[module]):
        if not isinstance(node, ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{module}.{name} has {length} lines"


@pytest.mark.parametrize("module", SOURCES)
def test_what_is_public_has_a_docstring(module):
    assert ast.get_docstring(TREES[module])
    for name, node in functions(TREES[module]):
        if not any(part.startswith("_") for part in name.split(".")):
            assert ast.get_docstring(node), f"{module}.{name}"


@pytest.mark.parametrize("module", SOURCES)
def test_no_bare_except(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}: line {node.lineno}"


if __name__ == "__main__":
    print(picture(), end="")

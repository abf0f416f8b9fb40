"""The sources: who imports whom, how long they are, and that they say what they do."""

import ast
import configparser
import fnmatch
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG_CLASSES = (  # where the dataclasses of the config tree are
    "decode",
    "models",
    "models.algorithms",
    "models.attention",
    "models.config",
    "models.transformer",
    "runtime.checkpoint",
    "runtime.optim",
    "runtime.partition",
    "scoring",
    "tasks",
    "tokenizer",
    "transforms",
    "datasets.*",
)
# Module (first match wins): what of ours it may import. Entry points may import all.
ALLOWED = (
    ("models.config", ()),
    ("models.mask", ()),
    ("models.cache", ("models.mask",)),
    ("models.algorithms", ("models.algorithms.*",)),
    ("models.algorithms.*", ("models.mask", "models.algorithms.*")),
    ("models.product", ()),
    ("models.positions", ("models.config",)),
    ("models.embedding", ("models.config", "models.product")),
    (
        "models.attention",
        (
            "models.algorithms",
            "models.config",
            "models.mask",
            "models.positions",
            "models.product",
        ),
    ),
    (
        "models.transformer",
        (
            "models.algorithms",
            "models.attention",
            "models.cache",
            "models.config",
            "models.mask",
            "models.positions",
            "models.product",
        ),
    ),
    ("models", ("models.*",)),
    # A family file; one may build on another.
    (
        "models.*",
        (
            "models.encoder_decoder",
            "models.embedding",
            "models.transformer",
            "models.positions",
            "models.product",
            "models.attention",
            "models.config",
            "models.mask",
        ),
    ),
    ("runtime", ("runtime.*",)),
    ("runtime.*", ("runtime.*",)),
    ("datasets", ("datasets.*",)),
    ("datasets.*", ("datasets.*",)),
    ("tokenizer", ()),
    ("scoring", ()),
    ("token_store", ("datasets", "tokenizer")),
    ("datasets.base", ("token_store", "tokenizer")),
    ("transforms", ("tokenizer", "datasets.*")),
    # A kind of data; one may build on another.
    ("datasets.*", ("datasets", "token_store", "tokenizer", "datasets.*")),
    ("input_pipeline", ("datasets", "datasets.base")),
    ("tasks", ("runtime.metrics",)),
    ("decode", ("models.attention", "models.mask")),
    ("interop", ()),
    ("interop.__main__", ("*",)),
    (
        "interop.*",
        (
            "interop.*",
            "models",
            "models.*",
            "runtime.*",
            "transforms",
            "datasets.*",
            "configs.base",
            "cli",
            "decode",
            "experiment",
            "scoring",
            "tasks",
            "tokenizer",
        ),
    ),
    ("configs", ()),
    ("configs.base", CONFIG_CLASSES),
    # An experiment; one may build on another.
    ("configs.*", ("configs", "configs.*", *CONFIG_CLASSES)),
    ("cli", ("*",)),
    ("train", ("*",)),
    ("evaluate", ("*",)),
    ("generate", ("*",)),
    ("sweep", ("*",)),
    ("experiment", ("*",)),
    ("warm_start", ("*",)),
    ("progress", ("*",)),
)
# Imports inside functions, each with a reason beside it in the source.
LATE = {("datasets", "datasets.tfds_source")}
LONG_FUNCTIONS = {"train.train_loop": 120}


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


def test_every_folder_of_sources_is_a_listed_package():
    folders = {
        path.parent.relative_to(ROOT).parts
        for path in ROOT.glob("*/**/__init__.py")
        if not path.relative_to(ROOT).parts[0].startswith((".", "build", "runs"))
    }
    assert folders == {p.relative_to(ROOT).parts[:-1] for p in SOURCES.values()} - {()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_table(module):
    rules = [allowed for name, allowed in ALLOWED if fnmatch.fnmatch(module, name)]
    assert rules, f"{module}: add a row to ALLOWED that says what it may import"
    used = imported(TREES[module])
    assert used <= set(SOURCES), f"{module} imports what is not there"
    for name in used:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in rules[0]), (
            f"{module} imports {name}; allowed: {rules[0]}"
        )


def test_imports_have_no_cycle():
    graph = {name: imported(tree) - {name} for name, tree in TREES.items()}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, "modules that import each other, or depend on such"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_stand_at_the_top(module):
    late = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            late |= {(module, name) for name in imported(node)}
    assert late <= LATE


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= 500
    for name, node in functions(TREES[module]):
        if isinstance(node, ast.ClassDef):
            continue
        limit = LONG_FUNCTIONS.get(f"{module}.{name}", 80)
        length = node.end_lineno - node.lineno + 1
        assert length <= limit, f"{module}.{name} has {length} lines"


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

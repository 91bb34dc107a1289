"""The shape of the program: imports go down the floors, files stay short, nothing unpickles or evaluates text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

LONGEST_FILE, LONGEST_FUNCTION = 300, 60
FLOORS = {
    0: {"config", "options", "launch", "ulfm", "lock", "log", "marks", "named", "disk", "menu", "placement",
        "allocation", "asked", "progress", "startup", "starting", "failure"},
    1: {"comm", "model", "data", "planner", "bridge", "flat"},
    2: {"parallel", "sync"},
    3: {"checkpoint", "state", "optim"},
    4: {"trainer", "server", "assemble", "hybrid", "sequential", "recovery", "resume", "origin", "saver", "validation",
        "stop", "heartbeat", "vigil", "interval", "alike", "arithmetic", "metrics", "room", "connect", "device",
        "trained"},
    5: {"train", "evaluate", "generate", "export", "inspect", "plan", "bench"},
}
FORBIDDEN = {
    "comm": {"torch"},
    "data": {"torch", "mpi4py"},
    "model": {"mpi4py"},
    "planner": {"torch", "mpi4py"},
}
# Neighbours on a floor that may use each other, because they are parts of one thing.
ALLOWED = {("planner", "model.count")}
NAMED_BY_TORCH = {"forward", "backward"}
NO_SUCH_CALLS = {"eval", "exec", "compile"}
NO_SUCH_ATTRIBUTES = {("torch", "load"), ("np", "fromstring")}
PEERS = "mpilm/bench/checkpoint.py"  # what others do is timed there, torch.load among it
NO_SUCH_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

pytestmark = pytest.mark.serial
PROGRAM = sorted(path for package in ("mpilm", "data_prep") for path in (REPOSITORY / package).rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def every(files: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make a test of one file that of all of them, which names each that fails: a test a file would be 1,600 tests."""
    def over_all(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            problems = []
            for path in files:
                try:
                    check(path)
                except AssertionError as error:
                    problems.append(f"{path.relative_to(REPOSITORY)}: {error}")
            assert not problems, "\n".join(problems)
        test.__doc__ = check.__doc__
        return test
    return over_all


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module, path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, by their dotted names, and whether only for type hints."""
    for_types = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in
                 ast.dump(block.test) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                submodule = REPOSITORY / str(node.module).replace(".", "/") / alias.name
                is_module = submodule.with_suffix(".py").exists() or submodule.is_dir()
                yield (f"{node.module}.{alias.name}" if is_module else str(node.module)), id(node) in for_types


def part(module: str) -> str:
    """mpilm.comm.collectives.ring -> comm; mpilm alone -> nothing."""
    return module.split(".")[1] if module.count(".") else ""


def test_there_is_a_program():
    assert len(PROGRAM) > 30


@every(PROGRAM)
def test_imports_go_down(path):
    package, *inside = path.relative_to(REPOSITORY).with_suffix("").parts
    if package == "data_prep":
        uses = {part(name) for name, _ in imports(parse(path), path) if name.split(".")[0] == "mpilm"}
        assert uses - {""} <= FLOORS[0] | {"data"}, f"data_prep may use mpilm.data and floor 0, not {uses}"
        return
    own = inside[0]
    for name, for_types in imports(parse(path), path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN.get(own, set()) or for_types, f"{own} does without {top}"
        if top == "data_prep":
            assert own == "train", "only train prepares the built-in corpus"
        if top == "mpilm" and part(name) not in ("", own, "__init__") and own != "__init__":
            _check_floor(own, part(name), name, for_types=for_types)


def _check_floor(own: str, other: str, name: str, *, for_types: bool) -> None:
    mine, theirs = floor(own), floor(other)
    same = mine == theirs and (mine in (0, 3, 4, 5) or (own, name.removeprefix("mpilm.")) in ALLOWED)
    assert theirs < mine or same or for_types, f"{own} (floor {mine}) imports {other} (floor {theirs})"


def floor(name: str) -> int:
    """The floor of a part of mpilm."""
    found = [number for number, names in FLOORS.items() if name in names]
    assert found, f"mpilm/{name} is on no floor: add it to FLOORS"
    return found[0]


def test_no_import_cycles():
    graph = {}
    for path in PROGRAM:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        at_import = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        tree = ast.Module(at_import, [])
        graph[module] = {name for name, _ in imports(tree, path) if name.split(".")[0] in ("mpilm", "data_prep")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in graph.get(module, ()):
                if other != module and not module.startswith(f"{other}."):
                    visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@every(PROGRAM + TESTS)
def test_files_and_functions_are_short(path):
    lines = path.read_text().count("\n")
    assert lines <= LONGEST_FILE
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION]
    assert not long


@every(PROGRAM)
def test_public_things_have_docstrings(path):
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    missing = [node.name for node in _public(tree) if not ast.get_docstring(node)]
    assert not missing


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            interface = isinstance(node.body[-1], ast.Expr) and ast.unparse(node.body[-1]) == "..."
            if not interface and node.name not in NAMED_BY_TORCH:
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


@every(PROGRAM)
def test_nothing_unpickles_or_evaluates(path):
    tree = parse(path)
    names = {name.split(".")[0] for name, _ in imports(tree, path)}
    assert not names & NO_SUCH_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in NO_SUCH_CALLS, f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not path.match(PEERS):
            assert (node.value.id, node.attr) not in NO_SUCH_ATTRIBUTES, f"line {node.lineno}"


@every(PROGRAM)
def test_nothing_listens_on_the_network(path):
    """MPI alone does; what the benchmark starts for others has to meet somewhere."""
    if "bench" in path.parts:
        return
    tree = parse(path)
    names = {name for name, _ in imports(tree, path)}
    assert not names & {"socketserver", "http.server", "xmlrpc.server", "asyncio", "multiprocessing"}
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and node.attr in ("listen", "bind", "create_server")]


@every(PROGRAM)
def test_no_work_at_import(path):
    """Definitions and constants only: no loops, no calls for their effect, no globals that functions rebind."""
    tree = parse(path)
    for node in tree.body:
        assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try), f"line {node.lineno}"
        effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not effect, f"line {node.lineno}"
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]

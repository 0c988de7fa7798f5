"""The floors of the house: imports go downward, never in a circle, and are never hidden in a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

SRC = Path(__file__).parent.parent / "src" / "pagoda"

FLOORS = MappingProxyType(
    {
        "cli": 8,
        "entrypoints": 9,
        "gateway": 7,
        "integrations": 7,
        "api": 6,
        "deploy": 6,
        "bench": 6,
        "engine": 5,
        "backend": 4,
        "sched": 3,
        "arch": 2,
        "media": 1,
        "text": 1,
        "weights": 1,
    }
)
GROUND = ("types", "errors", "options", "observe", "heap", "short_turns")
# The command line starts fast by importing late; the choice of a backend must not load the others; the root exports
# its public names lazily; an engine reads its tokenizer only when a request has a grammar.
MAY_IMPORT_LATE = ("pagoda.cli.", "pagoda.backend.select", "pagoda.engine.grammars")


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


TREES = MappingProxyType(modules())


def floor(module: str) -> int | None:
    """The floor of a module; None for the root package, which may be imported by all and exports from all."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return 0 if parts[1] in GROUND else FLOORS[parts[1]]


def imported(node: ast.AST, by: str) -> Iterator[str]:
    """Full names of what an import statement brings in: modules, as far as they are ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = by.split(".") if by in PACKAGES else by.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in TREES else base


PACKAGES = frozenset(n for n in TREES if (SRC.parent / Path(*n.split(".")) / "__init__.py").exists())


def type_only(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def edges(*, for_types: bool = True) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        left_out = set() if for_types else type_only(tree)
        nodes = [node for node in ast.walk(tree) if node not in left_out]
        out[name] = {o for node in nodes for o in imported(node, name) if o in TREES and o != name}
    return out


def test_every_folder_has_a_floor() -> None:
    for name in TREES:
        parts = name.split(".")
        assert len(parts) == 1 or parts[1] in FLOORS or parts[1] in GROUND, f"{name} is on no floor"


def test_imports_go_downward() -> None:
    upward = [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, others in edges().items()
        for other in others
        if (mine := floor(name)) is not None and (its := floor(other)) is not None
        # Folders of one floor do not know each other.
        if its > mine or (its == mine != 0 and name.split(".")[1] != other.split(".")[1])
    ]
    assert not upward, "\n".join(upward)


def test_no_circles() -> None:
    """Two modules of one folder may name each other's types; what runs at import goes one way."""
    graph = {n: {o for o in others if o != "pagoda"} for n, others in edges(for_types=False).items() if n != "pagoda"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# The folders of `api`, and what each may know of the others; modules beside them (the application, its table of
# routes, the process) know all. No dialect knows another one, but Ollama has embeddings and batches hold any call.
API = MappingProxyType(
    {
        "http": (),
        "serving": ("http",),
        "turn": ("http", "serving"),
        "openai": ("http", "serving", "turn"),
        "responses": ("http", "serving", "turn"),
        "anthropic": ("http", "serving", "turn"),
        "pooling": ("http", "serving"),
        "ollama": ("http", "serving", "turn", "pooling"),
        "batch": ("http", "serving", "openai", "responses", "pooling"),
    }
)
# What the server keeps for its clients.
STORES = ("pagoda.api.batch.store", "pagoda.api.responses.store")


def test_dialects_stand_side_by_side_on_what_they_share() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in edges().items()
        if (parts := name.split("."))[1:2] == ["api"] and len(parts) > 3
        for other in others
        if (its := other.split("."))[1:2] == ["api"] and other not in STORES
        if its[2] != parts[2] and its[2] not in API[parts[2]]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_is_hidden_in_a_function() -> None:
    hidden = [
        f"{name}:{inner.lineno}"
        for name, tree in TREES.items()
        if not name.startswith(MAY_IMPORT_LATE) and name != "pagoda"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not hidden, hidden


@pytest.mark.parametrize(
    ("library", "folder"),
    [
        ("torch", "backend.torch"),
        ("triton", "backend.torch"),
        ("transformers", "backend.torch"),
        ("langchain_core", "integrations"),
        ("pydantic", "integrations"),
    ],
)
def test_libraries_of_extras_stay_in_their_folder(library: str, folder: str) -> None:
    users = [
        name
        for name, tree in TREES.items()
        if not name.startswith(f"pagoda.{folder}")
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for other in imported(node, name)
        if other.split(".")[0] == library
    ]
    assert not users, users


def test_packages_are_empty_but_the_root() -> None:
    for name in PACKAGES - {"pagoda"}:
        assert not TREES[name].body, f"{name}/__init__.py is not empty"


def test_the_walker_sees_a_violation() -> None:
    """The tests above can fail: a planted import is found in each form it may have."""
    planted = ast.parse("import pagoda.cli.main\nfrom pagoda.cli import main\nfrom ..cli import main\n")
    for node in planted.body:
        assert list(imported(node, "pagoda.text.chat")) == ["pagoda.cli.main"]

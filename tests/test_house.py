"""House rules that a program can check: what is banned in src, lengths, documents that match the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagoda.cli.help import page
from pagoda.cli.main import COMMANDS
from pagoda.options.config import declared

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in (".cpp", ".h", ".inc"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in [*SOURCES, *NATIVE]}
READMES = sorted(ROOT.glob("README*.md"))

BANNED_MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
BANNED_CALLS = frozenset({"eval", "exec", "__import__"})
BANNED_METHODS = frozenset({"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"})
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def is_self_check(node: ast.AST) -> bool:
    """A method `check` that tests call to see whether a data structure agrees with itself: asserts are its job."""
    if not isinstance(node, ast.FunctionDef) or node.name != "check":
        return False
    return "AssertionError" in (ast.get_docstring(node) or "")


def violations(text: str) -> list[str]:
    """What a source file holds that may not be there."""
    out = []
    tree = ast.parse(text)
    self_checks = {inner for node in ast.walk(tree) if is_self_check(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            out += [f"{line}: import {n}" for n in names if n.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in BANNED_CALLS | BANNED_METHODS:
                out.append(f"{line}: {called}()")
            for keyword in node.keywords:
                literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "allow_pickle" and literal is not False:
                    out.append(f"{line}: allow_pickle")
                if keyword.arg == "shell" and literal is not False:
                    out.append(f"{line}: shell=True")
        elif isinstance(node, ast.Assert) and node not in self_checks:
            out.append(f"{line}: assert (python -O removes it; raise an error)")
    return out


def test_nothing_banned() -> None:
    assert {name: found for name, text in TEXTS.items() if name.endswith(".py") and (found := violations(text))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec('1')",
        "torch.load('x')",
        "yaml.load(f)",
        "numpy.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "assert x",
    ],
)
def test_the_ban_sees(line: str) -> None:
    assert violations(line)


def test_files_are_short() -> None:
    assert {name: n for name, text in TEXTS.items() if (n := len(text.splitlines())) > MAX_LINES} == {}


def test_functions_are_short_and_modules_say_what_they_are_for() -> None:
    for name, text in TEXTS.items():
        if not name.endswith(".py"):
            continue
        tree = ast.parse(text)
        assert not tree.body or ast.get_docstring(tree), f"{name}: its first line says its one responsibility"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{name}: {node.name} has {length} lines"


def test_nothing_is_left_to_do() -> None:
    assert [name for name, text in TEXTS.items() if re.search(r"\b(TODO|FIXME|XXX)\b", text)] == []


def test_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "run: make docs"


def test_every_option_is_read_by_somebody() -> None:
    read = {name for text in TEXTS.values() for name in re.findall(r"\b(?:options|self)\.(?=(\w+))", text)}
    assert [setting.flag for setting in declared() if setting.name not in read] == []


@pytest.mark.parametrize("path", [*READMES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_commands_in_documents_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
        for target in re.findall(r"^make ([a-z]+)", block, re.M):
            assert target in targets, f"make {target}"
        for command in re.findall(r"^pagoda ([a-z]+)", block, re.M):
            assert command in COMMANDS, f"pagoda {command}"


@pytest.mark.parametrize("path", [*READMES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.alone
def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from pagoda.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    heavy = {"numpy", "msgspec", "asyncio", "starlette", "uvicorn", "jinja2", "tokenizers", "torch"}
    assert not heavy & set(done.stderr.split())
    # Ten times what it takes alone: other tests may be running beside it.
    assert seconds < 1.0

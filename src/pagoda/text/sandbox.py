"""The Jinja environment of chat templates: no way out, no unbounded values, and what templates expect to find."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pagoda.text.limits import Budget, TemplateLimit

_STR_METHODS = frozenset(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
_NO_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr", "random", "filesizeformat")
_MAX_COUNT = 10_000
_MAX_INDENT = 16
_WIDE_FIELD = re.compile(r"\d{4,}|\*|\{[^{}]*\{")


class TemplateRefusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


class PlainNamespace(Namespace):
    """A namespace that does not write itself out, so that its size need not be counted."""

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is just shown."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guards(NodeTransformer):
    """Sends through a filter what Jinja compiles to bare Python: `~`, slices and literals of containers."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.Tuple(node.nodes, "load"), "concat!", [])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(node.node, "slice!", [bound or nodes.Const(None) for bound in bounds])

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "admit!", [])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "admit!", []) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "admit!", [])


def _filter(node: nodes.Expr, name: str, args: list[nodes.Expr]) -> nodes.Filter:
    return nodes.Filter(node, name, args, [], None, None, lineno=node.lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders within a `Budget`, which each rendering thread sets for itself with `with_budget`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [loopcontrols, GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self._local = threading.local()
        self.concat = self._concat  # type: ignore[method-assign]
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": PlainNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        for name in _NO_FILTERS:
            del self.filters[name]
        own = {"tojson": _tojson, "safe": str, "replace": self._replace, "join": self._join, "format": self._format}
        sized = {name: _small(self.filters[name]) for name in ("batch", "slice", "center", "truncate")}
        own |= sized | {"indent": self._indent}
        self.filters = {name: self._admitted(f) for name, f in (self.filters | own).items()}
        self.filters |= {"concat!": self._concat, "slice!": self._slice, "admit!": self._admit}

    def compile_source(self, source: str) -> tuple[jinja2.Template, nodes.Template]:
        """The compiled template and its syntax tree as it was written."""
        tree = self.parse(source)
        guarded = _Guards().visit(self.parse(source))
        return self.from_string(guarded), tree

    def with_budget(self, budget: Budget) -> None:
        self._local.budget = budget

    @property
    def _budget(self) -> Budget:
        budget: Budget = self._local.budget
        return budget

    # What the sandbox asks before it lets a template do something.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and callable(value) and attr not in _STR_METHODS:
            return False
        if isinstance(obj, int | float | bytes) and not isinstance(obj, str):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._budget.size((args, kwargs))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            args = (list(args[0]),)
            self._budget.check_join(owner, args[0])
        elif isinstance(owner, str) and name == "replace" and len(args) > 1:
            self._budget.check_replace(owner, args[0], args[1])
        return self._budget.admit(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._budget.check_repeat(left, right)
        elif operator == "**":
            self._budget.check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, "%", right)
        return self._budget.admit(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def call(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, "{", (args, kwargs))
            return wrapped(*args, **kwargs)

        return call

    def _check_format(self, pattern: str, sign: str, values: Any) -> None:
        if _WIDE_FIELD.search(pattern):
            raise TemplateLimit("a field of a format is too wide")
        self._budget.check_format(pattern, sign, values)

    # Filters.

    def _admitted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._budget.admit(function(*args, **kwargs))

        return call

    def _admit(self, value: Any) -> Any:
        return self._budget.admit(value)

    def _concat(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        self._budget.check_size(sum(map(len, texts)))
        text: str = self._budget.pay("".join(texts))
        return text

    def _slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return self._budget.pay(value[start:stop:step])

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._budget.check_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = [item if attribute is None else self.getitem(item, attribute) for item in value]
        self._budget.check_join(d, items)
        return d.join(map(str, items))

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        self._check_format(str(value), "%", (args, kwargs))
        text: str = str(value) % (kwargs or args)
        return text

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(width, _MAX_COUNT)
        self._budget.check_replace(s, "\n", "\n" + pad)
        lines = s.split("\n")
        rest = [pad + line if line.strip() or blank else line for line in lines[1:]]
        return "\n".join([(pad if first else "") + lines[0], *rest])


def _small(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, refusing large counts (all numbers among its arguments)."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, int) and a > _MAX_COUNT for a in (*args, *kwargs.values())):
            raise TemplateLimit("a count is too large")
        return function(*args, **kwargs)

    return call


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: no escapes for HTML, characters as they are."""
    pad = len(indent) if isinstance(indent, str) else indent or 0
    if pad > _MAX_INDENT or any(len(s) > _MAX_INDENT for s in separators or ()):
        raise TemplateLimit("the indent of tojson is too large")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any = "") -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or _WIDE_FIELD.search(pattern):
        raise TemplateLimit("the date format is too long")
    return datetime.now().strftime(pattern)


def render_parts(template: jinja2.Template, context: Mapping[str, Any], budget: Budget) -> str:
    """The whole output; stops as soon as it is too long."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**context):
        size += len(part)
        budget.check_size(size)
        parts.append(part)
    return "".join(parts)

"""State dicts of PyTorch: reads the few pickle opcodes that they need. Nothing is imported, nothing is called.

An opcode, or a name, outside the lists below is refused; so code in a hostile file is never more than text here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "torch FloatStorage": "F32",
        "torch HalfStorage": "F16",
        "torch BFloat16Storage": "BF16",
        "torch DoubleStorage": "F64",
        "torch LongStorage": "I64",
        "torch IntStorage": "I32",
        "torch ShortStorage": "I16",
        "torch CharStorage": "I8",
        "torch ByteStorage": "U8",
        "torch BoolStorage": "BOOL",
    }
)
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_NAMES = frozenset({*STORAGES, _DICT, _TENSOR, _PARAMETER})

MAX_BYTES = 64_000_000
_MAX_STEPS = 1 << 22  # 100,000 tensors take about 40 each
_MAX_TEXT_BYTES = 4096
_MAX_INTEGER_BYTES = 8


class NotStateDict(Exception):
    """Why the bytes are refused."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in a file of its own: `key` names it, `type` is the storage type of safetensors."""

    type: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: a part of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the stream mentions, one of the list."""

    text: str


def read_state_dict(data: bytes) -> dict[str, View]:
    """The tensors by name. Anything but a table of tensors raises NotStateDict."""
    found = _Machine(data).run()
    if type(found) is not dict:
        raise NotStateDict(f"it holds a {type(found).__name__}, not a table of tensors")
    for name, value in found.items():
        if not isinstance(value, View):
            raise NotStateDict(f"{name[:80]!r} in it is a {type(value).__name__}, not a tensor")
    return found


class _Machine:
    """The stack that the opcodes work on, the memo, and the place in the stream."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            start = self._at
            code = self._take(1)
            if code == b".":
                return self._pop()
            step = _STEPS.get(code)
            if step is None:
                raise NotStateDict(f"the opcode 0x{code.hex()} at byte {start} has no place in a state dict")
            step(self)
        raise NotStateDict(f"it has more than {_MAX_STEPS} steps")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise NotStateDict("it ends too early")
        self._at += count
        return taken

    def _number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(width), "little", signed=signed)

    def _pop(self) -> Any:
        if not self._stack:
            raise NotStateDict("it takes more from the stack than is there")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        if not self._marked:
            raise NotStateDict("it goes back to a mark that is not there")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def proto(self) -> None:
        version = self._number(1)
        if not 2 <= version <= 5:
            raise NotStateDict(f"it is of the pickle protocol {version}")

    def frame(self) -> None:
        self._take(8)  # a hint for readers of pipes

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def integer(self, width: int, *, signed: bool = False) -> None:
        self.push(self._number(width, signed=signed))

    def long(self) -> None:
        width = self._number(1)
        if width > _MAX_INTEGER_BYTES:
            raise NotStateDict(f"it has a number of {width} bytes")
        self.integer(width, signed=True)

    def text(self, width: int) -> None:
        length = self._number(width)
        if length > _MAX_TEXT_BYTES:
            raise NotStateDict(f"it has a text of {length} bytes")
        self.push(self._decoded(self._take(length)))

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise NotStateDict("it has a text that is not UTF-8") from None

    def group(self, length: int | None) -> None:
        items = self._since_mark() if length is None else [self._pop() for _ in range(length)][::-1]
        self.push(tuple(items))

    def store(self, width: int) -> None:
        self._remember(self._number(width))

    def memoize(self) -> None:
        self._remember(len(self._memo))

    def _remember(self, index: int) -> None:
        self._memo[index] = value = self._pop()
        self.push(value)

    def recall(self, width: int) -> None:
        index = self._number(width)
        if index not in self._memo:
            raise NotStateDict(f"it recalls {index}, which was never stored")
        self.push(self._memo[index])

    def append(self, items: Callable[[_Machine], list[Any]]) -> None:
        new, target = items(self), self._pop()
        if type(target) is not list:
            raise NotStateDict(f"it appends to a {type(target).__name__}")
        target += new
        self.push(target)

    def set_items(self, items: Callable[[_Machine], list[Any]]) -> None:
        new, target = items(self), self._pop()
        if type(target) is not dict or len(new) % 2:
            raise NotStateDict(f"it sets items of a {type(target).__name__}")
        for key, value in zip(new[::2], new[1::2], strict=True):
            if type(key) is not str:
                raise NotStateDict(f"a key in it is a {type(key).__name__}, not a text")
            target[key] = value
        self.push(target)

    def build(self) -> None:
        """The attributes of a table, such as the version of each module: not needed, and dropped."""
        self._pop()
        target = self._pop()
        if type(target) is not dict:
            raise NotStateDict(f"it sets the attributes of a {type(target).__name__}")
        self.push(target)

    def name(self) -> None:
        parts = []
        for _ in range(2):
            end = self._data.find(b"\n", self._at, self._at + _MAX_TEXT_BYTES)
            if end < 0:
                raise NotStateDict("it ends too early")
            parts.append(self._decoded(self._take(end - self._at)))
            self._take(1)
        self._named(*parts)

    def stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise NotStateDict("it names something by no text")
        self._named(module, name)

    def _named(self, module: str, name: str) -> None:
        if f"{module} {name}" not in _NAMES:
            raise NotStateDict(f"it asks for {module[:80]}.{name[:80]}, which has no place in a state dict")
        self.push(_Name(f"{module} {name}"))

    def storage(self) -> None:
        match self._pop():
            case ("storage", _Name(kind), str(key), str(), int(count)) if kind in STORAGES and count >= 0:
                self.push(Storage(STORAGES[kind], key, count))
            case _:
                raise NotStateDict("it refers to something that is no storage")

    def reduce(self) -> None:
        match (given := self._pop(), self._pop()):
            case ((), _Name(text)) if text == _DICT:
                self.push({})
            case ((Storage() as storage, int(offset), tuple(shape), tuple(strides), *_), _Name(text)) if (
                text == _TENSOR and len(given) in (6, 7)
            ):
                self.push(_view(storage, offset, shape, strides))
            case ((View() as view, *_), _Name(text)) if text == _PARAMETER and len(given) == 3:
                self.push(view)
            case _:
                raise NotStateDict("it makes something that is neither a tensor nor a table")


def _view(storage: Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> View:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in numbers):
        raise NotStateDict("a tensor in it has a shape that cannot be")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if all(shape) and last >= storage.elements:
        raise NotStateDict(f"a tensor in it ends at {last + 1} of the {storage.elements} elements of its storage")
    return View(storage, offset, shape, strides)


def _one(machine: _Machine) -> list[Any]:
    return [machine._pop()]


def _pair(machine: _Machine) -> list[Any]:
    return [machine._pop(), machine._pop()][::-1]


_STEPS: Mapping[bytes, Callable[[_Machine], None]] = MappingProxyType(
    {
        b"\x80": _Machine.proto,
        b"\x95": _Machine.frame,
        b"(": _Machine.mark,
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"}": lambda m: m.push({}),
        b"]": lambda m: m.push([]),
        b")": lambda m: m.push(()),
        b"J": lambda m: m.integer(4, signed=True),
        b"K": lambda m: m.integer(1),
        b"M": lambda m: m.integer(2),
        b"\x8a": _Machine.long,
        b"X": lambda m: m.text(4),
        b"\x8c": lambda m: m.text(1),
        b"t": lambda m: m.group(None),
        b"\x85": lambda m: m.group(1),
        b"\x86": lambda m: m.group(2),
        b"\x87": lambda m: m.group(3),
        b"q": lambda m: m.store(1),
        b"r": lambda m: m.store(4),
        b"\x94": _Machine.memoize,
        b"h": lambda m: m.recall(1),
        b"j": lambda m: m.recall(4),
        b"a": lambda m: m.append(_one),
        b"e": lambda m: m.append(_Machine._since_mark),
        b"s": lambda m: m.set_items(_pair),
        b"u": lambda m: m.set_items(_Machine._since_mark),
        b"b": _Machine.build,
        b"c": _Machine.name,
        b"\x93": _Machine.stack_name,
        b"Q": _Machine.storage,
        b"R": _Machine.reduce,
    }
)
OPCODES = frozenset(_STEPS) | {b"."}

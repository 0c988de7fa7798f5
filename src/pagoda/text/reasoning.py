"""Splits what a model thinks from what it answers, by the marks that its family writes around its reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pagoda.errors import ConfigError
from pagoda.text.enclosed import Enclosed
from pagoda.text.parts import Markers, Part, Trimmer

_MAX_BLANK_CHARS = 64
_MINIMAX = "<minimax:tool_call>"
"""Of a template that has ERNIE's marks around what tools say."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The marks of a family. `opened`: the reasoning begins without its first mark, whatever the prompt says.

    `then` is what has to follow the last mark before the answer can begin. `answer` are the marks around that, if any.
    `token` is the special token that the first mark begins with, where the mark is longer.
    """

    start: str
    end: str
    opened: bool = False
    then: str = "\n\n"
    answer: tuple[str, str] | None = None
    token: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts of tokens that the reader must see."""
        return (self.token or self.start, self.end)

    def is_open(self, prompt: str) -> bool:
        """Whether an answer to a prompt with this end begins as reasoning."""
        shown = prompt.rstrip()
        return shown.endswith(self.start) or (self.opened and not shown.endswith(self.end))

    def is_open_in(self, text: str) -> bool:
        """Whether a message that is to be continued breaks off in its reasoning."""
        return text.rfind(self.start) > text.rfind(self.end)

    def is_shown_in(self, template: str) -> bool:
        """Whether a chat template speaks of it."""
        # Phi's templates have <|end|> too, and do not think.
        thinks = self.start in template or (self.end in template and self is not HARMONY)
        return (
            thinks
            and all(mark in template for mark in self.answer or ())
            and not (self.answer and _MINIMAX in template)
        )

    @property
    def closing(self) -> str:
        """What ends a reasoning that has begun, so that the model answers at once."""
        return f"\n{self.end}{self.then}"

    def goes_on_in(self, text: str, *, opened: bool) -> bool:
        """Whether an answer that has come so far is still reasoning."""
        return (opened or text.lstrip().startswith(self.start)) and self.end not in text


_THINK = ReasoningFormat("<think>", "</think>")
HARMONY = ReasoningFormat(
    "<|channel|>analysis<|message|>", "<|end|>", then="<|start|>assistant<|channel|>final<|message|>"
)
"""gpt-oss: the channels of its messages say what is reasoning; see `tool_parsers.harmony`."""

_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "openai_gptoss": HARMONY,
        "ernie45": ReasoningFormat("<think>", "</think>", answer=("<response>", "</response>")),
        "hunyuan_a13b": ReasoningFormat("<think>", "</think>", answer=("<answer>", "</answer>")),
        "qwen3": _THINK,
        "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
        "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
        "gemma4": ReasoningFormat("<|channel>thought", "<channel|>", then="", token="<|channel>"),
        "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
        "deepseek_r1": ReasoningFormat("<think>", "</think>", opened=True),
        "step3": ReasoningFormat("<think>", "</think>", opened=True),
        **dict.fromkeys(
            "deepseek_v3 glm45 glm47 holo2 kimi_k2 mimo minimax_m2 nemotron_v3 olmo3 step3p5".split(), _THINK
        ),
    }
)
_FOUND_BY_TEMPLATE = ("openai_gptoss", "ernie45", "hunyuan_a13b", "qwen3", "mistral", "seed_oss", "granite", "gemma4")


def find_reasoning(template: str, name: str | None = None) -> ReasoningFormat | None:
    """The format that the chat template mentions, or the one named with --reasoning-parser; None: there is none."""
    if name == "none":
        return None
    if name is not None and name != "auto":
        if name not in _FORMATS:
            known = ", ".join((*_FORMATS, "none"))
            raise ConfigError(
                f"--reasoning-parser {name} is not known", remedy=f"Leave it out to find it by itself, or give: {known}"
            )
        return _FORMATS[name]
    formats = (_FORMATS[each] for each in _FOUND_BY_TEMPLATE)
    return next((each for each in formats if each.is_shown_in(template)), None)


class ThinkSplitter:
    """Reasoning first, if the answer begins with it (or `opened` says that it has begun), then content.

    Marks, those around the answer too, and the blank space around them are left out; what `calls` begin with may follow
    the answer. Only at the beginning can there be a first mark: later it is text like any other. One pass, and no more
    is held back than what may become a mark.
    """

    def __init__(self, form: ReasoningFormat, *, opened: bool, calls: Sequence[str] = ()) -> None:
        self._form = form
        self._ends = Markers((form.end,))
        self._reasoning = Trimmer()
        self._enclosed = None if form.answer is None else Enclosed(form.answer, calls)
        self._buffer = ""
        self._step = self._inside if opened else self._before
        self.thinking = opened

    @property
    def settled(self) -> bool:
        """Whether all that follows is content, as it comes."""
        return self._step == self._content and not self._buffer

    def feed(self, text: str) -> list[Part]:
        """What of the answer is certain with this further text."""
        self._buffer += text
        return self._step() if self._buffer else []

    def finish(self) -> list[Part]:
        """What was held back when the answer ended."""
        rest, self._buffer = self._buffer, ""
        if self.thinking:
            return [Part("reasoning", self._reasoning.feed(rest))]
        if self._step == self._inner and self._enclosed is not None:
            rest = self._enclosed.finish()
        return [Part("content", rest)]

    def _before(self) -> list[Part]:
        text = self._buffer.lstrip()
        near = len(self._buffer) - len(text) <= _MAX_BLANK_CHARS
        if near and text.startswith(self._form.start):
            self._buffer = text[len(self._form.start) :]
            self.thinking = True
            self._step = self._inside
            return self._inside()
        if near and self._form.start.startswith(text):
            return []
        return self._begin()

    def _inside(self) -> list[Part]:
        found = self._ends.search(self._buffer)
        cut = len(self._buffer) - self._ends.held(self._buffer) if found is None else found.start()
        reasoning = [Part("reasoning", self._reasoning.feed(self._buffer[:cut]))]
        self._buffer = self._buffer[cut:]
        if found is None:
            return reasoning
        self._buffer = self._buffer[len(self._form.end) :]
        self.thinking = False
        self._step = self._behind
        return reasoning + self._behind()

    def _behind(self) -> list[Part]:
        self._buffer = self._buffer.lstrip("\n")
        if not self._buffer:
            return []
        return self._begin()

    def _begin(self) -> list[Part]:
        """The answer itself."""
        self._step = self._content if self._enclosed is None else self._inner
        return self._step()

    def _inner(self) -> list[Part]:
        text, self._buffer = self._buffer, ""
        return [Part("content", text if self._enclosed is None else self._enclosed.feed(text))]

    def _content(self) -> list[Part]:
        text, self._buffer = self._buffer, ""
        return [Part("content", text)]

"""How one option is declared: its name, type, default, help, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """How one option is written and read. `kind` is the annotation of its field without `| None`.

    `note` is the line that is printed at start when the option was given: what it means on this machine.
    `works` False marks an option of vLLM that Pagoda knows and does not have: any value but the default is refused,
    with `help` as the reason.
    """

    name: str
    kind: str
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    note: str = ""
    secret: bool = False
    works: bool = True

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it, the strongest first."""
        return (f"PAGODA_{self.name.upper()}", *self.env)


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    meta = {"help": help, "group": group, **more}
    return field(default=default, metadata=meta) if default != {} else field(default_factory=dict, metadata=meta)

"""The command `pagoda`: finds the subcommand, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType

from pagoda import __version__
from pagoda.errors import ConfigError, PagodaError

COMMANDS = MappingProxyType(
    {
        "serve": "answer requests over the OpenAI API",
        "chat": "talk to a model in this terminal",
        "complete": "let a server's model go on with a text",
        "run-batch": "answer a file of requests, and end",
        "connect": "how to connect Dify, RAGFlow, LangChain, Claude Code, ...",
        "bench": "how fast does a server answer, with how many requests at once?",
        "check": "is a model complete, sound and supported?",
        "plan": "does a model fit in the memory, and with which context?",
        "convert": "make safetensors of a pytorch_model.bin",
        "doctor": "is this machine fit to serve?",
        "pull": "fetch a model from Hugging Face or ModelScope",
        "list": "the models that are on this machine",
        "rm": "remove models from the caches",
        "pack": "a model and all that serves it in one file, for a machine without network",
        "service": "keep a server running: systemd, tmux or compose",
        "top": "how busy running servers are",
        "version": "print the version (--verbose: and the CPU kernels)",
    }
)

_OTHER_NAMES = MappingProxyType({"collect-env": "doctor", "run": "chat", "ls": "list"})
"""What vLLM and Ollama call a command that has another name here."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

HELP = """\
pagoda: LLM inference and serving

Usage: pagoda COMMAND [options]

Commands:
{commands}

Examples:
  pagoda serve                       the small default model, at http://localhost:8000
  pagoda serve ./qwen3-0.6b          a folder with safetensors, or a .gguf file
  pagoda chat                        talk to the server that is running
  pagoda chat ./model.gguf           the same without a server

Options of a command: pagoda COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words else "--help"
    if command in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
        print(HELP.format(commands=lines), end="")
        return 0
    if command in ("-v", "--version", "version"):
        print(__version__)
        return guarded(_describe) if "--verbose" in words else 0
    return guarded(lambda: _run(command, words))


def guarded(action: Callable[[], int]) -> int:
    """Run it; an error becomes one line on stderr (a traceback with PAGODA_DEBUG=1)."""
    try:
        return action()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("PAGODA_DEBUG") == "1":
            raise
        if isinstance(error, PagodaError):
            print(f"pagoda: {error.message}", file=sys.stderr)
            if error.remedy:
                print(f"  {error.remedy}", file=sys.stderr)
            return error.exit_code
        if isinstance(error, OSError) and error.errno in _DISK:
            print(f"pagoda: cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
            print("  Make room there, or name a folder on another disk", file=sys.stderr)
            return 74
        print(f"pagoda: an error of Pagoda itself: {type(error).__name__}: {error}", file=sys.stderr)
        print("  Run it again with PAGODA_DEBUG=1 to see where, and report that", file=sys.stderr)
        return PagodaError.exit_code


def _describe() -> int:
    from pagoda.backend.cpu.library import describe

    print(f"CPU kernels: {describe()}")
    return 0


def _run(command: str, words: list[str]) -> int:
    command = _OTHER_NAMES.get(command, command)
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1, 0.5)
        remedy = f"Did you mean pagoda {near[0]}?" if near else f"Commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"There is no command {command}", remedy=remedy)
    run: Callable[[list[str]], int] = importlib.import_module(f"pagoda.cli.{command.replace('-', '_')}").run
    return run(words)


if __name__ == "__main__":
    sys.exit(main())

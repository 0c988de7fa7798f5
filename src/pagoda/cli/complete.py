"""`pagoda complete`: let the model of a server go on with texts, typed in the terminal."""

from __future__ import annotations

from pagoda.cli.chat import converse, read_wishes, server_of
from pagoda.cli.talk import Continuer
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda complete [TEXT] [options]

Each text is one prompt; the server that runs at --url goes on with it. Without TEXT: with all that are typed.

Examples:
  pagoda complete "The capital of France is"
  pagoda complete --url http://host:8000/v1 --max-tokens 64

Options:
  --url URL               the server (default http://localhost:8000/v1)
  --model-name NAME       the model's name at that server (default: the first it lists)
  --api-key KEY           the server's key (or in PAGODA_API_KEY, VLLM_API_KEY, OPENAI_API_KEY)
  -q, --quick TEXT        the same as TEXT alone
  --temperature X, --max-tokens N
  --stats                 print the time to the first token and tokens per second after each answer
"""


def run(argv: list[str]) -> int:
    """The command: the text that is given, else all that are typed."""
    wishes = read_wishes("complete", argv)
    if wishes.rest in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if len(wishes.rest) == 1 and not wishes.rest[0].startswith("-"):
        wishes.values.setdefault("quick", wishes.rest.pop())
    unknown = [*wishes.rest, *(["--system-prompt"] if "system_prompt" in wishes.values else [])]
    if unknown:
        raise ConfigError(f"pagoda complete does not know {unknown[0]}", remedy="See: pagoda complete --help")
    sampling = wishes.number("temperature", float) | wishes.number("max_tokens", int) | wishes.count()
    return converse(Continuer(*server_of(wishes), sampling), wishes, [])

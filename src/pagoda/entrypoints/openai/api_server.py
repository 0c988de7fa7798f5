"""`python -m pagoda.entrypoints.openai.api_server --model ...` is `pagoda serve`, for commands written for vLLM."""

from __future__ import annotations

import sys

from pagoda.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))

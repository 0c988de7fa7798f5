"""Milliseconds per token of answers under a JSON schema, with and without forced text tried ahead, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 8},
        "delivery_address": {"enum": ["at home", "in the office"]},
        "priority_level": {"type": "integer", "maximum": 5, "minimum": 1},
        "gift_wrapping_wanted": {"type": "boolean"},
    },
    "required": ["customer_name", "delivery_address", "priority_level", "gift_wrapping_wanted"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})


def answer(core: EngineCore, seed: int) -> tuple[list[int], float]:
    """The tokens of one answer, and its seconds."""
    params = SamplingParams(grammar=GRAMMAR, seed=seed, temperature=1.0, max_tokens=200)
    started, tokens = time.perf_counter(), []
    core.add(Request(request_id="r", prompt_token_ids=[1, 40, 41, 42], params=params))
    while core.has_work:
        tokens += [token for delta in core.step() for token in delta.token_ids]
    return tokens, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    given = {"model": args.model, "num_blocks": 512, "max_model_len": 512, "threads": args.threads}
    cores = {"before": EngineCore(EngineConfig(**given, speculation=None)), "after": EngineCore(EngineConfig(**given))}
    times: dict[str, list[float]] = {name: [] for name in cores}
    for seed in range(args.answers + 4):  # the first four teach the scheduler what a step costs
        found = {name: answer(core, seed) for name, core in cores.items()}
        if found["before"][0] != found["after"][0]:
            raise SystemExit(f"seed {seed}: other tokens")
        for name, (tokens, seconds) in found.items():
            times[name] += [seconds / len(tokens) * 1e3] if seed >= 4 else []
    now = cores["after"].stats().scheduler
    report = {
        "model": Path(args.model).name,
        "threads": args.threads,
        "answers": args.answers,
        **{f"{name}_ms_per_token": round(statistics.median(each), 2) for name, each in times.items()},
        "drafts": now.spec_decode_num_draft_tokens,
        "accepted": now.spec_decode_num_accepted_tokens,
    }
    for core in cores.values():
        core.close()
    print(json.dumps(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The recorded greedy answer: what the packed engine said, and whether it says it again in another place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.engine.llm import LLM
from pagoda.errors import EngineError, ModelError, PagodaError
from pagoda.types import SamplingParams

MANIFEST = "MANIFEST.json"
PROMPT = "A pagoda is a tower with several roofs, one above the other. The oldest ones"
TOKENS = 32
# What the answer depends on; the rest of the server's options says how many answers there are, and to whom.
_OPTIONS = ("dtype", "quantization", "device", "kv-cache-dtype", "load-format", "tensor-parallel-size")
_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of `total` recorded tokens, the first `equal` came again. `here` and `there` are the kernels that computed."""

    equal: int
    total: int
    here: str
    there: str

    @property
    def same_kernels(self) -> bool:
        return self.here == self.there


def record(model: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a model answers; None for one that writes no text."""
    used = {name: options[name] for name in _OPTIONS if name in options}
    keywords = {name.replace("-", "_"): value for name, value in used.items()}
    with LLM(str(model), max_model_len=_CONTEXT, max_num_seqs=1, **keywords) as llm:
        if llm.info.task != "generate":
            return None
        kernels = re.sub(r", \d+ threads?\b", "", llm.info.device)
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        [output] = llm.generate(PROMPT, params)
    answer = output.outputs[0]
    if answer.error is not None or len(answer.token_ids) != TOKENS:
        raise EngineError(f"the model did not answer: {answer.error}", remedy=f"Try it: pagoda chat {model}")
    return {
        "kernels": kernels,
        "options": used,
        "prompt": PROMPT,
        "prompt_token_ids": list(output.prompt_token_ids or ()),
        "token_ids": list(answer.token_ids),
        "text": answer.text,
    }


def compare(folder: Path) -> Agreement | None:
    """Ask the model in an unpacked pack again; None where nothing was recorded."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        recorded, model = manifest["answer"], folder / manifest["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{folder} is no unpacked pack", remedy="Name the folder with MANIFEST.json") from None
    if recorded is None:
        return None
    now = record(model, recorded["options"])
    if now is None or now["prompt_token_ids"] != recorded["prompt_token_ids"]:
        raise ModelError("the tokenizer does not make of the prompt what it made of it before", remedy="Pack it again")
    pairs = list(zip(now["token_ids"], recorded["token_ids"], strict=True))
    equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return Agreement(equal, len(pairs), now["kernels"], recorded["kernels"])


def judge(agreement: Agreement) -> str:
    """The sentence for it; an error where this is not the engine that was packed."""
    all_equal = agreement.equal == agreement.total
    if agreement.same_kernels:
        if not all_equal:
            raise PagodaError(
                f"the model answers otherwise than when it was packed, from token {agreement.equal + 1} on, though the "
                f"kernels are the same ({agreement.here})",
                remedy="Is the memory of this machine sound? Pack it again, and compare",
            )
        return f"the recorded answer came again, all {agreement.total} tokens ({agreement.here})"
    where = f"{agreement.here} here, {agreement.there} where it was packed"
    if agreement.equal == 0:
        raise PagodaError(
            f"the model answers otherwise than when it was packed, from the first token on ({where})",
            remedy="Other kernels round differently, but seldom so: pack it on a machine like this one",
        )
    return (
        f"{agreement.equal} of {agreement.total} tokens of the recorded answer came again; the processors differ "
        f"({where}), so that not all have to"
    )

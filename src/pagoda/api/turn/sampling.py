"""From the fields of a body to SamplingParams; what Pagoda cannot do is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pagoda.api.turn.bodies import ChatBody, CompletionBody, SamplingFields, StreamOptions
from pagoda.engine.beams import BeamSearchParams
from pagoda.errors import BadRequest
from pagoda.options.http import HttpOptions
from pagoda.types import MAX_LOGPROBS, SamplingParams

PRIORITY_HEADER = "x-vllm-priority"
REQUEST_ID_HEADER = "x-request-id"
MAX_LIST = 1024
MAX_DEADLINE_S = 86_400
MAX_PRIORITY = MAX_TOKENS = 2**31 - 1

_WITH_DEFAULT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_AS_GIVEN = ("ignore_eos", "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output")

_NOT_HERE: tuple[tuple[str, str], ...] = (("prompt_embeds", "prompts are text or token ids, not embeddings"),)


def sampling_params(
    body: ChatBody | CompletionBody,
    defaults: Mapping[str, Any],
    vocab_size: int,
    most_logprobs: int = MAX_LOGPROBS,
) -> SamplingParams:
    """Checked parameters. `seed` and `max_tokens` may still be None: they are chosen when the prompt is known."""
    _refuse(body)
    values: dict[str, Any] = {name: getattr(body, name) for name in _AS_GIVEN}
    for name in _WITH_DEFAULT:
        given = getattr(body, name)
        if given is None:
            given = defaults.get(name)
        if given is not None:
            values[name] = int(given) if name == "top_k" else float(given)
    for name in ("n", "min_tokens"):
        if (given := getattr(body, name)) is not None:
            values[name] = given
    stop = defaults.get("stop") if body.stop is None else body.stop
    stop = [stop] if isinstance(stop, str) else stop or []
    params = SamplingParams(
        **values,
        seed=defaults.get("seed") if body.seed is None else body.seed,
        max_tokens=_max_tokens(body, defaults),
        stop=tuple(text for text in stop if text),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=_logit_bias(body.logit_bias),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        bad_words=tuple(body.bad_words or ()),
        logprobs=_logprobs(body, most_logprobs),
        logprob_token_ids=tuple(body.logprob_token_ids or ()),
    )
    params.check(vocab_size, most_logprobs)
    if params.logprob_token_ids and params.logprobs is None:
        raise BadRequest("logprob_token_ids needs logprobs", param="logprob_token_ids")
    _check_others(body)
    return params


def take_headers(body: SamplingFields, headers: Mapping[str, str]) -> None:
    """The priority that came as a header counts where the body gives none, a request's id before the body's."""
    body.request_id = headers.get(REQUEST_ID_HEADER) or body.request_id
    header = headers.get(PRIORITY_HEADER)
    if header is None or body.priority is not None:
        return
    if not re.fullmatch(r"-?[0-9]{1,10}", header):
        raise BadRequest(f"the header {PRIORITY_HEADER} must be a whole number", param="priority")
    body.priority = int(header)


def apply_options(body: SamplingFields, options: HttpOptions) -> None:
    """What the server does for all clients, whatever they ask."""
    if options.enable_force_include_usage and body.stream:
        body.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    body.return_tokens_as_token_ids |= options.return_tokens_as_token_ids


def beam_search(body: SamplingFields, params: SamplingParams) -> BeamSearchParams | None:
    """How to search, where the client wants the likeliest answers. Stop strings and penalties have no part in it."""
    if not body.use_beam_search:
        return None
    if params.grammar:
        raise BadRequest(
            "use_beam_search: not together with structured output or forced calls", param="use_beam_search"
        )
    beams = BeamSearchParams(
        beam_width=params.n,
        max_tokens=1,  # how many there may be is known with the prompt
        ignore_eos=params.ignore_eos,
        length_penalty=body.length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )
    beams.step()
    return beams


def _refuse(body: ChatBody | CompletionBody) -> None:
    for name, why in _NOT_HERE:
        if getattr(body, name):
            raise BadRequest(f"{name}: {why}", param=name)


def _max_tokens(body: ChatBody | CompletionBody, defaults: Mapping[str, float | int]) -> int | None:
    if isinstance(body, CompletionBody) and body.max_tokens is not None:
        return body.max_tokens  # 0 only scores the prompt
    name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
    given: int | None = getattr(body, name)
    if given is not None and not 1 <= given <= MAX_TOKENS:
        raise BadRequest(f"{name} must be at least 1 and at most {MAX_TOKENS}", param=name)
    if given is None and "max_tokens" in defaults:
        return int(defaults["max_tokens"])
    return given


def _logprobs(body: ChatBody | CompletionBody, most: int) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= most:
        raise BadRequest(
            f"top_logprobs must be between 0 and {most}",
            remedy="More are allowed by --max-logprobs",
            param="top_logprobs",
        )
    return (body.top_logprobs or 0) if body.logprobs else None


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    if any(not re.fullmatch(r"[0-9]{1,10}", key) for key in given):
        raise BadRequest("logit_bias must map token ids, written as strings, to numbers", param="logit_bias")
    # OpenAI's range, and what is beyond it changes nothing more: vLLM takes it as the limit.
    return {int(key): max(-100.0, min(100.0, value)) for key, value in given.items()}


def _check_others(body: SamplingFields) -> None:
    checks: tuple[tuple[str, Callable[[], bool], str], ...] = (
        ("priority", lambda: abs(body.priority or 0) <= MAX_PRIORITY, f"must be within ±{MAX_PRIORITY}"),
        (
            "deadline_s",
            lambda: body.deadline_s is None or 0 < body.deadline_s <= MAX_DEADLINE_S,
            f"must be above 0 and at most {MAX_DEADLINE_S} seconds",
        ),
        ("cache_salt", lambda: len(body.cache_salt or "") <= MAX_LIST, f"must have at most {MAX_LIST} characters"),
        (
            "truncate_prompt_tokens",
            lambda: body.truncate_prompt_tokens is None or -1 <= body.truncate_prompt_tokens <= MAX_PRIORITY,
            "must be -1 (the context length) or a number of tokens",
        ),
        ("prompt_logprobs", lambda: body.prompt_logprobs is None or not body.stream, "needs stream: false"),
    )
    for name, holds, rule in checks:
        if not holds():
            raise BadRequest(f"{name} {rule}", param=name)
    if isinstance(body, CompletionBody):
        if body.suffix:
            raise BadRequest("suffix: filling in the middle is not supported by this server", param="suffix")

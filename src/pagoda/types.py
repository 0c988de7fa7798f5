"""The vocabulary that crosses floors and processes: requests, deltas, step plans and their results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pagoda.errors import BadRequest

FinishReason = Literal["stop", "length", "abort", "error"]
BLOCK_SIZE = 16
"""Tokens per block of the paged KV cache; every backend and the scheduler use this one."""

MAX_N = 128
MAX_LOGPROBS = 20
MOST_LOGPROBS = 1000
"""As many as --max-logprobs may allow."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 2048


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """What an output must be, in one of six ways; names and meaning as in vLLM."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens; names and meaning as in vLLM.

    `top_k` 0 or -1 means all tokens. `max_tokens` None means the rest of the context. `logprobs` k asks for the
    chosen token's log-probability and those of the k likeliest tokens (0: only the chosen token's), taken from the
    model's raw logits, before temperature and penalties. `logprob_token_ids` are told of in place of the likeliest,
    whatever `logprobs` says. `seed` None lets the server choose one. `grammar` is what the
    output must match, as `text.grammar` writes it; `LLM` makes it from `structured_outputs`. `bad_words` must not come:
    server and `LLM` make `bad_words_token_ids` of them, and none of these runs of tokens comes in the output.
    `detokenize` and `spaces_between_special_tokens` have no effect: text is always made, as the tokenizer writes it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def check(self, vocab_size: int, most_logprobs: int = MAX_LOGPROBS) -> None:
        """Raise BadRequest, naming the field, for any value that is not finite or out of its range."""
        for name, low, high in _FLOAT_RANGES:
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise BadRequest(f"{name} must be between {low:g} and {high:g}", param=name)
        most = most_logprobs if most_logprobs <= MAX_LOGPROBS else min(most_logprobs, vocab_size)
        for name, low_i, high_i in (*_INT_RANGES, ("logprobs", 0, most), ("prompt_logprobs", 0, most)):
            number = getattr(self, name)
            if number is not None and not low_i <= number <= high_i:
                raise BadRequest(f"{name} must be between {low_i} and {high_i}", param=name)
        if self.repetition_penalty <= 0:
            raise BadRequest("repetition_penalty must be above 0", param="repetition_penalty")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadRequest("min_tokens must not be above max_tokens", param="min_tokens")
        if len(self.stop) > MAX_STOP_STRINGS or any(not s or len(s) > MAX_STOP_CHARS for s in self.stop):
            raise BadRequest(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters", param="stop"
            )
        bad = self.bad_words
        if len(bad) > MAX_BAD_WORDS or any(not word or len(word) > MAX_STOP_CHARS for word in bad):
            raise BadRequest(
                f"bad_words takes at most {MAX_BAD_WORDS} words of 1 to {MAX_STOP_CHARS} characters", param="bad_words"
            )
        if len(self.logprob_token_ids) > most:
            raise BadRequest(f"logprob_token_ids takes at most {most} tokens", param="logprob_token_ids")
        self._check_ids(vocab_size)

    def _check_ids(self, vocab_size: int) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise BadRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
        if any(not math.isfinite(v) or abs(v) > 100 for v in bias.values()):
            raise BadRequest("logit_bias values must be between -100 and 100", param="logit_bias")
        runs = self.bad_words_token_ids
        if len(runs) > 2 * MAX_BAD_WORDS or any(not 1 <= len(run) <= MAX_BAD_WORD_TOKENS for run in runs):
            raise BadRequest(
                f"bad_words_token_ids takes at most {2 * MAX_BAD_WORDS} runs of 1 to {MAX_BAD_WORD_TOKENS} tokens",
                param="bad_words_token_ids",
            )
        lists: dict[str, Iterable[int]] = {
            "logit_bias": bias,
            "stop_token_ids": self.stop_token_ids,
            "logprob_token_ids": self.logprob_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words_token_ids": chain.from_iterable(runs),
        }
        for name, ids in lists.items():
            if any(not 0 <= i < vocab_size for i in ids):
                raise BadRequest(f"{name} holds a token id outside 0..{vocab_size - 1}", param=name)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise BadRequest("allowed_token_ids must not be empty", param="allowed_token_ids")
        if len(self.stop_token_ids) > MAX_LOGIT_BIAS:
            raise BadRequest(f"stop_token_ids takes at most {MAX_LOGIT_BIAS} ids", param="stop_token_ids")


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How `LLM` gives embeddings and scores; names and meaning as in vLLM.

    `dimensions` cuts vectors of models that were trained for it. `use_activation` None is what the model's files say
    (length 1, probabilities), False the bare numbers. `truncate_prompt_tokens` cuts a prompt; -1: to the context.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None


_FLOAT_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 100.0),
)
_INT_RANGES = (
    ("n", 1, MAX_N),
    ("top_k", -1, 2**31 - 1),
    ("seed", -(2**63), 2**64 - 1),
    ("max_tokens", 0, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
)


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One picture, or the frames of one video, resized and ready for a model's vision encoder.

    Its placeholder tokens are `tokens` consecutive ones of the prompt from index `start` on: t * h * w / merge² of
    them, and those that end its rows where a model has such. `grid` is t, h, w in patches; t counts groups of
    `temporal_patch_size` frames. `pixels` are uint8 RGB [frames, h * patch, w * patch, 3], not normalized; a picture
    has one frame, which the encoder repeats. `digest` is 16 bytes over kind, shape and pixels: what is encoded once is
    known by it. `second_per_grid` is the time between groups of frames of a video, in seconds; `repeated` of its last
    frames only fill up their group. `tiles`, until it has a place: rows and columns of tiles that are its frames.
    """

    start: int
    tokens: int
    grid: tuple[int, int, int]
    pixels: bytes
    digest: bytes
    video: bool = False
    second_per_grid: float = 1.0
    repeated: int = 0
    tiles: tuple[int, int] = (1, 1)


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter (arXiv 2106.09685): its name, its folder or file, and a stamp that no other content has."""

    name: str
    path: str
    stamp: str


class Request(msgspec.Struct, kw_only=True):
    """One sequence to generate, as the engine sees it: token ids and resolved parameters, no text.

    The server has already checked it (length, ranges), expanded `n` into single requests, chosen a seed
    (`params.seed` is never None here, 0 <= seed < 2**64) and a `max_tokens` that fits the context.
    `output_token_ids` holds tokens that were generated before (the engine died, or the request moved): the engine
    goes on behind them and never sends them again. `eos_token_ids` end the request unless `params.ignore_eos`.
    A model that is pooled gives one vector for the prompt and no tokens, whatever the parameters say;
    `second_text` is the place of the first token of a second text, for models that read pairs. `images` are in the
    order of their places in the prompt. The model is used with its `adapter`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = []
    second_text: int | None = None
    images: list[Image] = []
    adapter: Adapter | None = None
    cache_salt: str = ""
    priority: int = 0


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log-probability of a chosen (or given) token, and the likeliest tokens at its place, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a request gained in one step. The last delta of a request, and only it, has a finish_reason.

    `token_ids` includes the stop token (eos or stop_token_ids) that ended the request; `stop_reason` is its id where
    it came from `stop_token_ids`, the string where a stop string matched, None for eos. `text` is filled by the
    server (floor `text`); the engine leaves it empty. `prompt_logprobs` comes once, in the first delta that has
    tokens: one entry per prompt token, the first None. `error` goes with finish_reason "error". `pooled` is what a
    pooled model gives, as float32 bytes: the vector, or a score for each label, before any normalization.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    error: str | None = None
    text: str = ""
    pooled: bytes | None = None


Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """Token rows `row` .. `row + count - 1` of a step take, in place of their embeddings, an image's vectors
    `first` .. `first + count - 1`, as the vision encoder makes them of that image alone."""

    image: Image
    row: int
    first: int
    count: int


@dataclass(slots=True)
class StepPlan:
    """One step for an executor: R requests, T tokens, L rows of logits. All arrays are C-contiguous.

    Once its step is done a plan may come again, for the next one, with another step, tokens and positions: whoever
    keeps it copies it.

    Request r feeds tokens `tokens[starts[r]:starts[r + 1]]`, whose absolute positions are `positions[r]`,
    `positions[r] + 1`, ...; positions before that are already in the cache. Position p of request r lives in block
    `block_tables[slots[r], p // BLOCK_SIZE]`, at offset `p % BLOCK_SIZE`. Several requests may read one block, and a
    request may read positions that another request writes in this same step: within each layer all keys and values
    are written before any is read. A token -1 - l is the one that row l of the step before samples; it is given only
    to executors that take a step while the one before runs (`Capacity.steps_in_flight`).

    Row l takes the final hidden state of token row `rows[l]`, which belongs to request `row_request[l]`. Where
    `row_target[l]` is -1 a token is sampled, else that given token is scored (prompt log-probabilities).
    `row_top[l]` is how many likeliest tokens to report: -1 reports no log-probability at all, 0 only the token's.
    `row_mask[l]` is a row of `masks` (bit i of word i // 32 set: token i may be sampled there), or -1.

    Sampling of a row uses its request's parameters (arrays of length R) and draws from Philox4x32-10 keyed by
    `seed[r]` with counter = absolute position of the sampled token, so a token depends on (seed, position) only.
    `history_*` and `bias_*` are ragged: request r owns `start[r]:start[r + 1]`.

    `rope_positions` are the temporal, height and width position by which the keys and queries of each token are
    turned (`Rope.sections`); None: a token's absolute position is all three. Place and mask follow `positions` always.
    An image may be cut over several steps, and come again: executors keep what they have encoded, by its digest.
    `adapters` are the places of the requests' adapters (`Executor.adapt`), -1 for none; None: no request has one.
    `last_seen` is the last position that each token sees, its own or one behind it in the same step; None: its own.
    `kept` is for models with a state that goes from token to token (`ModelSpec.recurrent`), whose executors have places
    for states behind those of the slots: a request begins with a copy of the state in place `kept[r, 0]`, and the state
    that it has before position `kept[r, 2]` is copied to place `kept[r, 1]`; -1: neither.
    """

    step: int
    # tokens
    slots: Int32  # [R]
    starts: Int32  # [R + 1]
    positions: Int32  # [R]
    tokens: Int32  # [T]
    block_tables: Int32  # [max_num_seqs, max_blocks_per_request]
    # rows of logits
    rows: Int32  # [L]
    row_request: Int32  # [L]
    row_target: Int32  # [L]
    row_top: Int32  # [L]
    row_mask: Int32  # [L]
    # sampling parameters
    temperature: Float32  # [R], 0 is greedy
    top_k: Int32  # [R], 0 is all
    top_p: Float32  # [R]
    min_p: Float32  # [R]
    presence: Float32  # [R]
    frequency: Float32  # [R]
    repetition: Float32  # [R]
    seed: npt.NDArray[np.uint64]  # [R]
    history_start: Int32  # [R + 1]; tokens for the penalties, each id once per request; empty without penalties
    history_ids: Int32
    history_counts: Int32  # how often the token is in the output (0: only in the prompt)
    bias_start: Int32  # [R + 1]; added to the logits; -inf forbids
    bias_ids: Int32
    bias_values: Float32
    masks: npt.NDArray[np.uint32]  # [M, ceil(vocab / 32)]
    # of models that are pooled: their rows give hidden states, and sample nothing
    second_texts: Int32 | None = None  # [R] position where a second text begins; None: nowhere
    # of models that see
    rope_positions: Int32 | None = None  # [3, T]
    last_seen: Int32 | None = None  # [T]
    images: tuple[PlannedImage, ...] = ()
    adapters: Int32 | None = None  # [R]
    kept: Int32 | None = None  # [R, 3]; None: no request begins so, nor leaves a copy


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, one entry per row of logits (L). K is the largest `row_top` of the plan (at least 0)."""

    tokens: Int32  # [L] the sampled token, or the given target
    logprobs: Float32  # [L] log-probability of that token under the raw logits; 0 where not asked for
    top_ids: Int32  # [L, K] likeliest first, ties by lower id; entries past row_top[l] are -1
    top_logprobs: Float32  # [L, K]
    ok: npt.NDArray[np.uint8]  # [L] 0 where the logits held a NaN or no token was possible: that request fails alone
    hidden: Float32 | None = None  # [L, hidden size] final hidden states, of models that are pooled

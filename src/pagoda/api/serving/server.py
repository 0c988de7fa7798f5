"""What every route needs: the engine, the model's text side, its names, and the admission of requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pagoda.api.batch.store import BatchStore
from pagoda.api.http.errors import ShuttingDown
from pagoda.api.http.stream import EventStream, Reply
from pagoda.api.responses.store import ResponseStore
from pagoda.api.serving.adapters import LoraSide, ServedAdapters
from pagoda.api.serving.beams import Beams
from pagoda.api.serving.blobs import BlobStore
from pagoda.api.serving.derived import DerivedModels
from pagoda.api.serving.engine import Engine
from pagoda.api.serving.generation import Generation, Pooled, ThinkingLimit
from pagoda.api.serving.hub import Hub
from pagoda.api.serving.metrics import Metrics
from pagoda.api.serving.names import ServedNames
from pagoda.api.serving.pictures import Pictures
from pagoda.engine.beams import BeamSearchParams
from pagoda.engine.grammar_check import GrammarCheck, Words
from pagoda.engine.images import check_images
from pagoda.errors import BadRequest, ContextLengthExceeded, Overloaded
from pagoda.observe import log_request
from pagoda.options.http import HttpOptions
from pagoda.text.bad_words import with_bad_words
from pagoda.text.reply import find_format
from pagoda.text.sentence import SentenceFiles
from pagoda.text.tokenizer import token_table
from pagoda.types import Adapter, Image, Request, SamplingParams

if TYPE_CHECKING:
    from pagoda.text.chat import ChatTemplate
    from pagoda.text.tokenizer import Tokenizer

log = logging.getLogger("pagoda.api")

MAX_LIVE_PROMPT_TOKENS = 8_000_000
MAX_LIVE_IMAGES_BYTES = 1 << 30
DEFAULT_QUEUE = 1024
LOW_PRIORITY = 1 << 20
"""Of the requests of a batch. Others have 0 unless they say so, and a smaller number is served first."""
INLINE_CHARS = 4_000
"""Texts longer than this are encoded in a thread, so that other streams go on meanwhile."""
CHARS_PER_TOKEN = 8
"""Texts with more characters than this per token of context are measured by their beginning first."""
SEED_STEP = 0x9E3779B97F4A7C15
MASK_64 = 2**64 - 1
_CLIENT_ID = re.compile(r"[!-~]{1,128}")
_POOLED = SamplingParams(seed=0)  # a pooled model samples nothing


@dataclass(kw_only=True, eq=False)
class Server:
    """One served model. `names` are those that clients ask for, the first one being its own; `root` is its path.

    `default_params` and `eos_token_ids` come from the model's generation_config.json. `local` says that the server
    listens on this machine only: then the Host and Origin of requests are checked. The parsers are vLLM's names for
    how the model writes reasoning and tool calls; None finds it in the chat template. `derived_dir` keeps what clients
    make of the model, `blobs` the files that they send to make others of.
    """

    engine: Engine
    tokenizer: Tokenizer
    names: Sequence[str]
    root: str
    chat_template: ChatTemplate | None = None
    default_params: Mapping[str, float | int] = field(default_factory=dict)
    default_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: Sequence[int] = ()
    api_keys: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    local: bool = True
    root_path: str = ""
    max_queued: int | None = None
    max_requests_per_key: int | None = None
    log_requests: bool = False
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    sentence: SentenceFiles = field(default_factory=SentenceFiles)
    batches: BatchStore | None = None
    hub: Hub | None = None
    derived_dir: Path | None = None
    blobs: BlobStore | None = None
    pictures: Pictures | None = None
    lora: LoraSide | None = None
    options: HttpOptions = field(default_factory=HttpOptions)
    version: str = "0"

    def __post_init__(self) -> None:
        self.served = ServedNames(self.names, self.root)
        self.adapters = ServedAdapters(self.served, self.lora)
        self.derived = DerivedModels(self.served, self.root, self.derived_dir)
        template = "" if self.chat_template is None else self.chat_template.all_source
        self.format = find_format(template, self.reasoning_parser, self.tool_call_parser)
        self.created = int(time.time())
        self.draining = False
        self.aborted = asyncio.Event()
        self.metrics = Metrics(self.names[0], lambda: self.engine)
        self.responses = ResponseStore()
        self.grammars = GrammarCheck(self._words)
        self._special_tokens: dict[frozenset[str], frozenset[int]] = {}
        self._live: set[Generation] = set()
        self._live_sequences = 0
        self._live_prompt_tokens = 0
        self._live_images_bytes = 0
        self._reported: set[str] = set()

    @property
    def max_model_len(self) -> int:
        return self.engine.info.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.info.vocab_size

    @property
    def eos(self) -> tuple[int, ...]:
        """Every token that ends an answer, whichever of the model's files names it."""
        named = (*self.eos_token_ids, *self.tokenizer.eos_token_ids, *self.engine.info.eos_token_ids)
        return tuple(dict.fromkeys(named))

    @property
    def capacity(self) -> int:
        """Sequences that may be here at once, running and waiting."""
        return self.engine.info.max_num_seqs + (DEFAULT_QUEUE if self.max_queued is None else self.max_queued)

    @property
    def busy(self) -> bool:
        return bool(self._live)

    @property
    def live_calls(self) -> int:
        return len(self._live)

    @property
    def interactive_sequences(self) -> int:
        """Sequences that are here now, running and waiting, without those of batches."""
        return sum(len(each.requests) for each in self._live if each.requests[0].priority < LOW_PRIORITY)

    @property
    def state(self) -> str:
        if self.draining:
            return "shutting down"
        return "ready" if self.engine.ready else "loading"

    @cached_property
    def fingerprint(self) -> str | None:
        """OpenAI's `system_fingerprint`: the same for answers of the same software, model and way to compute it."""
        if self.options.fingerprint_mode in ("custom", "none"):
            return self.options.fingerprint_value if self.options.fingerprint_mode == "custom" else None
        info = self.engine.info
        made_by = f"{self.root}\0{info.weight_types}\0{info.device}\0{info.max_model_len}"
        return f"pagoda-{self.version}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"

    def _words(self) -> Words:
        tokenizer, size = self.tokenizer, self.vocab_size
        special = sorted(i for i in tokenizer.special_ids if i < size)
        return token_table(tokenizer, size), special, list(self.eos)

    def defaults(self, model: str | None) -> Mapping[str, Any]:
        """Sampling parameters for what a request leaves out, of the model that it names."""
        return {**self.default_params, **self.derived.params(self.served.resolve(model))}

    def adapter(self, model: str | None) -> Adapter | None:
        """What the model of this name is used with."""
        made = self.derived.get(model or "")
        return self.adapters.get(model or "") if made is None else self.adapters.need(made.adapter)

    def special_tokens(self, texts: frozenset[str]) -> frozenset[int]:
        """The special tokens among these texts."""
        if texts not in self._special_tokens:
            ids = self.tokenizer.special_ids
            self._special_tokens[texts] = frozenset(i for i in ids if self.tokenizer.token_text(i) in texts)
        return self._special_tokens[texts]

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises ContextLengthExceeded early where its beginning alone is too long."""
        await self.check_length(text)
        return await self.encode_whole(text, add_special_tokens=add_special_tokens)

    async def check_length(self, text: str) -> None:
        """Refuse a text that is far too long by its beginning, without encoding all of it."""
        limit = self.max_model_len
        if len(text) > limit * CHARS_PER_TOKEN:
            held = len(await self.encode_whole(text[: limit * CHARS_PER_TOKEN], add_special_tokens=False))
            if held > limit:
                raise too_long(limit, held, at_least=True)

    async def encode_whole(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def truncate(self, prompt: list[int], keep: int | None, side: str | None) -> list[int]:
        """The last `keep` tokens, or the first where the right side is cut; -1: as many as the context holds."""
        if keep is None:
            return prompt
        keep = self.max_model_len - 1 if keep == -1 else keep
        return prompt[:keep] if side == "right" else prompt[max(0, len(prompt) - keep) :]

    def start(
        self,
        kind: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        images: Sequence[list[Image]] = (),
        model: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
        shown: frozenset[int] = frozenset(),
        deadline_s: float | None = None,
        thinking: ThinkingLimit | None = None,
        client_id: str | None = None,
        beams: BeamSearchParams | None = None,
    ) -> Generation:
        """Admit one call: `params.n` sequences for each prompt. Whoever calls this must close the Generation.

        `images`: those of each prompt; empty where none has any.
        The special tokens in `shown` become part of the text. After `deadline_s` the call ends with an error.
        With `beams` the `params.n` sequences are the best that a search finds.
        `client_id` is the client's own name for the call; what the engine calls it is drawn, for two may choose alike.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        generation_id = f"{kind}-{secrets.token_hex(16)}"
        self.check_count(len(prompts) * params.n)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        params = with_bad_words(params, self.tokenizer)
        adapter = self.adapter(model)
        requests = [
            Request(
                request_id=f"{generation_id}-{index * params.n + i}",
                prompt_token_ids=prompt,
                images=images[index] if images else [],
                params=self._resolve(params, prompt, (seed + i * SEED_STEP) & MASK_64),
                eos_token_ids=self.eos,
                adapter=adapter,
                cache_salt=cache_salt,
                priority=priority,
            )
            for index, prompt in enumerate(prompts)
            for i in range(params.n)
        ]
        if self.pictures is not None:
            for request in requests[:: params.n]:
                check_images(request, self.pictures.seeing.vision)
        if client_id is not None and _CLIENT_ID.fullmatch(client_id):
            generation_id = f"{kind}-{client_id}"
        made = (self, generation_id, model or self.names[0], requests, params.n, shown, deadline_s, thinking)
        generation = Generation(*made) if beams is None else Beams(*made, beams=beams)
        self._admit(generation)
        return generation

    def start_pooled(
        self, kind: str, prompts: Sequence[tuple[list[int], int | None]], *, model: str, priority: int = 0
    ) -> Pooled:
        """Admit one call of a pooled model: prompts, each with the place of its second text, if it is a pair.

        Whoever calls this must close it.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        call_id = f"{kind}-{secrets.token_hex(16)}"
        self.check_count(len(prompts))
        limit = self.max_model_len
        for ids, _ in prompts:
            if not ids:
                raise BadRequest("an input is empty: each must hold at least one token", param="input")
            if len(ids) > limit:
                raise too_long(limit, len(ids))
        requests = [
            Request(
                request_id=f"{call_id}-{index}",
                prompt_token_ids=ids,
                second_text=second,
                params=_POOLED,
                priority=priority,
            )
            for index, (ids, second) in enumerate(prompts)
        ]
        call = Pooled(self, call_id, model, requests, 1)
        self._admit(call)
        return call

    def check_count(self, sequences: int) -> None:
        if sequences > self.capacity:
            raise BadRequest(f"prompts times n must be at most {self.capacity} in one call", param="prompt")

    def _resolve(self, params: SamplingParams, prompt: list[int], seed: int) -> SamplingParams:
        """The parameters of one sequence: its seed, and as many tokens as the context has room for."""
        limit = self.max_model_len
        if not prompt:
            raise BadRequest("the prompt is empty: it must hold at least one token", param="prompt")
        if len(prompt) > limit - 1:
            raise too_long(limit, len(prompt))
        room = limit - len(prompt)
        max_tokens = room if params.max_tokens is None else max(1, min(params.max_tokens, room))
        min_tokens = min(params.min_tokens, max_tokens)
        return msgspec.structs.replace(params, n=1, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens)

    def _admit(self, generation: Generation) -> None:
        sequences = self._live_sequences + len(generation.requests)
        tokens = self._live_prompt_tokens + generation.sequence_prompt_tokens
        images_bytes = self._live_images_bytes + generation.images_bytes
        full = sequences > self.capacity or tokens > MAX_LIVE_PROMPT_TOKENS or images_bytes > MAX_LIVE_IMAGES_BYTES
        # A call that is large by itself is served when it is alone: refusing it would be refusing it for ever.
        if self._live and full:
            self.metrics.rejected("queue_full")
            raise Overloaded("the server is busy: too many requests are waiting", remedy="Try again in a moment")
        self._live.add(generation)
        self._live_sequences, self._live_prompt_tokens, self._live_images_bytes = sequences, tokens, images_bytes

    def release(self, generation: Generation, status: int) -> None:
        """A Generation is over, however it ended: give back its places, count and log it."""
        if generation in self._live:
            self._live.remove(generation)
            self._live_sequences -= len(generation.requests)
            self._live_prompt_tokens -= generation.sequence_prompt_tokens
            self._live_images_bytes -= generation.images_bytes
        total_s = time.monotonic() - generation.started
        self.metrics.finished(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            finish_reasons=generation.finish_reasons,
            first_token_s=generation.first_token_s,
            total_s=total_s,
            max_tokens=generation.requests[0].params.max_tokens,
        )
        if self.log_requests:
            log_request(
                generation.id,
                model=generation.model,
                status=status,
                prompt_tokens=generation.prompt_tokens,
                cached_tokens=generation.cached_tokens,
                completion_tokens=sum(generation.completion_tokens),
                first_token_s=generation.first_token_s,
                total_s=total_s,
                finish=",".join(reason or "cancelled" for reason in dict.fromkeys(generation.finish_reasons)),
            )

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish, then end the rest with an error."""
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.aborted.set()
        self.grammars.close()
        if self.pictures is not None:
            self.pictures.close()
        while self._live and time.monotonic() < deadline + 2:
            await asyncio.sleep(0.02)

    def dress(self, reply: Reply, fields: Sequence[str], generation: Generation | None = None) -> None:
        """Name the request, and the fields that nobody here knows: in headers, and each field once in the log."""
        if isinstance(reply, EventStream):
            reply.heartbeat_s = self.options.sse_keep_alive_interval or math.inf
        if generation is not None:
            reply.headers["x-request-id"] = generation.id
        if fields:
            reply.headers["x-pagoda-ignored"] = ", ".join(_header_safe(name) for name in fields[:50])
        for name in fields:
            if name not in self._reported and len(self._reported) < 1000:
                self._reported.add(name)
                log.info("requests hold the field %r, which has no effect here", name[:64])


def _header_safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64])


def too_long(limit: int, held: int, *, at_least: bool = False) -> ContextLengthExceeded:
    count = f"at least {held}" if at_least else str(held)
    return ContextLengthExceeded(
        f"this model's maximum context length is {limit} tokens, but the prompt holds {count}"
        + (" and leaves no room for an answer" if held == limit else ""),
        remedy="Send a shorter prompt, or start the server with a larger --max-model-len",
    )

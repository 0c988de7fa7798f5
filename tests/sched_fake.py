"""A fake executor for scheduler tests: it checks every plan, and its "model" makes a token from all tokens before it.

Each cell of the cache holds an id of the whole token prefix that was written there, so reading a shared, stale or
never written block by mistake cannot go unseen.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagoda.arch.mrope import rope_positions
from pagoda.sched.config import SchedulerConfig
from pagoda.sched.scheduler import Scheduler
from pagoda.types import BLOCK_SIZE, Delta, Image, Request, SamplingParams, StepPlan, StepResult, TokenLogprob

VOCAB = 40
GARBAGE = -1


def prefix_ids(salt: str, tokens: list[int]) -> list[int]:
    ids, last = [], zlib.crc32(salt.encode())
    for token in tokens:
        last = hash((last, token))
        ids.append(last)
    return ids


def seen(request: Request, tokens: list[int]) -> list[int]:
    """The tokens, with what the images show in the places of theirs."""
    out = list(tokens)
    for image in request.images:
        for i in range(image.tokens):
            out[image.start + i] = hash((image.digest, image.second_per_grid, i))
    return out


def logprob_of(prefix_id: int, token: int) -> float:
    return float(np.float32(-(hash((prefix_id, token)) % 1000) / 100))


def top_of(prefix_id: int, count: int) -> list[tuple[int, float]]:
    return [((prefix_id + i) % VOCAB, logprob_of(prefix_id, i)) for i in range(count)]


def choose(prefix_id: int, seed: int, position: int, allowed: set[int], history: dict[int, int]) -> int | None:
    choices = sorted(allowed)
    if not choices:
        return None
    return choices[hash((prefix_id, seed, position, tuple(sorted(history.items())))) % len(choices)]


def penalty_history(request: Request, outputs: list[int]) -> dict[int, int]:
    params = request.params
    if params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty:
        return {}
    seen = request.prompt_token_ids if params.repetition_penalty != 1 else []
    return {token: outputs.count(token) for token in {*seen, *outputs}}


def stop_ids(request: Request) -> set[int]:
    eos = () if request.params.ignore_eos else request.eos_token_ids
    return {*request.params.stop_token_ids, *eos}


def bias_of(request: Request, output_len: int) -> dict[int, float]:
    bias = dict(request.params.logit_bias or {})
    bias.update((run[0], -math.inf) for run in request.params.bad_words_token_ids if len(run) == 1)
    if output_len < request.params.min_tokens:
        bias.update(dict.fromkeys(stop_ids(request), -math.inf))
    return bias


def allowed_of(request: Request, outputs: list[int]) -> set[int]:
    given = request.params.allowed_token_ids
    allowed = set(range(VOCAB)) if given is None else set(given)
    for *begun, last in request.params.bad_words_token_ids:
        if len(begun) <= len(outputs) and outputs[len(outputs) - len(begun) :] == begun:
            allowed.discard(last)
    return allowed.difference(token for token, value in bias_of(request, len(outputs)).items() if value == -math.inf)


@dataclass
class Told:
    """All that a request has been told, or should have been."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


def solo(request: Request, config: SchedulerConfig) -> Told:
    """What the request gives when it runs alone, by the rules and without a scheduler."""
    told, params = Told(), request.params
    known = [*request.prompt_token_ids, *request.output_token_ids]
    ids = prefix_ids(request.cache_salt, seen(request, known))
    capacity = config.num_blocks * BLOCK_SIZE
    if not known or len(known) > min(capacity, config.max_model_len):
        return Told(finish_reason="error")
    if params.prompt_logprobs is not None and not request.output_token_ids:
        told.prompt_logprobs = [None] + [
            TokenLogprob(token, logprob_of(before, token), top_of(before, params.prompt_logprobs))
            for before, token in zip(ids, request.prompt_token_ids[1:], strict=False)
        ]
    max_tokens = config.max_model_len if params.max_tokens is None else params.max_tokens
    end = min(config.max_model_len, len(request.prompt_token_ids) + max_tokens)
    while told.finish_reason is None:
        if len(known) >= end:
            told.finish_reason = "length"
            break
        outputs = known[len(request.prompt_token_ids) :]
        prefix = ids[-1]
        allowed = allowed_of(request, outputs)
        token = choose(prefix, params.seed or 0, len(known), allowed, penalty_history(request, outputs))
        if token is None:
            told.finish_reason = "error"
            told.prompt_logprobs = told.prompt_logprobs if told.tokens else None
            break
        known.append(token)
        ids.append(hash((prefix, token)))
        told.tokens.append(token)
        if named := params.logprob_token_ids:
            scores = [(each, logprob_of(prefix, each)) for each in named]
            told.logprobs.append(TokenLogprob(token, logprob_of(prefix, token), scores))
        elif params.logprobs is not None:
            told.logprobs.append(TokenLogprob(token, logprob_of(prefix, token), top_of(prefix, params.logprobs)))
        if not params.ignore_eos and token in request.eos_token_ids:
            told.finish_reason = "stop"
        elif token in params.stop_token_ids:
            told.finish_reason, told.stop_reason = "stop", token
        elif len(known) >= end:
            told.finish_reason = "length"
        elif len(known) > capacity:
            told.finish_reason = "error"
    return told


@dataclass
class Launched:
    """A step that was computed and not yet heard of; without a result it failed."""

    plan: StepPlan
    result: StepResult | None
    sampled: dict[str, int]


class Harness:
    """A scheduler with the fake executor behind it; knows what each request was told, from its deltas only.

    With `ahead` a step is planned and computed behind each one before that is heard of, wherever the scheduler does so;
    with `follows` one that just goes on is computed before the one before it is applied.
    """

    def __init__(
        self, config: SchedulerConfig, *, ahead: bool = False, follows: bool = False, encodes: bool = False
    ) -> None:
        self.config = config
        self.ahead, self.steps_ahead = ahead, 0
        self.follows, self.steps_followed = follows, 0
        self.flights: list[Launched] = []
        self.encoded: list[bytes] | None = [] if encodes else None  # digests; None: all are from the start
        self.scheduler = Scheduler(config, encoded=self.is_encoded)
        self.states: dict[int, int] = {}  # of a recurrent model: by place, the id of the prefix that it has read
        self.cells = np.full((config.num_blocks, BLOCK_SIZE), GARBAGE, np.int64)
        self.requests: dict[str, Request] = {}
        self.told: dict[str, Told] = {}
        self.ids: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.steps = 0
        self.plan_sizes: list[int] = []
        self.drafts: dict[str, list[int]] = {}  # fed behind the known tokens in the last step

    def is_encoded(self, image: Image) -> bool:
        return self.encoded is None or image.digest in self.encoded

    def encode(self) -> bool:
        """Encode the image that is wanted, in place of the one before the last; False if there is none."""
        wanted = self.scheduler.wanted_image()
        if wanted is not None and self.encoded is not None:
            self.encoded = [*self.encoded[-1:], wanted[0].digest]
        return wanted is not None

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.told[request.request_id] = Told()
        self.ids[request.request_id] = prefix_ids(request.cache_salt, seen(request, self.known(request.request_id)))
        delta = self.scheduler.add(request)
        if delta is not None:
            self._hear([delta])

    def cancel(self, request_id: str) -> None:
        """Cancel; a request that has not come yet, or has ended, is unknown to the scheduler."""
        if request_id in self.told and self.told[request_id].finish_reason is None:
            self.cancelled.add(request_id)
        self.scheduler.cancel(request_id)
        self.scheduler.check()

    def known(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        return [*request.prompt_token_ids, *request.output_token_ids, *self.told[request_id].tokens]

    def fed(self, request_id: str) -> list[int]:
        """The known tokens, and those sampled that nobody was told yet."""
        return self.known(request_id) + [f.sampled[request_id] for f in self.flights if request_id in f.sampled]

    def plan(self) -> tuple[StepPlan, list[str]] | None:
        """The next plan, and whose turn each of its requests is."""
        plan = self.scheduler.plan_ahead() if self.flights else self.scheduler.plan()
        self.scheduler.check()
        if plan is None:
            assert self.flights or not self.scheduler.has_work or self.scheduler.wanted_image()
            return None
        return plan, self._names()

    def _names(self) -> list[str]:
        return [turn.seq.request_id for turn in self.scheduler._flights.last.turns]

    def step(self, *, fails: bool = False, poisoned: str = "", cancels: list[str] | None = None) -> bool:
        """One step; False when there was nothing to do."""
        if not self.flights and not self._launch(fails, poisoned):
            return False
        if self.ahead:
            self.steps_ahead += self._launch(fails, poisoned)
        flight = self.flights[0]
        self.steps += 1
        for name in cancels or []:
            self.cancel(name)
        if flight.result is None:
            deltas, self.flights = self.scheduler.fail(flight.plan, "the step failed"), []
        elif self.follows and self.scheduler.follow(flight.plan, flight.result):
            self.steps_followed += 1
            self._compute(flight.plan, self._names(), fails, poisoned)
            deltas = self.scheduler.tell()
            del self.flights[0]
        else:
            deltas = self.scheduler.apply(flight.plan, flight.result)
            del self.flights[0]
        self._hear(deltas)
        self.scheduler.check()
        return True

    def _launch(self, fails: bool, poisoned: str) -> bool:
        planned = self.plan()
        if planned is None:
            return False
        plan, names = planned
        self.plan_sizes.append(len(plan.tokens))
        assert 0 < len(plan.tokens) <= self.config.max_num_batched_tokens
        assert len(set(names)) == len(names) <= self.config.max_num_seqs
        assert len(set(plan.slots.tolist())) == len(names)
        if self.flights:
            before = self.flights[-1].result
            if before is None:  # it goes down with the step before
                self.flights.append(Launched(plan, None, {}))
                return True
            plan.tokens[:] = [before.tokens[-1 - t] if t < 0 else t for t in plan.tokens.tolist()]
        self._compute(plan, names, fails, poisoned)
        return True

    def _compute(self, plan: StepPlan, names: list[str], fails: bool, poisoned: str) -> None:
        self._write(plan, names, fails)
        result = None if fails else self._result(plan, names, poisoned)
        sampled = {}
        for row, r in enumerate(plan.row_request.tolist()):
            if result is not None and plan.row_target[row] == -1 and not self.drafts[names[r]]:
                sampled[names[r]] = int(result.tokens[row])
        self.flights.append(Launched(plan, result, sampled))

    def planned(self) -> dict[str, int]:
        """Run a step; how many tokens each request got in it."""
        got = self.plan()
        assert got is not None
        self.finish(*got)
        return dict(zip(got[1], np.diff(got[0].starts).tolist(), strict=True))

    def finish(self, plan: StepPlan, names: list[str]) -> None:
        """Run what was planned and hear what comes of it."""
        self._write(plan, names, False)
        self._hear(self.scheduler.apply(plan, self._result(plan, names, "")))
        self.scheduler.check()

    def run(self, limit: int = 5000) -> None:
        while self.step() or self.encode():
            assert self.steps < limit, "the scheduler does not come to an end"

    def _cells_of(self, plan: StepPlan, r: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        places = np.arange(first, end)
        return plan.block_tables[plan.slots[r], places // BLOCK_SIZE], places % BLOCK_SIZE

    def _write(self, plan: StepPlan, names: list[str], fails: bool) -> None:
        """Write all keys and values of the step, then read all that it reads."""
        written: set[tuple[int, int]] = set()
        for r, name in enumerate(names):
            first, count = int(plan.positions[r]), int(plan.starts[r + 1] - plan.starts[r])
            known = self.fed(name)
            fed = plan.tokens[plan.starts[r] : plan.starts[r + 1]].tolist()
            drafts = fed[len(known) - first :]
            assert count > 0 and fed == [*known, *drafts][first : first + count], "wrong tokens"
            assert not drafts or self.config.speculation, "drafts that nobody asked for"
            ids = self.ids[name] = self.ids[name][: len(self.known(name))]
            for token in [
                *known[len(ids) :],
                *drafts,
            ]:  # true for as long as they are in the cache; `_hear` cuts what was refused
                ids.append(hash((ids[-1], token)))
            self.drafts[name] = drafts
            cells = self._cells_of(plan, r, first, first + count)
            places = set(zip(cells[0].tolist(), cells[1].tolist(), strict=True))
            assert len(places) == count and not places & written, "two writers of one place"
            written |= places
            self.cells[cells] = GARBAGE if fails else self.ids[name][first : first + count]
        self._check_images(plan, names)
        if self.config.recurrent:
            self._move_states(plan, names, fails)
        if fails:
            return
        for r, name in enumerate(names):
            end = int(plan.positions[r] + plan.starts[r + 1] - plan.starts[r])
            assert self.cells[self._cells_of(plan, r, 0, end)].tolist() == self.ids[name][:end], "wrong cache is read"

    def _move_states(self, plan: StepPlan, names: list[str], fails: bool) -> None:
        """Each request goes on from the state of what is before it; no place is read and written in one step."""
        kept = [[-1, -1, -1]] * len(names) if plan.kept is None else plan.kept.tolist()
        read, written = [{row[i] for row in kept} - {-1} for i in (0, 1)]
        assert not read & written and len(written) == sum(row[1] >= 0 for row in kept), "two use one place"
        slots, total = self.config.max_num_seqs, self.config.max_num_seqs + self.config.kept_states
        assert all(slots <= place < total for place in read | written)
        for r, name in enumerate(names):
            first, end, slot = int(plan.positions[r]), int(plan.positions[r] + np.diff(plan.starts)[r]), plan.slots[r]
            begins, to, at = kept[r]
            have = self.states[begins] if begins >= 0 else self.states[slot] if first else 0
            assert have == (self.ids[name][first - 1] if first else 0), "wrong state"
            assert to < 0 or (first < at <= end and at % BLOCK_SIZE == 0)
            for place, position in ((slot, end), (to, at)):
                if place >= 0:
                    self.states[place] = GARBAGE if fails else self.ids[name][position - 1]

    def _check_images(self, plan: StepPlan, names: list[str]) -> None:
        """Each token row has its three positions, and the vector of its image."""
        shown, positions = {}, np.zeros((3, len(plan.tokens)), np.int32)
        for r, name in enumerate(names):
            request = self.requests[name]
            whole, delta = (None, 0)
            if request.images and self.config.vision is not None:
                whole, delta = rope_positions(len(request.prompt_token_ids), request.images, self.config.vision)
            for row in range(plan.starts[r], plan.starts[r + 1]):
                place = int(plan.positions[r]) + row - int(plan.starts[r])
                inside = whole is not None and place < whole.shape[1]
                positions[:, row] = whole[:, place] if whole is not None and inside else place + delta
                for image in request.images:
                    if 0 <= place - image.start < image.tokens:
                        shown[row] = image.digest, place - image.start
        assert all(self.is_encoded(p.image) for p in plan.images)
        told = {p.row + i: (p.image.digest, p.first + i) for p in plan.images for i in range(p.count)}
        assert told == shown and sum(p.count for p in plan.images) == len(told), "wrong images"
        if plan.rope_positions is None:
            assert not any(self.requests[name].images for name in names)
        else:
            assert plan.rope_positions.dtype == np.int32 and np.array_equal(plan.rope_positions, positions)

    def _result(self, plan: StepPlan, names: list[str], poisoned: str) -> StepResult:
        rows = len(plan.rows)
        width = max(0, int(plan.row_top.max(initial=0)))
        tokens, logprobs, ok = np.zeros(rows, np.int32), np.zeros(rows, np.float32), np.ones(rows, np.uint8)
        top_ids, top_logprobs = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32)
        for row in range(rows):
            r, at, top = int(plan.row_request[row]), int(plan.rows[row]), int(plan.row_top[row])
            assert plan.starts[r] <= at < plan.starts[r + 1]
            place = int(plan.positions[r]) + at - int(plan.starts[r])
            prefix = int(self.cells[self._cells_of(plan, r, place, place + 1)][0])
            token: int | None = int(plan.row_target[row])
            if token == -1:
                token = self._sample(plan, row, names[r], prefix, place + 1)
            if token is None or names[r] == poisoned:
                ok[row] = 0
                continue
            tokens[row] = token
            if top >= 0:
                logprobs[row] = logprob_of(prefix, token)
                for i, (top_id, value) in enumerate(top_of(prefix, top)):
                    top_ids[row, i], top_logprobs[row, i] = top_id, value
        return StepResult(tokens, logprobs, top_ids, top_logprobs, ok)

    def _sample(self, plan: StepPlan, row: int, name: str, prefix: int, position: int) -> int | None:
        """Choose by the plan's arrays alone, after comparing them with what the request says."""
        request, params, r = self.requests[name], self.requests[name].params, int(plan.row_request[row])
        fed = [*self.fed(name), *self.drafts[name]]
        assert len(self.fed(name)) <= position <= len(fed), "sampled in the middle"
        told = (plan.temperature, plan.top_p, plan.min_p, plan.presence, plan.frequency, plan.repetition)
        asked = [params.temperature, params.top_p, params.min_p]
        asked += [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
        assert [float(a[r]) for a in told] == [float(np.float32(value)) for value in asked]
        assert plan.top_k[r] == max(params.top_k, 0)
        outputs = fed[len(request.prompt_token_ids) : position]
        own = slice(plan.history_start[r], plan.history_start[r + 1])
        history = dict(zip(plan.history_ids[own].tolist(), plan.history_counts[own].tolist(), strict=True))
        assert len(history) == own.stop - own.start and history == penalty_history(request, outputs)
        own = slice(plan.bias_start[r], plan.bias_start[r + 1])
        bias = dict(zip(plan.bias_ids[own].tolist(), plan.bias_values[own].tolist(), strict=True))
        assert len(bias) == own.stop - own.start and bias == bias_of(request, len(outputs))
        allowed = set(range(VOCAB))
        if plan.row_mask[row] >= 0:
            words = plan.masks[plan.row_mask[row]]
            allowed = {token for token in allowed if words[token // 32] >> np.uint32(token % 32) & np.uint32(1)}
        allowed -= {token for token, value in bias.items() if value == -math.inf}
        assert allowed == allowed_of(request, outputs)
        return choose(prefix, int(plan.seed[r]), position, allowed, history)

    def _hear(self, deltas: list[Delta]) -> None:
        assert len({delta.request_id for delta in deltas}) == len(deltas)
        for delta in deltas:
            name, told = delta.request_id, self.told[delta.request_id]
            assert name not in self.cancelled and told.finish_reason is None, "a delta after the end"
            assert delta.token_ids or delta.finish_reason, "an empty delta"
            first = not told.tokens
            del self.ids[name][len(self.known(name)) :]
            told.tokens += delta.token_ids
            for token in delta.token_ids:
                self.ids[name].append(hash((self.ids[name][-1], token)))
            told.logprobs += delta.logprobs or []
            if delta.prompt_logprobs is not None:
                assert first and told.prompt_logprobs is None
                told.prompt_logprobs = delta.prompt_logprobs
            assert first or delta.cached_tokens == 0
            told.cached_tokens.append(delta.cached_tokens)
            told.finish_reason, told.stop_reason, told.error = delta.finish_reason, delta.stop_reason, delta.error
            assert (delta.error is None) == (delta.finish_reason != "error")

    def assert_empty(self) -> None:
        stats = self.scheduler.stats()
        assert not self.scheduler.has_work
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        self.scheduler.check()


def harness(**changes: Any) -> Harness:
    settings = {
        "num_blocks": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": 512,
        "vocab_size": VOCAB,
    }
    return Harness(SchedulerConfig(**{**settings, **changes}))


def request(name: str, prompt: int | list[int], *, first: int = 0, **params: Any) -> Request:
    """A request of `prompt` tokens (or these); keywords of Request and of SamplingParams."""
    tokens = [(first + i) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    fields = {key: params.pop(key) for key in ("eos_token_ids", "cache_salt", "priority") if key in params}
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 8, **params})
    return Request(request_id=name, prompt_token_ids=tokens, params=sampling, **fields)


def zeros(plan: StepPlan) -> StepResult:
    rows = len(plan.rows)
    empty = np.zeros((rows, 0), np.float32)
    return StepResult(np.full(rows, 7, np.int32), empty.sum(1), empty.astype(np.int32), empty, np.ones(rows, np.uint8))

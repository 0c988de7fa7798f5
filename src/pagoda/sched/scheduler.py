"""Decides what each step computes: who runs, with how many tokens and which blocks; and what comes of its result.

A request has computed and known tokens, and a step closes part of the difference: there are no prefill or decode
phases. `plan` makes a step, `apply` or `fail` ends it. Behind a step in flight another one may be planned before that
has its result (`plan_ahead`): what it will compute is taken as done, and the tokens it will sample as known.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain
from operator import attrgetter

from pagoda.arch.memory import blocks_for
from pagoda.sched.adapters import Places
from pagoda.sched.batch import Batch
from pagoda.sched.blocks import BlockPool
from pagoda.sched.config import SchedulerConfig
from pagoda.sched.course import Course, course_of
from pagoda.sched.flights import Flight, Flights
from pagoda.sched.images import Encoded, Images, at_once, needing
from pagoda.sched.outcome import NO_LOGITS, Outcome
from pagoda.sched.pace import Load, Pace
from pagoda.sched.prefixes import Prefixes
from pagoda.sched.state import Grammar, Proposer, Sequence, Turn, turn_of
from pagoda.sched.states import States
from pagoda.sched.stats import SchedulerStats
from pagoda.sched.trials import Trials
from pagoda.types import BLOCK_SIZE, Adapter, Delta, Image, Request, StepPlan, StepResult

_ORDER = attrgetter("order")


class Scheduler:
    def __init__(self, config: SchedulerConfig, proposer: Proposer | None = None, encoded: Encoded = at_once) -> None:
        self._config = config
        self._images = Images(encoded, lambda seq: len(self._prefixes.cached(seq)) * BLOCK_SIZE)
        self.places = Places(config.max_loras)
        self._pool = BlockPool(config.num_blocks)
        self._batch = Batch(config.max_num_seqs, config.max_model_len, config.vocab_size)
        self._states = States(config.recurrent, config.max_num_seqs, config.kept_states)
        self._prefixes = Prefixes(config.prefix_caching, self._pool, self._states)
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # both lists by (priority, arrival)
        self._running: list[Sequence] = []
        self._flights = Flights()
        self._pace = Pace(config.step_time_target_s)
        self._trials: Trials | None = None
        if config.speculation is not None:
            self._trials = Trials(config.speculation, self._pace, self._pool, self._make_room, proposer)
        self._speculator = self._trials.speculator if self._trials else None
        self._load = Load()  # of the step that is being planned
        self._course: Course | None = None
        self._last: Flight | None = None
        self._measured: tuple[Load, float, float | None] | None = None
        self._arrivals = 0
        self._steps = 0
        self._preemptions = 0
        self._prefix_queries_tokens = 0
        self._prefix_hits_tokens = 0
        self._outcome = Outcome(config.num_blocks * BLOCK_SIZE)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._flights)

    def add(self, request: Request, grammar: Grammar | None = None) -> Delta | None:
        """Queue a request. One that could never run is not queued: its only delta is returned instead."""
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} is already in the engine")
        known_len = len(request.prompt_token_ids) + len(request.output_token_ids)
        limit = min(self._config.max_model_len, self._config.num_blocks * BLOCK_SIZE)
        if not 0 < known_len <= limit:
            error = (
                f"the request has {known_len} tokens, the engine takes 1 to {limit}; send fewer, or give it more memory"
            )
            return Delta(request_id=request.request_id, finish_reason="error", error=error)
        config = self._config
        seq = Sequence(request, self._arrivals, config.max_model_len, config.vocab_size, grammar, vision=config.vision)
        if self._config.pooling is not None:
            seq.pool_as(self._config.pooling)
        self._arrivals += 1
        self._live[seq.request_id] = seq
        insort(self._waiting, seq, key=_ORDER)
        return None

    def cancel(self, request_id: str) -> None:
        """Forget a request; no delta follows. What it holds is freed now, or after the step it takes part in."""
        seq = self._live.get(request_id)
        if seq is None:
            return
        if seq.slot < 0:
            del self._live[request_id]
            del self._waiting[bisect_left(self._waiting, seq.order, key=_ORDER)]
            return
        self._drop(seq)
        self._leave(seq)

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        if self._flights:
            raise ValueError("the step before has no result yet")
        return self._plan()

    def plan_ahead(self) -> StepPlan | None:
        """The step behind the one in flight; None where that one's tokens must be known first, or nothing is left.

        A token -1 - l of the plan is the one that row l of the step in flight samples.
        """
        if self._speculator is not None or not self._flights.assume():
            return None
        # else one would have to make room that is computing now
        missing = sum(max(0, blocks_for(len(seq.known)) - len(seq.blocks)) for seq in self._running)
        return self._plan() if missing <= self._pool.free else None

    def _plan(self) -> StepPlan | None:
        self._load, self._course = Load(), None
        turns = self._continue_running(self._config.max_num_batched_tokens)
        published = self._prefixes.publish_filled(turns)
        budget = self._config.max_num_batched_tokens - sum(turn.count for turn in turns)
        self._admit_waiting(budget, turns, published)
        if not turns:
            return None
        if self._trials is not None and not self._load.prompts:
            self._trials.add(turns, self._load, budget, len(self._running))
        self._steps += 1
        self._states.plan(turns)
        plan = self._batch.plan(self._steps, turns, alone=not self._flights)
        self._flights.add(Flight(plan, turns, published, self._load))
        return plan

    def follow(self, plan: StepPlan, result: StepResult) -> bool:
        """Whether the streams of a step that has its result just go on: then its plan is now that of the next one, and
        `tell` says what came of it, once that has begun. Else `apply` it first, and `plan`."""
        turns = self._flights.last.turns
        if self._waiting or len(self._running) != len(turns) or self._config.kept_states or not all(result.ok.tolist()):
            return False
        course = self._course = self._course or course_of(self._flights.last, self._speculator)
        if course is None or not course.goes_on(tokens := result.tokens.tolist()):
            return False
        if len(lacking := course.lacking()) > self._pool.free:
            return False
        for seq in lacking:
            self._batch.add_blocks(seq, self._pool.take(1))
        self._last, self._steps = self._flights.land(plan), self._steps + 1
        self._batch.follow(plan, self._steps, result.tokens)
        self._flights.add(course.go_on(tokens))
        return True

    def tell(self) -> list[Delta]:
        """What came of the step that was followed."""
        deltas = self._course.tell() if self._course else []
        if not deltas:
            return []
        self._outcome.generation_tokens += len(deltas)
        self._flights.last.published += self._prefixes.publish_filled(self._flights.last.turns)
        return deltas

    def wanted_image(self) -> tuple[Image, float] | None:
        """What to encode next, and how long that may take before the next step."""
        image = None if self._config.vision is None else self._images.wanted(chain(self._running, self._waiting))
        return None if image is None else (image, self._pace.aside_s(self._load))

    def needing(self, what: Image | Adapter) -> list[str]:
        return needing(what, chain(self._running, self._waiting))

    def wanted_adapter(self) -> tuple[int, Adapter] | None:
        return self.places.wanted(self._waiting)

    def observe(self, plan: StepPlan, seconds: float, work_s: float | None = None) -> None:
        """How long the last step took, and its processor time where that tells more. It decides only how prompts are
        cut, so answers never depend on it."""
        if self._last is None or self._last.plan is not plan:
            raise ValueError("this is not the last step")
        self.learn()
        self._measured = self._last.load, seconds, work_s
        self._last = None

    def learn(self) -> None:
        """Draw the conclusion from what was observed; before the next prompt is cut at the latest."""
        if self._measured is not None:
            self._pace.observe(*self._measured)
            self._measured = None

    def apply(self, plan: StepPlan, result: StepResult) -> list[Delta]:
        """Take in a step's result: at most one delta for each request that took part."""
        flight = self._last = self._flights.land(plan)
        self._states.landed(flight.turns)
        deltas = []
        for seq, delta in self._outcome.read(flight.turns, result):
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is not None:
                    self._drop(seq)
                    if delta.error == NO_LOGITS:
                        self._pool.unpublish(seq.blocks)  # they may be why, and must not be served again
                        self._states.forget(seq.hashes)
            if delta is not None and delta.error is None and seq.offered < seq.computed // BLOCK_SIZE:
                self._prefixes.publish(seq, 0)  # drafts that were right may have filled a block
            if not seq.alive:
                self._leave(seq)
        return deltas

    def fail(self, plan: StepPlan, message: str) -> list[Delta]:
        """A step went wrong as a whole: all its requests end, and nothing it would have written is kept.

        A step planned behind it fails with it: it may read what is not there.
        """
        behind = self._flights.behind(plan)
        failed = self._fail(plan, message)
        return failed if behind is None else failed + self._fail(behind.plan, message)

    def give_up(self, message: str) -> None:
        """All steps in flight fail, and nobody is told."""
        for plan in self._flights.plans():
            self._fail(plan, message)

    def _fail(self, plan: StepPlan, message: str) -> list[Delta]:
        flight = self._last = self._flights.land(plan)
        self._pool.unpublish(flight.published)
        self._states.failed(flight.turns)
        deltas = []
        for turn in flight.turns:
            seq = turn.seq
            if seq.alive:
                deltas.append(Delta(request_id=seq.request_id, finish_reason="error", error=message))
                self._drop(seq)
            self._leave(seq)
        return deltas

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_used=self._pool.total - self._pool.free,
            blocks_total=self._pool.total,
            prefix_queries_tokens=self._prefix_queries_tokens,
            prefix_hits_tokens=self._prefix_hits_tokens,
            preemptions=self._preemptions,
            prompt_tokens=self._outcome.prompt_tokens,
            generation_tokens=self._outcome.generation_tokens,
            spec_decode_num_drafts=self._speculator.drafts if self._speculator else 0,
            spec_decode_num_draft_tokens=self._speculator.draft_tokens if self._speculator else 0,
            spec_decode_num_accepted_tokens=self._outcome.accepted_drafts,
        )

    def check(self) -> None:
        """Raise AssertionError unless blocks, slots and queues agree with each other."""
        seated = self._running + self._flights.leaving()
        self._pool.check([seq.blocks for seq in seated])
        self._states.check(self._flights.turns())
        slots = [seq.slot for seq in seated] + self._free_slots
        assert sorted(slots) == list(range(self._config.max_num_seqs)), "slots lost or given twice"
        queued = self._running + self._waiting
        assert {seq.request_id: seq for seq in queued} == self._live and len(queued) == len(self._live), "queues differ"
        assert all(seq.slot < 0 and not seq.blocks for seq in self._waiting), "a waiting request holds something"
        for seq in seated:
            assert self._batch.block_tables[seq.slot, : len(seq.blocks)].tolist() == seq.blocks, "block table differs"

    def _continue_running(self, budget: int) -> list[Turn]:
        """Turns of running requests: those that lack one token first, so that no stream waits behind a prompt."""
        lacks_one = [seq for seq in self._running if len(seq.known) - seq.computed == 1 and not seq.ends_in_flight]
        lacks_more = [seq for seq in self._running if len(seq.known) - seq.computed > 1]
        turns = []
        for seq in lacks_one:
            if budget > 0 and seq.slot >= 0 and self._images.clear(seq, seq.computed, 1, 1) and self._make_room(seq, 1):
                turns.append(turn_of(seq, 1))
                self._load.add_stream(seq.computed)
                budget -= 1
        if lacks_more:
            self.learn()
        for seq in lacks_more:
            count = min(len(seq.known) - seq.computed, budget, self._pace.prompt_tokens(self._load, seq.computed))
            count = self._states.cut(seq, self._images.clear(seq, seq.computed, count, budget))
            if count > 0 and seq.slot >= 0 and self._make_room(seq, count):
                turns.append(turn_of(seq, count))
                self._load.add_prompt(seq.computed, count)
                budget -= count
        return [turn for turn in turns if turn.seq.slot >= 0]

    def _make_room(self, seq: Sequence, count: int) -> bool:
        """Give a running request blocks for `count` more tokens, at the cost of those behind it in the order."""
        if seq.computed + count <= len(seq.blocks) * BLOCK_SIZE:
            return True
        while (missing := blocks_for(seq.computed + count) - len(seq.blocks)) > self._pool.free:
            last = self._running[-1]
            self._preempt(last)
            if last is seq:
                return False
        self._batch.add_blocks(seq, self._pool.take(missing))
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, before all that came later; its tokens stay known and are computed again."""
        self._running.remove(seq)
        self._release(seq)
        insort(self._waiting, seq, key=_ORDER)
        self._preemptions += 1

    def _admit_waiting(self, budget: int, turns: list[Turn], published: list[int]) -> None:
        """Start waiting requests in order, while there are tokens, slots, and blocks for all that each one knows."""
        if not self._waiting:
            return
        self.learn()
        # One block more than known for each running request: else it would soon push out who came in.
        promised = sum(max(0, blocks_for(len(seq.known)) + 1 - len(seq.blocks)) for seq in self._running)
        place, held, reserved = 0, False, 0  # slots for those that let others go first
        while place < len(self._waiting) and budget > 0 and len(self._free_slots) > reserved:
            seq = self._waiting[place]
            held = held or self.places.lack(seq)
            if self._images.waits(seq) or (held and seq.request.adapter is not None):
                # others go first: its like then find in the cache what it has computed, or places come free
                place += 1
                continue
            cached = self._prefixes.cached(seq)
            done = len(cached) * BLOCK_SIZE
            most = min(budget, self._pace.prompt_tokens(self._load, done), len(seq.known) - done)
            if self._config.whole_prompts:
                most = len(seq.known) if len(seq.known) <= budget or not turns else 0
            count = self._images.clear(seq, done, most, budget)
            needed = blocks_for(len(seq.known)) - len(cached) + self._pool.free_among(cached) + promised
            if count == 0 or needed > self._pool.free:
                break
            if self._states.awaited(seq, done, self._running):
                place, reserved, promised = place + 1, reserved + 1, needed  # what it needs is left for it
                continue
            del self._waiting[place]
            self._seat(seq, cached)
            count = self._states.cut(seq, count)
            self._make_room(seq, count)
            self._load.add_prompt(seq.computed, count)
            turn = turn_of(seq, count)
            turns.append(turn)
            published += self._prefixes.publish(seq, count)
            promised += blocks_for(len(seq.known)) + 1 - len(seq.blocks)
            budget -= count

    def _seat(self, seq: Sequence, cached: list[int]) -> None:
        self._pool.hold(cached)
        seq.slot = self._free_slots.pop()
        seq.place = self.places.take(seq)
        self._batch.seat(seq)
        self._batch.add_blocks(seq, cached)
        seq.offered, seq.computed = len(cached), len(cached) * BLOCK_SIZE
        self._states.seat(seq)
        insort(self._running, seq, key=_ORDER)
        if seq.cached_tokens < 0:
            seq.cached_tokens = seq.computed
            if self._config.prefix_caching:
                self._prefix_queries_tokens += len(seq.known)
                self._prefix_hits_tokens += seq.computed

    def _leave(self, seq: Sequence) -> None:
        """Free what a request held that is gone, unless a step in flight still writes there."""
        if not self._flights.hold(seq):
            self._release(seq)

    def _drop(self, seq: Sequence) -> None:
        """A running request ends; what it holds stays until `_release`."""
        seq.alive, self._course = False, None
        self._running.remove(seq)
        del self._live[seq.request_id]

    def _release(self, seq: Sequence) -> None:
        self._pool.release(seq.blocks)
        self._free_slots.append(seq.slot)
        self.places.leave(seq)
        seq.blocks, seq.slot, seq.place = [], -1, -1

"""Which states of prefixes a recurrent model has kept, where, and which ones a step is to begin with or to leave."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda.sched.state import Sequence, Turn
from pagoda.types import BLOCK_SIZE

_APART = 64
"""Tokens between the states that an output leaves, and the least that a shared prefix must save to get one."""
_SUFFIX = 8
"""So many tokens at the end of a prompt may open the answer, and come otherwise once that is part of the history."""


class States:
    """A state is found by the hash of the block that ends where it does, and lives until the longest unused has to go.

    A prefix in the cache is of use as far as there is a state behind it. So each request leaves one behind its prompt;
    one behind its output, which moves on with it; one behind its first message, with which other chats may begin; and
    one where it leaves a prefix that is in the cache and has none. Who comes next with such a prefix finds the state,
    or waits for it while it is on its way. Places are numbered behind the slots.
    """

    def __init__(self, recurrent: bool, slots: int, count: int) -> None:
        self._recurrent, self._count = recurrent, count
        self._blank = list(range(slots + count - 1, slots - 1, -1))
        self._place_of: dict[bytes, int] = {}  # the one that was used last comes last
        self._read = set[int]()  # by the step that is being planned: it must not write there

    def prefix(self, seq: Sequence, blocks: list[int]) -> list[int]:
        """Of the cached blocks that a request's tokens begin with, those up to the last state."""
        if not self._recurrent:
            return blocks
        seq.shared = len(blocks) * BLOCK_SIZE
        count = next((n for n in range(len(blocks), 0, -1) if seq.hashes[n - 1] in self._place_of), 0)
        return blocks[:count]

    def seat(self, seq: Sequence) -> None:
        """A request begins to run, behind what `prefix` gave."""
        seq.begins, seq.leaves = -1, []
        if not self._count:
            return
        if seq.computed:
            last = seq.hashes[seq.computed // BLOCK_SIZE - 1]
            seq.begins = self._place_of[last] = self._place_of.pop(last)
            self._read.add(seq.begins)
        end = max(0, seq.prompt_len - _SUFFIX) // BLOCK_SIZE * BLOCK_SIZE
        places = {place for place in (_first_message(seq), seq.shared) if seq.computed + _APART <= place < end}
        seq.leaves = sorted(places | ({end} if seq.computed < end else set()))

    def awaited(self, seq: Sequence, done: int, running: Iterable[Sequence]) -> bool:
        """One that runs will leave a state behind more of these tokens than `done`, those to begin with now."""
        most = seq.reusable_len()
        for other in running:
            for place in reversed(other.leaves):
                count = place // BLOCK_SIZE
                if done + _APART <= place <= most and seq.hash_blocks(count)[-1] == other.hash_blocks(count)[-1]:
                    return True
        return False

    def cut(self, seq: Sequence, count: int) -> int:
        """How many of the next `count` tokens of a request a step may take: it leaves one state at most."""
        due = [place for place in seq.leaves if seq.computed < place <= seq.computed + count]
        return due[0] - seq.computed if len(due) > 1 else count

    def plan(self, turns: Iterable[Turn]) -> None:
        """Say in the turns of a step where they begin, and what they leave."""
        if not self._count:
            return
        for turn in turns:
            begins, turn.seq.begins = turn.seq.begins, -1
            at = self._due(turn)
            place = self._take() if at else -1
            taken = range(turn.seq.computed + 1, turn.seq.computed + turn.count + 1)
            turn.seq.leaves = [each for each in turn.seq.leaves if each not in taken or (each == at and place >= 0)]
            if begins >= 0 or place >= 0:
                turn.kept = begins, place, at
        self._read.clear()

    def landed(self, turns: Iterable[Turn]) -> None:
        """The step of these turns is done: what they left can be found."""
        for turn in turns:
            if turn.kept is None or turn.kept[1] < 0:
                continue
            seq, (_, place, at) = turn.seq, turn.kept
            seq.leaves = [each for each in seq.leaves if each > at]
            found = seq.hash_blocks(at // BLOCK_SIZE)[-1] if at <= len(seq.known) else b""
            if not found or found in self._place_of:
                self._blank.append(place)
                continue
            self._place_of[found] = place
            if at > seq.prompt_len:
                self.forget([seq.moves])
                seq.moves = found

    def failed(self, turns: Iterable[Turn]) -> None:
        """The step of these turns left nothing."""
        self._blank += [turn.kept[1] for turn in turns if turn.kept is not None and turn.kept[1] >= 0]

    def forget(self, hashes: Iterable[bytes]) -> None:
        found = (self._place_of.pop(each, -1) for each in hashes)
        self._blank += [place for place in found if place >= 0]

    def check(self, turns: Iterable[Turn]) -> None:
        """Raise AssertionError unless each place is blank, found, or written by one of these turns in flight."""
        written = [turn.kept[1] for turn in turns if turn.kept is not None and turn.kept[1] >= 0]
        places = [*self._blank, *self._place_of.values(), *written]
        assert len(places) == len(set(places)) == self._count, "a state's place is lost or given twice"

    def _due(self, turn: Turn) -> int:
        """The position before which a turn leaves a state; 0: it leaves none."""
        seq, end = turn.seq, turn.seq.computed + turn.count
        at = next((place for place in seq.leaves if seq.computed < place <= end), 0)
        if not at and end // _APART * _APART > max(seq.computed, seq.prompt_len):
            at = end // _APART * _APART
        known = at <= len(seq.known) - seq.promised
        return 0 if at and known and seq.hash_blocks(at // BLOCK_SIZE)[-1] in self._place_of else at

    def _take(self) -> int:
        """A place to write to, -1 if there is none."""
        for i in range(len(self._blank) - 1, -1, -1):
            if self._blank[i] not in self._read:
                return self._blank.pop(i)
        oldest = next((each for each, place in self._place_of.items() if place not in self._read), None)
        return -1 if oldest is None else self._place_of.pop(oldest)


def _first_message(seq: Sequence) -> int:
    """The end of the blocks up to the first token that ends a message, 0 if there is none: often a system prompt's."""
    prompt, ends = seq.request.prompt_token_ids, set(seq.request.eos_token_ids)
    return next((i + 1 for i, token in enumerate(prompt) if token in ends), 0) // BLOCK_SIZE * BLOCK_SIZE

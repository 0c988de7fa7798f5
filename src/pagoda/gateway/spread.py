"""Which replica gets a request: the one that has most of its prompt in the cache, unless it is too busy. Pure logic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from pagoda.types import Request

CHUNK_TOKENS = 64
MOST_CHUNKS = 65_536
MOST_BUSIER = 4
_TOKENS_PER_REQUEST = 128


def request_keys(request: Request) -> list[int]:
    """The keys of its prompt. Each adapter has a cache of its own, and to have it loaded is worth a chunk."""
    if request.adapter is None:
        return chunk_keys(request.prompt_token_ids, request.cache_salt)
    stamp = request.adapter.stamp
    return [hash(("adapter", stamp)), *chunk_keys(request.prompt_token_ids, request.cache_salt, stamp)]


def chunk_keys(token_ids: Sequence[int], salt: str = "", adapter: str = "") -> list[int]:
    """A key for each whole chunk of a prompt, which stands for all that comes before it too."""
    keys: list[int] = []
    before = hash((salt, adapter))
    for start in range(0, len(token_ids) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        before = hash((before, *token_ids[start : start + CHUNK_TOKENS]))
        keys.append(before)
    return keys


class Prefixes:
    """Which replicas have seen which beginnings of prompts; the oldest are forgotten."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, set[int]] = OrderedDict()

    def note(self, keys: Sequence[int], replica: int) -> None:
        for key in keys:
            self._seen.setdefault(key, set()).add(replica)
            self._seen.move_to_end(key)
        while len(self._seen) > MOST_CHUNKS:
            self._seen.popitem(last=False)

    def forget(self, replica: int) -> None:
        """Its cache is gone."""
        for key in [key for key, replicas in self._seen.items() if replica in replicas]:
            self._seen[key].discard(replica)
            if not self._seen[key]:
                del self._seen[key]

    def known_tokens(self, keys: Sequence[int]) -> dict[int, int]:
        """Replica -> how many tokens of the prompt's beginning it has seen."""
        out: dict[int, int] = {}
        alive: set[int] | None = None
        for count, key in enumerate(keys, 1):
            here = self._seen.get(key, set())
            alive = set(here) if alive is None else alive & here
            if not alive:
                break
            out.update(dict.fromkeys(alive, count * CHUNK_TOKENS))
        return out


def choose(loads: Mapping[int, int], known: Mapping[int, int]) -> int:
    """The replica for a request; `loads` are the requests that each one has, `known` the tokens that need no work.

    A replica may be busier than the least busy one by a request for each 128 tokens that it knows, four at most.
    """
    least = min(loads.values())

    def allowed(replica: int) -> bool:
        return loads[replica] - least <= min(MOST_BUSIER, known.get(replica, 0) // _TOKENS_PER_REQUEST)

    return min((r for r in loads if allowed(r)), key=lambda r: (-known.get(r, 0), loads[r], r))

"""The steps that were planned and have no result yet: one, or two where the second was planned ahead."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.sched.pace import Load
from pagoda.sched.state import Sequence, Turn
from pagoda.types import StepPlan


@dataclass(slots=True)
class Flight:
    """A step and the blocks it makes findable."""

    plan: StepPlan
    turns: list[Turn]
    published: list[int]
    load: Load
    assumed: bool = False  # its turns are taken as done


class Flights:
    def __init__(self) -> None:
        self._flights: list[Flight] = []

    def __bool__(self) -> bool:
        return bool(self._flights)

    def plans(self) -> list[StepPlan]:
        return [flight.plan for flight in self._flights]

    @property
    def last(self) -> Flight:
        return self._flights[-1]

    def turns(self) -> list[Turn]:
        return [turn for flight in self._flights for turn in flight.turns]

    def add(self, flight: Flight) -> None:
        self._flights.append(flight)

    def land(self, plan: StepPlan) -> Flight:
        """The flight of a plan, which has its result now."""
        flight = next((f for f in self._flights if f.plan is plan), None)
        if flight is None:
            raise ValueError("this is not the step in flight")
        self._flights.remove(flight)
        if flight.assumed:
            for turn in flight.turns:
                turn.seq.unassume(turn)
        return flight

    def assume(self) -> bool:
        """Take the only step in flight as done; False where its tokens must be known before one can go on."""
        (flight,) = self._flights
        if not all(turn.foreseeable for turn in flight.turns):
            return False
        flight.assumed, row = True, 0
        for turn in flight.turns:
            turn.seq.assume(turn, row)
            row += turn.rows
        return True

    def behind(self, plan: StepPlan) -> Flight | None:
        """The flight that was planned behind this plan."""
        return self._flights[1] if len(self._flights) == 2 and self._flights[0].plan is plan else None

    def hold(self, seq: Sequence) -> bool:
        """A step in flight computes this request."""
        return any(turn.seq is seq for turn in self.turns())

    def leaving(self) -> list[Sequence]:
        """Requests that are gone, and hold what they have until the steps with them have landed."""
        gone = [turn.seq for turn in self.turns() if not turn.seq.alive]
        return list(dict.fromkeys(gone))

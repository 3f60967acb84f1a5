"""Whether a recorded history of registers could have happened one operation at a time.

A register holds a value or none. Each operation took effect at one moment between its start and its end, or, when its answer
was lost, at any moment after its start or never. The search is Wing and Gong's ("Testing and verifying concurrent objects",
1993) with Lowe's memory ("Testing for linearizability", 2017): it goes through the starts and ends in the order of time, and
of all orders that explain what has ended it keeps what they leave behind, each once, and none that is no better than another.
Keys are looked at one by one, which is enough (Herlihy and Wing, "Linearizability", 1990, section 3.3). Pure but for the
recorder's clock.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

State = str | None
"""What a register holds; None is nothing."""

_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class Wrote:
    """From then on it held `value`; None for a delete."""

    value: State


@dataclass(frozen=True, slots=True)
class Read:
    """It held `value`."""

    value: State


@dataclass(frozen=True, slots=True)
class Dropped:
    """If it held `value`, it held nothing from then on: the deletion of what `value` names."""

    value: str


Effect = Wrote | Read | Dropped


@dataclass(frozen=True, slots=True)
class Operation:
    """
    Attributes:
        key: the register's name.
        start, end: by one monotonic clock. Without an end nobody knows whether it took effect, nor when.
        client: who asked whom; for messages.
    """

    key: str
    effect: Effect
    start: int
    end: int | None
    client: str = ""

    def __str__(self) -> str:
        end = "?" if self.end is None else f"{self.end / 1e6:.3f}"
        return f"{self.start / 1e6:14.3f} … {end:>14}  {self.effect}  {self.client}"


class NotLinearizable(AssertionError):
    """No order of the operations explains what was read; the message has the first that cannot be."""


class Recorder:
    """What clients saw, with nanoseconds of this machine's monotonic clock. For one event loop.

    Attributes:
        history: in the order in which operations ended.
    """

    def __init__(self) -> None:
        self.history: list[Operation] = []

    @staticmethod
    def now() -> int:
        """The start of what follows."""
        return time.monotonic_ns()

    def ended(self, key: str, effect: Effect, *, start: int, client: str) -> None:
        """An answer has come."""
        self.history.append(Operation(key, effect, start, self.now(), client))

    def lost(self, key: str, effect: Effect, *, start: int, client: str) -> None:
        """No answer came, or one that leaves open what was done. A read that was lost needs no mention."""
        self.history.append(Operation(key, effect, start, None, client))


def check(history: Iterable[Operation]) -> None:
    """Registers hold nothing before the first operation.

    In time that grows with the history's length, and with how many are under way at once.

    Raises:
        NotLinearizable: no order explains it.
    """
    of_keys: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        of_keys[operation.key].append(operation)
    for operations in of_keys.values():
        _Search(operations).run()


class _Order(NamedTuple):
    """What an order of operations leaves behind, of those that are under way.

    Attributes:
        done: bits of those that have taken effect.
        free: bits of those that may have, unseen, and may as well do so later: as good as done, and as good as not.
        spent: how many of each kind of lost operations have taken effect.
    """

    state: State
    done: int
    free: int
    spent: tuple[int, ...]

    def is_as_good_as(self, other: _Order) -> bool:
        """Of two with the same state: whether whatever can follow on the other can follow on this one."""
        return not (self.done ^ other.done | other.free) & ~self.free and all(
            mine <= theirs for mine, theirs in zip(self.spent, other.spent, strict=True)
        )


class _Orders:
    """Orders of which none is as good as another."""

    def __init__(self) -> None:
        self._by_state: dict[State, list[_Order]] = {}

    def __iter__(self) -> Iterator[_Order]:
        for orders in self._by_state.values():
            yield from orders

    def __bool__(self) -> bool:
        return bool(self._by_state)

    def add(self, order: _Order) -> bool:
        """Whether it is worth following."""
        kept = self._by_state.setdefault(order.state, [])
        if any(other.is_as_good_as(order) for other in kept):
            return False
        kept[:] = [other for other in kept if not order.is_as_good_as(other)]
        kept.append(order)
        return True

    def states(self) -> Sequence[str]:
        return sorted(str(state) for state in self._by_state)


class _Moment(IntEnum):
    # At the same time they overlap: starts come first.
    START = 0
    END = 1


class _Search:
    """One register."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations
        # Lost operations with the same effect are as good as each other: they are counted. A lost read tells nothing.
        lost = (each.effect for each in operations if each.end is None and not isinstance(each.effect, Read))
        self._lost_kinds = tuple(dict.fromkeys(lost))
        self._lost_begun: Counter[Wrote | Dropped] = Counter()
        self._bits: dict[int, int] = {}  # by position, of those under way
        self._reads: dict[int, Read] = {}  # by bit
        self._changes: dict[int, Wrote | Dropped] = {}  # by bit
        self._orders = _Orders()
        self._orders.add(_Order(None, 0, 0, (0,) * len(self._lost_kinds)))

    def run(self) -> None:
        for _, moment, position in sorted(self._moments()):
            if moment is _Moment.START:
                self._start(position)
            else:
                self._end(position)

    def _moments(self) -> Iterator[tuple[int, _Moment, int]]:
        for position, operation in enumerate(self._operations):
            yield operation.start, _Moment.START, position
            if operation.end is not None:
                yield operation.end, _Moment.END, position

    def _start(self, position: int) -> None:
        operation = self._operations[position]
        if operation.end is None:
            if not isinstance(operation.effect, Read):
                self._lost_begun[operation.effect] += 1
            return
        taken = sum(self._bits.values())
        bit = self._bits[position] = ~taken & (taken + 1)  # the lowest that is free
        if isinstance(operation.effect, Read):
            self._reads[bit] = operation.effect
        else:
            self._changes[bit] = operation.effect
        orders, self._orders = self._orders, _Orders()
        for order in orders:
            self._orders.add(self._settled(order))

    def _end(self, position: int) -> None:
        """Keep the orders in which it has taken effect, and those that come of the others once it has."""
        bit = self._bits.pop(position)
        kept, seen = _Orders(), _Orders()
        to_follow = [order for order in self._orders if seen.add(order)]
        while to_follow:
            order = to_follow.pop()
            if bit & (order.done | order.free):
                kept.add(order._replace(done=order.done & ~bit, free=order.free & ~bit))
            if not bit & order.done:
                to_follow += [step for step in self._steps(order, bit) if seen.add(step)]
        if not kept:
            raise NotLinearizable(self._explain(position))
        self._orders = kept
        self._reads.pop(bit, None)
        self._changes.pop(bit, None)

    def _steps(self, order: _Order, ending: int) -> Iterator[_Order]:
        """What one more that takes effect makes of an order: the one that ends, or one whose effect somebody waits for.

        All others may as well take effect later.
        """
        awaited = self._awaited(order)
        for bit, effect in self._changes.items():
            state = _after(effect, order.state)
            if not bit & order.done and (bit == ending or (state != order.state and state in awaited)):
                done = order._replace(state=state, done=order.done | bit, free=order.free & ~bit)
                yield self._settled(self._hidden_behind(effect, done))
        for kind, effect in enumerate(self._lost_kinds):
            state = _after(effect, order.state)
            if state != order.state and state in awaited and order.spent[kind] < self._lost_begun[effect]:
                spent = (*order.spent[:kind], order.spent[kind] + 1, *order.spent[kind + 1 :])
                yield self._settled(self._hidden_behind(effect, order._replace(state=state, spent=spent)))

    def _awaited(self, order: _Order) -> set[State]:
        """Values that a read has still to see, or that a Dropped needs to change something."""
        reads = {each.value for bit, each in self._reads.items() if not bit & order.free}
        drops = (*self._changes.values(), *self._lost_begun)
        return reads.union(each.value for each in drops if isinstance(each, Dropped))

    def _hidden_behind(self, last: Wrote | Dropped, order: _Order) -> _Order:
        """Whatever changes may have been made just before a write, and nobody saw them."""
        if isinstance(last, Dropped):
            return order
        return order._replace(free=order.free | sum(self._changes) & ~order.done)

    def _settled(self, order: _Order) -> _Order:
        """Reads that see what is there are done, and what changes nothing may be."""
        seen = sum(bit for bit, read in self._reads.items() if read.value == order.state)
        idle = sum(bit for bit, each in self._changes.items() if _after(each, order.state) == order.state)
        return order._replace(free=order.free | (seen | idle) & ~order.done)

    def _explain(self, position: int) -> str:
        """Of an operation that no order explains."""
        last = self._operations[position]
        before = [each for each in self._operations if last.end is not None and each.start <= last.end]
        before.sort(key=lambda each: each.start)
        lines = "\n".join(f"{'>' if each is last else ' '} {each}" for each in before[-_SHOWN:])
        return (
            f"{last.key}: {last.effect} cannot be: just before it ended the register could hold "
            f"{', '.join(self._orders.states())}, or what is written by others under way (times in ms):\n{lines}"
        )


def _after(effect: Wrote | Dropped, state: State) -> State:
    """What the register holds after it."""
    if isinstance(effect, Wrote):
        return effect.value
    return None if effect.value == state else state

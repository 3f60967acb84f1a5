"""The checker itself, without a server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replicas.linearizability import (
    Dropped,
    Effect,
    NotLinearizable,
    Operation,
    Read,
    Recorder,
    State,
    Wrote,
    check,
)

VALUES = ("a", "b", "c")


def op(effect: Effect, start: int, end: int | None, key: str = "tag") -> Operation:
    return Operation(key, effect, start, end)


def one_after_another(*effects: Effect) -> list[Operation]:
    return [op(effect, 10 * index, 10 * index + 5) for index, effect in enumerate(effects)]


ACCEPTED = {
    "nothing": [],
    "a register is empty at first": one_after_another(Read(None)),
    "one after another": one_after_another(Wrote("a"), Read("a"), Wrote("b"), Read("b"), Read("b")),
    "a delete": one_after_another(Wrote("a"), Wrote(None), Read(None), Wrote("a"), Read("a")),
    "a read during a write sees the old value or the new": [
        op(Wrote("a"), 0, 100),
        op(Read(None), 10, 20),
        op(Read("a"), 30, 40),
    ],
    "two writes at once end in either order": [
        op(Wrote("a"), 0, 100),
        op(Wrote("b"), 0, 100),
        op(Read("b"), 10, 20),
        op(Read("a"), 30, 40),
        op(Read("a"), 200, 201),
    ],
    "what touches in time overlaps": [op(Wrote("a"), 0, 10), op(Read(None), 10, 20)],
    "a write whose answer was lost is seen late": [
        op(Wrote("a"), 0, 5),
        op(Wrote("b"), 6, None),
        op(Read("a"), 10, 20),
        op(Wrote("c"), 30, 40),
        op(Read("b"), 50, 60),
    ],
    "a write whose answer was lost is never seen": [
        op(Wrote("a"), 0, 5),
        op(Wrote("b"), 6, None),
        op(Read("a"), 10, 20),
    ],
    "a delete whose answer was lost": [
        op(Wrote("a"), 0, 5),
        op(Wrote(None), 6, None),
        op(Read("a"), 10, 20),
        op(Read(None), 30, 40),
    ],
    "the same write lost twice is seen twice": [
        op(Wrote("b"), 0, None),
        op(Wrote("b"), 1, None),
        *(op(Wrote("a"), 10, 11), op(Read("b"), 12, 13)),
        *(op(Wrote("a"), 20, 21), op(Read("b"), 22, 23)),
    ],
    "a write of what is there hides another": [
        op(Wrote("a"), 0, 5),
        op(Wrote(None), 10, 60),
        op(Wrote("a"), 20, 40),
        op(Read("a"), 70, 80),
    ],
    "what a value names is deleted": one_after_another(Wrote("a"), Dropped("a"), Read(None)),
    "what another value names is deleted": one_after_another(Wrote("a"), Dropped("b"), Read("a")),
    "keys know nothing of each other": [
        op(Wrote("a"), 0, 5, "one"),
        op(Read(None), 10, 15, "other"),
        op(Read("a"), 10, 15, "one"),
    ],
}

REFUSED = {
    "a stale read": [*one_after_another(Wrote("a"), Wrote("b")), op(Read("a"), 100, 110)],
    "a lost write": one_after_another(Wrote("a"), Read(None)),
    "a value that was never written": one_after_another(Wrote("a"), Read("z")),
    "a value before it was written": [op(Read("a"), 0, 5), op(Wrote("a"), 6, 10)],
    "a read after a delete": one_after_another(Wrote("a"), Wrote(None), Read("a")),
    "an absence after a write": one_after_another(Wrote("a"), Read("a"), Read(None)),
    "two readers who see two writes in different orders": [
        op(Wrote("a"), 0, 100),
        op(Wrote("b"), 0, 100),
        op(Read("a"), 10, 20),
        op(Read("b"), 30, 40),
        op(Read("a"), 50, 60),
    ],
    "a value that comes back": [
        op(Wrote("a"), 0, 100),
        op(Read("a"), 10, 20),
        op(Read(None), 30, 40),
    ],
    "a write that was lost once and seen twice": [
        op(Wrote("b"), 0, None),
        *(op(Wrote("a"), 10, 11), op(Read("b"), 12, 13)),
        *(op(Wrote("a"), 20, 21), op(Read("b"), 22, 23)),
    ],
    "a write that was lost and seen before it began": [op(Read("a"), 0, 5), op(Wrote("a"), 6, None)],
    "what a value names is there after it was deleted": one_after_another(
        Wrote("a"), Dropped("a"), Read("a")
    ),
    "what another value names is gone": one_after_another(Wrote("a"), Dropped("b"), Read(None)),
    "one key of two": [
        op(Wrote("a"), 0, 5, "one"),
        op(Read("a"), 10, 15, "one"),
        op(Read("a"), 10, 15, "other"),
    ],
}


@pytest.mark.parametrize("history", ACCEPTED.values(), ids=ACCEPTED)
def test_what_could_have_happened_is_accepted(history: list[Operation]) -> None:
    check(history)


@pytest.mark.parametrize("history", REFUSED.values(), ids=REFUSED)
def test_what_could_not_is_refused(history: list[Operation]) -> None:
    with pytest.raises(NotLinearizable):
        check(history)


def test_a_refusal_names_the_key_and_the_operation_that_cannot_be() -> None:
    with pytest.raises(
        NotLinearizable, match=r"tag: Read\(value='a'\) cannot be: .* could hold b"
    ) as refused:
        check(one_after_another(Wrote("a"), Wrote("b"), Read("a"), Wrote("c")))

    assert str(refused.value).splitlines()[-1].startswith(">")


def test_a_recorder_keeps_starts_ends_and_what_was_lost() -> None:
    recorder = Recorder()
    first, second = recorder.now(), recorder.now()

    recorder.lost("tag", Wrote("a"), start=second, client="2")
    recorder.ended("tag", Read("a"), start=first, client="1")

    lost, read = recorder.history
    assert (lost.start, lost.end) == (second, None)
    assert read.end is not None
    assert read.start == first <= second <= read.end
    check(recorder.history)


# -- against the definition


effects = st.one_of(
    st.builds(Wrote, st.sampled_from((None, "a", "b"))),
    st.builds(Read, st.sampled_from((None, "a", "b"))),
    st.builds(Dropped, st.sampled_from(("a", "b"))),
)


@st.composite
def any_operations(draw: st.DrawFn) -> Operation:
    start = draw(st.integers(0, 12))
    length = draw(st.one_of(st.none(), st.integers(0, 12)))
    return op(draw(effects), start, None if length is None else start + length)


@settings(max_examples=1000, deadline=None)
@given(st.lists(any_operations(), max_size=12))
def test_exactly_what_some_order_explains_is_accepted(history: list[Operation]) -> None:
    if some_order_explains(history):
        check(history)
    else:
        with pytest.raises(NotLinearizable):
            check(history)


def some_order_explains(history: Sequence[Operation]) -> bool:
    """What `check` says, by trying every order."""

    @cache
    def explains(left: frozenset[int], state: State) -> bool:
        ends = [end for index in left if (end := history[index].end) is not None]
        if not ends:
            return True
        could_be_next = [index for index in left if history[index].start <= min(ends)]
        return any(
            explains(left - {index}, after)
            for index in could_be_next
            for after in states_after(history[index].effect, state)
        )

    return explains(frozenset(range(len(history))), None)


def states_after(effect: Effect, state: State) -> Sequence[State]:
    """None when it cannot be."""
    match effect:
        case Wrote(value):
            return (value,)
        case Read(value):
            return (state,) if state == value else ()
        case Dropped(value):
            return (None if state == value else state,)


# -- histories of some length


def executed(seed: int, count: int, *, keys: int = 3, lost: float = 0.1, spread: int = 25) -> list[Operation]:
    """Operations that took effect one at a time, each somewhere in an interval that may overlap with many others'.

    Args:
        lost: share of the writes whose answer was lost; half of these had no effect.
        spread: how far an interval reaches to each side, where the next takes effect 10 later.
    """
    chance = random.Random(seed)
    states: dict[str, State] = {}
    history = []
    for index in range(count):
        key, moment = f"tag-{chance.randrange(keys)}", 10 * index
        start, end = moment - chance.randrange(spread), moment + chance.randrange(spread)
        effect = chance.choice(
            (Wrote(chance.choice(VALUES)), Wrote(None), Read(states.get(key)), Read(states.get(key)))
        )
        if isinstance(effect, Wrote):
            is_lost = chance.random() < lost
            if not is_lost or chance.random() < 0.5:
                states[key] = effect.value
            history.append(op(effect, start, None if is_lost else end, key))
        else:
            history.append(op(effect, start, end, key))
    chance.shuffle(history)
    return history


@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 3), st.integers(1, 100))
def test_what_did_happen_is_accepted_however_it_overlaps(
    seed: int, count: int, keys: int, spread: int
) -> None:
    check(executed(seed, count, keys=keys, spread=spread))


@given(st.integers(0, 2**32), st.integers(1, 80), st.data())
def test_one_read_of_a_value_that_was_not_written_is_refused(
    seed: int, count: int, data: st.DataObject
) -> None:
    history = executed(seed, count)
    reads = [index for index, each in enumerate(history) if isinstance(each.effect, Read)]
    history.append(op(Read(None), -100, -90, "tag-0"))
    index = data.draw(st.sampled_from([*reads, len(history) - 1]))
    history[index] = replace(history[index], effect=Read("never written"))

    with pytest.raises(NotLinearizable, match="never written"):
        check(history)


@pytest.mark.parametrize(
    ("keys", "spread"), [(4, 40), (1, 40), (1, 80)], ids=["four tags", "one tag", "one tag, 16 at once"]
)
@pytest.mark.timeout(30)
def test_ten_thousand_operations_are_checked_and_one_stale_read_among_them_found(
    keys: int, spread: int
) -> None:
    history = executed(1, 10_000, keys=keys, lost=0.02, spread=spread)
    check(history)

    middle = 10 * 5_000
    stale = (
        op(Wrote("old"), middle, middle),
        op(Wrote("new"), middle + 1, middle + 2),
        op(Read("old"), middle + 3, middle + 4),
    )
    with pytest.raises(NotLinearizable):
        check([*history, *(replace(each, key="tag-0") for each in stale)])

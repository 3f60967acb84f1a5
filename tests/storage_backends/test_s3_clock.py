"""The store's clock, as its answers tell it."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from storage_backends.s3_client import StoreClock

# How long before its answer a store looked at its clock, and after its request; and how long nothing was asked before.
answers = st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60), st.floats(0, 3600)), min_size=1, max_size=8)


@given(difference=st.floats(0, 4e9), answers=answers)
def test_what_is_told_is_right_as_far_as_the_quickest_answer_can_tell(
    difference: float, answers: list[tuple[float, float, float]]
) -> None:
    clock = StoreClock()
    looked = 10.0

    for since_asked, until_answered, pause in answers:
        looked += since_asked + pause
        clock.learn(
            float(int(looked + difference)), asked=looked - since_asked, answered=looked + until_answered
        )
        looked += until_answered

    doubt = min(since_asked + until_answered for since_asked, until_answered, _ in answers)
    assert abs(clock.now() - time.monotonic() - difference) <= doubt + 1 + 1e-3


def test_an_answer_that_took_long_does_not_turn_the_clock_back() -> None:
    clock = StoreClock()
    clock.learn(1_000_000.0, asked=10.0, answered=10.1)
    told = clock.now() - time.monotonic()

    clock.learn(1_000_001.0, asked=11.0, answered=71.0)

    assert abs(clock.now() - time.monotonic() - told) < 0.1


def test_a_store_whose_clock_was_set_is_believed() -> None:
    clock = StoreClock()
    clock.learn(1_000_000.0, asked=10.0, answered=10.1)

    clock.learn(2_000_000.0, asked=20.0, answered=20.1)
    assert abs(clock.now() - time.monotonic() - (2_000_000 - 20)) < 2

    clock.learn(1_000_020.0, asked=30.0, answered=30.1)
    assert abs(clock.now() - time.monotonic() - (1_000_020 - 30)) < 2

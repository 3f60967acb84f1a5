"""Guessing is slowed down, and nobody is locked out by others."""

from registry.auth.bruteforce import ADDRESS_FREE, DELAY_MAX_S, FORGET_S, PAIR_FREE, Backoff
from tests.clock import Clock


def guessed(backoff: Backoff, count: int, address: str = "192.0.2.1", user: str = "alice") -> None:
    for _ in range(count):
        backoff.begin(address, user)


def test_a_few_mistakes_are_free() -> None:
    backoff = Backoff(Clock())

    guessed(backoff, PAIR_FREE - 1)

    assert backoff.wait_s("192.0.2.1", "alice") == 0


def test_each_further_guess_waits_twice_as_long_up_to_a_bound() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    guessed(backoff, PAIR_FREE)
    waits = []
    for _ in range(10):
        waits.append(backoff.wait_s("192.0.2.1", "alice"))
        clock.now += waits[-1]
        assert backoff.wait_s("192.0.2.1", "alice") == 0
        guessed(backoff, 1)

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert max(waits) == DELAY_MAX_S


def test_a_right_password_from_elsewhere_is_never_made_to_wait() -> None:
    backoff = Backoff(Clock())

    guessed(backoff, 1000)

    assert backoff.wait_s("192.0.2.1", "alice") > 0
    assert backoff.wait_s("192.0.2.2", "alice") == 0


def test_other_users_at_the_same_address_wait_only_after_many_guesses() -> None:
    backoff = Backoff(Clock())

    guessed(backoff, ADDRESS_FREE - 1)
    assert backoff.wait_s("192.0.2.1", "bob") == 0

    guessed(backoff, 1)
    assert backoff.wait_s("192.0.2.1", "bob") > 0


def test_trying_many_names_is_guessing_too() -> None:
    backoff = Backoff(Clock())

    for number in range(ADDRESS_FREE):
        backoff.begin("192.0.2.1", f"user{number}")

    assert backoff.wait_s("192.0.2.1", "alice") > 0


def test_a_right_password_forgives_the_pair_and_costs_the_address_nothing() -> None:
    backoff = Backoff(Clock())
    guessed(backoff, PAIR_FREE)

    for _ in range(10 * ADDRESS_FREE):
        backoff.begin("192.0.2.1", "alice")
        backoff.was_right("192.0.2.1", "alice")

    assert backoff.wait_s("192.0.2.1", "alice") == 0
    assert backoff.wait_s("192.0.2.1", "bob") == 0


def test_what_was_not_looked_at_does_not_count() -> None:
    backoff = Backoff(Clock())

    for _ in range(10 * ADDRESS_FREE):
        backoff.begin("192.0.2.1", "alice")
        backoff.was_nothing("192.0.2.1", "alice")

    assert backoff.wait_s("192.0.2.1", "alice") == 0


def test_guesses_in_parallel_count_before_they_are_answered() -> None:
    backoff = Backoff(Clock())

    guessed(backoff, PAIR_FREE)

    assert backoff.wait_s("192.0.2.1", "alice") == 1


def test_old_mistakes_are_forgotten() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    guessed(backoff, 20)

    clock.now += FORGET_S + 1
    guessed(backoff, 1)

    assert backoff.wait_s("192.0.2.1", "alice") == 0


def test_memory_is_bounded() -> None:
    backoff = Backoff(Clock())

    for number in range(25_000):
        backoff.begin(f"address{number}", "alice")

    assert len(backoff._counts) <= 10_000

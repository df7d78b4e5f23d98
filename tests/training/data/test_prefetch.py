import threading

import pytest

from anchor_jax.errors import UserError
from anchor_jax.training.data.prefetch import Prefetch


def test_the_next_batches_are_made_before_they_are_requested():
    made = {number: threading.Event() for number in range(5)}

    def batches(number):
        made[number].set()
        return {"number": number}

    ahead = Prefetch(batches, 2)

    assert ahead(0) == {"number": 0}
    assert made[1].wait(10) and made[2].wait(10) and not made[3].is_set()
    assert ahead(1) == {"number": 1} and made[3].wait(10)


def test_every_batch_is_made_once_and_in_any_order():
    taken = []
    ahead = Prefetch(lambda number: taken.append(number) or number, 1)

    assert [ahead(number) for number in (0, 1, 2, 7, 8, 3)] == [0, 1, 2, 7, 8, 3]
    assert sorted(taken)[:4] == [0, 1, 2, 3] and taken.count(8) == 1


def test_without_prefetch_nothing_is_made_ahead():
    taken = []
    ahead = Prefetch(lambda number: taken.append(number) or number, 0)

    assert [ahead(0), ahead(1)] == [0, 1] and taken == [0, 1]


def test_an_error_reaches_the_call_that_asks_for_the_batch():
    def batches(number):
        if number == 1:
            raise UserError("prompts.txt: line 7")
        return number

    ahead = Prefetch(batches, 1)

    assert ahead(0) == 0
    with pytest.raises(UserError, match="line 7"):
        ahead(1)

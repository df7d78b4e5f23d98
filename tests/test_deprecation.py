import functools
import inspect

import jax
import pytest

from anchor_jax.deprecation import renamed_keyword


@functools.partial(jax.jit, static_argnames=("times", "repeats"))
@renamed_keyword("repeats", "times")
def repeated(x, *, times):
    return x * times


def test_a_renamed_keyword_is_accepted_with_a_warning():
    message = "repeated: repeats= is now called times="
    with pytest.warns(FutureWarning, match=message) as warned:
        assert repeated(2, repeats=3) == 6
    assert warned[0].filename == __file__
    assert repeated(2, times=3) == 6


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="is now called times=; give one of them"):
        repeated(2, times=3, repeats=3)


def test_the_new_keyword_stays_required():
    with pytest.raises(TypeError, match="times"):
        repeated(2)


def test_both_names_are_in_the_signature():
    assert [*inspect.signature(repeated).parameters] == ["x", "times", "repeats"]

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
    with pytest.warns(FutureWarning, match="repeated: repeats= is now called times="):
        assert repeated(2, repeats=3) == 6
    assert repeated(2, times=3) == 6


def test_the_new_keyword_stays_required():
    with pytest.raises(TypeError, match="times"):
        repeated(2)


def test_both_names_are_in_the_signature():
    assert [*inspect.signature(repeated).parameters] == ["x", "times", "repeats"]

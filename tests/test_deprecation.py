"""Older names of keyword arguments."""

import functools

import jax
import pytest

from anchor_jax.deprecation import renamed_keyword


@functools.partial(jax.jit, static_argnames=("new", "old"))
@renamed_keyword("old", "new")
def add(x, *, new):
    return x + new


def test_the_older_name_works_and_the_warning_points_at_its_use():
    with pytest.warns(FutureWarning, match="add: old= is now called new=") as warned:
        assert add(1, old=2) == 3

    assert warned[0].filename == __file__


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="old= is now called new=; give one of them"):
        add(1, old=2, new=3)

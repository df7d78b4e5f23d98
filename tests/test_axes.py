"""Every public function names the axes of its arrays, and the tests check them."""

import ast
import pathlib

import array_checks
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny

import anchor_jax
from anchor_jax.cache import store
from anchor_jax.cache.types import empty_index
from anchor_jax.streaming import stream
from anchor_jax.streaming.decode import decode
from anchor_jax.training import losses
from anchor_jax.wan import rope
from anchor_jax.wan.attention import LayersKV
from anchor_jax.wan.layers import RmsNorm

ROOT = pathlib.Path(anchor_jax.__file__).parents[1]
BARE = {"Array", "ndarray", "ArrayLike"}


def files():
    for name in array_checks.MODULES:
        path = ROOT / name.replace(".", "/")
        yield from path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]


def public(body):
    """Public functions and methods, and the fields of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body)
            yield from (one for one in node.body if isinstance(one, ast.AnnAssign))
        is_function = isinstance(node, ast.FunctionDef)
        if is_function and (node.name == "__call__" or not node.name.startswith("_")):
            yield node


def hints(node):
    """The annotations of a function or a field; None for one that is missing."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    every += [arg for arg in (given.vararg, given.kwarg) if arg]
    named = [arg for arg in every if arg.arg not in ("self", "cls")]
    return [arg.annotation for arg in named] + [node.returns]


def bare_arrays(hint):
    """The arrays in an annotation that has no axes for them."""
    inside = {
        id(inner)
        for node in ast.walk(hint)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
        for inner in node.slice.elts[:1]
        if isinstance(node.slice.elts[-1], ast.Constant)
    }
    for node in ast.walk(hint):
        name = getattr(node, "attr", getattr(node, "id", None))
        if name in BARE and id(node) not in inside:
            yield name


@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: path.name)
def test_every_public_function_names_the_axes_of_its_arrays(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))

    missing, bare = [], []
    for node in public(tree.body):
        name = f"{path.name}:{node.lineno}"
        missing += [name for hint in hints(node) if hint is None]
        bare += [name for hint in hints(node) if hint and [*bare_arrays(hint)]]

    assert not missing
    assert not bare


def ones(*shape):
    return np.ones(shape, np.float32)


def a_rotation(frames, tokens):
    return rope.rotary(jnp.arange(frames), (1, tokens), 4)


def a_cache():
    return store.init_cache(tiny.setup().policy, tiny.MODEL, 1, 4)


class FourColours:
    def decode(self, params, state, latents):
        return jnp.zeros((*latents.shape[:4], 4)), state


def read(settings, **index):
    policy = settings.policy
    return policy.read(policy.init_index().replace(**index))


WRONG = {
    "too few axes": lambda: losses.weighted_mean(ones(2, 3), ones(3)),
    "one name, two sizes": lambda: losses.flow_matching(
        ones(1, 3, 2, 2, 4), ones(1, 1, 2, 2, 4)
    ),
    "whole numbers": lambda: rope.rotate(np.ones((3, 2, 4), int), a_rotation(3, 2)),
    "the second of two arguments": lambda: losses.flow_matching(
        ones(1, 3, 2, 2, 4), ones(1, 3, 2, 2, 4), ones(1, 4)
    ),
    "an array in a tuple": lambda: losses.Score(tiny.MODEL).x0(
        tiny.variables(), ones(2, 3, 4, 4, 4), ones(1), tiny.context(0, tiny.setup())
    ),
    "keys unlike values": lambda: store.take(
        LayersKV(jnp.ones((2, 1, 3, 4, 8)), jnp.ones((2, 1, 2, 4, 8))), 0, 1
    ),
    "a field": lambda: read(tiny.setup(), frame=jnp.ones((12, 1), int)),
    "a structure in a structure": lambda: stream.recommit(
        a_cache().replace(index=empty_index(12).replace(frame=jnp.ones((12, 1), int))),
        a_cache().slots,
        setup=tiny.setup(),
    ),
    "a result": lambda: decode({}, None, ones(1, 3, 2, 2, 4), codec=FourColours()),
    "a method of a layer": lambda: RmsNorm(1e-6, "float32", "float32").init(
        jax.random.key(0), jnp.ones(2, int)
    ),
    "structures that are not stacked": lambda: stream.switch_slot(
        tiny.variables(),
        stream.start(tiny.context(0, tiny.setup()), setup=tiny.setup()),
        jnp.int32(0),
        tiny.context(1, tiny.setup()),
        0,
        setup=tiny.setup(),
        recache=None,
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_arrays_unlike_their_annotation_are_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()

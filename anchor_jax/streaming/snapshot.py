"""Moments of a session, stored in host memory within a budget, or in a file."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from anchor_jax import places, trees
from anchor_jax.axes import Latents
from anchor_jax.cache import memory
from anchor_jax.errors import UserError, shown, some
from anchor_jax.io import parse_json, replacing
from anchor_jax.streaming import stream
from anchor_jax.streaming.decode import decode
from anchor_jax.streaming.recipe import (
    MAX_FRAMES,
    REMEDY,
    Recipe,
    Switch,
    parse_recipe,
    parse_switches,
)
from anchor_jax.streaming.types import StreamSetup, StreamState
from anchor_jax.weights.bundle import Bundle

_HEADER = "anchor_jax_moment"
_SUM = "sha256"
_SHOWN = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """The state of a session before a block.

    Attributes:
      frame: the block's first latent frame.
      origin: latent frame of the stream's start or last restart.
      segments: the prompts so far.
      pending: requested switches that have not taken effect yet.
      state: the stream's state.
      decoder: the decoder's state.
      tail: (previous decoder state, latents) of the last blocks, for a restart.
    """

    frame: int
    origin: int
    segments: tuple[Switch, ...]
    pending: tuple[Switch, ...]
    state: StreamState
    decoder: Any
    tail: tuple[tuple[Any, Latents], ...]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All arrays on the device."""
        return self.state, self.decoder, self.tail

    @property
    def nbytes(self) -> int:
        return trees.nbytes(self.arrays)

    def with_arrays(self, arrays: tuple[Any, ...]) -> "Moment":
        state, decoder, tail = arrays
        return dataclasses.replace(self, state=state, decoder=decoder, tail=tail)

    def on_host(self) -> "Moment":
        """Returns a copy in host memory; waits for the device."""
        # On a CPU device_get may return a view of a buffer that is donated next.
        copied = jax.tree.map(np.array, jax.device_get(self.arrays))
        return self.with_arrays(copied)

    def on_device(self) -> "Moment":
        """Returns a copy on the device, which may be donated."""
        return self.with_arrays(jax.tree.map(jnp.array, self.arrays))

    def belongs_to(self, history: tuple[Switch, ...]) -> bool:
        """Whether a session with these prompts has passed through this moment."""
        before = tuple(one for one in history if one.earliest < self.frame)
        return self.segments == before


class Moments:
    """A store of moments of one video in host memory, within a budget.

    Automatic moments are dropped to make room for new moments and for pins, such that
    the remaining ones are about evenly spaced. A pin is never dropped. Sessions that
    were forked from each other share a store; each uses the moments of its own past.
    """

    def __init__(self, budget: int, every: int = 0):
        """Makes an empty store.

        Args:
          budget: maximum bytes of all moments together.
          every: blocks between automatic moments; 0 stores only pins.

        Raises:
          UserError: A number is negative.
        """
        if budget < 0 or every < 0:
            raise UserError(
                f"moments: budget={budget} bytes and every={every} blocks: must be at"
                " least 0"
            )
        self.budget, self.every = budget, every
        self._kept: dict[tuple, tuple[Moment, bool]] = {}
        self._video: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(moment.nbytes for moment, _ in self._kept.values())

    @property
    def frames(self) -> tuple[int, ...]:
        """Latent frames of the moments in increasing order."""
        return tuple(sorted(moment.frame for moment, _ in self._kept.values()))

    def bind(self, video: Any) -> None:
        """Binds the store to one video; moments of other videos are refused.

        Raises:
          ValueError: The store is bound to another video.
        """
        if self._video not in (None, video):
            raise ValueError(
                "these Moments hold another video; make a store for each video"
            )
        self._video = video

    def is_due(self, frame: int, block: int) -> bool:
        """Whether the block at a frame gets an automatic moment."""
        return bool(self.every and frame and frame // block % self.every == 0)

    def add(self, moment: Moment, pin: bool = False) -> None:
        """Stores a copy of a moment; an automatic one only if there is room.

        Args:
          moment: a moment on the device or on the host.
          pin: whether it is never dropped.

        Raises:
          UserError: A pin does not fit beside the other pins.
        """
        key, needed = (moment.frame, moment.segments), moment.nbytes
        if key in self._kept:
            held, pinned = self._kept[key]
            self._kept[key] = held, pinned or pin
            return
        pins = sum(one.nbytes for one, pinned in self._kept.values() if pinned)
        if pins + needed > self.budget:
            if not pin:
                return
            raise UserError(
                f"the moment at latent frame {moment.frame} needs {needed} bytes, but"
                f" pins hold {pins} of the budget of {self.budget}; unpin a moment, or"
                f" give Moments a budget of {pins + needed} or more"
            )
        while self.nbytes + needed > self.budget:
            self._thin(moment.frame)
        self._kept[key] = moment.on_host(), pin

    def unpin(self, frame: int) -> None:
        """Turns the pins at a latent frame into automatic moments."""
        for key, (moment, _) in self._kept.items():
            if moment.frame == frame:
                self._kept[key] = moment, False

    def newest(self, frame: int, history: tuple[Switch, ...]) -> Moment | None:
        """Returns the newest moment of a session's past, at or before a frame."""
        fit = [
            moment
            for moment, _ in self._kept.values()
            if moment.frame <= frame and moment.belongs_to(history)
        ]
        return max(fit, key=lambda moment: moment.frame, default=None)

    def _thin(self, coming: int) -> None:
        """Drops the automatic moment that leaves the smallest gap, or the oldest."""
        frames = sorted({0, coming, *self.frames})

        def gap(key) -> tuple[int, int]:
            place = frames.index(key[0])
            after = frames[min(place + 1, len(frames) - 1)]
            return after - frames[max(place - 1, 0)], key[0]

        automatic = [key for key, (_, pinned) in self._kept.items() if not pinned]
        del self._kept[min(automatic, key=gap)]


def write_moment(
    path: str | os.PathLike, moment: Moment, recipe: Mapping[str, Any]
) -> None:
    """Writes a moment atomically as safetensors.

    Args:
      path: the path of the file.
      moment: a moment of a session that has made a block.
      recipe: `Session.recipe()`, which is stored in the header.

    Raises:
      UserError: The file cannot be written.
    """
    header = dict(recipe) | {
        "origin": moment.origin,
        "pending": describe_switches(moment.pending),
        "cache_layout": memory.LAYOUT,
    }
    # The layout of the prompt's keys and values depends on the machine's kernel.
    state = moment.state.replace(context=None)
    arrays = dataclasses.replace(moment, state=state).on_host().arrays
    tensors = {name: _carried(leaf) for name, leaf in _named(arrays).items()}
    text = json.dumps(header)
    stored = {_HEADER: text, _SUM: _sum(text, tensors)}
    content = safetensors.numpy.save(tensors, stored)
    with replacing(places.local(path)) as part:
        part.write_bytes(content)


def read_moment(path: str | os.PathLike, bundle: Bundle) -> tuple[Recipe, Moment]:
    """Returns the recipe and the moment in an untrusted file.

    The state has no context; the prompt is projected again when it is restored. The
    tensors are read only after all shapes and types were checked against the setup.
    Files of earlier versions have no checksum, and are read without it.

    Raises:
      UserError: The file is incomplete or not a moment, its checksum is wrong, it was
        made with other weights, or its tensors do not fit its setup.
    """
    path = places.local(path)
    try:
        with safetensors.safe_open(path, "np") as opened:
            header = _header(path, opened.metadata())
            recipe = parse_recipe(header, str(path))
            check_bundle(recipe, bundle, str(path))
            blank = _blank(path, header, recipe, bundle)
            expected = _named(blank.arrays)
            _check_tensors(path, opened, expected)
            tensors = {name: opened.get_tensor(name) for name in expected}
            _check_sum(path, opened.metadata(), tensors)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); give a file that"
            " Session.save wrote"
        ) from error
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from error
    read = [tensors[name].view(leaf.dtype) for name, leaf in expected.items()]
    arrays = jax.tree.unflatten(jax.tree.structure(blank.arrays), read)
    state, *rest = arrays
    if _layout(path, header) == 1:
        state = state.replace(cache=memory.from_layout_1(state.cache))
    _check_start(path, state, blank)
    return recipe, blank.with_arrays((state, *rest))


def check_bundle(recipe: Recipe, bundle: Bundle, where: str) -> None:
    """Raises UserError unless a recipe was made with this bundle."""
    made, setup = recipe.fingerprint["weights"], recipe.setup
    if made != bundle.digest:
        raise UserError(
            f"{where} was made with weights of SHA-256 {made[:64]}, got"
            f" {bundle.digest}; give the weights with which it was made"
        )
    if (setup.model, setup.grid) != (bundle.model, bundle.grid):
        raise UserError(
            f"{where}: setup.model and setup.grid are not those of its weights; the"
            " file was changed, copy it again"
        )


def describe_switches(switches: Sequence[Switch]) -> list[dict[str, Any]]:
    """Returns switches as plain values."""
    return [dataclasses.asdict(one) for one in switches]


def _header(path: pathlib.Path, stored: Mapping[str, str] | None) -> dict[str, Any]:
    if _HEADER not in (stored or {}):
        raise UserError(
            f"{path} has no {_HEADER!r} in its header, so it holds no moment; give a"
            " file that Session.save wrote"
        )
    unknown = stored.keys() - {_HEADER, _SUM}
    if unknown:
        raise UserError(
            f"{path}: the header has an unknown entry {shown(min(unknown))}; copy the"
            " file again"
        )
    return parse_json(stored[_HEADER], f"{path}: header", REMEDY)


def _sum(header: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Returns a SHA-256 over a header and the tensors in their stored form."""
    total = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        total.update(np.ascontiguousarray(tensor).data)
    return total.hexdigest()


def _check_sum(path, stored: Mapping[str, str], tensors) -> None:
    """Raises UserError if a file's checksum does not match its content."""
    if stored.get(_SUM, "") == _sum(stored[_HEADER], tensors) or _SUM not in stored:
        return
    raise UserError(
        f"{path} is damaged: its checksum is not that of its tensors and header; copy"
        " the file again"
    )


def _blank(path, header: Mapping[str, Any], recipe: Recipe, bundle: Bundle) -> Moment:
    """Returns the moment that a header describes, with shapes instead of arrays."""
    policy, origin = recipe.setup.policy, header.get("origin")
    fits = type(origin) is int and 0 <= origin < recipe.frames <= MAX_FRAMES
    every = policy.restart.every + policy.block if policy.restart else MAX_FRAMES
    if not fits or origin % policy.block or recipe.frames - origin > every:
        raise UserError(
            f"{path}: origin={shown(origin)}: expected a multiple of the block of"
            f" {policy.block} before frames={recipe.frames}; copy the file again"
        )
    pending = parse_switches(header.get("pending", ()), f"{path}: pending")
    arrays = _shapes(bundle, recipe, recipe.frames - origin)
    if _layout(path, header) == 1:
        state, *rest = arrays
        head_dim = recipe.setup.model.head_dim
        cache = memory.shapes_in_layout_1(state.cache, head_dim)
        arrays = (state.replace(cache=cache), *rest)
    return Moment(recipe.frames, origin, recipe.prompts, pending, *arrays)


def _layout(path, header: Mapping[str, Any]) -> int:
    """Returns the version of the cache's layout; files without it have the first."""
    version = header.get("cache_layout", 1)
    if type(version) is not int or not 1 <= version <= memory.LAYOUT:
        raise UserError(
            f"{path}: cache_layout={shown(version)}: must be 1 to {memory.LAYOUT}; use"
            " the version of anchor_jax that wrote the file"
        )
    return version


def _shapes(bundle: Bundle, recipe: Recipe, local: int) -> tuple[Any, ...]:
    """Returns the shapes of a moment's arrays, `local` frames after its origin."""
    setup, text = recipe.setup, bundle.text
    rows = recipe.batch * setup.copies
    embedding = jax.ShapeDtypeStruct((rows, text.text_len, text.dim), text.dtype)
    # Loaded here, because arrays that are loaded while tracing exist only in the trace.
    weights = bundle.variables, bundle.codec_params

    def fresh(variables, codec_params, embedding):
        context = stream.project(variables, embedding, setup=setup)
        state = stream.start(context, setup=setup).replace(context=None)
        grid, policy = setup.grid, setup.policy
        shape = (recipe.batch, policy.block, grid.height, grid.width)
        latents = jnp.zeros((*shape, setup.model.latent_channels), setup.model.dtype)
        _, decoder = decode(codec_params, None, latents, codec=bundle.codec)
        blocks = local // policy.block
        first = max(0, blocks - tail_blocks(setup))
        befores = [decoder if number else None for number in range(first, blocks)]
        return state, decoder, tuple((before, latents) for before in befores)

    return jax.eval_shape(fresh, *weights, embedding)


def tail_blocks(setup: StreamSetup) -> int:
    """Returns the number of last blocks that a restart needs."""
    restart = setup.policy.restart
    return restart.overlap // setup.policy.block if restart else 0


def _named(arrays: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _carrier(dtype) -> np.dtype:
    """Returns the type in which values of `dtype` are stored, with the same bits."""
    dtype = np.dtype(dtype)
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind == "V" else dtype


def _carried(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf.view(_carrier(leaf.dtype))).reshape(leaf.shape)


def _check_tensors(path: pathlib.Path, opened, expected: Mapping[str, Any]) -> None:
    """Raises UserError unless the file has exactly the expected tensors."""
    stored = set(opened.keys())
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [
        f"unexpected {shown(name)[1:-1]}" for name in stored if name not in expected
    ]
    for name in stored & expected.keys():
        part, leaf = opened.get_slice(name), expected[name]
        found = tuple(part.get_shape()), part.get_dtype()
        sought = leaf.shape, _DTYPES[_carrier(leaf.dtype).name]
        if found != sought:
            wrong.append(f"{name} is {found}, expected {sought}")
    if wrong:
        raise UserError(
            f"{path}: the tensors are not those of its setup:"
            f" {'; '.join(some(wrong, _SHOWN))}; copy the file again"
        )


_DTYPES = {
    "bool": "BOOL",
    "int32": "I32",
    "uint8": "U8",
    "uint16": "U16",
    "float16": "F16",
    "float32": "F32",
}


def _check_start(path: pathlib.Path, state: StreamState, moment: Moment) -> None:
    index, local = state.cache.index, moment.frame - moment.origin
    if int(index.start) != local:
        raise UserError(
            f"{path}: the stream is at frame {int(index.start)}, expected {local}"
            " as its header says; copy the file again"
        )
    ring = int(index.frame.size)
    if not (0 <= int(index.cursor) <= ring and 0 <= int(index.filled) <= ring):
        raise UserError(
            f"{path}: cursor={int(index.cursor)} and filled={int(index.filled)} must be"
            f" places among {ring} slots; copy the file again"
        )

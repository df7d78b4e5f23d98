"""Checkpoints: one Orbax item per network, written and read leaf by leaf."""

import asyncio
import dataclasses
import functools
import logging
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from anchor_jax import io, ownership, places, remote, trees
from anchor_jax.errors import UserError, damaged, shown, suggest
from anchor_jax.io import expand

FORMAT_VERSION = 1
ITEMS = (
    "generator",
    "fake_score",
    "ema",
    "opt_generator",
    "opt_fake_score",
    "rollout",
    "data",
    "text_encoder",
    "vae",
    "meta",
)

_OPTIMIZERS = ("opt_generator", "opt_fake_score")
_FILES = ("tokenizer", "scheduler")
_CHUNK_BYTES = 64 * 2**20
_READ_AT_ONCE = 4 * 10**9
_damaged = functools.partial(
    damaged, remedy="copy or write it again", fault="is damaged or incomplete"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A leaf that is loaded only when it is written.

    Attributes:
      shape: shape of the array.
      dtype: type of the array, a numpy type.
      load: function that returns the numpy array.
    """

    shape: tuple[int, ...]
    dtype: Any
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _is_not_duplicate(record: logging.LogRecord) -> bool:
    return "_SignalingThread" not in str(record.msg)


# Orbax's threads log errors that their caller receives too.
logging.getLogger("absl").addFilter(_is_not_duplicate)


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes `Lazy` leaves one at a time, over all items."""

    def __init__(self, progress: Callable[[int], None] | None):
        super().__init__()
        self._progress = progress
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    async def serialize(self, values, infos, args=None):
        """Returns a future for the writing of leaves, none of which is loaded yet."""
        args = args or [ocp.SaveArgs()] * len(values)
        writing = self._write_all(values, infos, args)
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(writing, name="leaves")
        ]

    def stop(self) -> None:
        """Waits for the current leaf; no other is started."""
        with self._lock:
            self._failure = self._failure or RuntimeError("writing was stopped")

    async def _write_all(self, values, infos, args) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            await asyncio.to_thread(self._lock.acquire)
            try:
                if self._failure:
                    raise self._failure
                await self._background_serialize([_load(value, info)], [info], [arg])
                if self._progress:
                    self._progress(value.nbytes)
            except BaseException as error:
                self._failure = error
                raise
            finally:
                self._lock.release()


def _load(leaf: Lazy, info) -> np.ndarray:
    array = np.asarray(leaf.load())
    if array.shape != tuple(leaf.shape) or array.dtype != np.dtype(leaf.dtype):
        raise ValueError(
            f"{info.name}: loaded {array.dtype} {array.shape}, expected"
            f" {np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
        )
    return array


def write(
    path: str | pathlib.Path,
    items: Mapping[str, Any],
    meta: Mapping[str, Any],
    files: Mapping[str, pathlib.Path | bytes] | None = None,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that an Orbax `CheckpointManager` reads as step 0.

    The folder appears under its name when complete; an error leaves nothing behind. At
    most one leaf is in memory, twice while it is encoded.

    Args:
      path: folder to write.
      items: trees by their name in `ITEMS`; leaves are arrays or `Lazy`.
      meta: content of the item `meta`, written as JSON with `format_version`.
      files: small files beside the step, by their relative name: a path or bytes.
      progress: called with the number of bytes of each leaf after it is written.
      overwrite: whether to replace an existing checkpoint.

    Raises:
      UserError: The folder exists, is in use, or cannot be written.
    """
    target = io.resolved(expand(path))
    unknown = [name for name in items if name not in ITEMS or name == "meta"]
    if unknown:
        raise ValueError(f"items {unknown}; expected names among {ITEMS[:-1]}")
    writer = _Writer(progress)
    try:
        with (
            ownership.own_target(target) as lease,
            io.unfinished(io.temporary_name(target)) as part,
        ):
            _recover(target)
            _check_target(target, overwrite)
            part.mkdir(parents=True)
            for name, content in (files or {}).items():
                _write_file(part, name, content)
            _save(part, items, {"format_version": FORMAT_VERSION, **meta}, writer)
            lease.check()
            _check_target(target, overwrite)
            _move(part, target, overwrite)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error}; choose another folder or free disk"
            " space"
        ) from error
    finally:
        writer.stop()


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Raises UserError unless the folder is empty or a replaceable checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, not a folder; choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{target} is not empty; choose another folder, or allow overwriting"
        )
    if not _is_written(target):
        raise UserError(
            f"{target} is not a checkpoint, or holds other files too, so it is not"
            " overwritten; choose another folder, or remove this folder yourself"
        )


def _is_written(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds only the files that `write` writes."""
    names = {place.name for place in folder.iterdir()}
    others = {name for name in names if not name.startswith("_")} - {"0", *_FILES}
    try:
        return "0" in names and not others and bool(read_meta(folder))
    except UserError:
        return False


def _write_file(folder: pathlib.Path, name: str, content) -> None:
    place = _inside(folder, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        shutil.copyfile(content, place)


def _save(folder: pathlib.Path, items, meta, writer: _Writer) -> None:
    """Writes step 0 into an empty folder."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Lazy, writer)
    )
    handlers = {
        name: ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, use_compression=False
        )
        for name in items
    }
    args: dict[str, Any] = {"meta": ocp.args.JsonSave(dict(meta))}
    for name, tree in items.items():
        tree = jax.tree.map(_lazy, tree)
        chunks = jax.tree.map(
            lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree
        )
        args[name] = ocp.args.PyTreeSave(tree, save_args=chunks)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers["meta"] = ocp.JsonCheckpointHandler()
    with ocp.CheckpointManager(
        folder, item_handlers=handlers, options=options
    ) as manager:
        manager.save(0, args=ocp.args.Composite(**args))


def _lazy(leaf: Any) -> Lazy:
    """Returns a leaf that is fetched from its device only when it is written."""
    if isinstance(leaf, Lazy):
        return leaf
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return Lazy(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))


def _move(part: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Renames a folder, and removes a checkpoint that has the new name.

    If renaming fails, the old checkpoint stays.
    """
    if not overwrite or not target.exists():
        part.rename(target)  # This fails if the target has content in the meantime.
        return
    old = _old(target)
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.anchor-jax-old")


def _recover(target: pathlib.Path) -> None:
    """Completes the replacement of a checkpoint that a killed process started."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """Returns whether a folder holds a checkpoint or is a step of one."""
    folder = io.place(path)
    return _is_step(folder) or bool(_steps(folder))


def items(path: str | pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the existing items, in the order of `ITEMS`."""
    step = _step(path)
    return tuple(name for name in ITEMS if places.is_dir(step / name))


def read_meta(path: str | pathlib.Path) -> dict[str, Any]:
    """Returns the item `meta` with the values of the file.

    Raises:
      UserError: The item is missing, not a JSON object, or of a later format.
    """
    with _damaged(path):
        meta = ocp.JsonCheckpointHandler().restore(_item(path, "meta"))
        if not isinstance(meta, dict):
            raise ValueError(f"meta is {type(meta).__name__}, not an object")
    version = meta.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {shown(version)}, must be from 1 to"
            f" {FORMAT_VERSION}; use the version of anchor_jax that wrote it, or write"
            " it again"
        )
    return meta


def shapes(path: str | pathlib.Path, item: str) -> dict[str, Any]:
    """Returns the shapes and types of an item's leaves as nested dicts.

    Raises:
      UserError: The item is missing or broken.
    """
    with _damaged(path):
        found = _reader().metadata(_item(path, item)).tree
        # An optimizer's state may be a list; networks are nested dicts.
        if not isinstance(found, dict) and item not in _OPTIMIZERS:
            raise ValueError(f"{item} is not a tree of names")
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), found)


def restore(
    path: str | pathlib.Path,
    item: str,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """Returns an item's leaves as nested dicts of `jax.Array`.

    Args:
      path: folder of the checkpoint.
      item: one of `items(path)`.
      dtype: type of floating-point leaves. A mapping gives types by the item's first
        names. None, and names without a type, keep the stored type.
      shardings: a tree of shardings with the item's structure. None uses the default
        device.

    Raises:
      UserError: The item is missing or broken.
    """
    stored = shapes(path, item)
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
        shardings = jax.tree.map(lambda _: one, stored)

    def place(path, leaf, sharding):
        wanted = dtype.get(path[0].key) if isinstance(dtype, Mapping) else dtype
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=sharding,
            global_shape=leaf.shape,
            dtype=wanted if floating and wanted is not None else leaf.dtype,
        )

    with _damaged(path):
        wanted = ocp.args.PyTreeRestore(
            item=stored, restore_args=jax.tree.map_with_path(place, stored, shardings)
        )
        return _reader(stored).restore(_item(path, item), args=wanted)


def leaf(path: str | pathlib.Path, item: str, name: str) -> np.ndarray:
    """Returns one leaf by its path, joined by slashes.

    Raises:
      UserError: The item or the leaf is missing or broken.
    """
    known = trees.flatten(shapes(path, item))
    if name not in known:
        raise UserError(f"{path}: {item} has no {name!r}{suggest(name, known, 'has')}")
    return _read_leaf(path, item, name, known[name])


def iterate(path: str | pathlib.Path, item: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and array of every leaf, with one in memory at a time.

    Raises:
      UserError: The item is missing or broken.
    """
    known = trees.flatten(shapes(path, item))
    for name, shape in known.items():
        yield name, _read_leaf(path, item, name, shape)


def _read_leaf(path, item: str, name: str, shape) -> np.ndarray:
    keys = tuple(name.split("/"))
    wanted = ocp.args.PyTreeRestore(
        item=traverse_util.unflatten_dict({keys: shape}),
        restore_args=traverse_util.unflatten_dict(
            {keys: ocp.RestoreArgs(restore_type=np.ndarray)}
        ),
        partial_restore=True,
    )
    with _damaged(path):
        found = _reader(shape).restore(_item(path, item), args=wanted)
        return traverse_util.flatten_dict(found)[keys]


def file(path: str | pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of an extra file.

    Raises:
      UserError: The file does not exist, or the name leads out of the folder.
    """
    place = _inside(io.place(path), name)
    if not places.is_file(place):
        raise UserError(f"{path} has no file {name!r}; write the checkpoint again")
    return place


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder. Raises UserError if it is outside."""
    folder, place = io.resolved(folder), io.resolved(folder / name)
    beside = place.is_relative_to(folder) and place != folder
    if not beside or place.relative_to(folder).parts[0].isdigit():
        raise UserError(
            f"file name {name!r}: must be inside {folder} and outside its steps"
        )
    return place


def _reader(stored: Any = None) -> ocp.PyTreeCheckpointHandler:
    """Returns a reader of an item, for few small leaves at once or a large one."""
    sizes = map(trees.leaf_nbytes, jax.tree.leaves(stored))
    at_once = max([_READ_AT_ONCE, *sizes])
    return ocp.PyTreeCheckpointHandler(restore_concurrent_gb=-(-at_once // 10**9))


def _is_step(folder: io.Place) -> bool:
    is_named = folder.name.isdecimal() and places.is_dir(folder / "meta")
    return is_named and is_complete(folder)


def is_complete(step: io.Place) -> bool:
    """Returns whether a step was saved to its end.

    Folders of this machine have their name only then. In a bucket an object says so.
    """
    return not places.is_remote(step) or places.is_file(step / remote.COMPLETE)


def _steps(folder: io.Place) -> list[io.Place]:
    """Returns the folders of complete steps in ascending order."""
    try:
        named = [one for one in folder.iterdir() if one.name.isdecimal()]
        found = [one for one in named if one.is_dir() and is_complete(one)]
    except OSError:
        return []
    return sorted(found, key=lambda x: int(x.name))


def steps(path: str | pathlib.Path) -> tuple[int, ...]:
    """Returns the numbers of all steps in ascending order."""
    return tuple(int(one.name) for one in _steps(io.place(path)))


def last_step(path: str | pathlib.Path) -> int:
    """Returns the number of the last step.

    Raises:
      UserError: The checkpoint has no step.
    """
    return int(_step(path).name)


def _step(path: str | io.Place) -> io.Place:
    folder = io.resolved(path)
    if not places.is_dir(folder):
        raise UserError(f"{path} is not a folder; give the folder of a checkpoint")
    if _is_step(folder):
        return folder
    steps = _steps(folder)
    if not steps:
        raise UserError(
            f"{path} holds no checkpoint; give a folder that anchor-jax wrote, with"
            " a step such as 0/ in it"
        )
    return steps[-1]


def _item(path: str | io.Place, item: str) -> io.Place:
    present = items(path)
    if item not in present:
        raise UserError(f"{path} has no item {item!r}{suggest(item, present, 'has')}")
    return _step(path) / item

"""ODE trajectories on disk, written by many processes that may be resumed.

A dataset builder writes a split at once in one process, and shard names contain the
number of shards. Trajectories take days on many machines, so here shards are written
one at a time. Records have the builders' format and are read in the same way.
"""

import bisect
import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from anchor_jax import io, ownership
from anchor_jax.errors import UserError, damaged, naming
from anchor_jax.io import expand, read_json

SHARD = 8  # examples; at full size, 21 MB each before compression
FORMAT = 1
_OPEN = 128
_REMEDY = (
    "move it away; anchor-jax trajectories with the same config writes its examples"
    " again"
)
_SPEC = "spec.json"
_SUFFIX = ".array_record"


class TrajectoryWriter:
    """Appends the examples of one process to a folder that processes share.

    Process p of n writes the examples p, p + n, p + 2n, ... A shard appears whole or
    not at all: a killed writer loses the examples of its unfinished shard, and `done`
    does not list them. A second writer for the same process is refused while the first
    one runs.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        process: int,
        processes: int,
        shape: tuple[int, ...],
        shard: int = SHARD,
        inputs: Mapping[str, Any] | None = None,
    ):
        """Opens a new folder, or one with finished shards.

        Args:
          folder: folder of the shards.
          process: zero-based index of this process.
          processes: number of processes that write. It may change when all are
            restarted.
          shape: shape of the states, [level + 1, frame, height, width, channel].
          shard: number of examples per shard.
          inputs: everything that the examples depend on, such as the hash of the
            prompts and the seed. It must be the same at every start.

        Raises:
          UserError: A value is out of range, the folder holds other trajectories, or
            another writer for this process or another job is running.
        """
        if not 0 <= process < processes:
            raise UserError(f"process={process}: must be from 0 to {processes - 1}")
        if shard < 1:
            raise UserError(f"shard={shard}: must be at least 1 example")
        _check_shape(shape)
        self._folder = expand(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process, self._processes, self._shard = process, processes, shard
        self._shape = tuple(shape)
        self._features = _features(self._shape)
        self._part = self._writer = None
        self._numbers, self._is_cut = [], False
        spec = {"format": FORMAT, "shape": list(shape), "inputs": dict(inputs or {})}
        spec = json.loads(json.dumps(spec))
        if (self._folder / _SPEC).exists():
            self._compare(spec)
        self._lease = ownership.own(
            self._folder,
            ownership.job_id("trajectories", processes, spec),
            (str(process),),
            remedy="wait for it, end it, choose another folder, or share the work:"
            " --process=P --processes=N, another P for each and the same N",
        )
        self._parts = contextlib.ExitStack()
        try:
            self._join(spec)
            self._done = set(_index(self._folder))
        except BaseException:
            self.close()
            raise

    @property
    def lease(self) -> ownership.Lease:
        """This process's place in the folder."""
        return self._lease

    def done(self) -> frozenset[int]:
        """Returns the numbers of the examples in finished shards, of all processes."""
        return frozenset(_index(self._folder))

    def remaining(self, size: int) -> list[int]:
        """Returns this process's numbers below `size` that no finished shard holds."""
        done = self.done()
        mine = range(self._process, size, self._processes)
        return [number for number in mine if number not in done]

    def add(self, number: int, states: np.ndarray, prompt: str) -> None:
        """Appends an example, and finishes the shard when it is full.

        Args:
          number: number of the example, which is written once.
          states: [level + 1, frame, height, width, channel], noisy to clean.
          prompt: text of the states' prompt.

        Raises:
          ValueError: The number is not this process's or is already written, the shape
            is wrong, or a value is not finite in float16.
        """
        if number < 0 or number % self._processes != self._process:
            raise ValueError(
                f"number={number} does not belong to process {self._process} of"
                f" {self._processes}"
            )
        if number in self._done or number in self._numbers:
            raise ValueError(f"number={number} is already written")
        example = {"states": self._checked(number, states), "prompt": prompt}
        record = self._features.serialize_example(example)
        if self._writer is None:
            name = io.temporary_name(self._folder / f"shard{_SUFFIX}")
            self._part = self._parts.enter_context(io.unfinished(name))
            self._writer = _open_writer(self._part)
        self._lease.check()
        self._is_cut = True
        self._writer.write(record)
        self._numbers.append(number)
        self._is_cut = False
        if len(self._numbers) == self._shard:
            self.flush()

    def flush(self) -> None:
        """Finishes the shard even if it is not full. Call it at the end.

        An example whose writing was interrupted is left out.
        """
        if self._writer is None or self._is_cut:
            return
        self._is_cut = True
        self._writer.write(json.dumps(self._numbers).encode())
        self._writer.close()
        _sync(self._part)
        place = self._folder / f"{self._numbers[0]:09d}{_SUFFIX}"
        io.publish(self._part, place, is_new=True)
        self._parts.close()
        self._done.update(self._numbers)
        self._writer, self._numbers, self._is_cut = None, [], False

    def close(self) -> None:
        """Lets another writer take over. Examples that are not flushed are lost."""
        self._parts.close()
        self._lease.release()

    def _checked(self, number: int, states: np.ndarray) -> np.ndarray:
        if states.shape != self._shape:
            raise ValueError(
                f"example {number}: states of shape {states.shape}, expected"
                f" {self._shape}"
            )
        with np.errstate(over="ignore"):
            states = np.asarray(states).astype(np.float16)
        wrong = int(np.size(states) - np.count_nonzero(np.isfinite(states)))
        if wrong:
            raise ValueError(
                f"example {number}: {wrong} of {states.size} values are not finite in"
                " float16"
            )
        return states

    def _join(self, spec: Mapping[str, Any]) -> None:
        """Writes the folder's specification, or checks that it is the same."""
        path = self._folder / _SPEC
        if not path.exists():
            # Processes of one job that start at the same time write the same file.
            io.write_json(path, spec)
        self._compare(spec)

    def _compare(self, spec: Mapping[str, Any]) -> None:
        """Raises UserError unless the folder has the same specification."""
        found = _read_spec(self._folder)
        if found != spec:
            raise UserError(
                f"{self._folder}: holds trajectories of {found}, expected {spec};"
                " choose another folder, or remove this one"
            )


class Trajectories:
    """The finished trajectories of a folder, in the order of their numbers.

    Each is a dict of `states`, float16 [level + 1, frame, height, width, channel], and
    `prompt`, text. Only the shards that were finished at the start are seen. `shape`
    is the shape of the states, and `inputs` is what they were made from.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens every shard.

        Raises:
          UserError: The folder has no trajectories, or a shard is damaged.
        """
        self._folder = expand(folder)
        spec = _read_spec(self._folder)
        self.shape, self.inputs = tuple(spec["shape"]), dict(spec.get("inputs", {}))
        self._features = _features(self.shape)
        index = _index(self._folder)
        if not index:
            raise UserError(
                f"{folder}: holds no finished trajectories; write them first"
            )
        self.numbers = tuple(sorted(index))
        self._places = [index[number] for number in self.numbers]
        # A process cannot have thousands of files open at a time.
        self._reader = functools.lru_cache(_OPEN)(_open_reader)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        path, record = self._places[place]
        with damaged(path, _REMEDY):
            (read,) = self._reader(path).read([record])
            example = self._features.deserialize_example_np(read)
            return {"states": example["states"], "prompt": example["prompt"].decode()}

    def by_number(self, number: int) -> dict[str, Any]:
        """Returns the example that was written under a number.

        Raises:
          KeyError: No example has that number.
          UserError: The shard is damaged.
        """
        place = bisect.bisect_left(self.numbers, number)
        if place == len(self.numbers) or self.numbers[place] != number:
            raise KeyError(number)
        return self[place]


def _features(shape: tuple[int, ...]) -> tfds.features.FeaturesDict:
    states = tfds.features.Tensor(
        shape=shape, dtype=np.float16, encoding=tfds.features.Encoding.BYTES
    )
    return tfds.features.FeaturesDict(
        {"states": states, "prompt": tfds.features.Text()}
    )


def _check_shape(shape: Iterable[int]) -> None:
    shape = tuple(shape)
    if len(shape) != 5 or min(shape) < 1 or shape[0] < 2:
        raise UserError(
            f"shape={shape}: expected (levels + 1, frame, height, width, channel),"
            " with at least one level"
        )


def _read_spec(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / _SPEC
    remedy = "restore it, or write the trajectories again into another folder"
    try:
        spec = read_json(path, remedy=remedy)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; anchor-jax trajectories writes it"
        ) from error
    shape, inputs = spec.get("shape"), spec.get("inputs", {})
    if spec.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT}; {remedy}")
    is_shape = isinstance(shape, list) and all(type(n) is int for n in shape)
    if not is_shape or not isinstance(inputs, dict):
        raise UserError(f"{path} is damaged (its shape or its inputs); {remedy}")
    with naming(str(path)):
        _check_shape(shape)
    return spec


def _index(folder: pathlib.Path) -> dict[int, tuple[pathlib.Path, int]]:
    """Returns the shard and the record number of every example, by example number."""
    index: dict[int, tuple[pathlib.Path, int]] = {}
    for path in sorted(folder.glob(f"[0-9]*{_SUFFIX}")):
        for record, number in enumerate(_numbers(path)):
            if number in index:
                raise UserError(
                    f"{path}: example {number} is also in {index[number][0].name};"
                    " remove one of the two files"
                )
            index[number] = path, record
    return index


def _numbers(path: pathlib.Path) -> list[int]:
    """Returns the numbers of a shard's examples, which its last record lists."""
    with damaged(path, _REMEDY):
        reader = _open_reader(path)
        last = reader.num_records() - 1
        if last < 0:
            raise ValueError("it has no records")
        numbers = json.loads(reader.read([last])[0])
        reader.close()
        is_list = isinstance(numbers, list) and len(numbers) == last
        if not is_list or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("its list of numbers is wrong")
    return numbers


def _open_reader(path: pathlib.Path):
    return array_record_module.ArrayRecordReader(str(path))


def _open_writer(path: pathlib.Path):
    return array_record_module.ArrayRecordWriter(str(path), "group_size:1")


def _sync(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

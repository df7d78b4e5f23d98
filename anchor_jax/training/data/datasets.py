"""Datasets of prompts and of latent clips, built once and read by number.

Builders of tensorflow-datasets write array records, which are read without TensorFlow.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from anchor_jax import interrupts, ownership
from anchor_jax.errors import UserError, damaged
from anchor_jax.io import making_folder, place
from anchor_jax.prompt_files import watched
from anchor_jax.training.data import pairs
from anchor_jax.training.data.digests import digest

SPLIT = "train"
_READY = "ready.json"
_REMEDY = "remove this folder, and the same command builds it again"
_VERSION = tfds.core.Version("1.0.0")


class Examples:
    """Examples by number: dicts of arrays and of text."""

    def __init__(self, source, folder: pathlib.Path):
        """Wraps a dataset's data source, whose text is bytes."""
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns an example.

        Raises:
          IndexError: The number is not below the number of examples.
          UserError: The file of the example is damaged.
        """
        if number >= len(self):
            raise IndexError(number)
        with damaged(self._folder, _REMEDY):
            example = self._source[number]
            return {name: _as_text(value) for name, value in example.items()}


class _Info(tfds.core.DatasetInfo):
    """The metadata of a dataset, all from its builder."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: the base class would use the network and a temporary folder."""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of one split, in the order in which examples are made."""

    VERSION = _VERSION

    def __init__(self, data_dir: str | os.PathLike):
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def inputs(self) -> dict[str, Any]:
        """Everything that the examples depend on, as JSON values."""
        raise TypeError(f"{type(self).__name__} does not define made_from")

    def read(self) -> None:
        """Reads what the examples are made from, before they are built.

        Raises:
          UserError: The inputs are wrong.
        """

    def _described(self, features: dict[str, Any]) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {SPLIT: self._generate_examples()}


class PromptPairs(_Builder, skip_registration=True):
    """Prompts, each with the prompt that it is switched to."""

    def __init__(
        self,
        data_dir: str | os.PathLike,
        path: str | os.PathLike,
        switch_path: str | os.PathLike | None = None,
        seed: int = 0,
    ):
        """Opens the files, which are read when the dataset is built.

        Args:
          data_dir: where the dataset is built.
          path: a text file with one prompt per line; JSON lines or one JSON list of
            objects with `prompt` and `switch`, or with `prompts`, whose first two are
            taken; or a `.csv` or `.tsv` file with the column `prompt` and optionally
            `switch`.
          switch_path: file whose line k is the switch prompt of line k of `path`. If
            None, a prompt without one is switched to another prompt, drawn by `seed`.
          seed: seed of that draw.

        Raises:
          UserError: A file is missing, or of a kind that cannot hold prompts.
        """
        self._seed, self._pairs = seed, ()
        given = (path,) if switch_path is None else (path, switch_path)
        paths = [place(one) for one in given]
        self._digests = [digest(path) for path in paths]
        self._files = pairs.PairFiles(paths)
        super().__init__(data_dir)

    def inputs(self) -> dict[str, Any]:
        """The files' hashes and sizes, their kind, and the seed."""
        return {"files": self._digests, "json": self._files.kind, "seed": self._seed}

    def read(self) -> None:
        self._pairs = self._files.read(self._seed)

    def _info(self):
        text = tfds.features.Text()
        return self._described({"prompt": text, "switch": text})

    def _generate_examples(self):
        made = watched(self._pairs, "stores prompts")
        for number, (prompt, switch) in enumerate(made):
            yield number, {"prompt": prompt, "switch": switch}


class Clips(_Builder, skip_registration=True):
    """Latent clips with captions, and optionally arrays of fixed shape."""

    def __init__(
        self,
        data_dir: str | os.PathLike,
        examples: Callable[[], Iterable[Mapping[str, Any]]],
        size: int,
        shape: tuple[int, int, int, int],
        made_from: Mapping[str, Any],
        dtype: str = "float16",
        arrays: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    ):
        """Stores the arguments; nothing is built yet.

        Args:
          data_dir: where the dataset is built.
          examples: function that yields dicts of `latents` [frame, height, width,
            channel], `captions`, a list of text, and the arrays.
          size: number of examples that it yields.
          shape: shape of the latents.
          made_from: JSON values that the examples depend on, such as a seed. The
            dataset is built again if they change.
          dtype: type of the latents, float16 or float32.
          arrays: shape and type of further arrays, by name.

        Raises:
          UserError: A size, shape, type or name is not allowed.
        """
        self._examples, self._size = examples, size
        self._made_from = dict(made_from)
        self._arrays = {"latents": (tuple(shape), dtype), **(arrays or {})}
        if size < 1 or len(shape) != 4 or min(shape) < 1:
            raise UserError(
                f"size={size}, shape={tuple(shape)}: must be at least one clip of"
                " (frame, height, width, channel)"
            )
        if dtype not in ("float16", "float32"):
            raise UserError(f"dtype={dtype!r}: must be float16 or float32")
        if {"latents", "captions"} & set(arrays or {}):
            raise UserError("arrays: the names 'latents' and 'captions' are reserved")
        super().__init__(data_dir)

    def inputs(self) -> dict[str, Any]:
        """The caller's `made_from`, with the size, the shapes and the types."""
        arrays = {
            name: [list(shape), np.dtype(dtype).name]
            for name, (shape, dtype) in self._arrays.items()
        }
        return {"made_from": self._made_from, "size": self._size, "arrays": arrays}

    def _info(self):
        features = {
            name: tfds.features.Tensor(
                shape=shape,
                dtype=np.dtype(dtype),
                encoding=tfds.features.Encoding.BYTES,
            )
            for name, (shape, dtype) in self._arrays.items()
        }
        captions = tfds.features.Sequence(tfds.features.Text())
        return self._described({**features, "captions": captions})

    def _generate_examples(self):
        made = tqdm.tqdm(self._examples(), desc="clips", total=self._size, leave=False)
        number = -1
        for number, example in enumerate(made):
            interrupts.check()
            yield number, self._checked(number, example)
        if number + 1 != self._size:
            raise ValueError(f"{number + 1} clips, expected {self._size}")

    def _checked(self, number: int, example: Mapping[str, Any]) -> dict[str, Any]:
        expected = {*self._arrays, "captions"}
        if set(example) != expected:
            raise ValueError(f"clip {number}: {set(example)}, expected {expected}")
        checked = {"captions": list(example["captions"])}
        for name, (shape, dtype) in self._arrays.items():
            checked[name] = np.asarray(example[name], dtype)
            _check_array(f"clip {number}, {name}", checked[name], tuple(shape))
        return checked


def prepare(
    kind: Callable[..., _Builder], folder: str | os.PathLike, **arguments
) -> Examples:
    """Returns the examples of a dataset. The first call builds it.

    The dataset's folder is named by a hash of `made_from`. It is built in a temporary
    folder and renamed when complete. One process builds; others wait.

    Args:
      kind: builder, `PromptPairs` or `Clips`.
      folder: parent folder of datasets.
      **arguments: arguments of the builder, without `data_dir`.

    Raises:
      UserError: An input is wrong.
    """
    root = pathlib.Path(folder)
    make = functools.partial(kind, **arguments)
    key = make(data_dir=root)
    target = root / f"{key.name}-{cache_key(key)}"
    if not (target / _READY).is_file():
        with ownership.own_target(target, patience=math.inf):
            if not (target / _READY).is_file():
                _build(make, target)
    with damaged(target, _REMEDY):
        # The features come from the builder, because a file could name any Python
        # module.
        return Examples(make(data_dir=target).as_data_source(SPLIT), target)


def cache_key(builder: _Builder) -> str:
    """Returns the hash of what a dataset is made from, 16 hexadecimal digits."""
    parts = [builder.name, str(builder.version), builder.inputs()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(make: Callable[..., _Builder], target: pathlib.Path) -> None:
    """Builds in a temporary folder, then renames; a damaged dataset is removed."""
    shutil.rmtree(target, ignore_errors=True)
    with making_folder(target) as building:
        builder = make(data_dir=building)
        builder.read()
        tfds.disable_progress_bar()
        # The builder logs downloads, but nothing is downloaded.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
        ready = {"name": builder.name, "inputs": builder.inputs()}
        (building / _READY).write_text(json.dumps(ready), encoding="utf-8")


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [text.decode() for text in value]
    return value


def _check_array(where: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{where}: shape {value.shape}, expected {shape}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{where}: not finite in {value.dtype}")

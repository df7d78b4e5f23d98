"""Kinds of data, by the name that a config gives as `data.kind`.

A kind gives prompts or clips. Domains of `anchor_jax.plugins` add kinds of their own,
under the roles "prompts" and "clips".
"""

import abc
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax import io, places
from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.plugins import Registry
from anchor_jax.prompt_files import PromptFile
from anchor_jax.training.data import pairs
from anchor_jax.training.data.digests import digest
from anchor_jax.training.data.order import Share
from anchor_jax.weights.bundle import Bundle

Batches = Callable[[int], Mapping[str, Any]]
"""A pure function from a batch's number to its arrays."""
Texts = Callable[[int], tuple[str, str]]
"""A function from a sequence's number to its prompt and its switch prompt."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
      kind: a name in `PROMPTS` or `CLIPS`.
      path: for prompts, a file with one prompt per line, or JSON lines with `prompt`
        and `switch`; for videos, JSON lines with `video` and `caption`; for
        trajectories, the folder that `anchor-jax trajectories` wrote. Instead of JSON
        lines, the file may be one JSON list, or a `.csv` or `.tsv` file with these
        columns.
      switch_path: file whose line k is the switch prompt of line k of `path`. None
        takes another line of `path`.
      cache: folder in which datasets are built. None takes the training's folder.
      size: number of examples in a generated dataset.
      dropout: fraction of prompts replaced by the empty prompt, for guidance.
      seed: seed of generated examples and of their order.
    """

    kind: str = "world_prompts"
    path: str | None = None
    switch_path: str | None = None
    cache: str | None = None
    size: int = 4096
    dropout: float = 0.1
    seed: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that the section names."""
        return tuple(x for x in (self.path, self.switch_path) if x is not None)

    def cache_in(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns the folder in which a training's datasets are built.

        Raises:
          UserError: It would be in object storage, where datasets cannot be built.
        """
        if not self.cache and places.is_remote(folder):
            raise UserError(
                f"datasets cannot be built in the bucket of config.out={folder}; give"
                " a folder of this machine, or of a mounted disk, with"
                " --config.data.cache=FOLDER"
            )
        return expand(self.cache) if self.cache else folder / "data"


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """A stage's request to a kind of clips.

    Attributes:
      data: config section `data`.
      bundle: weights with the tokenizer, the text encoder, the codec and the size.
      share: the rows of each batch that this process makes.
      frames: latent frames per clip.
      block: latent frames denoised together.
      folder: folder of the training.
      most: largest number of examples to prepare. None prepares all.
    """

    data: DataConfig
    bundle: Bundle
    share: Share
    frames: int
    block: int
    folder: pathlib.Path
    most: int | None = None

    @property
    def cache(self) -> pathlib.Path:
        """Folder in which datasets are built."""
        return self.data.cache_in(self.folder)


class DataKind:
    """A kind of data: the part that prompts and clips share.

    Attributes:
      columns: columns of tables that hold the texts; empty if no file holds texts.
      version: version of the generator behind a seed; None if nothing is generated.
    """

    columns: tuple[str, ...] = ()
    version: int | None = None

    def identity(self, data: DataConfig) -> dict[str, Any]:
        """Returns JSON values that change if the data changes.

        Raises:
          UserError: A file is missing or damaged.
        """
        if data.path is None:
            return {}
        return {path: digest(io.place(path)) for path in data.paths}

    def text_files(self, data: DataConfig) -> list[PromptFile]:
        """Returns the opened files that hold prompts or captions.

        Raises:
          UserError: A file is missing, or of a kind that cannot hold texts.
        """
        if not self.columns or data.path is None:
            return []
        return [pairs.open_file(io.place(path), self.columns) for path in data.paths]

    def first_texts(self, data: DataConfig, num: int) -> list[tuple[str, str]]:
        """Returns at most `num` prompts of the data, each with a prompt to switch to.

        Sample videos show them. The list is empty if the data have no texts or no
        files.
        """
        if not self.columns or data.path is None:
            return []
        first = _first_lines(data.path, self.columns, num)
        second = first[1:] + first[:1]
        if data.switch_path is not None:
            second = _first_lines(data.switch_path, self.columns, num)
        both = zip(first, second, strict=False)
        return [((*a, b[0])[0], (*a, b[0])[1]) for a, b in both]


class PromptKind(DataKind, abc.ABC):
    """A kind of data that gives prompts, for stages that generate their own videos.

    Attributes:
      is_free_text: whether users write the prompts, so that words may be unknown.
    """

    is_free_text = False

    @abc.abstractmethod
    def open_texts(self, data: DataConfig, folder: pathlib.Path) -> Texts:
        """Returns a function from a number to a prompt and its switch prompt.

        Args:
          data: config section `data`.
          folder: folder of the training.

        Raises:
          UserError: A file is wrong.
        """


class ClipKind(DataKind, abc.ABC):
    """A kind of data that gives latent clips, for stages that regress them.

    A batch holds `latents` [video, frame, height, width, channel], or stored states,
    and either `embedding` [video, prompt, text, dim] or the token `ids` and `mask`
    [video, prompt, text]. `RegressionSpec` describes the arrays.

    Attributes:
      has_states: whether batches hold stored states of trajectories and their endpoints
        instead of `latents`.
    """

    has_states = False

    @abc.abstractmethod
    def open_clips(self, request: ClipRequest) -> Batches:
        """Returns the batches of a process.

        Raises:
          UserError: A file is wrong, or the data do not suit the request.
        """


_HERE = "anchor_jax.training.data"

PROMPTS: Registry[PromptKind] = Registry(
    "prompts", {"prompts": f"{_HERE}.prompts:PROMPTS"}
)
"""Kinds of prompts, for distillation and for trajectories."""

CLIPS: Registry[ClipKind] = Registry(
    "clips",
    {
        "trajectories": f"{_HERE}.states:TRAJECTORIES",
        "videos": f"{_HERE}.videos:VIDEOS",
    },
)
"""Kinds of clips, for regression."""


def find_kind(data: DataConfig) -> DataKind:
    """Returns the kind that a config names.

    Raises:
      UserError: The name is unknown.
    """
    for known in (PROMPTS, CLIPS):
        if data.kind in known:
            return known[data.kind]
    known = suggest(data.kind, [*PROMPTS, *CLIPS], "kinds")
    raise UserError(f"config.data.kind={data.kind!r}{known}")


def path_of(data: DataConfig, reads: str) -> str:
    """Returns `data.path`.

    Args:
      data: config section `data`.
      reads: description of what the kind reads from that path.

    Raises:
      UserError: The path is missing.
    """
    if data.path is None:
        raise UserError(
            f"config.data.path is missing; data.kind={data.kind!r} reads {reads}"
        )
    return data.path


def _first_lines(path: str, columns, num: int) -> list[tuple[str, ...]]:
    """Returns the prompts in the first lines of a file; empty if there is no file."""
    place = io.place(path)
    if not places.is_file(place):
        return []
    file = pairs.open_file(place, columns)
    values = itertools.islice(file, num)
    found = [pairs.texts_in(value, file.kind) for _, value in values]
    return [one for one in found if one]

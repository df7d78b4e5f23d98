"""Kinds of data, by the name that a config gives as `data.kind`.

A kind gives prompts or clips. Domains of `anchor_jax.plugins` add kinds of their own,
under the roles "prompts" and "clips".
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.plugins import Registry
from anchor_jax.prompt_files import PromptFile
from anchor_jax.training.data import pairs
from anchor_jax.training.data.digests import digest
from anchor_jax.training.data.order import Share
from anchor_jax.weights.bundle import Bundle

Batches = Callable[[int], Mapping[str, Any]]
"""Number of a batch -> its arrays; a pure function."""
Texts = Callable[[int], tuple[str, str]]
"""Number of a sequence -> its prompt, and the prompt that it is switched to."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
      kind: a name in `PROMPTS` or `CLIPS`.
      path: prompts: a file with a prompt a line, or JSON lines with `prompt` and
        `switch`; trajectories: the folder that `anchor-jax trajectories` wrote; videos:
        JSON lines with `video` and `caption`. In place of JSON lines there may be one
        JSON list, or a `.csv` or `.tsv` with these columns.
      switch_path: a file whose line k is the second prompt of line k of `path`;
        without it another line of `path` is.
      cache: where datasets are built; without a value in the training's folder.
      size: examples of a generated world.
      dropout: share of prompts left out, for guidance.
      seed: of what is generated and of the order.
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
        """The files that are named."""
        return tuple(x for x in (self.path, self.switch_path) if x is not None)

    def cache_in(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns where the datasets of a training in a folder are built."""
        return expand(self.cache) if self.cache else folder / "data"


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """What a stage asks of a kind of clips.

    Attributes:
      data: the section `data`.
      bundle: weights with the tokenizer, the text encoder, the codec and the size.
      share: the videos of a batch that this process makes.
      frames: latent frames of a clip.
      block: latent frames that are denoised together.
      folder: the training's folder.
      most: number of examples to prepare. None: all.
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
    """A kind of data: what is the same for prompts and clips.

    Attributes:
      columns: columns of the tables that hold its texts; none if no file holds texts.
      version: version of what a seed generates; None if nothing is generated.
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
        return {path: digest(expand(path)) for path in data.paths}

    def text_files(self, data: DataConfig) -> list[PromptFile]:
        """Returns the opened files that hold prompts or captions.

        Raises:
          UserError: A file is missing or of a kind that holds no texts.
        """
        if not self.columns or data.path is None:
            return []
        return [pairs.open_file(expand(path), self.columns) for path in data.paths]

    def first_texts(self, data: DataConfig, num: int) -> list[tuple[str, str]]:
        """Returns at most `num` prompts of the data, each with a prompt to switch to.

        Sample videos show them. Data without texts, or without its files, gives none.
        """
        if not self.columns or data.path is None:
            return []
        first = _first_lines(data.path, self.columns, num)
        second = first[1:] + first[:1]
        if data.switch_path is not None:
            second = _first_lines(data.switch_path, self.columns, num)
        both = zip(first, second, strict=False)
        return [((*a, b[0])[0], (*a, b[0])[1]) for a, b in both]


class PromptKind(DataKind):
    """A kind of data that gives prompts, for stages that generate their own videos.

    Attributes:
      is_free_text: whether people write the prompts, so that words may be unknown.
    """

    is_free_text = False

    def open_texts(self, data: DataConfig, folder: pathlib.Path) -> Texts:
        """Returns number -> a prompt, and the prompt that it is switched to.

        Args:
          data: the section `data`.
          folder: the training's folder.

        Raises:
          UserError: A file is wrong.
        """
        raise NotImplementedError


class ClipKind(DataKind):
    """A kind of data that gives latent clips, for stages that regress them.

    A batch holds `latents` [video, frame, height, width, channel], or stored states,
    and either `embedding` [video, prompt, text, dim] or the token `ids` and `mask`
    [video, prompt, text]. `RegressionSpec` describes the arrays.

    Attributes:
      has_states: whether batches hold stored states of trajectories with their
        endpoints in place of `latents`.
    """

    has_states = False

    def open_clips(self, request: ClipRequest) -> Batches:
        """Returns the batches of a process.

        Raises:
          UserError: A file is wrong, or the data do not suit the request.
        """
        raise NotImplementedError


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
      data: the section `data`.
      reads: what the kind reads from that path.

    Raises:
      UserError: It is missing.
    """
    if data.path is None:
        raise UserError(
            f"config.data.path is missing; data.kind={data.kind!r} reads {reads}"
        )
    return data.path


def _first_lines(path: str, columns, num: int) -> list[tuple[str, ...]]:
    """Returns the prompts in the first lines of a file, or none without the file."""
    place = expand(path)
    if not place.is_file():
        return []
    file = pairs.open_file(place, columns)
    values = itertools.islice(file, num)
    found = [pairs.texts_in(value, file.kind) for _, value in values]
    return [one for one in found if one]

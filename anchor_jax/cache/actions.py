"""Switch actions: what happens to the cache when the prompt changes.

`catalog.SWITCHES` names the actions.
"""

import dataclasses


class SwitchAction:
    """Base of all actions.

    Attributes:
      rewrite_sink: whether a re-cache replaces the sink.
      zero_sink: whether the sink is emptied before the re-cache.
    """

    rewrite_sink = False
    zero_sink = False

    @property
    def label(self) -> str:
        """Name of the action in tables of policies."""
        return type(self).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Keep(SwitchAction):
    """Only the prompt changes at a switch."""


@dataclasses.dataclass(frozen=True)
class Flush(SwitchAction):
    """At a switch only the sink and the newest `last` frames are kept."""

    last: int = 2

    @property
    def label(self) -> str:
        return f"flush to sink + {self.last}"


@dataclasses.dataclass(frozen=True)
class Recache(SwitchAction):
    """The window's clean frames pass through the network again under the new prompt.

    With `rewrite_sink` the oldest of these frames replace the sink. With `zero_sink`
    the sink is emptied first, and later passes see it as zeros, as in the release's
    training.

    Source: cache/README.md, "Re-cache"; training/README.md, "D1".
    """

    rewrite_sink: bool = False
    zero_sink: bool = False

    @property
    def label(self) -> str:
        return "re-cache, sink too" if self.rewrite_sink else "re-cache"


@dataclasses.dataclass(frozen=True)
class RecachePass:
    """The pass of a re-cache over the newest `frames` clean frames; static.

    `sink` says whether its first frames become the sink.
    """

    frames: int
    sink: bool


@dataclasses.dataclass(frozen=True)
class Restart:
    """Every `every` frames the stream starts again from its last `overlap` frames.

    A session does this: it decodes the first of these frames and encodes it again as a
    single frame.

    Source: CausVid (arXiv:2412.07772), long videos.
    """

    every: int = 21
    overlap: int = 3

"""Switch actions: what happens to the cache when the prompt changes.

`catalog.SWITCHES` names the actions.
"""

import dataclasses


class SwitchAction:
    """Base of all actions.

    Attributes:
      rewrite_sink: whether a re-cache replaces the sink.
      zero_sink: whether the sink is emptied before.
    """

    rewrite_sink = False
    zero_sink = False

    @property
    def label(self) -> str:
        """What a table of policies calls the action."""
        return type(self).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Keep(SwitchAction):
    """Nothing but the prompt changes at a switch."""


@dataclasses.dataclass(frozen=True)
class Flush(SwitchAction):
    """Sink and the newest `last` frames are kept at a switch, the rest forgotten."""

    last: int = 2

    @property
    def label(self) -> str:
        return f"flush to sink + {self.last}"


@dataclasses.dataclass(frozen=True)
class Recache(SwitchAction):
    """The window's clean frames are run again under the new prompt.

    With `rewrite_sink` the sink too is replaced, by the oldest of these frames. With
    `zero_sink` it is emptied before, and seen as zeros from then on, as in the
    release's training.

    Source: cache/README.md, "Re-cache"; training/README.md, "D1".
    """

    rewrite_sink: bool = False
    zero_sink: bool = False

    @property
    def label(self) -> str:
        return "re-cache, sink too" if self.rewrite_sink else "re-cache"


@dataclasses.dataclass(frozen=True)
class Rerun:
    """The pass of a re-cache: over the newest `frames` clean ones; static.

    `sink` tells that its first frames become the sink.
    """

    frames: int
    sink: bool


@dataclasses.dataclass(frozen=True)
class Restart:
    """The stream begins anew every `every` frames from the last `overlap` ones.

    A session-level action: the first of them is decoded and encoded again alone.

    Source: CausVid (arXiv:2412.07772), long videos.
    """

    every: int = 21
    overlap: int = 3

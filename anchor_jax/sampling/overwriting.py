"""What a job of several processes that replaces videos has made already.

A job that is started again after a loss must not begin again. So each video's recipe
has the key of the start that made it, and the folder keeps the keys of all starts until
every video is replaced.
"""

import contextlib
import pathlib

from anchor_jax import io, processes
from anchor_jax.errors import UserError

START = "start"
"""Entry in `made_by` of a recipe: the key of the start of the job."""

_NAME = ".overwriting"


def earlier_starts(folder: pathlib.Path) -> frozenset[str]:
    """Returns the keys of the starts of a job that has not replaced every video."""
    if not processes.is_joined():
        return frozenset()
    with contextlib.suppress(FileNotFoundError, UserError):
        found = io.read_json(folder / _NAME, list)
        return frozenset(one for one in found if isinstance(one, str))
    return frozenset()


def begin(folder: pathlib.Path) -> None:
    """Adds the key of this start; call it before any process makes a video."""
    if processes.is_joined() and processes.is_first():
        keys = earlier_starts(folder) | {processes.key()}
        io.write_json(folder / _NAME, sorted(keys))


def finish(folder: pathlib.Path) -> None:
    """Forgets all starts; call it when every video is replaced."""
    if processes.is_first() and (folder / _NAME).exists():
        io.remove(folder / _NAME)

"""The file that marks a training's folder and names its initial weights."""

import contextlib

from anchor_jax import io, places
from anchor_jax.errors import UserError, shown
from anchor_jax.io import read_json, write_json

FORMAT_VERSION = 1
RUN = "run.json"
"""File that marks the folder of a training."""


def write_run(folder: io.Place, base: str) -> None:
    """Marks a folder as that of a training.

    Args:
      folder: folder of its checkpoints.
      base: its initial weights, as for `load_bundle`. A name that starts with "./" is
        relative to the folder.
    """
    write_json(folder / RUN, {"format_version": FORMAT_VERSION, "base": base})


def run_folder(folder: io.Place) -> io.Place | None:
    """Returns the folder of the training that a folder or a step belongs to."""
    folder = places.absolute(folder)
    near = [folder, folder.parent] if folder.name.isdecimal() else [folder]
    return next((one for one in near if places.is_file(one / RUN)), None)


def run_base(folder: io.Place) -> str:
    """Returns the name of a training's initial weights.

    Raises:
      UserError: The folder does not name them, or the names form a circle.
    """
    _check_bases(folder)
    return _read_run(folder)


def _read_run(folder: io.Place) -> str:
    path = folder / RUN
    remedy = "rerun its training command, which writes the file again"
    try:
        run = read_json(path, remedy=remedy)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    base, version = run.get("base"), run.get("format_version")
    is_known = type(version) is int and version == FORMAT_VERSION
    if not is_known or not isinstance(base, str) or not _is_path(base):
        raise UserError(
            f"{path}: format_version={shown(version)} and base={shown(base)}, expected"
            f" {FORMAT_VERSION} and the name of weights; {remedy}"
        )
    return str(folder / base) if base.startswith("./") else base


def _is_path(text: str) -> bool:
    """Returns whether a string can be a path: not empty, no NUL, valid text."""
    with contextlib.suppress(UnicodeEncodeError):
        return bool(text.encode()) and "\0" not in text
    return False


def _check_bases(folder: io.Place) -> None:
    """Raises UserError if trainings name one another in a circle."""
    seen, run = [], run_folder(folder)
    while run is not None:
        run = io.resolved(run)
        if run in seen:
            raise UserError(f"{run / RUN} leads back to itself by its base")
        seen.append(run)
        run = run_folder(io.place(_read_run(run)))

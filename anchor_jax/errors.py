"""The error for mistakes that a user can put right."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake in what the user gave; the command line shows only its message.

    The message names the field, what was got, what is expected, and the remedy.
    """


class Stopped(KeyboardInterrupt):
    """Long work that was asked to stop, and did where it can go on.

    A command has an interrupt's status then, so that a script does not go on with what
    is half done.
    """


def suggest(name: str, known: Iterable[str], kind: str) -> str:
    """Returns the end of a message about an unknown name: the nearest, and all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f";{hint} {kind}: {', '.join(known) or 'none'}"


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Says of which field of the config a mistake is, where its message does not."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("config."):
            raise
        raise UserError(f"{field}: {error}") from error

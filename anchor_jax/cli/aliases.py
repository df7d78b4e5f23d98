"""Short spellings of config fields: `--seed=1` for `--config.seed=1`."""

import collections
import itertools
import re
from collections.abc import Collection, Iterator, Sequence

from absl import flags

from anchor_jax import config
from anchor_jax.errors import UserError

_FLAG = re.compile(r"--?(?P<name>[a-z_][\w.]*)(?P<value>=.*)?", re.DOTALL)


def spell_out(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with short spellings of config fields written in full.

    A name is short for a field if the config has the field and the command has no flag
    of that name.

    Raises:
      UserError: The config cannot be loaded.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    given, rest = argv[:end], argv[end:]
    matches = filter(None, map(_FLAG.fullmatch, given))
    names = {match["name"] for match in matches} - set(flags.FLAGS)
    names = {name for name in names if not name.startswith(("config.", "noconfig."))}
    spec = _config_of(given)
    if not names or not spec:
        return list(argv)
    known = names & set(config.paths(config.load_config(spec)))
    return [*_spelled(given, known), *rest]


def fields(argv: Sequence[str]) -> list[str]:
    """Returns the names of the config's fields, or [] without a readable config."""
    spec = _config_of(argv)
    try:
        return [*config.paths(config.load_config(spec))] if spec else []
    except UserError:
        return []


def matching(name: str, argv: Sequence[str]) -> list[str]:
    """Returns the config's fields with a last name or initials, such as "lr".

    The shortest path comes first.
    """
    found = [path for path in fields(argv) if name in config.short_names(path)]
    return sorted(found, key=len)


def _spelled(argv: Sequence[str], known: Collection[str]) -> Iterator[str]:
    waiting = collections.deque(argv)
    while waiting:
        argument = waiting.popleft()
        match = _FLAG.fullmatch(argument)
        if match is None or match["name"] not in known:
            yield argument
            continue
        value = match["value"] or ""
        if not value and waiting and not waiting[0].startswith("--"):
            value = f"={waiting.popleft()}"
        yield f"--config.{match['name']}{value}"


def _config_of(argv: Sequence[str]) -> str | None:
    """Returns the value of --config in the arguments, or its default."""
    for argument, following in itertools.pairwise([*argv, ""]):
        match = _FLAG.fullmatch(argument)
        if match and match["name"] == "config":
            return (match["value"] or f"={following}")[1:]
    return flags.FLAGS["config"].default

"""`anchor-jax policies`: lists cache policies, or shows what each block reads."""

from collections.abc import Sequence

from absl import flags

from anchor_jax import io
from anchor_jax.errors import UserError, suggest

SUMMARY = "List the cache policies, or show what each block reads under one of them."
ARGUMENTS = "[NAME]"
USAGE = """
anchor-jax policies
anchor-jax policies anchor_forcing
anchor-jax sample --config=configs/tiny.py:longlive
anchor-jax sample --config=configs/tiny.py:longlive --config.rope=bounded
anchor-jax policies --update=README.md   # after a change of the catalog

# A policy decides which earlier latent frames a block reads (sink: the first frames;
# local window: the newest frames; junction: the block after a prompt switch), at which
# temporal RoPE positions, and what a prompt switch does to the cache.
# With NAME it prints one line per block over 60 latent frames with a switch at 40, as
# FRAMES@POSITIONS. +40 marks the first block under the new prompt.
"""


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "update", None, "Markdown page whose tables of policies are generated again."
    )


def main(argv: Sequence[str]) -> None:
    """Prints the table of policies, or the reads of one policy.

    Raises:
      UserError: The policy is unknown, or several are named.
    """
    from anchor_jax.cache import tables

    if len(argv) > 2:
        raise UserError(f"got {len(argv) - 1} names; give at most one policy")
    if flags.FLAGS.update:
        _update(flags.FLAGS.update)
    elif len(argv) == 1:
        print("\n".join(tables.text()))
    else:
        print("\n".join(_explained(argv[1])))


def _update(page: str) -> None:
    """Generates the tables of a page again."""
    from anchor_jax.cache import tables

    path = io.expand(page)
    with io.explained(path):
        text = path.read_text(encoding="utf-8")
    io.write_text(path, tables.updated(text))


def _explained(name: str) -> list[str]:
    """Returns the lines about one policy."""
    from anchor_jax.cache.catalog import CATALOG
    from anchor_jax.streaming.reads import memory

    if name not in CATALOG:
        raise UserError(f"unknown policy {name!r}{suggest(name, CATALOG, 'policies')}")
    entry = CATALOG[name]
    if entry.policy is None:
        lines = [
            "It has no blocks: every frame reads all others, at positions 0, 1, 2, ..."
        ]
    else:
        lines = memory(entry.policy)
    return [f"{name}: {entry.about}", *lines]

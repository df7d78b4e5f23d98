"""`anchor-jax verify`: runs recorded cases and compares each tensor."""

import functools

from absl import flags

from anchor_jax import interrupts
from anchor_jax.errors import UserError
from anchor_jax.io import expand

SUMMARY = "Run recorded cases and compare each recorded tensor with this package's."
USAGE = """\
anchor-jax verify tests/golden
anchor-jax verify tests/golden/dit_causal_nocache --tensors
anchor-jax verify my_cases --except=dmd,memflow_bank
anchor-jax verify tests/golden --dtype=bfloat16   # error of bfloat16 against float32
"""
ARGUMENTS = "PATH..."


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_list(
        "except", [], "Kinds of cases to skip. Any other unknown kind is a failure."
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Type in which the networks compute. With bfloat16 the differences are printed"
        " but are not failures.",
    )
    flags.DEFINE_bool("tensors", False, "Print a line for each tensor.")


def main(argv: list[str]) -> int:
    """Returns 0 if every tensor of every case is within its tolerance, else 1."""
    if len(argv) < 2:
        raise UserError(
            "verify needs a folder of cases, such as: anchor-jax verify tests/golden"
        )
    from anchor_jax import devices
    from anchor_jax.verify import run

    devices.check()
    passed = run.verify(
        [expand(path) for path in argv[1:]],
        flags.FLAGS["except"].value,
        flags.FLAGS.tensors,
        show=interrupts.checking(functools.partial(print, flush=True)),
        dtype=flags.FLAGS.dtype,
    )
    return 0 if passed else 1

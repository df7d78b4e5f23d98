"""Plans the paper's trainings and a stream for many chips, and keeps the numbers.

    python launch/chip_plans.py                       # compile where a compiler is
    python launch/chip_plans.py --nocompile           # formulas only, in a minute
    python launch/chip_plans.py --only=plan_streams

Runs `anchor-jax plan` once for each of `PLANS`, keeps its JSON in launch/results, and
writes launch/results/plans.md. Compiling needs `pip install '.[plan-gpu,plan-tpu]'`,
and takes minutes for each training and kind of chip. Only one process at a time can use
the TPUs' compiler.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile

import result_pages

_PAPER = "anchor-jax plan --config=configs/train_{}.py"
_NODES = '--config.batch=56 --config.mesh="(7,8,1,1)" --topology=a100:7x8,h100:7x8'
_V5P = '--config.mesh="(4,16,1,1)" --topology=v5p:4x4x4'
_V6E = '--config.mesh="(1,64,1,1)" --topology=v6e:8x8'
PLANS = {
    f"plan_{training}_{chips}": f"{_PAPER.format(training)} {flags}"
    for training in ("streaming", "dmd")
    for chips, flags in (("gpus", _NODES), ("v5p", _V5P), ("v6e", _V6E))
} | {"plan_streams": "anchor-jax plan --topology=h100,v6e,v5p"}
"""Commands by the name of their result."""


def run(name: str, more: list[str], folder: pathlib.Path) -> None:
    """Runs a plan, and keeps its numbers.

    Args:
      name: name of the result.
      more: flags to add to its command.
      folder: folder for its JSON.
    """
    command = " ".join([PLANS[name], *more])
    sys.stdout.write(f"{command}\n")
    sys.stdout.flush()
    file = folder / f"{name}.json"
    arguments = shlex.split(command)[1:]
    subprocess.run(
        [sys.executable, "-m", "anchor_jax", *arguments, f"--json={file}"],
        cwd=result_pages.ROOT,
        check=True,
    )
    result_pages.record(name, str(file), command)


def main() -> int:
    """Runs the plans and writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help=f"names, of {', '.join(PLANS)}; all by default"
    )
    parser.add_argument("--nocompile", action="store_true", help="only formulas")
    parser.add_argument("--hlo", help="folder for the texts of compiled programs")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"--only={unknown[0]}: choose from {', '.join(PLANS)}")
    more = ["--nocompile"] * given.nocompile
    if given.hlo:
        more.append(f"--hlo={pathlib.Path(given.hlo).resolve()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            run(name, more, pathlib.Path(folder))
    result_pages.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())

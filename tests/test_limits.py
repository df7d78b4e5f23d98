"""Sizes and names in weights of others that could do harm."""

import dataclasses
import json
import os
import shutil

import bundles
import numpy as np
import ported
import pytest
import safetensors
import safetensors.numpy
import tiny

from anchor_jax import limits
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.sampling.config import read_config
from anchor_jax.sampling.resolve import resolve
from anchor_jax.wan.spec import LatentGrid
from anchor_jax.weights import checkpoint
from anchor_jax.weights.lineage import RUN
from anchor_jax.weights.load import load_bundle


@pytest.mark.parametrize(
    ("config", "field", "value", "part"),
    [
        (tiny.MODEL, "num_layers", 10_000, "from 1 to 128"),
        (tiny.MODEL, "ffn_dim", 2**20, "from 1 to 65536"),
        (tiny.MODEL, "eps", float("inf"), "above 0"),
        (bundles.TEXT, "text_len", 10**6, "from 1 to 4096"),
        (ported.VAE, "num_res_blocks", 10**6, "from 1 to 16"),
        (ported.VAE, "dim_mult", (1, 2, 10**9, 1), "whole numbers from 1 to 64"),
        (ported.VAE, "latent_std", (0.0,) * 16, "deviations above 0"),
        (LatentGrid(), "height", 5000, "from 1 to 512"),
        (LatentGrid(), "width", 0, "from 1 to 512"),
    ],
)
def test_sizes_that_no_network_has_are_refused(config, field, value, part):
    with pytest.raises(UserError, match=rf"here\.{field}.*{part}"):
        limits.check_sizes("here", dataclasses.replace(config, **{field: value}))


@pytest.mark.parametrize("config", [tiny.MODEL, bundles.TEXT, ported.VAE, LatentGrid()])
def test_sizes_that_networks_have_are_allowed(config):
    limits.check_sizes("here", config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("dim", -4),
        ("num_layers", 0),
        ("patch", (1, 2)),
        ("unroll", 0),
    ],
)
def test_a_model_of_no_size_is_refused_when_it_is_described(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(tiny.MODEL, **{name: value})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "ported"
    ported.save(folder, "wan")
    return folder


@pytest.fixture
def trained(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "trained")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"format_version": true, "base": "tiny"}',
        b'{"format_version": 1, "base": 3}',
        b'{"format_version": 1, "base": ""}',
        b'{"format_version": 1, "base": "a\\u0000b"}',
        b'{"format_version": 1, "base": "\\ud800"}',
        b'{"format_version": 1e999, "base": "tiny"}',
    ],
)
def test_a_damaged_run_file_is_named(trained, content):
    (trained / RUN).write_bytes(content)

    with pytest.raises(UserError, match=r"run\.json"):
        load_bundle(str(trained))


@pytest.mark.parametrize("base", ["x" * 20_000, "a/" * 5000, "~nobody-here/x", "/dev"])
def test_a_missing_base_is_reported_in_short(trained, base):
    run = {"format_version": 1, "base": base}
    (trained / RUN).write_text(json.dumps(run))

    with pytest.raises(UserError) as caught:
        load_bundle(str(trained))

    assert len(str(caught.value)) < 1200


def test_weights_with_a_name_without_end_are_refused():
    with pytest.raises(UserError, match="no such folder") as caught:
        load_bundle("x" * 20_000)

    assert len(str(caught.value)) < 600


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path):
    bundles.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(UserError, match="not a regular file"):
        load_bundle(str(tmp_path))


def rewrite(folder, change_header=None, change_tensors=None):
    """Saves the bundle of the tests with another header or other tensors."""
    bundles.save(folder)
    file = folder / "model.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        header = json.loads(opened.metadata()["anchor_jax"])
    tensors = safetensors.numpy.load_file(file)
    for change, value in ((change_header, header), (change_tensors, tensors)):
        if change:
            change(value)
    safetensors.numpy.save_file(tensors, file, {"anchor_jax": json.dumps(header)})


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_weights_that_are_not_floating_point_are_refused(tmp_path, dtype):
    def change(tensors):
        tensors["codec/mean"] = tensors["codec/mean"].astype(dtype)

    rewrite(tmp_path, change_tensors=change)

    with pytest.raises(UserError, match="codec/mean holds .*floating-point"):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize("version", [True, 1.0, "1", [1], "x" * 20_000])
def test_a_version_is_a_whole_number(tmp_path, version):
    rewrite(tmp_path, lambda header: header.update(format_version=version))

    with pytest.raises(UserError, match="has format_version") as caught:
        load_bundle(str(tmp_path))

    assert len(str(caught.value)) < 600


def method_of(training):
    config = read_config(load_config("interactive"))
    return resolve(config, {"training": training})


TRAINING = {
    "stage": "distillation",
    "rules": "paper",
    "distillation": {
        "policy": "longlive",
        "steps": [1000, 500],
        "shift": 5.0,
        "negative_prompt": "",
    },
    "regression": {"forcing": "none", "endpoints": False, "shift": 5.0},
    "samples": {"steps": 4, "guidance": 1.0},
}


def test_a_training_that_can_be_read_is_followed():
    assert method_of(TRAINING).policy == "longlive"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shift", "5"),
        ("shift", None),
        ("policy", {"kind": "Policy"}),
        ("policy", ["longlive"]),
        ("steps", 3),
    ],
)
def test_a_training_of_other_types_is_refused(field, value):
    section = TRAINING["distillation"] | {field: value}

    with pytest.raises(
        UserError, match="config of the weights' training cannot be read"
    ):
        method_of(TRAINING | {"distillation": section})


def metadata(folder, item):
    (path,) = (folder / "0" / item).glob("_METADATA")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[" * 100_000, b"null", b'{"tree_metadata": 3}']
)
@pytest.mark.parametrize("item", ["generator", "vae"])
def test_a_damaged_tree_of_names_is_refused(trained, item, content):
    metadata(trained, item).write_bytes(content)

    with pytest.raises(UserError, match="trained"):
        load_bundle(str(trained))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vae", "num_res_blocks", 10**6),
        ("vae", "temporal_downsample", [True] * 1000),
        ("text", "num_layers", 10**6),
        ("model", "dim", 10**400),
        ("model", "rope_theta", "1e4"),
        ("text", "num_buckets", 1),
    ],
)
def test_sizes_in_the_metadata_of_a_checkpoint_are_bounded(
    trained, section, field, value
):
    place = trained / "0" / "meta" / "metadata"
    meta = checkpoint.read_meta(trained)
    meta[section][field] = value
    place.write_text(json.dumps(meta))

    with pytest.raises(UserError, match=f"trained.*{field}"):
        load_bundle(str(trained))

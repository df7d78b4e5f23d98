import dataclasses
import json
import shutil

import bundles
import chex
import jax
import numpy as np
import pytest
from ported import MODEL, SMALL_VAE, draw_items, write

from anchor_jax import sharding
from anchor_jax.errors import UserError
from anchor_jax.wan.spec import LatentGrid
from anchor_jax.weights import checkpoint, options
from anchor_jax.weights.load import load_bundle


@pytest.fixture(scope="module")
def ported_digest(ported):
    return load_bundle(str(ported)).digest


@pytest.fixture
def rewrite_ported(tmp_path, ported):
    """Returns a function that loads the weights with changed meta or tokenizer."""

    def run(change=None, words=None):
        folder = tmp_path / "changed"
        shutil.copytree(ported, folder)
        meta = checkpoint.read_meta(ported)
        if change:
            change(meta)
        (folder / "0" / "meta" / "metadata").write_text(json.dumps(meta))
        if words is not None:
            (folder / "tokenizer" / "spiece.model").write_bytes(words)
        return folder

    return run


def load_fails(folder):
    with pytest.raises(UserError) as caught:
        load_bundle(str(folder))
    return str(caught.value)


@pytest.mark.slow
def test_ported_weights_load_in_bfloat16_for_the_usual_grid(ported):
    loaded = load_bundle(str(ported))

    assert loaded.grid == LatentGrid(60, 104)
    assert loaded.model == dataclasses.replace(
        MODEL, dtype="bfloat16", param_dtype="bfloat16"
    )
    leaves = jax.tree.leaves((loaded.variables["params"], loaded.codec_params))
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
    assert loaded.encode_prompts([bundles.RED]).shape == (1, 6, 8)


@pytest.mark.slow
def test_ported_weights_decode(ported):
    loaded = load_bundle(str(ported), grid=LatentGrid(2, 2))
    latents = np.ones((1, 2, 2, 2, 16), np.float32)

    pixels, _ = jax.jit(loaded.codec.decode)(loaded.codec_params, None, latents)

    assert pixels.shape == (1, 3, 4, 4, 3)
    assert np.isfinite(np.asarray(pixels)).all()


def test_low_rank_updates_are_kept_apart_added_or_left_out(ported):
    loaded = {
        how: load_bundle(str(ported), dtype="float32", lora=how).variables
        for how in options.ADAPTERS
    }

    given = draw_items(SMALL_VAE)["generator"]
    plain, update = (tree["blocks"]["self_attn"]["q"] for tree in given.values())
    separate, merged, none = (loaded[how] for how in options.ADAPTERS)
    assert set(separate) == {"params", "lora"}
    assert set(merged) == set(none) == {"params"}
    kept, changed = (
        tree["params"]["blocks"]["self_attn"]["q"]["kernel"] for tree in (none, merged)
    )
    np.testing.assert_array_equal(kept, plain["kernel"])
    expected = plain["kernel"] + update["a"] @ update["b"]
    np.testing.assert_allclose(changed, expected, atol=1e-5)
    norm = merged["params"]["blocks"]["self_attn"]["norm_q"]["scale"]
    stored = given["params"]["blocks"]["self_attn"]["norm_q"]["scale"]
    np.testing.assert_array_equal(norm, stored)


def test_weights_can_be_wider_than_activations(ported):
    loaded = load_bundle(str(ported), param_dtype="float32", lora="none")

    kernel = loaded.variables["params"]["blocks"]["self_attn"]["q"]["kernel"]
    given = draw_items(SMALL_VAE)["generator"]["params"]["blocks"]["self_attn"]["q"][
        "kernel"
    ]
    np.testing.assert_array_equal(kernel, given)
    assert (loaded.model.dtype, loaded.model.param_dtype) == ("bfloat16", "float32")
    assert loaded.text.param_dtype == "bfloat16"


def test_updates_apart_are_as_stored(ported):
    loaded = load_bundle(str(ported), lora="separate").variables

    given = draw_items(SMALL_VAE)["generator"]["lora"]
    chex.assert_trees_all_equal(loaded["lora"], given)
    assert loaded["params"]["blocks"]["ffn_in"]["kernel"].dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["separate", "merged"])
def test_a_mesh_splits_the_generator(ported, how):
    mesh = sharding.make_mesh()
    loaded = load_bundle(str(ported), mesh=mesh, lora=how)

    kernel = loaded.variables["params"]["blocks"]["ffn_in"]["kernel"]
    text = loaded.encode_prompts([bundles.RED])

    assert kernel.sharding.shard_shape(kernel.shape)[1] == 32 // jax.device_count()
    assert text.sharding.is_fully_replicated
    assert text.devices() == kernel.devices() == set(mesh.devices.flat)
    assert str(kernel.dtype) == "bfloat16"


@pytest.mark.parametrize("missing", ["generator", "text_encoder", "vae"])
def test_a_network_that_was_not_ported_is_named(rewrite_ported, missing):
    folder = rewrite_ported()
    shutil.rmtree(folder / "0" / missing)

    message = load_fails(folder)

    assert f"has no {missing}" in message and "anchor-jax port --wan" in message


def test_the_digest_is_that_of_the_sources(ported_digest, rewrite_ported):
    def rename(meta):
        meta["sources"][0]["files"][0]["name"] = "moved.pt"
        meta["method"] = "other"

    renamed = load_bundle(str(rewrite_ported(rename)))

    assert renamed.digest == ported_digest


@pytest.mark.parametrize("field", ["key", "alpha", "item"])
def test_the_digest_depends_on_what_was_taken(ported_digest, rewrite_ported, field):
    changed = rewrite_ported(lambda meta: meta["sources"][0].update({field: "x"}))

    assert load_bundle(str(changed)).digest != ported_digest


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        (None, "model", None, "meta.model is None, which must be an object"),
        (None, "vae", [], "meta.vae is []"),
        (None, "sources", None, "meta.sources is missing"),
        (None, "sources", [5], "meta.sources, entry 0"),
        ("model", "num_layers", 10**12, "meta.model.num_layers"),
        ("model", "num_layers", 3, "the tensors do not fit its sizes"),
        ("model", "num_heads", 0, "meta.model"),
        ("model", "depth", 3, "unknown field 'depth'"),
        ("model", "eps", "x", "meta.model.eps"),
        ("text", "dim", 16, "meta.text.dim=16, but the model has 8"),
        ("text", "text_len", 7, "meta.text.text_len=7, but the model has 6"),
        ("text", "vocab", 31, "token_embedding/embedding is (32, 8), expected (31, 8)"),
        ("text", "num_layers", True, "meta.text.num_layers"),
        ("vae", "base_dim", 10**10, "meta.vae.base_dim"),
        ("vae", "base_dim", 16, "vae: the tensors"),
        ("vae", "dim_mult", [1, 10**9], "meta.vae.dim_mult=(1, 1000000000)"),
        ("vae", "dim_mult", [1], "temporal_downsample"),
        ("vae", "temporal_downsample", ["a"], "true or false"),
        ("vae", "latent_std", [0.0] * 16, "deviations above 0"),
        ("vae", "latent_mean", ["x"] * 16, "finite numbers"),
        ("vae", "conv", "fft", "'auto', 'taps' or 'native'"),
    ],
)
def test_wrong_sizes_of_ported_weights_are_one_message(
    rewrite_ported, section, field, value, part
):
    def change(meta):
        (meta[section] if section else meta)[field] = value

    message = load_fails(rewrite_ported(change))

    assert "changed" in message and part in message


@pytest.mark.parametrize("digest", [5, "abc", "zz" * 32])
def test_a_wrong_digest_is_refused(rewrite_ported, digest):
    def change(meta):
        meta["sources"][0]["files"][0]["sha256"] = digest

    assert "is not a SHA-256" in load_fails(rewrite_ported(change))


@pytest.mark.parametrize("words", [b"", b"no model"])
def test_a_broken_ported_tokenizer_is_named(rewrite_ported, words):
    assert "holds no usable tokenizer" in load_fails(rewrite_ported(words=words))


@pytest.mark.slow
def test_updates_of_a_wrong_shape_are_named(tmp_path):
    items = jax.tree.map(np.copy, draw_items(SMALL_VAE))
    layer = items["generator"]["lora"]["blocks"]["ffn_in"]
    layer["b"] = layer["b"][:, :, :-1]
    write(tmp_path / "out", items, vae=SMALL_VAE)

    message = load_fails(tmp_path / "out")

    assert "lora/blocks/ffn_in/b is (2, 3, 31), expected (2, 3, 32)" in message

import dataclasses
import functools
import io
import json
import shutil

import bundles
import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tiny

from anchor_jax import checkpoint, sharding
from anchor_jax.errors import UserError
from anchor_jax.wan import dit, lora
from anchor_jax.wan.spec import TINY, LatentGrid
from anchor_jax.wan.text import Umt5Encoder
from anchor_jax.wan.vae import VaeConfig, WanVae
from anchor_jax.weights import bundle as prompts_of
from anchor_jax.weights import options, single_file
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.load import load_bundle


@pytest.mark.parametrize("name", ["folder", "mine.safetensors"])
def test_what_is_saved_loads_as_float32_of_any_size(tmp_path, name):
    bundles.save(tmp_path / name)

    loaded = load_bundle(str(tmp_path / name))

    kernel = loaded.variables["params"]["blocks"]["self_attn"]["q"]["kernel"]
    given = bundles.params()["generator"]["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, given.astype(np.float16))
    assert loaded.text == bundles.TEXT
    assert loaded.metadata == {"note": "random"}
    left = [file.name for file in tmp_path.rglob("*") if "part" in file.name]
    assert not left


def test_saving_twice_gives_the_same_bytes(tmp_path):
    bundles.save(tmp_path / "a")
    bundles.save(tmp_path / "b")

    first, second = (tmp_path / f / "model.safetensors" for f in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_what_was_loaded_is_saved_as_it_was(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    bundles.save(first)

    single_file.save_loaded(load_bundle(str(first)), second)

    for name in ("model.safetensors", "tokenizer.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_embedded_sizes_fit_together():
    assert TINY.text_len == single_file.TINY_TEXT.text_len
    assert single_file.TINY_GRID == LatentGrid(8, 8)


def test_prompts_are_cleaned_and_rows_past_their_end_are_zero():
    loaded = bundles.load()

    plain = np.asarray(loaded.encode_prompts([bundles.RED]))
    messy = np.asarray(loaded.encode_prompts(["  A  red\n ring! "]))

    np.testing.assert_array_equal(plain, messy)
    assert plain.shape == (1, 6, 8)
    assert np.abs(plain[0, :4]).min() > 0  # three words and the end
    assert not plain[0, 4:].any()
    with pytest.raises(UserError, match="give a list"):
        loaded.encode_prompts(bundles.RED)


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors.*tokenizer.model"):
        load_bundle(str(tmp_path))


def test_a_truncated_file_is_told_apart(tmp_path):
    bundles.save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_bundle(str(tmp_path))


def test_foreign_tensors_are_told_apart(tmp_path):
    bundles.save(tmp_path)
    content = safetensors.numpy.save({"x": np.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(UserError, match="no bundle"):
        load_bundle(str(tmp_path))


def test_another_tokenizer_is_refused(tmp_path):
    bundles.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"other")

    with pytest.raises(UserError, match="not the tokenizer"):
        load_bundle(str(tmp_path))


def test_a_later_format_is_refused(tmp_path):
    bundles.save(tmp_path)
    file = tmp_path / "model.safetensors"
    content = safetensors.numpy.load(file.read_bytes())
    header = {"anchor_jax": json.dumps({"format_version": 99})}
    file.write_bytes(safetensors.numpy.save(content, header))

    with pytest.raises(UserError, match="format_version 99, expected 1"):
        load_bundle(str(tmp_path))


def change_codec(**changes):
    tree = bundles.params()
    codec = {k: v for k, v in (tree["codec"] | changes).items() if v is not None}
    return tree | {"codec": codec}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "missing codec/mean"),
        ({"scale": np.zeros(3)}, "unexpected codec/scale"),
        ({"mean": np.zeros(3)}, r"codec/mean is \(3,\), expected \(768,\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        bundles.save(tmp_path / "out", change_codec(**changes))

    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_float16_are_not_saved(tmp_path):
    with pytest.raises(UserError, match="codec/mean does not fit into float16"):
        bundles.save(tmp_path / "out", change_codec(mean=np.full(768, 1e6)))


@pytest.fixture
def rewrite(tmp_path):
    """Returns a function that saves a bundle with another header or tokenizer."""

    def run(change=None, text=None, words=None, params=None):
        single_file.save_bundle(
            params or bundles.params(),
            bundles.words() if words is None else words,
            tmp_path,
            {},
            model=tiny.MODEL,
            text=bundles.TEXT,
            grid=tiny.GRID,
        )
        file = tmp_path / "model.safetensors"
        with safetensors.safe_open(file, "np") as opened:
            header = json.loads(opened.metadata()["anchor_jax"])
        if change:
            change(header)
        written = json.dumps(header) if text is None else text
        stored = safetensors.numpy.load_file(file)
        safetensors.numpy.save_file(stored, file, {"anchor_jax": written})
        with pytest.raises(UserError) as caught:
            load_bundle(str(tmp_path))
        return str(caught.value)

    return run


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", '"x"', "[" * 100_000])
def test_a_broken_header_names_the_file(rewrite, text):
    message = rewrite(text=text)

    assert "model.safetensors is no bundle that can be used" in message


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        (None, "model", 5, "header.model"),
        (None, "text", None, "header.text"),
        (None, "codec", [], "header.codec"),
        (None, "codec", "cubic", "unknown codec 'cubic'"),
        (None, "metadata", 3, "header.metadata"),
        (None, "tokenizer", {}, "header.tokenizer"),
        ("model", "dtype", "f7", "model.dtype='f7'"),
        ("model", "dtype", "float64", "float32, bfloat16, float16"),
        ("text", "param_dtype", "int8", "text.param_dtype='int8'"),
        ("model", "patch", [1, 3], "three whole numbers"),
        ("model", "patch", [1, 0, 2], "three whole numbers"),
        ("model", "patch", [1, 3, 3], "must divide by the patch"),
        ("model", "patch", [], "header.model"),
        ("model", "num_layers", 10**12, "model.num_layers"),
        ("model", "num_heads", 0, "header.model"),
        ("model", "eps", float("nan"), "model.eps"),
        ("text", "vocab", -1, "text.vocab"),
        ("text", "dim", 16, "text.dim=16"),
        ("grid", "height", 0, "grid.height=0"),
        ("grid", "width", 10**9, "grid.width"),
        ("grid", "width", "4", "header.grid.width"),
        ("grid", "depth", 4, "unknown field 'depth'"),
    ],
)
def test_a_wrong_size_is_one_message(rewrite, section, field, value, part):
    def change(header):
        (header[section] if section else header)[field] = value

    message = rewrite(change)

    assert "model.safetensors" in message and part in message


@pytest.mark.parametrize("key", ["model", "codec", "tokenizer", "metadata"])
def test_a_missing_key_is_named(rewrite, key):
    message = rewrite(lambda header: header.pop(key))

    assert f"missing field {key!r}" in message


@pytest.mark.parametrize(
    ("words", "part"),
    [(b"", "empty"), (b"no model", "no tokenizer"), (b"\x00" * 64, "no tokenizer")],
)
def test_a_broken_tokenizer_is_named(rewrite, words, part):
    assert f"tokenizer.model is {part}" in rewrite(words=words)


def test_other_special_ids_are_refused(rewrite):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([bundles.RED, bundles.BLUE]),
        model_writer=model,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )

    assert "pad, end and unknown ids" in rewrite(words=model.getvalue())


def test_a_tokenizer_larger_than_the_text_encoder_is_refused(rewrite):
    def change(header):
        header["text"]["vocab"] = 8

    assert "pieces, expected at most the 8" in rewrite(change)


PORTED_MODEL = dataclasses.replace(
    tiny.MODEL, dim=32, ffn_dim=32, latent_channels=16, dtype="bfloat16"
)
PORTED_VAE = VaeConfig(
    base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)
NOT_SIZES = ("dtype", "param_dtype", "remat", "unroll")


def draw(shapes, seed):
    """Returns parameters filled by numpy, small enough to pass through networks."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


@functools.cache
def ported_items():
    key = jax.random.key(0)
    ids = jax.ShapeDtypeStruct((1, bundles.TEXT.text_len), np.int32)
    pixels = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), np.float32)
    params = jax.eval_shape(lambda: dit.init_params(PORTED_MODEL, key))
    adapters = jax.eval_shape(lambda tree: lora.init(tree, 3, key), params)
    text = jax.eval_shape(Umt5Encoder(bundles.TEXT).init, key, ids, ids)["params"]
    vae = jax.eval_shape(WanVae(PORTED_VAE).init, key, pixels)["params"]
    return {
        "generator": {"params": draw(params, 1), "lora": draw(adapters, 2)},
        "text_encoder": draw(text, 3),
        "vae": draw(vae, 4),
    }


def ported_meta():
    def sizes(config):
        fields = dataclasses.asdict(config)
        return {name: fields[name] for name in fields if name not in NOT_SIZES}

    files = [{"name": "generator.pt", "bytes": 5, "sha256": "0a" * 32}]
    source = {"item": "generator", "key": "generator", "alpha": None, "files": files}
    return {
        "model": sizes(PORTED_MODEL),
        "text": sizes(bundles.TEXT),
        "vae": sizes(PORTED_VAE),
        "sources": [source],
    }


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    """Returns the folder of tiny ported weights, for tests that only read it."""
    folder = tmp_path_factory.mktemp("weights") / "ported"
    write_ported(folder, ported_items())
    return folder


@pytest.fixture(scope="module")
def ported_digest(ported):
    return load_bundle(str(ported)).digest


def write_ported(folder, items):
    files = {"tokenizer/spiece.model": bundles.words()}
    checkpoint.write(folder, items, ported_meta(), files)


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


def test_ported_weights_load_in_bfloat16_for_the_usual_grid(ported):
    loaded = load_bundle(str(ported))

    assert loaded.grid == LatentGrid(60, 104)
    assert loaded.model == dataclasses.replace(PORTED_MODEL, param_dtype="bfloat16")
    leaves = jax.tree.leaves((loaded.variables["params"], loaded.codec_params))
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
    assert loaded.encode_prompts([bundles.RED]).shape == (1, 6, 8)


def test_ported_weights_decode(ported):
    loaded = load_bundle(str(ported), grid=LatentGrid(2, 2))
    latents = np.ones((1, 2, 2, 2, 16), np.float32)

    pixels, _ = jax.jit(loaded.codec.decode)(loaded.codec_params, None, latents)

    assert pixels.shape == (1, 3, 4, 4, 3)
    assert np.isfinite(np.asarray(pixels)).all()


def test_a_prompt_is_encoded_alike_wherever_the_encoder_lives(ported):
    texts = [bundles.RED, bundles.BLUE, bundles.RED]
    loaded = {
        mode: load_bundle(str(ported), dtype="float32", text_encoder=mode)
        for mode in options.TEXT_ENCODERS
    }

    found = {mode: one.encode_prompts(texts) for mode, one in loaded.items()}

    for mode in ("free", "sharded"):
        assert found[mode].dtype == found["device"].dtype
        np.testing.assert_allclose(found[mode], found["device"], rtol=0, atol=1e-6)
        assert found[mode].devices() == found["device"].devices()
    split = jax.tree.leaves(loaded["sharded"].encode_prompts.params)
    assert any(not leaf.sharding.is_fully_replicated for leaf in split)


@pytest.fixture
def loads(monkeypatch):
    """Items of checkpoints that are read, in order."""
    found, restore = [], checkpoint.restore

    def count(path, item, *rest):
        found.append(item)
        return restore(path, item, *rest)

    monkeypatch.setattr(checkpoint, "restore", count)
    return found


def test_a_freed_encoder_is_loaded_for_new_prompts_only(ported, loads):
    loaded = load_bundle(str(ported), text_encoder="free")

    first = loaded.encode_prompts([bundles.RED, bundles.BLUE])
    again = loaded.encode_prompts([bundles.BLUE])

    np.testing.assert_array_equal(first[1:], again)
    assert loads == ["text_encoder"]  # and no generator beside it
    loaded.encode_prompts([bundles.GREEN])
    assert loads == ["text_encoder"] * 2


def test_a_freed_encoder_forgets_old_prompts(ported, monkeypatch):
    monkeypatch.setattr(prompts_of, "_REMEMBERED", 1)
    loaded = load_bundle(str(ported), text_encoder="free")

    both = loaded.encode_prompts([bundles.RED, bundles.BLUE])
    alone = loaded.encode_prompts([bundles.RED])

    np.testing.assert_array_equal(both[:1], alone)
    assert not loaded.encode_prompts._known


def test_a_freed_encoder_is_loaded_once_for_a_whole_benchmark(ported, loads):
    loaded = load_bundle(str(ported), text_encoder="free")
    texts = [bundles.RED + " a" * number for number in range(300)]

    loaded.encode_prompts.prepare(texts)
    loaded.encode_prompts(texts[:1])
    loaded.encode_prompts(texts[-1:])

    assert loads == ["text_encoder"]


def test_low_rank_updates_are_kept_apart_added_or_left_out(ported):
    loaded = {
        how: load_bundle(str(ported), dtype="float32", lora=how).variables
        for how in options.ADAPTERS
    }

    given = ported_items()["generator"]
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


def test_updates_that_a_training_went_on_with_are_added_once(ported, tmp_path):
    given, base = ported_items()["generator"], str(ported)
    for number in (2, 3):
        folder = tmp_path / str(number)
        update = jax.tree.map(lambda x, by=number: by * x, given["lora"])
        checkpoint.write(folder, {"generator": {"lora": update}}, {"training": {}})
        write_run(folder, base)
        base = str(folder)

    separate, merged, none = (
        load_bundle(base, dtype="float32", lora=how).variables
        for how in options.ADAPTERS
    )

    plain, update = (tree["blocks"]["self_attn"]["q"] for tree in given.values())
    assert set(separate) == {"params", "lora"} and set(none) == {"params"}
    np.testing.assert_allclose(
        separate["lora"]["blocks"]["self_attn"]["q"]["a"], 3 * update["a"], rtol=1e-6
    )
    for tree, by in ((separate, 0), (none, 0), (merged, 9)):
        kernel = tree["params"]["blocks"]["self_attn"]["q"]["kernel"]
        expected = plain["kernel"] + by * update["a"] @ update["b"]
        np.testing.assert_allclose(kernel, expected, atol=1e-5)


def test_weights_can_be_wider_than_activations(ported):
    loaded = load_bundle(str(ported), param_dtype="float32", lora="none")

    kernel = loaded.variables["params"]["blocks"]["self_attn"]["q"]["kernel"]
    given = ported_items()["generator"]["params"]["blocks"]["self_attn"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel, given)
    assert (loaded.model.dtype, loaded.model.param_dtype) == ("bfloat16", "float32")
    assert loaded.text.param_dtype == "bfloat16"


def test_updates_apart_are_as_stored(ported):
    loaded = load_bundle(str(ported), lora="separate").variables

    given = ported_items()["generator"]["lora"]
    for ours, theirs in zip(
        jax.tree.leaves(loaded["lora"]), jax.tree.leaves(given), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded["params"]["blocks"]["ffn_in"]["kernel"].dtype == "bfloat16"


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


def test_the_shipped_bundle_takes_the_same_arguments():
    grid = LatentGrid(4, 6)
    plain = load_bundle("tiny")
    loaded = load_bundle("tiny", grid=grid, dtype="bfloat16", text_encoder="free")

    assert (plain.grid, loaded.grid) == (LatentGrid(8, 8), grid)
    leaves = jax.tree.leaves(loaded.variables)
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
    text = "a red ring moves up"
    near = np.asarray(plain.encode_prompts([text]), np.float32)
    found = np.asarray(loaded.encode_prompts([text]), np.float32)
    np.testing.assert_allclose(found, near, atol=0.1 * np.abs(near).max())


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ({"text_encoder": "disk"}, "text_encoder='disk'.*device, free, sharded"),
        ({"lora": "merge"}, "lora='merge'.*did you mean 'merged'"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"grid": LatentGrid(5, 4)}, "grid: .*must divide by the patch"),
    ],
)
def test_a_wrong_argument_is_named(argument, part):
    with pytest.raises(UserError, match=part):
        load_bundle("tiny", **argument)


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
def test_the_digest_tells_what_was_taken_apart(ported_digest, rewrite_ported, field):
    changed = rewrite_ported(lambda meta: meta["sources"][0].update({field: "x"}))

    assert load_bundle(str(changed)).digest != ported_digest


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        (None, "model", None, "meta.model is None, expected an object"),
        (None, "vae", [], "meta.vae is []"),
        (None, "sources", None, "meta.sources is missing"),
        (None, "sources", [5], "meta.sources, entry 0"),
        ("model", "num_layers", 10**12, "meta.model.num_layers"),
        ("model", "num_layers", 3, "the tensors are not those of its sizes"),
        ("model", "num_heads", 0, "meta.model"),
        ("model", "depth", 3, "unknown field 'depth'"),
        ("model", "eps", "x", "meta.model.eps"),
        ("text", "dim", 16, "meta.text.dim=16, expected 8"),
        ("text", "text_len", 7, "meta.text.text_len=7, expected 6"),
        ("text", "vocab", 31, "token_embedding/embedding is (32, 8), expected (31, 8)"),
        ("text", "num_layers", True, "meta.text.num_layers"),
        ("vae", "base_dim", 10**10, "meta.vae.base_dim"),
        ("vae", "base_dim", 16, "vae: the tensors"),
        ("vae", "dim_mult", [1, 10**9], "meta.vae.dim_mult=(1, 1000000000)"),
        ("vae", "dim_mult", [1], "temporal_downsample"),
        ("vae", "temporal_downsample", ["a"], "true or false"),
        ("vae", "latent_std", [0.0] * 16, "deviations > 0"),
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

    assert "is no SHA-256" in load_fails(rewrite_ported(change))


@pytest.mark.parametrize("words", [b"", b"no model"])
def test_a_broken_ported_tokenizer_is_named(rewrite_ported, words):
    assert "holds no tokenizer" in load_fails(rewrite_ported(words=words))


def test_updates_of_a_wrong_shape_are_named(tmp_path):
    items = jax.tree.map(np.copy, ported_items())
    layer = items["generator"]["lora"]["blocks"]["ffn_in"]
    layer["b"] = layer["b"][:, :, :-1]
    write_ported(tmp_path / "out", items)

    message = load_fails(tmp_path / "out")

    assert "lora/blocks/ffn_in/b is (2, 3, 31), expected (2, 3, 32)" in message

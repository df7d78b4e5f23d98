import io
import json

import bundles
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tiny

from anchor_jax.errors import UserError
from anchor_jax.wan.spec import TINY, LatentGrid
from anchor_jax.weights import single_file
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


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors.*tokenizer.model"):
        load_bundle(str(tmp_path))


def test_a_truncated_file_is_recognised(tmp_path):
    bundles.save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_bundle(str(tmp_path))


def test_foreign_tensors_are_recognised(tmp_path):
    bundles.save(tmp_path)
    content = safetensors.numpy.save({"x": np.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(UserError, match="not a bundle"):
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

    assert "model.safetensors is not a usable bundle" in message


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
    [
        (b"", "empty"),
        (b"no model", "not a usable tokenizer"),
        (b"\x00" * 64, "not a usable tokenizer"),
    ],
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

    assert "pieces, more than the 8" in rewrite(change)

import json

import bundles
import numpy as np
import pytest
import safetensors.numpy

from anchor_jax import bundle
from anchor_jax.errors import UserError
from anchor_jax.training import tiny as training
from anchor_jax.wan.spec import TINY, LatentGrid


@pytest.mark.parametrize("name", ["folder", "mine.safetensors"])
def test_what_is_saved_loads_as_float32_of_any_size(tmp_path, name):
    bundles.save(tmp_path / name)

    loaded = bundle.load_bundle(str(tmp_path / name))

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


def test_the_embedded_sizes_are_those_that_are_trained():
    assert training.TEXT == bundle.TINY_TEXT
    assert TINY.text_len == bundle.TINY_TEXT.text_len
    assert bundle.TINY_GRID == LatentGrid(8, 8)


def test_prompts_are_cleaned_and_rows_past_their_end_are_zero():
    loaded = bundles.load()

    plain = np.asarray(loaded.encode_prompts([bundles.RED]))
    messy = np.asarray(loaded.encode_prompts(["  A  red\n ring! "]))

    np.testing.assert_array_equal(plain, messy)
    assert plain.shape == (1, 6, 8)
    assert np.abs(plain[0, :4]).min() > 0  # three words and the end
    assert not plain[0, 4:].any()


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors.*tokenizer.model"):
        bundle.load_bundle(str(tmp_path))


def test_a_truncated_file_is_told_apart(tmp_path):
    bundles.save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(UserError, match="not a whole safetensors file"):
        bundle.load_bundle(str(tmp_path))


def test_foreign_tensors_are_told_apart(tmp_path):
    bundles.save(tmp_path)
    content = safetensors.numpy.save({"x": np.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(UserError, match="no bundle"):
        bundle.load_bundle(str(tmp_path))


def test_another_tokenizer_is_refused(tmp_path):
    bundles.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"other")

    with pytest.raises(UserError, match="not the tokenizer"):
        bundle.load_bundle(str(tmp_path))


def test_a_later_format_is_refused(tmp_path):
    bundles.save(tmp_path)
    file = tmp_path / "model.safetensors"
    content = safetensors.numpy.load(file.read_bytes())
    header = {"anchor_jax": json.dumps({"format_version": 99})}
    file.write_bytes(safetensors.numpy.save(content, header))

    with pytest.raises(UserError, match="format_version 99, expected 1"):
        bundle.load_bundle(str(tmp_path))


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

import bundles
import jax
import numpy as np
import pytest

from anchor_jax.errors import UserError
from anchor_jax.weights import bundle, checkpoint, options
from anchor_jax.weights.load import load_bundle


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


@pytest.mark.slow
def test_a_prompt_is_encoded_equally_for_every_placement(ported):
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


@pytest.mark.slow
def test_a_freed_encoder_is_loaded_for_new_prompts_only(ported, loads):
    loaded = load_bundle(str(ported), text_encoder="free")

    first = loaded.encode_prompts([bundles.RED, bundles.BLUE])
    again = loaded.encode_prompts([bundles.BLUE])

    np.testing.assert_array_equal(first[1:], again)
    assert loads == ["text_encoder"]  # and no generator beside it
    loaded.encode_prompts([bundles.GREEN])
    assert loads == ["text_encoder"] * 2


def test_a_freed_encoder_forgets_old_prompts(ported, monkeypatch):
    monkeypatch.setattr(bundle, "_REMEMBERED", 1)
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

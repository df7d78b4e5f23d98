import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.training import tiny, world_data
from anchor_jax.training.fit import FitConfig, fit
from anchor_jax.world import scene


def toy():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 4, 4)).astype(np.float32)
    return {
        "generator": {"blocks": {"kernel": kernel}},
        "text": {"bias": np.zeros(4, np.float32)},
    }


def loss(params, batch, rng, frozen):
    del frozen
    x = batch["x"] + 0.01 * jax.random.normal(rng, batch["x"].shape)
    for kernel in params["generator"]["blocks"]["kernel"]:
        x = jnp.tanh(x @ kernel)
    return jnp.mean(jnp.square(x + params["text"]["bias"] - batch["y"]))


def batches(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(x)}


CONFIG = FitConfig(steps=12, warmup=2, save_every=4, log_every=4)


def test_a_stopped_training_resumes_bit_for_bit(tmp_path):
    whole = fit(loss, toy(), batches, CONFIG, tmp_path / "whole")

    def dies(step):
        if step == 10:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        fit(loss, toy(), dies, CONFIG, tmp_path / "killed")
    resumed = fit(loss, toy(), batches, CONFIG, tmp_path / "killed")

    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_training_lowers_the_loss(tmp_path):
    config = FitConfig(steps=200, warmup=10, save_every=1000, log_every=100)
    params = fit(loss, toy(), batches, config, tmp_path)

    fresh = [float(loss(toy(), batches(i), jax.random.key(i), None)) for i in range(20)]
    after = [
        float(loss(params, batches(i), jax.random.key(i), None)) for i in range(20)
    ]
    assert np.mean(after) < 0.7 * np.mean(fresh)


def test_a_loss_that_is_not_a_number_stops_the_training(tmp_path):
    def broken(params, batch, rng, frozen):
        return loss(params, batch, rng, frozen) * jnp.nan

    with pytest.raises(FloatingPointError, match="step"):
        fit(broken, toy(), batches, CONFIG, tmp_path)


def test_windows_hold_at_most_one_switch_and_train_combinations_only():
    codec = world_data.fit_codec(0, 16)
    windows = world_data.sample_windows(codec, 0, 60)

    assert windows.latents.shape == (60, 15, 8, 8, 16)
    assert set(windows.layout) == {0, 1, 2}
    assert all((windows.switch == 0) == (windows.before == windows.after))
    training = len(scene.all_attributes(False))
    assert windows.before.max() < training and windows.after.max() < training
    assert set(windows.switch[(windows.layout == 2) & (windows.switch > 0)]) == {1}


def test_blocks_between_sink_and_switch_get_no_loss_and_the_new_prompt():
    arrays = tiny._switch_arrays(np.array([0, 1, 3]))

    np.testing.assert_array_equal(
        arrays["weight"], [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]
    )
    np.testing.assert_array_equal(arrays["prompt"][0], [0] * 10)
    np.testing.assert_array_equal(arrays["prompt"][2], [0, 1, 1, 1, 1] * 2)


def test_rolled_latents_keep_their_content():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 2, 8, 8, 4)).astype(np.float32)

    rolled = world_data.roll(rng, latents)

    assert not np.array_equal(rolled, latents)
    np.testing.assert_allclose(
        np.sort(rolled.reshape(3, -1)), np.sort(latents.reshape(3, -1))
    )


def test_stratified_numbers_fill_every_cell():
    numbers = world_data.stratified(np.random.default_rng(0), (4, 5))

    assert sorted((numbers.ravel() * 20).astype(int)) == list(range(20))

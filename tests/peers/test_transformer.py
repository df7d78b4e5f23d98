"""Our transformer beside diffusers' `WanTransformer3DModel`."""

import peer_models as peers
import pytest
import torch

from anchor_jax.porting import port
from anchor_jax.weights import checkpoint

SIZES = (1, 3, 4, 6, 16)  # batch, frame, height, width, channel


@pytest.mark.parametrize("timestep", [999.0, 412.5, 0.0])
def test_the_predicted_flow_is_that_of_diffusers(pipeline, bundle, timestep):
    video, text = peers.draw(*SIZES), peers.draw(1, 512, 16, seed=1)

    theirs = peers.predict(pipeline.transformer, video, timestep, text)
    ours = peers.predict_ours(bundle.model, bundle.variables, video, timestep, text)

    peers.assert_close(ours, theirs)


def test_videos_of_a_batch_have_their_own_timesteps(pipeline, bundle):
    video, text = peers.draw(2, *SIZES[1:]), peers.draw(2, 512, 16, seed=1)
    times = [750.0, 20.0]

    theirs = peers.predict(pipeline.transformer, video, times, text)
    ours = peers.predict_ours(bundle.model, bundle.variables, video, times, text)

    peers.assert_close(ours, theirs)


def test_shards_in_bfloat16_come_in_bit_for_bit(tmp_path):
    model = peers.transformer(seed=5, layers=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "in" / "transformer").glob("*.safetensors"))) > 1

    plan = port.plan(tmp_path / "in")
    port.run(plan, tmp_path / "out")

    assert plan.meta["model"]["num_heads"] == peers.HEADS
    found = checkpoint.restore(tmp_path / "out", "generator")["params"]
    kernel = found["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.dtype == "bfloat16" and len(kernel) == 3
    for layer, block in enumerate(model.blocks):
        expected = block.attn1.to_q.weight.detach().float().numpy().T
        assert (kernel[layer].astype("float32") == expected).all()

"""A training step and its cost by arithmetic, against values by hand."""

import dataclasses

import pytest

from anchor_jax.perf import roofline, targets, work
from anchor_jax.perf.links import Layout
from anchor_jax.perf.work import Cost, Setting, Use
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B

H100 = targets.parse_topology("h100:7x8")
MESH = {"data": 7, "fsdp": 8, "context": 1, "tensor": 1}
SETTING = Setting(Layout(H100), MESH, batch=56, remat="nothing_saveable")
GRADIENT = Use(
    "gradient", "step", model=WAN_1_3B, flops=3e15, again=1e15, passes=2,
    tokens=65520, live=32760, gathers=2, backward=True,
)  # fmt: skip
NOW_AND_THEN = Use(
    "score", "other", each=0.2, model=WAN_14B, flops=10e15, passes=1,
    tokens=32760, live=32760, gathers=1,
)  # fmt: skip


def test_a_mean_step_weighs_its_parts():
    found = work.step([GRADIENT, NOW_AND_THEN], SETTING, {})

    assert found.flops == pytest.approx(56 * (3e15 + 0.2 * 10e15))
    assert found.again == pytest.approx(56 * 1e15)
    assert found.peak == 56 * 989e12
    # 6e15 operations on a chip, at 40 % of 989e12 per second.
    assert found.compute == pytest.approx(6e15 / (0.4 * 989e12))
    small, large = (2 * roofline.model_params(m) for m in (WAN_1_3B, WAN_14B))
    assert found.memory == pytest.approx((2 * small + 0.2 * large) / 3350e9)


def test_collectives_follow_the_products_and_lower_the_mfu():
    found = work.step([GRADIENT], SETTING, {"generator": 8e9})
    gather, reduce, scatter = found.traffic
    weights = 2 * roofline.model_params(WAN_1_3B)

    assert gather.inside == pytest.approx(2 * weights * 7 / 8)
    assert scatter.inside == pytest.approx(8e9 * 7 / 8)
    # A chip's eighth is summed over seven nodes.
    assert (reduce.inside, reduce.between) == (0, pytest.approx(2 * 1e9 * 6 / 7))
    links = 2 * weights * 7 / 8 / 450e9 + 8e9 * 7 / 8 / 450e9 + 2e9 * 6 / 7 / 50e9
    assert found.links == pytest.approx(links)
    assert found.seconds == pytest.approx(found.compute + links)
    assert found.mfu == pytest.approx(3e15 / (found.seconds * 989e12))
    assert found.mfu < 0.4 * 3 / 4  # a quarter is repeated


def test_without_collectives_only_repetition_lowers_the_mfu():
    one = dict.fromkeys(MESH, 1)
    alone = Setting(Layout(targets.topology("h100")), one, 1, "none", efficiency=0.5)

    found = work.step([dataclasses.replace(GRADIENT, again=0.0)], alone, {"a": 1e9})

    assert found.traffic == ()
    assert found.mfu == pytest.approx(0.5)


def test_split_heads_sum_activations_in_every_layer():
    mesh = {"data": 7, "fsdp": 2, "context": 1, "tensor": 4}
    setting = dataclasses.replace(SETTING, mesh=mesh, batch=28)

    found = work.step([GRADIENT], setting, {})

    sums = {row.kind: row for row in found.traffic}["all-reduce"]
    # Two videos on a group of four chips; three sums in each of 30 layers, of which the
    # forward pass is repeated.
    assert sums.count == pytest.approx(1.5 * 90)
    assert sums.nbytes == pytest.approx(1.5 * 90 * 65520 * 1536 * 2 * 2)


def test_split_tokens_are_exchanged_in_every_layer():
    mesh = {"data": 7, "fsdp": 1, "context": 2, "tensor": 4}
    setting = dataclasses.replace(SETTING, mesh=mesh, batch=14)
    stored = dataclasses.replace(GRADIENT, again=0.0)

    found = {row.kind: row for row in work.step([stored], setting, {}).traffic}

    # Two videos; half of the tokens; a quarter of the features outside of sums.
    own = 65520 * 1536 * 2 * 2 / 2
    assert found["all-reduce"].nbytes == pytest.approx(3 * 30 * own)
    # q, k, v and output of self-attention, q and output of cross-attention.
    assert found["all-to-all"].count == pytest.approx(6 * 30)
    assert found["all-to-all"].nbytes == pytest.approx(6 * 30 * own / 4)
    assert found["all-to-all"].inside == pytest.approx(6 * 30 * own / 4 / 2)
    # 16 channels of 2 x 2 positions come out for each token.
    assert found["all-gather"].nbytes == pytest.approx(65520 * 64 * 2 * 2)


def test_gradients_are_summed_over_data_and_context_together():
    mesh = {"data": 7, "fsdp": 2, "context": 4, "tensor": 1}
    setting = dataclasses.replace(SETTING, mesh=mesh, batch=14)

    found = {row.kind: row for row in work.step([], setting, {"critic": 8e9}).traffic}

    assert found["reduce-scatter"].nbytes == pytest.approx(8e9)
    sums = found["all-reduce"]
    assert (sums.count, sums.nbytes) == (1, pytest.approx(4e9))
    assert sums.inside + sums.between == pytest.approx(2 * 4e9 * 27 / 28)


def test_parts_of_a_batch_repeat_gathers_reads_and_reductions():
    pairs = dataclasses.replace(SETTING, batch=112)
    parts = dataclasses.replace(pairs, microbatches=2)

    once, twice = (
        work.step([GRADIENT], one, {"generator": 8e9}) for one in (pairs, parts)
    )

    assert twice.memory == pytest.approx(2 * once.memory)
    for ours, theirs in zip(twice.traffic, once.traffic, strict=True):
        assert ours.kind == theirs.kind
        assert ours.nbytes == pytest.approx(2 * theirs.nbytes)
    assert (twice.flops, twice.compute) == (once.flops, once.compute)


def test_the_positions_along_an_axis():
    mesh = {"data": 2, "fsdp": 3, "context": 1, "tensor": 1}

    assert work.along(mesh, "fsdp") == ((0, 1, 2), (3, 4, 5))
    assert work.along(mesh, "data") == ((0, 3), (1, 4), (2, 5))
    four = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}
    assert work.along(four, "data", "context") == ((0, 1, 4, 5), (2, 3, 6, 7))


@pytest.mark.parametrize(
    "use, remat, gigabytes",
    [
        # Compiled for an H100: launch/results/chips.md, "A training".
        (GRADIENT, "nothing_saveable", 7.9),
        (GRADIENT, "dots_with_no_batch_dims_saveable", 45.8),
        (GRADIENT, "none", 244.6),
        (dataclasses.replace(NOW_AND_THEN, live=65520), "nothing_saveable", 15.2),
    ],
)
def test_working_memory_is_about_that_of_compiled_programs(use, remat, gigabytes):
    setting = dataclasses.replace(SETTING, remat=remat)

    found = work.working_bytes([use], setting)

    assert found / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_a_whole_network_and_its_gradient_are_held():
    held = dataclasses.replace(GRADIENT, whole=True, gradient=5e9)
    params = roofline.model_params(GRADIENT.model)

    more = work.working_bytes([held], SETTING) - work.working_bytes([GRADIENT], SETTING)

    layers = GRADIENT.model.num_layers
    assert more == pytest.approx(5e9 + 2 * params * (1 - 2 / layers))


def test_devices_along_context_have_their_tokens_only():
    mesh = {"data": 7, "fsdp": 4, "context": 2, "tensor": 1}
    split = dataclasses.replace(SETTING, mesh=mesh)

    # Two videos on two devices take as much as one on each.
    assert work.working_bytes([GRADIENT], split) == pytest.approx(
        work.working_bytes([GRADIENT], SETTING)
    )


def test_the_residual_stream_is_whole_on_devices_along_tensor():
    mesh = {"data": 7, "fsdp": 2, "context": 1, "tensor": 4}
    held = dataclasses.replace(GRADIENT, gradient=8e9)
    split = dataclasses.replace(
        SETTING, mesh=mesh, batch=14
    )  # one video each, as whole

    def weights(setting):
        return work.working_bytes([dataclasses.replace(held, live=0)], setting)

    assert weights(split) == pytest.approx(weights(SETTING) / 4)
    layers, dim, ffn = 30, 1536, 8960
    token = 2 * (layers * dim + 10 * dim + (10 * dim + 5 * ffn) / 4)
    activations = work.working_bytes([held], split) - weights(split)
    assert activations == pytest.approx(32760 * token)


def test_microbatches_halve_the_activations():
    pairs = dataclasses.replace(SETTING, batch=112)
    halved = dataclasses.replace(pairs, microbatches=2)

    assert work.working_bytes([GRADIENT], halved) == pytest.approx(
        work.working_bytes([GRADIENT], SETTING)
    )
    assert work.working_bytes([GRADIENT], pairs) > 1.8 * work.working_bytes(
        [GRADIENT], halved
    )


def test_what_a_policy_repeats():
    forward = roofline.Pass(1.0, 2.0, 4.0, 8.0, 16.0)

    assert work.repeated("nothing_saveable", forward) == 31
    assert work.repeated("dots_saveable", forward) == 2
    assert work.repeated("none", forward) == 0
    assert work.repeated("everything_saveable", forward) == 0


def test_hours_and_cost():
    cost = Cost(steps=3000, chips=56, seconds=8.4, price=2.5)

    assert cost.hours == pytest.approx(7.0)
    assert cost.chip_hours == pytest.approx(392)
    assert cost.total == pytest.approx(980)
    assert Cost(3000, 56, 8.4).summary()["total"] is None
    assert cost.summary()["chip_hours"] == pytest.approx(392)

"""Bytes and seconds of collectives, by hand."""

import pytest

from anchor_jax.perf import targets
from anchor_jax.perf.hlo import Collective
from anchor_jax.perf.links import Group, Layout, sent

H100 = targets.parse_topology("h100:7x8")
V5P = targets.parse_topology("v5p:4x4x4")
WITHIN = tuple(tuple(range(8 * node, 8 * node + 8)) for node in range(7))
ACROSS = tuple(tuple(range(first, 56, 8)) for first in range(8))


@pytest.mark.parametrize(
    "kind, group, inside, between",
    [
        ("all-gather", Group(8, 1), 4900, 0),
        ("reduce-scatter", Group(8, 1), 4900, 0),
        ("all-reduce", Group(8, 1), 9800, 0),
        # One chip of each of seven nodes: everything takes the network.
        ("all-gather", Group(7, 7), 0, 4800),
        # All chips of seven nodes: each brings an eighth of six nodes' parts.
        ("all-gather", Group(56, 7), 5500 - 600, 600),
        ("all-reduce", Group(56, 7), 11000 - 1200, 1200),
        # No part is needed twice in a node.
        ("all-to-all", Group(56, 7), 5500 - 4800, 4800),
        ("collective-permute", Group(2, 1), 5600, 0),
        ("collective-permute", Group(2, 2), 0, 5600),
        ("all-reduce", Group(1, 1), 0, 0),
    ],
)
def test_a_chip_sends_this_much(kind, group, inside, between):
    assert sent(kind, 5600, group) == pytest.approx((inside, between))


def test_groups_are_inside_a_node_or_between_nodes():
    layout = Layout(H100)

    assert layout.group(WITHIN) == Group(8, 1)
    assert layout.group(ACROSS) == Group(7, 7)
    assert layout.group(()) == Group(56, 7)
    # The largest group counts: the second spans two nodes.
    assert layout.group(((0, 1), (7, 8))) == Group(2, 2)


def test_devices_may_be_out_of_order_in_a_mesh():
    turned = tuple(8 * (n % 7) + n // 7 for n in range(56))
    layout = Layout(H100, turned)

    # Seven neighbours in the mesh are on seven nodes.
    assert layout.group((tuple(range(7)),)) == Group(7, 7)


def test_a_slice_has_no_network_between_hosts():
    assert Layout(V5P).group(()) == Group(64, 1)


@pytest.mark.parametrize(
    "topology, kind, groups, seconds",
    [
        (H100, "all-gather", WITHIN, 7 / 8 / 450),
        (H100, "all-gather", ACROSS, 6 / 7 / 50),
        (H100, "all-reduce", (), 2 * 6 / 7 / 8 / 50),  # the network is slower
        (V5P, "all-gather", (tuple(range(16)),), 15 / 16 / 400),
        (V5P, "all-gather", (), 63 / 64 / 600),
    ],
)
def test_a_gigabyte_takes_the_time_of_its_slowest_link(topology, kind, groups, seconds):
    layout = Layout(topology)

    found = layout.seconds(kind, 1e9, layout.group(groups))

    assert found == pytest.approx(seconds)


def test_traffic_is_summed_by_kind_with_repetitions():
    collectives = [
        Collective("all-gather", 800, WITHIN, "bf16", times=30),
        Collective("all-gather", 700, ACROSS, "bf16", times=2),
        Collective("all-reduce", 700, ACROSS, "f32"),
    ]

    gather, reduce = Layout(H100).traffic(collectives)

    assert (gather.kind, gather.count, gather.nbytes) == ("all-gather", 32, 25400)
    assert (gather.inside, gather.between) == (30 * 700, 2 * 600)
    assert gather.seconds == pytest.approx(30 * 700 / 450e9 + 2 * 600 / 50e9)
    assert (reduce.count, reduce.inside, reduce.between) == (1, 0, 1200)

"""Chips and topologies by name."""

import importlib.util

import pytest

from anchor_jax import sharding
from anchor_jax.errors import UserError
from anchor_jax.perf import targets


@pytest.mark.parametrize(
    "target, chips, name",
    [
        ("v5p", 1, "v5p:1x1x1"),
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 32, "v5p:2x4x4"),
        ("v5p", 64, "v5p:4x4x4"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
    ],
)
def test_pods_are_named_by_their_sides(target, chips, name):
    assert targets.topology(target, chips).compiler()[0] == name


@pytest.mark.parametrize(
    "chips, topology", [(1, "1x1x1"), (4, "1x1x4"), (56, "7x1x8"), (64, "8x1x8")]
)
def test_clusters_are_machines_of_eight(chips, topology):
    name, options = targets.topology("h100", chips).compiler()

    assert options["topology"] == topology
    assert name == "NVIDIA H100 80GB HBM3"
    assert "device_memory_size: 84942979072" in options["target_config"]


@pytest.mark.parametrize(
    "target, chips, message",
    [
        ("v5p", 12, "chips=12: must be a power of two"),
        ("h100", 12, "chips=12: must be 1 to 8, or a multiple of 8"),
        ("h10", 8, "target='h10'.*did you mean 'h100'"),
    ],
)
def test_a_number_of_chips_that_no_machine_has_is_refused(target, chips, message):
    with pytest.raises(UserError, match=message):
        targets.topology(target, chips)


@pytest.mark.parametrize(
    "text, sides, chips, hosts, label",
    [
        ("h100:7x8", (7, 8), 56, 7, "h100:7x8"),
        ("a100:3x4", (3, 4), 12, 3, "a100:3x4"),
        ("h100:8", (1, 8), 8, 1, "h100:1x8"),
        ("h200", (1, 1), 1, 1, "h200:1x1"),
        ("v5p:4x4x4", (4, 4, 4), 64, 1, "v5p:4x4x4"),
        ("v5p:2x2x1", (2, 2, 1), 4, 1, "v5p:2x2x1"),
        ("v6e:8x8", (8, 8), 64, 1, "v6e:8x8"),
        ("v5e:2x4", (2, 4), 8, 1, "v5e:2x4"),
        ("v4:4x4x8", (4, 4, 8), 128, 1, "v4:4x4x8"),
        ("b200:2x8", (2, 8), 16, 2, "b200:2x8"),
        ("v6e", (1, 1), 1, 1, "v6e:1x1"),
    ],
)
def test_topologies_are_read(text, sides, chips, hosts, label):
    found = targets.parse_topology(text)

    assert (found.sides, found.chips, found.hosts) == (sides, chips, hosts)
    assert found.label == label
    assert targets.parse_topology(label) == found


@pytest.mark.parametrize(
    "text, message",
    [
        ("h10:7x8", "unknown chip 'h10'.*did you mean 'h100'"),
        ("h100:7by8", "'7by8' must be NODESxCHIPS, such as h100:7x8"),
        ("h100:0x8", "'0x8' must be NODESxCHIPS"),
        ("h100:2x2x2", "'2x2x2' must be NODESxCHIPS"),
        ("h100:7x16", "16 chips per node; a node has at most 8, so write h100:NODESx8"),
        ("v5p:8x8", "'8x8' must be 3 sides of a slice, such as v5p:2x2x1 or v5p:4x4x4"),
        ("v6e:64", "'64' must be 2 sides of a slice, such as v6e:2x4 or v6e:8x8"),
        ("v5e:3x8", "sides of a slice are 1 or even, and at most 16x16"),
        ("v6e:2x32", "at most 16x16; choose 2 sides"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        targets.parse_topology(text)


def test_hosts_of_devices_are_consecutive():
    seven = targets.parse_topology("h100:7x8")

    assert [seven.host(n) for n in (0, 7, 8, 55)] == [0, 0, 1, 6]
    assert targets.parse_topology("v5p:4x4x4").host(63) == 0


@pytest.mark.parametrize(
    "text, chips, share",
    [
        ("v5p:4x4x4", 4, 1 / 3),
        ("v5p:4x4x4", 16, 2 / 3),
        ("v5p:4x4x4", 64, 1.0),
        ("v5p:2x2x1", 4, 1 / 3),  # no ring: half of two sides
        ("v6e:8x8", 8, 1 / 4),
        ("v6e:16x16", 256, 1.0),
        ("h100:7x8", 8, 1.0),
    ],
)
def test_a_group_uses_the_links_of_the_sides_that_it_needs(text, chips, share):
    assert targets.parse_topology(text).links_of(chips) == pytest.approx(share)


def test_stand_ins_have_the_order_and_hosts_of_devices():
    gpus = targets.stand_ins(targets.parse_topology("h100:2x4"))
    tpus = targets.stand_ins(targets.parse_topology("v5e:2x4"))
    cube = targets.stand_ins(targets.parse_topology("v5p:2x2x4"))

    assert [one.process_index for one in gpus] == [0] * 4 + [1] * 4
    assert [one.coords for one in tpus[:3]] == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert cube[15].coords == (1, 1, 3) and cube[4].coords == (0, 0, 1)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_chip_has_a_data_sheet_links_and_an_estimate_of_its_own(name):
    target = targets.TARGETS[name]

    assert target.chip.flops > 1e14 and target.link >= 200e9
    assert bool(target.network) != bool(target.axes)
    assert bool(target.clock) == bool(target.axes) == (not target.description)


@pytest.mark.parametrize("name", ["v5p", "h100", "a100"])
def test_a_name_needs_no_compiler(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)

    assert targets.named(name) is targets.TARGETS[name]
    with pytest.raises(UserError, match="needs its compiler"):
        targets.find_target(name)


@pytest.mark.parametrize(
    "name, tera, link, network", [("v4", 275, 300, 0), ("b200", 2250, 900, 50)]
)
def test_chips_of_clusters_have_published_speeds(name, tera, link, network):
    target = targets.TARGETS[name]

    assert target.chip.flops == tera * 1e12
    assert (target.link, target.network) == (link * 1e9, network * 1e9)


@pytest.mark.parametrize("text", ["v4:2x2x1", "v4:4x4x8", "b200:3x8"])
def test_a_mesh_is_made_of_the_chips_of_clusters(text):
    found = targets.stand_ins(targets.parse_topology(text))

    mesh = sharding.make_mesh((2, -1, 1, 1), found)

    assert mesh.size == len(found) and mesh.shape["data"] == 2


def test_files_of_programs_are_named_by_topology_and_program():
    one = targets.parse_topology("h100:7x8")

    assert targets.file_name(one, "critic, first chunk") == (
        "h100-7x8-critic-first-chunk.txt"
    )

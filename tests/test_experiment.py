"""The old names of `anchor_jax.sampling` stay importable."""

import pytest

from anchor_jax import experiment
from anchor_jax.cache.actions import Flush
from anchor_jax.cache.positions import Bounded
from anchor_jax.sampling import config, methods, resolve
from anchor_jax.training import build as old_build
from anchor_jax.training.stages import build


@pytest.mark.parametrize("name", experiment.__all__)
def test_an_old_name_is_that_of_the_package(name):
    found = [
        getattr(module, name) for module in (config, methods, resolve)
        if hasattr(module, name)
    ]  # fmt: skip

    if name not in ("ROPES", "SWITCHES", "parse_size", "told_choices"):
        assert getattr(experiment, name) is found[0]


def test_configs_of_earlier_versions_find_their_class():
    assert old_build.TrainConfig is build.TrainConfig


def test_old_tables_hold_what_they_held():
    assert experiment.told_choices is resolve.describe_choices
    assert experiment.ROPES["bounded"](12, 45) == Bounded(range=21, cut=45)
    assert experiment.SWITCHES["flush"] == Flush()

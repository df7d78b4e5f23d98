import pytest

from anchor_jax import experiment
from anchor_jax.errors import UserError
from anchor_jax.wan.spec import GRIDS, WAN_2_1, LatentGrid


def test_sizes_are_in_pixels():
    for size, grid in GRIDS.items():
        assert WAN_2_1.parse_size(size) == grid
    assert WAN_2_1.parse_size("16x4096") == LatentGrid(2, 512)
    assert experiment.parse_size("480x832") == LatentGrid(60, 104)


@pytest.mark.parametrize("size", ["480", "480x", "x832", "0x16", "12x16", "16x4112"])
def test_a_wrong_size_says_which_are_right(size):
    with pytest.raises(UserError, match="must be HEIGHTxWIDTH.*480x832"):
        WAN_2_1.parse_size(size)

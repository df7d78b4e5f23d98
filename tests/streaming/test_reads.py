import pytest

from anchor_jax.cache.policies import POLICIES
from anchor_jax.streaming.reads import memory


@pytest.mark.slow
def test_a_restart_is_shown():
    lines = memory(POLICIES["causvid"], frames=27)

    assert lines[8].split() == ["restart", "18-20@0-2"]
    assert lines[9].split() == ["21", "21-23@3-5", "18-20@0-2"]

import dataclasses
import json
import math
import tracemalloc

import bundles
import jax
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.cache import policies
from anchor_jax.cache.policies import POLICIES, Policy
from anchor_jax.cache.positions import Absolute
from anchor_jax.cli.main import main
from anchor_jax.errors import UserError
from anchor_jax.streaming import room, stream
from anchor_jax.streaming.recipe import load_recipe
from anchor_jax.streaming.session import Session
from anchor_jax.wan.spec import LatentGrid


def wide(window, **changes):
    return tiny.setup(Policy(window=window, positions=Absolute()), **changes)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_stream_needs_is_what_it_takes(name, batch):
    setup = tiny.setup(name, guidance=2.0)
    embedding = jax.ShapeDtypeStruct((2 * batch, 6, 8), "float32")

    def begin(variables, embedding):
        context = stream.project(variables, embedding, setup=setup)
        return stream.start(context, setup=setup)

    state = jax.eval_shape(begin, tiny.variables(), embedding)
    noise = jax.eval_shape(
        lambda: stream.draw_noise(jax.random.key(0), 0, state.recent, setup=setup)
    )
    found = room.need(setup, batch)

    slots = setup.policy.slots or 1
    own = nbytes(state.cache.slots) * setup.policy.block / slots
    kept = nbytes((state.cache.slots, state.cache.prior))
    if setup.policy.slots:
        assert found.cache == kept + own
    assert found.context == nbytes(state.context)
    assert found.latents == nbytes((state.recent, noise.initial, noise.fresh))


@pytest.mark.parametrize(
    ("changes", "batch", "part"),
    [
        ({"setup": wide(4000)}, 1, "reduce window, size or batch"),
        ({"setup": tiny.setup(grid=LatentGrid(512, 512))}, 1, "size=4096x4096"),
        ({"setup": tiny.setup()}, 1000, "batch=1000"),
        (
            {"setup": tiny.setup(levels=flow.Levels((1.0,) * 1000, (0.5,) * 1000))},
            100,
            "number of noise levels",
        ),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_with_its_bytes(
    monkeypatch, changes, batch, part
):
    setup, available = changes["setup"], 4 * 2**20
    monkeypatch.setattr(room, "available_bytes", lambda: available)
    needed = room.need(setup, batch).total

    with pytest.raises(UserError, match=part) as caught:
        Session(bundles.load(), setup, "a red ring", 0, batch=batch)

    assert f"at least {needed} bytes" in str(caught.value)
    assert f"{available} bytes" in str(caught.value)
    room.check(setup, batch=1) if needed <= available else None


@pytest.mark.parametrize(
    "setup",
    [
        wide(60_000),
        tiny.setup(Policy(4200, 0, 4200, positions=Absolute())),
        tiny.setup(levels=flow.Levels((1.0,) * 2000, (0.5,) * 2000)),
    ],
)
def test_some_sizes_are_refused_on_any_machine(monkeypatch, setup):
    monkeypatch.setattr(room, "available_bytes", lambda: 10**18)

    with pytest.raises(UserError, match="must be at most .* bytes .* of memory"):
        Session(bundles.load(), setup, "a red ring", 0)


def test_a_recipe_with_a_window_without_end_takes_no_memory(tmp_path):
    session = Session(bundles.load(), wide(12), "a red ring", 0)
    recipe = session.recipe() | {"frames": 12}
    recipe["setup"]["policy"]["window"] = 60_000
    path = tmp_path / "r.json"
    path.write_text(json.dumps(recipe))

    tracemalloc.start()
    with pytest.raises(UserError, match=r"r.json: window=60000: .*; reduce it"):
        load_recipe(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 10**8


def test_a_config_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path, capsys
):
    line = ["sample", "--config=tiny:longlive", "--config.window=60000"]

    status = main([*line, "--config.prompt=a[1s]", f"--out={tmp_path / 'out'}"])

    assert status == 2
    assert "window=60000: must be at most 4096" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_available_is_known():
    assert 2**20 < room.available_bytes() < 2**60


def test_a_limit_of_addresses_counts(monkeypatch):
    import resource

    used = 2**40
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used, used))

    assert room.available_bytes() <= used


def test_a_stream_of_the_largest_published_model_is_allowed(monkeypatch):
    from anchor_jax.wan.spec import WAN_14B

    monkeypatch.setattr(room, "available_bytes", lambda: 80 * 2**30)
    setup = tiny.setup(model=WAN_14B, grid=LatentGrid())

    room.check(dataclasses.replace(setup, guidance=5.0))


def test_a_clip_made_at_once_keeps_no_keys_and_values(monkeypatch):
    from anchor_jax.wan.spec import WAN_14B

    monkeypatch.setattr(room, "available_bytes", lambda: 8 * 10**10)
    setup = tiny.setup(
        policies.whole_clip(21), model=WAN_14B, grid=LatentGrid(90, 160), guidance=5.0
    )

    assert room.need(setup).cache == 0
    room.check(setup)


def test_a_device_that_names_no_limit_has_none(monkeypatch):
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return None

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])

    assert room.available_bytes() == math.inf

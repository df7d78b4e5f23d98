import dataclasses

import bundles
import pytest

from anchor_jax import flow
from anchor_jax.cache.policies import (
    POLICIES,
    Flush,
    Keep,
    PeriodicJunction,
    Recache,
    ReleaseJunction,
)
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling.config import (
    read_config,
)
from anchor_jax.sampling.resolve import (
    describe_size_change,
    load_scripts,
    make_policy,
    make_setup,
    noise_levels,
    resolve,
)
from anchor_jax.streaming.loop import Euler, UniPC
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import LatentGrid

ONE = Script((Segment("a", 0),), 6)
TWO = Script((Segment("a", 0), Segment("b", 3)), 6)


def config(policy="anchor_forcing", **fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return load_config(f"tiny:{policy}", overrides)


def setup(script=TWO, **fields):
    return make_setup(config(**fields), bundles.load(), script)


def open_config(**fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return read_config(load_config("interactive", overrides))


@pytest.mark.parametrize("name", POLICIES)
def test_a_name_gives_its_policy(name):
    assert make_policy(config(name), TWO) == POLICIES[name]


def test_parts_recombine_into_the_papers_ablations():
    def make(policy, **fields):
        return make_policy(config(policy, **fields), TWO)

    assert make("longlive", rope="bounded") == POLICIES["bounded_rope"]
    assert make("longlive", rope="tri_region") == POLICIES["tri_region_no_junction"]
    assert make("longlive", rope="relative") == POLICIES["longlive_relative"]
    assert make("anchor_forcing", on_switch="keep") == POLICIES["no_recache"]
    sink = make("anchor_forcing", on_switch="recache_sink")
    assert sink == POLICIES["no_global_sink"]
    assert make("longlive", on_switch="flush").on_switch == Flush()
    assert make("longlive", window=9).window == 9


def test_a_scene_cut_survives_another_rope():
    made = make_policy(config("infinity_rope", rope="bounded"), TWO)

    assert made.positions == Bounded(range=21, cut=45)


def test_rules_choose_the_released_form():
    def make(policy, script):
        return make_policy(config(policy, rules="release"), script)

    assert make("anchor_forcing", TWO) == POLICIES["anchor_forcing_release"]
    assert make("infinity_rope", TWO) == POLICIES["infinity_rope_release"]
    assert make("longlive", TWO) == POLICIES["longlive"]
    assert type(make("anchor_forcing", ONE).junction) is PeriodicJunction
    for name in ("no_recache", "no_global_sink"):
        released = dataclasses.replace(POLICIES[name], junction=ReleaseJunction())
        assert make(name, TWO) == released
    for name in ("anchor_forcing_release", "infinity_rope_release", "causvid"):
        assert make(name, TWO) == POLICIES[name]


def test_a_requested_rope_stays_under_the_releases_rules():
    given = config("infinity_rope", rules="release", rope="relative")

    made = make_policy(given, TWO)

    assert made.positions == Relative(range=6, cut=45)


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        ("infinity_rope", Relative(range=9, cut=45)),
        ("infinity_rope_release", Ranked(range=9, cut=45)),
        ("longlive_relative", Relative(range=9)),
        ("anchor_forcing", Relative(range=21)),
        ("longlive", Absolute()),
    ],
)
def test_a_range_of_the_windows_size_moves_with_it(policy, positions):
    made = make_policy(config(policy, window=9), TWO)

    assert (made.window, made.positions) == (9, positions)


@pytest.mark.parametrize("rope", ["relative", "ranked"])
def test_a_junction_needs_a_range_beyond_the_window(rope):
    with pytest.raises(UserError, match="choose rope=tri_region or rope=bounded"):
        make_policy(config(rope=rope), TWO)
    for other in ("tri_region", "bounded"):
        make_policy(config(rope=other), TWO)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "long_live"}, "did you mean 'longlive'"),
        ({"rules": "official"}, "paper, release"),
        ({"rope": "absolute"}, "absolute RoPE cannot be used with a junction"),
        ({"rope": "spiral"}, "tri_region"),
        ({"on_switch": "forget"}, "recache_sink"),
        ({"sink": 6}, "sink=6 must lie between 0 and block=3"),
        ({"window": 30}, "window=30 must fit into the RoPE range"),
        ({"window": 20}, "leave no room"),
        ({"sampler__solver": "heun"}, "unipc"),
        (
            {"sampler__solver": "euler", "sampler__grid": "wan_unipcs"},
            "did you mean 'wan_unipc'",
        ),
        ({"sampler__steps": "(250, 500)"}, "decreasing"),
        ({"sampler__steps": "(1001,)"}, "at most 1000"),
        ({"sampler__shift": 0}, "more than 0"),
        ({"window": "abc"}, "config.window: got 'abc', expected int"),
        ({"frames": "ten"}, "config.frames: got 'ten', expected int"),
        ({"frames": "30.0"}, "config.frames: got '30.0', expected int"),
        ({"rope": "[]"}, "tri_region"),
        ({"sampler__guidance": -1}, "at least 0"),
    ],
)
def test_incompatible_settings_are_refused_with_the_reason(fields, message):
    with pytest.raises(UserError, match=message):
        setup(**fields)


def test_the_teacher_sees_the_whole_clip():
    made = setup(ONE, policy="wan_teacher")

    assert made.policy.block == made.policy.window == made.policy.limit == 6
    assert not made.policy.remembers
    assert made.policy.positions == Absolute()
    assert made.policy.on_switch == Keep()


def test_the_teacher_refuses_switches_and_overrides():
    with pytest.raises(UserError, match="cannot switch"):
        setup(TWO, policy="wan_teacher")
    with pytest.raises(UserError, match="window=12 does not apply"):
        setup(ONE, policy="wan_teacher", window=12)


def test_the_sampler_section_chooses_levels_and_solver():
    few = setup()
    euler = setup(sampler__solver="euler", sampler__num_steps=7)
    unipc = setup(sampler__solver="unipc", sampler__guidance=2.5)

    assert few.levels.timestep[1] == 937.5
    assert (euler.solver, len(euler.levels)) == (Euler(), 7)
    assert (unipc.solver, unipc.copies) == (UniPC(), 2)
    assert few == dataclasses.replace(few)
    assert hash(few) == hash(setup())


def test_a_size_that_the_weights_were_not_trained_at_is_reported():
    bundle = bundles.load()
    assert describe_size_change(bundle) == ()

    other = dataclasses.replace(bundle, grid=LatentGrid(8, 8))
    (line,) = describe_size_change(other)
    assert line.startswith("size=64x64: the weights were trained at 32x32; ")

    trained = {**bundle.metadata, "training": {"size": "64x64"}}
    assert describe_size_change(dataclasses.replace(other, metadata=trained)) == ()
    ported = dataclasses.replace(other, trained_grid=None)
    assert describe_size_change(ported) == ()


def test_scripts_are_in_the_policys_blocks(tmp_path):
    (tmp_path / "p.txt").write_text("a[1s] | b[1s]\nc[5f]\n")

    inline = load_scripts(config())
    file = load_scripts(config(prompt_file=tmp_path / "p.txt"))
    teacher = load_scripts(config("wan_teacher", prompt="a[5f]"))

    assert [len(one.segments) for one in inline] == [3]
    assert inline[0].frames == 42
    assert [one.frames for one in file] == [9, 6]
    assert teacher[0].frames == 5


def test_relative_ropes_take_the_window_as_their_range():
    made = make_policy(config("longlive", rope="relative", window=9), TWO)

    assert made.positions == Relative(range=9)
    assert made.on_switch == Recache()


def test_the_shipped_config_has_exactly_the_fields_that_are_read():
    read = read_config(config())

    assert (read.policy, read.window, read.sampler.shift) == ("anchor_forcing", None, 5)
    assert make_setup(read, bundles.load(), TWO) == setup()


def test_steps_of_another_type_are_refused():
    read = read_config(config())
    sampler = dataclasses.replace(read.sampler, steps=("a", "b"))

    with pytest.raises(UserError, match="decreasing integers"):
        make_setup(dataclasses.replace(read, sampler=sampler), bundles.load(), TWO)


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_scripts_seed_must_fit(tmp_path, seed):
    (tmp_path / "p.jsonl").write_text(f'{{"prompts": ["a"], "seed": {seed}}}\n')

    with pytest.raises(UserError, match="p.jsonl, line 1: 'seed'"):
        load_scripts(config(prompt_file=tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("fields", "grid"),
    [
        ({}, "wan_unipc"),
        ({"solver": "unipc"}, "wan_unipc"),
        ({"solver": "dpmpp"}, "wan_dpmpp"),
        ({"solver": "euler"}, "even"),
        ({"solver": "euler", "grid": "diffusers_euler"}, "diffusers_euler"),
        ({"grid": "even"}, "even"),
    ],
)
def test_noise_levels_are_the_solvers_unless_named(fields, grid):
    given = open_config(**{f"sampler__{name}": one for name, one in fields.items()})

    made = resolve(given, {"method": "wan"})

    levels = make_setup(made, bundles.load(), ONE).levels
    assert made.sampler.grid == grid
    assert levels == flow.GRIDS[grid](50, 5.0)


@pytest.mark.parametrize("name", ["tiny", "interactive"])
def test_a_config_from_before_noise_levels_had_names_keeps_the_even_ones(name):
    given = load_config(name)
    with given.sampler.unlocked():
        del given.sampler["grid"]
    plain = {**given, "sampler": dict(given.sampler)}

    for config in (given, plain):
        made = resolve(read_config(config), {"method": "wan"}).sampler
        made = dataclasses.replace(made, solver="unipc", num_steps=50)
        assert noise_levels(made) == flow.even_levels(50, 5.0)


def test_the_kernel_is_the_one_that_is_named():
    assert setup().kernel is None
    assert setup(attention="heads").kernel == kernels.Heads()
    with pytest.raises(UserError, match="attention='flash'"):
        setup(attention="flash")


def test_noise_levels_that_a_solver_does_not_use_are_refused():
    config = load_config("tiny", ["--config.sampler.grid=wan_unipc"])

    with pytest.raises(
        UserError, match=r"sampler\.grid='wan_unipc': the solver renoise"
    ):
        noise_levels(read_config(config).sampler)

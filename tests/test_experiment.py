import dataclasses

import bundles
import pytest

from anchor_jax import experiment
from anchor_jax.cache.policies import (
    POLICIES,
    Flush,
    Keep,
    PeriodicJunction,
    Recache,
)
from anchor_jax.cache.positions import Absolute, Bounded, Relative
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script, Segment
from anchor_jax.streaming.loop import Euler, UniPC

ONE = Script((Segment("a", 0),), 6)
TWO = Script((Segment("a", 0), Segment("b", 3)), 6)


def config(policy="anchor_forcing", **fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return load_config(f"tiny:{policy}", overrides)


def setup(script=TWO, **fields):
    return experiment.make_setup(config(**fields), bundles.load(), script)


@pytest.mark.parametrize("name", POLICIES)
def test_a_name_gives_its_policy(name):
    assert experiment.make_policy(config(name), TWO) == POLICIES[name]


def test_parts_recombine_into_the_papers_ablations():
    def make(policy, **fields):
        return experiment.make_policy(config(policy, **fields), TWO)

    assert make("longlive", rope="bounded") == POLICIES["bounded_rope"]
    assert make("longlive", rope="tri_region") == POLICIES["tri_region_no_junction"]
    assert make("longlive", rope="relative") == POLICIES["longlive_relative"]
    assert make("anchor_forcing", on_switch="keep") == POLICIES["no_recache"]
    sink = make("anchor_forcing", on_switch="recache_sink")
    assert sink == POLICIES["no_global_sink"]
    assert make("longlive", on_switch="flush").on_switch == Flush()
    assert make("longlive", window=9).window == 9


def test_a_scene_cut_survives_another_rope():
    made = experiment.make_policy(config("infinity_rope", rope="bounded"), TWO)

    assert made.positions == Bounded(range=21, cut=45)


def test_rules_choose_the_released_form():
    def make(policy, script):
        return experiment.make_policy(config(policy, rules="release"), script)

    assert make("anchor_forcing", TWO) == POLICIES["anchor_forcing_release"]
    assert make("infinity_rope", TWO) == POLICIES["infinity_rope_release"]
    assert make("longlive", TWO) == POLICIES["longlive"]
    assert type(make("anchor_forcing", ONE).junction) is PeriodicJunction


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "long_live"}, "did you mean 'longlive'"),
        ({"rules": "official"}, "paper, release"),
        ({"rope": "absolute"}, "absolute RoPE with a junction makes no sense"),
        ({"rope": "spiral"}, "tri_region"),
        ({"on_switch": "forget"}, "recache_sink"),
        ({"sink": 6}, "sink=6 must lie between 0 and block=3"),
        ({"window": 30}, "window=30 must fit into the RoPE range"),
        ({"window": 20}, "leave no room"),
        ({"sampler__solver": "heun"}, "unipc"),
        ({"sampler__steps": "(250, 500)"}, "that fall"),
        ({"sampler__steps": "(1001,)"}, "at most 1000"),
        ({"sampler__shift": 0}, "more than 0"),
        ({"sampler__guidance": -1}, "0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(fields, message):
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
    with pytest.raises(UserError, match="window=12 cannot apply"):
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


def test_scripts_are_in_the_policys_blocks(tmp_path):
    (tmp_path / "p.txt").write_text("a[1s] | b[1s]\nc[5f]\n")

    inline = experiment.load_scripts(config())
    file = experiment.load_scripts(config(prompt_file=tmp_path / "p.txt"))
    teacher = experiment.load_scripts(config("wan_teacher", prompt="a[5f]"))

    assert [len(one.segments) for one in inline] == [3]
    assert inline[0].frames == 42
    assert [one.frames for one in file] == [9, 6]
    assert teacher[0].frames == 5


def test_a_negative_prompt_may_stand_in_a_file(tmp_path):
    (tmp_path / "n.txt").write_text("ugly,\n blurred\n")

    given = config(sampler__negative_prompt_file=tmp_path / "n.txt")

    assert experiment.negative_prompt(given) == "ugly, blurred"
    assert experiment.negative_prompt(config()) == ""
    missing = config(sampler__negative_prompt_file=tmp_path / "no.txt")
    with pytest.raises(UserError, match="negative_prompt_file"):
        experiment.negative_prompt(missing)


def test_relative_ropes_take_the_window_as_their_range():
    made = experiment.make_policy(config("longlive", rope="relative", window=9), TWO)

    assert made.positions == Relative(range=9)
    assert made.on_switch == Recache()

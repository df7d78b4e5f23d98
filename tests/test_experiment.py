import dataclasses

import bundles
import pytest

from anchor_jax import experiment, flow
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
from anchor_jax.porting import port
from anchor_jax.prompts import Script, Segment
from anchor_jax.streaming.loop import Euler, UniPC
from anchor_jax.training.stages.build import (
    DistillationConfig,
    RegressionConfig,
    SamplesConfig,
    TrainConfig,
)
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import GRIDS, LatentGrid

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
    for name in ("no_recache", "no_global_sink"):
        released = dataclasses.replace(POLICIES[name], junction=ReleaseJunction())
        assert make(name, TWO) == released
    for name in ("anchor_forcing_release", "infinity_rope_release", "causvid"):
        assert make(name, TWO) == POLICIES[name]


def test_a_rope_that_is_asked_for_stays_under_the_releases_rules():
    given = config("infinity_rope", rules="release", rope="relative")

    made = experiment.make_policy(given, TWO)

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
    made = experiment.make_policy(config(policy, window=9), TWO)

    assert (made.window, made.positions) == (9, positions)


@pytest.mark.parametrize("rope", ["relative", "ranked"])
def test_a_junction_needs_a_range_beyond_the_window(rope):
    with pytest.raises(UserError, match="choose rope=tri_region or rope=bounded"):
        experiment.make_policy(config(rope=rope), TWO)
    for other in ("tri_region", "bounded"):
        experiment.make_policy(config(rope=other), TWO)


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


def test_the_shipped_config_has_exactly_the_fields_that_are_read():
    read = experiment.read_config(config())

    assert (read.policy, read.window, read.sampler.shift) == ("anchor_forcing", None, 5)
    assert experiment.make_setup(read, bundles.load(), TWO) == setup()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rulez": "paper"}, ["unknown field 'rulez'", "did you mean 'rules'?"]),
        ({"sampler": {"stepz": 1}}, ["config.sampler", "did you mean 'steps'?"]),
        ({"window": "abc"}, ["config.window", "'abc'", "expected int"]),
        ({"frames": 30.0}, ["config.frames", "30.0", "expected int"]),
        ({"prompt_file": 123}, ["config.prompt_file", "123", "expected str"]),
        ({"rope": []}, ["config.rope", "expected str"]),
        ({"sampler": 3}, ["config.sampler", "expected SamplerConfig"]),
        ({"seed": -1}, ["config.seed=-1", "from 0 to 9223372036854775807"]),
        ({"seed": 2**63}, ["config.seed=9223372036854775808"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named(fields, parts):
    given = config().to_dict() | fields
    if isinstance(fields.get("sampler"), dict):
        given["sampler"] = config().sampler.to_dict() | fields["sampler"]

    with pytest.raises(UserError) as caught:
        experiment.read_config(given)

    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_missing_field_is_named():
    given = config().to_dict()
    del given["sampler"]["solver"]

    with pytest.raises(UserError, match="missing field 'solver'"):
        experiment.read_config(given)


def test_steps_of_another_type_are_refused():
    read = experiment.read_config(config())
    sampler = dataclasses.replace(read.sampler, steps=("a", "b"))

    with pytest.raises(UserError, match="decreasing integers"):
        experiment.make_setup(
            dataclasses.replace(read, sampler=sampler), bundles.load(), TWO
        )


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_scripts_seed_must_fit(tmp_path, seed):
    (tmp_path / "p.jsonl").write_text(f'{{"prompts": ["a"], "seed": {seed}}}\n')

    with pytest.raises(UserError, match="p.jsonl, line 1: 'seed'"):
        experiment.load_scripts(config(prompt_file=tmp_path / "p.jsonl"))


def open_config(**fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return experiment.read_config(load_config("interactive", overrides))


@pytest.mark.parametrize("method", experiment.METHODS)
def test_a_method_decides_all_that_is_open(method):
    made = experiment.resolve(open_config(), {"method": method})

    assert made.rules == "release"
    assert made.policy in (*POLICIES, experiment.TEACHER)
    assert made.sampler.negative_prompt_file is None
    rest = dataclasses.asdict(made.sampler)
    assert [name for name, value in rest.items() if value is None] == [
        "negative_prompt_file"
    ]


def test_causvids_steps_are_timesteps_themselves():
    made = experiment.resolve(open_config(), {"method": "causvid"})

    built = experiment.make_setup(made, bundles.load(), TWO)

    assert built.levels.timestep == (1000.0, 757.0, 522.0)
    assert (built.guidance, built.policy) == (1.0, POLICIES["causvid"])


def test_the_published_teacher_is_guided():
    made = experiment.resolve(open_config(), {"method": "wan"})

    built = experiment.make_setup(made, bundles.load(), ONE)

    assert (built.solver, built.copies, built.guidance) == (UniPC(), 2, 5.0)
    assert built.levels == flow.wan_unipc_levels(50, 5.0)
    assert built.levels.timestep[:2] == (999.0, 995.0)
    assert experiment.negative_prompt(made) == experiment.WAN_NEGATIVE_PROMPT


def test_the_published_teachers_sampler_is_told_with_what_its_makers_recommend():
    given = open_config(sampler__shift=8.0)
    metadata = {"method": "wan"}

    told = experiment.told_choices(given, experiment.resolve(given, metadata), metadata)

    assert told[1] == (
        "solver: unipc, 50 steps, noise levels wan_unipc, shift 8, guidance 5"
    )
    assert "1.3B model at 480x832" in told[2] and "shift from 8 to 12" in told[2]
    assert "sampler.guidance=6" in told[2]


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

    made = experiment.resolve(given, {"method": "wan"})

    levels = experiment.make_setup(made, bundles.load(), ONE).levels
    assert made.sampler.grid == grid
    assert levels == flow.GRIDS[grid](50, 5.0)


@pytest.mark.parametrize("name", ["tiny", "interactive"])
def test_a_config_from_before_noise_levels_had_names_keeps_the_even_ones(name):
    given = load_config(name)
    with given.sampler.unlocked():
        del given.sampler["grid"]
    plain = {**given, "sampler": dict(given.sampler)}

    for config in (given, plain):
        made = experiment.resolve(
            experiment.read_config(config), {"method": "wan"}
        ).sampler
        made = dataclasses.replace(made, solver="unipc", num_steps=50)
        assert experiment.noise_levels(made) == flow.even_levels(50, 5.0)


def test_what_a_config_gives_wins_over_the_method():
    given = open_config(rules="paper", sampler__negative_prompt="", sampler__shift=3.0)

    made = experiment.resolve(given, {"method": "wan"})

    assert (made.rules, made.policy) == ("paper", experiment.TEACHER)
    assert (made.sampler.shift, made.sampler.negative_prompt) == (3.0, "")


def test_weights_that_name_no_method_are_sampled_as_the_tiny_world():
    made = experiment.resolve(open_config(), {"seed": 0})
    shipped = experiment.read_config(config())

    assert (made.policy, made.rules) == (shipped.policy, shipped.rules)
    assert made.sampler == shipped.sampler


def training(stage="distillation", rules="paper", samples=None, **regression):
    config = TrainConfig(
        stage=stage,
        rules=rules,
        distillation=DistillationConfig("tri_region_no_junction", steps=(1000, 500)),
        regression=RegressionConfig(**regression),
        samples=samples or SamplesConfig(steps=8, guidance=2.0),
    )
    return dataclasses.asdict(config)


@pytest.mark.parametrize("base", ["longlive", "wan", None])
def test_distilled_weights_are_sampled_as_they_were_trained(base):
    metadata = {"method": base, "training": training(rules="release")}

    made = experiment.resolve(open_config(), metadata)

    assert (made.policy, made.rules) == ("tri_region_no_junction", "release")
    assert (made.sampler.solver, made.sampler.steps) == ("renoise", (1000, 500))
    assert (made.sampler.shift, made.sampler.guidance) == (5.0, 1.0)
    (line,) = experiment.told_choices(open_config(), made, metadata)
    assert line.endswith("(as the weights were trained)")


def test_trained_weights_that_are_sampled_otherwise_are_warned_of():
    def told(**fields):
        given = experiment.read_config(config(**fields))
        metadata = {"training": training()}
        made = experiment.resolve(given, metadata)
        return experiment.told_choices(given, made, metadata)

    first, warning = told()
    assert first.endswith("policy: anchor_forcing (as the config says)")
    assert "policy tri_region_no_junction, not anchor_forcing; steps (1000, 500)" in (
        warning
    )
    (_, warning) = told(policy="tri_region_no_junction")
    assert "trained for steps (1000, 500), not (1000, 750, 500, 250);" in warning


def test_regressed_weights_are_sampled_as_their_network_is_used():
    def made(base=None, **fields):
        metadata = {"method": base, "training": training("regression", **fields)}
        return experiment.resolve(open_config(), metadata)

    teacher, tuned = made(shift=3.0), made("wan")
    causal, endpoints = made(forcing="teacher"), made(forcing="noise", endpoints=True)
    shown = made(forcing="teacher", samples=SamplesConfig(policy="longlive"))

    assert teacher.policy == tuned.policy == "wan_teacher"
    assert (teacher.sampler.solver, teacher.sampler.num_steps) == ("euler", 8)
    assert (teacher.sampler.shift, teacher.sampler.guidance) == (3.0, 2.0)
    assert tuned.sampler == experiment.resolve(open_config(), {"method": "wan"}).sampler
    assert (teacher.sampler.grid, tuned.sampler.grid) == ("even", "wan_unipc")
    assert (causal.policy, causal.sampler.solver) == ("tri_region_no_junction", "euler")
    assert (endpoints.sampler.solver, endpoints.sampler.guidance) == ("renoise", 1.0)
    assert shown.policy == causal.policy  # What videos of the training show is apart.


def test_trainings_from_before_noise_levels_had_names_keep_the_even_ones():
    def grid(base, **samples):
        stored = training("regression")
        stored["samples"] = {**stored["samples"], **samples}
        if not samples:
            del stored["samples"]["grid"]
        metadata = {"method": base, "training": stored}
        return experiment.resolve(open_config(), metadata).sampler.grid

    assert (grid("wan"), grid(None)) == ("even", "even")
    assert grid(None, grid="diffusers_euler") == "diffusers_euler"
    assert grid("wan", grid="diffusers_euler") == "wan_unipc"


@pytest.mark.parametrize("wrong", [{}, {"stage": "distillation"}, [], "x"])
def test_a_training_that_cannot_be_read_matters_only_where_it_decides(wrong):
    shipped = experiment.read_config(config())

    assert experiment.resolve(shipped, {"training": wrong}) == shipped
    assert len(experiment.told_choices(shipped, shipped, {"training": wrong})) == 1
    with pytest.raises(
        UserError, match="config of the weights' training cannot be read"
    ):
        experiment.resolve(open_config(), {"training": wrong})


@pytest.mark.parametrize("method", ["anchorforcing", 3, ["wan"]])
def test_an_unknown_method_matters_only_where_it_decides(method):
    shipped = experiment.read_config(config())

    assert experiment.resolve(shipped, {"method": method}) == shipped
    with pytest.raises(UserError, match="ported as .* methods: anchor_forcing"):
        experiment.resolve(open_config(), {"method": method})


def test_sizes_are_in_pixels():
    for size, grid in GRIDS.items():
        assert experiment.parse_size(size) == grid
    assert experiment.parse_size("16x4096") == LatentGrid(2, 512)


@pytest.mark.parametrize("size", ["480", "480x", "x832", "0x16", "12x16", "16x4112"])
def test_a_wrong_size_says_which_are_right(size):
    with pytest.raises(UserError, match="must be HEIGHTxWIDTH.*480x832"):
        experiment.parse_size(size)


def test_the_kernel_is_the_one_that_is_named():
    assert setup().kernel is None
    assert setup(attention="heads").kernel == kernels.Heads()
    with pytest.raises(UserError, match="attention='flash'"):
        setup(attention="flash")


def test_what_was_chosen_is_told():
    def told(metadata, **fields):
        given = open_config(**fields)
        made = experiment.resolve(given, metadata)
        return experiment.told_choices(given, made, metadata)

    line, note = told({"method": "memflow"})
    assert line == "rules: release, policy: longlive (weights were ported as memflow)"
    assert "memory bank is not supported" in note
    assert len(told({"method": "memflow"}, policy="anchor_forcing")) == 1
    (line,) = told({}, policy="longlive", rules="paper")
    assert line.endswith("(as the config says; weights were not ported)")


def test_methods_are_those_that_weights_are_ported_as():
    assert set(experiment.METHODS) == set(port.METHODS)


def test_noise_levels_that_a_solver_does_not_use_are_refused():
    config = load_config("tiny", ["--config.sampler.grid=wan_unipc"])

    with pytest.raises(
        UserError, match=r"sampler\.grid='wan_unipc': the solver renoise"
    ):
        experiment.noise_levels(experiment.read_config(config).sampler)

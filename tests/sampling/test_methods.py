import dataclasses
import re

import bundles
import pytest

from anchor_jax import flow
from anchor_jax.cache.catalog import TEACHER
from anchor_jax.cache.policies import (
    POLICIES,
)
from anchor_jax.cli import main
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.porting import port
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling import methods
from anchor_jax.sampling.config import (
    WAN_NEGATIVE_PROMPT,
    negative_prompt,
    read_config,
)
from anchor_jax.sampling.resolve import (
    describe_choices,
    make_setup,
    resolve,
)
from anchor_jax.streaming.loop import UniPC
from anchor_jax.training.stages.build import SamplesConfig, TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig

ONE = Script((Segment("a", 0),), 6)
TWO = Script((Segment("a", 0), Segment("b", 3)), 6)


def config(policy="anchor_forcing", **fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return load_config(f"tiny:{policy}", overrides)


def open_config(**fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return read_config(load_config("interactive", overrides))


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_decides_all_that_is_open(method):
    made = resolve(open_config(), {"method": method})

    assert made.rules == "release"
    assert made.policy in (*POLICIES, TEACHER)
    assert made.sampler.negative_prompt_file is None
    rest = dataclasses.asdict(made.sampler)
    assert [name for name, value in rest.items() if value is None] == [
        "negative_prompt_file"
    ]


def test_causvids_steps_are_timesteps_themselves():
    made = resolve(open_config(), {"method": "causvid"})

    built = make_setup(made, bundles.load(), TWO)

    assert built.levels.timestep == (1000.0, 757.0, 522.0)
    assert (built.guidance, built.policy) == (1.0, POLICIES["causvid"])


def test_the_published_teacher_is_guided():
    made = resolve(open_config(), {"method": "wan"})

    built = make_setup(made, bundles.load(), ONE)

    assert (built.solver, built.copies, built.guidance) == (UniPC(), 2, 5.0)
    assert built.levels == flow.wan_unipc_levels(50, 5.0)
    assert built.levels.timestep[:2] == (999.0, 995.0)
    assert negative_prompt(made) == WAN_NEGATIVE_PROMPT


def test_the_published_teachers_sampler_is_printed_with_its_makers_advice():
    given = open_config(sampler__shift=8.0)
    metadata = {"method": "wan"}

    printed = describe_choices(given, resolve(given, metadata), metadata)

    assert printed[1] == (
        "solver: unipc, 50 steps, noise levels wan_unipc, shift 8, guidance 5"
    )
    assert "1.3B model at 480x832" in printed[2] and "shift from 8 to 12" in printed[2]
    assert "sampler.guidance=6" in printed[2]


def test_what_a_config_gives_wins_over_the_method():
    given = open_config(rules="paper", sampler__negative_prompt="", sampler__shift=3.0)

    made = resolve(given, {"method": "wan"})

    assert (made.rules, made.policy) == ("paper", TEACHER)
    assert (made.sampler.shift, made.sampler.negative_prompt) == (3.0, "")


def test_weights_that_name_no_method_are_sampled_as_the_tiny_world():
    made = resolve(open_config(), {"seed": 0})
    shipped = read_config(config())

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

    made = resolve(open_config(), metadata)

    assert (made.policy, made.rules) == ("tri_region_no_junction", "release")
    assert (made.sampler.solver, made.sampler.steps) == ("renoise", (1000, 500))
    assert (made.sampler.shift, made.sampler.guidance) == (5.0, 1.0)
    (line,) = describe_choices(open_config(), made, metadata)
    assert line.endswith("(as the weights were trained)")


def test_a_warning_names_settings_that_differ_from_the_training():
    def printed(**fields):
        given = read_config(config(**fields))
        metadata = {"training": training()}
        made = resolve(given, metadata)
        return describe_choices(given, made, metadata)

    first, warning = printed()
    assert first.endswith("policy: anchor_forcing (as the config says)")
    assert "policy tri_region_no_junction, not anchor_forcing; steps (1000, 500)" in (
        warning
    )
    (_, warning) = printed(policy="tri_region_no_junction")
    assert "trained for steps (1000, 500), not (1000, 750, 500, 250);" in warning
    first, warning = printed(policy="tri_region_no_junction", rope="bounded", window=9)
    assert "tri_region_no_junction with window=9, rope=bounded (as" in first
    assert "tri_region_no_junction unchanged, not with window=9, rope=bo" in warning


def test_regressed_weights_are_sampled_as_their_network_is_used():
    def made(base=None, **fields):
        metadata = {"method": base, "training": training("regression", **fields)}
        return resolve(open_config(), metadata)

    teacher, tuned = made(shift=3.0), made("wan")
    causal, endpoints = made(forcing="teacher"), made(forcing="noise", endpoints=True)
    shown = made(forcing="teacher", samples=SamplesConfig(policy="longlive"))

    assert teacher.policy == tuned.policy == "wan_teacher"
    assert (teacher.sampler.solver, teacher.sampler.num_steps) == ("euler", 8)
    assert (teacher.sampler.shift, teacher.sampler.guidance) == (3.0, 2.0)
    assert tuned.sampler == resolve(open_config(), {"method": "wan"}).sampler
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
        return resolve(open_config(), metadata).sampler.grid

    assert (grid("wan"), grid(None)) == ("even", "even")
    assert grid(None, grid="diffusers_euler") == "diffusers_euler"
    assert grid("wan", grid="diffusers_euler") == "wan_unipc"


@pytest.mark.parametrize("wrong", [{}, {"stage": "distillation"}, [], "x"])
def test_a_training_that_cannot_be_read_matters_only_where_it_decides(wrong):
    shipped = read_config(config())

    assert resolve(shipped, {"training": wrong}) == shipped
    assert len(describe_choices(shipped, shipped, {"training": wrong})) == 1
    with pytest.raises(
        UserError, match="config of the weights' training cannot be read"
    ):
        resolve(open_config(), {"training": wrong})


@pytest.mark.parametrize("method", ["anchorforcing", 3, ["wan"]])
def test_an_unknown_method_matters_only_where_it_decides(method):
    shipped = read_config(config())

    assert resolve(shipped, {"method": method}) == shipped
    with pytest.raises(UserError, match="ported as .* methods: anchor_forcing"):
        resolve(open_config(), {"method": method})


def test_chosen_settings_are_printed():
    def printed(metadata, **fields):
        given = open_config(**fields)
        made = resolve(given, metadata)
        return describe_choices(given, made, metadata)

    line, note = printed({"method": "memflow"})
    assert line == "rules: release, policy: longlive (weights were ported as memflow)"
    assert "memory bank is not supported" in note
    assert len(printed({"method": "memflow"}, policy="anchor_forcing")) == 1
    (line,) = printed({}, policy="longlive", rules="paper")
    assert line.endswith("(as the config says; weights were not ported)")


def test_methods_are_those_that_weights_are_ported_as():
    with pytest.raises(UserError, match=f"methods: {', '.join(methods.METHODS)}"):
        port.plan(wan="nowhere", method="nothing")


def test_the_help_of_port_names_every_method(capsys):
    assert main.main(["port", "--help"]) == 0

    shown = " ".join(capsys.readouterr().out.split())
    listed = shown.partition("How the generator was trained: ")[2].partition(".")[0]
    assert set(re.findall(r"\w+", listed)) - {"or"} == set(methods.METHODS)

import pytest

from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.sampling.config import (
    negative_prompt,
    read_config,
)


def config(policy="anchor_forcing", **fields):
    overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
    return load_config(f"tiny:{policy}", overrides)


def test_a_negative_prompt_may_stand_in_a_file(tmp_path):
    (tmp_path / "n.txt").write_text("ugly,\n blurred\n")

    given = config(sampler__negative_prompt_file=tmp_path / "n.txt")

    assert negative_prompt(given) == "ugly, blurred"
    assert negative_prompt(config()) == ""
    missing = config(sampler__negative_prompt_file=tmp_path / "no.txt")
    with pytest.raises(UserError, match="negative_prompt_file"):
        negative_prompt(missing)


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
        ({"enlarge": 0}, ["config.enlarge=0", "from 1 (as made) to 16"]),
        ({"seed": 2**63}, ["config.seed=9223372036854775808"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named(fields, parts):
    given = config().to_dict() | fields
    if isinstance(fields.get("sampler"), dict):
        given["sampler"] = config().sampler.to_dict() | fields["sampler"]

    with pytest.raises(UserError) as caught:
        read_config(given)

    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_config_from_before_videos_were_enlarged_is_read():
    given = config().to_dict()
    del given["enlarge"]

    assert read_config(given).enlarge is None


def test_a_missing_field_is_named():
    given = config().to_dict()
    del given["sampler"]["solver"]

    with pytest.raises(UserError, match="missing field 'solver'"):
        read_config(given)

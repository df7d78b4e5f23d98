import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from anchor_jax import config
from anchor_jax.errors import UserError
from anchor_jax.training.stages.build import TrainConfig

CONFIG = """
from ml_collections import ConfigDict, config_dict


def get_config(policy: str = "anchor_forcing"):
    if policy == "wrong":
        raise ValueError("no such policy")
    config = ConfigDict()
    config.policy = policy
    config.seed = 0
    config.rate = 0.5
    config.clip = True
    config.switch_frames = (40, 80)
    config.rates = (0.5, 1.5)
    config.limit = None
    config.frames = config_dict.placeholder(int)
    config.sampler = ConfigDict({"steps": 4})
    return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "tiny.py").write_text(CONFIG)
    monkeypatch.setattr(config, "shipped_configs_dir", lambda: folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def message(*arguments):
    with pytest.raises(UserError) as caught:
        config.load_config(*arguments)
    return str(caught.value)


def test_a_config_takes_the_argument_after_the_colon(file):
    assert config.load_config("mine.py").policy == "anchor_forcing"
    assert config.load_config("mine.py:long_live").policy == "long_live"


def test_a_config_is_locked(file):
    with pytest.raises(AttributeError):
        config.load_config("mine.py").polcy = "x"


@pytest.mark.parametrize(
    "override, field, value",
    [
        ("--config.seed=3", "seed", 3),
        ("-config.seed=3", "seed", 3),
        ("--config.rate=1", "rate", 1.0),
        ("--config.policy=7", "policy", "7"),
        ("--config.policy=a=b", "policy", "a=b"),
        ("--config.clip=false", "clip", False),
        ("--noconfig.clip", "clip", False),
        ("--config.clip", "clip", True),
        ("--config.switch_frames=(3,6,9)", "switch_frames", (3, 6, 9)),
        ("--config.rates=(1,0.5)", "rates", (1, 0.5)),
        ("--config.limit=5", "limit", 5),
        ("--config.frames=21", "frames", 21),
        ("--config.sampler.steps=2", "sampler.steps", 2),
    ],
)
def test_an_override_is_parsed_as_the_field_s_type(file, override, field, value):
    loaded = config.load_config("mine.py", [override])

    for name in field.split("."):
        loaded = loaded[name]
    assert loaded == value and type(loaded) is type(value)


def test_a_name_may_be_that_of_a_field_in_a_section_or_its_initials():
    loaded = config.load_config("train_teacher")

    for name, meant in {
        "learning_rate": "'optimizer.learning_rate' or 'critic_optimizer.learning",
        "lr": "'optimizer.learning_rate' or",
        "optimizer.lr": "'learning_rate'[?] fields: betas",
    }.items():
        with pytest.raises(UserError, match=f"did you mean {meant}"):
            config.load_config("train_teacher", [f"--config.{name}=1"])
    assert {"seed", "optimizer.learning_rate"} <= set(config.paths(loaded))
    assert "optimizer" not in set(config.paths(loaded))


def test_the_last_override_of_a_field_wins(file):
    loaded = config.load_config("mine.py", ["--config.seed=1", "--config.seed=2"])
    assert loaded.seed == 2


@pytest.mark.parametrize(
    "override, parts",
    [
        (
            "--config.polcy=a",
            ["unknown field 'polcy' in config", "did you mean 'policy'?", "fields: "],
        ),
        (
            "--config.sampler.stps=1",
            ["unknown field 'stps' in config.sampler", "did you mean 'steps'?"],
        ),
        (
            "--config.steps=1",
            ["unknown field 'steps' in config; did you mean 'sampler.steps'? fields:"],
        ),
        ("--config.seed.a=1", ["config.seed is a value, not a section"]),
        ("--config.sampler=1", ["config.sampler is a section", "steps"]),
        (
            "--config.seed=abc",
            ["config.seed", "'abc'", "expected int", "current value is 0"],
        ),
        ("--config.seed=1.5", ["config.seed", "'1.5'", "expected int"]),
        ("--config.rate=fast", ["config.rate", "'fast'", "expected float"]),
        ("--config.clip=3", ["config.clip", "'3'", "expected bool"]),
        ("--config.frames=x", ["config.frames", "'x'", "expected int"]),
        ("--config.switch_frames=(a,)", ["config.switch_frames", "tuple of int"]),
        ("--config.switch_frames=(1.5,)", ["config.switch_frames", "tuple of int"]),
        ("--config.seed", ["--config.seed has no value", "--config.seed=VALUE"]),
        ("seed=1", ["'seed=1'", "--config.FIELD=VALUE"]),
    ],
)
def test_a_wrong_override_is_refused_with_the_remedy(file, override, parts):
    text = message("mine.py", [override])
    assert [part for part in parts if part not in text] == [], text


def test_overrides_are_split_from_other_arguments():
    argv = [
        "--config=a.py",
        "--config.a.b=1",
        "--noconfig.c",
        "x",
        "--",
        "--config.d=2",
    ]

    overrides, others = config.split_overrides(argv)

    assert overrides == ["--config.a.b=1", "--noconfig.c"]
    assert others == ["--config=a.py", "x", "--", "--config.d=2"]


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "configs/tiny.py", "tiny:wan"])
def test_a_shipped_config_is_found_from_any_folder(shipped, name):
    assert config.load_config(name).seed == 0


def test_a_file_here_goes_before_a_shipped_one(shipped):
    text = CONFIG.replace("config.seed = 0", "config.seed = 9")
    pathlib.Path("tiny.py").write_text(text)

    assert config.load_config("tiny.py").seed == 9
    assert config.load_config("tiny").seed == 0


@pytest.mark.parametrize("name", ["configs/tinny.py", "tinny", "tinny.py"])
def test_a_missing_config_says_where_shipped_ones_are(shipped, name):
    text = message(name)
    assert f"config '{name}'" in text
    assert "did you mean 'tiny'?" in text
    assert str(shipped) in text


def test_a_path_elsewhere_is_not_taken_for_a_shipped_config(shipped):
    assert "neither an existing Python file nor" in message("/nowhere/tiny.py")


def test_shipped_configs_are_beside_the_package_or_in_it(tmp_path, monkeypatch):
    package = tmp_path / "anchor_jax"
    package.mkdir()
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))

    assert config.shipped_configs_dir() == tmp_path / "configs"
    (package / "configs").mkdir()
    assert config.shipped_configs_dir() == package / "configs"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("def get_config(:\n", ["mine.py, line 1", "invalid syntax"]),
        ("x = 1\ny = 1 / 0\n", ["mine.py, line 2", "ZeroDivisionError"]),
        ("import nosuchmodule\n", ["mine.py, line 1", "nosuchmodule"]),
        ("x = 1\n", ["no function get_config()"]),
        ("def get_config():\n    return {}\n", ["returned dict", "ConfigDict"]),
    ],
)
def test_a_faulty_config_file_is_named_with_its_line(file, text, parts):
    file.write_text(text)
    got = message("mine.py")
    assert [part for part in parts if part not in got] == [], got


def test_a_config_that_refuses_its_argument_is_quoted(file):
    assert "no such policy" in message("mine.py:wrong")


def test_an_argument_that_a_config_does_not_take_is_refused(file):
    file.write_text("def get_config():\n    return None\n")
    assert "takes no argument" in message("mine.py:long")
    file.write_text("def get_config(size):\n    return None\n")
    assert "needs an argument" in message("mine.py")


def test_loading_leaves_no_bytecode_beside_the_config(file):
    config.load_config("mine.py")
    assert [path.name for path in file.parent.iterdir()] == ["mine.py"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    steps: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    frames: tuple[int, ...]
    seed: int | None
    sampler: Sampler

    def __post_init__(self):
        if not self.name:
            raise ValueError("name is empty")


GOOD = {"name": "a", "frames": [1, 2], "seed": None, "sampler": {"steps": 4, "rate": 1}}


def test_a_dataclass_is_built_with_nested_ones_and_can_be_hashed():
    built = config.from_config(Job, config.ConfigDict(GOOD))

    assert built == Job("a", (1, 2), None, Sampler(4, 1.0))
    assert type(built.sampler.rate) is float
    hash(built)


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"nam": "b"}, ["Job", "unknown field 'nam'", "did you mean 'name'?"]),
        ({"name": 3}, ["Job.name", "got 3 of type int", "expected str"]),
        ({"name": ""}, ["Job: name is empty"]),
        ({"frames": "1"}, ["Job.frames", "expected tuple"]),
        ({"seed": "1"}, ["Job.seed", "expected int"]),
        ({"seed": True}, ["Job.seed", "expected int"]),
        ({"sampler": {"steps": 4}}, ["Job.sampler", "missing field 'rate'"]),
        ({"sampler": {"steps": 4, "rate": "x"}}, ["Job.sampler.rate", "float"]),
    ],
)
def test_a_section_that_does_not_fit_is_refused(change, parts):
    with pytest.raises(UserError) as caught:
        config.from_config(Job, {**GOOD, **change})
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_config_of_another_command_is_named_in_a_line():
    with pytest.raises(UserError) as caught:
        config.from_config(TrainConfig, config.load_config("tiny"), "config")

    text = str(caught.value)
    assert text.startswith("config: this is a config for anchor-jax sample, not for")
    assert len(text) < 200


def test_missing_and_unknown_fields_are_listed_together():
    with pytest.raises(UserError, match="missing field 'steps', unknown field 'stepz'"):
        config.from_config(Sampler, {"stepz": 1, "rate": 2.0})


def test_every_shipped_config_loads():
    for name in config.shipped_configs():
        assert config.load_config(name).is_locked


@pytest.mark.slow
def test_configs_import_only_from_this_package_and_what_it_installs():
    code = "from anchor_jax import config\nfor name in config.shipped_configs():\n"
    code += "    config.load_config(name)\nprint('fine')\n"
    root = str(pathlib.Path(config.__file__).parents[1])
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys\nsys.path.append({root!r})\n{code}",
    ]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train_dmd:tinny", "unknown argument 'tinny' after the colon; did you mean"),
        ("train_ode:x", "arguments: paper, tiny"),
        ("train_causal:guide", "did you mean 'guided'"),
        ("trajectories:huge", "arguments: tiny, paper"),
        ("train_teacher:7", "must be 6, 21 or another multiple of 3"),
        ("bench_full:1x1", "sizes: 480x832"),
    ],
)
def test_an_argument_that_a_config_does_not_know_is_refused(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config.load_config(spec)

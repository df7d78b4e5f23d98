import os
import pathlib
import subprocess
import sys
import warnings

import pytest
from absl import flags

import anchor_jax
from anchor_jax import cli
from anchor_jax.cli import help_texts, main
from anchor_jax.wan.tokenizer import CutWarning

ROOT = pathlib.Path(anchor_jax.__file__).parents[1]
FAKE = '''
import decimal  # stands for something slow
from absl import flags
from anchor_jax import config
from anchor_jax.errors import UserError

SUMMARY = "Writes a fake video."
USAGE = """
anchor-jax sample --config=mine.py
    --prompt="a red ball"
"""


def define_flags():
    config.define_config_flag()
    flags.DEFINE_string("prompt", "a ball", "What to show.")
    flags.DEFINE_bool("fast", False, "Whether to hurry.")
    flags.DEFINE_integer("count", 1, "How many.")


def main(argv):
    FLAGS = flags.FLAGS
    if FLAGS.prompt == "interrupt":
        raise KeyboardInterrupt
    if FLAGS.prompt == "mistake":
        raise UserError("prompt: got 'mistake'; write another")
    if FLAGS.prompt == "bug":
        raise RuntimeError("bug")
    if FLAGS.prompt == "library":
        flags.DEFINE_integer("of_a_library", 1, "Defined by an import meanwhile.")
    print("RAN", argv[0], FLAGS.prompt, FLAGS.count, FLAGS.config.seed)
    return 3 if FLAGS.prompt == "three" else None
'''
CONFIG = """
from ml_collections import ConfigDict


def get_config(size="small"):
    return ConfigDict({"seed": 0, "size": size})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_sample.py").write_text(FAKE)
    (tmp_path / "mine.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "sample", "fake_sample")
    monkeypatch.setitem(cli.COMMANDS, "absent", "anchor_jax.cli.no_such_module")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("fake_sample", None)


@pytest.fixture
def say(fake, capsys):
    def run(*argv):
        status = main.main(argv)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_command_gets_its_flags_and_config(say):
    status, out, err = say("sample", "--config=mine.py", "--count=2", "--prompt", "x y")
    assert (status, out, err) == (0, "RAN anchor-jax sample x y 2 0\n", "")


def test_overrides_reach_the_config_wherever_they_stand(say):
    out = say("sample", "--config.seed=5", "--config", "mine.py:big")[1]
    assert out.endswith(" 1 5\n")


@pytest.mark.parametrize(
    "argv", [["--seed=5"], ["--seed", "5"], ["-seed=5"], ["--seed=4", "--seed=5"]]
)
def test_a_field_of_the_config_has_a_short_spelling(say, argv):
    status, out, err = say("sample", *argv, "--config=mine.py", "--prompt=x")
    assert (status, err) == (0, "") and out.endswith(" x 1 5\n")


def test_a_flag_of_the_command_is_not_a_field(say):
    """The fake command has a flag --prompt, and the shipped config such a field."""
    out = say("sample", "--config=tiny", "--prompt=x", "--sampler.shift=3")[1]
    assert out == "RAN anchor-jax sample x 1 0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=x"], "config.seed: got 'x', expected int"),
        (["--sampler=1"], "unknown flag --sampler;"),
        (["--nothing=1"], "unknown flag --nothing; set a config field"),
        (["--sed=1"], "unknown flag --sed; did you mean '--seed'?"),
        (["--np=3"], "unknown flag --np; did you mean '--sampler.negative_prompt'?"),
    ],
)
def test_a_short_spelling_is_checked_like_a_long_one(say, argv, message):
    status, _, err = say("sample", "--config=tiny", *argv)
    assert status == 2 and message in err


def test_initials_suggest_the_shortest_field(say):
    status, _, err = say("train", "--config=train_dmd:tiny", "--lr=1e-4")
    assert status == 2 and "did you mean '--optimizer.learning_rate'?" in err


def test_a_missing_package_in_a_config_is_named_with_its_extra(
    say, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    (tmp_path / "mine.py").write_text("import tensorflow_datasets")
    status, _, err = say("sample", "--config=mine.py")
    assert (status, "anchor_jax[train]" in err) == (2, True)


def test_a_command_can_run_twice_in_one_process(say):
    before = set(flags.FLAGS)
    say("sample", "--config=mine.py", "--count=9", "--config.seed=9")
    assert say("sample", "--config=mine.py")[1] == "RAN anchor-jax sample a ball 1 0\n"
    assert set(flags.FLAGS) == before


def test_a_command_s_status_is_returned(say):
    assert say("sample", "--config=mine.py", "--prompt=three")[0] == 3


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["smaple"], ["unknown command 'smaple'", "did you mean 'sample'?"]),
        (["help", "smaple"], ["unknown command 'smaple'"]),
        (["absent"], ["unknown command 'absent'"]),
        (["--config=a"], ["unknown command '--config=a'"]),
        (["sample", "--promt=x"], ["--promt", "prompt", "anchor-jax sample --help"]),
        (["sample", "--config=mine.py", "--count=x"], ["--count=x", "--help"]),
        (["sample"], ["--config is missing"]),
        (["sample", "--config=tinny"], ["config 'tinny'", "shipped configs, in"]),
        (
            ["sample", "--config=mine.py", "--config.sed=1"],
            ["unknown field 'sed'", "did you mean 'seed'?", "fields: seed, size"],
        ),
        (["sample", "--config=mine.py", "--config.seed=x"], ["config.seed", "int"]),
        (["sample", "--config=mine.py", "a ball"], ["but got 'a ball'"]),
        (["sample", "--config=mine.py", "--prompt=mistake"], ["write another"]),
        (["x" * 20_000], ["unknown command", "(20000 characters)"]),
        (["sample", "--config=" + "x" * 20_000], ["config", "(20000 characters)"]),
        (["sample", "--config=mine.py", "x" * 20_000], ["(20000 characters)"]),
        (
            ["sample", "--config=mine.py", "--config.seed=" + "9" * 20_000],
            ["expected int"],
        ),
        (
            ["sample", "--config=mine.py", f"--config.{'x' * 20_000}=1"],
            ["unknown field"],
        ),
        (["sample", "--config=mine.py", f"--{'x' * 20_000}=1"], ["--help"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_one_message_and_status_2(say, argv, parts):
    status, out, err = say(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and "Traceback" not in err
    assert [part for part in parts if part not in err] == [], err
    assert len(err) < 1200 and err.count("\n") <= 12


def test_an_interrupt_is_130(say):
    status, _, err = say("sample", "--config=mine.py", "--prompt=interrupt")
    assert (status, err) == (130, "interrupted\n")


def test_a_bug_is_not_hidden(say):
    with pytest.raises(RuntimeError, match="bug"):
        say("sample", "--config=mine.py", "--prompt=bug")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands_that_there_are(say, argv):
    status, out, _ = say(*argv)
    assert status == 0
    assert "sample" in out and "Writes a fake video." in out
    assert "absent" not in out
    assert out.index("anchor-jax sample --config") < out.index("Commands:")
    assert "fake_sample" not in sys.modules


@pytest.mark.parametrize("argv", [["sample", "--help"], ["help", "sample"]])
def test_a_command_s_help_shows_examples_first_and_only_its_flags(say, argv):
    status, out, _ = say(*argv)
    assert status == 0
    assert out.index('--prompt="a red ball"') < out.index("--prompt=VALUE")
    assert "What to show. (default: 'a ball')" in out
    assert "--[no]fast" in out and "--config.FIELD=VALUE" in out
    assert "flagfile" not in out and "--helpfull" not in out and "pdb" not in out
    assert max(map(len, out.splitlines())) <= 88


def test_help_needs_no_jax_and_no_config_library():
    code = (
        "import sys; from anchor_jax.cli.main import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('jax', 'ml_collections', 'av')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_package_runs_as_a_module_from_any_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "anchor_jax", "--version"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(f"anchor-jax {anchor_jax.__version__} (jax ")
    command[-1] = "nonsense"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_reader_that_stops_early_gives_no_traceback(tmp_path):
    command = f"{sys.executable} -m anchor_jax --help | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        command,
        shell=True,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_a_shipped_command_keeps_the_contract(name, capsys):
    assert help_texts.string_in(cli.COMMANDS[name], "SUMMARY")
    assert main.main([name, "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out


def test_flags_of_a_command_go_with_it_and_those_of_libraries_stay(say):
    before = set(flags.FLAGS)

    assert say("sample", "--config=mine.py", "--prompt=library")[0] == 0

    assert set(flags.FLAGS) - before == {"of_a_library"}
    delattr(flags.FLAGS, "of_a_library")


def test_warnings_of_the_package_read_as_those_of_a_command(capsys):
    with main._plain_warnings():
        warnings.warn("a prompt is cut", CutWarning, stacklevel=1)

    assert capsys.readouterr().err == "warning: a prompt is cut\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["sample", "--out", "a\udce9"], "--out: byte 0xe9"),
        (["sample", "--o\udce9=a"], "--o?: byte 0xe9"),
        (["replay", "a\0.json"], "argument 2: U+0000"),
        (["sam\ud800"], "argument 1: U+D800"),
    ],
)
def test_arguments_that_are_not_text_are_refused(capsys, argv, message):
    assert main.main(argv) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags_given", "message"),
    [
        (
            ["--config.prompt=a[1s]", "--config.prompt_file=a.txt"],
            "config.prompt and config.prompt_file are both given",
        ),
        (
            [
                "--config.sampler.negative_prompt=a",
                "--config.sampler.negative_prompt_file=a.txt",
            ],
            "leave one out",
        ),
        (["--promt=a"], "set a config field with --config.FIELD=VALUE; see"),
        (["--prompt=a[1s]", "--prompt_file=a.txt"], "are both given"),
    ],
)
def test_flags_that_would_be_dropped_are_refused(capsys, flags_given, message):
    assert main.main(["sample", "--config=tiny", *flags_given]) == 2
    assert message in capsys.readouterr().err

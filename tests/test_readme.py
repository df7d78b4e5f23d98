"""Pages: links that lead somewhere, commands and programs that work.

`page_commands.py` names every command of every page.
"""

import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import page_commands as known
import pytest
from absl import flags

from anchor_jax.cli import COMMANDS, main, sweep
from anchor_jax.config import from_config, shipped_configs
from anchor_jax.perf import stream_bench
from anchor_jax.sampling.config import read_config as read_sampling
from anchor_jax.sampling.methods import METHODS
from anchor_jax.training import run
from anchor_jax.training.ode import TrajectoryConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md"] + [
    path
    for folder in (".github", "anchor_jax", "configs", "launch", "tests")
    for path in sorted((ROOT / folder).rglob("*.md"))
]
CONFIGS = ROOT / "configs" / "README.md"


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """Returns the code of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path):
    """Returns the commands of a page, each in one line and without its comment."""
    text = "\n".join(blocks(path, "(?:bash|sh|shell|console)")).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#\s.*", "", line) for line in text.splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


EVERY = sorted({one for path in PAGES for one in commands(path)})
TABLES = (known.RUN, known.ELSEWHERE, known.NOT_RUN)
CLUSTER = [one for one in EVERY if one.startswith("python launch/cluster.py ")]
JOBS = [f"anchor-jax {one.split(' -- ')[1]}" for one in CLUSTER if " -- " in one]
READ = [one for one in EVERY if one.startswith("anchor-jax ") and one not in known.RUN]
READ += sorted(set(JOBS))
LAUNCHED = [
    one for one in EVERY if one.startswith("python launch/") and one not in CLUSTER
]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", path.read_text()):
        if "://" in target:
            continue
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), (target, anchor)


def anchors(page):
    """Returns the names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


def test_every_command_is_run_or_has_a_reason():
    assert len(EVERY) > 50
    for command in EVERY:
        is_tool = command.startswith(known.TOOLS)
        assert sum(command in table for table in TABLES) == (not is_tool), command
    named = {command for table in TABLES for command in table}
    assert named <= set(EVERY), named - set(EVERY)
    assert all(known.NOT_RUN.values())


@pytest.mark.parametrize("name", known.ELSEWHERE.values())
def test_a_test_that_runs_a_command_exists(name):
    path, function = name.split("::")
    assert f"def {function}(" in (ROOT / "tests" / path).read_text(), name


def read(config):
    """Reads a config as its command does, and fails if a field is wrong."""
    if "stage" in config:
        run.read_config(config)
    elif "sampler" in config:
        read_sampling(config)
    elif "repeats" in config:
        stream_bench.make_workload(config)
    else:
        from_config(TrajectoryConfig, config, "config")


@pytest.mark.parametrize("command", READ)
def test_flags_and_fields_of_a_command_exist(command, monkeypatch, capsys):
    arguments = shlex.split(command)[1:]
    module = importlib.import_module(COMMANDS[arguments[0]])
    reached = []

    def check(argv):
        reached.append(argv)
        given = flags.FLAGS
        if "config" in given and given.config:
            read(given.config)
        if "vary" in given:
            sweep.make_points(given.config, given.vary)
        if "method" in given and given.method:
            assert given.method in METHODS

    monkeypatch.setattr(module, "main", check)
    monkeypatch.chdir(ROOT)

    assert main.main(arguments) == 0, capsys.readouterr().err
    assert len(reached) == 1


@pytest.mark.parametrize("command", LAUNCHED)
def test_flags_of_a_program_exist(command):
    _, program, *arguments = shlex.split(command)
    text = (ROOT / program).read_text()
    for argument in arguments:
        if argument.startswith("--"):
            assert f'"{argument.partition("=")[0]}"' in text, argument


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the pages' commands name."""
    path = tmp_path_factory.mktemp("pages")
    (path / "prompts.txt").write_text("a red ring moves up on gray[1s]\n")
    (program,) = [one for one in blocks(CONFIGS, "python") if "def get_config" in one]
    (path / "mine.py").write_text(re.sub(r"\[\d+s\]", "[1s]", program))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", known.RUN)
def test_a_command_runs(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ANCHOR_JAX_CACHE", "off")
    before = set(folder.rglob("*.mp4"))
    given = [re.sub(r"\[\d+s\]", "[1s]", one) for one in shlex.split(command)[1:]]

    status = main.main([*given, *known.RUN[command]])

    printed = capsys.readouterr()
    assert status == 0, printed.err
    makes_video = given[0] in ("sample", "compare") or "--at" in command
    assert bool(set(folder.rglob("*.mp4")) - before) == makes_video
    assert makes_video or printed.out


ROWS = dict(
    re.findall(r"^\| `(\w+)\.py` \| `(\w+)`", CONFIGS.read_text(), re.MULTILINE)
)


def test_the_page_of_configs_lists_what_is_shipped():
    assert {"tiny", "interactive", "train_dmd", "bench_medium"} <= ROWS.keys()
    assert ROWS.keys() <= shipped_configs().keys()


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_begins_with_its_command(name):
    text = ast.get_docstring(ast.parse(shipped_configs()[name].read_text()))
    found = re.findall(rf"    anchor-jax (\w+) --config=configs/{name}\.py", text)

    assert found and found[0] in COMMANDS
    assert found[0] == ROWS.get(name, found[0])


PROGRAMS = [(path, code) for path in PAGES for code in blocks(path, "python")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "program"), PROGRAMS, ids=[name_of(path) for path, _ in PROGRAMS]
)
def test_programs_run_as_they_stand(path, program, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    written = {file.name for file in tmp_path.iterdir()}
    assert written == set(re.findall(r'"(\w+\.(?:mp4|safetensors))"', program))

"""Which module may import which, read from the sources."""

import ast
import pathlib
import subprocess
import sys

import pytest

import anchor_jax
from anchor_jax.training.stages.registry import STAGES

PACKAGE = pathlib.Path(anchor_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = [
    {"errors", "deprecation", "pids"},
    {"remote"},
    {"places"},
    {
        *("io", "text", "plugins", "trees", "extras", "devices", "axes"),
        *("clusters", "parallel", "tpu_hosts"),
    },
    {
        *("interrupts", "ownership", "filetypes", "compile_writes", "compile_times"),
        *("meeting", "peers", "processes", "shares", "supervisor", "watchdog"),
    },
    {"compile_cache"},
    {
        *("cache", "wan", "flow", "media", "prompts"),
        *("config", "limits", "sharding", "finite", "prompt_files"),
    },
    {"weights"},
    {"streaming"},
    {
        *(
            "training",
            "verify",
            "porting",
            "sampling",
            "experiment",
            "evaluation",
            "perf",
            "tiny_world",
        ),
    },
    {"machine"},
    {"cli"},
    {"__main__", "bundle"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path):
    """Every dotted module that a file imports, inside functions too."""
    known = {name_of(file).replace("/", ".") for file in FILES}
    known |= {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("anchor_jax.") in known
                yield inner if is_module else node.module


def own_imports(path):
    """The package's own modules that a file imports, without its name."""
    start = "anchor_jax."
    return {
        name.removeprefix(start) for name in imports(path) if name.startswith(start)
    }


def test_every_module_has_a_level():
    found = {name_of(path).split("/")[0] for path in FILES} - {"__init__"}

    assert found <= LEVEL.keys(), "give the new module a level"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    part = name_of(path).split("/")[0]
    if part == "__init__":
        assert not own_imports(path)
        return

    upward = {
        name
        for name in own_imports(path)
        if LEVEL[name.split(".")[0]] > LEVEL[part]
        or (LEVEL[part] == 0 and name.split(".")[0] != part)
    }

    assert not upward


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_list_of_domains_names_one(path):
    if name_of(path).startswith("tiny_world/"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = [text for text in texts if text.startswith("anchor_jax.tiny_world")]

    assert not any(name.startswith("tiny_world") for name in own_imports(path))
    assert named == (["anchor_jax.tiny_world"] if name_of(path) == "plugins" else [])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_a_stage_and_the_table_know_its_name(path):
    folder, _, file = name_of(path).rpartition("/")
    if folder == "training/stages" and file.startswith((*STAGES, "registry")):
        return
    known = {name.upper() for name in STAGES}
    known |= {f"Compiled{name.title()}" for name in STAGES}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The default of `TrainConfig.stage` is part of the config.
    defaults = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "stage"
    }
    constants = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in defaults
    ]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    assert not [x for x in constants if isinstance(x, str) and x in STAGES]
    assert not names & known


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_networks_and_maths_know_nothing_of_streams(path):
    part = name_of(path).split("/")[0]
    if part in ("wan", "flow"):
        parts = {name.split(".")[0] for name in own_imports(path)}
        assert parts <= {part, "axes", "errors", "parallel"}
    if part == "cache":
        allowed = ("axes", "cache.", "errors", "parallel", "wan.attention")
        allowed += ("wan.kernels", "wan.rope", "wan.spec")
        assert all(name.startswith(allowed) for name in own_imports(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_configs_stay_above_the_library(path):
    name = name_of(path)

    roots = {module.split(".")[0] for module in imports(path)}

    if name != "config" and not name.startswith("cli/"):
        assert "ml_collections" not in roots
    if not name.startswith(("cli/", "config", "__main__")):
        assert "absl" not in roots


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path):
    if name_of(path).startswith("cli/"):
        return
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert "print" not in called


@pytest.mark.slow
def test_sampling_loads_no_tensorflow():
    program = """
import sys
import anchor_jax
light = {name.split(".")[0] for name in sys.modules}
assert "jax" not in light and "flax" not in light, "importing the package is heavy"
import anchor_jax.sampling.render
import anchor_jax.streaming.session
import anchor_jax.streaming.stream
import anchor_jax.wan.text
import anchor_jax.wan.vae
heavy = {"tensorflow", "tensorflow_datasets", "torch", "matplotlib", "optax", "orbax"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_library_leaves_signals_and_threads_alone():
    program = """
import signal, threading
import anchor_jax.cli.main, anchor_jax.streaming.session, anchor_jax.training.run
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)

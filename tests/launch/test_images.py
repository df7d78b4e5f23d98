"""The Dockerfile and the shell scripts, without a container engine.

The steps of the images are run by hand.
"""

import fnmatch
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TEXT = (LAUNCH / "Dockerfile").read_text()
LINES = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()
SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted(LAUNCH.rglob("*.sh")),
    *sorted(LAUNCH.rglob("*.sbatch")),
]


def stages():
    """Returns the base and the lines of each stage."""
    found = {}
    for line in LINES:
        if line.startswith("FROM "):
            _, base, _, name = line.split()
            found[name] = (base, [])
        elif line and found:
            found[name][1].append(line)
    return found


def lines_of(name):
    """Returns the lines of a stage and of the stages below it."""
    base, lines = stages()[name]
    return (lines_of(base) if base in stages() else []) + lines


def test_the_base_is_pinned_by_its_content():
    assert re.search(r"^ARG PYTHON=\S+:3\.11\.\d+\S*@sha256:[0-9a-f]{64}$", TEXT, re.M)
    for base, _ in stages().values():
        assert base == "${PYTHON}" or base in stages()


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_an_image_is_checked_and_runs_without_root(name):
    lines = lines_of(name)
    user = lines.index("USER anchor")
    assert lines[user:] == [
        "USER anchor",
        "RUN JAX_PLATFORMS=cpu anchor-jax doctor",
        'ENTRYPOINT ["anchor-jax"]',
        'CMD ["doctor"]',
    ]
    assert any(f"'/source[{name},train,gcs]'" in line for line in lines[:user])
    assert f'"{name}": ' in (ROOT / "setup.py").read_text()


def test_the_driver_is_found_where_gke_mounts_it():
    settings = [line for line in lines_of("gpu") if line.startswith("ENV ")]
    values = dict(one.split("=", 1) for line in settings for one in line.split()[1:])

    assert values["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert "/usr/local/nvidia/bin" in values["PATH"].split(":")
    assert not any("nvidia" in line for line in lines_of("tpu"))


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_code_is_only_in_the_last_layer(name):
    lines = lines_of(name)
    copied = [line for line in lines if line.startswith("COPY")]
    assert copied[-1] == "COPY --from=wheel /wheels /wheels"
    assert len(copied) == 3
    heavy = next(i for i, line in enumerate(lines) if "[" + name in line)
    assert heavy < lines.index(copied[-1])
    for line in lines:
        if "pip install" in line:
            assert "--no-cache-dir" in line


def test_nothing_secret_is_a_part_of_the_build():
    assert not re.search(r"^ADD|secret|token|password", TEXT, re.M | re.I)
    rules = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.M)
    for source in " ".join(sources).split():
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule + "*") for rule in kept), source


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    program = pathlib.Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

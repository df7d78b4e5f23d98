"""A pipeline of diffusers, saved by diffusers and ported by us.

Where the peers are not installed, every module here is skipped. With
ANCHOR_JAX_PEERS=required what is skipped fails.
"""

import importlib.util
import logging
import os

import pytest

PEERS = ("torch", "diffusers", "transformers", "peft")
MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]
REQUIRED = os.environ.get("ANCHOR_JAX_PEERS") == "required"


class Skipped(pytest.Module):
    """A module of tests that is not imported."""

    def collect(self):
        pytest.skip(
            f"{', '.join(MISSING)} not installed: pip install 'anchor_jax[peers]'",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path, parent):
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _counted((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _counted((yield))


def _counted(report):
    if REQUIRED and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, and ANCHOR_JAX_PEERS=required: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def pipeline():
    import peer_models

    return peer_models.pipeline()


@pytest.fixture(scope="session")
def published(pipeline, tmp_path_factory):
    """The folder of a `WanPipeline`, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("peers") / "published"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ported(published, tmp_path_factory):
    """The checkpoint that `port` makes of it."""
    from anchor_jax.porting import port

    folder = tmp_path_factory.mktemp("peers") / "ported"
    port.run(port.plan(published), folder)
    return folder


@pytest.fixture(scope="session")
def bundle(ported):
    """What is loaded of the checkpoint, in float32, for videos of 16 x 24 pixels."""
    from anchor_jax.wan.spec import LatentGrid
    from anchor_jax.weights.load import load_bundle

    return load_bundle(str(ported), dtype="float32", grid=LatentGrid(2, 4))


@pytest.fixture
def complaints(caplog):
    """A function that returns what the peers logged as warnings or errors."""
    import diffusers
    import transformers

    libraries = (diffusers, transformers)
    for library in libraries:
        library.utils.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.split(".")[0] in ("diffusers", "transformers", "peft")
    ]
    for library in libraries:
        library.utils.logging.disable_propagation()

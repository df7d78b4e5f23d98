"""Recorded cases pass; every fault of a case is reported and fails it."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anchor_jax.cli.main import main
from anchor_jax.errors import UserError
from anchor_jax.verify import run
from anchor_jax.verify.case import CaseError, Checks, difference, load_case
from anchor_jax.verify.networks import block_sizes, causal_pass, dense_mask

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = (
    *("primitives", "scheduler", "dit_bidirectional", "dit_causal_nocache", "lora"),
    *("umt5", "vae", "infinity_rope_kv_flush", "ode_regression", "solver"),
    *("streaming_tri_region", "streaming_variants"),
)
CASES = [
    folder
    for kind in KINDS
    for folder in sorted((GOLDEN / kind).iterdir())
    if folder.is_dir()
]


@pytest.fixture
def golden_set(tmp_path):
    """A set with one quick case of its own, which tests may damage."""
    folder = tmp_path / "set" / "primitives" / "small"
    shutil.copytree(GOLDEN / "primitives" / "small", folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_outputs(folder, change):
    path = folder / "outputs.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def verify(capsys, *arguments):
    status = main(["verify", *map(str, arguments)])
    return status, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("folder", CASES, ids=lambda x: f"{x.parent.name}-{x.name}")
def test_recorded_cases_pass(folder):
    result = run.verify_case(folder)
    assert result.passed, run.report(result)
    assert set(load_file(folder / "outputs.safetensors")) <= {
        row.name for row in result.rows
    }


def test_a_kind_folder_is_searched(capsys):
    status, out = verify(capsys, GOLDEN / "scheduler", "--tensors")
    assert status == 0
    assert out.count("pass ") == 3 and "sigma_used" in out
    assert "3 cases, 39 tensors, 0 failed" in out


@pytest.mark.slow
def test_a_changed_output_fails(golden_set, capsys):
    def change(tensors):
        tensors["rms_norm"][0, 0, 0] += 2e-4

    change_outputs(golden_set, change)
    status, out = verify(capsys, golden_set.parents[1])
    assert status == 1
    assert "DIFFERS rms_norm" in out and "1 failed" in out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_fail(golden_set, value):
    def change(tensors):
        tensors["rms_norm"][0, 0, 0] = value

    change_outputs(golden_set, change)
    assert not run.verify_case(golden_set).passed


def test_an_unknown_kind_fails_unless_excepted(golden_set, capsys):
    change_config(golden_set, fixture="primitivs")
    status, out = verify(capsys, golden_set)
    assert status == 1 and "did you mean 'primitives'?" in out
    status, out = verify(capsys, golden_set, "--except=dmd,primitivs")
    assert status == 0 and "kinds left out: primitivs" in out


def test_the_kind_is_the_folder_where_the_config_does_not_say(golden_set):
    path = golden_set / "config.json"
    config = json.loads(path.read_text())
    del config["fixture"]
    path.write_text(json.dumps(config))
    assert run.verify_case(golden_set).passed


def test_an_output_that_is_not_compared_fails(golden_set):
    def change(tensors):
        tensors["surprise"] = np.zeros(3, np.float32)

    change_outputs(golden_set, change)
    result = run.verify_case(golden_set)
    assert not result.passed
    assert "surprise: recorded, but not compared" in run.report(result)


def test_a_missing_output_fails(golden_set):
    change_outputs(golden_set, lambda tensors: tensors.pop("rope_apply.d24"))
    result = run.verify_case(golden_set)
    assert not result.passed
    assert "was not recorded, but is expected" in run.report(result)


def test_a_missing_input_is_named(golden_set):
    path = golden_set / "inputs.safetensors"
    tensors = load_file(path)
    del tensors["rms_x"]
    save_file(tensors, path)
    assert "has no tensor 'rms_x'" in run.report(run.verify_case(golden_set))


@pytest.mark.parametrize("name", ["inputs.safetensors", "outputs.safetensors"])
def test_a_truncated_file_is_reported_and_the_rest_runs(golden_set, capsys, name):
    good = golden_set.with_name("whole")
    shutil.copytree(golden_set, good)
    path = golden_set / name
    path.write_bytes(path.read_bytes()[:-100])
    status, out = verify(capsys, golden_set.parents[1])
    assert status == 1
    assert f"{name} cannot be read" in out and "2 cases" in out and "1 failed" in out


@pytest.mark.parametrize("text", ["", "[]", '{"fixture": "primitives"', "{}", "\x00"])
def test_a_damaged_config_is_reported(golden_set, text):
    (golden_set / "config.json").write_text(text)
    result = run.verify_case(golden_set)
    assert not result.passed and "config.json" in run.report(result)


@pytest.mark.parametrize(
    "named", ["../../../outside.safetensors", "/etc/passwd", 3, "a\0b", ""]
)
def test_files_outside_the_set_are_refused(golden_set, named):
    shutil.copy(
        golden_set / "inputs.safetensors",
        golden_set.parents[2] / "outside.safetensors",
    )
    change_config(golden_set, inputs_file=named, weights_file=named)
    with pytest.raises(CaseError):
        load_case(golden_set)
    assert not run.verify_case(golden_set).passed


def test_a_link_out_of_the_set_is_refused(golden_set):
    outside = golden_set.parents[2] / "outside.safetensors"
    shutil.move(golden_set / "inputs.safetensors", outside)
    (golden_set / "inputs.safetensors").symlink_to(outside)
    assert "leaves the set" in run.report(run.verify_case(golden_set))


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dims": [10**12]},
        {"head_dims": "128"},
        {"positions": [-1]},
        {"grid": [3, 2]},
        {"start_frames": [1.5]},
        {"model": None},
    ],
)
def test_senseless_sizes_are_reported(golden_set, changes):
    change_config(golden_set, **changes)
    result = run.verify_case(golden_set)
    assert not result.passed and "config.json" in run.report(result)


def test_sizes_that_the_weights_do_not_have_are_reported(tmp_path):
    folder = tmp_path / "set" / "dit_bidirectional" / "case"
    shutil.copytree(GOLDEN / "dit_bidirectional" / "f3_4x6", folder)
    shutil.copy(GOLDEN / "dit_weights.safetensors", tmp_path / "set")
    model = json.loads((folder / "config.json").read_text())["model"]
    change_config(folder, model=model | {"num_layers": 4})
    # Some of many missing names are shown.
    assert re.search(r"blocks\.3\.\S+: missing", run.report(run.verify_case(folder)))
    change_config(folder, model=model | {"num_heads": 7})
    assert "multiple of num_heads" in run.report(run.verify_case(folder))


def test_what_a_terminal_would_obey_is_not_printed(golden_set):
    change_config(golden_set, fixture="\x1b[31m")
    assert "\x1b" not in run.report(run.verify_case(golden_set))


def test_folders_that_hold_no_case_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no case"):
        run.find_cases([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        run.find_cases([tmp_path / "nowhere"])
    assert main(["verify"]) == 2


def test_a_case_without_outputs_fails(golden_set):
    save_file({}, golden_set / "outputs.safetensors")
    assert not run.verify_case(golden_set).passed


def test_left_out_tensors_are_counted():
    checks = Checks({"slot.1": np.zeros(2), "slot.2": np.zeros(2), "rest": np.zeros(1)})
    checks.leave_out(r"slot\.\d", "buffers")
    assert checks.left_out == {"buffers": ("slot.1", "slot.2")}
    assert checks.unaccounted() == ["rest"]


def test_either_limit_is_enough_and_shapes_must_agree():
    checks = Checks({"x": np.float32([1000.0])})
    checks.compare("x", np.float32([1000.01]), absolute=1e-4, relative=1e-4)
    checks.compare("x", np.float32([1000.01]), absolute=1e-4)
    checks.compare("x", np.float32([[1000.0]]), absolute=1e-4)
    checks.equal("x", np.float32([1000.0]))
    assert [row.is_equal for row in checks.rows] == [True, False, False, True]
    assert difference(np.float32([1]), np.float32([0])) == (1.0, np.inf)


def test_a_short_last_block_keeps_its_window():
    case = load_case(GOLDEN / "dit_causal_nocache" / "local6_block3")
    case.inputs["x"] = case.inputs["x"][:, :, :8]
    case.inputs["t"] = case.inputs["t"][:, :8]
    assert block_sizes(case, 8) == (3, 3, 3)

    class Sizes:
        latent_channels = 16

    spans = causal_pass(case, Sizes).spans
    mask = dense_mask(spans, 1, np.zeros((8, 8)))
    assert mask[7].tolist() == [False] * 3 + [True] * 5


@pytest.mark.slow
def test_bfloat16_is_shown_and_not_judged(capsys):
    folder = str(GOLDEN / "dit_bidirectional" / "f3_4x6")

    assert main(["verify", folder, "--dtype=bfloat16"]) == 0

    shown = capsys.readouterr().out
    assert shown.startswith("bfloat16  dit_bidirectional/f3_4x6")
    assert "DIFFERS" not in shown
    result = run.verify_case(pathlib.Path(folder), dtype="bfloat16")
    assert 1e-3 < max(row.absolute for row in result.rows) < 0.3

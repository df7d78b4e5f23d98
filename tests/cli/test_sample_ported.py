import json
import shutil

import av
import bundles
import numpy as np
import ported
import pytest

from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.weights import checkpoint

CLIP = f"{bundles.RED}[3f] | {bundles.BLUE}[3f]"
SHORT = f"--config.prompt={bundles.RED}[3f]"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "ported"
    ported.save(folder, "anchor_forcing")
    return folder


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys, weights):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "off")

    def run(*argv, out="out", weights=weights):
        given = ["--config=interactive", f"--config.weights={weights}"]
        given += ["--config.size=16x32", f"--out={out}"]
        from_file = any("--config.prompt_file" in argument for argument in argv)
        given += [] if from_file else [f"--config.prompt={CLIP}"]
        status = main.main(["sample", *given, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


def reported_as(weights, folder, method):
    """Returns a copy of the weights whose manifest names another method."""
    shutil.copytree(weights, folder)
    meta = checkpoint.read_meta(weights) | {"method": method}
    (folder / "0" / "meta" / "metadata").write_text(json.dumps(meta))
    return folder


def frames(path):
    """Returns a video's frames, [frame, height, width, 3]."""
    with av.open(str(path)) as container:
        decoded = container.decode(video=0)
        return np.stack([one.to_ndarray(format="rgb24") for one in decoded]).astype(int)


@pytest.mark.slow
def test_what_the_config_leaves_open_is_that_of_the_method(
    sample, tmp_path, weights, capsys
):
    status, _, err = sample()

    assert status == 0
    chosen = "rules: release, policy: anchor_forcing (weights were ported as"
    assert f"{chosen} anchor_forcing)" in err
    steps = [
        "loading the text encoder (",
        "encoding 2 prompts",
        "loading the generator",
    ]
    places = [err.index(step) for step in steps]
    assert places == sorted(places)
    recipe = json.loads((tmp_path / "out/000.json").read_text())
    assert recipe["config"]["rules"] == "release"
    assert recipe["config"]["sampler"]["steps"] == [1000, 750, 500, 250]
    assert recipe["setup"]["policy"]["junction"]["kind"] == "ReleaseJunction"
    assert recipe["setup"]["model"]["dtype"] == "bfloat16"
    # Small videos are enlarged four times.
    assert frames(tmp_path / "out/000.mp4").shape == (21, 64, 128, 3)
    again = [str(tmp_path / "out/000.json"), "--check", f"--weights={weights}"]
    assert main.main(["replay", *again]) == 0
    assert "identical: 2 of 2 blocks" in capsys.readouterr().out


@pytest.mark.slow
def test_a_field_on_the_command_line_wins(sample, tmp_path):
    status, _, err = sample(
        "--config.policy=longlive",
        "--config.rules=paper",
        "--config.sampler.steps=(1000, 500)",
        "--config.dtype=float32",
        "--config.attention=heads",
        SHORT,
    )

    assert status == 0
    assert "rules: paper, policy: longlive (as the config says" in err
    recipe = json.loads((tmp_path / "out/000.json").read_text())
    assert recipe["setup"]["policy"]["junction"] is None
    assert len(recipe["setup"]["levels"]["timestep"]) == 2
    assert recipe["setup"]["model"]["dtype"] == "float32"
    assert recipe["setup"]["kernel"]["kind"] == "Heads"


@pytest.mark.slow
def test_the_text_encoder_may_live_anywhere(sample, tmp_path):
    for mode in ("device", "free", "sharded"):
        given = [f"--config.text_encoder={mode}", "--config.sampler.steps=(1000,)"]
        given += ["--config.sampler.guidance=3", "--config.dtype=float32", SHORT]
        assert sample(*given, out=mode)[0] == 0

    paths = {
        mode: tmp_path / mode / "000.mp4" for mode in ("device", "free", "sharded")
    }
    assert paths["device"].read_bytes() == paths["free"].read_bytes()
    device, sharded = (frames(paths[mode]) for mode in ("device", "sharded"))
    assert device.std() > 1
    np.testing.assert_allclose(device, sharded, atol=4)  # its sums are split


@pytest.mark.slow
def test_json_lines_have_seeds_of_their_own_and_resume(sample, tmp_path, monkeypatch):
    lines = [
        {"prompts": [bundles.RED], "seed": 6979, "num": 1},
        {"prompts": [bundles.RED], "seed": 5, "num": 2},
        {"prompts": [bundles.GREEN]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "p.jsonl").write_text(text)
    restore, loads = checkpoint.restore, []

    def counted(folder, item, *rest):
        loads.append(item)
        return restore(folder, item, *rest)

    monkeypatch.setattr(checkpoint, "restore", counted)
    batch = ["--config.prompt_file=p.jsonl", "--config.frames=3", "--config.seed=7"]
    out = tmp_path / "out"

    status, _, err = sample(*batch)
    assert status == 0 and "encoding 2 prompts" in err
    assert loads[0] == "text_encoder" and loads.count("text_encoder") == 1
    recipes = [json.loads((out / f"00{i}.json").read_text()) for i in range(3)]
    assert [recipe["seed"] for recipe in recipes] == [6979, 5, 7]
    first, second = ((out / f"00{i}.mp4").read_bytes() for i in range(2))
    assert first != second

    (out / "001.mp4").unlink()
    status, printed, err = sample(*batch)
    assert status == 0
    assert "Skipped 2 existing videos." in printed and "encoding 1 prompt" in err
    assert (out / "001.mp4").read_bytes() == second
    status, _, err = sample(*batch, "--config.lora=none")
    assert status == 2 and "another recipe" in err


def test_an_unknown_method_is_named(sample, weights, tmp_path):
    other = reported_as(weights, tmp_path / "other", "selfforcing")

    status, _, err = sample(weights=other)

    assert status == 2
    assert "did you mean 'self_forcing'?" in err and "causvid" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--config.size=24x32", "multiples of 16 and 16"),
        ("--config.text_encoder=gone", "text_encoder='gone'"),
        ("--config.lora=mixed", "lora='mixed'"),
        ("--config.dtype=int8", "dtype='int8'"),
        ("--config.attention=cudn", "did you mean 'cudnn'?"),
    ],
)
def test_a_wrong_choice_is_named_before_anything_is_made(sample, tmp_path, argv, part):
    status, _, err = sample(argv)

    assert status == 2 and part in err
    assert not (tmp_path / "out").exists()

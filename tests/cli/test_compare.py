import json

import av
import pytest
from PIL import Image

from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.sampling import render

pytestmark = pytest.mark.usefixtures("optimized_compilation")

CLIP = "a red ring[3f] | a blue square[3f]"
POLICIES = "anchor_forcing,longlive"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, weights):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "off")

    def run(name, *argv, prompt=CLIP):
        given = ["--config=tiny", f"--config.weights={weights}"]
        given += [f"--config.prompt={prompt}", "--config.sampler.steps=(900,)"]
        status = main.main([name, *given, *argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def made(monkeypatch):
    """The videos that streams made, in order."""
    stems, write = [], render.write_video

    def note(job, *rest):
        stems.append(f"{job.stem.parent.name}/{job.stem.name}")
        return write(job, *rest)

    monkeypatch.setattr(render, "write_video", note)
    return stems


def files(folder):
    found = folder.rglob("*")
    return sorted(str(one.relative_to(folder)) for one in found if one.is_file())


@pytest.mark.slow
def test_policies_stand_side_by_side_and_each_has_a_recipe(
    command, made, tmp_path, capsys, weights
):
    status, printed, _ = command("compare", f"--policies={POLICIES}", "--out=both")

    assert status == 0
    assert "Wrote 1 comparison of 2 policies." in printed
    assert "anchor-jax replay both/anchor_forcing/000.json" in printed
    names = ["000.json", "000.mp4", "000.png"]
    below = [f"{name}/{file}" for name in POLICIES.split(",") for file in names]
    assert files(tmp_path / "both") == sorted([*names, *below])
    with av.open(str(tmp_path / "both/000.mp4")) as container:
        frames = [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]
    height, width = frames[0].shape[:2]
    assert (len(frames), width) == (21, 128 + 4 + 128)
    assert height > 128, "a strip with the names is above the videos"
    strip = frames[0][: height - 132]
    assert strip[:, :128].max() > 200 and strip[:, 132:].max() > 200
    assert Image.open(tmp_path / "both/000.png").height > 2 * 128
    # The same prompts, seed and weights.
    recipes = [
        json.loads((tmp_path / "both" / name / "000.json").read_text())["request"]
        for name in POLICIES.split(",")
    ]
    assert recipes[0]["setup"].pop("policy") != recipes[1]["setup"].pop("policy")
    assert recipes[0] == recipes[1]

    for name in POLICIES.split(","):
        argv = [f"both/{name}/000.json", "--check", f"--weights={weights}"]
        assert main.main(["replay", *argv]) == 0
        assert "identical: 2 of 2 blocks" in capsys.readouterr().out
    assert main.main(["replay", "both/000.json"]) == 2
    assert "'longlive/000.json'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_video_of_a_comparison_is_the_one_that_sample_makes(command, tmp_path):
    command("compare", f"--policies={POLICIES}", "--out=both")
    command("sample", "--config.policy=longlive", "--out=alone")

    for name in ("000.mp4", "000.png"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "both/longlive" / name).read_bytes() == alone


@pytest.mark.slow
def test_the_same_command_makes_what_is_missing(command, made, tmp_path):
    line = ("compare", f"--policies={POLICIES}", "--out=both")
    command(*line)
    first = (tmp_path / "both/000.mp4").read_bytes()
    (tmp_path / "both/longlive/000.mp4").unlink()
    (tmp_path / "both/000.mp4").unlink()

    assert command(*line)[0] == 0
    assert (tmp_path / "both/000.mp4").read_bytes() == first
    assert "Nothing to do in both." in command(*line)[1]
    assert made == ["anchor_forcing/000", "longlive/000", "longlive/000"]


@pytest.mark.slow
def test_other_policies_do_not_replace_a_comparison(command, made, tmp_path):
    command("compare", f"--policies={POLICIES}", "--out=both")

    other = ("compare", "--policies=longlive,no_recache", "--out=both")
    status, _, err = command(*other)

    assert status == 2
    assert "both/000.json was made by another recipe" in err or "000.png" in err
    assert "--overwrite" in err and "no_recache/000" not in made
    assert command(*other, "--overwrite")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--policies=anchor_forcing,longlife"], ["'longlife'", "mean 'longlive'?"]),
        (["--policies=longlive"], ["at least two policies", "anchor-jax sample"]),
        (["--policies=longlive,longlive"], ["at least two policies, each once"]),
        ([], ["--policies=: must name at least two"]),
        (
            ["--policies=anchor_forcing,self_forcing", "--config.frames=24"],
            ["self_forcing: prompt:", "limited to 21", "self_forcing_rolling"],
        ),
        (
            ["--policies=anchor_forcing,wan_teacher"],
            ["wan_teacher: ", "cannot switch prompts"],
        ),
    ],
)
def test_a_mistake_is_reported_before_anything_is_made(command, tmp_path, argv, parts):
    status, _, err = command("compare", *argv)

    assert status == 2
    assert [part for part in parts if part not in err] == [], err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_videos_of_different_lengths_are_refused(command, tmp_path):
    status, _, err = command(
        "compare", "--policies=longlive,wan_teacher", prompt="a red ring[4f]"
    )

    assert status == 2
    assert "different lengths" in err and "of 3 and 4 latent frames" in err
    assert list(tmp_path.iterdir()) == []

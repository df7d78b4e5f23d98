import contextlib
import json
import os
import subprocess
import sys

import av
import bundles
import pytest

from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.sampling import tasks
from anchor_jax.streaming import recipe as recipes

pytestmark = pytest.mark.usefixtures("optimized_compilation")

CLIP = "a red ring[4f] | a blue square[3f] | a green ring[5f]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with weights, and a recipe of four blocks that was made with them."""
    folder = tmp_path_factory.mktemp("made")
    bundles.save(folder / "weights")
    given = [f"--config.weights={folder / 'weights'}", f"--config.prompt={CLIP}"]
    given += ["--config.sampler.steps=(900,)", f"--out={folder / 'first'}"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(CACHE_VARIABLE, "off")
        assert main.main(["sample", "--config=tiny", *given]) == 0
    return folder


@pytest.fixture
def replay(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "off")

    def run(*argv, change=None, weights=True):
        recipe = json.loads((made / "first/000.json").read_text())
        if change:
            change(recipe)
        (tmp_path / "000.json").write_text(json.dumps(recipe))
        given = [f"--weights={made / 'weights'}"] if weights else []
        status = main.main(["replay", "000.json", *given, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_replay_is_the_same_video(replay, made, tmp_path):
    status, printed, err = replay("--out=again")

    assert status == 0
    assert "identical: 4 of 4 blocks" in printed
    assert "Switch requested at frame 4; starts at 6, the next block." in err
    for name in ("000.mp4", "000.png"):
        first = (made / "first" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
    again, first = (
        json.loads((folder / "000.json").read_text())
        for folder in (tmp_path / "again", made / "first")
    )
    for field in ("setup", "seed", "prompts", "blocks", "frames", "fingerprint"):
        assert again[field] == first[field]


@pytest.mark.slow
def test_a_check_writes_nothing(replay, tmp_path):
    status, printed, _ = replay("--check", "--until=2")

    assert status == 0
    assert "identical: 2 of 2 blocks" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["000.json"]


@pytest.mark.slow
def test_a_recipe_from_before_noise_levels_had_names_is_replayed(replay):
    def older(recipe):
        del recipe["config"]["sampler"]["grid"]

    status, printed, _ = replay("--check", "--until=2", change=older)

    assert status == 0
    assert "identical: 2 of 2 blocks" in printed


@pytest.mark.slow
def test_a_recipe_from_before_videos_were_enlarged_is_replayed(replay):
    def older(recipe):
        del recipe["config"]["enlarge"]

    status, printed, _ = replay("--check", "--until=2", change=older)

    assert status == 0
    assert "identical: 2 of 2 blocks" in printed


@pytest.mark.slow
def test_a_replay_enlarges_as_the_recipe_says(replay, tmp_path):
    def as_made(recipe):
        recipe["config"]["enlarge"] = 1

    status, printed, _ = replay("--until=1", "--out=again", change=as_made)

    assert status == 0 and "identical: 1 of 1 blocks" in printed
    with av.open(str(tmp_path / "again/000.mp4")) as video:
        assert video.streams.video[0].width == 32
    again = json.loads((tmp_path / "again/000.json").read_text())
    assert again["config"]["enlarge"] == 1


@pytest.mark.slow
def test_a_block_that_differs_is_named(replay):
    def other(recipe):
        recipe["blocks"][2] = "0" * 64

    status, printed, _ = replay("--check", change=other)

    assert status == 1
    assert "different: 1 of 4 blocks, block 2 first" in printed


@pytest.mark.slow
def test_another_machine_is_reported_and_not_a_failure(replay):
    def other(recipe):
        recipe["blocks"][0] = "0" * 64
        recipe["fingerprint"]["device"] = "abacus"

    status, printed, err = replay("--check", "--until=1", change=other)

    assert status == 0
    assert "device: 'abacus' then, 'cpu' now" in err and "bits may differ" in err
    assert "different: 1 of 1 blocks" in printed


@pytest.mark.slow
def test_a_video_continues_differently_from_a_frame(replay, made, tmp_path):
    status, printed, err = replay(
        "--at=8", "--prompt=a red ring", "--frames=15", "--out=fork"
    )

    assert status == 0
    assert "identical: 3 of 3 blocks" in printed
    assert "Switch requested at frame 8; starts at 9" in err
    fork, first = (
        json.loads((folder / "000.json").read_text())
        for folder in (tmp_path / "fork", made / "first")
    )
    printed = [(one["prompt"], one["landed"]) for one in fork["prompts"]]
    assert printed == [("a red ring", 0), ("a blue square", 6), ("a red ring", 9)]
    assert fork["blocks"][:3] == first["blocks"][:3]
    assert fork["blocks"][3] != first["blocks"][3]
    assert len(fork["blocks"]) == 5


def drop_blocks(recipe):
    recipe["blocks"] = []


def negative_seed(recipe):
    recipe["seed"] = -1


def enlarged_too_much(recipe):
    recipe["config"]["enlarge"] = 10**6


def other_weights(recipe):
    recipe["fingerprint"]["weights"] = "0" * 64


def other_model(recipe):
    recipe["setup"]["model"]["num_layers"] = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "change", "message"),
    [
        (["--until=5"], None, "--until=5: must be a number of blocks from 1 to 4"),
        (["--until=0"], None, "--until=0"),
        (["--at=3"], None, "--at and --prompt must be given together"),
        (["--at=12", "--prompt=x"], None, "--at=12: must be a latent frame"),
        (["--at=3", "--prompt= "], None, "--prompt: got"),
        (["--at=3", "--prompt=x", "--frames=10"], None, "--frames=10: must be"),
        (["--at=3", "--prompt=x", "--frames=3"], None, "--frames=3: must be"),
        (["--frames=9"], None, "--frames needs --at"),
        (["--check"], drop_blocks, "no digests"),
        ([], negative_seed, "seed=-1"),
        ([], enlarged_too_much, "config.enlarge=1000000: must be an integer"),
        ([], other_weights, "weights of SHA-256 0000"),
        ([], other_model, "are not those of its weights"),
        (["--weights=nowhere"], None, "nowhere"),
        (["more.json"], None, "expected one recipe"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    replay, tmp_path, argv, change, message
):
    status, _, err = replay(*argv, change=change)

    assert status == 2
    assert message in err
    assert [file.name for file in tmp_path.iterdir()] == ["000.json"]


@pytest.mark.slow
def test_a_path_in_a_recipe_is_not_followed(replay):
    status, _, err = replay("--check", weights=False)

    assert status == 2
    assert "paths in recipes are ignored" in err and "--weights=FOLDER" in err


@pytest.mark.parametrize(
    ("name", "what"), [("x.mp4", "a video"), ("x.PNG", "an image")]
)
def test_a_video_in_place_of_its_recipe_is_named(tmp_path, capsys, name, what):
    (tmp_path / name).write_bytes(b"\0\0\0\x20ftypisom")

    assert main.main(["replay", str(tmp_path / name)]) == 2

    message = f"error: {name} is {what}; give the recipe beside it, x.json\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
def test_files_that_are_there_are_never_replaced(replay, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/000.mp4").write_text("mine")

    status, _, err = replay("--out=mine")

    assert status == 2
    assert "000.mp4 already exists" in err
    assert (tmp_path / "mine/000.mp4").read_text() == "mine"


@pytest.mark.slow
def test_files_that_another_process_made_meanwhile_stay(replay, tmp_path, monkeypatch):
    def own(folder, tell):
        folder.mkdir()
        (folder / "000.mp4").write_text("theirs")
        return contextlib.nullcontext()

    monkeypatch.setattr(tasks, "own_folder", own)

    status, _, err = replay("--out=mine")

    assert status == 2
    assert "000.mp4 already exists" in err
    assert (tmp_path / "mine/000.mp4").read_text() == "theirs"


def test_nothing_differs_from_itself():
    here = recipes.fingerprint(bundles.load())

    assert recipes.differences(here, here) == ()
    assert recipes.differences(here, here | {"jax": "0.1"})[0].endswith("'0.1' now")


@pytest.mark.slow
def test_a_prompt_that_is_cut_is_reported(replay):
    long = "a red ring a blue square moves up"

    status, _, err = replay("--at=9", f"--prompt={long}", "--out=forked")

    assert status == 0
    assert "warning: 1 prompt is longer than the 6 tokens" in err
    assert "prompts[2]: 'a red ring a blue square moves up': 6 of 9 tokens" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt, part", [("a\udce9", "byte 0xe9"), ("a\0", "U+0000"), ("\x1b[2J", "U+001B")]
)
def test_a_prompt_that_is_not_text_is_refused(replay, tmp_path, prompt, part):
    status, _, err = replay("--at=3", f"--prompt={prompt}", "--out=forked")

    assert status == 2
    assert "--prompt: " in err and part in err
    assert not (tmp_path / "forked").exists()


@pytest.mark.slow
@pytest.mark.parametrize("field", ["prompts", "negative_prompt"])
def test_a_recipe_with_invalid_text_is_refused(replay, field):
    def change(recipe):
        if field == "prompts":
            recipe["prompts"][1]["prompt"] = "a\ud800"
        else:
            recipe[field] = "a\ud800"

    status, _, err = replay("--check", change=change)

    assert status == 2
    assert "000.json" in err and field in err and "U+D800" in err


@pytest.mark.slow
def test_programs_as_users_have_them_make_the_same_video_again(made, tmp_path):
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "NPROC")
    env = {name: value for name, value in os.environ.items() if name not in ours}

    def run(*given):
        command = [sys.executable, "-m", "anchor_jax", *given]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    weights, clip = made / "weights", f"--config.prompt={CLIP}"
    run("sample", "--config=tiny", "--out=out", clip, f"--config.weights={weights}")
    printed = run("replay", "out/000.json", "--check", f"--weights={weights}")

    assert "identical: 4 of 4 blocks" in printed

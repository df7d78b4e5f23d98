"""A made-up family with other strides, channels and frames per second, end to end."""

import dataclasses
import io
import json
import pathlib
import re
import tokenize
from typing import ClassVar

import av
import bundles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import anchor_jax
from anchor_jax import trees
from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.porting import convert, key_tables
from anchor_jax.porting.export import export
from anchor_jax.porting.sources import TEXT_FILE, VAE_FILE
from anchor_jax.prompts import Timing, parse_entry, parse_inline
from anchor_jax.sampling import compare
from anchor_jax.sampling.config import read_config
from anchor_jax.streaming import recipe, room
from anchor_jax.wan import shapes, spec, vae
from anchor_jax.wan.spec import Family, LatentGrid, ModelConfig
from anchor_jax.wan.vae import VaeConfig, WanVae
from anchor_jax.weights import checkpoint
from anchor_jax.weights.load import load_bundle

OTHER = Family(
    name="made_up",
    strides=(4, 16, 16),
    patch=(1, 2, 2),
    latent_channels=48,
    frames_per_second=24,
    text_len=6,
    text_dim=8,
    head_dim=16,
    sizes=((64, 96), (32, 64)),
    clip_frames=31,
    latent_mean=(0.1,) * 48,
    latent_std=(2.0,) * 48,
)


@dataclasses.dataclass(frozen=True)
class OtherConfig(ModelConfig):
    family: ClassVar[Family] = OTHER

    dim: int = 32
    ffn_dim: int = 32
    num_heads: int = 32 // OTHER.head_dim
    num_layers: int = 1
    freq_dim: int = 16
    text_dim: int = OTHER.text_dim
    text_len: int = OTHER.text_len
    latent_channels: int = OTHER.latent_channels


NAMED = tuple(
    dataclasses.replace(rule, source=f"net.{rule.source}") for rule in key_tables.DIT
)
SIZES = {"base_dim": 4, "num_res_blocks": 1, "z_dim": OTHER.latent_channels}
NORMAL = {"latent_mean": OTHER.latent_mean, "latent_std": OTHER.latent_std}
PATCHED = VaeConfig(dim_mult=(1, 1, 1, 1), pixel_patch=2, **SIZES, **NORMAL)
DEEP = VaeConfig(
    dim_mult=(1, 1, 1, 1, 1),
    temporal_downsample=(False, False, True, True),
    **SIZES,
    **NORMAL,
)


def draw(config):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32),
        shapes.of(config),
    )


def save(folder, codec=PATCHED, **meta):
    """Writes random weights of the family in the form of ported ones."""
    items = {
        "generator": {"params": draw(OtherConfig())},
        "text_encoder": draw(bundles.TEXT),
        "vae": draw(codec),
    }
    files = [{"name": "generator.pt", "bytes": 5, "sha256": "0a" * 32}]
    source = {"item": "generator", "key": "generator", "alpha": None, "files": files}
    sizes = {"model": OtherConfig(), "text": bundles.TEXT, "vae": codec}
    content = {name: dataclasses.asdict(config) for name, config in sizes.items()}
    content |= {"family": OTHER.name, "method": "anchor_forcing", "sources": [source]}
    tokenizer = {"tokenizer/spiece.model": bundles.words()}
    checkpoint.write(folder, items, content | meta, tokenizer)


def publish(folder):
    """Writes random weights of the family as published ones, and returns them."""
    networks = {
        "diffusion_pytorch_model": (draw(OtherConfig()), NAMED),
        TEXT_FILE: (draw(bundles.TEXT), key_tables.UMT5),
        VAE_FILE: (draw(PATCHED), key_tables.VAE),
    }
    place = folder / "google" / "umt5-xxl"
    place.mkdir(parents=True)
    (place / "spiece.model").write_bytes(bundles.words())
    (folder / "config.json").write_text('{"num_heads": 2, "patch_size": [1, 2, 2]}')
    for stem, (tree, table) in networks.items():
        leaves = trees.flatten(tree)
        named = {
            one.name: one.take(leaves[one.path]) for one in convert.places(tree, table)
        }
        save_file(named, folder / f"{stem}.safetensors")
    return [tree for tree, _ in networks.values()]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(spec.FAMILIES, OTHER.name, OtherConfig)
    monkeypatch.setitem(key_tables.TABLES, ("generator", OTHER.name), NAMED)
    monkeypatch.setitem(vae.VAES, OTHER.name, PATCHED)
    monkeypatch.setitem(recipe._PARTS, OtherConfig.__name__, OtherConfig)  # noqa: SLF001


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "weights"
    save(folder)
    return folder


@pytest.mark.slow
def test_another_family_samples_from_prompts_to_a_video(
    tmp_path, monkeypatch, capsys, weights
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    given = ["--config=interactive", f"--config.weights={weights}", "--out=out"]
    given += [f"--config.prompt={bundles.RED}[0.5s] | {bundles.BLUE}[3f]"]

    assert main.main(["sample", *given, "--config.size=64x96"]) == 0

    with av.open("out/000.mp4") as container:
        stream = container.streams.video[0]
        frames = [one.to_ndarray(format="rgb24") for one in container.decode(stream)]
        assert stream.average_rate == OTHER.frames_per_second
    # Half a second is 12 pixel frames, 3 latent frames. Small videos are enlarged.
    assert np.shape(frames) == (1 + 4 * 5, 4 * 64, 4 * 96, 3)
    assert len(np.unique(frames[0])) > 1
    stored = json.loads(pathlib.Path("out/000.json").read_text())
    assert [one["landed"] for one in stored["prompts"]] == [0, 3]
    assert stored["setup"]["model"]["kind"] == "OtherConfig"
    assert stored["setup"]["grid"] == {"kind": "LatentGrid", "height": 4, "width": 6}
    capsys.readouterr()
    again = ["replay", "out/000.json", "--check", f"--weights={weights}"]
    assert main.main(again) == 0
    assert "identical: 2 of 2 blocks" in capsys.readouterr().out


@pytest.mark.slow
def test_published_weights_are_ported_by_the_table_of_the_family(tmp_path, capsys):
    generator, _, codec = publish(tmp_path / "in")
    given = ["port", f"--wan={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]

    assert main.main(given) == 2
    assert "no rule claims it" in capsys.readouterr().err
    assert main.main([*given, f"--family={OTHER.name}"]) == 0

    bundle = load_bundle(str(tmp_path / "out"), dtype="float32")
    assert bundle.model == OtherConfig(dtype="float32", param_dtype="float32")
    assert bundle.codec.config.strides == OTHER.strides
    pairs = (bundle.variables["params"], generator), (bundle.codec_params, codec)
    for ours, theirs in pairs:
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(UserError, match="family 'made_up'.*are those of wan2.1"):
        export(tmp_path / "out", tmp_path / "back", "wan")
    assert main.main([*given, "--family=made", "--overwrite"]) == 2
    assert "did you mean 'made_up'? families: wan2.1, " in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_counts_seconds_as_the_family_does(tmp_path, weights):
    config = load_config("interactive")
    config.weights, config.prompt = str(weights), f"{bundles.RED}[2s]"
    names = ("anchor_forcing", "longlive")

    arms = compare._make_arms(  # noqa: SLF001
        read_config(config), load_bundle(str(weights)), names, tmp_path, print
    )

    assert [jobs.scripts.all[0].frames for jobs in arms.values()] == [12, 12]


@pytest.mark.slow
def test_the_default_size_is_that_of_the_family(weights):
    bundle = load_bundle(str(weights))

    assert bundle.grid == LatentGrid(4, 6)
    with pytest.raises(UserError, match="multiples of 32 .* such as 64x96, 32x64"):
        load_bundle(str(weights), grid="24x32")
    with pytest.raises(UserError, match="multiples of 32 and 32"):
        load_bundle(str(weights), grid="48x32")


def test_an_unknown_family_is_refused(tmp_path):
    save(tmp_path / "unknown", family="wan9")

    with pytest.raises(UserError, match=r"meta.family='wan9'.*families: wan2.1"):
        load_bundle(str(tmp_path / "unknown"))


@pytest.mark.slow
def test_a_vae_of_other_strides_is_refused(tmp_path):
    save(tmp_path / "other", dataclasses.replace(PATCHED, pixel_patch=1))

    with pytest.raises(UserError, match=r"strides \(4, 8, 8\), expected \(4, 16, 16\)"):
        load_bundle(str(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("config", [PATCHED, DEEP])
def test_strides_of_a_vae_come_from_patches_or_levels(config):
    assert config.strides == OTHER.strides
    config = dataclasses.replace(config, dtype="float32")
    network = WanVae(config)
    pixels = jax.random.uniform(jax.random.key(1), (1, 5, 32, 48, 3), minval=-1)
    params = shapes.of(config)

    encoded = jax.eval_shape(
        lambda params: network.apply({"params": params}, pixels, method="encode"),
        params,
    )
    decoded = jax.eval_shape(
        lambda params, latents: network.apply(
            {"params": params}, latents, method="decode"
        ),
        params,
        encoded,
    )

    assert encoded.shape == (1, 2, 2, 3, 48)
    assert decoded.shape == pixels.shape
    with pytest.raises(ValueError, match="multiples of 16"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1, 24, 16, 3)))


def test_patches_have_channel_then_column_then_row():
    network = WanVae(PATCHED)
    pixels = np.arange(2 * 4 * 3, dtype=np.float32).reshape(1, 1, 2, 4, 3)

    patches = network._patched(pixels)  # noqa: SLF001

    assert patches.shape == (1, 1, 1, 2, 12)
    green_right_top = pixels[0, 0, 0, 1, 1]
    assert patches[0, 0, 0, 0, 1 * 4 + 1 * 2 + 0] == green_right_top
    np.testing.assert_array_equal(network._unpatched(patches), pixels)  # noqa: SLF001


def test_seconds_of_a_script_are_those_of_the_family():
    timing = Timing(block=3, rate=OTHER.latent_frames_per_second)

    assert OTHER.latent_frames_per_second == 6
    assert parse_inline("a[1s] | b", timing).switch_frames == (6,)
    entry = {"prompts": ["a", "b"], "durations": [2, 1]}
    assert parse_entry(entry, timing).switch_frames == (12,)
    most = 1_000_000 / 6
    with pytest.raises(UserError, match=f"at most {most:g}"):
        parse_entry({"prompts": ["a"], "durations": [10**400]}, timing)


def test_memory_is_counted_in_the_pixels_of_the_family():
    ours = room.need(tiny.setup(model=ModelConfig()))
    theirs = room.need(tiny.setup(model=OtherConfig()))

    assert theirs.pixels == 4 * ours.pixels


# What a family fixes, as it would be written by hand.
SIDE = r"\w*(rows|columns|height|width|side)"
LITERALS = {
    "frames of a latent": r"(?i)1 \+ 4 \*|\b4 \* \(\w+ - 1\)|pixel_frames\w* = 4\b",
    "pixels of a latent": rf"\b8 \* ([\w.]*\.)?{SIDE}|{SIDE} (\*|//|%) 8\b|8 \* 8",
    "frames per second": r"(?i)\b_?\w*(fps|frames_per_second|rate)(: \w+)? = (16|4)\b",
    "a stride": r"(?i)\b\w*(stride|cell|_pixels)(: int)? = (4|8)\b",
    "channels": r"\b(\w*channels|z_dim)(: int)? = 16\b|shape\[\d\] // 4\b",
    "a prompt": r"(?i)\btext_len(: int)? = 512\b|text_dim(: int)? = 4096\b|path, 512\)",
    "a clip": r"\b(frames|length)(: int)? = (21|81)\b",
    "a size": r"\b(480|832)\b|[\"\']480x832[\"\']",
    "a patch": r"\(1, 2, 2\)|\[1, 2, 2\]",
}
ALLOWED = {
    ("wan/spec", "a size"): "the family itself",
    ("wan/spec", "a patch"): "the family itself",
}


def code_of(path):
    """Returns a module's lines without comments, docstrings and messages."""
    lines = {}
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_prose = token.type == tokenize.STRING and " " in token.string
        if token.type == tokenize.COMMENT or is_prose:
            continue
        line, start = token.start
        before = lines.get(line, "")
        lines[line] = before.ljust(start) + token.string
    return [lines[line] for line in sorted(lines)]


def literals():
    package = pathlib.Path(anchor_jax.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").as_posix()
        for line in code_of(path):
            for kind, pattern in LITERALS.items():
                if re.search(pattern, line):
                    yield (name, kind), line.strip()


WRITTEN = """
total = 1 + 4 * (frames - 1)
total = 4 * (start - 1) + 1
_PIXEL_FRAMES = 4
size = grid.height * 8, 8 * grid.width
_CELL = 8
_STRIDE = 4
_PIXELS = 8
PIXEL_FRAMES_PER_SECOND = 16
latent_channels: int = 16
text_len: int = 512
frames: int = 21
DEFAULT = "480x832"
patch = (1, 2, 2)
"""


def test_the_search_finds_what_was_written_by_hand(tmp_path):
    (tmp_path / "module.py").write_text(WRITTEN)
    lines = code_of(tmp_path / "module.py")

    missed = [
        line
        for line in filter(None, map(str.strip, lines))
        if not any(re.search(pattern, line) for pattern in LITERALS.values())
    ]

    assert missed == []


@pytest.mark.slow
def test_what_a_family_fixes_is_written_in_one_place():
    found = dict(literals())

    assert {place: found[place] for place in found.keys() - ALLOWED} == {}
    assert found.keys() >= ALLOWED.keys(), "the list allows what is absent"

"""The inputs of `fuzz.py`: small valid files of each kind, and their changes."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil
from collections.abc import Callable

import av
import bundles
import mutations
import numpy as np
import ported
import safetensors.numpy
import tiny
import torch_files

from anchor_jax import io, media, prompts
from anchor_jax.cache.policies import POLICIES
from anchor_jax.config import load_config
from anchor_jax.porting import sources
from anchor_jax.sampling import resolve
from anchor_jax.sampling.config import read_config
from anchor_jax.streaming.recipe import load_recipe
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.snapshot import check_bundle, read_moment
from anchor_jax.training.data import videos
from anchor_jax.weights.load import load_bundle

PROMPTS = {
    "a.txt": "# a\na red ring[1s] | a blue square[20f] | night[5s#]\nplain text\n",
    "a.jsonl": '{"prompts": ["a red ring", "b"], "switch_frames": [6], "seed": 3}\n'
    '{"prompts": ["a", "b"], "durations": [1, 2.5], "id": 7}\n{"prompts": ["c"]}\n',
    "a.json": '[\n {"prompt_en": "a red ring", "dimension": ["color"]}\n]\n',
    "a.csv": 'uuid,prompt,time\n1,"a red ring, slowly",2023\n2,b,2024\n',
    "a.tsv": "uuid\tprompt\n1\ta red ring\n",
}
SETUPS = ("anchor_forcing", "causvid", "infinity_rope")
SAVED = SETUPS[:2]  # policies with snapshots


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
      share: fraction of all inputs.
      change: writes a changed copy of a valid file into a folder, and returns its path.
      read: calls the function that reads such inputs with that path.
    """

    share: int
    change: Callable[[random.Random, pathlib.Path, pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path, pathlib.Path], None]


def make_seeds(folder: pathlib.Path) -> None:
    """Writes the valid files of every kind into a new folder."""
    folder.mkdir(parents=True)
    bundles.save(folder / "bundle")
    ported.save(folder / "ported", "wan")
    shutil.copytree(folder / "ported", folder / "trained")
    io.write_json(
        folder / "trained" / "run.json",
        {"format_version": 1, "base": str(folder / "bundle")},
    )
    _make_sessions(folder)
    (folder / "prompts").mkdir()
    for name, text in PROMPTS.items():
        (folder / "prompts" / name).write_text(text, encoding="utf-8")
    _make_weights(folder)
    _make_videos(folder / "videos")


def _make_sessions(folder: pathlib.Path) -> None:
    """Saves streams, and recipes with a switch."""
    (folder / "recipes").mkdir()
    (folder / "snapshots").mkdir()
    bundle = load_bundle(str(folder / "bundle"))
    for name in SETUPS:
        session = Session(bundle, tiny.setup(POLICIES[name]), bundles.RED, seed=1)
        if name in SAVED:
            session.step()
            session.switch(bundles.GREEN, 30)
            session.save(folder / "snapshots" / f"{name}.safetensors")
        switch = {"prompt": bundles.BLUE, "requested": 2, "cut": False, "landed": 3}
        recipe = session.recipe()
        recipe |= {"prompts": [*recipe["prompts"], switch], "frames": 6}
        recipe |= {"blocks": ["0a" * 32] * 2, "config": {"weights": "tiny"}}
        io.write_json(folder / "recipes" / f"{name}.json", recipe)


def _make_weights(folder: pathlib.Path) -> None:
    place = folder / "pt"
    place.mkdir()
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    base = array(4, 6)
    whole = {
        "model": {
            "patch_embedding.weight": array(4, 3),
            "blocks.0.x": array(2).astype(np.float16),
            "view": torch_files.View(base, 2, (2, 2), (6, 1)),
            "parameter": torch_files.Parameter(array(3)),
        },
        "step": 3,
        "names": ["a", ("b", 1.5, None, True)],
    }
    torch_files.write_torch(place / "model.pt", whole)
    adapters = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": array(2, 4)
        for side in "AB"
    }
    torch_files.write_torch(place / "lora.pt", {"generator_lora": adapters})
    stored = {"lora_alpha": "4"}
    safetensors.numpy.save_file(adapters, place / "lora.safetensors", stored)


def _make_videos(folder: pathlib.Path) -> None:
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    with media.VideoWriter(folder / "a.mp4") as video:
        video.append(frames)
    # With a title and an index, like files of cameras and other programs.
    with av.open(str(folder / "b.mp4"), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    lines = [{"video": f"{name}.mp4", "caption": "a red ring"} for name in "ab"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "list.jsonl").write_text(text, encoding="utf-8")


def _pick(rng: random.Random, folder: pathlib.Path) -> pathlib.Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _put(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path


def _change_recipe(rng, seeds, folder):
    recipe = json.loads(_pick(rng, seeds / "recipes").read_bytes())
    content = mutations.change_json(rng, recipe).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content = mutations.change_bytes(rng, content)
    return _put(folder, "r.json", content)


def _read_recipe(path, seeds):
    recipe = load_recipe(path)
    bundle = _bundle(seeds)
    check_bundle(recipe, bundle, str(path))
    Session.from_recipe(bundle, recipe).check(recipe.frames)


@functools.cache
def _bundle(seeds: pathlib.Path):
    return load_bundle(str(seeds / "bundle"))


def _change_snapshot(rng, seeds, folder):
    content = _pick(rng, seeds / "snapshots").read_bytes()
    changed = mutations.change_safetensors(rng, content, ("anchor_jax_moment",))
    return _put(folder, "m.safetensors", changed)


def _read_snapshot(path, seeds):
    read_moment(path, _bundle(seeds))


def _change_bundle(rng, seeds, folder):
    shutil.copytree(seeds / "bundle", folder / "bundle")
    name = "tokenizer.model" if rng.random() < 0.1 else "model.safetensors"
    path = folder / "bundle" / name
    if name == "tokenizer.model":
        content = mutations.change_bytes(rng, path.read_bytes())
    else:
        entries = ("anchor_jax",)
        content = mutations.change_safetensors(rng, path.read_bytes(), entries)
    path.write_bytes(content)
    return folder / "bundle"


def _change_manifest(rng, seeds, folder):
    name = rng.choice(("ported", "ported", "trained"))
    shutil.copytree(seeds / name, folder / name)
    files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
    described = [path for path in files if _json(path) is not None]
    # Wrong sizes and name trees do the most harm.
    path = rng.choice(described if rng.random() < 0.8 else files)
    value = _json(path)
    if value is None:
        path.write_bytes(mutations.change_bytes(rng, path.read_bytes()))
    else:
        _put(path.parent, path.name, mutations.change_json(rng, value))
    return folder / name


def _json(path: pathlib.Path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _read_bundle(path, seeds):
    bundle = load_bundle(str(path))
    given = read_config(_config())
    config = resolve.resolve(given, bundle.metadata)
    for script in resolve.load_scripts(config):
        resolve.make_setup(config, bundle, script)
    resolve.describe_choices(given, config, bundle.metadata)


def _read_manifest(path, seeds):
    _read_bundle(path, seeds)
    bundle = load_bundle(str(path))
    _ = bundle.variables, bundle.codec_params, bundle.encode_prompts.params


@functools.cache
def _config():
    return load_config("interactive", ["--config.prompt=a red ring[1s]"])


def _change_prompts(rng, seeds, folder):
    path = _pick(rng, seeds / "prompts")
    return _put(folder, path.name, mutations.change_text(rng, path.read_bytes()))


def _read_prompts(path, seeds):
    prompts.load_scripts(prompts.Timing(block=3), path=path)


def _change_weights(rng, seeds, folder):
    path = _pick(rng, seeds / "pt")
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = mutations.change_safetensors(rng, content)
    else:
        content = mutations.change_zip(rng, content, mutations.change_pickle)
    return _put(folder, path.name, content)


def _read_weights(path, seeds):
    is_lora = path.stem == "lora"
    source = (sources.open_lora if is_lora else sources.open_generator)(path)
    for array in source.arrays.values():
        np.asarray(array).tobytes()


def _change_video(rng, seeds, folder):
    shutil.copytree(seeds / "videos", folder / "videos")
    if rng.random() < 0.3:
        path = folder / "videos" / "list.jsonl"
        path.write_bytes(mutations.change_text(rng, path.read_bytes()))
        return path
    path = folder / "videos" / f"{rng.choice('ab')}.mp4"
    content = mutations.change_boxes(rng, path.read_bytes())
    if rng.random() < 0.2:
        content = mutations.change_bytes(rng, content)
    path.write_bytes(content)
    return path


def _read_video(path, seeds):
    if path.suffix == ".mp4":
        media.read_video(path, 13, (32, 32))
        return
    for video, _ in videos.read_list(str(path)):
        media.read_video(video, 13, (32, 32))


KINDS = {
    "recipe": Kind(30, _change_recipe, _read_recipe),
    "snapshot": Kind(10, _change_snapshot, _read_snapshot),
    "bundle": Kind(5, _change_bundle, _read_bundle),
    "manifest": Kind(4, _change_manifest, _read_manifest),
    "prompts": Kind(25, _change_prompts, _read_prompts),
    "pt": Kind(16, _change_weights, _read_weights),
    "video": Kind(10, _change_video, _read_video),
}

"""`anchor-jax replay`: makes a video again, or changes its prompt from a frame on."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from anchor_jax.cli import compile_cache, sample
from anchor_jax.errors import UserError, shown
from anchor_jax.io import expand
from anchor_jax.wan.tokenizer import report_cuts

SUMMARY = (
    "Make a video again from its recipe and compare it, or continue from one of its"
    " frames with another prompt."
)
USAGE = """
anchor-jax replay out/first/000.json
anchor-jax replay out/first/000.json --check
anchor-jax replay out/first/000.json --check --until=4
anchor-jax replay out/first/000.json --at=20 --prompt="a blue ring moves up"

# Without --check a video is written to --out (default: a new folder out/<time>). With
# --check alone nothing is written. The recipe holds a digest of every block, and each
# block is compared. Differences between then and now (versions, device, weights) are
# listed first. Blocks are bit-identical only if no differences are listed. With --check
# the exit status is 1 if a block differs although no differences are listed.
# For safety, paths in recipes are ignored: give the folder of weights with --weights.
"""
ARGUMENTS = "RECIPE.json"


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "out", None, "Folder for the video. Default: a new folder out/<time>."
    )
    flags.DEFINE_bool("check", False, "Compare only, and fail if a block differs.")
    flags.DEFINE_string(
        "weights",
        None,
        "'tiny', or a folder with weights. Needed unless the recipe used 'tiny'.",
    )
    flags.DEFINE_integer("until", None, "Number of blocks to make. Default: all.")
    flags.DEFINE_integer("at", None, "Latent frame at which to switch to --prompt.")
    flags.DEFINE_string("prompt", None, "Prompt to show from --at on.")
    flags.DEFINE_integer(
        "frames",
        None,
        "Length of a video with --at, in latent frames. Default: the recipe's.",
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the command's flags, under the same names."""

    out: str | None
    check: bool
    weights: str | None
    until: int | None
    at: int | None
    prompt: str | None
    frames: int | None


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 if a block differs unexpectedly.

    Raises:
      UserError: The recipe or a flag is wrong, or the weights are not the recipe's.
    """
    path = _recipe_path(argv)
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(flags.FLAGS, name) for name in names})
    from anchor_jax.streaming.recipe import load_recipe

    stored = load_recipe(path)
    wanted = choose(stored, options)
    compile_cache.enable()
    from anchor_jax.streaming.recipe import differences, fingerprint
    from anchor_jax.streaming.session import Session
    from anchor_jax.streaming.snapshot import check_bundle
    from anchor_jax.weights.load import load_bundle

    bundle = load_bundle(
        _weights(stored.weights, options.weights),
        grid=stored.setup.grid,
        dtype=stored.setup.model.dtype,
        text_encoder=stored.text_encoder,
        lora=stored.lora,
    )
    check_bundle(stored, bundle, str(path))
    changed = differences(stored.fingerprint, fingerprint(bundle))
    for line in changed:
        print(
            f"warning: differs from the recipe, so bits may differ: {line}",
            file=sys.stderr,
        )
    cuts = report_cuts(bundle.tokenizer, _named_prompts(wanted))
    for line in filter(None, (bundle.tokenizer.note, *cuts)):
        print(f"warning: {line}", file=sys.stderr)
    if bundle.encode_prompts.frees:
        texts = [one.prompt for one in wanted.prompts]
        negative = [wanted.negative_prompt] * (wanted.setup.copies - 1)
        sample.prepare_prompts(bundle, list(dict.fromkeys(negative + texts)))
    session = Session.from_recipe(bundle, wanted)
    session.check(wanted.frames)
    if options.check and not options.out:
        digests = list(_digests(session, wanted, path.stem))
    else:
        about = {
            "config": {
                "weights": options.weights or stored.weights,
                "lora": stored.lora,
                "text_encoder": stored.text_encoder,
            }
        }
        digests = _write(session, wanted, path, options.out, about)
    for line in sample.told_switches(session.segments):
        print(line, file=sys.stderr)
    print(compare(wanted.blocks, digests))
    same = digests[: len(wanted.blocks)] == list(wanted.blocks)
    return int(options.check and not same and not changed)


def _named_prompts(recipe) -> Iterator[tuple[str, str]]:
    """Yields the (location, text) pairs that are encoded for a recipe."""
    if recipe.setup.copies > 1:
        yield "negative_prompt", recipe.negative_prompt
    for number, one in enumerate(recipe.prompts):
        yield f"prompts[{number}]", one.prompt


def choose(recipe, options: Options):
    """Returns the recipe of the requested video.

    Raises:
      UserError: The flags contradict each other, or do not fit the recipe.
    """
    if recipe.batch != 1:
        raise UserError(
            f"the recipe has batch={recipe.batch}, but this command needs batch=1,"
            " because a file holds one video; replay it with Session.from_recipe"
        )
    if options.check and not recipe.blocks:
        raise UserError(
            "--check: the recipe has no digests, so there is nothing to compare; leave"
            " --check out"
        )
    if options.at is not None or options.prompt is not None:
        return _forked(recipe, options)
    if options.frames is not None:
        raise UserError(
            "--frames needs --at and --prompt; to shorten a video use --until=BLOCKS"
        )
    blocks = recipe.frames // recipe.setup.policy.block
    until = blocks if options.until is None else options.until
    if not 1 <= until <= blocks:
        raise UserError(
            f"--until={until}: must be a number of blocks from 1 to {blocks}, the"
            " length of the recipe"
        )
    return recipe.shortened(until * recipe.setup.policy.block)


def compare(expected: Sequence[str], digests: Sequence[str]) -> str:
    """Returns a sentence on how many blocks are identical to those of the recipe."""
    if not expected:
        return "the recipe has no digests of these blocks, so none was compared"
    pairs = list(zip(expected, digests, strict=False))
    same = [one == other for one, other in pairs]
    if all(same):
        return f"identical: {len(same)} of {len(same)} blocks"
    return (
        f"different: {same.count(False)} of {len(same)} blocks, block"
        f" {same.index(False)} first (of 0 to {len(same) - 1})"
    )


def _recipe_path(argv: Sequence[str]) -> pathlib.Path:
    if len(argv) != 2:
        raise UserError(
            f"replay: got {len(argv) - 1} files, expected one recipe; give the .json"
            " beside a video"
        )
    path = expand(argv[1])
    what = {".mp4": "a video", ".png": "an image"}.get(path.suffix.lower())
    if what:
        raise UserError(
            f"{path.name} is {what}; give the recipe beside it,"
            f" {path.with_suffix('.json').name}"
        )
    return path


def _forked(recipe, options: Options):
    from anchor_jax.streaming.recipe import check_prompt

    block = recipe.setup.policy.block
    if options.at is None or options.prompt is None or options.until is not None:
        raise UserError(
            "--at and --prompt must be given together, and without --until; for"
            ' example --at=20 --prompt="a blue ring"'
        )
    check_prompt(options.prompt, "--prompt")
    if not 0 <= options.at < recipe.frames:
        raise UserError(
            f"--at={options.at}: must be a latent frame of the video, from 0 to"
            f" {recipe.frames - 1}"
        )
    landed = -(-options.at // block) * block
    frames = recipe.frames if options.frames is None else options.frames
    if frames % block or not landed < frames <= _most_frames():
        raise UserError(
            f"--frames={frames}: must be a multiple of the block size {block}, and more"
            f" than {landed}, where the prompt takes effect; try"
            f" --frames={landed + block}"
        )
    return recipe.forked(options.at, options.prompt.strip(), frames)


def _most_frames() -> int:
    from anchor_jax.streaming.recipe import MAX_FRAMES

    return MAX_FRAMES


def _weights(stored: str | None, given: str | None) -> str:
    """Returns the weights to load: the given ones, or the shipped ones."""
    if given:
        return given
    if stored in (None, "tiny"):
        return "tiny"
    raise UserError(
        f"the recipe has config.weights={shown(stored, 200)}. For safety, paths in"
        " recipes are ignored; if you trust this one, give it as --weights=FOLDER"
    )


def _digests(session, recipe, name: str) -> Iterator[str]:
    from anchor_jax.streaming.recipe import digest

    pixel_frames = recipe.setup.model.family.pixel_frames(recipe.frames)
    with sample.progress(name, pixel_frames) as bar:
        for frames, _ in session.blocks(recipe.frames):
            bar.update(len(frames))
            yield digest(frames)


def _write(session, recipe, path: pathlib.Path, out: str | None, about) -> list[str]:
    """Writes the video unless a file is there, and returns its blocks' digests."""
    with sample.open_folder(out) as folder:
        return _write_in(folder, session, recipe, path, about)


def _write_in(folder: pathlib.Path, session, recipe, path, about) -> list[str]:
    from anchor_jax.prompts import Script, Segment
    from anchor_jax.streaming.recipe import describe

    segments = [Segment(one.prompt, one.landed, one.cut) for one in recipe.prompts]
    script = Script(tuple(segments), recipe.frames)
    request = {"replay": path.stem, "script": describe(script)}
    job = sample.Job(folder / path.stem, script, recipe.setup, request)
    blocks = session.blocks(recipe.frames)
    with sample.own_folder(folder):
        # Another process may have made the files in the meantime.
        present = [file for file in job.files if file.exists()]
        if present:
            raise UserError(f"{present[0]} already exists; choose another --out")
        digests = sample.write_video(job, session, blocks, {"request": request} | about)
    print(job.file(".mp4"))
    return digests

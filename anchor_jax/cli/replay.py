"""Makes a video again from its recipe, or up to a frame and then otherwise."""

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
    "Makes a video again from the recipe beside it, says whether it is the same, or"
    " goes on from one of its frames with another prompt."
)
USAGE = """
anchor-jax replay out/first/000.json
anchor-jax replay out/first/000.json --check
anchor-jax replay out/first/000.json --check --until=4
anchor-jax replay out/first/000.json --at=20 --prompt="a blue ring moves up"

# Without --check a video is written to --out, or to a new out/<time>; with --check
# alone nothing is written. The recipe holds a digest of every block: each is compared.
# Same bits are promised where everything that is listed as different is nothing. With
# --check the exit status is 1 if a block differs although nothing else does.
# A path in a recipe is not followed: give the folder of its weights with --weights.
"""
ARGUMENTS = "RECIPE.json"


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("out", None, "Folder for the video; else a new out/<time>.")
    flags.DEFINE_bool(
        "check", False, "Whether to compare only, and fail if it differs."
    )
    flags.DEFINE_string(
        "weights", None, "'tiny', or a folder with weights; the recipe's if it is tiny."
    )
    flags.DEFINE_integer("until", None, "How many blocks to make; else all.")
    flags.DEFINE_integer("at", None, "Latent frame from which --prompt is shown.")
    flags.DEFINE_string("prompt", None, "What to show from --at on.")
    flags.DEFINE_integer("frames", None, "Length of a video with --at, latent frames.")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command was asked for; fields as the flags."""

    out: str | None
    check: bool
    weights: str | None
    until: int | None
    at: int | None
    prompt: str | None
    frames: int | None


def main(argv: Sequence[str]) -> int:
    """Runs the command; 1 if a block differs where it should not.

    Raises:
      UserError: The recipe or a flag is wrong, or the weights are others.
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
        print(f"other than in the recipe, bits may differ: {line}", file=sys.stderr)
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
    """Yields what is encoded for a recipe, after where it stands."""
    if recipe.setup.copies > 1:
        yield "negative_prompt", recipe.negative_prompt
    for number, one in enumerate(recipe.prompts):
        yield f"prompts[{number}]", one.prompt


def choose(recipe, options: Options):
    """Returns the recipe of what was asked for.

    Raises:
      UserError: The flags do not go together, or not with the recipe.
    """
    if recipe.batch != 1:
        raise UserError(
            f"the recipe's batch={recipe.batch}: expected 1, since a file holds one"
            " video; replay it with Session.from_recipe"
        )
    if options.check and not recipe.blocks:
        raise UserError(
            "--check: the recipe holds no digests, so there is nothing to compare"
            " with; leave --check out"
        )
    if options.at is not None or options.prompt is not None:
        return _forked(recipe, options)
    if options.frames is not None:
        raise UserError("--frames goes with --at and --prompt; use --until=BLOCKS")
    blocks = recipe.frames // recipe.setup.policy.block
    until = blocks if options.until is None else options.until
    if not 1 <= until <= blocks:
        raise UserError(
            f"--until={until}: expected a number of blocks from 1 to {blocks}, which is"
            " all that the recipe has"
        )
    return recipe.shortened(until * recipe.setup.policy.block)


def compare(expected: Sequence[str], digests: Sequence[str]) -> str:
    """Returns a sentence on how many blocks are those of the recipe."""
    if not expected:
        return "the recipe holds no digest of these blocks, so none was compared"
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
    return expand(argv[1])


def _forked(recipe, options: Options):
    from anchor_jax.streaming.recipe import check_prompt

    block = recipe.setup.policy.block
    if options.at is None or options.prompt is None or options.until is not None:
        raise UserError(
            "--at and --prompt go together, and without --until; for example --at=20"
            ' --prompt="a blue ring"'
        )
    check_prompt(options.prompt, "--prompt")
    if not 0 <= options.at < recipe.frames:
        raise UserError(
            f"--at={options.at}: expected a latent frame of the video, from 0 to"
            f" {recipe.frames - 1}"
        )
    landed = -(-options.at // block) * block
    frames = recipe.frames if options.frames is None else options.frames
    if frames % block or not landed < frames <= _most_frames():
        raise UserError(
            f"--frames={frames}: expected a multiple of the block of {block}, more than"
            f" {landed}, where the prompt takes effect; try --frames={landed + block}"
        )
    return recipe.forked(options.at, options.prompt.strip(), frames)


def _most_frames() -> int:
    from anchor_jax.streaming.recipe import MAX_FRAMES

    return MAX_FRAMES


def _weights(stored: str | None, given: str | None) -> str:
    """Returns the weights to load: those given, or the ones that are shipped."""
    if given:
        return given
    if stored in (None, "tiny"):
        return "tiny"
    raise UserError(
        f"the recipe's config.weights={shown(stored, 200)} is a path, and no path in a"
        " recipe is followed; if it is yours, give it with --weights=FOLDER"
    )


def _digests(session, recipe, name: str) -> Iterator[str]:
    from anchor_jax.streaming.recipe import digest

    with sample.progress(name, recipe.frames) as bar:
        for frames, _ in session.blocks(recipe.frames):
            bar.update(len(frames))
            yield digest(frames)


def _write(session, recipe, path: pathlib.Path, out: str | None, about) -> list[str]:
    """Writes the video, where no file is yet, and returns its blocks' digests."""
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
        # Another process may have made it until now.
        present = [file for file in job.files if file.exists()]
        if present:
            raise UserError(f"{present[0]} is already there; choose another --out")
        digests = sample.write_video(job, session, blocks, {"request": request} | about)
    print(job.file(".mp4"))
    return digests

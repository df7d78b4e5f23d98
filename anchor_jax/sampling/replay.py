"""Makes a video again from its recipe, or changes its prompt at a frame."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anchor_jax.errors import UserError, shown
from anchor_jax.prompts import MAX_FRAMES, Script, Segment
from anchor_jax.sampling import render, tasks
from anchor_jax.streaming.recipe import (
    Recipe,
    check_prompt,
    describe,
    differences,
    digest,
    fingerprint,
)
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.snapshot import check_bundle
from anchor_jax.wan.tokenizer import report_cuts
from anchor_jax.weights.load import load_bundle


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """The options of a replay; `anchor-jax replay --help` explains the fields."""

    out: str | None
    check: bool
    weights: str | None
    until: int | None
    at: int | None
    prompt: str | None
    frames: int | None


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The result of a replay.

    Attributes:
      lines: what was written, and how many blocks are identical.
      same: whether all compared blocks are identical.
      changed: differences between then and now that may change bits.
    """

    lines: tuple[str, ...]
    same: bool
    changed: tuple[str, ...]


def replay(
    stored: Recipe,
    path: pathlib.Path,
    options: ReplayOptions,
    tell: Callable[[str], None],
) -> Replayed:
    """Makes the video of a recipe again, or the video that the options request.

    Args:
      stored: the recipe.
      path: its file, which names the new video and appears in messages.
      options: the options of the command.
      tell: called with each warning and note for the user.

    Raises:
      UserError: The options do not fit the recipe, or the weights are not the recipe's.
    """
    wanted = choose(stored, options)
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
        tell(f"warning: differs from the recipe, so bits may differ: {line}")
    cuts = report_cuts(bundle.tokenizer, _named_prompts(wanted))
    for line in filter(None, (bundle.tokenizer.note, *cuts)):
        tell(f"warning: {line}")
    if bundle.encode_prompts.frees:
        texts = [one.prompt for one in wanted.prompts]
        negative = [wanted.negative_prompt] * (wanted.setup.copies - 1)
        render.prepare_prompts(bundle, list(dict.fromkeys(negative + texts)), tell)
    session = Session.from_recipe(bundle, wanted)
    session.check(wanted.frames)
    lines: list[str] = []
    if options.check and not options.out:
        digests = list(_digests(session, wanted, path.stem))
    else:
        config = {
            "weights": options.weights or stored.weights,
            "lora": stored.lora,
            "text_encoder": stored.text_encoder,
            "enlarge": stored.enlarge,
        }
        with tasks.open_folder(options.out) as folder:
            task = _task(folder, wanted, path)
            digests = _write(task, session, wanted, {"config": config}, tell)
        lines.append(str(task.file(".mp4")))
    for line in render.describe_switches(session.segments):
        tell(line)
    lines.append(compare(wanted.blocks, digests))
    same = digests[: len(wanted.blocks)] == list(wanted.blocks)
    return Replayed(tuple(lines), same, changed)


def _named_prompts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields the (location, text) pairs that are encoded for a recipe."""
    if recipe.setup.copies > 1:
        yield "negative_prompt", recipe.negative_prompt
    for number, one in enumerate(recipe.prompts):
        yield f"prompts[{number}]", one.prompt


def choose(recipe: Recipe, options: ReplayOptions) -> Recipe:
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
    """Returns a sentence about how many blocks are identical to the recipe's."""
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


def _forked(recipe: Recipe, options: ReplayOptions) -> Recipe:
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
    if frames % block or not landed < frames <= MAX_FRAMES:
        raise UserError(
            f"--frames={frames}: must be a multiple of the block size {block}, and more"
            f" than {landed}, where the prompt takes effect; try"
            f" --frames={landed + block}"
        )
    return recipe.forked(options.at, options.prompt.strip(), frames)


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


def _digests(session: Session, recipe: Recipe, name: str) -> Iterator[str]:
    pixel_frames = recipe.setup.model.family.pixel_frames(recipe.frames)
    with render.progress(name, pixel_frames) as bar:
        for frames, _ in session.blocks(recipe.frames):
            bar.update(len(frames))
            yield digest(frames)


def _task(folder: pathlib.Path, recipe: Recipe, path: pathlib.Path) -> tasks.VideoTask:
    segments = [Segment(one.prompt, one.landed, one.cut) for one in recipe.prompts]
    script = Script(tuple(segments), recipe.frames)
    request = {"replay": path.stem, "script": describe(script)}
    return tasks.VideoTask(folder / path.stem, script, recipe.setup, request)


def _write(
    task: tasks.VideoTask, session: Session, recipe: Recipe, about: dict[str, Any], tell
) -> list[str]:
    """Writes the video unless a file is there, and returns its blocks' digests."""
    with tasks.own_folder(task.stem.parent, tell):
        # Another process may have made the files in the meantime.
        present = [file for file in task.files if file.exists()]
        if present:
            raise UserError(f"{present[0]} already exists; choose another --out")
        blocks = session.blocks(recipe.frames)
        about = {"request": task.request} | about
        return render.write_video(task, session, blocks, about, enlarge=recipe.enlarge)

"""Makes videos from prompts: each one is written while it streams.

A function that takes `tell` calls it with each line for the user.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from anchor_jax import interrupts, io, media, processes, trees
from anchor_jax.compile_times import CompileTimes
from anchor_jax.sampling import batch, overwriting, resolve
from anchor_jax.sampling.config import negative_prompt, read_config
from anchor_jax.sampling.manifest import NAME
from anchor_jax.sampling.tasks import (
    VideoTask,
    VideoTasks,
    check_lengths,
    choose,
    make_session,
    open_folder,
    own_folder,
    warnings,
)
from anchor_jax.streaming.clock import landings
from anchor_jax.streaming.recipe import describe, digest
from anchor_jax.streaming.session import Session
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import WAN_2_1, Family
from anchor_jax.wan.tokenizer import report_cuts
from anchor_jax.weights.bundle import Bundle

Tell = Callable[[str], None]

_TILES = 8
_ENCODED_AHEAD = 10_000  # videos whose prompts are encoded together


def sample(
    config: Any, out: str | None, overwrite: bool, cache: Any, tell: Tell
) -> list[str]:
    """Makes the videos of a config and returns lines about what was written.

    Args:
      config: the sampling config, as `read_config` takes it.
      out: folder for the videos; None takes the config's, or a new one.
      overwrite: whether to replace files that another recipe made.
      cache: the folder of compiled programs, for a line to the user, or None.
      tell: see above.

    Raises:
      UserError: An input is wrong, and nothing has been written. If the disk is full,
        the videos that were finished before stay.
    """
    given = read_config(config)
    bundle = resolve.load_weights(given)
    resolved = resolve.resolve(given, bundle.metadata)
    scripts = resolve.read_scripts(resolved, bundle.model.family)
    negative = negative_prompt(resolved)
    for line in scripts.notes:
        tell(f"note: {line}")
    with open_folder(out or resolved.out) as folder:
        tasks = VideoTasks(folder, scripts, resolved, bundle, negative)
        batch.agree(tasks)
        for line in resolve.describe_choices(given, resolved, bundle.metadata):
            tell(line)
        todo, skipped = choose(tasks, overwrite)
        for warning in warnings(tasks, todo):
            tell(f"warning: {warning}")
        check_lengths(tasks, todo)
        todo, skipped = batch.agree_on_missing(lambda: choose(tasks, overwrite))
        if todo:
            with own_folder(folder, tell) as lease:
                # Another process may have made some videos in the meantime.
                todo, skipped = choose(tasks, overwrite)
                if overwrite:
                    overwriting.begin(folder)
                kept = f"; compiled programs are cached in {cache}" if cache else ""
                tell(f"preparing the model{kept}")
                times = CompileTimes(cache)
                batch.work_on(
                    *(tasks, todo, lease),
                    lambda mine, after: run(tasks, mine, overwrite, times, tell, after),
                    tell,
                )
        else:
            batch.keep_manifest(tasks, tell)
        if overwrite:
            overwriting.finish(folder)
    return _written(tasks, todo, skipped)


def run(
    tasks: VideoTasks,
    todo: Sequence[int],
    overwrite: bool,
    times: CompileTimes,
    tell: Tell,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Makes the videos with these numbers, one after another.

    `after` is called after each of them.
    """
    warm, encoded, bundle, negative = set(), frozenset(), tasks.bundle, tasks.negative
    config = dataclasses.asdict(tasks.config)
    for place, number in enumerate(todo):
        task = tasks[number]
        ahead = todo[place : place + _ENCODED_AHEAD]
        encoded = _encode_ahead(tasks, ahead, encoded, tell)
        if place == 0:
            tell("loading the generator")
            jax.block_until_ready((bundle.variables, bundle.codec_params))
        if place >= tasks.prompts_checked:
            for line in report_cuts(bundle.tokenizer, tasks.texts(number)):
                tell(f"warning: {line}")
        # Deleting the session frees its stream's device memory before the next one.
        session = make_session(bundle, task, negative)
        needed = (task.setup, session.recaches(task.script))
        if needed not in warm:
            with times.reported(*_programs(task, session), tell):
                session.warm_up(task.script)
        warm.add(needed)
        about = {"request": task.request, "config": config} | batch.made_by()
        blocks = session.play(task.script)
        write_video(task, session, blocks, about, overwrite, tasks.config.enlarge)
        for line in describe_switches(session.segments):
            tell(f"{task.stem.name}: {line}")
        del session
        after()


def _programs(task: VideoTask, session: Session) -> tuple[str, Any]:
    """Returns a description of a task's programs, and values that determine them."""
    setup, recaches = task.setup, session.recaches(task.script)
    model, switches = setup.model, ", prompt switches" if recaches else ""
    what = (
        f"the block{switches} and the decoder for"
        f" {model.family.describe_size(setup.grid)} ({model.num_layers} layers of"
        f" {model.dim})"
    )
    return what, [task.request["setup"], describe(recaches)]


def _encode_ahead(
    tasks: VideoTasks, todo: Sequence[int], encoded: frozenset, tell: Tell
) -> frozenset:
    """Prepares the text encoder for the first task, and returns the encoded prompts.

    An encoder that is freed after use first encodes the prompts of many tasks, so that
    it is loaded only once. An encoder that stays encodes each prompt on demand.
    """
    frees = tasks.bundle.encode_prompts.frees
    if encoded.issuperset(_texts(tasks, todo[0])) or (encoded and not frees):
        return encoded
    many = todo if frees else todo[:1]
    texts = dict.fromkeys(text for number in many for text in _texts(tasks, number))
    return prepare_prompts(tasks.bundle, list(texts), tell)


def _texts(tasks: VideoTasks, number: int) -> list[str]:
    return [text for _, text in tasks.texts(number)]


def prepare_prompts(bundle: Bundle, texts: Sequence[str], tell: Tell) -> frozenset:
    """Loads the text encoder and returns `texts`; encodes them if it is then freed."""
    encoder = bundle.encode_prompts
    tell(f"loading the text encoder ({_size(encoder.config)})")
    if encoder.frees:
        tell(
            "encoding 1 prompt" if len(texts) == 1 else f"encoding {len(texts)} prompts"
        )
    encoder.prepare(texts)
    return frozenset(texts)


def _size(text) -> str:
    """Returns the size of a text encoder's parameters, as text."""
    count = trees.nbytes(shapes.of(text))
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def write_video(
    task: VideoTask,
    session: Session,
    blocks,
    about: dict,
    overwrite: bool = False,
    enlarge: int | None = None,
) -> list[str]:
    """Makes one video; its files replace older ones only when all are complete.

    Args:
      task: the files and the script.
      session: the session whose recipe is written.
      blocks: frames and segment of each block, as `Session.play` yields them.
      about: entries written before those of the recipe.
      overwrite: whether to replace files that another program makes in the meantime.
      enlarge: factor by which the video file is enlarged; see `media.VideoWriter`.

    Returns:
      The digest of each block, of the pixels before they are enlarged.

    Raises:
      UserError: A file cannot be written, or another program has made it meanwhile.
    """
    with replacing_files(task, overwrite, enlarge) as (sheet, recipe, video):
        rows, digests = _stream(task, blocks, video)
        content = about | session.recipe() | {"blocks": digests}
        media.contact_sheet(rows, task.script.prompts, sheet)
        io.write_json(recipe, content)
    return digests


@contextlib.contextmanager
def replacing_files(
    task: VideoTask, overwrite: bool, enlarge: int | None
) -> Iterator[tuple[pathlib.Path, pathlib.Path, media.VideoWriter]]:
    """Yields temporary names of a task's sheet and recipe, and the writer of its video.

    At a clean exit they replace older files, all three or none. Arguments and errors
    are those of `write_video`.
    """
    sheet, recipe = task.file(".png"), task.file(".json")
    # The innermost file is published first, so that a new recipe never stands beside
    # an old video.
    with contextlib.ExitStack() as files:
        sheet_part = files.enter_context(io.replacing(sheet, not overwrite))
        recipe_part = files.enter_context(io.replacing(recipe, not overwrite))
        writer = media.VideoWriter(
            task.file(".mp4"),
            task.setup.model.family.frames_per_second,
            keep_new=not overwrite,
            enlarge=enlarge,
        )
        video = files.enter_context(writer)
        yield sheet_part, recipe_part, video
        with interrupts.uninterrupted():
            files.close()


def _stream(task: VideoTask, blocks, video) -> tuple[list[np.ndarray], list[str]]:
    """Writes the frames to the video.

    Returns:
      Some frames of each segment, for the contact sheet, and each block's digest.
    """
    script = task.script
    rows: list[list[np.ndarray]] = [[] for _ in script.segments]
    family = task.setup.model.family
    wanted = tile_frames(script, task.setup.policy.block, family)
    digests, start = [], 0
    with progress(task.stem.name, family.pixel_frames(script.frames)) as bar:
        for frames, segment in blocks:
            bar.set_postfix_str(_short(script.prompts[segment]), refresh=False)
            video.append(frames)
            digests.append(digest(frames))
            bar.update(len(frames))
            picked = wanted[segment] - start
            picked = picked[(picked >= 0) & (picked < len(frames))]
            rows[segment].append(frames[picked])
            start += len(frames)
    return [np.concatenate(row) for row in rows], digests


def progress(name: str, frames: int) -> tqdm:
    """Returns the progress bar of a video of `frames` pixel frames.

    Only one process of a job shows its own.
    """
    hidden = None if processes.is_printing() else True
    return tqdm(total=frames, unit="frame", disable=hidden, desc=name)


def describe_switches(switches) -> list[str]:
    """Returns a line for each switch that waited for the next block."""
    return [
        f"Switch requested at frame {one.requested}; starts at {one.landed}, the next"
        " block."
        for one in switches
        if one.landed != one.requested
    ]


def tile_frames(script, block: int, family: Family = WAN_2_1) -> list[np.ndarray]:
    """Returns the pixel frames of each segment to show: at most 8, evenly spaced."""
    starts = (0, *landings(script.switch_frames, block), script.frames)
    edges = [family.pixel_frames(start) for start in starts]
    return [
        np.linspace(first, end - 1, min(_TILES, end - first)).round().astype(int)
        for first, end in itertools.pairwise(edges)
    ]


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:45]}..."


def _written(
    tasks: VideoTasks, todo: Sequence[int], skipped: Sequence[int]
) -> list[str]:
    lines = []
    if skipped:
        what = "video that already exists" if len(skipped) == 1 else "existing videos"
        lines.append(f"Skipped {len(skipped)} {what}.")
    lines += [str(tasks.folder / f"{number:03d}.mp4") for number in todo]
    if len(todo) == 1:
        lines.append("Wrote 1 video, contact sheet and recipe.")
    elif todo:
        lines.append(f"Wrote {len(todo)} videos, contact sheets and recipes.")
    else:
        lines.append(f"Nothing to do in {tasks.folder}.")
    if todo and batch.has_manifest(tasks):
        lines.append(f"Manifest: {tasks.folder / NAME}")
    return lines

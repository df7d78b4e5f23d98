"""Makes the same videos under several policies, and shows them side by side."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anchor_jax import interrupts, io, media
from anchor_jax.cache.catalog import CATALOG
from anchor_jax.compile_times import CompileTimes
from anchor_jax.errors import UserError, naming, shown, suggest
from anchor_jax.sampling import panels, resolve
from anchor_jax.sampling.config import SampleConfig, negative_prompt, read_config
from anchor_jax.sampling.render import Tell, replacing_files, run, tile_frames
from anchor_jax.sampling.tasks import (
    VideoTask,
    VideoTasks,
    check_lengths,
    choose,
    open_folder,
    own_folder,
    warnings,
)
from anchor_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class PolicyComparison:
    """The videos that show several policies side by side; `tasks.choose` reads it.

    Attributes:
      folder: the folder of these videos. Each policy has a folder in it.
      arms: the videos of each policy, by its name.
    """

    folder: pathlib.Path
    arms: Mapping[str, VideoTasks]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: int) -> VideoTask:
        first = self._first[number]
        requests = {name: tasks[number].request for name, tasks in self.arms.items()}
        stem = self.folder / first.stem.name
        return VideoTask(stem, first.script, first.setup, {"policies": requests})

    @property
    def _first(self) -> VideoTasks:
        return next(iter(self.arms.values()))


def compare(
    config: Any,
    policies: Sequence[str],
    out: str | None,
    overwrite: bool,
    cache: Any,
    tell: Tell,
) -> list[str]:
    """Makes the videos of a config under several policies, with one seed.

    The videos of a policy are those of `render.sample`, in a folder named after it.

    Args:
      config: the sampling config, as `read_config` takes it. Its policy is not used.
      policies: names of the policies, at least two.
      out: folder for the videos; None takes the config's, or a new one.
      overwrite: whether to replace files that another recipe made.
      cache: the folder of compiled programs, for a line to the user, or None.
      tell: called with each line for the user.

    Returns:
      Lines about what was written.

    Raises:
      UserError: An input is wrong, or a policy cannot make a video. Nothing has been
        written.
    """
    check_policies(policies)
    given = read_config(config)
    bundle = resolve.load_weights(given)
    with open_folder(out or given.out) as folder:
        arms = _make_arms(given, bundle, policies, folder, tell)
        comparison = PolicyComparison(folder, arms)
        todo: list[int] = []
        if _is_needed(comparison, overwrite, tell):
            kept = f"; compiled programs are cached in {cache}" if cache else ""
            tell(f"preparing the model{kept}")
            with own_folder(folder, tell):
                for name, tasks in arms.items():
                    _make_videos(name, tasks, overwrite, CompileTimes(cache), tell)
                # Another process may have made some videos in the meantime.
                todo, _ = choose(comparison, overwrite)
                for number in todo:
                    _write(comparison, number, overwrite)
    return _written(comparison, todo)


def check_policies(names: Sequence[str]) -> None:
    """Raises UserError unless these are two or more different policies."""
    for name in names:
        if name not in CATALOG:
            known = suggest(name, CATALOG, "policies")
            raise UserError(f"--policies: unknown policy {shown(name)}{known}")
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"--policies={','.join(names)}: must name at least two policies, each once,"
            " such as --policies=anchor_forcing,longlive; to make a video under one"
            " policy, use anchor-jax sample --config.policy=NAME"
        )


def _make_arms(
    given: SampleConfig, bundle: Bundle, names: Sequence[str], folder, tell: Tell
) -> dict[str, VideoTasks]:
    """Returns the videos of each policy.

    Raises:
      UserError: A policy does not fit the config or the prompts, or would make videos
        of other lengths.
    """
    arms: dict[str, VideoTasks] = {}
    notes: dict[str, None] = {}
    for name in names:
        arm = dataclasses.replace(given, policy=name)
        config = resolve.resolve(arm, bundle.metadata)
        with naming(name):
            scripts = resolve.read_scripts(config, bundle.model.family)
            negative = negative_prompt(config)
            arms[name] = VideoTasks(folder / name, scripts, config, bundle, negative)
        notes |= dict.fromkeys(f"note: {line}" for line in scripts.notes)
        lines = resolve.describe_choices(arm, config, bundle.metadata)
        notes |= dict.fromkeys(lines)
    _check_equal_lengths(arms)
    for line in notes:
        tell(line)
    return arms


def _check_equal_lengths(arms: Mapping[str, VideoTasks]) -> None:
    lengths = {
        name: [script.frames for script in tasks.scripts.all]
        for name, tasks in arms.items()
    }
    first, *others = lengths
    for name in others:
        if lengths[name] != lengths[first]:
            raise UserError(
                f"{first} and {name} would make videos of different lengths, because"
                f" their blocks are of {arms[first].setup(0).policy.block} and"
                f" {arms[name].setup(0).policy.block} latent frames; give lengths that"
                " are multiples of both, such as [12f]"
            )


def _is_needed(comparison: PolicyComparison, overwrite: bool, tell: Tell) -> bool:
    """Returns whether there is anything to do, after all checks and warnings.

    Raises:
      UserError: Files of another recipe are in the way, or a policy cannot make the
        length of a video.
    """
    needed, lines = [bool(choose(comparison, overwrite)[0])], {}
    for name, tasks in comparison.arms.items():
        todo, _ = choose(tasks, overwrite)
        lines |= dict.fromkeys(warnings(tasks, todo))
        with naming(name):
            check_lengths(tasks, todo)
        needed.append(bool(todo))
    for line in lines:
        tell(f"warning: {line}")
    return any(needed)


def _make_videos(
    name: str, tasks: VideoTasks, overwrite: bool, times: CompileTimes, tell: Tell
) -> None:
    """Makes the videos of one policy that are missing."""
    with own_folder(tasks.folder, tell):
        todo, _ = choose(tasks, overwrite)
        if todo:
            tell(f"{name}: {CATALOG[name].about}")
            run(tasks, todo, overwrite, times, tell)


def _write(comparison: PolicyComparison, number: int, overwrite: bool) -> None:
    """Writes one video that shows the policies side by side, and its other files."""
    task, arms = comparison[number], comparison.arms
    paths = [tasks[number].file(".mp4") for tasks in arms.values()]
    recipes = {name: f"{name}/{task.stem.name}.json" for name in arms}
    labels = [f"{name}: {CATALOG[name].about}" for name in arms]
    family, block = task.setup.model.family, task.setup.policy.block
    wanted = set(np.concatenate(tile_frames(task.script, block, family)))
    rows: list[list[np.ndarray]] = [[] for _ in arms]
    with replacing_files(task, overwrite, enlarge=1) as (sheet, recipe, video):
        with contextlib.closing(panels.side_by_side(paths, list(arms))) as moments:
            for moment, (frames, whole) in enumerate(moments):
                interrupts.check()
                video.append(whole[None])
                for row, frame in zip(rows, frames, strict=True):
                    row += [frame] * (moment in wanted)
        media.contact_sheet(list(map(np.stack, rows)), labels, sheet)
        io.write_json(recipe, {"request": task.request, "recipes": recipes})


def _written(comparison: PolicyComparison, todo: Sequence[int]) -> list[str]:
    if not todo:
        return [f"Nothing to do in {comparison.folder}."]
    lines = [str(comparison[number].file(".mp4")) for number in todo]
    name = next(iter(comparison.arms))
    lines.append(
        f"Wrote {len(todo)} comparison{'s' * (len(todo) > 1)} of"
        f" {len(comparison.arms)} policies. The videos and recipes of a policy are in"
        f" its folder: anchor-jax replay {comparison.folder / name / '000.json'}"
    )
    return lines

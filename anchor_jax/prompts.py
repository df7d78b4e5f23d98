"""Reads scripts: prompts, and the latent frames at which they start."""

import array
import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from anchor_jax.errors import UserError, shown, suggest
from anchor_jax.io import expand
from anchor_jax.prompt_files import PromptFile, decode, prompt_field, watched
from anchor_jax.text import check_text
from anchor_jax.wan.spec import WAN_2_1

DEFAULT_SEGMENT_FRAMES = 40  # so the published lists switch at 40, 80, 120, ...
MAX_PROMPT_CHARACTERS = 10_000
MAX_SEGMENT_FRAMES = 1_000_000
MAX_FRAMES = 10_000_000
MAX_SEED = 2**63 - 1

_KEYS = ("prompts", "switch_frames", "durations", "seed")
_DURATION = re.compile(r"(?P<amount>[-+]?\d+(\.\d*)?|\.\d+)(?P<unit>[sf])(?P<cut>#?)")
_ERRORS_SHOWN = 10
_FRAMES = f"whole numbers from 0 to {MAX_FRAMES}"


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One prompt, its requested switch frame, and whether a scene cut precedes it."""

    prompt: str
    start: int
    cut: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """The prompts of one video, its length in latent frames, and its own seed."""

    segments: tuple[Segment, ...]
    frames: int
    seed: int | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts in order."""
        return tuple(segment.prompt for segment in self.segments)

    @property
    def switch_frames(self) -> tuple[int, ...]:
        """The requested switch frames: the starts of all segments but the first."""
        return tuple(segment.start for segment in self.segments[1:])

    def inline(self) -> str:
        """Returns the script as text for `parse_inline`; prompts must contain no |."""
        edges = [*(segment.start for segment in self.segments), self.frames]
        lengths = (end - start for start, end in itertools.pairwise(edges))
        return " | ".join(
            f"{segment.prompt}[{length}f{'#' * segment.cut}]"
            for segment, length in zip(self.segments, lengths, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Defaults for times that a script leaves out.

    Attributes:
      block: Latent frames per block. A switch takes effect at the next block, and the
        video's length is a multiple of the block.
      frames: The video's length in latent frames. None takes it from the script.
      seconds: Duration of an inline segment without one.
      switch_frames: Switch frames for entries of a file without times. None switches
        every 40 latent frames.
      rate: Latent frames per second of the model family.
    """

    block: int
    frames: int | None = None
    seconds: float = 5.0
    switch_frames: tuple[int, ...] | None = None
    rate: float = WAN_2_1.latent_frames_per_second

    @property
    def most_seconds(self) -> float:
        """Largest duration of a segment in seconds."""
        return MAX_SEGMENT_FRAMES / self.rate

    def __post_init__(self):
        if self.block < 1:
            raise UserError(f"block={self.block}: must be at least 1 latent frame")
        if not 0 < self.seconds <= self.most_seconds:
            raise UserError(
                f"seconds={shown(self.seconds)}: must be more than 0 and at most"
                f" {self.most_seconds:g}"
            )
        if self.frames is None:
            return
        if abs(self.frames) > MAX_FRAMES:
            raise UserError(
                f"frames={shown(self.frames)}: must be at most {MAX_FRAMES} latent"
                " frames"
            )
        if self.frames < 1 or self.frames % self.block:
            blocks = max(1, round(self.frames / self.block))
            raise UserError(
                f"frames={self.frames} must be a multiple of the block size"
                f" {self.block}; the nearest is {blocks * self.block}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Scripts:
    """The scripts of an inline text or of a file, with their locations.

    Attributes:
      all: the scripts in order.
      notes: notes about the file, such as the columns read and the lines skipped.
      file: the file, or None for inline text.
      numbers: the line or entry number of each script.
    """

    all: tuple[Script, ...]
    notes: tuple[str, ...] = ()
    file: PromptFile | None = None
    numbers: Sequence[int] = ()

    def place(self, index: int) -> str:
        """Returns a script's name in messages: its line, or "prompt"."""
        return "prompt" if self.file is None else self.file.place(self.numbers[index])


def load_scripts(
    timing: Timing,
    *,
    inline: str | None = None,
    path: str | os.PathLike | None = None,
) -> tuple[Script, ...]:
    """Returns only the scripts of `read_scripts`."""
    return read_scripts(timing, inline=inline, path=path).all


def read_scripts(
    timing: Timing,
    *,
    inline: str | None = None,
    path: str | os.PathLike | None = None,
) -> Scripts:
    """Returns the scripts of an inline text or of a file, after checking all of them.

    A file has one of four forms. Text has one inline script per line; blank lines and
    lines that start with `#` are skipped. JSON lines have one object per line. A JSON
    document is a list of such objects. A table has the suffix `.csv` or `.tsv` and a
    column `prompt`.

    Args:
      timing: The block size and the defaults.
      inline: Text such as `a red ball rolls[5s] | it bounces[20f] | night[5s#]`.
      path: The file.

    Raises:
      UserError: A script is wrong. The message names every wrong line.
    """
    if (inline is None) == (path is None):
        raise UserError("give either a prompt or a file of prompts, not both")
    if inline is not None:
        return Scripts((_named("prompt", lambda: parse_inline(inline, timing)),))
    file = PromptFile(expand(path))
    scripts, numbers = _parse_all(file, timing)
    if not scripts:
        raise UserError(f"{path}: the file has no prompts; write one script per line")
    return Scripts(tuple(scripts), tuple(file.notes()), file, numbers)


def _parse_all(file: PromptFile, timing: Timing) -> tuple[list[Script], array.array]:
    """Returns a file's scripts and line numbers; raises UserError with the errors."""
    parse = {"text": parse_inline, "lines": parse_json}.get(file.kind, parse_entry)
    scripts, numbers, errors, wrong = [], array.array("q"), [], 0
    for number, value in watched(file, "reading prompts"):
        try:
            scripts.append(parse(value, timing))
            numbers.append(number)
        except UserError as error:
            wrong += 1
            if wrong <= _ERRORS_SHOWN:
                errors.append(f"{file.place(number)}: {error}")
    if errors:
        more = wrong - _ERRORS_SHOWN
        lines = errors + [f"and {more} more"] * (more > 0)
        raise UserError("\n".join(lines))
    return scripts, numbers


def parse_inline(text: str, timing: Timing) -> Script:
    """Returns the script of `PROMPT[5s] | PROMPT[20f] | PROMPT[5s#]`.

    `5s` is seconds; a second has `timing.rate` latent frames. `20f` is latent frames.
    `#` requests a scene cut before the segment. A switch frame is the rounded sum of
    the durations before it. The length is the sum of all durations, rounded up to whole
    blocks. It is one block longer if the last prompt would otherwise take effect at the
    end.
    """
    parts = [
        _split_duration(number, part.strip(), timing)
        for number, part in enumerate(text.split("|"), start=1)
    ]
    prompts, durations, cuts = zip(*parts, strict=True)
    if cuts[0]:
        raise UserError(
            "segment 1: a scene cut (#) needs a segment before it; remove the #"
        )
    return _from_durations(prompts, durations, cuts, timing, seed=None)


def parse_json(text: str, timing: Timing) -> Script:
    """Returns the script of a JSON object, as `parse_entry` does."""
    return parse_entry(decode(text), timing)


def parse_entry(entry: Any, timing: Timing) -> Script:
    """Returns the script of an object with `prompts` and optional keys.

    A single prompt may be given as `prompt` or `prompt_en` instead. The optional keys
    are `seed`, and either `switch_frames` (latent frames, one fewer than prompts) or
    `durations` (seconds, one per prompt). If neither the timing nor the durations set
    the video's length, the last prompt lasts 40 latent frames. Other keys, which
    published files have, are ignored.

    Raises:
      UserError: The value is not such an object, or an entry is out of range.
    """
    entry = _checked_entry(entry, timing)
    prompts, seed = entry["prompts"], entry.get("seed")
    for number, prompt in enumerate(prompts, start=1):
        if re.search(r"\[[\d.]+[sf]#?\]\s*$", prompt):
            raise UserError(
                f"segment {number}: {shown(prompt)} ends with a duration, which JSON"
                " and tables would read as words of the prompt; use JSON lines, and"
                " write it in 'durations', in seconds"
            )
    cuts = [False] * len(prompts)
    if "durations" in entry:
        durations = [seconds * timing.rate for seconds in entry["durations"]]
        return _from_durations(prompts, durations, cuts, timing, seed)
    if "switch_frames" in entry:
        switches = entry["switch_frames"]
    else:
        switches = _default_switches(len(prompts), timing)
    starts = [0, *switches]
    end = starts[-1] + DEFAULT_SEGMENT_FRAMES
    frames = timing.frames or _whole_blocks(end, timing.block)
    return _checked(prompts, starts, cuts, frames, timing.block, seed)


def _named(where: str, parse: Callable[[], Script]) -> Script:
    """Returns the result of `parse`; prefixes `where` to its errors."""
    try:
        return parse()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _split_duration(number: int, part: str, timing: Timing) -> tuple[str, float, bool]:
    """Returns a prompt, its length in latent frames, and whether a cut precedes it."""
    default = timing.seconds * timing.rate
    where = f"segment {number}"
    _check_brackets(where, part)
    match = re.fullmatch(r"(?P<prompt>.*)\[(?P<inside>[^\[\]]*)\]", part, re.DOTALL)
    prompt = match["prompt"].rstrip() if match else part
    misplaced = re.search(rf"\[\s*{_DURATION.pattern}\s*\]", prompt)
    if misplaced:
        raise UserError(
            f"{where}: the duration {misplaced[0]} is inside the prompt; put | after it"
            " to start the next segment"
        )
    if match is None:
        return prompt, default, False
    inside = match["inside"].strip()
    if inside == "#":
        return prompt, default, True
    duration = _DURATION.fullmatch(inside)
    if duration is None:
        raise UserError(
            f"{where}: [{inside}] is not a duration; write [5s] for seconds, [20f] for"
            " latent frames, and # before the ] for a scene cut"
        )
    scale = timing.rate if duration["unit"] == "s" else 1
    return prompt, float(duration["amount"]) * scale, bool(duration["cut"])


def _check_brackets(where: str, part: str) -> None:
    """Raises UserError if brackets are unbalanced or nested."""
    depth = 0
    for bracket in re.findall(r"[\[\]]", part):
        depth += 1 if bracket == "[" else -1
        if depth not in (0, 1):
            break
    if depth:
        raise UserError(
            f"{where}: unbalanced brackets in {shown(part)}; write a duration at the"
            " end, like [5s]"
        )


def _checked_entry(entry: Any, timing: Timing) -> dict[str, Any]:
    """Returns a script's object after checking the type of every value."""
    if not isinstance(entry, dict):
        raise UserError(f'got {shown(entry)}, expected an object {{"prompts": [...]}}')
    field = prompt_field(entry)
    if field not in (None, "prompts"):
        entry = dict(entry)
        entry["prompts"] = [entry.pop(field)]
    _check_keys(entry)
    if "prompts" not in entry:
        fields = ", ".join(shown(key, 20) for key in list(entry)[:8]) or "none"
        raise UserError(
            f"'prompts' is missing; give a list of strings, or one 'prompt'; the"
            f" object's fields: {fields}"
        )
    prompts = entry["prompts"]
    entry = {key: value for key, value in entry.items() if value is not None}
    _check_list(field, prompts, "strings", _is_string)
    if not prompts:
        raise UserError("'prompts' is empty; give at least one")
    if not _is_whole(entry.get("seed", 0), MAX_SEED):
        raise UserError(
            f"'seed': got {shown(entry['seed'])}, expected an integer from 0 to"
            f" {MAX_SEED}"
        )
    _check_times(entry, timing)
    return entry


def _check_keys(entry: dict[str, Any]) -> None:
    """Raises UserError if a key looks misspelt; other unknown keys are allowed."""
    absent = [key for key in _KEYS if key not in entry]
    for key in entry:
        if key not in _KEYS and difflib.get_close_matches(key, absent, cutoff=0.75):
            raise UserError(f"unknown key {key!r}{suggest(key, absent, 'keys')}")


def _check_times(entry: dict[str, Any], timing: Timing) -> None:
    """Raises UserError unless an entry's times fit its prompts."""
    if "switch_frames" in entry and "durations" in entry:
        raise UserError("give 'switch_frames' or 'durations', not both")
    prompts = len(entry["prompts"])
    if "durations" in entry:
        expected = f"seconds, at most {timing.most_seconds:g}"
        is_right = functools.partial(_is_seconds, most=timing.most_seconds)
        _check_list("durations", entry["durations"], expected, is_right)
        _check_count("durations", len(entry["durations"]), prompts, "one per prompt")
    if "switch_frames" in entry:
        switches = entry["switch_frames"]
        _check_list("switch_frames", switches, _FRAMES, _is_frame)
        expected = "one for each prompt after the first"
        _check_count("switch_frames", len(switches), prompts - 1, expected)


def _check_list(
    key: str, value: Any, expected: str, is_right: Callable[[Any], bool]
) -> None:
    if not isinstance(value, list):
        raise UserError(f"{key!r}: got {shown(value)}, expected a list of {expected}")
    for element in value:
        if not is_right(element):
            raise UserError(
                f"{key!r}: got {shown(element)} in the list, expected {expected}"
            )


def _check_count(key: str, got: int, expected: int, why: str) -> None:
    if got != expected:
        raise UserError(f"{key!r}: got {got} entries, expected {expected} ({why})")


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_frame(value: Any) -> bool:
    return _is_whole(value, MAX_FRAMES)


def _is_seconds(value: Any, most: float) -> bool:
    # The values are compared, not converted, because an integer may exceed a float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= most


def _default_switches(prompts: int, timing: Timing) -> list[int]:
    """Returns the switch frames of an entry that has only prompts."""
    needed = prompts - 1
    if timing.switch_frames is None:
        switches = [DEFAULT_SEGMENT_FRAMES * n for n in range(1, prompts)]
    else:
        switches = list(timing.switch_frames[:needed])
    if len(switches) < needed:
        raise UserError(
            f"{prompts} prompts need {needed} switch frames, but the config has"
            f" {len(switches)}; give 'switch_frames' or 'durations', or fewer prompts"
        )
    if timing.frames is not None and switches and switches[-1] >= timing.frames:
        fit = 1 + sum(switch < timing.frames for switch in switches)
        raise UserError(
            f"too many prompts: the last of {prompts} starts at latent frame"
            f" {switches[-1]}, but the video has {timing.frames}; give at most {fit}"
            " prompts, or a longer video"
        )
    return switches


def _from_durations(
    prompts: Sequence[str],
    durations: Sequence[float],
    cuts: Sequence[bool],
    timing: Timing,
    seed: int | None,
) -> Script:
    """Returns the script of segments that last `durations` latent frames each."""
    for number, duration in enumerate(durations, start=1):
        if not 0 < duration <= MAX_SEGMENT_FRAMES:
            raise UserError(
                f"segment {number}: the duration of {duration:g} latent frames must be"
                f" more than 0 and at most {MAX_SEGMENT_FRAMES}"
            )
    ends = [math.floor(end + 0.5) for end in itertools.accumulate(durations)]
    last_shown = _whole_blocks(ends[-2], timing.block) if len(ends) > 1 else 0
    needed = max(ends[-1], last_shown + 1)
    frames = timing.frames or _whole_blocks(needed, timing.block)
    return _checked(prompts, [0, *ends[:-1]], cuts, frames, timing.block, seed)


def _whole_blocks(frames: int, block: int) -> int:
    """Rounds `frames` up to a multiple of the block, at least one block."""
    return max(1, math.ceil(frames / block)) * block


def _checked(
    prompts: Sequence[str],
    starts: Sequence[int],
    cuts: Sequence[bool],
    frames: int,
    block: int,
    seed: int | None,
) -> Script:
    """Returns the script after checking that every prompt is valid and is shown."""
    for number, prompt in enumerate(prompts, start=1):
        _check_prompt(number, prompt)
    if max(frames, starts[-1]) > MAX_FRAMES:
        raise UserError(
            f"the video would have {max(frames, starts[-1])} latent frames; at most"
            f" {MAX_FRAMES} are allowed; shorten it"
        )
    for number, (before, start) in enumerate(itertools.pairwise(starts), start=2):
        _check_switch(number, before, start, frames, block)
    segments = map(Segment, (prompt.strip() for prompt in prompts), starts, cuts)
    return Script(tuple(segments), frames, seed)


def _check_prompt(number: int, prompt: str) -> None:
    if not prompt.strip():
        raise UserError(f"segment {number}: the prompt is empty; write what to show")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"segment {number}: the prompt has {len(prompt)} characters; at most"
            f" {MAX_PROMPT_CHARACTERS} are allowed; shorten it"
        )
    check_text(prompt, f"segment {number}")


def _check_switch(
    number: int, before: int, start: int, frames: int, block: int
) -> None:
    """Raises UserError unless a segment and the one before it are both shown."""
    if start <= before:
        raise UserError(
            f"segment {number}: switch frame {start} is not after the previous one,"
            f" {before}; switch frames must increase"
        )
    taken, taken_before = (_whole_blocks(frame, block) for frame in (start, before))
    if taken >= frames:
        raise UserError(
            f"segment {number}: switch frame {start} is at or past the end of the"
            f" video, {frames} latent frames in blocks of {block}; switch earlier, or"
            " make the video longer"
        )
    if before and taken == taken_before:
        raise UserError(
            f"segment {number - 1} would never be shown: switch frames {before} and"
            f" {start} both take effect at frame {taken}, the next block of {block}"
        )

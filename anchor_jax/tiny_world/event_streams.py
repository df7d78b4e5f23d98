"""Scores of generated tiny-world streams with events, and of one-minute streams."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from anchor_jax import processes
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate as world
from anchor_jax.tiny_world import event_scores, events, scene
from anchor_jax.tiny_world.event_scores import SceneSpan, SegmentResult, Shown
from anchor_jax.tiny_world.events import Scene

MINUTE = (14, 13, 13, 14, 13, 13)
"""Blocks per segment of a one-minute stream with five switches."""
KINDS = (*scene.KINDS, "enter", "return")
"""Events, in the order in which scripts alternate."""
SHOWN = (
    *("background", "count", "color", "shape", "shape_iou", "direction"),
    *("adopted_soon", "on_its_way", "persists", "recalled", "jumps", "speed"),
)


def score_events(bundle, setup: StreamSetup, trial: world.MatchTrial) -> dict:
    """Returns scores by event on held-out scenes, with control and ceiling.

    Each script is the shortest that ends in its event, with at most the trial's number
    of segments. The kinds alternate.
    """
    rng = np.random.default_rng(trial.seed)
    scripts = [
        events.shortest_script(rng, KINDS[number % len(KINDS)], True)
        for number in range(trial.count)
    ]
    return _score(bundle, setup, trial, scripts, rng)


def score_long(bundle, setup: StreamSetup, trial: world.MatchTrial) -> dict:
    """Returns scores by segment of streams with as many segments as the trial."""
    rng = np.random.default_rng(trial.seed)
    scripts = [
        events.script(rng, len(trial.segments), None) for _ in range(trial.count)
    ]
    return _score(bundle, setup, trial, scripts, rng)


def _score(bundle, setup, trial: world.MatchTrial, scripts, rng) -> dict:
    order = [row for rows in _batches(scripts, trial.batch) for row in rows]
    ordered = [scripts[row] for row in order]
    others = {row: events.redraw(rng, scripts[row]) for row in order}
    batches = [
        [
            [_plain(event_scores.score_shown(one, scripts[row])) for one, row in pairs],
            [_plain(event_scores.score_shown(one, others[row])) for one, row in pairs],
        ]
        for pairs in (
            list(zip(seen, rows, strict=True))
            for rows, seen in watch(bundle, setup, trial, scripts)
        )
    ]
    joined = trial.division.join(batches)
    few = ordered[:: -(-len(ordered) // 60)]
    return {
        "generated": event_scores.aggregate(_read(joined, 0)),
        "mismatched": event_scores.aggregate(_read(joined, 1)),
        "ceiling": event_scores.ceiling(
            rng,
            functools.partial(world.roundtrip, bundle),
            few,
            max(trial.segments) * setup.policy.block,
        ),
        "streams": len(scripts),
    }


def _plain(results: Sequence[SegmentResult]) -> list[list]:
    """Returns the scores of a video's segments as JSON values."""
    return [
        [
            one.event,
            {name: bool(value) for name, value in one.flags.items()},
            {name: float(value) for name, value in one.numbers.items()},
        ]
        for one in results
    ]


def _read(joined: Sequence[Sequence], which: int) -> list[list[SegmentResult]]:
    """Returns the scores of the videos of all batches from JSON values."""
    return [
        [SegmentResult(*one) for one in video]
        for batch in joined
        for video in batch[which]
    ]


def watch(
    bundle,
    setup: StreamSetup,
    trial: world.MatchTrial,
    scripts: Sequence[Sequence[Scene]],
) -> Iterator[tuple[list[int], list[list[Shown]]]]:
    """Yields numbers of this process's scripts, and the content of their segments.

    Scripts of the same length are generated together. Every batch is full, so that one
    program serves all, and is then cut.
    """
    rng = np.random.default_rng((trial.seed, 1))
    hidden = not processes.is_printing()
    bar = tqdm(_batches(scripts, trial.batch), desc="streams", disable=hidden)
    for place, rows in enumerate(bar):
        filled = [scripts[rows[i % len(rows)]] for i in range(trial.batch)]
        by_segment = zip(*filled, strict=True)
        texts = [[events.caption(one, rng) for one in now] for now in by_segment]
        if not trial.division.has(place):
            continue
        blocks = trial.segments[: len(texts)]
        seed, negative = trial.seed + rows[0], trial.negative_prompt
        videos = world.generate(bundle, setup, texts, blocks, seed, negative)
        trial.observe(videos[: len(rows)], world.joined(texts)[: len(rows)])
        parts = [_segments(scripts[row], blocks, setup) for row in rows]
        pairs = zip(videos[: len(rows)], parts, strict=True)
        yield rows, [event_scores.measure(*pair) for pair in pairs]


def _batches(scripts: Sequence[Sequence[Scene]], batch: int) -> list[list[int]]:
    """Returns numbers of scripts of the same length, in groups of a batch."""
    by_length: dict[int, list[int]] = {}
    for row, script in enumerate(scripts):
        by_length.setdefault(len(script), []).append(row)
    return [
        rows[first : first + batch]
        for rows in by_length.values()
        for first in range(0, len(rows), batch)
    ]


def _segments(script: Sequence[Scene], blocks, setup: StreamSetup) -> list[SceneSpan]:
    lengths = [setup.policy.block * count for count in blocks]
    frames = scene.segment_pixel_frames(lengths)
    return event_scores.lay_out(list(zip(script, frames, strict=True)))


def table(result: dict) -> str:
    """Returns the scores as text: by event, by segment, and the controls."""
    rows = {f"{kind}": cells for kind, cells in result["generated"]["by_event"].items()}
    segments = result["generated"]["by_segment"]
    rows |= {f"segment {number}": cells for number, cells in segments.items()}
    for group in ("mismatched", "ceiling"):
        by_event = result[group]["by_event"]
        rows |= {f"{group}, {kind}": cells for kind, cells in by_event.items()}
    lines = [f"{'':22}" + "".join(f"{name:>13}" for name in SHOWN) + "      n"]
    for name, cells in rows.items():
        shown = "".join(f"{_value(cells.get(key)):>13}" for key in SHOWN)
        lines.append(f"{name:22}{shown}{cells['background']['n']:7d}")
    return "\n".join(lines)


def _value(cell: dict | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.get('rate', cell.get('mean')):.3f}"

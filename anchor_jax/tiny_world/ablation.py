"""The paper's ablations on the tiny world, which replace parts of a method."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES, Flush, Junction, Policy
from anchor_jax.errors import UserError
from anchor_jax.io import read_json, write_json
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate as world
from anchor_jax.tiny_world import event_scores, events
from anchor_jax.tiny_world import event_streams as trials
from anchor_jax.tiny_world import windows as world_windows
from anchor_jax.training.stages.regression_step import RegressionSpec

BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method to compare, and the numbers that the paper reports for it.

    Attributes:
      about: label of the table's row.
      policy: cache policy of the streams.
      paper: dynamic degree and CLIP score in the paper, or None.
    """

    about: str
    policy: Policy
    paper: tuple[float | None, float | None]


ARMS = {
    BASELINE: Arm("absolute RoPE, re-cache", POLICIES["longlive"], (26.4, None)),
    "bounded": Arm("bounded RoPE, re-cache", POLICIES["bounded_rope"], (29.1, None)),
    "tri_region": Arm(
        "tri-region RoPE, re-cache", POLICIES["tri_region_no_junction"], (74.83, None)
    ),
    "flush": Arm(
        "absolute RoPE, flush",
        dataclasses.replace(POLICIES["longlive"], on_switch=Flush()),
        (27.6, None),
    ),
    # Absolute RoPE does not allow a junction: the bounded rule replaces it.
    "anchors": Arm(
        "bounded RoPE, anchor re-cache",
        dataclasses.replace(POLICIES["bounded_rope"], junction=Junction()),
        (50.7, 24.22),
    ),
    "both": Arm(
        "tri-region RoPE, anchor re-cache", POLICIES["anchor_forcing"], (73.0, 23.85)
    ),
}
"""Source: Anchor Forcing, tables 4 to 6."""

TRAINED = {
    BASELINE: "longlive",
    "tri_region": "tri_region_no_junction",
    "both": "anchor_forcing",
}
"""Trained arms with their policies' names; a generator streams as it was trained."""

METRICS = {
    "speed": "signed speed / commanded",
    "all": "segments all right",
    "adopted_soon": f"switch seen in {event_scores.SOON} blocks",
    "on_its_way": "motion continues",
    "persists": "first object persists",
    "recalled": "hidden recalled",
    "jumps": "borders with a jump",
    "drift": "all right, last - first",
}


@dataclasses.dataclass(frozen=True)
class AblationTrial:
    """Streams of an arm.

    Attributes:
      scripts: number of scripts with random events.
      starts: number of streams per script, with different noise.
      segments: number of segments per script.
      blocks: number of blocks per segment.
      batch: number of streams that are generated together.
      seed: seed of the scripts.
    """

    scripts: int = 100
    starts: int = 3
    segments: int = 4
    blocks: int = 7
    batch: int = 25
    seed: int = 7

    def draw(self) -> list[list[events.Scene]]:
        """Returns the scripts, the same for every arm and start."""
        rng = np.random.default_rng(self.seed)
        return [events.script(rng, self.segments, None) for _ in range(self.scripts)]


def measure(
    bundle,
    setup: StreamSetup,
    trial: AblationTrial,
    start: int,
    negative_prompt: str = "",
) -> list[dict[str, float]]:
    """Returns the metrics of each script's stream that apply to it."""
    scripts = trial.draw()
    watched = world.MatchTrial(
        count=trial.scripts,
        batch=min(trial.batch, trial.scripts),
        segments=(trial.blocks,) * trial.segments,
        seed=trial.seed + 100_000 * (start + 1),
        negative_prompt=negative_prompt,
    )
    found: list[dict[str, float]] = [{} for _ in scripts]
    for rows, seen in trials.watch(bundle, setup, watched, scripts):
        for row, shown in zip(rows, seen, strict=True):
            results = event_scores.score_shown(shown, scripts[row])
            found[row] = stream_metrics(results)
    return found


def stream_metrics(results: Sequence[event_scores.SegmentResult]) -> dict[str, float]:
    """Returns a stream's metrics: means over the segments that have the metric."""
    found = {}
    for name in METRICS:
        values = [
            float(group[name])
            for one in results
            for group in (one.flags, one.numbers)
            if name in group
        ]
        if values:
            found[name] = float(np.mean(values))
    found["drift"] = float(results[-1].flags["all"]) - float(results[0].flags["all"])
    return found


def measure_once(path: pathlib.Path, about: Mapping[str, Any], run) -> list[dict]:
    """Returns the result of `run()`, or reads it if it is already on disk.

    Args:
      path: path of the JSON file.
      about: settings of the measurement. If the file has others or is damaged, `run` is
        called again.
      run: function that measures.
    """
    about = json.loads(json.dumps(about))
    try:
        stored = read_json(path)
    except (FileNotFoundError, UserError):
        stored = {}
    if stored.get("about") == about and _are_streams(stored.get("streams")):
        return stored["streams"]
    streams = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": about, "streams": streams})
    return streams


def _are_streams(found: Any) -> bool:
    """Returns whether a value that was read is a list of streams' metrics."""
    return isinstance(found, list) and all(
        isinstance(row, dict) and all(type(x) in (int, float) for x in row.values())
        for row in found
    )


def summarize(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> dict:
    """Returns a cell for each arm and metric, with its difference to the baseline.

    The streams of a script from several starts are averaged first, so `n` counts
    scripts, and the intervals (normal, 95 %) are over scripts. Differences compare the
    same scripts. `by_start` has the mean of each start. The intervals do not include
    the spread between starts (for trained arms, between trainings).

    Args:
      arms: metrics by name, start and script.
    """
    by_script = {
        name: {metric: _by_script(starts, metric) for metric in METRICS}
        for name, starts in arms.items()
    }
    base = by_script.get(BASELINE)
    result = {}
    for name, metrics in by_script.items():
        result[name] = {"starts": len(arms[name])}
        for metric, values in metrics.items():
            cell = {"value": _mean(list(values.values()))}
            cell["by_start"] = [_over_scripts(one, metric) for one in arms[name]]
            if base is not None and name != BASELINE:
                shared = values.keys() & base[metric]
                rises = [values[row] - base[metric][row] for row in sorted(shared)]
                cell["difference"] = _mean(rises)
            result[name][metric] = cell
    return result


def _by_script(starts, metric: str) -> dict[int, float]:
    rows: dict[int, list[float]] = {}
    for streams in starts:
        for row, stream in enumerate(streams):
            if metric in stream:
                rows.setdefault(row, []).append(stream[metric])
    return {row: float(np.mean(values)) for row, values in rows.items()}


def _over_scripts(streams: Sequence[Mapping[str, float]], metric: str) -> float | None:
    values = [one[metric] for one in streams if metric in one]
    return float(np.mean(values)) if values else None


def _mean(values: Sequence[float]) -> dict | None:
    return event_scores.mean(values) if values else None


def table(summary: Mapping[str, Any], arms: Mapping[str, Arm] = ARMS) -> str:
    """Returns the arms as a Markdown table, beside the paper's numbers.

    Each cell has a mean, half of its 95 % interval, and n. The last table has the mean
    of each start.
    """
    lines = _head("paper: dynamic degree", "paper: CLIP")
    for name, metrics in summary.items():
        cells = [_cell(metrics[metric]["value"]) for metric in METRICS]
        paper = ["-" if x is None else f"{x:g}" for x in arms[name].paper]
        lines.append(_row([arms[name].about, *cells, *paper]))
    compared = [name for name in summary if "difference" in summary[name]["all"]]
    if compared:
        lines += ["", "Differences to the baseline, on the same scripts:", "", *_head()]
    for name in compared:
        cells = [_cell(summary[name][x]["difference"], "+") for x in METRICS]
        lines.append(_row([arms[name].about, *cells]))
    lines += ["", "Each start separately:", "", *_head()]
    for name, metrics in summary.items():
        cells = [_starts(metrics[metric]["by_start"]) for metric in METRICS]
        lines.append(_row([arms[name].about, *cells]))
    return "\n".join(lines)


def _head(*more: str) -> list[str]:
    names = ["", *METRICS.values(), *more]
    return [_row(names), _row(["---"] * len(names))]


def _starts(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in values)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Mapping | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:{sign}.2f} (n=1)"
    reach = (value["high"] - value["low"]) / 2
    return f"{value['mean']:{sign}.2f} ± {reach:.2f} (n={value['n']})"


PROBE_LEVELS = (0.9, 0.6)
PROBE_SHIFTS = (3, 12, 60, 240)


def probe(bundle, setup: StreamSetup, count: int = 96, seed: int = 9) -> dict:
    """Returns the dependence of a block's denoising loss on its past.

    It uses rendered windows of streams without an event nearby. The loss of the last
    block is measured with its own past, with the past of another stream, and with its
    past moved by several RoPE distances. Each result is the difference to the first, by
    noise level. RoPE rules can have an effect only where moving the past changes the
    loss.
    """
    spec = RegressionSpec(
        model=setup.model, blocks=(3,) * 5, forcing="teacher", kernel=setup.kernel
    )
    batch = _probe_batch(bundle, count, seed)
    last = world_windows.FRAMES - setup.policy.block
    moved = {
        f"{shift} frames further": {
            **batch,
            "position": batch["position"].at[last:].add(shift),
        }
        for shift in PROBE_SHIFTS
    }
    other = jnp.roll(batch["latents"], 1, axis=0).at[:, last:]
    strange = {**batch, "latents": other.set(batch["latents"][:, last:])}
    cases = {"past of another stream": strange, **moved}

    @jax.jit
    def loss(variables, batch, clean, sigma):
        shape = clean.shape
        noise = jax.random.normal(jax.random.key(seed), shape)
        levels = jnp.full(shape[:2], sigma)
        noisy = flow.add_noise(clean, noise, levels)
        predicted = spec.predict(variables, batch, noisy, levels)
        error = jnp.square(predicted - (noise - clean))[:, last:]
        return jnp.mean(error, axis=(1, 2, 3, 4))

    result, variables = {}, bundle.variables
    for sigma in PROBE_LEVELS:
        base = np.asarray(loss(variables, batch, batch["latents"], sigma))
        rows = {"as laid out": event_scores.mean(base.tolist())}
        for name, case in cases.items():
            rise = np.asarray(loss(variables, case, batch["latents"], sigma)) - base
            rows[name] = event_scores.mean(rise.tolist())
        result[f"noise level {sigma}"] = rows
    return result


def probe_table(found: Mapping[str, Any]) -> str:
    """Returns a probe as a Markdown table."""
    names = list(next(iter(found.values())))
    lines = [_row(["loss of a block", *names]), _row(["---"] * (len(names) + 1))]
    for level, rows in found.items():
        cells = [
            f"{rows[name]['mean']:{'+' if number else ''}.4f}"
            for number, name in enumerate(names)
        ]
        lines.append(_row([level, *cells]))
    return "\n".join(lines)


def _probe_batch(bundle, count: int, seed: int) -> dict[str, jax.Array]:
    """Returns windows in the steady state, under a single prompt."""
    codec = {name: np.asarray(value) for name, value in bundle.codec_params.items()}
    windows = world_windows.sample_windows(codec, seed, 40 * count)
    steady = (windows.layout == 1) & (windows.since == 0)
    rows = np.flatnonzero(steady)[:count]
    texts = [events.caption(windows.now[row]) for row in rows]
    embedding = bundle.encode_prompts(texts)[:, None]
    latents = windows.latents[rows].astype(np.float32)
    return {
        "latents": jnp.asarray(latents),
        "embedding": jnp.asarray(embedding),
        "which": jnp.zeros((len(rows), 5), jnp.int32),
        "position": jnp.asarray(world_windows.POSITIONS[1], jnp.int32),
    }

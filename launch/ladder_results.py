"""The tiny ladder's gate and table, from the scores in its folder.

    python launch/ladder_results.py gate FOLDER
    python launch/ladder_results.py table FOLDER

`gate` ends with status 1 unless the teacher may be distilled. `table` writes
results.json and results.md, with the requirements that a distilled model meets.
"""

import json
import pathlib
import sys

from anchor_jax import io

GATE = {"shape": 0.75, "motion": 0.85}
BORDERS = 20
"""Number of latent borders in the teacher's clips."""
JUMPS = 1 - 0.865 ** (1 / 4)
"""Largest rate of jumps per border: 13.5 % of clips with four borders."""
COLUMNS = {
    "causal20": "causal teacher, 20 steps, guided",
    "causal4": "the same, 4 steps",
    "guided": "guidance distilled, 4 steps",
    "dmd": "self-forcing, 4 steps",
    "streaming": "streaming-tuned, 4 steps",
}
SWITCH_ROWS = {
    "color": "colour",
    "background": "background",
    "shape": "shape",
    "shape_iou": "shape, IoU > 0.7",
    "motion": "direction",
    "smooth": "no border jump",
}
EVENT_ROWS = {
    ("motion", "adopted_soon"): "motion changes: seen in 2 blocks",
    ("motion", "on_its_way"): "motion changes: its motion continues",
    ("color", "adopted_soon"): "colour changes: seen in 2 blocks",
    ("shape", "adopted_soon"): "shape changes: seen in 2 blocks",
    ("background", "adopted_soon"): "background changes: seen in 2 blocks",
    ("enter", "adopted_soon"): "second object enters: seen in 2 blocks",
    ("enter", "persists"): "second object enters: the first persists",
    ("return", "recalled_color"): "hidden, returns unnamed: colour recalled",
    ("return", "recalled_shape"): "hidden, returns unnamed: shape recalled",
    ("start", "speed"): "signed speed / commanded",
    ("start", "jumps"): "share of borders with a jump",
}


def read(folder: pathlib.Path, name: str) -> dict | None:
    """Returns scores, or None if they are missing."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def gate(folder: pathlib.Path) -> int:
    """Prints whether the teacher passes, and returns the exit status."""
    rates = read(folder, "teacher_clips")["held_out"]
    failed = [
        f"{name} {rates[name]['rate']:.3f} is below {least}"
        for name, least in GATE.items()
        if rates[name]["rate"] < least
    ]
    jumps = 1 - rates["smooth"]["rate"] ** (1 / BORDERS)
    if jumps > JUMPS:
        failed.append(f"jumps at {jumps:.3f} of the borders, above {JUMPS:.3f}")
    for line in failed or ["the teacher passes"]:
        sys.stdout.write(f"gate: {line}\n")
    return int(bool(failed))


def cell(found: dict | None) -> str:
    """Returns a rate or a mean with its interval."""
    if found is None:
        return "-"
    middle = found.get("rate", found.get("mean"))
    if found["low"] is None:
        return f"{middle:.2f}"
    return f"{middle:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def scores(folder: pathlib.Path) -> dict[str, dict | None]:
    """Returns all scores of a folder by name; None for those that are missing."""
    names = [f"{name}_{trial}" for name in COLUMNS for trial in ("switch", "events")]
    names += ["teacher_clips", "streaming_minute"]
    return {name: read(folder, name) for name in names}


def table(folder: pathlib.Path) -> int:
    """Writes the table and returns the exit status."""
    found = scores(folder)
    holds = claims(found)
    lines = [*rows(found), "", *(f"- {name}: {text}" for name, text in holds.items())]
    io.write_text(folder / "results.md", "\n".join(lines) + "\n")
    io.write_json(folder / "results.json", {"scores": found, "claims": holds})
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def rows(found: dict) -> list[str]:
    """Returns the Markdown table of the scores that `scores` returns."""
    switch = [found[f"{name}_switch"] for name in COLUMNS]
    events = [found[f"{name}_events"] for name in COLUMNS]
    titles = ["", *COLUMNS.values(), "ceiling", "mismatched"]
    cells = [titles, ["---"] * len(titles)]
    for key, title in SWITCH_ROWS.items():
        rates = [one and one["after_switch"][key] for one in switch]
        rates.append(found["teacher_clips"]["ceiling"][key])
        rates.append(found["streaming_switch"]["mismatched"][key])
        cells.append([title, *map(cell, rates)])
    last = found["streaming_events"]
    columns = [one and one["generated"] for one in events]
    columns += [last["ceiling"], last["mismatched"]]
    for (kind, key), title in EVENT_ROWS.items():
        rates = [one and one["by_event"].get(kind, {}).get(key) for one in columns]
        cells.append([title, *map(cell, rates)])
    return [f"| {' | '.join(row)} |" for row in cells]


def claims(found: dict) -> dict[str, str]:
    """Returns the requirements of a distilled model, and the results."""

    def rate(name: str, key: str) -> float:
        return found[f"{name}_switch"]["after_switch"][key]["rate"]

    def events(name: str) -> dict:
        return found[f"{name}_events"]["generated"]["by_event"]

    def jumps(name: str) -> float:
        return events(name)["start"]["jumps"]["mean"]

    keys = ("color", "shape", "motion")
    worst = max(rate("causal20", key) - rate("streaming", key) for key in keys)
    adopted = [
        cells["adopted_soon"]
        for kind, cells in events("streaming").items()
        # In these streams, hiding only prepares the event, which is the return.
        if "adopted_soon" in cells and kind != "hide"
    ]
    count = sum(one["n"] for one in adopted)
    share = sum(one["rate"] * one["n"] for one in adopted) / count
    return {
        "behind the 20-step teacher at most": f"{100 * worst:.1f} points",
        "IoU > 0.7 against the teacher at 4 steps": " and ".join(
            f"{rate(name, 'shape_iou'):.2f}" for name in ("streaming", "causal4")
        ),
        "borders with a jump against it": " and ".join(
            f"{jumps(name):.3f}" for name in ("streaming", "causal4")
        ),
        "switches seen in 2 blocks": f"{share:.3f} of {count}",
        **minute(found["streaming_minute"]),
    }


def minute(found: dict | None) -> dict[str, str]:
    """Returns the difference between the last and the first segment of a minute."""
    if found is None:
        return {}
    drift, first = found["generated"]["drift"], found["generated"]["by_segment"]["0"]
    return {
        f"a minute, {key}": (
            f"first ten seconds {cell(first[key])}, last minus first"
            f" {drift[key].get('difference', drift[key].get('mean')):+.2f}"
            f" [{drift[key]['low']:+.2f}, {drift[key]['high']:+.2f}]"
        )
        for key in ("background", "color", "shape", "direction", "jumps", "speed")
        if key in drift
    }


if __name__ == "__main__":
    sys.exit({"gate": gate, "table": table}[sys.argv[1]](pathlib.Path(sys.argv[2])))

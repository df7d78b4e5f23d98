"""Tables of the page of results on several devices and processes."""

from typing import Any

MESH_TITLES = (
    "data x fsdp x context x tensor",
    "losses",
    "gradients",
    "latents",
    "arrays",
    "flops",
)
STAGE_TITLES = ("stage", "processes x devices", "losses", "gradients")
TEXTS = {
    "mesh_matrix": (
        "Every mesh of 8 devices",
        "Simulated on a CPU. Losses, gradients and latents of two distillation steps, a"
        " regression step and a stream, compared with one device, relative to the"
        " largest value of each array. `arrays`: the largest ratio of an array's bytes"
        " on a device to its share. `flops`: the largest ratio of a program's"
        " operations on a device to those on one device over 8.",
    ),
    "process_matrix": (
        "Every stage by several processes",
        "Losses of two steps and gradients of the first, compared with one process,"
        " relative to the largest value of each array.",
    ),
    "kill_processes": (
        "Disturbed trainings",
        "Two processes. Every run that was disturbed is compared with an undisturbed"
        " one, bit for bit.",
    ),
}
"""Heading and sentence by the name of a result."""


def lines(name: str, measured: dict[str, Any]) -> list[list[str]]:
    """Returns the titles and rows of a result's table."""
    return {"mesh_matrix": meshes, "process_matrix": stages}.get(name, disturbances)(
        measured
    )


def meshes(measured: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each mesh that `mesh_matrix.py` has compared."""
    rows = [
        [
            " x ".join(map(str, row["mesh"])),
            *(f"{row[name]:.1e}" for name in ("losses", "gradients", "latents")),
            *(f"{row[name]:.2f}" for name in ("arrays", "flops")),
        ]
        for row in measured["meshes"]
    ]
    return [list(MESH_TITLES), *rows]


def stages(measured: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each training that `process_matrix.py` has compared."""
    rows = [
        [
            row["stage"],
            f"{row['processes']} x {row['devices']}",
            *(f"{row[name]:.1e}" for name in ("losses", "gradients")),
        ]
        for row in measured["rows"]
    ]
    return [list(STAGE_TITLES), *rows]


def disturbances(measured: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each part of `kill_processes.py`."""
    rows = [["part", "result", "faults"]]
    for part, one in measured.items():
        shown = ", ".join(f"{k}: {v}" for k, v in one.items() if k != "faults")
        rows.append([part, shown, str(len(one["faults"]))])
    return rows

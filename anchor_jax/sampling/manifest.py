"""The list of a large job's videos, a JSON line for each, in the folder of the videos.

    {"number": 0, "state": "finished", "prompts": ["..."], "seed": 0, ...}

It is made from the prompts and from the recipes beside the videos. So processes that
write it at the same time, or are lost, cannot make it wrong.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from anchor_jax import io
from anchor_jax.errors import UserError
from anchor_jax.sampling import overwriting
from anchor_jax.sampling.tasks import (
    MADE_BY,
    VideoTask,
    VideoTasks,
    file_names,
    missing,
)

NAME = "manifest.jsonl"
FINISHED, MISSING = "finished", "missing"


class Manifest:
    """The manifest of a command's videos."""

    def __init__(self, tasks: VideoTasks):
        """Reads the recipes of the videos that exist."""
        self.path = tasks.folder / NAME
        self._tasks = tasks
        self._made: dict[int, dict[str, Any]] = {}
        self.update(range(len(tasks)))

    def update(self, numbers: Iterable[int]) -> None:
        """Reads the recipes of some videos again."""
        numbers = list(numbers)
        absent = set(missing(self._tasks, numbers))
        for number in numbers:
            made = None if number in absent else _read(self._tasks[number])
            if made is None:
                self._made.pop(number, None)
            else:
                self._made[number] = made

    def is_written(self) -> bool:
        """Returns whether the file has the present state of the videos."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        return text == "".join(self._lines())

    def write(self) -> None:
        """Writes the file."""
        with io.replacing(self.path) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(self._lines())

    def _lines(self) -> Iterator[str]:
        for number in range(len(self._tasks)):
            yield json.dumps(self._entry(number), ensure_ascii=False) + "\n"

    def _entry(self, number: int) -> dict[str, Any]:
        tasks, made = self._tasks, self._made.get(number)
        script = tasks.scripts.all[number]
        sheet, recipe, video = file_names(number)
        return {
            "number": number,
            "state": MISSING if made is None else FINISHED,
            "source": tasks.scripts.place(number),
            "prompts": list(script.prompts),
            "starts": [segment.start for segment in script.segments],
            "frames": script.frames,
            "seed": tasks.seed(number),
            "files": {"video": video, "sheet": sheet, "recipe": recipe},
        } | (made or {})


def _read(task: VideoTask) -> dict[str, Any] | None:
    """Returns what a recipe says about its video, or None if it is of another one."""
    try:
        recipe = io.read_json(task.file(".json"))
    except (FileNotFoundError, UserError):
        return None
    if recipe.get("request") != task.request:
        return None
    blocks = "\n".join(map(str, recipe.get("blocks", ())))
    made_by = {**recipe.get(MADE_BY, {"process": 0, "processes": 1})}
    made_by.pop(overwriting.START, None)
    digest = hashlib.sha256(blocks.encode()).hexdigest()
    return {"digest": digest, MADE_BY: made_by}

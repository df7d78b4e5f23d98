"""Small files of a Wan2.1 folder that are copied unchanged: tokenizer, scheduler."""

import pathlib

from anchor_jax import io
from anchor_jax.filetypes import check_start
from anchor_jax.io import expand

VOCABULARY = ("spiece.model", "tokenizer.json")
TOKENIZER = (
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def find(folder: str | pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the small files of a Wan2.1 folder by their path in a checkpoint.

    Raises:
      UserError: A file is a Git LFS pointer or similar, or a config is not a JSON
        object.
    """
    folder = expand(folder)
    places = (folder / "google" / "umt5-xxl", folder / "tokenizer")
    found = {}
    for place in places:
        present = {name for name in TOKENIZER if (place / name).is_file()}
        if present & {*VOCABULARY}:
            found = {
                f"tokenizer/{name}": place / name
                for name in TOKENIZER
                if name in present
            }
            break
    if (folder / SCHEDULER).is_file():
        found[SCHEDULER] = folder / SCHEDULER
    for name, path in found.items():
        check_start(path)
        if name.endswith(".json") and not name.endswith("tokenizer.json"):
            io.read_json(path, remedy="download it again")
    return found

"""The fields of a sampling config, and their values as text and files."""

import dataclasses

from anchor_jax import media
from anchor_jax.config import from_config, with_field
from anchor_jax.errors import UserError, naming
from anchor_jax.io import expand
from anchor_jax.prompt_files import PromptFile
from anchor_jax.prompts import MAX_PROMPT_CHARACTERS, MAX_SEED
from anchor_jax.text import check_text

EVEN = "even"
"""The default noise levels, by their name for `sampler.grid`."""

# The negative prompt that the authors of Wan2.1 publish.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The section `sampler`; `configs/interactive.py` explains the fields.

    None takes the default of the weights' method.
    """

    solver: str | None
    steps: tuple[int, ...] | None
    warp: bool | None
    num_steps: int | None
    grid: str | None
    shift: float | None
    guidance: float | None
    negative_prompt: str | None
    negative_prompt_file: str | None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The fields of a config; `configs/interactive.py` explains them."""

    weights: str
    size: str | None
    dtype: str | None
    attention: str
    text_encoder: str
    lora: str
    policy: str | None
    rules: str | None
    rope: str | None
    on_switch: str | None
    window: int | None
    sink: int | None
    block: int | None
    prompt: str
    prompt_file: str | None
    frames: int | None
    seed: int
    sampler: SamplerConfig
    enlarge: int | None
    out: str | None


def read_config(config) -> SampleConfig:
    """Returns the config as a dataclass, with the type of every field checked.

    Older configs have no `sampler.grid`; it then is "even". They have no `enlarge`
    either, which then is None.

    Raises:
      UserError: A field is missing, unknown or of another type, or the seed or
        `enlarge` is out of range.
    """
    whole = {"enlarge": None, **with_field(config, "sampler", "grid", EVEN)}
    read = from_config(SampleConfig, whole, "config")
    if not 0 <= read.seed <= MAX_SEED:
        raise UserError(
            f"config.seed={read.seed}: must be an integer from 0 to {MAX_SEED}"
        )
    if read.enlarge is not None:
        media.check_enlarge("config.enlarge", read.enlarge)
    return read


def negative_prompt(config) -> str:
    """Returns the negative prompt, from its file or from the config.

    Raises:
      UserError: The file cannot be read, or its text is invalid or too long.
    """
    sampler = config.sampler
    where, text = "config.sampler.negative_prompt", sampler.negative_prompt
    if sampler.negative_prompt_file:
        where = "config.sampler.negative_prompt_file"
        with naming(where):
            file = PromptFile(expand(sampler.negative_prompt_file), comments=False)
            if file.kind != "text":
                raise UserError(
                    f"{file.path} is JSON or a table; give a plain text file"
                )
            text = " ".join(" ".join(line for _, line in file).split())
    check_text(text, where)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are"
            " allowed; shorten it"
        )
    return text

"""`anchor-jax sample`: streams videos from prompts into files."""

from collections.abc import Sequence

from absl import flags

from anchor_jax.cli import compile_cache, jobs, video_flags
from anchor_jax.cli.output import to_stderr

SUMMARY = "Make one video per line of prompts, written while it streams."
USAGE = """
anchor-jax sample --config=configs/tiny.py
anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1 --out=out/longlive
anchor-jax sample --config=tiny --config.prompt="a red ring moves up on gray[3s]"
anchor-jax sample --config=tiny --config.prompt_file=prompts.txt --out=out/batch
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER \\
    --config.prompt_file=interactive_benchmark.jsonl --out=out/benchmark

# FOLDER is a folder that anchor-jax port wrote. Fields that are None in the config take
# the values of the method that the weights were ported as. The command prints them. A
# field that you set takes precedence.
# --config.text_encoder=free drops the text encoder once the prompts are encoded;
# sharded splits it over all devices. --config.size takes 480x832, 512x832, 320x576 or
# other multiples of 16.
# Each line makes 000.mp4, 000.png (one row of frames per prompt) and 000.json (the
# recipe, from which anchor-jax replay makes the video again).
# Inline prompts: "PROMPT[5s] | PROMPT[20f] | PROMPT[5s#]". 5s is seconds, 20f is latent
# frames, # is a scene cut if the policy supports it.
# JSON lines use the format of MemFlow and Anchor Forcing. Each line has "prompts", and
# optionally "seed" (default: the config's), "switch_frames" in latent frames, or
# "durations" in seconds. Other keys are ignored. Without times, prompts switch at
# latent frames 40, 80, 120, ..., so six prompts last 240. A single prompt may be given
# as "prompt" or "prompt_en". The file may also be one JSON list of such objects, or a
# .csv or .tsv table with a column "prompt". Lines that start with # are comments. Their
# number is reported, and so is every prompt that is too long for the text encoder.
# If you repeat a command with the same --out, finished videos are skipped. Files of
# another recipe are replaced only with --overwrite.
# A file of prompts also makes manifest.jsonl, which has a line for each video: state,
# prompts, seed, files, digest. Several processes of a job (--num_processes) share the
# videos; each makes its own on its own devices. 75 means that videos are missing:
# start all processes again. launch/README.md says more.
# Compiled programs are cached in ~/.cache/anchor_jax. ANCHOR_JAX_CACHE=FOLDER sets
# another folder, ANCHOR_JAX_CACHE=off turns the cache off. Cached programs run as code,
# so a folder that other users own or can write to is not used.
# Ctrl-C or SIGTERM stops the command with status 130 and leaves no incomplete files.
"""

EXCLUSIVE = video_flags.EXCLUSIVE


def define_flags() -> None:
    """Defines the command's flags."""
    video_flags.define()
    jobs.define_flags()


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      UserError: An input is wrong, and nothing has been written. If the disk is full,
        the videos that were finished before stay.
    """
    del argv
    jobs.join("sample")
    cache = compile_cache.enable()
    from anchor_jax.sampling import render

    given = flags.FLAGS
    lines = render.sample(
        given.config, given.out, given.overwrite, cache=cache, tell=to_stderr
    )
    for line in lines:
        print(line)

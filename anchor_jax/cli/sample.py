"""`anchor-jax sample`: streams videos from prompts into files."""

import contextlib
import dataclasses
import datetime
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from anchor_jax import config as configs
from anchor_jax import interrupts, io, ownership
from anchor_jax.cli import compile_cache
from anchor_jax.errors import UserError, changes
from anchor_jax.io import expand
from anchor_jax.prompt_files import watched
from anchor_jax.wan.spec import WAN_2_1, Family
from anchor_jax.wan.tokenizer import listed, report_cuts

SUMMARY = "Make one video per line of prompts, written while it streams."
USAGE = """
anchor-jax sample --config=configs/tiny.py
anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1 --out=out/longlive
anchor-jax sample --config=tiny --config.prompt="a red ring moves up on gray[3s]"
anchor-jax sample --config=tiny --config.prompt_file=prompts.txt --out=out/batch
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER \\
    --config.prompt_file=interactive_benchmark.jsonl --out=out/benchmark

# FOLDER is a folder that anchor-jax port wrote. Fields that the config leaves open take
# the values of the method that the weights were ported as. The command prints them. A
# field that you give wins.
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
# Compiled programs are cached in ~/.cache/anchor_jax. ANCHOR_JAX_CACHE=FOLDER sets
# another folder, ANCHOR_JAX_CACHE=off turns the cache off. Cached programs run as code,
# so a folder that other users own or can write to is not used.
# Ctrl-C or SIGTERM stops the command with status 130 and leaves no incomplete files.
"""

_TILES = 8
_SUFFIXES = (".png", ".json", ".mp4")
_LOOKED_AT = 10_000  # videos whose prompts are checked before the first is made
_ENCODED_AHEAD = 10_000  # videos whose prompts are encoded together
_CHANGES_SHOWN = 3  # fields in which a recipe differs


EXCLUSIVE = (
    ("prompt", "prompt_file"),
    ("sampler.negative_prompt", "sampler.negative_prompt_file"),
)


def define_flags() -> None:
    """Defines the command's flags."""
    configs.define_config_flag()
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the videos. Default: config.out, or a new folder out/<time>.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace files that another recipe made.")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video: its files, its script and setup, and its request as plain values."""

    stem: pathlib.Path
    script: object
    setup: object
    request: dict

    def file(self, suffix: str) -> pathlib.Path:
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The video comes last: if it exists, the others exist too."""
        return tuple(self.file(suffix) for suffix in _SUFFIXES)


class Jobs:
    """The videos of one command; each description is made on demand.

    A million videos therefore take little memory.
    """

    def __init__(self, folder: pathlib.Path, scripts, config, bundle, negative: str):
        """Makes the setup of each kind of script.

        Raises:
          UserError: A field of the config is wrong, or does not fit a script.
        """
        self.folder, self.scripts, self.config = folder, scripts, config
        self.bundle, self.negative = bundle, negative
        self._setups: dict = {}
        for number in range(len(self)):
            self.setup(number)

    def __len__(self) -> int:
        return len(self.scripts.all)

    def __getitem__(self, number: int) -> Job:
        from anchor_jax.streaming.recipe import describe

        script, setup, config = (
            self.scripts.all[number],
            self.setup(number),
            self.config,
        )
        request = {
            "script": describe(script),
            "seed": config.seed if script.seed is None else script.seed,
            "setup": describe(setup),
            "negative_prompt": self.negative if setup.copies == 2 else "",
            "weights": self.bundle.digest,
            "lora": config.lora,
        }
        return Job(self.folder / f"{number:03d}", script, setup, request)

    def key(self, number: int) -> tuple:
        """Returns the values that determine a job's setup."""
        from anchor_jax import experiment

        return experiment.setup_key(self.config, self.scripts.all[number])

    def setup(self, number: int):
        """Returns the static setup of a job's stream."""
        from anchor_jax import experiment

        key = self.key(number)
        if key not in self._setups:
            script = self.scripts.all[number]
            self._setups[key] = experiment.make_setup(self.config, self.bundle, script)
        return self._setups[key]

    def texts(self, number: int) -> list[tuple[str, str]]:
        """Returns the (location, text) pairs that are encoded for a job.

        The negative prompt comes first.
        """
        guided = self.setup(number).copies - 1
        found = [("the negative prompt", self.negative)] * guided
        place, prompts = self.scripts.place(number), self.scripts.all[number].prompts
        several = len(prompts) > 1
        for segment, prompt in enumerate(prompts, 1):
            where = f"{place}, segment {segment}" if several else place
            found.append((where, prompt))
        return found


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      UserError: An input is wrong, and nothing has been written. If the disk is full,
        the videos that were finished before stay.
    """
    del argv
    cache = compile_cache.enable()
    from anchor_jax import experiment

    given = experiment.read_config(flags.FLAGS.config)
    bundle = experiment.load_weights(given)
    config = experiment.resolve(given, bundle.metadata)
    scripts = experiment.read_scripts(config, bundle.model.family)
    negative = experiment.negative_prompt(config)
    for line in scripts.notes:
        print(f"note: {line}", file=sys.stderr)
    about = {"config": dataclasses.asdict(config)}
    with open_folder(flags.FLAGS.out or config.out) as folder:
        jobs = Jobs(folder, scripts, config, bundle, negative)
        for line in experiment.told_choices(given, config, bundle.metadata):
            print(line, file=sys.stderr)
        todo, skipped = _choose(jobs, flags.FLAGS.overwrite)
        for warning in _warnings(jobs, todo):
            print(f"warning: {warning}", file=sys.stderr)
        _check_lengths(jobs, todo)
        if todo:
            with own_folder(folder):
                # Another process may have made some videos in the meantime.
                todo, skipped = _choose(jobs, flags.FLAGS.overwrite)
                kept = f"; compiled programs are cached in {cache}" if cache else ""
                print(f"preparing the model{kept}", file=sys.stderr)
                _run(jobs, todo, about)
    _report(jobs, todo, skipped)


def _run(jobs: Jobs, todo: Sequence[int], about: dict) -> None:
    """Makes the videos, one after another."""
    warm, encoded, bundle, negative = set(), frozenset(), jobs.bundle, jobs.negative
    for place, number in enumerate(todo):
        job = jobs[number]
        ahead = todo[place : place + _ENCODED_AHEAD]
        encoded = _encode_ahead(jobs, ahead, encoded)
        if place == 0:
            _load_generator(bundle)
        if place >= _LOOKED_AT:
            _print_cuts(bundle.tokenizer, jobs.texts(number))
        # Deleting the session frees its stream's device memory before the next one.
        session = _make_session(bundle, job, negative)
        needed = (job.setup, session.reruns(job.script))
        if needed not in warm:
            session.warm_up(job.script)
        warm.add(needed)
        about_job = {"request": job.request} | about
        blocks = session.play(job.script)
        write_video(job, session, blocks, about_job, flags.FLAGS.overwrite)
        for line in told_switches(session.segments):
            print(f"{job.stem.name}: {line}", file=sys.stderr)
        del session


def _encode_ahead(jobs: Jobs, todo: Sequence[int], encoded: frozenset) -> frozenset:
    """Prepares the text encoder for the first job, and returns the encoded prompts.

    An encoder that is freed after use first encodes the prompts of many jobs, so that
    it is loaded only once. An encoder that stays encodes each prompt on demand.
    """
    frees = jobs.bundle.encode_prompts.frees
    if encoded.issuperset(_texts(jobs, todo[0])) or (encoded and not frees):
        return encoded
    many = todo if frees else todo[:1]
    texts = dict.fromkeys(text for number in many for text in _texts(jobs, number))
    return prepare_prompts(jobs.bundle, list(texts))


def _texts(jobs: Jobs, number: int) -> list[str]:
    return [text for _, text in jobs.texts(number)]


def prepare_prompts(bundle, texts: Sequence[str]) -> frozenset:
    """Loads the text encoder and returns `texts`; encodes them if it is then freed."""
    encoder = bundle.encode_prompts
    print(f"loading the text encoder ({_size(encoder.config)})", file=sys.stderr)
    if encoder.frees:
        print(f"encoding {len(texts)} prompts", file=sys.stderr)
    encoder.prepare(texts)
    return frozenset(texts)


def _size(text) -> str:
    """Returns the size of a text encoder's parameters, as text."""
    from anchor_jax import trees
    from anchor_jax.wan import shapes

    count = trees.nbytes(shapes.of(text))
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _load_generator(bundle) -> None:
    print("loading the generator", file=sys.stderr)
    _wait((bundle.variables, bundle.codec_params))


def _wait(arrays) -> None:
    import jax

    jax.block_until_ready(arrays)


@contextlib.contextmanager
def open_folder(out: str | None) -> Iterator[pathlib.Path]:
    """Yields the requested folder, or makes a new one named after the time.

    A new folder that is empty at the end is removed.
    """
    if out:
        yield expand(out)
        return
    parent = pathlib.Path("out")
    made = [] if parent.exists() else [parent]
    folder = _new_folder(parent)
    try:
        yield folder
    finally:
        for empty in (folder, *made):
            with contextlib.suppress(OSError):
                empty.rmdir()


def _new_folder(parent: pathlib.Path) -> pathlib.Path:
    """Makes a new folder, even if another process starts in the same second."""
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    with io.explained(parent):
        parent.mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (now if number == 1 else f"{now}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise AssertionError


def own_folder(folder: pathlib.Path) -> ownership.Lease:
    """Returns a lease on a folder, and checks early that it is writable.

    Raises:
      UserError: Another process writes into it, or it is not writable.
    """
    return ownership.own(
        folder,
        tell=lambda line: print(line, file=sys.stderr),
        remedy="wait until it ends, stop it, or choose another --out",
    )


def _choose(jobs: Jobs, overwrite: bool) -> tuple[list[int], list[int]]:
    """Returns the numbers of the jobs to run, and of those that are finished.

    Raises:
      UserError: A job would replace a folder, or files that another recipe made.
    """
    present = set(os.listdir(jobs.folder)) if jobs.folder.is_dir() else set()
    todo, done, foreign = [], [], []
    for number in range(len(jobs)):
        names = [f"{number:03d}{suffix}" for suffix in _SUFFIXES]
        if present.isdisjoint(names):
            todo.append(number)
            continue
        files = [jobs.folder / name for name in names if name in present]
        _check_no_folder(files)
        job = jobs[number]
        stored = _stored_request(job, overwrite)
        same = stored == job.request
        if same and len(files) == len(names) and not overwrite:
            done.append(number)
            continue
        todo.append(number)
        if not same and not overwrite:
            foreign.append((files[0], stored, job.request))
    if foreign:
        raise UserError(_describe_foreign(*foreign[0], len(foreign) - 1))
    return todo, done


def _describe_foreign(
    file: pathlib.Path, stored: dict | None, request: dict, more: int
) -> str:
    """Returns the message on a file that another recipe made; names the fields.

    Args:
      file: that is in the way.
      stored: the request in its recipe, or None.
      request: what the command would make in its place.
      more: how many other videos differ too.
    """
    videos = "video" if more == 1 else "videos"
    rest = f" (and {more} other {videos})" if more else ""
    remedy = "choose another --out, or replace the files with --overwrite"
    if not isinstance(stored, dict):
        return f"{file}: no recipe of this command is beside it{rest}; {remedy}"
    lines = changes(stored, request)
    fields = ", ".join(lines[:_CHANGES_SHOWN])
    hidden = len(lines) - _CHANGES_SHOWN
    if hidden > 0:
        fields += f" and {hidden} more fields"
    return f"{file} was made by another recipe: {fields}{rest}; {remedy}"


def _check_no_folder(files: Sequence[pathlib.Path]) -> None:
    for file in files:
        if file.is_dir():
            raise UserError(
                f"{file} is a folder, but a file must be written there; move it, or"
                " choose another --out"
            )


def _stored_request(job: Job, overwrite: bool) -> dict | None:
    """Returns the request in an existing recipe, or None.

    Raises:
      UserError: The recipe is damaged, and --overwrite was not given.
    """
    from anchor_jax.io import read_json

    remedy = "choose another --out, or replace the video with --overwrite"
    try:
        return read_json(job.file(".json"), remedy=remedy).get("request")
    except FileNotFoundError:
        return None
    except UserError:
        if overwrite:
            return None
        raise


def _warnings(jobs: Jobs, todo: Sequence[int]) -> Iterator[str]:
    """Yields a warning for each input that will not have its apparent effect."""
    tokenizer, looked = jobs.bundle.tokenizer, todo[:_LOOKED_AT]
    if tokenizer.note:
        yield tokenizer.note
    texts = [one for number in looked for one in jobs.texts(number)]
    known = watched(dict.fromkeys(text for _, text in texts), "checking words")
    found = [word for text in known for word in tokenizer.unknown_words(text)]
    if found:
        unknown = dict.fromkeys(found)
        yield f"words that the model does not know: {listed(list(unknown))}"
    yield from report_cuts(tokenizer, watched(texts, "checking lengths"))
    if len(looked) < len(todo):
        yield (
            f"only the prompts of the first {len(looked)} of {len(todo)} videos were"
            " checked; later prompts that are too long are reported with their video"
        )
    guided = any(jobs.setup(number).copies == 2 for number in looked)
    if jobs.negative and todo and not guided:
        yield "the negative prompt has no effect, because sampler.guidance is 1"
    for number in looked:
        cuts = any(segment.cut for segment in jobs.scripts.all[number].segments)
        if cuts and jobs.setup(number).policy.positions.cut is None:
            yield "this policy has no scene cuts; # is read as an ordinary switch"
            return


def _print_cuts(tokenizer, texts: Sequence[tuple[str, str]]) -> None:
    for line in report_cuts(tokenizer, texts):
        print(f"warning: {line}", file=sys.stderr)


def _check_lengths(jobs: Jobs, todo: Sequence[int]) -> None:
    """Raises UserError unless every policy can make the longest of its videos."""
    longest: dict = {}
    for number in todo:
        key = jobs.key(number)
        best = longest.setdefault(key, number)
        if jobs.scripts.all[number].frames > jobs.scripts.all[best].frames:
            longest[key] = number
    for number in longest.values():
        try:
            _make_session(jobs.bundle, jobs[number], jobs.negative)
        except UserError as error:
            raise UserError(f"{jobs.scripts.place(number)}: {error}") from error


def _make_session(bundle, job: Job, negative: str):
    """Returns a session for a job, after a check that it can play the script."""
    from anchor_jax.streaming.session import Session

    first, seed = job.script.prompts[0], job.request["seed"]
    session = Session(bundle, job.setup, first, seed, negative)
    session.check(job.script.frames)
    return session


def write_video(
    job: Job, session, blocks, about: dict, overwrite: bool = False
) -> list[str]:
    """Makes one video; its files replace older ones only when all are complete.

    Args:
      job: the files and the script.
      session: the session whose recipe is written.
      blocks: frames and segment of each block, as `Session.play` yields them.
      about: entries written before those of the recipe.
      overwrite: whether to replace files that another program makes in the meantime.

    Returns:
      The digest of each block.

    Raises:
      UserError: A file cannot be written, or another program has made it meanwhile.
    """
    from anchor_jax import media

    sheet, recipe = job.file(".png"), job.file(".json")
    # The innermost file is published first, so that a new recipe never stands beside
    # an old video.
    with contextlib.ExitStack() as files:
        sheet_part = files.enter_context(io.replacing(sheet, not overwrite))
        recipe_part = files.enter_context(io.replacing(recipe, not overwrite))
        rate = job.setup.model.family.frames_per_second
        writer = media.VideoWriter(job.file(".mp4"), rate, keep_new=not overwrite)
        video = files.enter_context(writer)
        rows, digests = _stream(job, blocks, video)
        content = about | session.recipe() | {"blocks": digests}
        media.contact_sheet(rows, job.script.prompts, sheet_part)
        io.write_json(recipe_part, content)
        with interrupts.uninterrupted():
            files.close()
    return digests


def _stream(job: Job, blocks, video) -> tuple[list[np.ndarray], list[str]]:
    """Writes the frames to the video.

    Returns:
      Some frames of each segment, for the contact sheet, and each block's digest.
    """
    from anchor_jax.streaming.recipe import digest

    script = job.script
    rows: list[list[np.ndarray]] = [[] for _ in script.segments]
    family = job.setup.model.family
    wanted = tile_frames(script, job.setup.policy.block, family)
    digests, start = [], 0
    with progress(job.stem.name, family.pixel_frames(script.frames)) as bar:
        for frames, segment in blocks:
            bar.set_postfix_str(_short(script.prompts[segment]), refresh=False)
            video.append(frames)
            digests.append(digest(frames))
            bar.update(len(frames))
            picked = wanted[segment] - start
            picked = picked[(picked >= 0) & (picked < len(frames))]
            rows[segment].append(frames[picked])
            start += len(frames)
    return [np.concatenate(row) for row in rows], digests


def progress(name: str, frames: int) -> tqdm:
    """Returns the progress bar of a video of `frames` pixel frames."""
    return tqdm(total=frames, unit="frame", disable=None, desc=name)


def told_switches(switches) -> list[str]:
    """Returns a line for each switch that waited for the next block."""
    return [
        f"Switch requested at frame {one.requested}; starts at {one.landed}, the next"
        " block."
        for one in switches
        if one.landed != one.requested
    ]


def tile_frames(script, block: int, family: Family = WAN_2_1) -> list[np.ndarray]:
    """Returns the pixel frames of each segment to show: at most 8, evenly spaced."""
    from anchor_jax.streaming.clock import landings

    starts = (0, *landings(script.switch_frames, block), script.frames)
    edges = [family.pixel_frames(start) for start in starts]
    return [
        np.linspace(first, end - 1, min(_TILES, end - first)).round().astype(int)
        for first, end in itertools.pairwise(edges)
    ]


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:45]}..."


def _report(jobs: Jobs, todo: Sequence[int], skipped: Sequence[int]) -> None:
    if skipped:
        what = "video that already exists" if len(skipped) == 1 else "existing videos"
        print(f"Skipped {len(skipped)} {what}.")
    for number in todo:
        print(jobs.folder / f"{number:03d}.mp4")
    if len(todo) == 1:
        print("Wrote 1 video, contact sheet and recipe.")
    elif todo:
        print(f"Wrote {len(todo)} videos, contact sheets and recipes.")
    else:
        print(f"Nothing to do in {jobs.folder}.")

"""Makes videos from prompts, written while they stream."""

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
from anchor_jax.errors import UserError
from anchor_jax.io import expand
from anchor_jax.prompt_files import watched
from anchor_jax.prompts import LATENT_FRAMES_PER_SECOND
from anchor_jax.wan.tokenizer import listed, report_cuts

SUMMARY = "Makes a video for every line of prompts, and writes it while it streams."
USAGE = """
anchor-jax sample --config=configs/tiny.py
anchor-jax sample --config=configs/tiny.py:longlive --config.seed=1 --out=out/longlive
anchor-jax sample --config=tiny --config.prompt="a red ring moves up on gray[3s]"
anchor-jax sample --config=tiny --config.prompt_file=prompts.txt --out=out/batch
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER
anchor-jax sample --config=configs/interactive.py --config.weights=FOLDER \\
    --config.prompt_file=interactive_benchmark.jsonl --out=out/benchmark

# FOLDER is what anchor-jax port wrote. What the config leaves open is chosen for the
# method that the weights were ported as, and reported; a field you give wins.
# --config.text_encoder=free frees it once prompts are encoded; sharded splits it over
# all devices. --config.size=480x832, 512x832, 320x576 or other multiples of 16.
# Each line makes 000.mp4, 000.png (a row of frames per prompt) and 000.json (all
# that is needed to make it again). Prompts: "PROMPT[5s] | PROMPT[20f] | PROMPT[5s#]":
# seconds, latent frames, and # for a scene cut where the policy has one.
# A file of JSON lines is read as MemFlow's and Anchor Forcing's are: each line has
# "prompts", and perhaps a "seed" of its own (else the config's), "switch_frames" in
# latent frames, or "durations" in seconds; other keys are left out. Without times
# prompts switch at 40, 80, 120, ... latent frames, so that six last 240. One prompt
# may be "prompt" or "prompt_en". A list of such objects in one JSON document is read
# too, and of .csv and .tsv the column "prompt". Lines that start with # are comments;
# how many there are is reported, as is every prompt longer than the text encoder reads.
# Run the same command again with the same --out and finished videos are skipped;
# files of another recipe are never replaced unless you say --overwrite.
# Compiled programs are kept in ~/.cache/anchor_jax; ANCHOR_JAX_CACHE=off keeps none,
# ANCHOR_JAX_CACHE=FOLDER keeps them elsewhere. They run as code: a folder that others
# own or may write is not used.
# Ctrl-C or SIGTERM ends it with status 130 and leaves no file half made.
"""

_PIXEL_FRAMES = 4
_TILES = 8
_SUFFIXES = (".png", ".json", ".mp4")
_LOOKED_AT = 10_000  # videos whose prompts are looked at before the first is made
_ENCODED_AHEAD = 10_000  # videos whose prompts are encoded at once


EXCLUSIVE = (
    ("prompt", "prompt_file"),
    ("sampler.negative_prompt", "sampler.negative_prompt_file"),
)


def define_flags() -> None:
    """Defines the command's flags."""
    configs.define_config_flag()
    flags.DEFINE_string(
        "out", None, "Folder for the videos; the config's, or a new out/<time>."
    )
    flags.DEFINE_bool(
        "overwrite", False, "Whether to replace files that another recipe made."
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One video: its files, its script, and what defines it, as plain values."""

    stem: pathlib.Path
    script: object
    setup: object
    request: dict

    def file(self, suffix: str) -> pathlib.Path:
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The video last: it tells that the others are there."""
        return tuple(self.file(suffix) for suffix in _SUFFIXES)


class Jobs:
    """The videos of one command, each described when it is asked for.

    A million of them take little memory that way.
    """

    def __init__(self, folder: pathlib.Path, scripts, config, bundle, negative: str):
        """Makes the setup of each kind of script.

        Raises:
          UserError: A field of the config is wrong, or does not go with a script.
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
        """Returns what a job's setup depends on."""
        from anchor_jax import experiment

        return experiment.setup_key(self.config, self.scripts.all[number])

    def setup(self, number: int):
        """Returns what is static about a job's stream."""
        from anchor_jax import experiment

        key = self.key(number)
        if key not in self._setups:
            script = self.scripts.all[number]
            self._setups[key] = experiment.make_setup(self.config, self.bundle, script)
        return self._setups[key]

    def texts(self, number: int) -> list[tuple[str, str]]:
        """Returns what is encoded for a job, with where it stands.

        What guidance leads away from comes first.
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
      UserError: Something is wrong; nothing has been written then, unless the disk
        is full, which leaves the videos before.
    """
    del argv
    cache = compile_cache.enable()
    from anchor_jax import experiment

    given = experiment.read_config(flags.FLAGS.config)
    bundle = experiment.load_weights(given)
    config = experiment.resolve(given, bundle.metadata)
    scripts = experiment.read_scripts(config)
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
                # Another process may have made some meanwhile.
                todo, skipped = _choose(jobs, flags.FLAGS.overwrite)
                kept = f"; compiled programs are kept in {cache}" if cache else ""
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
        # Its stream leaves the device with it, before the next one.
        session = _make_session(bundle, job, negative)
        needed = (job.setup, session.reruns(job.script))
        if needed not in warm:
            session.warm_up(job.script)
        warm.add(needed)
        told = {"request": job.request} | about
        write_video(job, session, session.play(job.script), told, flags.FLAGS.overwrite)
        for line in told_switches(session.segments):
            print(f"{job.stem.name}: {line}", file=sys.stderr)
        del session


def _encode_ahead(jobs: Jobs, todo: Sequence[int], encoded: frozenset) -> frozenset:
    """Prepares the text encoder for the first job, and returns the prompts it knows.

    One that is freed encodes the prompts of many jobs before it goes, so that it is
    loaded once for all. Another stays, and encodes each prompt when it is asked for.
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
    """Loads the text encoder; one that is freed encodes `texts` first. Returns them."""
    encoder = bundle.encode_prompts
    print(f"loading the text encoder ({_size(encoder.config)})", file=sys.stderr)
    if encoder.frees:
        print(f"encoding {len(texts)} prompts", file=sys.stderr)
    encoder.prepare(texts)
    return frozenset(texts)


def _size(text) -> str:
    """Returns the size of a text encoder's parameters, as text."""
    import jax

    from anchor_jax.wan.text import Umt5Encoder

    ids = jax.ShapeDtypeStruct((1, text.text_len), np.int32)
    shapes = jax.eval_shape(Umt5Encoder(text).init, jax.random.key(0), ids, ids)
    count = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _load_generator(bundle) -> None:
    print("loading the generator", file=sys.stderr)
    _wait((bundle.variables, bundle.codec_params))


def _wait(arrays) -> None:
    import jax

    jax.block_until_ready(arrays)


@contextlib.contextmanager
def open_folder(out: str | None) -> Iterator[pathlib.Path]:
    """Yields the folder that was asked for, or makes a new one named after the time.

    A new one that is empty at the end is removed again.
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
    """Makes a folder that nobody else has chosen, as two do in the same second."""
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
    """Returns the right to write into a folder, and finds out early if one can.

    Raises:
      UserError: Another process writes into it, or nobody may.
    """
    return ownership.own(
        folder,
        tell=lambda line: print(line, file=sys.stderr),
        remedy="wait for it, end it, or choose another --out",
    )


def _choose(jobs: Jobs, overwrite: bool) -> tuple[list[int], list[int]]:
    """Returns the numbers of the jobs to run, and of those that are finished.

    Raises:
      UserError: A job would replace files that another recipe made, or a folder.
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
        same = _stored_request(job, overwrite) == job.request
        if same and len(files) == len(names) and not overwrite:
            done.append(number)
            continue
        todo.append(number)
        if not same and not overwrite:
            foreign.append(files[0])
    if foreign:
        more = f", and so were {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{foreign[0]} was made by another recipe or program{more}; choose another"
            " --out, or replace what is there with --overwrite"
        )
    return todo, done


def _check_no_folder(files: Sequence[pathlib.Path]) -> None:
    for file in files:
        if file.is_dir():
            raise UserError(
                f"{file} is a folder where a file shall be written; move it, or choose"
                " another --out"
            )


def _stored_request(job: Job, overwrite: bool) -> dict | None:
    """Returns what a recipe that is there was made from, or None.

    Raises:
      UserError: It is damaged, and shall not be overwritten.
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
    """Yields a line for each thing that will not have the effect it seems to have."""
    tokenizer, looked = jobs.bundle.tokenizer, todo[:_LOOKED_AT]
    if tokenizer.note:
        yield tokenizer.note
    texts = [one for number in looked for one in jobs.texts(number)]
    known = watched(dict.fromkeys(text for _, text in texts), "looks at words")
    found = [word for text in known for word in tokenizer.unknown_words(text)]
    if found:
        unknown = dict.fromkeys(found)
        yield f"words that the model does not know: {listed(list(unknown))}"
    yield from report_cuts(tokenizer, watched(texts, "looks at lengths"))
    if len(looked) < len(todo):
        yield (
            f"the first {len(looked)} of {len(todo)} videos were looked at; prompts of"
            " others that are too long are named when their video is made"
        )
    guided = any(jobs.setup(number).copies == 2 for number in looked)
    if jobs.negative and todo and not guided:
        yield "the negative prompt has no effect at guidance 1"
    for number in looked:
        cuts = any(segment.cut for segment in jobs.scripts.all[number].segments)
        if cuts and jobs.setup(number).policy.positions.cut is None:
            yield "this policy has no scene cut; # is read as an ordinary switch"
            return


def _print_cuts(tokenizer, texts: Sequence[tuple[str, str]]) -> None:
    for line in report_cuts(tokenizer, texts):
        print(f"warning: {line}", file=sys.stderr)


def _check_lengths(jobs: Jobs, todo: Sequence[int]) -> None:
    """Raises unless every policy can make the longest of its videos."""
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
    """Returns the session of a job, whose script it can play."""
    from anchor_jax.streaming.session import Session

    first, seed = job.script.prompts[0], job.request["seed"]
    session = Session(bundle, job.setup, first, seed, negative)
    session.check(job.script.frames)
    return session


def write_video(
    job: Job, session, blocks, about: dict, overwrite: bool = False
) -> list[str]:
    """Makes one video; its files take the place of older ones when all are whole.

    Args:
      job: its files and script.
      session: whose recipe is written.
      blocks: frames and segment of each block, as `Session.play` yields them.
      about: put before the recipe.
      overwrite: whether to replace files that another program makes meanwhile.

    Returns:
      The digest of each block.

    Raises:
      UserError: Files cannot be written, or are there by now and stay.
    """
    from anchor_jax import media

    sheet, recipe = job.file(".png"), job.file(".json")
    # The innermost appears first: never an old video beside a new recipe.
    with contextlib.ExitStack() as files:
        sheet_part = files.enter_context(io.replacing(sheet, not overwrite))
        recipe_part = files.enter_context(io.replacing(recipe, not overwrite))
        writer = media.VideoWriter(job.file(".mp4"), keep_new=not overwrite)
        video = files.enter_context(writer)
        rows, digests = _stream(job, blocks, video)
        content = about | session.recipe() | {"blocks": digests}
        media.contact_sheet(rows, job.script.prompts, sheet_part)
        io.write_json(recipe_part, content)
        with interrupts.uninterrupted():
            files.close()
    return digests


def _stream(job: Job, blocks, video) -> tuple[list[np.ndarray], list[str]]:
    """Writes the frames.

    Returns:
      Some frames of each segment, for the contact sheet, and each block's digest.
    """
    from anchor_jax.streaming.recipe import digest

    script = job.script
    rows: list[list[np.ndarray]] = [[] for _ in script.segments]
    wanted = tile_frames(script, job.setup.policy.block)
    digests, start = [], 0
    with progress(job.stem.name, script.frames) as bar:
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
    """Returns the bar of a video of so many latent frames."""
    total = 1 + _PIXEL_FRAMES * (frames - 1)
    return tqdm(total=total, unit="frame", disable=None, desc=name)


def told_switches(switches) -> list[str]:
    """Returns a line for each switch that waited for a block to begin."""
    return [
        f"switch asked for at {one.requested / LATENT_FRAMES_PER_SECOND:g} s,"
        f" latent frame {one.requested} -> {one.landed}"
        for one in switches
        if one.landed != one.requested
    ]


def tile_frames(script, block: int) -> list[np.ndarray]:
    """Returns the pixel frames of each segment to show: evenly spaced, at most 8."""
    from anchor_jax.streaming.clock import landings

    starts = (0, *landings(script.switch_frames, block), script.frames)
    # The first latent frame is one pixel frame, every other one four.
    edges = [max(0, _PIXEL_FRAMES * (start - 1) + 1) for start in starts]
    return [
        np.linspace(first, end - 1, min(_TILES, end - first)).round().astype(int)
        for first, end in itertools.pairwise(edges)
    ]


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:45]}..."


def _report(jobs: Jobs, todo: Sequence[int], skipped: Sequence[int]) -> None:
    if skipped:
        print(f"{len(skipped)} already there, skipped")
    for number in todo:
        print(jobs.folder / f"{number:03d}.mp4")
    if todo:
        print(f"{len(todo)} made; beside each .mp4 a .png to glance at and its recipe")
    else:
        print(f"nothing to do in {jobs.folder}")

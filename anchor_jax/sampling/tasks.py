"""The videos of one command: their files, requests, and checks before making any."""

import contextlib
import dataclasses
import datetime
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from anchor_jax import io, ownership, processes, shares
from anchor_jax.errors import UserError, changes
from anchor_jax.prompt_files import watched
from anchor_jax.prompts import Script, Scripts
from anchor_jax.sampling import overwriting, resolve
from anchor_jax.sampling.config import SampleConfig
from anchor_jax.streaming.recipe import describe
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.wan.tokenizer import listed, report_cuts
from anchor_jax.weights.bundle import Bundle

MADE_BY = "made_by"
"""Entry of a recipe: the process of a job that made the video."""

_SUFFIXES = (".png", ".json", ".mp4")
_CHANGES_SHOWN = 3  # fields in which a recipe differs


@dataclasses.dataclass(frozen=True)
class VideoTask:
    """One video: its files, its script and setup, and its request as plain values."""

    stem: pathlib.Path
    script: Script
    setup: StreamSetup
    request: dict

    def file(self, suffix: str) -> pathlib.Path:
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The video comes last: if it exists, the others exist too."""
        return tuple(self.file(suffix) for suffix in _SUFFIXES)


class VideoTasks:
    """The videos of one command; each description is made on demand.

    A million videos therefore take little memory.

    Attributes:
      prompts_checked: number of videos whose prompts are checked before the first one
        is made.
    """

    prompts_checked = 10_000

    def __init__(
        self,
        folder: pathlib.Path,
        scripts: Scripts,
        config: SampleConfig,
        bundle: Bundle,
        negative: str,
    ):
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

    def __getitem__(self, number: int) -> VideoTask:
        script, setup = self.scripts.all[number], self.setup(number)
        request = {
            "script": describe(script),
            "seed": self.seed(number),
            "setup": describe(setup),
            "negative_prompt": self.negative if setup.copies == 2 else "",
            "weights": self.bundle.digest,
            "lora": self.config.lora,
        }
        return VideoTask(self.folder / f"{number:03d}", script, setup, request)

    def seed(self, number: int) -> int:
        """Returns the seed of a task's noise."""
        own = self.scripts.all[number].seed
        return self.config.seed if own is None else own

    def key(self, number: int) -> tuple:
        """Returns the values that determine a task's setup."""
        return resolve.setup_key(self.config, self.scripts.all[number])

    def setup(self, number: int) -> StreamSetup:
        """Returns the static setup of a task's stream."""
        key = self.key(number)
        if key not in self._setups:
            script = self.scripts.all[number]
            self._setups[key] = resolve.make_setup(self.config, self.bundle, script)
        return self._setups[key]

    def texts(self, number: int) -> list[tuple[str, str]]:
        """Returns the (location, text) pairs that are encoded for a task.

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


@contextlib.contextmanager
def open_folder(out: str | None) -> Iterator[pathlib.Path]:
    """Yields the requested folder, or makes a new one named after the time.

    A new folder that is empty at the end is removed. All processes of a job get the
    folder of the first one.
    """
    if out:
        yield io.expand(out)
        return
    if not processes.is_printing():
        yield pathlib.Path(processes.share(None, shares.START))
        return
    parent = pathlib.Path("out")
    made = [] if parent.exists() else [parent]
    folder = _new_folder(parent)
    try:
        processes.share(str(folder), shares.START)
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


def own_folder(folder: pathlib.Path, tell: Callable[[str], None]) -> ownership.Lease:
    """Returns a lease on a folder, and checks early that it is writable.

    The processes of a job share the folder.

    Args:
      folder: the folder; it is made if it is missing.
      tell: called with a line while another process has the folder.

    Raises:
      UserError: Another process writes into it, or it is not writable.
    """
    job, seat = "", ""
    if processes.is_joined():
        job = ownership.job_id("sample", processes.count(), processes.key())
        seat = str(processes.index())
    remedy = "wait until it ends, stop it, or choose another --out"
    return ownership.own(folder, job, (seat,), tell=tell, remedy=remedy)


def choose(tasks: VideoTasks, overwrite: bool) -> tuple[list[int], list[int]]:
    """Returns the numbers of the tasks to run, and of those that are finished.

    With `overwrite`, only those are finished that an earlier start of the same job of
    several processes has replaced.

    Raises:
      UserError: A task would replace a folder, or files that another recipe made.
    """
    present = set(os.listdir(tasks.folder)) if tasks.folder.is_dir() else set()
    starts = overwriting.earlier_starts(tasks.folder) if overwrite else ()
    todo, done, foreign = [], [], []
    for number in range(len(tasks)):
        names = file_names(number)
        if present.isdisjoint(names):
            todo.append(number)
            continue
        files = [tasks.folder / name for name in names if name in present]
        _check_no_folder(files)
        task = tasks[number]
        recipe = _stored_recipe(task, overwrite)
        stored = recipe.get("request")
        same = stored == task.request
        made_by = recipe.get(MADE_BY)
        start = made_by.get(overwriting.START) if isinstance(made_by, dict) else None
        is_ours = isinstance(start, str) and start in starts
        if same and len(files) == len(names) and (is_ours or not overwrite):
            done.append(number)
            continue
        todo.append(number)
        if not same and not overwrite:
            foreign.append((files[0], stored, task.request))
    if foreign:
        raise UserError(_describe_foreign(*foreign[0], len(foreign) - 1))
    return todo, done


def file_names(number: int) -> list[str]:
    """Returns the names of a video's files; the video comes last."""
    return [f"{number:03d}{suffix}" for suffix in _SUFFIXES]


def missing(tasks: VideoTasks, numbers: Sequence[int]) -> list[int]:
    """Returns the numbers of the videos that do not have all their files."""
    present = set(os.listdir(tasks.folder)) if tasks.folder.is_dir() else set()
    return [one for one in numbers if not present.issuperset(file_names(one))]


class Targets:
    """The videos that a job makes, and the files that they replace."""

    def __init__(self, tasks: VideoTasks, numbers: Sequence[int]):
        """Notes the existing files. Call it before any process makes a video."""
        self._tasks, self._numbers = tasks, numbers
        folder = tasks.folder
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        old = [one for one in numbers if file_names(one)[0] in present]
        found = {number: self._state(number) for number in old}
        self._old = {number: state for number, state in found.items() if state}

    def missing(self) -> list[int]:
        """Returns the numbers of the videos that the job has not made yet."""
        absent = set(missing(self._tasks, self._numbers))
        old = {one for one, state in self._old.items() if self._state(one) == state}
        return [one for one in self._numbers if one in absent or one in old]

    def _state(self, number: int) -> tuple[int, int] | None:
        """Returns what differs when another file takes the place of a sheet.

        A video's sheet is replaced last. On a network file system, unlike stat, opening
        a file asks the server.
        """
        sheet = self._tasks.folder / file_names(number)[0]
        try:
            with sheet.open("rb") as file:
                found = os.fstat(file.fileno())
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def _describe_foreign(
    file: pathlib.Path, stored: dict | None, request: dict, more: int
) -> str:
    """Returns the message about a file of another recipe, with the fields.

    Args:
      file: the existing file.
      stored: the request in its recipe, or None.
      request: what the command would make in its place.
      more: number of other videos that differ too.
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


def _stored_recipe(task: VideoTask, overwrite: bool) -> dict:
    """Returns an existing recipe, or {}.

    Raises:
      UserError: The recipe is damaged, and --overwrite was not given.
    """
    remedy = "choose another --out, or replace the video with --overwrite"
    try:
        return io.read_json(task.file(".json"), remedy=remedy)
    except FileNotFoundError:
        return {}
    except UserError:
        if overwrite:
            return {}
        raise


def warnings(tasks: VideoTasks, todo: Sequence[int]) -> Iterator[str]:
    """Yields a warning for each input that will not have its apparent effect."""
    tokenizer, looked = tasks.bundle.tokenizer, todo[: tasks.prompts_checked]
    yield from resolve.describe_size_change(tasks.bundle)
    if tokenizer.note:
        yield tokenizer.note
    texts = [one for number in looked for one in tasks.texts(number)]
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
    guided = any(tasks.setup(number).copies == 2 for number in looked)
    if tasks.negative and todo and not guided:
        yield "the negative prompt has no effect, because sampler.guidance is 1"
    for number in looked:
        cuts = any(segment.cut for segment in tasks.scripts.all[number].segments)
        if cuts and tasks.setup(number).policy.positions.cut is None:
            yield "this policy has no scene cuts; # is read as an ordinary switch"
            return


def check_lengths(tasks: VideoTasks, todo: Sequence[int]) -> None:
    """Raises UserError unless every policy can make the longest of its videos."""
    longest: dict = {}
    for number in todo:
        key = tasks.key(number)
        best = longest.setdefault(key, number)
        if tasks.scripts.all[number].frames > tasks.scripts.all[best].frames:
            longest[key] = number
    for number in longest.values():
        try:
            make_session(tasks.bundle, tasks[number], tasks.negative)
        except UserError as error:
            raise UserError(f"{tasks.scripts.place(number)}: {error}") from error


def make_session(bundle: Bundle, task: VideoTask, negative: str) -> Session:
    """Returns a session for a task, after a check that it can play the script."""
    first, seed = task.script.prompts[0], task.request["seed"]
    session = Session(bundle, task.setup, first, seed, negative)
    session.check(task.script.frames)
    return session

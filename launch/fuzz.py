"""Tests the functions that read untrusted files with changed files of every kind.

    python launch/fuzz.py [--count=10000] [--seed=0] [--kinds recipe pt ...]
    python launch/fuzz.py --seed=0 --only=4711

Small valid files are made, changed at random (values, lengths, names, opcodes, bits),
and read in another process. An input may be read or refused with a `UserError`.
Anything else is a finding: another exception, more than 10 s, more than 2 GB, a crash,
a file opened for writing, a program started, a connection. Inputs of findings are kept
in --folder. Ends with status 1 if there are any. The same seed gives the same inputs;
--only reads one of them again in this process, with its traceback.
"""

import argparse
import collections
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 10  # processor seconds for one input
PATIENCE = 90  # seconds after which a process that hangs is killed
MEMORY = 2 * 2**30  # bytes, of the whole process
ADDRESSES = 4 * 2**30  # bytes that reading may allocate beside those of the libraries
KEPT = 20  # inputs of findings

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = (
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.system", "os.exec", "os.fork"),
    *("os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"),
    *("pickle.find_class", "shutil.rmtree", "shutil.copyfile"),
)


class Watch:
    """Records side effects of a reading function while it is armed."""

    def __init__(self):
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        writes = event == "open" and _is_write(*args) and args[0] != os.devnull
        if event in _FORBIDDEN or writes:
            self.seen.append(f"{event} {args!r:.200}")
            raise RuntimeError(f"{event} is not allowed while reading")


def _is_write(path, mode, flags) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & _WRITES)


def read_one(watch: Watch, kind, path: pathlib.Path, seeds: pathlib.Path) -> str:
    """Returns "read", "refused", or the fault in the reading of an input."""
    from anchor_jax.errors import UserError

    watch.seen, watch.armed, outcome = [], True, "read"
    try:
        kind.read(path, seeds)
    except UserError as error:
        outcome = "refused"
        if _ran_out(error):
            outcome = f"ran out of memory: {error}"
        elif len(str(error)) > 13_000:
            outcome = "an error message of unlimited length"
    except Exception:  # noqa: BLE001
        outcome = traceback.format_exc()
    finally:
        watch.armed = False
    if watch.seen:
        return f"had side effects besides reading: {'; '.join(watch.seen[:5])}"
    return outcome


def _ran_out(error: BaseException | None) -> bool:
    while error is not None:
        # FFmpeg refuses sizes above its own limits before it allocates.
        is_memory = (
            isinstance(error, MemoryError) and type(error).__module__[:2] != "av"
        )
        if is_memory or "bad_alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def make(kinds: list[str], seed: int, number: int, seeds, folder) -> tuple:
    """Returns the name of an input's kind, and its path in an empty folder."""
    rng = random.Random(f"{seed}/{number}")
    known = targets().KINDS
    (name,) = rng.choices(kinds, [known[name].share for name in kinds])
    return name, known[name].change(rng, seeds, folder)


def targets():
    """Returns the module of the kinds, which imports the package and its tests."""
    for folder in (HERE, HERE.parent / "tests", HERE.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module("fuzz_targets")


def work(given) -> None:
    """Reads the inputs that follow `given.first`, and writes a line for each.

    A line is written before an input is read, so that the other process knows which
    input killed this one.
    """
    known = targets().KINDS
    faulthandler.enable()
    base = given.work
    seeds, case = base / "seeds", base / "case"
    _warm_up(seeds, base / "warm", given.kinds)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    allowed = used * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))
    watch = Watch()
    os.chdir(base / "here")
    with (base / "log.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        for number in range(given.first, given.count):
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            name, path = make(given.kinds, given.seed, number, seeds, case)
            log.write(json.dumps({"number": number, "kind": name}) + "\n")
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            began = time.process_time()
            outcome = read_one(watch, known[name], path, seeds)
            seconds = time.process_time() - began
            faulthandler.cancel_dump_traceback_later()
            if seconds > SECONDS:
                outcome = f"took {seconds:.1f} s: {outcome}"
            peak = _peak()
            if peak > MEMORY:
                outcome = f"took {peak} bytes: {outcome}"
            line = {"outcome": outcome, "seconds": round(seconds, 3)}
            log.write(json.dumps(line) + "\n")
            if peak > MEMORY:
                # The peak stays, so another process continues.
                sys.exit(3)
            if number % 500 == 0:
                gc.collect()


def _peak() -> int:
    """Returns the most memory that this program held, in bytes.

    The usual figure, ru_maxrss, begins with the memory of the process that started
    this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _warm_up(seeds: pathlib.Path, folder: pathlib.Path, kinds: list[str]) -> None:
    """Reads a valid input of each kind, so that all libraries are loaded."""
    from anchor_jax.errors import UserError

    known = targets().KINDS
    shutil.rmtree(folder, ignore_errors=True)
    for name in kinds:
        for number in range(8):
            (folder / name / str(number)).mkdir(parents=True)
            place = folder / name / str(number)
            path = known[name].change(random.Random(number), seeds, place)
            with contextlib.suppress(UserError, Exception):
                known[name].read(path, seeds)
    shutil.rmtree(folder)


def fuzz(
    count: int,
    seed: int,
    kinds: list[str],
    base: pathlib.Path,
    kept: pathlib.Path,
    progress=lambda done: None,
) -> dict:
    """Returns the number of inputs by kind and outcome, and all findings.

    Args:
      count: number of inputs.
      seed: seed of all inputs.
      kinds: kinds of the inputs.
      base: an empty folder to work in.
      kept: folder for the inputs of findings, which is created.
      progress: called with the number of finished inputs.
    """
    seeds = base / "seeds"
    targets().make_seeds(seeds)
    for name in ("here", "outside"):
        (base / name).mkdir()
        (base / name / "canary").write_text("untouched")
    log = base / "log.jsonl"
    log.touch()
    report = {"outcomes": collections.defaultdict(collections.Counter), "findings": []}
    first, place = 0, 0
    while first < count:
        process = _start(base, seed, count, kinds, first)
        while process.poll() is None:
            time.sleep(0.2)
            progress(_last(log))
        lines = _lines(log)[place:]
        place += len(lines)
        first = _take(report, lines, process, base)
        _keep(report["findings"], base / "case", kept)
        if not lines and process.returncode:
            raise RuntimeError((base / "errors").read_text()[-3000:])
    report["findings"] += _changed(base)
    return report


def _start(base, seed: int, count: int, kinds, first: int) -> subprocess.Popen:
    line = [sys.executable, "-B", str(HERE / "fuzz.py"), f"--seed={seed}"]
    line += [f"--count={count}", f"--work={base}", f"--first={first}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",
        "MALLOC_ARENA_MAX": "2",
    }
    with (base / "errors").open("w") as errors:
        return subprocess.Popen(
            [*line, "--kinds", *kinds], stdout=errors, stderr=errors, env=environment
        )


def _lines(log: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _last(log: pathlib.Path) -> int:
    """Returns the number of the input that is being read."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        tail = file.read().decode(errors="replace").splitlines()
    numbers = [line for line in tail if line.startswith('{"number"') and "}" in line]
    return json.loads(numbers[-1])["number"] if numbers else 0


def _take(report, lines: list[dict], process, base) -> int:
    """Adds a process's results to the report, and returns the next input's number."""
    number, name = -1, ""
    waiting = False
    for line in lines:
        if "number" in line:
            number, name, waiting = line["number"], line["kind"], True
            continue
        waiting, outcome = False, line["outcome"]
        counts, is_right = report["outcomes"][name], outcome in ("read", "refused")
        counts[outcome if is_right else "wrong"] += 1
        counts["seconds"] += line["seconds"]
        if not is_right:
            _find(report, number, name, outcome)
    if waiting:
        errors = (base / "errors").read_text(errors="replace")[-3000:]
        report["outcomes"][name]["wrong"] += 1
        _find(report, number, name, f"ended with {process.returncode}:\n{errors}")
    return number + 1


def _find(report, number: int, name: str, outcome: str) -> None:
    report["findings"].append({"number": number, "kind": name, "outcome": outcome})


def _keep(findings: list[dict], case: pathlib.Path, kept: pathlib.Path) -> None:
    """Copies the input that killed a process; --only makes the others again."""
    if findings and case.exists() and len(findings) <= KEPT:
        last = findings[-1]
        target = kept / f"{last['number']}-{last['kind']}"
        shutil.copytree(case, target, dirs_exist_ok=True)


def _changed(base: pathlib.Path) -> list[dict]:
    """Returns a finding for each new or changed file beside the inputs."""
    expected = {"seeds", "here", "outside", "case", "errors", "log.jsonl"}
    found = {path.name for path in base.iterdir()} ^ expected
    for name in ("here", "outside"):
        names = [path.name for path in (base / name).iterdir()]
        if names != ["canary"] or (base / name / "canary").read_text() != "untouched":
            found.add(name)
    return [
        {"number": -1, "kind": "files", "outcome": f"{name} was changed"}
        for name in sorted(found)
    ]


def run_only(given) -> int:
    """Reads one input again in this process."""
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        targets().make_seeds(base / "seeds")
        target = given.folder / str(given.only)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        name, path = make(given.kinds, given.seed, given.only, base / "seeds", target)
        sys.stdout.write(f"{name}: {path}\n")
        outcome = read_one(Watch(), targets().KINDS[name], path, base / "seeds")
    sys.stdout.write(outcome + "\n")
    return int(outcome not in ("read", "refused"))


def main() -> int:
    """Runs the program and returns the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    known = list(targets().KINDS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs to read")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=known,
        choices=known,
        metavar="KIND",
        help=f"some of: {', '.join(known)}",
    )
    parser.add_argument("--only", type=int, help="number of one input to read again")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("fuzz_findings"),
        help="folder for the inputs of findings",
    )
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given)
        return 0
    return report_all(given) if given.only is None else run_only(given)


def report_all(given) -> int:
    """Reads all inputs, prints the findings, and returns the exit status."""
    began, last = time.monotonic(), [0]

    def progress(done: int) -> None:
        if done - last[0] >= 500:
            last[0] = done
            sys.stderr.write(f"{done} of {given.count}\n")

    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder).resolve()
        report = fuzz(
            given.count, given.seed, given.kinds, base, given.folder, progress
        )
    for finding in report["findings"][:KEPT]:
        sys.stdout.write(
            f"--only={finding['number']} ({finding['kind']}):\n{finding['outcome']}\n\n"
        )
    for name, counts in report["outcomes"].items():
        sys.stdout.write(f"{name}: {dict(counts)}\n")
    sys.stdout.write(
        f"{len(report['findings'])} findings in {given.count} inputs of seed"
        f" {given.seed}, {time.monotonic() - began:.0f} s\n"
    )
    return int(bool(report["findings"]))


if __name__ == "__main__":
    sys.exit(main())

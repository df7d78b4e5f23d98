"""Puts known faults into copies of the package, and checks that tests catch them.

    python launch/seeded_faults.py [--out=FILE.json] [--only PART ...]
    python launch/seeded_faults.py --check

`faults.toml` holds the faults, each the replacement of a text that its module holds
exactly once. First the tests run on an unchanged copy and must pass. Each fault then
gets a copy of its own, on which one test runs. A fault is caught only if an
assertion of the test fails; errors of imports, of collection and of the changed code
itself do not count. Prints a table, and ends with status 1 if a fault is not caught.

With --out the results are stored after every fault. The same command then runs only
faults that are missing there, or whose edit, module or test file has changed. --check
runs no tests: it only checks that every replacement still applies.
"""

import argparse
import ast
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIST = ROOT / "launch" / "faults.toml"
COPIED = ("anchor_jax", "configs", "tests", "setup.py", ".pytest.ini")
CACHE = ".jax_cache"
REPORT = "report.xml"
LIMIT = 7200
"""Seconds that tests may take; the machine may be busy with other work."""
_REMEDY = "update the fault in launch/faults.toml"
_ASSERTED = re.compile(r"AssertionError\b|assert\b|Failed: DID NOT (?:RAISE|WARN)")


class Stale(Exception):
    """A fault that no longer fits the package."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault; the fields besides `part` are described in `faults.toml`."""

    part: str
    name: str
    module: str
    old: str
    new: str
    test: str

    @property
    def path(self) -> pathlib.Path:
        return pathlib.Path("anchor_jax", self.module)

    @property
    def test_path(self) -> pathlib.Path:
        return pathlib.Path("tests", self.test.partition("::")[0])

    @property
    def function(self) -> str:
        return self.test.partition("::")[2].partition("[")[0]

    def changed(self) -> str:
        """Returns the text of the module with the fault in it.

        Raises:
          Stale: The module does not hold the text exactly once, or the test is missing.
        """
        text = self._require_once(self.path, self.old)
        self._require_once(self.test_path, f"\ndef {self.function}(")
        return text.replace(self.old, self.new)

    def is_slow(self) -> bool:
        """Returns whether the test is marked as slow, for some values at least."""
        tree = ast.parse((ROOT / self.test_path).read_text(encoding="utf-8"))
        marks = [
            ast.unparse(mark)
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == self.function
            for mark in node.decorator_list
        ]
        return any("mark.slow" in mark for mark in marks)

    def _require_once(self, path: pathlib.Path, wanted: str) -> str:
        """Returns the text of a file that holds another text exactly once."""
        if not (ROOT / path).is_file():
            raise Stale(f"{self.name!r}: {path} is missing; {_REMEDY}")
        text = (ROOT / path).read_text(encoding="utf-8")
        if (count := text.count(wanted)) != 1:
            raise Stale(
                f"{self.name!r}: {path} holds {wanted!r} {count} times, must hold it"
                f" once; {_REMEDY}"
            )
        return text

    def digest(self) -> str:
        """Returns a SHA-256 of the fault, its module and its test file."""
        total = hashlib.sha256(repr(self).encode())
        for path in (self.path, self.test_path):
            total.update((ROOT / path).read_bytes())
        return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class Result:
    """What the tests did with a fault.

    Attributes:
      name: the fault's name.
      caught: whether an assertion failed.
      test: the test that failed, or "".
      message: the first line of its message, or what happened instead.
      seconds: duration.
      digest: `Fault.digest`.
    """

    name: str
    caught: bool
    test: str
    message: str
    seconds: float = 0.0
    digest: str = ""

    def __str__(self) -> str:
        if self.caught:
            return f"{self.name}: caught by {self.test}"
        return f"{self.name}: NOT CAUGHT: {self.test} {self.message}"


def load_faults() -> list[Fault]:
    """Returns the list of faults."""
    parts = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Fault(part, **one) for part, faults in parts.items() for one in faults]


def check(faults: Iterable[Fault]) -> list[str]:
    """Returns a line for each fault that does not apply."""
    lines = []
    for fault in faults:
        try:
            compile(fault.changed(), fault.module, "exec")
        except Stale as error:
            lines.append(f"error: {error}")
        except SyntaxError as error:
            problem = f"the changed module is not valid Python: {error}"
            lines.append(f"error: {fault.name!r}: {problem}; {_REMEDY}")
    return lines


def copy(folder: pathlib.Path) -> None:
    """Copies the package and its tests; compiled programs are shared."""
    skipped = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    (ROOT / CACHE).mkdir(exist_ok=True)
    (folder / CACHE).symlink_to(ROOT / CACHE)


def run(folder: pathlib.Path, *line: str, place: pathlib.Path | None = None) -> str:
    """Returns the output of a Python program that imports the package of a folder."""
    return subprocess.run(
        [sys.executable, *line],
        cwd=place or folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    ).stdout


def check_import(folder: pathlib.Path) -> None:
    """Raises RuntimeError unless processes import the copy, wherever they start."""
    program = ("-c", "import anchor_jax; print(anchor_jax.__file__)")
    for place in (folder, folder.parent):
        found = run(folder, *program, place=place).strip()
        if found != str(folder / "anchor_jax" / "__init__.py"):
            raise RuntimeError(f"{found} is imported, not the copy in {folder}")


def run_tests(folder: pathlib.Path, tests: Iterable[str]) -> str:
    """Runs tests until one fails, and returns their output."""
    options = ["-x", "-q", "-n", "0", "--no-header", "-p", "no:cacheprovider"]
    options += ["--timeout=0", f"--junitxml={REPORT}"]
    files = [f"tests/{name}" for name in tests]
    try:
        return run(folder, "-m", "pytest", *options, *files)
    except subprocess.TimeoutExpired:
        return f"the tests have not ended after {LIMIT} s"


def judge(name: str, report: pathlib.Path, output: str) -> Result:
    """Returns what the tests did, from their report."""
    if not report.is_file():
        return Result(name, False, "", output[-1000:])
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for problem in case.iter():
            if problem.tag in ("failure", "error"):
                test = f"{case.get('classname')}::{case.get('name')}"
                message = problem.get("message", "").strip().split("\n")[0]
                asserted = problem.tag == "failure" and _ASSERTED.match(message)
                return Result(name, bool(asserted), test, message)
    return Result(name, False, "", f"{len(cases)} tests pass" if cases else output)


def try_out(name: str, tests: Iterable[str], fault: Fault | None = None) -> Result:
    """Returns what tests do on a copy with a fault, or on one without."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place).resolve()
        copy(folder)
        if fault:
            (folder / fault.path).write_text(fault.changed(), encoding="utf-8")
        check_import(folder)
        output = run_tests(folder, tests)
        result = judge(name, folder / REPORT, output)
    seconds = round(time.monotonic() - began, 1)
    digest = fault.digest() if fault else ""
    return dataclasses.replace(result, seconds=seconds, digest=digest)


def load_results(out: pathlib.Path | None) -> dict[str, Result]:
    """Returns stored results by the name of the fault."""
    if out is None or not out.exists():
        return {}
    stored = json.loads(out.read_text(encoding="utf-8"))
    return {one["name"]: Result(**one) for one in stored["faults"]}


def store(out: pathlib.Path | None, results: Iterable[Result]) -> None:
    """Writes the results; the file is complete at any time."""
    if out is None:
        return
    rows = [dataclasses.asdict(one) for one in results]
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps({"faults": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def try_all(faults: list[Fault], out: pathlib.Path | None) -> list[Result]:
    """Returns the results of faults; those that are stored and current are not tried.

    Raises:
      SystemExit: The tests do not pass without a fault.
    """
    results = load_results(out)
    done = {one.digest for one in results.values()}
    waiting = [fault for fault in faults if fault.digest() not in done]
    if waiting:
        require_success({fault.test for fault in waiting})
    for number, fault in enumerate(waiting, 1):
        result = results[fault.name] = try_out(fault.name, [fault.test], fault)
        store(out, results.values())
        say(f"{number} of {len(waiting)}: {result} ({result.seconds} s)")
    return [results[fault.name] for fault in faults]


def require_success(tests: Iterable[str]) -> None:
    """Raises SystemExit unless tests pass without a fault."""
    result = try_out("no fault", sorted(tests))
    if not result.message.endswith("tests pass"):
        raise SystemExit(f"error: without a fault: {result.test} {result.message}")
    say(f"without a fault: {result.message} ({result.seconds} s)")


def say(text: str) -> None:
    """Writes a line of progress."""
    sys.stderr.write(text + "\n")


def table(faults: Iterable[Fault], results: Iterable[Result]) -> str:
    """Returns a Markdown table of faults and the tests that caught them."""
    rows = ["| part | fault | module | caught by | slow |", "|---|---|---|---|---|"]
    for fault, result in zip(faults, results, strict=True):
        by = f"`{result.test}`" if result.caught else "NOT CAUGHT"
        cells = (fault.part, fault.name, f"`{fault.module}`", by, fault.is_slow())
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> int:
    """Tries the faults and returns the exit status."""
    faults = load_faults()
    parts = list(dict.fromkeys(fault.part for fault in faults))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="run no tests")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of the results")
    parser.add_argument(
        "--only",
        nargs="+",
        default=parts,
        choices=parts,
        metavar="PART",
        help=f"some of: {', '.join(parts)}",
    )
    given = parser.parse_args()
    faults = [fault for fault in faults if fault.part in given.only]
    if lines := check(faults):
        sys.stderr.write("\n".join(lines) + "\n")
        return 1
    if given.check:
        sys.stdout.write(f"{len(faults)} faults apply\n")
        return 0
    results = try_all(faults, given.out)
    caught = sum(one.caught for one in results)
    slow = sum(fault.is_slow() for fault in faults)
    sys.stdout.write(
        f"{table(faults, results)}\n\n{caught} of {len(faults)} caught; {slow} of the"
        " tests are slow\n"
    )
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())

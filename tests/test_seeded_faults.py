"""The list of faults fits the package, and only a failed assertion catches one."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "launch" / "seeded_faults.py"
LEAST = {"cache": 8, "rope": 5, "streaming": 8, "losses": 8, "rollout": 4}
LEAST |= {"porting": 6, "flow": 4, "weights": 3, "text": 2}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[PROGRAM.stem] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    yield module
    del sys.modules[PROGRAM.stem]


@pytest.fixture(scope="module")
def faults(program):
    return program.load_faults()


def test_every_replacement_still_applies(program, faults, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, "--check"])

    status = program.main()

    assert status == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{len(faults)} faults apply\n"


def test_the_list_covers_every_part(faults):
    parts = [fault.part for fault in faults]

    assert {part: parts.count(part) >= least for part, least in LEAST.items()} == {
        part: True for part in LEAST
    }
    assert len({fault.name for fault in faults}) == len(faults)
    assert all(fault.old != fault.new for fault in faults)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "no such text"}, "holds 'no such text' 0 times"),
        ({"old": "return "}, r"holds 'return ' \d\d times"),
        ({"module": "nowhere.py"}, "anchor_jax/nowhere.py is missing"),
        ({"test": "test_no.py::test_a"}, "tests/test_no.py is missing"),
        ({"test": "test_flow.py::test_no"}, r"holds '.*def test_no\(' 0 times"),
        ({"new": "("}, r"is not valid Python: .*line \d+\)"),
    ],
)
def test_a_fault_that_does_not_apply_is_named(program, faults, changes, message):
    given = dataclasses.replace(faults[0], **changes)

    (line,) = program.check([given])

    assert re.match(rf"error: {given.name!r}: .*{message}", line)


@pytest.mark.parametrize(
    ("test", "slow"),
    [
        ("test_seeded_faults.py::test_a_fault_is_caught_on_a_copy", True),
        ("test_seeded_faults.py::test_the_list_covers_every_part", False),
    ],
)
def test_marks_of_slow_tests_are_found(program, faults, test, slow):
    assert dataclasses.replace(faults[0], test=test).is_slow() == slow


def report(folder, *cases):
    path = folder / "report.xml"
    lines = [f'<testcase classname="t.a" name="n{i}">{x}' for i, x in enumerate(cases)]
    body = "</testcase>".join([*lines, ""])
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    return path


@pytest.mark.parametrize(
    ("problem", "caught"),
    [
        ('<failure message="AssertionError: far&#10;1"/>', True),
        ('<failure message="assert 1 == 2"/>', True),
        ('<failure message="Failed: DID NOT RAISE ValueError"/>', True),
        ('<failure message="Failed: Timeout (&gt;240.0s)"/>', False),
        ('<failure message="TypeError: too many"/>', False),
        ('<error message="collection failure"/>', False),
        ('<error message="assert 1 == 2"/>', False),
    ],
)
def test_only_a_failed_assertion_catches_a_fault(program, tmp_path, problem, caught):
    result = program.judge("f", report(tmp_path, "", problem), "output")

    assert (result.caught, result.test) == (caught, "t.a::n1")
    assert "&#10;" not in result.message and "\n" not in result.message
    assert ("NOT CAUGHT" in str(result)) != caught


def test_tests_that_pass_or_do_not_run_catch_nothing(program, tmp_path):
    passed = program.judge("f", report(tmp_path, "", ""), "output")
    crashed = program.judge("f", tmp_path / "none.xml", "output")

    assert (passed.caught, passed.message) == (False, "2 tests pass")
    assert (crashed.caught, crashed.message) == (False, "output")


@pytest.mark.slow
def test_a_fault_is_caught_on_a_copy(program, faults, tmp_path, monkeypatch):
    (fault,) = [one for one in faults if one.name == "the end token is masked"]
    source = (program.ROOT / fault.path).read_bytes()
    harmless = dataclasses.replace(fault, name="nothing", new=f"{fault.old}  # here")
    out = tmp_path / "out.json"

    caught, passed = program.try_all([fault, harmless], out)

    assert caught.caught and "test_rows_end_and_are_padded" in caught.test
    assert not passed.caught and passed.message.endswith("tests pass")
    assert (program.ROOT / fault.path).read_bytes() == source
    stored = json.loads(out.read_text())["faults"]
    assert [(one["name"], one["caught"]) for one in stored] == [
        (fault.name, True),
        ("nothing", False),
    ]
    monkeypatch.setattr(program, "try_out", None)
    assert program.try_all([fault, harmless], out) == [caught, passed]
    lines = program.table([fault, harmless], [caught, passed]).splitlines()
    assert lines[2].endswith("test_rows_end_and_are_padded` | False |")
    assert lines[3].endswith("| NOT CAUGHT | False |")

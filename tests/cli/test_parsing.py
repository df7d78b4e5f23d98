"""Commands parse and print; the work is in the library."""

import ast
import importlib

import pytest

COMMANDS = (
    *("sample", "replay", "compare", "policies", "doctor"),
    *("export", "port", "verify", "bench"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_little_logic_of_its_own(name):
    module = importlib.import_module(f"anchor_jax.cli.{name}")
    with open(module.__file__, encoding="utf-8") as file:
        parts = ast.parse(file.read()).body

    lines = [
        part.end_lineno - part.lineno + 1
        for part in parts
        if isinstance(part, ast.FunctionDef | ast.ClassDef)
        and part.name != "define_flags"
    ]
    assert sum(lines) <= 80

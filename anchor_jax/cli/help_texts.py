"""Help texts of the command line, read from the sources of the commands."""

import ast
import importlib.metadata
import importlib.util
import inspect
import pathlib
import platform
import sys
import textwrap
from types import ModuleType

from absl import flags

import anchor_jax
from anchor_jax.cli import COMMANDS

_WIDTH = 88
_INTRODUCTION = """\
Anchor Forcing in JAX: streaming text-to-video with prompts that change during the
stream.

Try:
  anchor-jax sample --config=configs/tiny.py
"""


def present() -> list[str]:
    """Returns the names of the installed commands."""
    return [name for name, module in COMMANDS.items() if source(module) is not None]


def source(module: str) -> pathlib.Path | None:
    """Returns the source file of a module without importing it, or None."""
    if module in sys.modules:
        return pathlib.Path(sys.modules[module].__file__)
    spec = importlib.util.find_spec(module)
    return pathlib.Path(spec.origin) if spec else None


def overview() -> str:
    """Returns an introduction, an example, and the list of commands."""
    names = present()
    width = max(map(len, names), default=0)
    lines = [
        f"  {name:<{width}}  {string_in(COMMANDS[name], 'SUMMARY')}" for name in names
    ]
    return "\n".join(
        [
            _INTRODUCTION,
            "Commands:",
            *lines,
            "",
            "anchor-jax COMMAND --help shows the examples and flags of a command.",
        ]
    )


def string_in(module: str, name: str) -> str:
    """Returns the string assigned to `name` in a module's source, or ""."""
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return str(ast.literal_eval(node.value))
    return ""


def teach(name: str, module: ModuleType, own: list[str]) -> str:
    """Returns a command's summary, examples and flags."""
    usage = module.USAGE
    examples = usage if isinstance(usage, str) else "\n".join(usage)
    arguments = getattr(module, "ARGUMENTS", "")
    parts = [
        f"anchor-jax {name} [flags] {arguments}".rstrip(),
        "",
        textwrap.fill(module.SUMMARY, _WIDTH),
        "",
        "Examples:",
        textwrap.indent(inspect.cleandoc(examples), "  "),
        "",
        "Flags:",
        *(_describe(flags.FLAGS[flag]) for flag in own),
    ]
    if "config" in own:
        about = (
            "Set a field of the config. The value must have the field's type."
            " --FIELD=VALUE does the same unless the command has a flag of that name."
        )
        parts.append(_entry("--config.FIELD=VALUE", about))
    return "\n".join(parts)


def _describe(flag: flags.Flag) -> str:
    """Returns a flag's spelling, meaning and default."""
    spelling = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}=VALUE"
    default = "" if flag.default is None else f" (default: {flag.default_as_str})"
    return _entry(spelling, f"{flag.help or ''}{default}")


def _entry(spelling: str, about: str) -> str:
    text = textwrap.fill(
        " ".join(about.split()),
        _WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
    )
    return f"  {spelling}\n{text}"


def version() -> str:
    """Returns the versions of this package, jax and Python."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "not installed"
    return (
        f"anchor-jax {anchor_jax.__version__} (jax {jax},"
        f" Python {platform.python_version()})"
    )

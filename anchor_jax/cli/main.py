"""The command line `anchor-jax`: runs a command or prints its help."""

import contextlib
import dataclasses
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

from absl import flags

from anchor_jax import extras, interrupts, processes, shares
from anchor_jax.cli import COMMANDS, help_texts
from anchor_jax.errors import UserError, closest, shown, suggest
from anchor_jax.text import check_text

FLAGS = flags.FLAGS

_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    A user error returns 2 and prints its message on standard error. An interrupt
    returns 130. Any other failure is raised. In a job of several processes all get the
    status of the first failure, and SIGTERM is 75; see `processes`.

    Args:
      argv: The command and its flags. None takes those of `sys.argv`; an interrupt then
        ends the process.
    """
    if argv is not None:
        with interrupts.listening():
            return _run(list(argv)).status
    interrupts.install()
    outcome = _run_in_job(sys.argv[1:])
    status = interrupts.leave_with(outcome.status)
    final = processes.close(status, outcome.reason)
    if final != status or processes.is_joined() and final:
        interrupts.leave_now(final)
    return final


@dataclasses.dataclass
class _Outcome:
    """The exit status of a command, and the reason of a failure for other processes."""

    status: int
    reason: str = ""


def _run_in_job(argv: list[str]) -> _Outcome:
    """Runs a command; a failure in a job of several processes has a status too."""
    try:
        return _run(argv)
    except processes.Missing as error:
        processes.await_verdict()
        return _report(interrupts.AGAIN, f"error: {error}; start all processes again")
    except Exception as error:
        if not processes.is_joined():
            raise
        if processes.blames_peer(error):
            processes.await_verdict()
        traceback.print_exc()
        return _report(1, f"{type(error).__name__}: {error}")


def _report(status: int, line: str) -> _Outcome:
    """Prints an error, unless the first process of the job prints it too."""
    if not processes.is_said_by_first(line):
        own = f"{processes.name()}: " if processes.is_joined() else ""
        print(f"{own}{line}", file=sys.stderr)
    return _Outcome(status, line)


def _run(argv: list[str]) -> _Outcome:
    """Runs a command, and returns its exit status for every expected outcome."""
    try:
        interrupts.check()
        _check_arguments(argv)
        with _plain_warnings():
            return _Outcome(_dispatch(argv))
    except UserError as error:
        return _report(2, f"error: {error}")
    except shares.Unfinished as error:
        return _report(interrupts.AGAIN, str(error))
    except ModuleNotFoundError as error:
        message = extras.explain(error)
        if message is None:
            raise
        return _report(2, f"error: {message}")
    except KeyboardInterrupt as error:
        if processes.is_printing():
            print(str(error) or "interrupted", file=sys.stderr)
        return _Outcome(interrupts.STATUS)
    except BrokenPipeError:
        # Python flushes stdout again at exit, but its reader has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Outcome(141)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints the package's own warnings as "warning: MESSAGE" on standard error.

    Only one process of a job prints them.
    """
    shown = warnings.showwarning

    def show(message, category, *rest, **named) -> None:
        if category.__module__.startswith("anchor_jax."):
            if processes.is_printing():
                print(f"warning: {message}", file=sys.stderr)
        else:
            shown(message, category, *rest, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _check_arguments(argv: Sequence[str]) -> None:
    """Raises UserError unless every argument is text; paths must be UTF-8.

    Arguments are written into recipes and configs, which are text files.
    """
    name = "argument 1"
    for number, argument in enumerate(argv, 1):
        if argument.startswith("-"):
            name = argument.partition("=")[0]
        check_text(argument, name.encode("ascii", "replace").decode())
        if not argument.startswith("-"):
            name = f"argument {number + 1}"


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in _HELP or argv == ["help"]:
        print(help_texts.overview())
        return 0
    if argv[0] in ("--version", "version"):
        print(help_texts.version())
        return 0
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    name, *rest = argv
    module = _load(name)
    with _own_flags(module) as own:
        before_end = rest[: rest.index("--")] if "--" in rest else rest
        if any(help_flag in before_end for help_flag in _HELP):
            print(help_texts.teach(name, module, own))
            return 0
        exclusive = getattr(module, "EXCLUSIVE", ())
        arguments = _parse_flags(name, rest, own, exclusive)
        if len(arguments) > 1 and not hasattr(module, "ARGUMENTS"):
            raise UserError(
                f"{name} takes only flags, which start with --, but got"
                f" {shown(arguments[1])}; see: anchor-jax {name} --help"
            )
        return module.main(arguments) or 0


def _load(name: str) -> ModuleType:
    """Returns the command's module."""
    known = help_texts.present()
    if name not in known:
        found = suggest(name, known, "commands")
        raise UserError(f"unknown command {shown(name)}{found}")
    return importlib.import_module(COMMANDS[name])


def _hint(flag: str, own: Sequence[str], argv: Sequence[str]) -> str:
    """Returns the part of a message that suggests flags, or fields of the config."""
    if "config" not in own:
        return closest(flag, own, prefix="--")
    from anchor_jax.cli import aliases

    short = aliases.matching(flag, argv)
    known = [*own, *aliases.fields(argv)]
    found = closest(short[0] if short else flag, short or known, prefix="--")
    return f"{found}; set a config field with --config.FIELD=VALUE"


@contextlib.contextmanager
def _own_flags(module: ModuleType) -> Iterator[list[str]]:
    """Defines the command's flags, yields their names, and removes them afterwards."""
    before = set(FLAGS)
    module.define_flags()
    own = [name for name in FLAGS if name not in before]
    try:
        yield own
    finally:
        # Flags that imported libraries defined in the meantime stay.
        for name in own:
            delattr(FLAGS, name)


def _parse_flags(
    name: str, argv: list[str], own: list[str], exclusive: Sequence[tuple[str, str]]
) -> list[str]:
    """Parses the command's flags, loads its config, and returns other arguments."""
    overrides = []
    if "config" in own:
        from anchor_jax import config
        from anchor_jax.cli import aliases

        overrides, argv = config.split_overrides(aliases.spell_out(argv))
        config.check_exclusive(overrides, exclusive)
    try:
        arguments = FLAGS([f"anchor-jax {name}", *argv])
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"unknown flag --{error.flagname}{_hint(error.flagname, own, argv)}; see:"
            f" anchor-jax {name} --help"
        ) from error
    except flags.Error as error:
        raise UserError(f"{error}; see: anchor-jax {name} --help") from error
    except RecursionError as error:
        # The library searches for similar names with one recursive call per character.
        raise UserError(
            f"{name} has no flag with such a long name; see: anchor-jax {name} --help"
        ) from error
    if "config" in own:
        if FLAGS.config is None or overrides and not FLAGS.config:
            raise UserError(
                "--config is missing; give a config file or the name of a shipped"
                f" config: {', '.join(config.shipped_configs())}"
            )
        if FLAGS.config:
            FLAGS["config"].value = config.load_config(FLAGS.config, overrides)
    return arguments

"""Loads config files, applies overrides to them, and builds frozen dataclasses."""

import ast
import dataclasses
import inspect
import math
import os
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from anchor_jax import extras
from anchor_jax.errors import UserError, shown, some, suggest
from anchor_jax.io import expand
from anchor_jax.text import check_text

Config = TypeVar("Config")

_PROBLEMS = 12
_CONFIG_HELP = (
    "Config file, or the name of a shipped config. FILE:ARGUMENT passes an argument to"
    " its get_config."
)
LARGEST = 2**64
"""The largest whole number in a config."""
_FAULTS_OF_A_CONFIG = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
_FAULTS_OF_A_LITERAL = (
    ArithmeticError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def shipped_configs_dir() -> pathlib.Path:
    """Returns the folder of the shipped configs.

    It is `configs` in a checkout and `anchor_jax/configs` in an installed wheel.
    """
    package = pathlib.Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the shipped config files by name without suffix."""
    files = sorted(shipped_configs_dir().glob("[!_]*.py"))
    return {file.stem: file for file in files}


def find_config(name: str) -> pathlib.Path:
    """Returns the config file that `name` denotes: a file, or a shipped config.

    `tiny`, `tiny.py` and `configs/tiny.py` all denote the shipped config `tiny` if the
    current folder has no such file.

    Raises:
      UserError: There is no such file.
    """
    given = expand(name)
    if given.suffix == ".py" and os.path.isfile(given):
        return given
    shipped = shipped_configs()
    named = given.stem if given.suffix in ("", ".py") else given.name
    if str(given.parent) in (".", "configs") and named in shipped:
        return shipped[named]
    where = f"shipped configs, in {shipped_configs_dir()}"
    raise UserError(
        f"config {shown(name)} is neither an existing Python file nor a shipped config"
        f"{suggest(named, shipped, where)}"
    )


def define_config_flag(default: str | None = None) -> None:
    """Defines `--config`, whose value is the loaded config after flags are parsed.

    `anchor_jax.cli.main` loads the file and applies the overrides. A command then reads
    a locked ConfigDict from `FLAGS.config`. With the default "" the flag is optional,
    and `FLAGS.config` is "" if it is not given.
    """
    flags.DEFINE_string("config", default, _CONFIG_HELP)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits `argv` into overrides of config fields and other arguments."""
    end = argv.index("--") if "--" in argv else len(argv)
    overrides = [arg for arg in argv[:end] if _OVERRIDE.match(arg)]
    others = [arg for arg in argv[:end] if not _OVERRIDE.match(arg)]
    return overrides, [*others, *argv[end:]]


def paths(config: ConfigDict, above: str = "") -> Iterator[str]:
    """Yields the dotted path of every field that is not a section."""
    for name in config:
        inner = config[name]
        if isinstance(inner, ConfigDict):
            yield from paths(inner, f"{above}{name}.")
        else:
            yield above + name


def check_exclusive(
    overrides: Sequence[str], exclusive: Sequence[tuple[str, str]]
) -> None:
    """Raises UserError if the overrides set both fields of an exclusive pair.

    A field that is set to an empty value, as in `--config.prompt=`, does not count.
    """
    found = [_OVERRIDE.fullmatch(one) for one in overrides]
    given = {match["field"] for match in found if match["value"]}
    for pair in exclusive:
        if given.issuperset(pair):
            first, second = pair
            raise UserError(
                f"config.{first} and config.{second} are both given, but only one may"
                " be; leave one out"
            )


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the locked config of `FILE[:ARGUMENT]` with overrides applied in order.

    Args:
      spec: A path to a Python file with `get_config`, or the name of a shipped config.
        Text after a colon is passed to `get_config`.
      overrides: Arguments such as `--config.sampler.seed=3`. The values must have the
        types of the config's fields. `ml_collections.config_flags` parses them.

    Raises:
      UserError: The file does not exist or fails, a field is unknown, or a value has
        the wrong type.
    """
    name, colon, argument = spec.partition(":")
    path = find_config(name)
    config = _run_file(path, [argument] if colon else [])
    for override in overrides:
        _apply(config, override)
    return config


def from_config(
    kind: type[Config], section: ConfigDict | Mapping[str, Any], name: str = ""
) -> Config:
    """Builds the frozen dataclass `kind` from a section that names exactly its fields.

    A nested section becomes a dataclass if the field's type is one. Lists become
    tuples, so that the result can be hashed.

    Args:
      kind: The dataclass.
      section: The values of its fields.
      name: The name of the section in error messages. Default: the name of `kind`.

    Raises:
      UserError: A field is missing or unknown, or its value has the wrong type; the
        message lists them.
    """
    name = name or kind.__name__
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    missing = [field for field in fields if field not in section]
    unknown = [key for key in section if key not in fields]
    if len(missing) > len(fields) / 2:
        _check_command(name, section, missing)
    if missing or unknown:
        problems = [f"missing field {field!r}" for field in missing]
        problems += [f"unknown field {shown(key)}" for key in unknown]
        problems = some(problems, _PROBLEMS)
        known = suggest(str(unknown[0]) if unknown else "", fields, "fields")
        raise UserError(f"{name}: {', '.join(problems)}{known}")
    hints = typing.get_type_hints(kind)
    values = {
        field: _coerce(f"{name}.{field}", section[field], hints[field])
        for field in fields
    }
    return _translate(lambda: kind(**values), lambda error: f"{name}: {error}")


# For each command, a field that only its configs have.
_COMMANDS = {"sampler": "sample", "stage": "train", "count": "trajectories"}


def _check_command(name: str, section, missing: Sequence[str]) -> None:
    """Raises UserError if a config belongs to another command."""
    found = [one for field, one in _COMMANDS.items() if field in section]
    if found:
        raise UserError(
            f"{name}: this is a config for anchor-jax {found[0]}, not for this command:"
            f" it lacks {', '.join(missing[:4])}, ...; the --help of this command shows"
            " a config that fits"
        )


def with_field(
    config: ConfigDict | Mapping[str, Any], section: str, field: str, value: Any
) -> ConfigDict | Mapping[str, Any]:
    """Returns a config in which `section.field` is `value` if it was missing."""
    inner = config.get(section)
    if not isinstance(inner, ConfigDict | Mapping) or field in inner:
        return config
    return {**config, section: {**inner, field: value}}


def to_config(value: Any) -> ConfigDict:
    """Returns the fields of a dataclass as a config; nested dataclasses are sections.

    This is the inverse of `from_config`. A field that is None accepts values of its
    type.
    """
    config, hints = ConfigDict(), typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            inner = to_config(inner)
        elif inner is None:
            kinds = typing.get_args(hints[field.name])
            kind = next(one for one in kinds if one is not type(None))
            inner = placeholder(typing.get_origin(kind) or kind)
        config[field.name] = inner
    return config


_OVERRIDE = re.compile(r"--?(no)?config\.(?P<field>[^=]*)(=(?P<value>.*))?", re.DOTALL)


def _run_file(path: pathlib.Path, arguments: list[str]) -> ConfigDict:
    """Returns what `get_config` in the file returns, locked."""
    module = types.ModuleType(f"config_{path.stem}")
    module.__file__ = str(path)

    def where(error: Exception) -> str:
        if isinstance(error, SyntaxError):
            return f"config {error.filename}, line {error.lineno}: {error.msg}"
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        return f"config {path}{line}: {type(error).__name__}: {error}"

    def run() -> ConfigDict:
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
        exec(code, module.__dict__)
        get_config = getattr(module, "get_config", None)
        _check_get_config(path, get_config, arguments)
        return get_config(*arguments)

    config = _translate(run, where)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config {path}: get_config returned {type(config).__name__}, but must"
            " return an ml_collections.ConfigDict"
        )
    return config.lock()


def _check_get_config(
    path: pathlib.Path, get_config: Any, arguments: list[str]
) -> None:
    """Raises UserError unless `get_config` can be called with the arguments."""
    if not callable(get_config):
        raise UserError(f"config {path} has no function get_config(); add it")
    try:
        bound = inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        got = f"got {shown(arguments[0])} after the colon" if arguments else "got none"
        expected = "needs an argument, as in FILE:ARGUMENT"
        if arguments:
            expected = "takes no argument; leave the colon out"
        raise UserError(f"config {path}: {got}, but get_config {expected}") from error
    hints = typing.get_type_hints(get_config)
    for name, given in bound.arguments.items():
        _check_choice(path, given, hints.get(name))


def _check_choice(path: pathlib.Path, given: str, hint: Any) -> None:
    """Raises UserError unless an argument is one of the annotated literals."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal and given not in choices:
        raise UserError(
            f"config {path}: unknown argument {shown(given)} after the colon"
            f"{suggest(given, choices, 'arguments')}"
        )


def _translate(action: Callable[[], Any], message: Callable[[Exception], str]) -> Any:
    """Returns the result of `action`; exceptions that it raises become UserErrors."""
    try:
        return action()
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(extras.explain(error) or message(error)) from error
    except (SyntaxError, *_FAULTS_OF_A_CONFIG) as error:
        raise UserError(message(error)) from error


def _apply(config: ConfigDict, override: str) -> None:
    """Sets one field of the config from an argument such as `--config.seed=3`."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise UserError(
            f"override {shown(override)} is not of the form --config.FIELD=VALUE"
        )
    path, value = match["field"], match["value"]
    section, field = _find_field(config, path)
    if isinstance(section[field], ConfigDict):
        raise UserError(
            f"config.{path} is a section; set one of its fields:"
            f" {', '.join(section[field])}"
        )
    if isinstance(section[field], bool) and value is None:
        value = "false" if match[1] else "true"
    if value is None:
        raise UserError(f"{override} has no value; write --config.{path}=VALUE")
    before = section[field]
    if before is None and section.get_type(field) is type(None):
        with section.unlocked():
            section[field] = _literal(value)
        return
    _parse_field(config, path, value)
    _check_elements(path, value, before, section[field])


def _find_field(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds the field at a dotted path, and its name."""
    section, above = config, "config"
    *sections, last = path.split(".")
    for name in [*sections, last]:
        if not isinstance(section, ConfigDict):
            raise UserError(
                f"{above} is a value, not a section, so it has no field {shown(name)}"
            )
        if name not in section:
            known = _suggest_fields(config, section, name)
            raise UserError(f"unknown field {shown(name)} in {above}{known}")
        holder, section, above = section, section[name], f"{above}.{name}"
    return holder, last


def _suggest_fields(config: ConfigDict, section: ConfigDict, name: str) -> str:
    """Returns the end of a message about an unknown field of a section.

    A field fits if it has that name in another section, or these initials, such as
    `lr`. If none fits, the closest field of the section is suggested.
    """
    for searched in (section, config):
        found = [path for path in paths(searched) if name in short_names(path)]
        if found:
            names = " or ".join(map(shown, sorted(found, key=len)))
            fields = suggest("", section, "fields").removeprefix(";")
            return f"; did you mean {names}?{fields}"
    return suggest(name, section, "fields")


def short_names(path: str) -> tuple[str, str]:
    """Returns the last part of a dotted path, and its initials."""
    last = path.rpartition(".")[2]
    return last, "".join(word[:1] for word in last.split("_"))


def _parse_field(config: ConfigDict, path: str, value: str) -> None:
    """Sets the field at a dotted path; config_flags parses the value."""
    argument = f"--config.{path}={value}"
    section, field = _find_field(config, path)
    values, before = flags.FlagValues(), section[field]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=[argument]
        )
        values(["config", argument])
    except (flags.Error, *_FAULTS_OF_A_LITERAL) as error:
        kind = section.get_type(field).__name__
        raise UserError(
            f"config.{path}: got {shown(value)}, expected {kind}; the current"
            f" value is {shown(before)}"
        ) from error


def _check_elements(path: str, value: str, before: Any, after: Any) -> None:
    """Raises UserError if a tuple got elements of another type.

    config_flags does not check this.
    """
    if not isinstance(before, tuple) or not before:
        return
    kinds = tuple({type(element) for element in before})
    if float in kinds:
        kinds = (*kinds, int)
    if not all(type(element) in kinds for element in after):
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"config.{path}: got {shown(value)}, expected a tuple of {names}; the"
            f" current value is {shown(before)}"
        )


def _literal(value: str) -> Any:
    """Parses `value` as a Python literal, or returns the string itself."""
    try:
        return ast.literal_eval(value)
    except _FAULTS_OF_A_LITERAL:
        return value


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Returns the value as the type `hint`, or raises UserError naming both."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        rest = [choice for choice in choices if choice is not type(None)]
        hint = rest[0] if len(rest) == 1 else Any
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, ConfigDict | Mapping):
        return from_config(hint, value, name)
    value = _freeze(value)
    _check_plain(name, value)
    if hint is float and type(value) is int:
        return float(value)
    wanted = origin or hint
    checked = isinstance(wanted, type) and wanted is not Any
    is_bool_for_number = isinstance(value, bool) and wanted in (int, float)
    if checked and (not isinstance(value, wanted) or is_bool_for_number):
        raise UserError(
            f"{name}: got {shown(value)} of type {type(value).__name__}, expected"
            f" {getattr(wanted, '__name__', wanted)}"
        )
    return value


def _check_plain(name: str, value: Any) -> None:
    """Raises UserError unless strings are text and numbers finite and not huge."""
    if isinstance(value, str):
        check_text(value, name)
    if isinstance(value, tuple):
        for element in value:
            _check_plain(name, element)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: got {value}, expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(
            f"{name}: got {shown(value)}, expected an integer of at most {LARGEST}"
        )


def _freeze(value: Any) -> Any:
    """Converts lists to tuples at every depth; returns other values unchanged."""
    if isinstance(value, list | tuple):
        return tuple(_freeze(element) for element in value)
    return value

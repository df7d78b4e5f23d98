"""The scale of adapters, from all places where files may state it.

Every setting is used, known not to change the meaning of tensors, or refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError, shown
from anchor_jax.porting.convert import Mismatch
from anchor_jax.porting.files import parsed

_USED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# Settings of PEFT that change the meaning of tensors, with their neutral values.
_NEUTRAL = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
}
# Settings of training, places of adapters (which the tensors show), and descriptions.
_INERT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config", "inference"),
    *("monteclora_config",),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_KNOWN = {*_USED, *_NEUTRAL, *_INERT, "init_lora_weights"}
_NAMES = {
    "alpha": "lora_alpha",
    "network_alpha": "lora_alpha",
    "rank": "r",
    "lora_rank": "r",
    "lora_r": "r",
    "network_dim": "r",
    "rslora": "use_rslora",
    "dora": "use_dora",
}
_SECTIONS = (
    *("lora_adapter_metadata", "lora_config", "peft_config", "adapter_config"),
    *("adapter", "lora"),
)
_OF_TRAINERS = ("type", "dtype", "verbose", "apply_to_critic", "dropout")
_COMPONENTS = ("transformer", "generator")
_OF_KOHYA = tuple(f"ss_network_{name}" for name in ("module", "args", "alpha", "dim"))
_PATTERN = re.compile(r"\^?(?:\w|\\?\.)+\$?")
_DIGITS = re.compile(r"-?\d{1,12}(?:\.\d{0,12})?")
# Names of scales; those of the second kind count only in the file of the tensors.
_SCALE = re.compile(
    r"(?:(?:lora|network|adapter|linear|peft)_?(?:alphas?|scale|scaling|multiplier"
    r"|strength)|alpha_pattern|(?:use_)?rslora)"
)
_SCALE_BESIDE = re.compile(r"alphas?|scales?|scaling|multiplier|strength")
# In the config of a whole training these may have other meanings.
_ANYTHING = re.compile(rf"r|rank|{_SCALE_BESIDE.pattern}")
_MERGE = "merge the adapters with the library that wrote them first"


@dataclasses.dataclass(frozen=True)
class Statement:
    """One statement about the scale of adapters.

    Attributes:
      origin: Its place, for messages.
      alpha: Alpha of modules that no pattern names. None if not stated.
      rank: Rank of modules that no pattern names. None if not stated.
      alphas: Alpha by pattern of a module's name; the first match counts.
      ranks: Rank by pattern of a module's name; the first match counts.
      rslora: Whether alpha is divided by the rank's square root (rsLoRA,
        arXiv:2312.03732).
      is_whole: Whether it is a whole config of PEFT, where a missing alpha is not the
        rank.
      unclear: Names of unknown settings that may be a scale.
    """

    origin: str
    alpha: float | None = None
    rank: int | None = None
    alphas: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    rslora: bool = False
    is_whole: bool = False
    unclear: tuple[str, ...] = ()

    def alpha_of(self, module: str) -> float | None:
        return _first(self.alphas, module, self.alpha)

    def rank_of(self, module: str) -> int | None:
        return _first(self.ranks, module, self.rank)

    def factor(self, module: str, rank: int, alpha: float | None = None):
        """Returns the factor of a module's update, or None if not stated."""
        alpha = self.alpha_of(module) if alpha is None else alpha
        return None if alpha is None else scale(alpha, rank, self.rslora)


def scale(alpha: float, rank: int, rslora: bool) -> float:
    """Returns the factor of an update of this alpha and rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _first(pairs, module: str, default):
    for pattern, value in pairs:
        name = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        inside = not pattern.startswith("^") and module.endswith(f".{name}")
        if module == name or inside:
            return value
    return default


def of_tensors(alphas: Mapping[str, float]) -> Statement:
    """Returns the statement of a file's `.alpha` tensors."""
    pairs = tuple((f"^{module}$", alpha) for module, alpha in alphas.items())
    return Statement("the file's alpha tensors", alphas=pairs)


def of_peft(
    origin: str, settings: Mapping[str, Any], is_whole: bool = True
) -> Statement:
    """Returns the statement of settings of PEFT.

    Args:
      origin: Their place, for messages.
      settings: Settings by name.
      is_whole: Whether they are a whole config of PEFT.

    Raises:
      Mismatch: A setting has a wrong type, or changes the meaning of tensors in an
        unsupported way. All are listed.
    """
    settings = {name: _number_of(name, value) for name, value in settings.items()}
    problems = [f"{origin}: {line}" for line in _check(settings)]
    if problems:
        raise Mismatch(problems)
    return Statement(
        origin,
        settings.get("lora_alpha"),
        settings.get("r"),
        tuple((settings.get("alpha_pattern") or {}).items()),
        tuple((settings.get("rank_pattern") or {}).items()),
        bool(settings.get("use_rslora")),
        is_whole,
    )


def _number_of(name: str, value: Any) -> Any:
    """Returns a setting: text as its number, and ranks as integers."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = float(value)
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and name == "r" else value


def _check(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each unusable setting."""
    for name, value in settings.items():
        if name in _NEUTRAL and value not in (_NEUTRAL[name], None, [], {}):
            yield (
                f"{name}={shown(value, 60)} changes the meaning of tensors; it must be"
                f" {_NEUTRAL[name]!r}; {_MERGE}"
            )
        if name not in _KNOWN and value not in (None, False, [], {}, ""):
            yield f"{shown(name, 60)}={shown(value, 60)} is unknown; {_MERGE}"
    start = settings.get("init_lora_weights")
    if not any(start is one or start == one for one in _PLAIN_STARTS):
        yield (
            f"init_lora_weights={shown(start, 60)} changed the weights below the"
            " adapters; convert them with PEFT"
            " (path_initial_model_for_weight_conversion) first"
        )
    yield from _check_number("lora_alpha", settings.get("lora_alpha"), float)
    yield from _check_number("r", settings.get("r"), int)
    rslora = settings.get("use_rslora")
    if rslora not in (None, True, False):
        yield f"use_rslora={shown(rslora, 60)}, must be true or false"
    for name, kind in (("alpha_pattern", float), ("rank_pattern", int)):
        yield from _check_pattern(name, settings.get(name), kind)


def _check_pattern(name: str, found: Any, kind: type) -> Iterator[str]:
    if found is not None and not isinstance(found, Mapping):
        yield f"{name}={shown(found, 60)}, must be an object"
        return
    for pattern, value in (found or {}).items():
        if not _PATTERN.fullmatch(pattern):
            yield (
                f"{name}: {shown(pattern, 60)} is a regular expression, but must be"
                f" names of modules; {_MERGE}"
            )
        yield from _check_number(f"{name}, {shown(pattern, 60)}", value, kind)


def _check_number(name: str, value: Any, kind: type) -> Iterator[str]:
    kinds = (int,) if kind is int else (int, float)
    if value is None:
        return
    if type(value) not in kinds or not 0 < value < 2**31:
        yield f"{name}={shown(value, 60)}, must be a number above 0"


def of_sections(
    origin: str, content: Mapping[str, Any]
) -> tuple[list[Statement], list[str]]:
    """Returns the statement of a header or checkpoint, and its unused entries.

    Settings are at the top, in a section for adapters, or in JSON there. Those of
    kohya's trainers start with `ss_`.

    Raises:
      Mismatch: As `of_peft`.
    """
    # Names in headers come in any order.
    named = sorted(content.items(), key=lambda pair: str(pair[0]))
    pairs = [(_plain_name(name), _parsed(value)) for name, value in named]
    content, statements, unused = dict(pairs), [], []
    if any(name.startswith("ss_network") for name in content):
        statements.append(_of_kohya(origin, content))
    top, unclear = {}, []
    for name, value in pairs:
        known = _NAMES.get(name, name)
        if name in _SECTIONS and isinstance(value, Mapping):
            inner = _component(f"{origin}, {name}", value)
            statements.append(of_peft(f"{origin}, {name}", inner))
        elif name in ("config", "args") and isinstance(value, Mapping):
            # There `rank` may be a process index, and `alpha` may be anything.
            plain = {k: v for k, v in value.items() if not _ANYTHING.fullmatch(k)}
            statements += of_sections(f"{origin}, {name}", plain)[0]
            unused.append(name)
        elif known in {*_USED, *_NEUTRAL, "init_lora_weights"}:
            if top.setdefault(known, value) != value:
                both = f"{shown(top[known], 60)} and {shown(value, 60)}"
                raise Mismatch([f"{origin}: {known} is both {both}"])
        elif name not in _OF_KOHYA:
            unused.append(name)
            unclear += _scales_in(name, value, _SCALE_BESIDE)
    if top:
        statements.append(of_peft(origin, top, is_whole=False))
    if unclear:
        statements.append(Statement(origin, unclear=tuple(unclear)))
    return statements, unused


def _plain_name(name: Any) -> str:
    """Returns the name of a setting in lower case, without its component."""
    start, dot, rest = str(name).partition(".")
    return (rest if dot and start in _COMPONENTS else str(name)).lower()


def _scales_in(
    name: str, value: Any, beside: re.Pattern | None = None
) -> Iterator[str]:
    """Yields names, of or within a setting, that may be a scale."""
    if value in (None, False, "", [], {}):
        return
    if any(one and one.fullmatch(name) for one in (_SCALE, beside)):
        yield name
    elif isinstance(value, Mapping):
        for inner, part in value.items():
            for found in _scales_in(_plain_name(inner), part):
                yield f"{name}.{found}"


def _parsed(value: Any) -> Any:
    """Returns a plain value: the JSON in a header's text, or the number in a tensor.

    Names that are not text, which a checkpoint may have, are dropped.
    """
    if isinstance(value, Mapping):
        return {str(name): _parsed_within(one) for name, one in value.items()}
    if not isinstance(value, str):
        return _parsed_within(value)
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return words[value]
    try:
        return parsed(value)
    except (ValueError, RecursionError):
        return value


def _parsed_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _parsed_within(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_parsed_within(one) for one in value]
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 else f"a tensor of shape {value.shape}"
    return value


def _component(origin: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section's settings of PEFT, without the component that diffusers adds.

    Raises:
      Mismatch: A setting belongs to a component other than the transformer.
    """
    found, problems = {}, []
    for name, value in section.items():
        start, dot, rest = name.partition(".")
        if dot and start not in _COMPONENTS:
            other = f"{shown(name, 60)} is of another network"
            problems.append(f"{origin}: {other}; remove it")
        plain = rest if dot else name
        if plain == "type" and str(value).lower() != "lora":
            kind = shown(value, 60)
            problems.append(f"{origin}: type={kind}, must be 'lora'; {_MERGE}")
        if plain not in _OF_TRAINERS:
            found[_NAMES.get(plain, plain)] = value
    if problems:
        raise Mismatch(problems)
    return found


def _of_kohya(origin: str, header: Mapping[str, Any]) -> Statement:
    """Returns the statement of kohya's header; a missing or 0 alpha is the rank."""
    module = header.get("ss_network_module") or "networks.lora"
    args = header.get("ss_network_args") or {}
    problems = []
    last = str(module).rpartition(".")[2]
    algorithm = args.get("algo", "lora") if isinstance(args, Mapping) else args
    if not last.startswith("lora") and last != "kohya":
        problems.append(f"ss_network_module={shown(module, 60)}, must be a LoRA module")
    if algorithm not in ("lora", "locon"):
        found = shown(algorithm, 60)
        problems.append(f"ss_network_args: algo={found}, must be 'lora'")
    for name in ("dora_wd", "rs_lora", "use_tucker", "use_scalar", "wd_on_output"):
        if isinstance(args, Mapping) and args.get(name) not in (None, False, "False"):
            found = shown(args[name], 60)
            problems.append(f"ss_network_args: {name}={found} is not supported")
    numbers = {"lora_alpha": "ss_network_alpha", "r": "ss_network_dim"}
    values = {}
    for ours, name in numbers.items():
        value = header.get(name)
        if isinstance(value, float) and value.is_integer() and ours == "r":
            value = int(value)
        # Files of resizing tools hold "Dynamic": their tensors have the numbers.
        if value not in (None, 0, "Dynamic"):
            values[ours] = value
            problems += _check_number(name, value, int if ours == "r" else float)
    if problems:
        raise Mismatch([f"{origin}: {line}; {_MERGE}" for line in problems])
    return Statement(origin, values.get("lora_alpha"), values.get("r"))


@dataclasses.dataclass(frozen=True)
class Scales:
    """The scale of adapters.

    Attributes:
      factors: Factor of `lora_B` by module.
      alpha: Alpha, where alpha / rank is the factor of all modules. If factors differ,
        alpha is the rank, and only the tensors hold the factors.
      rank: The largest rank.
      notes: Notes on the values used and their origin.
    """

    factors: Mapping[str, float]
    alpha: float
    rank: int
    notes: tuple[str, ...]

    @property
    def different(self) -> list[float]:
        """The factors if modules differ, else an empty dict."""
        values = sorted(set(self.factors.values()))
        return values if len(values) > 1 else []


def settle(
    ranks: Mapping[str, int],
    statements: list[Statement],
    given: float | None,
    default: str | None,
) -> Scales:
    """Returns the scale of each module from all statements.

    Args:
      ranks: Rank of the tensors by module.
      statements: The statements of the files.
      given: Alpha from the user. It overrides all statements, and is reported.
      default: Reason why a missing alpha means the rank. None if it does not.

    Raises:
      Mismatch: The tensors have other ranks than stated, or statements disagree.
      UserError: Alpha is not stated, or the user's alpha is invalid.
    """
    if given is not None and (type(given) not in (int, float) or not 0 < given < 2**31):
        raise UserError(f"alpha={given!r}: must be a number above 0")
    problems, factors, silent = [], {}, []
    for one in statements if given is None else ():
        if one.unclear:
            names = ", ".join(one.unclear[:6])
            problems.append(
                f"{one.origin}: {names:.200} may scale the adapters but is not"
                " supported; give their alpha with --alpha"
            )
    rslora = any(one.rslora for one in statements)
    for module, rank in ranks.items():
        problems += _other_ranks(module, rank, statements)
        known = [(one.origin, one.factor(module, rank)) for one in statements]
        known = [(origin, factor) for origin, factor in known if factor is not None]
        if given is not None:
            factors[module] = scale(given, rank, rslora)
            continue
        if len({round(math.log(factor), 5) for _, factor in known}) > 1:
            stated = ", ".join(f"{origin} {value:g}" for origin, value in known)
            problems.append(
                f"{module}: different factors ({stated}); choose one with --alpha"
            )
        if not known:
            silent.append(module)
        factors[module] = known[0][1] if known else 1.0
    if problems:
        raise Mismatch(problems)
    if silent and (default is None or len(silent) < len(ranks)):
        raise UserError(
            f"alpha is not stated for {len(silent)} of {len(ranks)} adapted modules,"
            f" such as {silent[0]}; give --alpha=NUMBER as in the settings of the"
            f" training (their rank is {ranks[silent[0]]})"
        )
    return _scales(ranks, factors, statements, given, default if silent else None)


def _other_ranks(module: str, rank: int, statements) -> Iterator[str]:
    for one in statements:
        stated = one.rank_of(module)
        if stated not in (None, rank):
            yield f"{one.origin}: {module} has rank {stated}, the tensors have {rank}"


def _scales(ranks, factors, statements, given, default) -> Scales:
    largest = max(ranks.values(), default=1)
    values = set(factors.values())
    alpha = largest
    if len(values) == 1:
        alpha = values.pop() * largest
        alpha = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        # Unchanged text, because the weights' digest includes it.
        candidates = (given, *(one.alpha for one in statements))
        alpha = next((one for one in candidates if one == alpha), alpha)
    notes = list(_notes(ranks, factors, statements, given, default))
    return Scales(factors, alpha, largest, tuple(notes))


def _notes(ranks, factors, statements, given, default) -> Iterator[str]:
    rslora = any(one.rslora for one in statements)
    root = ", divided by the square root of the rank (rsLoRA)" if rslora else ""
    speaking = [one for one in statements if one.alpha is not None or one.alphas]
    if given is not None:
        yield f"alpha {given:g} of --alpha is used{root}"
        for one in speaking:
            alphas = {one.alpha_of(module) for module in ranks} - {None, float(given)}
            if alphas:
                found = ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:4])
                yield f"--alpha replaces alpha {found} of {one.origin}"
    elif default:
        yield f"alpha is assumed to be the rank, so the factor is 1: {default}"
    for one in speaking if given is None else ():
        alphas = sorted({one.alpha_of(module) for module in ranks} - {None})
        found = ", ".join(f"{alpha:g}" for alpha in alphas[:4])
        yield f"alpha {found} of {one.origin} is used{root}"
    if len(set(ranks.values())) > 1:
        lowest, highest = min(ranks.values()), max(ranks.values())
        yield f"ranks from {lowest} to {highest}: padded with zeros to {highest}"
    if len(set(factors.values())) > 1:
        low, high = min(factors.values()), max(factors.values())
        yield f"modules have different factors, from {low:g} to {high:g}"

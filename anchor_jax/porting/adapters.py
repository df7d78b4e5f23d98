"""Adapters (LoRA) of all known trainers, converted to the names of PEFT.

Known names of a module's two matrices, after any prefix of a trainer:
`blocks.0.self_attn.q.lora_A.weight` (PEFT, diffusers), `.lora_down.weight` (ComfyUI),
`lora_unet_blocks_0_self_attn_q.lora_down.weight` (kohya, musubi-tuner), and
`.lora.down.weight` (older diffusers). A tensor `.alpha` beside them is the module's
alpha.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.porting.convert import STACKED, Deferred, KeyRule, Mismatch, fill
from anchor_jax.porting.key_tables import BLOCK_MODULES, PEFT
from anchor_jax.porting.recognise import kind_of
from anchor_jax.porting.torch_file import release

_MATRIX = re.compile(
    r"(?P<module>.*?)(?:"
    r"\.lora_(?P<ab>[AB])(?:\.(?P<adapter>\w+))?\.weight"
    r"|\.lora_(?P<updown>down|up)\.weight"
    r"|\.lora\.(?P<older>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<oldest>down|up)\.weight)"
)
_ALPHA = re.compile(r"(?P<module>.*)\.alpha")
_SIDE = {"A": "A", "B": "B", "down": "A", "up": "B"}
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_REFUSED = (
    (r"\.(lora_magnitude_vector|dora_scale)\b", "a magnitude of DoRA"),
    (r"\.(hada_|lokr_|oft_|lora_mid\b|on_input$)", "LyCORIS (LoHa, LoKr, OFT, LoCon)"),
    (r"\.diff(_b|_m)?$", "a difference added to weights, not low-rank"),
    (r"\.lora_(B|up)\.bias$|\.lora_B\.\w+\.bias$|\.bias$", "a bias of adapters"),
    (r"\.lora_embedding_[AB]", "adapters of an embedding"),
    (r"^(lora_te|text_encoder|te\d?_)", "adapters of a text encoder"),
    (r"^transformer_2\.", "adapters of Wan2.2's second transformer"),
    (r"modules_to_save|original_module|\.base_layer\.", "a whole weight of PEFT"),
    (r"\.(scale_weight|scale_input)$|^scaled_fp8$", "quantised adapters"),
)
_MERGE = (
    "merge it into the weights with the library that wrote it, and port the merged"
    " weights"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """The matrices of a file by module, and the alphas among its tensors.

    Attributes:
      arrays: `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B` [out,
        rank] by name.
      alphas: Alpha by module, for modules with a tensor of it.
      form: "peft", or "other" for names whose readers take factor 1 without an alpha.
      prefixes: Parts that were removed from the names.
    """

    arrays: Mapping[str, np.ndarray]
    alphas: Mapping[str, float]
    form: str
    prefixes: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        end = ".lora_A.weight"
        return {
            name.removeprefix(PEFT).removesuffix(end): array.shape[0]
            for name, array in self.arrays.items()
            if name.endswith(end) and array.ndim == 2
        }


def read(plain: Mapping[str, np.ndarray], removed: tuple[str, ...]) -> Adapters | None:
    """Returns the adapters among arrays, or None if there are none.

    Args:
      plain: Arrays by name, without the prefix that all names share.
      removed: The parts of that prefix.

    Raises:
      Mismatch: Some arrays are not low-rank matrices, or lack their counterpart. All
        are listed.
    """
    refused = dict(_refuse(plain))
    problems = list(refused.values())
    found: dict[str, np.ndarray] = {}
    alphas: dict[str, float] = {}
    named, forms = set(), set()
    for name, array in plain.items():
        if match := _MATRIX.fullmatch(name):
            side = next(filter(None, map(match.group, ("ab", *_OTHERS))))
            named.add(match["adapter"] or "default")
            forms.add("peft" if match["ab"] else "other")
            target = f"{PEFT}{_module(match['module'])}.lora_{_SIDE[side]}.weight"
            if target in found:
                problems.append(f"{name}: another name also means {target}")
            found[target] = array
        elif match := _ALPHA.fullmatch(name):
            alphas[_module(match["module"])] = _number(name, array, problems)
        elif name not in refused:
            found[PEFT + name] = array  # The table reports the fault.
    if not forms and kind_of(plain) != "adapters":
        return None
    if len(named) > 1:
        problems.append(f"several adapters in one file: {', '.join(sorted(named))}")
    problems += _unpaired(found, alphas)
    if problems:
        raise Mismatch(problems)
    is_peft = forms == {"peft"} and PEFT in removed
    return Adapters(found, alphas, "peft" if is_peft else "other", removed)


_OTHERS = ("updown", "older", "oldest")


def _refuse(names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the names of tensors that cannot be read, with the reason."""
    for name in names:
        for pattern, kind in _REFUSED:
            if re.search(pattern, name) and not _MATRIX.fullmatch(name):
                yield name, f"{name}: {kind} is not supported; {_MERGE}"
                break


def _module(name: str) -> str:
    """Returns a module's dotted name; kohya joins its parts by underscores."""
    for start in _FLAT:
        if name.startswith(start):
            return _dotted(name.removeprefix(start))
    return name


def _dotted(flat: str) -> str:
    # Some trainers write one more underscore after the prefix.
    for source in BLOCK_MODULES:
        fields = KeyRule(source.replace(".", "_"), source).match_source(
            flat.lstrip("_")
        )
        if fields is not None:
            return fill(source, fields)
    return flat


def _number(name: str, array: np.ndarray, problems: list[str]) -> float:
    """Returns the number in a one-element tensor, or 1 with a line in `problems`."""
    value = float(array.reshape(-1)[0]) if array.size == 1 else float("nan")
    if not 0 < value < float("inf"):
        problems.append(
            f"{name}: {value if array.size == 1 else array.shape}, must be one number"
            " above 0"
        )
        return 1.0
    return value


def _unpaired(arrays: Mapping[str, Any], alphas: Mapping[str, float]) -> Iterator[str]:
    """Yields a line for each module with one matrix, unequal ranks or alpha alone."""
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {
        name.removesuffix(end): None
        for name in arrays
        for end in ends
        if name.endswith(end)
    }
    for module in modules:
        a, b = (arrays.get(module + end) for end in ends)
        if a is None or b is None:
            yield f"{module}{ends[a is not None]}: missing, but its counterpart exists"
        elif a.ndim == b.ndim == 2 and not a.shape[0] == b.shape[1] > 0:
            yield f"{module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}"
    for module in alphas:
        if PEFT + module not in modules:
            yield f"{module}.alpha: the file has no adapters of that name"


def filled(
    arrays: Mapping[str, np.ndarray],
    factors: Mapping[str, float],
    table: tuple[KeyRule, ...],
    layers: int | None,
) -> dict[str, Any]:
    """Returns arrays that are complete: scaled, of one rank, and in every layer.

    Lower ranks are padded with zeros to the largest. Layers without adapters get zeros
    if other layers have them. Neither changes a result.

    Args:
      arrays: The arrays of `Adapters`.
      factors: Factor of `lora_B` by module.
      table: The table of names.
      layers: Number of layers of the transformer. None takes the layers in the file.
    """
    downs = (array for name, array in arrays.items() if ".lora_A." in name)
    rank = max((array.shape[0] for array in downs if array.ndim == 2), default=0)
    result = {}
    for name, array in arrays.items():
        module = name.removeprefix(PEFT).rpartition(".lora_")[0]
        result[name] = _filled(name, array, rank, factors.get(module, 1.0))
    for name, array in list(result.items()):
        for rule in table if layers else ():
            if (fields := rule.match_source(name)) is None:
                continue
            for layer in range(layers):
                other = fill(rule.source, {**fields, STACKED: layer})
                if other not in result:
                    result[other] = _zeros(array)
    return result


def _zeros(like: np.ndarray | Deferred) -> Deferred:
    shape, dtype = tuple(like.shape), like.dtype
    return Deferred(shape, dtype, lambda: np.zeros(shape, dtype))


def _filled(name: str, array: np.ndarray, rank: int, factor: float) -> Any:
    """Returns an array of the largest rank, multiplied if it is a `lora_B`."""
    axis = 0 if ".lora_A." in name else 1
    factor = 1.0 if axis == 0 else factor
    if array.ndim != 2 or (array.shape[axis] == rank and factor == 1):
        return array
    shape = (rank, array.shape[1]) if axis == 0 else (array.shape[0], rank)

    def make() -> np.ndarray:
        whole = np.zeros(shape, array.dtype)
        # The product is rounded once, because a narrow type may not hold the factor
        # exactly.
        part = array.astype(np.float32) * np.float32(factor) if factor != 1 else array
        # Overflow is found and reported by the check for finite weights.
        with np.errstate(over="ignore"):
            whole[tuple(map(slice, array.shape))] = part.astype(array.dtype)
        release(array)
        return whole

    return Deferred(shape, array.dtype, make)

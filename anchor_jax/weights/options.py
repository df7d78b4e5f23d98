"""The options of loading weights."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from anchor_jax import sharding
from anchor_jax.errors import UserError, shown, suggest
from anchor_jax.limits import DTYPES
from anchor_jax.wan.spec import LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.tokenizer import Tokenizer
from anchor_jax.weights.bundle import PromptEncoder

TEXT_ENCODERS = ("device", "free", "sharded")
ADAPTERS = ("separate", "merged", "none")
NETWORKS = ("generator", "critic")


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """The options of `load_bundle`."""

    grid: LatentGrid | str | None
    dtype: str | None
    text_encoder: str
    mesh: Mesh | None
    lora: str
    param_dtype: str | None
    network: str

    def __post_init__(self):
        for name, known in (
            ("text_encoder", TEXT_ENCODERS),
            ("lora", ADAPTERS),
            ("network", NETWORKS),
        ):
            value = getattr(self, name)
            if value not in known:
                found = suggest(str(value), known, name)
                raise UserError(f"{name}={shown(value)}{found}")
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            if value is not None and value not in DTYPES:
                found = suggest(str(value), DTYPES, "types")
                raise UserError(f"{name}={shown(value)}{found}")

    @property
    def text_mesh(self) -> Mesh | None:
        """The mesh that the text encoder is split over, or None."""
        if self.text_encoder != "sharded":
            return None
        return self.mesh or sharding.make_mesh(found=jax.local_devices())

    def item(self, present: Sequence[str]) -> str:
        """Returns the item of a checkpoint that holds the requested network."""
        is_critic = self.network == "critic" and "fake_score" in present
        return "fake_score" if is_critic else "generator"

    def encoder(self, text: TextConfig, tokenizer: Tokenizer, load) -> PromptEncoder:
        """Returns the encoder whose parameters `load` places on `text_mesh`."""
        place = None
        if self.mesh is not None:
            place = NamedSharding(self.mesh, PartitionSpec())
        elif self.text_encoder == "sharded":
            place = SingleDeviceSharding(jax.local_devices()[0])
        return PromptEncoder(text, tokenizer, load, self.text_encoder == "free", place)

    def typed(self, config):
        """Returns a network's config with the requested dtype."""
        if self.dtype is None:
            return config
        return dataclasses.replace(config, dtype=self.dtype, param_dtype=self.dtype)

    def with_param_dtype(self, model: ModelConfig) -> ModelConfig:
        """Returns the generator's config with the requested dtype of weights."""
        if self.param_dtype is None:
            return model
        return dataclasses.replace(model, param_dtype=self.param_dtype)

    def fitting_grid(self, model: ModelConfig, default: LatentGrid) -> LatentGrid:
        """Returns the latent size of the videos.

        Raises:
          UserError: The patch does not divide it, or the size in pixels is invalid.
        """
        grid = self.grid or default
        if isinstance(grid, str):
            grid = model.family.parse_size(grid)
        try:
            grid.tokens(model.patch, model.family.strides)
        except ValueError as error:
            raise UserError(f"grid: {error}") from error
        return grid

"""A bundle: the weights of generator, text encoder and codec, and the tokenizer."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import sharding
from anchor_jax.errors import UserError, shown
from anchor_jax.wan.spec import LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.tokenizer import Tokenizer
from anchor_jax.weights.codecs import Codec

_REMEMBERED = 8 * 2**30  # bytes of stored embeddings


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Encodes prompts, and manages the memory of the text encoder's weights.

    Attributes:
      config: sizes of the text encoder.
      tokenizer: tokenizer of the text encoder.
      load: function that returns its parameters.
      frees: whether the parameters are freed after each use. The host then stores
        embeddings of recent prompts, up to 8 GiB, and each prompt is encoded alone, so
        that one program serves all calls.
      place: sharding or device of the results. None leaves them in place.
    """

    config: TextConfig
    tokenizer: Tokenizer
    load: Callable[[], Mapping[str, Any]]
    frees: bool = False
    place: jax.sharding.Sharding | None = None
    _known: collections.OrderedDict[str, np.ndarray] = dataclasses.field(
        default_factory=collections.OrderedDict
    )
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @functools.cached_property
    def params(self) -> Mapping[str, Any]:
        """The parameters, which stay loaded after the first use."""
        return self.load()

    def __call__(self, texts: Sequence[str]) -> jax.Array:
        """Returns conditioning [batch, text, dim]; rows past a prompt's end are zero.

        It compiles once per batch size unless parameters are freed.

        Raises:
          UserError: `texts` is a single string, whose letters would become prompts.
        """
        if isinstance(texts, str):
            raise UserError(
                f"texts is a single string, {shown(texts)}; give a list of strings"
            )
        if self.frees:
            with self._lock:
                encoded = jnp.asarray(self._remembered(texts))
        else:
            encoded = self._encode(self.params, texts)
        return encoded if self.place is None else jax.device_put(encoded, self.place)

    def encode_ids(self, ids, mask) -> jax.Array:
        """Returns conditioning of token ids [batch, text]; the parameters stay."""
        return self._run(self.params, ids, mask)

    def _encode(self, params, texts: Sequence[str]) -> jax.Array:
        return self._run(params, *self.tokenizer.encode(texts))

    def _run(self, params, ids, mask) -> jax.Array:
        # A mesh of the generator may be set, but the encoder is not always on it.
        with sharding.no_mesh():
            return _encode(params, ids, mask, config=self.config)

    def prepare(self, texts: Sequence[str]) -> None:
        """Loads the parameters. If they are freed, encodes the texts first.

        The embeddings are stored up to the limit.
        """
        if not self.frees:
            jax.block_until_ready(self.params)
            return
        with self._lock:
            self._encode_new(texts)

    def _encode_new(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the trimmed embeddings of texts, and stores the most recent."""
        found = {text: self._known[text] for text in texts if text in self._known}
        fresh = [text for text in dict.fromkeys(texts) if text not in found]
        if fresh:
            params = self.load()
            for text in fresh:
                found[text] = _trim(np.asarray(self._encode(params, [text]))[0])
        for text in found:
            self._known[text] = found[text]
            self._known.move_to_end(text)
        size = sum(rows.nbytes for rows in self._known.values())
        while size > _REMEMBERED:
            size -= self._known.popitem(last=False)[1].nbytes
        return found

    def _remembered(self, texts: Sequence[str]) -> np.ndarray:
        found = self._encode_new(texts)
        shape = (len(texts), self.config.text_len, self.config.dim)
        whole = np.zeros(shape, np.dtype(jnp.dtype(self.config.dtype)))
        for row, text in zip(whole, texts, strict=True):
            row[: len(found[text])] = found[text]
        return whole


@functools.partial(jax.jit, static_argnames="config")
def _encode(params, ids, mask, *, config: TextConfig) -> jax.Array:
    return Umt5Encoder(config).apply({"params": params}, ids, mask)


def _trim(encoded: np.ndarray) -> np.ndarray:
    """Returns a prompt's rows [text, dim] without the zeros at the end."""
    used = np.flatnonzero(encoded.any(axis=-1))
    return encoded[: used[-1] + 1 if used.size else 0].copy()


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that a stream takes from files.

    Attributes:
      model: sizes of the generator.
      text: sizes of the text encoder.
      codec: the VAE as a streaming decoder; hashable.
      grid: latent size of the videos.
      tokenizer: tokenizer of the text encoder.
      encode_prompts: function from a sequence of prompts to conditioning [batch, text,
        dim].
      load_variables: function that returns the generator's collections.
      load_codec: function that returns the codec's parameters.
      metadata: values stored with the weights, such as the settings of their training.
      digest: SHA-256 of the weights' file, or of the ported files.
      trained_grid: latent size of the videos of the training. None if it is unknown.
    """

    model: ModelConfig
    text: TextConfig
    codec: Codec
    grid: LatentGrid
    tokenizer: Tokenizer
    encode_prompts: PromptEncoder
    load_variables: Callable[[], Mapping[str, Any]]
    load_codec: Callable[[], Mapping[str, Any]]
    metadata: Mapping[str, Any]
    digest: str
    trained_grid: LatentGrid | None = None

    # Loaded at first use, so that prompts can be encoded before they take memory.
    @functools.cached_property
    def variables(self) -> Mapping[str, Any]:
        """The generator's collections: `params` and optionally `lora`."""
        return self.load_variables()

    @functools.cached_property
    def codec_params(self) -> Mapping[str, Any]:
        """The codec's parameters."""
        return self.load_codec()

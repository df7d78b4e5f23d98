"""Steps of regression: one network, one loss, for teacher and causal initialisation."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from anchor_jax import flow, sharding
from anchor_jax.training import losses, microbatches
from anchor_jax.training.data import order
from anchor_jax.training.state import Ema, TrainState, move_generator
from anchor_jax.wan.attention import (
    ContextKV,
    Spans,
    bidirectional,
    block_causal,
    teacher_forcing,
)
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder

FORCINGS = ("none", "noise", "teacher")
NETWORK = ("params", "lora")
"""The collections of the transformer; `text` is that of the text encoder."""


@dataclasses.dataclass(frozen=True)
class RegressionSpec:
    """The static settings of a regression.

    A batch holds `latents` [batch, frame, height, width, channel], prompts (either
    `embedding` [batch, prompt, text, dim], or `ids` and `mask` [batch, prompt, text]
    for a text encoder that is trained too), and optionally
    `which` [batch, block], the prompt of each block, `position` [frame], the temporal
    RoPE index of each frame, and `weight` [batch, block].

    Attributes:
      model: sizes of the network.
      blocks: number of frames of each block; () is one bidirectional clip.
      forcing: what a block sees of earlier blocks: "noise", at their own noise levels;
        "teacher", clean.
      endpoints: whether the batch holds the target: `target` has the shape of
        `latents`, and `noisy` at `sigma` [batch, block] is a state of the teacher's
        trajectory to it.
      shift: shift of the noise levels, which are evenly spaced before it. Not used for
        `endpoints`.
      window: frames that a block sees, its own included. None shows all.
      text: the text encoder if it is trained too, or None.
      teacher: a frozen network of the same layout, whose guided flow is the target. A
        batch then has `negative` [batch, text, dim], the embedding of the negative
        prompt. None takes the flow of the data.
      guidance: target = without + guidance (with - without).
      kernel: attention kernel.
      microbatches: number of parts of a batch, computed one after another.

    Source: training/README.md, "Flow matching", "Who sees whom"; teacher forcing and
    noise levels per block as in `dit_causal_nocache`, Diffusion Forcing
    (arXiv:2407.01392); guidance distillation, first stage of arXiv:2210.03142.
    """

    model: ModelConfig
    blocks: tuple[int, ...] = ()
    forcing: str = "none"
    endpoints: bool = False
    shift: float = 5.0
    window: int | None = None
    text: TextConfig | None = None
    teacher: ModelConfig | None = None
    guidance: float = 1.0
    kernel: Any = None
    microbatches: int = 1

    def __post_init__(self):
        if self.forcing not in FORCINGS:
            raise ValueError(f"forcing={self.forcing!r} must be one of {FORCINGS}")
        if bool(self.blocks) == (self.forcing == "none"):
            raise ValueError(
                "blocks must be given exactly for forcing 'noise' and 'teacher'"
            )
        if self.window is not None and self.forcing != "noise":
            raise ValueError(
                f"window={self.window} is for forcing='noise', not {self.forcing!r};"
                " leave it out"
            )
        if self.teacher is not None and (self.endpoints or self.text is not None):
            raise ValueError(
                "guidance needs a flow target and encoded prompts; leave it out, or set"
                " endpoints=False and text=False"
            )

    def visible(self, frames: int) -> Spans:
        """Returns which frames each block attends to."""
        if self.forcing == "none":
            return bidirectional(frames)
        if self.forcing == "teacher":
            return teacher_forcing(self.blocks)
        return block_causal(self.blocks, self.window)

    def loss(self, variables, batch, key: jax.Array, teacher=None) -> jax.Array:
        """Returns the loss of a batch. A key draws the noise and its levels.

        Args:
          variables: collections of the network, and of the text encoder if it is
            trained.
          batch: as in `RegressionSpec`.
          key: random key of noise and levels.
          teacher: collections of the teacher, if there is one.
        """
        return self.loss_of_part(variables, self.draw(batch, key), teacher)

    def draw(self, batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns a batch with all that its loss depends on besides the weights.

        That is `noisy`, `sigma` [batch, frame], for a flow `noise`, and, if frames have
        weights, `weight` [batch, frame] and `total`, the mean weight of a part.
        """
        drawn = {name: x for name, x in batch.items() if name != "weight"}
        weight = self._weight(batch)
        if self.endpoints:
            drawn["sigma"] = self._by_frame(batch["sigma"])
            counted = drawn["sigma"] != 0
            weight = counted if weight is None else counted * weight
        else:
            latents, (first, second) = batch["latents"], jax.random.split(key)
            drawn["sigma"] = self._levels(first, latents)
            noise = jax.random.normal(second, latents.shape, latents.dtype)
            drawn["noise"] = noise
            drawn["noisy"] = flow.add_noise(latents, noise, drawn["sigma"])
        if weight is None:
            return drawn
        total = jnp.sum(weight.astype(jnp.float32)) / self.microbatches
        return drawn | {"weight": weight, "total": total}

    def loss_of_part(self, variables, part, teacher=None) -> jax.Array:
        """Returns the loss of a batch, or of a part of it, from `draw`."""
        predicted = self.predict(variables, part, part["noisy"], part["sigma"])
        weights = part.get("weight"), part.get("total")
        if self.endpoints:
            x0 = flow.x0_from_flow(predicted, part["noisy"], part["sigma"])
            timestep = flow.TRAIN_STEPS * part["sigma"]
            return losses.clean_regression(x0, part["target"], timestep, *weights)
        target = part["noise"] - part["latents"]
        if self.teacher is not None:
            target = jax.lax.stop_gradient(
                self.guided(teacher, part, part["noisy"], part["sigma"])
            )
        return losses.flow_matching(predicted, target, *weights)

    def guided(self, variables, batch, noisy: jax.Array, sigma: jax.Array):
        """Returns the teacher's flow of noisy frames, with guidance, from one pass."""
        network = dataclasses.replace(self, model=self.teacher)
        prompt = batch["embedding"]
        negative = jnp.broadcast_to(batch["negative"][:, None], prompt.shape)
        with_prompt, without = network.predictions(
            variables, batch, noisy, sigma, (prompt, negative)
        )
        return without + self.guidance * (with_prompt - without)

    def predict(self, variables, batch, noisy: jax.Array, sigma: jax.Array):
        """Returns the flow of noisy frames at levels [batch, frame]."""
        embeddings = (self._embedding(variables, batch),)
        return self.predictions(variables, batch, noisy, sigma, embeddings)[0]

    def predictions(self, variables, batch, noisy, sigma, embeddings):
        """Returns the flows of noisy frames under several prompts each.

        Args:
          variables: as for `predict`.
          batch: as for `predict`.
          noisy: as for `predict`.
          sigma: as for `predict`.
          embeddings: [batch, prompt, text, dim] each.
        """
        times = flow.TRAIN_STEPS * sigma
        frames, latents, which = noisy.shape[1], noisy, batch.get("which")
        position = batch.get("position", jnp.arange(frames))
        if self.forcing == "teacher":
            latents = jnp.concatenate([batch["latents"], noisy], axis=1)
            times = jnp.concatenate([jnp.zeros_like(times), times], axis=1)
            position = jnp.tile(position, 2)
            if which is not None:
                which = jnp.concatenate([which, which], axis=1)
        videos = P(sharding.split_videos(noisy.shape[0]))
        network = {name: variables[name] for name in NETWORK if name in variables}
        run = sharding.spread(
            functools.partial(self._flows, frames=frames),
            network,
            (videos, videos, videos, videos, P()),
            videos,
        )
        return run(network, latents, times, embeddings, which, position)

    def _flows(self, variables, latents, times, embeddings, which, position, *, frames):
        """Returns the flows of one device's videos, from one pass."""
        count = len(embeddings)

        def repeated(x):
            return x if count == 1 else jnp.concatenate([x] * count)

        which = None if which is None else repeated(which)
        embedding = embeddings[0] if count == 1 else jnp.concatenate(embeddings)
        predicted, _ = WanDit(self.model, self.kernel).apply(
            variables,
            repeated(latents),
            repeated(times),
            self.context(variables, embedding, which),
            self.visible(frames),
            position,
        )
        return tuple(jnp.split(predicted[:, -frames:], count))

    def _embedding(self, variables, batch) -> jax.Array:
        """Returns the embeddings [batch, prompt, text, dim] of the prompts."""
        if "embedding" in batch:
            return batch["embedding"]
        encoder, ids = {"text": variables["text"]}, batch["ids"]
        videos = P(sharding.split_videos(ids.shape[0]))
        run = sharding.spread(
            self._encoded, encoder, (videos, videos), videos, self.text.param_dtype
        )
        return run(encoder, ids, batch["mask"])

    def _encoded(self, variables, ids, mask) -> jax.Array:
        flat = (x.reshape(-1, x.shape[-1]) for x in (ids, mask))
        found = Umt5Encoder(self.text).apply({"params": variables["text"]}, *flat)
        return found.reshape(*ids.shape, -1)

    def context(self, variables, embedding, which=None) -> ContextKV:
        """Returns the keys and values of each block's prompt.

        Args:
          variables: collections of the network.
          embedding: [batch, prompt, text, dim].
          which: [batch, block], the prompt of each block. None if there is one prompt.
        """
        videos, prompts = embedding.shape[:2]
        context = WanDit(self.model, self.kernel).apply(
            variables,
            embedding.reshape(videos * prompts, *embedding.shape[2:]),
            method="project",
        )
        if which is None:
            return context
        rows = (which + prompts * jnp.arange(videos)[:, None]).reshape(-1)
        return jax.tree.map(lambda x: x[:, rows], context)

    def _levels(self, key: jax.Array, latents: jax.Array) -> jax.Array:
        blocks = len(self.blocks) or 1
        uniform = stratified(key, (latents.shape[0], blocks))
        sigma = flow.shift_sigma(uniform, self.shift)
        return self._by_frame(sigma, latents.shape[1])

    def _weight(self, batch) -> jax.Array | None:
        weight = batch.get("weight")
        return None if weight is None else self._by_frame(weight)

    def _by_frame(self, values: jax.Array, frames: int = 0) -> jax.Array:
        """Returns values per block as values per frame."""
        sizes = self.blocks or (frames,)
        return jnp.repeat(
            values, np.asarray(sizes), axis=1, total_repeat_length=sum(sizes)
        )


def stratified(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform numbers in (0, 1), spread evenly over the whole array."""
    size = math.prod(shape)
    first, second = jax.random.split(key)
    cells = (jnp.arange(size) + jax.random.uniform(first, (size,))) / size
    return jax.random.permutation(second, cells).reshape(shape)


def regression_step(
    state: TrainState, frozen, batch, *, spec: RegressionSpec, tx, ema: Ema | None
):
    """Returns the state after a step, and its metrics.

    Args:
      state: the state; the compiled step donates it.
      frozen: collections of `generator` without a gradient, and those of `teacher`, if
        any.
      batch: as in `RegressionSpec`.
      spec: static settings.
      tx: gradient transformation of the optimizer.
      ema: settings of the running mean.
    """
    teacher = frozen.get("teacher")
    drawn = spec.draw(batch, state.key(0))

    def gradient(part):
        def loss(trainable):
            variables = {**frozen["generator"], **trainable}
            return spec.loss_of_part(variables, part, teacher)

        value, found = jax.value_and_grad(loss)(state.generator)
        return found, (), {"loss": value}

    shared = ("total", *order.SHARED)
    specs = {name: P() if name in shared else P(sharding.VIDEOS) for name in drawn}
    found, _, metrics = microbatches.over_parts(
        gradient, drawn, specs, (), spec.microbatches
    )
    state, norm = move_generator(state, found, metrics["loss"], tx, ema)
    state = state.replace(step=state.step + state.sound)
    return state, metrics | {"gradient_norm": norm}

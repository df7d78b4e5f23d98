"""Tiny random models of diffusers and transformers, for `tests/peers`."""

import io

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import torch
import transformers

from anchor_jax.wan.attention import bidirectional
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.tokenizer import SentencePieceTokenizer

torch.set_num_threads(1)

TEXT_LEN = 512  # WanPipeline pads prompts to this length unless it is given another.
HEADS = 2
WORDS = ("a", "red", "fox", "runs", "in", "the", "snow", "blue", "bird", "sings")
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!"


def randomized(module, seed=0, scale=0.2):
    """Returns the module with random parameters: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator)
            one = name.endswith(("norm_q.weight", "norm_k.weight", "gamma"))
            one = one or "layer_norm" in name or name.endswith("norm2.weight")
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            size = fan_in**-0.5 if parameter.ndim > 1 else scale
            parameter.copy_(1 + 0.1 * fresh if one else size * fresh)
    return module.eval()


def transformer(seed=0, layers=2):
    """Returns a `WanTransformer3DModel` of width 24."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=8,
        ffn_dim=20,
        num_layers=layers,
    )
    return randomized(model, seed)


def vae(seed=1):
    """Returns an `AutoencoderKLWan` with the stages of Wan2.1 in small widths."""
    return randomized(diffusers.AutoencoderKLWan(base_dim=4), seed)


def text_encoder(vocab, seed=2):
    """Returns a `UMT5EncoderModel` of width 16."""
    config = transformers.UMT5Config(
        vocab_size=vocab,
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return randomized(transformers.UMT5EncoderModel(config), seed)


def tokenizer():
    """Returns a `T5Tokenizer` that knows ten words and the letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0 - 0.1 * at) for at, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - 0.1 * at) for at, letter in enumerate(LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces)


def scheduler():
    """Returns the scheduler of the published folder for 480 x 832."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def pipeline():
    """Returns a whole `WanPipeline`."""
    words = tokenizer()
    return diffusers.WanPipeline(
        tokenizer=words,
        text_encoder=text_encoder(len(words)),
        vae=vae(),
        scheduler=scheduler(),
        transformer=transformer(),
    )


def draw(*shape, seed=0):
    """Returns normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(array):
    """Returns a video [batch, frame, height, width, channel] as torch has it."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def channels_last(tensor):
    """Returns a video of torch as [batch, frame, height, width, channel]."""
    return np.moveaxis(tensor.detach().float().numpy(), 1, -1)


def assert_close(ours, theirs, tolerance=1e-5):
    """Asserts that two arrays differ by at most a share of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    size = max(float(np.abs(theirs).max()), 1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * size)


def predict(model, video, timestep, text):
    """Returns the flow that diffusers' transformer predicts, channels last.

    Args:
      model: a `WanTransformer3DModel`.
      video: latents [batch, frame, height, width, channel].
      timestep: one of all videos, or one of each.
      text: embeddings [batch, text, dim].
    """
    times = np.broadcast_to(np.asarray(timestep, np.float32), len(video)).copy()
    with torch.no_grad():
        found = model(
            channels_first(video), torch.from_numpy(times), torch.from_numpy(text)
        )
    return channels_last(found.sample)


def predict_ours(config, variables, video, timestep, text):
    """Returns the flow that our transformer predicts; arguments as `predict`'s."""
    network, frames = WanDit(config), video.shape[1]
    times = np.broadcast_to(np.asarray(timestep, np.float32), len(video))
    times = np.repeat(times[:, None], frames, axis=1)
    place = jnp.arange(frames)

    @jax.jit
    def run(variables):
        context = network.apply(variables, jnp.asarray(text), method="project")
        seen = bidirectional(frames)
        return network.apply(variables, video, times, context, seen, place)[0]

    return np.asarray(run(variables))


def sentencepiece_model(text_len=TEXT_LEN):
    """Returns our tokenizer of a SentencePiece model that knows the ten words."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), LETTERS] * 20),
        model_writer=content,
        vocab_size=52,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(content.getvalue(), text_len)

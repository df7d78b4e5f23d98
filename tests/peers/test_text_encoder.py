"""Our prompt encoder beside transformers' `UMT5EncoderModel` and its tokenizer."""

import numpy as np
import peer_models as peers
import pytest
import torch

TEXTS = (
    "a red fox runs in the snow",
    "  A blue\tbird &amp;amp; a fox,  sings!\n",
    "x",
    "",
    " ".join(["the snow sings"] * 300),
)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12].strip() or "none")
def test_ids_embedding_and_padding_are_those_of_the_pipeline(pipeline, bundle, text):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    theirs = pipeline.tokenizer(
        prompt_clean(text),
        padding="max_length",
        max_length=peers.TEXT_LEN,
        truncation=True,
    )
    with torch.no_grad():
        embedding, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=peers.TEXT_LEN
        )

    ids, mask = bundle.tokenizer.encode([text])
    np.testing.assert_array_equal(ids[0], theirs.input_ids)
    np.testing.assert_array_equal(mask[0], theirs.attention_mask)
    ours = np.asarray(bundle.encode_prompts([text]))
    peers.assert_close(ours, embedding.numpy())
    assert not ours[0, mask[0].sum() :].any()


def test_prompts_of_a_batch_are_encoded_as_alone(pipeline, bundle):
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(
            list(TEXTS[:3]),
            do_classifier_free_guidance=False,
            max_sequence_length=peers.TEXT_LEN,
        )

    peers.assert_close(bundle.encode_prompts(TEXTS[:3]), theirs.numpy())

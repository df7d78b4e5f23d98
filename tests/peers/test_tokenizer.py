"""Token ids against those of transformers; without it these tests are skipped."""

import json
import pathlib

import difficult
import numpy as np
import pytest

from anchor_jax.wan.tokenizer import clean_prompt, load_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install '.[peers]'"
)

RECORDED = pathlib.Path(__file__).parents[1] / "wan" / "difficult_ids.json"
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def ids_of(peer, texts, length):
    """Ids as pipelines of diffusers make them, by transformers."""
    made = peer(
        [clean_prompt(text) for text in texts],
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
    )
    return np.asarray(made["input_ids"]), np.asarray(made["attention_mask"])


def assert_same(folder, peer, length=difficult.TEXT_LEN):
    texts = difficult.texts()
    assert len(texts) == 200
    ours = load_tokenizer(folder, length)

    ids, mask = ours.encode(texts)

    expected_ids, expected_mask = ids_of(peer, texts, length)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(mask, expected_mask)
    return ids


@pytest.mark.filterwarnings("ignore::anchor_jax.wan.tokenizer.CutWarning")
@pytest.mark.parametrize("kind", ["plain", "bytes"])
def test_ids_of_a_tokenizer_json(tmp_path, kind):
    content = difficult.tokenizer_json(byte_fallback=kind == "bytes")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)

    ids = assert_same(tmp_path, peer)

    recorded = json.loads(RECORDED.read_text())
    assert ids.tolist() == recorded[kind]


@pytest.mark.filterwarnings("ignore::anchor_jax.wan.tokenizer.CutWarning")
@pytest.mark.parametrize("length", [8, 512])
def test_ids_of_a_folder_that_transformers_saved(tmp_path, length):
    vocab = difficult.tokenizer_json(byte_fallback=False)["model"]["vocab"]
    made = transformers.T5Tokenizer(vocab=list(map(tuple, vocab)), extra_ids=2)
    made.save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()

    assert_same(tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path), length)
    assert_same(tmp_path, made, length)


@pytest.mark.filterwarnings("ignore::anchor_jax.wan.tokenizer.CutWarning")
def test_ids_of_a_vocabulary_of_sentencepiece(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(difficult.texts() * 4),
        model_prefix=str(tmp_path / "spiece"),
        model_type="unigram",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    made = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=2)
    made.save_pretrained(tmp_path)

    # The folder has both files: tokenizer.json counts.
    assert_same(tmp_path, made)

"""Cleaning and tokenising prompts."""

import importlib.util
import io
import sys
import types

import numpy as np
import pytest
import sentencepiece

from anchor_jax.wan import tokenizer

WORDS = "a red ball rolls over the green hill while two blue cars wait".split()


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_writer=model,
        **{
            "model_type": "word",
            "vocab_size": len(WORDS) + 3,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "minloglevel": 2,
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model():
    return train()


@pytest.mark.parametrize(
    "dirty, clean",
    [
        ("  a\u3000red \t\n ball ", "a red ball"),
        ("cat &amp;amp; dog", "cat & dog"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("Keeps Case", "Keeps Case"),
        ("   ", ""),
    ],
)
def test_cleaning(dirty, clean):
    assert tokenizer.clean_prompt(dirty) == clean


def test_rows_end_and_are_padded(model):
    pieces = tokenizer.SentencePieceTokenizer(model, 6)
    ids, mask = pieces.encode(["a red ball", ""])
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (2, 6)
    assert ids[0, 3] == tokenizer.END
    assert (ids[0, :3] > tokenizer.UNKNOWN).all()
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(ids[1], [1, 0, 0, 0, 0, 0])
    assert (ids[mask == 0] == tokenizer.PAD).all()
    assert pieces.vocab == len(WORDS) + 3


def test_a_cut_prompt_keeps_its_end(model):
    whole, _ = tokenizer.SentencePieceTokenizer(model, 32).encode([" ".join(WORDS)])
    short, mask = tokenizer.SentencePieceTokenizer(model, 5).encode([" ".join(WORDS)])
    np.testing.assert_array_equal(short[0, :4], whole[0, :4])
    assert short[0, 4] == tokenizer.END
    assert mask.all()


def test_unknown_words_are_named_once(model):
    pieces = tokenizer.SentencePieceTokenizer(model, 8)
    assert pieces.unknown_words("a purple ball  rolls, purple") == ["purple", "rolls,"]
    assert pieces.unknown_words("two blue cars") == []


def test_a_model_with_other_ids_is_refused():
    with pytest.raises(ValueError, match=r"\(-1, 2, 0\), expected \(0, 1, 2\)"):
        other = train(
            pad_id=-1, bos_id=1, eos_id=2, unk_id=0, vocab_size=len(WORDS) + 3
        )
        tokenizer.SentencePieceTokenizer(other, 8)


def test_loading_from_a_folder(model, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model)
    found = tokenizer.load_tokenizer(tmp_path, 7)
    assert isinstance(found, tokenizer.SentencePieceTokenizer)
    assert found.encode(["a"])[0].shape == (1, 7)


def test_an_empty_folder_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or spiece"):
        tokenizer.load_tokenizer(tmp_path)


def hide_package(monkeypatch, installed):
    find = importlib.util.find_spec
    answer = types.SimpleNamespace() if installed else None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: answer if name == "tokenizers" else find(name, *rest),
    )


def test_a_json_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    hide_package(monkeypatch, installed=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="pip install tokenizers"):
        tokenizer.load_tokenizer(tmp_path)


class FakeTokenizer:
    @classmethod
    def from_file(cls, path):
        return cls()

    def no_padding(self):
        self.free = True

    def no_truncation(self):
        self.free = True

    def encode_batch(self, prompts, add_special_tokens):
        assert self.free and not add_special_tokens
        return [types.SimpleNamespace(ids=[9] * len(row.split())) for row in prompts]


def test_the_json_is_preferred(model, tmp_path, monkeypatch):
    hide_package(monkeypatch, installed=True)
    fake = types.SimpleNamespace(Tokenizer=FakeTokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", fake)
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = tokenizer.load_tokenizer(tmp_path, 4)
    assert isinstance(found, tokenizer.FastTokenizer)
    np.testing.assert_array_equal(
        found.encode(["two  words", "more than four of them"])[0],
        [[9, 9, 1, 0], [9, 9, 9, 1]],
    )

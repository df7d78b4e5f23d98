"""Cleaning and tokenising prompts."""

import io
import json
import pathlib

import difficult
import layouts
import numpy as np
import pytest
import sentencepiece

from anchor_jax.wan import tokenizer

RECORDED = pathlib.Path(__file__).with_name("difficult_ids.json")
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


@pytest.mark.filterwarnings("ignore::anchor_jax.wan.tokenizer.CutWarning")
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
    with pytest.raises(FileNotFoundError, match="needs tokenizer.json or spiece"):
        tokenizer.load_tokenizer(tmp_path)


def write_json(folder, content):
    path = folder / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_json_is_preferred_and_the_model_alone_is_reported(model, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model)
    alone = tokenizer.load_tokenizer(tmp_path, 4)
    write_json(tmp_path, layouts.tokenizer_json(["\u2581", "\u2581a", "\u2581red"]))
    both = tokenizer.load_tokenizer(tmp_path, 4)

    assert "spiece.model" in alone.note and both.note == ""
    assert isinstance(both, tokenizer.FastTokenizer) and both.vocab == 6
    np.testing.assert_array_equal(
        both.encode(["a  red", "a red a red a"])[0], [[4, 5, 1, 0], [4, 5, 4, 1]]
    )
    assert both.unknown_words("a red cat, a cat") == ["cat,", "cat"]


@pytest.mark.filterwarnings("ignore::anchor_jax.wan.tokenizer.CutWarning")
@pytest.mark.parametrize("kind", ["plain", "bytes"])
def test_ids_of_difficult_texts_are_those_of_transformers(tmp_path, kind):
    """As recorded; tests/peers compares them with transformers itself."""
    content = difficult.tokenizer_json(byte_fallback=kind == "bytes")
    write_json(tmp_path, content)
    recorded = json.loads(RECORDED.read_text())[kind]
    made = tokenizer.load_tokenizer(tmp_path, difficult.TEXT_LEN)

    ids, _ = made.encode(difficult.texts())

    assert len(recorded) == 200
    np.testing.assert_array_equal(ids, recorded)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "is damaged"),
        ("", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"version": "1.0", "model": {"type": "Unigram", "vocab": 3}}', "is damaged"),
        (layouts.tokenizer_json([]) | {"added_tokens": 1}, "is damaged"),
        (
            {**layouts.tokenizer_json([]), "added_tokens": []}
            | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            r"\(None, None, None\), expected \(0, 1, 2\)",
        ),
    ],
)
def test_a_hostile_json_is_refused_by_name(tmp_path, content, message):
    write_json(tmp_path, content)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        tokenizer.load_tokenizer(tmp_path)


def test_a_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MOST_BYTES", 10)
    write_json(tmp_path, layouts.tokenizer_json([]))
    with pytest.raises(ValueError, match="the limit is 10"):
        tokenizer.load_tokenizer(tmp_path)


@pytest.fixture(params=["pieces", "json"])
def short(request, model, tmp_path):
    """A tokenizer that reads five tokens."""
    if request.param == "pieces":
        return tokenizer.SentencePieceTokenizer(model, 5)
    pieces = [f"\u2581{word}" for word in WORDS]
    write_json(tmp_path, layouts.tokenizer_json(["\u2581", *pieces]))
    return tokenizer.load_tokenizer(tmp_path, 5)


def test_what_is_cut_is_known(short):
    assert short.cut("a red ball rolls") is None
    cut = short.cut("a red ball  rolls over the hill")

    assert (cut.tokens, cut.kept) == (8, 5)
    assert str(cut) == "5 of 8 tokens are read; it is cut after 'a red ball rolls'"


def test_a_cut_prompt_gives_a_warning_unless_it_was_reported(short, recwarn):
    long, other = "a red ball rolls over", "two blue cars wait over the hill"
    assert short.cut(long)

    short.encode([long, "a"])
    assert not recwarn.list
    with pytest.warns(tokenizer.CutWarning, match="two blue.*5 of 8 tokens"):
        short.encode([other])


def test_of_many_cut_prompts_a_few_are_named(short):
    texts = [(f"p.txt, line {n}", f"a red ball rolls over {n}") for n in range(1, 21)]

    lines = tokenizer.report_cuts(short, [*texts, ("p.txt, line 21", "a")])

    assert lines[0].startswith("20 prompts are longer than the 5 tokens")
    assert "p.txt, line 1: 'a red ball rolls over 1'" in lines[1]
    assert lines[-1] == "  and 15 more"
    assert len(lines) == 7
    assert tokenizer.report_cuts(short, [("prompt", "a red ball")]) == []


def test_warnings_of_cut_prompts_come_to_an_end(short):
    with pytest.warns(tokenizer.CutWarning) as caught:
        for number in range(200):
            short.encode([f"a red ball rolls over {number}"])

    assert len(caught) == 11
    assert "100 prompts have been cut" in str(caught[-1].message)

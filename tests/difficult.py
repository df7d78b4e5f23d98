"""200 texts that tokenizers disagree on, and a vocabulary for them."""

import itertools

import layouts

TEXT_LEN = 24
"""Tokens of a row, so that the long ones among the texts are cut."""
_WORDS = ["a", "red", "ring", "moves", "up", "on", "gray", "the", "cat", "caf\u00e9"]
_PARTS = [
    "",
    "   ",
    "\t\n a  red\u3000ring \u00a0",
    "A Red RING.",
    "\u732b\u304c\u8d70\u308b",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001",
    "\U0001f642\U0001f408",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "cafe\u0301 e\u0301\u0323",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u202eabc\u202c\u200e",
    "\ufdfa \ufb01 \uff21\uff22 \u00bd \u2460",
    "\ufeffa\u200bred\u00adring",
    "\x01a\x1b[31mred\x7f",
    "</s>",
    "<pad> a <unk>",
    "<extra_id_0> red",
    "a</s>ring<extra_id_1>",
    "<0x41> \u2581 \u2581a",
    "&lt;b&gt; &amp;amp; &#128049;",
    "\u00c3\u00a9 \u00e2\u20ac\u2122s",
    "\u201cquoted\u201d \u2018it\u2019s\u2019",
    "100,000 3.14 \u0661\u0662",
    "\u0e41\u0e21\u0e27\u0e40\u0e14\u0e34\u0e19",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "z\u0335\u0322\u0321a\u0338l",
    "\U00010348 \U000e0001 \U0010ffff",
    "a" * 300,
    "a red ring " * 60,
]


def texts() -> list[str]:
    """Returns the texts: parts, pairs of them, and words around them."""
    pairs = (f"{one} {other}" for one, other in zip(_PARTS, _PARTS[7:], strict=False))
    joined = (one + other for one, other in zip(_PARTS, _PARTS[11:], strict=False))
    around = (
        f"{word} {part} {other}"
        for part, (word, other) in itertools.product(
            _PARTS, itertools.pairwise(_WORDS[:8])
        )
    )
    return list(itertools.islice(itertools.chain(_PARTS, pairs, joined, around), 200))


def tokenizer_json(byte_fallback: bool) -> dict:
    """Returns the content of a `tokenizer.json` with words, letters and bytes."""
    letters = [chr(code) for code in range(33, 127)] + ["\u00e9", "\u732b", "\u8272"]
    words = [f"\u2581{word}" for word in _WORDS] + _WORDS[1:]
    pieces = dict.fromkeys(["\u2581", *words, *letters])
    byte_pieces = [f"<0x{code:02X}>" for code in range(256)]
    extra = ["<extra_id_1>", "<extra_id_0>"]
    every = [*pieces, *byte_pieces, *extra]
    made = layouts.tokenizer_json(every, byte_fallback)
    flags = made["added_tokens"][0]
    made["added_tokens"] += [
        {**flags, "id": 3 + every.index(piece), "content": piece} for piece in extra
    ]
    return made

"""The tiny world's tokenizer: one token per word, without case and punctuation."""

import io
import os
import pathlib
import tempfile
from collections.abc import Sequence

import sentencepiece


def train_tokenizer(
    texts: Sequence[str], scratch: str | os.PathLike | None = None
) -> bytes:
    """Returns a SentencePiece model whose pieces are the words of `texts`.

    Ids are those of UMT5: 0 pads, 1 ends a prompt, 2 is an unknown word.

    Args:
      texts: all texts.
      scratch: folder for a temporary file. None takes the system's.
    """
    normalized = [f"{ord(c):X}\t20" for c in ",.;:!?\"'()"]
    normalized += [f"{ord(c):X}\t{ord(c.lower()):X}" for c in map(chr, range(65, 91))]
    words = sorted({word for text in texts for word in text.replace(",", "").split()})
    model = io.BytesIO()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = pathlib.Path(folder) / "rules.tsv"
        path.write_text("\n".join(normalized) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in texts if text]),
            model_writer=model,
            model_type="word",
            vocab_size=len(words) + 3,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv=str(path),
            minloglevel=2,
        )
    return model.getvalue()

"""A tokenizer without a vocabulary file: text as its utf-8 bytes.

The demonstration model `glyph-clip` reads a handful of short captions, for which the 49,408 pieces of
CLIP's own tokenizer would be most of the model's weights.  Here the ids are:

    0          padding
    1 .. 256   a byte of value 0 .. 255
    257        start
    258        end, the highest id: open_clip's `argmax` pooling finds the end of a text by it
"""

from __future__ import annotations

import torch

PAD, START, END = 0, 257, 258
VOCAB_SIZE = 259


class ByteTokenizer:
    """`tokenizer(texts) -> ids [n, context_length] int64`, called as an open_clip tokenizer is.

    Text is lower-cased and its white space collapsed; what does not fit is cut off, never the end token.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, context_length: int = 48) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must hold start and end, so at least 2, not {context_length}")
        self.context_length = context_length

    def encode(self, text: str) -> list[int]:
        """The ids of one text, start and end included, at most `context_length` of them."""
        clean = " ".join(text.lower().split()).encode("utf-8")
        return [START, *(byte + 1 for byte in clean[: self.context_length - 2]), END]

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        ids = torch.full((len(rows), self.context_length), PAD, dtype=torch.long)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

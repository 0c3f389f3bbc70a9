"""A tokenizer without a vocabulary file: text as its UTF-8 bytes.

The embedding of the 49,408 tokens of CLIP's own tokenizer would be most of the weights of `glyph-clip`. The ids are:

    0          padding
    1 .. 256   a byte of value 0 .. 255
    257        start
    258        end, the highest id, which open_clip's `argmax` pooling finds
"""

from __future__ import annotations

import torch

PAD, START, END = 0, 257, 258


class ByteTokenizer:
    """`tokenizer(texts) -> ids [n, context_length] int64`, with the interface of open_clip's tokenizers.

    Text is lower-cased, its white space is collapsed, and it is truncated before the end token.
    """

    def __init__(self, context_length: int = 48) -> None:
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}: it must be at least 2, for start and end")
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

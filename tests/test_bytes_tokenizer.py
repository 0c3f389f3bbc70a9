"""The byte tokenizer: ids, cleaning, truncation, and the end token that open_clip's pooling looks for."""

from __future__ import annotations

import pytest
import torch

from fastdlp.clip.load import model_config
from fastdlp.clip.tokenizer import END, PAD, START, ByteTokenizer

VOCABULARY = model_config("glyph-clip")["text_cfg"]["vocab_size"]


def test_ids_are_bytes_plus_one_between_start_and_end() -> None:
    ids = ByteTokenizer(context_length=6)("ab")
    assert ids.dtype == torch.long
    assert ids.tolist() == [[START, ord("a") + 1, ord("b") + 1, END, PAD, PAD]]


def test_a_list_gives_one_row_per_text() -> None:
    tokenizer = ByteTokenizer()
    rows = tokenizer(["a", "photo"])
    assert rows.shape == (2, 48)
    assert torch.equal(rows[1:], tokenizer("photo"))
    assert tokenizer([]).shape == (0, 48)


def test_case_and_white_space_do_not_matter() -> None:
    tokenizer = ByteTokenizer()
    assert torch.equal(tokenizer("  A photo\tof\n the  digit "), tokenizer("a photo of the digit"))


@pytest.mark.parametrize("text", ["", "x" * 46, "x" * 47, "é" * 100])
def test_argmax_finds_the_only_end_token(text: str) -> None:
    ids = ByteTokenizer()(text)[0]
    end = int(ids.argmax())
    assert ids[end] == END == VOCABULARY - 1
    assert (ids == END).sum() == 1
    assert not ids[end + 1 :].any()


def test_every_byte_has_its_id() -> None:
    ids = ByteTokenizer(context_length=600)("".join(map(chr, range(0x100, 0x1F0))))
    assert ids.max() < VOCABULARY
    assert ByteTokenizer().encode("\x00") == [START, 1, END]


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length"):
        ByteTokenizer(context_length=1)

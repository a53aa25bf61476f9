"""Text of users: one encoding, one rule for lines, one sentence for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import UserError
from data.files import decode_text, read_lines, read_text, split_lines


@pytest.mark.parametrize("raw", ["é red".encode(), b"\xef\xbb\xbf" + "é red".encode()])
def test_a_byte_order_mark_is_no_text(raw: bytes) -> None:
    assert decode_text(raw, "x") == "é red"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"caf\xe9", "prompts.txt: should be UTF-8, but byte 3 is 0xe9"),
        (b"\xef\xbb\xbfcaf\xe9", "prompts.txt: should be UTF-8, but byte 6 is 0xe9"),
        ("a".encode("utf-16"), "prompts.txt: is UTF-16"),
    ],
)
def test_other_encodings_are_refused_naming_file_and_byte(raw: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        decode_text(raw, "prompts.txt")


def test_lines_end_at_newlines_alone() -> None:
    assert split_lines("a\u2028b\nc\x0cd\r\ne\x85f\rg\x1ch\n\n \n") == ["a\u2028b", "c\x0cd", "e\x85f", "g\x1ch"]
    assert split_lines("a\n\nb") == ["a", "", "b"]
    assert split_lines("") == []


def test_what_cannot_be_opened_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(UserError, match="--prompts .*: cannot be read: Is a directory"):
        read_lines(tmp_path, f"--prompts {tmp_path}")

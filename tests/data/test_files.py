"""Text of users: one encoding, one rule for lines, one sentence for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import UserError
from data.files import decode_text, expand_path, read_lines, read_text, split_lines


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


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ("~", "/home/me"),
        ("~/a b/~c", "/home/me/a b/~c"),
        ("./~/a", "./~/a"),
        ("$BUCKET/$N", "pictures/7"),
        ("s3://${BUCKET}/a$N.tar", "s3://pictures/a7.tar"),
        ("a$", "a$"),
        ("", ""),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
    ],
)
def test_paths_are_filled_in(given: str, filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "BUCKET": "pictures", "N": "7"}.items():
        monkeypatch.setenv(name, value)
    assert expand_path(given) == expand_path(filled) == filled


def test_a_path_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path(Path("~/$HOME/a")) == Path("/home/me/home/me/a")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("~nobody_here/a", "'~nobody_here/a': there is no user 'nobody_here'"),
        ("$NOT_SET/a", "'\\$NOT_SET/a': the variable NOT_SET is not set"),
        ("${NOT_SET}", "the variable NOT_SET is not set"),
        ("${A:-b}", "the variable A:-b is not set"),
        ("${}", "the variable  is not set"),
        ("$EMPTY/data", "the variable EMPTY is not set"),
        ("$TILDE/data", "the variable TILDE should hold a path as it is, not '~/a'"),
        ("$NESTED/data", "the variable NESTED should hold a path as it is, not '\\$HOME'"),
    ],
)
def test_paths_that_cannot_be_filled_in_are_refused(given: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EMPTY": "", "TILDE": "~/a", "NESTED": "$HOME"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        expand_path(given)

"""Text of users: one encoding, one rule for lines, one sentence for what cannot be read; writes that are whole or
absent; locks."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import UserError
from data.files import (
    FileLock,
    InUseError,
    atomic_write,
    decode_text,
    expand_path,
    read_lines,
    read_text,
    refuse_lfs_pointers,
    remove_partials,
    split_lines,
)


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
        ("$TILDE/data", "the variable TILDE must hold a plain path, without \\$ or ~, not '~/a'"),
        ("$NESTED/data", "the variable NESTED must hold a plain path, without \\$ or ~, not '\\$HOME'"),
    ],
)
def test_paths_that_cannot_be_filled_in_are_refused(given: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EMPTY": "", "TILDE": "~/a", "NESTED": "$HOME"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        expand_path(given)


def test_a_folder_with_a_pointer_of_git_lfs_is_refused_naming_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse_lfs_pointers(tmp_path, "text.model")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=r"text.model: .*/model.safetensors: is a Git LFS pointer"):
        refuse_lfs_pointers(tmp_path, "text.model")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 60)  # the name of what is not whole yet is no longer than others
    atomic_write(path, b"first")

    def pieces() -> Iterator[bytes]:
        yield b"sec"
        assert path.read_bytes() == b"first"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic_write(path, pieces())
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [(path.name, b"first")]
    atomic_write(path, [b"sec", b"ond"])
    assert path.read_bytes() == b"second"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    left = tmp_path / "below" / ".0123456789abcdef.partial"
    others = [tmp_path / name for name in (".download.partial", "0123456789abcdef.partial", "below/a.png")]
    for path in (left, *others):
        path.touch()
    remove_partials(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


HOLD = """
import sys, time
from pathlib import Path
from data.files import FileLock
lock = FileLock(Path(sys.argv[1]), "it")
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_names_its_holder_and_falls_to_the_next_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InUseError, match=f"it is in use by process {holder.pid} on {socket.gethostname()}: stop it"):
        FileLock(path, "it")
    holder.kill()
    holder.wait()
    lock = FileLock(path, "it")
    assert str(os.getpid()) in path.read_text()
    lock.release()
    assert list(path.parent.iterdir()) == []  # the folder was another's to make


def test_a_lock_that_is_let_go_while_another_waits_is_held_once(tmp_path: Path) -> None:
    path, got = tmp_path / "made" / ".lock", list[FileLock]()
    first = FileLock(path, "it")
    waiting = threading.Thread(target=lambda: got.append(FileLock(path, "it", patience_s=20)))
    waiting.start()
    while threading.active_count() < 2 or path.read_text() == "":
        time.sleep(0.01)
    first.release()  # removes the file that the other has opened, and its folder
    waiting.join()
    with pytest.raises(InUseError):
        FileLock(path, "it")
    got[0].release()
    FileLock(path, "it").release()
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_synced_hold_files_all_the_same(tmp_path: Path, monkeypatch, number: int) -> None:
    refusing, fsync = [True, False], os.fsync

    def of(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) is refusing[0]:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of)
    atomic_write(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    refusing.reverse()  # a file's content is another matter
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_write(tmp_path / "b", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

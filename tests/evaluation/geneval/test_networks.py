"""Which weights a file holds: published, others, or damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data.errors import UserError
from evaluation.geneval import mask2former
from evaluation.geneval.mask2former import identify

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    return path


def test_the_published_file_is_told_from_others(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    expected = {"file": "model.safetensors", "sha256": DIGEST}
    assert identify(path, [DIGEST]) == identify(path, ["0" * 64, DIGEST[:8]]) == expected | {"pinned": True}
    assert identify(path, ["0" * 64]) == identify(path, []) == expected | {"pinned": False}


def test_a_file_is_held_to_the_hash_in_its_name(tmp_path: Path) -> None:
    assert identify(write(tmp_path / f"detector_2022-{DIGEST[:8]}.pth"), [])["sha256"] == DIGEST
    assert identify(write(tmp_path / "detector-without.pth"), [])["sha256"] == DIGEST
    with pytest.raises(UserError, match=rf"743b7d99.pth is damaged: its SHA-256 is {DIGEST}, its name says 743b7d99"):
        identify(write(tmp_path / mask2former.OPENMMLAB), [])


def test_a_pointer_of_git_lfs_is_no_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / mask2former.OPENMMLAB
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=r"743b7d99.pth: is a Git LFS pointer, not the file itself: .*git lfs pull"):
        identify(path, [])


def test_a_file_of_the_cache_is_held_to_its_blobs_name(tmp_path: Path) -> None:
    for name, whole in ((DIGEST, True), ("0" * 64, False)):
        link = tmp_path / "snapshots" / name / "model.safetensors"
        link.parent.mkdir(parents=True)
        link.symlink_to(write(tmp_path / "blobs" / name))
        if whole:
            assert identify(link, [])["sha256"] == DIGEST
        else:
            with pytest.raises(UserError, match=r"model\.safetensors is damaged.*its name says 0000"):
                identify(link, [])


def test_the_published_hashes_are_well_formed() -> None:
    assert all(len(digest) == 64 and int(digest, 16) for digest in mask2former._PUBLISHED_CLIP)
    assert mask2former.OPENMMLAB.endswith(f"-{mask2former._PUBLISHED[0]}.pth")

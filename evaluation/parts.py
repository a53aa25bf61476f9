"""A job's folder: held by one job at a time, with a manifest of what its files are made from, so that a job that was
killed goes on where it stood and nothing else is mixed with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.errors import UserError
from data.files import FileLock, atomic_write, remove_partials
from t2i.config_loading import changes
from t2i.train.processes import World

LOCK = ".lock"


def write_json(path: Path, tree: Any) -> None:
    """Write JSON's types to a file that is whole or absent."""
    atomic_write(path, (json.dumps(tree, indent=1) + "\n").encode())


@contextmanager
def held(world: World, out: Path, lock: Path | None = None) -> Iterator[None]:
    """Keep other jobs away from a job's folder, which is made if need be, or from a file. A collective.

    Args:
        out: what `--out` names.
        lock: the lock's file; by default it is in the folder.

    Raises:
        UserError: another job holds it, or it cannot be written to.
    """
    locks: list[FileLock] = []

    def take() -> None:
        path = lock or out / LOCK
        try:
            locks.append(FileLock(path, f"--out {out}"))
            if lock is None:
                remove_partials(out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error

    world.from_main(take)
    try:
        yield
    finally:
        for it in locks:
            it.release()


def begin_or_go_on(
    manifest: Path,
    made_of: dict[str, Any],
    beside: Mapping[str, Any] = MappingProxyType({}),
    what: str = "pictures drawn otherwise",
    advice: str = "give another name",
) -> None:
    """Write the manifest of a new, empty folder, or see that it is of the same work.

    Args:
        manifest: the file; its folder, which is held, is made if need be.
        made_of, beside: see `check_or_write_manifest`.
        what: it holds if it is another's, in words.
        advice: what to do where it is another's.

    Raises:
        UserError: the folder holds files of others or made otherwise, or cannot be written to.
    """
    folder = manifest.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            files = (it for it in folder.rglob("*") if it.is_file() and not it.name.startswith("."))
            if (other := next(files, None)) is not None:
                other = other.relative_to(folder)
                raise UserError(f"--out {folder}: holds {other} that this job has not begun: {advice}")
        differ = check_or_write_manifest(manifest, made_of, beside)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to: {error.strerror}") from error
    if differ:
        raise UserError(f"--out {folder}: holds {what} ({', '.join(differ)}): {advice}")


def begin_scores(out: Path, job: str, images: Path, **more: int) -> None:
    """Begin in a job's folder, which is held, with the scores of images that others made, or go on with them.

    Args:
        job: which job scores them.
        images: their folder.
        more: what else the scores depend on for good.

    Raises:
        UserError: it holds anything else, or cannot be written to.
    """
    scored = {"job": job, "images": str(images.resolve()), **more}
    begin_or_go_on(out / "scored.json", scored, what="scores of other images", advice="give another folder")


def check_or_write_manifest(
    manifest: Path, made_of: dict[str, Any], beside: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """Write down what a folder's files are made from; if that is known already, compare.

    Args:
        manifest: the file; its folder is there.
        made_of: everything that the files depend on, in JSON's types.
        beside: what else is worth knowing of them, which is not compared.

    Returns:
        Dotted names of what differs from the manifest that was there; none: go on.

    Raises:
        UserError: what is there is no manifest.
    """
    if not manifest.exists():
        write_json(manifest, {**beside, **made_of})
        return []
    try:
        begun = {name: value for name, value in json.loads(manifest.read_bytes()).items() if name not in beside}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{manifest}: is not what this job writes: give another name") from error
    return changes(begun, json.loads(json.dumps(made_of)))

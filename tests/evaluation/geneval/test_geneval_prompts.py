"""GenEval's prompts: the published file byte for byte, and what is said of files that are not like it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from evaluation.geneval import prompts
from evaluation.geneval.prompts import Metadata


def test_the_official_prompts_are_the_published_files() -> None:
    metadata = prompts.official()
    words = "".join(it["prompt"] + "\n" for it in metadata).encode()
    assert hashlib.md5(prompts.to_lines(metadata)).hexdigest() == "9a0ed515640279a48ed3380d90aec0ed"
    assert hashlib.md5(words).hexdigest() == "2307726efc2127aecc59ca4997159bd1"
    assert prompts.digest(metadata) == prompts.OFFICIAL_MD5


def test_the_tasks_have_as_many_prompts_as_the_paper_s_code_makes() -> None:
    metadata = prompts.official()
    assert len(metadata) == 553
    tasks = Counter(it["tag"] for it in metadata)
    assert tuple(tasks) == prompts.TASKS
    assert list(tasks.values()) == [80, 99, 80, 94, 100, 100]
    counts = Counter(it["include"][0]["count"] for it in metadata if it["tag"] == "counting")
    assert counts == {2: 26, 3: 28, 4: 26}


def test_another_random_stream_of_numpy_is_said_before_anyone_gets_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda seed: np.random.Generator(np.random.MT19937(seed)))
    with pytest.raises(UserError, match=r"NumPy .* another random stream .* install numpy .* or give the published"):
        prompts.official()


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts.to_lines(prompts.official()))
    again = prompts.read(path)
    assert again == prompts.official()
    assert prompts.to_lines(again) == path.read_bytes()


def dog(**fields: Any) -> Metadata:
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, **fields}]
    return {"tag": "position", "include": include, "prompt": "a cat and a dog"}


def test_other_wordings_and_classes_are_read_and_have_another_digest(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines, but not in a file of JSON lines.
    asked = {**dog(color="red", position=["left of", 0]), "prompt": "Two shapes\u2028\u2013 a blob and a star"}
    asked["include"][0]["class"] = "blob"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(asked, ensure_ascii=False), "utf-8")
    assert prompts.read(path) == [asked]
    assert prompts.digest([asked]) != prompts.digest([{**asked, "prompt": "a blob left of a star"}])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Invalid JSON"),
        ('{"tag": "colors"', "Invalid JSON"),
        ("[]", "should be an object"),
        ({**dog(), "tag": "colours"}, "tag: .*'colors'"),
        ({**dog(), "prompt": ""}, "prompt: .*at least 1 character"),
        ({"tag": "colors", "prompt": "a dog"}, "include and exclude are empty"),
        ({**dog(), "include": []}, "include and exclude are empty"),
        ({**dog(), "exlude": []}, "exlude is no field: did you mean exclude"),
        ({**dog(), "exclude": [{"class": "dog"}]}, r"exclude\.0\.count: Field required"),
        (dog(**{"class": ""}), r"include\.1\.class: .*at least 1 character"),
        (dog(count=0), r"include\.1\.count: .*greater than or equal to 1"),
        ({**dog(), "exclude": [{"class": "dog", "count": 0}]}, r"exclude\.0\.count: 0 leaves no image that could be"),
        ({**dog(), "heldout": "no"}, "heldout: .*valid boolean"),
        (dog(count=True), r"include\.1\.count: .*valid integer"),
        (dog(count="1"), r"include\.1\.count: .*valid integer"),
        (dog(colour="red"), r"include\.1: colour is no field: did you mean color"),
        (dog(color="teal"), r"include\.1\.color: .*'purple'"),
        (dog(position=["on", 0]), r"include\.1\.position\.0: .*'left of'"),
        (dog(position=["above"]), r"include\.1\.position\.1: Field required"),
        (dog(position=["above", 1]), r"include\.1\.position must point to an object before it"),
        (dog(position=["above", -1]), r"include\.1\.position\.1: .*greater than or equal to 0"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str | Metadata, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    wrong = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n".join([json.dumps(dog()), wrong, json.dumps(dog())]))
    with pytest.raises(UserError, match=rf"prompts .*prompts\.jsonl, line 2: .*{said}"):
        prompts.read(path)


def test_a_file_that_is_empty_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(UserError, match=r"prompts .*prompts\.jsonl: cannot be read: No such file"):
        prompts.read(path)
    path.touch()
    with pytest.raises(UserError, match=r"prompts .*prompts\.jsonl: the file is empty"):
        prompts.read(path)


def test_fields_of_others_are_kept(tmp_path: Path) -> None:
    asked = {**dog(color="red", position=["above", 0], id=3), "id": 7, "source": {"name": "a lab"}}
    nothing_but = {"tag": "counting", "exclude": [{"class": "dog", "count": 1}], "prompt": "no dogs"}
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + prompts.to_lines([asked, nothing_but]) + b"\n\n")
    assert prompts.read(path) == [asked, nothing_but]
    assert prompts.essentials(asked) == dog(color="red", position=["above", 0])


@pytest.mark.parametrize(
    "changes",
    [{"tag": "shading"}, {"excluded": []}, {"colors": "red"}, {"heldout": "no"}, {"heldout": 1}, dog(colour=3)],
)
def test_in_folders_of_others_any_tag_and_field_may_be(changes: Metadata, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**dog(), **changes}))
    assert prompts.read_one(tmp_path / "metadata.jsonl") == {**dog(), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tag": ""}, "tag: .*at least 1 character"),
        ({"include": [], "included": [{"class": "dog", "count": 1}]}, "include and exclude are empty"),
        ({"exclude": [{"class": "dog", "count": 0}]}, r"exclude\.0\.count: 0 leaves no image that could be right"),
        ({"exclude": [{"class": "dog", "count": -2}]}, r"exclude\.0\.count: -2 leaves no image"),
        (dog(count=0), r"include\.1\.count: .*greater than or equal to 1"),
    ],
)
def test_in_folders_of_others_what_any_or_no_image_shows_is_refused(
    changes: Metadata, said: str, tmp_path: Path
) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**dog(), **changes}))
    with pytest.raises(UserError, match=rf"metadata\.jsonl: {said}"):
        prompts.read_one(tmp_path / "metadata.jsonl")


def test_prompts_are_lines_of_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    odd = {**dog(), "prompt": "a\u2028dog\x85"}
    lines = [json.dumps(it, ensure_ascii=False) for it in (dog(), odd)]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\n\n").encode())
    assert prompts.read(path) == [dog(), odd]
    path.write_bytes(lines[1].encode("utf-16"))
    with pytest.raises(UserError, match="prompts.jsonl: is UTF-16: save it as UTF-8"):
        prompts.read(path)

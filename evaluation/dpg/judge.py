"""What is judged in DPG-Bench, and who judges: grids of images, questions and answers in files, and models.

Grids, in DPG-Bench's layout: one image file a prompt, named by the prompt's id, of 2 x 2 images, which stand top left,
top right, bottom left, bottom right. The resolution is the side of one of the four in pixels.

Files for a judge that runs elsewhere: one JSON object a line. The first line is a header with `judge` (null among the
questions; the answers name who gave them) and the hashes of what was asked about. Each other line is a question about
an image: `id`, `crop` (0 to 3, in the order above) and `proposition_id`; for the judge `image`, `box` (left, upper,
right and lower edge in that file) and `question`; and from it `answer`. Answers may leave out what is for the judge.

Models that judge are transformers', by name or path, of three kinds: classifiers of questions and images (ViLT),
models that write an answer (BLIP), and chat models that see (Qwen2.5-VL, LLaVA, SmolVLM), which are asked for yes or
no. Questions are put one at a time, so that no answer depends on another question.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering, AutoProcessor

from data.decode import decode_file
from data.errors import UserError
from data.files import atomic_write, name_in_errors, read_lines, refuse_lfs_pointers, sha256, write_png
from data.listing import excluded, is_image
from evaluation.dpg.rules import Item
from evaluation.sampling_job import SamplingJob, from_pipeline
from t2i.config.train import SamplingConfig
from t2i.pipeline import Pipeline, pictures_of

IMAGES = 4
"""Images in a grid."""


def boxes(resolution: int, images: int) -> list[tuple[int, int, int, int]]:
    """Left, upper, right and lower edges in pixels of a grid's first images."""
    corners = [(column * resolution, row * resolution) for row in range(2) for column in range(2)]
    return [(left, upper, left + resolution, upper + resolution) for left, upper in corners[:images]]


def find(folder: Path, ids: Collection[str]) -> dict[str, Path]:
    """A folder's grids by the ids of their prompts: file names without the ending, or else up to the first dot.

    Raises:
        UserError: the folder cannot be read, or two grids are of one prompt.
    """
    found: dict[str, Path] = {}
    with name_in_errors(str(folder), "read"):
        paths = sorted(path for path in folder.iterdir() if is_image(path.name) and not excluded(path.name))
    for path in paths:
        name = path.stem if path.stem in ids else path.name.split(".")[0]
        if name in found:
            raise UserError(f"{folder} holds two images of one prompt, {found[name].name} and {path.name}: remove one")
        found[name] = path
    return found


def check_grid(path: Path, resolution: int, images: int) -> str:
    """The SHA-256 of a grid's file.

    Raises:
        UserError: it cannot be read whole, or is no grid of images of this resolution (nor one such image, if only one
            is scored).
    """
    height, width = decode_file(path).shape[1:]
    side = 2 * resolution
    if not (height == width == side or (images == 1 and height == width == resolution)):
        raise UserError(
            f"{path} is {width} x {height} pixels: a grid of 2 x 2 images of --resolution {resolution} "
            f"has {side} x {side}"
        )
    return sha256(path)


def crops(path: Path, resolution: int, images: int) -> list[Image.Image]:
    """The first images of a grid."""
    grid = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    return [grid.crop(box) for box in boxes(resolution, images)]


@dataclass(frozen=True)
class _Tiles(SamplingJob):
    grids: Sequence[Path] = ()
    """The grid that each image goes into."""

    def is_missing(self, number: int) -> bool:
        return not self.grids[number].exists() and super().is_missing(number)


@dataclass(frozen=True)
class Grids:
    """The grids of a job, which are put together once their images are there.

    Attributes:
        out: the job's folder; grids go into `grids/`, single images into `tiles/` until then.
        items: the prompts.
        resolution: side of an image in pixels.
        sampling: how images are generated.
    """

    out: Path
    items: Sequence[Item]
    resolution: int
    sampling: SamplingConfig

    def _grid(self, item: Item) -> Path:
        return self.out / "grids" / f"{item.id}.png"

    def _tile(self, item: Item, number: int) -> Path:
        return self.out / "tiles" / f"{item.id}_{number}.png"

    def job(self, pipeline: Pipeline, fingerprint: Mapping[str, Any], metadata: Mapping[str, Any]) -> SamplingJob:
        """The job that generates the images.

        Args:
            fingerprint, metadata: what else the images depend on, and what else their manifest says.
        """

        def prepare() -> None:
            for name in ("grids", "tiles"):
                (self.out / name).mkdir(exist_ok=True)

        numbered = [(item, number) for item in self.items for number in range(IMAGES)]
        samples = pictures_of([item.prompt for item in self.items], IMAGES)
        return _Tiles(
            self.out / "grids.json",
            {**fingerprint, "resolution": self.resolution, "sampling": self.sampling.model_dump(mode="json")},
            metadata,
            [self._tile(*image) for image in numbered],
            self.sampling.batch_size,
            from_pipeline(pipeline, samples, self.sampling, (self.resolution, self.resolution)),
            prepare,
            grids=[self._grid(item) for item, _ in numbered],
        )

    def unfinished(self) -> list[Item]:
        """Prompts without a grid."""
        return [item for item in self.items if not self._grid(item).exists()]

    def assemble(self, items: Iterable[Item]) -> None:
        """Put these prompts' grids together."""
        for item in items:
            tiles = [decode_file(self._tile(item, number)).transpose(1, 2, 0) for number in range(IMAGES)]
            write_png(self._grid(item), np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))

    def remove_tiles(self) -> None:
        """Remove the single images."""
        shutil.rmtree(self.out / "tiles")


Answers = dict[str, list[dict[int, str]]]
"""By prompt, image and question."""

_HASHES = ("table_sha256", "grids_sha256")


def write_questions(
    path: Path,
    header: Mapping[str, str],
    items: Sequence[Item],
    grids: Mapping[str, Path],
    resolution: int,
    images: int,
) -> int:
    """Write what a judge has to answer about the first images of grids, and return the number of questions.

    Args:
        header: hashes of the table and of the grids.
        grids: by the prompts' ids.
        resolution: side of one image in pixels.
    """
    lines = [
        {
            "id": item.id,
            "crop": crop,
            "proposition_id": question.number,
            "image": str(grids[item.id].absolute()),
            "box": box,
            "question": question.text,
        }
        for item in items
        for crop, box in enumerate(boxes(resolution, images))
        for question in item.questions
    ]
    with name_in_errors(f"--write_questions {path}"):
        atomic_write(path, (f"{json.dumps(line)}\n".encode() for line in [{"judge": None, **header}, *lines]))
    return len(lines)


def read_answers(path: Path, header: Mapping[str, str], items: Sequence[Item], images: int) -> tuple[str, Answers]:
    """Who answered, and what.

    Raises:
        UserError: a line is malformed, the answers are to other questions or images, or one is missing or there twice.
    """
    wanted = [(item.id, crop, asked.number) for item in items for crop in range(images) for asked in item.questions]
    asked, found = set(wanted), dict[tuple[str, int, int], tuple[int, str]]()
    lines = read_lines(path, f"--answers {path}") or [""]
    judge = _read_header(path, lines[0], header)
    for number, text in enumerate(lines[1:], 2):
        line = _parse(path, number, text)
        place = (line.get("id"), line.get("crop"), line.get("proposition_id"))
        if (
            not isinstance(place[0], str)
            or type(place[1]) is not int
            or type(place[2]) is not int
            or place not in asked
        ):
            words = "id {!r}, crop {!r}, proposition_id {!r}".format(*place)
            raise UserError(f"--answers {path}: line {number}: nobody asked {words}")
        if not isinstance(line.get("answer"), str):
            raise UserError(f'--answers {path}: line {number}: answer must be a string, such as "yes"')
        if place in found:
            raise UserError(
                f"--answers {path}: line {number} answers what line {found[place][0]} does: keep one of them"
            )
        found[place] = (number, line["answer"])
    missing = [place for place in wanted if place not in found]
    if missing:
        first = "id {}, crop {}, proposition_id {}".format(*missing[0])
        raise UserError(f"--answers {path}: {len(missing)} of {len(wanted)} answers are missing, the first {first}")
    answers: Answers = {item.id: [{} for _ in range(images)] for item in items}
    for (name, crop, question), (_, answer) in found.items():
        answers[name][crop][question] = answer
    return judge, answers


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--answers {path}: line {number} is not JSON: {error}") from error
    if not isinstance(line, dict):
        raise UserError(f"--answers {path}: line {number} must be an object")
    return line


def _read_header(path: Path, text: str, header: Mapping[str, str]) -> str:
    line = _parse(path, 1, text)
    judge = line.get("judge")
    if not isinstance(judge, str) or not judge:
        raise UserError(f"--answers {path}: line 1 must be the questions' first line with the judge's name as judge")
    for name in _HASHES:
        if line.get(name) != header[name]:
            raise UserError(
                f"--answers {path}: {name} differs, so these answers are to other questions or images: write the "
                "questions anew with --write_questions and have them answered"
            )
    return judge


Answer = Callable[[Image.Image, str], str]
"""From an image and a question to the answer."""

CHAT_REQUEST = "{question} Answer with yes or no."
"""What a chat model is asked."""
_MAX_TOKENS = 10


@dataclass(frozen=True)
class Judge:
    """A model that answers, by the name or path that it was loaded from."""

    name: str
    answer: Answer
    weights_blake2b: str


def load(name: str, device: torch.device) -> Judge:
    """A judge from a folder, the hub's cache or the hub.

    Raises:
        UserError: transformers cannot load it, or it is of none of the three kinds.
    """
    try:
        config = type(AutoConfig.from_pretrained(name))
        # BLIP-2 is in both, and answers questions as the former.
        kinds = (AutoModelForVisualQuestionAnswering, AutoModelForImageTextToText)
        kind = next((kind for kind in kinds if config in kind._model_mapping), None)
        if kind is None:
            raise UserError(f"--judge {name} ({config.__name__}) is no model that answers questions about images")
        processor = AutoProcessor.from_pretrained(name)
        model: Any = kind.from_pretrained(name, dtype="auto")
        model.to(device).eval()
    except UserError:
        raise
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        refuse_lfs_pointers(Path(name), f"--judge {name}")
        raise UserError(f"--judge {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if kind is AutoModelForImageTextToText:
        answer = _chats(model, processor)
    else:
        answer = _writes(model, processor) if hasattr(model, "generate") else _classifies(model, processor)
    return Judge(name, torch.inference_mode()(answer), _digest(model))


def _classifies(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=question, return_tensors="pt", truncation=True)
        with torch.random.fork_rng(devices=()):  # ViLT shuffles its patches, and drops some of too many
            torch.manual_seed(0)
            logits = model(**inputs.to(model.device, model.dtype)).logits
        return str(model.config.id2label[int(logits.argmax())])

    return answer


def _writes(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=question, return_tensors="pt")
        tokens = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=_MAX_TOKENS, do_sample=False)
        return str(processor.decode(tokens[0], skip_special_tokens=True)).strip()

    return answer


def _chats(model: Any, processor: Any) -> Answer:
    def answer(image: Image.Image, question: str) -> str:
        asked = {"type": "text", "text": CHAT_REQUEST.format(question=question)}
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, asked]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=_MAX_TOKENS, do_sample=False)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(written, skip_special_tokens=True)).strip()

    return answer


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Judges: models that answer questions about a picture, through transformers, by name or path.

Three kinds are told apart by what transformers knows them as: classifiers of questions and pictures (ViLT), models that
write an answer (BLIP), and chat models that see (Qwen2.5-VL, LLaVA, SmolVLM), which are asked for yes or no.
Questions are put one at a time, so that no answer depends on what is asked beside it.

Pictures in DPG-Bench's layout: one image a prompt, named by its id, a 2 x 2 grid of four pictures.

- They stand top left, top right, bottom left, bottom right; the resolution is the side of one in pixels.
- A picture is a function of the weights, the sampler, the seed, the prompt and its number. Each is a file until its
  grid is put together, so what a killed job has drawn is there for the next, on any number of processes.

Questions for a judge that runs elsewhere, and its answers: files of one JSON object a line.

The first line is a header: `judge` (null among the questions; the answers name who gave them) and the hashes of what
was asked about. Each other line is a question about a picture: `id`, `crop` (0 to 3: top left, top right, bottom left,
bottom right) and `proposition_id`; for the judge `image`, `box` (left, upper, right and lower edge in that file) and
`question`; and from it `answer`. Lines of answers may leave out what is for the judge.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
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
from data.files import atomic_write, read_lines, refuse_lfs_pointers, sha256
from data.listing import excluded, is_image
from evaluation.dpg.rules import Item
from evaluation.sampling_job import begin_or_go_on, unfinished_batches, write_png
from t2i.config.train import SamplingConfig
from t2i.pipeline import Pipeline, pictures_of

PICTURES = 4
"""Of a prompt."""


def boxes(resolution: int, pictures: int) -> list[tuple[int, int, int, int]]:
    """Left, upper, right and lower edges in pixels of a grid's pictures."""
    corners = [(column * resolution, row * resolution) for row in range(2) for column in range(2)]
    return [(left, upper, left + resolution, upper + resolution) for left, upper in corners[:pictures]]


def find(folder: Path, ids: Collection[str]) -> dict[str, Path]:
    """A folder's images by the ids of their prompts: their names without the ending, or else up to the first dot.

    Raises:
        UserError: there is no such folder, or two images are of one prompt.
    """
    found: dict[str, Path] = {}
    try:
        paths = sorted(path for path in folder.iterdir() if is_image(path.name) and not excluded(path.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    for path in paths:
        name = path.stem if path.stem in ids else path.name.split(".")[0]
        if name in found:
            raise UserError(f"{folder} holds two images of one prompt, {found[name].name} and {path.name}: remove one")
        found[name] = path
    return found


def examine(path: Path, resolution: int, pictures: int) -> str:
    """The SHA-256 of an image's file.

    Raises:
        UserError: it cannot be read whole, or is no grid of pictures of this resolution (nor, if one is scored, one).
    """
    height, width = decode_file(path).shape[1:]
    side = 2 * resolution
    if not (height == width == side or (pictures == 1 and height == width == resolution)):
        raise UserError(
            f"{path} is {width} x {height} pixels: a grid of 2 x 2 pictures of --resolution {resolution} "
            f"has {side} x {side}"
        )
    return sha256(path)


def crops(path: Path, resolution: int, pictures: int) -> list[Image.Image]:
    """A grid's pictures."""
    image = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    return [image.crop(box) for box in boxes(resolution, pictures)]


@dataclass(frozen=True)
class Drawing:
    """Grids in the making.

    Attributes:
        out: the job's folder; the grids come into `grids/`, single pictures into `tiles/`.
        items: the prompts.
        resolution: side of a picture in pixels.
        sampling: how they are drawn.
    """

    out: Path
    items: Sequence[Item]
    resolution: int
    sampling: SamplingConfig

    def grid(self, item: Item) -> Path:
        """Where a prompt's grid is."""
        return self.out / "grids" / f"{item.id}.png"

    def tile(self, item: Item, number: int) -> Path:
        """Where one of its pictures is until then."""
        return self.out / "tiles" / f"{item.id}_{number}.png"

    def begin(self, fingerprint: dict[str, Any], beside: dict[str, Any]) -> None:
        """Begin in the folder, which is held, or see that the pictures that are there are of the same drawing.

        Args:
            fingerprint: what else the pictures depend on, in JSON's types.
            beside: what else is worth knowing of them.

        Raises:
            UserError: they are not, it holds anything else, or cannot be written to.
        """
        settings = {**fingerprint, "resolution": self.resolution, "sampling": self.sampling.model_dump(mode="json")}
        begin_or_go_on(self.out / "grids.json", settings, beside, "grids drawn otherwise")
        for name in ("grids", "tiles"):
            (self.out / name).mkdir(exist_ok=True)

    def unfinished(self) -> list[Item]:
        """Prompts without a grid."""
        return [item for item in self.items if not self.grid(item).exists()]

    def _is_missing(self, picture: tuple[Item, int]) -> bool:
        return not (self.grid(picture[0]).exists() or self.tile(*picture).exists())

    def missing(self) -> list[Sequence[tuple[Item, int]]]:
        """Batches of pictures, prompts and numbers, from which any has to be drawn."""
        pictures = [(item, number) for item in self.items for number in range(PICTURES)]
        return unfinished_batches(pictures, self.sampling.batch_size, self._is_missing)

    def draw(self, pipeline: Pipeline, mine: Sequence[tuple[Item, int]], drawn: Callable[[int], object]) -> None:
        """Draw these pictures, whole batches, and tell of each batch how many it was; those that are there stay."""
        every = pictures_of([item.prompt for item in self.items], PICTURES)
        numbered = {item.id: every[i * PICTURES :] for i, item in enumerate(self.items)}
        pictures = [numbered[item.id][number] for item, number in mine]
        names = iter(mine)
        for batch in pipeline.draw_batches(pictures, self.sampling, (self.resolution, self.resolution)):
            for image in batch:
                if self._is_missing(picture := next(names)):
                    write_png(self.tile(*picture), image.permute(1, 2, 0).numpy())
            drawn(len(batch))

    def assemble(self, mine: Sequence[Item]) -> None:
        """Put these prompts' grids together."""
        for item in mine:
            tiles = [decode_file(self.tile(item, number)).transpose(1, 2, 0) for number in range(PICTURES)]
            write_png(self.grid(item), np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))

    def end(self) -> None:
        """Remove the single pictures."""
        shutil.rmtree(self.out / "tiles")


Answers = dict[str, list[dict[int, str]]]
"""By prompt, picture and question."""

_HASHES = ("table_sha256", "grids_sha256")


def write_questions(
    path: Path,
    header: Mapping[str, str],
    items: Sequence[Item],
    grids: Mapping[str, Path],
    resolution: int,
    pictures: int,
) -> int:
    """Write what a judge has to answer, and return how many questions that is.

    Args:
        header: hashes of the table and of the grids.
        items: what is asked.
        grids: the images, by the prompts' ids.
        resolution: side of one picture in pixels.
        pictures: of a prompt.
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
        for crop, box in enumerate(boxes(resolution, pictures))
        for question in item.questions
    ]
    try:
        atomic_write(path, (f"{json.dumps(line)}\n".encode() for line in [{"judge": None, **header}, *lines]))
    except OSError as error:
        raise UserError(f"--write-questions {path} cannot be written: {error.strerror}") from error
    return len(lines)


def read_answers(path: Path, header: Mapping[str, str], items: Sequence[Item], pictures: int) -> tuple[str, Answers]:
    """Who answered, and what.

    Raises:
        UserError: a line is malformed, the answers are to other questions or pictures, one stands there twice, or not
            all are there.
    """
    wanted = [(item.id, crop, it.number) for item in items for crop in range(pictures) for it in item.questions]
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
            told = "id {!r}, crop {!r}, proposition_id {!r}".format(*place)
            raise UserError(f"--answers {path}: line {number}: nobody asked {told}")
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
    answers: Answers = {item.id: [{} for _ in range(pictures)] for item in items}
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
                f"--answers {path}: {name} differs, so these answers are to other questions or pictures: write the "
                "questions anew with --write-questions and have them answered"
            )
    return judge


Answer = Callable[[Image.Image, str], str]

CHAT_REQUEST = "{question} Answer with yes or no."
"""What a chat model is asked."""
_MAX_TOKENS = 10


@dataclass(frozen=True)
class Judge:
    """A model that answers.

    Attributes:
        name: as it was asked for.
        answer: from a picture and a question to the answer.
        weights_blake2b: a hash of its weights.
    """

    name: str
    answer: Answer
    weights_blake2b: str


def load(name: str, device: torch.device) -> Judge:
    """A judge, from the hub's cache, the hub or a folder.

    Raises:
        UserError: transformers cannot load it, or it is of none of the kinds.
    """
    try:
        config = type(AutoConfig.from_pretrained(name))
        # BLIP-2 is known as both, and answers questions as the former.
        kinds = (AutoModelForVisualQuestionAnswering, AutoModelForImageTextToText)
        kind = next((it for it in kinds if config in it._model_mapping), None)
        if kind is None:
            raise UserError(f"--judge {name} ({config.__name__}) is no model that answers questions about a picture")
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
        with torch.random.fork_rng(devices=()):  # ViLT draws the order of its patches, and which if they are too many
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

"""Sets of images as they are read: their order, their pixels, their hashes, and what is said of broken ones."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import BOMB, foreign
from PIL import Image

from data.decode import adm_crop
from data.errors import UserError
from evaluation.fid.images import open_images


def pixels(n: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def read(path: Path, groups: list[list[int]], crop: int | None = None) -> list[torch.Tensor]:
    return list(open_images(path, crop).batches(groups))


def test_an_npz_that_git_lfs_has_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match="samples.npz: is a Git LFS pointer, not the file itself"):
        open_images(tmp_path / "samples.npz", None)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_at_any_ascending_numbers(tmp_path: Path, save) -> None:
    images = pixels(7)
    save(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(7))
    opened = open_images(tmp_path / "samples.npz", None)
    assert (len(opened), opened.size) == (7, (8, 12))
    found = list(opened.batches([[0, 1], [3], [6]]))
    assert [len(batch) for batch in found] == [2, 1, 1]
    expected = torch.from_numpy(images[[0, 1, 3, 6]]).permute(0, 3, 1, 2)
    assert torch.cat(found).equal(expected)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    images = pixels(3)
    (tmp_path / "b").mkdir()
    for name, image in zip(("b/0.png", "c.PNG", "a.webp"), images, strict=True):
        Image.fromarray(image).save(tmp_path / name, lossless=True)
    Image.fromarray(images[0]).save(tmp_path / "d.jpg", quality=95)
    (tmp_path / "prompts.json").write_text("{}")
    opened = open_images(tmp_path, None)
    assert (len(opened), opened.size) == (4, (8, 12))
    found = torch.cat(list(opened.batches([[0, 1, 2], [3]]))).permute(0, 2, 3, 1).numpy()
    assert (found[:3] == images[[2, 0, 1]]).all()
    assert np.abs(found[3].astype(int) - np.asarray(Image.open(tmp_path / "d.jpg")).astype(int)).max() <= 2


def test_a_folder_holds_what_counts_in_every_listing(tmp_path: Path) -> None:
    image = pixels(1)[0]
    there, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    names = ["00000/samples/0000.png", "00000/samples/0001.JPG", "b.tif", "c.jfif", "grid.png"]
    others = [
        "00000/grid.png",
        ".ipynb_checkpoints/b-checkpoint.png",
        "._b.png",
        "__MACOSX/b.png",
        "00000/@eaDir/x.png",
    ]
    for name in (*names, *others, "../elsewhere/d.bmp"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        form = {".JPG": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}.get(Path(name).suffix, "PNG")
        Image.fromarray(image).save(there / name, form)
    (there / "linked").symlink_to(elsewhere)
    (there / "again").symlink_to(there / "00000")
    (there / "00000" / "metadata.jsonl").write_text("{}")
    (there / "phone.heic").touch()
    opened = open_images(there, None)
    assert [file.relative_to(there).as_posix() for file in opened.files] == [*names, "linked/d.bmp"]
    assert torch.cat(list(opened.batches([range(6)]))).shape == (6, 3, 8, 12)
    assert opened.left_out == {
        "hidden": 2,
        "in system folders (snapshots, recycle bins)": 2,
        "links to folders that are listed already": 1,
        "grids of GenEval's layout": 1,
        "files that are no images": 1,
        "images of a format that is not decoded (.heic)": 1,
    }


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in zip("ab", pixels(2), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    lines = subprocess.run(["sha256sum", "a.png", "b.png"], cwd=folder, capture_output=True, check=True).stdout
    assert open_images(folder, None).digest() == hashlib.sha256(lines).hexdigest()
    np.savez(tmp_path / "s.npz", arr_0=pixels(2))
    whole = hashlib.sha256((tmp_path / "s.npz").read_bytes()).hexdigest()
    assert open_images(tmp_path / "s.npz", None).digest() == whole


def test_a_size_crops_as_adm_does(tmp_path: Path) -> None:
    for name, image in zip("ab", (pixels(1, 40, 70)[0], pixels(1, 9, 6)[0]), strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (found,) = read(tmp_path, [[0, 1]], crop=16)
    for name, image in zip("ab", found, strict=True):
        expected = adm_crop(np.asarray(Image.open(tmp_path / f"{name}.png")), 16)
        assert (image.permute(1, 2, 0).numpy() == expected).all()
    with pytest.raises(UserError, match=r"b\.png: is 6 x 9 pixels and a\.png 70 x 40: give --size"):
        read(tmp_path, [[0, 1]])


def test_a_broken_image_is_said_by_name(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.fromarray(pixels(1)[0]).save(tmp_path / f"{name}.png")
    cut = tmp_path / "b.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"b\.png: is no image that can be read \(.*\): make it again"):
        read(tmp_path, [[0], [1], [2]])


def test_an_npz_that_is_cut_or_spoiled(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=pixels(50))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"samples\.npz: arr_0 cannot be read: Bad CRC-32"):
        read(path, [list(range(50))])
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"samples\.npz: cannot be read as an \.npz"):
        open_images(path, None)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": pixels(2)}, "holds no arr_0"),
        ({"arr_0": pixels(2).astype(np.float32)}, r"must be uint8 \(N, H, W, 3\), and is float32 \(2, 8, 12, 3\)"),
        ({"arr_0": pixels(2).transpose(0, 3, 1, 2).copy()}, r"must be uint8 .* and is uint8 \(2, 3, 8, 12\)"),
        ({"arr_0": pixels(0)}, r"must be uint8 .* and is uint8 \(0, 8, 12, 3\)"),
    ],
)
def test_an_npz_of_another_form(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(UserError, match=said):
        open_images(tmp_path / "samples.npz", None)


def test_what_is_no_set_of_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images .jpg, "):
        open_images(tmp_path, None)
    for path in (tmp_path / "missing.npz", Path(__file__)):
        with pytest.raises(UserError, match=r"must be a folder of images or an \.npz with arr_0"):
            open_images(path, None)


@pytest.mark.parametrize("crop", [None, 16])
def test_images_of_others_are_read_as_training_reads_them(tmp_path: Path, crop: int | None) -> None:
    found = {name: it for name, it in foreign(32).items() if name.endswith((".png", ".webp"))}
    for name, (content, _) in found.items():
        (tmp_path / name).write_bytes(content)
    (batch,) = read(tmp_path, [list(range(len(found)))], crop)
    for image, name in zip(batch, sorted(found), strict=True):
        assert np.abs(image.numpy().astype(int) - np.array(found[name][1])[:, None, None]).max() <= 1
    (tmp_path / "zz.png").write_bytes(BOMB)
    with pytest.raises(UserError, match=r"zz.png: has too many pixels"):
        read(tmp_path, [[len(found)]], crop)

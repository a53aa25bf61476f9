"""Tars as other tools and accidents leave them: every sample is found, and what is lost is counted or said."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from itertools import pairwise

import pytest
from tar_samples import MemoryStore, tar_bytes

from data.errors import DataError
from data.shards.index import list_left_out, open_index
from data.shards.manifest import UNCOUNTED, build_manifest, offsets_to_bytes, scan_shard
from data.shards.tar import TarSample, TarScan, parse_sample

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
END = bytes(1024)


def scan(content: bytes) -> TarScan:
    store = MemoryStore({"s.tar": content})
    return scan_shard(store, store.list()[0])


def parsed(content: bytes) -> list[TarSample]:
    return [parse_sample(content[a:b]) for a, b in pairwise(scan(content).offsets.tolist())]


def shard(keys: str, form: int = tarfile.USTAR_FORMAT) -> bytes:
    return tar_bytes([(f"{key}.{end}", key.encode()) for key in keys for end in ("jpg", "txt")], form)


def summed(header: bytes) -> bytes:
    """The header with its checksum."""
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


def of(*infos: tarfile.TarInfo, form: int = tarfile.USTAR_FORMAT, **more: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **more) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    for field, value in more.items():
        setattr(made, field, value)
    return made


# --- headers ---


def test_old_gnu_headers_have_no_prefix() -> None:
    """GNU tar's incremental archives have a file's atime and ctime where ustar has the first part of its name."""
    content = bytearray(shard("abcd", tarfile.GNU_FORMAT))
    for at in range(0, 8 * 1024, 1024):
        times = b"13727410000\0" + b"14524770400\0"
        content[at : at + 512] = summed(bytes(content[at : at + 345]) + times + bytes(content[at + 369 : at + 512]))
    found = parsed(bytes(content))
    assert [it.key for it in found] == ["a", "b", "c", "d"] and found[3].members == {"jpg": b"d", "txt": b"d"}
    ustar = tar_bytes([("f" * 90 + "/" + "n" * 90 + ".jpg", b"1")], tarfile.USTAR_FORMAT)
    assert parsed(ustar)[0].key == "f" * 90 + "/" + "n" * 90


def test_a_v7_header_has_a_name_and_a_size_alone() -> None:
    content = bytearray(shard("ab"))
    for at in range(0, 4 * 1024, 1024):
        header = bytes(content[at : at + 156]) + b"\0" + bytes(512 - 157)
        content[at : at + 512] = summed(header)
    assert [it.members for it in parsed(bytes(content))] == [{"jpg": b"a", "txt": b"a"}, {"jpg": b"b", "txt": b"b"}]


def test_sizes_in_binary_long_names_global_records_and_folders_in_front() -> None:
    binary = bytearray(shard("a"))
    binary[124:136] = b"\x80" + bytes(10) + b"\x01"
    binary[:512] = summed(bytes(binary[:512]))
    assert parsed(bytes(binary))[0].members == {"jpg": b"a", "txt": b"a"}
    names = [info(f"./d.d/{'n' * 120}{i}.{end}") for i in range(2) for end in ("jpg", "txt")]
    for form in FORMS[1:]:
        records = {"pax_headers": {"comment": "git", "path": "nowhere"}} if form == tarfile.PAX_FORMAT else {}
        found = parsed(of(*names, form=form, **records))
        assert [it.key for it in found] == [f"./d.d/{'n' * 120}{i}" for i in range(2)]
        assert all(it.members.keys() == {"jpg", "txt"} for it in found)


# --- what comes before and behind the end ---


@pytest.mark.parametrize("between", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1 << 18)])
@pytest.mark.parametrize("form", FORMS)
def test_archives_that_follow_each_other_are_read_on(between: bytes, form: int) -> None:
    first = shard("abc", form)
    bare = first.rstrip(b"\0")
    bare = bare.ljust(-(-len(bare) // 512) * 512, b"\0")
    second, third = shard("cd", form), shard("e", tarfile.GNU_FORMAT)
    for content in (first + between + second + third, bare + between + second + third):
        found = parsed(content)
        assert [it.key for it in found] == ["a", "b", "c", "c", "d", "e"]
        assert all(it.members == {"jpg": it.key.encode(), "txt": it.key.encode()} for it in found)
        assert scan(content).corruption is None and not scan(content).left_out


def test_zeros_in_front_are_passed() -> None:
    assert [it.key for it in parsed(bytes(512) + shard("ab"))] == ["a", "b"]


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (b"\n", "1 bytes that are no tar follow the end of the archive, from byte 10240"),
        (b"not a header".ljust(2048), "2048 bytes that are no tar follow the end of the archive, from byte 10240"),
        (bytes(2 << 20), "only zeros from byte 4096 on, 2103296 of them: was the file ever filled?"),
        (shard("c")[:1536], "cut off at byte 11776, inside member 'c.txt'"),
    ],
)
def test_what_follows_the_end_is_said(behind: bytes, said: str) -> None:
    content = shard("ab") + behind
    assert scan(content).corruption == said and [it.key for it in parsed(content)] == ["a", "b"]


def test_a_tar_without_an_end_may_be_cut_off() -> None:
    content = shard("ab")
    said = "it ends at byte 4096 without the zeros that close a tar: it may be cut off"
    assert scan(content[:4096]).corruption == said
    assert len(scan(content[:4096]).offsets) == 3 and scan(content[: 4096 + 512]).corruption is None
    assert scan(content[:2048]).offsets.tolist() == [0, 2048]


def test_tars_without_a_member() -> None:
    for content in (bytes(512), bytes(10240), of(info("d", tarfile.DIRTYPE))):
        found = scan(content)
        assert found.offsets.tolist() == [0] and found.corruption == "no member that belongs to a sample"


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (gzip.compress, "not a tar but gzip-compressed: gunzip it first"),
        (bz2.compress, "not a tar but bzip2-compressed: bunzip2 it first"),
        (lzma.compress, "not a tar but xz-compressed: unxz it first"),
        (lambda raw: b"\x28\xb5\x2f\xfd" + raw, "not a tar but Zstandard-compressed: unzstd it first"),
        (lambda raw: b"PK\x03\x04" + raw, "not a tar but a ZIP archive or an Excel workbook: unpack it"),
        (lambda raw: b"\0\x05\x16\x07" + raw, "not a tar but what macOS keeps beside a file"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda raw: b"<!doctype html>" * 99, "no tar header at byte 0: not a tar"),
    ],
)  # fmt: skip
def test_what_is_called_tar_and_is_none_is_called_by_its_name(pack: object, said: str) -> None:
    found = scan(pack(shard("ab")))  # type: ignore[operator]
    assert len(found.offsets) == 1 and said in str(found.corruption)


# --- members that are lost ---


def test_links_and_sparse_files_are_counted_with_what_helps() -> None:
    pax_sparse = info("c.jpg", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "5"})
    content = of(
        info("a.jpg"),
        info("a.txt", tarfile.LNKTYPE, linkname="b.txt"),
        info("b.jpg", tarfile.SYMTYPE, linkname="a.jpg"),
        info("b.txt"),
        pax_sparse,
        info("c.txt"),
        info("latest", tarfile.SYMTYPE, linkname="."),
        info("d.jpg", tarfile.FIFOTYPE),
        form=tarfile.PAX_FORMAT,
    )
    assert [(it.key, set(it.members)) for it in parsed(content)] == [("a", {"jpg"}), ("b", {"txt"}), ("c", {"txt"})]
    assert scan(content).left_out == {
        "hard links in tars (write the files: tar --hard-dereference)": 1,
        "symbolic links in tars (write the files: tar --dereference)": 1,
        "sparse files in tars (write them anew without tar --sparse)": 1,
    }
    alone = scan(of(info("a.jpg", tarfile.LNKTYPE, linkname="x")))
    assert "no member that belongs to a sample; left out: 1 hard links in tars" in str(alone.corruption)


def test_members_of_every_other_type_are_counted_under_its_name() -> None:
    kinds = [
        (b"C", 700),
        (b"C", 0),
        (b"\xe9", 5),
        (b"A", 0),
        *((kind, 0) for kind in (b"3", b"4", b"5", b"6", b"D", b"V")),
    ]
    others = (info(f"a.{n}", kind, size) for n, (kind, size) in enumerate(kinds))
    content = of(info("a.jpg"), *others, info("a.txt"), form=tarfile.USTAR_FORMAT)
    assert parsed(content) == [TarSample("a", {"jpg": b"", "txt": b""})] and scan(content).corruption is None
    named = {"'C'": 2, r"'\xe9'": 1, "'A'": 1}
    assert scan(content).left_out == {f"members of tars of type {kind}": count for kind, count in named.items()}


def test_samples_in_pieces_are_counted_and_doubles_are_none() -> None:
    apart = tar_bytes([(f"{key}.{end}", b"1") for end in ("jpg", "txt", "json") for key in "abc"])
    found = scan(apart)
    assert len(found.offsets) == 10
    (reason, count), *others = found.left_out.items()
    assert count == 3 and reason.startswith("samples in pieces") and "--sort=name" in reason and not others
    assert not scan(shard("abab")).left_out and not scan(shard("aab")).left_out
    assert scan(tar_bytes([("a.jpg", b""), ("b.jpg", b""), ("b.txt", b""), ("a.txt", b"")])).left_out.total() == 1


def test_hidden_members_are_left_out_like_hidden_files() -> None:
    hidden = ("._a.jpg", "d/.ipynb_checkpoints/a.jpg", "./.snapshot/a.jpg", "__MACOSX/d/b.jpg", "d/.b.jpg")
    content = tar_bytes([("./a.jpg", b"1"), *((name, b"2") for name in hidden), ("./a.txt", b"3"), ("README", b"")])
    assert parsed(content) == [TarSample("./a", {"jpg": b"1", "txt": b"3"})]
    assert scan(content).left_out == {
        "hidden": 4,
        "in system folders (snapshots, recycle bins)": 1,
        "members of tars without an extension": 1,
    }


def test_images_beyond_the_first_of_a_sample_are_counted() -> None:
    content = tar_bytes([("a.jpg", b"1"), ("a.png", b"2"), ("a.seg.png", b"3"), ("a.txt", b"4"), ("b.webp", b"5")])
    assert scan(content).left_out == {"further images in samples (training takes one of each)": 1}


# --- over the index ---


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_lost_is_told_by_every_index(read_only: bool) -> None:
    """Also where offsets are read that an earlier run wrote, and where that was killed before its manifest."""
    pieces = tar_bytes([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.txt", b"1"), ("._a.jpg", b"")])
    store = MemoryStore({"0.tar": pieces, "1.tar": shard("cd"), "2.tar.gz": b"", ".x/3.tar": b""}, read_only=read_only)
    place = MemoryStore({}, url="s3://bucket/p/m")
    lost = {"samples in pieces (their members must be neighbours: sort them by name, as with tar --sort=name)": 1}
    lost |= {"hidden": 2, "compressed (.tar.gz: gunzip it first)": 1}
    for _ in range(3):
        built = build_manifest([store], place)
        assert built.left_out == lost and built.corrupt == []
        (first, second) = json.loads(place.read("index.json"))["shardlist"]
        assert first["left_out"].keys() == lost.keys() - {"compressed (.tar.gz: gunzip it first)"}
        assert "left_out" not in second
        del place._objects["index.json"]
    said: list[str] = []
    source = open_index(store, "s", notice=said.append)
    assert list_left_out(source) == lost
    assert len(said) == 1 and said[0].endswith("; left out: 1 hidden, 1 compressed (.tar.gz: gunzip it first)")


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("noted", [None, b"no json", b'{"a": "b"}'])
def test_offsets_that_do_not_tell_what_is_lost_train_and_are_indexed_anew(read_only: bool, noted: bytes | None) -> None:
    """As Energon writes them, alone."""
    members = [(f"{n:04d}.{end}", b"") for n in range(500) for end in ("jpg", "txt")]
    content = tar_bytes([*members[:8], ("._a.jpg", b""), *members[8:]])
    objects = {"0.tar": content, "0.tar.idx": offsets_to_bytes(scan(content).offsets)}
    objects |= {} if noted is None else {"0.tar.left_out.json": noted}
    store, place = MemoryStore(objects, read_only=read_only), MemoryStore({}, url="s3://bucket/p/m")
    source = open_index(store, "s", notice=lambda _: None)
    assert source.counts.tolist() == [500] and source.left_out == {UNCOUNTED: 1}
    assert sum(stop - start for name, start, stop in store.reads if name == "0.tar") < len(content) / 10
    for _ in range(2):
        store.reads.clear()
        assert build_manifest([store], place).left_out == {"hidden": 1}
    assert sum(stop - start for name, start, stop in store.reads if name == "0.tar") < len(content) / 10


def test_a_shard_that_was_written_anew_has_lost_nothing_more() -> None:
    store = MemoryStore({"0.tar": tar_bytes([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.txt", b"1")])})
    assert build_manifest([store], store).left_out.total() == 1
    store.write("0.tar", shard("ab"))
    assert build_manifest([store], store).left_out.total() == 0
    assert build_manifest([store], store).left_out.total() == 0


MDS = {"shards": [{"column_names": ["caption"], "format": "mds", "samples": 3}], "version": 2}
LITDATA = {"chunks": [{"filename": "chunk-0-0.bin", "chunk_size": 9}], "config": {"compression": None}}


@pytest.mark.parametrize(("content", "said"), [(MDS, "MosaicML Streaming"), (LITDATA, "LitData")])
@pytest.mark.parametrize("tars", [{}, {"0.tar": shard("a")}])
def test_an_index_of_another_tool_is_named_and_stays(content: object, said: str, tars: dict[str, bytes]) -> None:
    store = MemoryStore({"index.json": json.dumps(content).encode(), **tars})
    with pytest.raises(DataError, match=rf"/index\.json is an index of {said}.*--out FILE"):
        open_index(store, "s", notice=pytest.fail)
    with pytest.raises(DataError, match=rf"/index\.json is an index of {said}.* not overwritten"):
        build_manifest([store], store)
    assert not store.writes


@pytest.mark.parametrize("content", [b"[]", b"no json", b'{"a": 1}', b""])
def test_what_is_no_index_is_not_overwritten_either(content: bytes) -> None:
    store = MemoryStore({"index.json": content, "0.tar": shard("a")})
    with pytest.raises(DataError, match=r"/index\.json is no index of tar shards, and is not overwritten"):
        build_manifest([store], store)
    assert not store.writes

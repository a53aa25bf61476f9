"""What lies where in a tar: as tarfile finds it in whole tars, and without a crash in every kind of broken one."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import webdataset
from tar_samples import MemoryStore, tar_bytes
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data.errors import BadSample
from data.shards.tar import TarScan, parse_sample, scan_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def scan(content: bytes, readahead: int = 1024) -> TarScan:
    store = MemoryStore({"s.tar": content}, readahead)
    return scan_tar(store, store.list()[0])


def keys(content: bytes, found: TarScan) -> list[str]:
    return [parse_sample(content[a:b]).key for a, b in pairwise(found.offsets)]


def samples(n: int, size: int = 700) -> list[tuple[str, bytes]]:
    return [
        (f"{i:03d}.{end}", bytes([i]) * (size if end == "jpg" else 5 + i)) for i in range(n) for end in ("jpg", "txt")
    ]


def tar_of(infos: Sequence[tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"d" * info.size) if info.size else None)
    return buffer.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in more.items():
        setattr(info, field, value)
    return info


def header(name: bytes, size: bytes, kind: bytes = b"0", sign: int = 1) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    total = sum(block) if sign > 0 else sum(byte - 256 * (byte > 127) for byte in block)
    block[148:155] = b"%06o\0" % total
    return bytes(block)


@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_webdatasets_and_their_contents_tarfiles(form: int) -> None:
    long = "n" * 150 + "/" + "m" * 120  # more than a plain header holds
    content = tar_bytes(
        [
            ("dir.d/a.JPG", b"image a"),
            ("dir.d/a.txt", b"text a" * 300),
            ("dir.d/a.seg.png", b"another member, whose extension is seg.png"),
            ("b.txt", b""),
            ("__meta__/b.jpg", b"?"),
            ("b.webp", b"image b"),
            ("../../etc/passwd.png", b"image c"),
            ("noextension", b"?"),
            (".hidden", b"?"),
            ("trailing.", b"?"),
            (f"{long[:90]}/{long[200:]}.png" if form == tarfile.USTAR_FORMAT else f"{long}.png", b"image d"),
            ("é/ü.cls", b"3"),
        ],
        form,
    )
    found = scan(content)
    parsed = [parse_sample(content[a:b]) for a, b in pairwise(found.offsets)]
    expected = list(group_by_keys([{**it, "__url__": ""} for it in tar_file_iterator(io.BytesIO(content))]))
    theirs = [{k: v for k, v in it.items() if k not in ("__key__", "__url__", "")} for it in expected]
    names = [it["__key__"] for it in expected]
    assert "" not in names and found.corruption is None
    # WebDataset takes ".hidden" as no sample and "trailing." as a member without an extension.
    kept = [(name, members) for name, members in zip(names, theirs, strict=True) if members]
    assert [(it.key, it.members) for it in parsed] == kept
    assert parsed[0].members.keys() == {"jpg", "txt", "seg.png"} and parsed[2].key == "../../etc/passwd"


def test_offsets_are_those_that_energon_writes() -> None:
    """Its rule, over tarfile: the offset of the first member of each sample, then where tarfile came to stop."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:  # a pax header before every member
        for i in range(5):
            writer.write({"__key__": f"k{i}", "jpg": bytes(300 * i), "txt": "words", "json": {"i": i}})
    for content in (
        buffer.getvalue(),
        tar_bytes([*samples(4), ("__meta__", b"x" * 2000)]),
        tar_of([member("dir", kind=tarfile.DIRTYPE), member("a" * 120 + ".jpg", 9), member("b.txt", 1)], 1),
    ):
        expected, last = [], None
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for it in tar:
                if it.isreg() and "." in it.name and it.name.split(".")[0] != last:
                    last = it.name.split(".")[0]
                    expected.append(it.offset)
            expected.append(tar.offset)
        assert scan(content).offsets.tolist() == expected


def test_the_same_extension_again_is_another_sample() -> None:
    content = tar_bytes([("a.jpg", b"1"), ("a.txt", b"1"), ("a.JPG", b"2"), ("a.txt", b"2"), ("b.txt", b"3")])
    found = scan(content)
    parsed = [parse_sample(content[a:b]) for a, b in pairwise(found.offsets)]
    assert [(it.key, it.members) for it in parsed] == [
        ("a", {"jpg": b"1", "txt": b"1"}),
        ("a", {"jpg": b"2", "txt": b"2"}),
        ("b", {"txt": b"3"}),
    ]
    cut = scan(content[: found.offsets[1] + 512])  # the content of the second a.jpg
    assert cut.offsets.tolist() == found.offsets[:2].tolist(), "the sample that is cut is not the one before"
    for wrong in (content[: found.offsets[2]], content[found.offsets[1] :]):
        with pytest.raises(BadSample, match="another sample") as caught:
            parse_sample(wrong)
        assert caught.value.reason == "malformed_tar"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_no_plain_file_belongs_to_no_sample(form: int) -> None:
    links = [
        member("d.jpg", kind=tarfile.DIRTYPE),
        member("l.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd" * 20),
        member("h.jpg", kind=tarfile.LNKTYPE, linkname="x"),
        member("p.jpg", kind=tarfile.FIFOTYPE),
    ]
    content = tar_of([links[0], member("a.jpg", 3), *links[1:], member("a.txt", 600), *links], form)
    found = scan(content)
    assert keys(content, found) == ["a"] and found.corruption is None
    assert parse_sample(content[found.offsets[0] : found.offsets[1]]).members == {"jpg": b"ddd", "txt": b"d" * 600}


def test_sizes_of_what_has_no_content_are_not_believed() -> None:
    """As tarfile has it: some writers give links the size of what they point to."""
    content = header(b"l.jpg", b"%011o" % 5000, b"2") + header(b"a.jpg", b"%011o" % 2) + b"ok".ljust(512, b"\0")
    assert keys(content, scan(content)) == ["a"]


def test_sparse_files_belong_to_no_sample() -> None:
    old = bytearray(header(b"s.jpg", b"%011o" % 512, b"S"))
    old[482] = 1  # one more block of its map follows
    old[148:156] = b" " * 8
    old[148:155] = b"%06o\0" % sum(old)
    record = b"22 GNU.sparse.major=1\n"
    new = header(b"p", b"%011o" % len(record), b"x") + record.ljust(512, b"\0") + header(b"n.jpg", b"%011o" % 3)
    rest = header(b"a.jpg", b"%011o" % 2) + b"ok".ljust(512, b"\0") + bytes(1024)
    content = bytes(old) + bytes(512) + b"x" * 512 + new + b"abc".ljust(512, b"\0") + rest
    found = scan(content)
    assert keys(content, found) == ["a"] and found.corruption is None


def test_numbers_names_and_checksums_of_every_writer() -> None:
    data = b"ok".ljust(512, b"\0")
    binary = header(b"b.jpg", b"\x80" + (2).to_bytes(11, "big"))
    signed = header("é.jpg".encode("latin-1"), b"          2 ", sign=-1)
    content = binary + data + signed + data + header(b"c.jpg", b"2\0garbage") + data
    found = scan(content)  # no closing zeros: the end of the file is one, too
    assert keys(content, found) == ["b", "\udce9", "c"]
    assert found.corruption is None and found.offsets[-1] == len(content)
    assert parse_sample(content[:1024]).members == {"jpg": b"ok"}
    pax = b"19 path=long/a.jpg\n11 size=2\n\0\0"
    content = header(b"p", b"%o" % len(pax), b"x") + pax.ljust(512, b"\0") + header(b"a", b"0") + data
    assert parse_sample(content).key == "long/a" and parse_sample(content).members == {"jpg": b"ok"}


def test_a_cut_tar_gives_the_samples_before_and_says_where() -> None:
    content = tar_bytes(samples(6), tarfile.PAX_FORMAT)
    whole = scan(content).offsets
    assert len(whole) == 7
    for cut in (*range(1, int(whole[-1]), 97), *range(512, int(whole[-1]), 512)):
        found = scan(content[:cut])
        kept = len(found.offsets) - 1
        assert (found.offsets[:-1] == whole[:kept]).all() and found.offsets[-1] <= cut
        assert all(parse_sample(content[a:b]) for a, b in pairwise(found.offsets))
        on_border = cut in {n for start in whole for n in (int(start), int(start) + 512 + 1024)}
        assert (found.corruption is None) == on_border
        assert on_border or f"cut off at byte {cut}" in str(found.corruption)
    in_text = scan(content[: int(whole[4]) + 512 + 1024 + 512 + 3])
    assert len(in_text.offsets) == 5 and in_text.offsets[-1] == whole[4], "a sample that lost a member is not whole"
    assert "003" not in str(in_text.corruption) and "inside member '004.txt'" in str(in_text.corruption)


def test_garbage_in_the_middle_ends_the_shard_there() -> None:
    content = tar_bytes(samples(5))
    at = int(scan(content).offsets[3])
    found = scan(content[:at] + b"\xaa" * 512 + content[at + 512 :])
    assert len(found.offsets) == 4 and found.offsets[-1] == at and found.corruption == f"no tar header at byte {at}"


@pytest.mark.parametrize(
    ("content", "corruption"),
    [
        (b"", "empty (0 bytes)"),
        (b"x", "cut off at byte 1, inside the header at byte 0"),
        (b"this is not a tar " * 100, "no tar header at byte 0"),
        (header(b"a.jpg", b"%011o" % 8**10) + bytes(512), "cut off at byte 1024, inside member 'a.jpg'"),
        (header(b"a.jpg", b"\x80" + b"\xff" * 11) + bytes(512), "inside member 'a.jpg'"),
        (header(b"a.jpg", b"\xff" * 12) + bytes(512), "no valid size"),
        (header(b"a.jpg", b"-0000000001") + bytes(512), "no valid size"),
        (header(b"a.jpg", b"size") + bytes(512), "no valid size"),
        (header(b"a.jpg", b"0", b"x") * 3, "cut off at byte 1536, after a header that announces a member"),
        (header(b"a.jpg", b"0", b"x") + bytes(512), "after a header that announces a member"),
        (header(b"a.jpg", b"77777777", b"x") + bytes(5000), "announces 16777215 bytes of names"),
        (header(b"a.jpg", b"7777", b"L") + bytes(500), "inside the header at byte 0"),
        (header(b"p", b"20", b"x") + b"99 path=a\n".ljust(512), "pax header at byte 0 is malformed"),
        (header(b"p", b"20", b"x") + b"-9 path=a\n".ljust(512), "pax header at byte 0 is malformed"),
        (header(b"p", b"20", b"x") + b"0 path=a\n".ljust(512), "pax header at byte 0 is malformed"),
        (header(b"p", b"12", b"x") + b"10 size=-1".ljust(512, b"\0"), "pax header at byte 0 is malformed"),
        (header(b"p", b"1750", b"x") + b"1 path=".ljust(1024, b"9"), "pax header at byte 0 is malformed"),
    ],
)
def test_what_is_no_tar_is_no_crash(content: bytes, corruption: str) -> None:
    found = scan(content)
    assert found.offsets.tolist() == [0] and corruption in str(found.corruption)
    with pytest.raises(BadSample, match="malformed_tar"):
        parse_sample(content)


def test_tars_without_members() -> None:
    for content in (bytes(10240), bytes(100)):
        assert scan(content).offsets.tolist() == [0] and scan(content).corruption is None


def test_no_change_of_bytes_is_a_crash_and_every_sample_found_can_be_read() -> None:
    dice = random.Random(0)
    whole = [tar_bytes([*samples(4, 300), ("n" * 120 + ".jpg", b"1")], form) for form in FORMATS[1:]]
    for _ in range(600):
        content = bytearray(dice.choice(whole))
        for _ in range(dice.choice((1, 1, 5, 50))):
            at = dice.randrange(len(content) // 512) * 512 + dice.randrange(345)
            content[at] = dice.choice((0, 0x80, 0xFF, ord("9"), ord("x"), ord("L"), dice.randrange(256)))
        found = scan(bytes(content[: dice.randrange(len(content))]))
        steps = np.diff(found.offsets)
        assert (steps > 0).all() and found.offsets[-1] <= len(content)
        for a, b in pairwise(found.offsets):
            assert parse_sample(bytes(content[a:b])).members


def test_parsing_takes_any_buffer_and_refuses_what_is_not_one_whole_sample() -> None:
    content = tar_bytes(samples(2))
    end = int(scan(content).offsets[1])
    for buffer in (content[:end], bytearray(content[:end]), memoryview(content)[:end]):
        members = parse_sample(buffer).members
        assert members == {"jpg": bytes(700), "txt": bytes(5)}
        assert all(type(part) is bytes for part in members.values())
    for wrong in (b"", content[: end - 512], content[: end - 600], content[: end - 1024 + 100], content[512:end]):
        with pytest.raises(BadSample, match="malformed_tar"):
            parse_sample(wrong)


def test_data_is_skipped_where_that_moves_fewer_bytes_and_streamed_where_it_does_not() -> None:
    large = tar_bytes(samples(20, 50_000))
    store = MemoryStore({"s.tar": large}, readahead=1024)
    assert len(scan_tar(store, store.list()[0]).offsets) == 21
    assert sum(b - a for _, a, b in store.reads) < 0.1 * len(large) and len(store.reads) < 45
    small = tar_bytes(samples(200, 600))
    store = MemoryStore({"s.tar": small}, readahead=4096)
    assert len(scan_tar(store, store.list()[0]).offsets) == 201
    assert sum(b - a for _, a, b in store.reads) <= len(small)
    assert len(store.reads) < 15 < len(small) / 4096 / 5, "requests grow while the bytes between are few"
    assert set(store.versions_asked) == {"1"}


def test_a_scan_from_a_later_header() -> None:
    content = tar_bytes(samples(5))
    store = MemoryStore({"s.tar": content})
    offsets = scan(content).offsets
    assert (scan_tar(store, store.list()[0], int(offsets[2])).offsets == offsets[2:]).all()
    assert scan_tar(store, store.list()[0], int(offsets[-1])).offsets.tolist() == [offsets[-1]]

"""The index finds what tarfile would extract, at the offsets it claims, and survives or names what is broken."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from tar_samples import jpeg, tar_bytes, write_source

from data.errors import DataError
from data.index import SourceIndex, all_damage, index_source
from data.store import open_store


def index(folder: Path) -> SourceIndex:
    return index_source(open_store(str(folder)), "source")


def read(source: SourceIndex, shard: int, span: tuple[int, int] | None) -> bytes:
    assert span is not None
    return source.store.read(source.shards[shard].info.name, span[0], span[0] + span[1])


def test_webdataset_grouping_and_offsets(tmp_path: Path) -> None:
    long = "n" * 150  # more than a plain header holds
    members = [
        ("dir.d/a.JPG", b"image a"),
        ("dir.d/a.txt", b"text a"),
        ("dir.d/a.seg.png", b"not the image: its extension is seg.png"),
        ("b.txt", b"text b"),
        ("b.json", b"{}"),
        ("b.webp", b"image b"),
        ("../../etc/passwd.png", b"image c"),
        ("noextension", b"?"),
        (".hidden", b"?"),
        (f"{long}.png", b"image d"),
        ("e.cls", b"3"),
    ]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    source = index(tmp_path)
    shard = source.shards[0]
    assert shard.keys == ("dir.d/a", "b", "../../etc/passwd", long)
    a, b, c, d = (shard[n] for n in range(4))
    assert [read(source, 0, entry.image) for entry in (a, b, c, d)] == [
        b"image a",
        b"image b",
        b"image c",
        b"image d",
    ]
    assert (read(source, 0, a.caption), read(source, 0, b.caption)) == (b"text a", b"text b")
    assert c.caption is None
    assert shard.damage is None and source.counts.tolist() == [4]


def test_of_several_images_in_a_sample_the_first_extension_listed_wins(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes([(f"a.{end}", end.encode()) for end in ("webp", "png", "jpeg", "txt")]))
    source = index(tmp_path)
    assert read(source, 0, source.shards[0][0].image) == b"jpeg"


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    (tmp_path / "s.tar").write_bytes(buffer.getvalue())
    assert index(tmp_path).shards[0].keys == ("real",)


def test_every_sample_of_every_shard_and_pickling(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(write_source(tmp_path, [3, 1, 5])))
    assert source.counts.tolist() == [3, 1, 5]
    assert [shard.info.name for shard in source.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    number = 0
    for shard_number, shard in enumerate(source.shards):
        for sample in range(len(shard)):
            assert read(source, shard_number, shard[sample].image) == jpeg(number)
            assert read(source, shard_number, shard[sample].caption) == f"caption {number}".encode()
            number += 1


def test_a_cut_tar_gives_what_it_holds(tmp_path: Path) -> None:
    write_source(tmp_path, [6])
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    entries = index(tmp_path).shards[0]
    cut_at = entries[4].image[0] + 10  # type: ignore[index]
    path.write_bytes(whole[:cut_at])
    source = index(tmp_path)
    assert source.shards[0].keys == entries.keys[:4]
    assert source.shards[0].damage is not None and "000004.jpg" in source.shards[0].damage
    assert len(all_damage([source])) == 1
    for cut_at in range(1024, len(whole) - 2048, 777):
        path.write_bytes(whole[:cut_at])
        try:
            shard = index(tmp_path).shards[0]
        except DataError:
            assert cut_at < entries[0].image[0] + entries[0].image[1]  # type: ignore[index]
            continue
        for n in range(len(shard)):
            image = shard[n].image
            assert image == entries[n].image and sum(image) <= cut_at  # type: ignore[arg-type]
    header = entries[3].image[0] - 512  # type: ignore[index]
    path.write_bytes(whole[:header] + b"\xaa" * 512 + whole[header + 512 :])
    source = index(tmp_path)
    assert source.shards[0].keys == entries.keys[:3]
    assert f"no tar header at byte {header}" in str(source.shards[0].damage)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"this is not a tar " * 100, "not a tar"),
        (bytes(10240), "not a tar"),
        (tar_bytes([("a.jpg", bytes(4000))])[:2000], "not a tar file with any whole member"),
        (tar_bytes([("a.cls", b"1"), ("a.flac", b"2")]), r"no image .*\.cls, \.flac"),
    ],
)
def test_a_useless_shard_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    write_source(tmp_path, [2])
    (tmp_path / "00001.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"00001\.tar.*{said}"):
        index(tmp_path)


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'source'.*no .tar shard"):
        index(tmp_path)


def test_s3_index_equals_the_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    local = write_source(tmp_path, [4, 2])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="tars")
        for path in tmp_path.iterdir():
            client.put_object(Bucket="tars", Key=f"p/{path.name}", Body=path.read_bytes())
        remote = index_source(open_store("s3://tars/p", endpoint=endpoint, region="us-east-1"), "source")
        assert remote.fingerprint() == local.fingerprint()
        for here, there in zip(local.shards, remote.shards, strict=True):
            assert here.keys == there.keys and (here.spans == there.spans).all()
        assert read(remote, 1, remote.shards[1][1].image) == jpeg(5)
    finally:
        server.stop()

"""What each kind of transfer asks of S3, counted: none may come to ask more without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import NotFoundInStoreError, VerificationError
from ptbin.manifests.vouching import Standing
from ptbin.options import ConvertOptions
from ptbin.stores import place_of
from ptbin.stores.copying import copy_file
from tests.servers.asked import asked
from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import faulty_proxy

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("requests")
    made = {}
    for name, width in (("small", 30), ("large", 2600)):
        made[name] = folder / f"{name}.pt"
        torch.save({"a.weight": torch.randn(width, width), "b.weight": torch.randn(width)}, made[name])
    return made


Go = Callable[[str, str, dict[str, Any]], object]


def _convert(source: str, dest: str, options: dict[str, Any]) -> None:
    """As a bulk run does it where its listing of DEST shows that nothing is there."""
    draft = ptbin.stage(
        source,
        dest,
        ConvertOptions(),
        source_options=options,
        dest_options=options,
        standing=Standing(None, alone=True),
    )
    ptbin.publish(draft, source_options=options, dest_options=options)


def _copy(source: str, dest: str, options: dict[str, Any]) -> None:
    copy_file(place_of(source, options), place_of(dest, options))


# Reads; writes; all else. Of a checkpoint of 26 MiB.
TRANSFERS: list[tuple[str, str, str, str, Go, tuple[int, int, int]]] = [
    # The source; the output, which carries its own claim; the manifest. S3 answers a PUT with the MD5 of what
    # it got: nothing is read back.
    ("a small checkpoint, S3 to S3", "small", "s3", "s3", _convert, (1, 2, 0)),
    ("a small checkpoint, S3 to local", "small", "s3", "local", _convert, (1, 0, 0)),
    ("a small checkpoint, local to S3", "small", "local", "s3", _convert, (0, 2, 0)),
    ("a small file, S3 to S3", "small", "s3", "s3", _copy, (1, 1, 0)),
    ("a small file, S3 to local", "small", "s3", "local", _copy, (1, 0, 0)),
    ("a small file, local to S3", "small", "local", "s3", _copy, (0, 1, 0)),
    # The end with the index, the pickle, the weights; the state of the source when all was read.
    ("a large checkpoint, S3 to local", "large", "s3", "local", _convert, (3, 0, 1)),
    # The proof reads by 4 MiB.
    ("a large checkpoint, local to S3", "large", "local", "s3", _convert, (9, 5, 3)),
    # Put together inside the store: copied parts are neither read nor written here.
    ("a large checkpoint, S3 to S3", "large", "s3", "s3", _convert, (5, 3, 6)),
    ("a large file, S3 to S3", "large", "s3", "s3", _copy, (1, 0, 6)),
    ("a large file, S3 to local", "large", "s3", "local", _copy, (5, 0, 1)),
    ("a large file, local to S3", "large", "local", "s3", _copy, (5, 4, 4)),
]


@pytest.mark.parametrize(
    ("size", "begin", "end", "go", "most"),
    [row[1:] for row in TRANSFERS],
    ids=[row[0] for row in TRANSFERS],
)
def test_no_transfer_asks_more_than_it_needs(
    moto_s3: S3Endpoint,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    size: str,
    begin: str,
    end: str,
    go: Go,
    most: tuple[int, int, int],
) -> None:
    bucket = moto_s3.make_bucket()
    moto_s3.store().write_bytes(f"{bucket}/in/x.pt", checkpoints[size].read_bytes())
    source = f"s3://{bucket}/in/x.pt" if begin == "s3" else str(checkpoints[size])
    dest = f"s3://{bucket}/out/x.bin" if end == "s3" else str(tmp_path / "x.bin")
    with faulty_proxy(moto_s3.url) as proxy:
        go(source, dest, replace(moto_s3, url=proxy.url).storage_options)
        sent = proxy.operations()
    assert sent.total() > 0, "it went another way"
    reads = sent["get_object"]
    writes = sent["put_object"] + sent["upload_part"]
    others = sent.total() - reads - writes
    assert reads <= most[0], dict(sent)
    assert writes <= most[1], dict(sent)
    assert others <= most[2], dict(sent)


def damage(method: str, parameters: dict[str, Any]) -> None:
    """One bit of what is sent arrives as another."""
    if method == "put_object":
        parameters["Body"][100] ^= 1


def test_a_copy_that_arrived_otherwise_is_removed(moto_s3: S3Endpoint, checkpoints: dict[str, Path]) -> None:
    dest = place_of(f"s3://{moto_s3.make_bucket()}/x.pt", moto_s3.storage_options)
    with (
        asked(moto_s3.storage_options, damage),
        pytest.raises(VerificationError, match="not what was written; removed"),
    ):
        copy_file(place_of(checkpoints["small"]), dest)
    with pytest.raises(NotFoundInStoreError):
        dest.stat()


@pytest.mark.parametrize("output_format", ["torch", "safetensors", "raw"])
def test_an_output_that_arrived_otherwise_is_removed(
    moto_s3: S3Endpoint, checkpoints: dict[str, Path], output_format: Any
) -> None:
    dest = place_of(f"s3://{moto_s3.make_bucket()}/x.bin", moto_s3.storage_options)
    with asked(moto_s3.storage_options, damage), pytest.raises(VerificationError):
        ptbin.convert(checkpoints["small"], dest, ConvertOptions(format=output_format))
    with pytest.raises(NotFoundInStoreError):
        dest.stat()


def test_a_store_whose_etags_are_no_md5_has_its_output_read_back(
    moto_s3: S3Endpoint, checkpoints: dict[str, Path]
) -> None:
    """As with a key of KMS or of the caller's; what the manifest says of the weights is the same."""

    def otherwise(method: str, answer: dict[str, Any]) -> None:
        if "ETag" in answer:
            answer["ETag"] = f'"{answer["ETag"][:0:-1]}"'

    dest = place_of(f"s3://{moto_s3.make_bucket()}/x.bin", moto_s3.storage_options)
    told = ptbin.convert(checkpoints["small"], dest)
    assert told["verification"]["proven_by"] == "store checksum"
    assert ptbin.verify(dest.beside(".manifest.json")) == []
    with asked(moto_s3.storage_options, answers=otherwise) as seen:
        again = ptbin.convert(checkpoints["small"], dest, ConvertOptions(force=True))
    assert again["verification"]["proven_by"] == "read back"
    assert seen.count("get_object") >= 1
    for part in ("outputs", "tensors"):
        assert again[part] == told[part]

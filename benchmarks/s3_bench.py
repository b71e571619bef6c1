"""The world of `s3.py`: a server with a checkpoint in it, and commands to convert it or fetch as many bytes.

Every command is made for an endpoint's URL, so that it can be sent through a proxy; those that write to the
store find no earlier output there. Decides nothing about what is compared, and measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from processes import Command, warm
from run import HERE, MIB, PTBIN, PYTHON

from tests.servers.rados_gateway import RadosGateway

__all__ = [
    "AS_MANY_BYTES_URI",
    "BUCKET",
    "OUTPUT_FOLDER_URI",
    "OUTPUT_PREFIX",
    "OUTPUT_URI",
    "SOURCE_URI",
    "Bench",
    "Build",
    "digest_of_file",
    "say",
]

BUCKET = "bench"
SOURCE_KEY = "checkpoints/large.ckpt"
SOURCE_URI = f"s3://{BUCKET}/{SOURCE_KEY}"
AS_MANY_BYTES_KEY = "as-many-bytes.bin"
AS_MANY_BYTES_URI = f"s3://{BUCKET}/{AS_MANY_BYTES_KEY}"
OUTPUT_PREFIX = "out/"
OUTPUT_KEY = f"{OUTPUT_PREFIX}weights.bin"
OUTPUT_FOLDER_URI = f"s3://{BUCKET}/{OUTPUT_PREFIX}"
OUTPUT_URI = f"s3://{BUCKET}/{OUTPUT_KEY}"
SCRIPTS = HERE / "peers"

Build = Callable[[str], Command]
"""A command that talks to the endpoint of that URL."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """The server with what it stores, the local files, and where peers are found."""

    work: Path
    gateway: RadosGateway
    url: str
    key: str
    secret: str
    peers: Path
    rounds: int
    notes: list[str] = field(default_factory=list)
    output_nbytes: int = 0
    expected: str = ""

    @property
    def source(self) -> Path:
        return self.work / "large.ckpt"

    @property
    def output(self) -> Path:
        return self.work / "weights.bin"

    @property
    def reference(self) -> Path:
        """The weights as ptbin converts them from local to local."""
        return self.work / "reference.bin"

    @property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(request_checksum_calculation="when_required"),
        )

    def set_up(self, mib: int) -> None:
        say(f"making a checkpoint of {mib} MiB")
        subprocess.run(
            [PYTHON, "-I", str(HERE / "inputs.py"), "adam", str(self.source), str(mib)], check=True
        )
        convert = [PTBIN, "convert", str(self.source), str(self.reference), "--quiet"]
        subprocess.run(convert, check=True)
        self.output_nbytes = self.reference.stat().st_size
        self.expected = digest_of_file(self.reference)
        client = self.client
        client.create_bucket(Bucket=BUCKET)
        client.upload_file(str(self.source), BUCKET, SOURCE_KEY)
        client.upload_file(str(self.reference), BUCKET, AS_MANY_BYTES_KEY)
        for path in (self.source, self.reference):
            warm(path)

    def clear(self) -> None:
        """Remove every output from the store, and give its memory back: the next run finds nothing done."""
        client = self.client
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=OUTPUT_PREFIX).get("Contents", ())
        for item in found:
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
        for key, upload_id in self.open_uploads():
            client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload_id)
        self.gateway.collect_garbage()

    def open_uploads(self) -> list[tuple[str, str]]:
        answer = self.client.list_multipart_uploads(Bucket=BUCKET)
        return [(upload["Key"], upload["UploadId"]) for upload in answer.get("Uploads", ())]

    def digest_of_object(self) -> str:
        body = self.client.get_object(Bucket=BUCKET, Key=OUTPUT_KEY)["Body"]
        digest = hashlib.sha256()
        while block := body.read(MIB):
            digest.update(block)
        return digest.hexdigest()

    def options_file(self, url: str) -> str:
        """The storage options for that endpoint, as `--source-options` takes them."""
        path = self.work / f"options-{url.rpartition(':')[2]}.json"
        options = {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": url,
            "client_kwargs": {"region_name": "us-east-1"},
        }
        path.write_text(json.dumps(options))
        return f"@{path}"

    def environment(self, url: str) -> dict[str, str]:
        """For peers: where the server is, downloads below the working directory, no extra checksums."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_CONFIG_BENCH_TYPE": "s3",
            "RCLONE_CONFIG_BENCH_PROVIDER": "Ceph",
            "RCLONE_CONFIG_BENCH_ENDPOINT": url,
            "RCLONE_CONFIG_BENCH_REGION": "us-east-1",
            "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": self.key,
            "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": self.secret,
            "TMPDIR": str(self.work),
        }

    def ptbin(self, source: str, dest: str, *more: str) -> Build:
        def build(url: str) -> Command:
            argv = [PTBIN, "convert", source, dest, "--json", *more]
            for option, uri in (("--source-options", source), ("--dest-options", dest)):
                if uri.startswith("s3://"):
                    argv += [option, self.options_file(url)]
            return Command(argv, self._local(dest), before=self.before(dest))

        return build

    def peer(self, argv: Sequence[str], dest: str, **environment: str) -> Build:
        return lambda url: Command(
            argv,
            self._local(dest),
            environment={**self.environment(url), **environment},
            before=self.before(dest),
        )

    def script(self, name: str, source: str, dest: str, *more: str, **environment: str) -> Build:
        return self.peer([PYTHON, str(SCRIPTS / name), source, dest, *more], dest, **environment)

    def _local(self, dest: str) -> Path | None:
        return None if dest.startswith("s3://") else Path(dest)

    def before(self, dest: str) -> Callable[[], None] | None:
        return self.clear if dest.startswith("s3://") else None

    def program(self, name: str) -> str | None:
        """A program in the peers' folder or on PATH; where it is absent, that is noted."""
        own = self.peers / name / "bin" / name
        found = str(own) if own.exists() else shutil.which(name)
        if found is None:
            self.note(f"`{name}` is not installed here")
        return found

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What goes to S3 in several parts: content, and a writer of more than one part."""

from __future__ import annotations

import os

from ptbin.stores.s3 import S3Store

__all__ = ["CONTENT", "MIB", "write_large"]

MIB = 1 << 20
CONTENT = os.urandom(MIB) * 30


def write_large(store: S3Store, bucket: str) -> None:
    with store.open_writer(f"{bucket}/x", size_hint=len(CONTENT)) as writer:
        writer.write(CONTENT)
        writer.commit()

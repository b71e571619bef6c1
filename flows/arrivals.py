"""Which checkpoints arrived, by the notifications of object stores. Pure: a notification in, paths out.

Understood: S3 event notifications (AWS, MinIO, Ceph's gateway), also inside the envelopes of SNS and SQS,
and events of Amazon EventBridge. Sources: "Event message structure" of the S3 user guide; "S3 Bucket
Notifications Compatibility" of Ceph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

from ptbin.sources.suffixes import CHECKPOINT_SUFFIXES, suffix_of

ARRIVED = "ptbin.checkpoints.arrived"
"""The event that `deployments/arrivals.py` sends to Prefect, and that `convert-arrivals` waits for."""
MAX_ENVELOPES = 3


def arrived_paths(notification: Any, source: str) -> list[str]:
    """Paths below `source` (`s3://bucket/prefix`) of objects that were created and look like checkpoints.

    Each once, in the order of the notification. Checkpoints of several files (shards, ranks, folders) are
    left to the next run of the whole: the first part says nothing about the last. What is not a notification
    has none.
    """
    bucket, _, prefix = source.partition("://")[2].rstrip("/").partition("/")
    start = f"{prefix}/" if prefix else ""
    found = {
        key.removeprefix(start): None
        for where, key in _created(notification, MAX_ENVELOPES)
        if where == bucket
        and key.startswith(start)
        and suffix_of(key.rpartition("/")[2]) in CHECKPOINT_SUFFIXES
    }
    return [path for path in found if path]


def _created(notification: Any, envelopes: int) -> Iterator[tuple[str, str]]:
    """Bucket and key of each object that was created."""
    if not isinstance(notification, dict):
        return
    if isinstance(message := notification.get("Message", notification.get("body")), str) and envelopes:
        try:
            inner = json.loads(message)
        except (ValueError, RecursionError):
            return
        yield from _created(inner, envelopes - 1)
        return
    if notification.get("detail-type") == "Object Created":
        yield from _named(notification.get("detail"), is_quoted=False)
    records = notification.get("Records")
    for record in records if isinstance(records, list) else ():
        if not isinstance(record, dict):
            continue
        if isinstance(record.get("body"), str) or isinstance(record.get("Sns"), dict):  # of SQS, of SNS
            yield from _created(record.get("Sns", record), envelopes)
        elif "ObjectCreated" in str(record.get("eventName", "")):
            # S3 quotes keys as forms do; Ceph's gateway writes them as they are.
            yield from _named(record.get("s3"), is_quoted="ceph" not in str(record.get("eventSource", "")))


def _named(entity: Any, *, is_quoted: bool) -> Iterator[tuple[str, str]]:
    try:
        bucket, key = entity["bucket"]["name"], entity["object"]["key"]
    except (TypeError, LookupError):
        return
    if isinstance(bucket, str) and isinstance(key, str):
        yield bucket, unquote_plus(key) if is_quoted else key

"""What arrived, by notifications as stores send them: AWS, MinIO, Ceph, in envelopes, and hostile ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flows.arrivals import arrived_paths

SOURCE = "s3://training/runs"


def record(
    key: str, event: str = "ObjectCreated:Put", source: str = "aws:s3", bucket: str = "training"
) -> dict[str, Any]:
    """As in the user guide of S3, "Event message structure"; shortened."""
    return {
        "eventVersion": "2.1",
        "eventSource": source,
        "eventName": event,
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, "size": 1024, "eTag": "d41d8cd98f00b204"}},
    }


S3 = {"Records": [record("runs/a+b%231/last.ckpt"), record("runs/a+b%231/last.ckpt"), record("runs/c.pt")]}
MINIO = {"EventName": "s3:ObjectCreated:Put", "Key": "training/runs/m.pt",
         "Records": [record("runs%2Fm.pt", "s3:ObjectCreated:Put", "minio:s3")]}  # fmt: skip
CEPH = {"Records": [record("runs/a+b%20.pt", "ObjectCreated:CompleteMultipartUpload", "ceph:s3")]}
BRIDGE = {
    "detail-type": "Object Created",
    "detail": {"bucket": {"name": "training"}, "object": {"key": "runs/a+b.pt", "etag": "0"}},
}


@pytest.mark.parametrize(
    ("notification", "paths"),
    [
        (S3, ["a b#1/last.ckpt", "c.pt"]),
        (MINIO, ["m.pt"]),
        (CEPH, ["a+b%20.pt"]),
        (BRIDGE, ["a+b.pt"]),
        ({"Type": "Notification", "Message": json.dumps(S3)}, ["a b#1/last.ckpt", "c.pt"]),
        ({"Records": [{"body": json.dumps({"Message": json.dumps(MINIO)})}]}, ["m.pt"]),
        ({"Records": [{"Sns": {"Message": json.dumps(MINIO)}}]}, ["m.pt"]),
    ],
)
def test_what_was_created_below_the_source_is_named(notification: Any, paths: list[str]) -> None:
    assert arrived_paths(notification, SOURCE) == paths
    assert arrived_paths(notification, f"{SOURCE}/") == paths


@pytest.mark.parametrize(
    "notification",
    [
        {"Records": [record("runs/a.pt", "ObjectRemoved:Delete")]},
        {"Records": [record("runs-2/a.pt")]},
        {"Records": [record("runs/a.pt", bucket="other")]},
        {"Records": [record("runs/config.json"), record("runs/"), record("runs")]},
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "training"},
        {
            "Records": [
                None,
                {},
                {"eventName": "ObjectCreated:Put"},
                {"eventName": "ObjectCreated:Put", "s3": []},
            ]
        },
        {
            "Records": [
                {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": 1}, "object": {"key": 2}}}
            ]
        },
        {"Message": "not JSON"},
        {
            "Message": json.dumps(
                {"Message": json.dumps({"Message": json.dumps({"Message": json.dumps(S3)})})}
            )
        },
        {"Records": "x"},
        ["Records"],
        None,
    ],
)
def test_what_is_no_arrival_names_nothing(notification: Any) -> None:
    assert arrived_paths(notification, SOURCE) == []


def test_a_bucket_may_be_the_source_itself() -> None:
    assert arrived_paths(S3, "s3://training") == ["runs/a b#1/last.ckpt", "runs/c.pt"]

"""The bare minimum: `python part_copy.py SOURCE DEST NBYTES PART_NBYTES CONCURRENCY`.

Copies the first NBYTES of one object into another inside the store (UploadPartCopy), so many parts at a time.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import boto3
from botocore.config import Config
from transfer import split


def main(source: str, dest: str, nbytes: int, part_nbytes: int, concurrency: int) -> None:
    client = boto3.client("s3", config=Config(max_pool_connections=concurrency))
    bucket, key = split(dest)
    from_bucket, from_key = split(source)
    upload_id = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]

    def copy(number: int) -> dict[str, object]:
        first = (number - 1) * part_nbytes
        last = min(first + part_nbytes, nbytes) - 1
        answer = client.upload_part_copy(
            Bucket=bucket,
            Key=key,
            UploadId=upload_id,
            PartNumber=number,
            CopySource={"Bucket": from_bucket, "Key": from_key},
            CopySourceRange=f"bytes={first}-{last}",
        )
        return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

    with ThreadPoolExecutor(concurrency) as pool:
        parts = list(pool.map(copy, range(1, -(-nbytes // part_nbytes) + 1)))
    client.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

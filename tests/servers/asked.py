"""What our client asks an S3 server for: each request noted, and changed or refused where a test wants that.

By botocore's events, on the client that the filesystem of these options has: its guide's "Extensibility", and
`provide-client-params` in `BaseClient._emit_api_params`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore import xform_name
from botocore.exceptions import ClientError

from ptbin.stores.s3 import S3Store

__all__ = ["Asked", "Bend", "asked", "refusal"]

EVENT = "provide-client-params.s3"
ANSWER = "after-call.s3"


Bend = Callable[[str, dict[str, Any]], None]
"""Gets a request before it goes out, and may change it, act before it, or raise."""


@dataclass
class Asked:
    """Requests by botocore's names, with their parameters."""

    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def count(self, method: str) -> int:
        return len(self.of(method))

    def of(self, method: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.requests if name == method]

    @property
    def client_nbytes(self) -> int:
        """Weights and framing that came to this process or left it; listings and manifests aside."""
        total = 0
        for method, parameters in self.requests:
            if method == "get_object" and "Range" in parameters:
                first, last = parameters["Range"].removeprefix("bytes=").split("-")
                # Without a first byte, the last N bytes.
                total += int(last) - int(first) + 1 if first else int(last)
            elif method == "upload_part":
                total += parameters.get("ContentLength") or len(parameters["Body"])
        return total


@contextlib.contextmanager
def asked(
    options: Mapping[str, Any], bend: Bend | None = None, answers: Bend | None = None
) -> Iterator[Asked]:
    """Note what is asked with these storage options, while the context lasts.

    Args:
        answers: gets each answer before ptbin does, and may change it.
    """
    seen = Asked()
    events = S3Store(options).client.fs.s3.meta.events

    async def note(params: dict[str, Any], model: Any, **_: object) -> None:
        method = xform_name(model.name)
        seen.requests.append((method, dict(params)))
        if bend is not None:
            # What it does to the store waits for the loop that this runs on.
            await asyncio.to_thread(bend, method, params)

    def answer(parsed: dict[str, Any], model: Any, **_: object) -> None:
        if answers is not None:
            answers(xform_name(model.name), parsed)

    events.register(EVENT, note)
    events.register(ANSWER, answer)
    try:
        yield seen
    finally:
        events.unregister(EVENT, note)
        events.unregister(ANSWER, answer)


def refusal(code: str, status: int) -> ClientError:
    """What botocore raises where a store answers with this code."""
    answer: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "UploadPartCopy")

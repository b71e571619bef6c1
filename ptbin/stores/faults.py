"""Foreign exceptions become ptbin's, once, here at the moving room's outer edge.

Every message is one line: what failed, where (URI), what was answered, what to do next. No message
quotes storage options; passwords and signatures inside URIs are taken out first. Knows errno values,
HTTP status codes and S3's error codes, and reads them off any exception that carries them: nothing
foreign is imported to recognise it.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ptbin.errors import (
    AccessDeniedError,
    NoSpaceError,
    NotFoundInStoreError,
    PtbinError,
    SourceChangedError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_FOUND_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
TRANSIENT_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,  # s3fs: 500 InternalError
    errno.ETIMEDOUT,
}
ADVICE = {
    errno.ENOSPC: "free some space, then run again: what is finished is not done again",
    errno.EDQUOT: "the quota is used up; make room, then run again",
    errno.EROFS: "it is mounted read-only",
    errno.EIO: "the device or its network mount failed; see the system's log",
    errno.ESTALE: "the network mount went away; mount it again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n) or use fewer workers",
}

# Of https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html those whose HTTP status does not say
# it: 400 for most, 409 where two requests met, 200 where the answer had begun before it failed.
DENIED_CODES = {"ExpiredToken", "InvalidToken", "MethodNotAllowed"}
DENIED_STATUSES = {401, 403}
TRANSIENT_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504, 509}

TRANSIENT_CLASS_NAMES = {
    # botocore.exceptions; EndpointConnectionError is also "connection refused"
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "HTTPClientError",
    "IncompleteReadError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    # urllib3.exceptions, which botocore lets through where the body of an error breaks off
    "ProtocolError",
    # aiohttp.client_exceptions, http.client, asyncio, fsspec.exceptions
    "ClientConnectionError",
    "ClientPayloadError",
    "IncompleteRead",
    "RemoteDisconnected",
    "ServerDisconnectedError",
    "FSTimeoutError",
    # paramiko
    "SSHException",
}
NO_CREDENTIALS_CLASS_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "AuthenticationException",
    "ProfileNotFound",
}

_USERINFO = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")
_SECRET_PARAMETER = re.compile(
    r"(?i)([?&](?!max-keys=)(?:[\w-]*(?:signature|credential|token|password|secret|key)[\w-]*|sig|sv|se|sp)=)[^&\s'\"]*"
)
MESSAGE_NCHARS = 300


def public_uri(text: str) -> str:
    """`text` without the passwords and signatures of the URIs in it (user names stay)."""
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub(r"\1@", text))


def refuse_secret(uri: str, instead: str = "give credentials as storage options") -> None:
    """Raise UsageError for a URI with a password or a signature: records, reports and logs would show it."""
    if public_uri(uri) != uri:
        raise UsageError(
            f"{public_uri(uri)} carries a password or a signature, shown by records and logs; {instead}"
        )


@contextmanager
def mapped_faults(doing: str, uri: str) -> Iterator[None]:
    """Whatever is raised within leaves as one of `ptbin.errors`; `doing` reads like "read" or "list"."""
    try:
        yield
    except PtbinError:
        raise
    except Exception as error:
        raise fault(error, doing, uri) from error


def fault(error: BaseException, doing: str, uri: str) -> PtbinError:
    """What `error`, met while doing something to `uri`, is in ptbin's terms."""
    uri = public_uri(uri)
    # fsspec's HTTP filesystem calls whatever went wrong a missing file (`HTTPFileSystem._info`). The one in
    # memory means what it says; a KeyError is behind that.
    if isinstance(error, FileNotFoundError) and error.errno is None and error.__cause__ is not None:
        error = error if isinstance(error.__cause__, LookupError) else error.__cause__
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        return _answered(response, doing, uri)
    status = _http_status(error)
    if status is not None:
        return _classified(str(status), status, _one_line(error), doing, uri)
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & NO_CREDENTIALS_CLASS_NAMES:
        return AccessDeniedError(
            f"cannot {doing} {uri}: {_one_line(error)}; "
            "give credentials in the storage options or the environment"
        )
    if isinstance(error, TimeoutError) or names & TRANSIENT_CLASS_NAMES:
        return StorageError(
            f"cannot {doing} {uri}: the store does not answer ({_one_line(error)})", transient=True
        )
    if isinstance(error, OSError):
        return _from_os_error(error, doing, uri)
    if isinstance(error, NotImplementedError):
        return StorageError(f"cannot {doing} {uri}: this kind of store does not offer that")
    return StorageError(f"cannot {doing} {uri}: {type(error).__name__}: {_one_line(error)}")


def _from_os_error(error: OSError, doing: str, uri: str) -> PtbinError:
    number = error.errno
    if isinstance(error, FileNotFoundError) or number in NOT_FOUND_ERRNOS:
        what = "a directory, not a file" if number == errno.EISDIR else "no such file or directory"
        if number == errno.ENOTDIR:
            what = "a part of the path is a file, not a directory"
        return NotFoundInStoreError(f"cannot {doing} {uri}: {what}")
    if isinstance(error, PermissionError) or number in DENIED_ERRNOS:
        what = "it is mounted read-only" if number == errno.EROFS else "permission denied"
        return AccessDeniedError(f"cannot {doing} {uri}: {what}")
    what = os.strerror(number) if number is not None else _one_line(error)
    advice = ADVICE.get(number) if number is not None else None
    transient = number in TRANSIENT_ERRNOS or isinstance(error, ConnectionError)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"cannot {doing} {uri}: {what}; {advice}")
    return StorageError(f"cannot {doing} {uri}: {what}{'; ' + advice if advice else ''}", transient=transient)


def _answered(response: dict[str, object], doing: str, uri: str) -> PtbinError:
    """A botocore ClientError: the store did answer, with a code."""
    answer, metadata = response["Error"], response.get("ResponseMetadata")
    code = str(answer.get("Code", "")) if isinstance(answer, dict) else ""
    said = str(answer.get("Message") or "") if isinstance(answer, dict) else ""
    status = metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None
    return _classified(code, status if isinstance(status, int) else None, said, doing, uri)


def _classified(code: str, status: int | None, said: str, doing: str, uri: str) -> PtbinError:
    answer = code if code in said or not said else f"{code}: {said}"
    if code in ("PreconditionFailed", "412") or status == 412:
        return SourceChangedError(f"cannot {doing} {uri}: it was overwritten since it was seen first (412)")
    if code == "NoSuchBucket":
        return NotFoundInStoreError(f"cannot {doing} {uri}: there is no such bucket")
    if status == 404 and code != "NoSuchUpload":
        return NotFoundInStoreError(f"cannot {doing} {uri}: no such object")
    if code in DENIED_CODES or status in DENIED_STATUSES:
        return AccessDeniedError(
            f"cannot {doing} {uri}: access denied ({_shorten(answer)}); "
            "check the credentials and their rights"
        )
    transient = code in TRANSIENT_CODES or status in TRANSIENT_STATUSES
    return StorageError(f"cannot {doing} {uri}: the store answered {_shorten(answer)}", transient=transient)


def _http_status(error: BaseException) -> int | None:
    """The status an HTTP client's exception carries: aiohttp, gcsfs, azure, requests."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    return None


def _one_line(error: BaseException) -> str:
    return _shorten(str(error) or type(error).__name__)


def _shorten(text: str) -> str:
    text = public_uri(" ".join(text.split()))
    return text if len(text) <= MESSAGE_NCHARS else text[:MESSAGE_NCHARS] + " ..."

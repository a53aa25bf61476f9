"""What the errors of an S3 server mean: a fault that may pass, or a sentence for the user.

Messages hold the server's error code and never its text, which may repeat what was sent.
"""

from __future__ import annotations

from collections.abc import Callable

import urllib3
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from data.errors import DataError
from data.store.base import Fault, ReadOnly
from data.store.s3_client import CREDENTIALS, REMEDY


class Refused(DataError):
    """A refusal by the server, with S3's code for it; a bare HTTP status where the answer had no body."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ReadOnlyBucket(Refused, ReadOnly):
    """A refusal to write."""


class CutShort(Exception):
    """An answer without what it must hold: its end was lost."""


class Dripping(Exception):
    """A body that comes so slowly that it counts as stalled."""


ERRORS = (aws.ClientError, aws.BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError, CutShort, Dripping)
_TIMEOUTS = (aws.ReadTimeoutError, aws.ConnectTimeoutError, urllib3.exceptions.TimeoutError, Dripping)
_BROKEN = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    CutShort,
)


_CREDENTIALS_MINUTES = 1.0


def judged(what: str, writing: bool = False) -> Callable[[Exception], Fault | DataError]:
    """What `Retries` asks about an error of the call `what`: a fault that may pass, or the error to raise."""

    def judge(error: Exception) -> Fault | DataError:
        if isinstance(error, aws.ClientError):
            return _fault(error) or _refusal(what, error, writing)
        if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return DataError(f"{what}: the server's certificate is not trusted; set AWS_CA_BUNDLE to one that is")
        if isinstance(error, _TIMEOUTS):
            return Fault("timeout", str(error))
        if isinstance(error, _BROKEN):
            return Fault("broken", str(error))
        if isinstance(error, aws.ParamValidationError):
            return DataError(f"{what}: {error}")
        mistake = DataError(f"{what}: {error}; {REMEDY}")
        if isinstance(error, CREDENTIALS):
            return Fault("credentials", str(error), _CREDENTIALS_MINUTES, mistake)
        return mistake

    return judge


def _fault(error: aws.ClientError) -> Fault | None:
    """The fault of an answer that another attempt may better; None if none will."""
    code, status = _code(error)
    words = f"{status} {code}"
    if status in (429, 503) or code in ("SlowDown", "Throttling", "RequestLimitExceeded", "TooManyRequests"):
        return Fault("throttled", words)
    if status == 408 or code == "RequestTimeout":
        return Fault("timeout", words)
    if code == "IncompleteBody":
        return Fault("broken", words)
    if (status >= 500 and status != 501) or code in ("OperationAborted", "ConditionalRequestConflict"):
        return Fault("server", words)
    return None


def _refusal(what: str, error: aws.ClientError, writing: bool) -> Refused:
    code, status = _code(error)
    if writing and code in _DENIALS:
        return ReadOnlyBucket(f"{what} was refused ({code}): {_NO_WRITING}", code)
    remedy = _REMEDIES.get(code, f"the server answers with HTTP status {status}")
    region = error.response["Error"].get("Region") or error.response["ResponseMetadata"]["HTTPHeaders"].get(
        "x-amz-bucket-region"
    )
    if remedy == _MOVED and region:
        remedy += f", {region}"
    return Refused(f"{what} was refused ({code}): {remedy}", code)


def _code(error: aws.ClientError) -> tuple[str, int]:
    status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return str(error.response.get("Error", {}).get("Code") or status), status


OUTSIDE = ("InvalidRange", "416")
_DENIALS = ("AccessDenied", "AllAccessDisabled", "MethodNotAllowed", "403", "405")
_NO_WRITING = "these credentials may not write it; grant s3:PutObject, or choose another place"
_NO_BUCKET = "the bucket does not exist; check its name and the endpoint"
_CREDENTIALS = "the credentials are not valid for this server; check the access key, the secret and the profile"
_DENIED = "these credentials may not list or read it; grant s3:ListBucket and s3:GetObject, or set anonymous"
_MOVED = "the bucket lives in another region; set region to it"
_REMEDIES = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "NoSuchKey": "the object does not exist",
    "404": "the object or bucket does not exist",
    "NoSuchUpload": "its multipart upload was aborted from elsewhere",
    "InvalidObjectState": "the object is archived; restore it first",
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": "the session token has expired; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": _MOVED,
    "301": _MOVED,
    "AuthorizationHeaderMalformed": _MOVED,
    "IllegalLocationConstraintException": _MOVED,
}

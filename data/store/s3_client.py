"""A process's botocore client, and what the errors of an S3 server mean.

- A role's credentials come from a metadata service, which is at times too busy to answer. A client made then would
  never have any, so it is not kept: the next attempt of any call asks again.
- Threads that wait for the client share the outcome of the attempt in progress: a rank has dozens of them, and a busy
  metadata service must not be asked by each in turn.
- Messages hold the server's error code and never its text, which may repeat what was sent.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import botocore
import botocore.session
import urllib3
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError

from data.errors import DataError
from data.store.base import Fault, ReadOnly, StoreOptions

_METADATA_ATTEMPTS, _METADATA_TIMEOUT_S = 2, 2
"""botocore asks for a token and then for a role; if nothing answers, both time out, after 8 s together."""
_PROBE_S = 1.0
_SERVICES = ("http://169.254.169.254", "http://[fd00:ec2::254]")
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
_RETRYABLE = (401, 408, 429)  # 401 asks for a token
REMEDY = "configure boto3's credentials and region, or set anonymous"


class Connection:
    """The botocore client of the process that made this; `where` is the store's name in messages."""

    def __init__(self, where: str, options: StoreOptions) -> None:
        self._where, self._options = where, options
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._client: Any = None
        self._failure: tuple[float, Exception] | None = None  # the last one, and when

    def client(self) -> Any:
        """Return the client, connecting first if need be.

        Raises:
            DataError: the profile, region or endpoint does not exist, or there is no source of credentials.
            BotoCoreError: there are no credentials at the moment.
        """
        asked = time.monotonic()
        with self._lock:
            if self._client is None:
                if self._failure and self._failure[0] > asked:
                    raise self._failure[1]
                try:
                    self._client = self._connect()
                except Exception as error:
                    self._failure = time.monotonic(), error
                    raise
            return self._client

    def _connect(self) -> Any:
        options = self._options
        config = Config(
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            max_pool_connections=64,
            retries={"mode": "standard", "total_max_attempts": 1},
            signature_version=botocore.UNSIGNED if options.anonymous else None,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = open_session(self._where, options)
        try:
            if not options.anonymous and session.get_credentials() is None:
                if _may_have_role(session):
                    raise aws.NoCredentialsError
                raise DataError(f"source {self._where}: there are no credentials; {REMEDY}")
            is_alias = "://arn:" in self._where  # of an access point, which has a DNS name
            for style in ["path"] if options.endpoint and not is_alias else ["auto", "path"]:
                config = config.merge(Config(s3={"addressing_style": style}))
                client = session.create_client("s3", options.region, endpoint_url=options.endpoint, config=config)
                if is_alias or urlsplit(client.meta.endpoint_url).netloc.endswith(_AMAZON):
                    break
            return client  # with paths: few servers besides Amazon's have a DNS name for every bucket
        except (*CREDENTIALS, DataError):
            raise
        except (aws.BotoCoreError, ValueError) as error:
            raise DataError(f"source {self._where}: {error}") from error


CREDENTIALS = (aws.NoCredentialsError, aws.CredentialRetrievalError, aws.MetadataRetrievalError)
"""Errors that may come from a metadata service, or another provider, that is busy at the moment."""


def open_session(where: str, options: StoreOptions) -> botocore.session.Session:
    """Read the user's AWS configuration, without any request. A session is not thread-safe: every client needs its own.

    Raises:
        DataError: the profile does not exist, or the files are malformed.
    """
    session = botocore.session.Session(profile=options.profile)
    patience = {"metadata_service_num_attempts": _METADATA_ATTEMPTS, "metadata_service_timeout": _METADATA_TIMEOUT_S}
    try:
        session.get_scoped_config()
        for name, least in patience.items():  # the user's own setting may be higher
            session.set_config_variable(name, max(least, session.get_config_variable(name)))
    except (aws.BotoCoreError, ValueError) as error:
        raise DataError(f"source {where}: {error}") from error
    return session


def _may_have_role(session: botocore.session.Session) -> bool:
    """Whether there is a metadata service that may still name a role: one that has not answered that it knows none."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    mode = str(session.get_config_variable("ec2_metadata_service_endpoint_mode") or "").lower()
    parts = urlsplit(session.get_config_variable("ec2_metadata_service_endpoint") or _SERVICES[mode == "ipv6"])
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=_PROBE_S)
    try:
        connection.connect()
    except OSError:
        return False
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/latest/meta-data/iam/security-credentials/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return True
    finally:
        connection.close()
    return not 400 <= status < 500 or status in _RETRYABLE


class Refused(DataError):
    """A refusal by the server. `code` is S3's error code, or the HTTP status where the answer had no body."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ReadOnlyBucket(Refused, ReadOnly):
    """The server refuses to write."""


class CutShort(Exception):
    """An answer lacks what it must hold: its end was lost."""


class Stalled(Exception):
    """A body arrives too slowly."""


ERRORS = (aws.ClientError, aws.BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError, CutShort, Stalled)
_TIMEOUTS = (aws.ReadTimeoutError, aws.ConnectTimeoutError, urllib3.exceptions.TimeoutError, Stalled)
_BROKEN = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    CutShort,
)


_CREDENTIALS_MINUTES = 1.0


def judge_for(what: str, writing: bool = False) -> Callable[[Exception], Fault | DataError]:
    """The `judge` of `Retries` for the call `what`."""

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
    """The transient fault that an answer reports; None if it is a refusal."""
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

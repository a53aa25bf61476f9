"""A process's botocore client: made when it is first needed, and only with credentials.

- A role's credentials come from a metadata service, which is now and then too busy to answer. A client made without
  them would have none for ever, so none is kept: the next attempt of any call asks again.
- Threads that wait for a client take what came of the attempt they waited for: a rank has dozens, and a metadata
  service that is busy must not be asked by each in turn.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import botocore
import botocore.session
from botocore import exceptions as aws
from botocore.config import Config

from data.errors import DataError
from data.store.base import StoreOptions

_METADATA_ATTEMPTS, _METADATA_TIMEOUT_S = 2, 2
"""botocore asks for a token and then for a role: where nothing answers, both take all of it, 8 s."""
_PROBE_S = 1.0
_SERVICES = ("http://169.254.169.254", "http://[fd00:ec2::254]")
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
_NOT_NOW = (401, 408, 429)  # 401 asks for a token
REMEDY = "configure boto3's credentials and region, or set anonymous"


class Connection:
    """The client of the process that made this; another process makes its own.

    Args:
        where: the store, as messages name it.
    """

    def __init__(self, where: str, options: StoreOptions) -> None:
        self._where, self._options = where, options
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._client: Any = None
        self._failure: tuple[float, Exception] | None = None  # the last one, and when

    def client(self) -> Any:
        """The client.

        Raises:
            DataError: there is no such profile, region or endpoint, or nothing that credentials may come from.
            BotoCoreError: there are no credentials for now.
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
            return client  # by paths, for few servers besides Amazon's have a DNS name for every bucket
        except (*CREDENTIALS, DataError):
            raise
        except (aws.BotoCoreError, ValueError) as error:
            raise DataError(f"source {self._where}: {error}") from error


CREDENTIALS = (aws.NoCredentialsError, aws.CredentialRetrievalError, aws.MetadataRetrievalError)
"""Errors that may be a metadata service's, or another provider's, moment of weakness."""


def open_session(where: str, options: StoreOptions) -> botocore.session.Session:
    """Read the user's configuration, without any request. A session is not thread-safe, so every client gets its own.

    Raises:
        DataError: there is no such profile, or the files are malformed.
    """
    session = botocore.session.Session(profile=options.profile)
    patience = {"metadata_service_num_attempts": _METADATA_ATTEMPTS, "metadata_service_timeout": _METADATA_TIMEOUT_S}
    try:
        session.get_scoped_config()
        for name, least in patience.items():  # the user's own may be more
            session.set_config_variable(name, max(least, session.get_config_variable(name)))
    except (aws.BotoCoreError, ValueError) as error:
        raise DataError(f"source {where}: {error}") from error
    return session


def _may_have_role(session: botocore.session.Session) -> bool:
    """Whether there is a metadata service that may name a role yet: all but those that answer that they know none."""
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
    return not 400 <= status < 500 or status in _NOT_NOW

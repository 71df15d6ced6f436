"""Errors of S3-compatible stores: which are temporary, which the user can fix, and one sentence for each."""

from __future__ import annotations

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3 import exceptions as urllib3

from helpers.storage.s3_address import S3Address

_WAYS_IN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give aws_access_key_id and aws_secret_access_key in the"
    " dataloader file"
)
_BY_CODE = {
    "NoSuchBucket": "the bucket does not exist; correct aws_bucket_name, or aws_endpoint_url if it is in another store",
    "AccessDenied": "access denied; the credentials need permission to list the bucket, to get its objects and, for caches, to put them",
    "AllAccessDisabled": "access denied; the bucket's owner has closed it",
    "InvalidAccessKeyId": f"the store does not know the access key; {_WAYS_IN}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_WAYS_IN}",
    "ExpiredToken": "the credentials have expired; renew them and start again",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's by more than it accepts; set the clock",
}
_BY_CODE |= {
    "403": _BY_CODE["AccessDenied"],  # the answer to a HEAD request has no body, so no more is known
    "InvalidToken": _BY_CODE["ExpiredToken"],
    "TokenRefreshRequired": _BY_CODE["ExpiredToken"],
    "RequestExpired": _BY_CODE["RequestTimeTooSkewed"],
}
_OTHER_REGION = ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect")
_MISSING = ("NoSuchKey", "404", "NotFound")
_TEMPORARY_CODES = (
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "InternalError"),
    *("ServiceUnavailable", "BadDigest", "IncompleteBody", "OperationAborted"),
)
_TEMPORARY_STATUS = (408, 425, 429)
# urllib3's own errors come while the body of an answer is read; botocore wraps only those before it.
_TEMPORARY_KINDS = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError, urllib3.HTTPError)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError)


class DamagedBytesError(Exception):
    """Bytes were damaged in transfer: their length or checksum is wrong."""


def code_of(error: Exception) -> str:
    """The store's error code, such as NoSuchKey. "" if the store did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def is_missing(error: Exception) -> bool:
    """Whether the object does not exist."""
    return code_of(error) in _MISSING


def is_denied(error: Exception) -> bool:
    """Whether the credentials are valid but lack the permission."""
    return code_of(error) in ("AccessDenied", "403")


def is_temporary(error: Exception) -> bool:
    """Whether a retry may help: network trouble, a busy store, or damaged bytes."""
    if isinstance(error, boto.ClientError):
        status = _status(error)
        return code_of(error) in _TEMPORARY_CODES or status in _TEMPORARY_STATUS or status >= 500
    return isinstance(error, (*_TEMPORARY_KINDS, DamagedBytesError))


def is_the_users(error: Exception) -> bool:
    """Whether a setting is wrong, rather than the store failing."""
    known = code_of(error) in (*_BY_CODE, *_OTHER_REGION)
    return known or isinstance(error, (*_NO_CREDENTIALS, boto.ProfileNotFound, boto.ParamValidationError, boto.InvalidRegionError))


def explained(error: Exception, address: S3Address) -> str:
    """What happened and, if there is one, the remedy: the part of a sentence after the place. It contains no credentials."""
    return address.without_keys(_explained(error))


def _explained(error: Exception) -> str:
    code = code_of(error)
    if code in _BY_CODE:
        return _BY_CODE[code]
    if code in _OTHER_REGION:
        return "the bucket is in another region; give its name in aws_region_name"
    if isinstance(error, boto.ClientError):
        said = error.response.get("Error", {}).get("Message", "")
        return f"the store answered {code or 'without a reason'} (HTTP {_status(error)}){f': {said}' if said else ''}"
    if isinstance(error, _NO_CREDENTIALS):
        incomplete = isinstance(error, boto.PartialCredentialsError)
        return f"{'half of the credentials is missing' if incomplete else 'no credentials were found'}; {_WAYS_IN}"
    if isinstance(error, boto.ProfileNotFound):
        return "AWS_PROFILE names a profile that is not in the AWS configuration; correct it"
    return _without_an_answer(error)


def _without_an_answer(error: Exception) -> str:
    if isinstance(error, boto.SSLError):
        return f"no secure connection could be made ({_cause(error)}); check aws_endpoint_url and the machine's certificates"
    if isinstance(error, boto.ConnectTimeoutError):
        return "no connection within the time allowed; check aws_endpoint_url and the network"
    if isinstance(error, (boto.ReadTimeoutError, urllib3.ReadTimeoutError)):
        return "the store stopped answering"
    if isinstance(error, boto.EndpointConnectionError):
        cause = str(error)
        if any(sign in f"{cause} {_chain(error)}" for sign in ("NameResolution", "gaierror", "resolve")):
            return "the store's name is unknown to DNS; check aws_endpoint_url and the network"
        if "refused" in f"{cause} {_chain(error)}":
            return "the connection was refused; check aws_endpoint_url, and that the store is running"
        return "the store cannot be reached; check aws_endpoint_url and the network"
    if isinstance(error, (boto.HTTPClientError, urllib3.HTTPError)):
        return "the connection was lost"
    return str(error)


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _cause(error: boto.BotoCoreError) -> str:
    return str(error.kwargs.get("error", error)).splitlines()[0][:200]


def _chain(error: BaseException | None) -> str:
    """Names and texts of the error and its causes: libraries wrap the operating system's error several times."""
    texts = []
    while error is not None:
        wrapped = getattr(error, "kwargs", {}).get("error") if isinstance(error, boto.BotoCoreError) else None
        texts.append(f"{type(error).__name__} {error} {wrapped!r}")
        error = error.__cause__ or error.__context__
    return " ".join(texts)

"""What went wrong at an S3-compatible store: whether it may pass, whose it is to put right, and one sentence about it."""

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
    "NoSuchBucket": "there is no such bucket; correct aws_bucket_name, or aws_endpoint_url if it is in another store",
    "AccessDenied": "access denied; the credentials need permission to list the bucket, to get its objects and, for caches, to put them",
    "AllAccessDisabled": "access denied; the bucket's owner has closed it",
    "InvalidAccessKeyId": f"the store does not know the access key; {_WAYS_IN}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_WAYS_IN}",
    "ExpiredToken": "the credentials have expired; renew them and start again",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's by more than it accepts; set the clock",
}
_BY_CODE |= {
    "403": _BY_CODE["AccessDenied"],  # a HEAD has no body, so no more is known
    "InvalidToken": _BY_CODE["ExpiredToken"],
    "TokenRefreshRequired": _BY_CODE["ExpiredToken"],
    "RequestExpired": _BY_CODE["RequestTimeTooSkewed"],
}
_OTHER_REGION = ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect")
_MISSING = ("NoSuchKey", "404", "NotFound")
_PASSING_CODES = (
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "InternalError"),
    *("ServiceUnavailable", "BadDigest", "IncompleteBody", "OperationAborted"),
)
_PASSING_STATUS = (408, 425, 429)
# urllib3's own come where botocore reads the body of an answer: it wraps them only while it waits for the head.
_PASSING_KINDS = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError, urllib3.HTTPError)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError)


class DamagedBytesError(Exception):
    """What came, or what the store says it has, is not what was sent."""


def code_of(error: Exception) -> str:
    """The store's own word for an error, such as NoSuchKey; "" where the store did not answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def is_missing(error: Exception) -> bool:
    """Whether it says that there is no such object."""
    return code_of(error) in _MISSING


def is_denied(error: Exception) -> bool:
    """Whether the store knows who asks, and does not let them."""
    return code_of(error) in ("AccessDenied", "403")


def is_passing(error: Exception) -> bool:
    """Whether trying again may help: the way, a busy store, or bytes lost on the way."""
    if isinstance(error, boto.ClientError):
        status = _status(error)
        return code_of(error) in _PASSING_CODES or status in _PASSING_STATUS or status >= 500
    return isinstance(error, (*_PASSING_KINDS, DamagedBytesError))


def is_the_users(error: Exception) -> bool:
    """Whether a setting of the user's is wrong, as opposed to a store that fails."""
    known = code_of(error) in (*_BY_CODE, *_OTHER_REGION)
    return known or isinstance(error, (*_NO_CREDENTIALS, boto.ProfileNotFound, boto.ParamValidationError, boto.InvalidRegionError))


def explained(error: Exception, address: S3Address) -> str:
    """The part of a sentence after the place: what happened and, where there is one, the remedy. It holds no keys."""
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
        return "the store fell silent"
    if isinstance(error, boto.EndpointConnectionError):
        cause = str(error)
        if any(sign in f"{cause} {_chain(error)}" for sign in ("NameResolution", "gaierror", "resolve")):
            return "the store's name is unknown to DNS; check aws_endpoint_url and the network"
        if "refused" in f"{cause} {_chain(error)}":
            return "the connection was refused; check aws_endpoint_url, and that the store is running"
        return "the store cannot be reached; check aws_endpoint_url and the network"
    if isinstance(error, (boto.HTTPClientError, urllib3.HTTPError)):
        return "the connection broke off"
    return str(error)


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _cause(error: boto.BotoCoreError) -> str:
    return str(error.kwargs.get("error", error)).splitlines()[0][:200]


def _chain(error: BaseException | None) -> str:
    """Names and texts of everything an error came from: libraries wrap the operating system's word several times."""
    said = []
    while error is not None:
        wrapped = getattr(error, "kwargs", {}).get("error") if isinstance(error, boto.BotoCoreError) else None
        said.append(f"{type(error).__name__} {error} {wrapped!r}")
        error = error.__cause__ or error.__context__
    return " ".join(said)

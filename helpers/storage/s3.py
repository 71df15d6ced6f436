"""Buckets of S3-compatible stores: AWS, Cloudflare R2, Wasabi, MinIO and others.

Only requests that all of them support are used: listing by prefix, GET with ranges, HEAD, PUT with Content-MD5. Received bytes are verified
against Content-Length and, if the ETag is an MD5, against it. boto3's own retries are turned off in favor of `retrying`.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, NoReturn, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from helpers.errors import DataError, StorageError
from helpers.storage.backend import Entry, skipped_folder
from helpers.storage.retrying import Budget, GaveUp, Patience, patiently
from helpers.storage.s3_address import S3Address
from helpers.storage.s3_errors import DamagedBytesError, explained, is_denied, is_missing, is_temporary, is_the_users
from helpers.storage.system_folders import system_folder_of

READS_AT_ONCE = 32  # by one source: with 200 ms for an answer, 160 objects a second
_CONNECTIONS = 64  # kept open by one client
_BLOCK = 64 * 1024  # bytes of the smallest ranged GET; contains the header of nearly every image
_MOST_BLOCKS = 16  # in one ranged GET, when a stream is read further and further

# botocore itself sends HeadBucket to find a bucket's region, and CreateSession for directory buckets.
_READING = frozenset({"ListObjectsV2", "GetObject", "HeadBucket", "CreateSession"})
_WRITING = frozenset({"PutObject"})
_MD5 = re.compile(r"[0-9a-f]{32}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Answer = Mapping[str, Any]
Result = TypeVar("Result")


class S3Source:
    """The objects below a prefix, read-only: its client refuses to send any request that writes or deletes.

    Keys are relative to the prefix. The constructor sends no request.
    """

    reads_at_once = READS_AT_ONCE
    _operations = _READING

    def __init__(self, address: S3Address, patience: Patience | None = None) -> None:
        self.address = address
        self._patience = patience or Patience()
        self._budget = Budget(self._patience.budget)
        self._creating = threading.Lock()
        self._made_client: Any = None

    @property
    def name(self) -> str:
        return self.address.name

    def list(self) -> Iterator[Entry]:
        """Every object, in S3's order: by the UTF-8 bytes of the keys. Placeholder objects for folders are left out.

        DataError if a setting is wrong, StorageError if the store fails.
        """
        folder = self.address.folder
        token: dict[str, str] = {}
        skipped: set[str] = set()
        while True:
            page = self._list_page(token)
            for item in page.get("Contents", ()):
                key = item["Key"][len(folder) :]
                system = system_folder_of(key)
                if system is not None and system not in skipped:
                    skipped.add(system)
                    yield skipped_folder(system)
                if key and not key.endswith("/") and system is None:
                    yield Entry(key, item["Size"], _nanoseconds(item["LastModified"]), item.get("ETag", "").strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def open(self, key: str) -> BinaryIO:
        """A stream that downloads only the parts that are read."""
        return io.BufferedReader(_Parts(lambda offset, size, etag: self._part(key, offset, size, etag)), _BLOCK)

    def read(self, key: str) -> bytes:
        data, answer = self._get(key)
        return data

    # -- requests ---------------------------------------------------------------------------------------------------------

    def _list_page(self, token: Mapping[str, str]) -> Answer:
        try:
            return self._request(lambda client: client.list_objects_v2(Bucket=self.address.bucket, Prefix=self.address.folder, **token))
        except GaveUp as failure:
            raise StorageError(f"{self.name} cannot be listed: {self._explain(failure)}.") from failure.last
        except (BotoCoreError, ClientError) as error:
            kind = DataError if is_the_users(error) else StorageError
            raise kind(f"{self.name} cannot be listed: {self._explain(error)}.") from error

    def _get(self, key: str, **conditions: str) -> tuple[bytes, Answer]:
        """An object, or the part given by `Range`, and the rest of the answer."""

        def get(client: Any) -> tuple[bytes, Answer]:
            answer = client.get_object(Bucket=self.address.bucket, Key=self._full(key), **conditions)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            if len(data) != answer["ContentLength"]:
                raise DamagedBytesError(f"{len(data):,} of {answer['ContentLength']:,} bytes arrived")
            # Only the length of a part can be verified, unless the part is the whole object, as for captions and small images.
            is_whole = "Range" not in conditions or answer.get("ContentRange", "").endswith(f"/{len(data)}")
            if is_whole and self._md5_of(answer) not in (None, hashlib.md5(data, usedforsecurity=False).hexdigest()):
                raise DamagedBytesError("the checksum of the received object is wrong")
            return data, answer

        return self._or_oserror(key, lambda: self._request(get))

    def _part(self, key: str, offset: int, size: int, etag: str | None) -> tuple[bytes, int, str]:
        """Up to `size` bytes from `offset` on, the object's size, and its ETag. The object must still have the ETag `etag`, if given."""
        conditions = {"Range": f"bytes={offset}-{offset + size - 1}", **({"IfMatch": etag} if etag else {})}
        try:
            data, answer = self._get(key, **conditions)
        except _EmptyError:
            return b"", 0, ""
        whole = answer.get("ContentRange", "").rpartition("/")[2]
        return data, int(whole) if whole.isdigit() else offset + len(data), answer.get("ETag", "")

    def _request(self, request: Callable[[Any], Result]) -> Result:
        client = self._client()
        return patiently(lambda: request(client), self._is_temporary, self._patience, self._budget)

    def _is_temporary(self, error: Exception) -> bool:
        if isinstance(error, ClientError):
            self._budget.has_answered = True
        return is_temporary(error)

    def _or_oserror(self, key: str, act: Callable[[], Result]) -> Result:
        """The result of a read. Errors of the store become an OSError with an errno, like those of a local file."""
        try:
            return act()
        except GaveUp as failure:
            raise OSError(errno.EIO, self._explain(failure)) from failure.last
        except (BotoCoreError, ClientError) as error:
            self._raise_oserror(key, error)

    def _raise_oserror(self, key: str, error: Exception) -> NoReturn:
        if is_missing(error):
            raise FileNotFoundError(errno.ENOENT, "the object does not exist", f"{self.name}: {key}") from error
        if is_denied(error):
            raise PermissionError(errno.EACCES, "access denied", f"{self.name}: {key}") from error
        status = error.response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(error, ClientError) else None
        if status == 416:
            raise _EmptyError(errno.EIO, "the object is shorter than that") from error
        if status == 412:
            raise OSError(errno.EIO, "the object was replaced while it was being read; start again") from error
        raise OSError(errno.EIO, self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        if isinstance(error, GaveUp):
            *earlier, last = (explained(each, self.address) for each in error.errors)
            others = [said for said in dict.fromkeys(earlier) if said != last]
            return f"{last} ({error}){'; before that: ' if others else ''}{'; '.join(others)}"
        return explained(error, self.address)

    def _full(self, key: str) -> str:
        return self.address.folder + key

    def _md5_of(self, answer: Answer) -> str | None:
        """The MD5 in an ETag. None for multipart uploads, encryption with KMS, and directory buckets, where the ETag is no MD5."""
        etag = str(answer.get("ETag", "")).strip('"')
        encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
        return etag if _MD5.fullmatch(etag) and not encrypted and not self.address.bucket.endswith("--x-s3") else None

    def _client(self) -> Any:
        with self._creating:  # threads may share a client, but not create clients at the same time
            if self._made_client is None:
                self._made_client = self._or_data_error(self._make_client)
            return self._made_client

    def _or_data_error(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (BotoCoreError, ValueError) as error:  # for a malformed endpoint botocore raises a plain ValueError
            raise DataError(f"{self.name} cannot be used: {self._explain(error)}.") from error

    def _make_client(self) -> Any:
        address, patience = self.address, self._patience
        session = boto3.session.Session(
            aws_access_key_id=address.access_key, aws_secret_access_key=address.secret_key, region_name=address.region
        )
        client = session.client(
            "s3",
            endpoint_url=address.endpoint,
            # Other stores accept any region, but botocore requires one.
            region_name=session.region_name or "us-east-1",
            config=Config(
                connect_timeout=patience.connect,
                read_timeout=patience.silence,
                retries={"total_max_attempts": 1},
                max_pool_connections=_CONNECTIONS,
                # Older stores support neither the newer checksums nor addresses such as bucket.endpoint.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"} if address.endpoint else {},
            ),
        )
        client.meta.events.register_first("before-call.s3", self._refuse_other_operations)
        return client

    def _refuse_other_operations(self, model: Any, **_: object) -> None:
        if model.name not in self._operations:
            raise PermissionError(f"{self.name}: the request {model.name} is not allowed here")


class S3Backend(S3Source):
    """A prefix that we may write to, such as a cache: a `DataBackend`."""

    _operations = _READING | _WRITING

    def write(self, key: str, data: bytes) -> None:
        digest = hashlib.md5(data, usedforsecurity=False)

        def put(client: Any) -> None:
            answer = client.put_object(
                Bucket=self.address.bucket,
                Key=self._full(key),
                # A stream is sent in small pieces, each with its own timeout. Bytes would have to be sent within a single timeout.
                Body=io.BytesIO(data),
                ContentLength=len(data),
                ContentMD5=base64.b64encode(digest.digest()).decode(),
            )
            if self._md5_of(answer) not in (None, digest.hexdigest()):
                raise DamagedBytesError("the checksum of the stored object is wrong")

        try:
            self._request(put)
        except (GaveUp, BotoCoreError, ClientError) as error:
            raise StorageError(f"{self.name}: {key} could not be written: {self._explain(error)}.") from error

    def read_part(self, key: str, offset: int, size: int) -> bytes:
        data, _, _ = self._part(key, offset, size, None)
        if len(data) != size:
            raise OSError(errno.EIO, f"it ends before byte {offset + size:,}")
        return data


class _EmptyError(OSError):
    """The requested range is after the end of the object."""


class _Parts(io.RawIOBase):
    """An object as a seekable stream, downloaded by ranged GETs. All parts are of the same version of the object."""

    def __init__(self, get: Callable[[int, int, str | None], tuple[bytes, int, str]]) -> None:
        self._get = get
        self._blocks: dict[int, bytes] = {}
        self._ahead = 1  # blocks in the next GET
        self._place = 0
        self._size = -1  # unknown until the first part arrives
        self._etag: str | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            self._fetch(0)
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        number, skipped = divmod(self._place, _BLOCK)
        if number not in self._blocks and (self._size < 0 or self._place < self._size):
            self._fetch(number)
        part = self._blocks.get(number, b"")[skipped : skipped + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def _fetch(self, first: int) -> None:
        """Download blocks from `first` on, twice as many as the last time."""
        data, self._size, etag = self._get(first * _BLOCK, self._ahead * _BLOCK, self._etag)
        self._etag = self._etag or etag or None
        for start in range(0, len(data), _BLOCK):
            self._blocks[first + start // _BLOCK] = data[start : start + _BLOCK]
        self._ahead = min(self._ahead * 2, _MOST_BLOCKS)


def _nanoseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000

"""What keys about buckets change: the request that a store is sent, and where a cache keeps its copies."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from helpers.errors import DataError
from tests.config.effects.lab import ENTRY, Effect, Flags, Lab

if TYPE_CHECKING:
    from helpers.data.sources import CachePlace

BUCKET: dict[str, Any] = {
    "id": "bucket",
    "type": "aws",
    "aws_bucket_name": "pictures",
    "aws_endpoint_url": "http://127.0.0.1:1",
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_data_prefix": "train",
}
CLOSED = b"<Error><Code>AccessDenied</Code></Error>"


@contextmanager
def listening() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """A store that lets nobody in: its port, and the target and authorization of each request."""
    asked: list[tuple[str, str]] = []

    class Store(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(403)
            self.send_header("Content-Length", str(len(CLOSED)))
            self.end_headers()
            self.wfile.write(CLOSED)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def request(lab: Lab, flags: Flags) -> object:
    """The first request for the images of the last dataset: host, target, whose it is, and the secret that it is signed with."""
    from helpers.data.sources import open_source

    return _request(lambda lab, flags: open_source(lab.config(flags).datasets[-1]), lab, flags)


def request_for_texts(lab: Lab, flags: Flags) -> object:
    """The same for the embeddings of its captions."""

    def of_texts(lab: Lab, flags: Flags) -> object:
        from helpers.data.sources import texts_place
        from helpers.storage.s3 import S3Source

        place = texts_place(lab.config(flags).datasets[-1], lab.folder)
        return S3Source(place.bucket) if place.bucket else None

    return _request(of_texts, lab, flags)


def _request(source_of: Callable[[Lab, Flags], Any], lab: Lab, flags: Flags) -> object:
    from helpers.storage.s3 import S3Source

    source = source_of(lab, flags)
    if not isinstance(source, S3Source):
        return None
    asked_for = urlsplit(source.address.endpoint or "").hostname
    with listening() as (port, asked):
        address = {**vars(source.address), "endpoint": f"http://127.0.0.1:{port}"}
        sent_here = S3Source(type(source.address)(**address))
        with pytest.raises(DataError, match="access denied"):
            next(iter(sent_here.list()))
        target, authorization = asked[0]
    secret = sent_here._client()._request_signer._credentials.secret_key  # the signature itself changes with the time
    return asked_for, target, authorization.partition("SignedHeaders")[0], secret


def copies_of_latents(lab: Lab, flags: Flags) -> CachePlace:
    from helpers.data.sources import latents_place

    return latents_place(lab.config(flags).datasets[-1], lab.folder)


def copies_of_texts(lab: Lab, flags: Flags) -> CachePlace:
    from helpers.data.sources import texts_place

    return texts_place(lab.config(flags).datasets[-1], lab.folder)


def folder_of(place: Callable[[Lab, Flags], CachePlace]) -> Callable[[Lab, Flags], object]:
    return lambda lab, flags: place(lab, flags).folder.relative_to(lab.folder).parts[0]


def limit_of(place: Callable[[Lab, Flags], CachePlace]) -> Callable[[Lab, Flags], object]:
    return lambda lab, flags: place(lab, flags).limit_bytes


def images_in_a_bucket(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**BUCKET, key: value}]


def latents_in_a_bucket(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**BUCKET, "cache_dir_vae": "caches/latents", key: value}]


def texts_in_a_bucket(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**BUCKET, "id": "texts", "dataset_type": "text_embeds", "aws_data_prefix": "caches/texts", key: value}, dict(ENTRY)]


def local_or_in_a_bucket(key: str, value: str) -> list[dict[str, Any]]:
    return [{**ENTRY, key: value}] if value == "local" else images_in_a_bucket(key, value)


def texts_local_or_in_a_bucket(key: str, value: str) -> list[dict[str, Any]]:
    local = {"id": "texts", "dataset_type": "text_embeds", key: value}
    return [local, dict(ENTRY)] if value == "local" else texts_in_a_bucket(key, value)


_VALUES = {
    "aws_bucket_name": ["pictures", "others"],
    "aws_endpoint_url": ["http://one.example.com", "http://two.example.com"],
    "aws_region_name": ["eu-central-1", "us-west-2"],
    "aws_access_key_id": ["one", "two"],
    "aws_secret_access_key": ["one", "two"],
    "aws_data_prefix": ["cats", "dogs"],
}
_COPIES = {"copies", "others"}

IMAGE_BUCKET_EFFECTS = {
    **{key: Effect(request, values, (), images_in_a_bucket) for key, values in _VALUES.items()},
    "type": Effect(request, ["local", "aws"], (), local_or_in_a_bucket),
    "cache_local_dir": Effect(folder_of(copies_of_latents), {name: name for name in _COPIES}, (), latents_in_a_bucket),
    "cache_local_limit_gb": Effect(limit_of(copies_of_latents), {"1": 10**9, "0.5": 5 * 10**8}, (), latents_in_a_bucket),
}
TEXT_BUCKET_EFFECTS = {
    **{key: Effect(request_for_texts, values, (), texts_in_a_bucket) for key, values in _VALUES.items()},
    "type": Effect(request_for_texts, ["local", "aws"], (), texts_local_or_in_a_bucket),
    "cache_local_dir": Effect(folder_of(copies_of_texts), {name: name for name in _COPIES}, (), texts_in_a_bucket),
    "cache_local_limit_gb": Effect(limit_of(copies_of_texts), {"1": 10**9, "0.5": 5 * 10**8}, (), texts_in_a_bucket),
}

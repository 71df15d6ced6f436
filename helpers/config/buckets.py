"""What an entry says of a bucket of an S3-compatible store, and what of it cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from helpers.config.datasets import DataConfig, Entry

_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}")
# Hosts of stores, below which a bucket may be the first label: BUCKET.s3.amazonaws.com. The rest is the address without it.
_STORES = re.compile(
    r"s3[.-].+|storage\.googleapis\.com|oss-.+\.aliyuncs\.com|cos\..+\.myqcloud\.com|.+\.digitaloceanspaces\.com|.+\.r2\.cloudflarestorage\.com"
)
_WITHOUT_PATH = (".amazonaws.com", ".r2.cloudflarestorage.com", ".wasabisys.com", ".backblazeb2.com", ".digitaloceanspaces.com")
_FOR_BROWSERS = re.compile(r".+\.r2\.dev|dash\.cloudflare\.com|f\d+\.backblazeb2\.com|.*console\.aws\.amazon\.com")


def bucket_problems(entry: Entry, said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it) of an entry of type aws. `said` is the entry as it stands in the file."""
    if not entry.aws_bucket_name:
        yield "aws_bucket_name", "is missing; name the bucket"
    elif "/" in entry.aws_bucket_name:
        yield "aws_bucket_name", f"{entry.aws_bucket_name!r} has a /; name the bucket alone, and put the folder in it into aws_data_prefix"
    elif not _BUCKET.fullmatch(entry.aws_bucket_name):
        yield "aws_bucket_name", f"{entry.aws_bucket_name!r} is not the name of a bucket: 3 or more letters, digits, dots and hyphens"
    yield from _endpoint_problems(entry.aws_endpoint_url)
    if bool(entry.aws_access_key_id) != bool(entry.aws_secret_access_key):
        missing = "aws_secret_access_key" if entry.aws_access_key_id else "aws_access_key_id"
        yield missing, "is missing; give both keys, or neither and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    for key in ("cache_dir_vae", "aws_data_prefix"):
        text = said.get(key)
        if isinstance(text, str) and {"", ".", ".."} & set(text.strip("/").split("/")[:-1]):
            yield key, f"{text!r} is not a prefix; write it as in the bucket, without . and .."
    if said.get("cache_dir_vae") and not str(said["cache_dir_vae"]).strip("/"):
        yield "cache_dir_vae", "is the whole bucket; name a prefix for the latents, or leave it out to keep them on this machine"


def without_bucket(url: str, bucket: str) -> str:
    """An endpoint without the bucket, which copied addresses include: ACCOUNT.r2.cloudflarestorage.com/BUCKET, BUCKET.s3.amazonaws.com."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    path, host = parts.path.rstrip("/"), parts.netloc
    if path.rpartition("/")[2] == bucket:
        path = path.rpartition("/")[0]
    rest = host.removeprefix(f"{bucket}.")
    if rest != host and _STORES.fullmatch(rest):
        host = rest
    return parts._replace(netloc=host, path=path).geturl()


def _endpoint_problems(url: str | None) -> Iterator[tuple[str, str]]:
    if not url:
        return
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        sound = parts.scheme in ("http", "https") and bool(host) and not re.search(r"\s", url)
        sound = sound and parts.port != 0  # the port is read here: ValueError above 65535
    except ValueError:
        sound = False
    if not sound:
        yield "aws_endpoint_url", "is not an address; write it with https:// in front, as https://s3.example.com"
    elif parts.username or parts.password:
        yield "aws_endpoint_url", "holds a user or password; leave them out, keys are given in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif _FOR_BROWSERS.fullmatch(host):
        yield (
            "aws_endpoint_url",
            f"{host} is for browsers and lists no files; use the address of the S3 API, which the store's settings show",
        )
    elif parts.query or parts.fragment or (parts.path.strip("/") and host.endswith(_WITHOUT_PATH)):
        rest = repr(parts.path.strip("/")) if parts.path.strip("/") else "a query"  # whose text may be a signature
        yield "aws_endpoint_url", f"has {rest} behind the host, where only the bucket may be; leave it out, a folder is for aws_data_prefix"


def keys_without_a_bucket(entry: Entry, said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same of an entry of another type, which has nothing to do with a bucket."""
    for field in fields(entry):
        if field.name.startswith(("aws_", "cache_local_")) and said.get(field.name):
            yield field.name, f'is for buckets, and this entry is of type {entry.type}; say "type": "aws", or leave it out'


def caches_inside_images(data: DataConfig) -> Iterator[str]:
    """Sentences about caches in buckets that would be written below the prefix of images."""
    written: list[tuple[str, Entry, str | None]] = [
        *((f"dataset {dataset.id!r}, cache_dir_vae", dataset, dataset.latents_prefix) for dataset in data.datasets),
        *((f"text_embeds {text.id!r}, aws_data_prefix", text, text.aws_data_prefix) for text in data.text_caches),
    ]
    for what, entry, prefix in written:
        for dataset in (*data.datasets, *data.companions):
            images = _as_folder(dataset.aws_data_prefix)
            same_bucket = (entry.aws_bucket_name, entry.aws_endpoint_url) == (dataset.aws_bucket_name, dataset.aws_endpoint_url)
            if entry.type == dataset.type == "aws" and prefix and same_bucket and _as_folder(prefix).startswith(images):
                place = f"below {images}" if images else "the whole bucket: give it an aws_data_prefix"
                yield f"{what}: {prefix} is inside the images of dataset {dataset.id!r} ({place}), which are never written to."


def _as_folder(prefix: str | None) -> str:
    inside = (prefix or "").strip("/")
    return f"{inside}/" if inside else ""

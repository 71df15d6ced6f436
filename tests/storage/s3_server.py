"""A real S3 endpoint on loopback: moto's server in a process of its own, and what tests put there and look at."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from helpers.storage.s3_address import S3Address

KEY, SECRET = "AKIACANARYACCESS", "canary-secret-d41d8cd9"


@dataclass
class S3Server:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> Any:
        config = Config(s3={"addressing_style": "path"})
        return boto3.session.Session(KEY, SECRET, region_name="us-east-1").client("s3", endpoint_url=self.url, config=config)

    def new_bucket(self) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def address(self, bucket: str, prefix: str = "", **changed: Any) -> S3Address:
        return S3Address(**{**vars(S3Address(bucket, prefix, self.url, None, KEY, SECRET)), **changed})

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        for key, data in objects.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.put(bucket, {f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files})

    def contents(self, bucket: str, prefix: str = "") -> dict[str, tuple[Any, str]]:
        """Time of modification and SHA-256 of every object below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        items = [item for page in pages for item in page.get("Contents", ())]
        return {item["Key"]: (item["LastModified"], hashlib.sha256(self.get(bucket, item["Key"])).hexdigest()) for item in items}

    def get(self, bucket: str, key: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs while the block does. It takes any credentials and keeps everything in memory."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended at once"
                assert time.monotonic() < end, "moto's server never listened"
                time.sleep(0.05)
        yield S3Server(port)
    finally:
        process.kill()
        process.wait()

"""How fast files and cached records are read from a remote bucket, compared with a bare boto3 thread pool.

    python -m benchmarks.s3_reading [--objects 640] [--latency 0.2] [--rounds 5] [--profile]

The bucket is a real S3 endpoint on localhost, behind a proxy that delays each answer; both are processes of their own. Both loops have the
same number of threads. Our code also checks every object against its checksum and returns files in order.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import torch
from botocore.config import Config

from benchmarks.measure import compared, conclude, in_turns, parser, profile
from helpers.data.base.prefetch import made_in_threads, read_ahead
from helpers.data.cache.cache import Cache, Writer, record_key
from helpers.data.cache.remote import RemoteShards
from helpers.data.training_data import MICRO_BATCHES_AT_ONCE
from helpers.storage.s3 import READS_AT_ONCE, S3Backend, S3Source
from helpers.storage.s3_address import S3Address
from tests.storage.s3_server import KEY, SECRET, S3Server, s3_server
from toolkit.cache.view import CacheView

LEAST = 0.9  # rate, relative to the bare pool
FILE_BYTES = 30_000
RECORD_BYTES = 131_072  # a latent of 1024x1024 pixels in fp16
RECORDS_OF_A_SHARD = 8
DECODERS = 2  # threads that request files, like those that decode images


@contextmanager
def far_away(server: S3Server, latency: float) -> Iterator[str]:
    """The address of a proxy in front of the server, in a process of its own."""
    command = [sys.executable, "-m", "tests.storage.fault_proxy", str(server.port), str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None and proxy.stdin is not None
        yield f"http://127.0.0.1:{proxy.stdout.readline().strip()}"
        proxy.stdin.close()


class Files:
    """Objects below `images/`, each read completely."""

    def __init__(self, server: S3Server, bucket: str, url: str, count: int) -> None:
        self.keys = [f"{number:06}.jpg" for number in range(count)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: server.put(bucket, {f"images/{key}": key.encode() * (FILE_BYTES // 10)}), self.keys))
        self.bucket = bucket
        self.client = _client(url, READS_AT_ONCE)
        self.source = S3Source(S3Address(bucket, "images", url, None, KEY, SECRET))
        self.source.read(self.keys[0])  # warm-up: creates the clients and connects both
        self._get(self.keys[0])

    def _get(self, key: str) -> int:
        return len(self.client.get_object(Bucket=self.bucket, Key=f"images/{key}")["Body"].read())

    def bare(self) -> float:
        """Files per second."""
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return _rate(len(self.keys), lambda: sum(pool.map(self._get, self.keys)))

    def ours(self) -> float:
        with read_ahead(self.source, self.keys) as ahead, ThreadPoolExecutor(DECODERS) as pool:
            return _rate(len(self.keys), lambda: sum(map(len, pool.map(ahead.read, self.keys))))


class Records:
    """Records of a cache in the bucket, without local copies."""

    def __init__(self, bucket: str, url: str, count: int, folder: Path) -> None:
        store = S3Backend(S3Address(bucket, "cache", url, None, KEY, SECRET))
        self.cache = Cache(folder, RemoteShards(store, folder, limit=1))
        self.keys = [record_key(str(number)) for number in range(count)]
        with Writer(self.cache) as writer:
            for number, key in enumerate(self.keys):
                writer.add(key, {"mean": torch.rand(RECORD_BYTES // 4)})
                if number % RECORDS_OF_A_SHARD == RECORDS_OF_A_SHARD - 1:
                    writer.seal()  # small shards, because this server processes a whole object for every range request
        self.places = self.cache.find(self.keys)
        self.bucket = bucket
        with CacheView(folder) as view:
            self.shards = {shard.number: shard.name for shard in view.shards()}
        self.client = _client(url, MICRO_BATCHES_AT_ONCE)
        self._get(0)

    def _get(self, number: int) -> int:
        shard, _, offset, size, _ = self.places[number].item()
        part = f"bytes={offset}-{offset + size - 1}"
        return len(self.client.get_object(Bucket=self.bucket, Key=f"cache/{self.shards[shard]}", Range=part)["Body"].read())

    def bare(self) -> float:
        """Records per second."""
        with ThreadPoolExecutor(MICRO_BATCHES_AT_ONCE) as pool:
            return _rate(len(self.keys), lambda: sum(pool.map(self._get, range(len(self.keys)))))

    def ours(self) -> float:
        read = made_in_threads(self.cache.read, self.places, MICRO_BATCHES_AT_ONCE)
        return _rate(len(self.keys), lambda: sum(len(record) for record in read))


def _client(url: str, threads: int) -> Any:
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=threads)
    return boto3.session.Session(KEY, SECRET, region_name="us-east-1").client("s3", endpoint_url=url, config=config)


def _rate(count: int, read: Callable[[], int]) -> float:
    began = time.monotonic()
    assert read() > 0
    return count / (time.monotonic() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--objects", type=int, default=640)
    options.add_argument("--latency", type=float, default=0.2, help="delay of each answer in seconds (default 0.2)")
    chosen = options.parse_args(arguments)
    with s3_server() as server, far_away(server, chosen.latency) as url, tempfile.TemporaryDirectory() as folder:
        bucket = server.new_bucket()
        files = Files(server, bucket, url, chosen.objects)
        records = Records(bucket, url, chosen.objects // 2, Path(folder))
        figures = [
            compared("files read ahead", "/s", in_turns(chosen.rounds, files.bare, files.ours), at_least=LEAST),
            compared("cached records", "/s", in_turns(chosen.rounds, records.bare, records.ours), at_least=LEAST),
        ]
        if chosen.profile:
            profile("a bare pool (its main thread)", files.bare)
            profile("files read ahead (its main thread)", files.ours)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())

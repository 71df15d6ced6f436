"""An S3-compatible store, a real endpoint on loopback, and everything that can go wrong on the way to it."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.data.base.images import read_size
from helpers.data.base.sample import Size
from helpers.errors import DataError, StorageError
from helpers.storage.backend import DataBackend, RemoteSource
from helpers.storage.local import LocalSource
from helpers.storage.retrying import Patience
from helpers.storage.s3 import S3Backend, S3Source
from tests.storage.fault_proxy import FaultProxy, Request, fault_proxy
from tests.storage.s3_server import KEY, SECRET, S3Server, free_port

QUICK = Patience(silence=0.4, deadline=120, first_deadline=120, pause=0.02, longest_pause=0.1)
THRICE = Patience(silence=60, deadline=600, first_deadline=600, pause=0.01, longest_pause=0.01, budget=3)  # gives up after three tries


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as between:
        yield between


@pytest.fixture
def through(s3: S3Server, bucket: str, proxy: FaultProxy) -> S3Backend:
    """The bucket's folder `data`, seen through the proxy."""
    return S3Backend(s3.address(bucket, "data", endpoint=proxy.url), QUICK)


def is_get(request: Request) -> bool:
    return request.method == "GET" and "list-type" not in request.query


def is_put(request: Request) -> bool:
    return request.method == "PUT"


# -- what a store does ------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_back_what_was_written(s3: S3Server, bucket: str) -> None:
    store: DataBackend = S3Backend(s3.address(bucket, "caches/mine"))
    store.write("b/two.bin", b"22")
    store.write("a.bin", b"1")
    store.write("a.bin", b"one")
    assert {entry.key: entry.size for entry in store.list()} == {"a.bin": 3, "b/two.bin": 2}
    assert store.read("a.bin") == b"one" and store.read_part("a.bin", 1, 2) == b"ne"
    with store.open("b/two.bin") as stream:
        assert stream.read(1) == b"2"
    with pytest.raises(FileNotFoundError):
        store.read("c.bin")
    assert sorted(s3.contents(bucket)) == ["caches/mine/a.bin", "caches/mine/b/two.bin"]


def test_a_listing_shows_what_is_below_the_prefix_as_a_folder_does(s3: S3Server, bucket: str) -> None:
    s3.put(bucket, {"a/1.jpg": b"1", "a/deep/2.jpg": b"22", "a/": b"", "ab/3.jpg": b"3", "a/__MACOSX/1.jpg": b"", "b.jpg": b""})
    source = S3Source(s3.address(bucket, "/a/"))
    assert [(entry.key, entry.size) for entry in source.list()] == [("1.jpg", 1), ("__MACOSX/", 0), ("deep/2.jpg", 2)]
    [first, *_] = source.list()
    assert first.etag == "c4ca4238a0b923820dcc509a6f75849b"  # the MD5 of "1"
    assert abs(first.modified_ns / 1e9 - time.time()) < 60
    assert [entry.key for entry in S3Source(s3.address(bucket)).list()] == [
        "a/1.jpg",
        "a/__MACOSX/",  # a folder that is counted and not entered
        "a/deep/2.jpg",
        "ab/3.jpg",
        "b.jpg",
    ]


@pytest.mark.parametrize("name", ["with space.jpg", "quote'\".jpg", "ünï☃.jpg", "a+b&c=d?.jpg", "%2f.jpg", "/abs.jpg"])
def test_odd_names_are_listed_and_read(name: str, s3: S3Server, bucket: str) -> None:
    store = S3Backend(s3.address(bucket, "odd"))
    store.write(name, b"ok")
    assert [entry.key for entry in store.list()] == [name]
    assert store.read(name) == b"ok"


def test_only_the_prefix_is_listed_and_every_page_of_it(s3: S3Server, bucket: str, proxy: FaultProxy) -> None:
    through = S3Backend(s3.address(bucket, "data", endpoint=proxy.url))  # with its usual patience: a page of a thousand keys takes a while
    count, pages = (2500, 3) if os.environ.get("SIMPLETUNER_TEST_LONG") else (25, 3)
    proxy.keys_of_a_page = min(count // 2 - 2, 1000)
    s3.put(bucket, {"other/x": b"", "data-too/x": b""})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: s3.put(bucket, {f"data/{number:04}": b"x"}), range(count)))
    assert [entry.key for entry in through.list()] == [f"{number:04}" for number in range(count)]
    assert all(request.query["prefix"] == ["data/"] for request in proxy.asked)
    tokens = [tuple(request.query.get("continuation-token", ())) for request in proxy.asked]
    assert len(set(tokens)) == pages  # a busy machine may be asked for one twice


def test_a_source_has_no_way_to_write_and_its_client_refuses_to(s3: S3Server, bucket: str) -> None:
    assert not {"write", "delete"} & set(dir(S3Source))
    assert isinstance(S3Source(s3.address(bucket)), RemoteSource) and not isinstance(LocalSource("."), RemoteSource)
    client = S3Source(s3.address(bucket))._client()
    for request in (client.put_object, client.delete_object):
        with pytest.raises(PermissionError, match=r"the request \w+ is not allowed here"):
            request(Bucket=bucket, Key="x")


def test_a_store_of_ours_has_no_way_to_delete(s3: S3Server, bucket: str) -> None:
    client = S3Backend(s3.address(bucket))._client()
    with pytest.raises(PermissionError, match=r"the request \w+ is not allowed here"):
        client.delete_object(Bucket=bucket, Key="x")
    with pytest.raises(PermissionError, match=r"the request \w+ is not allowed here"):
        client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "x"}]})


def test_a_header_costs_one_small_request_and_the_rest_comes_as_it_is_read(through: S3Backend, proxy: FaultProxy) -> None:
    image = Image.effect_noise((900, 700), 80)
    files = {name: io.BytesIO() for name in ("a.png", "b.jpg", "c.tif", "empty.png")}
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.tif", "TIFF")):
        image.save(files[name], kind)
    for name, data in files.items():
        through.write(name, data.getvalue())
    proxy.asked.clear()
    for name in ("a.png", "b.jpg", "c.tif"):
        with through.open(name) as stream:
            assert read_size(stream) == Size(900, 700)
    assert [request.headers["range"] for request in proxy.asked if is_get(request)].count("bytes=0-65535") == 3
    assert len(proxy.asked) <= 4  # Pillow looks at the end of the TIFF
    with through.open("a.png") as stream:
        assert stream.read() == files["a.png"].getvalue()
        stream.seek(-100, io.SEEK_END)
        assert stream.read() == files["a.png"].getvalue()[-100:]
    with through.open("empty.png") as stream:
        assert stream.read() == b""


# -- what goes wrong and passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["status", "hush", "stall", "short", "corrupt", "reset"])
def test_a_fault_that_passes_costs_time_and_nothing_else(kind: str, through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"0123456789" * 1000)
    rule = proxy.fail(kind, wants=is_get, times=2)
    assert through.read("x") == b"0123456789" * 1000
    assert rule.met == 2


def test_a_small_object_that_is_read_as_a_stream_is_checked_too(through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x.txt", b"a caption")
    rule = proxy.fail("corrupt", wants=is_get, times=1)
    with through.open("x.txt") as stream:
        assert stream.read() == b"a caption"
    assert rule.met == 1


@pytest.mark.parametrize("kind", ["status", "stall", "reset"])
def test_a_write_is_tried_again_and_whole(kind: str, s3: S3Server, bucket: str, through: S3Backend, proxy: FaultProxy) -> None:
    rule = proxy.fail(kind, wants=is_put, times=2)
    through.write("x", b"0123456789" * 30_000)
    assert rule.met == 2 and s3.get(bucket, "data/x") == b"0123456789" * 30_000


def test_a_storm_that_heals_is_sat_out_by_many_threads_at_different_moments(through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"whole")
    rule = proxy.fail("status", wants=is_get, times=200)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(through.read, ["x"] * 64)) == [b"whole"] * 64
    assert rule.met == 200


def test_an_address_that_may_be_wrong_is_given_up_sooner_than_a_store_that_is_busy(s3: S3Server, bucket: str, proxy: FaultProxy) -> None:
    patience = Patience(deadline=600, first_deadline=0.3, pause=0.02, longest_pause=0.05)
    proxy.fail("status", times=30)
    list(S3Source(s3.address(bucket, endpoint=proxy.url), patience).list())
    began = time.monotonic()
    with pytest.raises(StorageError, match="refused"):
        list(S3Source(s3.address(bucket, endpoint=f"http://127.0.0.1:{free_port()}"), patience).list())
    assert time.monotonic() - began < 60


def test_bytes_that_stay_wrong_are_never_handed_over(s3: S3Server, bucket: str, through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"0123456789")
    for kind, said in (
        ("corrupt", "the checksum of the received object is wrong"),
        ("short", "was lost|bytes arrived|IncompleteRead|Read [0-9]+"),
        ("reset", "was lost|cannot be reached"),
    ):
        proxy.heal()
        proxy.fail(kind, wants=is_get)
        with pytest.raises(OSError, match=rf"({said}).* \(3 tries in \d+ s\)"):
            S3Backend(s3.address(bucket, "data", endpoint=proxy.url), THRICE).read("x")


def test_each_kind_of_failure_is_told_when_a_store_is_given_up(s3: S3Server, bucket: str, through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"0123456789")
    proxy.fail("status", wants=is_get, times=1)
    proxy.fail("corrupt", wants=is_get, times=1)
    proxy.fail("stall", wants=is_get)
    source = S3Backend(s3.address(bucket, "data", endpoint=proxy.url), replace(THRICE, silence=1))
    told = r"stopped answering \(3 tries in \d+ s\); before that: the store answered SlowDown .*; the checksum of the received object is"
    with pytest.raises(OSError, match=told):
        source.read("x")


def test_a_stall_ends_within_its_deadline(through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"")
    through._patience = replace(QUICK, deadline=0.5)
    proxy.fail("stall", wants=is_get)
    began = time.monotonic()
    with pytest.raises(OSError, match="the store stopped answering .*[0-9]+ tr(y|ies) in"):
        through.read("x")
    assert time.monotonic() - began < 60


def test_a_write_that_always_fails_is_an_error(proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    proxy.fail("status", wants=is_put)
    with pytest.raises(StorageError, match=r"data/ at .*: x could not be written: the store answered SlowDown \(HTTP 503\)"):
        S3Backend(s3.address(bucket, "data", endpoint=proxy.url), THRICE).write("x", b"1")
    assert s3.contents(bucket) == {}


def test_a_store_that_mostly_fails_is_given_up_although_each_request_would_get_through(through: S3Backend, proxy: FaultProxy) -> None:
    through.write("x", b"")
    through._budget._left = 20
    turn = iter(range(10_000))
    proxy.fail("status", wants=lambda request: is_get(request) and next(turn) % 2 == 0)
    with pytest.raises(OSError, match="SlowDown"):
        for _ in range(100):
            through.read("x")


def test_an_object_replaced_while_its_parts_are_read_is_noticed(through: S3Backend) -> None:
    through.write("x", bytes(300_000))
    with through.open("x") as stream:
        stream.read(10)
        through.write("x", bytes([1]) * 300_000)
        with pytest.raises(OSError, match="replaced while it was being read"):
            stream.read()


# -- what goes wrong and is told ---------------------------------------------------------------------------------------------


def listed(source: S3Source) -> str:
    with pytest.raises((DataError, StorageError)) as caught:
        list(source.list())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_each_way_of_not_getting_in_has_words_of_its_own(
    s3: S3Server, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def told(**changed: Any) -> str:
        return listed(S3Source(s3.address(**{"bucket": bucket, "prefix": "data", **changed}), THRICE))

    def answered(code: str, status: int) -> str:
        proxy.heal()
        body = f"<Error><Code>{code}</Code><Message>key {KEY}</Message></Error>".encode()
        proxy.fail("status", status=status, body=body, wants=lambda request: request.method == "GET")
        return told(endpoint=proxy.url)

    said = {
        "no credentials were found": told(access_key=None, secret_key=None),
        "the bucket does not exist": told(bucket="nobodys-bucket"),
        "the connection was refused": told(endpoint=f"http://127.0.0.1:{free_port()}"),
        "unknown to DNS": told(endpoint="http://store.invalid"),
        "no secure connection": told(endpoint=s3.url.replace("http:", "https:")),
        "cannot be used": told(endpoint="nonsense"),
        "access denied": answered("AccessDenied", 403),
        "does not know the access key": answered("InvalidAccessKeyId", 403),
        "does not belong to the access key": answered("SignatureDoesNotMatch", 403),
        "credentials have expired": answered("ExpiredToken", 400),
        "this machine's clock": answered("RequestTimeTooSkewed", 403),
        "in another region": answered("PermanentRedirect", 301),
        "the store answered Odd (HTTP 418): key ***": answered("Odd", 418),
    }
    assert [words for words, message in said.items() if words not in message] == []
    machine = [words for words, message in said.items() if message.startswith("StorageError")]
    assert machine == ["the connection was refused", "unknown to DNS", "no secure connection", "the store answered Odd (HTTP 418): key ***"]
    assert all(bucket in message or "nobodys-bucket" in message for message in said.values())
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "AWS_PROFILE names a profile" in told(access_key=None, secret_key=None)


def test_credentials_of_the_environment_and_of_a_profile_are_used(
    s3: S3Server, bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def key_used() -> str:
        proxy.asked.clear()
        list(S3Source(s3.address(bucket, endpoint=proxy.url, access_key=None, secret_key=None)).list())
        return proxy.asked[0].headers["authorization"].partition("Credential=")[2].split("/")[0]

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OFTHEENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert key_used() == "OFTHEENVIRONMENT"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = OFTHEPROFILE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert key_used() == "OFTHEPROFILE"


def test_an_object_that_is_gone_or_closed_is_told_as_a_file_would_be(through: S3Backend, proxy: FaultProxy) -> None:
    with pytest.raises(FileNotFoundError):
        through.read("none")
    with pytest.raises(FileNotFoundError), through.open("none") as stream:
        stream.read(1)
    proxy.fail("status", status=403, body=b"<Error><Code>AccessDenied</Code></Error>", wants=is_get)
    with pytest.raises(PermissionError):
        through.read("x")


def test_keys_are_shown_nowhere(s3: S3Server, bucket: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    address = s3.address(bucket, endpoint=proxy.url)
    source = S3Backend(address, THRICE)
    proxy.fail("status", status=400, body=f"<Error><Code>Odd</Code><Message>{KEY} {SECRET}</Message></Error>".encode())
    told = [repr(address), str(address), source.name, listed(source)]
    for act in (lambda: source.read("x"), lambda: source.write("x", b"")):
        with pytest.raises((OSError, StorageError)) as caught:
            act()
        told.append(str(caught.value))
    assert not [text for text in (*told, caplog.text) if KEY in text or SECRET in text]

"""Runs whose images and caches are in a bucket: they end as runs from a folder do, and leave the images as they were."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Ended, Trainer, same_weights, wait_for
from tests.runs.evidence import refusal, unwrapped
from tests.storage.fault_proxy import FaultProxy, Request, fault_proxy
from tests.storage.s3_server import KEY, SECRET, S3Server
from toolkit.cache.command import main as cache

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(s3: S3Server, images: Path) -> str:
    """With the images below `images/`."""
    name = s3.new_bucket()
    s3.put_folder(name, "images", images)
    return name


@pytest.fixture
def remote(trainer: Trainer, bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer whose images and caches are in the bucket, and whose keys are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    point_to(trainer, bucket, s3.url)
    return trainer


def point_to(trainer: Trainer, bucket: str, url: str, **keys: object) -> None:
    place = {"type": "aws", "aws_bucket_name": bucket, "aws_endpoint_url": url, "aws_region_name": None, **keys}
    [images] = json.loads(trainer.dataloader(cache_dir_vae="cache/latents", aws_data_prefix="images", **place).read_text())
    del images["instance_data_dir"]
    texts = {"id": "texts", "dataset_type": "text_embeds", "aws_data_prefix": "cache/texts", **place}
    (trainer.folder / "dataloader.json").write_text(json.dumps([images, texts]))


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as between:
        yield between


def is_shard(request: Request) -> bool:
    return request.method == "PUT" and "/cache/" in request.path


def test_a_bucket_trains_as_a_folder_does_and_another_machine_encodes_nothing(
    remote: Trainer, bucket: str, s3: S3Server, finished: Ended
) -> None:
    before = s3.contents(bucket)
    ended = remote.finish()
    assert ended.losses == finished.losses and same_weights(ended, finished)
    cached = {key: facts for key, facts in s3.contents(bucket).items() if key not in before}
    assert {key.rpartition("/")[0] for key in cached} == {"cache/latents", "cache/texts"}
    assert {key: facts for key, facts in s3.contents(bucket).items() if key in before} == before
    again = remote.finish("another-machine")
    assert again.losses == finished.losses and same_weights(again, finished)
    assert "encoded in" not in unwrapped(again.printed)
    assert {key: facts for key, facts in s3.contents(bucket).items() if key not in before} == cached


def test_a_run_killed_while_it_caches_goes_on(remote: Trainer, bucket: str, proxy: FaultProxy, finished: Ended) -> None:
    point_to(remote, bucket, proxy.url)
    rule = proxy.fail("stall", wants=is_shard)
    process = remote.start()
    wait_for(lambda: rule.met, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    proxy.heal()
    ended = remote.finish()
    assert ended.losses == finished.losses and same_weights(ended, finished)


def test_a_store_that_storms_stalls_and_cuts_off_costs_time_only(remote: Trainer, bucket: str, proxy: FaultProxy, finished: Ended) -> None:
    point_to(remote, bucket, proxy.url)
    kinds = ("status", "reset", "short", "corrupt")
    rules = [proxy.fail(kind, times=3, wants=lambda request: len(proxy.asked) % 2 == 0) for kind in kinds]  # every second request
    assert remote.finish().losses == finished.losses
    assert all(rule.met == rule.times for rule in rules)


def look_into_the_caches(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With keys from the dataloader file, as the run had them; and shards of which there is no copy are read from the bucket."""

    def tool(*words: str) -> tuple[int, str]:
        code = cache([words[0], f"--output_dir={output}", *words[1:]])
        said = capsys.readouterr()
        return code, said.out + said.err

    for copy in (output / "cache" / "s3").rglob("*.safetensors"):
        copy.unlink()
    code, said = tool("verify")
    assert code == 0 and said.count("no problems") == 2, said
    code, said = tool("why", "images/a_red_circle_00.png")
    assert code == 0 and "is current" in said and "shard     s3://" in said
    assert tool("export", "images/a_red_circle_00.png", str(output / "exported.png"))[0] == 0
    code, said = tool("gc")
    assert code == 2 and "nothing is ever deleted from a bucket" in said


def test_keys_of_the_dataloader_file_work_and_are_written_nowhere(
    trainer: Trainer, bucket: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    point_to(trainer, bucket, s3.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    process = trainer.start_plain(max_train_steps=2, validation_prompt=None)
    seen = set()
    while process.poll() is None:
        seen.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        time.sleep(0.05)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    look_into_the_caches(trainer.folder / "out", capsys)
    (trainer.folder / "dataloader.json").unlink()
    told = [said.encode(), *seen, *(path.read_bytes() for path in trainer.folder.rglob("*") if path.is_file())]
    assert len(told) > 20
    assert not [text for text in told if KEY.encode() in text or SECRET.encode() in text]


def test_a_bucket_that_cannot_be_entered_is_refused_with_its_remedy(remote: Trainer, s3: S3Server) -> None:
    point_to(remote, "nobodys-bucket", s3.url)
    assert "the bucket does not exist; correct aws_bucket_name" in refusal(remote.run())

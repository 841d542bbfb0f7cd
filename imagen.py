#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyyaml>=6", "pg8000>=1.31"]
# ///
"""imagen: one prompt in, image files out; from the command line, a job queue, or over HTTP.

The life of one paid image. Left the step, right where a kill -9 just after it leads; a test plays
every line.

     1 entry    made and locked in the journal      → closed: nothing was sent or paid
     2 sending  noted and fsynced                   → asked: looked for, else "maybe charged"
     3 post     leaves for the backend              → asked: never sent a second time
     4 remote   id noted and fsynced                → fetched: `recover` takes it from there
     5 spool    grows as `.imagen-<id>.part`        → fetched again, or kept if it is whole
     6 hidden   complete, fsynced, `.imagen-<id>`   → kept: `recover` gives it its name
     7 image    noted with its sha256               → kept: the same
     8 sidecar  linked, which takes the name        → kept: the image is linked beside it
     9 link     of the image to its name            → kept: `recover` finds it there
    10 path     noted                               → delivered: printed, and the rest is done
    11 clean    hidden names unlinked, path printed → delivered: the same
    12 ledger   has the line, the entry is unlinked → done

Map. Each section uses only sections above it; `grep -n '^# ===' imagen.py` prints it.

    Errors      what can go wrong, and what each door makes of it
    Shapes      outside data becomes NamedTuples, and back; keys that never show
    Images      what bytes are: PNG, JPEG, WebP, GIF; and a PNG of our own
    Contract    Order, Request, Result, Context, Backend: what an adapter is
    Config      imagen.yaml: flag > environment > file > default
    Styles      named ways to dress a prompt
    HTTP        the only way out, and what may be sent twice
    Mock        pictures out of thin air, free and without a network
    ComfyUI     the GPU box at home
    Replicate   predictions at api.replicate.com
    OpenAI      the Images API and whoever speaks its dialect
    Gemini      the Interactions API, whose id brings an image back
    Output      names, and files that are never half there
    Preview     tmux, kitty, iTerm2
    Journal     what is unfinished, and the ledger of what is finished
    Inputs      images that come in: local copies by hash
    Supabase    objects in a private bucket, rows that tell of them, signed links
    Pipeline    plans_of, make, finish, deliver; and recover, which is the same steps again
    Queue       imagen.jobs, one connection, one statement a turn
    Worker      takes jobs, keeps their leases, hands their images in
    Server      the OpenAI-compatible API, and a page to look at what was made
    MCP         tools for agents, a JSON object a line on stdin and stdout
    Terminal    one line that rewrites itself; everything else a person reads
    Commands    argparse and main()
"""

from __future__ import annotations

import binascii
import errno
import functools
import io
import itertools
import json
import os
import re
import socket
import stat
import struct
import sys
import threading
import time
import types
import typing
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NamedTuple, TypedDict, TypeVar

if sys.hexversion < 0x030B0000:  # below, an older one would stumble over types
    sys.exit(
        f"imagen: {sys.executable} is Python {sys.version.split()[0]}, 3.11 or newer is needed\n"
        "        → python3.11 imagen.py …, or uv run imagen.py …"
    )
if typing.TYPE_CHECKING:
    import argparse

__version__ = "0.1.0"

Charged = Literal["no", "unknown", "yes"]
# What has named values: of any kind, all text, and to be written.
Fields = Mapping[str, Any]
Strings = Mapping[str, str]
JsonObject = dict[str, Any]
EMPTY: Fields = types.MappingProxyType({})


# === Errors: what can go wrong, and what each door makes of it ===
#
#   class        code         exit  HTTP  again  raised when
#   ImagenError  bug             1   424  no     nobody expected it; everything below is expected
#   BadRequest   usage           2   400  no     a flag, a size, a prompt cannot be meant
#   BadConfig    config          3   424  no     a setting, key or permission is missing or wrong
#   Unreachable  unreachable     4   503  yes    the backend or the database was not reached
#   Refused      refused         5   400  no     moderation: not this image, today or tomorrow
#   Quota        quota           6   402  no     the account, or a budget of ours, is empty
#   Busy         busy            7   429  yes    rate limit or overload: not accepted, not charged
#   Disk         disk            8   424  yes    the local disk is full or not ours to write
#   Partial      partial         9   424  no     some of the images were made
#   Unknown      unknown        10   424  no     sent, and nobody knows the outcome: maybe charged
#   Failed       failed         11   424  no     the remote ran and failed, or our deadline passed
#   Interrupted  interrupted   130   424  yes    somebody asked us to stop
#
# Clients repeat a 408, 409, 429 and every 5xx by themselves, whatever else the answer says. So over
# HTTP these are for what was free; what was charged, or may have been, is 424 whatever it is.

# Every spelling of every key in use, the longest first, so that none leaves the tail of another.
KEY_SPELLINGS: list[str] = []


def redact(text: str) -> str:
    """`text` with every key in use replaced by ***: for messages, and for what a remote sent.

    What a person wrote is never changed; a prompt that holds a key is refused instead.
    """
    for spelling in KEY_SPELLINGS:
        text = text.replace(spelling, "***")
    return text


def printable(text: str) -> str:
    """`text` without what could steer a terminal: control characters, surrogates, direction marks.

    >>> printable("a\\x1b[31m red\\nb")
    'a [31m red\\nb'
    """
    if not text.isprintable():
        harmless = "\n\xa0\u202f"  # a path may have these spaces
        text = "".join(char if char.isprintable() or char in harmless else " " for char in text)
    return text.strip(" \n")


class ImagenError(Exception):
    """An error for a person: `str(error)` says what happened, `hint` what to do; no keys in it.

    `charged` belongs to the attempt, not to the class. `after`: seconds that the remote asked us to
    wait, 0 for none.
    """

    code: ClassVar[str] = "bug"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 424
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, hint: str = "", *, charged: Charged = "no", after: float = 0.0
    ) -> None:
        super().__init__(printable(redact(message)))
        self.hint = printable(redact(hint))
        self.charged: Charged = charged
        self.after = after


class BadRequest(ImagenError):
    code = "usage"
    exit_code = 2
    http_status = 400


class KeyConflict(BadRequest):
    """The same key was used for another request."""

    http_status = 422


class BadConfig(ImagenError):
    code = "config"
    exit_code = 3


class KeyMissing(BadConfig):
    """The environment variable that should hold a key is not set."""


class Unreachable(ImagenError):
    code = "unreachable"
    exit_code = 4
    http_status = 503
    retryable = True


class Refused(ImagenError):
    code = "refused"
    exit_code = 5
    http_status = 400


class Quota(ImagenError):
    code = "quota"
    exit_code = 6
    http_status = 402


class OverBudget(Quota):
    """A budget of ours is spent: no fault of the backend."""


class Busy(ImagenError):
    code = "busy"
    exit_code = 7
    http_status = 429
    retryable = True


class Disk(ImagenError):
    code = "disk"
    exit_code = 8
    retryable = True


class Partial(ImagenError):
    code = "partial"
    exit_code = 9


class Unknown(ImagenError):
    code = "unknown"
    exit_code = 10


class Failed(ImagenError):
    code = "failed"
    exit_code = 11


class Ended(Failed):
    """The remote job is over, and there is no image of it: nothing is left to recover."""


class Interrupted(ImagenError):
    code = "interrupted"
    exit_code = 130
    retryable = True


ERRORS = {"bug": ImagenError}
ERRORS.update({cls.code: cls for cls in ImagenError.__subclasses__()})


def as_error(problem: BaseException) -> ImagenError:
    """Any exception as an ImagenError; what nobody expected is a bug."""
    if isinstance(problem, ImagenError):
        return problem
    if isinstance(problem, OSError):
        place = problem.filename or "disk"
        reason = problem.strerror or problem
        return Disk(f"{place}: {reason}", "make room, let it be written, or name another folder")
    message = f"unexpected {type(problem).__name__}: {problem}"
    return ImagenError(message, "please report this, with the output of -v")


# === Shapes: outside data becomes NamedTuples, and back; keys that never show ===

T = TypeVar("T")
Switch = Literal["auto", "on", "off"]  # YAML's true and false are taken for on and off
KEY = "names the environment variable of a key"
REQUEST = "may be set by a request's backend_opts"

# How complaints and JSON schemas call the types.
TYPE_NAMES = {
    str: ("text", "string"),
    int: ("a whole number", "integer"),
    float: ("a number", "number"),
    bool: ("true or false", "boolean"),
    tuple: ("a list", "array"),
}


class Between(NamedTuple):
    """An `Annotated` mark: the number must lie in low … high."""

    low: float
    high: float


@functools.cache
def hints_of(cls: Any) -> JsonObject:
    """The type hints of a shape, its marks included."""
    return typing.get_type_hints(cls, include_extras=True)


def from_mapping(
    cls: type[T], data: Any, where: str = "", error: type[ImagenError] = BadConfig
) -> T:
    """The NamedTuple `cls` out of a mapping from outside (file, environment, job row, HTTP body).

    The type hints are the schema: str, int, float, bool, Any, Literal, `X | None`, `tuple[X, ...]`,
    `Mapping[str, X]`, NamedTuples, and Annotated with the marks above. Raises `error` with every
    complaint, one a line, each with place and cure.
    """
    complaints: list[str] = []
    shaped: T = _shape(cls, data, where, complaints)
    if complaints:
        raise error("\n".join(line.removeprefix(".") for line in complaints))
    return shaped


def _shape(hint: Any, value: Any, where: str, complaints: list[str]) -> Any:
    kind = typing.get_origin(hint)
    args = typing.get_args(hint)
    if kind is Annotated:
        return _shape_marked(args, value, where, complaints)
    if types.NoneType in args:
        if value is None:
            return None
        return _shape(args[0], value, where, complaints)
    if hasattr(hint, "_fields") and isinstance(value, Mapping | None):
        return _shape_fields(hint, value or {}, where, complaints)
    if kind is tuple and isinstance(value, list | tuple):
        items = enumerate(value)
        return tuple(_shape(args[0], item, f"{where}[{i}]", complaints) for i, item in items)
    if isinstance(kind, type) and issubclass(kind, Mapping) and isinstance(value, Mapping | None):
        item = args[1]
        pairs = (value or {}).items()
        return {str(key): _shape(item, v, f"{where}.{key}", complaints) for key, v in pairs}
    if kind is Literal:
        return _shape_literal(args, value, where, complaints)
    if hint is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if hint is int and type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)  # which JSON may spell 2.0
    if hint is Any:
        _check_json(value, where, complaints)
        return value
    if type(value) is hint and value == value:  # which not-a-number is not
        return value
    expected, _ = TYPE_NAMES.get(kind or hint, ("a mapping", ""))
    complaints.append(f"{where or 'the whole'}: {_quoted(where, value)} is not {expected}")
    return value


def _check_json(value: Any, where: str, complaints: list[str]) -> None:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
        if re.search(r"(?<!\\)(\\\\)*\\u0000", text):
            raise ValueError("a NUL")
    except (TypeError, ValueError, RecursionError) as problem:
        # Dates, infinities, circles, halves of characters, NUL: nothing to be sent or kept.
        complaints.append(
            f"{where}: {_quoted(where, value)[:80]} cannot be written as JSON: {problem}"
        )


def _quoted(where: str, value: Any) -> str:
    # Somebody may have pasted a key where its variable's name belongs.
    text = repr(value)
    if re.search(r"(?i)key|token|secret|password|_env$", where) or re.search(r"://[^/@]*@", text):
        return "the value"
    return text


def _shape_literal(
    choices: tuple[Any, ...],
    value: Any,
    where: str,
    complaints: list[str],
) -> Any:
    if isinstance(value, bool) and "on" in choices:
        return "on" if value else "off"
    if value not in choices:
        names = ", ".join(map(str, choices))
        complaints.append(f"{where}: {_quoted(where, value)} is not one of {names}")
    return value


def _shape_fields(
    cls: Any,
    data: Fields,
    where: str,
    complaints: list[str],
) -> Any:
    hints = hints_of(cls)
    earlier = len(complaints)
    unknown = [key for key in data if key not in hints]
    complaints += [f"{where}.{key}: unknown, {nearest(str(key), hints)}" for key in unknown]
    fields = {}
    for key, hint in hints.items():
        if key in data:
            fields[key] = _shape(hint, data[key], f"{where}.{key}", complaints)
        elif key not in cls._field_defaults:
            complaints.append(f"{where}.{key}: missing")
    if len(complaints) > earlier:
        return None
    shaped = cls(**fields)
    if hasattr(shaped, "fault") and (fault := shaped.fault()):
        complaints.append(f"{where}: {fault}")
    return shaped


def _shape_marked(
    args: tuple[Any, ...],
    value: Any,
    where: str,
    complaints: list[str],
) -> Any:
    if KEY in args and not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", str(value or "")):
        cure = "names an environment variable in capitals; the key itself stays out of the file"
        complaints.append(f"{where}: {cure}")
        return ""
    shaped = _shape(args[0], value, where, complaints)
    for mark in args:
        if not isinstance(mark, Between) or not isinstance(shaped, int | float):
            continue
        if not mark.low <= shaped <= mark.high:
            complaints.append(f"{where}: {shaped} is not in {mark.low:g} … {mark.high:g}")
    return shaped


def schema(hint: Any) -> JsonObject:
    """The JSON schema (draft 2020-12) of a shape, or of one hint: what `from_mapping` takes."""
    kind = typing.get_origin(hint)
    args = typing.get_args(hint)
    if kind is Annotated:
        result = schema(args[0])
        for mark in args:
            if isinstance(mark, Between):
                result.update(minimum=mark.low, maximum=mark.high)
        return result
    if types.NoneType in args:
        return {"anyOf": [schema(args[0]), {"type": "null"}]}
    if kind is Literal:
        return {"enum": [*args]}
    if kind is tuple:
        return {"type": "array", "items": schema(args[0])}
    if hasattr(hint, "_fields"):
        fields = hints_of(hint)
        return {
            "type": "object",
            "properties": {name: schema(field) for name, field in fields.items()},
            "required": [*fields.keys() - hint._field_defaults],
            "additionalProperties": False,
        }
    if hint is Any:
        return {}
    return {"type": TYPE_NAMES.get(hint, ("", "object"))[1]}


def marked(cls: Any, mark: str) -> list[str]:
    """The fields of `cls` whose hint carries `mark` (KEY or REQUEST)."""
    hints = hints_of(cls).items()
    return [name for name, hint in hints if mark in getattr(hint, "__metadata__", ())]


def as_mapping(value: Any) -> Any:
    """A NamedTuple, and those in it, as mappings."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: as_mapping(item) for key, item in value.items()}
    return value


def sparse(shape: Any) -> JsonObject:
    """The fields of a NamedTuple that are not at their defaults."""
    defaults = shape._field_defaults
    fields = shape._asdict()
    return {key: value for key, value in fields.items() if value != defaults.get(key)}


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say after "unknown": the nearest known name, or all of them."""
    import difflib

    known = [str(name) for name in known]
    if near := difflib.get_close_matches(word, known, n=1):
        return f'did you mean "{near[0]}"?'
    return f"known: {', '.join(known) or 'none'}"


class Secret:
    """A key: shows as ***, and `redact` takes it out of messages from now on."""

    def __init__(self, value: str) -> None:
        self._value = value
        # A placeholder such as "none" or "lm-studio" is no key, and its word may stand in any text.
        if re.fullmatch(r".{0,7}|[a-z_-]{0,19}", value) or value in KEY_SPELLINGS:
            return
        quoted = "".join(c if c.isalnum() or c in "-._~" else f"%{ord(c):02X}" for c in value)
        escaped = json.dumps(value)[1:-1]
        spellings = {value, quoted, quoted.replace("%2F", "/"), escaped}
        if value.startswith("eyJ"):  # a JWT: its payload and signature are secret by themselves
            parts = value.split(".")[1:]
            spellings.update(part for part in parts if len(part) > 7)
        KEY_SPELLINGS[:] = sorted(spellings.union(KEY_SPELLINGS), key=len, reverse=True)

    def reveal(self) -> str:
        """The key itself, for a header."""
        return self._value

    def __repr__(self) -> str:
        return "***"


def secret_from(variable: str) -> Secret:
    """The key in the environment variable.

    KeyMissing where it is not set, BadConfig where it cannot be a key.
    """
    secret = header_from(variable)
    if " " in secret.reveal():
        raise BadConfig(f"{variable} holds a space, which no key has", "paste it again")
    return secret


def header_from(variable: str) -> Secret:
    """The header in the environment variable, such as `Bearer …`; errors as of `secret_from`."""
    value = os.environ.get(variable, "").strip()
    if not value:
        hint = f"export {variable}=…, or name a file that has it as env_file"
        raise KeyMissing(f"{variable} is not set", hint)
    if not (value.isascii() and value.isprintable()):
        message = f"{variable} holds characters that no key has"
        raise BadConfig(message, "paste it again, without line breaks")
    Secret(value.rpartition(" ")[2])
    return Secret(value)


def cleaned(value: Any) -> Any:
    """What a remote sent, as it may be kept: without keys, NUL, and what JSON cannot say."""
    if isinstance(value, str):
        return redact(value).replace("\0", "")
    if isinstance(value, Mapping):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    if isinstance(value, float) and value - value != 0:  # not a number, or not a finite one
        return None
    return value


HTML_PAGE = "an HTML page"


def excerpt(data: bytes | bytearray, most: int = 300) -> str:
    """The beginning of what a remote sent, on one line; keys are taken out before it is cut."""
    text = " ".join(data[: 1 << 16].decode("utf-8", "replace").split())
    if "<html" in text[:200].lower():
        return HTML_PAGE
    return redact(text)[:most] or "nothing"


def to_json(value: Any, indent: int | None = None, surrogates: str = "backslashreplace") -> str:
    """One JSON text, umlauts as they are; every file and answer of ours is written through this.

    A lone surrogate, such as of an odd path, becomes \\udce9.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return text.encode("utf-8", surrogates).decode()


def to_jsonb(value: Any) -> str:
    """The same as Postgres takes it, which knows no lone surrogates."""
    return to_json(value, surrogates="replace")


def parsed(text: bytes) -> JsonObject:
    """The mapping that a JSON text is; {} where it is none."""
    with suppress(ValueError, RecursionError):
        return mapping_of(json.loads(text))
    return {}


def mapping_of(value: Any) -> JsonObject:
    """A JSON value where it is a mapping; {} in place of any other."""
    if isinstance(value, dict):
        return value
    return {}


def mappings_in(value: Any) -> list[JsonObject]:
    """The mappings in a JSON list; none in place of any other value."""
    if isinstance(value, list):
        return [item for item in value if isinstance(item, dict)]
    return []


def sha256_of(data: Any) -> str:
    """The hash of a text, of bytes, or of what is left of a file, in hex."""
    import hashlib

    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return hashlib.file_digest(data, "sha256").hexdigest()


def merge_line(record: Any, line: Fields) -> None:
    """Lay one line over the record; mappings such as `remote` are merged, other values replaced."""
    for key, value in line.items():
        known = record.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            value = {**known, **value}
        record[key] = value


def replaced(value: Any, marks: Fields) -> Any:
    """`value` with what each text in it that is a mark stands for; a field for None is left out."""
    if isinstance(value, list | tuple):
        return [replaced(item, marks) for item in value]
    if isinstance(value, Mapping):
        fields = {}
        for key, old in value.items():
            new = replaced(old, marks)
            if old is None or new is not None:
                fields[key] = new
        return fields
    if isinstance(value, str):
        return marks.get(value, value)
    return value


def new_uuid() -> str:
    """A random UUID, version 4; importing `uuid` would cost 8 ms of every start."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return re.sub(r"^(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", raw.hex())


def is_uuid(text: str) -> bool:
    """Whether `text` is a UUID in its usual spelling."""
    return bool(re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text))


def now_iso() -> str:
    """The local time as ISO 8601 with its offset, to the millisecond."""
    seconds = time.time()
    milliseconds = int(seconds % 1 * 1000)
    stamp = time.strftime(f"%Y-%m-%dT%H:%M:%S.{milliseconds:03d}%z", time.localtime(seconds))
    return f"{stamp[:-2]}:{stamp[-2:]}"


# === Images: what bytes are: PNG, JPEG, WebP, GIF; and a PNG of our own ===

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# By file ending.
MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "gif": "image/gif"}


class Sniffed(NamedTuple):
    """What a file turned out to be."""

    format: str  # its ending: png, jpg, webp, gif
    width: int = 0  # pixels; 0 where the file breaks off before it says so
    height: int = 0
    complete: bool = False  # the format's own end was found


def sniff(file: BinaryIO) -> Sniffed | None:
    """What image `file` holds, None where it is none; its body is skipped, not read."""
    file.seek(0)
    magic = (
        rb"(?s)(?P<png>\x89PNG\r\n\x1a\n)|(?P<jpg>\xff\xd8\xff)"
        rb"|(?P<gif>GIF8)|(?P<webp>RIFF....WEBP)"
    )
    match = re.match(magic, file.read(16))
    if not match:
        return None
    ending = match.lastgroup or ""
    readers = {"png": _read_png, "jpg": _read_jpeg, "gif": _read_gif, "webp": _read_webp}
    size = (0, 0)
    complete = False
    # A struct.error says that the file breaks off.
    with suppress(struct.error):
        for known in readers[ending](file):
            size = known
        complete = min(size) > 0
    return Sniffed(ending, *size, complete)


def _unpack(file: BinaryIO, shape: str) -> tuple[Any, ...]:
    return struct.unpack(shape, file.read(struct.calcsize(shape)))


# Each of these yields width and height as soon as they are known, and returns if the image is there
# to its end; else struct.error.
Sizes = Iterator[tuple[int, int]]


def _read_png(file: BinaryIO) -> Sizes:
    file.seek(16)
    width, height = _unpack(file, ">II9x")
    yield width, height
    kind = b""
    while kind != b"IEND":
        length, kind = _unpack(file, ">I4s")
        file.seek(length, os.SEEK_CUR)
        # The CRC: this chunk is there to its last byte.
        _unpack(file, ">I")


def _read_jpeg(file: BinaryIO) -> Sizes:
    marker = 0
    file.seek(2)
    while marker != 0xDA:
        # Some cameras leave stray bytes before a marker, and every viewer passes over them.
        while _unpack(file, "B")[0] != 0xFF:
            pass
        # Fill bytes may stand there too.
        while (marker := _unpack(file, "B")[0]) == 0xFF:
            pass
        place = file.tell()
        (length,) = _unpack(file, ">H")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = _unpack(file, ">xHH")
            yield width, height
        file.seek(place + length)
    # From here on FF D9 means nothing but the end.
    last = b""
    while block := file.read(1 << 16):
        if b"\xff\xd9" in last + block:
            return
        last = block[-1:]
    raise struct.error("no end of image")


def _read_webp(file: BinaryIO) -> Sizes:
    file.seek(4)
    size, kind, head = _unpack(file, "<I4x4s4x10s")
    if kind == b"VP8X":
        width = 1 + int.from_bytes(head[4:7], "little")
        height = 1 + int.from_bytes(head[7:], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        width = 1 + (bits & 0x3FFF)
        height = 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", head[6:]))
    yield width, height
    if file.seek(0, os.SEEK_END) < size + 8:
        raise struct.error("shorter than it says")


def _read_gif(file: BinaryIO) -> Sizes:
    file.seek(6)
    width, height, flags = _unpack(file, "<HHBxx")
    yield width, height
    file.seek(_gif_colors(flags), os.SEEK_CUR)
    while (kind := _unpack(file, "c")[0]) in b",!":
        skipped = 1
        if kind == b",":
            skipped += _gif_colors(_unpack(file, "8xB")[0])
        file.seek(skipped, os.SEEK_CUR)
        while size := _unpack(file, "B")[0]:
            file.seek(size, os.SEEK_CUR)
    if kind != b";":
        raise struct.error("no trailer")


def _gif_colors(flags: int) -> int:
    if not flags & 0x80:
        return 0
    return 3 * 2 << (flags & 7)


# Base64 as JSON may hold it, in either alphabet; where the answer breaks off its end is missing.
BASE64_TEXT = re.compile(rb'"(?:data:[^",]*,)?((?:[\w+/=-]|\\[/nrt]|\\u00\w\w){28,})')


def inflated(body: bytes | bytearray) -> bytes | bytearray:
    """An answer without the gzip that nobody asked for; where it breaks off, what has come."""
    if body[:2] == b"\x1f\x8b":
        with suppress(zlib.error):
            return zlib.decompressobj(31).decompress(body, 1 << 29)
    return body


def image_in(body: bytes | bytearray, spool: BinaryIO) -> tuple[int, int]:
    """Where in an answer its image is, which is decoded into `spool`; 0, 0 where there is none.

    As raw bytes, or as base64 under whatever name: what counts is that it decodes to an image.
    """
    if sniff(io.BytesIO(body[:64])):
        spool.write(body)
        return 0, len(body)
    candidates = []
    for match in BASE64_TEXT.finditer(body):
        head = decode_base64(match[1][:80], io.BytesIO())
        if sniff(head):
            place = match.span(1)
            # OpenAI's own name for it counts more than any other.
            named = b"b64_json" in body[max(0, match.start() - 20) : match.start()]
            candidates.append((named, place))
    if not candidates:
        return 0, 0
    # A stream shows pictures of its progress before the image itself.
    if body.lstrip()[:6] in (b"event:", b"data: "):
        candidates.reverse()
    _, (start, end) = max(candidates, key=lambda candidate: candidate[0])
    decode_base64(memoryview(body)[start:end], spool)
    return start, end


def decode_base64(text: bytes | memoryview, spool: BinaryIO) -> BinaryIO:
    """Base64 as JSON writes it (`\\/`, `\\n`, `\\u002B`), in either alphabet, decoded into `spool`.

    A megabyte at a time. Padding may be missing, and the end too.
    """
    rest = half = b""
    for start in range(0, len(text), 1 << 20):
        piece = rest + half + text[start : start + (1 << 20)]
        # Half an escape waits for its other half, and four characters make three bytes.
        half = re.findall(rb"(?:\\(?:u\w{0,3})?)?\Z", piece[-5:])[0]
        plain = piece.removesuffix(half)
        plain = re.sub(rb"\\u00(\w\w)", lambda hit: binascii.a2b_hex(hit[1]), plain)
        plain = re.sub(rb"\\[nrt]|\\", b"", plain).translate(BASE64_ALPHABET)
        rest = plain[len(plain) // 4 * 4 :]
        spool.write(binascii.a2b_base64(plain.removesuffix(rest)))
    if len(rest) > 1:
        spool.write(binascii.a2b_base64(rest + b"=="))
    spool.seek(0)
    return spool


def base64_of(data: bytes) -> str:
    """Base64 of some bytes, on one line."""
    return binascii.b2a_base64(data, newline=False).decode()


BASE64_ALPHABET = bytes.maketrans(b"-_", b"+/")


def png_plane(file: BinaryIO) -> Iterator[bytes]:
    """The last channel of a PNG, a byte a pixel, row by row, undone as far as it is asked for.

    That is the alpha of RGBA and of grey with alpha, and of a palette what tRNS makes of it.
    ValueError where there is no alpha.
    """
    file.seek(0)
    chunks = [*png_chunks(file.read())]
    width, height, depth, color, interlaced = struct.unpack(">IIBBxxB", chunks[0][1])
    channels = {3: 1, 4: 2, 6: 4}.get(color, 0)
    if interlaced or not channels:
        raise ValueError("a PNG with alpha, and not interlaced, is needed")
    table = bytes(range(256))
    if color == 3:
        table = dict(chunks).get(b"tRNS", b"").ljust(256, b"\xff")
        if min(table) == 255:
            raise ValueError("its palette has no transparent color")
    size = 1 + (width * channels * depth + 7) // 8
    pixel = max(1, channels * depth // 8)
    # Of 16 bits the upper byte.
    alpha = 1 + pixel - max(1, depth // 8)
    packed = b"".join(body for kind, body in chunks if kind == b"IDAT")
    lines = zlib.decompressobj().decompress(packed, size * height)
    if len(lines) < size * height:
        raise zlib.error("it breaks off")
    row = bytes(len(range(alpha, size, pixel)))
    for start in range(0, len(lines), size):
        line = lines[start + alpha : start + size : pixel]
        row = png_unfiltered(lines[start], line, row)
        pixels = row
        if depth < 8:
            shifts = range(8 - depth, -1, -depth)
            pixels = bytes(byte >> shift & (1 << depth) - 1 for byte in row for shift in shifts)
        yield pixels[:width].translate(table)


def background_of(file: BinaryIO, ending: str) -> str:
    """Whether anything shows through an image: transparent or opaque; "": nobody can tell.

    Of a WebP its header says so; of a PNG every pixel is looked at, up to the first.
    """
    file.seek(0)
    data = file.read()
    transparent = False
    if ending == "webp":
        flags = {b"VP8X": 20, b"VP8L": 24}.get(data[12:16])
        transparent = bool(flags and data[flags] & 16)
    if ending == "png":
        chunks = dict(png_chunks(data))
        # Interlaced, or with one of its colors transparent.
        if data[28] or (b"tRNS" in chunks and b"PLTE" not in chunks):
            return ""
        with suppress(ValueError):
            transparent = any(min(row) < 255 for row in png_plane(file))
    return "transparent" if transparent else "opaque"


# An opaque image has a few kinds of rows, each many times.
@functools.lru_cache(16)
def png_unfiltered(kind: int, line: bytes, above: bytes) -> bytes:
    """A channel of one row as it was before a PNG's filter; its pixels do not touch others."""
    if kind == 0:
        return bytes(line)
    row = bytearray()
    left = corner = 0
    for x, up in zip(line, above, strict=True):
        base = left
        if kind == 2:
            base = up
        elif kind == 3:
            base = (left + up) // 2
        elif kind == 4:
            # Paeth: which of the three is nearest to left + up - corner; on a tie in this order.
            guess = left + up - corner
            base = min((left, up, corner), key=lambda value: abs(guess - value))
        left = (x + base) & 255
        corner = up
        row.append(left)
    return bytes(row)


def exif_orientation(file: BinaryIO) -> int:
    """How a camera held a JPEG: 1 is upright, 2 to 8 are turned or mirrored."""
    file.seek(0)
    _, _, tiff = file.read(1 << 16).partition(b"Exif\0\0")
    with suppress(struct.error):
        order = "<" if tiff[:2] == b"II" else ">"
        (start,) = struct.unpack_from(f"{order}4xI", tiff)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for number in range(count):
            tag, value = struct.unpack_from(f"{order}H6xH", tiff, start + 2 + 12 * number)
            if tag == 0x0112 and 1 <= value <= 8:
                return int(value)
    return 1


def embedded_parameters(data: bytes) -> str:
    """The text with which A1111 and its kin mark what they make; "" where there is none.

    Of a PNG; or the comment in a JPEG's EXIF, with what stands behind it.
    """
    _, _, comment = data[: 1 << 17].partition(b"UNICODE\0")
    for encoding in ("utf-16-be", "utf-16-le"):
        text = comment.decode(encoding, "replace")
        if "Steps: " in text:
            return text
    return png_text(data, "parameters")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks; nothing where it is no PNG."""
    position = 8
    while data.startswith(PNG_MAGIC) and position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position + 8 : position + 8 + size]
        position += 12 + size


def png_text(data: bytes, keyword: str) -> str:
    """The text that a PNG carries under this keyword; "" where it has none, or is no PNG."""
    for kind, body in png_chunks(data):
        name, _, text = body.partition(b"\0")
        if name != keyword.encode():
            continue
        if kind == b"tEXt":
            return text.decode("latin-1")
        if kind == b"zTXt":  # as an iTXt would have it
            text = b"\1\0\0\0" + text[1:]
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
        with suppress(zlib.error):
            if packed:
                text = zlib.decompress(text)
            return text.decode("utf-8", "replace")
    return ""


def png_encode(
    width: int,
    height: int,
    palette: bytes,
    rows: bytes,
    text: Strings,
) -> bytes:
    """An 8-bit palette PNG.

    `palette` is RGB triples, `rows` one index a pixel, `text` goes into text chunks.
    """
    starts = range(0, width * height, width)
    # Each line begins with its filter: none.
    lines = b"".join(b"\0" + rows[start : start + width] for start in starts)
    texts = [
        (b"iTXt", f"{key}\0\0\0\0\0{value}".encode("utf-8", "replace"))
        for key, value in text.items()
    ]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        *texts,
        (b"IDAT", zlib.compress(lines, 1)),
        (b"IEND", b""),
    ]
    png = PNG_MAGIC
    for kind, body in chunks:
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    return png


# === Contract: Order, Request, Result, Context, Backend: what an adapter is ===


class Input(NamedTuple):
    """An image that came in: a local copy, named by its hash, and checked."""

    path: str
    name: str  # where it came from, without folders
    sha256: str
    width: int
    height: int
    mime_type: str
    image_id: str = ""  # where it is one of ours
    orientation: int = 1  # as EXIF has it


# How an image should look: fields of a request, and what two of them are.
LOOKS = ("aspect", "format", "background", "quality")
FORMATS = ("png", "jpeg", "webp")
# mypy wants the names spelled out.
Format = Literal[("", *FORMATS)]  # type: ignore[valid-type]
Background = Literal["", "auto", "opaque", "transparent"]
# What most models offer that take no pixels.
ASPECTS = ("1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")


class Takes(NamedTuple):
    """Which inputs an adapter can honour; what asks for more is refused before it is sent.

    And which looks: what it cannot is left out, or refused where the order is strict.
    """

    images: int = 0  # at most
    mask: bool = False
    strength: bool = False
    formats: tuple[str, ...] = ("png", "jpg", "webp")
    most_bytes: int = 50 << 20  # of one image
    ignores: tuple[str, ...] = LOOKS[1:]  # fields of a request that it has no word for
    makes: tuple[str, ...] = FORMATS  # of which a request may choose
    aspects: tuple[str, ...] = ()  # likewise; (): any

    def unmet(self, request: Request) -> list[str]:
        """The fields of a request that will not be honoured."""
        names = [name for name in self.ignores if getattr(request, name)]
        if request.format not in ("", *self.makes):
            names.append("format")
        return names


class Request(NamedTuple):
    """One image wanted."""

    prompt: str  # as the person wrote it, until apply_style
    negative_prompt: str = ""
    width: int = 0  # pixels; 0: the backend's default
    height: int = 0
    steps: int = 0  # 0: the backend's default
    seed: int | None = None  # None: drawn before the adapter sees it; below 2**63
    style: str = ""
    backend: str = ""  # instance name; "": the default
    backend_opts: Fields = EMPTY
    images: tuple[Input, ...] = ()  # what to start from, in order
    mask: Input | None = None  # transparent: make anew; as large as the first image
    strength: float = 0.0  # how far from the first image, up to 1; 0: the backend's default
    aspect: str = ""  # such as 16:9; where there is a size too, that counts
    format: str = ""
    background: str = ""
    quality: str = ""  # as the backend calls it

    def pixels(self, edge: int, step: int = 16) -> tuple[int, int]:
        """Its size, or that of its aspect with some edge² pixels; 0, 0 where it has neither.

        >>> Request("a fox", aspect="16:9").pixels(1024)
        (1360, 768)
        """
        if self.width or not self.aspect:
            return self.width, self.height
        ratio = ratio_of(self.aspect)
        height = max(1, round(edge / ratio**0.5 / step)) * step
        return max(1, round(height * ratio / step)) * step, height

    def marks(self) -> dict[str, Input]:
        """What stands for each input where an option or a workflow has a place for it."""
        marks = {image_mark(number): image for number, image in enumerate(self.images, 1)}
        if self.mask:
            marks["{mask}"] = self.mask
        return marks


def image_mark(number: int) -> str:
    """How an option or a workflow names the place of the first, second, … image."""
    if number == 1:
        return "{image}"
    return f"{{image{number}}}"


def ratio_of(aspect: str) -> float:
    """Width by height, of `16:9` or of `1360x768`."""
    width, height = re.split("[:x]", aspect)
    return float(width) / float(height)


def nearest_aspect(ratio: float, offered: Iterable[str]) -> str:
    """The offered aspect that differs least from a ratio."""
    return min(offered, key=lambda aspect: off_by(ratio_of(aspect), ratio))


def off_by(ratio: float, other: float) -> float:
    """The factor between two ratios, 1 or more."""
    return max(ratio / other, other / ratio)


def size_fault(width: int, height: int) -> str:
    """What is wrong with a size in pixels; "" where nothing is, or where it is left open."""
    if bool(width) != bool(height):
        return "a size needs width and height"
    if width and not 16 <= min(width, height) <= max(width, height) <= 8192:
        return f"size {width}x{height}: 16 to 8192 pixels"
    return ""


def size_fields(size: str) -> dict[str, int]:
    """The pixels of a size, as fields of an Order; 0 where it is `auto`.

    >>> size_fields("1024x768")
    {'width': 1024, 'height': 768}
    """
    match = re.fullmatch(r"auto|([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", size)
    if not match:
        hint = "16 to 8192 pixels each, such as 1024x768"
        raise BadRequest(f'size "{size}": not WxH', hint)
    return {"width": int(match[1] or 0), "height": int(match[2] or 0)}


class Order(NamedTuple):
    """What one call of a door asks for: a Request's fields, and how many, where to, how private.

    Every door translates its own names into a mapping and has `from_mapping` check it by the hints
    here; `plans_of` does the rest.
    """

    prompt: str
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    steps: int = 0
    seed: int | None = None  # of the first image; the next ones count up
    style: str = ""
    backend: str = ""
    backend_opts: Fields = EMPTY
    images: tuple[str, ...] = ()  # a path, an http address, a data URI, an id or `last`
    mask: str = ""  # likewise
    strength: Annotated[float, Between(0, 1)] = 0.0
    aspect: str = ""
    format: Format = ""
    background: Background = ""
    quality: str = ""
    strict: bool = False  # what comes otherwise than asked for is an error, though it stays
    n: int = 1  # images
    key: str = ""  # whoever repeats an order with this key gets the same images, paid once
    caller: str = ""  # whose keys these are; "": the local user's
    pay_again: bool = False  # where nobody can tell whether the images of this key were paid
    output: str = ""  # FILE, DIR/, or "" for what the config says
    cloud: str = ""  # on, off (private for ever), or "" for what the config says
    tags: tuple[str, ...] = ()  # of its row in the cloud

    def request(self) -> Request:
        """The first image of the order, without its inputs."""
        return request_of({**self._asdict(), "images": (), "mask": None})


def request_of(fields: Any) -> Request:
    """The request in a mapping that may hold other things too; what it lacks is at its default."""
    if not isinstance(fields, Mapping):
        fields = {}
    known = {name: fields[name] for name in Request._fields if name in fields}
    return Request("")._replace(**known)


class Result(NamedTuple):
    """One image made."""

    image: BinaryIO  # at its start; the pipeline closes it. Downloads: the file of ctx.spool()
    mime_type: str  # what the backend said; the truth is sniffed
    model: str | None = None
    seed: int | None = None  # the one really used, if the backend says
    steps: int | None = None  # the number really used
    cost_usd: float | None = None  # None: what was known before, never 0 for unknown
    ignored: tuple[str, ...] = ()  # request fields it could not honour
    metadata: Fields = EMPTY  # everything else worth keeping, verbatim in the sidecar
    others: Sequence[Fields] = ()  # further images of the same job, as `resume` takes them
    cost_source: str = ""  # reported, tokens, table, config


class Price(NamedTuple):
    """What one image will cost, as far as it is known before."""

    usd: float | None = None  # None: unknown
    source: str = ""  # "table of 2026-11-20", "config"
    worst: float | None = None  # where it is known only afterwards: at most so much

    def most(self) -> float | None:
        """What a budget reserves for it; None: nobody knows."""
        if self.usd is None:
            return self.worst
        return self.usd


class Progress(NamedTuple):
    """Where one attempt stands; `done` of `total` where the backend says."""

    note: str = ""
    done: float | None = None
    total: float | None = None


class Context:
    """How the world reaches an adapter: progress, stopping, and what has to be written down.

    This one writes nothing down; the pipeline's `Run` does. `why` is empty until the work is
    stopped, then user, lost, released or deadline. `charged` is the truth about this attempt, as
    far as it is known.
    """

    def __init__(
        self,
        timeout: float = 600.0,
        on_progress: Callable[[Progress], object] = lambda _: None,
        on_warning: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._on_progress = on_progress
        self._on_warning = on_warning
        self.timeout = timeout
        self.started = time.monotonic()
        self.deadline = self.started + min(timeout, 1e6)  # no lock waits for 1e10 s
        self.why = ""
        self.charged: Charged = "no"
        self.remote_ids: JsonObject = {}
        self.identity: JsonObject = {}  # prompt and seed as they stand in the paid body
        self._stopped = threading.Event()
        self._sockets: set[socket.socket] = set()

    def progress(
        self,
        note: str,
        done: float | None = None,
        total: float | None = None,
    ) -> None:
        """A word for a person, and how far it is where the backend says."""
        note = printable(str(note))
        if isinstance(done, int | float) and isinstance(total, int | float):
            self._on_progress(Progress(note, done, total))
        else:
            self._on_progress(Progress(note))

    def warn(self, text: str) -> None:
        """What a person should know, though the image will be made."""
        self._on_warning(text)

    def stop(self, why: str) -> None:
        """End the work, from any thread or signal handler: a blocked read returns within ms."""
        self.why = self.why or why
        self._stopped.set()
        for sock in list(self._sockets):
            with suppress(OSError):
                # Not ssl's own shutdown, which would change state under a reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise if the work was stopped or its deadline has passed.

        Ask before believing in a broken connection: a stop shuts sockets down.
        """
        if self.left() <= 0:
            self.why = self.why or "deadline"
        if self.why == "deadline":
            raise Failed(f"not done within {self.timeout:g} s", "give it longer with --timeout")
        messages = {"user": "interrupted", "released": "interrupted; the job there goes on"}
        if self.why:
            raise Interrupted(messages.get(self.why, f"stopped: the job was {self.why}"))

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a stop or the deadline, which raise."""
        self._stopped.wait(min(seconds, self.left()))
        self.check()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextmanager
    def watching(self, sock: socket.socket) -> Iterator[None]:
        """While inside, a stop shuts `sock` down."""
        self._sockets.add(sock)
        try:
            if self.why:
                self.stop(self.why)
            yield
        finally:
            self._sockets.discard(sock)

    def sending(self) -> None:
        """The first byte of a paid POST is about to leave: durable before this returns."""
        self.charged = "unknown"

    def settle(self, charged: Charged) -> None:
        """The remote's answer says whether this attempt costs money."""
        self.charged = charged

    def remote(self, **ids: Any) -> None:
        """The remote's ids of this job: written down before any wait."""
        self.remote_ids.update(ids)

    def keep_answer(self, body: bytes | bytearray) -> None:
        """The body of a paid answer: on disk before anybody judges it."""

    def kept_answer(self) -> bytes:
        """What `keep_answer` has kept of this attempt; nothing where it has not."""
        return b""

    def spool(self) -> BinaryIO:
        """An empty file for the image to arrive in."""
        return io.BytesIO()


def in_thread(work: Callable[..., object], *args: Any) -> threading.Thread:
    """A thread that does `work`, already started; it holds nobody up who wants to leave."""
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


class Access(NamedTuple):
    """What every block may have besides its adapter's options: how its server is reached."""

    headers_env: Mapping[str, Annotated[str, KEY]] = EMPTY  # header: variable; to base_url alone
    basic_auth_env: Annotated[str, KEY] = ""  # of user:password
    ca_file: str = ""  # of the authority that signed the server's certificate
    fallback: str = ""  # who makes it where this one was not reached, and nothing was sent


class Backend:
    """What every adapter is. Its docstring names the remote's manual; `register` gives it its type.

    It gets options that fit `Options` and a request with seed drawn and style applied, and reads
    nothing else. It never prints, and writes no file but ctx.spool(). It reports with ctx.progress,
    waits with ctx.sleep, goes out through `Http`, and lets what these raise pass.

    A remote that has jobs: ctx.remote(id=…) as soon as there is an id, before any wait; then
    `resume` can fetch the result after a kill. ctx.settle says what an attempt that makes no image
    has cost; one that makes an image was charged in any case. It raises the classes of section
    Errors: Ended where the job is over and nothing will come, Unknown where nobody can tell.
    Options may have `model`, which the sidecar names, and `parallel`, how many at a time (1).
    """

    paid: ClassVar[bool] = True
    # NamedTuple of its block in imagen.yaml, minus `type`; marks: KEY, REQUEST, Between.
    Options: ClassVar[type[Any]]
    headers: Strings = EMPTY  # for Http: its own, and, once it is open, those of its Access
    ca_file: str = ""
    # The remote's fields that it fills itself, which a request's `extra` may not name.
    OWN_FIELDS: ClassVar[str] = ""

    def __init__(self, name: str, options: Any) -> None:
        """Fails fast, with BadConfig: a variable unset, a URL malformed, a file not there."""
        self.name = name
        self.options = options

    @classmethod
    def plan(cls, options: Any, request: Request) -> Fields:
        """What would be sent, without key or network; BadRequest for what is sure to be refused.

        `seed`: None where there is no place for one, and every image would be the same.
        """
        return {name: getattr(request, name) for name in ("width", "height", "steps", "seed")}

    @classmethod
    def takes(cls, options: Any) -> Takes:
        """Which inputs and looks it can honour."""
        return Takes(ignores=LOOKS)

    @classmethod
    def price(cls, options: Any, request: Request) -> Price:
        """What it will cost, before it is sent."""
        if not cls.paid:
            return Price(0.0, "free")
        usd = getattr(options, "cost_usd", None)
        return Price(usd, "" if usd is None else "config")

    def generate(self, ctx: Context, request: Request) -> Result:
        """The image. Every adapter has its own."""
        raise BadConfig(f"{type(self).__name__} makes no images")

    def resume(self, ctx: Context, remote: Fields, request: Request) -> Result:
        """The image of an attempt that somebody else began, where the remote keeps results.

        Otherwise the answer to its POST may be here, whole or cut off, with the image in it.

        `remote` is what ctx.remote() was told, which may lack the id; `since`, when it was sent;
        `body`, the prompt and seed that were sent; and `taken`, the ids of other attempts' jobs.
        """
        spool = ctx.spool()
        _, end = image_in(inflated(ctx.kept_answer()), spool)
        if not end:
            raise Ended("this kind of backend keeps no results")
        spool.seek(0)
        return Result(spool, "", model=getattr(self.options, "model", None))

    def cancel(self, ctx: Context, remote: Fields) -> None:
        """End the remote job; called with a fresh 3-second context. Raises where that failed."""
        raise Unknown("this kind of backend cannot be cancelled")

    def check(self, ctx: Context) -> str:
        """One free, authenticated GET that also finds the model: a line for a person."""
        return "ready"


# What an adapter raises where an answer has another shape than the remote's manual says.
STUMBLES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def adapter_error(problem: BaseException) -> ImagenError:
    """Any exception of an adapter as an ImagenError."""
    if not isinstance(problem, STUMBLES):
        return as_error(problem)
    message = f"its adapter stumbled over an answer ({type(problem).__name__}: {problem})"
    return Failed(
        message, "does base_url lead to what its `type` means? -v shows where it stumbled"
    )


def result_of(
    backend: Backend, ctx: Context, request: Request, ask: Callable[[], Result]
) -> Result:
    """What `ask` returns; where it stumbles over an answer that has an image, that image."""
    try:
        return ask()
    except STUMBLES as problem:
        if not ctx.remote_ids:  # else it is fetched again, and what came may be a draft
            with suppress(Ended):
                return Backend.resume(backend, ctx, EMPTY, request)
        raise adapter_error(problem) from problem


BACKENDS: dict[str, type[Backend]] = {}


def register(kind: str) -> Callable[[type[Backend]], type[Backend]]:
    """Class decorator: `type: kind` in imagen.yaml means this adapter."""

    def add(cls: type[Backend]) -> type[Backend]:
        BACKENDS[kind] = cls
        return cls

    return add


def options_of(
    name: str,
    blocks: Fields,
    opts: Fields = EMPTY,
) -> tuple[type[Backend], Any]:
    """The adapter class of the backend called `name`, and its checked Options.

    A request's `opts` are laid over the block; BadRequest where it may not set them.
    """
    if name not in blocks:
        raise BadRequest(f'backend "{name}" is not configured: {nearest(name, blocks)}')
    block = dict(blocks[name] or {})
    kind = str(block.pop("type", ""))
    for field in Access._fields:
        block.pop(field, None)
    with _complaints_about(name, opts):
        if kind not in BACKENDS:
            import difflib

            by_distance = difflib.get_close_matches(kind, BACKENDS, len(BACKENDS), 0.0)
            known = ", ".join(by_distance)
            raise BadConfig(f'type "{kind}" is unknown; known, nearest first: {known}')
        cls = BACKENDS[kind]
        allowed = marked(cls.Options, REQUEST)
        for key in opts.keys() - allowed:
            message = f'backend "{name}" takes no request option "{key}": {nearest(key, allowed)}'
            raise BadRequest(message)
        options = from_mapping(cls.Options, block)
        check_extra(cls, options, opts.get("extra"))
        merge_line(block, opts)
        return cls, from_mapping(cls.Options, block)


def check_extra(cls: type[Backend], options: Any, extra: Any) -> None:
    """BadRequest where a request's `extra` sets what price, record or block decide."""
    if isinstance(extra, Mapping):
        placed = [key for key, value in options.extra.items() if str(value).startswith("{")]
        own = (*cls.OWN_FIELDS.split(), *cls.Options._fields, *placed)
        for key in extra.keys() & own:
            raise BadRequest(f"extra.{key}: not for a request to set there", "use its own option")


def open_backend(
    name: str,
    blocks: Fields,
    opts: Fields = EMPTY,
) -> Backend:
    """The backend called `name`, ready to generate; complaints begin with `backend "name":`."""
    cls, options = options_of(name, blocks, opts)
    with _complaints_about(name, opts):
        backend = cls(name, options)
        access = access_of(blocks[name])
        headers = {**backend.headers}
        if access.basic_auth_env:
            login = header_from(access.basic_auth_env).reveal().encode()
            basic = Secret(base64_of(login))
            headers["Authorization"] = f"Basic {basic.reveal()}"
        for header, variable in access.headers_env.items():
            headers[header] = header_from(variable).reveal()
        backend.headers = headers
        backend.ca_file = access.ca_file
        return backend


def access_of(block: Fields | None) -> Access:
    """The Access in a backend's block."""
    block = block or {}
    fields = {key: block[key] for key in Access._fields if key in block}
    return from_mapping(Access, fields)


@contextmanager
def _complaints_about(name: str, opts: Fields) -> Iterator[None]:
    try:
        yield
    except BadConfig as problem:
        lines = str(problem).split("\n")
        field = lines[0].split(":")[0]
        # What the request itself has set is the caller's mistake, not the config's.
        kind = BadRequest if field in opts else type(problem)
        message = "\n".join(f'backend "{name}": {line}' for line in lines)
        raise kind(message, problem.hint) from None


# === Config: imagen.yaml: flag > environment > file > default ===

# What several blocks have.
KeyName = Annotated[str, KEY]  # of an environment variable
Seconds = Annotated[float, Between(1, 3600)]
Parallel = Annotated[int, Between(1, 64)]


CONFIG_BYTES = 1 << 20  # of imagen.yaml
CONFIG_VALUES = 100_000  # in it


class OutputConfig(NamedTuple):
    """Where images go and what is shown of them."""

    directory: str = "~/Pictures/imagen"
    naming: str = "{date}-{slug}-{seed}.png"
    write_metadata_json: bool = True
    preview: Switch = "auto"
    preview_command: str = ""
    cloud_sync: Switch = "auto"


class SupabaseConfig(NamedTuple):
    """Which variables lead to the cloud."""

    url_env: KeyName = "SUPABASE_URL"
    service_key_env: KeyName = "SUPABASE_SERVICE_ROLE_KEY"
    database_url_env: KeyName = "IMAGEN_DATABASE_URL"
    bucket: str = "imagen-generated"


class WorkerConfig(NamedTuple):
    """How a worker takes jobs; seconds."""

    concurrency: Parallel = 1
    poll_s: Annotated[float, Between(0.1, 3600)] = 5.0
    lease_s: Seconds = 45.0
    heartbeat_s: Annotated[float, Between(0.1, 1200)] = 10.0
    grace_s: Annotated[float, Between(0, 86400)] = 120.0
    job_timeout_s: Annotated[float, Between(1, 86400)] = 600.0  # for one attempt
    give_up_s: Annotated[float, Between(0, 1e7)] = 3600.0  # on what no worker is able to make


Jobs = Annotated[int, Between(0, 1_000_000)]
Usd = Annotated[float | None, Between(0, 1e6)]  # None: any sum


class OwnerLimits(NamedTuple):
    """How many jobs of one owner may wait, and run (0: any number), and what they may cost."""

    pending: Jobs = 0
    running: Jobs = 0
    usd_per_day: Usd = None


class BudgetConfig(NamedTuple):
    """What may be spent from this state folder."""

    per_image: Usd = None
    per_command: Usd = None
    per_day: Usd = None
    per_month: Usd = None
    unknown: Literal["allow", "refuse"] = "allow"  # what has no price before it is made


class LimitsConfig(NamedTuple):
    """What a request may decide for itself."""

    backends: tuple[str, ...] = ()  # that it may name; none: any
    per_owner: OwnerLimits = OwnerLimits()


def check_worker(config: WorkerConfig) -> None:
    """BadConfig where one late answer would cost a living worker its jobs."""
    if config.heartbeat_s > config.lease_s / 3:
        raise BadConfig(f"worker.heartbeat_s {config.heartbeat_s:g}: a third of lease_s at most")


class Style(NamedTuple):
    """What a style adds to a prompt and to its negative, and a size where it means one."""

    suffix: str = ""
    negative: str = ""
    width: int = 0
    height: int = 0

    def fault(self) -> str:
        """What its types cannot say is wrong with it."""
        return size_fault(self.width, self.height)


SAMPLE = """\
# ImaGen. Check it with `imagen config validate`; try it with `imagen generate "a fox"`.
# Keys never stand here: fields that end in _env name environment variables.
default_backend: flux-schnell-local
owner_user_id: ""                 # your UUID in auth.users; needed for cloud sync
env_file: ""                      # optional: a 0600 file with KEY=VALUE lines
output:
  directory: ~/Pictures/imagen
  naming: "{date}-{slug}-{seed}.png"   # {date} {time} {slug} {seed} {backend} {ext}
  write_metadata_json: true
  preview: auto                   # auto | on | off
  preview_command: ""             # default inside tmux: tmux-img {path}
  cloud_sync: auto                # auto | on | off
supabase:
  url_env: SUPABASE_URL
  service_key_env: SUPABASE_SERVICE_ROLE_KEY
  database_url_env: IMAGEN_DATABASE_URL
  bucket: imagen-generated
worker: {concurrency: 1, poll_s: 5, lease_s: 45, heartbeat_s: 10, grace_s: 120,
  job_timeout_s: 600, give_up_s: 3600}
limits: {}                        # of jobs: backends: [name], per_owner: {pending, running, \
usd_per_day}
budget: {}                        # USD: per_image, per_command, per_day, per_month; \
unknown: allow | refuse
styles: {}                        # name: suffix, or name: {suffix, negative, width, height}
backends:
  flux-schnell-local: {"type": "comfyui", "base_url": "http://localhost:8188", \
"model": "flux1-schnell.safetensors", "default_steps": 4}
  flux-schnell-replicate: {"type": "replicate", "api_token_env": "REPLICATE_API_TOKEN", \
"model": "black-forest-labs/flux-schnell"}
  flux-dev-replicate: {"type": "replicate", "api_token_env": "REPLICATE_API_TOKEN", \
"model": "black-forest-labs/flux-dev"}
  gpt-image: {"type": "openai", "model": "gpt-image-1-mini", "api_key_env": "OPENAI_API_KEY"}
  mock: {"type": "mock"}
"""
# The sample's backends are built in, so that `-b gpt-image` needs no file; a file's own
# are laid over them by name.
_BLOCKS = re.findall("(?m)^  (.+?): ({.+)", SAMPLE)
BUILTIN_BACKENDS: Mapping[str, Fields] = {name: json.loads(block) for name, block in _BLOCKS}


class Config(NamedTuple):
    """imagen.yaml, checked."""

    default_backend: str = "mock"
    owner_user_id: str = ""
    env_file: str = ""
    output: OutputConfig = OutputConfig()
    supabase: SupabaseConfig = SupabaseConfig()
    worker: WorkerConfig = WorkerConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    styles: Mapping[str, Style] = EMPTY
    backends: Mapping[str, Fields] = BUILTIN_BACKENDS


def sample_text() -> str:
    """What `imagen config init` writes."""
    settings, heading, blocks = SAMPLE.partition("backends:\n")
    return settings + heading + re.sub(r'"([\w./-]+)"', r"\1", blocks)


def full_path(path: str) -> str:
    """An absolute path, `~` replaced; BadConfig where nobody says what that is.

    BadRequest for a name that no file can have, such as one out of JSON.
    """
    if re.search(r"[\0\ud800-\udc7f\udd00-\udfff]", path):
        raise BadRequest(f"{path!r}: no file can have this name")
    expanded = os.path.expanduser(path)
    nobody = path != expanded and not os.path.isabs(os.environ.get("HOME", "/"))
    if expanded.startswith("~") or nobody:
        raise BadConfig(f"{path}: this user has no home folder", "set HOME, or name a full path")
    return os.path.abspath(expanded)


def path_setting(path: str) -> str:
    """The full path that a setting names, `$VAR` replaced too; BadConfig where that is not set."""
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise BadConfig(f"{path}: {unset[0]} is not set", f"export {unset[1].strip('{}')}=…")
    return full_path(expanded)


def xdg_folder(variable: str, default: str) -> str:
    """The folder that an XDG variable names, or its default; a relative one does not count."""
    folder = os.environ.get(variable, "").rstrip("/")
    if not os.path.isabs(folder):
        folder = full_path(default)
    return folder


def config_path(flag: str = "", new: bool = False) -> str:
    """The config file in force, "" for none; or the place for a `new` one."""
    named = flag or os.environ.get("IMAGEN_CONFIG", "")
    if named:
        path = full_path(named)
    else:
        path = xdg_folder("XDG_CONFIG_HOME", "~/.config") + "/imagen.yaml"
    # What is there and cannot be read is an error later on, never "the defaults".
    if new or os.path.lexists(path):
        return path
    if named:
        raise BadConfig(f"{path}: no such file", "make one with: imagen config init")
    return ""


def load_config(flag: str = "") -> Config:
    """The configuration in force; BadConfig with every complaint at once, one a line."""
    data = config_data(flag)
    errors = complaints(data, flag)
    if errors:
        raise BadConfig("\n".join(errors))
    return from_mapping(Config, data)


def config_data(flag: str = "") -> JsonObject:
    """The file's values with the environment's over them, not yet checked."""
    data = {}
    if path := config_path(flag):
        data = read_yaml(path)
    if isinstance(file := data.get("env_file"), str) and file:
        load_env_file(path_setting(file))
    for name, field in overrides().items():
        section, _, key = field.rpartition(".")
        if not section:
            data[key] = os.environ[name]
        elif isinstance(values := data.get(section), Mapping | None):
            data[section] = {**(values or {}), key: os.environ[name]}
    if isinstance(styles := data.get("styles"), dict):
        for name, style in styles.items():
            if isinstance(style, str):
                styles[name] = {"suffix": style}
    if isinstance(data.get("backends", {}), Mapping | None):
        data["backends"] = {**BUILTIN_BACKENDS, **(data.get("backends") or {})}
    return data


def complaints(
    data: Fields,
    flag: str = "",
    thorough: bool = False,
) -> list[str]:
    """What is wrong with `config_data`.

    `thorough`: also what not every run needs, which are the naming and each backend; but no keys
    that backends other than the default one lack.
    """
    errors = []
    blocks = data["backends"]
    default = data.get("default_backend", "mock")
    owner = data.get("owner_user_id", "")
    # 1. What the schema says, and two things that it cannot say.
    try:
        from_mapping(Config, data)
    except BadConfig as problem:
        errors = str(problem).split("\n")
    if isinstance(blocks, Mapping) and isinstance(default, str) and default not in blocks:
        errors.append(f'default_backend: "{default}" is unknown, {nearest(default, blocks)}')
    if owner and not is_uuid(str(owner)):
        errors.append(f'owner_user_id: "{owner}" is no UUID: yours stands in auth.users')
    # 2. Each begins with the variable or the file that it comes from.
    path = config_path(flag)
    origins = {field: name for name, field in overrides().items()}
    errors = [f"{origins.get(line.split(':')[0], path)}: {line}" for line in errors]
    if not thorough:
        return errors
    # 3. What fails by itself where it is used, and would hold up those who do not use it.
    output = data.get("output")
    try:
        if isinstance(output, Mapping) and isinstance(output.get("naming"), str):
            check_template(output["naming"])
        if not errors:
            check_worker(from_mapping(Config, data).worker)
    except BadConfig as problem:
        errors.append(str(problem))
    if isinstance(blocks, Mapping):
        for name, block in blocks.items():
            if not isinstance(block, Mapping | None):
                continue
            try:
                open_backend(name, blocks)
            except BadConfig as problem:
                if name == default or not isinstance(problem, KeyMissing):
                    errors.append(str(problem))
    return errors


def overrides() -> dict[str, str]:
    """The environment variables that override the file, and the field of each."""
    fields = {
        "IMAGEN_BACKEND": "default_backend",
        "IMAGEN_OUTPUT_DIR": "output.directory",
        "IMAGEN_PREVIEW": "output.preview",
        "IMAGEN_CLOUD_SYNC": "output.cloud_sync",
        "IMAGEN_OWNER_USER_ID": "owner_user_id",
    }
    return {name: field for name, field in fields.items() if os.environ.get(name)}


def check_template(template: str) -> None:
    """BadConfig where `template` cannot name a file inside its folder."""
    # {ext} is known too late for a folder.
    field = r"\{(date|time|slug|seed|backend|ext(?=[^/]*$))\}"
    parts = re.sub(field, "x", template).split("/")
    if any(
        re.fullmatch(r"(?s)\.{0,2}|\.imagen-.*|.*[{}\0\ud800-\udc7f].*", part) for part in parts
    ):
        raise BadConfig(
            f"output.naming: {template!r} does not name a file inside the folder; known are "
            "{date} {time} {slug} {seed} {backend}, and {ext} behind the last slash"
        )


HERE = os.path.dirname(os.path.abspath(__file__))


def program() -> str:
    """How a shell starts this copy, whatever its name is."""
    import shlex

    return shlex.join((sys.executable or "python3", os.path.abspath(__file__)))


def package_hint(name: str) -> str:
    """What to run where a package is missing: for this very Python."""
    return f"{sys.executable or 'python3'} -m pip install {name}; or {program()} setup"


def read_yaml(path: str) -> JsonObject:
    """The mapping in a YAML file; BadConfig with file, line and column where it is none."""
    try:
        import yaml
    except ImportError:
        raise BadConfig(f"{path}: reading it needs pyyaml", package_hint("pyyaml")) from None
    try:
        with open(path, "rb") as file:
            raw = file.read(CONFIG_BYTES + 1)
        if len(raw) > CONFIG_BYTES:
            raise BadConfig(f"{path}: more than {CONFIG_BYTES >> 20} MB, so hardly a config")
        data = strict_loader(yaml)(raw).get_single_data()
        if expanded_size(data, {}) > CONFIG_VALUES:
            raise BadConfig(f"{path}: its aliases stand for more than {CONFIG_VALUES:,} values")
    except BadConfig:
        raise
    except OSError as problem:
        raise BadConfig(f"{path}: {problem.strerror}") from None
    # A date in February 30, 5,000 digits: what yaml cannot build is no YAMLError.
    except Exception as problem:
        place = getattr(problem, "position", 0)
        if mark := getattr(problem, "problem_mark", None):
            place = mark.index
        before = raw.decode("utf-8", "replace")[:place].split("\n")
        reason = getattr(problem, "problem", "") or getattr(problem, "reason", "")
        raise BadConfig(
            f"{path}, line {len(before)}, column {len(before[-1]) + 1}: {reason or repr(problem)}"
        ) from None
    if not isinstance(data, dict | None):
        raise BadConfig(
            f"{path}: a mapping was expected", "imagen config init writes one to start from"
        )
    return data or {}


def strict_loader(yaml: Any) -> Any:
    """PyYAML's safe loader, to which a key that stands twice, or is no text, is a mistake."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]  # yaml is imported late
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = set()
            for key_node, _ in node.value:
                key = key_node.value
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                reason = ""
                if key_node.tag != "tag:yaml.org,2002:str":
                    reason = f"{key} is no text as a name: put it in quotes"
                elif key in keys:
                    reason = f"{key} stands here twice"
                if reason:
                    raise yaml.constructor.ConstructorError(None, None, reason, key_node.start_mark)
                keys.add(key)
            return super().construct_mapping(node, deep)

    return Strict


def expanded_size(value: Any, known: dict[int, int]) -> int:
    """How many values there are once every alias stands for what it names."""
    if id(value) not in known:
        known[id(value)] = CONFIG_VALUES + 1  # of a circle
        items: Iterable[Any] = ()
        if isinstance(value, dict):
            items = value.values()
        elif isinstance(value, list):
            items = value
        known[id(value)] = 1 + sum(expanded_size(item, known) for item in items)
    return known[id(value)]


def load_env_file(path: str) -> None:
    """KEY=VALUE lines become environment variables where none is set.

    BadConfig where anybody but the owner may read the file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise BadConfig(f"env_file {path}: others can read it; chmod 600 {path}")
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        message = f"env_file {path}: {getattr(problem, 'strerror', problem)}"
        raise BadConfig(message, f"touch {path}; chmod 600 {path}") from None
    # As a shell reads them: a comment may stand behind a value, and quotes keep a # in it.
    value = r"""(?:"([^"]*)"|'([^']*)'|((?:[^\s#]|(?<!\s)#|[ \t](?!\s*#|\s*$))*))"""
    form = rf"\s*(?:(?:export\s+)?([A-Za-z_]\w*)\s*=\s*{value}\s*)?(?:#.*)?"
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(form, line, re.ASCII)
        if not match:
            raise BadConfig(f"env_file {path}, line {number}: not KEY=VALUE")
        name, *values = match.groups("")
        if name:
            os.environ.setdefault(name, "".join(values))


# === Styles: named ways to dress a prompt ===

STYLES: Mapping[str, Style] = {
    "photo": Style(
        "natural light photograph, 35mm lens, shallow depth of field",
        "illustration, cartoon, 3d render",
    ),
    "blog-header": Style(
        suffix="wide editorial header image, one clear subject, generous empty space, "
        "soft light, calm palette",
        negative="text, letters, watermark, clutter",
        width=1536,
        height=1024,
    ),
    "cinematic": Style(
        "cinematic film still, anamorphic framing, dramatic rim light, grain", "flat light, text"
    ),
    "illustration": Style(
        "editorial illustration, confident shapes, limited palette, paper texture", "photograph"
    ),
    "watercolor": Style(
        "loose watercolor on cold-pressed paper, wet edges, visible pigment", "photograph"
    ),
    "ink": Style(
        "black ink drawing, varied brush line, hatching, white paper", "color, photograph, gradient"
    ),
    "pixel-art": Style(
        "pixel art, 16-bit palette, crisp square pixels, no anti-aliasing",
        "blur, photograph, smooth",
    ),
    "isometric": Style(
        "isometric view, small diorama, clean geometry, soft shadows", "perspective, clutter"
    ),
    "line-art": Style(
        "clean vector line art, even thin lines, no fill, white background", "shading, color, photo"
    ),
    "3d-render": Style(
        "3d render, soft studio light, matte materials, gentle global illumination", "flat, sketch"
    ),
    "icon": Style(
        suffix="app icon, one centered symbol, bold simple shape, flat color",
        negative="text, photograph",
        width=1024,
        height=1024,
    ),
    "poster": Style(
        suffix="screen-printed poster, strong composition, three spot colors",
        negative="photograph, clutter",
        width=1024,
        height=1536,
    ),
}


def apply_style(request: Request, own: Mapping[str, Style] = EMPTY) -> Request:
    """`request` with its style worked in once.

    That is prompt, negative prompt and, where the request has none, the size. `own` are the
    config's styles, which win.

    >>> apply_style(Request("a fox", style="ink")).prompt
    'a fox, black ink drawing, varied brush line, hatching, white paper'
    """
    if not request.style:
        return request
    styles = {**STYLES, **own}
    if request.style not in styles:
        raise BadRequest(f'style "{request.style}" is unknown: {nearest(request.style, styles)}')
    style = styles[request.style]
    if not request.width and not request.aspect:
        request = request._replace(width=style.width, height=style.height)
    return request._replace(
        prompt=_extended(request.prompt, style.suffix),
        negative_prompt=_extended(request.negative_prompt, style.negative),
    )


def _extended(text: str, addition: str) -> str:
    # What ends so already was dressed before: by a job's first attempt, or in a sidecar.
    if not addition or re.search(rf"(^|\W){re.escape(addition)}$", text):
        return text
    text = text.rstrip(" ,")
    if not text:
        return addition
    return f"{text}, {addition}"


# === HTTP: the only way out, and what may be sent twice ===
#
# A paid POST is repeated only where the remote cannot have accepted it:
#
#   what happened                                     charged  repeated
#   not connected (refused, no route, TLS, backlog)   no       a few times, then Unreachable
#   429; 503 with Retry-After or a word of overload   no       until the deadline, then Busy
#   any other 4xx but 408 and 409                     no       never; raised as what it is
#   anything else after the first byte                unknown  never; raised as Unknown

CONNECT_TIMEOUT = 10.0  # seconds until TCP and TLS stand
JSON_LIMIT = 64 << 20  # bytes of an ordinary response
IMAGE_LIMIT = 384 << 20  # bytes of an image, maybe in base64
ERROR_LIMIT = 64 << 10  # bytes read of a response that is an error
REDIRECTS = 5  # that a GET follows
TRIES = 3  # of what may be repeated, while nothing depends on it
PATIENCE = 60.0  # seconds of trouble that a GET bears once a remote job of ours exists
LOGIN_PAGE = re.compile(r"log.?in|sign.?in|auth|sso|access", re.IGNORECASE)
LOGIN_CURE = "what a login in front of it wants goes into headers_env or basic_auth_env"
OVERLOADED = re.compile(r"overload|capacity|too many|rate.?limit", re.IGNORECASE)


class HttpResponse(NamedTuple):
    """What a server answered. A redirect is a response too."""

    status: int
    headers: Any  # email.message.Message: get() knows no case
    body: bytes | bytearray

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    def mapping(self) -> JsonObject:
        """The body as a JSON object; Failed where it is none."""
        document = self.json()
        if not isinstance(document, dict):
            raise Failed(
                f"the server answered {self.status} with {self.excerpt()}, "
                "which is not the JSON it should be"
            )
        return document

    def excerpt(self) -> str:
        """The body as one short line for a person."""
        return excerpt(self.body)


class TransportError(Exception):
    """No response, or not all of it; `sent` says whether a byte of the request had left."""

    def __init__(self, reason: BaseException | str, sent: bool) -> None:
        # urllib wraps the real error.
        cause = getattr(reason, "reason", reason)
        text = getattr(cause, "strerror", None) or str(cause)
        super().__init__(text or type(cause).__name__)
        self.sent = sent


def explain_status(response: HttpResponse, detail: str = "") -> ImagenError:
    """The error that an HTTP status means by itself; adapters look into the body first."""
    status = response.status
    message = f"{status}: {detail or response.excerpt()}"
    if status == 404:
        return BadConfig(message, "check base_url and model")
    if status in (401, 403):
        return BadConfig(message, f"check the key and what it may do; {LOGIN_CURE}")
    if status == 402:
        return Quota(message)
    if 300 <= status < 400:
        place = str(response.headers.get("Location"))
        cure = "put that into base_url"
        if LOGIN_PAGE.search(place):
            cure = f"the server wants a login; {LOGIN_CURE}"
        return BadConfig(f"{status}: redirects to {place}", cure)
    if not not_accepted(response):
        return Failed(message)
    if status in (429, 503):
        return Busy(message, after=retry_after(response))
    return BadRequest(message)


def not_accepted(response: HttpResponse) -> bool:
    """Whether this response proves that a paid POST was turned away."""
    if response.status == 503:
        return bool(response.headers.get("Retry-After") or OVERLOADED.search(response.excerpt()))
    return 400 <= response.status < 500 and response.status not in (408, 409)


def retry_after(response: HttpResponse) -> float:
    """Seconds that the remote asks us to wait.

    From retry-after-ms, Retry-After (seconds or a date), or `~30s` in its body.
    """
    for name, unit in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        with suppress(ValueError):
            return max(0.0, float(response.headers.get(name, "")) * unit)
    if date := response.headers.get("Retry-After"):
        return max(0.0, epoch(date) - time.time())
    form = rb'(?:~|"retry(?:_after|Delay)": *"?)(\d+(?:\.\d+)?) ?[s",}\n]'
    match = re.search(form, response.body[:2000])
    if not match:
        return 0.0
    return float(match[1])


def epoch(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time or an HTTP date; 0 where it is neither."""
    from datetime import datetime
    from email.utils import parsedate_to_datetime

    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(TypeError, ValueError, OverflowError):
            return parse(text).timestamp()
    return 0.0


class Multipart:
    """The body of a form with files (RFC 7578), streamed from them; each time the same bytes."""

    def __init__(self, fields: Fields, files: Sequence[tuple[str, Input]]) -> None:
        self._parts = (*fields.items(), *files)
        self._boundary = new_uuid()
        # What announces it.
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={self._boundary}",
            "Content-Length": str(sum(map(len, self))),
        }

    def __iter__(self) -> Iterator[bytes]:
        for name, value in self._parts:
            head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"'
            if isinstance(value, Input):
                kind = value.mime_type
                head += f'; filename="{value.sha256[:16]}.{kind[6:]}"\r\nContent-Type: {kind}'
                yield f"{head}\r\n\r\n".encode()
                with open(value.path, "rb") as file:
                    while block := file.read(1 << 16):
                        yield block
            else:
                text = value if isinstance(value, str) else to_json(value)
                yield f"{head}\r\n\r\n{text}".encode()
            yield b"\r\n"
        yield f"--{self._boundary}--\r\n".encode()


def data_uri(image: Input) -> str:
    """An input as text for a JSON body."""
    with open(image.path, "rb") as file:
        encoded = base64_of(file.read())
    return f"data:{image.mime_type};base64,{encoded}"


class Http:
    """One remote as one adapter sees it: base URL, keys, how its errors read, the deadline.

    Every method raises what `explain` makes of an error response, Unreachable where there
    was none, and whatever `ctx.check()` raises. `keys` are headers that go to the base URL's
    own origin and nowhere else.
    """

    def __init__(
        self,
        ctx: Context,
        base: str,
        keys: Strings = EMPTY,
        explain: Callable[[HttpResponse], ImagenError] = explain_status,
        read_timeout: float = 60.0,
        ca_file: str = "",
    ) -> None:
        self.ctx = ctx
        self.tls = tls_context(ca_file)
        self.base = base.rstrip("/")
        self._keys = keys
        self._explain = explain
        self.read_timeout = read_timeout

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error means; a body too odd for the adapter leaves the status to speak."""
        try:
            return self._explain(response)
        except (AttributeError, KeyError, TypeError, ValueError):
            return explain_status(response)

    def get(self, path: str) -> HttpResponse:
        """The response to a GET, repeated after 429, 5xx and broken connections.

        Redirects are followed.
        """
        return self._repeated(lambda: self._followed(path))

    def get_json(self, path: str) -> JsonObject:
        """The JSON object that a GET answers; Failed where it is none, BadConfig for a page."""
        response = self.get(path)
        if response.excerpt() == HTML_PAGE:
            message = f"{self.base} answers with a page, as servers do that want a login"
            raise BadConfig(message, LOGIN_CURE)
        return response.mapping()

    def download(self, url: str) -> BinaryIO:
        """The image at `url` (absolute, or below the base) in a ctx.spool(), at its start."""
        spool: BinaryIO

        def attempt() -> HttpResponse:
            nonlocal spool
            spool = self.ctx.spool()
            response = self._followed(url, spool)
            sniffed = sniff(spool)
            # Where no length was announced, only the image's own end tells.
            if sniffed and not sniffed.complete:
                raise TransportError("the image breaks off", sent=True)
            return response

        self._repeated(attempt)
        spool.seek(0)
        return spool

    def post(self, path: str, body: Fields) -> HttpResponse:
        """The 2xx response to a free POST.

        Unknown where it was lost, for the adapter to look if the POST arrived.
        """
        data = json.dumps(body).encode()
        return self._repeated(lambda: self._exchange(self.base + path, data), post=True)

    def upload(self, path: str, form: Multipart) -> HttpResponse:
        """The 2xx response to a form with files that may be sent twice without harm."""
        return self._repeated(lambda: self._exchange(self.base + path, form))

    def send(self, method: str, path: str, data: BinaryIO | Fields, **headers: str) -> HttpResponse:
        """The 2xx response to a request that may be made twice without harm.

        `data` is a file, which is streamed and its size announced, or a mapping, sent as JSON.
        """
        if isinstance(data, Mapping):
            data = io.BytesIO(to_jsonb(data).encode())
        dashed = {name.replace("_", "-"): value for name, value in headers.items()}
        dashed["Content-Length"] = str(data.seek(0, os.SEEK_END))

        def attempt() -> HttpResponse:
            data.seek(0)
            return self._exchange(self.base + path, data, method=method, headers=dashed)

        return self._repeated(attempt)

    def pay(
        self,
        path: str,
        body: Fields,
        files: Sequence[tuple[str, Input]] = (),
        on_block: Callable[[bytearray], object] = len,
    ) -> HttpResponse:
        """The 2xx response to a POST that costs money: JSON, or a form where there are `files`.

        Sent once, and again only after a response that proves `no`. `on_block` gets what has come
        of its body, each time there is more.
        """
        data: bytes | Multipart = json.dumps(body).encode()
        if files:
            data = Multipart(body, files)
        fields = body.get("input", body)
        named = ("prompt", "seed")
        self.ctx.identity = {name: fields[name] for name in named if name in fields}

        def attempt() -> HttpResponse:
            response = self._exchange(self.base + path, data, paid=True, on_block=on_block)
            if not_accepted(response):
                self.ctx.settle(self.explain(response).charged)
            return response

        return self._repeated(attempt, post=True)

    def _repeated(self, attempt: Callable[[], HttpResponse], post: bool = False) -> HttpResponse:
        """The first 2xx response of `attempt`, called as often as the table above allows."""
        tries = 0
        began = time.monotonic()
        while True:
            tries += 1
            # 1. One attempt. What is not a 2xx becomes the error to be raised in the end.
            try:
                response = attempt()
                if response.status < 300:
                    return response
                error = self.explain(response)
                transient = response.status >= 500 or isinstance(error, Unreachable)
                again = transient and not post
                if post and self.ctx.charged == "unknown" and not isinstance(error, Refused):
                    raise Unknown(f"sent, and answered {error}")
            except TransportError as problem:
                if post and problem.sent:
                    raise Unknown(f"sent, but {problem}") from None
                hint = "is it running, and the address right?"
                if "CERTIFICATE" in str(problem):
                    hint = "ca_file names the authority that signed the server's certificate"
                error = Unreachable(f"{self.base}: {problem}", hint)
                again = True
            # 2. Is there another? After Busy until the deadline; after trouble a few, and a
            # GET goes on for a while once a remote job, and maybe money, depends on it.
            patient = not post and self.ctx.remote_ids and time.monotonic() - began < PATIENCE
            if not isinstance(error, Busy) and not (again and (tries < TRIES or patient)):
                raise error
            # 3. Wait, each client a little longer or shorter, or all would come back at once.
            pause = error.after or min(30.0, 0.2 * 2.0**tries)
            pause *= 1 + os.urandom(1)[0] / 1000
            if pause > self.ctx.left():
                raise error
            if pause > 2:
                self.ctx.progress(f"{error.code}, again in {pause:.0f} s")
            self.ctx.sleep(pause)

    def _followed(self, path: str, sink: BinaryIO | None = None) -> HttpResponse:
        url = path
        if "://" not in path:
            url = self.base + path
        for _ in range(REDIRECTS + 1):
            response = self._exchange(url, sink=sink)
            location = response.headers.get("Location")
            if response.status // 100 != 3 or not location:
                return response
            # http.client reads headers as Latin-1; those who send umlauts send UTF-8.
            url = joined(url, location.encode("latin-1").decode("utf-8", "replace"))
        raise Failed(f"{self.base}: more than {REDIRECTS} redirects")

    def _request(
        self,
        url: str,
        body: Any,
        method: str | None,
        headers: Strings,
    ) -> Any:
        import urllib.parse
        import urllib.request

        url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        ours = origin(url) == origin(self.base)
        usual = {"User-Agent": f"imagen/{__version__}"}
        if body is not None:
            usual.update(getattr(body, "headers", {"Content-Type": "application/json"}))
        request = urllib.request.Request(url, body, {**usual, **headers}, method=method)
        # Keys go to the base URL's own origin, and along no redirect.
        if ours:
            for name, value in self._keys.items():
                request.add_unredirected_header(name, value)
        return request

    def _exchange(
        self,
        url: str,
        body: Any = None,  # bytes, a file, or a Multipart
        sink: BinaryIO | None = None,
        paid: bool = False,
        method: str | None = None,
        headers: Strings = EMPTY,
        on_block: Callable[[bytearray], object] = len,
    ) -> HttpResponse:
        """One request, a POST if it has a body; the body of a 2xx response goes into `sink`.

        TransportError where the response is not all there.
        """
        import http.client

        # 1. The request, and how its way is watched.
        request = self._request(url, body, method, headers)
        self.ctx.check()
        sent = []

        def first_byte() -> None:
            if paid:
                self.ctx.sending()
            sent.append(True)

        def guarded(call: Callable[[], Any]) -> Any:
            try:
                return call()
            except (OSError, http.client.HTTPException, EOFError) as problem:
                # Our own shutdown of the socket looks like a server that hung up.
                if sent or self.ctx.why not in ("", "deadline"):
                    self.ctx.check()
                if self.ctx.why:
                    raise TransportError("no connection in time", False) from None
                raise TransportError(problem, bool(sent)) from None

        with ExitStack() as stack:
            # 2. Its exchange for a status and headers.
            stack.enter_context(_Deadlines.enforced(self.ctx))
            opener = _opener(self.ctx, stack, first_byte, self.tls)
            response = guarded(lambda: opener.open(request, timeout=self.read_timeout))
            stack.callback(response.close)
            # 3. The body, no more of it than its kind may have.
            fine = response.status < 300
            received = bytearray()
            keep: Callable[[bytes], Any] = received.extend
            limit = ERROR_LIMIT
            length = None  # not announced
            if fine:
                length = response.length
                limit = JSON_LIMIT
                if sink or paid:
                    limit = IMAGE_LIMIT
                if sink:
                    keep = sink.write
            size = 0
            try:
                while max(size, length or 0) <= limit and (
                    block := guarded(lambda: response.read1(1 << 16))
                ):
                    keep(block)
                    size += len(block)
                    if fine:
                        on_block(received)
            except TransportError:
                # Of an error, what has come will do.
                if fine:
                    raise
            finally:
                # On disk before anybody judges it, also where it breaks off.
                if paid and fine and received:
                    self.ctx.keep_answer(received)
            self.ctx.check()
            if fine and max(size, length or 0) > limit:
                raise Failed(f"the answer is larger than {limit >> 20} MB")
            if length not in (None, size):
                raise TransportError(f"the answer breaks off after {size} of {length} bytes", True)
            return HttpResponse(response.status, response.headers, received)


class _Deadlines:
    """Stops contexts at their deadline.

    A server that gives a byte now and then keeps a reader from the clock. One thread looks
    for all requests; a timer for each would cost more than the request.
    """

    _contexts: ClassVar[list[Context]] = []
    _changed = threading.Condition()
    _until = 0.0  # when the thread looks next; 0.0: there is none yet

    @classmethod
    @contextmanager
    def enforced(cls, ctx: Context) -> Iterator[None]:
        """While inside, `ctx` is stopped at its deadline."""
        with cls._changed:
            cls._contexts.append(ctx)
            if not cls._until:
                cls._until = time.monotonic()
                in_thread(cls._watch)
            elif ctx.deadline < cls._until:
                cls._changed.notify()
        try:
            yield
        finally:
            with cls._changed:
                cls._contexts.remove(ctx)

    @classmethod
    def _watch(cls) -> None:
        with cls._changed:
            while True:
                for ctx in cls._contexts:
                    if ctx.left() <= 0:
                        ctx.stop("deadline")
                ahead = [ctx.deadline for ctx in cls._contexts if not ctx.why]
                cls._until = min([time.monotonic() + 3600.0, *ahead])
                cls._changed.wait(max(0.01, cls._until - time.monotonic()))


def tls_context(ca_file: str) -> Any:
    """What checks a server's certificate: the usual authorities (None), or the one in a file."""
    if not ca_file:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=full_path(ca_file))
    except OSError as problem:
        raise BadConfig(f"ca_file: {ca_file}: {problem}") from None


def _opener(
    ctx: Context,
    stack: ExitStack,
    first_byte: Callable[[], None],
    tls: Any,
) -> Any:
    """urllib's opener, but a stop can shut its sockets.

    `first_byte` is called before one leaves. Without urllib's error and redirect processors
    every status comes back as a response, for us to decide.
    """
    import http.client
    import urllib.request

    class Final(http.client.HTTPResponse):
        # http.client itself passes over 100 alone.
        def _read_status(self) -> Any:
            while 101 < (line := super()._read_status())[1] < 200:  # type: ignore[misc]
                http.client.parse_headers(self.fp)
            return line

    class Watched(http.client.HTTPConnection):
        response_class = Final

        def connect(self) -> None:
            self._create_connection = connected
            # A tunnel through a proxy and TLS stand when this returns: nothing of ours has left.
            super().connect()
            self.sock.settimeout(self.timeout)
            first_byte()

        def request(self, *args: Any, **options: Any) -> None:
            try:
                super().request(*args, **options)
            except (BrokenPipeError, ConnectionResetError):
                # Who refuses a large body says why before hanging up: the response may be here.
                if not self.sock:
                    raise

    class WatchedTLS(Watched, http.client.HTTPSConnection):
        pass

    class Handler(urllib.request.HTTPSHandler):
        http_request = urllib.request.HTTPSHandler.https_request

        def http_open(self, request: Any) -> Any:
            return self.do_open(Watched, request, blocksize=1 << 17)

        def https_open(self, request: Any) -> Any:
            return self.do_open(WatchedTLS, request, blocksize=1 << 17, context=tls)

    def connected(address: tuple[str, int], *_: Any) -> socket.socket:
        problem = OSError()
        candidates = socket.getaddrinfo(*address, 0, socket.SOCK_STREAM)
        for family, kind, protocol, _name, place in candidates:
            sock = socket.socket(family, kind, protocol)
            # TLS takes the socket apart while it shakes hands; its twin can be shut all the while.
            twin = stack.enter_context(sock.dup())
            stack.enter_context(ctx.watching(twin))
            sock.settimeout(max(0.01, min(CONNECT_TIMEOUT, ctx.left())))
            try:
                sock.connect(place)
                return sock
            except OSError as failure:
                sock.close()
                problem = failure
                if ctx.why:
                    break
        raise problem

    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(Handler())
    return opener


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; Failed where `url` is no http address.

    A comparison of prefixes would take api.example.com.evil.net for api.example.com.
    """
    from urllib.parse import urlsplit

    with suppress(ValueError):
        parts = urlsplit(url)
        port = {"http": 80, "https": 443}.get(parts.scheme)
        if port and parts.hostname and parts.port != 0:
            return parts.scheme, parts.hostname, parts.port or port
    raise Failed(f"{url.split(':')[0][:20]}:… is no http address")


def joined(base: str, link: str) -> str:
    """The address that `link` means on a page at `base`."""
    from urllib.parse import urljoin

    try:
        return urljoin(base, link)
    except ValueError:
        raise Failed("a link that is no http address") from None


def checked_url(base: str, path: str = "", name: str = "base_url") -> str:
    """`base` without its last slash; `path` is added to a bare host.

    BadConfig where it is no http address.
    """
    with suppress(Failed):
        origin(base)
        if base.isprintable() and not re.search(r"[ @?#]", base):
            base = base.rstrip("/")
            if "/" not in base.partition("://")[2]:
                base += path
            return base
    # A key may stand in what was pasted here, so it is not quoted.
    raise BadConfig(
        f"{name}: not an address such as https://host/path", "keys stand in environment variables"
    )


class HttpBackend(Backend):
    """An adapter whose options have the `base_url` of an HTTP server, and a `timeout`."""

    VERSION: ClassVar[str] = ""  # where the address may end, and does where it has no path

    def __init__(self, name: str, options: Any) -> None:
        super().__init__(name, options)
        self.base = checked_url(options.base_url, path=self.VERSION)

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error of this server means."""
        return explain_status(response)

    def http(self, ctx: Context) -> Http:
        """The way to its server."""
        timeout = self.options.timeout
        return Http(ctx, self.base, self.headers, self.explain, timeout, self.ca_file)


# === Mock: pictures out of thin air, free and without a network ===

# Options that several kinds of backend have, and that a request may set.
Text = Annotated[str, REQUEST]
Extra = Annotated[Fields, REQUEST]
Pixels = Annotated[int, REQUEST, Between(16, 8192)]
Steps = Annotated[int, REQUEST, Between(0, 500)]
Strength = Annotated[float, REQUEST, Between(0, 100)]


@register("mock")
class Mock(Backend):
    """A placeholder drawn here: the same prompt, seed and size give the same bytes."""

    paid = False

    class Options(NamedTuple):
        """`delay_s` and `fail` (a code of section Errors) are for trying out one's scripts."""

        delay_s: Annotated[float, REQUEST, Between(0, 3600)] = 0.0
        # mypy wants the codes spelled out.
        fail: Annotated[Literal[(*ERRORS, "")], REQUEST] = ""  # type: ignore[valid-type]
        width: Pixels = 1024
        height: Pixels = 1024
        parallel: Parallel = 4

    @classmethod
    def plan(cls, options: Options, request: Request) -> Fields:
        """The size that will be drawn: the one named, else that of the first image."""
        width = options.width
        height = options.height
        for image in request.images[:1]:
            width = min(max(16, image.width), 8192)
            height = min(max(16, image.height), 8192)
        size = request.pixels(round((width * height) ** 0.5), 1)
        return {"width": size[0] or width, "height": size[1] or height, "seed": request.seed}

    @classmethod
    def takes(cls, options: Options) -> Takes:
        """Everything, to be tried out."""
        return Takes(16, mask=True, strength=True, formats=tuple(MIME_TYPES))

    def generate(self, ctx: Context, request: Request) -> Result:
        """A landscape with the prompt written below it."""
        options = self.options
        began = time.monotonic()
        while (gone := time.monotonic() - began) < options.delay_s:
            ctx.progress("drawing", gone, options.delay_s)
            ctx.sleep(min(0.1, options.delay_s - gone))
        if options.fail:
            raise ERRORS[options.fail](f"failing with `{options.fail}`, as its options ask")
        size = self.plan(options, request)
        image, masked = mock_picture(request, size["width"], size["height"])
        metadata: JsonObject = {}
        if request.images:
            metadata["inputs"] = [image.sha256 for image in request.images]
            metadata["kept_by_the_mask"] = masked
        return Result(
            image=io.BytesIO(image),
            mime_type="image/png",
            model="mock",
            seed=request.seed,
            cost_usd=0.0,
            ignored=tuple(name for name in ("negative_prompt", "steps") if getattr(request, name)),
            metadata=metadata,
        )


def mock_picture(request: Request, width: int, height: int) -> tuple[bytes, bool]:
    """A PNG: a sun over hills, placed by a hash of prompt and seed; the prompt below.

    The hash of each image of the request flies as a small flag at the top. And whether the mask
    kept anything: what it covers stays as it is in the first image, where that is a picture of ours
    and of this size.
    """
    import hashlib

    prompt = request.prompt
    # A row is painted as a few runs of one palette index, so a megapixel takes some
    # thousand steps, not a million. Indices 0 … 253 go from light to dark (sun, sky, then
    # three layers of hills); 254 is paper, 255 ink.
    seed = request.seed or 0
    dice = hashlib.sha512(f"{prompt}\0{seed}".encode("utf-8", "replace")).digest()
    ramp = bytes(100 - i * 72 // (width + height) for i in range(width + height))
    rows = [bytearray(ramp[y : y + width]) for y in range(height)]
    # The first disc is the sun, the others are three hills a layer.
    for disc in range(10):
        layer = (disc + 2) // 3
        across, down, wide = dice[disc * 3 : disc * 3 + 3]
        shade = 0
        size = 10
        if layer:
            shade = 52 + 52 * layer
            size = 60
        x = width * across // 255
        top = height * (10 + 13 * layer + down % 18) // 100
        radius = height * (size + wide % size) // 100
        for y in range(top, min(height, top + 2 * radius)):
            half = int((radius**2 - (top + radius - y) ** 2) ** 0.5)
            left = max(0, x - half)
            right = min(width, x + half)
            index = shade + 45 * (y - top) // height
            rows[y][left:right] = bytes((index,)) * (right - left)
    for number, image in enumerate(request.images):
        left = 2 + 14 * number
        colors = bytes.fromhex(image.sha256)[:3]
        flag = bytes(byte % 254 for byte in colors for _ in range(4))
        for row in rows[2:8]:
            row[left : left + 12] = flag
            del row[width:]
    mock_write(rows, prompt)
    tint = [110 + dice[60 + channel] % 130 for channel in range(3)]
    palette = bytes(255 - i * part // 254 for i in range(254) for part in tint)
    palette += b"\xff\xff\xff\0\0\0"
    kept_palette = mock_keep(rows, request)
    text = {"Title": prompt, "Comment": f"seed {seed}"}
    picture = png_encode(width, height, kept_palette or palette, b"".join(rows), text)
    return picture, bool(kept_palette)


def mock_keep(rows: list[bytearray], request: Request) -> bytes:
    """Put back what the mask covers; the palette that this needs, b"" where it cannot be done."""
    if not request.mask:
        return b""
    image = request.images[0]
    with open(image.path, "rb") as file:
        chunks = dict(png_chunks(file.read()))
    width = len(rows[0])
    if (width, len(rows)) != (image.width, image.height) or b"PLTE" not in chunks:
        return b""
    lines = zlib.decompress(chunks[b"IDAT"])
    with open(request.mask.path, "rb") as file:
        for number, alpha in enumerate(png_plane(file)):
            start = 1 + number * (width + 1)
            pairs = zip(rows[number], lines[start : start + width], strict=True)
            pixels = zip(alpha, pairs, strict=True)
            rows[number][:] = bytes(pair[opaque > 0] for opaque, pair in pixels)
    return chunks[b"PLTE"]


def mock_write(rows: list[bytearray], prompt: str) -> None:
    """Write the prompt on a strip of paper at the picture's foot, as large as fits."""
    import textwrap
    import unicodedata

    width = len(rows[0])
    height = len(rows)
    scale = max(1, width // 256)
    columns = (width // scale - 4) // 6
    most = min(4, (height // 2 // scale - 4) // 11)
    if columns < 5 or most < 1:
        return
    text = printable(unicodedata.normalize("NFC", prompt))
    strip = [b"", b""]
    for line in textwrap.wrap(text, columns, max_lines=most, placeholder="…"):
        strip += glyph_rows(line)
    strip += [b"", b""]
    for place, row in enumerate(rows[height - len(strip) * scale :]):
        pixels = bytes(index for index in strip[place // scale] for _ in range(scale))
        row[:] = pixels.ljust(width, b"\xfe")


# Five columns a glyph, its top in bit 0.
GLYPHS = zlib.decompress(
    binascii.a2b_base64(
        "eNodUU1PwzAMdUpgrsRhjB6KVI0wKhg7TRyqIk1tAtm0IA5MKhyQ+OYHjAuaUDfvwA/ZYT9zB5w9"
        "y1Zix+85CcAWr+wNtojY0h71WqeH+PWRuUd17ysASccAmE4CvYSSHmKBCMspAHrA2xuAaqIMiokb"
        "FnBNGj4mzo06xrksjlrUPB8Oh1eDW+f64jvc3ckcF/acu2hDljH98oepItaIPFgowkBMwr3CPD+0"
        "69ZBqybfURhjOsSh8FtDYRiKgjV+iacgMGRAaVMK8lykGRTsB0QSm1Rs27iDSScnLxQeXYzOmOVS"
        "CBKi5LPlsdLquNS5Lj8jjD4bOMXGO9/oBlgTAmZRYAyBDEQglx7AC1BVVc1obG2eW2sVhzHlnItx"
        "EYogXq/XNaGUM7BzDXr5Nwdqdi0/Jz9TLWM5q33V9+abNE3jmH3jczhmFiVLq9VAa1UnPF8y0H09"
        "sF1mSFarVW2/qjsLmPH3ALGbDAF5UlwI96RYD/Q/DBpfkA=="
    )
)
GLYPH_ORDER = "".join(map(chr, range(32, 127))) + "ß…"


def glyph_rows(line: str) -> Iterator[bytes]:
    """The eleven rows of a line of text, top first, in paper and ink.

    A mark over a letter is two dots or one.
    """
    import unicodedata

    columns = [0, 0]
    for char in line:
        base, *marks = [*unicodedata.normalize("NFD", char)]
        # Capitals fill their cell, so the mark stands above it.
        dot = 2
        if base.islower():
            dot = 8
        if base not in GLYPH_ORDER:
            base = "?"
        start = 5 * GLYPH_ORDER.index(base)
        glyph = [bits << 3 for bits in GLYPHS[start : start + 5]]
        if "\u0308" in marks:
            glyph[1] |= dot
            glyph[3] |= dot
        elif marks:
            glyph[2] |= dot
        columns += [*glyph, 0]
    return (bytes(0xFE | bits >> y & 1 for bits in columns) for y in range(11))


# === ComfyUI: the GPU box at home ===


class Lora(NamedTuple):
    """A LoRA to be loaded on top of the model, by its name on the server."""

    name: str
    strength: Annotated[float, Between(-10, 10)] = 1.0


@register("comfyui")
class ComfyUI(HttpBackend):
    """Post a graph, poll /history, fetch /view. Servers from 0.3.64 to 0.33.0.

    https://docs.comfy.org/development/comfyui-server/comms_routes
    """

    paid = False

    class Options(NamedTuple):
        """`model` is a checkpoint or a diffusion model, as the server lists it.

        `workflow` (a file in API format) replaces it.
        """

        base_url: str = "http://127.0.0.1:8188"
        model: str = ""
        default_steps: Steps = 0
        workflow: str = ""
        # Where values go in the workflow: {prompt: "6.text", seed: ["31.seed", "40.seed"]};
        # output: the id of the node whose image is meant.
        nodes: Fields = EMPTY
        all_images: bool = False  # of one run; otherwise the last alone
        # Names, or how they begin; empty: what the kind of model wants.
        clip: tuple[str, ...] = ()
        vae: str = ""
        loras: Annotated[tuple[Lora, ...], REQUEST] = ()
        sampler: Text = ""
        scheduler: Text = ""
        cfg: Strength = 0.0  # 0: what the kind of model wants
        guidance: Strength = 0.0
        weight_dtype: str = "default"
        filename_prefix: str = "ImaGen"
        free_after: bool = False  # the GPU's memory, once nothing waits there any more
        timeout: Seconds = 30.0  # seconds of silence in one response
        parallel: Annotated[int, Between(1, 16)] = 1

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        if not options.model and not options.workflow:
            raise BadConfig("model: missing (or name a workflow file)")
        self.workflow: ComfyWorkflow | None = None
        self.has_jobs = True  # whether the server knows /api/jobs, until it says that it does not
        if options.workflow:
            self.workflow = comfy_workflow(options.workflow, options.nodes)

    @classmethod
    def takes(cls, options: Options) -> Takes:
        """What the family of `model` does; of a workflow, what it has marks for."""
        if options.workflow:
            text = json.dumps(comfy_workflow(options.workflow, options.nodes).graph)
            return Takes(len(set(re.findall(r"{image\d*}", text))), "{mask}" in text)
        family = COMFY_SDXL
        with suppress(BadConfig):
            family = comfy_family(options.model, split=True)
        if family.references:
            return Takes(family.references)
        return Takes(1, mask=True, strength=True)

    @classmethod
    def plan(cls, options: Options, request: Request) -> Fields:
        """What is known before the server has been asked what `model` is."""
        steps = request.steps or options.default_steps
        fields = {**super().plan(options, request), "steps": steps}
        if not options.workflow:
            return {"model": options.model, **fields}
        workflow = comfy_workflow(options.workflow, options.nodes)
        if not workflow.takes("seed"):
            fields["seed"] = None
        return {"workflow": options.workflow, "nodes": workflow.chosen(), **fields}

    def generate(self, ctx: Context, request: Request) -> Result:
        """Submit under an id of our own, watch, fetch."""
        http = self.http(ctx)
        graph, model, steps, ignored = self._graph(http, request)
        prompt_id = new_uuid()
        comfy_upload(http, graph, request)
        # It also keeps servers 0.18 to 0.27 from answering a cached run without outputs.
        client_id = new_uuid()
        # A file prefix of its own keeps a cached run from naming an older run's file.
        prefix = f"{self.options.filename_prefix}/{prompt_id}".lstrip("/")
        for spec in graph.values():
            inputs = spec["inputs"]
            if "filename_prefix" in inputs:
                inputs["filename_prefix"] = prefix
                # Who takes a folder apart takes no slash here.
                if re.search("path|folder|dir", " ".join(inputs)):
                    inputs["filename_prefix"] = prefix.replace("/", "-")
        ctx.remote(prompt_id=prompt_id, model=model, steps=steps, ignored=ignored)
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id}
        with comfy_watching(self, ctx, body):
            try:
                self._submit(http, body)
            except BadConfig:
                # The server names what it misses, but not always what it has instead.
                faults: list[str] = []
                with suppress(ImagenError):
                    faults = comfy_faults(graph, http.get_json("/object_info"))
                if not faults:
                    raise
                raise BadConfig("; ".join(faults)) from None
            except (Unreachable, Busy):
                # It never arrived, so nothing is there to be fetched.
                ctx.remote_ids.clear()
                raise
            return self.resume(ctx, ctx.remote_ids, request)

    def resume(self, ctx: Context, remote: Fields, request: Request) -> Result:
        """Wait for a prompt that was posted, and fetch its result.

        That works as long as the server has its history.
        """
        from urllib.parse import urlencode

        http = self.http(ctx)
        prompt_id = remote["prompt_id"]
        while True:
            place, entry = self._state(http, prompt_id)
            if place not in ("pending", "running"):
                break
            if place == "pending":
                ctx.progress("queued")
            ctx.sleep(0.25)
        output = self.workflow.output if self.workflow else ""
        file, *others = comfy_outcome(entry, output)
        further: list[Fields] = []
        if "file" in remote:
            file = remote["file"]
        elif self.options.all_images:
            further = [{**remote, "file": other} for other in others]
        elif others:
            names = ", ".join(str(other["filename"]) for other in others)
            made = f"the workflow made {len(others) + 1} images"
            ctx.warn(f"{made}; on the server stay {names}"[:300])
        query = {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        try:
            image = http.download(f"/view?{urlencode(query)}")
        except (BadConfig, BadRequest) as problem:
            raise Ended(
                f"the result {file['filename']} is gone from the server's folder ({problem})",
                "ask again, with another seed",
            ) from None
        if self.options.free_after:
            with suppress(ImagenError):  # the image is here
                if not any(http.get_json("/queue").values()):
                    http.post("/free", {"unload_models": True, "free_memory": True})
        ignored = tuple(remote.get("ignored") or ())
        return Result(
            image=image,
            mime_type="image/png",
            model=remote.get("model"),
            seed=None if "seed" in ignored else request.seed,
            steps=remote.get("steps") or None,
            cost_usd=0.0,
            ignored=ignored,
            metadata={"prompt_id": prompt_id, "file": file, "others": others},
            others=further,
        )

    def cancel(self, ctx: Context, remote: Fields) -> None:
        """Take our prompt, and no other, out of the queue or off the GPU.

        Returns once it is gone from both.
        """
        http = self.http(ctx)
        prompt_id = remote["prompt_id"]
        # Servers before 0.3.56 interrupt whatever runs, so nothing is interrupted unless
        # ours is what runs.
        ways = {
            "running": ("/interrupt", {"prompt_id": prompt_id}),
            "pending": ("/queue", {"delete": [prompt_id]}),
        }
        while (place := self._state(http, prompt_id)[0]) in ways:
            if self.has_jobs:
                with suppress(BadConfig, BadRequest, Failed):  # older ones cannot do it this way
                    http.post(f"/api/jobs/{prompt_id}/cancel", {})
            http.post(*ways[place])
            ctx.sleep(0.1)

    def check(self, ctx: Context) -> str:
        """The server's version, and that it has the model."""
        http = self.http(ctx)
        system = http.get_json("/system_stats")["system"]
        version = system.get("comfyui_version", "of unknown version")
        graph = self._graph(http, Request("a fox", seed=0)).graph
        if faults := comfy_faults(graph, http.get_json("/object_info")):
            raise BadConfig("; ".join(faults), "install what is missing, or change the workflow")
        if self.workflow:
            model = f"{self.options.workflow} with {self.workflow.chosen()}"
        else:
            model = " in ".join(comfy_find(http, self.options.model, *COMFY_MODELS))
        return f"ComfyUI {version}, {model}"

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error of ComfyUI's means."""
        return comfy_error(response)

    def _graph(self, http: Http, request: Request) -> ComfyGraph:
        options = self.options
        request = request._replace(steps=request.steps or options.default_steps)
        if self.workflow:
            width, height = request.pixels(1024)
            return self.workflow.filled(request._replace(width=width, height=height))
        model, folder = comfy_find(http, options.model, *COMFY_MODELS)
        split = folder != "checkpoints"
        family = comfy_family(model, split)
        clip: Sequence[str] = ()
        vae = ""
        if split:
            clip = [
                comfy_find(http, name, "text_encoders")[0] for name in options.clip or family.clip
            ]
            vae = comfy_find(http, options.vae or family.vae, "vae")[0]
            if len(clip) != len(family.clip):
                cure = f"clip: [{', '.join(family.clip)}]"
                raise BadConfig(f"clip: {model} has {len(family.clip)} text encoders", cure)
        loras = [
            lora._replace(name=comfy_find(http, lora.name, "loras")[0]) for lora in options.loras
        ]
        options = options._replace(model=model, clip=clip, vae=vae, loras=loras)
        return comfy_graph(family, options, request)

    def _state(self, http: Http, prompt_id: str) -> tuple[str, Fields]:
        """Where our prompt is: pending, running, done, or "" where nobody knows of it.

        With its history entry, once it is done.
        """
        # 1. One job by its id, without everybody else's queue, where the server can tell it.
        if self.has_jobs:
            try:
                status = str(http.get_json(f"/api/jobs/{prompt_id}").get("status"))
                if status in ("pending", "in_progress"):
                    return status.replace("in_progress", "running"), {}
            except BadConfig as problem:
                self.has_jobs = "not found" in str(problem)
        # 2. Two looks: between them it may move from the queue into history.
        for _ in range(2):
            if entry := http.get_json(f"/history/{prompt_id}").get(prompt_id):
                return "done", entry
            if self.has_jobs:
                break
            for key, jobs in http.get_json("/queue").items():
                if any(job[1] == prompt_id for job in jobs):
                    return key.removeprefix("queue_"), {}
        return "", {}

    def _submit(self, http: Http, body: Fields) -> None:
        # The same id posted twice runs twice, so after a lost response the server is asked
        # before posting again.
        for _ in range(TRIES):
            with suppress(Unknown):
                response = http.post("/prompt", body)
                document = response.json()
                if not isinstance(document, dict):
                    raise Failed("/prompt answered something that is no JSON: is that a ComfyUI?")
                if document.get("node_errors"):
                    # What is left of the graph would run.
                    self.cancel(http.ctx, body)
                    raise comfy_error(response)
                return
            try:
                if self._state(http, body["prompt_id"])[0]:
                    return
            except (Unreachable, Busy) as problem:
                raise Failed(f"sent, and then {problem}") from None
        raise Unreachable(
            f"{self.base}: takes the prompt and breaks off, {TRIES} times",
            "look at the server's log",
        )


# What a model is (in one file, or without its other parts, or one of these) → the
# node that knows all of them, and the option that names another.
COMFY_LOADERS = {
    "checkpoints": ("CheckpointLoaderSimple", "ckpt_name", "model"),
    "diffusion_models": ("UNETLoader", "unet_name", "model"),
    "text_encoders": ("DualCLIPLoader", "clip_name1", "clip"),
    "vae": ("VAELoader", "vae_name", "vae"),
    "loras": ("LoraLoader", "lora_name", "loras"),
}
COMFY_MODELS = ("checkpoints", "diffusion_models")
COMFY_FILE_BYTES = 64 << 20  # of a workflow file, which may be an image


def comfy_find(http: Http, model: str, *folders: str) -> tuple[str, str]:
    """The name of a model on the server, and which of `folders` has it.

    BadConfig, with near names, where none has.
    """
    installed = []
    for folder in folders:
        node, field, option = COMFY_LOADERS[folder]
        known = http.get_json(f"/object_info/{node}").get(node) or {"input": {"required": {}}}
        names = comfy_choices(known["input"]["required"].get(field))
        if name := comfy_match(model, names, begins=folder not in COMFY_MODELS):
            return name, folder
        installed += names
    cure = nearest(model, installed).replace("known: ", "installed: ", 1)
    raise BadConfig(f'{option} "{model}" is not on {http.base}: {cure}', f"name it with {option}:")


def comfy_match(model: str, installed: Sequence[str], begins: bool = False) -> str:
    """The installed name that `model` means, or "".

    Itself, or the only file called so, or, if `begins`, the first that begins so.
    """
    if model in installed:
        return model
    pattern = r"(.*[\\/])?" + re.escape(model)
    if begins:
        pattern += r"[^\\/]*"
    alike = [name for name in installed if re.fullmatch(pattern, name, re.IGNORECASE)]
    if len(alike) == 1 or (alike and begins):
        return alike[0]
    return ""


Graph = dict[str, Any]  # node id → {"class_type", "inputs"}


class ComfyGraph(NamedTuple):
    """A graph to be posted, and what its Result will say."""

    graph: Graph
    model: str | None
    steps: int
    ignored: list[str]


class ComfyFamily(NamedTuple):
    """What models of one kind want where neither request nor options say."""

    name: str  # how their files are called, a pattern
    clip: tuple[str, ...] = ()  # how their text encoders begin
    clip_type: str = ""
    vae: str = ""
    steps: int = 20
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    latent: str = "EmptySD3LatentImage"
    edge: int = 1024
    shift: float = 0.0
    guidance: float = 0.0
    guided: bool = False  # sampled by a guider of its own
    encoder: str = "CLIPTextEncode"
    references: int = 0  # images that it takes beside the text; else one to start from


COMFY_FLUX = ComfyFamily("flux", ("t5xxl", "clip_l"), "flux", "ae", guidance=3.5, guided=True)
COMFY_FLUX2 = ComfyFamily(
    "flux[-_.]?2",
    ("mistral_3_small_flux2",),
    "flux2",
    "flux2",
    scheduler="Flux2Scheduler",
    latent="EmptyFlux2LatentImage",
    guidance=4.0,
    guided=True,
    references=8,
)
COMFY_KLEIN = COMFY_FLUX2._replace(
    name="flux[-_.]?2[-_.]klein", clip=("qwen_3_4b",), steps=4, guidance=0.0
)
COMFY_KLEIN_9B = COMFY_KLEIN._replace(name=f"{COMFY_KLEIN.name}.*9b", clip=("qwen_3_8b",))
COMFY_QWEN = ComfyFamily(
    "qwen[-_]image",
    ("qwen_2.5_vl_7b",),
    "qwen_image",
    "qwen_image_vae",
    steps=50,
    cfg=4.0,
    edge=1328,
    shift=3.1,
)
COMFY_SDXL = ComfyFamily(
    "xl", steps=25, cfg=7.0, sampler="dpmpp_2m", scheduler="karras", latent="EmptyLatentImage"
)
# The first whose name fits; https://docs.comfy.org/tutorials has a page of each.
COMFY_FAMILIES = (
    COMFY_KLEIN_9B._replace(name=f"{COMFY_KLEIN.name}.*base.*9b", steps=20, cfg=5.0),
    COMFY_KLEIN_9B,
    COMFY_KLEIN._replace(name=f"{COMFY_KLEIN.name}.*base", steps=20, cfg=5.0),
    COMFY_KLEIN,
    COMFY_FLUX2,
    COMFY_FLUX._replace(name="schnell", steps=4),
    COMFY_FLUX,
    COMFY_QWEN._replace(
        name="qwen[-_]image[-_]edit",
        steps=20,
        edge=1024,
        shift=3.0,
        encoder="TextEncodeQwenImageEditPlus",
        references=3,
    ),
    COMFY_QWEN,
    ComfyFamily(
        "z[-_]image",
        ("qwen_3_4b",),
        "lumina2",
        "ae",
        steps=8,
        sampler="res_multistep",
        shift=3.0,
    ),
)
# An unknown name in one file is most often a kin of SD or SDXL, but these are none.
COMFY_STRANGERS = "sd3|cascade|hunyuan|aura|pixart|ltx|svd|wan2|lumina|hidream|chroma|kolors"
COMFY_CHECKPOINTS = (
    COMFY_SDXL,
    COMFY_SDXL._replace(name=r"v1[-_.]|sd[-_]?1|1[._]5", edge=512),
    COMFY_SDXL._replace(name=""),
)


def comfy_family(model: str, split: bool) -> ComfyFamily:
    """The family of a model, told by its name; BadConfig where it has none."""
    families = [*COMFY_FAMILIES]
    if not split and not re.search(COMFY_STRANGERS, model, re.IGNORECASE):
        families += COMFY_CHECKPOINTS
    for family in families:
        if re.search(family.name, model, re.IGNORECASE):
            if split:
                return family
            # In one file: no encoders to be found, and an ordinary sampler.
            return family._replace(clip=(), guided=False)
    raise BadConfig(
        f'model "{model}": no graph for this kind of model',
        "export yours from ComfyUI, and name it as workflow:",
    )


def comfy_parts(
    node: Callable[..., Any],
    family: ComfyFamily,
    options: Any,
) -> tuple[Any, ...]:
    """The links to model, text encoder and VAE; without `options.clip` they come in one file."""
    if not options.clip:
        model = node("CheckpointLoaderSimple", ckpt_name=options.model)
        clip = [model[0], 1]
        vae = [model[0], 2]
    else:
        model = node("UNETLoader", unet_name=options.model, weight_dtype=options.weight_dtype)
        if len(options.clip) == 1:
            clip = node("CLIPLoader", clip_name=options.clip[0], type=family.clip_type)
        else:
            first, second = options.clip
            clip = node(
                "DualCLIPLoader", clip_name1=first, clip_name2=second, type=family.clip_type
            )
        vae = node("VAELoader", vae_name=options.vae)
    for name, strength in options.loras:
        model = node(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=name,
            strength_model=strength,
            strength_clip=strength,
        )
        clip = [model[0], 1]
    if family.shift:
        model = node("ModelSamplingAuraFlow", model=model, shift=family.shift)
    if "Edit" in family.encoder:
        model = node("CFGNorm", model=model, strength=1.0)
    return model, clip, vae


def comfy_size(family: ComfyFamily, request: Request) -> tuple[int, int]:
    """The request's size, or else the first image's shape at the family's number of pixels."""
    if request.width or request.aspect:
        return request.pixels(family.edge)
    if not request.images:
        return family.edge, family.edge
    first = request.images[0]
    scale = min(1.0, family.edge / (first.width * first.height) ** 0.5) / 16
    width = max(4, round(first.width * scale)) * 16
    return width, max(4, round(first.height * scale)) * 16


def comfy_graph(family: ComfyFamily, options: Any, request: Request) -> ComfyGraph:
    """Our graph for a model in one file, or, with `options.clip`, in its parts."""
    split = bool(options.clip)
    graph = Graph()

    def node(kind: str, **inputs: Any) -> list[Any]:
        graph[str(len(graph) + 1)] = {"class_type": kind, "inputs": inputs}
        # The link to its first output.
        return [str(len(graph)), 0]

    # 1. What neither request nor options say.
    cfg = options.cfg or family.cfg
    steps = request.steps or family.steps
    guidance = options.guidance or family.guidance
    width, height = comfy_size(family, request)
    loaded = [node("LoadImage", image=mark) for mark in request.marks()]
    # 2. The parts of the model.
    model, clip, vae = comfy_parts(node, family, options)

    # 3. What guides it, and where it starts.
    def encoded(text: str) -> list[Any]:
        if "Edit" in family.encoder:
            pictures = {f"image{number}": image for number, image in enumerate(loaded, 1)}
            return node(family.encoder, prompt=text, clip=clip, vae=vae, **pictures)
        link = node(family.encoder, text=text, clip=clip)
        if family.references:
            for image in loaded:
                scale = {"upscale_method": "area", "megapixels": 1.0, "resolution_steps": 1}
                pixels = node("ImageScaleToTotalPixels", image=image, **scale)
                reference = node("VAEEncode", pixels=pixels, vae=vae)
                link = node("ReferenceLatent", conditioning=link, latent=reference)
        return link

    guide: JsonObject = {"positive": encoded(request.prompt), "cfg": cfg}
    if cfg > 1 or not split:
        guide["negative"] = encoded(request.negative_prompt)
    elif not family.guided:
        guide["negative"] = node("ConditioningZeroOut", conditioning=guide["positive"])
    if guidance and not (split and family.name == "schnell"):
        guide["positive"] = node("FluxGuidance", guidance=guidance, conditioning=guide["positive"])
    denoise = 1.0
    if loaded and not family.references:
        # It starts from the image, and goes so far from it.
        denoise = request.strength or 0.75
        fit = {
            "image": loaded[0],
            "upscale_method": "lanczos",
            "width": width,
            "height": height,
            "crop": "center",
        }
        latent = node("VAEEncode", pixels=node("ImageScale", **fit), vae=vae)
        if request.mask:
            # LoadImage's second output is what is transparent.
            latent = node("SetLatentNoiseMask", samples=latent, mask=[loaded[1][0], 1])
    else:
        latent = node(family.latent, width=width, height=height, batch_size=1)
    # 4. The sampling, and the image.
    schedule = {
        "model": model,
        "scheduler": options.scheduler or family.scheduler,
        "steps": steps,
        "denoise": denoise,
    }
    sampler: JsonObject = {"sampler_name": options.sampler or family.sampler}
    if not family.guided:
        sampler["seed"] = request.seed
        samples = node("KSampler", latent_image=latent, **guide, **schedule, **sampler)
    else:
        if cfg > 1:
            guider = node("CFGGuider", model=model, **guide)
        else:
            guider = node("BasicGuider", model=model, conditioning=guide["positive"])
        if schedule["scheduler"] == "Flux2Scheduler":
            sigmas = node("Flux2Scheduler", steps=steps, width=width, height=height)
        else:
            sigmas = node("BasicScheduler", **schedule)
        samples = node(
            "SamplerCustomAdvanced",
            noise=node("RandomNoise", noise_seed=request.seed),
            guider=guider,
            latent_image=latent,
            sampler=node("KSamplerSelect", **sampler),
            sigmas=sigmas,
        )
    node("SaveImage", images=node("VAEDecode", samples=samples, vae=vae), filename_prefix="")
    ignored = []
    # At cfg 1 a negative prompt has no effect at all.
    if request.negative_prompt and cfg <= 1:
        ignored.append("negative_prompt")
    return ComfyGraph(graph=graph, model=options.model, steps=steps, ignored=ignored)


def comfy_upload(http: Http, graph: Graph, request: Request) -> None:
    """Give the server the request's images, and put their names where their marks stand."""
    names = {}
    for mark, image in request.marks().items():
        form = Multipart({"type": "input", "overwrite": "true"}, [("image", image)])
        answer = http.upload("/upload/image", form).mapping()
        names[mark] = f"{answer.get('subfolder') or ''}/{answer['name']}".lstrip("/")
    graph.update(replaced(graph, names))
    if left := re.search(f'"({COMFY_MARK})"', json.dumps(graph)):
        raise BadRequest(
            f"the workflow has a place for {left[1]}, and the request none",
            "give it by --image or --mask",
        )


COMFY_MARK = r"{image\d*}|{mask}"  # the place of an image in a workflow
# Placeholder in a workflow, or key of `nodes` → field of the request.
COMFY_FIELDS = {
    "prompt": "prompt",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "steps": "steps",
    "negative": "negative_prompt",
}
# How an input is called that takes a field, or leads to it, and the type of its value.
COMFY_INPUTS = {
    "prompt": (r"(\w+_)?(text|prompt|string)(_\w+)?|clip_[lg]|t5xxl|llama", str),
    "seed": (r"(noise_)?seed|noise", int),
    "steps": (r"steps|sigmas", int),
    "width": (r"(\w+_)?width", int),
    "height": (r"(\w+_)?height", int),
}
# What a value comes through, whatever it is.
COMFY_THROUGH = "value|default|int|number|source|replace|on_true|on_false"
COMFY_GUIDES = {"positive", "guider", "conditioning"}  # a sampler has one of them
COMFY_SEEDS = {"seed", "noise_seed", "noise"}  # and one of these
COMFY_PIXELS = r"(\w+_)?(latents?|image|samples|pixels)(_\w+)?"  # what a sampler starts from

Place = tuple[str, str]  # node id, input


class ComfyWorkflow(NamedTuple):
    """A graph from a file, and where a request's values go in it."""

    graph: Graph
    places: dict[str, list[Place]]  # by the names of COMFY_FIELDS; besides, {name} is replaced
    output: str  # the node whose image is meant; "": the last

    def takes(self, name: str) -> bool:
        """Whether a value called so has a place."""
        return bool(self.places.get(name)) or f"{{{name}}}" in json.dumps(self.graph)

    def chosen(self) -> dict[str, list[str]]:
        """The places, as `nodes` in the config would name them."""
        chosen = {}
        for name, places in self.places.items():
            chosen[name] = [f"{node}.{key}" for node, key in places]
        return chosen

    def filled(self, request: Request) -> ComfyGraph:
        """The graph with the request's values; what it leaves open stays as it is in the file."""
        graph: Graph = json.loads(json.dumps(self.graph))
        marks: JsonObject = {"{negative}": "", "{width}": 1024, "{height}": 1024, "{steps}": 20}
        ignored = []
        for name, field in COMFY_FIELDS.items():
            value = getattr(request, field)
            if not value and name != "seed":
                continue
            marks[f"{{{name}}}"] = value
            if not self.takes(name):
                ignored.append(field)

        def value_of(match: re.Match[str]) -> str:
            return str(marks.get(match[0], match[0]))

        for spec in graph.values():
            for key, old in spec["inputs"].items():
                if isinstance(old, str):
                    filled = re.sub(r"\{\w+\}", value_of, old)
                    # A number alone in its field stays a number.
                    spec["inputs"][key] = marks.get(old, filled)
        steps = 0
        for name, places in self.places.items():
            for node, key in places:
                inputs = graph[node]["inputs"]
                if getattr(request, COMFY_FIELDS[name]) or name == "seed":
                    inputs[key] = marks[f"{{{name}}}"]
                if name == "steps" and isinstance(inputs[key], int):
                    steps = steps or inputs[key]
        if not steps and self.takes("steps"):
            steps = marks["{steps}"]
        return ComfyGraph(graph=graph, model=None, steps=steps, ignored=ignored)


def comfy_workflow(path: str, nodes: Fields) -> ComfyWorkflow:
    """The graph in a file, with its placeholders, or else the places that its samplers lead to.

    `nodes` wins. BadConfig where it is no such graph, or has no place for the prompt.
    """
    graph = comfy_read(path)
    known = {f"{node}.{key}" for node, spec in graph.items() for key in spec["inputs"]}
    # 1. What the config says.
    places: dict[str, list[Place]] = {}
    output = str(nodes.get("output") or "")
    names = (*COMFY_FIELDS, "image", "mask", "output")
    for name, named in nodes.items():
        if name not in names:
            raise BadConfig(f"nodes.{name}: unknown, {nearest(name, names)}")
        if name == "output":
            continue
        if isinstance(named, str):
            named = [named]
        row = []
        for number, place in enumerate(map(str, named or ()), 1):
            if place not in known:
                raise comfy_misplaced(path, graph, f'nodes.{name}: it has no "{place}"')
            node, _, key = place.rpartition(".")
            row.append((node, key))
            if name == "image":
                graph[node]["inputs"][key] = image_mark(number)
            elif name == "mask":
                graph[node]["inputs"][key] = "{mask}"
        if name in COMFY_FIELDS:
            places[name] = row
    if output and output not in graph:
        raise BadConfig(f'workflow {path}: nodes.output: it has no node "{output}"')
    # 2. What the graph itself says.
    text = json.dumps(graph)
    if not any(f"{{{name}}}" in text for name in COMFY_FIELDS):
        own_places, prompts = comfy_places(graph)
        if len(prompts) > 1 and "prompt" not in places:
            raise comfy_misplaced(path, graph, "which of its texts is the prompt?")
        places = {**own_places, **places}
    # 3. Without a place for the prompt every image would be the same.
    places = {name: row for name, row in places.items() if row}
    workflow = ComfyWorkflow(graph, places, output)
    if not workflow.takes("prompt"):
        raise comfy_misplaced(
            path, graph, "no place for the prompt: put {prompt} there, or name one"
        )
    return workflow


def comfy_read(path: str) -> Graph:
    """The graph in a file: bare, wrapped as services take it, or in a PNG that ComfyUI made."""
    try:
        with open(path_setting(path), "rb") as file:
            raw = file.read(COMFY_FILE_BYTES)
        text = png_text(raw, "prompt") or raw.decode("utf-8-sig")
        # What it finds and replaces by itself is no placeholder of ours.
        for mark in re.findall(r'"find": *"({\w+})"', text):
            text = text.replace(mark, f"<{mark[1:-1]}>")
        document = json.loads(text)
    except (OSError, ValueError, RecursionError) as problem:
        raise BadConfig(f"workflow {path}: {getattr(problem, 'strerror', problem)}") from None
    graph: Graph = {}
    if isinstance(document, dict):
        for wrapper in ("input", "workflow", "prompt"):
            if isinstance(inner := document.get(wrapper), dict):
                document = inner
        for node, spec in document.items():
            with suppress(AttributeError, KeyError, TypeError):
                if spec["class_type"] and isinstance(spec["inputs"], dict):
                    graph[node] = spec
    if not graph:
        raise BadConfig(
            f"workflow {path}: not in API format", 'in ComfyUI use "Export (API)", not "Save"'
        )
    return graph


def comfy_misplaced(path: str, graph: Graph, problem: str) -> BadConfig:
    """The error of a workflow in which a value has no place, with a block that names one."""
    lines = []
    pattern = f"{COMFY_INPUTS['prompt'][0]}|{COMFY_THROUGH}|positive"
    for node, spec in graph.items():
        title = (spec.get("_meta") or {}).get("title") or spec["class_type"]
        for key, value in spec["inputs"].items():
            if isinstance(value, str) and re.fullmatch(pattern, key, re.IGNORECASE):
                lines.append(f'prompt: "{node}.{key}"  # {title}: {excerpt(value.encode(), 50)}')
    hint = "nodes:\n  " + "\n  # or ".join(lines)
    if not lines:
        hint = "it has no input for a text"
    return BadConfig(f"workflow {path}: {problem}", hint)


# A walk through a graph, from its samplers up. Each function looks at every node once.


def comfy_links(graph: Graph, node: str) -> dict[str, str]:
    """The inputs of a node that are linked to other nodes, and to which."""
    links = {}
    for key, value in graph[node]["inputs"].items():
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph:
            links[key] = str(value[0])
    return links


def comfy_upstream(graph: Graph, node: str, inputs: str) -> list[str]:
    """The nodes behind these inputs (a pattern) of a node, the nearest first."""
    links = comfy_links(graph, node)
    nodes = [links[key] for key in links if re.fullmatch(inputs, key)]
    for source in nodes:
        further = comfy_links(graph, source).values()
        nodes += [link for link in further if link not in nodes]
    return [*dict.fromkeys(nodes)]


def comfy_switched(graph: Graph) -> Graph:
    """The graph without the inputs that its switches turn off."""
    live: Graph = json.loads(json.dumps(graph))
    for node, spec in live.items():
        inputs = spec["inputs"]
        switch = inputs.get("switch")
        if source := comfy_links(graph, node).get("switch"):
            switch = graph[source]["inputs"].get("value")
        if isinstance(switch, bool):
            inputs.pop("on_false" if switch else "on_true", None)
    return live


def comfy_values(
    graph: Graph,
    node: str,
    field: str,
    role: str = "",
) -> list[Place]:
    """The places of a field's values in a node, or in those that its inputs are linked to."""
    name, kind = COMFY_INPUTS[field]
    behind = rf".*({name}).*|{COMFY_THROUGH}|{role}"
    other = "positive" if role == "negative" else "negative"
    places: list[Place] = []
    waiting = [node]
    for source in waiting:
        links = comfy_links(graph, source)
        pattern = name if source == node else behind
        inputs = [
            key
            for key in graph[source]["inputs"]
            if re.fullmatch(rf"(?!.*({other}|system))({pattern})", key, re.IGNORECASE)
        ]
        linked = [links[key] for key in inputs if key in links]
        waiting += [link for link in linked if link not in waiting]
        # What a node only shows of what comes through it is no source.
        if source != node and linked:
            continue
        for key in inputs:
            value = graph[source]["inputs"][key]
            if isinstance(value, kind) and not isinstance(value, bool):
                places.append((source, key))
    return places


def comfy_encoders(graph: Graph, node: str, role: str) -> list[list[Place]]:
    """The places of each text encoder behind the `role` (positive, negative) of a node."""
    encoders: list[list[Place]] = []
    waiting = [node]
    for source in waiting:
        links = comfy_links(graph, source)
        inputs = graph[source]["inputs"]
        if "ZeroOut" in str(graph[source]["class_type"]):
            continue
        onward: list[str] = []
        if isinstance(inputs.get(role), str):
            encoders.append([(source, role)])
        elif role in links:
            onward = [links[role]]
        else:
            if places := comfy_values(graph, source, "prompt", role):
                encoders.append(places)
            # A guider without a negative has none; behind it, whatever is joined counts.
            if source != node or role == "positive":
                onward = [links[key] for key in links if key.startswith(("cond", "on_"))]
        waiting += [link for link in onward if link not in waiting]
    return encoders


def comfy_places(graph: Graph) -> tuple[dict[str, list[Place]], list[str]]:
    """Where a graph has each of COMFY_FIELDS, and the different texts that its samplers get."""
    graph = comfy_switched(graph)
    places: dict[str, list[Place]] = {name: [] for name in COMFY_FIELDS}
    texts: list[str] = []

    def value(place: Place) -> Any:
        return graph[place[0]]["inputs"][place[1]]

    # 1. The samplers, those first that go on with no other's work.
    passes = []
    for node, spec in graph.items():
        if spec["inputs"].keys() & COMFY_SEEDS and comfy_links(graph, node).keys() & COMFY_GUIDES:
            passes.append(node)
    # Who has no noise of its own (a map of depths, the end of a split run) is not first either.
    seeded = [node for node in passes if comfy_values(graph, node, "seed")] or passes
    behind = {node: comfy_upstream(graph, node, "(?!model).*") for node in seeded}
    later = {*passes}.difference(seeded)
    later |= {node for node in seeded if not behind.keys().isdisjoint(behind[node])}
    for node in sorted(passes, key=later.__contains__):
        # 2. Their texts. All inputs of one encoder get the prompt, but not all that is joined.
        guider = comfy_links(graph, node).get("guider", node)
        negatives = comfy_encoders(graph, guider, "negative")
        positives = comfy_encoders(graph, guider, "positive")
        # Of two conditions that one guider weighs, the second may hold the negative.
        for encoder in [row for row in positives if row not in negatives] or positives:
            filled = [place for place in encoder if value(place).strip()] or encoder
            places["prompt"] += filled
            longest: dict[Any, str] = {}
            for place in filled:
                source, key = place
                # What a node joins, it calls a and b, or 1 and 2.
                group = place if re.search("(_[a-f]|[1-9])$", key) else source
                longest[group] = max(longest.get(group, ""), value(place).strip(), key=len)
            texts += longest.values()
        places["negative"] += itertools.chain(*negatives)
        # 3. Seed and steps; of a later pass only where it has the same as the first.
        for name in ("seed", "steps"):
            known = [value(place) for place in places[name]]
            for place in comfy_values(graph, node, name):
                if node not in later or value(place) in known:
                    places[name].append(place)
        # 4. The size of what it starts from.
        for source in comfy_upstream(graph, node, COMFY_PIXELS):
            sides = [comfy_values(graph, source, name) for name in ("width", "height")]
            if node not in later and all(sides):
                places["width"] += sides[0]
                places["height"] += sides[1]
                break
    places["negative"] = [place for place in places["negative"] if place not in places["prompt"]]
    unique = {name: [*dict.fromkeys(row)] for name, row in places.items()}
    return unique, [*dict.fromkeys(filter(None, texts))]


def comfy_outcome(entry: Fields, output: str = "") -> list[Fields]:
    """The images of a history entry, {filename, subfolder, type}; first the one that is meant.

    `output`: the node that has to have made it; "": the last one. Ended where there is none.
    """
    if not entry:
        raise Ended(
            "the job is gone from queue and history: cancelled there, or the server restarted"
        )
    status = entry.get("status") or {}
    messages = status.get("messages") or [("", {})]
    event, details = messages[-1]
    if event == "execution_interrupted":
        raise Ended("interrupted on the server by somebody else", "ask again")
    if status.get("status_str") == "error":
        reason = excerpt(str(details.get("exception_message", "no reason given")).encode())
        hint = "the server's log has the traceback"
        if "OutOfMemory" in str(details.get("exception_type")):
            hint = "out of GPU memory: ask for a smaller size"
        raise Ended(f"{details.get('node_type', 'a node')} failed: {reason}", hint)
    images = []
    others = []
    for node, file in comfy_files(entry):
        name = str(file["filename"])
        ending = name.rpartition(".")[2].lower().replace("jpeg", "jpg")
        if ending in MIME_TYPES and output in ("", node):
            images.append((node, file))
        others.append(name)
    if not images:
        reason = "the server returned no images"
        if others:
            reason = f"the server made only {', '.join(others)}"
        raise Ended(reason, "does the workflow end in a SaveImage node?")
    # The history lists nodes in any order. Who has most behind it was executed last; the first
    # of its images is the one that the seed alone decides.
    graph = {}
    with suppress(IndexError, KeyError, TypeError):
        specs = entry["prompt"][2].items()
        graph = {node: spec for node, spec in specs if spec["inputs"]}

    def rank(pair: tuple[str, Fields]) -> tuple[bool, int]:
        node, file = pair
        depth = 0
        if node in graph:
            depth = len(comfy_upstream(graph, node, ".*"))
        return file.get("type") == "output", depth

    _, file = max(images, key=rank)
    return [file, *(other for _, other in images if other is not file)]


def comfy_files(entry: Fields) -> Iterator[tuple[str, Fields]]:
    """The files in a history entry, under whatever key its nodes have listed them."""
    for node, output in (entry.get("outputs") or {}).items():
        for items in output.values():
            if not isinstance(items, list):
                continue
            for item in items:
                if isinstance(item, dict) and item.get("filename"):
                    yield node, item


def comfy_faults(graph: Graph, info: Fields) -> list[str]:
    """What a graph names that a server with this /object_info does not have."""
    faults = []
    for node, spec in graph.items():
        known = info.get(spec["class_type"])
        if not known:
            faults.append(f"node {node}: {spec['class_type']} is not installed")
            continue
        kinds = known["input"]
        inputs = {**kinds.get("required", {}), **kinds.get("optional", {})}
        for key, value in spec["inputs"].items():
            choices = comfy_choices(inputs.get(key))
            if not isinstance(value, str) or re.fullmatch(COMFY_MARK, value):
                continue
            if choices and value not in choices:
                place = f"node {node} ({spec['class_type']}) {key}"
                faults.append(f'{place}: "{value}" is not there, {nearest(value, choices)}'[:300])
    return faults


def comfy_error(response: HttpResponse) -> ImagenError:
    """What a response complains of; AttributeError or KeyError where it has no body of ComfyUI's.

    Its node_errors, which a 200 may have too, say more than the rest.
    """
    document = response.json()
    lines = []
    kinds = set()
    for node, spec in (document.get("node_errors") or {}).items():
        for error in spec["errors"]:
            kinds.add(str(error.get("type")))
            line = f"node {node} ({spec.get('class_type')}) {comfy_node_error(error)}"
            lines.append(excerpt(line.encode()))
    if lines and kinds <= {"value_smaller_than_min", "value_bigger_than_max"}:
        return BadRequest("; ".join(lines))
    if lines:
        return BadConfig("; ".join(lines))
    error = document["error"]
    text = excerpt(f"{error.get('message', '')} {error.get('details', '')}".encode())
    hint = ""
    if "node" in text.lower():
        hint = "install the custom node, or change the workflow"
    return BadConfig(f"{response.status}: {text}", hint)


def comfy_node_error(error: Fields) -> str:
    """What one of a node's errors says, for a person: the input, and what is wrong with it."""
    kind = str(error.get("type"))
    extra = error.get("extra_info") or {}
    text = f"{error.get('message')}"
    if kind == "value_not_in_list":
        value = str(extra.get("received_value"))
        text = f'"{value}" is not installed'
        if known := comfy_choices(extra.get("input_config")):
            text += f", {nearest(value, known)}"
    # Details of an exception are a traceback with the server's paths.
    elif "exception" not in kind:
        text += f" ({error.get('details')})"
    return f"{extra.get('input_name', '')}: {text}"


def comfy_choices(spec: Any) -> list[str]:
    """The values an enum input takes, in its old or new shape; [] where there are none."""
    if not spec:
        return []
    first, *details = spec
    if isinstance(first, list):
        return first
    return list(dict(*details).get("options", ()))


@contextmanager
def comfy_watching(backend: ComfyUI, ctx: Context, body: Fields) -> Iterator[None]:
    """While inside, ctx.progress gets the sampler's steps from the server's websocket."""
    listening = Context()
    greeted = threading.Event()

    def listen() -> None:
        # Progress is a courtesy, and losing it does no harm: /history is what counts.
        with suppress(Exception):
            for text in websocket_texts(listening, backend, f"/ws?clientId={body['client_id']}"):
                greeted.set()
                event = json.loads(text)
                data = event.get("data") or {}
                ours = data.get("prompt_id") == body["prompt_id"]
                if event.get("type") == "progress" and ours:
                    ctx.progress("sampling", data.get("value"), data.get("max"))
        greeted.set()

    listener = in_thread(listen)
    # The server sends nothing of what happens before it has said hello.
    greeted.wait(2)
    try:
        yield
    finally:
        listening.stop("over")
        listener.join(0.5)


def websocket_texts(ctx: Context, backend: ComfyUI, path: str) -> Iterator[bytes]:
    """The JSON messages of a server's websocket, read only (RFC 6455).

    Until the server closes it or `ctx` is stopped.
    """
    import http.client
    from contextlib import closing

    scheme, host, port = origin(backend.base)
    connect: Any = http.client.HTTPConnection
    if scheme == "https":
        connect = functools.partial(
            http.client.HTTPSConnection, context=tls_context(backend.ca_file)
        )
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        **backend.headers,
        "Sec-WebSocket-Key": base64_of(os.urandom(16)),
    }
    with closing(connect(host, port, timeout=2)) as server:
        prefix = "/".join(["", *backend.base.split("/")[3:]])
        server.request("GET", prefix + path, headers=headers)
        with ctx.watching(server.sock), server.getresponse() as response:
            server.sock.settimeout(None)
            read = response.fp.read
            while response.status == 101 and len(head := read(2)) == 2:
                # Above 125 the size follows, in 2 bytes or in 8.
                size = head[1] & 127
                if size > 125:
                    size = int.from_bytes(read({126: 2, 127: 8}[size]))
                body = read(size)
                # Text in one frame, as all of ComfyUI's are; previews are binary.
                if head[0] == 0x81:
                    yield body


# === Replicate: predictions at api.replicate.com ===


# The input or body of a request, and the request's fields that it has no word for.
Prepared = tuple[JsonObject, tuple[str, ...]]


class ReplicateModel(NamedTuple):
    """What is known of a model's inputs.

    Others get width, height, steps and negative prompt as the request has them.
    """

    usd: float | None = None  # one image, in the table of PRICED
    steps: bool = False  # whether it takes num_inference_steps
    longest: int = 0  # pixels of an edge, from 256 on; 0: it takes an aspect ratio alone
    step: int = 1  # that an edge must be a multiple of
    image: str = ""  # the input that takes one image, or, with [], several
    mask: str = ""
    strength: str = ""


REPLICATE_KEEPS_S = 3600.0  # results and inputs; and how far a clock may have been set back
PRICED = "table of 2026-11-20"
PRICES_LAST_S = 180 * 86400.0  # until somebody should look whether they still hold
REPLICATE_MODELS = {
    "black-forest-labs/flux-schnell": ReplicateModel(0.003, steps=True),
    "black-forest-labs/flux-dev": ReplicateModel(
        0.025, steps=True, image="image", strength="prompt_strength"
    ),
    "black-forest-labs/flux-1.1-pro": ReplicateModel(0.04, longest=1440, step=32),
    "black-forest-labs/flux-pro": ReplicateModel(0.055, longest=1440, step=32),
    "black-forest-labs/flux-2-pro": ReplicateModel(longest=2048, step=16, image="input_images[]"),
    "black-forest-labs/flux-fill-pro": ReplicateModel(image="image", mask="mask"),
    "black-forest-labs/flux-kontext-dev": ReplicateModel(image="input_image"),
    "black-forest-labs/flux-kontext-pro": ReplicateModel(image="input_image"),
    "black-forest-labs/flux-kontext-max": ReplicateModel(image="input_image"),
    "google/nano-banana": ReplicateModel(image="image_input[]"),
    "openai/gpt-image-1": ReplicateModel(image="input_images[]"),
    "qwen/qwen-image-edit": ReplicateModel(image="image"),
}
REPLICATE_INLINE = 256 << 10  # bytes of an image that goes along as a data URI
# Aspect ratio → a ratio halfway to that of the pixels it comes out as, so that asking
# for either finds it.
REPLICATE_ASPECTS = {
    (1, 1): 1.0,
    (5, 4): 1.22,
    (4, 3): 1.31,
    (3, 2): 1.48,
    (16, 9): 1.76,
    (21, 9): 2.36,
}


@register("replicate")
class Replicate(HttpBackend):
    """Create without waiting, so that the id is on record at once; poll; download.

    Results are kept for an hour. https://replicate.com/docs/reference/http
    """

    VERSION = "/v1"
    OWN_FIELDS = (
        "prompt negative_prompt seed width height aspect_ratio megapixels"
        " num_inference_steps num_outputs"
    )

    class Options(NamedTuple):
        """`model` is owner/name, or owner/name:version for community models.

        `extra` are further inputs of it.
        """

        model: str
        api_token_env: KeyName = "REPLICATE_API_TOKEN"
        base_url: str = "https://api.replicate.com/v1"
        default_steps: Steps = 0
        output_format: Text = ""
        extra: Extra = EMPTY
        cost_usd: float | None = None  # of one image; None: the table's
        timeout: Seconds = 60.0  # seconds of silence in one response
        parallel: Parallel = 4

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", options.model):
            raise BadConfig(f'model: "{options.model}" is not owner/name or owner/name:version')
        self.model, _, self.version = options.model.partition(":")
        token = secret_from(options.api_token_env).reveal()
        self.headers = {"Authorization": f"Bearer {token}"}

    @classmethod
    def plan(cls, options: Options, request: Request) -> Fields:
        """The `input` of the prediction."""
        return replicate_input(options, request)[0]

    @classmethod
    def takes(cls, options: Options) -> Takes:
        """What the table knows of the model, or what `extra` has a place for."""
        known = REPLICATE_MODELS.get(options.model.partition(":")[0], ReplicateModel())
        images = len(re.findall(r"\{image\d*\}", to_json(options.extra)))
        if known.image:
            images = 14 if known.image.endswith("[]") else 1
        mask = known.mask or "{mask}" in to_json(options.extra)
        takes = Takes(images, bool(mask), bool(known.strength), ignores=LOOKS[2:])
        if known == ReplicateModel():
            return takes
        return takes._replace(aspects=ASPECTS)

    @classmethod
    def price(cls, options: Options, request: Request) -> Price:
        """The config's price, else the table's."""
        known = REPLICATE_MODELS.get(options.model.partition(":")[0])
        if options.cost_usd is None and known and known.usd:
            return Price(known.usd, PRICED)
        return super().price(options, request)

    def generate(self, ctx: Context, request: Request) -> Result:
        """Pay, poll, download."""
        http = self.http(ctx)
        path = f"/models/{self.model}/predictions"
        inputs = self._with_images(http, self.plan(self.options, request), request)
        body: JsonObject = {"input": inputs}
        if self.version:
            path = "/predictions"
            body["version"] = self.version
        response = http.pay(path, body)
        prediction = response.json()
        if not isinstance(prediction, dict) or not prediction.get("id"):
            raise Unknown(f"sent, and answered {response.status} with {response.excerpt()}")
        ctx.remote(id=prediction["id"])
        return self._result(http, prediction, request)

    def resume(self, ctx: Context, remote: Fields, request: Request) -> Result:
        """The result of an earlier attempt, by its id.

        Where the response to the create was lost, the id is looked for in the list.
        """
        http = self.http(ctx)
        age = time.time() - epoch(str(remote.get("since")))
        prediction_id = remote.get("id") or self._listed(http, request, remote)
        # Its POST may still have been on its way.
        if not prediction_id and age < 30:
            ctx.sleep(2)
            prediction_id = self._listed(http, request, remote)
        if not prediction_id:
            message = "nothing like it is among the predictions there"
            # That proves nothing, but of what is older Replicate keeps nothing either.
            kind = Ended if age > REPLICATE_KEEPS_S else Unknown
            raise kind(message, "look at https://replicate.com/predictions")
        ctx.remote(id=prediction_id)
        try:
            prediction = http.get_json(f"/predictions/{prediction_id}")
        except BadConfig as problem:
            if str(problem).startswith("404"):
                raise Ended(f"prediction {prediction_id} is not known there any more") from None
            raise
        return self._result(http, prediction, request)

    def cancel(self, ctx: Context, remote: Fields) -> None:
        """Cancel the prediction and see it end.

        Unknown where there is no id yet, or it had succeeded before.
        """
        if "id" not in remote:
            raise Unknown("the prediction has no id yet")
        http = self.http(ctx)
        prediction = http.post(f"/predictions/{remote['id']}/cancel", {}).json() or {}
        if self._ended(http, prediction).get("status") == "succeeded":
            raise Unknown("the prediction had succeeded before")

    def check(self, ctx: Context) -> str:
        """The model's page."""
        page = self.http(ctx).get_json(f"/models/{self.model}")
        return f"{self.model}, {page.get('visibility', 'found')}"

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error of Replicate means (application/problem+json)."""
        problem = response.json()
        detail = str(problem.get("detail") or problem.get("title") or "")
        error = explain_status(response, detail.replace("\n", "; ").strip("; "))
        if response.status == 404 or (response.status == 422 and "version" in detail):
            return BadConfig(
                str(error), "check the model; community models need owner/name:version"
            )
        return error

    def _with_images(self, http: Http, inputs: Fields, request: Request) -> Any:
        """The inputs with links to the request's images where their marks stand."""
        links = {}
        for mark, image in request.marks().items():
            if os.path.getsize(image.path) <= REPLICATE_INLINE:
                links[mark] = data_uri(image)
            else:  # free, and may be sent twice; it expires there by itself
                answer = http.upload("/files", Multipart(EMPTY, [("content", image)])).mapping()
                links[mark] = str(answer["urls"]["get"])
        return replaced(inputs, links)

    def _ended(self, http: Http, prediction: Any) -> Any:
        """The prediction as it is once it runs no more."""
        pause = 0.5
        while prediction.get("status") in ("starting", "processing"):
            steps = replicate_progress(prediction.get("logs") or "")
            http.ctx.progress(prediction["status"], *steps)
            http.ctx.sleep(pause)
            pause = min(2.0, pause * 1.1)
            prediction = http.get_json(f"/predictions/{prediction['id']}")
        http.ctx.settle(replicate_charged(prediction))
        return prediction

    def _result(self, http: Http, prediction: Any, request: Request) -> Result:
        prediction = self._ended(http, prediction)
        url = replicate_image(prediction)
        http.ctx.progress("downloading")
        if url.startswith("data:"):
            _, _, text = url.partition(",")
            image = decode_base64(text.encode(), http.ctx.spool())
        else:
            image = http.download(url)
        seed = request.seed
        if match := re.search(r"Using seed: (\d+)", prediction.get("logs") or ""):
            seed = int(match[1])
        inputs, ignored = replicate_input(self.options, request)
        details = ("id", "version", "metrics", "created_at", "completed_at")
        return Result(
            image=image,
            mime_type="",
            model=self.options.model,
            seed=seed,
            steps=inputs.get("num_inference_steps"),
            ignored=ignored,
            metadata={key: prediction.get(key) for key in details},
        )

    def _listed(self, http: Http, request: Request, remote: Fields) -> str:
        """The id of the prediction that a lost create made, or "".

        Same model, prompt and seed; of several the one nearest to when it was sent.
        """

        def drawn(inputs: Any) -> Any:
            return [(inputs or {}).get(key) for key in ("prompt", "seed")]

        # Release 0.1.0 did not note what it sent.
        requested = drawn(remote.get("body") or self.plan(self.options, request))
        sent_at = epoch(str(remote.get("since")))
        matches = []
        removed = False
        for item, ahead in replicate_list(http, sent_at - REPLICATE_KEEPS_S):
            is_taken = item["id"] in remote.get("taken", ())
            if is_taken or item.get("model") != self.model:
                continue
            if self.version not in ("", item.get("version")):
                continue
            removed |= bool(item.get("data_removed"))
            if drawn(item.get("input")) == requested:
                distance = abs(epoch(item.get("created_at") or "") - ahead - sent_at)
                matches.append((distance, str(item["id"])))
        if matches:
            return min(matches)[1]
        if removed:
            raise Ended(
                "it may be one of those there whose inputs are gone: "
                "Replicate keeps them for one hour"
            )
        return ""


def replicate_list(http: Http, since: float) -> Iterator[tuple[Fields, float]]:
    """The predictions there are, newest first, back to a time by our clock.

    Each with the seconds that their clock is ahead of ours.
    """
    url = "/predictions"
    while url:
        response = http.get(url)
        date = epoch(response.headers.get("Date", "")) or time.time()
        ahead = date - time.time()
        page = response.mapping()
        if not isinstance(page.get("results"), list):
            raise Failed(f"the list of predictions cannot be read: {response.excerpt()}")
        for prediction in page["results"]:
            if epoch(prediction.get("created_at") or "") < since + ahead:
                return
            yield prediction, ahead
        url = page.get("next") or ""


def replicate_input(options: Any, request: Request) -> Prepared:
    """The request as the model's inputs, and the fields that it has no input for."""
    known = REPLICATE_MODELS.get(options.model.partition(":")[0])
    steps = request.steps or options.default_steps
    negative = request.negative_prompt
    ending = (request.format or options.output_format).replace("jpeg", "jpg")
    size = {}
    if request.aspect:
        size["aspect_ratio"] = request.aspect
    if known:
        negative = ""
        ending = ending or "png"
        if not known.steps:
            steps = 0
    if request.width:
        size = replicate_size(known, request.width, request.height)
    optional = {"num_inference_steps": steps, "negative_prompt": negative, "output_format": ending}
    inputs = {
        "prompt": request.prompt,
        "seed": request.seed,
        **{name: value for name, value in optional.items() if value},
        **size,
        **options.extra,
    }
    if known:
        marks = [mark for mark in request.marks() if mark != "{mask}"]
        if marks and known.image.endswith("[]"):
            inputs[known.image[:-2]] = marks
        elif marks and known.image:
            inputs[known.image] = marks[0]
        if request.mask and known.mask:
            inputs[known.mask] = "{mask}"
        if request.strength and known.strength:
            inputs[known.strength] = request.strength
    if inputs.get("num_outputs", 1) != 1:
        raise BadRequest("num_outputs: one prediction makes one image here", "-n N makes several")
    ignored = []
    if request.steps and not steps:
        ignored.append("steps")
    if request.negative_prompt and not negative:
        ignored.append("negative_prompt")
    return inputs, tuple(ignored)


def replicate_size(known: ReplicateModel | None, width: int, height: int) -> JsonObject:
    """The inputs that ask for a size.

    BadRequest, with the nearest size, where the model cannot make it.
    """
    if known is None:
        return {"width": width, "height": height}
    if known.longest:
        w, h = (
            min(known.longest, max(256, round(edge / known.step) * known.step))
            for edge in (width, height)
        )
        if (w, h) != (width, height):
            raise BadRequest(f"size {width}x{height}: not made by this model", f"nearest: {w}x{h}")
        return {"aspect_ratio": "custom", "width": width, "height": height}
    shape = max(width, height) / min(width, height)
    long, short = min(REPLICATE_ASPECTS, key=lambda ratio: abs(REPLICATE_ASPECTS[ratio] - shape))
    inputs = {"aspect_ratio": f"{long}:{short}"}
    if width < height:
        inputs["aspect_ratio"] = f"{short}:{long}"
    if width * height <= 512 * 1024:
        inputs["megapixels"] = "0.25"
    return inputs


def replicate_progress(logs: str) -> tuple[float | None, float | None]:
    """Steps done and steps in all, from the last progress bar in the logs.

    >>> replicate_progress(" 75%|#####  | 3/4 [00:00<00:00]")
    (3.0, 4.0)
    """
    bars = re.findall(r"\d+%\|.*?\| *(\d+)/(\d+)", logs)
    if not bars:
        return None, None
    done, total = bars[-1]
    return float(done), float(total)


def replicate_charged(prediction: Fields) -> Charged:
    """Whether a prediction that has ended costs money."""
    status = prediction.get("status")
    if status == "aborted":
        return "no"
    if status == "succeeded" or (prediction.get("metrics") or {}).get("predict_time"):
        return "yes"
    return "unknown"


def replicate_image(prediction: Fields) -> str:
    """Where the image of an ended prediction is; Ended or Refused where there is none."""
    status = prediction.get("status")
    message = str(prediction.get("error") or "")
    name = f"prediction {prediction.get('id')}"
    if status not in ("succeeded", "failed", "canceled", "aborted"):
        raise Unknown(f'{name} is "{status}", whatever that means')
    if status != "succeeded":
        if re.search(r"(?i)nsfw|sensitive|safety|moderat|content policy|E005", message):
            raise Refused(message, "reword the prompt")
        raise Ended(f"{name} ended as {status}: {message}".removesuffix(": "))
    if prediction.get("data_removed"):
        raise Ended(
            "the result is gone: Replicate keeps it for one hour",
            "ask for the image again; that costs again",
        )
    # A string, a list of them, or an object.
    output = json.dumps(prediction.get("output"))
    match = re.search(r'"(?:https?|data):[^"]+"', output)
    if not match:
        raise Ended(
            "the prediction succeeded without an image: its safety filter drops images one by one"
        )
    return str(json.loads(match[0]))


# === OpenAI: the Images API and whoever speaks its dialect ===

# USD per million tokens: text in, image in, image out; in PRICED. By the beginning of
# the model's name.
OPENAI_TOKENS = {
    "gpt-image-1-mini": (2.0, 2.5, 8.0),
    "gpt-image-1.5": (5.0, 8.0, 32.0),
    "gpt-image-2": (5.0, 8.0, 30.0),
}
# Tokens of an image of 1024x1024 that comes out; of another quality: as of the best.
OPENAI_QUALITIES = {"low": 272, "medium": 1056, "high": 4160}
OPENAI_INPUT = 7000  # tokens of an image that goes in, at most
# Of a response, what the sidecar keeps.
OPENAI_METADATA = (
    "created",
    "size",
    "quality",
    "background",
    "usage",
    "id",
    "x_request_id",
    "revised_prompt",
)

# What an image is in a JSON body; most fields are called so too.
OPENAI_INPUTS: Mapping[str, Callable[[str], Any]] = {
    "images": lambda link: {"image_url": link},
    "image": str,
    "image_object": lambda link: {"type": "image_url", "url": link},
    "input_references": lambda link: {"type": "image_url", "image_url": {"url": link}},
    "image_url": str,
}
OPENAI_EDITED = ("multipart", "images", "image_object")  # whose images have a path of their own
# Of a code.
OPENAI_REFUSED = re.compile("moderation|content_policy|sensitive", re.IGNORECASE)
# The sizes that gpt-image-1 makes, by their aspects.
OPENAI_SIZES = {"1:1": (1024, 1024), "3:2": (1536, 1024), "2:3": (1024, 1536)}


@register("openai")
class OpenAI(HttpBackend):
    """One POST that answers with the image: no job id and no cancel, and no look but at the answer.

    https://developers.openai.com/api/reference/resources/images
    Others that speak it: Together, vLLM-Omni, SGLang, LocalAI, LiteLLM.
    """

    VERSION = "/v1"
    OWN_FIELDS = "prompt negative_prompt seed size width height aspect_ratio n steps"

    class Options(NamedTuple):
        """`extra` are further fields; one that is null is left out.

        "{seed}", "{steps}" and "{negative}" in it stand for the request's values.
        """

        model: str
        api_key_env: KeyName = ""  # "": OPENAI_API_KEY at OpenAI, no key elsewhere
        base_url: str = "https://api.openai.com/v1"
        path: str = "/images/generations"
        query: Mapping[str, str] = EMPTY
        auth: str = "bearer"  # or none, or the header that takes the key
        quality: Text = ""
        background: Text = ""
        output_format: Text = ""
        moderation: Text = ""
        extra: Extra = EMPTY
        size_as: Literal["size", "width_height", "aspect_ratio", "none"] = "size"
        # mypy wants the names spelled out.
        inputs_as: Literal[("multipart", *OPENAI_INPUTS)] = "multipart"  # type: ignore[valid-type]
        input_fidelity: Text = ""  # high or low, of models before gpt-image-2
        response_format: str = ""  # "": what this kind of model wants
        cost_usd: float | None = None  # of one image, where the response says nothing of it
        # Seconds of silence: an image may take minutes.
        timeout: Annotated[float, Between(1, 7200)] = 600.0
        parallel: Parallel = 4

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.base = self.base.removesuffix(options.path)
        variable = options.api_key_env
        if not variable and origin(self.base)[1] == "api.openai.com":
            variable = "OPENAI_API_KEY"
        if variable and options.auth != "none":
            key = secret_from(variable).reveal()
            self.headers = {options.auth: key}
            if options.auth == "bearer":
                self.headers = {"Authorization": f"Bearer {key}"}

    @classmethod
    def plan(cls, options: Options, request: Request) -> Fields:
        """The body that will be posted."""
        return openai_body(options, request)[0]

    @classmethod
    def takes(cls, options: Options) -> Takes:
        """What OpenAI's models do, but for fields that the options leave out."""
        takes = Takes(16, mask=options.inputs_as in ("multipart", "images"))
        if options.inputs_as == "image_url":
            takes = takes._replace(images=1)
        if options.model.startswith("gpt-image-1"):
            takes = takes._replace(aspects=tuple(OPENAI_SIZES))
        removed = [key for key in options.extra if options.extra[key] is None]
        ignores = [look for look in LOOKS if look.replace("format", "output_format") in removed]
        if options.size_as == "none":
            ignores += ["aspect", "width", "height"]
        return takes._replace(ignores=tuple(ignores))

    @classmethod
    def price(cls, options: Options, request: Request) -> Price:
        """The config's price; the tokens that decide are counted in the response alone."""
        for name, (text, image, out) in OPENAI_TOKENS.items():
            if options.cost_usd is None and options.model.startswith(name):
                pixels = request.width * request.height or 1536 * 1024
                quality = request.quality or options.quality
                best = OPENAI_QUALITIES.get(quality, OPENAI_QUALITIES["high"])
                usd = len(request.prompt) * text + len(request.marks()) * OPENAI_INPUT * image
                usd += best * pixels / 1024**2 * out
                return Price(None, f"by the answer's tokens, {PRICED}", usd / 1e6)
        return super().price(options, request)

    def generate(self, ctx: Context, request: Request) -> Result:
        """Pay, and take the image out of the response."""
        options = self.options
        body, _ = openai_body(options, request)
        files: list[tuple[str, Input]] = []
        path = options.path
        if request.images and options.inputs_as in OPENAI_EDITED:
            path = path.replace("/generations", "/edits")
        if options.inputs_as == "multipart":
            name = "image" if len(request.images) == 1 else "image[]"
            files = [(name, image) for image in request.images]
            if request.mask:
                files.append(("mask", request.mask))
        elif request.images:
            body.update(openai_inputs(options.inputs_as, request))
        ctx.progress("waiting for the image")
        response = self.http(ctx).pay(self._place(path), body, files)
        return self._result(ctx, response.body, response.headers, request)

    def resume(self, ctx: Context, remote: Fields, request: Request) -> Result:
        """The image of an answer that was kept here, or behind the link that it had."""
        if link := remote.get("url"):
            _, ignored = openai_body(self.options, request)
            image = fetch_paid(self.http(ctx), link)
            return Result(image, "", self.options.model, ignored=ignored)
        if body := ctx.kept_answer():
            return self._result(ctx, body, EMPTY, request, Ended)
        return super().resume(ctx, remote, request)

    def _result(
        self,
        ctx: Context,
        body: bytes | bytearray,
        headers: Any,
        request: Request,
        without_image: type[ImagenError] = Unknown,
    ) -> Result:
        options = self.options
        _, ignored = openai_body(options, request)
        # 1. Was it paid for? Whatever comes with an image, or counts its tokens, was.
        document, image = openai_answer(body, ctx)
        item = (openai_data(document) or [{}])[0]
        usage = mapping_of(document.get("usage"))
        link = item.get("url")
        cost = reported = openai_reported(usage, headers)
        if image or link or usage.get("output_tokens") or reported:
            ctx.settle("yes")
        # 2. The image, from the response or behind its link.
        if not image and not link:
            if reported == 0:
                ctx.settle("no")
            blocked = OPENAI_REFUSED.search(str(item.get("error")))
            if blocked or item.get("respect_moderation") is False:
                raise Refused(f"sent, and refused: {excerpt(body)}", "reword the prompt")
            raise without_image(f"sent, and answered without an image: {excerpt(body, 200)}")
        image = image or fetch_paid(self.http(ctx), link)
        # 3. What is known of it.
        source = "reported"
        if cost is None:
            cost = openai_cost(options.model, usage)
            source = "tokens"
        steps = request.steps or None
        if "steps" in ignored:
            steps = None
        details = {**item, **document, "x_request_id": headers.get("x-request-id")}
        return Result(
            image=image,
            mime_type=f"image/{document.get('output_format') or 'png'}",
            model=options.model,
            steps=steps,
            cost_usd=cost,
            cost_source=source,
            ignored=ignored,
            metadata={key: details[key] for key in OPENAI_METADATA if details.get(key)},
        )

    def check(self, ctx: Context) -> str:
        """The list of models, which has ours; BadConfig with the nearest where it has not."""
        model = self.options.model
        path = self.options.path
        folder = "" if path.endswith("/generations") else path
        listed = openai_data(self.http(ctx).get_json(self._place(f"{folder}/models")))
        known = [item.get("id", "") for item in listed]
        if not known:
            return f"{model} (the server lists no models)"
        if model not in known:
            raise BadConfig(f'model "{model}" is not there: {nearest(model, known)}')
        return str(model)

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error means: moderation and money first, whatever the status says."""
        document = response.json() or {}
        error = document.get("error", document)
        code = error.get("code") or error.get("type")
        message = str(error.get("message") or response.excerpt())
        text = excerpt(message.encode(), 1000)
        if error.get("param"):
            text += f" ({error['param']})"
        if request_id := response.headers.get("x-request-id"):
            text += f" [{request_id}]"
        message = f"{response.status}: {text}"
        if OPENAI_REFUSED.search(str(code)) or "safety system" in text:
            refused = Refused(message, "reword the prompt")
            # At the stage of output the image had been made.
            if (error.get("moderation_details") or {}).get("moderation_stage") == "output":
                refused.charged = "yes"
            return refused
        if code in ("insufficient_quota", "billing_hard_limit_reached"):
            return Quota(message, "https://platform.openai.com/settings/organization/billing")
        if code == "model_not_found":
            return BadConfig(message, "imagen backends --check names what is there")
        return explain_status(response, text)

    def _place(self, path: str) -> str:
        from urllib.parse import urlencode

        return f"{path}?{urlencode(self.options.query)}".rstrip("?")


def fetch_paid(http: Http, link: Any) -> BinaryIO:
    """The image behind the link of a paid response, which is all that we have of it."""
    http.ctx.remote(url=link)
    try:
        return http.download(joined(http.base + "/", str(link)))
    except (Unreachable, BadConfig, BadRequest, Failed) as problem:
        raise Unknown(f"made, but its link could not be fetched: {problem}") from None


def openai_inputs(inputs_as: str, request: Request) -> JsonObject:
    """The fields of a JSON body with the request's images."""
    links = [*map(OPENAI_INPUTS[inputs_as], map(data_uri, request.marks().values()))]
    fields = {}
    if request.mask:
        fields["mask"] = links.pop()
    fields[inputs_as.replace("image_object", "images")] = links
    if inputs_as == "image_url":
        [fields["image_url"]] = links
    return fields


def openai_body(options: Any, request: Request) -> Prepared:
    """The body for this model, and the request's fields that it has no word for.

    BadRequest for what is sure to be refused.
    """
    values = {
        "seed": request.seed,
        "steps": request.steps or None,
        "negative_prompt": request.negative_prompt or None,
    }
    body: JsonObject = {
        "model": options.model,
        "prompt": request.prompt,
        "n": 1,
    }
    # OpenAI's own models reject unknown fields; the servers that speak its dialect want a
    # seed, or use a constant one.
    if not options.model.startswith(("gpt-image", "chatgpt-image")):
        body |= {**values, "steps": None, "response_format": "b64_json"}
    body |= openai_size(options, request)
    for field in ("quality", "background", "output_format", "moderation", "response_format"):
        look = getattr(request, field.removeprefix("output_"), "")
        if value := look or getattr(options, field):
            body[field] = {"jpg": "jpeg"}.get(value, value)
    if request.images and options.input_fidelity and not options.model.startswith("gpt-image-2"):
        body["input_fidelity"] = options.input_fidelity
    # `extra` may place a value of the request under a name of its own.
    marks = dict(zip(("{seed}", "{steps}", "{negative}"), values.values(), strict=True))
    body.update(replaced(options.extra, marks))
    body = {key: value for key, value in body.items() if value is not None}
    if body.get("n") != 1:
        raise BadRequest("n: one request makes one image here", "-n N makes several")
    if body.get("output_format") not in (None, "png", "jpeg", "webp"):
        raise BadRequest(
            f"output_format {body['output_format']}: not one that ImaGen keeps", "png, jpeg or webp"
        )
    extra = replaced(options.extra, EMPTY)
    ignored = []
    for (field, value), mark in zip(values.items(), marks, strict=True):
        # A mark that has a place there would change it.
        if value is not None and field not in body and replaced(extra, {mark: None}) == extra:
            ignored.append(field)
    return body, tuple(ignored)


def openai_size(options: Any, request: Request) -> JsonObject:
    """The fields that ask for a size; BadRequest where the model is known to refuse it."""
    width, height = OPENAI_SIZES.get(request.aspect) or request.pixels(1024)
    if not width or options.size_as == "none":
        return {}
    if options.size_as == "aspect_ratio":
        return {"aspect_ratio": request.aspect or nearest_aspect(width / height, ASPECTS)}
    openai_check_size(options.model, width, height)
    if options.size_as == "width_height":
        return {"width": width, "height": height}
    return {"size": f"{width}x{height}"}


def openai_check_size(model: str, width: int, height: int) -> None:
    """BadRequest, with the rule, where an OpenAI model is known to refuse this size.

    The rules of gpt-image-2 were measured by others, to the pixel.
    """
    short, long = sorted((width, height))
    if model.startswith("gpt-image-1"):
        fine = (width, height) in OPENAI_SIZES.values()
        rule = "1024x1024, 1536x1024 or 1024x1536"
    elif model.startswith("gpt-image-2"):
        fine = (
            not (width % 16 or height % 16)
            and long <= min(3840, 3 * short)
            and 655_360 <= short * long <= 8_294_400
        )
        rule = (
            "multiples of 16, at most 3840 and three times the other edge; "
            "655,360 to 8,294,400 pixels"
        )
    else:
        return
    if not fine:
        raise BadRequest(f"size {width}x{height}: not made by {model}", rule)


def openai_data(document: Any) -> list[Fields]:
    """The entries of `data`, which the schema lets be absent."""
    return [*mappings_in(mapping_of(document).get("data"))]


def openai_answer(
    body: bytes | bytearray,
    ctx: Context,
) -> tuple[JsonObject, BinaryIO | None]:
    """The JSON of an answer without its image, and the image; None: there is only a link.

    A 40 MB image is 54 MB of base64: parsed as JSON and decoded at once it would be in memory four
    times, so it is cut out and decoded piece by piece. An answer that is no JSON, or breaks off
    behind its image, has the image all the same.
    """
    body = inflated(body)
    spool = ctx.spool()
    start, end = image_in(body, spool)
    text = bytes(body[:start] + body[end:])
    # Of a stream the last event tells most.
    if events := re.findall(rb"(?m)^data: ?(\{.*)$", text):
        text = events[-1]
    document: Any = None
    with suppress(ValueError, RecursionError):
        document = json.loads(text)
    if isinstance(document, list):
        document = {"data": document}
    document = mapping_of(document)
    if end:
        spool.seek(0)
        return document, spool
    return document, None


def openai_cost(model: str, usage: Fields) -> float | None:
    """USD by the response's token counts; None where model or counts are unknown.

    Compatible servers say zero, or put all kinds of things there.
    """
    prices = (OPENAI_TOKENS[name] for name in OPENAI_TOKENS if model.startswith(name))
    price = next(prices, None)
    with suppress(AttributeError, TypeError):
        images = (usage.get("input_tokens_details") or {}).get("image_tokens") or 0
        text = (usage.get("input_tokens") or 0) - images
        out = usage.get("output_tokens")
        if price and out:
            total = text * price[0] + images * price[1] + out * price[2]
            return round(float(total) / 1e6, 6)
    return None


def openai_reported(usage: Fields, headers: Any) -> float | None:
    """USD that a response itself says: OpenRouter's, xAI's in ticks, or LiteLLM's in its header."""
    with suppress(TypeError, ValueError):
        if "cost_in_usd_ticks" in usage:
            return round(float(usage["cost_in_usd_ticks"]) / 1e10, 10)
        return float(usage.get("cost", headers.get("x-litellm-response-cost")))
    return None


# === Gemini: the Interactions API, whose id brings an image back ===

GEMINI_ASPECTS = (*ASPECTS[:-1], "1:4", "4:1", "1:8", "8:1")
# Up to which edge of a square of as many pixels.
GEMINI_SIZES = {"512": 724, "1K": 1448, "2K": 2896, "4K": 1 << 14}
# USD per million tokens of an image; in PRICED. By the beginning of the model's name.
GEMINI_TOKENS = {
    "gemini-3-pro-image": 120.0,
    "gemini-3.1-flash-image": 60.0,
    "gemini-2.5-flash-image": 30.0,
}
GEMINI_REFUSED = re.compile("safety|block|prohibit|policy|recitation|moderat", re.IGNORECASE)
GEMINI_HIDDEN_S = 60.0  # for which what is new may not be there yet


@register("gemini")
class Gemini(HttpBackend):
    """One POST whose stream begins with an id: by that the image is fetched, or cancelled.

    https://ai.google.dev/gemini-api/docs/interactions
    """

    VERSION = "/v1beta"
    OWN_FIELDS = "input prompt seed response_format generation_config stream store background"

    class Options(NamedTuple):
        """`extra` are further fields; one that is null is left out."""

        model: str
        api_key_env: KeyName = "GEMINI_API_KEY"
        base_url: str = "https://generativelanguage.googleapis.com/v1beta"
        # mypy wants the names spelled out.
        image_size: Annotated[Literal[("", *GEMINI_SIZES)], REQUEST] = ""  # type: ignore[valid-type]
        extra: Extra = EMPTY
        cost_usd: float | None = None  # of one image, where the table has no price for its tokens
        timeout: Seconds = 300.0  # seconds of silence
        parallel: Parallel = 4

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.headers = {"x-goog-api-key": secret_from(options.api_key_env).reveal()}

    @classmethod
    def plan(cls, options: Options, request: Request) -> Fields:
        """The body that will be posted, but for the images in it."""
        return gemini_body(options, request._replace(images=()))

    @classmethod
    def takes(cls, options: Options) -> Takes:
        """What its image models do."""
        return Takes(
            14,
            formats=tuple(MIME_TYPES),
            ignores=("background", "quality", "steps", "negative_prompt"),
            makes=("jpeg",),
            aspects=GEMINI_ASPECTS,
        )

    def generate(self, ctx: Context, request: Request) -> Result:
        """Pay, and note the id that comes first; where the stream breaks off later, it will do."""

        def note_id(received: bytearray) -> None:
            if not ctx.remote_ids and (ident := gemini_document(received).get("id")):
                ctx.remote(id=ident)

        body = gemini_body(self.options, request)
        ctx.progress("waiting for the image")
        try:
            response = self.http(ctx).pay("/interactions", body, on_block=note_id)
            if not ctx.remote_ids:
                raise Unknown(f"sent, and answered {response.excerpt()}")
        except Unknown:
            if not ctx.remote_ids:
                raise
        return self.resume(ctx, {**ctx.remote_ids, "since": now_iso()}, request)

    def resume(self, ctx: Context, remote: Fields, request: Request) -> Result:
        """The image in what was kept here of its stream, or else by its id."""
        http = self.http(ctx)
        document = gemini_document(ctx.kept_answer())
        if "image" not in document:
            if "id" not in remote:
                return super().resume(ctx, remote, request)
            document = self._ended(http, remote)
        if "image" not in document:
            raise gemini_failure(document)
        ctx.settle("yes")
        item = document["image"]
        if "data" in item:
            image = decode_base64(item["data"].encode(), ctx.spool())
        else:
            image = fetch_paid(http, item.get("uri"))
        return Result(
            image=image,
            mime_type=str(item.get("mime_type")),
            model=self.options.model,
            seed=request.seed,
            cost_usd=gemini_cost(self.options.model, mapping_of(document.get("usage"))),
            cost_source="tokens",
            metadata={key: document.get(key) for key in ("id", "created", "usage", "text")},
        )

    def cancel(self, ctx: Context, remote: Fields) -> None:
        """Cancel the interaction and see it end; Unknown where it was completed before."""
        http = self.http(ctx)
        http.post(f"/interactions/{remote['id']}/cancel", {})
        if self._ended(http, remote).get("status") == "completed":
            raise Unknown("it had been completed before")

    def _ended(self, http: Http, remote: Fields) -> JsonObject:
        """The interaction as it is once it runs no more."""
        path = f"/interactions/{remote['id']}"
        try:
            document = gemini_document(http.get(path).body)
            while (status := document.get("status")) in ("in_progress", "queued"):
                http.ctx.progress(status)
                http.ctx.sleep(1.0)
                document = gemini_document(http.get(path).body)
        except BadConfig as problem:
            age = time.time() - epoch(str(remote.get("since")))
            if age > GEMINI_HIDDEN_S and str(problem).startswith("404"):
                raise Ended(f"{path} is not known there any more") from None
            raise
        if mapping_of(document.get("usage")).get("total_output_tokens"):
            http.ctx.settle("yes")
        return document

    def check(self, ctx: Context) -> str:
        """The model's page."""
        return str(self.http(ctx).get_json(f"/models/{self.options.model}")["name"])

    def explain(self, response: HttpResponse) -> ImagenError:
        """What an error of Google's means."""
        text = str(response.json()["error"]["message"])
        if "API key" in text:
            return BadConfig(text, "check the variable that api_key_env names")
        if b"PerDay" in response.body:
            return Quota(f"429: {text}")
        return explain_status(response, excerpt(text.encode()))


def gemini_body(options: Any, request: Request) -> JsonObject:
    """The body of a request."""
    form: JsonObject = {"aspect_ratio": request.aspect, "image_size": options.image_size}
    if request.width:
        form["aspect_ratio"] = nearest_aspect(request.width / request.height, GEMINI_ASPECTS)
        edge = (request.width * request.height) ** 0.5
        form["image_size"] = next(size for size in GEMINI_SIZES if edge <= GEMINI_SIZES[size])
    items = [{"type": "text", "text": request.prompt}]
    for image in request.images:
        _, _, data = data_uri(image).partition(",")
        items.append({"type": "image", "data": data, "mime_type": image.mime_type})
    body = {
        "model": options.model,
        "input": items,
        "response_format": {"type": "image", **{key: form[key] for key in form if form[key]}},
        "generation_config": {"seed": request.seed},
        "stream": True,
        "store": True,
        **options.extra,
    }
    return {key: value for key, value in body.items() if value is not None}


def gemini_document(body: bytes | bytearray) -> JsonObject:
    """The interaction in a response, be it JSON or the events of a stream, as far as they go.

    With the last `image` that the model made, not of those that it thought of, and its `text`.
    """
    body = bytes(inflated(body))
    events = [parsed(body)]
    if not events[0]:
        events = [parsed(line) for line in re.findall(rb"(?m)^data: ?(.*)$", body)]
    document: JsonObject = {}
    made: JsonObject = {"text": ""}
    kind: Any = ""
    for event in events:
        interaction = mapping_of(event.get("interaction")) or event
        merge_line(document, interaction)
        # A delta goes on with the step that was begun.
        further = mapping_of(event.get("step")) or {"type": kind, "content": [event.get("delta")]}
        for step in mappings_in(interaction.get("steps")) or [further]:
            kind = step.get("type")
            if "error" in step:
                document["error"] = step["error"]
            for item in mappings_in(step.get("content")):
                if kind == "model_output":
                    made["text"] += str(item.get("text") or "")
                    if item.get("type") == "image":
                        made["image"] = item
    return {**document, **made}


def gemini_failure(document: Fields) -> ImagenError:
    """Why an interaction that is over has no image."""
    status = document.get("status")
    errors = document.get("errors") or document.get("error") or ""
    reason = excerpt(f"{document['text']} {errors}".encode())
    if status == "completed" or GEMINI_REFUSED.search(reason):
        return Refused(f"no image, but {reason}", "reword the prompt")
    return Ended(f"the interaction ended as {status}: {reason}")


def gemini_cost(model: str, usage: Fields) -> float | None:
    """USD by the tokens of the image; None where model or count are unknown."""
    for name, usd in GEMINI_TOKENS.items():
        for row in mappings_in(usage.get("output_tokens_by_modality")):
            if model.startswith(name) and str(row.get("modality")).lower() == "image":
                with suppress(LookupError, TypeError, ValueError):
                    return round(usd * float(row["tokens"]) / 1e6, 6)
    return None


# === Output: names, and files that are never half there ===

NAME_BYTES = 230  # of 255, so that -9999, .webp and .json still fit behind
FREE_BYTES = 8 << 20  # that a folder must have before anything is sent
NO_LINKS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
)


def slug(text: str) -> str:
    """`text` as part of a file name and of a Storage key, which takes ASCII alone.

    >>> slug("Größe: 3 Füchse & ein café!")
    'groesse-3-fuechse-ein-cafe'
    """
    import unicodedata

    pairs = re.findall(r"(\w)(\w+)", "äae öoe üue ßss æae œoe øo łl đd ðd þth")
    spelled = str.maketrans(dict(pairs))
    letters = unicodedata.normalize("NFC", text.lower()).translate(spelled)
    decomposed = unicodedata.normalize("NFKD", letters)
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    dashed = re.sub(r"[^a-z0-9]+", "-", bare.lower()).strip("-")
    return dashed[:40].strip("-") or "image"


def render_name(template: str, request: Request, at: float) -> str:
    """The relative name that a checked `template` gives; {ext} stays for the real bytes."""
    date, clock = time.strftime("%Y-%m-%d %H%M%S", time.localtime(at)).split()
    return template.format(
        date=date,
        time=clock,
        slug=slug(request.prompt),
        seed=request.seed,
        backend=re.sub(r"[^\w.-]|^\.+", "-", request.backend),
        ext="{ext}",
    )


def numbered(name: str, ending: str, number: int) -> str:
    """`name` with the ending that its bytes have, and `-2`, `-3`, … from the second on.

    >>> numbered("2026/fox.png", "jpg", 2)
    '2026/fox-2.jpg'
    """
    folder, last = os.path.split(name.replace("{ext}", ending))
    stem, suffix = os.path.splitext(last)
    known = suffix[1:].lower().replace("jpeg", "jpg")
    if known not in MIME_TYPES:
        stem = last
    if known != ending:
        suffix = f".{ending}"
    if len(stem.encode("utf-8", "surrogatepass")) > NAME_BYTES:
        stem = stem.encode("utf-8", "replace")[:NAME_BYTES].decode("utf-8", "ignore")
    if number > 1:
        stem += f"-{number}"
    return os.path.join(folder, stem + suffix)


def prepare_folder(folder: str) -> None:
    """Make the folder if need be; Disk where it cannot be written, or has hardly room."""
    cure = "make room, or name another folder with --output DIR/ or output.directory"
    with or_disk(folder, cure):
        os.makedirs(folder, exist_ok=True)
        room = os.statvfs(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Disk(f"{folder}: not writable", cure)
    # Some file systems of the network count no blocks.
    if room.f_blocks and room.f_bavail * room.f_frsize < FREE_BYTES:
        raise Disk(f"{folder}: less than {FREE_BYTES >> 20} MB free", cure)


@contextmanager
def or_disk(path: str, cure: str) -> Iterator[None]:
    """An OSError inside leaves as a Disk about `path`."""
    try:
        yield
    except OSError as problem:
        raise Disk(f"{path}: {problem.strerror}", cure) from None


class Spool(io.FileIO):
    """A new file that an image arrives in.

    When its disk fills, what has come moves to `fallback` and goes on there.
    """

    def __init__(self, path: str, fallback: str) -> None:
        unlink_quietly(path)
        super().__init__(path, "x+")
        self.path = path
        self.fallback = fallback

    def write(self, data: Any) -> int:
        """All of `data`; OSError where both disks are full."""
        left = memoryview(data)
        while left:
            try:
                left = left[super().write(left) or 0 :]
            except OSError as problem:
                if problem.errno not in (errno.ENOSPC, errno.EDQUOT) or self.path == self.fallback:
                    raise
                self._move()
        return len(data)

    def _move(self) -> None:
        with Spool(self.fallback, self.fallback) as moved:
            os.fchmod(moved.fileno(), 0o600)
            copy_into(self, moved)
            # Our descriptor becomes the other file's, which stands at its end.
            os.dup2(moved.fileno(), self.fileno(), inheritable=False)
        unlink_quietly(self.path)
        self.path = self.fallback


def unlink_quietly(path: str) -> None:
    """Remove the file at `path`, if it is there and can be removed."""
    with suppress(OSError):
        os.unlink(path)


def copy_into(source: BinaryIO | Spool, spool: Spool) -> None:
    """All of `source`, appended to `spool` a megabyte at a time."""
    source.seek(0)
    while block := source.read(1 << 20):
        spool.write(block)


def publish(
    hidden: str,
    name: str,
    ending: str,
    sidecar: str | None,
    claiming: Callable[[str], object],
) -> str:
    """Give the complete image at `hidden` the first free name; its path.

    Its sidecar, of which `sidecar` is the text, goes first and holds the name meanwhile. On
    a disk without hard links `claiming(path)` is called before a name is taken. What an
    earlier, killed call linked is used. The hidden names are the caller's to unlink.
    """
    number = 1
    note = f"{hidden}.json"
    while not same_file(hidden, path := numbered(name, ending, number)):
        number += 1
        beside = f"{path}.json"
        # Ours is what an earlier, killed call has linked.
        ours = same_file(note, beside)
        beside_taken = sidecar and not ours and os.path.lexists(beside)
        if beside_taken or os.path.lexists(path):
            if ours:
                # Somebody took the image's name since.
                os.unlink(beside)
            continue
        try:
            if sidecar and not ours:
                write_file(note, sidecar)
        except OSError:
            # An image alone is better than none; the caller sees that its sidecar is missing.
            sidecar = None
        pairs = [(hidden, path)]
        if sidecar:
            pairs.insert(0, (note, beside))
        if _take_names(pairs, claiming):
            break
    sync_folder(os.path.dirname(path))
    return path


def _take_names(
    pairs: Sequence[tuple[str, str]],
    claiming: Callable[[str], object],
) -> bool:
    """Give all files their names, the image last.

    False, and nothing left of ours, where one is taken.
    """
    taken: list[str] = []
    locks: list[int] = []
    try:
        for own, name in pairs:
            try:
                if not same_file(own, name):
                    os.link(own, name)
            except OSError as problem:
                if problem.errno not in NO_LINKS:
                    raise
                # FAT, some network disks: an empty file holds the name, and one's own is
                # moved over it. Its lock says that we are alive.
                claiming(pairs[-1][1])
                locks.append(locked(name, os.O_CREAT | os.O_EXCL))
            taken.append(name)
    except OSError as problem:
        for name in taken:
            os.unlink(name)
        if isinstance(problem, FileExistsError):
            return False
        raise
    else:
        if locks:
            for own, name in pairs:
                os.replace(own, name)
        return True
    finally:
        for fd in locks:
            os.close(fd)


def release_claim(path: str, image_id: str) -> None:
    """Undo what a killed call left of a claim on `path` without hard links.

    That is empty files, and its own sidecar.
    """
    beside = f"{path}.json"
    for name in (path, beside):
        with suppress(OSError), open(locked(name), "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                os.unlink(name)
    sidecar = parsed(read_bytes(beside))
    if not os.path.exists(path) and sidecar.get("image_id") == image_id:
        os.unlink(beside)


def locked(path: str, flags: int = 0, wait: bool = False) -> int:
    """A descriptor of the file at `path` that holds its lock until closed.

    OSError where somebody else has it.
    """
    import fcntl

    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    fd = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
    try:
        fcntl.flock(fd, operation)
    except OSError:
        os.close(fd)
        raise
    return fd


def is_locked(path: str) -> bool:
    """Whether somebody has the lock of a file; no where it is not there."""
    try:
        os.close(locked(path))
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def same_file(first: str | int, second: str) -> bool:
    """Whether both are one file; False where either is not there."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def write_file(path: str, text: str, mode: int = 0o666) -> None:
    """`text` in a new file at `path`, durable."""
    unlink_quietly(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable, where the disk knows how."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(fd)
        os.close(fd)


def read_bytes(path: str) -> bytes:
    """The file at `path`; b"" where it cannot be read."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


# === Preview: tmux, kitty, iTerm2 ===


def show_preview(
    paths: Sequence[str],
    output: OutputConfig,
    warn: Callable[[str], None],
) -> None:
    """Show finished images: in a tmux window, inline, or by the user's own command.

    `auto` does so only where stderr is a terminal, and silently not otherwise; `on` warns
    where nothing can.
    """
    if output.preview == "off" or not paths:
        return
    if output.preview == "auto" and not sys.stderr.isatty():
        return
    try:
        _show(paths, output.preview_command)
    # No preview fails a generation.
    except Exception as problem:
        if output.preview == "on":
            warn(f"preview: {problem}")


def _show(paths: Sequence[str], command: str) -> None:
    import shlex
    import shutil
    import subprocess

    # 1. Inline, where the terminal shows images and tmux does not stand between.
    tmux = os.environ.get("TMUX")
    terminal = {os.environ.get("TERM"), os.environ.get("TERM_PROGRAM")}
    encode = None
    if terminal & {"iTerm.app", "WezTerm"}:
        encode = iterm_image
    window = os.environ.get("KITTY_WINDOW_ID")
    if window or terminal & {"xterm-kitty", "xterm-ghostty", "ghostty"}:
        encode = kitty_image
    if encode and not tmux and sys.stderr.isatty():
        for path in paths:
            sys.stderr.buffer.write(encode(read_bytes(path)) + b"\n")
        sys.stderr.buffer.flush()
        return
    # 2. By a command: in a window of tmux, or in the background.
    if not tmux and not command:
        raise Failed("neither tmux nor a terminal that shows images; set output.preview_command")
    command = command or "tmux-img"
    program = shlex.split(command)[0]
    command = re.sub(r"(?s)\\.|'[^']*'|\"(?:\\.|[^\"\\])*\"", path_outside_quotes, command)
    if not shutil.which(program):
        raise Failed(f"{program} is not installed; set output.preview_command")
    if "{path}" not in command:
        command += " {path}"
    script = "; ".join(command.replace("{path}", shlex.quote(path)) for path in paths)
    shell = ["sh", "-c", f"({script}) </dev/null >/dev/null 2>&1 &"]
    if tmux:
        script += "; printf '\\n[Enter]'; read -r _"
        shell = ["tmux", "new-window", "-d", "-n", "imagen", "sh", "-c", script]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=5, start_new_session=True)
    if done.returncode:
        raise Failed(done.stderr)


def path_outside_quotes(part: re.Match[str]) -> str:
    """A quoted part of a command, with any {path} in it put behind the end of its quotes.

    So a path, which is quoted by itself, is one word wherever it stands. Failed for a script.
    """
    text = part[0]
    if "{path}" in text and re.search(r"[\s;&|$`()<>]", text):
        raise Failed(
            f"preview_command: {text} is a script, which a file's name would become part of",
            "let it take the path as an argument: sh -c '… \"$1\"' - {path}",
        )
    return text.replace("{path}", f"{text[0]}{{path}}{text[0]}")


def kitty_image(data: bytes) -> bytes:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/

    Base64 in pieces of 4096, m=1 on all but the last.
    """
    if not data.startswith(PNG_MAGIC):
        raise ValueError("this terminal shows PNG alone")
    text = binascii.b2a_base64(data, newline=False)
    starts = range(0, len(text), 4096)
    pieces = [b"m=1;%b\x1b\\" % text[start : start + 4096] for start in starts]
    pieces[-1] = pieces[-1].replace(b"m=1", b"m=0", 1)
    return b"\x1b_Ga=T,f=100,q=2," + b"\x1b_G".join(pieces)


def iterm_image(data: bytes) -> bytes:
    """https://iterm2.com/documentation-images.html"""
    return b"\x1b]1337;File=inline=1;size=%d:%b\a" % (
        len(data),
        binascii.b2a_base64(data, newline=False),
    )


# === Journal: what is unfinished, and the ledger of what is finished ===
#
# open/<entry_id>.jsonl is one image with something left to do. Whoever works on it holds its lock
# for life. Lines are only appended, and the record is what they say together, the later over the
# earlier. The sidecar stands in the first line, as far as it is known, and grows.

LEDGER_BLOCK = 1 << 16  # bytes read at a time from the ledger's end
UNREADABLE = "cannot be read"


class Sidecar(TypedDict, total=False):
    """What is known of an image: the file beside it, its row in the cloud, its tile in the page."""

    image_id: str
    prompt: str  # as written
    style: str
    styled_prompt: str
    negative_prompt: str
    backend: str
    fallback_from: str  # the backend that was named, and not reached
    model: str | None
    seed: int | None  # None: nobody knows which was used
    steps: int | None
    timestamp: str  # ISO 8601 with offset
    requested: JsonObject  # width, height, steps; backend_opts and LOOKS where there are any
    width: int  # pixels; until the image is there those that were asked of the backend
    height: int
    mime_type: str
    bytes: int
    sha256: str
    latency_ms: int | None
    cost_usd_estimate: float | None
    cost_source: str  # reported, tokens, table, config
    charged: Charged
    deviations: JsonObject  # what came otherwise than asked for, by its name
    ignored: list[str]
    inputs: list[JsonObject]  # name, sha256, width, height, mime_type, image_id
    mask: JsonObject
    strength: float
    storage_path: str | None
    metadata: JsonObject
    imagen_version: str
    complete: bool  # False: its end is missing
    private: bool
    tags: list[str]  # that its row begins with


class Record(TypedDict, total=False):
    """One attempt, as its journal entry, and later its line in the ledger, tells of it."""

    id: str  # of the entry
    at: str
    host: str
    name: str  # where the image is to go; {ext} may still be open
    paid: bool
    price: float | None
    job: str
    owner: str
    private: bool  # never to leave this machine
    key: str  # of the order; the entry's id follows from it
    ordered: str  # hash of what was ordered
    storage: str  # date/slug-seed: how the object's name begins; "": no cloud
    sidecar_wanted: bool
    strict: bool
    unmet: list[str]  # fields of the request that the backend has no word for
    sidecar: Sidecar
    sending: str  # when the first byte of the paid POST left
    reserved: float | None  # USD that count until it is known what it costs
    body: JsonObject  # what identifies it there: its own prompt and seed
    remote: JsonObject  # the remote's ids
    charged: Charged
    image: JsonObject  # file, sha256, bytes
    claim: str  # a name that is being taken on a disk without hard links
    path: str  # where the image is
    deleted: str  # when its file was
    object: str  # where it is in the bucket
    row: bool
    usage: str  # what was reported of it: charged, or "for good"
    refused: bool  # the cloud will never take it
    over: bool  # there will be no image
    error: dict[str, str]
    reused: bool  # made earlier, for the same key; never written down


# Types of fields that nobody checks again. Others may be whatever a backend sent.
RELIED_ON: dict[Any, Any] = {
    str: str,
    int: int,
    float | None: (int, float, types.NoneType),
    Charged: str,
    JsonObject: dict,
    Sidecar: dict,
    list[str]: list,
}


class OpenEntry(NamedTuple):
    """An entry as it was read: nobody holds its lock for us."""

    path: str
    record: Record
    state: str  # begun (nothing was sent), sent, to deliver, or UNREADABLE


def state_path(*parts: str) -> str:
    """A path in $XDG_STATE_HOME/imagen, whose folders are made if need be, 0700."""
    folder = xdg_folder("XDG_STATE_HOME", "~/.local/state") + "/imagen"
    entries_folder = f"{folder}/open"
    if not os.path.isdir(entries_folder):
        with or_disk(folder, "the journal lives there; name another place with XDG_STATE_HOME"):
            for place in (folder, entries_folder):
                os.makedirs(place, mode=0o700, exist_ok=True)
    return os.path.join(folder, *parts)


class Entry:
    """One unfinished image, locked by us. `record` is the merge of its lines."""

    def __init__(self, path: str, fd: int, record: Record) -> None:
        self.path = path
        self.fd = fd
        self.record = record

    @classmethod
    def create(cls, record: Record) -> Entry:
        """A new entry, locked before anybody can see it; Busy where its name is taken."""
        path = state_path("open", f"{record['id']}.jsonl")
        hidden = state_path("open", f".{new_uuid()}")  # two may want the same name at once
        with or_disk(path, "the journal lives there; make room, or let it be written"):
            entry = cls(path, locked(hidden, os.O_CREAT | os.O_EXCL), Record())
            try:
                entry.note(**record)
                named = _take_names([(hidden, path)], str)
            finally:
                unlink_quietly(hidden)
        if not named:
            entry.unlock()
            raise Busy(f"{record['id']}: somebody works on it")
        return entry

    @classmethod
    def take(cls, path: str) -> Entry | None:
        """The entry at `path`, if it is still there, can be read, and nobody works on it."""
        try:
            fd = locked(path)
        except OSError:
            return None
        if same_file(fd, path):  # and not finished, by whoever had the lock before us
            with suppress(ValueError):
                return cls(path, fd, read_entry(path))
        os.close(fd)
        return None

    @property
    def is_locked(self) -> bool:
        """Whether it is still ours."""
        return self.fd >= 0

    def note(self, durable: bool = False, **line: Any) -> None:
        """Append a line; `durable`: on disk, and its name too, when this returns.

        OSError where it cannot be.
        """
        append_line(self.fd, line, durable)
        if durable:
            sync_folder(os.path.dirname(self.path))
        merge_line(self.record, line)

    def to_ledger(self) -> None:
        """Nothing is left to do: one line in the ledger, and the entry is gone."""
        open_fields = ("name", "claim", "storage")
        line = {key: value for key, value in self.record.items() if key not in open_fields}
        add_to_ledger(line)
        os.unlink(self.path)
        self.unlock()

    def discard(self) -> None:
        """Undo its creation: nothing has come of it."""
        os.unlink(self.path)
        self.unlock()

    def unlock(self) -> None:
        """Leave the entry for another time."""
        if self.is_locked:
            os.close(self.fd)
        self.fd = -1


def locked_ledger() -> BinaryIO:
    """The ledger, which nobody else writes to, or counts, until it is closed."""
    return open(locked(state_path("ledger.jsonl"), os.O_CREAT, wait=True), "ab")


def add_to_ledger(line: Fields) -> None:
    """A line of the ledger, which overrules those before it of the same id."""
    with locked_ledger() as file:
        append_line(file.fileno(), line, durable=bool(line.get("paid")))


def journal_state() -> list[Any]:
    """What is another whenever the journal has changed."""
    state = []
    for entry in (state_path("ledger.jsonl"), *os.scandir(state_path("open"))):
        with suppress(OSError):
            status = os.stat(entry)
            state.append((os.fspath(entry), status.st_size, status.st_mtime_ns))
    return state


def keyed_id(caller: str, key: str, number: int) -> str:
    """The id of the entry of one image of an order with this key: here always the same."""
    import uuid

    namespace = uuid.UUID(state_uuid("namespace"))
    return str(uuid.uuid5(namespace, to_json([caller, key, number])))


def state_uuid(name: str) -> str:
    """A UUID of this state folder: random, so that nobody elsewhere can guess it."""
    path = state_path(name)
    value = read_bytes(path).decode()
    if not is_uuid(value):
        hidden = f"{path}.{new_uuid()}"
        with or_disk(path, "make room, or let it be written"):
            write_file(hidden, new_uuid(), 0o600)
            _take_names([(hidden, path)], str)  # or somebody else did
        unlink_quietly(hidden)
        value = read_bytes(path).decode()
    return value


def append_line(fd: int, line: Fields, durable: bool) -> None:
    """One JSON line, or nothing and OSError where the disk is full; the caller holds the lock."""
    size = os.fstat(fd).st_size
    data = f"{to_json(line)}\n".encode()
    if size and os.pread(fd, 1, size - 1) != b"\n":  # a torn line must not swallow this one
        data = b"\n" + data
    if os.write(fd, data) != len(data):
        os.ftruncate(fd, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if durable:
        os.fsync(fd)


def merged(text: bytes) -> JsonObject:
    """What the lines of an entry say together; a torn line says nothing.

    >>> merged(b'{"id": "a", "remote": {"x": 1}}\\n{"remote": {"y": 2}}\\n{"path": "/t')
    {'id': 'a', 'remote': {'x': 1, 'y': 2}}
    """
    record: JsonObject = {}
    for line in text.splitlines():
        merge_line(record, parsed(line))
    return record


def checked_record(record: JsonObject) -> Record:
    """A record in the types that everybody relies on; ValueError where it has others.

    Such a one is damaged, or of a release to come. What this release does not know stays in it.
    """
    try:
        checked = from_release_before(record)
        sidecar = checked.get("sidecar", {})
        hints = {**hints_of(Record), **hints_of(Sidecar)}
        for name, value in {**checked, **sidecar}.items():
            if not isinstance(value, RELIED_ON.get(hints.get(name), object)):
                raise TypeError(f"{name} is {value!r}")
    except (AttributeError, TypeError) as problem:
        raise ValueError(str(problem)) from None
    if "path" in checked and not {"image_id", "prompt"} <= sidecar.keys():
        raise ValueError("the sidecar of the image is missing")
    return checked


def from_release_before(record: JsonObject) -> Record:
    """A record of release 0.1.0, which kept request and result beside the sidecar, as it is now."""
    if "request" in record:
        request = request_of(record.pop("request"))
        styled = request_of(record.pop("styled", None) or request._asdict())
        sidecar = first_sidecar(request, styled, record.pop("model", None), record.get("price"))
        sidecar["image_id"] = record.pop("image_id", record.get("id"))
        sidecar["timestamp"] = record.get("at", "")
        fields = typing.cast(JsonObject, sidecar)
        if result := record.pop("result", None):
            fields.update(result_fields(result, request.seed))
        fields.update(record.get("sidecar") or {})
        record["sidecar"] = sidecar
        record.pop("backend", None)
    return typing.cast(Record, record)


def input_fields(image: Input) -> JsonObject:
    """What a sidecar says of an input."""
    fields = sparse(image)
    del fields["path"]
    return fields


def first_sidecar(
    request: Request, styled: Request, model: str | None, usd: float | None
) -> Sidecar:
    """What is known of an image before anything is sent, but for its id and time."""
    requested = {name: getattr(request, name) for name in ("width", "height", "steps")}
    requested |= {name: value for name in LOOKS if (value := getattr(request, name))}
    if request.backend_opts:
        requested["backend_opts"] = dict(request.backend_opts)
    sidecar: Sidecar = {
        "prompt": request.prompt,
        "style": request.style,
        "styled_prompt": styled.prompt,
        "negative_prompt": styled.negative_prompt,
        "backend": request.backend,
        "model": model,
        "seed": request.seed,
        "steps": request.steps or None,
        "requested": requested,
        "cost_usd_estimate": usd,
        "imagen_version": __version__,
    }
    if styled.width:
        sidecar["width"] = styled.width
        sidecar["height"] = styled.height
    if request.images:
        sidecar["inputs"] = [input_fields(image) for image in request.images]
    if request.mask:
        sidecar["mask"] = input_fields(request.mask)
    if request.strength:
        sidecar["strength"] = request.strength
    return sidecar


def result_fields(result: Fields, seed: int | None) -> JsonObject:
    """What a backend's Result, as a mapping, adds to a sidecar whose request had this seed."""
    ignored = list(result.get("ignored") or ())
    if result.get("seed") is not None:
        seed = result["seed"]
    if "seed" in ignored:
        seed = None
    cost = {}
    if result.get("cost_usd") is not None:  # else the price stays that was known before
        cost["cost_usd_estimate"] = result["cost_usd"]
        if source := result.get("cost_source"):
            cost["cost_source"] = source
    return {
        **cost,
        **{name: result.get(name) for name in ("model", "steps", "latency_ms")},
        "seed": seed,
        "ignored": ignored,
        "metadata": result.get("metadata") or {},
    }


def read_entry(path: str) -> Record:
    """The record of an entry; one whose first line is torn has its id alone.

    OSError or ValueError where it cannot be read.
    """
    with open(path, "rb") as file:
        record = checked_record(merged(file.read()))
    record.setdefault("id", os.path.basename(path).removesuffix(".jsonl"))
    return record


def entries() -> list[OpenEntry]:
    """The unfinished entries with their states, oldest first."""
    rows = []
    for name in os.listdir(state_path("open")):
        if not name.endswith(".jsonl"):
            continue
        path = state_path("open", name)
        try:
            record = read_entry(path)
        except (OSError, ValueError):
            if os.path.lexists(path):  # and was not finished meanwhile
                rows.append(OpenEntry(path, Record(id=name.removesuffix(".jsonl")), UNREADABLE))
            continue
        if record.get("path") or record.get("over"):
            state = "to deliver"
        elif record.get("remote") or record.get("sending"):
            state = "sent"
        else:
            state = "begun"
        rows.append(OpenEntry(path, record, state))
    return sorted(rows, key=lambda row: str(row.record.get("at")))


def unfinished() -> list[OpenEntry]:
    """The entries that nobody works on, oldest first."""
    rows = []
    for row in entries():
        entry = Entry.take(row.path)
        if entry:
            entry.unlock()
        if entry or row.state == UNREADABLE:
            rows.append(row)
    return rows


def journal_fault() -> Disk | None:
    """Where the ledger or an entry cannot be read: an answer that leaves it out would be a lie."""
    hint = "it may be damaged, of a newer release, or somebody else's: mend it, or move it away"
    for row in entries():
        if row.state == UNREADABLE:
            return Disk(f"{row.path}: {UNREADABLE}", hint)
    try:
        next(_ledger_lines(b"", b"", ()), None)
    except Disk as problem:
        return problem
    return None


def sweep_journal() -> None:
    """Unlink entries that were killed before they had their name."""
    for name in os.listdir(state_path("open")):
        if name.startswith(".") and (entry := Entry.take(state_path("open", name))):
            entry.discard()


def attempts(
    terms: Sequence[str] = (),
    before: str = "",
    needle: str = "",
    warn: Callable[[str], object] = str,
    under_way: bool = False,
) -> Iterator[Record]:
    """Attempts, newest first, each once: open entries that have their image, then the ledger.

    `terms`: only lines that hold all of them, in lower case. `before`: only what is older than the
    image with this id. `needle`: only lines of the ledger with this in them, letter by letter.
    `warn` hears once of lines that nobody can use. `under_way`: also open entries that may cost
    something before they have an image.
    """
    rows = reversed(entries())
    opened = [row.record for row in rows if "path" in row.record or (under_way and may_cost(row))]
    ids = [record.get("sidecar", EMPTY).get("image_id") for record in opened]
    if before in ids:
        opened = opened[ids.index(before) + 1 :]
        before = ""
    elif before:
        opened = []
    spelled = [to_json(term)[1:-1] for term in terms]
    lines = _ledger_lines(before.encode(), needle.encode(), spelled)
    seen = set()
    for record in itertools.chain(opened, map(_ledger_record, filter(None, lines))):
        ident = (record.get("id"), record.get("at"))  # a key's attempts have one id
        if ident in seen:
            continue
        seen.add(ident)
        if "id" in record:
            yield record
        else:
            warn("the ledger has lines that are damaged, or of a newer release: left out")


def may_cost(row: OpenEntry) -> bool:
    """Whether an entry without an image counts: it was sent, or its process is about to."""
    unsent = row.record.get("reserved") and row.record.get("charged", "no") == "no"
    if unsent and is_locked(row.path):
        row.record["charged"] = "unknown"
    return row.record.get("charged", "no") != "no"


def cost_nothing(record: Record) -> bool:
    """Whether an attempt has failed before anything was charged."""
    return record.get("charged", "no") == "no" and "path" not in record


def cost_of(record: Record) -> tuple[str, float]:
    """The USD that count for an attempt, and what they are: reported, estimated, or reserved.

    These as long as nobody knows the others.
    """
    charged = record.get("charged", "no")
    price = record.get("price")
    usd = record.get("sidecar", Sidecar()).get("cost_usd_estimate")
    if cost_nothing(record):
        return "estimated", 0.0
    if charged == "unknown" or usd is None:
        return "reserved", record.get("reserved") or price or 0.0
    if usd == price:
        return "estimated", usd
    return "reported", usd


def _ledger_record(line: bytes) -> Record:
    with suppress(ValueError):
        return checked_record(parsed(line))
    return Record()


def _holds_all(data: bytes, needle: bytes, terms: Sequence[str]) -> bool:
    if needle not in data:
        return False
    if not terms:
        return True
    text = data.decode("utf-8", "replace").lower()
    return all(term in text for term in terms)


def _ledger_lines(before: bytes, needle: bytes, terms: Sequence[str]) -> Iterator[bytes]:
    # From its end and in blocks, since most readers want the newest alone, and a block that holds
    # nothing of interest is never split. Not mapped: a file that is cut meanwhile would kill us.
    path = state_path("ledger.jsonl")
    if not os.path.lexists(path):
        return
    with or_disk(path, "without the ledger the answer would be a lie"), open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        begun = b""  # the end of a line that begins further up
        while end > 0:
            start = max(0, end - LEDGER_BLOCK)
            block = os.pread(file.fileno(), end - start, start) + begun
            end = start
            of_interest = before in block if before else _holds_all(block, needle, terms)
            if start and not of_interest:
                begun = block.partition(b"\n")[0]
                continue
            begun, *lines = block.split(b"\n")
            if not start:
                lines.insert(0, begun)
            for line in reversed(lines):
                if before:
                    # A line that tells of its deletion stands further down than the image did.
                    if before in line and b'"deleted": ' not in line:
                        before = b""
                elif _holds_all(line, needle, terms):
                    yield line


def images_made(
    owners: Collection[str] = (),
    before: str = "",
    terms: Sequence[str] = (),
    backend: str = "",
    warn: Callable[[str], object] = str,
) -> Iterator[Record]:
    """The records of images, newest first, without those that were deleted.

    `owners`: only theirs. `before`: only what was made before the image with this id. `terms` must
    all stand in prompt, style or seed, in any case; `backend` must have made it.
    """
    terms = [term.lower() for term in terms]
    needle = ""
    if backend:  # most lines of others need not even be parsed
        needle = f'"backend": {to_json(backend)}'
    for record in attempts(terms, before, needle, warn):
        if "path" not in record or "deleted" in record or not may_see(record, owners):
            continue
        sidecar = record["sidecar"]
        if backend not in ("", sidecar.get("backend")):
            continue
        text = f"{sidecar['prompt']} {sidecar.get('style')} {sidecar.get('seed')}".lower()
        if all(term in text for term in terms):
            yield record


def may_see(record: Record, owners: Collection[str]) -> bool:
    """Whether an image is one of these owners'; none: everybody's."""
    return not owners or record.get("owner", "") in owners


def shown_owners(config: Config, everybody: bool) -> Collection[str]:
    """The owners whose images a door shows: all, or the config's and nobody."""
    if everybody:
        return ()
    return ("", config.owner_user_id)


def find_image(name: str) -> Record | None:
    """The record of an image that was made: by its path, its sidecar's, its id, or as `last`.

    An image that the journal does not know is told by its sidecar alone.
    """
    if name == "last":
        return next(images_made(), None)
    path = digest = ""
    sidecar = Sidecar()
    image_id = needle = name
    # An id may come from anybody, over HTTP too: it never becomes a path.
    if not is_uuid(name):
        path = os.path.abspath(os.path.expanduser(name))
        if path.endswith(".json") and os.path.exists(path):
            path = path.removesuffix(".json")
        alone = {"path": path, "sidecar": parsed(read_bytes(f"{path}.json"))}
        with suppress(ValueError):  # it is no sidecar of ours
            sidecar = checked_record(alone)["sidecar"]
        image_id = sidecar.get("image_id") or name
        needle = image_id
        if not sidecar:
            # The same bytes are the same image, wherever they have been moved to.
            if data := read_bytes(path):
                digest = sha256_of(data)
            needle = digest or to_json(path)[1:-1]
    for record in attempts(needle=needle):
        if "path" not in record:
            continue
        if record["sidecar"]["image_id"] == image_id:
            if sidecar and os.path.exists(path):  # it may have been moved since
                record["path"] = path
            return record
        if not sidecar and (record["path"] == path or record["sidecar"].get("sha256") == digest):
            record["path"] = path
            return record
    if not sidecar:
        return None
    at = sidecar.get("timestamp", "")
    return Record(id=image_id, at=at, path=path, sidecar=sidecar)


# === Inputs: images that come in: local copies by hash ===
#
# An image that a door names is copied into the state folder, since the file may change or go before
# it is sent, or sent again. The copy is named by its hash, in the journal too.

INPUT_PIXELS = 64_000_000
MASK_PIXELS = 16_000_000
INPUT_KEPT_S = 86400.0  # of a copy that no open entry names


@contextmanager
def hidden_inputs() -> Iterator[Callable[[], str]]:
    """Gives names of files for what comes in, which are gone when this ends."""
    folder = state_path("inputs")
    paths: list[str] = []

    def hidden() -> str:
        paths.append(f"{folder}/.{new_uuid()}")
        return paths[-1]

    with or_disk(folder, "images that come in are copied there"):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        yield hidden
    finally:
        for path in paths:
            unlink_quietly(path)


def input_of(source: str | Input, ctx: Context) -> Input:
    """The copy of the image that `source` names: a path, an http address, a data URI, an id.

    What is a copy already, as for a fallback, is taken as it is.
    BadRequest where it is no whole image of a size and format that anybody takes.
    """
    if isinstance(source, Input):
        return source
    place = source
    image_id = ""
    if source == "last" or is_uuid(source):
        record = find_image(source)
        if not record:
            raise BadRequest(f"{source}: no image of that id is known here")
        place = record["path"]
        image_id = record["sidecar"]["image_id"]
    folder = state_path("inputs")
    name = os.path.basename(place.partition("?")[0]) or "image"
    if source.startswith(("data:", f"{folder}/.")):  # the name of a part of a form would be ours
        name = "data"
    with hidden_inputs() as hidden:
        path = hidden()
        with or_disk(folder, "copies of inputs live there"):
            spool = Spool(path, path)
        with spool:
            os.fchmod(spool.fileno(), 0o600)
            fetch_input(place, spool, ctx)
            sniffed = checked_input(spool, name)
            orientation = 1
            if sniffed.format == "jpg":
                orientation = exif_orientation(spool)
            spool.seek(0)
            digest = sha256_of(spool)
        copy = f"{folder}/{digest}"
        os.replace(path, copy)
    return Input(
        path=copy,
        name=name,
        sha256=digest,
        width=sniffed.width,
        height=sniffed.height,
        mime_type=MIME_TYPES[sniffed.format],
        image_id=image_id,
        orientation=orientation,
    )


def fetch_input(place: str, spool: Spool, ctx: Context) -> None:
    """The bytes at `place`, in `spool`; no more of them than one image may have."""
    most = Takes().most_bytes
    if place.startswith("data:"):
        _, _, text = place.partition(",")
        decode_base64(text.encode(), spool)
    elif re.match("https?://", place):
        with Http(ctx, place).download(place) as source:  # without keys
            copy_into(source, spool)
    else:
        path = full_path(place)
        try:
            with open(path, "rb") as file:
                if not os.path.isfile(path) or os.path.getsize(path) > most:
                    raise BadRequest(f"{place}: no file of at most {most >> 20} MB")
                copy_into(file, spool)
        except OSError as problem:
            raise BadRequest(f"{place}: {problem.strerror}") from None
    if spool.seek(0, os.SEEK_END) > most:
        raise BadRequest(f"{place[:100]}: more than {most >> 20} MB")


def checked_input(spool: Spool, name: str) -> Sniffed:
    """What an image that came in is; BadRequest where nobody could take it."""
    sniffed = sniff(spool)
    if not sniffed:
        cure = "PNG, JPEG, WebP and GIF are; convert it, for example with ImageMagick"
        raise BadRequest(f"{name}: no image that backends take", cure)
    if not sniffed.complete:
        raise BadRequest(f"{name}: the image breaks off")
    if sniffed.width * sniffed.height > INPUT_PIXELS:
        size = f"{sniffed.width}x{sniffed.height}"
        raise BadRequest(f"{name}: {size} is more than {INPUT_PIXELS // 10**6} megapixels")
    return sniffed


def check_mask(mask: Input, image: Input) -> None:
    """BadRequest where a mask could not say what is to be made anew."""
    if (mask.width, mask.height) != (image.width, image.height):
        message = f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}"
        raise BadRequest(message, "both have to be of one size")
    if mask.width * mask.height > MASK_PIXELS:
        raise BadRequest(f"the mask has more than {MASK_PIXELS // 10**6} megapixels")
    try:
        with open(mask.path, "rb") as file:
            if mask.mime_type != "image/png":
                raise ValueError("no PNG")
            # The first transparent pixel is enough.
            if not any(0 in row for row in png_plane(file)):
                raise ValueError("no pixel of it is transparent, so nothing would be made anew")
    except (ValueError, struct.error, zlib.error) as problem:
        cure = "a PNG that is transparent where the image is to be made anew"
        raise BadRequest(f"the mask: {problem}", cure) from None


def check_inputs(request: Request, takes: Takes, others: Sequence[str]) -> None:
    """BadRequest where a backend could not honour all inputs; `others` names those that can."""
    refused = []
    if len(request.images) > takes.images:
        refused.append(f"{len(request.images)} images (at most {takes.images})")
    if request.mask and not takes.mask:
        refused.append("a mask")
    if request.strength and not takes.strength:
        refused.append("a strength")
    if refused:
        message = f"{request.backend} cannot take {', '.join(refused)}"
        raise BadRequest(message, f"backends that can: {', '.join(others) or 'none'}")
    if not request.images and (request.mask or request.strength):
        raise BadRequest("a mask or a strength needs an image to start from", "--image FILE")
    for image in request.marks().values():
        if image.mime_type not in {MIME_TYPES[kind] for kind in takes.formats}:
            kinds = ", ".join(takes.formats)
            raise BadRequest(f"{image.name}: {request.backend} takes {kinds} alone")
        if os.path.getsize(image.path) > takes.most_bytes:
            message = f"{image.name}: {request.backend} takes {takes.most_bytes >> 20} MB an image"
            raise BadRequest(message, "make it smaller")
    if request.mask:
        check_mask(request.mask, request.images[0])


def input_in(fields: Fields) -> Input:
    """An input that a sidecar names, whose copy may be gone."""
    return Input(path=state_path("inputs", str(fields["sha256"])), **fields)


def input_again(fields: Fields, folder: str) -> str:
    """Where an input that a sidecar names is now: its copy, another image, or beside this one."""
    digest = str(fields["sha256"])
    places = [state_path("inputs", digest)]
    places += [record["path"] for record in attempts(needle=digest) if "path" in record]
    places.append(os.path.join(folder, str(fields["name"])))
    for place in places:
        if sha256_of(read_bytes(place)) == digest:
            return place
    raise BadRequest(f"{fields['name']}: this input is not here any more", "name it with --image")


def sweep_inputs() -> None:
    """Remove the copies that no open entry names, and that nobody has waiting any more."""
    named = to_json([row.record for row in entries()])
    with suppress(FileNotFoundError):
        for item in os.scandir(state_path("inputs")):
            if item.name not in named and item.stat().st_mtime < time.time() - INPUT_KEPT_S:
                unlink_quietly(item.path)


# === Supabase: objects in a private bucket, rows that tell of them, signed links ===

# Codes of what no repeat can mend.
FINAL_CODES = ("InvalidKey", "PGRST102", "22003", "22P02", "22P05", "23502", "23514")


def cloud_settings_missing(config: Config) -> list[str]:
    """What is missing before images can go to the cloud, in words; [] where nothing is."""
    variables = (config.supabase.url_env, config.supabase.service_key_env)
    unset = [name for name in variables if not os.environ.get(name, "").strip()]
    missing = [f"{name} is not set" for name in unset]
    if not config.owner_user_id:
        missing.append("owner_user_id is empty")
    return missing


class Supabase:
    """A project as its service key sees it: one private bucket, and tables behind PostgREST.

    Every call may be made twice without harm; each raises what `supabase_error` makes of an answer.
    https://supabase.com/docs/guides/storage, https://docs.postgrest.org
    """

    def __init__(self, ctx: Context, config: SupabaseConfig, prompt: str = "") -> None:
        """`prompt` is taken out of what the project says."""
        url = os.environ.get(config.url_env, "").strip()
        if not url:
            hint = f"export {config.url_env}=https://….supabase.co"
            raise KeyMissing(f"{config.url_env} is not set", hint)
        key = secret_from(config.service_key_env).reveal()
        self.keys = {"apikey": key}
        if not key.startswith("sb_"):  # the opaque keys are no JWT, so no Bearer token either
            self.keys["Authorization"] = f"Bearer {key}"
        self.ctx = ctx
        self.explain = functools.partial(supabase_error, prompt=prompt)
        self.base = checked_url(url, name=config.url_env)
        self.bucket = config.bucket
        self.storage = Http(ctx, f"{self.base}/storage/v1", self.keys, self.explain)

    def tables(self, schema: str) -> Http:
        """PostgREST, looking at one schema."""
        profile = {"Accept-Profile": schema, "Content-Profile": schema}
        return Http(self.ctx, f"{self.base}/rest/v1", {**self.keys, **profile}, self.explain)

    def object_url(self, path: str) -> str:
        """`path` of the bucket as it stands in a URL; BadRequest for what servers fold or cut."""
        from urllib.parse import quote

        if {"", ".", ".."}.intersection(path.split("/")):
            raise BadRequest(f"{path}: no path in a bucket")
        return f"{self.bucket}/{quote(path)}"

    def upload(self, path: str, file: BinaryIO, mime_type: str, image_id: str) -> None:
        """Put an image at `path`, over what an earlier call of ours may have put there."""
        metadata = to_jsonb({"image_id": image_id}).encode()
        response = self.storage.send(
            "PUT",
            f"/object/{self.object_url(path)}",
            file,
            Content_Type=mime_type,
            x_upsert="true",
            x_metadata=base64_of(metadata),
            cache_control="max-age=31536000, immutable",
        )
        if not response.mapping().get("Key"):  # a page of somebody in between
            raise Failed(f"{response.status}: the answer names no object")

    def delete_object(self, path: str) -> None:
        """Delete what is at `path`, if anything is."""
        try:
            self.storage.send("DELETE", f"/object/{self.object_url(path)}", io.BytesIO())
        except BadConfig as problem:
            if " NoSuchKey: " not in str(problem):
                raise

    def fetch(self, path: str, owner: str, place: str) -> None:
        """An object that this owner may read, into a new file at `place`.

        BadRequest for any other, before it is read: below their own folder, or an image of theirs.
        """
        from urllib.parse import quote

        url = self.object_url(path)
        if not path.startswith(f"{owner}/"):
            query = f"owner_user_id=eq.{owner}&storage_path=eq.{quote(path, safe='')}"
            if not self._rows(f"{query}&limit=1"):
                raise BadRequest(f"{path}: not one that this job's owner may read")
        try:
            source = self.storage.download(f"/object/{url}")
        except (BadConfig, BadRequest) as problem:
            raise BadRequest(f"{path}: cannot be fetched: {problem}") from None
        with source, Spool(place, place) as copy:
            copy_into(source, copy)

    def _rows(self, query: str) -> list[Fields]:
        images = self.tables("imagen").get(f"/images?{query}&select=id,storage_path")
        return postgrest_rows(images)

    def delete_image(self, image_id: str) -> bool:
        """Delete the row of an image, and the object that it alone names; whether there was one."""
        from urllib.parse import quote

        path = self.storage_path_of(image_id)
        if path:
            images = self.tables("imagen")
            images.send("DELETE", f"/images?id=eq.{image_id}", io.BytesIO())
            if not self._rows(f"storage_path=eq.{quote(path)}"):
                self.delete_object(path)
        return bool(path)

    def empty_outbox(self) -> None:
        """Delete the objects of images whose rows somebody deleted."""
        deletions = self.tables("imagen")
        try:
            rows = postgrest_rows(deletions.get("/rpc/objects_to_delete"))
        except BadConfig as problem:
            if not str(problem).startswith("404 "):  # where nobody has migrated it yet
                raise
            return
        for row in rows:
            with suppress(BadRequest):  # nothing can have such a name
                self.delete_object(row["storage_path"])
            done = {"object_deleted_at": "now"}
            deletions.send("PATCH", f"/deletions?image_id=eq.{row['image_id']}", done)

    def sign(self, path: str, seconds: int) -> str:
        """An address where anybody can fetch the image at `path` for that long."""
        from urllib.parse import quote

        place = f"/object/sign/{self.object_url(path)}"
        response = self.storage.send("POST", place, {"expiresIn": seconds})
        signed = str(response.mapping().get("signedURL"))
        place, _, query = signed.rpartition("?")
        if not place:
            raise Failed("the answer has no signed address")
        return f"{self.storage.base}{quote(place)}?{query}"

    def storage_path_of(self, image_id: str) -> str:
        """Where the row of an image says that its object is; "" where there is no such row."""
        rows = self._rows(f"id=eq.{image_id}")
        return str(rows[0]["storage_path"]) if rows else ""

    def add_image(self, row: Fields) -> str:
        """Insert a row of imagen.images unless its id is there; its storage_path from now on."""
        # So nobody's later edits are touched.
        prefer = "return=representation,resolution=ignore-duplicates"
        place = "/images?on_conflict=id&select=id,storage_path"
        response = self.tables("imagen").send("POST", place, row, Prefer=prefer)
        if rows := postgrest_rows(response):
            return str(rows[0]["storage_path"])
        return self.storage_path_of(row["id"]) or str(row["storage_path"])

    def add_usage(self, row: Fields) -> bool:
        """Insert a row of mai.imagen_usage, or correct it.

        False where the table knows no id of ours to correct it by. It may be another's: columns
        that it does not have are left out.
        """
        row = dict(row)
        prefer = "return=minimal,resolution=merge-duplicates"
        while True:
            place = "/imagen_usage?on_conflict=id"
            if "id" not in row:
                place = "/imagen_usage"
            try:
                response = self.tables("mai").send("POST", place, row, Prefer=prefer)
            except (BadRequest, Failed) as problem:
                column = column_to_leave_out(str(problem))
                if column not in row:
                    raise
                del row[column]
                continue
            if response.body.strip():
                raise Failed("the answer to a row of imagen_usage is not PostgREST's")
            return "id" in row


def column_to_leave_out(message: str) -> str:
    """The column that a table of somebody else does not take, by PostgREST's words; "" for none."""
    if unknown := re.search(r"PGRST204: .*?(?:Column '(\w+)'|'(\w+)' column)", message):
        return unknown[1] or unknown[2]
    if re.search(r" (22P02|428C9|42P10|42804): ", message):
        return "id"  # it is of another kind there
    return ""


def postgrest_rows(response: HttpResponse) -> list[Fields]:
    """The rows of an answer; Failed where it is no list of them."""
    rows = response.json()
    if not isinstance(rows, list):
        rows = [None]
    if all(isinstance(row, dict) and row.get("storage_path") for row in rows):
        return rows
    raise Failed(f"{response.status}: the answer is no list of rows")


def supabase_error(response: HttpResponse, prompt: str = "") -> ImagenError:
    """What an error of Storage or of PostgREST means; BadRequest: refused for good.

    Storage has its true status in the body. Only code and message are told: the details of
    PostgREST hold the whole row, and the prompt with it.
    """
    body = mapping_of(response.json())
    status = response.status
    true_status = str(body.get("statusCode"))
    if re.fullmatch(r"[1-5]\d\d", true_status):
        status = int(true_status)
    code = str(body.get("code") or "")
    message = without(prompt, str(body.get("message") or "no word why"))
    text = f"{status} {code}: {excerpt(message.encode('utf-8', 'replace'))}"
    if code == "23503":
        return BadRequest(text, "owner_user_id has to be your UUID in auth.users")
    if status in (413, 415) or code in FINAL_CODES:
        return BadRequest(text)
    if status == 429:
        return Busy(text, after=retry_after(response))
    if status == 423 or status >= 500:
        return Unreachable(text, after=retry_after(response))
    if status in (401, 403):
        return BadConfig(text, "check the service key, and run: imagen migrate")
    if status in (404, 406):
        return BadConfig(text, "run `imagen migrate`, and expose the schemas imagen and mai")
    return Failed(text)


def without(prompt: str, text: str) -> str:
    """`text` with the prompt replaced by …, also behind JSON's escapes or with other spaces."""
    patterns = []
    for word in prompt.split():
        spellings = {
            word,
            json.dumps(word)[1:-1],
            to_json(word)[1:-1],
        }
        patterns.append("(?:" + "|".join(map(re.escape, spellings)) + ")")
    if not patterns:
        return text
    return re.sub(r"(?:\s|\\[nrtfbv]|\\u\w{4})+".join(patterns), "…", text)


def image_row(record: Record) -> JsonObject:
    """The row of imagen.images for a journal record whose object is uploaded."""
    sidecar = {**record["sidecar"], "storage_path": record["object"]}
    tags = {"tags": sidecar["tags"]} if "tags" in sidecar else {}
    columns = (
        "prompt",
        "backend",
        "model",
        "seed",
        "steps",
        "width",
        "height",
        "latency_ms",
        "cost_usd_estimate",
        "storage_path",
    )
    return {
        "id": sidecar["image_id"],
        "owner_user_id": record["owner"],
        **{name: sidecar.get(name) for name in columns},
        "prompt_hash": sha256_of(record["sidecar"]["prompt"]),
        "sidecar": sidecar,
        **tags,
    }


def usage_row(record: Record) -> JsonObject:
    """The row of mai.imagen_usage for an attempt that cost money or may have; no prompt in it."""
    sidecar: Fields = record.get("sidecar") or {}
    columns = ("model", "width", "height", "steps", "latency_ms", "cost_usd_estimate", "backend")
    image_id = None
    if record.get("path"):
        image_id = sidecar.get("image_id")
    return {
        "id": record["id"],
        "created_at": record.get("at"),
        "owner_user_id": record.get("owner") or None,
        "image_id": image_id,
        **{name: sidecar.get(name) for name in columns},
        "prompt_hash": sha256_of(sidecar.get("prompt") or ""),
        "charged": record.get("charged"),
        "host": record.get("host"),
    }


# === Pipeline: plans_of, make, finish, deliver; and recover, which is the same steps again ===
#
# Every door hands an Order to `plans_of` and the plans to a `Runner`. A Run is one attempt: the
# adapter's Context on one side, the journal's entry on the other. The entry is opened before
# anything is sent and closed when nothing is left to do; whatever ends in between leaves it open.

DELIVERY_S = 30.0  # for object, row and usage of one image
PROMPT_LETTERS = 32_000
ORDER_IMAGES = 1000
INPUTS = 16  # images of one order
INPUT_S = 120.0  # to fetch them


class Plan(NamedTuple):
    """One image with every choice made and everything checked that needs no key and no network."""

    request: Request  # as written, its backend named and its seed drawn
    styled: Request  # what the adapter sees
    price: Price
    parameters: Fields  # what would be sent, as far as it is known
    parallel: int
    record: Record  # how the journal entry will begin
    pay_again: bool = False


def order_hash(order: Order, sidecar: Sidecar) -> str:
    """The hash of what a door asked for; how many, where to and how private do not count."""
    fields = order._asdict()
    for name in ("n", "key", "caller", "pay_again", "output", "cloud", "strict"):
        del fields[name]
    fields["backend_opts"] = dict(order.backend_opts)
    fields["images"] = [image["sha256"] for image in sidecar.get("inputs", [])]
    fields["mask"] = sidecar.get("mask", {}).get("sha256")
    return sha256_of(json.dumps(fields, sort_keys=True))


def plans_of(order: Order, config: Config) -> list[Plan]:
    """The plans for all images of an order: the one way in, for every door.

    Nothing is opened or sent. BadRequest or BadConfig for what can be known to fail before.
    """
    # 1. What no backend could mean.
    check_order(order)
    refuse_keys(order, config)
    # 2. What was left open: seed, backend, cloud.
    seed = order.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4)) >> 1
        if order.key:
            seed = int(keyed_id(order.caller, order.key, 0)[-8:], 16) >> 1
    request = order.request()._replace(backend=order.backend or config.default_backend)
    cls, options = options_of(request.backend, config.backends, request.backend_opts)
    takes = cls.takes(options)
    if order.images or order.mask or order.strength:
        request = with_inputs(order, request, takes, config)
    styled = with_aspect(apply_style(request, config.styles), takes, order.strict)
    check_request(styled)
    mode = order.cloud or config.output.cloud_sync
    synced = mode == "on" or (mode == "auto" and not cloud_settings_missing(config))
    # 3. A plan for each image. One moment for all names: of the files, and of the objects.
    now = time.time()
    plans = []
    for number in range(order.n):
        request = request._replace(seed=seed + number)
        styled = styled._replace(seed=request.seed)
        price = cls.price(options, styled)
        parameters = cls.plan(options, styled)
        if order.n > 1 and parameters.get("seed", 0) is None:
            cure = 'name its place in the backend\'s block, as nodes: {seed: "3.seed"}'
            raise BadRequest(f"{order.n} equal images: the workflow has no place for a seed", cure)
        storage = ""
        if synced:
            storage = render_name("{date}/{slug}-{seed}", request, now)
        model = getattr(options, "model", None)
        record: Record = {
            "name": image_name(order.output, request, config.output, now),
            "paid": cls.paid,
            "price": price.usd,
            "owner": config.owner_user_id,
            "private": order.cloud == "off",
            "storage": storage,
            "sidecar_wanted": config.output.write_metadata_json,
            "strict": order.strict,
            "unmet": takes.unmet(request),
            "sidecar": first_sidecar(request, styled, model, price.usd),
        }
        if price.usd is not None and cls.paid:
            record["sidecar"]["cost_source"] = price.source.partition(" ")[0]
        if order.tags:
            record["sidecar"]["tags"] = [*order.tags]
        if order.key:
            record["id"] = keyed_id(order.caller, order.key, number)
            record["key"] = order.key
            record["ordered"] = order_hash(order, record["sidecar"])
        plan = Plan(
            request=request,
            styled=styled,
            price=price,
            parameters=parameters,
            parallel=getattr(options, "parallel", 1),
            record=record,
            pay_again=order.pay_again,
        )
        plans.append(plan)
    return plans


def with_aspect(request: Request, takes: Takes, strict: bool) -> Request:
    """The request with the nearest aspect that the backend offers, and none beside a size.

    BadRequest where it is `strict`, and sure to come otherwise than asked for.
    """
    unmet = takes.unmet(request)
    if request.width:
        request = request._replace(aspect="")
    if request.aspect and takes.aspects:
        ratio = ratio_of(request.aspect)
        offered = nearest_aspect(ratio, takes.aspects)
        if off_by(ratio_of(offered), ratio) > ASPECT_TOLERANCE:
            unmet.append(f"aspect {request.aspect} (the nearest is {offered})")
        request = request._replace(aspect=offered)
    if unmet and strict:
        message = f"{request.backend} cannot take {', '.join(unmet)}"
        raise BadRequest(message, "without --strict it comes as near as it can")
    return request


def with_inputs(order: Order, request: Request, takes: Takes, config: Config) -> Request:
    """The request with its inputs copied and checked."""
    sweep_inputs()
    ctx = Context(INPUT_S)
    mask = None
    if order.mask:
        mask = input_of(order.mask, ctx)
    images = tuple(input_of(source, ctx) for source in order.images[:INPUTS])
    request = request._replace(images=images, mask=mask)
    others = []
    for name in config.backends:
        with suppress(ImagenError):
            cls, options = options_of(name, config.backends)
            check_inputs(request, cls.takes(options), ())
            others.append(name)
    check_inputs(request, takes, others)
    return request


def image_name(output: str, request: Request, config: OutputConfig, now: float) -> str:
    """The absolute name of an image; `output`: FILE, DIR/, or "" for what the config says."""
    name = full_path(output) if output else path_setting(config.directory)
    if "{ext}" in os.path.dirname(name):
        raise BadRequest(f"{name}: {{ext}} is known too late for a folder")
    if output and not output.endswith("/") and not os.path.isdir(name):
        return name
    check_template(config.naming)
    return os.path.join(name, render_name(config.naming, request, now))


def check_order(order: Order) -> None:
    """BadRequest where an order cannot be meant by any backend."""
    check_request(order.request())
    check_text("\n".join(order.tags), "tags")
    if max(map(len, order.tags), default=0) > 200:
        raise BadRequest("a tag has at most 200 characters")
    if not 1 <= order.n <= ORDER_IMAGES:
        raise BadRequest(f"n is 1 to {ORDER_IMAGES}")
    if len(order.images) > INPUTS:
        raise BadRequest(f"{len(order.images)} images to start from; {INPUTS} are the most")
    if not re.fullmatch(r".{0,200}", order.key) or not order.key.isprintable():
        raise BadRequest("key: 1 to 200 printable characters")
    if order.seed is not None and not 0 <= order.seed <= 2**63 - order.n:
        raise BadRequest(f"seed {order.seed}: 0 to 2^63-1")


def check_text(text: str, place: str) -> None:
    """BadRequest for what is no text: halves of characters, and NUL, which no database takes."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        message = f"{place}: no valid Unicode behind {text[: problem.start][-20:]!r}"
        raise BadRequest(message, "write it in UTF-8") from None
    if "\0" in text:
        raise BadRequest(f"{place}: a NUL stands behind {text.partition(chr(0))[0][-20:]!r}")


def check_request(request: Request) -> None:
    """BadRequest where a request, as written or dressed by a style, cannot be meant."""
    check_text(request.prompt, "prompt")
    check_text(request.negative_prompt, "negative_prompt")
    if not request.prompt.strip():
        raise BadRequest("the prompt is empty", 'imagen generate "a fox in the snow"')
    letters = len(request.prompt)
    if letters > PROMPT_LETTERS:
        raise BadRequest(f"the prompt has {letters} characters; {PROMPT_LETTERS:,} are the most")
    if fault := size_fault(request.width, request.height):
        raise BadRequest(fault, "--size 1024x1024")
    if not 0 <= request.steps <= 500:
        raise BadRequest(f"steps {request.steps}: 0 to 500")
    form = r"[1-9]\d{0,3}(\.\d{1,3})?:[1-9]\d{0,3}(\.\d{1,3})?"
    aspect = request.aspect or "1:1"
    if not re.fullmatch(form, aspect) or off_by(ratio_of(aspect), 1.0) > 8:
        raise BadRequest(f"aspect {aspect}: not W:H from 1:8 to 8:1", "--aspect 16:9")
    if (request.format, request.background) == ("jpeg", "transparent"):
        raise BadRequest("format jpeg: has no transparent background", "png and webp have")
    check_text(request.quality, "quality")


def check_limits(order: Order, limits: LimitsConfig) -> None:
    """BadRequest where an order of somebody else names what is not for them."""
    if limits.backends and order.backend not in ("", *limits.backends):
        raise BadRequest(f'backend "{order.backend}": not one that a request may name')


def refuse_keys(order: Order, config: Config) -> None:
    """BadRequest where an order holds a key in use: what is written is kept and sent unchanged."""
    # One that no block has to name.
    variables = {config.supabase.service_key_env, "OPENAI_API_KEY"}
    for block in config.backends.values():
        if cls := BACKENDS.get(str((block or {}).get("type"))):
            for field in marked(cls.Options, KEY):
                variable = block.get(field) or cls.Options._field_defaults.get(field)
                variables.add(str(variable))  # whatever the block of another backend holds there
            access = access_of(block)
            variables.update([access.basic_auth_env, *access.headers_env.values()])
    for variable in variables:
        if value := os.environ.get(variable, "").strip():
            Secret(value)
    text = f"{order.prompt}\n{order.negative_prompt}\n{order.backend_opts}{order.tags}"
    if redact(text) != text:
        raise BadRequest("the prompt or an option holds a key that is in use", "take it out")


class Run(Context):
    """One attempt: the context of its adapter, and the journal entry that outlives it."""

    entry: Entry
    paid: bool
    price = Price()
    budget = BudgetConfig()
    spent: dict[str, float]  # by the command: its entries, and the USD that count for each
    begun = False  # whether there is an entry
    began_elsewhere = False  # by a process that has ended, so nobody knows how long it took
    _spool: Spool | None = None
    _delivery: Context | None = None
    stop_pending = False  # until the remote has given an id, or the image
    _cleaned = False  # of hidden names

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.spent = {}
        self.id = new_uuid()
        self.image_id = self.id  # a job's attempts have ids of their own
        self.job = ""

    def stop(self, why: str) -> None:
        """End the work, and the delivery after it.

        A paid POST that nobody can take back is waited for.
        """
        # A paid POST has left, and there is no id yet by which to cancel it.
        if why == "user" and self.charged == "unknown" and not self.remote_ids:
            self.stop_pending = True
            return
        super().stop(why)
        if self._delivery and why != "deadline":
            self._delivery.stop(why)

    def delivery(self) -> Context:
        """The context of what comes after the work: a deadline of its own, but the same stop."""
        self._delivery = Context(DELIVERY_S, self._on_progress, self._on_warning)
        if self.why not in ("", "deadline"):
            self._delivery.stop(self.why)
        return self._delivery

    @property
    def record(self) -> Record:
        """What its entry says."""
        return self.entry.record

    @property
    def is_open(self) -> bool:
        """Whether there is an entry, and it is ours."""
        return self.begun and self.entry.is_locked

    def begin(self, plan: Plan) -> None:
        """Open the journal entry: from here on nothing is forgotten."""
        at = now_iso()
        self.id = plan.record.get("id", self.id)
        record: Record = {
            "id": self.id,
            "at": at,
            "host": socket.gethostname(),
            **plan.record,
            "sidecar": {"image_id": self.image_id, "timestamp": at, **plan.record["sidecar"]},
        }
        if self.job:
            record["job"] = self.job
        self.adopt(Entry.create(record))
        self.began_elsewhere = False

    def adopt(self, entry: Entry) -> None:
        """Go on with an entry that somebody began."""
        # One whose first line is torn was killed before anything could be sent.
        record = entry.record
        record.setdefault("name", entry.path)
        record.setdefault("sidecar", {})
        self.entry = entry
        self.begun = True
        self.began_elsewhere = True
        self._cleaned = False
        self.id = record["id"]
        self.image_id = record["sidecar"].get("image_id") or self.id
        self.job = record.get("job") or ""
        self.paid = bool(record.get("paid"))
        self.charged = record.get("charged") or "no"
        self.remote_ids = dict(record.get("remote") or {})
        # The image's names before it has its own: complete, growing, and where it grows when the
        # target's disk is full.
        self.hidden = os.path.join(os.path.dirname(record["name"]), f".imagen-{self.id}")
        self.part = f"{self.hidden}.part"
        self.answer = state_path("open", f"{self.id}.answer")
        self.fallback = state_path("open", f"{self.id}.part")
        self.answer_fallback = f"{self.hidden}.answer"
        # Where bytes of this attempt may lie without a name: the image first, then answers.
        images = (self.hidden, self.part, self.fallback)
        self.hidden_files = (*images, self.answer, self.answer_fallback)

    # Every paid POST passes here, whoever asked for it. What may forbid it stands before the note:
    # once that is on disk, the attempt counts as sent.
    def sending(self) -> None:
        """On disk before the first byte of a paid POST leaves: the one gate to money.

        Disk, and nothing is sent, where that fails.
        """
        self.check()
        self.reserve()
        self.fence()
        with or_disk(self.entry.path, "nothing was sent: the journal has to come first"):
            self.entry.note(
                durable=True,
                sending=now_iso(),
                charged="unknown",
                body=self.identity,
            )
        self.charged = "unknown"

    def reserve(self) -> None:
        """Have the price count for whoever shares a budget; OverBudget where it is too much."""
        budget = self.budget._asdict().items()
        limits = {name: most for name, most in budget if isinstance(most, float)}
        usd = self.price.most()
        if usd is None and self.budget.unknown == "refuse":
            raise OverBudget("nobody knows the price before", "budget.unknown: allow")
        if usd == 0 or not limits:
            return
        with or_disk(state_path("ledger.jsonl"), "a budget needs it"), locked_ledger():
            self.spent.pop(self.id, None)  # of the POST that was turned away
            year, month, day, *_ = time.localtime(time.time())
            # Since when each of these counts, and until when.
            periods = {
                "per_day": ((year, month, day), (year, month, day + 1)),
                "per_month": ((year, month, 1), (year, month + 1, 1)),
            }
            for name, most in limits.items():
                left = most
                hint = "--max-cost, or budget, says how much"
                if name == "per_command":
                    left -= sum(self.spent.values())
                elif name in periods:
                    begin, end = periods[name]
                    left -= self._spent_since(begin)
                    until = time.localtime(time.mktime((*end, 0, 0, 0, 0, 0, -1)))
                    hint = time.strftime("more from %Y-%m-%d 00:00 on", until)
                # What has no price passes for as long as anything is left.
                if (usd or 1e-6) > round(left, 6):
                    message = f"budget.{name}: ${usd or 0:g} of the ${max(0, left):g} that are left"
                    raise OverBudget(message, hint)
            self.entry.note(reserved=usd)
            self.spent[self.id] = usd or 0.0

    def _spent_since(self, begin: tuple[int, ...]) -> float:
        if fault := journal_fault():
            raise fault
        spent = 0.0
        # Also what is later than now: a clock that was set back frees nothing.
        for record in attempts(needle='"paid": true', warn=self.warn, under_way=True):
            own = record["id"] == self.id and record.get("at") == self.record["at"]
            sent = time.localtime(epoch(record.get("sending") or record.get("at", "")))
            if not own and sent[:3] >= begin:
                spent += cost_of(record)[1]
        return spent

    def fence(self) -> None:
        """What else has to be on record elsewhere; a job's receipt, in its row."""

    def settle(self, charged: Charged) -> None:
        """The remote said whether this costs money."""
        if charged != self.charged:
            self.charged = charged
            self.note_best_effort(charged=charged)

    def remote(self, **ids: Any) -> None:
        """The remote's ids, on disk before any wait where money hangs on them."""
        super().remote(**ids)
        self.note_best_effort(durable=self.paid, remote=cleaned(ids))
        if self.stop_pending and "id" in ids:
            super().stop("user")

    def note_best_effort(self, durable: bool = False, **line: Any) -> bool:
        """A line that is worth having, but not worth losing an image for; whether it is on disk."""
        try:
            self.entry.note(durable, **line)
            return True
        except (TypeError, ValueError, RecursionError) as problem:
            reason = str(problem)  # metadata that is no JSON would spoil every later line
        except OSError as problem:
            reason = problem.strerror or str(problem)
            merge_line(self.record, line)
        self.warn(f"journal: {self.entry.path}: {reason}")
        return False

    def spool(self) -> Spool:
        """A new spool in the target folder, in place of an earlier one."""
        if self._spool:
            self._spool.close()
        self._cleaned = False
        try:
            self._spool = Spool(self.part, self.fallback)
        except OSError:  # the folder has gone since it was checked, but its image has been paid
            self._spool = Spool(self.fallback, self.fallback)
        return self._spool

    def keep_answer(self, body: bytes | bytearray) -> None:
        """The body of a paid answer, in the state folder, or else beside the image to come.

        Only keys of ours that came back in it are taken out.
        """
        self._cleaned = False
        for spelling in KEY_SPELLINGS:
            body = body.replace(spelling.encode(), b"***")
        try:
            with Spool(self.answer, self.answer_fallback) as spool:
                spool.write(body)
                os.fsync(spool.fileno())
        except OSError as problem:  # half of it would take the room that the image needs
            unlink_quietly(self.answer)
            unlink_quietly(self.answer_fallback)
            self.warn(f"{self.answer}: {problem.strerror}; the answer is in memory alone")

    def kept_answer(self) -> bytes:
        """What `keep_answer` has kept of this attempt."""
        return read_bytes(self.answer) or read_bytes(self.answer_fallback)

    def complete_image_path(self) -> str:
        """Where a complete image of this entry lies without its name; "" where there is none."""
        for path in self.hidden_files[:3]:
            with suppress(OSError), open(path, "rb") as file:
                sniffed = sniff(file)
                if sniffed and sniffed.complete:
                    return path
        return ""

    def clean(self) -> None:
        """Unlink the hidden names, unless that was done."""
        if not self._cleaned:
            for path in (*self.hidden_files, f"{self.hidden}.json"):
                unlink_quietly(path)
        self._cleaned = True

    def close(self) -> None:
        """Move the entry to the ledger; where the disk refuses, it stays open and loses nothing."""
        if claim := self.record.get("claim"):
            release_claim(claim, self.image_id)
        if not self._keep_paid_bytes():
            self.entry.unlock()
            return
        # Hidden files go before the entry does: without it nobody would find them. A complete image
        # stays until the entry is safely in the ledger.
        if self._cleaned or not self.complete_image_path():
            self.clean()
        self.record["charged"] = self.charged
        try:
            self.entry.to_ledger()
            self.clean()
        except OSError as problem:
            self.warn(f"journal: {self.entry.path}: {problem.strerror}; the entry stays open")
            self.entry.unlock()

    def _keep_paid_bytes(self) -> bool:
        # What may have been paid for, and has no name yet, gets one: a person may see an image
        # where we do not. Copied, not moved, so that a full disk loses nothing.
        if self.charged == "no" or self._cleaned or self.record.get("path"):
            return True
        name = f"{self.record['name']}-{self.id[:8]}"
        for path in self.hidden_files:
            if not os.path.exists(path) or not os.path.getsize(path):
                continue
            with open(path, "rb") as source:
                sniffed = sniff(source)
                ending = sniffed.format if sniffed else "bin"
                number = 1
                while os.path.lexists(place := numbered(name, ending, number)):
                    number += 1
                try:
                    with Spool(place, place) as spool:
                        copy_into(source, spool)
                        os.fsync(spool.fileno())
                except OSError as problem:
                    self.warn(f"{place}: {problem.strerror}; what was paid for waits in {path}")
                    return False
            self.warn(f"the bytes that were paid for are kept in {place}")
        return True

    @contextmanager
    def recording_failure(self, backend: Backend | None = None) -> Iterator[None]:
        """What fails inside leaves as an ImagenError that knows its `charged`.

        The journal has it by then, and the entry is closed or let go.
        """
        try:
            yield
        except BaseException as problem:  # also SystemExit: an adapter that leaves so may have paid
            error = self._record_failure(as_error(problem), backend)
            raise error from (problem.__cause__ if isinstance(problem, ImagenError) else problem)

    def _record_failure(self, error: ImagenError, backend: Backend | None) -> ImagenError:
        # 1. Stop what goes on: the file here, the job there.
        if self._spool:
            self._spool.close()
        cancelled = False
        if backend and self.why == "user" and self.remote_ids:
            cancelled = self._cancel(backend)
        # 2. The error as the person will read it.
        ended = self._nothing_left(error, cancelled)
        message = self._failure_message(error, cancelled)
        kind = self._failure_kind(error, ended)
        hint = error.hint
        if not ended:
            hint = "; ".join(filter(None, (hint, f"imagen recover {self.id}")))
        elif kind is Unknown:
            sending = self.record.get("sending")
            hint = f"sent {sending}: the backend's usage page tells more; this entry is closed"
        error = kind(message, hint, charged=self.charged, after=error.after)
        # 3. The entry: kept for `deliver`, which reports what it cost, for `recover`, or closed.
        self.note_best_effort(
            charged=self.charged, error={"code": error.code, "message": str(error)}
        )
        to_report = missing_uploads(self.record)
        if ended and to_report:
            self.note_best_effort(over=True)
        elif ended:
            self.close()
        elif not to_report:
            self.entry.unlock()
        return error

    # Whether a failed attempt leaves nothing to recover, so that its entry may close:
    #
    #   a complete image is on disk                                    no
    #   the remote says it is over, refused it, or cancelled it        yes
    #   not charged: turned away, or never known at the remote         yes
    #   anything else (maybe charged; a free job that may still run)   no
    def _nothing_left(self, error: ImagenError, cancelled: bool) -> bool:
        if self.complete_image_path():
            return False
        if cancelled or isinstance(error, Ended | Refused):
            return True
        turned_away = isinstance(error, BadRequest | BadConfig | Quota | Busy)
        return self.charged == "no" and (turned_away or not self.remote_ids)

    def _failure_kind(self, error: ImagenError, ended: bool) -> type[ImagenError]:
        if self.began_elsewhere and self.charged == "unknown" and isinstance(error, Ended):
            return Unknown  # nobody has kept what came of it
        if not ended and self.charged != "no" and not isinstance(error, Interrupted | Disk):
            return Unknown
        if self.remote_ids and isinstance(error, Unreachable | Busy):
            return Failed  # free, but sent, so asking again would make it twice
        return type(error)

    def _failure_message(self, error: ImagenError, cancelled: bool) -> str:
        message = f"{self.record['sidecar'].get('backend', '')}: {error}"
        if self.began_elsewhere:
            message = f"{self.id[:8]}, {message}"
        if self.remote_ids and not isinstance(error, Ended | Refused):
            for key in self.remote_ids:
                if key.endswith("id"):
                    message += f" ({self.remote_ids[key]})"
        if cancelled:
            message += "; cancelled there"
        if self.paid:
            outcomes = {"no": "not charged", "yes": "charged", "unknown": "maybe charged"}
            message += f"; {outcomes[self.charged]}"
        return message

    def _cancel(self, backend: Backend) -> bool:
        fresh = Context(timeout=3.0)
        fresh.charged = self.charged
        try:
            backend.cancel(fresh, self.remote_ids)
        except Exception as problem:
            self.warn(f"{backend.name}: could not be cancelled: {problem}")
            return False
        self.settle(fresh.charged)
        return True


def styled_request(sidecar: Sidecar) -> Request:
    """What an adapter was asked for, by the sidecar of an attempt that has no image yet."""
    requested = sidecar["requested"]
    fields = {**requested, **sidecar}
    fields["prompt"] = sidecar["styled_prompt"]
    fields["steps"] = requested["steps"]
    fields["images"] = tuple(map(input_in, sidecar.get("inputs", ())))
    if mask := sidecar.get("mask"):
        fields["mask"] = input_in(mask)
    return request_of(fields)


def make(plan: Plan, config: Config, run: Run) -> Result:
    """The image out of its backend, behind a journal entry.

    What can be checked is checked before the entry is opened.
    """
    # All that needs no network fails here, while nothing is on record and nothing is paid.
    with run.recording_failure() if run.is_open else nullcontext():
        backend = open_backend(plan.request.backend, config.backends, plan.request.backend_opts)
        prepare_folder(os.path.dirname(plan.record["name"]))
    if not run.is_open:
        run.begin(plan)
    try:
        with run.recording_failure(backend):
            run.check()
            run.price = plan.price
            request = plan.styled
            return result_of(backend, run, request, lambda: backend.generate(run, request))
    except Unreachable as problem:  # so nothing was sent
        fallback = access_of(config.backends[backend.name]).fallback
        if not fallback or "fallback_from" in plan.record["sidecar"]:
            raise
        run.warn(f"{problem}; {fallback} makes it instead")
        run.begun = False
        return make(plan_instead(plan, fallback, config), config, run)


# An order with a key, and what is known of an image of it:
#
#   nothing, or failed and not charged             made now
#   somebody works on it                           waited for
#   left open                                      recovered; unknown where nobody can tell
#   made                                           that image; Disk where its file is gone
#   closed, charged or maybe charged, no image     Unknown; made again with `pay_again` alone
#   of another order                               KeyConflict
def earlier_image(plan: Plan, config: Config, run: Run) -> Record | None:
    """The image that an order with the same key got; None where it has to be made.

    The run has the entry then, so that nobody else makes it.
    """
    ident = plan.record["id"]
    while True:
        # 1. First the entry's name, then the ledger: between the two nobody can finish unseen.
        try:
            run.begin(plan)
        except Busy:
            path = state_path("open", f"{ident}.jsonl")
            entry = Entry.take(path)
            if not entry:
                check_readable(path)
                run.progress("waiting for who has the same key")
                run.sleep(0.2)
                continue
            known = entry.record
            # One whose first line is torn was never sent, and does not say what was ordered.
            if known.get("ordered") in (None, plan.record["ordered"]):
                if plan.pay_again and known.get("charged") == "unknown":
                    run.adopt(entry)
                    run.close()  # what it has left is in the ledger
                    continue
                if record := recover(entry, config, run):
                    return {**record, "reused": True}
                if entry.is_locked:  # over: the ledger has to know, and then says the rest
                    run.close()
                continue
            entry.unlock()
        else:
            odd: list[str] = []
            lines = attempts(needle=ident, warn=odd.append)
            # Who was killed between the two has left a later line, which says nothing.
            rows = [line for line in lines if line["id"] == ident]
            rows = [line for line in rows if "ordered" in line or not cost_nothing(line)]
            known = min(rows, key=cost_nothing, default=Record())
            if odd and cost_nothing(known):  # a damaged line may have told of more
                run.entry.discard()
                raise Unknown(f"the ledger has a damaged line with {ident}", odd[0])
            failed = cost_nothing(known)
            same = known.get("ordered") == plan.record["ordered"]
            if not known or (same and (failed or (plan.pay_again and "path" not in known))):
                return None
            run.entry.discard()
            run.begun = False
        # 2. What came of it.
        if known.get("ordered") != plan.record["ordered"]:
            raise KeyConflict(f"the key {plan.record['key']} was used for another request")
        image_path = known.get("path")
        if not image_path:
            message = f"the images of this key were sent for at {known.get('at')}"
            cure = "look at the backend's usage page; --pay-again makes them anew"
            raise Unknown(message, cure, charged=known.get("charged", "unknown"))
        if not os.path.exists(image_path):
            cure = (
                "put it back; another key (in a batch also another -o) makes it anew, for its price"
            )
            raise Disk(f"{image_path}: made for this key at {known.get('at')}, and gone", cure)
        return {**known, "reused": True}


def check_readable(path: str) -> None:
    """Unknown where there is an entry that nobody can read: it may have been paid for."""
    try:
        read_entry(path)
    except FileNotFoundError:  # finished meanwhile
        pass
    except (OSError, ValueError) as problem:
        message = f"{path}: {UNREADABLE}: {problem}"
        raise Unknown(message, "mend it, or move it away and look at the usage page") from None


def plan_instead(plan: Plan, name: str, config: Config) -> Plan:
    """The same image, under the same name, by the backend called `name`."""
    request = plan.request._replace(backend=name, backend_opts=EMPTY)
    tags = tuple(plan.record["sidecar"].get("tags", ()))
    [instead] = plans_of(Order(**request._asdict(), tags=tags), config)
    # Name, key and owner stay those of the order.
    record: Record = {
        **plan.record,
        "paid": instead.record["paid"],
        "price": instead.record["price"],
        "sidecar": instead.record["sidecar"],
        "unmet": instead.record["unmet"],
    }
    record["sidecar"]["fallback_from"] = plan.request.backend
    return instead._replace(record=record)


def finish(run: Run, result: Result) -> Record:
    """Save a result for good: checked, hidden, named, on record.

    Returns the record, with `path` and the whole sidecar.
    """
    with run.recording_failure():
        if run.paid:
            run.charged = "yes"
        latency = None
        if not run.began_elsewhere:
            latency = round((time.monotonic() - run.started) * 1000)
        image = result.image
        if isinstance(image, bytes | bytearray):
            image = io.BytesIO(image)
        with ExitStack() as stack:
            source = stack.enter_context(image)
            if isinstance(source, Spool):
                spool = source
            else:
                spool = stack.enter_context(run.spool())
                copy_into(source, spool)
            fields = cleaned({**result._asdict(), "image": None, "latency_ms": latency})
            seed = run.record["sidecar"].get("seed")
            fields["ignored"] += run.record.get("unmet", [])
            run.note_best_effort(charged=run.charged, sidecar=result_fields(fields, seed))
            sniffed = sniff(spool)
            if not sniffed:
                spool.seek(0)
                kind = Unknown if run.paid else Ended
                raise kind(f"the backend sent no image but {excerpt(spool.read(1 << 16), 60)}")
            if not sniffed.complete:
                if not run.paid:
                    raise Ended("the backend sent an image that breaks off")
                run.warn("the image breaks off; it was paid for, so what there is of it is kept")
        if spool.path == run.fallback:
            message = f"{run.hidden}: disk full or gone; the image waits in {spool.path}"
            raise Disk(message, "make room")
        return save(run, spool.path)


def open_further(run: Run, remote: Fields) -> Entry:
    """An entry of its own for one more image of a run's remote job."""
    record = run.record.copy()
    record["id"] = new_uuid()
    record["sidecar"] = {**record["sidecar"], "image_id": record["id"]}
    record["remote"] = dict(remote)
    return Entry.create(record)


def save(run: Run, place: str) -> Record:
    """From the complete image at `place` to its name, its sidecar and the record.

    The same steps after a kill at any of them.
    """
    # 1. Complete, durable and hidden, in the folder where it belongs.
    if place == run.fallback:
        prepare_folder(os.path.dirname(run.hidden))
        with open(place, "rb") as source, Spool(run.part, run.part) as spool:
            copy_into(source, spool)
    if place != run.hidden:
        with open(run.part, "rb") as file:
            os.fsync(file.fileno())
        os.rename(run.part, run.hidden)
    # 2. On record, before it has a name: a kill from here on is mended without the backend.
    record = run.record
    if claim := record.get("claim"):
        release_claim(claim, run.image_id)
    ending, sidecar = describe(run, run.hidden)
    run.note_best_effort(
        image={"file": run.hidden, "sha256": sidecar["sha256"], "bytes": sidecar["bytes"]}
    )
    if deviations := sidecar.get("deviations"):
        run.warn("; ".join(deviations.values()))
    # 3. Named, its sidecar first, and on record under that name.
    text = None
    if record.get("sidecar_wanted", True):
        text = to_json(sidecar, indent=2) + "\n"
    path = publish(
        run.hidden,
        record["name"],
        ending,
        text,
        lambda claimed: run.note_best_effort(claim=claimed),
    )
    if run.note_best_effort(path=path, sidecar=sidecar):
        run.clean()
    if text and not os.path.exists(f"{path}.json"):
        run.warn(f"{path}.json: the sidecar could not be written")
    return record


ASPECT_TOLERANCE = 1.01


def deviations_of(known: Sidecar, sniffed: Sniffed, file: BinaryIO) -> dict[str, str]:
    """What came otherwise than asked for, by its name, each for a person."""
    wishes = dict(known.get("requested", EMPTY))
    size = f"{sniffed.width}x{sniffed.height}"
    made = {"format": MIME_TYPES[sniffed.format].removeprefix("image/")}
    if known.get("width"):
        wishes["size"] = f"{known['width']}x{known['height']}"
        made["size"] = size
    elif sniffed.width and "aspect" in wishes:
        factor = off_by(ratio_of(wishes["aspect"]), ratio_of(size))
        if factor > ASPECT_TOLERANCE:
            made["aspect"] = size
    if wishes.get("background", "auto") != "auto":
        with suppress(ValueError, IndexError, struct.error, zlib.error):  # it breaks off
            made["background"] = background_of(file, sniffed.format) or wishes["background"]
    return {
        name: f"asked {wishes[name]}, got {made[name]}"
        for name in made
        if wishes.get(name, made[name]) != made[name]
    }


def object_path(storage: str, entry_id: str, ending: str) -> str:
    """Where the image of an entry lies in the bucket: nobody else's, and nobody can guess it."""
    return f"{storage}-{entry_id[:8]}.{ending}"


def describe(run: Run, path: str) -> tuple[str, Sidecar]:
    """The true ending of the image at `path`, and its whole sidecar."""
    record = run.record
    known = record["sidecar"]
    with open(path, "rb") as file:
        sniffed = sniff(file) or Sniffed("png")
        deviations = deviations_of(known, sniffed, file)
        file.seek(0)
        digest = sha256_of(file)
    seed = known["seed"]
    if run.paid and "ignored" not in known:  # the result was lost, and which seed was used with it
        seed = None
    storage_path = None
    if record.get("storage"):
        storage_path = object_path(record["storage"], run.id, sniffed.format)
    sidecar: Sidecar = {
        "latency_ms": None,
        "ignored": [],
        "metadata": {},
        **known,
        "seed": seed,
        "width": sniffed.width,
        "height": sniffed.height,
        "mime_type": MIME_TYPES[sniffed.format],
        "bytes": os.path.getsize(path),
        "sha256": digest,
        "charged": run.charged,
        "storage_path": storage_path,
        "imagen_version": __version__,
    }
    if deviations:
        sidecar["deviations"] = deviations
    if not sniffed.complete:
        sidecar["complete"] = False
    if record.get("private"):
        sidecar["private"] = True
    # In the order in which a person reads it.
    ordered = {key: sidecar[key] for key in Sidecar.__annotations__ if key in sidecar}  # type: ignore[literal-required]
    return sniffed.format, typing.cast(Sidecar, ordered)


def missing_uploads(record: Record) -> list[str]:
    """What the cloud still lacks of an attempt: object, row, usage; [] where it gets nothing."""
    if not record.get("storage"):
        return []
    parts = []
    if record.get("path") and not record.get("refused"):
        parts = [part for part in ("object", "row") if not record.get(part)]
    # Usage is reported once the attempt may have cost money, and again when that is known better.
    charged = record.get("charged", "no")
    reported = record.get("usage")
    known = reported in (charged, "for good")
    if record.get("paid") and not known and (reported or charged != "no"):
        parts.append("usage")
    return parts


def deliver(run: Run, config: Config) -> None:
    """What is left to do once an attempt is over: object, row, usage; then the ledger.

    Raises what failed, when the entry is closed (refused for good) or unlocked, for `sync` to go on
    with. A run without an entry, or that has let it go, gets nothing done.
    """
    if not run.is_open:
        return
    record = run.record
    try:
        upload_missing(run, config, ("object", "row", "usage"))
    finally:
        # An attempt of unknown outcome stays open: `recover` may still find its image.
        over = record.get("path") or record.get("over")
        if over and not missing_uploads(record):
            run.close()
        run.entry.unlock()


def upload_missing(run: Run, config: Config, parts: Sequence[str]) -> None:
    """Upload what is missing of `parts`, each noted once it is there; raises the first error."""
    # Asked anew after each step, since a step may find out that more, or less, is to be done.
    uploads = {"object": upload_object, "row": upload_row, "usage": upload_usage}
    record = run.record
    record["charged"] = run.charged
    if not record.get("owner") and config.owner_user_id:
        run.note_best_effort(owner=config.owner_user_id)
    ctx = run.delivery()
    errors = []
    while missing := [part for part in missing_uploads(record) if part in parts]:
        part = missing[0]
        try:
            cloud = Supabase(ctx, config.supabase, record["sidecar"].get("prompt", ""))
            uploads[part](run, cloud)
        except Exception as problem:  # nothing of the cloud fails a generation
            error = as_error(problem)
            final = isinstance(error, BadRequest)
            title = "usage" if part == "usage" else "cloud sync"
            hints = []
            if ctx.why != "deadline":  # which no --timeout moves
                hints.append(error.hint)
            if not final:
                hints.append("later: imagen sync")
            hint = "; ".join(filter(None, hints))
            errors.append(type(error)(f"{title}: {error}", hint))
            if not final:
                break
            # Refused for good: the next part may still go through.
            if part == "usage":
                run.note_best_effort(usage="for good")
            else:
                run.note_best_effort(refused=True)
    if errors:
        raise errors[0]


def upload_object(run: Run, cloud: Supabase) -> None:
    """Upload the image, to a path that holds this entry's id and is nobody else's."""
    record = run.record
    sidecar = record["sidecar"]
    image = record["path"]
    if not record.get("owner"):
        raise BadConfig(
            "owner_user_id is empty", "a UUID of auth.users: export IMAGEN_OWNER_USER_ID=…"
        )
    if not os.path.exists(image) and os.path.isdir(os.path.dirname(image)):
        raise BadRequest(f"{image} is gone")
    path = sidecar.get("storage_path") or ""
    if not _is_ours(path, run):
        # Of release 0.1.0, or of a sidecar that came alone. Its row tells if it was delivered.
        if uploaded := cloud.storage_path_of(run.image_id):
            run.note_best_effort(object=uploaded, row=True)
            return
        _, ending = os.path.splitext(image)
        path = object_path(record["storage"], run.id, ending[1:])
    with open(image, "rb") as file:
        if run.began_elsewhere:
            digest = sha256_of(file)
            if sidecar.get("sha256") not in (None, digest):
                raise BadRequest(f"{image} was changed since it was made")
        cloud.upload(path, file, sidecar["mime_type"], run.image_id)
    run.note_best_effort(object=path)


def upload_row(run: Run, cloud: Supabase) -> None:
    """Insert the image's row."""
    record = run.record
    if not _is_ours(record["object"], run) and not cloud.storage_path_of(run.image_id):
        # Release 0.1.0 put it at a path that may be somebody else's by now.
        run.note_best_effort(object="", sidecar={"storage_path": None})
        return
    try:
        run.note_best_effort(object=cloud.add_image(image_row(record)), row=True)
    except BadRequest:
        withdraw(run, cloud)
        raise


def withdraw(run: Run, cloud: Supabase) -> None:
    """Delete the object that will have no row, if its name says that it is this entry's."""
    path = run.record["object"]
    if _is_ours(path, run):
        cloud.delete_object(path)
        run.note_best_effort(object="")


def _is_ours(path: str, run: Run) -> bool:
    return f"-{run.id[:8]}." in path


def upload_usage(run: Run, cloud: Supabase) -> None:
    """Report what an attempt cost; again where that was not known the first time."""
    record = run.record
    reported: str = record["charged"]
    if not cloud.add_usage(usage_row(record)):
        reported = "for good"
    run.note_best_effort(usage=reported)


def recover(entry: Entry, config: Config, run: Run) -> Record | None:
    """End an entry that somebody left: its image's record, or None where nothing was ever sent.

    Bytes that are here come first, then the backend's memory. Unknown, with the entry closed, where
    nobody keeps it.
    """
    # 1. What only waits to be delivered.
    run.adopt(entry)
    record = entry.record
    if record.get("over"):
        return None
    if record.get("path"):
        run.clean()
        return record
    # 2. Bytes that are here, under a hidden name or under one that was being taken.
    if place := run.complete_image_path():
        with run.recording_failure():
            if run.paid:
                run.settle("yes")
            return save(run, place)
    if claimed := _claimed_image(run):
        return claimed
    # 3. What never left; then the backend, if the image has a folder to go to.
    if run.charged == "no" and not run.remote_ids:
        run.close()
        return None
    folder = os.path.dirname(run.hidden)
    if not os.path.isdir(folder):
        entry.unlock()
        message = f"{folder}: not there, and may hold the image"
        raise Disk(message, "mount or make it, then recover again")
    return finish(run, _resume(run, config))


def _claimed_image(run: Run) -> Record | None:
    # On a disk without hard links the image may have its name, and the journal not know it yet.
    record = run.record
    claim = record.get("claim")
    image = record.get("image")
    if not claim or not image or not os.path.exists(claim):
        return None
    _, sidecar = describe(run, claim)
    if sidecar["sha256"] != image["sha256"]:
        return None
    run.note_best_effort(path=claim, sidecar=sidecar)
    return record


def _resume(run: Run, config: Config) -> Result:
    record = run.record
    request = styled_request(record["sidecar"])
    backend = open_backend(request.backend, config.backends, request.backend_opts)
    request = with_aspect(request, backend.takes(backend.options), strict=False)
    others = []
    if "id" not in run.remote_ids:  # it is looked for, and must not be another attempt's
        others = [row.record for row in entries()] + [*attempts()]
    remote = {
        "since": record.get("sending", ""),
        "body": record.get("body"),
        "taken": [str(other["remote"].get("id")) for other in others if other.get("remote")],
        **run.remote_ids,
    }
    with run.recording_failure(backend):
        return result_of(backend, run, request, lambda: backend.resume(run, remote, request))


def strict_error(record: Record) -> Partial | None:
    """The error of an image that is safe, but not what a strict order asked for."""
    deviations = record["sidecar"].get("deviations")
    if not deviations or not record.get("strict"):
        return None
    message = f"{record['path']}: {'; '.join(deviations.values())}"
    return Partial(message, "it stays there", charged=record["sidecar"]["charged"])


def thumbnail_path(image_id: str) -> str:
    """Where the gallery keeps the small copy of an image."""
    cache = xdg_folder("XDG_CACHE_HOME", "~/.cache")
    return os.path.join(cache, "imagen", "thumbs", f"{image_id}.webp")


def delete_image(name: str, local: bool, config: Config) -> JsonObject:
    """Delete the row and the object of an image, and with `local` its files; what was deleted."""
    record = find_image(name) or Record()
    sidecar: Fields = record.get("sidecar") or {}
    image_id = sidecar.get("image_id", name)
    if not is_uuid(image_id):
        raise BadRequest(
            f"{name}: no image with a sidecar, and none that the journal knows", "see imagen list"
        )
    # 1. Nothing of it is delivered any more.
    run = Run(DELIVERY_S)
    entry_path = state_path("open", f"{record.get('id')}.jsonl")
    if entry := Entry.take(entry_path):
        run.adopt(entry)
        run.note_best_effort(refused=True)
    elif os.path.exists(entry_path):
        raise Busy(f"{name}: somebody works on it", "wait for that, then try again")
    path = None
    try:
        # 2. The cloud, unless it never had it.
        in_cloud = False
        set_up = not cloud_settings_missing(config._replace(owner_user_id="-"))
        if not sidecar.get("private") and (set_up or not local or record.get("row")):
            cloud = Supabase(Context(DELIVERY_S), config.supabase, sidecar.get("prompt", ""))
            in_cloud = cloud.delete_image(image_id)
            if entry and entry.record.get("object"):
                withdraw(run, cloud)
        # 3. This disk, and whatever lists its images.
        if local and record:
            path = record["path"]
            for file in (path, f"{path}.json", thumbnail_path(image_id)):
                with or_disk(file, "delete it by hand"), suppress(FileNotFoundError):
                    os.unlink(file)
            if entry:
                run.note_best_effort(deleted=now_iso())
            elif "host" in record:  # not of a sidecar that came alone
                add_to_ledger({**record, "deleted": now_iso()})
    finally:
        with suppress(ImagenError):  # what it cost may be reported later
            deliver(run, config)
    if not in_cloud and not local:
        raise BadRequest(f"{name} is not in the cloud", "--local deletes its file")
    return {"image_id": image_id, "cloud": in_cloud, "path": path}


# A run is in `active` until its image is made or has failed, then in `_undelivered` until the cloud
# has it. Both lists change under `changed`, so whoever waits on that sees every step.
class Runner:
    """Makes what waits, in daemon threads, and delivers it: the one way through, for every door.

    `changed` guards the lists and is notified at every step, progress included. The hooks on_… are
    called from the pool's threads, without the lock; a door overrides those that it needs.
    """

    # After these the images still waiting would fail alike.
    STOPPING_ERRORS: ClassVar[tuple[type[ImagenError], ...]] = (BadConfig, BadRequest, Disk, Quota)

    def __init__(
        self, items: Iterable[Any], config: Config, timeout: float = 600.0, parallel: int = 1
    ) -> None:
        self.waiting = list(items)
        self.config = config
        self.timeout = timeout
        self.parallel = parallel
        self.spent: dict[str, float] = {}
        self.active: dict[Run, Progress] = {}
        self.records: list[Record] = []  # of the images, in the order in which they were made
        self.errors: list[ImagenError] = []
        self.stopped = ""  # why
        self.changed = threading.Condition()
        self._undelivered: list[tuple[Run, Record | None]] = []
        self._making = 0  # threads
        self._delivering = False

    @property
    def left(self) -> int:
        """How many images are still to come."""
        return len(self.waiting) + len(self.active)

    @property
    def busy(self) -> bool:
        """Whether anything is being made or delivered."""
        return self._making > 0 or self._delivering

    def start(self) -> None:
        """Begin, with as many threads as may work at a time."""
        self._making = min(self.parallel, len(self.waiting))
        for _ in range(self._making):
            in_thread(self._pool_thread)

    def stop(self, why: str) -> None:
        """Nothing more begins, and what runs is stopped. Also from a signal handler: no lock."""
        # Who holds the lock may be the very thread that the signal has interrupted.
        self.stopped = self.stopped or why
        undelivered = [run for run, _ in self._undelivered]
        for run in [*self.active, *undelivered]:
            run.stop(why)

    def attempt(self, item: Any, run: Run) -> Record | None:
        """What to do with one item: make the image of a plan, or end an entry."""
        if isinstance(item, Entry):
            return recover(item, self.config, run)
        if "key" in item.record and (record := earlier_image(item, self.config, run)):
            return record
        result = make(item, self.config, run)
        # All have their entries before the first is saved, so a kill loses none.
        entries = [open_further(run, remote) for remote in result.others]
        with self.changed:
            self.waiting[:0] = entries
        return finish(run, result)

    def on_warning(self, text: str) -> None:
        """Something that a person should know."""

    def on_image(self, record: Record) -> None:
        """An image is safe on disk."""

    def on_error(self, error: ImagenError) -> None:
        """An attempt has failed."""

    def on_delivered(self, record: Record | None) -> None:
        """What was to be done after an attempt is done, or will be by `sync`; None: no image."""

    def _pool_thread(self) -> None:
        # Several threads share the list. Who finds it empty, or the work stopped, leaves.
        while True:
            with self.changed:
                if self.stopped or not self.waiting:
                    self._making -= 1
                    self.changed.notify_all()
                    return
                item = self.waiting.pop(0)
                run = Run(self.timeout, on_warning=self.on_warning)
                run._on_progress = functools.partial(self._progressed, run)
                run.budget = self.config.budget
                run.spent = self.spent
                self.active[run] = Progress()
            if self.stopped:  # a signal came between the two
                run.stop(self.stopped)
            self._run_one(item, run)

    def _run_one(self, item: Any, run: Run) -> None:
        record = None
        error: ImagenError | None = None
        try:
            record = self.attempt(item, run)
            if record:
                self.on_image(record)
                if error := strict_error(record):
                    self.on_error(error)
        except Exception as problem:  # a bug in one attempt must not take the others along
            error = as_error(problem)
            self.on_error(error)
        if run.id in self.spent:  # reserved; now it is known better
            _, self.spent[run.id] = cost_of(run.record)
        with self.changed:
            if record:
                self.records.append(record)
            if error:
                self.errors.append(error)
            if isinstance(error, self.STOPPING_ERRORS):
                self.waiting.clear()
            del self.active[run]
            # The cloud has a thread of its own: neither the answer nor the next image waits.
            self._undelivered.append((run, record))
            if not self._delivering:
                self._delivering = True
                in_thread(self._delivery_thread)
            self.changed.notify_all()

    def _delivery_thread(self) -> None:
        while True:
            with self.changed:
                if not self._undelivered:
                    self._delivering = False
                    self.changed.notify_all()
                    return
                # It stays in the list meanwhile, where `stop` finds it.
                run, record = self._undelivered[0]
            try:
                deliver(run, self.config)
            except Exception as problem:  # it stays in the journal
                error = as_error(problem)
                text = str(error)
                if error.hint:
                    text += f" ({error.hint})"
                self.on_warning(text)
            self.on_delivered(record)
            with self.changed:
                self._undelivered.pop(0)

    def _progressed(self, run: Run, progress: Progress) -> None:
        with self.changed:
            if run in self.active:
                self.active[run] = progress
                self.changed.notify_all()


# === Queue: imagen.jobs, one connection, one statement a turn ===

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
PG_VARIABLES = ("sslmode", "sslrootcert", "sslcert", "sslkey", "connect_timeout")
# Classes of SQLSTATE: after these one connects anew, and these no repeat can mend.
LOST = ("08", "25", "53", "57", "58", "XX")
MISCONFIGURED = ("28", "3D", "3F", "42")


def postgres_options(dsn: str) -> dict[str, str]:
    """The parts of `postgresql://user:password@host:port/database?sslmode=…`.

    Where the address is silent, the PG* variables count, and then libpq's defaults.
    """
    from urllib.parse import unquote

    parts = ("user", "password", "host", "port", "database")
    options = {}
    for name in (*parts, *PG_VARIABLES):
        options[name] = os.environ.get(f"PG{name.upper().replace('_', '')}", "")
    if dsn:
        login = r"(?:([^:/]*?)(?::([^/]*?))?@)?"
        place = r"(\[[^]]*\]|[^][@:/?]*)(?::(\d*))?"
        form = rf"postgres(?:ql)?://{login}{place}(?:/([^?@]*))?(?:\?(.*))?"
        match = re.fullmatch(form, dsn)
        if not match:
            raise BadConfig(
                "the database's address is not postgresql://user:password@host:port/database",
                "in user and password, / is %2F, @ is %40, : is %3A, % is %25",
            )
        *values, query = match.groups("")
        pairs: list[tuple[str, ...]] = [*zip(parts, values, strict=True)]
        pairs += [pair.partition("=")[::2] for pair in query.split("&")]
        for name, value in pairs:
            if value:
                options[{"dbname": "database"}.get(name, name)] = unquote(value)
    options["user"] = options["user"] or os.environ.get("USER", "postgres")
    defaults = {
        "host": "localhost",
        "port": "5432",
        "database": options["user"],
        "connect_timeout": f"{CONNECT_TIMEOUT:.0f}",
        "sslmode": "prefer",
    }
    modes: Sequence[str] = SSL_MODES
    if options["sslrootcert"] == "system":
        # The system's authorities certify anybody who owns a name: that has to be the right one.
        modes = SSL_MODES[-1:]
        defaults["sslmode"] = "verify-full"
    for name, value in defaults.items():
        options[name] = options[name] or value
    options["host"] = options["host"].strip("[]")
    if options["sslmode"] not in modes:
        raise BadConfig(f"sslmode {options['sslmode']}: {nearest(options['sslmode'], modes)}")
    host, port, patience = (options[name] for name in ("host", "port", "connect_timeout"))
    for number in (port, patience):
        if "," in host or not number.isdecimal() or not 0 < int(number) < 1 << 16:
            raise BadConfig(
                f"no database is at {host}:{port} (connect_timeout {patience})",
                "one host, one port",
            )
    return options


def postgres_tls(options: Strings) -> list[Any]:
    """The ssl_contexts to try one after the other, as libpq's sslmode means it.

    False is a connection without TLS.
    """
    import ssl

    class Watched(ssl.SSLSocket):
        def makefile(self, *_: Any, **__: Any) -> Any:
            return PgStream(self)

    mode = options["sslmode"]
    root = options["sslrootcert"]
    if mode == "disable" or options["host"].startswith("/"):
        return [False]
    usual_root = os.path.expanduser("~/.postgresql/root.crt")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = Watched
    context.check_hostname = mode == "verify-full"
    try:
        if root == "system":
            context.load_default_certs()
        elif root or mode.startswith("verify") or os.path.exists(usual_root):
            context.load_verify_locations(os.path.expanduser(root) or usual_root)
        else:
            context.verify_mode = ssl.CERT_NONE
        if options["sslcert"]:
            context.load_cert_chain(options["sslcert"], options["sslkey"] or None)
    except OSError as problem:
        raise BadConfig(f"sslmode {mode}: the certificates cannot be read: {problem}") from None
    order = {"allow": [False, context], "prefer": [context, False]}
    return order.get(mode, [context])


class PgStream:
    """What pg8000 reads and writes instead of a buffered file.

    A file of Python's would not tell what it has read ahead.
    """

    again: Callable[[], Any]  # makes another connection to the same place

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self._ahead = b""
        self._out = bytearray()
        sock.stream = self

    @classmethod
    def of(cls, connection: Any) -> PgStream | None:
        """The stream of a connection; None where a later pg8000 hides its socket elsewhere."""
        return getattr(getattr(connection, "_usock", None), "stream", None)

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes; OSError where the server hangs up, or is silent too long."""
        while len(self._ahead) < count:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._ahead += data
        data = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return data

    def write(self, data: bytes) -> None:
        """Collected until `flush`, so that a message is one packet."""
        self._out += data

    def flush(self) -> None:
        """Send what was written."""
        # Why a server hung up stands in its last message, which is read next.
        with suppress(ConnectionError):
            self.sock.sendall(self._out)
        self._out.clear()

    def close(self) -> None:
        """Nothing: the socket is closed by who opened it."""

    def arrived(self) -> bool:
        """Whether bytes that nobody has read are in this stream, or below it in the TLS layer."""
        return bool(self._ahead or getattr(self.sock, "pending", int)())


class PgSocket(socket.socket):
    """A TCP or Unix socket for pg8000, which asks it for its stream."""

    stream: PgStream | None = None

    def makefile(self, *_: Any, **__: Any) -> Any:
        """The stream that tells what has arrived."""
        return PgStream(self)


@contextmanager
def postgres(variable: str, patience: float | None = None) -> Iterator[Any]:
    """A connection of pg8000.native to the database that an environment variable names.

    It commits each statement. `patience`: seconds of silence that one answer may take;
    None: as many as it wants. What fails inside leaves as an ImagenError: Unreachable
    where the connection is gone. https://github.com/tlocke/pg8000
    """
    dsn = ""
    if os.environ.get(variable) or not os.environ.get("PGHOST"):
        dsn = secret_from(variable).reveal()
    options = postgres_options(dsn)
    Secret(options["password"])  # which no message shows from here on
    try:
        import pg8000.native as pg  # type: ignore[import-untyped]
    except ImportError:
        raise BadConfig("talking to Postgres needs pg8000", package_hint("pg8000")) from None
    place = f"Postgres at {options['host']}:{options['port']}"
    try:
        connection = _connected(pg, options)
        if stream := PgStream.of(connection):
            stream.sock.settimeout(patience)
            stream.again = lambda: _connected(pg, options)
        yield connection
    except pg.DatabaseError as problem:
        raise postgres_error(place, problem.args[0]) from None
    except (pg.Error, OSError, UnicodeError) as problem:
        raise Unreachable(f"{place}: {problem}", "is it running, and the address right?") from None
    finally:
        with suppress(UnboundLocalError, pg.Error, OSError):
            connection.close()


def postgres_error(place: str, fields: Fields) -> ImagenError:
    """What an error of the server means, by its SQLSTATE."""
    code = str(fields.get("C", ""))
    message = f"{place}: {fields.get('M')} ({code})"
    hint = str(fields.get("H") or "")
    if code in ("42P01", "42703", "3F000"):
        hint = "imagen migrate"
        if re.search(r'"(storage|auth)[".]', message):
            hint = (
                "this is no Supabase project, or one whose Storage is not set up: see its Dashboard"
            )
    if "Tenant or user not found" in message:
        hint = "its user is postgres.<ref>, its host your region's; or the project is paused"
        return BadConfig(message, hint)
    if code == "PT429":
        return Busy(message, hint)
    if code[:2] in MISCONFIGURED:
        return BadConfig(message, hint)
    if code[:2] in LOST:
        return Unreachable(message, hint)
    return Failed(message, hint)


def _connected(pg: Any, options: Strings) -> Any:
    host = options["host"]
    port = options["port"]
    places: list[tuple[int, Any]] = [(socket.AF_UNIX, f"{host}/.s.PGSQL.{port}")]
    if not host.startswith("/"):
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        places = [(family, address) for family, _, _, _, address in infos]
    for place in places:
        try:
            return _connected_to(pg, options, *place)
        except (pg.InterfaceError, OSError) as problem:
            # One that is silent, or not there, may have a neighbour that answers.
            if place != places[-1]:
                continue
            if {family for family, _ in places} == {socket.AF_INET6}:
                raise Unreachable(
                    f"Postgres at {host}:{port}, which has an IPv6 address alone: {problem}",
                    "where there is no IPv6, use the session pooler's address (port 5432)",
                ) from None
            raise
    raise AssertionError("there is at least one place")


def _connected_to(pg: Any, options: Strings, family: int, address: Any) -> Any:
    login = {name: options[name] for name in ("user", "host", "database", "password")}
    contexts = postgres_tls(options)
    for context in contexts:
        sock = PgSocket(family)
        try:
            sock.settimeout(float(options["connect_timeout"]))
            if family != socket.AF_UNIX:
                _set_up_tcp(sock)
            sock.connect(address)
            return pg.Connection(
                **login, sock=sock, ssl_context=context, application_name=f"imagen {__version__}"
            )
        except (pg.Error, OSError) as problem:
            sock.close()
            # The other way, with TLS or without, is tried where this one was refused: by
            # the server's TLS, or by its pg_hba.conf (28000). A wrong password stays wrong.
            final = isinstance(problem, ConnectionError | TimeoutError)
            if isinstance(problem, pg.DatabaseError):
                final = problem.args[0].get("C") != "28000"
            if final or context is contexts[-1]:
                raise
    raise AssertionError("postgres_tls gives at least one context")


def _set_up_tcp(sock: PgSocket) -> None:
    # Without NODELAY a long prompt waits 40 ms; without keepalive a dead peer is never noticed.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# Left out where any backend will do.
OF_BACKEND = "AND coalesce(j.backend, '') = b.backend"

# What a turn of the worker may have to do: one statement of these parts, one round trip,
# one commit. `me` is the process, `slot` its place on this host, `lease` seconds. `attempt`
# grows with each claim and never goes down, so (me, id, attempt) is a token that is good
# for one claim alone. All parts see the rows as they were before the statement, and no two
# of them may update the same row: each names another status, or other ids.
TURN = {
    # claims of mine whose answer never reached me
    "disowned": """disowned AS (
  UPDATE imagen.jobs SET finished_at = CASE WHEN cancel_requested THEN now() END,
    status = CASE WHEN cancel_requested THEN 'canceled' ELSE 'pending' END,
    max_attempts = least(max_attempts, 1000000) + 1,
    claimed_by = NULL, claimed_slot = NULL, lease_until = NULL
  WHERE status = 'running' AND claimed_by = :me::uuid AND NOT id = ANY(:mine::uuid[])
  RETURNING id, status)""",
    # outcomes; one that I wrote before, though the answer was lost, counts as written
    "settled": """outcome AS (
  SELECT * FROM jsonb_to_recordset(:outcomes::jsonb) AS o (id uuid, attempt int,
    status text, image text, error text, error_code text, delay float8, uncounted int,
    charged boolean, usd float8, note text, handed_back boolean)
), written AS (
  UPDATE imagen.jobs j SET image_id = (o.image::jsonb->>'id')::uuid,
    status = CASE WHEN o.status = 'pending' AND j.cancel_requested THEN 'canceled'
      ELSE o.status END,
    error = o.error, error_code = o.error_code, note = o.note,
    handed_back_at = CASE WHEN o.handed_back THEN coalesce(j.handed_back_at, now())
      ELSE j.handed_back_at END,
    progress = CASE o.status WHEN 'done' THEN 1 END,
    run_after = coalesce(now() + make_interval(secs => o.delay), j.run_after),
    finished_at = CASE WHEN o.status <> 'pending' OR j.cancel_requested THEN now() END,
    max_attempts = least(j.max_attempts, 1000000) + coalesce(o.uncounted, 0),
    receipt = CASE WHEN o.charged
      THEN j.receipt || jsonb_strip_nulls(jsonb_build_object('usd', o.usd)) END,
    claimed_by = CASE WHEN o.status <> 'pending' THEN j.claimed_by END,
    claimed_slot = NULL, lease_until = NULL
  FROM outcome o WHERE j.id = o.id AND j.attempt = o.attempt
    AND j.claimed_by = :me::uuid AND j.status = 'running'
  RETURNING j.id, j.attempt, j.status, o.image
), image AS (
  INSERT INTO imagen.images (id, owner_user_id, prompt, prompt_hash, backend, model, seed,
    steps, width, height, latency_ms, cost_usd_estimate, storage_path, sidecar)
  SELECT i.id, i.owner_user_id, i.prompt, i.prompt_hash, i.backend, i.model, i.seed,
    i.steps, i.width, i.height, i.latency_ms, i.cost_usd_estimate, i.storage_path, i.sidecar
  FROM written, jsonb_populate_record(NULL::imagen.images, written.image::jsonb) i
  WHERE written.image IS NOT NULL
  ON CONFLICT (id) DO NOTHING
), settled AS (
  SELECT id, attempt, status FROM written UNION ALL
  SELECT j.id, j.attempt, j.status FROM imagen.jobs j
  JOIN outcome o ON j.id = o.id AND j.attempt = o.attempt
  WHERE j.claimed_by = :me::uuid AND j.status = o.status AND j.status <> 'running')""",
    # leases renewed; a job that does not come back is not mine any more. A receipt is
    # written with it, under the same fence, and never over one that may have been paid for:
    # `stands` says whether it is in the row now. Nor where it is the attempt's first, and its
    # owner's receipts of this day, with those before it in this statement, leave less than its
    # `usd`: then `left` says how much. Without a price it passes for as long as anything is left.
    "renewed": """beat AS (
  SELECT b.*, j.owner_user_id, j.seq, CASE WHEN b.receipt IS NOT NULL
    AND (j.receipt->>'attempt')::int IS DISTINCT FROM b.attempt
    THEN nullif(coalesce((b.receipt::jsonb->>'usd')::float8, 0.000001), 0) END AS usd
  FROM jsonb_to_recordset(:heartbeats::jsonb) AS b (id uuid, attempt int, progress real,
    note text, receipt text, unpaid int[]) JOIN imagen.jobs j USING (id)
), priced AS (
  SELECT b.*, (SELECT :usd_per_day::float8 - coalesce(sum((r.receipt->>'usd')::float8), 0)
      - (SELECT coalesce(sum(o.usd), 0) FROM beat o
         WHERE o.owner_user_id = b.owner_user_id AND o.seq < b.seq)
    FROM imagen.jobs r WHERE b.usd IS NOT NULL AND :usd_per_day::float8 IS NOT NULL
      AND r.owner_user_id = b.owner_user_id AND r.receipt IS NOT NULL
      AND r.started_at > date_trunc('day', now()) - interval '1 day'
      AND (r.receipt->>'at')::timestamptz >= date_trunc('day', now())
      AND NOT EXISTS (SELECT FROM beat o WHERE o.id = r.id AND o.usd IS NOT NULL)) AS rest
  FROM beat b
), renewed AS (
  UPDATE imagen.jobs j SET progress = b.progress, note = b.note,
    lease_until = now() + make_interval(secs => :lease::float8),
    receipt = CASE WHEN b.usd > b.rest + 1e-9 THEN j.receipt
      WHEN j.receipt IS NULL OR (j.receipt->>'attempt')::int = ANY(b.unpaid)
      THEN coalesce(b.receipt::jsonb, j.receipt) ELSE j.receipt END
  FROM priced b
  WHERE j.id = b.id AND j.attempt = b.attempt AND j.claimed_by = :me::uuid
    AND j.status = 'running'
  RETURNING j.id, j.receipt = b.receipt::jsonb AS stands,
    CASE WHEN b.usd > b.rest + 1e-9 THEN greatest(0, b.rest) END AS left,
    date_trunc('day', now()) + interval '1 day' AS until)""",
    "to_cancel": """to_cancel AS (
  SELECT id FROM imagen.jobs
  WHERE id = ANY(:mine::uuid[]) AND claimed_by = :me::uuid AND cancel_requested)""",
    # jobs of the dead: of who held my slot, for certain; of the original worker, which knew
    # no leases; and those whose lease ran out while the server, and my way to it, were
    # there long enough to have seen it renewed. What was paid for may be fetched by a
    # few attempts more. It may be the job that kills: so it comes back later each time, and
    # is `lost` from now on.
    "rescued": """dead AS (
  SELECT * FROM imagen.jobs
  WHERE status = 'running' AND claimed_by IS DISTINCT FROM :me::uuid AND (
    claimed_slot = :slot
    OR (claimed_by IS NULL
        AND coalesce(started_at, created_at) < now() - make_interval(secs => :lease::float8))
    OR (lease_until < now() AND :steady::boolean
        AND pg_postmaster_start_time() < now() - make_interval(secs => :lease::float8)))
  LIMIT 50 FOR UPDATE SKIP LOCKED
), rescued AS (
  UPDATE imagen.jobs j SET status = next.status, lost = j.lost + 1,
    run_after = CASE next.status WHEN 'pending'
      THEN now() + make_interval(secs => 2 ^ least(j.lost + 1, 8)) ELSE j.run_after END,
    finished_at = CASE WHEN next.status <> 'pending' THEN now() END,
    error = format('its worker was lost in attempt %s of %s', j.attempt, j.max_attempts),
    error_code = CASE next.status WHEN 'failed' THEN 'failed'
      WHEN 'canceled' THEN 'interrupted' END,
    claimed_by = NULL, claimed_slot = NULL, lease_until = NULL
  FROM dead, LATERAL (SELECT CASE WHEN dead.cancel_requested THEN 'canceled'
    WHEN dead.attempt >= dead.max_attempts + CASE WHEN dead.receipt IS NULL THEN 0 ELSE 3 END
    THEN 'failed' ELSE 'pending' END AS status) next
  WHERE j.id = dead.id
  RETURNING j.id, j.status, extract(epoch FROM j.run_after - now()) AS delay)""",
    # of the jobs whose images wait here for the cloud: those that nobody will run again
    "ended": """ended AS (
  SELECT id FROM imagen.jobs
  WHERE id = ANY(:undelivered::uuid[]) AND status NOT IN ('pending', 'running'))""",
    # and those whose images the cloud has taken by now
    "delivered": """handed_in AS (
  UPDATE imagen.jobs j SET status = 'done', image_id = d.image_id::uuid,
    error = NULL, error_code = NULL, note = NULL
  FROM jsonb_each_text(:images::jsonb) AS d (id, image_id)
  WHERE j.id = d.id::uuid AND j.image_id IS NULL AND j.status IN ('done', 'failed')
    AND EXISTS (SELECT FROM imagen.images WHERE id = d.image_id::uuid)
), delivered AS (SELECT * FROM jsonb_each_text(:images::jsonb) AS d (id, image_id))""",
    # what was handed back for so long that nobody will make it: of backends paused here, and
    # of all, where "" is
    "given_up": """given_up AS (
  UPDATE imagen.jobs j SET status = 'failed', finished_at = now(), error_code = p.code,
    error = format('handed back for %s s, since no worker was able to: %s', :give_up, p.code)
  FROM jsonb_each_text(:paused::jsonb) AS p (name, code)
  WHERE j.status = 'pending' AND p.name IN ('', coalesce(nullif(j.backend, ''), :default))
    AND j.handed_back_at < now() - make_interval(secs => :give_up::float8)
  RETURNING j.id)""",
    "waiting": """waiting AS (
  SELECT count(*) AS number FROM (
    SELECT FROM imagen.jobs WHERE status = 'pending' LIMIT 1000) first)""",
    # new jobs: of the highest priority, of the owner with the fewest running, who has waited
    # for the longest time, the one that is due for the longest time; and one of each owner
    # before a second. The index is read at one place for each owner and priority (`pair`),
    # however many jobs wait there. A `lost` job runs with nothing beside it: until nothing
    # runs here, it lets none of those behind it pass.
    "claimed": """pair AS (
  SELECT b.backend, first.* FROM unnest(:backends::text[]) AS b (backend), LATERAL (
    SELECT j.owner_user_id, j.priority, j.run_after, j.seq FROM imagen.jobs j
    WHERE j.status = 'pending' AND coalesce(j.backend, '') = b.backend
    ORDER BY j.owner_user_id, j.priority, j.run_after, j.seq LIMIT 1) first
  UNION ALL
  SELECT b.backend, next.* FROM pair b, LATERAL (
    SELECT j.owner_user_id, j.priority, j.run_after, j.seq FROM imagen.jobs j
    WHERE j.status = 'pending' AND coalesce(j.backend, '') = b.backend
      AND (j.owner_user_id, j.priority) > (b.owner_user_id, b.priority)
    ORDER BY j.owner_user_id, j.priority, j.run_after, j.seq LIMIT 1) next
), at_work AS (
  SELECT owner_user_id, count(*) AS number FROM imagen.jobs WHERE status = 'running' GROUP BY 1
), turn AS (
  SELECT b.*, coalesce(number, 0) AS running,
    (SELECT max(started_at) FROM imagen.jobs j WHERE j.owner_user_id = b.owner_user_id) AS served
  FROM pair b LEFT JOIN at_work USING (owner_user_id)
  WHERE b.run_after <= now() AND coalesce(number, 0) < coalesce(:per_owner::int, 1000000)
  ORDER BY b.priority DESC, running, served NULLS FIRST, b.run_after, b.seq LIMIT :free::int
), candidate AS (
  SELECT b.*, next.*, row_number() OVER (PARTITION BY b.owner_user_id
    ORDER BY b.priority DESC, next.due, next.number) AS nth
  FROM turn b, LATERAL (
    SELECT j.id, j.run_after AS due, j.seq AS number, j.lost FROM imagen.jobs j
    WHERE j.status = 'pending' AND coalesce(j.backend, '') = b.backend
      AND j.owner_user_id = b.owner_user_id AND j.priority = b.priority AND j.run_after <= now()
    ORDER BY j.run_after, j.seq LIMIT :free::int FOR UPDATE SKIP LOCKED) next
), choice AS (
  SELECT id, row_number() OVER line AS place, bool_or(lost > 0) OVER line AS behind_lost
  FROM candidate WHERE running + nth <= coalesce(:per_owner::int, 1000000)
  WINDOW line AS (ORDER BY priority DESC, running + nth,
    CASE nth WHEN 1 THEN served ELSE now() END NULLS FIRST, due, number
    ROWS UNBOUNDED PRECEDING)
), claimed AS (
  UPDATE imagen.jobs j SET status = 'running', attempt = least(j.attempt, 2147483646) + 1,
    claimed_by = :me::uuid, claimed_slot = :slot, started_at = now(),
    lease_until = now() + make_interval(secs => :lease::float8),
    progress = NULL, note = NULL, error = NULL, error_code = NULL
  WHERE j.id = ANY(ARRAY(SELECT id FROM choice
    WHERE place <= :free::int AND (NOT behind_lost OR (place = 1 AND :alone::boolean))))
  RETURNING j.id, j.attempt, j.max_attempts, j.priority, j.seq, j.lost,
    to_jsonb(j)::text AS fields), missed AS (
  SELECT FROM turn WHERE NOT EXISTS (SELECT FROM candidate c WHERE c.backend = turn.backend
    AND (c.owner_user_id, c.priority) = (turn.owner_user_id, turn.priority)))""",
}
# A job as JSON that any reader takes: options that none would, as rows from before there was a
# check of them may have, are text here.
JOB_JSON = """to_jsonb(j) || CASE WHEN backend_opts @? 'strict $.**{17}'
    OR length(backend_opts::text) > 4000 THEN jsonb_build_object('backend_opts',
      left(backend_opts::text, 4000)) ELSE '{}' END"""
# Parts that make jobs pending, and where: no trigger rings for these.
WAKING = {"disowned": "disowned", "settled": "written", "rescued": "rescued"}

Rows = dict[str, list[Any]]  # by the name of the part that gave them


def no_rows() -> Rows:
    """What a turn brings that brings nothing."""
    return {part: [] for part in (*TURN, "woken", "missed")}


@functools.cache
def turn_sql(any_backend: bool, *parts: str) -> str:
    """One statement of these parts of TURN, which also rings for jobs that become pending.

    What is in a row may be anybody's: it comes as text, and pg8000 has nothing to decode.
    """
    selects = [f"SELECT '{part}', to_jsonb({part})::text FROM {part}" for part in parts]  # noqa: S608 (names of our own)
    for part in WAKING.keys() & parts:
        ring = "SELECT 'woken', to_jsonb(pg_notify('imagen_jobs', '')::text)::text"
        selects.append(f"{ring} FROM {WAKING[part]} WHERE status = 'pending'")
    if "claimed" in parts:
        selects.append("SELECT 'missed', 'true' FROM missed")
    names = ", ".join(TURN[part] for part in parts)
    sql = f"WITH RECURSIVE {names} {' UNION ALL '.join(selects)}"
    if any_backend:
        sql = sql.replace(OF_BACKEND, "")
    return sql


class Queue:
    """imagen.jobs through one connection, which belongs to one thread."""

    def __init__(self, connection: Any, **always: Any) -> None:
        """`always`: the parameters that stay: me, slot, lease, backends, default."""
        self.connection = connection
        self.always = {"alone": True, "per_owner": None, "usd_per_day": None, **always}
        self.notified = False
        self._claiming = False
        self._prepared: JsonObject = {}
        # pg8000 does not promise what we lean on: its table of handlers here, its socket in
        # PgStream.of. Without them the server can only be asked, now and then.
        handlers = getattr(connection, "message_types", None)
        self.stream = PgStream.of(connection)
        patience = 0.0
        if handlers is None or not self.stream:
            self.stream = None
        else:
            patience = self.stream.sock.gettimeout() or 0.0
            handlers[b"A"] = self._on_notification
            handlers[b"2"] = self._on_bind_complete
        # Before the first claim, or the jobs in between are not heard of.
        connection.run("LISTEN imagen_jobs")
        self._check()
        connection.run(
            # Nothing of ours is done after we gave up.
            f"SET statement_timeout = {900 * patience:.0f}; "
            "SET default_transaction_isolation = 'read committed'; "
            "SET idle_session_timeout = 0; SET idle_in_transaction_session_timeout = 0; "
            # Jobs come faster than statistics of them: planned once, by the indexes, a claim
            # reads no more than it needs. No ORDER BY of ours needs a sort of many rows:
            # `enable_sort = off` would only make the estimate so high that each poll is compiled.
            "SET enable_seqscan = off; SET enable_bitmapscan = off; "
            "SET plan_cache_mode = force_generic_plan"
        )

    def _on_notification(self, *_: Any) -> None:
        # The stock handler dies of a payload that is not ASCII, in the middle of an answer.
        self.notified = True

    def _on_bind_complete(self, *_: Any) -> None:
        # A claim sees the jobs of all notifications up to now.
        if self._claiming:
            self.notified = False
            self._claiming = False

    def _check(self) -> None:
        """BadConfig where notifications do not come through."""
        key = getattr(self.connection, "_backend_key_data", None) or b""
        pid = int.from_bytes(key[:4], "big")
        if not self.stream or self.connection.run("SELECT pg_backend_pid()") == [[pid]]:
            return
        # A pooler is in between, which may keep notifications for itself: ring ourselves.
        other = self.stream.again()
        other.run("NOTIFY imagen_jobs")
        other.close()
        if not self.wait(2.0):
            raise BadConfig(
                "notifications do not arrive: the address leads to a transaction pooler "
                "(port 6543?), which forgets LISTEN",
                "use the direct connection, or the session pooler",
            )

    def run(self, sql: str, **params: Any) -> list[Any]:
        """The rows of a statement, which is prepared once; one round trip from then on."""
        if sql not in self._prepared:
            self._prepared[sql] = self.connection.prepare(sql)
        return list(self._prepared[sql].run(**{**self.always, **params}) or ())

    def turn(self, **parts: Fields) -> Rows:
        """Do these parts of TURN, each with its parameters, in one transaction; their rows."""
        params = dict(self.always)
        for part in parts.values():
            params.update(part)
        sql = turn_sql(not params["backends"], *[part for part in TURN if part in parts])
        params["backends"] = params["backends"] or [""]
        if params["default"] in params["backends"]:  # which a row need not name
            params["backends"] = [*params["backends"], ""]
        rows = no_rows()
        self._claiming = "claimed" in parts
        if not params["per_owner"] and params["usd_per_day"] is None:
            result = self.run(sql, **params)
        else:  # who else claims, or pays, counts what does so before us, or after
            self.connection.run("BEGIN; SELECT pg_advisory_xact_lock(hashtext('imagen claims'))")
            try:
                result = self.run(sql, **params)
            except Exception:
                self.connection.run("ROLLBACK")
                raise
            self.connection.run("COMMIT")
        for part, row in result:
            rows[part].append(json.loads(row))
        return rows

    def wait(self, timeout: float, *bells: socket.socket) -> bool:
        """Wait for a notification or a bell; whether the server sent something, or may have."""
        import select

        notified = self.notified
        self.notified = False
        sockets = list(bells)
        if self.stream:
            sockets.append(self.stream.sock)
            # What was read ahead is in no socket any more, so nothing would wake us.
            notified = notified or self.stream.arrived()
        else:
            timeout = min(timeout, 0.25)
        if notified:
            timeout = 0
        ready, _, _ = select.select(sockets, [], [], max(0.0, timeout))
        for bell in bells:
            if bell in ready:
                bell.recv(4096)
        return notified or not self.stream or self.stream.sock in ready


# === Worker: takes jobs, keeps their leases, hands their images in ===
#
# The main thread owns the connection and does everything in the database, a turn at a
# time. A job runs in a thread of its own, by `make`, `finish` and `deliver` as an image of
# any other door, and rings the bell when it wants something written.

BACKLOG_S = 60.0  # seconds between two looks for images that the cloud would not take
# What a job may fail with, uncharged, because its worker is broken: that is looked into.
PROBE_BYTES = 1 << 20  # a quota shows in writing alone
STALLING = ("config", "unreachable", "disk", "quota")
REPEAT_S = 60.0  # seconds between two lines of the log about the same failure


class JobRow(TypedDict):
    """A claimed job: what the main thread needs of it, and the rest as the text that it came in."""

    id: str
    seq: int
    priority: int
    attempt: int
    max_attempts: int
    lost: int  # attempts whose worker was lost
    fields: str  # the whole row, for `read_row`


class Outcome(TypedDict, total=False):
    """What is to be written of an attempt that is over."""

    status: str
    image: str | None  # its row of imagen.images, as JSON
    error: str
    error_code: str
    delay: float  # seconds until it may run again
    uncounted: int  # attempts that shall not count
    charged: bool  # it was, or may have been: the receipt stays
    usd: float  # which the receipt says from then on
    note: str
    handed_back: bool  # since this worker is not able to


class Receipt:
    """A receipt on its way into the row, as JSON; once `answered`, what the `row` says of it."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.sent_at = 0.0
        self.row: Fields = EMPTY  # whether it stands there, and else what its owner has left
        self.answered = threading.Event()


def job_uuid(job: str, name: object) -> str:
    """The id of what belongs to a job: its image, or, by a number, the entry of an attempt."""
    import uuid

    return str(uuid.uuid5(uuid.UUID(job), str(name)))


class Attempt(Run):
    """One claimed job at work: what its thread and the main thread share.

    What somebody else wrote, in the row or in an answer, becomes values and JSON in the job's
    own thread, which alone fails where it cannot.
    """

    owner: str
    order: Order
    earlier_receipt: Fields | None  # what an earlier attempt may have paid

    def __init__(self, worker: Worker, row: JobRow) -> None:
        super().__init__(worker.config.worker.job_timeout_s, self._show, self._warn)
        self.worker = worker
        self.row = row
        self.number = row["attempt"]
        self.job = row["id"]
        self.budget = worker.config.budget
        self.shown: JsonObject = {"note": None, "progress": None}
        self.written = self.shown  # what of it stands in the row
        self.image_exists = False  # too late to cancel
        self.unpaid = [self.number]  # attempts whose receipt may be written over
        self.receipt = Receipt()
        self.receipt.answered.set()  # there is none yet
        self.receipt_sent = self.receipt  # the one of the last heartbeat
        self.settled = threading.Event()
        self.was_ours = False  # once settled: the outcome was written, under the fence

    def read_row(self) -> None:
        """Take in what the row says; BadRequest where nobody can read it."""
        self.id = job_uuid(self.job, self.number)
        self.image_id = job_uuid(self.job, "image")
        try:
            columns = json.loads(self.row["fields"])
        except (ValueError, RecursionError) as problem:
            raise BadRequest(f"the row cannot be read: {problem}") from None
        fields = {name: columns[name] for name in Request._fields if columns.get(name) is not None}
        self.inputs = columns.get("inputs") or []  # paths in the bucket
        self.mask = fields.pop("mask", None) or ""
        fields.setdefault("seed", int(self.job[-8:], 16) & 0x7FFFFFFF)
        self.order = Order(**fields)
        self.owner = columns["owner_user_id"]
        self.earlier_receipt = columns["receipt"]

    def _warn(self, text: str) -> None:
        self.worker.say(f"{self.job}: {text}", 4)

    def _show(self, progress: Progress) -> None:
        share = None
        if progress.done is not None and progress.total:
            # Rounded: what is next to nothing is more than a `real` can say.
            share = round(max(0.0, min(1.0, progress.done / progress.total)), 4)
        self.shown = {"note": progress.note[:200], "progress": share}

    def fence(self) -> None:
        """The receipt stands in the row, under the fence, before a paid POST leaves."""
        receipt = self.renew_receipt()
        while not receipt.answered.wait(0.5):
            self.check()
        left = receipt.row.get("left")
        if left is not None:
            message = f"limits.per_owner.usd_per_day: ${left:g} are left, and not"
            usd = self.price.most() or 0
            raise OverBudget(f"{message} ${usd:g}", f"more at {receipt.row['until']}")
        # Who was frozen since it was sent may have lost the lease that it was good for.
        lease_end = receipt.sent_at + self.worker.config.worker.lease_s
        if not receipt.row.get("stands") or time.monotonic() > lease_end:
            self.stop("lost")
            self.check()  # which raises

    def remote(self, **ids: Any) -> None:
        """The remote's ids: on this disk at once, in the row with the main thread's next turn."""
        super().remote(**ids)
        if self.paid:
            self.renew_receipt()

    def renew_receipt(self) -> Receipt:
        """Have written what another worker needs to fetch what this one pays for."""
        # Nobody waits for an earlier one any more, and this one says all that it said.
        fields = {
            "attempt": self.number,
            "at": self.record["at"],
            "remote": cleaned(self.remote_ids),
            "usd": self.price.most(),
        }
        self.receipt = Receipt(to_jsonb(fields))
        self.worker.ring()
        return self.receipt

    def heartbeat(self) -> JsonObject:
        """What the main thread is about to write of this job, and a receipt that waits."""
        self.written = self.shown
        fields = {"id": self.job, "attempt": self.number, **self.written}
        self.receipt_sent = receipt = self.receipt
        if not receipt.answered.is_set():
            receipt.sent_at = time.monotonic()
            fields["unpaid"] = self.unpaid
            fields["receipt"] = receipt.text
        return fields

    def settle_job(self, outcome: Outcome) -> bool:
        """Have the outcome written, however long Postgres is away; whether the row was ours."""
        if outcome.get("charged") and self.begun:
            known, usd = cost_of(self.record)
            if known != "reserved":  # which the receipt says already
                outcome["usd"] = usd
        self.worker.outcomes.append((self, outcome))
        self.worker.ring()
        self.settled.wait()
        return self.was_ours


class Turn(NamedTuple):
    """What is to be done in one turn."""

    parts: Mapping[str, Fields]  # of TURN, with their parameters
    finished: Sequence[tuple[Attempt, Outcome]] = ()
    renewed: Sequence[Attempt] = ()
    free: int = 0  # slots for new jobs

    def split(self) -> list[Turn]:
        """The same a job and a part at a time."""
        turns = [turn_of_outcomes([pair]) for pair in self.finished]
        turns += [renewing([run]) for run in self.renewed]
        for part, params in self.parts.items():
            if part not in ("settled", "renewed"):
                turns.append(Turn({part: params}, free=self.free))
        return turns


def turn_of_outcomes(finished: Sequence[tuple[Attempt, Outcome]]) -> Turn:
    """The turn that writes these outcomes."""
    rows = []
    for run, outcome in finished:
        rows.append({"id": run.job, "attempt": run.number, **outcome})
    return Turn({"settled": {"outcomes": to_jsonb(rows)}}, finished=finished)


def renewing(runs: Sequence[Attempt]) -> Turn:
    """The turn that renews the leases of these jobs."""
    heartbeats = to_jsonb([run.heartbeat() for run in runs])
    return Turn({"renewed": {"heartbeats": heartbeats}}, renewed=runs)


class Worker:
    """Claims jobs, runs them, and writes what became of them.

    `say(text, priority)` tells of each event.
    """

    def __init__(
        self,
        config: Config,
        say: Callable[..., None],
        concurrency: int,
        name: str,
        backends: Sequence[str],
    ) -> None:
        check_worker(config.worker)
        # Whose the images are stands in the rows.
        self.uncloudy = "; ".join(cloud_settings_missing(config._replace(owner_user_id="-")))
        if config.output.cloud_sync == "on" and self.uncloudy:
            raise BadConfig(f"output.cloud_sync is on: {self.uncloudy}")
        if self.uncloudy:
            say(f"not in the cloud: {self.uncloudy}", 4)
        self.config = config
        self.say = say
        self.concurrency = concurrency
        self.me = new_uuid()
        self.backends = list(backends) or None
        self.slot, self._slot_lock = take_slot(name)
        self.running: dict[str, Attempt] = {}
        self.outcomes: list[tuple[Attempt, Outcome]] = []
        self.undelivered: dict[str, str] = {}  # job: its entry, whose image waits for the cloud
        self.delivered: dict[str, str] = {}  # job: its image, which the cloud has now
        self.begun = False  # there was a database with imagen.jobs in it
        self.stops = 0
        self.stopping_at = 0.0
        self.waiting = 0
        # A bell that `select` can watch beside the connection; it is never waited for here.
        self._bell, self._bell_rope = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_rope.setblocking(False)
        self._threads: list[threading.Thread] = []
        self._backlog_thread: threading.Thread | None = None
        self._backlog_at = 0.0
        # Backend ("": all): the code of what is broken here. Replaced, never changed: two
        # threads look at it.
        self.paused: dict[str, str] = {}
        self._stalling = threading.Lock()
        self._pause = 0.05
        self._reached_at = 0.0  # by the last turn that was done
        self._steady_since = 0.0  # the server was reached again and again, by any connection
        self._greeted = False  # since the last failure that was told of
        self._failure = ""  # the last that was told of
        self._failure_at = 0.0  # when it was
        self._failures = 0  # of all kinds

    def ring(self) -> None:
        """Wake the main thread."""
        with suppress(BlockingIOError):
            self._bell_rope.send(b"!")

    def on_signal(self, *_: Any) -> None:
        """The first: no more claims. The second: hand back what is running."""
        self.stops += 1
        self.stopping_at = self.stopping_at or time.monotonic()
        self.ring()

    @property
    def is_over(self) -> bool:
        """Told to stop, and nothing left to do or to write."""
        return bool(self.stops) and not self.running and not self.outcomes

    def serve(self, once: bool = False) -> None:
        """Work until a signal says stop, or, with `once`, until no job waits.

        Postgres may come and go meanwhile.
        """
        lease_s = self.config.worker.lease_s
        url_env = self.config.supabase.database_url_env
        while not self.is_over:
            # 1. Work for as long as there is a connection.
            try:
                with postgres(url_env, patience=lease_s / 2) as connection:
                    queue = Queue(
                        connection,
                        me=self.me,
                        slot=self.slot,
                        lease=lease_s,
                        backends=self.backends,
                        default=self.config.default_backend,
                        per_owner=self.config.limits.per_owner.running or None,
                        usd_per_day=self.config.limits.per_owner.usd_per_day,
                    )
                    self.run_turns(queue, once)
                    break
            except Exception as caught:  # jobs in hand go on, whatever happened here
                problem = as_error(caught)
                if isinstance(problem, BadConfig) and not self.begun:
                    raise
                # Spread, or all workers come back in the same moment. Never longer than a
                # quarter of the lease: once Postgres is back, ours runs out for the others.
                spread = 0.5 + os.urandom(1)[0] / 255
                wait_s = min(lease_s / 4, self._pause * spread)
                self.failed(str(problem), f"; next try in {wait_s:.1f} s")
            # 2. Leave, where there is nothing more to wait for. The journal has what is left,
            # and whoever takes this slot goes on with it.
            self.stop_overdue()
            if self.may_leave_unwritten():
                break
            # 3. Wait for the next try, or for a signal.
            sd_notify(f"WATCHDOG=1\nSTATUS=no database; {len(self.running)} running")
            self._bell.settimeout(wait_s)
            with suppress(TimeoutError):
                self._bell.recv(4096)
            self._pause = min(5.0, self._pause * 2)
        sd_notify("STOPPING=1")
        patience = 1.0
        if self.stops < 2 and not self.outcomes:
            patience = DELIVERY_S
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def failed(self, failure: str, then: str = "") -> None:
        """Tell of a failure once; of the same one again as a number, now and then."""
        now = time.monotonic()
        self._failures += 1
        if failure != self._failure or now > self._failure_at + REPEAT_S:
            self.say(f"{failure}{then} (failure {self._failures})", 4)
            self._greeted = False
            self._failure = failure
            self._failure_at = now

    def reached(self) -> None:
        """The server has done a turn: neither it nor the way to it is what fails."""
        now = time.monotonic()
        if not self.is_steady(now):
            self._steady_since = now
        self._reached_at = now
        self._pause = 0.05
        if not self._greeted:
            self._greeted = True
            self.say(f"connected, listening ({self._failures} failures so far)")

    def is_steady(self, now: float) -> bool:
        """Whether a living worker, cut off since our last turn, still has its lease."""
        return now < self._reached_at + self.config.worker.lease_s / 3

    def may_leave_unwritten(self) -> bool:
        """Whether, without a database, all that runs is over and the time to write it is too."""
        at_work = {*self.running.values()} - {run for run, _ in self.outcomes}
        return self.must_hand_back() and all(run.why for run in at_work)

    def must_hand_back(self) -> bool:
        """Whether the signals leave jobs no more time."""
        grace_is_over = time.monotonic() > self.stopping_at + self.config.worker.grace_s
        return self.stops > 1 or (self.stops == 1 and grace_is_over)

    def stop_overdue(self) -> None:
        """Stop what has had its time since the first signal, to be handed back."""
        for run in self.running.values():
            overdue = self.must_hand_back()
            # Who paid, and has no id to find it again by, has until its own deadline.
            if self.stops == 1 and run.charged != "no" and not run.remote_ids:
                overdue = run.left() < 0
            if overdue:
                run.stop("released")

    def run_turns(self, queue: Queue, once: bool) -> None:
        """Turn after turn until nothing is left to do.

        An error leaves what is unwritten for the next connection.
        """
        tick = min(1.0, self.config.worker.heartbeat_s)
        self._last_heartbeat = 0.0
        self._poll_at = 0.0
        self._more_expected = True  # jobs that are due, as far as we know
        # Who was away with Postgres may take now what it would not take then.
        self._backlog_at = min(self._backlog_at, time.monotonic() + 2.0)
        if not self.begun:
            queue.run("SELECT lost FROM imagen.jobs LIMIT 0")  # or nobody has migrated it
        # Claims whose answer was lost with the last connection go back before anything else.
        rows = queue.turn(disowned={"mine": [*self.running]})
        self.apply_turn(rows, Turn({}))
        self.begun = True
        while not self.is_over:
            # 1. Wait for a notification, a thread of ours, or the time of the next turn.
            can_claim = self._more_expected and len(self.running) < self.concurrency
            if not self.outcomes and not can_claim:
                timeout = min(5.0, self._poll_at - time.monotonic())
                if self.running:
                    timeout = min(tick, timeout)
                self._more_expected |= queue.wait(timeout, self._bell)
            # 2. One round trip with all that is to be done.
            turn = self.plan_turn(time.monotonic())
            if turn.parts:
                self.run_turn(queue, turn)
                self.reached()
            elif self._more_expected:
                # Nothing is free for what we were told of: only take in what the server sent.
                queue.connection.run("")
                self._more_expected = False
            # 3. What does not need the database.
            self.stop_overdue()
            sd_notify(f"READY=1\nWATCHDOG=1\nSTATUS={self.status()}")
            if once and not (self._more_expected or self.running or self.outcomes):
                return

    def status(self) -> str:
        """What `systemctl status` says."""
        parts = [f"{len(self.running)} running, {self.waiting} pending"]
        parts += [f"paused: {name or 'all'} ({code})" for name, code in self.paused.items()]
        if self.uncloudy:
            parts.append(f"not in the cloud: {self.uncloudy}")
        return "; ".join(parts)

    def plan_turn(self, now: float) -> Turn:
        """What is to be done now, all in one turn."""
        settings = self.config.worker
        # 1. Outcomes, each after its last receipt: what another fetches it by stands there.
        finished = []
        for run, outcome in self.outcomes[:]:
            if run.receipt.answered.is_set() or self.running.get(run.job) is not run:
                finished.append((run, outcome))
        parts: dict[str, Fields] = {}
        if finished:
            parts.update(turn_of_outcomes(finished).parts)
        # 2. Leases: of all when it is time, sooner where progress is to be shown; and at once
        # of those whose POST waits for its receipt.
        ended = {run for run, _ in finished}
        busy = [run for run in self.running.values() if run not in ended]
        interval = settings.heartbeat_s
        if any(run.shown != run.written for run in busy):
            interval = min(1.0, interval)
        renewed = [run for run in busy if not run.receipt.answered.is_set()]
        if busy and now >= self._last_heartbeat + interval:
            renewed = busy
            self._last_heartbeat = now
        if renewed:
            parts.update(renewing(renewed).parts)
        mine = {"mine": [*self.running]}
        if busy and (renewed or self._more_expected):
            parts["to_cancel"] = mine
        # 3. The safety poll: whatever a notification did not tell of. A claim may come true
        # late, by a statement that was given up here while it waited for a lock there.
        polling = now >= self._poll_at
        if polling:
            parts["disowned"] = mine
            steady = self.is_steady(now) and now > self._steady_since + settings.lease_s
            parts["rescued"] = {"steady": steady}
            parts["waiting"] = {}
            if self.paused:
                params = {"paused": to_jsonb(self.paused), "give_up": settings.give_up_s}
                parts["given_up"] = params
            self._poll_at = now + min(settings.poll_s, settings.lease_s / 6)
        # 4. The backlog of images that the cloud would not take.
        if self.delivered:
            parts["delivered"] = {"images": to_jsonb(dict(self.delivered))}
        if self.undelivered:
            parts["ended"] = {"undelivered": [*self.undelivered]}
        # 5. New jobs, for the slots of the finished ones too. What has taken a worker along
        # runs alone.
        free = self.concurrency - len(busy)
        if self.stops or "" in self.paused or any(run.row["lost"] for run in busy):
            free = 0
        backends = self.backends
        if self.paused:
            backends = [*{*(backends or self.config.backends)} - self.paused.keys()]
        if free and (backends or not self.paused) and (self._more_expected or polling or finished):
            parts["claimed"] = {"free": free, "alone": not busy, "backends": backends}
        return Turn(parts, finished, renewed, free)

    def run_turn(self, queue: Queue, turn: Turn) -> None:
        """Do a turn, and see to what it brought."""
        from pg8000.native import DatabaseError

        try:
            rows = queue.turn(**turn.parts)
        except DatabaseError as problem:
            fields = problem.args[0]
            if fields["C"][:2] in (*LOST, *MISCONFIGURED):
                raise
            # Something in one row: each job by itself, and it fails alone.
            alone = turn.split()
            if len(alone) > 1:
                for part in alone:
                    self.run_turn(queue, part)
            else:
                self.refused(queue, turn, f"{fields['C']} {fields['M']}")
            return
        self.apply_turn(rows, turn)
        # More may wait than there was room for, or than was there when we looked.
        # And to a claim of the same turn, what has finished still ran: its owner may go on now.
        self._more_expected = (
            bool(rows["woken"])
            or 0 < turn.free == len(rows["claimed"])
            or bool(turn.finished and self.config.limits.per_owner.running)
        )
        if rows["missed"]:  # somebody else had these locked, and will have taken them
            self._poll_at = min(self._poll_at, time.monotonic() + 0.05)

    def refused(self, queue: Queue, turn: Turn, reason: str) -> None:
        """The database does not take the one thing that a turn was to write."""
        self.failed(f"refused by the database: {', '.join(turn.parts)}: {reason}")
        self._greeted = True  # the way to it is as it was
        self._more_expected = False  # the next poll tries it again
        for run, outcome in turn.finished:
            # Without its image, then without any word of others, then not at all.
            if outcome.get("image"):
                outcome["image"] = None
                outcome["error"] = clipped(f"imagen.images: {reason}")
            elif outcome.get("error_code") != "bug":
                outcome["error"] = ""
                outcome["delay"] = 0.0
                outcome["status"] = "failed"
                outcome["error_code"] = "bug"
            else:
                self.apply_turn(no_rows(), turn)
                return
            self.run_turn(queue, turn_of_outcomes([(run, outcome)]))
        for run in turn.renewed:
            run.stop("lost")
            self.forget(run)

    def apply_turn(self, rows: Rows, turn: Turn) -> None:
        """See to what a turn brought."""
        # 1. Outcomes: written, or fenced off.
        written = {}
        for row in rows["settled"]:
            written[row["id"], row["attempt"]] = row["status"]
        for run, outcome in turn.finished:
            status = written.get((run.job, run.number))
            message = "its lease was lost: not written"
            if status:
                message = f"{status} {outcome.get('error', '')}".strip()
            self.say(f"{run.job}: {message}")
            if "delay" in outcome:  # no notification tells when it is due
                self._poll_at = min(self._poll_at, time.monotonic() + outcome["delay"])
            self.outcomes.remove((run, outcome))
            self.forget(run)
            run.was_ours = status is not None
            run.settled.set()
        # 2. Leases: renewed, or lost; and the receipts that went with them.
        renewed = {row["id"]: row for row in rows["renewed"]}
        for run in turn.renewed:
            if run.job not in renewed:
                self.say(f"{run.job}: its lease was lost", 4)
                self.forget(run)
                run.stop("lost")
            if not run.receipt_sent.answered.is_set():
                run.receipt_sent.row = renewed.get(run.job, EMPTY)
                run.receipt_sent.answered.set()
        # 3. Jobs that somebody wants canceled; those whose image exists are past that.
        for row in rows["to_cancel"]:
            canceled = self.running.get(row["id"])
            if canceled and not canceled.image_exists:
                canceled.stop("user")
        # 4. News of other workers' jobs.
        for row in (*rows["disowned"], *rows["rescued"]):
            self.say(f"{row['id']}: its worker was lost; {row['status']}", 4)
            # As of an outcome with a delay, no notification tells when it is due.
            self._poll_at = min(self._poll_at, time.monotonic() + row.get("delay", 0.0))
        for row in rows["waiting"]:
            self.waiting = row["number"]
        # 5. New jobs; RETURNING promises no order.
        rows["claimed"].sort(key=lambda row: (-row["priority"], row["seq"]))
        for row in rows["claimed"]:
            self.start(row)
        # 6. The backlog.
        for row in rows["delivered"]:
            del self.delivered[row["id"]]
        if "ended" in turn.parts:
            ended = [self.undelivered[row["id"]] for row in rows["ended"]]
            self.undelivered = {}
            self._backlog_thread = in_thread(self.deliver_backlog, ended)
        busy = self._backlog_thread and self._backlog_thread.is_alive()
        if time.monotonic() > self._backlog_at and not busy and not self.undelivered:
            self._backlog_at = time.monotonic() + BACKLOG_S
            self._backlog_thread = in_thread(self.find_backlog)

    def start(self, row: JobRow) -> None:
        """Begin a job that was just claimed."""
        run = Attempt(self, row)
        self.running[run.job] = run
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(in_thread(self.work, run))
        self.say(f"{run.job}: claimed, attempt {run.number} of {row['max_attempts']}")

    def forget(self, run: Attempt) -> None:
        """It is no longer ours; the same job may run here anew."""
        if self.running.get(run.job) is run:
            del self.running[run.job]

    def work(self, run: Attempt) -> None:
        """One job from its row to its outcome, in a thread of its own."""
        config = self.config
        # 1. The image, and its way to the cloud: the row is written together with the outcome.
        try:
            run.read_row()
            config = config._replace(owner_user_id=run.owner)
            record = self.image_of(run, config)
            run.image_exists = True
            if run.why == "user":
                run.why = ""  # who wanted it canceled came too late
            outcome = self.uploaded(run, config, record)
        except Exception as problem:
            outcome = self.failure(run, as_error(problem))
            if run.begun and not run.record.get("over"):
                run.entry.unlock()  # for whoever runs it next
        # 2. Into the database, however long that takes.
        was_ours = run.settle_job(outcome)
        if not run.begun or not run.entry.is_locked:
            return
        # 3. What is left for the journal, now that it is known whose image it is.
        if was_ours and outcome.get("image"):
            run.note_best_effort(row=True)
        elif not was_ours and run.charged == "no":
            # The job is somebody else's by now, and so is its image.
            run.note_best_effort(refused=True)
        elif outcome["status"] == "done" and missing_uploads(run.record):
            run.entry.unlock()  # for `deliver_backlog`
        with suppress(ImagenError):
            deliver(run, config)

    def image_of(self, run: Attempt, config: Config) -> Record:
        """The record of the job's image: found here, fetched where it was paid for, or made."""
        check_limits(run.order, config.limits)
        with hidden_inputs() as hidden:
            order = run.order
            if run.inputs or run.mask:
                cloud = Supabase(run.delivery(), config.supabase)

                def fetched(path: str) -> str:
                    place = hidden()
                    cloud.fetch(path, run.owner, place)
                    return place

                order = order._replace(images=tuple(map(fetched, run.inputs)))
                if run.mask:
                    order = order._replace(mask=fetched(run.mask))
            (plan,) = plans_of(order, config)
        if run.number > 1 and (record := self.from_leftovers(run, config)):
            return record
        if record := self.from_receipt(run, plan, config):
            return record
        return finish(run, make(plan, config, run))

    def from_leftovers(self, run: Attempt, config: Config) -> Record | None:
        """What an earlier attempt has left on this host: the image, or the way to it."""
        receipt = run.earlier_receipt
        own_id = run.id
        for leftover in entries():
            if leftover.record.get("job") != run.job:
                continue
            entry = Entry.take(leftover.path)
            if not entry:
                continue
            if record := self.recovered(run, entry, config):
                return record
            # Whoever wrote the receipt was here, and knows that it cost nothing.
            if receipt and run.charged == "no" and run.id == job_uuid(run.job, receipt["attempt"]):
                run.unpaid.append(receipt["attempt"])
            run.id = own_id
        return None

    def from_receipt(self, run: Attempt, plan: Plan, config: Config) -> Record | None:
        """What another host may have paid for: as if we had sent it, and lost the answer."""
        receipt = run.earlier_receipt
        if not receipt or receipt["attempt"] in run.unpaid:
            return None
        prepare_folder(os.path.dirname(plan.record["name"]))
        run.begin(plan)
        run.began_elsewhere = True
        run.note_best_effort(
            sending=receipt["at"], charged="unknown", remote=receipt.get("remote") or {}
        )
        return self.recovered(run, run.entry, config)

    def recovered(self, run: Attempt, entry: Entry, config: Config) -> Record | None:
        """The record of an earlier attempt's image, or None where it may be made anew."""
        try:
            record = recover(entry, config, run)
        except Ended:
            if entry.record.get("paid"):
                raise
            record = None  # what is free was lost with its server
        if not record:
            entry.unlock()
        return record

    def uploaded(self, run: Attempt, config: Config, record: Record) -> Outcome:
        """The outcome of an attempt that made an image.

        It has the image's row, if the cloud has taken the file.
        """
        outcome = Outcome(status="done", charged=run.charged != "no", image=None)
        try:
            upload_missing(run, config, ("object",))
        except ImagenError as problem:
            self.say(f"{run.job}: {problem}", 4)
        if record.get("object"):
            outcome["image"] = to_jsonb(image_row(record))
        else:
            outcome["note"] = "made, not in the cloud"
            self.say(f"{run.job}: made, not in the cloud: {record['path']}", 4)
        return outcome

    def failure(self, run: Attempt, error: ImagenError) -> Outcome:
        """The outcome of an attempt that made none."""
        charged = run.charged != "no"
        if run.why in ("released", "lost"):
            # Whoever is next may have to fetch what was paid for here.
            return Outcome(status="pending", uncounted=1, charged=charged or run.why == "lost")
        stalling = error.code in STALLING and not isinstance(error, OverBudget)
        if not charged and not run.why and stalling and self.stalls(run, error.code):
            return Outcome(
                status="pending",
                uncounted=1,
                charged=False,
                handed_back=True,
                error="handed back: no worker is able to, so far",
                error_code=error.code,
            )
        text = f"{error}\n{error.hint}".strip()
        if clipped(text) != text:
            self.say(f"{run.job}: {text}", 4)
        outcome = Outcome(
            status="failed",
            error=clipped(text),
            error_code=error.code,
            charged=charged,
        )
        if run.why == "user":
            outcome["status"] = "canceled"
        elif run.number < attempts_allowed(run, error):
            outcome["status"] = "pending"
            outcome["delay"] = max(error.after, 2.0 ** min(run.number, 8))
        return outcome

    def stalls(self, run: Attempt, code: str) -> bool:
        """Whether it is this worker that is broken, and not the job: its backend is paused then."""
        name = ""
        if code != "disk":
            name = run.order.backend or self.config.default_backend
        with self._stalling:  # of many that fail at once, the first looks
            if name not in self.paused and (problem := self.broken(name)):
                self.say(f"{name or 'all backends'}: paused: {problem}", 4)
                self.paused = {**self.paused, name: problem.code}
                in_thread(self.resume, name)
        return name in self.paused

    def broken(self, name: str) -> ImagenError | None:
        """What is wrong with a backend for any job; "": with the disk."""
        try:
            if name:
                open_backend(name, self.config.backends).check(Context(CONNECT_TIMEOUT))
                return None
            for folder in (path_setting(self.config.output.directory), state_path("open")):
                prepare_folder(folder)
                probe = f"{folder}/.imagen-{self.me}.part"
                try:
                    write_file(probe, "0" * PROBE_BYTES)
                finally:
                    unlink_quietly(probe)
            return None
        except Exception as problem:
            return adapter_error(problem)

    def resume(self, name: str) -> None:
        """Try a paused backend after 2, 4, … 60 s, until it works."""
        pause = 2.0
        while True:
            time.sleep(pause)
            if not self.broken(name):
                break
            pause = min(60.0, pause * 2)
        self.paused = {key: code for key, code in self.paused.items() if key != name}
        self.say(f"{name or 'all backends'}: works again", 4)
        self._poll_at = 0.0
        self.ring()

    def find_backlog(self) -> None:
        """Look for what the cloud would not take at its time, images of jobs and what they cost.

        And delete what it is to have no longer.
        """
        undelivered = {}
        for entry in entries():
            job = entry.record.get("job")
            if job and missing_uploads(entry.record):
                undelivered[job] = entry.path
        with suppress(ImagenError):  # then in a minute
            Supabase(Context(DELIVERY_S), self.config.supabase).empty_outbox()
        # A job that is to run again will find the image by itself: the database has to say.
        self.undelivered = undelivered
        self.ring()

    def deliver_backlog(self, paths: Sequence[str]) -> None:
        """Deliver the images of these entries, whose jobs are over."""
        for path in paths:
            if entry := Entry.take(path):
                run = Run(DELIVERY_S)
                run.adopt(entry)
                with suppress(ImagenError):  # then it stays open
                    deliver(run, self.config)
                if entry.record.get("row"):
                    self.delivered[run.job] = run.image_id
                    self.ring()


# May a job that failed run again? So many attempts are allowed:
#
#   charged  fetchable  retryable
#   no       -          no         none: it would fail the same way
#   no       -          yes        max_attempts
#   yes      no         -          none: asking again might be paying twice
#   yes      yes        -          three more: what was paid for may still be fetched
def attempts_allowed(run: Attempt, error: ImagenError) -> int:
    """How many attempts a job may have, after an error of one of them."""
    most = run.row["max_attempts"]
    if run.charged == "no":
        if error.retryable:
            return most
        return 0
    if not run.began_elsewhere or run.record.get("over"):
        return 0
    if not os.path.exists(run.entry.path):
        return 0
    return most + 3


# What tells of this machine: addresses, hosts with their ports, paths, names of its backends.
PRIVATE = r"""\w+://[^\s"']*[^\s"':;,.]|\b(localhost|[\w-]+(\.[\w-]+)+):\d+"""
PRIVATE += r"""|(?<![\w.…])~?/[^:;"'\n]+|(?<=configured: )known: .*"""


def clipped(text: str) -> str:
    """At most 4 kB of an error, for the row: without what is in the log alone.

    >>> clipped("http://localhost:8188/x and gpu.lan:80: silent; /home/a b/c.png: full")
    '… and …: silent; …: full'
    """
    host = re.escape(socket.gethostname())
    text = re.sub(rf"{PRIVATE}|\b{host}\b", "…", text)
    return text.encode("utf-8", "replace")[:4096].decode("utf-8", "ignore")


def take_slot(name: str) -> tuple[str, int]:
    """A place on this host that one living process holds, and the lock that says so.

    After a taken name, the next number. Who gets it knows that whoever had it before is
    dead: the kernel says so.
    """
    for number in range(1, 1000):
        file = f"worker-{name}-{number}.lock"
        if number == 1:
            file = f"worker-{name}.lock"
        with suppress(BlockingIOError):
            lock = locked(state_path(file), os.O_CREAT)
            place = os.fstat(lock)
            # A reboot frees all slots without killing anybody: then the lease decides.
            boot = read_bytes("/proc/sys/kernel/random/boot_id").decode().strip()
            slot = f"{boot}:{place.st_dev}:{place.st_ino}"
            # Job rows hold it, and their owners read those.
            return sha256_of(slot), lock
    raise Busy(f"a thousand workers are called {name}")


def sd_notify(text: str) -> None:
    """Tell systemd, where it listens.

    https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect(address)
        systemd.send(text.encode())


# === Server: the OpenAI-compatible API, and a page to look at what was made ===
#
# A thread reads the requests of a connection, one after the other (`_connection` → `_respond` →
# ROUTES), by RFC 9110 and 9112. Images are made in the threads of a Call, so that they outlive
# whoever asked for them. Nothing that a client sends ever becomes a path: images are named by ids.

CONNECTIONS_MAX = 256  # at a time
CONNECTIONS_REFUSED = 32  # more, which are told so; what comes beyond is closed
HEAD_BYTES = 16 << 10
BODY_BYTES = 256 << 10  # unpacked; likewise the others
EDIT_BYTES = 64 << 20  # of a body with images
EDITS_MAX = 15  # of these at a time, so that all together stay below 1 GB
HEAD_S = 10.0  # for a request's head, and until it begins
STALL_S = 30.0  # in which a body, or a response, gets on by
STALL_BYTES = 120 << 10
PIECE = 1 << 16  # bytes written at a time
DRAIN_AFTER_ERROR_S = 3.0  # for what a client that was turned away still sends
ABANDON_AFTER_S = 10.0  # then what nobody waits for, and nobody paid for, is cancelled
REPLAY_WINDOW_S = 600.0  # in which a repeat of a finished request gets its images
REPLAY_MAX = 1000  # finished requests that are remembered
SHUTDOWN_S = 120.0  # for what is under way once a signal says stop
LINK_S = 3600  # that a signed link works, as OpenAI's
COOKIE_S = 30 * 86400
LOGIN_S = 1.0  # between two tries
TOKEN_LETTERS = 16
NEVER = float("inf")
EVENTS_QUIET_S = 15.0  # then a comment says that the stream is alive
WATCHED = 200  # newest images, in which a new one is noticed
PAGE_IMAGES = 24  # of one answer, and of one screen
THUMBNAIL_PIXELS = 512
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
# Where Python's are those of older RFCs.
PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
# Where OpenAI has a type and a code of its own for what our class means.
OPENAI_ERRORS = {
    "usage": ("invalid_request_error", "invalid_value"),
    "refused": ("image_generation_user_error", "moderation_blocked"),
    "quota": ("insufficient_quota", "insufficient_quota"),
    "busy": ("rate_limit_error", "rate_limit_exceeded"),
}


class HttpRequest(NamedTuple):
    """One HTTP request; header names are in lower case, lines of one name joined."""

    method: str
    target: str  # path and query, as they were sent
    headers: dict[str, str]
    length: int  # of the body that follows; -1: in chunks
    path: str
    query: Strings
    scheme: str = "http"  # as the client sees it
    body: bytes = b""


NO_REQUEST = HttpRequest("", "", {"host": ""}, 0, "", EMPTY)


class HttpError(Exception):
    """A request that is turned away: a status, a sentence, and OpenAI's code for it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Strings = EMPTY,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


class Connection:
    """A client's connection: the request that came last, and the response to it.

    The janitor closes it after `until`, which moves on as long as the client gets on.
    """

    idle = True  # no request is under way
    refused = False  # there are too many
    foreign = False  # another site's page asks

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        # Small answers leave at once, and of large ones no more than a piece waits in the kernel:
        # only so does anybody see whether the client takes them.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PIECE)
        self.reader = sock.makefile("rb")
        self.allow(HEAD_S)

    def allow(self, seconds: float) -> None:
        """The client has that long to get on."""
        self.moved = 0
        self.until = time.monotonic() + seconds

    def got_on(self, size: int) -> None:
        """The client sent or took some bytes."""
        self.moved += size
        if self.moved >= STALL_BYTES:
            self.allow(STALL_S)

    def read_head(self) -> None:
        """Wait for a request; HttpError where what comes is none."""
        self.idle = True
        self.begun = False  # the response
        self.lasting = False  # whether another request may follow
        self.body_left = True
        self.request = NO_REQUEST
        self.headers: dict[str, str] = {}  # of the response, whatever it is
        self.allow(HEAD_S)
        lines: list[bytes] = []
        left = HEAD_BYTES
        while True:
            line = self.reader.readline(left + 1)
            left -= len(line)
            if left < 0 and not lines:
                raise HttpError(414, "the address is too long")
            if left < 0:
                raise HttpError(431, "the head of the request is too large")
            if not line.endswith(b"\n"):
                raise ConnectionError("the client has left")
            if line != b"\r\n":
                lines.append(line.removesuffix(b"\r\n"))
            # Lines left empty before a request are none of its head (RFC 9112, 2.2).
            elif lines:
                break
        self.idle = False
        self.request = parsed_head([line.decode("latin-1") for line in lines])
        self.lasting = "close" not in self.request.headers.get("connection", "").lower()
        self.body_left = self.request.length != 0

    def read_body(self, most: int) -> Iterator[bytes]:
        """The body of the request, unpacked, piece by piece; HttpError where it is too large."""
        request = self.request
        packing = request.headers.get("content-encoding", "identity").lower()
        if packing not in ("identity", "gzip"):
            raise HttpError(415, "a body is packed by gzip or not at all")
        if request.length > most:
            raise too_large(most)
        # curl waits for this before it sends a body of more than a kilobyte.
        if request.headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.allow(STALL_S)
        blocks = self._blocks(request.length)
        if request.length < 0:
            blocks = self._chunks(most)
        if packing == "gzip":
            blocks = unpacked(blocks)
        size = 0
        for block in blocks:
            size += len(block)
            if size > most:
                raise too_large(most)
            yield block
        self.body_left = False
        self.until = NEVER  # from now on it is not the client that is slow

    def _blocks(self, left: int) -> Iterator[bytes]:
        while left:
            block = self.reader.read1(min(left, PIECE))
            if not block:
                raise ConnectionError("the client has left")
            left -= len(block)
            self.got_on(len(block))
            yield block

    def _chunks(self, most: int) -> Iterator[bytes]:
        while True:
            line = self._line()
            match = re.fullmatch(rb"([0-9a-fA-F]{1,8})[\t ]*(;[\t -~\x80-\xff]*)?", line)
            if not match:
                raise HttpError(400, "a chunk without its length")
            size = int(match[1], 16)
            if size > most:
                raise too_large(most)
            if not size:
                break
            yield from self._blocks(size)
            if self._line():
                raise HttpError(400, "a chunk is longer than it says")
        while self._line():  # trailers
            pass

    def _line(self) -> bytes:
        line = self.reader.readline(HEAD_BYTES)
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "a chunk without its length")
        return line[:-2]

    def send(self, status: int, headers: Strings, body: Iterable[bytes]) -> None:
        """A response; one without Content-Length ends with the connection."""
        from http.client import responses

        self.begun = True
        fields = {
            "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            "X-Content-Type-Options": "nosniff",
            **self.headers,
            **headers,
        }
        framed = "Content-Length" in headers or status == 304
        if self.body_left or not framed:
            self.lasting = False
        if not self.lasting:
            fields["Connection"] = "close"
        lines = [f"HTTP/1.1 {status} {PHRASES.get(status) or responses[status]}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        blocks = iter(body)
        if self.request.method == "HEAD":
            blocks = iter(())
        # The head and what follows leave in one packet, where they fit.
        data = "\r\n".join((*lines, "", "")).encode("latin-1", "replace")
        self.write(data + next(blocks, b""))
        for block in blocks:
            self.write(block)

    def write(self, data: bytes) -> None:
        """Send bytes, as fast as the client takes them."""
        self.allow(STALL_S)
        for start in range(0, len(data), PIECE):
            piece = memoryview(data)[start : start + PIECE]
            self.sock.sendall(piece)
            self.got_on(len(piece))
        self.until = NEVER

    def reply(self, status: int, body: bytes, headers: Strings) -> None:
        """A response that is there as a whole."""
        self.send(status, {"Content-Length": str(len(body)), **headers}, [body])

    def json(self, status: int, document: Fields, headers: Strings = EMPTY) -> None:
        """A JSON document; where a response has begun, which it would spoil, its end."""
        if self.begun:
            self.lasting = False
            return
        fields = {
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            **headers,
        }
        self.reply(status, to_json(document).encode(), fields)

    def html(self, status: int, page: str, headers: Strings = EMPTY) -> None:
        """A page of ours, in which only what bears its NONCE runs."""
        # What a prompt smuggles in would not. Nor may it do anything else that it need not.
        nonce = binascii.b2a_base64(os.urandom(15), newline=False).decode()
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
            "frame-ancestors 'none'"
        )
        fields = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "same-origin",
            **headers,
        }
        self.reply(status, page.replace("NONCE", nonce).encode(), fields)

    def begin_stream(self) -> None:
        """The head of server-sent events, whose end is the connection's."""
        self.send(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}, ())

    def event(self, kind: str, fields: Fields) -> None:
        """One server-sent event."""
        data = to_json({"type": kind, **fields})
        self.write(f"event: {kind}\ndata: {data}\n\n".encode())

    def client_left(self) -> bool:
        """Whether the client has closed the connection, without waiting for it."""
        import select

        readable, _, _ = select.select([self.sock], [], [], 0)
        try:
            return bool(readable) and not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


class Call(Runner):
    """One request for images. It goes on when its client has left; a repeat joins it.

    The server's lock guards `clients` and `lonely_since`.
    """

    def __init__(
        self,
        server: Server,
        key: str,
        plans: list[Plan],
        body: Fields,
        ignored: Sequence[str],
    ) -> None:
        super().__init__(plans, server.config, parallel=plans[0].parallel)
        self.server = server
        self.id = new_uuid()
        self.key = key  # the same for the same body
        self.request = plans[0].request
        self.count = len(plans)
        self.ignored = ignored
        self.kind = body["kind"]
        self.stream = body.get("stream") is True
        self.links = body.get("response_format") == "url"
        self.began = time.time()
        self.started = False  # else it stands in line
        self.clients = list[Connection]()  # that wait for it
        self.followed = False  # its client waits for no answer, but follows the events
        self.answered = False
        self.lonely_since = time.monotonic()
        self.replay_until = self.lonely_since + REPLAY_WINDOW_S

    def on_image(self, record: Record) -> None:
        """Its backend works."""
        self.server.faults.pop(self.request.backend, None)

    def on_error(self, error: ImagenError) -> None:
        """Also for the log of whoever runs the server."""
        self.server.say(str(error))
        if isinstance(error, BadConfig | Quota):
            self.server.faults[self.request.backend] = str(error)

    def on_warning(self, text: str) -> None:
        """Nothing that a client could do something about."""
        self.server.say(text)

    def answers(self) -> bool:
        """Whether a repeat gets what this call got, or will get.

        One that failed free of charge, and may pass later, is made anew.
        """
        return bool(self.left or self.records or not all(map(repeatable, self.errors)))

    def is_deserted(self) -> bool:
        """Whether its clients left before the answer, some maybe just now."""
        return not self.answered and all(client.client_left() for client in self.clients)

    def cancel(self, even_paid: bool) -> None:
        """End what has cost nothing; `even_paid`: the rest as well, as far as that is possible."""
        with self.changed:
            if self.waiting and not self.active:
                self.errors.append(Interrupted("cancelled before it began"))
            self.waiting.clear()
            for run in self.active:
                if even_paid or run.charged == "no":
                    run.stop("user")
            self.changed.notify_all()

    def state(self, place: int) -> JsonObject:
        """What the page shows of it; `place` in line, 0 once it has begun."""
        with self.changed:
            progress = next(reversed(self.active.values()), Progress())
            paid = any(run.stop_pending for run in self.active)
            errors = worst_first(self.errors)
        return {
            "id": self.id,
            "prompt": self.request.prompt,
            "backend": self.request.backend,
            "n": self.count,
            "made": len(self.records),
            "left": self.left,
            "place": place,
            **progress._asdict(),
            "unstoppable": paid,
            "errors": [openai_fields(error)[1] for error in errors[:1]],
        }


def repeatable(error: ImagenError) -> bool:
    """Whether asking again is worth a try, and cannot pay again."""
    return error.retryable and error.charged == "no"


class Server:
    """`imagen serve`. `say` tells of each request that a person should hear of."""

    def __init__(
        self, config: Config, say: Callable[[str], None], flags: argparse.Namespace
    ) -> None:
        host = flags.host.strip("[]")
        self.token = ""
        if os.environ.get(flags.token_env):
            self.token = secret_from(flags.token_env).reveal()
        cure = f'export {flags.token_env}="$(openssl rand -hex 24)", or --token-env NAME'
        if flags.host not in LOOPBACK and not self.token:
            raise BadConfig(f"--host {flags.host}: others could use your backends", cure)
        if 0 < len(self.token) < TOKEN_LETTERS:
            raise BadConfig(f"the token has fewer than {TOKEN_LETTERS} characters", cure)
        self.config = config
        self.say = say
        self.flags = flags  # of `imagen serve`
        self.hosts = (*LOOPBACK, *map(str.lower, flags.allow_host or ()))
        self.owners = shown_owners(config, flags.all_owners)
        # Links and logins outlive a restart, and tell nobody anything of the token.
        self.secret = state_uuid("links").encode()
        self.calls = list[Call]()
        self._lock = threading.Lock()  # guards calls, connections and logins
        self._connections = set[Connection]()
        self._next_login = 0.0
        self.edits = 0  # requests whose images are coming in
        self._stopped = False
        self._thumbnailer: Any = None  # a process
        self.faults: dict[str, str] = {}  # of backends whose key or account failed last
        family = socket.AF_INET
        if ":" in host:
            family = socket.AF_INET6
        try:
            self.listener = socket.create_server((host, flags.port), family=family, backlog=128)
        except OSError as problem:
            reason = problem.strerror or str(problem)
            hint = "another --host or --port?"
            if problem.errno == errno.EADDRINUSE:
                reason = "this port is taken; does `imagen serve` run already?"
                hint = "imagen serve --port 0 takes a free one"
            raise BadConfig(f"{flags.host}:{flags.port}: {reason}", hint) from None
        self.port = self.listener.getsockname()[1]
        self.address = f"http://{address_of(host)}:{self.port}/"
        self.listener.settimeout(0.5)  # so that `serve` sees a stop

    def serve(self) -> None:
        """Answer until `stop`; then finish what is under way."""
        in_thread(self._janitor)
        while not self._stopped:
            try:
                sock, _ = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # Out of descriptors, or a client that had left before.
                time.sleep(0.05)
                continue
            # Only this thread adds connections, so there are never more than that.
            number = len(self._connections)
            if number >= CONNECTIONS_MAX + CONNECTIONS_REFUSED:
                sock.close()
                continue
            with suppress(OSError):  # it has left already
                client = Connection(sock)
                client.refused = number >= CONNECTIONS_MAX
                with self._lock:
                    self._connections.add(client)
                in_thread(self._connection, client)
        # What was begun may be paid already: it gets its time, and so does its delivery.
        self.listener.close()
        until = time.monotonic() + SHUTDOWN_S
        while self._connections or any(call.left or call.busy for call in [*self.calls]):
            if time.monotonic() > until:
                break
            with self._lock:
                idle = [client for client in self._connections if client.idle]
            for client in idle:
                with suppress(OSError):
                    client.sock.shutdown(socket.SHUT_RD)
            time.sleep(0.05)

    def stop(self, *_: Any) -> None:
        """No more connections; the second time, no more anything."""
        if self._stopped:
            raise KeyboardInterrupt
        self._stopped = True

    def _janitor(self) -> None:
        """Twice a second, what only the clock can tell."""
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            with self._lock:
                overdue = [client for client in self._connections if now > client.until]
                calls = self.calls[:]
            # 1. Cut off clients that take longer than they may: their threads end by it.
            for client in overdue:
                with suppress(OSError):
                    client.sock.shutdown(socket.SHUT_RDWR)
            # 2. What nobody waits for must not go on costing time or a GPU.
            finished = []
            for call in calls:
                if not call.left:
                    finished.append(call)
                    continue
                call.replay_until = now + REPLAY_WINDOW_S
                if not call.clients and now > call.lonely_since + ABANDON_AFTER_S:
                    call.cancel(even_paid=False)
            # 3. Forget old answers, and of too many the oldest: each holds its records.
            with self._lock:
                for number, call in enumerate(reversed(finished)):
                    if number >= REPLAY_MAX or now > call.replay_until:
                        self.calls.remove(call)
            # 4. What stands in line while nobody waits for it.
            self.start_calls()

    def _is_shown(self, record: Record) -> bool:
        return "path" in record and may_see(record, self.owners)

    def _connection(self, client: Connection) -> None:
        try:
            with client.sock, client.reader:
                self._exchange(client)
                while client.lasting and not self._stopped:
                    self._exchange(client)
        except OSError:
            pass  # the client has left, which is its own business
        finally:
            with self._lock:
                self._connections.remove(client)

    def _exchange(self, client: Connection) -> None:
        """One request and its response."""
        try:
            client.read_head()
            self._respond(client)
        except HttpError as problem:
            self._turn_away(problem, client)
        # An OSError is the connection's: there is nobody to answer any more.
        except OSError:
            raise
        except Exception as problem:
            self.fail(client, as_error(problem))

    def _respond(self, client: Connection) -> None:
        if client.refused:
            client.lasting = False
            raise HttpError(503, "too many connections", "", {"Retry-After": "5"})
        request = client.request
        if self.flags.trust_proxy:
            client.request = request = behind_proxy(request)
        self._check_site(client)
        # The first route that fits both path and method; a path alone is a 405.
        routes = [row for row in ROUTES if re.fullmatch(row[1], request.path)]
        allowed = ", ".join([*(method for row in routes for method in row[0]), "OPTIONS"])
        if request.method == "OPTIONS":
            self._answer_options(client, allowed)
            return
        if request.path == "/" and "token" in request.query and request.method == "GET":
            self._log_in(client, request.query["token"], "/")
            return
        if not self._authorized(client):
            if "text/html" in request.headers.get("accept", "") and request.method == "GET":
                client.html(401, login_page(request.target), AUTHENTICATE)
                return
            message = "a token is needed: Authorization: Bearer …"
            raise HttpError(401, message, "invalid_api_key", AUTHENTICATE)
        for methods, pattern, handler in routes:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                # Only now: what is turned away anyhow may be an upload of any size.
                if handler is not Server.answer_edits:  # which reads its own, to disk
                    body = b"".join(client.read_body(BODY_BYTES))
                    client.request = request._replace(body=body)
                handler(self, client, *match.groups())
                return
        if not routes:
            raise HttpError(
                404,
                f"{request.method} {request.path[:80]} is not here: this server makes images by "
                "POST /v1/images/generations and /edits, and GET /v1/models lists its backends",
                "unknown_url",
            )
        raise HttpError(405, f"only {allowed} here", headers={"Allow": allowed})

    def _answer_options(self, client: Connection, allowed: str) -> None:
        """Which methods a path has; for another site's page that we let in, what it may send."""
        headers = {"Allow": allowed}
        if client.headers:
            headers["Access-Control-Allow-Methods"] = allowed
            headers["Access-Control-Max-Age"] = "600"
            names = client.request.headers.get("access-control-request-headers", "")
            headers["Access-Control-Allow-Headers"] = names
        client.reply(200, b"", headers)

    def _turn_away(self, problem: HttpError, client: Connection) -> None:
        kinds = {401: "authentication_error", 503: "server_error"}
        kind = kinds.get(problem.status, "invalid_request_error")
        fields = error_fields(str(problem), kind, problem.code)
        client.json(problem.status, {"error": fields}, problem.headers)
        if client.lasting:
            return
        # What nobody reads would reset the connection, and the answer with it.
        client.allow(DRAIN_AFTER_ERROR_S)
        client.sock.shutdown(socket.SHUT_WR)
        while client.reader.read1(PIECE):
            pass

    def _check_site(self, client: Connection) -> None:
        """HttpError where another site's page asks: DNS rebinding, CSRF."""
        request = client.request
        host = request.headers["host"]
        # Without a token, a name that is not ours came from somebody else's DNS.
        name = re.sub(r":\d*$", "", host).lower()
        if not self.token and name not in self.hosts:
            cure = f"imagen serve --allow-host {name[:80]}"
            raise HttpError(403, f"this server is not called {name[:80]}; if it is yours: {cure}")
        # A browser names the page that asks; no other client has an Origin.
        site = request.headers.get("origin", "")
        client.foreign = site not in ("", f"http://{host}", f"https://{host}")
        if client.foreign:
            if site in (self.flags.allow_origin or ()):
                client.headers = {"Access-Control-Allow-Origin": site, "Vary": "Origin"}
            elif request.method not in GET:
                cure = f"imagen serve --allow-origin {site[:80]}"
                raise HttpError(403, f"another site's page may not write here; if yours: {cure}")

    def _authorized(self, client: Connection) -> bool:
        """Whether the request shows the token, our cookie, or a link that we signed."""
        request = client.request
        if not self.token or request.path in ("/healthz", "/login"):
            return True
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same(credentials.strip(), self.token):
            return True
        # A link is for one image: whoever has it sees this one and no other.
        image = re.fullmatch(f"/images/{IMAGE_ID}", request.path)
        if image and self.is_signed(image[1], request.query.get("signature", "")):
            return True
        # What a browser sends by itself proves nothing of another site's page.
        cookies = re.findall(r"([^=;,\s]+)=([^;,\s]*)", request.headers.get("cookie", ""))
        proof = dict(cookies).get(f"imagen-{self.port}", "")
        return not client.foreign and self.is_signed(f"login {self.token}", proof)

    def sign(self, text: str, until: int) -> str:
        """A proof, which holds until then, that this server has said `text`."""
        import hmac

        digest = hmac.digest(self.secret, f"{until} {text}".encode(), "sha256")
        return f"{until}.{digest.hex()}"

    def is_signed(self, text: str, proof: str) -> bool:
        """Whether `sign` has made this proof, and it still holds."""
        until = proof.partition(".")[0]
        if not re.fullmatch("[0-9]{1,12}", until) or int(until) < time.time():
            return False
        return is_same(proof, self.sign(text, int(until)))

    def answer_login(self, client: Connection) -> None:
        """GET /login: a page to type the token into."""
        client.html(200, login_page(client.request.query.get("next", "/")))

    def answer_token(self, client: Connection) -> None:
        """POST /login: what was typed there."""
        from urllib.parse import parse_qsl

        fields = dict(parse_qsl(client.request.body.decode("utf-8", "replace")))
        self._log_in(client, fields.get("token", ""), fields.get("next", "/"))

    def _log_in(self, client: Connection, token: str, place: str) -> None:
        """A cookie for whoever has the token, and back to where that is needed."""
        now = time.monotonic()
        with self._lock:
            early = now < self._next_login
            if not early:
                self._next_login = now + LOGIN_S
        if early:
            page = login_page(place, "One try a second: once more, please.")
            client.html(429, page, {"Retry-After": "1"})
        elif self.token and not is_same(token, self.token):
            client.html(401, login_page(place, "That is not the token."), AUTHENTICATE)
        else:
            proof = self.sign(f"login {self.token}", int(time.time()) + COOKIE_S)
            cookie = f"imagen-{self.port}={proof}; Max-Age={COOKIE_S}; HttpOnly; SameSite=Lax"
            if client.request.scheme == "https":
                cookie += "; Secure"
            headers = {"Location": own_place(place), "Set-Cookie": f"{cookie}; Path=/"}
            client.reply(303, b"", headers)

    def answer_page(self, client: Connection) -> None:
        """GET /: the gallery."""
        client.html(200, PAGE)

    def answer_health(self, client: Connection) -> None:
        """GET /healthz."""
        client.json(200, {"ok": True, "version": __version__})

    def answer_models(self, client: Connection) -> None:
        """GET /v1/models: the backends, by OpenAI's name for them."""
        models = [model_fields(name) for name in ("auto", *self.config.backends)]
        client.json(200, {"object": "list", "data": models})

    def answer_model(self, client: Connection, name: str) -> None:
        """GET /v1/models/ID."""
        self._backend(name, [])  # HttpError where no request could name it
        client.json(200, model_fields(name))

    def answer_options(self, client: Connection) -> None:
        """GET /api/options: what the page's form offers."""
        document = {
            "backends": [*self.config.backends],
            "default": self.config.default_backend,
            "styles": [*{**STYLES, **self.config.styles}],
            "faults": {
                name: fault for name in self.config.backends if (fault := self._fault(name))
            },
        }
        client.json(200, document)

    def _fault(self, name: str) -> str:
        """Why a backend makes no image now; "" where nothing is known."""
        try:
            open_backend(name, self.config.backends)
        except ImagenError as problem:
            return str(problem).removeprefix(f'backend "{name}": ')
        # What only its last request could tell: a key that is refused, an empty account.
        return self.faults.get(name, "")

    def answer_generations(self, client: Connection) -> None:
        """POST /v1/images/generations.

        https://platform.openai.com/docs/api-reference/images/create
        """

        body = parsed(client.request.body)
        if body.get("images") or body.get("mask"):
            raise BadRequest("images and a mask: POST /v1/images/edits takes them")
        self._answer(client, self._call(client, body))

    def answer_edits(self, client: Connection) -> None:
        """POST /v1/images/edits: a form, or JSON with data URIs and ids of our own images.

        https://platform.openai.com/docs/api-reference/images/createEdit
        """
        with self._lock:
            if self.edits >= EDITS_MAX:
                raise HttpError(503, "too many images are coming in", "", {"Retry-After": "5"})
            self.edits += 1
        content_type = client.request.headers.get("content-type", "")
        try:
            with hidden_inputs() as hidden:
                place = hidden()
                with Spool(place, place) as file:
                    for block in client.read_body(EDIT_BYTES):
                        file.write(block)
                if content_type.lower().startswith("multipart/form-data"):
                    body = form_fields(place, content_type, hidden)
                else:
                    body = self._json_inputs(parsed(read_bytes(place)))
                unlink_quietly(place)
                call = self._call(client, body, "image_edit")
        finally:
            with self._lock:
                self.edits -= 1
        self._answer(client, call)

    def _json_inputs(self, body: JsonObject) -> JsonObject:
        """OpenAI's JSON form of an edit, with its images as an Order names them."""

        def source(link: Any) -> str:
            fields = mapping_of(link)
            if is_uuid(ident := str(fields.get("file_id"))):
                self._record(ident)
                return ident
            address = str(fields.get("image_url"))
            if not address.startswith("data:"):
                raise BadRequest("images: a data URI or a file_id; no address is fetched for you")
            return address

        images = body.get("images")
        if not images or not isinstance(images, list):
            raise BadRequest("images: a list of {image_url} or {file_id} is needed")
        body["images"] = [source(link) for link in images]
        if body.get("mask"):
            body["mask"] = source(body["mask"])
        return body

    def _call(self, client: Connection, body: JsonObject, kind: str = "image_generation") -> Call:
        """The call that makes the images of a body: a new one, or the one that it repeats."""
        request = client.request
        if not body:
            raise HttpError(400, "the body is no JSON object")
        # OpenAI's clients send null for what they leave open.
        body = {key: value for key, value in body.items() if value is not None}
        model = body.get("model")
        if model in DALL_E and model not in self.config.backends and not body.get("stream"):
            body.setdefault("response_format", "url")
        asker = request.headers.get("authorization", "")
        keyed = {}
        if key := request.headers.get("idempotency-key"):
            keyed = {"key": key, "caller": sha256_of(asker)}
        plans, ignored = self._plans(body, keyed)
        # Inputs count by their bytes, wherever they came from.
        inputs = plans[0].record["sidecar"]
        body |= {"images": inputs.get("inputs"), "mask": inputs.get("mask"), "kind": kind}
        body["key"] = key
        # Who asks counts too: two people with the same words get an image each.
        key = sha256_of(f"{asker}{json.dumps(body, sort_keys=True)}")
        with self._lock:
            call = self._same_call(key, request)
            if not call:
                waiting = sum(not call.started for call in self.calls)
                call = Call(self, key, plans, body, ignored)
                self.calls.append(call)
                if self._running() >= self.flags.parallel and waiting >= self.flags.queue:
                    call.started = True
                    call.cancel(even_paid=False)
                    raise HttpError(
                        503,
                        f"{self._running()} requests are under way and {waiting} wait; ask again",
                        "rate_limit_exceeded",
                        {"Retry-After": "5", "x-should-retry": "true"},
                    )
            call.clients.append(client)
        return call

    def _answer(self, client: Connection, call: Call) -> None:
        """Wait for a call, and answer with its images; with its id, where that is preferred."""
        self.start_calls()
        if "respond-async" in client.request.headers.get("prefer", ""):
            call.followed = call.answered = True
            applied = {"Preference-Applied": "respond-async"}
            client.json(202, {"id": call.id}, applied)
            return
        try:
            if call.stream:
                self._stream(call, client)
            else:
                self._document(call, client)
            call.answered = True
        finally:
            with self._lock:
                call.clients.remove(client)
                call.lonely_since = time.monotonic()

    # OpenAI's clients repeat by themselves, after a timeout of their own, and say so: they get what
    # came, or comes, of the first time. Others do not say so: they get it only where a client with
    # the same request has left before its answer, and once. Two that wait never share an image.
    def _same_call(self, key: str, request: HttpRequest) -> Call | None:
        same = [call for call in reversed(self.calls) if call.key == key]
        # What was turned away, or failed for nothing, is what is repeated, and no answer before it.
        fresh = same and not same[0].answers()
        same = [call for call in same if call.answers() and not (fresh and call.answered)]
        if request.headers.get("x-stainless-retry-count", "0") == "0":
            same = [call for call in same if call.is_deserted()]
        # Two alike that are both repeated get an image each: the lonelier call first.
        return min(same, key=lambda call: (call.answered, len(call.clients)), default=None)

    def _running(self) -> int:
        return sum(call.started and call.left > 0 for call in self.calls)

    def start_calls(self) -> None:
        """Begin what stands in line, as far as there is room."""
        with self._lock:
            for call in self.calls:
                if not call.started and self._running() < self.flags.parallel:
                    call.started = True
                    call.start()

    def _plans(
        self,
        body: Fields,
        keyed: Fields,
    ) -> tuple[list[Plan], list[str]]:
        """The plans for a body, and the names of its fields that nobody here knows."""
        ignored: list[str] = []
        backend = self._backend(str(body.get("model") or "auto"), ignored)
        if body.get("response_format", "url") not in ("b64_json", "url"):
            raise BadRequest("response_format is b64_json or url")
        if not isinstance(body.get("stream", False), bool):
            raise BadRequest("stream is true or false")
        fields = {**{key: body[key] for key in ORDER_FIELDS if key in body}, **keyed}
        fields["backend"] = backend
        fields.update(size_fields(str(body.get("size") or "auto").lower()))
        fields["format"] = body.get("output_format") or ""
        if fields["format"] not in ("", *FORMATS):
            raise BadRequest(f"output_format is one of {', '.join(FORMATS)}")
        # OpenAI's own two styles, which many clients send unasked.
        if (
            fields.get("style") in ("vivid", "natural")
            and fields["style"] not in self.config.styles
        ):
            ignored.append("style")
            del fields["style"]
        if fields.get("seed") == -1:  # others' word for any
            del fields["seed"]
        if re.fullmatch(r"\d{1,2}(\.0+)?", str(fields.get("n", ""))):
            fields["n"] = int(float(fields["n"]))
        # OpenAI's own options reach those backends that have an option of the same name.
        cls, _ = options_of(backend, self.config.backends)
        passed = {*OPENAI_OPTIONS}.intersection(marked(cls.Options, REQUEST))
        # Those older models' own qualities, which come with their names.
        if "model" in ignored and body.get("quality") in ("standard", "hd"):
            ignored.append("quality")
            del fields["quality"]
        present = passed & body.keys()
        options = {key: body[key] for key in present if body[key] != "auto"}
        own = fields.get("backend_opts", {})
        if isinstance(own, dict):  # else `from_mapping` complains of it
            fields["backend_opts"] = {**own, **options}
        order = from_mapping(Order, fields, "request", BadRequest)
        if self.token and backend != self.config.default_backend:
            check_limits(order, self.config.limits)
        if not 1 <= order.n <= 10:
            raise BadRequest("n is 1 to 10")
        unknown = {*OPENAI_OPTIONS} - passed
        ignored += [key for key in body if key not in PARAMS or key in unknown]
        return plans_of(order, self.config), ignored

    def _backend(self, model: str, ignored: list[str]) -> str:
        """The backend that a client's `model` means; HttpError for one that nobody knows.

        Many clients have OpenAI's names built in: these mean the default, and are told as ignored.
        """
        if model in self.config.backends:
            return model
        if model in DALL_E or re.match("(chat)?gpt-image-", model):
            ignored.append("model")
        elif model != "auto":
            raise self._unknown_model(model)
        return self.config.default_backend

    def _unknown_model(self, name: str) -> HttpError:
        message = f'model "{name}" is unknown: {nearest(name, self.config.backends)}'
        return HttpError(404, message, "model_not_found")

    def _wait(self, call: Call, client: Connection) -> bool:
        """Wait for a change, half a second at most; whether more is expected after it.

        ConnectionError where the client has left.
        """
        self.start_calls()
        with call.changed:
            if call.left:
                call.changed.wait(0.5 if call.started else 0.1)
            more_expected = call.left > 0
        # Also at the end: what nobody takes has not been answered, and a repeat gets it.
        if client.client_left():
            raise ConnectionError("the client has left")
        return more_expected

    def _document(self, call: Call, client: Connection) -> None:
        """One JSON document, once all images are made or have failed."""
        while self._wait(call, client):
            pass
        errors = worst_first(call.errors)
        if not call.records:
            self.fail(client, errors[0])
            return
        document: JsonObject = {
            "created": int(call.began),
            "data": [self._fields(call, record, client.request) for record in call.records],
            "usage": usage_of(call.records),
        }
        if errors:
            document["imagen"] = {"errors": [openai_fields(error)[1] for error in errors]}
        client.json(200, document)

    def _stream(self, call: Call, client: Connection) -> None:
        """Server-sent events: each image once it is made, the worst error; progress between."""
        client.begin_stream()  # from here on an error is an event, since the status is out
        sent = 0
        shown = None
        more_expected = True
        while more_expected:
            # Asked before the records are looked at, so that the last one is not missed.
            more_expected = self._wait(call, client)
            with call.changed:
                # Of the image that was begun last.
                progress = next(reversed(call.active.values()), Progress())
            if more_expected and progress != shown:
                shown = progress
                fields = {**progress._asdict(), "note": progress.note or "waiting"}
                # A comment, which clients skip: OpenAI has no event for it.
                client.write(f": {to_json(fields)}\n\n".encode())
            for record in call.records[sent:]:
                sent += 1
                sidecar = record["sidecar"]
                image = {
                    "b64_json": "",  # which OpenAI's clients need beside a link
                    **self._fields(call, record, client.request),
                    "size": f"{sidecar['width']}x{sidecar['height']}",
                    "output_format": sidecar["mime_type"].removeprefix("image/"),
                    "created_at": int(time.time()),
                    "usage": usage_of([record]),
                }
                metadata = sidecar.get("metadata") or {}
                for field, choices in EVENT_CHOICES.items():
                    image[field] = "auto"
                    if metadata.get(field) in choices:
                        image[field] = metadata[field]
                client.event(f"{call.kind}.completed", image)
        for error in worst_first(call.errors)[:1]:
            client.event("error", {"error": openai_fields(error)[1]})

    def _fields(self, call: Call, record: Record, request: HttpRequest) -> JsonObject:
        """One image as OpenAI's API shows it, and what only we know of it."""
        sidecar = record["sidecar"]
        image_id = sidecar["image_id"]
        fields: JsonObject = {
            "imagen": {
                "id": image_id,
                "seed": sidecar["seed"],
                "cost_usd": sidecar["cost_usd_estimate"],
                "ignored": [*sidecar["ignored"], *call.ignored],
            }
        }
        if record.get("reused"):
            fields["imagen"]["reused"] = True
        if call.links:
            base = f"{request.scheme}://{request.headers['host']}"
            signature = self.sign(image_id, int(time.time()) + LINK_S)
            fields["url"] = f"{base}/images/{image_id}?signature={signature}"
        else:
            image = read_bytes(record["path"])
            fields["b64_json"] = base64_of(image)
        if revised := (sidecar.get("metadata") or {}).get("revised_prompt"):
            fields["revised_prompt"] = revised
        return fields

    def fail(self, client: Connection, error: ImagenError) -> None:
        """Answer with an error, and say whether OpenAI's clients may repeat by themselves."""
        status, fields = openai_fields(error)
        headers = {"x-should-retry": "false"}
        if repeatable(error):
            after = max(1.0, error.after or 5)
            headers = {"x-should-retry": "true", "Retry-After": f"{after:.0f}"}
        client.json(status, {"error": fields}, headers)

    def answer_images(self, client: Connection) -> None:
        """GET /api/images?query=&backend=&before=&limit=: the newest first."""
        query = client.request.query
        limit = PAGE_IMAGES
        if re.fullmatch(r"[1-9]\d{0,5}", query.get("limit", "")):
            limit = min(200, int(query["limit"]))
        records = images_made(
            owners=self.owners,
            before=query.get("before", ""),
            terms=query.get("query", "").lower().split(),
            backend=query.get("backend", ""),
        )
        images = [shown_fields(record) for record in itertools.islice(records, limit)]
        # A page that is full may be the last one: then the next is empty.
        following = None
        if len(images) == limit:
            following = images[-1]["id"]
        client.json(200, {"images": images, "next": following})

    def _record(self, image_id: str) -> Record:
        """What the journal knows of an image; HttpError where it shows none of this id."""
        record = find_image(image_id)
        if record and may_see(record, self.owners) and "deleted" not in record:
            return record
        raise HttpError(404, "no image has this id")

    def answer_facts(self, client: Connection, image_id: str) -> None:
        """GET /api/images/ID."""
        client.json(200, shown_fields(self._record(image_id)))

    def answer_delete(self, client: Connection, image_id: str) -> None:
        """DELETE /api/images/ID: here, and in the cloud where it is there."""
        self._record(image_id)
        client.json(200, delete_image(image_id, True, self.config))

    def _call_states(self) -> list[JsonObject]:
        """What is under way, and what failed while its client followed the events."""
        with self._lock:
            calls = [call for call in self.calls if call.left or (call.followed and call.errors)]
        in_line = [call for call in calls if not call.started]
        states = []
        for call in calls:
            place = 0
            if call in in_line:
                place = in_line.index(call) + 1
            states.append(call.state(place))
        return states

    def _usd_today(self) -> float:
        # The day of this machine, which its files are named by.
        day = now_iso()[:10]
        usd = 0.0
        for record in filter(self._is_shown, attempts(needle=day)):
            if record.get("at", "").startswith(day):
                usd += record["sidecar"].get("cost_usd_estimate") or 0.0
        return round(usd, 6)

    def answer_calls(self, client: Connection) -> None:
        """GET /api/calls: every request for images that this server works on."""
        client.json(200, {"calls": self._call_states(), "usd_today": self._usd_today()})

    def answer_cancel(self, client: Connection, call_id: str) -> None:
        """DELETE /api/calls/ID: end what is under way; forget what failed."""
        with self._lock:
            call = next((call for call in self.calls if call.id == call_id), None)
        if not call:
            raise HttpError(404, "no request has this id, or it is over")
        # A person said so: what is paid ends too, as far as its backend can take it back.
        call.cancel(even_paid=True)
        call.followed = False
        client.json(200, call.state(0))

    def answer_events(self, client: Connection) -> None:
        """GET /api/events: `calls` at every change, `image` and `deleted` as they happen."""
        client.begin_stream()
        journal: list[Any] = []
        newest: list[tuple[str, bool]] = []
        usd = 0.0
        shown = None
        spoke = time.monotonic()
        while not self._stopped and not client.client_left():
            # 1. What came or went, through whatever door.
            before = journal
            journal = journal_state()
            if journal != before:
                usd = self._usd_today()
                rows = [*itertools.islice(filter(self._is_shown, attempts()), WATCHED)]
                known = newest
                newest = [(row["sidecar"]["image_id"], "deleted" in row) for row in rows]
                for record, key in [*zip(rows, newest, strict=True)][WATCHED // 2 :: -1]:
                    if before and key not in known:
                        kind = "deleted" if key[1] else "image"
                        client.event(kind, shown_fields(record))
            # 2. What is under way, if that has changed; a comment where nothing is said for long.
            states = self._call_states()
            if (states, usd) != shown:
                shown = (states, usd)
                spoke = time.monotonic()
                client.event("calls", {"calls": states, "usd_today": usd})
            elif time.monotonic() > spoke + EVENTS_QUIET_S:
                spoke = time.monotonic()
                client.write(b":\n\n")
            time.sleep(0.25)

    def answer_file(self, client: Connection, kind: str, image_id: str) -> None:
        """GET /images/ID, /thumbs/ID: the file, for ever the same."""
        request = client.request
        record = self._record(image_id)
        path = record["path"]
        tag = f'"{record["sidecar"]["sha256"]}"'
        headers = {
            "Content-Type": record["sidecar"]["mime_type"],
            # An image never changes under its id, so a browser need not ask again.
            "Cache-Control": "private, max-age=31536000, immutable",
            "Accept-Ranges": "bytes",
        }
        if kind == "thumbs":
            small = thumbnail_path(image_id)
            if os.path.exists(small):
                path = small
                tag = f'"{image_id}"'
                headers["Content-Type"] = "image/webp"
            else:  # the original stands in for it, until it is made
                headers["Cache-Control"] = "private, no-cache"
                self._order_thumbnail(path, small)
        headers["ETag"] = tag
        none_match = request.headers.get("if-none-match", "")
        if none_match.strip() == "*" or tag in re.findall('"[^"]*"', none_match):
            client.send(304, headers, ())
            return
        try:
            file = open(path, "rb")
        except OSError:
            raise HttpError(404, "the file is gone") from None
        with file:
            size = os.fstat(file.fileno()).st_size
            part = byte_range(request, tag, size)
            status = 200
            if len(part) < size:
                status = 206
                headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
            headers["Content-Length"] = str(len(part))
            client.send(status, headers, file_blocks(file, part))

    def _order_thumbnail(self, path: str, small: str) -> None:
        """Have a thumbnail made, some time, where Pillow is installed.

        In a process of its own: neither its work nor its memory, nor a picture that it dies of, is
        felt by whoever waits for an answer.
        """
        import subprocess

        with self._lock:
            # One that was killed is begun anew; one without Pillow has left by itself.
            if not self._thumbnailer or (self._thumbnailer.poll() or 0) < 0:
                self._thumbnailer = subprocess.Popen(
                    [sys.executable, "-P", "-c", THUMBNAILER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                os.set_blocking(self._thumbnailer.stdin.fileno(), False)
            # A pipe that is full, or ends at nobody: the next who wants to see it asks again.
            with suppress(OSError):
                line = f"{to_json([path, small, THUMBNAIL_PIXELS])}\n"
                os.write(self._thumbnailer.stdin.fileno(), line.encode())

    def answer_input(self, client: Connection, digest: str) -> None:
        """GET /inputs/SHA256: the copy of an image that came in, as long as it is kept."""
        path = state_path("inputs", digest)
        sniffed = None
        with suppress(OSError), open(path, "rb") as file:
            sniffed = sniff(file)
        if not sniffed:
            raise HttpError(404, "this input is not here any more")
        headers = {"Cache-Control": "private, max-age=3600"}
        headers["Content-Type"] = MIME_TYPES[sniffed.format]
        client.reply(200, read_bytes(path), headers)


IMAGE_ID = "([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
GET = ("GET", "HEAD")
METHODS = (*GET, "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
AUTHENTICATE = {"WWW-Authenticate": 'Bearer realm="imagen"'}
TOKEN = "[!#-'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
HOST = r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d*)?"
ROUTES: Sequence[tuple[Sequence[str], str, Callable[..., None]]] = (
    (GET, "/", Server.answer_page),
    (GET, "/healthz", Server.answer_health),
    (GET, "/login", Server.answer_login),
    (("POST",), "/login", Server.answer_token),
    (GET, "/v1/models", Server.answer_models),
    (GET, "/v1/models/([^/]+)", Server.answer_model),
    (("POST",), "/v1/images/generations", Server.answer_generations),
    (("POST",), "/v1/images/edits", Server.answer_edits),
    (GET, "/api/options", Server.answer_options),
    (GET, "/api/images", Server.answer_images),
    (GET, f"/api/images/{IMAGE_ID}", Server.answer_facts),
    (("DELETE",), f"/api/images/{IMAGE_ID}", Server.answer_delete),
    (GET, "/api/calls", Server.answer_calls),
    (("DELETE",), f"/api/calls/{IMAGE_ID}", Server.answer_cancel),
    (("GET",), "/api/events", Server.answer_events),
    (GET, f"/(images|thumbs)/{IMAGE_ID}", Server.answer_file),
    (GET, "/inputs/([0-9a-f]{64})", Server.answer_input),
)
DALL_E = ("dall-e-2", "dall-e-3")  # which answered with links where nothing else was asked for
# Fields of a body that are those of an Order, and OpenAI's that a backend's options may take.
ORDER_FIELDS = (
    *("prompt", "negative_prompt", "style", "seed", "steps", "backend_opts", "n"),
    *("images", "mask", "strength", "aspect", "background", "quality"),
)
OPENAI_OPTIONS = ("moderation", "input_fidelity")
PARAMS = (
    *ORDER_FIELDS,
    *OPENAI_OPTIONS,
    *("model", "size", "output_format", "response_format", "stream"),
)
# What the events of a stream may say of an image, and "auto".
EVENT_CHOICES = {
    "quality": ("low", "medium", "high", "xhigh", "max"),
    "background": ("transparent", "opaque"),
}


def model_fields(name: str) -> JsonObject:
    """A backend as OpenAI's API shows a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "imagen"}


def too_large(most: int) -> HttpError:
    """The error of a body that is larger than that."""
    return HttpError(413, f"the body has more than {most >> 10} kB")


def unpacked(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What a body packed by gzip holds, never much at a time; HttpError where it breaks off."""
    inflater = zlib.decompressobj(31)
    broken = HttpError(400, "the body is no gzip")
    try:
        for block in blocks:
            yield inflater.decompress(block, PIECE)
            while inflater.unconsumed_tail:
                yield inflater.decompress(inflater.unconsumed_tail, PIECE)
        yield inflater.flush()
    except zlib.error:
        raise broken from None
    if not inflater.eof:
        raise broken


def file_blocks(file: BinaryIO, part: range) -> Iterator[bytes]:
    """The bytes of that part of a file; OSError where it has become shorter."""
    file.seek(part.start)
    left = len(part)
    while left:
        block = file.read(min(left, PIECE))
        if not block:
            raise OSError("the file was cut")
        left -= len(block)
        yield block


def byte_range(request: HttpRequest, tag: str, size: int) -> range:
    """The bytes of a file that a request is for: all, or the one range that it names.

    RFC 9110, 14; HttpError where there is nothing in it.
    """
    spelled = r"(?i)bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))"
    match = re.fullmatch(spelled, request.headers.get("range", ""))
    if request.method != "GET" or not match or request.headers.get("if-range", tag) != tag:
        return range(size)
    first, last, suffix = match.groups()
    start = max(0, size - int(suffix or size))
    if first:
        start = int(first)
    if last and int(last) < start:  # no range at all
        return range(size)
    part = range(start, min(size, int(last or size) + 1))
    if not part:
        headers = {"Content-Range": f"bytes */{size}"}
        raise HttpError(416, "nothing of the image is in that range", "", headers)
    return part


def form_fields(path: str, content_type: str, hidden: Callable[[], str]) -> JsonObject:
    """The fields of the form in a file; its images in files of their own."""
    import mmap

    body: JsonObject = {"images": []}
    if not os.path.getsize(path):
        raise HttpError(400, "the form is empty")
    # Mapped, for it may not fit into memory.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for part in form_parts(data, content_type):
            name, _, key = part.name.partition("[")
            if name in ("image", "mask"):
                place = hidden()
                with open(place, "wb") as copy, memoryview(data) as view:
                    copy.write(view[part.start : part.end])
                if name == "mask":
                    body["mask"] = place
                else:
                    body["images"].append(place)
                continue
            end = min(part.end, part.start + BODY_BYTES)
            value: Any = data[part.start : end].decode("utf-8", "replace")
            # A form knows text alone: what is a number or a switch elsewhere is one here.
            if name in ("n", "seed", "steps", "strength", "stream", "backend_opts"):
                with suppress(ValueError):
                    value = json.loads(value)
            fields = body
            # OpenAI's clients take a mapping apart: `backend_opts[width]`.
            if key := key.removesuffix("]"):
                fields = body[name] = mapping_of(body.get(name))
                name = key
            fields[name] = value
    if not body["images"]:
        raise BadRequest("image: at least one is needed")
    return body


class FormPart(NamedTuple):
    """A part of a form: its name, and where in the body it stands."""

    name: str
    start: int
    end: int


def form_parts(data: Any, content_type: str) -> Iterator[FormPart]:
    """The parts of a form (RFC 7578) in a file; HttpError where it is none."""
    match = re.search(r'boundary="?([^";,]{1,200})', content_type)
    if not match:
        raise HttpError(400, "a form without its boundary")
    mark = b"--" + match[1].strip().encode("latin-1")
    place = data.find(mark)
    while place >= 0:
        start = place + len(mark) + 2
        follows = data[start - 2 : start]
        if follows == b"--":
            return
        if follows != b"\r\n":
            break
        body = data.find(b"\r\n\r\n", start)
        place = data.find(b"\r\n" + mark, start)
        if not start <= body <= place - 4 or body - start > HEAD_BYTES:
            raise HttpError(400, "a part of the form has no head, or breaks off")
        head = data[start:body].decode("utf-8", "replace")
        name = re.search(r'(?i)^content-disposition:.*?\bname="?([^";\r\n]*)', head, re.MULTILINE)
        if not name:
            raise HttpError(400, "a part of the form has no name")
        yield FormPart(name[1], body + 4, place)
        place += 2
    raise HttpError(400, "the form breaks off")


def parsed_head(lines: Sequence[str]) -> HttpRequest:
    """A request without its body; HttpError for what is none.

    https://www.rfc-editor.org/rfc/rfc9112
    """
    from urllib.parse import parse_qsl, unquote

    request = re.fullmatch(rf"({TOKEN}) ([!-~]+) HTTP/(\d)\.(\d)", lines[0])
    if not request:
        raise HttpError(400, "this is no HTTP request")
    method, target, major, minor = request.groups()
    if major != "1":
        raise HttpError(505, "only HTTP/1.1 here")
    headers = parsed_headers(lines[1:])
    if minor == "0":  # which knows neither a second request nor 100 Continue
        headers["connection"] = "close"
        headers.pop("expect", None)
        headers.setdefault("host", "")
    # 1. Whom it is for: a proxy's form of the target overrules Host.
    if not re.fullmatch(HOST, headers.get("host", "missing?")):
        raise HttpError(400, "a Host is needed")
    if absolute := re.fullmatch(rf"(?i)http://({HOST})([/?].*|)", target):
        headers["host"] = absolute[1]
        target = f"/{absolute[2].removeprefix('/')}"
    if method not in METHODS:
        raise HttpError(501, f"{method[:40]} is not known here")
    if not target.startswith("/") and (method, target) != ("OPTIONS", "*"):
        raise HttpError(400, "an address begins with /")
    # 2. What follows, which could be the beginning of another request if we were wrong.
    length = headers.get("content-length", "0")
    coding = headers.get("transfer-encoding", "").lower()
    if not re.fullmatch(r"\d{1,18}", length):
        raise HttpError(400, "Content-Length is no number")
    size = int(length)
    if coding:
        if "content-length" in headers or minor == "0" or not coding.endswith("chunked"):
            raise HttpError(400, "nobody can tell where the body ends")
        if coding != "chunked":
            raise HttpError(501, "a body comes in chunks or with its length")
        size = -1
    path, _, query = target.partition("?")
    return HttpRequest(
        method=method,
        target=target,
        headers=headers,
        length=size,
        path=unquote(path),
        query=dict(parse_qsl(query)),
    )


def parsed_headers(lines: Iterable[str]) -> dict[str, str]:
    """The header fields of a request, those of one name as one list (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for line in lines:
        field = re.fullmatch(rf"({TOKEN}):[ \t]*([\t -~\x80-\xff]*)", line)
        if not field:
            raise HttpError(400, f"no header of HTTP: {line[:40]!r}")
        name = field[1].lower()
        value = field[2].rstrip(" \t")
        if name in headers:  # of Host and Content-Length this makes none
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def behind_proxy(request: HttpRequest) -> HttpRequest:
    """A request as it came to the proxy in front of us, by the headers that it sets."""
    headers = request.headers

    def nearest_proxys(name: str, default: str) -> str:
        return headers.get(name, default).rpartition(",")[2].strip()

    host = nearest_proxys("x-forwarded-host", headers["host"])
    scheme = nearest_proxys("x-forwarded-proto", "http")
    return request._replace(headers={**headers, "host": host}, scheme=scheme)


def is_same(shown: str, expected: str) -> bool:
    """Whether two texts are equal, in constant time: nobody finds a secret letter by letter."""
    import hmac

    return hmac.compare_digest(shown.encode(), expected.encode())


def own_place(place: str) -> str:
    """An address of ours; another site's, however it is spelled, is not gone to.

    >>> own_place("/?image=1"), own_place("//evil.example"), own_place("/\\\\evil.example")
    ('/?image=1', '/', '/')
    """
    if re.fullmatch(r"/(?![/\\])[!-~]*", place):
        return place
    return "/"


def login_page(place: str, message: str = "") -> str:
    """The page that asks for the token, and leads on to `place`."""
    from html import escape

    page = LOGIN.replace("PLACE", escape(own_place(place)))
    return page.replace("MESSAGE", message)


def address_of(host: str) -> str:
    """The host of an address where a server that listens there can be reached."""
    if host == "0.0.0.0":
        host = "127.0.0.1"
        # Nothing is sent: the kernel only says which of our addresses it would take.
        with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            host = probe.getsockname()[0]
    if ":" in host:
        return f"[{host}]"
    return host


def openai_fields(error: ImagenError) -> tuple[int, JsonObject]:
    """The status of an error, its fields in OpenAI's shape, and what only we say of it."""
    kind, code = OPENAI_ERRORS.get(error.code, ("server_error", error.code))
    status = error.http_status
    if error.charged != "no":
        status = 424  # which no client repeats
    fields = error_fields(str(error), kind, code)
    fields["hint"] = error.hint
    fields["charged"] = error.charged
    fields["imagen_code"] = error.code
    return status, fields


def error_fields(message: str, kind: str, code: str) -> JsonObject:
    """An error in OpenAI's shape; `param` is the field that a complaint names first.

    >>> error_fields("steps 900: 0 to 500", "invalid_request_error", "")["param"]
    'steps'
    """
    param = None
    if kind == "invalid_request_error" and code != "unknown_url":
        if message.startswith("backend "):
            param = "backend_opts"
        param = next((word for word in re.findall(r"\w+", message) if word in PARAMS), param)
    return {
        "message": message,
        "type": kind,
        "param": param,
        "code": code or None,
        "hint": "",
        "charged": "no",
    }


def worst_first(errors: Iterable[ImagenError]) -> list[ImagenError]:
    """What may have cost money first, then what no repeat can mend."""
    return sorted(errors, key=lambda error: (error.charged == "no", repeatable(error)))


def shown_fields(record: Record) -> JsonObject:
    """What the page may know of an image."""
    sidecar = record["sidecar"]
    path = record["path"]
    place = record.get("object")
    return {
        **sidecar,
        "id": sidecar["image_id"],
        "storage_path": place or sidecar.get("storage_path"),
        "cloud": bool(place),
        "exists": os.path.exists(path),
        "name": os.path.basename(path),
    }


def usage_of(records: Iterable[Record]) -> JsonObject:
    """The tokens that the backend counted; OpenAI's clients want numbers in any case."""
    total = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    for record in records:
        # Compatible servers put all kinds of things in its place.
        usage = mapping_of((record["sidecar"].get("metadata") or {}).get("usage"))
        for key in total:
            if isinstance(usage.get(key), int):
                total[key] += usage[key]
    details = {"image_tokens": 0, "text_tokens": total["input_tokens"]}
    return {**total, "input_tokens_details": details}


THUMBNAILER = """
import json, os, sys
from PIL import Image, ImageOps

PIXELS_MAX = 1 << 25  # of a picture that is unpacked: 128 MB
os.nice(19)
tried = set()
for line in sys.stdin:
    path, small, pixels = json.loads(line)
    if small in tried or os.path.exists(small):
        continue
    tried.add(small)
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > PIXELS_MAX:
                continue
            picture.draft("RGB", (2 * pixels, 2 * pixels))
            mode = "RGB"
            if "A" in picture.mode or "transparency" in picture.info:
                mode = "RGBA"
            picture = ImageOps.exif_transpose(picture)
            picture.thumbnail((pixels, pixels))
            os.makedirs(os.path.dirname(small), exist_ok=True)
            picture.convert(mode).save(small + ".part", "WEBP", quality=80)
        os.replace(small + ".part", small)
    except Exception:  # no room, or a picture that Pillow does not like
        pass
"""

LOGIN = """<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>ImaGen</title><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark }
body { font: 16px/1.45 system-ui, sans-serif; display: grid; place-content: center;
  min-height: 90vh; margin: 0; padding: 1rem }
form, label { display: grid; gap: .6rem }
input, button { font: inherit; min-height: 2.5rem; padding: .3rem .6rem }
</style>
<main><h1>ImaGen</h1>
<form method="post" action="/login">
<input type="hidden" name="next" value="PLACE">
<label>Token<input type="password" name="token" required autofocus></label>
<button>Log in</button>
<p role="status">MESSAGE</p></form></main>
</html>
"""

PAGE = r"""<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>ImaGen</title><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --tall: 13rem; accent-color: var(--accent);
  --ink: light-dark(#1c1b1a, #eceae6); --soft: light-dark(#5f5b55, #a9a49b);
  --paper: light-dark(#f7f5f1, #161514); --card: light-dark(#fff, #211f1d);
  --line: 1px solid light-dark(#cfc9be, #45413c); --accent: light-dark(#8a3b12, #f0a472) }
* { box-sizing: border-box; margin: 0; min-width: 0; overflow-wrap: anywhere }
body { background: var(--paper); color: var(--ink); font: 16px/1.45 system-ui, sans-serif }
header, .row, #grid, dialog[open] { display: flex; flex-wrap: wrap; gap: .6rem;
  align-items: center }
header, form, main { padding: .6rem 1rem }
ul { padding: 0 }
header { position: sticky; top: 0; z-index: 1; background: var(--paper);
  border-bottom: var(--line) }
h1 { font-size: 1.1rem }
#query { flex: 1 }
#filter { max-width: 36vw }
#info { flex: 1 0 100% }
#info, li { white-space: pre-line }
dt, label, #today { color: var(--soft) }
.error { color: light-dark(#a11212, #ff9c91) }
input, select, button, textarea, a, dialog, #bin { font: inherit; color: inherit;
  background: var(--card); padding: .35rem .6rem; border: var(--line); border-radius: .4rem;
  min-height: 2.5rem; text-decoration: none }
a { align-content: center }
button, summary { cursor: pointer }
summary { line-height: 2.5rem }
[hidden] { display: none !important }
.main { background: var(--accent); color: var(--paper) }
form, label, li { display: grid; gap: .2rem .6rem }
form { gap: .6rem }
label > * { color: var(--ink) }
#fields { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem }
#inputs img, #from img { height: 4rem }
li { grid-template-columns: 1fr auto; align-items: center; padding: .3rem 0 }
li progress { grid-column: 1 / -1; width: 100% }
#grid::after { content: ""; flex: 1e9 }
.tile { --wide: calc(var(--ratio) * var(--tall)); flex: var(--ratio) 1 var(--wide);
  position: relative; max-width: calc(1.6 * var(--wide)) }
.tile a { display: block; min-height: 0; padding: 0; border: 0; aspect-ratio: var(--ratio);
  overflow: hidden }
.tile img { width: 100%; height: 100%; object-fit: cover }
.tile label { position: absolute; top: 0; right: 0; padding: .5rem }
.tile input { width: 1.5rem; min-height: 1.5rem }
#bin { position: fixed; inset: auto 1rem 1rem }
dialog { width: min(80rem, 96vw); max-height: 94vh; margin: auto; padding: 1rem }
dialog::backdrop { background: #000b }
dialog > div { flex: 2 1 17rem; align-self: start }
#zoom { flex: 3 1 20rem; padding: 0; border: 0; overflow: auto }
#big { max-width: 100%; height: auto; max-height: 88vh }
#zoom[aria-pressed=true] { flex-basis: 100% }
[aria-pressed=true] > #big { max-width: none; max-height: none }
#text { margin-bottom: 1rem; white-space: pre-wrap }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
@media (max-width: 50rem) {
  :root { --tall: 8rem }
  #big { max-height: 55vh }
}
</style>
<header><h1>ImaGen</h1>
<input id="query" type="search" placeholder="Search (/)"
 aria-label="Search prompts, styles and seeds">
<select id="filter" aria-label="Show images of"><option value="">all backends</option></select>
<span id="today"></span><button id="erase" hidden></button>
<p id="info" role="status" hidden></p></header>
<form id="form" aria-label="New image">
<label>Prompt<textarea id="prompt" required></textarea></label>
<details id="settings"><summary>Settings</summary><div id="fields">
<label>Backend<select id="backend"></select></label>
<label>Style<select id="style"><option value="">none</option></select></label>
<label>Size<input id="size" placeholder="auto" pattern="\d+x\d+|auto"></label>
<label>Images<input id="n" type="number" min="1" max="10" value="1" required></label>
<label>Seed<input id="seed" type="number" min="0" placeholder="random"></label>
<label>Steps<input id="steps" type="number" min="1"></label>
<label>Avoid<input id="negative"></label>
<label>Options (JSON)<input id="opts"></label></div></details>
<div class="row"><button class="main" id="go">Make it</button>
<label class="row">Start from images
<input id="files" type="file" accept="image/*" multiple></label>
<label class="row" id="masked" hidden>Mask
<input id="mask" type="file" accept="image/png"></label></div>
<div id="inputs" class="row" role="group" aria-label="Images to start from" hidden></div></form>
<main><ul id="calls" aria-label="Under way"></ul>
<div id="grid"></div><p id="none"></p><div id="more"></div></main>
<p id="bin" class="row" role="status" hidden><span id="binned"></span>
<button id="undo">Undo</button></p>
<dialog id="detail" aria-labelledby="text" closedby="any">
<button id="zoom" title="Original size"><img id="big" alt=""></button>
<div><p id="text"></p>
<div class="row"><button id="newer" aria-label="Newer">←</button>
<button id="older" aria-label="Older">→</button><button id="close">Close</button>
<button id="again" class="main">Again with a new seed</button>
<button id="edit">Edit this</button>
<button id="use">Use these settings</button><button id="copy">Copy prompt</button>
<button id="copyseed">Copy seed</button><button id="command">Copy command line</button>
<a id="save">Download</a><button id="remove">Delete</button></div>
<p id="note" role="status"></p><div id="from" class="row"></div>
<dl id="facts"></dl></div></dialog>
<script nonce="NONCE">
const $ = id => document.getElementById(id)
const set = (id, more) => Object.assign($(id), more)
const write = (id, textContent) => set(id, { textContent })
const make = (name, more, ...children) => {
  const element = Object.assign(document.createElement(name), more)
  element.append(...children)
  return element
}
let inputs = [], images = [], next = "", loading = false, round = 0, open, source, bin = [], timer
const marked = () => images.filter(image => $(image.id).querySelector(":checked"))

const tell = (text, look = "") =>
  set("info", { textContent: text, className: look, hidden: !text })
const complain = problem => tell(problem.message + "\n" + (problem.hint || ""), "error")

async function ask(path, more) {
  const response = await fetch(path, more)
    .catch(() => { throw Error("The server does not answer.") })
  if (response.status === 401) location.reload()  // to the login
  if (!response.ok) throw (await response.json()).error
  return response
}
const get = (path, more) => ask(path, more).then(response => response.json())

function tile(image, first) {
  const { id, prompt, exists, width, height } = image
  if ($(id) || bin.some(other => other.id === id)) return
  const shape = ratio => box.style.setProperty("--ratio", Math.max(.3, ratio))
  const link = make("a", { href: "/?image=" + id, onclick: event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return
    event.preventDefault()
    show(image)
  } })
  const img = make("img", { loading: "lazy", alt: prompt,
    onload: () => shape(img.naturalWidth / img.naturalHeight) })
  const mark = make("input", { type: "checkbox", ariaLabel: "Select " + prompt, onchange: choose })
  const box = make("div", { className: "tile", id }, link, make("label", {}, mark))
  shape(width / height)
  if (exists) img.src = "/thumbs/" + id
  link.append(exists ? img : "The file is gone: " + prompt)
  $("grid")[first ? "prepend" : "append"](box)
  images[first ? "unshift" : "push"](image)
  write("none", "")
}

function choose() {
  const { length } = marked()
  set("erase", { hidden: !length, textContent: "Delete " + length })
}

function drop(ids) {
  images = images.filter(image => !ids.includes(image.id))
  ids.forEach(id => $(id)?.remove())
  choose()
}

function erase(list) {  // in ten seconds, unless somebody says Undo
  empty()
  bin = list
  drop(list.map(image => image.id))
  write("binned", list.length + " deleted.")
  $("bin").hidden = false
  timer = setTimeout(empty, 10000)
}

function empty(undo) {
  const images = bin
  clearTimeout(timer)
  bin = []
  $("bin").hidden = true
  if (undo === true) load(true)
  else for (const { id } of images)
    ask("/api/images/" + id, { method: "DELETE", keepalive: true })
      .catch(problem => load(true).then(() => complain(problem)))
}

async function load(fresh) {
  if (!fresh && (loading || !next)) return
  const mine = fresh ? ++round : round
  if (fresh) next = ""
  const params = { query: $("query").value, backend: $("filter").value, before: next,
    limit: Math.max(24, fresh && images.length) }
  loading = true
  try {
    const page = await get("/api/images?" + new URLSearchParams(params))
    if (mine !== round) return
    if (fresh) drop(images.map(image => image.id))
    page.images.forEach(image => tile(image))
    next = page.next
    if (!images.length)
      write("none", params.query || params.backend ? "Nothing found." : "No images yet.")
  } catch (problem) {
    next = null
    complain(problem)
  }
  loading = false
  if ($("more").getBoundingClientRect().top < innerHeight + 600) load()
}

function follow() {  // a browser has six connections: a hidden tab needs none
  source?.close()
  if (document.hidden) return
  source = new EventSource("/api/events")
  const on = (kind, act) => source.addEventListener(kind, event => act(JSON.parse(event.data)))
  on("calls", calls)
  on("image", image => $("query").value || $("filter").value ? load(true) : tile(image, true))
  on("deleted", ({ id }) => drop([id]))
  source.onopen = () => load(true, tell(""))
  source.onerror = () => {
    get("/api/calls").catch(complain)
    if (source.readyState === 2) setTimeout(follow, 3000)
  }
}

function calls({ calls, usd_today: usd }) {
  write("today", usd ? `$${usd} today` : "")
  for (const row of [...$("calls").children])
    if (!calls.some(call => call.id === row.id)) {
      tell(row.end || "Done.")
      row.remove()
    }
  for (const { id, prompt, n, made, left, place, note, done, total, ...call } of calls) {
    const row = $(id) || make("li", { id }, make("span"), make("button", { onclick: () => {
      row.end = button.textContent + "ed."
      get("/api/calls/" + id, { method: "DELETE" }).catch(complain)
    } }), make("progress", { ariaLabel: "Progress" }))
    const [text, button, bar] = row.children, [error] = call.errors
    const state = !left ? error.message + "\n" + error.hint
      : call.unstoppable ? "paid already: it is waited for"
      : place ? `waits, ${place} in line` : `${note || "begins"}, ${made} of ${n} done`
    if (!left && !text.className) tell("It has failed.", text.className = "error")
    text.textContent = `${prompt.slice(0, 200)}: ${state}`
    button.textContent = left ? "Cancel" : "Dismiss"
    bar.hidden = !left
    if (call.unstoppable) row.end = ""
    if (total) bar.value = done / total
    else bar.removeAttribute("value")
    if (!row.isConnected) $("calls").append(row)
  }
}

function start(files) {
  inputs.push(...[...files].filter(file => file.type.startsWith("image/")))
  $("inputs").replaceChildren(...inputs.map(input => make("button",
    { type: "button", onclick: () => {
      inputs = inputs.filter(other => other !== input)
      start([])
    } },
    make("img", { src: URL.createObjectURL(input), alt: input.name + ", take it out" }))))
  $("inputs").hidden = $("masked").hidden = !inputs.length
}

async function edit({ id, name }) {
  const blob = await (await ask("/images/" + id)).blob()
  inputs = []
  start([new File([blob], name, { type: blob.type })])
  back()
}

function back() {
  $("detail").close()
  $("prompt").focus()
  scrollTo(0, 0)
}

const filled = facts => Object.entries(facts).filter(([, value]) => (value ?? "") !== "")
const optioned = ({ requested: { backend_opts: opts } }) => opts ? JSON.stringify(opts) : ""
const sized = ({ requested: { width, height } }) => width ? width + "x" + height : ""

function show(image) {
  open = image
  const { name, prompt, width, height, exists, cost_usd_estimate: cost, latency_ms: took } = image
  const facts = { Backend: image.backend, Model: image.model, Size: width + " × " + height,
    Seed: image.seed, Style: image.style, Avoided: image.negative_prompt, Steps: image.steps,
    Options: optioned(image), Ignored: image.ignored.join(", "),
    Cost: cost == null ? "unknown" : "$" + cost,
    Took: took && (took / 1000).toFixed(1) + " s",
    Made: new Date(image.timestamp).toLocaleString(),
    Cloud: image.cloud ? image.storage_path : "not uploaded", File: name }
  $("facts").replaceChildren(...filled(facts).flatMap(([key, value]) =>
    [make("dt", {}, key), make("dd", {}, value)]))
  const from = [...image.inputs || [], ...image.mask ? [image.mask] : []]
  $("from").replaceChildren(...from.map(({ name, sha256 }) => make("img", { alt: name,
    src: "/inputs/" + sha256, onerror: event => event.target.remove() })))
  write("text", prompt)
  write("note", exists ? "" : "The file is gone.")
  set("save", { download: name, hidden: !exists, href: "/images/" + image.id })
  set("zoom", { hidden: !exists, ariaPressed: false })
  if (exists) {
    set("big", { alt: prompt, width, height, src: "/thumbs/" + image.id })
    const original = make("img", { src: $("save").href })
    original.decode().then(() => open === image && set("big", { src: original.src }),
      () => open === image && write("note", "It cannot be shown."))
  }
  const at = "/?image=" + image.id
  if ($("detail").open) history.replaceState("", "", at)
  else {
    if (!at.endsWith(location.search || "?")) history.pushState("", "", at)
    $("detail").showModal()
  }
}

async function route() {
  const id = new URLSearchParams(location.search).get("image")
  if (id) show(await get("/api/images/" + id))
  else $("detail").close()
}

function step(by) {
  const at = images.findIndex(image => image.id === open.id) + by
  if (images[at]) show(images[at])
  if (at > images.length - 3) load()
}

function command(image) {
  const quoted = text => /^[\w.,:=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
  const flags = { "-b": image.backend, "-s": image.style, "--size": sized(image),
    "--seed": image.seed, "--steps": image.requested.steps || "",
    "--negative": image.negative_prompt }
  const argv = filled(flags).flat()
  for (const [name, value] of Object.entries(image.requested.backend_opts || {}))
    argv.push("--opt", name + "=" + JSON.stringify(value))
  return ["imagen generate", ...[...argv, "--", image.prompt].map(quoted)].join(" ")
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
    write("note", "Copied.")
  } catch {  // plain http from elsewhere: no clipboard
    write("note", text)
    getSelection().selectAllChildren($("note"))
  }
}

function fill(seed) {
  const values = { prompt: open.prompt, backend: open.backend, style: open.style,
    size: sized(open), n: 1, seed, steps: open.requested.steps || "",
    negative: open.negative_prompt, opts: optioned(open) }
  for (const id in values) $(id).value = values[id]
  $("settings").open = true
  back()
}

async function generate() {
  const body = { prompt: $("prompt").value, model: $("backend").value, style: $("style").value,
    size: $("size").value || "auto", n: $("n").valueAsNumber, seed: $("seed").valueAsNumber,
    steps: $("steps").valueAsNumber, negative_prompt: $("negative").value,
    backend_opts: JSON.parse($("opts").value || "{}"), response_format: "url" }
  const headers = { Prefer: "respond-async" }
  let path = "/v1/images/generations"
  let data = JSON.stringify(body)  // NaN becomes null
  if (inputs.length) {
    const form = new FormData()
    for (const [name, value] of Object.entries(JSON.parse(data)))
      if ((value ?? "") !== "") form.append(name, value.trim ? value : JSON.stringify(value))
    inputs.forEach(file => form.append("image[]", file))
    if ($("mask").files[0]) form.append("mask", $("mask").files[0])
    path = "/v1/images/edits"
    data = form
  } else headers["Content-Type"] = "application/json"
  await ask(path, { method: "POST", headers, body: data })
}

$("form").onsubmit = async event => {
  event.preventDefault()
  $("go").disabled = true  // until it is in line
  await generate().then(() => tell("In line."), complain)
  $("go").disabled = false
}
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit()
}
$("files").onchange = () => {
  start($("files").files)
  $("files").value = ""
}
document.onpaste = event => start(event.clipboardData.files)
ondragover = event => event.preventDefault()
ondrop = event => {
  event.preventDefault()
  start(event.dataTransfer.files)
}
const clicks = { newer: () => step(-1), older: () => step(1), close: () => $("detail").close(),
  copy: () => copy(open.prompt), command: () => copy(command(open)),
  copyseed: () => copy(String(open.seed)), erase: () => erase(marked()),
  undo: () => empty(true), remove: () => {
    $("detail").close()
    erase([open])
  }, zoom: () => set("zoom", { ariaPressed: $("zoom").ariaPressed !== "true" }),
  edit: () => edit(open).catch(complain),
  use: () => fill(open.seed ?? ""), again: () => {
    fill("")
    $("go").click()
  } }
for (const id in clicks) $(id).onclick = clicks[id]
$("query").oninput = $("filter").onchange = () => load(true)
onkeydown = event => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
  if ($("detail").open && by) step(by)
  else if (event.key === "/" && !$("detail").open
    && !event.target.matches("input, textarea, select")) {
    event.preventDefault()
    $("query").focus()
  }
}
$("detail").onclose = () => { if (location.search) history.pushState("", "", "/") }
onpopstate = () => route().catch(complain)
onpagehide = empty
document.onvisibilitychange = follow
new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && load(),
  { rootMargin: "600px" }).observe($("more"))
get("/api/options").then(options => {
  for (const name of options.backends) {
    const fault = options.faults[name]
    $("filter").add(new Option(name))
    $("backend").add(new Option(fault ? `${name}: not usable, ${fault}` : name, name))
  }
  for (const name of options.styles) $("style").add(new Option(name))
  $("backend").value = options.default
  $("settings").open = innerWidth > 800
  follow()
  return route()
}).catch(complain)
</script>
</html>
"""


# === MCP: tools for agents, a JSON object a line on stdin and stdout ===
#
# https://modelcontextprotocol.io/specification/2026-07-28, which knows no session, and those before
# it, which begin with `initialize`. The protocol itself repeats calls after a broken pipe, so what
# costs money has a request_id, which is the key of an order. No answer holds image bytes.

MCP_VERSIONS = ("2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
MCP_META = "io.modelcontextprotocol/"
MCP_PROGRESS_S = 0.5  # less than any client waits for a sign of life
MCP_LINE_BYTES = 1 << 20
MCP_USD = 2.0  # of a session for which nobody says what it may spend
MCP_RULES = """\
Images are made by generate_image, which may cost money (see list_backends). Give each new image a
new request_id, and repeat a call only with the same one: then it is paid once, and the same image
comes again. After an error with charged "yes" or "unknown" never call again without it: use
recover_images. Show the user the path; never read the file into the conversation."""


class McpArguments(NamedTuple):
    """What generate_image takes."""

    prompt: str
    backend: str = ""
    style: str = ""
    negative_prompt: str = ""
    size: str = ""
    n: Annotated[int, Between(1, 10)] = 1
    seed: int | None = None
    images: tuple[str, ...] = ()
    mask: str = ""
    strength: Annotated[float, Between(0, 1)] = 0.0
    aspect: str = ""
    format: Format = ""
    background: Background = ""
    quality: str = ""
    request_id: str = ""
    max_cost: float | None = None


class McpQuery(NamedTuple):
    """What list_images takes."""

    query: str = ""
    limit: Annotated[int, Between(1, 100)] = 10


class McpNothing(NamedTuple):
    """What the other tools take."""


MCP_FIELDS = {
    "prompt": "what to see, in the user's words",
    "backend": "one of list_backends; empty: the default. Another may cost money: ask the user",
    "size": "WxH in pixels, such as 1024x768; empty: the backend's own",
    "n": "how many, with seeds in a row",
    "images": "images to start from: ids of list_images, or paths of files",
    "mask": "a PNG, transparent where the first image is to be made anew",
    "strength": "how far from the first image; 0: the backend's default",
    "aspect": "W:H, such as 16:9, where no size is named",
    "request_id": "a word of yours for this image; the same one when you repeat the call",
    "max_cost": "USD that this call may cost; lower than what the session may",
    "query": "words that must stand in the prompt",
}
# Name → what it takes, whether it only looks, and what it is for.
MCP_TOOLS: dict[str, tuple[Any, bool, str]] = {
    "generate_image": (McpArguments, False, MCP_RULES),
    "list_images": (McpQuery, True, "The images made here, newest first: paths, prompts, seeds."),
    "recover_images": (McpNothing, False, "Fetches images whose outcome is unknown; pays nothing."),
    "list_backends": (McpNothing, True, "What can make images, what it takes, and what it costs."),
}


class McpError(Exception):
    """An error of the protocol: a code of JSON-RPC, a sentence, and maybe data."""

    def __init__(self, code: int, message: str, **data: Any) -> None:
        self.fields = {"code": code, "message": message, **data}


class Mcp:
    """One session with one client. `send` writes a line."""

    def __init__(
        self,
        config: Config,
        send: Callable[[str], None],
        folders: Sequence[str],
        owners: Collection[str],
    ) -> None:
        self.config = config
        self.owners = owners
        self.send = send
        self.spent: dict[str, float] = {}  # as of a Runner
        self.folders = [os.path.realpath(folder) for folder in folders]
        self.calls: dict[Runner, str] = {}  # and the ids of their requests, as JSON
        self.cancelled: set[Any] = set()
        self._lock = threading.Lock()

    def line(self, raw: bytes) -> None:
        """Answer a line, now or from a thread of its own."""
        message = parsed(raw[:MCP_LINE_BYTES])
        if not isinstance(message.get("method", ""), str):
            message = {}
        if not message:
            reason = "no request in JSON"
            if len(raw) > MCP_LINE_BYTES:
                reason = "the line is too long"
            self.tell(message, id=None, error={"code": -32700, "message": reason})
        params = mapping_of(message.get("params"))
        method = message.get("method", "")
        if method == "notifications/cancelled" and "requestId" in params:
            self.cancel(params["requestId"])
        if "id" not in message or not method:
            return  # a notification, or the answer to something that we never ask
        if method == "tools/call":
            in_thread(self.respond, message, params)
        else:
            self.respond(message, params)

    def respond(self, message: Fields, params: Fields) -> None:
        """Answer a request."""
        outcome: JsonObject
        try:
            outcome = {"result": self.result(message, params)}
        except McpError as problem:
            outcome = {"error": problem.fields}
        except Exception as problem:
            outcome = {"error": {"code": -32603, "message": str(as_error(problem))}}
        self.tell(message, id=message["id"], **outcome)

    def tell(self, message: Fields, **fields: Any) -> None:
        """Send something about a request; nothing any more where it was cancelled."""
        with self._lock:
            if not self.is_cancelled(message):
                self.send(to_json({"jsonrpc": "2.0", **fields}))

    def is_cancelled(self, message: Fields) -> bool:
        """Whether the client wants no more of this request."""
        return to_json(message.get("id")) in self.cancelled

    def cancel(self, ident: Any) -> None:
        """End what is free; what was paid for goes on, and is shown by list_images."""
        with self._lock:
            self.cancelled.add(to_json(ident))
            for runner, request in self.calls.items():
                if request == to_json(ident):
                    runner.stop("user")

    def result(self, message: Fields, params: Fields) -> JsonObject:
        """The result of a request."""
        version = mapping_of(params.get("_meta")).get(f"{MCP_META}protocolVersion")
        if version not in (None, *MCP_VERSIONS):
            data = {"supported": [*MCP_VERSIONS], "requested": version}
            raise McpError(-32022, f"unknown protocol version {version}", data=data)
        server = {"name": "imagen", "version": __version__}
        tools: JsonObject = {"capabilities": {"tools": {}}, "instructions": MCP_RULES}
        lasting = {"ttlMs": 3_600_000, "cacheScope": "private"}
        result: JsonObject = {}
        method = message["method"]
        if method == "initialize":
            chosen = params.get("protocolVersion")
            if chosen not in MCP_VERSIONS[1:]:
                chosen = MCP_VERSIONS[1]
            result = {"protocolVersion": chosen, "serverInfo": server, **tools}
        elif method == "server/discover":
            result = {"supportedVersions": [*MCP_VERSIONS], **tools, **lasting}
            result["_meta"] = {f"{MCP_META}serverInfo": server}
        elif method == "tools/list":
            result = {"tools": [mcp_tool(name) for name in MCP_TOOLS], **lasting}
        elif method == "tools/call":
            result = self.call(message, params)
        elif method != "ping":
            raise McpError(-32601, f"{method[:80]}: no such method")
        if version:
            result["resultType"] = "complete"
        return result

    def call(self, message: Fields, params: Fields) -> JsonObject:
        """What a tool answers; an error of its own is a result too."""
        from urllib.parse import quote

        name = params.get("name")
        if name not in MCP_TOOLS:
            raise McpError(-32602, f"no tool {name!r}: {nearest(str(name), MCP_TOOLS)}")
        shape, _, _ = MCP_TOOLS[name]
        links = []
        try:
            arguments = from_mapping(shape, params.get("arguments"), "", BadRequest)
            document = getattr(self, name)(arguments, message, params)
            for image in document["images"]:
                link = {
                    "type": "resource_link",
                    "uri": f"file://{quote(image['path'])}",
                    "name": os.path.basename(image["path"]),
                    "mimeType": image["mime_type"],
                }
                links.append(link)
        except Exception as problem:
            error = as_error(problem)
            document = {"ok": False, "images": [], "error": mcp_error(error)}
        return {
            "content": [{"type": "text", "text": to_json(document)}, *links],
            "structuredContent": document,
            "isError": not document["ok"],
        }

    def generate_image(
        self, arguments: McpArguments, message: Fields, params: Fields
    ) -> JsonObject:
        """Make images, and say where they are."""
        fields = arguments._asdict()
        fields.update(size_fields(fields.pop("size") or "auto"))
        limit = fields.pop("max_cost")
        fields["key"] = fields.pop("request_id")
        fields["images"] = [self.checked(source) for source in fields["images"]]
        if fields["mask"]:
            fields["mask"] = self.checked(fields["mask"])
        plans = plans_of(from_mapping(Order, fields, "", BadRequest), self.config)
        usd = sum(plan.price.most() or 0.0 for plan in plans)
        left = (self.config.budget.per_command or 0.0) - sum(self.spent.values())
        if limit is not None:
            left = min(left, limit)
        if usd > left:
            text = f"${usd:g} are more than the ${max(0.0, left):g} that are left"
            raise OverBudget(text, "the user may allow more with imagen mcp --max-cost")
        runner = Runner(plans, self.config, parallel=plans[0].parallel)
        self.follow(runner, message, params)
        return self.outcome(runner)

    def recover_images(self, _: McpNothing, message: Fields, params: Fields) -> JsonObject:
        """End what is unfinished."""
        taken = [entry for row in unfinished() if (entry := Entry.take(row.path))]
        runner = Runner(taken, self.config)
        runner.STOPPING_ERRORS = ()  # type: ignore[misc]  # one entry says nothing of the next
        self.follow(runner, message, params)
        return self.outcome(runner)

    def list_images(self, query: McpQuery, *_: Any) -> JsonObject:
        """The newest images of the config's owner."""
        records = images_made(self.owners, terms=query.query.split())
        images = [mcp_image(record) for record in itertools.islice(records, query.limit)]
        return {"ok": True, "images": images}

    def list_backends(self, *_: Any) -> JsonObject:
        """What is configured."""
        rows = []
        for name in self.config.backends:
            row: JsonObject = {"name": name, "default": name == self.config.default_backend}
            try:
                cls, options = options_of(name, self.config.backends)
                takes = cls.takes(options)
                price = cls.price(options, Request("a fox", backend=name))
                row.update(paid=cls.paid, usd=price.usd)
                row["model"] = getattr(options, "model", None)
                row.update(images=takes.images, mask=takes.mask, strength=takes.strength)
            except ImagenError as problem:
                row["error"] = str(problem)
            rows.append(row)
        return {"ok": True, "images": [], "backends": rows}

    def checked(self, source: str) -> str:
        """An image to start from, if an agent may name it: an id, or a file in our folders."""
        if source == "last" or is_uuid(source):
            record = find_image(source)
            if record and may_see(record, self.owners):
                return source
            raise BadRequest(f"{source}: no image of that id is known here")
        path = os.path.realpath(full_path(source))
        if any(os.path.commonpath([folder, path]) == folder for folder in self.folders):
            return path
        raise BadRequest(f"{source}: not in a folder that is open to agents", "--allow-path DIR")

    def follow(self, runner: Runner, message: Fields, params: Fields) -> None:
        """Wait for a runner; tell the client how far it is, where it wants to know."""
        token = mapping_of(params.get("_meta")).get("progressToken")
        runner.spent = self.spent
        with self._lock:
            self.calls[runner] = to_json(message["id"])
            if self.is_cancelled(message):
                runner.stop("user")
        began = told_at = time.monotonic()
        runner.start()
        while runner.busy:
            with runner.changed:
                runner.changed.wait(0.2)
                progress = next(reversed(runner.active.values()), Progress("finishing"))
            now = time.monotonic()
            if token is None or now < told_at + MCP_PROGRESS_S:
                continue
            told_at = now
            note = f"{progress.note or 'waiting'}, {len(runner.records)} made"
            fields = {"progressToken": token, "progress": round(now - began, 1), "message": note}
            self.tell(message, method="notifications/progress", params=fields)
        with self._lock:
            del self.calls[runner]

    def outcome(self, runner: Runner) -> JsonObject:
        """What a runner made, and its worst error."""
        errors = worst_first(runner.errors)
        if not errors and runner.waiting:  # so it was stopped
            errors = [Interrupted(f"{len(runner.waiting)} images did not begin")]
        document: JsonObject = {"ok": not errors, "images": [*map(mcp_image, runner.records)]}
        if errors:
            document["error"] = mcp_error(errors[0])
        return document

    def stop(self) -> None:
        """The client has gone: free work ends, what was paid for is waited for."""
        with self._lock:
            runners = [*self.calls]
        for runner in runners:
            runner.stop("user")
        until = time.monotonic() + self.config.worker.grace_s
        while any(runner.busy for runner in runners) and time.monotonic() < until:
            time.sleep(0.05)


def mcp_error(error: ImagenError) -> JsonObject:
    """An error as an agent should read it."""
    fields = {"code": error.code, "message": str(error), "hint": error.hint}
    advice = "you may call again with the same request_id"
    if error.charged != "no":
        advice = "do not call again: use recover_images"
    elif not error.retryable:
        advice = "do not call again unchanged"
    return {**fields, "charged": error.charged, "advice": advice}


def mcp_image(record: Record) -> JsonObject:
    """What an agent may know of an image."""
    sidecar: Fields = record["sidecar"]
    image = {
        "path": record["path"],
        "id": sidecar["image_id"],
        "prompt": sidecar["prompt"],
        "backend": str(sidecar.get("backend")),
        "mime_type": sidecar.get("mime_type") or "image/png",
        "seed": sidecar.get("seed"),
        "cost_usd": sidecar.get("cost_usd_estimate"),
        "charged": sidecar.get("charged") or "no",
    }
    if deviations := sidecar.get("deviations"):
        image["deviations"] = deviations
    if record.get("reused"):
        image["reused"] = True
    return image


def mcp_tool(name: str) -> JsonObject:
    """A tool as the client is told of it."""
    shape, looks, description = MCP_TOOLS[name]
    taken = schema(shape)
    for field, fields in taken["properties"].items():
        # Not that it may be null: from a plain type a client knows what to make of a text.
        if choices := fields.pop("anyOf", None):
            fields.update(choices[0])
        if field in MCP_FIELDS:
            fields["description"] = MCP_FIELDS[field]
    text = {"type": "string"}
    image = {"type": "object", "properties": {"path": text, "id": text}}
    made = {"ok": {"type": "boolean"}, "images": {"type": "array", "items": image}}
    made |= {"error": {"type": "object"}, "backends": {"type": "array"}}
    return {
        "name": name,
        "description": description,
        "inputSchema": taken,
        "outputSchema": {"type": "object", "properties": made, "required": ["ok", "images"]},
        "annotations": {
            "readOnlyHint": looks,
            "destructiveHint": False,
            "idempotentHint": looks,
            "openWorldHint": not looks,
        },
    }


# === Terminal: one line that rewrites itself; everything else a person reads ===


class Terminal:
    """stdout gets results and nothing else; stderr what a person reads.

    On a terminal one progress line stands below that.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        """--json holds even where the rest of `argv` is a mistake; the parser sets the others."""
        flags = itertools.takewhile(lambda word: word != "--", argv)
        self.as_json = "--json" in flags
        self.quiet = False
        self.verbose = False
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.unwritten = False  # something that belongs on stdout
        self.offers_mock = False  # to whom a backend fails
        self.lock = threading.RLock()
        self._drawn = False

    def say(self, text: str, prefix: str = "imagen: ") -> None:
        """A message for a person."""
        with self.lock, suppress(OSError, ValueError):
            self.draw("")
            sys.stderr.write(f"{prefix}{redact(printable(text))}\n")
            sys.stderr.flush()

    def note(self, text: str) -> None:
        """A line that -q leaves out."""
        if not self.quiet:
            self.say(text, prefix="")

    def report(self, problem: BaseException) -> ImagenError:
        """The error that `problem` is, shown where no JSON will; with -v where it arose."""
        error: ImagenError = Interrupted("interrupted")
        if isinstance(problem, Exception):
            error = as_error(problem)
        if self.offers_mock and isinstance(error, BadConfig | Unreachable):
            error.hint = f"{error.hint}; or try -b mock".removeprefix("; ")
        if self.verbose and (error.code == "bug" or problem.__cause__):
            import traceback

            self.say("".join(traceback.format_exception(problem)), prefix="")
        if not self.as_json:
            self.say(str(error))
            if error.hint:
                self.say(error.hint, prefix="        → ")
        return error

    def write(self, *lines: str) -> None:
        """Lines on stdout, flushed. A reader that has gone is no error."""
        with self.lock:
            self.draw("")
            try:
                sys.stdout.writelines(f"{line}\n" for line in lines)
                sys.stdout.flush()
            except (OSError, ValueError) as problem:
                # What comes later, the flush at exit too, goes nowhere.
                with suppress(OSError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
                if not isinstance(problem, BrokenPipeError | ValueError):
                    self.unwritten = True
                    self.say(f"stdout: {problem}; it would have said: {' '.join(lines)}")

    def result(self, document: Fields, *lines: str, error: ImagenError | None = None) -> int:
        """All that a command has to say, as JSON or as lines; returns the exit code."""
        code = 0
        outcome: JsonObject = {"ok": True}
        if error:
            code = error.exit_code
            outcome = {"ok": False, "error": self.fields(error), "images": []}
        if self.as_json:
            lines = (to_json({**outcome, **document}),)
        self.write(*lines)
        return code

    def fields(self, error: ImagenError) -> JsonObject:
        """What JSON says of an error."""
        return {
            "message": str(error),
            "code": error.code,
            "hint": error.hint,
            "charged": error.charged,
            "retryable": repeatable(error),
        }

    def progress(
        self,
        now: Progress,
        elapsed: float,
        usual: float | None,
        count: str,
    ) -> None:
        """Show how far something is, in as much room as there is."""
        columns = 80
        with suppress(OSError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or columns
        # A longer line would wrap, and the next one could not rewrite it.
        self.draw(progress_line(now, elapsed, usual, count, columns - 1))

    def draw(self, line: str) -> None:
        """Show `line` in place of the last progress line; nothing leaves none."""
        if not self.live or self.quiet or not (line or self._drawn):
            return
        with self.lock, suppress(OSError):
            if line and not os.environ.get("NO_COLOR"):
                line = f"\x1b[2m{line}\x1b[0m"
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
            self._drawn = bool(line)


def aligned(rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows as lines, cell under cell, with nothing in them that steers a terminal."""

    def shown(cell: object) -> str:
        return printable(redact(str(cell))).replace("\n", " ")

    table = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in table]
    return [line.rstrip() for line in lines]


def progress_line(
    now: Progress,
    elapsed: float,
    usual: float | None,
    count: str = "",
    columns: int = 79,
) -> str:
    """One line: what happens, a bar where its length is known or learned, the time.

    Where the columns are few the bar is shorter or missing, and then the note.

    >>> progress_line(Progress("sampling", 1, 4), 2.0, None)
    'sampling  ━━━━━━━━━───────────────────────────  1/4  2.0 s'
    """
    bar = ""
    steps = ""
    took = f"{elapsed:.1f} s"
    share = None
    if now.done is not None and now.total:
        share = min(1.0, now.done / now.total)
        steps = f"{share:.0%}"
        if now.done % 1 == now.total % 1 == 0:
            steps = f"{now.done:.0f}/{now.total:.0f}"
    elif usual:
        # Never full: it may take longer than usual.
        share = min(0.99, elapsed / usual)
        took = f"{took} of about {usual:.0f}"
    end = "  ".join(filter(None, (steps, took, count)))
    note = (now.note or "waiting")[: max(0, columns - len(end) - 2)]
    room = min(36, columns - len(note) - len(end) - 4)
    if share is not None and room > 3:
        bar = f"{'━' * round(room * share):─<{room}}"
    return "  ".join(filter(None, (note, bar, end)))[:columns]


def usual_seconds(plan: Plan) -> float | None:
    """The median time of the last nine images of the same backend, model and size."""
    model = plan.parameters.get("model")
    size = (plan.styled.width, plan.styled.height)
    times = []
    for record in images_made(backend=plan.request.backend):
        sidecar = record["sidecar"]
        same_model = model in (None, sidecar.get("model"))
        made = (sidecar.get("width"), sidecar.get("height"))
        same_size = size in ((0, 0), made)
        latency = sidecar.get("latency_ms")
        if same_model and same_size and isinstance(latency, int):
            times.append(latency / 1000)
        if len(times) == 9:
            break
    if not times:
        return None
    return sorted(times)[len(times) // 2]


def money(usd: float | None) -> str:
    """
    >>> money(0.003), money(0.0), money(None)
    ('$0.003', '$0', '$?')
    """
    if usd is None:
        return "$?"
    return f"${usd:.6f}".rstrip("0").rstrip(".")


# === Commands: argparse and main() ===

Cmd = Callable[["argparse.Namespace", Terminal], int]
COMMANDS: dict[str, tuple[Cmd, str]] = {}
GROUPS = {
    "images": "generate batch wait list cost sign delete",
    "what is unfinished": "recover sync",
    "doors": "serve mcp skill worker jobs",
    "setting up": "setup install uninstall config backends styles migrate help",
}


def command(text: str) -> Callable[[Cmd], Cmd]:
    """Decorator: `cmd_x_y` is the command `x y`; the first line of `text` tells what it does.

    Each further line is one argument: its spellings, its value, two spaces, its help. `N` is a
    whole number, `S` a number, `a|b` a choice; an option without a value is a switch. `[X]` may be
    missing, `X…` are several behind each other, `X*` may be given again. `(x)` at the end of the
    help is the default.
    """

    def add(cmd: Cmd) -> Cmd:
        name = cmd.__name__.removeprefix("cmd_").replace("_", " ")
        COMMANDS[name] = (cmd, text.strip())
        return cmd

    return add


EVERYWHERE = """
--config FILE  instead of the user's imagen.yaml
--json         one JSON document on stdout
-q --quiet     results, warnings and errors only
-v --verbose   what the backend gets; a traceback where something unexpected happens
"""
TIMEOUT = """
--timeout SECONDS  for one image (600)
"""
MAX_COST = """
--max-cost USD  what this command may spend; else budget.per_command
"""
ORDER_FLAGS = """
-b --backend NAME  one of `imagen backends`
-s --style NAME    one of `imagen styles`
--size WxH         pixels, such as 1024x1024
--width N          pixels, with --height in place of --size
--height N         pixels
--steps N          of the sampler, where the backend has one
--seed N           the same seed makes the same image, where the backend can
--negative TEXT    what not to see
-n N               that many images, with seeds N, N+1, … (1)
--opt KEY=VALUE*   an option of the backend; VALUE may be JSON
-i --image FILE*   what to start from: a file, an http address, an id, last, or - for stdin
--mask FILE        a PNG, transparent where the first image is to be made anew
--strength S       how far from the first image, from 0 to 1
--aspect W:H       such as 16:9, the nearest that the backend offers; --size wins
--format png|jpeg|webp  of the file
--background transparent|opaque|auto  where the backend can
--quality NAME     as the backend calls it, such as low or high
--like FILE|last   take everything from an image made before; other flags override
"""


@command(
    f"""
    make images from a prompt
    prompt [PROMPT]         what to see; - reads it from stdin
    {ORDER_FLAGS}
    --key WORDS             the same key gives the same images again, paid once
    --pay-again             where nobody can tell whether those of this key were paid
    --detach                go on in the background, and print ids for `imagen wait` at once
    --strict                an image that is not as asked for is exit code 9, though it stays
    -o --output FILE|DIR/   never overwrites: a taken name gets -2, -3, …
    --preview auto|on|off   show the image in tmux, kitty, iTerm2
    --no-preview            the same as --preview off
    --cloud                 sync to Supabase, or say what is missing
    --no-cloud              this image stays private for ever
    --tag WORD*             of its row in the cloud; may be given again
    {TIMEOUT}
    {MAX_COST}
    --dry-run               say what would be done, and what it would cost
    """
)
def cmd_generate(args: argparse.Namespace, terminal: Terminal) -> int:
    config = budgeted(load_config(args.config), args.max_cost)
    order = order_from(args, config.styles, terminal.note)
    if args.no_cloud:
        order = order._replace(cloud="off")
    elif args.cloud:
        order = order._replace(cloud="on")
    order = order._replace(tags=tuple(args.tag or ()))
    if args.detach and not order.key:
        order = order._replace(key=new_uuid())
    # Who named no backend, and whose default one fails, hears of another.
    default = order.backend or config.default_backend
    terminal.offers_mock = not args.backend and default != "mock"
    plans = plans_of(order, config)
    plan = plans[0]
    tell_old_prices(plan.price, terminal)
    if args.dry_run:
        return show_plans(plans, terminal)
    if not args.backend and config.default_backend == "mock" and not config_path(args.config):
        next_step = "imagen config init, or OPENAI_API_KEY=… imagen generate … -b gpt-image"
        terminal.note(
            f"imagen: no backend is configured, so `mock` draws a placeholder; next: {next_step}"
        )
    tell_unfinished(terminal)
    if not terminal.live:
        terminal.note(f"{plan.request.backend}, {len(plans)} to make")
    if args.verbose:
        chosen = dict(plan.parameters)
        chosen.pop("prompt", None)
        terminal.note(f"{plan.request.backend} gets {to_json(chosen)}")
    if args.detach:
        open_backend(plan.request.backend, config.backends, plan.request.backend_opts)
        ids = [each.record["id"] for each in plans]
        if not detached(ids, terminal):
            return terminal.result({"ids": ids}, *ids)
    runner = GenerateRunner(plans, config, terminal, args.timeout, plan.parallel)
    runner.requested = sparse(order.request()).keys()
    if terminal.live:
        with suppress(Disk):
            runner.usual = usual_seconds(plan)
    code = runner.run()
    paths = [record["path"] for record in runner.records]
    preview = args.preview or config.output.preview
    if args.no_preview:
        preview = "off"
    show_preview(paths, config.output._replace(preview=preview), terminal.say)
    return code


def budgeted(config: Config, most: float | None) -> Config:
    """The config with what `--max-cost` says."""
    if most is None:
        return config
    budget = from_mapping(BudgetConfig, {"per_command": most}, "--max-cost", BadRequest)
    return config._replace(budget=config.budget._replace(per_command=budget.per_command))


def tell_old_prices(price: Price, terminal: Terminal) -> None:
    """One line where the table that prices come from is older than 180 days."""
    if price.source.endswith(PRICED) and time.time() > epoch(PRICED.split()[-1]) + PRICES_LAST_S:
        terminal.note(f"imagen: prices are of a {PRICED}: a newer imagen.py may know better")


def detached(ids: Sequence[str], terminal: Terminal) -> bool:
    """Go on in a session of our own, out of reach of who ends the caller's.

    False in the process of the caller. The other one has its stdout and stderr in the state folder,
    under the name of each id, locked while it works; its last line there is its JSON document.
    """
    paths = [state_path(f"detached-{ident}") for ident in ids]
    for path in paths:
        unlink_quietly(path)
    try:
        log = locked(paths[0], os.O_CREAT)
        for path in paths[1:]:
            os.link(paths[0], path)
    except (BlockingIOError, FileExistsError):
        return False  # somebody does the same at the same moment
    if os.fork():
        return False
    os.setsid()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    terminal.live = False
    terminal.as_json = True
    return True


def tell_unfinished(terminal: Terminal) -> None:
    """One line for each kind of business left from before."""
    states = [row.state for row in unfinished()]
    if number := states.count("sent"):
        terminal.note(f"imagen: {number} unfinished from before: imagen recover")
    if number := states.count("to deliver"):
        terminal.note(f"imagen: {number} to deliver: imagen sync")


def order_from(
    args: argparse.Namespace, styles: Mapping[str, Style], note: Callable[[str], object]
) -> Order:
    """The order that the flags of `generate` and `jobs add` ask for."""
    fields: JsonObject = {"prompt": ""}
    if args.like:
        fields, source = fields_like(args.like, styles)
        note(f"--like: {', '.join(fields)} from {source}")
    if args.aspect:
        fields.update(width=0, height=0)
    if args.prompt == "-":
        args.prompt = text_of("-").rstrip("\r\n")
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise BadRequest("--size says width and height: leave out --width and --height")
        fields.update(size_fields(args.size))
    options = {}
    if args.backend in (None, fields.get("backend")):
        options = dict(fields.get("backend_opts", EMPTY))
    options.update(options_from(args.opt or ()))
    if args.negative is not None:
        fields["negative_prompt"] = args.negative
    for name in (*Request._fields, "n", "output", "key", "pay_again", "strict"):
        value = getattr(args, name, None)
        if value is not None:
            fields[name] = value
    if images := getattr(args, "image", None):
        fields["images"] = [stdin_uri() if name == "-" else name for name in images]
    return from_mapping(Order, {**fields, "backend_opts": options}, "request", BadRequest)


def options_from(pairs: Sequence[str]) -> JsonObject:
    """The options that `--opt KEY=VALUE` name; a VALUE that is no JSON is text."""
    options: JsonObject = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BadRequest(f'--opt "{pair}": not KEY=VALUE', "such as --opt quality=high")
        options[key] = value
        with suppress(ValueError):
            options[key] = json.loads(value)
    return options


TEXT_BYTES = 64 << 20


def text_of(name: str) -> str:
    """The text in a file, or on stdin where it is called `-`, without BOM."""
    try:
        source: Any = nullcontext(sys.stdin.buffer)
        if name != "-":
            source = open(full_path(name), "rb")
        with source as file:
            data = file.read(TEXT_BYTES + 1)
        if len(data) > TEXT_BYTES:
            raise BadRequest(f"{name}: more than {TEXT_BYTES >> 20} MB", "split it")
        return str(data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        message = f"{name}: no text in UTF-8: byte {problem.start + 1}"
        raise BadRequest(message, "convert it, for example with iconv") from None
    except OSError as problem:
        raise BadRequest(f"{name}: {problem.strerror}") from None


def stdin_uri() -> str:
    """The image on stdin, as an Order names it."""
    data = sys.stdin.buffer.read(Takes().most_bytes + 1)
    return f"data:;base64,{base64_of(data)}"


def fields_like(name: str, styles: Mapping[str, Style]) -> tuple[JsonObject, str]:
    """The order behind an image made before, and where it was read.

    The image's file, its sidecar, its id, or `last`; or what another program wrote into it.
    """
    record = find_image(name)
    if not record:
        return embedded_fields(name)
    # What was asked for, not what came of it.
    sidecar: JsonObject = dict(record["sidecar"])
    sidecar.update(sidecar.get("requested") or {})
    known = {**STYLES, **styles}
    style = known.get(str(sidecar.get("style")), Style())
    negative = str(sidecar.get("negative_prompt") or "").removesuffix(style.negative)
    sidecar["negative_prompt"] = negative.removesuffix(", ")
    folder = os.path.dirname(record["path"])
    sidecar["images"] = [input_again(fields, folder) for fields in sidecar.get("inputs") or ()]
    if mask := sidecar.get("mask"):
        sidecar["mask"] = input_again(mask, folder)
    fields = {key: sidecar[key] for key in Request._fields if sidecar.get(key) is not None}
    order = from_mapping(Order, fields, f"--like {name}", BadRequest)
    return sparse(order), f"the record of {record['path']}"


# On the line that begins with the steps.
A1111_SETTINGS = {
    "steps": r"(\d+)",
    "seed": r".*\bSeed: (\d+)",
    "width": r".*\bSize: (\d+)x",
    "height": r".*\bSize: \d+x(\d+)",
}


def embedded_fields(name: str) -> tuple[JsonObject, str]:
    """The order that A1111 or ComfyUI wrote into an image, and which of them it was."""
    path = full_path(name)
    fields: JsonObject = {}
    source = f"the ComfyUI graph in {name}"
    if text := embedded_parameters(read_bytes(path)):
        source = f"the A1111 parameters in {name}"
        head, _, settings = text.partition("\nSteps: ")
        prompt, _, negative = head.partition("\nNegative prompt:")
        fields = {"prompt": prompt, "negative_prompt": negative.strip()}
        for key, form in A1111_SETTINGS.items():
            if number := re.match(form, settings):
                fields[key] = int(number[1])
    else:
        with suppress(BadConfig):
            graph = comfy_read(path)
            places, _ = comfy_places(graph)
            for mark, row in places.items():
                for node, key in row[:1]:
                    fields[COMFY_FIELDS[mark]] = graph[node]["inputs"][key]
    if not fields.get("prompt"):
        hint = "imagen list names them; imagen generate PROMPT makes one"
        raise BadRequest(f"--like {name}: neither a sidecar nor an image that tells of it", hint)
    return fields, source


def show_plans(plans: Sequence[Plan], terminal: Terminal) -> int:
    """What `generate --dry-run` says."""
    rows = []
    for plan in plans:
        row: JsonObject = {
            "backend": plan.styled.backend,
            "prompt": plan.styled.prompt,
            "negative_prompt": plan.styled.negative_prompt,
            "parameters": plan.parameters,
            "file": plan.record["name"],
            "price_usd": plan.price.usd,
            "price_source": plan.price.source or "unknown",
        }
        if plan.request.images:
            row["images"] = [image.name for image in plan.request.images]
        if plan.request.mask:
            row["mask"] = plan.request.mask.name
        rows.append(row)
    cells = []
    for row in rows:
        for key, value in row.items():
            if not isinstance(value, str):
                value = to_json(value)
            cells.append((key, value))
    return terminal.result({"dry_run": True, "plans": rows}, *aligned(cells))


def image_document(record: Record) -> JsonObject:
    """What JSON tells of an image that was made."""
    image: JsonObject = {**record["sidecar"], "path": record["path"], "cloud": None}
    if record.get("row"):
        image["storage_path"] = record["object"]
        image["cloud"] = {"id": image["image_id"], "storage_path": record["object"]}
    if record.get("reused"):
        image["reused"] = True
    return image


class TerminalRunner(Runner):
    """A Runner whose results go to stdout, whose words go to stderr, and which heeds signals."""

    usual: float | None = None  # seconds, learned
    why = "user"  # what a signal stops the runs for
    patience = 1e9  # seconds for a paid POST, once a signal said stop

    def __init__(
        self,
        items: Sequence[Any],
        config: Config,
        terminal: Terminal,
        timeout: float,
        parallel: int = 1,
    ) -> None:
        super().__init__(items, config, timeout, parallel)
        self.terminal = terminal
        self.count = len(items)
        self.warnings: list[str] = []
        self.stopped_at = 0.0

    def run(self) -> int:
        """Do it all; the exit code. The first signal ends what is under way, a second leaves."""
        import signal

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)  # for good: what follows is short
        self.start()
        pending: list[Run] = []
        while self.busy and not (self.stopped and time.monotonic() > self.leave_at()):
            with self.changed:
                self.changed.wait(0.1)
            # Once; and not in the handler of the signal, which may have come in another line.
            if not pending and (pending := self.pending):
                backend = pending[0].entry.record["sidecar"]["backend"]
                text = "cannot be stopped any more: waiting for the image; again to leave"
                self.terminal.say(f"{backend} {text}")
            self.draw()
        missing = self.count - len(self.records)
        if self.stopped and missing and (self.count > 1 or self.active or self.waiting):
            message = f"interrupted: {len(self.records)} of {self.count} made"
            if self.active:
                message += f", {len(self.active)} did not end"
            self.errors.append(Interrupted(message))
            self.terminal.report(self.errors[-1])
        return self.result()

    def on_signal(self, number: int, _: Any) -> None:
        """`timeout` signals us and our group within a moment, which is one stop."""
        import signal

        now = time.monotonic()
        if self.stopped and now > self.stopped_at + 0.05:
            os._exit(Interrupted.exit_code)
        self.stopped_at = self.stopped_at or now
        if number == signal.SIGTERM:
            self.patience = self.config.worker.grace_s
        self.stop(self.why)

    @property
    def pending(self) -> list[Run]:
        """The runs whose paid POST a stop waits for."""
        return [run for run in [*self.active] if run.stop_pending]

    def leave_at(self) -> float:
        """When a stop has waited long enough: for a paid POST longer than for anything else."""
        if self.pending:
            return self.stopped_at + self.patience
        return self.stopped_at + 5

    def draw(self) -> None:
        """The progress line: of the run that began last."""
        count = ""
        if self.count > 1:
            count = f"{len(self.records)} of {self.count}"
        shown = [*self.active.items()]
        if not shown:  # those that wait for the cloud
            waiting = [run for run, record in self._undelivered if record and record.get("storage")]
            shown = [(run, Progress("uploading")) for run in waiting]
        for run, progress in shown[-1:]:
            elapsed = time.monotonic() - run.started
            self.terminal.progress(progress, elapsed, self.usual, count)

    def result(self) -> int:
        """Tell the outcome of all; the exit code."""
        images = [*map(image_document, self.records)]
        document: JsonObject = {"images": images, "warnings": self.warnings}
        if len(self.errors) > 1:
            document["errors"] = [self.terminal.fields(error) for error in self.errors]
        return self.terminal.result(document, error=self.worst())

    def worst(self) -> ImagenError | None:
        """The error that decides the exit code.

        An unknown outcome comes first, then the interruption, then that some were made, then the
        first error.
        """
        ranks = {Unknown: 2, Interrupted: 1}
        error = max(self.errors, key=lambda error: ranks.get(type(error), 0), default=None)
        if error and type(error) not in ranks and 0 < len(self.records) < self.count:
            message = f"{len(self.records)} of {self.count} made; {error}"
            return Partial(message, error.hint, charged=error.charged)
        return error

    def on_warning(self, text: str) -> None:
        """Say it, and put it into the JSON document."""
        self.warnings.append(redact(printable(text)))
        self.terminal.say(text)

    def on_error(self, error: ImagenError) -> None:
        """Say it at once: other images may take long; but a stop of many only where it may cost."""
        if self.count == 1 or not isinstance(error, Interrupted) or error.charged != "no":
            self.terminal.report(error)

    def on_image(self, record: Record) -> None:
        """An image is safe: its path is the result, before anything is uploaded."""
        sidecar = record["sidecar"]
        if record.get("reused"):
            self.terminal.note(f"made at {sidecar.get('timestamp')} for this key")
        seconds = (sidecar.get("latency_ms") or 0) / 1000
        closing = f"{seconds:.1f} s, {money(sidecar.get('cost_usd_estimate'))}"
        if sidecar.get("seed") is not None:
            closing += f", seed {sidecar['seed']}"
        with self.terminal.lock:  # several are made at once
            if not self.terminal.as_json:
                self.terminal.write(record["path"])
            if os.path.exists(f"{record['path']}.json"):
                self.terminal.note(f"sidecar: {record['path']}.json")
            self.terminal.note(closing)

    def on_delivered(self, record: Record | None) -> None:
        """Where an image is in the cloud."""
        if record and record.get("row"):
            image_id = record["sidecar"]["image_id"]
            text = f"cloud: imagen.images.id={image_id} storage_path={record['object']}"
            self.terminal.note(text)


class GenerateRunner(TerminalRunner):
    """The images of `imagen generate`."""

    requested: Collection[str] = ()  # fields of the request that somebody set

    def on_image(self, record: Record) -> None:
        """Also what its backend could not honour."""
        if ignored := {*self.requested}.intersection(record["sidecar"]["ignored"]):
            fields = ", ".join(sorted(ignored))
            self.on_warning(f"{record['sidecar']['backend']} cannot take {fields}: ignored")
        super().on_image(record)


@command(
    """
    wait for what `generate --detach` makes, and print the paths
    ids ID…      what `generate --detach` has printed
    --timeout SECONDS  how long; then exit code 7 (86400)
    """
)
def cmd_wait(args: argparse.Namespace, terminal: Terminal) -> int:
    if not args.ids or not all(map(is_uuid, args.ids)):
        raise BadRequest("an id is missing", "imagen generate --detach prints them")
    return WaitRunner(args.ids, Config(), terminal, args.timeout, len(args.ids)).run()


class WaitRunner(TerminalRunner):
    """Images that another process makes."""

    STOPPING_ERRORS = ()

    def attempt(self, item: str, run: Run) -> Record | None:
        """The image with this id, once it is there; else why there is none."""
        log = state_path(f"detached-{item}")
        while True:
            # First whether its process is at work, then what it has left.
            at_work = is_locked(log)
            record = Record()
            for attempt in attempts(needle=item, under_way=True):
                if item in (attempt["id"], attempt.get("sidecar", EMPTY).get("image_id")):
                    record = attempt
                    break
            if "path" in record:
                unlink_quietly(log)
                return record
            if not at_work:
                break
            if run.left() < 1:
                raise Busy(f"{item}: still under way", f"imagen wait {item}")
            run.sleep(0.2)
        # The last line of the log is the document of its command.
        document = parsed(read_bytes(log).rstrip().rpartition(b"\n")[2])
        if not record and not document and not os.path.exists(log):
            raise BadRequest(f"{item}: nothing is known of it here", "imagen list; imagen recover")
        fields = {
            "code": "unknown" if record else "failed",
            "message": f"{item}: its process was killed",
            "hint": f"imagen recover {item}",
            **document.get("error", EMPTY),
            **record.get("error", EMPTY),
        }
        kind = ERRORS.get(fields["code"], Failed)
        charged = record.get("charged", "no")
        raise kind(fields["message"], fields["hint"], charged=charged)


@command(
    f"""
    make images by the rows of a file; once more, it goes on where it was stopped
    file FILE            a line each: a JSON object like an order, or a prompt; - is stdin
    -o --output DIR/     where the images go, but for rows that say so themselves
    -b --backend NAME    likewise
    --parallel N         images at a time; otherwise what the backend's block says
    {TIMEOUT}
    {MAX_COST}
    --dry-run            check all rows, and say what they would cost
    """
)
def cmd_batch(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.parallel is not None and not 1 <= args.parallel <= 64:
        raise BadRequest(f"--parallel {args.parallel}: 1 to 64")
    config = budgeted(load_config(args.config), args.max_cost)
    rows = batch_rows(args)
    prices: list[float | None] = []
    parallel = args.parallel or 0
    equal: dict[str, int] = {}
    for row in rows:  # a mistake in the last row is told before the first is paid
        try:
            order = batch_order(row, args)
            plans = plans_of(order, config)
        except (BadRequest, BadConfig) as problem:
            raise type(problem)(f"row {row.number}: {problem}", problem.hint) from None
        row.twin = equal[order.key] = equal.get(order.key, 0) + 1
        row.left = len(plans)
        prices += [plan.price.usd for plan in plans]
        parallel = parallel or plans[0].parallel
    if args.dry_run:
        usd = round(sum(filter(None, prices)), 6)
        unknown = prices.count(None)
        text = f"{len(rows)} rows, {len(prices)} images, {money(usd)}, {unknown} of unknown price"
        document = {"rows": len(rows), "images": len(prices), "usd": usd, "unknown": unknown}
        return terminal.result({"dry_run": True, **document}, text)
    items = [(row, number) for row in rows for number in range(row.left)]
    runner = BatchRunner(items, config, terminal, args.timeout, parallel)
    runner.rows = rows
    runner.args = args
    return runner.run()


class BatchRow:
    """A row of a batch, and what has come of it. There may be tens of thousands."""

    def __init__(self, number: int, line: str) -> None:
        self.number = number
        self.line = line
        self.twin = 1  # the first, second, … of equal rows
        self.left = 0  # images
        self.images: tuple[JsonObject, ...] = ()
        self.error: ImagenError | None = None


def batch_rows(args: argparse.Namespace) -> list[BatchRow]:
    """The rows of a batch."""
    lines = text_of(args.file).split("\n")  # other ends of lines may stand in a prompt
    rows = [BatchRow(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BadRequest(f"{args.file}: no rows")
    return rows


def batch_order(row: BatchRow, args: argparse.Namespace) -> Order:
    """The order of a row; without a key it gets one by file, folder, words and number."""
    fields: JsonObject = {"prompt": row.line}
    if row.line.startswith("{"):
        fields = parsed(row.line.encode())
        if not fields:
            raise BadRequest("no JSON object")
    if reserved := fields.keys() & {"caller", "pay_again"}:
        raise BadRequest(f"{reserved.pop()} is not for rows")
    fields = {"backend": args.backend or "", **fields}
    places = [os.path.abspath(place) for place in (args.file, args.output or "")]
    text = f"{to_json([*places, fields])}{row.twin}"
    fields = {"output": args.output or "", "key": sha256_of(text), **fields}
    return from_mapping(Order, fields, "", BadRequest)


BEGAN = time.monotonic()
# What a runner of tens of thousands keeps of each image, in place of its record.
MADE = Record(sidecar={})


class BatchRunner(TerminalRunner):
    """The images of all rows; a JSON line for each row, in their order, once it is over."""

    STOPPING_ERRORS = (BadConfig, Disk, Quota)

    rows: Sequence[BatchRow]
    args: argparse.Namespace
    usd = 0.0
    shown = 0  # rows

    def attempt(self, item: tuple[BatchRow, int] | Entry, run: Run) -> Record | None:
        """One image of a row; or a further one of the same run, which has its entry already."""
        if isinstance(item, Entry):
            return super().attempt(item, run)
        row, number = item
        try:
            plan = plans_of(batch_order(row, self.args), self.config)[number]
            record = super().attempt(plan, run) or Record()
            row.error = row.error or strict_error(record)
            image = image_document(record)
            if not record.get("reused"):
                self.usd += image["cost_usd_estimate"] or 0.0
            row.images += (image,)
        except Exception as problem:
            # Its frames would keep all that they worked on.
            row.error = as_error(problem).with_traceback(None)
            raise row.error from None
        finally:
            with self.changed:  # its line is written once none is left
                row.left -= 1
        return MADE

    def show_rows(self) -> None:
        """The lines of the rows that are over, up to the first that is not."""
        while self.shown < len(self.rows) and not self.rows[self.shown].left:
            row = self.rows[self.shown]
            self.shown += 1
            document: JsonObject = {"row": row.number, "ok": not row.error, "images": row.images}
            if row.error:
                document["error"] = self.terminal.fields(row.error)
            self.terminal.write(to_json(document))
            row.images = ()

    def summary(self) -> str:
        """What has come of the rows so far."""
        return f"{len(self.records)} made, {len(self.errors)} failed, {money(self.usd)}"

    def draw(self) -> None:
        """One progress line over all; and the rows that are over."""
        self.show_rows()
        done = len(self.records) + len(self.errors)
        elapsed = time.monotonic() - BEGAN
        left = ""
        if done:
            left = f"{elapsed * (self.count - done) / done:.0f} s left"
        self.terminal.progress(Progress(self.summary(), done, self.count), elapsed, None, left)

    def result(self) -> int:
        """The last rows, and the exit code."""
        self.show_rows()
        failed = [row.number for row in self.rows if row.error or row.left]
        error = self.worst()
        if isinstance(error, Interrupted):
            self.terminal.say("the same command again goes on", prefix="        → ")
            return error.exit_code
        self.terminal.note(self.summary())
        if failed:
            numbers = ", ".join(map(str, failed[:50]))
            message = f"{len(failed)} of {len(self.rows)} rows failed: {numbers}"
            error = Partial(
                message, "once that is mended, the same command again makes what is missing"
            )
        if error:
            self.terminal.report(error)
            return error.exit_code
        return 0

    def on_image(self, record: Record) -> None:
        """It goes into its row's line."""

    def on_delivered(self, record: Record | None) -> None:
        """Likewise."""


@command(
    """
    tools for agents, by the Model Context Protocol on stdin and stdout
    --max-cost USD     what one session may spend; else budget.per_command, or 2
    --allow-path DIR*  where agents may take images from, besides here and the output folder
    --all-owners       also images of others, made by a worker here
    """
)
def cmd_mcp(args: argparse.Namespace, terminal: Terminal) -> int:
    config = budgeted(load_config(args.config), args.max_cost)
    if config.budget.per_command is None:
        config = budgeted(config, MCP_USD)
    folders = [os.getcwd(), path_setting(config.output.directory)]
    folders += args.allow_path or ()
    session = Mcp(config, terminal.write, folders, shown_owners(config, args.all_owners))
    for line in sys.stdin.buffer:
        if line.strip():
            session.line(line)
    session.stop()
    return 0


@command(
    """
    list the backends
    names [NAME…]  these alone
    --check        ask each, at no cost, whether it is ready; the default or those named count
    """
)
def cmd_backends(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    for name in args.names:
        options_of(name, config.backends)
    rows = [backend_row(name, config) for name in args.names or config.backends]
    errors = {}
    if args.check:
        errors = check_backends(rows, config)
    lines = []
    columns = ("name", "type", "model", "said")
    cells = aligned([row[column] for column in columns] for row in rows)
    for row, line in zip(rows, cells, strict=True):
        mark = " "
        if row["default"]:
            mark = "*"
        lines.append(f"{mark} {line}")
    counted = args.names or [config.default_backend]
    # Of several errors the one that its reader can do something about decides the exit code.
    worst = max(
        (errors[name] for name in counted if name in errors),
        key=lambda error: (error.exit_code == 3, error.exit_code == 4, error.exit_code),
        default=None,
    )
    return terminal.result({"backends": rows}, *lines, error=worst)


def check_backends(rows: Sequence[JsonObject], config: Config) -> dict[str, ImagenError]:
    """Ask each backend of `rows` whether it is ready, all at once; the errors by name."""
    errors = {}

    def check(row: JsonObject) -> None:
        try:
            ready = open_backend(row["name"], config.backends).check(Context(15.0))
            row |= {"said": f"ok: {ready}", "ok": True}
        except Exception as problem:
            error = adapter_error(problem)
            errors[row["name"]] = error
            row |= {"said": f"{error.code}: {error}", "ok": False}

    for thread in [in_thread(check, row) for row in rows]:
        thread.join()
    return errors


def backend_row(name: str, config: Config) -> JsonObject:
    """What is known of a backend before it is asked."""
    block = config.backends[name]
    state = fault(name, config)
    variable = ""
    if not state:
        for field in marked(BACKENDS[block["type"]].Options, KEY):
            variable = variable or block.get(field, "")
    is_set = bool(os.environ.get(variable, "").strip())
    if is_set:
        state = f"{variable} set"
    elif variable:
        state = f"{variable} not set"
    return {
        "name": name,
        "type": str(block.get("type") or ""),
        "default": name == config.default_backend,
        "model": str(block.get("model") or block.get("workflow") or ""),
        "variable": variable,
        "set": is_set,
        "said": state,
    }


def fault(name: str, config: Config) -> str:
    """What is wrong with a backend's block; a key that is not set is no fault."""
    try:
        open_backend(name, config.backends)
    except KeyMissing:
        return ""
    except BadConfig as problem:
        return str(problem)
    return ""


@command("list the styles")
def cmd_styles(args: argparse.Namespace, terminal: Terminal) -> int:
    styles = {**STYLES, **load_config(args.config).styles}
    rows = []
    for name, style in styles.items():
        text = style.suffix
        if style.negative:
            text += f" / not: {style.negative}"
        if style.width:
            text += f" [{style.width}x{style.height}]"
        rows.append((name, text))
    document = {"styles": {name: style._asdict() for name, style in styles.items()}}
    return terminal.result(document, *aligned(rows))


NO_FILE = "no config file; the built-in defaults"


@command(
    """
    write the sample to where the config is looked for
    --force  overwrite what is there
    """
)
def cmd_config_init(args: argparse.Namespace, terminal: Terminal) -> int:
    path = config_path(args.config, new=True)
    if os.path.lexists(path) and not args.force:
        raise BadConfig(f"{path} exists", "imagen config init --force overwrites it")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # What was there stays until the new one stands.
    write_file(f"{path}.new", sample_text(), 0o600)
    os.replace(f"{path}.new", path)
    try:
        config = load_config(path)
        rows = [backend_row(name, config) for name in config.backends]
        errors = check_backends(rows, config)
        ready = [row["name"] for row in rows if row["name"] not in errors]
        default = config.default_backend
        text = f"{default} answers, and makes the images"
        if default in errors:
            text = f"{default}: {errors[default]}; ready: {', '.join(ready)}"
            text += f"; the line that chooses: default_backend: {ready[0]}"
        terminal.note(text)
    except BadConfig as problem:  # so that it is heard of now
        terminal.report(problem)
    return terminal.result({"path": path}, path)


@command("look for mistakes; what only another backend or the cloud lacks is a warning")
def cmd_config_validate(args: argparse.Namespace, terminal: Terminal) -> int:
    path = config_path(args.config)
    data = config_data(args.config)
    errors = complaints(data, args.config, thorough=True)
    warnings = []
    if not errors:
        config = from_mapping(Config, data)
        mode = config.output.cloud_sync
        # Who set nothing up, and asked for nothing, need not hear of variables.
        begins = {"on": "", "auto": "owner"}.get(mode, "\0")
        missing = cloud_settings_missing(config)
        warnings = [f"{line}: no cloud sync" for line in missing if line.startswith(begins)]
    for line in warnings:
        terminal.say(f"warning: {line}")
    document = {"path": path or None, "errors": errors, "warnings": warnings}
    if errors:
        return terminal.result(document, error=terminal.report(BadConfig("\n".join(errors))))
    return terminal.result(document, f"{path or NO_FILE}: fine")


@command("the file in force, and the merged values with those of the environment")
def cmd_config_show(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    path = config_path(args.config)
    shown = as_mapping(config)
    # A block with a fault may hold a key, so it is the complaint that is shown.
    shown["backends"] = {
        name: fault(name, config) or block for name, block in config.backends.items()
    }
    # JSON is YAML, so that the lines may become a file.
    origins = (f"# {field} comes from {name}" for name, field in overrides().items())
    lines = (f"# {path or NO_FILE}", *origins, to_json(shown, indent=2))
    document = {"path": path or None, "config": shown, "environment": overrides()}
    return terminal.result(document, *lines)


@command(
    f"""
    list or end what is unfinished
    id [ID]      an unfinished image; without one they are listed
    --all        every unfinished image
    --forget ID  close an entry without looking for its image
    {TIMEOUT}
    """
)
def cmd_recover(args: argparse.Namespace, terminal: Terminal) -> int:
    prefix = args.forget or args.id or ""
    if not prefix and not args.all:
        left = unfinished()
        help_ = "nothing is unfinished"
        if left:
            help_ = "imagen recover ID, or --all; --forget ID closes one without looking"
        terminal.note(help_)
        return list_entries("unfinished", left, terminal, journal_fault())
    paths = [row.path for row in entries() if os.path.basename(row.path).startswith(prefix)]
    if prefix and len(paths) != 1:
        message = f"{prefix}: {len(paths) or 'no'} unfinished images begin so"
        raise BadRequest(message, "imagen recover")
    sweep_journal()
    config = load_config(args.config)
    taken = [entry for entry in map(Entry.take, paths) if entry]
    fault = journal_fault()
    if prefix and not taken:
        raise fault or Busy(f"{prefix}: somebody works on it", "wait for that, then look again")
    kind = RecoverRunner
    if args.forget:
        kind = ForgetRunner
    runner = kind(taken, config, terminal, args.timeout)
    if fault:
        runner.errors.append(fault)
        terminal.report(fault)
    elif len(taken) < len(paths):
        terminal.note(f"somebody works on {len(paths) - len(taken)} more")
    code = runner.run()
    sweep_inputs()
    return code


def list_entries(
    title: str, opened: Sequence[OpenEntry], terminal: Terminal, error: ImagenError | None = None
) -> int:
    """List entries, in JSON under `title`, each with what it lacks in the cloud."""
    rows = []
    lines = []
    for entry in opened:
        sidecar: Fields = entry.record.get("sidecar") or {}
        row = {
            **{key: entry.record.get(key) for key in ("id", "at", "charged", "path", "remote")},
            "backend": sidecar.get("backend"),
            "state": entry.state,
            "prompt": sidecar.get("prompt", ""),
            "lacks": missing_uploads(entry.record),
        }
        rows.append(row)
        missing = ", ".join(row["lacks"])
        place = row["path"] or row["prompt"][:60]
        lines.append((row["id"], row["at"], row["backend"], missing or entry.state, place))
    if error:
        terminal.report(error)
    return terminal.result({title: rows}, *aligned(lines), error=error)


class RecoverRunner(TerminalRunner):
    """Entries that somebody left, taken to their end."""

    why = "released"  # only a stop for "user" cancels at the backend, and this may be paid already
    STOPPING_ERRORS = ()

    def attempt(self, item: Entry, run: Run) -> Record | None:
        """The image of one entry; None where it had none."""
        record = super().attempt(item, run)
        if not record:
            reason = "nothing had been sent"
            if item.record.get("over"):
                reason = "over"
            self.terminal.note(f"{run.id}: {reason}; closed")
        return record


class ForgetRunner(RecoverRunner):
    """Entries closed without a look for their images."""

    def attempt(self, item: Entry, run: Run) -> Record | None:
        """Close one, unless its image is here."""
        run.adopt(item)
        if place := run.complete_image_path():
            item.unlock()
            hint = f"imagen recover {run.id} gives it its name"
            raise BadRequest(f"{place} is a complete image", hint)
        run.note_best_effort(over=True)
        self.terminal.note(f"{run.id}: closed, charged: {run.charged}")
        return None


@command(
    """
    upload what the cloud still lacks, and delete the objects of images deleted there
    paths [PATH…]  images or sidecars; without one, whatever the journal has open
    --dry-run      list them, and what each lacks
    """
)
def cmd_sync(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    opened = entries()
    if args.paths:
        rows = [entry_to_sync(path, opened) for path in args.paths]
    else:  # also attempts of unknown outcome: what they cost is reported
        rows = [row for row in opened if row.state == "to deliver" or missing_uploads(row.record)]
    incomplete = [row for row in rows if missing_uploads(row.record)]
    if not args.dry_run and not cloud_settings_missing(config):
        try:
            Supabase(Context(DELIVERY_S), config.supabase).empty_outbox()
        except ImagenError as problem:
            terminal.say(f"deletions: {problem}")
    if args.dry_run or not rows:
        terminal.note(f"{len(incomplete) or 'nothing'} to sync")
        return list_entries("to_sync", incomplete, terminal)
    # Who was killed behind the last step left nothing to do but to close the entry.
    distinct = {row.record["id"]: row for row in rows}
    return SyncRunner([*distinct.values()], config, terminal, DELIVERY_S).run()


class SyncRunner(TerminalRunner):
    """Images that the cloud does not have yet, delivered."""

    why = "released"
    STOPPING_ERRORS = ()

    def attempt(self, item: OpenEntry, run: Run) -> Record | None:
        """Deliver one; None where another sync was faster, or it has no image."""
        run.progress("syncing", self.count - len(self.waiting) - 1, self.count)
        if item.path:
            entry = Entry.take(item.path)
        else:
            entry = Entry.create(item.record)
        if not entry:
            return None
        run.adopt(entry)
        deliver(run, self.config)
        return entry.record if entry.record.get("path") else None


def entry_to_sync(name: str, opened: Sequence[OpenEntry]) -> OpenEntry:
    """What is to be delivered of the image called `name`: its open entry, or one to be made."""
    record = find_image(name)
    if not record or not may_have_row(record["sidecar"]):
        raise BadRequest(
            f"{name}: no image with a sidecar, and none that the journal knows", "see imagen list"
        )
    sidecar = record["sidecar"]
    if sidecar.get("private"):
        raise BadRequest(f"{name} was made with --no-cloud: it stays here")
    for row in opened:
        if row.record["id"] == record["id"]:
            return row
    charged = sidecar.get("charged", "no")
    request = Request(sidecar["prompt"], seed=sidecar.get("seed"))
    stem = render_name("{date}/{slug}-{seed}", request, epoch(sidecar["timestamp"]))
    anew: Record = {"paid": charged != "no", "charged": charged, **record, "storage": stem}
    if anew.get("refused"):  # maybe for its owner's sake
        anew.pop("owner", None)
    for done in ("object", "row", "refused", "error"):
        anew.pop(done, None)  # type: ignore[misc]  # each is a key of Record
    return OpenEntry("", anew, "to deliver")


def may_have_row(sidecar: Fields) -> bool:
    """Whether a sidecar, which may come from anywhere, has what a row of imagen.images needs."""
    if not {"backend", "timestamp", "mime_type", "bytes"} <= sidecar.keys():
        return False
    if not isinstance(sidecar.get("storage_path") or "", str):
        return False
    return is_uuid(sidecar["image_id"]) and sidecar["mime_type"] in MIME_TYPES.values()


@command(
    """
    an address where anybody can fetch an image of the private bucket for a while
    image IMAGE     a path, sidecar, image id or storage path
    --expires TIME  such as 30m, 12h, 7d (1d)
    """
)
def cmd_sign(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    seconds = duration(args.expires)
    if not seconds:
        raise BadRequest(f'--expires "{args.expires}": not a time', "such as 30m, 12h, 7d")
    cloud = Supabase(Context(DELIVERY_S), config.supabase)
    record = find_image(args.image)
    image_id = args.image
    if record:
        if record["sidecar"].get("private"):
            raise BadRequest(f"{args.image} was made with --no-cloud: it stays here")
        image_id = record["sidecar"]["image_id"]
    path = args.image.removeprefix(f"{cloud.bucket}/")
    if is_uuid(image_id):
        path = cloud.storage_path_of(image_id)
        if not path:
            raise BadRequest(f"{args.image} is not in the cloud", "imagen sync PATH uploads it")
    try:
        url = cloud.sign(path, seconds)
    except BadConfig as problem:
        if " NoSuchKey: " not in str(problem):
            raise
        message = f"{path} is not in the bucket {cloud.bucket}"
        raise BadRequest(message, "imagen sync PATH uploads it") from None
    return terminal.result({"url": url, "storage_path": path, "expires_in": seconds}, url)


def duration(text: str) -> int:
    """The seconds that 45, 30m, 12h or 7d are; 0 where it is no such time."""
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    match = re.fullmatch(r"([1-9]\d{0,8})([smhdw]?)", text)
    return int(match[1]) * units[match[2]] if match else 0


def moment(text: str, sign: int) -> str:
    """The UTC time that `text` names: as ISO 8601, or, `sign` times as far from now, as 30m."""
    seconds = duration(text)
    at = time.time() + sign * seconds
    if not seconds:
        at = epoch(text)
    if not 0 < at < 2**37:
        raise BadRequest(f'"{text}": not a time', "such as 30m, 7d or 2026-12-24T18:00")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


@command(
    """
    delete images from the cloud; what they cost stays in the ledger
    images IMAGE…  paths, sidecars or image ids
    --local        the file and its sidecar too
    """
)
def cmd_delete(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    if not args.images:
        raise BadRequest("an image is missing", "its path, its sidecar or its id")
    deleted = {}
    error = None
    for name in args.images:
        try:
            deleted[name] = delete_image(name, args.local, config)
        except ImagenError as problem:
            shown = terminal.report(problem)
            error = error or shown
    return terminal.result({"deleted": [*deleted.values()]}, *deleted, error=error)


@command(
    """
    set up or upgrade the database
    --file FILE  instead of the migrations.sql beside imagen.py
    --expose     let PostgREST see the schemas even where the Dashboard says which
    """
)
def cmd_migrate(args: argparse.Namespace, terminal: Terminal) -> int:
    path = args.file or f"{HERE}/migrations.sql"
    try:
        with open(path, encoding="utf-8") as file:
            sql = file.read()
    except (OSError, ValueError) as problem:
        hint = "it stands beside imagen.py, or is named by --file"
        raise BadConfig(f"{path}: {getattr(problem, 'strerror', problem)}", hint) from None
    config = load_config(args.config)
    with postgres(config.supabase.database_url_env) as database:
        # One text: a pooler may send two queries to two sessions.
        expose = {True: "on", False: "off"}[args.expose]
        settings = f"set local imagen.expose = '{expose}'; set local imagen.max_pending = "
        database.run(f"{settings}'{config.limits.per_owner.pending}';{sql}")
        notices = [notice.get(b"M", b"").decode("utf-8", "replace") for notice in database.notices]
    by_hand = [text for text in notices if text.startswith("by hand: ")]
    parts = dict(text.split(": ", 1) for text in notices if text.startswith("imagen_"))
    for text in by_hand:
        terminal.say(text)
    return terminal.result({"parts": parts, "by_hand": by_hand}, *aligned(parts.items()))


@command(
    """
    the last images
    terms [WORD…]  that prompt, style or seed must hold, all of them
    -n N           at most that many (20)
    --all-owners   also images of others, made by a worker here
    """
)
def cmd_list(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.n < 1:
        raise BadRequest(f"-n {args.n}: at least 1")
    images = []
    lines = []
    if fault := journal_fault():
        raise fault
    owners = shown_owners(load_config(args.config), args.all_owners)
    made = images_made(owners, terms=args.terms, warn=terminal.say)
    for record in itertools.islice(made, args.n):
        sidecar = record["sidecar"]
        images.append(image_document(record))
        line = (
            str(sidecar.get("timestamp"))[:16],
            sidecar.get("backend"),
            money(sidecar.get("cost_usd_estimate")),
            record["path"],
            sidecar["prompt"][:60],
        )
        lines.append(line)
    if not lines and args.terms:
        terminal.note(f"no image here has {' and '.join(args.terms)} in its prompt, style or seed")
    elif not lines:
        terminal.note("no images: imagen generate PROMPT makes one")
    return terminal.result({"images": images}, *aligned(lines))


COST_COLUMNS = ("images", "usd", "unknown", "reported", "estimated", "reserved")


@command(
    """
    what was spent, and what is reserved
    --since DATE                          YYYY-MM-DD
    --by day|month|backend|model|owner    what makes a row (day)
    """
)
def cmd_cost(args: argparse.Namespace, terminal: Terminal) -> int:
    since = args.since or ""
    if since and not (re.fullmatch(r"\d{4}-\d\d-\d\d", since) and epoch(since)):
        raise BadRequest(f'--since "{since}": no date as YYYY-MM-DD')
    if fault := journal_fault():
        raise fault
    groups: dict[str, JsonObject] = {}
    total: JsonObject = dict.fromkeys(COST_COLUMNS, 0)
    for record in attempts(warn=terminal.say, under_way=True):
        at = record.get("at", "")
        made = "path" in record
        if at[:10] < since or (not made and record.get("charged", "no") == "no"):
            continue
        known, usd = cost_of(record)
        sidecar: Fields = record.get("sidecar", EMPTY)
        keys = {**sidecar, "day": at[:10], "month": at[:7], "owner": record.get("owner")}
        group = groups.setdefault(str(keys.get(args.by) or ""), dict.fromkeys(COST_COLUMNS, 0))
        for row in (group, total):
            row[known] += usd
            row["images"] += made
            row["unknown"] += known == "reserved"
    lines = []
    for key, row in (*sorted(groups.items()), ("total", total)):
        row["usd"] = row["reported"] + row["estimated"]
        row.update({column: round(value, 6) for column, value in row.items()})
        parts = [f"{money(row[name])} {name}" for name in COST_COLUMNS[3:] if row[name]]
        if row["unknown"]:
            parts.append(f"{row['unknown']} of unknown cost")
        lines.append((key, row["images"], "images", money(row["usd"]), ", ".join(parts)))
    rows = [{args.by: key, **groups[key]} for key in sorted(groups)]
    return terminal.result({"rows": rows, "total": total}, *aligned(lines))


SETUP_FOLDER = "~/.local/share/imagen"
LAUNCHER_MARK = "# the launcher of imagen.py"  # tells ours from a program of that name
PACKAGES = ("pyyaml>=6.0.2", "pg8000>=1.31.2")


@command(
    """
    install this copy for the user, with what it needs; again: an upgrade
    --with PACKAGE*  another package, such as pillow
    """
)
def cmd_setup(args: argparse.Namespace, terminal: Terminal) -> int:
    import shutil

    folder = full_path(SETUP_FOLDER)
    venv = f"{folder}/venv"
    python = f"{venv}/bin/python"
    file = f"{folder}/imagen.py"
    packages = [*PACKAGES, *(vars(args)["with"] or ())]
    copies = {__file__: file, f"{HERE}/migrations.sql": f"{folder}/migrations.sql"}
    with or_disk(folder, ""):
        os.makedirs(folder, exist_ok=True)
        for source, target in copies.items():
            if os.path.exists(source):  # it may be the target itself
                shutil.copyfile(source, f"{target}.new")
                os.replace(f"{target}.new", target)
    # 1. An environment of its own, unless it stands, and the packages in it.
    make = [sys.executable, "-m", "venv", "--clear", venv]
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", *packages]
    probe = "import pip"  # which an environment lacks that broke off for want of ensurepip
    if shutil.which("uv"):
        make = ["uv", "venv", "--quiet", "--clear", "--python", sys.executable, venv]
        install = ["uv", "pip", "install", "--quiet", "--upgrade", "--python", python, *packages]
        probe = "import sys"
    if not succeeds([python, "-c", probe]):
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        require(make, f"on Debian and Ubuntu: sudo apt install {version}")
    require(install, "it needs the network; with packages of your own, `imagen install` will do")
    # 2. The command.
    terminal.note(f"{folder} has this copy and its packages")
    return write_launcher(full_path("~/.local/bin"), python, file, terminal)


def succeeds(program_args: Sequence[str]) -> bool:
    """Whether a program is there and ends well."""
    with suppress(Failed):
        require(program_args, "")
        return True
    return False


def require(program_args: Sequence[str], hint: str) -> None:
    """Run a program; Failed with its last words where it does not end well."""
    import subprocess

    try:
        done = subprocess.run(program_args, capture_output=True, text=True)
    except OSError as problem:
        raise Failed(f"{program_args[0]}: {problem}", hint) from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip()[-400:]
        raise Failed(f"{' '.join(program_args[:4])} …: {last}", hint)


@command(
    """
    put a launcher on the PATH: what it starts is compiled once, and not each time
    folder [DIR]  where `imagen` is put (~/.local/bin)
    """
)
def cmd_install(args: argparse.Namespace, terminal: Terminal) -> int:
    return write_launcher(full_path(args.folder), sys.executable, __file__, terminal)


def write_launcher(folder: str, python: str, file: str, terminal: Terminal) -> int:
    """Put a command `imagen` that runs `file` into `folder`, and tell how the shell finds it."""
    import shlex

    path = f"{folder}/imagen"
    cure = "name another folder: imagen install DIR"
    if os.path.lexists(path) and not is_launcher(path):
        raise BadRequest(f"{path} exists and is not ours", cure)
    start = shlex.join((python, *start_by_import(os.path.abspath(file))))
    with or_disk(path, cure):
        os.makedirs(folder, exist_ok=True)
        write_file(path, f'#!/bin/sh\n{LAUNCHER_MARK}\nexec {start} "$@"\n', 0o755)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        shell = os.path.basename(os.environ.get("SHELL", ""))
        startup = {"bash": "bashrc", "zsh": "zshrc"}.get(shell, "profile")
        line = f"echo 'export PATH=\"{folder}:$PATH\"' >> ~/.{startup}"
        if shell == "fish":
            line = f"fish_add_path {folder}"
        terminal.note(f"{folder} is not on PATH yet: {line}")
    return terminal.result({"path": path}, path)


def start_by_import(file: str) -> list[str]:
    """Python's arguments for `file` as an import, which is compiled once; of an odd name, as is."""
    module, ending = os.path.splitext(os.path.basename(file))
    if ending != ".py" or "." in module:
        return [file]
    place = os.path.dirname(file)
    code = f"import sys; sys.path.insert(0, {place!r}); sys.exit(__import__({module!r}).main())"
    # What `ps` and `pgrep -f` show: the file, and behind it the command.
    comment = " ".join(printable(file).splitlines())
    return ["-P", "-c", f"{code}  # {comment}"]


# Python holds on to a script's syntax tree until it ends: 25 MB, for commands that stay.
STAYING = ("mcp", "serve", "worker")


def start_anew() -> None:
    """Become the same command by import, where a compiled copy exists or can be written."""
    import importlib.util

    file = os.path.abspath(__file__)
    compiled = importlib.util.cache_from_source(file)
    usable = os.access(os.path.dirname(file), os.W_OK) and not sys.dont_write_bytecode
    if os.path.exists(compiled):
        usable |= os.path.getmtime(compiled) >= os.path.getmtime(file)
    start = start_by_import(file)
    # Not from under a profiler, a debugger or the like: only Python's own flags go along.
    flags = sys.orig_argv[1 : -len(sys.argv)]
    plain = re.fullmatch(r"(-[bBdEIOPqRsSuvx]+ |-[WX] ?\S+ )*", " ".join([*flags, ""]))
    if usable and plain and start != [file]:
        os.execv(sys.executable, [sys.executable, *flags, *start, *sys.argv[1:]])


def is_launcher(path: str) -> bool:
    """Whether a file is one of ours, which may be replaced."""
    return LAUNCHER_MARK.encode() in read_bytes(path)[:200]


@command("undo `setup` and `install`; images, journal and imagen.yaml stay")
def cmd_uninstall(args: argparse.Namespace, terminal: Terminal) -> int:
    import shutil

    folder = full_path(SETUP_FOLDER)
    removed = []
    with or_disk(folder, "delete it by hand"):
        names = ("venv", "__pycache__", "imagen.py", "migrations.sql")
        paths = [f"{folder}/{name}" for name in names]
        launcher = full_path("~/.local/bin/imagen")
        if is_launcher(launcher):
            paths.append(launcher)
        for path in filter(os.path.lexists, paths):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
            removed.append(path)
        with suppress(OSError):  # what else is in it is not ours
            os.rmdir(folder)
    stays = ", ".join(filter(None, (state_path(), config_path(args.config))))
    terminal.note(f"{len(removed)} removed; the images stay, and {stays}")
    if os.path.exists(full_path("~/.config/systemd/user/imagen-worker.service")):
        terminal.note("the worker: systemctl --user disable --now imagen-worker")
    return terminal.result({"removed": removed}, *removed)


@command(
    """
    take jobs from imagen.jobs and make their images
    --concurrency N  jobs at a time
    --once           leave when no job waits
    --name SLOT      what this worker is called on this host (worker)
    --backend NAME…  take the jobs of these backends alone
    """
)
def cmd_worker(args: argparse.Namespace, terminal: Terminal) -> int:
    import signal

    config = load_config(args.config)
    for name in args.backend or ():
        options_of(name, config.backends)
    concurrency = config.worker.concurrency
    if args.concurrency is not None:
        concurrency = args.concurrency
    if not 1 <= concurrency <= 64 or not re.fullmatch(r"[\w.-]{1,64}", args.name):
        raise BadRequest("--concurrency is 1 to 64, --name letters, digits, dots and dashes")
    # systemd's journal reads a priority, and has times of its own. Terminals inherit the variable.
    to_journal = "JOURNAL_STREAM" in os.environ and not sys.stderr.isatty()

    def say(text: str, priority: int = 6) -> None:
        prefix = f"{now_iso()[:19]} "
        if to_journal:
            prefix = f"<{priority}>"
        if priority < 6 or not args.quiet:
            terminal.say(" ".join(text.split()), prefix=prefix)

    worker = Worker(config, say, concurrency, args.name, args.backend or ())
    handle_stops(worker.on_signal)
    worker.serve(args.once)
    handle_stops(signal.SIG_IGN)  # what is left is to leave
    return terminal.result({})


def handle_stops(handler: Any) -> None:
    """From now on, what the signals SIGTERM and SIGINT do."""
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


@command(
    f"""
    queue jobs that make images from a prompt
    prompt [PROMPT]   what to see; - reads it from stdin
    {ORDER_FLAGS}
    --key WORDS       where a job with this key is there, its id
    --run-after TIME  not before, such as 30m from now, or 2026-12-24T18:00
    --priority N      the higher, the sooner
    --wait            until the jobs are over, whose outcome is the exit code
    """
)
def cmd_jobs_add(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    requests = job_requests(order_from(args, config.styles, terminal.note), config)
    for request in requests:
        request["priority"] = args.priority
        if args.run_after:
            request["run_after"] = moment(args.run_after, 1)
    return begin_jobs(ADD, requests, args, config, terminal)


@command(
    """
    queue failed jobs again
    ids [ID…]     the jobs
    --failed      all that failed, but for what may have been charged
    --since TIME  with --failed: since then, such as 2h ago, or 2026-12-24
    --code CODE   with --failed: those with this error, such as busy
    --pay-again   one job, even if it may have been charged
    --wait        until the jobs are over, whose outcome is the exit code
    """
)
def cmd_jobs_retry(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    if (args.failed and args.ids) or (args.pay_again and len(args.ids) != 1):
        raise BadRequest("--failed takes no id, and --pay-again one")
    if args.failed:
        since = None
        if args.since:
            since = moment(args.since, -1)
        with postgres(config.supabase.database_url_env, patience=DELIVERY_S) as database:
            requests = [row for (row,) in database.run(FAILED, since=since, code=args.code)]
    else:
        requests = [{"id": new_uuid(), "job": job} for job in job_ids(args)]
    return begin_jobs(RETRY, requests, args, config, terminal)


def job_ids(args: argparse.Namespace) -> list[str]:
    """The jobs that a command line names."""
    for word in args.ids or [""]:
        if not is_uuid(word):
            raise BadRequest(f'"{word}" is not the id of a job', "imagen jobs list")
    return list(args.ids)


def begin_jobs(
    sql: str,
    requests: Sequence[Fields],
    args: argparse.Namespace,
    config: Config,
    terminal: Terminal,
) -> int:
    """Insert jobs, whose ids we have made, and, where that is asked for, wait for their end."""
    variable = config.supabase.database_url_env
    ids = [request["id"] for request in requests]
    # Before anything waits: whatever becomes of this command, the jobs can be found. With a key
    # they are anyway, and may be others.
    if args.wait and not any("key" in request for request in requests):
        terminal.note("\n".join(f"job {ident}" for ident in ids))
    parameters = {
        "requests": to_jsonb(requests),
        "owner": config.owner_user_id,
        "pay_again": getattr(args, "pay_again", False),
    }
    if ids:
        jobs = insert_jobs(variable, sql, requests, parameters)
        if len(jobs) < len(ids):
            message = "no such job, or one that may have been charged"
            cure = "imagen jobs list; --pay-again makes it all the same, once there is no other"
            raise BadRequest(f"{message}, or its key has another", cure)
        ids = [job["id"] for job in jobs]
    if ids and args.wait:
        return follow_jobs(ids, terminal, variable)
    rows = [{"id": ident, "status": "pending"} for ident in ids]
    return terminal.result({"jobs": rows}, *ids)


@command(
    """
    take jobs out of the queue, or ask their worker to stop
    ids [ID…]  the jobs
    """
)
def cmd_jobs_cancel(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    ids = job_ids(args)
    with postgres(config.supabase.database_url_env, patience=DELIVERY_S) as database:
        rows = database.run(CANCEL, ids=ids)
    over = [job for job, status in rows if not status]
    error = None
    if over:
        message = f"{', '.join(over)}: no job that waits or runs"
        error = terminal.report(BadRequest(message, "imagen jobs list"))
    jobs = [{"id": job, "status": status} for job, status in rows if status]
    lines = [f"{job['id']}  {job['status']}" for job in jobs]
    return terminal.result({"jobs": jobs}, *lines, error=error)


@command("count what waits, runs, failed within an hour, and why something waits")
def cmd_jobs_stats(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    with postgres(config.supabase.database_url_env, patience=DELIVERY_S) as database:
        ((stats, lines),) = database.run(STATS)
    return terminal.result(stats, *aligned(lines))


def insert_jobs(
    variable: str, sql: str, requests: Sequence[Fields], parameters: JsonObject
) -> list[JsonObject]:
    """Insert jobs whose ids we have made; those of them, or the one of their key, that are there.

    Repeated where the answer is lost, which makes none twice. Unknown where that does not help: a
    worker may take them, and pay.
    """
    reached = False
    ids = [request["id"] for request in requests]
    for number in range(TRIES):
        try:
            with postgres(variable, patience=DELIVERY_S) as database:
                reached = True
                [[columns]] = database.run(REQUESTED, names=_COLUMNS.split(", "))
                key = requests[0].get("key")
                keyed = {"key": key, "owner": parameters["owner"]}
                if key:
                    database.run(KEYED, **keyed)  # or this database knows no keys yet
                database.run(sql.replace("COLUMNS", columns), **parameters)
                if not key:
                    return [job for (job,) in database.run(FOLLOW, ids=ids)]
                [[job]] = database.run(KEYED, **keyed)
                if any(job[name] != requests[0].get(name) for name in columns.split(", ")):
                    message = f"the key {key} was used for another request"
                    raise KeyConflict(f"{message}, of job {job['id']}")
                return [job]
        except (Unreachable, KeyboardInterrupt) as problem:
            if not reached:
                raise
            if number == TRIES - 1 or isinstance(problem, KeyboardInterrupt):
                raise jobs_left(ids, Unknown, str(problem) or "interrupted") from None
            time.sleep(0.5 * 2**number)
    raise AssertionError("the last try returns or raises")


def jobs_left(ids: Sequence[str], kind: type[ImagenError], reason: str) -> ImagenError:
    """What to say of jobs that may be made, and paid for, without this command."""
    hint = f"imagen jobs list shows what became of it; imagen jobs cancel {ids[0]}"
    return kind(f"{', '.join(ids)}: may be in the queue; {reason}", hint, charged="unknown")


_COLUMNS = (
    "prompt, negative_prompt, backend, style, width, height, steps, seed, backend_opts, "
    "inputs, mask, strength, key, aspect, format, background, quality"
)
# Whoever pays again for what may have been charged does so beside the key, which stays taken.
RETRY = """INSERT INTO imagen.jobs (id, owner_user_id, COLUMNS)
  SELECT again, owner_user_id, COLUMNS FROM (
    SELECT r.id AS again, (jsonb_populate_record(NULL::imagen.jobs,
      to_jsonb(j) - CASE WHEN receipt IS NULL THEN '' ELSE 'key' END)).*
    FROM jsonb_to_recordset(:requests::jsonb) AS r (id uuid, job uuid)
    JOIN imagen.jobs j ON j.id = r.job
    WHERE receipt IS NULL OR :pay_again::boolean) AS old ORDER BY seq
  ON CONFLICT DO NOTHING"""
ADD = """INSERT INTO imagen.jobs (id, owner_user_id, COLUMNS, run_after, priority)
  SELECT id, :owner::uuid, COLUMNS, coalesce(run_after, now()), coalesce(priority, 0)
  FROM jsonb_populate_recordset(NULL::imagen.jobs, :requests::jsonb)
  ON CONFLICT DO NOTHING"""
KEYED = f"""SELECT {JOB_JSON} FROM imagen.jobs j
  WHERE owner_user_id = :owner::uuid AND key = :key
    AND (status IN ('pending', 'running', 'done') OR receipt IS NOT NULL)"""  # noqa: S608
# Of a request, as far as the database knows them by now.
REQUESTED = """SELECT coalesce(string_agg(column_name, ', '), 'prompt')
  FROM information_schema.columns
  WHERE table_schema = 'imagen' AND table_name = 'jobs' AND column_name = ANY(:names::text[])"""
CANCEL = """SELECT job::text, imagen.cancel_job(job)
  FROM unnest(:ids::uuid[]) WITH ORDINALITY AS j (job, place) ORDER BY place"""
# Of each job the same id whenever it is asked for: none is repeated twice.
FAILED = """SELECT jsonb_build_object('id', again, 'job', j.id)
  FROM imagen.jobs j, CAST(md5(j.id || ' again') AS uuid) AS again
  WHERE status = 'failed' AND receipt IS NULL AND error_code IS DISTINCT FROM 'unknown'
    AND (:since::timestamptz IS NULL OR finished_at >= :since::timestamptz)
    AND (:code::text IS NULL OR error_code = :code::text)
    AND NOT EXISTS (SELECT FROM imagen.jobs r WHERE r.id = again) ORDER BY seq"""
LIST = f"""SELECT {JOB_JSON} FROM imagen.jobs j
  WHERE (:status::text IS NULL OR status = :status::text)
    AND (:owner::uuid IS NULL OR owner_user_id = :owner::uuid)
    AND NOT EXISTS (SELECT FROM unnest(:words::text[]) AS word
      WHERE position(lower(word) IN lower(concat_ws(' ', prompt, style))) = 0)
  ORDER BY seq DESC LIMIT :n::int"""  # noqa: S608 (as above)
# `handed_back_at` is younger than the table.
STATS = """WITH jobs AS (
  SELECT status, coalesce(backend, '') AS backend, owner_user_id AS owner, error_code AS code,
    note, image_id, created_at, finished_at, to_jsonb(j)->>'handed_back_at' AS handed_back
  FROM imagen.jobs j
  WHERE status IN ('pending', 'running') OR finished_at > now() - interval '1 hour'
    OR (status = 'done' AND image_id IS NULL AND note > '')
), stats AS (
  SELECT status AS what, backend, owner::text, '' AS code, count(*) AS jobs,
    min(created_at) AS since
  FROM jobs WHERE status IN ('pending', 'running') GROUP BY status, backend, owner
  UNION ALL SELECT 'failed', backend, '', coalesce(code, ''), count(*), min(finished_at)
  FROM jobs WHERE status = 'failed' GROUP BY backend, code
  UNION ALL SELECT 'paused', backend, '', code, count(*), min(handed_back)::timestamptz
  FROM jobs WHERE status = 'pending' AND handed_back IS NOT NULL GROUP BY backend, code
  UNION ALL SELECT 'not in the cloud', '', '', '', count(*), min(finished_at)
  FROM jobs WHERE status = 'done' AND image_id IS NULL AND note > '' HAVING count(*) > 0
)
SELECT jsonb_build_object(
  'pending', coalesce(sum(jobs) FILTER (WHERE what = 'pending'), 0),
  'oldest', min(since) FILTER (WHERE what = 'pending'),
  'running', coalesce(sum(jobs) FILTER (WHERE what = 'running'), 0),
  'failed_last_hour', coalesce(sum(jobs) FILTER (WHERE what = 'failed'), 0),
  'paused', coalesce(sum(jobs) FILTER (WHERE what = 'paused'), 0),
  'not_in_cloud', coalesce(sum(jobs) FILTER (WHERE what = 'not in the cloud'), 0),
  'groups', coalesce(jsonb_agg(to_jsonb(stats) ORDER BY what, jobs DESC), '[]')),
  coalesce(jsonb_agg(jsonb_build_array(what, backend, owner, code, jobs, since)
    ORDER BY what, jobs DESC), '[]') FROM stats"""
FOLLOW = f"SELECT {JOB_JSON} FROM imagen.jobs j WHERE id = ANY(:ids::uuid[]) ORDER BY seq"  # noqa: S608


def job_requests(order: Order, config: Config) -> list[JsonObject]:
    """The columns of an order's jobs, one for each image."""
    if not config.owner_user_id:
        raise BadConfig(
            "owner_user_id is empty", "a UUID of auth.users: export IMAGEN_OWNER_USER_ID=…"
        )
    planned = plans_of(order, config)[0].request
    fields = sparse(order.request())
    request = {key: value for key, value in fields.items() if value != ""}
    if order.key:
        request["key"] = order.key
        if order.n > 1:
            raise BadRequest("--key is for one job", "leave out -n")
    if planned.images:
        cloud = Supabase(Context(DELIVERY_S), config.supabase)
        request["inputs"] = [upload_input(image, cloud, config) for image in planned.images]
        if planned.mask:
            request["mask"] = upload_input(planned.mask, cloud, config)
    requests = []
    for number in range(order.n):
        requests.append({"id": new_uuid(), **request})
        # Without a seed a job has one of its own, which its worker makes from its id.
        if order.seed is not None:
            requests[-1]["seed"] = order.seed + number
    return requests


def upload_input(image: Input, cloud: Supabase, config: Config) -> str:
    """The path in the bucket where the owner's jobs find an input."""
    path = f"{config.owner_user_id}/in/{image.sha256}.{image.mime_type.partition('/')[2]}"
    with open(image.path, "rb") as file:
        cloud.upload(path, file, image.mime_type, image.sha256)
    return path


@command(
    """
    the newest jobs
    terms [WORD…]  that prompt or style must hold, all of them
    --status pending|running|done|failed|canceled  these alone
    --owner UUID   of this user
    -n N           at most that many (50)
    """
)
def cmd_jobs_list(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config(args.config)
    terms = {"status": args.status, "owner": args.owner, "words": args.terms, "n": args.n}
    with postgres(config.supabase.database_url_env, patience=DELIVERY_S) as database:
        jobs = [job for (job,) in database.run(LIST, **terms)]
    lines = []
    for job in jobs:
        text, _, _ = (job["error"] or job["prompt"]).partition("\n")
        if job["error_code"]:
            text = f"{job['error_code']}: {text}"
        lines.append((job["id"], job["created_at"][:16], job["status"], text[:70]))
    if not lines:
        terminal.note("no jobs: imagen jobs add PROMPT makes one")
    return terminal.result({"jobs": jobs}, *aligned(lines))


def follow_jobs(ids: Sequence[str], terminal: Terminal, variable: str) -> int:
    """Show the jobs' progress until they are over; the first that failed gives the exit code."""
    began = time.monotonic()
    warned = False
    try:
        for jobs in watched_jobs(ids, terminal, variable):
            statuses = [job["status"] for job in jobs]
            running = [job for job in jobs if job["status"] == "running"]
            shown = (running or jobs)[0]
            note = f"{shown['status']} {shown['note'] or ''}".strip()
            progress = Progress(note, shown["progress"], shown["progress"] and 1.0)
            count = ""
            if len(ids) > 1:
                count = f"{statuses.count('done')} of {len(ids)}"
            elapsed = time.monotonic() - began
            terminal.progress(progress, elapsed, None, count)
            if not {"pending", "running"}.intersection(statuses):
                break
            if elapsed > 5 and not warned and {*statuses} == {"pending"}:
                terminal.say("no worker has taken it yet: does `imagen worker` run somewhere?")
                warned = True
    except KeyboardInterrupt:
        raise jobs_left(ids, Interrupted, "interrupted") from None
    error = None
    unsuccessful = [job for job in jobs if job["status"] != "done"]
    if unsuccessful:
        error = terminal.report(job_error(unsuccessful[0]))
    lines = [f"{job['id']}  {job['status']}  {job['image_id'] or ''}".rstrip() for job in jobs]
    return terminal.result({"jobs": jobs}, *lines, error=error)


def watched_jobs(
    ids: Sequence[str], terminal: Terminal, variable: str
) -> Iterator[list[JsonObject]]:
    """The jobs as they are, twice a second.

    The database may go and come back meanwhile: the jobs do not need us.
    """
    while True:
        try:
            with postgres(variable, patience=DELIVERY_S) as database:
                while jobs := [job for (job,) in database.run(FOLLOW, ids=list(ids))]:
                    if len(jobs) < len(ids):
                        break
                    yield jobs
                    time.sleep(0.5)
            raise Failed("a job was deleted before it was over")
        except Unreachable as problem:
            terminal.say(f"{problem}; asking again")
            time.sleep(2)


def job_error(job: Fields) -> ImagenError:
    """Why a job has no image, as an error of the kind that its worker met."""
    code = job["error_code"]
    if job["status"] == "canceled":
        code = "interrupted"
    charged: Charged = "no"
    if job["receipt"]:
        charged = "unknown"
    message, _, hint = (job["error"] or job["status"]).partition("\n")
    kind = ERRORS.get(code, Failed)
    return kind(f"{job['id']}: {message}", hint, charged=charged)


@command(
    """
    the OpenAI-compatible API and the gallery, over HTTP
    --host HOST             another one needs a token (127.0.0.1)
    --port N                0: any free one (8765)
    --token-env NAME        the variable that holds the token (IMAGEN_SERVE_TOKEN)
    --parallel N            requests at a time (2)
    --queue N               requests that wait behind them (32)
    --allow-host NAME*      what else this server is called, where it has no token
    --allow-origin ORIGIN*  a site whose pages may use the API, such as https://app.example
    --trust-proxy           believe X-Forwarded-Proto and -Host: a proxy sets them
    --all-owners            show also images of others, made by a worker here
    """
)
def cmd_serve(args: argparse.Namespace, terminal: Terminal) -> int:
    fine = 0 <= args.port < 65536 and 1 <= args.parallel <= 64
    if not fine or not 0 <= args.queue <= 1000:
        raise BadRequest("--port is 0 to 65535, --parallel 1 to 64, --queue 0 to 1000")
    config = load_config(args.config)
    for origin in args.allow_origin or ():
        if not re.fullmatch(r"https?://[^/*?#@\s]+", origin):
            raise BadRequest(f'--allow-origin "{origin}": such as https://app.example')
    server = Server(config, terminal.say, args)
    handle_stops(server.stop)
    address = server.address
    if args.json:
        address = to_json({"address": address})
    terminal.write(address)
    terminal.note(f"the API is at {server.address}v1; stop it with Ctrl-C")
    if server.token:
        from urllib.parse import quote

        # On the terminal of whoever started it, and in no log.
        shown = f"${args.token_env}"
        if sys.stderr.isatty():
            shown = quote(server.token, safe="")
        sys.stderr.write(f"open {server.address}?token={shown}\n")
    server.serve()
    return 0


SKILL = """\
---
name: imagine
description: Make an image from a prompt with ImaGen. Use when the user asks for a picture,
  an illustration, a photo or a header image, or types /imagine.
---
# /imagine PROMPT

Run this with the user's words in place of PROMPT, and a word of your own for this image in place of
KEY: the same one whenever you repeat it, and then it is paid once. It prints an id at once, and the
work goes on by itself. Behind `<<'END'` no letter of the prompt means anything to the shell.

    COMMAND generate - --detach --key KEY -q <<'END'
    PROMPT
    END

Then run this with that id (of several images: all) in place of ID, as often as it ends with 7:

    COMMAND wait ID --timeout 90 --json

- Add only what the user asked for: `--size 1536x1024`, `--style ink` (`COMMAND styles` lists
  them), `-n 4`, `--seed 7`, `--negative "text, blur"`, `-b mock` (`COMMAND backends` lists them).
  Another backend may cost money: that is the user's choice, also after an error.
- "The same, but …": `COMMAND generate --like last --seed 8 --detach --key KEY -q`, with the flags
  that change.
- To change an image, add `-i FILE` (or `-i last`; repeat it for several) and `--mask FILE`.
- With `--json` the stdout of `wait` is one document: `ok`, `images`, and where something went wrong
  `error` with `message`, `hint` and `charged`. Show each `images[].path` to the user; never read
  image bytes into the conversation.
- Without `--json` stdout has one absolute path per image, and nothing else.

| exit code | what to do |
|---|---|
| 0 | show the images |
| 1, 11 | report it; again only if the user says so, and only where `error.charged` is `no` |
| 2 | mend the request by `error.message` and `error.hint`, once |
| 3 | tell the user which key or setting is missing or wrong |
| 4, 7 | `wait` again; unless it was `still under way`, first the other, with the same KEY |
| 5 | **never repeat**: it was refused; offer other words |
| 6 | **never repeat**: the account, or the budget that the user has set, is empty |
| 8 | the disk is full: ask for room, then `COMMAND recover --all`, not a new image |
| 9 | show those made, say what went wrong, ask before making the rest |
| 10 | **never repeat**: it may be charged; `COMMAND recover ID` tells (`error.hint` has the id) |
| 130 | it was stopped; where `error.charged` is not `no`, as with 10 |
"""


@command("print a SKILL.md, for an /imagine command in a chat")
def cmd_skill(args: argparse.Namespace, terminal: Terminal) -> int:
    text = SKILL.replace("COMMAND", program()).rstrip()
    return terminal.result({"text": text}, text)


MCP_CLIENTS = """
clients:
  Claude Code  claude mcp add imagen -- PROGRAM mcp
  Codex        codex mcp add imagen -- PROGRAM mcp
  VS Code      in .vscode/mcp.json: {"servers": {"imagen": {HERE}}}
  Cursor       in .cursor/mcp.json: {"mcpServers": {"imagen": {HERE}}}"""
EXAMPLES = """
examples:
  imagen generate "a cat in a fishbowl"
  imagen generate "a lighthouse at dusk" --style poster -n 4 -b gpt-image
  imagen generate --like last --seed 7 --size 1536x1024 --json"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. The only place that turns errors into words."""
    import signal

    if argv is None:
        argv = sys.argv[1:]
    # A stream that was closed for us: no file of ours may get its number.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path keeps its bytes, and no letter ends a run
        if sys.getfilesystemencoding() in ("utf-8", "ascii"):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        else:
            sys.stdout.reconfigure(errors="backslashreplace")
    # In the background of a terminal that stops who writes there, we would wait for ever.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    terminal = Terminal(argv)
    code = 0
    try:
        with suppress(SystemExit):  # behind --help
            code = dispatch(argv, terminal)
    except (Exception, KeyboardInterrupt) as problem:
        code = terminal.result({}, error=terminal.report(problem))
    if terminal.unwritten:
        return code or Disk.exit_code
    return code


def dispatch(argv: Sequence[str], terminal: Terminal) -> int:
    """Run the command that `argv` names; flags may stand before it too."""
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        place += 1 + (argv[place] == "--config")
    before = argv[:place]
    rest = list(argv[place:])
    if {"-V", "--version"}.intersection(before):
        return show_version(terminal)
    if rest[:1] == ["help"]:
        rest = [*rest[1:], "--help"]
    if not argv or rest == ["--help"] or {"-h", "--help"}.intersection(before):
        return show_help(terminal)
    name, *after = rest or [""]
    actions = [key.partition(" ")[2] for key in COMMANDS if key.startswith(f"{name} ")]
    if actions:
        action = next((word for word in after if word in actions), "")
        if not action and {"-h", "--help"}.intersection(after):
            return show_help(terminal, name)
        if not action:
            first = next((word for word in after if not word.startswith("-")), "")
            message = f'imagen {name} "{first}": no such action'
            raise BadRequest(message, f"{nearest(first, actions)}; imagen {name} --help")
        after.remove(action)
        name = f"{name} {action}"
    if name not in COMMANDS:
        message = "a command is missing"
        hint = nearest(name, " ".join(GROUPS.values()).split())
        if before:
            message = f"{before[0]}: no flag that can stand alone"
        if name:
            message = f'command "{name}" is unknown'
        if " " in name:
            hint = f'imagen generate "{name}"?'
        raise BadRequest(message, hint)
    args = parsed_args(parser_of(name, terminal), [*before, *after])
    terminal.quiet = args.quiet
    terminal.verbose = args.verbose
    cmd, _ = COMMANDS[name]
    return cmd(args, terminal)


def parsed_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """What `argv` says; behind `--` nothing is a flag.

    CPython before 3.13.5 forgets the `--` half way, so what stands behind it is marked, by what no
    argument can hold, until `unmarked` sees it.
    """
    end = len(argv)
    if "--" in argv:
        end = argv.index("--")
    marked_words = [f"\0{word}" for word in argv[end + 1 :]]
    return parser.parse_intermixed_args([*argv[:end], *marked_words])


def show_version(terminal: Terminal) -> int:
    """Release and hash of this file: copies travel without their repository."""
    digest = sha256_of(read_bytes(__file__))
    document = {"version": __version__, "sha256": digest}
    return terminal.result(document, f"imagen {__version__} ({digest[:12]})")


def show_help(terminal: Terminal, name: str = "") -> int:
    """What `imagen --help` says; with a name, the help of a command that has several actions."""
    import textwrap

    columns = text_columns()

    def listed(names: str) -> str:
        lines = []
        for first in names.split():
            for key, (_, text) in COMMANDS.items():
                if key.partition(" ")[0] == first:
                    start = f"  {key:<17}"
                    summary = text.partition("\n")[0]
                    lines += textwrap.wrap(
                        summary, columns, initial_indent=start, subsequent_indent=" " * 19
                    )
        return "\n".join(lines)

    parts = [f"usage: imagen {name} ACTION …", listed(name)]
    if not name:
        parts = ["usage: imagen [--config FILE] COMMAND …"]
        parts += [f"{group}:\n{listed(names)}" for group, names in GROUPS.items()]
        parts.append(EXAMPLES)
    end = "imagen help COMMAND tells more; imagen -V prints the release and this copy's hash"
    parts.append(textwrap.fill(end, columns))
    text = "\n\n".join(parts)
    return terminal.result({"text": text}, text)


def text_columns() -> int:
    """How wide a text on stdout may be."""
    with suppress(ValueError):
        return max(20, int(os.environ.get("COLUMNS", "")))
    with suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return 80


def parser_of(name: str, terminal: Terminal) -> argparse.ArgumentParser:
    """The parser of one command; what it has to say leaves like everything else."""
    import argparse

    class Strict(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            hint = f"{self.prog} --help"
            if unknown := re.search(r"unrecognized arguments: (-\S+)", message):
                hint = nearest(unknown[1], self._option_string_actions)
            elif "unrecognized arguments" in message and "prompt" in COMMANDS[name][1]:
                hint = 'a prompt of several words stands in quotes: imagen generate "a fox in snow"'
            raise BadRequest(message, hint)

        def print_help(self, file: Any = None) -> None:
            examples = {"generate": EXAMPLES, "mcp": MCP_CLIENTS}.get(name, "")
            here = to_json({"command": sys.executable, "args": [os.path.abspath(__file__), "mcp"]})
            examples = examples.replace("PROGRAM", program()).replace("{HERE}", here)
            text = f"{self.format_help().rstrip()}\n{examples}".rstrip()
            terminal.result({"text": text}, text)

    columns = text_columns()
    summary, _, flags = COMMANDS[name][1].partition("\n")
    parser = Strict(
        prog=f"imagen {name}",
        usage=" ".join([f"imagen {name} [flags]", *re.findall(r"(?m)^ *\w+ (\S+)  ", flags)]),
        description=summary,
        # Without a width of its own a formatter imports shutil.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=columns),
        allow_abbrev=False,
    )
    for line in f"{flags}\n{EVERYWHERE}".splitlines():
        if line := line.strip():
            add_argument(parser, line)
    return parser


def add_argument(parser: argparse.ArgumentParser, line: str) -> None:
    """Have `parser` know the argument that a line of `command`'s flags describes."""
    spelling, _, text = line.partition("  ")
    *names, value = spelling.split()
    text = text.strip()
    if value.startswith("-"):
        parser.add_argument(*names, value, action="store_true", help=text)
        return
    options: JsonObject = {"help": text, "metavar": value.strip("[]…*")}
    options["type"] = ARGUMENT_TYPES.get(value, unmarked)
    if default := re.search(r"\((\S+)\)$", text):
        options["default"] = default[1]
    if re.fullmatch(r"[a-z]+(\|[a-z]+)+", value):
        options["choices"] = value.split("|")
        if len(value) > 20:  # wider than the help of a narrow terminal
            options["metavar"] = "WHICH"
            options["help"] = f"{text}: {', '.join(options['choices'])}"
    if value.endswith("*"):
        options["action"] = "append"
    elif "…" in value:
        options["nargs"] = "*"
    elif "[" in value:
        options["nargs"] = "?"
    parser.add_argument(*names, **options)


def unmarked(word: str) -> str:
    """A word of the command line as it was typed."""
    return word.removeprefix("\0")


def above_zero(word: str) -> float:
    """A number of seconds."""
    import argparse

    with suppress(ValueError):
        if float(word) > 0:  # so it is a number
            return float(word)
    raise argparse.ArgumentTypeError(f'"{word}" is not more than 0 seconds')


# By what stands for the value in the help.
ARGUMENT_TYPES = {"N": int, "S": float, "USD": float, "SECONDS": above_zero}


if __name__ == "__main__":
    if not __spec__ and sys.argv[1:2] and sys.argv[1] in STAYING:
        start_anew()
    sys.exit(main())

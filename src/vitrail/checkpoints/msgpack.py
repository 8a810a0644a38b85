"""The part of msgpack that checkpoints of flax use (https://github.com/msgpack/msgpack, spec.md).

Files may come from anywhere: what is decoded is bounded, and raw bytes, which is where the numbers are, stay in the
file until someone who knows their size asks for them.
"""

import struct
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np

MAX_DEPTH, MAX_TEXT, MAX_VALUES = 32, 1000, 1_000_000
"""Far beyond any checkpoint."""

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    **dict(zip(range(0xCA, 0xD0), (">f", ">d", ">B", ">H", ">I", ">Q"), strict=True)),
    **dict(zip(range(0xD0, 0xD4), (">b", ">h", ">i", ">q"), strict=True)),
}
# First byte of a value: its kind, and its length where the byte tells it, or how many bytes after it do.
_SHORT = {
    **{0x80 + n: ("map", n) for n in range(16)},
    **{0x90 + n: ("list", n) for n in range(16)},
    **{0xA0 + n: ("text", n) for n in range(32)},
    **{0xD4 + n: ("ext", 1 << n) for n in range(5)},
}
_LONG = {
    **{0xC4 + n: ("bytes", 1 << n) for n in range(3)},
    **{0xC7 + n: ("ext", 1 << n) for n in range(3)},
    **{0xD9 + n: ("text", 1 << n) for n in range(3)},
    **{0xDC + n: ("list", 2 << n) for n in range(2)},
    **{0xDE + n: ("map", 2 << n) for n in range(2)},
}


class Malformed(ValueError):
    """A file is not what its format says."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes in a file, left there."""

    code: int | None
    """Of an extension type; None for raw bytes."""
    start: int
    stop: int


class Reader:
    """Decodes values of a file."""

    def __init__(self, file: BufferedReader) -> None:
        self.file = file
        self.size = self._at = file.seek(0, 2)
        self._values = 0

    def whole_file(self) -> Any:
        """Return the one value that the file is made of."""
        return self.inside(Span(None, 0, self.size))

    def inside(self, span: object, code: int | None = None) -> Any:
        """Return the one value that raw bytes, or those of the extension type `code`, are made of.

        Raises:
            Malformed: When they are not, or the value is no such bytes.
        """
        if not isinstance(span, Span) or span.code != code:
            raise Malformed("a value has another type than it should")
        self._at = self.file.seek(span.start)
        value = self._value(span.stop, 0)
        if self._at != span.stop:
            raise Malformed("there is more in it than there should be")
        return value

    def read_into(self, buffer: np.ndarray, span: Span) -> None:
        """Fill a buffer of bytes, which is as long as the span, without a copy."""
        self.file.seek(span.start)
        if self.file.readinto(buffer.data) != span.stop - span.start:
            raise Malformed("it ends too early")

    def _value(self, stop: int, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise Malformed("it holds more values, or deeper, than a checkpoint does")
        first = self._take(1, stop)[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return struct.unpack(_NUMBERS[first], self._take(struct.calcsize(_NUMBERS[first]), stop))[0]
        if first in _SHORT:
            kind, length = _SHORT[first]
        elif first in _LONG:
            kind, told = _LONG[first]
            length = int.from_bytes(self._take(told, stop), "big")
        else:
            raise Malformed(f"it has a value of the unknown kind {first:#x}")
        match kind:
            case "list":
                return [self._value(stop, depth + 1) for _ in range(length)]
            case "map":
                return self._map(length, stop, depth + 1)
            case "text":
                return self._text(length, stop)
            case _:
                return self._span(self._take(1, stop)[0] if kind == "ext" else None, length, stop)

    def _map(self, length: int, stop: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self._value(stop, depth)
            if not isinstance(key, str) or key in found:
                raise Malformed(f"{key!r} cannot be a name here")
            found[key] = self._value(stop, depth)
        return found

    def _text(self, length: int, stop: int) -> str:
        if length > MAX_TEXT:
            raise Malformed(f"it has a name of {length:,} bytes")
        try:
            return self._take(length, stop).decode()
        except UnicodeDecodeError as error:
            raise Malformed("it has a name that is no text") from error

    def _span(self, code: int | None, length: int, stop: int) -> Span:
        start = self._at
        if length > stop - start:
            raise Malformed("it ends too early")
        self._at = self.file.seek(start + length)
        return Span(code, start, start + length)

    def _take(self, count: int, stop: int) -> bytes:
        data = self.file.read(count) if count <= stop - self._at else b""
        if len(data) != count:
            raise Malformed("it ends too early")
        self._at += count
        return data


class Ext(NamedTuple):
    """A value of an extension type, to be written."""

    code: int
    data: bytes


def pack(value: Any) -> bytes:
    """Return the bytes of None, truth values, sizes, text, bytes, extensions, and lists and maps of them."""
    match value:
        case None | bool():
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case int():
            return struct.pack(">BQ", 0xCF, value)
        case str():
            return struct.pack(">BH", 0xDA, len(value.encode())) + value.encode()
        case bytes():
            return bytes_head(len(value)) + value
        case Ext(code, data):
            return ext_head(code, len(data)) + data
        case list():
            return list_head(len(value)) + b"".join(map(pack, value))
        case _:
            return map_head(len(value)) + b"".join(pack(name) + pack(item) for name, item in value.items())


def bytes_head(length: int) -> bytes:
    """Return what comes before raw bytes."""
    return struct.pack(">BI", 0xC6, length)


def ext_head(code: int, length: int) -> bytes:
    """Return what comes before the bytes of an extension type."""
    return struct.pack(">BIB", 0xC9, length, code)


def list_head(length: int) -> bytes:
    """Return what comes before the items of a list."""
    return struct.pack(">BI", 0xDD, length)


def map_head(length: int) -> bytes:
    """Return what comes before the names and items of a map."""
    return struct.pack(">BI", 0xDF, length)

"""Pictures for tests: encoded by Pillow or put together byte by byte, natural, hostile and mutated."""

import struct
import zlib
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def picture(mode: str, array: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), np.ascontiguousarray(array).tobytes())


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}), **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int, image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


def natural(height: int, width: int) -> Image.Image:
    """Smooth shades, edges and some grain, as in a photograph."""
    y, x = np.mgrid[:height, :width].astype(float)
    shades = [128 + 70 * np.sin(x / (37 + 9 * i) + y / 53) + 40 * np.sin(y / (5 + i)) * np.cos(x / 7) for i in range(3)]
    edges = 30 * ((x // 61 + y // 47) % 2)
    grain = np.random.default_rng(0).normal(0, 4, (height, width))
    levels = np.stack([shade + edges + grain for shade in shades], axis=-1)
    return picture("RGB", np.clip(levels, 0, 255).astype(np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def hole(*values: int) -> bytes:
    """A tRNS chunk: this value is transparent."""
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def tiff(order: str, bits: int, values: np.ndarray, *, white: int = 1, form: int = 1, packed: bool = False) -> bytes:
    """A grey TIFF; `white` 0 means that 0 is white, `form` 2 signed numbers."""
    pixels = zlib.compress(values.tobytes()) if packed else values.tobytes()
    tags = {256: 4, 257: 1, 258: bits, 259: 8 if packed else 1, 262: white, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    tags[339] = form
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "I", 8 + len(pixels)) + pixels
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4)


@cache
def bombs() -> dict[str, bytes]:
    jpeg = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))
    webp = b"VP8L" + struct.pack("<IBI", 24, 0x2F, 16382 | 16382 << 14) + bytes(19)
    small_tiff = tiff("<", 8, np.zeros(4, np.uint8))
    tiled = small_tiff.replace(struct.pack("<HHII", 278, 4, 1, 1), struct.pack("<HHII", 322, 4, 1, 30000))
    tiled = tiled.replace(struct.pack("<HHII", 279, 4, 1, 4), struct.pack("<HHII", 323, 4, 1, 30000))
    return {
        "png": png(60000, 60000, 8, 2, bytes(10**6)),
        "just over": png(10001, 10000, 1, 0, b""),
        "png text": png(4, 4, 8, 2, bytes(52), text),
        "png profile": png(4, 4, 8, 2, bytes(52), profile),
        "jpeg": bytes(jpeg),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(8) + b"\0\x02\x02\x4c\x01\0;",
        "webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60000, -60000, 1, 24, *[0] * 6) + bytes(99),
        "tiff": small_tiff.replace(struct.pack("<HHII", 256, 4, 1, 4), struct.pack("<HHII", 256, 4, 1, 2**31)),
        "tiff tile": tiled,
    }


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, replace, delete or cut bytes; half the time near the header."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(min(len(changed), 100 if rng.random() < 0.5 else len(changed))))
        action = rng.integers(4)
        if action == 0:
            changed[place] ^= 1 << rng.integers(8)
        elif action == 1:
            changed[place] = rng.integers(256)
        elif action == 2:
            del changed[place : place + rng.integers(1, 20)]
        else:
            del changed[int(rng.integers(len(changed) // 2, len(changed))) :]
        if not changed:
            break
    return bytes(changed)

"""The server under load: many clients good and bad, the signal to stop with requests in flight, and its throughput.

benchmarks/serving.py [mixed] [drain] [throughput] [--tiny]

`mixed`: 32 clients send 500 requests each to a small ViT and a small Wide-ResNet: pictures of five formats, alone and
in forms, explanations; and broken pictures, bombs, bodies too large, wrong types, unknown models. 40 slow clients hold
connections meanwhile. The queue is short, so that some are refused. Every answer is compared with `vitrail.predict`'s.
`drain`: rounds of SIGTERM with 20 requests to ViT-S/16 in flight. `throughput`: 32 clients that ask ViT-S/16 about
photos, one a request, in turns with `vitrail.predict` on the same files; clients and server share the cores. What is
known lies in `results/serving.json`, from which the page is written.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe as machine
from machine import read_parts, write_parts, write_result
from PIL import Image
from torch import nn

import vitrail
from vitrail.benchmark.limits import photo
from vitrail.benchmark.timing import take_turns
from vitrail.config.model import ModelConfig, model_config
from vitrail.config.vit import ViTConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.models import build

PARTS = ("mixed", "drain", "throughput")
SHARE = 0.9
"""Of `predict`'s rate that the server is to reach."""
CLIENTS, SLOW, IN_FLIGHT = 32, 40, 20
ROUNDING = 1e-5
"""Between probabilities of one picture in two batches."""
SHAPES = ((375, 500), (500, 375), (333, 500), (500, 500))
Row = dict[str, Any]
Labels = list[tuple[str, float]]


class Server:
    """`vitrail serve` in a process of its own."""

    def __init__(self, *arguments: str, threads: int) -> None:
        command = [sys.executable, "-m", "vitrail", "serve", *arguments, "--port", "0", "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                break
        else:
            raise RuntimeError("the server did not start")
        self.port = int(json.loads(text)["url"].rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(*arguments: str, threads: int) -> Iterator[Server]:
    server = Server(*arguments, threads=threads)
    try:
        yield server
    finally:
        server.stop()


def ask(
    connection: http.client.HTTPConnection, path: str, body: bytes, kind: str = "image/jpeg"
) -> tuple[int, str | None, Any]:
    """Return the status, when to ask again, and the document that a picture, or what is none, is answered with."""
    connection.request("POST", f"/v1/models/{path}", body, {"content-type": kind})
    answer = connection.getresponse()
    return answer.status, answer.getheader("retry-after"), json.loads(answer.read())


def save(config: ModelConfig, folder: Path) -> Path:
    """Save a model with fresh weights and a head that tells pictures apart."""
    torch.manual_seed(0)
    model = build(config).eval()
    assert model.head is not None
    nn.init.normal_(model.head.weight, std=0.1 if config.num_classes > 10 else 1.0)
    vitrail.save_model(model, folder)
    return folder


def expected(folder: Path, files: Sequence[Path]) -> dict[Path, Labels]:
    found = vitrail.predict(vitrail.load_model(folder), files, engine="eager")
    return {file: list(each.labels) for file, each in zip(files, found, strict=True)}


def same(labels: Sequence[dict[str, Any]], wanted: Labels) -> bool:
    """Whether an answer is the expected one; classes that are equally likely up to rounding may change places."""
    shares = dict(wanted)
    return len(labels) == len(wanted) and all(
        abs(each["probability"] - share) < ROUNDING and abs(shares.get(each["label"], share) - share) < ROUNDING
        for each, (_, share) in zip(labels, wanted, strict=True)
    )


def form(files: Sequence[bytes]) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    return b"".join(head + data + b"\r\n" for data in files) + b"--edge--\r\n"


def pictures(root: Path) -> list[Path]:
    """Write pictures of several sizes and formats."""
    rng, paths = np.random.default_rng(0), list[Path]()
    for number, kind in enumerate(("png", "jpeg", "webp", "gif", "tiff") * 4):
        height, width = rng.integers(30, 200, 2)
        paths.append(root / f"{number}.{kind}")
        Image.fromarray(photo_like(rng, int(height), int(width))).save(paths[-1], kind)
    return paths


def photo_like(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def bomb() -> bytes:
    """Return a PNG whose header declares 2,500 megapixels."""
    small = BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    return small.getvalue().replace((8).to_bytes(4) * 2, (50_000).to_bytes(4) * 2, 1)


def mixed(root: Path, *, tiny: bool) -> Row:
    """Measure 32 clients that are not all good."""
    each = 10 if tiny else 500
    size = {"image_size": (32, 32), "num_classes": 10}
    folders = {
        "vit": save(ViTConfig(**size, patch_size=(8, 8), width=32, depth=3, mlp_dim=64, heads=2), root / "vit"),
        "wrn": save(WideResNetConfig(**size, stem_width=8, widths=(8, 16, 16), depths=(1, 1, 1)), root / "wrn"),
    }
    files = pictures(root)
    data = {file: file.read_bytes() for file in files}
    wanted = {name: expected(folder, files) for name, folder in folders.items()}
    faults: dict[str, tuple[str, bytes, str, int]] = {
        "cut": ("vit/predict", data[files[0]][:200], "image/png", 422),
        "bomb": ("wrn/predict", bomb(), "image/png", 422),
        "text": ("vit/predict", b"hello", "image/png", 422),
        "json": ("vit/predict", b"{}", "application/json", 415),
        "empty": ("vit/explain", b"", "image/png", 400),
        "form": ("wrn/predict", b"--edge--", "multipart/form-data", 400),
        "many": ("vit/predict", form([b"x"] * 9), "multipart/form-data; boundary=edge", 400),
        "large": ("vit/predict", bytes(1_100_000), "image/png", 413),
        "nowhere": ("none/predict", data[files[0]], "image/png", 404),
        "top": ("vit/predict?top=0", data[files[0]], "image/png", 400),
    }
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    times: list[float] = []

    def judge(what: str, found: tuple[int, str | None, Any], status: int, good: Callable[[Any], bool]) -> None:
        if found[0] == 503 and found[1] is not None and int(found[1]) >= 1:
            counts["503"] += 1
        elif found[0] != status or not good(found[2]):
            wrong.append(f"{what}: {found}"[:300])
        else:
            counts[str(status)] += 1

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        with closing(server.connect()) as connection:
            for _ in range(each):
                name, chosen = str(rng.choice(list(folders))), [files[i] for i in rng.integers(0, len(files), 4)]
                kind, began = rng.random(), time.perf_counter()
                answers = [wanted[name][file] for file in chosen]
                if kind < 0.5:
                    found = ask(connection, f"{name}/predict", data[chosen[0]])
                    judge("one", found, 200, lambda d, a=answers: same(d["predictions"][0]["labels"], a[0]))
                elif kind < 0.6:
                    body = form([data[file] for file in chosen])
                    found = ask(connection, f"{name}/predict", body, "multipart/form-data; boundary=edge")
                    judge(
                        "form",
                        found,
                        200,
                        lambda d, a=answers: all(
                            same(p["labels"], w) for p, w in zip(d["predictions"], a, strict=True)
                        ),
                    )
                elif kind < 0.65:
                    found = ask(connection, f"{name}/explain", data[chosen[0]])
                    judge("explain", found, 200, lambda d, a=answers: same(d["labels"], a[0]))
                else:
                    fault = str(rng.choice(list(faults)))
                    path, body, of, status = faults[fault]
                    judge(fault, ask(connection, path, body, of), status, lambda d: True)
                times.append(time.perf_counter() - began)

    options = ("--max-megabytes", "1", "--max-pictures", "8", "--queue", "16", "--engine", "eager")
    with serving(*map(str, folders.values()), *options, threads=1) as server, ExitStack() as stack:
        for number in range(SLOW):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            head = b"POST /v1/models/vit/predict HTTP/1.1\r\nHost: localhost\r\n"
            slow.sendall(head + (b"Content-Length: 99\r\n\r\nx" if number % 2 else b""))
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        taken = time.perf_counter() - began
    times.sort()
    return {
        "requests": CLIENTS * each,
        "wrong": wrong[:10],
        "wrong_count": len(wrong),
        "counts": dict(sorted(counts.items())),
        "seconds": taken,
        "median_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[int(len(times) * 0.99)],
    }


def vit_small(root: Path, *, tiny: bool) -> tuple[Path, list[Path]]:
    """Return ViT-S/16, one block of it for a rehearsal, and photos."""
    config = model_config("vit-s16")
    assert isinstance(config, ViTConfig)
    if tiny:
        config = ViTConfig(patch_size=(16, 16), width=32, depth=1, mlp_dim=64, heads=2)
    files = [root / f"{number}.jpg" for number in range(8 if tiny else 160)]
    shown = [photo(*shape) for shape in SHAPES]
    for number, file in enumerate(files):
        file.write_bytes(shown[number % len(shown)])
    return save(config, root / "model"), files


def drain(root: Path, *, tiny: bool) -> Row:
    """Measure what becomes of requests in flight at SIGTERM."""
    rounds = 2 if tiny else 20
    folder, files = vit_small(root, tiny=tiny)
    files = files[:4]
    data, wanted = {file: file.read_bytes() for file in files}, expected(folder, files)
    answered, codes, seconds = 0, list[int](), list[float]()

    def start() -> Server:
        return Server(f"model={folder}", "--engine", "eager", threads=1)

    with ThreadPoolExecutor(IN_FLIGHT + 1) as pool:
        ahead = pool.submit(start)
        for number in range(rounds):
            server = ahead.result()
            if number + 1 < rounds:
                ahead = pool.submit(start)
            connections = [server.connect() for _ in range(IN_FLIGHT)]
            chosen = [files[i % len(files)] for i in range(IN_FLIGHT)]
            waiting = [
                pool.submit(ask, connection, "model/predict", data[file])
                for connection, file in zip(connections, chosen, strict=True)
            ]
            time.sleep(0.1)
            began = time.perf_counter()
            codes.append(server.stop())
            seconds.append(time.perf_counter() - began)
            for each, file in zip(waiting, chosen, strict=True):
                status, _, found = each.result()
                answered += status == 200 and same(found["predictions"][0]["labels"], wanted[file])
            for connection in connections:
                connection.close()
    return {
        "rounds": rounds,
        "requests": rounds * IN_FLIGHT,
        "answered": answered,
        "codes": dict(Counter(map(str, codes))),
        "longest": max(seconds),
    }


def throughput(root: Path, *, tiny: bool) -> Row:
    """Measure the server's rate beside `predict`'s."""
    folder, files = vit_small(root, tiny=tiny)
    model, data = vitrail.load_model(folder), [file.read_bytes() for file in files]
    with (
        serving(f"model={folder}", "--engine", "eager", threads=torch.get_num_threads()) as server,
        ExitStack() as stack,
    ):
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        connections = [stack.enter_context(closing(server.connect())) for _ in range(CLIENTS)]

        def client(number: int) -> int:
            found = [ask(connections[number], "model/predict", each)[0] for each in data[number::CLIENTS]]
            return found.count(200)

        def served() -> int:
            done = sum(pool.map(client, range(CLIENTS)))
            assert done == len(data), "every request is answered"
            return done

        works = {"predict": lambda: len(vitrail.predict(model, files, engine="eager")), "serve": served}
        timings = take_turns(works, turns=2 if tiny else 5, seconds=0.0)
        alone = []
        for _ in range(2 if tiny else 40):
            began = time.perf_counter()
            ask(connections[0], "model/predict", data[0])
            alone.append(time.perf_counter() - began)
    return {
        "predict": timings["predict"].rate,
        "serve": timings["serve"].rate,
        "share": timings["serve"].times(timings["predict"]),
        "alone_ms": 1e3 * sorted(alone)[len(alone) // 2],
    }


def page(known: dict[str, Row]) -> str:
    """Return what is known, beside its targets."""
    lines = [__doc__.split("\n\n")[2], ""]
    for part, row in known.items():
        lines += [f"## {part}", "", row["machine"], "", *told(part, row), ""]
    return "\n".join(lines)


def told(part: str, row: Row) -> list[str]:
    if part == "mixed":
        counts = ", ".join(f"{status}: {count:,}" for status, count in row["counts"].items())
        return [
            f"- {row['requests']:,} requests in {row['seconds']:.0f} s; answered otherwise than expected, or with 500: "
            f"**{row['wrong_count']}** (target 0: {reached(not row['wrong_count'])})",
            f"- answers by status: {counts}; every 503 had its Retry-After",
            f"- a request took {row['median_ms']:.0f} ms in the median, {row['p99_ms']:.0f} ms at the 99th percentile",
            *(f"- {line}" for line in row["wrong"]),
        ]
    if part == "drain":
        everything = row["answered"] == row["requests"] and set(row["codes"]) == {"0"}
        return [
            f"- {row['rounds']} rounds, {row['requests']} requests in flight at SIGTERM: **{row['answered']}** "
            f"answered rightly (target all: {reached(everything)})",
            f"- exit codes {row['codes']}; at most {row['longest']:.1f} s from the signal to the end",
        ]
    return [
        f"- `predict` {row['predict']:.2f} pictures/s, `serve` {row['serve']:.2f}: **{row['share']:.3f}** of it (at "
        f"least {SHARE}: {reached(row['share'] >= SHARE)})",
        f"- one client alone waits {row['alone_ms']:.0f} ms for an answer",
    ]


def reached(is_so: bool) -> str:
    return "reached" if is_so else "missed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="rehearse; nothing is kept")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    known: dict[str, Row] = read_parts("serving", tiny=asked.tiny)
    measure = {"mixed": mixed, "drain": drain, "throughput": throughput}
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as root:
            known[part] = {"machine": machine(), **measure[part](Path(root), tiny=asked.tiny)}
        print(page({part: known[part]}), flush=True)
        if not asked.tiny:
            known = {key: known[key] for key in PARTS if key in known}
            write_parts("serving", known)
            write_result("serving", "benchmarks/serving.py", page(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())

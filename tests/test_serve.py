"""The server: right answers, refusals by rule, and an end that leaves no request without an answer."""

import asyncio
import base64
import contextlib
import http.client
import importlib
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import chromium
import numpy as np
import pytest
import torch
import uvicorn
from families import TINY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pictures import bombs, encode, natural
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message

from vitrail import load_model, predict, save_model
from vitrail.cli import main
from vitrail.data.decode import decode
from vitrail.data.view import view_pixels
from vitrail.errors import BrokenPicture, UserError
from vitrail.models import build
from vitrail.serving import PACKAGES, guard, server, supervisor, worker
from vitrail.serving.app import State, create_app
from vitrail.serving.guard import hosts_for
from vitrail.serving.jobs import (
    Answer,
    Answers,
    Compute,
    Job,
    JobFailed,
    JobUnfit,
    ModelFacts,
    Setup,
    Unfit,
    Unreadable,
    WorkerLost,
)
from vitrail.serving.limits import Limits
from vitrail.serving.reading import Reader
from vitrail.serving.supervisor import Supervisor
from vitrail.serving.worker import Computer

HOSTILE = "<img src=x onerror=alert(1)>"
LABELS = ("apple", "leaf", HOSTILE, "sky", "=cmd|' /C calc'!A0")


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A server in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "vitrail", "serve", *arguments, "--port", "0", "--json", "--engine", "eager"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert self.process.stdout is not None
        lines = []
        while (line := self.process.stdout.readline().decode()) not in ("}\n", ""):
            lines.append(line)
        if not line:
            raise AssertionError(self.process.communicate()[1].decode())
        self.told = json.loads("".join(lines) + "}")
        self.url = self.told["url"]
        self.address = ("127.0.0.1", urlsplit(self.url).port)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def post(self, data: bytes, what: str = "predict", model: str = "vit", kind: str = "image/png") -> Reply:
        return self.ask("POST", f"/v1/models/{model}/{what}", data, {"content-type": kind})

    def worker(self) -> int:
        """Return the process that computes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def stop(self) -> tuple[int, str]:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors.decode()


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """Return a form with files, and its content type."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
        for name, data in files
    ]
    return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ViT and a Wide-ResNet with weights that tell pictures apart, and labels that mean harm."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("vit", TINY["vit"]), ("wrn", TINY["wide-resnet"])):
        torch.manual_seed(0)
        model = build(config).eval()
        assert model.head is not None
        torch.nn.init.normal_(model.head.weight, std=1.0)
        model.labels = LABELS
        save_model(model, root / name)
    return {"vit": root / "vit", "wrn": root / "wrn"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of several formats and sizes."""
    root = tmp_path_factory.mktemp("shown")
    sizes = ((40, 60), (64, 32), (32, 32), (90, 90), (33, 71))
    files = {}
    for (height, width), kind in zip(sizes, ("png", "jpeg", "webp", "gif", "tiff"), strict=True):
        path = root / f"{height}.{kind}"
        path.write_bytes(encode(natural(height, width), kind.upper()))
        files[path.name] = path
    return files


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], shown: dict[str, Path]) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """What `predict` says, by model and picture."""
    return {
        name: {
            Path(found.name).name: list(found.labels)
            for found in predict(load_model(folder), list(shown.values()), top=5, engine="eager")
        }
        for name, folder in models.items()
    }


@pytest.fixture(scope="module")
def running(models: dict[str, Path]) -> Iterator[Running]:
    found = Running(*map(str, models.values()), "--max-megabytes", "1", "--max-pictures", "6")
    yield found
    found.process.kill()
    found.process.communicate()


def same(labels: list[dict[str, Any]], expected: list[tuple[str, float]]) -> bool:
    """Whether an answer is the expected one, up to rounding in another batch."""
    close = [abs(found["probability"] - share) < 1e-5 for found, (_, share) in zip(labels, expected, strict=False)]
    return [found["label"] for found in labels] == [label for label, _ in expected[: len(labels)]] and all(close)


# What is computed


def test_a_worker_answers_as_predict_does_and_refuses_what_cannot_be_read(
    models: dict[str, Path], shown: dict[str, Path], expected: dict[str, Any]
) -> None:
    computer = Computer(Setup({"wrn": str(models["wrn"])}, "eager", 5000))
    job = Job("predict", "wrn", [path.read_bytes() for path in shown.values()], 3)
    answers = computer.answer(job, computer.begin(job))
    assert isinstance(answers, list)
    for name, answer in zip(shown, answers, strict=True):
        if name == "90.gif":  # more than 5,000 pixels
            assert isinstance(answer, Unreadable) and "90 x 90 pixels are more than the 5,000" in answer.reason
        else:
            assert isinstance(answer, Answer) and len(answer.labels) == 3
            assert same(
                [{"label": label, "probability": share} for label, share in answer.labels], expected["wrn"][name]
            )


@pytest.mark.parametrize("kind", bombs())
def test_bombs_are_refused_before_they_go_off(kind: str) -> None:
    began = time.perf_counter()
    with pytest.raises(BrokenPicture):
        decode(bombs()[kind], most=25_000_000)
    assert time.perf_counter() - began < 0.5


def test_a_tile_larger_than_the_picture_counts() -> None:
    with pytest.raises(BrokenPicture, match="6000 x 6000 pixels are more than the 25,000,000"):
        decode(bombs()["tiff tile"].replace(struct.pack("<I", 30000), struct.pack("<I", 6000)), most=25_000_000)


def test_a_model_without_a_classifier_is_not_served(models: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_model(models["vit"], num_classes=0), tmp_path / "body")
    with pytest.raises(UserError, match="no classes"):
        Computer(Setup({"body": str(tmp_path / "body")}, "eager", 5000))


def test_a_model_that_merges_tokens_says_why_it_cannot_be_explained(
    models: dict[str, Path], shown: dict[str, Path], tmp_path: Path
) -> None:
    save_model(load_model(models["vit"], merge_tokens=2), tmp_path / "merging")
    computer = Computer(Setup({"merging": str(tmp_path / "merging")}, "eager", 5000))
    job = Job("explain", "merging", [shown["40.png"].read_bytes()], 1)
    answer = computer.answer(job, computer.begin(job))
    assert isinstance(answer, Unfit) and "merge_tokens=0" in answer.reason
    job = job._replace(kind="predict")
    assert isinstance(computer.answer(job, computer.begin(job)), list)


def test_a_lost_device_ends_the_worker(
    models: dict[str, Path], shown: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Answers:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    computer = Computer(Setup({"wrn": str(models["wrn"])}, "eager", 5000))
    monkeypatch.setattr(computer, "_answers", fail)
    monkeypatch.setattr(worker.os, "_exit", sys.exit)
    job = Job("predict", "wrn", [shown["40.png"].read_bytes()], 1)
    with pytest.raises(SystemExit, match="1"):
        computer.answer(job, computer.begin(job))


def test_answers_are_those_of_predict(
    running: Running, shown: dict[str, Path], expected: dict[str, dict[str, Any]]
) -> None:
    for model, answers in expected.items():
        body, kind = form(*((name, path.read_bytes()) for name, path in shown.items()), ("no.png", b"no"))
        reply = running.post(body, model=model, kind=kind)
        assert reply.status == 200
        *found, broken = reply.json["predictions"]
        assert [each["name"] for each in found] == list(shown)
        assert all(same(each["labels"], answers[each["name"]]) for each in found)
        assert broken["labels"] == [] and "not a JPEG" in broken["problem"]


def test_an_explanation_shows_what_the_model_saw(
    running: Running, models: dict[str, Path], shown: dict[str, Path], expected: dict[str, Any]
) -> None:
    for model, title in (("vit", "Relevance"), ("wrn", "Grad-CAM")):
        reply = running.post(shown["40.png"].read_bytes(), "explain", model).json
        assert same(reply["labels"], expected[model]["40.png"])
        assert reply["explanation"]["title"] == title
        assert reply["explanation"]["explained"] == reply["labels"][0]["label"]
        seen = np.asarray(Image.open(BytesIO(base64.b64decode(reply["explanation"]["seen"].partition(",")[2]))))
        picture = np.asarray(Image.open(shown["40.png"]))
        assert np.array_equal(seen, view_pixels(picture, load_model(models[model]).preprocessing))


def test_many_clients_good_and_bad_get_what_is_theirs(
    running: Running, shown: dict[str, Path], expected: dict[str, Any]
) -> None:
    data = {name: path.read_bytes() for name, path in shown.items()}
    large = b"x" * 1_100_000

    def client(number: int) -> list[str]:
        rng, wrong = np.random.default_rng(number), []
        for _ in range(6):
            name, model = str(rng.choice(list(data))), str(rng.choice(["vit", "wrn"]))
            kind = int(rng.integers(7))
            if kind < 4:
                reply = running.post(data[name], model=model, kind="application/octet-stream")
                good = reply.status == 200 and same(reply.json["predictions"][0]["labels"], expected[model][name])
            elif kind == 4:
                reply = running.post(data[name][: len(data[name]) // 2], model=model)
                good = reply.status == 422 or name == "33.tiff"
            elif kind == 5:
                reply = running.post(bombs()[str(rng.choice(["png", "jpeg", "gif", "tiff tile"]))], model=model)
                good = reply.status == 422
            else:
                reply = running.post(large, model=model)
                good = reply.status == 413
            if not good:
                wrong.append(f"{kind} {name} {model}: {reply.status} {reply.body[:200]!r}")
        return wrong

    with ThreadPoolExecutor(32) as pool:
        assert [line for lines in pool.map(client, range(32)) for line in lines] == []
    assert b'status="500"' not in running.ask("GET", "/metrics").body


# What is refused


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"", "image/png", 400, "no body"),
        (b"no picture", "image/png", 422, "Not a JPEG"),
        (bombs()["png"], "image/png", 422, "60000 x 60000 pixels are more than"),
        (encode(natural(64, 64), "PNG")[:500], "image/png", 422, "cannot be read"),
        (b"{}", "application/json", 415, "multipart/form-data"),
        (form()[0], form()[1], 400, "no file"),
        (form(*[("a.png", b"a")] * 7)[0], form()[1], 400, "Too many files"),
        (form(("a.png", b"a"))[0], "multipart/form-data", 400, "boundary"),
        (
            b"--edge\r\nContent-Disposition: form-data; name=url\r\n\r\nhttp://x/\r\n--edge--\r\n",
            form()[1],
            400,
            "files",
        ),
        (b"x" * 1_000_001, "image/png", 413, "1,000,000 bytes"),
    ],
)
def test_what_is_no_picture_is_refused_by_rule(
    running: Running, body: bytes, kind: str, status: int, says: str
) -> None:
    began = time.perf_counter()
    reply = running.post(body, kind=kind)
    assert reply.status == status and reply.headers["content-type"] == "application/problem+json"
    assert reply.json["status"] == status
    assert re.search(says, reply.json["detail"], re.IGNORECASE), reply.json
    assert time.perf_counter() - began < 2


def test_an_endless_body_is_cut(running: Running) -> None:
    with socket.create_connection(running.address, timeout=10) as client:
        client.sendall(b"POST /v1/models/vit/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 20_000_000:
                client.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        assert sent < 8_000_000  # buffers of the system included


@pytest.mark.parametrize("path", ["/v1/models/none", "/nothing", "/../pyproject.toml", "/%2e%2e/etc/passwd", "/docs"])
def test_nothing_else_is_served(running: Running, path: str) -> None:
    assert running.ask("GET", path).status == 404


@pytest.mark.parametrize("top", ["0", "-1", "x", "1.5", "9" * 30, "\u0663".encode().hex()])
def test_a_top_that_is_no_number_is_refused(running: Running, shown: dict[str, Path], top: str) -> None:
    assert running.ask("POST", f"/v1/models/vit/predict?top={top}", shown["40.png"].read_bytes()).status == 400


# In this process, with a worker that does as it is told


class Told(Compute):
    """Stands for the worker."""

    ahead = 1
    ready = healthy = True

    def __init__(self, does: Callable[[Job], Answers | Exception] | None = None) -> None:
        facts = ModelFacts("vit", "ViT", LABELS, False, (32, 32), 3, 1000, 4)
        self.models = {"vit": facts}
        self.jobs: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self._does = does or (lambda job: [Answer((("apple", 1.0),))] * len(job.pictures))

    async def ask(self, job: Job) -> Answers:
        self.jobs.append(len(job.pictures))
        while not self.go.is_set():
            await asyncio.sleep(0.005)
        found = self._does(job)
        if isinstance(found, Exception):
            raise found
        return found


def client_of(state: State, **options: Any) -> TestClient:
    return TestClient(create_app(state), "http://localhost", raise_server_exceptions=False, **options)


ASK = "/v1/models/vit/predict"


def test_overload_is_answered_at_once_and_says_when_to_come_back() -> None:
    told = Told()
    told.go.clear()
    state = State(told, Limits(queue=8))
    with client_of(state) as client, ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(client.post, ASK, content=b"x") for _ in range(40)]
        while sum(each.done() for each in waiting) < 40 - 8 - 4:  # 8 wait, at most 4 are computed
            time.sleep(0.01)
        told.go.set()
        replies = [each.result() for each in waiting]
    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.status_code for reply in replies} == {200, 503} and len(refused) >= 28
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)


def test_pictures_that_come_while_one_is_computed_go_together() -> None:
    told = Told()
    told.go.clear()
    with client_of(State(told)) as client, ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(client.post, ASK, content=b"x") for _ in range(9)]
        time.sleep(0.4)
        told.go.set()
        assert all(each.result().status_code == 200 for each in waiting)
    assert max(told.jobs) == 4 and sum(told.jobs) == 9


@pytest.mark.parametrize(
    ("problem", "status", "says"),
    [
        (WorkerLost("it crashed"), 503, "was lost"),
        (JobFailed("no"), 500, "bug"),
        (ZeroDivisionError(), 500, "bug"),
        (JobUnfit("relevance needs places"), 422, "Relevance needs places"),
    ],
)
def test_what_goes_wrong_inside_is_said(problem: Exception, status: int, says: str) -> None:
    with client_of(State(Told(lambda job: problem))) as client:
        reply = client.post(ASK, files=[("image", b"1"), ("image", b"2")])
    assert reply.status_code == status and says in reply.json()["detail"]
    assert ("retry-after" in reply.headers) == (status == 503)


def test_a_request_that_waits_too_long_is_told_so() -> None:
    told = Told()
    told.go.clear()
    with client_of(State(told, Limits(seconds=0.1))) as client:
        reply = client.post(ASK, content=b"x")
        told.go.set()
    assert reply.status_code == 503 and "within 0.1 s" in reply.json()["detail"]


def test_readiness_and_health_tell_the_truth() -> None:
    told = Told()
    state = State(told)
    with client_of(state) as client:

        def statuses() -> tuple[int, int]:
            return client.get("/health").status_code, client.get("/ready").status_code

        assert statuses() == (200, 200)
        told.ready = False
        assert statuses() == (200, 503)
        assert b"vitrail_worker_up 0.0" in client.get("/metrics").content
        told.healthy = False
        assert statuses() == (503, 503)
        told.ready = told.healthy = True
        state.draining = True
        assert statuses() == (200, 503)


def test_tokens_guard_answers_and_figures_and_every_route_is_known() -> None:
    state = State(Told(), tokens=["secret", "other"])
    needs = {
        "/health": False,
        "/ready": False,
        "/openapi.json": False,
        "/": False,
        "/page.css": False,
        "/page.js": False,
        "/metrics": True,
        "/v1/models": True,
        "/v1/models/{model}": True,
        "/v1/models/{model}/predict": True,
        "/v1/models/{model}/explain": True,
    }
    assert {route.path for route in create_app(state).routes} == needs.keys()
    with client_of(state) as client:
        for path, needed in needs.items():
            method = "POST" if path.endswith(("predict", "explain")) else "GET"
            asked = client.request(method, path.format(model="vit"), content=b"x")
            assert (asked.status_code == 401) == needed, path
        for header, status in (("Bearer other", 200), ("bearer secret", 200), ("Bearer secre", 401), ("secret", 401)):
            assert client.get("/v1/models", headers={"authorization": header}).status_code == status
        assert client.get("/v1/models", headers={"host": "localhost/health?"}).status_code == 401
        assert client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["security"]


def test_other_sites_may_not_ask() -> None:
    with client_of(State(Told(), hosts=hosts_for("127.0.0.1", ["photos.example"]))) as client:
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("photos.example", 200),
            ("evil.example", 421),
            ("localhost.evil.example:8000", 421),
        ):
            assert client.get("/v1/models", headers={"host": host}).status_code == status, host
        assert client.post(ASK, content=b"x", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert client.post(ASK, content=b"x", headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert hosts_for("0.0.0.0", []) == ()


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1", "127.0.0.1", "::1"])
def test_allowed_names_come_beside_those_of_this_machine(address: str) -> None:
    hosts = hosts_for(address, ["Photos.Example", "clothes.example:8443", "2001:DB8::1"])
    with client_of(State(Told(), hosts=hosts)) as client:
        for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "photos.example", "clothes.example", "[2001:db8::1]"):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 421


def test_every_answer_forbids_scripts_from_elsewhere() -> None:
    with client_of(State(Told())) as client:
        for path in ("/", "/page.js", "/nothing", "/v1/models"):
            policy = client.get(path).headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        page = client.get("/").text + client.get("/page.js").text + client.get("/page.css").text
    assert "//cdn" not in page and page.count("http://") + page.count("https://") == page.count("http://www.w3.org")


# Clients that are slow, with a server of ours in a thread


@contextlib.contextmanager
def listening(state: State) -> Iterator[tuple[str, int]]:
    """Serve from a thread of this process."""
    config = uvicorn.Config(create_app(state), http=server._Protocol, log_config=None, log_level="error")
    found = server._Server(config, state, lambda: None)
    with server._listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=lambda: asyncio.run(found.serve([listener])))
        thread.start()
        try:
            yield address
        finally:
            found.should_exit = True
            thread.join()


def test_slow_clients_are_cut_and_others_do_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.6)
    state = State(Told(), Limits(body_seconds=0.6))
    with listening(state) as address, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(60)]
        for client in clients[:30]:
            client.sendall(b"POST /v1/models/vit/predict HTTP/1.1\r\nHost: lo")
        for client in clients[30:]:
            client.sendall(b"POST /v1/models/vit/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab")
        connection = http.client.HTTPConnection(*address, timeout=5)
        with contextlib.closing(connection):
            for _ in range(20):
                began = time.perf_counter()
                connection.request("GET", "/v1/models")
                assert connection.getresponse().read() and time.perf_counter() - began < 0.5
        began = time.perf_counter()
        for client in clients[:30]:
            assert client.recv(100) == b""
        assert all(client.recv(4096).startswith(b"HTTP/1.1 408") for client in clients[30:])
        assert time.perf_counter() - began < 3


def test_an_idle_connection_and_its_next_request_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    with listening(State(Told())) as address:
        connection = http.client.HTTPConnection(*address, timeout=5)
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("GET", "/ready")
                assert connection.getresponse().read() == b'{"status":"ready"}'
                time.sleep(0.4)


@pytest.mark.parametrize(
    ("asked", "status"),
    [("POST /v1/models/vit/predict", 401), ("POST /nothing", 401), ("GET /health", 200), ("POST /health", 405)],
)
def test_who_goes_on_sending_after_the_answer_is_cut(monkeypatch: pytest.MonkeyPatch, asked: str, status: int) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(guard, "PARTING_SECONDS", 0.5)
    with listening(State(Told(), tokens=["secret"])) as address, socket.create_connection(address, timeout=5) as client:
        client.sendall(f"{asked} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n".encode())
        assert client.recv(4096).startswith(f"HTTP/1.1 {status}".encode())
        began = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            while time.perf_counter() - began < 3:
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.perf_counter() - began < 2


def test_who_sends_all_before_looking_finds_the_refusal() -> None:
    with listening(State(Told(), tokens=["secret"])) as address, socket.create_connection(address, timeout=5) as client:
        client.sendall(f"POST {ASK} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n".encode())
        for _ in range(9):
            time.sleep(0.02)
            client.sendall(bytes(1_000_000))
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 401 and answer.getheader("connection") == "close" and b"token" in answer.read()
        assert client.recv(1) == b""


def test_a_body_is_held_once() -> None:
    async def held(size: int) -> int:
        chunks = iter(range(size // 1_000_000 - 1, -1, -1))

        async def receive() -> Message:
            return {"type": "http.request", "body": bytes(1_000_000), "more_body": next(chunks) > 0}

        tracemalloc.start()
        try:
            request = Request({"type": "http", "method": "POST", "headers": []}, receive)
            async with Reader(Limits()).pictures(request) as uploads:
                assert len(uploads[0].data) == size
                return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    assert asyncio.run(held(20_000_000)) < 25_000_000


def test_pictures_of_a_client_that_went_away_are_not_computed() -> None:
    told = Told()
    told.go.clear()
    state = State(told)
    with listening(state) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(12):
                client = stack.enter_context(socket.create_connection(address, timeout=5))
                client.sendall(b"POST /v1/models/vit/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
            until(lambda: state.metrics.queue._value.get() >= 8)
        until(lambda: state.metrics.queue._value.get() == 0)
        told.go.set()
    assert sum(told.jobs) <= 4


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "late"
        time.sleep(0.02)


# Workers and ends


PUPPET = """
import time
from vitrail.serving.jobs import Answer, Ready

def work(connection, setup):
    "Stands for the worker: begins after so many seconds, and takes as many for a job as the job says."
    time.sleep(setup.pixels / 1000)
    connection.send(Ready({}, 3))
    while True:
        number, job = connection.recv()
        time.sleep(float(job.model))
        connection.send((number, [Answer(((job.model, 1.0),))]))
"""


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Returns what runs a scenario with a supervisor whose worker is a puppet."""
    (tmp_path / "puppet.py").write_text(PUPPET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(supervisor, "_work", importlib.import_module("puppet").work)

    @contextlib.asynccontextmanager
    async def begun(seconds: float, loading: float) -> AsyncIterator[Supervisor]:
        found = Supervisor(Setup({}, "eager", round(loading * 1000)), seconds)
        try:
            await found.start()
            yield found
        finally:
            await found.stop()

    def run(
        scenario: Callable[[Supervisor], Coroutine[None, None, None]], *, seconds: float = 20.0, loading: float = 0.0
    ) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30), begun(seconds, loading) as found:
                await scenario(found)

        asyncio.run(whole())

    yield run
    sys.modules.pop("puppet", None)


def job_of(seconds: float, data: bytes = b"") -> Job:
    return Job("predict", str(seconds), [data], 1)


def process_of(found: Supervisor) -> Any:
    assert found._worker is not None
    return found._worker.process


def test_a_worker_that_cannot_be_started_for_now_is_started_later(
    supervised: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    get_context = supervisor.multiprocessing.get_context
    failures = [OSError(11, "Resource temporarily unavailable")] * 2

    def short_of_memory(method: str) -> Any:
        if failures:
            raise failures.pop()
        return get_context(method)

    async def scenario(found: Supervisor) -> None:
        monkeypatch.setattr(supervisor.multiprocessing, "get_context", short_of_memory)
        monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.05))
        process_of(found).kill()
        while failures:
            await asyncio.sleep(0.01)
        assert len(await found.ask(job_of(0))) == 1
        assert found.healthy

    supervised(scenario)


def test_a_server_that_gets_no_worker_at_all_says_that_it_is_ill(
    supervised: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(method: str) -> Any:
        raise OSError(12, "Cannot allocate memory")

    async def scenario(found: Supervisor) -> None:
        monkeypatch.setattr(supervisor.multiprocessing, "get_context", refuse)
        monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.01))
        process_of(found).kill()
        while found.healthy:
            await asyncio.sleep(0.01)

    supervised(scenario)


def test_time_runs_from_when_the_worker_begins_a_job(supervised: Callable[..., None]) -> None:
    async def scenario(found: Supervisor) -> None:
        answers = await asyncio.gather(*(found.ask(job_of(0.6)) for _ in range(4)))
        assert len(answers) == 4 and process_of(found).is_alive()

    supervised(scenario, seconds=1.5)


def test_a_job_does_not_go_to_a_worker_that_still_loads(supervised: Callable[..., None]) -> None:
    async def scenario(found: Supervisor) -> None:
        first = process_of(found)
        async with found._sending:  # as while another job is being sent
            asked = asyncio.create_task(found.ask(job_of(0)))
            await asyncio.sleep(0.05)
            first.kill()
            await asyncio.sleep(0.4)  # its loss is known, and where nothing waits for the lock another one loads
        while found._worker is None or process_of(found) is first:
            await asyncio.sleep(0.01)
        loading = process_of(found)
        assert len(await asked) == 1 and process_of(found) is loading

    supervised(scenario, seconds=0.5, loading=1.0)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_worker_that_takes_nothing_is_replaced(supervised: Callable[..., None]) -> None:
    async def scenario(found: Supervisor) -> None:
        os.kill(process_of(found).pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost, match=r"longer than 0\.5 s"):
            await found.ask(job_of(0, bytes(10_000_000)))  # more than the pipe holds
        assert len(await found.ask(job_of(0))) == 1

    supervised(scenario, seconds=0.5)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker by /proc")
def test_a_lost_worker_is_replaced_and_only_its_requests_fail(running: Running, shown: dict[str, Path]) -> None:
    data, lost = shown["40.png"].read_bytes(), running.worker()
    os.kill(lost, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, data)
        time.sleep(0.3)
        os.kill(lost, signal.SIGKILL)
        reply = asked.result()
        assert reply.status == 503 and "was lost" in reply.json["detail"] and "retry-after" in reply.headers
        until(lambda: running.ask("GET", "/ready").status == 503, 1)
        assert running.ask("GET", "/health").status == 200
        assert running.post(data).status == 200  # waits for the next worker
    assert running.ask("GET", "/ready").status == 200 and running.worker() != lost
    assert b"vitrail_worker_losses_total 1.0" in running.ask("GET", "/metrics").body


def test_requests_on_their_way_at_sigterm_are_answered(
    models: dict[str, Path], shown: dict[str, Path], expected: dict[str, Any]
) -> None:
    running = Running(f"vit={models['vit']}")
    data = shown["40.png"].read_bytes()
    head = f"POST {ASK} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(running.address, timeout=20)) for _ in range(20)]
        for client in clients:
            client.sendall(head + data[:100])
        running.process.terminate()
        began = time.perf_counter()
        until(lambda: running.ask("GET", "/ready").status == 503, 1)
        late = running.post(data)  # a load balancer has not noticed yet
        time.sleep(max(0.0, server.LINGER + 0.3 - (time.perf_counter() - began)))
        with pytest.raises(ConnectionError):
            running.ask("GET", "/ready")
        for client in clients:
            client.sendall(data[100:])
        replies = []
        for client in clients:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            replies.append(Reply(answer.status, {}, answer.read()))
    _, errors = running.process.communicate(timeout=20)
    assert all(reply.status == 200 for reply in [late, *replies]) and running.process.returncode == 0
    assert all(same(reply.json["predictions"][0]["labels"], expected["vit"]["40.png"]) for reply in replies)
    assert errors == b""


# The document, and the page


def test_the_openapi_document_holds(running: Running, shown: dict[str, Path]) -> None:
    import schemathesis
    from schemathesis.generation import GenerationMode

    pictures = st.sampled_from([path.read_bytes() for path in shown.values()])
    for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, pictures)
    schemathesis.openapi.format("binary", pictures)
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    asked = 0

    @settings(max_examples=60, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        nonlocal asked
        operation = data.draw(st.sampled_from(operations))
        mode = data.draw(st.sampled_from(GenerationMode))
        data.draw(operation.as_strategy(generation_mode=mode)).call_and_validate()
        asked += 1

    operations = [found.ok() for found in schema.get_all_operations()]
    check()
    assert len(operations) == 7 and asked >= 40


@pytest.mark.skipif(chromium.installed() is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1200, 375])
def test_the_page_shows_answers(
    running: Running, shown: dict[str, Path], expected: dict[str, Any], tmp_path: Path, width: int
) -> None:
    with chromium.browser(tmp_path / "profile") as page:
        page.open(running.url, width=width)
        page.wait("document.querySelector('#lead').textContent.includes('knows 5 classes')")
        page.press("Tab", 9)
        assert page.run("document.activeElement.id") == "model"
        page.press("Tab", 9)
        assert page.run("document.activeElement.id") == "files"
        page.choose("#files", shown["40.png"], shown["64.jpeg"])
        page.wait("document.querySelectorAll('.answer:not([hidden])').length == 2")
        page.wait("[...document.images].every(image => image.complete && image.naturalWidth)")
        for name in ("40.png", "64.jpeg"):
            card = f"[...document.querySelectorAll('.card')].find(c => c.querySelector('h2').textContent == '{name}')"
            labels = page.run(f"[...{card}.querySelectorAll('tbody th')].map(th => th.textContent)")
            assert labels == [label for label, _ in expected["vit"][name]]
        assert page.run("document.images.length") == 6  # no label has become a picture
        assert page.run("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / "page.png")
        assert page.complaints == []


# The command line


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("vitrail.serving.find_spec", lambda name: None if name in PACKAGES else find(name))
    assert main(["serve", "vitrail-mini"]) == 2
    assert "pip install 'vitrail[serve]'" in capsys.readouterr().err


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("one two\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, said in (
            (["--port", str(taken.getsockname()[1])], "is taken"),
            (["--port", "99999"], "0 to 65535"),
            (["--host", "192.0.2.1", "--port", "0"], "cannot listen"),
            (["--queue", "3"], "--queue must be"),
            (["--max-megabytes", "0"], "--max-megabytes must be above 0"),
            (["--tokens", str(tmp_path / "tokens")], "a token on each line"),
            (["vitrail-mini"], "two models are called vitrail-mini"),
        ):
            assert main(["serve", "vitrail-mini", *arguments]) == 2
            assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", "serve", str(tmp_path / "none"), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "there is no file or folder" in done.stderr


def test_models_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    (tmp_path / "clothes" / "best").mkdir(parents=True)
    named = server.model_names([str(tmp_path / "clothes" / "best"), "b=x/ViT-B_16.npz", "x/ViT-B_16.npz", "hf:a/b c"])
    assert list(named) == ["clothes", "b", "ViT-B_16", "b-c"]


def test_the_process_that_faces_the_network_does_not_import_torch() -> None:
    code = "import sys, vitrail.serving.server as s; s.create_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

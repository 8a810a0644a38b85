"""Labels for more pictures than one process is to answer: Ray Data spreads them over a machine, or a cluster.

The pictures, in the order found, are cut into parts. A worker answers a part and writes it to a file of its own, whole
or not at all. So every picture has exactly one row, whoever dies: an unfinished part is made by another worker, or when
the same call is made again, which leaves alone what has been written.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from vitrail.checkpoints.storage import write_file
from vitrail.data.base import Source, Subset
from vitrail.embedding import model_hash
from vitrail.engines.choice import engine_for
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.prediction import classify, open_pictures, require_probability, to_parquet

log = logging.getLogger("vitrail")

FORMAT = 1
ABOUT = "_vitrail.json"
"""What the folder's answers are to; readers of Parquet folders pass over names that begin so."""
FEWEST, MOST = 256, 4096
"""Pictures in a part: so many that starting it costs little, so few that little is lost with a worker."""
PARTS = 8
"""Parts that each worker gets, where that leaves them larger than the smallest: so that all end at about one time."""
CPUS = 4
"""Cores of a worker without a GPU: a model is in memory once per worker, and gains little by more cores."""
ATTEMPTS = 4
"""Workers that a part may cost before it is given up."""


@dataclass(frozen=True)
class Predicted:
    """What a folder of answers holds."""

    out: Path
    pictures: int
    """Rows, one per picture."""
    broken: int
    """Pictures that could not be read; their rows say why."""
    parts: int
    """Files."""
    found: int
    """Parts that were there already, of an earlier call."""


class _Slots(NamedTuple):
    """What a worker takes of the cluster, and how many of them fit."""

    workers: int
    cpus: int
    gpus: int


def predict_distributed(
    model: ImageModel,
    images: Sequence[str | Path] | Source,
    out: str | Path,
    *,
    top: int = 5,
    reject: float | None = None,
    workers: int = 2,
) -> Predicted:
    """Classify pictures on a Ray cluster, into a folder of Parquet files with one row per picture.

    The cluster is the one that `RAY_ADDRESS` names or that runs on this machine, else one is started for the call, on
    this machine alone. All its machines must reach the pictures and `out` under the same paths, and have Vitrail.

    Columns: `name`, `label_1`, `probability_1` and so on, likeliest first, `rejected`, and `problem`, which is null
    unless a picture could not be read. Rows of all files, sorted by file name, are in the order found.

    Args:
        model: A trained model; its labels and preprocessing are used.
        images: Files, folders and globs, or a source of pictures.
        out: The folder. Where it holds answers to the same question, what is missing is added.
        top: Number of classes per picture.
        reject: Mark answers whose likeliest class has a probability below this.
        workers: Decoding threads of each worker.

    Raises:
        UserError: When Ray is not installed, the folder holds answers to another question, or a part's workers died
            again and again.
    """
    require_ray()
    if reject is not None:
        require_probability(reject)
    out = Path(out).absolute()
    source = images if isinstance(images, Source) else open_pictures(images, model)
    about = _about(model, source, top, reject)
    parts = _noted(out, about)
    found = sum(path.exists() for path in parts)
    if not parts or found < len(parts):
        with _cluster() as ray:
            slots = _slots(ray)
            parts = parts or _begin(out, about, slots.workers)
            _remove_unfinished(out)
            missing = [part for path, part in parts.items() if not path.exists()]
            work = (ray.put((model.cpu(), source)), out, {"top": top, "reject": reject, "workers": workers})
            _run(ray, work, missing, slots, of=len(parts))
            _remove_unfinished(out)
    rows, broken = zip(*map(_count, parts), strict=True)
    return Predicted(out, sum(rows), sum(broken), len(parts), found)


def require_ray() -> None:
    """Raise UserError when Ray Data is not installed. Nothing is imported."""
    if lacking := [name for name in ("ray", "pyarrow", "pandas") if find_spec(name) is None]:
        raise UserError(f"engine ray needs {', '.join(lacking)}, not installed: pip install 'vitrail[ray]'.")


def _about(model: ImageModel, source: Source, top: int, reject: float | None) -> dict[str, Any]:
    """Return what answers depend on."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(os.fsencode(source.name(index)) + b"\0")
    return {
        "format": FORMAT,
        "model": model_hash(model),
        "labels": hashlib.sha256(ascii(model.class_names).encode()).hexdigest(),
        "pictures": len(source),
        "names": names.hexdigest(),
        "top": top,
        "reject": reject,
    }


def _noted(out: Path, about: dict[str, Any]) -> dict[Path, range]:
    """Return the parts of a folder that holds answers to this question; none for a new folder."""
    file = out / ABOUT
    if not file.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already, and holds no predictions; name a new folder with --out.")
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        size = int(known["part"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is damaged ({problem}); name a new folder with --out.") from problem
    if different := [name for name, value in about.items() if known.get(name) != value]:
        raise UserError(
            f"{out} holds predictions with another {' and '.join(different)}. Call it as it was begun, or name a new "
            "folder with --out."
        )
    return _parts(out, about, size)


def _begin(out: Path, about: dict[str, Any], workers: int) -> dict[Path, range]:
    """Note in a new folder what is asked, and return its parts."""
    size = min(max(math.ceil(about["pictures"] / (PARTS * workers)), FEWEST), MOST)
    write_file(out / ABOUT, (json.dumps({**about, "part": size}, indent=1) + "\n").encode())
    return _parts(out, about, size)


def _parts(out: Path, about: dict[str, Any], size: int) -> dict[Path, range]:
    """Return the file of every part, and its pictures."""
    every = range(about["pictures"])
    return {_file(out, start): every[start : start + size] for start in every[::size]}


def _file(out: Path, start: int) -> Path:
    return out / f"part-{start:010d}.parquet"


def _count(path: Path) -> tuple[int, int]:
    """Return the rows of a part, and those of them that tell of a problem."""
    from pyarrow import parquet

    problem = parquet.read_table(path, columns=["problem"])["problem"]
    return len(problem), len(problem) - problem.null_count


@contextmanager
def _cluster() -> Iterator[Any]:
    """Yield Ray, connected to a cluster. One that was started for it ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless a person asks for it
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong comes as an exception as well
    import ray
    import ray.data

    joined = ray.is_initialized()
    if not joined:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()


def _slots(ray: Any) -> _Slots:
    """Return what a worker takes: a GPU where there are any, else some cores."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not cores:
        raise UserError("the Ray cluster has no machine with a CPU to work on; add one to it.")
    if gpus:
        return _Slots(gpus, 1, 1)
    cpus = min(CPUS, *cores)
    return _Slots(sum(count // cpus for count in cores), cpus, 0)


class _Worker:
    """Answers parts, in a process of its own.

    Args:
        things: The model and the source, which lie in the cluster's memory once for all workers.
        out: The folder.
        asked: How to answer: arguments of `classify`.
    """

    def __init__(self, things: Any, out: Path, asked: dict[str, Any]) -> None:
        import ray

        self.model, self.source = ray.get(things)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.answer = engine_for(self.model, "auto", len(self.source))
        self.out, self.asked = out, asked

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = range(int(batch["start"][0]), int(batch["stop"][0]))
        with writing(_file(self.out, part.start)) as new:
            found = classify(self.model, Subset(self.source, part), self.answer, **self.asked)
            write_file(new, to_parquet(found, self.asked["top"]))
        return batch


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield the place of a part's file until it is whole: no other worker writes there, even one taken for dead.

    Those of workers that died stay behind, and are counted.

    Raises:
        UserError: When the part has cost as many workers as it may.
    """
    if len(list(path.parent.glob(f"_{path.stem}-*.tmp"))) >= ATTEMPTS:
        raise UserError(f"{ATTEMPTS} workers died of the pictures from number {int(path.stem[5:])} on")
    new = path.with_name(f"_{path.stem}-{uuid4().hex}.tmp")
    new.touch()
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def _remove_unfinished(out: Path) -> None:
    for leftover in out.glob("_*.tmp"):
        leftover.unlink(missing_ok=True)


def _run(ray: Any, work: tuple[Any, ...], parts: Sequence[range], slots: _Slots, *, of: int) -> None:
    """Let the cluster answer parts."""
    rows = [{"start": part.start, "stop": part.stop} for part in parts]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Worker,
        fn_constructor_args=work,
        batch_size=1,
        num_cpus=slots.cpus,
        num_gpus=slots.gpus,
        # Ray starts a worker that died, and its part, again, without end: `writing` counts.
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=min(slots.workers, len(parts))),
    )
    try:
        for number, _ in enumerate(answered.iter_rows(), of - len(parts) + 1):
            log.info("part %d of %d", number, of)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"a part could not be answered: {reason}. What has been written stays; call it again to go on."
        ) from error

"""The verbs about models themselves: `models`, `convert` and `benchmark`."""

from typing import Annotated, Any, Literal

import tyro
from rich.table import Column, Table
from tyro.conf import Positional

import vitrail
from vitrail.cli.console import Console, print_json


def models(
    name: Positional[Annotated[str | None, tyro.conf.arg(metavar="[NAME]")]] = None,
    *,
    leaderboard: bool = False,
    json: bool = False,
) -> int:
    """List the models that come with their weights and the published sizes, or show one.

    Args:
        name: A model name or leaderboard alias; all when left out.
        leaderboard: Show the ten systems of the leaderboards: what was published, and what has been verified here.
        json: Print one JSON document on stdout.
    """
    from vitrail.weights import weights_at_hand
    from vitrail.zoo import describe

    if leaderboard:
        return _leaderboard(json=json)
    rows = [describe(each) for each in ([name] if name else [*weights_at_hand(), *vitrail.list_models()])]
    if json:
        return print_json(rows)
    table = Table(
        Column("model", no_wrap=True),
        Column("parameters", justify="right", no_wrap=True),
        "GMACs @pixels",
        Column("source", no_wrap=True),
        box=None,
        padding=(0, 2, 0, 0),
    )
    for row in rows:
        gmacs = ", ".join(f"{value:.4g} @{size}" for size, value in row["gmacs"].items())
        table.add_row(row["model"], f"{row['parameters']:,}", gmacs, row["source"])
    Console().print(table)
    return 0


def convert(
    source: Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]],
    dest: Positional[Annotated[str, tyro.conf.arg(metavar="DEST")]],
    *,
    names: str | None = None,
    image_size: int | None = None,
    heads: tuple[int, ...] | None = None,
    gelu: Literal["tanh", "erf", "quick"] | None = None,
    allow_pickle: bool = False,
    offline: bool = False,
    public: bool = False,
    license: str | None = None,
    json: bool = False,
) -> int:
    """Bring weights from one form to another: model folders, files under the names of other libraries, and the hub.

    Args:
        source: Model folder, checkpoint of a run, weight file, model name with weights at hand, hf:ID or timm:ID.
        dest: Folder for a Vitrail model; a file: .npz, .safetensors, .pth, or .index (V-MoE); or hf:OWNER/NAME, to
            send the model, its settings and its card to the Hugging Face hub, where a new repository is private.
        names: For a file, whose names to write: vit, vit-published, big-vision, vmoe, timm, hf, cvt or
            efficientnet-pytorch; default: those that leave the least untold about such a model.
        image_size: Resize positions to this picture size.
        heads: Attention heads, where the file cannot tell; one number per stage for CvT.
        gelu: Flavour of GELU, where the file cannot tell.
        allow_pickle: Read a PyTorch file (.pth, .bin); nothing in it is executed.
        offline: Take hf: and timm: models from the cache alone.
        public: On the hub, let everybody have the model.
        license: On the hub, the licence for the model's card, such as apache-2.0.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import convert as bring

    each = heads[0] if heads is not None and len(heads) == 1 else heads
    given: dict[str, Any] = {"image_size": image_size, "heads": each, "gelu": gelu}
    overrides = {key: value for key, value in given.items() if value is not None}
    facts = bring(
        source,
        dest,
        names=names,
        allow_pickle=allow_pickle,
        offline=offline,
        public=public,
        license=license,
        **overrides,
    )
    if json:
        return print_json(facts)
    console = Console(highlight=False, soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{name:>10}  {value:,}" if isinstance(value, int) else f"{name:>10}  {value}", markup=False)
    return 0


def benchmark(
    model: Positional[Annotated[str, tyro.conf.arg(metavar="[MODEL]")]] = "vit-s16",
    *,
    batch_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    json: bool = False,
) -> int:
    """Measure this machine: training, answers and loading, beside its own limits and beside timm if installed.

    Args:
        model: A model name or leaderboard alias; it gets fresh weights.
        batch_size: Pictures at a time; by default 8 on a CPU, 128 on a GPU.
        precision: Of matrix products; auto takes what training would take.
        json: Print one JSON document on stdout.
    """
    from vitrail.benchmark import benchmark as measure

    console = Console(highlight=False, soft_wrap=True)
    quiet = Console(stderr=True, highlight=False, soft_wrap=True)
    speed = measure(model, batch_size=batch_size, precision=precision, tell=lambda what: quiet.print(f"{what} ..."))
    if json:
        return print_json(speed.to_json())
    console.print(f"{speed.device}, {speed.threads} threads, {speed.precision}, {speed.batch_size} pictures at a time")
    limits = Table("limit", Column("per second", justify="right"), box=None, padding=(0, 2, 0, 0))
    for name, timing in speed.limits.matmul.items():
        limits.add_row(f"matrix products in {name}", f"{timing.rate / 1e9:,.0f} GFLOP")
    limits.add_row("copies in memory, read and written", f"{speed.limits.copy.rate / 1e9:,.1f} GB")
    limits.add_row("JPEGs of 500 x 375 decoded, one core", f"{speed.limits.decode.rate:,.0f}")
    console.print(limits, "")
    right = [Column(name, justify="right") for name in ("pictures/s", "spread", "of matrix products", "of timm's rate")]
    rates = Table(model, *right, box=None, padding=(0, 2, 0, 0))
    for name, timing in speed.rates.items():
        share, theirs = speed.share(name), speed.peers.get(name)
        beside = "" if theirs is None else f"{timing.times(theirs):.2f}"
        part = "" if share is None else f"{share:.0%}"
        rates.add_row(name, f"{timing.rate:,.1f}", f"{timing.spread:.0%}", part, beside)
    console.print(rates, "")
    for sentence in speed.words():
        console.print(sentence, markup=False)
    return 0


def _leaderboard(*, json: bool) -> int:
    from vitrail.leaderboard import CHECKS, rows

    board = rows()
    if json:
        return print_json(board)
    for name in dict.fromkeys(row["table"] for row in board):
        columns = ["top-1", "parameters", *CHECKS]
        table = Table(
            Column(name, overflow="fold"),
            *(Column(column, justify="right", no_wrap=True) for column in columns),
            box=None,
            padding=(0, 2, 0, 0),
        )
        for row in (row for row in board if row["table"] == name):
            marks = ("yes" if row["verified"][check] else "-" for check in CHECKS)
            table.add_row(row["system"], row["published"], f"{row['parameters']:,}", *marks)
        Console().print(table, "")
    Console().print("docs/leaderboard.md says what the marks mean; --json names the tests behind them.")
    return 0

"""The verbs that make a model: `demo` and `train`."""

import json as json_module
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from vitrail.cli.console import Console, print_json, two_columns
from vitrail.config.run import RunConfig
from vitrail.errors import UserError


def demo(*, out: Path | None = None, seed: int = 0, json: bool = False) -> int:
    """Train a small ViT on embedded pictures, compare it with logistic regression, write a report.

    Args:
        out: Folder for the run and its report; default: demo, or demo-2 and so on when that exists.
        seed: Of everything random.
        json: Print one JSON document on stdout.
    """
    from vitrail.demo import run_demo
    from vitrail.prediction import top_classes
    from vitrail.training.callbacks import TerminalProgress

    result = run_demo(out or fresh_folder(Path("demo"))[1], seed=seed, callbacks=(TerminalProgress(),))
    metrics, report = result.evaluation.metrics(), result.folder / "report.html"
    if json:
        answer = {"report": str(report), "seconds": round(result.seconds, 1), **metrics, "baseline": result.baseline}
        return print_json(answer)
    console = Console()
    table = Table("picture", "is", "the model says", title="Ten of the test pictures", title_justify="left")
    evaluation, shares = result.evaluation, result.evaluation.probabilities()
    for i in range(0, len(evaluation.names), max(1, len(evaluation.names) // 10)):
        truth = evaluation.labels[int(evaluation.targets[i])]
        guess = ", ".join(f"{label} {share:.0%}" for label, share in top_classes(shares[i], evaluation.labels, 2))
        table.add_row(*map(Text, (evaluation.names[i], truth, guess)))
    console.print(table)
    console.print(
        f"Vision Transformer             {metrics['top1']:.2%} of {len(evaluation.names)} test pictures right"
    )
    console.print(f"{result.baseline['name']}  {result.baseline['top1']:.2%}")
    console.print(f"Took {result.seconds:.0f} s. The report: {report.resolve()}")
    return 0


def train(arguments: Sequence[str]) -> int:
    """Train or fine-tune: `vitrail train PRESET --data PATH`."""
    from vitrail.presets import PRESETS, preset

    if not arguments or arguments[0] in ("-h", "--help"):
        return _list_presets(PRESETS)
    name = arguments[0]
    chosen = preset(name)
    description = f"{chosen.purpose[:1].upper()}{chosen.purpose[1:]}. {chosen.measured}".strip()

    def run(
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = chosen.config,
        json: Annotated[bool, tyro.conf.arg(help="Print one JSON document on stdout.")] = False,
    ) -> int:
        if chosen.needs_init and config.init is None and not config.resume:
            raise UserError(
                f"preset {name!r} starts from pretrained weights: name a model folder or an official ViT .npz with "
                "--init. Without weights at hand, preset 'photos' trains from scratch."
            )
        return _train(replace(config, out=config.out or str(_run_folder(name, config.resume))), json=json)

    return tyro.cli(
        run,
        args=list(arguments[1:]),
        prog=f"vitrail train {name}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _list_presets(presets: dict[str, Any]) -> int:
    console = Console()
    console.print(
        "vitrail train PRESET --data PATH [--out DIR] [--resume] [--init FILE] [--minutes N] ...\n", markup=False
    )
    console.print(two_columns({name: each.purpose for name, each in presets.items()}))
    console.print("\n`vitrail train PRESET --help` lists every setting.", markup=False)
    return 0


def _train(config: RunConfig, *, json: bool) -> int:
    from vitrail.parallel import rank
    from vitrail.runs import train as run
    from vitrail.training.callbacks import TerminalProgress

    result = run(config, callbacks=(TerminalProgress(),))
    if rank() != 0:
        return 0
    stored: dict[str, Any] = json_module.loads((result.folder / "evaluation.json").read_text(encoding="utf-8"))
    if json:
        return print_json({"folder": str(result.folder), "step": result.step, "val": result.val, **stored})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in stored["metrics"].items() if value is not None)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{stored['split']}: {shown}")
    console.print(f"model: {result.folder / 'best'}   report: {result.folder / 'report.html'}")
    return 0


def _run_folder(name: str, resume: bool) -> Path:
    """Return the next of runs/NAME, runs/NAME-2, ..., or, to resume, the last one that exists.

    Raises:
        UserError: When several processes train, which could each count differently.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes train together: name their one folder with --out.")
    folder = Path("runs") / name
    before, fresh = fresh_folder(folder)
    return before if resume else fresh


def fresh_folder(folder: Path) -> tuple[Path, Path]:
    """Return the first of folder, folder-2, folder-3, ... that does not exist, behind the one that precedes it."""
    number, before, fresh = 2, folder, folder
    while fresh.exists():
        before, fresh, number = fresh, folder.with_name(f"{folder.name}-{number}"), number + 1
    return before, fresh

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
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import model_config
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
    name, flags = arguments[0], list(arguments[1:])
    chosen = preset(name)
    description = f"{chosen.purpose[:1].upper()}{chosen.purpose[1:]}. {chosen.measured}".strip()
    start = _with_model(chosen.config, model=_take_out(flags, "--model"), init=_given(flags, "--init"))

    def run(
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = start,
        json: Annotated[bool, tyro.conf.arg(help="Print one JSON document on stdout.")] = False,
    ) -> int:
        if chosen.needs_init and config.init is None and not config.resume:
            raise UserError(
                f"preset {name!r} starts from pretrained weights: name a model folder, a weight file or a model with "
                "weights at hand with --init. Without weights, preset 'photos' trains from scratch."
            )
        return _train(replace(config, out=config.out or str(_run_folder(name, config.resume))), json=json)

    return tyro.cli(
        run,
        args=flags,
        prog=f"vitrail train {name}",
        description=f"{description} --model NAME puts a model of `vitrail models` in place of the preset's.",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _with_model(config: RunConfig, *, model: str | None, init: str | None) -> RunConfig:
    """Return a preset's settings with the model that `--model` or `--init` brings, for `--model.*` to refine.

    The preset's picture size, and what else it says of its model, was chosen for its own weights: others come with
    what they were made with. Only whether statistics are frozen is about learning, and stays as the preset has it.

    Raises:
        UserError: When both bring a model, or there is none of that name.
    """
    if model is not None:
        if (weights := init or config.init) not in (None, "None"):
            raise UserError(
                f"--model {model} is a model to train from scratch, but this run starts from {weights}, which brings "
                "its own. Leave --model out, or take a preset without weights, such as 'photos'."
            )
        return replace(config, model=model_config(model, channels=config.model.channels))
    if config.init is not None and init not in (None, "None", config.init):
        from vitrail.checkpoints import load_model

        theirs = load_model(init).config
        if isinstance(theirs, EfficientNetConfig) and isinstance(config.model, EfficientNetConfig):
            theirs = replace(theirs, frozen_norm=config.model.frozen_norm)
        return replace(config, model=theirs)
    return config


def _given(flags: Sequence[str], name: str) -> str | None:
    """Return the value of a flag, the last where it stands several times."""
    return _take_out(list(flags), name)


def _take_out(flags: list[str], name: str) -> str | None:
    """Remove a flag, `--name value` or `--name=value`, and return its value, the last where it stands several times."""
    value = None
    for i in reversed(range(len(flags))):
        key, equals, behind = flags[i].partition("=")
        if key != name:
            continue
        if not equals and (i + 1 == len(flags) or flags[i + 1].startswith("--")):
            raise UserError(f"{name} needs a value.")
        found = behind if equals else flags[i + 1]
        value = found if value is None else value
        del flags[i : i + 1 if equals else i + 2]
    return value


def _list_presets(presets: dict[str, Any]) -> int:
    console = Console()
    console.print(
        "vitrail train PRESET --data PATH [--out DIR] [--resume] [--init WEIGHTS] [--model NAME] [--minutes N] ...\n",
        markup=False,
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

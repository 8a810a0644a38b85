"""The verbs that make a model: `demo` and `train`."""

import json as json_module
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Column, Table
from rich.text import Text

from vitrail.cli.console import Console, print_json
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import model_config
from vitrail.config.recipes import LossConfig
from vitrail.config.run import RECIPES, RunConfig
from vitrail.errors import UserError, did_you_mean


def demo(*, out: Path | None = None, seed: int = 0, json: bool = False) -> int:
    """Show what pre-training is worth: fine-tune a small ViT on embedded photos, beside two rivals, and report.

    The rivals learn from the same pictures: the same model from scratch, and logistic regression on pixels.

    Args:
        out: Folder for the run and its report; default: demo, or demo-2 and so on when that exists.
        seed: Of everything random.
        json: Print one JSON document on stdout.
    """
    from vitrail.demo import FINE_TUNED, run_demo
    from vitrail.prediction import top_classes
    from vitrail.training.callbacks import TerminalProgress

    result = run_demo(out or fresh_folder(Path("demo"))[1], seed=seed, callbacks=(TerminalProgress(),))
    evaluation, report = result.evaluation, result.folder / "report.html"
    results: list[dict[str, Any]] = [{"name": FINE_TUNED, **evaluation.metrics()}, *result.others]
    if json:
        return print_json({"report": str(report), "seconds": round(result.seconds, 1), "results": results})
    console = Console(highlight=False)
    table = Table("picture", "is", "the model says", title="Ten of the test pictures", title_justify="left")
    shares = evaluation.probabilities()
    for i in range(0, len(evaluation), max(1, len(evaluation) // 10)):
        truth = evaluation.labels[int(evaluation.targets[i])]
        guess = ", ".join(f"{label} {share:.0%}" for label, share in top_classes(shares[i], evaluation.labels, 2))
        table.add_row(*map(Text, (evaluation.names[i], truth, guess)))
    console.print(table)
    table = Table(
        "", Column("right", justify="right"), title=f"Of {len(evaluation)} test pictures", title_justify="left"
    )
    for each in results:
        table.add_row(Text(each["name"]), f"{each['top1']:.1%}")
    console.print(table)
    console.print(f"Took {result.seconds:.0f} s. The report: {report.resolve()}", soft_wrap=True, markup=False)
    return 0


def train(arguments: Sequence[str]) -> int:
    """Train or fine-tune: `vitrail train PRESET --data PATH`."""
    from vitrail.cli.presets import list_presets, show_preset
    from vitrail.presets import PRESETS, preset_name

    if not arguments or arguments[0].startswith("-"):
        return list_presets(arguments)
    name, flags = preset_name(arguments[0]), list(arguments[1:])
    chosen = PRESETS[name]
    start = _with_recipe(chosen.config, _take_out(flags, "--recipe"))
    start = _with_model(start, model=_take_out(flags, "--model"), init=_given(flags, "--init"))

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

    if {"-h", "--help"} & {*flags}:
        show_preset(name)  # tyro would not wrap it
    return tyro.cli(
        run,
        args=flags,
        prog=f"vitrail train {name}",
        description="",
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


def _with_recipe(config: RunConfig, name: str | None) -> RunConfig:
    """Return a preset's settings with the recipe that `--recipe` names, for `--recipe.*` to refine.

    What both recipes have from `LossConfig` stays as the preset has it, and so does its own recipe, when it is named.

    Raises:
        UserError: When there is none of that name.
    """
    if name is None:
        return config
    if name not in RECIPES:
        raise UserError(
            f"there is no recipe named {name!r}.{did_you_mean(name, RECIPES)} There are {', '.join(RECIPES)}."
        )
    kind = RECIPES[name]
    if isinstance(config.recipe, kind):
        return config
    shared = fields(LossConfig) if isinstance(config.recipe, LossConfig) and issubclass(kind, LossConfig) else ()
    return replace(config, recipe=kind(**{field.name: getattr(config.recipe, field.name) for field in shared}))


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

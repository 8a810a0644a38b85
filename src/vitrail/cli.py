"""The command line: one small function per verb. Anything heavy is imported inside the verb that needs it.

Exit codes: 0 done; 1 a bug of ours; 2 a mistake the user can mend; 3 done, but some pictures could not be read or
the check found errors; 130 and 143 stopped by SIGINT or SIGTERM after saving.
"""

import errno
import json as json_module
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import Positional

import vitrail
from vitrail.config.run import RunConfig
from vitrail.errors import Interrupted, UserError, did_you_mean

if TYPE_CHECKING:
    from vitrail.metrics import Evaluation

Metrics = dict[str, Any]
Model = Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
Data = Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]


class Console(RichConsole):
    """A console whose reader may go away: `main` ends the program then, not Rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


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

    result = run_demo(out or _fresh_folder(Path("demo"))[1], seed=seed, callbacks=(TerminalProgress(),))
    metrics, report = result.evaluation.metrics(), result.folder / "report.html"
    if json:
        answer = {"report": str(report), "seconds": round(result.seconds, 1), **metrics, "baseline": result.baseline}
        return _print_json(answer)
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


def evaluate(model: Model, data: Data, *, split: str | None = None, json: bool = False) -> int:
    """Measure a model on labelled pictures: top-1, top-5, macro-F1, calibration, per class.

    Args:
        model: Model folder or weight file.
        data: Folder of pictures, CSV manifest, CIFAR or IDX folder, .npz, or fashion-mnist (embedded).
        split: Part to evaluate: train, val or test; default: test where there is one, else val.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.evaluation import evaluate as measure
    from vitrail.parallel import pick_device

    evaluation = measure(load_model(model), data, split=split, device=pick_device())
    metrics = evaluation.metrics()
    broken = [{"name": name, "reason": reason} for name, reason in evaluation.broken]
    if json:
        _print_json(
            {**metrics, "pictures": len(evaluation.names), "per_class": evaluation.per_class(), "broken": broken}
        )
    else:
        _print_evaluation(evaluation, metrics)
    return 3 if broken else 0


def predict(
    model: Model,
    images: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE ...")]],
    *,
    top: int = 5,
    out: Path | None = None,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Classify pictures: files, folders or globs.

    Args:
        model: Model folder or weight file.
        images: Pictures, folders, globs.
        top: Classes per picture.
        out: Write to this .csv or .jsonl file instead of the terminal.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.parallel import pick_device
    from vitrail.prediction import predict as classify
    from vitrail.prediction import require_suffix, write_predictions

    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}.")
    _require_workers(workers)
    if out is not None:
        require_suffix(out)  # before the work, not after it
    predictions = classify(load_model(model).to(pick_device()), images, top=top, workers=workers)
    if out is not None:
        write_predictions(predictions, out)
    if json:
        _print_json([p.to_json() for p in predictions])
    elif out is None:
        # Names fold where they must: one that is cut short names no file. They are no markup either.
        table = Table(Column("picture", overflow="fold"), "classes, likeliest first")
        for p in predictions:
            answer = ", ".join(f"{label} {share:.1%}" for label, share in p.labels) or f"skipped: {p.problem}"
            table.add_row(Text(p.name), Text(answer))
        Console().print(table)
    return 3 if any(p.problem for p in predictions) else 0


def models(
    name: Positional[Annotated[str | None, tyro.conf.arg(metavar="[NAME]")]] = None, *, json: bool = False
) -> int:
    """List the published sizes, or show one.

    Args:
        name: A model name or leaderboard alias; all when left out.
        json: Print one JSON document on stdout.
    """
    from vitrail.zoo import describe

    rows = [describe(each) for each in ([name] if name else vitrail.list_models())]
    if json:
        return _print_json(rows)
    heads = ("model", "parameters", "input", "patch", "width", "depth", "heads", "pool")
    table = Table(*(Column(head, overflow="fold") for head in heads), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)
    return 0


def check(data: Data, *, workers: int = 2, json: bool = False) -> int:
    """Tell what is wrong with a data set: broken pictures, duplicates, leakage, imbalance, odd formats.

    Args:
        data: Folder of pictures, CSV manifest, CIFAR or IDX folder, or .npz.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.check import check as inspect
    from vitrail.check import print_report

    _require_workers(workers)
    report = inspect(data, workers=workers)
    if json:
        _print_json(report.to_json())
    else:
        print_report(report, Console())
    return 0 if report.ok else 3


def compare(
    runs: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...")]],
    *,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare runs: results, settings that differ, curves.

    Args:
        runs: Run folders.
        out: Write a page with the curves to this .html file.
        json: Print one JSON document on stdout.
    """
    from vitrail.compare import compare as put_side_by_side
    from vitrail.compare import print_comparison, write_page

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the page is written as .html; choose this suffix.")
    comparison = put_side_by_side(runs)
    if out is not None:
        write_page(comparison, out)
    if json:
        return _print_json(comparison.to_json())
    print_comparison(comparison, Console())
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "models": models,
    "check": check,
    "compare": compare,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    handler = RichHandler(console=errors, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("vitrail").setLevel(logging.INFO)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a reader that is gone, or a full disk, shows here and not while Python shuts down
        return code
    except UserError as mistake:
        errors.print(f"vitrail: {mistake}", markup=False)
        return 2
    except Interrupted as stop:
        errors.print(f"vitrail: {stop}. Continue with --resume.", markup=False)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`vitrail models | head`); nothing is wrong.
        _drop_output()
        return 0
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            where = problem.filename or "the output"
            errors.print(f"vitrail: {where}: {problem.strerror}. Make room and run it again.", markup=False)
            return 2
        if problem.filename is None:
            raise
        errors.print(
            f"vitrail: {problem.filename}: {problem.strerror}. Check the path and its permissions.", markup=False
        )
        return 2


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print_help()
    if arguments[0] == "--version":
        print(f"vitrail {vitrail.__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}.{did_you_mean(verb, VERBS)} `vitrail --help` lists them.")
    if verb == "train":
        return train(rest)
    return tyro.cli(VERBS[verb], args=rest, prog=f"vitrail {verb}", config=(tyro.conf.FlagCreatePairsOff,))


def _print_help() -> int:
    console = Console()
    console.print(f"vitrail {vitrail.__version__}: Vision Transformers to train, evaluate and explain.\n")
    console.print(_two_columns({name: (verb.__doc__ or "").partition("\n")[0] for name, verb in VERBS.items()}))
    console.print("\n`vitrail VERB --help` tells more. Try `vitrail demo`.", markup=False)
    return 0


def _list_presets(presets: dict[str, Any]) -> int:
    console = Console()
    console.print(
        "vitrail train PRESET --data PATH [--out DIR] [--resume] [--init FILE] [--minutes N] ...\n", markup=False
    )
    console.print(_two_columns({name: each.purpose for name, each in presets.items()}))
    console.print("\n`vitrail train PRESET --help` lists every setting.", markup=False)
    return 0


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _train(config: RunConfig, *, json: bool) -> int:
    from vitrail.parallel import rank
    from vitrail.runs import train as run
    from vitrail.training.callbacks import TerminalProgress

    result = run(config, callbacks=(TerminalProgress(),))
    if rank() != 0:
        return 0
    stored: Metrics = json_module.loads((result.folder / "evaluation.json").read_text(encoding="utf-8"))
    if json:
        return _print_json({"folder": str(result.folder), "step": result.step, "val": result.val, **stored})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in stored["metrics"].items() if value is not None)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{stored['split']}: {shown}")
    console.print(f"model: {result.folder / 'best'}   report: {result.folder / 'report.html'}")
    return 0


def _print_evaluation(evaluation: "Evaluation", metrics: Metrics) -> None:
    console = Console()
    summary = Table("measure", "value")
    for name, value in metrics.items():
        summary.add_row(name, "-" if value is None else f"{value:.4f}")
    console.print(summary)
    rows = evaluation.per_class()
    table = Table(*rows[0])
    for row in rows:
        cells = ("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*map(Text, cells))
    console.print(table)
    for name, reason in evaluation.broken:
        console.print(f"skipped {name}: {reason}", markup=False)


def _print_json(value: object) -> int:
    print(json_module.dumps(value, indent=1))
    return 0


def _require_workers(workers: int) -> None:
    if workers < 0:
        raise UserError(f"--workers must not be negative, not {workers}.")


def _drop_output() -> None:
    """Let what is still to be written go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run_folder(name: str, resume: bool) -> Path:
    """Return the next of runs/NAME, runs/NAME-2, ..., or, to resume, the last one that exists.

    Raises:
        UserError: When several processes train, which could each count differently.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes train together: name their one folder with --out.")
    folder = Path("runs") / name
    before, fresh = _fresh_folder(folder)
    return before if resume else fresh


def _fresh_folder(folder: Path) -> tuple[Path, Path]:
    """Return the first of folder, folder-2, folder-3, ... that does not exist, behind the one that precedes it."""
    number, before, fresh = 2, folder, folder
    while fresh.exists():
        before, fresh, number = fresh, folder.with_name(f"{folder.name}-{number}"), number + 1
    return before, fresh

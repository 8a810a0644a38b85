"""The command line: one small function per verb. Anything heavy is imported inside the verb that needs it.

Exit codes: 0 done; 1 a bug of ours; 2 a mistake the user can mend; 3 done, but some pictures could not be read or
the check found errors; 4 an exported file does not answer as the model does and was not kept; 130 and 143 stopped by
SIGINT or SIGTERM after saving.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

import tyro
from rich.logging import RichHandler

import vitrail
from vitrail.cli.console import Console, two_columns
from vitrail.cli.explaining import explain
from vitrail.cli.exporting import export
from vitrail.cli.models import benchmark, convert, models
from vitrail.cli.pictures import check, compare, evaluate, predict
from vitrail.cli.planning import plan
from vitrail.cli.probing import embed, probe
from vitrail.cli.serving import serve
from vitrail.cli.training import demo, train
from vitrail.errors import Interrupted, UserError, did_you_mean

__all__ = ["VERBS", "main"]

VERBS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "probe": probe,
    "explain": explain,
    "export": export,
    "serve": serve,
    "models": models,
    "plan": plan,
    "convert": convert,
    "check": check,
    "compare": compare,
    "benchmark": benchmark,
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
    console.print(two_columns({name: (verb.__doc__ or "").partition("\n")[0] for name, verb in VERBS.items()}))
    console.print("\n`vitrail VERB --help` tells more. Try `vitrail demo`.", markup=False)
    return 0


def _drop_output() -> None:
    """Let what is still to be written go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

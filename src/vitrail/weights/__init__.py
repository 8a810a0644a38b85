"""Weights that come with Vitrail: one model folder per name, in half precision. Found and described without torch.

`benchmarks/make_weights.py` makes a folder of a finished run; nothing else has to name it.
"""

import json
from pathlib import Path

from vitrail.config.codec import from_json
from vitrail.config.model import ModelConfig
from vitrail.errors import UserError

FOLDER = Path(__file__).parent
"""Holds the model folders."""
MINI = "vitrail-mini"
"""The weights that the demo starts from."""


def weights_at_hand() -> dict[str, Path]:
    """Return the model folders that come with Vitrail, by name."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/config.json"))}


def config_at_hand(name: str) -> ModelConfig:
    """Return the configuration of a model that comes with Vitrail.

    Raises:
        UserError: When there is none of that name, or its folder is damaged.
    """
    folder = weights_at_hand().get(name)
    if folder is None:
        raise UserError(f"the weights of {name} are missing; install vitrail again.")
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}); install vitrail again.") from error
    return from_json(ModelConfig, document, "model")

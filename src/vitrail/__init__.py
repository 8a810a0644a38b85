"""Vitrail: the Vision Transformer, and the systems it competed with, to train, evaluate, explain and ship."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Imported at first use: `import vitrail` and `vitrail --help` must not wait for torch.
_HOMES = {
    "list_models": "vitrail.config.model",
    "create_model": "vitrail.models",
    "ImageModel": "vitrail.models",
    "load_model": "vitrail.checkpoints",
    "save_model": "vitrail.checkpoints",
    "train": "vitrail.runs",
    "evaluate": "vitrail.evaluation",
    "predict": "vitrail.prediction",
    "embed": "vitrail.embedding",
    "explain": "vitrail.explaining",
    "export": "vitrail.exporting",
    "RunConfig": "vitrail.config.run",
    "UserError": "vitrail.errors",
}

if TYPE_CHECKING:
    from vitrail.checkpoints import load_model, save_model
    from vitrail.config.model import list_models
    from vitrail.config.run import RunConfig
    from vitrail.embedding import embed
    from vitrail.errors import UserError
    from vitrail.evaluation import evaluate
    from vitrail.explaining import explain
    from vitrail.exporting import export
    from vitrail.models import ImageModel, create_model
    from vitrail.prediction import predict
    from vitrail.runs import train

__all__ = [
    "ImageModel",
    "RunConfig",
    "UserError",
    "create_model",
    "embed",
    "evaluate",
    "explain",
    "export",
    "list_models",
    "load_model",
    "predict",
    "save_model",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""From the state of a run to the model that the run would ship at that step."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.checkpoints.folder import described
from vitrail.checkpoints.resume import TREE, load_latest, read_tree, steps
from vitrail.checkpoints.storage import MANIFEST, standing, verify
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.sharding import read


class Consolidated(NamedTuple):
    """What a checkpoint makes a model folder of."""

    model: ImageModel
    document: dict[str, Any]
    """What the run says of the model, as a model folder's `config.json` does."""
    step: int


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint of a run, or a folder of them."""
    place = standing(path)
    return ((place / TREE).is_file() and (place / MANIFEST).is_file()) or bool(steps(path))


def load_checkpoint(path: Path) -> Consolidated:
    """Return the model of a checkpoint, in evaluation mode, with the weights that are shipped: the average, if any.

    No more is read into memory than these weights, in however many parts they lie on the disk.

    Args:
        path: One checkpoint, or a folder of them, of which the newest good one is taken.

    Raises:
        UserError: When the checkpoint is damaged, or is of a vitrail that did not yet describe the model there.
    """
    if steps(path):
        found = load_latest(path, lazily=True)
        assert found is not None  # as there are steps
        tree, path = found
    else:
        verify(standing(path))
        tree = read_tree(standing(path))
    if "shipped" not in tree:
        raise UserError(
            f"{path} is of an older vitrail, which did not describe the model there. Go on with its run by --resume: "
            "the next checkpoint will do, and so will the run's model folders best and last."
        )
    *keys, prefix = tree["shipped"]["part"]
    weights = tree["learner"]
    for key in keys:
        weights = weights[key]
    state: dict[str, Tensor] = {
        name.removeprefix(prefix): read(tensor) for name, tensor in weights.items() if name.startswith(prefix)
    }
    document = tree["shipped"]["document"]
    return Consolidated(described(document, state, path), document, tree["step"])

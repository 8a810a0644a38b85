"""Weights on disk: model folders, official files of others, and the state of a run."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vitrail.checkpoints.adapt import adapt, check_overrides, with_overrides
from vitrail.checkpoints.consolidate import is_checkpoint, load_checkpoint
from vitrail.checkpoints.folder import CARD, CONFIG, WEIGHTS, load_folder, read_config, save_model
from vitrail.checkpoints.foreign import (
    CONVENTIONS,
    SUFFIXES,
    from_arrays,
    names_for,
    read_arrays,
    require_written,
    to_arrays,
    untold,
    write_arrays,
)
from vitrail.checkpoints.hub import fetch_model_files, is_hub_source, load_from_hub
from vitrail.checkpoints.hub_push import push_folder, require_destination
from vitrail.checkpoints.packages import PACKAGES, load_packaged
from vitrail.checkpoints.storage import standing
from vitrail.config.model import ALIASES, model_config
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.weights import weights_at_hand

__all__ = [
    "CONVENTIONS",
    "adapt",
    "convert",
    "export_names",
    "load_folder",
    "load_model",
    "save_model",
    "training_data",
]

_log = logging.getLogger("vitrail")


def load_model(
    source: str | Path, *, allow_pickle: bool = False, offline: bool = False, **overrides: Any
) -> ImageModel:
    """Return a model with its weights, in evaluation mode. Official files need no name: all is read off the arrays.

    Args:
        source: A model folder; a checkpoint of a run, or the folder of its checkpoints, of which the newest is taken,
            with the weights that the run would ship; a weight file of `CONVENTIONS` (`.npz`, `.safetensors`, a PyTorch
            file, the `.index` of a V-MoE checkpoint); the name of a model whose weights came with Vitrail
            ("vitrail-mini") or with a package ("efficientnet-lite0"); or, downloaded once,
            `hf:OWNER/NAME[@REVISION]` and `timm:NAME[@REVISION]` of the Hugging Face hub.
        allow_pickle: Whether a PyTorch file may be read; nothing in it is executed.
        offline: Take `hf:` and `timm:` models from the cache alone.
        **overrides: What the file cannot tell, or is to be another way. `image_size=`, with
            `position_resize="official"|"timm"|"timm-npz"|"hf"`, `num_classes=` and `channels=` bring other tensors (see
            `adapt`); any other setting of the model may be given as long as it changes none: `gelu=`, `heads=`,
            `experts_per_token=`, `capacity_factor=`, `batch_priority=`, `group_size=`, `drop_path=`, ...

    Raises:
        UserError: When there is no such source, it is damaged, or an override is unknown.
    """
    check_overrides(overrides)
    if is_hub_source(source):
        return load_from_hub(str(source), overrides, offline=offline, allow_pickle=allow_pickle)
    path = Path(source)
    if is_checkpoint(path):
        return with_overrides(load_checkpoint(path).model, overrides)
    if standing(path).is_dir():
        return load_folder(path, **overrides)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return load_folder(path.parent, **overrides)
    if path.is_file():
        return with_overrides(
            from_arrays(read_arrays(path, allow_pickle=allow_pickle), overrides, str(path)), overrides
        )
    if folder := weights_at_hand().get(str(source)):
        return load_folder(folder, **overrides)
    name = ALIASES.get(str(source), str(source))
    if name in PACKAGES:
        return with_overrides(load_packaged(name), overrides)
    raise UserError(_why_not(str(source)))


def training_data(source: str | Path) -> str | None:
    """Return the hash of the data that a model was trained on, None where its source does not tell.

    Args:
        source: As `load_model` takes it, loaded before if it is on the hub.
    """
    try:
        hub = fetch_model_files(str(source), offline=True) if is_hub_source(source) else None
        folder = hub.config.parent if hub else _own_folder(source)
        facts = folder and read_config(folder).get("data")
    except UserError:  # the files of others say nothing of it
        return None
    return facts.get("fingerprint") if isinstance(facts, dict) else None


def export_names(model: ImageModel, path: str | Path, names: str | None = None) -> str:
    """Write a model's weights under foreign names; reading the file gives the same weights, bit for bit.

    Args:
        model: The model. What arrays cannot hold, as labels and preprocessing, is left behind.
        path: The file to write: `.npz`, `.safetensors`, `.pth`, or the `.index` of a V-MoE checkpoint.
        names: One of `CONVENTIONS`: "vit", "big-vision", "vmoe", "timm", "hf", ...; None takes those that leave the
            least untold about such a model.

    Returns:
        The names it was written under.

    Raises:
        UserError: When the names are unknown or have no place for such a model, or the file cannot be written.
    """
    path = Path(path)
    require_written(path)
    names = names or names_for(model)
    arrays = to_arrays(model, names)
    for setting, value in untold(model, arrays).items():
        _log.warning("%s cannot say that the model has %s=%r; tell whoever loads it.", path, setting, value)
    write_arrays(path, arrays)
    return names


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    names: str | None = None,
    allow_pickle: bool = False,
    offline: bool = False,
    public: bool = False,
    license: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Bring weights from one form to another: from any source of `load_model` to a model folder or foreign file.

    A checkpoint becomes the model that its run would have shipped there, with the run's settings.

    Args:
        source: As `load_model` takes it.
        dest: A folder; a file, whose suffix says its format, as `export_names` writes it; or `hf:OWNER/NAME`, to send a
            model folder to the Hugging Face hub, with the metrics, the recipe and the card that the source has.
        names: Names to write a file under; None takes those that leave the least untold about such a model.
        allow_pickle: As in `load_model`.
        offline: As in `load_model`.
        public: On the hub, whether everybody may have the model. A new repository is private otherwise.
        license: On the hub, the licence for its card: an identifier such as `apache-2.0`.
        **overrides: As in `load_model`.

    Returns:
        What was made of what, with the SHA-256 of a source that is a file, or comes from the hub; for the hub, also
        `page`, `commit` and `visibility`.

    Raises:
        UserError: When the source cannot be read, or the destination not written.
    """
    to_hub = is_hub_source(dest)
    to_file = not to_hub and (Path(dest).suffix in SUFFIXES or names is not None)
    if to_hub:
        require_destination(str(dest))
        if names is not None:
            raise UserError(f"to {dest} goes a Vitrail folder, which has names of its own; leave --names out.")
    elif public or license is not None:
        raise UserError(f"--public and --license are for hf:OWNER/NAME, not for {dest}.")
    if to_file:
        require_written(Path(dest))
    if not is_hub_source(source) and is_checkpoint(Path(source)):
        found = load_checkpoint(Path(source))
        model = with_overrides(found.model, overrides)
        facts: dict[str, Any] = {"source": str(source), "step": found.step}
        origin = {name: found.document[name] for name in ("recipe", "data")}
    else:
        model = load_model(source, allow_pickle=allow_pickle, offline=offline, **overrides)
        facts = _facts_of(source, allow_pickle)
        origin = {"recipe": {"converted": dict(facts)}}
    written: dict[str, Any] = {"written": str(dest)}
    if to_hub:
        with _as_folder(model, source, origin, changed=bool(overrides)) as folder:
            written = push_folder(folder, str(dest), public=public, license=license)
    elif to_file:
        facts["names"] = export_names(model, dest, names)
    else:
        save_model(model, dest, recipe=origin["recipe"], data=origin.get("data"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**facts, "model": type(model).__name__, "parameters": parameters, **written}


def _facts_of(source: str | Path, allow_pickle: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"source": str(source)}
    if is_hub_source(source):  # it is in the cache by now
        files = fetch_model_files(str(source), offline=True, allow_pickle=allow_pickle)
        facts |= {"commit": files.commit, "sha256": ", ".join(files.sha256.values())}
    elif Path(source).is_file():
        with open(source, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts


@contextmanager
def _as_folder(model: ImageModel, source: str | Path, origin: dict[str, Any], *, changed: bool) -> Iterator[Path]:
    """Give a model folder: the source's own, or one that is made of what was read and goes afterwards."""
    folder = _own_folder(source)
    if folder is not None and not changed and (folder / CARD).is_file():
        yield folder
        return
    with TemporaryDirectory() as place:
        save_model(model, Path(place) / "model", **origin)
        yield Path(place) / "model"


def _own_folder(source: str | Path) -> Path | None:
    """Return the model folder that a local source is, None where it is something else."""
    path = Path(source)
    folder = weights_at_hand().get(str(source), path.parent if path.name == WEIGHTS else path)
    return folder if (folder / CONFIG).is_file() else None


def _why_not(source: str) -> str:
    known = (
        f"vitrail loads model folders, checkpoints of runs, weight files ({', '.join(SUFFIXES)}), the models "
        f"{', '.join([*weights_at_hand(), *PACKAGES])}, "
        "and hf:OWNER/NAME or timm:NAME from the hub"
    )
    try:
        model_config(source)
    except UserError:
        return f"there is no file or folder {source}; {known}."
    name = ALIASES.get(source, source)
    return (
        f"there are no weights at hand for {source!r}: give the path of a file with them, "
        f"or take fresh weights with create_model({name!r})."
    )

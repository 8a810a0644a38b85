"""Weights from the Hugging Face hub: `hf:OWNER/NAME` and `timm:NAME`, which is `timm/NAME` there.

What lies in the hub's cache is used without a request, so that the same source gives the same weights with a network
and without one. The hub is asked when something is missing; then all files are of one commit. A later commit is named
(`hf:OWNER/NAME@COMMIT`), or fetched after the repository has been deleted from the cache.

Only the files that are needed are fetched. The hub names large files by their sha256; that is checked on every load.
"""

import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from vitrail.checkpoints.adapt import with_overrides
from vitrail.checkpoints.documents import Document
from vitrail.checkpoints.folder import load_folder
from vitrail.checkpoints.foreign import from_arrays, read_arrays
from vitrail.checkpoints.hub_config import ForeignSettings, foreign_settings, origin_of
from vitrail.errors import UserError
from vitrail.models import ImageModel

PREFIXES = {"hf:": "", "timm:": "timm/"}
"""How sources on the hub begin, and the owner of names without one."""
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

TIMEOUT = 10.0
"""Seconds without an answer after which the hub counts as out of reach."""
SHAPES = ("image_size", "num_classes", "channels", "position_resize")
"""Keywords of `load_model` that bring other tensors, hence say nothing of the weights in the repository."""

_log = logging.getLogger("vitrail")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFiles:
    """The files of one commit of a repository, in the hub's cache."""

    source: str
    """As it was asked for: `hf:OWNER/NAME@REVISION`."""
    commit: str
    """Hash of the commit that all files are of."""
    config: Path
    """The `config.json`; the other files stand beside it."""
    preprocessor: Path | None
    """The `preprocessor_config.json`, where there is one."""
    weights: tuple[Path, ...]
    """One file, or the shards of the weights."""
    sha256: Mapping[str, str]
    """Of every file of weights, by its name."""


class Repository(NamedTuple):
    """A repository on the hub, at a branch, tag or commit."""

    source: str
    name: str
    revision: str


class _Place(ABC):
    """Where files come from."""

    @abstractmethod
    def find(self, repository: Repository, name: str, revision: str) -> Path | None:
        """Return the path of a file, None when the repository has no such file."""

    @abstractmethod
    def sha256(self, repository: Repository, path: Path, revision: str) -> str | None:
        """Return the hash that the hub has for a file, None when it has none."""


class _NotCachedError(Exception):
    """The cache does not know a file, nor that there is none."""


def is_hub_source(source: object) -> bool:
    """Return whether a source is one of the hub's."""
    return isinstance(source, str) and source.startswith(tuple(PREFIXES))


def load_from_hub(
    source: str, overrides: Mapping[str, Any], *, offline: bool = False, allow_pickle: bool = False
) -> ImageModel:
    """Return the model of a repository, in evaluation mode.

    Args:
        source: `hf:OWNER/NAME` or `timm:NAME`, with `@REVISION` when it is not to be the branch `main`.
        overrides: The keywords of `load_model`. They beat what the repository says.
        offline: Take only what the cache has.
        allow_pickle: Whether a PyTorch file may be read where there is no other.

    Raises:
        UserError: When the files cannot be had or are no model that vitrail knows.
    """
    return load_files(fetch_model_files(source, offline=offline, allow_pickle=allow_pickle), overrides)


def load_files(files: HubFiles, overrides: Mapping[str, Any]) -> ImageModel:
    """Return the model of files that have been fetched, as `load_from_hub` does."""
    source = files.source
    if origin_of(Document.read(files.config), source) == "vitrail":
        return load_folder(files.config.parent, **overrides)
    settings = foreign_settings(files.config, files.preprocessor, source)
    said = {**settings.overrides, **{key: value for key, value in overrides.items() if key not in SHAPES}}
    view = settings.preprocessing
    model = from_arrays(read_weights(files), {"image_size": view and view.image_size, **said}, source)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        described = with_overrides(model, said)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if {name: tensor.shape for name, tensor in described.state_dict().items()} != shapes:
        raise UserError(
            f"{files.config} speaks of pictures of {described.config.image_size}, but the weights beside it are made "
            f"for {model.config.image_size}; load the file of weights itself, or tell the owner of {source}."
        )
    _describe(described, settings, files)
    evaluated = {"image_size": view.image_size} if view else {}
    return with_overrides(described, {**evaluated, **overrides})


def _describe(model: ImageModel, settings: ForeignSettings, files: HubFiles) -> None:
    config = model.config
    if settings.preprocessing is not None:
        model.preprocessing = replace(settings.preprocessing, image_size=config.image_size, channels=config.channels)
    if settings.labels and config.num_classes:
        if len(settings.labels) != config.num_classes:
            raise UserError(
                f"{files.config} names {len(settings.labels)} classes, but the weights beside it have "
                f"{config.num_classes}; load the file of weights itself, or tell the owner of {files.source}."
            )
        model.labels = settings.labels
    model.multi_label = settings.multi_label


def read_weights(files: HubFiles) -> dict[str, np.ndarray]:
    """Return the arrays of a repository under their names, those of all shards together.

    Raises:
        UserError: When a file is damaged, or two hold the same array.
    """
    arrays: dict[str, np.ndarray] = {}
    for path in files.weights:
        part = read_arrays(path, allow_pickle=True)  # a pickle is only here when it was allowed
        if twice := arrays.keys() & part.keys():
            raise UserError(f"{path} holds {min(twice)!r}, which another shard of {files.source} has, too.")
        arrays |= part
    return arrays


def fetch_model_files(source: str, *, offline: bool = False, allow_pickle: bool = False) -> HubFiles:
    """Return the files of a model, from the cache if they are there, else from the hub.

    Args:
        source: `hf:OWNER/NAME` or `timm:NAME`, with `@REVISION` when it is not to be the branch `main`.
        offline: Make no request; the environment variable HF_HUB_OFFLINE=1 says so, too.
        allow_pickle: Whether `pytorch_model.bin` will do where there are no safetensors.

    Raises:
        UserError: When the source is malformed, or its files cannot be had, are of a model that vitrail does not
            have, or have another hash than the hub says.
    """
    repository = parse_source(source)
    try:
        from huggingface_hub import constants, is_offline_mode
    except ImportError as error:
        raise UserError(
            f"{source} lies on the Hugging Face hub, and what downloads from there is not installed: "
            "pip install 'vitrail[hub]'"
        ) from error
    # Read at every request; the environment variable counts only at the library's first import.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        return _collect(repository, _Cache(), allow_pickle)
    except _NotCachedError as missing:
        if offline or is_offline_mode():
            raise UserError(
                f"{missing} of {source} is not in the cache ({constants.HF_HUB_CACHE}), and vitrail is to stay "
                "offline; load it once with a network, without --offline (offline=True) and HF_HUB_OFFLINE."
            ) from missing
    # One try with one timeout. The download itself tries for minutes, which is right only once the hub answers.
    _head(repository, CONFIG, repository.revision)
    return _collect(repository, _Hub(), allow_pickle)


def parse_source(source: str) -> Repository:
    """Return what a source stands for.

    Raises:
        UserError: When it is malformed.
    """
    prefix = next(prefix for prefix in PREFIXES if source.startswith(prefix))
    name, at, revision = source.removeprefix(prefix).partition("@")
    if "/" not in name:
        name = PREFIXES[prefix] + name
    part = r"\w[\w.-]*"
    if not re.fullmatch(rf"({part}/)?{part}", name, re.ASCII) or "--" in name or ".." in name + revision:
        raise UserError(
            f"{source} is no name on the hub: it must be {prefix}OWNER/NAME, or {prefix}OWNER/NAME@REVISION."
        )
    if at and not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise UserError(f"{source}: after @ belongs a branch, a tag or the hash of a commit.")
    return Repository(source, name, revision or "main")


def _collect(repository: Repository, place: _Place, allow_pickle: bool) -> HubFiles:
    """Return all files of one commit, the weights checked."""
    source = repository.source
    config = place.find(repository, CONFIG, repository.revision)
    if config is None:
        raise UserError(
            f"{source} has no {CONFIG}: it is not a model of transformers or timm, or not one for pictures."
        )
    commit = config.parent.name
    preprocessor = None
    if origin_of(Document.read(config), source) == "transformers":
        preprocessor = place.find(repository, PREPROCESSOR, commit)
    weights = _find_weights(repository, place, commit, allow_pickle)
    digests: dict[str, str] = {}
    for path in weights:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        expected = place.sha256(repository, path, commit)
        if expected not in (None, digest):
            raise UserError(
                f"{path.name} of {source} was damaged on its way or on the disk (its sha256 is {digest}, the hub's "
                f"{expected}); delete {path.resolve()} and try again."
            )
        digests[path.name] = digest
    shown = ", ".join(f"{name} (sha256 {digest})" for name, digest in digests.items())
    _log.info("%s is %s at commit %s: %s", source, repository.name, commit, shown)
    return HubFiles(
        source=source, commit=commit, config=config, preprocessor=preprocessor, weights=weights, sha256=digests
    )


def _find_weights(repository: Repository, place: _Place, commit: str, allow_pickle: bool) -> tuple[Path, ...]:
    """Return the safetensors of a repository, whole or in shards, or else its pickle."""
    source = repository.source
    if whole := place.find(repository, WEIGHTS, commit):
        return (whole,)
    if index := place.find(repository, INDEX, commit):
        shards = Document.read(index).get("weight_map", dict, {}).values()
        if not shards or not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) for name in shards):
            raise UserError(f"{index} does not say which files the weights are in; the repository is damaged.")
        found = {name: place.find(repository, name, commit) for name in sorted(set(shards))}
        if missing := [name for name, path in found.items() if path is None]:
            raise UserError(f"{source} lacks {missing[0]}, which its {INDEX} names.")
        return tuple(path for path in found.values() if path is not None)
    if not allow_pickle:
        raise UserError(
            f"{source} has no safetensors. Its {PICKLE}, if it has one, is a pickle, a kind of file that can carry a "
            "program. Vitrail runs nothing that it finds in one (weights_only=True); if you want it read, say "
            f"allow_pickle=True, or on the command line: vitrail convert {source} FOLDER --allow-pickle"
        )
    if pickle := place.find(repository, PICKLE, commit):
        return (pickle,)
    raise UserError(f"{source} has no weights that vitrail reads: neither {WEIGHTS} nor {INDEX} nor {PICKLE}.")


@final
class _Cache(_Place):
    """What has been fetched before, by whatever program."""

    def find(self, repository: Repository, name: str, revision: str) -> Path | None:
        from huggingface_hub import constants, try_to_load_from_cache

        found = try_to_load_from_cache(repository.name, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
        if found is None:
            raise _NotCachedError(name)
        return Path(found) if isinstance(found, str) else None

    def sha256(self, repository: Repository, path: Path, revision: str) -> str | None:
        # The cache stores a file under the name that the hub gives it and links to it, where the disk knows links.
        return _if_sha256(Path(os.readlink(path)).name) if path.is_symlink() else None


@final
class _Hub(_Place):
    """The hub, for what the cache does not have."""

    def find(self, repository: Repository, name: str, revision: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with _told(repository, name):
            try:
                return Path(hf_hub_download(repository.name, name, revision=revision, etag_timeout=TIMEOUT))
            except RemoteEntryNotFoundError:
                return None

    def sha256(self, repository: Repository, path: Path, revision: str) -> str | None:
        return _if_sha256(_head(repository, path.name, revision))


def _head(repository: Repository, name: str, revision: str) -> str | None:
    """Ask the hub once for a file's tag: the sha256 of a large file, git's hash of a small one; None without a file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with _told(repository, name):
        try:
            return get_hf_file_metadata(hf_hub_url(repository.name, name, revision=revision), timeout=TIMEOUT).etag
        except RemoteEntryNotFoundError:
            return None


def _if_sha256(tag: str | None) -> str | None:
    return tag if tag and re.fullmatch(r"[0-9a-f]{64}", tag) else None


@contextmanager
def _told(repository: Repository, name: str) -> Iterator[None]:
    """Turn what goes wrong while the hub is asked for a file into what to tell a person."""
    try:
        yield
    except Exception as error:  # the library and the two that it downloads with raise dozens of types
        raise UserError(_what_went_wrong(repository, name, error)) from error


def _what_went_wrong(repository: Repository, name: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    source, page = repository.source, f"{constants.ENDPOINT}/{repository.name}"
    match error:
        case errors.GatedRepoError():
            return f"{source} is given only to those who asked: ask at {page}, then log in with `hf auth login`."
        case errors.RepositoryNotFoundError():
            return (
                f"there is no {repository.name} on the hub ({constants.ENDPOINT}), or it is private: check the name, "
                "or log in with `hf auth login`."
            )
        case errors.RevisionNotFoundError():
            return f"{source}: {repository.name} has no revision {repository.revision!r}; see {page}/tree/main."
        case errors.HfHubHTTPError() if (status := error.response.status_code) in (401, 403):
            return f"the hub refuses {name} of {source} (HTTP {status}): log in again with `hf auth login`."
        case errors.HfHubHTTPError():
            return f"the hub answers HTTP {error.response.status_code} for {name} of {source}; try again later."
        case _:
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            return (
                f"{name} of {source} cannot be fetched from {constants.ENDPOINT} ({reason}): check the network and the "
                "space on the disk, and try again."
            )

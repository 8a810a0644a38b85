"""Models to the Hugging Face hub: a model folder's weights, settings and card, in one commit.

Nothing is sent but these three files, and to nobody who was not asked to see them: a new repository is private, and one
that is public already takes a model only when that is said. The token is the one of `hf auth login`; it is never shown.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrail.checkpoints.card import card_of, without_paths
from vitrail.checkpoints.folder import CARD, CONFIG, WEIGHTS, read_config
from vitrail.checkpoints.hub import Repository, parse_source
from vitrail.errors import UserError


def push_folder(folder: Path, dest: str, *, public: bool = False, license: str | None = None) -> dict[str, Any]:
    """Send a model folder to the hub, where `load_model(dest)` finds it. Paths in its settings keep their last part.

    Args:
        folder: A model folder.
        dest: `hf:OWNER/NAME`; made where it is not there yet.
        public: Whether everybody may see it.
        license: Identifier of a licence as the hub has them, such as `apache-2.0`, for the card.

    Returns:
        `written`, `page`, `commit` and `visibility`.

    Raises:
        UserError: When the destination or the licence is malformed, the repository public without `public`, or the hub
            cannot be reached or refuses.
    """
    repository = require_destination(dest)
    document = read_config(folder)
    card = card_of((folder / CARD).read_text(encoding="utf-8"), dest, license)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise UserError(
            f"{dest} lies on the Hugging Face hub, and what uploads there is not installed: pip install 'vitrail[hub]'"
        ) from error
    api, name = HfApi(endpoint=constants.ENDPOINT), repository.name
    if not sys.stderr.isatty():
        disable_progress_bars()
    document |= {"recipe": without_paths(document.get("recipe"))}
    config = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
    with _told(repository):
        try:
            private = bool(api.model_info(name).private)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
            private = not public
        if not private and not public:
            raise UserError(
                f"{dest} is a public repository: say --public (public=True) if everybody may have the model."
            )
        commit = api.create_commit(
            name,
            [
                CommitOperationAdd(CONFIG, config),
                CommitOperationAdd(CARD, card.encode()),
                CommitOperationAdd(WEIGHTS, str(folder / WEIGHTS)),
            ],
            commit_message="Model by vitrail",
        )
    visibility = "private" if private else "public"
    return {"written": dest, "page": f"{constants.ENDPOINT}/{name}", "commit": commit.oid, "visibility": visibility}


def require_destination(dest: str) -> Repository:
    """Return the repository that a model may be sent to.

    Raises:
        UserError: When the name is malformed, or of somebody else's library, or names a revision.
    """
    repository = parse_source(dest)
    if not dest.startswith("hf:") or "/" not in repository.name or "@" in dest:
        raise UserError(f"{dest}: a model is sent to hf:OWNER/NAME.")
    return repository


@contextmanager
def _told(repository: Repository) -> Iterator[None]:
    """Turn what goes wrong into what to tell a person."""
    from huggingface_hub import constants, errors

    place = f"{repository.source} ({constants.ENDPOINT})"
    try:
        yield
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            cure = "log in with `hf auth login`, with a token that may write there"
        else:
            cure = "try again later"
        raise UserError(f"the hub refuses {place} (HTTP {status}): {cure}.") from error
    except Exception as error:  # the library and the two that it sends with raise dozens of types
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"the model cannot be sent to {place} ({reason}): check the network, and try again.") from error

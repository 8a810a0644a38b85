"""Where Vitrail keeps what can be made again: decoded pictures, measured engines."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Return `vitrail` in the user's folder for caches; None where there is no user, as in some containers.

    `XDG_CACHE_HOME` where that is set, else where the system keeps caches.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "vitrail"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    usual = {"win32": Path(os.environ.get("LOCALAPPDATA", home)), "darwin": home / "Library" / "Caches"}
    return usual.get(sys.platform, home / ".cache") / "vitrail"

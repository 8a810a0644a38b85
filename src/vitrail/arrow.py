"""pyarrow, which reads and writes Parquet, where it is installed."""

import importlib
from typing import Any

from vitrail.errors import UserError


def pyarrow(what: object, module: str = "pyarrow") -> Any:
    """Return pyarrow, or a module of it.

    Args:
        what: What needs it: a file.
        module: Its name.

    Raises:
        UserError: When it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise UserError(f"{what} needs pyarrow, not installed: pip install 'vitrail[parquet]'.") from missing

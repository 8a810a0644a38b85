"""Models behind HTTP: `serve` answers until it is asked to stop.

Two processes share the work. The one that faces the network (`server`, `app`, `reading`, `batching`, `supervisor`)
imports no torch and never touches pixels; it reads requests within `limits`, gathers their pictures into batches and
answers. The other one (`worker`) decodes and computes. What crashes, hangs or runs out of memory there costs the batch
that it was at: its requests are told so, and a new process takes over.
"""

from importlib.util import find_spec

from vitrail.errors import UserError

PACKAGES = {
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
}
"""What serving needs beside Vitrail, by the name of the import; the extra `serve` has them."""


def require_packages() -> None:
    """Raise UserError when a package that serving needs is not installed."""
    if lacking := [package for name, package in PACKAGES.items() if find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(lacking)}, not installed: pip install 'vitrail[serve]'.")

"""Reading `.npz` files that may come from anywhere: no pickle, and no more memory than the file justifies."""

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from vitrail.errors import UserError

MAX_ARRAYS = 20_000


def read_npz(path: Path, *, limit: int, advice: str) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` file under their names.

    Sizes are read from the headers and checked before any array is.

    Args:
        path: The file.
        limit: Bytes that it may unpack to.
        advice: What to tell a person whose file is larger.

    Raises:
        UserError: When the file is damaged, holds Python objects, or would unpack to more than `limit`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise UserError(f"{path} holds {len(members):,} arrays; vitrail reads up to {MAX_ARRAYS:,}.")
            declared = sum(_declared_size(archive, member, path) for member in members)
            if declared > limit:
                raise UserError(f"{path} would unpack to {declared:,} bytes, more than the {limit:,} allowed; {advice}")
            arrays = {member.filename.removesuffix(".npy"): _read(archive, member) for member in members}
    except (UserError, MemoryError):
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # zipfile, zlib and numpy's header parser raise a dozen types on damaged files
        raise UserError(f"{path} is damaged or not a .npz file ({error}); fetch it again.") from error
    if len(arrays) < len(members):
        raise UserError(f"{path} holds two arrays of the same name; it is damaged.")
    return arrays


def _declared_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> int:
    """Return the bytes that an array declares, after checking that its header and the archive agree."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(file)
        else:
            raise ValueError(f"unknown version {version} of {member.filename}")
        if dtype.hasobject:
            raise UserError(f"{path}: {member.filename} holds Python objects (pickle), which vitrail never loads.")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or file.tell() + size != member.file_size:
            raise ValueError(f"the header of {member.filename} does not fit its size")
    return size


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return npy.read_array(file, allow_pickle=False)

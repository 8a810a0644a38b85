"""How a picture lies in its file, and what brings it upright: EXIF orientations 1 to 8."""

import struct

from vitrail.data.base import Picture, Resized

ORIENTATION = 0x0112
"""The EXIF tag."""

Edges = tuple[float, float, float, float]
"""Left, top, right, bottom, as Pillow counts."""


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in an EXIF block, 1 to 8; 1 where there is none or the block is damaged.

    Read here, because Pillow's parser reads every tag, warns of damaged ones and turns TIFF by itself.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * entry)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # the block ends early
        pass
    return 1


def lies_across(orientation: int) -> bool:
    """Return whether rows of the stored picture are columns of the upright one."""
    return orientation >= 5


def upright(stored: Picture, orientation: int) -> Resized:
    """Return the stored picture turned, as a view where no pixel has to move."""
    if lies_across(orientation):
        stored = stored.swapaxes(0, 1)
    # What is left are mirrors: which axes of the result run backwards.
    down = orientation in (3, 4, 7, 8)
    across = orientation in (2, 3, 6, 7)
    return stored[:: -1 if down else 1, :: -1 if across else 1]


def stored_edges(box: tuple[float, float, float, float], width: int, height: int, orientation: int) -> Edges:
    """Return where a part of the upright picture (top, left, height, width) lies in the stored one."""
    top, left, rows, columns = box
    across, down = (left, left + columns), (top, top + rows)
    if lies_across(orientation):
        across, down = down, across
    if orientation in (2, 3, 7, 8):
        across = width - across[1], width - across[0]
    if orientation in (3, 4, 6, 7):
        down = height - down[1], height - down[0]
    return across[0], down[0], across[1], down[1]

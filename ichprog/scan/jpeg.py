"""Read the size of compressed pixels, so that no decoder asks for memory for another size than the header's."""

from typing import NamedTuple

_JPEG_2000_START = b"\xff\x4f\xff\x51"  # start of the codestream, then the segment SIZ
_FRAMES = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7}  # segments SOF
_LONGEST_START = 2**20  # bytes before which a stream has to state its size
_MAX_TILES = 2**16 - 1  # of JPEG 2000: the number of a tile has 16 bits


class StoredSize(NamedTuple):
    """Size of a compressed image."""

    rows: int
    columns: int
    components: int


def stored_size(data: bytes) -> StoredSize:
    """Return the size that a JPEG, JPEG-LS or JPEG 2000 stream states.

    Args:
        data: The stream.

    Raises:
        ValueError: The stream states no size, or no allowed one.

    Source:
        ITU-T T.800 annex A.5.1 (SIZ), and ITU-T T.81 annex B.2.2 and T.87 annex C.2.2 (SOF).

    Examples:
        >>> stored_size(bytes.fromhex("ffd8 fff7 000b 10 0200 0100 01 011100"))
        StoredSize(rows=512, columns=256, components=1)
    """
    if not data.startswith(b"\xff\xd8") and (start := data.find(_JPEG_2000_START, 0, _LONGEST_START)) >= 0:
        start += len(_JPEG_2000_START)
        return _size_of_jpeg_2000(data[start : start + 38])
    position = 2  # after the marker SOI
    while position < _LONGEST_START and len(segment := data[position : position + 10]) == 10 and segment[0] == 0xFF:
        if segment[1] in _FRAMES:
            return StoredSize(_number(segment[5:7]), _number(segment[7:9]), segment[9])
        position += 1 if segment[1] == 0xFF else 2 + _number(segment[2:4])
    raise ValueError("the compressed stream states no size")


def _size_of_jpeg_2000(segment: bytes) -> StoredSize:
    columns, rows, left, top, tile_columns, tile_rows, tile_left, tile_top = (
        _number(segment[start : start + 4]) for start in range(4, 36, 4)
    )
    if len(segment) < 38 or not tile_columns or not tile_rows:
        raise ValueError("the compressed stream states no size")
    tiles = -(-(columns - tile_left) // tile_columns) * -(-(rows - tile_top) // tile_rows)
    if not 0 < tiles <= _MAX_TILES:
        raise ValueError(f"the compressed stream has {tiles} tiles, and 1 to {_MAX_TILES} are allowed")
    return StoredSize(rows - top, columns - left, _number(segment[36:38]))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")

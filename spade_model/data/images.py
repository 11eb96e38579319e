"""Reads image files: photographs in RGB or grey, id images as integers. Unusable files raise `DataError`."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from spade_model.data.problem import data_error

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

MAX_PIXELS = 8192 * 8192
"""Larger images are refused: decoding one would take gigabytes (a "decompression bomb")."""

# Pillow's decoders raise any of these exceptions for damaged data.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, ArithmeticError, LookupError, TypeError)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "LA", *WIDE_MODES)
FULL_16 = 2**16 - 1
"""The highest 16-bit level."""

_SAVE_AS = (
    "Save it with 8 bits a channel; 16-bit grey photographs are kept as they are with --output_nc 1 --image_bits 16"
)


def open_image(path: Path) -> Image.Image:
    """Decodes an image file and keeps its mode.

    Raises DataError when the file is missing, empty, not an image of IMAGE_FORMATS, larger than MAX_PIXELS, truncated
    or corrupt, and when it has 16 bits a channel of which Pillow would read only 8.
    """
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise data_error(path, "the file is empty (0 bytes)", "Copy it again or remove it")
        with _opened(path) as image:
            if min(image.size) == 0:
                raise data_error(path, "the image has no pixels", "Copy it again or remove it")
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(path, f"{image.width}x{image.height}")
            _require_all_bits(image, path)
            image.load()
            return image
    except UnidentifiedImageError:
        formats = ", ".join(IMAGE_FORMATS)
        raise data_error(path, f"not a readable {formats} image", "Replace or remove the file") from None
    except _BOMBS as error:
        raise _too_large(path, "so large that its header alone is refused", str(error)) from None
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            what = f"cannot be opened ({error.strerror})"
            raise data_error(path, what, "Check the path and its permissions") from None
        raise data_error(path, f"truncated or corrupt ({error})", "Copy it again or remove it") from None


def read_photograph(path: Path, channels: int = 3, bits: int = 8) -> Image.Image:
    """Reads a file and converts it with `to_photograph`.

    EXIF orientation is ignored, so that photographs match their label images, which have no such tag.

    Raises DataError for the reasons given at `open_image` and `to_photograph`.
    """
    return to_photograph(open_image(path), channels, bits, path)


def to_photograph(image: Image.Image, channels: int, bits: int, path: Path | None = None) -> Image.Image:
    """Converts an image to mode RGB (3 channels) or L (1 channel), or with 16 bits to mode F with levels 0..65535.

    Colours become grey by their luma, and grey becomes RGB with equal channels. With 16 bits, 8-bit levels
    are scaled to the 16-bit range: 255 becomes 65535.

    Raises DataError, naming `path`, for images with more than `bits` bits, for floating-point images, and for levels
    outside 0..65535.
    """
    if image.mode == "F":
        raise data_error(path, "a grey image of floating point numbers (mode F)", _SAVE_AS)
    if image.mode in WIDE_MODES:
        if bits == 8:
            raise data_error(path, f"a grey image of more than 8 bits (mode {image.mode})", _SAVE_AS)
        return Image.fromarray(_levels_of_16_bits(image, path).astype(np.float32))
    if image.mode == "P":
        # A palette with several transparent entries converts to RGB only by way of RGBA.
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if channels == 3:
        return image
    # The luma of three equal channels equals their level exactly.
    grey = image.convert("L")
    return grey if bits == 8 else Image.fromarray(np.asarray(grey, dtype=np.float32) * (FULL_16 // 255))


def read_ids(path: Path) -> np.ndarray:
    """Reads ids exactly as stored, int32 (H, W): grey levels of 1, 8, 16 or 32 bits, or palette indexes.

    Raises DataError for the reasons given at `open_image`, and for images whose pixels are not ids: colours,
    transparency, floating point, and JPEG, whose compression changes ids.
    """
    image = open_image(path)
    if image.format == "JPEG":
        raise data_error(
            path, "ids stored as JPEG, whose compression changes them", "Export the ids again, as a grey PNG"
        )
    if image.mode == "LA":
        ids, alpha = (np.asarray(band) for band in image.split())
        _require_opaque(alpha, path)
    elif image.mode in ("1", "L", "P", *WIDE_MODES):
        ids = np.asarray(image)
    else:
        raise data_error(path, *_why_not_ids(image))
    return ids.astype(np.int32)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file without decoding it. Raises OSError for pipes and devices, which could block for ever."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a file" if path.exists() else "No such file or directory")
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        yield image


def orientation(path: Path) -> int:
    """Returns the EXIF orientation of an image file; it is 1 (upright) without the tag and for unreadable files."""
    try:
        with _opened(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_DAMAGE, *_BOMBS):
        return 1


def read_header(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Returns mode and (width, height) of an image without decoding it; None if the file is not a readable image."""
    try:
        with _opened(path) as image:
            return (image.mode, image.size) if min(image.size) > 0 else None
    except (*_DAMAGE, *_BOMBS):
        return None


def read_palette(path: Path) -> np.ndarray | None:
    """Returns the palette of an image file, uint8 (n, 3); None without one and for unreadable files."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            levels = image.getpalette("RGB") if image.mode == "P" else None
    except (*_DAMAGE, *_BOMBS):
        return None
    return np.array(levels, dtype=np.uint8).reshape(-1, 3) if levels else None


def _require_all_bits(image: ImageFile.ImageFile, path: Path) -> None:
    """Raises DataError if Pillow would read only 8 of 16 bits a channel. The image must not be decoded yet."""
    # This matches raw modes such as RGB;16B and LA;16B, but not BGR;16, which has 16 bits for all channels together.
    raw_modes = " ".join(str(tile[3]) for tile in image.tile)
    if image.mode not in WIDE_MODES and re.search(r";16[BLN]\b", raw_modes):
        what = "colours or transparency with 16 bits a channel, of which only 8 could be read"
        raise data_error(path, what, "Save it as grey without an alpha channel, or with 8 bits a channel")


def _levels_of_16_bits(image: Image.Image, path: Path | None) -> np.ndarray:
    levels = np.asarray(image)
    outside = (levels < 0) | (levels > FULL_16)
    if outside.any():
        y, x = np.argwhere(outside)[0]
        what = f"level {levels[y, x]} at pixel x={x}, y={y} is outside 0..{FULL_16}"
        raise data_error(path, what, "Shift and scale the levels of all photographs alike, and save them with 16 bits")
    return levels


def _too_large(path: Path, size: str, detail: str = "") -> Exception:
    what = f"the image is {size}; at most {MAX_PIXELS} pixels are decoded" + (f" ({detail})" if detail else "")
    return data_error(path, what, "Scale the image down or cut it into tiles")


def _require_opaque(alpha: np.ndarray, path: Path) -> None:
    if (alpha == 255).all():
        return
    y, x = np.argwhere(alpha != 255)[0]
    raise data_error(
        path,
        f"an id image with transparent pixels (pixel x={x}, y={y} has alpha {alpha[y, x]})",
        "Save it as a grey PNG without an alpha channel",
    )


def _why_not_ids(image: Image.Image) -> tuple[str, str]:
    """Returns the reason why an image has no ids, and the fix."""
    what = f"mode {image.mode} has colours or fractions, not ids"
    if image.mode not in ("RGB", "RGBA", "RGBX"):
        return what, "Save it as a grey PNG whose pixel values are the ids"
    red, green, blue = (np.asarray(band) for band in image.split()[:3])
    if (red == green).all() and (green == blue).all():
        return what + " (its three channels are equal)", "Convert it to one channel: save it as a grey PNG"
    return (
        what + " (a colour map shows ids, it does not store them)",
        "Use the file that stores one id per pixel, or convert the colours to ids; "
        "to use the colour image itself as the condition, pass --label_nc 0",
    )

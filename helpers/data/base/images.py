"""From the bytes of an image file to training pixels: size, decoding to sRGB, resizing, cropping.

    size = read_size(stream)  # Size(4000, 3000), from the header alone
    pixels = crop(decode(data, geometry.resized), geometry)  # float32 (3, H, W) in [-1, 1]

Image files are not trusted. Only the formats listed here are opened, recognized by content and not by name, and no image with more than
`MAX_PIXELS` is decoded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, PngImagePlugin
from torch import Tensor

from helpers.config.libraries import install
from helpers.data.base.sample import Geometry, Size

# Extensions of image files, in any letter case. The format is recognized by the first bytes.
EXTENSIONS = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"),
        *(".heic", ".heif", ".hif", ".jxl"),  # with libraries of their own: see `_LIBRARIES`
    }
)
PIXELS_VERSION = 1  # part of the key of cached latents: raise it when `decode` or `crop` give other pixels
MAX_PIXELS = 128_000_000  # 384 MB as RGB: more than the 102 megapixels of the largest cameras, less than a forged header may claim

MAX_JPEG_PIXELS = 256_000_000  # for JPEG files, which can be decoded at a fraction of their size; cameras have up to 200 megapixels

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
_READABLE = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
_JPEG = ("JPEG", "MPO")  # MPO: JPEG with several images, as some cameras write
_PNG_START = b"\x89PNG\r\n\x1a\n"
_WHITE = (255, 255, 255)
_DRAFT_FACTORS = (8, 4, 2)  # by which libjpeg can downscale while it decodes
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that Pillow reads only with another library: format => module, package, what files of it are called.
_LIBRARIES = {
    "HEIF": ("pillow_heif", "pillow-heif", "HEIC"),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", "JPEG XL"),
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

# Pillow warns above its own limit, and refuses above twice that. `_open` applies ours before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Warnings about a file, such as damaged EXIF data, do not name it. What matters becomes an `ImageError` with its name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# A compressed color profile may be larger than Pillow's limit of 1 MiB. Texts of any length are dropped by `_without_texts`.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20


class ImageError(Exception):
    """These bytes cannot become a training image. The message is the reason as "kind: detail", in words for the user."""


def read_size(stream: BinaryIO) -> Size:
    """Width and height after EXIF rotation, from the header alone.

    ImageError if it is not an image, or has more pixels than are decoded. The pixels may be damaged even if the header is not.
    """
    size = _plain_webp_size(stream.read(30))
    stream.seek(0)
    if size is not None and 0 < size.area <= MAX_PIXELS:
        return size
    image = _open(stream)
    return _shown(image.size, _orientation(image))


def require_size(data: bytes, expected: Size) -> None:
    """ImageError unless the image has the expected size, after EXIF rotation. The file may have changed, or a table may be wrong."""
    size = read_size(io.BytesIO(data))
    if size != expected:
        raise _wrong_size(size, expected)


def decode(data: bytes, resized: Size | None = None) -> Image.Image:
    """The first frame of an image file as RGB in sRGB, after EXIF rotation. Transparent areas become white.

    `resized` is the size that the image will be resized to. A JPEG at least four times as large may then be decoded at 1/2, 1/4 or 1/8
    of its size, never below twice the size asked for. This is two to three times faster, and the resized photos differ by less than 1/255
    on average. A JPEG with more than `MAX_PIXELS` is always decoded at a fraction, at the least size that covers `resized`.
    ImageError if the file is damaged, or too large for that.
    """
    image = _open(io.BytesIO(data))
    if image.format in _JPEG and resized is not None:
        _draft(image, _shown(resized, _orientation(image)))
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(Size(*image.size))
    return _converted(image, data, lambda loaded: _on_white(_plain(loaded), loaded.info.get("icc_profile")))


def decode_mask(data: bytes) -> Image.Image:
    """An image file as a loss mask: its brightness in mode L, after EXIF rotation. Transparent areas become black.

    Levels are taken as they are: no color profile is applied. ImageError if the file is damaged or too large.
    """
    image = _open(io.BytesIO(data))
    if image.format in _JPEG and image.width * image.height > MAX_PIXELS:
        _draft(image, Size(1, 1))
    return _converted(image, data, lambda loaded: _brightness(_plain(loaded)))


def decode_alpha(data: bytes) -> Image.Image | None:
    """The alpha channel of an image file in mode L, after EXIF rotation; None where it has none. ImageError as for `decode`."""
    image = _open(io.BytesIO(data))
    if not image.has_transparency_data:
        return None
    return _converted(image, data, lambda loaded: _plain(loaded).getchannel("A"))


def _converted(image: Image.Image, data: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of the image once its pixels are loaded, after EXIF rotation. ImageError if they are damaged."""
    orientation = _orientation(image)
    try:
        image = convert(_loaded(image, data))
        return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # decoders meet hostile bytes with any exception; all mean the same to the user
        raise ImageError(f"unreadable: {_reason(error)}") from error


def crop(image: Image.Image, geometry: Geometry) -> Tensor:
    """Resize, mirror and crop what `decode` returned: float32 (3, H, W) in [-1, 1], of the geometry's training size.

    Lanczos with antialiasing, on sRGB values, as trainers of this field do. ImageError if the image does not have the size that the
    geometry was planned for.
    """
    return pixels_of(cropped(image, geometry.original, geometry))


def cropped(image: Image.Image, original: Size, geometry: Geometry, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """As `crop`, but an image. `original` is the size the image must have; a conditioning image may have another one than its image."""
    if not _is_size_of(image.size, original):
        raise _wrong_size(Size(*image.size), original)
    if image.size != geometry.resized:
        image = image.resize(geometry.resized, resampling)
    if geometry.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = geometry.left, geometry.top
    return image.crop((left, top, left + geometry.target.width, top + geometry.target.height))


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def _open(stream: BinaryIO) -> Image.Image:
    """The image, with only its header read. OSError for a disk error, ImageError for bad content."""
    try:
        image = _recognized(stream)
    except Image.DecompressionBombError:
        raise ImageError(f"too large: more than {MAX_PIXELS / 1e6:g} megapixels") from None
    except Image.UnidentifiedImageError as error:
        raise ImageError(_not_an_image(stream)) from error
    except ImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise ImageError(f"unreadable: {_reason(error)}") from error
    if image.width * image.height > (MAX_JPEG_PIXELS if image.format in _JPEG else MAX_PIXELS):
        raise _too_large(Size(*image.size), image.format)
    if image.width < 1 or image.height < 1:
        raise ImageError(f"unreadable: it claims a size of {Size(*image.size)}")
    return image


def _recognized(stream: BinaryIO) -> Image.Image:
    """The image in the format that the first bytes show."""
    start = stream.read(32)
    stream.seek(0)
    other = _format_of_library(start)
    if other is not None:
        _require_library(other)
        return Image.open(stream, formats=(other,))
    try:
        return Image.open(stream, formats=_FORMATS)
    except ValueError:  # a text that is longer than Pillow decompresses, such as a large ComfyUI workflow
        if not start.startswith(_PNG_START):
            raise
        stream.seek(0)
        return Image.open(io.BytesIO(_without_texts(stream.read())), formats=("PNG",))


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its pixels decoded. Texts after the pixels of a PNG are treated as in `_recognized`."""
    try:
        image.load()
    except ValueError:
        if image.format != "PNG":
            raise
        image = Image.open(io.BytesIO(_without_texts(data)), formats=("PNG",))
        image.load()
    return image


def _without_texts(data: bytes) -> bytes:
    """A PNG file without its texts, which say nothing about the pixels. XMP stays: it may hold the orientation."""
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        name, content = data[place + 4 : place + 8], data[place + 8 : end - 4]
        if name not in (b"tEXt", b"zTXt", b"iTXt") or content.startswith(b"XML:com.adobe.xmp\0\0"):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _format_of_library(start: bytes) -> str | None:
    """The key of `_LIBRARIES` that a file's first 32 bytes belong to."""
    if start.startswith(_JXL_STARTS):
        return "JXL"
    brands = [start[place : place + 4] for place in range(8, len(start) - 3, 4) if place != 12]
    if start[4:8] == b"ftyp" and b"avif" not in brands and any(brand in _HEIF_BRANDS for brand in brands):
        return "HEIF"
    return None


@functools.lru_cache
def _require_library(format: str) -> None:
    """Make Pillow read a format of `_LIBRARIES`. ImageError if its library is not installed."""
    module, package, name = _LIBRARIES[format]
    if importlib.util.find_spec(module) is None:
        raise ImageError(f"unsupported: a {name} image needs the library {package}; {install(package)}")
    library = importlib.import_module(module)
    if format == "HEIF":
        library.register_heif_opener()


def _too_large(size: Size, format: str | None = None) -> ImageError:
    more = MAX_JPEG_PIXELS if format in _JPEG else MAX_PIXELS
    return ImageError(f"too large: {size}, more than {more / 1e6:g} megapixels")


def _plain_webp_size(start: bytes) -> Size | None:
    """The size of a WebP file without EXIF and XMP, from its first 30 bytes. None for any other file.

    Pillow reads the whole file and allocates its pixels, which is thirty times slower.
    """
    if len(start) < 30 or start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return None
    chunk = start[12:16]
    if chunk == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":  # lossy: start code, then 14 bits each and 2 bits of scaling
        return Size(int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF)
    if chunk == b"VP8L" and start[20] == 0x2F:  # lossless: 14 bits each, minus one
        bits = int.from_bytes(start[21:25], "little")
        return Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if chunk == b"VP8X" and not start[20] & 0x0C:  # extended, neither EXIF nor XMP: 24 bits each, minus one
        return Size(int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1)
    return None


def _not_an_image(stream: BinaryIO) -> str:
    """The reason for a file that Pillow does not recognize."""
    stream.seek(0)
    start = stream.read(512)
    if not start:
        return "unreadable: the file is empty"
    if start.lstrip()[:1] == b"<":
        return "unreadable: this is a web page or XML, not an image"
    return f"unreadable: not a {_READABLE} image, or its header is damaged"


def _wrong_size(size: Size, expected: Size) -> ImageError:
    rotated = "; EXIF rotation swaps the sides" if size == expected[::-1] else ""
    return ImageError(f"wrong size: the image is {size} and not {expected}, as the scan or a table said{rotated}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, from the header. The readers of TIFF, HEIC and JPEG XL rotate size and pixels themselves."""
    if image.format in ("TIFF", *_LIBRARIES):
        return 1
    try:
        # Not PngImageFile.getexif, which decodes all pixels to look for EXIF after them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF: take the pixels as they are
        return 1
    return value if value in _TRANSPOSE else 1


def _shown(size: tuple[int, int], orientation: int) -> Size:
    """The size after EXIF rotation for the stored size, and vice versa."""
    return Size(size[1], size[0]) if orientation >= 5 else Size(*size)


def _draft(image: Image.Image, resized: Size) -> None:
    """Let libjpeg downscale while it decodes, if the result is at least twice `resized` and the size divides evenly.

    An image with more than `MAX_PIXELS` need only cover `resized`, and its size need not divide evenly.
    """
    width, height = image.size
    is_huge = width * height > MAX_PIXELS
    least = 1 if is_huge else 2
    for factor in _DRAFT_FACTORS:
        fits = width >= least * factor * resized.width and height >= least * factor * resized.height
        if fits and (is_huge or width % factor == height % factor == 0):
            image.draft(None, (width // factor, height // factor))
            return


def _is_size_of(size: tuple[int, int], original: Size) -> bool:
    """Whether a decoded image has the expected size, in full or downscaled by libjpeg."""
    if original.area > MAX_PIXELS:  # libjpeg rounds up
        return any((-(-original.width // factor), -(-original.height // factor)) == size for factor in _DRAFT_FACTORS)
    return any((size[0] * factor, size[1] * factor) == original for factor in (1, *_DRAFT_FACTORS))


def _plain(image: Image.Image) -> Image.Image:
    """The same image in mode L, LA, RGB, RGBA, CMYK or LAB: 8 bits a channel, no palette, no transparent color."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("unsupported: 32-bit pixels, which have no defined white; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("L", "LA", "La", "1") else "RGBA")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB")


def _brightness(image: Image.Image) -> Image.Image:
    """What `_plain` returned in mode L, with transparency composited on black."""
    if image.mode in ("LA", "RGBA"):
        return ImageChops.multiply(image.convert(image.mode[:-1]).convert("L"), image.getchannel("A"))
    return image if image.mode == "L" else _to_srgb(image, None).convert("L")


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """What `_plain` returned as RGB in sRGB, with transparency composited on white."""
    if image.mode not in ("LA", "RGBA"):
        return _to_srgb(image, profile)
    white = Image.new("RGB", image.size, _WHITE)
    white.paste(_to_srgb(image.convert(image.mode[:-1]), profile), mask=image.getchannel("A"))
    return white


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """L, RGB, CMYK or LAB as RGB in sRGB, through the embedded ICC profile. A profile that is damaged or does not fit is ignored."""
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # None only where the transform works in place
        return converted
    return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an ICC profile to sRGB. None if the profile is sRGB, or does not fit the image."""
    spaces = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if spaces.get(source.profile.xcolor_space) != mode or "sRGB" in (source.profile.profile_description or ""):
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # as browsers do: without a readable profile, the image is taken for sRGB

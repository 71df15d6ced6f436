from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from helpers.data.base import images
from helpers.data.base.images import ImageError, crop, decode, read_size
from helpers.data.base.sample import Geometry, Size
from helpers.data.plan.buckets import geometry
from helpers.data.plan.targets import ResolutionRule

WAYS_TO_STORE = {  # EXIF orientation => how the shown picture lies in the file
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def chart(width: int = 90, height: int = 60) -> Image.Image:
    """A smooth picture whose four corners differ."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))


def stored(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def difference(first: Image.Image, second: Image.Image) -> int:
    assert first.size == second.size
    return int(np.abs(np.asarray(first.convert("RGB"), int) - np.asarray(second.convert("RGB"), int)).max())


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG by hand, for what no library writes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


# Formats and sizes.


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 12),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 24),
        ("AVIF", {"quality": 95}, 24),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("BMP", {}, 0),
        ("GIF", {}, 60),
    ],
)
def test_every_format_is_read_by_content(format: str, options: dict[str, object], tolerance: int) -> None:
    data = stored(chart(), format, **options)
    assert read_size(io.BytesIO(data)) == Size(90, 60)
    image = decode(data)
    assert image.mode == "RGB"
    assert difference(image, chart()) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_eight_ways_to_hold_a_camera_give_one_picture_and_one_size(orientation: int, format: str) -> None:
    way, exif = WAYS_TO_STORE[orientation], Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = stored(chart().transpose(way) if way is not None else chart(), format, exif=exif, **options)
    assert read_size(io.BytesIO(data)) == Size(90, 60)
    assert difference(decode(data), chart()) <= (0 if format in ("PNG", "WEBP", "TIFF") else 24)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (90, 60), (3000, 17)])
def test_webp_headers_are_read_as_pillow_reads_them(mode: str, lossless: bool, size: tuple[int, int]) -> None:
    image = chart(*size).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    data = stored(image, "WEBP", lossless=lossless)
    assert read_size(io.BytesIO(data)) == Size(*size)
    animated = stored(image, "WEBP", save_all=True, append_images=[chart(*size)])
    assert read_size(io.BytesIO(animated)) == Size(*size)


def test_exif_that_makes_no_sense_is_no_rotation() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"):
        data = stored(chart(), "JPEG", exif=exif)
        assert read_size(io.BytesIO(data)) == Size(90, 60) == decode(data).size


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(format: str) -> None:
    red, blue = Image.new("RGB", (40, 30), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = stored(red, format, save_all=True, append_images=[blue, red], duration=50, **options)
    assert difference(decode(data), red) == 0


# Colours.


def test_transparency_shows_white_and_not_what_is_hidden_under_it() -> None:
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (255, 0, 0, 255))
    hidden.putpixel((1, 0), (0, 0, 0, 128))
    image = decode(stored(hidden, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (127, 127, 127), (255, 255, 255)]


def test_transparent_colours_and_grey_with_alpha_show_white_too() -> None:
    grey = Image.new("LA", (4, 4), (0, 0))
    assert decode(stored(grey, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decode(stored(keyed, "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 20, 40, 60])
    assert decode(stored(palette, "PNG")).getpixel((0, 0)) == (20, 40, 60)
    assert decode(stored(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(stored(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_black_and_white_bits_are_black_and_white() -> None:
    bits = Image.new("1", (4, 4), 0)
    bits.putpixel((1, 0), 255)
    image = decode(stored(bits, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 40_000, 65_535]], np.uint16)
    expected = [round(int(value) / 65_535 * 255) for value in values[0]]
    image = decode(stored(Image.fromarray(values), format))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == expected


def test_sixteen_bit_colour_is_scaled_too() -> None:
    row = b"\0" + struct.pack(">6H", 0, 40_000, 65_535, 20_000, 1_000, 257)
    image = decode(png(2, 1, row, depth=16, colour=2))
    for got, value in zip((*image.getpixel((0, 0)), *image.getpixel((1, 0))), (0, 40_000, 65_535, 20_000, 1_000, 257), strict=True):
        assert abs(got - value / 257) <= 1


def test_pixels_without_a_defined_white_are_refused_by_name() -> None:
    with pytest.raises(ImageError, match="unsupported: 32-bit pixels"):
        decode(stored(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_cmyk_without_a_profile_and_as_photoshop_writes_it() -> None:
    for format in ("JPEG", "TIFF"):
        image = decode(stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format))
        red, green, blue = image.getpixel((8, 8))
        assert red > 250 and green < 5 and blue < 5


def test_colours_pass_through_the_embedded_profile() -> None:
    lab = Image.new("LAB", (4, 4), (136, 208, 195))  # about sRGB red: L 53, a 80, b 67
    red, green, blue = decode(stored(lab, "TIFF")).getpixel((0, 0))
    assert red > 245 and green < 40 and blue < 40
    swapped = stored(Image.new("RGB", (4, 4), (250, 10, 20)), "PNG", icc_profile=swapped_primaries())
    red, green, blue = decode(swapped).getpixel((0, 0))
    assert green > 240 and red < 30


def swapped_primaries() -> bytes:
    """The sRGB profile under another name, with red and green exchanged: what it does to colours cannot be overlooked."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = data[green : green + 4], data[red : red + 4]
    for name in (b"sRGB", "sRGB".encode("utf-16-be")):
        data = data.replace(name, b"x" * len(name))
    return bytes(data)


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(decode(stored(chart(), "PNG", icc_profile=profile)), chart()) == 0


@pytest.mark.parametrize("profile", [b"garbage", b"", "cmyk-like"])
def test_a_profile_that_cannot_be_used_is_as_none(profile: bytes | str) -> None:
    if isinstance(profile, str):
        data = bytearray(swapped_primaries())
        data[16:20] = b"CMYK"
        profile = bytes(data)
    assert difference(decode(stored(chart(), "PNG", icc_profile=profile)), chart()) == 0


# Bad files.


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable: the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable: this is a web page or XML, not an image"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable: this is a web page or XML, not an image"),
        (bytes(range(256)) * 9, "unreadable: not a JPEG, PNG"),
        (b"\xff\xd8\xff\xe0", "unreadable: "),
        (b"\x89PNG\r\n\x1a\n", "unreadable: "),
        (b"RIFF\x30\0\0\0WEBPVP8 " + bytes(14), "unreadable: "),
        (b"RIFF\x30\0\0\0WEBPVP8X" + bytes(14), "unreadable: "),
        (stored(Image.new("RGB", (8, 8)), "PPM"), "unreadable: not a JPEG, PNG"),
        (stored(Image.new("RGB", (16, 16)), "ICO"), "unreadable: not a JPEG, PNG"),
    ],
)
def test_what_is_no_image_is_told_in_words(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)
    if b"WEBP" not in data:  # that header says a size, and no more is asked of it
        with pytest.raises(ImageError, match=reason):
            read_size(io.BytesIO(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_half_a_file_has_a_size_or_a_reason_but_never_pixels(format: str) -> None:
    data = stored(Image.effect_noise((300, 200), 80).convert("RGB"), format)
    half = data[: len(data) // 2]
    try:
        assert read_size(io.BytesIO(half)) == Size(300, 200)
    except ImageError as error:
        assert str(error).startswith("unreadable: ")
    with pytest.raises(ImageError, match="unreadable: "):
        decode(half)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on damaged TIFF tags
def test_random_damage_never_ends_in_anything_but_pixels_or_a_reason() -> None:
    random = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"):
        whole = np.frombuffer(stored(chart(), format), np.uint8)
        for _ in range(15):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 6)] = random.integers(0, 256, 6)
            for read in (lambda data: read_size(io.BytesIO(data)), decode):
                try:
                    read(damaged.tobytes())
                except ImageError as error:
                    assert ": " in str(error)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    script = (
        "import io, resource, sys\nfrom helpers.data.base.images import ImageError, decode, read_size\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = sys.stdin.buffer.read()\n"
        "for read in (decode, lambda data: read_size(io.BytesIO(data))):\n"
        "    try:\n        read(data)\n    except ImageError as error:\n        print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)\n"
    )
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(13_001)) for _ in range(13_000)) + packer.flush()
    for edge in (13_000, 14_000, 100_000):
        data = png(edge, edge)
        if edge == 13_000:
            at = data.index(b"IDAT") - 4
            data = data[:at] + struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows)) + data[-12:]
        told = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True).stdout.decode().splitlines()
        assert len(told) == 3 and told[0].startswith("too large: ") and "more than 128 megapixels" in told[1]
        assert told[2] == "True", "memory grew"


def test_a_text_chunk_that_unpacks_without_end_costs_no_memory() -> None:
    whole = stored(chart(), "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode(whole[:33] + chunk + whole[33:])
    except ImageError as error:
        assert str(error).startswith("unreadable: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_an_error_of_the_disk_is_not_an_error_of_the_image() -> None:
    class Broken(io.BytesIO):
        def read(self, *args: object) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        read_size(Broken(b"x"))


# Cutting.


def test_a_cut_is_float_pixels_between_minus_one_and_one() -> None:
    image = Image.new("RGB", (20, 10), (0, 127, 255))
    pixels = crop(image, Geometry(Size(20, 10), Size(20, 10), 1, 2, Size(16, 8)))
    assert pixels.shape == (3, 8, 16) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])


def test_a_cut_shows_the_part_that_its_geometry_names() -> None:
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))  # every pixel holds its own coordinates
    for flip in (False, True):
        pixels = crop(image, Geometry(Size(200, 100), Size(200, 100), 7, 30, Size(64, 64), flip))
        back = ((pixels + 1) * 127.5).round().int()
        assert back[1, 0, 0] == 7 and back[1, -1, 0] == 70
        assert back[0, 0].tolist() == [199 - (30 + i) if flip else 30 + i for i in range(64)]


def test_flipping_the_cut_is_cutting_the_flipped_picture() -> None:
    plain = Geometry(Size(90, 60), Size(96, 64), 0, 20, Size(64, 64))
    mirrored = Geometry(Size(90, 60), Size(96, 64), 0, 96 - 64 - 20, Size(64, 64), flip=True)
    assert torch.equal(crop(chart(), mirrored), crop(chart(), plain).flip(-1))


def test_shrinking_averages_what_it_drops() -> None:
    """Stripes of a pixel become an even grey, in sRGB as they are stored: a spread of 0.006 of the range, bare bilinear leaves 0.5."""
    stripes = np.zeros((768, 768, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = (crop(Image.fromarray(stripes), Geometry(Size(768, 768), Size(256, 256), 0, 0, Size(256, 256))) + 1) / 2
    assert pixels.std().item() == pytest.approx(0.006, abs=0.001)
    assert pixels.mean().item() == pytest.approx(0.5, abs=0.004)  # in linear light it would be 0.735


def test_an_image_that_was_replaced_since_the_scan_is_refused() -> None:
    with pytest.raises(ImageError, match="wrong size: the image is 90x60 and not 91x60"):
        crop(chart(), Geometry(Size(91, 60), Size(96, 64), 0, 0, Size(64, 64)))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_within_tolerance(orientation: int) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (75, 100, 3), dtype=np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    way, exif = WAYS_TO_STORE[orientation], Image.Exif()
    exif[0x0112] = orientation
    data = stored(noise if way is None else noise.transpose(way), "JPEG", quality=92, exif=exif)
    plan = geometry(Size(1600, 1200), ResolutionRule(0.1, alignment=8))
    small, whole = decode(data, plan.resized), decode(data)
    assert small.size == (800, 600) and whole.size == (1600, 1200)
    off = (crop(small, plan) - crop(whole, plan)).abs() * 127.5
    assert off.mean() < 1 and off.max() < 12


@pytest.mark.parametrize(("size", "resized"), [((1601, 1200), (200, 150)), ((1600, 1200), (401, 300)), ((160, 120), (160, 120))])
def test_a_jpeg_is_decoded_in_full_where_pixels_would_be_lost(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert decode(stored(chart(*size), "JPEG"), Size(*resized)).size == size


def test_sizes_are_read_at_five_thousand_images_a_second() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(chart(1536, 1024), "JPEG", exif=exif)

    def seconds() -> float:
        started = time.process_time()
        for _ in range(1000):
            read_size(io.BytesIO(data))
        return time.process_time() - started

    assert min(seconds() for _ in range(3)) < 1000 / 5000


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


LONG = b'{"nodes": "' + b"x" * 70_000_000 + b'"}'


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG[:1_100_000])),  # as ComfyUI's
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"tEXt", b"parameters\0" + LONG),
        chunk(b"zTXt", b"one\0\0" + zlib.compress(LONG[:10_000_000])) * 8,
    ],
    ids=["zTXt", "iTXt", "tEXt", "several"],
)
@pytest.mark.parametrize("after_the_pixels", [False, True])
def test_texts_of_any_length_in_a_png_do_not_matter(text: bytes, after_the_pixels: bool) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = stored(chart(), "PNG", exif=exif)
    at = len(whole) - 12 if after_the_pixels else 33  # before IEND, or after IHDR
    data = whole[:at] + text + whole[at:]
    assert read_size(io.BytesIO(data)) == read_size(io.BytesIO(whole)) == Size(60, 90)
    assert difference(decode(data), decode(whole)) == 0


def test_a_long_color_profile_in_a_png_is_applied() -> None:
    profile = swapped_primaries()
    padded = struct.pack(">I", len(profile) + 3_000_000) + profile[4:] + bytes(3_000_000)
    expected = decode(stored(chart(), "PNG", icc_profile=profile))
    assert difference(decode(stored(chart(), "PNG", icc_profile=padded)), expected) == 0
    assert difference(expected, decode(stored(chart(), "PNG"))) > 0


@pytest.mark.parametrize("size", [(14_204, 10_652), (16_320, 12_241)])  # cameras of 151 and 200 megapixels; the latter with an odd edge
def test_a_jpeg_of_up_to_256_megapixels_is_decoded_at_a_fraction(size: tuple[int, int]) -> None:
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    data = stored(image, "JPEG")
    del image
    assert read_size(io.BytesIO(data)) == Size(*size)
    height = round(2048 * size[1] / size[0])
    geometry = Geometry(Size(*size), Size(2048, height), 0, 0, Size(2048, 1024))
    pixels = crop(decode(data, geometry.resized), geometry)
    assert pixels.shape == (3, 1024, 2048)
    assert pixels[:, :, :1000].min() > 0.98 and pixels[:, :, 1048:].max() < -0.98
    with pytest.raises(ImageError, match=f"too large: {Size(*size)}, more than 128 megapixels"):
        decode(data)
    with pytest.raises(ImageError, match=r"wrong size"):
        crop(decode(data, geometry.resized), replace(geometry, original=Size(size[0] - 8, size[1])))


def test_a_jpeg_above_256_megapixels_is_refused() -> None:
    header = stored(Image.new("L", (16, 16)), "JPEG")
    at = header.index(b"\xff\xc0") + 5
    data = header[:at] + struct.pack(">HH", 17_000, 17_000) + header[at + 4 :]
    with pytest.raises(ImageError, match="too large: 17000x17000, more than 256 megapixels"):
        read_size(io.BytesIO(data))


@pytest.mark.parametrize(("format", "library"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_heic_and_jpeg_xl_are_read_with_their_libraries_and_named_without(
    format: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(library)
    if format == "HEIF":
        module.register_heif_opener()
    data = stored(chart(), format, quality=95)
    assert read_size(io.BytesIO(data)) == Size(90, 60)
    assert difference(decode(data), chart()) < 30
    images._require_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"unsupported: a (HEIC|JPEG XL) image needs the library pillow-\S+; \.venv/bin/pip install "):
        read_size(io.BytesIO(data))
    images._require_library.cache_clear()

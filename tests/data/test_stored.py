"""Image files written bit by bit, compared with arithmetic: depths, negatives, transparency, colour spaces."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.config import DataConfig
from ldm.data.decode import read_header, read_image
from ldm.data.folder import FolderSource
from ldm.data.sample import BadSample, readable
from ldm.data.survey import leave_out_small, survey

BACKGROUND = np.array([10, 200, 30])
WIDTH, HEIGHT = 16, 4
SAVED: dict[str, dict[str, Any]] = {"a.webp": {"lossless": True, "exact": True}}


def png(depth: int, kind: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """Colour ``kind`` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; packed rows; chunks between IHDR and IDAT."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDTH, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(
    data: bytes, bits: tuple[int, ...], photometric: int, order: str = "<", height: int = HEIGHT, **tags: Any
) -> bytes:
    """One strip. ``tags``: `t339=(2,)` and the like; all are SHORT but the offsets."""
    entries: dict[int, tuple[int, ...]] = {
        256: (WIDTH,), 257: (height,), 258: bits, 259: (1,), 262: (photometric,), 273: (8,), 277: (len(bits),),
        278: (height,), 279: (len(data),), **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    data += b"\0" * (len(data) % 2)
    place = 8 + len(data) + 2 + 12 * len(entries) + 4
    table, beyond = struct.pack(f"{order}H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        kind, form = (4, "L") if tag in (273, 279) else (3, "H")
        content = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(content) > 4:
            content, beyond = struct.pack(f"{order}L", place + len(beyond)), beyond + content
        table += struct.pack(f"{order}HHL", tag, kind, len(values)) + content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(data))
    return head + data + table + b"\0" * 4 + beyond


def packed(values: np.ndarray, bits: int) -> list[bytes]:
    """Rows of samples of 1 to 16 bits, the first in the highest bits of a byte."""
    flat = values.reshape(len(values), -1)
    return [np.packbits((row[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).ravel()).tobytes() for row in flat]


def ramp(bits: int) -> np.ndarray:
    """[HEIGHT, WIDTH] over all of the range."""
    top = 2**bits - 1
    return (
        np.linspace(0, top, WIDTH * HEIGHT).round().astype(np.int64).reshape(HEIGHT, WIDTH)
        if bits > 2
        else GRID % (top + 1)
    )


GRID = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([GRID * 4, 255 - GRID * 4, GRID * 37 % 256], axis=-1)  # [HEIGHT, WIDTH, 3] of 8 bits
ALPHA = (GRID * 53 % 256)[..., None]


def read(tmp_path: Path, content: bytes, name: str, channels: int = 3) -> np.ndarray:
    (tmp_path / name).write_bytes(content)
    return read_image(tmp_path / name, channels, tuple(BACKGROUND.tolist())).astype(int)  # type: ignore[arg-type]


def agree(got: np.ndarray, want: np.ndarray, within: float = 0.51) -> None:
    if want.ndim == 2 or want.shape[-1] == 1:
        want = np.repeat(want.reshape(HEIGHT, WIDTH, 1), 3, axis=-1)
    assert got.shape == want.shape
    assert abs(got - want).max() <= within, (got[0, :4].tolist(), want[0, :4].tolist())


def over(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours over BACKGROUND; ``alpha`` of 0 to 255."""
    return (colours * alpha + BACKGROUND * (255 - alpha)) / 255


def split16(values: np.ndarray, order: str) -> bytes:
    return values.astype(f"{order}u2").tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png_and_its_one_transparent_grey(tmp_path: Path, bits: int) -> None:
    values, top = ramp(bits), 2**bits - 1
    agree(read(tmp_path, png(bits, 0, packed(values, bits)), "plain.png"), values * 255 / top)
    key = int(values[1, 3])
    content = png(bits, 0, packed(values, bits), (b"tRNS", struct.pack(">H", key)))
    want = over(np.repeat((values * 255 / top)[..., None], 3, -1), np.where(values == key, 0, 255)[..., None])
    agree(read(tmp_path, content, "key.png"), want)
    luma = read(tmp_path, content, "key.png", channels=1)[..., 0]
    assert abs(luma - want @ [0.299, 0.587, 0.114]).max() <= 1.01


def test_a_transparent_colour_of_a_colour_png(tmp_path: Path) -> None:
    rows, key = packed(COLOURS, 8), COLOURS[2, 5]
    alpha = np.where((key == COLOURS).all(-1), 0, 255)[..., None]
    assert (alpha == 0).sum() == 1
    for high in (0, 0xAB00):  # bits that an 8-bit image does not have
        content = png(8, 2, rows, (b"tRNS", struct.pack(">HHH", *(int(part) | high for part in key))))
        agree(read(tmp_path, content, "rgb.png"), over(COLOURS, alpha))
    content = png(16, 2, packed(COLOURS * 257, 16), (b"tRNS", struct.pack(">HHH", *(key * 257).tolist())))
    with pytest.raises(
        BadSample, match="16 bits per channel and one transparent colour"
    ):  # Pillow keeps the higher eight alone
        read(tmp_path, content, "rgb.png")
    agree(read(tmp_path, png(16, 2, packed(COLOURS * 257, 16)), "rgb.png"), COLOURS)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_png_with_one_alpha_for_each_colour(tmp_path: Path, bits: int) -> None:
    count = min(2**bits, 32)
    palette, alphas = np.random.default_rng(0).integers(0, 256, (count, 3)), np.arange(count) * 7 % 256
    values = GRID % count
    content = png(
        bits,
        3,
        packed(values, bits),
        (b"PLTE", palette.astype(np.uint8).tobytes()),
        (b"tRNS", alphas.astype(np.uint8).tobytes()),
    )
    agree(read(tmp_path, content, "palette.png"), over(palette[values], alphas[values][..., None]), within=1.01)


def test_alpha_of_8_and_16_bits(tmp_path: Path) -> None:
    grey = ramp(8)[..., None]
    for bits, scale in ((8, 1), (16, 257)):
        content = png(bits, 4, packed(np.concatenate([grey, ALPHA], -1) * scale, bits))
        agree(read(tmp_path, content, "la.png"), over(grey, ALPHA), within=1.01)
        content = png(bits, 6, packed(np.concatenate([COLOURS, ALPHA], -1) * scale, bits))
        agree(read(tmp_path, content, "rgba.png"), over(COLOURS, ALPHA), within=1.01)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_tiff_whose_white_is_0_or_the_highest(tmp_path: Path, bits: int, photometric: int, order: str) -> None:
    values, top = ramp(bits), 2**bits - 1
    data = split16(values, order) if bits == 16 else b"".join(packed(values, bits))
    content = tiff(data, (bits,), photometric, order)
    if (bits, photometric, order) == (16, 0, ">"):
        with pytest.raises(BadSample, match="a TIFF whose header is damaged, or of a kind that is not read"):
            read(tmp_path, content, "grey.tif")
        return
    agree(read(tmp_path, content, "grey.tif"), (values if photometric else top - values) * 255 / top, within=1.01)


def test_a_compressed_negative_of_16_bits(tmp_path: Path) -> None:
    values = ramp(16)
    content = tiff(zlib.compress(split16(values, "<")), (16,), 0, t259=(8,))
    agree(read(tmp_path, content, "deflated.tif"), 255 - values / 257, within=1.01)


def test_12_bits_are_scaled_by_4095(tmp_path: Path) -> None:
    values = ramp(12)
    agree(read(tmp_path, tiff(b"".join(packed(values, 12)), (12,), 1), "twelve.tif"), values * 255 / 4095)


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(8, 2), (16, 2), (32, 1), (32, 2), (16, 3), (32, 3), (64, 3), (64, 1)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_samples_with_a_sign_a_fraction_or_many_bits_are_left_out_by_name(
    tmp_path: Path, bits: int, kind: int, order: str
) -> None:
    data = np.zeros(WIDTH * HEIGHT * bits // 8, np.uint8).tobytes()
    with pytest.raises(
        BadSample, match=r"odd\.tif: .*(32 bits per channel|with a sign|a kind that is not read).*save it"
    ):
        read(tmp_path, tiff(data, (bits,), 1, order, t339=(kind,)), "odd.tif")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colours_alpha_and_inks_of_a_tiff(tmp_path: Path, bits: int, order: str) -> None:
    def written(values: np.ndarray, photometric: int, **tags: Any) -> bytes:
        data = split16(values * 257, order) if bits == 16 else values.astype(np.uint8).tobytes()
        return tiff(data, (bits,) * values.shape[-1], photometric, order, **tags)

    full = np.concatenate([COLOURS, ALPHA], -1)
    premultiplied = np.concatenate([(COLOURS * ALPHA + 127) // 255, ALPHA], -1)
    for content, want, within in [
        (written(COLOURS, 2), COLOURS, 0),
        (written(full, 2, t338=(0,)), COLOURS, 0),  # a further channel of no meaning
        (written(full, 2, t338=(2,)), over(COLOURS, ALPHA), 1.01),
        (written(premultiplied, 2, t338=(1,)), over(COLOURS, ALPHA), 2.01),  # rounded twice
        (written(np.concatenate([255 - COLOURS, 0 * ALPHA], -1), 5), COLOURS, 0),
        (written(np.concatenate([255 - COLOURS, ALPHA], -1), 5), COLOURS * (255 - ALPHA) / 255, 1.01),
    ]:
        agree(read(tmp_path, content, "colours.tif"), want, within)


def test_grey_and_palette_with_alpha_in_a_tiff(tmp_path: Path) -> None:
    grey = ramp(8)[..., None]
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    premultiplied = (grey * ALPHA + 127) // 255

    def written(first: np.ndarray, photometric: int, extra: int, **tags: Any) -> bytes:
        return tiff(
            np.concatenate([first, ALPHA], -1).astype(np.uint8).tobytes(), (8, 8), photometric, t338=(extra,), **tags
        )

    colour_map = tuple((palette.T * 257).ravel().tolist())
    agree(read(tmp_path, written(grey, 1, 0), "none.tif"), grey)
    agree(read(tmp_path, written(grey, 1, 2), "la.tif"), over(grey, ALPHA), within=1.01)
    agree(read(tmp_path, written(premultiplied, 1, 1), "la.tif"), over(grey, ALPHA), within=2.01)
    agree(
        read(tmp_path, written(GRID[..., None], 3, 2, t320=colour_map), "pa.tif"),
        over(palette[GRID], ALPHA),
        within=1.01,
    )


def test_separate_planes(tmp_path: Path) -> None:
    planes = COLOURS.transpose(2, 0, 1)
    size = WIDTH * HEIGHT
    content = tiff(
        planes.astype(np.uint8).tobytes(), (8, 8, 8), 2, t284=(2,), t273=(8, 8 + size, 8 + 2 * size), t279=(size,) * 3
    )
    agree(read(tmp_path, content, "planes.tif"), COLOURS)
    content = tiff(
        split16(planes * 257, "<"),
        (16,) * 3,
        2,
        t284=(2,),
        t273=tuple(8 + 2 * size * i for i in range(3)),
        t279=(2 * size,) * 3,
    )
    with pytest.raises(BadSample, match="16 bits per channel in separate planes"):
        read(tmp_path, content, "planes.tif")


def test_luma_and_chroma_in_a_tiff(tmp_path: Path) -> None:
    """BT.601 of full range, as TIFF 6.0 has it by default."""
    y, cb, cr = COLOURS[..., 0] // 2 + 64, 128 + GRID % 32, 128 - GRID % 24
    want = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    )
    data = np.stack([y, cb, cr], -1).astype(np.uint8).tobytes()
    agree(read(tmp_path, tiff(data, (8, 8, 8), 6, t530=(1, 1)), "ycc.tif"), want.clip(0, 255), within=1.01)
    given: list[dict[str, Any]] = [{}, {"t530": (2, 2)}]
    for tags in given:  # subsampled is the default
        with pytest.raises(BadSample, match="YCbCr that is subsampled"):
            read(tmp_path, tiff(data, (8, 8, 8), 6, **tags), "ycc.tif")


def test_lab_in_a_tiff(tmp_path: Path) -> None:
    """CIE L*a*b* of D50 to sRGB, by way of XYZ and Bradford's adaptation."""
    lab = np.stack([GRID * 2 + 100, (GRID % 40 - 20) % 256, (30 - GRID % 50) % 256], -1)
    light, a, b = lab[..., 0] * 100 / 255, lab[..., 1].astype(np.int8), lab[..., 2].astype(np.int8)
    fy = (light + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    to_rgb = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = (xyz @ to_rgb.T).clip(0, 1)
    want = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    agree(read(tmp_path, tiff(lab.astype(np.uint8).tobytes(), (8, 8, 8), 8), "lab.tif"), want, within=3)


def test_inks_of_a_jpeg_are_inverted_where_adobe_says_so(tmp_path: Path) -> None:
    Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    content = (tmp_path / "ink.jpg").read_bytes()
    agree(read(tmp_path, content, "ink.jpg"), np.broadcast_to([255, 0, 0], COLOURS.shape), within=3)
    marker = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[marker + 2 : marker + 4])
    with pytest.raises(BadSample, match="CMYK without Adobe's marker"):
        read(tmp_path, content[:marker] + content[marker + 2 + length :], "ink.jpg")


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tiff"])
def test_alpha_of_other_formats(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(np.concatenate([COLOURS, ALPHA], -1).astype(np.uint8))
    image.save(tmp_path / name, **SAVED.get(name, {}))
    agree(read_image(tmp_path / name, 3, tuple(BACKGROUND.tolist())).astype(int), over(COLOURS, ALPHA), within=1.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [False, True])
def test_the_fourth_byte_of_a_bmp_is_alpha_where_its_header_says_so(tmp_path: Path, alpha: bool) -> None:
    pixels = np.concatenate([COLOURS[::-1, :, ::-1], ALPHA[::-1]], -1).astype(np.uint8).tobytes()
    masks = struct.pack("<LLLL", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack(
        "<LllHHLLllLL", 108 if alpha else 40, WIDTH, HEIGHT, 1, 32, 3 if alpha else 0, len(pixels), 0, 0, 0, 0
    )
    header += masks + b"BGRs" + b"\0" * 48 if alpha else b""
    content = b"BM" + struct.pack("<LLL", 14 + len(header) + len(pixels), 0, 14 + len(header)) + header + pixels
    agree(read(tmp_path, content, "a.bmp"), over(COLOURS, ALPHA) if alpha else COLOURS, within=1.01)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
def test_every_orientation(tmp_path: Path, name: str, turn: int) -> None:
    image = Image.fromarray(np.repeat(np.repeat(COLOURS, 4, 0), 4, 1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / name, exif=exif, **SAVED.get(name, {}))
    stored = Image.open(tmp_path / name)
    want = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_image(tmp_path / name, 3), want)
    assert read_header(tmp_path / name).turned == (turn != 1)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    body = b"II*\0" + struct.pack("<LH", 8, len(entries))
    return (
        b"Exif\0\0"
        + body
        + b"".join(struct.pack("<HHL", *one[:3]) + one[3].ljust(4, b"\0") for one in entries)
        + b"\0" * 4
    )


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
ODD: dict[str, tuple[bytes, bool]] = {  # EXIF, and whether it turns the image
    "software-a-number": (exif(TURNED, (0x0131, 11, 1, struct.pack("<f", 1.5))), True),
    "resolution-a-text": (exif(TURNED, (0x011A, 2, 4, b"72\0\0")), True),
    "types-that-do-not-exist": (exif(TURNED, (0x0131, 99, 1, b"")), True),
    "an-offset-beyond-the-end": (exif(TURNED, (0x0131, 2, 4000, struct.pack("<L", 2**31))), True),
    "turned-as-a-long": (exif((0x0112, 4, 1, struct.pack("<L", 6))), True),
    "turned-as-a-text": (exif((0x0112, 2, 2, b"6\0")), False),
    "turned-as-a-fraction": (exif((0x0112, 11, 1, struct.pack("<f", 6.5))), False),
    "turned-to-nine": (exif((0x0112, 3, 1, struct.pack("<H", 9))), False),
    "no-exif-at-all": (b"Exif\0\0neither order", False),
    "cut": (exif(TURNED)[:12], False),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_exif_turns_by_the_one_tag_or_not_at_all(tmp_path: Path, name: str, odd: str) -> None:
    content, turned = ODD[odd]
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name, exif=content)
    assert read_image(tmp_path / name, 3).shape == ((WIDTH, HEIGHT, 3) if turned else (HEIGHT, WIDTH, 3))
    assert read_header(tmp_path / name).turned == turned


def samples(tmp_path: Path) -> dict[str, bytes]:
    """A small file of each format, with EXIF where it can have it."""
    image = Image.fromarray(COLOURS.astype(np.uint8))
    files = {
        "a.tif": tiff(split16(ramp(16), "<"), (16,), 0),
        "b.png": png(4, 0, packed(ramp(4), 4), (b"tRNS", b"\0\3")),
    }
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp"):
        options: dict[str, Any] = {} if name in ("a.gif", "a.bmp") else {"exif": exif(TURNED, (0x0131, 2, 4, b"abc\0"))}
        image.save(tmp_path / name, **options)
        files[name] = (tmp_path / name).read_bytes()
    return files


def test_whatever_stands_in_a_header_a_file_is_read_or_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, content in samples(tmp_path).items():
        for _ in range(60):
            changed = bytearray(content)
            for place in rng.integers(0, min(200, len(content)), rng.integers(1, 5)):
                changed[place] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
            (tmp_path / name).write_bytes(changed)
            for look in (read_header, lambda path: read_image(path, 3)):
                try:
                    look(tmp_path / name)
                except BadSample as bad:
                    assert bad.skipped.reason and "\n" not in str(bad) and len(bad.skipped.reason) <= 200


def test_whatever_pillow_raises_leaves_out_the_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    errors = (
        IndexError,
        TypeError,
        struct.error,
        OverflowError,
        SyntaxError,
        MemoryError,
        RecursionError,
        zlib.error,
        AssertionError,
    )
    for place in ("PIL.Image.open", "PIL.PngImagePlugin.PngImageFile.load"):
        for error in errors:

            def fail(*arguments: object, error: type[Exception] = error, **named: object) -> None:
                raise error

            with (
                monkeypatch.context() as patch,
                pytest.raises(BadSample, match=rf"a\.png: cannot be (opened|decoded): {error.__name__}$"),
            ):
                patch.setattr(place, fail)
                read_image(tmp_path / "a.png", 3)


def test_the_header_knows_bits_and_profiles(tmp_path: Path) -> None:
    rows = packed(ramp(16), 16)
    for chunks, profile in (
        ((), False),
        (((b"gAMA", struct.pack(">I", 45455)),), False),
        (((b"gAMA", struct.pack(">I", 100_000)),), True),
        (((b"sRGB", b"\0"),), False),
        (((b"iCCP", b"x\0\0" + zlib.compress(b"Display P3" * 20)),), True),
        (((b"iCCP", b"x\0\0" + zlib.compress(b"sRGB IEC61966" * 20)),), False),
    ):
        (tmp_path / "a.png").write_bytes(png(16, 0, rows, *chunks))
        header = read_header(tmp_path / "a.png")
        assert (header.bits, header.profile) == (16, profile)


def test_a_strip_that_would_grow_huge_is_left_out(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (3_000_000, 8)).save(tmp_path / "strip.png")  # 11 million pixels wide at a height of 32
    looked = leave_out_small(survey(tmp_path, "none"), 32)
    (left,) = looked.skipped
    assert (
        left.file == str(tmp_path / "strip.png")
        and "so long that it has 384000000 pixels at 32 pixels of height" in left.reason
    )
    source = FolderSource(
        DataConfig(folder=str(tmp_path), captions="none", image_size=32, validation_fraction=0.0), "train"
    )
    assert [i for i, _ in readable(source)] == [0, 1, 2, 3]


def test_the_survey_remarks_on_what_is_read_as_it_is_and_looks_otherwise(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(16, 0, packed(ramp(12) if i else ramp(16), 16)))
    Image.new("RGB", (16, 4)).save(tmp_path / "odd.jpg", exif=b"Exif\0\0neither order", icc_profile=b"Display P3")
    looked = survey(tmp_path, "none")
    assert sum(h.profile for h in looked.headers) == sum(h.odd_exif for h in looked.headers) == 1
    (remark,) = [one for one in looked.remarks if "16 bits" in one]
    assert remark.startswith(
        "3 images of 16 bits, such as 1.png, stay below a quarter of white, as 10, 12 or 14 bits stored in 16 do"
    )

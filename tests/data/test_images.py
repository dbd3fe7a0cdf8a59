from __future__ import annotations

import base64
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.data import images
from recap_fast.data.images import (
    BadImage,
    ImageEncoder,
    ImageError,
    VisionTokens,
    decode_image,
    digest,
    fit_size,
    image_cells,
    load_image_encoder,
    read_image,
)
from tests.tiny import save_tiny_model
from tests.vision_rows import MODELS, encoded, encoder, picture, save_vision_model

RED = (255, 0, 0)


def bad(action, *arguments):
    with pytest.raises(BadImage) as caught:
        action(*arguments)
    return caught.value.reason, str(caught.value)


# -- reading


def test_cells():
    assert image_cells(None) == []
    assert image_cells("a.png") == ["a.png"]
    assert image_cells({"bytes": b"x", "path": None}) == [{"bytes": b"x", "path": None}]
    assert image_cells(["a.png", None]) == ["a.png", None]


def test_every_form_of_an_image_is_read(tmp_path):
    content = encoded(picture(8, 8))
    (tmp_path / "a.png").write_bytes(content)
    for cell in (
        "a.png",
        str(tmp_path / "a.png"),
        content,
        bytearray(content),
        {"bytes": content, "path": "gone.png"},
        {"bytes": None, "path": "a.png"},
        (tmp_path / "a.png").as_uri(),
        {"path": f"file://localhost{tmp_path}/a.png"},
        f"data:image/png;base64,{base64.b64encode(content).decode()}",
        f"data:;base64,{base64.b64encode(content).decode()}",
    ):
        assert read_image(cell, tmp_path) == content
    image = picture(8, 8)
    assert read_image(image, None) is image


def test_paths_without_a_folder_are_relative_to_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert read_image("a.png", None) == b"x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_image("~/a.png", tmp_path / "elsewhere") == b"x"


@pytest.mark.parametrize(
    ("cell", "reason", "words"),
    [
        ("gone.png", "image_missing", "no such file in"),
        ("", "image_missing", "got ''"),
        (None, "image_missing", "got None"),
        ({"bytes": None, "path": None}, "image_missing", "got None"),
        (7, "image_missing", "got int"),
        ("https://example.com/a.png", "image_url", "a URL, and none is fetched"),
        ("hf://datasets/a/b.png", "image_url", "a URL"),
        (".", "image_unreadable", "directory"),
        ("a\0b", "image_unreadable", "null"),
        ("x" * 5000, "image_unreadable", "too long"),
        ("file:///gone/a.png", "image_missing", "no such file"),
        ("data:image/png;base64,&", "image_unreadable", "a data URI that cannot be read"),
        ("data:image/svg+xml,<svg/>", "image_unreadable", "not in base64"),
        ("data:", "image_unreadable", "not in base64"),
    ],
)
def test_cells_that_hold_no_image(tmp_path, cell, reason, words):
    found, text = bad(read_image, cell, tmp_path)
    assert found == reason
    assert words in text
    assert len(text) < 500


def test_digest_tells_images_apart():
    one, other = encoded(picture(8, 8, seed=1)), encoded(picture(8, 8, seed=2))
    assert digest([one]) == digest([one]) != digest([other])
    assert digest([one, other]) != digest([other, one])
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
    assert digest([picture(8, 4)]) != digest([picture(4, 8)])


# -- decoding


def rgb(raw):
    image, _ = decode_image(raw)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr"])
def test_modes_become_rgb(mode):
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    file_format = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    for raw in (image, encoded(image, file_format)):
        assert rgb(raw).shape == (4, 6, 3)
        assert rgb(raw).min() >= 250


def test_cmyk_keeps_its_colours():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    pixel = rgb(encoded(image, "JPEG", quality=95))[4, 4].astype(int)
    assert pixel[0] > 200
    assert pixel[1:].max() < 60


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled(file_format):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    raw = encoded(Image.fromarray(values), file_format)
    assert rgb(raw)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floats_are_scaled_from_one_or_taken_as_they_are():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert rgb(unit)[0, :, 0].tolist() == [0, 128, 255]
    bytes_ = Image.fromarray(np.array([[-3.0, 100.0, 300.0, np.nan]], dtype=np.float32))
    assert rgb(bytes_)[0, :, 0].tolist() == [0, 100, 255, 0]


def transparent(mode):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image.convert(mode)


def test_transparency_is_laid_on_white():
    assert rgb(transparent("RGBA")).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert rgb(transparent("LA"))[0, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    raw = encoded(palette, transparency=1)
    assert rgb(raw).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    keyed = encoded(Image.new("RGB", (1, 1), RED), transparency=RED)
    assert rgb(keyed).tolist() == [[[255, 255, 255]]]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    raw = encoded(image, "JPEG", exif=exif)
    assert decode_image(raw).image.size == (2, 4)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    raw = encoded(
        frames[0], file_format, save_all=True, append_images=frames[1:], **(
            {"lossless": True} if file_format == "WEBP" else {}
        )
    )  # fmt: skip
    image, is_animated = decode_image(raw)
    assert is_animated
    assert image.getpixel((0, 0)) == RED
    assert not decode_image(encoded(frames[0], file_format)).is_animated


def header_only_png(width, height):
    """A PNG that claims a size and has almost no pixels."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encoded(picture(64, 64), "JPEG")
PNG = encoded(picture(64, 64))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "image_empty"),
        (b"not an image", "image_unreadable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_unreadable"),
        (JPEG[: len(JPEG) // 2], "image_unreadable"),
        (PNG[: len(PNG) // 2], "image_unreadable"),
        (PNG[:40] + b"\xff" * 60 + PNG[100:], "image_unreadable"),
        (header_only_png(4, 4), "image_unreadable"),
        (header_only_png(0, 4), "image_empty"),
        (header_only_png(10_000, 10_000), "image_too_large"),
        (header_only_png(30_000, 30_000), "image_too_large"),
        (encoded(Image.new("RGB", (201, 1))), "image_too_elongated"),
        (Image.new("RGB", (0, 4)), "image_empty"),
        (Image.new("L", (1, 1000)), "image_too_elongated"),
    ],
)
def test_bad_images(raw, reason):
    found, text = bad(decode_image, raw)
    assert found in (reason, "image_unreadable" if reason == "image_empty" else reason)
    assert len(text.splitlines()) == 1


def test_the_limit_of_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_PIXELS", 100)
    assert decode_image(Image.new("RGB", (10, 10))).image.size == (10, 10)
    reason, text = bad(decode_image, Image.new("RGB", (11, 10)))
    assert reason == "image_too_large"
    assert "11 x 10, more than the limit of 100 pixels" in text


# -- sizes and patches


@pytest.mark.parametrize("budget", [(3136, 1003520), (28 * 28, 28 * 28 * 4), (65536, 16777216)])
@pytest.mark.parametrize("patch_size", [14, 16])
def test_sizes_are_the_processors_own(budget, patch_size):
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, min_pixels=budget[0], max_pixels=budget[1]
    )
    random = np.random.RandomState(0)
    for _ in range(300):
        width, height = (int(side) for side in np.exp(random.uniform(0, 7.5, 2)))
        if max(width, height) > 200 * min(width, height):
            continue
        fitted = fit_size(width, height, 2 * patch_size, *budget)
        count = processor.get_number_of_image_patches(height, width)
        assert fitted[0] * fitted[1] == count * patch_size**2, (width, height)


@pytest.mark.parametrize("least", [28 * 28, 56 * 56, 112 * 112, 65536])
def test_a_fitted_size_stays_as_it_is(least):
    """An engine's own processor then finds nothing to do, so it makes as many tokens as we do."""
    small = encoder(min_pixels=least, max_pixels=3 * least)
    random = np.random.RandomState(0)
    for _ in range(2000):
        width, height = (int(side) for side in np.exp2(random.uniform(0, 12, 2)))
        if max(width, height) > 200 * min(width, height):
            continue
        size = small.size_for(width, height)
        assert fit_size(*size, 28, least, 3 * least) == size
        assert size[0] % 28 == size[1] % 28 == 0


def test_patches_are_the_processors_own():
    """A single resizing with Pillow gives what transformers' processor makes of the whole image."""
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    ours = ImageEncoder(VisionTokens(0), processor)
    for width, height in [(300, 200), (20, 10), (28, 56), (500, 31)]:
        image = picture(width, height)
        made = ours.encode(image)
        theirs = processor(images=[image], return_tensors="pt")
        torch.testing.assert_close(made.patches, theirs["pixel_values"], rtol=0, atol=0)
        assert list(made.grid) == theirs["image_grid_thw"][0].tolist()
        assert made.patches.dtype == torch.float32
        assert made.image.size == ours.model_size(made)
        assert ours.num_tokens(made) * 28 * 28 == made.image.size[0] * made.image.size[1]


def test_long_side_is_limited_keeping_the_aspect():
    free = encoder(max_pixels=28 * 28 * 10_000)
    assert free.size_for(2800, 1400) == (2800, 1400)
    assert free.size_for(2800, 1400, max_side=560) == (560, 280)
    assert free.size_for(1400, 2800, max_side=560) == (280, 560)
    assert free.size_for(280, 140, max_side=560) == (280, 140)
    # So thin that the processor's rule, which comes second, must widen it again.
    assert free.size_for(2000, 10, max_side=100) == (280, 28)


def test_budget_of_pixels():
    assert encoder().size_for(2000, 2000) == (224, 224)  # 64 tokens, the processor's own
    assert encoder(max_pixels=28 * 28 * 4).size_for(2000, 2000) == (56, 56)
    assert encoder(min_pixels=112 * 112).size_for(10, 10) == (112, 112)
    for least, largest in [(None, 100), (3136, 9407)]:
        with pytest.raises(ImageError, match=r"at least \d+ and at most \d+ .*data\.min_image"):
            encoder(min_pixels=least, max_pixels=largest)


def test_processor_of_another_kind():
    with pytest.raises(ImageError, match="image processor is object; wanted one of the Qwen-VL"):
        ImageEncoder(VisionTokens(0), object())

    class Other(Qwen2VLImageProcessorPil):
        def __call__(self, images, **options):
            return {
                "pixel_values": torch.zeros(5, 3),
                "image_grid_thw": torch.tensor([[1, 1, 5]]),
            }

    with pytest.raises(ImageError, match="makes 5 patches in a grid of"):
        ImageEncoder(VisionTokens(0), Other()).encode(picture(56, 56))


# -- loading


def sources(**keys):
    source = SourceConfig(name="s", kind="sft", path="rows.jsonl", **keys)
    return DataConfig(sources=[source])


@pytest.mark.parametrize("model_type", MODELS)
def test_encoder_of_a_model_folder(tmp_path, model_type):
    save_vision_model(tmp_path, model_type)
    loaded = load_image_encoder(str(tmp_path), sources(images="image"))
    side = 2 * MODELS[model_type][1]
    image = loaded.encode(picture(3 * side, 2 * side))
    assert loaded.num_tokens(image) == 6
    assert loaded.model_size(image) == (3 * side, 2 * side)
    assert len(loaded.tokens.ids) == 4
    loaded.save(tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "preprocessor_config.json").read_text())
    assert written["patch_size"] == MODELS[model_type][1]


def test_budget_of_the_configuration(tmp_path):
    save_vision_model(tmp_path)
    config = sources(images="image").model_copy(update={"max_image_pixels": 28 * 28 * 9})
    assert load_image_encoder(str(tmp_path), config).size_for(999, 999) == (84, 84)


def test_text_model_with_images_is_refused_at_once(tmp_path):
    save_tiny_model(tmp_path)
    with pytest.raises(ImageError, match=r"'s' has `images`, but .* type 'llama', .*qwen2_5_vl"):
        load_image_encoder(str(tmp_path), sources(images="image"))
    assert load_image_encoder(str(tmp_path), sources()) is None


def test_vision_model_without_images_needs_no_processor(tmp_path):
    save_vision_model(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_image_encoder(str(tmp_path), sources()).tokens.image > 0
    with pytest.raises(ImageError, match="the image processor of .* could not be loaded"):
        load_image_encoder(str(tmp_path), sources(images="image"))


def test_processor_of_another_patch_size(tmp_path):
    save_vision_model(tmp_path, "qwen2_5_vl")
    Qwen2VLImageProcessorPil(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(ImageError, match="patch_size is 16 in preprocessor_config.json, and 14"):
        load_image_encoder(str(tmp_path), sources(images="image"))


def test_missing_model():
    with pytest.raises(ImageError, match="configuration of ./nowhere could not be loaded"):
        load_image_encoder("./nowhere", sources())

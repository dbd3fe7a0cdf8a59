"""Images of data rows: opened, checked, made RGB, resized, and cut into patches for the model.

A cell with images holds one image, a list of them, or nothing. An image is a path (or file://
URL), encoded bytes, a data URI, a PIL image, or what the `datasets` library stores, {"bytes": ...,
"path": ...}. What cannot be used raises `BadImage`: the row is skipped and counted under its
reason.

Resizing happens once, with Pillow, straight to the size that the model's processor would choose.
So patches are the same with torchvision and without, and an engine that runs a processor of its own
over the resized image finds nothing left to resize.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from recap_fast.config import DataConfig
from recap_fast.types import ImageInput, UserError

RawImage = bytes | Image.Image
"""An image before decoding, or one that a data set decoded already."""

MAX_FILE_PIXELS = 89_478_485
"""Pixels above which Pillow suspects a decompression bomb: 256 MiB of RGB."""

MAX_ASPECT_RATIO = 200
"""Long side to short side; the processors of the Qwen-VL models refuse more."""

_BUDGET_RATIO = 3
"""Largest to smallest area of a usable budget. Below 2 and a bit the processors' rule has no fixed
point for some images: what it makes of one it would resize again."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WHITE = (255, 255, 255, 255)


class ImageError(UserError):
    """Images are asked for that the model, or its processor, cannot take."""


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: what rows skipped because of it are counted under.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def image_cells(value: Any) -> list[Any]:
    """The images of a row's cell, undecoded; an empty cell has none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def read_image(cell: Any, folder: Path | None) -> RawImage:
    """The encoded bytes of an image, or the image itself where it is decoded already.

    Args:
        folder: what relative paths are relative to; None is the current folder.

    Raises:
        BadImage: missing, unreadable, a URL of another machine, or of a type that holds no image.
    """
    if isinstance(cell, Mapping):
        content = cell.get("bytes")
        cell = cell.get("path") if content is None else content
    if isinstance(cell, bytes | bytearray):
        return bytes(cell)
    if isinstance(cell, Image.Image):
        return cell
    if isinstance(cell, str) and cell.startswith("data:"):
        return _read_data_uri(cell)
    if isinstance(cell, str) and cell:
        return _read_file(cell, folder)
    shown = repr(cell) if cell is None or isinstance(cell, str) else type(cell).__name__
    raise BadImage(
        "image_missing", f"wanted a path, bytes, a PIL image or {{bytes, path}}, got {shown}"
    )


def _read_data_uri(uri: str) -> bytes:
    """The bytes in data:image/png;base64,..."""
    head, _, content = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage("image_unreadable", f"a data URI that cannot be read: {error}") from None


def _read_file(name: str, folder: Path | None) -> bytes:
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
    if _URL.match(name):
        raise BadImage("image_url", "a URL, and none is fetched: give files or bytes instead")
    path = (folder or Path()) / os.path.expanduser(name)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage("image_missing", f"no such file in {folder or Path()}") from None
    except OSError as error:
        raise BadImage("image_unreadable", f"the file cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL in it
        raise BadImage("image_unreadable", f"the file cannot be read: {error}") from None


def digest(images: Sequence[RawImage]) -> str:
    """What tells rows with the same question apart; the same for a file and for its bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    for image in images:
        content = image if isinstance(image, bytes) else image.tobytes()
        size = "" if isinstance(image, bytes) else f"{image.mode}{image.size}"
        hashed.update(f"{size}{len(content)}:".encode())
        hashed.update(content)
    return hashed.hexdigest()


class Decoded(NamedTuple):
    image: Image.Image  # RGB, upright
    is_animated: bool  # only its first frame is used


def decode_image(raw: RawImage) -> Decoded:
    """Decodes an image to upright RGB.

    16-bit greys are scaled to 8 bits (v / 257), floats in [0, 1] too; transparency is laid on
    white; EXIF's orientation is applied; of an animation the first frame is taken.

    Raises:
        BadImage: unreadable, truncated, without pixels, with too many, or too elongated.
    """
    if raw == b"":
        raise BadImage("image_empty", "the file is empty")
    try:
        with warnings.catch_warnings():  # Pillow's about its own limit: ours says more
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(raw)) if isinstance(raw, bytes) else raw
        _check_size(*image.size)
        # Two pictures in one JPEG (MPO) are a photo and its preview or depth, no animation.
        is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        image.seek(0)
        return Decoded(_to_rgb(ImageOps.exif_transpose(image)), is_animated)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("image_unreadable", "it is of no format that Pillow knows") from None
    except Image.DecompressionBombError:
        raise _too_large("more than twice") from None
    except Exception as error:  # decoders raise whatever they stumble over
        first = next(iter(str(error).splitlines()), "")
        raise BadImage(
            "image_unreadable", f"it cannot be decoded: {type(error).__name__}: {first[:200]}"
        ) from error


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("image_empty", f"its size is {width} x {height}")
    if width * height > MAX_FILE_PIXELS:
        raise _too_large(f"{width} x {height}, more than")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadImage(
            "image_too_elongated",
            f"its sides are {width} and {height}: models take ratios up to {MAX_ASPECT_RATIO}",
        )


def _too_large(amount: str) -> BadImage:
    return BadImage("image_too_large", f"it has {amount} the limit of {MAX_FILE_PIXELS} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "La":  # Pillow converts it to nothing but this
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, _WHITE)
    ground.alpha_composite(layer)
    return ground.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """[height, width] uint8. Pillow's own conversion cuts 16-bit values off at 255."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        values = values / 257  # 65535 -> 255
    elif values.min() >= 0 and values.max() <= 1:
        values = values * 255
    return np.rint(np.nan_to_num(values).clip(0, 255)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """Ids of the tokens that stand for images in a row."""

    image: int
    video: int | None = None
    start: int | None = None  # in front of an image
    end: int | None = None

    @property
    def ids(self) -> list[int]:
        """All of them. None may come from a row's own text."""
        return [x for x in (self.image, self.video, self.start, self.end) if x is not None]


class ImageEncoder:
    """Prepares images for one vision-language model of the Qwen-VL kind.

    Args:
        tokens: of the model.
        processor: transformers' image processor of the model; None where no row has images.
        min_pixels, max_pixels: budget of an image's area; None is the processor's own.

    Raises:
        ImageError: the processor is of another kind, or the budget is empty.
    """

    def __init__(
        self,
        tokens: VisionTokens,
        processor: Any,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.tokens = tokens
        self._processor = processor
        if processor is None:
            return
        try:
            self.patch_size = int(processor.patch_size)
            self.merge_size = int(processor.merge_size)
            self.min_pixels = int(min_pixels or processor.size["shortest_edge"])
            self.max_pixels = int(max_pixels or processor.size["longest_edge"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ImageError(
                f"model.path: its image processor is {type(processor).__name__}; wanted one of the "
                f"Qwen-VL kind, with patch_size, merge_size and a budget of pixels"
            ) from error
        if self.max_pixels < _BUDGET_RATIO * self.min_pixels:
            raise ImageError(
                f"an image's area would have to be at least {self.min_pixels} and at most "
                f"{self.max_pixels} pixels, but not all images can be resized to within less than "
                f"a factor of {_BUDGET_RATIO}: set both data.min_image_pixels and "
                f"data.max_image_pixels (unset, each is the model's own)"
            )

    @property
    def pixel_budget(self) -> tuple[int, int] | None:
        """Least and largest area of an image; None where no row has images."""
        return None if self._processor is None else (self.min_pixels, self.max_pixels)

    def size_for(self, width: int, height: int, max_side: int | None = None) -> tuple[int, int]:
        """Width and height at which the model sees an image of a given size.

        Args:
            max_side: a longer side is scaled down to it first, keeping the aspect.
        """
        longest = max(width, height)
        if max_side is not None and longest > max_side:
            width = max(1, round(width * max_side / longest))
            height = max(1, round(height * max_side / longest))
        size = (width, height)
        factor = self.patch_size * self.merge_size
        # Once does it for nearly all images. Elongated ones take a few rounds (at most 7 in tests)
        # until another processor would leave them as they are.
        for _ in range(16):
            fitted = fit_size(*size, factor, self.min_pixels, self.max_pixels)
            if fitted == size:
                break
            size = fitted
        return size

    def encode(self, image: Image.Image, max_side: int | None = None) -> ImageInput:
        """Resizes an RGB image and cuts it into patches.

        Raises:
            ImageError: the processor cuts it otherwise than the Qwen-VL models'.
        """
        width, height = size = self.size_for(*image.size, max_side)
        if image.size != size:
            image = image.resize(size, Image.Resampling(self._processor.resample))
        output = self._processor(images=[image], do_resize=False, return_tensors="pt")
        patches, grid = output["pixel_values"], tuple(output["image_grid_thw"][0].tolist())
        wanted = (1, height // self.patch_size, width // self.patch_size)
        if grid != wanted or len(patches) != math.prod(wanted):
            raise ImageError(
                f"model.path: its image processor, {type(self._processor).__name__}, makes "
                f"{len(patches)} patches in a grid of {grid} of an image of {width} x {height}; "
                f"wanted {wanted}, as the Qwen-VL models' make"
            )
        return ImageInput(image=image, patches=patches, grid=grid)

    def num_tokens(self, image: ImageInput) -> int:
        """Image tokens that stand for an image in a row's token ids."""
        return math.prod(image.grid) // self.merge_size**2

    def model_size(self, image: ImageInput) -> tuple[int, int]:
        """Width and height, in pixels, of an image as the model sees it."""
        return image.grid[2] * self.patch_size, image.grid[1] * self.patch_size

    def save(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json, so that a checkpoint can be loaded as a model."""
        if self._processor is not None:
            self._processor.save_pretrained(folder)


def fit_size(
    width: int, height: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Nearest width and height that are multiples of `factor`, with an area within a budget and
    nearly the same aspect: the rule of transformers' Qwen-VL image processors."""
    columns, rows = round(width / factor), round(height / factor)
    area = columns * rows * factor**2
    if area > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        columns = max(1, math.floor(width / shrink / factor))
        rows = max(1, math.floor(height / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        columns, rows = math.ceil(width * grow / factor), math.ceil(height * grow / factor)
    return columns * factor, rows * factor


def load_image_encoder(path: str, config: DataConfig) -> ImageEncoder | None:
    """The encoder of a vision-language model; None for a text model.

    Args:
        path: the model's folder or hub name, with config.json and, where a source has images,
            preprocessor_config.json.

    Raises:
        ImageError: a source has images, and the model takes none or has no usable processor.
    """
    from transformers import AutoConfig

    from recap_fast.model.vision import MODEL_TYPES, is_vision_language

    model = _load(AutoConfig, path, "configuration")
    with_images = [source.name for source in config.sources if source.images is not None]
    if not is_vision_language(model):
        if with_images:
            raise ImageError(
                f"data.sources: {with_images[0]!r} has `images`, but the model {path} is of type "
                f"{model.model_type!r}, which takes none here; those that do are "
                f"{', '.join(MODEL_TYPES)}"
            )
        return None
    names = ("video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = VisionTokens(model.image_token_id, *(getattr(model, name, None) for name in names))
    processor = _load_processor(path, model) if with_images else None
    return ImageEncoder(
        tokens,
        processor,
        min_pixels=config.min_image_pixels,
        max_pixels=config.max_image_pixels,
    )


def _load_processor(path: str, model: Any) -> Any:
    from transformers import AutoImageProcessor

    # The Pillow one, whether torchvision is there or not: rescaling, normalising and cutting into
    # patches is all that is left to it.
    processor = _load(AutoImageProcessor, path, "image processor", backend="pil")
    vision = model.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    for name, wanted in sizes.items():
        given = getattr(processor, name, None)
        if given != wanted:
            raise ImageError(
                f"model.path: {path}: {name} is {given} in preprocessor_config.json, and {wanted} "
                f"in config.json"
            )
    return processor


def _load(auto_class: Any, path: str, what: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImageError(
            f"model.path: the {what} of {path} could not be loaded: {first}"
        ) from error

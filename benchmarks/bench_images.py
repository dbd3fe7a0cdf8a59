"""Time that preparing an image takes: decoding, then resizing and cutting into patches.

Processor time of one thread, so that other work on the machine does not count. The images are the
sizes of common data sets, the budget that of examples/recap-qwen2.5-vl-7b-hybrid.yaml.

    python benchmarks/bench_images.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from recap_fast.data.images import ImageEncoder, VisionTokens, decode_image

CASES = [(224, 224, "PNG"), (512, 512, "JPEG"), (512, 512, "PNG"), (640, 480, "JPEG"),
         (1920, 1080, "JPEG")]  # fmt: skip
MAX_PIXELS = 401_408
ROUNDS = 15


def make_image(width: int, height: int, file_format: str) -> bytes:
    """Smooth random colours, which compress about as photographs do."""
    pixels = np.random.RandomState(0).randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, file_format
    )
    return buffer.getvalue()


def median_milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)
    encoder = ImageEncoder(VisionTokens(0), processor, max_pixels=MAX_PIXELS)
    print("| image | seen as | image tokens | decode, ms | resize and patches, ms |")
    print("| --- | --- | --- | --- | --- |")
    for width, height, file_format in CASES:
        raw = make_image(width, height, file_format)
        image = decode_image(raw).image
        encoded = encoder.encode(image)
        seen = "{} x {}".format(*encoder.model_size(encoded))
        decode = median_milliseconds(lambda raw=raw: decode_image(raw))
        encode = median_milliseconds(lambda image=image: encoder.encode(image))
        print(
            f"| {width} x {height} {file_format} | {seen} | {encoder.num_tokens(encoded)} | "
            f"{decode:.1f} | {encode:.1f} |"
        )


if __name__ == "__main__":
    main()

"""Random changes of an image: what it shows stays the same.

Images are uint8 [h, w, c] with 1 or 3 channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Rng = np.random.Generator
# How pixels are computed from those of another size, by name.
RESAMPLES = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def to_pillow(image: np.ndarray) -> Image.Image:
    """The same for Pillow, which has no channel axis for one."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_array(image: Image.Image) -> np.ndarray:
    """The same as an array."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Grey as red, green and blue or the reverse; [h, w] has one channel."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[-1] == channels:
        return image
    return to_array(to_pillow(image).convert("L" if channels == 1 else "RGB"))


def resized(
    image: np.ndarray,
    size: int,
    box: tuple[float, ...] | None = None,
    resample: str = "bilinear",
) -> np.ndarray:
    """The image, or the part (left, upper, right, lower) of it, as a square."""
    if box is None and image.shape[:2] == (size, size):
        return image
    how = RESAMPLES[resample]
    return to_array(to_pillow(image).resize((size, size), how, box))


def shifted(image: np.ndarray, most: int, rng: Rng) -> np.ndarray:
    """Moved by up to `most` pixels a side: padding with 0, then a random crop."""
    (height, width), out = image.shape[:2], np.zeros_like(image)
    down, right = rng.integers(-most, most + 1, 2).tolist()
    out[max(0, down) : height + down, max(0, right) : width + right] = image[
        max(0, -down) : height - down, max(0, -right) : width - right
    ]
    return out


def random_box(height: int, width: int, rng: Rng) -> tuple[float, ...]:
    """A part of 8 to 100 % of the area, 3:4 to 4:3 (Szegedy et al. 2015, 6)."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return (left, upper, left + w, upper + h)
    return central_box(height, width, 1.0)


def central_box(height: int, width: int, share: float) -> tuple[float, ...]:
    """The middle square whose side is `share` of the shorter side."""
    side = share * min(height, width)
    left, upper = (width - side) / 2, (height - side) / 2
    return (left, upper, left + side, upper + side)


def _affine(matrix: Callable[[float, int, int], tuple]) -> Callable:
    """Output pixel (x, y) is the input's (a x + b y + c, d x + e y + f)."""
    return lambda image, m: image.transform(
        image.size, Image.Transform.AFFINE, matrix(m, *image.size)
    )


def _enhance(kind: Callable) -> Callable:
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


# Name: (image, strength in [-1, 1]) -> image; Cubuk et al. 2020, 3, with the ranges of
# AutoAugment (Cubuk et al. 2019, table 6). Where a sign means nothing, it is ignored.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, m: image,
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "rotate": lambda image, m: image.rotate(30 * m),
    "solarize": lambda image, m: ImageOps.solarize(image, 256 * (1 - abs(m))),
    "posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda m, w, h: (1, 0.3 * m, 0, 0, 1, 0)),
    "shear_y": _affine(lambda m, w, h: (1, 0, 0, 0.3 * m, 1, 0)),
    "translate_x": _affine(lambda m, w, h: (1, 0, 0.45 * m * w, 0, 1, 0)),
    "translate_y": _affine(lambda m, w, h: (1, 0, 0, 0, 1, 0.45 * m * h)),
}


def rand_augment(
    image: np.ndarray, count: int, magnitude: float, rng: Rng
) -> np.ndarray:
    """`count` random operations, each of strength `magnitude` of 10 either way."""
    changed, table = to_pillow(image), list(OPERATIONS.values())
    for i in rng.integers(len(table), size=count):
        changed = table[i](changed, magnitude / 10 * rng.choice((-1, 1)))
    return to_array(changed)


def check_pixels(config: Any) -> None:
    """ValueError unless a data config says images of one size that can be made."""
    config.require(config.size >= 1, "size", "must be at least 1")
    config.require(config.channels in (1, 3), "channels", "must be 1 or 3")
    many = f"must be one number or {config.channels}, one a channel"
    config.require(len(config.mean) in (1, config.channels), "mean", many)
    config.require(len(config.std) in (1, config.channels), "std", many)
    config.require(min(config.std) > 0, "std", "must be positive")
    rule = f"expected one of {', '.join(RESAMPLES)}"
    config.require(config.resample in RESAMPLES, "resample", rule)

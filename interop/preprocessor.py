"""preprocessor_config.json: how images become numbers, to our settings and back.

Theirs is (pixel * factor - mean) / std of pixels in [0, 255], ours (pixel / 255 - mean)
/ std; both say the same with other numbers.
"""

import math
from collections.abc import Mapping
from typing import Any

from triform.data.datasets import ImagesConfig
from triform.data.datasets.augment import RESAMPLES

NAME = "preprocessor_config.json"
DEFAULT = 1 / 255
# What describes the file, or is read below.
KNOWN = (
    *("image_processor_type", "feature_extractor_type", "processor_class"),
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "return_tensors", "data_format"),
    *("input_data_format", "device", "disable_grouping", "_valid_processor_keys"),
    *("do_convert_rgb", "default_to_square"),  # channels are the model's
)


def taken(given: Mapping[str, Any], data: ImagesConfig) -> list[str]:
    """Sets pixels and resampling of `data`; a line for each key that is not taken."""
    if not given:
        return []
    left = {k: x for k, x in given.items() if k not in KNOWN and x}
    if "do_center_crop" not in left:
        left = {k: x for k, x in left.items() if "crop" not in k}
    factor = 1.0
    if given.get("do_rescale", True):
        factor = given.get("rescale_factor") or DEFAULT
    mean, std = [0.0], [1.0]
    if given.get("do_normalize", True):
        mean = _list(given.get("image_mean"), 0.5)
        std = _list(given.get("image_std"), 0.5)
    scale = 1.0 if math.isclose(factor, DEFAULT, rel_tol=1e-6) else 1 / (255 * factor)
    before = data.mean, data.std, data.resample
    data.mean = tuple(x * scale for x in mean)
    data.std = tuple(x * scale for x in std)
    lines = [f"{key}={value!r} is not taken" for key, value in left.items()]
    if given.get("do_resize", True):
        names = [k for k, x in RESAMPLES.items() if x == given.get("resample", 2)]
        if names:
            data.resample = names[0]
        else:
            lines.append(f"resample={given['resample']!r} is not taken: no such filter")
        if _side(given.get("size")) not in (None, data.size):
            lines.append(
                f"size={given['size']!r} is not taken: images are squares of "
                f"model.image_size={data.size}"
            )
    try:
        data.validate()
    except ValueError as error:
        data.mean, data.std, data.resample = before
        lines.append(
            f"image_mean={given.get('image_mean')!r} and "
            f"image_std={given.get('image_std')!r} are not taken: {error}"
        )
    return [f"{NAME}: {line}" for line in lines]


def _list(value: Any, default: float) -> list[float]:
    value = default if value is None else value
    return [float(x) for x in value] if isinstance(value, list) else [float(value)]


def _side(size: Any) -> Any:
    """The side of a square; None if nothing is said; another value is no square."""
    if isinstance(size, Mapping):
        sides = {x for x in (size.get("height"), size.get("width")) if x}
        return sides.pop() if len(sides) == 1 else size
    return size


def given_back(data: ImagesConfig, original: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of `data`: the original as far as it holds."""
    same = ImagesConfig(size=data.size, channels=data.channels)
    taken(original, same)
    ours = data.mean, data.std, data.resample
    if original and ours == (same.mean, same.std, same.resample):
        return dict(original)
    count = data.channels
    return {
        "image_processor_type": "ViTImageProcessor",
        **original,
        "do_resize": True,
        "size": {"height": data.size, "width": data.size},
        "resample": int(RESAMPLES[data.resample]),
        "do_rescale": True,
        "rescale_factor": DEFAULT,
        "do_normalize": True,
        "image_mean": list(data.mean) * (count // len(data.mean)),
        "image_std": list(data.std) * (count // len(data.std)),
    }

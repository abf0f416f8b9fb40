"""Folders of pictures: how they are decoded, what their classes and splits are."""

import json
import shutil

import numpy as np
import own_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from triform.answers.inputs import of_file
from triform.data import sources
from triform.data.codecs import files as codec_files
from triform.data.datasets import ImagesConfig
from triform.data.sources import Reading
from triform.data.sources.pictures import decoded
from triform.input_pipeline import Split
from triform.runtime.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
TURNED = {  # value of EXIF's orientation -> how the stored pixels are to be turned
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_upright(tmp_path, orientation):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    found = decoded(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, TURNED[orientation](PIXELS))


def modes():
    """Name -> (picture, what is expected of it)."""
    image = Image.fromarray(PIXELS)
    grey = image.convert("L")
    few = Image.fromarray(PIXELS // 64 * 64)
    clear = image.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    white = PIXELS.copy()
    white[0, 0] = 255
    half = grey.convert("LA")
    half.putpixel((1, 0), (0, 128))
    wide = np.arange(24, dtype=np.uint16).reshape(6, 4) * 2730
    shown = np.asarray(grey)[..., None].copy()
    shown[0, 1] = 127
    return {
        "rgb.png": (image, PIXELS),
        "grey.png": (grey, np.asarray(grey)[..., None]),
        "palette.png": (few.convert("P", palette=1, colors=256), None),
        "alpha.png": (clear, white),
        "grey_alpha.png": (half, shown),
        "16.png": (Image.fromarray(wide), (wide >> 8).astype(np.uint8)[..., None]),
        "bits.png": (grey.convert("1"), np.asarray(grey.convert("1"))[..., None] * 255),
        "cmyk.tif": (image.convert("CMYK"), PIXELS),
        "rgb.bmp": (image, PIXELS),
        "rgb.webp": (image, PIXELS),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_gives_eight_bits(tmp_path, name):
    image, expected = modes()[name]
    options = {"lossless": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, **options)
    found = decoded(str(tmp_path / name))
    if expected is None:  # a palette has few colours: as Pillow shows them
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(found, expected)


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: holds floating-point values; save"):
        decoded(str(tmp_path / "a.tif"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "own"


def write(folder, name, shape=(8, 8, 3)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def opened(folder, split="train", **fields):
    config = ImagesConfig(source=str(folder), size=8, held_out=0.2, **fields)
    sizes = {"num_labels": 3}
    codecs = codec_files.build(config, sizes)
    return Split.open(config, codecs, split, sizes), codecs


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 7, 3)])
def test_class_folders_and_tables_give_the_same(folder, tmp_path, shape):
    rows = []
    for i in range(24):
        name = f"{'abc'[i % 3]}/{i:02}.png"
        write(folder, name, shape if i % 2 else (8, 8, 3))
        rows.append({"file_name": f"{i:02}.png", "label": "abc"[i % 3]})
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        shutil.copy(path, flat)
    rows.sort(key=lambda row: (row["label"], row["file_name"]))  # as folders come
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (flat / "metadata.jsonl").write_text(text)
    inside = [
        {"label": x["label"], "image": (flat / x["file_name"]).read_bytes()}
        for x in rows
    ]
    table = tmp_path / "inside.parquet"
    own_files.parquet(table, inside)
    for split in ("train", "validation", "test"):
        one, codecs = opened(folder, split)
        for place in (flat, table):
            other, same = opened(place, split)
            assert codecs["label"].names == same["label"].names == ("a", "b", "c")
            assert one.dataset.digest == other.dataset.digest
            for (_, x), (_, y) in zip(
                one.batches.evaluation(), other.batches.evaluation(), strict=True
            ):
                for key in x:
                    np.testing.assert_array_equal(x[key], y[key], key)


def test_a_table_of_datasets_has_names_of_classes_and_pictures_beside_paths(folder):
    folder.mkdir()
    names = {"names": ["no", "yes"], "_type": "ClassLabel"}
    about = {"features": {"y": names, "x": {"_type": "Image"}}}
    paths = [write(folder / "drawn", f"{i}.png") for i in range(9)]
    rows = [
        {"x": {"bytes": p.read_bytes(), "path": p.name}, "y": i % 2}
        for i, p in enumerate(paths)
    ]
    found = pa.Table.from_pylist(rows)
    found = found.replace_schema_metadata({"huggingface": json.dumps({"info": about})})
    pq.write_table(found, folder / "train.parquet")
    table = str(folder / "train.parquet")
    split, codecs = opened(table, image="x", label="y")
    assert codecs["label"].names == ("no", "yes")
    first = split.dataset.example(0)
    (same,) = (p for p in paths if np.array_equal(decoded(str(p)), first["x"]))
    assert split.dataset.describe(0).startswith(f"{table}, row {int(same.stem) + 1} (")
    # A request may be a row of such a table.
    asked = split.dataset.requests(split.batches.config, codecs, {"num_labels": 2})
    item = asked.read(rows[int(same.stem)])
    np.testing.assert_array_equal(item.parts[0], first["x"])
    assert next(of_file(table)).repeated() == {"x": "0.png", "y": 0}


def test_folders_of_splits(folder):
    for split in ("train", "val", "test"):
        for i in range(6):
            write(folder, f"{split}/{'ab'[i % 2]}/{i}.png")
    source = sources.source(str(folder), reading=Reading())
    assert source.splits() == ("train", "validation", "test", "all")
    assert source.classes("label") == ("a", "b")
    assert [len(source.examples(x)) for x in source.splits()] == [6, 6, 6, 18]
    found = source.examples("test")[1]
    assert (found["image"].shape, found["label"]) == ((8, 8, 3), "a")
    assert source.where("test", 1).endswith("test/a/2.png")


def test_a_class_that_training_lacks_is_named_before_the_first_step(folder):
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(9)]
    for name in (*names, "test/a/1.png", "test/c/1.png"):
        write(folder, name, (8, 9 if "c" in name else 8, 3))
    with pytest.raises(
        DataError, match=r"test/c/1.png .*is 'c', none of the 2 classes"
    ):
        opened(folder, "test")


def test_pictures_are_known_by_content_and_label(folder, tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        write(folder, name)

    def known(path):
        source = sources.source(str(path), reading=Reading(held_out=0.0))
        return source.fingerprint("train")

    first = known(folder)
    assert known(shutil.copytree(folder, tmp_path / "moved")) == first
    (folder / "train" / "b").rename(folder / "train" / "c")
    assert known(folder) != first


def test_equal_pictures_are_in_one_split(folder):
    for i in range(30):
        path = write(folder, f"a/{i}.png")
        shutil.copy(path, folder / "a" / f"copy {i}.png")
    source = sources.source(str(folder), reading=Reading(held_out=0.2))
    found = {}
    for split in ("train", "validation", "test"):
        for row in source.examples(split):
            found.setdefault(row["image"].tobytes(), set()).add(split)
    assert len(found) == 30
    assert all(len(splits) == 1 for splits in found.values())

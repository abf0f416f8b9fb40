"""Music from folders of MIDI files: trained, scored, continued, harmonised, written."""

import dataclasses
import io
import time

import jax
import mido
import numpy as np
import pytest
from PIL import Image
from test_music import piece, write

from triform import evaluate, generate, train
from triform.answers.inputs import Asked
from triform.answers.music_files import MusicFiles, picture
from triform.answers.output import Output
from triform.configs import music
from triform.configs.schema import smoke, update
from triform.data.codecs.music import LAST
from triform.data.music import SILENT, Music
from triform.models import decode
from triform.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pieces of some 20 steps, one of them to evaluate and one to test."""
    folder = tmp_path_factory.mktemp("midi")
    names = ["train/a", "train/b", "train/c", "train/d", "validation/a", "test/a"]
    for number, name in enumerate(names):
        write(folder, f"{name}.mid", piece(16 + 2 * number, number))
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """(variant of configs/music.py) -> its workdir, tiny and trained four steps."""
    found, parent = {}, tmp_path_factory.mktemp("runs")

    def make(variant):
        if variant not in found:
            config = music.get_config(variant)
            smoke(config, split="train")
            cache = str(parent / "cache")
            update(config, {"data.source": str(folder), "data.cache_dir": cache})
            update(config, {"data.eval_split": "validation", "data.batch_size": 4})
            update(config, {"data.test_split": "test", "steps": 4})
            found[variant] = str(parent / (variant or "voices"))
            scores = train.run(config, found[variant])
            assert np.isfinite(scores["test/loss"])
        return found[variant]

    return make


@pytest.fixture
def opening(folder):
    return write(folder.parent, "opening.mid", piece(3, 11))


def outputs_of_full_passes(sampler, ids, steps):
    """Greedy tokens after ids, by a full pass for each, with what turns allow."""
    codec, opened = sampler.kind.codec, sampler.run
    apply = jax.jit(opened.experiment.model.apply)
    found = [*ids]
    for _ in range(steps):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(found)] = found
        logits = apply(opened.variables, {"inputs": row})["targets"][0]
        logits = np.array(logits[len(found) - 1])
        turn = (len(found) - 1) % codec.period
        logits[~codec.allowed()[turn]] = decode.NEVER
        found.append(int(logits.argmax()))
        if found[-1] == LAST:
            break
    return found[len(ids) :]


SLOW = ((0, 900_000),)


def slow(path):
    """Music of a file at another tempo."""
    return dataclasses.replace(Music.of_midi(path), tempi=SLOW)


@pytest.mark.parametrize("variant", ["", "midi"])
def test_openings_are_continued_as_full_passes_say(run, opening, variant):
    sampler = generate.Sampler(run(variant), method="greedy")
    (ids,) = sampler.kind.read(opening).parts
    steps = min(8, 33 - len(ids))
    expected = outputs_of_full_passes(sampler, ids, steps)
    asked = slow(opening) if variant == "" else opening
    (output,) = sampler([asked], max_tokens=steps)
    # What counts beats keeps the tempo; events are in time.
    assert output.music.tempi == (asked.tempi if variant == "" else ())
    codec = sampler.kind.codec
    whole = codec.decode(np.array([*ids[1:], *expected], np.int32))
    np.testing.assert_array_equal(output.music.notes, whole.notes)
    assert output.finish == ("end" if expected[-1] == LAST else "length")


def test_samples_keep_the_opening_and_outgrow_the_context(run, opening):
    sampler = generate.Sampler(run(""), method="sample")
    options = {"max_tokens": 80, "num_samples": 3, "seed": 5}
    found = sampler(["", opening], **options)
    grid = Music.of_midi(opening).voices(4)
    for output in found:
        assert len(output.samples) == 3
        lengths = [x.music.length for x in output.samples]
        ends = [x.finish == "end" for x in output.samples]
        first = 3 if output is found[1] else 0
        assert all(n == 20 + first or e for n, e in zip(lengths, ends, strict=True))
    for sample in found[1].samples:
        np.testing.assert_array_equal(sample.music.voices(4)[:3], grid)
    # Alone, in another batch, and again: the same.
    (alone,) = sampler([opening], **(options | {"num_samples": 1}))
    (again,) = sampler([opening], **(options | {"num_samples": 1}))
    np.testing.assert_array_equal(alone.music.notes, again.music.notes)
    (second,) = sampler(["", opening], **options)[1:]
    for a, b in zip(second.samples, found[1].samples, strict=True):
        np.testing.assert_array_equal(a.music.notes, b.music.notes)


def test_rolls_are_continued_as_full_passes_say(run, opening):
    sampler = generate.Sampler(run("quarter"), method="greedy")
    roll = sampler.kind.read(opening).parts[0]
    apply = jax.jit(sampler.run.experiment.model.apply)
    for _ in range(4):
        frames = np.zeros((1, 32, 88), np.float32)
        frames[0, : len(roll)] = roll
        logits = apply(sampler.run.variables, {"frames": frames})["frames"][0]
        roll = np.concatenate([roll, logits[None, len(roll) - 1] > 0])
    (output,) = sampler([slow(opening)], max_tokens=4)
    assert output.music.tempi == SLOW
    expected = Music.of_roll(roll[1:], 1)
    np.testing.assert_array_equal(output.music.notes, expected.notes)
    drawn = generate.Sampler(run("quarter"))([""], max_tokens=9, num_samples=2)[0]
    assert [x.music.length for x in drawn.samples] == [9, 9]


@pytest.mark.parametrize("steps", [6, 20])
def test_a_soprano_is_kept_and_the_other_voices_are_found(run, folder, steps):
    """Rows have 8 steps: a longer melody is filled window after window."""
    grid = piece(steps, 12)
    grid[2:4] = SILENT  # rests of the soprano are its own
    true = grid.copy()
    grid[:, 1:] = SILENT
    sampler = generate.Sampler(run("harmonise"))
    melody = write(folder.parent, "soprano.mid", grid)
    (output,) = sampler([slow(melody)], num_samples=2, seed=1)
    for sample in output.samples:
        assert sample.music.tempi == SLOW
        found = sample.music.voices(4)
        assert found.shape == true.shape
        np.testing.assert_array_equal(found[:, 0], true[:, 0])
        assert ((found[:, 1:] >= 21) | (found[:, 1:] == SILENT)).all()
        assert (found[:, 1:] != SILENT).any(0).all()
    first, second = (x.music.notes for x in output.samples)
    assert not np.array_equal(first, second)
    (whole,) = sampler([Music.of_voices(true)])
    np.testing.assert_array_equal(whole.music.voices(4), true)
    assert "all voices are there" in whole.warnings[0]
    (empty,) = sampler([""])
    assert empty.music is None and "empty" in empty.warnings[0]


@pytest.mark.parametrize("variant", ["", "quarter", "harmonise"])
def test_every_window_is_scored_once(run, variant):
    result = evaluate.run(run(variant), "validation", predictions=True)
    rows = [x["example"] for x in result.predictions]
    assert rows == list(range(len(rows))) and rows
    assert np.isfinite(result.numbers()["validation/loss"])


def test_pieces_are_written_as_midi_with_a_picture(run, opening, tmp_path):
    sampler = generate.Sampler(run(""), method="sample")
    (output,) = sampler([opening], max_tokens=16, num_samples=3)
    path = tmp_path / "new" / "bach.mid"
    file = MusicFiles(str(path))
    file.open()
    file.write(output.row(sampler.gives))
    file.close()
    names = sorted(x.name for x in path.parent.iterdir())
    assert names == ["bach.png", "bach_1.mid", "bach_2.mid", "bach_3.mid"]
    for number, sample in enumerate(output.samples, 1):
        found = Music.of_midi(str(path.parent / f"bach_{number}.mid"))
        np.testing.assert_array_equal(found.notes, sample.music.notes)
        tracks = mido.MidiFile(path.parent / f"bach_{number}.mid").tracks
        assert len(tracks) == 5  # and one of the tempo
    with Image.open(path.parent / "bach.png") as image:
        assert image.width > 4 * 7 and image.height > 3 * 88
    with pytest.raises(UserError, match=r"is there already; .* --overwrite"):
        MusicFiles(str(path))
    single = MusicFiles(str(path), overwrite=True)
    single.write({"music": output.samples[0].music})
    single.close()
    assert path.exists()


def test_a_long_piece_has_several_lines_in_its_picture():
    notes = [[t, t + 4, 60 + t % 5, 80, 0] for t in range(0, 1000, 4)]
    with Image.open(io.BytesIO(picture([Music.of_notes(notes, 1000)]))) as image:
        width, height = image.size
    assert 1000 < width < 1100  # pixels: 256 16ths of 4
    assert height > 4 * 8 * 4  # four lines, of 8 keys of 4


def test_a_file_of_music_says_what_was_written_and_all_warnings(tmp_path, monkeypatch):
    log, file = io.StringIO(), MusicFiles(str(tmp_path / "a.mid"))
    report = generate.Report("a.mid", file.rows, log)
    monkeypatch.setattr(generate, "QUIET", 0.01)
    with report.going_on():
        while "a.mid: 0 answers so far" not in log.getvalue():
            time.sleep(0.01)
    for i, warnings in enumerate((("failed: torn",), ("failed: no music",), ())):
        output = Output(music=Music.of_notes([], 4) if i == 2 else None)
        output.warnings = warnings
        report(Asked("x", f"input {i}"), output)
        file.write(output.row(("music",)))
    report.close(file.close())
    said = log.getvalue()
    for part in ("input 0: failed: torn", "input 1: failed: no music", "2 of 3"):
        assert part in said
    assert "rows" not in said and "a.png" in said and "a.mid: 3 answers" in said
    empty = io.StringIO()
    report = generate.Report("", False, empty)
    report(Asked("", "input 1"), Output(warnings=("empty: nothing",)))
    report.close()
    assert "every input is empty" in empty.getvalue()


def test_mistakes_are_one_line(run, folder):
    sampler = generate.Sampler(run(""))
    (output,) = sampler(["a minuet"])
    assert "no MIDI file" in output.warnings[0] and output.music is None
    with pytest.raises(UserError, match=r"ends in \.mid"):
        generate.check_output(sampler, "runs/x", "", generate.JsonLines)
    with pytest.raises(UserError, match="continued by greedy or sample"):
        generate.Sampler(run(""), method="beam")

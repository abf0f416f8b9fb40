"""Music as notes, tokens, rolls and MIDI files: what is written is read back."""

import itertools
import pathlib
import re

import mido
import numpy as np
import pytest

from triform import tasks
from triform.answers.composing import reads
from triform.data import datasets, sources
from triform.data.codecs.music import FIRST, LAST, MASK, MidiEvents, VoiceTokens
from triform.data.datasets import (
    EVALUATION,
    Epoch,
    FramesConfig,
    MusicInpaintingConfig,
    MusicTokensConfig,
)
from triform.data.music import END, PITCH, SILENT, START, VOICE, Music
from triform.input_pipeline import Batches, TrainBatches
from triform.runtime.errors import DataError
from triform.tasks import Context, FramePredictionConfig

SIZES = {"vocab_size": VoiceTokens.size, "num_types": 4, "num_keys": 88}
# Ties (62 62), silence in the middle, a repeated rest, a voice that crosses another.
GRID = np.array(
    [
        [72, 67, 60, 48],
        [72, 67, SILENT, 48],
        [74, 67, SILENT, 50],
        [SILENT, 69, 62, 50],
        [74, 76, 62, SILENT],
    ]
)


def piece(steps, seed=0, spread=4):
    """A chorale of notes some steps long, up to `spread` semitones from the middle."""
    rng = np.random.default_rng(seed)
    lines = np.array([72, 65, 58, 46]) + rng.integers(-spread, spread + 1, (steps, 4))
    return np.repeat(lines, rng.integers(1, 4, steps), 0)[:steps]


def write(folder, name, grid, resolution=4):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Music.of_voices(grid, resolution).to_midi())
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Pieces of 5, 9 and 40 steps to train on, one of 12 to evaluate, one to test."""
    for number, (steps, spread) in enumerate(((5, 1), (9, 1), (40, 5))):
        write(tmp_path, f"train/{number}.mid", piece(steps, number, spread))
    write(tmp_path, "validation/a.mid", piece(12, 7))
    write(tmp_path, "test/a.mid", piece(8, 8))
    return tmp_path


def opened(config, split="train"):
    config.validate()
    return datasets.dataset(config, split, {}, SIZES)


def of_kind(kind, folder, **fields):
    return kind(source=str(folder), cache_dir=str(folder / "cache"), **fields)


# --- Grids, rolls, tokens ---


def test_voices_with_silence_and_ties_come_back():
    music = Music.of_voices(GRID)
    np.testing.assert_array_equal(music.voices(4), GRID)
    soprano = music.notes[music.notes[:, VOICE] == 0]
    assert soprano[:, [START, END, PITCH]].tolist() == [
        [0, 2, 72],
        [2, 3, 74],
        [4, 5, 74],
    ]
    codec = VoiceTokens()
    ids = codec.encode(music)
    assert ids.shape == (20,) and ids[6] == codec.rest
    np.testing.assert_array_equal(codec.decode(ids).voices(4), GRID)
    assert codec.decode(ids[:-1]).length == 4  # whole steps
    assert all(codec.allowed()[i % 4, x] for i, x in enumerate(ids))


def test_a_piece_that_ends_in_silence_keeps_its_length():
    grid = np.concatenate([GRID, np.full((3, 4), SILENT)])
    music = Music.of_voices(grid)
    np.testing.assert_array_equal(music.voices(4), grid)
    assert music.roll(4).shape == (8, 88)


def test_rolls_come_back():
    roll = np.random.default_rng(0).random((9, 88)) < 0.2
    np.testing.assert_array_equal(Music.of_roll(roll).roll(), roll)
    found = Music.of_voices(GRID).roll(4)
    for step, row in zip(GRID, found, strict=True):
        expected = sorted(step[step != SILENT].tolist())
        assert (np.flatnonzero(row) + 21).tolist() == expected


def test_grids_of_other_fractions_take_what_sounds_then():
    music = Music.of_notes([[0, 96, 60, 80, 0], [96, 100, 62, 80, 0]], 192, 96)
    # The short note still has a step, and a quarter is four 16ths.
    assert music.voices(1, 1)[:, 0].tolist() == [60, 62]
    assert music.voices(1, 4)[:, 0].tolist() == [60] * 4 + [62] + [SILENT] * 3


def test_of_more_voices_than_wanted_the_highest_come_first():
    music = Music.of_voices(np.array([[50, 70, 60]]))
    assert music.voices(2)[0].tolist() == [70, 60]
    assert music.voices(3)[0].tolist() == [50, 70, 60]


def test_a_pitch_that_no_piano_has_is_named():
    with pytest.raises(DataError, match="pitch 12 .* 21 to 108"):
        VoiceTokens().encode(Music.of_voices(np.array([[12, 50, 50, 50]])))


def test_events_come_back_to_a_hundredth_of_a_second():
    # 480 ticks a quarter, 120 a minute: 9.6 ticks are a step.
    notes = [[0, 480, 60, 40, 0], [480, 720, 60, 90, 0], [500, 3000, 64, 90, 0]]
    codec, music = MidiEvents(), Music.of_notes(notes, 3000, 480)
    ids = codec.encode(music)
    found = codec.decode(ids)
    np.testing.assert_array_equal(codec.encode(found), ids)  # nothing more is lost
    times, true = (x.seconds(x.notes[:, :2]) for x in (found, music))
    np.testing.assert_allclose(times, true, atol=0.005 + 1e-9)
    np.testing.assert_array_equal(found.notes[:, PITCH], music.notes[:, PITCH])
    assert np.abs(found.notes[:, 3] - music.notes[:, 3]).max() <= 2
    # A gap of 2.6 s is three steps in time; the velocity is said when it changes.
    assert ((ids >= codec.shift) & (ids < codec.loud)).sum() == 6
    assert (ids >= codec.loud).sum() == 2


def test_events_that_mean_nothing_are_passed_over():
    codec = MidiEvents()
    ids = [FIRST, codec.off + 60, codec.on + 62, codec.shift + 9, LAST]
    (note,) = codec.decode(np.array(ids)).notes.tolist()
    assert note[:3] == [0, 10, 62]


@pytest.mark.parametrize("codec", [VoiceTokens(), MidiEvents()])
def test_transposed_tokens_are_those_of_transposed_notes(codec):
    music = Music.of_voices(GRID)
    higher = Music.of_voices(np.where(GRID == SILENT, SILENT, GRID + 3))
    ids = codec.encode(music)
    moved = codec.transposed(ids, 3)
    assert sorted(moved.tolist()) == sorted(codec.encode(higher).tolist())
    np.testing.assert_array_equal(codec.transposed(moved, -3), ids)


# --- MIDI files ---


def test_a_midi_file_is_read_back(tmp_path):
    music = Music.of_notes(
        [[0, 30, 60, 64, 0], [30, 60, 60, 99, 0], [10, 50, 43, 1, 1]],
        100,
        24,
        ((0, 600_000), (48, 300_000)),
    )
    path = tmp_path / "a.mid"
    path.write_bytes(music.to_midi())
    found = Music.of_midi(str(path))
    np.testing.assert_array_equal(found.notes, music.notes)
    assert (found.length, found.resolution) == (100, 24)
    assert found.tempi == music.tempi
    # Two quarters of 0.6 s, then half a quarter of 0.3 s.
    np.testing.assert_allclose(found.seconds(np.array([48, 60])), [1.2, 1.35])
    again = Music.of_example(found.example())
    np.testing.assert_array_equal(again.notes, music.notes)
    assert again.tempi == music.tempi


def test_tempi_are_those_of_the_same_quarter_notes():
    slow = Music.of_notes([], 960, 480, ((0, 800_000), (720, 900_000)))
    music = Music.of_voices(GRID, 4).at_tempi_of(slow)
    assert music.tempi == ((0, 800_000), (6, 900_000)) and music.resolution == 4
    assert music.at_tempi_of(Music.of_notes([], 0)).tempi == ()


def test_pedals_drums_and_open_keys(tmp_path):
    def on(note, velocity=64, time=0, channel=0):
        values = {"note": note, "velocity": velocity, "channel": channel}
        return mido.Message("note_on", time=time, **values)

    def pedal(value, time=0):
        return mido.Message("control_change", control=64, value=value, time=time)

    messages = [
        *(on(60), on(35, channel=9), pedal(127, 5), on(60, 0, 5), on(62, time=10)),
        *(on(60, time=10), on(60, 0, 5), pedal(0, 5), on(62, 0, 10), on(65, time=1)),
    ]
    file = mido.MidiFile(type=0, ticks_per_beat=10)
    file.tracks.append(mido.MidiTrack(messages))
    file.save(tmp_path / "a.mid")
    music = Music.of_midi(str(tmp_path / "a.mid"))
    # Held by the pedal until it is struck again, or until the pedal is up; 62's key
    # stays down longer; 65 never goes up.
    assert music.notes[:, :3].tolist() == [
        [0, 30, 60],
        [20, 50, 62],
        [30, 40, 60],
        [51, 52, 65],
    ]


def test_what_is_no_midi_file_is_one_line(tmp_path):
    torn = write(tmp_path, "a.mid", GRID)
    content = pathlib.Path(torn).read_bytes()
    for bad in (b"", b"RIFF no music", content[:40]):
        pathlib.Path(torn).write_bytes(bad)
        with pytest.raises(DataError, match=r"a\.mid: cannot .* \(.+\); replace it"):
            Music.of_midi(torn)
    with pytest.raises(DataError, match=r"none\.mid: cannot .* \(No such file"):
        Music.of_midi(str(tmp_path / "none.mid"))
    write(tmp_path, "a.mid", np.full((3, 4), SILENT))
    with pytest.raises(DataError, match="holds no note"):
        Music.of_midi(torn)


def test_a_folder_of_midi_files_is_a_source(folder):
    assert sources.is_path(str(folder)) and sources.is_path("nowhere/*.mid")
    found = sources.source(str(folder))
    assert set(found.splits()) == {"train", "validation", "test", "all"}
    lengths = [Music.of_example(x).length for x in found.examples("train")]
    assert lengths == [5, 9, 40]
    assert found.where("train", 1).endswith("train/1.mid")
    before = found.fingerprint("train"), found.fingerprint("test")
    write(folder, "train/0.mid", piece(6))
    found = sources.source(str(folder))
    assert found.fingerprint("train") != before[0]
    assert found.fingerprint("test") == before[1]


def test_all_torn_files_of_a_folder_are_named_at_once(folder):
    for name in ("1.mid", "2.mid"):
        (folder / "train" / name).write_bytes(b"MThd")
    with pytest.raises(DataError) as caught:
        opened(of_kind(MusicTokensConfig, folder))
    said = str(caught.value)
    assert "train/1.mid: cannot be read" in said and "\n" not in said
    assert "(and 1 more: " in said and "train/2.mid: cannot be read" in said


# --- Rows ---


@pytest.mark.parametrize("stride", [0, 16])
def test_every_token_is_predicted_once_after_those_before(folder, stride):
    """Law 7, by position in the piece: FIRST token ... token LAST."""
    config = of_kind(MusicTokensConfig, folder, max_len=32, eval_stride=stride)
    dataset = opened(config)
    seen = {p: [] for p in range(3)}
    for item in range(len(dataset)):
        batch = rows(dataset, [item], EVALUATION)
        counted = batch["weights"][0] > 0
        start = dataset.start[item]
        places = start + np.flatnonzero(counted)
        seen[int(dataset.piece[item])] += places.tolist()
        whole = dataset.elements(dataset.piece[item])
        np.testing.assert_array_equal(batch["targets"][0][counted], whole[places + 1])
        np.testing.assert_array_equal(batch["inputs"][0][counted], whole[places])
        if start and stride:  # at least so many come before
            assert np.flatnonzero(counted)[0] == 32 - stride
    for number, steps in enumerate((5, 9, 40)):
        assert seen[number] == list(range(4 * steps + 1))
        assert dataset.elements(number)[[0, -1]].tolist() == [FIRST, LAST]


def rows(dataset, items, epoch):
    return Batches(dataset).collate(
        len(dataset.config.shapes()) - 1, np.array(items), epoch
    )


def test_transposition_is_a_function_of_seed_epoch_and_item(folder):
    config = of_kind(MusicTokensConfig, folder, max_len=32, transpose=6)
    dataset, codec = opened(config), VoiceTokens()
    ranges = [codec.pitches(dataset.elements(p)[1:-1]) for p in range(3)]
    low, high = np.min([x for x, _ in ranges], 0), np.max([x for _, x in ranges], 0)
    drawn = set()
    for number in range(20):
        epoch = Epoch(3, number, train=True)
        for item in range(len(dataset)):
            batch = rows(dataset, [item], epoch)
            again = rows(opened(config), [item], epoch)
            np.testing.assert_array_equal(batch["targets"], again["targets"])
            n = int(batch["weights"].sum())
            part = dataset.window(item, epoch)
            assert (
                part.start % 16 == 0
                or part.start + part.count == len(dataset.elements(part.piece)) - 1
            )
            drawn.add((item, part.by))
            ids = batch["targets"][0, : n // 4 * 4]
            lowest, highest = codec.pitches(ids[ids != LAST][: n // 4 * 4])
            assert (lowest >= low).all() and (highest <= high).all()
    assert len({by for _, by in drawn}) > 2
    fixed = [dataset.window(i, EVALUATION).by for i in range(len(dataset))]
    assert not any(fixed)


def test_windows_of_training_hold_beginnings_and_ends_and_move(folder):
    dataset = opened(of_kind(MusicTokensConfig, folder, max_len=32))
    train = TrainBatches(Batches(dataset), seed=0)
    starts, firsts, lasts = set(), 0, 0
    for epoch in range(30):
        for item in range(len(dataset)):
            part = dataset.window(item, Epoch(0, epoch, train=True))
            if part.piece == 2:
                starts.add(part.start)
                firsts += part.start == 0
                lasts += part.start + part.count == 161
    assert train.per_epoch == 1 and len(starts) > 5 and firsts and lasts


@pytest.mark.parametrize(("context", "grain"), [(192, 16), (16, 16), (20, 4), (9, 1)])
def test_what_outgrows_the_context_is_read_from_where_rows_begin(context, grain):
    """As training's windows do: positions say the same voice and beat."""
    for given, left in itertools.product(range(1, 3 * context), (1, 7, 5 * context)):
        ids = [*range(given)]
        found, room = reads(ids, left, context, grain)
        assert found and found[0] % grain == 0 and found == ids[found[0] :]
        assert 1 <= room <= left and len(found) + room <= context + 1
        if given + left <= context + 1:
            assert (found, room) == (ids, left)


def test_hidden_notes_are_what_is_to_be_found(folder):
    dataset = opened(of_kind(MusicInpaintingConfig, folder, max_len=32))
    whole, some = 0, 0
    for number in range(12):
        batch = rows(dataset, [2], Epoch(0, number, train=True))
        hidden, real = batch["inputs"][0] == MASK, batch["segments"][0] > 0
        np.testing.assert_array_equal(batch["weights"][0] > 0, hidden)
        same = real & ~hidden
        np.testing.assert_array_equal(
            batch["inputs"][0][same], batch["targets"][0][same]
        )
        kinds = np.where(real, np.arange(32) % 4, 0)
        np.testing.assert_array_equal(batch["token_type_ids"][0], kinds)
        voices = hidden[real].reshape(-1, 4).mean(0)
        whole += set(voices) <= {0.0, 1.0}
        some += 0 < hidden.sum() < 32
    assert 0 < whole < 12 and some


def markov_nats(frames, before):
    """[88] of a frame: a model that thinks keys stay, with 0.75."""
    chance = np.where(before > 0, 0.75, 0.25)
    return -np.log(np.where(frames > 0, chance, 1 - chance))


@pytest.mark.parametrize(("longest", "stride"), [(64, 0), (5, 0), (9, 4)])
def test_nats_per_frame_are_by_the_published_protocol(tmp_path, longest, stride):
    """Sum over 88 keys, first frame not scored, mean over all frames of all pieces."""
    grids = [piece(5, 1), piece(12, 2)]
    for number, grid in enumerate(grids):
        write(tmp_path, f"{number}.mid", grid, resolution=1)
    config = of_kind(
        FramesConfig, tmp_path, max_len=longest, eval_stride=stride, held_out=0.0
    )
    dataset = opened(config)
    task = tasks.build(FramePredictionConfig(), None)
    total = count = hits = concerned = 0.0
    ctx = Context(np.int32(0), {}, False)
    for _, batch in Batches(dataset).evaluation():
        # Of the frame after each: log odds of 3 that a key stays as it is.
        outputs = {"frames": np.where(batch["frames"] > 0, 1, -1) * np.log(3.0)}
        total += float(task.terms(outputs, batch, ctx)["frame"])
        count += float(task.weights(batch)["frame"])
        accuracy = task.metrics(outputs, batch, ctx)["accuracy"]
        hits, concerned = hits + accuracy.total, concerned + accuracy.weight
    rolls = [Music.of_voices(x, 1).roll() for x in grids]
    nats = [markov_nats(x[1:], x[:-1]).sum(1) for x in rolls]
    assert count == sum(map(len, nats)) == 4 + 11
    assert total / count == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)
    pairs = [(a, b) for x in rolls for a, b in itertools.pairwise(x)]
    assert hits == sum((a & b).sum() for a, b in pairs)
    assert concerned == sum((a | b).sum() for a, b in pairs)


def test_a_piano_roll_is_transposed_within_the_corpus(folder):
    dataset = opened(of_kind(FramesConfig, folder, steps=4, max_len=64, transpose=4))
    every = np.flatnonzero(np.asarray(dataset.flat).any(0))
    for number in range(10):
        epoch = Epoch(0, number, train=True)
        batch = rows(dataset, [0, 1, 2], epoch)
        for row in range(3):
            by = dataset.window(row, epoch).by
            plain = rows(dataset, [row], EVALUATION)["frames"][0]
            moved = batch["frames"][row]
            np.testing.assert_array_equal(moved, np.roll(plain, by, 1))
            keys = np.flatnonzero(moved.any(0))
            assert every[0] <= keys[0] and keys[-1] <= every[-1]
            assert batch["frame_weights"][row, 1] == 1  # openings are learned


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (MusicTokensConfig, {"codec": "notes"}, ["data.codec='notes'", "events"]),
        (MusicTokensConfig, {"max_len": 30}, ["data.max_len=30", "multiple of 4"]),
        (MusicTokensConfig, {"eval_stride": 24}, ["data.eval_stride=24", "512"]),
        (MusicTokensConfig, {"transpose": 30}, ["data.transpose=30", "[0, 24]"]),
        (MusicInpaintingConfig, {"codec": "events"}, ["data.codec", "voices"]),
        (FramesConfig, {"buckets": (300,)}, ["data.buckets=(300,)", "256"]),
    ],
)
def test_mistakes_are_one_line(kind, fields, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        kind(**fields).validate()
    for word in words:
        assert word in str(error.value)


def test_the_chorales_are_the_published_ones(shared_data):
    shared_data("jsb_chorales")
    steps = {"train": 55_228, "validation": 18_408, "test": 18_900}
    for split, total in steps.items():
        found = [
            [Music.of_example(x) for x in sources.source(name).examples(split)]
            for name in ("jsb_chorales", "jsb_chorales_quarter")
        ]
        assert [sum(x.length for x in part) for part in found] == [total, total // 4]
        ids = VoiceTokens().encode(found[0][0])
        assert len(ids) == 4 * found[0][0].length

"""Law 6 at full strength: a training that is killed again and again loses nothing."""

import kill_harness
import numpy as np
import pytest


def test_ten_kills_change_no_byte(tmp_path):
    """The short form of `python tests/kill_harness.py --kills=100`."""
    place = kill_harness.Place(tmp_path, steps=60)
    place.start("whole").finish()
    report = kill_harness.torture(place, "killed", kills=10, seed=1)
    assert report.hit.total() == 10
    assert len(report.hit) >= 4, report  # different phases
    assert kill_harness.differing(place, "whole", "killed") == []
    assert len(set(kill_harness.rows_of(tmp_path / "killed"))) == 30


def test_killed_on_8_devices_on_4_and_ended_on_1_it_has_seen_the_same_rows(tmp_path):
    """The same examples exactly. Sums over devices are taken in another order: 1e-4 in
    a loss of 5.5 leaves room for that. Dropout is off: its bits follow the layout.
    """
    names = "dropout", "attention_dropout"
    plain = tuple(f"--config.model.trunk.{name}=0.0" for name in names)
    place = kill_harness.Place(tmp_path, steps=30, settings=plain)
    place.start("whole").finish()
    for devices, step in ((8, 8), (4, 18)):
        life = place.start("moved", devices)
        assert life.until(lambda x=step: kill_harness.reached(tmp_path / "moved") >= x)
        assert life.kill()
    place.start("moved").finish()
    one, other = tmp_path / "whole", tmp_path / "moved"
    assert kill_harness.rows_of(one) == kill_harness.rows_of(other)
    a, b = kill_harness.losses_of(one), kill_harness.losses_of(other)
    assert len(a) == len(b) == 15
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ['{"step": 2, "time": 1.5, "tokens": 3}'])
def test_only_what_a_clock_measures_is_left_out(text, tmp_path):
    line = '{"step": 2, "train/loss": 1.5, "train/data_wait": 0.1, "time": 9.5}\n'
    (tmp_path / "metrics.jsonl").write_text(text + "\n" + line)
    left = kill_harness.metrics_of(tmp_path)
    assert left == '{"step": 2, "tokens": 3}\n{"step": 2, "train/loss": 1.5, }\n'

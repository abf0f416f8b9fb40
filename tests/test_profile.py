"""A profile: times of operations by module, and what a run says of itself."""

import json
import re

import pytest
from test_plan import TEXTS, config

from triform import observe, train
from triform.runtime import metrics, profile
from triform.runtime.errors import UserError

TEXT = """
HloModule jit_pinned

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p), metadata={op_name="jit(f)/jvp(M)/a/norm/add"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %dot.3 = f32[2]{0} dot(%x, %x), metadata={op_name="jit(f)/transpose(jvp(M))/a/up/dot"}
  ROOT %fusion.2 = f32[2]{0} fusion(%dot.3), kind=kLoop, calls=%fused
}
"""


def test_operations_have_the_names_of_their_modules():
    found = profile.origins(TEXT)
    assert found["dot.3"] == "jit(f)/transpose(jvp(M))/a/up/dot"
    # A fusion without a name has that of what it calls.
    assert found["fusion.2"] == "jit(f)/jvp(M)/a/norm/add"
    table = profile.table(
        profile.Profile({"dot.3": 3.0, "fusion.2": 1.0}, {}), [TEXT], 2, 8.0, 0.5
    )
    assert re.search(r"norms +500\.000 ms +25\.0%", table)
    assert re.search(r"1500\.000 ms +75\.0%  a/up/dot \(backward\)", table)
    assert "a step took 4000.000 ms, of which 250.000 ms waiting for data" in table


def test_time_inside_an_operation_is_not_its_own():
    events = [(0, 100, "while"), (10, 30, "dot"), (50, 20, "add"), (200, 5, "dot")]
    found = list(profile._own_times(events))
    assert sorted(found) == [("add", 20), ("dot", 5), ("dot", 30), ("while", 50)]


@pytest.mark.parametrize("text", ["5", "5:3", "0:3", "a:b", ""])
def test_steps_of_a_profile_are_first_and_last(text):
    assert observe.steps_of("20:25") == (20, 25)
    with pytest.raises(UserError, match=r"20:25"):
        observe.steps_of(text)


def test_a_run_is_profiled_and_compared(sources, tmp_path, capsys):
    sources(texts=TEXTS)
    ours = config()
    ours.steps, ours.log_every, ours.evaluation.every = 12, 4, 12
    ours.log_norms = True
    train.run(ours, str(tmp_path), profile=(5, 7))
    out = capsys.readouterr().out
    assert re.search(r"writing the profile of steps 5 to 7: \d", out)
    for kind in ("attention", "feed-forward", "optimiser", "logits and loss"):
        assert re.search(rf"^  {kind} +[\d.]+ ms +[\d.]+%$", out, re.M), kind
    shares = re.findall(r"^  \w[\w -]* +[\d.]+ ms +([\d.]+)%$", out, re.M)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)
    assert re.search(r"ms +[\d.]+%  decoder/layer_0/", out)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))
    told = re.search(r"a checkpoint: predicted (\S+) kB, measured (\S+) kB", out)
    assert float(told[2]) > float(told[1]) > 0
    assert re.search(r"memory a device: predicted .*B, compiled .*B, measured", out)
    lines = [x for x in metrics.read_lines(str(tmp_path)) if "train/loss" in x]
    assert [x["step"] for x in lines] == [4, 8, 12]
    for line in lines:
        assert line["train/flops_per_second"] > 0
        assert "train/mfu" not in line  # a CPU's peak is not known
        assert line["train/grad_norm/decoder/layer_0/attention"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["log_norms"] is True

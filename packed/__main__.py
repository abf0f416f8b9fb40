"""What sweep.py --on=packed starts: trains the runs of a file together.

python -m triform.packed RUNS.json [AT_MOST]

RUNS.json is a list of {"workdir": ..., "config": ..., "flags": [...]}. Exit codes as
train.py's.
"""

import json
import sys

from absl import flags

from triform import config_flag, packed
from triform.runtime import files, launch, signals
from triform.runtime.errors import TriformError, UserError


def main(argv: list[str]) -> int:
    """Trains them; the exit code."""
    text = files.read_text(argv[1]) if len(argv) > 1 else None
    if text is None:
        raise UserError(f"{argv[1:]}: name a file with a list of runs")
    members, failed = [], False
    for asked in json.loads(text):
        try:
            config = config_flag.configured(asked["config"], asked["flags"])
            members.append((config, asked["workdir"]))
        except (TriformError, flags.Error) as error:  # it alone: no such config
            packed.tell_error(asked["workdir"], launch.one_line(error))
            failed = True
    stop = signals.Interrupt()
    at_most = int(argv[2]) if len(argv) > 2 else 0
    outcomes = packed.run(members, stop=stop, at_most=at_most)
    if stop():
        return signals.INTERRUPTED
    return 1 if failed or any(isinstance(x, str) for x in outcomes) else 0


if __name__ == "__main__":
    launch.launch(main, lambda: None, __doc__, sys.argv, arguments=True)

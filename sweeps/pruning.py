"""Which running runs to stop early, from the metrics in their workdirs."""

import statistics

from triform.sweeps import runs

LEAST = 4  # other runs that must have come as far


def reason(member: runs.Member, sweep: runs.Sweep) -> str:
    """Why to stop a run now; '' to let it go on.

    The median rule (Golovin et al. 2017, section 3.2.2, with best values in place of
    running means): at its newest evaluation, step s, the best value of the run is worse
    than the median of the best values that the other runs had by step s, of at least
    LEAST that came as far.
    """
    own = runs.curve_of(member.folder, sweep.metric)
    if not own or own[-1][0] >= member.steps:
        return ""
    step = own[-1][0]
    others = []
    for other in sweep.members:
        curve = runs.curve_of(other.folder, sweep.metric)
        if other.folder != member.folder and curve and curve[-1][0] >= step:
            others.append(runs.best_of([x for x in curve if x[0] <= step], sweep))
    if len(others) < LEAST:
        return ""
    best, median = runs.best_of(own, sweep), statistics.median(others)
    if not sweep.better(median, best):
        return ""
    return (
        f"at step {step} its best {sweep.metric} {best:.5g} is worse than the median "
        f"{median:.5g} of {len(others)} others"
    )

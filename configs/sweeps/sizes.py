"""Two widths, each with learning rates around what suits it, and two seeds.

    python sweep.py --config=gpt_shakespeare_char --workdir=DIR --sweep_file=sizes

It was not run.
"""

from triform.sweeps.values import Settings, chain, grid, log, product


def get_sweep() -> list[Settings]:
    """Ten runs: not every combination, which a grid would be."""
    small = product(
        grid({"model.trunk.d_model": [64]}),
        grid({"optim.learning_rate": log(1e-3, 4e-3, 3)}),
    )
    large = product(
        grid({"model.trunk.d_model": [128]}),
        grid({"optim.learning_rate": log(5e-4, 2e-3, 2)}),
    )
    return product(chain(small, large), grid({"seed": range(2)}))

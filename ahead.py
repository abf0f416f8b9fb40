"""train.py --dry_run: what a run would do and need, here or on devices elsewhere."""

from collections.abc import Callable

from absl import flags

from triform import forecast, plan
from triform.configs.schema import ExperimentConfig
from triform.experiment import Experiment
from triform.runtime import chips
from triform.runtime.progress import stage


def define() -> None:
    """Defines the flags of a dry run but for --dry_run itself."""
    about = "With --dry_run: plan for other devices: 8xH100, 2x8xA100-80GB, v5e-64."
    flags.DEFINE_string("devices", None, about)
    about = "With --dry_run: memory per device, as 16GB; default: what JAX uses."
    flags.DEFINE_string("memory", None, about)
    about = "With --dry_run: assumed share of the peak FLOP/s of the devices."
    flags.DEFINE_float("utilisation", forecast.UTILISATION, about, 0.01, 1.0)
    about = "With --dry_run: also compile the step and print the memory it needs."
    flags.DEFINE_bool("compile", False, about)


def dry_run(config: ExperimentConfig, resolve: Callable) -> None:
    """Prints the plan, for the devices that are here or those that flags name.

    `resolve`: config -> (the config with what follows from the data, codecs).
    """
    given = flags.FLAGS
    devices = chips.parse(given.devices) if given.devices else None
    memory = chips.parse_memory(given.memory) if given.memory else 0
    if devices:
        chips.simulate(devices.count)
    config = resolve(config)[0]
    experiment = Experiment(config)
    on = forecast.hardware(config, devices, memory, given.utilisation)
    print(plan.describe(experiment, str(devices or "")))
    print(forecast.describe(config, on), flush=True)
    if given.compile:
        with stage("compiling the step"):
            step = forecast.compiled(experiment)
        print(forecast.compiled_line(step))
    print(plan.export(config))
    print(plan.sources(config, read=True))

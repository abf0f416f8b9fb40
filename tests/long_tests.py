"""Which tests `make test` leaves to `make test-long`: each with its reason."""

# Start of a test's name as pytest prints it -> why.
LONG = {
    "tests/test_chat_run.py": "trainings",
    "tests/test_checkpoint.py::test_sigkill": "processes",
    "tests/test_console.py": "an installation and processes",
    "tests/test_dalle.py": "trainings",
    "tests/test_docs.py": "three trainings",
    "tests/test_divergence.py::test_a_run_goes_on": "three trainings for every action",
    "tests/test_encoding.py::test_a_killed_run": "processes",
    "tests/test_entry_points.py": "processes",
    "tests/test_faults.py": "a training after every fault",
    "tests/test_families.py::test_scan_equals": "three compilations for every family",
    "tests/test_flash.py::test_block_by_block": "compiles for every mask",
    "tests/test_flash.py::test_blocks_that_hold": "compiles for every mask",
    "tests/test_flash.py::test_dropped_weights": "many samples",
    "tests/test_forks.py": "trainings",
    "tests/test_kills.py::test_ten": "processes",
    "tests/test_kills.py::test_killed": "processes",
    "tests/test_hosts_run.py": "processes",
    "tests/test_interop_workdir.py::test_memory": "a process",
    "tests/test_models.py::test_remat": "compiles three models",
    "tests/test_models.py::test_scan": "compiles two models for every window",
    "tests/test_own_bert.py": "a training",
    "tests/test_own_data.py::test_a_template": "a training for every template",
    "tests/test_placements.py::test_every_placement": "compiles for every placement",
    "tests/test_recovery.py::test_a_run_goes_on": "five trainings",
    "tests/test_tools.py::test_the_program": "a process",
    "tests/test_sweeps.py::test_a_run_that_is": "processes",
    "tests/test_sweeps.py::test_a_sweep": "processes",
    "tests/test_train.py::test_a_mistake_is_one_line": "processes",
    "tests/test_train.py::test_a_run_killed": "processes",
    "tests/test_train.py::test_an_interruption": "processes",
    "tests/test_train.py::test_dry_run": "a process",
    "tests/test_train.py::test_finished_run": "processes",
    "tests/test_train.py::test_generate": "processes",
    "tests/test_train.py::test_non_finite_loss": "a process",
    "tests/test_train.py::test_one_run_at_a_time": "processes",
    "tests/test_train.py::test_other_data": "processes",
    "tests/test_train.py::test_resume": "processes",
    "tests/test_train.py::test_sigterm": "processes",
    "tests/test_train.py::test_smoke": "a training for every config",
    "tests/test_train.py::test_workdir_of_another": "processes",
}


def is_long(name: str) -> bool:
    """Is a test of this name one of LONG?"""
    return name.startswith(tuple(LONG))

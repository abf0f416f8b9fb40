"""One short file per experiment; `get_config(variant)` returns an ExperimentConfig."""

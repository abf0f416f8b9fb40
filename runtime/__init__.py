"""Neither model, data nor objective: optimiser, placement, checkpoints, metrics."""

"""Neither model, nor data, nor objective: optimiser, placement, checkpoints, metrics."""

"""From examples to batches: sources, codecs, the store, and kinds of data."""

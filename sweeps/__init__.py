"""Many runs of train.py: which ones, where they run, and what came of them."""

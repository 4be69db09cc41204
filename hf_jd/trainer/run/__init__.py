"""What surrounds the steps of a run: set-up, sampling, resuming, evaluation, logs."""

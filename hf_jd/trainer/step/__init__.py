"""One update: micro-batches -> rows -> Gramian -> weights -> `.grad`."""

"""One micro-batch's loss -> each instance's share of it."""

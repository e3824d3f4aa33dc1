"""Ground truth: the monitor and its rivals on organisms whose thoughts are known."""

"""Which samples are in which micro-batch, computed from the seed."""

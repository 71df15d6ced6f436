"""Encoded tensors under a key, in sealed shards."""

"""Tiny models with the real architecture of each family."""

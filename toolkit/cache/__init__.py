"""Inspect the caches of a run: verify, explain, clean up, count, and decode latents to images."""

"""Look into the caches of a run: verify them, ask why, clean up, count, and see what a latent looks like."""

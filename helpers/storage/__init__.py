"""Named bytes, anywhere, and how to put them there safely. Knows nothing of images or models."""

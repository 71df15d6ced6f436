"""Images to latents and captions to text tensors in caches, before training or while it runs."""

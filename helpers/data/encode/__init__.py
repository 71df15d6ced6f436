"""Images to latents and captions to text embeddings, before training or behind it."""

"""Text encoders: captions to conditioning tensors."""

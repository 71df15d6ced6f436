"""Names and layouts of LoRA files."""

"""Files and objects: local folders, S3, tars, Hugging Face datasets, and how to write safely. Knows nothing about images or models."""

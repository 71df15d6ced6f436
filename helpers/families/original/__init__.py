"""The layouts that base models are published in: names of layers in the authors' own code, and whole models in one file."""

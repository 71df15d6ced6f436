"""How a base model is found, checked, recognized and loaded."""

"""SimpleTuner's parts: see documentation/ARCHITECTURE.md for the map."""

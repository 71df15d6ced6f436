"""What families share about their networks and pipelines."""

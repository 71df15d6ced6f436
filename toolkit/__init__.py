"""Stand-alone programs around training, each with --help."""

"""The images of every dataset: list the files, read sizes and captions, decide which are used, and keep all that in SQLite."""

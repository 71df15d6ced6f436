"""Which images there are: list files, read sizes and captions, keep them in SQLite with the reason for every file left out."""

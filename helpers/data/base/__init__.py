"""What every other room of `data` uses: records, random draws, decoding, threads. Imports no other room."""

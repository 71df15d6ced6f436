"""What the other folders of `data` are built on: records, random draws, image decoding, threads. It imports none of them."""

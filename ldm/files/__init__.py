"""Files as every room reads and writes them: text in one encoding, hashes, and files that are replaced whole."""

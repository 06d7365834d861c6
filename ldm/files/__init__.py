"""Reading and writing files: text and JSON in UTF-8, hashes, atomic replacement."""

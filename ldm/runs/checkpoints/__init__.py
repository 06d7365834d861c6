"""Checkpoints: their folder, files, the choice of one to resume, and the background writer."""

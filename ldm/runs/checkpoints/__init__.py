"""Checkpoints: their folder, files, resume and background writer."""

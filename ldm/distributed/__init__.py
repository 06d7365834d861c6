"""Splitting work over processes, and joining the process group of a launcher."""

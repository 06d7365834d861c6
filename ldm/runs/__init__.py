"""Run directories: records, status, journal, checkpoints, comparison."""

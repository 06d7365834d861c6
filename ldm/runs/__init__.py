"""The run directory: records, status, journal, comparison."""

"""Model files in the layouts of other programs, each read into a ``Bundle`` and written from one."""

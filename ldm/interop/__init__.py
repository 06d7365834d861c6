"""Other programs' model layouts, each read into a ``Bundle`` and written from one."""

"""The commands. They alone read sys.argv."""

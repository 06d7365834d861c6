"""The commands; the only code that reads sys.argv or prints."""

"""Judges that read drawn images."""

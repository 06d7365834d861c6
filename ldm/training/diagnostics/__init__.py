"""Tools around training: non-finite updates, replay, verification of a resume."""

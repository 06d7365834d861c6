"""Evaluation: samples judged, reconstructions, likelihood, samplers, figures and the report of a run."""

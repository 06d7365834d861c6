"""Samplers measured: orders, conformance, on a trained run."""

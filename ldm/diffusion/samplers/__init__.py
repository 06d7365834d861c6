"""Samplers, by family; ``registry`` names them all."""

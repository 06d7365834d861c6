"""Samplers, one module a family; ``registry`` lists them by name."""

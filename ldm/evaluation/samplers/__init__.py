"""Measurements of samplers: orders and distances on exact targets, distances on a trained run."""

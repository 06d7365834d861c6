"""The mathematics of diffusion, in the notation of docs/equations.md.

Imports torch, jaxtyping and the configuration alone.
"""

"""The mathematics of diffusion, in the notation of the equations page; imports torch, jaxtyping and the configuration alone."""

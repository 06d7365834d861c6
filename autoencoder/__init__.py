"""A KL autoencoder: images to latents and back. Knows nothing of diffusion or of training infrastructure."""

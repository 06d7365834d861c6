"""What each stage trains: autoencoder, text encoder, diffusion model, classifier."""

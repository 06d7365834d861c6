"""Stages of training: autoencoder, text encoder, diffusion model, classifier."""

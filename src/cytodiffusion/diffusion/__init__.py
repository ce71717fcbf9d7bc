"""Noise, the networks that remove it, and how they are trained and sampled."""

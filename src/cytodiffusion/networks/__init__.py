"""Networks that can be made into a `Denoiser`."""

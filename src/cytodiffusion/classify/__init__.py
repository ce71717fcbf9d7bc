"""From the errors a denoiser makes to a name, how sure it is, and how strange the cell is."""

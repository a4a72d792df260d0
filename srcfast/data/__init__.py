"""Records, readers, images, and the packed prefix forest."""

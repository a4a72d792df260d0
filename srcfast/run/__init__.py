"""A run on disk and on the screen: directory, chunks of work, progress, signals."""

"""The training loop: packed global batches, optimizer, checkpoints, profiler."""

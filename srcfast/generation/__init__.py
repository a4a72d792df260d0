"""Decoding: forked KV caches, sampling, sentence-level beam search."""

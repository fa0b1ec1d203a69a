"""Decoding: caches of keys and values, sampling, generation."""

"""The cache of past frames, and the RoPE positions of its keys."""

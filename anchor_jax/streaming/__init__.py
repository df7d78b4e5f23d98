"""The sampler: a stream is a pure function of its state."""

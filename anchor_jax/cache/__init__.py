"""What a stream remembers, and where it seems to be."""

"""The weights of a stream: in one file, in a folder, or from a training."""

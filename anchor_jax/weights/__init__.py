"""The weights of a stream: kept in one file, in a folder, or by a training."""

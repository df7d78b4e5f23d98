"""Speed and memory: benchmarks, rooflines, and programs compiled for other chips."""

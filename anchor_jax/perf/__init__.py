"""What a machine does and costs: benchmarks, rooflines, programs compiled ahead."""

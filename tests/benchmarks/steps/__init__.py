"""What benchmarks of a training step share: a clock by part, peaks of memory, networks with random weights."""

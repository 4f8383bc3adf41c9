"""What tests and benchmarks of encoders need: random checkpoints of real and of tiny shape."""

"""What `visionaccel report` writes: one self-contained HTML page of findings and measurements."""

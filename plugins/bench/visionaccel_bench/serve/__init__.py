"""What `visionaccel bench serve` measures: vLLM servers under text streams and image requests."""

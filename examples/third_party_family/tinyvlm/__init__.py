"""TinyVLM: a family of vision towers for visionaccel, and the model for vLLM."""

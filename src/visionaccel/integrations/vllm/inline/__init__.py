"""The in-line mode: images are encoded in the engine's step, by the module in the place of vLLM's vision tower."""

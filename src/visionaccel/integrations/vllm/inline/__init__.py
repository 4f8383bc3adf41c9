"""The in-line mode: images are encoded in the engine's step, by the module that replaces vLLM's vision tower."""

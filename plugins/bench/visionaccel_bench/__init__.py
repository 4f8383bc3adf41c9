"""Measurements of encoders and of vLLM servers, the fault suite, reports and the demo."""

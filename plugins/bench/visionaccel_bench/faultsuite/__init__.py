"""The fault suite: faults planted in a simulated device behind real vLLM servers, and what became of the requests."""

"""The pipelined mode: an EC connector owns the encode service, and vLLM decodes while images are encoded."""

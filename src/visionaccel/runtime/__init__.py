"""What keeps encoders serving: isolation of one image's fault, and fallback."""

"""What a vision tower is made of."""

"""What `visionaccel bench encode` and `bench placement` measure: encoders side by side, each in a separate process."""

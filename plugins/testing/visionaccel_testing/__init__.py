"""What tests of encoders and backends need: conformance kit, simulated device, random checkpoints, pytest plug-in."""

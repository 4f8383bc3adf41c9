"""What the documentation site says of itself: tables that are read off the package, and links that leave `docs/`."""

"""One package per model."""

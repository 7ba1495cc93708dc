"""Training of draft heads and controllers with DeepSpeed; imports mmspec, never eval."""

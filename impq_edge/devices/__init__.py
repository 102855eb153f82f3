"""What a device has, and what a file will occupy on it."""

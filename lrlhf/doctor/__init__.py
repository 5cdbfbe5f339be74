"""What this machine can run, and proof that lrlhf is right and fast on it."""

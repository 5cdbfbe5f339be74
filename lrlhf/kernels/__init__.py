"""What makes CPUs fast: operations in fewer passes over memory."""

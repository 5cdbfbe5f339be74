"""The frozen base and the roles on it."""

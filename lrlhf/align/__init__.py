"""The three stages in a row, and what they made of the model."""

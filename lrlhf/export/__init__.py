"""What comes out of a run, in the forms that other tools take."""

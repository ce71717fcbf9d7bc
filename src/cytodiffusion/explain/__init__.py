"""What would have to change for a cell to be of another class, as arrays and as pictures."""

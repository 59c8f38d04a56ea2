"""What is spent, how it is spent, and the record of it."""

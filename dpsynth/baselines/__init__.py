"""What a network has to beat, and the controls whose answer is known."""

"""What a frozen model makes of rows, read off its activations."""

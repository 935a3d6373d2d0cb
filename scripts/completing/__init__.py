"""What `steerl complete` is made of."""

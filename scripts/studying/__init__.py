"""What `steerl study` is made of."""

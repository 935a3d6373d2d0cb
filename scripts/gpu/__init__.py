"""What `steerl bench --gpu` runs: the tests that need a GPU, and figures of the card."""

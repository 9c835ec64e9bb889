"""`tora bench`: speed and memory, side by side in one run, on random weights of the real shapes."""

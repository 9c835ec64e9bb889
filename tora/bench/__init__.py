"""`tora bench`: speed and memory of several settings, measured in one run on random weights in real shapes."""

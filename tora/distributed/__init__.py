"""What ranks share: the process group, and tensors that they hold in parts."""

"""The life of a run: loop, checkpoints, recovery, and the proof that the engines follow."""

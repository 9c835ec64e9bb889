"""What a run shows: metrics, console, curve and summary."""

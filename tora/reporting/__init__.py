"""What a run reports: metrics, console output, reward curve and summary."""

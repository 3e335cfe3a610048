"""What the schedules of all GPU families share."""

"""What outsiders send: faults of HTTP, and events that are none."""

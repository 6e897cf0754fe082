"""The loop, its schedules and its checkpoints."""

"""The loop, checkpoints, schedules, averages of weights, and the contract that every method meets."""

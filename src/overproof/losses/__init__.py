"""Pure functions of logits and features; every one returns a value per sample."""

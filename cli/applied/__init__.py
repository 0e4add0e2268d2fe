"""``frugal apply``: techniques on a real encoder, what they save there and what they cost."""

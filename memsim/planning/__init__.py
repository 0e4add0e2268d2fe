"""Ways to divide a step of training among accelerators: memory, time, and the search for the best."""

"""What kernels move between multiprocessors, L2 and HBM: schedules of tiles, replayed."""

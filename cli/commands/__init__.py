"""One file for each command of ``frugal``; each defines `command`."""

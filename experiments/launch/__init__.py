"""Several processes: how they join, and a supervisor that keeps them going on one machine."""

"""Engine hosts: processes that join the daemon's back socket and run attempts on a model."""

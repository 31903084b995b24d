"""Change the ratio while clients are served, when queues say that another one serves the load better."""

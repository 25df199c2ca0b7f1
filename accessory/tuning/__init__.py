"""What trains: which parameters, which adapters, and whether they do."""

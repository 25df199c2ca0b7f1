"""What the command line offers: a file for each kind of verb."""

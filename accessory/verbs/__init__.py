"""The verbs of the command line, in one file for each kind."""

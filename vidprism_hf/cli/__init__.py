"""The command line: one file a command; parse, build, call."""

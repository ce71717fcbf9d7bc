"""The command line: one file for each verb. Heavy imports stay inside the commands."""

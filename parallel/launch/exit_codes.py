"""Exit codes of the programs here, for scripts and schedulers: what to do about each stands in a word."""

DONE = 0
DEFECT = 1
"""A fault of ours or of the machine, with its traceback."""
REFUSED = 2
"""The recipe, the data or the disk must be mended first: the same command would be refused again."""
LOST = 75
"""Ended for another rank's sake (EX_TEMPFAIL of sysexits.h): the same command resumes from the newest checkpoint."""
STOPPED = 85
"""Asked to stop, and has saved (Linux's ERESTART): the same command resumes from there."""
INTERRUPTED = 130
SIGNALLED = 128
"""To this shells add the number of the signal that ended a process."""

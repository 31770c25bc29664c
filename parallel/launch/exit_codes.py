"""Exit codes of all programs of this project, for scripts and schedulers."""

DONE = 0
DEFECT = 1
"""A defect of this program or of the machine, with its traceback."""
REFUSED = 2
"""The recipe, the data or the disk must be corrected first: the same command would be refused again."""
LOST = 75
"""Ended because another rank was lost (EX_TEMPFAIL of sysexits.h): the same command resumes from the checkpoint."""
STOPPED = 85
"""Stopped by a signal and saved (Linux's ERESTART): the same command resumes from there."""
INTERRUPTED = 130
SIGNALLED = 128
"""Shells report a process that was ended by a signal as this plus the number of the signal."""

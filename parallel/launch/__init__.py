"""Launching: the rank of a process, rendezvous, agreement of ranks, heartbeat, exit codes. Import single modules."""

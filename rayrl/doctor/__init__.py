"""What of this machine suits a run, what does not, and what to do about it."""

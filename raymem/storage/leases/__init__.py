"""Lets one driver of all hosts at a time work on a run, by a lease that expires when its holder is gone."""

"""What other people put into their own Ray Train trainers."""

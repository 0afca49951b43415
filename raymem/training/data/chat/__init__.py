"""Renders conversations in a chat template, and finds the text of them that is to be predicted."""

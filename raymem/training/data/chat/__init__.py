"""Conversations in a chat template: which text of them is to be predicted."""

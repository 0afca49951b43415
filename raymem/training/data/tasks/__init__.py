"""Prepares data on nodes that share an object store and nothing else: jobs in steps, of which any node may do any.

What every node can read is prepared so: files on ``s3://``, ``gs://`` and ``hf://``, and data sets of the Hugging Face
hub. Files of one machine's file tree are prepared on that machine.
"""

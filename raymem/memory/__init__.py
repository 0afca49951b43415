"""Measuring memory. Bytes are ``int`` and named ``*_bytes``; GiB appear only when printing."""

"""The core of the tests in environments of the lowest, the pinned and the newest versions."""

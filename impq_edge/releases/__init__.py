"""The pipeline from a checkpoint to a validated file, and the papers that go with it."""

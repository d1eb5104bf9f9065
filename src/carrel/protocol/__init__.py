"""What gateway, runner and clients say to each other. pydantic only, no I/O."""

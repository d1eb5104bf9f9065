"""The road from an agent to its model: credentials, metering, budgets, and the scripted model."""

"""Runs beside one agent: owns it, and carries what it does to the gateway."""

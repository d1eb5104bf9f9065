"""The scripted model: an Anthropic Messages API of our own that says and does what a script tells it.

It stands where the real upstream stands, for the demo, our tests and benchmarks, and our users' CI.
"""

from carrel.model_gateway.scripted.app import create_app
from carrel.model_gateway.scripted.script import BUILTIN, Rule, Script, ScriptError, load_script, parse_script

__all__ = ["BUILTIN", "Rule", "Script", "ScriptError", "create_app", "load_script", "parse_script"]

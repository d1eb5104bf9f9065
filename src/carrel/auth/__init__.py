"""Who calls, and whether they may."""

from carrel.auth.admin_key import AdminKey
from carrel.auth.authenticator import ALL, Authenticator
from carrel.auth.jwks import Jwks
from carrel.auth.jwt import JwtOptions, JwtVerifier, issue
from carrel.auth.keys import make_key
from carrel.auth.tickets import make_ticket

__all__ = [
    "ALL",
    "AdminKey",
    "Authenticator",
    "Jwks",
    "JwtOptions",
    "JwtVerifier",
    "issue",
    "make_key",
    "make_ticket",
]

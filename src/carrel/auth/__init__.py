"""Who calls, and whether they may."""

from carrel.auth.admin_key import AdminKey
from carrel.auth.principals import ADMIN, Principal

__all__ = ["ADMIN", "AdminKey", "Principal"]

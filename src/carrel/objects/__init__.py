"""Where snapshots and artifacts are kept: on disk, in S3 and what speaks like it, in Google's and Microsoft's clouds."""

from carrel.objects.places import AzurePlace, DiskPlace, GcsPlace, MemoryPlace, Place, S3Place
from carrel.objects.sealing import Keyring
from carrel.objects.store import Objects

__all__ = ["AzurePlace", "DiskPlace", "GcsPlace", "Keyring", "MemoryPlace", "Objects", "Place", "S3Place"]

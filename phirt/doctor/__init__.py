"""What is wrong with an installation of phirt, and the one command that mends it."""

from phirt.doctor.examination import diagnose
from phirt.doctor.finding import Area, Finding, Severity

__all__ = ["Area", "Finding", "Severity", "diagnose"]

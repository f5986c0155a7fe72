"""Work that is done once: `Work` has the claims on it, a `Crew` claims and does it. Read `claims.py` first."""

from nimbos.work.claims import LEASE_S, Claim, ClaimLost, Work
from nimbos.work.crew import Crew, until_written
from nimbos.work.shares import shares_of

__all__ = ["LEASE_S", "Claim", "ClaimLost", "Crew", "Work", "shares_of", "until_written"]

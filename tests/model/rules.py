"""What may happen: every operation of a memory manager, accesses by CPU and host, forks, ends.

A rule is a function of the world and of arguments from domains. It does one thing to a memory
manager and to its model, and compares what both say. Hypothesis and the seeded driver use the same.
"""

from __future__ import annotations

from tests.model import access_rules, family_rules, mapping_rules
from tests.model.rule import RULES, Rule

__all__ = ["RULES", "Rule", "access_rules", "family_rules", "mapping_rules"]

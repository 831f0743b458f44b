"""The provenance that tests seal their artifacts with."""

from __future__ import annotations

from stages.store.records import Cost, Provenance

CODE = {"version": "0.1.0", "torch": "2"}
PROVENANCE = Provenance(code=CODE, device="cpu", duration_s=1.5, cost=Cost(cpu_s=1.0, peak_memory_mib=64.0))

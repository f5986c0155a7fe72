"""What a process has used and holds, by meter. The budgets themselves are rows of the ledger's tree."""

from __future__ import annotations

from dataclasses import dataclass, field

from nimbos.kernel.events import BudgetExhausted, BudgetReserved, BudgetSettled


@dataclass(slots=True, kw_only=True)
class Spending:
    """`reserved`: what is held, by call and meter. `exhausted`: what ended, until there is more."""

    used: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, dict[str, int]] = field(default_factory=dict)
    exhausted: BudgetExhausted | None = None

    def copy(self) -> Spending:
        return Spending(used=dict(self.used), reserved=dict(self.reserved), exhausted=self.exhausted)

    def reserve(self, reserved: BudgetReserved) -> str | None:
        """Why it cannot be."""
        if reserved.amount < 0:
            return "less than nothing is reserved"
        held = self.reserved.get(reserved.call_id, {})
        self.reserved[reserved.call_id] = {
            **held,
            reserved.meter: held.get(reserved.meter, 0) + reserved.amount,
        }
        return None

    def settle(self, settled: BudgetSettled) -> str | None:
        if any(amount < 0 for amount in settled.used.values()):
            return "less than nothing is used"
        for meter, amount in settled.used.items():
            self.used[meter] = self.used.get(meter, 0) + amount
        if settled.call_id:
            self.reserved.pop(settled.call_id, None)
        return None

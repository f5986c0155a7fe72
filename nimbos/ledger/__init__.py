"""Who used what, what it cost, and what may still be used: reserve, extend, settle; budgets, limits, prices, reports.

`Ledger` decides (`ledger.py`), `Desk` runs it in a server (`desk.py`), `Recovery` settles what the dead left behind.
What changes budgets, limits or prices is a transaction as a generator, for `Database.run`.
"""

from nimbos.ledger.alerts import Alert, Fired, add_alert, alerts_of, change_alert, find_alert, remove_alert
from nimbos.ledger.allowances import Allowance
from nimbos.ledger.attempts import Attempt, Attempts, with_what_is_paid
from nimbos.ledger.budgets import Budget
from nimbos.ledger.desk import Desk
from nimbos.ledger.export import export_asks
from nimbos.ledger.families import ProcessUse, family_use
from nimbos.ledger.journal import Journal
from nimbos.ledger.ledger import Extended, Ledger, Progress, Reserved, Settled
from nimbos.ledger.limits import Limit, all_limits, limits_of, set_limit
from nimbos.ledger.prices import Price, PriceTable, current_table, set_prices
from nimbos.ledger.recovery import Recovery
from nimbos.ledger.reports import PAGE_MOST, ROWS, ROWS_MOST, Report, Span, UsageRow, Used, usage, usage_buckets
from nimbos.ledger.rows import Settlement
from nimbos.ledger.running import Running
from nimbos.ledger.spent import Spent, spent
from nimbos.ledger.tree import all_budgets, budgets_of, find_budget, remove_budget, set_budget

__all__ = [
    "PAGE_MOST",
    "ROWS",
    "ROWS_MOST",
    "Alert",
    "Allowance",
    "Attempt",
    "Attempts",
    "Budget",
    "Desk",
    "Extended",
    "Fired",
    "Journal",
    "Ledger",
    "Limit",
    "Price",
    "PriceTable",
    "ProcessUse",
    "Progress",
    "Recovery",
    "Report",
    "Reserved",
    "Running",
    "Settled",
    "Settlement",
    "Span",
    "Spent",
    "UsageRow",
    "Used",
    "add_alert",
    "alerts_of",
    "all_budgets",
    "all_limits",
    "budgets_of",
    "change_alert",
    "current_table",
    "export_asks",
    "family_use",
    "find_alert",
    "find_budget",
    "limits_of",
    "remove_alert",
    "remove_budget",
    "set_budget",
    "set_limit",
    "set_prices",
    "spent",
    "usage",
    "usage_buckets",
    "with_what_is_paid",
]

"""Run folders become one page that opens offline; nothing here needs torch."""

from overproof.report.page import write_report
from overproof.report.seeds import group_by_seed
from overproof.report.table import summarise
from overproof.report.text import text_table

__all__ = ["group_by_seed", "summarise", "text_table", "write_report"]

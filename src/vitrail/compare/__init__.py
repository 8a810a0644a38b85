"""Several runs side by side: results, the settings that differ, and curves."""

from vitrail.compare.runs import Comparison, Run, compare
from vitrail.compare.show import print_comparison, write_page

__all__ = ["Comparison", "Run", "compare", "print_comparison", "write_page"]

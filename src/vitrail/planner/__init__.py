"""Plans: what a run takes on GPUs, found before any is paid for. `vitrail plan`; all of it is prediction."""

from vitrail.planner.planning import Choice, Plan, plan

__all__ = ["Choice", "Plan", "plan"]

"""The loop and what it needs: loss, schedule, checkpoints, guards, metrics, receipt."""

"""From a plan to files: task, store, check."""

"""What people see in the terminal: a run's live display, its plain lines for log files, and its closing summary.

Only commands import this room. It may know the reports and the units of training, and nothing of models or data.
"""

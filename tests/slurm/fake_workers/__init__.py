"""Stand-ins for engines and trainers, in seconds and without torch.

The supervisor treats workers as commands with exit codes; these have the real ones' manners
(files, signals, exit codes) and do what ``<run>/fake.json`` says.
"""

"""The job: submission, the batch script, the supervisor. Never imports torch."""

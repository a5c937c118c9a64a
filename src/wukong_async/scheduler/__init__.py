"""A job's life, as the client sees it: plan, upload, start, listen, watch, clean up."""

from wukong_async.scheduler.attached import AttachedJob, JobProgress
from wukong_async.scheduler.scheduler import JobSummary, Options, Scheduler

__all__ = ["AttachedJob", "JobProgress", "JobSummary", "Options", "Scheduler"]

"""Prefect tasks: each one engine call over a batch, with a name and retries around it.

Values in and out are small. Storage options and progress never pass through Prefect: tasks look them
up by run id (`tasks.live`). No task decides what a run does; that is the flows' business.
"""

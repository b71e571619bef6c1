"""What stands between a run and Prefect: its server and signals."""

"""Running notebooks: one with papermill, many on Dask; what is done, what failed, and why."""

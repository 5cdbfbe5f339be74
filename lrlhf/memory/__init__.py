"""The memory plan: how many bytes a run needs on each device, before it runs and before a weight is downloaded."""

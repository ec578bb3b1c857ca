"""The scheduler beside other policies, and the simulator beside a real server."""

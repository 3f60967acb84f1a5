from hypothesis import HealthCheck, settings

# A loaded machine is no reason to fail; 50 examples of each property keep this folder to seconds.
settings.register_profile(
    "kitspec", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kitspec")

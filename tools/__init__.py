"""What measures and publishes this repository; run as python -m tools.NAME."""
